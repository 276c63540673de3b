"""The last ten minutes of this server in figures, for charts. Pure: who samples brings the time and the counters."""

from __future__ import annotations

from collections import deque

from msgspec import Struct

#: Two seconds apart, ten minutes of them.
EVERY_S = 2.0
KEPT = 300


class Sample(Struct, kw_only=True):
    """`at`: Unix time, s. Rates are since the sample before. `engines_bytes`: MLX's memory in all engines, its cache of freed buffers
    included. `available_bytes`: of the machine."""

    at: float
    tokens_s: float
    prompt_tokens_s: float
    running: int
    waiting: int
    engines_bytes: int
    available_bytes: int


class History:
    """Newest last."""

    def __init__(self) -> None:
        self.samples: deque[Sample] = deque(maxlen=KEPT)
        self.taken_at = 0.0
        self.emitted = self.prefilled = 0

    def due(self, now: float) -> bool:
        """By a clock that ticks once a second, a little late each time."""
        return not 0 <= now - self.taken_at < EVERY_S - 0.5

    def take(
        self, now: float, emitted: int, prefilled: int, running: int, waiting: int, engines_bytes: int, available_bytes: int
    ) -> None:
        """`emitted`, `prefilled`: tokens since the server started."""
        passed_s = now - self.taken_at if self.samples else EVERY_S
        rates = [round(max(0.0, count / passed_s), 1) for count in (emitted - self.emitted, prefilled - self.prefilled)]
        self.taken_at, self.emitted, self.prefilled = now, emitted, prefilled
        self.samples.append(
            Sample(
                at=round(now, 3),
                tokens_s=rates[0],
                prompt_tokens_s=rates[1],
                running=running,
                waiting=waiting,
                engines_bytes=engines_bytes,
                available_bytes=available_bytes,
            )
        )
