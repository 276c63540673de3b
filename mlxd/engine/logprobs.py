"""Log-probabilities: of the token that a row drew, and of the best it could have drawn, for rows that ask.

Owns their arithmetic and their spelling. They are of the model's own logits, before temperature, penalties, filters and masks.
Computed with the step that draws the token, read with the token, one step later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx

from mlxd.messages import Logprob, TokenLogprob

#: More than anybody may ask for. The same for all, so that no row's neighbours decide which of equally good tokens it is told of.
MOST = 20
#: In place of minus infinity, which JSON does not have.
LEAST = -9999.0


class Odds(NamedTuple):
    """Natural logarithms, of the drawn token and of the best tokens in falling order."""

    drawn: float
    best: list[tuple[int, float]]


class Ranking:
    """What the logits of one step say of the rows that ask: arrays with one row for each, not evaluated."""

    def __init__(self, logits: mx.array, drawn: mx.array):
        """`logits`: (rows, vocabulary); `drawn`: (rows,)."""
        logits = logits.astype(mx.float32)
        most = min(MOST, logits.shape[-1])
        self.ids = mx.argpartition(-logits, kth=most - 1, axis=-1)[:, :most]
        self.best = mx.take_along_axis(logits, self.ids, axis=-1)
        self.drawn = mx.take_along_axis(logits, drawn[:, None], axis=-1)
        self.whole = mx.logsumexp(logits, axis=-1)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return self.ids, self.best, self.drawn, self.whole

    @cached_property
    def numbers(self) -> list[Any]:
        return [array.tolist() for array in self.arrays]

    def read(self, row: int, most: int) -> Odds:
        """Of one row, with `most` of the best. Waits for the step to be computed."""
        ids, best, drawn, whole = (numbers[row] for numbers in self.numbers)
        falling = sorted(zip(ids, best, strict=True), key=lambda pair: (-pair[1], pair[0]))
        return Odds(relative(drawn[0], whole), [(token, relative(logit, whole)) for token, logit in falling[:most]])


class Place(NamedTuple):
    """Where the odds of one row's token stand."""

    ranking: Ranking
    row: int
    most: int

    def read(self) -> Odds:
        return self.ranking.read(self.row, self.most)


def relative(logit: float, whole: float) -> float:
    return max(LEAST, min(logit - whole, 0.0))


def spelled(token: int, odds: Odds, raw: Callable[[int], bytes]) -> TokenLogprob:
    """`raw`: the bytes of a token."""

    def spell(token: int, logprob: float) -> Logprob:
        written = raw(token)
        return Logprob(written.decode(errors="replace"), written, logprob)

    return TokenLogprob(spell(token, odds.drawn), [spell(*pair) for pair in odds.best])
