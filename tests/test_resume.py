"""The real engine killed in each phase of a request, at a moment that a gate holds still: the words are those of an undisturbed answer,
in both dialects, streamed and whole, greedy and seeded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gate import Passes
from known_answers import KNOWN, LONG
from server_client import Background, Supervised, supervised, until

from mlxd.messages import Accepted, Done, Event, Progress, Submit, Token

PATHS = ["/api/chat", "/v1/chat/completions"]
LONGEST = max(KNOWN, key=lambda question: len(KNOWN[question]))
#: More tokens than a step prefills.
LONG_PROMPT = " ".join(LONG.values())[:1500] + "\n" + LONGEST
#: Each phase on the question that shows it, and the options it needs.
QUESTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "prefill": (LONG_PROMPT, {"max_tokens": 40}),
    "first token": (LONGEST, {}),
    "decode": (LONGEST, {}),
    "character": ("Write hello in many languages.", {}),
    "stop string": (LONGEST, {"stop": ["never said", KNOWN[LONGEST][6:40] + "#", KNOWN[LONGEST][50:70]]}),
    "last token": (LONGEST, {"max_tokens": 12}),
    "end": (LONGEST, {}),
}


def tokens(seen: list[Event]) -> int:
    return sum(len(event.ids) for event in seen if isinstance(event, Token))


def in_prefill(submit: Submit, seen: list[Event], event: Event) -> bool:
    return isinstance(event, Accepted) or (isinstance(event, Progress) and event.done < event.total)


def before_any_token(submit: Submit, seen: list[Event], event: Event) -> bool:
    return not isinstance(event, (Token, Done))


def in_decode(submit: Submit, seen: list[Event], event: Event) -> bool:
    return not isinstance(event, Done) and tokens(seen) < 7


def in_a_character(submit: Submit, seen: list[Event], event: Event) -> bool:
    """After four tokens and more, the last of which only began a character."""
    return not (isinstance(event, Done) or (tokens(seen) > 3 and isinstance(seen[-1], Token) and not seen[-1].text))


def in_a_stop_string(submit: Submit, seen: list[Event], event: Event) -> bool:
    """After three tokens in a row that said nothing."""
    last = [seen_event.text for seen_event in seen[-3:] if isinstance(seen_event, Token)]
    return not (isinstance(event, Done) or last == ["", "", ""])


def before_the_last(submit: Submit, seen: list[Event], event: Event) -> bool:
    return not isinstance(event, Done) and tokens(seen) < (submit.max_tokens or 0) - 1


def before_the_end(submit: Submit, seen: list[Event], event: Event) -> bool:
    return not isinstance(event, Done)


PHASES = {
    "prefill": in_prefill,
    "first token": before_any_token,
    "decode": in_decode,
    "character": in_a_character,
    "stop string": in_a_stop_string,
    "last token": before_the_last,
    "end": before_the_end,
}


class Stage:
    """A server whose engines stand behind gates, and what these let through at present; None: everything."""

    def __init__(self, server: Supervised):
        self.server = server
        self.phase: Passes | None = None
        server.passes = lambda submit, seen, event: self.phase is None or self.phase(submit, seen, event)

    def held(self) -> int:
        """Jobs, at the newest engine."""
        return len(self.server.engines[-1].gate.held) if self.server.engines and self.server.engines[-1].gate else 0

    def told(self) -> str:
        return f"{self.server.engines[-1].gate.seen}\n{self.server.told()}"

    def kill(self) -> None:
        self.phase = None
        self.server.engines[-1].kill()


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home), ()) as server:
        yield Stage(server)


def call(path: str, stream: bool, seed: int | None, question: str, options: dict[str, Any]) -> dict[str, Any]:
    drawn = {"temperature": 0} if seed is None else {"temperature": 0.8, "seed": seed}
    asked = {"model": "mlxd-tiny", "messages": [{"role": "user", "content": question}], "stream": stream}
    if path == PATHS[1]:
        return asked | options | drawn | {"stream_options": {"include_usage": True}}
    native = {"num_predict" if name == "max_tokens" else name: value for name, value in options.items()}
    return asked | {"options": native | drawn | {"top_k": 0, "top_p": 1.0}}


class Answer:
    """What a client makes of an answer, whatever its form."""

    def __init__(self, answer: httpx.Response, path: str):
        assert answer.status_code == 200, answer.text
        self.resumed = int(answer.headers.get("x-mlxd-resumed", 0)) or answer.text.count(": x-mlxd-resumed: ")
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line and not line.startswith(": ")]
        told = [json.loads(line) for line in lines if line != "[DONE]"]
        if path == PATHS[0]:
            self.text = "".join(one["message"]["content"] for one in told)
            self.reason = told[-1]["done_reason"]
            self.counts = told[-1]["prompt_eval_count"], told[-1]["eval_count"]
            parts = told[-1]["load_duration"] + told[-1]["prompt_eval_duration"] + told[-1]["eval_duration"]
            assert told[-1]["total_duration"] >= parts
        else:
            choices = [choice for one in told for choice in one["choices"]]
            self.text = "".join((one.get("delta") or one.get("message") or {}).get("content", "") for one in choices)
            self.reason = choices[-1]["finish_reason"]
            usage = told[-1]["usage"]
            self.counts = usage["prompt_tokens"], usage["completion_tokens"]
            assert usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Answer)
        return (self.text, self.reason, self.counts) == (other.text, other.reason, other.counts)

    def __repr__(self) -> str:
        return repr((self.text, self.reason, self.counts))


def ask_all(server: Supervised, phase: str) -> Background:
    """The phase's question in both dialects, streamed and whole, greedy and (but for a long prompt) seeded, all at once."""
    question, options = QUESTIONS[phase]

    def ask(path: str, stream: bool, seed: int | None) -> Answer:
        with server.client() as client:
            return Answer(client.post(path, json=call(path, stream, seed, question, options), timeout=90), path)

    forms = [
        (path, stream, seed)
        for path in PATHS
        for stream in (True, False)
        for seed in ((None,) if phase == "prefill" or not stream else (None, 11))
    ]
    calls = [Background(lambda form=form: ask(*form)) for form in forms]
    return Background(lambda: {form: one.result() for form, one in zip(forms, calls, strict=True)})


