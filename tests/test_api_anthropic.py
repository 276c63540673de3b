"""The Anthropic dialect: what it makes of a request, and what goes over HTTP against a fake engine whose answers are scripted by the
prompt."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from server_client import Supervised, supervised

import mlxd
from mlxd import models
from mlxd.api import anthropic, fields
from mlxd.errors import Refused
from mlxd.journal import Request
from mlxd.standin import StandIn

MODELS = ("tiny", "thinker", "refused")
PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
BUILTIN_FILES = Path(mlxd.__file__).parent / "builtin"


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 99, "messages": [{"role": "user", "content": text}]} | more


# --- what a request becomes -----------------------------------------------------------------------------------------------------------


def parsed(thinks: bool = True, calls: bool = True, **change: Any) -> Request:
    """The internal request for a model that can do these things."""
    model = msgspec.structs.replace(models.read_model(models.BUILTIN, BUILTIN_FILES), thinks=thinks, calls=calls)
    call = fields.decode(anthropic.calls, json.dumps(ask("hi") | change).encode())
    return anthropic.request(call, model)


def messages(*turns: Any, **more: Any) -> list[dict[str, Any]]:
    """Of a conversation that the user begins, as the chat template gets it."""
    roles = ("user", "assistant")
    made = parsed(messages=[{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)], **more).messages
    assert made is not None
    return made


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said, "cache_control": {"type": "ephemeral"}}


def tool_use(**change: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}} | change


def tool_result(**more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1"} | more


WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather",
    "input_schema": {"type": "object", "properties": {}},
}
FUNCTION = {"name": "get_weather", "description": "The weather", "parameters": {"type": "object", "properties": {}}}


def test_what_is_not_said_is_as_in_the_native_api() -> None:
    plain = parsed()
    assert (plain.sampling.temperature, plain.sampling.top_k, plain.sampling.top_p) == (0.8, 40, 0.9)
    assert (plain.max_tokens, plain.think, plain.tools, plain.tool_choice, plain.format) == (99, None, None, "auto", None)
    assert (plain.stop, plain.truncate) == ([], False)


def test_what_is_said_counts() -> None:
    said = parsed(temperature=0, top_k=-1, top_p=0.5, seed=7, max_tokens=3.0, stop_sequences=["x", ""])
    assert (said.sampling.temperature, said.sampling.top_k, said.sampling.top_p, said.sampling.seed) == (0.0, 0, 0.5, 7)
    assert (said.max_tokens, said.stop) == (3, ["x"])


def test_whatever_else_a_client_sends_is_ignored() -> None:
    more = {"metadata": {"user_id": "u"}, "service_tier": "auto", "context_management": {}, "container": None, "speed": "fast"}
    assert parsed(**more, new=[1], stop_sequences=None, tools=None, system=None, thinking=None, output_config=None)


def test_system_is_text_or_blocks() -> None:
    assert messages("hi", system="s")[0] == {"role": "system", "content": "s"}
    assert messages("hi", system=[text("a"), text(""), text("b")])[0] == {"role": "system", "content": "a\n\nb"}
    for nothing in ("", [], [text("")]):
        assert messages("hi", system=nothing) == [{"role": "user", "content": "hi"}]


def test_claude_codes_changing_billing_line_does_not_reach_the_prompt() -> None:
    billing = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;"
    assert messages("hi", system=[text(billing), text("You are")])[0]["content"] == "You are"
    assert messages("hi", system=f"{billing}\nYou are")[0]["content"] == "You are"
    assert messages(billing, system=f"About {billing}")[0]["content"] == f"About {billing}"


def test_the_text_of_blocks_is_joined_and_unknown_blocks_say_nothing() -> None:
    unknown = [
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"type": "web_search_result", "url": "u"}]},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": {"type": "web_search_tool_result_error"}},
        {"type": "of_next_year", "content": 5, "input": "x", "source": {}},
    ]
    assert messages([text("a"), *unknown, text("b")]) == [{"role": "user", "content": "ab"}]
    assert messages([]) == [{"role": "user", "content": ""}]


def test_a_turn_of_the_system_in_mid_conversation_stays_where_it_is() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "system", "content": [text("Be brief.")]}]
    assert parsed(messages=turns).messages == [{"role": "user", "content": "hi"}, {"role": "system", "content": "Be brief."}]


def test_an_answers_thinking_and_calls_go_back_to_the_template() -> None:
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "whatever"},
        {"type": "redacted_thinking", "data": "xyz"},
        text("Let me see."),
        tool_use(),
        tool_use(id="toolu_2", input=None),
    ]
    (_, answer) = messages("hi", blocks)
    assert (answer["role"], answer["content"], answer["reasoning_content"]) == ("assistant", "Let me see.", "hm")
    functions = [{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "get_weather", "arguments": {}}]
    assert [call["function"] for call in answer["tool_calls"]] == functions
    assert [call["id"] for call in answer["tool_calls"]] == ["toolu_1", "toolu_2"]


def test_results_of_tools_come_before_the_text_of_their_turn() -> None:
    (_, _, result, rest) = messages("hi", [tool_use()], [text("And now?"), tool_result(content="sunny")])
    assert result == {"role": "tool", "content": "sunny", "name": "get_weather", "tool_call_id": "toolu_1"}
    assert rest == {"role": "user", "content": "And now?"}


@pytest.mark.parametrize(
    ("result", "content"),
    [
        ({"content": [text("a"), {"type": "tool_reference", "tool_name": "t"}, text("b")]}, "ab"),
        ({}, ""),
        ({"content": None}, ""),
        ({"content": "no such city", "is_error": True}, "Error: no such city"),
        ({"content": "sunny", "is_error": False}, "sunny"),
    ],
)
def test_a_result_is_text_or_blocks_or_absent_and_says_if_it_is_an_error(result: dict[str, Any], content: str) -> None:
    assert [message["content"] for message in messages("hi", [tool_use()], [tool_result(**result)])[2:]] == [content]


def test_a_result_without_a_call_has_no_name() -> None:
    assert messages([tool_result(content="x")]) == [{"role": "tool", "content": "x", "name": "", "tool_call_id": "toolu_1"}]


def test_tools_become_functions_and_servers_tools_are_left_out() -> None:
    tools = [WEATHER, {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}, {"type": "mcp_toolset"}]
    assert parsed(tools=tools).tools == [{"type": "function", "function": FUNCTION}]
    assert parsed(tools=tools[1:], calls=False).tools is None
    custom = {"type": "custom", "name": "f", "input_schema": {}, "strict": True}
    assert parsed(tools=[custom]).tools == [{"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}]


@pytest.mark.parametrize(
    ("choice", "meaning"),
    [
        (None, "auto"),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "get_weather"}, "get_weather"),
    ],
)
def test_the_choice_of_tools_is_passed_on(choice: dict[str, Any] | None, meaning: str) -> None:
    assert parsed(tools=[WEATHER], tool_choice=choice).tool_choice == meaning


def test_without_a_choice_of_tools_the_model_hears_of_none() -> None:
    assert parsed(tools=[WEATHER], tool_choice={"type": "none"}).tools is None
    assert parsed(tools=[WEATHER], tool_choice={"type": "none"}, calls=False).tools is None


EFFORT = {"output_config": {"effort": "high"}}
ENABLED = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
DISABLED = {"thinking": {"type": "disabled"}}


@pytest.mark.parametrize(
    ("wish", "think"),
    [
        ({}, None),
        (ENABLED, True),
        ({"thinking": {"type": "adaptive"}}, True),
        (EFFORT, True),
        (DISABLED, False),
        (DISABLED | EFFORT, False),
    ],
)
def test_thinking_is_a_wish_that_models_without_it_ignore(wish: dict[str, Any], think: bool | None) -> None:
    assert parsed(**wish).think is think
    assert parsed(thinks=False, **wish).think is None


@pytest.mark.parametrize("place", ["output_config", "output_format"])
def test_a_schema_for_the_answer_is_passed_on(place: str) -> None:
    wanted: dict[str, Any] = {"type": "json_schema", "schema": {"type": "object"}}
    made = parsed(**{place: {"format": wanted} if place == "output_config" else wanted}).format
    assert made is not None
    assert (made.kind, json.loads(made.source)) == ("json_schema", {"type": "object"})


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
LINKED = {"type": "image", "source": {"type": "url", "url": "http://localhost/x.png"}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "aGk="}}


def user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


WRONG_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages: at least one message is required"),
    ({"messages": []}, "messages: at least one message is required"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: invalid enum value 'tool'"),
    ({"messages": [{"role": "user"}]}, "messages[0]: object missing required field content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: expected string | array, got int"),
    (user({"text": "x"}), "messages[0].content[0]: object missing required field type"),
    (user({"type": "text", "text": 5}), "messages[0].content[0].text: expected string | null, got int"),
    (user(text("a"), IMAGE), "messages[0].content[1]: this model reads text only, not images"),
    (user(LINKED), "messages[0].content[0]: this model reads text only, not images"),
    (user(PDF), "messages[0].content[0]: this model reads text only, not documents"),
    (user(tool_result(content=[IMAGE])), "messages[0].content[0].content[0]: this model reads text only, not images"),
    (user(tool_result(content=[{"type": 5}])), "messages[0].content[0].content[0].type: expected string, got int"),
    (user(tool_result(content=5)), "messages[0].content[0].content: expected string | array | null, got int"),
    (user({"type": "tool_result"}), "messages[0].content[0]: a tool_result needs a tool_use_id"),
    (user(tool_use(id=None)), "messages[0].content[0]: a tool_use needs an id and a name"),
    (user(tool_use(name="")), "messages[0].content[0]: a tool_use needs an id and a name"),
    (user(tool_use(input=[1])), "messages[0].content[0].input: expected object | null, got array"),
    (user(tool_use(input={"x": "x" * 2**20})), "messages[0].content[0].input: more than 1048576 bytes"),
    ({"max_tokens": 1.5}, "max_tokens: expected an integer, got 1.5"),
    ({"max_tokens": 0}, "max_tokens: expected int >= 1"),
    ({"max_tokens": "5"}, "max_tokens: expected number"),
    ({"temperature": -1}, "temperature: expected number >= 0"),
    ({"top_p": 2}, "top_p: expected number <= 1"),
    ({"top_k": 0.5}, "top_k: expected an integer, got 0.5"),
    ({"stop_sequences": "x"}, "stop_sequences: expected array | null, got str"),
    ({"tools": [5]}, "tools[0]: expected object, got int"),
    ({"tools": [WEATHER | {"name": None}]}, "tools[0].name: is required"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema: expected object, got null"),
    ({"tools": [WEATHER], "tool_choice": {"type": "some"}}, "tool_choice.type: invalid enum value 'some'"),
    ({"tool_choice": {"type": "any"}}, "tool_choice: there is no tool to be called"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name: there is no tool '' to be called"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.name: there is no tool 'f' to be called"),
    ({"thinking": {"type": "maybe"}}, "thinking.type: invalid enum value 'maybe'"),
    ({"thinking": {"type": "enabled", "budget_tokens": "many"}}, "thinking.budget_tokens: expected number"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort: invalid enum value 'huge'"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type: invalid enum value 'xml'"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema: expected object, got null"),
    ({"output_format": {"type": "json_schema", "schema": 5}}, "output_format.schema: expected object, got int"),
]


@pytest.mark.parametrize(("change", "sentence"), WRONG_REQUESTS, ids=lambda value: str(value)[:60])
def test_bad_input_is_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused) as refused:
        parsed(**change)
    assert refused.value.status == 400
    assert sentence in refused.value.message


# --- over HTTP --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Supervised]:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home), MODELS) as running:
        yield running


@pytest.fixture
def client(server: Supervised) -> Iterator[httpx.Client]:
    with server.client() as made:
        yield made


def whole(client: httpx.Client, call: dict[str, Any]) -> dict[str, Any]:
    answer = client.post(PATH, json=call)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def events(text: str) -> list[dict[str, Any]]:
    """Of a stream, comments left out. Every event is an `event:` line, a `data:` line and a blank one, and says its name twice."""
    assert text.endswith("\n\n")
    told = []
    for part in text.removesuffix("\n\n").split("\n\n"):
        if not part.startswith(":"):
            name, data = part.split("\n")
            told.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {told[-1]['type']}"
    return told


def streamed(client: httpx.Client, call: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.post(PATH, json=call | {"stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream"
    return events(answer.text)


def put_together(told: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a strict reader makes of a stream: deltas only of the open block and of its kind, indices without gaps."""
    told = [event for event in told if event["type"] != "ping"]
    assert (told[0]["type"], told[-2]["type"], told[-1]["type"]) == ("message_start", "message_delta", "message_stop")
    message: dict[str, Any] = told[0]["message"]
    assert (message["content"], message["stop_reason"], message["stop_sequence"]) == ([], None, None)
    assert message["usage"]["input_tokens"] > 0
    block: dict[str, Any] | None = None
    arguments = ""
    for event in told[1:-2]:
        kind = event["type"].removeprefix("content_block_")
        assert event["index"] == len(message["content"]) - (kind != "start")
        if kind == "start":
            assert block is None
            block, arguments = event["content_block"], ""
            message["content"].append(block)
        elif kind == "stop":
            if block and block["type"] == "tool_use":
                assert block["input"] == {}
                block["input"] = json.loads(arguments)
            block = None
        else:
            assert block is not None
            match block["type"], event["delta"]:
                case "text", {"type": "text_delta", "text": str(more)}:
                    block["text"] += more
                case "thinking", {"type": "thinking_delta", "thinking": str(more)}:
                    assert block["signature"] == ""
                    block["thinking"] += more
                case "thinking", {"type": "signature_delta", "signature": str(more)}:
                    block["signature"] += more
                case "tool_use", {"type": "input_json_delta", "partial_json": str(more)}:
                    arguments += more
                case odd:
                    raise AssertionError(odd)
    assert block is None
    return message | told[-2]["delta"] | {"usage": message["usage"] | told[-2]["usage"]}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [{key: value for key, value in block.items() if key != "id"} for block in message["content"]]
    return message | {"id": "", "content": content}


