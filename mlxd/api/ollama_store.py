"""The Ollama dialect's store: /api/copy, /api/create, /api/delete, /api/pull, and what mlxd does not do with models: /api/push, blobs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from mlxd import pulls
from mlxd.api import fields
from mlxd.api.exchange import Exchange
from mlxd.api.fields import Malformed
from mlxd.api.ollama import NDJSON, Named, Options, encode, nameds, parameters, parse
from mlxd.api.service import Service
from mlxd.errors import Refused
from mlxd.messages import Fetched, Fetching
from mlxd.models import Catalogue, Model, canonical
from mlxd.pulls import Follower

DIGEST = re.compile(r"sha256[:-][0-9a-f]{64}")
PLACE = "the models directory (~/mlx-models unless MLX_MODELS_DIR names another)"
NO_PUSH = "mlxd does not push models: there is no registry for those of MLX"
NO_BLOBS = f"mlxd makes no models of blobs; put the files of one into {PLACE}"
NO_WEIGHTS = f"mlxd makes no weights; put the model into {PLACE} and name it in 'from'"


class Copy(Struct):
    source: str | None = None
    destination: str | None = None


class Said(Struct):
    """A message to begin with."""

    role: Literal["system", "user", "assistant"]
    content: str


class Create(Named):
    """A name for what `from` names, and what holds under it. Its template is shown and not used."""

    base: str | None = msgspec.field(name="from", default=None)
    system: str | None = None
    parameters: Options | None = None
    messages: Annotated[list[Said], Meta(max_length=4096)] | None = None
    template: str | None = None
    license: list[str] | str | None = None
    files: msgspec.Raw = fields.free()
    adapters: msgspec.Raw = fields.free()
    quantize: msgspec.Raw = fields.free()
    stream: bool | None = None


class Transfer(Named):
    stream: bool | None = None
    insecure: bool | None = None


copies = msgspec.json.Decoder(Copy)
creates = msgspec.json.Decoder(Create)
transfers = msgspec.json.Decoder(Transfer)


async def copy(service: Service, exchange: Exchange) -> None:
    await asyncio.to_thread(copied, service.catalogue, parse(copies, await exchange.body()))
    await exchange.reply(200, b"")


def copied(catalogue: Catalogue, call: Copy) -> None:
    """Another name for a model; nothing is copied but an alias's settings. Raises Refused."""
    source, destination = checked("source", call.source), checked("destination", call.destination)
    if source.lower() == destination.lower():
        catalogue.find(call.source or "")
    else:
        catalogue.define(destination, call.source or "")


def checked(field: str, name: str | None) -> str:
    """The canonical name. Raises Malformed."""
    try:
        return canonical(name or "")
    except Refused as refused:
        raise Malformed(field, refused.message) from None


async def create(service: Service, exchange: Exchange) -> None:
    call = parse(creates, await exchange.body())
    model = await asyncio.to_thread(created, service.catalogue, call)
    statuses = [f"using existing layer sha256:{model.weights.digest}", "writing manifest", "success"]
    if call.stream is False:
        await exchange.reply(200, encode({"status": statuses[-1]}))
        return
    await exchange.stream(NDJSON)
    for status in statuses:
        await exchange.write(encode({"status": status}) + b"\n", last=status is statuses[-1])


def created(catalogue: Catalogue, call: Create) -> Model:
    """The model under its new name. Raises Refused."""
    name = canonical(call.called)
    empty = (b"null", b"{}", b'""')
    for field in ("files", "adapters", "quantize"):
        if bytes(getattr(call, field)) not in empty:
            raise Refused(400, f"{field}: {NO_WEIGHTS}")
    if not call.base:
        raise Refused(400, "neither 'from' or 'files' was specified")
    return catalogue.define(name, call.base, parameters(call.parameters or Options()), **settings(call))


def settings(call: Create) -> dict[str, Any]:
    """What is said, as fields of an Alias."""
    said: dict[str, Any] = {name: getattr(call, name) for name in ("system", "template") if getattr(call, name) is not None}
    if call.messages:
        said["messages"] = msgspec.to_builtins(call.messages)
    if call.license:
        said["license"] = fields.strings(call.license)
    return said


async def delete(service: Service, exchange: Exchange) -> None:
    """Of an alias, the name alone; of a model, its files."""
    call = parse(nameds, await exchange.body())
    canonical(call.called)
    await exchange.while_connected(service.delete(call.called))
    if not exchange.left:
        await exchange.reply(200, b"")


async def pull(service: Service, exchange: Exchange) -> None:
    """Bring a model from the hub. It holds no place in the queue, and may take hours."""
    call = parse(transfers, await exchange.body())
    check_name(call)
    repository = await asyncio.to_thread(service.catalogue.to_pull, call.called)
    if not repository:
        await say(exchange, [Fetched(call.called)], call.stream is not False)
        return
    service.check_supervised()
    try:
        with service.pulls.following(repository) as follower:
            await exchange.while_connected(follow(exchange, follower, service.config.server.ping_s, call.stream is not False))
    except Refused as refused:
        if not exchange.started or exchange.finished:
            raise
        exchange.failed = True
        await exchange.while_connected(say(exchange, [Fetched(repository, refused.message, refused.status)]))


async def follow(exchange: Exchange, follower: Follower, patience_s: float, stream: bool) -> None:
    """Tell of a pull until it has ended; what was said last again when nothing was for `patience_s`. Raises Refused when it failed and nothing
    was written."""
    last = Fetching("", "pulling manifest")
    news = [last]
    while follower.end is None:
        if stream:
            await say(exchange, news or [last])
        last = news[-1] if news else last
        news = await follower.news(patience_s)
    if follower.end.error and not exchange.started:
        raise pulls.refusal(follower.end)
    exchange.failed = bool(follower.end.error)
    await say(exchange, [*news, follower.end], stream)


async def say(exchange: Exchange, words: Sequence[Fetching | Fetched], stream: bool = True) -> None:
    """Lines of a pull, the last of them only when it is no stream."""
    lines = [encode(pulls.told(word)) for word in words]
    if not stream:
        await exchange.reply(200, lines[-1])
        return
    if not exchange.started:
        await exchange.stream(NDJSON)
    await exchange.write(b"".join(line + b"\n" for line in lines), last=isinstance(words[-1], Fetched))


async def push(service: Service, exchange: Exchange) -> None:
    check_name(parse(transfers, await exchange.body()))
    raise Refused(501, NO_PUSH, code="not_implemented", hopeless=True)


def check_name(call: Named) -> None:
    """A blank one is invalid here, as Ollama has it. Raises Refused."""
    canonical(call.called if call.called.strip() else "?")


async def blob(service: Service, exchange: Exchange) -> None:
    """The parts of a model that a client would send: no model is made of them here."""
    if not DIGEST.fullmatch(exchange.scope["path_params"]["digest"]):
        raise Refused(400, "invalid digest: expected sha256: and 64 hex digits")
    raise Refused(501, NO_BLOBS, code="not_implemented", hopeless=True)
