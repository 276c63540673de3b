"""The pool: the server's view of the engines. Which models are wanted, who is connected, which jobs they have.

Decides what is loaded and what is evicted; the supervisor carries it out (Want, Release) and says what became of it (EngineUp,
EngineDown). Does not know HTTP, nor who waits for an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import re
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import psutil

from mlxd import causes, estimate, messages, shares
from mlxd.config import Config
from mlxd.errors import Refused
from mlxd.estimate import gigabytes
from mlxd.journal import Entry
from mlxd.messages import (
    MOST_FLIGHTS,
    Aboard,
    Cancel,
    Counters,
    Done,
    Embedded,
    EngineDown,
    EngineUp,
    Event,
    Failed,
    Loaded,
    Pulse,
    Release,
    Stalled,
    Step,
    Token,
    Want,
)
from mlxd.models import Model

#: A connection to an engine that is up is tried again after this long.
RECONNECT_S = 0.25
#: Events that may wait for a client that does not read; it has 64 KiB in this process and what the kernel holds before that.
MOST_UNREAD = 8192
#: Available memory that is left to others: a twentieth of the machine's, a gigabyte at most.
RESERVE_SHARE, MOST_RESERVE = 20, 2**30
#: The memory of a process that has ended has so long to come back before another one goes, and so long, like what Ollama was asked to give
#: up, before a request is refused; it is looked for so often.
SOON_S, GIVEN_BACK_S, LOOK_S = 2.0, 10.0, 1.0
#: An engine that was released and has not gone by then has a job of a server that drains.
GOING_S = 5.0
#: The code of the Refused that says that a model cannot be loaded just now, but will be tried again.
RETRIED = "retried"
#: A sweep that comes so much late means that this process was stopped: nothing could be heard meanwhile.
PAUSE_S = 2.0
#: Ends of an engine that are not the fault of those who lose it: somebody outside, or mlxd itself, ended it; "deadline": the guilty
#: request was answered; "": only the connection broke.
FAULTLESS = causes.FAULTLESS | {""}

#: What keeps a model from being loaded: `max_cached`, `memory_limit`, or what is available.
Lack = Literal["count", "limit", "free"]
State = Literal["absent", "loading", "ready", "retried", "releasing"]


class EngineGone(Exception):
    """The connection ended under a job."""


class Job:
    """One request on one engine: what came from it and was not yet taken."""

    def __init__(self, number: int, entry: Entry):
        self.number = number
        self.entry = entry
        self.events: deque[Event] = deque()
        self.gone: Exception | None = None
        self.waiter: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        self.events.append(event)
        self.wake()

    def end(self, why: Exception) -> None:
        """No more events after those that are here."""
        self.gone = why
        self.wake()

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def get(self) -> Event:
        """The next event. Raises EngineGone or Refused when there will be none."""
        while not self.events:
            if self.gone is not None:
                raise self.gone
            self.waiter = asyncio.get_running_loop().create_future()
            try:
                await self.waiter
            finally:
                self.waiter = None
        return self.events.popleft()


class Connection:
    """A connected engine's socket and the jobs on it. `digest`: of the model's files when it came up. `heard_at`: when it last said
    anything of a job or did any work, or got a job while it had none; infinity once that has been found too long ago. `cause`: the class
    of what ended the engine; None while it is not known, also when only the connection is broken."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, loaded: Loaded):
        self.reader = reader
        self.writer = writer
        self.loaded = loaded
        self.jobs: dict[int, Job] = {}
        self.numbers = itertools.count(1)
        loop = asyncio.get_running_loop()
        self.clock = loop.time
        self.counters = Counters()
        self.beat_at = self.token_at = self.heard_at = loop.time()
        self.digest = ""
        self.cause: str | None = None

    @classmethod
    async def open(cls, path: str, model: str) -> Connection:
        """Raises OSError, or ValueError when no engine of `model` is there (slots and their sockets are used again)."""
        reader, writer = await asyncio.open_unix_connection(path, limit=1024 * 1024)
        try:
            first = await read_frame(reader)
            if not isinstance(first, Loaded) or first.model != model:
                raise ValueError(f"no engine of {model} at {path}")
        except BaseException:
            writer.close()
            raise
        return cls(reader, writer, first)

    def submit(self, entry: Entry) -> Job:
        """Raises Refused when an engine cannot be told of it."""
        job = Job(next(self.numbers), entry)
        try:
            frame = messages.frame(entry.submit(job.number, self.digest))
        except OverflowError:  # msgpack's integers have 64 bits, JSON's any number
            raise Refused(400, "a number in the request is too large: integers have at most 64 bits", hopeless=True) from None
        except ValueError as error:
            raise Refused(400, f"the request is too large: {error}", hopeless=True) from None
        if not self.jobs:
            self.heard_at = self.clock()
        self.writer.write(frame)
        self.jobs[job.number] = job
        return job

    def leave(self, job: Job) -> None:
        """Nobody waits for this job any more; nothing happens when it has ended."""
        if self.jobs.pop(job.number, None) and not self.writer.is_closing():
            self.writer.write(messages.frame(Cancel(job.number)))

    def hand_out(self, event: Event) -> None:
        job = self.jobs.get(event.job)
        if job is None:  # cancelled meanwhile
            return
        job.put(event)
        if isinstance(event, (Done, Embedded, Failed)):
            del self.jobs[event.job]
        elif len(job.events) > MOST_UNREAD:
            job.end(Refused(503, "the client did not read its answer"))
            self.leave(job)

    async def listen(self) -> None:
        """Hand out what comes until the engine is gone. Raises OSError, ValueError or EOFError then."""
        while True:
            match await read_frame(self.reader):
                case Step(events=events):
                    self.beat_at = self.heard_at = self.clock()
                    for event in events:
                        if type(event) is Token:
                            self.token_at = self.beat_at
                        self.hand_out(event)
                case Pulse(counters=counters):
                    self.beat_at = self.clock()
                    if (counters.prefilled, counters.emitted) != (self.counters.prefilled, self.counters.emitted):
                        self.heard_at = self.beat_at  # it works for another server, whose jobs may fill it
                    self.counters = counters

    def close(self) -> list[Entry]:
        """The requests that it had."""
        self.writer.close()
        jobs, self.jobs = list(self.jobs.values()), {}
        for job in jobs:
            job.entry.enter("lost")
            job.end(EngineGone())
        return [job.entry for job in jobs]


