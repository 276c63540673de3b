"""What the server writes down of a request: one line, by its id, and nothing of what was said."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from server_client import Supervised, supervised, until

from mlxd import logs, paths
from mlxd.cli.look import merged

CANARY = "canary-7f3a"
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
#: In a path or a header of a request: h11 takes some of them and refuses others.
HOSTILE = {
    "ESC": b"\x1b]0;mine\x07",
    "CR": b"\rSet-Cookie: a",
    "LF": b"\nfaked line",
    "LS": "\u2028".encode(),
    "NUL": b"\0",
    "CSI": b"\x9b31m",
}


def lines(server: Supervised) -> list[str]:
    return (server.home / "server.log").read_text().splitlines()


def line_of(server: Supervised, request_id: str) -> str:
    """The one line of a request, which is written after its answer."""
    found: list[str] = until("its line", lambda: [line for line in lines(server) if request_id in line], server.told)
    assert len(found) == 1
    return found[0]


@pytest.fixture(params=["text", "json"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(tmp_path: Path, form: str) -> Iterator[Supervised]:
    with supervised(tmp_path, log={"format": form}) as running:
        yield running


def shown(form: str, line: str, *text: str, **fields: Any) -> None:
    """`line` says all of this."""
    if form == "json":
        told = json.loads(line)
        assert fields.items() <= told.items(), line
    else:
        assert re.match(TIME, line) and all(part in line for part in text), line


def test_a_request_is_one_line_with_its_id_and_no_word_of_it(server: Supervised, form: str) -> None:
    secret = {"Authorization": f"Bearer {CANARY}", "x-api-key": CANARY, "User-Agent": CANARY, "Cookie": CANARY}
    with server.client(headers=secret) as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": f"n=3 {CANARY}"}], "stream": False}
        answer = client.post(f"/api/chat?key={CANARY}", json=body)
        assert answer.status_code == 200
        line = line_of(server, answer.headers["x-request-id"])
        prompt = len(f"n=3 {CANARY}")
        shown(
            form,
            line,
            "POST /api/chat  200  ",
            f"tiny:latest  tokens {prompt}+3  req_",
            method="POST",
            path="/api/chat",
            status=200,
            model="tiny:latest",
            prompt_tokens=prompt,
            completion_tokens=3,
            end="done",
            request_id=answer.headers["x-request-id"],
        )
        own = client.get("/api/tags", headers={"X-Request-Id": "mine-1"})
        assert own.headers["x-request-id"] == "mine-1"
        shown(form, line_of(server, "mine-1"), "GET /api/tags  200  ", "ms  mine-1", path="/api/tags", status=200, model=None)
        unknown = client.post("/v1/chat/completions", json=body | {"model": CANARY}, headers={"X-Request-Id": "mine-2"})
        assert unknown.status_code == 404
        shown(form, line_of(server, "mine-2"), "  404  ", status=404, model=None)
        malformed = client.post("/api/chat", content=f'{{"{CANARY}', headers={"X-Request-Id": "mine-3"})
        assert malformed.status_code == 400
        shown(form, line_of(server, "mine-3"), "  400  ", status=400)
        broken = body | {"messages": [{"role": "user", "content": f"n=3 fail=500 {CANARY}"}], "stream": True}
        assert client.post("/api/chat", json=broken, headers={"X-Request-Id": "mine-4"}).status_code == 500
        shown(form, line_of(server, "mine-4"), "  500  ", status=500)
        embedded = client.post("/api/embed", json={"model": "tiny", "input": CANARY}, headers={"X-Request-Id": "mine-5"})
        assert embedded.status_code == 200
        shown(form, line_of(server, "mine-5"), f"tokens {len(CANARY)}+0", prompt_tokens=len(CANARY))
        assert client.get("/health", headers={"X-Request-Id": "mine-6"}).status_code == 200
        with client.stream(
            "POST", "/api/chat", json=body | {"stream": True, "messages": [{"role": "user", "content": "n=99 delay=1"}]}
        ) as left:
            next(left.iter_raw())
            number = left.headers["x-request-id"]
    shown(form, line_of(server, number), "  200  ", "  left  ", status=200, end="left")
    log = "\n".join(lines(server))
    assert CANARY not in log and "mine-6" not in log


@pytest.mark.parametrize("where", ["path", "header", "model", "id"])
def test_sec_28_hostile_bytes_make_one_line_and_no_control_character(server: Supervised, form: str, where: str) -> None:
    for count, (name, noise) in enumerate(HOSTILE.items(), start=1):
        path, header, request_id, model = b"/api/chat", b"x", b"id-" + name.encode(), "tiny"
        if where == "path":
            path = b"/" + noise + b"/api/chat"
        elif where == "header":
            header = noise
        elif where == "id":
            request_id = noise
        else:
            model = noise.decode("latin-1")
        body = json.dumps({"model": model, "stream": False, "messages": [{"role": "user", "content": f"n=1 {CANARY}"}]}).encode()
        head = b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nUser-Agent: " + header + b"\r\nX-Request-Id: " + request_id
        server.raw(head + b"\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        until("a line each", lambda count=count: len(lines(server)) >= count, server.told)
    encoded = b"POST /%1B%0D%0A%E2%80%A8%00%9B HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    assert server.raw(encoded)[0] == 404
    until("the last line", lambda: len(lines(server)) > len(HOSTILE), server.told)
    data = (server.home / "server.log").read_bytes()
    assert len(data.splitlines()) == data.count(b"\n") == len(HOSTILE) + 1
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f-\xff]", data)
    assert CANARY.encode() not in data
    if form == "json":
        assert all(json.loads(line)["status"] for line in data.splitlines())


# --- lines and their way into a file -----------------------------------------------------------------------------------------------


@pytest.fixture
def logger() -> Iterator[Callable[[logging.Handler], logging.Logger]]:
    """A logger of one's own that writes to this handler alone."""
    mine = logging.getLogger("test of lines")
    mine.propagate = False

    def with_handler(handler: logging.Handler) -> logging.Logger:
        mine.handlers = [handler]
        mine.setLevel(logging.INFO)
        return mine

    yield with_handler
    mine.handlers = []


