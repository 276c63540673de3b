"""mlx-lm's BatchGenerator alone, in one process: no HTTP, no text, no queue. What any server over it could reach at most.

Loads the model given as the only argument and says {}; then reads and writes what client.py does, less port and model.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from mlx_lm import load
from mlx_lm.generate import BatchGenerator


def generate(model: Any, tokenizer: Any, run: dict[str, Any]) -> dict[str, Any]:
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        for prompt in run["prompts"]
    ]
    begun = time.perf_counter()
    first: dict[int, float] = {}
    tokens = 0
    generator = BatchGenerator(
        model,
        max_tokens=run["tokens"],
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=32,
        prefill_batch_size=32,
    )
    generator.insert(prompts)
    while answers := generator.next_generated():
        now = time.perf_counter()
        tokens += len(answers)
        for answer in answers:
            first.setdefault(answer.uid, now - begun)
    generator.close()
    return {
        "seconds": time.perf_counter() - begun,
        "ttft_s": list(first.values()),
        "tokens": tokens,
    }


def main() -> None:
    model, tokenizer = load(sys.argv[1])
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps(generate(model, tokenizer, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
