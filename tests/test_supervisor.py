"""The supervisor with real children that misbehave on request, real signals, real files. F-numbers name the fault."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Daemon, eventually, http

from mlxd import control, paths

Make = Callable[..., Daemon]
Status = dict[str, Any]


def spawned(d: Daemon, name: str) -> int:
    """How many processes the log has seen begin in a slot."""
    return sum(1 for line in d.log().splitlines() if f"  {name}" in line and "-> starting" in line)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


# --- children that die --------------------------------------------------------------------------------------------------


def test_a_daemon_starts_its_children_and_stops_them(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    told = d.ready()
    assert told["server"]["state"] == "ready"
    assert [(e["slot"], e["model"], e["state"]) for e in told["engines"]] == [(1, "a:latest", "ready")]
    assert d.paths.pid_file.read_text() == f"{told['supervisor']['pid']}\n"
    os.kill(told["supervisor"]["pid"], signal.SIGTERM)
    assert d.processes[0].wait(60) == 0
    assert not d.paths.pid_file.exists()
    assert not d.ours()


@pytest.mark.parametrize("which", ["server", "engine"])
def test_f01_a_killed_child_is_replaced_and_the_record_says_killed(daemon: Make, which: str) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    first = d.ready()
    pid = (first["server"] if which == "server" else first["engines"][0])["pid"]
    os.kill(pid, signal.SIGKILL)
    told = d.until("a new process", lambda s: s["state"] == "ready" and s["last_exit"] and s["last_exit"]["pid"] == pid)
    new = told["server"] if which == "server" else told["engines"][0]
    assert new["pid"] != pid and new["restarts"] == 1
    last = told["last_exit"]
    assert (last["child"], last["cause"], last["signal"], last["code"]) == (which, "killed", signal.SIGKILL, None)
    assert last["model"] == (None if which == "server" else "a:latest")


@pytest.mark.parametrize(
    ("fault", "number", "cause"), [("--abort", signal.SIGABRT, "aborted"), ("--segv", signal.SIGSEGV, "segfault")]
)
def test_f02_an_aborting_engine_is_replaced_and_its_stacks_are_kept(
    daemon: Make, home: Path, fault: str, number: int, cause: str
) -> None:
    d = daemon(server="--want a:latest", engine=f"{fault} --say last-words --first 1 {home}/count")
    d.start()
    d.until("the second engine", lambda s: s["state"] == "ready" and s["engines"][0]["restarts"] == 1)
    record = d.exits()[-1]
    assert (record["cause"], record["signal"], record["child"]) == (cause, number, "engine")
    assert "last-words" in record["text"] and "Fatal Python error" in record["text"] and "fake_child.py" in record["text"]


def test_f03_an_exit_0_that_nobody_asked_for_is_a_failure_and_counts(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--exit-ready 0")
    d.start()
    told = d.until("the cool-down", lambda s: s["engines"][0]["state"] == "cooldown")
    assert spawned(d, "engine-1") == 5
    assert told["last_exit"]["code"] == 0 and told["last_exit"]["cause"] == "exited"


def test_f04_exit_78_holds_the_child_until_the_configuration_changes(daemon: Make, home: Path) -> None:
    d = daemon(server="--want a:latest", engine=f"--say no-such-setting --exit-loading 78 --first 1 {home}/count")
    d.start()
    told = d.until("held", lambda s: s["engines"][0]["state"] == "held" and s["state"] == "degraded")
    assert "no-such-setting" in told["reason"]
    assert d.mlxd("reload").stdout == "nothing changed\n"
    assert spawned(d, "engine-1") == 1
    d.paths.config.write_text("[health]\nmax_time_s = 9\n")
    told = d.until("a second try", lambda s: s["engines"][0]["state"] == "ready")
    assert spawned(d, "engine-1") == 2


def test_f05_an_engine_that_dies_while_it_loads_backs_off_and_cools_down(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--say out-of-luck --exit-loading 1")
    d.start()
    told = d.until("the cool-down", lambda s: s["engines"][0]["state"] == "cooldown")
    assert spawned(d, "engine-1") == 5
    assert told["state"] == "degraded" and "next try in" in told["reason"]
    assert told["last_exit"]["text"] == "out-of-luck"


def test_f06_ready_does_not_forgive_a_server_that_dies_on_each_first_request(daemon: Make) -> None:
    d = daemon(server="--die-on-request", MLXD_HEALTH_INTERVAL_S="3600")
    d.start()

    def ask() -> bool:
        try:
            d.get("/api/tags", 5)
        except (OSError, ValueError, IndexError, KeyError):
            pass
        return bool(d.status().get("state") == "cooldown")

    eventually(ask, "the cool-down", d.history)
    assert spawned(d, "server") == 5
    status, headers, body = d.get("/api/tags")  # and now the supervisor answers for itself
    assert status == 503 and "retry-after" in headers and "died 5 times" in json.loads(body)["error"]


def test_a_productive_engine_is_replaced_at_once_however_often_it_dies(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--finished 3", MLXD_SUPERVISOR_BACKOFF_FIRST_S="3600")
    d.start()
    for n in range(3):
        told = d.until("ready", lambda s, n=n: s["engines"][0]["state"] == "ready" and s["engines"][0]["restarts"] == n)
        pid = told["engines"][0]["pid"]
        eventually(lambda pid=pid: seen_productive(d, pid), "a beat", d.history)
        os.kill(pid, signal.SIGABRT)
    d.until("ready again", lambda s: s["engines"][0]["state"] == "ready" and s["engines"][0]["restarts"] == 3)


def seen_productive(d: Daemon, pid: int) -> bool:
    """A beat has come, a second after the process began."""
    return bool(d.status()["engines"][0]["up_s"] > 1.6)


def test_a_refused_model_is_not_tried_again_and_the_status_says_why(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--refuse config.json-is-missing")
    d.start()
    told = d.until("degraded", lambda s: s["state"] == "degraded")
    assert told["reason"] == "a:latest cannot be loaded: config.json-is-missing"
    assert told["engines"] == []
    assert spawned(d, "engine-1") == 1


@pytest.mark.parametrize("fault", ["--wrong-nonce", "--protocol 99"])
def test_a_child_that_is_not_the_one_we_started_is_held(daemon: Make, fault: str) -> None:
    d = daemon(server=fault)
    d.start()
    told = d.until("held", lambda s: s["state"] == "held")
    assert told["reason"]
    assert spawned(d, "server") == 1


def test_a_child_without_a_hello_is_killed_and_tried_again(daemon: Make, home: Path) -> None:
    d = daemon(server=f"--no-hello --first 1 {home}/count", MLXD_SUPERVISOR_HELLO_S="1")
    d.start()
    d.until("ready", lambda s: s["server"]["state"] == "ready")
    assert d.exits()[-1]["cause"] == "no hello"


def test_a_child_that_babbles_on_its_link_is_replaced(daemon: Make, home: Path) -> None:
    d = daemon(engine=f"--babble --first 1 {home}/count")
    d.start()
    d.until("a second engine", lambda s: s["engines"][0]["restarts"] == 1 and s["engines"][0]["state"] == "blank")
    assert d.exits()[-1]["cause"] == "link closed"


def test_a_program_that_is_missing_is_held_with_its_name(daemon: Make) -> None:
    d = daemon(server=None, MLXD_SERVER_COMMAND="/nonexistent/python -m server")
    d.start()
    told = d.until("held", lambda s: s["state"] == "held")
    assert "cannot start /nonexistent/python: No such file or directory" in told["reason"]


def test_what_a_child_forked_is_swept_up_with_it(daemon: Make, home: Path) -> None:
    d = daemon(engine=f"--fork {home}/grandchild")
    d.start()
    told = d.until("blank", lambda s: s["engines"][0]["state"] == "blank")
    grandchild = int((home / "grandchild").read_text())
    os.kill(told["engines"][0]["pid"], signal.SIGKILL)
    eventually(lambda: not alive(grandchild), "the grandchild's end", d.history)


def test_a_child_killed_by_a_signal_without_a_name_is_replaced(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    told = d.ready()
    number = signal.SIGRTMIN + 5 if sys.platform == "linux" else signal.SIGUSR2
    os.kill(told["engines"][0]["pid"], number)
    told = d.until("a new engine", lambda s: s["state"] == "ready" and s["engines"][0]["restarts"] == 1)
    assert (told["last_exit"]["cause"], told["last_exit"]["signal"]) == ("signal", number)


def test_without_its_log_directory_a_child_is_still_replaced(daemon: Make) -> None:
    d = daemon()
    d.start()
    told = d.until("ready", lambda s: s["server"]["state"] == "ready")
    shutil.rmtree(d.paths.logs)
    os.kill(told["server"]["pid"], signal.SIGKILL)
    d.until("a new server", lambda s: s["server"]["state"] == "ready" and s["server"]["pid"] != told["server"]["pid"])


def test_a_child_that_outlives_kill_is_held_and_replaced_once_it_is_gone(daemon: Make) -> None:
    # KILL takes some milliseconds; a patience of none makes every process one that outlives it.
    d = daemon(server="--want a:latest", engine="--ignore-term", MLXD_SUPERVISOR_TERM_S="0.2", MLXD_SUPERVISOR_KILL_S="0")
    d.start()
    pid = d.ready()["engines"][0]["pid"]
    d.paths.config.write_text("[engine]\ntext_s = 3\n")
    d.until("another engine", lambda s: s["state"] == "ready" and s["engines"][0]["pid"] != pid)
    assert not alive(pid)
    assert "-> unkillable" in d.log()


# --- children that hang -------------------------------------------------------------------------------------------------

HASTY = {"MLXD_HEALTH_INTERVAL_S": "1", "MLXD_HEALTH_MAX_TIME_S": "1", "MLXD_HEALTH_SUSPECT_S": "2", "MLXD_HEALTH_FROZEN_S": "4"}


@pytest.mark.parametrize("which", ["server", "engine"])
def test_f11_a_stopped_child_is_found_by_its_silence_and_replaced(daemon: Make, which: str) -> None:
    d = daemon(server="--want a:latest", **HASTY)
    d.start()
    first = d.ready()
    pid = (first["server"] if which == "server" else first["engines"][0])["pid"]
    os.kill(pid, signal.SIGSTOP)
    told = d.until("a new one", lambda s: s["state"] == "ready" and s["last_exit"] and s["last_exit"]["pid"] == pid)
    assert told["last_exit"]["cause"] in ("paused", "unresponsive")
    assert not alive(pid)


def test_a_server_that_is_mute_but_beats_is_saturated_not_dead(daemon: Make) -> None:
    d = daemon(server="--mute", MLXD_HEALTH_INTERVAL_S="0.1", MLXD_HEALTH_MAX_TIME_S="0.5")
    d.start()
    pid = d.until("ready", lambda s: s["server"]["state"] == "ready")["server"]["pid"]
    eventually(lambda: d.log().count("got no answer of ours") >= 5, "five missed polls", d.history)
    assert d.status()["server"]["pid"] == pid


def test_a_mute_server_whose_loop_hardly_turns_is_sick_and_replaced(daemon: Make, home: Path) -> None:
    quick = {"MLXD_HEALTH_INTERVAL_S": "0.1", "MLXD_HEALTH_MAX_TIME_S": "0.5"}
    d = daemon(server=f"--mute --lag --first 1 {home}/count", **quick)
    d.start()
    d.until("a second server", lambda s: s["server"]["state"] == "ready" and s["server"]["restarts"] == 1)
    assert d.exits()[-1]["cause"] == "unresponsive"


def test_a_stopped_supervisor_that_goes_on_kills_nobody(daemon: Make) -> None:
    d = daemon(server="--want a:latest", **HASTY)
    d.start()
    before = d.ready()
    supervisor = before["supervisor"]["pid"]
    os.kill(supervisor, signal.SIGSTOP)
    time.sleep(6)  # longer than the limit for a frozen child: the very thing under test
    os.kill(supervisor, signal.SIGCONT)
    eventually(lambda: "every deadline begins anew" in d.log(), "the gap noticed", d.history)
    d.until("a while later", lambda s: s["supervisor"]["up_s"] > before["supervisor"]["up_s"] + 9)
    after = d.ready()
    assert after["server"]["pid"] == before["server"]["pid"] and after["engines"][0]["pid"] == before["engines"][0]["pid"]


# --- the port -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_f22_a_stranger_on_the_port_is_named_and_left_alone(daemon: Make, family: int, host: str) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", STRANGER, str(int(family)), host], stdout=subprocess.PIPE, text=True)
    assert stranger.stdout is not None
    port = int(stranger.stdout.readline())
    d = daemon(MLX_API_PORT=str(port))
    try:
        ran = d.mlxd("start")
        assert ran.returncode == 75, ran.stderr
        told = d.status()
        assert told["state"] == "held"
        assert f"port {port} is held by pid {stranger.pid} (python" in told["reason"] and told["reason"] in ran.stdout
        assert d.mlxd("status").returncode == 4
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.communicate()
    d.ready()


STRANGER = """
import socket, sys, time
s = socket.socket(int(sys.argv[1])); s.bind((sys.argv[2], 0)); s.listen(); print(s.getsockname()[1], flush=True); time.sleep(600)
"""


def test_no_connection_is_refused_while_servers_are_killed(daemon: Make) -> None:
    d = daemon(server="--finished 1")
    d.start()
    port = d.until("ready", lambda s: s["server"]["state"] == "ready")["port"]
    stop, refused, answered = False, [], []

    def client() -> None:
        while not stop:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
                    sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    answered.append(sock.recv(100)[9:12])
            except ConnectionRefusedError as error:
                refused.append(error)
            except ConnectionResetError:  # it was inside the server that was killed
                pass

    with ThreadPoolExecutor(20) as pool:
        clients = [pool.submit(client) for _ in range(20)]
        for n in range(5):
            told = d.until("ready", lambda s, n=n: s["server"]["state"] == "ready" and s["server"]["restarts"] == n)
            seen = len(answered)
            eventually(lambda seen=seen: len(answered) > seen + 20, "answers", d.history)
            os.kill(told["server"]["pid"], signal.SIGKILL)
        d.until("ready", lambda s: s["server"]["state"] == "ready" and s["server"]["restarts"] == 5)
        stop = True
        for one in clients:
            one.result()
    assert not refused
    assert set(answered) <= {b"200", b"503", b""}


def test_without_a_server_the_supervisor_answers_in_each_dialect(daemon: Make) -> None:
    d = daemon(server="--never-ready")
    told = d.start()
    d.until("loading", lambda s: s["server"]["state"] == "loading")
    port = told["port"]
    eventually(lambda: d.status()["moved_s"] > 0.5, "the takeover", d.history)
    big = b"x" * 300_000
    for path, look in [
        ("/api/chat", lambda b: b["error"]),
        ("/v1/chat/completions", lambda b: b["error"]["message"]),
        ("/v1/messages", lambda b: b["error"]["message"]),
        ("/health", lambda b: b["nonce"] and b["status"] == "loading" and b["reason"]),
    ]:
        request = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(big)}\r\n\r\n".encode() + big
        status, headers, body = http(port, request)
        assert status == 503 and headers["retry-after"] == "2"
        assert "starting" in look(json.loads(body)) or path == "/health"
    assert http(port, b"HEAD / HTTP/1.0\r\n\r\n")[2] == b""
    rebound = http(port, b"GET /health HTTP/1.1\r\nHost: evil.example:80\r\n\r\n")
    assert rebound[0] == 503 and json.loads(rebound[2]) == {"error": "the server is starting"}
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]  # more than are answered at once
    assert d.status()["state"] == "starting"
    for one in silent[:100]:
        one.close()
    assert http(port, b"GET / HTTP/1.0\r\n\r\n", host="::1")[0] == 503
    for one in silent:
        one.close()


# --- files of ours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"999999\n", b"garbage", b"", b"-1\n", b"1\n"])
def test_f24_a_stale_pid_file_is_replaced_and_its_number_never_signalled(daemon: Make, home: Path, content: bytes) -> None:
    (home / "mlxd.pid").write_bytes(content)
    d = daemon()
    told = d.start()
    assert d.paths.pid_file.read_text() == f"{told['supervisor']['pid']}\n"


def test_a_pid_file_that_names_a_foreign_process_leaves_it_alone(daemon: Make, home: Path) -> None:
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        (home / "mlxd.pid").write_text(f"{stranger.pid}\n")
        state = {"boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip() if sys.platform == "linux" else ""}
        child = {"pid": stranger.pid, "identity": 1.0, "nonce": "x", "name": "server"}
        (home / "state.json").write_text(json.dumps(state | {"children": [child]}))
        d = daemon()
        assert d.mlxd("status").returncode == 3
        assert d.mlxd("stop").returncode == 0
        d.start()
        d.ready()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_f26_a_pid_file_that_is_damaged_while_running_is_put_back(daemon: Make, home: Path) -> None:
    d = daemon()
    d.start()
    right = f"{d.ready()['supervisor']['pid']}\n"
    victim = home / "victim"
    victim.write_text("untouched")

    def damage(how: Callable[[Path], object]) -> None:
        how(d.paths.pid_file)
        eventually(lambda: paths.read_small(d.paths.pid_file) == right.encode(), "the PID file put back", d.history)
        assert d.mlxd("status").returncode == 0

    damage(lambda f: f.unlink())
    damage(lambda f: f.write_text(""))
    damage(lambda f: f.write_text("garbage"))
    damage(lambda f: f.write_bytes(b"9" * 10_000_000))
    damage(lambda f: (f.unlink(), f.symlink_to(victim)))
    assert victim.read_text() == "untouched"
    assert d.mlxd("stop").returncode == 0


def test_f55_a_control_socket_that_was_removed_is_put_back(daemon: Make) -> None:
    d = daemon()
    d.start()
    pid = d.ready()["supervisor"]["pid"]
    d.paths.control.unlink()
    assert not d.status()
    assert d.until("an answer", lambda s: s["supervisor"])["supervisor"]["pid"] == pid
    assert d.mlxd("stop").returncode == 0


def test_f27_without_its_lock_file_a_second_start_is_still_refused(daemon: Make) -> None:
    d = daemon()
    told = d.start()
    d.paths.lock.unlink()
    second = d.run()
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0 and err.decode() == f"already running, pid {told['supervisor']['pid']}\n"
    eventually(d.paths.lock.exists, "the lock file put back", d.history)
    assert "the lock file was removed" in d.log()


@pytest.mark.parametrize("count", [8, pytest.param(20, marks=pytest.mark.full)])
def test_f28_of_many_supervisors_at_once_exactly_one_wins(daemon: Make, count: int) -> None:
    d = daemon()
    many = [d.run() for _ in range(count)]
    d.ready()
    eventually(lambda: sum(p.poll() is not None for p in many) == count - 1, "the ends of all others", d.history)
    winner = next(p for p in many if p.poll() is None)
    assert winner.pid == d.status()["supervisor"]["pid"]
    for loser in many:
        if loser is not winner:
            assert loser.returncode == 0 and b"already running" in loser.communicate()[1]


@pytest.mark.parametrize("fault", ["", "--ignore-term"])
def test_f29_a_killed_supervisor_leaves_nothing_and_the_next_start_is_clean(daemon: Make, fault: str) -> None:
    d = daemon(server=f"--want a:latest {fault}", engine=fault)
    d.start()
    told = d.ready()
    pids = [told["server"]["pid"], told["engines"][0]["pid"]]
    os.kill(told["supervisor"]["pid"], signal.SIGKILL)
    d.processes[0].wait(60)
    eventually(lambda: not any(alive(pid) for pid in pids), "the children's end", d.history)
    d.run()
    again = d.until("ready", lambda s: s["state"] == "ready")
    assert again["port"] and again["supervisor"]["pid"] != told["supervisor"]["pid"]


def test_what_a_killed_supervisor_left_hanging_is_swept_by_the_next(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    told = d.ready()
    pids = [told["server"]["pid"], told["engines"][0]["pid"]]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # deaf: neither link nor TERM reaches them
    os.kill(told["supervisor"]["pid"], signal.SIGKILL)
    d.processes[0].wait(60)
    d.run()
    d.until("ready", lambda s: s["state"] == "ready")
    assert not any(alive(pid) for pid in pids)
    assert "of an earlier run is ended by SIGTERM" in d.log()


def test_a_damaged_state_file_is_kept_aside_and_no_reason_to_fail(daemon: Make, home: Path) -> None:
    (home / "state.json").write_text('{"boot": "x", "chil')
    d = daemon()
    d.start()
    d.ready()
    assert (home / "state.json.bad").exists()


def test_f54_a_state_directory_that_is_a_link_or_a_file_or_read_only_is_exit_78(daemon: Make, home: Path) -> None:
    (home / "real").mkdir()
    (home / "link").symlink_to(home / "real")
    (home / "file").write_text("")
    for name, sentence in [
        ("link", "is a symbolic link"),
        ("file", "is not a directory"),
        ("file/below", "not a directory"),
    ]:
        for command in ("start", "run"):
            d = Daemon(home / name)
            ran = d.mlxd(command)
            assert ran.returncode == 78, (name, command, ran)
            assert ran.stderr.startswith("Error: ") and sentence in ran.stderr and ran.stderr.count("\n") == 1


def test_f54_an_unwritable_state_directory_is_exit_78(home: Path) -> None:
    (home / "locked").mkdir(mode=0o500)
    if os.getuid() == 0:  # root may write anywhere but on a read-only mount
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(home / "locked")], capture_output=True, check=False)
        if made.returncode:
            pytest.skip("root without the right to mount: an unwritable directory cannot be made here")
    try:
        ran = Daemon(home / "locked").mlxd("start")
        assert ran.returncode == 78 and ran.stderr.startswith("Error: cannot") and "MLXD_HOME" in ran.stderr
    finally:
        if os.getuid() == 0:
            subprocess.run(["umount", str(home / "locked")], check=True)


def test_a_home_whose_sockets_would_not_fit_gets_a_short_directory_and_says_where(home: Path) -> None:
    long = home / ("x" * 90)
    d = Daemon(long, MLXD_SERVER_COMMAND=f"{sys.executable} {Path(__file__).parent / 'fake_child.py'}")
    try:
        told = d.start()
        assert not told["control"].startswith(str(long)) and Path(told["control"]).parent.stat().st_mode & 0o777 == 0o700
    finally:
        d.close()


# --- signals ------------------------------------------------------------------------------------------------------------


def test_f35_a_storm_of_terms_is_one_stop(daemon: Make) -> None:
    d = daemon(
        server="--want a:latest --ignore-term", engine="--ignore-term", MLXD_SUPERVISOR_TERM_S="3600", MLXD_SERVER_DRAIN_S="3600"
    )
    d.start()
    pid = d.ready()["supervisor"]["pid"]
    for _ in range(200):
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            break
        time.sleep(0.002)
    assert d.processes[0].wait(60) == 0
    assert d.log().count("stopping: SIGTERM") == 1


def test_a_supervisor_tells_its_stacks_when_asked_and_goes_on(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    pid = d.ready()["supervisor"]["pid"]
    os.kill(pid, signal.SIGUSR1)
    eventually(lambda: "supervisor.py" in d.log() and "most recent call first" in d.log(), "the stacks in the log", d.history)
    assert d.ready()["supervisor"]["pid"] == pid


def test_a_second_term_skips_the_drain(daemon: Make) -> None:
    d = daemon(server="--want a:latest --ignore-term", MLXD_SERVER_DRAIN_S="3600")
    d.start()
    pid = d.ready()["supervisor"]["pid"]
    os.kill(pid, signal.SIGTERM)
    d.until("draining", lambda s: s["state"] == "draining" and s["server"]["state"] == "draining")
    os.kill(pid, signal.SIGTERM)
    assert d.processes[0].wait(60) == 0
    assert [r["signal"] for r in d.exits() if r["child"] == "server"] == [signal.SIGKILL]  # it ignored TERM


@pytest.mark.parametrize("count", [1, 100])
def test_f36_a_hangup_reloads_and_ends_nothing(daemon: Make, count: int) -> None:
    d = daemon()
    d.start()
    before = d.ready()
    d.paths.config.write_text("[health]\nmax_time_s = 3\n")
    for _ in range(count):
        os.kill(before["supervisor"]["pid"], signal.SIGHUP)
    eventually(lambda: "the configuration changed: health.max_time_s" in d.log(), "the reload", d.history)
    after = d.ready()
    assert d.log().count("the configuration changed") == 1
    assert after["server"]["pid"] == before["server"]["pid"] and after["supervisor"]["pid"] == before["supervisor"]["pid"]


def test_f38_control_c_in_a_terminal_is_an_ordered_stop_and_reaches_no_child(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxd", "run"], env=d.environ, stdin=side, stdout=side, stderr=side, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(side)
    try:
        d.ready()
        os.write(main, b"\x03")
        assert process.wait(60) == 0
    finally:
        os.close(main)
    assert {r["signal"] for r in d.exits()} == {None} and {r["cause"] for r in d.exits()} == {"stopped"}


def test_f39_a_child_that_ignores_term_is_killed(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--ignore-term", MLXD_SUPERVISOR_TERM_S="0.5")
    d.start()
    pid = d.ready()["engines"][0]["pid"]
    assert d.mlxd("stop").returncode == 0
    assert not alive(pid)
    assert [r["signal"] for r in d.exits() if r["child"] == "engine"] == [signal.SIGKILL]


# --- configuration and wishes -------------------------------------------------------------------------------------------


def test_f57_an_invalid_configuration_is_refused_and_the_old_one_stays(daemon: Make) -> None:
    d = daemon()
    d.paths.config.write_text("[health]\nmax_time_s = 9\n")
    d.start()
    before = d.ready()
    for text, sentence in [
        ("[health]\nmax_time_s = = 3\n", "line 2, column 14"),
        ("[health]\nmax_tim_s = 3\n", "unknown setting health.max_tim_s; did you mean health.max_time_s?"),
        ("[heath]\n", "unknown section [heath]; did you mean health?"),
        ("[health]\nmax_time_s = 'x'\n", "health.max_time_s"),
        ("[health]\nmax_time_s = -1\n", "health.max_time_s"),
    ]:
        d.paths.config.write_text(text)
        ran = d.mlxd("reload")
        assert ran.returncode == 78 and sentence in ran.stderr and ran.stderr.startswith("Error: "), ran
        told = d.until("degraded", lambda s: s["state"] == "degraded")
        assert sentence in told["reason"] and told["server"]["pid"] == before["server"]["pid"]
    d.paths.config.unlink()  # vanished: the defaults
    d.until("ready again", lambda s: s["state"] == "ready")


def test_a_configuration_that_is_invalid_at_start_is_exit_78(daemon: Make) -> None:
    for command in ("start", "run"):
        for settings, sentence in [
            ({"MLX_API_PORT": "abc"}, "MLX_API_PORT must be a number, not 'abc'"),
            ({"MLX_API_PORT": "70000"}, "MLX_API_PORT"),
            ({"MLX_MAX_CONCURRENT": "-3"}, "MLX_MAX_CONCURRENT"),
        ]:
            d = daemon(**settings)
            ran = d.mlxd(command)
            assert ran.returncode == 78 and sentence in ran.stderr and ran.stderr.count("\n") == 1
            assert d.mlxd("status").returncode == 3


def test_a_restart_moves_to_another_port_or_stays_where_it_was(daemon: Make) -> None:
    d = daemon()
    del d.environ["MLX_API_PORT"]
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        here, there = first.getsockname()[1], second.getsockname()[1]
        first.close()
        d.paths.config.write_text(f"[server]\nport = {here}\n")
        d.start()
        d.ready()
        d.paths.config.write_text(f"[server]\nport = {there}\n")
        ran = d.mlxd("restart")
        assert ran.returncode == 75 and f"port {there} is held by pid {os.getpid()}" in ran.stderr
        assert d.status()["port"] == here and d.get("/health")[0] == 200
    assert d.mlxd("restart").returncode == 0
    assert d.status()["port"] == there and d.get("/health")[0] == 200


def test_two_restarts_in_a_row_end_at_the_newest_port(daemon: Make) -> None:
    d = daemon()
    del d.environ["MLX_API_PORT"]
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        here, there = first.getsockname()[1], second.getsockname()[1]
    d.paths.config.write_text(f"[server]\nport = {here}\n")
    d.start()
    d.ready()
    control.ask(d.paths.control, "restart")
    d.paths.config.write_text(f"[server]\nport = {there}\n")
    assert d.mlxd("restart").returncode == 0
    assert d.status()["port"] == there and d.get("/health")[0] == 200


def test_a_restart_to_a_server_that_cannot_start_keeps_the_old_one_and_says_so(daemon: Make, home: Path) -> None:
    d = daemon(server=f"--want a:latest --exit-at-once 1 --after 1 {home}/count")
    d.start()
    before = d.ready()
    ran = d.mlxd("restart", "--json")
    told = json.loads(ran.stdout)
    assert told["state"] == "degraded" and "the new server cannot start, the old one goes on" in told["reason"]
    assert d.get("/health")[0] == 200
    assert alive(before["server"]["pid"])


def test_a_restart_ends_a_cooldown(daemon: Make, home: Path) -> None:
    d = daemon(server="--want a:latest", engine=f"--exit-loading 1 --first 5 {home}/count")
    d.start()
    d.until("the cool-down", lambda s: s["engines"][0]["state"] == "cooldown")
    assert d.mlxd("restart").returncode == 0
    d.ready()


@pytest.mark.parametrize(
    ("during", "server", "engine"),
    [
        ("backoff", "--want a:latest", "--exit-loading 1"),
        ("loading", "--want a:latest", "--load-s 3600"),
        ("cooldown", "--want a:latest", "--exit-loading 1"),
        ("held", "--want a:latest", "--exit 78"),
    ],
)
def test_f58_a_stop_wins_over_whatever_is_under_way(daemon: Make, during: str, server: str, engine: str) -> None:
    slow = {"MLXD_SUPERVISOR_BACKOFF_FIRST_S": "3600", "MLXD_SUPERVISOR_BACKOFF_MOST_S": "3600"} if during == "backoff" else {}
    d = daemon(server=server, engine=engine, **slow)
    d.start()
    d.until(during, lambda s: s["engines"][0]["state"] == during)
    count = spawned(d, "engine-1")
    ran = d.mlxd("stop")
    assert ran.returncode == 0 and ran.stdout.startswith("stopped  pid ")
    assert spawned(d, "engine-1") == count
    assert d.mlxd("status").returncode == 3


def test_f58_a_start_during_a_stop_waits_for_its_end_and_starts(daemon: Make) -> None:
    d = daemon(server="--ignore-term", MLXD_SERVER_DRAIN_S="0.5")
    d.start()
    first = d.ready()
    stopping = subprocess.Popen([sys.executable, "-m", "mlxd", "stop"], env=d.environ, stdout=subprocess.DEVNULL)
    d.until("draining", lambda s: s["state"] == "draining")
    ran = d.mlxd("start", "--json")
    assert stopping.wait(60) == 0
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["supervisor"]["pid"] != first["supervisor"]["pid"]


def test_the_log_of_a_child_is_kept_under_its_limit(daemon: Make) -> None:
    d = daemon(server="--want a:latest", MLXD_SUPERVISOR_LOG_BYTES="65536", MLXD_SUPERVISOR_LOG_KEEP_BYTES="1000")
    d.start()
    d.ready()
    with open(d.paths.log("engine-1"), "ab") as log:
        log.write(b"x" * 100_000 + b"the end\n")
    eventually(lambda: d.paths.log("engine-1").stat().st_size <= 65536, "the log cut", d.history)
    assert d.log("engine-1").endswith("the end\n")
