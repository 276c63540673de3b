"""Where the commands for models look and act: the server of a running daemon, or without one the disk, by the same rules."""

from __future__ import annotations

import json
from typing import Any, Protocol

from mlxd import control, paths, probe
from mlxd.errors import MlxdError, NotRunning
from mlxd.lock import is_locked

#: Of a question that no model is loaded for; deleting one that is in use waits for its requests.
ANSWER_S = 30.0
DELETE_S = 600.0
#: Of a question that a shell asks while somebody types.
TYPING_S = 1.0
MOST_BYTES = 16 * 1024 * 1024


class Store(Protocol):
    """Everything in the shapes of Ollama's API. Each raises MlxdError, with a sentence for a person."""

    def models(self) -> list[dict[str, Any]]:
        """All there are, as /api/tags has them."""

    def shown(self, name: str) -> dict[str, Any]:
        """One of them, as /api/show has it."""

    def copy(self, source: str, destination: str) -> None: ...

    def create(self, body: dict[str, Any]) -> None:
        """As /api/create does."""

    def delete(self, name: str) -> None:
        """The files of a model once nobody uses it, or an alias."""


def locate(where: paths.Paths) -> Store:
    """Raises MlxdError when a daemon runs that cannot be asked, or is on its way up or down."""
    try:
        return running(where)
    except NotRunning:
        if is_locked(where.lock):
            raise MlxdError("mlxd is just starting or stopping; try again in a moment") from None
        return Disk(where)


def running(where: paths.Paths) -> Server:
    """Raises NotRunning, MlxdError."""
    told = control.ask(where.control, "status")
    if told["state"] == "held":  # somebody else may listen on its port, and is not to see a token
        raise MlxdError(f"mlxd is held: {told['reason']}")
    return Server(told["url"], token(where))


def names(where: paths.Paths) -> list[str]:
    """What models may be called, as short as it goes, for a shell that completes. Raises MlxdError, soon, where nobody can tell."""
    from mlxd.models import is_name

    try:
        told = control.ask(where.control, "status", timeout_s=TYPING_S)
        models = Server(told["url"], token(where)).ask("/api/tags", limit_s=TYPING_S)["models"] if told["state"] != "held" else []
    except NotRunning:
        models = Disk(where).models()
    return [name.removesuffix(":latest") for name in (str(model["name"]) for model in models) if is_name(name)]


def token(where: paths.Paths) -> str:
    """What lets its owner in; "" when anybody may come. Raises ConfigError."""
    if not where.token.exists():
        return ""
    from mlxd import tokens  # 60 ms

    return tokens.for_commands(where.token)


class Server:
    """`token`: "" for none."""

    def __init__(self, url: str, token: str):
        self.url = url
        self.token = token

    def ask(self, path: str, body: Any = None, method: str = "", limit_s: float = ANSWER_S) -> dict[str, Any]:
        """GET, or POST of `body`, unless `method` is another; {} for an answer without a body. Raises MlxdError, with its own words if it
        says no."""
        data = None if body is None else json.dumps(body).encode()
        try:
            reply = probe.fetch(self.url + path, limit_s, data, method=method, token=self.token, most_bytes=MOST_BYTES)
        except probe.NoReply as no:
            raise MlxdError(f"mlxd at {self.url}: {no}; look at `mlxd status`") from no
        if reply.status >= 400:
            raise MlxdError(str(reply.json.get("error") or f"mlxd at {self.url} answers {reply.status}"))
        return reply.json

    def models(self) -> list[dict[str, Any]]:
        return list(self.ask("/api/tags")["models"])

    def shown(self, name: str) -> dict[str, Any]:
        return self.ask("/api/show", {"model": name})

    def copy(self, source: str, destination: str) -> None:
        self.ask("/api/copy", {"source": source, "destination": destination})

    def create(self, body: dict[str, Any]) -> None:
        self.ask("/api/create", body | {"stream": False})

    def delete(self, name: str) -> None:
        self.ask("/api/delete", {"model": name}, "DELETE", DELETE_S)


class Disk:
    """As a daemon would find it."""

    def __init__(self, where: paths.Paths):
        from mlxd import config
        from mlxd.aliases import Aliases
        from mlxd.models import Catalogue

        self.where = where
        settings = config.load(where.config, [where.env_file]).config
        self.catalogue = Catalogue(settings.models.dir, aliases=Aliases(where.aliases))

    def models(self) -> list[dict[str, Any]]:
        from mlxd.api.ollama_models import described

        return [described(model) for model in self.catalogue.scan()]

    def shown(self, name: str) -> dict[str, Any]:
        from mlxd.api.ollama_models import shown

        model = self.catalogue.find(name)
        return shown(model, model.name.removesuffix(":latest"))

    def copy(self, source: str, destination: str) -> None:
        from mlxd.api.ollama_store import Copy, copied

        paths.prepare(self.where)
        copied(self.catalogue, Copy(source, destination))

    def create(self, body: dict[str, Any]) -> None:
        from mlxd.api.ollama import parse
        from mlxd.api.ollama_store import created, creates

        call = parse(creates, bytearray(json.dumps(body).encode()))
        paths.prepare(self.where)
        created(self.catalogue, call)

    def delete(self, name: str) -> None:
        place = self.catalogue.doomed(name)
        if place is not None:
            self.catalogue.delete(place)
