"""Keyed sampling: what it draws, that it draws alike in any company, and what of mlx-lm it leans on."""

from __future__ import annotations

import inspect
import math
import queue
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from engine_client import PLENTY
from mlx_lm import sample_utils

import mlxd
from mlxd.config import Config
from mlxd.engine import sampling, view
from mlxd.engine.batch import Batch, Ended, Opened, Row, Tick
from mlxd.engine.sampling import Draw, KeyedBatch, Plan, are_sound, bounds, generate, uniform
from mlxd.messages import Load, Sampling

BUILTIN = Path(mlxd.__file__).parent / "builtin"
VOCABULARY = 60


def drawn(samplings: list[Sampling], logits: mx.array, position: int = 0) -> list[int]:
    """The tokens that rows with these samplings draw at `position`. `logits`: (rows, vocabulary)."""
    plan = Plan([Draw(s, 5) for s in samplings], [4 + position] * len(samplings), logits.shape[-1])
    return plan.draw(logits).tolist()  # type: ignore[return-value]


def random_logits(rows: int, vocabulary: int = VOCABULARY, seed: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 2, (rows, vocabulary)).astype(np.float32))


def reference(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """The filtered distribution in float64, by mlx-lm's own filters."""
    x = mx.array(logits[None])
    x = x - mx.logsumexp(x, axis=-1, keepdims=True)
    if s.top_p < 1:
        x = sample_utils.apply_top_p(x, s.top_p)
    if s.min_p > 0:
        x = sample_utils.apply_min_p(x, s.min_p)
    if s.top_k > 0:
        x = sample_utils.apply_top_k(x, s.top_k)
    p = np.exp(np.array(x[0], dtype=np.float64) / s.temperature)
    return p / p.sum()


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": 10, "top_p": 0.9},
    {"top_k": 3, "top_p": 0.99, "temperature": 1.7},
    {"top_p": 0.8, "min_p": 0.2, "temperature": 0.6},
    {"top_k": 20, "top_p": 0.95, "min_p": 0.02, "temperature": 1.3},
]


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_tokens_come_as_often_as_the_filtered_distribution_says(fields: dict[str, Any]) -> None:
    logits = random_logits(1)
    expected = reference(np.array(logits[0]), Sampling(**{"seed": 0, "temperature": 1.0} | fields))
    count = 20_000
    samplings = [Sampling(**{"seed": seed, "temperature": 1.0} | fields) for seed in range(count)]
    seen = Counter(drawn(samplings, mx.broadcast_to(logits, (count, VOCABULARY))))
    observed = np.array([seen[token] for token in range(VOCABULARY)])
    assert set(np.nonzero(observed)[0]) <= set(np.nonzero(expected)[0]), "a filtered token was drawn"
    # Chi squared over what is expected five times or more: its mean is the cells - 1, its deviation the root of twice that.
    often = expected * count >= 5
    chi = (((observed - expected * count) ** 2)[often] / (expected * count)[often]).sum()
    cells = int(often.sum())
    assert chi < cells + 5 * math.sqrt(2 * cells), (chi, cells)


