"""What operators look at: metrics, the feed of the page, flights, logs; by a server with fake engines."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families as families
from server_client import Supervised, said, supervised, until

from mlxd.exits import Exits, read
from mlxd.history import KEPT, History
from mlxd.messages import Aboard, ExitRecord, Flight
from mlxd.papers import Papers

CHATS = {"ollama": "/api/chat", "openai": "/v1/chat/completions", "anthropic": "/v1/messages"}


@pytest.fixture(scope="module")
def server() -> Iterator[Supervised]:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home)) as server:
        yield server


def ask(server: Supervised, dialect: str, text: str, model: str = "tiny", **more: Any) -> int:
    """The status of an answer."""
    with server.client() as client:
        asked = {"model": model, "messages": said(text), "max_tokens": 100, "stream": False}
        return client.post(CHATS[dialect], json=asked | more).status_code


def scraped(server: Supervised) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample, by name and labels."""
    with server.client() as client:
        told = client.get("/metrics")
    assert (told.status_code, told.headers["content-type"].partition(";")[0]) == (200, "text/plain")
    return {(s.name, frozenset(s.labels.items())): s.value for family in families(told.text) for s in family.samples}


def value(samples: dict[Any, float], name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


def flights(server: Supervised) -> list[dict[str, Any]]:
    with server.client() as client:
        return list(client.get("/ui/flights").json()["flights"])


def told_of(server: Supervised, request_id: str) -> dict[str, Any]:
    return next(flight for flight in flights(server) if flight["id"] == request_id)


# --- metrics ------------------------------------------------------------------------------------------------------------------------


def test_requests_are_counted_by_dialect_model_and_outcome(server: Supervised) -> None:
    before = scraped(server)
    for dialect in CHATS:
        assert ask(server, dialect, "n=3") == 200
    assert ask(server, "ollama", "fail=500") == 500
    assert ask(server, "openai", "n=3", model="nowhere") == 404
    with (
        server.client() as client,
        client.stream("POST", "/api/chat", json={"model": "tiny", "messages": said("n=999 delay=0.05")}) as cut,
    ):
        next(cut.iter_lines())
    after = until(
        "the one that left", lambda: named if value(named := scraped(server), "mlxd_requests_total", **LEFT) else None, server.told
    )

    def more(**labels: str) -> float:
        return value(after, "mlxd_requests_total", **labels) - value(before, "mlxd_requests_total", **labels)

    tiny = {"model": "tiny:latest"}
    assert [more(dialect=dialect, outcome="done", **tiny) for dialect in CHATS] == [1, 1, 1]
    assert (more(dialect="ollama", outcome="failed", **tiny), more(**LEFT)) == (1, 1)
    assert more(dialect="openai", outcome="refused", model="") == 1
    assert value(after, "mlxd_generated_tokens_total", **tiny) - value(before, "mlxd_generated_tokens_total", **tiny) >= 9
    assert (
        value(after, "mlxd_time_to_first_token_seconds_count", **tiny)
        - value(before, "mlxd_time_to_first_token_seconds_count", **tiny)
        == 4
    )


LEFT = {"dialect": "ollama", "model": "tiny:latest", "outcome": "left"}


def test_a_resume_and_its_pause_are_counted(server: Supervised) -> None:
    before = scraped(server)
    assert ask(server, "ollama", "n=6 die=3") == 200
    after = scraped(server)
    assert value(after, "mlxd_resumes_total", model="tiny:latest") - value(before, "mlxd_resumes_total", model="tiny:latest") == 1
    assert value(after, "mlxd_pause_seconds_count") - value(before, "mlxd_pause_seconds_count") == 1


def test_no_counter_falls_when_an_engine_dies_and_tokens_that_are_only_counted_are_none(server: Supervised) -> None:
    before = scraped(server)
    with server.client() as client:
        asked = {"model": "tiny", "messages": said("n=3"), "max_tokens": 5}
        assert client.post("/v1/messages/count_tokens", json=asked).status_code == 200
    assert value(scraped(server), "mlxd_prompt_tokens_total", model="tiny:latest") == value(
        before, "mlxd_prompt_tokens_total", model="tiny:latest"
    )
    with server.client() as client:
        told = client.post("/api/embed", json={"model": "tiny", "input": ["abc", "de"]})
        assert told.status_code == 200
    more = value(scraped(server), "mlxd_prompt_tokens_total", model="tiny:latest")
    assert more - value(before, "mlxd_prompt_tokens_total", model="tiny:latest") == told.json()["prompt_eval_count"] > 0


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=abc", "text/plain; version=; q=x", "*/*"])
def test_an_odd_wish_for_a_format_gets_the_usual_one(server: Supervised, accept: str) -> None:
    with server.client() as client:
        told = client.get("/metrics", headers={"Accept": accept})
    assert (told.status_code, told.headers["content-type"].partition(";")[0]) == (200, "text/plain")


def test_a_thousand_names_that_clients_make_up_make_no_label(server: Supervised) -> None:
    assert ask(server, "openai", "n=1", model="nowhere-first") == 404
    before = set(scraped(server))
    with server.client() as client:
        for number in range(1000):
            asked = {"model": f"nowhere-{number}", "messages": said("n=1")}
            assert client.post("/v1/chat/completions", json=asked).status_code == 404
        assert set(scraped(server)) == before
        for number in range(30):  # names that exist, and are other names of one model
            client.post("/api/copy", json={"source": "tiny", "destination": f"copy-{number}"})
            assert (
                client.post("/api/chat", json={"model": f"copy-{number}", "messages": said("n=1"), "stream": False}).status_code
                == 200
            )
            client.request("DELETE", "/api/delete", json={"model": f"copy-{number}"})
    assert {dict(labels)["model"] for _, labels in scraped(server) if "model" in dict(labels)} == {"", "tiny:latest"}


def test_prometheus_itself_takes_what_it_is_given(server: Supervised) -> None:
    ask(server, "ollama", "n=2")
    with server.client() as client:
        text = client.get("/metrics").text
        both = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert both.headers["content-type"].startswith("application/openmetrics-text")
    assert {family.name for family in open_families(both.text)} >= {"mlxd_requests", "mlxd_health", "mlxd_supervisor_up"}
    if promtool := shutil.which("promtool"):
        checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_without_a_supervisor_its_part_is_left_out(server: Supervised) -> None:
    samples = scraped(server)
    assert value(samples, "mlxd_supervisor_up") == 0
    assert not any(name.startswith("mlxd_exits") for name, _ in samples)
    assert value(samples, "mlxd_health", status="ok") == 1


# --- flights ------------------------------------------------------------------------------------------------------------------------


def test_a_flight_tells_every_phase_and_no_word(server: Supervised) -> None:
    with server.client() as client:
        asked = {"model": "tiny", "messages": said("n=6 die=3 my secret")}
        answer = client.post("/api/chat", json=asked | {"stream": False}, headers={"X-Request-Id": "lost-and-found"})
        assert answer.status_code == 200
        refused = client.post("/api/chat", json=asked | {"messages": said("fail=400")}, headers={"X-Request-Id": "refused-one"})
        assert refused.status_code == 400
        text = client.get("/ui/flights").text
    flight = told_of(server, "lost-and-found")
    assert [phase for phase, _ in flight["phases"]] == ["queued", "prefill", "decode", "lost", "prefill", "decode", "ended"]
    assert [ms for _, ms in flight["phases"]] == sorted(ms for _, ms in flight["phases"])
    assert (flight["outcome"], flight["status"], flight["resumes"], flight["completion_tokens"]) == ("done", 200, 1, 6)
    assert (flight["path"], flight["model"]) == ("/api/chat", "tiny:latest")
    assert (told_of(server, "refused-one")["outcome"], told_of(server, "refused-one")["status"]) == ("refused", 400)
    assert "secret" not in text


def test_the_supervisor_learns_which_requests_an_engine_took_with_it(server: Supervised) -> None:
    seen = server.count(Aboard)
    with server.client() as client:
        asked = {"model": "tiny", "messages": said("n=6 die=3"), "stream": False}
        client.post("/api/chat", json=asked, headers={"X-Request-Id": "aboard-1"}).raise_for_status()
    until("the word", lambda: server.count(Aboard) > seen, server.told)
    word = next(word for word in reversed(server.words) if isinstance(word, Aboard))
    assert [(flight.id, flight.phases[-1][0], flight.outcome) for flight in word.flights] == [("aboard-1", "lost", None)]


def test_the_last_two_hundred_are_kept(server: Supervised) -> None:
    with server.client() as client:
        for number in range(210):
            body = {"model": "tiny", "messages": said("n=1"), "stream": False}
            client.post("/api/chat", json=body, headers={"X-Request-Id": f"kept-{number}"}).raise_for_status()
    assert [flight["id"] for flight in flights(server)] == [f"kept-{number}" for number in reversed(range(10, 210))]


# --- the feed -----------------------------------------------------------------------------------------------------------------------


def events(server: Supervised, client: Any, stack: contextlib.ExitStack) -> Iterator[tuple[str, Any]]:
    lines = stack.enter_context(client.stream("GET", "/ui/feed")).iter_lines()
    for line in lines:
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def test_the_feed_begins_with_the_past_and_goes_on_with_the_present(server: Supervised) -> None:
    with server.client() as client, contextlib.ExitStack() as stack:
        told = events(server, client, stack)
        name, past = next(told)
        assert name == "history" and len(past["samples"]) <= KEPT
        name, now = next(told)
        assert (name, now["word"], now["status"], now["incidents"]) == ("now", "ok", None, [])  # no supervisor answers here
        assert now["queue"] == {"slots": 32, "seats": 512, "running": 0, "waiting": 0}
        assert "tiny:latest" in {model["name"] for model in now["models"]}
        with (
            server.client() as other,
            other.stream("POST", "/api/chat", json={"model": "tiny", "messages": said("n=99 delay=0.05")}),
        ):
            for _, now in told:
                if now["requests"] and now["requests"][0]["phases"][-1][0] == "decode" and now["sample"]["running"]:
                    break
        assert now["queue"]["running"] == 1 and now["requests"][0]["outcome"] is None


def test_a_server_that_drains_ends_its_feeds(home: Path) -> None:
    with supervised(home) as server, server.client() as client, contextlib.ExitStack() as stack:
        told = events(server, client, stack)
        assert next(told)[0] == "history"
        server.process.terminate()
        assert [name for name, _ in told].count("history") == 0
        assert server.process.wait(60) == 0


# --- logs ---------------------------------------------------------------------------------------------------------------------------


def test_the_end_of_a_log_is_told_and_cannot_drive_a_terminal(server: Supervised) -> None:
    with open(server.home / "engine-7.log", "w") as log:
        log.write("one\n\x1b[31mtwo\nthree\n")
    with server.client() as client:
        told = client.get("/ui/log", params={"of": "engine-7", "lines": "2"}).json()
    assert told == {"of": "engine-7", "names": ["engine-7", "server"], "lines": ["\\x1b[31mtwo", "three"]}


@pytest.mark.parametrize(
    ("query", "status", "why"),
    [
        ("of=../token", 404, "there is no log of that name; there are"),
        ("of=server.log", 404, "there is no log of that name; there are"),
        ("", 404, "there is no log of that name; there are"),
        ("of=server&lines=0", 400, "lines must be a number from 1 to 2000"),
        ("of=server&lines=99999999999999999999", 400, "lines must be a number from 1 to 2000"),
        ("of=server&lines=%D9%A1", 400, "lines must be a number from 1 to 2000"),
        ("of=server&lines=-5", 400, "lines must be a number from 1 to 2000"),
    ],
)
def test_no_other_file_and_no_other_number_is_a_log(server: Supervised, query: str, status: int, why: str) -> None:
    with server.client() as client:
        told = client.get(f"/ui/log?{query}")
    assert told.status_code == status and told.json()["error"].startswith(why)


# --- figures ------------------------------------------------------------------------------------------------------------------------


def test_history_has_rates_between_its_samples_and_forgets_what_is_old() -> None:
    history = History()
    for second in range(0, 2 * KEPT + 10, 2):
        assert history.due(1000.0 + second) and not (second and history.due(1000.0 + second - 1))
        history.take(1000.0 + second, 10 * second, 4 * second, 1, 0, 5, 6)
    assert len(history.samples) == KEPT
    assert {(sample.tokens_s, sample.prompt_tokens_s) for sample in history.samples} == {(10.0, 4.0)}


def test_a_clock_that_was_set_back_stops_no_history() -> None:
    history = History()
    history.take(1000.0, 0, 0, 0, 0, 0, 0)
    assert history.due(500.0)
    history.take(500.0, 100, 0, 0, 0, 0, 0)
    assert [sample.tokens_s for sample in history.samples] == [0.0, 0.0]


# --- what servers tell of engines -------------------------------------------------------------------------------------------------------


def test_flights_find_the_record_of_their_engine_and_no_other(home: Path) -> None:
    found = Exits(home / "exits.jsonl", Papers())
    found.hear(Aboard(7, [flight(n) for n in range(100)]))
    found.add(record("server", 7))
    assert found.last and found.last.flights == []
    found.add(record("engine", 7))
    assert len(found.last.flights) == 64
    found.hear(Aboard(7, [flight(1)]))
    assert len(found.last.flights) == 64
    found.add(record("engine", 8))
    found.hear(Aboard(8, [flight(1)]))
    assert [one.id for one in found.last.flights] == ["r1"]
    assert [[one.id for one in each.flights] for each in read(home / "exits.jsonl")][-1] == ["r1"]
    assert found.counts == {"server": {"killed": 1}, "engine": {"killed": 2}}


def flight(number: int) -> Flight:
    return Flight(
        id=f"r{number}", path="/api/chat", model="m:latest", at=1.0, outcome=None, status=0, phases=[("queued", 0)],
        prompt_tokens=0, cached_tokens=0, completion_tokens=0, resumes=0,
    )  # fmt: skip


def record(child: str, pid: int) -> ExitRecord:
    return ExitRecord(
        ts="2026-01-01T00:00:00.000000Z", child=child, slot=1, pid=pid, model=None, cause="killed", signal=9, code=None,
        up_s=1.0, memory_bytes=1, running=0, text="",
    )  # fmt: skip
