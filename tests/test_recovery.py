"""The outside view: what `mlxd check` sees, what `mlxd recover` and `mlxd monitor` repair, and what they leave alone.

Ollama is a fake server on a port of its own, its owner a stub on PATH that records what it is asked and does it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Daemon, eventually
from neighbours import FAKE as FAKE_OLLAMA
from neighbours import Answering, Neighbour, accepts, free_port, neighbour

from mlxd import autostart, leftovers, ollama, owners
from mlxd.config import Config
from mlxd.leftovers import Process
from mlxd.managers import Systemd
from mlxd.owners import Owner
from mlxd.probe import Look
from mlxd.recovery import Action, Memory, Mlx, decide

__all__ = ["neighbour"]

#: One look and short deadlines.
BRISK = {"MLXD_HEALTH_MISSES": "1", "MLX_HEALTH_MAX_TIME": "2", "MLXD_RECOVERY_SETTLE_S": "20"}
#: Of those that have to do with a supervisor that answers nobody.
SILENT = {"MLXD_RECOVERY_SILENT_S": "1"}


@pytest.fixture
def mlxd(daemon: Callable[..., Daemon], home: Path) -> Callable[..., Daemon]:
    """A daemon of fake children, not started, whose Ollama is nowhere unless told."""

    def make(**settings: str) -> Daemon:
        return daemon(**BRISK | {"OLLAMA_URL": f"http://127.0.0.1:{free_port()}"} | settings)

    return make


class Told:
    """What a command printed as JSON, and its status."""

    def __init__(self, d: Daemon, command: str):
        ran = d.mlxd(command, "--json")
        assert ran.stdout, ran.stderr
        self.code = ran.returncode
        told = json.loads(ran.stdout)
        self.services: dict[str, Any] = {service["name"]: service for service in told["services"]}
        assert told["up"] is (self.code == 0)

    def __getitem__(self, name: str) -> Any:
        return self.services[name]


def remembered(d: Daemon) -> dict[str, Any]:
    return json.loads(d.paths.recovery.read_text()) if d.paths.recovery.exists() else {"actions": {}}


# --- deciding ---------------------------------------------------------------------------------------------------------------------

SELF = Owner("systemd --user", "do it", lambda: None)
ROOT = Owner("systemd", "sudo it")
NOW = 10_000.0


def acts(*ages: float, undone: int = 0) -> list[Action]:
    return [Action(NOW - age, "", undone=n < undone) for n, age in enumerate(ages)]


@pytest.mark.parametrize(
    ("look", "allowed", "owner", "done", "act", "advice"),
    [
        (Look("up"), "", SELF, [], False, ""),
        (Look("degraded"), "", SELF, [], False, ""),
        (Look("down"), "", SELF, [], True, "do it"),
        (Look("hung"), "", SELF, [], True, "do it"),
        (Look("wedged"), "", SELF, [], True, "do it"),
        (Look("silent"), "", SELF, [], True, "do it"),
        (Look("down", supervised=True), "", SELF, [], False, "mlxd repairs it by itself"),
        (Look("held", supervised=True, advice="wait"), "", SELF, [], False, "wait"),
        (Look("stranger", advice="end it"), "", SELF, [], False, "end it"),
        (Look("down"), "set it", SELF, [], False, "do it; set it"),
        (Look("down"), "", ROOT, [], False, "sudo it"),
        (Look("down"), "", SELF, acts(3000, 2000), True, "do it"),
        (Look("down"), "", SELF, acts(3000, 2000, 1000), False, "the next in 10 min, or do it"),
        (Look("down"), "", SELF, acts(3700, 2000, 1000), True, "do it"),
        (Look("down"), "", SELF, acts(2000, 1000, undone=1), True, "do it"),
        (Look("down"), "", SELF, acts(2000, 1000, undone=2), False, "was ended twice within the hour"),
        (Look("down"), "", SELF, acts(3700, 3650, undone=2), True, "do it"),
    ],
)
def test_what_is_done_follows_from_what_was_found(
    look: Look, allowed: str, owner: Owner, done: list[Action], act: bool, advice: str
) -> None:
    decided, words = decide(look, allowed, owner, done, NOW, 3)
    assert decided is act
    assert advice in words if advice else not words


def test_with_no_action_allowed_none_is_taken() -> None:
    assert decide(Look("down"), "", SELF, [], NOW, 0)[0] is False


# --- looking ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "state", "reason"),
    [
        ("ollama", "up", ""),
        ("hung", "hung", "has not answered within 0.3 s"),
        ("drip", "hung", "has not answered within 0.3 s"),
        ("stuck", "wedged", "/api/version answers"),
        ("wedged", "wedged", "/api/version answers"),
        ("stopping", "wedged", "/api/version answers"),
        ("stranger", "stranger", "not Ollama (status 200)"),
        ("redirect", "stranger", "not Ollama (status 302)"),
        ("failing", "stranger", "not Ollama (status 500)"),
    ],
)
def test_ollama_is_seen_as_it_is(neighbour: Callable[..., Neighbour], mode: str, state: str, reason: str) -> None:
    look = ollama.look(neighbour("--as", mode).url, 0.3, 0.3)
    assert look.state == state
    assert reason in look.reason
    if state == "up":
        assert (look.version, look.models, look.memory_bytes) == ("0.12.0", ["llama3:8b"], 5_000_000_000)


def test_an_ollama_that_is_not_there_is_down() -> None:
    assert ollama.look(f"http://127.0.0.1:{free_port()}", 1).state == "down"


@pytest.mark.parametrize("head", [b"HTTP/1.1 " + b"2" * 5000 + b" OK", b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000])
def test_a_number_without_end_is_no_reason_to_fail(head: bytes) -> None:
    with Answering(lambda: iter([head + b"\r\n\r\n{}"])) as there:
        assert ollama.look(there.url, 5).state == "stranger"


def test_models_that_are_no_list_are_none() -> None:
    with Answering(lambda: iter([b'HTTP/1.1 200 OK\r\n\r\n{"version": "0.12.0", "models": 5}'])) as there:
        look = ollama.look(there.url, 5)
    assert (look.state, look.models) == ("up", [])


def test_a_name_that_no_resolver_takes_is_down() -> None:
    assert ollama.look("http://a..b:11434", 1).state == "down"


def test_what_speaks_no_http_is_a_stranger() -> None:
    with Answering(lambda: iter([b"220 mail.example.com ESMTP\r\n"])) as there:
        look = ollama.look(there.url, 5)
    assert look.state == "stranger" and look.advice


def test_without_the_probe_no_model_is_asked(neighbour: Callable[..., Neighbour], tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    assert ollama.look(neighbour("--as", "wedged", "--requests", str(asked)).url, 5).state == "up"
    assert "/api/generate" not in asked.read_text()


def test_the_probe_leaves_a_model_as_long_loaded_as_it_was(neighbour: Callable[..., Neighbour], tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    assert ollama.look(neighbour("--requests", str(asked)).url, 5, 5).state == "up"
    body = json.loads(asked.read_text().partition("POST /api/generate ")[2])
    assert body["model"] == "llama3:8b" and body["options"] == {"num_predict": 1}
    assert 0 < body["keep_alive"] <= 300


@pytest.mark.parametrize(
    ("expires", "keep_alive"),
    [
        ("2026-01-01T12:05:00.123456789+00:00", 300),
        ("2026-01-01T14:05:00+02:00", 300),
        ("2318-04-11T23:47:16Z", -1),
        ("2026-01-01T11:50:00Z", 0),
        ("2026-01-01T12:00:05Z", None),
        ("2026-01-01T11:59:00Z", None),
        ("never", None),
        ("2026-01-01T12:05:00", None),
        (None, None),
    ],
)
def test_only_a_model_that_stays_or_is_stuck_is_asked(expires: str | None, keep_alive: int | None) -> None:
    now = datetime(2026, 1, 1, 12, tzinfo=UTC)
    body = ollama.question([{"name": "a", "expires_at": expires}], now)
    assert (json.loads(body)["keep_alive"] if body else None) == keep_alive


# --- mlxd check -------------------------------------------------------------------------------------------------------------------


def test_check_shows_what_is_up_and_what_to_do(mlxd: Callable[..., Daemon], neighbour: Callable[..., Neighbour]) -> None:
    d = mlxd(OLLAMA_URL=neighbour().url)
    ran = d.mlxd("check")
    assert ran.returncode == 1
    head, mlx, neighbours = ran.stdout.splitlines()
    assert head.split() == ["service", "address", "state", "latency", "owner", "what", "to", "do"]
    assert mlx.split()[:1] == ["mlx"] and "down" in mlx and "mlxd start" in mlx
    assert neighbours.split()[2] == "up" and "ms" in neighbours
    d.start()
    d.ready()
    told = Told(d, "check")
    assert told.code == 0
    assert told["mlx"]["state"] == "ready" and told["mlx"]["address"] == d.status()["url"]
    assert set(told["mlx"]) >= {"name", "address", "state", "well", "wanted", "latency_s", "owner", "reason", "advice"}


def test_what_is_not_wanted_is_shown_and_never_counts(mlxd: Callable[..., Daemon]) -> None:
    told = Told(mlxd(MLX_API_URL="disabled"), "check")
    assert told.code == 0 and told["mlx"]["wanted"] is False and told["ollama"]["wanted"] is False
    assert told["mlx"]["state"] == told["ollama"]["state"] == "down"


@pytest.mark.parametrize("name", ["WANTED", "RECOVER"])
def test_a_wanted_ollama_counts(mlxd: Callable[..., Daemon], name: str) -> None:
    told = Told(mlxd(MLX_API_URL="", **{f"MLXD_OLLAMA_{name}": "1"}), "check")
    assert told.code == 1 and told["ollama"]["wanted"] is True


def test_ollama_at_mlxds_own_address_is_told(mlxd: Callable[..., Daemon]) -> None:
    told = Told(mlxd(MLX_API_PORT="18435", OLLAMA_URL="http://localhost:18435", MLXD_OLLAMA_WANTED="1"), "check")
    assert told["ollama"]["state"] == "stranger" and "set OLLAMA_URL" in told["ollama"]["advice"]


def test_a_stranger_on_mlxds_port_is_named_and_left_alone(mlxd: Callable[..., Daemon], neighbour: Callable[..., Neighbour]) -> None:
    stranger = neighbour("--as", "stranger")
    d = mlxd(MLX_API_PORT=str(stranger.port))
    told = Told(d, "recover")
    assert told.code == 1
    assert told["mlx"]["state"] == "stranger" and f"pid {stranger.pid} " in told["mlx"]["reason"]
    assert accepts(stranger.port) and not d.status() and remembered(d)["actions"] == {}


@pytest.mark.parametrize(("command", "name"), [("check", "MLX_API_URL"), ("recover", "OLLAMA_URL"), ("monitor", "MLX_API_PORT")])
def test_a_bad_variable_is_exit_78(mlxd: Callable[..., Daemon], command: str, name: str) -> None:
    ran = mlxd(**{name: "nas:x"}).mlxd(command)
    assert ran.returncode == 78 and name in ran.stderr


# --- mlxd recover: mlxd -------------------------------------------------------------------------------------------------------------


def test_recover_starts_a_dead_supervisor_and_says_why(mlxd: Callable[..., Daemon]) -> None:
    d = mlxd()
    told = Told(d, "recover")
    assert told.code == 0, d.history()
    assert told["mlx"]["state"] == "ready" and "because it was down" in told["mlx"]["did"]
    before = d.status()
    os.kill(before["supervisor"]["pid"], signal.SIGKILL)
    told = Told(d, "recover")
    assert told.code == 0, d.history()
    assert d.status()["supervisor"]["pid"] != before["supervisor"]["pid"]
    assert [action["well"] for action in remembered(d)["actions"]["mlx"]] == [True, True]
    assert "restarting it through mlxd" in d.log("recovery")
    again = Told(d, "recover")
    assert again.code == 0 and again["mlx"]["did"] == ""


def test_while_the_supervisor_answers_the_repair_is_its_own(mlxd: Callable[..., Daemon]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        d = mlxd(MLX_API_PORT=str(stranger.getsockname()[1]))
        before = d.start()
        d.until("held", lambda s: s["state"] == "held")
        told = Told(d, "recover")
        assert told.code == 1
        assert told["mlx"]["state"] == "held" and "waits" in told["mlx"]["advice"] and told["mlx"]["did"] == ""
        assert d.status()["supervisor"]["pid"] == before["supervisor"]["pid"]


def test_a_stopped_supervisor_goes_on_with_all_it_has(mlxd: Callable[..., Daemon]) -> None:
    d = mlxd(**SILENT)
    d.start()
    before = d.ready()
    os.kill(before["supervisor"]["pid"], signal.SIGSTOP)
    assert Told(d, "check")["mlx"]["state"] == "silent"
    told = Told(d, "recover")
    assert told.code == 0 and "because it was silent" in told["mlx"]["did"]
    after = d.status()
    assert after["supervisor"]["pid"] == before["supervisor"]["pid"] and after["server"]["pid"] == before["server"]["pid"]


HANG = """
import fcntl, os, socket, sys, time
from mlxd import leftovers, paths
where = paths.locate()
paths.prepare(where)
lock = open(where.lock, "w")
fcntl.flock(lock, fcntl.LOCK_EX)
control = socket.socket(socket.AF_UNIX)
control.bind(str(where.control))
control.listen()
if "proven" in sys.argv:
    paths.write_atomically(where.state, leftovers.memory_of([], leftovers.boot_id()))
