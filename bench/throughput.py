"""Tokens per second and time to first token (TTFT): mlxd beside mlx_lm.server and beside the bare BatchGenerator.

    python bench/throughput.py                        # the small model, 1, 8 and 32 streams, 5 rounds
    python bench/throughput.py --model medium --rounds 3
    python bench/throughput.py --model ~/mlx-models/some-model --streams 8

One run measures all three in turn, round by round, with the same model and the same prompts, greedy; so ratios mean something even
where the machine is busy with other things. Prompts are drawn anew for each round, so no cache helps. Ratios are taken within a
round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from daemon import daemon, memory_line

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tools"))

from make_bench_model import SIZES, made_up_text, make  # noqa: E402

#: Every server may run this many streams at once.
CONCURRENCY = 32


@dataclass
class Target:
    """One of the three: `run(prompts, tokens, constrained)` gives what client.py and bare.py give; `pids` by name."""

    run: Callable[[list[str], int, int], dict[str, Any]]
    pids: dict[str, int]

    def cpu_s(self) -> dict[str, float]:
        return {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in self.pids.items()}


class Helper:
    """bare.py or client.py: a JSON line in, a JSON line out."""

    def __init__(self, *words: str) -> None:
        self.name = words[0]
        self.process = subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} is gone (exit status {self.process.wait()})")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def ask(self, run: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(run) + "\n")
        self.process.stdin.flush()
        return self.read()


@contextlib.contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """The process, and no other, is ended on the way out."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for_http(url: str, process: subprocess.Popen[Any], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"mlx_lm.server ended with {process.returncode}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)  # not listening yet
        else:
            return
    raise SystemExit(f"{url} did not answer in {timeout_s:.0f} s")


def start_bare(stack: contextlib.ExitStack, model: Path) -> Target:
    bare = Helper(str(HERE / "bare.py"), str(model))
    stack.enter_context(ended(bare.process))
    bare.read()
    return Target(lambda prompts, tokens, _: bare.ask({"prompts": prompts, "tokens": tokens}), {"bare": bare.process.pid})


def served(client: Helper, port: int, model: str, pids: dict[str, int]) -> Target:
    def run(prompts: list[str], tokens: int, constrained: int) -> dict[str, Any]:
        return client.ask({"port": port, "model": model, "prompts": prompts, "tokens": tokens, "constrained": constrained})

    return Target(run, pids)


