"""Faults of the machine around a daemon: no room, no descriptors, no processes, clocks that jump, and what is left behind. Real ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import HERE, Daemon, eventually, http
from known_answers import KNOWN
from neighbours import Answering
from test_handover import shadowed
from test_mlxd import chat, real
from test_spare import engine_of
from test_supervisor import HASTY, alive, spawned

from mlxd import control, leftovers, monitor, paths
from mlxd.errors import MlxdError
from mlxd.models import BUILTIN

__all__ = ["real"]  # a fixture

Make = Callable[..., Daemon]
Status = dict[str, Any]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux's means to make this fault")
IMPATIENT = {"MLXD_HEALTH_INTERVAL_S": "0.1", "MLXD_HEALTH_MAX_TIME_S": "0.5"}


def limited(what: str) -> list[str]:
    """A command before `mlxd run` that sets a limit as ulimit knows it."""
    return ["sh", "-c", f'ulimit {what}; exec "$0" "$@"']


# --- programs that do not start --------------------------------------------------------------------------------------------------------


def test_a_program_that_cannot_be_run_is_held_with_the_reason_until_the_configuration_changes(daemon: Make, home: Path) -> None:
    d = daemon(server=None)
    cases = [
        ("#!/bin/sh\nexit 0\n", 0o600, "Permission denied"),
        ("#!/no/such/interpreter\n", 0o700, "the interpreter that its first line names is missing"),
        ("\0\1\2", 0o700, "Exec format error"),
        (None, 0o700, "Permission denied"),
    ]
    for number, (text, mode, sentence) in enumerate(cases, 1):
        program = home / f"program-{number}"
        program.mkdir() if text is None else program.write_text(text)
        program.chmod(mode)
        d.paths.config.write_text(f'[server]\ncommand = ["{program}"]\n')
        if d.processes:
            control.ask(d.paths.control, "reload")
        else:
            d.start()
        reason = f"cannot start {program}: {sentence}"
        d.until(reason, lambda s, reason=reason: (s["state"], s["reason"]) == ("held", reason))
        assert spawned(d, "server") == number


def test_a_program_that_comes_back_is_started(daemon: Make, home: Path) -> None:
    """As an upgrade takes it away for a while."""
    program = home / "python"
    d = daemon(server=None)
    d.environ["MLXD_SERVER_COMMAND"] = f"{program} {HERE / 'fake_child.py'}"
    d.start()
    d.until("held", lambda s: s["state"] == "held" and f"cannot start {program}" in s["reason"])
    program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program.chmod(0o700)
    d.ready()


def other_user() -> list[str]:
    """A command that runs another as somebody whose processes are counted: nobody counts root's."""
    if os.getuid():
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root without setpriv: the number of root's processes is not limited")
    return [*["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]]


@LINUX
def test_while_the_system_has_no_room_for_a_process_it_is_tried_each_second(daemon: Make, home: Path) -> None:
    d = daemon(server="--finished 1", MLXD_SUPERVISOR_DEATHS="2")
    through = other_user()
    if through:
        os.chown(home, 65534, -1)
    d.run(*through)
    before = d.until("the server", lambda s: s["server"]["state"] == "ready" and s["engines"][0]["state"] == "blank")
    limit = [*through, "prlimit", "--pid", str(before["supervisor"]["pid"])]
    subprocess.run([*limit, "--nproc=1:"], check=True)
    os.kill(before["server"]["pid"], signal.SIGKILL)
    eventually(lambda: d.log().count("-> backoff (failed)") > 3, "three tries", d.history)
    assert d.mlxd("status").returncode == 4
    assert [(r["cause"], "Resource temporarily unavailable" in r["text"]) for r in d.exits()] == [
        ("killed", False),
        ("spawn", True),
    ]
    subprocess.run([*limit, "--nproc=20000:"], check=True)
    d.until("a server", lambda s: s["server"]["state"] == "ready")


def test_a_program_that_hangs_before_it_becomes_a_child_is_killed_and_tried_again(daemon: Make, home: Path) -> None:
    wrapper = home / "wrapper"
    wrapper.write_text(f'#!/bin/sh\ntest -e {home}/tried || {{ touch {home}/tried; sleep 600; }}\nexec "$@"\n')
    wrapper.chmod(0o700)
    fake = f"{sys.executable} {HERE / 'fake_child.py'}"
    d = daemon(server=None, MLXD_SERVER_COMMAND=f"{wrapper} {fake}", MLXD_SUPERVISOR_HELLO_S="1")
    d.start()
    d.until("ready", lambda s: s["server"]["state"] == "ready")
    assert d.exits()[-1]["cause"] == "no hello"


# --- /health -----------------------------------------------------------------------------------------------------------------------------


def test_a_flapping_server_is_replaced_once_and_its_successor_is_shown_as_degraded(daemon: Make) -> None:
    d = daemon(server="--flap --lag", **IMPATIENT)
    d.start()
    second = d.until("a second server", lambda s: s["server"]["state"] == "ready" and s["server"]["restarts"] == 1)
    assert d.exits()[-1]["cause"] == "unresponsive"
    polls = d.log().count("got no answer of ours")
    eventually(lambda: d.log().count("got no answer of ours") > polls + 2, "more polls in vain", d.history)
    told = d.until("the word for it", lambda s: s["state"] == "degraded" and "of the last" in s["reason"])
    assert told["server"]["pid"] == second["server"]["pid"] and told["reason"].endswith("had no answer of this mlxd (missing)")


def test_a_health_that_drips_is_given_up_and_never_asked_twice_at_a_time(daemon: Make, home: Path) -> None:
    d = daemon(server=f"--drip {home}/drips", MLXD_HEALTH_INTERVAL_S="0.1", MLXD_HEALTH_MAX_TIME_S="1.2")
    d.start()
    eventually(lambda: d.log().count("got no answer of ours (missing)") >= 2, "two polls in vain", d.history)
    assert set((home / "drips").read_text().split()) == {"1"}


def test_a_stranger_that_answers_at_our_address_is_told_of_and_left_alone(daemon: Make) -> None:
    d = daemon(server="--stranger", **IMPATIENT)
    d.start()
    told = d.until("the word for it", lambda s: s["state"] == "degraded" and "(stranger)" in s["reason"])
    assert f"polls of {told['url']}/health had no answer of this mlxd" in told["reason"]
    assert not d.exits()


def poll(port: int, limit_s: float = 60.0) -> monitor.Answer:
    return asyncio.run(monitor.poll("127.0.0.1", port, "n1", limit_s))


def answered(body: bytes, head: bytes = b"200 OK\r\n") -> Callable[[], Iterator[bytes]]:
    return lambda: iter([b"HTTP/1.1 " + head + b"\r\n" + body])


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (b'{"nonce": "n1"}', monitor.Answer.OURS),
        (b'{"nonce": "n2"}', monitor.Answer.STRANGER),
        (b'{"nonce": ', monitor.Answer.STRANGER),
        (b'["nonce"]', monitor.Answer.STRANGER),
        (b"[" * 60_000, monitor.Answer.STRANGER),
        (b"\xff\xfe", monitor.Answer.STRANGER),
        (b"", monitor.Answer.STRANGER),
    ],
)
def test_only_a_body_with_our_nonce_is_an_answer(body: bytes, answer: monitor.Answer) -> None:
    with Answering(answered(body)) as server:
        assert poll(server.port) is answer