async def read_frame(reader: asyncio.StreamReader) -> messages.FromEngine:
    """Raises EOFError at the end, ValueError on what is no frame."""
    (length,) = messages.LENGTH.unpack(await reader.readexactly(messages.LENGTH.size))
    if length > messages.MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes")
    return messages.from_engine.decode(await reader.readexactly(length))  # type: ignore[no-any-return]


class Engine:
    """What is known of the engine of one model.

    `state`: absent (not wanted), loading (wanted; also while a dead one is replaced), ready (connected), retried (the supervisor tries
    again at `retry_at`), releasing. `users`: requests that wait for it or run on it; with none it is idle. `served`: those of them that
    have a slot. `pinned`: it goes for nobody. `cause`: why it last went. `latest`: the connection, or the one before. `suspects`: requests
    that run alone, one after the other, since engines died under them.
    """

    def __init__(self, model: Model, keep_alive_s: float, now: float):
        self.model = model
        self.keep_alive_s = keep_alive_s
        self.preloaded = False
        self.pinned = False
        self.released_at = -math.inf
        self.state: State = "absent"
        self.up: EngineUp | None = None
        self.connection: Connection | None = None
        self.latest: Connection | None = None
        self.connecting: asyncio.Task[None] | None = None
        self.cause = ""
        self.retry_at = 0.0
        self.refusals = 0
        self.users = 0
        self.served = 0
        self.suspects: list[Entry] = []
        self.used_at = now

    @property
    def idle(self) -> bool:
        return self.users == 0 and self.state not in ("absent", "releasing")

    def is_going(self, now: float) -> bool:
        """It was released, and nothing keeps it."""
        return self.state == "releasing" and now < self.released_at + GOING_S

    @property
    def memory_bytes(self) -> int:
        """What it takes or, while it loads, will take at the least."""
        active = self.connection.counters.active_bytes if self.connection else 0
        return max(self.model.size_bytes, active)

    @property
    def context_length(self) -> int:
        return self.connection.loaded.context_length if self.connection else self.model.context_length

    @property
    def expires_at(self) -> float:
        """On the loop's clock; infinity: never."""
        return self.used_at + self.keep_alive_s


