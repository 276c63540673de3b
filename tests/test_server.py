"""The server process: its life on the link, requests over dying engines, leaving clients, drains. Real processes, real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from known_answers import KNOWN
from server_client import Background, Supervised, many_files, supervised, until

from mlxd.messages import Beat, Bye, Drain, EngineDown, Exited, ExitRecord, Hello, Ready, Release, Stop, Want


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}]} | more


def content(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["message"]["content"]  # type: ignore[no-any-return]


def words(n: int) -> str:
    return "".join(f"w{i} " for i in range(n))


def joined(lines: list[str]) -> str:
    return "".join(json.loads(line)["message"]["content"] for line in lines)


def ask(
    server: Supervised, text: str, headers: dict[str, str] | None = None, path: str = "/api/chat", **more: Any
) -> httpx.Response:
    with server.client() as client:
        return client.post(path, json=chat(text, stream=False) | more, headers=headers)


def asking(server: Supervised, text: str, headers: dict[str, str] | None = None, **more: Any) -> Background:
    return Background(lambda: ask(server, text, headers, **more))


@contextlib.contextmanager
def streaming(server: Supervised, text: str, path: str = "/api/chat", **more: Any) -> Iterator[Iterator[str]]:
    with server.client() as client, client.stream("POST", path, json=chat(text, stream=True) | more) as answer:
        assert answer.status_code == 200
        yield (line for line in answer.iter_lines() if line)


def hanging(server: Supervised) -> socket.socket:
    """A client whose request has no end before it closes."""
    body = json.dumps(chat("hang")).encode()
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return sock


def queue(server: Supervised) -> tuple[int, int]:
    told = server.health()["queue"]
    return told["running"], told["waiting"]


def spoken(server: Supervised, kind: type) -> list[Any]:
    return [word for word in server.words if isinstance(word, kind)]


# --- on the link -------------------------------------------------------------------------------------------------------------------


def test_it_says_hello_then_ready_and_beats_with_moving_counters(home: Path) -> None:
    with supervised(home) as server:
        hello, ready = [word for word in server.words if not isinstance(word, Beat)][:2]
        assert isinstance(hello, Hello)
        assert (hello.kind, hello.pid, hello.nonce) == ("server", server.process.pid, "n0nce")
        assert isinstance(ready, Ready)
        ask(server, "n=3")
        beat = server.expect("a beat that counts", lambda word: isinstance(word, Beat) and word.counters.finished == 1)
        assert beat.counters.emitted == 3
        assert server.health()["nonce"] == "n0nce"


def test_it_never_loads_mlx(home: Path) -> None:
    with supervised(home) as server:
        ask(server, "n=1")
        if sys.platform == "linux":
            assert "libmlx" not in Path(f"/proc/{server.process.pid}/maps").read_text()
        assert psutil.Process(server.process.pid).memory_info().rss < 60 * 2**20


def test_the_app_can_be_imported_anywhere_without_side_effects_and_without_mlx(tmp_path: Path) -> None:
    code = "import sys; from mlxd.server import app; assert not [m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm')]; print(app)"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_imported_app_without_a_supervisor_says_what_is_missing(tmp_path: Path) -> None:
    from mlxd.server import app

    async def get(path: str, body: bytes = b"") -> tuple[int, bytes]:
        sent: list[Any] = []
        scope = {"type": "http", "method": "POST" if body else "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
        scope |= {"headers": [(b"host", b"localhost")], "http_version": "1.1"}

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)
        return sent[0]["status"], sent[1]["body"]

    assert asyncio.run(get("/api/version"))[0] == 200
    assert asyncio.run(get("/health"))[0] == 503
    status, body = asyncio.run(get("/api/generate", b'{"model":"mlxd-tiny"}'))
    assert status in (400, 503)  # 400: the built-in model is not there yet
    assert status == 400 or b"mlxd start" in body


def test_the_last_exit_is_told(home: Path) -> None:
    with supervised(home) as server:
        record = ExitRecord(
            ts="2026-01-01T00:00:00Z", child="engine", slot=1, pid=7, model="m", cause="killed", signal=9, code=None, up_s=1.5,
            memory_bytes=1, running=2, text="x" * 5000, stack="secret",
        )  # fmt: skip
        server.say(Exited(record))
        told = until("the record", lambda: server.health()["last_exit"], server.told)
        assert (told["pid"], told["signal"], told["code"], len(told["text"])) == (7, 9, None, 2000)
        assert "stack" not in told


def test_a_terminated_server_ends_at_once_and_in_order(home: Path) -> None:
    with supervised(home) as server, streaming(server, "n=1000 delay=0.05") as lines:
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = list(lines)
        assert json.loads(rest[-1]) == {"error": "the server is being stopped or replaced; please try again"}
        assert server.process.wait(20) == 0
        server.expect("bye", lambda word: isinstance(word, Bye) and word.cause == "stopped")


def test_stop_ends_it_like_a_signal(home: Path) -> None:
    with supervised(home) as server:
        server.say(Stop())
        assert server.process.wait(20) == 0


def test_a_server_whose_supervisor_is_gone_ends_within_seconds_but_not_in_mid_sentence(home: Path) -> None:
    with supervised(home) as server, streaming(server, "n=20 delay=0.05") as lines:
        next(lines)
        server.ending = True
        server.servers[0].desert()
        assert joined(list(lines)) == words(20)[len("w0 ") :]
        assert server.process.wait(20) == 0


# --- models on demand ----------------------------------------------------------------------------------------------------------------


def test_the_first_request_loads_a_model_and_later_ones_join(home: Path) -> None:
    with supervised(home, ("held",)) as server:
        calls = [asking(server, "n=2", model="held") for _ in range(5)]
        until("five in the queue", lambda: queue(server) == (0, 5), server.told)
        assert server.health()["engines"][0]["state"] == "loading"
        assert len(spoken(server, Want)) == 1
        server.let_up()
        assert [content(call.result()) for call in calls] == [words(2)] * 5


def test_waiting_for_a_load_is_not_waiting_in_the_queue(home: Path) -> None:
    with supervised(home, ("held",), server={"queue_wait_s": 0.2}) as server:
        call = asking(server, "n=1", model="held")
        until("a beat after the queue's time", lambda: len(spoken(server, Beat)) >= 2, server.told)
        server.let_up()
        assert content(call.result()) == words(1)


def test_what_is_preloaded_is_wanted_at_the_start(home: Path) -> None:
    with supervised(home, ("a", "b"), models={"preload": ["a", "nope"]}) as server:
        want = spoken(server, Want)
        assert [(word.model, word.preload) for word in want] == [("a:latest", True)]
        assert want[0].directory == str(home / "models" / "a")
        told = server.health()
        assert (told["status"], told["reason"]) == ("degraded", "model 'nope' not found")


def test_without_other_models_the_builtin_one_is_preloaded_and_beside_others_nothing(home: Path) -> None:
    with supervised(home, (), models={"preload": None}) as server:
        assert [word.model for word in spoken(server, Want)] == ["mlxd-tiny:latest"]
        server.close()
    other = home / "other"
    other.mkdir()
    with supervised(other, ("a",), models={"preload": None}) as server:
        assert spoken(server, Want) == []


def test_health_is_loading_until_the_preloaded_model_is_there(home: Path) -> None:
    with supervised(home, ("held",), models={"preload": ["held"]}) as server, server.client() as client:
        assert client.get("/health").json()["status"] == "loading"
        assert (client.get("/health").status_code, client.get("/health/ready").status_code) == (200, 503)
        assert client.get("/health/live").status_code == 200
        server.let_up()
        until("ok", lambda: client.get("/health").json()["status"] == "ok", server.told)
        assert client.get("/health/ready").status_code == 200


def test_a_model_that_cannot_be_loaded_gives_its_reason_each_time(home: Path) -> None:
    with supervised(home, ("refused",)) as server:
        for _ in range(2):
            answer = ask(server, "n=1", model="refused")
            sentence = "model 'refused:latest' cannot be loaded: refused:latest is broken: a tensor is missing"
            assert (answer.status_code, answer.json()["error"]) == (400, sentence)
        assert len(spoken(server, Want)) == 2


def test_a_model_that_is_tried_again_much_later_is_a_503_that_says_when(home: Path) -> None:
    with supervised(home, ("retried",), models={"preload": ["retried"]}) as server:
        answer = ask(server, "n=1", model="retried")
        assert (answer.status_code, "it died 5 times" in answer.json()["error"]) == (503, True)
        assert 290 <= int(answer.headers["retry-after"]) <= 300
        with server.client() as client:
            health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "degraded")


def test_one_that_comes_back_soon_is_waited_for(home: Path) -> None:
    with supervised(home, ("held",)) as server:
        call = asking(server, "n=1", model="held")
        server.expect("want", lambda word: isinstance(word, Want))
        server.say(EngineDown(1, "held:latest", "killed", "retried", 1.0))
        until("the news", lambda: server.health()["engines"][0]["state"] == "retried", server.told)
        server.let_up()
        assert content(call.result()) == words(1)


def test_the_least_recently_used_idle_engine_makes_room(home: Path) -> None:
    with supervised(home, ("a", "b", "c"), models={"max_cached": 2}) as server:
        for model in ("a", "b", "a", "c"):
            assert content(ask(server, "n=1", model=model)) == words(1)
        assert [word.model for word in spoken(server, Release)] == ["b:latest"]
        assert {engine["model"] for engine in server.health()["engines"]} == {"a:latest", "c:latest"}
        events = [line for line in server.history if "released" in line or "Want(model='c" in line]
        assert "released" in events[0]  # the old one was gone before the new one was wanted


def test_a_busy_engine_is_never_released_for_another(home: Path) -> None:
    with supervised(home, ("a", "b"), models={"max_cached": 1}) as server, streaming(server, "n=30 delay=0.05", model="a") as lines:
        next(lines)
        call = asking(server, "n=1", model="b")
        until("b to wait", lambda: queue(server) == (1, 1), server.told)
        assert joined(list(lines)) == words(30)[len("w0 ") :]
        assert content(call.result()) == words(1)
        assert [word.model for word in spoken(server, Release)] == ["a:latest"]


def test_who_waits_for_a_slot_keeps_no_room_from_who_has_one(home: Path) -> None:
    settings: dict[str, Any] = {"models": {"max_cached": 1}, "server": {"max_concurrent": 1}}
    with supervised(home, ("a", "b"), **settings) as server:
        first = asking(server, "n=50 delay=0.05", model="a")
        until("a to run", lambda: queue(server) == (1, 0), server.told)
        second = asking(server, "n=2", model="b")
        until("b to wait", lambda: queue(server) == (1, 1), server.told)
        server.next = "refused"  # the one in flight, which was not there to hear of it, has it wanted once more
        server.engines[0].kill()
        assert content(first.result()) == words(50)
        assert content(second.result()) == words(2)


def test_when_every_model_stays_busy_the_wait_has_an_end(home: Path) -> None:
    settings: dict[str, Any] = {"models": {"max_cached": 1}, "server": {"queue_wait_s": 0.3}}
    with supervised(home, ("a", "b"), **settings) as server, streaming(server, "n=200 delay=0.05", model="a") as lines:
        next(lines)
        answer = ask(server, "n=1", model="b")
        assert (answer.status_code, "busy" in answer.json()["error"]) == (503, True)
        assert answer.headers["retry-after"]


def test_an_unused_model_goes_after_its_keep_alive_and_a_preloaded_one_stays(home: Path) -> None:
    with supervised(home, ("a", "b"), models={"preload": ["a"], "keep_alive": "1s"}) as server:
        assert content(ask(server, "n=1", model="b")) == words(1)
        until("b released", lambda: [w.model for w in spoken(server, Release)] == ["b:latest"], server.told)
        assert content(ask(server, "n=1", model="a")) == words(1)
        ask(server, "", model="a", messages=[], keep_alive=0)
        until("a released", lambda: spoken(server, Release)[-1].model == "a:latest", server.told)
        assert content(ask(server, "n=1", model="a")) == words(1)


def test_a_request_that_meets_a_leaving_engine_gets_the_next(home: Path) -> None:
    with supervised(home) as server:
        for _ in range(5):
            assert content(ask(server, "n=1", keep_alive=0)) == words(1)
        assert len(server.engines) == 5
        assert len(spoken(server, Want)) >= 5  # one more for each engine that was wanted again and ended all the same


# --- engines die, requests do not ------------------------------------------------------------------------------------------------------


def test_a_request_whose_engine_dies_before_its_first_byte_is_sent_again(home: Path) -> None:
    with supervised(home) as server:
        call = asking(server, "n=3 first=2", options={"seed": 7})
        until("it to run", lambda: queue(server) == (1, 0) and server.health()["engines"][0]["running"] == 1, server.told)
        server.engines[0].kill()
        answer = call.result()
        assert content(answer) == words(3)
        assert answer.headers["x-mlxd-resumed"] == "1"
        assert len(server.engines) == 2


def test_a_stream_goes_on_where_it_stopped_when_the_engine_is_killed(home: Path) -> None:
    with supervised(home) as server, streaming(server, "n=60 delay=0.03") as lines:
        got = [next(lines) for _ in range(10)]
        server.engines[0].kill()
        got += [next(lines) for _ in range(20)]
        server.engines[1].kill()
        got += list(lines)
        assert joined(got) == words(60)
        assert json.loads(got[-1])["eval_count"] == 60
        assert len(server.engines) == 3


def test_a_resumed_request_goes_on_behind_the_tokens_it_has(home: Path) -> None:
    with supervised(home) as server:
        answer = ask(server, "n=10 die=4", options={"seed": 7})  # dies in the first attempt only: the second begins there
        assert content(answer) == words(10)
        assert len(server.engines) == 2


def test_a_request_that_kills_every_engine_is_given_up_and_its_neighbour_is_not(home: Path) -> None:
    with supervised(home) as server:
        neighbour = asking(server, "n=40 delay=0.05")
        until("the neighbour", lambda: queue(server) == (1, 0), server.told)
        poison = ask(server, "poison")
        assert poison.status_code == 500
        assert poison.headers["x-should-retry"] == "false"
        assert "died 3 times in a row" in poison.json()["error"]
        openai = ask(server, "poison", path="/v1/chat/completions")
        assert openai.json()["error"]["code"] == "engine_crashed"
        assert content(neighbour.result()) == words(40)


def test_an_engine_that_overran_its_deadline_for_another_request_is_not_held_against_this_one(home: Path) -> None:
    with supervised(home) as server:
        server.usual_cause = "deadline"
        call = asking(server, "poison")
        until("many deaths", lambda: len(server.engines) > 4, server.told)
        server.usual_cause = "error"
        assert "died 3 times in a row" in call.result().json()["error"]


# --- the queue ---------------------------------------------------------------------------------------------------------------------------


def test_more_than_the_slots_wait_and_more_than_the_seats_are_refused_in_each_dialect(home: Path) -> None:
    with supervised(home, server={"max_concurrent": 2, "max_queue": 2}) as server:
        calls = [asking(server, "n=8 delay=0.5") for _ in range(4)]
        until("a full house", lambda: queue(server) == (2, 2), server.told)
        native, openai = ask(server, "n=1"), ask(server, "n=1", path="/v1/chat/completions")
        anthropic = ask(server, "n=1", path="/v1/messages", max_tokens=1)
        busy = "server busy, please try again.  maximum pending requests exceeded"
        assert (native.status_code, native.json()) == (503, {"error": busy})
        assert (openai.status_code, openai.json()["error"]["message"]) == (503, busy)
        assert anthropic.json()["error"] == {"type": "overloaded_error", "message": busy}
        assert {answer.headers["retry-after"] for answer in (native, openai, anthropic)} == {"1"}
        with server.client() as client:
            assert client.get("/health").status_code == 503
            assert client.get("/api/version").status_code == 200
        assert [content(call.result()) for call in calls] == [words(8)] * 4
        assert queue(server) == (0, 0)


def test_high_priority_goes_first(home: Path) -> None:
    with supervised(home, server={"max_concurrent": 1}) as server:
        first = hanging(server)
        until("it to run", lambda: queue(server) == (1, 0), server.told)
        calls = {}
        for number, priority in enumerate(("low", "normal", "HIGH")):
            calls[priority] = asking(server, "n=1", {"X-Priority": priority})
            until(f"{priority} in the queue", lambda number=number: queue(server) == (1, number + 1), server.told)
        first.close()
        answered = {priority: call.result().json()["created_at"] for priority, call in calls.items()}
        assert sorted(answered, key=answered.__getitem__) == ["HIGH", "normal", "low"]
        wrong = ask(server, "n=1", {"X-Priority": "urgent"})
        assert (wrong.status_code, wrong.json()["error"]) == (400, "X-Priority must be high, normal or low")


def test_a_request_has_an_hour_and_no_more(home: Path) -> None:
    with supervised(home, server={"request_s": 2.0}) as server:
        answer = ask(server, "hang")
        assert (answer.status_code, answer.json()["error"]) == (504, "the request took longer than 2 s")
        with streaming(server, "n=1000 delay=0.05") as lines:
            assert json.loads(list(lines)[-1]) == {"error": "the request took longer than 2 s"}
        with streaming(server, "n=1000 delay=0.05", path="/v1/chat/completions") as lines:
            last = list(lines)[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


# --- clients leave -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("text", ["n=1000 delay=0.05", "hang"])
def test_a_client_that_leaves_frees_its_slot(home: Path, stream: bool, text: str) -> None:
    with supervised(home) as server:
        body = json.dumps(chat(text, stream=stream)).encode()
        head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(head + body)
            until("a job", lambda: any(engine["running"] for engine in server.health()["engines"]), server.told)
        left = time.monotonic()
        until("a free slot", lambda: queue(server) == (0, 0) and server.health()["engines"][0]["running"] == 0, server.told)
        assert time.monotonic() - left < 10


def test_one_that_leaves_the_queue_or_a_load_is_forgotten(home: Path) -> None:
    with supervised(home, ("tiny", "held"), server={"max_concurrent": 1}) as server, streaming(server, "n=200 delay=0.05") as lines:
        next(lines)
        socks = []
        for model in ("tiny", "held"):
            body = json.dumps(chat("n=1", model=model)).encode()
            sock = socket.create_connection(("127.0.0.1", server.port))
            sock.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            socks.append(sock)
        until("both to wait", lambda: queue(server) == (1, 2), server.told)
        for sock in socks:
            sock.close()
        until("nobody to wait", lambda: queue(server) == (1, 0), server.told)


def test_sixteen_streams_at_once_all_end_and_half_of_them_may_leave(home: Path) -> None:
    with supervised(home) as server:

        def stay(number: int) -> str:
            with streaming(server, f"n={20 + number} delay=0.01") as lines:
                return joined(list(lines))

        def leave(number: int) -> None:
            with streaming(server, "n=500 delay=0.01") as lines:
                for _ in range(5):
                    next(lines)

        calls = [(number, Background(lambda number=number: (stay if number % 2 else leave)(number))) for number in range(16)]
        for number, call in calls:
            assert call.result() == (words(20 + number) if number % 2 else None)
        until("free slots", lambda: queue(server) == (0, 0), server.told)


def test_a_client_that_does_not_read_costs_little_memory_and_no_neighbour(home: Path) -> None:
    with supervised(home) as server:
        process = psutil.Process(server.process.pid)
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            assert content(ask(server, "n=1")) == words(1)
            before = process.memory_info().rss
            body = json.dumps(chat("n=200000 size=1000")).encode()
            sock.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            until("its job", lambda: server.health()["engines"][0]["running"] == 1, server.told)
            until("its job to be cancelled", lambda: server.health()["engines"][0]["running"] == 0, server.told, 60)
            assert content(ask(server, "n=5")) == words(5)
            assert process.memory_info().rss - before < 64 * 2**20
        until("a free slot", lambda: queue(server) == (0, 0), server.told)


# --- being replaced --------------------------------------------------------------------------------------------------------------------------


def test_a_drained_server_ends_what_it_has_and_takes_nothing_new(home: Path) -> None:
    with supervised(home) as server, streaming(server, "n=40 delay=0.05") as lines, server.client() as idle:
        next(lines)
        assert idle.get("/api/version").headers.get("connection") != "close"
        old = server.servers[0]
        server.start()  # the next one accepts before the first is told to go
        old.say(Drain(20))
        told = until("connections to be closed", lambda: idle.get("/api/version").headers.get("connection"), server.told)
        assert told == "close"
        assert joined(list(lines)) == words(40)[len("w0 ") :]
        assert old.process.wait(20) == 0
        until("its bye", lambda: isinstance(old.words[-1], Bye), server.told)
        assert content(ask(server, "n=2")) == words(2)
        assert len(server.engines) == 1  # the next server has adopted it


def test_a_stream_longer_than_the_drain_ends_with_its_dialects_error(home: Path) -> None:
    with (
        supervised(home) as server,
        streaming(server, "n=1000 delay=0.05") as native,
        streaming(server, "n=1000 delay=0.05", path="/v1/chat/completions") as openai,
    ):
        next(native), next(openai)
        hanging = asking(server, "hang")
        until("all three", lambda: queue(server) == (3, 0), server.told)
        server.say(Drain(0.5))
        assert "stopped or replaced" in json.loads(list(native)[-1])["error"]
        error = json.loads(list(openai)[-1].removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == ("stopping", "api_error")
        answer = hanging.result()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert server.process.wait(20) == 0


def test_no_connection_is_refused_or_reset_while_servers_replace_each_other(home: Path) -> None:
    with supervised(home) as server:
        assert content(ask(server, "n=1")) == words(1)
        ending = threading.Event()
        failures: list[str] = []
        served: list[int] = []

        def hammer(keep: bool) -> None:
            client = server.client()
            while not ending.is_set():
                try:
                    assert content(client.post("/api/chat", json=chat("n=2", stream=False))) == words(2)
                    served.append(1)
                except Exception as error:  # every one is a failure of the server, and is counted
                    failures.append(repr(error))
                if not keep:
                    client.close()
                    client = server.client()
            client.close()

        threads = [threading.Thread(target=hammer, args=(number % 2 == 0,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            old = server.servers[-1]
            server.start()
            old.say(Drain(20))
            assert old.process.wait(20) == 0
        ending.set()
        for thread in threads:
            thread.join()
        assert failures == [], server.told()
        assert len(served) > 20


# --- with the real engine ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Iterator[Supervised]:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home), (), models={"preload": None}) as server:
        yield server


def answer_of(server: Supervised, question: str, path: str = "/api/chat", **options: Any) -> str:
    call: dict[str, Any] = {"model": "mlxd-tiny", "messages": [{"role": "user", "content": question}], "stream": False}
    call |= {"options": options} if path == "/api/chat" else options
    with server.client() as client:
        answer = client.post(path, json=call)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    return told["message"]["content"] if path == "/api/chat" else told["choices"][0]["message"]["content"]  # type: ignore[no-any-return]


def test_the_real_engine_gives_its_known_words_in_both_dialects_alone_and_all_at_once(real: Supervised) -> None:
    known = dict(list(KNOWN.items())[:16])
    for question, answer in list(known.items())[:3]:
        assert answer_of(real, question, temperature=0) == answer
        assert answer_of(real, question, "/v1/chat/completions", temperature=0) == answer
    calls = {question: Background(lambda question=question: answer_of(real, question, temperature=0)) for question in known}
    assert {question: call.result() for question, call in calls.items()} == known


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "seeded"])
def test_an_answer_of_the_real_engine_survives_a_kill_in_mid_sentence_word_for_word(
    real: Supervised, options: dict[str, Any]
) -> None:
    question = max(KNOWN, key=lambda question: len(KNOWN[question]))
    calm = answer_of(real, question, **options)
    with streaming(real, question, model="mlxd-tiny", options=options) as lines:
        got = [next(lines) for _ in range(4)]
        real.engines[-1].kill()
        got += list(lines)
    assert joined(got) == calm


def test_a_prompt_longer_than_the_context_is_a_400_that_says_so(real: Supervised) -> None:
    for path in ("/api/chat", "/v1/chat/completions"):
        answer = ask(real, "What is mlxd? " * 3000, path=path, model="mlxd-tiny")
        assert (answer.status_code, "context" in answer.text) == (400, True)


# --- many connections --------------------------------------------------------------------------------------------------------------------


def test_a_crowd_is_told_in_json(home: Path) -> None:
    with many_files(2048), supervised(home) as server:
        crowd = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(961)]
        status, head, body = server.raw(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (status, body) == (503, b'{"error":"too many connections"}')
        assert b"retry-after: 1" in head.lower()
        assert server.raw(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200
        for sock in crowd:
            sock.close()
        until("room", lambda: server.raw(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200, server.told)
