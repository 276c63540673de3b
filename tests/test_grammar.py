"""Structured output on the real engine: what is constrained parses and validates, the rest does not notice, and nobody is held up."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from engine_client import GREEDY, EngineProcess, Result, Wire, make_tiny_model
from known_answers import JSON_ANSWERS, KNOWN, THINKING
from mlx_lm.utils import load_tokenizer

import mlxd
from mlxd import config
from mlxd.engine.grammar import OPENINGS, Grammars, Lark, digits, functions, multiples_in
from mlxd.engine.text import Prompt
from mlxd.errors import Refused
from mlxd.messages import Bye, Format, Sampling, Submit

BUILTIN = Path(mlxd.__file__).parent / "builtin"
QUESTION = "Answer in JSON: name and port of mlxd."
WEATHER = "What is the weather in Paris?"
TOKENIZER = load_tokenizer(BUILTIN)


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


WORD = {"type": "string", "maxLength": 12}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": closed(name=WORD, port={"type": "integer", "minimum": 1, "maximum": 65535}),
    "optional": {"type": "object", "properties": {"a": DIGIT, "b": WORD}, "required": ["b"], "additionalProperties": False},
    "nested": closed(a=closed(b=closed(c=WORD), d={"type": "boolean"}), e={"type": "null"}),
    "array": {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 5},
    "tuple": {"type": "array", "prefixItems": [WORD, DIGIT], "items": False, "minItems": 2},
    "enum": {"enum": ["engine", 'a "quoted" word', "имя", "🙂", 7, None, True]},
    "number": closed(x={"type": "number", "minimum": -2, "exclusiveMaximum": 2.5}, y={"type": "integer", "multipleOf": 5}),
    "reference": {
        "$ref": "#/$defs/tree",
        "$defs": {"tree": closed(v=DIGIT, kids={"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2}), "leaf": WORD},
    },
    "any of": closed(it={"anyOf": [closed(kind={"const": "a"}, n=DIGIT), closed(kind={"const": "b"}, s=WORD), {"type": "null"}]}),
    "pattern": closed(id={"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"}, day={"type": "string", "format": "date"}),
    "map": {"type": "object", "additionalProperties": DIGIT, "maxProperties": 3},
}


def schema(name: str) -> Format:
    return Format(kind="json_schema", source=json.dumps(SCHEMAS[name]))


def tool(name: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters} | more}


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [tool("get_weather", CITY), tool("get_time", CITY)]


def hot(seed: int, temperature: float = 1.5) -> Sampling:
    return Sampling(seed=seed, temperature=temperature)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    with EngineProcess(tmp_path_factory.mktemp("engine")) as process:
        yield process.load(BUILTIN, "mlxd-tiny")


@pytest.fixture
def wire(engine: EngineProcess) -> Iterator[Wire]:
    with engine.connect() as connection:
        yield connection


def written(result: Result) -> str:
    """All that the model wrote, marks included."""
    assert result.failed is None, result.failed
    return str(TOKENIZER.decode(result.ids))


def reason(result: Result) -> str | None:
    return result.done.reason if result.done else None


def accepts(tokenizer: Any, text: str, **fields: Any) -> None:
    """Fails unless `text` is a whole answer to this."""
    constraint = Grammars(tokenizer).compile(Submit(**{"job": 1, "sampling": GREEDY} | fields), Prompt([1], False, False, 9))
    assert constraint.matcher.consume_tokens(tokenizer.encode(text, add_special_tokens=False)), text
    assert constraint.matcher.is_accepting(), text


def refusal(wire: Wire, **fields: Any) -> str:
    failed = wire.ask(**{"messages": user("hi"), "max_tokens": 50} | fields).failed
    assert failed is not None
    assert failed.status == 400
    return failed.message


# --- formats -----------------------------------------------------------------------------------------------------------------


def test_every_constrained_answer_validates_whatever_the_temperature(wire: Wire) -> None:
    jobs = {
        (name, seed): wire.submit(
            messages=user(QUESTION), format=schema(name), sampling=hot(seed) if seed else GREEDY, max_tokens=400
        )
        for name in SCHEMAS
        for seed in range(3)
    }
    wire.finish(jobs.values())
    for (name, seed), job in jobs.items():
        result = wire.results[job]
        assert reason(result) == "stop", (name, seed, result)
        jsonschema.validate(json.loads(result.text), SCHEMAS[name])
        assert result.text == written(result)


def test_the_json_format_gives_an_object(wire: Wire) -> None:
    result = wire.ask(messages=user(QUESTION), format=Format(kind="json"))
    assert json.loads(result.text) == json.loads(JSON_ANSWERS[QUESTION])
    for seed in range(8):
        result = wire.ask(messages=user("Say something random."), format=Format(kind="json"), sampling=hot(seed), max_tokens=80)
        assert result.text.startswith("{")
        assert reason(result) == "length" or isinstance(json.loads(result.text), dict)


@pytest.mark.parametrize("expression", [r"[a-c]{3,6}/\d+(\.\d)?", "(yes|no)\n", r"да+ \\/ 🙂?", r"\w{1,4}"])
def test_a_regular_expression_is_matched_from_end_to_end(wire: Wire, expression: str) -> None:
    jobs = [
        wire.submit(messages=user("hi"), format=Format(kind="regex", source=expression), sampling=hot(s), max_tokens=200)
        for s in range(4)
    ]
    wire.finish(jobs)
    for job in jobs:
        if reason(wire.results[job]) == "stop":
            assert re.fullmatch(expression, wire.results[job].text)
        else:
            assert expression == r"[a-c]{3,6}/\d+(\.\d)?"


def test_the_limit_of_tokens_cuts_json_and_says_so(wire: Wire) -> None:
    result = wire.ask(messages=user(QUESTION), format=schema("object"), max_tokens=3)
    assert (reason(result), len(result.ids)) == ("length", 3)


def test_thought_is_free_and_only_the_answer_constrained(wire: Wire) -> None:
    question, (thought, _) = next(iter(THINKING.items()))
    result = wire.ask(messages=user(question), think=True, format=schema("object"))
    assert result.thinking == thought
    jsonschema.validate(json.loads(result.text), SCHEMAS["object"])


def test_thought_may_come_first_where_a_model_begins_it_by_itself(tmp_path: Path) -> None:
    """The built-in model's thoughts begin in the prompt; this one's template knows of none."""
    with pytest.raises(AssertionError):
        accepts(TOKENIZER, "<think>or not</think>\n{}", format=Format(kind="json"))
    own = load_tokenizer(make_tiny_model(tmp_path / "m", thinking=True))
    for text in ("{}", "<think>or {not}</think>{}", "<think></think>\n\n{}"):
        accepts(own, text, format=Format(kind="json"))
    for text in ("<think>or not", "<think>or not</think>", "or not</think>{}", "<think></think><think></think>{}"):
        with pytest.raises(AssertionError):
            accepts(own, text, format=Format(kind="json"))
    with pytest.raises(AssertionError):
        accepts(own, "<think></think>{}", format=Format(kind="json"), think=False)


# --- resume, company -----------------------------------------------------------------------------------------------------------

CONSTRAINED: dict[str, dict[str, Any]] = {
    "schema": {"messages": user(QUESTION), "format": schema("any of"), "sampling": hot(3)},
    "thinking": {"messages": user(next(iter(THINKING))), "think": True, "format": schema("object"), "sampling": hot(2, 0.7)},
    "call": {"messages": user(WEATHER), "tools": TOOLS, "tool_choice": "required", "sampling": hot(4, 1.0), "max_tokens": 60},
}


@pytest.mark.parametrize("name", CONSTRAINED)
def test_a_constrained_answer_resumed_at_any_position_is_the_same(wire: Wire, name: str) -> None:
    fields = {"max_tokens": 200} | CONSTRAINED[name]
    whole = wire.ask(**fields)
    assert len(whole.ids) > 8
    jobs = [wire.submit(**fields, emitted=whole.ids[:cut]) for cut in range(len(whole.ids))]
    wire.finish(jobs)
    for cut, job in enumerate(jobs):
        rest = wire.results[job]
        assert whole.ids[:cut] + rest.ids == whole.ids, cut
        assert reason(rest) == reason(whole)


def test_json_goes_on_with_the_same_bytes_when_its_engine_is_killed(tmp_path: Path, wire: Wire) -> None:
    fields = {"messages": user(QUESTION), "format": schema("nested"), "sampling": hot(5)}
    whole = wire.ask(**fields)
    with EngineProcess(tmp_path / "e") as process, process.load(BUILTIN, "mlxd-tiny").connect() as doomed:
        job = doomed.submit(**fields)
        doomed.until(lambda: len(doomed.results[job].ids) >= 4)
        os.kill(process.process.pid, signal.SIGKILL)
        before = doomed.results[job]
    rest = wire.ask(**fields, emitted=before.ids)
    assert before.ids + rest.ids == whole.ids
    assert before.text + rest.text == whole.text


def test_free_rows_beside_constrained_ones_say_what_they_say_alone(wire: Wire) -> None:
    free = [{"messages": user(q), "sampling": s, "max_tokens": 40} for q in list(KNOWN)[:2] for s in (GREEDY, hot(9))]
    held = [
        {"messages": user(QUESTION), "format": schema(name), "sampling": hot(7), "max_tokens": 120} for name in list(SCHEMAS)[:4]
    ]
    alone = [wire.ask(**fields).ids for fields in free + held]
    jobs = [wire.submit(**fields) for fields in free + held]
    wire.finish(jobs)
    assert [wire.results[job].ids for job in jobs] == alone


# --- tool calls ------------------------------------------------------------------------------------------------------------------


def calls(result: Result) -> list[dict[str, Any]]:
    return [json.loads(call) for call in re.findall("<tool_call>(.*?)</tool_call>", written(result), re.S)]


def test_a_call_can_be_required_of_any_question(wire: Wire) -> None:
    jobs = [
        wire.submit(messages=user(q), tools=TOOLS, tool_choice="required", sampling=s, max_tokens=150)
        for q in ("Tell me a joke.", WEATHER)
        for s in (GREEDY, hot(1))
    ]
    wire.finish(jobs)
    for job in jobs:
        result = wire.results[job]
        assert written(result).startswith("<tool_call>")
        if reason(result) == "stop":
            assert calls(result)
        for call in calls(result):
            assert call["name"] in ("get_weather", "get_time")
            jsonschema.validate(call["arguments"], CITY)
    assert calls(wire.results[jobs[2]]) == [{"name": "get_weather", "arguments": {"city": "Paris"}}]


def test_a_named_function_is_called_once(wire: Wire) -> None:
    result = wire.ask(messages=user(WEATHER), tools=TOOLS, tool_choice="get_time", max_tokens=100)
    (call,) = calls(result)
    assert call["name"] == "get_time"
    assert reason(result) == "stop"


def test_strict_tools_leave_the_choice_and_hold_the_arguments(wire: Wire) -> None:
    strict = [tool("get_weather", closed(city={"enum": ["Oslo", "Rome"]}), strict=True)]
    free = wire.ask(messages=user("What is mlxd?"), tools=strict)
    assert free.text == KNOWN["What is mlxd?"]
    (call,) = calls(wire.ask(messages=user(WEATHER), tools=strict, max_tokens=100))
    assert call["arguments"]["city"] in ("Oslo", "Rome")


def test_with_a_format_and_tools_an_answer_is_either(wire: Wire) -> None:
    both = {"tools": TOOLS, "format": schema("object"), "max_tokens": 100}
    assert calls(wire.ask(messages=user(WEATHER), **both)) == [{"name": "get_weather", "arguments": {"city": "Paris"}}]
    jsonschema.validate(json.loads(wire.ask(messages=user(QUESTION), **both).text), SCHEMAS["object"])


def test_a_function_may_have_any_name_and_refer_to_its_own_definitions(wire: Wire) -> None:
    parameters = closed(tree={"$ref": "#/$defs/word"}) | {"$defs": {"word": {"const": "имя"}}, "uniqueItems": True}
    name = 'a "b"\\\n🙂'
    result = wire.ask(messages=user("hi"), tools=[tool(name, parameters)], tool_choice=name, max_tokens=200)
    assert calls(result) == [{"name": name, "arguments": {"tree": "имя"}}]


def test_what_a_tool_choice_cannot_be_is_a_400(wire: Wire) -> None:
    assert "'nope', and tools has none" in refusal(wire, tools=TOOLS, tool_choice="nope")
    assert "there are no tools" in refusal(wire, tool_choice="required")
    assert "the parameters of the function 'f' cannot be used" in refusal(wire, tools=[tool("f", {"not": {}}, strict=True)])


def test_a_model_without_tools_cannot_be_made_to_call(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="does not support tools"):
        accepts(load_tokenizer(make_tiny_model(tmp_path / "m")), "", tools=TOOLS, tool_choice="required")


class Other:
    """The built-in model's tokenizer with another parser of calls."""

    def __init__(self, parser: str):
        self.tool_parser = type("", (), {"__module__": f"mlx_lm.tool_parsers.{parser}"})

    def __getattr__(self, name: str) -> Any:
        return getattr(TOKENIZER, name)


