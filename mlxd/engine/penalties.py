"""Penalties for tokens that were there before, and biases for tokens that the client names, of one row.

Owns which tokens count; what a penalty does is mlx-lm's. Knows nothing of batches.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors

from mlxd.messages import Sampling

#: Logits are some tens; this far outweighs them, and is far from what a float cannot hold.
MOST = 1e4
#: The window is cut here, not by mlx-lm, to whose slices 0 is all and -1 all but the first.
ALL = 2**31 - 1


def has_penalties(s: Sampling) -> bool:
    looks_back = s.repeat_penalty not in (0, 1) or s.presence_penalty != 0 or s.frequency_penalty != 0
    return bool(s.logit_bias) or (looks_back and s.penalty_last_n != 0)


class Penalties:
    """Of a row whose position 0 has `prompt_length` tokens before it, over a vocabulary of `width`."""

    def __init__(self, sampling: Sampling, prompt_length: int, width: int):
        self.last_n = sampling.penalty_last_n if sampling.penalty_last_n >= 0 else ALL
        self.first = 0 if sampling.penalize_prompt else prompt_length
        self.width = width
        self.processors = make_logits_processors(
            {token: bounded(bias) for token, bias in sampling.logit_bias.items() if token < width},
            min(sampling.repeat_penalty, MOST) if sampling.repeat_penalty not in (0, 1) else None,
            ALL,
            bounded(sampling.presence_penalty),
            ALL,
            bounded(sampling.frequency_penalty),
            ALL,
        )

    def apply(self, logits: mx.array, before: list[int], token: int) -> mx.array:
        """The row's logits, (1, vocabulary), after the tokens `before` and `token`."""
        start = max(self.first, len(before) + 1 - self.last_n, 0)
        seen = [*before[start:], token] if start <= len(before) else []
        # A model may read tokens that it cannot write, and MLX would write beyond the row.
        tokens = mx.array([t for t in seen if t < self.width], mx.uint32)
        for process in self.processors:
            logits = process(tokens, logits)
        return logits


def bounded(value: float) -> float:
    return max(-MOST, min(value, MOST))
