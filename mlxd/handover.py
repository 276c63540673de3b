"""The hand-over: what one supervisor leaves to the next one in the same process, `mlxd restart --supervisor`.

The code on disk is tried in a process of its own first. Then this process becomes it (execv): its number, its children, their links, the
listening sockets, the lock and the lease stay; all else travels through an unlinked file whose descriptor is inherited. Until execv has
succeeded nothing has changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import msgspec

from mlxd import config, desk, messages, status
from mlxd.awake import Awake
from mlxd.child import Child
from mlxd.config import Config
from mlxd.errors import MlxdError
from mlxd.events import Event
from mlxd.notify import Notifier
from mlxd.policy import State

if TYPE_CHECKING:
    from mlxd.supervisor import Supervisor

log = logging.getLogger("mlxd")

#: Where the next supervisor finds the file's descriptor. No child gets it.
VARIABLE = "MLXD_HANDOVER"
#: The last argument of a rehearsal.
REHEARSE = "--rehearse"
#: A rehearsal imports everything and ends, 0.3 s.
REHEARSAL_S = 20.0
#: Whoever is just being answered by us has this long to take it: the slowest client of the stand-in is given 10 s.
QUIET_S = 12.0
#: One of these between execv and the next supervisor's handlers would end the process, or be lost.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1)
#: What a supervisor simply goes on with. Times are of the monotonic clock, which does not stop for execv.
SAME = (
    "nonce",
    "lease",
    "lease_problem",
    "config_problem",
    "tokens",
    "refusals",
    "first_token",
    "polls",
    "ticks",
    "started",
    "moved_at",
    "runs",
    "flapped_at",
    "terminal",
    "told",
    "notifier",
    "awake",
)


class Place(msgspec.Struct):
    """A child, and its link in parts. `link_fd`: -1 when the other side is gone; `unread`: what has come and was not heard; `deaf`: no more
    words are listened to. `due`: when its state will be late."""

    child: Child
    link_fd: int = -1
    unread: bytes = b""
    deaf: bool = False
    due: float | None = None


class Handover(msgspec.Struct, kw_only=True):
    """Every field has a default and unknown ones are skipped, so that newer code can read what older code has written. The names in SAME are
    the supervisor's own. Descriptors are inherited."""

    pid: int = 0
    protocol: int = 0
    config: dict[str, dict[str, Any]] = {}
    server: Place | None = None
    retired: list[Place] = []
    engines: list[Place] = []
    pullers: list[Place] = []
    lock_fd: int = -1
    control_fd: int = -1
    asker_fd: int = -1
    port_fds: list[int] = []
    port_problem: str = ""
    unserved_from: float | None = None
    nonce: str = ""
    lease: int | None = None
    lease_problem: str = ""
    config_problem: str = ""
    tokens: str = ""
    refusals: dict[str, str] = {}
    first_token: bool = False
    polls: list[bool] = []
    ticks: int = 0
    started: float = 0.0
    moved_at: float = 0.0
    runs: int = 1
    flapped_at: float = float("-inf")
    terminal: bool = False
    told: str = ""
    event_seq: int = 0
    untold: list[Event] = []
    notifier: Notifier = msgspec.field(default_factory=Notifier)
    awake: Awake = msgspec.field(default_factory=Awake)

    @property
    def places(self) -> list[Place]:
        return [*([self.server] if self.server else []), *self.retired, *self.engines, *self.pullers]

    @property
    def descriptors(self) -> list[int]:
        found = [
            self.lock_fd,
            self.lease,
            self.control_fd,
            self.asker_fd,
            *self.port_fds,
            *(place.link_fd for place in self.places),
        ]
        return [fd for fd in found if fd is not None and fd >= 0]

    @property
    def settings(self) -> Config:
        """The configuration in force, as far as its names are still known. Raises ConfigError."""
        known = {field.name: field.type.__struct_fields__ for field in msgspec.structs.fields(Config)}
        return config.build(
            {s: {k: v for k, v in keys.items() if k in known[s]} for s, keys in self.config.items() if s in known}, {}
        )


# --- the supervisor that goes ---------------------------------------------------------------------------------------------------------


async def hand_over(s: Supervisor) -> NoReturn:
    """Become the code on disk; the next supervisor answers whoever asked for it. Raises MlxdError, and then nothing has changed."""
    asker = s.control.asker()
    await rehearse(s)
    s.control.pause()
    s.hook.pause()
    end = s.loop.time() + QUIET_S
    try:
        while True:
            await quiet(s, asker, end)
            with blocked_signals():
                for _ in range(3):  # those caught before: from asyncio's pipe to their handlers
                    await asyncio.sleep(0)
                if s.stopping:
                    raise MlxdError("mlxd is stopping")
                if not under_way(s, asker):
                    await leave(s, asker)
    finally:
        s.control.open()
        s.port.resume()
        s.hook.go_on()


