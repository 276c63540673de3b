"""What keeps mlxd from serving, and an archive for whoever is to help: doctor."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import msgspec

from mlxd import paths
from mlxd.cli.words import as_json
from mlxd.logs import printable

COLOURS = {"problem": "red", "advice": "yellow", "ok": "green"}


@click.command()
@click.option(
    "--bundle", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="Write a zip archive for a report of a bug."
)
@as_json
@click.pass_context
def doctor(ctx: click.Context, bundle: Path | None, json_: bool) -> None:
    """Find what keeps mlxd from serving, and what it would be better with.

    Gets a real answer out of the built-in model, which takes some seconds. The bundle has no prompt, no answer and no token in it; names of
    models and paths it has. Exit status: 1 only if something keeps mlxd from serving now; advice does not change it.
    """
    from mlxd.doctor import Doctor

    where = paths.locate()
    found = []
    for finding in Doctor(where).findings():
        found.append(finding)
        if not json_:
            click.echo(
                f"{click.style(f'{finding.level:<7}', fg=COLOURS[finding.level])}  {finding.check:<11}  {printable(finding.text)}"
            )
            sys.stdout.flush()
    if bundle is not None:
        from mlxd import bundle as bundles

        bundles.write(bundle, where, found)
    problems = sum(finding.level == "problem" for finding in found)
    if json_:
        click.echo(
            json.dumps({"findings": msgspec.to_builtins(found), "problems": problems, "bundle": str(bundle) if bundle else None})
        )
    elif bundle is not None:
        click.echo(f"bundle   {bundle}")
    ctx.exit(1 if problems else 0)