print("hangs", flush=True)
time.sleep(3600)
"""


@contextlib.contextmanager
def hung_supervisor(d: Daemon, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", HANG, *arguments], env=d.environ, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with process:
        yield process
        process.kill()


def test_a_supervisor_that_answers_nobody_is_ended_and_a_new_one_started(mlxd: Callable[..., Daemon]) -> None:
    d = mlxd(**SILENT)
    with hung_supervisor(d, "proven") as hung:
        reaped = threading.Thread(target=hung.wait)
        reaped.start()
        told = Told(d, "recover")
        reaped.join(timeout=10)
        assert hung.returncode == -signal.SIGTERM
        assert told.code == 0 and told["mlx"]["state"] == "ready", d.history()


def test_who_holds_the_lock_and_is_not_proven_ours_is_never_signalled(mlxd: Callable[..., Daemon]) -> None:
    d = mlxd(**SILENT)
    with hung_supervisor(d) as hung:
        d.paths.pid_file.write_text(f"{hung.pid}\n")  # a number proves nothing
        told = Told(d, "recover")
        assert told.code == 1 and told["mlx"]["state"] == "stranger" and "find out who holds" in told["mlx"]["advice"]
        assert hung.poll() is None


def test_a_mlxd_of_the_machine_is_only_reported_to_who_may_not_start_it(
    monkeypatch: pytest.MonkeyPatch, mlxd: Callable[..., Daemon]
) -> None:
    """By a stand-in for what only root can install, and for not being root."""
    monkeypatch.setattr(autostart, "owner", lambda: Systemd(system=True))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    service = Mlx(mlxd().paths, Config(), wanted=True)
    down = service.owner(Look("down"), Memory())
    assert (down.name, down.remedy, down.restart) == ("systemd", "sudo systemctl start mlxd.service", None)
    assert service.owner(Look("silent"), Memory()).restart == service.wake_or_end  # systemd begins it again


def test_a_start_that_fails_is_told_with_its_words(mlxd: Callable[..., Daemon]) -> None:
    d = mlxd()
    d.paths.home.mkdir(exist_ok=True)
    d.paths.token.write_text("x")
    told = Told(d, "recover")
    assert (
        told.code == 1 and "`mlxd start` ended with status 78: " in told["mlx"]["did"] and str(d.paths.token) in told["mlx"]["did"]
    )


# --- mlxd recover: Ollama -----------------------------------------------------------------------------------------------------------

SYSTEMCTL = """#!/bin/sh
echo "systemctl $*" >>{here}/calls
case "$*" in
"--user show ollama.service"*|"show ollama.service"*)
    case "$1" in --user) kind=user ;; *) kind=system ;; esac
    test -e {here}/$kind || {{ echo LoadState=not-found; exit 0; }}
    printf 'LoadState=loaded\\nActiveState=active\\nMainPID=%s\\n' "$(cat {here}/pid 2>/dev/null || echo 0)" ;;