#: As their models write them.
WRITTEN = {
    "gemma4": "call:get{city:3}",
    "glm47": "get\n<arg_key>city</arg_key>\n<arg_value>3</arg_value>\n",
    "minimax_m2": '\n<invoke name="get">\n<parameter name="city">3</parameter>\n</invoke>\n',
    "pythonic": "[get(city=3)]",
    "qwen3_coder": "\n<function=get>\n<parameter=city>\n3\n</parameter>\n</function>\n",
}


@pytest.mark.parametrize("parser", OPENINGS)
def test_calls_that_are_not_json_begin_with_the_function_and_end_with_their_mark(parser: str) -> None:
    text = WRITTEN[parser]
    parsed = importlib.import_module(f"mlx_lm.tool_parsers.{parser}").parse_tool_call(text, [tool("get", CITY)])
    assert [found["name"] for found in (parsed if isinstance(parsed, list) else [parsed])] == ["get"]
    call = f"<tool_call>{text}</tool_call>"
    get, put = tool("get", CITY), tool("put", CITY)
    accepts(Other(parser), call, tools=[get, put], tool_choice="get")
    accepts(Other(parser), call * 2, tools=[get, put], tool_choice="required")
    for wrong, choice in ((call * 2, "get"), (call, "put"), (call.replace("get", "gut"), "required"), ("hi", "required")):
        with pytest.raises(AssertionError):
            accepts(Other(parser), wrong, tools=[get, put], tool_choice=choice)
    with pytest.raises(Refused, match="strict is not supported"):
        accepts(Other(parser), call, tools=[tool("get", CITY, strict=True)], tool_choice="get")


