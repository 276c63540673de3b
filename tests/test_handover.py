"""A supervisor that becomes the next one in place, and changes of the configuration, under load: nothing is refused, nothing lost."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import HERE, Daemon, eventually, http
from known_answers import KNOWN, LONG
from test_mlxd import LONGEST, Stream, body_of, chat, post, real

import mlxd
from mlxd import control, handover, messages, supervisor
from mlxd.errors import MlxdError
from mlxd.link import Link

__all__ = ["real"]  # a fixture

Make = Callable[..., Daemon]
Status = dict[str, Any]
QUESTION, ANSWER = next(iter(KNOWN.items()))
FAKE_ENGINE = f"{sys.executable} {HERE / 'fake_engine.py'}"


def renew(d: Daemon, count: int = 1) -> Status:
    """`mlxd restart --supervisor`, `count` times; the last status."""
    for _ in range(count):
        before = d.status()["supervisor"]
        ran = d.mlxd("restart", "--supervisor", "--json")
        assert ran.returncode == 0, f"{ran.stderr}\n{d.history()}"
        told: Status = json.loads(ran.stdout)
        assert (told["supervisor"]["pid"], told["supervisor"]["run"]) == (before["pid"], before["run"] + 1)
    return told


def pids(told: Status) -> list[int]:
    return [told["server"]["pid"], *(engine["pid"] for engine in told["engines"])]


def settled(told: Status) -> bool:
    """Ready, and no engine on its way up or down."""
    return told["state"] == "ready" and {engine["state"] for engine in told["engines"]} <= {"ready", "blank"}


@contextmanager
def clients(count: int, work: Callable[[], None]) -> Iterator[list[int]]:
    """`work` again and again in `count` threads; what it raises is raised here. Yields the list that counts."""
    stop = threading.Event()
    done: list[int] = []

    def client() -> None:
        while not stop.is_set():
            work()
            done.append(1)
            time.sleep(0.01)  # the daemon's share of the machine

    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(client) for _ in range(count)]
        try:
            yield done
        finally:
            stop.set()
    for one in running:
        one.result()


# --- the supervisor becomes the next one ---------------------------------------------------------------------------------


def test_the_supervisor_is_replaced_in_place_and_everything_else_goes_on(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    before = d.until("ready", settled)
    ran = d.mlxd("restart", "--supervisor")
    pid = before["supervisor"]["pid"]
    assert (ran.returncode, ran.stdout) == (0, f"restarted  supervisor pid {pid}  run 2  mlxd {before['version']}\n"), ran.stderr
    after = d.status()
    assert pids(after) == pids(before) and after["state"] == "ready" and after["port"] == before["port"]
    assert after["server"]["up_s"] >= before["server"]["up_s"] and after["supervisor"]["up_s"] >= before["supervisor"]["up_s"]
    assert d.paths.pid_file.read_text() == f"{pid}\n"
    assert d.get("/")[0] == 200
    # The new one owns what it was given: links are heard, ends are seen, a second supervisor is refused, a stop stops.
    os.kill(after["engines"][0]["pid"], signal.SIGKILL)
    d.until("another engine", lambda s: settled(s) and s["engines"][0]["pid"] != after["engines"][0]["pid"])
    assert d.run().wait(60) == 0
    assert d.mlxd("stop").returncode == 0
    assert not d.paths.pid_file.exists() and not d.ours()


@pytest.mark.full
def test_ten_replacements_leak_no_descriptor_and_no_thread(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    d.until("ready", settled)
    process = psutil.Process(renew(d)["supervisor"]["pid"])
    # Two that come and go: the conversation of the last `mlxd`, a health poll.
    fds, threads = process.num_fds(), process.num_threads()
    renew(d, 10)
    eventually(lambda: process.num_fds() <= fds and process.num_threads() <= threads, "as many descriptors as before", d.history)
    assert pids(d.status()) == pids(d.until("ready", settled))


def test_no_child_is_told_of_the_hand_over_and_all_take_signals(daemon: Make) -> None:
    d = daemon(server="--want a:latest", MLXD_SUPERVISOR_TERM_S="600")
    d.start()
    d.until("ready", settled)
    told = renew(d)
    os.kill(told["server"]["pid"], signal.SIGKILL)
    new = d.until("a new server", lambda s: s["server"]["state"] == "ready" and s["server"]["restarts"] == 1)
    environ = psutil.Process(new["server"]["pid"]).environ()
    assert handover.VARIABLE not in environ and "MLXD_CHILD" in environ
    os.kill(new["server"]["pid"], signal.SIGTERM)
    d.until("a third server", lambda s: s["server"]["state"] == "ready" and s["server"]["restarts"] == 2)


def test_a_stream_goes_on_through_replacements_and_nobody_is_refused(real: Make) -> None:
    d = real()
    d.start()
    before = d.until("ready", settled)
    port = before["port"]

    def ask() -> None:
        assert chat(port, QUESTION)["message"]["content"] == ANSWER

    def look() -> None:
        ran = control.ask(d.paths.control, "status", timeout_s=60)
        assert ran["state"] == "ready"

    stream = Stream(port, LONGEST)
    pieces = stream.pieces()
    text = [next(pieces) for _ in range(10)]
    with clients(4, ask) as answered, clients(1, look):
        after = renew(d, 2)
        seen = len(answered)
        eventually(lambda: len(answered) > seen + 4, "answers", d.history)
    assert "".join(text + list(pieces)) == LONG[LONGEST]
    assert pids(after)[:2] == pids(before)[:2]  # the spare may have come up meanwhile
    assert [one["restarts"] for one in (after["server"], after["engines"][0])] == [0, 0]


def test_requests_go_to_the_next_engine_when_one_is_killed_during_a_replacement(real: Make) -> None:
    d = real()
    d.start()
    before = d.until("ready", settled)
    stream = Stream(before["port"], LONGEST)
    pieces = stream.pieces()
    text = [next(pieces) for _ in range(10)]
    with ThreadPoolExecutor(1) as pool:
        renewed = pool.submit(renew, d)
        eventually(lambda: rehearsing(d.status()), "the rehearsal", d.history)
        os.kill(before["engines"][0]["pid"], signal.SIGKILL)
        renewed.result()
    assert "".join(text + list(pieces)) == LONG[LONGEST]
    d.until("ready", settled)


def rehearsing(told: Status) -> bool:
    for process in psutil.Process(told["supervisor"]["pid"]).children():
        with suppress(psutil.Error):
            if handover.REHEARSE in process.cmdline():
                return True
    return False


#: Read by every Python of the daemons of `slowly`.
SLOWLY = """
import os, sys, time
if {variable!r} in os.environ and {rehearse!r} not in sys.orig_argv:
    open({mark!r}, "w")
    time.sleep(3)
