"""The edges of HTTP: clients that send slowly, do not read, come in crowds or too often (REL-08, 09, 10, 20; SEC-24). Real sockets.

Deadlines are scaled down by settings; what closes them looks once a second.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import Daemon
from server_client import Background, Supervised, many_files, supervised, until
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from mlxd import ratelimit
from mlxd.connections import CROWDED, MOST_OPEN, OTHER_FILES, room
from mlxd.ratelimit import RateLimit

HOST = b"Host: localhost\r\n"
VERSION = b"GET /api/version HTTP/1.1\r\n" + HOST + b"\r\n"
DEADLINES = {"head_s": 2.0, "body_s": 1.0, "write_stall_s": 3.0}


@pytest.fixture(scope="module")
def server() -> Iterator[Supervised]:
    limits: dict[str, Any] = DEADLINES | {"max_idle": 8}
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home), server=limits) as running:
        yield running


@contextlib.contextmanager
def crowd(server: Supervised, size: int, said: Callable[[int], bytes] = lambda number: b"") -> Iterator[list[socket.socket]]:
    """So many clients, each of which has said something and waits."""
    with contextlib.ExitStack() as open_ones:
        clients = []
        for number in range(size):
            sock = open_ones.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            sock.settimeout(60)
            sock.sendall(said(number))
            clients.append(sock)
        yield clients


def post(path: str, length: int, more: bytes = b"") -> bytes:
    return b"POST %s HTTP/1.1\r\n%s%sContent-Length: %d\r\n\r\n" % (path.encode(), HOST, more, length)


def rest(sock: socket.socket) -> bytes:
    """All that comes until the server closes."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while chunk := sock.recv(65536):
            data += chunk
    return data


def one_answer(sock: socket.socket) -> int:
    """The status of an answer with a length, read to its end; negative when it says when to come again."""
    with sock.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers = {}
        while (line := file.readline().lower()) != b"\r\n":
            name, _, value = line.partition(b":")
            headers[name] = value
        file.read(int(headers[b"content-length"]))
    return -status if b"retry-after" in headers else status


def drip(sock: socket.socket, text: bytes) -> None:
    """A byte and a wait, until the server has had enough."""
    ended = threading.Event()
    with contextlib.suppress(OSError):
        for byte in text:
            sock.sendall(bytes([byte]))
            ended.wait(0.1)


def files_of(server: Supervised) -> int:
    return psutil.Process(server.process.pid).num_fds()


# --- what is leaned on -----------------------------------------------------------------------------------------------------------


def test_uvicorn_is_as_its_subclass_takes_it_to_be() -> None:
    for method in (H11Protocol.data_received, H11Protocol.on_response_complete):
        assert "self.handle_events()" in inspect.getsource(method)
    made = inspect.getsource(H11Protocol.__init__)
    for attribute in ("conn", "cycle", "flow", "loop", "transport"):
        assert f"self.{attribute}" in made
    assert "self.response_complete = True" in inspect.getsource(RequestResponseCycle.send)
    assert "self.cycle.disconnected = True" in inspect.getsource(H11Protocol.connection_lost)


def test_descriptors_are_enough_for_connections_and_for_those_that_are_being_accepted() -> None:
    assert room(8192)[0] == MOST_OPEN
    for files in (256, 1024, 4096, 8192, 10**6):
        most, at_once = room(files)
        assert most + 2 * 4 * at_once + OTHER_FILES <= files


# --- slow to ask --------------------------------------------------------------------------------------------------------------------


