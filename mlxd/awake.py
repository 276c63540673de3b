"""Keeping the machine from idle sleep while it serves: `caffeinate`, a process of the supervisor's that it can lose.

It holds macOS's power assertion and ends with the supervisor (`-w`), however that ends. Elsewhere there is no such program.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import subprocess

import msgspec

log = logging.getLogger("mlxd")

#: One that was lost is replaced after so long.
PAUSE_S = 10.0


class Awake(msgspec.Struct):
    """`pid`: of the process that holds the assertion; None when none does. Handed over."""

    pid: int | None = None
    tried_at: float = -math.inf

    def keep(self, wanted: bool, now: float) -> None:
        """Hold the assertion, or hold it no longer."""
        if wanted and self.pid is None and now - self.tried_at >= PAUSE_S:
            self.tried_at = now
            self.begin()
        elif not wanted:
            self.tried_at = -math.inf
            if self.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGTERM)

    def begin(self) -> None:
        try:
            process = subprocess.Popen(
                ["caffeinate", "-i", "-w", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            log.warning("the machine may fall asleep: caffeinate cannot be started (%s)", error.strerror)
            self.tried_at = math.inf
            return
        process.returncode = 0  # the loop reaps it
        self.pid = process.pid

    def ended(self, pid: int) -> bool:
        """Whether it was this process that has ended."""
        if pid != self.pid:
            return False
        self.pid = None
        return True
