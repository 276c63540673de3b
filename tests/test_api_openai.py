"""The OpenAI dialect over HTTP, against a fake engine whose answers are scripted by the prompt."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_client import Supervised, supervised

MODELS = ("tiny", "thinker", "refused", "Org/Nested")
CHAT = "/v1/chat/completions"


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


def echoed(client: httpx.Client, **more: Any) -> dict[str, Any]:
    answer = client.post(CHAT, json=chat("echo", **more))
    assert answer.status_code == 200, answer.text
    return json.loads(answer.json()["choices"][0]["message"]["content"])  # type: ignore[no-any-return]


def events(text: str) -> list[Any]:
    """The data of a stream; every event is one `data:` line and a blank one."""
    assert text.endswith("\n\n")
    parts = text.removesuffix("\n\n").split("\n\n")
    data = [part.removeprefix("data: ") for part in parts if not part.startswith(":")]
    assert all(part.startswith(("data: ", ":")) and "\n" not in part for part in parts)
    assert data[-1] == "[DONE]"
    return [json.loads(part) for part in data[:-1]]


def streamed(client: httpx.Client, call: dict[str, Any]) -> list[Any]:
    answer = client.post(CHAT, json=call | {"stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream"
    return events(answer.text)


def test_a_whole_answer_has_the_shape_of_openais(client: httpx.Client) -> None:
    answer = client.post(CHAT, json=chat("n=3")).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert isinstance(answer["created"], int)
    assert answer["model"] == "tiny"
    message = {"role": "assistant", "content": "w0 w1 w2 "}
    assert answer["choices"] == [{"index": 0, "message": message, "finish_reason": "stop"}]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 3, 6)


def test_an_answer_without_text_has_empty_content(client: httpx.Client) -> None:
    assert client.post(CHAT, json=chat("n=0")).json()["choices"][0]["message"]["content"] == ""


def test_a_stream_has_one_id_the_role_once_one_finish_and_no_usage_unasked(client: httpx.Client) -> None:
    chunks = streamed(client, chat("n=3"))
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"].get("role") for choice in choices] == ["assistant", None, None, None]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "w0 w1 w2 "
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert choices[-1]["delta"] == {}
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_comes_last_when_asked_for(client: httpx.Client) -> None:
    chunks = streamed(client, chat("n=3", stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["object"] == "chat.completion.chunk"
    assert chunks[-1]["id"] == chunks[0]["id"]
    assert chunks[-1]["usage"]["total_tokens"] == 6


def test_an_empty_stream_still_has_its_role_and_finish(client: httpx.Client) -> None:
    choices = [chunk["choices"][0] for chunk in streamed(client, chat("n=0"))]
    assert [(choice["delta"], choice["finish_reason"]) for choice in choices] == [({"role": "assistant"}, "stop")]


def test_a_long_prefill_is_a_comment(client: httpx.Client) -> None:
    text = client.post(CHAT, json=chat("n=1 prefill", stream=True)).text
    assert text.startswith(": prefill 512 of 1024\n\ndata: ")


def test_thinking_is_reasoning(client: httpx.Client) -> None:
    message = client.post(CHAT, json=chat("n=4 think=2", model="thinker")).json()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("w0 w1 ", "w2 w3 ")
    deltas = [chunk["choices"][0]["delta"] for chunk in streamed(client, chat("n=4 think=2", model="thinker"))]
    assert [delta.get("reasoning") for delta in deltas] == ["w0 ", "w1 ", None, None, None]


def test_length_is_said(client: httpx.Client) -> None:
    assert client.post(CHAT, json=chat("n=9", max_tokens=2)).json()["choices"][0]["finish_reason"] == "length"
    assert streamed(client, chat("n=9", max_completion_tokens=2))[-1]["choices"][0]["finish_reason"] == "length"


def test_defaults_are_openais_and_fields_reach_the_engine(client: httpx.Client) -> None:
    plain = echoed(client)["sampling"]
    assert (plain["temperature"], plain["top_p"], plain["top_k"], plain["min_p"]) == (1.0, 1.0, 0, 0.0)
    fields = {"temperature": 0, "top_p": 0.5, "seed": -1, "stop": "x", "max_tokens": 7, "max_completion_tokens": 5.0}
    got = echoed(client, **fields)
    assert (got["sampling"]["temperature"], got["sampling"]["top_p"]) == (0.0, 0.5)
    assert got["sampling"]["seed"] == 2**63 - 1
    assert (got["stop"], got["max_tokens"], got["truncate"]) == (["x"], 5, False)


def test_what_openai_has_and_mlxd_has_not_is_ignored_where_that_is_harmless(client: httpx.Client) -> None:
    ignored = {
        "user": "u",
        "n": 1,
        "logit_bias": {},
        "store": True,
        "metadata": {},
        "service_tier": "auto",
        "parallel_tool_calls": True,
    }
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "response_format": {"type": "text"}, "tools": [], "logprobs": False}
    assert echoed(client, **ignored, **neutral, new=[1], stop=None, tool_choice="auto")
    assert echoed(client, tools=[{"type": "function"}], tool_choice="none")


@pytest.mark.parametrize(
    ("model", "more", "think"),
    [
        ("thinker", {}, None),
        ("thinker", {"reasoning_effort": "none"}, False),
        ("thinker", {"reasoning_effort": "minimal"}, True),
        ("thinker", {"reasoning": {"effort": "high"}}, True),
        ("tiny", {"reasoning_effort": "high"}, None),
        ("tiny", {"reasoning_effort": "none"}, None),
    ],
)
def test_effort_means_thinking_where_the_model_can(
    client: httpx.Client, model: str, more: dict[str, Any], think: bool | None
) -> None:
    assert echoed(client, model=model, **more)["think"] is think


def test_a_conversation_reaches_the_template(client: httpx.Client) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
    parts = [{"type": "text", "text": "ec"}, {"type": "text", "text": "ho"}]
    messages = [
        {"role": "developer", "content": "s"},
        {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "user", "content": parts},
    ]
    got = echoed(client, messages=messages)["messages"]
    assert got[0] == {"role": "system", "content": "s"}
    assert got[1]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert got[1]["reasoning_content"] == "hm"
    assert got[2] == {"role": "tool", "content": "sunny", "name": "get_weather", "tool_call_id": "c1"}
    assert got[3] == {"role": "user", "content": "echo"}


def calling(arguments: str) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]}


REFUSALS: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"model": None}, 400, "model is required", None),
    ({"model": "nope"}, 404, "model 'nope' not found", None),
    ({"model": "../x"}, 400, "invalid model name", None),
    ({"model": "refused"}, 400, "refused:latest is broken: a tensor is missing", None),
    ({"messages": None}, 400, "messages: at least one message is required", "messages"),
    ({"messages": []}, 400, "messages: at least one message is required", "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "expected", "messages[0].content"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "'wizard'", "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text only", "messages[0].content"),
    (calling("{"), 400, "is not a JSON object", "messages[0].tool_calls[0].function.arguments"),
    (calling("[]"), 400, "expected object", "messages[0].tool_calls[0].function.arguments"),
    (calling('{"n":' + "9" * 30 + "}"), 400, "a number in the request is too large", None),
    (calling('{"n":"%s"}' % ("x" * 2**20)), 400, "more than 1048576 bytes", "messages[0].tool_calls[0].function.arguments"),
    ({"temperature": 2.5}, 400, "expected number <= 2", "temperature"),
    ({"temperature": "1"}, 400, "expected number", "temperature"),
    ({"top_p": -0.1}, 400, "expected number >= 0", "top_p"),
    ({"max_tokens": -1}, 400, "expected", "max_tokens"),
    ({"max_tokens": 0}, 400, "expected int >= 1", "max_tokens"),
    ({"max_completion_tokens": 0}, 400, "expected int >= 1", "max_completion_tokens"),
    ({"max_tokens": 1.5}, 400, "expected an integer, got 1.5", "max_tokens"),
    ({"max_completion_tokens": "5"}, 400, "expected number", "max_completion_tokens"),
    ({"seed": True}, 400, "expected number", "seed"),
    ({"stop": [1]}, 400, "expected string", "stop[0]"),
    ({"presence_penalty": 1}, 400, "not supported", "presence_penalty"),
    ({"frequency_penalty": 3}, 400, "expected number <= 2", "frequency_penalty"),
    ({"tools": [{"type": "function"}]}, 400, "tiny does not support tools", "tools"),
    ({"tools": [1], "tool_choice": "none"}, 400, "expected object", "tools[0]"),
    ({"response_format": {"type": "json_object"}}, 400, "structured output", "response_format"),
    ({"logprobs": True}, 400, "not supported", "logprobs"),
    ({"top_logprobs": 21}, 400, "expected", "top_logprobs"),
    ({"reasoning_effort": "huge"}, 400, "must be none, minimal", "reasoning_effort"),
    ({"stream_options": True}, 400, "expected object", "stream_options"),
]


@pytest.mark.parametrize(("change", "status", "sentence", "param"), REFUSALS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [True, False])
def test_bad_input_is_an_error_object_also_when_streaming(
    client: httpx.Client, change: dict[str, Any], status: int, sentence: str, param: str | None, stream: bool
) -> None:
    answer = client.post(CHAT, json=chat("n=1", stream=stream) | change)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert sentence in error["message"]
    assert error["param"] == param
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


@pytest.mark.parametrize(
    ("body", "sentence"), [(b"", "missing request body"), (b"{", "not valid JSON"), (b"[]", "expected object")]
)
def test_a_body_that_is_no_json_object_is_a_400(client: httpx.Client, body: bytes, sentence: str) -> None:
    answer = client.post(CHAT, content=body)
    assert (answer.status_code, sentence in answer.json()["error"]["message"]) == (400, True), answer.text


def test_an_engines_refusal_is_an_error_object(client: httpx.Client) -> None:
    answer = client.post(CHAT, json=chat("fail=400", stream=True))
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "scripted failure")
    assert answer.headers["x-should-retry"] == "false"
    assert client.post(CHAT, json=chat("fail=500")).json()["error"]["type"] == "api_error"


def test_models_are_listed_and_found_raw_and_escaped(client: httpx.Client) -> None:
    listed = client.get("/v1/models?limit=1000").json()
    assert listed["object"] == "list"
    ids = [model["id"] for model in listed["data"]]
    assert {"tiny:latest", "Org/Nested:latest"} <= set(ids)
    for model in listed["data"]:
        assert (model["object"], isinstance(model["created"], int), isinstance(model["owned_by"], str)) == ("model", True, True)
    for path in ("Org/Nested", "Org%2FNested", "org/nested:latest", "Org%2Fnested%3Alatest"):
        found = client.get(f"/v1/models/{path}")
        assert (found.status_code, found.json()["id"]) == (200, "Org/Nested:latest")
    missing = client.get("/v1/models/nope")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")


def test_unknown_paths_and_methods_are_error_objects(client: httpx.Client) -> None:
    assert client.get("/v1/nowhere").json()["error"]["type"] == "not_found_error"
    wrong = client.get(CHAT)
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "api_error")
