"""One answer: tokens in; certain text, and calls of tools, out.

Owns what is held back: bytes of an unfinished character, what may become a stop string or a tag, whitespace that a tag may follow, and
a call until its end. Rebuilt at any position by feeding the same tokens again. Knows nothing of jobs or sockets.
"""

from __future__ import annotations

import importlib
import json
import logging
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

TextStateMachine = importlib.import_module("mlx_lm.generate").TextStateMachine


class Piece(NamedTuple):
    """Text that has become certain. `thinking`: it stood inside the model's thinking tags."""

    text: str
    thinking: bool


class Called(NamedTuple):
    """A call of a tool. `arguments`: a JSON object as text."""

    name: str
    arguments: str


class Answer:
    """`stop`: strings that end the answer, themselves not part of it; inside a call they mean nothing. `thinking`: the prompt ended inside the
    thinking tags. `continued`: the answer goes on with the prompt's text, so a space it begins with counts. `tools`: what may be called;
    without any, nothing is taken for a call. `request_id`: for the log."""

    def __init__(
        self,
        tokenizer: Any,
        stop: list[str],
        *,
        thinking: bool = False,
        continued: bool = False,
        tools: list[dict[str, Any]] | None = None,
        request_id: str = "",
    ):
        self.request_id = request_id
        self.tokenizer = tokenizer
        self.tools = tools if tokenizer.has_tool_calling else None
        self.detokenizer = tokenizer.detokenizer
        if continued:  # mlx-lm's detokenizers drop a space at the beginning of what they are fed
            for token in tokenizer.encode("a", add_special_tokens=False):
                self.detokenizer.add_token(token)
            self.detokenizer.last_segment  # noqa: B018
        self.tagged = bool(tokenizer.has_thinking or self.tools)
        self.stop_string: str | None = None
        self.blank = ""  # whitespace that is dropped if a tag follows
        self.begun = not thinking  # False: whitespace at the beginning of the present part is dropped
        self.part = "reasoning" if thinking else tokenizer.response_initial_state or "normal"
        self.call: list[str] = []  # what stands between the tags of the call that has begun
        self.state: Any = None
        if table := transitions(tokenizer, stop, calling=bool(self.tools)):
            self.state = TextStateMachine(table).make_state(self.part)

    def feed(self, token: int) -> list[Piece | Called]:
        """What `token` made certain, mostly one piece or none. Nothing is certain any more once `stop_string` is set."""
        self.detokenizer.add_token(token)
        return self.advance(self.detokenizer.last_segment)

    def finish(self, cut: bool = False) -> list[Piece | Called]:
        """What was held back and is now the answer's end: the model stopped, or (`cut`) may say no more: a call that is cut is none."""
        if self.stop_string is not None:
            return []
        self.detokenizer.finalize()
        pieces = self.advance(self.detokenizer.last_segment)
        if self.state is not None and self.stop_string is None:
            self.state, rest, _ = TextStateMachine.flush(self.state)
            pieces += self.settle(rest)
        if self.part == "tool":
            return pieces if cut else pieces + self.end_call(closed=False)
        if self.blank and self.part == "normal" and self.stop_string is None:
            pieces.append(Piece(self.blank, False))
        return pieces

    def advance(self, text: str) -> list[Piece | Called]:
        if not text or self.stop_string is not None:
            return []
        if self.state is None:
            return [Piece(text, False)]
        self.state, segments = TextStateMachine.split(self.state, text)
        pieces: list[Piece | Called] = []
        for part, segment in segments:
            if isinstance(part, tuple):
                _, self.stop_string = part
                if self.blank and self.part == "normal":
                    pieces.append(Piece(self.blank, False))
                break
            if part != self.part:
                if self.part == "tool":
                    pieces += self.end_call(closed=True)
                self.part, self.blank, self.begun = part, "", False
            pieces += self.settle(segment)
        return pieces

    def settle(self, text: str) -> list[Piece | Called]:
        """`text` of the present part, without whitespace around tags."""
        if self.part == "tool":
            self.call.append(text)
            return []
        if self.tagged:
            if not self.begun:
                text = text.lstrip()
            kept = text.rstrip()
            if not kept:
                self.blank += text
                return []
            self.begun = True
            text, self.blank = self.blank + kept, text[len(kept) :]
        return [Piece(text, self.part == "reasoning")] if text else []

    def end_call(self, closed: bool) -> list[Piece | Called]:
        """The calls that a call's text means; what means none is text of the answer like any other."""
        text, self.call = "".join(self.call), []
        try:
            return list(calls(self.tokenizer.tool_parser(text, self.tools)))
        except Exception as error:  # mlx-lm's parsers raise what they like: ValueError, AttributeError, SyntaxError
            log.info("what the model called cannot be read: %s", type(error).__name__, extra={"request_id": self.request_id})
            end = self.tokenizer.tool_call_end if closed else ""
            return [Piece(self.tokenizer.tool_call_start + text + end, False)]


def calls(parsed: Any) -> list[Called]:
    """What a parser of mlx-lm found, one call or several. Raises ValueError or TypeError on what is none: some parsers accept anything."""
    found = parsed if isinstance(parsed, list) else [parsed]
    result = []
    for one in found:
        name, arguments = one["name"], one.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            raise ValueError(f"not a call: {one!r}")
        result.append(Called(sendable(name), sendable(json.dumps(arguments, ensure_ascii=False, allow_nan=False))))
    if not result:
        raise ValueError("no call")
    return result


def sendable(text: str) -> str:
    """Half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def transitions(tokenizer: Any, stop: list[str], calling: bool) -> dict[Any, list[tuple[str, Any]]]:
    """mlx-lm's table of states, as its make_text_state_machine has it, with calls when `calling`; {} when there is nothing to look for.
    A stop string leads to a state of its own, so that its name is known; nothing leads out of it."""
    table: dict[Any, list[tuple[str, Any]]] = {"normal": [(mark, "normal") for mark in tokenizer.structural_markers]}
    if tokenizer.has_thinking:
        table["normal"].append((tokenizer.think_start, "reasoning"))
        table["reasoning"] = [(tokenizer.think_end, "normal")]
    for state, edges in tokenizer.response_transitions.items():
        table.setdefault(state, []).extend(edge for edge in edges if calling or edge[1] != "tool")
    if calling:
        if not any(part == "tool" for edges in table.values() for _, part in edges):
            table["normal"].append((tokenizer.tool_call_start, "tool"))
        if tokenizer.has_thinking:
            table["reasoning"].append((tokenizer.tool_call_start, "tool"))
    for edges in table.values():
        edges += [(word, ("stop", word)) for word in stop if word]
    if not any(table.values()):
        return {}
    if calling:
        table["tool"] = [(tokenizer.tool_call_end, "normal")] if tokenizer.tool_call_end else []
    return table | {("stop", word): [] for word in stop}