def mixed_samplings(count: int) -> list[Sampling]:
    kinds = [{"temperature": 0.0}, {"top_k": 1}, *FILTERS]
    return [Sampling(**{"seed": i, "temperature": 1.0} | kinds[i % len(kinds)]) for i in range(count)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_a_row_draws_alone_what_it_draws_in_any_company(dtype: mx.Dtype) -> None:
    samplings = mixed_samplings(48)
    logits = random_logits(48, 2000).astype(dtype)
    together = drawn(samplings, logits, position=7)
    assert [drawn([s], logits[i : i + 1], position=7)[0] for i, s in enumerate(samplings)] == together
    order = np.random.default_rng(3).permutation(48)
    shuffled = drawn([samplings[i] for i in order], logits[mx.array(order)], position=7)
    assert shuffled == [together[i] for i in order]


def test_greedy_rows_take_the_best_token_whoever_is_beside_them() -> None:
    logits = random_logits(4)
    best = mx.argmax(logits, axis=-1).tolist()
    assert drawn([Sampling(seed=9)] * 4, logits) == best
    assert drawn([Sampling(seed=9, temperature=3.0, top_k=1)] * 4, logits) == best
    assert drawn([Sampling(seed=9), Sampling(seed=9, temperature=1.0)] * 2, logits)[::2] == best[::2]
    assert drawn([Sampling(seed=9, temperature=1e-40)] * 4, logits) == best
    assert drawn([Sampling(seed=9, temperature=1.0, top_p=0.0)] * 4, logits) == best
    assert drawn([Sampling(seed=9, temperature=1.0, min_p=7.0)] * 4, logits) == best


def test_numbers_out_of_range_do_not_stop_the_batch() -> None:
    strange = [
        Sampling(seed=2**64 - 1, temperature=1.0, top_k=2**62),
        Sampling(seed=-5, temperature=1e300, top_p=-1.0),
        Sampling(seed=0, temperature=-1.0, top_k=-7),
    ]
    assert all(0 <= token < VOCABULARY for token in drawn(strange, random_logits(3)))


def test_u_is_uniform_and_told_apart_by_seed_and_by_position() -> None:
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 100)
    positions = np.tile(np.arange(100, dtype=np.uint64), 200)
    u = uniform(seeds, positions)
    assert u.dtype == np.float32
    assert u.min() >= 0
    assert u.max() < 1
    assert len(np.unique(u)) > 0.998 * len(u)
    # Kolmogorov-Smirnov: the root of n times the distance stays below 1.95 in 999 of 1,000 samples.
    distance = np.abs(np.sort(u) - (np.arange(len(u)) + 0.5) / len(u)).max()
    assert distance * math.sqrt(len(u)) < 1.95
    grid = u.reshape(200, 100).astype(np.float64)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.03


def test_u_is_pinned_since_another_engine_must_draw_the_same() -> None:
    u = uniform(np.array([0, 1, 2**64 - 1], np.uint64), np.array([0, 1, 1000], np.uint64))
    assert [float(x).hex() for x in u] == PINNED


#: The first is splitmix64's first output from state 0, 0xE220A8397B1DCDAF, as 24 bits.
PINNED = ["0x1.c441500000000p-1", "0x1.7d54b00000000p-2", "0x1.dba85c0000000p-1"]


def test_a_plan_counts_positions_as_steps_pass() -> None:
    logits = random_logits(1, 2000)
    warm = Sampling(seed=4, temperature=1.5)
    plan = Plan([Draw(warm, 5)], [4], 2000)
    stepped = [plan.draw(logits).item() for _ in range(8)]
    assert stepped == [drawn([warm], logits, position)[0] for position in range(8)]
    assert len(set(stepped)) > 4


# --- penalties, biases, log-probabilities ----------------------------------------------------------------------------------------


def steered(samplings: list[Sampling], logits: mx.array, before: list[list[int]], tokens: list[int], prompt: int = 2) -> np.ndarray:
    """What becomes of the logits of rows whose prompts have `prompt` tokens."""
    plan = Plan([Draw(s, prompt) for s in samplings], [len(b) for b in before], logits.shape[-1])
    assert plan.steered
    return np.array(plan.steer(logits, before, tokens).astype(mx.float32))


