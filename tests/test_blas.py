"""Engines die under streams, on MLX's stock BLAS and on OpenBLAS, where near ties flip: what holds on any BLAS holds on both.

No token twice, none missing, nothing contradicted that was sent, counted truthfully. On the stock build also: the very bytes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from asking import Answer, Question, ask
from conftest import Daemon, eventually
from known_answers import LONG, RANDOM
from tokenizers import Tokenizer

import mlxd

BUILTIN = Path(mlxd.__file__).parent / "builtin"
#: Debian and Ubuntu: the package libopenblas0-pthread.
OPENBLAS = sorted(Path("/usr/lib").glob("*/openblas-pthread/libopenblas.so.0"))
COUNT = "Count from 1 to 100."
TOKENIZER = Tokenizer.from_file(str(BUILTIN / "tokenizer.json"))
KILLS = 2


@pytest.fixture(params=["stock", "openblas"])
def blas(request: pytest.FixtureRequest, daemon: Callable[..., Daemon], home: Path) -> tuple[str, Daemon]:
    """A ready daemon of real parts, and which BLAS its engines use."""
    settings = {}
    if request.param == "openblas":
        if not OPENBLAS:
            pytest.skip("OpenBLAS is not installed (Debian: libopenblas0-pthread)")
        settings = {"LD_PRELOAD": str(OPENBLAS[0]), "OPENBLAS_NUM_THREADS": "1"}
    (home / "models").mkdir()
    settings |= {"MLX_MODELS_DIR": str(home / "models"), "MLX_PRELOAD_MODELS": "mlxd-tiny", "MLXD_SUPERVISOR_DEATHS": "1000"}
    d = daemon(server=None, engine=None, HF_HOME=str(home / "hub"), **settings)
    d.start()
    pid = d.ready()["engines"][0]["pid"]
    if request.param == "openblas" and Path("/proc/self/maps").exists():
        assert str(OPENBLAS[0].resolve()) in Path(f"/proc/{pid}/maps").read_text()
    return request.param, d


class Killer:
    """Kills the engine KILLS times, each time when every stream has moved since it was asked or since the last kill, or has ended."""

    def __init__(self, daemon: Daemon, answers: list[Answer]):
        self.daemon = daemon
        self.answers = answers
        self.seen = dict.fromkeys(answers, 0)  # pieces at the last kill
        self.killed: set[int] = set()
        self.hits = 0  # streams that lost an engine

    def run(self) -> None:
        for _ in range(KILLS):
            eventually(self.moved, "every stream to go on", self.daemon.history)
            pid = eventually(self.victim, "an engine to kill", self.daemon.history)
            self.seen = {answer: len(answer.moved) for answer in self.answers}
            self.hits += sum(not answer.outcome for answer in self.answers)
            os.kill(pid, signal.SIGKILL)
            self.killed.add(pid)

    def moved(self) -> bool:
        """By ten pieces, since what the dead engine had sent may still come. Whole answers do not show it."""
        streams = [answer for answer in self.answers if answer.question.stream]
        return all(answer.outcome or len(answer.moved) > self.seen[answer] + 10 for answer in streams)

    def victim(self) -> int | None:
        engines = self.daemon.status().get("engines", [])
        return next((e["pid"] for e in engines if e["model"] and e["state"] == "ready" and e["pid"] not in self.killed), None)


def ask_under_kills(daemon: Daemon, questions: list[Question]) -> tuple[list[Answer], int]:
    """The answers, and how many times one of them lost its engine."""
    port = daemon.status()["port"]
    answers = [Answer(question) for question in questions]
    killer = Killer(daemon, answers)
    with ThreadPoolExecutor(len(questions) + 1) as pool:
        asked = [pool.submit(ask, port, answer.question, answer=answer) for answer in answers]
        pool.submit(killer.run).result()
        for one in asked:
            one.result()
    return answers, killer.hits


def test_streams_go_on_without_a_gap_or_a_repetition(blas: tuple[str, Daemon]) -> None:
    kind, d = blas
    port = d.status()["port"]
    surest = [Question(text, dialect) for text, dialect in zip(LONG, ["ollama", "openai"], strict=False)]
    for dialect, stream in [("ollama", True), ("openai", False)]:
        surest.append(Question(COUNT, dialect, stream, temperature=0.8, seed=7))  # it never miscounts
    drawn = [Question(RANDOM[1], "generate", temperature=0.8, seed=seed, tokens=200) for seed in range(2)]
    undisturbed = [ask(port, question) for question in drawn if kind == "stock"]

    answers, hits = ask_under_kills(d, surest + drawn)

    assert hits > KILLS
    assert [(answer.outcome, answer.why) for answer in answers] == [("answered", "")] * len(answers)
    for answer in answers[: len(surest)]:
        assert answer.text == LONG[answer.question.text]
    assert len({answer.tokens for answer in answers if answer.question.text == COUNT}) == 1
    for answer in answers[len(surest) :]:
        emitted = answer.last["context"][answer.last["prompt_eval_count"] :]
        assert len(emitted) == answer.tokens
        assert TOKENIZER.decode(emitted) == answer.text
    if kind == "stock":
        assert [answer.text for answer in answers[len(surest) :]] == [answer.text for answer in undisturbed]
