"""Models: list, show, ps, load, unload, cp, alias, rm. Without a daemon all but ps, load and unload work on the disk."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import click

from mlxd import control, paths
from mlxd.cli import store
from mlxd.cli.completion import model_names
from mlxd.cli.words import age_of, as_json, bytes_of, is_terminal, table
from mlxd.errors import MlxdError

#: A model may load for long; its own limits end it.
LOAD_S = 24 * 3600.0
#: Between two looks at what a load is at.
LOOK_S = 0.5


@click.command("list")
@as_json
def list_(json_: bool) -> None:
    """List the models on this machine, newest first."""
    show_models(store.locate(paths.locate()).models(), json_)


@click.command()
@click.argument("name", shell_complete=model_names)
@as_json
def show(name: str, json_: bool) -> None:
    """Show what is known of a model."""
    check(name)
    told = store.locate(paths.locate()).shown(name)
    if json_:
        click.echo(json.dumps(told))
        return
    for key, value in facts(told):
        click.echo(f"{key:<14}  {printable(value)}")


@click.command()
@as_json
def ps(json_: bool) -> None:
    """Show which models are loaded, and for how long yet."""
    models = store.running(paths.locate()).ask("/api/ps")["models"]
    if json_:
        click.echo(json.dumps({"models": models}))
    elif not models:
        click.echo("no model is loaded", err=True)
    else:
        rows = [("name", "size", "context", "leaves in")]
        for model in models:
            left_s = seconds_until(model["expires_at"])
            leaves = "never" if left_s > 1e9 else age_of(max(0.0, left_s))
            rows.append((printable(model["name"]), bytes_of(model["size_vram"]), str(model["context_length"]), leaves))
        echo(table(rows))


@click.command()
@click.argument("name", shell_complete=model_names)
@click.option("--keep-alive", metavar="DURATION", help="How long it stays without a request: 5m, 1h30m, -1 for ever.")
def load(name: str, keep_alive: str | None) -> None:
    """Load a model, and wait until it is ready."""
    check(name)
    where = paths.locate()
    server = store.running(where)
    model = known(server.models(), name)
    base = (model["details"]["parent_model"] or model["name"]) if model else name
    if model:
        click.echo(f"loading {base}, {bytes_of(model['size'])}", err=True)
    began = time.monotonic()
    asked = {"model": name} | ({} if keep_alive is None else {"keep_alive": keep_alive})
    work = Loading(server, asked)
    try:
        watch(where, base, work)
    except KeyboardInterrupt:
        raise MlxdError(f"not waited for; mlxd may go on loading {base}: `mlxd ps` tells, `mlxd unload {name}` ends it") from None
    work.result()
    click.echo(f"loaded  {model['name'] if model else name}  in {time.monotonic() - began:.1f} s")


@click.command()
@click.argument("name", shell_complete=model_names)
def unload(name: str) -> None:
    """Unload a model; requests that it has are answered first."""
    check(name)
    server = store.running(paths.locate())
    before = known(server.ask("/api/ps")["models"], name)
    server.ask("/api/generate", {"model": name, "keep_alive": 0})
    if before is None:
        click.echo(f"{name} is not loaded")
    elif known(server.ask("/api/ps")["models"], name):
        click.echo(f"{before['name']} is in use; it is unloaded when its requests have ended")
    else:
        click.echo(f"unloaded  {before['name']}")


@click.command()
@click.argument("source", shell_complete=model_names)
@click.argument("destination")
def cp(source: str, destination: str) -> None:
    """Give a model another name; no file is copied."""
    check(source, destination)
    store.locate(paths.locate()).copy(source, destination)
    click.echo(f"{destination}  another name of {source}")


@click.command()
@click.argument("name", required=False)
@click.argument("source", required=False, shell_complete=model_names)
@click.option("--system", metavar="TEXT", help="What the model is told first where a request says nothing else.")
@click.option("--parameter", "parameters", nargs=2, multiple=True, metavar="KEY VALUE", help="An option by Ollama's name.")
@click.option("--remove", metavar="NAME", shell_complete=model_names, help="Remove this alias; its model stays.")
@as_json
def alias(
    name: str | None, source: str | None, system: str | None, parameters: list[tuple[str, str]], remove: str | None, json_: bool
) -> None:
    """List aliases, or call SOURCE by NAME, too.

    An alias can have a system text and options of its own: mlxd alias poet qwen3-8b --system "You rhyme." --parameter temperature 1.2
    """
    where = paths.locate()
    if remove is not None:
        if name is not None or system is not None or parameters:
            raise MlxdError("--remove goes alone: `mlxd alias --remove NAME`")
        remove_alias(where, remove)
    elif name is None:
        if system is not None or parameters:
            raise MlxdError("say which name, and of what: `mlxd alias NAME SOURCE`")
        show_models([one for one in store.locate(where).models() if one["details"].get("parent_model")], json_)
    elif source is None:
        raise MlxdError(f"say of what: `mlxd alias {name} SOURCE`, and `mlxd list` shows what there is")
    else:
        check(name, source)
        said: dict[str, Any] = {"parameters": options(parameters)}
        store.locate(where).create({"model": name, "from": source} | said | ({} if system is None else {"system": system}))
        click.echo(f"{name}  another name of {source}")


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=model_names)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def rm(ctx: click.Context, names: tuple[str, ...], yes: bool) -> None:
    """Delete models with their files; of an alias, the name alone."""
    check(*names)
    models = store.locate(paths.locate())
    if not yes:
        there = models.models()
        what = "delete " + ", ".join(in_words(name, known(there, name)) for name in names)
        if not is_terminal(sys.stdin):
            raise MlxdError(f"this would {what}, and there is nobody to ask: add --yes")
        click.confirm(f"{what[0].upper()}{what[1:]}?", abort=True)
    failed = False
    for name in names:
        try:
            models.delete(name)
        except MlxdError as error:
            click.echo(f"Error: {error}", err=True)
            failed = True
        else:
            click.echo(f"deleted  {name}")
    ctx.exit(1 if failed else 0)


# --- helpers, in the order of their use -------------------------------------------------------------------------------------------


def show_models(models: list[dict[str, Any]], json_: bool) -> None:
    """Entries of /api/tags."""
    if json_:
        click.echo(json.dumps({"models": models}))
    elif not models:
        click.echo("there is none; `mlxd alias NAME SOURCE` makes one", err=True)
    else:
        rows = [("name", "size", "parameters", "weights", "age", "alias of")]
        for model in models:
            details = model["details"]
            parameters, weights = (printable(details.get(key) or "-") for key in ("parameter_size", "quantization_level"))
            age = age_of(max(0.0, -seconds_until(model["modified_at"])))
            base = printable(details.get("parent_model") or "-")
            rows.append((printable(model["name"]), bytes_of(model["size"]), parameters, weights, age, base))
        echo(table(rows))


def check(*names: str) -> None:
    """Raises MlxdError."""
    from mlxd.models import is_name

    for name in names:
        if not is_name(name):
            raise MlxdError(
                f"{name!r} cannot be a model's name: that is like qwen3-8b, org/qwen3-8b or qwen3-8b:q4; see `mlxd list`"
            )


def facts(told: dict[str, Any]) -> list[tuple[str, str]]:
    """What /api/show says, but for the template."""
    details, info = told["details"], told["model_info"]
    family = info["general.architecture"]
    found = [
        ("name", info["general.basename"]),
        ("alias of", details["parent_model"]),
        ("architecture", family),
        ("parameters", details["parameter_size"]),
        ("weights", details["quantization_level"]),
        ("context", f"{info[f'{family}.context_length']} tokens"),
        ("embedding", f"{info[f'{family}.embedding_length']} numbers"),
        ("can", ", ".join(told["capabilities"])),
        ("changed", told["modified_at"]),
        *(("option", " ".join(line.split(None, 1))) for line in told["parameters"].splitlines()),
        ("system", told.get("system", "")),
        ("license", told.get("license", "").strip().partition("\n")[0]),
    ]
    return [(key, value) for key, value in found if value]


def printable(text: str) -> str:
    """What somebody else wrote must not drive the reader's terminal."""
    if text.isprintable():
        return text
    from mlxd.logs import printable

    return printable(text)


