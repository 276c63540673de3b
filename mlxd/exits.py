"""The exit records: how the last 50 children ended, in memory and on disk; and how many ends there were of each kind."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from pathlib import Path
from typing import Any

import msgspec

from mlxd import paths
from mlxd.messages import MOST_FLIGHTS, Aboard, ExitRecord, Flight
from mlxd.papers import Papers

KEPT = 50
#: 50 records of 8 KB of words, a stack and flights each.
MAX_FILE_BYTES = 8 * 1024 * 1024
#: A server tells of an engine's end within so many records of it, and of so many engines before their end.
NEAR = 8
#: What a page or a terminal has room for.
SHOWN, SHOWN_TEXT, SHOWN_FLIGHTS = 10, 2000, 8


class Exits:
    """Newest last. `counts`: ends by kind of child and cause, since this supervisor started. `early`: what servers told of engines whose end
    is still to be seen, by pid."""

    def __init__(self, file: Path, papers: Papers):
        self.file = file
        self.papers = papers
        self.records = deque(read(file), maxlen=KEPT)
        self.counts: dict[str, Counter[str]] = {}
        self.early: dict[int, list[Flight]] = {}

    @property
    def last(self) -> ExitRecord | None:
        return self.records[-1] if self.records else None

    def add(self, record: ExitRecord) -> None:
        self.records.append(record)
        self.counts.setdefault(record.child, Counter())[record.cause] += 1
        if record.child == "engine":
            record.flights = self.early.pop(record.pid, [])
        self.write()

    def hear(self, word: Aboard) -> None:
        """A server has lost an engine: before its end is seen here, or soon after. There may be two servers."""
        for record in list(self.records)[-NEAR:]:
            if record.pid == word.pid and record.child == "engine":
                record.flights = (record.flights + word.flights)[:MOST_FLIGHTS]
                self.write()
                return
        self.early[word.pid] = (self.early.pop(word.pid, []) + word.flights)[-MOST_FLIGHTS:]
        if len(self.early) > NEAR:
            del self.early[next(iter(self.early))]

    def shown(self) -> list[dict[str, Any]]:
        """The newest ones that were not as they should be, newest first, each short enough to be told once a second: without its stack, with
        the end of its text."""
        newest = [record for record in reversed(self.records) if record.cause != "stopped"][:SHOWN]
        short = [
            msgspec.structs.replace(record, stack=None, text=record.text[-SHOWN_TEXT:], flights=record.flights[:SHOWN_FLIGHTS])
            for record in newest
        ]
        return [msgspec.to_builtins(record) for record in short]

    def write(self) -> None:
        self.papers.write(self.file, b"".join(msgspec.json.encode(r) + b"\n" for r in self.records))


def read(file: Path) -> list[ExitRecord]:
    """The records of earlier runs; lines that cannot be read are skipped."""
    found = []
    for text in (paths.read_small(file, MAX_FILE_BYTES) or b"").splitlines()[-KEPT:]:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            found.append(msgspec.json.decode(text, type=ExitRecord))
    return found