async def rehearse(s: Supervisor) -> None:
    """See that the code on disk starts, can read what it will be handed, and accepts the configuration. Raises MlxdError."""
    try:
        with written(described(s, {}, None)) as file, tempfile.TemporaryFile() as said:
            outcome = await s.outcome(spawn_rehearsal(file.fileno(), said), REHEARSAL_S)
            said.seek(0)
            words = said.read().decode(errors="replace").strip().rpartition("\n")[2].removeprefix("Error: ")
    except OSError as error:
        raise MlxdError(f"the new supervisor cannot be started ({error}); the old one goes on") from error
    if outcome is None:
        raise MlxdError(f"the new supervisor was not ready within {REHEARSAL_S:g} s; the old one goes on")
    if outcome:
        refusal = MlxdError(f"the new supervisor would not start ({words or f'status {outcome}'}); the old one goes on")
        refusal.exit_status = 78 if outcome == 78 else 1
        raise refusal


def spawn_rehearsal(fd: int, said: IO[bytes]) -> int:
    """The pid. Raises OSError."""
    process = subprocess.Popen(
        [*sys.orig_argv, REHEARSE],
        executable=sys.executable,
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=said,
        env=os.environ | {VARIABLE: str(fd)},
        pass_fds=[fd],
        start_new_session=True,
    )
    process.returncode = 0  # the loop reaps it
    return process.pid


async def quiet(s: Supervisor, asker: socket.socket, end: float) -> None:
    """Wait until nothing is under way that must not be cut. Raises MlxdError at `end`."""
    while what := under_way(s, asker):
        if s.loop.time() > end:
            raise MlxdError(f"the supervisor cannot be replaced just now: {what}; it goes on as before")
        s.port.standin.close()
        await asyncio.sleep(0.01)


def under_way(s: Supervisor, asker: socket.socket) -> str:
    """What could not be taken up again, in words; "" when there is nothing."""
    for one in s.children():
        reader = s.readers.get(one)
        if reader is not None and not reader.done() and one.link is None:
            return f"{one.name} is just being started"
        if one.pid is not None and not one.alive or one.pid is None and one.state is State.STARTING:
            return f"{one.name} has just ended"
        if one.link is not None and one.link.unsent_bytes:
            return f"{one.title} does not read its link"
    if s.port.standin.answers:
        return "a client is being told that no server accepts"
    if any(other is not asker for other in s.control.conversations.values()):
        return "somebody else asks for something"
    if s.hook.busy:
        return "the event command is at work"
    return ""


async def leave(s: Supervisor, asker: socket.socket) -> None:
    """Never returns. Raises MlxdError when there is no new supervisor after all, and then this one goes on. The loop does not turn before."""
    parted = {one: await one.link.part() for one in s.children() if one.link is not None}
    try:
        become(described(s, parted, asker))
    except OSError as error:
        await rejoin(s, parted)
        raise MlxdError(f"the new supervisor cannot be started ({error}); the old one goes on") from error


def become(handed: Handover) -> NoReturn:
    """Raises OSError."""
    with written(handed) as file:
        fds = [*handed.descriptors, file.fileno()]
        try:
            for fd in [int(entry.name) for entry in Path("/dev/fd").iterdir()]:  # watchdog's, for one, are inheritable
                with contextlib.suppress(OSError):  # the listing's own is closed by now
                    os.set_inheritable(fd, fd <= 2 or fd in fds)
            # With sys.argv after `-m`, sys.path[0] would be the package itself.
            os.execve(sys.executable, sys.orig_argv, os.environ | {VARIABLE: str(file.fileno())})
        finally:
            for fd in fds:
                os.set_inheritable(fd, False)


async def rejoin(s: Supervisor, parted: dict[Child, tuple[int, bytes]]) -> None:
    """Put the links together again that were taken apart for nothing."""
    places = [place_of(s, one, parted) for one in parted]
    for one, place in zip(parted, places, strict=True):
        if reader := s.readers.pop(one, None):
            reader.cancel()
        if place.link_fd >= 0 and one.link is not None:
            place.link_fd = os.dup(place.link_fd)
            one.link.writer.transport.abort()
    await join(s, list(zip(parted, places, strict=True)))