LINE = [[4.0, -4.0, 2.0, 1.0, 0.5, 0.0]]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"repeat_penalty": 2.0}, [2.0, -8.0, 1.0, 1.0, 0.5, 0.0]),
        ({"presence_penalty": 1.0}, [3.0, -5.0, 1.0, 1.0, 0.5, 0.0]),
        ({"frequency_penalty": 1.0}, [3.0, -6.0, 1.0, 1.0, 0.5, 0.0]),
        ({"frequency_penalty": -1.0}, [5.0, -2.0, 3.0, 1.0, 0.5, 0.0]),
        ({"presence_penalty": 1.0, "penalty_last_n": 2}, [4.0, -5.0, 1.0, 1.0, 0.5, 0.0]),
        ({"presence_penalty": 1.0, "penalty_last_n": 1}, [4.0, -4.0, 1.0, 1.0, 0.5, 0.0]),
        ({"presence_penalty": 1.0, "penalty_last_n": -1}, [3.0, -5.0, 1.0, 1.0, 0.5, 0.0]),
        ({"frequency_penalty": 1.0, "penalize_prompt": False}, [4.0, -5.0, 1.0, 1.0, 0.5, 0.0]),
        ({"frequency_penalty": 1.0, "penalize_prompt": False, "penalty_last_n": 1}, [4.0, -4.0, 1.0, 1.0, 0.5, 0.0]),
        ({"logit_bias": {3: 5.0, 5: -1.0, 6: 9.0}}, [4.0, -4.0, 2.0, 6.0, 0.5, -1.0]),
        ({"logit_bias": {0: -1.0}, "repeat_penalty": 3.0, "penalty_last_n": -1}, [1.0, -12.0, 2 / 3, 1.0, 0.5, 0.0]),
    ],
    ids=str,
)
def test_penalties_change_the_tokens_of_their_window_and_no_others(fields: dict[str, Any], expected: list[float]) -> None:
    """The prompt is 0 and 1, the answer so far 1 and 2; token 9 is one that the model reads and cannot write."""
    logits = mx.array(LINE)
    got = steered([Sampling(seed=0, **fields)], logits, [[0, 1, 1]], [2])
    assert np.allclose(got, [expected])
    assert np.array_equal(np.array(logits), LINE), "the model's own logits were written over"
    if "penalty_last_n" not in fields and fields.get("penalize_prompt", True):
        assert np.allclose(steered([Sampling(seed=0, **fields)], logits, [[9, 0, 1, 1]], [2], 3), [expected])


def test_before_the_first_token_only_the_prompt_can_be_penalised() -> None:
    for penalised in (True, False):
        draw = Sampling(seed=0, presence_penalty=1.0, penalize_prompt=penalised)
        got = steered([draw], mx.array(LINE), [[0]], [1])
        assert np.array_equal(got, [[3.0, -5.0, 2.0, 1.0, 0.5, 0.0]] if penalised else LINE)


def test_rows_without_penalties_are_left_alone_and_a_batch_of_them_is_not_steered() -> None:
    off = Sampling(seed=0, repeat_penalty=1.0, penalty_last_n=0, temperature=0.7)
    unseen = Sampling(seed=0, repeat_penalty=1.5, penalty_last_n=0)
    assert not Plan([Draw(off, 2), Draw(unseen, 2)], [1, 1], VOCABULARY).steered
    logits = random_logits(3).astype(mx.bfloat16)
    heavy = Sampling(seed=0, repeat_penalty=1.7, logit_bias={3: 2.5})
    got = steered([off, heavy, off], logits, [[1], [2, 3], [4]], [5, 6, 7])
    alone = steered([heavy], logits[1:2], [[2, 3]], [6])
    assert np.array_equal(got[1], alone[0])
    untouched = np.array(logits.astype(mx.float32))
    assert np.array_equal(got[::2], untouched[::2])
    assert not np.array_equal(got[1], untouched[1])


