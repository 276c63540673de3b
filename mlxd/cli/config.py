"""The settings as they are, and where each comes from: config."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import click

from mlxd import control, paths
from mlxd.cli.words import as_json, table
from mlxd.errors import MlxdError

#: Of a URL in any text: who asks, with a password or a token, and a query, which may hold a key.
WHO, QUERY = re.compile(r"://[^/\s]*@"), re.compile(r"(://[^?\s]*\?)\S+")


@click.command()
@as_json
def config(json_: bool) -> None:
    """Show every setting, and where its value comes from.

    As `mlxd start` would have it in this shell. Exit status: 78 if it would refuse them.
    """
    import msgspec

    from mlxd import config, tokens

    where = paths.locate()
    loaded = config.load(where.config, [where.env_file])
    tokens.load(where.token, loaded.config)
    settings = {
        f"{section}.{key}": {"value": harmless(key, value), "from": origin(f"{section}.{key}", loaded.sources)}
        for section, keys in msgspec.to_builtins(loaded.config).items()
        for key, value in keys.items()
    }
    services = [msgspec.to_builtins(service) for service in config.read_services(where.config)]
    for service in services:
        service |= {"url": masked(service["url"]), "command": service["command"] and without_arguments(service["command"])}
    if json_:
        files = {str(file): file.is_file() for file in (where.config, where.env_file, where.token)}
        click.echo(json.dumps({"settings": settings, "services": services, "files": files}))
    else:
        rows = [("setting", "value", "from")]
        rows += [(name, in_words(told["value"]), told["from"]) for name, told in settings.items()]
        rows += [(f"services.{service['name']}", service["url"], str(where.config)) for service in services]
        for line in table(rows):
            click.echo(line)
        read = ", ".join(f"{file}{'' if file.is_file() else ' (there is none)'}" for file in (where.config, where.env_file))
        click.echo(f"read: {read} and the environment", err=True)
    if difference := elsewhere(where, loaded.config.server.port):
        click.echo(difference, err=True)


# --- helpers ----------------------------------------------------------------------------------------------------------------------


def origin(name: str, sources: dict[str, str]) -> str:
    """Of a setting: a file, a variable, a variable in a file."""
    source = sources.get(name, "default")
    place = source.removeprefix(f"{name} in ")
    return place if source == "default" or " in " in source else f"{place} in the environment"


def harmless(key: str, value: Any) -> Any:
    """Without what may be a secret."""
    if key == "on_event" and value:  # a webhook's address lets in whoever knows it
        return " ".join(without_arguments(shlex.split(value)))
    if isinstance(value, list):
        return [harmless("", one) for one in value]
    return masked(value) if isinstance(value, str) else value


def without_arguments(command: list[str]) -> list[str]:
    return [command[0], "..."] if len(command) > 1 else command


def masked(text: str) -> str:
    return QUERY.sub(r"\1...", WHO.sub("://...@", text))


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
