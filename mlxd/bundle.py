"""The bundle of `mlxd doctor`: what somebody needs to know who is to help, in one archive; no prompt, no answer, no token, no system text."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from mlxd import control, exits, masks, paths, probe
from mlxd.doctor import Doctor, Finding
from mlxd.errors import MlxdError

#: Of each log and of the events, their ends.
MOST_LOG_BYTES = 256 * 1024
ASK_S = 10.0
#: What the server tells of itself.
PAGES = {"health.json": "/health", "flights.json": "/ui/flights", "metrics.txt": "/metrics", "loaded.json": "/api/ps"}


@contextlib.contextmanager
def begun(file: Path) -> Iterator[IO[bytes]]:
    """A new file, which is gone again if what is done with it fails. Raises MlxdError: it is there already, or cannot be written."""
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise MlxdError(f"{file} is there already: name another file, or remove it") from None
    except OSError as error:
        raise MlxdError(f"cannot write {file}: {error.strerror}") from error
    try:
        with open(fd, "wb") as out:
            yield out
    except BaseException as error:
        file.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise MlxdError(f"cannot write {file}: {error.strerror}") from error
        raise


def write(out: IO[bytes], where: paths.Paths, findings: list[Finding]) -> None:
    """Raises OSError."""
    secrets = masks.known(where)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, look in contents(where, findings):
            try:
                told = look()
            except (OSError, MlxdError, probe.NoReply) as error:
                told = {"error": str(error)} if name.endswith(".json") else f"{error}\n"
            told = masks.purged(told, secrets)
            text = told if isinstance(told, str) else json.dumps(told, indent=1, ensure_ascii=False) + "\n"
            archive.writestr(f"mlxd/{name}", text.encode(errors="replace"))


def contents(where: paths.Paths, findings: list[Finding]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names, and what tells what is in them: a text, or what is written as JSON."""
    yield "doctor.json", lambda: msgspec.to_builtins(findings)
    yield "versions.txt", lambda: "".join(f"{name} {version}\n" for name, version in sorted(set(installed())))
    yield "settings.json", lambda: masks.settings(where)
    yield "exits.json", lambda: msgspec.to_builtins(exits.read(where.exits))
    for file in (where.events, *logs(where)):
        yield f"logs/{file.name}", lambda file=file: end_of(file)  # type: ignore[misc]
    status = functools.cache(lambda: control.ask(where.control, "status"))
    yield "status.json", status
    token = Doctor(where).token()
    for name, path in PAGES.items():
        yield name, lambda path=path: page(status()["url"] + path, token)  # type: ignore[misc]


def logs(where: paths.Paths) -> list[Path]:
    try:
        return sorted(where.logs.glob("*.log"))
    except OSError:
        return []


def end_of(file: Path) -> str:
    """Its last lines, whole ones: half a token would not be known for one."""
    data = paths.read_end(file, MOST_LOG_BYTES)
    if len(data) == MOST_LOG_BYTES:
        data = data.partition(b"\n")[2]
    return data.decode(errors="replace")


def page(url: str, token: str) -> Any:
    """Raises NoReply."""
    reply = probe.fetch(url, ASK_S, token=token, most_bytes=4 * 1024 * 1024)
    return reply.json or reply.body.decode(errors="replace")


def installed() -> Iterator[tuple[str, str]]:
    for distribution in importlib.metadata.distributions():
        yield distribution.metadata["Name"] or "?", distribution.version
