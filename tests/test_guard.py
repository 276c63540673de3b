"""The request guard (SEC-01, 02, 03, 04, 10, 23, 26, 27, 29): a real server with its default settings, raw bytes, IPv4 and IPv6.

Rebinding and cross-site requests are how pages in a browser reach servers on loopback: Ollama CVE-2024-28224, MCP CVE-2025-66414 and
-66416, "0.0.0.0-day", MLflow CVE-2026-2611. Loosening a default here reopens them.
"""

from __future__ import annotations

import contextlib
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from server_client import Supervised, supervised, until

from mlxd.guard import MAX_BODY_BYTES, Policy, host_allowed, judge, origin_allowed, split_host
from mlxd.messages import Beat
from mlxd.server import ROUTES

CHAT = b'{"model":"tiny","messages":[{"role":"user","content":"n=1"}],"stream":false}'
#: Method and path of every route there is, whoever added it.
EVERYWHERE = [(route[0].encode(), re.sub(r"{[^}]*}", "x", route[1]).encode()) for route in ROUTES]
FAMILIES = [socket.AF_INET] + ([socket.AF_INET6] if socket.has_ipv6 else [])


@pytest.fixture(scope="module")
def server() -> Iterator[Supervised]:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home)) as running:
        yield running


@pytest.fixture
def unreached(server: Supervised) -> Iterator[Supervised]:
    """No handler may be reached: nothing has been asked of an engine, and no request has begun or ended."""
    wanted = len(server.engines)
    before = server.health()["queue"]
    yield server
    assert len(server.engines) == wanted
    assert server.health()["queue"] == before
    assert finished(server) == 0


def finished(server: Supervised) -> int:
    beats = [word.counters.finished for word in server.words if isinstance(word, Beat)]
    return beats[-1] if beats else 0


def post(*lines: bytes, target: bytes = b"/api/chat", body: bytes = CHAT, host: bytes | None = b"localhost") -> bytes:
    head = [b"POST " + target + b" HTTP/1.1", b"Content-Length: %d" % len(body), *lines]
    if host is not None:
        head.insert(1, b"Host: " + host)
    return b"\r\n".join(head) + b"\r\n\r\n" + body


