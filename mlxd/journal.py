"""The journal: every request from its acceptance to its last byte, so that an engine's death costs it nothing but time.

Owns what was asked (`Request`) and what has come of it (`Entry`). Knows no dialect, no socket and no engine.
"""

from __future__ import annotations

import time
from typing import Any

from msgspec import Struct

from mlxd.admission import Priority
from mlxd.errors import Refused
from mlxd.messages import Accepted, Done, Event, Progress, Sampling, Submit, Token
from mlxd.models import Model

#: A request in flight at this many deaths in a row without progress between them is suspect, and at one more given up.
SUSPECT_DEATHS = 2
MOST_DEATHS = 3


class Request(Struct, kw_only=True):
    """What a client asked, whatever its dialect. Exactly one of `messages` and `prompt` is given; fields as in messages.Submit.

    `keep_alive_s`: None leaves the model's own, infinity is for ever.
    """

    model: Model
    sampling: Sampling
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    think: bool | None = None
    max_tokens: int | None = None
    num_ctx: int | None = None
    stop: list[str] = []
    truncate: bool = False
    keep_alive_s: float | None = None
    priority: Priority = Priority.NORMAL


class Summary(Struct, kw_only=True):
    """How an answer ended and what it cost. Durations in ns; they add up to no more than `total_ns`."""

    reason: str
    stop_string: str | None
    prompt_ids: list[int]
    emitted: list[int]
    cached_tokens: int
    total_ns: int
    load_ns: int
    prompt_ns: int
    eval_ns: int


class Entry:
    """One request in hand: all that another engine needs to go on where this one stopped."""

    def __init__(self, request: Request, received_ns: int):
        self.request = request
        self.received_ns = received_ns
        self.submitted_ns = received_ns
        self.first_token_ns: int | None = None
        self.prompt_ids: list[int] | None = None
        self.emitted: list[int] = []
        self.prefilled = 0  # the furthest that any engine came
        self.attempts = 0
        self.deaths = 0
        self.progressed = False

    def submit(self, job: int) -> Submit:
        """The job that brings this request on from where it is."""
        request = self.request
        self.attempts += 1
        self.progressed = False
        if self.attempts == 1:
            self.submitted_ns = time.monotonic_ns()
        known = self.prompt_ids is not None  # what an engine once tokenised is not rendered again
        return Submit(
            job=job,
            sampling=request.sampling,
            messages=None if known else request.messages,
            prompt=None if known else request.prompt,
            prompt_ids=self.prompt_ids,
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
            self.emitted += event.ids
            self.progressed = True
        elif isinstance(event, Progress):
            self.progressed |= event.done > self.prefilled
            self.prefilled = max(self.prefilled, event.done)
        elif isinstance(event, Accepted):
            self.prompt_ids = event.prompt_ids

    def outlive(self, cause: str) -> None:
        """Its engine died. Raises Refused when that was once too often."""
        self.deaths = 1 if self.progressed else self.deaths + 1
        self.progressed = False
        if self.deaths >= MOST_DEATHS:
            message = f"the engine died {self.deaths} times in a row while it worked on this request: {cause}"
            raise Refused(500, message, code="engine_crashed", hopeless=True)

    @property
    def resumes(self) -> int:
        """On how many further engines it went on."""
        return max(0, self.attempts - 1)

    @property
    def suspect(self) -> bool:
        return self.deaths >= SUSPECT_DEATHS and not self.progressed

    def summary(self, done: Done) -> Summary:
        """The figures of a finished request. The engine's clock counts unless another engine had a part in it."""
        now = time.monotonic_ns()
        total = now - self.received_ns
        load = max(1, self.submitted_ns - self.received_ns)
        first = self.first_token_ns or now
        alone = self.attempts == 1
        prompt = min(done.prompt_ns if alone else first - self.submitted_ns, total - load)
        return Summary(
            reason=done.reason,
            stop_string=done.stop_string,
            prompt_ids=self.prompt_ids or [],
            emitted=self.emitted,
            cached_tokens=done.cached_tokens,
            total_ns=total,
            load_ns=load,
            prompt_ns=max(1, prompt),
            eval_ns=max(1, min(done.eval_ns if alone else now - first, total - load - prompt)),
        )


class Journal:
    """How much work has been done since the server started."""

    def __init__(self) -> None:
        self.finished = 0
        self.emitted = 0
