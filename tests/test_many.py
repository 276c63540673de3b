"""Two real models of different families at once: served, swapped, evicted, pinned, killed, with right answers throughout."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, eventually
from known_answers import KNOWN, LONG
from test_mlxd import BUILTIN, LONGEST, Stream, chat, post, real_settings

SECOND = Path(__file__).with_name("second")
ANSWERS: dict[str, str] = json.loads((SECOND / "answers.json").read_text())
COUNT = "Count from 1 to 40."


@pytest.fixture(scope="module")
def both() -> Iterator[Daemon]:
    """The built-in model, `second`, and `third`, which is the built-in one by another name; what may be loaded is set by `settle`."""
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home:
        d = Daemon(Path(home), **real_settings(Path(home)))
        shutil.copytree(SECOND, Path(home) / "models" / "second")
        shutil.copytree(BUILTIN, Path(home) / "models" / "third")
        settle(d, max_cached=2)
        with d.running():
            yield d


def settle(d: Daemon, **models: Any) -> None:
    """Change [models]; wait until a running server has it."""
    before = d.status().get("server", {}).get("pid")
    lines = [f"{key} = {json.dumps(value)}" for key, value in models.items()]
    d.paths.config.write_text("\n".join(["[models]", 'preload = ["mlxd-tiny"]', *lines, ""]))
    if before and d.mlxd("reload").returncode == 0:
        d.until("another server", lambda s: s["server"]["pid"] != before and s["server"]["state"] == "ready")


def loaded(d: Daemon) -> dict[str, int]:
    """Model -> process."""
    return {e["model"].removesuffix(":latest"): e["pid"] for e in d.status()["engines"] if e["state"] == "ready" and e["model"]}


def said(port: int, model: str, question: str) -> str:
    return str(chat(port, question, model)["message"]["content"])


def right(question: str, model: str) -> str:
    return ANSWERS[question] if model == "second" else KNOWN[question]


def questions(count: int) -> list[tuple[str, str]]:
    """Of both models, in turns."""
    ours = [(question, "mlxd-tiny") for question in list(KNOWN)[:count]]
    theirs = [(question, "second") for question in list(ANSWERS)[:count]]
    return [one for pair in zip(ours, theirs, strict=True) for one in pair]


def ask_all(port: int, asked: list[tuple[str, str]]) -> list[str]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda one: said(port, one[1], one[0]), asked))


def test_both_answer_at_once_and_each_in_its_own_words(both: Daemon) -> None:
    port = both.status()["port"]
    asked = questions(12)
    assert ask_all(port, asked) == [right(*one) for one in asked]
    assert set(loaded(both)) == {"mlxd-tiny", "second"}
    status, _, body = post(port, "/api/show", b'{"model":"second"}')
    told = json.loads(body)
    assert status == 200
    assert (told["details"]["family"], told["details"]["quantization_level"]) == ("qwen3", "4bit")
    assert told["capabilities"] == ["completion"]


def test_an_engine_of_one_is_killed_under_a_stream_and_the_other_does_not_notice(both: Daemon) -> None:
    port = both.status()["port"]
    said(port, "second", COUNT)
    before = loaded(both)
    stream, other = Stream(port, COUNT, model="second"), Stream(port, LONGEST)
    pieces, words = stream.pieces(), other.pieces()
    text = next(pieces) + next(pieces)
    begun = next(words)
    os.kill(before["second"], signal.SIGKILL)
    assert text + "".join(pieces) == ANSWERS[COUNT]
    assert begun + "".join(words) == LONG[LONGEST]
    both.until("both are there", lambda _: set(loaded(both)) == {"mlxd-tiny", "second"})
    assert loaded(both)["mlxd-tiny"] == before["mlxd-tiny"]
    assert loaded(both)["second"] != before["second"]


def test_with_room_for_one_they_are_swapped_under_load_and_every_answer_is_right(both: Daemon) -> None:
    settle(both, max_cached=1)
    both.until("one has gone", lambda _: len(loaded(both)) == 1)
    port = both.status()["port"]
    most: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            engines = both.status().get("engines", [])
            most.append(sum(e["model"] is not None and e["state"] in ("loading", "ready") for e in engines))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        asked = questions(10)
        assert ask_all(port, asked) == [right(*one) for one in asked]
    finally:
        done.set()
        watcher.join()
    assert max(most) == 1  # the old one is gone before the new one loads
    assert {record["cause"] for record in both.exits()} <= {"stopped", "killed"}
    assert len(loaded(both)) == 1


def test_the_least_used_goes_and_what_is_pinned_stays(both: Daemon) -> None:
    settle(both, max_cached=2, pin=["second"])
    port = both.status()["port"]
    eventually(lambda: "second" in loaded(both), "second is loaded", both.history)
    pid = loaded(both)["second"]
    for model in ("mlxd-tiny", "third", "mlxd-tiny", "third"):
        assert said(port, model, "What is mlxd?") == KNOWN["What is mlxd?"]
        assert set(loaded(both)) == {"second", model}
    assert loaded(both)["second"] == pid
    assert said(port, "second", COUNT) == ANSWERS[COUNT]


def test_a_model_copied_in_is_there_when_it_is_whole_and_not_before(both: Daemon) -> None:
    port = both.status()["port"]
    directory = both.home / "models" / "fourth"
    directory.mkdir()

    def listed() -> bool:
        told = json.loads(both.get("/api/tags")[2])["models"]
        return any(model["name"] == "fourth:latest" for model in told)

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(SECOND / name, directory / name)
        assert not listed()
    weights = (SECOND / "model.safetensors").read_bytes()
    for part in (1, 2, 3):
        (directory / "model.safetensors").write_bytes(weights[: len(weights) * part // 3 - (part < 3)])
        assert listed() is (part == 3)
    assert said(port, "fourth", COUNT) == ANSWERS[COUNT]
