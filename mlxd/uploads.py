"""Uploads: the request bodies that are being read, and what they may take together. Knows no socket."""

from __future__ import annotations

from mlxd.errors import Refused

#: Of each body, not counted against those of others: what uvicorn holds of any.
SMALL_BYTES = 64 * 1024


class Uploads:
    """All bodies that are being read: what they may hold together, and how long each may take. One alone always has room."""

    def __init__(self, most_bytes: int, most_s: float):
        self.most_bytes = most_bytes
        self.most_s = most_s
        self.held_bytes = 0

    def hold(self, held_bytes: int, body_bytes: int) -> int:
        """What a body that has grown to `body_bytes` holds, in place of what it held. Raises Refused."""
        wanted = max(0, body_bytes - SMALL_BYTES)
        others = self.held_bytes - held_bytes
        if others and wanted > held_bytes and others + wanted > self.most_bytes:
            raise Refused(503, "too many large requests at once; please try again", code="too_many_uploads", retry_s=1)
        self.held_bytes = others + wanted
        return wanted
