"""How long `mlxd start` takes to be ready, `mlxd status` to answer, and what an idle daemon costs.

python bench/startup.py --runs 5 --idle 20
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
from daemon import Daemon, daemon, memory_line


def wake_ups(pid: int) -> int:
    """How often the process began to run again after it slept, over all its threads; Linux only."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
    return total


def seconds_of(one: Daemon, *words: str) -> float:
    begun = time.perf_counter()
    one.command(*words)
    return time.perf_counter() - begun


def spread(values: list[float], scale: float, unit: str, digits: int) -> str:
    low, high = min(values) * scale, max(values) * scale
    return f"p50 {statistics.median(values) * scale:.{digits}f} {unit} ({low:.{digits}f}-{high:.{digits}f}, {len(values)} runs)"


def idle(pids: dict[str, int], seconds: float) -> None:
    cpu = {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in pids.items()}
    wakes = {name: wake_ups(pid) for name, pid in pids.items()} if sys.platform == "linux" else {}
    time.sleep(seconds)
    for name, pid in pids.items():
        used = sum(psutil.Process(pid).cpu_times()[:2]) - cpu[name]
        words = f"idle {name}: {used / seconds * 100:.2f} % of a core"
        if wakes:
            words += f", {(wake_ups(pid) - wakes[name]) / seconds:.1f} wake-ups/s"
        print(f"{words} (over {seconds:.0f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--idle", type=float, default=20, help="seconds to watch it idle")
    args = parser.parse_args()

    starts, stops, answers = [], [], []
    with daemon() as one:
        print(f"built-in model, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before")
        one.command("start")  # the first start after an install writes byte code
        one.command("stop")
        for number in range(args.runs):
            if number:
                stops.append(seconds_of(one, "stop"))
            starts.append(seconds_of(one, "start"))
            answers += [seconds_of(one, "status") for _ in range(5)]
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        bare = time.perf_counter() - begun
        print(f"mlxd start until ready: {spread(starts, 1, 's', 2)}")
        print(f"mlxd status: {spread(answers, 1000, 'ms', 0)}; an empty Python takes {bare * 1000:.0f} ms")
        if stops:
            print(f"mlxd stop: {spread(stops, 1, 's', 2)}")
        pids = one.processes()
        time.sleep(5)
        print(f"resident, idle: {memory_line(pids)}")
        idle(pids, args.idle)


if __name__ == "__main__":
    main()
