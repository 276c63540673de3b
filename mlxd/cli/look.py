"""Looking at the daemon: status, logs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import click

from mlxd import control, paths
from mlxd.cli.words import as_json, lines_of, printable
from mlxd.errors import NotRunning

#: What `mlxd status` ends with for a state; any other: running, and not ready.
STATUS_STATUS = {"ready": 0, "degraded": 0, "stopped": 3}
NOT_READY = 4
#: Of each question to Ollama: `mlxd status` is quick, whatever Ollama is.
OLLAMA_S = 0.05


@click.command()
@as_json
@click.pass_context
def status(ctx: click.Context, json_: bool) -> None:
    """Show every process, one a line.

    Exit status: 0 ready or degraded, 3 not running, 4 running and not ready.
    """
    where = paths.locate()
    try:
        told = control.ask(where.control, "status")
    except NotRunning as error:
        told = {"state": "stopped", "reason": str(error), "last_exit": last_exit(where)}
    else:
        if "ollama" in told:  # else the supervisor is of an earlier version
            told["ollama"] = neighbour(told["ollama"]["url"])
    if json_:
        click.echo(json.dumps(told))
    else:
        for text in lines_of(told):
            click.echo(text)
    ctx.exit(STATUS_STATUS.get(told["state"], NOT_READY))


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on as it grows.")
@click.option("-n", "--lines", type=click.IntRange(0, 1_000_000), default=50, show_default=True, help="How many of the last lines.")
@click.option("--server", "which", flag_value="server", help="The HTTP server's log.")
@click.option("--engine", "which", flag_value="engine", help="The engines' logs.")
@click.option("--supervisor", "which", flag_value="supervisor", default=True, help="The supervisor's log (default).")
def logs(follow: bool, lines: int, which: str) -> None:
    """Show the logs."""
    directory = paths.locate().logs
    files = sorted(directory.glob("engine-*.log")) if which == "engine" else [directory / f"{which}.log"]
    files = [file for file in files if file.exists()]
    if not files:
        raise NotRunning(f"there is no {which} log in {directory}; `mlxd start` begins one")
    for file in files:
        for text in last_lines(file, lines):
            click.echo(printable(text))
    if follow:
        try:
            for text in following(files):
                click.echo(printable(text))
        except KeyboardInterrupt:
            return


# --- helpers ----------------------------------------------------------------------------------------------------------------------


def neighbour(url: str) -> dict[str, Any]:
    """How Ollama does, as far as it says so at once."""
    from mlxd import ollama

    found = ollama.look(url, OLLAMA_S)
    state = "slow" if found.state in ("hung", "wedged") else found.state
    return {"url": url, "state": state, "version": found.version, "models": found.models, "memory_bytes": found.memory_bytes}


def last_exit(where: paths.Paths) -> Any:
    """The newest exit record on disk; None when there is none."""
    lines = (paths.read_small(where.exits, 4 * 1024 * 1024) or b"").splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        return None


def last_lines(file: Path, count: int) -> list[bytes]:
    """At most `count` lines from the last MiB."""
    with open(file, "rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - 1024 * 1024))
        return log.read().splitlines()[-count:] if count else []


def following(files: list[Path]) -> Iterator[bytes]:
    """Lines as they are written, also after a log was cut or made anew."""
    opened: dict[Path, IO[bytes]] = {}
    for file in files:
        opened[file] = open(file, "rb")  # noqa: SIM115 as long as we follow
        opened[file].seek(0, os.SEEK_END)
    while True:
        for file, log in opened.items():
            try:
                there = file.stat()
            except FileNotFoundError:
                continue
            if there.st_ino != os.fstat(log.fileno()).st_ino:
                log.close()
                opened[file] = log = open(file, "rb")  # noqa: SIM115
            elif there.st_size < log.tell():
                log.seek(0)
            for text in log:
                yield text.rstrip(b"\n")
        sys.stdout.flush()
        time.sleep(0.2)