def test_what_is_no_http_or_nothing_is_no_answer() -> None:
    for said, answer in ((b"", monitor.Answer.MISSING), (b"SSH-2.0-OpenSSH\r\n", monitor.Answer.STRANGER)):
        with Answering(lambda said=said: iter([said])) as server:  # type: ignore[misc]
            assert poll(server.port) is answer
    assert poll(server.port) is monitor.Answer.MISSING  # nobody listens any more


def test_a_redirect_is_not_followed() -> None:
    with Answering(answered(b'{"nonce": "n1"}')) as there:
        head = b"302 Found\r\nLocation: http://127.0.0.1:%d/health\r\n" % there.port
        with Answering(answered(b"", head)) as here:
            assert poll(here.port) is monitor.Answer.STRANGER
            assert (here.asked, there.asked) == (1, 0)


def test_a_body_without_end_is_read_to_its_limit_only() -> None:
    def endless() -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\n\r\n"
        for _ in range(1024):
            yield b" " * 2**20

    with Answering(endless) as server:
        assert poll(server.port) is monitor.Answer.STRANGER
    assert server.sent < 64 * 2**20  # the rest lay in the kernel's buffers


def test_a_body_that_stops_in_the_middle_is_given_up() -> None:
    ended = threading.Event()

    def hanging() -> Iterator[bytes]:
        yield b'HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n{"nonce"'
        ended.wait(60)

    with Answering(hanging) as server:
        assert poll(server.port, limit_s=0.3) is monitor.Answer.MISSING
        ended.set()


