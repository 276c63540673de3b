"""What mlxd asks of launchd and systemd: how a job stands, and to start, stop, restart, install and remove it.

Owns their commands, their refusals and the deadline of each call; launchd and systemd have the same methods here. Knows neither what a job is
for nor what its file says. A job is named as its manager names it: a launchd label, a systemd unit.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlxd.errors import MlxdError

#: Of a call that only looks or tells.
CALL_S = 20.0
#: Of one that waits until a process has ended: the worst stop of mlxd takes 50 s, and its manager kills it after 60.
STOP_S = 75.0

#: launchctl's exit statuses are errno values and its own beyond 100.
EIO, EINPROGRESS, EALREADY = 5, 36, 37
NO_SUCH_PROCESS, NO_SUCH_SERVICE = 3, 113
#: There is no such domain, or not for us: over ssh nobody has a gui domain.
NO_DOMAIN = (112, 125)


@dataclass(frozen=True)
class Found:
    """How a job stands.

    `loaded`: the manager knows it. `enabled`: it will begin at the next boot or login. `state`: the manager's own word, "running" and
    "spawn scheduled" of launchd, "active", "activating" and "failed" of systemd; "" when it is not loaded. `pid`: None without a
    process. `last_exit`: status of the last process, None if untold.
    """

    loaded: bool = False
    enabled: bool = False
    state: str = ""
    pid: int | None = None
    last_exit: int | None = None

    @property
    def rests(self) -> bool:
        """Of a timer: it will not go off. launchd's job for the same is loaded or not."""
        return self.state in ("inactive", "failed")


class Scope:
    """`system`: the whole machine's, not the user's who asks."""

    system: bool

    @property
    def needs_root(self) -> bool:
        """Whether anything but a look is refused to us."""
        return self.system and os.geteuid() != 0


