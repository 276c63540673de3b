"""One question over HTTP from outside: one deadline for all of it, a bounded answer, no redirect followed, no proxy asked.

Standard library only, and little of that: `mlxd status` and programs that import `mlxd.endpoint` pay for it. Knows nobody's answers.
"""

from __future__ import annotations

import json
import re
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

BODY_BYTES = 64 * 1024
HEAD_BYTES = 16 * 1024


@dataclass(frozen=True)
class Reply:
    """`headers`: names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    @property
    def json(self) -> dict[str, Any]:
        """The body as a JSON object; {} when it is none."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


WELL = ("ready", "degraded", "up")


@dataclass(frozen=True)
class Look:
    """What was found of a service. `state`: a word of WELL, what a restart may mend (`recovery.MENDABLE`), `stranger`, or the supervisor's own.
    `seconds`: the answer took; None without one. `supervised`: the supervisor answers, and repairs. `advice`: where no owner can help."""

    state: str
    reason: str = ""
    seconds: float | None = None
    supervised: bool = False
    advice: str = ""
    version: str | None = None
    models: list[str] = field(default_factory=list)
    memory_bytes: int | None = None

    @property
    def well(self) -> bool:
        return self.state in WELL


class NoReply(Exception):
    """`how`: nobody listens (`down`), it accepts and does not answer in time (`hung`), it ends the connection or speaks no HTTP (`garbled`)."""

    def __init__(self, how: Literal["down", "hung", "garbled"], text: str):
        super().__init__(text)
        self.how = how


def fetch(
    url: str, limit_s: float, body: bytes | None = None, *, method: str = "", token: str = "", most_bytes: int = BODY_BYTES
) -> Reply:
    """GET, or POST of a JSON `body`, unless `method` is another. `most_bytes`: of the answer's body. Raises NoReply."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    start = time.monotonic()
    try:
        sock = socket.create_connection((parts.hostname, port_of(url)), timeout=limit_s)
    except TimeoutError as error:
        raise NoReply("hung", f"no connection within {limit_s:g} s") from error
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name that no resolver takes
        raise NoReply("down", getattr(error, "strerror", None) or str(error)) from error
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    # HTTP/1.0: the answer has no chunks and ends with the connection.
    method = method or ("GET" if body is None else "POST")
    head = f"{method} {path} HTTP/1.0\r\nHost: {parts.netloc}\r\nAccept: */*\r\nConnection: close\r\n"
    if token:
        head += f"Authorization: Bearer {token}\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    try:
        if parts.scheme == "https":
            import ssl

            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=parts.hostname)
        sock.sendall(head.encode() + b"\r\n" + (body or b""))
        data = receive(sock, start + limit_s, HEAD_BYTES + most_bytes)
    except TimeoutError as error:
        raise NoReply("hung", f"it accepts connections and has not answered within {limit_s:g} s") from error
    except OSError as error:
        raise NoReply("garbled", f"it broke the connection: {error.strerror or error}") from error
    finally:
        sock.close()
    return parse(data, time.monotonic() - start, most_bytes)


def is_local(url: str) -> bool:
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def port_of(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


def receive(sock: socket.socket, end: float, most_bytes: int) -> bytes:
    """Everything, or as much as anybody reads. A server that drips bytes never trips a socket's own timeout, so there is one `end` for all
    of them. Raises TimeoutError."""
    data = b""
    while len(data) < most_bytes and not is_whole(data):
        sock.settimeout(max(end - time.monotonic(), 0.001))
        more = sock.recv(65536)
        if not more:
            break
        data += more
        if time.monotonic() > end:
            raise TimeoutError
    return data


def is_whole(data: bytes) -> bool:
    """Whether the length that the head announces is there: some servers keep the connection whatever they were asked."""
    head, found, body = data.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n") if found else ():
        name, _, value = line.partition(b":")
        if name == b"content-length" and re.fullmatch(rb"\s*\d{1,18}\s*", value):
            return len(body) >= int(value)
    return False


def parse(data: bytes, seconds: float, most_bytes: int) -> Reply:
    head, found, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ", 2)
    if not found or not words[0].startswith("HTTP/1.") or len(words) < 2 or not re.fullmatch(r"\d{3}", words[1], re.ASCII):
        raise NoReply("garbled", "what it says is not HTTP" if data else "it closes the connection without an answer")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Reply(int(words[1]), headers, body[:most_bytes], seconds)