def start_mlx_lm(stack: contextlib.ExitStack, model: Path, client: Helper) -> Target:
    port = free_port()
    flags = ["--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--log-level", "WARNING", "--temp", "0"]
    flags += ["--decode-concurrency", str(CONCURRENCY), "--prompt-concurrency", str(CONCURRENCY)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_lm", "server", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    stack.enter_context(ended(process))
    wait_for_http(f"http://127.0.0.1:{port}/health", process)
    return served(client, port, "default_model", {"mlx_lm.server": process.pid})


def start_mlxd(stack: contextlib.ExitStack, model: Path, client: Helper) -> Target:
    one = stack.enter_context(daemon(str(model.parent), model.name))
    one.environ["MLX_MAX_CONCURRENT"] = str(CONCURRENCY)
    one.command("start")
    return served(client, one.status()["port"], model.name, one.processes())


def percentile(values: list[float], percent: float) -> float:
    """Nearest rank: of fewer than 100 values the 99th is the greatest."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def measure(
    targets: dict[str, Target], streams: list[int], tokens: int, words: int, rounds: int
) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """streams -> target -> one result per round. The order of the targets changes from round to round."""
    texts = iter(made_up_text(seed=1, lines=sum(streams) * (rounds + 1)))
    results: dict[int, dict[str, list[dict[str, Any]]]] = {n: {name: [] for name in targets} for n in streams}
    for number in range(rounds + 1):
        for n in streams:
            prompts = [" ".join(next(texts).split()[:words]) for _ in range(n)]
            names = list(targets)
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                before = targets[name].cpu_s()
                result = targets[name].run(prompts, tokens if number else 32, 0)
                result["cpu_s"] = {process: after - before[process] for process, after in targets[name].cpu_s().items()}
                expected = n * (tokens if number else 32)
                if result["tokens"] != expected:
                    raise SystemExit(f"{name} gave {result['tokens']} tokens where {expected} were asked for")
                if number:  # the first round warms up
                    results[n][name].append(result)
        if number:
            print(f"round {number} of {rounds} done", file=sys.stderr)
    return results


def ratio(mine: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """Tokens per second, mine over other's, the median over rounds: the tokens are the same, so seconds do."""
    return statistics.median(float(theirs["seconds"] / ours["seconds"]) for ours, theirs in zip(mine, other, strict=True))


def report(results: dict[int, dict[str, list[dict[str, Any]]]]) -> None:
    print(
        f"{'streams':>7}  {'':13}  {'tokens/s':>8} {'(min-max)':>13}  {'x bare':>6}  {'x mlx_lm':>8}  {'TTFT p50':>9}  {'p99':>9}  CPU ms/token"
    )
    for n, by_name in results.items():
        for name, rounds in by_name.items():
            rates = [one["tokens"] / one["seconds"] for one in rounds]
            ttft_ms = [1000 * ttft for one in rounds for ttft in one["ttft_s"]]
            spread = f"({min(rates):.0f}-{max(rates):.0f})"
            cpu_ms = statistics.median(1000 * sum(one["cpu_s"].values()) / one["tokens"] for one in rounds)
            ratios = [
                f"{ratio(rounds, by_name[other]):.2f}" if other in by_name and other != name else ""
                for other in ("bare", "mlx_lm.server")
            ]
            print(
                f"{n:7}  {name:13}  {statistics.median(rates):8.0f} {spread:>13}  {ratios[0]:>6}  {ratios[1]:>8}"
                f"  {percentile(ttft_ms, 50):6.0f} ms  {percentile(ttft_ms, 99):6.0f} ms  {cpu_ms:12.2f}"
            )


def report_server(results: dict[int, dict[str, list[dict[str, Any]]]]) -> None:
    """What mlxd's server, which makes HTTP of tokens, takes for each."""
    for n, by_name in results.items():
        spent_us = [1e6 * one["cpu_s"]["server"] / one["tokens"] for one in by_name.get("mlxd", [])]
        if spent_us:
            print(
                f"{n:7}  mlxd's server: {statistics.median(spent_us):.0f} us of CPU per token ({min(spent_us):.0f}-{max(spent_us):.0f})"
            )


def report_constrained(mlxd: Target, n: int, tokens: int, words: int, rounds: int) -> None:
    """The speed that free streams keep when a quarter of the streams beside them must follow a JSON schema: pairs of runs with the same
    prompts, one after the other, the order changing."""
    texts = iter(made_up_text(seed=2, lines=n * (rounds + 1)))
    constrained, kept, own = max(1, n // 4), [], []
    for number in range(rounds + 1):
        prompts = [" ".join(next(texts).split()[:words]) for _ in range(n)]
        seconds: dict[int, list[float]] = {}
        for some in (0, constrained) if number % 2 else (constrained, 0):
            seconds[some] = mlxd.run(prompts, tokens if number else 32, some)["stream_s"]
        if number:  # the first round warms up
            free, beside = statistics.mean(seconds[0][constrained:]), statistics.mean(seconds[constrained][constrained:])
            kept.append(free / beside)
            own.append(statistics.mean(seconds[0][:constrained]) / statistics.mean(seconds[constrained][:constrained]))
    print(
        f"{n:7}  mlxd, {constrained} of them constrained by a JSON schema: the free ones keep {statistics.median(kept):.2f}"
        f" ({min(kept):.2f}-{max(kept):.2f}) of their speed, the constrained ones have {statistics.median(own):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="small", help="small, medium (made here, random weights) or a model directory")
    parser.add_argument("--streams", default="1,8,32", help="how many at once, a comma list")
    parser.add_argument("--tokens", type=int, default=256, help="for each stream")
    parser.add_argument("--words", type=int, default=4, help="in each prompt, 14 at most; a word is 1 to 4 tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--who", default="bare,mlx_lm.server,mlxd", help="what to measure, a comma list")
    args = parser.parse_args()
    streams = [int(word) for word in args.streams.split(",")]
    who = args.who.split(",")

    with contextlib.ExitStack() as stack:
        if args.model in SIZES:
            model = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlxd-bench-"))) / f"bench-{args.model}"
            make(model, args.model)
        else:
            model = Path(args.model).expanduser().resolve()
        client = Helper(str(HERE / "client.py"))
        stack.enter_context(ended(client.process))
        targets: dict[str, Target] = {}
        if "bare" in who:
            targets["bare"] = start_bare(stack, model)
        if "mlx_lm.server" in who:
            targets["mlx_lm.server"] = start_mlx_lm(stack, model, client)
        if "mlxd" in who:
            targets["mlxd"] = start_mlxd(stack, model, client)
        print(
            f"model {model.name}, prompts of {args.words} words, {args.tokens} tokens a stream, greedy, {args.rounds} rounds;"
            f" {platform.system()} {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before"
        )
        before = {name: memory_line(target.pids) for name, target in targets.items()}
        results = measure(targets, streams, args.tokens, args.words, args.rounds)
        report(results)
        report_server(results)
        if "mlxd" in targets:
            report_constrained(targets["mlxd"], max(streams), args.tokens, args.words, args.rounds)
        for name, target in targets.items():
            print(f"resident before  {before[name]}\nresident after   {memory_line(target.pids)}")


if __name__ == "__main__":
    main()