class Launchd(Scope):
    """launchd on macOS: agents of the user who asks, or daemons of the machine."""

    name = "launchd"
    mlxd, recover = "local.mlxd", "local.mlxd.recover"
    #: Every job of mlxd and the files that it consists of.
    jobs: ClassVar = {mlxd: [f"{mlxd}.plist"], recover: [f"{recover}.plist"]}

    def __init__(self, system: bool = False, directory: Path | None = None, retry_s: float = 10.0):
        """`directory`: where the jobs' files are; None for the one that launchd reads at boot or login. `retry_s`: how long EIO is believed
        to pass."""
        self.system = system
        self.directory = directory or (Path("/Library/LaunchDaemons") if system else Path.home() / "Library/LaunchAgents")
        self.retry_s = retry_s
        self.log = "mlxd logs --supervisor"

    def file(self, job: str) -> Path:
        return self.directory / f"{job}.plist"

    @functools.cached_property
    def domain(self) -> str:
        """gui/UID, which has the login session; user/UID where there is none. Raises MlxdError."""
        if self.system:
            return "system"
        for domain in (f"gui/{os.getuid()}", f"user/{os.getuid()}"):
            probe = call("launchctl", "print", domain)
            if probe.returncode not in NO_DOMAIN:
                break
        checked(probe)
        return domain

    def look(self, job: str) -> Found:
        """Raises MlxdError when launchd cannot be asked."""
        told = call("launchctl", "print", f"{self.domain}/{job}")
        if told.returncode in (NO_SUCH_PROCESS, NO_SUCH_SERVICE):
            return Found()
        text = checked(told).stdout
        return Found(True, True, word(text, "state") or "", number(word(text, "pid")), number(word(text, "last exit code")))

    def by_hand(self, job: str) -> str:
        """The command by which root starts it."""
        return f"sudo launchctl kickstart {self.domain}/{job}"

    def start(self, job: str) -> None:
        """Does nothing to a job that runs. Raises MlxdError."""
        if self.look(job).loaded:
            self.act("kickstart", f"{self.domain}/{job}")
        else:
            self.bootstrap(job)

    def stop(self, job: str) -> None:
        """Down until `start` or the next login. The job is unloaded: a throttled one would be begun again otherwise. Raises MlxdError."""
        self.act("bootout", f"{self.domain}/{job}", fine=(0, NO_SUCH_PROCESS, NO_SUCH_SERVICE, EINPROGRESS), deadline_s=STOP_S)
        end = time.monotonic() + STOP_S
        while self.look(job).loaded:  # bootout returns before the process has ended
            if time.monotonic() > end:
                raise MlxdError(f"launchd has not ended {job} within {STOP_S:.0f} s; look at `launchctl print {self.domain}/{job}`")
            time.sleep(0.1)

    def restart(self, job: str) -> None:
        """A new process, the old one ended first. Raises MlxdError."""
        if self.look(job).loaded:
            self.act("kickstart", "-k", f"{self.domain}/{job}", deadline_s=STOP_S)
        else:
            self.bootstrap(job)

    def install(self, job: str) -> None:
        """Load the job's file, in place of an older one, now and at each boot or login. Raises MlxdError."""
        self.stop(job)
        self.bootstrap(job)

    def remove(self, job: str) -> None:
        """Stop the job and forget it; its files go, too. Raises MlxdError."""
        self.stop(job)
        for name in self.jobs[job]:
            (self.directory / name).unlink(missing_ok=True)

    def begins(self) -> str:
        """When it does, in words."""
        return "when the machine boots" if self.system else "when you log in"

    def bootstrap(self, job: str) -> None:
        """EIO means "not now", as after a bootout that is not quite over, and also "it is loaded already"."""
        self.act("enable", f"{self.domain}/{job}")
        end = time.monotonic() + self.retry_s
        while True:
            done = self.act("bootstrap", self.domain, str(self.file(job)), fine=(0, EIO, EALREADY))
            if done.returncode == 0 or self.look(job).loaded:
                return
            if time.monotonic() > end:
                checked(done)
            time.sleep(0.5)

    def act(self, *words: str, fine: tuple[int, ...] = (0,), deadline_s: float = CALL_S) -> subprocess.CompletedProcess[str]:
        if self.needs_root:
            raise no_root("launchctl", *words)
        return checked(call("launchctl", *words, deadline_s=deadline_s), fine)


