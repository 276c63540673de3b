"""Talking to a model: chat."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import click

from mlxd import paths, probe
from mlxd.cli import store
from mlxd.cli.completion import model_names
from mlxd.cli.stream import Broken, Stream, words_of
from mlxd.cli.words import as_json, bytes_of, coloured, is_terminal
from mlxd.errors import MlxdError, Refused

#: As much as the server takes of a request.
MOST_BYTES = 32 * 1024 * 1024
#: A server that ends before it has said anything is replaced within a second or two, and the next one is asked.
TRIES, AGAIN_S = 5, 1.0
#: Between two turns of the spinner, and between two looks at what is waited for.
TICK_S, LOOK_S = 0.1, 0.5
SPINNER = "-\\|/"
#: An answer that pauses for so long is asked after.
PAUSE_S = 3.0
#: What would drive the reader's terminal, or turn round what stands beside it: control characters but tabs and line ends, overrides of the
#: direction of writing, and halves of characters. Joiners and blanks of other scripts are no such thing, though not `isprintable`.
DRIVING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@click.command()
@click.argument("message", required=False)
@click.option("--model", metavar="NAME", shell_complete=model_names, help="Ask this one, not the one that is loaded.")
@as_json
def chat(message: str | None, model: str | None, json_: bool) -> None:
    """Talk to a model.

    With MESSAGE, or a message on stdin (MESSAGE "-", or a pipe), print the answer and end; else talk at a prompt, where /help helps.
    """
    where = paths.locate()
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that is not UTF-8 shows what it can
    server = store.running(where)
    if message is None and is_terminal(sys.stdin) and is_terminal(sys.stdout) and not json_:
        if model is not None:
            server.shown(model)
        from mlxd.cli.prompt import Conversation

        Conversation(where, model or usual(server)).run()
        return
    said = from_stdin() if message in (None, "-") else message
    answer = Answer(model or usual(server))
    shown = Shown() if json_ else Terminal() if is_terminal(sys.stdout) else Plain()
    try:
        fill(answer, where, [spoken("user", said or "")], shown)
    finally:
        shown.end()
    if json_:
        click.echo(json.dumps(answer.as_dict()))


# --- one answer -------------------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What has come of it. `resumes`: engines that died of or under it. `reason`: of its end, in OpenAI's words; "" before it."""

    model: str
    text: str = ""
    thinking: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    resumes: int = 0
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        del found["reason"]
        return found


