"""One question to a server, in either dialect, and what became of it: what the runs with deaths in them have in common.

A question ends in exactly one of OUTCOMES. Nothing is retried: a client of mlxd need not.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

#: refused: no connection, or a 503 before the first byte. left: the client hung up, as it meant to.
OUTCOMES = ("answered", "failed", "refused", "left")


@dataclass(frozen=True)
class Question:
    """What is asked and how. `dialect`: ollama (/api/chat), generate (/api/generate) or openai. `seed` counts at temperatures above 0;
    `tokens` None: as long as the model likes."""

    text: str
    dialect: str = "ollama"
    stream: bool = True
    temperature: float = 0.0
    seed: int = 0
    tokens: int | None = None
    model: str = "mlxd-tiny"

    @property
    def saying(self) -> tuple[Any, ...]:
        """Questions that are equal in this have the same answer, whole or streamed. The dialects' defaults of sampling differ."""
        return self.text, self.dialect, self.temperature, self.seed, self.tokens, self.model

    def request(self) -> tuple[str, bytes]:
        """Path and body."""
        body: dict[str, Any] = {"model": self.model, "stream": self.stream}
        drawn = {"temperature": self.temperature, "seed": self.seed}
        messages = [{"role": "user", "content": self.text}]
        if self.dialect == "openai":
            path, body = "/v1/chat/completions", body | drawn | {"messages": messages, "stream_options": {"include_usage": True}}
            if self.tokens:
                body["max_tokens"] = self.tokens
        else:
            body["options"] = drawn | {"num_predict": self.tokens or -1}
            path, asked = (
                ("/api/chat", {"messages": messages}) if self.dialect == "ollama" else ("/api/generate", {"prompt": self.text})
            )
            body |= asked
        return path, json.dumps(body).encode()


@dataclass(eq=False)
class Answer:
    """`asked`, `ended`, `moved` (when text came): of the monotonic clock. `tokens`: as the server counts them.
    `last`: the last object of the answer, or the only one."""

    question: Question
    asked: float = field(default_factory=time.monotonic)
    outcome: str = ""
    why: str = ""
    text: str = ""
    tokens: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    moved: list[float] = field(default_factory=list)
    ended: float = 0.0

    def end(self, outcome: str, why: str = "") -> Answer:
        assert outcome in OUTCOMES and not self.outcome
        self.why, self.ended = why, time.monotonic()
        self.outcome = outcome
        return self

    def add(self, text: str) -> None:
        if text:
            self.text += text
            self.moved.append(time.monotonic())


def ask(
    port: int, question: Question, leave_after: int | None = None, answer: Answer | None = None, timeout_s: float = 300
) -> Answer:
    """The answer, whatever became of it. `leave_after`: hang up after so many pieces of text; 0: as soon as it is asked.

    `answer`: filled while it comes, for whoever looks on.
    """
    answer = answer or Answer(question)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        try:
            connection.connect()
        except OSError as error:
            return answer.end("refused", repr(error))
        path, body = question.request()
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        if leave_after == 0:
            return answer.end("left")
        response = connection.getresponse()
        if response.status != 200:
            return answer.end("refused" if response.status == 503 else "failed", f"{response.status} {response.read()[:300]!r}")
        if not question.stream:
            take_whole(answer, json.loads(response.read()))
            return answer.end("answered")
        for message in lines(response):
            if take(answer, message):
                return answer.end("answered")
            if leave_after is not None and len(answer.moved) >= leave_after:
                return answer.end("left")
        return answer.end("failed", "the stream ended before the answer did")
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        return answer.end("failed", repr(error))
    finally:
        connection.close()


def lines(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of NDJSON or of server-sent events; `data: [DONE]` is {}."""
    for line in response:
        text = line.strip().removeprefix(b"data: ")
        if text == b"[DONE]":
            yield {}
        elif text and not text.startswith(b":"):
            yield json.loads(text)


def take(answer: Answer, message: dict[str, Any]) -> bool:
    """One object of a stream; true at its end. Raises ValueError on an error in it, KeyError on something else."""
    if "error" in message:
        raise ValueError(f"an error in the stream: {json.dumps(message)[:300]}")
    if message:
        answer.last = message
    if answer.question.dialect == "openai":
        for choice in message.get("choices", []):
            answer.add(choice["delta"].get("content") or "")
        if message.get("usage"):
            answer.tokens = message["usage"]["completion_tokens"]
        return not message
    answer.add(text_of(message))
    answer.tokens = message.get("eval_count", 0)
    return bool(message["done"])


def take_whole(answer: Answer, message: dict[str, Any]) -> None:
    answer.last = message
    if answer.question.dialect == "openai":
        answer.tokens = message["usage"]["completion_tokens"]
        answer.add(message["choices"][0]["message"]["content"])
    else:
        answer.tokens = message["eval_count"]
        answer.add(text_of(message))


def text_of(message: dict[str, Any]) -> str:
    """Of Ollama's two ways to answer."""
    return str(message["response"] if "response" in message else message["message"]["content"])
