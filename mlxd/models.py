"""Models: their names, and the catalogue of those on this machine.

Reads names, sizes and JSON headers; never a weight, and no library of models ever sees a directory from here.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

import mlxd
from mlxd.errors import Refused
from mlxd.modelfiles import ENCODERS, MAX_JSON_BYTES, Broken, check_tokenizer, read_json, read_weights, refuse_code

BUILTIN = "mlxd-tiny:latest"
#: `[host/][namespace/]model[:tag]`, Ollama's alphabet; its parts are at most 80 characters.
PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
NAME = re.compile(rf"(?:{PART}(?::[0-9]+)?/)?(?:{PART}/)?{PART}(?::{PART})?")
#: Bits of the dtypes that safetensors knows, of those models come in.
DTYPE_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U32": 32, "U8": 8, "BOOL": 8}


class Model(Struct, frozen=True):
    """A model that can be loaded. `name` is canonical: with its tag. `modified_at`: seconds since 1970. `digest`: 64 hex digits
    over names, sizes and times of its files. `parameters`: how many, 0 when its files do not say. `embeds`: it does nothing else."""

    name: str
    directory: Path
    size_bytes: int
    digest: str
    modified_at: float
    family: str
    parameters: int
    quantization: str
    context_length: int
    embedding_length: int
    thinks: bool
    embeds: bool

    @property
    def builtin(self) -> bool:
        return self.name == BUILTIN

    @property
    def parameter_size(self) -> str:
        """As people say it: 7.6B, 135M, 700K."""
        for unit, one in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
            if self.parameters >= one:
                return f"{self.parameters / one:.3g}{unit}"
        return str(self.parameters)


def canonical(name: str) -> str:
    """The name with its tag, as written. Raises Refused on one that cannot be a name."""
    if not name.strip():
        raise Refused(400, "model is required")
    if not NAME.fullmatch(name) or ".." in name:
        raise Refused(400, "invalid model name")
    return name if ":" in name.rpartition("/")[2] else name + ":latest"


class Catalogue:
    """The models on this machine, by name. Looking is cheap: a directory is read again only when it has changed.

    `scan` may be called in any thread; a `find` that hits does one stat.
    """

    def __init__(self, root: str, environ: Mapping[str, str] = os.environ):
        self.root = Path(root).expanduser()
        self.hub = hub_directory(environ)
        self.found: dict[str, Model] = {}
        self.broken: dict[str, str] = {}
        self.seen: dict[Path, tuple[object, Model | str]] = {}
        self.lock = threading.Lock()

    def known(self, name: str) -> Model | None:
        """The model called so, if it was there at the last scan and its directory has not changed since. Raises Refused (400)."""
        model = self.found.get(canonical(name).lower())
        if model is None or self.seen.get(model.directory, (None,))[0] != stamp(model.directory):
            return None
        return model

    def find(self, name: str) -> Model:
        """The model called so, looking anew. Raises Refused: 404 unknown, 400 malformed, broken, or with code of its own."""
        key = canonical(name).lower()
        self.scan()
        if key in self.found:
            return self.found[key]
        if key in self.broken:
            raise Refused(400, f"model '{name}' cannot be loaded: {self.broken[key]}")
        raise Refused(404, f"model '{name}' not found", code="model_not_found")

    def scan(self) -> list[Model]:
        """All models, newest first."""
        with self.lock:
            found: dict[str, Model] = {}
            broken: dict[str, str] = {}
            seen: dict[Path, tuple[object, Model | str]] = {}
            for name, directory in candidates(self.root, self.hub):
                key = name.lower()
                if key in found or not NAME.fullmatch(name):
                    continue
                now = stamp(directory)
                then = self.seen.get(directory)
                seen[directory] = then if then and then[0] == now else (now, examine(name, directory))
                match seen[directory][1]:
                    case Model() as model:
                        found[key] = model
                    case str() as why:
                        broken[key] = why
            self.found, self.broken, self.seen = found, broken, seen
            return sorted(found.values(), key=lambda model: -model.modified_at)


def hub_directory(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps what it downloads."""
    if cache := environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def candidates(root: Path, hub: Path) -> Iterator[tuple[str, Path]]:
    """Names and directories that may be models; of one name the first counts."""
    yield BUILTIN, Path(mlxd.__file__).parent / "builtin"
    for directory in subdirectories(root):
        if looks_like_model(directory):
            yield tagged(directory.name), directory
        else:
            for nested in subdirectories(directory):
                if looks_like_model(nested):
                    yield tagged(f"{directory.name}/{nested.name}"), nested
    for repository in subdirectories(hub):
        kind, _, name = repository.name.partition("--")
        if kind == "models" and (snapshot := current_snapshot(repository)) and looks_like_model(snapshot):
            yield tagged(name.replace("--", "/", 1)), snapshot


