"""Connections: HTTP below the requests. How long a client may take to ask and to read, and how many clients there may be.

Owns deadlines and caps of sockets; uvicorn's protocol, of which this is a subclass, owns the rest. Knows no route and no dialect.
No connection has a timer: all are looked at once a second.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlxd.config import Server

log = logging.getLogger(__name__)

#: More than these, and a client is not even heard. Well above what the app itself refuses, in JSON of its dialect.
MOST_OPEN = 1024
#: Descriptors that are no client's: listeners, link, log, engines, files.
OTHER_FILES = 64
#: What the kernel holds for a client that does not read (Linux doubles it; left to itself it takes 4 MiB): 64 KiB more wait here.
SEND_BUFFER_BYTES = 64 * 1024
#: A body that is late is answered by its request; this much later the connection goes, answered or not.
GRACE_S = 1.0

CROWDED = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: 32\r\n"
    b'retry-after: 1\r\nconnection: close\r\n\r\n{"error":"too many connections"}'
)


def room(files: int) -> tuple[int, int]:
    """With so many descriptors: connections, and how many to accept at a time.

    asyncio takes up to that many at once from each of two listeners, and three times that are under way between `accept` and
    `connection_made`, and a fourth between a refusal and its close. Without a descriptor left it writes megabytes of log a second.
    """
    free = max(16, files - OTHER_FILES)
    most = min(MOST_OPEN, free // 2)
    return most, max(1, min(MOST_OPEN, (free - most) // 8))


class Phase(enum.Enum):
    """What a connection waits for: the head of a request (also its first one), its body, the end of the answer, the next request."""

    HEAD = enum.auto()
    BODY = enum.auto()
    ANSWER = enum.auto()
    IDLE = enum.auto()


def phase(conn: h11.Connection, asked: bool) -> Phase:
    """`asked`: there was a request already."""
    if conn.their_state is h11.SEND_BODY:
        return Phase.BODY
    if conn.their_state is h11.IDLE:
        return Phase.IDLE if asked and not conn.trailing_data[0] else Phase.HEAD
    return Phase.ANSWER


class Connections:
    """All that are open. `idle`: those between two requests, the longest idle first."""

    def __init__(self, limits: Server, most: int):
        self.limits = limits
        self.most = most
        self.open: set[Connection] = set()
        self.idle: dict[Connection, None] = {}

    def __call__(self, **settings: Any) -> Connection:
        """A new one, as uvicorn wants to make it."""
        return Connection(self, **settings)

    def sweep(self) -> None:
        """Once a second."""
        for connection in list(self.open):
            connection.look()


class Connection(H11Protocol):
    """One client's. `since`: when the phase, of this request, began. `taken_at`: when the client was last seen to take what it asked
    for, or there was nothing to take. `unsent_bytes`: what waited for it then."""

    def __init__(self, others: Connections, **settings: Any):
        super().__init__(**settings)
        self.others = others
        self.place: tuple[Phase, object] = Phase.HEAD, None
        self.since = self.taken_at = self.loop.time()
        self.unsent_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.others.open) >= self.others.most:
            transport.set_protocol(asyncio.Protocol())  # nothing that comes is looked at
            transport.write(CROWDED)
            transport.close()
            return
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self.others.open.add(self)
        super().connection_made(transport)

    def handle_events(self) -> None:
        """After every chunk of a request, and after the answer to it."""
        super().handle_events()
        self.enter(phase(self.conn, asked=self.cycle is not None))

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            log.info("what came is no HTTP request  400", extra={"fields": {"status": 400}})
            super().send_400_response(msg)
        else:  # the request was answered before its body went wrong
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.others.open.discard(self)
        self.others.idle.pop(self, None)
        super().connection_lost(exc)
        # When the client broke the connection, uvicorn leaves this to run, and all hangs on it for two minutes.
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()

    def enter(self, phase: Phase) -> None:
        if self.place == (phase, self.cycle):
            return
        self.place = phase, self.cycle
        self.since = self.loop.time()
        idle = self.others.idle
        idle.pop(self, None)
        if phase is Phase.IDLE:
            idle[self] = None
            if len(idle) > self.others.limits.max_idle:
                longest = next(iter(idle))
                del idle[longest]
                longest.transport.close()

    def look(self) -> None:
        """End it if its client takes too long."""
        limits = self.others.limits
        now = self.loop.time()
        phase, _ = self.place
        if self.silent_s(now) > limits.write_stall_s:
            self.transport.abort()  # `close` would wait for the client to read
        elif phase is Phase.HEAD and now - self.since > limits.head_s:
            self.transport.close()
        elif phase is Phase.BODY and now - self.since > limits.body_s + GRACE_S:
            self.transport.abort()

    def silent_s(self, now: float) -> float:
        """For how long the client has taken nothing of what waits for it."""
        unsent_bytes = self.transport.get_write_buffer_size()
        growing = self.cycle is not None and not self.cycle.response_complete and not self.flow.write_paused
        if not unsent_bytes or growing or unsent_bytes < self.unsent_bytes:
            self.taken_at = now
        self.unsent_bytes = unsent_bytes
        return now - self.taken_at
