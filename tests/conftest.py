"""What the tests of real processes share: a daemon of one's own, and waiting with a deadline that prints the history."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from mlxd import control, paths
from mlxd.errors import MlxdError

HERE = Path(__file__).parent
FAKE = f"{sys.executable} {HERE / 'fake_child.py'}"
#: Waiting deadlines: ten times what the thing takes, because the machine is shared.
PATIENCE_S = 60.0
#: More memory than there is: no spare engine stands by.
NO_SPARE = str(10**15)

#: The default limits, scaled down by settings.
QUICK = {
    "MLXD_SUPERVISOR_BACKOFF_FIRST_S": "0.05",
    "MLXD_SUPERVISOR_BACKOFF_MOST_S": "0.4",
    "MLXD_SUPERVISOR_COOLDOWN_S": "3600",
    "MLXD_SUPERVISOR_TERM_S": "1",
    "MLXD_SUPERVISOR_KILL_S": "5",
    "MLXD_SUPERVISOR_TAKEOVER_S": "0.3",
    "MLXD_SUPERVISOR_HOLD_S": "1",
    "MLXD_SERVER_DRAIN_S": "2",
    "MLX_API_PORT": "0",
}

T = TypeVar("T")


def eventually(look: Callable[[], T], what: str, history: Callable[[], str] = str, within_s: float = PATIENCE_S) -> T:
    """The first true answer of `look`; fails with the history after `within_s`."""
    end = time.monotonic() + within_s
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > end:
            pytest.fail(f"not within {within_s:g} s: {what}\n{history()}")
        time.sleep(0.02)


class Daemon:
    """One mlxd with a home, a port and limits of its own. `settings` are environment variables."""

    def __init__(self, home: Path, **settings: str):
        self.home = home
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("MLX", "OLLAMA"))}
        self.environ = outside | QUICK | settings | {"MLXD_HOME": str(home)}
        self.paths = paths.locate(self.environ)
        self.processes: list[subprocess.Popen[bytes]] = []

    # --- doing ------------------------------------------------------------------------------------------------------------

    def run(self, *through: str) -> subprocess.Popen[bytes]:
        """`mlxd run`, in the foreground of a background process; `through`: a command that takes it as its last arguments."""
        process = subprocess.Popen(
            [*through, sys.executable, "-m", "mlxd", "run"],
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
        )
        self.processes.append(process)
        return process

    def start(self, *arguments: str) -> dict[str, Any]:
        """`mlxd run` in the background, and its status once it answers."""
        self.run()
        return eventually(self.status, "an answer on the control socket", self.history)

    def mlxd(self, *arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """The command line."""
        return subprocess.run(
            [sys.executable, "-m", "mlxd", *arguments],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd="/",
            check=False,
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[Daemon]:
        """Started and ready meanwhile, closed whatever happens."""
        self.start()
        try:
            self.ready()
            yield self
        finally:
            self.close()

    def signal(self, number: int) -> None:
        os.kill(self.status()["supervisor"]["pid"], number)

    # --- looking ----------------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What `mlxd status --json` tells, or {} when it does not run."""
        try:
            return control.ask(self.paths.control, "status", timeout_s=20.0)
        except MlxdError:
            return {}

    def until(self, what: str, look: Callable[[dict[str, Any]], Any], within_s: float = PATIENCE_S) -> dict[str, Any]:
        """The first status of which `look` is true. A key that is not there yet is not true yet."""

        def answered() -> dict[str, Any] | None:
            told = self.status()
            with contextlib.suppress(KeyError, IndexError, TypeError):
                return told if look(told) else None
            return None

        return eventually(answered, what, self.history, within_s)  # type: ignore[return-value]

    def ready(self) -> dict[str, Any]:
        return self.until("ready", lambda s: s["state"] == "ready")

    def log(self, name: str = "supervisor") -> str:
        file = self.paths.log(name)
        return file.read_text(errors="replace") if file.is_file() else ""

    def history(self) -> str:
        return f"status: {json.dumps(self.status(), indent=1)}\nlog:\n{self.log()}"

    def exits(self) -> list[dict[str, Any]]:
        if not self.paths.exits.exists():
            return []
        return [json.loads(line) for line in self.paths.exits.read_text().splitlines()]

    def ours(self) -> list[psutil.Process]:
        """Every process that has this daemon's home in its environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environ = process.environ()
                mine = str(self.home) in environ.get("MLXD_CHILD", "") or environ.get("MLXD_HOME") == str(self.home)
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def get(self, path: str, timeout_s: float = PATIENCE_S) -> tuple[int, dict[str, str], bytes]:
        """One GET on a connection of its own: status, headers (lower case), body. Raises OSError when it is refused."""
        port = self.status()["port"]
        return http(port, f"GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n".encode(), timeout_s)

    # --- ending -----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop by its own means, and see that nothing is left."""
        told = self.status()
        left = self.ours()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        if told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(told["supervisor"]["pid"], signal.SIGTERM)
        end = time.monotonic() + PATIENCE_S
        while (left := self.ours()) and time.monotonic() < end:
            time.sleep(0.02)
        history = self.history() if left else ""
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for running in self.processes:
            running.communicate(timeout=10)
        if left:
            pytest.fail(f"left behind: {left}\n{history}")
        if told:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", told["port"]))


