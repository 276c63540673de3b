"""The pool: the server's view of the engines. Which models are wanted, who is connected, which jobs they have.

Decides what is loaded and what is evicted; the supervisor carries it out (Want, Release) and says what became of it (EngineUp,
EngineDown). Does not know HTTP, nor who waits for an answer.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import psutil

from mlxd import causes, messages, shares
from mlxd.config import Config
from mlxd.errors import Refused
from mlxd.journal import Entry
from mlxd.messages import (
    Cancel,
    Counters,
    Crowded,
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
#: The memory of a process that has ended has so long to come back, and so has what Ollama was asked to give up; it is looked for so often.
GIVEN_BACK_S, LOOK_S = 10.0, 0.25
#: The code of the Refused that says that a model cannot be loaded just now, but will be tried again.
RETRIED = "retried"
#: A sweep that comes so much late means that this process was stopped: nothing could be heard meanwhile.
PAUSE_S = 2.0
#: Ends of an engine that are not the fault of those who lose it: somebody outside, or mlxd itself, ended it; "deadline": the guilty
#: request was answered; "": only the connection broke.
FAULTLESS = causes.FAULTLESS | {""}

State = Literal["absent", "loading", "ready", "retried", "releasing"]


class EngineGone(Exception):
    """The connection ended under a job."""


class Job:
    """One request on one engine: what came from it and was not yet taken."""

    def __init__(self, number: int):
        self.number = number
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
        job = Job(next(self.numbers))
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

    def close(self) -> None:
        self.writer.close()
        for job in self.jobs.values():
            job.end(EngineGone())
        self.jobs.clear()


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
    have a slot. `pinned`: it goes for nobody. `crowded`: it takes no more requests, and is replaced when it is idle. `cause`: why it last
    went. `latest`: the connection, or the one before. `suspects`: requests that run alone, one after the other, since engines died under
    them.
    """

    def __init__(self, model: Model, keep_alive_s: float, now: float):
        self.model = model
        self.keep_alive_s = keep_alive_s
        self.preloaded = False
        self.pinned = False
        self.crowded = False
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
        say: Callable[[Want | Release | Stalled], None],
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
            engine.keep_alive_s = keep_alive_s
            engine.preloaded &= keep_alive_s > 0
            engine.pinned &= keep_alive_s > 0
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
        refusals = engine.refusals
        while True:
            if engine.connection is not None and engine.state == "ready" and not (new and self.stands_aside(engine)):
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
                            raise Refused(event.status, event.message, code=event.code, hopeless=event.status < 500)
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
        """Load it and keep it. Raises Refused when there is no room for it."""
        engine = self.engine(model)
        engine.preloaded = True
        engine.pinned |= pinned
        engine.keep_alive_s = math.inf
        if engine.state == "absent":
            if why := self.lack(engine):
                raise self.no_memory(engine, why)
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
        """Where a request has a slot, engines whose requests have none go, too: they wait for slots, and he would wait for them. So do, after
        a quarter of `queue_wait_s`, those whose new requests have stood aside: each model has its turn. Raises Refused."""
        self.turn_at = now() + self.config.server.queue_wait_s / 4
        turn = asyncio.get_running_loop().call_at(self.turn_at, self.left.set)
        asked = False
        try:
            while engine.state == "absent" and (why := self.lack(engine)):
                if not self.could_fit(engine):
                    if now() < self.gone_at + GIVEN_BACK_S:
                        await asyncio.sleep(LOOK_S)
                    elif asked or self.ask_neighbour is None:
                        raise self.no_memory(engine, why)
                    else:
                        asked = True
                        if await self.ask_neighbour():
                            self.gone_at = now()
                elif any(other.state == "releasing" for other in self.present):
                    await self.changed.wait()
                elif going := self.next_to_go(engine):
                    self.release(going)
                else:
                    self.left.clear()
                    await self.left.wait()
        finally:
            turn.cancel()
            self.turn_at = math.inf
            self.turn(engine, engine.state)  # no room is being made any more

    def next_to_go(self, engine: Engine) -> Engine | None:
        """The engine that makes room for this one: an idle one, if there is any, that was not preloaded, and has not been used for longest."""
        going = [
            other
            for other in self.present
            if not other.pinned and (other.idle or ((engine.served or self.turn_is_over) and not other.served))
        ]
        return min(going, key=going_first, default=None)

    @property
    def turn_is_over(self) -> bool:
        """Room is being made, and those who hold it have had it for long enough."""
        return now() >= self.turn_at

    def stands_aside(self, engine: Engine) -> bool:
        """Whether a new request for this engine waits, although it is ready."""
        return engine.crowded or (self.turn_is_over and not engine.pinned)

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

    def lack(self, engine: Engine) -> str:
        """Why there is no room for this engine beside those that are there, in words; "" when there is."""
        others = [other for other in self.present if other is not engine]
        most = self.config.models.max_cached
        if most and len(others) >= most:
            return f"models.max_cached (MLX_MAX_CACHED_MODELS) is {most}"
        needed, limit, free = engine.model.needed_bytes, self.limit(others), free_bytes(others)
        if needed <= min(limit, free):
            return ""
        have = f"engine.memory_limit leaves {said(limit)}" if limit < free else f"{said(free)} are available"
        return f"it needs {in_words(engine.model)}, and {have}"

    def limit(self, others: list[Engine]) -> int:
        """What the limit of all engines leaves beside these."""
        return shares.limit(self.config.engine.memory_limit) - sum(other.memory_bytes for other in others)

    def could_fit(self, engine: Engine) -> bool:
        """Whether there would be room if all went that may."""
        pinned = [other for other in self.present if other.pinned and other is not engine]
        most = self.config.models.max_cached
        if most and len(pinned) >= most:
            return False
        free = free_bytes([]) + sum(other.memory_bytes for other in self.present if not other.pinned and other is not engine)
        return engine.model.needed_bytes <= min(self.limit(pinned), free)

    def no_memory(self, engine: Engine, why: str) -> Refused:
        """What can be done about it: a shorter context, where the weights fit; unloading what is pinned."""
        model = engine.model
        pinned = [other for other in self.present if other.pinned and other is not engine]
        room = min(self.limit(pinned), free_bytes(pinned)) - model.needed_bytes + model.least_context * model.kv_bytes
        fits = f"; {room // model.kv_bytes} tokens of context would fit" if model.kv_bytes and room >= model.kv_bytes else ""
        remedies = [f"unload {other.model.name}" for other in pinned]
        if self.limit(pinned) < min(model.needed_bytes, free_bytes(pinned)):
            remedies.append(f"raise engine.memory_limit ({said(shares.limit(self.config.engine.memory_limit))} for all engines)")
        remedy = ", ".join([*remedies, "use a smaller model or one of fewer bits"])
        if not remedies:
            remedy = f"end other programs, or {remedy}"
        return Refused(507, f"{model.name} cannot be loaded: {why}{fits}; {remedy}", code="insufficient_memory", hopeless=True)

    def want(self, engine: Engine, automatic: bool = False) -> None:
        self.say(Want(engine.model.name, str(engine.model.directory), preload=engine.preloaded, automatic=automatic))
        engine.used_at = now()
        self.turn(engine, "loading")

    def release(self, engine: Engine) -> None:
        self.say(Release(engine.model.name))
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
        engine.crowded = False
        engine.up = up
        engine.connecting = asyncio.create_task(self.keep_connected(engine, up.socket))

    def engine_crowded(self, word: Crowded) -> None:
        """It takes no more requests until it is replaced."""
        engine = self.engines.get(word.model)
        if engine is not None and engine.up is not None and engine.up.id == word.id:
            engine.crowded = True

    def engine_down(self, down: EngineDown) -> None:
        engine = self.engines.get(down.model)
        if engine is None:
            return
        self.disconnect(engine)
        self.gone_at = now()
        engine.crowded = False
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
                connection.close()
                engine.connection = None
                self.turn(engine, "loading" if engine.state == "ready" else engine.state)

    def disconnect(self, engine: Engine) -> None:
        if engine.connecting is not None:
            engine.connecting.cancel()
            engine.connecting = None
        if engine.connection is not None:
            engine.connection.close()
            engine.connection = None


def now() -> float:
    return asyncio.get_running_loop().time()


def going_first(engine: Engine) -> tuple[bool, bool, float]:
    """The order in which engines make room."""
    return not engine.idle, engine.preloaded, engine.used_at


def free_bytes(loading: list[Engine]) -> int:
    """What is available beside a reserve, once those of `loading` that do have their weights."""
    memory = psutil.virtual_memory()
    pending = sum(engine.model.size_bytes for engine in loading if engine.state == "loading")
    return max(0, memory.available - min(MOST_RESERVE, memory.total // RESERVE_SHARE) - pending)


def in_words(model: Model) -> str:
    """What it needs to be loaded, and for what."""
    context = model.least_context * model.kv_bytes
    step = model.needed_bytes - model.size_bytes - context
    return (
        f"{said(model.needed_bytes)} of memory ({said(model.size_bytes)} for its weights, {said(context)} for "
        f"{model.least_context} tokens of context, {said(step)} for a step)"
    )


def said(count: int) -> str:
    return f"{max(0, count) / 1e9:.2f} GB"


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
