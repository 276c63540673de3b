"""The command line: words in, calls, words out, exit status. The only file that prints or exits (beside the processes' own doors).

Data goes to stdout, talk to stderr. Heavy imports wait until a command needs them: `mlxd status` takes less than 150 ms.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import click

from mlxd import __version__, control, paths
from mlxd.errors import MlxdError, NotRunning
from mlxd.lock import is_locked

#: What `mlxd start` and `mlxd status` end with for a state.
START_STATUS = {"ready": 0, "degraded": 0, "held": 75}
STATUS_STATUS = {"ready": 0, "degraded": 0, "stopped": 3}
NOT_READY = 4
#: Of a process that is on its way up or down; a spare stays blank.
MOVING = ("starting", "loading", "draining", "stopping", "backoff")
#: A start in which nothing moves for this long is not going to be one.
STILL_S = 60.0
#: The worst stop takes 30 s of draining, 10 s of TERM and 10 s of KILL.
STOP_S = 60.0
#: The supervisor's rehearsal takes 20 s at most, waiting for quiet 12 s.
RENEWAL_S = 60.0

GROUPS = {
    "Run it": ["start", "stop", "restart", "reload", "run"],
    "Look at it": ["status", "logs"],
}


class Commands(click.Group):
    """Lists the commands in groups, and turns an MlxdError into one line and its exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in GROUPS.values() for name in names]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return super().get_command(ctx, "run" if name == "serve" else name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(60)) for name in names])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MlxdError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_status)
        except BrokenPipeError:  # `mlxd logs | head`
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 so that the interpreter's last flush has somewhere to go
            ctx.exit(0)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="mlxd %(version)s")
def main() -> None:
    """The always-on local LLM server for MLX models, for Ollama and OpenAI clients on port 11435."""


as_json = click.option("--json", "json_", is_flag=True, help="Print JSON for programs.")
port_option = click.option("--port", type=click.IntRange(0, 65535), help="Listen here instead of 11435; 0 is any free port.")
model_option = click.option("--model", help="Preload this model for this run.")


# --- run it --------------------------------------------------------------------------------------------------------------------


@main.command()
@click.option("--no-wait", is_flag=True, help="Return as soon as the daemon runs.")
@port_option
@model_option
@as_json
@click.pass_context
def start(ctx: click.Context, no_wait: bool, port: int | None, model: str | None, json_: bool) -> None:
    """Start in the background; wait until it is ready."""
    where = paths.locate()
    await_the_end_of_a_stop(where)
    if not is_running(where):
        flags = flag_arguments(port, model)
        validate(where, flags)
        spawn_daemon(where, flags)
    elif port is not None or model is not None:
        click.echo("mlxd is already running; --port and --model take effect after `mlxd stop`", err=True)
    told = control.ask(where.control, "status") if no_wait else await_ready(where)
    if json_:
        click.echo(json.dumps(told))
    elif told["state"] in ("ready", "degraded"):
        greet(told)
    else:
        click.echo(f"{told['state']}  {told['reason'] or ''}".rstrip())
    ctx.exit(0 if no_wait else START_STATUS.get(told["state"], NOT_READY))


@main.command()
def stop() -> None:
    """Stop; running answers get 30 s to end."""
    where = paths.locate()
    end = time.monotonic() + STOP_S
    while True:
        try:
            pid = int(control.ask(where.control, "stop")["pid"])
            break
        except NotRunning:
            if not is_locked(where.lock) or time.monotonic() > end:
                click.echo("mlxd is not running")
                return
        time.sleep(0.05)  # it is just starting: it clears up after an earlier run before it listens
    while is_running(where) or is_locked(where.lock):
        if time.monotonic() > end:
            raise MlxdError(f"mlxd (pid {pid}) has not stopped within {STOP_S:.0f} s; look at `mlxd logs --supervisor`")
        time.sleep(0.02)
    click.echo(f"stopped  pid {pid}")


@main.command()
@click.option(
    "--supervisor", is_flag=True, help="Replace the supervisor, in place: everything else goes on. The way to upgrade it."
)
@as_json
@click.pass_context
def restart(ctx: click.Context, supervisor: bool, json_: bool) -> None:
    """Replace the server; models stay loaded, no request is lost."""
    where = paths.locate()
    if supervisor:
        told = control.ask(where.control, "restart_supervisor", timeout_s=RENEWAL_S)
        new = told["supervisor"]
        click.echo(
            json.dumps(told) if json_ else f"restarted  supervisor pid {new['pid']}  run {new['run']}  mlxd {told['version']}"
        )
        return
    validate(where, [])
    control.ask(where.control, "restart")
    told = await_ready(where, settled=True)
    click.echo(json.dumps(told) if json_ else line_of(told))
    ctx.exit(START_STATUS.get(told["state"], NOT_READY))


@main.command()
@as_json
def reload(json_: bool) -> None:
    """Read the configuration again."""
    told = control.ask(paths.locate().control, "reload")
    if json_:
        click.echo(json.dumps(told))
    elif not told["changed"]:
        click.echo("nothing changed")
    else:
        click.echo(f"changed: {', '.join(told['changed'])}")


@main.command()
@port_option
@model_option
def run(port: int | None, model: str | None) -> None:
    """Run in the foreground, as launchd and systemd do.

    `mlxd serve` is the same.
    """
    sys.stdout.flush()
    # The daemon's process is the supervisor alone: neither click nor this file stays in its memory.
    os.execv(sys.executable, [sys.executable, "-m", "mlxd.supervisor", *flag_arguments(port, model)])


# --- look at it ----------------------------------------------------------------------------------------------------------------


@main.command()
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
    if json_:
        click.echo(json.dumps(told))
    else:
        for text in lines_of(told):
            click.echo(text)
    ctx.exit(STATUS_STATUS.get(told["state"], NOT_READY))


