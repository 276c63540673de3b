"""What is said: a status and its parts as sentences that a person and awk can both read."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import click

#: The exit status of what found mlxd running, and not ready.
NOT_READY = 4

#: Of every command that shows something.
as_json = click.option("--json", "json_", is_flag=True, help="Print JSON for programs.")


def our_name() -> str:
    """What to type to get this command: `mlxd` where the shell finds it, else its path (after `make start`, .venv is on nobody's PATH)."""
    found = shutil.which("mlxd")
    path = Path(sys.argv[0])
    if path.name != "mlxd":
        return "python -m mlxd"
    return "mlxd" if found and Path(found).samefile(path) else str(path)


def is_terminal(stream: TextIO | None) -> bool:
    """None: it was closed before we began."""
    return stream is not None and stream.isatty()


def coloured(stream: TextIO | None) -> bool:
    """Whether it is for eyes that want colours."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def line_of(told: dict[str, Any]) -> str:
    return next(iter(lines_of(told)))


def lines_of(told: dict[str, Any]) -> Iterator[str]:
    """The status for people and awk: the whole on the first line, then a process a line."""
    if told["state"] == "stopped":
        yield "stopped  " + told["reason"]
        if last := told["last_exit"]:
            yield f"last exit  {last['ts']}  {name_of(last['child'], last['slot'])}  {last['cause']}"
        return
    parts = [told["state"], told["url"]]
    engines = [e for e in told["engines"] if e["model"]]
    parts.append(", ".join(e["model"].removesuffix(":latest") for e in engines) or "no model")
    everybody = [told["supervisor"], *([told["server"]] if told["server"] else []), *told["engines"]]
    parts.append(f"memory {bytes_of(sum(p['memory_bytes'] for p in everybody))}")
    parts.append(f"restarts {sum(p.get('restarts', 0) for p in everybody)}")
    yield "  ".join(parts)
    if told["reason"]:
        yield f"reason  {told['reason']}"
    for note in told.get("notes", []):
        yield f"note  {note}"
    yield row("supervisor", {"state": "running", **told["supervisor"]})
    if told["server"]:
        yield row("server", told["server"])
    for engine in told["engines"]:
        name = (engine["model"] or "no model").removesuffix(":latest")
        yield row(f"engine-{engine['slot']}", engine, f"  {name}  running {engine['running']}")
    for puller in told.get("pullers", []):  # a supervisor of an earlier version has none
        yield row(f"puller-{puller['slot']}", puller, f"  {puller['model']}")
    if (ollama := told.get("ollama")) and ollama["state"] != "down":
        memory = f"  memory {bytes_of(ollama['memory_bytes'])}" if ollama["memory_bytes"] is not None else ""
        models = f"  {', '.join(ollama['models']) or 'no model'}" if memory else ""
        yield f"{'ollama':<10}  {ollama['state']:<8}  {ollama['url']}{memory}{models}"
    if last := told["last_exit"]:
        how = f"signal {last['signal']}" if last["signal"] is not None else f"status {last['code']}"
        yield f"last exit  {last['ts']}  {name_of(last['child'], last['slot'])}  pid {last['pid']}  {last['cause']}  {how}"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines with aligned columns, two blanks apart. The first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def row(name: str, process: dict[str, Any], more: str = "") -> str:
    pid = f"pid {process['pid']}" if process["pid"] else "no process"
    restarts = f"  restarts {process['restarts']}" if "restarts" in process else ""
    text = f"{name:<10}  {process['state']:<8}  {pid}  up {age_of(process['up_s'])}  memory {bytes_of(process['memory_bytes'])}"
    return text + restarts + more


def name_of(child: str, slot: int) -> str:
    return "server" if child == "server" else f"{child}-{slot}"


def age_of(seconds: float) -> str:
    """3h12m, 4m07s, 12s."""
    whole = int(seconds)
    if whole >= 86400:
        return f"{whole // 86400}d{whole % 86400 // 3600:02}h"
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 60}m{whole % 60:02}s" if whole >= 60 else f"{whole}s"


def bytes_of(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
