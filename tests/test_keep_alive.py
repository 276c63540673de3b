"""What a stream says while there is nothing to say, and how it tells that it was resumed. Also as the clients' own packages see it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest
from server_client import Background, Supervised, supervised, until

from mlxd.api.exchange import Exchange
from mlxd.messages import EngineDown
from mlxd.uploads import Uploads

QUICK: dict[str, Any] = {"server": {"ping_s": 0.1}}
PATHS = ["/api/chat", "/api/generate", "/v1/chat/completions"]
PING = {"/api/chat": '"content":""', "/api/generate": '"response":""', "/v1/chat/completions": ": ping"}


def body(path: str, text: str, **more: Any) -> dict[str, Any]:
    asked = {"prompt": text} if path == "/api/generate" else {"messages": [{"role": "user", "content": text}]}
    return {"model": "tiny", "stream": True} | asked | more


def words(n: int) -> str:
    return "".join(f"w{i} " for i in range(n))


@contextmanager
def stream(server: Supervised, path: str, text: str, **more: Any) -> Iterator[tuple[httpx.Response, Iterator[str]]]:
    with server.client() as client, client.stream("POST", path, json=body(path, text, **more)) as answer:
        yield answer, (line for line in answer.iter_lines() if line)


def said(path: str, lines: list[str]) -> str:
    """The text of a stream; every line of it must be what the dialect allows."""
    text = ""
    for line in lines:
        if path != "/v1/chat/completions":
            told = json.loads(line)
            text += told["message"]["content"] if path == "/api/chat" else told["response"]
        elif not line.startswith(": ") and line != "data: [DONE]":
            text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
    return text


def each(work: Callable[[Any], Any], things: list[Any] = PATHS) -> list[Any]:
    """What `work` gives for each, all at the same time: most of it is waiting."""
    return [call.result() for call in [Background(lambda thing=thing: work(thing)) for thing in things]]


# --- pings -------------------------------------------------------------------------------------------------------------------------


def test_a_silent_stream_is_kept_alive_in_load_in_prefill_and_while_its_engine_is_replaced(home: Path) -> None:
    with supervised(home, ("held",), **QUICK) as server:
        begun: list[str] = []

        def read(path: str) -> tuple[list[str], list[str], list[str]]:
            with stream(server, path, "n=30 first=1.5 delay=0.05", model="held") as (answer, lines):
                assert answer.status_code == 200
                in_load = [next(lines)]
                begun.append(path)
                in_prefill: list[str] = []
                while not in_prefill or "w0" not in in_prefill[-1]:
                    in_prefill.append(next(lines))
                begun.append(path)
                return in_load, in_prefill, list(lines)

        reading = Background(lambda: each(read))
        until("pings", lambda: len(begun) == 3, server.told)
        server.let_up()
        until("words", lambda: len(begun) == 6, server.told)
        server.pause_s = 1.5
        server.engines[0].kill()
        for path, (in_load, in_prefill, rest) in zip(PATHS, reading.result(), strict=True):
            assert said(path, in_load + in_prefill + rest) == words(30)
            assert PING[path] in in_load[0]
            assert PING[path] in in_prefill[0]
            assert any(PING[path] in line for line in rest[:-3])  # the last one of Ollama's is empty anyway
            if path != PATHS[2]:
                end = json.loads(rest[-1])
                assert end["eval_count"] == 30
                assert end["eval_duration"] >= 1.5e9  # with the pause
                assert end["prompt_eval_duration"] >= 1.5e9
                assert end["total_duration"] >= end["load_duration"] + end["prompt_eval_duration"] + end["eval_duration"]
        assert len(server.engines) == 2
        until("each token to be counted, and once", lambda: server.emitted() >= 90, server.told)
        assert server.emitted() == 90


def test_a_whole_answer_is_not_begun_before_its_end(home: Path) -> None:
    with supervised(home, **QUICK) as server:

        def read(path: str) -> tuple[int, bytes]:
            with server.client() as client:
                assert client.post(path, json=body(path, "fail=507 first=1.5", stream=False)).status_code == 507
                answer = client.post(path, json=body(path, "n=1 first=1.5", stream=False))
                return answer.status_code, answer.content

        for status, whole in each(read):
            assert status == 200
            assert json.loads(whole)


def test_who_waits_in_the_queue_gets_a_status_and_no_pings(home: Path) -> None:
    settings = QUICK["server"] | {"max_concurrent": 1, "queue_wait_s": 1.5}
    with supervised(home, server=settings) as server, stream(server, PATHS[0], "n=1000 delay=0.1") as (_, first):
        next(first)

        def read(path: str) -> tuple[int, str]:
            with stream(server, path, "n=1") as (answer, _):
                return answer.status_code, answer.headers["retry-after"]

        assert each(read) == [(503, "5")] * 3


def test_a_refusal_after_a_ping_is_told_in_the_stream(home: Path) -> None:
    with supervised(home, ("held",), **QUICK) as server:
        begun: list[str] = []

        def read(path: str) -> str:
            with stream(server, path, "n=1", model="held") as (answer, lines):
                assert answer.status_code == 200
                begun.append(next(lines))
                return list(lines)[-1].removeprefix("data: ")

        reading = Background(lambda: each(read))
        until("pings", lambda: len(begun) == 3, server.told)
        server.say(EngineDown(1, "held:latest", "a tensor is missing", "refused"))
        native, generated, openais = [json.loads(line)["error"] for line in reading.result()]
        assert "a tensor is missing" in native
        assert native == generated == openais["message"]


# --- how a ping is written ---------------------------------------------------------------------------------------------------------


class Filler:
    stream_type = b"text/plain"

    def ping(self) -> bytes:
        return b"ping"


class Wire:
    """ASGI's `send`; while `full`, it waits before it writes, as uvicorn does."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.room = asyncio.Event()
        self.room.set()
        self.exchange = Exchange({"headers": []}, self.receive, self.send, Uploads(0, 60.0))

    async def receive(self) -> Any:
        await asyncio.Event().wait()

    async def send(self, message: Any) -> None:
        await self.room.wait()
        self.sent.append(message.get("body", message["type"]))


