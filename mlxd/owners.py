"""Who restarts a service, and how: the one that runs it anyway, so that two never fight over it.

A service is acted on through its owner only, never by its port or its name. Where the owner is unknown, another user's or another machine's,
there is nothing but the sentence that says what a person can do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from mlxd import leftovers, paths
from mlxd.errors import MlxdError
from mlxd.leftovers import Process
from mlxd.managers import Found, Launchd, Systemd, call, checked

OLLAMA_UNIT = "ollama.service"
#: As `brew services` names it.
OLLAMA_LABEL = "homebrew.mxcl.ollama"
#: Of an owner that is asked; systemd and launchd have deadlines of their own.
ACT_S = 60.0
#: Of an `ollama serve` that is ended: it unloads its models first.
OLLAMA_STOP_S = 10.0


@dataclass(frozen=True)
class Owner:
    """`remedy`: what a person types or does. `restart`: raises MlxdError; None: only reported. It returns the process that it began, if it
    is mlxd's own to mind."""

    name: str
    remedy: str
    restart: Callable[[], Process | None] | None = None


def user_unit(unit: str) -> Owner:
    return Owner("systemd --user", f"systemctl --user restart {unit}", lambda: Systemd().restart(unit))


def system_unit(unit: str) -> Owner:
    """Root's."""
    return Owner("systemd", f"sudo systemctl restart {unit}")


def agent(label: str) -> Owner:
    return Owner("launchd", f"launchctl kickstart -k gui/{os.getuid()}/{label}", lambda: Launchd().restart(label))


def formula(name: str) -> Owner:
    def restart() -> None:
        checked(call("brew", "services", "restart", name, deadline_s=ACT_S))

    return Owner("brew", f"brew services restart {name}", restart)


def app(name: str) -> Owner:
    """An application of macOS. `open` alone does no more than bring one that runs to the front."""

    def restart() -> None:
        if any(f"/{name}.app/" in (process.info["exe"] or "") for process in psutil.process_iter(["exe"])):
            checked(call("osascript", "-e", f'quit app "{name}"', deadline_s=ACT_S))
        checked(call("open", "-a", name, deadline_s=ACT_S))

    return Owner(f"{name}.app", f"quit {name} and open it again", restart)


def command(words: list[str], log: Path) -> Owner:
    """A person's own command; what it says goes to `log`."""

    def restart() -> None:
        file, _ = paths.open_log_anyway(log)
        try:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, cwd="/")
        except OSError as error:
            raise MlxdError(f"cannot run `{words[0]}`: {error.strerror}") from error
        finally:
            os.close(file)
        try:
            if code := process.wait(ACT_S):
                raise MlxdError(f"`{words[0]}` ended with status {code}; its words are in {log}")
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
            raise MlxdError(f"`{words[0]}` has not ended within {ACT_S:g} s") from None

    return Owner("command", " ".join(words), restart)


def plain_ollama(served: Process | None, address: str, log: Path) -> Owner:
    """An `ollama serve` of mlxd's own. `served`: the one that it began earlier, if it still lives."""

    def restart() -> Process | None:
        if served is not None and not leftovers.end(served, OLLAMA_STOP_S, OLLAMA_STOP_S):
            raise MlxdError(f"`ollama serve` (pid {served.pid}) cannot be ended; a reboot may be needed")
        file, _ = paths.open_log_anyway(log)
        try:
            process = subprocess.Popen(
                ["ollama", "serve"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                cwd="/",
                # After `mlxd env` OLLAMA_HOST names mlxd.
                env=os.environ | {"OLLAMA_HOST": address},
            )
        except OSError as error:
            raise MlxdError(f"cannot run `ollama`: {error.strerror}") from error
        finally:
            os.close(file)
        return leftovers.process_of(process.pid)

    return Owner("mlxd", "ollama serve", restart)


def stranger(process: psutil.Process | None) -> Owner:
    if process is None:
        return Owner("unknown", "start it, or restart it by whatever started it")
    return Owner("unknown", f"restart {described(process)} by whatever started it")


def described(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"pid {process.pid} ({process.name()})"
    return f"pid {process.pid}"


# --- finding it -------------------------------------------------------------------------------------------------------------------


def named(name: str) -> Owner:
    """The `owner` of one of the configuration's services: "systemd:backend.service"."""
    kind, _, rest = name.partition(":")
    if kind == "systemd":
        return system_unit(rest) if not looked(Systemd(), rest).loaded and looked(Systemd(True), rest).loaded else user_unit(rest)
    return {"launchd": agent, "brew": formula, "app": app}[kind](rest)


def of_ollama_on_linux(process: psutil.Process | None, alone: bool) -> Owner | None:
    """`process`: the one on Ollama's port; None: there is none (`alone`), or it is another user's. A unit that runs another process is not its
    owner."""
    user, system = looked(Systemd(), OLLAMA_UNIT), looked(Systemd(True), OLLAMA_UNIT)
    fit = []
    if user.loaded and (process.pid == user.pid if process is not None else alone):
        fit.append((user, user_unit(OLLAMA_UNIT)))
    if system.loaded and (process is None or process.pid == system.pid):
        fit.append((system, system_unit(OLLAMA_UNIT)))
    fit.sort(key=lambda pair: pair[0].state == "inactive")  # one that is up, or tries to be, before one that nobody started
    return fit[0][1] if fit else None


def of_ollama_on_macos(process: psutil.Process | None, alone: bool, home: Path) -> Owner | None:
    """The same. `home`: the user's, where `Library` and perhaps `Applications` are."""
    job = looked(Launchd(), OLLAMA_LABEL)
    if job.loaded and (process.pid == job.pid if process is not None else alone):
        return agent(OLLAMA_LABEL)
    if process is not None:
        with contextlib.suppress(psutil.Error):
            if any("/Ollama.app/" in one.exe() for one in (process, *process.parents())):
                return app("Ollama")
    if not alone:
        return None
    if (home / "Library/LaunchAgents" / f"{OLLAMA_LABEL}.plist").exists():
        return formula("ollama")
    if any((directory / "Ollama.app").exists() for directory in (Path("/Applications"), home / "Applications")):
        return app("Ollama")
    return None


def of_ollama(process: psutil.Process | None, alone: bool, served: Process | None, address: str, log: Path, system: str) -> Owner:
    """`alone`: nobody listens on its port; without an owner mlxd may then begin one itself. `system`: sys.platform."""
    if served is not None and process is not None and process.pid == served.pid:
        return plain_ollama(served, address, log)
    owner = of_ollama_on_macos(process, alone, Path.home()) if system == "darwin" else of_ollama_on_linux(process, alone)
    if owner is None and alone and shutil.which("ollama"):
        return plain_ollama(served, address, log)
    return owner or stranger(process)


def looked(manager: Launchd | Systemd, job: str) -> Found:
    """How it stands; as if there were none where the manager cannot be asked."""
    try:
        return manager.look(job)
    except MlxdError:
        return Found()
