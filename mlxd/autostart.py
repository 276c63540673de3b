"""Autostart: the files by which launchd and systemd begin mlxd, and whose mlxd they are for.

Renders the templates in launchd/ and systemd/ with absolute paths and the environment of whoever installs; knows what is installed.
How a manager is asked is the business of `managers`.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxd import config, managers, paths
from mlxd.errors import ConfigError, MlxdError
from mlxd.managers import Launchd, Manager, Systemd

#: Beside every setting: where things are, and what else mlxd reads.
CARRIED = (
    *("HOME", "MLXD_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "MLX_API_URL", "OLLAMA_URL", "CUDA_VISIBLE_DEVICES"),
)
#: Of these, and of the settings: directories.
PLACES = {"MLXD_HOME", "HF_HOME", "HF_HUB_CACHE", "MLX_MODELS_DIR"}
#: What must not lie in a file that everybody may read.
SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")
#: launchd's own PATH lacks Homebrew, and the installing shell's may name directories of that day.
PATH = "/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Account:
    """Whom a job of the whole machine runs as; it never runs as root."""

    name: str
    uid: int
    gid: int


# --- what is installed ------------------------------------------------------------------------------------------------------------


def owner(environ: Mapping[str, str] = os.environ) -> Manager | None:
    """The manager that begins the mlxd of this environment; None when it is begun by hand. Asks no manager: reads two small files."""
    return next((m for m in map(managers.manager, (False, True)) if is_for(m, environ)), None)


def is_for(manager: Manager, environ: Mapping[str, str]) -> bool:
    """Whether what is installed there is the mlxd of this environment: one with another home is another mlxd."""
    installed = environment_of(manager.file(manager.mlxd))
    return installed is not None and place(installed) == place(environ)


def place(environ: Mapping[str, str]) -> str:
    """Where the state is, comparable."""
    if home := environ.get("MLXD_HOME"):
        return str(Path(home).expanduser().absolute())
    return environ.get("XDG_STATE_HOME") or str(Path(environ.get("HOME") or Path.home()) / ".local/state")


def environment_of(file: Path) -> dict[str, str] | None:
    """What a job's file exports; None without such a file."""
    try:
        text = file.read_bytes()
    except OSError:
        return None
    if file.suffix == ".plist":
        import plistlib

        try:
            found: dict[str, str] = plistlib.loads(text)["EnvironmentVariables"]
        except Exception as error:  # plistlib raises whatever expat, its own parser or a lookup does
            raise MlxdError(f"{file} is damaged: remove it, and run `mlxd autostart install` again") from error
        return found
    pairs = re.findall(r'^Environment="(.*)"$', text.decode(), re.MULTILINE)
    return dict(re.sub(r"\\(.)", r"\1", pair).replace("%%", "%").split("=", 1) for pair in pairs)


def report(manager: Manager) -> dict[str, Any]:
    """How what is installed stands, for programs. Raises MlxdError when the manager cannot be asked."""
    file = manager.file(manager.mlxd)
    environment = environment_of(file)
    told: dict[str, Any] = {
        "manager": manager.name,
        "system": manager.system,
        "installed": environment is not None,
        "file": str(file),
    }
    if environment is not None:
        job, recover = manager.look(manager.mlxd), manager.look(manager.recover)
        told |= {
            "enabled": job.enabled,
            "state": job.state,
            "pid": job.pid,
            "recover": recover.enabled and not recover.rests,
            "begins": manager.begins(),
            "environment": environment,
        }
    return told


# --- installing and removing ------------------------------------------------------------------------------------------------------


def write(manager: Manager, environ: Mapping[str, str] = os.environ) -> set[str]:
    """Write the files that have the manager begin the mlxd of this environment; the names of those that were not so already.

    Raises MlxdError, and ConfigError when mlxd would not start with this environment.
    """
    environment = chosen(environ)
    account = invoker(environment) if manager.system else None
    refuse_a_second(manager, environ)
    where = paths.locate(environ)
    settings = config.load(where.config, [where.env_file], environment).config
    make_directories(where, account, environment)
    changed = set()
    for name, text in rendered(manager, where, settings, environment, account).items():
        file = manager.directory / name
        if paths.read_small(file) != text:
            changed.add(name)
            try:
                manager.directory.mkdir(parents=True, exist_ok=True)
                paths.write_atomically(file, text)
                file.chmod(0o644)  # both managers read it for everybody
            except OSError as error:
                raise MlxdError(f"cannot write {file}: {error.strerror}; make {manager.directory} yours (`sudo chown`)") from error
    return changed


def load(manager: Manager, changed: set[str]) -> bool:
    """Have the manager begin what is written, now and at each boot or login; False when it does so already. Raises MlxdError."""
    if isinstance(manager, Systemd):
        manager.linger()
    begun = False
    for job, files in manager.jobs.items():
        found = manager.look(job)
        idle = found.pid is None if job == manager.mlxd else found.rests
        if changed & set(files) or not found.enabled or idle:
            manager.install(job)
            begun = True
    return begun


def remove(manager: Manager) -> bool:
    """Stop what the manager began and forget it; False when there was nothing. Raises MlxdError."""
    found = False
    for job, files in reversed(manager.jobs.items()):  # what would start mlxd again goes first
        if any((manager.directory / name).exists() for name in files):
            found = True
            if manager.needs_root:
                raise managers.no_root(sys.executable, "-m", "mlxd", "autostart", "uninstall", "--system")
            manager.remove(job)
    return found


def chosen(environ: Mapping[str, str]) -> dict[str, str]:
    """What of this environment the jobs get: every setting and where things are, never a token."""
    names = [name for name in (*CARRIED, *sorted(config.variables())) if name in environ and not SECRET.search(name)]
    found = {name: environ[name] for name in names}
    for name in PLACES & found.keys():  # a job's working directory is /
        found[name] = str(Path(found[name]).expanduser().absolute())
    return found | {"PATH": f"{Path(sys.executable).parent}:{PATH}"}