def test_sec_24_a_client_that_does_not_finish_its_head_is_closed_and_one_between_two_requests_is_kept(server: Supervised) -> None:
    with crowd(server, 4) as (silent, half, dripping, kept):
        half.sendall(VERSION[:30])
        kept.sendall(VERSION)
        assert one_answer(kept) == 200
        dripper = Background(lambda: drip(dripping, VERSION[:-2] + b"X: y\r\n" * 1000))
        assert (rest(silent), rest(half), rest(dripping)) == (b"", b"", b"")
        dripper.result()
        server.let_pass(2)
        kept.sendall(VERSION)
        assert one_answer(kept) == 200
        kept.sendall(VERSION[:30])
        assert rest(kept) == b""


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_sec_24_a_body_that_does_not_arrive_is_a_408_in_the_dialect_however_it_drips(server: Supervised, path: str) -> None:
    with crowd(server, 2) as (half, dripping):
        half.sendall(post(path, 1000) + b'{"model":')
        dripping.sendall(post(path, 1000).replace(b"Content-Length: 1000", b"Transfer-Encoding: chunked"))
        dripper = Background(lambda: drip(dripping, b"1\r\n{\r\n" * 999))
        for sock in (half, dripping):
            head, _, body = rest(sock).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            error = json.loads(body)["error"]
            assert (error["message"] if path.startswith("/v1") else error) == "the body did not arrive within 1 s"
        dripper.result()


def test_a_body_that_goes_on_after_its_answer_has_the_same_deadline(server: Supervised) -> None:
    with crowd(server, 1) as (sock,):
        sock.sendall(post("/nowhere", 1000) + b"{")
        assert one_answer(sock) == 404
        assert rest(sock) == b""


def test_a_body_that_goes_wrong_after_its_answer_ends_the_connection_and_nothing_else(server: Supervised) -> None:
    log = server.home / "server.log"
    before = len(log.read_bytes())
    for rest_of_body in (b"ZZ\r\n", b"1\r\n{garbage"):
        with crowd(server, 1) as (sock,):
            sock.sendall(post("/nowhere", 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
            assert one_answer(sock) == 404
            sock.sendall(rest_of_body)
            assert rest(sock) == b""
    lines = log.read_bytes()[before:].decode().splitlines()
    assert [line.split("  ")[1:3] for line in lines] == [["POST /nowhere", "404"]] * 2


def test_rel_09_a_thousand_that_finish_nothing_are_gone_after_the_deadline_and_leave_nothing(server: Supervised) -> None:
    process = psutil.Process(server.process.pid)
    with many_files(2048):
        assert server.raw(VERSION)[0] == 200
        files, rss = files_of(server), process.memory_info().rss
        said = [b"", VERSION[:20], post("/api/chat", 1000), post("/v1/chat/completions", 1000) + b"{"]
        with crowd(server, 1000, lambda number: said[number % 4]):
            for _ in range(2):  # while they are there, whoever comes may be refused, in words
                assert server.raw(VERSION)[0] in (200, 503)
            until("all of them gone", lambda: files_of(server) <= files + 2, server.told)
            assert process.memory_info().rss - rss <= 16 * 2**20
            with server.client() as client:
                assert [client.get("/api/version").status_code for _ in range(100)] == [200] * 100


# --- slow to read -------------------------------------------------------------------------------------------------------------------


def test_rel_10_fifty_that_do_not_read_are_aborted_and_cost_their_neighbours_nothing(home: Path) -> None:
    limits = DEADLINES | {"write_stall_s": 1.0, "max_concurrent": 64}
    with supervised(home, server=limits) as server:
        call: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "n=300 size=4000 delay=0.02"}]}
        body = json.dumps(call).encode()
        with server.client() as client:
            short = call | {"messages": [{"role": "user", "content": "n=3"}], "stream": False}
            assert client.post("/api/chat", json=short).status_code == 200
            files = files_of(server)
            rss = psutil.Process(server.process.pid).memory_info().rss
            with contextlib.ExitStack() as open_ones:
                for _ in range(50):
                    sock = open_ones.enter_context(socket.socket())
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    sock.connect(("127.0.0.1", server.port))
                    sock.sendall(post("/api/chat", len(body)) + body)
                until("all to run", lambda: server.health()["queue"]["running"] == 50, server.told)
                while server.health()["queue"]["running"]:
                    assert client.post("/api/chat", json=short).json()["message"]["content"] == "w0 w1 w2 "
                    assert max(unsent_bytes(server.port), default=0) <= 256 * 1024
                until("their sockets to be freed", lambda: files_of(server) <= files + 2, server.told)
                assert psutil.Process(server.process.pid).memory_info().rss - rss <= 50 * 2**20
            until("no job", lambda: server.health()["engines"][0]["running"] == 0, server.told)


