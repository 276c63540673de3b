"""A request whose output is no numbers, through the whole of mlxd."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from conftest import Daemon, http
from engine_client import make_tiny_model, spoil_row
from tokenizers import Tokenizer


def test_a_request_that_makes_no_numbers_is_given_up_and_no_other(daemon: Callable[..., Daemon], home: Path) -> None:
    model = make_tiny_model(home / "models" / "m", config={"tie_word_embeddings": False, "max_position_embeddings": 100_000})
    (guilty,) = set(Tokenizer.from_file(str(model / "tokenizer.json")).encode("\x00").ids)
    d = daemon(server=None, engine=None, MLX_MODELS_DIR=str(home / "models"), HF_HOME=str(home / "hub"), MLX_PRELOAD_MODELS="m")
    d.start()

    def ask(prompt: str, **options: Any) -> tuple[int, dict[str, Any]]:
        told = {"model": "m", "raw": True, "stream": False, "prompt": prompt, "options": options}
        body = json.dumps(told).encode()
        port = d.status()["port"]
        head = f"POST /api/generate HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        status, _, answer = http(port, head.encode() + body)
        return status, json.loads(answer)

    d.ready()
    innocent: list[dict[str, Any]] = [{"temperature": 0.8, "seed": n, "num_predict": 60} for n in range(3)]
    expected = [ask("engine", **options)[1]["response"] for options in innocent]
    assert not any("\x00" in text for text in expected)
    spoil_row(model, "model.embed_tokens.weight", guilty, float("nan"))
    os.kill(d.status()["engines"][0]["pid"], signal.SIGKILL)  # the next one reads the new weights
    d.until("the next one", lambda s: s["state"] == "ready" and s["engines"][0]["restarts"] == 1)
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(ask, "engine", **options) for options in innocent]
        status, answer = pool.submit(ask, "\x00\x00").result()
        assert [other.result()[1].get("response", other.result()) for other in others] == expected, d.log()
    assert status == 500
    assert "3 times in a row" in answer["error"]
    ends = [record for record in d.exits() if record["cause"] == "error"]
    assert len(ends) == 3
    assert all(record["text"] == "the model gave no numbers, or the same for every token" for record in ends)
    assert ask("engine", **innocent[0])[1]["response"] == expected[0]
