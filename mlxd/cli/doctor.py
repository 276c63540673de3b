"""What keeps mlxd from serving, and an archive for whoever is to help: doctor."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from mlxd import paths
from mlxd.cli.words import as_json, coloured
from mlxd.logs import printable

if TYPE_CHECKING:
    from mlxd.doctor import Doctor, Finding

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
    from mlxd import bundle as bundles
    from mlxd.doctor import Doctor

    where = paths.locate()
    with bundles.begun(bundle) if bundle is not None else contextlib.nullcontext() as out:
        found = list(shown(Doctor(where), json_))
        if out is not None:
            bundles.write(out, where, found)
    problems = sum(finding.level == "problem" for finding in found)
    if json_:
        click.echo(
            json.dumps({"findings": msgspec.to_builtins(found), "problems": problems, "bundle": str(bundle) if bundle else None})
        )
    elif bundle is not None:
        click.echo(f"bundle   {bundle}")
    ctx.exit(1 if problems else 0)


def shown(doctor: Doctor, json_: bool) -> Iterator[Finding]:
    """Each, told as soon as it is found."""
    for finding in doctor.findings():
        if not json_:
            level = f"{finding.level:<7}"
            level = click.style(level, fg=COLOURS[finding.level]) if coloured(sys.stdout) else level
            click.echo(f"{level}  {finding.check:<11}  {printable(finding.text)}")
        yield finding