"--user restart ollama.service"|"--user restart backend.service") . {here}/on-restart ;;
"--user show backend.service"*) printf 'LoadState=loaded\\nActiveState=active\\nMainPID=0\\n' ;;
*) echo LoadState=not-found ;;
esac
"""


class Unit:
    """Ollama as a unit of a stub `systemctl`."""

    def __init__(self, here: Path):
        self.here = here
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.pid_file = here / "pid"
        self.script("systemctl", SYSTEMCTL.format(here=here))
        self.start = f"{sys.executable} {FAKE_OLLAMA} serve --port {self.port} --pid-file {self.pid_file}"
        self.on_restart(f"kill -9 $(cat {self.pid_file}) 2>/dev/null; {self.start} >/dev/null 2>&1 &")

    def on_restart(self, line: str) -> None:
        (self.here / "on-restart").write_text(line + "\n")

    def script(self, name: str, text: str) -> None:
        file = self.here / name
        file.write_text(text)
        file.chmod(0o755)

    def is_of(self, kind: str) -> None:
        """user or system."""
        (self.here / kind).touch()

    def begin(self, mode: str = "ollama") -> int:
        subprocess.Popen([*shlex.split(self.start), "--as", mode], start_new_session=True).returncode = 0
        eventually(lambda: self.pid_file.exists() and self.pid_file.read_text() and accepts(self.port), "Ollama")
        return self.pid

    @property
    def pid(self) -> int:
        return int(self.pid_file.read_text())

    def kill(self) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)

    def restarts(self) -> int:
        calls = self.here / "calls"
        return calls.read_text().count("restart") if calls.exists() else 0


@pytest.fixture
def unit(tmp_path: Path) -> Iterator[Unit]:
    one = Unit(tmp_path)
    yield one
    one.kill()


@pytest.fixture
def minder(mlxd: Callable[..., Daemon], unit: Unit) -> Callable[..., Daemon]:
    """A home whose Ollama is the unit's, which may be repaired; mlxd itself is not wanted."""

    def make(**settings: str) -> Daemon:
        d = mlxd(**{"MLX_API_URL": "disabled", "OLLAMA_URL": unit.url, "MLXD_OLLAMA_RECOVER": "1"} | settings)
        d.environ["PATH"] = f"{unit.here}:{d.environ['PATH']}"
        return d

    return make