def test_a_whole_answer_has_the_shape_of_anthropics(client: httpx.Client) -> None:
    message = whole(client, ask("n=3"))
    assert message["id"].startswith("msg_")
    cache = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    assert message == {
        "id": message["id"],
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "w0 w1 w2 "}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 3} | cache,
    }


def test_thinking_text_and_calls_are_blocks(client: httpx.Client) -> None:
    message = whole(client, ask("n=4 think=2 call=f,g", model="thinker"))
    thinking, text, *uses = message["content"]
    assert (thinking["type"], thinking["thinking"], bool(thinking["signature"])) == ("thinking", "w0 w1 ", True)
    assert text == {"type": "text", "text": "w2 w3 "}
    assert [(use["type"], use["name"], use["input"]) for use in uses] == [
        ("tool_use", "f", {"city": "Paris"}),
        ("tool_use", "g", {"city": "Paris"}),
    ]
    assert len({use["id"] for use in uses}) == 2
    assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    "script",
    ["n=3", "n=0", "n=3 think=3", "n=4 think=2", "n=4 think=2 call=f,g", "n=0 call=f", "n=2 call=f length", "n=9 burst think=4"],
)
def test_a_stream_is_the_whole_answer_in_pieces(client: httpx.Client, script: str) -> None:
    call = ask(script, model="thinker")
    assert without_ids(put_together(streamed(client, call))) == without_ids(whole(client, call))


