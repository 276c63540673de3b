"""A small Hugging Face hub on loopback, for the real client: what it tells of a repository, files with ranges, large ones through a second
port that stands for the CDN. It misbehaves on request."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import mlxd

BUILTIN = Path(mlxd.__file__).parent / "builtin"
PIECE_BYTES = 64 * 1024


class Seen(NamedTuple):
    """A request. `start`: of its range, 0 without one. `token`: what it showed."""

    where: str
    path: str
    start: int
    token: str | None


@dataclass
class Fault:
    """What happens to the next `times` answers for a file, or to the question what there is (""). `at`: after so many bytes.

    wrong: a byte is another one; truncate, reset: the connection ends; stall: nothing more comes until the hub is closed; a number: that
    status, with this body. Without `ranges` the whole file is sent, whatever was asked for."""

    kind: str | int
    times: int = 1
    at: int = 0
    ranges: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Repository:
    """`large`: those that come from the CDN, with a SHA-256. `alter`: makes another answer of the true one; `answer`: instead of it. `gated`:
    who shows no token is told so."""

    files: dict[str, bytes]
    large: set[str]
    alter: Callable[[dict[str, Any]], dict[str, Any]] = lambda told: told
    answer: bytes | None = None
    gated: bool = False

    @property
    def revision(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def told(self, name: str) -> bytes:
        if self.answer is not None:
            return self.answer
        siblings = []
        for path, data in self.files.items():
            one: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": git_blob(data)}
            if path in self.large:
                one["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(one)
        return json.dumps(self.alter({"id": name, "sha": self.revision, "siblings": siblings})).encode()


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def builtin_repository() -> Repository:
    """The built-in model as somebody would have put it on the hub, with what a repository has besides."""
    files = {path.name: path.read_bytes() for path in BUILTIN.iterdir()}
    files |= {"README.md": b"# A model\n", ".gitattributes": b"*.safetensors lfs\n", "modeling_evil.py": b"open('canary', 'w')\n"}
    files |= {"pytorch_model.bin": b"pickle", "original/params.json": b"{}", "LICENSE": b"Do as you like.\n"}
    return Repository(files, {"model.safetensors", "pytorch_model.bin"})


class Hub:
    """`seen`: all requests, in order. `held`: set while an answer stalls."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: dict[str, Fault] = {}
        self.seen: list[Seen] = []
        self.held = threading.Event()
        self.closing = threading.Event()
        self.servers = [Listener(("127.0.0.1", 0), where, self) for where in ("hub", "cdn")]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.servers[0].server_port}"

    @property
    def cdn(self) -> str:
        return f"http://127.0.0.1:{self.servers[1].server_port}"

    def starts(self, path: str = "model.safetensors") -> list[int]:
        """From where the bytes of a file were asked for, each time."""
        where = "cdn" if any(path in one.large for one in self.repositories.values()) else "hub"
        return [seen.start for seen in self.seen if seen.where == where and seen.path.endswith(f"/{path}")]

    def fault_of(self, path: str) -> Fault | None:
        fault = self.faults.get(path)
        if fault is None or fault.times == 0:
            return None
        fault.times -= 1
        return fault

    def release(self) -> None:
        """Let what is held end, badly."""
        self.closing.set()

    def close(self) -> None:
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()


class Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], where: str, hub: Hub):
        super().__init__(address, Handler)
        self.where = where
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Listener

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        start = int(found[1]) if found else 0
        hub.seen.append(Seen(self.server.where, path, start, self.headers.get("authorization")))
        if asked := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/main", path):
            self.tell(asked[1])
        elif asked := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path):
            self.give(asked[1], asked[2], asked[3], start)
        else:
            self.answer(404, b"")

    def tell(self, name: str) -> None:
        repository, fault = self.server.hub.repositories.get(name), self.server.hub.fault_of("")
        if fault is not None and self.fails(fault):
            return
        if repository is None:
            self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        else:
            self.answer(200, repository.told(name), {"Content-Type": "application/json"})

    def give(self, name: str, revision: str, path: str, start: int) -> None:
        hub = self.server.hub
        repository = hub.repositories[name]
        if revision != repository.revision or path not in repository.files:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif repository.gated and not self.headers.get("authorization") and self.server.where == "hub":
            self.answer(401, b"", {"X-Error-Code": "GatedRepo"})
        elif path in repository.large and self.server.where == "hub":
            self.answer(302, b"", {"Location": f"{hub.cdn}{self.path}?signature=s3cret"})
        else:
            self.send_file(repository.files[path], start, hub.fault_of(path))

    def send_file(self, data: bytes, start: int, fault: Fault | None) -> None:
        if fault is not None and self.fails(fault):
            return
        if start >= len(data) > 0:
            self.answer(416, b"")
            return
        kind = fault.kind if fault is not None else ""
        start = start if fault is None or fault.ranges else 0
        body = bytearray(data[start:])
        if kind == "wrong":
            body[len(body) // 2] ^= 1
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        cut = fault.at if fault is not None and kind in ("truncate", "reset", "stall") else len(body)
        for offset in range(0, min(cut, len(body)), PIECE_BYTES):
            self.wfile.write(body[offset : min(offset + PIECE_BYTES, cut)])
        if kind == "stall":
            self.hold()
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if cut < len(body):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR) if kind != "reset" else self.connection.close()

    def fails(self, fault: Fault) -> bool:
        """Whether there is no answer but the fault."""
        if isinstance(fault.kind, int):
            self.answer(fault.kind, fault.body, fault.headers)
            return True
        if fault.kind == "stall" and not fault.at:
            self.hold()
            self.close_connection = True
            return True
        return False

    def hold(self) -> None:
        self.server.hub.held.set()
        self.server.hub.closing.wait(60)
        self.close_connection = True

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """A hub that has the built-in model as `org/tiny`."""
    one = Hub()
    one.repositories["org/tiny"] = builtin_repository()
    try:
        yield one
    finally:
        one.close()
