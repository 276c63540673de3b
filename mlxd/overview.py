"""What the page and `mlxd top` look at: `/ui/feed`, `/ui/flights`, `/ui/log`; and `/metrics`.

Reads, and changes nothing. No word of any request is in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import msgspec

import mlxd
from mlxd import health, paths
from mlxd.api.exchange import Exchange
from mlxd.api.service import Service
from mlxd.errors import Refused
from mlxd.logs import printable
from mlxd.messages import Flight
from mlxd.models import Model

#: Between two looks when nothing changes, and when much does.
TICK_S, HASTE_S = 1.0, 0.2
#: Of requests in hand and ended ones, in each look.
MOST_REQUESTS, MOST_RECENT = 40, 12
#: Of a log.
USUAL_LINES, MOST_LINES, MOST_LOG_BYTES = 200, 2000, 512 * 1024

SSE = b"text/event-stream"


# --- the feed -----------------------------------------------------------------------------------------------------------------------


async def feed(service: Service, exchange: Exchange) -> None:
    """Server-sent events: the last ten minutes in figures (`history`), then how everything is, each second and at every change (`now`)."""
    with contextlib.suppress(Refused):  # this server ends, and so does its feed
        await exchange.while_connected(follow(service, exchange))
    await exchange.write(b"", last=True)


async def follow(service: Service, exchange: Exchange) -> None:
    await exchange.stream(SSE)
    await exchange.write(event("history", {"samples": list(service.history.samples)}))
    while not service.draining:
        changed = service.pool.changed
        await exchange.write(event("now", await now(service, await service.models_lately())))
        await asyncio.sleep(HASTE_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TICK_S - HASTE_S):
                await changed.wait()


def event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(data))


async def now(service: Service, models: Iterable[Model]) -> dict[str, Any]:
    told = await service.oversight.status()
    incidents = await service.oversight.exits() if told else []
    word, reason = health.status(service.pool, service.draining, service.problems)
    admission, journal, samples = service.admission, service.journal, service.history.samples
    return {
        "at": round(time.time(), 3),
        "version": mlxd.__version__,
        "word": word,
        "reason": reason,
        "status": told,
        "sample": samples[-1] if samples else None,
        "queue": {"running": admission.running, "waiting": admission.waiting, "slots": admission.slots, "seats": admission.seats},
        "models": [described(service, model) for model in models],
        "pulls": service.pulls.shown(),
        "requests": in_hand(service, MOST_REQUESTS),
        "recent": list(journal.flights)[: -MOST_RECENT - 1 : -1],
        "incidents": incidents,
        "resumed": journal.resumed,
    }


def described(service: Service, model: Model) -> dict[str, Any]:
    engine = service.pool.engines.get(model.weights.name)
    there = engine is not None and engine.state != "absent"
    left_s = engine.expires_at - service.pool.clock() if engine and there else float("inf")
    connection = engine.connection if engine else None
    return {
        "name": model.name,
        "size_bytes": model.size_bytes,
        "builtin": model.builtin,
        "alias_of": model.weights.name if model.alias else None,
        "state": engine.state if engine else "absent",
        "pinned": bool(engine and engine.pinned),
        "memory_bytes": connection.counters.active_bytes if connection else 0,
        "running": len(connection.jobs) if connection else 0,
        "leaves_s": None if left_s == float("inf") else round(max(0.0, left_s), 1),
    }


def in_hand(service: Service, most: int | None = None) -> list[Flight]:
    """Flights of the oldest requests, at most so many, oldest first."""
    return [entry.flight() for entry in sorted(service.journal.entries, key=lambda entry: entry.received_ns)[:most]]


# --- the rest -----------------------------------------------------------------------------------------------------------------------


async def flights(service: Service, exchange: Exchange) -> None:
    """The ways of the requests in hand and of the last 200 that have ended, newest first."""
    newest_first = in_hand(service)[::-1] + list(service.journal.flights)[::-1]
    await exchange.reply(200, msgspec.json.encode({"flights": newest_first}))


async def log(service: Service, exchange: Exchange) -> None:
    """The last lines of a log: `of` names it, `lines` says how many."""
    asked = {key: values[-1] for key, values in parse_qs(exchange.scope["query_string"].decode("latin-1")).items()}
    files = {file.stem: file for file in sorted(Path(service.logs).glob("*.log"))} if service.logs else {}
    of, lines = asked.get("of", "supervisor"), asked.get("lines", str(USUAL_LINES))
    if of not in files:
        raise Refused(404, f"there is no log of that name; there are {', '.join(files) or 'none'}")
    if not (lines.isascii() and lines.isdigit() and len(lines) < 9 and 0 < int(lines) <= MOST_LINES):
        raise Refused(400, f"lines must be a number from 1 to {MOST_LINES}")
    end = (await asyncio.to_thread(paths.read_end, files[of], MOST_LOG_BYTES)).decode(errors="replace").splitlines()
    body = {"of": of, "names": list(files), "lines": [printable(line) for line in end[-int(lines) :]]}
    await exchange.reply(200, msgspec.json.encode(body))


async def metrics(service: Service, exchange: Exchange) -> None:
    """For Prometheus."""
    body, content_type = await service.metrics.exposed(exchange.header(b"accept").decode("latin-1"))
    await exchange.reply(200, body, content_type.encode())
