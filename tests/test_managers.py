"""What launchd and systemd answer, and what is made of it: their programs are scripts on PATH that play what they are told to."""

from __future__ import annotations

import os
import plistlib
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Stubs

from mlxd import managers
from mlxd.errors import MlxdError
from mlxd.managers import Launchd, Systemd

JOB = Launchd.mlxd


@pytest.fixture
def launchd(stubs: Stubs, home: Path, monkeypatch: pytest.MonkeyPatch) -> Launchd:
    """A launchd that knows a job which begins no process, not loaded yet."""
    monkeypatch.setenv("PATH", f"{stubs.directory}:{os.environ['PATH']}")
    manager = Launchd(directory=home, retry_s=60.0)
    manager.file(JOB).write_bytes(plistlib.dumps({"Label": JOB, "ProgramArguments": [], "EnvironmentVariables": {}}))
    return manager


def verbs(stubs: Stubs) -> list[str]:
    return [words[0] for words in stubs.calls("launchctl") if words[0] != "print"]


def test_a_job_is_loaded_after_launchd_has_twice_said_not_now(launchd: Launchd, stubs: Stubs) -> None:
    eio = [5, "Bootstrap failed: 5: Input/output error"]
    stubs.script(bootstrap=[eio, eio])
    launchd.start(JOB)
    assert launchd.look(JOB).loaded
    assert verbs(stubs) == ["enable", "bootstrap", "bootstrap", "bootstrap"]


def test_a_job_that_is_loaded_although_launchd_said_not_now_is_not_loaded_twice(launchd: Launchd, stubs: Stubs) -> None:
    launchd.start(JOB)
    stubs.calls("launchctl")
    launchd.bootstrap(JOB)
    assert verbs(stubs) == ["enable", "bootstrap"]


def test_a_job_that_cannot_be_loaded_is_an_error_in_launchds_words(launchd: Launchd, stubs: Stubs) -> None:
    launchd.retry_s = 0.0
    stubs.script(bootstrap=[[5, "Bootstrap failed: 5: Input/output error\nTry again as root."]] * 9)
    with pytest.raises(MlxdError, match=r"`launchctl bootstrap gui/\d+ .*` was refused: Bootstrap failed: 5: Input/output error$"):
        launchd.start(JOB)
    assert not launchd.look(JOB).loaded


@pytest.mark.parametrize("status", [112, 125])
def test_without_a_login_session_the_user_domain_is_used(launchd: Launchd, stubs: Stubs, status: int) -> None:
    stubs.script(**{f"print gui/{os.getuid()}": [[status, "Could not find domain"]]})
    launchd.start(JOB)
    assert launchd.domain == f"user/{os.getuid()}"
    assert ["bootstrap", f"user/{os.getuid()}", str(launchd.file(JOB))] in stubs.calls("launchctl")


def test_neither_domain_is_an_error(launchd: Launchd, stubs: Stubs) -> None:
    stubs.script(print=[[125, "Domain does not support specified action"]] * 2)
    with pytest.raises(MlxdError, match="Domain does not support specified action"):
        launchd.look(JOB)


def test_a_refusal_by_a_domain_that_is_there_is_an_error_and_no_reason_for_another_domain(launchd: Launchd, stubs: Stubs) -> None:
    stubs.script(bootstrap=[[125, "Domain does not support specified action"]])
    with pytest.raises(MlxdError, match="Domain does not support specified action"):
        launchd.start(JOB)
    assert not [words for words in stubs.calls("launchctl") if "user/" in " ".join(words)]


def test_a_job_is_loaded_anew_only_when_the_old_one_is_gone(launchd: Launchd, stubs: Stubs) -> None:
    launchd.start(JOB)
    stubs.script(**{"bootout lasts": 3, "bootout": [[None, ""]]})
    stubs.calls("launchctl")
    launchd.install(JOB)
    asked = [words[0] for words in stubs.calls("launchctl")]
    assert asked.index("bootstrap") > asked.index("bootout") + 3
    assert asked.count("bootstrap") == 1 and launchd.look(JOB).loaded


def test_a_bootout_in_progress_is_waited_for(launchd: Launchd, stubs: Stubs) -> None:
    stubs.script(bootout=[[36, "Boot-out failed: 36: Operation now in progress"]])
    launchd.stop(JOB)
    assert not launchd.look(JOB).loaded


def test_a_restart_by_launchd_unloads_nothing(launchd: Launchd, stubs: Stubs) -> None:
    launchd.start(JOB)
    stubs.calls("launchctl")
    launchd.restart(JOB)
    launchd.start(JOB)
    assert verbs(stubs) == ["kickstart", "kickstart"]


def test_what_launchd_prints_is_understood() -> None:
    text = (
        "gui/501/local.mlxd = {\n\tactive count = 1\n\tstate = spawn scheduled\n\n\tlast exit code = 78: EX_CONFIG\n\tpid = 4711\n}"
    )
    assert managers.word(text, "state") == "spawn scheduled"
    assert managers.number(managers.word(text, "pid")) == 4711
    assert managers.number(managers.word(text, "last exit code")) == 78
    assert managers.number("(never exited)") is None


def test_a_program_that_is_missing_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home))
    for manager, program in ((Launchd(directory=home), "launchctl"), (Systemd(directory=home), "systemctl")):
        with pytest.raises(MlxdError, match=f"there is no `{program}` on this machine"):
            manager.look(manager.mlxd)


def test_a_program_that_hangs_is_given_up() -> None:
    with pytest.raises(MlxdError, match="`sleep 600` has not ended within 0.05 s"):
        managers.call("sleep", "600", deadline_s=0.05)


def test_a_session_without_a_bus_is_told_what_to_do(stubs: Stubs, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{stubs.directory}:{os.environ['PATH']}")
    stubs.script(start=[[1, "Failed to connect to bus: No medium found"]])
    with pytest.raises(MlxdError, match=r"No medium found; log in as this user, or set XDG_RUNTIME_DIR=/run/user/\d+"):
        Systemd(directory=home).start(Systemd.mlxd)


@pytest.mark.parametrize(
    ("manager", "command"), [("Launchd", "launchctl bootout system/local.mlxd"), ("Systemd", "systemctl stop mlxd.service")]
)
def test_the_jobs_of_the_machine_are_left_to_root(stubs: Stubs, home: Path, manager: str, command: str) -> None:
    code = f"from mlxd.managers import {manager} as M; M(system=True).stop(M.mlxd)"
    nobody = {"user": 65534} if os.geteuid() == 0 else {}
    try:
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **nobody)
    except PermissionError:
        pytest.skip("nobody may not run this Python, and root may do everything")
    assert f"this is installed for the whole machine and needs root: sudo {command}" in ran.stderr
