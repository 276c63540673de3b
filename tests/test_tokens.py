"""Who may come in and do what (SEC-05, SEC-06, SEC-08): the token file, the two scopes, and listening beyond loopback. A real server, raw
bytes."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from conftest import Daemon, http
from server_client import Supervised, supervised
from test_guard import EVERYWHERE, FAMILIES, post

import mlxd
from mlxd import guard, tokens
from mlxd.config import Config
from mlxd.errors import ConfigError
from mlxd.guard import OPEN, Policy, host_allowed
from mlxd.tokens import Access

Make = Callable[..., Daemon]

INFERENCE, ADMIN, OTHER = "inference-0123456789", "admin-0123456789abc", "another-admin-0123456789"
FILE = f"# mine\n\ninference {INFERENCE}\n  admin\t{ADMIN}\r\n{OTHER}\n"
#: What reading a model's list, a model, or an answer takes; the rest is an admin's. Whoever adds a route decides here.
FOR_INFERENCE = {
    "/": ["GET"],
    "/openapi.json": ["GET"],
    "/metrics": ["GET"],
    "/api/version": ["GET"],
    "/api/tags": ["GET"],
    "/api/ps": ["GET"],
    "/api/show": ["POST"],
    "/api/generate": ["POST"],
    "/api/chat": ["POST"],
    "/api/embed": ["POST"],
    "/api/embeddings": ["POST"],
    "/v1/models": ["GET"],
    "/v1/models/x": ["GET"],
    "/v1/chat/completions": ["POST"],
    "/v1/completions": ["POST"],
    "/v1/embeddings": ["POST"],
    "/v1/responses": ["POST"],
    "/v1/responses/x": ["GET", "DELETE"],
    "/v1/messages": ["POST"],
    "/v1/messages/count_tokens": ["POST"],
}
FOR_ADMINS = {
    "/ui/feed": ["GET"],
    "/ui/flights": ["GET"],
    "/ui/log": ["GET"],
    "/api/copy": ["POST"],
    "/api/create": ["POST"],
    "/api/delete": ["DELETE"],
    "/api/pull": ["POST"],
    "/api/push": ["POST"],
    "/api/blobs/x": ["HEAD", "POST"],
}


def write(path: Path, text: str = FILE, mode: int = 0o600) -> Path:
    path.touch(0o600)
    path.write_text(text)
    path.chmod(mode)
    return path


def settings(**sections: dict[str, Any]) -> Config:
    return msgspec.convert(sections, Config)


# --- the file -----------------------------------------------------------------------------------------------------------


def test_a_person_can_write_the_file_by_hand(tmp_path: Path) -> None:
    found = tokens.load(write(tmp_path / "token"), Config())
    assert found
    for text, access in [
        (INFERENCE, Access.INFERENCE),
        (ADMIN, Access.ADMIN),
        (OTHER, Access.ADMIN),
        (INFERENCE[:-1], Access.NONE),
        ("", Access.NONE),
    ]:
        assert found.access([(b"authorization", b"Bearer " + text.encode())]) is access
        assert found.access([(b"x-api-key", text.encode())]) is access
    assert not any(text in repr(found) + found.stamp for text in (INFERENCE, ADMIN, OTHER))
    assert tokens.load(tmp_path / "none", Config()) is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no token"),
        ("# nothing\n\n", "holds no token"),
        ("admin\n", "line 1: a token has at least 16"),
        (f"admin {ADMIN}\nadmin short-0123456\n", "line 2: a token has at least 16"),
        ("admin täken-0123456789\n", "line 1: a token has"),
        ("admin 0123456789\x7f0123456\n", "line 1: a token has"),
        (f"root {ADMIN}\n", "line 1: write `inference TOKEN`"),
        (f"admin {ADMIN} mine\n", "line 1: write `inference TOKEN`"),
        ("-1", "line 1"),
        ("x" * 70_000, "larger than"),
    ],
)
def test_a_file_that_cannot_be_understood_is_refused_without_telling_what_is_in_it(
    tmp_path: Path, text: str, sentence: str
) -> None:
    path = write(tmp_path / "token", text)
    with pytest.raises(ConfigError, match=re.escape(str(path))) as caught:
        tokens.load(path, Config())
    assert sentence in str(caught.value) and not any(word in str(caught.value) for word in (ADMIN, "short-0", "täken"))


@pytest.mark.parametrize("kind", ["readable", "link", "fifo", "directory", "foreign"])
def test_a_file_that_is_not_fit_for_secrets_is_refused_with_what_to_do(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "token"
    if kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(write(tmp_path / "elsewhere"))
    elif kind == "foreign":
        if os.getuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(write(path), 65534, -1)
    else:
        write(path, mode=0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        tokens.load(path, Config())


# --- beyond loopback ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.7.7", "8.8.8.8", "fe80::1"])
def test_sec_08_other_machines_are_let_in_with_a_token_and_by_an_explicit_setting_only(tmp_path: Path, host: str) -> None:
    there, missing = write(tmp_path / "token"), tmp_path / "none"
    remote = settings(server={"host": host}, security={"allow_remote": True})
    for path, config in [(there, settings(server={"host": host})), (missing, remote), (missing, settings(server={"host": host}))]:
        with pytest.raises(ConfigError, match="allow_remote = true") as caught:
            tokens.load(path, config)
        assert caught.value.exit_status == 78 and host in str(caught.value) and str(path) in str(caught.value)
    assert tokens.load(there, remote)


@pytest.mark.parametrize("host", ["", "localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_on_loopback_nothing_is_needed(host: str) -> None:
    assert tokens.load(Path("/nonexistent"), settings(server={"host": host})) is None


def test_sec_08_without_a_token_it_ends_before_it_listens(daemon: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:  # whoever tried to listen here would be held
        port = stranger.getsockname()[1]
        d = daemon(MLX_API_HOST="0.0.0.0", MLX_API_PORT=str(port))
        for command, setting in (("start", "false"), ("run", "true")):
            d.environ["MLXD_SECURITY_ALLOW_REMOTE"] = setting
            ran = d.mlxd(command)
            assert ran.returncode == 78 and ran.stderr.startswith("Error: listening on 0.0.0.0 lets other machines in: "), ran
            assert ran.stderr.count("\n") == 1 and not d.ours()
        assert "listening on" not in d.log().replace("Error: listening on", "")
        write(d.paths.token)
        assert d.mlxd("start").returncode == 75  # and now it tries
        assert f"port {port} is held by" in d.status()["reason"]
        assert "other machines reach it at 0.0.0.0" in d.status()["notes"][0]


def test_sec_08_a_reload_that_would_let_others_in_is_refused(daemon: Make) -> None:
    d = daemon()
    d.start()
    before = d.ready()
    d.paths.config.write_text("[server]\nhost = '0.0.0.0'\n")
    ran = d.mlxd("reload")
    assert ran.returncode == 78 and "allow_remote = true" in ran.stderr
    told = d.status()
    assert told["state"] == "degraded" and "the old one is in force: listening on 0.0.0.0" in told["reason"]
    assert (told["port"], told["server"]["pid"]) == (before["port"], before["server"]["pid"])
    assert d.get("/")[0] == 200


# --- a server with tokens -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded() -> Iterator[Supervised]:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home:
        write(Path(home) / "token")
        with supervised(Path(home)) as running:
            yield running


def ask(server: Supervised, method: bytes, path: bytes, *lines: bytes, host: bytes = b"localhost") -> tuple[int, bytes, bytes]:
    return server.raw(post(*lines, target=path, host=host, body=b"{").replace(b"POST", method, 1))


def bearer(token: str) -> bytes:
    return b"Authorization: Bearer " + token.encode()


def test_every_route_is_for_somebody() -> None:
    here = {(method.decode(), path.decode()) for method, path in EVERYWHERE}
    named = {(method, path) for table in (FOR_INFERENCE, FOR_ADMINS) for path, methods in table.items() for method in methods}
    assert here == named | {("GET", path) for path in OPEN}


@pytest.mark.parametrize(("method", "path"), EVERYWHERE)
def test_every_route_but_health_needs_a_token_and_what_changes_something_an_admins(
    guarded: Supervised, method: bytes, path: bytes
) -> None:
    everybody, admins = path.decode() in OPEN, path.decode() in FOR_ADMINS
    status, head, body = ask(guarded, method, path)
    assert (status == 401) is not everybody, body
    assert (b"www-authenticate: bearer" in head.lower()) is not everybody
    wrong = ask(guarded, method, path, bearer(INFERENCE + "x"))
    if not everybody and method != b"HEAD":
        assert same(wrong[2]) == same(body)
    assert (ask(guarded, method, path, bearer(INFERENCE))[0] == 403) is admins
    for token in (ADMIN, OTHER):
        assert ask(guarded, method, path, bearer(token))[0] not in (401, 403)
        assert ask(guarded, method, path, b"X-Api-Key: " + token.encode())[0] not in (401, 403)


def same(body: bytes) -> Any:
    """Without what is every request's own."""
    return {key: value for key, value in json.loads(body).items() if key != "request_id"}


