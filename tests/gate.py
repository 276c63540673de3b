"""A gate between a server and an engine: it lets frames through until it holds a job back, so that an engine can be killed at a moment
that no clock would hit."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from mlxd import messages
from mlxd.messages import Embed, Event, Step, Submit

#: Of one job: what it is, what went through so far, what is about to.
Passes = Callable[[Submit | Embed, list[Event], Event], bool]


class Gate:
    """Listens at `path` and passes on to `target`. `held`: the jobs of which nothing comes through any more; what one step brought is
    let through or held as a whole, since a real death has no other choice."""

    def __init__(self, path: Path, target: Path, passes: Passes):
        self.path = path
        self.target = target
        self.passes = passes
        self.held: set[int] = set()
        self.submits: dict[int, Submit | Embed] = {}
        self.seen: dict[int, list[Event]] = {}
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                server, _ = self.listener.accept()
                engine = socket.socket(socket.AF_UNIX)
                try:
                    engine.connect(str(self.target))
                except OSError:  # a socket's path is there a moment before somebody listens; the server comes again
                    server.close()
                    engine.close()
                    continue
                for work in (self.to_engine, self.to_server):
                    threading.Thread(target=self.carry, args=(work, server, engine), daemon=True).start()

    def carry(self, work: Callable[[socket.socket, socket.socket], None], server: socket.socket, engine: socket.socket) -> None:
        with contextlib.suppress(OSError):
            work(server, engine)
        for sock in (server, engine):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def to_engine(self, server: socket.socket, engine: socket.socket) -> None:
        with server.makefile("rb") as frames:
            while data := read(frames):
                message = messages.to_engine.decode(data)
                if isinstance(message, Submit | Embed):
                    self.submits[message.job] = message
                    self.seen[message.job] = []
                engine.sendall(messages.LENGTH.pack(len(data)) + data)

    def to_server(self, server: socket.socket, engine: socket.socket) -> None:
        with engine.makefile("rb") as frames:
            while data := read(frames):
                message = messages.from_engine.decode(data)
                if isinstance(message, Step):
                    message = Step(self.let_through(message.events))
                    if not message.events:
                        continue
                server.sendall(messages.frame(message))

    def let_through(self, events: list[Event]) -> list[Event]:
        for event in events:
            if not self.passes(self.submits[event.job], self.seen[event.job], event):
                self.held.add(event.job)
        through = [event for event in events if event.job not in self.held]
        for event in through:
            self.seen[event.job].append(event)
        return through

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def read(frames: object) -> bytes:
    """The body of the next frame; b"" at the end."""
    header = frames.read(messages.LENGTH.size)  # type: ignore[attr-defined]
    if len(header) < messages.LENGTH.size:
        return b""
    return frames.read(messages.LENGTH.unpack(header)[0])  # type: ignore[attr-defined, no-any-return]
