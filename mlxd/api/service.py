"""The service: what all requests share, and the way of one request through it.

Request -> admission -> engines -> events -> bytes. Knows no dialect (a View renders for it), no route and no process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil

from mlxd import guard, ollama
from mlxd.admission import Admission, Priority
from mlxd.aliases import Aliases
from mlxd.api.exchange import Exchange, Filler
from mlxd.api.store import Store
from mlxd.config import Config
from mlxd.errors import ConfigError, Refused
from mlxd.fallback import HURRY_S, Fallback, address
from mlxd.history import History
from mlxd.journal import Answered, Entry, Journal, Request, outcome
from mlxd.messages import Accepted, Call, ChildWord, Counters, Done, Embedded, Event, ExitRecord, Progress, Token
from mlxd.metrics import Metrics
from mlxd.models import BUILTIN, Catalogue, Model
from mlxd.oversight import Oversight
from mlxd.pool import Engine, Pool, keep_alive_s
from mlxd.pulls import Pulls
from mlxd.ratelimit import RateLimit
from mlxd.tokens import Tokens
from mlxd.uploads import Uploads

log = logging.getLogger(__name__)

T = TypeVar("T")

#: The disk is looked at for models so often while somebody looks at us.
LATELY_S = 5.0


class View(Filler, Protocol):
    """How a dialect shows one answer, of one choice or several (`choice` counts from 0). b"": nothing to send.

    A stream is `begin` and then `token`, `call` and `end` of each choice, as they come; `close` follows the last `end`. `begin`: the prompt
    of a choice is tokenised. `token` is asked only of tokens that bring text or log-probabilities. `resumed`: the stream goes on after so
    many engines have died. Otherwise `whole` has all choices.
    """

    whole_type: bytes

    def begin(self, choice: int, prompt_tokens: int, cached_tokens: int) -> bytes: ...

    def token(self, choice: int, token: Token) -> bytes: ...

    def call(self, choice: int, call: Call) -> bytes: ...

    def progress(self, done: int, total: int) -> bytes: ...

    def resumed(self, times: int) -> bytes: ...

    def end(self, choice: int, answered: Answered) -> bytes: ...

    def close(self, answers: list[Answered]) -> bytes: ...

    def error(self, refused: Refused) -> bytes: ...

    def whole(self, answers: list[Answered]) -> bytes: ...


#: What takes the events of a request, by its place among those that came together.
Tell = Callable[[int, Entry, Event], Awaitable[None]]


class Service:
    """All that requests share. Without a supervisor (an imported app) there is nobody to run engines, and it says so. `aliases`: their
    file, `control`: where the supervisor answers, `logs`: the directory of logs; "": there is none."""

    def __init__(
        self,
        config: Config,
        say: Callable[[ChildWord], None] | None = None,
        nonce: str = "",
        aliases: str = "",
        control: str = "",
        logs: str = "",
    ):
        server = config.server
        self.config = config
        self.nonce = nonce
        self.supervised = say is not None
        self.catalogue = Catalogue(config.models.dir, aliases=Aliases(Path(aliases) if aliases else None))
        self.admission = Admission(server.max_concurrent, server.max_queue, server.queue_wait_s)
        self.journal = Journal(server.poison_s)
        self.store = Store()
        ask = self.ask_neighbour if config.ollama.make_room else None
        self.pool = Pool(config, default_keep_alive_s(config), say or (lambda word: None), self.look_up, ask)
        self.pulls = Pulls(say or (lambda word: None))
        self.policy = guard.Policy(tuple(server.origins), strict_host=config.security.strict_host)
        self.tokens: Tokens | None = None
        self.exchanges: set[Exchange] = set()
        self.uploads = Uploads(server.upload_bytes, server.body_s)
        self.rate_limit = RateLimit(config.rate_limit.max, config.rate_limit.window_s)
        self.connections: Callable[[], int] = lambda: 0
        self.draining = False
        self.fallback = Fallback(config, self.look_up) if config.fallback.ollama else None
        self.problems: list[str] = []
        self.last_exit: ExitRecord | None = None
        self.listed: list[Model] = []
        self.listed_at = float("-inf")
        self.logs = logs
        self.oversight = Oversight(control)
        self.history = History()
        self.metrics = Metrics(self)

    # --- models ---------------------------------------------------------------------------------------------------------------

    async def find(self, name: str) -> Model:
        """Raises Refused: no such name, or a model that cannot be used."""
        known = self.catalogue.known(name)
        return known if known is not None else await asyncio.to_thread(self.catalogue.find, name)

    async def look_up(self, name: str) -> Model | None:
        try:
            return await self.find(name)
        except Refused:
            return None

    async def models(self) -> list[Model]:
        """All there are, newest first."""
        return await asyncio.to_thread(self.catalogue.scan)

    async def models_lately(self) -> list[Model]:
        """The same as it was a few seconds ago, for those who ask each second."""
        if time.monotonic() - self.listed_at >= LATELY_S:
            self.listed_at = time.monotonic()
            self.listed = await self.models()
        return self.listed

    async def neighbours(self, exchange: Exchange, models: list[Model]) -> list[dict[str, Any]]:
        """Ollama's models besides `models`, as its /api/tags has them."""
        return await self.fallback.beside(exchange, [model.name for model in models]) if self.fallback else []

    async def delete(self, name: str) -> None:
        """An alias, or a model's files once nobody uses it. Raises Refused."""
        place = await asyncio.to_thread(self.catalogue.doomed, name)
        if place is not None:
            await self.pool.retire(place.name)
            await asyncio.to_thread(self.catalogue.delete, place)

    def avoid_loop(self, ports: set[int]) -> None:
        """No fallback, and no Ollama to be asked for its memory, if it leads to one of the ports that we listen on."""
        if address(self.config.ollama.url).is_ours(ports, self.policy):
            self.pool.ask_neighbour = None
        if self.fallback is not None and self.fallback.address.is_ours(ports, self.policy):
            place = self.fallback.address
            self.problems.append(f"the fallback is off: {place} is mlxd itself; set [ollama] url (OLLAMA_URL) to Ollama's address")
            log.warning("%s", self.problems[-1])
            self.fallback = None

    async def preload(self) -> None:
        """Want what the configuration names, pinned models first; the built-in model while there is no other."""
        pinned, names = self.config.models.pin, self.config.models.preload
        if names is None:
            names = [BUILTIN] if not pinned and all(model.builtin for model in await self.models()) else []
        for name in [*pinned, *names]:
            try:
                self.pool.preload(await self.find(name), pinned=name in pinned)
            except Refused as refused:
                self.problems.append(refused.message)
                log.warning("cannot preload: %s", refused.message)

    async def ask_neighbour(self) -> bool:
        """Whether Ollama had models to unload."""
        names = await asyncio.to_thread(ollama.unload, self.config.ollama.url)
        if names:
            log.info("asked Ollama to unload %s", ", ".join(names))
        return bool(names)

    async def load(self, exchange: Exchange, model: Model, keep_alive_s: float | None) -> int:
        """Load a model, or unload it (0 seconds); ns since the request came. Raises Refused."""
        exchange.model = model
        with self.pool.using(model, keep_alive_s) as engine:
            if keep_alive_s != 0:
                self.check_supervised()
                await exchange.while_connected(self.ready(exchange, engine, model))
        return max(1, exchange.age_ns())

    async def ready(self, exchange: Exchange, engine: Engine, model: Model) -> None:
        """`model`: as it was asked for, perhaps by an alias that has an equivalent of its own."""
        await self.pool.ready(engine, lambda: self.hurry(exchange, model), new=True)

    # --- answers --------------------------------------------------------------------------------------------------------------

    async def answer(self, exchange: Exchange, requests: list[Request], view: View, stream: bool) -> None:
        """Serve requests of one model, each a choice of one answer, to their end, or until their client leaves. Raises Refused before the
        first byte."""
        answer = StreamedAnswer(exchange, view, len(requests)) if stream else WholeAnswer(exchange, view, len(requests))
        try:
            await self.serve(exchange, requests, answer.tell, view if stream else None)
        except Exception as error:
            if not exchange.started:
                raise
            exchange.failed = True
            # While connected: a client that does not read is left behind here, too.
            await exchange.while_connected(exchange.write(view.error(refusal(error)), last=True))

    async def embed(self, exchange: Exchange, request: Request) -> tuple[Embedded, int]:
        """The vectors of `request.inputs`, and how long its model took to be ready, in ns. Raises Refused."""
        ended: list[tuple[Embedded, int]] = []

        async def tell(choice: int, entry: Entry, event: Event) -> None:
            if isinstance(event, Embedded):
                if entry.resumes:
                    exchange.set_header(b"x-mlxd-resumed", b"%d" % entry.resumes)
                exchange.prompt_tokens = event.tokens
                ended.append((event, max(1, entry.submitted_ns - entry.received_ns)))

        await self.serve(exchange, [request], tell)
        if not ended:
            raise asyncio.CancelledError  # the client has left
        return ended[0]

    async def count(self, exchange: Exchange, request: Request) -> int:
        """How many tokens the prompt of a request has. Raises Refused."""
        request.max_tokens = 0
        counts: list[int] = []

        async def tell(choice: int, entry: Entry, event: Event) -> None:
            if isinstance(event, Done):
                counts.append(len(entry.prompt_ids or []))

        await self.serve(exchange, [request], tell)
        if not counts:
            raise asyncio.CancelledError  # the client has left
        return counts[0]

    async def serve(self, exchange: Exchange, requests: list[Request], tell: Tell, filler: Filler | None = None) -> None:
        """All events of the requests, until their client leaves. Raises Refused."""
        self.check_supervised()
        model = requests[0].model
        exchange.model = model
        if not self.stand_in(model):
            exchange.asked = None
        if model.embeds and requests[0].inputs is None:
            asked = exchange.scope["path"].rpartition("/")[2]  # the dialect's own word: chat, generate, completions, messages
            raise Refused(400, f"{model.name.removesuffix(':latest')} does not support {asked}")
        with contextlib.ExitStack() as kept:
            entries: list[Entry] = []
            for request in requests:
                request.priority, request.id, request.path = priority(exchange), exchange.request_id, exchange.scope["path"]
                request.settle(self.config.models.context_length)
                size = 0 if entries else exchange.body_bytes
                entries.append(kept.enter_context(self.journal.keep(request, exchange.received_ns, size)))
            status = 500
            try:
                await exchange.while_connected(self.run(exchange, entries, tell, filler))
                status = 200
            except Refused as refused:
                status = 500 if exchange.started else refused.status
                raise
            finally:
                for entry in entries:
                    self.journal.land(entry, outcome(status, exchange.left), status)
                    self.metrics.land(entry)
                exchange.prompt_tokens += sum(len(entry.prompt_ids or []) for entry in entries)
                exchange.completion_tokens = sum(len(entry.emitted) for entry in entries)

    async def run(self, exchange: Exchange, entries: list[Entry], tell: Tell, filler: Filler | None) -> None:
        """Admission, engines, events. Raises Refused."""
        request = entries[0].request
        request_s = self.config.server.request_s
        try:
            async with asyncio.timeout(request_s):
                with contextlib.ExitStack() as places:
                    tickets = [places.enter_context(self.admission.enter(request.priority)) for _ in entries]
                    engine = places.enter_context(self.pool.using(request.model, request.keep_alive_s))
                    exchange.filler = filler
                    if engine.state != "ready":
                        for entry in entries:
                            entry.enter("loading")
                    await self.ready(exchange, engine, request.model)
                    for entry in entries:
                        entry.enter("queued")
                    exchange.filler = filler if exchange.started else None  # in the queue a 503 is worth more than patience

                    async def go(choice: int) -> None:
                        await tickets[choice].admitted()
                        exchange.filler = filler
                        await self.follow(exchange, engine, choice, entries[choice], tell)
                        tickets[choice].leave()  # to another choice, perhaps, that has no slot yet

                    await together([go(choice) for choice in range(len(entries))])
        except TimeoutError:
            raise Refused(504, f"the request took longer than {request_s:g} s", code="timeout", hopeless=True) from None
        finally:
            exchange.filler = None

    async def follow(self, exchange: Exchange, engine: Engine, choice: int, entry: Entry, tell: Tell) -> None:
        with self.pool.serving(engine):
            async with aclosing(self.pool.events(engine, entry, lambda: self.hurry(exchange, entry.request.model))) as events:
                async for event in events:
                    await tell(choice, entry, event)

    async def hurry(self, exchange: Exchange, model: Model) -> float:
        """How long a request waits for a model that died to be tried again: not for long where Ollama can answer it instead."""
        wait_s = self.config.server.queue_wait_s
        theirs = self.stand_in(model)
        return min(wait_s, HURRY_S) if self.fallback and theirs and await self.fallback.can(exchange, theirs) else wait_s

    def stand_in(self, model: Model) -> str:
        """The model of Ollama's that answers while `model` cannot be loaded; "": none does."""
        return self.fallback.equivalent(model) if self.fallback else ""

    def check_supervised(self) -> None:
        if not self.supervised:
            raise Refused(503, "this server has no supervisor to run engines for it: start it with `mlxd start`", hopeless=True)

    def counters(self) -> Counters:
        return Counters(
            running=self.admission.running,
            waiting=self.admission.waiting,
            finished=self.journal.finished,
            emitted=self.journal.emitted,
        )

    def sweep(self) -> None:
        """Once a second: models that nobody uses, streams that have been silent for long; figures for the page."""
        self.pool.sweep()
        self.sample()
        for exchange in list(self.exchanges):
            exchange.fill(self.config.server.ping_s)

    def sample(self) -> None:
        now = time.time()
        if self.history.due(now):
            told = [engine.connection.counters for engine in self.pool.present if engine.connection]
            self.history.take(
                now,
                emitted=self.journal.emitted,
                prefilled=self.journal.prefilled,
                running=self.admission.running,
                waiting=self.admission.waiting,
                engines_bytes=sum(counters.active_bytes + counters.cache_bytes for counters in told),
                available_bytes=psutil.virtual_memory().available,
            )


