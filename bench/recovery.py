"""Kill the process that holds the model, again and again, under streams that must not notice more than a pause.

    python bench/recovery.py --kills 200 --clients 8
    python bench/recovery.py --kills 50 --peer         # mlx_lm.server under supervisord, where both are installed
    python bench/recovery.py --kills 100 --supervisor  # kill -9 the supervisor instead, each time followed by `mlxd recover`

Clients ask one question after the other; whatever comes is compared, byte for byte, with the answer nobody disturbed. Each kill
waits until every stream that was open at the last one has moved again or ended, and then for an instant drawn from 0-3 s.
Exit status 1: something failed, was refused or wrong, or a killed process was not replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
from asking import Answer, Question, ask
from daemon import MLXD, daemon
from throughput import CONCURRENCY, ended, free_port, percentile

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from known_answers import LONG, RANDOM  # noqa: E402

from mlxd import control, paths, probe  # noqa: E402

BUILTIN = HERE.parent / "mlxd" / "builtin"
SIGNALS = ("KILL", "ABRT", "SEGV", "STOP")
#: A kill comes at most this long after the streams have moved again.
WITHIN_S = 3.0
#: What a killed process had already sent reaches the client within this time of its end; what comes later is its successor's.
IN_FLIGHT_S = 0.02
#: Without a successor by then, there will be none.
PATIENCE_S = 120.0
#: A client that was refused does not come again at once.
REFUSED_PAUSE_S = 0.5


class Target(Protocol):
    name: str
    model: str
    port: int
    dialects: tuple[str, ...]

    def victim(self) -> int | None:
        """The PID of the process that holds the model, when it is ready."""

    def look(self) -> None:
        """Called after each kill."""

    def strays(self, killed: set[int]) -> list[str]:
        """Ends that nobody's kill explains, each in a few words."""


@dataclass
class Mlxd:
    port: int
    where: paths.Paths
    name: str = "mlxd"
    model: str = "mlxd-tiny"
    dialects: tuple[str, ...] = ("ollama", "openai")
    ends: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    def victim(self) -> int | None:
        engines = control.ask(self.where.control, "status", timeout_s=60)["engines"]
        return next((int(e["pid"]) for e in engines if e["model"] and e["state"] == "ready"), None)

    def look(self) -> None:
        """The file keeps the last 50 ends only."""
        if self.where.exits.exists():
            for record in map(json.loads, self.where.exits.read_text().splitlines()):
                self.ends[record["ts"], record["pid"]] = record

    def strays(self, killed: set[int]) -> list[str]:
        self.look()
        ends = [end for end in self.ends.values() if end["pid"] not in killed and end["cause"] != "stopped"]
        return [f"{end['child']} {end['cause']} after {end['up_s']} s, model {end['model']}" for end in ends]


@dataclass
class Peer:
    """mlx_lm.server is the process that holds the model and the server at once."""

    port: int
    supervisord: psutil.Process
    name: str = "mlx_lm.server under supervisord"
    model: str = "default_model"
    dialects: tuple[str, ...] = ("openai",)
    seen: set[int] = field(default_factory=set)

    def victim(self) -> int | None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
        except (urllib.error.URLError, OSError):
            return None
        self.look()
        return next((child.pid for child in self.supervisord.children()), None)

    def look(self) -> None:
        self.seen |= {child.pid for child in self.supervisord.children()}

    def strays(self, killed: set[int]) -> list[str]:
        self.look()
        return ["mlx_lm.server"] * (len(self.seen - killed) - 1)  # one runs


@contextlib.contextmanager
def mlxd(settings: dict[str, str]) -> Iterator[Target]:
    with daemon() as one:
        one.environ |= {"MLX_MAX_CONCURRENT": str(CONCURRENCY)} | settings
        one.command("start")
        yield Mlxd(one.status()["port"], paths.locate(one.environ))


SUPERVISORD = """
[supervisord]
nodaemon=true
logfile={home}/supervisord.log
pidfile={home}/supervisord.pid
[program:mlx_lm]
command={python} -m mlx_lm server --model {model} --host 127.0.0.1 --port {port} --decode-concurrency {n} --prompt-concurrency {n}
autorestart=true
startretries=1000
stdout_logfile={home}/mlx_lm.log
redirect_stderr=true
environment=HF_HUB_OFFLINE="1"
"""