def unsent_bytes(port: int) -> list[int]:
    """What the kernel holds for each client (Linux tells)."""
    if sys.platform != "linux":
        return []
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [int(line[4].partition(":")[0], 16) for line in lines if line[1].endswith(f":{port:04X}")]


def test_a_client_that_reads_slowly_but_reads_is_left_alone(server: Supervised) -> None:
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "n=75 size=8000 burst"}]}).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        sock.connect(("127.0.0.1", server.port))
        sock.settimeout(60)
        sock.sendall(post("/api/chat", len(body), b"Connection: close\r\n") + body)
        data = b""
        for _ in range(4):  # for longer than the deadline
            while len(piece := sock.recv(16384)) and len(data) % 100_000 + len(piece) < 100_000:
                data += piece
            data += piece
            server.let_pass(1)
        assert (data + rest(sock)).count(b'"done":false') == 75


# --- many ---------------------------------------------------------------------------------------------------------------------------


def test_of_many_kept_connections_the_longest_idle_is_closed(server: Supervised) -> None:
    def ask(sock: socket.socket) -> int:
        sock.sendall(VERSION)
        return one_answer(sock)

    with crowd(server, 8) as idle:
        assert [ask(sock) for sock in idle] == [200] * 8
        assert ask(idle[0]) == 200  # now the second is the longest idle
        with crowd(server, 2) as more:
            assert [ask(sock) for sock in more] == [200] * 2
            assert (rest(idle[1]), rest(idle[2])) == (b"", b"")
            assert [ask(sock) for sock in [idle[0], *idle[3:], *more]] == [200] * 8


def test_more_connections_than_are_heard_are_told_so_and_closed(home: Path) -> None:
    with many_files(2048), supervised(home) as server, crowd(server, MOST_OPEN) as clients:
        with crowd(server, 1) as (late,):
            assert rest(late) == CROWDED
        for sock in clients[:100]:
            sock.close()
        until("room", lambda: server.raw(VERSION)[0] == 200, server.told)


def test_uploads_together_have_a_bound_and_small_requests_do_not_count(home: Path) -> None:
    half = b"x" * 700_000
    with supervised(home, server={"upload_bytes": 1024 * 1024}) as server, crowd(server, 2) as (first, second):
        first.sendall(post("/api/chat", len(half) + 1) + half)
        server.let_pass(1)
        second.sendall(post("/v1/chat/completions", len(half) + 1) + half)
        assert one_answer(second) == -503
        small = b"x" * 60_000
        assert server.raw(post("/api/chat", len(small)) + small)[0] == 400
        first.sendall(b"x")
        assert one_answer(first) == 400
        large = b"x" * 8 * 2**20
        assert server.raw(post("/api/chat", len(large)) + large)[0] == 400  # alone it may be larger than what all may