def on_a_wire(test: Callable[[Wire], Any]) -> None:
    async def run() -> None:
        await test(Wire())

    asyncio.run(run())


def test_a_ping_begins_the_answer_if_nothing_has() -> None:
    async def run(wire: Wire) -> None:
        wire.exchange.fill(0)
        assert wire.sent == []  # nobody said that this answer may be begun
        wire.exchange.filler = Filler()
        wire.exchange.fill(60)
        assert wire.sent == []
        wire.exchange.fill(0)
        wire.exchange.fill(0)
        await wire.exchange.write(b"end", last=True)
        wire.exchange.fill(0)
        assert wire.sent == ["http.response.start", b"ping", b"ping", b"end"]

    on_a_wire(run)


def test_whatever_is_written_puts_the_next_ping_off() -> None:
    async def run(wire: Wire) -> None:
        exchange = wire.exchange
        exchange.filler = Filler()
        exchange.spoke_at -= 60
        await exchange.stream(b"text/plain")
        await exchange.write(b"word")
        exchange.fill(60)
        exchange.spoke_at -= 60
        exchange.fill(60)
        exchange.fill(60)
        assert wire.sent == ["http.response.start", b"word", b"ping"]

    on_a_wire(run)


def test_a_ping_never_waits_and_never_comes_between() -> None:
    async def run(wire: Wire) -> None:
        exchange = wire.exchange
        exchange.filler = Filler()
        wire.room.clear()
        exchange.fill(0)
        assert (wire.sent, exchange.started, exchange.writing_since) == ([], False, None)
        starting = asyncio.create_task(exchange.stream(b"text/plain"))
        await asyncio.sleep(0)
        exchange.fill(0)
        wire.room.set()
        await starting
        wire.room.clear()
        exchange.fill(0)
        writing = asyncio.create_task(exchange.write(b"end", last=True))
        await asyncio.sleep(0)
        exchange.fill(0)
        wire.room.set()
        await writing
        assert wire.sent == ["http.response.start", b"end"]

    on_a_wire(run)


def test_a_ping_that_cannot_be_written_ends_that_request_and_nothing_else() -> None:
    async def run(wire: Wire) -> None:
        async def refuse(message: Any) -> None:
            raise RuntimeError("h11 is in the state ERROR")

        exchange = wire.exchange
        exchange.send = refuse
        exchange.filler = Filler()
        working = asyncio.create_task(exchange.while_connected(asyncio.Event().wait()))
        await asyncio.sleep(0)
        exchange.fill(0)
        await working
        assert exchange.left

    on_a_wire(run)


# --- being resumed -----------------------------------------------------------------------------------------------------------------


