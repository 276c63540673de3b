"""Where state, logs, sockets and models live on each platform, and how files are written there.

Owns directories and modes (0700, files 0600). Knows no setting but MLXD_HOME.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

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
    def events(self) -> Path:
        return self.home / "events.jsonl"

    @property
    def chat_history(self) -> Path:
        """What was typed at the prompt of `mlxd chat`."""
        return self.home / "chat_history"

    @property
    def config(self) -> Path:
        return self.config_dir / "config.toml"

    @property
    def token(self) -> Path:
        """Who may come in over HTTP; the server reads it."""
        return self.config_dir / "token"

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


def purge(paths: Paths) -> None:
    """Remove every file that mlxd keeps, and the directories that are empty then: somebody's models may lie there, too. Raises OSError."""
    for directory, names in (
        (paths.run, ("*.sock", "*.stack", "lease")),
        (paths.logs, ("*.log",)),
        (paths.home, ("mlxd.pid", "mlxd.lock", "state.json*", "loading.json", "aliases.json", "exits.jsonl", "events.jsonl*")),
        (paths.home, ("aliases.lock", "recovery.json", "recovery.lock", "chat_history")),
        (paths.config_dir, ("config.toml", ".env", "token")),
    ):
        for name in names:
            for file in (*directory.glob(name), *directory.glob(f".{name}-*")):  # a death in `write_atomically` leaves the latter
                file.unlink()
    shutil.rmtree(paths.views, ignore_errors=True)  # of links, which it does not follow
    for directory in (paths.run, paths.logs, paths.config_dir, paths.home):
        with contextlib.suppress(OSError):
            directory.rmdir()


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
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                Path(file.name).unlink()
            raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def clear_unfinished(paths: Paths) -> None:
    """Remove what writers that were killed left half written. Nobody else may be writing."""
    for file in (paths.pid_file, paths.state, paths.loading, paths.aliases, paths.exits):
        for left in file.parent.glob(f".{file.name}-*"):
            left.unlink(missing_ok=True)


def open_log(path: Path | str) -> int:
    """A descriptor that writes at the end of a log, a regular file, made if need be; no link is followed. Raises OSError."""
    return open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def open_log_anyway(path: Path | str) -> tuple[int, str]:
    """The same, and ""; where there can be no log, a descriptor that leads nowhere, and why: what writes it serves all the same."""
    try:
        return open_log(path), ""
    except OSError as error:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), error.strerror or str(error)


def append(path: Path, line: bytes) -> None:
    """A line at the end of a log, all of it or nothing. Raises OSError."""
    fd = open_log(path)
    try:
        size = os.fstat(fd).st_size
        if os.write(fd, line) < len(line):  # the disk is full
            os.ftruncate(fd, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
    finally:
        os.close(fd)


def open_own(path: Path | str, flags: int) -> int:
    """A descriptor of a regular file of ours; no link is followed, nothing else is waited for. Raises OSError."""
    fd = open_regular(path, flags | os.O_NOFOLLOW)
    if (owner := os.fstat(fd).st_uid) == os.getuid():
        return fd
    os.close(fd)
    raise PermissionError(errno.EPERM, f"it belongs to uid {owner}, not to you", path)


def open_regular(path: Path | str, flags: int) -> int:
    """A descriptor of a regular file: a pipe in its place would hold up who opens it. Raises OSError."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "it is not a regular file", path)


def read_own(path: Path, limit: int = -1) -> bytes:
    """A regular file of ours, or its first `limit` bytes. Raises OSError."""
    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
        return file.read(limit)


def read_small(path: Path, limit: int = 64 * 1024) -> bytes | None:
    """The first `limit` bytes of a regular file of ours, not following a link; None when there is no such file."""
    with opened(path) as file:
        return file.read(limit) if file is not None else None


def read_end(path: Path, limit: int) -> bytes:
    """The last `limit` bytes of a regular file of ours; b"" when there is no such file."""
    with opened(path) as file:
        if file is None:
            return b""
        file.seek(max(0, os.fstat(file.fileno()).st_size - limit))
        return file.read(limit)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes] | None]:
    """A regular file of ours, to be read, not following a link; None when there is no such file."""
    try:
        fd = open_own(path, os.O_RDONLY)
    except OSError:  # missing, a link (ELOOP), a socket, another user's: nothing to read
        yield None
        return
    with os.fdopen(fd, "rb") as file:
        yield file


def read_private(path: Path, limit: int) -> bytes | None:
    """What a file for secrets holds; None when there is none. Raises ConfigError when others could read or exchange it."""
    try:
        with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
            mode, data = os.fstat(file.fileno()).st_mode, file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        why = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise ConfigError(f"cannot use {path}: {why}; put a file of your own there and `chmod 600` it, or remove it") from error
    if mode & 0o077:
        raise ConfigError(f"others may read {path}: `chmod 600 {path}`, and change what is in it if they could")
    if len(data) > limit:
        raise ConfigError(f"{path} is larger than {limit} bytes")
    return data


def remove(path: Path) -> None:
    """Of a file that is gone, or a directory in its place, nothing is said: the next start looks at it again."""
    with contextlib.suppress(OSError):
        path.unlink()
