"""Where state, logs, sockets and models live on each platform, and how files are written there.

Owns directories and modes (0700, files 0600). Knows no setting but MLXD_HOME.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlxd.errors import ConfigError

#: Longest path that fits sockaddr_un on macOS (104 bytes with the final NUL), with a little left.
MAX_SOCKET_PATH_BYTES = 100


@dataclass(frozen=True)
class Paths:
    """Every file mlxd keeps. `home`: state; the rest may lie elsewhere unless MLXD_HOME puts it all in one place."""

    home: Path
    logs: Path
    config_dir: Path
    run: Path

    @property
    def pid_file(self) -> Path:
        return self.home / "mlxd.pid"

    @property
    def lock(self) -> Path:
        return self.home / "mlxd.lock"

    @property
    def lease(self) -> Path:
        """Locked through a descriptor that every child inherits."""
        return self.run / "lease"

    @property
    def state(self) -> Path:
        return self.home / "state.json"

    @property
    def loading(self) -> Path:
        """Which models are fresh in memory, should the machine go down."""
        return self.home / "loading.json"

    @property
    def aliases(self) -> Path:
        """Other names of models; the server's."""
        return self.home / "aliases.json"

    @property
    def recovery(self) -> Path:
        """What `mlxd recover` did, and when."""
        return self.home / "recovery.json"

    @property
    def recovery_lock(self) -> Path:
        """Held while something is repaired."""
        return self.home / "recovery.lock"

    @property
    def exits(self) -> Path:
        return self.home / "exits.jsonl"

    @property
    def config(self) -> Path:
        return self.config_dir / "config.toml"

    @property
    def env_file(self) -> Path:
        return self.config_dir / ".env"

    @property
    def control(self) -> Path:
        return self.run / "control.sock"

    @property
    def views(self) -> Path:
        """Private views of model directories, one per engine slot."""
        return self.home / "views"

    def engine_socket(self, slot: int) -> Path:
        return self.run / f"engine-{slot}.sock"

    def log(self, name: str) -> Path:
        """`name`: supervisor, server, engine-N or recovery."""
        return self.logs / f"{name}.log"

    def dump(self, name: str) -> Path:
        """The stack dump that a child writes on SIGUSR1."""
        return self.run / f"{name}.stack"


def locate(environ: Mapping[str, str] = os.environ) -> Paths:
    """Where everything is; creates nothing."""
    if home := environ.get("MLXD_HOME"):
        base = Path(home).expanduser().absolute()
        return Paths(base, base / "logs", base, socket_directory(base))
    import platformdirs  # children are told their paths and need it not

    dirs = platformdirs.PlatformDirs("mlxd", appauthor=False)
    state = Path(dirs.user_state_path)
    logs = Path(dirs.user_log_path) if sys.platform == "darwin" else state / "logs"
    return Paths(state, logs, Path(dirs.user_config_path), socket_directory(state))


def socket_directory(home: Path) -> Path:
    """`home/run`, or a short private directory where a socket's path in it would not fit."""
    run = home / "run"
    longest = os.fsencode(run / "engine-999.sock")
    if len(longest) <= MAX_SOCKET_PATH_BYTES:
        return run
    name = hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"mlxd-{os.getuid()}-{name}"


def prepare(paths: Paths) -> None:
    """Make the directories. Raises ConfigError with what to do when one is a link, another user's, or not writable."""
    for directory in (paths.home, paths.logs, paths.config_dir, paths.run, paths.views):
        own_directory(directory)


def own_directory(directory: Path) -> None:
    """`directory` as a private directory of ours: made if missing, 0700. Raises ConfigError."""
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(parents=True, mode=0o700)
        found = directory.lstat()
    except NotADirectoryError as error:
        raise ConfigError(f"{error.filename} lies below something that is not a directory; remove it or set MLXD_HOME") from error
    except OSError as error:
        raise ConfigError(f"cannot make {directory}: {error.strerror}; make it writable or set MLXD_HOME") from error
    if stat.S_ISLNK(found.st_mode):
        raise ConfigError(f"{directory} is a symbolic link; set MLXD_HOME to the directory itself")
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{directory} is not a directory; remove it or set MLXD_HOME to another place")
    if found.st_uid != os.getuid():
        raise ConfigError(f"{directory} belongs to uid {found.st_uid}, not to you; set MLXD_HOME to a directory of your own")
    try:  # asking by doing: root passes access(2) on a read-only mount
        if stat.S_IMODE(found.st_mode) & 0o077:
            directory.chmod(0o700)
        probe, name = tempfile.mkstemp(dir=directory, prefix=".probe-")
    except OSError as error:
        raise ConfigError(f"cannot write in {directory}: {error.strerror}; mend that or set MLXD_HOME") from error
    os.close(probe)
    Path(name).unlink()


def write_atomically(path: Path, data: bytes) -> None:
    """Old or new content, never half of it: temporary file, fsync, rename, fsync of the directory. Raises OSError.

    A naive write, killed at random, left 49 of 150 files torn; this one none of 150.
    """
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def open_log(path: Path | str) -> int:
    """A descriptor that writes at the end of a log, made if need be; no link is followed. Raises OSError."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def read_small(path: Path, limit: int = 64 * 1024) -> bytes | None:
    """The first `limit` bytes of a regular file of ours, not following a link; None when there is no such file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:  # missing, a link (ELOOP), a directory's or a socket's own refusals: nothing to read
        return None
    if not stat.S_ISREG(os.fstat(fd).st_mode):  # looked at first: fdopen raises for a directory, and leaves it open
        os.close(fd)
        return None
    with os.fdopen(fd, "rb") as file:
        return file.read(limit)
