"""Other servers on ports of their own: Ollama's part, played by a real process, and strangers that say what they are told to."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import eventually

FAKE = Path(__file__).with_name("fake_neighbour.py")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def accepts(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


class Neighbour:
    """A fake Ollama; see fake_neighbour.py."""

    def __init__(self, *arguments: str, port: int = 0):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen([sys.executable, FAKE, "serve", "--port", str(self.port), *arguments])
        eventually(lambda: accepts(self.port), "a fake Ollama that listens")

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def neighbour() -> Iterator[Callable[..., Neighbour]]:
    made: list[Neighbour] = []

    def make(*arguments: str, port: int = 0) -> Neighbour:
        made.append(Neighbour(*arguments, port=port))
        return made[-1]

    yield make
    for one in made:
        one.end()


class Answering:
    """A server in a thread that answers each request with `pieces`, as far as they are taken."""

    def __init__(self, pieces: Callable[[], Iterator[bytes]]):
        self.pieces = pieces
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.asked = self.sent = 0
        self.thread = threading.Thread(target=self.run)

    def __enter__(self) -> Answering:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listening.close()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listening.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(65536)
                    self.asked += 1
                    for piece in self.pieces():
                        connection.sendall(piece)
                        self.sent += len(piece)