class Pool:
    """All engines, by canonical model name. `say` sends a word to the supervisor; `look_up` finds a model by its name, or None. `ask_neighbour`
    asks Ollama to unload its models, and tells whether it had any."""

    def __init__(
        self,
        config: Config,
        keep_alive_s: float,
        say: Callable[[Want | Release | Stalled | Aboard], None],
        look_up: Callable[[str], Awaitable[Model | None]],
        ask_neighbour: Callable[[], Awaitable[bool]] | None = None,
    ):
        self.config = config
        self.keep_alive_s = keep_alive_s
        self.say = say
        self.look_up = look_up
        self.ask_neighbour = ask_neighbour
        self.engines: dict[str, Engine] = {}
        self.making_room = asyncio.Lock()
        self.turn_at = math.inf  # from when on nobody new goes before the one that room is being made for
        self.gone_at = -math.inf  # when some process last gave its memory back, or was asked to
        self.changed = asyncio.Event()  # some engine's state
        self.left = asyncio.Event()  # somebody left an engine, or it has gone
        self.swept_at = math.inf

    @property
    def present(self) -> list[Engine]:
        return [engine for engine in self.engines.values() if engine.state != "absent"]

    def loaded(self) -> list[Engine]:
        return [engine for engine in self.engines.values() if engine.state == "ready"]

    def clock(self) -> float:
        """What `expires_at` is measured on."""
        return now()

    # --- what requests do -----------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, model: Model, keep_alive_s: float | None = None) -> Iterator[Engine]:
        """The engine of `model`, not idle meanwhile, whatever its state. `keep_alive_s` None: as before; 0: released afterwards."""
        engine = self.engine(model)
        if engine.users == 0 and engine.state in ("absent", "releasing"):
            # What was said of an earlier engine is over.
            engine.keep_alive_s = math.inf if engine.preloaded else self.keep_alive_s
        engine.users += 1
        if keep_alive_s is not None:
            engine.preloaded &= keep_alive_s > 0
            engine.pinned &= keep_alive_s > 0
            if not engine.pinned:
                engine.keep_alive_s = keep_alive_s
        try:
            yield engine
        finally:
            engine.users -= 1
            engine.used_at = now()
            self.left.set()
            if engine.idle and engine.expires_at <= engine.used_at:
                self.release(engine)

    @contextmanager
    def serving(self, engine: Engine) -> Iterator[None]:
        """For a request that has a slot."""
        engine.served += 1
        try:
            yield
        finally:
            engine.served -= 1

    async def ready(self, engine: Engine, hurry: Callable[[], Awaitable[float]], new: bool = False) -> Connection:
        """A connection to the engine, which is loaded first if need be. `new`: for a request that has no slot yet. Raises Refused: 400 it
        cannot be loaded, 507 there will be no memory for it, 503 there is no room for it now, or it died and is tried again later than in
        so many seconds as `hurry` then says."""
        refusals, came_at = engine.refusals, now()
        while True:
            stands_aside = new and came_at >= self.turn_at and not engine.pinned
            if engine.connection is not None and engine.state == "ready" and not stands_aside:
                return engine.connection
            if engine.refusals != refusals:
                raise Refused(
                    400, f"model '{engine.model.name}' cannot be loaded: {engine.cause}", code="model_refused", hopeless=True
                )
            if (state := engine.state) in ("absent", "retried") and engine.retry_at > now():
                retry_s = await hurry()
                if engine.state != state:
                    continue
                if (left := engine.retry_at - now()) > retry_s:
                    raise Refused(503, f"{engine.model.name} cannot be loaded just now: {engine.cause}", code=RETRIED, retry_s=left)
            if engine.state == "absent":
                await self.load(engine)
            elif engine.state == "releasing" and engine.connection is not None and not self.making_room.locked():
                self.want(engine)  # it may live on for long: for a job that an older server has on it
            else:
                await self.changed.wait()

    async def events(self, engine: Engine, entry: Entry, hurry: Callable[[], Awaitable[float]]) -> AsyncGenerator[Event, None]:
        """All events of a request, from as many engines as it takes, each of them `ready`. The last is Done or Embedded. Raises Refused."""
        while True:
            connection = await self.ready(engine, hurry)
            on_trial = entry.suspect
            if on_trial:
                engine.suspects.append(entry)
            try:
                if not await self.let_suspects_pass(engine, entry, connection):
                    continue
                job = connection.submit(entry)
                try:
                    while True:
                        event = await job.get()
                        if isinstance(event, Failed):
                            hopeless = event.status < 500 or event.status == 507
                            raise Refused(event.status, event.message, code=event.code, hopeless=hopeless)
                        entry.note(event)
                        if on_trial and not entry.suspect:
                            on_trial = False
                            self.acquit(engine, entry)
                        yield event
                        if isinstance(event, (Done, Embedded)):
                            return
                finally:
                    connection.leave(job)
            except EngineGone:
                cause = await self.cause_of_end(engine, connection)
                if cause not in FAULTLESS:
                    entry.outlive(cause)
            finally:
                if on_trial:
                    self.acquit(engine, entry)

    async def cause_of_end(self, engine: Engine, connection: Connection) -> str:
        """The class of what ended the engine at the other end; "" when only the connection broke."""
        while connection.cause is None and engine.connection is None:
            await self.changed.wait()
        return connection.cause or ""

    async def let_suspects_pass(self, engine: Engine, entry: Entry, connection: Connection) -> bool:
        """Requests under which engines keep dying go first and alone, until they make progress: so only the guilty one is given up.
        False: the engine has changed meanwhile."""
        if entry.attempts:
            await asyncio.sleep(0)  # whoever waited for this engine, too, has said by now whether he is suspect
        while engine.suspects and engine.suspects[0] is not entry:
            await self.changed.wait()
        return engine.connection is connection

    def acquit(self, engine: Engine, entry: Entry) -> None:
        engine.suspects.remove(entry)
        self.turn(engine, engine.state)

    # --- loading and releasing ------------------------------------------------------------------------------------------------

    def engine(self, model: Model) -> Engine:
        """The same whatever name it is called by. Also when its files have changed: then it is another model of the same name, for the next
        load."""
        model = model.weights
        engine = self.engines.setdefault(model.name, Engine(model, self.keep_alive_s, now()))
        engine.model = model
        return engine

    def preload(self, model: Model, pinned: bool = False) -> None:
        engine = self.engine(model)
        engine.preloaded = True
        engine.pinned |= pinned
        engine.keep_alive_s = math.inf
        if engine.state == "absent":
            self.want(engine, automatic=True)

    async def load(self, engine: Engine) -> None:
        """Make room for the engine, then want it. Raises Refused: 507 when there will be none, 503 when none of the others becomes idle in
        `queue_wait_s`."""
        try:
            async with asyncio.timeout(self.config.server.queue_wait_s), self.making_room:
                await self.make_room(engine)
                if engine.state == "absent":
                    self.want(engine)
        except TimeoutError:
            raise Refused(503, "every loaded model is busy; please try again", code="no_room", retry_s=5) from None

    async def make_room(self, engine: Engine) -> None:
        """Have others go, one after the other, until there is room. Raises Refused when there will be none.

        Where a request has a slot, engines whose requests have none go, too: they wait for slots, and he would wait for them. So do, after
        a quarter of `queue_wait_s`, those whose new requests have stood aside: each model has its turn."""
        began = now()
        asked = False
        try:
            while engine.state == "absent" and self.lacks(engine, self.others(engine)):
                self.turn_at = began + self.config.server.queue_wait_s / 4
                staying = [other for other in self.others(engine) if not other.is_going(now())]
                pinned = [other for other in staying if other.pinned]
                lacks, short = self.lacks(engine, pinned), self.lacks(engine, staying)
                if lacks == {"free"} and not asked and self.ask_neighbour is not None and now() >= self.gone_at + GIVEN_BACK_S:
                    asked = True
                    if await self.ask_neighbour():
                        self.gone_at = now()
                elif lacks and (lacks != {"free"} or now() >= self.gone_at + GIVEN_BACK_S):
                    raise self.no_memory(engine, pinned, lacks)
                elif short == {"free"} and now() < self.gone_at + SOON_S:
                    await self.look_again()
                elif short and (going := self.next_to_go(engine, staying)):
                    self.release(going)
                else:
                    await self.look_again()
        finally:
            if self.turn_at < math.inf:
                self.turn_at = math.inf
                self.turn(engine, engine.state)  # no room is being made any more

    def next_to_go(self, engine: Engine, staying: list[Engine]) -> Engine | None:
        """The first of those that may go now, if there is room once they have: idle ones, those that were not preloaded, and those that have
        not been used for longest before others."""
        turn_is_over = now() >= self.turn_at
        going = [
            other
            for other in staying
            if not other.pinned
            and (other.idle or (other.state == "ready" and (engine.served or turn_is_over) and not other.served))
        ]
        going.sort(key=going_first)
        for count in range(1, len(going) + 1):
            if not self.lacks(engine, [other for other in staying if other not in going[:count]]):
                return going[0]
        return None

    async def look_again(self) -> None:
        """When somebody has left or an engine has changed, or in a second: memory comes back without a word."""
        self.left.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await self.left.wait()

    async def retire(self, name: str) -> None:
        """End the engine of the model called so, once nobody uses it. Raises Refused when somebody does for `queue_wait_s`."""
        engine = self.engines.get(name)
        try:
            async with asyncio.timeout(self.config.server.queue_wait_s):
                while engine is not None and engine.state != "absent":
                    if engine.idle:
                        self.release(engine)
                    else:
                        self.left.clear()
                        await self.left.wait()
        except TimeoutError:
            raise Refused(503, f"{name} is busy; please try again", code="busy", retry_s=5) from None

    # --- memory ---------------------------------------------------------------------------------------------------------------

    def others(self, engine: Engine) -> list[Engine]:
        return [other for other in self.present if other is not engine]

    def needed(self, engine: Engine) -> int:
        """Bytes without which the engine is not loaded: weights, a step, and a context that is worth it."""
        return engine.model.needed_bytes(self.least_context(engine))

    def least_context(self, engine: Engine) -> int:
        limits = (estimate.LEAST_CONTEXT, engine.model.context_length, self.config.models.context_length)
        return min(limit for limit in limits if limit)

    def lacks(self, engine: Engine, staying: list[Engine]) -> set[Lack]:
        """What keeps this engine from being loaded beside `staying`, once all others have gone: too many models, the limit, or what is
        available."""
        most = self.config.models.max_cached
        free, limit = self.rooms(engine, staying)
        reasons: dict[Lack, bool] = {"count": 0 < most <= len(staying), "limit": self.needed(engine) > limit}
        reasons["free"] = self.needed(engine) > free
        return {lack for lack, found in reasons.items() if found}

    def rooms(self, engine: Engine, staying: list[Engine]) -> tuple[int, int]:
        """Bytes that are available, and that the limit of all engines leaves, beside `staying`."""
        gone = [other for other in self.others(engine) if other not in staying and other.connection is not None]
        loading = [other for other in staying if other.state == "loading"]
        memory = psutil.virtual_memory()
        free = memory.available - min(MOST_RESERVE, memory.total // RESERVE_SHARE)
        free += sum(other.memory_bytes for other in gone) - sum(other.model.size_bytes for other in loading)
        limit = shares.limit(self.config.engine.memory_limit) - sum(
            min(other.memory_bytes, self.needed(other)) for other in staying
        )
        return max(0, free), max(0, limit)

    def no_memory(self, engine: Engine, pinned: list[Engine], lacks: set[Lack]) -> Refused:
        """What is missing beside what is pinned, and what can be done about it."""
        model, least = engine.model, self.least_context(engine)
        free, limit = self.rooms(engine, pinned)
        room, needed = min(free, limit), self.needed(engine)
        if "count" in lacks:
            why = f"models.max_cached (MLX_MAX_CACHED_MODELS) is {self.config.models.max_cached}, and so many are pinned"
        else:
            have = f"engine.memory_limit leaves {gigabytes(limit)}" if limit < free else f"{gigabytes(free)} are available"
            weights, step = gigabytes(model.size_bytes), gigabytes(model.step_bytes)
            why = (
                f"it needs {gigabytes(needed)} of memory ({weights} for its weights, {gigabytes(least * model.kv_bytes)} for {least} tokens of "
                f"context, {step} for a step), and {have}"
            )
        remedies = [f"unload {other.model.name}" for other in pinned]
        if "count" not in lacks:
            if model.kv_bytes and (tokens := (room - needed) // model.kv_bytes + least) > 0:
                remedies.append(f"set models.context_length to {tokens} at most, which would fit")
            if "limit" in lacks:
                remedies.append(
                    f"raise engine.memory_limit ({gigabytes(shares.limit(self.config.engine.memory_limit))} for all engines)"
                )
            if "free" in lacks:
                remedies.append("end other programs")
            remedies.append("use a smaller model or one of fewer bits")
        text = f"{model.name} cannot be loaded: {why}; {', or '.join(remedies)}"
        return Refused(507, text, code="insufficient_memory", hopeless=True)

    def want(self, engine: Engine, automatic: bool = False) -> None:
        needed, directory = self.needed(engine), str(engine.model.directory)
        self.say(Want(engine.model.name, directory, needed, preload=engine.preloaded, automatic=automatic))
        engine.used_at = now()
        self.turn(engine, "loading")

    def release(self, engine: Engine) -> None:
        self.say(Release(engine.model.name))
        engine.released_at = now()
        self.turn(engine, "absent" if engine.state == "retried" else "releasing")  # retried: no process, so no end to wait for

    def turn(self, engine: Engine, state: State) -> None:
        """Into another state; whoever waits for it looks again."""
        engine.state = state
        self.changed.set()
        self.changed = asyncio.Event()
        self.left.set()

    def sweep(self) -> None:
        """Once a second: release what nobody has used for its keep_alive, and what is too many since a setting has changed; say which engines
        keep silent about their jobs."""
        paused = now() > self.swept_at + 1.0 + PAUSE_S
        self.swept_at = now()
        for engine in self.present:
            if engine.idle and engine.expires_at <= now():
                self.release(engine)
            connection = engine.connection
            if connection is None or not connection.jobs or engine.up is None:
                continue
            if paused:
                connection.heard_at = now()
            elif now() - connection.heard_at > self.config.health.silent_s:
                connection.heard_at = math.inf
                self.say(Stalled(engine.up.id))
        most = self.config.models.max_cached
        staying = [engine for engine in self.present if engine.state != "releasing"]
        going = sorted((engine for engine in staying if engine.idle and not engine.pinned), key=going_first)
        for engine in going[: len(staying) - most] if 0 < most < len(staying) else []:
            self.release(engine)

    # --- what the supervisor says ---------------------------------------------------------------------------------------------

    async def engine_up(self, up: EngineUp) -> None:
        """An engine serves `up.model`: connect to it. One that another server wanted is ours now."""
        engine = self.engines.get(up.model)
        if engine is None or engine.state == "absent":
            model = engine.model if engine else await self.look_up(up.model)
            if model is None:
                self.say(Release(up.model))
                return
            engine = self.engine(model)
            self.want(engine)
        if engine.state == "releasing":
            return
        if engine.up == up and engine.connecting:  # said again because it was wanted again
            if engine.connection is not None:
                self.turn(engine, "ready")
            return
        self.disconnect(engine)
        engine.up = up
        engine.connecting = asyncio.create_task(self.keep_connected(engine, up.socket))

    def engine_down(self, down: EngineDown) -> None:
        engine = self.engines.get(down.model)
        if engine is None:
            return
        self.disconnect(engine)
        self.gone_at = now()
        if engine.latest is not None and engine.latest.cause is None:
            engine.latest.cause = down.cause
        if down.next == "released":  # if it was to be retried, it still is not before its time
            self.turn(engine, "absent")
            return
        engine.cause = down.cause
        engine.retry_at = now() + down.retry_s
        if down.next == "refused":
            engine.refusals += 1
            self.turn(engine, "absent")
        elif engine.state != "releasing":  # else our word and theirs have crossed
            self.turn(engine, "retried" if down.next == "retried" else "loading")

    async def keep_connected(self, engine: Engine, path: str) -> None:
        """Hold a connection to an engine that is up, for as long as the supervisor says so."""
        model = await self.look_up(engine.model.name) or engine.model
        while True:
            try:
                connection = await Connection.open(path, engine.model.name)
            except (OSError, EOFError, ValueError):
                await asyncio.sleep(RECONNECT_S)  # it has died, and we shall be told, or it is not listening yet
                continue
            connection.digest = model.digest
            engine.connection = engine.latest = connection
            engine.retry_at = 0.0
            self.turn(engine, "ready")
            try:
                await connection.listen()
            except (OSError, EOFError, ValueError):
                self.cut(engine, connection)
                self.turn(engine, "loading" if engine.state == "ready" else engine.state)

    def disconnect(self, engine: Engine) -> None:
        if engine.connecting is not None:
            engine.connecting.cancel()
            engine.connecting = None
        if engine.connection is not None:
            self.cut(engine, engine.connection)

    def cut(self, engine: Engine, connection: Connection) -> None:
        """The connection is broken; the supervisor learns what the engine had in hand."""
        engine.connection = None
        if lost := connection.close():
            self.say(Aboard(connection.loaded.pid, [entry.flight() for entry in lost[:MOST_FLIGHTS]]))


def now() -> float:
    return asyncio.get_running_loop().time()


def going_first(engine: Engine) -> tuple[bool, bool, float]:
    """The order in which engines make room."""
    return not engine.idle, engine.preloaded, engine.used_at


def keep_alive_s(value: float | str | None) -> float | None:
    """Seconds: a number, or a Go duration; negative is for ever (infinity). None: not said. Raises Refused."""
    if value is None:
        return None
    seconds = duration(value) if isinstance(value, str) else float(value)
    if seconds is None:
        raise Refused(400, f'keep_alive: "{str(value)[:40]}" is not a duration such as "5m", 300 or -1')
    return math.inf if seconds < 0 else seconds


UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration(text: str) -> float | None:
    """A Go duration ("1h30m", "-1m"; a bare number counts seconds), in seconds; None when it is none."""
    sign, text = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return sign * float(text)
    parts = re.findall(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sign * sum(float(number) * UNIT_S[unit] for number, unit in parts)
