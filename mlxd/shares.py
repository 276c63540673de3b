"""Shares: how much of memory each engine may take, and what is done when one takes more.

Pure. All engines together have one limit (`engine.memory_limit`); each may take what the others leave. An engine plans with 80 % of its
share (`engine/room.py`), so that beyond 85 % something grows that it does not know of: a leak, mostly, that only a new process ends.
"""

from __future__ import annotations

from enum import Enum, auto

import psutil

SOFT, HARD = 0.85, 0.95
#: Looks, one a second, in a row before it is ended: a footprint may jump for a moment.
HARD_LOOKS = 3
#: A new process would be as large: one that was over this part of its share when it became ready is left alone.
BORN_LARGE = 0.75
#: Running answers have so long to end; after it they go on in the next process.
PATIENCE_S = 60.0
#: A share that has changed by less is not told.
WORTH_TELLING = 0.02


class Crowding(Enum):
    FINE = auto()
    SOFT = auto()  # takes no more requests, and is replaced when it is idle
    HARD = auto()  # is replaced


def limit(memory_limit: int) -> int:
    """Bytes for all engines; `memory_limit` 0: three quarters of the machine's."""
    return memory_limit or psutil.virtual_memory().total * 3 // 4


def share(limit_bytes: int, others: list[int]) -> int:
    """What is left by other engines with these footprints; never nothing, since a number of 0 would mean no limit to MLX."""
    return max(1, limit_bytes - sum(others))


def crowding(footprint: int, at_ready: int, share_bytes: int, looks: int) -> Crowding:
    """`looks`: how many in a row, this one included, found it over HARD."""
    if at_ready > BORN_LARGE * share_bytes or footprint <= SOFT * share_bytes:
        return Crowding.FINE
    return Crowding.HARD if looks >= HARD_LOOKS else Crowding.SOFT