@pytest.mark.parametrize("mode", ["down", "hung", "wedged"])
def test_ollama_is_restarted_through_the_unit_that_runs_it(minder: Callable[..., Daemon], unit: Unit, mode: str) -> None:
    unit.is_of("user")
    before = unit.begin(mode) if mode != "down" else 0
    d = minder(MLXD_OLLAMA_PROBE="1", MLXD_HEALTH_STALLED_S="1")
    told = Told(d, "recover")
    assert told.code == 0, told["ollama"]
    assert told["ollama"]["state"] == "up" and told["ollama"]["owner"] == "systemd --user"
    assert f"because it was {mode}" in told["ollama"]["did"]
    assert unit.pid != before and unit.restarts() == 1


def test_without_leave_ollama_is_only_looked_at(minder: Callable[..., Daemon], unit: Unit) -> None:
    unit.is_of("user")
    told = Told(minder(MLXD_OLLAMA_RECOVER="0", MLXD_OLLAMA_WANTED="1"), "recover")
    assert told.code == 1 and "`[ollama] recover = true`" in told["ollama"]["advice"]
    assert unit.restarts() == 0


def test_a_unit_of_root_is_only_reported(minder: Callable[..., Daemon], unit: Unit) -> None:
    unit.is_of("system")
    pid = unit.begin("hung")
    told = Told(minder(), "recover")
    assert told.code == 1 and told["ollama"]["advice"] == "sudo systemctl restart ollama.service"
    assert unit.restarts() == 0 and psutil.pid_exists(pid)