def http(port: int, request: bytes, timeout_s: float = PATIENCE_S, host: str = "127.0.0.1") -> tuple[int, dict[str, str], bytes]:
    """One request, read to the end of the connection."""
    with socket.create_connection((host, port), timeout=timeout_s) as sock:
        sock.sendall(request)
        data = b""
        while more := sock.recv(65536):
            data += more
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]), headers, body


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a process of their module's run in one worker: else each of four would start its own."""
    for item in items:
        shared = item._fixtureinfo.name2fixturedefs.values() if isinstance(item, pytest.Function) else ()
        if any(fixture[-1].scope == "module" for fixture in shared):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path: a unix socket's name has room for 104 bytes on macOS."""
    directory = Path(tempfile.mkdtemp(prefix="mlxd-t-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


class Stubs:
    """A PATH on which launchctl, systemctl and loginctl are `fake_manager.py`."""

    def __init__(self, directory: Path):
        directory.mkdir()
        self.directory = directory
        for name in ("launchctl", "systemctl", "loginctl"):
            script = directory / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "fake_manager.py"} {directory} {name} "$@"\n')
            script.chmod(0o755)

    def script(self, **replies: Any) -> None:
        """Verb -> [[status, stderr], ...], played before anything else; status None: as always."""
        (self.directory / "replies.json").write_text(json.dumps(replies))

    def calls(self, program: str) -> list[list[str]]:
        """What it was asked since the last look."""
        file = self.directory / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [words for name, *words in map(json.loads, lines) if name == program]


@pytest.fixture
def stubs(home: Path) -> Stubs:
    return Stubs(home / "stubs")


@pytest.fixture
def daemon(home: Path) -> Iterator[Callable[..., Daemon]]:
    """Makes a Daemon with fake children unless told otherwise: `daemon(server="--mute", engine="--abort", MLXD_...="...")`.

    Beside fake engines no spare stands by unless asked for by MLXD_SUPERVISOR_SPARE_BYTES="0", so that a test has to do with one."""
    made: list[Daemon] = []

    def make(server: str | None = "", engine: str | None = "", **settings: str) -> Daemon:
        if server is not None:
            settings["MLXD_SERVER_COMMAND"] = f"{FAKE} {server}"
        if engine is not None:
            settings = {"MLXD_ENGINE_COMMAND": f"{FAKE} {engine}", "MLXD_SUPERVISOR_SPARE_BYTES": NO_SPARE} | settings
        made.append(Daemon(home, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()
