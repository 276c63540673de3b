"""The `anthropic` package against a server whose real engine has the built-in model: what a program that uses it sees."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic.types import Message
from known_answers import KNOWN, LONG, THINKING, TOOL, UNICODE
from pydantic import BaseModel
from server_client import Background, Engine, Supervised, supervised, until

from mlxd.messages import Done, Event, Submit, Token
from mlxd.models import BUILTIN

QUESTION = "What happens when Metal aborts?"
MIXED = "Write hello in many languages."
GREEDY = {"temperature": 0}
FUNCTION = TOOL["tools"][0]["function"]
TOOLS = [{"name": FUNCTION["name"], "description": FUNCTION["description"], "input_schema": FUNCTION["parameters"]}]
ADAPTIVE = {"type": "adaptive"}


class Stage:
    """A server whose real engine can be made to hold every answer after seven tokens."""

    def __init__(self, server: Supervised):
        self.server = server
        self.holds = False
        server.passes = lambda submit, seen, event: not self.holds or self.early(submit, seen, event)
        self.client = anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0)

    def early(self, submit: Submit, seen: list[Event], event: Event) -> bool:
        return not isinstance(event, Done) and sum(len(one.ids) for one in seen if isinstance(one, Token)) < 7

    @property
    def engine(self) -> Engine:
        engine = self.server.engine(BUILTIN)
        assert engine is not None
        return engine

    def held(self) -> int:
        """Jobs, of this engine."""
        assert self.engine.gate is not None
        return len(self.engine.gate.held)

    def kill(self) -> None:
        self.holds = False
        self.engine.kill()


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home)) as server:
        yield Stage(server)


@pytest.fixture
def client(stage: Stage) -> anthropic.Anthropic:
    return stage.client


def ask(question: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": "mlxd-tiny", "max_tokens": 500, "messages": messages, "extra_body": GREEDY} | more


def whole(client: anthropic.Anthropic, call: dict[str, Any]) -> Message:
    return client.messages.create(**call)


def streamed(client: anthropic.Anthropic, call: dict[str, Any]) -> Message:
    """What the package makes of a stream."""
    with client.messages.stream(**call) as stream:
        return stream.get_final_message()


def both(client: anthropic.Anthropic, call: dict[str, Any]) -> Message:
    """The answer, which is the same whole and streamed but for its ids."""
    message = whole(client, call)
    assert told(streamed(client, call)) == told(message)
    return message


def told(message: Message) -> dict[str, Any]:
    blocks = [block.model_dump(exclude={"id", "parsed_output", "caller"}) for block in message.content]
    return message.model_dump(include={"model", "role", "stop_reason", "stop_sequence", "usage"}) | {"content": blocks}


def said(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_an_answer_is_the_same_whole_and_streamed(client: anthropic.Anthropic) -> None:
    message = both(client, ask(QUESTION, system="You are a helpful assistant."))
    assert [block.type for block in message.content] == ["text"]
    assert (said(message), message.stop_reason, message.model) == (KNOWN[QUESTION], "end_turn", "mlxd-tiny")


def test_the_same_seed_gives_the_same_characters_whole_and_streamed(client: anthropic.Anthropic) -> None:
    assert said(both(client, ask(MIXED))) == UNICODE[MIXED]
    drawn = ask("Write a long random text.", max_tokens=60, extra_body={"temperature": 1, "seed": 11})
    assert both(client, drawn).stop_reason == "max_tokens"


def test_text_arrives_in_pieces(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**ask(QUESTION)) as stream:
        pieces = list(stream.text_stream)
    assert len(pieces) > 5
    assert "".join(pieces) == KNOWN[QUESTION]


def test_thinking_is_a_block_of_its_own_and_can_be_sent_back(client: anthropic.Anthropic) -> None:
    for question in ("What is two plus two?", "Which port does mlxd use?"):
        message = both(client, ask(question, thinking=ADAPTIVE))
        thought, answer = THINKING[question]
        thinking, text = message.content
        assert (thinking.type, text.type) == ("thinking", "text")
        assert (thinking.thinking, text.text) == (thought, answer)
        history = [{"role": "user", "content": question}, {"role": "assistant", "content": message.content}]
        follow_up = [*history, {"role": "user", "content": QUESTION}]
        assert said(client.messages.create(**ask("", messages=follow_up))) == KNOWN[QUESTION]


def test_a_stop_sequence_ends_the_answer_and_is_named(client: anthropic.Anthropic) -> None:
    message = both(client, ask(QUESTION, stop_sequences=["never", "supervisor"]))
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "supervisor")
    assert said(message) == KNOWN[QUESTION].partition("supervisor")[0]


def test_an_answer_that_the_client_began_is_gone_on_with(client: anthropic.Anthropic) -> None:
    begun, rest = KNOWN[QUESTION][:20], KNOWN[QUESTION][20:]
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": begun}]
    assert said(both(client, ask("", messages=turns))) == rest


@pytest.mark.parametrize("more", [{}, {"system": "Be brief.", "thinking": ADAPTIVE}], ids=["plain", "more"])
def test_tokens_are_counted_as_they_are_used(client: anthropic.Anthropic, more: dict[str, Any]) -> None:
    call = ask(QUESTION, **more)
    counted = client.messages.count_tokens(**{key: call[key] for key in call if key not in ("max_tokens", "extra_body")})
    assert counted.input_tokens == client.messages.create(**call).usage.input_tokens


def test_an_agents_loop_of_tool_calls(client: anthropic.Anthropic) -> None:
    call = ask(TOOL["question"], tools=TOOLS)
    counted = client.messages.count_tokens(model=call["model"], messages=call["messages"], tools=TOOLS)
    message = both(client, call)
    (use,) = message.content
    assert (use.type, message.stop_reason) == ("tool_use", "tool_use")
    assert (use.name, use.input) == ("get_weather", {"city": "Paris"})
    assert counted.input_tokens == message.usage.input_tokens
    result = {"type": "tool_result", "tool_use_id": use.id, "content": TOOL["result"]}
    turns = [*call["messages"], {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    last = both(client, ask("", messages=turns, tools=TOOLS))
    assert (said(last), last.stop_reason) == (TOOL["answer"], "end_turn")


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=["any", "tool"])
def test_a_call_can_be_forced(client: anthropic.Anthropic, choice: dict[str, Any]) -> None:
    message = both(client, ask(QUESTION, tools=TOOLS, tool_choice=choice))
    assert [(block.type, block.name) for block in message.content if block.type != "text"] == [("tool_use", "get_weather")]


def test_no_call_is_made_when_none_is_wanted(client: anthropic.Anthropic) -> None:
    message = both(client, ask(TOOL["question"], tools=TOOLS, tool_choice={"type": "none"}))
    assert ([block.type for block in message.content], message.stop_reason) == (["text"], "end_turn")


def test_an_answer_can_be_held_to_a_schema(client: anthropic.Anthropic) -> None:
    class Program(BaseModel):
        name: str
        port: int

    call = ask("Answer in JSON: name and port of mlxd.")
    parsed = client.messages.parse(**call, output_format=Program)
    assert parsed.parsed_output == Program(name="mlxd", port=11435)
    with client.messages.stream(**call, output_format=Program) as stream:
        assert said(stream.get_final_message()) == said(parsed)


def test_errors_have_the_classes_of_the_package(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**ask("hi", model="nope"))
    assert missing.value.body == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "model 'nope' not found"},
        "request_id": missing.value.request_id,
    }
    for wrong in ({"max_tokens": 0}, {"messages": []}, {"messages": [{"role": "user", "content": "so " * 9000}]}):
        with pytest.raises(anthropic.BadRequestError):
            streamed(client, ask("hi", **wrong))
    with pytest.raises(anthropic.InternalServerError, match="scripted failure"):
        client.messages.create(**ask("fail=503", model="tiny"))


def test_an_error_in_mid_stream_is_raised(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.APIStatusError, match="the engine died 3 times") as died:
        streamed(client, ask("n=6 wall=3", model="tiny"))
    assert died.value.request_id


def test_who_leaves_in_mid_stream_frees_the_slot(stage: Stage) -> None:
    stage.holds = True
    with stage.client.messages.stream(**ask(next(iter(LONG)))) as stream:
        next(iter(stream.text_stream))
        assert stage.server.health()["queue"]["running"] == 1
    until("a free slot", lambda: stage.server.health()["queue"]["running"] == 0, stage.server.told)
    stage.holds = False


KILLED: dict[str, list[dict[str, Any]]] = {
    "text and thinking": [ask(QUESTION), ask("What is exact resume?", thinking=ADAPTIVE)],
    "a call": [ask(TOOL["question"], tools=TOOLS)],
}


@pytest.mark.parametrize("which", ["text and thinking", pytest.param("a call", marks=pytest.mark.full)])
def test_an_engine_killed_in_mid_stream_changes_nothing(stage: Stage, which: str) -> None:
    calls = KILLED[which]
    calm = [told(whole(stage.client, call)) for call in calls]
    before = stage.held()
    stage.holds = True
    ways = [(call, way) for call in calls for way in (whole, streamed)]
    asked = [Background(lambda call=call, way=way: told(way(stage.client, call))) for call, way in ways]
    until("all to be held", lambda: stage.held() == before + len(asked), stage.server.told)
    stage.kill()
    assert [one.result() for one in asked] == [message for message in calm for _ in range(2)]