# --- loads -------------------------------------------------------------------------------------------------------------------------------


def test_a_load_that_takes_long_and_moves_is_left_alone(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--load-s 4", MLXD_SUPERVISOR_LOAD_STALL_S="2")
    d.start()
    d.ready()
    assert not d.exits()


# --- ports and numbers that somebody else had before -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_a_port_that_waits_for_its_last_packets_is_taken_at_once(daemon: Make) -> None:
    port = free_port()
    d = daemon(MLX_API_PORT=str(port))
    d.start()
    told = d.until("ready", lambda s: s["server"]["state"] == "ready")
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    for sock in held:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert sock.recv(65536)
    for pid in (told["supervisor"]["pid"], told["server"]["pid"]):
        os.kill(pid, signal.SIGKILL)
    d.processes[0].wait(60)
    for sock in held:
        sock.close()
    if sys.platform == "linux":
        waiting = [c for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port]
        assert psutil.CONN_TIME_WAIT in {c.status for c in waiting}
    d.run()
    again = d.until("ready", lambda s: s["server"]["state"] == "ready")
    assert again["port"] == port and "is held by" not in d.log()


#: Inside a PID namespace: a supervisor and its children are killed, and their very numbers given to processes of somebody else.
REUSE = """
import json, os, pathlib, signal, subprocess, sys
from conftest import Daemon, eventually
from test_supervisor import alive

d = Daemon(pathlib.Path(sys.argv[1]), **json.loads(sys.argv[2]))
d.start()
told = d.ready()
numbers = sorted([told["supervisor"]["pid"], told["server"]["pid"], told["engines"][0]["pid"]])
for number in (told["supervisor"]["pid"], *numbers):
    try:
        os.kill(number, signal.SIGKILL)
    except ProcessLookupError:
        pass
d.processes[0].wait()
eventually(lambda: not any(os.path.exists(f"/proc/{number}") for number in numbers), "the end of all")
strangers = []
for number in numbers:
    pathlib.Path("/proc/sys/kernel/ns_last_pid").write_text(str(number - 1))
    strangers.append(subprocess.Popen(["sleep", "600"], start_new_session=True))
assert [stranger.pid for stranger in strangers] == numbers, ([stranger.pid for stranger in strangers], numbers)
assert d.paths.pid_file.read_text() and [c["pid"] for c in json.loads(d.paths.state.read_text())["children"]]
assert d.mlxd("status").returncode == 3
assert d.mlxd("stop").returncode == 0
d.run()
d.ready()
assert all(stranger.poll() is None for stranger in strangers)
for stranger in strangers:
    stranger.kill()
    stranger.wait()
d.close()
print("done")
"""


@LINUX
def test_numbers_that_were_given_to_other_processes_are_never_signalled(daemon: Make, home: Path) -> None:
    namespace = ["unshare", "-Urpf", "--mount-proc"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user and PID namespaces here: a number cannot be given twice")
    d = daemon(server="--want a:latest")
    settings = {name: value for name, value in d.environ.items() if name.startswith("MLX")}
    environ = os.environ | {"PYTHONPATH": str(HERE)}
    # An init that reaps orphans, as every machine has one.
    command = f'{sys.executable} -c "$1" "$2" "$3" & wait $!; exit $?'
    ran = subprocess.run(
        [*namespace, "sh", "-c", command, "sh", REUSE, str(home), json.dumps(settings)],
        env=environ, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert ran.returncode == 0 and ran.stdout == "done\n", ran.stdout + ran.stderr


@pytest.mark.parametrize("rebooted", [False, True])
def test_what_an_earlier_boot_left_is_nobodys(daemon: Make, home: Path, rebooted: bool) -> None:
    """A process that passes for the child of an earlier run in everything: only the boot tells."""
    (home / "run").mkdir(mode=0o700)
    for name in ("mlxd.lock", "run/lease", "run/control.sock"):
        (home / name).touch()
    stranger = subprocess.Popen(["sleep", "600"], env=os.environ | {"MLXD_CHILD": '{"nonce": "n1"}'}, start_new_session=True)
    try:
        (home / "mlxd.pid").write_text(f"{stranger.pid}\n")
        left = {"pid": stranger.pid, "identity": leftovers.start_identity(stranger.pid), "nonce": "n1", "name": "server"}
        boot = "an-earlier-one" if rebooted else leftovers.boot_id()
        (home / "state.json").write_text(json.dumps({"boot": boot, "children": [left]}))
        d = daemon(MLXD_SUPERVISOR_TERM_S="0.2")
        d.start()
        d.ready()
        assert (stranger.poll() is None) is rebooted
        assert d.mlxd("stop").returncode == 0
        assert (stranger.poll() is None) is rebooted
    finally:
        stranger.kill()
        stranger.wait()


# --- clocks ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("awake_s", "all_s", "slept_s"),
    [
        (1.0, 1.0, 0.0),
        (1.0, 8 * 3600 + 1.0, 8 * 3600.0),  # a night with the lid closed
        (3600.0, 3600.0, 0.0),  # stopped, or very busy: it did not sleep
        (1.0, 2.5, 0.0),  # the clocks are not read at one instant
        (1.2, 61.2, 60.0),
        (5.0, 4.0, 0.0),
    ],
)
def test_a_sleep_is_the_difference_of_two_clocks(awake_s: float, all_s: float, slept_s: float) -> None:
    assert monitor.slept((100.0, 5000.0), (100.0 + awake_s, 5000.0 + all_s)) == pytest.approx(slept_s)


#: Read by every Python of a daemon: the seconds in a file are added to one clock.
ASTRAY = """
import time
def astray(clock, file="{file}"):
    def now(*which):
        try:
            added = float(open(file).read() or 0) if which in ((), (time.CLOCK_BOOTTIME,)) else 0.0
        except OSError:
            added = 0.0
        return clock(*which) + added
    return now
time.{clock} = astray(time.{clock})
"""


@LINUX
def test_after_a_sleep_of_eight_hours_nobody_is_restarted(daemon: Make, home: Path) -> None:
    d = daemon(server="--want a:latest", **HASTY)
    shadowed(d, "sitecustomize.py").write_text(ASTRAY.format(file=home / "astray", clock="clock_gettime"))
    d.start()
    before = d.ready()
    (home / "astray").write_text(str(8 * 3600))
    eventually(lambda: "every deadline begins anew" in d.log(), "the sleep noticed", d.history)
    d.until("a while later", lambda s: s["supervisor"]["up_s"] > before["supervisor"]["up_s"] + 5)
    after = d.ready()
    assert after["server"]["pid"] == before["server"]["pid"] and not d.exits()
    assert d.log().count("every deadline begins anew") == 1


def test_a_wall_clock_that_jumps_moves_no_deadline(daemon: Make, home: Path) -> None:
    d = daemon(server="--want a:latest", engine=f"--exit-ready 1 --first 4 {home}/count", **HASTY)
    shadowed(d, "sitecustomize.py").write_text(ASTRAY.format(file=home / "astray", clock="time"))
    d.start()
    year_s = 365 * 86400
    for count, jump_s in enumerate((3600, -3600, 10 * year_s, -10 * year_s), 1):
        (home / "astray").write_text(str(jump_s))
        told = d.until("its next try", lambda s, count=count: engine_of(s)["restarts"] >= count)
    told = d.until("the fifth engine", lambda s: engine_of(s)["restarts"] == 4 and s["state"] == "ready")
    assert told["server"]["restarts"] == 0
    assert len({record["ts"][:4] for record in d.exits()}) >= 2  # on paper the clock did jump
    assert 0 <= told["supervisor"]["up_s"] < 600 and "begins anew" not in d.log()


# --- terminals ---------------------------------------------------------------------------------------------------------------------------

#: Becomes its arguments, in a session of its own on the terminal that is its stdin.
ON_TERMINAL = (
    "import fcntl, os, signal, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"  # whoever runs the tests may ignore it
)


@contextlib.contextmanager
def on_a_terminal(d: Daemon, *command: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The process, and the end that closes the terminal when it is closed."""
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_TERMINAL, *command], env=d.environ, stdin=side, stdout=side, stderr=side, cwd="/"
    )
    os.close(side)
    try:
        yield process, main
    finally:
        with contextlib.suppress(OSError):
            os.close(main)
        process.kill()
        process.wait()


@pytest.mark.parametrize("shell", [False, True])
def test_a_daemon_in_the_foreground_ends_with_its_terminal(daemon: Make, shell: bool) -> None:
    d = daemon(server="--want a:latest")
    run = [sys.executable, "-m", "mlxd", "run"]
    with on_a_terminal(d, *(["sh", "-ic", '"$0" "$@"; true', *run] if shell else run)) as (process, terminal):
        d.ready()
        os.close(terminal)
        eventually(lambda: "mlxd has stopped" in d.log(), "its end", d.history)
        process.wait(60)
    eventually(lambda: not d.ours(), "the end of all", d.history)
    assert d.log().count("stopping: its terminal was closed") == 1 and "without draining" not in d.log()
    assert {record["cause"] for record in d.exits()} == {"stopped"} and not d.paths.pid_file.exists()


@pytest.mark.parametrize("command", [["mlxd", "start"], ["nohup", "mlxd", "run"]])
def test_a_daemon_in_the_background_outlives_the_terminal_it_was_started_from(daemon: Make, command: list[str]) -> None:
    d = daemon(server="--want a:latest")
    d.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{d.environ['PATH']}"
    with on_a_terminal(d, *command) as (process, terminal):
        before = d.ready()
        if command[0] == "mlxd":
            process.wait(60)
        os.close(terminal)
        os.kill(before["supervisor"]["pid"], signal.SIGHUP)
        d.paths.config.write_text("[health]\nmax_time_s = 3\n")
        eventually(lambda: "the configuration changed" in d.log(), "a reload", d.history)
        assert d.ready()["supervisor"]["pid"] == before["supervisor"]["pid"]
        assert d.mlxd("stop").returncode == 0


# --- what children leave, and what they never give back -----------------------------------------------------------------------------------

#: Read by every Python of a daemon: while a file is there, its supervisor's KILLs reach nobody.
UNKILLABLE = """
import os, signal
if "MLXD_CHILD" not in os.environ:
    def killpg(pid, number, real=os.killpg):
        if number != signal.SIGKILL or not os.path.exists("{file}"):
            real(pid, number)
    os.killpg = killpg
"""


def test_over_a_child_that_cannot_be_killed_no_second_one_is_started(daemon: Make, home: Path) -> None:
    d = daemon(server="--want a:latest", engine="--ignore-term", MLXD_SUPERVISOR_TERM_S="0.2", MLXD_SUPERVISOR_KILL_S="0.2")
    (home / "unkillable").touch()
    shadowed(d, "sitecustomize.py").write_text(UNKILLABLE.format(file=home / "unkillable"))
    d.start()
    pid = engine_of(d.ready())["pid"]
    d.paths.config.write_text("[engine]\ntext_s = 3\n")
    told = d.until("held", lambda s: engine_of(s)["state"] == "held" and s["state"] == "degraded")
    assert f"is held: pid {pid} does not die; a reboot may be needed" in told["reason"]
    for verb in ("reload", "restart"):
        control.ask(d.paths.control, verb)
    d.until("another server", lambda s: s["server"]["restarts"] == 1 and s["server"]["state"] == "ready")
    assert engine_of(d.status())["pid"] == pid and spawned(d, "engine-1") == 1
    (home / "unkillable").unlink()
    os.kill(pid, signal.SIGKILL)
    d.until("another engine", lambda s: s["state"] == "ready" and engine_of(s)["pid"] not in (None, pid))


@LINUX
@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_grandchild_that_became_a_daemon_is_told_of_and_ends_with_its_child(daemon: Make, home: Path, end: str) -> None:
    d = daemon(server="--want a:latest", engine=f"--finished 1 --daemonise {home}/grandchild")
    d.start()
    before = engine_of(d.ready())
    grandchild = int((home / "grandchild").read_text())
    note = f"pid {grandchild} (sleep) was left behind by engine-1 and ends with it"
    d.until("a note", lambda s: s["notes"] == [note])
    assert f"note  {note}\n" in d.mlxd("status").stdout
    control.ask(d.paths.control, "restart")  # another child's end is no reason
    d.until("another server", lambda s: s["server"]["restarts"] == 1 and s["server"]["state"] == "ready")
    assert alive(grandchild)
    if end == "kill":
        os.kill(before["pid"], signal.SIGKILL)
        d.until("another", lambda s: s["state"] == "ready" and engine_of(s)["pid"] != before["pid"])
        eventually(lambda: not alive(grandchild), "its end", d.history)
        assert f"pid {grandchild} (sleep), left behind by engine-1, is killed" in d.log()
        d.until(
            "the next one's", lambda s: s["notes"] == [note.replace(str(grandchild), (home / "grandchild").read_text().strip())]
        )
    assert d.mlxd("stop").returncode == 0
    assert not alive(grandchild) and not d.ours()


@LINUX
def test_a_fork_bomb_ends_with_its_child_and_the_supervisor_answers_meanwhile(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--finished 1 --bomb")
    d.start()
    d.ready()
    family = str(d.paths.log("engine-1")).encode()
    eventually(lambda: len(descendants(family)) > 10, "the bomb", d.history)
    assert d.mlxd("status").returncode == 0
    assert d.mlxd("stop").returncode == 0
    assert not descendants(family)


def descendants(log: bytes) -> list[int]:
    """Processes of this machine whose environment names this log."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if log in (directory / "environ").read_bytes():
                found.append(int(directory.name))
    return found


@LINUX
def test_children_that_hoard_descriptors_or_processes_are_replaced_and_the_record_counts(daemon: Make, home: Path) -> None:
    d = daemon(
        server=f"--want a:latest --leak --first 1 {home}/server",
        engine=f"--finished 1 --zombies 1200 --first 1 {home}/engine",
    )
    d.run(*limited("-n 200"))
    eventually(lambda: {record["cause"] for record in d.exits()} == {"descriptors", "processes"}, "two ends", d.history)
    told = d.until("two others", lambda s: s["state"] == "ready" and s["server"]["restarts"] == engine_of(s)["restarts"] == 1)
    records = {record["child"]: record for record in d.exits()}
    assert records["server"]["cause"] == "descriptors" and records["server"]["descriptors"] >= 180
    assert records["engine"]["cause"] == "processes" and 0 < records["engine"]["descriptors"] < 100
    zombies = [p for p in psutil.Process(told["supervisor"]["pid"]).children() if p.status() == psutil.STATUS_ZOMBIE]
    assert not zombies


def test_with_few_descriptors_and_many_callers_status_and_stop_still_work(daemon: Make) -> None:
    d = daemon(server="--exit-at-once 1", MLXD_SUPERVISOR_DEATHS="1")
    d.run(*limited("-n 64"))
    told = d.until("no server", lambda s: s["server"]["state"] == "cooldown")
    callers = []
    for _ in range(100):
        callers.append(socket.create_connection(("127.0.0.1", told["port"]), timeout=60))
        callers.append(socket.socket(socket.AF_UNIX))
        callers[-1].connect(str(d.paths.control))
    try:
        assert d.mlxd("status").returncode == 4
        assert d.mlxd("stop").returncode == 0
    finally:
        for caller in callers:
            caller.close()
    assert "Traceback" not in d.log()


# --- disks ---------------------------------------------------------------------------------------------------------------------------------


@LINUX
def test_what_cannot_be_written_is_kept_in_memory_and_written_when_there_is_room(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    before = d.ready()
    supervisor = psutil.Process(before["supervisor"]["pid"])
    _, most = supervisor.rlimit(psutil.RLIMIT_FSIZE)
    supervisor.rlimit(psutil.RLIMIT_FSIZE, (0, most))  # no file can grow
    os.kill(engine_of(before)["pid"], signal.SIGKILL)
    told = d.until(
        "another engine", lambda s: s["state"] == "ready" and engine_of(s)["pid"] not in (None, engine_of(before)["pid"])
    )
    assert told["last_exit"]["pid"] == engine_of(before)["pid"] and not d.exits()
    note = f"cannot write in {d.home} (File too large): exits.jsonl, loading.json, state.json will be written when that ends"
    assert note in told["notes"]
    assert pids_on_disk(d) == {before["server"]["pid"], engine_of(before)["pid"]}
    supervisor.rlimit(psutil.RLIMIT_FSIZE, (most, most))
    after = d.until("no note", lambda s: not s["notes"])
    assert d.exits()[-1]["pid"] == engine_of(before)["pid"]
    assert pids_on_disk(d) == {after["server"]["pid"], engine_of(after)["pid"]}
    assert not [file for file in d.home.iterdir() if file.name.startswith(".")]


def pids_on_disk(d: Daemon) -> set[int]:
    return {left["pid"] for left in json.loads(d.paths.state.read_text())["children"]}


@LINUX
def test_on_a_full_disk_the_server_serves_and_engines_come_back_when_there_is_room(real: Make, home: Path) -> None:
    small = home / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "none", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small tmpfs here")
    d = real(MLXD_SUPERVISOR_SPARE_BYTES="0")
    d.home, d.environ = small, d.environ | {"MLXD_HOME": str(small)}
    d.paths = paths.locate(d.environ)
    try:
        d.start()
        before = d.ready()
        with contextlib.suppress(OSError), open(small / "ballast", "wb", buffering=0) as ballast:
            while ballast.write(b"x" * 4096):
                pass
        question, answer = next(iter(KNOWN.items()))
        assert chat(before["port"], question)["message"]["content"] == answer
        os.kill(before["server"]["pid"], signal.SIGKILL)
        d.until("another", lambda s: s["state"] == "ready" and s["server"]["pid"] not in (None, before["server"]["pid"]))
        assert d.get("/api/tags")[0] == 200
        os.kill(engine_of(d.ready(), BUILTIN)["pid"], signal.SIGKILL)
        told = d.until("a word for it", lambda s: s["state"] == "degraded" and "died (disk)" in s["reason"] and s["notes"])
        assert any("No space left on device" in note for note in told["notes"])
        (small / "ballast").unlink()
        d.ready()
        d.until("no note", lambda s: not s["notes"])
        assert chat(before["port"], question)["message"]["content"] == answer
        d.until(  # a spare may be coming up meanwhile
            "all of them on disk", lambda s: pids_on_disk(d) == {one["pid"] for one in (s["server"], *s["engines"])}
        )
        assert {"killed", "disk"} <= {record["cause"] for record in d.exits()}
        assert d.mlxd("stop").returncode == 0
    finally:
        for one in d.processes:
            one.terminate()
            one.wait(60)
        subprocess.run(["umount", str(small)], check=True)


def put(place: Path, what: str) -> None:
    """Something that mlxd has not made, where it keeps a file."""
    place.parent.mkdir(mode=0o700, exist_ok=True)
    if what == "file":
        place.write_text("what is this?")
    elif what == "directory":
        place.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(place))


@pytest.mark.parametrize("what", ["file", "socket", "directory"])
def test_whatever_lies_in_the_place_of_a_file_is_replaced_or_does_not_matter(daemon: Make, home: Path, what: str) -> None:
    for name in ("mlxd.pid", "state.json", "exits.jsonl", "loading.json"):
        put(home / name, what)
    if what != "directory":
        put(home / "run/control.sock", what)
    d = daemon(server="--want a:latest")
    d.start()
    d.ready()
    assert (what == "directory") == bool([note for note in d.status()["notes"] if "Is a directory" in note])


def test_a_directory_in_the_place_of_the_lock_or_the_control_socket_is_exit_78_and_named(daemon: Make, home: Path) -> None:
    for name in ("mlxd.lock", "run/control.sock"):
        put(home / name, "directory")
        d = daemon()
        process = d.run()
        said = process.communicate(timeout=60)[1].decode()
        assert process.returncode == 78 and said.startswith("Error: cannot ") and said.count("\n") == 1, said
        assert f"{home / name}: " in said and said.endswith("; remove what is there\n") and not d.paths.pid_file.exists()
        (home / name).rmdir()


@pytest.mark.parametrize("what", ["socket", "directory"])
def test_what_lies_in_the_place_of_the_lease_is_named_and_waited_for(daemon: Make, home: Path, what: str) -> None:
    put(home / "run/lease", what)
    d = daemon()
    d.start()
    told = d.until("held", lambda s: s["state"] == "held")
    assert told["reason"].startswith(f"cannot open {home}/run/lease: ") and told["reason"].endswith("; remove what is there")
    (home / "run/lease").rmdir() if what == "directory" else (home / "run/lease").unlink()
    d.ready()


#: Writes one of two states again and again, until it is killed.
WRITER = """
import os, pathlib, random, signal, sys, time
from mlxd import paths
file, count, chance = pathlib.Path(sys.argv[1]), int(sys.argv[2]), random.Random(1)
states = [b"a" * 40_000, b"b" * 70_000]
paths.write_atomically(file, states[0])
for _ in range(count):
    writer = os.fork()
    if not writer:
        while True:
            for state in states:
                paths.write_atomically(file, state)
    time.sleep(chance.random() * 0.01)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    assert file.read_bytes() in states
print("done")
"""


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.full)])
def test_a_state_file_is_whole_whenever_its_writer_is_killed(home: Path, count: int) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", WRITER, str(home / "state"), str(count)], capture_output=True, text=True, check=False
    )
    assert ran.stdout == "done\n", ran.stderr


