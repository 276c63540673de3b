"""`mlxd chat` beside a server that says what a test has it say: what goes there, what comes out, and what becomes of an answer that breaks."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pexpect
import pytest
from conftest import PATIENCE_S

from mlxd import paths
from mlxd.cli.prompt import MOST_LINES

MODELS = {"models": [{"name": f"{name}:latest", "size": 3_000_000, "capabilities": [can]} for name, can in
                     (("vectors", "embedding"), ("one", "completion"), ("two", "completion"))]}  # fmt: skip


def chunk(reason: str | None = None, **delta: str) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})


def answer(*pieces: str, reason: str = "stop") -> list[str]:
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(pieces)}}
    return [*(chunk(content=piece) for piece in pieces), chunk(reason), "data: " + json.dumps(usage), "data: [DONE]"]


class Scripted(BaseHTTPRequestHandler):
    """Plays the next of `script`: lines of a stream, "break" in their place ends the connection, a callable is called; or a status and its
    JSON."""

    script: list[Any]
    heard: list[dict[str, Any]]
    loaded: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        told: Any = {"/api/tags": MODELS, "/api/ps": {"models": [{"name": name} for name in self.loaded]}}.get(self.path)
        self.reply(200, told or {"engines": [{"model": "one:latest", "state": "loading"}], "queue": {"waiting": 0}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/api/show":
            there = f"{body['model']}:latest" in [model["name"] for model in MODELS["models"]]
            self.reply(*((200, {}) if there else (404, {"error": f"model '{body['model']}' not found"})))
            return
        self.heard.append(body)
        play = self.script.pop(0)
        if isinstance(play, tuple):
            self.reply(*play)
            return
        if play[:1] != ["break"]:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
        for line in play:
            if line == "break":
                return
            if callable(line):
                line()
            else:
                self.wfile.write(f"{line}\n\n".encode())

    def reply(self, status: int, told: Any) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(told).encode())


class Server:
    """A server that plays `script`, and the control socket by which commands find it."""

    def __init__(self, home: Path):
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith(("MLX", "OLLAMA", "NO_COLOR"))}
        self.environ |= {"MLXD_HOME": str(home), "TERM": "xterm", "INPUTRC": "/dev/null"}
        self.paths = paths.locate(self.environ)
        paths.prepare(self.paths)
        self.script: list[Any] = []
        self.heard: list[dict[str, Any]] = []
        self.loaded: list[str] = []
        own = {"script": self.script, "heard": self.heard, "loaded": self.loaded}
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Scripted,), own))
        self.control = socket.socket(socket.AF_UNIX)
        self.control.bind(os.fspath(self.paths.control))
        self.control.listen()
        self.threads = [threading.Thread(target=run) for run in (self.http.serve_forever, self.tell)]
        for thread in self.threads:
            thread.start()

    def tell(self) -> None:
        told = {"state": "ready", "reason": None, "url": f"http://127.0.0.1:{self.http.server_port}"}
        while True:
            try:
                sock, _ = self.control.accept()
            except OSError:  # closed
                return
            with sock, contextlib.suppress(OSError):
                sock.recv(65536)
                sock.sendall(json.dumps(told).encode() + b"\n")

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.control.shutdown(socket.SHUT_RDWR)
        self.control.close()
        for thread in self.threads:
            thread.join(PATIENCE_S)

    def chat(self, *words: str, said: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "mlxd", "chat", *words]
        return subprocess.run(command, env=self.environ, input=said, capture_output=True, timeout=PATIENCE_S, check=False)

    @contextlib.contextmanager
    def talk(self, *words: str, **more: str) -> Iterator[pexpect.spawn[str]]:
        """At a prompt, in a terminal; it has to end well."""
        command = ["-m", "mlxd", "chat", *words]
        environ = self.environ | more
        terminal = pexpect.spawn(sys.executable, command, env=environ, encoding="utf-8", timeout=PATIENCE_S, dimensions=(40, 150))
        try:
            yield terminal
            terminal.expect(pexpect.EOF)
        finally:
            terminal.close(force=True)
        assert terminal.exitstatus == 0


@pytest.fixture
def server(home: Path) -> Iterator[Server]:
    made = Server(home)
    yield made
    made.close()


def contents(body: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


# --- one answer --------------------------------------------------------------------------------------------------------------------


def test_without_a_terminal_the_answer_alone_is_on_stdout_and_nothing_elsewhere(server: Server) -> None:
    thinking = [chunk(reasoning="hm"), ": x-mlxd-resumed: 1", *answer("one\n", "t\x1bwo\u3000")]
    server.script += [thinking, answer("yes\n"), answer("no")]
    ran = server.chat("hello")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "one\nt\x1bwo\u3000\n".encode(), b"")
    assert server.chat("-", "--model", "two", said="grüß\nGott\n".encode()).stdout == b"yes\n"
    assert server.chat(said=b"piped").stdout == b"no\n"
    assert [(body["model"], contents(body)) for body in server.heard] == [
        ("one", [("user", "hello")]),
        ("two", [("user", "grüß\nGott\n")]),
        ("one", [("user", "piped")]),
    ]


def test_json_is_one_object(server: Server) -> None:
    server.loaded += ["vectors:latest", "two:latest"]
    server.script.append([chunk(reasoning="hm"), ": x-mlxd-resumed: 2", *answer("a\x1b", "b")])
    told = {"model": "two", "text": "a\x1bb", "thinking": "hm", "prompt_tokens": 7, "completion_tokens": 2, "resumes": 2}
    ran = server.chat("hello", "--json")
    assert (ran.returncode, json.loads(ran.stdout), ran.stderr) == (0, told, b"")


def test_what_goes_wrong_is_one_sentence_and_status_1(server: Server) -> None:
    refused: list[tuple[Any, str, bytes]] = [
        ((404, {"error": {"message": "model 'x' not found"}}), "model 'x' not found", b""),
        ((400, {"error": "no such thing"}), "no such thing", b""),
        ((500, None), "mlxd answers 500", b""),
        ([chunk(content="half"), "break"], "the server ended before its answer did", b"half\n"),
        ([chunk(content="half"), 'data: {"error": {"message": "too long"}}'], "too long", b"half\n"),
        (["data: nonsense"], "what came is no answer of a chat; look at `mlxd status`", b""),
    ]
    for play, sentence, out in refused:
        server.script.append(play)
        ran = server.chat("hello")
        assert (ran.returncode, ran.stdout, ran.stderr.decode()) == (1, out, f"Error: {sentence}\n")
    empty = "Error: the message is empty: `mlxd chat MESSAGE`, or pipe it in\n"
    assert [server.chat(*words).stderr.decode() for words in ([""], [], ["-"])] == [empty] * 3
    ran = server.chat("-", said=b"\xff")
    assert (ran.returncode, ran.stderr) == (1, b"Error: the message is not valid UTF-8\n")


def test_a_server_that_ends_before_its_answer_has_begun_is_followed_by_the_next(server: Server) -> None:
    server.script += [["break"], [": ping", "break"], (503, {"error": "mlxd is starting"}), answer("here")]
    ran = server.chat("hello")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"here\n", b"")
    assert len(server.heard) == 4


def test_an_answer_that_is_cut_says_so(server: Server) -> None:
    server.script += [answer("half", reason="length")] * 2
    ran = server.chat("hello")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"half\n", b"the answer is cut: the model's context is full\n")
    with server.talk("hello") as t:
        t.expect("half\r\nthe answer is cut: the model's context is full\r\n")


def test_what_is_pasted_in_several_lines_is_one_message(server: Server) -> None:
    server.script += [answer("A")]
    with server.talk() as t:
        t.expect(">>> ")
        t.send("\x1b[200~one\ntwo\x1b[201~\r")
        t.expect("A\r\n>>> ")
        t.sendeof()
    assert contents(server.heard[0]) == [("user", "one\ntwo")]


def test_who_reads_no_further_and_who_gives_nothing_to_read_ends_it_quietly(server: Server) -> None:
    server.script += [answer(*["line\n"] * 20000)]
    command = [sys.executable, "-m", "mlxd", "chat"]
    script = '"$@" hello | head -n 1; "$@" <&-'
    ran = subprocess.run(
        ["sh", "-c", script, "sh", *command], env=server.environ, capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert ran.stdout == b"line\n" and ran.stderr.count(b"\n") == 1 and ran.stderr.startswith(b"Error: the message is empty")


# --- at a prompt -------------------------------------------------------------------------------------------------------------------


def test_a_model_is_told_all_that_was_said_and_commands_are_for_us(server: Server) -> None:
    server.script += [answer("A"), answer("B"), answer("C"), answer("D"), answer("E")]
    with server.talk() as t:
        for typed, shown in [
            ("a", "A\r\n>>> "),
            ("/model", r"one answers\r\n.*\*  one +3 MB\r\n   two +3 MB\r\n>>> "),
            ("/model nope", "Error: model 'nope' not found\r\n>>> "),
            ("/model two", "two answers from now on\r\n>>> "),
            ("/system", "there is no system text\r\n>>> "),
            ("/system You rhyme.", r"system  You rhyme\.\r\n>>> "),
            ("b", "B\r\n>>> "),
            ("/clear", "forgotten\r\n>>> "),
            ("c", "C\r\n>>> "),
            ("/system -", "there is no system text\r\n>>> "),
            ("/etc/passwd, what is it?", "D\r\n>>> "),
            ("/nope", "Error: there is no /nope: /help shows what there is.*\r\n>>> "),
            ("/help", "/model .NAME.*/bye.*>>> "),
            ("   ", "   \r\n>>> "),
            ('"""first', r"\.\.\. "),
            ("", r"\.\.\. "),
            ('  /last"""', "E\r\n>>> "),
            ("/bye", pexpect.EOF),
        ]:
            t.sendline(typed)
            t.expect(shown)
    one, two, three, four, five = map(contents, server.heard)
    assert one == [("user", "a")]
    assert two == [("system", "You rhyme."), ("user", "a"), ("assistant", "A"), ("user", "b")]
    assert three == [("system", "You rhyme."), ("user", "c")]
    assert four == [("user", "c"), ("assistant", "C"), ("user", "/etc/passwd, what is it?")]
    assert five[3:] == [("assistant", "D"), ("user", "first\n\n  /last")]
    assert [body["model"] for body in server.heard] == ["one", "two", "two", "two", "two"]