def test_lines_that_cannot_be_written_are_counted_and_said_later(tmp_path: Path, logger: Callable[..., logging.Logger]) -> None:
    file = tmp_path / "log"
    file.mkdir()
    log = logger(logs.Lines(lambda line: paths.append(file, line), logs.Text()))
    log.info("lost")
    log.info("lost, too")
    file.rmdir()
    log.info("found")
    first, second = file.read_text().splitlines()
    assert first.endswith("  2 lines before this one could not be written") and second.endswith("  found")


@pytest.mark.parametrize("kind", ["a link", "a pipe"])
def test_a_log_is_a_file_and_nothing_else(tmp_path: Path, kind: str) -> None:
    file, other = tmp_path / "log", tmp_path / "other"
    other.write_text("as it was")
    os.mkfifo(file) if kind == "a pipe" else file.symlink_to(other)
    with pytest.raises(OSError, match="log"):
        paths.append(file, b"mine\n")
    assert other.read_text() == "as it was"


@pytest.mark.parametrize("form", ["text", "json"])
def test_of_an_exception_its_place_and_kind_are_told_and_not_its_words(
    tmp_path: Path, logger: Callable[..., logging.Logger], form: str
) -> None:
    file = tmp_path / "log"
    log = logger(logs.Lines(lambda line: paths.append(file, line), logs.FORMS[form]()))
    token = logs.request_id.set("req_1")
    try:
        raise KeyError(CANARY)
    except KeyError:
        log.exception("a\nproblem \x1b")
    finally:
        logs.request_id.reset(token)
    text = file.read_text()
    assert CANARY not in text and "KeyError" in text and "test_logs.py" in text and "req_1" in text
    if form == "json":
        assert {"level": "error", "text": "a\nproblem \x1b", "request_id": "req_1"}.items() <= json.loads(text).items()
    else:
        assert text.splitlines()[0].endswith("  a\\nproblem \\x1b  req_1")


def test_of_an_unforeseen_error_only_the_systems_words_are_told() -> None:
    assert logs.words_of(ValueError("what somebody has asked")) == "ValueError"
    assert logs.words_of(RuntimeError("[metal::malloc] Resource limit (499000) exceeded.")).endswith("exceeded.")


def test_several_logs_are_one_story_by_their_times(tmp_path: Path) -> None:
    first, second = tmp_path / "engine-1.log", tmp_path / "engine-2.log"
    first.write_text("2026-01-01T00:00:01.000000Z  one\nlibmlx: aborted\n2026-01-01T00:00:03.000000Z  three\n")
    second.write_text('{"ts":"2026-01-01T00:00:02.000000Z","msg":"two"}\n')
    told = merged([first, second], 50)
    assert [line.split(b"  ")[0] for line in told] == [b"engine-1", b"engine-1", b"engine-2", b"engine-1"]
    assert told[1] == b"engine-1  libmlx: aborted"
    assert merged([first, second], 1) == [told[-1]] and merged([first, second], 0) == []
    assert merged([first], 1) == [b"2026-01-01T00:00:03.000000Z  three"]
