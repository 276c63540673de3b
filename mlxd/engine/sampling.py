"""Keyed sampling: position i of a request draws with u = hash(seed, i) by inverse CDF over its filtered distribution.

Owns the draw, one call for all rows of a batch, so that a row's tokens do not depend on who shares the batch or on when it began; and
the order of what is done to logits before it: penalties, then the mask of a grammar, then the filters. Knows nothing of requests: a row
is a `Draw`.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxd.engine.grammar import Constraint
from mlxd.engine.logprobs import Place, Ranking
from mlxd.engine.penalties import Penalties, has_penalties
from mlxd.messages import Sampling

# `import mlx_lm.generate` would give the function of that name, which the package puts over its module.
generate = importlib.import_module("mlx_lm.generate")

#: 1/temperature at most: 0 times it is still 0 in float32, so the best token of an almost greedy row keeps its weight of 1.
MOST_INVERSE = 1e30
#: More than any vocabulary has.
NO_TOP_K = 2**31 - 1


class WrongOutput(Exception):
    """What the model gave are no logits."""


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """How one row draws: `prompt_length` tokens came before its position 0. Stands in mlx-lm's list of samplers, one per row.

    `constraint`: what its tokens must match. `top_logprobs`: how many of the best tokens are told of at each; None: no log-probabilities.
    """

    sampling: Sampling
    prompt_length: int
    constraint: Constraint | None = None
    top_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature <= 0 or self.sampling.top_k == 1


class Plan:
    """The draws of a batch as arrays, good for as long as the batch has the same rows.

    Built from the rows (`draws`), how many tokens each has in its cache just before a step (`lengths`) and how many words there are
    (`width`).
    """

    def __init__(self, draws: list[Draw], lengths: list[int], width: int):
        self.draws = draws
        self.size = len(draws)
        self.width = width
        self.asking = [i for i, d in enumerate(draws) if d.top_logprobs is not None]
        self.constrained = [(i, d.constraint) for i, d in enumerate(draws) if d.constraint is not None]
        self.penalised = [
            (i, Penalties(d.sampling, d.prompt_length, width)) for i, d in enumerate(draws) if has_penalties(d.sampling)
        ]
        self.greedy = all(d.greedy for d in draws)
        if self.greedy:
            return
        samplings = [d.sampling for d in draws]
        self.seeds = np.array([s.seed & 0xFFFF_FFFF_FFFF_FFFF for s in samplings], np.uint64)
        # The step's own input is in the cache afterwards, so the token it draws follows length + 1 others.
        self.positions = np.array([n + 1 - d.prompt_length for n, d in zip(lengths, draws, strict=True)], np.uint64)
        self.greedy_rows = mx.array([d.greedy for d in draws])
        self.inverse = column([1.0 if d.greedy else min(1 / d.sampling.temperature, MOST_INVERSE) for d in draws])
        self.min_p = column([math.log(min(s.min_p, 1.0)) if s.min_p > 0 else -math.inf for s in samplings])
        self.any_min_p = any(s.min_p > 0 for s in samplings)
        self.plan_ranks([d for d in draws if not d.greedy])

    def plan_ranks(self, drawn: list[Draw]) -> None:
        """What top_k and top_p need: how many of the best tokens must be in order (0: none, None: all of them)."""
        by_rank = [d.sampling for d in drawn if d.sampling.top_k > 0 or d.sampling.top_p < 1]
        self.most_k: int | None = max((s.top_k for s in by_rank), default=0)
        if any(s.top_k <= 0 for s in by_rank):
            self.most_k = None
        if not by_rank:
            return
        samplings = [d.sampling for d in self.draws]
        self.ranked_rows = mx.array([[s.top_k > 0 or s.top_p < 1] for s in samplings])
        self.top_k = mx.array([[min(s.top_k, NO_TOP_K) if s.top_k > 0 else NO_TOP_K] for s in samplings])
        self.top_p = column([s.top_p if s.top_p < 1 else math.inf for s in samplings])

    def fits(self, draws: list[Draw]) -> bool:
        """mlx-lm extends a batch's lists in place and makes new ones when it drops a row."""
        return self.draws is draws and self.size == len(draws)

    @property
    def steered(self) -> bool:
        """Whether some row's logits depend on its tokens."""
        return bool(self.penalised or self.constrained)

    def steer(self, logits: mx.array, before: list[list[int]], tokens: list[int]) -> mx.array:
        """The logits with penalties and masks, others' rows as they were. `before`: each row's tokens, and after them one of `tokens`."""
        logits = mx.array(logits)  # assignment changes the array itself
        for i, penalties in self.penalised:
            logits[i : i + 1] = penalties.apply(logits[i : i + 1], before[i], tokens[i])
        if self.constrained:
            masks = [
                constraint.allowed(tokens[i], len(before[i]) + 1 - self.draws[i].prompt_length, self.width)
                for i, constraint in self.constrained
            ]
            rows = mx.array([i for i, _ in self.constrained])
            logits[rows] = mx.where(mx.array(np.stack(masks)), logits[rows], -math.inf)
        return logits

    def rank(self, logits: mx.array, drawn: mx.array) -> tuple[list[Place | None], tuple[mx.array, ...]]:
        """Of each row where its log-probabilities will stand, and the arrays to be computed for that."""
        places: list[Place | None] = [None] * self.size
        if not self.asking:
            return places, ()
        rows = mx.array(self.asking)
        ranking = Ranking(logits[rows], drawn[rows])
        for place, i in enumerate(self.asking):
            places[i] = Place(ranking, place, self.draws[i].top_logprobs or 0)
        return places, ranking.arrays

    def draw(self, logits: mx.array) -> mx.array:
        """The next token of each row. `logits`: (rows, vocabulary), any float type. Returns (rows,) uint32, not evaluated."""
        best = mx.argmax(logits, axis=-1)
        if self.greedy:
            return best
        u = mx.array(uniform(self.seeds, self.positions))[:, None]
        self.positions += np.uint64(1)
        logits = logits.astype(mx.float32)
        x = logits - mx.max(logits, axis=-1, keepdims=True)
        weights = mx.exp(x * self.inverse)
        if self.most_k != 0:
            weights = mx.where(x >= self.rank_floor(x), weights, 0)
        if self.any_min_p:
            weights = mx.where(x >= self.min_p, weights, 0)
        mass = mx.cumsum(weights, axis=-1)
        # u <= 1 - 2**-24, so u times the whole rounds to less than the whole: some token always lies beyond.
        drawn = mx.argmax(mass > u * mass[:, -1:], axis=-1)
        return mx.where(self.greedy_rows, best, drawn)

    def rank_floor(self, x: mx.array) -> mx.array:
        """The least `x` that top_k and top_p let pass, (rows, 1); tokens that tie with it pass too.

        The filters mean what they mean in mlx_lm.sample_utils: they look at the distribution at temperature 1.
        """
        if self.most_k is None or self.most_k >= x.shape[-1]:
            top = mx.sort(x, axis=-1)[:, ::-1]
        else:
            top = mx.sort(mx.topk(x, self.most_k, axis=-1), axis=-1)[:, ::-1]
        p = mx.exp(top)
        above = mx.cumsum(p, axis=-1, inclusive=False)
        enough = self.top_p * mx.sum(mx.exp(x), axis=-1, keepdims=True)
        kept = mx.sum(above < enough, axis=-1, keepdims=True)
        kept = mx.clip(mx.minimum(kept, self.top_k), 1, None)
        return mx.where(self.ranked_rows, mx.take_along_axis(top, kept - 1, axis=-1), -math.inf)