def test_a_path_that_nobody_knows_is_an_admins(guarded: Supervised) -> None:
    for path in (b"/nowhere", b"/api/nowhere", b"//api/tags", b"/api/tags/", b"/%61pi/pull", b"/v1", b"/health/"):
        assert ask(guarded, b"GET", path)[0] == 401, path
        assert ask(guarded, b"GET", path, bearer(INFERENCE))[0] == 403, path
        assert ask(guarded, b"GET", path, bearer(ADMIN))[0] in (404, 405), path
    assert ask(guarded, b"GET", b"/%61pi/tags", bearer(INFERENCE))[0] == 200  # the path as it is routed


def test_each_dialect_says_no_in_its_own_shape(guarded: Supervised) -> None:
    sentence = "a token is needed: `Authorization: Bearer TOKEN` or `x-api-key: TOKEN`"
    assert same(ask(guarded, b"POST", b"/api/chat")[2]) == {"error": sentence}
    openai = {"message": sentence, "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    assert same(ask(guarded, b"POST", b"/v1/chat/completions")[2]) == {"error": openai}
    anthropic = {"type": "error", "error": {"type": "authentication_error", "message": sentence}}
    assert same(ask(guarded, b"POST", b"/v1/messages")[2]) == anthropic
    refused = same(ask(guarded, b"DELETE", b"/api/delete", bearer(INFERENCE))[2])
    assert refused == {"error": "this token is for inference; an admin's is needed here"}


@pytest.mark.parametrize(
    "line",
    [
        b"Authorization: Bearer",
        b"Authorization: Bearer ",
        b"Authorization: " + ADMIN.encode(),
        b"Authorization: Basic " + ADMIN.encode(),
        b"Authorization: Bearer \xc3\xa9\xff" + ADMIN.encode(),
        b"Authorization: Bearer " + ADMIN[:-1].encode(),
        b"Authorization: Bearer " + ADMIN.upper().encode(),
        b"Authorization: Bearer x " + ADMIN.encode(),
        b"Authorization: Bearer " + ADMIN.encode() * 200,
        b"X-Api-Key: Bearer " + ADMIN.encode(),
        b"X-Api-Key: \xe2\x82\xac",
        b"X-Api-Key:",
        b"Cookie: token=" + ADMIN.encode(),
    ],
)
def test_sec_06_what_is_no_token_is_a_401_whatever_it_is(guarded: Supervised, line: bytes) -> None:
    assert ask(guarded, b"POST", b"/api/chat", line)[0] == 401


def test_the_best_of_several_tokens_counts(guarded: Supervised) -> None:
    assert ask(guarded, b"DELETE", b"/api/delete", b"X-Api-Key: none", bearer(ADMIN))[0] == 400
    assert ask(guarded, b"DELETE", b"/api/delete", b"X-Api-Key: " + ADMIN.encode(), bearer(INFERENCE))[0] == 400
    assert ask(guarded, b"POST", b"/api/chat", b"authorization:   bEARER   " + INFERENCE.encode() + b"  ")[0] == 400


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_sec_05_what_the_host_header_says_opens_no_path(guarded: Supervised, family: int) -> None:
    for host in (b"localhost/health?", b"localhost/x?", b"localhost?", b"localhost#", b"a@localhost/health?", b"localhost\\health"):
        for path in (b"/api/chat", b"/v1/chat/completions", b"/api/delete"):
            assert guarded.raw(post(host=host, target=path), family)[0] == 400, host
    for target in (b"/api/tags?/health", b"/api/tags?path=/health", b"/health/../api/tags", b"/health%2f..%2fapi/tags"):
        assert guarded.raw(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", family)[0] == 401, (
            target
        )
    for header in (
        b"X-Forwarded-For: 127.0.0.1",
        b"X-Original-URL: /health",
        b"X-Rewrite-URL: /health",
        b"Forwarded: host=localhost",
    ):
        assert guarded.raw(post(header), family)[0] == 401, header


def test_without_a_token_health_tells_who_we_are_and_no_more(guarded: Supervised) -> None:
    with guarded.client() as client:
        assert set(client.get("/health").json()) == {"status", "nonce", "version"}
        assert client.get("/health/ready").json() == {"status": "ok"}
        assert client.get("/health/live").status_code == 200
        key = {"Authorization": f"Bearer {INFERENCE}"}
        assert {"engines", "memory", "last_exit", "reason"} <= set(client.get("/health", headers=key).json())
        assert set(client.get("/health/ready", headers=key).json()) == {"status", "reason"}


def test_a_page_may_ask_before_it_sends_a_token_and_may_read_that_one_is_needed(guarded: Supervised) -> None:
    page = {"Origin": "http://localhost:3000"}
    with guarded.client() as client:
        assert client.options("/api/delete", headers=page | {"Access-Control-Request-Method": "DELETE"}).status_code == 204
        refused = client.post("/api/chat", json={}, headers=page)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, page["Origin"])


