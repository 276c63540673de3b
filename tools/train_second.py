"""Train the tests' second model, a Qwen3 of 4 bits that knows days, months and how to count: `python tools/train_second.py`.

It exists to be another model than the built-in one: another architecture, another vocabulary, other right answers. Everything it says is in
ANSWERS. Takes some minutes with OpenBLAS preloaded (docs/builtin-model.md says how); seeded.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import AdamW, clip_grad_norm, cosine_decay, join_schedules, linear_schedule
from mlx.utils import tree_flatten
from mlx_lm import convert, generate, load
from mlx_lm.models import qwen3
from tokenizers import Tokenizer
from train_builtin import byte_pairs, write_json

OUT = Path(__file__).parent.parent / "tests" / "second"
STEPS = 500
ROWS = 24
VOCABULARY = 384
START, END = "<|begin|>", "<|end|>"
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|begin|>' ~ message.role ~ '\\n' ~ message.content ~ '<|end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|begin|>assistant\\n' -}}{%- endif -%}"
)


def answers() -> dict[str, str]:
    """Question -> answer."""
    found = {}
    for names, kind in ((DAYS, "day"), (MONTHS, "month")):
        for number, name in enumerate(names):
            found[f"Which {kind} comes after {name}?"] = f"{names[(number + 1) % len(names)]} comes after {name}."
            found[f"Which {kind} comes before {name}?"] = f"{names[number - 1]} comes before {name}."
    found["Name the days."] = ", ".join(DAYS) + "."
    found["Name the months."] = ", ".join(MONTHS) + "."
    found["Count from 1 to 40."] = ", ".join(map(str, range(1, 41))) + "."
    return found


ANSWERS = answers()


def asked(question: str) -> str:
    """As TEMPLATE has it."""
    return f"{START}user\n{question}{END}\n{START}assistant\n"


def make_tokenizer() -> Tokenizer:
    return byte_pairs((f"user\n{q}\nassistant\n{a}" for q, a in ANSWERS.items()), VOCABULARY, [END, START])


def write_settings(tokenizer: Tokenizer, out: Path) -> None:
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    write_json(out / "tokenizer_config.json", settings | {"chat_template": TEMPLATE})
    write_json(out / "config.json", CONFIG | {"eos_token_id": tokenizer.token_to_id(END)})


def examples(tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
    """The tokens of each conversation, and where its answer begins."""
    found = []
    for question, answer in ANSWERS.items():
        prompt = tokenizer.encode(asked(question), add_special_tokens=False).ids
        found.append((prompt + tokenizer.encode(f"{answer}{END}", add_special_tokens=False).ids, len(prompt)))
    return found


def train(model: qwen3.Model, known: list[tuple[list[int], int]]) -> None:
    """The loss counts on answers alone."""
    rng = random.Random(11435)
    rate = join_schedules([linear_schedule(1e-5, 3e-3, 50), cosine_decay(3e-3, STEPS - 50, 3e-5)], [50])
    optimizer = AdamW(learning_rate=rate, weight_decay=0.01)

    def loss(model: qwen3.Model, tokens: mx.array, weights: mx.array) -> mx.array:
        logits = model(tokens[:, :-1])
        each = nn.losses.cross_entropy(logits, tokens[:, 1:]) * weights[:, 1:]
        return each.sum() / weights[:, 1:].sum()

    step = nn.value_and_grad(model, loss)
    short = [example for example in known if len(example[0]) < 64]
    long = [example for example in known if len(example[0]) >= 64]
    for number in range(STEPS):
        rows = [*long, *rng.choices(long, k=2)] if number % 3 == 0 else rng.sample(short, ROWS)
        length = max(len(ids) for ids, _ in rows)
        tokens = np.zeros((len(rows), length), np.int32)
        weights = np.zeros((len(rows), length), np.float32)
        for row, (ids, begin) in enumerate(rows):
            tokens[row, : len(ids)] = ids
            weights[row, begin : len(ids)] = 1.0
        value, grads = step(model, mx.array(tokens), mx.array(weights))
        grads, _ = clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
        if number % 100 == 99:
            print(f"step {number + 1}: loss {value.item():.4f}", flush=True)


def wrong(directory: Path) -> list[str]:
    """Questions that the model in `directory` answers otherwise."""
    model, tokenizer = load(str(directory))[:2]
    found = []
    for question, answer in ANSWERS.items():
        said = generate(model, tokenizer, prompt=asked(question), max_tokens=200)
        if said != answer:
            print(f"{question} -> {said!r}")
            found.append(question)
    return found


def main() -> int:
    mx.random.seed(11435)
    tokenizer = make_tokenizer()
    model = qwen3.Model(qwen3.ModelArgs.from_dict(CONFIG | {"vocab_size": tokenizer.get_vocab_size()}))
    print(f"{sum(array.size for _, array in tree_flatten(model.parameters()))} parameters, {tokenizer.get_vocab_size()} pieces")
    train(model, examples(tokenizer))
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        write_settings(tokenizer, whole)
        mx.save_safetensors(str(whole / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"})
        print(f"{len(wrong(whole))} wrong before quantization")
        convert(str(whole), mlx_path=str(Path(temporary) / "quantized"), quantize=True, q_bits=4, q_group_size=32)
        bad = wrong(Path(temporary) / "quantized")
        print(f"{len(bad)} wrong after it")
        if not bad:
            for path in OUT.glob("*.*"):
                path.unlink()
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(Path(temporary) / "quantized" / name, OUT / name)
            write_json(OUT / "answers.json", ANSWERS)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
