"""An exchange: one HTTP request and its answer, over ASGI.

Owns reading the body within its limit, writing the answer, and noticing that the client has left. Knows no dialect.
Plain ASGI, since Starlette's StreamingResponse runs every stream in a task group of its own.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import mlxd
from mlxd.errors import Refused
from mlxd.guard import MAX_BODY_BYTES

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON = b"application/json"
VERSION = (b"x-mlxd-version", mlxd.__version__.encode())


class Exchange:
    """`headers` go out with the answer, whatever it is. `started`: its status is on the wire, `finished`: its last byte, too.
    `writing_since`: when the write in progress began, on the loop's clock; None when there is none."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self.scope = scope
        self.receive = receive
        self.send = send
        self.received_ns = time.monotonic_ns()
        self.headers: Headers = [(b"x-request-id", request_id(scope["headers"])), VERSION]
        self.started = False
        self.finished = False
        self.left = False
        self.interruption: Refused | None = None
        self.task: asyncio.Task[Any] | None = None
        self.writing_since: float | None = None
        self.clock = asyncio.get_running_loop().time

    def header(self, name: bytes) -> bytes:
        """The first header of that name, b"" without one."""
        return next((value for key, value in self.scope["headers"] if key == name), b"")

    def age_ns(self) -> int:
        return time.monotonic_ns() - self.received_ns

    # --- in -------------------------------------------------------------------------------------------------------------------

    async def body(self) -> bytearray:
        """The whole body. Raises Refused (413) as soon as it is too large, asyncio.CancelledError when the client left meanwhile."""
        body = bytearray()
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                self.left = True
                raise asyncio.CancelledError
            body += message["body"]
            if len(body) > MAX_BODY_BYTES:
                raise Refused(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
            if not message["more_body"]:
                return body

    async def while_connected(self, work: Awaitable[None]) -> None:
        """Await `work` unless the client leaves first (uvicorn speaks ASGI 2.3: `send` to one that left returns silently).
        Raises the Refused of `interrupt`."""
        self.task = asyncio.current_task()
        watcher = asyncio.create_task(self.watch())
        try:
            await work
        except asyncio.CancelledError:
            if self.interruption is not None and not self.left:
                raise self.interruption from None
            if not self.left:
                raise
        finally:
            watcher.cancel()
            self.task = None

    async def watch(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        if not self.finished:  # else it is uvicorn that says the exchange is over
            self.abandon()

    def abandon(self) -> None:
        """Nobody reads this answer: end the work on it."""
        if self.task is not None and not self.left:
            self.left = True
            self.task.cancel()

    def interrupt(self, why: Refused) -> None:
        """End the work; its client is told why."""
        if self.task is not None and not self.finished:
            self.interruption = why
            self.task.cancel()

    # --- out ------------------------------------------------------------------------------------------------------------------

    async def reply(self, status: int, body: bytes, content_type: bytes = JSON) -> None:
        """A whole answer."""
        self.headers += [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
        await self.start(status)
        await self.write(body, last=True)

    async def reply_empty(self) -> None:
        """204, which has neither type nor length."""
        await self.start(204)
        await self.write(b"", last=True)

    async def stream(self, content_type: bytes) -> None:
        """Begin an answer of unknown length."""
        self.headers += [(b"content-type", content_type), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self.start(200)

    async def start(self, status: int) -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": self.headers})
        self.started = True

    async def write(self, data: bytes, last: bool = False) -> None:
        """One network write. Waits while the client is behind with reading."""
        self.finished = last
        self.writing_since = self.clock()
        await self.send({"type": "http.response.body", "body": data, "more_body": not last})
        self.writing_since = None


def request_id(headers: Headers) -> bytes:
    """The client's own if it is sane, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and 0 < len(value) <= 128 and all(0x21 <= byte <= 0x7E for byte in value):
            return value
    return b"req_" + secrets.token_hex(12).encode()
