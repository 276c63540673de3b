"""The model thread: it loads one model and steps one continuous batch over it. Nothing else in the process touches MLX.

Owns the model, mlx-lm's batch generator and the prefix index. Told what to do through an inbox; tells what came of it through
`post`, once per step. Knows nothing of sockets or of text.
"""

from __future__ import annotations

import gc
import logging
import queue
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import psutil
from mlx.utils import tree_flatten
from mlx_lm.models import cache as row_caches

from mlxd import estimate
from mlxd.config import Config
from mlxd.engine import bert
from mlxd.engine.embedding import Embedder, Texts, read_pooling
from mlxd.engine.grammar import Grammars
from mlxd.engine.logprobs import Odds
from mlxd.engine.prefix import PrefixIndex
from mlxd.engine.room import Room, measured
from mlxd.engine.sampling import Draw, WrongOutput, generate
from mlxd.engine.view import make_view
from mlxd.logs import words_of
from mlxd.messages import Counters, Load, Sampling
from mlxd.modelfiles import ENCODERS, Broken

log = logging.getLogger(__name__)

#: Where a model's config says how many tokens it was made for; the names differ by family.
CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
    "model_max_length",
)
#: For models that name no length, recurrent ones mostly.
DEFAULT_CONTEXT = 32768

#: MLX keeps freed buffers for the next step, as many as it may: 120 MB for a model of 1 MB.
LEAST_CACHE_LIMIT = 16 * 1024 * 1024

#: Signs, in RuntimeErrors, of a load that failed for want of memory, threads or a disk, not by the model: its files have been looked at before.
#: MLX's CPU allocator does not look at what malloc gives it, and then a read fails.
PASSING = ("alloc", "[read] Unable to read", "Resource temporarily unavailable")

#: For prompts that come again, beside a model so small that half of its weights would hold none.
LEAST_PREFIX_BYTES = 16 * 1024 * 1024


@dataclass(eq=False, slots=True)
class Row:
    """One sequence in the batch. `ids`: what is to be prefilled, the prompt and what an earlier engine emitted; `owner` is the
    caller's own. `max_tokens`: how many more to generate, 1 at least. The model thread writes the rest: `done`, how many of `ids` are in the
    cache; `emitted`, what it has generated since; `accepted`: it has been in the batch, although it may have been put back."""

    owner: Any
    ids: list[int]
    draw: Draw
    max_tokens: int
    uid: int = -1
    done: int = 0
    emitted: list[int] = field(default_factory=list)
    accepted: bool = False

    @property
    def length(self) -> int:
        return len(self.ids) + len(self.emitted)

    def put_back(self) -> None:
        """To begin again where it was: what it has generated is prefilled, and the next token is the one it would have been."""
        self.ids, self.max_tokens = self.ids + self.emitted, self.max_tokens - len(self.emitted)
        self.uid, self.done, self.emitted = -1, 0, []


@dataclass(slots=True)
class Opened:
    """The model is loaded and one token came out of it. `context_length` in tokens; there is no token `vocabulary_size` or above.
    `vector_length`: numbers in an embedding; 0: it gives none, and `no_vectors` says why. `grammars` None: it gives nothing else."""

    tokenizer: Any
    context_length: int
    vocabulary_size: int
    vector_length: int = 0
    no_vectors: str = ""
    grammars: Grammars | None = None

    @property
    def generates(self) -> bool:
        return self.grammars is not None


@dataclass(slots=True)
class Ended:
    """The thread is over. `cause`: "refused" or "error", as in a Bye."""

    cause: str
    text: str


@dataclass(slots=True)
class Tick:
    """What one step brought. Times: of the monotonic clock, ns.

    `accepted`: rows and how many of their tokens the prefix index supplied. `progress`: rows, tokens prefilled so far, of all.
    `tokens`: rows, the token, why it is the last ("stop": it is an end token, "length") or None, and its odds if they are asked for.
    `failed`: rows that ended without a last token, and why, for the client. `read`: texts to be embedded and how many of their tokens are
    read; `embedded`: those that have their vectors.
    """

    began_ns: int
    ended_ns: int = 0
    accepted: list[tuple[Row, int]] = field(default_factory=list)
    progress: list[tuple[Row, int, int]] = field(default_factory=list)
    tokens: list[tuple[Row, int, str | None, Odds | None]] = field(default_factory=list)
    failed: list[tuple[Row, str]] = field(default_factory=list)
    read: list[tuple[Texts, int]] = field(default_factory=list)
    embedded: list[Texts] = field(default_factory=list)


