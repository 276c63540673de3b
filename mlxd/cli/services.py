"""Keeping it and its neighbours up, and finding them: check, recover, monitor, env."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING

import click

from mlxd import control, endpoint, paths
from mlxd.cli.words import as_json, table
from mlxd.errors import ConfigError, MlxdError

if TYPE_CHECKING:
    from mlxd.config import Config
    from mlxd.recovery import Report


@click.command()
@as_json
@click.pass_context
def check(ctx: click.Context, json_: bool) -> None:
    """Show what is up: mlxd, Ollama, other services.

    Exit status: 0 everything wanted is up, 1 something is not.
    """
    from mlxd.recovery import Recovery, all_up

    reports = Recovery(paths.locate()).check()
    show(reports, json_)
    ctx.exit(0 if all_up(reports) else 1)


@click.command()
@as_json
@click.pass_context
def recover(ctx: click.Context, json_: bool) -> None:
    """Restart what is down, through its owner.

    At most three times an hour each; what mlxd's supervisor can mend is left to it. Exit status: 0 everything wanted is up, 1 something is
    not.
    """
    from mlxd.recovery import Recovery, all_up

    round_ = Recovery(paths.locate())
    reports = round_.recover(round_.settings.recovery.max_actions)
    show(reports, json_)
    ctx.exit(0 if all_up(reports) else 1)


@click.command()
@click.option("--interval", type=click.FloatRange(0.1, 86400), default=30, show_default=True, help="Seconds between two rounds.")
@as_json
@click.pass_context
def monitor(ctx: click.Context, interval: float, json_: bool) -> None:
    """Do as `recover` does, again and again.

    At most five restarts an hour each. Says what changes, and why something is restarted. Ends by ^C or TERM, with the status of the last
    round.
    """
    import signal
    import time

    from mlxd.recovery import Recovery, all_up

    for number in (signal.SIGTERM, signal.SIGINT):  # a shell that runs a script has INT ignored by what it starts in the background
        signal.signal(number, signal.default_int_handler)
    where = paths.locate()
    shown: dict[str, tuple[str, bool]] = {}
    reports: list[Report] = []
    problem = ""
    try:
        round_ = Recovery(where)  # a bad one ends it here
        while True:
            try:
                round_ = Recovery(where)  # by the configuration as it is now
                now = ""
            except ConfigError as error:
                now = f"the new configuration is refused, the old one stays: {error}"
            try:
                reports = round_.recover(round_.settings.recovery.max_restarts)
            except MlxdError as error:
                now = str(error)
            if now and now != problem:
                click.echo(now, err=True)
            problem = now
            for report in reports:
                if report.did or shown.get(report.name) != (report.state, False):
                    click.echo(as_line(report, json_))
                shown[report.name] = report.state, bool(report.did) and not report.well
            sys.stdout.flush()
            time.sleep(interval)
    except KeyboardInterrupt:
        ctx.exit(0 if reports and all_up(reports) else 1)


@click.command()
@click.option("--shell", type=click.Choice(["sh", "fish"]), default="sh", show_default=True, help="Whose words to use.")
@click.option("--dotenv", is_flag=True, help="Print the lines of a .env file instead.")
@as_json
def env(shell: str, dotenv: bool, json_: bool) -> None:
    """Print what makes programs use it: eval "$(mlxd env)".

    Ollama, OpenAI and Anthropic clients then talk to mlxd, or, with MLX_API_URL=disabled, to Ollama.
    """
    found = variables()
    if json_:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        if dotenv:
            click.echo(f"{name}={dotenv_quoted(value)}")
        elif shell == "fish":
            click.echo(f"set -gx {name} {fish_quoted(value)}")
        else:
            click.echo(f"export {name}={shlex.quote(value)}")


# --- helpers, in the order of their use -------------------------------------------------------------------------------------------


def show(reports: list[Report], json_: bool) -> None:
    """What was done, a line each, then the table."""
    if json_:
        from mlxd.recovery import all_up

        click.echo(json.dumps({"up": all_up(reports), "services": [as_dict(report) for report in reports]}))
        return
    for report in reports:
        if report.did:
            click.echo(f"{report.name}  {report.did}")
    rows = [("service", "address", "state", "latency", "owner", "what to do")]
    for report in reports:
        latency = f"{report.latency_s * 1000:.0f} ms" if report.latency_s is not None else "-"
        rows.append((report.name, report.address, report.state, latency, report.owner, to_do(report)))
    for line in table(rows):
        click.echo(line)


def to_do(report: Report) -> str:
    if report.well:
        return report.reason or "-"
    if not report.wanted:
        return "- (not wanted)"
    return f"{report.advice} ({report.reason})" if report.reason else report.advice


def as_dict(report: Report) -> dict[str, object]:
    import msgspec

    return msgspec.structs.asdict(report)


def as_line(report: Report, json_: bool) -> str:
    """What `monitor` says."""
    from mlxd.logs import timestamp

    if json_:
        return json.dumps({"ts": timestamp(), **as_dict(report)})
    return f"{timestamp()}  {report.name}  {report.did or report.state}" + (f"  {to_do(report)}" if not report.well else "")


def variables() -> dict[str, str]:
    """What programs read -> its value. MLX_API_URL stays as it is set; else it is where mlxd runs or would."""
    from mlxd import config

    where = paths.locate()
    environment = endpoint.environment()
    settings = config.load(where.config, [], environment).config
    ollama = endpoint.base_url(settings.ollama.url, "OLLAMA_URL")
    if endpoint.is_off(environment):
        mlx, url = "disabled", ollama
    else:
        mlx = url = endpoint.mlx_of(environment) or own_url(where, settings)
    return {
        "MLX_API_URL": mlx,
        "OLLAMA_URL": ollama,
        "OLLAMA_HOST": url,
        "OPENAI_BASE_URL": f"{url}/v1",
        "ANTHROPIC_BASE_URL": url,
    }


def own_url(where: paths.Paths, settings: Config) -> str:
    """Where mlxd runs, or would. Raises MlxdError when that is any free port."""
    from mlxd import ports

    try:
        return str(control.ask(where.control, "status")["url"])
    except MlxdError:
        if not settings.server.port:
            raise MlxdError("mlxd is not running, and listens on any free port; run `mlxd start` first") from None
        return ports.url(ports.reached(settings.server.host), settings.server.port)


def fish_quoted(value: str) -> str:
    r"""Within fish's single quotes \ and ' are the only ones that mean something."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def dotenv_quoted(value: str) -> str:
    """Bare where every reader agrees (Docker's takes quotes literally), else in single quotes."""
    return value if shlex.quote(value) == value else fish_quoted(value)