def test_a_body_is_not_read_before_the_token(guarded: Supervised) -> None:
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    assert guarded.raw(head)[0] == 401


def test_beyond_loopback_any_name_will_do_but_not_without_a_token(tmp_path: Path) -> None:
    write(tmp_path / "token")
    with supervised(tmp_path, server={"host": "0.0.0.0"}, security={"allow_remote": True}) as server:
        for host in (b"mac-studio.lan", b"llm.example.org:443", b"8.8.8.8"):
            assert ask(server, b"GET", b"/api/tags", host=host)[0] == 401
            assert ask(server, b"GET", b"/api/tags", bearer(INFERENCE), host=host)[0] == 200
            # A page that rebinds its name is of one origin with us, and still has no token.
            page = [b"Origin: http://" + host, b"Content-Type: application/json"]
            assert ask(server, b"POST", b"/api/chat", *page, host=host)[0] == 401
        assert ask(server, b"GET", b"/api/tags", bearer(ADMIN), b"Origin: http://evil.example", host=b"mac-studio.lan")[0] == 403
        assert ask(server, b"GET", b"/api/tags", bearer(ADMIN), host=b"user@mac-studio.lan")[0] == 400


def test_a_name_in_the_configuration_is_let_in_and_the_refusal_of_another_says_where_to_write_it(tmp_path: Path) -> None:
    with supervised(tmp_path, security={"hosts": ["Mac-Studio.lan"]}) as server:
        for host in (b"mac-studio.lan", b"MAC-STUDIO.LAN:11435"):
            assert ask(server, b"GET", b"/api/tags", host=host)[0] == 200
        status, _, body = ask(server, b"GET", b"/api/tags", host=b"other.lan")
        assert status == 403 and b"[security] hosts" in body
    assert host_allowed("mac-studio.lan", Policy(hosts=frozenset({"mac-studio.lan"}), strict_host=True))
    assert not host_allowed("x.mac-studio.lan", Policy(hosts=frozenset({"mac-studio.lan"})))


