"""How much memory each engine may take, and what becomes of one that takes more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Daemon, eventually
from test_spare import engine_of

from mlxd import shares
from mlxd.shares import Crowding

Make = Callable[..., Daemon]
GB = 10**9


def test_the_limit_is_three_quarters_of_the_machine_unless_it_is_set() -> None:
    assert shares.limit(0) == psutil.virtual_memory().total * 3 // 4
    assert shares.limit(5 * GB) == 5 * GB


def test_an_engine_may_take_what_the_others_leave_and_never_nothing() -> None:
    assert shares.share(10 * GB, []) == 10 * GB
    assert shares.share(10 * GB, [3 * GB, 4 * GB]) == 3 * GB
    assert shares.share(10 * GB, [11 * GB]) == 1


@pytest.mark.parametrize(
    ("footprint", "at_ready", "expected"),
    [
        (18, 10, Crowding.FINE),
        (19, 10, Crowding.SOFT),
        (19.6, 10, Crowding.HARD),
        (19.8, 19, Crowding.FINE),  # a process that has just loaded would have as little room
        (25, 20.5, Crowding.FINE),
    ],
)
def test_what_has_outgrown_its_share_is_replaced_if_that_helps(footprint: float, at_ready: float, expected: Crowding) -> None:
    assert shares.crowding(int(footprint * GB), int(at_ready * GB), 20 * GB) is expected


def test_a_little_growth_is_no_reason_to_load_a_model_again() -> None:
    assert shares.crowding(250_000_000, 50_000_000, 200_000_000) is Crowding.FINE
    assert shares.crowding(350_000_000, 50_000_000, 200_000_000) is Crowding.HARD


@pytest.mark.parametrize("how", ["", "--crawl 1"], ids=["idle", "at work"])
def test_an_engine_that_leaks_is_replaced_before_the_machine_suffers(daemon: Make, home: Path, how: str) -> None:
    """F47. An idle one at the soft mark, one that works at the hard one."""
    engine = f"--grow 50 {how} --first 1 {home}/engine"
    d = daemon(server="--want a:latest", engine=engine, MLXD_ENGINE_MEMORY_LIMIT=str(400 * 2**20))
    d.start()
    eventually(lambda: [record["cause"] for record in d.exits()] == ["grown"], "an end", d.history)
    told: dict[str, Any] = d.until("another", lambda s: s["state"] == "ready" and engine_of(s)["restarts"] == 1)
    assert engine_of(told)["memory_bytes"] < 200 * 2**20
    record = d.exits()[0]
    assert shares.WORTH_REPLACING < record["memory_bytes"] < 2**30
    assert "took more memory than its share; a new process has it back" in record["remedy"]


def test_an_engine_that_is_as_large_as_its_model_is_left_alone(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--swell 300", MLXD_ENGINE_MEMORY_LIMIT=str(300 * 2**20))
    d.start()
    before = d.until("a beat", lambda s: engine_of(s)["memory_bytes"] > 300 * 2**20)
    d.until("some looks more", lambda s: engine_of(s)["up_s"] > engine_of(before)["up_s"] + 6)
    assert not d.exits()
