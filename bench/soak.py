"""A long run of short requests of every kind: what mlxd's own processes gain by it, in memory, files and threads.

    python bench/soak.py --requests 100000

Both dialects, streams and whole answers, clients that hang up, requests that are wrong, and a kill of the engine every 5,000.
A row is printed every 10,000; what is there after the first of them is the measure. Exit status 1: a request was not answered as it
should be, or server or supervisor gained more than 5 % of memory, or descriptors or threads.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
from asking import Question, ask
from daemon import Daemon, daemon

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from known_answers import KNOWN  # noqa: E402

KILL_EVERY = 5_000
ROW_EVERY = 10_000
MOST_GROWTH = 1.05
#: Descriptors and threads come and go with what runs just then.
SLACK = 3
CLIENTS = 4

WRONG = [
    ("POST", "/api/chat", b"{", 400),
    ("POST", "/api/chat", b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}', 404),
    ("POST", "/api/generate", b'{"model": "mlxd-tiny", "prompt": "x", "options": {"temperature": "hot"}}', 400),
    ("POST", "/v1/chat/completions", b'{"model": "mlxd-tiny", "messages": 3}', 400),
    ("POST", "/v1/chat/completions", b"", 400),
    ("DELETE", "/v1/models", b"", 405),
    ("GET", "/nowhere", b"", 404),
]
RIGHT = [
    ("GET", "/api/tags", b"", 200),
    ("GET", "/api/ps", b"", 200),
    ("GET", "/v1/models", b"", 200),
    ("GET", "/health", b"", 200),
    ("POST", "/api/show", b'{"model": "mlxd-tiny"}', 200),
]


class Run:
    """Requests from some clients at once. `amiss`: what was not answered as it should be."""

    def __init__(self, port: int, seed: int):
        self.port = port
        self.chance = random.Random(seed)
        self.amiss: list[str] = []

    def go(self, requests: int) -> None:
        """So many more."""
        left = itertools.count()
        seeds = [self.chance.random() for _ in range(CLIENTS)]
        clients = [threading.Thread(target=self.client, args=(left, requests, random.Random(seed))) for seed in seeds]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    def client(self, left: itertools.count[int], requests: int, chance: random.Random) -> None:
        while next(left) < requests:
            draw = chance.random()
            if draw < 0.15:
                self.plain(*chance.choice(WRONG))
            elif draw < 0.25:
                self.plain(*chance.choice(RIGHT))
            else:
                self.question(chance, leaves=draw > 0.85)

    def question(self, chance: random.Random, leaves: bool) -> None:
        text = chance.choice(list(KNOWN)) if chance.random() < 0.5 else f"What is {chance.randrange(10**9)}?"
        stream = leaves or chance.random() < 0.5
        dialect = chance.choice(["ollama", "generate", "openai"])
        question = Question(text, dialect, stream, chance.choice([0.0, 0.8]), chance.randrange(2**31), chance.randint(1, 4))
        answer = ask(self.port, question, leave_after=chance.choice([0, 1]) if leaves else None)
        if answer.outcome not in ("answered", "left"):
            self.amiss.append(f"{question}: {answer.outcome} {answer.why}")

    def plain(self, method: str, path: str, body: bytes, expected: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            response.read()
            if response.status != expected:
                self.amiss.append(f"{method} {path}: {response.status} instead of {expected}")
        except (OSError, http.client.HTTPException) as error:
            self.amiss.append(f"{method} {path}: {error!r}")
        finally:
            connection.close()


class Sizes:
    """Memory, descriptors and threads of one process."""

    def __init__(self, pid: int):
        process = psutil.Process(pid)
        self.pid = pid
        self.resident = process.memory_info().rss
        self.files = process.num_fds()
        self.threads = process.num_threads()

    def grown(self, first: Sizes) -> bool:
        more = self.files > first.files + SLACK or self.threads > first.threads + SLACK
        return more or self.resident > MOST_GROWTH * first.resident

    def row(self) -> str:
        return f"{self.resident / 1e6:8.2f} MB {self.files:5} {self.threads:7}"


def kill_engine(one: Daemon) -> None:
    """The one with the model; waits until it is ready first."""
    while (pid := one.engine()) is None:
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    step = min(KILL_EVERY, max(1, args.requests // 4))
    row = 2 * step

    with daemon() as one:
        one.command("start")
        status = one.status()
        run = Run(status["port"], args.seed)
        print(f"{args.requests} requests, {CLIENTS} at once, seed {args.seed}; an engine is killed every {step}")
        print(f"{'':23}{'server':^25}   {'supervisor':^25}")
        print("requests  amiss      /s     resident files threads      resident files threads", flush=True)
        first: list[Sizes] = []
        now: list[Sizes] = []
        begun = time.monotonic()
        for done in range(step, args.requests + 1, step):
            run.go(step)
            if done % row == 0:
                time.sleep(2)  # what was cancelled ends
                now = [Sizes(status[name]["pid"]) for name in ("server", "supervisor")]
                first = first or now
                rate = row / (time.monotonic() - begun)
                print(f"{done:8}  {len(run.amiss):5}  {rate:6.1f}  {now[0].row()}   {now[1].row()}", flush=True)
                begun = time.monotonic()
            kill_engine(one)
    for what in run.amiss[:10]:
        print(f"  e.g. {what}")
    grown = any(last.grown(before) for last, before in zip(now, first, strict=True))
    if args.requests < 2 * ROW_EVERY:
        print("too few requests to judge growth")
        grown = False
    else:
        more = [f"{100 * (last.resident / before.resident - 1):+.1f} %" for last, before in zip(now, first, strict=True)]
        print(f"since the first row: server {more[0]}, supervisor {more[1]}")
    sys.exit(1 if run.amiss or grown else 0)


if __name__ == "__main__":
    main()