@pytest.mark.parametrize("phase", QUESTIONS)
def test_an_engine_killed_in_any_phase_changes_no_word(stage: Stage, phase: str) -> None:
    calm = ask_all(stage.server, phase).result()
    assert all(answer.resumed == 0 for answer in calm.values())
    assert len({answer.text for form, answer in calm.items() if form[2] is None}) == 1
    engines = len(stage.server.engines)
    stage.phase = PHASES[phase]
    asked = ask_all(stage.server, phase)
    until("all to be held", lambda: stage.held() == len(calm), stage.told)
    stage.kill()
    disturbed = asked.result()
    assert disturbed == calm
    assert all(answer.resumed == 1 for (path, stream, _), answer in disturbed.items() if path == PATHS[1] or not stream)
    assert len(stage.server.engines) == engines + 1


def test_what_waits_in_the_queue_when_the_engine_is_killed_is_answered_by_the_next() -> None:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home), (), server={"max_concurrent": 1}) as server:
        stage = Stage(server)
        stage.phase = in_decode
        asked = ask_all(server, "decode")
        until("one that is held", lambda: stage.held() == 1, server.told)
        until("the others to wait", lambda: server.health()["queue"] == {"running": 1, "waiting": 5}, server.told)
        stage.kill()
        answers = asked.result()
        assert all(answer.text == KNOWN[LONGEST] for (_, _, seed), answer in answers.items() if seed is None)
        assert server.health()["requests"] == {"in_hand": 0, "oldest_s": 0.0, "resumed": 1}
