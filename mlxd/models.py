"""Models: their names, and the catalogue of those on this machine.

Reads names, sizes and JSON headers; never a weight, and no library of models ever sees a directory from here.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

import mlxd
from mlxd import abilities, estimate
from mlxd.aliases import Alias, Aliases, Parameters
from mlxd.errors import Refused
from mlxd.messages import Sampling
from mlxd.modelfiles import (
    DTYPE_BITS,
    ENCODERS,
    FOREIGN,
    Broken,
    check_format,
    check_settings,
    check_tokenizer,
    read_json,
    read_weights,
)

log = logging.getLogger(__name__)

BUILTIN = "mlxd-tiny:latest"
BUILTIN_DIRECTORY = Path(mlxd.__file__).parent / "builtin"
#: `[host/][namespace/]model[:tag]`, Ollama's alphabet; its parts are at most 80 characters, and do not end with a dot.
PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,78}[A-Za-z0-9_-])?"
NAME = re.compile(rf"(?:{PART}(?::[0-9]+)?/)?(?:{PART}/)?{PART}(?::{PART})?")
#: Of the files that a model is made of; another one beside them makes it no other model.
PARTS = (".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".txt")
MOST_NAME = 256
#: The hub's own limit, and what it has in no name: the cache writes "/" as "--".
MOST_REPOSITORY = 96
NOT_IN_REPOSITORY = re.compile(r"--|[.-](?:/|$)|\.git(?:/|$)", re.IGNORECASE)
#: A model's directory may tell its license, in one of these.
LICENSES = ("license", "license.txt", "license.md")
MAX_LICENSE_BYTES = 64 * 1024


class Model(Struct, frozen=True):
    """A model that can be loaded. `name` is canonical: with its tag. `modified_at`: seconds since 1970. `digest`: 64 hex digits,
    see `digest`. `parameters`: how many, 0 when its files do not say. `thinks`, `calls` functions, `inserts`
    text before other text: what it can do; `embeds`: it does nothing else. `kv_bytes` of a token of context, `step_bytes` of a step: as far
    as its config tells. `alias`, `base`: under a name that is not its own, that and the model itself."""

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
    calls: bool = False
    inserts: bool = False
    embeds: bool = False
    kv_bytes: int = 0
    step_bytes: int = 0
    alias: Alias | None = None
    base: Model | None = None

    @property
    def weights(self) -> Model:
        """The model whose files these are, under its own name."""
        return self.base or self

    @property
    def builtin(self) -> bool:
        return self.weights.name == BUILTIN

    def called(self, alias: Alias) -> Model:
        """The same under another name. A mere name has the model's own digest: clients tell copies by that."""
        settings = alias.settings()
        digest = self.digest if settings == b"{}" else hashlib.sha256(self.digest.encode() + settings).hexdigest()
        return msgspec.structs.replace(self, name=alias.name, digest=digest, modified_at=alias.modified_at, alias=alias, base=self)

    def sampling(self, usual: Sampling, **asked: float | None) -> Sampling:
        """How an answer is drawn: as asked, by the names of messages.Sampling; what is None there as the alias says, else as usual. A
        negative seed is the usual one."""
        said = self.alias.parameters.sampling() if self.alias else {}
        drawn = msgspec.structs.replace(usual, **said | {name: value for name, value in asked.items() if value is not None})
        return drawn if drawn.seed >= 0 else msgspec.structs.replace(drawn, seed=usual.seed)

    def needed_bytes(self, context: int) -> int:
        """Memory for its weights, so many tokens of context and a step."""
        return self.size_bytes + context * self.kv_bytes + self.step_bytes

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
    if not is_name(name):
        raise Refused(400, "invalid model name")
    return name if ":" in name.rpartition("/")[2] else name + ":latest"


def is_name(name: str) -> bool:
    return len(name) <= MOST_NAME and ".." not in name and NAME.fullmatch(name) is not None


