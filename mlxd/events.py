"""The events: what happened to mlxd and its processes, one JSON object a line in `events.jsonl`. docs/events.md lists them.

Owns the file and its size: 10 MB, and one older one. One write(2) per event; the file is opened anew each time, so that it may be removed,
replaced, or on a full disk: what cannot be written is counted, and shows as a gap in `seq`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
from msgspec import Struct

from mlxd import paths
from mlxd.logs import printable, timestamp

MOST_BYTES = 10 * 1000 * 1000
#: Of a text: a child's last words may be in it.
MOST_TEXT = 2000
#: So much of the end of the file is looked at for the last number: several of the longest events.
TAIL_BYTES = 64 * 1024


class Event(Struct, kw_only=True):
    """`event`: in past tense. `child`: server, engine-1...; None: mlxd itself. `cause`: of an end, as in exit records. `text`: a sentence."""

    ts: str
    seq: int
    event: str
    child: str | None
    model: str | None
    pid: int | None
    cause: str | None
    text: str

    @property
    def line(self) -> bytes:
        return msgspec.json.encode(self) + b"\n"

    @property
    def fields(self) -> dict[str, object]:
        """Of its line in the log, beside time and text."""
        return {"event": self.event, "child": self.child, "model": self.model, "pid": self.pid, "cause": self.cause}


class Events:
    """`seq`: of the last event. `dropped`: how many could not be written since the last one that could, and why in `problem`."""

    def __init__(self, file: Path):
        self.file = file
        self.older = older(file)
        self.dropped = 0
        self.problem = ""
        self.seq = last_seq(file) or last_seq(self.older)

    def add(self, event: str, text: str, child: str | None, model: str | None, pid: int | None, cause: str | None) -> Event:
        self.seq += 1
        text = printable(text)
        text = text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + "..."
        told = Event(ts=timestamp(), seq=self.seq, event=event, child=child, model=model, pid=pid, cause=cause, text=text)
        try:
            self.make_room(len(told.line))
            paths.append(self.file, told.line)
            self.dropped, self.problem = 0, ""
        except OSError as error:
            self.dropped += 1
            self.problem = f"{self.file}: {error.strerror}"
        return told

    def make_room(self, size_bytes: int) -> None:
        """Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            if self.file.lstat().st_size + size_bytes > MOST_BYTES:
                self.file.replace(self.older)


def older(file: Path) -> Path:
    """Where the events go that have no room in `file` any more."""
    return file.with_name(file.name + ".1")


def last_seq(file: Path) -> int:
    """The number of the last event in the file; 0 without one. Lines that cannot be read are skipped."""
    for line in reversed(paths.read_end(file, TAIL_BYTES).splitlines()):
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            return msgspec.json.decode(line, type=Event).seq
    return 0