@pytest.mark.parametrize("size", [1000, pytest.param(5000, marks=pytest.mark.full)])
def test_rel_20_of_a_burst_the_queue_takes_its_bound_and_the_rest_is_told_when_to_come_again(home: Path, size: int) -> None:
    with many_files(2048), supervised(home, server={"max_concurrent": 8}) as server, server.client() as client:
        call = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hang"}], "stream": False}).encode()
        request = post("/api/chat", len(call)) + call
        with crowd(server, 8 + 512, lambda number: request):
            until("a full house", lambda: server.health()["queue"] == {"running": 8, "waiting": 512}, server.told)
            ending = threading.Event()
            lives: list[int] = []

            def look() -> None:
                while not ending.is_set():
                    lives.append(httpx.get(server.url + "/health/live", trust_env=False, verify=False, timeout=60).status_code)

            looking = Background(look)
            refused = 0
            with crowd(server, 100) as others:
                for _ in range(size // 100 - 5):
                    for sock in others:
                        sock.sendall(request)
                    for sock in others:
                        refused += one_answer(sock) == -503
            assert refused == size - 500
            ending.set()
            looking.result()
            assert lives
            assert set(lives) == {200}
        until("room", lambda: client.post("/api/chat", content=call.replace(b"hang", b"n=1")).status_code == 200, server.told)


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
def test_rel_08_a_server_with_few_descriptors_outlives_a_crowd(daemon: Callable[..., Daemon], home: Path) -> None:
    few = home / "few"
    few.write_text(f"#!/bin/sh\nulimit -n 256\nexec {sys.executable} -m mlxd.server\n")
    few.chmod(0o700)
    running = daemon(server=None, MLXD_SERVER_COMMAND=str(few), MLXD_SERVER_HEAD_S="1")
    running.start()
    running.ready()
    before = running.status()
    with contextlib.ExitStack() as open_ones:
        for _ in range(400):
            sock = open_ones.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", before["port"]))
        running.until("the control socket to answer", lambda told: told["state"] == "ready")
        running.until("the crowd to be gone", lambda told: running.get("/health/live")[0] == 200)
    told = running.status()
    assert told["server"]["pid"] == before["server"]["pid"]
    assert len(running.log("server")) <= 64 * 1024


# --- too often ------------------------------------------------------------------------------------------------------------------------


def test_a_window_slides_and_what_is_refused_does_not_count() -> None:
    limit = RateLimit(2, 10.0)
    assert [limit.wait_s(b"a", now) for now in (0.0, 4.0)] == [0.0, 0.0]
    assert [limit.wait_s(b"a", now) for now in (5.0, 9.0)] == [5.0, 1.0]
    assert limit.wait_s(b"b", 5.0) == 0.0
    assert limit.wait_s(b"a", 10.0) == 0.0
    assert limit.wait_s(b"a", 10.0) == 4.0


def test_what_is_remembered_is_bounded_and_those_who_ask_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratelimit, "MOST_REMEMBERED", 100)
    limit = RateLimit(3, 1e6)
    for number in range(1000):
        limit.wait_s(b"busy", float(number))
        assert limit.wait_s(b"%d" % number, float(number)) == 0.0
        assert sum(map(len, limit.times.values())) == limit.remembered <= 100
    assert limit.wait_s(b"busy", 1000.0) > 0


def test_a_client_is_the_holder_of_a_key_or_an_address() -> None:
    def client(address: str, *headers: tuple[bytes, bytes]) -> bytes:
        return ratelimit.client({"client": (address, 1), "headers": list(headers)})

    assert client("127.0.0.1") == client("::1") == client("::ffff:127.0.0.1") == ratelimit.client({"client": None, "headers": []})
    assert len({client("127.0.0.1"), client("192.168.1.2"), client("192.168.1.3")}) == 3
    key = client("127.0.0.1", (b"authorization", b"Bearer one"))
    assert key == client("192.168.1.2", (b"x-other", b""), (b"authorization", b"Bearer one"))
    assert key != client("127.0.0.1", (b"x-api-key", b"two"))
    assert b"one" not in key


def test_who_asks_too_often_is_told_in_the_dialect_when_to_come_again_and_lists_and_health_are_free(home: Path) -> None:
    with supervised(home, rate_limit={"max": 3, "window_s": 3600.0}) as server, server.client() as client:
        call = {"model": "tiny", "messages": [{"role": "user", "content": "n=1"}], "stream": False}
        assert [client.post("/api/chat", json=call).status_code for _ in range(3)] == [200] * 3
        native, openai = client.post("/api/chat", json=call), client.post("/v1/chat/completions", json=call)
        assert (native.status_code, native.json()) == (429, {"error": "more than 3 requests in 3600 s from this client"})
        assert (openai.status_code, openai.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 3000 < int(openai.headers["retry-after"]) <= int(native.headers["retry-after"]) <= 3600
        for path in ("/health", "/health/live", "/api/tags", "/v1/models", "/api/version"):
            assert client.get(path).status_code == 200
        assert client.post("/api/show", json={"model": "tiny"}).status_code == 200
        assert client.post("/api/chat", json=call, headers={"Authorization": "Bearer other"}).status_code == 200
