"""Shares: how much of memory each engine may take, and what is done when one takes more.

Pure. All engines together have one limit (`engine.memory_limit`); each may take what the others leave. An engine plans with 80 % of what its
model leaves of its share (`engine/room.py`), so that beyond 85 % something grows that it does not know of: a leak, mostly, that only a new
process ends.
"""

from __future__ import annotations

import functools
from enum import Enum, auto

import psutil

SOFT, HARD = 0.85, 0.95
#: Looks, one a second, in a row: a footprint may jump for a moment.
LOOKS = 3
#: Growth that is no reason to load a model again: a process that works has more of everything than one that has just loaded.
WORTH_REPLACING = 256 * 1024 * 1024
#: Running answers have so long to end; after it they go on in the next process.
PATIENCE_S = 60.0
#: A share that has changed by less is not told. An engine that was told has so long to give back what is too much.
WORTH_TELLING = 0.02
GIVING_S = 10.0


class Crowding(Enum):
    FINE = auto()
    SOFT = auto()  # to be replaced when it is idle
    HARD = auto()  # to be replaced


def limit(memory_limit: int) -> int:
    """Bytes for all engines; `memory_limit` 0: three quarters of the machine's."""
    return memory_limit or machine_bytes() * 3 // 4


@functools.cache  # the supervisor asks for each engine each second
def machine_bytes() -> int:
    return psutil.virtual_memory().total


def share(limit_bytes: int, others: list[int]) -> int:
    """What is left by other engines with these footprints; never nothing, since a number of 0 would mean no limit to MLX."""
    return max(1, limit_bytes - sum(others))


def crowding(footprint: int, at_ready: int, share_bytes: int) -> Crowding:
    """By what an engine has grown since it was ready, of what it had room to grow by. A new process would be as large as this one was then:
    one that had no room is left alone."""
    grown, room = footprint - at_ready, share_bytes - at_ready
    if room <= 0 or grown < WORTH_REPLACING or grown <= SOFT * room:
        return Crowding.FINE
    return Crowding.HARD if grown > HARD * room else Crowding.SOFT
