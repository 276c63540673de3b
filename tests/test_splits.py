"""An answer cut after any of its tokens, also in the middle of a character, is the same whole and streamed, and the same in every dialect."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from known_answers import UNICODE
from server_client import CHATML, said, supervised

MODEL = "mlxd-tiny"
#: Of a longer answer than any here.
ENOUGH = 64


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home), ()) as server, server.client() as client:
        yield client


# --- what is asked: path, body -----------------------------------------------------------------------------------------------------------


def asked(question: str, limit: int, temperature: float) -> dict[str, dict[str, Any]]:
    """The body for every path by which at most `limit` tokens of an answer come back."""
    drawn = {"seed": 5, "temperature": temperature}
    return {
        "/api/chat": {"messages": said(question), "options": {"num_predict": limit} | drawn},
        "/api/generate": {"prompt": question, "options": {"num_predict": limit} | drawn},
        "/v1/chat/completions": {"messages": said(question), "max_tokens": limit} | drawn,
        "/v1/completions": {"prompt": CHATML.format(question), "max_tokens": limit} | drawn,
        "/v1/responses": {"input": question, "max_output_tokens": limit} | drawn,
        "/v1/messages": {"messages": said(question), "max_tokens": limit} | drawn,
    }


# --- what is answered ------------------------------------------------------------------------------------------------------------------


def whole_text(answer: dict[str, Any]) -> str:
    match answer:
        case {"message": {"content": text}} | {"response": str(text)}:
            return str(text)
        case {"choices": [{"message": {"content": text}}]} | {"choices": [{"text": text}]}:
            return str(text or "")
        case {"output": output}:
            return "".join(part["text"] for item in output for part in item["content"])
        case {"content": blocks}:
            return "".join(block["text"] for block in blocks)
    raise AssertionError(answer)


def piece_of(part: dict[str, Any]) -> str:
    match part:
        case {"type": "response.output_text.delta", "delta": text} | {"type": "content_block_delta", "delta": {"text": text}}:
            return str(text)
        case {"choices": [{"delta": delta}]}:
            return str(delta.get("content") or "")
        case {"choices": [{"text": text}]} | {"message": {"content": str(text)}} | {"response": str(text)}:
            return text
    return ""


def answered(client: httpx.Client, path: str, body: dict[str, Any]) -> str:
    answer = client.post(path, json={"model": MODEL, "stream": False} | body)
    assert answer.status_code == 200, answer.text
    return whole_text(answer.json())


def streamed(client: httpx.Client, path: str, body: dict[str, Any]) -> str:
    """The pieces, each of which is valid UTF-8 by itself."""
    answer = client.post(path, json={"model": MODEL, "stream": True} | body)
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix(b"data: ") for line in answer.content.split(b"\n")]
    return "".join(piece_of(json.loads(line)) for line in lines if line.startswith(b"{"))


@pytest.mark.parametrize(
    ("question", "temperature"),
    [
        ("Send me an emoji.", 0.0),
        pytest.param("Show me a family emoji.", 0.0, marks=pytest.mark.full),
        pytest.param("Show me a family emoji.", 0.8, marks=pytest.mark.full),
    ],
)
def test_an_answer_cut_anywhere_is_the_same_whole_streamed_and_in_every_dialect(
    client: httpx.Client, question: str, temperature: float
) -> None:
    known = answered(client, "/api/chat", asked(question, ENOUGH, temperature)["/api/chat"])
    assert known == UNICODE[question] or temperature
    torn = 0
    for limit in range(1, ENOUGH):
        bodies = asked(question, limit, temperature)
        with ThreadPoolExecutor(2 * len(bodies)) as pool:
            texts = list(pool.map(partial(answered, client), bodies.keys(), bodies.values()))
            pieces = list(pool.map(partial(streamed, client), bodies.keys(), bodies.values()))
        assert texts == pieces
        assert len(set(texts)) == 1, texts
        if texts[0] == known:
            break
        torn += texts[0].endswith("\N{REPLACEMENT CHARACTER}")
    assert texts[0] == known
    assert torn >= 3
