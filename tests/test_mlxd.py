"""All of it together: the real supervisor, server and engine on the built-in model, as a user has them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import NO_SPARE, Daemon, eventually, http
from known_answers import KNOWN, LONG

import mlxd

BUILTIN = Path(mlxd.__file__).parent / "builtin"
LONGEST = max(LONG, key=lambda question: len(LONG[question]))


def real_settings(home: Path) -> dict[str, str]:
    """A models directory of its own, and no spare: most tests of real parts have nothing to do with one, which costs as much as the engine."""
    (home / "models").mkdir(exist_ok=True)
    return {"MLX_MODELS_DIR": str(home / "models"), "HF_HOME": str(home / "hub"), "MLXD_SUPERVISOR_SPARE_BYTES": NO_SPARE}


@pytest.fixture
def real(daemon: Callable[..., Daemon], home: Path) -> Callable[..., Daemon]:
    """Makes a daemon of real parts."""

    def make(**settings: str) -> Daemon:
        return daemon(server=None, engine=None, **real_settings(home) | settings)

    return make


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    """One of real parts that is ready, for tests that leave it as it was."""
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, Daemon(Path(home), **real_settings(Path(home))).running() as d:
        yield d


def body_of(question: str, model: str = "mlxd-tiny", **more: Any) -> bytes:
    asked = {"model": model, "messages": [{"role": "user", "content": question}], "options": {"temperature": 0}, "stream": False}
    return json.dumps(asked | more).encode()


def post(port: int, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return http(port, head.encode() + body)


def chat(port: int, question: str, model: str = "mlxd-tiny", **more: Any) -> dict[str, Any]:
    status, _, body = post(port, "/api/chat", body_of(question, model, **more))
    assert status == 200, body
    answer: dict[str, Any] = json.loads(body)
    return answer


class Stream:
    """An answer read line by line."""

    def __init__(self, port: int, question: str, **more: Any):
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=60)
        body = body_of(question, stream=True, **more)
        self.sock.sendall(f"POST /api/chat HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        self.file = self.sock.makefile("rb")
        while self.file.readline().strip():
            pass  # the head
        self.last: dict[str, Any] = {}

    def pieces(self) -> Iterator[str]:
        for line in self.file:
            if line.startswith(b"{"):
                self.last = json.loads(line)
                yield self.last["message"]["content"]
        self.sock.close()


# --- as a new user ------------------------------------------------------------------------------------------------------


def test_start_greets_with_what_to_try_and_that_works(real: Callable[..., Daemon]) -> None:
    d = real()
    ran = d.mlxd("start")
    assert ran.returncode == 0, ran.stderr
    assert re.match(r"ready  http://127\.0\.0\.1:\d+  mlxd-tiny  memory \d+ MB  restarts 0\n", ran.stdout)
    assert "self-test and demo" in ran.stdout and "stop   python -m mlxd stop" in ran.stdout
    curl = next(line for line in ran.stdout.splitlines() if line.startswith("try")).split("curl ", 1)[1]
    url, body = re.fullmatch(r"(\S+) -d '(.*)'", curl).groups()  # type: ignore[union-attr]
    port = int(url.split(":")[2].split("/")[0])
    lines = post(port, "/api/chat", body.encode())[2].decode().splitlines()
    assert '"done":true' in "".join(lines)
    again = d.mlxd("start")
    assert again.returncode == 0 and again.stdout.startswith("ready")
    status = d.mlxd("status")
    assert status.returncode == 0
    rows = [line.split()[0] for line in status.stdout.splitlines()]
    assert rows[:4] == ["ready", "supervisor", "server", "engine-1"]
    assert "engine-1" in d.mlxd("logs", "-n", "5").stdout
    assert d.mlxd("logs", "--server").returncode == 0
    stopped = d.mlxd("stop")
    assert stopped.returncode == 0 and stopped.stdout.startswith("stopped  pid ")
    assert d.mlxd("stop").stdout == "mlxd is not running\n"
    status = d.mlxd("status", "--json")
    assert status.returncode == 3 and json.loads(status.stdout)["state"] == "stopped"
    assert d.mlxd("reload").returncode == 3


def test_status_json_has_the_keys_that_programs_rely_on(running: Daemon) -> None:
    d = running
    d.ready()
    told = json.loads(d.mlxd("status", "--json").stdout)
    assert set(told) >= {"state", "reason", "url", "port", "home", "version", "supervisor", "server", "engines", "last_exit"}
    assert set(told["supervisor"]) >= {"pid", "up_s", "memory_bytes"}
    assert set(told["server"]) >= {"pid", "state", "up_s", "restarts", "memory_bytes"}
    assert set(told["engines"][0]) >= {"slot", "pid", "state", "model", "up_s", "restarts", "memory_bytes", "running"}
    status, _, body = d.get("/health")
    health = json.loads(body)
    assert status == 200 and health["status"] == "ok"
    assert set(health) >= {"status", "nonce", "version", "engines", "queue", "memory", "last_exit"}
    assert set(health["engines"][0]) >= {"model", "state", "beat_age_s", "token_age_s", "running"}
    assert d.get("/health/live")[0] == 200 and d.get("/health/ready")[0] == 200


def test_the_built_in_model_answers_its_questions_in_both_dialects(running: Daemon) -> None:
    d = running
    port = d.ready()["port"]
    for question, answer in list(KNOWN.items())[:3]:
        whole = chat(port, question)
        assert whole["message"]["content"] == answer
        assert whole["total_duration"] >= whole["load_duration"] + whole["prompt_eval_duration"] + whole["eval_duration"] > 0
        stream = Stream(port, question)
        assert "".join(stream.pieces()) == answer
        assert stream.last["eval_count"] == whole["eval_count"]
        asked = {"model": "mlxd-tiny", "messages": [{"role": "user", "content": question}], "temperature": 0}
        _, _, body = post(port, "/v1/chat/completions", json.dumps(asked).encode())
        completion = json.loads(body)
        assert completion["choices"][0]["message"]["content"] == answer
        assert completion["usage"]["completion_tokens"] == whole["eval_count"]
        assert completion["usage"]["prompt_tokens"] == whole["prompt_eval_count"]


def test_many_questions_at_once_get_each_its_own_answer(running: Daemon) -> None:
    d = running
    port = d.ready()["port"]
    questions = list(KNOWN)[:24]
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda q: chat(port, q)["message"]["content"], questions))
    assert dict(zip(questions, answers, strict=True)) == {q: KNOWN[q] for q in questions}


def test_a_seeded_answer_is_the_same_alone_and_among_others(running: Daemon) -> None:
    d = running
    port = d.ready()["port"]
    warm = [{"options": {"temperature": 1.5, "seed": n, "num_predict": 40}} for n in range(6)]
    alone = [chat(port, "Say something random.", **w)["message"]["content"] for w in warm]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda w: chat(port, "Say something random.", **w)["message"]["content"], warm))
    assert together == alone
    assert len(set(alone)) > 1


# --- killing things -----------------------------------------------------------------------------------------------------


def test_a_stream_goes_on_where_it_stopped_when_the_engine_is_killed(real: Callable[..., Daemon]) -> None:
    d = real(MLXD_SUPERVISOR_SPARE_BYTES="0")
    d.start()
    told = d.ready()
    stream = Stream(told["port"], LONGEST)
    text = []
    for count, piece in enumerate(stream.pieces()):
        text.append(piece)
        if count == 20:
            os.kill(told["engines"][0]["pid"], signal.SIGKILL)
    assert "".join(text) == LONG[LONGEST]
    assert d.ready()["engines"][0]["pid"] != told["engines"][0]["pid"]


def test_a_request_that_comes_while_the_engine_is_replaced_waits_and_is_answered(real: Callable[..., Daemon]) -> None:
    d = real()
    d.start()
    told = d.ready()
    os.kill(told["engines"][0]["pid"], signal.SIGABRT)
    question, answer = next(iter(KNOWN.items()))
    assert chat(told["port"], question)["message"]["content"] == answer


def test_kill_9_of_the_server_refuses_no_connection(real: Callable[..., Daemon]) -> None:
    d = real()
    d.start()
    port = d.ready()["port"]
    stop = threading.Event()
    refused: list[OSError] = []
    answered: list[int] = []

    def client() -> None:
        while not stop.is_set():
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
                    sock.sendall(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                    if data := sock.recv(200):
                        answered.append(int(data.split()[1]))
            except ConnectionResetError:
                pass  # it was inside the server that was killed
            except OSError as error:
                refused.append(error)
            time.sleep(0.01)  # the daemon's share of the machine

    clients = [threading.Thread(target=client) for _ in range(20)]
    for one in clients:
        one.start()
    try:
        for n in range(2):
            told = d.until("ready", lambda s, n=n: s["server"]["state"] == "ready" and s["server"]["restarts"] == n)
            seen = len(answered)
            eventually(lambda seen=seen: len(answered) > seen + 40, "answers", d.history)
            os.kill(told["server"]["pid"], signal.SIGKILL)
        d.until("ready", lambda s: s["server"]["state"] == "ready" and s["server"]["restarts"] == 2)
    finally:
        stop.set()
        for one in clients:
            one.join()
    assert not refused
    assert set(answered) <= {200, 503}


def test_an_engine_whose_socket_file_was_removed_is_found_by_the_next_server(real: Callable[..., Daemon]) -> None:
    d = real(MLXD_SUPERVISOR_TAKEOVER_S="3600")
    d.start()
    told = d.ready()
    file = d.paths.engine_socket(told["engines"][0]["slot"])
    file.unlink()
    eventually(file.exists, "the socket again", d.history)
    os.kill(told["server"]["pid"], signal.SIGKILL)
    question, answer = next(iter(KNOWN.items()))
    assert chat(told["port"], question)["message"]["content"] == answer


def test_a_server_that_is_told_to_end_from_outside_is_not_at_fault(real: Callable[..., Daemon]) -> None:
    d = real(MLXD_SUPERVISOR_DEATHS="2")
    d.start()
    for n in range(3):
        told = d.until("ready", lambda s, n=n: s["server"]["state"] == "ready" and s["server"]["restarts"] == n)
        os.kill(told["server"]["pid"], signal.SIGTERM)
    d.until("ready", lambda s: s["state"] == "ready" and s["server"]["restarts"] == 3)


def test_a_restart_under_load_fails_no_request(real: Callable[..., Daemon]) -> None:
    d = real()
    d.start()
    port = d.ready()["port"]
    question, answer = next(iter(KNOWN.items()))
    stop = threading.Event()

    def client() -> int:
        count = 0
        while not stop.is_set():
            assert chat(port, question)["message"]["content"] == answer
            count += 1
        return count

    stream = Stream(port, LONGEST)
    pieces = stream.pieces()
    text = [next(pieces) for _ in range(10)]
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client) for _ in range(4)]
        try:
            ran = d.mlxd("restart")
        finally:
            stop.set()
        assert ran.returncode == 0, ran.stderr
        assert sum(one.result() for one in clients) > 0
    assert "".join(text + list(pieces)) == LONG[LONGEST]


def test_kill_9_of_the_supervisor_leaves_nothing_and_the_next_start_is_clean(real: Callable[..., Daemon]) -> None:
    d = real()
    d.start()
    told = d.ready()
    os.kill(told["supervisor"]["pid"], signal.SIGKILL)
    d.processes[0].wait(60)
    eventually(lambda: not d.ours(), "the end of every process", d.history)
    ran = d.mlxd("start", "--json")
    assert ran.returncode == 0 and json.loads(ran.stdout)["state"] == "ready"


# --- models -------------------------------------------------------------------------------------------------------------


def test_a_model_copied_into_the_directory_is_listed_and_loaded_on_demand(real: Callable[..., Daemon], home: Path) -> None:
    d = real(MLX_MAX_CACHED_MODELS="1", MLX_PRELOAD_MODELS="mlxd-tiny")
    shutil.copytree(BUILTIN, home / "models" / "copy")
    d.start()
    port = d.ready()["port"]
    names = {m["name"] for m in json.loads(d.get("/api/tags")[2])["models"]}
    assert names == {"mlxd-tiny:latest", "copy:latest"}
    question, answer = next(iter(KNOWN.items()))
    with ThreadPoolExecutor(4) as pool:  # later ones join the load
        for whole in pool.map(lambda _: chat(port, question, "copy"), range(4)):
            assert whole["message"]["content"] == answer and whole["model"] == "copy"
    told = d.until("one engine", lambda s: [e["model"] for e in s["engines"] if e["model"]] == ["copy:latest"])
    assert told["engines"]
    assert chat(port, question)["message"]["content"] == answer  # and back


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:1000]), "model.safetensors"),
        (lambda m: (m / "config.json").write_text("{"), "config.json"),
        (lambda m: (m / "tokenizer.json").unlink(), "tokenizer"),
        (
            lambda m: (m / "config.json").write_text(
                json.dumps(json.loads((m / "config.json").read_text()) | {"model_file": "canary.py"})
            ),
            "code",
        ),
    ],
)
def test_a_model_that_cannot_be_loaded_is_a_400_that_says_why(
    running: Daemon, tmp_path: Path, break_it: Callable[[Path], object], sentence: str
) -> None:
    d = running
    model = d.home / "models" / tmp_path.name
    shutil.copytree(BUILTIN, model)
    (model / "canary.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    break_it(model)
    port = d.ready()["port"]
    for path in ("/api/chat", "/v1/chat/completions"):
        status, _, body = post(port, path, body_of("hello", model.name))
        assert status == 400, body
        error = json.loads(body)["error"]
        message = error if path == "/api/chat" else error["message"]
        assert sentence in message and str(d.home) not in message, message
    assert not (tmp_path / "canary").exists()
    question, answer = next(iter(KNOWN.items()))
    assert chat(port, question)["message"]["content"] == answer
    assert d.status()["state"] == "ready"


def test_a_preload_that_cannot_load_is_degraded_never_an_exit(real: Callable[..., Daemon]) -> None:
    d = real(MLX_PRELOAD_MODELS="no-such-model")
    ran = d.mlxd("start")
    assert ran.returncode == 0
    assert "no-such-model" in ran.stdout and ran.stdout.startswith("degraded"), ran.stdout
    question, answer = next(iter(KNOWN.items()))
    assert chat(d.status()["port"], question)["message"]["content"] == answer


# --- bad input ----------------------------------------------------------------------------------------------------------


def test_bad_requests_get_a_sentence_and_disturb_nobody(running: Daemon) -> None:
    d = running
    told = d.ready()
    port = told["port"]
    stream = Stream(port, LONGEST)
    pieces = stream.pieces()
    text = [next(pieces)]
    for path, body, status, sentence in [
        ("/api/chat", body_of("x", "nobody"), 404, "model 'nobody' not found"),
        ("/v1/chat/completions", body_of("x", "nobody"), 404, "model 'nobody' not found"),
        ("/api/chat", b"{", 400, ""),
        ("/api/chat", b"", 400, "missing request body"),
        ("/api/chat", b"[" * 100_000, 400, ""),
        ("/api/chat", b'{"model": 3}', 400, "model"),
        ("/api/chat", body_of("x", options={"temperature": "hot"}), 400, "temperature"),
        ("/api/chat", body_of("word " * 5000, truncate=False), 400, "context"),
        ("/v1/chat/completions", body_of("word " * 5000), 400, "context"),
    ]:
        got, _, answer = post(port, path, body)
        assert got == status, (path, body[:60], answer)
        error = json.loads(answer)["error"]
        assert sentence in (error["message"] if path.startswith("/v1") else error)
    status, _, answer = post(port, "/api/generate", b'{"model": "mlxd-tiny"}')
    assert status == 200 and json.loads(answer)["done_reason"] == "load"
    assert "".join(text + list(pieces)) == LONG[LONGEST]
    after = d.ready()
    assert after["engines"][0]["pid"] == told["engines"][0]["pid"]


def test_a_client_that_leaves_frees_its_slot(real: Callable[..., Daemon]) -> None:
    d = real(MLX_MAX_CONCURRENT="1")
    d.start()
    port = d.ready()["port"]
    question, answer = next(iter(KNOWN.items()))
    for _ in range(3):
        stream = Stream(port, LONGEST)
        next(stream.pieces())
        stream.file.close()
        stream.sock.close()
        assert chat(port, question)["message"]["content"] == answer
    eventually(lambda: json.loads(d.get("/health")[2])["queue"] == {"running": 0, "waiting": 0}, "an empty queue", d.history)


def test_the_app_is_imported_anywhere_without_side_effects_and_without_mlx(tmp_path: Path) -> None:
    code = "import sys; from mlxd.server import app; print(sorted(m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm')))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "[]\n" and ran.stderr == ""
    assert list(tmp_path.iterdir()) == []