@contextlib.contextmanager
def peer(program: str) -> Iterator[Target]:
    with tempfile.TemporaryDirectory(prefix="mlxd-bench-") as home:
        port = free_port()
        settings = Path(home) / "supervisord.conf"
        settings.write_text(SUPERVISORD.format(home=home, python=sys.executable, model=BUILTIN, port=port, n=CONCURRENCY))
        process = subprocess.Popen([program, "-c", settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with ended(process):
            yield Peer(port, psutil.Process(process.pid))


# --- the load ----------------------------------------------------------------------------------------------------------------------


def questions(target: Target) -> list[Question]:
    """Half of them greedy, half drawn at temperature 0.8; of some 300 tokens each, so that most kills land within an answer."""
    greedy = [Question(text, dialect, model=target.model) for text in LONG for dialect in target.dialects]
    drawn = [
        Question(text, dialect, temperature=0.8, seed=seed, tokens=300, model=target.model)
        for text in RANDOM[:2]  # of the others a few tokens come
        for seed in range(1, 1 + len(LONG) // 2)
        for dialect in target.dialects
    ]
    return greedy + drawn


class Load:
    """Clients, each asking one question after the other until `stop`."""

    def __init__(self, target: Target, clients: int, seed: int):
        self.target = target
        self.open: set[Answer] = set()
        self.done: list[Answer] = []
        self.stopping = threading.Event()
        every = questions(target)
        self.asked = random.Random(seed).sample(every, min(len(every), 3 * clients))
        with ThreadPoolExecutor(clients) as pool:
            undisturbed = list(pool.map(lambda question: ask(target.port, question), self.asked))
        if wrong := [answer for answer in undisturbed if answer.outcome != "answered"]:
            raise SystemExit(f"{target.name} does not answer even undisturbed: {wrong[0].outcome} {wrong[0].why}")
        self.expected = {answer.question.saying: answer.text for answer in undisturbed}
        self.clients = [threading.Thread(target=self.run, args=(random.Random(f"{seed}-{n}"),)) for n in range(clients)]

    def run(self, chance: random.Random) -> None:
        while not self.stopping.is_set():
            question = chance.choice(self.asked)
            if chance.random() < 0.2:
                question = Question(**(vars(question) | {"stream": False}))
            answer = Answer(question)
            self.open.add(answer)
            ask(self.target.port, question, answer=answer)
            self.done.append(answer)
            self.open.discard(answer)
            if answer.outcome == "refused":
                time.sleep(REFUSED_PAUSE_S)

    def streams(self) -> list[Answer]:
        """Those under way that have shown some text."""
        return [answer for answer in list(self.open) if answer.question.stream and answer.moved]

    def recent(self) -> list[Answer]:
        """Those under way, and as many of the last as there are clients."""
        return [*list(self.open), *self.done[-len(self.clients) :]]

    def wrong(self, answer: Answer) -> bool:
        return answer.outcome == "answered" and answer.text != self.expected[answer.question.saying]


# --- the kills ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Kill:
    """`gone`: when the process had ended; what is shown later than that comes from its successor. `back`: when that was, on any stream."""

    signal: str
    pid: int
    at: float
    streams: list[Answer]
    gone: float = 0.0
    back: float | None = None

    def next_text(self, answer: Answer) -> float | None:
        """None: not yet, or it ended by what was already on its way, or broke."""
        return next((moved for moved in list(answer.moved) if moved > self.gone + IN_FLIGHT_S), None)

    def pauses_s(self) -> list[float]:
        """From the kill to the next text, of each open stream that had one."""
        return [moved - self.at for answer in self.streams if (moved := self.next_text(answer)) is not None]

    def over(self) -> bool:
        return all(answer.outcome or self.next_text(answer) is not None for answer in self.streams)


def kill_once(target: Target, load: Load, name: str, killed: set[int]) -> Kill | None:
    """Kill what holds the model, and wait until it has ended and every open stream has moved again. None: nobody came to be killed."""
    deadline = time.monotonic() + PATIENCE_S
    while (pid := target.victim()) is None or pid in killed:
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)
    kill = Kill(name, pid, time.monotonic(), load.streams())
    os.kill(pid, getattr(signal, f"SIG{name}"))
    killed.add(pid)
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.002)
    kill.gone = time.monotonic()
    target.look()
    while time.monotonic() < deadline:
        if kill.back is None:
            kill.back = min((moved for answer in load.recent() if (moved := kill.next_text(answer)) is not None), default=None)
        if kill.back is not None and kill.over():
            break
        time.sleep(0.01)
    return kill


def run(target: Target, signals: list[str], clients: int, chance: random.Random, seed: int) -> bool:
    """Print what came of it; true if nothing was amiss."""
    deadline = time.monotonic() + PATIENCE_S
    while target.victim() is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"{target.name} is not ready after {PATIENCE_S:.0f} s")
        time.sleep(0.1)
    load = Load(target, clients, seed)
    kills: list[Kill] = []
    killed: set[int] = set()
    for client in load.clients:
        client.start()
    replaced = True
    try:
        for number, name in enumerate(signals, 1):
            time.sleep(chance.uniform(0, WITHIN_S))
            kill = kill_once(target, load, name, killed)
            if kill is None:
                print(f"after kill {number - 1} there was none to kill within {PATIENCE_S:.0f} s: given up", flush=True)
                replaced = False
                break
            kills.append(kill)
            if number % 20 == 0:
                print(f"{number} kills of {len(signals)}, {len(load.done)} requests", file=sys.stderr, flush=True)
        replaced = replaced and successor(target, killed)
    finally:
        load.stopping.set()
        for client in load.clients:
            client.join()
    return report(target, load, kills, killed, replaced)


