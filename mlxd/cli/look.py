"""Looking at the daemon: status, logs, events."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import click

from mlxd import control, paths
from mlxd.cli.words import NOT_READY, as_json, lines_of
from mlxd.errors import NotRunning

#: What `mlxd status` ends with for a state; with NOT_READY for any other.
STATUS_STATUS = {"ready": 0, "degraded": 0, "stopped": 3}
#: Of a line that is followed: there is output that never ends one.
MOST_LINE_BYTES = 64 * 1024
#: What a line of ours begins with: RFC 3339 in UTC, microseconds.
STAMP = re.compile(rb'(?:\{"ts": ?")?(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z)')
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
            click.echo(text if text.isprintable() else printable(text.encode()))
    ctx.exit(STATUS_STATUS.get(told["state"], NOT_READY))


following_on = click.option("-f", "--follow", is_flag=True, help="Go on as it grows.")
how_many = click.option(
    "-n", "--lines", type=click.IntRange(0, 1_000_000), default=50, show_default=True, help="How many of the last lines."
)


@click.command()
@following_on
@how_many
@click.option("--server", "which", flag_value="server", help="The HTTP server's log.")
@click.option("--engine", "which", flag_value="engine", help="The engines' logs.")
@click.option("--supervisor", "which", flag_value="supervisor", default=True, help="The supervisor's log (default).")
def logs(follow: bool, lines: int, which: str) -> None:
    """Show the logs."""
    directory = paths.locate().logs
    files = sorted(directory.glob("engine-*.log")) if which == "engine" else [directory / f"{which}.log"]
    files = [file for file in files if file.is_file()]
    if not files:
        raise NotRunning(f"there is no {which} log in {directory}; `mlxd start` begins one")
    show(merged(files, lines), files if follow else [], printable)


@click.command()
@following_on
@how_many
@as_json
def events(follow: bool, lines: int, json_: bool) -> None:
    """Show what has happened, one event a line: when, what, to whom."""
    file = paths.locate().events
    files = [one for one in (file.with_name(file.name + ".1"), file) if one.is_file()]
    if not files:
        raise NotRunning(f"there are no events in {file.parent}; `mlxd start` begins them")
    last = [text for one in files for text in last_lines(one, lines)]
    show(last[len(last) - min(lines, len(last)) :], [file] if follow else [], printable if json_ else sentence)


# --- helpers ----------------------------------------------------------------------------------------------------------------------


def neighbour(url: str) -> dict[str, Any]:
    """How Ollama does, as far as it says so at once. One on another machine is not asked: a name may take long to be resolved."""
    from mlxd import ollama, probe

    if not probe.is_local(url):
        return {"url": url, "state": "not asked", "version": None, "models": [], "memory_bytes": None}
    found = ollama.look(url, OLLAMA_S)
    state = "slow" if found.state in ("hung", "wedged") else found.state
    return {"url": url, "state": state, "version": found.version, "models": found.models, "memory_bytes": found.memory_bytes}


def last_exit(where: paths.Paths) -> Any:
    """The newest exit record on disk; None when there is none."""
    import msgspec

    from mlxd import exits

    records = exits.read(where.exits)
    return msgspec.to_builtins(records[-1]) if records else None


def show(lines: list[bytes], files: list[Path], form: Callable[[bytes], str]) -> None:
    """These lines, then those that come to the files, until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        for text in itertools.chain(lines, following(files) if files else []):
            click.echo(form(text))


def sentence(text: bytes) -> str:
    """An event for people and awk: when, what, then a sentence that begins with whom it is about."""
    try:
        told = json.loads(text)
        return printable(f"{told['ts']}  {told['event']}  {told['text']}".encode())
    except (ValueError, KeyError, TypeError):  # half a line, of a machine that went down
        return printable(text)


def printable(text: bytes) -> str:
    """What a child wrote must not drive the reader's terminal."""
    from mlxd.logs import printable  # `mlxd status` does without logging

    return "\t".join(printable(part) for part in text.decode(errors="replace").split("\t"))


def last_lines(file: Path, count: int) -> list[bytes]:
    """At most `count` lines from the last MiB."""
    with open(file, "rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - 1024 * 1024))
        return log.read().splitlines()[-count:] if count else []


def merged(files: list[Path], count: int) -> list[bytes]:
    """The last lines of all of them by their times; what has none, such as the last words of a library, stands where it was written."""
    found = []
    for file in files:
        at = b""
        for text in last_lines(file, count):
            at = stamp[1] if (stamp := STAMP.match(text)) else at
            found.append((at, named(file, files) + text))
    found.sort(key=lambda line: line[0])
    return [text for _, text in found[max(0, len(found) - count) :]]


def named(file: Path, files: list[Path]) -> bytes:
    """What stands before its lines: whose they are, where there are several."""
    return f"{file.stem}  ".encode() if len(files) > 1 else b""


def following(files: list[Path]) -> Iterator[bytes]:
    """Lines as they are written, also after a log was cut or made anew; a very long one in parts."""
    opened: dict[Path, IO[bytes]] = {}
    for file in files:
        opened[file] = open(file, "rb")  # noqa: SIM115 as long as we follow
        opened[file].seek(0, os.SEEK_END)
    while True:
        for file, log in opened.items():
            there = os.fstat(log.fileno())
            anew = file.is_file() and file.stat().st_ino != there.st_ino
            if there.st_size < log.tell():
                log.seek(0)
            while text := log.readline(MOST_LINE_BYTES):
                yield named(file, files) + text.rstrip(b"\n")
            if anew:
                log.close()
                opened[file] = open(file, "rb")  # noqa: SIM115
        sys.stdout.flush()
        time.sleep(0.2)