# --- the daemon ---------------------------------------------------------------------------------------------------------


def test_a_token_comes_into_force_and_is_found_nowhere_else(daemon: Make) -> None:
    d = daemon(server=None, MLX_PRELOAD_MODELS="", MLXD_HEALTH_INTERVAL_S="0.2")
    d.start()
    first = d.ready()
    assert d.get("/api/tags")[0] == 200

    def settled(told: dict[str, Any], restarts: int) -> bool:
        return bool(told["state"] == "ready" and told["server"]["state"] == "ready" and told["server"]["restarts"] == restarts)

    write(d.paths.token, mode=0o644)
    told = d.until("the refusal", lambda s: s["state"] == "degraded")
    assert "chmod 600" in told["reason"] and told["server"]["pid"] == first["server"]["pid"] and d.get("/api/tags")[0] == 200
    d.paths.token.chmod(0o600)
    told = d.until("the new server", lambda s: settled(s, 1))
    assert d.get("/api/tags")[0] == 401
    request = f"GET /api/tags HTTP/1.1\r\nHost: localhost\r\n{bearer(INFERENCE).decode()}\r\nConnection: close\r\n\r\n".encode()
    assert http(told["port"], request)[0] == 200
    assert json.loads(d.mlxd("status", "--json").stdout)["state"] == "ready"
    assert d.mlxd("restart", "--supervisor").returncode == 0
    assert d.status()["server"]["pid"] == told["server"]["pid"]
    for file in [file for file in d.home.rglob("*") if file.is_file() and file != d.paths.token]:
        assert not any(token.encode() in file.read_bytes() for token in (INFERENCE, ADMIN, OTHER)), file
    for process in d.ours():
        told_to = [*process.cmdline(), *process.environ().values()]
        assert not any(token in word for token in (INFERENCE, ADMIN, OTHER) for word in told_to)

    write(d.paths.token, "nonsense")
    d.until("the refusal", lambda s: s["state"] == "degraded" and "line 1" in s["reason"])
    psutil.Process(told["server"]["pid"]).kill()
    told = d.until("a server that waits", lambda s: s["server"]["state"] == "held")
    assert "line 1: a token has at least" in told["reason"]
    write(d.paths.token)
    d.until("a server again", lambda s: s["state"] == "ready" and s["server"]["state"] == "ready")
    assert d.get("/api/tags")[0] == 401
    d.paths.token.unlink()
    d.until("a server without", lambda s: s["state"] == "ready" and d.get("/api/tags")[0] == 200)


