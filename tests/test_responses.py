"""/v1/responses over HTTP, against a fake engine whose answers are scripted by the prompt; tools, which no fake model has, without HTTP."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_client import Supervised, supervised
from test_api_openai import DEEP, IMAGE, able, check_refusal

from mlxd.api import responses
from mlxd.api.fields import Malformed
from mlxd.api.responses import Asked, Events
from mlxd.api.service import Service
from mlxd.api.store import Kept, Store
from mlxd.config import Config
from mlxd.errors import Refused
from mlxd.journal import Answered, Summary
from mlxd.messages import Call, Token

RESPONSES = "/v1/responses"
WEATHER = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": True}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edit files", "format": {"type": "grammar"}}
FILES = {"type": "namespace", "name": "files", "tools": [{"type": "function", "name": "read"}, PATCH]}


@pytest.fixture(scope="module")
def server() -> Iterator[Supervised]:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home), ("tiny", "thinker")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Supervised) -> Iterator[httpx.Client]:
    with server.client() as made:
        yield made


def answered(client: httpx.Client, said: Any, **more: Any) -> dict[str, Any]:
    answer = client.post(RESPONSES, json={"model": "tiny", "input": said} | more)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def echoed(client: httpx.Client, said: Any = "echo", **more: Any) -> dict[str, Any]:
    return json.loads(text_of(answered(client, said, **more)))  # type: ignore[no-any-return]


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


def events(text: str) -> list[dict[str, Any]]:
    """Each has a name, which is its type, and its number; comments apart."""
    blocks = [block for block in text.removesuffix("\n\n").split("\n\n") if not block.startswith(":")]
    found = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert (name, found[-1]["sequence_number"]) == (f"event: {found[-1]['type']}", number)
    return found


def streamed(client: httpx.Client, said: Any, **more: Any) -> list[dict[str, Any]]:
    answer = client.post(RESPONSES, json={"model": "tiny", "input": said, "stream": True} | more)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream"), answer.text
    return events(answer.text)


def kinds(found: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in found]


MESSAGE = [
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
]
REASONING = ["output_item.added", "reasoning_summary_text.delta", "reasoning_summary_text.done", "output_item.done"]
CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]

# --- one answer --------------------------------------------------------------------------------------------------------------------


def test_a_response_has_the_shape_of_openais(client: httpx.Client) -> None:
    answer = answered(client, "n=2", instructions="be brief", metadata={"a": "b"})
    assert (answer["object"], answer["status"], answer["model"], answer["error"]) == ("response", "completed", "tiny", None)
    assert (answer["id"][:5], answer["incomplete_details"], answer["instructions"]) == ("resp_", None, "be brief")
    assert (answer["tools"], answer["tool_choice"], answer["text"]) == ([], "auto", {"format": {"type": "text"}})
    assert (answer["metadata"], answer["store"], answer["parallel_tool_calls"]) == ({"a": "b"}, True, True)
    (item,) = answer["output"]
    assert (item["id"][:4], item["type"], item["status"], item["role"]) == ("msg_", "message", "completed", "assistant")
    assert item["content"] == [{"type": "output_text", "text": "w0 w1 ", "annotations": [], "logprobs": []}]
    assert answer["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 5,
    }


def test_the_events_of_a_text_come_in_openais_order(client: httpx.Client) -> None:
    found = streamed(client, "n=2")
    assert kinds(found) == ["created", "in_progress", *MESSAGE[:2], MESSAGE[2], *MESSAGE[2:], "completed"]
    assert [found[0]["response"][key] for key in ("status", "output", "usage")] == ["in_progress", [], None]
    added, part, first, second, done, part_done, item_done, last = found[2:]
    assert (added["item"]["status"], added["item"]["content"], added["output_index"]) == ("in_progress", [], 0)
    assert part["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert [first["delta"], second["delta"], done["text"], part_done["part"]["text"]] == ["w0 ", "w1 ", "w0 w1 ", "w0 w1 "]
    assert {event["item_id"] for event in (part, first, second, done, part_done)} == {added["item"]["id"]}
    assert last["response"]["output"] == [item_done["item"]]
    assert last["response"]["id"] == found[0]["response"]["id"]
    assert last["response"]["usage"]["total_tokens"] == 5


def test_thinking_is_a_reasoning_item_before_the_text(client: httpx.Client) -> None:
    whole = answered(client, "n=3 think=2", model="thinker")
    thought, said = whole["output"]
    assert (thought["type"], thought["id"][:3]) == ("reasoning", "rs_")
    assert thought["summary"] == [{"type": "summary_text", "text": "w0 w1 "}]
    assert said["content"][0]["text"] == "w2 "
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    found = streamed(client, "n=3 think=2", model="thinker")
    assert kinds(found) == ["created", "in_progress", *REASONING[:2], *REASONING[1:], *MESSAGE, "completed"]
    assert [event["output_index"] for event in found[2:-1]] == [0] * 5 + [1] * 6
    assert alike(found[-1]["response"]) == alike(whole)


def test_a_call_is_an_item_with_its_arguments_as_text(client: httpx.Client) -> None:
    whole = answered(client, "n=0 call=f,g")
    assert [(item["type"], item["name"], item["arguments"]) for item in whole["output"]] == [
        ("function_call", "f", '{"city": "Paris"}'),
        ("function_call", "g", '{"city": "Paris"}'),
    ]
    found = streamed(client, "n=1 call=f")
    assert kinds(found) == ["created", "in_progress", *MESSAGE, *CALL, "completed"]
    added, delta, done, item_done = found[8:12]
    assert (added["item"]["arguments"], delta["delta"], done["arguments"]) == ("", '{"city": "Paris"}', '{"city": "Paris"}')
    assert item_done["item"]["call_id"].startswith("call_")
    assert alike(found[-1]["response"]) == alike(answered(client, "n=1 call=f"))


def alike(response: dict[str, Any]) -> Any:
    """Without what differs from answer to answer."""
    text = json.dumps({key: value for key, value in response.items() if key not in ("id", "created_at")})
    return json.loads(text, object_hook=lambda found: {key: value for key, value in found.items() if key not in ("id", "call_id")})


def test_an_answer_without_anything_is_an_empty_message(client: httpx.Client) -> None:
    assert text_of(answered(client, "n=0")) == ""
    found = streamed(client, "n=0")
    assert kinds(found) == ["created", "in_progress", *MESSAGE[:2], *MESSAGE[3:], "completed"]
    assert len(found[-1]["response"]["output"]) == 1


def test_a_cut_answer_is_completed_and_says_what_cut_it(client: httpx.Client) -> None:
    last = streamed(client, "n=9", max_output_tokens=2)[-1]
    assert last["type"] == "response.completed"
    assert (last["response"]["status"], last["response"]["incomplete_details"]) == ("completed", {"reason": "max_output_tokens"})


def test_an_error_in_mid_stream_is_response_failed(server: Supervised, client: httpx.Client) -> None:
    found = streamed(client, "n=3 wall=1")
    assert kinds(found)[-1] == "failed"
    assert found[-1]["response"]["status"] == "failed"
    assert found[-1]["response"]["error"]["code"] == "engine_crashed"


def test_logprobs_come_when_they_are_included(client: httpx.Client) -> None:
    call = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    told = answered(client, "n=2", **call)["output"][0]["content"][0]["logprobs"]
    assert [(one["token"], len(one["top_logprobs"])) for one in told] == [("w0 ", 2), ("w1 ", 2)]
    found = streamed(client, "n=2", **call)
    assert [one for event in found if event["type"].endswith("text.delta") for one in event["logprobs"]] == told
    assert found[-1]["response"]["output"][0]["content"][0]["logprobs"] == told
    assert echoed(client, top_logprobs=3)["top_logprobs"] == 3
    assert echoed(client)["top_logprobs"] is None


def test_fields_reach_the_engine(client: httpx.Client) -> None:
    got = echoed(client, temperature=0, top_p=0.5, max_output_tokens=7, truncation="auto")
    assert (got["sampling"]["temperature"], got["sampling"]["top_p"], got["max_tokens"], got["truncate"]) == (0, 0.5, 7, True)
    plain = echoed(client)
    assert (plain["sampling"]["temperature"], plain["sampling"]["top_p"], plain["truncate"]) == (1, 1, False)
    schema = {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}
    assert echoed(client, text={"format": schema})["format"] == {"kind": "json_schema", "source": '{"type":"object"}'}
    assert answered(client, "n=1", text={"format": schema})["text"] == {"format": schema}
    assert echoed(client, text={"format": {"type": "json_object"}})["format"] == {"kind": "json", "source": ""}
    assert echoed(client, model="thinker", reasoning={"effort": "high", "summary": "auto"})["think"] is True
    assert echoed(client, model="thinker", reasoning={"effort": "none"})["think"] is False


def test_what_codex_sends_and_mlxd_has_not_is_ignored(client: httpx.Client) -> None:
    ignored = {"service_tier": "auto", "user": "u", "prompt_cache_key": "k", "background": False, "client_metadata": {"a": 1}}
    ignored |= {"include": ["reasoning.encrypted_content"], "parallel_tool_calls": False, "stream_options": {"x": 1}}
    unknown = [{"type": "web_search"}, {"type": "local_shell"}, {"type": "image_generation"}, {"type": "mcp", "server_label": "x"}]
    got = echoed(client, **ignored, tools=unknown, text={"verbosity": "low"}, conversation=None, prompt=None)
    assert (got["tools"], got["tool_choice"]) == (None, "auto")


# --- what comes in -----------------------------------------------------------------------------------------------------------------


def test_items_become_a_conversation(client: httpx.Client) -> None:
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "s"}]},
        {"role": "user", "content": "q"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "x"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look"}], "status": "completed"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "custom_tool_call", "call_id": "c2", "name": "apply_patch", "input": "*** Begin"},
        {"type": "local_shell_call", "call_id": "c3", "action": {"type": "exec", "command": ["ls"]}},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
        {"type": "local_shell_call_output", "call_id": "c3", "output": "three"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}},
        {"type": "reasoning", "summary": [], "encrypted_content": "earlier"},
        {"type": "function_call", "call_id": "c4", "namespace": "ns", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c4", "output": ""},
        {"role": "user", "content": "echo"},
    ]
    got = echoed(client, items, instructions="i")["messages"]
    assert [message["role"] for message in got] == [
        *("system", "system", "user", "assistant", "tool", "tool", "tool", "assistant", "tool", "user")
    ]
    assert (got[0]["content"], got[1]["content"]) == ("i", "s")
    assert (got[3]["content"], got[3]["reasoning_content"]) == ("I look", "hm")
    assert [call["function"] for call in got[3]["tool_calls"]] == [
        {"name": "f", "arguments": {"a": 1}},
        {"name": "apply_patch", "arguments": {"input": "*** Begin"}},
        {"name": "local_shell", "arguments": {"type": "exec", "command": ["ls"]}},
    ]
    assert got[5] == {"role": "tool", "content": "two", "name": "apply_patch", "tool_call_id": "c2"}
    assert got[7]["reasoning_content"] == "earlier"
    assert (got[7]["tool_calls"][0]["function"]["name"], got[8]["name"]) == ("ns.g", "ns.g")


REFUSALS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"model": None}, "model is required", None),
    ({"input": None}, "at least one item is required", "input"),
    ({"input": []}, "at least one item is required", "input"),
    ({"input": 5}, "expected", "input"),
    ({"input": [{"content": "x"}]}, "a message needs a role", "input[0].role"),
    ({"input": [{"role": "user", "content": [IMAGE]}]}, "tiny does not support images", "input[0].content"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "'item_reference' is not a type of item", "input[0].type"),
    ({"input": [{"type": "function_call", "arguments": "{}"}]}, "a call needs a name", "input[0].name"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{"}]}, "is not a JSON object", "input[0].arguments"),
    ({"input": [{"type": "local_shell_call"}]}, "expected object, got null", "input[0].action"),
    ({"previous_response_id": "resp_x"}, "there is no response with id 'resp_x'", "previous_response_id"),
    ({"conversation": "conv_1"}, "use previous_response_id", "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "there are no stored prompts", "prompt"),
    ({"tools": [WEATHER]}, "tiny does not support tools", "tools"),
    ({"tools": [{"type": "function"}]}, "a function needs a name", "tools[0].name"),
    ({"tools": [WEATHER | {"parameters": []}]}, "expected object", "tools[0].parameters"),
    ({"tool_choice": {"type": "web_search"}}, "invalid enum value 'web_search'", "tool_choice.type"),
    ({"tool_choice": "required"}, "there are no tools to call", "tool_choice"),
    ({"text": {"format": {"type": "grammar"}}}, "invalid enum value 'grammar'", "text.format.type"),
    ({"text": {"format": DEEP | {"schema": DEEP["json_schema"]["schema"]}}}, "nested more than 64 deep", "text.format.schema"),
    ({"reasoning": {"effort": "huge"}}, "must be none, minimal", "reasoning.effort"),
    ({"truncation": "yes"}, "invalid enum value 'yes'", "truncation"),
    ({"top_logprobs": 21}, "expected int <= 20", "top_logprobs"),
    ({"max_output_tokens": 0}, "expected int >= 1", "max_output_tokens"),
    ({"temperature": 3}, "expected number <= 2", "temperature"),
]


@pytest.mark.parametrize(("change", "sentence", "param"), REFUSALS, ids=lambda value: str(value)[:40])
def test_bad_input_names_the_field(client: httpx.Client, change: dict[str, Any], sentence: str, param: str | None) -> None:
    check_refusal(client.post(RESPONSES, json={"model": "tiny", "input": "n=1"} | change), 400, sentence, param)


# --- what is kept ------------------------------------------------------------------------------------------------------------------


def test_a_conversation_goes_on_from_a_response_that_was_kept(client: httpx.Client) -> None:
    first = answered(client, "n=2 think=1 call=f", model="thinker", instructions="once")
    call_id = first["output"][-1]["call_id"]
    output = {"type": "function_call_output", "call_id": call_id, "output": "sunny"}
    second = answered(client, [output, {"role": "user", "content": "n=1"}], previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    got = echoed(client, previous_response_id=second["id"])["messages"]
    made = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": {"city": "Paris"}}}
    assert got == [
        {"role": "user", "content": "n=2 think=1 call=f"},
        {"role": "assistant", "content": "w1 ", "reasoning_content": "w0 ", "tool_calls": [made]},
        {"role": "tool", "content": "sunny", "name": "f", "tool_call_id": call_id},
        {"role": "user", "content": "n=1"},
        {"role": "assistant", "content": "w0 "},
        {"role": "user", "content": "echo"},
    ]


def test_a_streamed_response_is_kept_too(client: httpx.Client) -> None:
    last = streamed(client, "n=1 call=f")[-1]["response"]
    assert client.get(f"{RESPONSES}/{last['id']}").json() == last
    got = echoed(client, previous_response_id=last["id"])["messages"]
    assert got[1]["tool_calls"][0]["id"] == last["output"][-1]["call_id"]


def test_a_response_can_be_had_again_until_it_is_deleted(client: httpx.Client) -> None:
    made = answered(client, "n=1")
    path = f"{RESPONSES}/{made['id']}"
    assert client.get(path).json() == made
    assert client.delete(path).json() == {"id": made["id"], "object": "response", "deleted": True}
    for answer in (client.get(path), client.delete(path)):
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
    gone = client.post(RESPONSES, json={"model": "tiny", "input": "n=1", "previous_response_id": made["id"]})
    assert (gone.status_code, gone.json()["error"]["code"]) == (400, "previous_response_not_found")


def test_what_is_not_to_be_kept_is_not(client: httpx.Client) -> None:
    made = answered(client, "n=1", store=False)
    assert made["store"] is False
    assert client.get(f"{RESPONSES}/{made['id']}").status_code == 404


def test_the_store_has_an_end_and_forgets_what_was_not_used_for_longest() -> None:
    store = Store(most=3, most_bytes=100)
    for name in "abc":
        store.put(name, Kept(b"x" * 5, b"y" * 5))
    assert store.get("a") is not None
    store.put("d", Kept(b"", b""))
    assert [name for name in "abcd" if store.get(name)] == ["a", "c", "d"]
    store.put("e", Kept(b"x" * 85, b""))
    assert (list(store.kept), store.size_bytes) == (["c", "d", "e"], 95)
    store.put("f", Kept(b"x" * 101, b""))
    assert (list(store.kept), store.size_bytes) == ([], 0)


# --- tools -------------------------------------------------------------------------------------------------------------------------


def ask(**more: Any) -> tuple[Asked, Events]:
    """What a body comes to, on a model that calls tools and thinks, and the view of its answer."""
    call = responses.creates.decode(json.dumps({"model": "tiny", "input": "x"} | more))
    service = Service(Config())
    asked = responses.ask(call, able(), service)
    return asked, Events(call, asked, service)


def test_tools_are_told_flat_custom_ones_as_functions_of_one_text_and_groups_by_full_name() -> None:
    asked, _ = ask(tools=[WEATHER, PATCH, {"type": "web_search"}, FILES])
    told = {tool["function"]["name"]: tool["function"] for tool in asked.request.tools or []}
    assert list(told) == ["get_weather", "apply_patch", "files.read", "files.apply_patch"]
    assert told["get_weather"] == {"name": "get_weather", "parameters": {"type": "object"}, "strict": True}
    assert told["files.read"] == {"name": "files.read"}
    assert told["apply_patch"]["description"] == "Edit files"
    assert told["apply_patch"]["parameters"] == {
        "type": "object",
        "properties": {"input": {"type": "string"}},
        "required": ["input"],
    }


def ended(text: str = "", thinking: str = "", calls: tuple[Call, ...] = ()) -> Answered:
    figures = {"cached_tokens": 0, "thinking_tokens": 0, "total_ns": 1, "load_ns": 1, "prompt_ns": 1, "eval_ns": 1}
    summary = Summary(reason="stop", stop_string=None, prompt_ids=[], emitted=[], **figures)
    return Answered(text=text, thinking=thinking, calls=list(calls), logprobs=[], summary=summary)


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ("auto", "auto"),
        ("required", "required"),
        ({"type": "function", "name": "get_weather"}, "get_weather"),
        ({"type": "custom", "name": "apply_patch"}, "apply_patch"),
    ],
)
def test_a_tool_can_be_chosen(choice: Any, wanted: str) -> None:
    assert ask(tools=[WEATHER, PATCH], tool_choice=choice)[0].request.tool_choice == wanted


def test_none_of_the_tools_and_one_that_is_not_there() -> None:
    assert ask(tools=[WEATHER], tool_choice="none")[0].request.tools is None
    with pytest.raises(Malformed, match="there is no tool called 'g'"):
        ask(tools=[WEATHER], tool_choice={"type": "function", "name": "g"})


def test_calls_come_back_under_the_names_and_kinds_their_client_knows() -> None:
    tools = [WEATHER, PATCH, FILES]
    made = [Call(1, "files.read", "{}"), Call(1, "apply_patch", '{"input": "*** Begin"}'), Call(1, "get_weather", "{}")]
    answer = ended(calls=tuple(made))
    whole = json.loads(ask(tools=tools)[1].whole([answer]))
    read, patch, weather = whole["output"]
    assert (read["type"], read["namespace"], read["name"], read["arguments"]) == ("function_call", "files", "read", "{}")
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "apply_patch", "*** Begin")
    assert (weather["type"], weather["name"], "namespace" in weather) == ("function_call", "get_weather", False)
    _, view = ask(tools=tools)
    data = view.begin(0, 1, 0) + b"".join(view.call(0, call) for call in made) + view.end(0, answer) + view.close([answer])
    found = events(data.decode())
    custom = [kind.replace("function_call_arguments", "custom_tool_call_input") for kind in CALL]
    assert kinds(found) == ["created", "in_progress", *CALL, *custom, *CALL, "completed"]
    assert alike(found[-1]["response"]) == alike(whole)


def test_text_thinking_and_calls_in_any_order_are_items_of_their_own() -> None:
    _, view = ask()
    call = Call(1, "f", "{}")
    answer = ended("ac", "b", (call,))
    data = view.begin(0, 1, 0) + view.token(0, Token(1, [1], "a")) + view.token(0, Token(1, [1], "b", True))
    data += view.call(0, call) + view.token(0, Token(1, [1], "c")) + view.end(0, answer) + view.close([answer])
    found = events(data.decode())
    assert kinds(found) == ["created", "in_progress", *MESSAGE, *REASONING, *CALL, *MESSAGE, "completed"]
    assert [item["type"] for item in found[-1]["response"]["output"]] == ["message", "reasoning", "function_call", "message"]


def test_a_failure_before_the_beginning_has_its_beginning_all_the_same() -> None:
    found = events(ask()[1].error(Refused(400, "too long", code="context_length_exceeded")).decode())
    assert kinds(found) == ["created", "in_progress", "failed"]
    assert found[-1]["response"]["error"] == {"code": "context_length_exceeded", "message": "too long"}
