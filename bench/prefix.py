"""The second turn of a long conversation: how much sooner its first token comes than that of the first turn.

    python bench/prefix.py --words 750 --rounds 5

Each round is a conversation of its own, of some 2,000 tokens, with a model of 20 M parameters (`tools/make_bench_model.py --size medium`); the
second turn repeats it, with the answer and one more short question. What the prefix cache supplied is as the server counts it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from daemon import daemon

sys.path[:0] = [str(Path(__file__).parent.parent / "tools")]

from make_bench_model import made_up_text, make  # noqa: E402


def turn(port: int, messages: list[dict[str, str]]) -> tuple[float, str, dict[str, Any]]:
    """Seconds to the first text, the text, and the usage."""
    body = {"model": "medium", "messages": messages, "stream": True, "temperature": 0, "max_tokens": 8}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    begun, first, text, usage = time.perf_counter(), 0.0, "", {}
    connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream_options": {"include_usage": True}}))
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        data = line.strip().removeprefix(b"data: ")
        if not data.startswith(b"{"):
            continue
        told = json.loads(data)
        usage = told.get("usage") or usage
        for choice in told["choices"]:
            if piece := choice["delta"].get("content"):
                first = first or time.perf_counter() - begun
                text += piece
    connection.close()
    return first, text, usage


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--words", type=int, default=750)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlxd-models-") as models:
        make(Path(models) / "medium", "medium")
        with daemon(models, preload="medium") as one:
            one.command("start")
            port = one.status()["port"]
            turn(port, [{"role": "user", "content": "warm up"}])
            ratios = []
            for number in range(args.rounds):
                words = " ".join(made_up_text(1000 + number, lines=args.words // 14 + 1))
                messages = [{"role": "user", "content": words}]
                first, said, usage = turn(port, messages)
                messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "go on"}]
                second, _, again = turn(port, messages)
                cached = again["prompt_tokens_details"]["cached_tokens"]
                ratios.append(second / first)
                print(
                    f"{usage['prompt_tokens']} tokens: first turn {1000 * first:.0f} ms, second {1000 * second:.0f} ms "
                    f"({cached} of {again['prompt_tokens']} tokens from the cache), ratio {second / first:.3f}",
                    flush=True,
                )
    print(f"median ratio {statistics.median(ratios):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