STEPS = frozenset({"open", "mkdir", "write", "flush", "fsync", "replace", "rename", "fileno"})


def failing(number: int, work: Callable[[], None]) -> bool:
    """Do it with the step of this number going wrong, as on a disk that is full or ill; whether there was such a step."""
    left = number

    def look(frame: Any, event: str, called: Any) -> None:
        nonlocal left
        if event == "c_call" and called.__name__ in STEPS:
            left -= 1
            if left < 0:
                sys.setprofile(None)
                raise OSError(28, "No space left on device")

    sys.setprofile(look)
    try:
        work()
    except OSError:
        pass
    finally:
        sys.setprofile(None)
    return left < 0


def test_whichever_step_of_a_write_fails_the_old_or_the_new_content_is_there(tmp_path: Path) -> None:
    file, seen = tmp_path / "state", []
    before = len(list(Path("/dev/fd").iterdir()))
    for number in range(1000):
        file.write_bytes(b"old")
        if not failing(number, lambda: paths.write_atomically(file, b"new")):
            break
        seen.append(file.read_bytes())
        assert [left.name for left in tmp_path.iterdir()] == ["state"]
    assert len(list(Path("/dev/fd").iterdir())) == before
    assert set(seen) == {b"old", b"new"} and seen == sorted(seen, reverse=True) and number >= 6