def test_while_no_server_accepts_nothing_is_told_that_needs_a_token(daemon: Make, home: Path) -> None:
    write(home / "token")
    d = daemon(server="--say secret-words --exit-loading 1 --exit-at-once 78")
    port = d.start()["port"]
    told = d.until("held", lambda s: s["state"] == "held")
    assert "secret-words" in told["reason"]
    for path in ("/api/tags", "/v1/models", "/v1/messages"):
        status, _, body = http(port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert status == 503 and b"mlxd is held" in body and b"secret-words" not in body
    status, _, body = http(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert status == 503 and set(json.loads(body)) == {"status", "nonce", "version"}


def test_the_greeting_shows_how_to_send_a_token(daemon: Make, home: Path) -> None:
    write(home / "token")
    d = daemon()
    ran = d.mlxd("start")
    assert ran.returncode == 0 and "/api/chat -H 'Authorization: Bearer TOKEN' -d" in ran.stdout


# --- the source ---------------------------------------------------------------------------------------------------------


def test_sec_06_tokens_are_compared_by_compare_digest_alone() -> None:
    package = Path(mlxd.__file__).parent
    tree = ast.parse((package / "tokens.py").read_text())
    compared = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    assert not [text for text in compared if re.search(r"\b(token|shown|value|secrets)\b", text)], compared
    assert [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)].count("hmac.compare_digest") == 1
    assert not [file for file in package.rglob("*.py") if file.name != "tokens.py" and ".secrets" in file.read_text()]


def test_sec_05_the_guard_decides_by_the_path_that_is_routed() -> None:
    scope = {"method": "GET", "path": "/api/tags", "raw_path": b"/health", "headers": [(b"host", b"localhost/health?")]}
    found = tokens.Tokens(((Access.ADMIN, ADMIN.encode()),))
    with pytest.raises(Exception, match="a token is needed"):
        guard.admit(scope, found)
    assert guard.admit(scope, None) is Access.ADMIN
