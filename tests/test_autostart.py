"""Autostart: what launchd and systemd are given to read, and that mlxd then has one owner."""

from __future__ import annotations

import json
import os
import plistlib
import pty
import pwd
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, Stubs, eventually, http

from mlxd import autostart, managers, paths
from mlxd.autostart import Account
from mlxd.config import Config
from mlxd.errors import ConfigError, MlxdError
from mlxd.managers import Launchd, Manager, Systemd

ENVIRON = {"HOME": "/Users/ann", "MLXD_HOME": "/Users/ann/state", "MLX_API_PORT": "11500", "PATH": "/usr/bin:/bin"}
ANALYZE = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")


def files(manager: Manager, environ: dict[str, str] = ENVIRON, account: Account | None = None) -> dict[str, bytes]:
    return autostart.rendered(manager, paths.locate(environ), Config(), autostart.chosen(environ), account)


def unit(name: str = Systemd.mlxd, **more: Any) -> dict[str, list[str]]:
    """A unit's keys, each with all its values."""
    found: dict[str, list[str]] = {}
    for line in files(Systemd(), **more)[name].decode().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


# --- the texts --------------------------------------------------------------------------------------------------------------------


def test_launchd_gets_a_foreground_command_with_absolute_paths_and_the_environment() -> None:
    job = plistlib.loads(files(Launchd())["local.mlxd.plist"])
    assert job.pop("EnvironmentVariables") == {
        "HOME": "/Users/ann",
        "MLXD_HOME": "/Users/ann/state",
        "MLX_API_PORT": "11500",
        "PATH": f"{Path(sys.executable).parent}:/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    }
    assert job == {
        "Label": Launchd.mlxd,
        "ProgramArguments": [sys.executable, "-m", "mlxd", "run"],
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 10,
        "ExitTimeOut": 60,
        "ProcessType": "Interactive",
        "SoftResourceLimits": {"NumberOfFiles": 8192},
        "Umask": 0o077,
        "WorkingDirectory": "/",
        "LimitLoadToSessionType": ["Aqua", "Background"],
        "StandardOutPath": "/Users/ann/state/logs/supervisor.log",
        "StandardErrorPath": "/Users/ann/state/logs/supervisor.log",
    }


def test_launchd_runs_recover_at_load_and_every_five_minutes() -> None:
    job = plistlib.loads(files(Launchd())["local.mlxd.recover.plist"])
    assert (job["Label"], job["RunAtLoad"], job["StartInterval"]) == (Launchd.recover, True, 300)
    assert job["ProgramArguments"] == [sys.executable, "-m", "mlxd", "recover"] and "KeepAlive" not in job
    assert job["AbandonProcessGroup"] is True


def test_a_daemon_of_the_machine_runs_as_whoever_installed_it() -> None:
    for text in files(Launchd(system=True), account=Account("ann", 501, 20)).values():
        job = plistlib.loads(text)
        assert job["UserName"] == "ann" and "LimitLoadToSessionType" not in job


def test_systemd_tries_for_ever_with_growing_pauses() -> None:
    keys = unit()
    expected = {
        "Restart": "on-failure",
        "RestartSec": "1",
        "RestartSteps": "6",
        "RestartMaxDelaySec": "60",
        "StartLimitIntervalSec": "0",
    }
    assert {key: keys[key] for key in expected} == {key: [value] for key, value in expected.items()}
    assert keys["RestartPreventExitStatus"] == ["78"]


def test_systemd_gets_a_foreground_command_that_speaks_to_it() -> None:
    keys = unit()
    assert keys["ExecStart"] == [f'"{sys.executable}" -m mlxd run'] and keys["ExecReload"] == [f'"{sys.executable}" -m mlxd reload']
    expected = {"Type": "notify", "NotifyAccess": "main", "WatchdogSec": "60", "TimeoutAbortSec": "10", "KillMode": "mixed"}
    expected |= {"OOMPolicy": "continue", "UMask": "0077", "WantedBy": "default.target", "NoNewPrivileges": "yes"}
    expected |= {"RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK"}
    assert {key: keys[key] for key in expected} == {key: [value] for key, value in expected.items()}
    assert '"MLX_API_PORT=11500"' in keys["Environment"]
    assert unit("mlxd-recover.service")["ExecStart"] == [f'"{sys.executable}" -m mlxd recover']
    assert unit("mlxd-recover.service")["KillMode"] == ["process"]
    assert unit("mlxd-recover.timer")["OnUnitInactiveSec"] == ["5min"]


def test_the_managers_wait_longer_than_the_worst_stop_takes() -> None:
    limits = Config()
    worst = limits.server.drain_s + limits.supervisor.term_s + limits.supervisor.kill_s
    given = [plistlib.loads(files(Launchd())["local.mlxd.plist"])["ExitTimeOut"], float(unit()["TimeoutStopSec"][0])]
    assert given == [60, 60] and worst + 5 <= 60 and managers.STOP_S > 60


def test_no_token_is_written_where_everybody_may_read_it() -> None:
    environ = ENVIRON | {"HF_TOKEN": "hf_secret", "MLXD_SECURITY_TOKEN": "s3cret", "OPENAI_API_KEY": "sk-secret", "EDITOR": "vi"}
    for manager in (Launchd(), Systemd()):
        assert files(manager, environ) == files(manager)


def test_what_a_unit_exports_is_read_back_as_it_was(home: Path) -> None:
    environ = ENVIRON | {"MLX_MODELS_DIR": 'a "b" \\c 100% $HOME é', "HF_HOME": "x=y"}
    for manager in (Launchd(directory=home), Systemd(directory=home)):
        manager.file(manager.mlxd).write_bytes(files(manager, environ)[manager.file(manager.mlxd).name])
        assert autostart.environment_of(manager.file(manager.mlxd)) == autostart.chosen(environ)
    with pytest.raises(ConfigError, match="cannot hold 'MLX_MODELS_DIR="):
        files(Systemd(), ENVIRON | {"MLX_MODELS_DIR": "a\nExecStart=/bin/evil"})


@ANALYZE
@pytest.mark.parametrize("account", [None, Account(pwd.getpwuid(1).pw_name, 1, 1)], ids=["user", "system"])
def test_systemd_understands_the_units(home: Path, account: Account | None) -> None:
    for name, text in files(Systemd(), account=account).items():
        (home / name).write_bytes(text)
    scope = [] if account else ["--user"]
    environ = os.environ | {"XDG_RUNTIME_DIR": str(home)}
    names = [str(home / name) for name in (Systemd.mlxd, Systemd.recover)]
    ran = subprocess.run(["systemd-analyze", *scope, "verify", *names], capture_output=True, text=True, env=environ, check=False)
    said = [line for line in (ran.stdout + ran.stderr).splitlines() if "mlxd" in line]
    unknown = ("Unknown key 'RestartSteps'", "Unknown key 'RestartMaxDelaySec'")  # before 254
    assert [line for line in said if not any(key in line for key in unknown)] == []


@ANALYZE
def test_the_unit_of_the_machine_is_hardened(home: Path) -> None:
    (home / Systemd.mlxd).write_bytes(files(Systemd(), account=Account(pwd.getpwuid(1).pw_name, 1, 1))[Systemd.mlxd])
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(home / Systemd.mlxd)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for mlxd.service: (\d+\.\d+)", ran.stdout)
    assert found is not None and float(found[1]) <= 2.0, ran.stdout + ran.stderr


# --- one owner --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def managed(daemon: Callable[..., Daemon], stubs: Stubs, home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Daemon]:
    """A daemon whose launchctl or systemctl is a stub, and whose user has a home of its own."""
    user = home / "user"
    user.mkdir()
    own = {"HOME": str(user), "PATH": f"{stubs.directory}:{os.environ['PATH']}"}
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    return lambda **settings: daemon(**own, **settings)


def minded(stubs: Stubs) -> bool:
    """Whether its manager looks every five minutes whether it is up."""
    return managers.manager().recover in json.loads((stubs.directory / "jobs.json").read_text())


def asked(stubs: Stubs) -> list[list[str]]:
    return stubs.calls("launchctl" if sys.platform == "darwin" else "systemctl")


def test_mlxd_is_installed_changed_stopped_started_and_uninstalled_through_its_manager(
    managed: Callable[..., Daemon], stubs: Stubs
) -> None:
    d = managed()
    ran = d.mlxd("autostart", "install")
    assert ran.returncode == 0 and ran.stdout.startswith("installed\n"), ran.stderr
    first = d.ready()["supervisor"]["pid"]
    told = json.loads(d.mlxd("autostart", "status", "--json").stdout)
    assert (told["installed"], told["enabled"], told["recover"], told["pid"]) == (True, True, True, first)
    asked(stubs)
    assert d.mlxd("autostart", "install").stdout.startswith("installed already, and nothing has changed\n")
    verbs = {words[1] if words[0] == "--user" else words[0] for words in asked(stubs)}
    assert verbs and verbs <= {"show", "print"}
    assert d.ready()["supervisor"]["pid"] == first
    d.environ["MLX_MAX_CONCURRENT"] = "7"
    assert d.mlxd("autostart", "install", "--json").returncode == 0
    second = d.ready()["supervisor"]["pid"]
    assert second != first
    ran = d.mlxd("stop")
    assert (ran.returncode, ran.stdout) == (0, f"stopped  pid {second}\n") and d.ours() == []
    assert minded(stubs) is False
    assert d.mlxd("stop").stdout == "mlxd is not running\n"
    assert d.mlxd("start").returncode == 0 and minded(stubs)
    managers.manager().stop(managers.manager().recover)
    assert json.loads(d.mlxd("autostart", "status", "--json").stdout)["recover"] is False
    assert d.mlxd("autostart", "install").stdout.startswith("installed\n") and minded(stubs)
    told = json.loads(d.mlxd("autostart", "status", "--json").stdout)
    assert told["pid"] == d.ready()["supervisor"]["pid"] and told["environment"]["MLX_MAX_CONCURRENT"] == "7"
    assert d.mlxd("autostart", "uninstall").stdout == "uninstalled, and stopped\n"
    assert d.ours() == [] and d.mlxd("autostart", "status").returncode == 1
    manager = managers.manager()
    assert [file for names in manager.jobs.values() for file in names if (manager.directory / file).exists()] == []
    assert d.mlxd("autostart", "uninstall").stdout == "autostart is not installed\n"


def test_when_the_manager_fails_to_start_it_mlxd_is_not_started_beside_it(managed: Callable[..., Daemon], stubs: Stubs) -> None:
    d = managed()
    autostart.write(managers.manager(), d.environ)
    failure = [[1, "Job for mlxd.service failed"]]
    stubs.script(start=failure, bootstrap=failure)
    ran = d.mlxd("start")
    assert ran.returncode == 1 and "was refused: Job for mlxd.service failed" in ran.stderr
    assert d.ours() == []


def test_a_mlxd_that_ends_at_once_is_told_with_its_status(managed: Callable[..., Daemon], stubs: Stubs) -> None:
    d = managed()
    autostart.write(managers.manager(), d.environ)
    nothing = [[None, ""]] * 9
    ended = "LoadState=loaded\nActiveState=failed\nMainPID=0\nExecMainStatus=78"
    stubs.script(start=[[0, ""]], bootstrap=[[0, ""]], print=nothing, show=[[0, ended]])
    if sys.platform == "darwin":
        stubs.script(bootstrap=[[0, ""]], print=[[0, ""], [113, ""], [0, "\tstate = not running\n\tlast exit code = 78\n"]])
    ran = d.mlxd("start")
    assert ran.returncode == 78 and "which ended with status 78: look at `" in ran.stderr


def test_where_the_five_minutes_look_cannot_be_ended_stop_says_what_will_happen(
    managed: Callable[..., Daemon], stubs: Stubs
) -> None:
    d = managed()
    assert d.mlxd("autostart", "install").returncode == 0
    recover = managers.manager().recover
    no = [[1, "Access denied"]]
    stubs.script(**{f"stop {' '.join(Systemd.jobs[Systemd.recover])}": no, f"bootout gui/{os.getuid()}/{Launchd.recover}": no})
    ran = d.mlxd("stop")
    assert ran.returncode == 0 and ran.stdout.startswith("stopped  pid ")
    assert ran.stderr.startswith(f"{recover} will start mlxd again within 5 min: ") and "Access denied" in ran.stderr


def test_port_and_model_cannot_be_given_to_a_mlxd_that_its_manager_starts(managed: Callable[..., Daemon]) -> None:
    d = managed()
    autostart.write(managers.manager(), d.environ)
    ran = d.mlxd("start", "--port", "11500")
    assert ran.returncode == 78 and f"put them into {d.paths.config}, or set MLX_API_PORT" in ran.stderr
    assert d.ours() == []


def test_a_mlxd_with_another_home_is_no_business_of_the_managers(managed: Callable[..., Daemon], stubs: Stubs, home: Path) -> None:
    d = managed()
    autostart.write(managers.manager(), d.environ | {"MLXD_HOME": str(home / "other")})
    assert d.mlxd("start").returncode == 0
    ran = d.mlxd("autostart", "install")
    assert ran.returncode == 1 and f"is for another mlxd, in {home / 'other'}; `mlxd autostart uninstall` first" in ran.stderr
    assert d.mlxd("stop").returncode == 0
    assert asked(stubs) == []


def test_a_mlxd_that_runs_by_hand_is_given_to_the_manager(managed: Callable[..., Daemon]) -> None:
    d = managed()
    pid = d.start()["supervisor"]["pid"]
    ran = d.mlxd("autostart", "install")
    assert ran.returncode == 0 and f"mlxd runs by hand, pid {pid}: it is stopped" in ran.stderr
    told = json.loads(d.mlxd("autostart", "status", "--json").stdout)
    assert told["pid"] == d.ready()["supervisor"]["pid"] != pid


def test_what_mlxd_would_not_start_with_is_not_installed(managed: Callable[..., Daemon], stubs: Stubs) -> None:
    d = managed(MLX_MAX_CONCURRENT="many")
    ran = d.mlxd("autostart", "install")
    assert ran.returncode == 78 and ran.stderr == "Error: MLX_MAX_CONCURRENT must be a number, not 'many'\n"
    assert autostart.owner(d.environ) is None and asked(stubs) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is told so")
def test_mlxd_does_not_run_as_root_for_the_machine(managed: Callable[..., Daemon]) -> None:
    ran = managed().mlxd("autostart", "install", "--system")
    assert ran.returncode == 1 and "log in as the user that it shall run as, and use sudo there" in ran.stderr


def test_the_command_for_sudo_carries_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    somebody = pwd.getpwuid(1)
    monkeypatch.setenv("SUDO_USER", somebody.pw_name)
    if os.geteuid() != 0:
        somebody = pwd.getpwuid(os.getuid())
    with pytest.raises(MlxdError) as refused:
        autostart.invoker({"HOME": "/elsewhere", "MLX_API_PORT": "11500", "PATH": "/bin"})
    command = f"sudo env HOME={somebody.pw_dir} MLX_API_PORT=11500 {sys.executable} -m mlxd autostart install --system"
    assert str(refused.value) == f"this needs root; run: {command}"


def test_the_command_and_the_environment_of_the_plist_come_up_ready_on_their_port(
    daemon: Callable[..., Daemon], home: Path
) -> None:
    d = daemon(server=None, engine=None, MLX_MODELS_DIR=str(home / "models"), HF_HOME=str(home / "hub"), HOME=str(home))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    d.environ["MLX_API_PORT"] = str(port)
    job = plistlib.loads(files(Launchd(), d.environ)["local.mlxd.plist"])
    assert job["EnvironmentVariables"]["MLX_API_PORT"] == str(port)
    paths.prepare(d.paths)
    with open(job["StandardErrorPath"], "ab") as log:
        process = subprocess.Popen(
            job["ProgramArguments"], env=job["EnvironmentVariables"], cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    d.processes.append(process)
    assert eventually(d.status, "an answer", d.history)["port"] == port
    d.ready()
    assert http(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[0] == 200


# --- uninstall --------------------------------------------------------------------------------------------------------------------


def test_uninstall_asks_first_and_refuses_where_nobody_can_answer(managed: Callable[..., Daemon]) -> None:
    d = managed()
    d.start()
    ran = d.mlxd("uninstall", "--purge")
    assert ran.returncode == 1 and ran.stderr.endswith("and there is nobody to ask: add --yes\n") and str(d.home) in ran.stderr
    ours, theirs = pty.openpty()
    os.write(ours, b"n\n")
    command = [sys.executable, "-m", "mlxd", "uninstall"]
    refused = subprocess.run(command, env=d.environ, stdin=theirs, capture_output=True, text=True, timeout=60, check=False)
    os.close(ours)
    os.close(theirs)
    assert refused.returncode == 1 and "Stop mlxd and remove its autostart? [y/N]" in refused.stdout + refused.stderr
    assert d.ready()


def test_a_purge_leaves_the_models_and_nothing_else(managed: Callable[..., Daemon], home: Path) -> None:
    d = managed(MLX_MODELS_DIR=str(home / "models"))
    (home / "models/mine").mkdir(parents=True)
    (home / "models/mine/config.json").write_text("{}")
    d.paths.config.write_text("[server]\nmax_queue = 9\n")
    d.start()
    d.ready()
    d.mlxd("recover")
    for file in (d.paths.chat_history, d.paths.aliases.with_suffix(".lock")):
        file.touch()
    assert d.paths.recovery_lock.exists()
    d.paths.state.with_name("state.json.bad").write_text("{")
    ran = d.mlxd("uninstall", "--purge", "--yes")
    assert ran.returncode == 0, ran.stderr
    left = {str(file.relative_to(home)) for file in home.rglob("*") if file.is_file() and "stubs" not in file.parts}
    assert left == {"models/mine/config.json"} and d.ours() == []
