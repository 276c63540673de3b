"""The page at /ui in a real browser, before a real daemon with the built-in model, and before a server of fake engines with a token file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_client import Supervised, supervised

ADMIN, INFERENCE = "admin-0123456789abc", "inference-0123456789"
FILES = {"/ui": "text/html", "/ui/page.js": "text/javascript", "/ui/page.css": "text/css"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Supervised]:
    """A server with tokens and fake engines, which say what they are told to."""
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home:
        token = Path(home) / "token"
        token.write_text(f"inference {INFERENCE}\nadmin {ADMIN}\n")
        token.chmod(0o600)
        with supervised(Path(home), ("tiny", "think")) as running:
            yield running


# --- the files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES)
def test_the_files_need_no_token_and_a_browser_may_do_nothing_with_them_but_show_them(guarded: Supervised, path: str) -> None:
    with guarded.client() as client:
        answer, head = client.get(path), client.head(path)
    assert answer.status_code == head.status_code == 200
    assert head.headers["content-length"] == str(len(answer.content)) and head.content == b""
    assert answer.headers["content-type"] == FILES[path] + "; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/ui/", "/ui/index.html", "/ui/../ui", "/ui/%2e%2e/page.py", "/ui/page.js/"])
def test_there_is_no_other_file(guarded: Supervised, path: str) -> None:
    status, _, _ = guarded.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ADMIN}\r\n\r\n".encode())
    assert status == 404


def test_what_the_page_shows_is_for_admins_and_for_pages_of_this_server(guarded: Supervised) -> None:
    with guarded.client() as client:
        for path in ("/ui/feed", "/ui/log?of=server"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers=bearer(INFERENCE)).status_code == 403
            assert foreign(client, "GET", path).status_code == 403
        for path in ("/api/generate", "/api/pull", "/v1/chat/completions"):
            assert foreign(client, "POST", path).status_code == 403
        for path in FILES:  # but a link to the page may be followed
            visit = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
            assert client.get(path, headers=visit).status_code == (200 if path == "/ui" else 403)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def foreign(client: httpx.Client, method: str, path: str) -> httpx.Response:
    """As a page of another site would ask that has stolen the token."""
    body = {"model": "tiny"} if method == "POST" else None
    return client.request(method, path, json=body, headers=bearer(ADMIN) | {"Origin": "https://evil.example"})
