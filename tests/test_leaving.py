"""Clients that leave at any moment, and engines that fall silent: nobody holds a place for who is not there any more."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from known_answers import LONG
from server_client import PATIENCE_S, Background, Engine, Supervised, supervised, until

from mlxd import messages
from mlxd.api.service import Service
from mlxd.config import Config
from mlxd.journal import Entry, Request
from mlxd.messages import EngineUp, Loaded, Pulse, Stalled
from mlxd.models import BUILTIN
from mlxd.pool import PAUSE_S, Connection, Job

#: How many clients leave; the long form is for `make test-full`.
FEW, MANY = 48, 200
LEAVING = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=[pytest.mark.full, pytest.mark.timeout(600)])]
PATHS = ["/api/chat", "/api/generate", "/v1/chat/completions"]
#: Queued behind one another, in load, in prefill, in decode, alone under suspicion.
ASKED = [("tiny", "n=1000 delay=0.02"), ("tiny", "n=3 first=5"), ("tiny", "hang"), ("held", "n=1"), ("tiny", "n=9 poison")]


def begin(server: Supervised, path: str, model: str, text: str, stream: bool) -> socket.socket:
    """A request that has been sent, and of whose answer nothing has been read."""
    asked = {"prompt": text} if path == PATHS[1] else {"messages": [{"role": "user", "content": text}]}
    body = json.dumps({"model": model, "stream": stream} | asked).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)
    sock.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body)) + body)
    return sock


def running(engine: Engine) -> int:
    """Jobs, as the engine itself counts them."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(str(engine.path))
        with sock.makefile("rb") as frames:
            while True:
                (length,) = messages.LENGTH.unpack(frames.read(messages.LENGTH.size))
                message = messages.from_engine.decode(frames.read(length))
                if isinstance(message, Pulse):
                    return message.counters.running


def leave_all(server: Supervised, count: int, asked: list[tuple[str, str]], longest_s: float) -> None:
    """`count` clients, eight at a time, each leaving after a random time."""
    chance = random.Random(count)
    plans = [
        (chance.choice(PATHS), *chance.choice(asked), chance.random() < 0.5, chance.random() * longest_s) for _ in range(count)
    ]

    def work(mine: list[Any]) -> None:
        for path, model, text, stream, wait_s in mine:
            with begin(server, path, model, text, stream):
                time.sleep(wait_s)

    for call in [Background(lambda number=number: work(plans[number::8])) for number in range(8)]:
        call.result()


def nothing_is_left(server: Supervised) -> bool:
    told = server.health()
    return told["queue"] == {"running": 0, "waiting": 0} and told["requests"]["in_hand"] == 0


@pytest.mark.parametrize("count", LEAVING)
def test_clients_leave_in_every_phase_and_nothing_is_left_of_them(home: Path, count: int) -> None:
    with supervised(home, ("tiny", "held"), server={"max_concurrent": 4, "poison_s": 0}) as server:
        server.pause_s = 0.3
        ending = threading.Event()

        def kill() -> None:
            while not ending.wait(1.0):
                if engine := server.engine("tiny:latest"):
                    engine.process.kill()

        killer = Background(kill)
        leave_all(server, count, ASKED, 0.8)
        ending.set()
        killer.result()
        until("an empty house", lambda: nothing_is_left(server), server.told)
        with server.client() as client:
            call = {"model": "tiny", "messages": [{"role": "user", "content": "n=2"}], "stream": False}
            assert client.post("/api/chat", json=call).json()["message"]["content"] == "w0 w1 "
        engine = server.engine("tiny:latest")
        assert engine is not None
        until("an idle engine", lambda: running(engine) == 0, server.told)
        assert all(one["running"] == 0 for one in server.health()["engines"])


@pytest.mark.parametrize("count", LEAVING)
def test_the_real_engine_computes_nothing_for_clients_that_have_left(count: int) -> None:
    asked = [("mlxd-tiny", question) for question in LONG]
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home), (), models={"preload": None}) as server:
        until("the engine", lambda: [one["state"] for one in server.health()["engines"]] == ["ready"], server.told)
        leave_all(server, count, asked, 0.2)
        until("an empty house", lambda: nothing_is_left(server), server.told)
        until("an idle engine", lambda: running(server.engines[0]) == 0, server.told)
        assert len(server.engines) == 1


# --- engines that say nothing ------------------------------------------------------------------------------------------------------


def test_an_engine_that_says_nothing_of_its_jobs_is_reported_once(home: Path) -> None:
    with supervised(home, health={"silent_s": 3}) as server:
        busy = begin(server, PATHS[0], "tiny", "n=300 delay=0.05", True)
        server.let_pass(beats=4)
        assert server.count(Stalled) == 0
        busy.close()
        with begin(server, PATHS[0], "tiny", "hang", True):
            told = server.expect("the report", lambda word: isinstance(word, Stalled))
            assert told.engine == server.engines[0].number
            server.let_pass(beats=3)
            assert server.count(Stalled) == 1


def test_a_server_that_was_stopped_itself_does_not_blame_an_engine() -> None:
    async def run() -> None:
        said: list[Any] = []
        service = Service(Config(), said.append)
        pool = service.pool
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        model = await service.find(BUILTIN)
        engine = pool.engine(model)
        engine.state, engine.up = "ready", EngineUp(7, 1, BUILTIN, "")
        connection = engine.connection = Connection(reader, writer, Loaded(pid=1, model=BUILTIN, context_length=1))
        connection.jobs[1] = Job(1, Entry(service.journal, Request(model=model), 0))
        silent = pool.clock() - pool.config.health.silent_s - 1
        connection.heard_at, pool.swept_at = silent, pool.clock() - PAUSE_S - 2
        pool.sweep()
        pool.sweep()
        assert said == []
        connection.heard_at = silent
        pool.sweep()
        pool.sweep()
        assert said == [Stalled(7)]
        writer.close()
        theirs.close()

    asyncio.run(run())