def test_penalties_out_of_range_leave_numbers() -> None:
    for value in (1e300, -1e300):
        s = Sampling(seed=0, presence_penalty=value, frequency_penalty=value, repeat_penalty=abs(value), logit_bias={2: value})
        assert np.isfinite(steered([s], mx.array(LINE), [[0, 1, 1]], [2])).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_log_probabilities_are_of_the_models_own_logits_in_falling_order(dtype: mx.Dtype) -> None:
    logits = random_logits(3).astype(dtype)
    drawn = mx.argmax(logits, axis=-1)
    samplings = [Sampling(seed=0, temperature=3.0, logit_bias={1: 50.0}), Sampling(seed=0), Sampling(seed=0)]
    plan = Plan([Draw(s, 1, None, n) for s, n in zip(samplings, [20, None, 0], strict=True)], [1] * 3, VOCABULARY)
    first, none, bare = plan.rank(logits, drawn)[0]
    assert none is None
    assert first is not None
    assert bare is not None
    odds = first.read()
    x = np.array(logits[0].astype(mx.float32), np.float64)
    x -= np.log(np.exp(x).sum())
    order = sorted(range(VOCABULARY), key=lambda token: (-x[token], token))[:20]
    assert [token for token, _ in odds.best] == order
    assert np.allclose([logprob for _, logprob in odds.best], x[order], atol=1e-5)
    assert odds.drawn == odds.best[0][1]
    assert bare.read().best == []
    alone = Plan([Draw(samplings[2], 1, None, 0)], [1], VOCABULARY).rank(logits[2:], drawn[2:])[0][0]
    assert alone is not None
    assert alone.read() == bare.read()


def test_a_vocabulary_smaller_than_what_may_be_asked_for_is_told_of_whole() -> None:
    (place,), _ = Plan([Draw(Sampling(seed=0), 1, None, 20)], [1], 6).rank(mx.array([[1.0, -math.inf, 3, 2, 0, 0]]), mx.array([2]))
    assert place is not None
    odds = place.read()
    assert [token for token, _ in odds.best] == [2, 3, 0, 4, 5, 1]
    assert abs(sum(math.exp(logprob) for _, logprob in odds.best) - 1) < 1e-6
    assert odds.best[-1][1] == -9999.0


# --- what of mlx-lm this leans on ----------------------------------------------------------------------------------------------


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_mlx_lm_is_still_the_one_that_the_engine_was_written_for() -> None:
    """A new mlx-lm fails here, by name, and not in the middle of an answer."""
    assert generate.GenerationBatch is KeyedBatch
    stock = KeyedBatch.__mro__[1]
    assert parameters(stock.__init__) == [
        *["self", "model", "uids", "inputs", "prompt_cache", "tokens", "samplers", "fallback_sampler"],
        *["logits_processors", "stop_sequences", "max_tokens"],
    ]
    step = inspect.getsource(stock._step)
    for name in ("self._next_tokens", "self._next_logprobs", "self.tokens", "self.prompt_cache", "self.uids"):
        assert name in step
    assert (
        inspect.getsource(generate).count("GenerationBatch(\n") + inspect.getsource(generate).count("GenerationBatch.empty(") == 2
    )
    filtering = inspect.getsource(stock.filter)
    assert "self.samplers = [self.samplers[idx] for idx in keep]" in filtering
    assert "self._next_logprobs = [self._next_logprobs[idx] for idx in keep]" in filtering
    assert "self.samplers.extend(batch.samplers)" in inspect.getsource(stock.extend)
    assert "self._next_logprobs.extend(batch._next_logprobs)" in inspect.getsource(stock.extend)
    assert parameters(sample_utils.make_logits_processors) == [
        *["logit_bias", "repetition_penalty", "repetition_context_size", "presence_penalty", "presence_context_size"],
        *["frequency_penalty", "frequency_context_size"],
    ]
    assert set(stock.Response.__dataclass_fields__) == {"uid", "token", "logprobs", "finish_reason", "prompt_cache", "all_tokens"}
    prompt_response = generate.PromptProcessingBatch.Response
    assert set(prompt_response.__dataclass_fields__) == {"uid", "progress", "end_of_segment", "end_of_prompt"}
    generator = generate.BatchGenerator
    assert {"stop_tokens", "completion_batch_size", "prefill_batch_size", "prefill_step_size"} <= set(
        parameters(generator.__init__)
    )
    assert parameters(generator.insert)[1:6] == ["prompts", "max_tokens", "caches", "all_tokens", "samplers"]
    assert parameters(generator.remove) == ["self", "uids", "return_prompt_caches"]
    assert parameters(generator.extract_cache) == ["self", "uids"]
    source = inspect.getsource(generator)
    for name in ("_prompt_batch", "_unprocessed_sequences", "prefill_batch_size", "prefill_step_size", "def stream(self)"):
        assert name in source
    machine = generate.TextStateMachine
    assert (parameters(machine.split), parameters(machine.flush)) == (["state", "text"], ["state"])