def test_an_ollama_of_nobody_that_we_know_is_only_reported(minder: Callable[..., Daemon], unit: Unit) -> None:
    unit.is_of("user")
    pid = unit.begin("hung")
    unit.pid_file.write_text("1")  # the unit runs another process
    told = Told(minder(), "recover")
    assert told.code == 1 and told["ollama"]["owner"] == "unknown" and f"pid {pid} " in told["ollama"]["advice"]
    assert unit.restarts() == 0 and psutil.pid_exists(pid)
    unit.pid_file.write_text(str(pid))


@pytest.mark.parametrize("mode", ["stranger", "redirect"])
def test_a_stranger_on_ollamas_port_is_never_touched(minder: Callable[..., Daemon], unit: Unit, mode: str) -> None:
    unit.is_of("user")
    pid = unit.begin(mode)
    told = Told(minder(), "recover")
    assert told.code == 1 and told["ollama"]["state"] == "stranger"
    assert unit.restarts() == 0 and psutil.pid_exists(pid) and accepts(unit.port)


def test_an_ollama_on_another_machine_is_only_reported(minder: Callable[..., Daemon], unit: Unit) -> None:
    told = Told(minder(OLLAMA_URL="http://127.0.0.2:9"), "recover")
    assert told.code == 1 and told["ollama"]["owner"] == "another machine"


def test_three_repairs_an_hour_are_all_whatever_the_run(minder: Callable[..., Daemon], unit: Unit) -> None:
    unit.is_of("user")
    unit.on_restart("exit 0")  # says that it did
    d = minder(MLXD_RECOVERY_SETTLE_S="0")
    for number in (1, 2):
        told = Told(d, "recover")
        assert told.code == 1 and "restarted through" in told["ollama"]["did"] and unit.restarts() == number
    actions = remembered(d)
    actions["actions"]["ollama"] *= 2  # and two by `mlxd monitor`
    d.paths.recovery.write_text(json.dumps(actions))
    told = Told(d, "recover")
    assert told.code == 1 and "left alone: 4 repairs" in told["ollama"]["advice"] and unit.restarts() == 2
    for action in actions["actions"]["ollama"]:
        action["at"] = time.time() - 3601
    d.paths.recovery.write_text(json.dumps(actions))
    Told(d, "recover")
    assert unit.restarts() == 3


