"""Embeddings: one vector for each text, from what the model makes of its tokens.

Owns how a model's files want the tokens pooled, how texts share the budget of a step, and the way from states to vectors. Works
in the model thread. Knows nothing of jobs, sockets or text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn
from mlx_lm.models import cache as row_caches

from mlxd.engine.bert import Encoder
from mlxd.engine.sampling import WrongOutput
from mlxd.modelfiles import Broken, read_json, read_list

Pooling = Literal["mean", "cls", "last"]

#: sentence-transformers' names, without `pooling_mode_`. Over the root of the length: the same direction as the mean.
POOLINGS: dict[str, Pooling] = {
    "cls": "cls",
    "cls_token": "cls",
    "mean": "mean",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean",
    "lasttoken": "last",
}
#: Its modules that change nothing but what is done here anyway.
PLAIN_MODULES = ("Transformer", "Pooling", "Normalize")
#: Where mlx-lm's models keep all but their output layer.
INNER = ("model", "transformer", "backbone")


@dataclass(eq=False, slots=True)
class Texts:
    """One job. `ids`: the tokens of each text, not empty; `vectors` of each: little-endian float32, of length 1. `owner` is the caller's
    own. `wanted` becomes False in another thread."""

    owner: Any
    ids: list[list[int]]
    vectors: list[bytes] = field(default_factory=list)
    wanted: bool = True

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


class Embedder:
    """`length`: how many numbers a vector has. Raises Broken when the model shows no states."""

    def __init__(self, model: Any, pooling: Pooling):
        self.pooling = pooling
        self.read: Callable[[mx.array, mx.array, Any], mx.array]
        if isinstance(model, Encoder):
            self.new_cache = None
            self.read = lambda ids, lengths, cache: model(ids, lengths)
        else:
            inner = inner_of(model)
            self.new_cache = lambda: row_caches.make_prompt_cache(model)
            # Padding stands behind the text, where no token of a causal model looks.
            self.read = lambda ids, lengths, cache: inner(ids, cache=cache)
        self.length = self.measure()

    def measure(self) -> int:
        """Of what shape the states are; MLX knows without computing them."""
        try:
            states = self.read(mx.zeros((1, 2), mx.int32), mx.array([2]), None)
            rows, width, length = states.shape
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise Broken(f"its states cannot be had: {type(error).__name__}: {error}") from error
        return length

    def embed(self, texts: Texts, budget: int) -> Iterator[int]:
        """Give `texts` their vectors, about `budget` tokens at a time; yields how many were read. Raises WrongOutput."""
        texts.vectors = [b""] * len(texts.ids)
        for group in groups([len(ids) for ids in texts.ids], budget):
            pooled = np.zeros((len(group), self.length))
            for part, tokens in self.parts([texts.ids[i] for i in group], budget):
                pooled += np.array(part)
                yield tokens
            for i, vector in zip(group, unit(pooled), strict=True):
                texts.vectors[i] = vector.astype("<f4").tobytes()

    def parts(self, rows: list[list[int]], budget: int) -> Iterator[tuple[mx.array, int]]:
        """Of texts that are read side by side: their pooled states, in parts that add up, and how many tokens were read for each. A causal
        model reads one long text piece by piece."""
        lengths = [len(ids) for ids in rows]
        width = max(lengths)
        padded = mx.array(np.array([ids + [0] * (width - len(ids)) for ids in rows], np.int32))
        share = mx.array(shares(self.pooling, lengths, width))
        cache = self.new_cache() if self.new_cache and width > budget else None
        step = width if cache is None else budget
        for start in range(0, width, step):
            states = self.read(padded[:, start : start + step], mx.array(lengths), cache).astype(mx.float32)
            part = (share[:, None, start : start + step] @ states)[:, 0]
            mx.eval(part, [layer.state for layer in cache or []])
            yield part, sum(min(max(length - start, 0), step) for length in lengths)


def inner_of(model: Any) -> Any:
    """All of an mlx-lm model but its output layer. Raises Broken."""
    text = getattr(model, "language_model", model)  # of models that see or hear
    for name in INNER:
        if isinstance(part := getattr(text, name, None), nn.Module):
            return part
    raise Broken("mlx-lm does not show the states of this kind of model")


def groups(lengths: list[int], budget: int) -> list[list[int]]:
    """Which texts are read side by side: padded to the longest, they are no more tokens than `budget`, or it is one alone."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if found and (len(found[-1]) + 1) * lengths[found[-1][0]] <= budget:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def shares(pooling: Pooling, lengths: list[int], width: int) -> npt.NDArray[np.float32]:
    """How much each token's state counts in its text's vector, (texts, width)."""
    at, length = np.arange(width), np.array(lengths)[:, None]
    counts = {"mean": (at < length) / length, "cls": (at == 0) & (length > 0), "last": at == length - 1}[pooling]
    return np.asarray(counts, np.float32)


def unit(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Each made one long. Raises WrongOutput when there is one that cannot be."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise WrongOutput("the model gave no numbers, or nothing but zeros, for a text")
    return np.asarray(vectors / norms)


def read_pooling(directory: Path) -> Pooling:
    """What the model's files say, as sentence-transformers writes them; the mean when they say nothing. Raises Broken on what is not done
    here: then the vectors would not be those that the model was trained to give."""
    folder = "1_Pooling"
    if (directory / "modules.json").exists():
        folder = pooling_module(read_list(directory / "modules.json"))
    elif not (directory / folder).exists():
        return "mean"
    if not re.fullmatch(r"\w+", folder):
        raise Broken("modules.json names no pooling; mlxd needs its directory")
    if not (directory / folder / "config.json").exists():
        raise Broken(f"{folder}/config.json is missing; download it from the original model")
    settings = read_json(directory / folder / "config.json")
    modes = {
        key.removeprefix("pooling_mode_") for key, value in settings.items() if value is True and key.startswith("pooling_mode_")
    }
    if isinstance(mode := settings.get("pooling_mode"), str):
        modes = {mode}
    if len(modes) != 1 or not modes <= POOLINGS.keys():
        raise Broken(
            f"{folder}/config.json asks for {' and '.join(sorted(modes)) or 'no'} pooling; mlxd does {', '.join(POOLINGS)}"
        )
    return POOLINGS[modes.pop()]


def pooling_module(modules: list[Any]) -> str:
    """The directory of the pooling among a model's modules; "" without one. Raises Broken when one of them is not done here."""
    folder = ""
    for module in modules:
        kind, path = (str(module.get(key, "")) for key in ("type", "path")) if isinstance(module, dict) else ("", "")
        kind = kind.rpartition(".")[2]
        if kind not in PLAIN_MODULES:
            raise Broken(f"modules.json names a module that mlxd does not do ({kind or 'without a type'})")
        folder = path if kind == "Pooling" else folder
    return folder
