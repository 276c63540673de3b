"""The pullers: which models the servers' clients want from the hub, and what is told of each.

Owns who wants what, and in which order they are begun: some run, the others wait. The processes are the supervisor's, like all others; a
puller that dies is started again and goes on where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mlxd import config, paths
from mlxd.child import Child
from mlxd.errors import ConfigError
from mlxd.messages import ExitRecord, Fetched, Fetching
from mlxd.policy import Event, State

if TYPE_CHECKING:
    from mlxd.supervisor import Supervisor

#: Two share a line well enough; more would only end later, all of them.
MOST = 2
WAITING = "waiting for other downloads to end"
STOPPING = "mlxd is stopping; pull the model again when it runs: it goes on where it stopped"
#: What the daemon's own .env may say, as its environment may.
FROM_FILE = ("HF_TOKEN", "HF_ENDPOINT")


def fetch(s: Supervisor, server: Child, name: str) -> None:
    """A client of this server wants it; the latest wish wins over a stop under way."""
    if server.link is None or server.pid is None:
        return
    if s.stopping:
        server.link.send(Fetched(name, STOPPING, 503))
        return
    one = find(s, name)
    if one is None:
        slot = next(n for n in range(1, 10_000) if all(p.slot != n for p in s.pullers))
        one = Child("puller", slot, name, fetching=Fetching(name, WAITING))
        s.pullers.append(one)
    one.wanted = True
    one.wanted_by.add(server.pid)
    if one.state is not State.STOPPED:
        s.handle(one, Event.WANTED)
    begin(s)
    if one.fetching is not None:
        server.link.send(one.fetching)


def abandon(s: Supervisor, pid: int, name: str | None = None) -> None:
    """The server with this pid wants it no more; None: nothing at all, since it has ended."""
    for one in list(s.pullers):
        if pid in one.wanted_by and (name is None or one is find(s, name)):
            one.wanted_by.discard(pid)
            if not one.wanted_by:
                s.unwant(one)


def begin(s: Supervisor) -> None:
    """As many as may run at once, in the order in which they were wanted."""
    if s.stopping:
        return
    for one in list(s.pullers):
        if one.state is State.STOPPED and sum(p.state is not State.STOPPED for p in s.pullers) < MOST:
            one.fetching = None
            s.handle(one, Event.WANTED)


def tell(s: Supervisor, one: Child, word: Fetching | Fetched) -> None:
    """Those who want it. An end is told once, and then it is wanted by nobody."""
    for server in s.servers():
        if server.link is not None and server.pid in one.wanted_by:
            if isinstance(word, Fetched):
                server.link.send(word)
            else:
                server.link.offer(word)
    if isinstance(word, Fetched):
        one.wanted_by.clear()
        one.fetching = None
    else:
        one.fetching = word


def end(s: Supervisor, one: Child, word: Fetched) -> None:
    """It has said so, good or bad."""
    if word.error:
        s.say("pull_failed", f"{word.name} was not pulled: {word.error}", one)
    else:
        s.say("pulled", f"{word.name} has been pulled", one)
    tell(s, one, word)
    s.unwant(one)


def give_up(s: Supervisor, one: Child, record: ExitRecord) -> None:
    """It died too often, or cannot be started."""
    assert one.model is not None
    why = f"its download died again and again ({record.cause}); look at {s.paths.log(one.name).name} in mlxd's logs"
    s.say("pull_failed", f"{one.model} was not pulled: {why}", one)
    tell(s, one, Fetched(one.model, why, 502))
    one.wanted = False


def stop(s: Supervisor) -> None:
    """All of them, so that no stream waits for one."""
    for one in list(s.pullers):
        assert one.model is not None
        tell(s, one, Fetched(one.model, STOPPING, 503))
        s.unwant(one)


def find(s: Supervisor, name: str) -> Child | None:
    return next((one for one in s.pullers if one.model is not None and one.model.lower() == name.lower()), None)


def environment(where: paths.Paths, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a puller's is made of: ours, and what the daemon's own .env says of the hub."""
    try:
        found = config.read_env(where.env_file)
    except ConfigError:  # an invalid configuration changes nothing
        found = {}
    return {name: found[name] for name in FROM_FILE if name in found} | dict(environ)