def repository_of(name: str) -> str:
    """The repository of the Hugging Face hub that a name means: `org/repo`. Raises Refused: 400 for what can be none, 404 without an `org`."""
    path, _, tag = canonical(name).rpartition(":")
    parts = path.split("/")
    if len(parts) == 1:
        raise Refused(
            404,
            f"model '{name}' not found; a model is pulled from the Hugging Face hub by its repository's name, org/repo, such as "
            "mlx-community/NAME",
            code="model_not_found",
        )
    if len(parts) > 2 or ":" in path:
        raise Refused(400, "a host cannot be named: write org/repo; the hub is the one in mlxd's own HF_ENDPOINT")
    if tag.lower() != "latest":
        raise Refused(400, f"a repository of the Hugging Face hub has no tag '{tag}': write {path}")
    if len(path) > MOST_REPOSITORY or NOT_IN_REPOSITORY.search(path):
        raise Refused(400, "invalid model name: the Hugging Face hub has none like it")
    return path


class Place(NamedTuple):
    """Where a model lies, whole or broken."""

    name: str
    directory: Path


class Catalogue:
    """The models on this machine, by name. Looking is cheap: a directory is read again only when it has changed. A model's own name comes
    before an alias; an alias without its model is not there, and is again when the model is.

    `known` does a few stats; the rest looks at many files, and may be called in any thread.
    """

    def __init__(self, root: str, environ: Mapping[str, str] = os.environ, aliases: Aliases | None = None):
        self.root = Path(root).expanduser()
        self.hub = hub_directory(environ).absolute()
        self.aliases = aliases or Aliases()
        self.found: dict[str, Model] = {}
        self.broken: dict[str, tuple[Place, str]] = {}
        self.seen: dict[Path, tuple[object, Model | str]] = {}
        self.left_out: set[Path] = set()
        self.lock = threading.Lock()

    def known(self, name: str) -> Model | None:
        """The model called so, if it was there at the last scan and nothing has changed since. Raises Refused (400)."""
        key = canonical(name).lower()
        alias = None if key in self.found else self.aliases.known(key)
        model = self.found.get(alias.base.lower() if alias else key)
        if model is None or self.seen.get(model.directory, (None,))[0] != stamp(model.directory):
            return None
        if self.hub in model.directory.parents and current_snapshot(model.directory.parent.parent) != model.directory:
            return None  # pulled again meanwhile
        return model.called(alias) if alias else model

    def find(self, name: str) -> Model:
        """The model called so, looking anew. Raises Refused: 404 unknown, 400 malformed, broken, or with code of its own."""
        key = canonical(name).lower()
        self.scan()
        known = key in self.found or key in self.broken
        alias = None if known else self.aliases.all().get(key)
        target = alias.base.lower() if alias else key
        if target in self.found:
            return self.found[target].called(alias) if alias else self.found[target]
        if target in self.broken:
            raise Refused(400, f"model '{name}' cannot be loaded: {self.broken[target][1]}")
        raise unknown(name)

    def define(self, name: str, source: str, parameters: Parameters | None = None, **said: Any) -> Model:
        """Call the model or alias `source` by another name, too; `said`, fields of Alias, counts over what is said under `source`. Raises
        Refused."""
        called = canonical(name)
        model = self.find(source)
        if called.lower() in self.found or called.lower() in self.broken:
            raise Refused(400, f"{called} is the name of a model, not of an alias: delete that first, or choose another name")
        alias = model.alias or Alias(called, model.name, 0.0)
        said["parameters"] = (parameters or Parameters()).over(alias.parameters)
        alias = msgspec.structs.replace(alias, name=called, modified_at=time.time(), **said)
        self.aliases.put(alias)
        return model.weights.called(alias)

    def place(self, name: str) -> Place | None:
        """Where the model called so lies; None: it is an alias, or nothing. Raises Refused (400)."""
        key = canonical(name).lower()
        self.scan()
        if key in self.found:
            return Place(self.found[key].name, self.found[key].directory)
        return self.broken[key][0] if key in self.broken else None

    def doomed(self, name: str) -> Place | None:
        """Where the model lies that is to be deleted; None: it was an alias, and is none any more. Raises Refused, of the built-in one, too."""
        place = self.place(name)
        if place is None and not self.aliases.remove(canonical(name).lower()):
            raise unknown(name)
        if place is not None and place.name == BUILTIN:
            raise Refused(400, f"{BUILTIN} is a part of mlxd and cannot be deleted")
        return place

    def to_pull(self, name: str) -> str:
        """The repository to be pulled for the model called so; "" when it is here and did not come from the hub. Raises Refused."""
        try:
            model = self.find(name)
        except Refused:
            return repository_of(name)
        return repository_of(model.name) if model.alias is None and self.hub in model.directory.parents else ""

    def delete(self, place: Place) -> None:
        """Its files, for good. Raises Refused."""
        try:
            if self.hub in place.directory.parents:
                remove_from_hub(place.directory.parent.parent)
            else:
                remove_directory(self.root, place.directory)
        except OSError as error:
            raise Refused(500, f"{place.name} cannot be deleted: {error.strerror}") from None

    def scan(self) -> list[Model]:
        """All models and aliases, newest first."""
        with self.lock:
            found: dict[str, Model] = {}
            broken: dict[str, tuple[Place, str]] = {}
            seen: dict[Path, tuple[object, Model | str]] = {}
            for name, directory in candidates(self.root, self.hub):
                key = name.lower()
                if not is_name(name):
                    self.leave_out(directory, "its name cannot be that of a model")
                    continue
                if key in found:
                    if found[key].name != name:
                        self.leave_out(directory, f"its name is that of {found[key].directory} but for capitals")
                    continue
                now = stamp(directory)
                then = self.seen.get(directory)
                seen[directory] = then if then and then[0] == now else (now, examine(name, directory))
                match seen[directory][1]:
                    case Model() as model:
                        found[key] = model
                    case str() as why:
                        broken[key] = Place(name, directory), why
            self.found, self.broken, self.seen = found, broken, seen
        named = [
            found[alias.base.lower()].called(alias)
            for key, alias in self.aliases.all().items()
            if alias.base.lower() in found and key not in found and key not in broken
        ]
        return sorted([*found.values(), *named], key=lambda model: -model.modified_at)

    def leave_out(self, directory: Path, why: str) -> None:
        """Said once."""
        if directory not in self.left_out:
            self.left_out.add(directory)
            log.warning("%s is not served: %s; rename it", directory, why)


