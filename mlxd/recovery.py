"""The outside view, for when the supervisor itself may be dead: what is up, and a repair through its owner for what is not.

`mlxd check` looks, `mlxd recover` looks and repairs, `mlxd monitor` does that again and again. While the supervisor answers its control socket
mlxd's own processes are its business. `decide` is pure; `Recovery` looks, acts, and keeps count across runs in recovery.json.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from mlxd import autostart, child, config, control, endpoint, leftovers, lock, logs, ollama, owners, paths, ports, probe
from mlxd.config import Config
from mlxd.control import Declined
from mlxd.errors import MlxdError, NotRunning
from mlxd.leftovers import Process
from mlxd.owners import Owner
from mlxd.probe import WELL, Look

log = logging.getLogger(__name__)

HOUR_S = 3600.0
#: The owner's app ends what we began, and we what it began, so many times within an hour: a fight, which we leave.
FIGHT = 2
#: Between two looks at something that seems to be down.
PAUSE_S = 1.0
#: Somebody else repairs for so long at most: a hang is looked at three times, and the worst stop takes 50 s.
TURN_S = 300.0
#: Of `mlxd start --no-wait`, which waits for the end of a stop (60 s) and, where launchd or systemd begins it, for an answer (60 s).
START_S = 150.0
#: A supervisor that was stopped (SIGSTOP) answers by then.
WAKE_S = 5.0
LOG_BYTES, LOG_KEEP_BYTES = 10 * 1024 * 1024, 1024 * 1024
#: What a restart may mend. Anything else (a stranger, what the supervisor is about) is told and left alone.
MENDABLE = ("down", "hung", "wedged", "failing", "silent")


class Action(Struct):
    """A repair. `at`: wall clock. `well`: it helped. `process`: what then answered. `undone`: somebody else ended that."""

    at: float
    why: str
    well: bool = False
    process: Process | None = None
    undone: bool = False


class Memory(Struct):
    """recovery.json: what was done, by service, oldest first; and the `ollama serve` that is mlxd's own."""

    actions: dict[str, list[Action]] = {}
    ollama: Process | None = None


def decide(look: Look, allowed: str, owner: Owner, done: list[Action], now: float, most: int) -> tuple[bool, str]:
    """Whether to act; else, or before it has helped, what a person can do. `allowed`: the sentence that says how to allow it; "" if it is."""
    if look.well:
        return False, ""
    if look.supervised:
        return False, look.advice or "mlxd repairs it by itself"
    if look.state not in MENDABLE:
        return False, look.advice
    if allowed:
        return False, f"{owner.remedy}; {allowed}"
    if owner.restart is None:
        return False, owner.remedy
    recent = [action for action in done if now - action.at < HOUR_S]
    if sum(action.undone for action in recent) >= FIGHT:
        return False, f"left alone: what mlxd has restarted was ended twice within the hour; find out by whom, then {owner.remedy}"
    if len(recent) >= most:
        minutes = (recent[-most].at + HOUR_S - now) / 60 if most else 60
        return False, f"left alone: {len(recent)} repairs within the hour; the next in {minutes:.0f} min, or {owner.remedy}"
    return True, owner.remedy


class Report(Struct, frozen=True):
    """One service. `did`: what was done, "" for nothing."""

    name: str
    address: str
    state: str
    well: bool
    wanted: bool
    latency_s: float | None
    owner: str
    reason: str
    advice: str
    did: str = ""


def all_up(reports: list[Report]) -> bool:
    return all(report.well for report in reports if report.wanted)


# --- the services -----------------------------------------------------------------------------------------------------------------


class Service(Protocol):
    """`own`: mlxd itself; its lock tells for certain whether it lives. `fights`: its owner may want another process in its place.
    `allowed`: why it must not be repaired, in the words of `decide`.
    `most`: of its repairs within an hour; None: as of the others."""

    name: str
    own: bool
    fights: bool
    wanted: bool
    allowed: str
    most: int | None

    @property
    def address(self) -> str: ...

    def look(self, patience_s: float) -> Look:
        """`patience_s`: of a supervisor that is silent."""

    def owner(self, look: Look, memory: Memory) -> Owner: ...


