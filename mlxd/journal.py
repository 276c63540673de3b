"""The journal: every request from its acceptance to its last byte, so that an engine's death costs it nothing but time.

Owns what was asked (`Request`), what has come of it (`Entry`) and which requests engines do not survive. Knows no dialect, no socket
and no engine.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from msgspec import Struct

from mlxd.admission import BUSY, Priority
from mlxd.errors import Refused
from mlxd.messages import (
    Accepted,
    Call,
    Done,
    Embed,
    Embedded,
    Event,
    Flight,
    Format,
    Outcome,
    Phase,
    Progress,
    Sampling,
    Submit,
    Token,
    TokenLogprob,
)
from mlxd.models import Model

#: A request in flight at this many deaths in a row without progress between them is suspect, and at one more given up.
SUSPECT_DEATHS = 2
MOST_DEATHS = 3
#: Bodies of the requests in hand, together; one of the largest always fits.
MOST_BYTES = 512 * 1024 * 1024
#: What the flight recorder holds.
KEPT_FLIGHTS = 200
#: The last ones of a flight: a request can lose engines for an hour.
MOST_PHASES = 32
#: Requests that are known to take engines with them; the oldest is forgotten.
MOST_POISONS = 1024
#: What of a request has no part in what the model is asked.
NOT_ASKED = (
    "model",
    "sampling",
    "max_tokens",
    "num_ctx",
    "stop",
    "top_logprobs",
    "truncate",
    "keep_alive_s",
    "priority",
    "id",
    "path",
)


class Request(Struct, kw_only=True):
    """What a client asked, whatever its dialect. Exactly one of `messages`, `prompt`, `prompt_ids` and `inputs` (to be embedded) is given;
    fields as in messages.Submit and messages.Embed.

    `keep_alive_s`: None leaves the model's own, infinity is for ever. `id`, `path`: of the HTTP request.
    """

    model: Model
    sampling: Sampling = Sampling(seed=0)
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str = "auto"
    format: Format | None = None
    prompt: str | None = None
    suffix: str | None = None
    prompt_ids: list[int] | None = None
    context_ids: list[int] = []
    inputs: list[str | list[int]] | None = None
    think: bool | None = None
    max_tokens: int | None = None
    num_ctx: int | None = None
    stop: list[str] = []
    top_logprobs: int | None = None
    truncate: bool = False
    keep_alive_s: float | None = None
    priority: Priority = Priority.NORMAL
    id: str = ""
    path: str = ""

    def settle(self, context_length: int) -> None:
        """What the client left open its model's alias says, and the configuration (`context_length`; 0: nothing)."""
        if self.model.alias is not None:
            said = self.model.alias.parameters
            if self.messages is not None:
                self.messages = self.model.alias.begin(self.messages, bool(self.context_ids))
            self.stop = self.stop or said.stop or []
            self.num_ctx = self.num_ctx or said.num_ctx
            if self.max_tokens is None and said.num_predict and said.num_predict > 0:
                self.max_tokens = said.num_predict
        self.num_ctx = self.num_ctx or context_length or None

    def fingerprint(self) -> bytes:
        """Of what was asked, not of how the answer is drawn."""
        asked = [getattr(self, name) for name in self.__struct_fields__ if name not in NOT_ASKED]
        weights = self.model.weights
        return hashlib.blake2b(msgspec.json.encode([weights.name, weights.digest, *asked]), digest_size=16).digest()


class Summary(Struct, kw_only=True):
    """How an answer ended and what it cost. `thinking_tokens`: how many of the emitted ones. Durations in ns; they add up to no
    more than `total_ns`."""

    reason: str
    stop_string: str | None
    prompt_ids: list[int]
    emitted: list[int]
    cached_tokens: int
    thinking_tokens: int
    total_ns: int
    load_ns: int
    prompt_ns: int
    eval_ns: int


class Answered(Struct, kw_only=True):
    """A whole answer: its text and that of the thinking apart, the calls in their order, and the log-probabilities that were asked for."""

    text: str
    thinking: str
    calls: list[Call]
    logprobs: list[TokenLogprob]
    summary: Summary


