"""What the supervisor writes down for the next one: at once, or as soon as there is room.

A full disk is no reason to stop serving. What cannot be written is kept in memory and tried again; `status` says so.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from mlxd import paths

log = logging.getLogger(__name__)


class Papers:
    """`problem`: why something is only in memory, in words; "" when all is on disk."""

    def __init__(self) -> None:
        self.unwritten: dict[Path, bytes] = {}
        self.problem = ""

    def write(self, file: Path, data: bytes) -> None:
        """Old or new content, never half of it. What was to be written before and could not be is forgotten."""
        self.unwritten.pop(file, None)
        try:
            paths.write_atomically(file, data)
        except OSError as error:
            self.unwritten[file] = data
            reason = error.strerror or str(error)
            if not self.problem:
                log.warning("cannot write %s: %s", file, reason)
            names = ", ".join(sorted(unwritten.name for unwritten in self.unwritten))
            self.problem = f"cannot write in {file.parent} ({reason}): {names} will be written when that ends"
        else:
            self.settle()

    def remove(self, file: Path) -> None:
        """There is nothing to be written down any more."""
        self.unwritten.pop(file, None)
        with contextlib.suppress(OSError):  # not there, or a directory in its place
            file.unlink()
        self.settle()

    def retry(self) -> None:
        """Write what could not be written."""
        for file, data in list(self.unwritten.items()):
            self.write(file, data)

    def settle(self) -> None:
        if self.problem and not self.unwritten:
            log.info("everything is written down again")
            self.problem = ""
