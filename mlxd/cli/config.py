"""The settings as they are, and where each comes from: config."""

from __future__ import annotations

import json
from typing import Any

import click

from mlxd import control, paths
from mlxd.cli.words import as_json, table
from mlxd.errors import MlxdError


@click.command()
@as_json
def config(json_: bool) -> None:
    """Show every setting, and where its value comes from.

    As `mlxd start` would have it in this shell. Exit status: 78 if it would refuse them.
    """
    from mlxd import masks

    where = paths.locate()
    told = masks.settings(where)
    if json_:
        click.echo(json.dumps(told))
    else:
        rows = [("setting", "value", "from")]
        rows += [(name, in_words(each["value"]), each["from"]) for name, each in told["settings"].items()]
        rows += [(f"services.{service['name']}", service["url"], str(where.config)) for service in told["services"]]
        for line in table(rows):
            click.echo(line)
        read = ", ".join(f"{file}{'' if file.is_file() else ' (there is none)'}" for file in (where.config, where.env_file))
        click.echo(f"read: {read} and the environment", err=True)
    if difference := elsewhere(where, told["settings"]["server.port"]["value"]):
        click.echo(difference, err=True)


# --- helpers ----------------------------------------------------------------------------------------------------------------------


def in_words(value: Any) -> str:
    from mlxd.logs import printable

    if value in (None, ""):
        return "-"
    if value in ([], {}):
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def elsewhere(where: paths.Paths, port: int) -> str:
    """That the daemon runs with other settings, as far as that shows; "" when it does not."""
    try:
        told = control.ask(where.control, "status")
    except MlxdError:
        return ""
    if port in (0, told["port"]):
        return ""
    return f"mlxd runs with other settings than these, on port {told['port']}: it was started with a flag or another environment"
