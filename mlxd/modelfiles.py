"""A model's files, looked at before any library opens them: settings, weights' headers, and whether code would have to run.

The server asks when it lists models, the engine again when it loads one. Pure Python and no MLX; nothing here believes a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from mlxd.errors import MlxdError

INDEX = "model.safetensors.index.json"
#: What `model_type` says of models that only embed; our own `engine/bert.py` runs them.
ENCODERS = ("bert", "roberta", "xlm-roberta")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")
#: Keys whose presence means that the model cannot work without running code that came with it (CVE-2026-5843 is one of them).
CODE_KEYS = ("model_file", "trust_remote_code", "custom_pipelines")
#: The format's own bound on a header (safetensors, MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
#: tokenizer.json of the largest vocabularies is some 35 MB.
MAX_JSON_BYTES = 64 * 1024 * 1024


class Broken(MlxdError):
    """A directory that looks like a model and cannot be one. The text goes to clients: it names the file and what to do, not where it lies."""


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file. Raises Broken."""
    value = read_value(path)
    if not isinstance(value, dict):
        raise Broken(f"{path.name} is not a JSON object; mend it or download the model again")
    return value


def read_list(path: Path) -> list[Any]:
    """A list from a file. Raises Broken."""
    value = read_value(path)
    if not isinstance(value, list):
        raise Broken(f"{path.name} is not a JSON list; mend it or download the model again")
    return value


def read_value(path: Path) -> Any:
    """Raises Broken."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise Broken(f"{path.name} is too large to be true; download the model again")
        return msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        raise Broken(f"{path.name} is missing; download the model again") from None
    except OSError as error:
        raise Broken(f"{path.name} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Broken(f"{path.name} is not valid JSON: {error}; mend it or download the model again") from None


def refuse_code(name: str, found: Any) -> None:
    """Raises Broken if the settings `found` in file `name` ask, at any depth, for code of the model's own. `auto_map` is for other tools and
    left out of what libraries see."""
    if isinstance(found, dict):
        for key, value in found.items():
            if key in CODE_KEYS and value:
                raise Broken(f"{name} asks to run code that came with the model ({key}); mlxd never does: use a model without it")
            refuse_code(name, value)
    elif isinstance(found, list):
        for value in found:
            refuse_code(name, value)


def check_tokenizer(names: Iterable[str]) -> None:
    """Raises Broken unless one of the files is a tokenizer."""
    if not any(name in TOKENIZERS or name.endswith(".tiktoken") for name in names):
        raise Broken("tokenizer.json is missing; download the model again")


def read_weights(directory: Path, names: Iterable[str]) -> dict[str, tuple[str, list[int]]]:
    """Tensor -> dtype and shape of a whole model; every shard that the index names is there and whole. Raises Broken."""
    shards = [name for name in names if name.endswith(".safetensors")]
    if INDEX in names:
        wanted = read_json(directory / INDEX).get("weight_map")
        if not isinstance(wanted, dict):
            raise Broken(f"{INDEX} has no weight_map; download the model again")
        for name in sorted({str(name) for name in wanted.values()} - set(shards)):
            raise Broken(f"{name} is missing, {INDEX} names it; download the model again")
    if not shards:
        raise Broken("model.safetensors is missing; download the model again")
    return {tensor: shape for name in shards for tensor, shape in read_header(directory / name).items()}


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor -> dtype and shape, from a safetensors file's header, which must describe the file to the byte. Raises Broken.

    MLX reads lazily and believes the header. Format: 8 bytes length, little-endian, that many bytes of JSON, the data.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise Broken(f"{path.name} is cut short or no safetensors file; download it again")
            if length > MAX_HEADER_BYTES:
                raise Broken(f"{path.name} is no safetensors file; download it again")
            header = msgspec.json.decode(file.read(length), type=dict[str, dict[str, Any]])
        tensors = {name: (str(t["dtype"]), [int(n) for n in t["shape"]]) for name, t in header.items() if name != "__metadata__"}
        end = max((int(t["data_offsets"][1]) for name, t in header.items() if name != "__metadata__"), default=0)
    except OSError as error:
        raise Broken(f"{path.name} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError, TypeError, ValueError):
        raise Broken(f"{path.name} is no safetensors file; download it again") from None
    if end > size - 8 - length:
        raise Broken(f"{path.name} is cut short; download it again")
    if end < size - 8 - length:
        raise Broken(f"{path.name} is longer than its header says; download it again")
    return tensors
