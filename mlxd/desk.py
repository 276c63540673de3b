"""The control protocol, the answering end: a literal table of verbs, the caller's uid checked.

Owns its listening socket and the conversations on it. Knows no verb.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from mlxd.control import DEADLINE_S
from mlxd.errors import ConfigError, MlxdError

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 64 * 1024
BACKLOG = 128
#: So many callers at once, each a descriptor of ours. One that has asked nothing yet makes room for the next.
MOST = 24

Verb = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


def listen(path: Path) -> socket.socket:
    """A socket at `path` (a stale one there is replaced: the caller holds the lock), for its owner alone. Raises ConfigError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        sock.bind(os.fspath(path))
        path.chmod(0o600)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen at {path}: {error.strerror or error}; remove what is there") from error
    sock.listen(BACKLOG)
    return sock


class Desk:
    """The answering end, over a listening socket that it owns. Errors of a verb are told to its caller. Starts closed."""

    def __init__(self, sock: socket.socket, verbs: dict[str, Verb]):
        sock.setblocking(False)
        self.sock = sock
        self.verbs = verbs
        self.conversations: dict[asyncio.Task[None], socket.socket] = {}
        self.silent: dict[socket.socket, asyncio.Task[None]] = {}  # those that have not asked yet, oldest first

    def open(self) -> None:
        """Closed for good, it stays so."""
        if self.sock.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self.sock.fileno(), self.accept)

    def pause(self) -> None:
        """Who comes waits; conversations go on."""
        asyncio.get_running_loop().remove_reader(self.sock.fileno())

    def move(self, sock: socket.socket) -> None:
        """To another listening socket: nobody can reach the old one any more."""
        self.close()
        sock.setblocking(False)
        self.sock = sock
        self.open()

    def asker(self) -> socket.socket:
        """Whose verb the running task carries out."""
        task = asyncio.current_task()
        assert task is not None
        return self.conversations[task]

    def close(self) -> None:
        self.pause()
        self.sock.close()

    def accept(self) -> None:
        try:
            connection, _ = self.sock.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # no descriptor left: readable for ever, so look away for a while
            self.rest()
            log.warning("cannot accept: %s", error)
            return
        task = asyncio.ensure_future(self.converse(connection))
        self.conversations[task], self.silent[connection] = connection, task
        task.add_done_callback(self.ended)
        if len(self.conversations) >= MOST:
            if self.silent:
                self.silent.pop(next(iter(self.silent))).cancel()
            else:
                self.rest()

    def rest(self) -> None:
        """Who comes waits for a second."""
        self.pause()
        asyncio.get_running_loop().call_later(1.0, self.open)

    def ended(self, task: asyncio.Task[None]) -> None:
        connection = self.conversations.pop(task)
        self.silent.pop(connection, None)
        connection.close()

    async def converse(self, connection: socket.socket) -> None:
        """One line asks, one line answers."""
        connection.setblocking(False)
        with contextlib.suppress(OSError, TimeoutError):
            if peer_uid(connection) not in (os.getuid(), 0):
                return
            text = b""
            async with asyncio.timeout(DEADLINE_S):
                while b"\n" not in text and len(text) < MAX_LINE_BYTES:
                    if not (data := await asyncio.get_running_loop().sock_recv(connection, MAX_LINE_BYTES)):
                        return
                    text += data
            self.silent.pop(connection, None)
            line, end, _ = text.partition(b"\n")
            if end:
                await tell(connection, await reply(line, self.verbs))


async def tell(connection: socket.socket, answer: dict[str, Any]) -> None:
    """The last line of a conversation. Raises OSError or TimeoutError."""
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.get_running_loop().sock_sendall(connection, json.dumps(answer).encode() + b"\n")


async def reply(text: bytes, verbs: dict[str, Verb]) -> dict[str, Any]:
    try:
        asked = json.loads(text)
        verb = verbs[asked["verb"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {"error": f"unknown verb; known are {', '.join(sorted(verbs))}"}
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
