"""The nemesis: everything that may break does, at random, under load; what is promised holds all the while and afterwards.

MLXD_NEMESIS_S seconds in all (60; `make nemesis`: an hour), MLXD_NEMESIS_SEED to repeat the faults of a run: it is printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from asking import Answer, Question, ask
from conftest import Daemon, eventually
from known_answers import KNOWN, LONG, UNICODE

from mlxd import control
from mlxd.errors import MlxdError

NEMESIS_S = float(os.environ.get("MLXD_NEMESIS_S", "60"))
SEED = int(os.environ.get("MLXD_NEMESIS_SEED") or random.randrange(1_000_000))

pytestmark = pytest.mark.timeout(NEMESIS_S + 400)

#: Detection is shortened; no intensity limit, since all these deaths come from one hand; a connection waits for the next server.
SETTINGS = {
    "MLXD_HEALTH_SUSPECT_S": "3",
    "MLXD_HEALTH_FROZEN_S": "10",
    "MLXD_HEALTH_FROZEN_LOADING_S": "15",
    "MLXD_SUPERVISOR_DEATHS": "1000",
    "MLXD_SUPERVISOR_TAKEOVER_S": "3600",
    "MLX_PRELOAD_MODELS": "mlxd-tiny",
}
ANSWERS = KNOWN | LONG | UNICODE
#: What is left to a request when no more faults come.
END_S = 120.0

GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n[[[[[[[[[",
    b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n",
    b"\r\n" * 1000,
    b"",
]


class Clients:
    """A load of questions whose answers are known, in both dialects, streamed and whole; some clients hang up."""

    def __init__(self, port: int, count: int):
        self.port = port
        self.open: set[Answer] = set()
        self.done: list[Answer] = []
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(random.Random(f"{SEED}-{n}"),), daemon=True) for n in range(count)]
        for thread in self.threads:
            thread.start()

    def run(self, chance: random.Random) -> None:
        while not self.stopping.wait(chance.uniform(0, 0.3)):
            text = chance.choice(list(LONG if chance.random() < 0.5 else ANSWERS))
            question = Question(text, chance.choice(["ollama", "openai"]), stream=chance.random() < 0.8)
            answer = Answer(question)
            self.open.add(answer)
            leaves = question.stream and chance.random() < 0.2
            ask(self.port, question, chance.randrange(20) if leaves else None, answer, timeout_s=END_S)
            self.done.append(answer)
            self.open.discard(answer)

    def end(self) -> None:
        """No more questions; those that are open are waited for."""
        self.stopping.set()
        for thread in self.threads:
            thread.join(END_S + 30)


class Nemesis:
    """Draws a fault every second or so. `excused`: spans of time in which a server or supervisor was killed: what it carried may be lost.
    `ends`: the exit records, of which mlxd keeps the last 50."""

    def __init__(self, daemon: Daemon, clients: Clients, name: str):
        self.daemon = daemon
        self.clients = clients
        self.chance = random.Random(f"{SEED}-{name}")
        self.excused: list[tuple[float, float]] = []
        self.ends: dict[tuple[str, int], dict[str, Any]] = {}
        self.begun = time.monotonic()
        self.story: list[str] = []

    def run(self, faults: dict[Callable[[Nemesis], object], int], seconds: float) -> None:
        """`faults`: how often each is drawn, beside the others."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(self.chance.uniform(0.3, 1.5))
            if self.chance.random() < 0.5:  # else nothing would ever be hit in mid-answer
                self.await_text(end)
            (fault,) = self.chance.choices(list(faults), list(faults.values()))
            what = fault(self)
            self.story.append(f"{time.monotonic() - self.begun:7.2f} s  {fault.__name__}  {what or ''}")
            self.check()

    def await_text(self, until: float) -> None:
        """Until some answer goes on or ends."""
        since = time.monotonic()
        while time.monotonic() < until:
            if any(
                max(answer.moved[-1:] + [answer.ended]) > since for answer in [*list(self.clients.open), *self.clients.done[-4:]]
            ):
                return
            time.sleep(0.02)

    def processes(self, kind: str) -> list[psutil.Process]:
        found = []
        for process in self.daemon.ours():
            with contextlib.suppress(psutil.Error):
                if f"mlxd.{kind}" in process.cmdline():
                    found.append(process)
        return found

    def told(self) -> str:
        answers = Counter(answer.outcome for answer in self.clients.done)
        return "\n".join([f"seed {SEED}, {dict(answers)}", *self.story, self.daemon.history()])

    # --- what must be true --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """At any moment."""
        told = self.daemon.status()
        models = Counter(e["model"] for e in told.get("engines", []) if e["model"] and e["state"] in ("loading", "ready"))
        assert all(count == 1 for count in models.values()), f"{models}\n{self.told()}"
        where = self.daemon.paths
        with contextlib.suppress(FileNotFoundError):  # the nemesis has just removed it
            json.loads(where.state.read_text())
        self.read_ends(where.exits)
        with contextlib.suppress(FileNotFoundError):
            assert where.pid_file.read_text().strip().isdigit()
        assert not self.wrong(), f"{self.wrong()[:2]}\n{self.told()}"

    def read_ends(self, file: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.ends |= {(end["ts"], end["pid"]): end for end in map(json.loads, file.read_text().splitlines())}

    def wrong(self) -> list[str]:
        """What was answered otherwise, or not at all, though nothing excuses it."""
        found = []
        for answer in list(self.clients.done):
            question, expected = answer.question, ANSWERS[answer.question.text]
            if answer.outcome == "answered" and answer.text != expected:
                found.append(f"{question} was answered {answer.text!r}")
            elif answer.outcome != "answered" and not expected.startswith(answer.text):
                found.append(f"{question} began with {answer.text!r}")
            elif answer.outcome in ("failed", "refused") and not self.excuses(answer):
                begun = f"asked at {answer.asked - self.begun:.2f} s, over at {answer.ended - self.begun:.2f} s"
                found.append(f"{question} {answer.outcome}: {answer.why}; {begun}")
        return found

    def excuses(self, answer: Answer) -> bool:
        if "the engine died 3 times in a row" in answer.why:
            return self.is_condemned(answer) or any(map(self.is_condemned, self.alike_before(answer)))
        return any(answer.asked <= until and answer.ended >= since for since, until in self.excused)

    def is_condemned(self, answer: Answer) -> bool:
        """Whether it was given up because three engines died under it: their signals came from here, and look like its fault."""
        return self.deaths_since((answer.moved or [answer.asked])[-1]) >= 3

    def alike_before(self, answer: Answer) -> list[Answer]:
        """Those who asked the same and were refused: for ten minutes nobody's request for it is let in."""
        return [
            other
            for other in self.clients.done
            if "the engine died 3 times in a row" in (other.why or "")
            and other.question.text == answer.question.text
            and other.ended <= answer.asked
        ]

    def deaths_since(self, moment: float) -> int:
        """Ends of engines with a model that look as if a request had caused them, since just before a moment of the monotonic clock."""
        since = time.time() - (time.monotonic() - moment) - 1.0
        guilty = [end for end in self.ends.values() if end["model"] and end["cause"] in ("aborted", "segfault")]
        return sum(datetime.fromisoformat(end["ts"]).timestamp() > since for end in guilty)

    def finish(self) -> None:
        """When no more faults come, all is answered and all is well."""
        for process in self.daemon.ours():
            with contextlib.suppress(psutil.Error):
                process.resume()
        self.clients.end()
        assert not self.clients.open, f"never ended: {[(a.question, a.text[-40:]) for a in self.clients.open]}\n{self.told()}"
        assert all(answer.outcome for answer in self.clients.done)
        self.check()
        settled = eventually(self.settled, "one server, one engine of the model, all ready", self.told)
        question = next(iter(KNOWN))
        assert ask(settled["port"], Question(question)).text == KNOWN[question]
        health = json.loads(self.daemon.get("/health")[2])
        assert health["queue"] == {"running": 0, "waiting": 0}, self.told()
        counts = Counter(answer.outcome for answer in self.clients.done)
        faults = Counter(line.split()[2] for line in self.story)
        print(f"seed {SEED}: {dict(counts)} under {dict(faults)}")
        assert counts["answered"] > 0

    def settled(self) -> dict[str, Any] | None:
        told = self.daemon.status()
        engines = [e["state"] for e in told.get("engines", []) if e["model"]]
        if engines != ["ready"] or told["server"]["state"] != "ready" or len(self.processes("server")) != 1:
            return None
        mine = [told["supervisor"]["pid"], told["server"]["pid"], *(e["pid"] for e in told["engines"])]
        return told if sorted(mine) == sorted(process.pid for process in self.daemon.ours()) else None

    # --- the faults: each says what it did --------------------------------------------------------------------------------------------

    def hit_engine(self) -> str:
        name = self.chance.choice(["SIGKILL", "SIGABRT", "SIGSEGV", "SIGSTOP"])
        pids = [e["pid"] for e in self.daemon.status()["engines"] if e["pid"]]
        for pid in self.chance.sample(pids, min(len(pids), self.chance.choice([1, 1, 2]))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, getattr(signal, name))
        return f"{name} {pids}"

    def restart(self) -> str:
        return self.tell("restart")

    def replace_supervisor(self) -> str:
        return self.tell("restart_supervisor")

    def tell(self, verb: str) -> str:
        try:
            control.ask(self.daemon.paths.control, verb, timeout_s=60)
        except MlxdError as refused:  # the configuration is invalid just now
            return str(refused)
        return ""

    def pause_all(self) -> str:
        """As a laptop that is closed: everything stands still, then goes on."""
        seconds = self.chance.uniform(0.5, 8)
        processes = self.daemon.ours()
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.suspend()
        time.sleep(seconds)
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.resume()
        return f"{seconds:.1f} s"

    def hang_up(self) -> str:
        """SIGHUP: read the configuration again."""
        times = self.chance.choice([1, 50])
        for _ in range(times):
            self.daemon.signal(signal.SIGHUP)
        return f"{times} times"

    def rewrite_config(self) -> str:
        text = self.chance.choice(
            [
                "[health]\nmisses = 4\n",
                "[health]\nmisses = 3\n",
                "[server]\nmax_concurrent = 16\n",
                "[health]\nmisses = 77\n",
                "%!",
                "",
            ]
        )
        self.daemon.paths.config.write_text(text)
        return repr(text)

    def remove_file(self) -> str:
        where = self.daemon.paths
        files = [where.pid_file, where.lock, where.state, where.exits, *where.logs.glob("*.log"), *where.run.glob("engine-*.sock")]
        file: Path = self.chance.choice(files)
        gone = file.with_name("removed")
        with contextlib.suppress(FileNotFoundError):
            file.rename(gone)
            if file == where.exits:  # what an excuse may rest on
                self.read_ends(gone)
            gone.unlink()
        return file.name

    def throw_garbage(self) -> str:
        for _ in range(20):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.clients.port), timeout=5) as sock:
                data = self.chance.choice([*GARBAGE, self.chance.randbytes(500)])
                sock.sendall(data)
                if self.chance.random() < 0.5:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset
                else:
                    sock.shutdown(socket.SHUT_WR)
                    sock.settimeout(0.2)
                    sock.recv(65536)
        return ""

    def kill_server(self) -> str:
        """Or ask it to end, which it does at once."""
        name = self.chance.choice(["SIGKILL", "SIGTERM", "SIGSTOP"])
        since = time.monotonic()
        for process in self.processes("server"):
            os.kill(process.pid, getattr(signal, name))
            eventually(lambda pid=process.pid: not alive(pid), "the end of the server", self.told)
        self.excused.append((since, time.monotonic()))
        return name

    def kill_supervisor(self) -> str:
        """And start it again as soon as its PID is gone: the rest of its tree may still be there."""
        since = time.monotonic()
        pid = self.daemon.status()["supervisor"]["pid"]
        os.kill(pid, signal.SIGKILL)
        self.daemon.paths.config.unlink(missing_ok=True)  # an invalid one would be a reason not to start
        eventually(lambda: not alive(pid), "the end of the supervisor", self.told)
        self.daemon.processes = [one for one in self.daemon.processes if one.poll() is None]
        self.daemon.start()
        self.daemon.until("a server", lambda told: told["server"]["state"] == "ready")
        self.excused.append((since, time.monotonic()))
        return str(pid)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


