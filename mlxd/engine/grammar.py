"""Grammars: what the answer of a request must match, as a mask over the vocabulary at each of its tokens.

Owns llguidance: its tokenizer, the grammar of a request in its Lark dialect, and the matcher of each row. One grammar covers the answer
from its first token on: thinking, if the model thinks, then what the request asks for. Knows nothing of batches, jobs or MLX.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, hf, regex_to_lark

from mlxd.engine.text import Prompt
from mlxd.errors import Refused
from mlxd.messages import Format, Submit

log = logging.getLogger(__name__)

MOST_SCHEMA_BYTES = 64 * 1024
MOST_SCHEMA_DEPTH = 32
MOST_REGEX_BYTES = 1024
#: llguidance makes a state of each remainder: 99,991 take a second, 999,983 ten seconds and 400 MB.
MOST_MULTIPLE = 10_000

#: As json.dumps writes it, or without blanks. Where blanks are free a weak model writes nothing else: 1 document of 12 came to an end.
STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
#: For schemas that are advice: what llguidance does not know is passed over.
LENIENT = STYLE | {"lenient": True, "coerce_one_of": True}
#: 1 or 2 KB each, for one row; llguidance's own limit is 250,000.
LIMITS = LLParserLimits(max_lexer_states=20_000, verbose_errors=False)

#: What some models write after thinking, around a call and between two.
LINE_ENDS = r"/\n{0,2}/"

#: How a call begins that is not JSON, by the name of mlx-lm's parser.
OPENINGS = {
    "gemma4": "call:{}{{",
    "glm47": "{}\n",
    "minimax_m2": '\n<invoke name="{}">\n',
    "pythonic": "[{}(",
    "qwen3_coder": "\n<function={}>\n",
}


def is_constrained(submit: Submit) -> bool:
    """Whether some texts are no answer to this."""
    return submit.format is not None or submit.tool_choice != "auto" or any(map(is_strict, functions(submit).values()))


class Constraint:
    """What one row must match, and how far it is. `error`: why it can be held to it no longer, for the client."""

    def __init__(self, matcher: LLMatcher, consumed: int):
        self.matcher = matcher
        self.consumed = consumed
        self.error = ""

    def allowed(self, token: int, position: int, width: int) -> npt.NDArray[np.bool_]:
        """Which of `width` tokens may stand at `position` of the answer, all of them after an error; `token` stands before it. The token
        that a row's first step begins with is consumed already, or belongs to the prompt."""
        if not self.error:
            if position > self.consumed:
                self.consumed += 1
                self.matcher.consume_token(token)
            bits = self.matcher.compute_bitmask()
            if not self.matcher.is_error():
                return np.unpackbits(np.frombuffer(bits, np.uint8), count=width, bitorder="little").view(np.bool_)
            # The matcher would allow the end alone from now on, and the answer would look complete.
            self.error = f"the answer can be held to its grammar no longer: {first_line(self.matcher.get_error())}"
        return np.ones(width, np.bool_)


