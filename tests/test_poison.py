"""Requests that engines do not survive, and models whose engines keep dying: who is refused, when, and in which words."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Daemon, eventually
from server_client import FAKE, Background, Supervised, make_model, supervised, until

from mlxd.errors import Refused
from mlxd.journal import MOST_BYTES, MOST_POISONS, Journal, Request
from mlxd.messages import Accepted, Event, Sampling, Submit, Token, Want
from mlxd.models import BUILTIN, Catalogue
from mlxd.pool import FAULTLESS

PATHS = ["/api/chat", "/v1/chat/completions"]


def words(n: int) -> str:
    return "".join(f"w{i} " for i in range(n))


def ask(server: Supervised, path: str, text: str, **more: Any) -> httpx.Response:
    with server.client() as client:
        call = {"model": "tiny", "messages": [{"role": "user", "content": text}], "stream": False}
        return client.post(path, json=call | more)


def error(answer: httpx.Response) -> str:
    told = answer.json()["error"]
    return told if isinstance(told, str) else told["message"]


def content(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    told = answer.json()
    return told["message"]["content"] if "message" in told else told["choices"][0]["message"]["content"]  # type: ignore[no-any-return]


def running(server: Supervised) -> int:
    return sum(engine["running"] for engine in server.health()["engines"])


# --- poison ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_third_death_is_answered_with_its_cause_and_then_nobody_may_ask_the_same(home: Path, path: str) -> None:
    with supervised(home) as server:
        server.usual_cause = "segfault"
        neighbour = Background(lambda: ask(server, path, "n=40 delay=0.05"))
        until("the neighbour", lambda: running(server) == 1, server.told)
        poisoned = [ask(server, path, "poison", stream=True)]
        poisoned += [ask(server, other, "poison", stream=stream, seed=1) for other in PATHS for stream in (True, False)]
        for answer in poisoned:
            assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "false")
            assert error(answer).startswith(
                "the engine died 3 times in a row while it worked on this request: segfault; it is refused"
            )
        assert poisoned[3].json()["error"]["code"] == "engine_crashed"
        assert error(poisoned[0]).endswith("for 600 s")
        assert content(ask(server, path, "n=2")) == words(2)
        assert content(neighbour.result()) == words(40)
        assert len(server.engines) == 4  # the last one is the neighbour's


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_that_had_begun_ends_with_the_cause(home: Path, path: str) -> None:
    with supervised(home) as server:
        server.usual_cause = "out of memory"
        lines = [line for line in ask(server, path, "n=9 wall=3", stream=True).text.splitlines() if line]
        assert "w2 " in lines[2] and len(server.engines) >= 3
        told = json.loads(lines[-1].removeprefix("data: "))["error"]
        sentence = told if isinstance(told, str) else told["message"]
        assert "died 3 times in a row" in sentence and "out of memory" in sentence
        assert isinstance(told, str) or told["code"] == "engine_crashed"
        assert ask(server, path, "n=9 wall=3").status_code == 500


def test_prefill_that_an_earlier_engine_had_done_is_no_progress(home: Path) -> None:
    with supervised(home) as server:
        assert "died 3 times in a row" in error(ask(server, PATHS[0], "n=3 prefill wall=0"))
        assert len(server.engines) <= 4


def test_poison_is_let_in_again_after_its_time(home: Path) -> None:
    with supervised(home, server={"poison_s": 0.5}) as server:
        assert ask(server, PATHS[0], "poison").status_code == 500
        engines = len(server.engines)
        until("another try", lambda: ask(server, PATHS[0], "poison") and len(server.engines) > engines, server.told)


def test_ends_that_are_nobodys_fault_are_not_held_against_a_request(home: Path) -> None:
    with supervised(home) as server:
        call = Background(lambda: ask(server, PATHS[0], "n=2 first=1"))
        for number, cause in enumerate(FAULTLESS):
            until("the job", lambda number=number: len(server.engines) > number and running(server) == 1, server.told)
            server.kill_cause = cause
            server.engines[number].kill()
        answer = call.result()
        assert content(answer) == words(2)
        assert answer.headers["x-mlxd-resumed"] == str(len(FAULTLESS))


def test_the_real_engine_killed_three_times_under_one_request_is_not_given_it_again() -> None:
    def only_accepted(submit: Submit, seen: list[Event], event: Event) -> bool:
        return isinstance(event, Accepted)

    unpinged = {"ping_s": 3600}
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home), (), server=unpinged) as server:
        server.kill_cause = "segfault"
        server.passes = only_accepted
        call = Background(lambda: ask(server, PATHS[1], "What is mlxd?", model="mlxd-tiny", stream=True))
        for number in range(3):
            until("the job", lambda number=number: len(server.engines) > number and running(server) == 1, server.told)
            server.engines[number].kill()
        answer = call.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_crashed")
        assert "segfault" in error(answer)
        server.passes = None
        assert error(ask(server, PATHS[0], "What is mlxd?", model="mlxd-tiny")).startswith(error(answer).partition(";")[0])
        assert "died" not in ask(server, PATHS[0], "What is MLX?", model="mlxd-tiny").text


def a_request(text: str, seed: int = 0) -> Request:
    model = Catalogue("/nowhere").find(BUILTIN)
    return Request(model=model, sampling=Sampling(seed=seed), messages=[{"role": "user", "content": text}])


def test_a_resumed_request_is_the_tokens_it_became_and_whether_the_answer_goes_on_with_them() -> None:
    with Journal(600.0).keep(a_request("a"), 0, 1) as entry:
        first = entry.submit(1, "digest")
        entry.note(Accepted(1, [1, 2], 0, continued=False))
        second = entry.submit(2, "digest")
        assert (first.prompt_ids, first.messages) == (None, entry.request.messages)
        assert (second.prompt_ids, second.messages, second.continued) == ([1, 2], None, False)


def test_progress_clears_a_request_also_under_an_engine_that_ends_by_nobodys_fault() -> None:
    with Journal(600.0).keep(a_request("a"), 0, 1) as entry:
        for number in range(4):
            entry.submit(2 * number, "digest")
            entry.outlive("aborted")
            entry.submit(2 * number + 1, "digest")
            entry.note(Token(2 * number + 1, ids=[1], text="a"))  # and then somebody kills the engine, which is not told here
        for number in range(2):
            entry.submit(10 + number, "digest")
            entry.outlive("aborted")
        assert entry.suspect
        with pytest.raises(Refused, match="3 times in a row"):
            entry.outlive("aborted")


def test_the_table_of_poisons_is_bounded_and_the_oldest_goes_first() -> None:
    journal = Journal(600.0)
    for number in range(MOST_POISONS + 1):
        journal.condemned(a_request(str(number)), "segfault")
    assert len(journal.poisons) == MOST_POISONS
    journal.refuse_poison(a_request("0"))
    with pytest.raises(Refused, match="segfault"):
        journal.refuse_poison(a_request("1", seed=7))


def test_what_is_in_hand_is_bounded_and_gone_at_its_end() -> None:
    journal = Journal(600.0)
    with journal.keep(a_request("a"), 0, MOST_BYTES) as entry:
        assert journal.entries == {entry}
        with pytest.raises(Refused) as refused, journal.keep(a_request("b"), 0, 1):
            pass
        assert (refused.value.status, refused.value.retry_s) == (503, 1)
    assert (journal.entries, journal.held_bytes) == (set(), 0)
    with journal.keep(a_request("b"), 0, 2 * MOST_BYTES):  # alone, it fits whatever its size
        pass


# --- the breaker -------------------------------------------------------------------------------------------------------------------


def test_requests_in_flight_when_a_model_is_given_up_for_a_while_are_told_when_to_come_again(home: Path) -> None:
    with supervised(home) as server:
        calls = {
            (path, stream): Background(lambda path=path, stream=stream: ask(server, path, "n=1000 delay=0.05", stream=stream))
            for path in PATHS
            for stream in (True, False)
        }
        until("the jobs", lambda: running(server) == 4 and server.emitted() > 4, server.told)
        server.next, server.retry_s, server.kill_cause = "retried", 200.0, "out of memory"
        server.engines[0].kill()
        for (_, stream), call in calls.items():
            answer = call.result()
            if stream:
                lines = [line for line in answer.text.splitlines() if line]
                assert "w0 " in lines[0]
                assert "out of memory" in lines[-1] and "error" in lines[-1]
            else:
                assert (answer.status_code, "out of memory" in error(answer)) == (503, True)
                assert 190 <= int(answer.headers["retry-after"]) <= 200
        assert ask(server, PATHS[0], "n=1", keep_alive=0).status_code == 503
        assert ask(server, PATHS[0], "n=1", keep_alive=0).headers["retry-after"] > "190"
        assert server.count(Want) == 1  # forgetting the model must not be a way round
        server.next, server.retry_s = "replaced", 0.0
        server.bring_up("tiny:latest")
        until("an answer", lambda: ask(server, PATHS[0], "n=1").status_code == 200, server.told)


def test_who_waits_in_the_queue_is_told_as_soon_as_his_turn_comes(home: Path) -> None:
    with supervised(home, server={"max_concurrent": 1}) as server:
        calls = [Background(lambda: ask(server, PATHS[0], "n=1000 delay=0.05")) for _ in range(4)]
        until("one to run", lambda: server.health()["queue"] == {"running": 1, "waiting": 3}, server.told)
        server.next, server.retry_s, server.kill_cause = "retried", 200.0, "out of memory"
        server.engines[0].kill()
        for call in calls:
            answer = call.result()
            assert (answer.status_code, answer.headers["retry-after"] > "190") == (503, True)
        assert server.health()["queue"] == {"running": 0, "waiting": 0}


def test_requests_wait_for_a_try_that_is_near_and_go_on_with_it(home: Path) -> None:
    with supervised(home) as server:
        call = Background(lambda: ask(server, PATHS[0], "n=30 delay=0.05"))
        until("the job", lambda: running(server) == 1 and server.emitted() > 0, server.told)
        server.next, server.retry_s = "retried", 1.0
        server.engines[0].kill()
        until("the news", lambda: server.health()["engines"][0]["state"] == "retried", server.told)
        later = Background(lambda: ask(server, PATHS[1], "n=2"))
        until("both", lambda: server.health()["requests"]["in_hand"] == 2, server.told)
        server.let_pass(beats=2)
        server.bring_up("tiny:latest")
        assert content(call.result()) == words(30)
        assert content(later.result()) == words(2)


def test_a_model_whose_engine_keeps_dying_is_refused_at_once_and_tried_again_after_the_cool_down(
    daemon: Callable[..., Daemon], home: Path
) -> None:
    model = make_model(home / "models" / "dies-loading")
    d = daemon(
        server=None,
        engine=None,
        MLXD_ENGINE_COMMAND=f"{sys.executable} {FAKE}",
        MLX_MODELS_DIR=str(home / "models"),
        MLX_QUEUE_WAIT_TIMEOUT="1",
        MLXD_SUPERVISOR_DEATHS="2",
        MLXD_SUPERVISOR_COOLDOWN_S="4",
    )
    d.start()
    port = d.ready()["port"]

    def post(text: str) -> httpx.Response:
        call = {"model": "dies-loading", "messages": [{"role": "user", "content": text}], "stream": False}
        return httpx.post(f"http://127.0.0.1:{port}/api/chat", json=call, timeout=60, trust_env=False, verify=False)

    waiting = [Background(lambda: post("n=1")) for _ in range(3)]
    for call in waiting:
        answer = call.result()
        assert answer.status_code == 503, answer.text
        assert 1 <= int(answer.headers["retry-after"]) <= 4
        assert "dies-loading" in answer.json()["error"]
    assert len([record for record in d.exits() if record["child"].startswith("engine")]) == 2
    at_once = post("n=1")
    assert (at_once.status_code, "retry-after" in at_once.headers) == (503, True)
    (model / "healed").touch()
    d.until("the trial", lambda s: [e["state"] for e in s["engines"] if e["model"]] == ["ready"])
    lost = post("poison")  # the one try of a cool-down dies: the next one is as far away
    assert (lost.status_code, "retry-after" in lost.headers) == (503, True)
    answer = eventually(lambda: (found := post("n=2")).status_code == 200 and found, "the next trial", d.history)
    assert answer.json()["message"]["content"] == words(2)


def test_a_model_replaced_in_place_never_mixes_its_words_with_those_of_the_old_one(home: Path) -> None:
    with supervised(home) as server:
        begun = Background(lambda: ask(server, PATHS[1], "n=60 delay=0.05"))
        waiting = Background(lambda: ask(server, PATHS[0], "n=3 first=2"))
        until("both", lambda: running(server) == 2 and server.emitted() > 1, server.told)
        shutil.copy(home / "models" / "tiny" / "config.json", home / "models" / "tiny" / "more.json")
        server.engines[0].kill()
        assert content(waiting.result()) == words(3)
        answer = begun.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_changed")