def described(s: Supervisor, parted: dict[Child, tuple[int, bytes]], asker: socket.socket | None) -> Handover:
    return Handover(
        pid=os.getpid(),
        protocol=messages.PROTOCOL,
        config=msgspec.to_builtins(s.config),
        server=place_of(s, s.server, parted) if s.server is not None else None,
        retired=[place_of(s, one, parted) for one in s.retired],
        engines=[place_of(s, one, parted) for one in s.engines],
        pullers=[place_of(s, one, parted) for one in s.pullers],
        lock_fd=s.lock.fd,
        control_fd=s.control.sock.fileno(),
        asker_fd=asker.fileno() if asker is not None else -1,
        port_fds=[sock.fileno() for sock in s.port.sockets],
        port_problem=s.port.problem,
        event_seq=s.events.seq,
        untold=list(s.hook.waiting),
        unserved_from=s.port.unserved.when() if s.port.unserved is not None else None,
        **{name: getattr(s, name) for name in SAME},
    )


def place_of(s: Supervisor, one: Child, parted: dict[Child, tuple[int, bytes]]) -> Place:
    fd, unread = parted.get(one, (-1, b""))
    reader, timer = s.readers.get(one), s.timers.get(one)
    return Place(
        dataclasses.replace(one, link=None),
        fd,
        unread,
        deaf=one.alive and (fd < 0 or reader is None or reader.done()),
        due=timer.when() if timer is not None else None,
    )


@contextlib.contextmanager
def written(handed: Handover) -> Iterator[IO[bytes]]:
    """A file without a name that holds it. Raises OSError."""
    with tempfile.TemporaryFile() as file:
        file.write(msgspec.msgpack.encode(handed))
        file.seek(0)
        yield file


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """They come when this is over, or to the supervisor that this process is by then. For a thread that is begun meanwhile it is never over."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- the supervisor that comes --------------------------------------------------------------------------------------------------------


def receive() -> Handover | None:
    """What the supervisor before us in this process leaves, or in a rehearsal would; None when there was none. Raises MlxdError."""
    fd = os.environ.pop(VARIABLE, None)
    if fd is None:
        return None
    try:
        with open(int(fd), "rb") as file:
            handed = msgspec.msgpack.decode(file.read(), type=Handover)
    except (ValueError, OSError, msgspec.MsgspecError) as error:
        raise MlxdError(f"cannot read what the running supervisor hands over: {error}") from error
    if handed.pid not in (os.getpid(), os.getppid()):
        raise MlxdError(f"{VARIABLE} is set, and nobody hands over to this process; unset it")
    return handed


async def adopt(s: Supervisor, handed: Handover) -> None:
    """Take everything up where it was left. SIGNALS are blocked until all of it is there."""
    for fd in handed.descriptors:
        os.set_inheritable(fd, False)
    for name in SAME:
        setattr(s, name, getattr(handed, name))
    s.runs += 1
    s.events.seq = max(s.events.seq, handed.event_seq)
    s.hook.waiting.extend(handed.untold)
    s.control = desk.Desk(socket.socket(fileno=handed.control_fd), s.verbs())
    s.port.sockets = [socket.socket(fileno=fd) for fd in handed.port_fds]
    s.port.problem = handed.port_problem
    s.server = handed.server.child if handed.server is not None else None
    s.retired = [place.child for place in handed.retired]
    s.engines = [place.child for place in handed.engines]
    s.pullers = [place.child for place in handed.pullers]
    await join(s, [(place.child, place) for place in handed.places])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if handed.unserved_from is not None:
        s.port.answer_from(handed.unserved_from)
    for place in handed.places:
        s.take_up(place.child, place.due)
        # Another program decides now: what was wrong for the last one may be right for this one.
        if place.child.state is State.STOPPED:  # a pull that waits for others
            continue
        if handed.protocol != messages.PROTOCOL or (place.child.state is State.HELD and place.child.hold_cause == "fault"):
            if place.child is s.server:
                s.restart_server()
            else:
                s.renew(place.child)
    s.reap()
    s.lock.mend()
    s.try_reload()
    s.remember()
    if handed.asker_fd >= 0:
        s.keep(answer(socket.socket(fileno=handed.asker_fd), status.report(s)))


async def join(s: Supervisor, children: list[tuple[Child, Place]]) -> None:
    """Open the links of children again, and then listen: what one says may be an order to another."""
    for one, place in children:
        if place.link_fd >= 0:
            await s.open_link(one, socket.socket(fileno=place.link_fd), place.unread)
    for one, place in children:
        if place.deaf:
            s.await_silence(one, one.pid)
        elif one.link is not None:
            s.readers[one] = s.keep(s.listen(one, one.link))


async def answer(asker: socket.socket, told: dict[str, Any]) -> None:
    with asker, contextlib.suppress(OSError, TimeoutError):
        await desk.tell(asker, told)
