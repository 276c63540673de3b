"""The exit records: how the last 50 children ended, in memory and on disk."""

from __future__ import annotations

import contextlib
from collections import deque
from pathlib import Path

import msgspec

from mlxd import paths
from mlxd.messages import ExitRecord
from mlxd.papers import Papers

KEPT = 50
#: 50 records of 8 KB of words and a stack each.
MAX_FILE_BYTES = 4 * 1024 * 1024


class Exits:
    """Newest last."""

    def __init__(self, file: Path, papers: Papers):
        self.file = file
        self.papers = papers
        self.records = deque(read(file), maxlen=KEPT)

    @property
    def last(self) -> ExitRecord | None:
        return self.records[-1] if self.records else None

    def add(self, record: ExitRecord) -> None:
        self.records.append(record)
        self.papers.write(self.file, b"".join(msgspec.json.encode(r) + b"\n" for r in self.records))


def read(file: Path) -> list[ExitRecord]:
    """The records of earlier runs; lines that cannot be read are skipped."""
    found = []
    for text in (paths.read_small(file, MAX_FILE_BYTES) or b"").splitlines()[-KEPT:]:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            found.append(msgspec.json.decode(text, type=ExitRecord))
    return found
