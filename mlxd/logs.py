"""Log lines: their form, text for people or JSON for machines, and their way into a file. Every process of mlxd writes them through here.

A line is one write(2) to the end of a regular file, some 10 us: no thread and no queue, so that what a process said last is there when it
dies. A line that cannot be written is counted and forgotten. Knows no file's name and no limit: the supervisor cuts what grows too long.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

Write = Callable[[bytes], object]

#: The request that the running task or thread is about; "" for none. In every line that is written meanwhile.
request_id: ContextVar[str] = ContextVar("request_id", default="")


class Lines(logging.Handler):
    """`write` takes one line, and raises OSError when it cannot. `dropped`: lines since the last one that it took."""

    def __init__(self, write: Write, form: logging.Formatter):
        super().__init__()
        self.write = write
        self.dropped = 0
        self.setFormatter(form)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.line(record)
            if self.dropped:
                lost = f"{self.dropped} lines before this one could not be written"
                line = self.line(logging.makeLogRecord({"levelname": "WARNING", "msg": lost})) + line
            self.write(line)
            self.dropped = 0
        except OSError:  # a full disk, a directory in the file's place: no reason to stop serving
            self.dropped += 1
        except Exception:
            self.handleError(record)

    def line(self, record: logging.LogRecord) -> bytes:
        return self.format(record).encode(errors="replace") + b"\n"


class Text(logging.Formatter):
    """Time, what happened, the request. Only a stack has more than one line."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"{timestamp(record.created)}  {printable(record.getMessage())}"
        if request := request_of(record):
            text += f"  {request}"
        return f"{text}\n{stack(record)}" if record.exc_info else text


class Json(logging.Formatter):
    """One object a line, in ASCII: `ts`, `level`, `text`, then what the line's `fields` hold, `request_id` and `stack` where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"ts": timestamp(record.created), "level": record.levelname.lower(), "text": record.getMessage()}
        line |= getattr(record, "fields", {})
        if request := request_of(record):
            line["request_id"] = request
        if record.exc_info:
            line["stack"] = stack(record)
        return json.dumps(line)


FORMS: dict[str, type[logging.Formatter]] = {"text": Text, "json": Json}


def begin(form: str, *writers: Write) -> None:
    """From now on what this process logs goes to `writers`; without any, to its stderr."""
    logging.raiseExceptions = False
    handlers = [Lines(write, FORMS[form]()) for write in writers or (to_stderr,)]
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    logging.getLogger("mlxd").setLevel(logging.INFO)


def to_stderr(line: bytes) -> None:
    """Not through sys.stderr, which keeps what it could not write. Raises OSError."""
    if os.write(2, line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def request_of(record: logging.LogRecord) -> str:
    return getattr(record, "request_id", None) or request_id.get()


def stack(record: logging.LogRecord) -> str:
    """Where the exception came from, and its kind. Its words are left out: they may quote a request."""
    assert isinstance(record.exc_info, tuple)
    kind, _, trace = record.exc_info
    name = kind.__qualname__ if kind else None
    return "Traceback (most recent call last):\n" + "".join(traceback.format_tb(trace)) + f"{name}"


def words_of(error: BaseException) -> str:
    """Its kind, and its words if they are MLX's or the system's and tell the cause; those of others may quote a request."""
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, (RuntimeError, MemoryError, OSError, ImportError)) else name


def printable(text: str) -> str:
    """What cannot be seen is escaped: nobody's text may drive the reader's terminal, or look like two lines."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def timestamp(seconds: float | None = None) -> str:
    """A time since the epoch, None for now, on paper: RFC 3339 in UTC, microseconds."""
    at = time.time() if seconds is None else seconds
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1e6):06d}Z"
