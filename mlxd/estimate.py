"""What a model will take of memory, by its config.json: before it is loaded, so that it need not be tried.

Pure: no files, no MLX. An engine that has loaded the model measures what its caches really take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]

#: What a request is sure to need: with room for fewer tokens than this a model is of no use, and is not loaded.
LEAST_CONTEXT = 2048
#: Prompt tokens of a step (`engine.prefill_tokens` unless set).
USUAL_STEP = 512


def kv_bytes_per_token(config: Config) -> int:
    """Of one sequence: layers x KV heads x head dimension x 2 x bytes of a number. Only layers that look at all tokens count: the others'
    caches stop growing. 0: its cache does not grow, or the config does not say."""
    text = nested(config)
    layers = full_layers(text)
    if rank := number(text, "kv_lora_rank"):  # a compressed key and value for all heads together (MLA)
        return layers * (rank + number(text, "qk_rope_head_dim")) * number_bytes(config)
    heads = number(text, "num_attention_heads", "n_head", "n_heads")
    kv_heads = number(text, "num_key_value_heads") or heads
    head_dim = number(text, "head_dim") or (number(text, "hidden_size", "n_embd", "d_model") // heads if heads else 0)
    return layers * kv_heads * head_dim * 2 * number_bytes(config)


def prefill_bytes(config: Config, tokens: int) -> int:
    """What a step of so many prompt tokens takes at its widest: a layer's hidden states, the two halves of its feed-forward part, and the
    logits of one token in float32, of which a draw makes four copies."""
    text = nested(config)
    hidden = number(text, "hidden_size", "n_embd", "d_model")
    inner = number(text, "intermediate_size", "n_inner") or 4 * hidden
    return tokens * (4 * hidden + 2 * inner) * number_bytes(config) + 16 * number(text, "vocab_size")


def gigabytes(count: float) -> str:
    """As a refusal has it: small models differ in the second digit."""
    return f"{max(0, count) / 1e9:.2f} GB"


def full_layers(text: Config) -> int:
    """Layers with attention to all tokens."""
    layers = number(text, "num_hidden_layers", "n_layer", "n_layers")
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        return sum(kind == "full_attention" for kind in kinds)
    every = number(text, "full_attention_interval", "sliding_window_pattern") or 1
    return -(-layers // every)


def number_bytes(config: Config) -> int:
    """Of a number that the model computes with."""
    said = {str(part.get(key)) for part in (config, nested(config)) for key in ("torch_dtype", "dtype")}
    return 4 if "float32" in said else 2


def nested(config: Config) -> Config:
    """Of models that see or hear, the part about text."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def number(config: Config, *keys: str) -> int:
    """The first of these that is a positive whole number, at most a million; else 0."""
    found = (config.get(key) for key in keys)
    return next((value for value in found if type(value) is int and 0 < value <= 1_000_000), 0)
