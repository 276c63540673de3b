"""Something else in the place of a file of ours (SEC-30): no link is followed, no number believed, and what is in the way is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Daemon
from server_client import supervised

from mlxd import leftovers

Make = Callable[..., Daemon]

#: What the supervisor replaces or works without.
REPLACED = ["mlxd.pid", "state.json", "exits.jsonl", "loading.json", "run/control.sock"]
NUMBERS = ["-1", "0", "1", "99999999999999999999", "4194304"]


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that must not be signalled."""
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield process
    assert process.poll() is None, "the stranger was signalled"
    process.kill()
    process.wait()


@pytest.fixture
def victim(home: Path) -> Iterator[Path]:
    """A file that must not be touched."""
    file = home / "victim"
    file.write_text("untouched")
    before = file.stat()
    yield file
    after = file.stat()
    assert file.read_text() == "untouched" and (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def put(kind: str, path: Path, victim: Path) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "dangling link":
        path.symlink_to(victim.with_name("never-made"))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
        (path / "kept").write_text("")
    elif kind == "foreign file":
        if os.getuid() != 0:
            pytest.skip("only root can give a file away")
        path.write_text("{}")
        os.chown(path, 65534, -1)
    else:
        path.write_text(f"{kind}\n")


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "directory", "foreign file", *NUMBERS[:4]])
def test_sec_30_a_start_works_whatever_is_in_the_place_of_a_state_file(daemon: Make, home: Path, victim: Path, kind: str) -> None:
    for name in REPLACED:
        if (name, kind) != ("run/control.sock", "directory"):
            put(kind, home / name, victim)
    put(kind, home / "aliases.json", victim)
    d = daemon()
    assert d.mlxd("status").returncode == 3
    d.start()
    d.ready()
    assert d.mlxd("stop").returncode == 0 and d.processes[0].wait(60) == 0
    assert b"Traceback" not in d.processes[0].communicate()[1] and "Traceback" not in d.log()
    assert not victim.with_name("never-made").exists()
    assert kind == "directory" or not (home / "mlxd.pid").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mlxd.lock", kind) for kind in ("link", "fifo", "directory", "foreign file")]
    + [("token", kind) for kind in ("link", "fifo", "directory", "foreign file", *NUMBERS[:2])]
    + [("run/control.sock", "directory")],
)
def test_sec_30_what_cannot_be_replaced_is_exit_78_with_what_to_do(
    daemon: Make, home: Path, victim: Path, name: str, kind: str
) -> None:
    put(kind, home / name, victim)
    d = daemon()
    ran = d.mlxd("run")
    assert ran.returncode == 78 and ran.stderr.startswith("Error: ") and ran.stderr.count("\n") == 1, ran
    assert str(home / name) in ran.stderr and ("remove" in ran.stderr or "line 1" in ran.stderr or "chmod" in ran.stderr)
    assert not (home / "mlxd.pid").exists()


def test_a_lease_that_cannot_be_locked_is_held_and_named(daemon: Make, home: Path, victim: Path) -> None:
    put("link", home / "run" / "lease", victim)
    d = daemon()
    d.start()
    told = d.until("held", lambda s: s["state"] == "held")
    assert f"cannot open {home}/run/lease" in told["reason"]
    (home / "run" / "lease").unlink()
    d.ready()


def test_sec_30_numbers_in_the_state_file_are_signalled_to_nobody(
    daemon: Make, home: Path, stranger: subprocess.Popen[bytes]
) -> None:
    pids = [-1, 0, 1, os.getpid(), os.getppid(), stranger.pid, 2**31, 2**62]
    left = [
        {"pid": p, "identity": leftovers.start_identity(p) if 0 < p < 2**22 else 0.0, "nonce": "x", "name": "server"} for p in pids
    ]
    (home / "state.json").write_text(json.dumps({"boot": leftovers.boot_id(), "children": left}))
    (home / "mlxd.pid").write_text(f"{stranger.pid}\n")
    d = daemon()
    d.start()
    d.ready()
    assert "of an earlier run" not in d.log()
    os.kill(d.status()["supervisor"]["pid"], signal.SIGTERM)
    assert d.processes[0].wait(60) == 0


def test_sec_30_aliases_are_not_read_through_what_is_in_their_place(home: Path, victim: Path) -> None:
    file = home / "aliases.json"
    with supervised(home) as server, server.client() as client:
        for kind in ["link", "dangling link", "fifo", "directory", *NUMBERS] + (["foreign file"] if os.getuid() == 0 else []):
            put(kind, file, victim)
            assert {model["name"] for model in client.get("/api/tags").json()["models"]} == {"tiny:latest", "mlxd-tiny:latest"}, (
                kind
            )
            refused = client.post("/api/copy", json={"source": "tiny", "destination": "other"})
            assert refused.status_code == 500 and "mend or remove it" in refused.json()["error"], kind
            shutil.rmtree(file) if kind == "directory" else file.unlink()
    assert not victim.with_name("never-made").exists()
