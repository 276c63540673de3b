"""The OpenAI dialect over HTTP, against a fake engine whose answers are scripted by the prompt."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_client import Supervised, supervised

from mlxd.api import openai
from mlxd.api.fields import Malformed
from mlxd.journal import Request
from mlxd.models import Model

MODELS = ("tiny", "thinker", "refused", "Org/Nested")
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
TIME = {"type": "function", "function": {"name": "get_time", "description": "Now", "strict": True}}


@pytest.fixture(scope="module")
def server() -> Iterator[Supervised]:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home), MODELS) as running:
        yield running


@pytest.fixture(scope="module")
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


def streamed(client: httpx.Client, call: dict[str, Any], path: str = CHAT) -> list[Any]:
    answer = client.post(path, json=call | {"stream": True})
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
        "store": True,
        "metadata": {},
        "service_tier": "auto",
        "parallel_tool_calls": True,
    }
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "response_format": {"type": "text"}, "tools": [], "logprobs": False}
    assert echoed(client, **ignored, **neutral, new=[1], stop=None, tool_choice="auto")
    assert echoed(client, tools=[WEATHER], tool_choice="none")["tools"] is None


@pytest.mark.parametrize(
    ("model", "more", "think"),
    [
        ("thinker", {}, None),
        ("thinker", {"reasoning_effort": "none"}, False),
        ("thinker", {"reasoning_effort": "minimal"}, True),
        ("thinker", {"reasoning": {"effort": "high"}}, True),
        ("thinker", {"chat_template_kwargs": {"enable_thinking": False}}, False),
        ("thinker", {"chat_template_kwargs": {"enable_thinking": True}}, True),
        ("thinker", {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"}, False),
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


# --- choices, log-probabilities, calls ---------------------------------------------------------------------------------------------


def test_n_choices_are_drawn_with_seeds_that_follow_and_count_their_prompt_once(client: httpx.Client) -> None:
    answer = client.post(CHAT, json=chat("echo", n=3, seed=2**53)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    asked = [json.loads(choice["message"]["content"]) for choice in answer["choices"]]
    assert [one["sampling"]["seed"] for one in asked] == [2**53, 2**53 + 1, 2**53 + 2]
    assert [answer["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")] == [4, 3, 7]


def test_choices_are_streamed_side_by_side_each_with_its_role_and_finish(client: httpx.Client) -> None:
    chunks = streamed(client, chat("n=3 delay=0.01", n=8, stream_options={"include_usage": True}))
    for index in range(8):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert [choice["delta"].get("role") for choice in choices] == ["assistant", None, None, None]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == "w0 w1 w2 "
        assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert chunks[-1]["usage"]["completion_tokens"] == 24


def test_more_choices_than_slots_take_turns() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="mlxd-t-") as home,
        supervised(Path(home), server={"max_concurrent": 3}) as server,
        server.client() as client,
    ):
        answer = client.post(CHAT, json=chat("n=2", n=8)).json()
        assert [choice["message"]["content"] for choice in answer["choices"]] == ["w0 w1 "] * 8
        assert server.health()["queue"] == {"running": 0, "waiting": 0}


def test_logprobs_have_text_bytes_and_the_best_in_falling_order(client: httpx.Client) -> None:
    call = chat("n=2", logprobs=True, top_logprobs=2)
    whole = client.post(CHAT, json=call).json()["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in whole] == ["w0 ", "w1 "]
    assert whole[0]["bytes"] == list(b"w0 ")
    assert [best["logprob"] for best in whole[0]["top_logprobs"]] == [-0.5, -1.5]
    chunks = [chunk["choices"][0] for chunk in streamed(client, call)]
    assert [one for choice in chunks for one in choice.get("logprobs", {}).get("content", [])] == whole
    bare = client.post(CHAT, json=chat("n=1", logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert bare[0]["top_logprobs"] == []
    assert echoed(client)["top_logprobs"] is None


def test_calls_are_told_with_index_id_type_name_and_arguments_as_text(client: httpx.Client) -> None:
    choice = client.post(CHAT, json=chat("n=0 call=f,g")).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    calls = choice["message"]["tool_calls"]
    assert [(one["type"], one["function"]["name"], one["function"]["arguments"]) for one in calls] == [
        ("function", "f", '{"city": "Paris"}'),
        ("function", "g", '{"city": "Paris"}'),
    ]
    choices = [chunk["choices"][0] for chunk in streamed(client, chat("n=1 call=f,g"))]
    deltas = [one for choice in choices for one in choice["delta"].get("tool_calls", [])]
    assert [(one["index"], one["function"]["name"]) for one in deltas] == [(0, "f"), (1, "g")]
    assert len({one["id"] for one in [*calls, *deltas]}) == 4
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_an_answer_cut_by_the_limit_says_length_although_it_has_calls(client: httpx.Client) -> None:
    assert client.post(CHAT, json=chat("n=1 call=f length")).json()["choices"][0]["finish_reason"] == "length"


def test_usage_tells_thinking_apart(client: httpx.Client) -> None:
    usage = client.post(CHAT, json=chat("n=4 think=3", model="thinker")).json()["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 3}


# --- what a model with all capabilities is asked -------------------------------------------------------------------------------------


def asked(**more: Any) -> Request:
    """What a chat comes to, on a model that calls tools and thinks."""
    return openai.chat_request(openai.chats.decode(json.dumps(chat("x", **more))), able())


def able() -> Model:
    figures = {"size_bytes": 1, "modified_at": 0.0, "parameters": 1, "context_length": 4096, "embedding_length": 8}
    words = {"name": "tiny:latest", "digest": "0" * 64, "family": "fake", "quantization": "F32", "directory": Path("/nowhere")}
    return Model(**figures, **words, thinks=True, calls=True, inserts=True)


def test_tools_reach_the_engine_with_what_was_said_of_them_and_no_more() -> None:
    got = asked(tools=[WEATHER, TIME])
    assert got.tools == [WEATHER, TIME]
    assert got.tool_choice == "auto"
    assert asked(tools=[]).tools is None


@pytest.mark.parametrize(
    ("choice", "tools", "wanted"),
    [
        ("none", None, "auto"),
        ("auto", [WEATHER, TIME], "auto"),
        ("required", [WEATHER, TIME], "required"),
        ({"type": "function", "function": {"name": "get_time"}}, [WEATHER, TIME], "get_time"),
    ],
)
def test_every_tool_choice_has_its_meaning(choice: Any, tools: Any, wanted: str) -> None:
    got = asked(tools=[WEATHER, TIME], tool_choice=choice)
    assert (got.tools, got.tool_choice) == (tools, wanted)


@pytest.mark.parametrize(("name", "sentence"), [("f", "there is no tool called 'f'"), ("auto", "cannot be chosen by its name")])
def test_a_tool_that_cannot_be_chosen_is_refused(name: str, sentence: str) -> None:
    tools = [WEATHER, {"function": {"name": "auto"}}]
    with pytest.raises(Malformed, match=sentence) as refused:
        asked(tools=tools, tool_choice={"type": "function", "function": {"name": name}})
    assert refused.value.path == "tool_choice"


def test_formats_reach_the_engine_and_a_schema_as_it_was_written() -> None:
    assert asked(response_format={"type": "text"}).format is None
    made = asked(response_format={"type": "json_object"}).format
    assert (made.kind, made.source) == ("json", "")
    body = json.dumps(chat("x", response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}))
    written = '{"type": "object", "b": 1.50, "a": {}}'
    call = openai.chats.decode(body.replace('"schema": {}', f'"schema": {written}'))
    made = openai.chat_request(call, able()).format
    assert (made.kind, made.source) == ("json_schema", written)


def test_penalties_and_biases_are_openais(client: httpx.Client) -> None:
    got = echoed(client, presence_penalty=0.5, frequency_penalty=-2, logit_bias={"7": -100, "8": 5})["sampling"]
    assert (got["presence_penalty"], got["frequency_penalty"], got["repeat_penalty"]) == (0.5, -2.0, 1.0)
    assert (got["penalty_last_n"], got["penalize_prompt"]) == (-1, False)
    assert got["logit_bias"] == {"7": -100.0, "8": 5.0}


# --- /v1/completions ---------------------------------------------------------------------------------------------------------------


def completed(client: httpx.Client, prompt: Any, **more: Any) -> dict[str, Any]:
    answer = client.post(COMPLETIONS, json={"model": "tiny", "prompt": prompt} | more)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def test_a_completion_has_the_shape_of_openais_and_its_prompt_no_template(client: httpx.Client) -> None:
    answer = completed(client, "n=3")
    assert (answer["object"], answer["id"][:5], answer["model"]) == ("text_completion", "cmpl-", "tiny")
    assert answer["choices"] == [{"index": 0, "text": "w0 w1 w2 ", "finish_reason": "stop", "logprobs": None}]
    assert answer["usage"]["total_tokens"] == 6
    got = json.loads(completed(client, "echo")["choices"][0]["text"])
    assert (got["prompt"], got["messages"], got["max_tokens"], got["truncate"]) == ("echo", None, 16, False)


def test_a_streamed_completion_is_the_whole_one_in_pieces(client: httpx.Client) -> None:
    call = {"model": "tiny", "prompt": "n=3", "logprobs": 1}
    chunks = streamed(client, call | {"stream_options": {"include_usage": True}}, COMPLETIONS)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "w0 w1 w2 "
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["total_tokens"]) == ([], 6)
    whole = completed(client, "n=3", logprobs=1)["choices"][0]["logprobs"]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks[:-2]]
    assert whole == {key: sum((part[key] for part in parts), []) for key in whole}


def test_the_logprobs_of_completions_have_their_old_shape(client: httpx.Client) -> None:
    told = completed(client, "n=2", logprobs=2)["choices"][0]["logprobs"]
    assert told["tokens"] == ["w0 ", "w1 "]
    assert told["token_logprobs"] == [-0.5, -0.5]
    assert told["text_offset"] == [0, 3]
    assert told["top_logprobs"] == [{"w0 ": -0.5, "w0 1": -1.5}, {"w1 ": -0.5, "w1 1": -1.5}]
    assert completed(client, "n=1", logprobs=0)["choices"][0]["logprobs"]["top_logprobs"] is None


def test_every_prompt_of_a_list_has_n_choices_in_its_order(client: httpx.Client) -> None:
    texts = [choice["text"] for choice in completed(client, ["n=1", "n=2"], n=2)["choices"]]
    assert texts == ["w0 ", "w0 ", "w0 w1 ", "w0 w1 "]
    usage = completed(client, ["n=1", "n=2"], n=2)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (6, 6)
    tokens = list(b"n=2")
    assert [choice["text"] for choice in completed(client, tokens)["choices"]] == ["w0 w1 "]
    assert [choice["text"] for choice in completed(client, [tokens, list(b"n=1")])["choices"]] == ["w0 w1 ", "w0 "]


def test_the_seeds_of_a_prompt_do_not_depend_on_its_neighbours(client: httpx.Client) -> None:
    choices = completed(client, ["echo", "echo"], n=2, seed=5)["choices"]
    assert [json.loads(choice["text"])["sampling"]["seed"] for choice in choices] == [5, 6, 5, 6]


def test_calls_and_thinking_of_a_completion(client: httpx.Client) -> None:
    choice = completed(client, "n=3 think=1 call=f", model="thinker")["choices"][0]
    assert (choice["reasoning"], choice["text"], choice["finish_reason"]) == ("w0 ", "w1 w2 ", "stop")
    chunks = streamed(client, {"model": "thinker", "prompt": "n=3 think=1"}, COMPLETIONS)
    assert [chunk["choices"][0].get("reasoning") for chunk in chunks] == ["w0 ", None, None, None]


def test_a_suffix_reaches_a_model_that_fills_in() -> None:
    call = openai.completions.decode(b'{"prompt": "def f(", "suffix": "return x", "max_tokens": 5}')
    (got,) = openai.completion_requests(call, able())
    assert (got.prompt, got.suffix, got.max_tokens) == ("def f(", "return x", 5)
    call = openai.completions.decode(b'{"prompt": [1, 2], "suffix": "return x"}')
    with pytest.raises(Malformed, match="needs a prompt that is text"):
        openai.completion_requests(call, able())


COMPLETION_REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "expected array, got null", "prompt"),
    ({"prompt": []}, "an empty list is no prompt", "prompt"),
    ({"prompt": [[1], []]}, "an empty list is no prompt", "prompt"),
    ({"prompt": [[1]] * 2**18}, "more than 1048576 bytes of free JSON", "prompt"),
    ({"prompt": ["a", 1]}, "no mixture", "prompt"),
    ({"prompt": [-1]}, "expected int >= 0", "prompt[0]"),
    ({"prompt": ["a", [1.5]]}, "expected int", "prompt[1][0]"),
    ({"prompt": {"a": 1}}, "expected", "prompt"),
    ({"prompt": ["a"] * 17, "n": 8}, "more than 128 choices", "prompt"),
    ({"suffix": "x"}, "tiny does not support insert", "suffix"),
    ({"echo": True}, "not supported by mlxd", "echo"),
    ({"best_of": 2}, "not supported by mlxd beyond n", "best_of"),
    ({"logprobs": 6}, "expected int <= 5", "logprobs"),
    ({"logprobs": True}, "expected", "logprobs"),
    ({"n": 9}, "expected int <= 8", "n"),
]


@pytest.mark.parametrize(("change", "sentence", "param"), COMPLETION_REFUSALS, ids=lambda value: str(value)[:40])
def test_bad_input_to_completions_names_the_field(client: httpx.Client, change: dict[str, Any], sentence: str, param: str) -> None:
    check_refusal(client.post(COMPLETIONS, json={"model": "tiny", "prompt": "n=1"} | change), 400, sentence, param)


def test_what_asks_for_nothing_is_no_refusal(client: httpx.Client) -> None:
    completed(client, "n=1", suffix="", echo=False, best_of=1, user="u", n=None, logit_bias=None)


# --- refusals ----------------------------------------------------------------------------------------------------------------------


IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/never-fetched.png"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "number", "multipleOf": 0.10}}}
DEEP = {"type": "json_schema", "json_schema": {"name": "x", "schema": json.loads('{"a":' * 70 + "{}" + "}" * 70)}}


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
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "tiny does not support images", "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, 400, "text only, not 'file'", "messages[0].content"),
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
    ({"frequency_penalty": 3}, 400, "expected number <= 2", "frequency_penalty"),
    ({"presence_penalty": -3}, 400, "expected number >= -2", "presence_penalty"),
    ({"n": 9}, 400, "expected int <= 8", "n"),
    ({"n": 0}, 400, "expected int >= 1", "n"),
    ({"n": 1.5}, 400, "expected an integer, got 1.5", "n"),
    ({"logit_bias": {"5": 101}}, 400, "expected number <= 100", "logit_bias[]"),
    ({"logit_bias": {"word": 1}}, 400, "expected int, got string of its keys", "logit_bias"),
    ({"logit_bias": {"-1": 1}}, 400, "expected int >= 0 of its keys", "logit_bias"),
    ({"tools": [WEATHER]}, 400, "tiny does not support tools", "tools"),
    ({"tools": [1], "tool_choice": "none"}, 400, "expected object", "tools[0]"),
    ({"tools": [{"type": "function"}]}, 400, "missing required field function", "tools[0]"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, 400, "invalid enum value 'custom'", "tools[0].type"),
    ({"tools": [{"function": {"name": ""}}]}, 400, "expected string of length >= 1", "tools[0].function.name"),
    ({"tools": [{"function": {"name": "f", "parameters": []}}]}, 400, "expected object", "tools[0].function.parameters"),
    ({"tool_choice": "required"}, 400, "there are no tools to call", "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "there are no tools to call", "tool_choice"),
    ({"tool_choice": "sometimes"}, 400, "invalid enum value 'sometimes'", "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools"}}, 400, "invalid enum value 'allowed_tools'", "tool_choice.type"),
    ({"functions": [{"name": "f"}]}, 400, "not supported by mlxd: use tools", "functions"),
    ({"audio": {"voice": "alloy"}}, 400, "text only", "audio"),
    ({"web_search_options": {}}, 400, "there is no web search", "web_search_options"),
    ({"response_format": {"type": "xml"}}, 400, "invalid enum value 'xml'", "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, 400, "expected object, got null", "response_format.json_schema.schema"),
    ({"response_format": DEEP}, 400, "nested more than 64 deep", "response_format.json_schema.schema"),
    ({"top_logprobs": 21, "logprobs": True}, 400, "expected", "top_logprobs"),
    ({"top_logprobs": 2}, 400, "logprobs must be true", "top_logprobs"),
    ({"chat_template": "{{ messages }}"}, 400, "not supported by mlxd: the model's own is used", "chat_template"),
    ({"chat_template_kwargs": {"documents": []}}, 400, "unknown field", "chat_template_kwargs"),
    ({"reasoning_effort": "huge"}, 400, "must be none, minimal", "reasoning_effort"),
    ({"stream_options": True}, 400, "expected object", "stream_options"),
]


def check_refusal(answer: httpx.Response, status: int, sentence: str, param: str | None) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert sentence in error["message"]
    assert error["param"] == param
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


@pytest.mark.parametrize(("change", "status", "sentence", "param"), REFUSALS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [True, False])
def test_bad_input_is_an_error_object_also_when_streaming(
    client: httpx.Client, change: dict[str, Any], status: int, sentence: str, param: str | None, stream: bool
) -> None:
    check_refusal(client.post(CHAT, json=chat("n=1", stream=stream) | change), status, sentence, param)


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
        assert (model["type"], model["display_name"]) == ("model", model["id"].removesuffix(":latest"))
        assert datetime.fromisoformat(model["created_at"]).timestamp() == model["created"]
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, ids[0], ids[-1])
    for path in ("Org/Nested", "Org%2FNested", "org/nested:latest", "Org%2Fnested%3Alatest"):
        found = client.get(f"/v1/models/{path}")
        assert (found.status_code, found.json()["id"]) == (200, "Org/Nested:latest")
    missing = client.get("/v1/models/nope")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")


def test_unknown_paths_and_methods_are_error_objects(client: httpx.Client) -> None:
    assert client.get("/v1/nowhere").json()["error"]["type"] == "not_found_error"
    wrong = client.get(CHAT)
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "api_error")
