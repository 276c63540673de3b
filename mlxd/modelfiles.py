"""A model's files, looked at before any library opens them: settings, weights' headers, and whether code would have to run.

The server asks when it lists models, the engine again when it loads one. Pure Python and no MLX; nothing here believes a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from mlxd.errors import MlxdError

INDEX = "model.safetensors.index.json"
#: model-00001-of-00004.safetensors, one of four.
SHARD = re.compile(r"(?P<stem>.*-)\d{5}-of-(?P<all>\d{5})\.safetensors")
#: What `model_type` says of models that only embed; our own `engine/bert.py` runs them.
ENCODERS = ("bert", "roberta", "xlm-roberta")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")
#: Keys whose presence means that the model cannot work without running code that came with it (CVE-2026-5843 is one of them).
CODE_KEYS = ("model_file", "trust_remote_code", "custom_pipelines")
#: What shows that a file may hold such a key: the key itself, or a letter of one written as an escape.
CODE_SIGNS = (*(key.encode() for key in CODE_KEYS), rb"\u005", rb"\u006", rb"\u007")
#: Where a number beside a name is a token's, whatever the name.
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
#: Weights that mlxd reads nothing of: pickles are code, and MLX's readers of the others believe what the file says (CVE-2025-62608, -62609).
FOREIGN = (".gguf", ".npy", ".npz", ".bin", ".pt", ".pth", ".pkl")
#: The format's own bound on a header (safetensors, MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
#: Bits of an element, by its name in safetensors: all that `mx.load` takes. It makes U8 of the last two.
DTYPE_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32}
DTYPE_BITS |= {"U64": 64, "I64": 64, "C64": 64, "F8_E4M3": 8, "F8_E8M0": 8}
#: MLX counts a dimension in 32 bits and elements in 64; real tensors have five dimensions at most, and names of some 100 characters.
MOST_DIMENSIONS, MOST_ELEMENTS, MOST_NAME = 16, 2**62, 512
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


def check_settings(directory: Path, names: Iterable[str]) -> None:
    """Raises Broken if any of the JSON files asks for code of the model's own. What is no JSON is left to whoever has a use for it."""
    for name in names:
        if not name.endswith(".json") or (directory / name).stat().st_size > MAX_JSON_BYTES:
            continue
        text = (directory / name).read_bytes()
        if any(sign in text for sign in CODE_SIGNS):  # most are vocabularies, of many MB
            try:
                found = msgspec.json.decode(text)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue
            refuse_code(name, found)


def refuse_code(name: str, found: Any) -> None:
    """Raises Broken if the settings `found` in file `name` ask, at any depth, for code of the model's own. `auto_map` is for other tools and
    left out of what libraries see."""
    left = [found]  # no recursion: JSON may be deeper than Python goes
    while left:
        one = left.pop()
        if isinstance(one, dict):
            for key, value in one.items():
                if key in CODE_KEYS and value and not (name in VOCABULARIES and type(value) is int):
                    raise Broken(
                        f"{name} asks to run code that came with the model ({key}); mlxd never does: use a model without it"
                    )
            left += one.values()
        elif isinstance(one, list):
            left += one


def check_tokenizer(names: Iterable[str]) -> None:
    """Raises Broken unless one of the files is a tokenizer."""
    if not any(name in TOKENIZERS or name.endswith(".tiktoken") for name in names):
        raise Broken("tokenizer.json is missing; download the model again")


def check_format(names: Iterable[str]) -> None:
    """Raises Broken if there are weights, and none that mlxd reads."""
    foreign = [name for name in names if name.endswith(FOREIGN)]
    if foreign and INDEX not in names and not any(name.endswith(".safetensors") for name in names):
        raise Broken(f"its weights are in {foreign[0]}, and mlxd reads .safetensors alone: download this model in MLX's format")


