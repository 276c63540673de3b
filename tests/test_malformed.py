"""Requests that are wrong: bytes that are no HTTP, JSON bombs, numbers at the ends of their ranges, media that is elsewhere
(REL-12; SEC-07, 21, 25). Never a 5xx, and the server stays as it was.

Routes and fields are found by looking, so that new ones are tried, too. What is drawn is drawn from a seed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import pkgutil
import random
import re
import selectors
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect as types
from server_client import Supervised, many_files, supervised, until
from test_guard import EVERYWHERE, SMUGGLING, post

import mlxd.api
from mlxd.server import ROUTES

#: Short answers to whatever is asked, in every dialect.
CALL: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "n=1"}], "stream": False}
CALL |= {"prompt": "n=1", "input": "n=1", "max_tokens": 4}
POSTS = [path for method, path in EVERYWHERE if method == b"POST"]


@pytest.fixture(scope="module")
def server() -> Iterator[Supervised]:
    limits = {"head_s": 2.0, "body_s": 2.0}
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home), server=limits) as running:
        yield running


# --- JSON ---------------------------------------------------------------------------------------------------------------------------

BOMBS = {
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "a nested value": b'{"model":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "a number of 5,000 digits": b'{"model":' + b"9" * 5000 + b"}",
    "a document of 5,000 digits": b"9" * 5000,
    "bytes that are no UTF-8": b'{"model":"\xff\xfe"}',
    "a character cut short": b'{"model":"\xf0\x9f\x98"}',
    "not a number": b'{"model":NaN}',
    "infinity": b'{"a":-Infinity}',
    "half a surrogate pair": rb'{"model":"\ud83d"}',
    "a pair the wrong way round": rb'{"model":"\ude00\ud83d"}',
    "UTF-16": json.dumps(CALL).encode("utf-16"),
    "UTF-16 without a mark": json.dumps(CALL).encode("utf-16-le"),
    "UTF-32": json.dumps(CALL).encode("utf-32"),
    "a control character": b'{"model":"\x00"}',
    "a list": b"[]",
    "a string": b'"tiny"',
    "null": b"null",
    "two documents": b"{} {}",
    "a trailing comma": b'{"model":"tiny",}',
    "nothing": b"",
    "blanks": b" \r\n",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_sec_25_what_is_no_json_object_is_a_400_on_every_route(server: Supervised, bomb: str) -> None:
    for path in POSTS:
        status, _, body = server.raw(post(target=path, body=BOMBS[bomb]))
        assert status == 400, (path, body)
        assert body.startswith(b'{"')


# --- numbers ------------------------------------------------------------------------------------------------------------------------

NUMBER = "@number@"
ENDS = [
    "0",
    "-0",
    "-0.0",
    "0.5",
    "-1",
    "4.0",
    "1e400",
    "-1e400",
    "1e308",
    "5e-324",
    "NaN",
    "Infinity",
    "-Infinity",
    "true",
    "false",
]
ENDS += [str(sign * n) for n in (2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**40) for sign in (1, -1)]
numbers = st.sampled_from(ENDS) | st.integers(-(2**70), 2**70).map(str) | st.floats(allow_nan=False, allow_infinity=False).map(repr)


def with_number(kind: Any, depth: int = 8) -> Iterator[Any]:
    """Documents of a type, each with one NUMBER where the type has a number."""
    if depth == 0:
        return
    match kind:
        case types.IntType() | types.FloatType():
            yield NUMBER
        case types.UnionType():
            for one in kind.types:
                yield from with_number(one, depth)
        case types.Metadata():
            yield from with_number(kind.type, depth)
        case types.ListType() | types.VarTupleType():
            yield from ([inner] for inner in with_number(kind.item_type, depth - 1))
        case types.DictType():
            yield from ({"key": inner} for inner in with_number(kind.value_type, depth - 1))
        case types.StructType():
            for field in kind.fields:
                for inner in with_number(field.type, depth - 1):
                    yield least(kind) | {field.encode_name: inner}


def least(kind: Any) -> Any:
    """The smallest document of a type."""
    match kind:
        case types.UnionType():
            return least(kind.types[0])
        case types.Metadata():
            return least(kind.type)
        case types.LiteralType():
            return kind.values[0]
        case types.StrType():
            return "user"
        case types.IntType() | types.FloatType():
            return 1
        case types.BoolType():
            return False
        case types.ListType():
            return []
        case types.StructType():
            tag = {kind.tag_field: kind.tag} if kind.tag_field else {}
            return tag | {field.encode_name: least(field.type) for field in kind.fields if field.required}
        case _:
            return {}


def places() -> list[tuple[bytes, str]]:
    """A route, and a body for it with a NUMBER in it: for each number in any struct that the route's module decodes."""
    found = []
    for route, (method, path) in zip(ROUTES, EVERYWHERE, strict=True):
        module = importlib.import_module(route[2].__module__)
        for decoder in vars(module).values():
            if method == b"POST" and isinstance(decoder, msgspec.json.Decoder):
                kind = types.type_info(decoder.type)
                if isinstance(kind, types.StructType):
                    found += [(path, json.dumps(CALL | document)) for document in with_number(kind)]
    return sorted(set(found))