def test_what_a_killed_writer_left_half_done_is_cleared_away_by_the_next_start(daemon: Make, home: Path) -> None:
    for name in (".state.json-a1b2c3d4", ".exits.jsonl-__x8_x8_", ".mlxd.pid-00000000"):
        (home / name).write_text("half a st")
    (home / ".env").write_text("")
    d = daemon()
    d.start()
    d.ready()
    assert [file.name for file in home.iterdir() if file.name.startswith(".")] == [".env"]


# --- everybody at once -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "count"), [(7, 24), pytest.param(8, 1000, marks=[pytest.mark.full, pytest.mark.timeout(1800)])])
def test_whatever_eight_command_lines_say_at_once_the_last_word_counts(daemon: Make, home: Path, seed: int, count: int) -> None:
    d = daemon(server="--want a:latest", engine=f"--alone {home}/alone")
    chance = random.Random(seed)
    words = [chance.choice(["start", "stop", "restart", "reload", "start --no-wait"]) for _ in range(count)]
    with ThreadPoolExecutor(8) as pool:
        ran = list(pool.map(lambda word: d.mlxd(*word.split()), words))
    for word, one in zip(words, ran, strict=True):
        assert one.returncode in (0, 1, 3, 4), (seed, word, one)
        assert "Traceback" not in one.stderr, (seed, word, one)
    assert not (home / "alone.broken").exists(), f"seed {seed}: two engines of one model"
    for word in ("start", "stop"):
        assert d.mlxd(word).returncode == 0
        assert d.mlxd("status").returncode == (0 if word == "start" else 3), (seed, d.history())
    assert not d.ours() and "Traceback" not in d.log()
    assert not d.paths.pid_file.exists() and not d.paths.state.exists() and not d.paths.control.exists()


@pytest.mark.parametrize(("clients", "restarts"), [(8, 2), pytest.param(20, 10, marks=pytest.mark.full)])
def test_restarts_refuse_no_connection_and_lose_no_answer(real: Make, clients: int, restarts: int) -> None:
    d = real(MLX_PRELOAD_MODELS="none-such")
    d.start()
    before = d.until("the server", lambda s: s["server"]["state"] == "ready")
    ending = threading.Event()

    def ask() -> int:
        count = 0
        while not ending.is_set():
            assert http(before["port"], b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[0] == 200
            count += 1
        return count

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask) for _ in range(clients)]
        try:
            for number in range(1, restarts + 1):
                control.ask(d.paths.control, "restart")
                d.until("the next", lambda s, number=number: s["server"]["restarts"] == number and s["server"]["state"] == "ready")
            d.paths.config.write_text("[server]\nmax_queue = -1\n")
            with pytest.raises(MlxdError, match="max_queue"):
                control.ask(d.paths.control, "restart")
            assert d.status()["server"]["restarts"] == restarts
        finally:
            ending.set()
        assert all(one.result() for one in asking)
