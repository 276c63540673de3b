"""Aliases: other names of models, and what holds under such a name where a request says nothing.

Owns `aliases.json`. Two servers may have it during a drain: it is read again when it has changed, and changed under a lock. Does not know
which models there are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from mlxd.errors import Refused
from mlxd.lock import flocked
from mlxd.paths import read_own, write_atomically

log = logging.getLogger(__name__)

#: Together at most 32 MiB, which are read in 0.3 s.
MOST = 256
MOST_BYTES = 128 * 1024
#: A change takes milliseconds; another server may be at it.
PATIENCE_S = 5.0

#: Fields of an alias that say something.
SETTINGS = ("system", "parameters", "messages", "template", "license")

Message = dict[str, Any]


class Parameters(Struct, frozen=True, omit_defaults=True):
    """Options by Ollama's names; None: not said."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    num_ctx: int | None = None
    num_predict: int | None = None
    stop: list[str] | None = None

    def said(self) -> dict[str, Any]:
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}

    def over(self, others: Parameters) -> Parameters:
        """These, and the others where these say nothing."""
        return Parameters(**others.said() | self.said())

    def sampling(self) -> dict[str, Any]:
        """What is said, by the names of messages.Sampling."""
        said = self.said()
        for name in ("num_ctx", "num_predict", "stop"):
            said.pop(name, None)
        if "repeat_last_n" in said:
            said["penalty_last_n"] = said.pop("repeat_last_n")
        return said


class Alias(Struct, frozen=True, omit_defaults=True):
    """`name`, `base`: canonical; `base` is a model, never an alias. `modified_at`: seconds since 1970. `messages` come before those of
    every conversation. `template` is there to be shown."""

    name: str
    base: str
    modified_at: float
    system: str = ""
    parameters: Parameters = Parameters()
    messages: list[Message] = []
    template: str = ""
    license: list[str] = []

    def settings(self) -> bytes:
        """Equal for two aliases that differ in name, base and age alone; b"{}" of a mere name."""
        fields = msgspec.to_builtins(self)
        return msgspec.json.encode({key: fields[key] for key in SETTINGS if fields.get(key)})

    def begin(self, messages: list[Message], continued: bool) -> list[Message]:
        """A conversation under this name: a system text of its own counts in place of the alias's. `continued`: earlier tokens precede it,
        and in them what the alias says first."""
        first = next((index for index, message in enumerate(messages) if message["role"] != "system"), len(messages))
        system = [{"role": "system", "content": self.system}] if self.system and not first else []
        return [*messages[:first], *system, *([] if continued else self.messages), *messages[first:]]


class Aliases:
    """All of them, by lower-case name. `path` None: there are none, and none can be made. Any thread may ask."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self.last: tuple[object, dict[str, Alias]] = (None, {})

    def known(self, key: str) -> Alias | None:
        """One that was there at the last look, if the file has not changed since: one stat."""
        stamp, aliases = self.last
        return aliases.get(key) if stamp == self.stamp() else None

    def all(self) -> dict[str, Alias]:
        """A file that cannot be read is as none, and said once in the log: models go on being served."""
        stamp = self.stamp()
        if stamp != self.last[0]:
            try:
                self.last = (stamp, self.read())
            except (OSError, ValueError) as error:
                log.warning("no alias is known: %s", unreadable(error))
                self.last = (stamp, {})
        return self.last[1]

    def put(self, alias: Alias) -> None:
        """Raises Refused."""
        if len(msgspec.json.encode(alias)) > MOST_BYTES:
            raise Refused(400, f"{alias.name} has settings of more than {MOST_BYTES} bytes")
        with self.changing() as aliases:
            aliases[alias.name.lower()] = alias
            if len(aliases) > MOST:
                raise Refused(400, f"there are {MOST} aliases, and no more may be: delete one first")

    def remove(self, key: str) -> bool:
        """Whether it was there. Raises Refused."""
        if key not in self.all():
            return False
        with self.changing() as aliases:
            return aliases.pop(key, None) is not None

    # --- the file -------------------------------------------------------------------------------------------------------------

    def stamp(self) -> object:
        """Changes when the file does; None while there is none."""
        try:
            found = self.path.lstat() if self.path else None
        except OSError:
            return None
        return (found.st_ino, found.st_mtime_ns, found.st_size) if found else None

    def read(self) -> dict[str, Alias]:
        """Raises OSError, ValueError."""
        if self.path is None:
            return {}
        try:
            text = read_own(self.path)
        except FileNotFoundError:
            return {}
        return {alias.name.lower(): alias for alias in msgspec.json.decode(text, type=list[Alias])}

    @contextmanager
    def changing(self) -> Iterator[dict[str, Alias]]:
        """The aliases as they are now, nobody else changing them, written when the block ends well. Raises Refused."""
        if self.path is None:
            raise Refused(
                503, "this server has no supervisor, and no place to keep aliases: start it with `mlxd start`", hopeless=True
            )
        try:
            lock = flocked(self.path.with_suffix(".lock"), PATIENCE_S)
        except BlockingIOError:
            raise Refused(503, "another server is changing aliases; please try again", code="busy", retry_s=1) from None
        except OSError as error:
            raise Refused(500, unreadable(error)) from None
        try:
            aliases = self.read()
            yield aliases
            write_atomically(self.path, msgspec.json.format(msgspec.json.encode(list(aliases.values()))) + b"\n")
            self.last = (None, {})  # two writes within a tick of the file system's clock may have the same stamp
        except (OSError, ValueError) as error:  # msgspec's are ValueErrors
            raise Refused(500, unreadable(error)) from None
        finally:
            os.close(lock)


def unreadable(error: Exception) -> str:
    return f"aliases.json in the state directory: {getattr(error, 'strerror', None) or error}; mend or remove it"