def default_keep_alive_s(config: Config) -> float:
    try:
        seconds = keep_alive_s(config.models.keep_alive)
    except Refused:
        raise ConfigError(f'models.keep_alive: "{config.models.keep_alive}" is not a duration such as "5m" or "-1"') from None
    return 300.0 if seconds is None else seconds


def priority(exchange: Exchange) -> Priority:
    """Of X-Priority. Raises Refused on an unknown word."""
    word = exchange.header(b"x-priority").strip().lower() or b"normal"
    try:
        return Priority[word.decode("ascii").upper()]
    except (KeyError, UnicodeDecodeError):
        raise Refused(400, "X-Priority must be high, normal or low") from None


class WholeAnswer:
    """All choices at once, when the last of them is there."""

    def __init__(self, exchange: Exchange, view: View, choices: int):
        self.exchange = exchange
        self.view = view
        self.answers: list[Answered | None] = [None] * choices

    async def tell(self, choice: int, entry: Entry, event: Event) -> None:
        if isinstance(event, Accepted) and entry.resumes:
            self.exchange.set_header(b"x-mlxd-resumed", b"%d" % entry.resumes)
        elif isinstance(event, Done) and (answers := self.complete(choice, entry, event)):
            await self.exchange.reply(200, self.view.whole(answers), self.view.whole_type)

    def complete(self, choice: int, entry: Entry, done: Done) -> list[Answered]:
        """All answers when this was the last, else []."""
        self.answers[choice] = entry.answered(done)
        answers = [answer for answer in self.answers if answer is not None]
        return answers if len(answers) == len(self.answers) else []