def test_the_limit_ends_with_max_tokens_also_after_a_call(client: httpx.Client) -> None:
    assert whole(client, ask("n=9", max_tokens=2))["stop_reason"] == "max_tokens"
    assert whole(client, ask("n=2 call=f length"))["stop_reason"] == "max_tokens"


def test_an_answer_begins_before_the_prompt_is_read(client: httpx.Client) -> None:
    kinds = [event["type"] for event in streamed(client, ask("n=1 prefill"))]
    assert "ping" in kinds[kinds.index("message_start") : kinds.index("content_block_start")]


def test_there_are_only_pings_until_the_prompt_is_tokenised(home: Path) -> None:
    with (
        supervised(home, ("held",), server={"ping_s": 0.1}) as server,
        server.client() as client,
        client.stream("POST", PATH, json=ask("n=1", model="held", stream=True)) as answer,
    ):
        lines = answer.iter_lines()
        begun = [next(lines) for _ in range(3)]
        server.let_up()
        told = events("\n".join([*begun, *lines, ""]))
    assert told[0] == {"type": "ping"}
    assert put_together(told)["content"] == [{"type": "text", "text": "w0 "}]


def test_an_answer_goes_on_in_its_block_when_the_engine_dies(client: httpx.Client) -> None:
    script = "n=6 think=5 die=3 call=f"
    call = ask(script, model="thinker")
    answer = client.post(PATH, json=call | {"stream": True})
    assert "\n\n: x-mlxd-resumed: 1\n\n" in answer.text
    whole = client.post(PATH, json=call)
    assert whole.headers["x-mlxd-resumed"] == "1"
    calm = put_together(streamed(client, ask(script.replace("die=3", ""), model="thinker")))
    disturbed = put_together(events(answer.text))
    for message in (disturbed, whole.json()):
        assert without_ids(message)["content"] == without_ids(calm)["content"]
        assert message["stop_reason"] == calm["stop_reason"]


