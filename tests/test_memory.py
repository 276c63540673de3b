"""Which models are loaded at once: room in memory (REL-13), whose turn it is, what is pinned. Fake engines; weights are holes in files."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fake_ollama import fake_ollama
from server_client import Background, Supervised, make_model, said, supervised, until

from mlxd.messages import Release, Want

MB = 10**6
#: Room for two of the models of 400 MB that the tests have, and not for three.
TWO = {"memory_limit": 1000 * MB}


def weigh(directory: Path, size: int, config: dict[str, Any] | None = None) -> None:
    """A model with weights of so many bytes, most of which no disk holds."""
    size -= size % 1000
    make_model(directory, config)
    header = json.dumps({"w": {"dtype": "I8", "shape": [size // 1000, 1000], "data_offsets": [0, size]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(directory / "model.safetensors", 8 + len(header) + size)


@contextlib.contextmanager
def serving(home: Path, sizes: dict[str, int], **settings: dict[str, Any]) -> Iterator[Supervised]:
    for name, size in sizes.items():
        weigh(home / "models" / name, size)
    with supervised(home, (), **settings) as server:
        yield server


def ask(server: Supervised, model: str, text: str = "n=1", **more: Any) -> httpx.Response:
    with server.client() as client:
        return client.post("/api/chat", json={"model": model, "messages": said(text), "stream": False} | more)


def asking(server: Supervised, model: str, text: str = "n=1") -> Background:
    return Background(lambda: ask(server, model, text))


def models(server: Supervised, kind: type) -> list[str]:
    return [word.model.removesuffix(":latest") for word in server.words if isinstance(word, kind)]


# --- the limit ---------------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_idle_model_goes_when_memory_does_not_hold_all(home: Path) -> None:
    with serving(home, dict.fromkeys("abc", 400 * MB), engine=TWO) as server:
        for model in "abac":
            assert ask(server, model).status_code == 200
        assert models(server, Want) == ["a", "b", "c"]
        assert models(server, Release) == ["b"]
        story = [line for line in server.history if "released" in line or "Want(model='c" in line]
        assert "released" in story[0], story  # the old one was gone before the new one was wanted


DIALECTS: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": said("n=1")},
    "/api/generate": {"prompt": ""},
    "/v1/chat/completions": {"messages": said("n=1")},
    "/v1/responses": {"input": "n=1"},
    "/v1/messages": {"messages": said("n=1"), "max_tokens": 1},
}


def test_a_model_that_can_never_fit_is_a_507_that_says_what_would_in_each_dialect(home: Path) -> None:
    shape = {"num_hidden_layers": 10, "num_attention_heads": 10, "head_dim": 100, "hidden_size": 1000}  # 40 kB a token
    weigh(home / "models" / "long", 970 * MB, shape)
    with serving(home, {"huge": 5000 * MB, "small": 1 * MB}, engine=TWO) as server, server.client() as client:
        for path, fields in DIALECTS.items():
            answer = client.post(path, json={"model": "huge"} | fields)
            assert (answer.status_code, answer.headers["x-should-retry"]) == (507, "false"), answer.text
            told = answer.json()["error"]
            text = told if isinstance(told, str) else told["message"]
            assert "huge:latest cannot be loaded: it needs 5.0" in text
            assert (
                "engine.memory_limit leaves 1.00 GB; raise engine.memory_limit (1.00 GB for all engines), or use a smaller" in text
            )
            assert "context_length" not in text
        told = ask(server, "long").json()["error"]
        assert "0.08 GB for 2048 tokens of context" in told
        assert "; set models.context_length to 4" in told and " at most, which would fit, or raise engine.memory_limit" in told
        assert models(server, Want) == []
        assert ask(server, "small").status_code == 200


def test_a_507_of_an_engine_is_as_final(home: Path) -> None:
    with supervised(home) as server, server.client() as client:
        for path in ("/api/chat", "/v1/chat/completions", "/v1/messages"):
            answer = client.post(path, json={"model": "tiny", "messages": said("fail=507"), "max_tokens": 1, "stream": False})
            assert (answer.status_code, answer.headers["x-should-retry"]) == (507, "false"), answer.text


def test_a_model_larger_than_what_is_available_is_a_507(home: Path) -> None:
    size = psutil.virtual_memory().total * 2
    with serving(home, {"huge": size}, engine={"memory_limit": size * 2}) as server:
        answer = ask(server, "huge")
        assert answer.status_code == 507
        assert "GB are available; end other programs, or use a smaller model" in answer.json()["error"]


def test_the_supervisor_is_told_what_a_preload_needs(home: Path) -> None:
    with serving(home, {"a": 400 * MB}, models={"preload": ["a"]}) as server:
        want = server.expect("a want", lambda word: isinstance(word, Want))
        assert (want.automatic, want.needed_bytes >= 400 * MB) == (True, True)


# --- pinned ------------------------------------------------------------------------------------------------------------------------


def test_a_pinned_model_is_loaded_and_never_goes_for_another(home: Path) -> None:
    sizes = dict.fromkeys("abc", 400 * MB) | {"large": 700 * MB}
    with serving(home, sizes, engine=TWO, models={"pin": ["a"], "keep_alive": "1s"}) as server:
        until("a is loaded", lambda: models(server, Want) == ["a"], server.told)
        for model in "bcb":
            assert ask(server, model).status_code == 200
        told = ask(server, "large")
        assert (told.status_code, "unload a:latest" in told.json()["error"]) == (507, True)
        server.let_pass(3)
        assert "a" not in models(server, Release)
        assert ask(server, "a", keep_alive=0, messages=[]).status_code == 200  # who says so himself unloads it
        until("a is gone", lambda: models(server, Release).count("a") == 1, server.told)
        assert ask(server, "large").status_code == 200


def test_with_as_many_pinned_as_may_be_loaded_another_is_refused(home: Path) -> None:
    with supervised(home, ("a", "b"), models={"pin": ["a"], "max_cached": 1}) as server:
        told = ask(server, "b")
        assert told.status_code == 507
        assert "(MLX_MAX_CACHED_MODELS) is 1, and so many are pinned; unload a:latest" in told.json()["error"]


# --- turns -------------------------------------------------------------------------------------------------------------------------


def test_requests_for_two_models_that_take_turns_are_grouped(home: Path) -> None:
    with supervised(home, ("a", "b"), models={"max_cached": 1}) as server:
        first = asking(server, "a", "n=40 delay=0.05")
        until("a runs", lambda: server.health()["queue"]["running"] == 1, server.told)
        others = [asking(server, model, "n=5") for model in "babababa"]
        assert [call.result().status_code for call in [first, *others]] == [200] * 9
        assert models(server, Want) == ["a", "b"]


def test_a_model_that_is_always_busy_gives_another_its_turn(home: Path) -> None:
    """Two clients never leave it idle; after a quarter of the longest wait it takes no more."""
    settings: dict[str, Any] = {"models": {"max_cached": 1}, "server": {"queue_wait_s": 8.0}}
    with supervised(home, ("a", "b"), **settings) as server:
        done = threading.Event()
        statuses: list[int] = []

        def keep_busy() -> None:
            while not done.is_set():
                statuses.append(ask(server, "a", "n=10 delay=0.05").status_code)

        clients = [Background(keep_busy) for _ in range(2)]
        until("a runs", lambda: server.health()["queue"]["running"] >= 1, server.told)
        answer = ask(server, "b")
        done.set()
        for client in clients:
            client.result()
        assert answer.status_code == 200, answer.text
        assert set(statuses) == {200}
        assert models(server, Want)[:2] == ["a", "b"]


def test_two_models_that_load_slowly_do_not_cancel_each_others_load(home: Path) -> None:
    """Each takes longer to load than its turn is long."""
    settings: dict[str, Any] = {"models": {"max_cached": 1}, "server": {"queue_wait_s": 2.0}}
    with supervised(home, ("held-a", "held-b"), **settings) as server:
        first = asking(server, "held-a")
        until("a is wanted", lambda: models(server, Want) == ["held-a"], server.told)
        second = asking(server, "held-b")
        server.let_pass(1)
        assert models(server, Release) == []
        server.let_up()
        assert first.result().status_code == 200
        until("b is wanted", lambda: models(server, Want) == ["held-a", "held-b"], server.told)
        server.let_up()
        assert second.result().status_code == 200


def test_a_pinned_model_stays_whatever_a_client_says_of_its_keep_alive(home: Path) -> None:
    with supervised(home, models={"pin": ["tiny"]}) as server:
        assert ask(server, "tiny", keep_alive=0.2).status_code == 200
        server.let_pass(2)
        assert models(server, Release) == []


# --- Ollama ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_room", [False, True])
def test_ollama_is_asked_to_unload_its_models_only_if_that_was_allowed(home: Path, make_room: bool) -> None:
    size = psutil.virtual_memory().total * 2
    with fake_ollama(names=()) as neighbour:
        neighbour.loaded = ["theirs:latest"]
        settings: dict[str, Any] = {"ollama": {"url": neighbour.url, "make_room": make_room}}
        with serving(home, {"huge": size}, engine={"memory_limit": size * 2}, **settings) as server:
            call = asking(server, "huge")
            if make_room:
                until("Ollama is asked", lambda: any("generate" in asked.line for asked in neighbour.seen))
            else:
                assert call.result().status_code == 507
        asked = [json.loads(asked.body) for asked in neighbour.seen if "generate" in asked.line]
        assert asked == ([{"model": "theirs:latest", "keep_alive": 0}] if make_room else [])
        call.thread.join()
