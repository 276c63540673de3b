"""The store: answers that later requests may refer to, in the server's memory.

Owns how many there may be and how large. Knows no dialect: what it keeps are bytes.
"""

from __future__ import annotations

from typing import NamedTuple

MOST = 1024
MOST_BYTES = 64 * 1024 * 1024


class Kept(NamedTuple):
    """An answer as its client got it, and the conversation up to its end."""

    answer: bytes
    conversation: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.answer) + len(self.conversation)


class Store:
    """By id. What has not been used for longest goes first."""

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES):
        self.most = most
        self.most_bytes = most_bytes
        self.size_bytes = 0
        self.kept: dict[str, Kept] = {}

    def put(self, id: str, kept: Kept) -> None:
        self.drop(id)
        self.kept[id] = kept
        self.size_bytes += kept.size_bytes
        while len(self.kept) > self.most or self.size_bytes > self.most_bytes:
            self.drop(next(iter(self.kept)))

    def get(self, id: str) -> Kept | None:
        kept = self.kept.pop(id, None)
        if kept is not None:
            self.kept[id] = kept  # now the last to go
        return kept

    def drop(self, id: str) -> bool:
        """Whether it was there."""
        kept = self.kept.pop(id, None)
        if kept is not None:
            self.size_bytes -= kept.size_bytes
        return kept is not None