@main.command()
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


# --- helpers, in the order of their use -------------------------------------------------------------------------------------------


def flag_arguments(port: int | None, model: str | None) -> list[str]:
    """Flags as the supervisor takes them."""
    flags: dict[str, Any] = {}
    if port is not None:
        flags["server.port"] = port
    if model is not None:
        flags["models.preload"] = [model]
    return [part for name, value in flags.items() for part in ("--set", f"{name}={json.dumps(value)}")]


def is_running(where: paths.Paths) -> bool:
    """Whether somebody answers on the control socket."""
    try:
        control.ask(where.control, "status")
    except NotRunning:
        return False
    return True


def await_the_end_of_a_stop(where: paths.Paths) -> None:
    """A start during a stop means: after it."""
    end = time.monotonic() + STOP_S
    while time.monotonic() < end:
        try:
            if control.ask(where.control, "status")["state"] != "draining":
                return
        except NotRunning:
            if not is_locked(where.lock):
                return
        time.sleep(0.05)


def validate(where: paths.Paths, flags: list[str]) -> None:
    """Refuse here, in this terminal, what the daemon would refuse. Raises ConfigError."""
    from mlxd import config, tokens

    paths.prepare(where)
    pairs = [flag.partition("=") for flag in flags[1::2]]
    found = config.load(where.config, [where.env_file], os.environ, {name: json.loads(value) for name, _, value in pairs})
    tokens.load(where.token, found.config)


def spawn_daemon(where: paths.Paths, flags: list[str]) -> None:
    """Start the supervisor in a session of its own and wait until it answers. Raises MlxdError with its own words if it ends instead."""
    file = paths.open_log(where.log("supervisor"))
    size = os.fstat(file).st_size
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxd.supervisor", *flags],
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=file,
        start_new_session=True,
        cwd="/",
    )
    os.close(file)
    while not is_running(where):
        if (code := process.poll()) is not None:
            if code == 0:  # another start won the race
                return
            words = where.log("supervisor").read_bytes()[size:].decode(errors="replace").strip()
            failed = MlxdError(words.rpartition("\n")[2].removeprefix("Error: ") or f"the supervisor ended with status {code}")
            failed.exit_status = code if code > 0 else 1
            raise failed
        time.sleep(0.02)
    process.returncode = 0  # it lives on without us: no ResourceWarning


def await_ready(where: paths.Paths, settled: bool = False) -> dict[str, Any]:
    """The status as soon as it is ready, degraded or held (`settled`: and no process is on its way up or down), or when nothing has moved
    for STILL_S; shows the state meanwhile."""
    shown = ""
    not_found_until = time.monotonic() + 5.0
    while True:
        try:
            told = control.ask(where.control, "status")
        except NotRunning:
            if time.monotonic() > not_found_until:
                raise
            time.sleep(0.05)
            continue
        moving = settled and any(p["state"] in MOVING for p in [told["server"] or {"state": "starting"}, *told["engines"]])
        if (told["state"] in START_STATUS and not moving) or told["moved_s"] > STILL_S:
            return told
        if sys.stderr.isatty() and (now := f"{told['state']}: {told['reason']}") != shown:
            shown = now
            click.echo(now, err=True)
        time.sleep(0.05)


def greet(told: dict[str, Any]) -> None:
    """What to do next, for somebody who sees it the first time."""
    model = next((e["model"] for e in told["engines"] if e["model"]), "mlxd-tiny:latest")
    name = model.removesuffix(":latest")
    click.echo(line_of(told))
    if told["reason"]:
        click.echo(f"note  {told['reason']}")
    click.echo(f"url    {told['url']}")
    click.echo(
        f"model  {name}" + ("  (a built-in self-test and demo; put MLX models into ~/mlx-models)" if name == "mlxd-tiny" else "")
    )
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "What is mlxd?"}]})
    header = " -H 'Authorization: Bearer TOKEN'" if paths.locate().token.exists() else ""
    click.echo(f"try    curl {told['url']}/api/chat{header} -d '{body}'")
    click.echo(f"stop   {our_name()} stop")


def our_name() -> str:
    """What to type to get this command: `mlxd` where the shell finds it, else its path (after `make start`, .venv is on nobody's PATH)."""
    found = shutil.which("mlxd")
    path = Path(sys.argv[0])
    if path.name != "mlxd":
        return "python -m mlxd"
    return "mlxd" if found and Path(found).samefile(path) else str(path)


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
    if last := told["last_exit"]:
        how = f"signal {last['signal']}" if last["signal"] is not None else f"status {last['code']}"
        yield f"last exit  {last['ts']}  {name_of(last['child'], last['slot'])}  pid {last['pid']}  {last['cause']}  {how}"


def row(name: str, process: dict[str, Any], more: str = "") -> str:
    pid = f"pid {process['pid']}" if process["pid"] else "no process"
    restarts = f"  restarts {process['restarts']}" if "restarts" in process else ""
    text = f"{name:<10}  {process['state']:<8}  {pid}  up {age_of(process['up_s'])}  memory {bytes_of(process['memory_bytes'])}"
    return text + restarts + more


def name_of(child: str, slot: int) -> str:
    return "server" if child == "server" else f"engine-{slot}"


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


def last_exit(where: paths.Paths) -> Any:
    """The newest exit record on disk; None when there is none."""
    import msgspec

    from mlxd import exits

    records = exits.read(where.exits)
    return msgspec.to_builtins(records[-1]) if records else None


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


def printable(text: bytes) -> str:
    """A log line with control characters escaped: what a child wrote must not drive the reader's terminal."""
    return "".join(
        c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text.decode(errors="replace")
    )


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