def invoker(environment: dict[str, str]) -> Account:
    """Who called sudo. Raises MlxdError with the command to type when nobody did, or when it is somebody else's environment."""
    name = os.environ.get("SUDO_USER", "root") if os.geteuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise MlxdError(f"there is no user {name} on this machine (SUDO_USER)") from None
    if os.geteuid() == 0 and found.pw_uid != 0 and environment.get("HOME") == found.pw_dir:
        return Account(name, found.pw_uid, found.pw_gid)
    if found.pw_uid == 0:
        raise MlxdError(
            "mlxd does not run as root for the whole machine: log in as the user that it shall run as, and use sudo there"
        )
    command = ["sudo", "env", *(f"{k}={v}" for k, v in (environment | {"HOME": found.pw_dir}).items() if k != "PATH")]
    raise MlxdError(
        f"this needs root; run: {shlex.join([*command, sys.executable, '-m', 'mlxd', 'autostart', 'install', '--system'])}"
    )


def refuse_a_second(manager: Manager, environ: Mapping[str, str]) -> None:
    """Two owners would fight, and a manager has room for one mlxd. Raises MlxdError."""
    other = managers.manager(not manager.system)
    if is_for(other, environ):
        raise MlxdError(f"{other.name} begins this mlxd already, by {other.file(other.mlxd)}; `{uninstalling(other)}` first")
    file = manager.file(manager.mlxd)
    installed = environment_of(file)
    if installed is not None and place(installed) != place(environ):
        raise MlxdError(f"{file} is for another mlxd, in {place(installed)}; `{uninstalling(manager)}` first")


def uninstalling(manager: Manager) -> str:
    return "mlxd autostart uninstall" + (" --system" if manager.system else "")


def make_directories(where: paths.Paths, account: Account | None, environment: dict[str, str]) -> None:
    """As the user that mlxd will run as: the manager wants the logs' directory, the hardened unit all of them. Raises MlxdError."""
    if account is None:
        paths.prepare(where)
        return
    if where.home not in where.run.parents:  # then they are in /tmp, of which each unit has its own
        raise MlxdError(f"sockets have no room in {where.home}: set MLXD_HOME to a shorter path")
    code = "from mlxd import paths; paths.prepare(paths.locate())"
    try:
        subprocess.run(
            [sys.executable, "-c", code],
            user=account.uid,
            group=account.gid,
            extra_groups=[],
            env=environment,
            cwd="/",
            capture_output=True,
            check=True,
        )
    except OSError as error:
        raise MlxdError(f"{account.name} cannot run {sys.executable}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        words = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise MlxdError(f"{account.name} cannot use {where.home}: {words}") from error


# --- rendering --------------------------------------------------------------------------------------------------------------------


def rendered(
    manager: Manager, where: paths.Paths, settings: config.Config, environment: dict[str, str], account: Account | None
) -> dict[str, bytes]:
    """The files of both jobs, by name."""
    if isinstance(manager, Launchd):
        return {
            f"{manager.mlxd}.plist": plist("mlxd.plist", "run", environment, account, where.log("supervisor")),
            f"{manager.recover}.plist": plist("mlxd-recover.plist", "recover", environment, account),
        }
    from mlxd.models import hub_directory

    writable = [where.home, where.logs, where.config_dir, Path(settings.models.dir).expanduser(), hub_directory(environment)]
    values = {
        "MLXD": f"{quoted(sys.executable).replace('$', '$$')} -m mlxd",
        "ENVIRONMENT": "\n".join(f"Environment={quoted(f'{name}={value}')}" for name, value in environment.items()),
        "TARGET": "multi-user.target" if account else "default.target",
        "ACCOUNT": f"User={account.name}\nGroup={account.gid}" if account else "",
        "WRITABLE": " ".join(quoted(f"-{path}") for path in dict.fromkeys(writable)),
    }
    return {
        Systemd.mlxd: unit("mlxd.service", values) + (unit("mlxd-hardened.conf", values) if account else b""),
        "mlxd-recover.service": unit("mlxd-recover.service", values),
        Systemd.recover: unit("mlxd-recover.timer", values),
    }


def plist(name: str, verb: str, environment: dict[str, str], account: Account | None, log: Path | None = None) -> bytes:
    """A launchd job. `log`: for a death before the supervisor has opened its log."""
    import plistlib

    job: dict[str, Any] = plistlib.loads(template("launchd", name))
    job["ProgramArguments"] = [sys.executable, "-m", "mlxd", verb]
    job["EnvironmentVariables"] = environment
    if log is not None:
        job["StandardOutPath"] = job["StandardErrorPath"] = str(log)
    if account is not None:
        job["UserName"] = account.name
        del job["LimitLoadToSessionType"]  # of agents
    return plistlib.dumps(job)


def unit(name: str, values: dict[str, str]) -> bytes:
    text = template("systemd", name).decode()
    return re.sub(r"@([A-Z]+)@", lambda found: values[found[1]], text).encode()


def quoted(text: str) -> str:
    """As systemd.syntax reads it back. Raises ConfigError for what no line of a unit can hold."""
    if not text.isprintable():
        raise ConfigError(f"a unit of systemd cannot hold {text!r}: it has characters that cannot be printed")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def template(manager: str, name: str) -> bytes:
    """A file of launchd/ or systemd/: in the package when it was installed, beside it in a checkout."""
    package = Path(__file__).parent
    file = package / manager / name
    return (file if file.exists() else package.parent / manager / name).read_bytes()
