"""The rate limit: how many requests a client may make in any window. Pure: the clock is an argument."""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Any

from mlxd import guard
from mlxd.errors import Refused

#: Requests that are remembered, of all clients together: 10 MB. Beyond it the clients that have asked nothing for longest are forgotten.
MOST_REMEMBERED = 100_000


class RateLimit:
    """`most` requests of one client in any `window_s` seconds; 0: no limit. What is refused does not count."""

    def __init__(self, most: int, window_s: float):
        self.most = most
        self.window_s = window_s
        self.times: dict[bytes, deque[float]] = {}
        self.remembered = 0

    def check(self, scope: Any, now: float) -> None:
        """Raises Refused (429) when the client of this request has made too many."""
        if not self.most or not works(scope):
            return
        if wait_s := self.wait_s(client(scope), now):
            message = f"more than {self.most} requests in {self.window_s:g} s from this client"
            raise Refused(429, message, code="rate_limit_exceeded", retry_s=wait_s)

    def wait_s(self, client: bytes, now: float) -> float:
        """0 when the client may ask, which is remembered; else in how many seconds it may."""
        times = self.times.pop(client, None) or deque()
        self.times[client] = times  # the last of them, now
        while times and times[0] <= now - self.window_s:
            times.popleft()
            self.remembered -= 1
        if len(times) >= self.most:
            return times[0] + self.window_s - now
        times.append(now)
        self.remembered += 1
        while self.remembered > MOST_REMEMBERED and len(self.times) > 1:
            self.remembered -= len(self.times.pop(next(iter(self.times))))
        return 0.0


def client(scope: Any) -> bytes:
    """Who asks: the holder of a key, or an address. All that comes over loopback without a key is one client."""
    for name, value in scope["headers"]:
        if name in (b"authorization", b"x-api-key"):
            return hashlib.blake2b(value, digest_size=16).digest()
    address = guard.literal((scope.get("client") or ("",))[0])
    return b"loopback" if address is None or address.is_loopback else address.packed


def works(scope: Any) -> bool:
    """Whether a request makes anybody work: lists, health and the description of a model do not."""
    return scope["method"] not in ("GET", "HEAD", "OPTIONS") and scope["path"] != "/api/show"