elif "MLXD_CHILD" in os.environ:
    time.sleep(1)
"""


def slowly(d: Daemon) -> Daemon:
    """Between two supervisors nobody looks for three seconds; a child takes one to say hello, longer than a rehearsal."""
    text = SLOWLY.format(variable=handover.VARIABLE, rehearse=handover.REHEARSE, mark=str(d.home / "between"))
    shadowed(d, "sitecustomize.py").write_text(text)
    return d


def between(d: Daemon) -> None:
    """Returns when the old supervisor is gone and the new one is not there yet."""
    eventually((d.home / "between").exists, "the time between", d.history)


@pytest.mark.parametrize(
    ("which", "number"),
    [
        ("server", signal.SIGKILL),
        ("engines", signal.SIGABRT),
        pytest.param("server", signal.SIGABRT, marks=pytest.mark.full),
        pytest.param("engines", signal.SIGKILL, marks=pytest.mark.full),
    ],
)
def test_a_child_that_ends_while_nobody_looks_is_reaped_and_replaced(daemon: Make, which: str, number: int) -> None:
    d = slowly(daemon(server="--want a:latest"))
    d.start()
    before = d.until("ready", settled)
    pid = before["server"]["pid"] if which == "server" else before["engines"][0]["pid"]
    with asking(d, "restart_supervisor") as asked:
        between(d)
        os.kill(pid, number)
        assert json.loads(asked.readline())["supervisor"]["run"] == 2
    record = d.until("its end", lambda s, pid=pid: s["last_exit"] and s["last_exit"]["pid"] == pid)["last_exit"]
    assert record["signal"] == number
    d.until("a new one", settled)


def test_words_that_came_while_nobody_listened_are_heard(daemon: Make) -> None:
    d = slowly(daemon(server="--want a:latest"))
    d.start()
    before = d.until("ready", settled)
    with asking(d, "restart_supervisor") as asked:
        # The new server says hello and ready meanwhile, upon which the old one is to be told to drain.
        eventually(lambda: rehearsing(before), "the rehearsal", d.history)
        control.ask(d.paths.control, "restart", timeout_s=60)
        between(d)
        port = before["port"]
        assert http(port, f"GET / HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n".encode())[0] == 200
        assert json.loads(asked.readline())["supervisor"]["run"] == 2
    told = d.until("the old server's end", lambda s: s["last_exit"] and s["last_exit"]["pid"] == before["server"]["pid"])
    assert told["last_exit"]["cause"] == "stopped" and told["server"]["restarts"] == 1
    assert told["engines"][0]["pid"] == before["engines"][0]["pid"]
    assert d.until("ready", settled)["server"]["state"] == "ready"


@contextmanager
def asking(d: Daemon, verb: str) -> Iterator[Any]:
    """The answer's file, to be read later."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(d.paths.control))
        sock.sendall(json.dumps({"verb": verb}).encode() + b"\n")
        with sock.makefile("rb") as file:
            yield file