def successor(target: Target, killed: set[int]) -> bool:
    """Whether the last one killed was replaced, too."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if (pid := target.victim()) is not None and pid not in killed:
            return True
        time.sleep(0.05)
    return False


def report(target: Target, load: Load, kills: list[Kill], killed: set[int], replaced: bool) -> bool:
    failed = [answer for answer in load.done if answer.outcome == "failed"]
    refused = [answer for answer in load.done if answer.outcome == "refused"]
    wrong = [answer for answer in load.done if load.wrong(answer)]
    strays = target.strays(killed)
    print(f"{target.name}: requests {len(load.done)}  failed {len(failed)}  refused {len(refused)}  wrong {len(wrong)}")
    successors = len(kills) if replaced else max(0, len(kills) - 1)
    print(f"kills {len(kills)}  replaced {successors}  false restarts {len(strays)}")
    print("signal  kills  open streams  broken   pause p50       p99       max   served again p50       max")
    for name in dict.fromkeys(kill.signal for kill in kills):
        mine = [kill for kill in kills if kill.signal == name]
        pauses = [pause for kill in mine for pause in kill.pauses_s()]
        back = [kill.back - kill.at for kill in mine if kill.back is not None]
        broken = sum(answer.outcome == "failed" for kill in mine for answer in kill.streams)
        words = [seconds(pauses, 50), seconds(pauses, 99), seconds(pauses, 100), " " * 9, seconds(back, 50), seconds(back, 100)]
        print(f"{name:6}  {len(mine):5}  {sum(len(kill.streams) for kill in mine):12}  {broken:6}    {'  '.join(words)}")
    for stray in strays[:5]:
        print(f"  e.g. {stray}")
    for answer in [*failed, *refused, *wrong][:3]:
        print(f"  e.g. {answer.outcome}: {answer.question.saying} {answer.why} {answer.text[-200:]!r}")
    return replaced and not (failed or refused or wrong)


# --- the supervisor --------------------------------------------------------------------------------------------------------------


def run_supervisor(kills: int, chance: random.Random) -> bool:
    """`kill -9` of the supervisor, `mlxd recover`, again and again; true if nothing was amiss."""
    with daemon() as one:
        # In life three repairs an hour are the limit.
        one.environ |= {"MLX_API_PORT": str(free_port()), "MLXD_RECOVERY_MAX_ACTIONS": str(2 * kills)}
        one.command("start")
        where = paths.locate(one.environ)
        took: list[float] = []
        failed: list[str] = []
        orphans = torn = 0
        for number in range(1, kills + 1):
            time.sleep(chance.uniform(0, 1))
            status = control.ask(where.control, "status", timeout_s=60)
            url = f"{status['url']}/health"
            before = probe.fetch(url, 10).json["nonce"]
            os.kill(status["supervisor"]["pid"], signal.SIGKILL)
            killed_at = time.monotonic()
            torn += not parses(where.state)
            recover = subprocess.Popen(
                [MLXD, "recover"], env=one.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            if next_200(url, before, recover):
                took.append(time.monotonic() - killed_at)
            words = recover.communicate()[0]
            if recover.returncode:
                failed.append(words)
                break
            torn += not parses(where.state)
            orphans += len(strays(where))
            if number % 20 == 0:
                print(f"{number} kills of {kills}", file=sys.stderr, flush=True)
        print(f"kills of the supervisor {number}  orphans {orphans}  failed recoveries {len(failed)}  torn state files {torn}")
        if took:
            print(f"next 200: p50 {seconds(took, 50).strip()}  p99 {seconds(took, 99).strip()}  max {seconds(took, 100).strip()}")
        for words in failed:
            print(f"  e.g. {words}")
        return len(took) == kills and not (orphans or failed or torn)


def parses(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except ValueError:
        return False


def next_200(url: str, before: str, recover: subprocess.Popen[str]) -> bool:
    """Whether it comes, from another run than `before`: a server whose supervisor is killed may answer once more."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        ended_already = recover.poll() is not None
        with contextlib.suppress(probe.NoReply):
            reply = probe.fetch(url, 10)
            if reply.status == 200 and reply.json.get("nonce") != before:
                return True
        if ended_already and recover.returncode:
            return False
        time.sleep(0.02)
    return False


