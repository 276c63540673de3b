"""`mlxd chat` and `mlxd top` in a terminal, beside a real daemon on the built-in model, whose processes are frozen and killed meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from conftest import PATIENCE_S, Daemon, eventually
from known_answers import KNOWN
from test_mlxd import LONG, LONGEST, real_settings

QUESTION, ANSWER = next(iter(KNOWN.items()))
#: The first words of the long one.
BEGINNING = LONG[LONGEST][:20]
NOTE = " (the engine died; the answer goes on) "
#: Of an answer that pauses for long, there may be more.
NOTES = re.compile(rf"{re.escape(NOTE)}| \((loading|waiting for) [^)]*\) ")


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    """One that is ready, whose model `calm` always says the same; it is patient with what is frozen."""
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as name:
        home = Path(name)
        patient = {"MLXD_HEALTH_SUSPECT_S": "600", "MLXD_HEALTH_FROZEN_S": "600", "MLXD_HEALTH_STALLED_S": "600"}
        d = Daemon(home, **real_settings(home) | patient)
        d.environ |= {"TERM": "xterm", "NO_COLOR": "1", "INPUTRC": "/dev/null"}
        with d.running():
            assert d.mlxd("alias", "calm", "mlxd-tiny", "--parameter", "temperature", "0").returncode == 0
            yield d


@contextlib.contextmanager
def terminal(d: Daemon, *words: str, ends_with: int = 0) -> Iterator[pexpect.spawn[str]]:
    command = ["-m", "mlxd", *words]
    t = pexpect.spawn(sys.executable, command, env=d.environ, encoding="utf-8", timeout=PATIENCE_S, dimensions=(40, 120), cwd="/")
    try:
        yield t
        t.expect(pexpect.EOF)
    finally:
        t.close(force=True)
    assert t.exitstatus == ends_with


@contextlib.contextmanager
def answering(d: Daemon) -> Iterator[pexpect.spawn[str]]:
    """A chat that has begun its longest answer."""
    with terminal(d, "chat", "--model", "calm") as t:
        t.expect(">>> ")
        t.sendline(LONGEST)
        t.expect_exact(BEGINNING)
        yield t


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[int]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def engine(d: Daemon) -> int:
    return int(d.ready()["engines"][0]["pid"])


def health(d: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(d.get("/health")[2])
    return found


def in_hand(d: Daemon) -> int:
    return int(health(d)["requests"]["in_hand"])


def modes(t: pexpect.spawn[str]) -> int:
    return int(termios.tcgetattr(t.child_fd)[3])


def said(t: pexpect.spawn[str]) -> str:
    """What came before what was expected, as one text."""
    return str(t.before).replace("\r\n", "\n")


# --- chat -----------------------------------------------------------------------------------------------------------------------------


def test_one_question_is_answered_in_a_pipe_and_in_a_terminal(running: Daemon) -> None:
    ran = running.mlxd("chat", QUESTION, "--model", "calm")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{ANSWER}\n", "")
    told = json.loads(running.mlxd("chat", QUESTION, "--model", "calm", "--json").stdout)
    assert set(told) == {"model", "text", "thinking", "prompt_tokens", "completion_tokens", "resumes"}
    assert (told["text"], told["resumes"]) == (ANSWER, 0) and told["prompt_tokens"] > 0 < told["completion_tokens"]
    with terminal(running, "chat", QUESTION, "--model", "calm") as t:
        t.expect_exact(f"{ANSWER}\r\n")
    ran = running.mlxd("chat", QUESTION, "--model", "nope")
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", "Error: model 'nope' not found\n")


def test_ctrl_c_stops_the_answer_and_the_server_has_nothing_left_of_it(running: Daemon) -> None:
    with answering(running) as t:
        with frozen(engine(running)):
            t.sendintr()
            t.expect_exact("(stopped)\r\n>>> ")
            eventually(lambda: in_hand(running) == 0, "nothing in hand", running.history)
        t.sendline(QUESTION)
        t.expect(">>> ")
        assert said(t).removeprefix(QUESTION).strip()
        t.sendline("/bye")


def test_an_answer_is_whole_though_its_engine_is_killed(running: Daemon) -> None:
    with answering(running) as t:
        with frozen(engine(running)) as pid:
            os.kill(pid, signal.SIGKILL)
        t.expect(">>> ")
        rest = said(t)
        assert NOTE in rest
        assert (BEGINNING + NOTES.sub("", rest)).strip() == LONG[LONGEST]
        t.sendline("/bye")


def test_when_the_server_is_killed_a_sentence_says_so_and_the_next_question_is_answered(running: Daemon) -> None:
    with answering(running) as t:
        with frozen(engine(running)):
            os.kill(running.ready()["server"]["pid"], signal.SIGKILL)
            t.expect_exact("Error: the server ended before its answer did; the conversation before your message is kept")
        t.expect(">>> ")
        t.sendline(QUESTION)
        t.expect_exact(f"{ANSWER}\r\n>>> ")
        t.sendeof()


def test_a_server_that_is_killed_before_the_first_word_is_followed_by_one_that_answers(running: Daemon) -> None:
    with frozen(engine(running)), terminal(running, "chat", QUESTION, "--model", "calm") as t:
        t.expect("waiting for calm, ")
        pid = running.ready()["server"]["pid"]
        os.kill(pid, signal.SIGKILL)
        running.until("another server", lambda s: s["server"]["pid"] not in (None, pid))
        os.kill(engine(running), signal.SIGCONT)
        t.expect_exact(f"{ANSWER}\r\n")


# --- top ------------------------------------------------------------------------------------------------------------------------------


def test_without_a_terminal_top_is_one_picture(running: Daemon) -> None:
    ran = running.mlxd("top")
    assert ran.returncode == 0 and not ran.stderr and "\x1b" not in ran.stdout
    assert re.match(r"(ready|degraded)  http://127.0.0.1:\d+  mlxd-tiny  memory ", ran.stdout)
    assert re.search(r"^queue  0 of 32 running  0 of 512 waiting", ran.stdout, re.M)
    assert re.search(r"^mlxd-tiny +ready +\d+ MB +0 +never$", ran.stdout, re.M)
    told = json.loads(running.mlxd("top", "--json").stdout)
    assert {"word", "status", "queue", "models", "requests", "incidents", "samples"} <= set(told)
    running.environ["TERM"] = "dumb"
    with terminal(running, "top") as t:
        t.expect("queue  0 of 32 running")
    running.environ["TERM"] = "xterm"


def test_top_shows_what_goes_on_until_q_and_leaves_the_terminal_as_it_was(running: Daemon) -> None:
    with terminal(running, "top") as t:
        t.expect_exact("\x1b[?1049h")
        before = modes(t)
        t.expect("q ends.*speed.*process.*supervisor.*server.*engine-1.*mlxd-tiny.*never")
        with terminal(running, "chat", LONGEST, "--model", "calm") as chat:
            chat.expect_exact(BEGINNING)
            with frozen(engine(running)) as pid:
                t.expect(r"/v1/chat/completions +decode +\d+s +\d+ \+ \d+ +calm")
                os.kill(pid, signal.SIGKILL)
            t.expect(rf"incidents.*ago  engine-1  pid {pid}  killed  mlxd-tiny")
        t.setwinsize(24, 70)
        t.expect("q ends")
        os.kill(running.ready()["server"]["pid"], signal.SIGKILL)
        t.expect("the server is being replaced")
        t.expect(r"ago  server  pid \d+  killed")
        assert "[b" not in str(t.before)
        t.send("q")
        t.expect_exact("\x1b[?1049l")
        eventually(lambda: modes(t) & termios.ICANON and modes(t) & termios.ECHO, "the terminal as it was")
    assert not before & termios.ICANON
    for ends_with, end in ((0, lambda t: t.sendintr()), (143, lambda t: t.kill(signal.SIGTERM))):
        with terminal(running, "top", ends_with=ends_with) as t:
            t.expect("q ends")
            end(t)
            t.expect_exact("\x1b[?1049l")


@pytest.mark.parametrize("command", [["chat"], ["chat", "hello"], ["top"], ["top", "--json"]])
def test_without_a_daemon_there_is_a_sentence_and_status_3(home: Path, command: list[str]) -> None:
    stopped = Daemon(home)
    ran = stopped.mlxd(*command)
    assert (ran.returncode, ran.stdout, ran.stderr) == (3, "", "Error: mlxd is not running; start it with `mlxd start`\n")


def test_config_says_that_a_daemon_runs_with_another_port(running: Daemon) -> None:
    running.environ["MLX_API_PORT"] = "11999"
    ran = running.mlxd("config")
    running.environ["MLX_API_PORT"] = "0"
    sentence = f"mlxd runs with other settings than these, on port {running.status()['port']}"
    assert ran.returncode == 0 and sentence in ran.stderr and sentence not in running.mlxd("config").stderr
