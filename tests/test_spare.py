"""The spare engine, the memory of a killed one, and what the machine went down with. Real children, real memory, real files."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import NO_SPARE, Daemon, eventually
from fake_child import take_memory

from mlxd import leftovers

Make = Callable[..., Daemon]
Status = dict[str, Any]
SPARE = {"MLXD_SUPERVISOR_SPARE_BYTES": "0"}
GB = 1024**3


def engine_of(told: Status, model: str = "a:latest") -> Status:
    return [engine for engine in told["engines"] if engine["model"] == model][0]  # type: ignore[no-any-return]


def spares_of(told: Status) -> list[Status]:
    return [engine for engine in told["engines"] if engine["model"] is None]


def spare_of(told: Status) -> Status:
    return spares_of(told)[0]


def standing_by(told: Status) -> bool:
    return told["state"] == "ready" and spare_of(told)["state"] == "blank"


def test_a_dead_engines_model_is_loaded_into_the_spare(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--finished 1", **SPARE)
    d.start()
    for n in range(1, 4):
        before = d.until("a spare", standing_by)
        pid = engine_of(before)["pid"]
        eventually(lambda pid=pid: beaten(d, pid), "a beat", d.history)
        os.kill(pid, signal.SIGKILL)
        after = d.until("its successor", lambda s, n=n: standing_by(s) and engine_of(s)["restarts"] == n)
        assert engine_of(after)["pid"] == spare_of(before)["pid"]
        assert after["last_exit"]["pid"] == engine_of(before)["pid"] and after["last_exit"]["model"] == "a:latest"


def beaten(d: Daemon, pid: int) -> bool:
    """A beat has come since it was ready: it has told that it finished something."""
    return any(engine["pid"] == pid and engine["up_s"] > 2.2 for engine in d.status()["engines"])


def test_a_spare_that_still_imports_is_taken_all_the_same(daemon: Make, home: Path) -> None:
    d = daemon(server="--want a:latest", engine=f"--slow-hello 3 --after 1 {home}/count", **SPARE)
    d.start()
    before = d.until("a spare on its way", lambda s: s["state"] == "ready" and spare_of(s)["state"] == "starting")
    os.kill(engine_of(before)["pid"], signal.SIGKILL)
    after = d.until("its successor", lambda s: s["state"] == "ready" and engine_of(s)["restarts"] == 1)
    assert engine_of(after)["pid"] == spare_of(before)["pid"]


def test_a_model_that_waits_for_its_next_try_gets_the_spare_for_it(daemon: Make, home: Path) -> None:
    d = daemon(server="--want a:latest", engine=f"--exit-loading 1 --first 3 {home}/count", **SPARE)
    d.start()
    told = d.until("ready at last", standing_by)
    assert engine_of(told)["restarts"] >= 3
    assert d.log().count("takes over from") >= 3
    assert [record["cause"] for record in d.exits()] == ["error"] * 3


def test_a_second_model_is_loaded_into_the_spare_and_both_outlive_their_engines(daemon: Make) -> None:
    d = daemon(server="--want a:latest --want b:latest", **SPARE)
    d.start()
    both = ("a:latest", "b:latest")
    before = d.until("two models", lambda s: standing_by(s) and all(engine_of(s, m)["state"] == "ready" for m in both))
    for model in both:
        os.kill(engine_of(before, model)["pid"], signal.SIGKILL)
    after = d.until(
        "two successors",
        lambda s: standing_by(s) and all(engine_of(s, m)["state"] == "ready" and engine_of(s, m)["restarts"] for m in both),
    )
    assert len({engine["slot"] for engine in after["engines"]}) == len(after["engines"])


def test_a_killed_spare_is_replaced_and_nobody_else_notices(daemon: Make) -> None:
    d = daemon(server="--want a:latest", **SPARE)
    d.start()
    before = d.until("a spare", standing_by)
    os.kill(spare_of(before)["pid"], signal.SIGKILL)
    after = d.until("another", lambda s: standing_by(s) and spare_of(s)["pid"] != spare_of(before)["pid"])
    assert engine_of(after)["pid"] == engine_of(before)["pid"]


def test_a_spare_that_dies_with_the_engine_takes_nothing_over(daemon: Make) -> None:
    """Both ends are found at once; the model is not to go to a process of which only the last words are still to be heard."""
    d = daemon(server="--want a:latest", engine="--finished 1", **SPARE)
    d.start()
    before = d.until("a spare", standing_by)
    pid = engine_of(before)["pid"]
    eventually(lambda: beaten(d, pid), "a beat", d.history)
    supervisor = before["supervisor"]["pid"]
    os.kill(supervisor, signal.SIGSTOP)
    for one in (spare_of(before)["pid"], pid):
        os.kill(one, signal.SIGABRT)
        eventually(lambda one=one: psutil.Process(one).status() == psutil.STATUS_ZOMBIE, "its end")
    os.kill(supervisor, signal.SIGCONT)
    after = d.until("others", lambda s: standing_by(s) and engine_of(s)["pid"] not in (pid, spare_of(before)["pid"]))
    assert engine_of(after)["restarts"] == 1
    assert {record["pid"]: record["model"] for record in d.exits()} == {pid: "a:latest", spare_of(before)["pid"]: None}


def test_a_model_does_not_inherit_what_became_of_earlier_spares(daemon: Make, home: Path) -> None:
    d = daemon(server="--want a:latest --slow-hello 4", engine=f"--exit 1 --first 1 {home}/count")
    d.start()
    d.until("another spare", lambda s: spare_of(s)["state"] == "blank" and spare_of(s)["restarts"] == 1)
    assert engine_of(d.ready())["restarts"] == 0


def test_while_engines_die_a_second_spare_stands_by(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--finished 1", MLXD_SUPERVISOR_WINDOW_S="8", **SPARE)
    d.start()
    pid = engine_of(d.until("a spare", standing_by))["pid"]
    eventually(lambda: beaten(d, pid), "a beat", d.history)
    os.kill(pid, signal.SIGKILL)
    d.until("two", lambda s: [spare["state"] for spare in spares_of(s)] == ["blank", "blank"])
    d.until("one, since no engine has died for a while", lambda s: len(spares_of(s)) == 1)
    assert [record["cause"] for record in d.exits()] == ["killed", "stopped"]


def test_a_spare_that_cannot_live_is_tried_ever_more_slowly(daemon: Make, home: Path) -> None:
    d = daemon(server="--want a:latest", engine=f"--exit 1 --after 1 {home}/count", **SPARE)
    d.start()
    told = d.until("its cool-down", lambda s: spare_of(s)["state"] == "cooldown")
    assert told["state"] == "ready" and len(d.exits()) == 5


def test_without_memory_for_a_spare_there_is_none(daemon: Make) -> None:
    d = daemon(server="--want a:latest", MLXD_SUPERVISOR_SPARE_BYTES=NO_SPARE)
    d.start()
    told = d.ready()
    assert len(told["engines"]) == 1
    os.kill(told["engines"][0]["pid"], signal.SIGKILL)
    after = d.until("its successor", lambda s: s["state"] == "ready" and s["engines"][0]["restarts"] == 1)
    assert len(after["engines"]) == 1 and after["engines"][0]["slot"] == 1


# --- memory that does not come back ---------------------------------------------------------------------------------------


def test_f48_after_a_kill_nothing_is_loaded_before_the_memory_is_back(daemon: Make) -> None:
    """While the supervisor is stopped, this process takes what the killed engine gives back: to the supervisor it never came back."""
    swell = 9 * GB // 4
    if psutil.virtual_memory().available < 4 * swell:
        pytest.skip("needs 10 GB of free memory")
    d = daemon(server="--want a:latest", engine=f"--finished 1 --swell {swell // 2**20}", **SPARE)
    d.start()
    before = d.until("a heavy engine", lambda s: standing_by(s) and engine_of(s)["memory_bytes"] > swell)
    time.sleep(2.5)  # two ticks: the supervisor has seen how heavy it is
    supervisor = before["supervisor"]["pid"]
    os.kill(supervisor, signal.SIGSTOP)
    hoard = take_memory(swell)
    try:
        os.kill(engine_of(before)["pid"], signal.SIGKILL)
        os.kill(supervisor, signal.SIGCONT)
        held = d.until("held", lambda s: engine_of(s)["state"] == "held")
        assert "memory not returned: 2." in held["reason"] and spare_of(held)["pid"] == spare_of(before)["pid"]
    finally:
        hoard.close()
    after = d.until("its successor", lambda s: s["state"] == "ready" and engine_of(s)["restarts"] == 1)
    assert engine_of(after)["pid"] == spare_of(before)["pid"]


# --- what the machine went down with --------------------------------------------------------------------------------------


def leave_marker(d: Daemon, **marker: Any) -> None:
    d.paths.loading.write_text(json.dumps({"a:latest": marker}))


def markers(d: Daemon) -> dict[str, Any]:
    return json.loads(d.paths.loading.read_text()) if d.paths.loading.exists() else {}


def test_a_marker_is_on_disk_before_a_load_and_gone_after_a_clean_stop(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--load-s 2")
    d.start()
    d.until("the load", lambda s: engine_of(s)["state"] == "loading")
    assert markers(d) == {"a:latest": {"boot": leftovers.boot_id(), "dirty": 0}}
    d.ready()
    assert markers(d)
    assert d.mlxd("stop").returncode == 0
    assert not markers(d)


def test_a_model_that_has_run_long_enough_has_no_marker(daemon: Make) -> None:
    d = daemon(server="--want a:latest", MLXD_SUPERVISOR_HEALTHY_S="1")
    leave_marker(d, boot="an-earlier-one", dirty=0)
    d.start()
    d.ready()
    eventually(lambda: not markers(d), "trust", d.history)


def test_an_engine_that_dies_is_no_reason_to_distrust_the_model(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    os.kill(engine_of(d.ready())["pid"], signal.SIGKILL)
    d.until("another", lambda s: s["state"] == "ready" and engine_of(s)["restarts"] == 1)
    assert markers(d)["a:latest"]["dirty"] == 0


def test_after_one_dirty_boot_the_model_is_loaded_and_watched(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    leave_marker(d, boot="an-earlier-one", dirty=0)
    d.start()
    d.ready()
    assert markers(d) == {"a:latest": {"boot": leftovers.boot_id(), "dirty": 1}}
    assert d.mlxd("stop").returncode == 0
    assert not markers(d)


def test_after_two_dirty_boots_it_waits_for_somebody_to_ask(daemon: Make, home: Path) -> None:
    (home / "models").mkdir()
    name = "mlxd-tiny:latest"
    d = daemon(server=None, MLX_MODELS_DIR=str(home / "models"), HF_HOME=str(home / "hub"))
    d.paths.loading.write_text(json.dumps({name: {"boot": "an-earlier-one", "dirty": 1}}))
    d.start()
    told = d.until("degraded", lambda s: s["state"] == "degraded")
    assert f"{name} cannot be loaded: the machine went down 2 times" in told["reason"]
    assert markers(d) == {name: {"boot": "", "dirty": 2}}
    with socket.create_connection(("127.0.0.1", told["port"]), timeout=60) as sock:
        body = b'{"model": "mlxd-tiny"}'
        sock.sendall(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        d.until("the load", lambda s: engine_of(s, name)["state"] == "ready")
    assert markers(d) == {name: {"boot": leftovers.boot_id(), "dirty": 2}}
    d.ready()


@pytest.mark.parametrize(
    "content", ['{"a:latest": 7}', *(pytest.param(text, marks=pytest.mark.full) for text in ("", "{", "[1]", "\xff"))]
)
def test_a_damaged_marker_file_is_no_reason_to_fail(daemon: Make, content: str) -> None:
    d = daemon(server="--want a:latest")
    d.paths.loading.write_bytes(content.encode("latin-1"))
    d.start()
    d.ready()
    assert markers(d)["a:latest"]["dirty"] == 0