def test_a_stream_resumed_before_its_first_byte_says_so_in_a_header(home: Path) -> None:
    with supervised(home) as server, server.client() as client:

        def read(path: str) -> tuple[str, str]:
            answer = client.post(path, json=body(path, "n=3 first=1"))
            return answer.headers["x-mlxd-resumed"], answer.text

        reading = Background(lambda: each(read))
        until("the jobs", lambda: [engine["running"] for engine in server.health()["engines"]] == [3], server.told)
        server.engines[0].kill()
        for path, (resumed, text) in zip(PATHS, reading.result(), strict=True):
            assert resumed == "1"
            assert "x-mlxd-resumed" not in text
            assert said(path, [line for line in text.splitlines() if line]) == words(3)


def test_a_stream_resumed_later_says_so_in_a_comment_and_ndjson_not_at_all(home: Path) -> None:
    with supervised(home) as server:
        seen = dict.fromkeys(PATHS, 0)

        def read(path: str) -> list[str]:
            got = []
            with stream(server, path, "n=40 delay=0.05") as (answer, lines):
                for line in lines:
                    got.append(line)
                    seen[path] = len(got)
            assert "x-mlxd-resumed" not in answer.headers
            return got

        reading = Background(lambda: each(read))
        for engine in range(2):
            before = dict(seen)
            until("words", lambda before=before: all(seen[path] > before[path] + 5 for path in PATHS), server.told)
            server.engines[engine].kill()
        for path, lines in zip(PATHS, reading.result(), strict=True):
            assert said(path, lines) == words(40)
            told = [line for line in lines if "x-mlxd-resumed" in line]
            assert told == ([": x-mlxd-resumed: 1", ": x-mlxd-resumed: 2"] if path == PATHS[2] else [])


# --- as the packages see it --------------------------------------------------------------------------------------------------------


def chat_of_ollama(server: Supervised, text: str) -> Iterator[str]:
    client = ollama.Client(host=server.url, trust_env=False)
    for part in client.chat("held", [{"role": "user", "content": text}], stream=True):
        yield part.message.content or ""


def generate_of_ollama(server: Supervised, text: str) -> Iterator[str]:
    client = ollama.Client(host=server.url, trust_env=False)
    for part in client.generate("held", text, stream=True):
        yield part.response


def chat_of_openai(server: Supervised, text: str) -> Iterator[str]:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    for chunk in client.chat.completions.create(model="held", messages=[{"role": "user", "content": text}], stream=True):
        yield chunk.choices[0].delta.content or ""


async def of_ollama_async(server: Supervised, text: str) -> AsyncIterator[str]:
    client = ollama.AsyncClient(host=server.url, trust_env=False)
    async for part in await client.chat("held", [{"role": "user", "content": text}], stream=True):
        yield part.message.content or ""


def chat_of_ollama_async(server: Supervised, text: str) -> list[str]:
    async def read() -> list[str]:
        return [part async for part in of_ollama_async(server, text)]

    return asyncio.run(read())


PACKAGES = [chat_of_ollama, chat_of_ollama_async, generate_of_ollama, chat_of_openai]


def test_the_packages_read_a_stream_that_is_slow_to_load_slow_in_prefill_and_resumed(home: Path) -> None:
    with supervised(home, ("held",), **QUICK) as server:
        server.pause_s = 1.5
        reading = Background(lambda: each(lambda ask: list(ask(server, "n=9 first=1.5 delay=0.2")), PACKAGES))
        until("them to wait", lambda: server.health()["queue"]["waiting"] == len(PACKAGES), server.told)
        server.let_pass(beats=2)
        server.let_up()
        until("words", lambda: server.emitted() > len(PACKAGES), server.told)
        server.engines[0].kill()
        for ask, parts in zip(PACKAGES, reading.result(), strict=True):
            assert "".join(parts) == words(9)
            assert parts.count("") > 3 or ask is chat_of_openai
        assert len(server.engines) == 2


def test_the_packages_raise_what_is_told_in_the_stream(home: Path) -> None:
    with supervised(home, ("held",), **QUICK) as server:

        def read(ask: Any) -> str:
            with pytest.raises((ollama.ResponseError, openai.APIError)) as raised:
                list(ask(server, "n=5"))
            return str(raised.value)

        reading = Background(lambda: each(read, PACKAGES))
        until("them to wait", lambda: server.health()["queue"]["waiting"] == len(PACKAGES), server.told)
        server.let_pass(beats=2)
        server.say(EngineDown(1, "held:latest", "a tensor is missing", "refused"))
        assert all("a tensor is missing" in text for text in reading.result())
