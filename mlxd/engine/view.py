"""A private view of a model's directory: what libraries may see of it, and whether they may see it at all.

Owns the checks that come before any library opens a file, and the view: links to the files that are data, and copies of the small
JSON files without what would call code. Imports nothing of MLX.
"""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import re
import shutil
import stat
import struct
from pathlib import Path
from typing import Any

from mlxd.errors import MlxdError

#: Linked into the view, besides the weights. No *.py, no pickle.
DATA = {
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tiktoken.model",
}
#: Read, stripped of `auto_map` and written into the view.
SETTINGS = {
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "hf_quant_config.json",
}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")
#: Keys whose presence means that the model cannot work without running code that came with it.
CODE_KEYS = ("model_file", "trust_remote_code", "custom_pipelines")
#: The format's own bound on a header (safetensors, MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
MAX_SETTINGS_BYTES = 16 * 1024 * 1024


class Unloadable(MlxdError):
    """This model can never be loaded as it is; the message names the file and says what to do."""


def make_view(directory: Path, view: Path) -> dict[str, Any]:
    """Check the model in `directory` and make `view` anew from it. Returns the model's config.json. Raises Unloadable."""
    try:
        names = sorted(p.name for p in directory.iterdir() if is_data_file(p))
    except OSError as error:
        raise Unloadable(f"no model at {directory}: {error.strerror}; put the model's files there or name another model") from error
    settings = {name: read_settings(directory / name) for name in names if name in SETTINGS}
    config = settings.get("config.json")
    if config is None:
        raise Unloadable(f"no model at {directory}: config.json is missing; download the model again")
    for name, found in settings.items():
        refuse_code(directory / name, found)
    check_model_type(directory / "config.json", config)
    check_plugins(directory / "tokenizer_config.json", settings.get("tokenizer_config.json", {}))
    check_weights(directory, names)
    if not any(name in TOKENIZERS or name.endswith(".tiktoken") for name in names):
        raise Unloadable(f"{directory} has no tokenizer: tokenizer.json is missing; download the model again")
    shutil.rmtree(view, ignore_errors=True)
    view.mkdir(parents=True, mode=0o700)
    for name in names:
        if name in settings:
            (view / name).write_text(json.dumps(without_auto_map(settings[name])), encoding="utf-8")
        elif name in DATA or name.endswith((".safetensors", ".jinja", ".tiktoken")):
            (view / name).symlink_to((directory / name).resolve())
    return config


def is_data_file(path: Path) -> bool:
    """A regular file, or a link to one: the Hugging Face cache is links."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object. Raises Unloadable."""
    try:
        if path.stat().st_size > MAX_SETTINGS_BYTES:
            raise Unloadable(
                f"{path} is over {MAX_SETTINGS_BYTES // 2**20} MiB: that is no settings file; download the model again"
            )
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Unloadable(f"{path} cannot be read: {error}; mend it or download the model again") from error
    if not isinstance(found, dict):
        raise Unloadable(f"{path} is not a JSON object; mend it or download the model again")
    return found


def refuse_code(path: Path, found: Any) -> None:
    """Raises Unloadable if a settings file asks, at any depth, for code of the model's own."""
    if isinstance(found, dict):
        for key, value in found.items():
            if key in CODE_KEYS and value:
                raise Unloadable(
                    f"{path} asks to run code that came with the model ({key}); mlxd never does: use a model without it"
                )
            refuse_code(path, value)
    elif isinstance(found, list):
        for value in found:
            refuse_code(path, value)


def without_auto_map(found: Any) -> Any:
    """`auto_map` names code for other tools; models that carry it load without."""
    if isinstance(found, dict):
        return {key: without_auto_map(value) for key, value in found.items() if key != "auto_map"}
    if isinstance(found, list):
        return [without_auto_map(value) for value in found]
    return found


def check_model_type(path: Path, config: dict[str, Any]) -> None:
    from mlx_lm.utils import MODEL_REMAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise Unloadable(f"{path} names no model_type; mlxd needs a model in MLX's format")
    module = MODEL_REMAPPING.get(model_type, model_type)
    if not re.fullmatch(r"\w+", module) or importlib.util.find_spec(f"mlx_lm.models.{module}") is None:
        raise Unloadable(f"{path} has model_type {model_type!r}, which mlx-lm cannot run; use a text model that it supports")


def check_plugins(path: Path, config: dict[str, Any]) -> None:
    """Both names reach importlib in mlx-lm; only its own modules may be named."""
    import mlx_lm.chat_templates
    import mlx_lm.tool_parsers

    for key, package in (("tool_parser_type", mlx_lm.tool_parsers), ("chat_template_type", mlx_lm.chat_templates)):
        known = [module.name for module in pkgutil.iter_modules(package.__path__)]
        if config.get(key) and config[key] not in known:
            raise Unloadable(f"{path} has {key} {config[key]!r}, which mlx-lm does not know; known are {', '.join(known)}")


def check_weights(directory: Path, names: list[str]) -> None:
    """Every shard is there and whole. Raises Unloadable."""
    shards = [name for name in names if name.startswith("model") and name.endswith(".safetensors")]
    index = directory / "model.safetensors.index.json"
    if index.name in names:
        wanted = read_settings(index).get("weight_map")
        if not isinstance(wanted, dict):
            raise Unloadable(f"{index} has no weight_map; download the model again")
        for name in sorted({str(name) for name in wanted.values()} - set(shards)):
            raise Unloadable(f"{directory / name} is missing, {index.name} names it; download the model again")
    if not shards:
        raise Unloadable(f"{directory} has no weights: model.safetensors is missing; download the model again")
    for name in shards:
        check_safetensors(directory / name)


def check_safetensors(path: Path) -> None:
    """The header can be read and what it describes lies in the file. Raises Unloadable.

    MLX reads lazily and believes the header. Format: 8 bytes length, little-endian, that many bytes of JSON, the data.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
        if end != size - 8 - length:
            raise ValueError(f"{size - 8 - length} bytes of weights where the header describes {end}")
    except (OSError, ValueError, struct.error, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise Unloadable(f"{path} is damaged: {error}; download it again") from error