def test_the_tokenizer_wrapper_still_has_what_prompts_and_answers_need() -> None:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.utils import MODEL_REMAPPING, load_model, load_tokenizer

    for name in (
        "has_thinking",
        "think_start",
        "think_end",
        "detokenizer",
        "eos_token_ids",
        "rfind_think_start",
        "rfind_think_end",
        "think_start_tokens",
        "think_end_tokens",
        "has_tool_calling",
        "tool_parser",
        "tool_call_start_tokens",
        "tool_call_end_tokens",
    ):
        assert hasattr(TokenizerWrapper, name)
    wrapper = load_tokenizer(BUILTIN)
    assert wrapper._chat_template is None
    assert wrapper.has_chat_template
    assert callable(wrapper._tokenizer.apply_chat_template)
    for name in ("add_token", "last_segment", "finalize"):
        assert hasattr(wrapper.detokenizer, name)
    assert parameters(load_model)[:2] == ["model_path", "lazy"]
    assert "eos_token_ids" in parameters(load_tokenizer)
    assert "eos_token_id" in load_model(BUILTIN, lazy=True)[1]
    assert MODEL_REMAPPING["mistral"] == "llama"
    assert view.remapping() == MODEL_REMAPPING and "llama" in view.modules("models")  # read, not imported


# --- the batch, in this process --------------------------------------------------------------------------------------------


def heard(news: queue.SimpleQueue[Any], kind: type) -> Any:
    while not isinstance(item := news.get(timeout=30), kind):
        assert not isinstance(item, Ended), item
    return item


def test_the_model_thread_reports_an_exception_and_is_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    news: queue.SimpleQueue[Any] = queue.SimpleQueue()
    batch = Batch(Config(), news.put)
    batch.start(Load("mlxd-tiny", str(BUILTIN), PLENTY), tmp_path / "view")
    heard(news, Opened)
    batch.admit(Row("good", [5, 6, 7], Draw(Sampling(seed=0), 3), 2))
    assert heard(news, Tick).accepted[0][0].owner == "good"
    batch.admit(Row("bad", [], Draw(Sampling(seed=0), 0), 2))  # mlx-lm raises on an empty prompt
    while not isinstance(item := news.get(timeout=30), Ended):
        pass
    assert (item.cause, item.text) == ("error", "ValueError")
    assert caplog.records[-1].exc_info


def test_the_wired_limit_is_left_as_it_was() -> None:
    """Making a BatchGenerator sets it where the device has one (Metal); closing puts it back, and all else goes on."""
    source = inspect.getsource(generate.BatchGenerator.close)
    assert "mx.set_wired_limit(self._old_wired_limit)" in source
    assert source.count("self.") == source.count("self._old_wired_limit") + source.count("self._stream")
    assert "self.generator.close()" in inspect.getsource(Batch.open)
    assert sampling.generate.BatchGenerator is generate.BatchGenerator


@pytest.mark.parametrize("kind", [mx.float32, mx.float16, mx.bfloat16])
def test_only_rows_that_nothing_can_be_drawn_from_are_unsound(kind: mx.Dtype) -> None:
    good = [[0.0, 1.0, 2.0, 3.0], [-math.inf, -math.inf, -5.0, -4.0], [1.0, 1.0, 1.0, 1.5]]
    bad = [[0.0, math.nan, 2.0, 3.0], [math.nan] * 4, [0.0, math.inf, 1.0, 2.0], [0.0] * 4, [7.0] * 4, [-math.inf] * 4]
    assert are_sound(*bounds(mx.array(good, kind)))
    for row in bad:
        assert not are_sound(*bounds(mx.array([*good, row], kind)))
        assert not are_sound(*bounds(mx.array([row, *good], kind)))
