"""The fallback: Ollama beside mlxd. Its models are shown with ours, and what mlxd cannot answer goes there and comes back byte for byte.

Owns the connections to Ollama, what is known of its models, and the recognition of loops. Knows no dialect. Nothing of Ollama's is kept in
memory but its list and one piece of each answer. Of the client's headers only PASSED_ON go there: no token, key or cookie of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import h11
import msgspec

from mlxd import guard
from mlxd.admission import BUSY
from mlxd.api import fields
from mlxd.api.exchange import VERSION, Exchange, Headers
from mlxd.api.fields import Malformed
from mlxd.config import Config
from mlxd.errors import Refused
from mlxd.journal import MOST_BYTES
from mlxd.models import Model
from mlxd.pool import RETRIED

log = logging.getLogger(__name__)

#: The list of Ollama's models must be there by then: our own lists wait no longer for it, and that once in KNOWN_S.
LIST_S = 1.0
#: So long a list counts, and so long does the lack of one.
KNOWN_S = 5.0
#: A thousand models are half of it.
MOST_LIST_BYTES = 1024 * 1024
CONNECT_S = 5.0
#: A model of ours that died, and has an equivalent, is waited for so long.
HURRY_S = 5.0
#: What is read at a time; twice as much waits for a client that is behind, then Ollama waits, too.
PIECE_BYTES = 64 * 1024
#: On every request of ours to Ollama. One that comes to a mlxd with it is not forwarded again.
FORWARDED = b"x-mlxd-forwarded"
SERVED_BY = (b"x-mlxd-served-by", b"ollama")
PASSED_ON = (b"accept", b"content-type", b"user-agent")
PASSED_BACK = (b"content-type", b"content-length", b"content-encoding", b"retry-after")
#: How a stream that breaks off ends, by its type: with an error in the shape of its dialect.
ENDINGS = {b"application/x-ndjson": b"%b\n", b"text/event-stream": b"\n\nevent: error\ndata: %b\n\n"}

MEND = "correct [ollama] url (OLLAMA_URL), or set [fallback] ollama = false"


class Address(NamedTuple):
    """Where Ollama is. `prefix`: of its paths, behind a proxy."""

    host: str
    port: int
    tls: bool
    prefix: str

    @property
    def place(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        """Without a name and password, which would be in the logs."""
        return f"http{'s' if self.tls else ''}://{self.place}{self.prefix}"

    def is_ours(self, ports: Iterable[int], policy: guard.Policy) -> bool:
        """Whether it is one of the ports of this machine."""
        literal = guard.literal(self.host)
        if literal is None:
            here = self.host == "localhost" or self.host.endswith(".localhost") or self.host in policy.own_names
        else:
            here = literal.is_loopback or literal.is_unspecified or literal in policy.own_addresses
        return here and self.port in ports


def address(url: str) -> Address:
    """Of a URL that endpoint.base_url has passed."""
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    return Address(parts.hostname or "", parts.port or (443 if tls else 80), tls, parts.path.rstrip("/"))


class Trouble(NamedTuple):
    """Why Ollama does not answer for mlxd, and what to do: `status` of HTTP, `code` for programs."""

    status: int
    code: str
    sentence: str

    def refused(self, before: str = "") -> Refused:
        retry_s = KNOWN_S if self.status == 503 else None
        return Refused(self.status, before + self.sentence, code=self.code, retry_s=retry_s, hopeless=retry_s is None)


class Unfit(Exception):
    """Something answers that cannot be Ollama."""

    def __init__(self, trouble: Trouble):
        super().__init__(trouble.sentence)
        self.trouble = trouble


# --- one request to Ollama -----------------------------------------------------------------------------------------------------------


class Answer:
    """What comes back on a connection of its own."""

    def __init__(self, reader: asyncio.StreamReader, http: h11.Connection):
        self.reader = reader
        self.http = http
        self.status = 0
        self.headers: dict[bytes, bytes] = {}

    async def event(self) -> Any:
        """The next that h11 sees. Raises OSError, h11.ProtocolError."""
        while (event := self.http.next_event()) is h11.NEED_DATA:
            data = await self.reader.read(PIECE_BYTES)
            if not data and not self.status and not self.http.trailing_data[0]:
                raise ConnectionResetError  # it has died, rather than spoken nonsense
            self.http.receive_data(data)
        return event

    async def head(self) -> None:
        """Raises OSError, h11.ProtocolError."""
        while not isinstance(event := await self.event(), h11.Response):
            pass  # 100 Continue and the like
        self.status, self.headers = event.status_code, dict(event.headers)

    async def piece(self) -> bytes:
        """The next bytes of the body, as they come; b"" at its end. Raises OSError, h11.ProtocolError."""
        event = await self.event()
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def body(self, most_bytes: int) -> bytes:
        """All of it. Raises ValueError when it is more, OSError, h11.ProtocolError."""
        body = b""
        while piece := await self.piece():
            body += piece
            if len(body) > most_bytes:
                raise ValueError(f"more than {most_bytes} bytes")
        return body


@contextlib.asynccontextmanager
async def asked(place: Address, method: str, target: bytes, headers: Headers, body: bytes) -> AsyncIterator[Answer]:
    """The answer to a request, from its head on; the connection ends with the context, at once. Raises OSError, h11.ProtocolError, Unfit: a
    mlxd, or a redirect, which is not followed."""
    own = [(b"host", place.place.encode()), (b"accept-encoding", b"identity"), (b"connection", b"close"), (FORWARDED, VERSION[1])]
    own += [(b"content-length", b"%d" % len(body))] if body or method == "POST" else []
    http = h11.Connection(h11.CLIENT)
    request = h11.Request(method=method, target=place.prefix.encode() + target, headers=own + headers)
    sent = [http.send(event) for event in (request, *([h11.Data(data=body)] if body else []), h11.EndOfMessage())]
    tls = await asyncio.to_thread(tls_context) if place.tls else None
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(place.host, place.port, ssl=tls, limit=PIECE_BYTES)
    except TimeoutError:
        raise ConnectionError from None
    try:
        writer.writelines(data for data in sent if data)  # not drained: what refuses a body may answer without reading it
        answer = Answer(reader, http)
        await answer.head()
        if VERSION[0] in answer.headers:
            raise Unfit(Trouble(508, "loop", f"{place} is a mlxd, not Ollama: {MEND}"))
        if 300 <= answer.status < 400:
            raise Unfit(Trouble(502, "not_ollama", f"{place} answers with a redirect, which mlxd does not follow: {MEND}"))
        yield answer
    finally:
        writer.transport.abort()  # `close` would first send what is left of the request


@functools.cache
def tls_context() -> ssl.SSLContext:
    """Reads all certificates of the system, 0.13 s: not in the loop, and once."""
    return ssl.create_default_context()


def trouble(place: Address, error: Exception) -> Trouble:
    """What is said of an OSError, h11.ProtocolError, ValueError or Unfit."""
    if isinstance(error, Unfit):
        return error.trouble
    if isinstance(error, TimeoutError):
        why = f"nothing within {LIST_S:g} s"
    elif isinstance(error, socket.gaierror):
        why = error.strerror or "no such host"
    elif isinstance(error, ConnectionResetError):
        why = "it ended the connection"
    else:  # of a failed connection asyncio lists every address that it has tried
        why = "no connection" if isinstance(error, OSError) else str(error)
    if isinstance(error, OSError):
        return Trouble(503, "ollama_down", f"Ollama at {place} does not answer ({why}): start it, for example with `ollama serve`")
    return Trouble(502, "not_ollama", f"what answers at {place} does not speak as Ollama does ({why}): restart it, or {MEND}")


# --- Ollama's models -----------------------------------------------------------------------------------------------------------------


class Listed(msgspec.Struct):
    models: list[dict[str, Any]]


class Named(msgspec.Struct):
    """Of any dialect's body, the model; `name` is Ollama's older word."""

    model: str | None = None
    name: str | None = None


lists = msgspec.json.Decoder(Listed)
nameds = msgspec.json.Decoder(Named)
bodies = msgspec.json.Decoder(dict[str, msgspec.Raw])


def key(name: str) -> str:
    """The same for all ways to write the name of one model."""
    return (name if ":" in name.rpartition("/")[2] else name + ":latest").lower()


def read_list(body: bytes, place: Address) -> dict[str, dict[str, Any]]:
    """The entries of Ollama's /api/tags by key, marked as it marks models that live elsewhere. Raises ValueError."""
    try:
        found = lists.decode(body).models
        fields.shallow("models", found)
    except (RecursionError, Malformed):
        raise ValueError("nested too deeply") from None
    there = {name: entry for entry in found if isinstance(name := entry.get("name"), str)}
    return {key(name): {"remote_host": str(place), "remote_model": name} | entry for name, entry in there.items()}


