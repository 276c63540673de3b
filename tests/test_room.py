"""Memory for the caches of running rows: what they take, who waits, and that nothing is lost by it. The model thread, in this process."""

from __future__ import annotations

import math
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_client import PLENTY, EngineProcess, make_tiny_model
from server_client import until

from mlxd import estimate
from mlxd.config import Config
from mlxd.engine.batch import Batch, Ended, Opened, Row, Tick
from mlxd.engine.room import STEP, USABLE, Layer, Room
from mlxd.engine.sampling import Draw
from mlxd.engine.text import Prompt
from mlxd.messages import Format, Load, Sampling, Submit
from mlxd.modelfiles import read_json

BUILTIN = Path(estimate.__file__).parent / "builtin"
#: Layers x KV heads x head dimension x 2 x bytes.
BUILTIN_KV_BYTES = 4 * 2 * 32 * 2 * 4


class Thread:
    """A model thread and what it has told. `most`: how many rows it had in the batch at once; `waited`: whether one was put back or held."""

    def __init__(self, directory: Path, view: Path):
        self.news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.batch = Batch(Config(), self.news.put)
        self.batch.start(Load("m", str(directory), PLENTY), view)
        opened = self.news.get(timeout=60)
        assert isinstance(opened, Opened), opened
        self.opened = opened
        self.most = 0
        self.waited = False

    def have_room_for(self, rows: float, tokens: int) -> None:
        """From now on, and no prefix is left of what was before."""
        room = self.batch.room
        self.do(lambda tick: self.batch.prefixes.shrink(0))
        room.least = 0  # else a row of 2,048 tokens would fit whatever the share
        self.batch.limit(math.ceil(room.taken + rows * room.row(tokens) / USABLE))
        self.most, self.waited = 0, False

    def do(self, work: Callable[[Tick], Any]) -> Any:
        """In the model thread, between two steps."""
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.batch.inbox.put(lambda tick: done.put(work(tick)))
        return done.get(timeout=60)

    def run(self, rows: list[Row], seen: Callable[[Tick], None] = lambda tick: None) -> list[list[int]]:
        """What each row generated."""
        said: dict[int, list[int]] = {id(row): [] for row in rows}
        left = len(rows)
        self.batch.inbox.put(lambda tick: [self.batch.admit(row) for row in rows])
        while left:
            news = self.news.get(timeout=60)
            assert not isinstance(news, Ended), news
            self.most = max(self.most, len(self.batch.rows))
            self.waited |= bool(self.batch.waiting)
            seen(news)
            for row, token, reason, _ in news.tokens:
                said[id(row)].append(token)
                left -= reason is not None
        return [said[id(row)] for row in rows]


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> Thread:
    return Thread(BUILTIN, tmp_path_factory.mktemp("room") / "view")


def rows(thread: Thread, count: int, prompt_tokens: int, most: int) -> list[Row]:
    """Of different words, seeds and temperatures; one is penalised, one is held to JSON."""
    made = []
    for number in range(count):
        ids = thread.opened.tokenizer.encode(f"{number}: " + "a request waits for memory. " * prompt_tokens)[:prompt_tokens]
        sampling = Sampling(seed=number, temperature=0.7 * (number % 3), repeat_penalty=1.1 if number == 1 else 1.0)
        constraint = None
        if number == 2:
            assert thread.opened.grammars is not None
            submit = Submit(job=1, sampling=sampling, format=Format(kind="json"))
            constraint = thread.opened.grammars.compile(submit, Prompt(ids, False, True, most))
        made.append(Row(number, ids, Draw(sampling, len(ids), constraint), most))
    return made


def test_a_request_that_does_not_fit_waits_and_says_the_same(builtin: Thread) -> None:
    builtin.have_room_for(100, 1024)
    free = builtin.run(rows(builtin, 6, 300, 24))
    assert (builtin.most, builtin.waited) == (6, False)
    builtin.have_room_for(2.5, 2 * STEP)
    assert builtin.run(rows(builtin, 6, 300, 24)) == free
    assert (builtin.most, builtin.waited) == (2, True)


