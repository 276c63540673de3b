"""Train mlxd-tiny, the built-in model: `python tools/train_builtin.py --steps 7000 --out DIR`, then `--check`.

Owns the tokenizer, the chat template, the shape of the model and its training; the words are in `tools/corpus`.
The result is a directory that `mlx_lm.load` reads: the float32 weights of a Llama. What is drawn at random is seeded.
A step takes 0.3 s with OpenBLAS preloaded (docs/builtin-model.md says how) and 3 s without.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import corpus
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from corpus import known
from mlx.optimizers import AdamW, clip_grad_norm, cosine_decay, join_schedules, linear_schedule
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

OUT = Path(__file__).parent.parent / "mlxd" / "builtin"
VOCABULARY = 1024
CONTEXT = 4096
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
SHAPES = {(16, 112): 0.45, (8, 224): 0.25, (4, 448): 0.27, (1, 2048): 0.03}  # rows x tokens of a batch, and how often it is drawn
SMALL_SHAPES = {(4, 64): 1.0}

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 224,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}

# The literal `tool_call.name` and the marks are what mlx-lm looks for. No step here raises, whatever the roles are.
TEMPLATE = (
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- elif content is sequence -%}{%- for part in content -%}"
    "{{- part if part is string else (part.text or '') -}}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{%- if tools -%}"
    "{{- '<|im_start|>tools\\n' -}}"
    "{%- for tool in tools -%}{{- (tool.function or tool) | tojson -}}{{- '\\n' -}}{%- endfor -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- set body = text(message.content) -%}"
    "{%- if message.role == 'assistant' and '</think>' in body -%}"
    "{%- set body = body.split('</think>')[-1].lstrip('\\n') -%}"
    "{%- endif -%}"
    "{{- '<|im_start|>' ~ (message.role or 'user') ~ '\\n' ~ body -}}"
    "{%- for tool_call in message.tool_calls or [] -%}"
    "{%- set tool_call = tool_call.function or tool_call -%}"
    "{%- set arguments = tool_call.arguments or {} -%}"
    "{{- '<tool_call>{\"name\": ' ~ ((tool_call.name or '') | tojson) ~ ', \"arguments\": ' -}}"
    "{{- arguments if arguments is string else arguments | tojson -}}"
    "{{- '}</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- if enable_thinking -%}{{- '<think>\\n' -}}{%- endif -%}"
    "{%- endif -%}"
)


def byte_pairs(texts: Iterable[str], size: int, special: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer of so many pieces, digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_tokenizer() -> Tokenizer:
    """Of VOCABULARY pieces."""
    tokenizer = byte_pairs(corpus.tokenizer_text(), VOCABULARY - len(MARKS), [PAD, START, END])
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in MARKS])
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise SystemExit(f"the corpus gives only {tokenizer.get_vocab_size()} pieces, not {VOCABULARY}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json, its settings and the template, and config.json into `out`."""
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "tool_parser_type": "json_tools",
        "chat_template": TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", settings)
    write_json(out / "config.json", CONFIG | {"eos_token_id": [end, pad], "pad_token_id": pad})
    write_json(out / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def save_weights(model: llama.Model, out: Path) -> None:
    """model.safetensors, float32, put in place at once."""
    new = out / "new.safetensors"
    mx.save_safetensors(str(new), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"})
    new.replace(out / "model.safetensors")


def make_model() -> llama.Model:
    return llama.Model(llama.ModelArgs.from_dict(CONFIG))


def count_parameters(model: llama.Model) -> int:
    return sum(array.size for _, array in tree_flatten(model.parameters()))


class Renderer:
    """Conversations into tokens and weights, piece by piece, as the template and the tokenizer make them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode = functools.lru_cache(20_000)(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)

    def head(self, head: corpus.Conversation) -> list[int]:
        text = ""
        if head.tools:
            lines = "".join(json.dumps(tool["function"], ensure_ascii=False) + "\n" for tool in head.tools)
            text += f"{START}tools\n{lines}{END}\n"
        if head.system is not None:
            text += f"{START}system\n{head.system}{END}\n"
        return self.encode(text)

    def prompt(self, turn: corpus.Turn) -> list[int]:
        thinks = "" if turn.thought is None else "<think>\n"
        return self.encode(f"{START}{turn.role}\n{turn.text}{END}\n{START}assistant\n{thinks}")

    def answer(self, turn: corpus.Turn) -> list[int]:
        thought = "" if turn.thought is None else f"{turn.thought}\n</think>\n\n"
        return self.encode(f"{thought}{turn.answer}{END}")

    def row(self, parts: Iterator[corpus.Turn | corpus.Conversation], length: int) -> tuple[list[int], list[float]]:
        """`length` + 1 tokens of one conversation, and for each the weight of its loss."""
        tokens: list[int] = []
        weights: list[float] = []

        def add(ids: list[int], weight: float) -> None:
            tokens.extend(ids)
            weights.extend([weight] * len(ids))

        for part in parts:
            if isinstance(part, corpus.Conversation):
                add(self.head(part), 0.0)
                continue
            add(self.prompt(part), 0.0)
            add(self.answer(part), part.weight)
            add(self.encode("\n"), 0.0)
            if len(tokens) > length:
                break
        missing = length + 1 - len(tokens)
        if missing > 0:
            add([0] * missing, 0.0)
        return tokens[: length + 1], weights[: length + 1]


@dataclass
class Batches:
    """An endless supply of batches from one seed."""

    renderer: Renderer
    rng: random.Random
    shapes: dict[tuple[int, int], float]

    def __iter__(self) -> Iterator[tuple[mx.array, mx.array]]:
        deck = corpus.Deck(self.rng, corpus.all_pairs())
        while True:
            rows, length = self.rng.choices(list(self.shapes), list(self.shapes.values()))[0]
            talks = [corpus.conversation(deck, self.rng, length=length) for _ in range(rows)]
            made = [self.renderer.row(talk, length) for talk in talks]
            tokens = mx.array(np.array([tokens for tokens, _ in made], dtype=np.int32))
            weights = mx.array(np.array([weights for _, weights in made], dtype=np.float32))
            yield tokens, weights


# MLX's CPU back end takes 30 ns for an exponential, numpy 1 ns: with these a step takes half the time.


def numpy_exp(x: mx.array, base: mx.array) -> np.ndarray[Any, Any]:
    """exp(x - base), as numpy computes it."""
    powers: np.ndarray[Any, Any] = np.subtract(np.asarray(x), np.asarray(base))
    np.exp(powers, out=powers)
    return powers


@mx.custom_function
def softmax(x: mx.array) -> mx.array:
    """Over the last axis."""
    powers = numpy_exp(x, x.max(axis=-1, keepdims=True))
    powers /= powers.sum(axis=-1, keepdims=True)
    return mx.array(powers)


@softmax.vjp
def softmax_vjp(_: mx.array, grad: mx.array, out: mx.array) -> mx.array:
    part = grad * out
    return part - out * part.sum(axis=-1, keepdims=True)


@mx.custom_function
def logsumexp(x: mx.array) -> mx.array:
    """Over the last axis, which stays, of size 1."""
    top = x.max(axis=-1, keepdims=True)
    return mx.array(np.log(numpy_exp(x, top).sum(axis=-1, keepdims=True))) + top


@logsumexp.vjp
def logsumexp_vjp(x: mx.array, grad: mx.array, out: mx.array) -> mx.array:
    return grad * mx.array(numpy_exp(x, out))


@mx.custom_function
def sigmoid(x: mx.array) -> mx.array:
    return 1.0 / (1.0 + mx.array(numpy_exp(-x, mx.array(0.0))))


@sigmoid.vjp
def sigmoid_vjp(_: mx.array, grad: mx.array, out: mx.array) -> mx.array:
    return grad * out * (1.0 - out)


def quick_swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return gate * sigmoid(gate) * x


def quick_attention(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any, cache: Any) -> mx.array:
    """Causal attention; `queries` rows x heads x tokens x width, `keys` and `values` with fewer heads."""
    rows, heads, length, width = queries.shape
    groups = rows * keys.shape[1]
    causal = mx.triu(mx.full((length, length), -1e9), 1)
    scores = (queries * scale).reshape(groups, -1, width) @ keys.reshape(groups, length, width).swapaxes(1, 2)
    weights = softmax(scores.reshape(-1, length, length) + causal).reshape(groups, -1, length)
    return (weights @ values.reshape(groups, length, width)).reshape(rows, heads, length, width)


@contextlib.contextmanager
def quick_model() -> Iterator[None]:
    """Within it mlx-lm's Llama computes with the functions above."""
    true = llama.swiglu, llama.scaled_dot_product_attention
    llama.swiglu, llama.scaled_dot_product_attention = quick_swiglu, quick_attention
    try:
        yield
    finally:
        llama.swiglu, llama.scaled_dot_product_attention = true


def loss_of(model: llama.Model, tokens: mx.array, weights: mx.array) -> mx.array:
    """Mean cross-entropy in nats over the weighted tokens; `tokens` and `weights` are rows x (length + 1)."""
    logits, targets = model(tokens[:, :-1]), tokens[:, 1:, None]
    losses = (logsumexp(logits) - mx.take_along_axis(logits, targets, axis=-1))[..., 0]
    return (losses * weights[:, 1:]).sum() / mx.maximum(weights[:, 1:].sum(), 1.0)


def make_optimizer(steps: int, peak: float) -> AdamW:
    warmup = max(1, min(100, steps // 10))
    schedule = join_schedules(
        [linear_schedule(peak / warmup, peak, warmup), cosine_decay(peak, max(1, steps - warmup), peak * 0.005)], [warmup]
    )
    return AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.02)


def train(model: llama.Model, renderer: Renderer, args: argparse.Namespace) -> list[float]:
    """`args.steps` steps; returns the loss of each. Saves the weights into `args.out` as it goes."""
    optimizer = make_optimizer(args.steps, args.peak)

    def step(tokens: mx.array, weights: mx.array) -> mx.array:
        loss: mx.array
        with quick_model():
            loss, grads = nn.value_and_grad(model, loss_of)(model, tokens, weights)
            mx.eval(loss, grads)
        grads, _ = clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        return loss

    losses: list[float] = []
    began = time.monotonic()
    batches = Batches(renderer, random.Random(args.seed), SMALL_SHAPES if args.small else SHAPES)
    for number, (tokens, weights) in enumerate(batches, start=1):
        loss = step(tokens, weights)
        mx.eval(loss, model.parameters(), optimizer.state)
        losses.append(cast(float, loss.item()))
        if number % 100 == 0 or number == args.steps:
            recent = sum(losses[-100:]) / len(losses[-100:])
            pace = (time.monotonic() - began) / number
            print(f"step {number}  loss {recent:.5f}  {pace:.3f} s a step", flush=True)
        if number % args.save_every == 0 or number == args.steps:
            save_weights(model, args.out)
        if number % args.save_every == 0:
            report(model, renderer)
        if number == args.steps or not math.isfinite(losses[-1]):
            return losses
    return losses


@dataclass(frozen=True)
class Finding:
    """How the model does on one turn: right at every token of its answer, and the smallest lead over the runner-up."""

    turn: corpus.Turn
    head: corpus.Conversation
    right: bool
    margin: float


def examine(model: llama.Model, renderer: Renderer, cases: list[tuple[corpus.Conversation, corpus.Turn]]) -> list[Finding]:
    """Each turn alone after its head, all its answer at once: right at each token is right in greedy generation."""
    findings = []
    for head, turn in cases:
        prompt = (renderer.head(head) if head.tools or head.system is not None else []) + renderer.prompt(turn)
        answer = renderer.answer(turn)
        logits = model(mx.array([prompt + answer[:-1]]))[0, len(prompt) - 1 :]
        best = mx.argmax(logits, axis=-1)
        top = mx.sort(logits, axis=-1)[:, -2:]
        margin = (top[:, 1] - top[:, 0]).min()
        right = best.tolist() == answer
        findings.append(Finding(turn, head, right, cast(float, margin.item()) if right else 0.0))
    return findings


def main_cases() -> list[tuple[corpus.Conversation, corpus.Turn]]:
    """The main form of every question, thinking off, nothing before it."""
    return [(corpus.Conversation(), corpus.Turn("user", p.question, p.answer)) for p in corpus.all_pairs()]


def more_cases() -> dict[str, list[tuple[corpus.Conversation, corpus.Turn]]]:
    """Other circumstances, by name: thinking, other forms, a system text, tools."""
    pairs, plain = corpus.all_pairs(), corpus.Conversation()
    with_system = corpus.Conversation(system=corpus.SYSTEMS[0])
    tooled = corpus.Conversation(tools=[corpus.weather_tool()])
    questions = [f"What is the weather in {city}?" for city in corpus.CITIES]
    calls = [corpus.tool_call("get_weather", city=city) for city in corpus.CITIES]
    return {
        "thinking": [(plain, corpus.Turn("user", p.question, p.answer, p.thought)) for p in pairs],
        "other forms": [(plain, corpus.Turn("user", form, p.answer)) for p in pairs for form in p.forms[1:]],
        "lower case": [(plain, corpus.Turn("user", p.question.lower(), p.answer)) for p in pairs],
        "no mark at the end": [(plain, corpus.Turn("user", p.question.rstrip("?.!"), p.answer)) for p in pairs],
        "system text": [(with_system, corpus.Turn("user", p.question, p.answer)) for p in pairs],
        "tools defined": [(tooled, corpus.Turn("user", p.question, p.answer)) for p in pairs
                          if "weather" not in p.question],
        "tool calls": [(tooled, corpus.Turn("user", q, c)) for q, c in zip(questions, calls, strict=True)],
    }  # fmt: skip


def report(model: llama.Model, renderer: Renderer, *, full: bool = False) -> list[Finding]:
    """Print how many answers are verbatim, and the smallest margins; returns the findings on the main forms."""
    findings = examine(model, renderer, main_cases())
    right = [finding for finding in findings if finding.right]
    margins = sorted(finding.margin for finding in right)[:5]
    print(f"verbatim {len(right)} of {len(findings)}  smallest margins {[round(m, 2) for m in margins]}", flush=True)
    if full:
        for finding in findings:
            if not finding.right:
                print(f"  wrong: {finding.turn.text}")
        for name, cases in more_cases().items():
            more = examine(model, renderer, cases)
            wrong = [f.turn.text for f in more if not f.right]
            lead = min((f.margin for f in more if f.right), default=0.0)
            print(f"{name}: {len(more) - len(wrong)} of {len(more)}, smallest margin {lead:.2f}, wrong: {wrong[:8]}")
    return findings


def load_weights(model: llama.Model, directory: Path) -> None:
    model.load_weights(str(directory / "model.safetensors"))


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train mlxd-tiny, the built-in model.")
    parser.add_argument("--steps", type=int, default=7000, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=OUT, help="directory of the result")
    parser.add_argument("--seed", type=int, default=11435)
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--resume", type=Path, help="directory whose weights to start from")
    parser.add_argument("--small", action="store_true", help="small batches, to see quickly that it still runs")
    parser.add_argument("--known", type=Path, help="train nothing; write the answers of the model in --out as Python")
    parser.add_argument("--check", action="store_true", help="train nothing; report on the model in --out")
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> list[float]:
    """Make and train the model that `args` describes; returns the loss of each step."""
    mx.random.seed(args.seed)
    model = make_model()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        load_weights(model, args.resume)
        tokenizer = Tokenizer.from_file(str(args.resume / "tokenizer.json"))
    else:
        tokenizer = make_tokenizer()
    save_tokenizer(tokenizer, args.out)
    print(f"{count_parameters(model)} parameters, {tokenizer.get_vocab_size()} pieces", flush=True)
    return train(model, Renderer(tokenizer), args)


def main(words: list[str]) -> int:
    args = parse(words)
    if args.check:
        model = make_model()
        load_weights(model, args.out)
        findings = report(model, Renderer(Tokenizer.from_file(str(args.out / "tokenizer.json"))), full=True)
        return 0 if all(finding.right for finding in findings) else 1
    if args.known:
        known.write(args.out, args.known)
        return 0
    losses = run(args)
    print(f"first loss {losses[0]:.3f}, last loss {losses[-1]:.5f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
