"""A neighbour in Ollama's part: a real HTTP server, one request on each connection, that misbehaves on request.

What it does with its list is `mode`; what it does with a request is the name of the model:

    says        three lines (or events), each a chunk of its own
    waits       the same; each but the first when `go` is released
    dies        two lines and a half, then the connection ends, without the end of the chunks
    shortens    less than its content-length
    endless     lines for as long as somebody takes them, up to 1 GB
    crashes     takes the request and ends the connection
    silent      takes the request and says nothing
    refuses     404 in Ollama's shape, with headers that are nobody's business
    redirects   307
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from server_client import PATIENCE_S, until

MODELS = (
    "says",
    "waits",
    "dies",
    "shortens",
    "endless",
    "crashes",
    "silent",
    "refuses",
    "redirects",
    "hf.co/some/Model-GGUF:Q4_K_M",
)
GIGABYTE = 10**9
DIGEST = "ab" * 32


class Asked(NamedTuple):
    line: str
    headers: dict[str, str]
    body: bytes


def entry(name: str) -> dict[str, Any]:
    """As Ollama 0.14 lists a model."""
    details = {"parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"], "parameter_size": "1B"}
    times = {"modified_at": "2025-10-03T10:11:12.123456789+02:00"}
    name = name if ":" in name else name + ":latest"
    return {"name": name, "model": name, "size": 5, "digest": DIGEST, "details": details | {"quantization_level": "Q4"}} | times


def lines(path: str) -> list[bytes]:
    """An answer in three pieces."""
    if path.startswith("/v1/"):
        return [b'data: {"n":1}\n\n', b'data: {"n": 2 }\n\n', b"data: [DONE]\n\n"]
    return [b'{"n":1}\n', b'{"n": 2, "odd":"\xc3\xa9"}\n', b'{"done":true}\n']


class FakeOllama:
    """`loaded`: what it has in memory. `seen`: requests but those for the list, `lists`: how many of those. `sent_bytes`: of the endless
    answer. `gone`: connections that the other side has ended before the answer was complete."""

    def __init__(self, mode: str = "", names: tuple[str, ...] = MODELS, port: int = 0):
        self.mode = mode
        self.names = names
        self.loaded: list[str] = []
        self.seen: list[Asked] = []
        self.lists = 0
        self.sent_bytes = 0
        self.gone = 0
        self.go = threading.Semaphore(0)
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.open: set[socket.socket] = set()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self.listener.accept()
                self.open.add(connection)
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            asked = read(connection)
            path = asked.line.split(" ")[1].partition("?")[0]
            if path == "/api/tags":
                self.lists += 1
                self.list(connection)
            else:
                self.seen.append(asked)
                try:
                    self.answer(connection, path, asked)
                except OSError:
                    self.gone += 1
        self.open.discard(connection)

    def list(self, connection: socket.socket) -> None:
        body = json.dumps({"models": [entry(name) for name in self.names]}).encode()
        match self.mode:
            case "hangs":
                wait_for_end(connection)
            case "no HTTP":
                connection.sendall(b"220 mail.example.org ESMTP\r\n")
            case "no JSON":
                reply(connection, 200, b"<html>hello</html>")
            case "no list":
                reply(connection, 200, b'{"models":{"a":1}}')
            case "deep":
                reply(connection, 200, b'{"models":[{"name":"a","x":' + b"[" * 9000 + b"]" * 9000 + b"}]}")
            case "500":
                reply(connection, 500, body)
            case "redirects":
                reply(connection, 302, b"", f"location: {self.url}/elsewhere")
            case "mlxd":
                reply(connection, 200, body, "x-mlxd-version: 0.1.0")
            case "huge":
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % GIGABYTE)
                self.flood(connection)
            case _:
                reply(connection, 200, body)

    def answer(self, connection: socket.socket, path: str, asked: Asked) -> None:
        if path == "/api/ps":
            return reply(connection, 200, json.dumps({"models": [entry(name) for name in self.loaded]}).encode())
        if not asked.body:
            return reply(connection, 200, b'{"id":"says:latest"}')
        name = (json.loads(asked.body).get("model") or "").partition(":")[0]
        kind = "text/event-stream" if path.startswith("/v1/") else "application/x-ndjson"
        match name:
            case "silent":
                return wait_for_end(connection)
            case "crashes":
                return None
            case "refuses":
                more = "x-secret: 1\r\nset-cookie: a=b\r\nserver: Go"
                return reply(connection, 404, b'{"error":"model \'refuses\' not found"}', more)
            case "redirects":
                return reply(connection, 307, b"", f"location: {self.url}/elsewhere")
            case "shortens":
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
                return None
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n" % kind.encode())
        if name == "endless":
            return self.flood(connection, b"8000\r\n" + b'{"n":1}\n' * 4096 + b"\r\n")
        for index, line in enumerate(lines(path)):
            if name == "waits" and index:
                self.go.acquire(timeout=PATIENCE_S)
            if name == "dies" and index == 2:
                connection.sendall(b"%x\r\n%b" % (len(line), line[:5]))
                return None
            connection.sendall(b"%x\r\n%b\r\n" % (len(line), line))
        connection.sendall(b"0\r\n\r\n")
        return None

    def flood(self, connection: socket.socket, piece: bytes = bytes(65536)) -> None:
        while self.sent_bytes < GIGABYTE:
            connection.sendall(piece)
            self.sent_bytes += len(piece)

    def close(self) -> None:
        self.listener.close()
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.go.release(100)
        until("the neighbour's last connection", lambda: not self.open)


def read(connection: socket.socket) -> Asked:
    """A whole request."""
    connection.settimeout(PATIENCE_S)
    with connection.makefile("rb") as stream:
        line = stream.readline().decode().strip()
        headers: dict[str, str] = {}
        while text := stream.readline().decode("latin-1").strip():
            name, _, value = text.partition(":")
            headers[name.lower()] = value.strip()
        return Asked(line, headers, stream.read(int(headers.get("content-length", 0))))


def reply(connection: socket.socket, status: int, body: bytes, more: str = "x-more: 1") -> None:
    head = f"HTTP/1.1 {status} Whatever\r\ncontent-type: application/json; charset=utf-8\r\n{more}\r\n"
    connection.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)


def wait_for_end(connection: socket.socket) -> None:
    """Raises OSError when the other side has gone."""
    while connection.recv(65536):
        pass
    raise ConnectionError("gone")


@contextlib.contextmanager
def fake_ollama(mode: str = "", names: tuple[str, ...] = MODELS) -> Iterator[FakeOllama]:
    neighbour = FakeOllama(mode, names)
    try:
        yield neighbour
    finally:
        neighbour.close()
