"""The end of it: uninstall."""

from __future__ import annotations

import sys

import click

from mlxd import autostart, paths
from mlxd.cli import daemon
from mlxd.cli.words import is_terminal
from mlxd.errors import MlxdError


@click.command()
@click.option("--purge", is_flag=True, help="Remove state, logs and configuration, too; never a model.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def uninstall(purge: bool, yes: bool) -> None:
    """Stop mlxd and remove its autostart."""
    where = paths.locate()
    places = ", ".join(dict.fromkeys(str(place) for place in (where.home, where.logs, where.config_dir)))
    what = "stop mlxd and remove its autostart" + (f", and remove its state, logs and configuration in {places}" if purge else "")
    if not yes:
        if not is_terminal(sys.stdin):
            raise MlxdError(f"this would {what}, and there is nobody to ask: add --yes")
        click.confirm(f"{what[0].upper()}{what[1:]}?", abort=True)
    if (owner := autostart.owner()) is not None:
        autostart.remove(owner)
    daemon.end(where)
    if purge:
        try:
            paths.purge(where)
        except OSError as error:
            raise MlxdError(f"stopped, and not all of it removed: {error.filename}: {error.strerror}") from error
    click.echo("uninstalled; `pip uninstall mlxd` removes the program, models stay where they are")