class Grammars:
    """What the answers of one model can be held to. `words`: its vocabulary; None: llguidance cannot read it."""

    words: LLTokenizer | None = None

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ends = sorted(tokenizer.eos_token_ids)
        parser = tokenizer.tool_parser
        self.parser = parser.__module__.rpartition(".")[2] if parser else None
        try:  # 5 ms for 512 words, 2 s and 186 MB for 150,000
            self.words = hf.from_tokenizer(tokenizer._tokenizer, eos_token=self.ends)
        except Exception as error:  # not a fast tokenizer, or of a kind that llguidance does not know: the model serves all else
            log.warning("no structured output: %s: %s", type(error).__name__, error)

    def compile(self, submit: Submit, prompt: Prompt) -> Constraint:
        """The constraint on the answer, after what is emitted of it. Raises Refused. May take for ever, mostly without the GIL."""
        if self.words is None:
            raise Refused(
                400, "this model supports no format, no forced and no strict tool calls: its tokenizer is of an unknown kind"
            )
        lark = Lark()
        thought, thinking = self.thinking(submit, prompt)
        matcher = LLMatcher(self.words, lark.text(f"{thinking} {self.body(submit, lark)}"), limits=LIMITS, log_level=0)
        if matcher.is_error():
            raise Refused(400, lark.explain(matcher.get_error()))
        probe = matcher.deep_copy()
        probe.consume_tokens(thought)
        probe.compute_bitmask()
        if probe.is_error() or (probe.is_stopped() and not probe.is_accepting()):
            raise Refused(400, "no text at all can satisfy the JSON schema or regular expression")
        if not matcher.consume_tokens(submit.emitted):
            raise Refused(500, f"the answer so far is not what was asked for: {first_line(matcher.get_error())}")
        return Constraint(matcher, len(submit.emitted))

    def raw(self, token: int) -> bytes:
        """What `token` writes: a part of a character, perhaps."""
        if self.words is None:
            return str(self.tokenizer.decode([token])).encode()
        return bytes(self.words.decode_bytes([token]))

    # --- the rules of an answer --------------------------------------------------------------------------------------

    def thinking(self, submit: Submit, prompt: Prompt) -> tuple[list[int], str]:
        """What comes before all else: the shortest thought, as tokens, and the rule."""
        t = self.tokenizer
        if not t.has_thinking or not (prompt.thinking or (submit.think is not False and self.may_begin_to_think)):
            return [], ""
        start, end = list(t.think_start_tokens), list(t.think_end_tokens)
        thought = f"{self.any_but(end)} {marker(end)} {LINE_ENDS}"
        return (end, thought) if prompt.thinking else (start + end, f"({marker(start)} {thought})?")

    @cached_property
    def may_begin_to_think(self) -> bool:
        """Whether thoughts begin in the answer, as Qwen3's do, and not in the prompt: allowed the mark where it wanted to write neither
        that nor JSON, a model of the other kind starts to ramble."""
        t = self.tokenizer
        asked = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        try:
            ids = t.encode(t.apply_chat_template([{"role": "user", "content": "Hi"}], **asked), add_special_tokens=False)
        except Exception:  # no template, or one that raises what it likes
            return True
        return bool(t.rfind_think_start(ids) <= t.rfind_think_end(ids))

    def body(self, submit: Submit, lark: Lark) -> str:
        known = functions(submit)
        choice = submit.tool_choice
        if choice == "required" and known:
            return self.calls(known, lark)
        if choice not in ("auto", "required"):
            if choice not in known:
                raise Refused(400, f"tool_choice names the function {choice!r}, and tools has none of that name")
            return self.call({choice: known[choice]}, lark, named=True)
        if choice == "required":
            raise Refused(400, 'tool_choice is "required", and there are no tools')
        if submit.format is not None:
            text = formatted(submit.format, lark)
            return f"({text} | {self.calls(known, lark)})" if known else text
        text = self.any_but(list(self.tokenizer.tool_call_start_tokens or ()))
        return f"{text} ({self.call(known, lark)} {text})*"

    def calls(self, known: dict[str, Function], lark: Lark) -> str:
        call = lark.rule(self.call(known, lark))
        return f"{call} ({LINE_ENDS} {call})*"

    def call(self, known: dict[str, Function], lark: Lark, *, named: bool = False) -> str:
        """One call of one of the functions, markers included. `named`: it must be this one, so that the model has no say in it."""
        t = self.tokenizer
        if not t.has_tool_calling:
            raise Refused(400, "this model does not support tools")
        start, end = list(t.tool_call_start_tokens), list(t.tool_call_end_tokens)
        if self.parser == "json_tools":
            any_of = " | ".join(lark.rule(json_call(name, known[name], lark)) for name in known)
            return f"{marker(start)} {LINE_ENDS} ({any_of}) {LINE_ENDS} {marker(end)}"
        if any(map(is_strict, known.values())):
            raise Refused(400, "strict is not supported with this model: the arguments in its tool calls are not JSON")
        opening = OPENINGS.get(self.parser or "")
        if named and opening is None:
            raise Refused(400, 'tool_choice can be "auto" or "required" with this model, but cannot name a function')
        begun = " | ".join(literal(opening.format(name)) for name in known) if opening else '""'
        return f"{marker(start)} ({begun}) {self.any_but(end)} {marker(end)}"

    def any_but(self, sequence: list[int]) -> str:
        """Any tokens but the one that `sequence` begins with, if it is not empty, and the end."""
        return f"<[^{','.join(map(str, [*sequence[:1], *self.ends]))}]>*"


OURS = "the grammar of this request"
SCHEMA = "the JSON schema"


# --- Lark --------------------------------------------------------------------------------------------------------------------


class Lark:
    """A grammar in the making. llguidance tells of an error on which line it is, so each rule has one."""

    def __init__(self) -> None:
        self.rules: list[str] = []
        self.subjects: list[str] = []

    def rule(self, body: str, subject: str = OURS) -> str:
        """The name of a new rule. `subject`: what an error in it is about, in words."""
        self.rules.append(body)
        self.subjects.append(subject)
        return f"r{len(self.rules)}"

    def text(self, start: str) -> str:
        return "\n".join([f"start: {start}", *(f"r{i}: {body}" for i, body in enumerate(self.rules, 1))])

    def explain(self, error: str) -> str:
        """llguidance's own words, after what they are about, and without a picture of the line: it is none that the client wrote."""
        subject = OURS
        if match := re.match(r"at (\d+)\(\d+\): (?:failed to compile JSON schema: )?", error):
            subject = [OURS, *self.subjects][int(match[1]) - 1]
            error = error[match.end() :]
        words = re.split(r"\n +\d+ \| |\n<", error)[0].strip()
        return f"{subject} cannot be used: {words}"


