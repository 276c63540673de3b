"""The supervisor: the one loop that owns every process.

Everything that happens arrives here as a call in one asyncio loop: words on links, exits, signals, timers, polls, file changes, verbs of the
command line. `policy` says what it means; `perform` does it. Nobody else writes the state of a child.

Run as `python -m mlxd.supervisor [--set section.key=JSON ...]`. Imports neither mlx nor a web framework: it idles at some 30 MB.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import functools
import json
import logging
import os
import random
import resource
import secrets
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from mlxd import (
    __version__,
    causes,
    child,
    config,
    desk,
    events,
    handover,
    hook,
    leftovers,
    link,
    logs,
    messages,
    monitor,
    paths,
    policy,
    pullers,
    shares,
    status,
    strays,
    tokens,
)
from mlxd.awake import Awake
from mlxd.boots import Boots
from mlxd.child import Child
from mlxd.config import Config
from mlxd.errors import ConfigError, MlxdError
from mlxd.estimate import gigabytes
from mlxd.exits import Exits
from mlxd.lock import AlreadyRunning, Lock
from mlxd.messages import EngineDown, EngineUp, ExitRecord
from mlxd.notify import Notifier
from mlxd.papers import Papers
from mlxd.policy import Action, Event, Health, State
from mlxd.ports import Port
from mlxd.shares import Crowding
from mlxd.standin import StandIn

log = logging.getLogger("mlxd")

#: A draining server is given this much beyond its limit before TERM.
DRAIN_MARGIN_S = 3.0
#: How long the words of a process that has ended may take to arrive: its end of the link is closed, so they are there.
LAST_WORDS_S = 0.25
#: After a heavy process was killed: how often its memory is looked for, and how long at that pace.
MEMORY_LOOK_S, MEMORY_WAIT_S = 0.25, 30.0
#: So many servers drain at once, 33 MB each; the oldest gets the time of a stop when there would be one more.
MOST_DRAINING = 8
#: A stack dump takes this long at most; then the ladder may begin, which would end it.
DUMP_S = 1.0
#: Resumed requests prefill for so long after an engine is ready (8 of 200 tokens: 0.4-0.55 s): no spare takes a core from them.
SETTLE_S = 0.6
#: A log that was cut is looked at again so soon: 100 MB/s do not bring it to twice the limit of 50 MiB.
LOG_AGAIN_S = 0.5
#: How often, in ticks, the lock and the PID file are looked at.
LOOK_TICKS = 30
#: How often, in ticks, children are looked at for descriptors and processes without end.
EXCESS_TICKS = 5
#: What a child left behind is looked for so long after something has ended, once for all that ends meanwhile: a look costs some milliseconds.
STRAYS_S = 0.1
#: HUPs within this time are one.
HUP_S = 0.1

#: A program that is not there, or cannot be one: trying again would not help.
UNFIT_PROGRAM = (errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR)
SERVING = (State.BLANK, State.LOADING, State.READY)  # of a server: its wishes count
EXPECTING = (
    State.LOADING,
    State.DRAINING,
    State.STOPPING,
    State.KILLING,
)  # a `ready` may come, if only because it crossed our word
LEAVING = (State.DRAINING, State.STOPPING, State.KILLING)
UNTAKEN = (State.STARTING, State.BLANK)  # of an engine without a model: it can be given one
COMING_UP = (State.STARTING, State.LOADING)
RUNNING = (State.BLANK, State.LOADING, State.READY, State.DRAINING)


class Supervisor:
    """Owns the public sockets, the lock, the PID file, the control socket and every child."""

    def __init__(
        self,
        where: paths.Paths,
        settings: Config,
        tokens: str,
        flags: dict[str, Any],
        lock: Lock,
        handed: handover.Handover | None = None,
    ):
        self.paths = where
        self.handed = handed  # by the supervisor that this process was before
        self.config = settings
        self.tokens = tokens  # their stamp, "" while no token is needed
        self.flags = flags
        self.lock = lock
        self.nonce = secrets.token_hex(16)
        self.boot = leftovers.boot_id()
        self.papers = Papers()
        self.boots = Boots(where.loading, self.boot, self.papers)
        self.server: Child | None = None
        self.retired: list[Child] = []  # servers that drain while a newer one accepts
        self.engines: list[Child] = []
        self.pullers: list[Child] = []  # those that run, and those that wait (STOPPED)
        self.timers: dict[Child, asyncio.TimerHandle] = {}
        self.readers: dict[Child, asyncio.Task[Any]] = {}
        self.tasks: set[asyncio.Task[Any]] = set()
        self.awaited: dict[int, asyncio.Future[int]] = {}  # wait statuses of processes that are no children, by pid
        self.handing_over = False
        self.runs = 1  # how many supervisors this process has been
        self.notifier = Notifier.of(os.environ)
        self.awake = Awake()
        self.bug: BaseException | None = None
        self.poll: asyncio.Task[None] | None = None
        self.port = Port(StandIn(lambda: status.sentence(self), lambda: status.health(self)))
        self.exits = Exits(where.exits, self.papers)
        self.events = events.Events(where.events)
        self.hook = hook.Hook(lambda: self.config.events, self.outcome, self.keep)
        self.told = ""  # of the overall state: the last event
        self.lease: int | None = None
        self.refusals: dict[str, str] = {}  # preloaded models that cannot be loaded, and why
        self.first_token = False  # a preloaded model has given one in this run
        self.stopping = 0  # how many times we were told to
        self.lease_problem = ""
        self.config_problem = ""
        self.polls: list[bool] = []
        self.answer = monitor.Answer.OURS  # to the last poll
        self.flapped_at = float("-inf")  # when a server was last replaced because it answered now and then
        self.terminal = False  # whether we shall end with one
        self.hup: asyncio.TimerHandle | None = None  # one that will be heeded
        self.strays: list[strays.Stray] = []  # when last looked for
        self.strays_at = float("-inf")
        self.strays_due: asyncio.TimerHandle | None = None
        self.processes = child.processes()  # of the machine; the fewest that were seen
        self.ticks = 0

    # --- life, read downward -----------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Until every child is gone after a stop; the exit status."""
        self.loop = asyncio.get_running_loop()
        self.done = asyncio.Event()
        self.started = self.moved_at = self.since = self.loop.time()
        self.watch_signals()
        strays.become_subreaper()
        here = f"pid {os.getpid()}, in {self.paths.home}"
        if self.handed is None:
            self.say("started", f"mlxd {__version__} has started, {here}")
            self.sweep()
            if self.lease is not None:  # nobody of an earlier run is left to be found
                self.remember()
            self.control = desk.Desk(desk.listen(self.paths.control), self.verbs())
            self.lock.show()
            self.begin()
        else:
            await handover.adopt(self, self.handed)
            self.say("supervisor_replaced", f"mlxd {__version__} goes on, {here}")
        self.control.open()
        self.files = self.watch_files()
        self.notifier.ready()
        self.keep(self.tick_forever())
        await self.done.wait()
        if self.bug is not None:
            raise self.bug  # end loudly: the links close, every child follows, and launchd or systemd starts us again
        await self.end_strays()
        self.say("stopped", "mlxd has stopped")
        await self.hook.finish()
        self.end()
        return 0

    def begin(self) -> None:
        """Clear the way; then want a server, and an engine that imports while the server does."""
        if self.lease is None:
            self.take_lease(0.0)
        if self.lease is not None:
            self.port.open(self.config.server)
        if self.obstacle or self.stopping:
            return
        self.server = Child("server", 0)
        self.handle(self.server, Event.WANTED)
        if not self.engines:
            self.new_engine(None)

    def stop(self, why: str) -> None:
        """Drain and stop; the second time skips the drain, the third kills."""
        self.stopping += 1
        if self.stopping == 1:
            self.say("stopping", f"mlxd is stopping: {why}")
            self.notifier.stopping()
            self.port.leave()
            pullers.stop(self)
            self.boots.pass_trials()  # a machine that goes down now does so because it was told to
            for one in list(self.servers()):
                self.retire(one, self.config.server.drain_s)
            self.end_engines()
        elif self.stopping == 2:
            log.info("stopping without draining: %s", why)
            for one in self.children():
                if one.pid is None:
                    self.unwant(one)
                else:
                    one.wanted = False
                    self.handle(one, Event.HURRIED)
        elif self.stopping == 3:
            log.info("killing: %s", why)
            for one in self.children():
                while one.alive and one.state not in (State.KILLING, State.UNKILLABLE):
                    self.handle(one, Event.HURRIED)
        self.check_done()

    def end_engines(self) -> None:
        """Engines are needed until the last server has ended its streams."""
        if self.stopping and all(server.state is State.UNKILLABLE for server in self.servers()):
            for engine in list(self.engines):
                self.unwant(engine)

    def check_done(self) -> None:
        if self.stopping and all(one.pid is None or one.state is State.UNKILLABLE for one in self.children()):
            self.done.set()

    def end(self) -> None:
        """Leave nothing behind but logs and the exit records."""
        # asyncio gives signals back their default action when its loop closes: one more TERM would make this a death.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        self.files.stop()
        self.control.close()
        self.port.close()
        for timer in self.timers.values():
            timer.cancel()
        self.awake.keep(False, self.loop.time())
        self.remember()
        paths.remove(self.paths.control)
        if not any(one.pid is not None for one in self.children()):
            paths.remove(self.paths.state)
        self.lock.withdraw()

    def say(self, event: str, text: str, one: Child | None = None, end: ExitRecord | None = None) -> None:
        """An event of docs/events.md: one line in the log, one in events.jsonl, one for the event command. `one`: None for mlxd itself."""
        told = self.events.add(
            event,
            text,
            child=one.name if one else None,
            model=one.model if one else None,
            pid=(end.pid or None) if end else one.pid if one else os.getpid(),
            cause=end.cause if end else None,
        )
        log.info("%s", told.text, extra={"fields": told.fields})
        self.hook.tell(told)

    # --- children ----------------------------------------------------------------------------------------------------------------

    def servers(self) -> Iterator[Child]:
        """The server that accepts (or should), then those that drain."""
        if self.server is not None:
            yield self.server
        yield from list(self.retired)

    def children(self) -> list[Child]:
        return [*self.servers(), *self.engines, *self.pullers]

    def handle(self, one: Child, event: Event) -> None:
        """One event of one child: the table says what it means, then it is done."""
        before = one.state
        one.state, action = policy.step(before, event)
        if one.state is not before or action is Action.SPAWN:
            self.moved_at = self.loop.time()
            self.set_deadline(one, self.patience(one))
            log.info("%s: %s -> %s (%s)", one.title, before.value, one.state.value, event.value)
            self.tell_of(one, event)
        self.perform(one, action)
        if one.state is State.STOPPED:
            self.forget(one)
        elif one.state is State.UNKILLABLE and before is not State.UNKILLABLE:  # a stop waits for it no longer
            self.end_engines()
            self.check_done()
        self.mind_the_port()
        self.mind_the_spare()

    def tell_of(self, one: Child, event: Event) -> None:
        """What a new state of a child is to others."""
        if event is Event.MENDED:
            self.say("mended", f"{one.title} is not held any more", one)
        match one.state:
            case State.READY:
                self.say("readied", f"{one.title} is ready, pid {one.pid}", one)
            case State.COOLDOWN:
                wait_s = self.config.supervisor.cooldown_s
                self.say("cooled_down", f"{one.title} died {len(one.counted)} times; one try every {wait_s:g} s from now on", one)
            case State.HELD | State.UNKILLABLE:
                self.say("held", f"{one.title} is held: {one.hold}", one)

    def perform(self, one: Child, action: Action) -> None:
        match action:
            case Action.SPAWN:
                self.spawn(one)
            case Action.ORDER if one.kind == "puller" and one.link is not None and one.model is not None:
                one.link.send(messages.Fetch(one.model))
            case Action.ORDER if one.link is not None and one.model is not None:
                self.boots.begin(one.model)
                one.share_bytes = self.share(one)
                one.link.send(messages.Load(one.model, one.directory, one.share_bytes, one.tuning))
            case Action.DRAIN if one.link is not None:
                one.link.send(messages.Drain(one.drain_s) if one.kind == "server" else messages.Stop())
            case Action.TERMINATE:
                one.terminate()
            case Action.KILL:
                one.kill()
            case Action.ANNOUNCE:
                self.announce(one)
            case _:
                pass

    def patience(self, one: Child) -> float | None:
        """Seconds that the child's state may last before it is LATE; None for as long as it likes. BACKOFF and COOLDOWN: `retry_s`."""
        limits = self.config.supervisor
        match one.state:
            case State.STARTING:
                return limits.hello_s
            case State.LOADING:
                return limits.load_stall_s
            case State.DRAINING:
                return one.drain_s + DRAIN_MARGIN_S if one.kind == "server" else limits.term_s
            case State.STOPPING:
                return limits.term_s
            case State.KILLING:
                return limits.kill_s
            case State.BACKOFF | State.COOLDOWN:
                return one.retry_s
            case _:
                return None

    def set_deadline(self, one: Child, seconds: float | None) -> None:
        if timer := self.timers.pop(one, None):
            timer.cancel()
        if seconds is not None:
            self.timers[one] = self.loop.call_later(seconds, self.late, one)

    def time_left(self, one: Child) -> float:
        """Seconds until its deadline; 0.0 without one."""
        timer = self.timers.get(one)
        return max(0.0, timer.when() - self.loop.time()) if timer else 0.0

    def late(self, one: Child) -> None:
        del self.timers[one]
        if one.state is State.LOADING:
            self.accuse(one, "stalled")
            return
        if one.state is State.STARTING:
            one.suspicion = "no hello"
        elif one.state is State.KILLING:
            one.hold = f"pid {one.pid} does not die; a reboot may be needed"
        elif one.state is State.COOLDOWN:
            one.trial = True
        waited = one.state in (State.BACKOFF, State.COOLDOWN)
        self.handle(one, Event.UNWANTED if waited and self.give_to_spare(one) else Event.LATE)

    def accuse(self, one: Child, why: str) -> None:
        """It will be ended for this; first its stacks are taken."""
        if not one.suspicion:
            log.warning("%s: %s", one.title, why)
            one.suspicion = why
            one.dump_stack()
            self.await_dump(one)

    def await_dump(self, one: Child) -> None:
        self.loop.call_later(DUMP_S, self.condemn, one, one.pid, one.state, one.counters.progress)

    def condemn(self, one: Child, pid: int | None, state: State, progress: tuple[int, ...]) -> None:
        """End what was accused, unless it is another process by now or has moved since."""
        if one.pid != pid or not one.alive or one.state not in RUNNING:
            return
        if (one.state, one.counters.progress) != (state, progress):
            log.info("%s moves after all", one.title)
            one.suspicion = ""
            self.set_deadline(one, self.patience(one))
            return
        self.handle(one, Event.SICK)

    def take_up(self, one: Child, due: float | None) -> None:
        """Go on with a child that the supervisor before us left; `due`: its deadline, on the loop's clock."""
        now = self.loop.time()
        self.set_deadline(one, None if due is None else max(0.0, due - now))
        if one.suspicion and one.state in RUNNING:
            self.await_dump(one)
        self.await_memory(one, now + MEMORY_WAIT_S)

    def spawn(self, one: Child) -> None:
        """A new process in the slot. A program that cannot be started has ended, too."""
        one.hold = one.hold_cause = one.unfit_program = ""
        one.refusal = None
        if one.died_of:
            one.restarts += 1
        settings = link.ChildSettings(
            config=self.config if one.kind == "server" else config.for_engine(self.config),
            link_fd=-1,
            slot=one.slot,
            nonce=self.nonce,
            log=str(self.paths.log(one.name)),
            stack=str(self.paths.dump(one.name)),
            listen_fds=[s.fileno() for s in self.port.sockets] if one.kind == "server" else [],
            aliases=str(self.paths.aliases) if one.kind == "server" else "",
            token=str(self.paths.token) if one.kind == "server" else "",
            control=str(self.paths.control) if one.kind == "server" else "",
            socket=str(self.paths.engine_socket(one.slot)) if one.kind == "engine" else "",
            view=str(self.paths.views / one.name) if one.kind == "engine" else "",
        )
        argv = child.command(one.kind, self.config)
        inherited = [self.lease, *settings.listen_fds] if self.lease is not None else settings.listen_fds
        environ = pullers.environment(self.paths) if one.kind == "puller" else os.environ
        try:
            end = one.spawn(argv, settings, inherited, self.loop.time(), environ)
        except OSError as error:
            problem = f"cannot start {error.filename or one.name}: {child.why_unfit(argv[0], error)}"
            if error.filename == argv[0] and error.errno in UNFIT_PROGRAM:
                one.hold, one.hold_cause, one.unfit_program = problem, "fault", child.program_id(argv[0])
            with contextlib.suppress(ConfigError):  # a directory of ours may have been removed; without it, too, we try again
                paths.prepare(self.paths)
            self.loop.call_soon(self.ended, one, None, problem)
            return
        self.readers[one] = self.keep(self.connect(one, end))
        self.remember()

    def keep(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that is not garbage collected, and whose exception is not lost."""
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.finished)
        return task

    async def outcome(self, pid: int, limit_s: float) -> int | None:
        """The exit status, negative for a signal, of a process that leads a group and is no child; None when it took too long. What is left of
        its group is killed."""
        self.awaited[pid] = ended = self.loop.create_future()
        try:
            await asyncio.wait([ended], timeout=limit_s)
        finally:
            del self.awaited[pid]
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(ended.result()) if ended.done() else None

    def finished(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (bug := task.exception()) is not None:
            self.bug = bug
            self.done.set()

    def reap(self) -> None:
        """SIGCHLD: every process that has ended, ours or (as subreaper) left to us by one of ours."""
        if self.strays_due is None:
            self.strays_due = self.loop.call_later(STRAYS_S, self.kill_strays)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if (waiting := self.awaited.get(pid)) is not None:
                if not waiting.done():
                    waiting.set_result(status)
                continue
            if self.awake.ended(pid):
                continue
            one = next((c for c in self.children() if c.pid == pid and c.alive), None)
            if one is None:  # a grandchild
                continue
            one.kill()  # what it forked is still in its group
            one.alive = False
            self.keep(self.bury(one, status))

    def left_behind(self, age_s: float = 0.0) -> list[strays.Stray]:
        """Processes that our children left to us, as they were at most so long ago."""
        now = self.loop.time()
        if now - self.strays_at >= age_s:
            known = {*self.awaited, *(one.pid for one in self.children() if one.pid is not None)}
            self.strays, self.strays_at = strays.find(self.nonce, known), now
        return self.strays

    def kill_strays(self) -> int:
        """What a child left behind ends with it; the number of those that have not ended yet."""
        self.strays_due = None
        # The next process may have the name already: what is older than it is not its.
        living = {one.name: one.identity for one in self.children() if one.alive}
        found = [stray for stray in self.left_behind() if stray.began < living.get(stray.origin, float("inf"))]
        for stray in found:
            log.warning("pid %d (%s), left behind by %s, is killed", stray.pid, stray.name, stray.origin)
            stray.kill()
        return len(found)

    async def end_strays(self) -> None:
        """All of them, and what they leave in turn; one that does not die is left alone."""
        for _ in range(1 + round(self.config.supervisor.kill_s / STRAYS_S)):
            if not self.kill_strays():
                return
            await asyncio.sleep(STRAYS_S)

    async def bury(self, one: Child, status: int) -> None:
        """Hear the last words of a process that has ended, then say so."""
        if reader := self.readers.pop(one, None):
            await asyncio.wait([reader], timeout=LAST_WORDS_S)
            reader.cancel()
        self.ended(one, status)

    def ended(self, one: Child, status: int | None, error: str = "") -> None:
        """A process has ended: one exit record, one event, one word to the servers."""
        now = self.loop.time()
        self.set_deadline(one, None)
        if one.refusal is not None or one in self.retired:
            one.wanted = False
        again = bool(error) and one.died_of == causes.SPAWN.name  # each second, perhaps for hours: one record tells it all
        death, record = one.buried(status, now, self.paths, error)
        self.ease(one, record)
        limits = self.config.supervisor
        event = policy.verdict(death, one.counted, one.trial, now, limits)
        if event is Event.UNFIT and not one.hold:
            one.hold, one.hold_cause = f"{one.name} says its configuration is wrong: {last_line(record.text)}", "fault"
        elif event in (Event.DIED, Event.FAILED) and not one.memory_is_back():
            event = Event.UNFIT
            one.hold = f"memory not returned: {one.lost_bytes / 1e9:.1f} GB of the killed engine; a reboot may be needed"
            one.hold_cause = "memory"
            self.loop.call_later(MEMORY_LOOK_S, self.await_memory, one, now + MEMORY_WAIT_S)
        if one.kind == "puller" and event in (Event.HOPELESS, Event.UNFIT):  # its clients do not wait for ever
            pullers.give_up(self, one, record)
            event = Event.GONE
        one.retry_s = policy.delay(death, event, len(one.counted), random.random(), limits)
        if not again:
            self.record(one, record)
        if one.kind == "server":
            pullers.abandon(self, record.pid)
        if one.kind == "engine" and one.model is not None:
            self.tell_engine_down(one, event, record)
            if event is Event.GONE:
                self.boots.pass_trial(one.model)
            elif event is not Event.DIED:
                self.boots.end_trial(one.model)
        self.handle(one, Event.GONE if event is Event.DIED and self.give_to_spare(one) else event)
        self.remember()

    def ease(self, one: Child, record: ExitRecord) -> None:
        """Let the next engine of the model have less of what this one died of."""
        cause, settings = causes.CAUSES[record.cause], self.config
        if one.kind == "engine" and one.model is not None and one.wanted:
            one.tuning = causes.eased(one.tuning, cause, settings.engine.prefill_tokens, settings.server.max_concurrent)
        record.remedy = causes.remedy(cause, one.tuning)

    def give_to_spare(self, dead: Child) -> bool:
        """Load the model of an engine that has no process into the spare, which has its imports behind it. False: there is none."""
        spare = self.spare()
        if dead.kind != "engine" or dead.model is None or spare is None:
            return False
        spare.take_over(dead)
        log.info("%s takes over from %s", spare.title, dead.name)
        self.order(spare)
        return True

    def spare(self) -> Child | None:
        """An engine that can be given a model. One that has died, too, can not, although its last words are still to be heard; nor one that
        does not beat."""
        fit = (e for e in self.engines if e.model is None and e.wanted and e.alive and not e.suspect and e.state in UNTAKEN)
        return next(fit, None)

    def mind_the_spare(self) -> None:
        """Keep a blank engine, and a second one while engines die: the next death may come before a new one has its imports behind it (1.2 s).
        Made one at a time, and not while a model is loaded or its first requests resumed, which would lose a core by it."""
        now = self.loop.time()
        coming_up = any(e.state in COMING_UP or (e.state is State.BLANK and e.model) for e in self.engines)
        settling = any(e.ready_at is not None and now < e.ready_at + SETTLE_S for e in self.engines)
        if self.stopping or self.server is None or coming_up or settling:
            return
        restless = now - self.config.supervisor.window_s
        spares = [engine for engine in self.engines if engine.model is None and engine.wanted]
        wanted = 2 if any(died > restless for engine in self.engines if engine.model for died in engine.deaths) else 1
        if len(spares) < wanted and psutil.virtual_memory().available >= self.config.supervisor.spare_bytes:
            self.new_engine(None)
        elif len(spares) > wanted:
            self.unwant(spares[-1])

    def tell_engine_down(self, engine: Child, event: Event, record: ExitRecord) -> None:
        assert engine.model is not None
        if engine.refusal is not None:
            if engine.preload:
                self.refusals[engine.model] = engine.refusal
            self.tell_servers(EngineDown(engine.slot, engine.model, engine.refusal, "refused"))
        elif event is Event.GONE:
            self.tell_servers(EngineDown(engine.slot, engine.model, record.cause, "released"))
        elif event is Event.DIED:
            self.tell_servers(EngineDown(engine.slot, engine.model, record.cause, "replaced"))
        else:
            wait_s = engine.retry_s
            if event is Event.UNFIT:
                wait_s = MEMORY_WAIT_S if engine.hold_cause == "memory" else self.config.supervisor.cooldown_s
            self.tell_servers(EngineDown(engine.slot, engine.model, record.cause, "retried", wait_s))

    def record(self, one: Child, record: ExitRecord) -> None:
        how = f"signal {record.signal}" if record.signal is not None else f"status {record.code}"
        event = "ended" if record.cause == causes.STOPPED.name else "died"
        text = f"{one.title} {event}, pid {record.pid}: {record.cause} ({how}) after {record.up_s:.1f} s: it {record.remedy}"
        if one.refusal is not None:
            text += f": {one.refusal}"
        self.say(event, text, one, record)
        self.exits.add(record)
        self.tell_servers(messages.Exited(msgspec.structs.replace(record, flights=[])))

    def forget(self, one: Child) -> None:
        """A child that is stopped and wanted by nobody leaves the lists; the slot's number is free again."""
        if one.alive:
            return
        if one is self.server:
            self.server = None
        with contextlib.suppress(ValueError):
            self.retired.remove(one)
        with contextlib.suppress(ValueError):
            self.engines.remove(one)
        if one in self.pullers:
            self.pullers.remove(one)
            pullers.begin(self)
        self.end_engines()
        self.check_done()

    def retire(self, server: Child, drain_s: float) -> None:
        """This server is not wanted any more and may take `drain_s` to end its streams."""
        server.drain_s = drain_s
        if server is self.server:
            self.server = None
            self.retired.append(server)
        if server.state is State.DRAINING:  # for a replacement; now there is less time
            self.perform(server, Action.DRAIN)
            self.set_deadline(server, self.patience(server))
        self.unwant(server)

    def unwant(self, one: Child) -> None:
        one.wanted = False
        one.ordered = one.alive
        if one.kind == "engine" and one.model is not None and one.pid is None:  # else its end will say so
            self.tell_servers(EngineDown(one.slot, one.model, "stopped", "released"))
        self.handle(one, Event.UNWANTED)

    # --- words on links ------------------------------------------------------------------------------------------------------------

    async def connect(self, one: Child, end: socket.socket) -> None:
        await self.listen(one, await self.open_link(one, end))

    async def open_link(self, one: Child, end: socket.socket, unread: bytes = b"") -> link.Link:
        one.link = opened = await link.Link.open(end, messages.child_words, unread)
        return opened

    async def listen(self, one: Child, mine: link.Link) -> None:
        """All words of one process, until its link closes."""
        pid = one.pid
        try:
            while (word := await mine.read()) is not None:
                self.hear(one, word)
        except ValueError as error:
            log.warning("%s: %s", one.title, error)
        self.await_silence(one, pid)

    def await_silence(self, one: Child, pid: int | None) -> None:
        self.loop.call_later(link.LAST_S + 1.0, self.look_at_silence, one, pid)

    def look_at_silence(self, one: Child, pid: int | None) -> None:
        """A process that closed its link, or babbled, and still lives is of no use."""
        if one.pid == pid and one.alive and one.state in RUNNING:
            one.suspicion = "link closed"
            self.handle(one, Event.SICK)

    def hear(self, one: Child, word: messages.ChildWord) -> None:
        match word:
            case messages.Hello():
                self.greet(one, word)
            case messages.Beat(counters):
                loaded = one.counters.loaded
                one.observe(counters, self.loop.time())
                if one.state is State.LOADING and counters.loaded != loaded:
                    self.moved_at = self.loop.time()
                    self.set_deadline(one, self.patience(one))
            case messages.Ready() if one.ready_at is None and one.state in EXPECTING:
                one.ready_at, one.at_ready = self.loop.time(), one.counters
                one.problems = word.problems
                self.handle(one, Event.READIED)
            case messages.Bye():
                one.bye = word
                if word.cause == "refused" and one.kind == "engine" and one.model is not None:
                    one.refusal = word.text
            case messages.Want(model) if one.kind == "server":
                # One that drains may still be asked for a model that nobody has loaded; about the others its successor decides.
                there = next((engine for engine in self.engines if engine.model == model), None)
                if (one.state in SERVING or (one.state is State.DRAINING and there is None)) and not self.stopping:
                    self.want(word)
                elif one.state is State.DRAINING and there is not None and there.state is State.READY and one.link is not None:
                    one.link.send(self.engine_up(there))
            case messages.Release(model) if one.kind == "server":
                for engine in self.engines:
                    if engine.model == model and one.state in SERVING:
                        engine.released = True
                self.let_go()
            case messages.Fetch(name) if one.kind == "server":
                pullers.fetch(self, one, name)
            case messages.Abandon(name) if one.kind == "server" and one.pid is not None:
                pullers.abandon(self, one.pid, name)
            case messages.Fetching() if one.kind == "puller":
                pullers.tell(self, one, word)
            case messages.Fetched() if one.kind == "puller":
                pullers.end(self, one, word)
            case messages.Stalled(slot) if one.kind == "server":
                for engine in self.engines:
                    if engine.slot == slot and engine.state is State.READY:
                        log.warning("%s hears nothing from %s", one.name, engine.title)
                        self.accuse(engine, "stalled")
            case messages.Aboard() if one.kind == "server":
                self.exits.hear(word)
            case _:
                log.warning("%s: unexpected word %s", one.title, type(word).__name__)

    def let_go(self) -> None:
        """Stop the engines that were released, unless a server that drains may have a job on them."""
        for engine in list(self.engines):
            if engine.released and engine.wanted and not (self.retired and engine.counters.running):
                self.unwant(engine)

    def greet(self, one: Child, hello: messages.Hello) -> None:
        if one.state not in (State.STARTING, State.STOPPING, State.KILLING):
            log.warning("%s says hello twice", one.title)
            return
        problem = ""
        if hello.protocol != messages.PROTOCOL:
            problem = (
                f"{one.name} speaks protocol {hello.protocol}, the supervisor {messages.PROTOCOL}: run `mlxd restart --supervisor`"
            )
        elif (hello.kind, hello.pid, hello.nonce) != (one.kind, one.pid, self.nonce):
            problem = f"{one.name} is not the process that was started: it says it is {hello.kind} {hello.pid}"
        if problem and one.state is State.STARTING:
            one.hold, one.hold_cause, one.suspicion = problem, "fault", "protocol"
            self.handle(one, Event.SICK)
            return
        one.beat_at = one.progress_at = self.loop.time()  # its imports are no silence
        one.version = hello.version
        self.handle(one, Event.GREETED)
        if one.kind == "server" or one.model is not None:
            self.order(one)
        if one.kind == "server" and one.link is not None:
            for engine in self.engines:
                if engine.state is State.READY:
                    one.link.send(self.engine_up(engine))
            if self.exits.last is not None:
                one.link.send(messages.Exited(msgspec.structs.replace(self.exits.last, flights=[])))

    def order(self, one: Child) -> None:
        """Set it to work, unless it has not said hello yet (then its hello does) or is on its way out."""
        if one.state is State.BLANK:
            self.handle(one, Event.ORDERED)

    def announce(self, one: Child) -> None:
        """It is ready: tell whom it concerns."""
        if one.kind == "engine":
            if one.preload:
                self.first_token = True
            self.tell_servers(self.engine_up(one))
            self.loop.call_later(SETTLE_S, self.mind_the_spare)
        elif one.kind == "server":
            self.polls.clear()
            for old in list(self.retired):
                if old.state is State.READY:  # the successor accepts: now this one may stop
                    self.unwant(old)

    def engine_up(self, engine: Child) -> EngineUp:
        assert engine.pid is not None and engine.model is not None
        return EngineUp(engine.slot, engine.pid, engine.model, str(self.paths.engine_socket(engine.slot)))

    def tell_servers(self, word: messages.SupervisorWord) -> None:
        for server in self.servers():
            if server.link is not None and server.state in RUNNING:
                server.link.send(word)

    def want(self, word: messages.Want) -> None:
        """An engine for this model, from now on; the latest wish wins over a stop under way."""
        self.refusals.pop(word.model, None)
        known = any(engine.model == word.model for engine in self.engines)
        if word.automatic and not known and (objection := self.boots.objection(word.model) or self.no_memory(word)):
            self.refusals[word.model] = objection
            self.tell_servers(EngineDown(0, word.model, objection, "refused"))
            return
        for engine in self.engines:
            if engine.model == word.model:
                engine.wanted = True
                engine.released = False
                engine.preload |= word.preload
                if engine.directory != word.directory:  # other files under the same name
                    engine.directory = word.directory
                    self.renew(engine)
                if engine.state is State.READY:
                    self.tell_servers(self.engine_up(engine))
                self.handle(engine, Event.WANTED)
                return
        if (spare := self.spare()) is None:
            self.new_engine(word)
            return
        spare.begin_anew(word)
        self.order(spare)

    def no_memory(self, word: messages.Want) -> str:
        """Why this model is not loaded unasked, in words; "" if it may be. Requests have others go for it, or are told more."""
        left = self.share(None)
        if word.needed_bytes <= left:
            return ""
        return (
            f"{word.model} needs {gigabytes(word.needed_bytes)} of memory, and engine.memory_limit leaves {gigabytes(left)}: it is not loaded "
            "before a request asks for it"
        )

    def new_engine(self, word: messages.Want | None) -> None:
        """For a model, or a blank one."""
        slot = next(n for n in range(1, 10_000) if all(e.slot != n for e in self.engines))
        engine = Child("engine", slot)
        if word is not None:
            engine.begin_anew(word)
        self.engines.append(engine)
        self.handle(engine, Event.WANTED)

    # --- watching --------------------------------------------------------------------------------------------------------------------

    async def tick_forever(self) -> None:
        """Once a second: ages, sizes, memory. The only thing here that wakes without a cause."""
        clocks = monitor.clocks()
        last_poll = self.loop.time()
        while True:
            await asyncio.sleep(1.0)
            before, clocks = clocks, monitor.clocks()
            paused = clocks[0] - before[0] - 1.0
            if monitor.slept(before, clocks) or paused > monitor.SLEEP_GAP_S:
                self.wake_up()
            self.tick()
            if self.loop.time() - last_poll >= self.config.health.interval_s and (self.poll is None or self.poll.done()):
                last_poll = self.loop.time()
                self.poll = self.keep(self.poll_health())

    def wake_up(self) -> None:
        """The machine slept, or we were stopped: everything looks late now. Look again before judging."""
        self.say("slept", "mlxd has not run for a while, or the machine slept; every deadline begins anew")
        now = self.loop.time()
        for one in self.children():
            one.beat_at = one.progress_at = now
            if one in self.timers:
                self.set_deadline(one, self.patience(one))

    def tick(self) -> None:
        now, limits = self.loop.time(), self.config.supervisor
        self.ticks += 1
        oom_kills = child.oom_kills()
        for one in self.children():
            if one.measure():
                one.oom_kills = oom_kills
            self.look_at_beats(one, now)
            self.look_at_progress(one, now)
            self.look_at_memory(one, now)
            if one.state is State.READY and one.ready_at and now - one.ready_at > limits.healthy_s:
                one.counted.clear()
                one.trial = False
                one.tuning = messages.Tuning()
                if one.kind == "engine" and one.model is not None:
                    self.boots.pass_trial(one.model)
            if self.look_at_log(one):
                self.loop.call_later(LOG_AGAIN_S, self.look_at_log, one)
        child.shorten_log(self.paths.log("supervisor"), limits.log_bytes, limits.log_keep_bytes)
        self.look_at_state()
        self.let_go()
        self.mind_the_spare()
        self.mend_control()
        if self.ticks % EXCESS_TICKS == 0:
            self.look_at_excess()
        if self.ticks % max(1, round(limits.hold_s)) == 0:
            self.look_at_holds()
            self.papers.retry()
        if self.ticks % LOOK_TICKS == 0:
            self.lock.mend()
        self.awake.keep(limits.keep_awake and not self.stopping, now)
        self.notifier.status(status.sentence(self))
        self.notifier.ping(now)  # last: everything above has been looked at

    def mend_control(self) -> None:
        """A cleaner of temporary files was here: without its name nobody finds the control socket."""
        if not os.path.exists(self.paths.control) and not self.handing_over:  # noqa: PTH110 Path.exists raises EACCES and EIO
            log.warning("the control socket was removed; it is put back")
            with contextlib.suppress(ConfigError):  # the next look tries again
                paths.prepare(self.paths)
                self.control.move(desk.listen(self.paths.control))

    def look_at_beats(self, one: Child, now: float) -> None:
        if not one.alive or one.state not in RUNNING:
            return
        health = self.config.health
        silent_s = now - one.beat_at
        if silent_s > health.suspect_s and not one.suspect:
            one.suspect = True
            log.warning("%s has not beaten for %.1f s", one.title, silent_s)
            one.dump_stack()
        if silent_s > (health.frozen_loading_s if one.state is State.LOADING else health.frozen_s):
            one.suspicion = "paused" if one.pid is not None and child.is_paused(one.pid) else "frozen"
            self.handle(one, Event.SICK)

    def look_at_progress(self, one: Child, now: float) -> None:
        """Beats go on, so nothing is frozen, but work is in hand and stands still. What moves, however slowly, is left alone."""
        if one.kind != "engine" or one.state is not State.READY or not one.counters.running:
            return
        health = self.config.health
        if now - one.progress_at > (health.stalled_prefill_s if one.counters.prefilling else health.stalled_s):
            self.accuse(one, "stalled")

    # --- memory ------------------------------------------------------------------------------------------------------------------------

    def share(self, one: Child | None) -> int:
        """What this engine, or one more, may take of memory: what those with other models leave, or will leave once they are loaded."""
        others = [
            engine.memory_bytes if engine.ready_at else max(engine.memory_bytes, engine.needed_bytes)
            for engine in self.engines
            if engine is not one and engine.model is not None
        ]
        return shares.share(shares.limit(self.config.engine.memory_limit), others)

    def look_at_memory(self, one: Child, now: float) -> None:
        """Tell an engine what the others leave it now. One that has outgrown that by itself is replaced: at once if it is far beyond, else
        when it is idle, or after a while. Its requests go on in the next."""
        if one.kind != "engine" or one.state is not State.READY or one.link is None or one.model is None:
            return
        one.ready_bytes = one.ready_bytes or one.memory_bytes
        share_bytes = self.share(one)
        if abs(share_bytes - one.share_bytes) > shares.WORTH_TELLING * one.share_bytes:
            one.share_bytes, one.shared_at = share_bytes, now
            one.link.send(messages.Share(share_bytes))
        if now < one.shared_at + shares.GIVING_S:
            return
        crowding = shares.crowding(one.memory_bytes, one.ready_bytes, one.share_bytes)
        one.crowded = [*one.crowded, now] if crowding is not Crowding.FINE else []
        one.hard_looks = one.hard_looks + 1 if crowding is Crowding.HARD else 0
        if len(one.crowded) < shares.LOOKS:
            return
        if one.hard_looks >= shares.LOOKS or not one.counters.running or now - one.crowded[0] > shares.PATIENCE_S:
            log.warning("%s takes %d bytes, its share is %d", one.title, one.memory_bytes, one.share_bytes)
            one.suspicion = causes.GROWN.name
            self.handle(one, Event.RENEWED)
            one.ordered = one.alive

    def look_at_excess(self) -> None:
        """Descriptors and processes that are never given back end with a child, or a machine, on which nothing can be started any more."""
        now = child.processes()
        self.processes = min(self.processes, now)
        crowded = now - self.processes > child.MOST_PROCESSES
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        descriptors = float("inf") if limit == resource.RLIM_INFINITY else limit * child.MOST_DESCRIPTORS
        for one in self.children():
            if one.alive and one.state in RUNNING and not one.suspicion and (what := one.exceeds(descriptors, crowded)):
                log.warning("%s %s", one.title, causes.CAUSES[what].what)
                one.suspicion = what
                if one is self.server and one.state is State.READY:
                    self.restart_server()  # its streams may end
                else:
                    self.handle(one, Event.SICK)

    def look_at_log(self, one: Child) -> bool:
        """See that its log is there and not too long; what is wrong is told once, until it is over. True: it was cut."""
        limits, path = self.config.supervisor, self.paths.log(one.name)
        one.mend_log(path)
        if one.log_problem:
            with contextlib.suppress(ConfigError):  # the directory may have been removed
                paths.own_directory(self.paths.logs)
                one.mend_log(path)
        if one.log_problem and not one.log_lost:
            self.say("log_lost", f"{one.title} has no log ({path}: {one.log_problem}); its lines are lost until it has", one)
        one.log_lost = bool(one.log_problem)
        cut = one.shorten_log(path, limits, self.loop.time())
        one.flooding &= bool(one.cuts)
        if cut and not one.flooding:
            log.warning("the log of %s was over %d bytes and was cut", one.name, limits.log_bytes)
            if one.floods(limits):
                one.flooding = True
                self.say("log_flooded", f"{one.title} floods its log; the end of it is kept, under {limits.log_bytes} bytes", one)
        return cut

    def look_at_state(self) -> None:
        """Tell when mlxd as a whole is ready, degraded or neither. Looked at once a second: what ends sooner is not told."""
        state, reason = status.overall(self)
        event = state if state in ("ready", "degraded") else "unavailable"
        if event == self.told or self.stopping or (state == "starting" and not self.told):
            return
        self.told = event
        self.say(event, f"mlxd is {event}: {reason}" if reason else f"mlxd is {event}")

    def look_at_holds(self) -> None:
        """HELD ends when its cause does."""
        if self.obstacle:
            self.begin()
        for one in self.children():
            self.await_memory(one, 0.0)
            if one.state is State.HELD and one.unfit_program:
                program = child.command(one.kind, self.config)[0]
                if child.program_id(program) != one.unfit_program:  # an upgrade was under way
                    self.handle(one, Event.MENDED)

    def await_memory(self, one: Child, until: float) -> None:
        """Go on as soon as a killed process's memory is back."""
        if one.state is not State.HELD or one.hold_cause != "memory":
            return
        if one.memory_is_back():
            self.handle(one, Event.UNWANTED if self.give_to_spare(one) else Event.MENDED)
        elif self.loop.time() < until:
            self.loop.call_later(MEMORY_LOOK_S, self.await_memory, one, until)
        elif until and one.model is not None:
            log.error("%s: %s", one.title, one.hold)
            self.tell_servers(EngineDown(one.slot, one.model, one.hold, "retried", self.config.supervisor.cooldown_s))

    async def poll_health(self) -> None:
        server = self.server
        if server is None or server.state is not State.READY:
            return
        health, pid = self.config.health, server.pid
        where = self.port.address(self.config.server), self.port.number(self.config.server)
        answer = await monitor.poll(*where, self.nonce, health.max_time_s)
        if server.pid != pid or server.state is not State.READY:
            return  # about an earlier process
        now = self.loop.time()
        self.polls, self.answer = [*self.polls[-4:], answer is monitor.Answer.OURS], answer
        beat_age_s, lag_s, rested_s = now - server.beat_at, server.counters.loop_lag_s, now - self.flapped_at
        match policy.health(self.polls, health.misses, beat_age_s, lag_s, health.lag_s, rested_s):
            case Health.SICK:
                if not policy.is_silent(self.polls, health.misses):
                    self.flapped_at = now
                log.warning("the server does not answer /health (%s)", answer.value)
                server.suspicion = "unresponsive"
                server.dump_stack()
                self.handle(server, Event.SICK)
            case Health.DOUBTFUL:
                log.info("a health poll got no answer of ours (%s)", answer.value)

    def watch_files(self) -> monitor.Files:
        # Its threads take no signals: a hand-over could not block them there.
        with handover.blocked_signals():
            files = monitor.Files(
                [self.paths.config, self.paths.env_file, self.paths.token, self.paths.pid_file, self.paths.lock],
                self.look_at_files,
            )
            try:
                files.start()
            except OSError as error:
                log.warning("files are not watched: %s; `mlxd reload` applies a change", error)
        return files

    def look_at_files(self, changed: set[Path]) -> None:
        if self.done.is_set():
            return
        if changed & {self.paths.pid_file, self.paths.lock}:
            self.lock.mend()
        if changed & {self.paths.config, self.paths.env_file, self.paths.token}:
            self.try_reload()

    def mind_the_port(self) -> None:
        """While a server accepts, it has the port; two seconds after the last one stopped, we answer for ourselves."""
        if self.stopping or any(s.state is State.READY for s in self.servers()):
            self.port.leave()
        else:
            self.port.miss(self.config.supervisor.takeover_s)

    # --- before us and after us -----------------------------------------------------------------------------------------------------------

    def remember(self) -> None:
        """Let the next supervisor find what we leave behind if we are killed, and `mlxd recover` find us if we hang."""
        left = [found for one in self.children() if (found := one.leftover(self.nonce)) is not None]
        self.papers.write(self.paths.state, leftovers.memory_of(left, self.boot))

    def sweep(self) -> None:
        """End what an earlier run left behind, if it is provably ours; what is not is waited for, since it may hold a model's memory."""
        limits = self.config.supervisor
        leftovers.sweep(leftovers.recall(self.paths, self.boot), limits.term_s, limits.kill_s)
        self.take_lease(link.LAST_S + 1.0)
        paths.clear_unfinished(self.paths)

    @property
    def obstacle(self) -> str:
        """Why nothing can be begun, in words; "" when nothing is in the way."""
        return self.lease_problem or self.port.problem

    def take_lease(self, patience_s: float) -> None:
        try:
            self.lease = leftovers.take_lease(self.paths, patience_s)
        except MlxdError as error:
            self.lease_problem = str(error)
            log.error("%s", error)
        else:
            self.lease_problem = ""

    # --- verbs and signals ---------------------------------------------------------------------------------------------------------------

    def watch_signals(self) -> None:
        self.dump, _ = paths.open_log_anyway(self.paths.log("supervisor"))  # open for ever: a dump is no time to open a file
        # Not faulthandler.register, which dumps between any two machine instructions and has crashed on frames that were just being made:
        # this waits for the interpreter, which only native code could keep from it, and a supervisor has none that is long.
        signal.signal(signal.SIGUSR1, lambda number, frame: faulthandler.dump_traceback(self.dump))
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self.stop, signal.Signals(number).name)
        self.terminal = has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # nohup: outlive it
        self.loop.add_signal_handler(signal.SIGHUP, self.heed_hup)
        self.loop.add_signal_handler(signal.SIGCHLD, self.reap)

    def heed_hup(self) -> None:
        """A storm of them is one."""
        if self.hup is None:
            self.hup = self.loop.call_later(HUP_S, self.hang_up)

    def hang_up(self) -> None:
        """HUP: a terminal that closes takes what runs in its foreground with it; to a daemon it says to read its configuration again."""
        self.hup = None
        if not self.terminal or has_terminal():
            self.try_reload()
        elif not self.stopping:  # the shell and the system may both say so
            self.stop("its terminal was closed")

    def try_reload(self) -> None:
        """Nobody waits for the answer: a refusal is told in `status` and in the log."""
        if not self.stopping:
            with contextlib.suppress(MlxdError):
                self.reload()

    def verbs(self) -> dict[str, desk.Verb]:
        return {
            "status": self.do_status,
            "exits": self.do_exits,
            "stop": self.do_stop,
            "restart": self.do_restart,
            "restart_supervisor": self.do_restart_supervisor,
            "reload": self.do_reload,
        }

    async def do_status(self, _: dict[str, Any]) -> dict[str, Any]:
        return status.report(self)

    async def do_exits(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"exits": self.exits.shown()}

    async def do_stop(self, _: dict[str, Any]) -> dict[str, Any]:
        if not self.stopping:
            self.stop("mlxd stop")
        return {"pid": os.getpid()}

    async def do_reload(self, _: dict[str, Any]) -> dict[str, Any]:
        self.refuse_when_stopping()
        return {"changed": self.reload()}

    async def do_restart(self, _: dict[str, Any]) -> dict[str, Any]:
        """A new server beside the old one, by the configuration as it is now. Engines stay, and their models with them."""
        self.refuse_when_stopping()
        self.reload(restart=True)
        return {"pid": os.getpid()}

    async def do_restart_supervisor(self, _: dict[str, Any]) -> dict[str, Any]:
        """The code on disk in place of ours, in this process; it is the new one that answers."""
        self.refuse_when_stopping()
        if self.handing_over:
            raise MlxdError("the supervisor is being replaced already")
        self.handing_over = True
        self.notifier.reloading()
        try:
            await handover.hand_over(self)
        finally:
            self.handing_over = False
            self.notifier.ready()

    def refuse_when_stopping(self) -> None:
        """Raises MlxdError."""
        if self.stopping:
            raise MlxdError("mlxd is stopping; run `mlxd start` when it has")

    def restart_server(self) -> None:
        """The new server starts before the old one stops; one that does not serve is simply renewed."""
        old = self.server
        if old is None or self.obstacle:
            self.look_at_holds()
        elif old.state is State.READY:
            for older in self.retired[: 1 - MOST_DRAINING]:
                self.retire(older, min(older.drain_s, self.config.server.drain_s))
            old.drain_s = self.config.supervisor.replace_drain_s
            self.retired.append(old)
            self.server = Child("server", 0, restarts=old.restarts + 1)
            self.handle(self.server, Event.WANTED)
        else:
            self.renew(old)

    def renew(self, one: Child) -> None:
        """A new process in place of this one, and nothing of its past held against it."""
        one.counted.clear()
        one.trial = False
        one.tuning = messages.Tuning()
        self.handle(one, Event.RENEWED)
        one.ordered = one.alive and one.state in LEAVING

    def reload(self, restart: bool = False) -> list[str]:
        """Apply the files as they are now; returns the changed names. Raises MlxdError, and then the old configuration stays.

        A server or an engine is replaced if what it reads has changed, or if it is held because something was wrong that may be right now;
        with `restart` the server in any case, and engines that are not of our version, or wait for their next try.
        """
        self.notifier.reloading()
        try:
            (new, stamp), old = load(self.paths, self.flags), self.config
            if (new.server.port, new.server.host) != (old.server.port, old.server.host) and not self.obstacle:
                self.port.move(new.server, old.server.host)
        except MlxdError as error:
            self.config_problem = str(error)
            self.say("reload_refused", f"mlxd: the new configuration is refused, the old one stays: {error}")
            raise
        finally:
            self.notifier.ready()
        changed = differences(old, new) + (["token"] if stamp != self.tokens else [])
        mended = bool(self.config_problem)
        self.config, self.tokens, self.config_problem = new, stamp, ""
        if changed:
            if new.log != old.log:
                begin_log(self.paths.log("supervisor"), new.log.format)
            self.say("reloaded", f"mlxd: the configuration changed: {', '.join(changed)}")
        if not (changed or mended or restart):
            return []
        for engine in list(self.engines):
            outdated = engine.pid is None or engine.version not in ("", __version__)
            if config.of_engine(new) != config.of_engine(old) or engine.hold_cause == "fault" or (restart and outdated):
                self.renew(engine)
        server_held = self.server is not None and self.server.hold_cause == "fault"
        if config.of_server(new) != config.of_server(old) or "token" in changed or server_held or restart:
            self.restart_server()
        self.look_at_holds()
        return changed