def test_a_fight_with_another_owner_is_left_after_two_rounds(minder: Callable[..., Daemon], unit: Unit) -> None:
    unit.is_of("user")
    d = minder()
    for _ in range(2):
        assert Told(d, "recover").code == 0
        os.kill(unit.pid, signal.SIGTERM)  # Ollama.app ends every other `ollama serve`
        eventually(lambda: not accepts(unit.port), "its end")
    told = Told(d, "recover")
    assert told.code == 1 and "was ended twice within the hour" in told["ollama"]["advice"]
    assert unit.restarts() == 2


def test_two_that_recover_at_once_repair_once(minder: Callable[..., Daemon], unit: Unit) -> None:
    unit.is_of("user")
    d = minder()
    running = [
        subprocess.Popen([sys.executable, "-m", "mlxd", "recover"], env=d.environ, stdout=subprocess.DEVNULL) for _ in range(3)
    ]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0]
    assert unit.restarts() == 1


def test_an_owner_that_refuses_is_quoted(minder: Callable[..., Daemon], unit: Unit) -> None:
    unit.is_of("user")
    unit.on_restart("echo 'Unit is masked.' >&2; exit 1")
    told = Told(minder(), "recover")
    assert told.code == 1 and "could not be restarted through systemd --user" in told["ollama"]["did"]
    assert "Unit is masked." in told["ollama"]["did"]


def test_what_cannot_be_counted_is_not_done(minder: Callable[..., Daemon], unit: Unit) -> None:
    unit.is_of("user")
    d = minder()
    d.paths.recovery.mkdir(parents=True)
    told = Told(d, "recover")
    assert told.code == 1 and "without keeping count" in told["ollama"]["did"] and unit.restarts() == 0


def test_a_clock_that_was_ten_years_ahead_forbids_nothing(minder: Callable[..., Daemon], unit: Unit) -> None:
    unit.is_of("user")
    d = minder()
    d.paths.home.mkdir(exist_ok=True)
    action = {"at": time.time() + 10 * 365 * 86400, "why": ""}
    d.paths.recovery.write_text(json.dumps({"actions": {"ollama": [action] * 3}}))
    assert Told(d, "recover").code == 0 and unit.restarts() == 1


def test_a_damaged_memory_is_as_good_as_none(minder: Callable[..., Daemon], unit: Unit) -> None:
    unit.is_of("user")
    d = minder()
    d.paths.home.mkdir(exist_ok=True)
    d.paths.recovery.write_bytes(b'{"actions": {"ollama": [{"at"')
    assert Told(d, "recover").code == 0
    assert len(remembered(d)["actions"]["ollama"]) == 1


def test_an_ollama_that_nobody_owns_is_begun_and_minded_by_mlxd(minder: Callable[..., Daemon], unit: Unit) -> None:
    mode = unit.here / "mode"
    mode.write_text("ollama")
    unit.script("ollama", f'#!/bin/sh\nexec {sys.executable} {FAKE_OLLAMA} "$@" --as-file {mode} --pid-file {unit.pid_file}\n')
    d = minder(OLLAMA_HOST="http://127.0.0.1:9", MLX_HEALTH_MAX_TIME="0.5")  # as after `mlxd env`
    told = Told(d, "recover")
    assert told.code == 0 and told["ollama"]["owner"] == "mlxd", told["ollama"]
    first = unit.pid
    assert remembered(d)["ollama"]["pid"] == first
    mode.write_text("hung")
    assert Told(d, "check")["ollama"]["owner"] == "mlxd"
    restarted = subprocess.Popen([sys.executable, "-m", "mlxd", "recover"], env=d.environ, stdout=subprocess.DEVNULL)
    eventually(lambda: not psutil.pid_exists(first), "its end")
    mode.write_text("ollama")
    assert restarted.wait(timeout=60) == 0
    assert unit.pid != first and unit.restarts() == 0


# --- mlxd recover: other services ---------------------------------------------------------------------------------------------------