class Mlx:
    name = "mlx"
    own = True
    fights = False
    allowed = ""
    most: int | None = None

    def __init__(self, where: paths.Paths, settings: Config, wanted: bool):
        self.where, self.settings, self.wanted = where, settings, wanted
        server = settings.server
        self.address = ports.url(ports.reached(server.host), server.port) if server.port else "any free port"

    def look(self, patience_s: float) -> Look:
        try:
            told = ask(self.where, patience_s)
        except Declined as declined:
            return Look(
                "failing", f"its supervisor answers: {declined}", supervised=True, advice="look at `mlxd logs --supervisor`"
            )
        except MlxdError as silent:
            proven = leftovers.supervisor_of(self.where) is not None
            advice = "" if proven else f"find out who holds {self.where.lock} (`lsof`), and end it; then `mlxd start`"
            return Look("silent" if proven else "stranger", str(silent), advice=advice)
        return self.without_supervisor() if told is None else self.under(told)

    def under(self, told: dict[str, Any]) -> Look:
        """The supervisor answers."""
        self.address, state, reason = told["url"], told["state"], told["reason"] or ""
        advice = "it waits for that to end" if state == "held" else ""
        try:
            reply = probe.fetch(f"{self.address}/health", self.settings.health.max_time_s)
        except probe.NoReply as no:
            return Look(no.how if state in WELL else state, reason or str(no), supervised=True, advice=advice)
        return Look(state, reason, reply.seconds, supervised=True, advice=advice)

    def without_supervisor(self) -> Look:
        """The port may be a stranger's, or a child's of a supervisor that was killed: those have 5 s to end, and the next start ends them."""
        if not self.settings.server.port or lock.is_locked(self.where.lease):
            return Look("down", "its supervisor does not run")
        try:
            reply = probe.fetch(f"{self.address}/health", self.settings.health.max_time_s)
        except probe.NoReply as no:
            if no.how == "down":
                return Look("down", "its supervisor does not run")
        else:
            if is_mlxd(reply):
                return Look("stranger", "an mlxd of another home answers there", advice=OTHER_HOME)
        who = ports.holder(self.settings.server.port)
        return Look("stranger", f"the port is held by {who}", advice="end that, or choose another MLX_API_PORT; then `mlxd start`")

    def owner(self, look: Look, memory: Memory) -> Owner:
        manager = autostart.owner()
        if manager is not None and manager.needs_root:  # it begins again what has died, and we may not ask it to
            return Owner(manager.name, manager.by_hand(manager.mlxd), self.wake_or_end if look.state == "silent" else None)
        remedy = "mlxd recover" if look.state == "silent" else "mlxd start"
        return Owner("mlxd", remedy, lambda: self.restart(look))

    def restart(self, look: Look) -> None:
        """Raises MlxdError. `mlxd start` goes through launchd or systemd where it is installed there."""
        if look.state == "silent":
            self.wake_or_end()
        start = [sys.executable, "-m", "mlxd", "start", "--no-wait"]
        try:
            ran = subprocess.run(
                start, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd="/", check=False, timeout=START_S
            )
        except subprocess.TimeoutExpired as error:
            raise MlxdError(f"`mlxd start` has not ended within {START_S:g} s") from error
        if ran.returncode:
            words = (ran.stderr.strip() or ran.stdout.strip()).removeprefix("Error: ")
            raise MlxdError(f"`mlxd start` ended with status {ran.returncode}: {words}")

    def wake_or_end(self) -> None:
        """A stopped supervisor goes on, with everything it has. Raises MlxdError."""
        process = leftovers.supervisor_of(self.where)
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)
        with contextlib.suppress(MlxdError):
            ask(self.where, min(WAKE_S, self.settings.recovery.silent_s))
            return
        limits = self.settings.supervisor
        if not leftovers.end(process, limits.term_s, limits.kill_s):
            raise MlxdError(f"the supervisor (pid {process.pid}) cannot be ended; a reboot may be needed")


class Ollama:
    name = "ollama"
    own = False
    fights = True
    most: int | None = None

    def __init__(self, where: paths.Paths, settings: Config):
        self.where, self.settings = where, settings
        self.address = endpoint.base_url(settings.ollama.url, "ollama.url")
        self.wanted = settings.ollama.wanted or settings.ollama.recover
        self.allowed = "" if settings.ollama.recover else "with `[ollama] recover = true` mlxd does it"

    def look(self, patience_s: float) -> Look:
        server = self.settings.server
        if probe.is_local(self.address) and probe.port_of(self.address) == server.port:
            return Look("stranger", "OLLAMA_URL is mlxd's own address", advice="set OLLAMA_URL to where Ollama is")
        probe_s = self.settings.health.stalled_s if self.settings.ollama.probe else None
        return ollama.look(self.address, self.settings.health.max_time_s, probe_s)

    def owner(self, look: Look, memory: Memory) -> Owner:
        if not probe.is_local(self.address):
            return Owner("another machine", f"look at it on {urlsplit(self.address).hostname}")
        served = memory.ollama if memory.ollama is not None and leftovers.lives(memory.ollama) else None
        address = urlsplit(self.address).netloc
        process = ports.listener(probe.port_of(self.address))
        return owners.of_ollama(process, look.state == "down", served, address, self.where.log("ollama"), sys.platform)


