"""A link: one end of a socketpair between the supervisor and a child, JSON lines both ways.

Owns framing, and what a child does to join its supervisor (limits, stack dumps, the end when the link closes).
Does not know what the words mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import msgspec

from mlxd import logs, messages
from mlxd.config import Config
from mlxd.messages import ChildWord, SupervisorWord
from mlxd.paths import open_log

#: What a child of mlxd exits with when one of its threads raised: sysexits' EX_SOFTWARE.
EX_SOFTWARE = 70
#: A child whose link closed drains this long, then ends: nobody leaves 30 GB of weights behind.
LAST_S = 5.0


class Link:
    """One end. Words that cannot be sent at once are queued; `offer` drops instead.

    `send` after the other side has gone is a no-op: the reader learns of it, and that is one place too few already.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decoder: msgspec.json.Decoder[Any]):
        self.reader = reader
        self.writer = writer
        self.decoder = decoder

    @classmethod
    async def open(cls, sock: socket.socket, decoder: msgspec.json.Decoder[Any], unread: bytes = b"") -> Link:
        """A link over a connected stream socket, which it owns from now on. `unread`: what came from it before and is to be read first."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=messages.MAX_LINE_BYTES)
        reader.feed_data(unread)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.create_connection(lambda: protocol, sock=sock)
        return cls(reader, asyncio.StreamWriter(transport, protocol, reader, loop), decoder)

    @property
    def unsent_bytes(self) -> int:
        """What waits here because the other side is behind with reading."""
        return self.writer.transport.get_write_buffer_size()

    async def part(self) -> tuple[int, bytes]:
        """Read no more from here: the socket's descriptor, and what has come and was not read. -1: the other side is gone. Does not let the
        loop turn, so that nothing comes meanwhile."""
        if self.writer.is_closing():
            return -1, b""
        self.reader.feed_eof()
        return self.writer.get_extra_info("socket").fileno(), await self.reader.read()

    def send(self, word: ChildWord | SupervisorWord) -> None:
        if not self.writer.is_closing():
            self.writer.write(messages.line(word))

    def offer(self, word: ChildWord | SupervisorWord) -> None:
        """Send unless the other side is behind with reading: a beat, for one, is only worth something now."""
        if not self.unsent_bytes:
            self.send(word)

    async def read(self) -> Any | None:
        """The next word; None when the other side is gone. Raises ValueError on a line that is no word."""
        try:
            text = await self.reader.readuntil(b"\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        except asyncio.LimitOverrunError as error:
            raise ValueError(f"a line of over {messages.MAX_LINE_BYTES} bytes on a link") from error
        try:
            return self.decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"not a word: {text[:200]!r}: {error}") from error

    def close(self) -> None:
        self.writer.close()


class ChildSettings(msgspec.Struct, kw_only=True):
    """What the supervisor tells a child in the environment: MLXD_CHILD, one JSON object. Paths are absolute.

    The server gets `listen_fds` (listening, non-blocking: the flag is shared with the supervisor), the files `aliases` and `token`, and where
    the supervisor answers (`control`), an engine `socket` (where it listens) and `view` (the directory it makes for its private view of a
    model's files).
    """

    config: Config
    link_fd: int
    slot: int
    nonce: str
    log: str
    stack: str
    listen_fds: list[int] = []
    aliases: str = ""
    token: str = ""
    control: str = ""
    socket: str = ""
    view: str = ""


def child_settings() -> ChildSettings:
    """The settings of this process as a child. Raises KeyError when it is none."""
    return msgspec.json.decode(os.environ["MLXD_CHILD"], type=ChildSettings)


def become_child(settings: ChildSettings) -> None:
    """First thing in a child: modes, log lines, stack dumps, a thread's exception ends the process, memory pressure takes us first."""
    os.umask(0o077)
    logs.begin(settings.config.log.format)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a supervisor that was about to hand over had some blocked
    stack = os.open(settings.stack, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    # Dumps even while native code holds the interpreter lock, where no Python handler would run.
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True, chain=False)
    faulthandler.enable(file=2, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the supervisor alone
    threading.excepthook = thread_died
    if sys.platform == "linux":
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
    raise_nofile(8192)


def thread_died(args: threading.ExceptHookArgs) -> None:
    """A thread that raised leaves a process that looks alive and is not: end it, loudly."""
    with contextlib.suppress(OSError):  # a full disk
        threading.__excepthook__(args)
    leave(EX_SOFTWARE)


def leave(status: int) -> NoReturn:
    """End at once, whatever other threads are at. A full disk keeps the last lines of the log, and must not keep us."""
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(status)


def raise_nofile(wanted: int) -> None:
    """Raise the soft limit of open files (launchd gives 256)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def reopen_log(path: str) -> None:
    """stdout and stderr go to `path` from now on; where they cannot, they stay where they are."""
    try:
        fd = open_log(path)
    except OSError:  # the supervisor says so
        return
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


async def beat(link: Link, counters: Callable[[], messages.Counters], also: Callable[[], None] | None = None) -> None:
    """Say once a second how far we are and how late this loop wakes; `also` runs beside it."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + 1.0
        await asyncio.sleep(1.0)
        now = counters()
        now.loop_lag_s = loop.time() - due
        link.offer(messages.Beat(now))
        if also:
            also()


async def join(settings: ChildSettings) -> Link:
    """Open this child's link to its supervisor."""
    sock = socket.socket(fileno=settings.link_fd)
    sock.set_inheritable(False)
    return await Link.open(sock, messages.supervisor_words)


async def serve(link: Link, handle: Callable[[SupervisorWord], Awaitable[None]], drained: Callable[[], Awaitable[None]]) -> None:
    """A child's life on its link: handle each word until the link closes; then `drained()` may take LAST_S, and the process ends.

    Never returns.
    """
    while (word := await link.read()) is not None:
        await handle(word)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(drained(), LAST_S)
    leave(0)
