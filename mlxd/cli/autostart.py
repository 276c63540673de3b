"""Starting mlxd without anybody: autostart."""

from __future__ import annotations

import json
from typing import Any

import click

from mlxd import autostart as jobs
from mlxd import control, managers, paths
from mlxd.cli import daemon
from mlxd.cli.words import as_json
from mlxd.errors import NotRunning
from mlxd.managers import Manager

system_option = click.option("--system", is_flag=True, help="For the whole machine, which may boot with nobody to log in.")


@click.group()
def autostart() -> None:
    """Start at login or boot, and again after a crash: launchd or systemd does it."""


@autostart.command()
@system_option
@as_json
def install(system: bool, json_: bool) -> None:
    """Let launchd or systemd start mlxd, with the settings of this shell; a second time applies what has changed."""
    manager = managers.manager(system)
    changed = jobs.write(manager)
    end_what_runs_by_hand(manager)
    begun = jobs.load(manager, changed)
    if json_:
        click.echo(json.dumps(jobs.report(manager)))
    else:
        click.echo("installed" if begun else "installed already, and nothing has changed")
        show(jobs.report(manager))


@autostart.command()
@system_option
def uninstall(system: bool) -> None:
    """Stop mlxd, and let nobody start it again."""
    click.echo("uninstalled, and stopped" if jobs.remove(managers.manager(system)) else "autostart is not installed")


@autostart.command()
@as_json
@click.pass_context
def status(ctx: click.Context, json_: bool) -> None:
    """Show what is installed. Exit status: 0 something is, 1 nothing."""
    told = [jobs.report(managers.manager(system)) for system in (False, True)]
    installed = [each for each in told if each["installed"]]
    if json_:
        click.echo(json.dumps((installed or told)[0]))
    elif not installed:
        click.echo("autostart is not installed; `mlxd autostart install` does it")
    else:
        for each in installed:
            show(each)
    ctx.exit(0 if installed else 1)


# --- helpers ----------------------------------------------------------------------------------------------------------------------


def end_what_runs_by_hand(manager: Manager) -> None:
    """It would be a second owner: what the manager begins would find it running, and end."""
    where = paths.locate()
    try:
        pid = control.ask(where.control, "status")["supervisor"]["pid"]
    except NotRunning:
        return
    if pid != manager.look(manager.mlxd).pid:
        click.echo(f"mlxd runs by hand, pid {pid}: it is stopped, and {manager.name} starts it again", err=True)
        daemon.end(where)


def show(told: dict[str, Any]) -> None:
    kind = (
        ("daemon" if told["system"] else "agent")
        if told["manager"] == "launchd"
        else ("system unit" if told["system"] else "user unit")
    )
    pid = f"  pid {told['pid']}" if told["pid"] else ""
    click.echo(f"mlxd     {told['state'] or 'not loaded'}{pid}  {told['manager']} {kind}  {told['file']}")
    click.echo(f"recover  {'every 5 min' if told['recover'] else 'at rest'}")
    click.echo(f"begins   {told['begins']}")
    for name, value in told["environment"].items():
        click.echo(f"exports  {name}={value}")
