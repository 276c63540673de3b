"""The tokens: who may come in over HTTP and how much they may do, as the file `token` in the configuration directory says.

Owns that file's format, the comparison, and the rule that nobody listens beyond loopback without one. Knows no route. The server reads the
file for itself when it starts: a token is in no environment, argument, log or state file.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mlxd import paths
from mlxd.config import Config
from mlxd.errors import ConfigError

LEAST_CHARACTERS = 16
MAX_FILE_BYTES = 64 * 1024


class Access(enum.IntEnum):
    """Each includes those before it."""

    NONE = 0
    INFERENCE = 1
    ADMIN = 2


NAMED = {b"inference": Access.INFERENCE, b"admin": Access.ADMIN}


@dataclass(frozen=True)
class Tokens:
    """All that the file holds, at least one. Their text is in no `repr`."""

    secrets: tuple[tuple[Access, bytes], ...] = field(repr=False)

    def access(self, headers: Iterable[tuple[bytes, bytes]]) -> Access:
        """The most that a request with these headers may do. Every token is compared in full, so that the time tells neither which one
        nearly fitted nor how far."""
        most = Access.NONE
        for shown in credentials(headers):
            for access, token in self.secrets:
                if hmac.compare_digest(shown, token):
                    most = max(most, access)
        return most

    @property
    def strongest(self) -> str:
        """One of those that may do the most."""
        return max(self.secrets, key=lambda entry: entry[0])[1].decode("ascii")

    @property
    def texts(self) -> list[str]:
        """For whoever takes them out of what others are shown."""
        return [token.decode("ascii") for _, token in self.secrets]

    @property
    def stamp(self) -> str:
        """Differs when the tokens do, and tells nothing of them."""
        return hashlib.sha256(b"\n".join(b"%d %b" % entry for entry in self.secrets)).hexdigest()


def credentials(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """What a request shows: `Authorization: Bearer TOKEN`, Anthropic's `x-api-key: TOKEN`."""
    shown = []
    for name, value in headers:
        if name == b"authorization":
            scheme, _, value = value.strip().partition(b" ")
            if scheme.lower() != b"bearer":
                continue
        elif name != b"x-api-key":
            continue
        shown.append(value.strip())
    return shown


def load(path: Path, settings: Config) -> Tokens | None:
    """The tokens; None without a file: on loopback everybody may do everything. Raises ConfigError: the file is not fit for secrets or cannot
    be understood, or `settings` let other machines in and not all is there that this needs."""
    data = paths.read_private(path, MAX_FILE_BYTES)
    found = None if data is None else parse(data, path)
    server = settings.server
    if not server.on_loopback and not (found and settings.security.allow_remote):
        raise ConfigError(
            f"listening on {server.host} lets other machines in: put a token into {path} and set allow_remote = true in [security], "
            "or leave server.host (MLX_API_HOST) on loopback"
        )
    return found


def for_commands(path: Path) -> str:
    """What mlxd's own commands show over HTTP, a token that may do as much as any there; "" where none is needed. Raises ConfigError."""
    data = paths.read_private(path, MAX_FILE_BYTES)
    return "" if data is None else parse(data, path).strongest


def parse(data: bytes, path: Path) -> Tokens:
    """One token a line, `inference` or `admin` before it; without either it is an admin's. Empty lines and those that begin with # are
    skipped. Raises ConfigError, which names the line and not what is in it."""
    entries = []
    for number, line in enumerate(data.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith(b"#"):
            continue
        named, token = [b"admin", *words][-2:]
        if len(words) > 2 or named not in NAMED:
            raise ConfigError(f"{path}, line {number}: write `inference TOKEN` or `admin TOKEN`")
        if not re.fullmatch(rb"[!-~]{%d,}" % LEAST_CHARACTERS, token):
            raise ConfigError(f"{path}, line {number}: a token has at least {LEAST_CHARACTERS} characters, all of printable ASCII")
        entries.append((NAMED[named], token))
    if not entries:
        raise ConfigError(f"{path} holds no token; write one or remove the file")
    return Tokens(tuple(entries))
