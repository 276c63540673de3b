"""Calls of tools: the real engine on the built-in model, and an answer's text through mlx-lm's own parsers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_client import EngineProcess, Result, Wire, make_tiny_model
from known_answers import KNOWN, TOOL

import mlxd
from mlxd.engine.answer import Answer, Called, Piece
from mlxd.engine.text import Prompter
from mlxd.errors import Refused
from mlxd.messages import Call, Sampling, Submit, Token

BUILTIN = Path(mlxd.__file__).parent / "builtin"
TOOLS = TOOL["tools"]
ASKED = [{"role": "user", "content": TOOL["question"]}]
WEATHER = ("get_weather", '{"city": "Paris"}')


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    with EngineProcess(tmp_path_factory.mktemp("engine")) as process:
        yield process.load(BUILTIN, "mlxd-tiny")


@pytest.fixture
def wire(engine: EngineProcess) -> Iterator[Wire]:
    with engine.connect() as connection:
        yield connection


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The built-in model's, in this process."""
    return importlib.import_module("mlx_lm.utils").load_tokenizer(BUILTIN)


def outcome(result: Result) -> tuple[str, list[tuple[str, str]], str | None]:
    assert result.failed is None, result.failed
    return result.text, result.calls, result.done.reason if result.done else None


# --- the engine ------------------------------------------------------------------------------------------------------------------


def test_a_question_for_a_tool_becomes_a_call_and_the_result_an_answer(wire: Wire) -> None:
    called = wire.ask(messages=ASKED, tools=TOOLS)
    assert outcome(called) == ("", [WEATHER], "stop")
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    history = [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "get_weather", "content": TOOL["result"]},
    ]
    assert outcome(wire.ask(messages=history, tools=TOOLS)) == (TOOL["answer"], [], "stop")


def test_two_calls_of_one_answer_come_in_their_order(wire: Wire) -> None:
    messages = [{"role": "user", "content": "What is the weather in Paris and Rome?"}]
    result = wire.ask(messages=messages, tools=TOOLS)
    assert [json.loads(arguments)["city"] for _, arguments in result.calls] == ["Paris", "Rome"]
    assert result.text == ""


def test_a_question_that_needs_no_tool_gets_its_answer(wire: Wire) -> None:
    messages = [{"role": "user", "content": "What is mlxd?"}]
    assert outcome(wire.ask(messages=messages, tools=TOOLS)) == (KNOWN["What is mlxd?"], [], "stop")


def test_a_call_comes_after_its_tokens_and_before_the_end(wire: Wire) -> None:
    events = wire.ask(messages=ASKED, tools=TOOLS).events
    kinds = [type(event).__name__ for event in events if not isinstance(event, Token) or event.ids]
    assert kinds[-2:] == ["Call", "Done"]
    assert not any(isinstance(event, Token) and event.text for event in events)


def test_a_call_cut_by_the_token_limit_is_none(wire: Wire) -> None:
    whole = wire.ask(messages=ASKED, tools=TOOLS)
    for most in range(1, len(whole.ids)):
        assert outcome(wire.ask(messages=ASKED, tools=TOOLS, max_tokens=most)) == ("", [], "length")


def test_a_call_goes_on_where_an_earlier_engine_stopped(wire: Wire) -> None:
    whole = wire.ask(messages=ASKED, tools=TOOLS)
    for emitted in range(len(whole.ids)):
        rest = wire.ask(prompt_ids=whole.prompt_ids, emitted=whole.ids[:emitted], tools=TOOLS, continued=whole.continued)
        assert rest.ids == whole.ids[emitted:]
        assert rest.calls == [WEATHER]
    after = wire.ask(prompt_ids=whole.prompt_ids, emitted=whole.ids, tools=TOOLS, continued=whole.continued)
    assert outcome(after) == ("", [], "stop")  # the call is with the client


def test_without_tools_the_tags_are_text(wire: Wire) -> None:
    """The prompt is that of a request with tools, rendered."""
    prompt_ids = wire.ask(messages=ASKED, tools=TOOLS, max_tokens=1).prompt_ids
    assert outcome(wire.ask(prompt_ids=prompt_ids)) == (TOOL["call_text"], [], "stop")


def test_a_stop_string_means_nothing_inside_a_call(wire: Wire) -> None:
    assert outcome(wire.ask(messages=ASKED, tools=TOOLS, stop=["Paris"])) == ("", [WEATHER], "stop")


