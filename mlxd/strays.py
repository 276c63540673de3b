"""Strays: processes that a child of ours started, left, and that came back to us (Linux gives orphans to a subreaper; macOS has no such thing).

Finds and ends them. Does not know which children there are.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import psutil

from mlxd import leftovers


def become_subreaper() -> None:
    """Orphans come back to us instead of to init."""
    if sys.platform == "linux":
        import ctypes

        pr_set_child_subreaper = 36
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


@dataclass(frozen=True)
class Stray:
    """`origin`: the name of the child that it descends from. `began`: see `leftovers.start_identity`."""

    pid: int
    name: str
    origin: str
    began: float

    def kill(self) -> None:
        """It, and its group if that is its own: the number is that of a process of ours which we have not reaped."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, signal.SIGKILL)
            else:
                os.kill(self.pid, signal.SIGKILL)


def find(nonce: str, known: Container[int]) -> list[Stray]:
    """Processes under us that are not `known` and have our children's settings in their environment: proven to be ours to end."""
    found = []
    for process in psutil.Process().children():
        if process.pid not in known and (settings := leftovers.origin(process.pid)).get("nonce") == nonce:
            with contextlib.suppress(psutil.NoSuchProcess):
                began = leftovers.start_identity(process.pid) or 0.0
                found.append(Stray(process.pid, process.name(), Path(str(settings.get("log"))).stem, began))
    return found
