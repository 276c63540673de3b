"""The text of one answer: tokens in, certain text out.

Owns what is held back: bytes of an unfinished character, what may become a stop string or a thinking tag, and whitespace that such a
tag may follow. Rebuilt at any position by feeding the same tokens again. Knows nothing of jobs or sockets.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

TextStateMachine = importlib.import_module("mlx_lm.generate").TextStateMachine


class Piece(NamedTuple):
    """Text that has become certain. `thinking`: it stood inside the model's thinking tags."""

    text: str
    thinking: bool


class Answer:
    """`stop`: strings that end the answer, themselves not part of it. `thinking`: the prompt ended inside the thinking tags.
    `continued`: the answer goes on with the prompt's text, so a space it begins with counts."""

    def __init__(self, tokenizer: Any, stop: list[str], *, thinking: bool = False, continued: bool = False):
        self.detokenizer = tokenizer.detokenizer
        if continued:  # mlx-lm's detokenizers drop a space at the beginning of what they are fed
            for token in tokenizer.encode("a", add_special_tokens=False):
                self.detokenizer.add_token(token)
            self.detokenizer.last_segment  # noqa: B018
        self.tagged: bool = tokenizer.has_thinking
        self.stop_string: str | None = None
        self.blank = ""  # whitespace that is dropped if a thinking tag follows
        self.begun = not thinking  # False: whitespace at the beginning of the present part is dropped
        self.part = "reasoning" if thinking else "normal"
        self.state: Any = None
        if stop or self.tagged:
            self.state = TextStateMachine(transitions(tokenizer, stop)).make_state(self.part)

    def feed(self, token: int) -> list[Piece]:
        """What `token` made certain, mostly one piece or none. Nothing is certain any more once `stop_string` is set."""
        self.detokenizer.add_token(token)
        return self.advance(self.detokenizer.last_segment)

    def finish(self) -> list[Piece]:
        """What was held back and is now the answer's end: the model stopped, or may say no more."""
        if self.stop_string is not None:
            return []
        self.detokenizer.finalize()
        pieces = self.advance(self.detokenizer.last_segment)
        if self.state is not None and self.stop_string is None:
            self.state, rest, _ = TextStateMachine.flush(self.state)
            pieces += self.settle(rest)
        if self.blank and self.part == "normal" and self.stop_string is None:
            pieces.append(Piece(self.blank, False))
        return pieces

    def advance(self, text: str) -> list[Piece]:
        if not text or self.stop_string is not None:
            return []
        if self.state is None:
            return [Piece(text, False)]
        self.state, segments = TextStateMachine.split(self.state, text)
        pieces = []
        for part, segment in segments:
            if isinstance(part, tuple):
                _, self.stop_string = part
                if self.blank and self.part == "normal":
                    pieces.append(Piece(self.blank, False))
                break
            if part != self.part:
                self.part, self.blank, self.begun = part, "", False
            pieces += self.settle(segment)
        return pieces

    def settle(self, text: str) -> list[Piece]:
        """`text` of the present part, without whitespace around the thinking tags."""
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


def transitions(tokenizer: Any, stop: list[str]) -> dict[Any, list[tuple[str, Any]]]:
    """mlx-lm's table of states. A stop string leads to a state of its own, so that its name is known; nothing leads out of it."""
    table: dict[Any, list[tuple[str, Any]]] = {"normal": []}
    if tokenizer.has_thinking:
        table["normal"].append((tokenizer.think_start, "reasoning"))
        table["reasoning"] = [(tokenizer.think_end, "normal")]
    for edges in table.values():
        edges += [(word, ("stop", word)) for word in stop if word]
    return table | {("stop", word): [] for word in stop}
