"""A child that misbehaves on request. It speaks the real link protocol; as a server it answers HTTP with the nonce.

    python fake_child.py [--exit N] [--abort] ...

Put into `server.command` or `engine.command`. `--first N FILE` limits the misbehaviour to the first N processes (counted in FILE).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from mlxd import __version__, link, messages


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--say", default="", help="written to stderr first")
    parser.add_argument("--say-file", help="what this file holds is written to stderr first")
    parser.add_argument("--exit", type=int, help="exit with this status after hello")
    parser.add_argument("--exit-at-once", type=int, help="exit with this status before hello")
    parser.add_argument("--exit-loading", type=int, help="exit with this status 0.1 s into the load")
    parser.add_argument("--abort", action="store_true", help="SIGABRT when ready")
    parser.add_argument("--segv", action="store_true", help="SIGSEGV when ready")
    parser.add_argument("--exit-ready", type=int, help="exit with this status when ready")
    parser.add_argument("--no-hello", action="store_true")
    parser.add_argument("--slow-hello", type=float, default=0.0, help="seconds before hello")
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--load-s", type=float, default=0.0, help="how long a load takes; it moves all the while")
    parser.add_argument("--ignore-term", action="store_true", help="and every word that asks for an end")
    parser.add_argument("--protocol", type=int, default=messages.PROTOCOL)
    parser.add_argument("--wrong-nonce", action="store_true")
    parser.add_argument("--refuse", default="", help="an engine: this model cannot be loaded")
    parser.add_argument("--mute", action="store_true", help="a server: accepts and never answers, while it beats")
    parser.add_argument("--lag", action="store_true", help="the beats tell of a loop that hardly turns")
    parser.add_argument("--die-on-request", action="store_true")
    parser.add_argument("--fork", default="", help="leave a grandchild in our group; its pid goes to this file")
    parser.add_argument("--daemonise", default="", help="leave a grandchild in a session of its own; its pid goes to this file")
    parser.add_argument("--bomb", action="store_true", help="when ready: processes in our group that fork for half a minute")
    parser.add_argument("--zombies", type=int, default=0, help="when ready: start so many processes and never wait for them")
    parser.add_argument("--leak", action="store_true", help="when ready: open files until there are no more")
    parser.add_argument("--alone", default="", help="an engine: lock this file, and say so in FILE.broken if somebody else has it")
    parser.add_argument("--flap", action="store_true", help="a server: every other /health gets no answer")
    parser.add_argument(
        "--drip", default="", help="a server: /health comes a byte a second; each says in this file how many there are"
    )
    parser.add_argument("--stranger", action="store_true", help="a server: /health is answered with another nonce")
    parser.add_argument("--first", nargs=2, metavar=("N", "FILE"), help="misbehave in the first N processes only")
    parser.add_argument("--after", nargs=2, metavar=("N", "FILE"), help="misbehave in all but the first N processes")
    parser.add_argument("--finished", type=int, default=0, help="requests that the beats tell as finished since ready")
    parser.add_argument("--busy", action="store_true", help="the beats tell of a job in hand and of nothing that moves")
    parser.add_argument("--prefilling", action="store_true", help="the same, at its prompt")
    parser.add_argument("--crawl", type=float, default=0.0, help="the same, but a token comes every so many seconds")
    parser.add_argument("--hang-gil", action="store_true", help="when ready: wait in native code that holds the interpreter lock")
    parser.add_argument("--swell", type=int, default=0, help="when ready: take so many MB of memory")
    parser.add_argument("--grow", type=int, default=0, help="when ready: take so many MB of memory every second")
    parser.add_argument(
        "--complain", type=float, default=-1.0, help="a server: so long after the first engine is up, say it is stalled"
    )
    parser.add_argument("--want", action="append", default=[], help="a server: want this model, preloaded")
    parser.add_argument("--spew", type=int, default=0, help="so many MiB of noise to stderr when ready, in one line")
    parser.add_argument("--babble", action="store_true", help="write something that is no word to the link")
    found = parser.parse_args()
    if not (found.first or found.after):
        return found
    most, file = found.first or found.after
    counter = Path(file)
    count = int(counter.read_text()) if counter.exists() else 0
    counter.write_text(str(count + 1))
    if (count < int(most)) == bool(found.first):
        return found
    return parser.parse_args([word for model in found.want for word in ("--want", model)])


class FakeChild:
    def __init__(self, how: argparse.Namespace, settings: link.ChildSettings):
        self.how = how
        self.settings = settings
        self.kind = "server" if settings.listen_fds else "engine"
        self.counters = messages.Counters()
        self.accepting: list[socket.socket] = []
        self.ready = False
        self.ready_at = 0.0
        self.polls = 0
        self.dripping: list[asyncio.StreamReader] = []

    async def run(self) -> None:
        how = self.how
        if how.exit_at_once is not None:
            sys.exit(how.exit_at_once)
        self.link = await link.join(self.settings)
        if how.fork:
            sleeper = subprocess.Popen(["sleep", "600"])  # noqa: ASYNC220 a grandchild that outlives us
            Path(how.fork).write_text(str(sleeper.pid))
        if how.daemonise:
            command = "setsid sleep 600 >/dev/null 2>&1 & echo $! > $0.new; mv $0.new $0"
            subprocess.run(["sh", "-c", command, how.daemonise], check=True)  # noqa: ASYNC221
        if how.alone and self.kind == "engine":
            self.lock = lock_alone(Path(how.alone))
        if how.no_hello:
            await asyncio.sleep(3600)
        await asyncio.sleep(how.slow_hello)
        nonce = "wrong" if how.wrong_nonce else self.settings.nonce
        self.link.send(messages.Hello(how.protocol, self.kind, os.getpid(), __version__, nonce))
        if how.babble:
            self.link.writer.write(b"what is a word?\n")
        if how.exit is not None:
            await self.leave(how.exit)
        beats = asyncio.create_task(self.lag() if how.lag else link.beat(self.link, self.count))
        if self.kind == "server":
            await self.serve()
        await link.serve(self.link, self.handle, self.drained)
        beats.cancel()

    def count(self) -> messages.Counters:
        how = self.how
        busy = self.ready and (how.busy or how.prefilling or how.crawl > 0)
        return messages.Counters(
            running=int(busy),
            prefilling=int(busy and how.prefilling),
            emitted=int((time.monotonic() - self.ready_at) // how.crawl) if busy and how.crawl else 0,
            finished=how.finished if self.ready else 0,
            loaded=self.counters.loaded,
        )

    async def lag(self) -> None:
        while True:
            self.link.offer(messages.Beat(messages.Counters(loop_lag_s=9.0)))
            await asyncio.sleep(0.2)

    async def leave(self, status: int) -> None:
        await self.link.writer.drain()
        sys.stderr.flush()
        os._exit(status)

    async def handle(self, word: messages.SupervisorWord) -> None:
        match word:
            case messages.Load(model, _):
                await self.load(model)
            case messages.EngineUp(slot) if self.how.complain >= 0:
                await asyncio.sleep(self.how.complain)
                self.how.complain = -1.0
                self.link.send(messages.Stalled(slot))
            case messages.Reopen():
                link.reopen_log(self.settings.log)
            case messages.Stop() | messages.Drain() if not self.how.ignore_term:
                await self.leave(0)

    async def drained(self) -> None:
        if self.how.ignore_term:
            await asyncio.sleep(3600)

    async def load(self, model: str) -> None:
        if self.how.refuse:
            self.link.send(messages.Bye("refused", self.how.refuse))
            await self.leave(0)
        if self.how.exit_loading is not None:
            await asyncio.sleep(0.1)
            await self.leave(self.how.exit_loading)
        end = time.monotonic() + self.how.load_s
        while time.monotonic() < end:
            self.counters.loaded += 1
            await asyncio.sleep(0.05)
        await self.be_ready(model)

    async def serve(self) -> None:
        for model in self.how.want:
            self.link.send(messages.Want(model, "/nonexistent", preload=True, automatic=True))
        if self.how.never_ready:
            return
        self.accepting = [socket.socket(fileno=fd) for fd in self.settings.listen_fds]
        for sock in self.accepting:
            asyncio.get_running_loop().add_reader(sock.fileno(), self.accept, sock)
        await self.be_ready(None)

    async def be_ready(self, model: str | None) -> None:
        if self.how.never_ready:
            return
        self.ready, self.ready_at = True, time.monotonic()
        self.ballast = await asyncio.to_thread(take_memory, self.how.swell * 2**20) if self.how.swell else None
        self.link.send(messages.Ready(model))
        await self.link.writer.drain()
        for _ in range(self.how.zombies):
            if os.fork() == 0:
                os._exit(0)
        if self.how.bomb:
            explode()
        if self.how.leak:
            with contextlib.suppress(OSError):
                while True:
                    os.dup(0)
        if self.how.grow:
            TASKS.append(asyncio.ensure_future(grow(self.how.grow * 2**20)))
        if self.how.spew:
            await asyncio.to_thread(spew, self.how.spew * 2**20)
        if self.how.hang_gil:
            hold_the_interpreter()
        if self.how.abort:
            os.abort()
        if self.how.segv:
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.how.exit_ready is not None:
            await self.leave(self.how.exit_ready)

    def accept(self, sock: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            connection, _ = sock.accept()
            connection.setblocking(False)
            if self.how.mute:
                MUTED.append(connection)
            else:
                TASKS.append(asyncio.ensure_future(self.answer(connection)))

    async def answer(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            if self.how.die_on_request and b"/health" not in head:
                os._exit(1)
            self.polls += 1
            if self.how.flap and self.polls % 2 == 0:
                writer.close()
                return
            if self.how.drip:
                await self.drip(reader, writer)
                return
            nonce = "another" if self.how.stranger else self.settings.nonce
            body = json.dumps({"status": "ok", "nonce": nonce, "pid": os.getpid()}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
        writer.close()

    async def drip(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the other side has had enough."""
        self.dripping.append(reader)
        with open(self.how.drip, "a") as file:  # noqa: ASYNC230
            print(len(self.dripping), file=file)
        asked = asyncio.ensure_future(reader.read())
        while not asked.done():
            writer.write(b"H")
            await asyncio.wait([asked], timeout=1.0)
        self.dripping.remove(reader)
        writer.close()


