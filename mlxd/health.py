"""What the server says of itself: `/health`, `/health/live`, `/health/ready`. Monitors rely on the keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec
import psutil

import mlxd
from mlxd.admission import Admission
from mlxd.messages import ExitRecord
from mlxd.pool import Engine, Pool

if TYPE_CHECKING:
    from mlxd.api.exchange import Exchange
    from mlxd.api.service import Service

Status = Literal["ok", "degraded", "loading", "draining"]
STATUSES: tuple[Status, ...] = get_args(Status)
#: Of the last exit's text: enough to say why, in a body that a monitor reads up to 64 KB of.
MAX_TEXT = 2000


def status(pool: Pool, draining: bool, problems: list[str]) -> tuple[Status, str | None]:
    """The state in a word, and why it is not ok. `problems`: what a person has to mend."""
    if draining:
        return "draining", "the server is about to end"
    preloads = [engine for engine in pool.engines.values() if engine.preloaded]
    if problems:
        return "degraded", "; ".join(problems)
    if preloads and not any(engine.state == "ready" for engine in preloads):
        failed = [engine for engine in preloads if engine.state in ("retried", "absent")]
        if len(failed) < len(preloads):
            return "loading", f"loading {next(engine for engine in preloads if engine not in failed).model.name}"
    for engine in preloads:
        if engine.state in ("retried", "absent"):
            return "degraded", f"{engine.model.name} cannot be loaded: {engine.cause}"
    return "ok", None


def serves(pool: Pool, admission: Admission, draining: bool) -> bool:
    """A request sent now would be served or queued."""
    if draining or admission.full:
        return False
    engines = pool.present
    return not engines or any(engine.state != "retried" or engine.retry_at - pool.clock() <= admission.wait_s for engine in engines)


def described(engine: Engine, clock: float) -> dict[str, Any]:
    connection = engine.connection
    return {
        "model": engine.model.name,
        "state": engine.state,
        "beat_age_s": round(clock - connection.beat_at, 3) if connection else None,
        "token_age_s": round(clock - connection.token_at, 3) if connection else None,
        "running": len(connection.jobs) if connection else 0,
    }


def last_words(record: ExitRecord | None) -> dict[str, Any] | None:
    """The newest exit, without its stack and with the end of its text."""
    if record is None:
        return None
    kept = ("ts", "child", "pid", "model", "cause", "signal", "code", "up_s", "remedy")
    return {key: getattr(record, key) for key in kept} | {"text": record.text[-MAX_TEXT:]}


# --- the endpoints ---------------------------------------------------------------------------------------------------------------


async def report(service: Service, exchange: Exchange) -> None:
    """200 when a request sent now would be served or queued. Without a token, where one is needed, no more than who we are."""
    pool, admission = service.pool, service.admission
    word, reason = status(pool, service.draining, service.problems)
    body = {"status": word, "nonce": service.nonce, "version": mlxd.__version__}
    if exchange.access:
        body |= {"reason": reason} | details(service)
    await answer(exchange, service.supervised and serves(pool, admission, service.draining), body)


def details(service: Service) -> dict[str, Any]:
    pool, admission, journal = service.pool, service.admission, service.journal
    clock = pool.clock()
    told: dict[str, Any] = {
        "engines": [described(engine, clock) for engine in pool.present],
        "queue": {"running": admission.running, "waiting": admission.waiting},
        "requests": {"in_hand": len(journal.entries), "oldest_s": round(journal.oldest_s(), 3), "resumed": journal.resumed},
        "memory": {
            "server_bytes": psutil.Process().memory_info().rss,
            "engine_bytes": sum(engine.connection.counters.active_bytes for engine in pool.present if engine.connection),
            "available_bytes": psutil.virtual_memory().available,
        },
        "last_exit": last_words(service.last_exit),
    }
    if fallback := service.fallback:
        trouble = fallback.trouble.sentence if fallback.trouble else None
        told["fallback"] = {"url": str(fallback.address), "running": fallback.running, "trouble": trouble}
    return told


async def live(service: Service, exchange: Exchange) -> None:
    """200 whenever the server answers."""
    await answer(exchange, True, {"status": "live"})


async def ready(service: Service, exchange: Exchange) -> None:
    """200 when the state is ready or degraded."""
    word, reason = status(service.pool, service.draining, service.problems)
    told = {"reason": reason} if exchange.access else {}
    await answer(exchange, service.supervised and word in ("ok", "degraded"), {"status": word} | told)


async def answer(exchange: Exchange, well: bool, body: dict[str, Any]) -> None:
    if not well:
        exchange.headers.append((b"retry-after", b"1"))
    await exchange.reply(200 if well else 503, msgspec.json.encode(body))