def test_rows_that_outgrow_the_room_are_put_back_and_say_the_same(builtin: Thread) -> None:
    """Three fit with what they begin with; from their 257th token on only one does."""
    builtin.have_room_for(100, 1024)
    free = builtin.run(rows(builtin, 3, 230, 60))
    builtin.have_room_for(1.7, 2 * STEP)
    assert builtin.run(rows(builtin, 3, 230, 60)) == free
    assert builtin.most == 3
    assert builtin.waited


def test_one_row_alone_runs_whatever_the_room(builtin: Thread) -> None:
    builtin.have_room_for(0, STEP)
    assert builtin.batch.room.most_tokens == 0
    assert builtin.run(rows(builtin, 2, 40, 4))
    assert builtin.most == 1


def test_prefixes_give_way_before_a_request_waits(builtin: Thread) -> None:
    builtin.have_room_for(100, 1024)
    builtin.run(rows(builtin, 4, 200, 1))
    held = builtin.batch.prefixes.bytes
    assert held > 0
    room = builtin.batch.room
    builtin.batch.limit(math.ceil(room.taken + (4 * room.row(STEP) + held / 2) / USABLE))
    builtin.most, builtin.waited = 0, False
    seen: list[int] = []
    new = [Row(n, [5 + n] * 200, Draw(Sampling(seed=0), 200), 2) for n in range(4)]
    builtin.run(new, lambda tick: seen.append(builtin.batch.prefixes.bytes))
    assert (builtin.most, builtin.waited) == (4, False)
    assert min(seen) < held


def test_a_conversation_that_takes_most_of_the_room_reuses_its_beginning_all_the_same(builtin: Thread) -> None:
    builtin.have_room_for(1.5, 2 * STEP)
    first = Row("first", [7] * 300, Draw(Sampling(seed=0), 300), 1)
    builtin.run([first])
    ids = [7] * 300 + [9] * 20
    cached: list[int] = []
    again = Row("again", ids, Draw(Sampling(seed=0), len(ids)), 1)
    builtin.run([again], lambda tick: cached.extend(held for row, held in tick.accepted if row is again))
    assert cached == [300]


def test_an_idle_engine_gives_up_prefixes_when_its_share_shrinks(builtin: Thread) -> None:
    builtin.have_room_for(100, 1024)
    builtin.run(rows(builtin, 1, 200, 1))
    assert builtin.batch.prefixes.bytes
    builtin.batch.limit(1)
    until("no prefix", lambda: not builtin.batch.prefixes.bytes)


def test_a_request_that_waits_can_be_cancelled(builtin: Thread) -> None:
    builtin.have_room_for(1, 2 * STEP)
    first, second = rows(builtin, 2, 300, 24)
    dropped: list[Row] = []

    def cancel(tick: Tick) -> None:
        if builtin.batch.waiting and not dropped:
            dropped.append(second)
            builtin.batch.drop(second)

    left = builtin.batch.left
    builtin.batch.admit(second)
    until("it runs", lambda: second.uid >= 0)
    builtin.batch.drop(second)
    until("it is gone", lambda: builtin.batch.left == left + 1)
    second.uid, second.done, second.emitted = -1, 0, []
    builtin.batch.admit(first)
    builtin.batch.admit(second)
    while builtin.batch.left < left + 3:
        cancel(builtin.news.get(timeout=60))
    assert dropped
    assert not builtin.batch.waiting
    assert builtin.batch.held == 0


def test_a_request_that_would_not_fit_alone_is_a_507_that_says_how_many_tokens_do(tmp_path: Path) -> None:
    """Where there is next to nothing, 2,048 tokens fit all the same: with less room the model would not have been loaded."""
    with EngineProcess(tmp_path / "e") as process, process.load(BUILTIN, share_bytes=1).connect() as wire:
        assert wire.ask(prompt_ids=[7] * 2000, max_tokens=100).done is not None
        answer = wire.ask(prompt_ids=[7] * 2100, max_tokens=1)
        assert answer.failed is not None
        assert (answer.failed.status, answer.failed.code) == (507, "insufficient_memory")
        assert "for the 2100 tokens of this request" in answer.failed.message
        assert "at most 2048 tokens fit; shorten it, unload other models, or raise engine.memory_limit" in answer.failed.message
        emitted = [7] * 100
        begun = wire.ask(prompt_ids=[7] * 2000, emitted=emitted, max_tokens=102)
        assert begun.done is not None, "what has begun goes on"


WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}


@pytest.mark.parametrize("config", [{}, WINDOW], ids=["llama", "sliding window"])
def test_what_rows_take_is_what_was_measured_at_one(tmp_path: Path, config: dict[str, Any]) -> None:
    thread = Thread(make_tiny_model(tmp_path / "m", config=config), tmp_path / "view")
    taken: list[tuple[int, float]] = []

    def look(tick: Tick) -> None:
        generation = thread.batch.generator._generation_batch
        if len(generation) == 3 and len(taken) < 5:
            cached = thread.do(lambda tick: sum(cache.nbytes for cache in generation.prompt_cache))
            taken.append((cached, thread.batch.room.rows(3, thread.batch.longest + 1)))

    thread.run([Row(n, [5 + n] * (100 * n + 20), Draw(Sampling(seed=0), 100 * n + 20), 50) for n in range(3)], look)
    assert taken
    for cached, expected in taken:
        assert expected / 2 <= cached <= expected * 1.01


# --- arithmetic ------------------------------------------------------------------------------------------------------------------


def test_the_longest_row_that_fits_is_found() -> None:
    room = Room(share=1_000_000, taken=300_000, layers=[Layer(fixed=1000), Layer(per_token=100), Layer(per_token=50, most=512)])
    assert room.bytes == 560_000
    most = room.most_tokens
    assert room.row(most) <= room.bytes < room.row(most + 1)
    assert Room(share=100, taken=300, layers=[Layer(per_token=1)]).most_tokens == 0
    assert Room(share=100, taken=300, layers=[Layer(per_token=1)], least=2048).most_tokens == 2048
    assert Room(layers=[Layer(per_token=1)]).most_tokens > 10**9
    assert Room(share=1000, layers=[Layer(fixed=10)]).most_tokens > 10**9


def test_the_estimate_of_the_built_in_model_is_what_its_caches_take(builtin: Thread) -> None:
    config = read_json(BUILTIN / "config.json")
    assert estimate.kv_bytes_per_token(config) == BUILTIN_KV_BYTES
    assert builtin.batch.room.row(STEP) == BUILTIN_KV_BYTES * STEP


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}, 28 * 8 * 128 * 2 * 2),
        ({"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "torch_dtype": "float32"}, 12 * 768 * 2 * 4),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768}, 12 * 768 * 2 * 2),
        (
            {"num_hidden_layers": 6, "num_attention_heads": 4, "head_dim": 8, "layer_types": ["full_attention"] + ["x"] * 5},
            4 * 8 * 4,
        ),
        ({"num_hidden_layers": 26, "num_attention_heads": 4, "head_dim": 256, "sliding_window_pattern": 6}, 5 * 4 * 256 * 4),
        (
            {"num_hidden_layers": 2, "num_attention_heads": 128, "hidden_size": 7168, "kv_lora_rank": 512, "qk_rope_head_dim": 64},
            2 * 576 * 2,
        ),
        ({"text_config": {"num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}, "dtype": "float32"}, 2 * 2 * 8 * 8),
        ({"num_hidden_layers": 24, "hidden_size": 768}, 0),
        ({}, 0),
        ({"num_hidden_layers": "many", "num_attention_heads": -1, "head_dim": True}, 0),
        ({"num_hidden_layers": 10**12, "num_attention_heads": 1, "head_dim": 1}, 0),
    ],
)
def test_a_token_of_context_is_estimated_from_the_config(config: dict[str, Any], expected: int) -> None:
    assert estimate.kv_bytes_per_token(config) == expected