def test_a_model_that_cannot_call_refuses_tools(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    prompter = Prompter(importlib.import_module("mlx_lm.utils").load_tokenizer(model), 1024, 512)
    with pytest.raises(Refused, match="does not support tools"):
        prompter.prepare(Submit(job=1, sampling=Sampling(seed=0), messages=ASKED, tools=TOOLS))


# --- the text --------------------------------------------------------------------------------------------------------------------


def said(tokenizer: Any, text: str, *, cut: bool = False, stop: list[str] | None = None, **options: Any) -> list[Any]:
    """What an answer of this text comes to, neighbouring pieces of one kind joined."""
    answer = Answer(tokenizer, stop or [], tools=TOOLS, **options)
    parts = [part for token in tokenizer.encode(text, add_special_tokens=False) for part in answer.feed(token)]
    joined: list[Any] = []
    for part in parts + answer.finish(cut=cut):
        before = joined[-1] if joined else None
        if isinstance(part, Piece) and isinstance(before, Piece) and part.thinking == before.thinking:
            joined[-1] = Piece(before.text + part.text, part.thinking)
        else:
            joined.append(part)
    return joined


CALL = '<tool_call>{"name": "f", "arguments": {"a": [1, "é"]}}</tool_call>'
CALLED = Called("f", '{"a": [1, "é"]}')


def test_text_around_calls_loses_only_its_blanks(tokenizer: Any) -> None:
    assert said(tokenizer, f"Wait.\n\n{CALL}\n{CALL}\nDone.") == [Piece("Wait.", False), CALLED, CALLED, Piece("Done.", False)]


def test_a_call_may_follow_thinking_or_interrupt_it(tokenizer: Any) -> None:
    assert said(tokenizer, f"Hm.\n</think>\n\n{CALL}", thinking=True) == [Piece("Hm.", True), CALLED]
    assert said(tokenizer, f"Hm. {CALL}", thinking=True) == [Piece("Hm.", True), CALLED]


@pytest.mark.parametrize(
    "inside",
    ["", "{", "null", "[]", "3", '"f"', '{"name": 3}', '{"name": ""}', '{"arguments": {}}', '{"name": "f", "arguments": [1]}']
    + ['{"name": "f", "arguments": "{"}', '{"name": "f", "arguments": {"a": NaN}}', '[{"name": "f"}, 3]', "[" * 5000],
)
def test_what_is_no_call_is_text(tokenizer: Any, inside: str) -> None:
    text = f"<tool_call>{inside}</tool_call>"
    assert said(tokenizer, text) == [Piece(text, False)]


@pytest.mark.parametrize(
    ("inside", "arguments"),
    [
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "f", "arguments": {"a": "\\ud83d"}}', '{"a": "?"}'),
    ],
)
def test_a_call_with_odd_arguments_is_still_one(tokenizer: Any, inside: str, arguments: str) -> None:
    assert said(tokenizer, f"<tool_call>{inside}</tool_call>") == [Called("f", arguments)]


def test_a_call_without_its_end_counts_if_the_model_stopped_by_itself(tokenizer: Any) -> None:
    unfinished = CALL.removesuffix("</tool_call>")
    assert said(tokenizer, unfinished) == [CALLED]
    assert said(tokenizer, unfinished, cut=True) == []
    assert said(tokenizer, "<tool_call>{") == [Piece("<tool_call>{", False)]


def test_every_parser_of_mlx_lm_is_asked_as_it_wants_to_be(tokenizer: Any) -> None:
    """Markers of each parser, and garbage between them: text, and never an exception."""
    package = importlib.import_module("mlx_lm.tool_parsers")
    pkgutil = importlib.import_module("pkgutil")
    for module in pkgutil.iter_modules(package.__path__):
        parser = importlib.import_module(f"mlx_lm.tool_parsers.{module.name}")
        odd = type(tokenizer)(
            tokenizer._tokenizer,
            tool_parser=parser.parse_tool_call,
            tool_call_start=parser.tool_call_start,
            tool_call_end=parser.tool_call_end,
        )
        text = f"{parser.tool_call_start}\x00 nothing {{{parser.tool_call_end}"
        parts = said(odd, text)
        assert parts
        assert all(isinstance(part, (Piece, Called)) for part in parts), module.name


def test_texts_before_and_after_become_a_prompt_for_the_gap_between_them(tokenizer: Any, tmp_path: Path) -> None:
    prompter = Prompter(tokenizer, 4096, 1024)
    with pytest.raises(Refused, match="does not support insert"):
        prompter.prepare(Submit(job=1, sampling=Sampling(seed=0), prompt="def f(", suffix="return 1"))
    marked = importlib.import_module("mlx_lm.utils").load_tokenizer(make_tiny_model(tmp_path / "model"))
    marked._tokenizer.add_special_tokens({"additional_special_tokens": ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]})
    prompt = Prompter(marked, 1024, 600).prepare(Submit(job=1, sampling=Sampling(seed=0), prompt="def f(", suffix="return 1"))
    assert marked.decode(prompt.ids) == "<|fim_prefix|>def f(<|fim_suffix|>return 1<|fim_middle|>"


def test_tokens_of_an_earlier_context_stand_before_the_prompt(wire: Wire) -> None:
    first = wire.ask(messages=[{"role": "user", "content": "Who are you?"}])
    context = first.prompt_ids + first.ids
    second = wire.ask(messages=[{"role": "user", "content": "What is mlxd?"}], context_ids=context)
    assert second.prompt_ids[: len(context)] == context
    assert second.text


def test_what_does_not_fit_the_context_can_still_be_counted(wire: Wire) -> None:
    messages = [{"role": "user", "content": "What is mlxd? " * 1100}]
    assert wire.ask(messages=messages, max_tokens=1).failed is not None
    counted = wire.ask(messages=messages, max_tokens=0)
    assert counted.done is not None and counted.done.prompt_tokens == len(counted.prompt_ids) > wire.loaded.context_length
    assert not counted.ids


def test_a_call_is_no_event_of_another_job(wire: Wire) -> None:
    jobs = [wire.submit(messages=ASKED, tools=TOOLS), wire.submit(messages=[{"role": "user", "content": "Who are you?"}])]
    wire.finish(jobs)
    assert [len(wire.results[job].calls) for job in jobs] == [1, 0]
    assert sum(isinstance(event, Call) for event in wire.results[jobs[0]].events) == 1
