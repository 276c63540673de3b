"""How Ollama does, from outside: its version, its models in memory, and whether one of them still gives a token."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from typing import Any

from mlxd import probe
from mlxd.probe import Look

#: A model that Ollama is about to unload is not asked for a token: that would load it again.
LEAVING_S = 10.0
#: One that should have been unloaded for longer than this is stuck.
STUCK_S = 300.0
#: Of each question in the course of unloading.
UNLOAD_S = 2.0


def look(url: str, limit_s: float, probe_s: float | None = None) -> Look:
    """`limit_s`: of each question. `probe_s`: of one token by a model that it has loaded; None: none is asked for."""
    try:
        reply = probe.fetch(f"{url}/api/version", limit_s)
    except probe.NoReply as no:
        if no.how == "garbled":
            return Look("stranger", f"what listens there is not Ollama: {no}", advice=not_ollama(url))
        return Look(no.how, str(no))
    version = reply.json.get("version")
    if reply.status != 200 or not isinstance(version, str):
        return Look("stranger", f"what answers there is not Ollama (status {reply.status})", reply.seconds, advice=not_ollama(url))
    try:
        told = probe.fetch(f"{url}/api/ps", limit_s).json.get("models")
        models = told if isinstance(told, list) else []
        models = [model for model in models if isinstance(model, dict) and isinstance(model.get("name"), str)]
        if probe_s is not None and (body := question(models, datetime.now(UTC))) is not None:
            probe.fetch(f"{url}/api/generate", probe_s, body)
    except probe.NoReply as no:
        return Look("wedged", f"/api/version answers, and nothing that a model is needed for: {no}", reply.seconds, version=version)
    memory = sum(size for model in models if isinstance(size := model.get("size"), int))
    return Look("up", "", reply.seconds, version=version, models=[model["name"] for model in models], memory_bytes=memory)


def unload(url: str) -> list[str]:
    """Ask Ollama to unload every model that it has in memory, each as soon as it is idle; their names. None when it does not answer."""
    try:
        told = probe.fetch(f"{url}/api/ps", UNLOAD_S).json.get("models")
    except probe.NoReply:
        return []
    names = [str(model["name"]) for model in told if isinstance(model, dict) and "name" in model] if isinstance(told, list) else []
    for name in names:
        with contextlib.suppress(probe.NoReply):  # one that is busy answers late, and has been told
            probe.fetch(f"{url}/api/generate", UNLOAD_S, json.dumps({"model": name, "keep_alive": 0}).encode())
    return names


def not_ollama(url: str) -> str:
    return f"end what holds port {probe.port_of(url)}, or set OLLAMA_URL to where Ollama is"


def question(models: list[dict[str, Any]], now: datetime) -> bytes | None:
    """Asks a loaded model for one token and leaves the time of its unloading as it is; None when there is none to ask."""
    for model in models:
        try:
            left_s = (datetime.fromisoformat(str(model.get("expires_at"))) - now).total_seconds()
        except (ValueError, TypeError):
            continue
        if -STUCK_S < left_s < LEAVING_S:
            continue
        keep_alive = -1 if left_s > 1e9 else max(0, round(left_s))
        asked = {"model": model["name"], "prompt": ".", "raw": True, "stream": False, "keep_alive": keep_alive}
        return json.dumps(asked | {"options": {"num_predict": 1}}).encode()
    return None