class StreamedAnswer(WholeAnswer):
    """One write per event that has something to say."""

    def __init__(self, exchange: Exchange, view: View, choices: int):
        super().__init__(exchange, view, choices)
        self.begun: set[int] = set()
        self.writing = asyncio.Lock()

    async def tell(self, choice: int, entry: Entry, event: Event) -> None:
        async with self.writing:  # one choice at a time
            data, last = self.render(choice, entry, event)
            if data:
                if not self.exchange.started:
                    await self.exchange.stream(self.view.stream_type)
                await self.exchange.write(data, last)

    def render(self, choice: int, entry: Entry, event: Event) -> tuple[bytes, bool]:
        """The bytes for an event, and whether they are the last."""
        view = self.view
        if isinstance(event, Token):
            return view.token(choice, event) if event.text or event.logprobs else b"", False
        if isinstance(event, Call):
            return view.call(choice, event), False
        if isinstance(event, Accepted):
            return self.accepted(choice, entry), False
        if isinstance(event, Progress):
            return view.progress(event.done, event.total) if event.done < event.total else b"", False
        assert isinstance(event, Done)
        answers = self.complete(choice, entry, event)
        answered = self.answers[choice]
        assert answered is not None
        return view.end(choice, answered) + (view.close(answers) if answers else b""), bool(answers)

    def accepted(self, choice: int, entry: Entry) -> bytes:
        data = b""
        if entry.resumes:
            self.exchange.set_header(b"x-mlxd-resumed", b"%d" % entry.resumes)
            data = self.view.resumed(entry.resumes) if self.exchange.started else b""
        if choice not in self.begun:
            self.begun.add(choice)
            data += self.view.begin(choice, len(entry.prompt_ids or []), entry.cached or 0)
        return data


async def together(work: list[Coroutine[Any, Any, None]]) -> None:
    """All of it at once; the first that fails ends the others. Raises what that one raised."""
    if len(work) == 1:
        await work[0]
        return
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def refusal(error: Exception) -> Refused:
    """What a client is told of an error; one that nobody foresaw goes to the log."""
    if isinstance(error, Refused):
        return error
    log.error("internal error", exc_info=error)
    return Refused(500, "internal error")
