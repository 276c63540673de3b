"""The benchmark's own parts work; its figures are in bench/README.md and are asserted nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SPEAK = """
import sys
from mlx_lm import load, stream_generate
model, tokenizer = load(sys.argv[1])
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
pieces = [piece.text for piece in stream_generate(model, tokenizer, prompt, max_tokens=100)]
print(len(pieces), sum(map(bool, pieces)))
"""


def python(*words: str | Path, timeout_s: float = 200) -> str:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.full
def test_the_bench_model_is_the_same_each_time_and_speaks_as_long_as_asked(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert "0.25 M parameters" in python(ROOT / "tools" / "make_bench_model.py", tmp_path / name, "--size", "small")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    assert python("-c", SPEAK, tmp_path / "one") == "100 100\n"


@pytest.mark.full
def test_the_benchmarks_run_to_their_end() -> None:
    table = python(ROOT / "bench" / "throughput.py", "--streams", "1,2", "--tokens", "16", "--rounds", "1")
    assert all(f" {name} " in table for name in ("bare", "mlx_lm.server", "mlxd"))
    assert "idle supervisor" in python(ROOT / "bench" / "startup.py", "--runs", "1", "--idle", "1")


def test_recovery_loses_nothing_and_says_so() -> None:
    table = python(ROOT / "bench" / "recovery.py", "--kills", "2", "--clients", "2", "--signals", "KILL,SEGV", "--seed", "1")
    assert "failed 0  refused 0  wrong 0" in table and "replaced 2" in table


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.full)])
def test_a_killed_supervisor_is_recovered_without_orphans(kills: int) -> None:
    told = python(ROOT / "bench" / "recovery.py", "--supervisor", "--kills", str(kills), timeout_s=60 * kills)
    assert (
        f"kills of the supervisor {kills}  orphans 0  failed recoveries 0  torn state files 0" in told and "next 200: p50" in told
    )


def test_a_short_soak_answers_everything_as_it_should_be() -> None:
    table = python(ROOT / "bench" / "soak.py", "--requests", "80")
    assert "      80      0 " in table


@pytest.mark.full
def test_restarts_under_load_are_noticed_by_nobody() -> None:
    told = python(ROOT / "bench" / "handover.py", "--clients", "4", "--server", "3", "--supervisor", "2")
    assert "refused 0  reset 0  lost 0  wrong 0" in told