def subdirectories(directory: Path) -> list[Path]:
    """The visible ones, by name; none of a directory that is not there or not ours to read."""
    try:
        with os.scandir(directory) as entries:
            return sorted(Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError:
        return []


def tagged(name: str) -> str:
    return name if ":" in name else name + ":latest"


def looks_like_model(directory: Path) -> bool:
    """Something of a model is here: what is missing is said when it is asked for."""
    try:
        return any(path.name == "config.json" or path.suffix == ".safetensors" for path in directory.iterdir())
    except OSError:
        return False


def current_snapshot(repository: Path) -> Path | None:
    """What the main branch of a repository in the hub's cache points to."""
    try:
        revision = (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return repository / "snapshots" / revision if re.fullmatch(r"[0-9a-f]{40}", revision) else None


def stamp(directory: Path) -> object:
    """Changes when the files here do; None when there is nothing."""
    try:
        with os.scandir(directory) as entries:
            files = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return None
    return hash(tuple(sorted((name, found.st_size, found.st_mtime_ns) for name, found in files)))


def examine(name: str, directory: Path) -> Model | str:
    """The model in a directory, or why it is none."""
    try:
        return read_model(name, directory)
    except Broken as why:
        return str(why)
    except OSError as error:
        return f"{Path(error.filename or directory).name}: {error.strerror}"


def read_model(name: str, directory: Path) -> Model:
    """Raises Broken with the file that is missing or wrong, OSError."""
    config = read_json(directory / "config.json")
    files = sorted(path for path in directory.iterdir() if path.is_file())
    names = {path.name for path in files}
    settings = {name: read_json(directory / name) for name in ("tokenizer_config.json", "generation_config.json") if name in names}
    refuse_code("config.json", config)
    for file, found in settings.items():
        refuse_code(file, found)
    tensors = read_weights(directory, names)
    check_tokenizer(names)
    stats = [path.stat() for path in files]
    nested = config.get("text_config")  # of models that see or hear
    text = nested if isinstance(nested, dict) else config
    identity = [(path.name, found.st_size, found.st_mtime_ns) for path, found in zip(files, stats, strict=True)]
    return Model(
        name=name,
        directory=directory.absolute(),
        size_bytes=sum(found.st_size for path, found in zip(files, stats, strict=True) if path.suffix == ".safetensors"),
        digest=hashlib.sha256(repr(identity).encode()).hexdigest(),
        modified_at=max(found.st_mtime for found in stats),
        family=str(config.get("model_type") or "unknown"),
        parameters=count_parameters(tensors, quantized_bits(config)),
        quantization=quantization(tensors, quantized_bits(config)),
        context_length=whole(text.get("max_position_embeddings")),
        embedding_length=whole(text.get("hidden_size")),
        thinks=thinks(directory, settings.get("tokenizer_config.json", {})),
        embeds=config.get("model_type") in ENCODERS,
    )


def chat_template(directory: Path) -> str:
    """The template's text, "" without one; the default one of several. Raises Broken, OSError."""
    file = directory / "chat_template.jinja"
    if file.is_file() and file.stat().st_size <= MAX_JSON_BYTES:
        return file.read_text(encoding="utf-8", errors="replace")
    config = directory / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        named = {str(one.get("name")): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else ""


def whole(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def quantized_bits(config: dict[str, Any]) -> int:
    """Bits per weight of a model quantised by mlx-lm; 0 when it is not."""
    settings = config.get("quantization")
    return whole(settings.get("bits")) if isinstance(settings, dict) else 0


def count_parameters(tensors: Mapping[str, tuple[str, list[int]]], bits: int) -> int:
    """mlx packs quantised weights into 32-bit words, and puts `scales` and `biases` beside them."""
    count = 0
    for name, (dtype, shape) in tensors.items():
        stem, _, last = name.rpartition(".")
        packed = bits and f"{stem}.scales" in tensors
        if packed and last in ("scales", "biases"):
            continue
        count += math.prod(shape) * 32 // bits if packed and dtype == "U32" else math.prod(shape)
    return count


def quantization(tensors: Mapping[str, tuple[str, list[int]]], bits: int) -> str:
    """ "4bit" when quantised, else the dtype that holds the most: "BF16"."""
    if bits:
        return f"{bits}bit"
    held: dict[str, int] = {}
    for dtype, shape in tensors.values():
        held[dtype] = held.get(dtype, 0) + math.prod(shape) * DTYPE_BITS.get(dtype, 8)
    return max(held, key=held.__getitem__, default="unknown")


def thinks(directory: Path, tokenizer_config: dict[str, Any]) -> bool:
    """Its vocabulary has the tags that mlx-lm takes for thinking. tokenizer.json, of many MB, is read only when the settings list no
    added tokens."""
    added = tokenizer_config.get("added_tokens_decoder")
    if isinstance(added, dict) and added:
        return {"<think>", "</think>"} <= {str(token.get("content")) for token in added.values() if isinstance(token, dict)}
    path = directory / "tokenizer.json"
    if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
        return False
    text = path.read_bytes()
    return b'"<think>"' in text and b'"</think>"' in text
