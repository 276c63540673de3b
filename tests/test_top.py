"""What `mlxd top` makes of what it is told: pure, without a server. In a terminal, beside a real one: test_terminal.py."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from mlxd.cli.top import ASCII_BARS, BARS, Feed, picture, sentence_of, snapshot, sparkline
from mlxd.errors import MlxdError, Refused

HOSTILE = "[bold red]\x1b[2J\x9b31m[/]\r\n\x07\u202e"
#: The same, where it drives nobody.
SEEN = r"[bold red]\x1b[2J\x9b31m[/]\r\n\x07\u202e"
PROCESS = {"pid": 7, "state": "ready", "up_s": 4000.0, "restarts": 1, "memory_bytes": 34_000_000}
FLIGHT = {"id": "req_1", "path": "/api/chat", "model": HOSTILE, "at": 98.0, "outcome": None, "status": 200, "phases": [["decode", 3]],
          "prompt_tokens": 12, "cached_tokens": 0, "completion_tokens": 30, "resumes": 1}  # fmt: skip
SAMPLE = {"at": 98.0, "tokens_s": 41.5, "prompt_tokens_s": 3.0, "running": 1, "waiting": 0, "engines_bytes": 95_000_000,
          "available_bytes": 20_000_000_000}  # fmt: skip
INCIDENT = {"ts": "1970-01-01T00:00:58Z", "child": "engine", "slot": 1, "pid": 6, "model": HOSTILE, "cause": "killed", "signal": 9,
            "code": None, "up_s": 1.0, "running": 1, "remedy": "It was replaced.", "text": f"first\n{HOSTILE}", "flights": []}  # fmt: skip


def told(**more: Any) -> dict[str, Any]:
    engine = PROCESS | {"slot": 1, "model": HOSTILE, "running": 1}
    status = {"state": "degraded", "reason": HOSTILE, "url": "http://127.0.0.1:1", "supervisor": PROCESS, "server": PROCESS,
              "engines": [engine], "pullers": [], "notes": [HOSTILE], "ends": {"engine": {"killed": 2}}}  # fmt: skip
    model = {"name": HOSTILE, "state": "ready", "memory_bytes": 1, "running": 1, "leaves_s": 61.0}
    return {
        "at": 100.0, "version": "0.1.0", "word": "degraded", "reason": None, "status": status, "sample": SAMPLE, "resumed": 3,
        "queue": {"running": 1, "waiting": 2, "slots": 32, "seats": 512}, "models": [model, model | {"state": "absent"}],
        "pulls": [{"name": HOSTILE, "status": HOSTILE, "total": 10, "completed": 5}], "requests": [FLIGHT] * 9, "recent": [],
        "incidents": [INCIDENT],
    } | more  # fmt: skip


def drawn(feed: Feed, height: int = 24) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=200, height=height, highlight=False)
    with console.capture() as capture:
        console.print(picture(feed, console))
    return capture.get()


def test_no_name_and_no_last_word_drives_the_terminal_or_paints_it() -> None:
    feed = Feed()
    feed.now = told()
    feed.samples.append(SAMPLE)
    plain = "\n".join(snapshot(feed))
    for text in (drawn(feed), plain):
        assert not [c for c in text if c != "\n" and not c.isprintable()]
        assert text.count(SEEN) >= 7  # reason, note, engine, requests, model, pull and its status, incident
        assert "10 s ago" not in text and "42s ago  engine-1  pid 6  killed" in text
        assert (
            "50% of 0 MB" in text
            and "1m01s" in text
            and "It was replaced." in text
            and "12 + 30" in text
            and "41.5 tokens/s" in text
        )


def test_of_many_requests_as_many_are_shown_as_fit_and_how_many_more_there_are() -> None:
    feed = Feed()
    feed.now = told()
    assert drawn(feed).count("/api/chat") == 6 and "and 3 more" in drawn(feed)
    assert drawn(feed, 60).count("/api/chat") == 9 and "more" not in drawn(feed, 60)
    assert "\n".join(snapshot(feed)).count("/api/chat") == 9


def test_without_a_server_or_a_supervisor_it_says_so_and_shows_what_it_has() -> None:
    feed = Feed()
    feed.trouble = "the server is being replaced"
    assert "the server is being replaced" in drawn(feed)
    feed.now = told(status=None, sample=None)
    text = drawn(feed)
    assert "mlxd 0.1.0  as it was" in text and "the server is being replaced" in text and "the supervisor does not answer" in text
    assert next(snapshot(feed)) == "degraded  the supervisor does not answer"


def test_what_waiting_does_not_mend_ends_it() -> None:
    assert sentence_of(Refused(503, "mlxd is starting")) == "mlxd is starting"
    with pytest.raises(MlxdError, match="an admin's token"):
        sentence_of(Refused(403, "this takes an admin's token"))
    with pytest.raises(MlxdError, match="the server is of an earlier version; `mlxd restart` replaces it"):
        sentence_of(Refused(404, "Not Found"))


def test_a_sparkline_has_its_newest_on_the_right_and_never_hides_that_there_was_something() -> None:
    assert sparkline([0.0, 0.1, 50.0, 100.0], 4, BARS) == " ▁▄█"
    assert sparkline([0.0, 0.0, 100.0, 100.0], 2, ASCII_BARS) == " #"
    assert sparkline([0.0, 0.0], 2, BARS) == "  "