def asked_for(exchange: Exchange) -> str:
    """The model that a request names; "" when it names none."""
    if name := exchange.scope["path_params"].get("id"):
        return str(name)
    try:
        named = nameds.decode(exchange.asked or b"")
    except (ValueError, RecursionError):
        return ""
    return named.model or named.name or ""


def renamed(body: bytes | bytearray, name: str) -> bytes:
    """The same request for another model."""
    members = bodies.decode(body)
    members.pop("name", None)
    return msgspec.json.encode(members | {"model": name})


class Fallback:
    """Ollama, as mlxd knows it. `look_up`: mlxd's own model of a name, or None. `trouble`: why nothing is known of Ollama's models, None
    while it is. `running`: requests that are there now, `held_bytes`: what their bodies take.

    At most as many requests are forwarded as mlxd itself takes, running and waiting, and they take no slot of its own: Ollama has a queue."""

    def __init__(self, config: Config, look_up: Callable[[str], Awaitable[Model | None]]):
        self.address = address(config.ollama.url)
        self.equivalents = {key(ours): theirs for ours, theirs in config.fallback.models.items()}
        self.most = config.server.max_concurrent + config.server.max_queue
        self.request_s = config.server.request_s
        self.look_up = look_up
        self.known: dict[str, dict[str, Any]] = {}
        self.known_at = -math.inf
        self.trouble: Trouble | None = None
        self.looking = asyncio.Lock()
        self.running = 0
        self.held_bytes = 0

    # --- models ---------------------------------------------------------------------------------------------------------------

    async def models(self) -> dict[str, dict[str, Any]]:
        """Entries of /api/tags by key; none when there is trouble. Old by KNOWN_S at most, or there in LIST_S."""
        async with self.looking:
            if now() > self.known_at + KNOWN_S:
                before = self.trouble
                self.known, self.trouble = await self.look()
                self.known_at = now()
                if self.trouble and self.trouble != before:
                    log.warning("fallback: %s", self.trouble.sentence)
        return self.known

    async def look(self) -> tuple[dict[str, dict[str, Any]], Trouble | None]:
        try:
            async with asyncio.timeout(LIST_S), asked(self.address, "GET", b"/api/tags", [], b"") as answer:
                body = await answer.body(MOST_LIST_BYTES)
                if answer.status != 200:
                    raise ValueError(f"status {answer.status}")
            return read_list(body, self.address), None
        except (OSError, h11.ProtocolError, ValueError, Unfit) as error:
            return {}, trouble(self.address, error)

    async def beside(self, exchange: Exchange, ours: Iterable[str]) -> list[dict[str, Any]]:
        """What a list of mlxd's models shows besides: Ollama's that have none of these names. Nothing for another mlxd's fallback."""
        if exchange.header(FORWARDED):
            return []
        taken = {key(name) for name in ours}
        return [entry for name, entry in (await self.models()).items() if name not in taken]

    # --- requests -------------------------------------------------------------------------------------------------------------

    async def answer(self, exchange: Exchange, refused: Refused, say: Callable[[Exchange, Refused], bytes]) -> None:
        """Let Ollama answer what mlxd has refused: a request for a model of Ollama's, or for one in cool-down that has an equivalent there.
        `say`: an error in the dialect of the exchange. Raises `refused` for any other, and Refused."""
        theirs = await self.theirs(exchange, refused)
        if not theirs:
            raise refused
        if exchange.header(FORWARDED):
            raise Trouble(508, "loop", f"the fallback of a mlxd has led to a mlxd: there, {MEND}").refused()
        body = bytes(exchange.asked or b"")
        if key(theirs) not in await self.models():
            raise self.missing(theirs, refused)
        await self.forward(exchange, renamed(body, theirs) if refused.code == RETRIED else body, say)

    async def can(self, exchange: Exchange, theirs: str) -> bool:
        """Whether `answer` would let this model of Ollama's answer now."""
        return not exchange.started and not exchange.header(FORWARDED) and key(theirs) in await self.models()

    async def theirs(self, exchange: Exchange, refused: Refused) -> str:
        """The model of Ollama's that could answer; "": none. A name or a body that mlxd finds malformed may be right for Ollama."""
        name = asked_for(exchange)
        if refused.code == RETRIED:
            return self.equivalent(await self.look_up(name))
        if refused.status not in (400, 404):
            return ""
        return name if refused.code == "model_not_found" or await self.look_up(name) is None else ""

    def missing(self, theirs: str, refused: Refused) -> Refused:
        """What is said when Ollama has no such model, or cannot be asked."""
        if refused.code == RETRIED:
            why = self.trouble.sentence if self.trouble else f"Ollama has no {theirs}, which [fallback] models names in its place"
            return Refused(refused.status, f"{refused.message}; {why}", code=refused.code, retry_s=refused.retry_s)
        return self.trouble.refused(f"model '{theirs}' is none of mlxd's own; ") if self.trouble else refused

    def equivalent(self, model: Model | None) -> str:
        """Ollama's name for what answers in place of a model of ours; "": nothing does."""
        names = [model.name, model.weights.name] if model else []
        return next((self.equivalents[key(name)] for name in names if key(name) in self.equivalents), "")

    async def forward(self, exchange: Exchange, body: bytes, say: Callable[[Exchange, Refused], bytes]) -> None:
        """Raises Refused before the first byte of an answer."""
        if self.running >= self.most or (self.running and self.held_bytes + len(body) > MOST_BYTES):
            raise Refused(503, BUSY, code="queue_full", retry_s=1)
        self.running += 1
        self.held_bytes += len(body)
        passage = Passage(exchange)
        try:
            await exchange.while_connected(passage.carry(self.address, body, self.request_s))
        except Refused as refused:
            if not exchange.started:
                raise
            exchange.failed = True
            await exchange.while_connected(passage.break_off(say(exchange, refused)))
        finally:
            self.running -= 1
            self.held_bytes -= len(body)


