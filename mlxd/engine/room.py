"""Room: how much memory the caches of running rows may take, and how much so many of them would.

Pure arithmetic over what was measured at a row of the model's own. A batch pads its rows to the longest, so that rows times the longest
counts, not the sum. Does not know rows, nor who goes first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

#: Caches grow by so many tokens at once (mlx-lm's KVCache.step).
STEP = 256
#: Of what an engine's model leaves of its share. At 0.85 mlxd replaces it when it is idle, at 0.95 in any case (`shares.py`).
USABLE = 0.8


@dataclass(frozen=True)
class Layer:
    """What the cache of one layer takes for a row: `fixed` bytes, and `per_token` for each of at most `most` tokens."""

    fixed: float = 0.0
    per_token: float = 0.0
    most: float = math.inf

    def bytes(self, tokens: int) -> float:
        return self.fixed + self.per_token * min(tokens, self.most)


def measured(cache: list[Any]) -> list[Layer]:
    """Of one row's caches, with at least one token in each: mlx-lm's KVCache and RotatingKVCache, lists of such, and any that does not grow.
    Layers that are alike are one."""
    alike: dict[float, Layer] = {}
    for one in flat(cache):
        keys = getattr(one, "keys", None)
        if keys is None or not keys.shape[2]:
            layer = Layer(float(one.nbytes), 0.0, 0)
        else:
            layer = Layer(0.0, (keys.nbytes + one.values.nbytes) / keys.shape[2], getattr(one, "max_size", None) or math.inf)
        known = alike.get(layer.most, Layer())
        alike[layer.most] = Layer(known.fixed + layer.fixed, known.per_token + layer.per_token, layer.most)
    return list(alike.values())


def flat(cache: list[Any]) -> list[Any]:
    """Without mlx-lm's CacheList."""
    return [one for entry in cache for one in (flat(list(entry.caches)) if hasattr(entry, "caches") else [entry])]


class Room:
    """`share`: what the engine may take of memory in all, bytes; `taken`: what its weights and a step take of it. A row of `least` tokens
    always fits: with less room the model is not loaded."""

    def __init__(self, share: float = math.inf, taken: int = 0, layers: list[Layer] | None = None, least: int = 0):
        self.share = share
        self.taken = taken
        self.layers = layers or []
        self.least = least

    @property
    def bytes(self) -> float:
        """For the caches of all rows, and for the prefix index."""
        return max((self.share - self.taken) * USABLE, self.row(self.least))

    def row(self, tokens: int) -> float:
        return sum(layer.bytes(grown(tokens)) for layer in self.layers)

    def rows(self, count: int, longest: int) -> float:
        """Bytes that so many rows take, of which the longest has so many tokens."""
        return count * self.row(longest)

    @property
    def most_tokens(self) -> int:
        """The longest row that fits alone; 0 when none does. Beyond all contexts where nothing limits it."""
        if self.row(MOST) <= self.bytes:
            return MOST
        low, high = 0, MOST // STEP
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.row(middle * STEP) <= self.bytes else (low, middle)
        return low * STEP


MOST = 2**31


def grown(tokens: int) -> int:
    """What a cache holds room for when it holds so many tokens."""
    return -(-tokens // STEP) * STEP
