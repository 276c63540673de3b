"""Fields of a request: from bytes to typed structs, with errors that name the field. Shared by the dialects, of no dialect."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from mlxd.errors import Refused

T = TypeVar("T")

#: Of free JSON (arguments, tools): it comes undecoded, since 32 MiB of brackets are seconds of work for the event loop.
MOST_DEPTH = 64
MOST_FREE_BYTES = 1024 * 1024
NULL = msgspec.Raw(b"null")


def free() -> Any:
    """The default of a field that is left undecoded. A factory, since msgspec's JSON schema cannot show a Raw."""
    return msgspec.field(default_factory=lambda: NULL)


#: JSON knows no integers: strict msgspec refuses 4.0 for an int and lax takes "5", so integers are both, and `whole` looks.
#: Ends of the range: what fits a double exactly.
MOST = 2**53
Integer = Annotated[int, Meta(ge=-MOST, le=MOST)] | Annotated[float, Meta(ge=-MOST, le=MOST)]
Positive = Annotated[int, Meta(ge=1, le=MOST)] | Annotated[float, Meta(ge=1, le=MOST)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Temperature = Annotated[float, Meta(ge=0, le=100)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(max_length=256)]
StopStrings = Annotated[list[StopString], Meta(max_length=16)] | StopString


class Body(Struct):
    """Of a request that a template is rendered for: the model's own. One that came with a request would be its sender's program."""

    chat_template: msgspec.Raw = free()
    chat_template_kwargs: msgspec.Raw = free()


#: The fields of Body, and what to do instead.
OF_TEMPLATE = {"chat_template": "the model's own is used", "chat_template_kwargs": "whether to think has a field of its own"}


class Malformed(Refused):
    """A field is wrong. `path`: dotted, "" for the body as a whole; `sentence`: what is wrong, without the name; `code`: see Refused."""

    def __init__(self, path: str, sentence: str, code: str | None = None):
        super().__init__(400, f"{path}: {sentence}" if path else sentence, code=code)
        self.path = path
        self.sentence = sentence


def decode(decoder: msgspec.json.Decoder[T], body: bytes | bytearray) -> T:
    """Raises Malformed, or Refused (400) on what is no JSON object at all."""
    if not body or body.isspace():
        raise Refused(400, "missing request body")
    try:
        found = decoder.decode(body)
    except msgspec.ValidationError as error:
        sentence, _, path = str(error).replace(" - at `key` in `$", " of its keys - at `$").partition(" - at `$")
        path = path.rstrip("`").replace("[...]", "[]").lstrip(".")
        raise Malformed(path, plain(sentence)) from None
    except RecursionError:
        raise Refused(400, "the JSON is nested too deeply") from None
    except (ValueError, MemoryError) as error:  # DecodeError and UnicodeDecodeError are ValueErrors
        raise Refused(400, f"the body is not valid JSON: {error}") from None
    if isinstance(found, Body):
        for name, remedy in OF_TEMPLATE.items():
            value = getattr(found, name)
            if isinstance(value, msgspec.Raw) and bytes(value) not in (b"null", b"{}", b'""'):
                raise Malformed(name, f"not supported by mlxd: {remedy}")
    return found


def plain(sentence: str) -> str:
    """msgspec's words with JSON's names for types: "expected number, got string"."""
    text = re.sub(r"`([^`]*)`", lambda match: match.group(1), sentence)
    text = re.sub(r"\b(int \| float|float \| int|float)\b", "number", text)
    text = re.sub(r"\bstr\b", "string", text)
    return text[:1].lower() + text[1:]


def whole(path: str, value: float | None) -> int | None:
    """An integer field's value. Raises Malformed when it is not integral."""
    if value is None:
        return None
    if value != int(value):
        raise Malformed(path, f"expected an integer, got {value:g}")
    return int(value)


def strings(value: list[str] | str | None) -> list[str]:
    """Stop strings: one or many; empty ones mean nothing."""
    return [text for text in ([value] if isinstance(value, str) else value or []) if text]


class Budget:
    """How many bytes of free JSON one request may still bring."""

    def __init__(self) -> None:
        self.left = MOST_FREE_BYTES

    def decode(self, path: str, decoder: msgspec.json.Decoder[T], raw: bytes | msgspec.Raw) -> T:
        """Raises Malformed when it is too much, too deep or not what `decoder` reads."""
        self.left -= memoryview(raw).nbytes
        if self.left < 0:
            raise Malformed(path, f"more than {MOST_FREE_BYTES} bytes of free JSON in one request")
        try:
            value = decode(decoder, bytes(raw))
        except Malformed as wrong:
            raise Malformed(path + wrong.path, wrong.sentence) from None
        except Refused:
            raise Malformed(path, "is not a JSON object") from None
        shallow(path, value)
        return value


def has_items(path: str, raw: msgspec.Raw) -> bool:
    """Whether it is a list of anything. Raises Malformed when it is neither a list nor null."""
    text = bytes(raw)
    if text == b"null":
        return False
    if not text.startswith(b"["):
        raise Malformed(path, "expected array")
    return bool(text[1:-1].strip())


def shallow(path: str, value: object) -> None:
    """Free JSON that goes on to another process: no deeper than it can surely read. Raises Malformed."""
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise Malformed(path, f"nested more than {MOST_DEPTH} deep")
