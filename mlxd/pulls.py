"""The pulls that clients of this server wait for: who follows which, and what is said to them.

Several clients that want one model share one download, which the supervisor's puller makes; when the last of them leaves, it is abandoned.
Knows no HTTP and no file.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from mlxd.errors import Refused
from mlxd.messages import Abandon, ChildWord, Fetch, Fetched, Fetching


class Follower:
    """One client's view of a pull: what it has not been told yet. Of one file only the newest counts, so a client that reads slowly gets
    fewer lines and no older ones."""

    def __init__(self) -> None:
        self.untold: dict[str, Fetching] = {}
        self.end: Fetched | None = None
        self.changed = asyncio.Event()

    def hear(self, word: Fetching | Fetched) -> None:
        if isinstance(word, Fetched):
            self.end = word
        else:
            self.untold[word.digest or word.status] = word
        self.changed.set()

    async def news(self, patience_s: float) -> list[Fetching]:
        """What is new, in order; [] when nothing was for so long, or it has ended (`end`)."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self.changed.wait()
        self.changed.clear()
        told, self.untold = list(self.untold.values()), {}
        return told


class Pulls:
    """`say`: to the supervisor."""

    def __init__(self, say: Callable[[ChildWord], None]):
        self.say = say
        self.followers: dict[str, list[Follower]] = {}  # by the name of the repository in lower case
        self.heard: dict[str, dict[str, Fetching]] = {}  # by the same, then by file

    @contextlib.contextmanager
    def following(self, name: str) -> Iterator[Follower]:
        """Want the repository meanwhile. The supervisor answers each wish with what was said last."""
        key, follower = name.lower(), Follower()
        self.followers.setdefault(key, []).append(follower)
        self.say(Fetch(name))
        try:
            yield follower
        finally:
            if follower.end is None:
                self.followers[key].remove(follower)
                if not self.followers[key]:
                    del self.followers[key]
                    self.heard.pop(key, None)
                    self.say(Abandon(name))

    def hear(self, word: Fetching | Fetched) -> None:
        key = word.name.lower()
        if key not in self.followers:
            if isinstance(word, Fetching):  # it was begun for somebody who had left by then
                self.say(Abandon(word.name))
            return
        for follower in self.followers[key]:
            follower.hear(word)
        if isinstance(word, Fetched):
            del self.followers[key]
            self.heard.pop(key, None)
        else:
            files = self.heard.setdefault(key, {})
            files.pop(word.digest, None)  # so that the newest stands last
            files[word.digest] = word

    def shown(self) -> list[dict[str, Any]]:
        """Each pull as a whole: what was said of it last, and how far its files are, as far as they have been named."""
        found = []
        for files in self.heard.values():
            last, told = list(files.values())[-1], files.values()
            sums = {"total": sum(word.total for word in told), "completed": sum(word.completed for word in told)}
            found.append({"name": last.name, "status": last.status} | sums)
        return found


def told(word: Fetching | Fetched) -> dict[str, Any]:
    """A word as Ollama's clients read it, and those of `mlxd pull`."""
    if isinstance(word, Fetched):
        return {"error": word.error} if word.error else {"status": "success"}
    if not word.digest:
        return {"status": word.status}
    return {"status": word.status, "digest": word.digest, "total": word.total, "completed": word.completed}


def refusal(end: Fetched) -> Refused:
    return Refused(end.status, end.error, hopeless=end.status == 400)
