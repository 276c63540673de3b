"""Watching the daemon: top. The facts of the page at /ui, from the same feed, in a terminal."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import sys
import termios
import tty
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from mlxd import __version__, paths
from mlxd.cli import store
from mlxd.cli.stream import Broken, Stream
from mlxd.cli.words import age_of, as_json, bytes_of, is_terminal, lines_of, table
from mlxd.errors import MlxdError, NotRunning, Refused
from mlxd.logs import printable

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

#: Between two looks at the keyboard and at the size of the terminal, and between two tries to reach a server.
TICK_S, AGAIN_S = 0.2, 0.5
#: What the server keeps of them.
MOST_SAMPLES = 300
#: Heights of a sparkline's columns, from nothing to the most.
BARS, ASCII_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#"
#: What a state is painted with; others are not.
STYLES = {
    **dict.fromkeys(("ok", "ready", "running"), "green"),
    **dict.fromkeys(("degraded", "loading", "starting", "draining", "stopping", "releasing", "backoff", "lost"), "yellow"),
    **dict.fromkeys(("held", "cooldown", "retried"), "red"),
}

Rows = list[tuple[str, ...]]


@click.command()
@as_json
@click.pass_context
def top(ctx: click.Context, json_: bool) -> None:
    """Watch it: processes, speed, requests, models, incidents.

    q ends. Without a terminal, what it would show just now is printed once.
    """
    where = paths.locate()
    feed = Feed()
    server = store.running(where)
    try:
        if json_:
            feed.look(server)
            click.echo(json.dumps(feed.now | {"samples": list(feed.samples)}))
        elif is_terminal(sys.stdin) and is_terminal(sys.stdout) and os.environ.get("TERM") != "dumb":
            with Keyboard() as keyboard:
                watch(where, feed, keyboard)
            if keyboard.ended_by not in (0, signal.SIGINT):
                ctx.exit(128 + keyboard.ended_by)
        else:
            feed.look(server)
            for line in snapshot(feed):
                click.echo(line)
    except (KeyError, TypeError) as error:
        version = feed.now.get("version", __version__)
        if version == __version__:
            raise
        raise MlxdError(f"the server is of mlxd {version}, this command of {__version__}: run `mlxd restart`") from error


# --- what it knows ----------------------------------------------------------------------------------------------------------------


class Feed:
    """What the server has told. `now`: its newest picture of all. `trouble`: why there is no newer one just now; "" while there is."""

    def __init__(self) -> None:
        self.now: dict[str, Any] = {}
        self.samples: deque[dict[str, Any]] = deque(maxlen=MOST_SAMPLES)
        self.trouble = ""

    def look(self, server: store.Server) -> None:
        """Once. Raises MlxdError."""
        for _ in self.follow(server):
            if self.now:
                return

    def follow(self, server: store.Server) -> Iterator[None]:
        """Comes back with each picture, and each tick without one. Raises MlxdError when the server ends, or says no."""
        event = ""
        with Stream(server, "/ui/feed") as stream:
            for line in stream.lines(TICK_S):
                if line is None:
                    yield
                elif line.startswith("event: "):
                    event = line[7:]
                elif line.startswith("data: "):
                    self.take(event, line[6:])
                    yield
        raise Broken("the server is being replaced")

    def take(self, event: str, data: str) -> None:
        try:
            told = json.loads(data)
        except ValueError as error:
            raise Broken("the server is being replaced") from error
        if event == "history":
            self.samples = deque(told["samples"], MOST_SAMPLES)
        elif event == "now":
            self.now, self.trouble = told, ""
            if (sample := told["sample"]) and (not self.samples or sample["at"] > self.samples[-1]["at"]):
                self.samples.append(sample)


def sentence_of(error: MlxdError) -> str:
    """Why there is nothing new, for as long as that is so. Raises what waiting does not mend."""
    if isinstance(error, NotRunning):
        return "mlxd is not running; this goes on when it does"
    if isinstance(error, Refused) and error.status == 404:
        raise MlxdError("the server is of an earlier version; `mlxd restart` replaces it") from error
    if isinstance(error, Refused) and error.status != 503:
        raise error
    return "the server is being replaced" if isinstance(error, Broken) else str(error)


# --- how it is watched ------------------------------------------------------------------------------------------------------------


class Keyboard:
    """Keys as they are pressed, and nothing on the screen of them, while it is entered. Nobody is interrupted: what puts the terminal back
    has to get round to it, so Ctrl-C and signals are only noted, for `left`."""

    def __init__(self) -> None:
        self.stdin = sys.stdin.fileno()
        self.before = termios.tcgetattr(self.stdin)
        self.ended_by = 0  # signal

    def __enter__(self) -> Keyboard:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.note)
        tty.setcbreak(self.stdin)
        now = termios.tcgetattr(self.stdin)
        now[6][termios.VSUSP] = bytes([os.fpathconf(self.stdin, "PC_VDISABLE") % 256])  # Ctrl-Z would leave the screen as it is
        termios.tcsetattr(self.stdin, termios.TCSADRAIN, now)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(self.stdin, termios.TCSADRAIN, self.before)

    def note(self, number: int, frame: object) -> None:
        self.ended_by = number

    def left(self, within_s: float) -> bool:
        """Whether somebody wants to leave; waits so long for a key."""
        ready = select.select([self.stdin], [], [], within_s)[0]
        keys = os.read(self.stdin, 64) if ready else b" "  # b"": the terminal is gone
        return bool(self.ended_by) or not keys or bool(set(b"qQ\x04") & set(keys))


def watch(where: paths.Paths, feed: Feed, keyboard: Keyboard) -> None:
    """Until somebody leaves. Raises MlxdError when waiting mends nothing."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with Live(screen=True, auto_refresh=False, console=console, redirect_stdout=False, redirect_stderr=False) as live:
        drawn: object = None
        for _ in pictures(where, feed):
            state = feed.now.get("at"), feed.trouble, console.size
            if state != drawn:
                drawn = state
                live.update(picture(feed, console), refresh=True)
            if keyboard.left(AGAIN_S if feed.trouble else 0.0):
                return