class Other:
    """One of the configuration's."""

    own = False
    fights = False

    def __init__(self, where: paths.Paths, settings: Config, service: config.Service):
        self.where, self.limit_s, self.service = where, settings.health.max_time_s, service
        self.name, self.address, self.most = service.name, service.url, service.max_actions
        self.wanted = True
        self.allowed = ""

    def look(self, patience_s: float) -> Look:
        try:
            reply = probe.fetch(self.address, self.limit_s)
        except probe.NoReply as no:
            return Look("failing" if no.how == "garbled" else no.how, str(no))
        if reply.status < 300:
            return Look("up", seconds=reply.seconds)
        return Look("failing", f"it answers with status {reply.status}", reply.seconds)

    def owner(self, look: Look, memory: Memory) -> Owner:
        if self.service.command:
            return owners.command(self.service.command, self.where.log("recovery"))
        if self.service.owner:
            return owners.named(self.service.owner)
        return Owner("unknown", "restart it by whatever started it")


OTHER_HOME = "set MLXD_HOME to that of the mlxd that runs, or choose another MLX_API_PORT"


def ask(where: paths.Paths, patience_s: float) -> dict[str, Any] | None:
    """The supervisor's status; None when there is none. Raises MlxdError when one holds the lock and answers nobody for `patience_s`,
    Declined when it answers that it cannot tell."""
    end = time.monotonic() + patience_s
    while True:
        try:
            return control.ask(where.control, "status", timeout_s=max(end - time.monotonic(), 0.1))
        except NotRunning:
            if not lock.is_locked(where.lock):
                return None  # else it starts, or its socket was removed
        except Declined:
            raise
        except MlxdError:
            pass
        if time.monotonic() >= end:
            raise MlxdError(f"its supervisor has answered nobody for {patience_s:g} s")
        time.sleep(0.05)


def is_mlxd(reply: probe.Reply) -> bool:
    return "x-mlxd-version" in reply.headers or isinstance(reply.json.get("nonce"), str)


def answering(url: str) -> Process | None:
    """The process that answers there, where the system tells."""
    process = ports.listener(probe.port_of(url)) if probe.is_local(url) else None
    return leftovers.process_of(process.pid) if process is not None else None


# --- looking and acting -----------------------------------------------------------------------------------------------------------