def marker(tokens: list[int]) -> str:
    return " ".join(f"<[{token}]>" for token in tokens)


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def first_line(error: str) -> str:
    return error.partition("\n")[0]


def formatted(wanted: Format, lark: Lark) -> str:
    if wanted.kind == "json":
        return lark.rule(json_rule({"type": "object"}, STYLE))
    if wanted.kind == "json_schema":
        return lark.rule(json_rule(read_schema(wanted.source), STYLE), SCHEMA)
    source = wanted.source
    if len(source.encode()) > MOST_REGEX_BYTES:
        raise Refused(400, f"the regular expression is longer than {MOST_REGEX_BYTES} bytes")
    # Lark has no empty one, and would take a last backslash for its own.
    if not source or (len(source) - len(source.rstrip("\\"))) % 2:
        raise Refused(400, "the regular expression cannot be used: it is empty, or ends within an escape")
    return lark.rule(f"/{regex_to_lark(source)}/", "the regular expression")


# --- functions -----------------------------------------------------------------------------------------------------------------

Function = dict[str, Any]


def functions(submit: Submit) -> dict[str, Function]:
    """The tools, by name."""
    described = [tool.get("function") or {} for tool in submit.tools or []]
    return {str(function.get("name", "")): function for function in described}


def is_strict(function: Function) -> bool:
    return function.get("strict") is True


def json_call(name: str, function: Function, lark: Lark) -> str:
    """The call as Qwen and Hermes write it. What a schema that is not strict asks for, and llguidance cannot do, is let pass."""
    subject = f"the parameters of the function {name!r}"
    parameters = check_schema(function.get("parameters") or {}, subject)
    rule = json_rule(parameters | {"type": "object"}, STYLE if is_strict(function) else LENIENT)
    arguments = lark.rule(rule, subject)
    head = literal('{"name": ' + literal(name) + ', "arguments": ')
    return f'{head} {arguments} "}}"'


# --- JSON schemas --------------------------------------------------------------------------------------------------------------


def json_rule(schema: dict[str, Any], style: dict[str, Any]) -> str:
    return f"%json {json.dumps(schema | {'x-guidance': style})}"


def read_schema(source: str) -> dict[str, Any]:
    if len(source.encode()) > MOST_SCHEMA_BYTES:
        raise Refused(400, f"{SCHEMA} is longer than {MOST_SCHEMA_BYTES} bytes")
    try:
        schema = json.loads(source)
    except RecursionError as error:
        raise too_deep(SCHEMA) from error
    except ValueError as error:
        raise Refused(400, f"{SCHEMA} is not JSON: {error}") from error
    return check_schema(schema, SCHEMA)


def check_schema(schema: Any, subject: str) -> dict[str, Any]:
    """Raises Refused for what llguidance would take too long over."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise Refused(400, f"{subject} cannot be used: a JSON schema is an object")
    multiples = {value for value in multiples_in(schema, subject, MOST_SCHEMA_DEPTH) if value > 0}
    if len(json.dumps(schema)) > MOST_SCHEMA_BYTES:
        raise Refused(400, f"{subject} is longer than {MOST_SCHEMA_BYTES} bytes")
    if multiples and digits(multiples) > MOST_MULTIPLE:
        raise Refused(400, f"{subject} cannot be used: multipleOf is over {MOST_MULTIPLE}, by itself or all of them together")
    return schema


def multiples_in(schema: Any, subject: str, depth: int) -> Iterator[Fraction]:
    """The value of every multipleOf, wherever it stands."""
    if depth < 0:
        raise too_deep(subject)
    if isinstance(schema, dict):
        multiple = schema.get("multipleOf")
        if isinstance(multiple, (int, float)) and not isinstance(multiple, bool) and math.isfinite(multiple):
            yield Fraction(str(multiple))
    children = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    for child in children:
        yield from multiples_in(child, subject, depth - 1)


def too_deep(subject: str) -> Refused:
    return Refused(400, f"{subject} is nested deeper than {MOST_SCHEMA_DEPTH} levels")


def digits(values: set[Fraction]) -> int:
    """The least common multiple of decimal numbers, written without its point: as many states llguidance makes of them, if they come to
    stand together, through allOf or any other way."""
    together = Fraction(math.lcm(*(v.numerator for v in values)), math.gcd(*(v.denominator for v in values)))
    scale = 1
    while together.denominator > 1 and (together * scale).denominator > 1:
        scale *= 10
    return int(together * scale)
