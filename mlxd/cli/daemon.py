"""Running the daemon: start, stop, restart, reload, run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from mlxd import control, paths
from mlxd.cli.words import NOT_READY, as_json, is_terminal, line_of, our_name
from mlxd.errors import ConfigError, MlxdError, NotRunning
from mlxd.lock import is_locked

if TYPE_CHECKING:
    from mlxd.managers import Manager

#: What `mlxd start` ends with for a state.
START_STATUS = {"ready": 0, "degraded": 0, "held": 75}
#: Of a process that is on its way up or down; a spare stays blank.
MOVING = ("starting", "loading", "draining", "stopping", "backoff")
#: A start in which nothing moves for this long is not going to be one.
STILL_S = 60.0
#: The worst stop takes 30 s of draining, 10 s of TERM and 10 s of KILL.
STOP_S = 60.0
#: Of a start by launchd or systemd until it answers: what an earlier run left is ended first, for 26 s at most.
BEGIN_S = 60.0
#: What launchd and systemd call a job that has no process and will get none by itself.
DOWN = ("", "not running", "inactive", "failed")
#: ... and one that will get one.
DUE = ("spawn scheduled", "waiting", "activating")
#: The supervisor's rehearsal takes 20 s at most, waiting for quiet 12 s.
RENEWAL_S = 60.0

port_option = click.option("--port", type=click.IntRange(0, 65535), help="Listen here instead of 11435; 0 is any free port.")
model_option = click.option("--model", help="Preload this model for this run.")


@click.command()
@click.option("--no-wait", is_flag=True, help="Return as soon as the daemon runs.")
@port_option
@model_option
@as_json
@click.pass_context
def start(ctx: click.Context, no_wait: bool, port: int | None, model: str | None, json_: bool) -> None:
    """Start in the background; wait until it is ready."""
    from mlxd import autostart  # and with it much that `mlxd restart` does without: it has to work beside code that does not

    where = paths.locate()
    owner = autostart.owner()
    if owner is not None and (port is not None or model is not None):
        raise ConfigError(
            f"{owner.name} starts mlxd here, without --port and --model: put them into {where.config},"
            " or set MLX_API_PORT or MLX_PRELOAD_MODELS and run `mlxd autostart install` again"
        )
    await_the_end_of_a_stop(where)
    if not is_running(where):
        flags = flag_arguments(port, model)
        if owner is not None:
            start_through(owner, where)
        else:
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


@click.command()
def stop() -> None:
    """Stop; running answers get 30 s to end."""
    from mlxd import autostart

    where = paths.locate()
    owner = autostart.owner()
    if owner is not None and not owner.needs_root:  # else what looks after it may not begin it either
        leave_down(owner)
    try:
        pid = end(where)
    except MlxdError:
        if owner is None:
            raise
        pid = owner.look(owner.mlxd).pid  # it hears nobody; its manager has other means
    if owner is not None and not rests(owner):
        owner.stop(owner.mlxd)
    click.echo(f"stopped  pid {pid}" if pid is not None else "mlxd is not running")


@click.command()
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


@click.command()
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


@click.command()
@port_option
@model_option
def run(port: int | None, model: str | None) -> None:
    """Run in the foreground, as launchd and systemd do.

    `mlxd serve` is the same.
    """
    sys.stdout.flush()
    # The daemon's process is the supervisor alone: neither click nor this file stays in its memory.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "mlxd.supervisor", *flag_arguments(port, model)])


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


def end(where: paths.Paths) -> int | None:
    """Stop it and wait until it has; its pid, None when none ran. Raises MlxdError."""
    deadline = time.monotonic() + STOP_S
    while True:
        try:
            pid = int(control.ask(where.control, "stop")["pid"])
            break
        except NotRunning:
            if not is_locked(where.lock) or time.monotonic() > deadline:
                return None
        time.sleep(0.05)  # it is just starting: it clears up after an earlier run before it listens
    while is_running(where) or is_locked(where.lock):
        if time.monotonic() > deadline:
            raise MlxdError(f"mlxd (pid {pid}) has not stopped within {STOP_S:.0f} s; look at `mlxd logs --supervisor`")
        time.sleep(0.02)
    return pid


def leave_down(owner: Manager) -> None:
    """Its manager also looks every five minutes whether it is up, and would begin it again."""
    try:
        owner.stop(owner.recover)
    except MlxdError as error:
        click.echo(f"{owner.recover} will start mlxd again within 5 min: {error}", err=True)


def rests(owner: Manager) -> bool:
    """Whether its manager has seen it end, and does not begin it again. Raises MlxdError."""
    deadline = time.monotonic() + 5.0
    while (state := owner.look(owner.mlxd).state) not in DOWN:
        if state in DUE or time.monotonic() > deadline:
            return False
        time.sleep(0.05)
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


def validate(where: paths.Paths, flags: list[str], environ: Mapping[str, str] = os.environ) -> None:
    """Refuse here, in this terminal, what the daemon would refuse. Raises ConfigError."""
    from mlxd import config, tokens

    paths.prepare(where)
    pairs = [flag.partition("=") for flag in flags[1::2]]
    found = config.load(where.config, [where.env_file], environ, {name: json.loads(value) for name, _, value in pairs})
    tokens.load(where.token, found.config)


def spawn_daemon(where: paths.Paths, flags: list[str]) -> None:
    """Start the supervisor in a session of its own and wait until it answers. Raises MlxdError with its own words if it ends instead."""
    file, _ = paths.open_log_anyway(where.log("supervisor"))
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
            words = (paths.read_small(where.log("supervisor"), 2**30) or b"")[size:].decode(errors="replace").strip()
            failed = MlxdError(words.rpartition("\n")[2].removeprefix("Error: ") or f"the supervisor ended with status {code}")
            failed.exit_status = code if code > 0 else 1
            raise failed
        time.sleep(0.02)
    process.returncode = 0  # it lives on without us: no ResourceWarning


def start_through(owner: Manager, where: paths.Paths) -> None:
    """Have its manager start mlxd, and wait until it answers. Never starts one beside it. Raises MlxdError."""
    from mlxd import autostart

    validate(where, [], autostart.environment_of(owner.file(owner.mlxd)) or {})
    owner.start(owner.mlxd)
    deadline = time.monotonic() + BEGIN_S
    while not is_running(where):
        found = owner.look(owner.mlxd)
        if time.monotonic() > deadline or (found.pid is None and found.last_exit and found.state not in DUE):
            failed = MlxdError(f"{owner.name} has started mlxd, which ended with status {found.last_exit}: look at `{owner.log}`")
            failed.exit_status = found.last_exit if found.last_exit == 78 else 1
            raise failed
        time.sleep(0.1)
    try:
        owner.start(owner.recover)  # which `mlxd stop` has ended
    except MlxdError as error:
        click.echo(f"mlxd is not looked after every 5 min: {error}", err=True)


#: What counts down in a reason.
STILL = re.compile(r"; next try.*")


def await_ready(where: paths.Paths, settled: bool = False) -> dict[str, Any]:
    """The status as soon as it is ready, degraded or held (`settled`: and no process is on its way up or down), or when nothing has moved
    for STILL_S; shows the state meanwhile."""
    shown: tuple[str, str] | None = None
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
        if is_terminal(sys.stderr) and told["reason"] and (now := (told["state"], STILL.sub("", told["reason"]))) != shown:
            shown = now
            click.echo(f"{told['state']}: {told['reason']}", err=True)
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
        f"model  {name}"
        + ("  (a built-in self-test and demo; `mlxd pull org/repo` brings a real one)" if name == "mlxd-tiny" else "")
    )
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "What is mlxd?"}]})
    header = " -H 'Authorization: Bearer TOKEN'" if paths.locate().token.exists() else ""
    click.echo(f"try    curl {told['url']}/api/chat{header} -d '{body}'")
    click.echo(f"page   {told['url']}/ui")
    click.echo(f"stop   {our_name()} stop")