def test_an_error_in_mid_stream_is_an_event(client: httpx.Client) -> None:
    answer = client.post(PATH, json=ask("n=6 wall=3", stream=True))
    told = [event for event in events(answer.text) if event["type"] != "ping"]
    assert [event["type"] for event in told[-2:]] == ["content_block_delta", "error"]
    assert told[-1]["error"]["type"] == "api_error"
    assert "the engine died 3 times" in told[-1]["error"]["message"]
    assert told[-1]["request_id"] == answer.headers["request-id"]


def test_the_count_is_that_of_the_prompt_and_needs_no_max_tokens(client: httpx.Client) -> None:
    call = ask("n=3 and some more", system="s", thinking={"type": "adaptive"})
    counted = client.post(f"{COUNT}?beta=true", json=call | {"max_tokens": None})
    assert counted.json() == {"input_tokens": whole(client, call)["usage"]["input_tokens"]}


def test_query_strings_and_versions_change_nothing(client: httpx.Client) -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b", "x-api-key": "any"}
    assert client.post(f"{PATH}?beta=true", json=ask("n=1"), headers=headers).status_code == 200


REFUSALS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model": None}, 400, "invalid_request_error", "model is required"),
    ({"model": "nope"}, 404, "not_found_error", "model 'nope' not found"),
    ({"model": "refused"}, 400, "invalid_request_error", "refused:latest is broken: a tensor is missing"),
    ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens: is required"),
    ({"messages": []}, 400, "invalid_request_error", "messages: at least one message is required"),
    ({"tools": [WEATHER]}, 400, "invalid_request_error", "tiny does not support tools"),
]


