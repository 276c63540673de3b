"""The prefix index: caches of rows that ended, by the tokens they hold, for prompts that begin with the same tokens.

Owns the entries and their bound in bytes; the least recently used goes first. Used in the model thread alone, since entries hold
MLX arrays. Does not know what the tokens mean.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models import cache as row_caches

Tokens = npt.NDArray[np.int32]

#: Finding, copying and keeping a prefix takes about 1 ms, and so does prefilling this many tokens of a tiny model.
MIN_TOKENS = 32
#: A look-up compares with every entry that begins alike, 2 us each.
MAX_ENTRIES = 256


@dataclass(slots=True, eq=False)
class Entry:
    tokens: Tokens
    cache: list[Any]
    nbytes: int
    head: bytes

    @property
    def trimmable(self) -> bool:
        """Sliding-window and recurrent caches cannot go back: such an entry serves only prompts that begin with all of it."""
        return bool(row_caches.can_trim_prompt_cache(self.cache))


class PrefixIndex:
    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.entries: list[Entry] = []  # the most recently used is the last

    def find(self, prompt: list[int]) -> tuple[list[Any] | None, int]:
        """The cache that supplies most of `prompt` and of how many tokens; (None, 0) when none is worth it.

        The cache is a copy: generation writes into it. An exact hit would leave nothing to prefill, and mlx-lm refuses that, so
        give all but the last token of what is to be prefilled.
        """
        wanted = np.array(prompt, np.int32)
        best, most = None, MIN_TOKENS - 1
        for entry in self.alike(wanted):
            n = common_prefix(entry.tokens, wanted)
            if n > most and (n == len(entry.tokens) or entry.trimmable):
                best, most = entry, n
        if best is None:
            return None, 0
        self.touch(best)
        cache = copy.deepcopy(best.cache)
        row_caches.trim_prompt_cache(cache, len(best.tokens) - most)
        return cache, most

    def store(self, tokens: list[int], cache: list[Any]) -> None:
        """Keep `cache`, which holds exactly `tokens`; entries that it makes superfluous go."""
        if len(tokens) < MIN_TOKENS or not self.max_bytes:
            return
        held = np.array(tokens, np.int32)
        new = Entry(held, cache, sum(c.nbytes for c in cache), head(held))
        for entry in self.alike(held):
            n = common_prefix(entry.tokens, new.tokens)
            if n == len(new.tokens) and (n == len(entry.tokens) or entry.trimmable):
                self.touch(entry)
                return
            if n == len(entry.tokens) and new.trimmable:
                self.drop(entry)
        # What is left lazy would keep the whole batch's arrays alive.
        mx.async_eval([c.state for c in cache])  # type: ignore[no-untyped-call]
        self.entries.append(new)
        self.bytes += new.nbytes
        self.shrink(self.max_bytes)
        if len(self.entries) > MAX_ENTRIES:
            self.drop(self.entries[0])

    def shrink(self, most_bytes: float) -> None:
        """Hold no more than that, now."""
        while self.entries and self.bytes > most_bytes:
            self.drop(self.entries[0])

    def alike(self, tokens: Tokens) -> list[Entry]:
        """The entries that have the first MIN_TOKENS of `tokens`."""
        wanted = head(tokens)
        return [entry for entry in self.entries if entry.head == wanted]

    def touch(self, entry: Entry) -> None:
        self.entries.remove(entry)
        self.entries.append(entry)

    def drop(self, entry: Entry) -> None:
        self.entries.remove(entry)
        self.bytes -= entry.nbytes


def head(tokens: Tokens) -> bytes:
    return tokens[:MIN_TOKENS].tobytes()


def common_prefix(a: Tokens, b: Tokens) -> int:
    """How many tokens `a` and `b` begin with in common."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
