"""What the Ollama dialect tells of models, as /api/tags and /api/show have it. Knows no request: `mlxd list` and `mlxd show` say the same
without a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from mlxd.aliases import Parameters
from mlxd.modelfiles import Broken
from mlxd.models import Model, chat_template, license_text, read_tensors

T = TypeVar("T")


def described(model: Model) -> dict[str, Any]:
    """An entry of the lists. Every string in `details` is needed: one null hides all models from Zed."""
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": timestamp(model.modified_at),
        "size": model.size_bytes,
        "digest": model.digest,
        "details": {
            "parent_model": model.weights.name if model.alias else "",
            "format": "safetensors",
            "family": model.family,
            "families": [model.family],
            "parameter_size": model.parameter_size,
            "quantization_level": model.quantization,
        }
        | ({"description": "built-in model of mlxd, for self-test and demo"} if model.builtin else {}),
        "capabilities": capabilities(model),
    }


def capabilities(model: Model) -> list[str]:
    if model.embeds:
        return ["embedding"]
    can = {"completion": True, "tools": model.calls, "insert": model.inserts, "thinking": model.thinks}
    return [name for name, able in can.items() if able]


def shown(model: Model, basename: str, verbose: bool = False) -> dict[str, Any]:
    """All that is known of a model; `verbose`: its tensors, too. `basename`: what Copilot shows as its name."""
    entry = described(model)
    alias = model.alias
    licenses = [read(license_text, model, ""), *(alias.license if alias else [])]
    body: dict[str, Any] = {
        "modelfile": modelfile(model),
        "parameters": "\n".join(parameter_lines(alias.parameters)) if alias else "",
        "template": (alias and alias.template) or read(chat_template, model, ""),
        "details": entry["details"],
        "model_info": {
            "general.architecture": model.family,
            "general.basename": basename,
            "general.parameter_count": model.parameters,
            f"{model.family}.context_length": model.context_length,
            f"{model.family}.embedding_length": model.embedding_length,
        },
        "capabilities": entry["capabilities"],
        "modified_at": entry["modified_at"],
    }
    if text := "\n".join(filter(None, licenses)):
        body["license"] = text
    if alias and alias.system:
        body["system"] = alias.system
    if alias and alias.messages:
        body["messages"] = alias.messages
    if verbose:
        nothing: list[dict[str, Any]] = []
        body["tensors"] = read(tensors, model, nothing)
    return body


def read(look: Callable[[Path], T], model: Model, nothing: T) -> T:
    """What `look` finds in a model's directory; `nothing` when that cannot be read."""
    try:
        return look(model.directory)
    except (Broken, OSError):
        return nothing


def tensors(directory: Path) -> list[dict[str, Any]]:
    """Raises Broken, OSError."""
    return [{"name": name, "type": dtype, "shape": shape} for name, (dtype, shape) in sorted(read_tensors(directory).items())]


def modelfile(model: Model) -> str:
    """In Ollama's language, where three quotes hold a text of several lines."""
    lines = ["# The built-in model of mlxd, for self-test and demo."] if model.builtin else []
    lines.append(f"FROM {model.weights.name}")
    if model.alias:
        lines += [f"PARAMETER {line}" for line in parameter_lines(model.alias.parameters)]
        lines += [f'SYSTEM """{model.alias.system}"""'] if model.alias.system else []
        lines += [f'MESSAGE {message["role"]} """{message["content"]}"""' for message in model.alias.messages]
    return "\n".join(lines) + "\n"


def parameter_lines(said: Parameters) -> list[str]:
    """Name, blanks, value: Continue's parser breaks on anything else."""
    pairs = [(name, one) for name, value in said.said().items() for one in (value if isinstance(value, list) else [value])]
    return [f"{name:<30} {json.dumps(value, ensure_ascii=False)}" for name, value in pairs]


def timestamp(seconds: float | None = None) -> str:
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