def lock_alone(file: Path) -> int:
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.with_suffix(".broken").touch()
    return fd


def explode() -> None:
    """Twenty processes, each of which forks another one 10 times a second and ends; whatever happens, not for long."""
    end = time.monotonic() + 30.0
    for _ in range(20):
        if os.fork() == 0:
            while time.monotonic() < end:
                time.sleep(0.1)
                if os.fork():
                    os._exit(0)
            os._exit(0)


def take_memory(size_bytes: int) -> mmap.mmap:
    """So many bytes of real memory; large pages where there are, since a fault each takes long on a busy machine."""
    memory = mmap.mmap(-1, size_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    for offset in range(0, size_bytes, mmap.PAGESIZE):
        memory[offset] = 1
    return memory


async def grow(size_bytes: int) -> None:
    """Until somebody ends it; a gigabyte at most."""
    held = []
    while len(held) * size_bytes < 2**30:
        held.append(take_memory(size_bytes))
        await asyncio.sleep(1.0)


def spew(size_bytes: int) -> None:
    """Every byte there is but a newline, over and over."""
    noise = bytes(byte for byte in range(256) if byte != 10) * 256 + b"\x1b[31m\x1b]0;mine\x07"
    for _ in range(0, size_bytes, len(noise)):
        os.write(2, noise)


def hold_the_interpreter() -> None:
    """Lock a mutex twice without letting the interpreter go, as native code does that waits for a GPU."""
    library = ctypes.PyDLL(None)
    mutex = ctypes.create_string_buffer(256)
    library.pthread_mutex_init(mutex, None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


MUTED: list[socket.socket] = []
TASKS: list[asyncio.Future[None]] = []


def main() -> None:
    settings = link.child_settings()
    link.become_child(settings)
    how = parse()
    if how.say:
        print(how.say, file=sys.stderr, flush=True)
    if how.say_file:
        print(Path(how.say_file).read_text(), file=sys.stderr, flush=True)
    if how.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    asyncio.run(FakeChild(how, settings).run())


if __name__ == "__main__":
    main()
