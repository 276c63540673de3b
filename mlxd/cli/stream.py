"""An answer of the server's that goes on while somebody watches: its lines as they come, and a word each time that none does.

HTTP/1.0, as `probe` speaks it. Knows nobody's answers, and shows nothing.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from mlxd import probe
from mlxd.cli.store import Server
from mlxd.errors import MlxdError, Refused

#: The server says something at least every `server.ping_s`, and the supervisor replaces one that is silent for less.
SILENT_S = 120.0
CONNECT_S = 10.0
#: Of a refusal.
MOST_BYTES = 64 * 1024


class Broken(MlxdError):
    """Nobody answered, or not to the end: the server was replaced or killed."""


class Stream:
    """One request, sent. `headers`: names in lower case; {} before the first line."""

    def __init__(self, server: Server, path: str, body: Any = None):
        """GET, or POST of `body`. Raises Broken."""
        self.headers: dict[str, str] = {}
        parts = urlsplit(server.url)
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{'POST' if data else 'GET'} {path} HTTP/1.0\r\nHost: {parts.netloc}\r\nContent-Length: {len(data)}\r\n"
        head += "Content-Type: application/json\r\n" if data else ""
        head += f"Authorization: Bearer {server.token}\r\n" if server.token else ""
        try:
            self.sock = socket.create_connection((parts.hostname or "", probe.port_of(server.url)), timeout=CONNECT_S)
        except OSError as error:
            raise Broken(f"mlxd at {server.url} cannot be reached: {error.strerror or error}; look at `mlxd status`") from error
        try:
            self.sock.sendall(head.encode() + b"\r\n" + data)
        except OSError:  # it may have answered before it had heard all
            pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.sock.close()

    def lines(self, tick_s: float) -> Iterator[str | None]:
        """Each without its end; None when nothing has come for `tick_s`. Raises Refused, with the server's own words, if it says no, and
        Broken when it breaks off; what a whole answer ends with is for the caller to know."""
        rest = b""
        begun = False
        for data in self.pieces(tick_s):
            rest += data or b""
            if not begun and (begun := self.begins(rest)):
                rest = rest.partition(b"\r\n\r\n")[2]
            if begun:
                *whole, rest = rest.split(b"\n")
                yield from (line.rstrip(b"\r").decode(errors="replace") for line in whole)
            if data is None:
                yield None
        if not begun:
            raise refusal(rest)

    def pieces(self, tick_s: float) -> Iterator[bytes | None]:
        """Bytes as they come, up to the end of the connection. Raises Broken."""
        heard_at = time.monotonic()
        while True:
            if not select.select([self.sock], [], [], tick_s)[0]:
                if time.monotonic() > heard_at + SILENT_S:
                    raise Broken(f"mlxd has said nothing for {SILENT_S:.0f} s; look at `mlxd status`")
                yield None
                continue
            try:
                data = self.sock.recv(65536)
            except OSError as error:
                raise Broken("the server ended before its answer did") from error
            if not data:
                return
            heard_at = time.monotonic()
            yield data

    def begins(self, data: bytes) -> bool:
        """Whether the head is there, and of an answer rather than a refusal."""
        if b"\r\n\r\n" not in data:
            return False
        try:
            reply = probe.parse(data, 0.0, 0)
        except probe.NoReply:  # `refusal` says so
            return False
        self.headers = reply.headers
        return reply.status == 200


def refusal(data: bytes) -> MlxdError:
    """What the server said instead of an answer: in Ollama's shape, or in OpenAI's."""
    try:
        reply = probe.parse(data, 0.0, MOST_BYTES)
    except probe.NoReply:
        return Broken("the server ended before it answered")
    return Refused(reply.status, words_of(reply.json) or f"mlxd answers {reply.status}")


def words_of(told: dict[str, Any]) -> str:
    """The sentence of an error; "" where there is none."""
    error = told.get("error")
    return str(error.get("message") or "") if isinstance(error, dict) else str(error or "")