def test_other_services_are_restarted_by_their_owner_or_command(minder: Callable[..., Daemon], unit: Unit) -> None:
    d = minder(MLXD_OLLAMA_RECOVER="0")
    d.paths.home.mkdir(exist_ok=True)
    port, failing = free_port(), free_port()
    d.paths.config.write_text(
        f'[[services]]\nname = "backend"\nurl = "{unit.url}/"\nowner = "systemd:backend.service"\n'
        f'[[services]]\nname = "page"\nurl = "http://127.0.0.1:{port}/"\ncommand = ["/bin/sh", "-c", "echo no such page; exit 3"]\n'
        f'[[services]]\nname = "seen"\nurl = "http://127.0.0.1:{failing}/"\nmax_actions = 0\n'
    )
    told = Told(d, "recover")
    assert told.code == 1
    assert told["backend"]["state"] == "up" and told["backend"]["owner"] == "systemd --user" and unit.restarts() == 1
    assert "status 3" in told["page"]["did"] and "no such page" in d.log("recovery")
    assert told["seen"]["state"] == "down" and told["seen"]["owner"] == "unknown" and told["seen"]["did"] == ""


def test_a_service_is_up_only_with_a_good_status(mlxd: Callable[..., Daemon], neighbour: Callable[..., Neighbour]) -> None:
    d = mlxd(MLX_API_URL="disabled")
    d.paths.home.mkdir(exist_ok=True)
    states = {"redirect": "failing", "failing": "failing", "hung": "hung", "stranger": "up"}
    tables = (f'[[services]]\nname = "{mode}"\nurl = "{neighbour("--as", mode).url}/"\n' for mode in states)
    d.paths.config.write_text("".join(tables))
    told = Told(d, "check")
    assert {mode: told[mode]["state"] for mode in states} == states


