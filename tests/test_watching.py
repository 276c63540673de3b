"""Children that hang in every way there is, and those that only look like it. F-numbers name the fault."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from conftest import Daemon, eventually
from test_handover import shadowed
from test_spare import engine_of
from test_supervisor import HASTY, alive

Make = Callable[..., Daemon]
STILL = {"MLXD_HEALTH_STALLED_S": "2", "MLXD_HEALTH_STALLED_PREFILL_S": "4"}


def test_f12_an_engine_that_never_gives_a_token_is_never_ready(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--never-ready --say no-weights-here", MLXD_SUPERVISOR_LOAD_STALL_S="1")
    d.start()
    told = d.until("the cool-down", lambda s: engine_of(s)["state"] == "cooldown")
    assert told["state"] == "degraded" and "died (stalled)" in told["reason"]
    assert told["last_exit"]["text"] == "no-weights-here"
    assert "fake_child.py" in d.exits()[-1]["stack"]
    assert "-> ready" not in [line for line in d.log().splitlines() if "engine-1" in line]


@pytest.mark.parametrize("fault", ["--busy", "--prefilling"])
def test_f13_an_engine_that_beats_and_generates_nothing_is_replaced(daemon: Make, home: Path, fault: str) -> None:
    d = daemon(server="--want a:latest", engine=f"{fault} --first 1 {home}/count", **STILL)
    d.start()
    told = d.until("another", lambda s: s["state"] == "ready" and engine_of(s)["restarts"] == 1)
    assert told["last_exit"]["cause"] == "stalled"
    assert "fake_child.py" in d.exits()[-1]["stack"]


def test_an_engine_that_its_server_hears_nothing_from_is_replaced(daemon: Make, home: Path) -> None:
    d = daemon(server=f"--want a:latest --complain 1 --first 1 {home}/count")
    d.start()
    told = d.until("another", lambda s: s["state"] == "ready" and engine_of(s)["restarts"] == 1)
    assert told["last_exit"]["cause"] == "stalled" and d.exits()[-1]["stack"]


def test_f14_an_engine_that_holds_the_interpreter_in_native_code_is_replaced(daemon: Make, home: Path) -> None:
    d = daemon(server="--want a:latest", engine=f"--hang-gil --first 1 {home}/count", **HASTY)
    d.start()
    told = d.until("another", lambda s: s["state"] == "ready" and engine_of(s)["restarts"] == 1)
    assert told["last_exit"]["cause"] == "frozen" and told["last_exit"]["signal"] == signal.SIGTERM
    assert "hold_the_interpreter" in d.exits()[-1]["stack"]


def test_f15_an_engine_that_is_slow_but_moves_is_left_alone(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--crawl 1.5", MLXD_HEALTH_STALLED_S="4", **HASTY)
    d.start()
    pid = engine_of(d.ready())["pid"]
    d.until("a long while later", lambda s: s["supervisor"]["up_s"] > 15, within_s=120)
    assert engine_of(d.status())["pid"] == pid and not d.exits()


def test_an_engine_whose_imports_take_long_is_not_taken_for_frozen(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--slow-hello 6", **HASTY)
    d.start()
    pid = engine_of(d.ready())["pid"]
    d.until("a while later", lambda s: engine_of(s)["up_s"] > 9)
    assert engine_of(d.status())["pid"] == pid and not d.exits()


def test_f30_an_engine_hung_in_native_code_is_swept_after_its_supervisor_was_killed(daemon: Make, home: Path) -> None:
    d = daemon(server="--want a:latest", engine=f"--hang-gil --first 1 {home}/count")
    d.start()
    told = d.until("it to hang", lambda s: engine_of(s)["state"] == "ready")
    os.kill(told["supervisor"]["pid"], signal.SIGKILL)
    d.processes[0].wait(60)
    eventually(lambda: not alive(told["server"]["pid"]), "the server's end", d.history)
    assert alive(engine_of(told)["pid"])  # it cannot notice
    d.run()
    again = d.ready()
    assert not alive(engine_of(told)["pid"]) and engine_of(again)["pid"] != engine_of(told)["pid"]
    assert len([p for p in d.ours() if "fake_child" in " ".join(p.cmdline())]) == 2


def test_a_paused_machine_restarts_nobody(daemon: Make) -> None:
    """As a laptop that sleeps, or a person who stops it all: everything stands still together."""
    d = daemon(server="--want a:latest", engine="--crawl 0.5", **HASTY, **STILL)
    d.start()
    before = d.ready()
    tree = [before["supervisor"]["pid"], before["server"]["pid"], engine_of(before)["pid"]]
    for pid in tree:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(6)  # longer than every limit: the very thing under test
    for pid in reversed(tree):
        os.kill(pid, signal.SIGCONT)
    d.until("a while later", lambda s: s["supervisor"]["up_s"] > before["supervisor"]["up_s"] + 14)
    after = d.ready()
    assert [after["supervisor"]["pid"], after["server"]["pid"], engine_of(after)["pid"]] == tree and not d.exits()


def test_a_flood_of_connections_restarts_nobody(daemon: Make, home: Path) -> None:
    (home / "models").mkdir()
    d = daemon(server=None, MLX_MODELS_DIR=str(home / "models"), MLX_PRELOAD_MODELS="none-such", **HASTY)
    d.start()
    before = d.until("the server", lambda s: s["server"]["state"] == "ready")

    def knock(_: int) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", before["port"]), timeout=60) as sock:
                sock.sendall(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return sock.recv(20).startswith(b"HTTP/1.1 ")
        except ConnectionResetError:
            return True  # over our cap, and told so while it still wrote

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(knock, range(1000)))
    silent = [socket.create_connection(("127.0.0.1", before["port"]), timeout=60) for _ in range(400)]
    d.until("a while later", lambda s: s["supervisor"]["up_s"] > before["supervisor"]["up_s"] + 8)
    for sock in silent:
        sock.close()
    after = d.status()
    assert after["server"]["pid"] == before["server"]["pid"] and not d.exits()


def test_a_crash_loop_is_slowed_down_and_never_given_up(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--exit-loading 1", MLXD_SUPERVISOR_COOLDOWN_S="1")
    d.start()
    d.until("tries after the cool-down", lambda s: engine_of(s)["restarts"] >= 7)
    assert d.log().count("-> cooldown") >= 2
    assert d.status()["server"]["state"] == "ready"


# --- stopping ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "engine", ["--hang-gil", "--busy", "--ignore-term", "--load-s 60", "--fork {home}/grandchild --ignore-term"]
)
def test_a_stop_ends_whatever_hangs(daemon: Make, home: Path, engine: str) -> None:
    d = daemon(server="--want a:latest", engine=engine.format(home=home), MLXD_SUPERVISOR_TERM_S="0.5", MLXD_SUPERVISOR_KILL_S="30")
    d.start()
    d.until("the engine", lambda s: engine_of(s)["state"] in ("loading", "ready"))
    assert d.mlxd("stop").returncode == 0
    assert not d.ours()
    grandchild = home / "grandchild"
    if grandchild.exists():
        assert not alive(int(grandchild.read_text()))


def test_f41_a_grandchild_that_keeps_log_and_link_open_delays_nothing(daemon: Make, home: Path) -> None:
    d = daemon(server="--want a:latest", engine=f"--finished 1 --fork {home}/grandchild")
    d.start()
    before = engine_of(d.ready())
    grandchild = psutil.Process(int((home / "grandchild").read_text()))
    os.kill(before["pid"], signal.SIGKILL)
    d.until("another", lambda s: s["state"] == "ready" and engine_of(s)["pid"] != before["pid"])
    eventually(lambda: not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE, "its end", d.history)
    assert d.mlxd("stop").returncode == 0


#: Read by every Python of a daemon: its supervisor's KILLs reach nobody.
UNKILLABLE = """
import os, signal
if "MLXD_CHILD" not in os.environ:
    def killpg(pid, number, real=os.killpg):
        if number != signal.SIGKILL:
            real(pid, number)
    os.killpg = killpg
"""


@pytest.mark.parametrize("which", ["server", "engine"])
def test_a_stop_does_not_wait_for_what_cannot_be_killed(daemon: Make, which: str) -> None:
    faults = {"server": "--want a:latest"} | {"engine": ""}
    faults[which] += " --ignore-term"
    d = daemon(**faults, MLXD_SERVER_DRAIN_S="0", MLXD_SUPERVISOR_TERM_S="0.5", MLXD_SUPERVISOR_KILL_S="0.5")
    shadowed(d, "sitecustomize.py").write_text(UNKILLABLE)
    d.start()
    told = d.ready()
    assert d.mlxd("stop").returncode == 0
    assert f"pid {(told['server'] if which == 'server' else engine_of(told))['pid']} does not die" in d.log()


def test_a_stopped_process_group_is_ended_by_a_stop(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    told = d.ready()
    for pid in (told["server"]["pid"], engine_of(told)["pid"]):
        os.kill(pid, signal.SIGSTOP)
    assert d.mlxd("stop").returncode == 0
    assert not d.ours()
