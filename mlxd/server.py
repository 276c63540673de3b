"""The server: HTTP in, engines' tokens out. `python -m mlxd.server` is the supervisor's child; `mlxd.server:app` is the ASGI app.

Owns the routes, what surrounds every request (guard, ids, errors), and the process's life: it accepts on the supervisor's sockets,
drains when told, and loses nothing by it. Imports no mlx, and does nothing when it is imported.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import uvicorn
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router

import mlxd
from mlxd import guard, health, logs, openapi, overview, page, tokens
from mlxd.api import anthropic, ollama, ollama_store, openai, responses
from mlxd.api.exchange import Exchange, Receive, Scope, Send
from mlxd.api.service import Service, refusal
from mlxd.config import Config
from mlxd.connections import MOST_OPEN, Connections, room
from mlxd.errors import REPLACED, ConfigError, Refused
from mlxd.link import ChildSettings, Link, beat, become_child, child_settings, join, reopen_log, serve
from mlxd.messages import (
    PROTOCOL,
    Bye,
    Drain,
    EngineDown,
    EngineUp,
    Exited,
    Fetched,
    Fetching,
    Hello,
    Ready,
    Reopen,
    Stop,
    SupervisorWord,
)

log = logging.getLogger("mlxd.server")  # __name__ is __main__ in the supervisor's child

#: More connections than this are answered in JSON; more than connections.MOST_OPEN are not heard, so that uvicorn's own limit,
#: which is plain text for health, too, is never met.
MOST_CONNECTIONS = 960
#: h11 gives up on a head of more than this; the guard, which says so in JSON, at a quarter of it.
MAX_HEAD_BYTES = 64 * 1024
#: A drain keeps idle connections this long: whoever uses them meanwhile is told to come again by `Connection: close`.
IDLE_S = 2.0
#: Of a path in the log.
MOST_PATH = 200
#: What interrupted streams get to carry their error to the client.
FAREWELL_S = 1.0

Endpoint = Callable[[Service, Exchange], Awaitable[None]]


async def describe(service: Service, exchange: Exchange) -> None:
    """The OpenAPI document: this one."""
    await exchange.reply(200, openapi.encoded(tuple(ROUTES)))


ROUTES: list[tuple[str, str, Endpoint]] = [
    ("GET", "/", ollama.root),
    ("GET", "/api/version", ollama.version),
    ("GET", "/api/tags", ollama.tags),
    ("GET", "/api/ps", ollama.ps),
    ("POST", "/api/show", ollama.show),
    ("POST", "/api/generate", ollama.generate),
    ("POST", "/api/chat", ollama.chat),
    ("POST", "/api/embed", ollama.embed),
    ("POST", "/api/embeddings", ollama.embeddings),
    ("POST", "/api/copy", ollama_store.copy),
    ("POST", "/api/create", ollama_store.create),
    ("DELETE", "/api/delete", ollama_store.delete),
    ("POST", "/api/pull", ollama_store.pull),
    ("POST", "/api/push", ollama_store.push),
    ("HEAD", "/api/blobs/{digest}", ollama_store.blob),
    ("POST", "/api/blobs/{digest}", ollama_store.blob),
    ("GET", "/v1/models", openai.models),
    ("GET", "/v1/models/{id:path}", openai.model),
    ("POST", "/v1/chat/completions", openai.chat),
    ("POST", "/v1/completions", openai.complete),
    ("POST", "/v1/embeddings", openai.embeddings),
    ("POST", "/v1/responses", responses.create),
    ("GET", "/v1/responses/{id}", responses.retrieve),
    ("DELETE", "/v1/responses/{id}", responses.delete),
    ("POST", "/v1/messages", anthropic.messages),
    ("POST", "/v1/messages/count_tokens", anthropic.count_tokens),
    ("GET", "/health", health.report),
    ("GET", "/health/live", health.live),
    ("GET", "/health/ready", health.ready),
    ("GET", "/metrics", overview.metrics),
    ("GET", "/ui/feed", overview.feed),
    ("GET", "/ui/flights", overview.flights),
    ("GET", "/ui/log", overview.log),
    ("GET", "/openapi.json", describe),
    ("GET", "/ui", page.document),
    ("GET", "/ui/page.js", page.script),
    ("GET", "/ui/page.css", page.style),
]

#: What goes to Ollama if the model is there and not here.
FORWARDABLE: set[Endpoint] = {
    ollama.show,
    ollama.generate,
    ollama.chat,
    ollama.embed,
    ollama.embeddings,
    openai.model,
    openai.chat,
    openai.complete,
    openai.embeddings,
    responses.create,
    anthropic.messages,
    anthropic.count_tokens,
}


# --- the app ----------------------------------------------------------------------------------------------------------------------


class Mounted:
    """An endpoint as the ASGI app that a Route wants."""

    def __init__(self, service: Service, endpoint: Endpoint):
        self.service = service
        self.endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["exchange"]
        fallback = self.service.fallback if self.endpoint in FORWARDABLE else None
        exchange.keeps_body = fallback is not None
        try:
            await self.endpoint(self.service, exchange)
        except Refused as refused:
            if fallback is None or exchange.started:
                raise
            await fallback.answer(exchange, refused, error_body)


class App:
    """What surrounds every request: the guard first, then the routes; whatever is refused is said in the dialect of its path."""

    def __init__(self, service: Service):
        self.service = service
        routes = [Route(path, Mounted(service, endpoint), methods=[method]) for method, path, endpoint in ROUTES]
        self.router = Router(routes, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.router(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self.service.uploads)
        logs.request_id.set(exchange.request_id)
        self.service.exchanges.add(exchange)
        try:
            await self.handle(exchange)
        except asyncio.CancelledError:
            if not exchange.left:
                raise
        except Exception as error:
            exchange.failed = exchange.started
            if exchange.started:
                raise
            await refuse(exchange, refusal(error))
        finally:
            self.service.exchanges.discard(exchange)
            self.service.metrics.count(exchange)
            note(exchange)

    async def handle(self, exchange: Exchange) -> None:
        """Raises Refused."""
        service, scope = self.service, exchange.scope
        if scope["path"].startswith(anthropic.ROOT):  # their SDKs look there for it
            exchange.set_header(b"request-id", exchange.request_id.encode())
        if service.draining:
            exchange.headers.append((b"connection", b"close"))
        exchange.headers += guard.judge(scope, service.policy)
        if guard.is_preflight(scope):
            exchange.headers += guard.PREFLIGHT
            await exchange.reply_empty()
            return
        exchange.access = guard.admit(scope, service.tokens)
        if service.connections() > MOST_CONNECTIONS and not scope["path"].startswith("/health"):
            exchange.headers.append((b"connection", b"close"))
            raise Refused(503, "too many connections", code="too_many_connections", retry_s=1)
        service.rate_limit.check(scope, service.pool.clock())
        scope["exchange"] = exchange
        scope["app"] = self  # so that the router raises for 404 and 405 rather than answer in plain text
        try:
            await self.router(scope, exchange.receive, exchange.send)
        except HTTPException as error:
            exchange.headers += [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
            raise Refused(error.status_code, NO_ROUTE[error.status_code].format(**scope), code="no_route") from None


NO_ROUTE = {404: "there is nothing at this path", 405: "{method} is not a method of this path"}


async def refuse(exchange: Exchange, refused: Refused) -> None:
    """Say no in the dialect of the path."""
    await asyncio.sleep(0)  # uvicorn itself answers a broken body: from the next turn of the loop on it drops what we send
    if refused.retry_s is not None:
        exchange.headers.append((b"retry-after", str(max(1, math.ceil(refused.retry_s))).encode()))
    if refused.status == 401:
        exchange.headers.append((b"www-authenticate", b"Bearer"))
    if refused.hopeless:
        exchange.headers.append((b"x-should-retry", b"false"))
    await exchange.reply(refused.status, error_body(exchange, refused))


#: Where monitors and pages look.
WATCHED = ("/health", "/metrics", "/ui")


def note(exchange: Exchange) -> None:
    """A request's line in the log, at its end. Nothing of what was asked but the path and a known model: no query, no header, no body. Who
    looks at us every few seconds is not noted."""
    method, path = exchange.scope["method"][:20], exchange.scope["raw_path"].decode("latin-1")
    if exchange.status == 200 and path.startswith(WATCHED):
        return
    path = path if len(path) <= MOST_PATH else path[:MOST_PATH] + "..."
    fields = {
        "method": method,
        "path": path,
        "status": exchange.status or None,
        "ms": exchange.age_ns() // 1_000_000,
        "model": exchange.model.name if exchange.model else None,
        "prompt_tokens": exchange.prompt_tokens,
        "completion_tokens": exchange.completion_tokens,
        "end": "left" if exchange.left else "failed" if exchange.failed else "done",
    }
    parts = [f"{method} {path}", f"{exchange.status or '-'}", f"{fields['ms']} ms"]
    if exchange.model is not None:
        parts += [exchange.model.name, f"tokens {exchange.prompt_tokens}+{exchange.completion_tokens}"]
    if fields["end"] != "done":
        parts.append(fields["end"])
    log.info("%s", "  ".join(parts), extra={"fields": fields})


def error_body(exchange: Exchange, refused: Refused) -> bytes:
    path = exchange.scope["path"]
    if path.startswith(anthropic.ROOT):
        return anthropic.error_body(refused, exchange.request_id)
    return openai.error_body(refused) if path.startswith("/v1/") else ollama.error_body(refused)


app = App(Service(Config()))


# --- the process ------------------------------------------------------------------------------------------------------------------


class Http(uvicorn.Server):
    """uvicorn without its signal handlers, and without its ten wake-ups a second: `tick` is called once in each by the beat."""

    def __init__(self, config: uvicorn.Config, accepting: Callable[[], None]):
        super().__init__(config)
        self.accepting = accepting
        self.servers = []
        self.ending = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        self.tick()
        self.accepting()
        await self.ending.wait()

    def tick(self) -> None:
        self.server_state.default_headers = [(b"date", formatdate(usegmt=True).encode())]

    def stop_accepting(self) -> None:
        """The sockets are the supervisor's, too, and the next server's: do not look at them any more, and leave them alone."""
        loop = asyncio.get_running_loop()
        for server in self.servers:
            for sock in server.sockets:
                loop.remove_reader(sock.fileno())

    def close_idle(self) -> None:
        for connection in list(self.server_state.connections):
            connection.shutdown()


class Process:
    """The life of the server as the supervisor's child."""

    def __init__(self, settings: ChildSettings, link: Link):
        most, at_once = room(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self.connections = Connections(settings.config.server, most)
        self.settings = settings
        self.link = link
        self.service = Service(
            settings.config, link.send, settings.nonce, settings.aliases, settings.control, str(Path(settings.log).parent)
        )
        self.service.tokens = tokens.load(Path(settings.token), settings.config)
        self.http = Http(
            uvicorn.Config(
                App(self.service),
                http=self.connections,  # type: ignore[arg-type]  # what makes a protocol will do
                loop="asyncio",
                ws="none",
                lifespan="on",
                workers=1,
                interface="asgi3",
                proxy_headers=False,
                server_header=False,
                access_log=False,
                log_config=None,
                log_level="error",
                backlog=at_once,
                timeout_keep_alive=120,
                limit_concurrency=MOST_OPEN + 1,
                timeout_graceful_shutdown=int(FAREWELL_S),
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            ),
            accepting=lambda: link.send(Ready(problems=self.service.problems)),
        )
        self.deadline = math.inf
        self.drained: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """From hello to bye."""
        config = self.settings.config
        loop = asyncio.get_running_loop()
        self.link.send(Hello(PROTOCOL, "server", os.getpid(), mlxd.__version__, self.settings.nonce))
        loop.add_signal_handler(signal.SIGTERM, self.drain, 0.0)
        self.service.policy = guard.local_policy(
            config.server.origins, config.security.hosts, config.security.strict_host, config.server.on_loopback
        )
        self.service.connections = lambda: len(self.connections.open)
        sockets = [socket.socket(fileno=fd) for fd in self.settings.listen_fds]
        self.service.avoid_loop({sock.getsockname()[1] for sock in sockets})
        await self.service.preload()
        tasks = [
            asyncio.create_task(self.http.serve(sockets)),
            asyncio.create_task(serve(self.link, self.handle, self.orphaned)),
            asyncio.create_task(beat(self.link, self.service.counters, self.tick)),
        ]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # raises what ended it: a server that cannot hear or beat ends loudly
        self.link.send(Bye("stopped"))
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(self.link.writer.drain(), FAREWELL_S)

    def tick(self) -> None:
        self.service.sweep()
        self.connections.sweep()
        self.http.tick()

    async def handle(self, word: SupervisorWord) -> None:
        match word:
            case EngineUp():
                await self.service.pool.engine_up(word)
            case EngineDown():
                self.service.pool.engine_down(word)
            case Fetching() | Fetched():
                self.service.pulls.hear(word)
            case Exited(record=record):
                self.service.last_exit = record
            case Drain(limit_s=limit_s):
                self.drain(limit_s)
            case Stop():
                self.drain(0.0)
            case Reopen():
                reopen_log(self.settings.log)

    async def orphaned(self) -> None:
        """The supervisor is gone: what still runs gets the time that `serve` gives us."""
        self.drain(3.0)
        await asyncio.Event().wait()

    def drain(self, limit_s: float) -> None:
        """Accept no more, end what runs within `limit_s`, then end. Said again, it can only become shorter."""
        self.deadline = min(self.deadline, self.service.pool.clock() + limit_s)
        if self.drained is None:
            self.drained = asyncio.create_task(self.end())

    async def end(self) -> None:
        clock = self.service.pool.clock
        self.service.draining = True
        self.http.stop_accepting()
        idle_until = clock() + IDLE_S
        while True:
            await asyncio.sleep(0.02)
            if self.service.exchanges:
                idle_until = clock() + IDLE_S
            if not self.service.connections() or clock() >= min(self.deadline, idle_until):
                break
        for exchange in list(self.service.exchanges):
            exchange.interrupt(Refused(503, REPLACED, code="stopping", retry_s=1))
        self.http.close_idle()
        self.http.ending.set()


def main() -> None:
    settings = child_settings()
    become_child(settings)
    try:
        asyncio.run(live(settings))
    except ConfigError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


async def live(settings: ChildSettings) -> None:
    link = await join(settings)
    await Process(settings, link).run()


if __name__ == "__main__":
    main()