class Batch:
    """`post` is called in the model thread and must not block. `counters` are plain numbers; any thread may read them.

    `admitted`: rows and texts ever given to the model thread, a number of the thread that gives them; `left`: those that it has done with.
    A model thread that hangs leaves a difference, whatever it hangs in, and whether or not anybody still waits for those rows.
    """

    def __init__(self, config: Config, post: Callable[[Opened | Ended | Tick], None]):
        self.config = config
        self.post = post
        self.counters = Counters()
        self.inbox: queue.SimpleQueue[Callable[[Tick], None]] = queue.SimpleQueue()
        self.rows: dict[int, Row] = {}  # by uid, the generator's name for a row; those that came first are first
        self.waiting: deque[Row] = deque()  # for memory
        self.room = Room()
        self.texts: deque[tuple[Texts, Iterator[int], int]] = deque()  # with the work on them, and how many tokens it has read
        self.prefixes = PrefixIndex(0)  # until the model is loaded and says how much
        self.generator: Any = None  # also when the model only embeds
        self.embedder: Embedder | None = None
        self.snapshots = False
        self.prefill_tokens = config.engine.prefill_tokens
        self.admitted = self.left = 0

    # --- for other threads -------------------------------------------------------------------------------------------

    def start(self, load: Load, view: Path) -> None:
        threading.Thread(target=self.run, args=(load, view), name="model", daemon=True).start()

    @property
    def held(self) -> int:
        """Rows that the model thread has or will find in its inbox."""
        return self.admitted - self.left

    @property
    def decoding(self) -> int:
        """Rows whose prompt is done."""
        return len(self.generator._generation_batch) if self.generator else 0

    def admit(self, row: Row) -> None:
        self.admitted += 1
        self.inbox.put(partial(self.queue, row))

    def embed(self, texts: Texts) -> None:
        """Only if the model gives vectors."""
        self.admitted += 1
        self.inbox.put(partial(self.begin, texts))

    def drop(self, row: Row | Texts) -> None:
        """Free its place; harmless when it has ended."""
        if isinstance(row, Texts):
            row.wanted = False
        else:
            self.inbox.put(partial(self.remove, row))

    def probe(self) -> None:
        """One token of our own, to see whether the model thread still gives any."""
        self.admitted += 1
        self.inbox.put(self.sing)

    def limit(self, share_bytes: int) -> None:
        """What this engine may take of memory from now on; rows that run are put back if need be."""
        self.room.share = share_bytes
        mx.set_memory_limit(share_bytes)  # a number under a lock of MLX's allocator; no stream is touched
        self.inbox.put(lambda tick: self.prefixes.shrink(self.room.bytes))  # of an idle engine, too

    # --- the thread ----------------------------------------------------------------------------------------------------

    def run(self, load: Load, view: Path) -> None:
        """Never returns, unless it posts `Ended`: MLX's state after an exception is not to be trusted."""
        try:
            opened = self.open(load, view)
            with mx.stream(self.generator.stream if self.generator else mx.default_device()):
                self.warm_up(opened.tokenizer)
                self.prefixes.max_bytes = int(self.prefix_bytes(opened.context_length) * load.tuning.cache_share)
                self.post(opened)
                while True:
                    self.turn()
        except Broken as error:
            self.post(Ended("refused", without_paths(str(error), load, view)))
        except WrongOutput as error:
            self.post(Ended("error", str(error)))
        except Exception as error:
            log.error("the model thread has failed: %s", words_of(error), exc_info=True)
            self.post(Ended("error", words_of(error)))

    def open(self, load: Load, view: Path) -> Opened:
        """Load the model. Raises Broken when it never will."""
        config = make_view(Path(load.directory), view)
        encodes = config["model_type"] in ENCODERS
        blank_bytes = psutil.Process().memory_info().rss
        self.limit(load.share_bytes)
        try:
            model, config = (bert.load(view, config), config) if encodes else mlx_lm.utils.load_model(view, lazy=True)
            tokenizer = mlx_lm.utils.load_tokenizer(view, eos_token_ids=config.get("eos_token_id"))  # as mlx_lm.load does
            for _, weight in tree_flatten(model.parameters()):
                mx.eval(weight)
                self.counters.loaded += weight.nbytes
        except (MemoryError, Broken):
            raise
        except Exception as error:
            if any(sign in str(error) for sign in PASSING):
                if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
                    raise MemoryError(f"address space is limited (ulimit -v): {error}") from error
                raise
            raise Broken(f"{'mlxd' if encodes else 'mlx-lm'} cannot load it: {type(error).__name__}: {error}") from error
        cache_limit = max(LEAST_CACHE_LIMIT, self.counters.loaded // 8)
        mx.set_cache_limit(cache_limit)
        tuning = load.tuning
        self.prefill_tokens = tuning.prefill_tokens or self.prefill_tokens
        opened = Opened(tokenizer, context_length(config), vocabulary_size(config, tokenizer))
        try:
            self.embedder = Embedder(model, read_pooling(Path(load.directory)))
            opened.vector_length = self.embedder.length
        except Broken as error:
            if encodes:
                raise
            opened.no_vectors = str(error)
        if encodes:
            opened.context_length = model.context_length
            return opened
        opened.grammars = Grammars(tokenizer)
        most = tuning.max_concurrent or self.config.server.max_concurrent
        step_bytes = estimate.prefill_bytes(config, self.prefill_tokens)
        self.room.taken = blank_bytes + self.counters.loaded + cache_limit + step_bytes
        self.room.least = min(opened.context_length, estimate.LEAST_CONTEXT)
        self.generator = generate.BatchGenerator(
            model,
            stop_tokens=[(token,) for token in sorted(tokenizer.eos_token_ids)],
            completion_batch_size=most,
            prefill_batch_size=most,  # the budget of tokens bounds a step, not the rows
            prefill_step_size=self.prefill_tokens,
        )
        self.generator.close()  # puts the wired limit back, which making it has set, and is all that it does
        self.snapshots = not all(type(c) is row_caches.KVCache for c in row_caches.make_prompt_cache(model))
        return opened

    def warm_up(self, tokenizer: Any) -> None:
        """Generate one token. Raises Broken when the model's parts do not fit together."""
        self.greeting = tokenizer.encode("Hi", add_special_tokens=False) or [0]
        try:
            for _ in self.one_token():
                self.counters.loaded += 1  # a first step may compile kernels for minutes
        except WrongOutput as error:
            raise Broken(str(error)) from error
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # MLX's own failures are RuntimeErrors
            raise Broken(f"{'mlx-lm' if self.generator else 'mlxd'} cannot run it: {type(error).__name__}: {error}") from error
        gc.collect()
        gc.freeze()  # some 300,000 objects of the libraries that no collection need look at again

    def one_token(self) -> Iterator[None]:
        """Generate one token for nobody, step by step, in a generator that has no rows; embed one where there is none. Neither prefixes nor
        counters see it."""
        if self.generator is None:
            assert self.embedder is not None
            for _ in self.embedder.embed(Texts(None, [list(self.greeting)]), self.prefill_tokens):
                yield
            return
        self.generator.prefill_batch_size = self.generator.completion_batch_size  # the last step may have left no room for prompts
        self.generator.insert([list(self.greeting)], max_tokens=[1], samplers=[Draw(Sampling(seed=0), len(self.greeting))])
        while not (ended := self.generator.next()[1]):
            yield
        self.room.layers = self.room.layers or measured(ended[0].prompt_cache)

    def turn(self) -> None:
        """Take what is in the inbox, waiting for it if there is nothing to do, and step."""
        tick = Tick(time.monotonic_ns())
        while not self.busy or not self.inbox.empty():
            if not self.busy and self.inbox.empty():
                mx.clear_cache()  # an idle engine keeps no buffers
            self.inbox.get()(tick)
        if self.texts:
            self.read(tick)
        tick.began_ns = time.monotonic_ns()
        self.mind_the_room()
        while self.waiting and self.has_room(self.waiting[0]):
            self.insert(self.waiting.popleft(), tick)
        if self.rows:
            self.step(tick)
        tick.ended_ns = time.monotonic_ns()
        self.post(tick)

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.texts or self.waiting)

    def queue(self, row: Row, tick: Tick) -> None:
        self.waiting.append(row)

    def insert(self, row: Row, tick: Tick) -> None:
        cache, cached = self.prefixes.find(row.ids[:-1])
        (row.uid,) = self.generator.insert(
            [row.ids[cached:]], [row.max_tokens], caches=[cache], all_tokens=[row.ids[:cached]], samplers=[row.draw]
        )
        row.done = cached
        self.rows[row.uid] = row
        self.fit()  # after the index was asked: what it gives may leave no room for what it keeps
        if not row.accepted:
            row.accepted = True
            tick.accepted.append((row, cached))

    def remove(self, row: Row, tick: Tick) -> None:
        if row.uid == -1 and row in self.waiting:
            self.waiting.remove(row)
        elif self.rows.pop(row.uid, None) is None:
            return
        else:
            for cache, tokens in self.generator.remove([row.uid], return_prompt_caches=True).values():
                if row.done:
                    self.prefixes.store(tokens, cache)
        self.counters.finished += 1
        self.left += 1

    def prefix_bytes(self, context_length: int) -> float:
        """What prompts that have been may take: half of the weights, or one prompt as long as the context, if that is more and no more than an
        eighth of our share."""
        whole = min(self.room.row(context_length), self.room.share / 8)
        return self.config.engine.cache_bytes or max(LEAST_PREFIX_BYTES, self.counters.loaded // 2, whole)

    # --- memory --------------------------------------------------------------------------------------------------------

    def has_room(self, row: Row) -> bool:
        """Whether a row can begin beside those that run; alone it always can."""
        return not self.rows or self.room.rows(len(self.rows) + 1, max(row.length, self.longest) + 1) <= self.room.bytes

    def mind_the_room(self) -> None:
        """Put back the rows that came last while all together would take more than there is: they begin again when others have ended. One
        always runs."""
        while not self.fit() and len(self.rows) > 1:
            last = self.rows.popitem()[1]
            self.generator.remove([last.uid])
            last.put_back()
            self.waiting.appendleft(last)
            log.info("a request waits for memory: %d tokens, beside %d others", last.length, len(self.rows))

    def fit(self) -> bool:
        """Whether there is room for the next token of every row; what prefixes take of it they give up."""
        needed = self.room.rows(len(self.rows), self.longest + 1) if self.rows else 0
        self.prefixes.shrink(max(0, self.room.bytes - needed))
        return needed <= self.room.bytes

    @property
    def longest(self) -> int:
        return max((row.length for row in self.rows.values()), default=0)

    def begin(self, texts: Texts, tick: Tick) -> None:
        assert self.embedder is not None
        self.texts.append((texts, self.embedder.embed(texts, self.prefill_tokens), 0))

    def sing(self, tick: Tick) -> None:
        """The canary. With rows in the batch there is work that shows as much."""
        if not self.busy:
            for _ in self.one_token():
                pass
        self.counters.canaries += 1
        self.left += 1

    def read(self, tick: Tick) -> None:
        """One piece, of the texts that have waited longest for one."""
        texts, work, done = self.texts.popleft()
        tokens = next(work, None) if texts.wanted else None
        if tokens is not None:
            self.counters.prefilled += tokens
            tick.read.append((texts, done + tokens))
            self.texts.append((texts, work, done + tokens))
            return
        if texts.wanted:
            tick.embedded.append(texts)
        self.counters.finished += 1
        self.left += 1

    def step(self, tick: Tick) -> None:
        """One step of every row: a token for those that generate, a share of the prefill budget for the others."""
        generator = self.generator
        # Rows in prefill have their caches, too: with those in generation they are no more than may run at once; the others wait.
        generator.prefill_batch_size = generator.completion_batch_size - len(generator._generation_batch)
        prefilling = len(generator._prompt_batch) + len(generator._unprocessed_sequences)
        generator.prefill_step_size = max(1, self.prefill_tokens // max(1, min(prefilling, generator.prefill_batch_size)))
        prompts, tokens = generator.next()
        for response in prompts:
            row = self.rows[response.uid]
            done = len(row.ids) - response.progress[1] + response.progress[0]
            self.counters.prefilled += done - row.done
            row.done = done
            tick.progress.append((row, done, len(row.ids)))
            if self.snapshots and response.end_of_segment and not response.end_of_prompt:
                for cache, held in generator.extract_cache([row.uid]).values():
                    self.prefixes.store(held, cache)
        for response in tokens:
            row = self.rows[response.uid]
            row.emitted.append(response.token)
            odds = response.logprobs.read() if response.logprobs is not None else None
            tick.tokens.append((row, response.token, response.finish_reason, odds))
            if response.finish_reason:
                del self.rows[response.uid]
                self.prefixes.store(response.all_tokens, response.prompt_cache)
                self.counters.finished += 1
                self.left += 1
        self.counters.emitted += len(tokens)
        for row in list(self.rows.values()):
            if row.draw.constraint is not None and row.draw.constraint.error:
                tick.failed.append((row, row.draw.constraint.error))
                self.remove(row, tick)


def without_paths(text: str, load: Load, view: Path) -> str:
    """What a library said of a model, for clients: the names of files, not where they lie."""
    for directory in (str(view), str(Path(load.directory).resolve()), load.directory):
        text = text.replace(f"{directory}/", "").replace(directory, load.model)
    return text


def context_length(config: dict[str, Any]) -> int:
    """How many tokens the model was made for, from its config.json."""
    return first_number(config, CONTEXT_KEYS) or DEFAULT_CONTEXT


def vocabulary_size(config: dict[str, Any], tokenizer: Any) -> int:
    return first_number(config, ("vocab_size",)) or len(tokenizer)


def first_number(config: dict[str, Any], keys: Iterable[str]) -> int | None:
    """The first of `keys` that is a positive whole number, in the config or its part about text."""
    for section in (config, config.get("text_config")):
        for key in keys:
            if isinstance(section, dict) and isinstance(section.get(key), int) and section[key] > 0:
                return int(section[key])
    return None
