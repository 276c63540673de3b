"""The Ollama dialect over HTTP, against a fake engine whose answers are scripted by the prompt."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_client import Supervised, supervised, until

MODELS = ("tiny", "thinker", "caller", "filler", "refused", "Org/Nested")


@pytest.fixture(scope="module")
def server() -> Iterator[Supervised]:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home), MODELS) as running:
        yield running


@pytest.fixture
def client(server: Supervised) -> Iterator[httpx.Client]:
    with server.client() as made:
        yield made


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}]} | more


def submitted(answer: httpx.Response) -> dict[str, Any]:
    """What the engine was asked, from an `echo`."""
    assert answer.status_code == 200, answer.text
    return json.loads(answer.json()["message"]["content"])  # type: ignore[no-any-return]


def echoed(client: httpx.Client, **more: Any) -> dict[str, Any]:
    return submitted(client.post("/api/chat", json=chat("echo", stream=False, **more)))


# --- streams and whole answers -------------------------------------------------------------------------------------------------


def test_a_chat_streams_one_json_object_a_line_and_one_write_a_line(client: httpx.Client) -> None:
    with client.stream("POST", "/api/chat", json=chat("n=3 delay=0.05")) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/x-ndjson"
        writes = list(answer.iter_raw())
    assert all(write.endswith(b"\n") and write.count(b"\n") == 1 for write in writes)
    lines = [json.loads(write) for write in writes]
    assert [line["message"] for line in lines] == [{"role": "assistant", "content": text} for text in ("w0 ", "w1 ", "w2 ", "")]
    assert [line["done"] for line in lines] == [False, False, False, True]
    assert all(line["model"] == "tiny" and datetime.fromisoformat(line["created_at"]) for line in lines)
    assert not any("done_reason" in line or "eval_count" in line for line in lines[:-1])
    assert lines[-1]["done_reason"] == "stop"


def test_the_figures_of_an_answer_add_up(client: httpx.Client) -> None:
    end = client.post("/api/chat", json=chat("n=7 first=0.05 delay=0.01", stream=False)).json()
    names = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
    total, load, prompt, evaluation = (end[name] for name in names)
    assert all(isinstance(end[name], int) and end[name] > 0 for name in names)
    assert total >= load + prompt + evaluation
    assert total >= 0.1e9
    assert (end["prompt_eval_count"], end["eval_count"]) == (len("n=7 first=0.05 delay=0.01"), 7)


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_the_whole_answer_is_the_joined_stream(client: httpx.Client, path: str) -> None:
    call = chat("n=20") if path == "/api/chat" else {"model": "tiny", "prompt": "n=20"}

    def text(line: dict[str, Any]) -> str:
        return line["message"]["content"] if path == "/api/chat" else line["response"]

    whole = client.post(path, json=call | {"stream": False})
    assert whole.headers["content-type"] == "application/json; charset=utf-8"
    stream = [json.loads(line) for line in client.post(path, json=call).text.splitlines()]
    assert text(whole.json()) == "".join(text(line) for line in stream) == "".join(f"w{i} " for i in range(20))
    assert whole.json()["done"] is True
    for member in ("done_reason", "eval_count", "prompt_eval_count"):
        assert whole.json()[member] == stream[-1][member]


def test_generate_has_a_response_in_every_line_and_the_context_in_the_last(client: httpx.Client) -> None:
    lines = [json.loads(line) for line in client.post("/api/generate", json={"model": "tiny", "prompt": "n=2"}).text.splitlines()]
    assert [line["response"] for line in lines] == ["w0 ", "w1 ", ""]
    assert lines[-1]["context"] == [*b"n=2", 0, 1]
    assert not any("context" in line for line in lines[:-1])
    raw = client.post("/api/generate", json={"model": "tiny", "prompt": "n=2", "raw": True, "stream": False}).json()
    assert "context" not in raw


def test_thinking_is_kept_apart(client: httpx.Client) -> None:
    call = chat("n=4 think=2", model="thinker", think=True)
    lines = [json.loads(line)["message"] for line in client.post("/api/chat", json=call).text.splitlines()]
    assert [(line["content"], line.get("thinking")) for line in lines[:4]] == [
        ("", "w0 "),
        ("", "w1 "),
        ("w2 ", None),
        ("w3 ", None),
    ]
    whole = client.post("/api/generate", json={"model": "thinker", "prompt": "n=4 think=2", "stream": False}).json()
    assert (whole["thinking"], whole["response"]) == ("w0 w1 ", "w2 w3 ")


def test_a_cut_answer_says_length(client: httpx.Client) -> None:
    end = client.post("/api/chat", json=chat("n=9", stream=False, options={"num_predict": 4})).json()
    assert (end["done_reason"], end["eval_count"]) == ("length", 4)


# --- tools, formats, log-probabilities -----------------------------------------------------------------------------------------------

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": ["string", "null"]}}, "$defs": {"a": {"anyOf": [{}]}}},
    },
}


def test_tools_reach_the_engine_and_none_are_none(client: httpx.Client) -> None:
    bare = {"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}, "new": 1}
    got = echoed(client, model="caller", tools=[WEATHER, bare, {"function": {"name": "g", "parameters": None}}])
    assert got["tools"] == [
        WEATHER,
        {"type": "function", "function": {"name": "f", "parameters": {}}},
        {"type": "function", "function": {"name": "g"}},
    ]
    for none in ([], None):
        assert echoed(client, tools=none)["tools"] is None


def test_a_call_comes_whole_in_a_line_of_its_own_and_its_arguments_are_an_object(client: httpx.Client) -> None:
    call = chat("n=2 call=get_weather,get_time", model="caller", tools=[WEATHER])
    lines = [json.loads(line) for line in client.post("/api/chat", json=call).text.splitlines()]
    assert [line["message"]["content"] for line in lines] == ["w0 ", "w1 ", "", "", ""]
    calls = [call for line in lines for call in line["message"].get("tool_calls", [])]
    assert all(
        line["message"]["role"] == "assistant" and list(line) == ["model", "created_at", "message", "done"] for line in lines[:-1]
    )
    assert [call["function"] for call in calls] == [
        {"index": 0, "name": "get_weather", "arguments": {"city": "Paris"}},
        {"index": 1, "name": "get_time", "arguments": {"city": "Paris"}},
    ]
    assert len({call["id"] for call in calls}) == 2
    assert all(len(call["id"]) == len("call_") + 8 and call["id"].startswith("call_") for call in calls)
    assert lines[-1]["done_reason"] == "stop"
    whole = client.post("/api/chat", json=call | {"stream": False}).json()
    assert whole["message"]["content"] == "w0 w1 "
    assert [call["function"] for call in whole["message"]["tool_calls"]] == [call["function"] for call in calls]
    assert whole["done_reason"] == "stop"


def test_a_format_reaches_the_engine_as_it_was_written(client: httpx.Client) -> None:
    assert echoed(client, format="")["format"] is None
    assert echoed(client, format="json")["format"]["kind"] == "json"
    schema = {"type": "object", "properties": {"z": {"const": 10**30}, "a": {}}, "required": ["z"]}
    got = echoed(client, format=schema)["format"]
    assert (got["kind"], json.loads(got["source"])) == ("json_schema", schema)
    assert list(json.loads(got["source"])["properties"]) == ["z", "a"]


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_log_probabilities_come_with_their_tokens_and_whole(client: httpx.Client, path: str) -> None:
    call = chat("n=2", prompt="n=2", logprobs=True, top_logprobs=2.0)
    lines = [json.loads(line) for line in client.post(path, json=call).text.splitlines()]
    told = [one for line in lines for one in line.get("logprobs", [])]
    first = {"token": "w0 ", "logprob": -0.5, "bytes": [119, 48, 32]}
    assert told[0] == first | {"top_logprobs": [first, first | {"token": "w0 1", "logprob": -1.5}]}
    assert [one["token"] for one in told] == ["w0 ", "w1 "]
    assert client.post(path, json=call | {"stream": False}).json()["logprobs"] == told
    plain = client.post(path, json=call | {"stream": False, "top_logprobs": None}).json()["logprobs"]
    assert plain[0] == first
    for off in ({"logprobs": False}, {"logprobs": None}):
        assert "logprobs" not in client.post(path, json=call | {"stream": False} | off).json()


# --- load and unload -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize("empty", [{}, {"prompt": "", "messages": []}, {"prompt": None, "messages": None}])
def test_an_empty_prompt_loads_and_with_keep_alive_0_unloads(client: httpx.Client, path: str, empty: dict[str, Any]) -> None:
    loaded = client.post(path, json={"model": "Org/Nested"} | empty)
    assert len(loaded.text.splitlines()) == 1
    assert (loaded.json()["done"], loaded.json()["done_reason"]) == (True, "load")
    assert "Org/Nested:latest" in [model["name"] for model in client.get("/api/ps").json()["models"]]
    unloaded = client.post(path, json={"model": "org/nested:latest", "keep_alive": 0} | empty).json()
    assert (unloaded["done_reason"], unloaded["model"]) == ("unload", "org/nested:latest")
    assert "Org/Nested:latest" not in [model["name"] for model in client.get("/api/ps").json()["models"]]
    again = client.post(path, json={"model": "Org/Nested", "keep_alive": "0s"} | empty).json()
    assert again["done_reason"] == "unload"


@pytest.mark.parametrize("value", ["soon", "5", "1h30", "", [], {}, True, "5 m", "--5m"])
def test_a_keep_alive_that_is_no_duration_is_a_400(client: httpx.Client, value: Any) -> None:
    expected = 200 if value == "5" else 400  # a number of seconds as text is one of Ollama's forms: "0", "300"
    answer = client.post("/api/generate", json={"model": "tiny", "keep_alive": value})
    assert answer.status_code == expected, answer.text
    if expected == 400:
        assert "keep_alive" in answer.json()["error"]


def test_a_preloaded_model_stays_until_a_request_says_otherwise(home: Path) -> None:
    with supervised(home, ("pre",), models={"preload": ["pre"], "keep_alive": "1m"}) as server, server.client() as client:

        def expires_at() -> str:
            return until("it", lambda: client.get("/api/ps").json()["models"])[0]["expires_at"]  # type: ignore[no-any-return]

        assert expires_at().startswith("2318")
        client.post("/api/chat", json={"model": "pre", "messages": [{"role": "user", "content": "n=1"}]})
        assert expires_at().startswith("2318")
        client.post("/api/generate", json={"model": "pre", "keep_alive": "5m"})
        assert not expires_at().startswith("2318")
        assert client.post("/api/generate", json={"model": "pre", "keep_alive": "0"}).json()["done_reason"] == "unload"
        assert client.get("/api/ps").json() == {"models": []}
        client.post("/api/generate", json={"model": "pre"})
        assert not expires_at().startswith("2318")


def test_ps_tells_when_a_model_goes_and_for_ever_is_a_date(client: httpx.Client) -> None:
    def entry() -> dict[str, Any]:
        return next(m for m in client.get("/api/ps").json()["models"] if m["name"] == "tiny:latest")

    client.post("/api/generate", json={"model": "tiny", "keep_alive": "1h30m"})
    left = datetime.fromisoformat(entry()["expires_at"]).timestamp() - datetime.now().timestamp()
    assert 5300 < left < 5401
    client.post("/api/generate", json={"model": "tiny", "keep_alive": -1})
    assert entry()["expires_at"].startswith("2318")
    client.post("/api/generate", json={"model": "tiny", "prompt": "n=1"})  # no field: as before
    assert entry()["expires_at"].startswith("2318")
    assert entry()["context_length"] == 4096
    assert entry()["size_vram"] == entry()["size"] > 0
    listed = next(m for m in client.get("/api/tags").json()["models"] if m["name"] == "tiny:latest")
    assert entry() | listed == entry()


# --- what reaches the engine -------------------------------------------------------------------------------------------------------


def test_defaults_are_ollamas_and_a_seed_is_drawn(client: httpx.Client) -> None:
    first, second = echoed(client), echoed(client)
    sampling = first["sampling"]
    assert (sampling["temperature"], sampling["top_k"], sampling["top_p"], sampling["min_p"]) == (0.8, 40, 0.9, 0.0)
    assert sampling["seed"] != second["sampling"]["seed"]
    assert (first["max_tokens"], first["num_ctx"], first["stop"], first["think"], first["truncate"]) == (None, None, [], None, True)


def test_options_reach_the_engine(client: httpx.Client) -> None:
    options = {
        "temperature": 0,
        "top_k": 5.0,
        "top_p": 0.5,
        "min_p": 0.1,
        "seed": 42,
        "num_predict": 9,
        "num_ctx": 128.0,
        "stop": ["a", ""],
    }
    got = echoed(client, options=options, truncate=False)
    sampling = {"seed": 42, "temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1}
    assert got["sampling"].items() >= sampling.items()
    assert (got["max_tokens"], got["num_ctx"], got["stop"], got["truncate"]) == (9, 128, ["a"], False)


def test_penalties_reach_the_engine(client: httpx.Client) -> None:
    options = {"repeat_penalty": 1.1, "repeat_last_n": -1.0, "presence_penalty": 0.5, "frequency_penalty": -2}
    sampling = echoed(client, options=options)["sampling"]
    assert (sampling["repeat_penalty"], sampling["penalty_last_n"]) == (1.1, -1)
    assert (sampling["presence_penalty"], sampling["frequency_penalty"], sampling["penalize_prompt"]) == (0.5, -2, True)
    assert echoed(client, options={"repeat_last_n": 0})["sampling"]["penalty_last_n"] == 0
    off = echoed(client, options={"repeat_penalty": 0, "typical_p": 0})["sampling"]
    assert (off["repeat_penalty"], off["penalty_last_n"]) == (1.0, 64)


def test_what_clients_send_for_off_is_off(client: httpx.Client) -> None:
    n8n = {"top_k": -1, "seed": 0, "num_predict": -1, "num_ctx": 0, "stop": "x", "penalize_newline": True, "low_vram": False}
    langchain = {"mirostat": None, "mirostat_eta": 0.1, "tfs_z": 1, "repeat_penalty": 1.0, "repeat_last_n": 64, "temperature": None}
    neutral = {"typical_p": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "num_gpu": 1, "num_thread": 8, "num_keep": 4}
    got = echoed(client, options=n8n | langchain | neutral)
    assert (got["sampling"]["top_k"], got["sampling"]["seed"], got["sampling"]["temperature"]) == (0, 0, 0.8)
    assert (got["max_tokens"], got["num_ctx"], got["stop"]) == (None, None, ["x"])


def test_null_is_absent_and_unknown_fields_are_ignored_at_every_depth(client: httpx.Client) -> None:
    nulls = dict.fromkeys(("options", "tools", "format", "keep_alive", "think", "logprobs", "truncate"))
    assert echoed(client, **nulls, new={"deep": [1]})["sampling"]["top_k"] == 40
    assert echoed(client, tools=[], format="")["sampling"]["top_k"] == 40
    assert echoed(client, options={"new": 1})["sampling"]["top_k"] == 40
    call = {"model": "tiny", "stream": False, "messages": [{"role": "USER", "content": "n=1", "images": None, "new": 1}]}
    assert client.post("/api/chat", json=call).status_code == 200


def test_a_conversation_with_tools_reaches_the_template(client: httpx.Client) -> None:
    call = {"id": "c1", "function": {"index": 0, "name": "get_weather", "arguments": {"city": "Paris"}}}
    messages = [
        {"role": "system", "content": "s"},
        {"role": "assistant", "thinking": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "cold", "tool_name": "other", "tool_call_id": "c2"},
        {"role": "user", "content": "echo"},
    ]
    got = echoed(client, messages=messages)["messages"]
    function = {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert got[1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "id": "c1", "function": function}],
    }
    assert got[2] == {"role": "tool", "content": "sunny", "name": "get_weather"}
    assert got[3] == {"role": "tool", "content": "cold", "name": "other", "tool_call_id": "c2"}


def test_generate_builds_the_prompt_that_chat_builds_unless_raw(client: httpx.Client) -> None:
    def sent(**more: Any) -> dict[str, Any]:
        answer = client.post("/api/generate", json={"model": "tiny", "prompt": "echo", "stream": False} | more).json()
        return json.loads(answer["response"])  # type: ignore[no-any-return]

    assert sent()["messages"] == [{"role": "user", "content": "echo"}]
    assert sent(system="s")["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "echo"}]
    assert (sent(raw=True)["prompt"], sent(raw=True)["messages"]) == ("echo", None)
    assert (sent(context=[5, 6])["context_ids"], sent(template="ignored")["prompt"]) == ([5, 6], None)
    assert (sent(truncate=False)["truncate"], sent(truncate=True, shift=False)["truncate"]) == (False, True)


def test_a_suffix_goes_with_the_bare_prompt_to_a_model_that_fills_in(client: httpx.Client) -> None:
    call = {"model": "filler", "prompt": "echo", "suffix": "return", "stream": False}
    for raw in (False, True):
        got = json.loads(client.post("/api/generate", json=call | {"raw": raw}).json()["response"])
        assert (got["prompt"], got["suffix"], got["messages"]) == ("echo", "return", None)
    assert json.loads(client.post("/api/generate", json=call | {"suffix": ""}).json()["response"])["suffix"] is None


def test_think_false_is_always_welcome(client: httpx.Client) -> None:
    assert echoed(client, think=False)["think"] is False
    assert echoed(client, model="thinker", think="high")["think"] is True


# --- bad input ---------------------------------------------------------------------------------------------------------------------


def calling(*arguments: dict[str, Any]) -> dict[str, Any]:
    calls = [{"function": {"name": "f", "arguments": one}} for one in arguments]
    return {"messages": [{"role": "assistant", "tool_calls": calls}]}


REFUSALS: list[tuple[dict[str, Any], int, str]] = [
    ({"model": None}, 400, "model is required"),
    ({"model": ""}, 400, "model is required"),
    ({"model": "nope"}, 404, "model 'nope' not found"),
    ({"model": "a b"}, 400, "invalid model name"),
    ({"model": 5}, 400, "model: expected string"),
    ({"model": "refused"}, 400, "refused:latest is broken: a tensor is missing"),
    ({"messages": "hi"}, 400, "messages: expected array"),
    ({"messages": [1]}, 400, "messages[0]: expected object, got int"),
    ({"messages": [{"content": "x"}]}, 400, "role"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role: must be system, user, assistant or tool"),
    ({"messages": [{"role": "user", "content": [1]}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400, "tiny does not support images"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]}, 400, "arguments"),
    ({"messages": [{"role": "user", "content": "x", "images": "aGk="}]}, 400, "messages[0].images: expected array"),
    (calling({"n": 10**30}), 400, "a number in the request is too large"),
    (calling({"n": "x" * 2**20}), 400, "messages[0].tool_calls[0].function.arguments: more than 1048576 bytes"),
    (calling({"n": "x" * 2**19}, {"n": "x" * 2**19}), 400, "messages[0].tool_calls[1].function.arguments: more than 1048576 bytes"),
    ({"messages": [{"role": "user", "content": "x"}] * 4097}, 400, "messages: expected array of length <= 4096"),
    ({"options": {"temperature": "hot"}}, 400, 'option "temperature" must be of type float32'),
    ({"options": {"seed": "1"}}, 400, 'option "seed" must be of type int'),
    ({"options": {"seed": 1.5}}, 400, 'option "seed" must be of type int'),
    ({"options": {"num_predict": True}}, 400, 'option "num_predict" must be of type int'),
    ({"options": {"stop": [1]}}, 400, 'option "stop" must be of type []string'),
    ({"options": {"stop": ["x"] * 17}}, 400, 'option "stop"'),
    ({"options": {"stop": ["x" * 257]}}, 400, 'option "stop"'),
    ({"options": {"temperature": -1}}, 400, 'option "temperature": expected number >= 0'),
    ({"options": {"top_p": 1.5}}, 400, 'option "top_p"'),
    ({"options": {"seed": 2**60}}, 400, 'option "seed"'),
    ({"options": {"typical_p": 0.5}}, 400, 'option "typical_p" is not supported'),
    ({"options": {"repeat_penalty": -1}}, 400, 'option "repeat_penalty": expected number >= 0'),
    ({"options": {"repeat_penalty": "a"}}, 400, 'option "repeat_penalty" must be of type float32'),
    ({"options": {"repeat_last_n": -2}}, 400, 'option "repeat_last_n"'),
    ({"options": {"repeat_last_n": 1.5}}, 400, 'option "repeat_last_n" must be of type int'),
    ({"options": {"presence_penalty": 2.5}}, 400, 'option "presence_penalty": expected number <= 2'),
    ({"options": {"frequency_penalty": -3}}, 400, 'option "frequency_penalty": expected number >= -2'),
    ({"options": []}, 400, "options: expected object"),
    ({"format": "xml"}, 400, 'format: must be "json" or a JSON schema'),
    ({"format": 5}, 400, 'format: must be "json" or a JSON schema'),
    ({"format": []}, 400, 'format: must be "json" or a JSON schema'),
    ({"format": {"a": "x" * 2**20}}, 400, "format: more than 1048576 bytes"),
    ({"format": json.loads('{"a":' * 70 + "1" + "}" * 70)}, 400, "format: nested more than 64 deep"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tiny does not support tools"),
    ({"tools": ["f"]}, 400, "tools[0]: expected object"),
    ({"tools": [{"type": "function"}]}, 400, "tools[0]: object missing required field function"),
    ({"tools": [{"function": {"name": ""}}]}, 400, "tools[0].function.name: expected string of length >= 1"),
    ({"tools": [{"function": {"name": "f", "parameters": "x"}}]}, 400, "tools[0].function.parameters: expected object"),
    ({"tools": {}}, 400, "tools: expected array"),
    ({"tools": {}, "messages": []}, 400, "tools: expected array"),
    ({"tools": [{"n": "x" * 2**20}]}, 400, "tools: more than 1048576 bytes"),
    ({"think": True}, 400, '"tiny" does not support thinking'),
    ({"think": "low"}, 400, '"tiny" does not support thinking'),
    ({"think": "very"}, 400, "think"),
    ({"think": 1}, 400, "think"),
    ({"logprobs": 1}, 400, "logprobs: expected bool"),
    ({"top_logprobs": 21}, 400, "top_logprobs: expected int <= 20"),
    ({"top_logprobs": 1.5, "logprobs": True}, 400, "top_logprobs: expected an integer, got 1.5"),
    ({"shift": "no"}, 400, "shift: expected bool"),
    ({"stream": "yes"}, 400, "stream: expected bool"),
]


@pytest.mark.parametrize(("change", "status", "sentence"), REFUSALS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [True, False])
def test_bad_input_is_refused_in_ollamas_shape_also_when_streaming(
    client: httpx.Client, change: dict[str, Any], status: int, sentence: str, stream: bool
) -> None:
    answer = client.post("/api/chat", json=chat("n=1", stream=stream) | change)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    assert sentence in answer.json()["error"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"suffix": "x"}, "tiny does not support insert"),
        ({"images": ["aGk="]}, "tiny does not support images"),
        ({"raw": True, "system": "s"}, "raw mode does not support template, system, or context"),
        ({"raw": True, "context": [1]}, "raw mode does not support template, system, or context"),
        ({"prompt": 5}, "prompt: expected string"),
        ({"raw": True, "template": "t"}, "raw mode does not support template, system, or context"),
        ({"model": "filler", "suffix": "x", "system": "s"}, "suffix: what stands between two texts has neither system nor context"),
        ({"images": "aGk="}, "images: expected array"),
        ({"format": "xml"}, 'format: must be "json" or a JSON schema'),
        ({"context": ["a"]}, "context[0]: expected int"),
        ({"context": [-1]}, "context[0]: expected int >= 0"),
    ],
)
def test_bad_input_of_generate_is_refused(client: httpx.Client, change: dict[str, Any], sentence: str) -> None:
    answer = client.post("/api/generate", json={"model": "tiny", "prompt": "n=1"} | change)
    assert (answer.status_code, sentence in answer.json()["error"]) == (400, True), answer.text


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "missing request body"),
        (b" \n", "missing request body"),
        (b"{", "not valid JSON"),
        (b"[]", "expected object, got array"),
        (b'"x"', "expected object, got str"),
        (b"null", "expected object"),
        (b'{"model": NaN}', "not valid JSON"),
        (b'{"model": "\xff"}', "not valid JSON"),
        (b"\xff\xfe{\x00", "not valid JSON"),
        (b'{"model":"tiny","options":{"temperature":1e999}}', "temperature"),
        (b'{"model":"tiny","options":{"temperature":' + b"9" * 5000 + b"}}", "temperature"),
        (b'{"a":' * 5000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_a_body_that_is_no_json_object_is_a_400(client: httpx.Client, path: str, body: bytes, sentence: str) -> None:
    answer = client.post(path, content=body)
    assert answer.status_code == 400, answer.text
    assert sentence.replace("got str", "got string") in answer.json()["error"]


def test_a_lone_surrogate_is_200_or_400_and_a_repeated_key_counts_once(client: httpx.Client) -> None:
    for text in (rb"\ud83d", rb"\udc00 x", rb"\ud83d\ud83d"):
        body = b'{"model":"tiny","stream":false,"messages":[{"role":"user","content":"n=1 %s"}]}' % text
        assert client.post("/api/chat", content=body).status_code in (200, 400)
    twice = b'{"model":"nope","model":"tiny","stream":false,"messages":[{"role":"user","content":"n=1"}]}'
    assert client.post("/api/chat", content=twice).status_code == 200


def test_an_engines_refusal_is_a_plain_error_before_the_first_byte(client: httpx.Client) -> None:
    for stream in (True, False):
        answer = client.post("/api/chat", json=chat("fail=400", stream=stream))
        assert (answer.status_code, answer.json()) == (400, {"error": "scripted failure"})
    assert client.post("/api/chat", json=chat("fail=500")).status_code == 500


def test_curl_needs_no_content_type_and_chunks_are_welcome(client: httpx.Client) -> None:
    body = json.dumps(chat("n=1", stream=False)).encode()
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/api/chat?x=1", content=body, headers=form).status_code == 200
    assert client.post("/api/chat", content=iter([body[:9], body[9:]])).status_code == 200


# --- lists and small things ----------------------------------------------------------------------------------------------------------


def test_tags_have_what_clients_cannot_do_without(client: httpx.Client) -> None:
    models = client.get("/api/tags").json()["models"]
    assert {"tiny:latest", "thinker:latest", "Org/Nested:latest"} <= {model["name"] for model in models}
    assert [m["modified_at"] for m in models] == sorted((m["modified_at"] for m in models), reverse=True)
    for model in models:
        assert model["name"] == model["model"]
        assert datetime.fromisoformat(model["modified_at"]).tzinfo
        assert isinstance(model["size"], int)
        assert model["size"] > 0
        assert len(bytes.fromhex(model["digest"])) == 32
        for member in ("parent_model", "format", "family", "parameter_size", "quantization_level"):
            assert isinstance(model["details"][member], str)
        assert "completion" in model["capabilities"]
    assert "thinking" in next(m for m in models if m["name"] == "thinker:latest")["capabilities"]


@pytest.mark.parametrize("member", ["model", "name"])
def test_show_has_what_clients_cannot_do_without(client: httpx.Client, member: str) -> None:
    shown = client.post("/api/show", json={member: "thinker", "verbose": True}).json()
    info = shown["model_info"]
    assert info[f"{info['general.architecture']}.context_length"] == 4096
    assert (info["general.basename"], info["general.parameter_count"]) == ("thinker", 64)
    assert shown["modelfile"].startswith("FROM ")
    assert (shown["parameters"], shown["template"]) == ("", "")
    assert not shown.keys() & {"license", "system", "messages", "projector_info"}
    assert shown["tensors"] == [{"name": "w", "type": "F32", "shape": [8, 8]}]
    assert "tensors" not in client.post("/api/show", json={member: "thinker"}).json()
    assert shown["capabilities"] == ["completion", "thinking"]
    assert shown["details"]["family"] == "fake"
    assert client.post("/api/show", json={}).json() == {"error": "model is required"}
    assert client.post("/api/show", json={member: "nope"}).status_code == 404
    builtin = client.post("/api/show", json={member: "mlxd-tiny"})
    if builtin.status_code == 200:
        assert "self-test" in builtin.json()["modelfile"]
        assert "{%" in builtin.json()["template"]


def test_show_tells_what_a_model_can_and_its_license(client: httpx.Client, server: Supervised) -> None:
    can = {name: client.post("/api/show", json={"model": name}).json()["capabilities"] for name in ("tiny", "caller", "filler")}
    assert can == {"tiny": ["completion"], "caller": ["completion", "tools"], "filler": ["completion", "insert"]}
    file = server.home / "models" / "caller" / "License.md"
    file.write_text("Do as you like.")
    shown = client.post("/api/show", json={"model": "caller"}).json()
    assert (shown["license"], "tools" in shown["template"]) == ("Do as you like.", True)
    file.unlink()


def test_copilot_sees_the_name_that_it_asked_for(client: httpx.Client) -> None:
    for agent, name in (("GitHubCopilotChat/0.27", "TINY:latest"), ("curl/8", "tiny")):
        shown = client.post("/api/show", json={"model": "TINY:latest"}, headers={"user-agent": agent}).json()
        assert shown["model_info"]["general.basename"] == name


@pytest.mark.parametrize("path", ["/api/pull", "/api/push"])
def test_pull_and_push_refuse_what_is_wrong(client: httpx.Client, path: str) -> None:
    for body in (
        {},
        {"model": ""},
        {"name": "a b"},
        {"model": "../x"},
        {"model": 5},
        {"model": "x", "stream": 1},
        {"insecure": "no"},
    ):
        answer = client.post(path, json=body)
        assert (answer.status_code, list(answer.json())) == (400, ["error"])
    assert client.post(path, json={}).json() == {"error": "invalid model name"}
    assert client.post(path, content=b"").json() == {"error": "missing request body"}


def test_push_is_not_there_and_says_so(client: httpx.Client) -> None:
    for body in ({"model": "org/new"}, {"name": "new:7b", "stream": False}):
        answer = client.post("/api/push", json=body)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (501, "false")
        assert "mlxd does not push" in answer.text


def test_blobs_are_not_there_and_a_malformed_digest_is_a_400(client: httpx.Client) -> None:
    good = "sha256:" + "0123456789abcdef" * 4
    for digest, status in ((good, 501), (good.replace(":", "-"), 501), ("sha256:00", 400), (good.upper(), 400), ("md5:1", 400)):
        head, post = client.head(f"/api/blobs/{digest}"), client.post(f"/api/blobs/{digest}", content=b"x")
        assert (head.status_code, head.content, post.status_code) == (status, b"", status)
        assert "digest" in post.json()["error"] or "mlxd makes no models of blobs" in post.json()["error"]


def test_the_builtin_model_says_what_it_is_for(client: httpx.Client) -> None:
    for model in client.get("/api/tags").json()["models"]:
        if model["name"] == "mlxd-tiny:latest":
            assert "self-test" in model["details"]["description"]


def test_names_are_echoed_as_written(client: httpx.Client) -> None:
    for name in ("tiny", "TINY:latest", "tiny:LATEST"):
        assert client.post("/api/chat", json=chat("n=1", stream=False, model=name)).json()["model"] == name


def test_ollama_is_running(client: httpx.Client) -> None:
    assert client.get("/").text == "Ollama is running"
    for path in ("/", "/api/version", "/api/tags"):
        head = client.head(path)
        assert (head.status_code, head.text) == (200, "")
    assert all(part.isdigit() for part in client.get("/api/version").json()["version"].split("."))


def test_unknown_paths_are_404_and_wrong_methods_405_in_json(client: httpx.Client) -> None:
    for path in ("/nowhere", "/api/nowhere", "/api/chat/", "/API/CHAT"):
        answer = client.get(path)
        assert (answer.status_code, list(answer.json())) == (404, ["error"])
    wrong = client.get("/api/chat")
    assert (wrong.status_code, wrong.headers["allow"], list(wrong.json())) == (405, "POST", ["error"])
    assert client.post("/api/tags").status_code == 405
