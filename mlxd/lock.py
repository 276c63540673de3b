"""Who runs: the lock, the PID file, and the handshake that is truer than both.

The lock is the truth between two starts, the control socket's answer stands above it (a lock file may be deleted under a living
supervisor), the PID file is for people and scripts and never believed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import time
from pathlib import Path

from mlxd import control, paths
from mlxd.errors import ConfigError, MlxdError

log = logging.getLogger(__name__)

#: `is_locked` holds the lock for the blink of an eye; a supervisor does not take that for another one.
LOOK_S = 0.2


class AlreadyRunning(MlxdError):
    """A supervisor has this state directory. Not a failure: exit 0 keeps launchd and systemd from trying again for ever."""

    exit_status = 0


class Lock:
    """This supervisor's claim on its state directory: held until the process ends, and its PID file exactly as long as it runs."""

    def __init__(self, where: paths.Paths, fd: int | None = None):
        """`fd`: the lock, already held. Raises AlreadyRunning, or ConfigError when there can be no lock."""
        self.paths = where
        self.pid_text = b"%d\n" % os.getpid()
        if fd is not None:
            self.fd = fd
            return
        if (pid := running_pid(where)) is not None:
            raise AlreadyRunning(f"already running, pid {pid}")
        try:
            self.fd = flocked(where.lock, LOOK_S)
        except BlockingIOError as error:
            text = (paths.read_small(where.pid_file, 32) or b"").decode(errors="replace").strip()
            raise AlreadyRunning(f"already running, pid {text or 'unknown'}") from error
        except OSError as error:
            raise ConfigError(f"cannot open {where.lock}: {error.strerror}; remove what is there") from error

    def show(self) -> None:
        """Write the PID file."""
        with contextlib.suppress(OSError):  # a full disk, a directory in its place: it is information, not the lock
            paths.write_atomically(self.paths.pid_file, self.pid_text)

    def mend(self) -> None:
        """Put back what was deleted or altered."""
        if paths.read_small(self.paths.pid_file) != self.pid_text:
            log.warning("the PID file was changed or removed; it is put back")
            self.show()
        if not same_file(self.fd, self.paths.lock):
            log.warning("the lock file was removed; it is put back")
            with contextlib.suppress(OSError):  # the old one stays locked; whoever starts meanwhile is refused by the handshake
                self.fd = flocked(self.paths.lock)

    def withdraw(self) -> None:
        """Remove the PID file, if it is still ours. The lock goes with the process, and its file stays: unlinking it would let two hold it."""
        if paths.read_small(self.paths.pid_file) == self.pid_text:
            paths.remove(self.paths.pid_file)


def flocked(path: Path, patience_s: float = 0.0) -> int:
    """`path`, made if need be, open and locked. Blocks; raises BlockingIOError when another holds it for `patience_s`, OSError."""
    fd = paths.open_own(path, os.O_RDWR | os.O_CREAT)
    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                os.close(fd)
                raise
            time.sleep(0.02)
        else:
            return fd


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock at `path`."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def same_file(fd: int, path: Path) -> bool:
    try:
        there = path.lstat()
    except OSError:
        return False
    mine = os.fstat(fd)
    return stat.S_ISREG(there.st_mode) and (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def running_pid(where: paths.Paths) -> int | None:
    """The pid of a supervisor that answers on the control socket; None when none does."""
    try:
        return int(control.ask(where.control, "status")["supervisor"]["pid"])
    except MlxdError:
        return None
