"""A small real client of `python -m mlxd.engine`: the supervisor's end of its link and a server's end of its socket.

Blocking, with a deadline on every wait; what was said so far is in the error when one passes. Also makes tiny models with random
weights, so that an engine can be tested without a trained one.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mlxd import messages
from mlxd.config import Config
from mlxd.link import ChildSettings
from mlxd.messages import (
    Accepted,
    Bye,
    Call,
    Cancel,
    Done,
    Embed,
    Embedded,
    Event,
    Failed,
    Load,
    Loaded,
    Progress,
    Pulse,
    Sampling,
    Step,
    Submit,
    Token,
    TokenLogprob,
)

#: Of memory, where a test is not about it.
PLENTY = 2**40
DEADLINE_S = 30.0
W = TypeVar("W")
GREEDY = Sampling(seed=0)


class EngineProcess:
    """A real engine and the supervisor's end of its link. A context manager: nothing is left of it afterwards."""

    def __init__(
        self, home: Path, config: Config | None = None, environ: dict[str, str] | None = None, script: str = "-m mlxd.engine"
    ):
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        self.link = ours
        self.unread = b""
        self.history: deque[object] = deque(maxlen=50)
        self.socket_path = home / "engine.sock"
        self.log_path = home / "engine.log"
        self.settings = ChildSettings(
            config=config or Config(),
            link_fd=theirs.fileno(),
            slot=0,
            nonce="nonce",
            log=str(self.log_path),
            stack=str(home / "engine.stack"),
            socket=str(self.socket_path),
            view=str(home / "view"),
        )
        os.set_inheritable(theirs.fileno(), True)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *script.split()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | (environ or {}) | {"MLXD_CHILD": msgspec.json.encode(self.settings).decode()},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    # --- the link --------------------------------------------------------------------------------------------------

    def say(self, word: messages.SupervisorWord) -> None:
        self.link.sendall(messages.line(word))

    def word(self, kind: type[W], deadline_s: float = DEADLINE_S) -> W:
        """The next word of `kind`; others before it are passed over. AssertionError when it does not come."""
        deadline = time.monotonic() + deadline_s
        while (word := self.next_word(deadline)) is not None:
            if isinstance(word, kind):
                return word
            assert not isinstance(word, Bye), f"the engine said {word!r} instead of {kind.__name__}\n{self.story()}"
        raise AssertionError(f"no {kind.__name__} in {deadline_s} s\n{self.story()}")

    def next_word(self, deadline: float) -> messages.ChildWord | None:
        """None: the link closed or the deadline passed."""
        while b"\n" not in self.unread:
            self.link.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self.link.recv(65536)
            except (TimeoutError, ConnectionError):
                return None
            if not data:
                return None
            self.unread += data
        line, _, self.unread = self.unread.partition(b"\n")
        word = messages.child_words.decode(line)
        self.history.append(word)
        return word

    def story(self) -> str:
        said = "\n".join(map(repr, self.history))
        return f"words:\n{said}\nlog:\n{self.log_path.read_text(errors='replace')[-4000:]}"

    def load(
        self, directory: Path, model: str = "tiny", deadline_s: float = DEADLINE_S, share_bytes: int = PLENTY
    ) -> EngineProcess:
        self.word(messages.Hello, deadline_s)
        self.say(Load(model, str(directory), share_bytes))
        self.word(messages.Ready, deadline_s)
        return self

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """The exit status."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the engine still runs after {deadline_s} s\n{self.story()}") from None

    def connect(self) -> Wire:
        return Wire(self)


@dataclass
class Result:
    """What became of a job so far."""

    prompt_ids: list[int] = field(default_factory=list)
    cached: int = 0
    continued: bool = True
    ids: list[int] = field(default_factory=list)
    text: str = ""
    thinking: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    done: Done | None = None
    embedded: Embedded | None = None
    failed: Failed | None = None
    events: list[Event] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.done is not None or self.embedded is not None or self.failed is not None

    def take(self, event: Event) -> None:
        assert not self.ended, f"{event!r} after the end {self.done or self.failed!r}"
        self.events.append(event)
        match event:
            case Accepted():
                self.prompt_ids, self.cached, self.continued = event.prompt_ids, event.cached, event.continued
            case Token():
                self.ids += event.ids
                self.logprobs += event.logprobs
                if event.thinking:
                    self.thinking += event.text
                else:
                    self.text += event.text
            case Call():
                self.calls.append((event.name, event.arguments))
            case Done():
                self.done = event
            case Embedded():
                self.embedded = event
            case Failed():
                self.failed = event
            case Progress():
                pass


class Wire:
    """A server's connection to an engine. `results` by job; `pulses` as they came."""

    def __init__(self, engine: EngineProcess):
        self.engine = engine
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE_S)
        self.sock.connect(str(engine.socket_path))
        self.unread = b""
        self.numbers = itertools.count(1)
        self.results: dict[int, Result] = {}
        self.pulses: list[Pulse] = []
        loaded = self.read(time.monotonic() + DEADLINE_S)
        assert isinstance(loaded, Loaded), loaded
        self.loaded = loaded

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, message: messages.ToEngine) -> None:
        self.sock.sendall(messages.frame(message))

    def submit(self, **fields: Any) -> int:
        """Greedy unless `sampling` is given. Returns the job's number."""
        job = next(self.numbers)
        self.results[job] = Result()
        self.send(Submit(**{"job": job, "sampling": GREEDY} | fields))
        return job

    def submit_texts(self, inputs: list[Any], **fields: Any) -> int:
        """To be embedded. Returns the job's number."""
        job = next(self.numbers)
        self.results[job] = Result()
        self.send(Embed(job=job, inputs=inputs, **fields))
        return job

    def embed(self, inputs: list[Any], **fields: Any) -> Result:
        job = self.submit_texts(inputs, **fields)
        self.finish([job])
        return self.results[job]

    def cancel(self, job: int) -> None:
        self.send(Cancel(job))

    def ask(self, **fields: Any) -> Result:
        job = self.submit(**fields)
        self.finish([job])
        return self.results[job]

    def finish(self, jobs: Iterable[int], deadline_s: float = DEADLINE_S) -> None:
        wanted = list(jobs)
        self.until(lambda: all(self.results[job].ended for job in wanted), deadline_s)

    def until(self, true: Any, deadline_s: float = DEADLINE_S) -> None:
        """Read frames until `true()`."""
        deadline = time.monotonic() + deadline_s
        while not true():
            self.step(deadline)

    def step(self, deadline: float) -> None:
        """Read one frame into `results` or `pulses`."""
        message = self.read(deadline)
        if isinstance(message, Step):
            for event in message.events:
                self.results[event.job].take(event)
        elif isinstance(message, Pulse):
            self.pulses.append(message)
        else:
            raise AssertionError(f"{message!r} from the engine; so far {self.results!r}\n{self.engine.story()}")

    def read(self, deadline: float) -> messages.FromEngine | None:
        """The next message; None: the engine closed the connection."""
        header = self.exactly(messages.LENGTH.size, deadline)
        if header is None:
            return None
        body = self.exactly(messages.LENGTH.unpack(header)[0], deadline)
        return None if body is None else messages.from_engine.decode(body)

    def exactly(self, count: int, deadline: float) -> bytes | None:
        while len(self.unread) < count:
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self.sock.recv(65536)
            except ConnectionError:
                return None
            except TimeoutError:
                raise AssertionError(f"no frame in time; so far {self.results!r}\n{self.engine.story()}") from None
            if not data:
                return None
            self.unread += data
        head, self.unread = self.unread[:count], self.unread[count:]
        return head


