"""A daemon of its own for a benchmark: private state, any free port, ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from mlxd import control, paths

MLXD = str(Path(sys.executable).with_name("mlxd"))


class Daemon:
    def __init__(self, home: str, models_dir: str, preload: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_", "MLXD_", "OLLAMA_"))}
        self.environ = {
            **inherited,
            "MLXD_HOME": home,
            "MLX_API_PORT": "0",
            "MLX_MODELS_DIR": models_dir,
            "MLX_PRELOAD_MODELS": preload,
        }

    def command(self, *words: str) -> str:
        done = subprocess.run([MLXD, *words], env=self.environ, capture_output=True, text=True, timeout=300)
        if done.returncode != 0:
            raise SystemExit(f"mlxd {' '.join(words)} ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def status(self) -> dict[str, Any]:
        status = json.loads(self.command("status", "--json"))
        assert isinstance(status, dict)
        return status

    def engine(self) -> int | None:
        """The PID of the engine that has a model, when it is ready. Asked directly: a command would take a core for 80 ms."""
        engines = control.ask(paths.locate(self.environ).control, "status", timeout_s=60)["engines"]
        return next((int(e["pid"]) for e in engines if e["model"] and e["state"] == "ready"), None)

    def processes(self) -> dict[str, int]:
        """Name -> PID; an engine without a model is a `spare`."""
        status = self.status()
        pids = {"supervisor": status["supervisor"]["pid"], "server": status["server"]["pid"]}
        for engine in status["engines"]:
            pids["engine" if engine["model"] else "spare"] = engine["pid"]
        return pids


@contextlib.contextmanager
def daemon(models_dir: str = "", preload: str = "mlxd-tiny") -> Iterator[Daemon]:
    """Not started yet; stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="mlxd-bench-") as home:
        one = Daemon(home, models_dir or home, preload)
        try:
            yield one
        finally:
            one.command("stop")


def resident_mb(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss / 1e6)


def memory_line(pids: dict[str, int]) -> str:
    """`supervisor 30 MB  server 60 MB  engine 90 MB  together 180 MB`: resident, without a spare in the sum."""
    sizes = {name: resident_mb(pid) for name, pid in pids.items()}
    words = [f"{name} {size:.0f} MB" for name, size in sizes.items()]
    if len(sizes) > 1:
        words.append(f"together {sum(size for name, size in sizes.items() if name != 'spare'):.0f} MB")
    return "  ".join(words)
