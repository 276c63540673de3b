"""Embeddings as clients ask for them and get them: how much they may ask, cutting, and writing in pieces. Shared by the dialects, of no
dialect."""

from __future__ import annotations

import asyncio
import base64
import math
from array import array
from collections.abc import Iterator, Sequence

import msgspec

from mlxd.api.exchange import Exchange
from mlxd.api.fields import Malformed

#: LangChain sends all the pieces of a document at once.
MOST_INPUTS = 8192
MOST_INPUT_BYTES = 16 * 1024 * 1024
#: An answer goes out in pieces of this size or a vector more: 8,192 vectors of 1,024 numbers are 170 MB of JSON.
PIECE_BYTES = 256 * 1024


def bounded(inputs: Sequence[str | list[int]]) -> list[str | list[int]]:
    """The same. Raises Malformed when it is too much for one request."""
    if len(inputs) > MOST_INPUTS:
        raise Malformed("input", f"at most {MOST_INPUTS} inputs in one request, not {len(inputs)}")
    if sum(map(size, inputs)) > MOST_INPUT_BYTES:
        raise Malformed("input", f"at most {MOST_INPUT_BYTES} bytes of text in one request")
    return list(inputs)


def size(text: str | list[int]) -> int:
    return len(text.encode()) if isinstance(text, str) else 4 * len(text)


def numbers(vector: bytes, dimensions: int | None = None) -> array[float]:
    """The numbers of a little-endian float32 vector, the first `dimensions` of them made one long again. Raises Malformed when it has not
    so many."""
    found = array("f", vector)
    if dimensions is None or dimensions == len(found):
        return found
    if dimensions > len(found):
        raise Malformed("dimensions", f"the vectors of this model have {len(found)} numbers")
    found = found[:dimensions]
    length = math.hypot(*found)
    return array("f", (number / length for number in found)) if length else found


def as_list(vector: array[float]) -> bytes:
    return msgspec.json.encode(vector.tolist())


def as_base64(vector: array[float]) -> bytes:
    return b'"' + base64.b64encode(vector.tobytes()) + b'"'


async def reply(exchange: Exchange, head: bytes, items: Iterator[bytes], tail: bytes, content_type: bytes) -> None:
    """A JSON document with a list in it: `head`, the items with commas between them, `tail`. Others are served between its pieces. What is
    wrong with one item is wrong with the first, and raised before the answer begins."""
    piece = bytearray(head + next(items, b""))

    async def write() -> None:
        await exchange.stream(content_type)
        for item in items:
            if len(piece) > PIECE_BYTES:
                await exchange.write(bytes(piece))
                await asyncio.sleep(0)
                piece.clear()
            piece.extend(b"," + item)
        await exchange.write(bytes(piece) + tail, last=True)

    await exchange.while_connected(write())