class Shown:
    """Of an answer nothing, while it comes; but of what it waits for, in a line of a terminal on stderr."""

    def __init__(self) -> None:
        self.spins = is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"
        self.line = ""  # as it stands there

    def piece(self, text: str, thinking: bool) -> None:
        """Some of it."""

    def resumed(self) -> None:
        """An engine died under it."""

    def wait(self, waiting: Waiting) -> None:
        """Nothing has come for a tick."""
        if self.spins:
            width = shutil.get_terminal_size().columns - 1
            self.line = f"{SPINNER[int(waiting.age_s / TICK_S) % 4]} {waiting.sentence()}"[:width]
            self.talk(f"\r{self.line}\x1b[K")

    def talk(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    def wipe(self) -> None:
        if self.line:
            self.line = ""
            self.talk("\r\x1b[K")

    def cut(self) -> None:
        """It has no end, for there is no more room."""
        self.end()
        click.echo("the answer is cut: the model's context is full", err=True)

    def end(self) -> None:
        """No more comes, for whatever reason."""
        self.wipe()


class Plain(Shown):
    """The answer and nothing else, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.last = "\n"  # character on stdout

    def piece(self, text: str, thinking: bool) -> None:
        if not thinking:
            self.out(text)

    def out(self, text: str) -> None:
        self.wipe()
        if sys.stdout is not None:
            sys.stdout.write(text)
            sys.stdout.flush()
        self.last = text[-1]

    def end(self) -> None:
        super().end()
        if self.last != "\n":
            self.out("\n")


class Terminal(Plain):
    """The answer for eyes: its thinking, too, dimmed and on stderr, and nothing that could drive the terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.talks = is_terminal(sys.stderr)
        self.thinks = False
        self.heard_at = time.monotonic()

    def piece(self, text: str, thinking: bool) -> None:
        self.heard_at = time.monotonic()
        if thinking and self.talks:
            self.wipe()
            self.talk(dimmed(seen(text if self.thinks else "thinking: " + text.lstrip())))
            self.thinks = True
        elif not thinking:
            self.end_thinking()
            self.out(seen(text))

    def wait(self, waiting: Waiting) -> None:
        if self.last == "\n" and not self.thinks:
            super().wait(waiting)
        elif time.monotonic() > self.heard_at + PAUSE_S:
            self.heard_at = float("inf")  # once a pause
            self.note(waiting.look())

    def resumed(self) -> None:
        self.note("the engine died; the answer goes on")

    def note(self, text: str) -> None:
        """Within the answer."""
        if self.talks:
            self.wipe()
            self.talk(dimmed(f" ({text}) "))

    def end_thinking(self) -> None:
        if self.thinks:
            self.thinks = False
            self.talk("\n\n")

    def end(self) -> None:
        self.end_thinking()
        super().end()


class Waiting:
    """What an answer waits for, asked of the server now and then."""

    def __init__(self, server: store.Server, model: str):
        self.server = server
        self.model = model
        self.began = time.monotonic()
        self.looked_at = self.began
        self.what = f"waiting for {shortened(model)}"
        self.prompt = ""  # how far it has been read

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.began

    def sentence(self) -> str:
        if time.monotonic() > self.looked_at + LOOK_S:
            self.what = self.look()
            self.looked_at = time.monotonic()
        return f"{self.what}, {self.age_s:.0f} s"

    def look(self) -> str:
        name = shortened(self.model)
        try:
            told = probe.fetch(self.server.url + "/health", LOOK_S, token=self.server.token).json
        except probe.NoReply:
            return "waiting for the next server"
        try:
            engines = told["engines"]
            ours = [engine for engine in engines if shortened(engine["model"]).lower() == name.lower()]  # none of an alias
            loading = [engine["model"] for engine in ours or engines if engine["state"] == "loading"]
            waiting = told["queue"]["waiting"]
        except (KeyError, TypeError):  # no server answers, and the supervisor does
            return "waiting for the next server"
        if loading:
            return f"loading {', '.join(shortened(one) for one in loading)}"
        if waiting:
            return f"waiting for {name}, {waiting} request{'s' if waiting > 1 else ''} in the queue"
        return f"{name} reads the prompt, {self.prompt} tokens" if self.prompt else f"waiting for {name}"


def fill(answer: Answer, where: paths.Paths, messages: list[dict[str, str]], shown: Shown) -> None:
    """Ask, and show what comes. Raises MlxdError; what had come is in `answer`."""
    body = {"model": answer.model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
    waiting = Waiting(store.running(where), answer.model)
    for left in reversed(range(TRIES)):
        try:
            with Stream(waiting.server, "/v1/chat/completions", body) as stream:
                follow(stream, answer, waiting, shown)
            break
        except (Broken, Refused) as error:
            passing = isinstance(error, Broken) or error.status == 503  # nobody serves just now, or too many ask
            if answer.text or answer.thinking or not (passing and left):
                raise
        again_at = time.monotonic() + AGAIN_S
        while time.monotonic() < again_at:
            shown.wait(waiting)
            time.sleep(TICK_S)
        waiting.server = store.running(where)  # after `mlxd stop` and `mlxd start` perhaps on another port
    if answer.reason == "length":
        shown.cut()


def follow(stream: Stream, answer: Answer, waiting: Waiting, shown: Shown) -> None:
    """Raises MlxdError."""
    for line in stream.lines(TICK_S):
        answer.resumes = max(answer.resumes, number_of(stream.headers.get("x-mlxd-resumed", "")))
        if line is None:
            shown.wait(waiting)
        elif line == "data: [DONE]":
            return
        elif line.startswith("data: "):
            add(answer, line[6:], shown)
        elif line.startswith(": x-mlxd-resumed: "):
            answer.resumes = number_of(line.rpartition(" ")[2])
            shown.resumed()
        elif line.startswith(": prefill "):
            waiting.prompt = line.removeprefix(": prefill ")
    raise Broken("the server ended before its answer did")


def add(answer: Answer, data: str, shown: Shown) -> None:
    """One chunk. Raises MlxdError if it is an error or none."""
    try:
        chunk = json.loads(data)
        if words := words_of(chunk):
            raise MlxdError(words)
        for choice in chunk["choices"]:
            answer.reason = choice["finish_reason"] or answer.reason
            for key in ("reasoning", "content"):
                if text := choice["delta"].get(key):
                    thinking = key == "reasoning"
                    answer.thinking += text if thinking else ""
                    answer.text += "" if thinking else text
                    shown.piece(text, thinking)
        if usage := chunk.get("usage"):
            answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # of an Ollama that stands behind, perhaps
        raise MlxdError("what came is no answer of a chat; look at `mlxd status`") from error


# --- helpers ----------------------------------------------------------------------------------------------------------------------


def usual(server: store.Server) -> str:
    """The model to ask when nobody says which: one that is loaded, else the newest. Raises MlxdError."""
    there = [model["name"] for model in server.models() if "embedding" not in model.get("capabilities", ())]
    loaded = [model["name"] for model in server.ask("/api/ps")["models"]]
    found = [name for name in loaded if name in there] or there
    if not found:
        raise MlxdError("there is no model to talk to; `mlxd pull org/repo` brings one")
    return shortened(found[0])


def from_stdin() -> str:
    """A message. Raises MlxdError."""
    if is_terminal(sys.stdin):
        click.echo("type the message; Ctrl-D at the beginning of a line ends it", err=True)
    data = sys.stdin.buffer.read(MOST_BYTES + 1) if sys.stdin is not None else b""
    if len(data) > MOST_BYTES:
        raise MlxdError(f"the message is larger than {bytes_of(MOST_BYTES)}")
    return data.decode(errors="surrogateescape")


def spoken(role: str, text: str) -> dict[str, str]:
    """A message of a conversation. Raises MlxdError."""
    if not text.strip():
        raise MlxdError("the message is empty: `mlxd chat MESSAGE`, or pipe it in")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MlxdError("the message is not valid UTF-8") from None
    return {"role": role, "content": text}


def shortened(name: str) -> str:
    return name.removesuffix(":latest")


def number_of(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def seen(text: str) -> str:
    """What a model writes must not drive the reader's terminal."""
    return DRIVING.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def dimmed(text: str) -> str:
    """For stderr."""
    return f"\x1b[2m{text}\x1b[0m" if coloured(sys.stderr) else text