def test_calls_in_a_form_that_nobody_knows_can_be_required_but_not_named() -> None:
    accepts(Other("longcat"), "<tool_call>anything</tool_call>", tools=TOOLS, tool_choice="required")
    with pytest.raises(Refused, match="cannot name a function"):
        accepts(Other("longcat"), "", tools=TOOLS, tool_choice="get_time")


# --- what is refused ---------------------------------------------------------------------------------------------------------------


def nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


def of_schema(**fields: Any) -> Format:
    return Format(kind="json_schema", source=json.dumps(fields))


def of_source(source: str) -> Format:
    return Format(kind="json_schema", source=source)


def of_regex(source: str) -> Format:
    return Format(kind="regex", source=source)


REFUSED: list[tuple[Format, str]] = [
    (of_schema(type="integer", multipleOf=999983), "multipleOf is over 10000"),
    (of_schema(type="number", multipleOf=1234.5678), "multipleOf is over 10000"),
    (of_schema(allOf=[{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]), "multipleOf is over 10000"),
    (of_schema(anyOf=[{"type": "integer", "multipleOf": 9000 + i} for i in range(20)]), "all of them together"),
    (of_schema(type="number", multipleOf=0), "the JSON schema cannot be used: invalid multiple of"),
    (of_source("[" * 5000 + "]" * 5000), "deeper than 32 levels"),
    (of_source(nested(33)), "deeper than 32 levels"),
    (of_source(nested(5000)), "deeper than 32 levels"),
    (of_source(nested(10_000)), "longer than 65536 bytes"),
    (of_source(json.dumps({"enum": ["a" * 70_000]})), "longer than 65536 bytes"),
    (of_source("{"), "the JSON schema is not JSON"),
    (of_source("9" * 5000), "the JSON schema is not JSON"),
    (of_source("[]"), "a JSON schema is an object"),
    (of_source("false"), "Unsatisfiable"),
    (of_source('{"const": "\\ud83d"}'), "cannot be used"),
    (of_schema(uniqueItems=True, type="array"), 'the JSON schema cannot be used: Unimplemented keys: ["uniqueItems"]'),
    (of_schema(**{"not": {}}), 'Unimplemented keys: ["not"]'),
    (of_schema(oneOf=[{"type": "integer"}, {"type": "number"}]), "oneOf constraints are not supported"),
    (of_schema(type="string", format="nonsense"), "Unknown format: nonsense"),
    (of_schema(type="strin"), "Invalid type: strin"),
    (of_schema(type="string", minLength=5, maxLength=3), "Unsatisfiable schema"),
    (of_schema(type="string", pattern="(?=a)b"), "look-around"),
    (of_schema(**{"$ref": "http://localhost:1/x"}), "cannot be used"),
    (of_schema(**{"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}), "no text at all can satisfy"),
    (of_schema(allOf=[{"anyOf": [{"minimum": i} for i in range(10)]} for _ in range(8)]), "schema too large"),
    (of_regex("{1,99999}"), "the regular expression cannot be used"),
    (of_regex("("), "unclosed group"),
    (of_regex("\\bfoo"), "the regular expression cannot be used"),
    (of_regex("(a)\\1"), "backreferences are not supported"),
    (of_regex("a[^\\s\\S]"), "no text at all can satisfy"),
    (of_regex(""), "it is empty"),
    (of_regex("a\\"), "ends within an escape"),
    (of_regex("a" * 1025), "longer than 1024 bytes"),
]
#: Strange, and allowed: they are compiled in no time, and each step costs what it may.
BORNE: list[Format] = [
    of_regex("foo**"),
    of_regex("(a+)+$"),
    of_regex("a{1,99999}"),
    of_regex("((a{1,100}){1,100}){1,100}"),
    of_regex(".*a.{40}b"),
    of_regex("(.*a.{15}b|.*c.{15}d){3}"),
    of_schema(type="string", minLength=10**9),
    of_schema(type="array", minItems=10**9),
    of_schema(type="object", properties={f"k{i}": {"type": "string", "pattern": f".*a.{{{i}}}b"} for i in range(50)}),
    of_source(nested(30)),
]


@pytest.mark.parametrize("rounds", [1, pytest.param(6, marks=pytest.mark.full)])
def test_hostile_schemas_are_refused_in_words_and_stop_nobody(engine: EngineProcess, wire: Wire, rounds: int) -> None:
    neighbour = wire.submit(messages=user("Tell me a long story about mlxd."), max_tokens=2000, sampling=hot(3, 3.0))
    for turn in range(rounds):
        refused = [wire.submit(messages=user("hi"), format=wanted, max_tokens=5) for wanted, _ in REFUSED]
        borne = [wire.submit(messages=user("hi"), format=wanted, sampling=hot(turn, 2.0), max_tokens=30) for wanted in BORNE]
        moved = len(wire.results[neighbour].ids)
        wire.finish([*refused, *borne])
        assert wire.results[neighbour].ended or len(wire.results[neighbour].ids) > moved
        for job, (wanted, words) in zip(refused, REFUSED, strict=True):
            failed = wire.results[job].failed
            assert failed is not None, wanted
            assert failed.status == 400
            assert words in failed.message, (wanted, failed)
        for job in borne:
            failed = wire.results[job].failed
            assert failed is None or failed.status == 400
    assert engine.process.poll() is None
    wire.cancel(neighbour)


def test_the_limit_on_multiples_is_on_what_they_make_together() -> None:
    def together(schema: Any) -> int:
        return digits(set(multiples_in(schema, "it", 32)))

    assert together([{"multipleOf": 0.01}, {"multipleOf": 1000}, {"multipleOf": 5}]) == 1000
    assert together([{"multipleOf": 0.01}, {"multipleOf": 0.25}]) == 25
    assert together([{"multipleOf": 9999.5}]) == 99995
    assert together([{"multipleOf": 1e-300}, {"multipleOf": True}, {"multipleOf": "x"}]) == 1


def test_an_error_is_told_without_the_grammar_that_the_client_did_not_write() -> None:
    lark = Lark()
    lark.rule("x", "the thing")
    assert lark.explain("at 2(8): failed to compile JSON schema: bad\n    luck\n   1 | start: x\n") == (
        "the thing cannot be used: bad\n    luck"
    )
    assert lark.explain("too much\n<state>...") == "the grammar of this request cannot be used: too much"
    assert functions(Submit(job=1, sampling=GREEDY, tools=[{"type": "function"}])) == {"": {}}


#: A minute's work.
SLOW = Format(kind="json_schema", source=json.dumps({"properties": {f"k{i}": {} for i in range(4500)}}))


def test_a_schema_that_compiles_for_ever_is_refused_and_a_second_one_replaces_the_engine(tmp_path: Path) -> None:
    settings = config.Config(engine=config.Engine(text_s=0.5))
    model = make_tiny_model(tmp_path / "m", config={"max_position_embeddings": 100_000})
    with EngineProcess(tmp_path / "e", settings) as process, process.load(model).connect() as wire:
        other = wire.submit(prompt_ids=[9] * 5, sampling=hot(1, 5.0), max_tokens=90_000)
        assert "compiling it took over 0.5 s" in refusal(wire, prompt="a", messages=None, format=SLOW)
        assert wire.ask(prompt="a", format=of_regex("[ab]{3}"), max_tokens=9).failed is None
        moved = len(wire.results[other].ids)
        wire.until(lambda: len(wire.results[other].ids) > moved)
        message = refusal(wire, prompt="a", messages=None, format=SLOW)
        bye = process.word(Bye)
        assert (bye.cause, bye.text) == ("deadline", message)
        assert process.wait() == 70