def load(where: paths.Paths, flags: dict[str, Any]) -> tuple[Config, str]:
    """The configuration as a daemon reads it (its own .env only), and the stamp of the tokens. Raises ConfigError."""
    settings = config.load(where.config, [where.env_file], os.environ, flags).config
    found = tokens.load(where.token, settings)
    return settings, found.stamp if found else ""


def differences(old: Config, new: Config) -> list[str]:
    """Dotted names of the settings that differ."""
    return [
        f"{section}.{key}"
        for section in old.__struct_fields__
        for key in getattr(old, section).__struct_fields__
        if getattr(getattr(old, section), key) != getattr(getattr(new, section), key)
    ]


def last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2] or "it said nothing"


def has_terminal() -> bool:
    """Whether this session has a controlling terminal, and it is still there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def begin_log(path: Path, form: str) -> None:
    """Our log goes to the file, and to stderr where a person looks on."""
    logs.begin(form, functools.partial(paths.append, path), *([logs.to_stderr] if sys.stderr.isatty() else []))


def main(arguments: list[str]) -> int:
    """Run the supervisor in the foreground; the exit status. `arguments`: any number of `--set section.key=JSON`."""
    os.umask(0o077)
    rehearsal = arguments[-1:] == [handover.REHEARSE]
    arguments = arguments[:-1] if rehearsal else arguments
    flags = {}
    for name, value in zip(arguments[::2], arguments[1::2], strict=True):
        assert name == "--set", name
        dotted, _, text = value.partition("=")
        flags[dotted] = json.loads(text)
    where = paths.locate()
    try:
        handed = handover.receive()
        if rehearsal:
            load(where, flags)
            return 0 if handed is not None and handed.settings else 1
        if handed is None:
            paths.prepare(where)
            (settings, stamp), lock = load(where, flags), Lock(where)
        else:
            settings, stamp, lock = handed.settings, handed.tokens, Lock(where, handed.lock_fd)
        begin_log(where.log("supervisor"), settings.log.format)
        link.raise_nofile(8192)
        return asyncio.run(Supervisor(where, settings, stamp, flags, lock, handed).run())
    except AlreadyRunning as running:
        print(running, file=sys.stderr)
        return running.exit_status
    except MlxdError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
