"""The supervisor with real children that misbehave on request, real signals, real files. F-numbers name the fault."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from conftest import Daemon

Make = Callable[..., Daemon]


def test_a_daemon_starts_its_children_and_stops_them(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    told = d.ready()
    assert told["server"]["state"] == "ready"
    assert [(e["slot"], e["model"], e["state"]) for e in told["engines"]] == [(1, "a:latest", "ready")]
    assert d.paths.pid_file.read_text() == f"{told['supervisor']['pid']}\n"
    os.kill(told["supervisor"]["pid"], signal.SIGTERM)
    assert d.processes[0].wait(60) == 0
    assert not d.paths.pid_file.exists()
    assert not d.ours()