def test_every_module_of_a_dialect_has_its_numbers_tried() -> None:
    text = " ".join(body for _, body in places())
    for name in ("temperature", "top_k", "num_ctx", "seed", "context", "keep_alive", "top_logprobs", "max_completion_tokens"):
        assert f'"{name}": "{NUMBER}"' in text or f'"{name}": ["{NUMBER}"]' in text
    modules = [importlib.import_module(f"mlxd.api.{module.name}") for module in pkgutil.iter_modules(mlxd.api.__path__)]
    decoding = {module.__name__ for module in modules if any(isinstance(v, msgspec.json.Decoder) for v in vars(module).values())}
    assert decoding - {"mlxd.api.fields"} <= {route[2].__module__ for route in ROUTES}


@pytest.mark.parametrize("examples", [200, pytest.param(5000, marks=pytest.mark.full)])
def test_sec_21_a_number_at_the_end_of_its_range_is_never_an_error_of_ours(server: Supervised, examples: int) -> None:
    with server.client() as client:

        @settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(place=st.sampled_from(places()), number=numbers)
        def ask(place: tuple[bytes, str], number: str) -> None:
            path, body = place
            answer = client.post(path.decode(), content=body.replace(f'"{NUMBER}"', number))
            assert answer.status_code < 500 or answer.status_code == 501, (path, body, number, answer.text)

        ask()


# --- media --------------------------------------------------------------------------------------------------------------------------