class Systemd(Scope):
    """systemd on Linux: units of the user who asks, or of the machine."""

    name = "systemd"
    mlxd, recover = "mlxd.service", "mlxd-recover.timer"
    #: Every job of mlxd and the files that it consists of.
    jobs: ClassVar = {mlxd: [mlxd], recover: [recover, "mlxd-recover.service"]}

    def __init__(self, system: bool = False, directory: Path | None = None):
        """`directory`: where the units' files are; None for the one that systemd reads."""
        self.system = system
        config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        self.directory = directory or (Path("/etc/systemd/system") if system else Path(config) / "systemd/user")
        self.command = ["systemctl"] if system else ["systemctl", "--user"]
        self.log = f"journalctl {'' if system else '--user '}-u {self.mlxd}"

    def file(self, job: str) -> Path:
        return self.directory / job

    def look(self, job: str) -> Found:
        """Raises MlxdError when systemd cannot be asked."""
        properties = "--property=LoadState,ActiveState,UnitFileState,MainPID,ExecMainStatus"
        told = call(*self.command, "show", job, properties)
        shown = dict(line.split("=", 1) for line in checked(told).stdout.splitlines() if "=" in line)
        if shown.get("LoadState") != "loaded":
            return Found()
        pid = number(shown.get("MainPID"))
        enabled = shown.get("UnitFileState", "").startswith("enabled")
        return Found(True, enabled, shown.get("ActiveState", ""), pid or None, number(shown.get("ExecMainStatus")))

    def by_hand(self, job: str) -> str:
        """The command by which root starts it."""
        return f"sudo systemctl start {job}"

    def start(self, job: str) -> None:
        """Does nothing to a unit that runs; returns when it says that it is up. Raises MlxdError."""
        self.act("start", job)

    def stop(self, job: str) -> None:
        """Down until `start` or the next boot or login; a restart that is due is called off, and what a timer has begun. Raises MlxdError."""
        self.act("stop", *self.jobs[job])

    def restart(self, job: str) -> None:
        """A new process, the old one ended first. Raises MlxdError."""
        self.act("restart", job)

    def install(self, job: str) -> None:
        """Load the unit's file, in place of an older one, now and at each boot or login. Raises MlxdError."""
        self.act("daemon-reload")
        self.act("enable", job)
        self.act("restart", job)

    def remove(self, job: str) -> None:
        """Stop the unit and forget it; its files go, too. Raises MlxdError."""
        if self.look(job).loaded:
            self.act("disable", job)
            self.stop(job)
        for name in self.jobs[job]:
            (self.directory / name).unlink(missing_ok=True)
        self.act("daemon-reload")

    def begins(self) -> str:
        """When it does, in words."""
        if self.system or self.lingers():
            return "when the machine boots"
        return f"when you log in, and ends when you log out: `sudo loginctl enable-linger {user_name()}` makes that the whole time"

    def lingers(self) -> bool:
        """Whether this user's units run without a login. Of somebody who neither is logged in nor lingers nothing is known."""
        with contextlib.suppress(MlxdError):
            return "Linger=yes" in call("loginctl", "show-user", user_name(), "--property=Linger").stdout
        return False

    def linger(self) -> None:
        """Let this user's units run without a login, if we may; `begins` tells what came of it."""
        if not self.system and not self.lingers():
            with contextlib.suppress(MlxdError):
                call("loginctl", "enable-linger", user_name())

    def act(self, *words: str) -> None:
        if self.needs_root:
            raise no_root(*self.command, *words)
        checked(call(*self.command, *words, deadline_s=STOP_S))


Manager = Launchd | Systemd


def manager(system: bool = False) -> Manager:
    """The one of this platform."""
    return Launchd(system) if sys.platform == "darwin" else Systemd(system)


# --- helpers, in the order of their use -------------------------------------------------------------------------------------------


def call(program: str, *words: str, deadline_s: float = CALL_S) -> subprocess.CompletedProcess[str]:
    """Run it to its end; its exit status is the caller's to judge. Raises MlxdError when it is not there or takes too long."""
    try:
        return subprocess.run(
            [program, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | {"LC_ALL": "C"},
            timeout=deadline_s,
            check=False,
        )
    except FileNotFoundError as error:
        raise MlxdError(f"there is no `{program}` on this machine, which could do this; `mlxd start` needs none") from error
    except OSError as error:
        raise MlxdError(f"cannot run `{program}`: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise MlxdError(f"`{shlex.join([program, *words])}` has not ended within {deadline_s:g} s") from error


def checked(done: subprocess.CompletedProcess[str], fine: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Raises MlxdError with the program's own first line and what to do."""
    if done.returncode in fine:
        return done
    words = (done.stderr.strip() or done.stdout.strip()).partition("\n")[0] or f"it ended with status {done.returncode}"
    if "connect to bus" in words or "connect to user scope bus" in words:  # after `su`, or in a container
        words += f"; log in as this user, or set XDG_RUNTIME_DIR=/run/user/{os.getuid()}"
    raise MlxdError(f"`{shlex.join(done.args)}` was refused: {words}")


def no_root(*command: str) -> MlxdError:
    """Names the command to type."""
    return MlxdError(f"this is installed for the whole machine and needs root: sudo {shlex.join(command)}")


def user_name() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def word(text: str, name: str) -> str | None:
    """The value of the first `name = value` line of what `launchctl print` tells."""
    found = re.search(rf"^\s*{name} = (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def number(text: str | None) -> int | None:
    """The integer that `text` begins with: "78: EX_CONFIG"; None for "(never exited)"."""
    found = re.match(r"\d+", text or "")
    return int(found[0]) if found else None
