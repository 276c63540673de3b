"""What the supervisor tells systemd: that it is up, how it is, that its loop turns, that it stops (sd_notify).

Nothing is told, and nothing fails, where nobody listens.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

import msgspec


class Notifier(msgspec.Struct):
    """`address`: of systemd's socket, "@..." for an abstract one, "" where nobody listens. `watchdog_s`: how long systemd waits for a ping
    before it kills us, 0.0 for ever. Handed over, since the environment forgets both."""

    address: str = ""
    watchdog_s: float = 0.0
    told: str = ""
    pinged_at: float = 0.0

    @classmethod
    def of(cls, environ: MutableMapping[str, str]) -> Notifier:
        """As systemd gave it to this process; taken out of the environment, so that no child speaks in our name."""
        address = environ.pop("NOTIFY_SOCKET", "")
        microseconds, pid = environ.pop("WATCHDOG_USEC", "0"), environ.pop("WATCHDOG_PID", str(os.getpid()))
        ours = pid == str(os.getpid()) and microseconds.isdecimal()
        return cls(address, int(microseconds) / 1e6 if ours else 0.0)

    def ready(self) -> None:
        self.send("READY=1")

    def reloading(self) -> None:
        """Until `ready`."""
        self.send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self.send("STOPPING=1")

    def status(self, sentence: str) -> None:
        if sentence != self.told:
            self.told = sentence
            self.send(f"STATUS={sentence.replace(chr(10), ' ')}")

    def ping(self, now: float) -> None:
        """At most three times in `watchdog_s`."""
        if self.watchdog_s and now - self.pinged_at >= self.watchdog_s / 3:
            self.pinged_at = now
            self.send("WATCHDOG=1")

    def send(self, text: str) -> None:
        if not self.address:
            return
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        # systemd that does not read, or is gone, is nothing that we could mend.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(text.encode(), address)
