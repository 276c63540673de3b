"""What loading and unloading a model leaves behind: resident memory before, with the model, and after, again and again.

    python bench/memory.py --cycles 20

A model of 200 MB (`tools/make_bench_model.py --size large`) is loaded by a request, answers with some tokens, and is unloaded. Its memory is
back when its process has ended. Exit status 1: the engine's process did not end, or the server gained more than 2 MB in all after the first
cycle.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import psutil
from asking import Question, ask
from daemon import Daemon, daemon, resident_mb

sys.path[:0] = [str(Path(__file__).parent.parent / "tools")]

from make_bench_model import make  # noqa: E402

from mlxd import probe  # noqa: E402

MOST_GAINED_MB = 2.0
PATIENCE_S = 60.0


def together(one: Daemon) -> dict[str, float]:
    """Resident MB by name."""
    return {name: resident_mb(pid) for name, pid in one.processes().items()}


def unload(one: Daemon, port: int) -> None:
    """Raises SystemExit when its process lives on."""
    pid = one.engine()
    assert pid is not None
    told = probe.fetch(f"http://127.0.0.1:{port}/api/generate", PATIENCE_S, b'{"model": "large", "keep_alive": 0}')
    assert told.json["done_reason"] == "unload", told
    deadline = time.monotonic() + PATIENCE_S
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    if psutil.pid_exists(pid):
        raise SystemExit(f"the engine, pid {pid}, still runs {PATIENCE_S:g} s after its model was unloaded")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cycles", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlxd-models-") as models:
        made = make(Path(models) / "large", "large")
        print(f"a model of {made / 1e6:.0f} M parameters, {4 * made / 1e6:.0f} MB; MB resident")
        print(f"{'cycle':>5}  {'engine':>7}  {'server':>7}  {'supervisor':>10}  {'after: server':>13}  {'supervisor':>10}")
        with daemon(models, preload="") as one:
            one.command("start")
            port = one.status()["port"]
            before = together(one)
            print(f"{'-':>5}  {'-':>7}  {before['server']:7.1f}  {before['supervisor']:10.1f}")
            afters = []
            for cycle in range(1, args.cycles + 1):
                answer = ask(port, Question("Hello", model="large", tokens=16, stream=False))
                assert answer.outcome == "answered", answer.why
                during = together(one)
                unload(one, port)
                after = together(one)
                afters.append(after)
                print(
                    f"{cycle:5}  {during['engine']:7.1f}  {during['server']:7.1f}  {during['supervisor']:10.1f}  "
                    f"{after['server']:13.1f}  {after['supervisor']:10.1f}",
                    flush=True,
                )
    gained = afters[-1]["server"] - afters[0]["server"]
    print(
        f"after the first cycle: server {gained:+.1f} MB, supervisor {afters[-1]['supervisor'] - afters[0]['supervisor']:+.1f} MB"
    )
    return 1 if gained > MOST_GAINED_MB else 0


if __name__ == "__main__":
    sys.exit(main())