def bounds(logits: mx.array) -> tuple[mx.array, mx.array]:
    """The least and the greatest logit of each row, not evaluated; NaN if there is one in the row."""
    return mx.min(logits, axis=-1), mx.max(logits, axis=-1)


def are_sound(least: mx.array, most: mx.array) -> bool:
    """Whether every row can be drawn from: no NaN, no infinity, not the same number everywhere. Minus infinity may mask a part of it."""
    return all(low < high < math.inf for low, high in zip(least.tolist(), most.tolist(), strict=True))  # type: ignore[arg-type, operator]


def column(values: list[float]) -> mx.array:
    return mx.array(values, mx.float32)[:, None]


def uniform(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    """u = hash(seed, position) in [0, 1), a multiple of 2**-24.

    Output number `position` of splitmix64 (Steele, Lea, Flood 2014) whose state is the mixed seed; without the mixing, seeds one
    step of the generator apart would give the same numbers, one position later.
    """
    z = mix(mix(seeds) + (positions + np.uint64(1)) * np.uint64(0x9E37_79B9_7F4A_7C15))
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finalizer, a bijection on 64 bits."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return z ^ (z >> np.uint64(31))


class KeyedBatch(generate.GenerationBatch):  # type: ignore[misc, name-defined]
    """mlx-lm's batch in generation, drawing with keys.

    Its bookkeeping moves each row's `Draw` along with the row, as the row's sampler, and the `Place` of its log-probabilities.
    """

    plan: Plan | None = None
    _next_tokens: mx.array
    _next_logprobs: list[Place | None]
    #: The bounds of the logits that `_next_tokens` were drawn from; one more for each `extend`.
    checks: tuple[tuple[mx.array, mx.array], ...] = ()

    def extend(self, batch: KeyedBatch) -> None:
        super().extend(batch)
        self.checks += batch.checks

    def filter(self, keep: list[int]) -> None:
        super().filter(keep)
        if not keep:
            self.checks = ()  # nobody will read those tokens

    def _step(self) -> tuple[list[int], list[Place | None]]:
        """Start the next step and give the tokens of the one before: MLX computes while Python delivers.

        Raises WrongOutput when those tokens mean nothing.
        """
        inputs, checks, places = self._next_tokens, self.checks, self._next_logprobs
        logits = self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :]
        if self.plan is None or not self.plan.fits(self.samplers):
            self.plan = Plan(self.samplers, [len(row) for row in self.tokens], logits.shape[-1])
        tokens: list[int] | None = None
        steered = logits
        if self.plan.steered:
            mx.async_eval(logits)  # type: ignore[no-untyped-call] # and meanwhile, masks
            tokens = read(inputs, checks, logits.shape[-1])
            steered = self.plan.steer(logits, self.tokens, tokens)
        self._next_tokens = self.plan.draw(steered)
        self._next_logprobs, ranking = self.plan.rank(logits, self._next_tokens)
        self.checks = (bounds(logits),)
        mx.async_eval(self._next_tokens, *self.checks[0], *ranking)  # type: ignore[no-untyped-call]
        tokens = tokens or read(inputs, checks, logits.shape[-1])
        for row, token in zip(self.tokens, tokens, strict=True):
            row.append(token)
        return tokens, places


def read(inputs: mx.array, checks: tuple[tuple[mx.array, mx.array], ...], width: int) -> list[int]:
    """The tokens of the step before. Raises WrongOutput."""
    tokens: list[int] = inputs.tolist()  # type: ignore[assignment]
    if not all(are_sound(*check) for check in checks) or max(tokens) >= width:
        raise WrongOutput("the model gave no numbers, or the same for every token")
    return tokens


# The module makes a GenerationBatch in two places and looks the name up each time.
setattr(generate, "GenerationBatch", KeyedBatch)  # noqa: B010
