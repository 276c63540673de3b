"""The service: what all requests share, and the way of one request through it.

Request -> admission -> engines -> events -> bytes. Knows no dialect (a View renders for it), no route and no process.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Protocol

from mlxd import guard
from mlxd.admission import Admission, Priority
from mlxd.api.exchange import Exchange, Filler
from mlxd.config import Config
from mlxd.errors import ConfigError, Refused
from mlxd.journal import Entry, Journal, Request, Summary
from mlxd.messages import Accepted, ChildWord, Counters, Done, Event, ExitRecord, Progress, Token
from mlxd.modelfiles import Broken
from mlxd.models import BUILTIN, Catalogue, Model, chat_template
from mlxd.pool import Engine, Pool, keep_alive_s

#: A client that takes no byte for this long is taken for gone.
WRITE_STALL_S = 30.0


class View(Filler, Protocol):
    """How a dialect shows one answer. b"": nothing to send. `whole` gets the text and the text of the thinking apart.
    `resumed`: the stream goes on after so many engines have died."""

    whole_type: bytes

    def token(self, text: str, thinking: bool) -> bytes: ...

    def progress(self, done: int, total: int) -> bytes: ...

    def resumed(self, times: int) -> bytes: ...

    def end(self, summary: Summary) -> bytes: ...

    def error(self, refused: Refused) -> bytes: ...

    def whole(self, text: str, thinking: str, summary: Summary) -> bytes: ...


class Service:
    """All that requests share. Without a supervisor (an imported app) there is nobody to run engines, and it says so."""

    def __init__(self, config: Config, say: Callable[[ChildWord], None] | None = None, nonce: str = ""):
        server = config.server
        self.config = config
        self.nonce = nonce
        self.supervised = say is not None
        self.catalogue = Catalogue(config.models.dir)
        self.admission = Admission(server.max_concurrent, server.max_queue, server.queue_wait_s)
        self.journal = Journal(server.poison_s)
        self.pool = Pool(config, default_keep_alive_s(config), say or (lambda word: None), self.look_up)
        self.policy = guard.Policy(tuple(server.origins), config.security.strict_host)
        self.exchanges: set[Exchange] = set()
        self.connections: Callable[[], int] = lambda: 0
        self.draining = False
        self.missing: list[str] = []
        self.last_exit: ExitRecord | None = None

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

    async def template(self, model: Model) -> str:
        """The chat template's text; "" when there is none to be read."""
        try:
            return await asyncio.to_thread(chat_template, model.directory)
        except (Broken, OSError):
            return ""

    async def preload(self) -> None:
        """Want what the configuration names; the built-in model while there is no other."""
        names = self.config.models.preload
        if names is None:
            names = [BUILTIN] if all(model.builtin for model in await self.models()) else []
        for name in names:
            try:
                self.pool.preload(await self.find(name))
            except Refused as refused:
                self.missing.append(refused.message)
                print(f"cannot preload: {refused.message}", file=sys.stderr, flush=True)

    async def load(self, exchange: Exchange, model: Model, keep_alive_s: float | None) -> int:
        """Load a model, or unload it (0 seconds); ns since the request came. Raises Refused."""
        with self.pool.using(model, keep_alive_s) as engine:
            if keep_alive_s != 0:
                self.check_supervised()
                await exchange.while_connected(self.ready(engine))
        return max(1, exchange.age_ns())

    async def ready(self, engine: Engine) -> None:
        await self.pool.ready(engine, self.config.server.queue_wait_s)

    # --- answers --------------------------------------------------------------------------------------------------------------

    async def answer(self, exchange: Exchange, request: Request, view: View, stream: bool) -> None:
        """Serve a request to its end, or until its client leaves. Raises Refused before the first byte."""
        self.check_supervised()
        request.priority = priority(exchange)
        with self.journal.keep(request, exchange.received_ns, exchange.body_bytes) as entry:
            try:
                await exchange.while_connected(self.run(exchange, entry, view, stream))
            except Exception as error:
                if not exchange.started:
                    raise
                # While connected: a client that does not read is left behind here, too.
                await exchange.while_connected(exchange.write(view.error(refusal(error)), last=True))

    async def run(self, exchange: Exchange, entry: Entry, view: View, stream: bool) -> None:
        """Admission, engines, bytes. Raises Refused."""
        request = entry.request
        filler = view if stream else None
        wait_s, request_s = self.config.server.queue_wait_s, self.config.server.request_s
        try:
            async with asyncio.timeout(request_s):
                with (
                    self.admission.enter(request.priority) as ticket,
                    self.pool.using(request.model, request.keep_alive_s) as engine,
                ):
                    exchange.filler = filler
                    await self.pool.ready(engine, wait_s)
                    exchange.filler = filler if exchange.started else None  # in the queue a 503 is worth more than patience
                    await ticket.admitted()
                    exchange.filler = filler
                    with self.pool.serving(engine):
                        async with aclosing(self.pool.events(engine, entry, wait_s)) as events:
                            await (self.send_stream if stream else self.send_whole)(exchange, entry, view, events)
        except TimeoutError:
            raise Refused(504, f"the request took longer than {request_s:g} s", code="timeout", hopeless=True) from None
        finally:
            exchange.filler = None

    async def send_stream(self, exchange: Exchange, entry: Entry, view: View, events: AsyncIterator[Event]) -> None:
        """One write per event that has something to say."""
        async for event in events:
            data = b""
            if isinstance(event, Token) and event.text:
                data = view.token(event.text, event.thinking)
            elif isinstance(event, Accepted) and entry.resumes:
                note_resumed(exchange, entry)
                data = view.resumed(entry.resumes) if exchange.started else b""
            elif isinstance(event, Done):
                data = view.end(entry.summary(event))
            elif isinstance(event, Progress) and event.done < event.total:
                data = view.progress(event.done, event.total)
            if data:
                if not exchange.started:
                    await exchange.stream(view.stream_type)
                await exchange.write(data, last=isinstance(event, Done))

    async def send_whole(self, exchange: Exchange, entry: Entry, view: View, events: AsyncIterator[Event]) -> None:
        text: list[str] = []
        thinking: list[str] = []
        async for event in events:
            if isinstance(event, Token):
                (thinking if event.thinking else text).append(event.text)
            elif isinstance(event, Accepted):
                note_resumed(exchange, entry)
            elif isinstance(event, Done):
                body = view.whole("".join(text), "".join(thinking), entry.summary(event))
                await exchange.reply(200, body, view.whole_type)

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
        """Once a second: models that nobody uses, clients that do not read, streams that have been silent for long."""
        self.pool.sweep()
        stalled = self.pool.clock() - WRITE_STALL_S
        for exchange in list(self.exchanges):
            if exchange.writing_since is not None and exchange.writing_since < stalled:
                exchange.abandon()
            exchange.fill(self.config.server.ping_s)


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


def note_resumed(exchange: Exchange, entry: Entry) -> None:
    if entry.resumes:
        exchange.set_header(b"x-mlxd-resumed", b"%d" % entry.resumes)


def refusal(error: Exception) -> Refused:
    """What a client is told of an error; one that nobody foresaw goes to the log."""
    if isinstance(error, Refused):
        return error
    traceback.print_exception(error)
    return Refused(500, "internal error")