class Entry:
    """One request in hand: all that another engine needs to go on where this one stopped.

    `attempts`: how many engines have had it; `deaths`: how many in a row died under it without progress; `cached`: prompt tokens that
    none of them had to compute; `reached`: tokens of prompt and answer that the best of them got through. `digest`: of the model whose
    tokens these are. `embedded_tokens`: of inputs that were embedded. `text`, `thinking`, `calls`, `logprobs`: what the
    answer says so far. `phases`: as in messages.Flight. Times: of the monotonic clock, ns.
    """

    def __init__(self, journal: Journal, request: Request, received_ns: int):
        self.journal = journal
        self.request = request
        self.received_ns = received_ns
        self.submitted_ns = received_ns
        self.first_token_ns: int | None = None
        self.digest: str | None = None
        self.prompt_ids = request.prompt_ids
        self.continued = True
        self.cached: int | None = None
        self.embedded_tokens = 0
        self.emitted: list[int] = []
        self.text: list[str] = []
        self.thinking: list[str] = []
        self.calls: list[Call] = []
        self.logprobs: list[TokenLogprob] = []
        self.thinking_tokens = 0
        self.reached = 0
        self.attempts = 0
        self.deaths = 0
        self.phases: list[tuple[Phase, int]] = [("queued", 0)]

    def enter(self, phase: Phase) -> None:
        """Into another phase, now."""
        if self.phases[-1][0] != phase:
            self.phases.append((phase, (time.monotonic_ns() - self.received_ns) // 1_000_000))

    def flight(self, outcome: Outcome | None = None, status: int = 0) -> Flight:
        """Its way so far."""
        return Flight(
            id=self.request.id,
            path=self.request.path,
            model=self.request.model.name,
            at=round(time.time() - (time.monotonic_ns() - self.received_ns) / 1e9, 3),
            outcome=outcome,
            status=status,
            phases=self.phases[-MOST_PHASES:],
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached or 0,
            completion_tokens=len(self.emitted),
            resumes=self.resumes,
        )

    @property
    def prompt_tokens(self) -> int:
        """As far as they are known; of inputs to be embedded, once they are."""
        return len(self.prompt_ids or []) or self.embedded_tokens

    def submit(self, job: int, digest: str) -> Submit | Embed:
        """The job that brings this request on from where it is, on an engine of the model with this digest. Raises Refused when that is
        another than gave the tokens so far."""
        request = self.request
        if digest != self.digest:
            if self.emitted:
                raise Refused(500, f"the files of {request.model.name} were replaced during the answer", code="model_changed")
            self.digest, self.prompt_ids, self.cached, self.reached = digest, request.prompt_ids, None, 0
        self.attempts += 1
        self.journal.resumed += self.attempts > 1
        self.enter("prefill")
        if self.attempts == 1:
            self.submitted_ns = time.monotonic_ns()
        if request.inputs is not None:
            return Embed(job=job, request_id=request.id, inputs=request.inputs, truncate=request.truncate, num_ctx=request.num_ctx)
        known = self.prompt_ids is not None  # what an engine once tokenised is not rendered again
        return Submit(
            job=job,
            request_id=request.id,
            sampling=request.sampling,
            messages=None if known else request.messages,
            tools=request.tools,
            tool_choice=request.tool_choice,
            format=request.format,
            prompt=None if known else request.prompt,
            suffix=None if known else request.suffix,
            context_ids=[] if known else request.context_ids,
            prompt_ids=self.prompt_ids,
            top_logprobs=request.top_logprobs,
            continued=self.continued,
            emitted=self.emitted,
            think=request.think,
            max_tokens=request.max_tokens,
            num_ctx=request.num_ctx,
            stop=request.stop,
            truncate=request.truncate,
        )

    def note(self, event: Event) -> None:
        """Keep what a later engine will need."""
        if isinstance(event, Token):
            if self.first_token_ns is None:
                self.first_token_ns = time.monotonic_ns()
            if self.phases[-1][0] == "prefill":  # else it came from an engine that has died since
                self.enter("decode")
            self.emitted += event.ids
            self.thinking_tokens += len(event.ids) if event.thinking else 0
            self.logprobs += event.logprobs
            if event.text:
                (self.thinking if event.thinking else self.text).append(event.text)
            self.reach(len(self.prompt_ids or []) + len(self.emitted))
        elif isinstance(event, Call):
            self.calls.append(event)
        elif isinstance(event, Progress):
            self.reach(event.done)
        elif isinstance(event, Accepted):
            self.prompt_ids, self.continued = event.prompt_ids, event.continued
            cached = min(event.cached, len(event.prompt_ids))  # a resumed one's emitted tokens may have come from the cache, too
            if self.request.max_tokens != 0:
                self.journal.prefilled += len(event.prompt_ids) - cached
            self.cached = cached if self.cached is None else min(self.cached, cached)
        elif isinstance(event, Embedded):
            self.embedded_tokens = event.tokens
            self.journal.prefilled += event.tokens

    def reach(self, position: int) -> None:
        """An engine got so far, in tokens. What an earlier one has done is no progress, or a request that always kills the engine at the
        same place would be tried for ever."""
        if position > self.reached:
            self.reached = position
            self.deaths = 0

    def outlive(self, cause: str) -> None:
        """Its engine died. Raises Refused when that was once too often."""
        self.deaths += 1
        if self.deaths >= MOST_DEATHS:
            raise self.journal.condemned(self.request, cause)

    @property
    def resumes(self) -> int:
        """On how many further engines it went on."""
        return max(0, self.attempts - 1)

    @property
    def suspect(self) -> bool:
        return self.deaths >= SUSPECT_DEATHS

    def answered(self, done: Done) -> Answered:
        return Answered(
            text="".join(self.text),
            thinking="".join(self.thinking),
            calls=self.calls,
            logprobs=self.logprobs,
            summary=self.summary(done),
        )

    def summary(self, done: Done) -> Summary:
        """The figures of a finished request. The engine's clock counts unless another engine had a part in it."""
        now = time.monotonic_ns()
        total = now - self.received_ns
        load = max(1, self.submitted_ns - self.received_ns)
        first = self.first_token_ns or now
        alone = self.attempts == 1
        prompt = max(1, min(done.prompt_ns if alone else first - self.submitted_ns, total - load))
        evaluation = max(1, min(done.eval_ns if alone else now - first, total - load - prompt))
        return Summary(
            reason=done.reason,
            stop_string=done.stop_string,
            prompt_ids=self.prompt_ids or [],
            emitted=self.emitted,
            cached_tokens=self.cached or 0,
            thinking_tokens=self.thinking_tokens,
            total_ns=max(total, load + prompt + evaluation),
            load_ns=load,
            prompt_ns=prompt,
            eval_ns=evaluation,
        )


class Journal:
    """The requests in hand, what those before them came to (`flights`: the last ones), and which ones engines do not survive: by
    fingerprint, until when (on the monotonic clock, s) and the class of the cause. `prefilled`: prompt tokens that engines computed."""

    def __init__(self, poison_s: float):
        self.poison_s = poison_s
        self.entries: set[Entry] = set()
        self.held_bytes = 0
        self.finished = 0
        self.resumed = 0
        self.emitted_before = 0
        self.prefilled = 0
        self.flights: deque[Flight] = deque(maxlen=KEPT_FLIGHTS)
        self.poisons: dict[bytes, tuple[float, str]] = {}

    @contextmanager
    def keep(self, request: Request, received_ns: int, size_bytes: int) -> Iterator[Entry]:
        """The entry of a request that came in `size_bytes`. Raises Refused: it is poison, or there is no room for it."""
        self.refuse_poison(request)
        if self.entries and self.held_bytes + size_bytes > MOST_BYTES:
            raise Refused(503, BUSY, code="journal_full", retry_s=1)
        entry = Entry(self, request, received_ns)
        self.entries.add(entry)
        self.held_bytes += size_bytes
        try:
            yield entry
        finally:
            self.entries.remove(entry)
            self.held_bytes -= size_bytes
            self.finished += 1
            self.emitted_before += len(entry.emitted)

    def land(self, entry: Entry, outcome: Outcome, status: int) -> None:
        """The work on a request has ended."""
        entry.enter("ended")
        self.flights.append(entry.flight(outcome, status))

    @property
    def emitted(self) -> int:
        """Tokens since the server started."""
        return self.emitted_before + sum(len(entry.emitted) for entry in self.entries)

    def oldest_s(self) -> float:
        """How long the oldest of them has been in hand."""
        now = time.monotonic_ns()
        return max(((now - entry.received_ns) / 1e9 for entry in self.entries), default=0.0)

    def condemned(self, request: Request, cause: str) -> Refused:
        """The refusal of a request that engines do not survive; for `poison_s` nobody's request for the same is let in."""
        fingerprint = request.fingerprint()
        self.poisons.pop(fingerprint, None)  # so that the first one is the oldest
        self.poisons[fingerprint] = time.monotonic() + self.poison_s, cause
        if len(self.poisons) > MOST_POISONS:
            del self.poisons[next(iter(self.poisons))]
        return poisonous(cause, self.poison_s)

    def refuse_poison(self, request: Request) -> None:
        """Raises Refused if engines do not survive it."""
        now = time.monotonic()
        while self.poisons and next(iter(self.poisons.values()))[0] <= now:
            del self.poisons[next(iter(self.poisons))]
        if not self.poisons or (known := self.poisons.get(request.fingerprint())) is None:
            return
        until, cause = known
        raise poisonous(cause, until - now)


def outcome(status: int, left: bool) -> Outcome:
    """What came of a request that was answered with this status."""
    if left:
        return "left"
    if status in (429, 503):
        return "busy"
    return "done" if status < 400 else "refused" if status < 500 else "failed"


def poisonous(cause: str, left_s: float) -> Refused:
    message = f"the engine died {MOST_DEATHS} times in a row while it worked on this request: {cause}"
    return Refused(500, f"{message}; it is refused for {math.ceil(left_s)} s", code="engine_crashed", hopeless=True)