def unknown(name: str) -> Refused:
    return Refused(404, f"model '{name}' not found", code="model_not_found")


def remove_directory(root: Path, directory: Path) -> None:
    """Of a link, the link alone. Raises Refused, OSError."""
    if not directory.parent.resolve().is_relative_to(root.resolve()):
        raise Refused(400, f"{directory.name} lies outside the models directory: remove it yourself")
    if directory.is_symlink():
        directory.unlink()
    else:
        shutil.rmtree(directory)


def remove_from_hub(repository: Path) -> None:
    """A repository with all its revisions; of a link, the link alone. Raises OSError."""
    if repository.is_symlink():
        repository.unlink()
    else:
        shutil.rmtree(repository)


def hub_directory(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps what it downloads."""
    if cache := environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def candidates(root: Path, hub: Path) -> Iterator[tuple[str, Path]]:
    """Names and directories that may be models; of one name the first counts."""
    yield BUILTIN, BUILTIN_DIRECTORY
    for directory in subdirectories(root):
        if looks_like_model(directory):
            yield tagged(directory.name), directory
        elif inside := [nested for nested in subdirectories(directory) if looks_like_model(nested, FOREIGN)]:
            yield from ((tagged(f"{directory.name}/{nested.name}"), nested) for nested in inside)
        elif looks_like_model(directory, FOREIGN):
            yield tagged(directory.name), directory
    for repository in subdirectories(hub):
        kind, _, name = repository.name.partition("--")
        if kind == "models" and (snapshot := current_snapshot(repository)) and looks_like_model(snapshot, FOREIGN):
            yield tagged(name.replace("--", "/", 1)), snapshot


def repository_directory(hub: Path, repository: str) -> Path:
    """Where the hub's cache has it, or will; one that is there in other letters is the same, as it is on the hub."""
    name = "models--" + repository.replace("/", "--")
    return next((found for found in subdirectories(hub) if found.name.lower() == name.lower()), hub / name)


def subdirectories(directory: Path) -> list[Path]:
    """The visible ones, by name; none of a directory that is not there or not ours to read."""
    try:
        with os.scandir(directory) as entries:
            return sorted(Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError:
        return []


def tagged(name: str) -> str:
    return name if ":" in name else name + ":latest"


def looks_like_model(directory: Path, foreign: tuple[str, ...] = ()) -> bool:
    """Something of a model is here, or of one in a `foreign` format: what is missing or wrong is said when it is asked for."""
    try:
        return any(path.name == "config.json" or path.name.endswith((".safetensors", *foreign)) for path in directory.iterdir())
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
    except RecursionError:
        return "its settings are nested too deeply; download the model again"
    except OSError as error:
        return f"{Path(error.filename or directory).name}: {error.strerror}"


def read_model(name: str, directory: Path) -> Model:
    """Raises Broken with the file that is missing or wrong, OSError."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    names = [path.name for path in files]
    check_format(names)
    config = read_json(directory / "config.json")
    check_settings(directory, names)
    settings = {name: read_json(directory / name) for name in ("tokenizer_config.json", "generation_config.json") if name in names}
    tensors = read_weights(directory, names)
    check_tokenizer(names)
    stats = [path.stat() for path in files]
    nested = config.get("text_config")  # of models that see or hear
    text = nested if isinstance(nested, dict) else config
    tokenizer = settings.get("tokenizer_config.json", {})
    vocabulary = abilities.read_vocabulary(directory, tokenizer)
    return Model(
        name=name,
        directory=directory.absolute(),
        size_bytes=sum(found.st_size for path, found in zip(files, stats, strict=True) if path.suffix == ".safetensors"),
        digest=digest(directory, files),
        modified_at=max(found.st_mtime for found in stats),
        family=str(config.get("model_type") or "unknown"),
        parameters=count_parameters(tensors, quantized_bits(config)),
        quantization=quantization(tensors, quantized_bits(config)),
        context_length=whole(text.get("max_position_embeddings")),
        embedding_length=whole(text.get("hidden_size")),
        thinks=abilities.thinks(vocabulary),
        calls=abilities.calls(str(config.get("model_type")), tokenizer, abilities.read_templates(directory), vocabulary),
        inserts=abilities.inserts(vocabulary),
        embeds=config.get("model_type") in ENCODERS,
        kv_bytes=0 if config.get("model_type") in ENCODERS else estimate.kv_bytes_per_token(config),
        step_bytes=estimate.prefill_bytes(config, estimate.USUAL_STEP),
    )


def digest(directory: Path, files: list[Path]) -> str:
    """64 hex digits: of the revision in the hub's cache, elsewhere of names, sizes and times of the files that make it. Raises OSError."""
    if directory.parent.name == "snapshots":
        return hashlib.sha256(f"{directory.parent.parent.name}@{directory.name}".encode()).hexdigest()
    stats = [(path.name, path.stat()) for path in files if path.suffix in PARTS]
    return hashlib.sha256(repr([(name, found.st_size, found.st_mtime_ns) for name, found in stats]).encode()).hexdigest()


def chat_template(directory: Path) -> str:
    """The template's text, "" without one; the default one of several. Raises Broken, OSError."""
    found = abilities.read_templates(directory)
    return found if isinstance(found, str) else found.get("default", "")


def license_text(directory: Path) -> str:
    """ "" without one. Raises OSError."""
    for path in sorted(directory.iterdir()):
        if path.name.lower() in LICENSES and path.is_file():
            with path.open(encoding="utf-8", errors="replace") as file:
                return file.read(MAX_LICENSE_BYTES)
    return ""


def read_tensors(directory: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape by name. Raises Broken, OSError."""
    return read_weights(directory, [path.name for path in directory.iterdir()])


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
        held[dtype] = held.get(dtype, 0) + math.prod(shape) * DTYPE_BITS[dtype]
    return max(held, key=held.__getitem__, default="unknown")