def strays(where: paths.Paths) -> list[psutil.Process]:
    """Processes of this home that the supervisor that now runs does not know."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environ = process.environ()
            if str(where.home) in environ.get("MLXD_CHILD", "") or environ.get("MLXD_HOME") == str(where.home):
                found.append(process)
    supervisor = psutil.Process(control.ask(where.control, "status", timeout_s=60)["supervisor"]["pid"])
    known = {supervisor, *supervisor.children(recursive=True)}
    return [process for process in found if process not in known and process.is_running()]


def seconds(values: list[float], percent: float) -> str:
    return f"{percentile(values, percent):6.2f} s" if values else f"{'-':>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--signals", help=f"a comma list; all of {','.join(SIGNALS)}, with --peer all but STOP")
    parser.add_argument("--seed", type=int, help="of the kills and the questions; drawn and printed unless given")
    parser.add_argument("--frozen", type=float, help="seconds until a stopped engine is known for frozen (mlxd's default: 15)")
    parser.add_argument("--no-spare", action="store_true", help="keep no spare engine, as where memory is short")
    parser.add_argument("--supervisor", action="store_true", help="kill the supervisor instead, and run `mlxd recover`")
    parser.add_argument("--peer", action="store_true", help="mlx_lm.server under supervisord instead of mlxd")
    args = parser.parse_args()
    # supervisord does not notice that a process is stopped: its clients would wait for ever.
    names = args.signals.split(",") if args.signals else [name for name in SIGNALS if not (args.peer and name == "STOP")]
    seed = random.randrange(1_000_000) if args.seed is None else args.seed
    chance = random.Random(seed)
    if args.supervisor:
        print(
            f"built-in model, seed {seed}; {platform.system()} {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        )
        sys.exit(0 if run_supervisor(args.kills, chance) else 1)
    signals = [names[n % len(names)] for n in range(args.kills)]
    chance.shuffle(signals)
    settings = {}
    if args.frozen is not None:
        settings |= {"MLXD_HEALTH_FROZEN_S": str(args.frozen), "MLXD_HEALTH_SUSPECT_S": f"{args.frozen / 3:.1f}"}
    if args.no_spare:
        settings["MLXD_SUPERVISOR_SPARE_BYTES"] = str(2**62)
    supervisord = shutil.which("supervisord") or str(Path(sys.executable).with_name("supervisord"))
    if args.peer and not Path(supervisord).exists():
        raise SystemExit("supervisord is not installed: pip install supervisor, into a virtual environment of its own, on PATH")
    notes = [f"{name}={value}" for name, value in settings.items()]
    print(
        f"built-in model, {args.clients} clients, {args.kills} kills, seed {seed}; {platform.system()} {platform.machine()},"
        f" {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before" + (f"; set: {' '.join(notes)}" if notes else "")
    )
    with peer(supervisord) if args.peer else mlxd(settings) as target:
        well = run(target, signals, args.clients, chance, seed)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
