"""What systemd hears of the supervisor, at a socket that plays its part; and what macOS's caffeinate is kept for."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import Daemon, eventually


class Listener:
    """systemd's end of NOTIFY_SOCKET."""

    def __init__(self, address: str):
        self.address = address
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind("\0" + address[1:] if address.startswith("@") else address)
        self.sock.settimeout(60)

    def until(self, text: str) -> list[str]:
        """What is heard, `text` being the last of it."""
        heard: list[str] = []
        while text not in heard:
            heard.append(self.sock.recv(4096).decode().partition("\nMONOTONIC_USEC=")[0])
        return heard

    def for_two_pings(self) -> list[str]:
        """What is heard while there would have been two at least."""
        self.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                self.sock.recv(4096)
        heard = []
        self.sock.settimeout(2.5)
        with pytest.raises(TimeoutError):
            while True:
                heard.append(self.sock.recv(4096).decode())
        self.sock.settimeout(60)
        return heard


@pytest.fixture(params=["path", pytest.param("abstract", marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux only"))])
def systemd(request: pytest.FixtureRequest, home: Path) -> Listener:
    return Listener(str(home / "notify") if request.param == "path" else f"@{home}/notify")


def test_systemd_hears_how_mlxd_is_from_ready_to_stopping(daemon: Callable[..., Daemon], systemd: Listener) -> None:
    d = daemon(NOTIFY_SOCKET=systemd.address, WATCHDOG_USEC="300000")
    d.start()
    heard = systemd.until("STATUS=mlxd is ready")
    assert heard[0] == "READY=1" and "WATCHDOG=1" in heard + systemd.until("WATCHDOG=1")
    told = d.ready()
    for child in [told["server"], *told["engines"]]:
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & psutil.Process(child["pid"]).environ().keys()
    assert d.mlxd("restart", "--supervisor").returncode == 0
    assert "READY=1" in systemd.until("RELOADING=1") + systemd.until("READY=1")
    systemd.until("WATCHDOG=1")
    d.signal(signal.SIGTERM)
    systemd.until("STOPPING=1")


def test_a_supervisor_whose_loop_hangs_does_not_ping(daemon: Callable[..., Daemon], home: Path) -> None:
    systemd = Listener(str(home / "notify"))
    d = daemon(NOTIFY_SOCKET=systemd.address, WATCHDOG_USEC="300000")
    d.start()
    d.ready()
    systemd.until("WATCHDOG=1")
    d.paths.config.write_text(f"[server]\nx = [{'1,' * 1_000_000}]\n")  # takes seconds to be understood
    systemd.until("RELOADING=1")
    assert systemd.for_two_pings() == []
    systemd.until("WATCHDOG=1")


def test_a_mac_is_kept_awake_by_one_process_that_may_be_lost(daemon: Callable[..., Daemon], home: Path) -> None:
    caffeinate = home / "caffeinate"
    caffeinate.write_text(f'#!/bin/sh\necho $$ "$@" >>{home}/kept\nexec sleep 600\n')
    caffeinate.chmod(0o755)
    d = daemon(MLXD_SUPERVISOR_KEEP_AWAKE="true", PATH=f"{home}:{os.environ['PATH']}")
    d.start()
    pid = d.ready()["supervisor"]["pid"]
    lines = eventually(lambda: (home / "kept").exists() and (home / "kept").read_text().splitlines(), "caffeinate", d.history)
    keeper, *words = lines[0].split()
    assert words == ["-i", "-w", str(pid)]
    assert d.mlxd("restart", "--supervisor").returncode == 0
    assert psutil.pid_exists(int(keeper)) and len((home / "kept").read_text().splitlines()) == 1
    os.kill(int(keeper), signal.SIGKILL)
    d.until("a note", lambda s: [note for note in s["notes"] if "may fall asleep" in note])
    assert d.ready()["supervisor"]["pid"] == pid


def test_where_there_is_no_caffeinate_the_status_says_so(daemon: Callable[..., Daemon], home: Path) -> None:
    d = daemon(MLXD_SUPERVISOR_KEEP_AWAKE="true", PATH=str(home))
    d.start()
    told = d.until("a note", lambda s: [note for note in s["notes"] if "may fall asleep" in note])
    assert told["state"] in ("starting", "ready")
