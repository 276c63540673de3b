"""What is told of settings, and what is not: passwords and queries in URLs, arguments of commands, tokens.

For `mlxd config` and the bundle of `mlxd doctor`, which people show to others.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from mlxd import config, paths, tokens
from mlxd.endpoint import WHO
from mlxd.errors import ConfigError

#: Of a URL, in any text: a query, which may hold a key.
QUERY = re.compile(r"(://[^?\s\"\\]*\?)[^\s\"'\\]+")
#: What looks like a token of the hub or of an HTTP request, whoever wrote it down.
TOKENS = re.compile(r"\bhf_[A-Za-z0-9]{8,}|\bsk-[A-Za-z0-9_-]{8,}|(?<=[Bb]earer )[^\s\"'\\]{4,}")
SECRET = "[secret]"
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
#: Shorter than this, what the environment calls a token is none, and might be any word.
LEAST_CHARACTERS = 6


def settings(where: paths.Paths) -> dict[str, Any]:
    """Every setting with its value and where it came from, the other services, and which files were read. Raises ConfigError, as `mlxd start`
    would."""
    loaded = config.load(where.config, [where.env_file])
    tokens.load(where.token, loaded.config)
    services = [msgspec.to_builtins(service) for service in config.read_services(where.config)]
    for service in services:
        service |= {"url": masked(service["url"]), "command": service["command"] and without_arguments(service["command"])}
    return {
        "settings": {
            f"{section}.{key}": {"value": harmless(key, value), "from": origin(f"{section}.{key}", loaded.sources)}
            for section, keys in msgspec.to_builtins(loaded.config).items()
            for key, value in keys.items()
        },
        "services": services,
        "files": {str(file): file.is_file() for file in (where.config, where.env_file, where.token)},
    }


def origin(name: str, sources: dict[str, str]) -> str:
    """Of a setting: a file, a variable, a variable in a file."""
    source = sources.get(name, "default")
    place = source.removeprefix(f"{name} in ")
    return place if source == "default" or " in " in source else f"{place} in the environment"


def harmless(key: str, value: Any) -> Any:
    """A setting's value without what may be a secret."""
    if key == "on_event" and value:  # a webhook's address lets in whoever knows it
        return " ".join(without_arguments(shlex.split(value)))
    if isinstance(value, list):
        return without_arguments(value) if key == "command" else [harmless("", one) for one in value]
    return masked(value) if isinstance(value, str) else value


def without_arguments(command: list[str]) -> list[str]:
    return [command[0], "..."] if len(command) > 1 else command


def masked(text: str) -> str:
    """Without who asks, and what, in its URLs."""
    return QUERY.sub(r"\1...", WHO.sub("...@", text))


def known(where: paths.Paths) -> list[str]:
    """The secrets that are known here, longest first: mlxd's tokens, the hub's, and what the command that is told of events is told besides."""
    found = []
    with contextlib.suppress(ConfigError):
        found += [values.get(name, "") for values in (os.environ, config.read_env(where.env_file)) for name in HUB_TOKENS]
    hub = Path(os.environ.get("HF_TOKEN_PATH") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "token").expanduser()
    found.append((paths.read_small(hub) or b"").decode(errors="replace").strip())
    try:
        loaded = config.load(where.config, [where.env_file]).config
        found += shlex.split(loaded.events.on_event)[1:]
        if held := tokens.load(where.token, loaded):
            found += held.texts
    except ConfigError:  # the file itself is not taken along
        found += (paths.read_small(where.token) or b"").decode("latin-1").split()
    found += [json.dumps(secret)[1:-1] for secret in found]  # as it stands in lines of JSON
    return sorted({secret for secret in found if len(secret) >= LEAST_CHARACTERS}, key=len, reverse=True)


def purged(value: Any, secrets: Iterable[str]) -> Any:
    """A text, or all texts in lists and dictionaries, without these secrets, what looks like one, and what `masked` leaves out."""
    if isinstance(value, dict):
        return {key: purged(one, secrets) for key, one in value.items()}
    if isinstance(value, list):
        return [purged(one, secrets) for one in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, SECRET)
    return masked(TOKENS.sub(SECRET, value))