REFUSED_HOSTS = [
    (b"evil.example", 403),
    (b"evil.example:11435", 403),
    (b"localhost.evil.example", 403),
    (b"127.0.0.1.evil.example", 403),
    (b"localhost.", 403),
    (b"127.1", 403),
    (b"2130706433", 403),
    (b"0x7f000001", 403),
    (b"0.0.0.0", 403),  # SEC-04
    (b"0.0.0.0:11435", 403),
    (b"[::]", 403),
    (b"[::ffff:0.0.0.0]", 403),
    (b"8.8.8.8", 403),
    (b"[2001:4860:4860::8888]", 403),
    (b"[::ffff:8.8.8.8]", 403),
    (b"::1", 400),
    (b"user@localhost", 400),
    (b"localhost:x", 400),
    (b"localhost:99999", 400),
    (b"localhost/x", 400),
    (b"localhost, evil.example", 400),
    (b"[localhost]", 400),
    (b"", 400),
]
ALLOWED_HOSTS = [
    b"localhost",
    b"LOCALHOST:1",
    b"127.0.0.1",
    b"127.0.0.1:11435",
    b"127.8.8.8",
    b"[::1]",
    b"[::1]:11435",
    b"[::ffff:127.0.0.1]",
    b"192.168.1.7:11435",
    b"10.0.0.1",
    b"169.254.1.1",
    b"app.localhost",
    b"host.docker.internal:11435",
    b"my-mac.local",
    socket.gethostname().encode(),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_sec_01_a_foreign_host_reaches_no_handler(unreached: Supervised, family: int) -> None:
    for host, status in REFUSED_HOSTS:
        for target in (b"/api/chat", b"/v1/chat/completions", b"/health", b"/nowhere"):
            got, _, body = unreached.raw(post(host=host, target=target), family)
            assert got == status, (host, target, body)
            assert body.startswith(b'{"error":'), (host, body)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_sec_01_a_host_of_this_machine_or_its_network_is_let_in(server: Supervised, family: int) -> None:
    for host in ALLOWED_HOSTS:
        got, _, body = server.raw(b"GET /api/version HTTP/1.1\r\nHost: " + host + b"\r\n\r\n", family)
        assert got == 200, (host, body)


def test_sec_02_the_tables_hold_with_the_default_policy_and_strict_host_is_narrower() -> None:
    default, strict = Policy(), Policy(strict_host=True)
    for name in ("host.docker.internal", "mac.local"):
        assert host_allowed(name, default)
        assert not host_allowed(name, strict)
    for name in ("localhost", "a.localhost", "127.0.0.1", "::1", "192.168.0.2"):
        assert host_allowed(name, strict)


FOREIGN_ORIGINS = [
    b"http://evil.example",
    b"https://evil.example",
    b"null",
    b"http://0.0.0.0",  # SEC-04
    b"http://0.0.0.0:11435",
    b"file://",
    b"http://localhost.evil.example",
    b"http://localhost:3000.evil.example",
    b"http://127.0.0.1.evil.example",
    b"http://user@localhost",
    b"chrome-extension://abcdef",
    b"http://localhost/../x y",
    b"",
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_sec_02_a_foreign_page_starts_nothing_with_any_method(unreached: Supervised, family: int) -> None:
    for origin in FOREIGN_ORIGINS:
        for method in (b"POST", b"GET", b"OPTIONS", b"DELETE"):
            request = post(b"Origin: " + origin, b"Access-Control-Request-Method: POST").replace(b"POST", method, 1)
            status, head, body = unreached.raw(request, family)
            assert status == 403, (origin, method, body)
            assert b"access-control" not in head.lower()


def test_sec_02_a_request_that_another_site_caused_starts_nothing(unreached: Supervised) -> None:
    for site in (b"cross-site", b"same-site"):
        assert unreached.raw(post(b"Sec-Fetch-Site: " + site))[0] == 403
        assert unreached.raw(b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: " + site + b"\r\n\r\n")[0] == 403
    link = b"GET / HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\n\r\n"
    assert unreached.raw(link)[0] == 200
    assert unreached.raw(link.replace(b"GET / ", b"GET /api/tags "))[0] == 403


@pytest.mark.parametrize(("method", "path"), EVERYWHERE)
def test_sec_03_every_route_there_is_refuses_what_a_foreign_page_would_send(
    unreached: Supervised, method: bytes, path: bytes
) -> None:
    hostile = [
        post(b"Origin: https://evil.example", target=path),
        post(b"Origin: null", target=path),
        post(b"Sec-Fetch-Site: cross-site", target=path),
        post(target=path, host=b"evil.example"),
    ]
    for request in hostile:
        status, head, _ = unreached.raw(request.replace(b"POST", method, 1))
        assert status == 403, request
        assert b"access-control" not in head.lower()  # SEC-10


@pytest.mark.parametrize(("method", "path"), EVERYWHERE)
def test_sec_10_no_route_answers_a_page_with_more_than_its_own_name(server: Supervised, method: bytes, path: bytes) -> None:
    request = post(b"Origin: http://localhost:3000", b"Content-Type: application/json", target=path, body=b"{")
    _, head, _ = server.raw(request.replace(b"POST", method, 1))
    named = [line for line in head.lower().split(b"\r\n") if line.startswith(b"access-control")]
    assert named == [b"access-control-allow-origin: http://localhost:3000"]


@pytest.mark.parametrize(
    "origin",
    ["http://localhost", "http://localhost:3000", "https://127.0.0.1:8443", "http://[::1]:1", "app://obsidian.md", "tauri://x"],
)
def test_an_allowed_page_is_named_in_the_answer_and_may_send_the_headers_of_the_sdks(server: Supervised, origin: str) -> None:
    with server.client() as client:
        answer = client.get("/api/version", headers={"Origin": origin})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)
        assert answer.headers["vary"] == "Origin"
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        preflight = client.options("/v1/chat/completions", headers=asked)
        assert preflight.status_code == 204
        assert not {"content-length", "content-type", "transfer-encoding"} & set(preflight.headers)
        assert {"authorization", "x-api-key", "x-stainless-retry-count"} <= set(
            preflight.headers["access-control-allow-headers"].split(", ")
        )
        assert "access-control-allow-credentials" not in preflight.headers
        assert "access-control-allow-private-network" not in preflight.headers


def test_an_origin_equal_to_the_host_is_our_own_and_configured_ones_are_welcome() -> None:
    assert origin_allowed("http://192.168.1.7:11435", "192.168.1.7:11435", Policy())
    assert not origin_allowed("http://192.168.1.7:11436", "192.168.1.7:11435", Policy())
    configured = Policy(origins=("chrome-extension://*", "https://*.example.org", "https://exact.example"))
    for origin in ("chrome-extension://abc", "https://a.example.org", "https://exact.example"):
        assert origin_allowed(origin, "localhost", configured)
    for origin in ("https://a.example.org.evil.example", "https://a/.example.org", "http://exact.example", "moz-extension://abc"):
        assert not origin_allowed(origin, "localhost", configured)


def test_only_a_page_must_say_what_its_body_is(server: Supervised, unreached: Supervised) -> None:
    for kind in (b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data"):
        status, _, body = unreached.raw(post(b"Origin: http://localhost", b"Content-Type: " + kind))
        assert (status, b"application/json" in body) == (415, True)
        assert unreached.raw(post(b"Sec-Fetch-Site: same-origin", b"Content-Type: " + kind))[0] == 415
        wrong = post(b"Content-Type: " + kind, b"Sec-Fetch-Mode: cors", body=b"{")  # Node's fetch sends the mode alone
        assert unreached.raw(wrong)[0] == 400
    assert unreached.raw(post(b"Origin: http://localhost", b"Content-Type: application/json; charset=utf-8", body=b"{"))[0] == 400


def test_sec_27_a_compressed_body_is_a_415_wherever_it_goes(unreached: Supervised) -> None:
    for coding in (b"gzip", b"deflate", b"zstd", b"br", b"x", b"gzip, identity"):
        for path in [path for method, path in EVERYWHERE if method == b"POST"]:
            assert unreached.raw(post(b"Content-Encoding: " + coding, target=path))[0] == 415
    assert unreached.raw(post(b"Content-Encoding: identity", body=b"{"))[0] == 400


SMUGGLING = [
    post(b"Host: localhost"),  # two of them
    post(b"Host: evil.example"),
    post(host=None),
    post(target=b"http://localhost/api/chat"),
    post(target=b"http://evil.example/api/chat"),
    post(b"Content-Length: 5"),
    post(b"Transfer-Encoding: chunked"),
    post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"),
    post(b"Transfer-Encoding: gzip, chunked"),
    post(b"Origin: http://localhost", b"Origin: http://evil.example"),
    post(b"Sec-Fetch-Site: none", b"Sec-Fetch-Site: cross-site"),
    post(b"Bad Header: x"),
    post(b"X: a\x00b"),
    post(b" folded: x"),
    b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: +5\r\n\r\nhello",
    b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    b"POST /api/chat\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("number", range(len(SMUGGLING)))
def test_sec_29_an_ambiguous_request_is_a_400(unreached: Supervised, family: int, number: int) -> None:
    status, _, body = unreached.raw(SMUGGLING[number] + b"\r\n\r\n", family)
    assert status == 400, body


def test_sec_23_a_megabyte_of_headers_is_refused_cheaply(unreached: Supervised) -> None:
    process = psutil.Process(unreached.process.pid)
    before = process.memory_info().rss
    for _ in range(5):
        assert unreached.raw(post(b"X-Big: " + b"a" * 1024 * 1024))[0] in (0, 400, 431)
    assert process.memory_info().rss - before <= 2 * 1024 * 1024


def test_heads_are_measured_at_their_limits(unreached: Supervised) -> None:
    def get(*lines: bytes, target: bytes = b"/api/version") -> int:
        return unreached.raw(b"\r\n".join([b"GET " + target + b" HTTP/1.1", b"Host: localhost", *lines]) + b"\r\n\r\n")[0]

    assert get(*[b"X-%d: a" % i for i in range(99)]) == 200
    assert get(*[b"X-%d: a" % i for i in range(100)]) == 431
    assert get(b"X: " + b"a" * (16 * 1024 - 14)) == 200
    assert get(b"X: " + b"a" * (16 * 1024 - 13)) == 431
    assert get(target=b"/api/version?" + b"a" * (4096 - 12)) == 200
    assert get(target=b"/api/version?" + b"a" * (4096 - 11)) == 414


def flood(server: Supervised, head: bytes, chunk: bytes, most: int) -> tuple[int, int]:
    """Send until something is answered: the status, and bytes sent by then."""
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.settimeout(20)
        sock.sendall(head)
        answered = threading.Event()
        answer = b""

        def read() -> None:
            nonlocal answer
            with contextlib.suppress(OSError):
                answer = sock.recv(65536)
            answered.set()

        reader = threading.Thread(target=read)
        reader.start()
        with contextlib.suppress(ConnectionError):
            while sent < most and not answered.is_set():
                sock.sendall(chunk)
                sent += len(chunk)
        reader.join()
    return int(answer.split(b" ")[1]), sent


@pytest.mark.parametrize("target", [b"/api/chat", b"/v1/chat/completions"])
def test_sec_26_a_body_without_end_is_cut_at_the_limit(unreached: Supervised, target: bytes) -> None:
    process = psutil.Process(unreached.process.pid)
    before = process.memory_info().rss
    head = b"POST " + target + b" HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"10000\r\n" + b"[" * 65536 + b"\r\n"
    status, sent = flood(unreached, head, piece, 300 * 1024 * 1024)
    assert status == 413
    assert sent < 200 * 1024 * 1024
    assert process.memory_info().rss - before <= MAX_BODY_BYTES + 16 * 1024 * 1024


def test_a_body_that_announces_too_much_is_refused_unread(unreached: Supervised) -> None:
    request = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1)
    assert unreached.raw(request)[0] == 413


@pytest.mark.parametrize("depth", [65, 900, 1100, 100_000])
def test_json_nested_too_deeply_is_a_400(unreached: Supervised, depth: int) -> None:
    nest = b'{"a":' * depth + b"1" + b"}" * depth
    call = b'{"model":"tiny","messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":%s}}]}]}' % nest
    status, _, body = unreached.raw(post(body=call))
    assert (status, b"nested" in body) == (400, True)


def test_the_pure_judge_says_the_same_without_a_server() -> None:
    scope = {"type": "http", "method": "POST", "http_version": "1.1", "path": "/", "raw_path": b"/", "query_string": b""}
    assert judge(scope | {"headers": [(b"host", b"localhost")]}, Policy()) == []
    assert split_host(b"[::1]:80") == ("::1", 80)
    assert split_host(b"a:b") is None


def test_every_answer_says_who_and_which_request(server: Supervised) -> None:
    with server.client() as client:
        for path in ("/", "/api/tags", "/nowhere", "/health"):
            answer = client.get(path, headers={"X-Request-Id": "mine-1"})
            assert answer.headers["x-request-id"] == "mine-1"
            assert answer.headers["x-mlxd-version"]
            assert "server" not in answer.headers
        for insane in ("a b", "x" * 129, "é"):
            made = client.get("/", headers={"X-Request-Id": insane.encode()}).headers["x-request-id"]
            assert made.startswith("req_")


def test_a_crowd_of_silent_connections_does_not_lock_out_the_others(server: Supervised) -> None:
    crowd = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(300)]
    try:
        assert until("an answer", lambda: server.health()["status"]) == "ok"
    finally:
        for sock in crowd:
            sock.close()
