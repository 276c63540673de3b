"""Bytes of a client in logs and answers (SEC-28): terminals obey ESC, and line readers believe a line feed (uvicorn CVE-2020-7694, -7695)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from server_client import Supervised, supervised
from test_guard import post

#: In no log, whoever writes it.
CANARY = "c4n4ry-pr0mpt"
EVIL = [
    "\x1b[31mred",
    "a\r\nSet-Cookie: x=1",
    "a\nINFO forged",
    "\u2028next",
    "\x00nul",
    "\x7f\x9b31m",
    "%1b%0d%0a%00",
    "{0.__class__}%s%n",
]


@pytest.fixture
def server(tmp_path: Path):  # type: ignore[no-untyped-def]
    with supervised(tmp_path, server={"origins": ["*"]}) as running:
        yield running


def requests(evil: str) -> list[bytes]:
    raw = evil.encode()
    quoted = b"".join(b"%%%02x" % byte for byte in raw)
    chat = {"model": evil, "messages": [{"role": "user", "content": CANARY + evil}], "stream": False}
    prompt = {"model": "tiny", "messages": [{"role": "user", "content": CANARY + evil}], "stream": False}
    names = (
        b"User-Agent",
        b"X-Request-Id",
        b"Origin",
        b"X-Priority",
        b"Authorization",
        b"X-Api-Key",
        b"Content-Type",
        b"Sec-Fetch-Site",
    )
    return [
        b"GET /" + quoted + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + raw + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/models/" + quoted + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: " + raw + b"\r\n\r\n",
        raw + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        *[post(name + b": " + raw, b"Accept: */*", body=json.dumps(prompt).encode()) for name in names],
        *[
            post(target=target, body=json.dumps(chat).encode())
            for target in (b"/api/chat", b"/v1/chat/completions", b"/v1/messages")
        ],
        post(target=b"/api/show", body=json.dumps({"model": evil}).encode()),
        post(body=CANARY.encode() + raw),  # no JSON
        post(body=json.dumps({CANARY + evil: 1, "model": 7}).encode()),
    ]


def test_sec_28_no_byte_of_a_client_controls_a_terminal_or_begins_a_line(server: Supervised) -> None:
    for evil in EVIL:
        for request in requests(evil):
            status, head, body = server.raw(request)
            assert status < 500, (request, body)
            lines = head.split(b"\r\n")
            assert not re.search(rb"[\x00-\x1f\x7f-\xff]", b"".join(lines)), (request, head)
            assert not [line for line in lines if line.lower().startswith((b"set-cookie", b"info"))]
            assert not re.search(rb"[\x00-\x09\x0b-\x1f]", body), (request, body)  # JSON has them escaped
    log = (server.home / "server.log").read_bytes()
    assert not re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", log), log
    assert CANARY.encode() not in log and b"forged" not in log and "\u2028".encode() not in log
