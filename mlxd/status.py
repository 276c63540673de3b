"""What the supervisor tells: the overall state and why, `mlxd status --json`, and /health while no server answers.

Reads the supervisor, writes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from mlxd import __version__, causes, messages, policy
from mlxd.child import Child, footprint
from mlxd.endpoint import anonymous
from mlxd.policy import State

if TYPE_CHECKING:
    from mlxd.supervisor import Supervisor


def overall(s: Supervisor) -> tuple[str, str | None]:
    """starting, ready, degraded, draining, cooldown or held; and why it is not `ready`."""
    if s.stopping:
        return "draining", "mlxd is stopping"
    if s.obstacle:
        return "held", s.obstacle
    if not any(server.state is State.READY for server in s.servers()):
        return without_server(s, s.server)
    preloads = [engine for engine in s.engines if engine.preload]
    if not s.first_token and any(engine.state not in (State.COOLDOWN, State.HELD) for engine in preloads):
        return "starting", f"{preloads[0].model} is being loaded"
    found = list(problems(s))
    return ("degraded", "; ".join(found)) if found else ("ready", None)


def without_server(s: Supervisor, server: Child | None) -> tuple[str, str]:
    if server is not None and server.state in (State.HELD, State.UNKILLABLE, State.COOLDOWN):
        died = f"the server died {len(server.counted)} times ({server.died_of}); {next_try(s, server)}"
        return shown(server.state), server.hold or died
    if server is not None and server.state is State.BACKOFF:
        return "starting", f"the server died ({server.died_of}); {next_try(s, server)}"
    return "starting", "the server is starting"


def problems(s: Supervisor) -> Iterator[str]:
    """What a person should know although requests are served."""
    if s.config_problem:
        yield f"the new configuration is refused, the old one is in force: {s.config_problem}"
    if s.server is not None:
        yield from s.server.problems
        if s.server.state in (State.BACKOFF, State.COOLDOWN, State.HELD, State.UNKILLABLE):  # an older one still serves
            yield f"the new server cannot start, the old one goes on: {without_server(s, s.server)[1]}"
    if (missed := s.polls.count(False)) >= s.config.health.misses:
        yield f"{missed} of the last {len(s.polls)} polls of {s.port.url(s.config.server)}/health had no answer of this mlxd ({s.answer.value})"
    for model, why in s.refusals.items():
        yield f"{model} cannot be loaded: {why}"
    for engine in s.engines:
        if engine.model is None:
            continue
        if engine.state in (State.HELD, State.UNKILLABLE):
            yield f"{engine.title} is held: {engine.hold}"
        elif engine.state in (State.BACKOFF, State.COOLDOWN):
            yield f"{engine.title} died ({engine.died_of}); {next_try(s, engine)}"
        elif engine.state is not State.READY and engine.died_of and engine.wanted:
            if engine.died_of == causes.STOPPED.name:
                yield f"{engine.title} is being replaced"
            else:
                yield f"the engine of {engine.model} died ({engine.died_of}); {engine.name} takes its place"
        if less := causes.in_words(engine.tuning):
            yield f"{engine.title} {engine.tuning.why}; it now runs with {less}"
    window = s.config.supervisor.window_s
    for one in s.children():
        recent = sum(1 for t in one.deaths if t > s.loop.time() - window)
        if recent > policy.RESTLESS_DEATHS:
            yield f"{one.title} died {recent} times in {window / 60:.0f} min"


def next_try(s: Supervisor, one: Child) -> str:
    seconds = s.time_left(one)
    return f"next try in {seconds:.0f} s" if seconds >= 1 else "next try now"


def sentence(s: Supervisor) -> str:
    """Of a 503 while no server answers, and for systemd; the reason is not for those who may have no token."""
    state, reason = overall(s)
    return f"mlxd is {state}: {reason}" if reason and not s.tokens else f"mlxd is {state}"


def health(s: Supervisor) -> dict[str, object]:
    """/health while no server answers."""
    state, reason = overall(s)
    who: dict[str, object] = {"status": "loading", "nonce": s.nonce, "version": __version__}
    if s.tokens:
        return who
    return who | {
        "state": state,
        "reason": reason,
        "engines": [],
        "queue": {"running": 0, "waiting": 0},
        "memory": None,
        "last_exit": msgspec.to_builtins(s.exits.last),
    }


def report(s: Supervisor) -> dict[str, Any]:
    """`mlxd status --json`."""
    now = s.loop.time()
    state, reason = overall(s)
    server = s.server or next(iter(s.retired), None)
    return {
        "state": state,
        "reason": reason,
        "url": s.port.url(s.config.server),
        "port": s.port.number(s.config.server),
        "home": str(s.paths.home),
        "version": __version__,
        "protocol": messages.PROTOCOL,
        "supervisor": {
            "pid": os.getpid(),
            "run": s.runs,
            "up_s": round(now - s.started, 1),
            "memory_bytes": footprint(os.getpid()),
        },
        "server": process(server, now) if server is not None else None,
        "engines": [
            process(engine, now) | {"slot": engine.slot, "model": engine.model, "running": engine.counters.running}
            for engine in sorted(s.engines, key=lambda engine: engine.model is None)  # the spare stands last
        ],
        "pullers": [process(one, now) | {"slot": one.slot, "model": one.model} for one in s.pullers],
        "last_exit": msgspec.to_builtins(s.exits.last),
        "ends": s.exits.counts,
        "notes": list(notes(s)),
        "moved_s": round(now - s.moved_at, 1),
        "control": str(s.paths.control),
        "ollama": {"url": anonymous(s.config.ollama.url).rstrip("/")},
    }


def notes(s: Supervisor) -> Iterator[str]:
    """What is worth knowing and no problem of those who ask."""
    if s.papers.problem:
        yield s.papers.problem
    for stray in s.left_behind(age_s=1.0):  # who waits for `ready` asks 20 times a second
        yield f"pid {stray.pid} ({stray.name}) was left behind by {stray.origin} and ends with it"
    if s.config.supervisor.keep_awake and s.awake.pid is None and s.awake.tried_at > s.started:
        yield "the machine may fall asleep: `supervisor.keep_awake` needs macOS's caffeinate, which does not run"
    if not s.config.server.on_loopback:
        yield f"other machines reach it at {s.config.server.host}, with a token and without encryption"
    for older, what in ((True, "mlxd restart"), (False, "mlxd restart --supervisor")):
        others = [one for one in s.children() if one.version not in ("", __version__) and (one.since < s.since) is older]
        if others:
            told = ", ".join(f"{one.name} is of mlxd {one.version}" for one in others)
            yield f"{told}, the supervisor of {__version__}: run `{what}`"
    for one in s.children():
        if one.log_problem:
            yield f"{one.name} has no log: {s.paths.log(one.name)}: {one.log_problem}"
    if s.events.dropped:
        yield f"{s.events.dropped} events could not be written: {s.events.problem}"


def shown(state: State) -> str:
    """A state in the words that programs know."""
    return {State.KILLING: "stopping", State.UNKILLABLE: "held"}.get(state, state.value)


def process(one: Child, now: float) -> dict[str, Any]:
    one.measure()
    return {
        "pid": one.pid,
        "state": shown(one.state),
        "up_s": round(now - one.since, 1) if one.pid is not None else 0.0,
        "restarts": one.restarts,
        "memory_bytes": one.memory_bytes,
    }