def media(path: str, where: str) -> dict[str, Any] | None:
    """A call of this route that shows the model an image at `where`; None: it takes none."""
    part: dict[str, Any]
    if path in ("/api/chat", "/api/generate"):
        return CALL | {"images": [where], "messages": [{"role": "user", "content": "n=1", "images": [where]}]}
    if path == "/v1/chat/completions":
        part = {"type": "image_url", "image_url": {"url": where}}
    elif path == "/v1/messages":
        part = {"type": "image", "source": {"type": "url", "url": where}}
    elif path == "/v1/responses":
        part = {"type": "input_image", "image_url": where}
        return CALL | {"input": [{"role": "user", "content": [part]}]}
    else:
        return None
    return CALL | {"messages": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize("path", [path.decode() for path in POSTS if media(path.decode(), "")])
def test_sec_07_media_that_is_elsewhere_is_refused_and_not_fetched(server: Supervised, path: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_text("the canary")
    with socket.create_server(("127.0.0.1", 0)) as canary, server.client() as client:
        canary.setblocking(False)
        at = f"127.0.0.1:{canary.getsockname()[1]}/x.png"
        for where in (f"http://{at}", f"https://{at}", f"file://{secret}", str(secret), "../../etc/passwd", f"ftp://{at}"):
            answer = client.post(path, json=media(path, where))
            assert answer.status_code == 400, (where, answer.text)
            assert "canary" not in answer.text
        with pytest.raises(BlockingIOError):
            canary.accept()


# --- bytes --------------------------------------------------------------------------------------------------------------------------

CORPUS = [
    *SMUGGLING,
    *[post(target=path, body=bomb) for path in POSTS for bomb in BOMBS.values() if len(bomb) < 1000],
    *[post(target=path, body=json.dumps(CALL).encode()) for path in POSTS],
    *[method + b" " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n" for method, path in EVERYWHERE],
    b"GET /\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\nHost: localhost\n\n",
    b"GET  /  HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /%00%ff%2e%2e/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /api/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\nHTTP2-Settings: AAAA\r\nConnection: Upgrade, HTTP2-Settings\r\n\r\n",
    b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n",
    b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
    b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}",
    b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\n{}\r\n0\r\nTrailer: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x12\x04\x00\x00\x00\x00\x00",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"EHLO localhost\r\n",
    b"\x05\x01\x00",
    b"\r\n\r\n\r\n",
    b"\x00" * 64,
    b"A" * 70_000,
]
#: What a mutation puts in.
SPLINTERS = [b"\r\n", b"\r\n\r\n", b"\n", b"\x00", b"\xff", b" ", b"\t", b":", b"/", b"%", b"{", b'"', b"0", b"-1", b"9" * 30]
SPLINTERS += [b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n"]


def mutants(seed: int) -> Iterator[bytes]:
    """The corpus, then one to four changes to one of it, for ever."""
    yield from CORPUS
    draw = random.Random(seed)
    while True:
        request = bytearray(draw.choice(CORPUS))
        for _ in range(draw.randint(1, 4)):
            at, end = sorted((draw.randint(0, len(request)), draw.randint(0, len(request))))
            match draw.randrange(5):
                case 0:
                    request[at:at] = draw.choice(SPLINTERS)
                case 1:
                    request[at : min(end, at + 20)] = b""
                case 2:
                    request[at:at] = request[at : min(end, at + 200)]
                case 3:
                    request[at : at + 1] = bytes([draw.randrange(256)])
                case 4:
                    del request[end:]
        yield bytes(request)


def statuses(server: Supervised, requests: list[bytes]) -> list[int]:
    """Of the answers to all of them at once; 0: closed without one."""
    found = [0] * len(requests)
    with contextlib.ExitStack() as open_ones, selectors.DefaultSelector() as waiting:
        for number, request in enumerate(requests):
            sock = open_ones.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            sock.settimeout(60)
            with contextlib.suppress(ConnectionError):
                sock.sendall(request)
            waiting.register(sock, selectors.EVENT_READ, number)
        while waiting.get_map():
            ready = waiting.select(60)
            assert ready, server.told()
            for key, _ in ready:
                sock, number = key.fileobj, key.data  # type: ignore[assignment]
                start = b""
                with contextlib.suppress(ConnectionError):
                    start = sock.recv(65536)
                going_on = start.startswith(b"HTTP/1.1 100 ")
                if going_on:
                    start = start.partition(b"\r\n\r\n")[2]
                if start:
                    found[number] = int(start.split()[1])
                if start or not going_on:
                    waiting.unregister(sock)
                    sock.close()
    return found


@pytest.mark.parametrize("count", [750, pytest.param(10_000, marks=pytest.mark.full)])
def test_rel_12_malformed_requests_get_no_5xx_and_leave_the_server_as_it_was(server: Supervised, count: int) -> None:
    process = psutil.Process(server.process.pid)
    requests = mutants(seed=12)
    with many_files(2048):
        statuses(server, [next(requests) for _ in range(500)])  # what is allocated once
        server.let_pass(1)
        files, rss = process.num_fds(), process.memory_info().rss
        seen: dict[int, int] = {}
        for start in range(0, count, 750):
            batch = [next(requests) for _ in range(min(750, count - start))]
            for request, status in zip(batch, statuses(server, batch), strict=True):
                seen[status] = seen.get(status, 0) + 1
                assert status < 500, request
        assert {0, 400, 404, 405, 408} <= set(seen)
        until("their sockets to be gone", lambda: process.num_fds() <= files + 2, server.told)
        assert process.memory_info().rss - rss <= 8 * 2**20
        assert server.raw(post(body=json.dumps(CALL).encode()))[0] == 200
    assert server.process.poll() is None
    assert not re.search(r"Traceback|ERROR", (server.home / "server.log").read_text(errors="replace"))
