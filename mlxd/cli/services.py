"""Keeping it up, and finding it: env."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from mlxd import control, endpoint, paths
from mlxd.cli.words import as_json
from mlxd.errors import MlxdError

if TYPE_CHECKING:
    from mlxd.config import Config


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
        import json

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
