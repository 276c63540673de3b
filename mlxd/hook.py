"""The event command, `events.on_event`: started for each event, the event as one line of JSON on its stdin.

Owns the queue before it. One runs at a time, in a process group of its own that is killed when it has ended or its time is over; what it
says is discarded. The supervisor reaps it, and waits for nothing here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import subprocess
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from mlxd import child, config
from mlxd.events import Event

log = logging.getLogger(__name__)

#: So many events wait for it; one more is not told.
MOST_WAITING = 16
#: What is told of a stop has so long to be heard.
FAREWELL_S = 2.0
#: What a notifier needs of our environment beside what a child gets: the way to the screen, and to this mlxd.
ENVIRONMENT = ("DISPLAY", "WAYLAND_DISPLAY", "XAUTHORITY", "DBUS_SESSION_BUS_ADDRESS", "MLXD_HOME")

Outcome = Callable[[int, float], Awaitable[int | None]]
Keep = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Hook:
    """`settings` tells the section in force, `outcome` the exit status of a process after at most so many seconds. `dropped`: events that found
    the queue full."""

    def __init__(self, settings: Callable[[], config.Events], outcome: Outcome, keep: Keep):
        self.settings = settings
        self.outcome = outcome
        self.keep = keep
        self.waiting: deque[Event] = deque()
        self.dropped = 0
        self.paused = False
        self.task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        return self.task is not None and not self.task.done()

    def tell(self, event: Event) -> None:
        if not self.settings().on_event:
            return
        if len(self.waiting) < MOST_WAITING:
            self.waiting.append(event)
        else:
            self.dropped += 1
        self.begin()

    def pause(self) -> None:
        """The one that runs goes on; the others wait."""
        self.paused = True

    def go_on(self) -> None:
        self.paused = False
        self.begin()

    def begin(self) -> None:
        if self.waiting and not self.paused and not self.busy:
            self.task = self.keep(self.run())

    async def run(self) -> None:
        while self.waiting and not self.paused:
            await self.once(self.waiting.popleft())
            if self.dropped and not self.waiting:
                log.warning("events.on_event was too slow for %d events: they are in events.jsonl only", self.dropped)
                self.dropped = 0

    async def once(self, event: Event) -> None:
        settings = self.settings()
        argv = shlex.split(settings.on_event)
        if not argv:  # there was one when this event came
            return
        try:
            pid = spawn(argv, event)
        except (OSError, ValueError) as error:  # no such program; a NUL in its name
            log.warning("events.on_event cannot be started: %s", error)
            return
        status = await self.outcome(pid, settings.limit_s)
        if status is None:
            log.warning("events.on_event was killed: it took longer than %g s", settings.limit_s)
        elif status:
            log.warning("events.on_event ended with status %d", status)

    async def finish(self) -> None:
        """The end of mlxd: what is late is cut."""
        if self.task is not None:
            await asyncio.wait([self.task], timeout=FAREWELL_S)
            self.task.cancel()
            await asyncio.wait([self.task])


def spawn(argv: list[str], event: Event) -> int:
    """The pid. Raises OSError, or ValueError for what can be no command."""
    told = {
        "MLXD_EVENT": event.event,
        "MLXD_EVENT_CHILD": event.child,
        "MLXD_EVENT_CAUSE": event.cause,
        "MLXD_EVENT_TEXT": event.text,
    }
    reader, writer = os.pipe()
    with open(reader, "rb") as stdin:
        os.set_blocking(writer, False)  # a pipe has room for a line: 8 KiB where there are very many of them
        with open(writer, "wb", buffering=0) as into:
            into.write(event.line)
        process = subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=child.child_environment(os.environ)
            | {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
            | {name: value or "" for name, value in told.items()},
            start_new_session=True,
        )
    process.returncode = 0  # the loop reaps it
    return process.pid
