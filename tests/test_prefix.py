"""The prefix index: what it finds, what it keeps, what it forgets. On mlx-lm's own caches."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from mlxd.engine.prefix import MAX_ENTRIES, MIN_TOKENS, PrefixIndex

LONG = list(range(100, 400))


def row(tokens: list[int]) -> list[Any]:
    """A cache of one layer whose keys are the tokens themselves."""
    cache = KVCache()
    keys = mx.array(tokens, mx.float32)[None, None, :, None]
    cache.update_and_fetch(keys, keys)
    return [cache]


def held(cache: list[Any]) -> list[int]:
    keys, _ = cache[0].keys_and_values()
    return [int(k) for k in keys[0, 0, :, 0].tolist()]  # type: ignore[union-attr]


def test_the_longest_common_beginning_is_found_and_trimmed_to() -> None:
    index = PrefixIndex(10**9)
    index.store(LONG[:80] + [7] * 50, row(LONG[:80] + [7] * 50))
    index.store(LONG[:200], row(LONG[:200]))
    cache, n = index.find(LONG)
    assert cache is not None
    assert (n, held(cache)) == (200, LONG[:200])
    cache, n = index.find(LONG[:150] + [9] * 50)
    assert cache is not None
    assert (n, held(cache)) == (150, LONG[:150])
    cache, n = index.find(LONG[:80] + [7] * 20)
    assert cache is not None
    assert (n, held(cache)) == (100, LONG[:80] + [7] * 20)


def test_what_is_found_is_a_copy() -> None:
    index = PrefixIndex(10**9)
    index.store(LONG, row(LONG))
    for _ in range(2):
        cache, n = index.find(LONG[:100] + [1, 2, 3])
        assert cache is not None
        assert held(cache) == LONG[:100]
        junk = mx.zeros((1, 1, 200, 1))
        cache[0].update_and_fetch(junk, junk)
    cache, _ = index.find(LONG)
    assert cache is not None
    assert held(cache) == LONG


def test_little_in_common_is_no_hit_and_little_is_not_kept() -> None:
    index = PrefixIndex(10**9)
    index.store(LONG[: MIN_TOKENS - 1], row(LONG[: MIN_TOKENS - 1]))
    assert index.entries == []
    index.store(LONG, row(LONG))
    assert index.find([*LONG[: MIN_TOKENS - 1], 1, 2, 3]) == (None, 0)
    assert index.find([]) == (None, 0)
    assert index.find([5] * 300) == (None, 0)


def test_an_entry_that_another_covers_goes() -> None:
    index = PrefixIndex(10**9)
    index.store(LONG[:100], row(LONG[:100]))
    index.store(LONG, row(LONG))
    assert [len(entry.tokens) for entry in index.entries] == [300]
    index.store(LONG[:200], row(LONG[:200]))
    assert [len(entry.tokens) for entry in index.entries] == [300]
    assert index.bytes == sum(entry.nbytes for entry in index.entries)


def test_the_least_recently_used_goes_first_and_a_look_up_is_a_use() -> None:
    size = row(LONG)[0].nbytes
    index = PrefixIndex(3 * size)
    for first in (1, 2, 3):
        index.store([first, *LONG[1:]], row([first, *LONG[1:]]))
    index.find([1, *LONG[1:]])
    index.store([2, *LONG[1:]], row([2, *LONG[1:]]))  # held already: that is a use, too
    index.store([4, *LONG[1:]], row([4, *LONG[1:]]))
    assert sorted(int(entry.tokens[0]) for entry in index.entries) == [1, 2, 4]
    assert index.bytes == 3 * size


def test_one_entry_larger_than_all_may_be_is_not_kept() -> None:
    index = PrefixIndex(100)
    index.store(LONG, row(LONG))
    assert (index.entries, index.bytes) == ([], 0)


def test_the_number_of_entries_is_bounded() -> None:
    index = PrefixIndex(10**12)
    for first in range(MAX_ENTRIES + 10):
        index.store([first, *LONG[:40]], row([first, *LONG[:40]]))
    assert len(index.entries) == MAX_ENTRIES
    assert int(index.entries[0].tokens[0]) == 10


def rotating() -> Any:
    cache = RotatingKVCache(max_size=64)
    for _ in LONG:
        cache.update_and_fetch(mx.zeros((1, 1, 1, 1)), mx.zeros((1, 1, 1, 1)))
    return cache


def recurrent() -> Any:
    cache = ArraysCache(1)
    cache[0] = mx.zeros((1, 4))
    return cache


@pytest.mark.parametrize("untrimmable", [rotating, recurrent, lambda: CacheList(KVCache(), recurrent())])
def test_a_cache_that_cannot_go_back_serves_only_what_begins_with_all_of_it(untrimmable: Any) -> None:
    index = PrefixIndex(10**9)
    index.store(LONG, [untrimmable()])
    assert index.find(LONG[:299])[1] == 0
    assert index.find([*LONG, 1, 2])[1] == 300
    index.store([*LONG, 1, 2], [untrimmable()])
    assert len(index.entries) == 2, "the shorter one still serves what the longer one cannot"
