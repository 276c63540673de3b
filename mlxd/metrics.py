"""`/metrics`: what Prometheus asks for. docs/metrics.md explains each name.

Counts what ends here; everything else is read when it is asked for. Labels are bounded: dialects, outcomes, states and causes are words of
mlxd's own, models are those that were found on disk, never what a client calls one.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

import mlxd
from mlxd import health, shares
from mlxd.causes import CAUSES
from mlxd.journal import outcome
from mlxd.messages import Outcome
from mlxd.policy import State
from mlxd.ratelimit import works

if TYPE_CHECKING:
    from mlxd.api.exchange import Exchange
    from mlxd.api.service import Service
    from mlxd.journal import Entry

#: Models that have a label of their own since the server started; the others share one.
MOST_MODELS = 100
OTHER = "other"
#: Seconds. First tokens come after 10 ms on a small model, and after minutes where a large one is loaded first.
WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PACES = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
PAUSES = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    def __init__(self, service: Service):
        self.service = service
        self.models: set[str] = set()
        self.counted: set[tuple[str, str]] = set()
        self.tokens: dict[str, Tally[str]] = {}
        self.told: dict[str, Any] | None = None
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        kept = self.registry
        named = ["dialect", "model", "outcome"]
        self.requests = Counter("mlxd_requests", "Requests that have ended", named, registry=kept)
        text = "From a request's arrival to its first token"
        self.first = Histogram("mlxd_time_to_first_token_seconds", text, ["model"], buckets=WAITS, registry=kept)
        text = "Of each token of an answer after its first"
        self.pace = Histogram("mlxd_time_per_output_token_seconds", text, ["model"], buckets=PACES, registry=kept)
        text = "From a request's arrival until an engine had it, loads included"
        self.queue = Histogram("mlxd_queue_seconds", text, buckets=WAITS, registry=kept)
        text = "From an engine's death to a request's next token"
        self.pauses = Histogram("mlxd_pause_seconds", text, buckets=PAUSES, registry=kept)
        self.registry.register(self)

    # --- what ends ------------------------------------------------------------------------------------------------------------

    def count(self, exchange: Exchange) -> None:
        """An HTTP request of one of the dialects has ended. Who only looks (lists, health) does not count."""
        kind = dialect(exchange.scope["path"])
        if not kind or not works(exchange.scope):
            return
        model = self.label(exchange.model.weights.name) if exchange.model else ""
        if (kind, model) not in self.counted:  # as with exits
            self.counted.add((kind, model))
            for each in get_args(Outcome):
                self.requests.labels(kind, model, each)
        status = 500 if exchange.failed or not exchange.status else exchange.status
        self.requests.labels(kind, model, outcome(status, exchange.left)).inc()

    def land(self, entry: Entry) -> None:
        """A request's work has ended, whatever came of it. One that only counted its tokens was none."""
        if entry.request.max_tokens == 0:
            return
        model = self.label(entry.request.model.weights.name)
        asked = {"prompt_tokens": entry.prompt_tokens, "cached_prompt_tokens": entry.cached or 0}
        self.tokens.setdefault(model, Tally()).update(asked | growing(entry))
        phases = entry.phases
        if entry.attempts:
            self.queue.observe((entry.submitted_ns - entry.received_ns) / 1e9)
        if entry.first_token_ns is not None:
            self.first.labels(model).observe((entry.first_token_ns - entry.received_ns) / 1e9)
            if len(entry.emitted) > 1:
                spent_s = phases[-1][1] / 1e3 - (entry.first_token_ns - entry.received_ns) / 1e9
                self.pace.labels(model).observe(max(0.0, spent_s) / (len(entry.emitted) - 1))
        lost_ms: int | None = None
        for phase, at_ms in phases:
            if phase == "lost":
                lost_ms = at_ms if lost_ms is None else lost_ms
            elif phase == "decode" and lost_ms is not None:
                self.pauses.observe((at_ms - lost_ms) / 1e3)
                lost_ms = None

    def label(self, model: str) -> str:
        if model not in self.models and len(self.models) >= MOST_MODELS:
            return OTHER
        self.models.add(model)
        return model

    # --- what is asked for ----------------------------------------------------------------------------------------------------

    async def exposed(self, accept: str) -> tuple[bytes, str]:
        """Everything, in the format that `accept` prefers, and its content type."""
        self.told = await self.service.oversight.status()
        try:
            encoder, content_type = exposition.choose_encoder(accept)
        except (ValueError, TypeError):  # of a version that is no number
            encoder, content_type = exposition.choose_encoder("")
        return encoder(self.registry), content_type

    def collect(self) -> Iterator[Metric]:
        yield from self.requests_now()
        yield from self.tokens_so_far()
        yield from self.memory()
        yield from self.processes()

    def requests_now(self) -> Iterator[Metric]:
        service = self.service
        yield InfoMetricFamily("mlxd_build", "This server's version", value={"version": mlxd.__version__})
        word, _ = health.status(service.pool, service.draining, service.problems)
        state = GaugeMetricFamily("mlxd_health", "1 for the status that /health tells", labels=["status"])
        for one in health.STATUSES:
            state.add_metric([one], float(one == word))
        yield state
        yield GaugeMetricFamily("mlxd_requests_running", "Requests that have a slot", value=service.admission.running)
        yield GaugeMetricFamily("mlxd_requests_waiting", "Requests that wait for a slot", value=service.admission.waiting)
        yield GaugeMetricFamily("mlxd_connections", "Open HTTP connections", value=service.connections())

    def tokens_so_far(self) -> Iterator[Metric]:
        sums = {model: Tally(tally) for model, tally in self.tokens.items()}
        for entry in self.service.journal.entries:
            sums.setdefault(self.label(entry.request.model.weights.name), Tally()).update(growing(entry))
        for name, text in COUNTED.items():
            family = CounterMetricFamily(f"mlxd_{name}", text, labels=["model"])
            for model, tally in sums.items():
                family.add_metric([model], tally[name])
            yield family

    def memory(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("mlxd_engine_memory_bytes", "MLX's memory for a loaded model", labels=["model", "kind"])
        for engine in self.service.pool.present:
            if engine.connection is not None:
                counters, model = engine.connection.counters, self.label(engine.model.name)
                family.add_metric([model, "active"], counters.active_bytes)
                family.add_metric([model, "cache"], counters.cache_bytes)
        yield family
        available = psutil.virtual_memory().available
        yield GaugeMetricFamily("mlxd_memory_available_bytes", "Of the machine", value=available)
        limit = shares.limit(self.service.config.engine.memory_limit)
        yield GaugeMetricFamily("mlxd_memory_limit_bytes", "What all engines together may take", value=limit)

    def processes(self) -> Iterator[Metric]:
        """Of the supervisor: nothing but that it does not answer, if it does not."""
        told = self.told
        yield GaugeMetricFamily("mlxd_supervisor_up", "1 if the supervisor answered this time", value=float(told is not None))
        if told is None:
            return
        engines = GaugeMetricFamily("mlxd_engines", "Engines by state", labels=["state"])
        states = Tally(engine["state"] for engine in told["engines"])
        for state in STATES:
            engines.add_metric([state], states[state])
        yield engines
        sizes = GaugeMetricFamily("mlxd_process_memory_bytes", "Physical memory of each process", labels=["process"])
        for name, one in named(told):
            sizes.add_metric([name], one["memory_bytes"])
        yield sizes
        ends = CounterMetricFamily("mlxd_exits", "Processes that have ended, by kind and cause", labels=["child", "cause"])
        for child in KINDS:
            for cause in CAUSES:  # also those that nothing has ended of: `increase` does not see a step from nothing to one
                ends.add_metric([child, cause], told["ends"].get(child, {}).get(cause, 0))
        yield ends


KINDS = ("server", "engine", "puller")
#: Those that a status tells.
STATES = [state.value for state in State if state not in (State.KILLING, State.UNKILLABLE)]
#: Counters of each model, by name.
COUNTED = {
    "prompt_tokens": "Tokens of prompts",
    "cached_prompt_tokens": "Of those, tokens that no engine had to compute",
    "generated_tokens": "Tokens of answers",
    "resumes": "Times that a request went on in another engine",
}


def growing(entry: Entry) -> dict[str, int]:
    """What a request adds to COUNTED while it is in hand: what never becomes less, as what is known of its prompt may after a death."""
    return {"generated_tokens": len(entry.emitted), "resumes": entry.resumes}


def dialect(path: str) -> str:
    """Of a request; "": of none (operations)."""
    if path.startswith("/v1/messages"):
        return "anthropic"
    return "openai" if path.startswith("/v1/") else "ollama" if path.startswith("/api/") else ""


def named(told: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The processes of a status."""
    yield "supervisor", told["supervisor"]
    if told["server"]:
        yield "server", told["server"]
    for kind in ("engine", "puller"):
        for one in told[kind + "s"]:
            yield f"{kind}-{one['slot']}", one