@pytest.mark.parametrize(("change", "status", "kind", "sentence"), REFUSALS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [True, False])
def test_refusals_have_the_shape_of_anthropics_also_when_streaming(
    client: httpx.Client, change: dict[str, Any], status: int, kind: str, sentence: str, stream: bool
) -> None:
    answer = client.post(PATH, json=ask("n=1", stream=stream) | change, headers={"x-request-id": "mine"})
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert (body["type"], body["error"]["type"], body["request_id"]) == ("error", kind, "mine")
    assert sentence in body["error"]["message"]
    assert answer.headers["request-id"] == answer.headers["x-request-id"] == "mine"


@pytest.mark.parametrize("path", [PATH, COUNT])
@pytest.mark.parametrize(
    ("body", "sentence"), [(b"", "missing request body"), (b"{", "not valid JSON"), (b"[]", "expected object")]
)
def test_a_body_that_is_no_json_object_is_a_400(client: httpx.Client, path: str, body: bytes, sentence: str) -> None:
    answer = client.post(path, content=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert sentence in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("script", "status", "kind", "again"),
    [
        ("fail=400", 400, "invalid_request_error", "false"),
        ("fail=401", 401, "authentication_error", "false"),
        ("fail=429", 429, "rate_limit_error", "false"),
        ("fail=500", 500, "api_error", None),
        ("fail=503", 503, "overloaded_error", None),
        ("fail=529", 529, "overloaded_error", None),
    ],
)
def test_an_engines_refusal_has_the_type_of_its_status(
    client: httpx.Client, script: str, status: int, kind: str, again: str | None
) -> None:
    for path, stream in ((PATH, True), (PATH, False), (COUNT, False)):
        answer = client.post(path, json=ask(script, stream=stream))
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
        assert answer.headers.get("x-should-retry") == again


def test_what_is_refused_before_the_dialect_is_asked_has_its_shape(client: httpx.Client) -> None:
    def kind(answer: httpx.Response) -> tuple[int, str]:
        return answer.status_code, answer.json()["error"]["type"]

    assert kind(client.get(PATH)) == (405, "api_error")
    assert kind(client.get("/v1/messages/batches")) == (404, "not_found_error")
    assert kind(client.post(PATH, json=ask("n=1"), headers={"origin": "https://evil.example"})) == (403, "permission_error")
    assert kind(client.post(PATH, content=b" " * (32 * 2**20 + 1))) == (413, "request_too_large")


def test_what_stands_in_for_the_server_has_its_shape_too() -> None:
    head = b"POST /v1/messages?beta=true HTTP/1.1\r\nHost: localhost\r\n\r\n"
    _, _, body = StandIn(lambda: "the server is being replaced", dict).response(head).partition(b"\r\n\r\n")
    error = {"type": "overloaded_error", "message": "the server is being replaced"}
    assert json.loads(body) == {"type": "error", "error": error, "request_id": None}
