"""Make a chat model with random weights, to measure speed with: nothing it says means anything.

    python tools/make_bench_model.py OUT --size small     # 0.25 M parameters: the server's own cost shows
    python tools/make_bench_model.py OUT --size medium    # 20 M parameters: the model's cost shows
    python tools/make_bench_model.py OUT --size large     # 50 M parameters, 200 MB: its memory shows

A Llama in float32 with a byte-level BPE tokenizer trained here on made-up words; the same seed gives the same files.

At temperature 0 every answer has exactly as many tokens as were asked for, and every token carries visible text: in the output
layer the rows of all tokens that are not plain letters, the end token among them, are zero, so that their logits are 0 while one
of the hundreds of others is always greater.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SIZES: dict[str, dict[str, int]] = {
    "small": {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "medium": {
        "vocab_size": 4096,
        "hidden_size": 384,
        "num_hidden_layers": 10,
        "intermediate_size": 1024,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
    "large": {
        "vocab_size": 4096,
        "hidden_size": 768,
        "num_hidden_layers": 6,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
}
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONTEXT_TOKENS = 4096
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def made_up_text(seed: int, lines: int = 4000) -> list[str]:
    """Lines of pronounceable words, common ones often, as in a language."""
    draw = random.Random(seed)
    syllables = [c + v + e for c in "bcdfghjklmnprstvwz" for v in "aeiou" for e in ("", "n", "r", "s")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(6000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    return [" ".join(draw.choices(words, weights, k=14)) for _ in range(lines)]


def make_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(mark, normalized=False, special=True) for mark in MARKS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(made_up_text(seed), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise SystemExit(f"the text gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    return tokenizer


def is_letters(token: str) -> bool:
    """`token` as the vocabulary writes it: a word's first token begins with Ġ, the byte-level name of the space."""
    word = token.removeprefix("Ġ")
    return word.isascii() and word.isalpha()


def make(out: Path, size: str, seed: int = 0) -> int:
    """Writes an MLX model directory; gives its number of parameters."""
    sizes = SIZES[size]
    settings: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **sizes,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT_TOKENS,
        "tie_word_embeddings": False,
        "bos_token_id": MARKS.index("<|endoftext|>"),
        "eos_token_id": MARKS.index("<|im_end|>"),
    }
    tokenizer = make_tokenizer(sizes["vocab_size"], seed)
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(settings))
    vocabulary = tokenizer.get_vocab()
    spoken = [0.0] * sizes["vocab_size"]
    for token, number in vocabulary.items():
        spoken[number] = float(is_letters(token))
    model.lm_head.weight = model.lm_head.weight * mx.array(spoken)[:, None]
    weights = {name: array.astype(mx.float32) for name, array in tree_flatten(model.parameters())}

    out.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(out / "model.safetensors"), weights, metadata={"format": "mlx"})
    (out / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_TOKENS,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_settings, indent=1) + "\n")
    return sum(array.size for array in weights.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    parameters = make(args.out, args.size, args.seed)
    print(f"{args.out}: {parameters / 1e6:.2f} M parameters, {sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