def pictures(where: paths.Paths, feed: Feed) -> Iterator[None]:
    """Comes back whenever there may be something to draw, for ever. Raises MlxdError."""
    while True:
        try:
            yield from feed.follow(store.running(where))
        except MlxdError as error:
            feed.trouble = sentence_of(error)
        yield


def picture(feed: Feed, console: Console) -> Group:
    """All of it; what does not fit is cut off below, so the most important comes first."""
    from rich.console import Group
    from rich.text import Text

    now = feed.now
    trouble = [Text(printable(feed.trouble), "bold red")] if feed.trouble else []
    if not now:
        return Group(Text("mlxd   q ends"), *trouble)
    parts: list[Any] = [headline(now, stale=bool(trouble)), *trouble]
    parts += [Text(printable(line), "yellow") for line in remarks(now)]
    utf8 = console.encoding.startswith("utf")
    parts += [Text(), speed(feed, console.width, utf8), *(Text(line) for line in figures(now))]
    for rows in (processes(now), requests(now, max(3, console.height // 4)), models(now), pulls(now)):
        if len(rows) > 1:
            parts += [Text(), grid(rows)]
    if told := incidents(now):
        parts += [Text(), Text("incidents", "dim"), *(Text(line, style) for line, style in told)]
    return Group(*parts)


def headline(now: dict[str, Any], stale: bool) -> Text:
    from rich.text import Text

    status = now["status"] or {}
    word = "as it was" if stale else now["word"]
    text = Text.assemble(("mlxd ", "bold"), now["version"], "  ", (word, f"bold {STYLES.get(word, 'none')}"))
    if status:
        text.append(f"  {status['url']}  up {age_of(status['supervisor']['up_s'])}")
    text.append("   q ends", "dim")
    return text


def speed(feed: Feed, width: int, utf8: bool) -> Text:
    """Tokens a second: now, the course of it, and the most."""
    from rich.text import Text

    rates = [sample["tokens_s"] for sample in feed.samples]
    text = Text.assemble("speed  ", (f"{rates[-1] if rates else 0.0:.1f}", "bold"), " tokens/s  ")
    room = min(len(rates), 60, width - 45)
    if room > 0:
        text.append(sparkline(rates, room, BARS if utf8 else ASCII_BARS), "cyan")
        text.append(f"  {max(rates):.0f} at most in {age_of(feed.samples[-1]['at'] - feed.samples[0]['at'])}", "dim")
    return text


def sparkline(rates: Sequence[float], columns: int, bars: str) -> str:
    """The mean of each column's rates; the newest stand on the right."""
    parts = [rates[len(rates) * n // columns : len(rates) * (n + 1) // columns] for n in range(columns)]
    means = [sum(part) / len(part) for part in parts]
    most = max(means)
    return "".join(bars[math.ceil(mean / most * (len(bars) - 1)) if most else 0] for mean in means)


def grid(rows: Rows) -> Table:
    """The first row is the heading."""
    from rich.table import Table
    from rich.text import Text

    found = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading in rows[0]:
        found.add_column(Text(heading), no_wrap=True)
    for row in rows[1:]:
        found.add_row(*(Text(cell, STYLES.get(cell, "")) for cell in row))
    return found


# --- what is told, in words ---------------------------------------------------------------------------------------------------------


def snapshot(feed: Feed) -> Iterator[str]:
    """All of it, once, in plain lines: what `mlxd status` says, then the rest."""
    now = feed.now
    if now["status"]:
        yield from map(printable, lines_of(now["status"] | {"ollama": None, "last_exit": None}))  # which the server has not asked
    else:
        yield f"{now['word']}  the supervisor does not answer"
    rate = feed.samples[-1]["tokens_s"] if feed.samples else 0.0
    yield f"speed  {rate:.1f} tokens/s"
    yield from figures(now)
    for rows in (requests(now, len(now["requests"])), models(now), pulls(now)):
        if len(rows) > 1:
            yield from table(rows)
    for line, _ in incidents(now):
        yield line


def remarks(now: dict[str, Any]) -> list[str]:
    """Why not all is well, and what else a person should know."""
    status = now["status"]
    if status is None:
        return ["the supervisor does not answer", *([now["reason"]] if now["reason"] else [])]
    return [line for line in dict.fromkeys((now["reason"], status["reason"], *status.get("notes", []))) if line]


def figures(now: dict[str, Any]) -> list[str]:
    queue, sample = now["queue"], now["sample"]
    lines = [f"queue  {queue['running']} of {queue['slots']} running  {queue['waiting']} of {queue['seats']} waiting"]
    if sample:
        lines[0] += f"  prompts {sample['prompt_tokens_s']:.0f} tokens/s"
        lines.append(f"memory  engines {bytes_of(sample['engines_bytes'])}  available {bytes_of(sample['available_bytes'])}")
    ended = (now["status"] or {}).get("ends", {})
    ends = [f"{child} {cause} {count}" for child, causes in ended.items() for cause, count in causes.items()]
    if ends or now["resumed"]:
        lines.append(f"ended  {', '.join(ends) or 'none'}  requests that went on {now['resumed']}")
    return [printable(line) for line in lines]


def processes(now: dict[str, Any]) -> Rows:
    rows: Rows = [("process", "state", "pid", "up", "memory", "restarts", "running", "model")]
    status = now["status"]
    if status is None:
        return rows
    rows.append(process("supervisor", {"state": "running", "restarts": "-"} | status["supervisor"]))
    if status["server"]:
        rows.append(process("server", status["server"]))
    rows += [process(f"engine-{engine['slot']}", engine) for engine in status["engines"]]
    rows += [process(f"puller-{puller['slot']}", puller) for puller in status["pullers"]]
    return rows


def process(name: str, told: dict[str, Any]) -> tuple[str, ...]:
    model = shortened(told["model"] or "no model") if "model" in told else ""
    figures = age_of(told["up_s"]), bytes_of(told["memory_bytes"]), str(told["restarts"])
    return name, told["state"], str(told["pid"] or "-"), *figures, str(told.get("running", "")), model


def requests(now: dict[str, Any], most: int) -> Rows:
    """Those in hand, `most` of them."""
    rows: Rows = [("request", "phase", "age", "tokens", "resumed", "model")]
    for flight in now["requests"][:most]:
        phase = flight["phases"][-1][0] if flight["phases"] else "-"
        tokens = f"{flight['prompt_tokens'] or 0} + {flight['completion_tokens'] or 0}"
        age = age_of(max(0.0, now["at"] - flight["at"]))
        rows.append(
            (printable(flight["path"]), phase, age, tokens, str(flight["resumes"] or ""), shortened(flight["model"] or "-"))
        )
    if (more := len(now["requests"]) - most) > 0:
        rows.append((f"and {more} more", "", "", "", "", ""))
    return rows


def models(now: dict[str, Any]) -> Rows:
    """Those in memory, or on their way."""
    rows: Rows = [("model", "state", "memory", "running", "leaves in")]
    for model in now["models"]:
        if model["state"] != "absent":
            leaves = "never" if model["leaves_s"] is None else age_of(model["leaves_s"])
            rows.append((shortened(model["name"]), model["state"], bytes_of(model["memory_bytes"]), str(model["running"]), leaves))
    return rows


def pulls(now: dict[str, Any]) -> Rows:
    rows: Rows = [("download", "status", "done")]
    for pull in now["pulls"]:
        done = f"{pull['completed'] / pull['total']:.0%} of {bytes_of(pull['total'])}" if pull["total"] else "-"
        rows.append((printable(pull["name"]), printable(pull["status"]), done))
    return rows


def incidents(now: dict[str, Any]) -> list[tuple[str, str]]:
    """Newest first: a line with its style for what ended and how, one for what is done about it, one for its last words."""
    lines = []
    for one in now["incidents"]:
        age = age_of(max(0.0, now["at"] - datetime.fromisoformat(one["ts"]).timestamp()))
        who = f"{one['child']}-{one['slot']}" if one["child"] != "server" else "server"
        model = f"  {shortened(one['model'])}" if one["model"] else ""
        lines.append((printable(f"{age} ago  {who}  pid {one['pid']}  {one['cause']}{model}"), "red"))
        lines.append((f"  {printable(one['remedy'])}", ""))
        if words := one["text"].strip():
            lines.append((f"  {printable(words.splitlines()[-1])}", "dim"))
    return lines


def shortened(name: str) -> str:
    return printable(name.removesuffix(":latest"))