class Recovery:
    """One round over every service."""

    def __init__(self, where: paths.Paths, environ: Mapping[str, str] = os.environ):
        """Raises ConfigError."""
        environment = endpoint.environment(environ)
        endpoint.mlx_of(environment)  # a bad MLX_API_URL is refused here as everywhere
        self.where = where
        self.settings = config.load(where.config, [], environment).config
        self.services: list[Service] = [Mlx(where, self.settings, not endpoint.is_off(environment)), Ollama(where, self.settings)]
        self.services += [Other(where, self.settings, service) for service in config.read_services(where.config)]

    def check(self) -> list[Report]:
        patience_s = min(control.DEADLINE_S, self.settings.recovery.silent_s)
        memory = recall(self.where)
        return [
            self.judge(service, service.look(patience_s), memory, self.settings.recovery.max_actions)[0]
            for service in self.services
        ]

    def recover(self, most: int) -> list[Report]:
        """`most`: repairs of one service within an hour."""
        paths.prepare(self.where)
        begin_log(self.where)
        return [self.mend(service, most if service.most is None else service.most) for service in self.services]

    def judge(self, service: Service, look: Look, memory: Memory, most: int) -> tuple[Report, Owner | None]:
        """The owner to act through; None: do not act."""
        done = memory.actions.get(service.name, [])
        owner = service.owner(look, memory)
        if look.state in MENDABLE and service.fights and done and done[-1].process is not None:
            process = done[-1].process
            done[-1].undone = process.boot == leftovers.boot_id() and not leftovers.lives(process)
        act, advice = decide(look, service.allowed, owner, done, time.time(), most)
        seconds = round(look.seconds, 4) if look.seconds is not None else None
        report = Report(
            service.name, service.address, look.state, look.well, service.wanted, seconds, owner.name, look.reason, advice
        )
        return report, owner if act and service.wanted else None

    def mend(self, service: Service, most: int) -> Report:
        with self.turn():
            memory = recall(self.where)
            report, owner = self.judge(service, self.look_closely(service), memory, most)
            if owner is None:
                if not report.well and service.wanted:
                    log.info("%s is %s (%s): %s", report.name, report.state, report.reason, report.advice)
                return report
            return self.act(service, owner, report, memory)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One at a time: the second finds what the first has repaired. Raises MlxdError."""
        try:
            fd = lock.flocked(self.where.recovery_lock, TURN_S)
        except BlockingIOError:
            raise MlxdError(f"another mlxd has been repairing for {TURN_S / 60:.0f} min; find it with `ps`") from None
        except OSError as error:
            raise MlxdError(f"cannot open {self.where.recovery_lock}: {error.strerror}; nothing is repaired without it") from error
        try:
            yield
        finally:
            os.close(fd)

    def look_closely(self, service: Service) -> Look:
        """What seems to be down is looked at again: its owner may be at it already, or it was merely slow."""
        look = service.look(self.settings.recovery.silent_s)
        for _ in range(self.settings.health.misses - 1):
            if look.state not in MENDABLE or look.supervised or not service.wanted or service.own:
                break
            time.sleep(PAUSE_S)
            look = service.look(self.settings.recovery.silent_s)
        return look

    def act(self, service: Service, owner: Owner, report: Report, memory: Memory) -> Report:
        """Count it, do it, wait for what comes of it."""
        assert owner.restart is not None
        done = memory.actions.setdefault(service.name, [])
        done.append(Action(time.time(), f"{report.state}: {report.reason}"))
        start = time.monotonic()
        try:
            keep(self.where, memory)
            log.info("%s is %s (%s): restarting it through %s", report.name, report.state, report.reason, owner.name)
            begun = owner.restart()
        except (MlxdError, OSError) as error:  # OSError: no room for a process, or for a file
            log.warning("%s could not be restarted through %s: %s", report.name, owner.name, error)
            return msgspec.structs.replace(report, did=f"could not be restarted through {owner.name}: {error}")
        if begun is not None:
            memory.ollama = begun
            with contextlib.suppress(MlxdError):  # at once: whoever dies now leaves an `ollama serve` that is still known
                keep(self.where, memory)
        look = self.settled(service)
        took = f"after {time.monotonic() - start:.1f} s"
        done[-1].well = look.well
        done[-1].process = answering(service.address) if look.well and not service.own else None
        with contextlib.suppress(MlxdError):  # it is counted already
            keep(self.where, memory)
        log.info("%s is %s %s", report.name, look.state, took)
        after, _ = self.judge(service, look, memory, 0)
        did = f"restarted through {owner.name} because it was {report.state} ({report.reason}), {look.state} {took}"
        return msgspec.structs.replace(after, did=did, advice="" if look.well else owner.remedy)

    def settled(self, service: Service) -> Look:
        end = time.monotonic() + self.settings.recovery.settle_s
        while not (look := service.look(control.DEADLINE_S)).well and time.monotonic() < end:
            time.sleep(0.1)
        return look


def recall(where: paths.Paths) -> Memory:
    """What was done within the hour. A file that cannot be read is as good as none, and so is what a clock put back makes the future."""
    try:
        memory = msgspec.json.decode(paths.read_small(where.recovery, 1024 * 1024) or b"{}", type=Memory)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Memory()
    now = time.time()
    for name, actions in memory.actions.items():
        memory.actions[name] = [action for action in actions if 0 <= now - action.at < HOUR_S]
    return memory


def keep(where: paths.Paths, memory: Memory) -> None:
    """Raises MlxdError: what cannot be counted is not done."""
    try:
        paths.write_atomically(where.recovery, msgspec.json.encode(memory))
    except OSError as error:
        raise MlxdError(f"cannot write {where.recovery}: {error.strerror}; nothing is repaired without keeping count") from error


def begin_log(where: paths.Paths) -> None:
    """One line an action, and one for each time that something wanted is down and left alone."""
    for name in ("recovery", "ollama"):
        child.shorten_log(where.log(name), LOG_BYTES, LOG_KEEP_BYTES)
    if not log.handlers:
        log.addHandler(logs.Lines(lambda line: paths.append(where.log("recovery"), line), logs.Text()))
        log.setLevel(logging.INFO)
        log.propagate = False