#: What costs nobody more than a pause.
HARMLESS: dict[Callable[[Nemesis], object], int] = {
    Nemesis.hit_engine: 8,
    Nemesis.restart: 2,
    Nemesis.replace_supervisor: 2,
    Nemesis.pause_all: 1,
    Nemesis.hang_up: 1,
    Nemesis.rewrite_config: 2,
    Nemesis.remove_file: 3,
    Nemesis.throw_garbage: 2,
}
#: What costs the streams that the process carried, and no more.
COSTLY: dict[Callable[[Nemesis], object], int] = {Nemesis.hit_engine: 2, Nemesis.kill_server: 4, Nemesis.kill_supervisor: 2}


@pytest.mark.parametrize(
    ("name", "faults", "part"),
    [("harmless", HARMLESS, 0.7), ("costly", COSTLY | {Nemesis.remove_file: 1, Nemesis.restart: 1}, 0.3)],
    ids=["harmless", "costly"],
)
def test_whatever_breaks_no_request_is_lost_but_those_of_a_killed_server(
    daemon: Callable[..., Daemon], home: Path, name: str, faults: dict[Callable[[Nemesis], object], int], part: float
) -> None:
    (home / "models").mkdir()
    d = daemon(server=None, engine=None, MLX_MODELS_DIR=str(home / "models"), HF_HOME=str(home / "hub"), **SETTINGS)
    # The port has to be the same again after a start.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        d.environ["MLX_API_PORT"] = str(probe.getsockname()[1])
    d.start()
    nemesis = Nemesis(d, Clients(d.ready()["port"], 4), name)
    try:
        nemesis.run(faults, part * NEMESIS_S)
        nemesis.finish()
    finally:
        nemesis.clients.stopping.set()
        for process in d.ours():
            with contextlib.suppress(psutil.Error):
                process.resume()
