"""Engines die under streams, on MLX's stock BLAS and on OpenBLAS, where near ties flip: what holds on any BLAS holds on both.

No token twice, none missing, nothing contradicted that was sent, counted truthfully. On the stock build also: the very bytes. And the setting
`engine.blas`: what is preloaded into engines, and into nothing else.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from asking import Answer, Question, ask
from conftest import Daemon, eventually
from known_answers import LONG, RANDOM
from tokenizers import Tokenizer

import mlxd
from mlxd import config
from mlxd.blas import AUTO, library
from mlxd.errors import ConfigError

BUILTIN = Path(mlxd.__file__).parent / "builtin"
COUNT = "Count from 1 to 100."
TOKENIZER = Tokenizer.from_file(str(BUILTIN / "tokenizer.json"))
KILLS = 2


@pytest.fixture(params=["stock", "openblas"])
def blas(request: pytest.FixtureRequest, daemon: Callable[..., Daemon], home: Path) -> tuple[str, Daemon]:
    """A ready daemon of real parts, and which BLAS its engines use."""
    settings = {}
    if request.param == "openblas":
        if not library(AUTO):
            pytest.skip("OpenBLAS is not installed (Debian: libopenblas0-pthread)")
        settings = {"MLXD_ENGINE_BLAS": AUTO, "OPENBLAS_NUM_THREADS": "1"}
    (home / "models").mkdir()
    settings |= {"MLX_MODELS_DIR": str(home / "models"), "MLX_PRELOAD_MODELS": "mlxd-tiny", "MLXD_SUPERVISOR_DEATHS": "1000"}
    d = daemon(server=None, engine=None, HF_HOME=str(home / "hub"), **settings)
    d.start()
    pid = d.ready()["engines"][0]["pid"]
    if library(AUTO):
        mapped = str(Path(library(AUTO)).resolve()) in Path(f"/proc/{pid}/maps").read_text()
        assert mapped == (request.param == "openblas")
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


# --- the setting -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def harmless() -> str:
    """A library that every process has anyway."""
    if sys.platform != "linux":
        pytest.skip("libraries are preloaded on Linux alone")
    return next(
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libc.so.6" in line or "/libc-" in line
    )


def test_a_library_is_preloaded_into_engines_alone_and_one_that_they_die_of_leads_to_the_setting(
    daemon: Callable[..., Daemon], home: Path, harmless: str
) -> None:
    dying = f"--exit-at-once 127 --first 1 {home}/count"
    d = daemon(server="--want a:latest", engine=dying, MLXD_ENGINE_BLAS=harmless, LD_PRELOAD="/nowhere/of-the-shell.so")
    d.start()
    told = d.until("an engine that lives", lambda s: s["engines"][0]["state"] == "ready" and s["engines"][0]["restarts"])
    (died,) = [record for record in d.exits() if record["child"] == "engine"]
    assert (died["cause"], died["code"]) == ("blas", 127)
    assert died["remedy"].endswith("the library that engine.blas names; set engine.blas to stock, or to another library")
    assert f"it {died['remedy']}" in d.log()
    assert preloaded(told["engines"][0]["pid"]) == [harmless]
    assert preloaded(told["server"]["pid"]) == []


def preloaded(pid: int) -> list[str]:
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return [value for name, _, value in (variable.partition("=") for variable in variables) if name == "LD_PRELOAD"]


def test_a_library_that_cannot_be_preloaded_is_refused_with_its_name(tmp_path: Path, harmless: str) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no library")
    for setting, sentence in {
        "/nowhere/libopenblas.so.0": "cannot read /nowhere/libopenblas.so.0: No such file or directory; install that library, or write stock",
        str(tmp_path): f"cannot read {tmp_path}: Is a directory",
        str(text): f"{text} is no shared library; write stock, auto or the path of one",
        "libopenblas.so.0": "must be stock, auto or the path of a library, from / on and without blanks, not 'libopenblas.so.0'",
        f"{harmless}:{harmless}": "without blanks",
        "": "must be stock, auto or the path of a library",
    }.items():
        with pytest.raises(ConfigError) as refused:
            config.load(tmp_path / "none", [], {"MLXD_ENGINE_BLAS": setting})
        assert str(refused.value).startswith("MLXD_ENGINE_BLAS") and sentence in str(refused.value)
        assert refused.value.exit_status == 78


def test_a_library_is_taken_by_its_path_or_found_and_stock_is_none(tmp_path: Path, harmless: str) -> None:
    assert config.load(tmp_path / "none", [], {}).config.engine.blas == "stock"
    assert config.load(tmp_path / "none", [], {"MLXD_ENGINE_BLAS": harmless}).config.engine.blas == harmless
    assert config.load(tmp_path / "none", [], {"MLXD_ENGINE_BLAS": AUTO}).config.engine.blas == AUTO
    assert (library("stock"), library(harmless)) == ("", harmless)
    assert library(AUTO) == "" or Path(library(AUTO)).is_file()


@pytest.mark.skipif(sys.platform == "linux", reason="Linux preloads")
def test_elsewhere_auto_is_stock_and_a_path_is_refused(tmp_path: Path) -> None:
    assert library(AUTO) == ""
    with pytest.raises(ConfigError, match="libraries are preloaded on Linux alone; write stock"):
        config.load(tmp_path / "none", [], {"MLXD_ENGINE_BLAS": "/usr/lib/libopenblas.dylib"})
