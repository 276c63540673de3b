"""Ollama as a fallback: its models beside ours, its answers byte for byte, its failures, and loops. A real server; a real HTTP server in
Ollama's part, since a mlxd is refused in it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from fake_ollama import DIGEST, MODELS, FakeOllama, entry, fake_ollama, lines
from server_client import Background, Server, Supervised, supervised, until
from server_client import listener as listening

from mlxd import guard
from mlxd.config import Config, Ollama
from mlxd.fallback import Fallback, address
from mlxd.messages import EngineDown, Ready, Stop, Want
from mlxd.models import Model

# One worker runs all: the server that most of them share.
pytestmark = pytest.mark.xdist_group("fallback")

#: The routes that carry a model's name in their body.
PATHS = [
    *("/api/show", "/api/generate", "/api/chat", "/api/embed", "/api/embeddings"),
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
]
SECRETS = {"authorization": "Bearer secret", "x-api-key": "secret", "cookie": "a=secret"}


@contextlib.contextmanager
def beside(home: Path, neighbour: FakeOllama, names: tuple[str, ...] = ("tiny",), **settings: Any) -> Iterator[Supervised]:
    models = settings.pop("models", {})
    more = {"ollama": {"url": neighbour.url}, "fallback": {"ollama": True, "models": models}}
    with supervised(home, names, **more, **settings) as server:
        yield server


@pytest.fixture(scope="module")
def neighbour() -> Iterator[FakeOllama]:
    with fake_ollama(names=(*MODELS, "tiny")) as neighbour:
        yield neighbour


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, neighbour: FakeOllama) -> Iterator[Supervised]:
    home = tmp_path_factory.mktemp("f")
    with beside(home, neighbour, ("tiny", "retried", "retried-too"), models={"retried": "says", "retried-too": "gone"}) as server:
        yield server


def body_for(name: str, **more: Any) -> dict[str, Any]:
    return {"model": name, "messages": [{"role": "user", "content": "n=1"}], "max_tokens": 5} | more


def post(server: Supervised, path: str, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
    with server.client() as client:
        return client.post(path, content=body if isinstance(body, bytes) else json.dumps(body), headers=headers)


def get(server: Supervised, path: str, **headers: str) -> httpx.Response:
    with server.client() as client:
        return client.get(path, headers=headers)


def sentence(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    return error if isinstance(error, str) else error["message"]


# --- lists ---------------------------------------------------------------------------------------------------------------------------


def test_ollamas_models_stand_behind_ours_and_are_marked_as_its_own(server: Supervised, neighbour: FakeOllama) -> None:
    found = {model["name"]: model for model in get(server, "/api/tags").json()["models"]}
    assert list(found).index("says:latest") > list(found).index("mlxd-tiny:latest")
    assert found["says:latest"] == entry("says") | {"remote_host": neighbour.url, "remote_model": "says:latest"}
    assert "hf.co/some/Model-GGUF:Q4_K_M" in found
    listed = {model["id"]: model for model in get(server, "/v1/models").json()["data"]}
    assert listed["says:latest"]["owned_by"] == "ollama"
    assert listed["says:latest"]["created_at"] == "2025-10-03T08:11:12Z"
    assert listed.keys() == found.keys()


def test_of_two_models_with_one_name_ours_is_shown_and_ours_answers(server: Supervised, neighbour: FakeOllama) -> None:
    (tiny,) = [model for model in get(server, "/api/tags").json()["models"] if model["name"] == "tiny:latest"]
    assert tiny["digest"] != DIGEST
    seen = len(neighbour.seen)
    answer = post(server, "/api/chat", body_for("TINY", stream=False))
    assert answer.json()["message"]["content"] == "w0 "
    assert "x-mlxd-served-by" not in answer.headers
    assert len(neighbour.seen) == seen


def test_ollama_is_asked_for_its_list_once_in_a_while(server: Supervised, neighbour: FakeOllama) -> None:
    get(server, "/api/tags")
    before = neighbour.lists
    for _ in range(20):
        get(server, "/api/tags")
    assert neighbour.lists <= before + 1


# --- requests ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_request_goes_to_the_same_path_and_its_answer_comes_back_byte_for_byte(
    server: Supervised, neighbour: FakeOllama, path: str
) -> None:
    body = b'{ "model": "says",  "unknown":[1, 2.50,"\xc3\xa9"] , "messages":"mlxd would not take this" }'
    headers = SECRETS | {"content-type": "application/json; odd=1", "x-request-id": "mine", "accept-encoding": "gzip"}
    answer = post(server, path + "?beta=true&x=%20", body, headers)
    asked = neighbour.seen[-1]
    assert asked.line == f"POST {path}?beta=true&x=%20 HTTP/1.1"
    assert asked.body == body
    assert asked.headers["content-type"] == headers["content-type"]
    assert asked.headers["x-request-id"] == answer.headers["x-request-id"] == "mine"
    assert asked.headers["accept-encoding"] == "identity"
    assert "secret" not in str(asked.headers)
    assert answer.status_code == 200
    assert answer.content == b"".join(lines(path))
    assert answer.headers["content-type"] == ("text/event-stream" if path.startswith("/v1") else "application/x-ndjson")
    assert answer.headers["x-mlxd-served-by"] == "ollama"


def test_a_model_is_shown_by_its_address_too(server: Supervised, neighbour: FakeOllama) -> None:
    for name in ("says", "SAYS:latest", "hf.co/some/Model-GGUF:Q4_K_M"):
        assert get(server, f"/v1/models/{name}").json() == {"id": "says:latest"}
        assert neighbour.seen[-1].line == f"GET /v1/models/{name} HTTP/1.1"
    with server.client() as client:
        assert client.head("/v1/models/says").headers["content-length"] == "20"


def test_a_name_that_only_ollama_can_have_is_forwarded(server: Supervised, neighbour: FakeOllama) -> None:
    assert post(server, "/api/show", {"model": None, "name": "hf.co/some/Model-GGUF:Q4_K_M"}).status_code == 200
    assert neighbour.seen[-1].body == b'{"model": null, "name": "hf.co/some/Model-GGUF:Q4_K_M"}'


def test_a_refusal_of_ollamas_is_passed_on_without_headers_that_are_nobodys_business(server: Supervised) -> None:
    answer = post(server, "/api/chat", body_for("refuses"))
    assert (answer.status_code, answer.json()) == (404, {"error": "model 'refuses' not found"})
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert not {"x-secret", "set-cookie", "server", "x-more"} & answer.headers.keys()


def test_a_model_that_nobody_has_is_a_404_as_ever(server: Supervised) -> None:
    for path in PATHS:
        answer = post(server, path, body_for("nobodys"))
        assert (answer.status_code, "'nobodys' not found" in sentence(answer)) == (404, True), path


def test_what_mlxd_refuses_of_its_own_models_stays_refused(server: Supervised, neighbour: FakeOllama) -> None:
    seen = len(neighbour.seen)
    assert post(server, "/api/chat", {"model": "tiny", "messages": 5}).status_code == 400
    assert post(server, "/api/chat", b"{").status_code == 400
    assert post(server, "/api/chat", b"").status_code == 400
    assert post(server, "/api/chat", {"model": 5}).status_code == 400
    assert post(server, "/api/pull", {"model": "says"}).status_code == 404
    assert len(neighbour.seen) == seen


def test_a_stream_comes_piece_by_piece_as_ollama_sends_it(server: Supervised, neighbour: FakeOllama) -> None:
    with server.client() as client, client.stream("POST", "/api/chat", json=body_for("waits")) as answer:
        pieces = answer.iter_raw()
        for line in lines("/api/chat"):
            assert next(pieces) == line
            neighbour.go.release()
        assert list(pieces) == []


def test_a_client_that_leaves_ends_the_request_at_ollama(server: Supervised, neighbour: FakeOllama) -> None:
    for name in ("silent", "endless"):
        gone, seen = neighbour.gone, len(neighbour.seen)
        body = json.dumps(body_for(name)).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            until("the request", lambda: len(neighbour.seen) > seen)  # noqa: B023
        until("the end of it", lambda: neighbour.gone > gone)  # noqa: B023
        until("its place to be free", lambda: server.health()["fallback"]["running"] == 0)


def test_who_does_not_read_a_gigabyte_holds_ollama_back_and_costs_no_memory(server: Supervised, neighbour: FakeOllama) -> None:
    before = server.health()["memory"]["server_bytes"]
    with server.client() as client, client.stream("POST", "/api/chat", json=body_for("endless")) as answer:
        assert answer.status_code == 200
        sent = -1
        while sent != neighbour.sent_bytes:  # it still gets rid of something within a beat
            sent = neighbour.sent_bytes
            server.let_pass(1)
        assert neighbour.sent_bytes < 64 * 1024 * 1024
        assert server.health()["memory"]["server_bytes"] < before + 16 * 1024 * 1024
    until("the end of it", lambda: server.health()["fallback"]["running"] == 0)


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
def test_a_stream_that_breaks_off_ends_with_an_error_in_its_dialect(server: Supervised, path: str) -> None:
    answer = post(server, path, body_for("dies", stream=True))
    said = answer.text.splitlines()
    assert answer.text.startswith(b"".join(lines(path)[:2]).decode())
    last = json.loads([line for line in said if line][-1].removeprefix("data: "))
    error = last["error"] if isinstance(last["error"], str) else last["error"]["message"]
    assert "broke off" in error
    if path.startswith("/v1/"):
        assert [line for line in said if line][-2] == "event: error"
    else:
        assert said[-2] == lines(path)[2][:5].decode()  # on a line of its own


def test_a_whole_answer_that_breaks_off_does_not_look_whole(server: Supervised) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        post(server, "/api/chat", body_for("shortens"))


def test_an_ollama_that_dies_of_a_request_is_a_503_that_says_what_to_do(server: Supervised) -> None:
    answer = post(server, "/v1/chat/completions", body_for("crashes"))
    assert (answer.status_code, "(it ended the connection): start it" in sentence(answer)) == (503, True)


def test_a_redirect_is_not_followed(server: Supervised, neighbour: FakeOllama) -> None:
    answer = post(server, "/api/chat", body_for("redirects"))
    assert (answer.status_code, "redirect" in sentence(answer)) == (502, True)
    assert "elsewhere" not in neighbour.seen[-1].line


# --- limits --------------------------------------------------------------------------------------------------------------------------


def test_what_is_forwarded_is_counted_bounded_and_takes_no_slot_of_ours(home: Path) -> None:
    limits = {"max_concurrent": 1, "max_queue": 0, "request_s": 1}
    with fake_ollama() as neighbour, beside(home, neighbour, server=limits) as server:
        with server.client() as client, client.stream("POST", "/api/chat", json=body_for("waits")) as answer:
            assert server.health()["fallback"]["running"] == 1
            for path in ("/api/chat", "/v1/chat/completions"):
                refused = post(server, path, body_for("says"))
                assert (refused.status_code, "server busy" in sentence(refused)) == (503, True)
                assert refused.headers["retry-after"] == "1"
            assert post(server, "/api/chat", body_for("tiny")).status_code == 200
            last = answer.read().splitlines()[-1]
        assert "longer than 1 s" in json.loads(last)["error"]
        answer = post(server, "/v1/messages", body_for("silent"))
        assert (answer.status_code, answer.json()["error"]["message"]) == (504, "the request took longer than 1 s")


def test_a_forwarded_stream_that_outlives_the_server_ends_with_an_error(home: Path) -> None:
    with fake_ollama() as neighbour, beside(home, neighbour) as server:
        with server.client() as client, client.stream("POST", "/api/chat", json=body_for("waits")) as answer:
            server.say(Stop())
            assert "stopped or replaced" in json.loads(answer.read().splitlines()[-1])["error"]
        until("the end of it at Ollama", lambda: not neighbour.open or neighbour.go.release())


# --- cool-down -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
def test_a_model_in_cool_down_is_stood_in_for_by_its_equivalent(server: Supervised, neighbour: FakeOllama, path: str) -> None:
    answer = post(server, path, body_for("retried", temperature=0.5, stream=True))
    assert answer.headers["x-mlxd-served-by"] == "ollama"
    assert answer.content == b"".join(lines(path))
    assert json.loads(neighbour.seen[-1].body) == body_for("says", temperature=0.5, stream=True)


def test_without_an_equivalent_in_ollama_it_is_a_503_that_says_so(server: Supervised) -> None:
    answer = post(server, "/api/chat", body_for("retried-too"))
    assert answer.status_code == 503
    assert "it died 5 times; Ollama has no gone" in sentence(answer)
    assert int(answer.headers["retry-after"]) > 200


@pytest.mark.parametrize("name", ["held", "brief"])
def test_one_that_is_tried_again_within_a_minute_is_not_waited_for_so_long(home: Path, name: str) -> None:
    """Also an alias that has an equivalent of its own."""
    with fake_ollama() as neighbour, beside(home, neighbour, ("held",), models={name: "says:latest"}) as server:
        assert post(server, "/api/copy", {"source": "held", "destination": "brief"}).status_code == 200
        call = Background(lambda: post(server, "/api/chat", body_for(name, stream=False)))
        server.expect("want", lambda word: isinstance(word, Want))
        server.say(EngineDown(1, "held:latest", "it died 3 times", "retried", 60.0))
        assert call.result().headers["x-mlxd-served-by"] == "ollama"


def test_a_stream_that_has_begun_waits_for_its_own_model(home: Path) -> None:
    with fake_ollama() as neighbour, beside(home, neighbour, ("held",), models={"held": "says:latest"}) as server:
        server.next, server.retry_s = "retried", 30.0
        server.bring_up("held:latest")
        asked = {"model": "held", "messages": [{"role": "user", "content": "n=12 die=6"}]}
        with server.client() as client, client.stream("POST", "/api/chat", json=asked) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            until("its engine's end", lambda: any("'retried'" in line for line in server.history), server.told)
            server.bring_up("held:latest")
            told = [json.loads(line) for line in (first, *lines)]
    assert "x-mlxd-served-by" not in answer.headers
    assert "".join(line["message"]["content"] for line in told) == "".join(f"w{n} " for n in range(12))


def test_where_ollama_has_no_equivalent_a_model_of_ours_is_waited_for_as_ever(home: Path) -> None:
    with fake_ollama() as neighbour, beside(home, neighbour, ("held",), models={"held": "nothing-such"}) as server:
        call = Background(lambda: post(server, "/api/chat", body_for("held", stream=False)))
        server.expect("want", lambda word: isinstance(word, Want))
        server.say(EngineDown(1, "held:latest", "it died 3 times", "retried", 60.0))
        server.let_pass(2)
        server.let_up()
        answer = call.result()
        assert answer.status_code == 200 and "x-mlxd-served-by" not in answer.headers


# --- loops ---------------------------------------------------------------------------------------------------------------------------


def test_another_mlxd_in_ollamas_place_is_recognised_and_gets_nothing(home: Path) -> None:
    (home / "other").mkdir()
    with supervised(home / "other", ("theirs",)) as other:
        url = other.url
        with supervised(home, ollama={"url": url}, fallback={"ollama": True}) as server:
            assert "theirs:latest" not in get(server, "/api/tags").text
            answer = post(server, "/v1/chat/completions", body_for("theirs"))
            assert (answer.status_code, answer.headers["x-should-retry"]) == (508, "false")
            assert f"{url} is a mlxd, not Ollama: correct [ollama] url (OLLAMA_URL)" in sentence(answer)
            assert f"fallback: {url} is a mlxd" in server.told()
            assert server.health()["fallback"]["trouble"].startswith(f"{url} is a mlxd")


def test_what_has_come_through_a_mlxd_is_not_forwarded_again(server: Supervised, neighbour: FakeOllama) -> None:
    seen = len(neighbour.seen)
    for path in PATHS:
        answer = post(server, path, body_for("says"), {"x-mlxd-forwarded": "0.1.0"})
        assert (answer.status_code, "has led to a mlxd" in sentence(answer)) == (508, True), path
    assert "says:latest" not in get(server, "/api/tags", **{"x-mlxd-forwarded": "0.1.0"}).text
    assert len(neighbour.seen) == seen


class Selfish(Supervised):
    """Its fallback is itself."""

    def start(self) -> Server:
        url = f"http://localhost:{self.port}"
        self.config = msgspec.structs.replace(self.config, ollama=Ollama(url=url))
        return super().start()


def test_a_fallback_to_our_own_port_is_off_and_status_says_why(home: Path) -> None:
    server = Selfish(home, msgspec.convert({"models": {"preload": []}, "fallback": {"ollama": True}}, Config))
    try:
        url = server.config.ollama.url
        why = f"the fallback is off: {url} is mlxd itself; set [ollama] url (OLLAMA_URL) to Ollama's address"
        ready = server.expect("ready", lambda word: isinstance(word, Ready))
        assert ready.problems == [why]
        assert why in server.told()
        assert server.health()["reason"] == why
        assert post(server, "/api/chat", body_for("llama3")).status_code == 404
    finally:
        server.close()


def test_addresses_of_this_machine_are_known() -> None:
    policy = guard.Policy(own_addresses=frozenset({guard.literal("10.1.2.3")}), own_names=frozenset({"mac"}))  # type: ignore[arg-type]
    ours = ["localhost", "127.0.0.1", "127.9.9.9", "[::1]", "0.0.0.0", "10.1.2.3", "mac", "MAC"]
    assert all(address(f"http://{host}:11435").is_ours({11435}, policy) for host in ours)
    assert not address("http://localhost:11434").is_ours({11435}, policy)
    assert not address("http://10.1.2.4:11435").is_ours({11435}, policy)


# --- a neighbour in trouble ----------------------------------------------------------------------------------------------------------


async def nobody(name: str) -> Model | None:
    return None


@pytest.mark.parametrize(
    ("mode", "status", "words"),
    [
        ("hangs", 503, "does not answer (nothing within 1 s): start it"),
        ("no HTTP", 502, "does not speak as Ollama does"),
        ("no JSON", 502, "does not speak as Ollama does"),
        ("no list", 502, "does not speak as Ollama does"),
        ("deep", 502, "nested too deeply"),
        ("huge", 502, "more than 1048576 bytes"),
        ("500", 502, "status 500"),
        ("redirects", 502, "answers with a redirect"),
        ("mlxd", 508, "is a mlxd, not Ollama"),
    ],
)
def test_a_neighbour_that_is_not_well_has_no_models_and_says_what_to_do(mode: str, status: int, words: str) -> None:
    with fake_ollama(mode) as neighbour:
        config = msgspec.convert({"ollama": {"url": neighbour.url}, "fallback": {"ollama": True}}, Config)

        async def look() -> Fallback:
            fallback = Fallback(config, nobody)
            assert await fallback.models() == {}
            return fallback

        trouble = asyncio.run(look()).trouble
        assert trouble is not None
        assert trouble.status == status
        assert words in trouble.sentence
        assert neighbour.url in trouble.sentence


def test_a_dead_ollama_leaves_our_lists_alone_and_is_named_to_who_asks_for_what_is_not_here(home: Path) -> None:
    sock = listening(socket.AF_INET, 0)
    url = f"http://localhost:{sock.getsockname()[1]}"
    sock.close()
    with supervised(home, ollama={"url": url}, fallback={"ollama": True}) as server:
        assert [model["name"] for model in get(server, "/api/tags").json()["models"]] == ["tiny:latest", "mlxd-tiny:latest"]
        assert post(server, "/api/chat", body_for("tiny")).status_code == 200
        for path in PATHS:
            answer = post(server, path, body_for("llama3"))
            said = f"model 'llama3' is none of mlxd's own; Ollama at {url} does not answer (no connection): start it"
            assert (answer.status_code, said in sentence(answer)) == (503, True), answer.text
            assert answer.headers["retry-after"] == "5"


def test_a_hung_ollama_delays_no_list_for_long_and_no_model_of_ours(home: Path) -> None:
    with fake_ollama("hangs") as neighbour, beside(home, neighbour) as server:
        assert len(get(server, "/api/tags").json()["models"]) == 2
        assert post(server, "/api/chat", body_for("tiny")).status_code == 200
        assert post(server, "/api/chat", body_for("says")).status_code == 503
        assert neighbour.lists <= 2


def test_unless_it_is_asked_for_nothing_is_asked_of_ollama(home: Path) -> None:
    with fake_ollama() as neighbour, supervised(home, ollama={"url": neighbour.url}) as server:
        assert "says" not in get(server, "/api/tags").text + get(server, "/v1/models").text
        assert post(server, "/api/chat", body_for("says")).status_code == 404
        assert "fallback" not in server.health()
        assert neighbour.lists == 0
