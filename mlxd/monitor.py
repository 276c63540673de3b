"""The eyes: the health poll, the watched files, the sleep of the machine. It reports and never acts; the supervisor decides.

Beats come over the links and memory is read at the tick, both in the supervisor's loop; what they mean is in `policy`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

BODY_BYTES = 64 * 1024
#: An editor writes a file in several steps.
DEBOUNCE_S = 0.5
#: The two clocks differ by this much only after a sleep.
SLEEP_GAP_S = 2.0


class Answer(Enum):
    """What a poll of /health found."""

    OURS = "ours"  # any status, with our nonce
    MISSING = "missing"  # no answer in time, or none that can be read
    STRANGER = "stranger"  # an answer without our nonce


async def poll(host: str, port: int, nonce: str, limit_s: float) -> Answer:
    """One `GET /health` with one deadline for all of it: a stopped process still accepts a connection within 3 ms. Redirects are not
    followed, at most BODY_BYTES are read."""
    writer = None
    try:
        async with asyncio.timeout(limit_s):
            reader, writer = await asyncio.open_connection(host, port)
            name = f"[{host}]" if ":" in host else host
            writer.write(f"GET /health HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n".encode())
            data = b""
            while len(data) < BODY_BYTES and (more := await reader.read(BODY_BYTES)):
                data += more
    except (OSError, TimeoutError):
        return Answer.MISSING
    finally:
        if writer is not None:
            writer.transport.abort()
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1."):
        return Answer.MISSING if not data else Answer.STRANGER
    try:
        return Answer.OURS if json.loads(body)["nonce"] == nonce else Answer.STRANGER
    except (ValueError, KeyError, TypeError, RecursionError):
        return Answer.STRANGER


class Files:
    """Watches named files, by their directories, non-recursively; `changed(names)` is called in the loop, debounced.

    An observer thread sleeps in the kernel until a directory changes; nothing is polled.
    """

    def __init__(self, files: list[Path], changed: Callable[[set[Path]], None]):
        # FSEvents tells real paths, whatever was asked for; /tmp and /var are links on macOS.
        self.files = {Path(os.path.realpath(file.parent)) / file.name: file for file in files}
        self.changed = changed
        self.loop = asyncio.get_running_loop()
        self.pending: set[Path] = set()
        self.timer: asyncio.TimerHandle | None = None
        self.observer = Observer()
        handler = Handler(self)
        for directory in {file.parent for file in self.files}:
            self.observer.schedule(handler, str(directory), recursive=False)

    def start(self) -> None:
        """Raises OSError when the system has no watches left (Linux: fs.inotify.max_user_watches)."""
        self.observer.start()

    def stop(self) -> None:
        self.observer.stop()

    def touched(self, path: Path) -> None:
        """In the loop: something happened to one of our files."""
        self.pending.add(path)
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.loop.call_later(DEBOUNCE_S, self.report)

    def report(self) -> None:
        pending, self.pending, self.timer = self.pending, set(), None
        self.changed(pending)


class Handler(FileSystemEventHandler):
    """In the observer's thread: pick out the names that matter."""

    def __init__(self, files: Files):
        self.watcher = files

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type in ("opened", "closed_no_write"):  # reading is not a change
            return
        for name in (event.src_path, event.dest_path):
            path = Path(str(name)) if name else None
            if path in self.watcher.files and threading.main_thread().is_alive():
                self.watcher.loop.call_soon_threadsafe(self.watcher.touched, self.watcher.files[path])


def slept(before: tuple[float, float], now: tuple[float, float]) -> float:
    """Seconds that the machine slept between two readings of `clocks()`; 0.0 if it did not."""
    gap = (now[1] - before[1]) - (now[0] - before[0])
    return gap if gap > SLEEP_GAP_S else 0.0


def clocks() -> tuple[float, float]:
    """A clock that stops while the machine sleeps, and one that goes on."""
    with_sleep = time.CLOCK_MONOTONIC_RAW if sys.platform == "darwin" else time.CLOCK_BOOTTIME
    return time.monotonic(), time.clock_gettime(with_sleep)