def test_what_breaks_is_not_said_and_what_was_stopped_is(server: Server) -> None:
    hold = threading.Event()
    server.script += [[chunk(content="ha"), "break"], [chunk(content="part"), hold.wait], [hold.wait], answer("whole")]
    with server.talk("--model", "two") as t:
        t.expect(">>> ")
        t.sendline("first")
        t.expect(
            r"ha\r\nError: the server ended before its answer did; the conversation before your message is kept: send it again"
        )
        t.expect(">>> ")
        t.sendline("second")
        t.expect("part")
        t.sendintr()
        t.expect("(stopped).*>>> ")
        t.sendline("third")
        t.expect(r"\\ loading one, \d+ s")  # the spinner
        t.sendintr()
        t.expect(">>> ")
        t.sendline("fourth")
        t.expect("whole\r\n>>> ")
        hold.set()
        t.sendeof()
    assert contents(server.heard[-1]) == [("user", "second"), ("assistant", "part"), ("user", "fourth")]


def test_the_prompt_has_a_history_that_outlives_it_and_is_private_and_bounded(server: Server) -> None:
    file = server.paths.chat_history
    file.write_text("".join(f"{n}\n" for n in range(MOST_LINES + 5)))
    file.chmod(0o600)
    server.script += [answer("A"), answer("B")]
    with server.talk() as t:
        t.expect(">>> ")
        t.sendline("grüß")
        t.expect("A\r\n>>> ")
        t.sendeof()
    with server.talk() as t:
        t.expect(">>> ")
        t.send("\x1b[A\r")  # arrow up
        t.expect("B\r\n>>> ")
        t.send("typed")
        t.expect("typed")
        t.sendintr()
        t.expect("\r\n>>> ")
        t.sendintr()
        t.expect("Ctrl-D or /bye ends\r\n>>> ")
        t.sendeof()
    assert contents(server.heard[1]) == [("user", "grüß")]
    kept = file.read_text().splitlines()
    assert len(kept) == MOST_LINES and kept[-3:] == [str(MOST_LINES + 4), "grüß", "grüß"]
    assert file.stat().st_mode & 0o777 == 0o600
    paths.purge(server.paths)
    assert not file.exists()


