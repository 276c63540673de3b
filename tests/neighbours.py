"""Ollama's part, played by real processes on ports of their own."""

from __future__ import annotations

import socket
import subprocess
import sys
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