@pytest.mark.parametrize("when", ["at once", "rehearsal", "between"])
def test_a_term_during_a_replacement_stops_in_good_order(daemon: Make, when: str) -> None:
    d = slowly(daemon(server="--want a:latest"))
    process = d.run()
    told = d.until("ready", settled)
    with asking(d, "restart_supervisor"):
        if when == "rehearsal":
            eventually(lambda: rehearsing(told), "the rehearsal", d.history)
        if when == "between":
            between(d)
        os.kill(told["supervisor"]["pid"], signal.SIGTERM)
        assert process.wait(60) == 0
    eventually(lambda: not d.ours(), "the end of every process", d.history)
    assert not d.paths.pid_file.exists()


def test_a_storm_of_signals_during_replacements_ends_nothing(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    before = d.until("ready", settled)
    stop = threading.Event()

    def storm() -> None:
        while not stop.wait(0.002):
            for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
                os.kill(before["supervisor"]["pid"], number)

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        after = renew(d, 3)
    finally:
        stop.set()
        thread.join()
    assert pids(after) == pids(before)


# --- whatever was under way is taken up where it was ---------------------------------------------------------------------------


def test_an_engine_that_was_loading_becomes_ready(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--load-s 4")
    d.start()
    before = d.until("a load", lambda s: s["engines"][0]["state"] == "loading")
    after = renew(d)
    assert pids(after)[:2] == pids(before)[:2] and after["engines"][0]["state"] == "loading"
    assert d.ready()["engines"][0]["pid"] == before["engines"][0]["pid"]


def test_a_load_that_stands_still_is_late_all_the_same(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--never-ready", MLXD_SUPERVISOR_LOAD_STALL_S="4")
    d.start()
    before = d.until("a load", lambda s: s["engines"][0]["state"] == "loading")
    renew(d)
    told = d.until("its end", lambda s: s["last_exit"] and s["last_exit"]["pid"] == before["engines"][0]["pid"])
    assert told["last_exit"]["cause"] == "stalled"


def test_a_child_that_was_starting_is_greeted(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--no-hello", MLXD_SUPERVISOR_HELLO_S="3")
    d.start()
    before = d.until("a start", lambda s: s["engines"][0]["state"] == "starting" and s["server"]["state"] == "ready")
    renew(d)
    told = d.until("its end", lambda s: s["last_exit"] and s["last_exit"]["pid"] == before["engines"][0]["pid"])
    assert told["last_exit"]["cause"] == "no hello"


def test_a_backoff_goes_on_where_it_was_and_deaths_are_remembered(daemon: Make, home: Path) -> None:
    d = daemon(
        server="--want a:latest",
        engine="--exit-loading 1",
        MLXD_SUPERVISOR_BACKOFF_FIRST_S="4",
        MLXD_SUPERVISOR_BACKOFF_MOST_S="4",
        MLXD_SUPERVISOR_DEATHS="3",
    )
    d.start()
    for count in (1, 2):
        d.until("a backoff", lambda s, n=count: s["engines"][0]["state"] == "backoff" and len(d.exits()) == n)
        seen_at = time.monotonic()
        told = renew(d)
        assert told["engines"][0]["state"] == "backoff" or time.monotonic() > seen_at + 3  # a slow machine may take as long
    d.until("the cool-down", lambda s: s["engines"][0]["state"] == "cooldown")
    assert len(d.exits()) == 3
    told = renew(d)
    assert told["engines"][0]["state"] == "cooldown" and "next try in" in told["reason"]


def test_without_a_server_the_answer_is_a_503_before_and_after(daemon: Make) -> None:
    d = daemon(server="--exit 1")
    d.start()
    told = d.until("the cool-down", lambda s: s["server"]["state"] == "cooldown")
    port = told["port"]
    request = f"GET /api/tags HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n".encode()
    eventually(lambda: http(port, request)[0] == 503, "a 503", d.history)

    def ask() -> None:
        assert http(port, request)[0] == 503

    with clients(4, ask) as answered:
        told = renew(d, 3)
        seen = len(answered)
        eventually(lambda: len(answered) > seen, "answers", d.history)
    assert told["state"] == "cooldown" and told["server"]["state"] == "cooldown"


@pytest.mark.full  # as one of several, below
def test_a_draining_server_ends_its_stream(real: Make) -> None:
    d = real()
    d.start()
    port = d.ready()["port"]
    stream = Stream(port, LONGEST)
    pieces = stream.pieces()
    text = [next(pieces) for _ in range(10)]
    control.ask(d.paths.control, "restart")
    d.until("the new server", lambda s: s["server"]["restarts"] == 1 and s["server"]["state"] == "ready")
    renew(d)
    assert chat(port, QUESTION)["message"]["content"] == ANSWER
    assert "".join(text + list(pieces)) == LONG[LONGEST]
    eventually(lambda: d.exits(), "the end of the old server", d.history)
    assert d.exits()[-1]["cause"] == "stopped"


def test_a_stranger_on_the_port_is_still_waited_for(daemon: Make) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        d = daemon(MLX_API_PORT=str(stranger.getsockname()[1]))
        d.start()
        d.until("held", lambda s: s["state"] == "held")
        assert renew(d)["state"] == "held"
    d.until("a server", lambda s: s["server"] and s["server"]["state"] == "ready")


def test_a_child_that_was_held_for_its_configuration_is_tried_by_the_next_supervisor(daemon: Make, home: Path) -> None:
    d = daemon(server="--want a:latest", engine=f"--exit 78 --first 1 {home}/count")
    d.start()
    d.until("held", lambda s: "held" in [engine["state"] for engine in s["engines"]])
    renew(d)
    d.until("a second try", lambda s: s["state"] == "ready" and "held" not in [engine["state"] for engine in s["engines"]])


# --- what is refused changes nothing --------------------------------------------------------------------------------------------


def shadowed(d: Daemon, name: str) -> Path:
    """A module of ours that the daemon will import instead, from the next process on."""
    directory = d.home / "shadow"
    directory.mkdir(exist_ok=True)
    d.environ["PYTHONPATH"] = os.pathsep.join([str(directory), d.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return directory / name


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("raise ImportError('no such luck')", "no such luck"),
        pytest.param("syntax error", "SyntaxError", marks=pytest.mark.full),
        pytest.param("import os; os._exit(9)", "status 9", marks=pytest.mark.full),
    ],
)
def test_new_code_that_does_not_start_changes_nothing(daemon: Make, text: str, sentence: str) -> None:
    d = daemon(server="--want a:latest")
    module = shadowed(d, "tomllib.py")
    d.start()
    before = d.until("ready", settled)
    module.write_text(text)
    ran = d.mlxd("restart", "--supervisor")
    assert ran.returncode == 1, ran
    lines = ran.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: the new supervisor would not start (") and sentence in lines[0]
    assert "the old one goes on" in lines[0]
    after = d.ready()
    assert pids(after) == pids(before) and after["supervisor"]["run"] == 1
    module.unlink()
    assert pids(renew(d)) == pids(before)


def test_new_code_that_hangs_is_given_up(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    module = shadowed(d, "tomllib.py")
    d.start()
    before = d.until("ready", settled)
    module.write_text("import time\ntime.sleep(600)\n")
    ran = d.mlxd("restart", "--supervisor")
    assert ran.returncode == 1 and "was not ready within 20 s; the old one goes on" in ran.stderr, ran
    assert pids(d.ready()) == pids(before)
    module.unlink()
    eventually(lambda: not rehearsing(d.status()), "the end of the rehearsal", d.history)


def test_an_invalid_configuration_changes_nothing(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    before = d.until("ready", settled)
    d.paths.config.write_text("[server]\nportt = 1\n")
    ran = d.mlxd("restart", "--supervisor")
    assert ran.returncode == 78 and "unknown setting server.portt" in ran.stderr and "the old one goes on" in ran.stderr, ran
    after = d.status()
    assert pids(after) == pids(before) and after["supervisor"]["run"] == 1


def test_a_python_that_is_gone_at_the_last_moment_leaves_the_old_supervisor_at_work(daemon: Make, home: Path) -> None:
    python = home / "python"
    python.symlink_to(Path(sys.executable).resolve())
    d = daemon(server="--want a:latest")
    # The rehearsal, which this Python runs, removes it.
    shadowed(d, "sitecustomize.py").write_text(
        f"import os\nif {handover.VARIABLE!r} in os.environ:\n    os.unlink({str(python)!r})\n"
    )
    packages = [path for path in sys.path if path.endswith("site-packages")]
    d.environ["PYTHONPATH"] = os.pathsep.join([d.environ["PYTHONPATH"], str(HERE.parent), *packages])
    d.processes.append(subprocess.Popen([python, "-m", "mlxd.supervisor"], env=d.environ, cwd="/", stderr=subprocess.PIPE))
    before = d.until("ready", settled)
    ran = d.mlxd("restart", "--supervisor")
    assert ran.returncode == 1 and "cannot be started" in ran.stderr and "the old one goes on" in ran.stderr, ran
    # Links, port and control socket are as they were.
    after = d.ready()
    assert pids(after) == pids(before) and after["supervisor"]["run"] == 1
    os.kill(after["engines"][0]["pid"], signal.SIGKILL)
    d.until("another engine", lambda s: s["state"] == "ready" and s["engines"][0]["pid"] != after["engines"][0]["pid"])
    assert d.get("/")[0] == 200
    ran = d.mlxd("restart", "--supervisor")
    assert ran.returncode == 1 and "cannot be started" in ran.stderr, ran
    python.symlink_to(Path(sys.executable).resolve())


def test_a_child_that_does_not_read_its_link_is_named_and_waited_for(daemon: Make) -> None:
    d = daemon(server="--want a:latest", MLXD_HEALTH_FROZEN_S="600", MLXD_HEALTH_SUSPECT_S="600", MLXD_HEALTH_INTERVAL_S="600")
    d.start()
    before = d.until("ready", settled)
    server = before["server"]["pid"]
    os.kill(server, signal.SIGSTOP)
    try:
        # Each end of an engine is told to the server, until the link to it is full.
        for _ in range(8):  # each end of an engine is told to the server, with its stacks
            engine = d.until("ready", lambda s: s["engines"][0]["state"] == "ready")["engines"][0]
            d.paths.dump(f"engine-{engine['slot']}").write_text("x" * 60_000)
            os.kill(engine["pid"], signal.SIGKILL)
            d.until("its end", lambda s, pid=engine["pid"]: s["last_exit"] and s["last_exit"]["pid"] == pid)
        ran = d.mlxd("restart", "--supervisor")
        assert ran.returncode == 1 and "server does not read its link; it goes on as before" in ran.stderr, ran
        assert d.status()["server"]["pid"] == server
    finally:
        os.kill(server, signal.SIGCONT)
    assert renew(d)["server"]["pid"] == server


def test_while_it_stops_or_is_being_replaced_a_supervisor_is_not_replaced(daemon: Make) -> None:
    d = daemon(server="--want a:latest --ignore-term", MLXD_SERVER_DRAIN_S="2")
    d.start()
    d.until("ready", settled)
    with asking(d, "restart_supervisor") as first:
        eventually(lambda: rehearsing(d.status()), "the rehearsal", d.history)
        with pytest.raises(MlxdError, match="is being replaced already"):
            control.ask(d.paths.control, "restart_supervisor")
        assert json.loads(first.readline())["supervisor"]["run"] == 2
    control.ask(d.paths.control, "stop")
    for verb in ("restart_supervisor", "restart", "reload"):
        with pytest.raises(MlxdError, match="mlxd is stopping"):
            control.ask(d.paths.control, verb)


def test_a_caller_who_says_nothing_or_too_much_holds_nobody_up(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    before = d.until("ready", settled)
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as verbose:
        for sock in (silent, verbose):
            sock.settimeout(60)
            sock.connect(str(d.paths.control))
        with suppress(ConnectionError):
            verbose.sendall(b"x" * 200_000)
            assert verbose.recv(100) == b""
        assert pids(renew(d)) == pids(before)
        with suppress(ConnectionError):
            assert silent.recv(100) == b""


def test_without_a_daemon_there_is_no_supervisor_to_restart(daemon: Make) -> None:
    ran = daemon().mlxd("restart", "--supervisor")
    assert (ran.returncode, ran.stderr) == (3, "Error: mlxd is not running; start it with `mlxd start`\n")


@pytest.mark.parametrize("value", ["no number", "999", "0"])
def test_a_process_that_nobody_hands_over_to_says_so(daemon: Make, value: str) -> None:
    d = daemon()
    d.environ[handover.VARIABLE] = value
    ran = subprocess.run(
        [sys.executable, "-m", "mlxd.supervisor"],
        env=d.environ,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert ran.returncode == 1 and ran.stderr.startswith("Error: ") and len(ran.stderr.splitlines()) == 1, ran


# --- versions -------------------------------------------------------------------------------------------------------------------


def test_newer_code_reads_what_it_knows_and_takes_defaults_for_the_rest() -> None:
    empty = handover.Handover()
    assert empty.settings.server.port == 11435 and not empty.places and not empty.descriptors
    older = handover.Handover(config={"server": {"port": 1, "gone_by_now": 2}, "no_such_section": {"a": 1}})
    assert older.settings.server.port == 1


def test_all_that_a_supervisor_knows_is_handed_over_or_made_anew() -> None:
    """Whoever adds an attribute decides here."""
    anew = {"paths", "flags", "handed", "boot", "boots", "exits", "timers", "readers", "tasks", "awaited", "handing_over", "bug"}
    anew |= {"poll", "loop", "done", "since", "files", "dump"} | {"stopping"}  # a supervisor that stops is not replaced
    anew |= {"papers", "answer", "strays", "strays_at", "strays_due", "processes", "hup"}
    named = {
        "config": "config",
        "server": "server",
        "retired": "retired",
        "engines": "engines",
        "pullers": "pullers",
        "lock": "lock_fd",
    }
    named |= {"port": "port_fds", "control": "control_fd", "events": "event_seq", "hook": "untold"}
    tree = ast.parse(Path(supervisor.__file__).read_text())
    assigned = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == "self"
    }
    fields = set(handover.Handover.__struct_fields__)
    assert set(handover.SAME) | set(named.values()) <= fields
    assert assigned == anew | set(named) | set(handover.SAME)


@pytest.fixture
def upgradable(daemon: Make, home: Path) -> Callable[[], tuple[Daemon, Path]]:
    """A daemon of a copy of mlxd, and the copy."""

    def make() -> tuple[Daemon, Path]:
        copy = home / "installed" / "mlxd"
        shutil.copytree(Path(mlxd.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "builtin"))
        d = daemon(server="--want a:latest")
        d.environ["PYTHONPATH"] = str(copy.parent)
        return d, copy

    return make


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def upgrade(copy: Path) -> None:
    rewrite(copy / "__init__.py", f'__version__ = "{mlxd.__version__}"', '__version__ = "99.0"')


def test_after_an_upgrade_the_status_says_what_is_left_to_restart(upgradable: Callable[[], tuple[Daemon, Path]]) -> None:
    d, copy = upgradable()
    d.start()
    before = d.until("ready", settled)
    assert before["notes"] == []
    upgrade(copy)
    told = renew(d)
    now = mlxd.__version__
    assert told["version"] == "99.0" and pids(told) == pids(before)
    children = ", ".join(f"{name} is of mlxd {now}" for name in ("server", "engine-1"))
    assert told["notes"] == [f"{children}, the supervisor of 99.0: run `mlxd restart`"]
    ran = d.mlxd("restart")
    assert ran.returncode == 0, ran
    told = d.until("no note", lambda s: s["notes"] == [] and settled(s))
    assert not set(pids(told)) & set(pids(before))


def test_a_child_that_is_newer_than_the_supervisor_is_noted_too(upgradable: Callable[[], tuple[Daemon, Path]]) -> None:
    d, copy = upgradable()
    d.start()
    before = d.until("ready", settled)
    upgrade(copy)
    os.kill(before["server"]["pid"], signal.SIGKILL)
    note = f"server is of mlxd 99.0, the supervisor of {mlxd.__version__}: run `mlxd restart --supervisor`"
    d.until("the note", lambda s: s["notes"] == [note])


def test_a_supervisor_of_another_protocol_replaces_every_child(upgradable: Callable[[], tuple[Daemon, Path]]) -> None:
    d, copy = upgradable()
    d.start()
    before = d.until("ready", settled)
    rewrite(copy / "messages.py", f"PROTOCOL = {messages.PROTOCOL}\n", f"PROTOCOL = {messages.PROTOCOL + 1}\n")
    os.kill(before["server"]["pid"], signal.SIGKILL)
    told = d.until("held", lambda s: s["state"] == "held")
    assert "run `mlxd restart --supervisor`" in told["reason"]
    renew(d)
    told = d.until("new children", settled)
    assert not set(pids(told)) & set(pids(before))


# --- links ----------------------------------------------------------------------------------------------------------------------


def test_nothing_on_a_link_is_lost_or_heard_twice_when_it_is_taken_apart() -> None:
    words = [messages.Want(f"model-{n}", "/somewhere" * 100) for n in range(200)]
    whole = b"".join(messages.line(word) for word in words)

    async def through() -> list[Any]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        heard: list[Any] = []
        unread = b""
        theirs.sendall(whole[:1000])
        for n in range(20):  # the link of each is closed; its socket lives on
            mine = await Link.open(socket.socket(fileno=os.dup(ours.fileno())), messages.child_words, unread)
            theirs.sendall(whole[1000 + n * 5000 : 1000 + (n + 1) * 5000])
            heard.append(await mine.read())
            fd, unread = await mine.part()
            assert fd >= 0
            mine.close()
            await asyncio.sleep(0)
        ours.setblocking(False)
        last = await Link.open(ours, messages.child_words, unread)
        theirs.sendall(whole[101_000:])
        theirs.shutdown(socket.SHUT_WR)
        while (word := await last.read()) is not None:
            heard.append(word)
        last.close()
        theirs.close()
        return heard

    assert len(whole) > 101_000
    assert asyncio.run(through()) == words


def test_a_link_whose_other_side_is_gone_has_no_parts() -> None:
    async def closed() -> tuple[int, bytes]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        mine = await Link.open(ours, messages.child_words)
        theirs.close()
        mine.close()
        return await mine.part()

    assert asyncio.run(closed()) == (-1, b"")


# --- a changed configuration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "server", "engine"),
    [
        ("[server]\nmax_concurrent = 5\n", True, True),
        pytest.param("[health]\nmax_time_s = 9\n", False, False, marks=pytest.mark.full),
        pytest.param("[server]\nmax_queue = 7\n", True, False, marks=pytest.mark.full),
        pytest.param("[engine]\nprefill_tokens = 256\n", False, True, marks=pytest.mark.full),
        pytest.param("[health]\nsilent_s = 250\n", True, False, marks=pytest.mark.full),
        pytest.param("[health]\ncanary_s = 250\n", False, True, marks=pytest.mark.full),
    ],
)
def test_a_change_replaces_what_reads_it_and_a_stream_goes_on(real: Make, text: str, server: bool, engine: bool) -> None:
    d = real()
    d.start()
    before = d.until("ready", settled)
    stream = Stream(before["port"], LONGEST)
    pieces = stream.pieces()
    said = [next(pieces) for _ in range(10)]

    def ask() -> None:
        assert chat(before["port"], QUESTION)["message"]["content"] == ANSWER

    def applied(s: Status) -> bool:
        others = s["server"]["pid"] != before["server"]["pid"], s["engines"][0]["pid"] != before["engines"][0]["pid"]
        return (
            "the configuration changed" in d.log() and settled(s) and s["server"]["state"] == "ready" and others == (server, engine)
        )

    with clients(2, ask):
        d.paths.config.write_text(text)
        d.until("the change", applied)
    assert "".join(said + list(pieces)) == LONG[LONGEST]


def test_an_engine_that_is_replaced_for_a_change_is_not_said_to_have_died(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--load-s 3")
    d.start()
    d.ready()
    d.paths.config.write_text("[engine]\nprefill_tokens = 256\n")
    told = d.until("the load", lambda s: s["engines"][0]["state"] == "loading")
    assert (told["state"], told["reason"]) == ("degraded", "engine-1 (a:latest) is being replaced")
    d.ready()


def test_a_burst_of_writes_is_one_change_and_the_same_again_is_none(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    before = d.until("ready", settled)
    for n in range(20):
        d.paths.config.write_text(f"[server]\nmax_queue = {n}\n")
    d.until("the new server", lambda s: settled(s) and s["server"]["restarts"] == 1 and s["server"]["state"] == "ready")
    d.paths.config.write_text("# the same\n[server]\nmax_queue = 19\n")
    assert d.mlxd("reload").stdout == "nothing changed\n"
    d.paths.env_file.write_text("MLXD_SERVER_MAX_QUEUE=20\n")
    told = d.until("a third server", lambda s: settled(s) and s["server"]["restarts"] == 2 and s["server"]["state"] == "ready")
    assert d.log().count("the configuration changed") == 2
    assert told["engines"][0]["pid"] == before["engines"][0]["pid"] and told["supervisor"]["pid"] == before["supervisor"]["pid"]


def test_a_new_port_is_moved_to_and_a_taken_one_is_refused(daemon: Make) -> None:
    d = daemon()
    with socket.create_server(("127.0.0.1", 0)) as stranger, socket.create_server(("127.0.0.1", 0)) as free:
        taken, there = stranger.getsockname()[1], free.getsockname()[1]
        free.close()
        del d.environ["MLX_API_PORT"]
        d.paths.config.write_text("[server]\nport = 0\n")
        d.start()
        before = d.ready()
        d.paths.config.write_text(f"[server]\nport = {taken}\nmax_queue = 7\n")
        told = d.until("the refusal", lambda s: s["state"] == "degraded")
        sentence = f"the new configuration is refused, the old one is in force: port {taken} is held by pid {os.getpid()}"
        assert told["reason"].startswith(sentence) and told["port"] == before["port"]
        assert told["server"]["pid"] == before["server"]["pid"] and d.get("/")[0] == 200
        ran = d.mlxd("reload")
        assert ran.returncode == 75 and f"port {taken} is held by" in ran.stderr
        d.paths.config.write_text(f"[server]\nport = {there}\n")
        d.until("the new port", lambda s: s["state"] == "ready" and s["port"] == there and s["server"]["restarts"] == 1)
        assert d.get("/")[0] == 200


def test_another_host_on_the_same_port_has_to_wait_for_a_stop(daemon: Make) -> None:
    d = daemon()
    del d.environ["MLX_API_PORT"]
    d.paths.config.write_text("[server]\nport = 0\n")
    d.start()
    port = d.ready()["port"]
    d.paths.config.write_text(f"[server]\nport = {port}\nhost = '127.0.0.1'\n")
    ran = d.mlxd("reload")
    assert ran.returncode == 78, ran
    assert f"mlxd itself holds port {port}; another host on it takes effect after `mlxd stop` and `mlxd start`" in ran.stderr
    d.paths.config.write_text(f"[server]\nport = {port}\n")  # the number that it has anyhow
    d.until("the change", lambda s: s["state"] == "ready" and s["server"]["restarts"] == 1 and s["server"]["state"] == "ready")
    assert d.status()["port"] == port and d.get("/")[0] == 200


def test_other_files_under_the_same_name_are_loaded(real: Make, home: Path) -> None:
    for directory in ("models", "others"):
        shutil.copytree(Path(mlxd.__file__).parent / "builtin", home / directory / "copy")
    d = real(MLX_PRELOAD_MODELS="copy")
    del d.environ["MLX_MODELS_DIR"]
    d.paths.config.write_text(f"[models]\ndir = '{home}/models'\n")
    d.start()
    before = d.until("ready", settled)
    d.paths.config.write_text(f"[models]\ndir = '{home}/others'\n")
    told = d.until("another engine", lambda s: settled(s) and s["engines"][0]["pid"] != before["engines"][0]["pid"])
    assert told["engines"][0]["model"] == "copy:latest"
    assert chat(told["port"], QUESTION, "copy")["message"]["content"] == ANSWER


# --- servers that drain ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.full)])
def test_several_servers_drain_at_once_and_each_ends_its_stream(real: Make, count: int) -> None:
    d = real()
    d.start()
    before = d.until("ready", settled)
    streams = []
    for n in range(count):
        stream = Stream(before["port"], LONGEST)
        pieces = stream.pieces()
        streams.append((pieces, [next(pieces)]))
        control.ask(d.paths.control, "restart")
        d.until("the next server", lambda s, n=n: s["server"]["restarts"] == n + 1 and s["server"]["state"] == "ready")
    for pieces, text in streams:
        assert "".join(text + list(pieces)) == LONG[LONGEST]
    after = d.until("ready", settled)
    assert after["engines"][0]["pid"] == before["engines"][0]["pid"] and after["engines"][0]["restarts"] == 0
    eventually(lambda: sum(1 for record in d.exits() if record["child"] == "server") == count, "their ends", d.history)
    assert {record["cause"] for record in d.exits()} == {"stopped"}


def test_a_draining_server_gets_a_model_that_nobody_has_loaded(real: Make, home: Path) -> None:
    """A client's idle connection stays with the server that drains, and its next request may be for any model."""
    shutil.copytree(Path(mlxd.__file__).parent / "builtin", home / "models" / "copy")
    d = real(MLX_PRELOAD_MODELS="mlxd-tiny")
    d.start()
    port = d.until("ready", settled)["port"]
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in sock.recv(65536)
        control.ask(d.paths.control, "restart")
        d.until("the new server", lambda s: s["server"]["restarts"] == 1 and s["server"]["state"] == "ready")
        body = body_of(QUESTION, "copy")
        sock.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        data = b""
        while more := sock.recv(65536):
            data += more
    assert json.loads(data.partition(b"\r\n\r\n")[2])["message"]["content"] == ANSWER
    told = d.until("ready", settled)  # the new server has it now
    assert "copy:latest" in [engine["model"] for engine in told["engines"]]
    assert chat(port, QUESTION, "copy")["message"]["content"] == ANSWER


def test_a_model_that_a_draining_server_still_needs_can_be_had_back(real: Make) -> None:
    """Released by the new server, its engine lives on for the old one's stream; that is no reason to wait for the end of the stream."""
    d = real(MLXD_ENGINE_COMMAND=FAKE_ENGINE)
    d.start()
    before = d.until("ready", settled)
    stream = Stream(before["port"], "n=80 delay=0.5")
    pieces = stream.pieces()
    next(pieces)
    control.ask(d.paths.control, "restart")
    d.until("the stream, and the new server", lambda s: s["engines"][0]["running"] and s["server"]["restarts"] == 1 and settled(s))
    assert post(before["port"], "/api/generate", b'{"model": "mlxd-tiny", "keep_alive": 0}')[0] == 200
    assert chat(before["port"], "n=2")["message"]["content"] == "w0 w1 "
    assert not d.exits()  # the old server still has its stream, and that its engine
    stream.sock.close()
    assert d.status()["engines"][0]["pid"] == before["engines"][0]["pid"]


def test_the_oldest_of_too_many_draining_servers_gets_less_time(daemon: Make) -> None:
    d = daemon(server="--ignore-term", MLXD_SERVER_DRAIN_S="0")
    d.start()
    first = d.ready()["server"]["pid"]
    for n in range(supervisor.MOST_DRAINING):
        control.ask(d.paths.control, "restart")
        d.until("the next server", lambda s, n=n: s["server"]["restarts"] == n + 1 and s["server"]["state"] == "ready")
    assert not d.exits()
    control.ask(d.paths.control, "restart")
    d.until("the end of the oldest", lambda s: s["last_exit"] and s["last_exit"]["pid"] == first)
    assert len(d.exits()) == 1
