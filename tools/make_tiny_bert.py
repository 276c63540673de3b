"""Make a BERT with random weights, to test embeddings with: what it says of a text means nothing, but it depends on all of it.

    python tools/make_tiny_bert.py OUT

With a WordPiece tokenizer for English letters and a few words, a context of 64 tokens and vectors of 32 numbers; some 100 kB. Weights are
named as Hugging Face names them, and the same seed gives the same files.
"""

from __future__ import annotations

import argparse
import json
import string
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "server", "supervisor", "engine", "process", "request", "model", "own", "##s", "one", "every"]
VOCABULARY = [
    *MARKS,
    *WORDS,
    *string.ascii_lowercase,
    *(f"##{c}" for c in string.ascii_lowercase),
    *string.digits,
    *string.punctuation,
]
CONTEXT_TOKENS = 64
SHAPE: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": len(dict.fromkeys(VOCABULARY)),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": CONTEXT_TOKENS,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}


def make_tokenizer() -> Tokenizer:
    ids = {token: number for number, token in enumerate(dict.fromkeys(VOCABULARY))}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    tokenizer.add_special_tokens(MARKS)
    return tokenizer


def make_weights(shape: dict[str, Any], seed: int) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    draw = np.random.default_rng(seed)
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    weights: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}

    def put(name: str, *size: int, around: float = 0.0) -> None:
        weights[name] = (around + 0.3 * draw.standard_normal(size)).astype(np.float32)

    def put_linear(name: str, rows: int, columns: int) -> None:
        put(f"{name}.weight", rows, columns)
        put(f"{name}.bias", rows)

    def put_norm(name: str) -> None:
        put(f"{name}.weight", width, around=1.0)
        put(f"{name}.bias", width)

    put("embeddings.word_embeddings.weight", shape["vocab_size"], width)
    put("embeddings.position_embeddings.weight", shape["max_position_embeddings"], width)
    put("embeddings.token_type_embeddings.weight", shape["type_vocab_size"], width)
    put_norm("embeddings.LayerNorm")
    for number in range(shape["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        for part in ("query", "key", "value"):
            put_linear(f"{layer}.attention.self.{part}", width, width)
        put_linear(f"{layer}.attention.output.dense", width, width)
        put_norm(f"{layer}.attention.output.LayerNorm")
        put_linear(f"{layer}.intermediate.dense", inner, width)
        put_linear(f"{layer}.output.dense", width, inner)
        put_norm(f"{layer}.output.LayerNorm")
    put_linear("pooler.dense", width, width)  # as in the files of real ones; of no use here
    return weights


def make(out: Path, seed: int = 0, prefix: str = "", pooling: str | None = None, **changes: Any) -> Path:
    """Write a model directory and give it back. `prefix`: of the weights' names; `pooling`: of sentence-transformers' names, such as
    "cls_token"; `changes`: in config.json."""
    shape = SHAPE | changes
    out.mkdir(parents=True, exist_ok=True)
    weights = {prefix + name: mx.array(weight) for name, weight in make_weights(shape, seed).items()}
    mx.save_safetensors(str(out / "model.safetensors"), weights, metadata={"format": "pt"})
    write(out / "config.json", shape)
    tokenizer = make_tokenizer()
    tokenizer.enable_padding(length=CONTEXT_TOKENS)  # as the file of all-MiniLM-L6-v2 has it; whoever embeds must not obey
    tokenizer.enable_truncation(CONTEXT_TOKENS // 4)
    tokenizer.save(str(out / "tokenizer.json"))
    marks = {f"{mark.strip('[]').lower()}_token": mark for mark in MARKS}
    write(out / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "model_max_length": CONTEXT_TOKENS} | marks)
    if pooling is not None:
        kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
        write(out / "modules.json", modules)
        (out / "1_Pooling").mkdir(exist_ok=True)
        write(
            out / "1_Pooling" / "config.json", {"word_embedding_dimension": shape["hidden_size"], f"pooling_mode_{pooling}": True}
        )
    return out


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    made = make(args.out, args.seed)
    print(f"{made}: {sum(file.stat().st_size for file in made.iterdir()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