# --- models with random weights --------------------------------------------------------------------------------------------

TEXT = [
    "The supervisor owns every process, the server owns every request, an engine owns one model.",
    "Привет, мир! Как дела? Всё хорошо. 🙂🚀 日本語のテキスト, naïve café.",
    "<think>One and one is two.</think> STOP END stop words and half of a word; {'json': [1, 2, 3]}\n\nuser assistant system",
] * 4

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(
    directory: Path,
    *,
    template: str | None = TEMPLATE,
    thinking: bool = False,
    config: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """A Llama with random weights, a vocabulary of 512 byte pairs and a context of 1,024. Returns `directory`."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    directory.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>"]
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=512 - 2 * thinking,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if thinking:
        tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    if template:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    shape = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    } | (config or {})
    (directory / "config.json").write_text(json.dumps(shape))
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(shape))
    # Small random weights make nearly flat distributions; larger ones give text that repeats less and is sure of itself.
    weights = {name: w * 3 if w.ndim > 1 else w for name, w in tree_flatten(model.parameters())}
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    return directory


def spoil_row(model: Path, name: str, row: int, value: float) -> Path:
    """Give all of one row of a model's weights this value. Returns `model`."""
    import mlx.core as mx

    file = str(model / "model.safetensors")
    weights = dict(mx.load(file))
    weights[name][row] = value
    mx.eval(weights)
    mx.save_safetensors(file, weights, metadata={"format": "mlx"})
    return model
