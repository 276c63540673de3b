"""Encoders of the BERT family (BERT, RoBERTa, XLM-R): what each token of a text means beside all the others.

Owns their architecture and the names of their weights; mlx-lm has none of them. Knows nothing of texts or of pooling.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
from mlx import nn
from msgspec import Struct

from mlxd.modelfiles import Broken

ACTIVATIONS = {"gelu": nn.gelu, "gelu_new": nn.gelu_approx, "gelu_pytorch_tanh": nn.gelu_approx, "relu": nn.relu, "silu": nn.silu}
#: Hugging Face's names of the weights and ours, in the order in which they are replaced.
NAMES = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "types",
    "embeddings.LayerNorm": "norm",
    "encoder.layer.": "layers.",
    "attention.self.": "",
    "attention.output.dense": "mix",
    "attention.output.LayerNorm": "mix_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "down_norm",
    ".gamma": ".weight",  # of checkpoints from TensorFlow
    ".beta": ".bias",
}


class Shape(Struct, frozen=True):
    """What config.json says; the defaults are Hugging Face's."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    pad_token_id: int = 1

    @property
    def first_position(self) -> int:
        """RoBERTa and its kind count positions from the one after the padding token's number."""
        return 0 if self.model_type == "bert" else self.pad_token_id + 1


class Layer(nn.Module):  # type: ignore[misc]
    def __init__(self, shape: Shape):
        super().__init__()
        width, inner, eps = shape.hidden_size, shape.intermediate_size, shape.layer_norm_eps
        self.heads = shape.num_attention_heads
        self.activation = ACTIVATIONS[shape.hidden_act]
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.mix = nn.Linear(width, width)
        self.mix_norm = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.down_norm = nn.LayerNorm(width, eps=eps)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        rows, length, width = x.shape
        head = width // self.heads
        q, k, v = (part(x).reshape(rows, length, self.heads, head).swapaxes(1, 2) for part in (self.query, self.key, self.value))
        mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=head**-0.5, mask=mask)
        x = self.mix_norm(x + self.mix(mixed.swapaxes(1, 2).reshape(rows, length, width)))
        return self.down_norm(x + self.down(self.activation(self.up(x))))  # type: ignore[no-any-return]


class Encoder(nn.Module):  # type: ignore[misc]
    """`context_length`: how many tokens it can read."""

    def __init__(self, shape: Shape):
        super().__init__()
        width = shape.hidden_size
        self.first_position = shape.first_position
        self.context_length = shape.max_position_embeddings - shape.first_position
        self.words = nn.Embedding(shape.vocab_size, width)
        self.positions = nn.Embedding(shape.max_position_embeddings, width)
        self.types = nn.Embedding(shape.type_vocab_size, width)
        self.norm = nn.LayerNorm(width, eps=shape.layer_norm_eps)
        self.layers = [Layer(shape) for _ in range(shape.num_hidden_layers)]

    def __call__(self, ids: mx.array, lengths: mx.array) -> mx.array:
        """(rows, width) tokens, of which only the first `lengths` (rows,) of each row count, to (rows, width, hidden size) states."""
        at = mx.arange(ids.shape[1])
        x = self.words(ids) + self.positions(at + self.first_position) + self.types(mx.array(0))
        x = self.norm(x)
        mask = (at < lengths[:, None])[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return x  # type: ignore[no-any-return]


def load(view: Path, config: dict[str, Any]) -> Encoder:
    """The encoder in `view`; its weights are not read yet. Raises Broken, and what MLX raises on weights that do not fit."""
    try:
        shape = msgspec.convert(config, Shape)
    except msgspec.ValidationError as error:
        raise Broken(f"config.json: {error}") from None
    if shape.hidden_act not in ACTIVATIONS:
        raise Broken(f"config.json has hidden_act {shape.hidden_act!r}; mlxd knows {', '.join(ACTIVATIONS)}")
    if shape.position_embedding_type != "absolute":
        raise Broken(f"config.json has position_embedding_type {shape.position_embedding_type!r}; mlxd knows absolute ones only")
    encoder = Encoder(shape)
    weights = {
        ours: weight
        for file in sorted(view.glob("*.safetensors"))
        for theirs, weight in mx.load(str(file)).items()  # type: ignore[union-attr]
        if (ours := our_name(theirs)) is not None
    }
    if quantized := config.get("quantization"):
        nn.quantize(
            encoder,
            group_size=quantized["group_size"],
            bits=quantized["bits"],
            class_predicate=lambda path, module: f"{path}.scales" in weights,
        )
    encoder.load_weights(list(weights.items()))
    return encoder


def our_name(theirs: str) -> str | None:
    """None: no part of the encoder, such as the head that it was trained with."""
    name = re.sub(r"^(bert|roberta)\.", "", theirs)
    if not name.startswith(("embeddings.", "encoder.layer.")) or name.endswith(".position_ids"):
        return None
    for part, ours in NAMES.items():
        name = name.replace(part, ours)
    return name