def read_weights(directory: Path, names: Iterable[str]) -> dict[str, tuple[str, list[int]]]:
    """Tensor -> dtype and shape of a whole model; every shard that the index names is there and whole. Raises Broken."""
    shards = [name for name in names if name.endswith(".safetensors")]
    if INDEX in names:
        wanted = read_json(directory / INDEX).get("weight_map")
        if not isinstance(wanted, dict):
            raise Broken(f"{INDEX} has no weight_map; download the model again")
        for name in sorted({str(name) for name in wanted.values()} - set(shards)):
            raise Broken(f"{name} is missing, {INDEX} names it; download the model again")
    check_shards(shards)
    if not shards:
        raise Broken("model.safetensors is missing; download the model again")
    return {name: (t.dtype, t.shape) for shard in shards for name, t in read_header(directory / shard).items()}


def check_shards(shards: list[str]) -> None:
    """Raises Broken when one that belongs to the others is missing: the index is a file like others, and may not be copied yet."""
    there = set(shards)
    families = {(found["stem"], found["all"]): name for name in shards if (found := SHARD.fullmatch(name))}
    for (stem, last), name in families.items():
        for number in range(1, int(last) + 1):
            if (other := f"{stem}{number:05}-of-{last}.safetensors") not in there:
                raise Broken(f"{other} is missing, and {name} is there; download the model again")


Whole = Annotated[int, Meta(ge=0)]


class Tensor(Struct, forbid_unknown_fields=True):
    """As the header of a safetensors file has it. `data_offsets`: where its bytes begin and end, from the end of the header."""

    dtype: str
    shape: list[Whole]
    data_offsets: tuple[Whole, Whole]


headers = msgspec.json.Decoder(dict[str, msgspec.Raw])
tensors = msgspec.json.Decoder(Tensor)
remarks = msgspec.json.Decoder(dict[str, str] | None)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, from its header, which must describe the file to the byte. Raises Broken.

    MLX reads lazily and believes most of it. Format: 8 bytes length, little-endian, that many bytes of JSON, the data.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise Broken(f"{path.name} is cut short or no safetensors file; download it again")
            if length > MAX_HEADER_BYTES:
                raise Broken(f"{path.name} is no safetensors file; download it again")
            header = headers.decode(file.read(length))
        remarks.decode(header.pop("__metadata__", msgspec.Raw(b"null")))
        found = {name: tensors.decode(told) for name, told in header.items()}
    except OSError as error:
        raise Broken(f"{path.name} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # a ValidationError is a DecodeError
        raise Broken(f"{path.name} is no safetensors file; download it again") from None
    for name, tensor in found.items():
        check_tensor(path.name, name, tensor)
    check_tiling(path.name, found, size - 8 - length)
    return found


def check_tensor(file: str, name: str, tensor: Tensor) -> None:
    """Raises Broken unless MLX has such tensors, and this one's bytes are as many as its shape says."""
    if len(name) > MOST_NAME:
        raise Broken(f"{file} has a tensor whose name is longer than {MOST_NAME} characters; download it again")
    if tensor.dtype not in DTYPE_BITS:
        raise Broken(
            f"{file} has {tensor.dtype[:20]!r} for the type of {name!r}, which MLX cannot read; use this model in MLX's format"
        )
    most = max(tensor.shape, default=0)
    if len(tensor.shape) > MOST_DIMENSIONS or most >= 2**31 or math.prod(n or 1 for n in tensor.shape) > MOST_ELEMENTS:
        raise Broken(f"{file} has a shape for {name!r} that no tensor of MLX's can have; download it again")
    begin, end = tensor.data_offsets
    if math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype] != 8 * (end - begin):
        raise Broken(f"{file} has other bytes for {name!r} than its shape needs; download it again")


def check_tiling(file: str, found: dict[str, Tensor], size_bytes: int) -> None:
    """Raises Broken unless the tensors lie one after another and fill the data, all of it."""
    at = 0
    for begin, end in sorted(tensor.data_offsets for tensor in found.values()):
        if begin != at:
            raise Broken(f"{file} has tensors that overlap, or bytes between them; download it again")
        at = end
    if at > size_bytes:
        raise Broken(f"{file} is cut short; download it again")
    if at < size_bytes:
        raise Broken(f"{file} is longer than its header says; download it again")
