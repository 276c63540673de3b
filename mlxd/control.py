"""The control protocol, both ends: one JSON line asks, one JSON line answers, over a private unix socket.

A literal table of verbs, the caller's uid checked. The asking end is plain blocking code without asyncio, so that `mlxd status` stays quick.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxd.errors import MlxdError, NotRunning

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 64 * 1024
#: An answer is a status with 50 exit records at most.
MAX_ANSWER_BYTES = 4 * 1024 * 1024
DEADLINE_S = 5.0

Verb = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


def ask(path: Path, verb: str, timeout_s: float = DEADLINE_S, **arguments: Any) -> dict[str, Any]:
    """The daemon's answer. Raises NotRunning when nobody listens, MlxdError when it refuses or does not answer in time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            raise NotRunning("mlxd is not running; start it with `mlxd start`") from error
        except OSError as error:
            raise MlxdError(f"cannot reach mlxd at {path}: {error.strerror or error}") from error
        try:
            sock.sendall(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
            with sock.makefile("rb") as file:
                answer = file.readline(MAX_ANSWER_BYTES)
        except TimeoutError as error:
            silent = MlxdError(f"mlxd did not answer `{verb}` within {timeout_s:g} s; look at `mlxd logs --supervisor`")
            silent.exit_status = 4
            raise silent from error
        except ConnectionError as error:
            raise NotRunning("mlxd ended while it was asked") from error
    if not answer.endswith(b"\n"):
        raise NotRunning("mlxd ended while it was asked")
    told: dict[str, Any] = json.loads(answer)
    if "error" in told:
        refusal = MlxdError(told["error"])
        refusal.exit_status = told.get("exit_status", 1)
        raise refusal
    return told


async def serve(path: Path, verbs: dict[str, Verb]) -> asyncio.Server:
    """Listen at `path` (a stale socket there is replaced: the caller holds the lock). Errors of a verb are told to its caller."""
    import asyncio

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError, TimeoutError):
            if peer_uid(writer.get_extra_info("socket")) not in (os.getuid(), 0):
                return
            async with asyncio.timeout(DEADLINE_S):
                try:
                    text = await reader.readuntil(b"\n")
                except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                    return
            writer.write(json.dumps(await reply(text, verbs)).encode() + b"\n")
            async with asyncio.timeout(DEADLINE_S):
                await writer.drain()

    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    server = await asyncio.start_unix_server(converse, os.fspath(path), limit=MAX_LINE_BYTES)
    path.chmod(0o600)
    return server


async def reply(text: bytes, verbs: dict[str, Verb]) -> dict[str, Any]:
    try:
        asked = json.loads(text)
        verb = verbs[asked["verb"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {"error": f"known verbs are {', '.join(sorted(verbs))}"}
    try:
        return await verb(asked)
    except MlxdError as error:
        return {"error": str(error), "exit_status": error.exit_status}
    except Exception as error:  # a bug in one verb: its caller is told, and everybody else goes on
        log.exception("%s failed", asked["verb"])
        return {"error": f"mlxd failed at `{asked['verb']}` ({error}); look at `mlxd logs --supervisor`"}


def peer_uid(sock: Any) -> int:
    """The uid at the other end of a unix socket; -1 when the kernel does not tell."""
    try:
        if sys.platform == "darwin":
            # struct xucred {u_int version; uid_t uid; short ngroups; gid_t groups[16];}, SOL_LOCAL 0, LOCAL_PEERCRED 1
            return int(struct.unpack_from("=Ii", sock.getsockopt(0, 1, 76))[1])
        return int(struct.unpack("=iii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])
    except OSError:
        return -1