def seconds_until(moment: str) -> float:
    return (datetime.fromisoformat(moment) - datetime.now(UTC)).total_seconds()


def echo(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def known(models: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The entry of the model or alias called so."""
    from mlxd.models import canonical

    wanted = canonical(name).lower()
    return next((model for model in models if model["name"].lower() == wanted), None)


class Loading:
    """A load, in a thread of its own: it ends with the command."""

    def __init__(self, server: store.Server, asked: dict[str, Any]):
        self.error: MlxdError | None = None
        self.thread = threading.Thread(target=self.run, args=(server, asked), daemon=True)
        self.thread.start()

    def run(self, server: store.Server, asked: dict[str, Any]) -> None:
        try:
            server.ask("/api/generate", asked, limit_s=LOAD_S)
        except MlxdError as error:
            self.error = error

    def ended(self, within_s: float) -> bool:
        self.thread.join(within_s)
        return not self.thread.is_alive()

    def result(self) -> None:
        """Raises MlxdError when it could not be loaded."""
        if self.error is not None:
            raise self.error


def watch(where: paths.Paths, model: str, work: Loading) -> None:
    """Say what becomes of the model's engine, until the work has ended."""
    before = ""
    while not work.ended(LOOK_S):
        told = control.ask(where.control, "status")
        engines = [engine for engine in told["engines"] if engine["model"] == model]
        now = f"engine-{engines[0]['slot']}  {engines[0]['state']}" if engines else "it waits for room"
        if now != before:
            trouble = engines and engines[0]["state"] in ("backoff", "cooldown", "held")
            click.echo(f"{now}  {told['reason']}" if trouble and told["reason"] else now, err=True)
        before = now


def remove_alias(where: paths.Paths, name: str) -> None:
    """By its own file, which servers read again: of what is no alias nothing can go. Raises MlxdError."""
    check(name)
    from mlxd.aliases import Aliases
    from mlxd.models import canonical

    if not Aliases(where.aliases).remove(canonical(name).lower()):
        raise MlxdError(f"{name} is no alias; `mlxd alias` lists those there are, and `mlxd rm` deletes models")
    click.echo(f"removed  {name}")


def options(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """As a request has them. Raises MlxdError on a name that is no option: a server would ignore it."""
    from mlxd.aliases import Parameters
    from mlxd.config import nearest

    found: dict[str, Any] = {}
    for key, value in pairs:
        if key not in Parameters.__struct_fields__:
            raise MlxdError(f"unknown parameter {key}{nearest(key, Parameters.__struct_fields__)}")
        if key == "stop":
            found.setdefault(key, []).append(value)
        else:
            found[key] = number(key, value)
    return found


def number(key: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise MlxdError(f"parameter {key} must be a number, not {value!r}")
    return int(found) if found.is_integer() else found


def in_words(name: str, model: dict[str, Any] | None) -> str:
    if model is None:
        return name
    return f"the alias {name}" if model["details"].get("parent_model") else f"{name} ({bytes_of(model['size'])})"
