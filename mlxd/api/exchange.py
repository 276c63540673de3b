"""An exchange: one HTTP request and its answer, over ASGI.

Owns reading the body within its limit, writing the answer, and noticing that the client has left. Knows no dialect.
Plain ASGI, since Starlette's StreamingResponse runs every stream in a task group of its own.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, Protocol

import mlxd
from mlxd.errors import Refused
from mlxd.guard import MAX_BODY_BYTES
from mlxd.models import Model
from mlxd.tokens import Access
from mlxd.uploads import Uploads

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON = b"application/json"
VERSION = (b"x-mlxd-version", mlxd.__version__.encode())


class Filler(Protocol):
    """What a stream says when it has nothing to say."""

    stream_type: bytes

    def ping(self) -> bytes: ...


class Exchange:
    """`headers` go out with the answer, whatever it is. `started`: its status is on the wire, `finished`: its last byte, too.
    `writing_since`: when the write in progress began, `spoke_at`: the last one, on the loop's clock; None when there is none.
    `status`: of the answer, 0 before it. `model`, `prompt_tokens`, `completion_tokens`: for log and metrics, as far as they are known.
    `failed`: the answer had begun and ended with an error.
    `asked`: the body, if `keeps_body`, for as long as somebody else may have to answer it.
    `access`: what its sender may do. `filler`: None while the answer may still get a status of its own, or is no stream."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, uploads: Uploads):
        self.scope = scope
        self.receive = receive
        self.send = send
        self.uploads = uploads
        self.received_ns = time.monotonic_ns()
        self.request_id = request_id(scope["headers"]).decode()
        self.headers: Headers = [(b"x-request-id", self.request_id.encode()), VERSION]
        self.access = Access.NONE
        self.body_bytes = 0
        self.status = 0
        self.model: Model | None = None
        self.prompt_tokens = self.completion_tokens = 0
        self.failed = False
        self.keeps_body = False
        self.asked: bytearray | None = None
        self.started = False
        self.finished = False
        self.left = False
        self.interruption: Refused | None = None
        self.task: asyncio.Task[Any] | None = None
        self.filler: Filler | None = None
        self.writing_since: float | None = None
        self.clock = asyncio.get_running_loop().time
        self.spoke_at = self.clock()

    def header(self, name: bytes) -> bytes:
        """The first header of that name, b"" without one."""
        return next((value for key, value in self.scope["headers"] if key == name), b"")

    def age_ns(self) -> int:
        return time.monotonic_ns() - self.received_ns

    def set_header(self, name: bytes, value: bytes) -> None:
        """Of the answer, in place of an earlier one of that name."""
        self.headers = [header for header in self.headers if header[0] != name] + [(name, value)]

    # --- in -------------------------------------------------------------------------------------------------------------------

    async def body(self) -> bytearray:
        """The whole body. Raises Refused (408, 413, 503) as soon as it is too late, too large or too much beside others,
        asyncio.CancelledError when the client left meanwhile."""
        body = bytearray()
        held_bytes = 0
        try:
            async with asyncio.timeout(self.uploads.most_s):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        self.left = True
                        raise asyncio.CancelledError
                    body += message["body"]
                    if len(body) > MAX_BODY_BYTES:
                        raise Refused(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
                    held_bytes = self.uploads.hold(held_bytes, len(body))
                    if not message["more_body"]:
                        self.body_bytes = len(body)
                        self.asked = body if self.keeps_body else None
                        return body
        except TimeoutError:
            self.headers.append((b"connection", b"close"))
            raise Refused(408, f"the body did not arrive within {self.uploads.most_s:g} s") from None
        finally:
            self.uploads.held_bytes -= held_bytes

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
        await self.start(status, [(b"content-type", content_type), (b"content-length", str(len(body)).encode())])
        await self.write(body, last=True)

    async def reply_empty(self) -> None:
        """204, which has neither type nor length."""
        await self.start(204, [])
        await self.write(b"", last=True)

    async def stream(self, content_type: bytes) -> None:
        """Begin an answer of unknown length."""
        await self.start(200, [(b"content-type", content_type), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")])

    async def start(self, status: int, headers: Headers) -> None:
        self.asked = None
        self.writing_since = self.clock()
        try:
            await self.send({"type": "http.response.start", "status": status, "headers": self.headers + headers})
        finally:
            self.writing_since = None
        self.status, self.started = status, True

    async def write(self, data: bytes, last: bool = False) -> None:
        """One network write. Waits while the client is behind with reading."""
        self.finished = last
        self.spoke_at = self.writing_since = self.clock()
        try:
            await self.send({"type": "http.response.body", "body": data, "more_body": not last})
        finally:
            self.writing_since = None

    def fill(self, silent_s: float) -> None:
        """Write the filler if nothing was written for so long. At once or not at all, so it never comes between other writes."""
        if self.filler is None or self.interruption or self.left or self.finished or self.writing_since is not None:
            return
        if self.clock() - self.spoke_at < silent_s:
            return
        try:
            if self.started or at_once(self.stream(self.filler.stream_type)):
                at_once(self.write(self.filler.ping()))
        except Exception:  # uvicorn has answered in our place, and closes; what ends the sweep would end the server
            self.abandon()


def at_once(work: Coroutine[Any, Any, None]) -> bool:
    """Do it without waiting; False: it would have had to wait (uvicorn does, before it writes, for a client that is behind)."""
    try:
        work.send(None)
    except StopIteration:
        return True
    work.close()
    return False


def request_id(headers: Headers) -> bytes:
    """The client's own if it is sane, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and 0 < len(value) <= 128 and all(0x21 <= byte <= 0x7E for byte in value):
            return value
    return b"req_" + secrets.token_hex(12).encode()