# --- owners on macOS, by their stubs ------------------------------------------------------------------------------------------------


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """launchctl, brew, open and osascript that record what they are asked; `print` of a job in `loaded` succeeds."""
    for name in ("launchctl", "brew", "open", "osascript"):
        file = tmp_path / name
        file.write_text(
            f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/calls\ncase "$*" in "print gui/"*/*) test -e {tmp_path}/loaded || exit 113;'
            f' printf "\\tstate = running\\n\\tpid = $(cat {tmp_path}/loaded)\\n" ;; esac\n'
        )
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def asked_of(stubs: Path) -> list[str]:
    return [line for line in (stubs / "calls").read_text().splitlines() if " print " not in line]


def test_on_macos_a_brew_service_is_kicked_by_launchd(stubs: Path) -> None:
    (stubs / "loaded").write_text(str(os.getpid()))
    owner = owners.of_ollama_on_macos(psutil.Process(), False, stubs)
    assert owner is not None and owner.name == "launchd" and owner.restart is not None
    owner.restart()
    assert asked_of(stubs) == [f"launchctl kickstart -k gui/{os.getuid()}/homebrew.mxcl.ollama"]
    assert owners.of_ollama_on_macos(psutil.Process(os.getppid()), False, stubs) is None  # it runs another process


def test_on_macos_an_unloaded_brew_service_is_begun_by_brew(stubs: Path) -> None:
    plist = stubs / "Library" / "LaunchAgents" / "homebrew.mxcl.ollama.plist"
    plist.parent.mkdir(parents=True)
    plist.touch()
    owner = owners.of_ollama_on_macos(None, True, stubs)
    assert owner is not None and owner.restart is not None
    owner.restart()
    assert asked_of(stubs) == ["brew services restart ollama"]
    assert owners.of_ollama_on_macos(None, False, stubs) is None  # another user's is on the port


def test_on_macos_the_app_is_opened_and_quit_before_if_it_runs(stubs: Path) -> None:
    inside = stubs / "Applications" / "Ollama.app"
    inside.mkdir(parents=True)
    owner = owners.of_ollama_on_macos(None, True, stubs)
    assert owner is not None and owner.name == "Ollama.app" and owner.restart is not None
    owner.restart()
    assert asked_of(stubs) == ["open -a Ollama"]
    real = inside / "sleep"
    real.write_bytes(Path("/bin/sleep").read_bytes())
    real.chmod(0o755)
    with subprocess.Popen([real, "60"]) as running:
        try:
            found = owners.of_ollama_on_macos(psutil.Process(running.pid), False, stubs)
            assert found is not None and found.name == "Ollama.app"
            owner.restart()
        finally:
            running.kill()
    assert asked_of(stubs)[1:] == ['osascript -e quit app "Ollama"', "open -a Ollama"]


def test_an_owner_of_the_configuration_is_asked_by_its_kind(stubs: Path) -> None:
    for name in ("launchd:com.example.backend", "brew:postgresql@16", "app:Backend"):
        restart = owners.named(name).restart
        assert restart is not None
        if name.startswith("launchd"):
            (stubs / "loaded").write_text("1")
        restart()
    assert asked_of(stubs) == [
        f"launchctl kickstart -k gui/{os.getuid()}/com.example.backend",
        "brew services restart postgresql@16",
        "open -a Backend",
    ]


# --- proofs -------------------------------------------------------------------------------------------------------------------------


def test_a_process_with_the_right_number_and_another_start_is_not_signalled() -> None:
    with subprocess.Popen(["/bin/sleep", "60"]) as other:
        try:
            proof = leftovers.process_of(other.pid)
            assert proof is not None and leftovers.lives(proof)
            assert leftovers.end(Process(other.pid, proof.identity + 1, proof.boot), 1, 1)
            assert leftovers.end(Process(other.pid, proof.identity, "another boot"), 1, 1)
            assert other.poll() is None
        finally:
            other.kill()


# --- mlxd monitor -------------------------------------------------------------------------------------------------------------------


def test_monitor_restarts_what_dies_says_why_and_stops_at_its_limit(mlxd: Callable[..., Daemon]) -> None:
    d = mlxd(MLXD_RECOVERY_MAX_RESTARTS="2")
    watching = subprocess.Popen(
        [sys.executable, "-m", "mlxd", "monitor", "--interval", "0.1"], env=d.environ, stdout=subprocess.PIPE, text=True
    )
    assert watching.stdout is not None
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(watching.stdout.readline, "")), daemon=True)  # type: ignore[union-attr]
    reader.start()
    try:
        eventually(lambda: any("restarted through mlxd" in line for line in lines), "a first round", lambda: str(lines))
        told = d.ready()
        os.kill(told["supervisor"]["pid"], signal.SIGKILL)
        d.until("another supervisor", lambda s: s["supervisor"]["pid"] != told["supervisor"]["pid"] and s["state"] == "ready")
        eventually(
            lambda: sum("restarted through mlxd because it was down" in line for line in lines) == 2,
            "two lines",
            lambda: str(lines),
        )
        os.kill(d.status()["supervisor"]["pid"], signal.SIGKILL)
        eventually(lambda: any("left alone: 2 repairs" in line for line in lines), "the limit", lambda: str(lines))
    finally:
        watching.send_signal(signal.SIGTERM)
    assert watching.wait(timeout=60) == 1
    reader.join(timeout=10)
    assert not d.status()


def test_monitor_in_the_background_of_a_script_ends_by_term(mlxd: Callable[..., Daemon]) -> None:
    d = mlxd(MLX_API_URL="disabled")
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-m", "mlxd", "monitor", "--json"]
    watching = subprocess.Popen(command, env=d.environ, stdout=subprocess.PIPE, text=True)
    assert watching.stdout is not None and json.loads(watching.stdout.readline())["name"] == "mlx"
    watching.terminate()
    assert watching.wait(timeout=60) == 0
    watching.stdout.close()


def test_what_lies_in_the_place_of_the_lock_is_named(mlxd: Callable[..., Daemon]) -> None:
    d = mlxd()
    d.paths.recovery_lock.mkdir(parents=True)
    ran = d.mlxd("recover")
    assert ran.returncode == 1 and ran.stderr.startswith(f"Error: cannot open {d.paths.recovery_lock}: "), ran.stderr


def test_what_lies_in_the_place_of_its_log_stops_no_repair(mlxd: Callable[..., Daemon]) -> None:
    d = mlxd()
    d.paths.log("recovery").mkdir(parents=True)
    assert Told(d, "recover").code == 0 and d.ready()


def test_monitor_survives_a_configuration_that_breaks_while_it_runs(mlxd: Callable[..., Daemon]) -> None:
    d = mlxd(MLX_API_URL="disabled")
    d.paths.home.mkdir(exist_ok=True)
    watching = subprocess.Popen(
        [sys.executable, "-m", "mlxd", "monitor", "--interval", "0.1", "--json"],
        env=d.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None and watching.stderr is not None
    try:
        assert json.loads(watching.stdout.readline())["name"] == "mlx"
        d.paths.config.write_text("[sever]\n")
        assert "the old one stays" in watching.stderr.readline()
    finally:
        watching.send_signal(signal.SIGINT)
        assert watching.wait(timeout=60) == 0
        watching.stdout.close()
        watching.stderr.close()
