"""Bringing a model from the hub: pull."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import click

from mlxd import paths
from mlxd.cli import store
from mlxd.cli.words import as_json, is_terminal
from mlxd.errors import REPLACED, MlxdError, NotRunning

if TYPE_CHECKING:
    from rich.progress import TaskID

#: The server says something at least every `server.ping_s`.
SILENT_S = 120.0
#: A server that is killed is replaced within a second or two.
TRIES, AGAIN_S = 5, 1.0
#: Without a terminal a line for so much of a file.
STEP = 0.1

Line = dict[str, Any]


@click.command()
@click.argument("name")
@as_json
def pull(name: str, json_: bool) -> None:
    """Bring a model from the Hugging Face hub.

    NAME is its repository, such as mlx-community/NAME. What is here already is not fetched again.
    """
    try:
        with contextlib.closing(lines(name)) as told, Json() if json_ else Bars() if is_terminal(sys.stderr) else Plain() as shown:
            for line in told:
                shown.show(line)
                if "error" in line:
                    raise MlxdError(line["error"])
    except KeyboardInterrupt:
        raise MlxdError(f"interrupted; `mlxd pull {name}` goes on where it stopped") from None
    if not json_:
        click.echo(f"pulled  {name}")


# --- where it comes from ------------------------------------------------------------------------------------------------------------


def lines(name: str) -> Generator[Line]:
    """What Ollama's API says of a pull, up to its success or error: of the daemon's, or of our own where none runs. Raises MlxdError."""
    where = paths.locate()
    left = TRIES
    while left:
        try:
            server = store.running(where)
        except NotRunning:
            yield from by_itself(where, name)
            return
        try:
            for line in through_daemon(server, name):
                left = TRIES
                yield line
            return
        except (OSError, http.client.HTTPException, ValueError):
            left -= 1
            click.echo("the server ended meanwhile; asking the next one", err=True)
            time.sleep(AGAIN_S)
    raise MlxdError("mlxd does not answer; look at `mlxd status` and `mlxd logs --server`")


def through_daemon(server: store.Server, name: str) -> Generator[Line]:
    """Raises OSError, HTTPException or ValueError when the server ends before the pull."""
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=SILENT_S)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {server.token}"} if server.token else {})
        connection.request("POST", "/api/pull", json.dumps({"model": name}), headers)
        answer = connection.getresponse()
        if answer.status == 503:  # nobody serves just now
            raise ConnectionError
        line: Line = {}
        while text := answer.readline():
            line = json.loads(text)
            if line.get("error") == REPLACED:
                raise ConnectionError
            yield line
    if "error" not in line and line.get("status") != "success":
        raise ConnectionError


def by_itself(where: paths.Paths, name: str) -> Generator[Line]:
    """Raises MlxdError."""
    from mlxd import pullers

    command = [sys.executable, "-P", "-m", "mlxd.pull", name]  # -P: no module from the directory that we are in
    with tempfile.TemporaryFile() as said:
        # A session of its own: Ctrl-C is for us.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            env=pullers.environment(where),
            start_new_session=True,
        )
        assert process.stdout is not None
        line: Line = {}
        try:
            with process.stdout:
                for text in process.stdout:
                    line = json.loads(text)
                    yield line
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        if code and "error" not in line:
            said.seek(0)
            words = said.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise MlxdError(f"the download ended with status {code}: {words or 'it said nothing'}")


# --- how it is shown ----------------------------------------------------------------------------------------------------------------


class Shown(Protocol):
    def __enter__(self) -> Shown: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def show(self, line: Line) -> None: ...


class Json:
    """The lines as they are, on stdout."""

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, line: Line) -> None:
        click.echo(json.dumps(line))


class Plain(Json):
    """A line when something changed, and for each tenth of a file."""

    def __init__(self) -> None:
        self.said = ""
        self.steps: dict[str, int] = {}

    def show(self, line: Line) -> None:
        if digest := line.get("digest"):
            step = int(line["completed"] / line["total"] / STEP) if line["total"] else int(1 / STEP)
            if self.steps.get(digest) != step:
                self.steps[digest] = step
                self.said = line["status"]
                click.echo(f"{self.said}  {step * STEP:.0%} of {line['total'] / 1e6:.1f} MB", err=True)
        elif line.get("status") not in (None, "success", self.said):
            self.said = line["status"]
            click.echo(self.said, err=True)


class Bars(Plain):
    """A bar for each file, on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        super().__init__()
        name = TextColumn("{task.description}", markup=False)
        columns = (name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.bars: dict[str, TaskID] = {}

    def __enter__(self) -> Shown:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, line: Line) -> None:
        if digest := line.get("digest"):
            if digest not in self.bars:
                self.bars[digest] = self.progress.add_task(line["status"], total=line["total"])
            self.progress.update(self.bars[digest], completed=line["completed"])
        elif line.get("status") not in (None, "success", self.said):
            self.said = line["status"]
            self.progress.console.print(self.said, markup=False, highlight=False)