class Passage:
    """One request on its way to Ollama and back. `kind`: the type of the answer that has begun. `line_ended`: with the last byte."""

    def __init__(self, exchange: Exchange):
        self.exchange = exchange
        self.kind = b""
        self.line_ended = True

    async def carry(self, place: Address, body: bytes, request_s: float) -> None:
        """There and back. Raises Refused."""
        exchange, scope = self.exchange, self.exchange.scope
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        headers = [(b"x-request-id", exchange.request_id.encode())]
        headers += [(name, value) for name, value in scope["headers"] if name in PASSED_ON]
        limit = asyncio.timeout(request_s)
        try:
            async with limit, asked(place, scope["method"], target, headers, body) as answer:
                self.kind = answer.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
                back = [(name, value) for name, value in answer.headers.items() if name in PASSED_BACK]
                await exchange.start(answer.status, [*back, SERVED_BY])
                while piece := await answer.piece():
                    self.line_ended = piece.endswith(b"\n")
                    await exchange.write(piece)
                await exchange.write(b"", last=True)
        except (OSError, h11.ProtocolError, Unfit) as error:
            if limit.expired():
                raise Refused(504, f"the request took longer than {request_s:g} s", code="timeout", hopeless=True) from None
            if exchange.started:
                raise Refused(502, f"Ollama at {place} broke off its answer: please try again", code="ollama_broke_off") from None
            raise trouble(place, error).refused() from None

    async def break_off(self, error: bytes) -> None:
        """End an answer that has begun: a stream with an error, anything else as it broke, in the middle."""
        if ending := ENDINGS.get(self.kind):
            await self.exchange.write((b"" if self.line_ended else b"\n") + ending % error, last=True)


def now() -> float:
    return asyncio.get_running_loop().time()
