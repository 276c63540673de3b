"""The bundle of `mlxd doctor`: what somebody needs to know who is to help, in one archive; no prompt, no answer, no token, no system text."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from mlxd import control, exits, masks, paths, probe, tokens
from mlxd.doctor import Finding
from mlxd.errors import ConfigError, MlxdError

#: Of each log and of the events, their ends.
MOST_LOG_BYTES = 256 * 1024
ASK_S = 10.0
#: What the server tells of itself.
PAGES = {"health.json": "/health", "flights.json": "/ui/flights", "metrics.txt": "/metrics", "loaded.json": "/api/ps"}


def write(file: Path, where: paths.Paths, findings: list[Finding]) -> None:
    """Raises MlxdError: it is there already, or cannot be written."""
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise MlxdError(f"{file} is there already: name another file, or remove it") from None
    except OSError as error:
        raise MlxdError(f"cannot write {file}: {error.strerror}") from error
    secrets = masks.known(where)
    try:
        with open(fd, "wb") as out, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in contents(where, findings):
                archive.writestr(f"mlxd/{name}", masks.purged(text, secrets))
    except OSError as error:
        file.unlink(missing_ok=True)
        raise MlxdError(f"cannot write {file}: {error.strerror}") from error


def contents(where: paths.Paths, findings: list[Finding]) -> Iterator[tuple[str, str]]:
    """Names and texts."""
    yield "doctor.json", pretty(findings)
    yield "versions.txt", "".join(f"{name} {version}\n" for name, version in sorted(set(installed())))
    try:
        yield "settings.json", pretty(masks.settings(where))
    except ConfigError as error:
        yield "settings.json", pretty({"error": str(error)})
    yield "exits.json", pretty(exits.read(where.exits))
    for file in (where.events, *sorted(where.logs.glob("*.log"))):
        yield f"logs/{file.name}", paths.read_end(file, MOST_LOG_BYTES).decode(errors="replace")
    try:
        told = control.ask(where.control, "status")
    except MlxdError as error:
        yield "status.json", pretty({"state": "stopped", "reason": str(error)})
        return
    yield "status.json", pretty(told)
    token = ""
    with contextlib.suppress(ConfigError):
        token = tokens.for_commands(where.token) if where.token.exists() else ""
    for name, path in PAGES.items():
        try:
            yield (
                name,
                probe.fetch(told["url"] + path, ASK_S, token=token, most_bytes=4 * 1024 * 1024).body.decode(errors="replace"),
            )
        except probe.NoReply as no:
            yield name, f"{path}: {no}\n"


def installed() -> Iterator[tuple[str, str]]:
    for distribution in importlib.metadata.distributions():
        yield distribution.metadata["Name"] or "?", distribution.version


def pretty(value: Any) -> str:
    return json.dumps(msgspec.to_builtins(value), indent=1, ensure_ascii=False) + "\n"