def test_thinking_is_dimmed_and_no_model_drives_the_terminal(server: Server) -> None:
    hostile = "a\x1b[2Jb\x9b31mc\rd\x07\u202ee\x7f\tf\nfam\u200dily\u3000g"
    said = [chunk(reasoning="h\x1bm"), ": x-mlxd-resumed: 1", *answer(hostile)]
    plain = r"a\x1b[2Jb\x9b31mc\rd\x07\u202ee\x7f" + "\tf\r\nfam\u200dily\u3000g\r\n"
    server.script += [said, said]
    with server.talk() as t:
        t.expect(">>> ")
        t.sendline("go")
        t.expect_exact(
            "\x1b[2mthinking: h\\x1bm\x1b[0m\x1b[2m (the engine died; the answer goes on) \x1b[0m\r\n\r\n" + plain + ">>> "
        )
        t.sendeof()
    with server.talk(NO_COLOR="1") as t:
        t.expect(">>> ")
        t.sendline("go")
        t.expect_exact("thinking: h\\x1bm (the engine died; the answer goes on) \r\n\r\n" + plain + ">>> ")
        t.sendeof()


def test_where_the_history_cannot_be_kept_it_is_said_once(server: Server) -> None:
    server.paths.chat_history.mkdir()
    server.script += [answer("A"), answer("B")]
    with server.talk() as t:
        t.sendline("a")
        t.expect(f"the history is not kept: {server.paths.chat_history}: Is a directory\r\nA\r\n>>> ")
        t.sendline("b")
        t.expect("b\r\nB\r\n>>> ")
        t.sendline("/bye")
    server.paths.chat_history.rmdir()
