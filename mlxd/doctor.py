"""What keeps mlxd from serving on this machine, and what it would be better with: one finding a check.

Looks from outside, like `mlxd check`, and changes nothing. A check that fails is a finding, too: the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import importlib.metadata
import os
import platform
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil
from msgspec import Struct

import mlxd
from mlxd import autostart, blas, child, config, control, exits, managers, messages, ollama, paths, ports, probe, shares, tokens
from mlxd.config import Config
from mlxd.errors import ConfigError, MlxdError
from mlxd.estimate import gigabytes
from mlxd.link import ChildSettings, Link
from mlxd.lock import is_locked
from mlxd.masks import masked
from mlxd.models import BUILTIN, BUILTIN_DIRECTORY

#: Keeps mlxd from serving now; is worth doing; is as it should be.
Level = Literal["problem", "advice", "ok"]

LEAST_DISK_BYTES = 2**30
LEAST_MEMORY_BYTES = 2**30
HEALTH_S, OLLAMA_S = 10.0, 1.0
#: A token on the built-in model takes 2 s; on a machine that swaps, longer.
GENERATION_S = 120.0
#: An engine of our own says hello by then: as long as the supervisor waits.
HELLO_S = 20.0
MOST_DIRECTORY = 60
#: Exit records that are shown, and how old they may be to count.
SHOWN, RECENT = 3, timedelta(days=1)
QUESTION = "What is mlxd?"
#: Variables of ours that are no settings.
NO_SETTINGS = ("MLXD_HOME", "MLXD_CHILD")


class Finding(Struct, frozen=True):
    """`text`: one sentence that says what is, and what to do about it."""

    level: Level
    check: str
    text: str


class Doctor:
    """`settings`: None when they are refused. `told`: `mlxd status --json`, None while no supervisor answers, and why in `silence`. `url`: of
    the server, "" where nobody knows. `reply`: of its health, None if it does not answer. `serves`: a request sent now would be served or
    queued, so that nothing that is found keeps mlxd from that."""

    def __init__(self, where: paths.Paths):
        self.where = where
        self.settings: Config | None = None
        self.told: dict[str, Any] | None = None
        self.silence = self.url = ""
        self.reply: probe.Reply | None = None
        self.serves = False

    def findings(self) -> Iterator[Finding]:
        """One after the other, as they are found."""
        self.look()
        for name, check in CHECKS.items():
            try:
                for level, text in check(self):
                    yield Finding("advice" if level == "problem" and self.serves else level, name, text)
            except Exception as error:  # of one check: the others are worth no less
                yield Finding("advice", name, f"could not be looked at: {error or type(error).__name__}")

    def look(self) -> None:
        with contextlib.suppress(ConfigError):  # `settings` tells
            self.settings = config.load(self.where.config, [self.where.env_file]).config
        try:
            self.told = control.ask(self.where.control, "status")
            self.url = str(self.told["url"])
        except MlxdError as error:
            self.silence = str(error)
            if self.settings is not None and self.settings.server.port and is_locked(self.where.lock):
                server = self.settings.server
                self.url = ports.url(ports.reached(server.host), server.port)
        if self.url:
            with contextlib.suppress(probe.NoReply):
                self.reply = probe.fetch(self.url + "/health", HEALTH_S, token=self.token())
                self.serves = self.reply.status == 200 and "nonce" in self.reply.json

    def token(self) -> str:
        """ "" where there is none, or none that can be read."""
        try:
            return tokens.for_commands(self.where.token)
        except (ConfigError, OSError):
            return ""


Found = Iterator[tuple[Level, str]]


# --- this machine -------------------------------------------------------------------------------------------------------------------


def versions(_: Doctor) -> Found:
    found = {name: version_of(name) for name in ("mlx", "mlx-lm", "transformers")}
    for name in ("mlx", "mlx-lm"):
        if not found[name]:
            yield (
                "problem",
                f"{name} is not installed, and engines run on it: install mlxd anew, with `make start` or `pipx install .`",
            )
    if version_of("mlx-cpu") and version_of("mlx-cuda-13"):
        yield (
            "advice",
            "mlx-cpu and mlx-cuda-13 are both installed and overwrite each other's files: remove the one you do not want",
        )
    told = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    yield "ok", f"mlxd {mlxd.__version__}, {told}, Python {platform.python_version()}, {platform.platform()}"


def version_of(name: str) -> str:
    """Of an installed distribution; "" when it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def user(_: Doctor) -> Found:
    if os.geteuid() == 0:
        yield "advice", "this is root: whatever a model's files can do to mlxd they do as root; run it as a user of its own"
    else:
        yield "ok", "not root"


def settings(doctor: Doctor) -> Found:
    where = doctor.where
    try:
        loaded = config.load(where.config, [where.env_file])
        secured = tokens.load(where.token, loaded.config)
        config.read_services(where.config)
    except ConfigError as error:
        yield "problem", str(error)
        return
    known = [*config.variables(), *NO_SETTINGS]
    for name in sorted(os.environ):
        if name.startswith("MLXD_") and name not in known:
            meant = difflib.get_close_matches(name, known, n=1)
            yield "advice", f"{name} in the environment is no setting" + (f": did you mean {meant[0]}?" if meant else "")
    changed = len(loaded.sources)
    access = "a token is needed" if secured else "no token is needed"
    yield "ok", f"{changed} of them not by default: `mlxd config` shows where from" if changed else "the defaults"
    yield "ok", f"{access} to use the API on {loaded.config.server.host or 'loopback'}"


def directories(doctor: Doctor) -> Found:
    where = doctor.where
    well = True
    for place in dict.fromkeys((where.home, where.logs, where.config_dir, where.run)):
        if not nearest(place).is_dir() and nearest(place) != place:
            continue  # told of the one above it
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            yield "problem", f"{place} is not a directory: move it away, mlxd makes its own"
        elif place.exists() and place.stat().st_uid != os.geteuid():
            yield "problem", f"{place} belongs to another user: `sudo chown -R {os.geteuid()} {place}`"
        elif not os.access(nearest(place), os.W_OK | os.X_OK):
            yield "problem", f"{nearest(place)} is not writable: `chmod u+rwx {nearest(place)}`"
        elif place.exists() and stat.S_IMODE(place.stat().st_mode) & 0o077:
            yield "advice", f"{place} is open to others: `chmod 700 {place}`"
        else:
            continue
        well = False
    if well:
        yield "ok", f"{where.home} is ours and writable"


def nearest(place: Path) -> Path:
    """It, or the first above it that is there."""
    return next(path for path in (place, *place.parents) if path.exists())


def disk(doctor: Doctor) -> Found:
    free = psutil.disk_usage(str(nearest(doctor.where.home))).free
    if free < LEAST_DISK_BYTES:
        yield "advice", f"only {gigabytes(free)} are free where mlxd keeps state and logs, {doctor.where.home}: make room"
    else:
        yield "ok", f"{gigabytes(free)} are free"


def memory(doctor: Doctor) -> Found:
    seen, swap = psutil.virtual_memory(), psutil.swap_memory()
    limit = shares.limit(doctor.settings.engine.memory_limit if doctor.settings else 0)
    told = f"{gigabytes(seen.available)} of {gigabytes(seen.total)} are available, engines may take {gigabytes(limit)}"
    if seen.available < LEAST_MEMORY_BYTES:
        yield "advice", f"{told}: end other programs, or use a smaller model"
    elif swap.total and swap.percent > 50:
        yield "advice", f"{told}, and {gigabytes(swap.used)} are swapped out, which makes every answer slow: end other programs"
    else:
        yield "ok", told


# --- the daemon ---------------------------------------------------------------------------------------------------------------------


def daemon(doctor: Doctor) -> Found:
    """Lock, PID file and control socket."""
    where, told = doctor.where, doctor.told
    pid_text = (paths.read_small(where.pid_file, 32) or b"").decode(errors="replace").strip()
    if told is None:
        if is_locked(where.lock):
            yield (
                "problem",
                f"pid {pid_text or 'unknown'} holds {where.lock} and does not answer: `mlxd recover` ends and replaces it",
            )
        elif "cannot reach" in doctor.silence:
            yield "problem", f"{doctor.silence}: make it yours, or remove it"
        elif pid_text:
            yield "advice", "mlxd does not run, and left its PID file when it died: `mlxd start` starts it and clears up"
        else:
            yield "advice", "mlxd does not run: `mlxd start`"
        return
    pid = str(told["supervisor"]["pid"])
    if pid_text != pid:
        yield "advice", f"{where.pid_file} says {pid_text or 'nothing'} and mlxd is pid {pid}: it is put back within seconds"
    if (told["version"], told.get("protocol")) != (mlxd.__version__, messages.PROTOCOL):
        yield (
            "advice",
            f"what runs (mlxd {told['version']}) is not what is installed ({mlxd.__version__}): "
            "`mlxd restart --supervisor`, then `mlxd restart`",
        )
    for note in told.get("notes", []):
        yield "advice", note
    state, reason = told["state"], told["reason"]
    if state == "ready":
        yield "ok", f"ready, pid {pid}, {told['url']}"
    else:
        waits = state in ("degraded", "starting", "draining")
        yield "advice" if waits else "problem", f"{state}: {reason}"


def port(doctor: Doctor) -> Found:
    """Who has it, where no mlxd runs: one that does says itself what is wrong with it."""
    if doctor.told is not None and doctor.told["state"] != "held":
        yield "ok", f"{doctor.told['port']} is mlxd's"
    if doctor.settings is None or doctor.told is not None or is_locked(doctor.where.lock):
        return
    if not (wanted := doctor.settings.server.port):
        yield "ok", "any free one"
        return
    try:
        for sock in ports.bind(doctor.settings.server):
            sock.close()
    except ports.PortTaken as taken:
        yield "problem", f"{taken}: end that, or choose another port with MLX_API_PORT"
    except ConfigError as error:
        yield "problem", str(error)
    else:
        yield "ok", f"{wanted} is free"


def health(doctor: Doctor) -> Found:
    if not doctor.url:
        return
    url, reply = f"{doctor.url}/health", doctor.reply
    if reply is None:
        yield "problem", f"{url} is not answered within {HEALTH_S:g} s; look at `mlxd logs --server`"
        return
    told = reply.json
    if "nonce" not in told:
        yield (
            "problem",
            f"{url} is answered by something that is not mlxd (status {reply.status}): end that, or choose another MLX_API_PORT",
        )
    elif reply.status != 200:
        yield "problem", f"{url} says {told['status']}: {told.get('reason') or 'a request sent now would not be served'}"
    else:
        queue = told.get("queue", {})
        running, waiting = queue.get("running", 0), queue.get("waiting", 0)
        yield "ok", f"{told['status']} in {reply.seconds * 1e3:.0f} ms, {running} running, {waiting} waiting"


def generation(doctor: Doctor) -> Found:
    """A real token of the built-in model: of the daemon if that has it loaded, else of an engine of our own, so that no model goes for it."""
    if doctor.serves and is_loaded(doctor.url, doctor.token()):
        level, text = answered(doctor.url, doctor.token())
        doctor.serves = level != "problem"
        yield level, text
        return
    began = time.monotonic()
    why = own_engine(doctor.settings or Config())
    if why:
        yield "problem", f"an engine of its own gives no token of the built-in model: {why}"
    else:
        yield "ok", f"an engine of its own gave a token of the built-in model after {time.monotonic() - began:.1f} s"


def is_loaded(url: str, token: str) -> bool:
    """Whether the daemon has the built-in model in memory."""
    with contextlib.suppress(probe.NoReply):
        models = probe.fetch(url + "/api/ps", HEALTH_S, token=token).json.get("models", [])
        return any(model["name"] == BUILTIN for model in models)
    return False


def answered(url: str, token: str) -> tuple[Level, str]:
    body = {"model": BUILTIN, "messages": [{"role": "user", "content": QUESTION}], "stream": False, "options": {"temperature": 0}}
    try:
        reply = probe.fetch(url + "/api/chat", GENERATION_S, msgspec.json.encode(body), token=token)
    except probe.NoReply as no:
        return "problem", f"the daemon gives no answer of the built-in model: {no}; look at `mlxd logs --server`"
    if reply.status in (429, 503):
        return "advice", f"the daemon has no room for a question to the built-in model just now: {reply.json.get('error')}"
    if reply.status != 200 or not reply.json.get("message", {}).get("content"):
        return "problem", f"the daemon gives no answer of the built-in model: {reply.json.get('error') or f'status {reply.status}'}"
    return "ok", f"the daemon answered with {reply.json['eval_count']} tokens of the built-in model in {reply.seconds:.1f} s"


def own_engine(settings: Config) -> str:
    """Start an engine as the supervisor would, have it load the built-in model, which takes a token, and end it; why that went wrong, or "".
    It ends with us, whatever happens: an engine lives no longer than its link."""
    one = child.Child("engine", 1)
    with tempfile.TemporaryDirectory(prefix="mlxd-doctor-", dir=short_directory()) as home:
        place = Path(home)
        log = place / "engine.log"
        told = ChildSettings(
            config=config.for_engine(settings),
            link_fd=-1,
            slot=1,
            nonce="doctor",
            log=str(log),
            stack=str(place / "stack"),
            socket=str(place / "engine.sock"),
            view=str(place / "view"),
        )
        try:
            end = one.spawn(child.command("engine", settings), told, [], time.monotonic())
        except OSError as error:
            return f"it cannot be started: {error.strerror}"
        assert one.pid is not None
        try:
            why = asyncio.run(first_token(end))
        finally:
            one.kill()
            os.waitpid(one.pid, 0)
        words = paths.read_end(log, 4096).decode(errors="replace").strip().rpartition("\n")[2]
        return f"{why}: {words}" if why and words else why


def short_directory() -> str | None:
    """Where a socket's path has room (100 bytes); None: in the usual place."""
    return None if len(tempfile.gettempdir()) <= MOST_DIRECTORY else "/tmp"


async def first_token(end: socket.socket) -> str:
    """Over our end of its link: why there is none, or ""."""
    link = await Link.open(end, messages.child_words)
    try:
        async with asyncio.timeout(HELLO_S) as limit:
            while (word := await link.read()) is not None:
                match word:
                    case messages.Hello():
                        limit.reschedule(asyncio.get_running_loop().time() + GENERATION_S)
                        link.send(messages.Load(BUILTIN, str(BUILTIN_DIRECTORY), 2**40))
                    case messages.Ready():
                        return ""
                    case messages.Bye():
                        return word.text or word.cause
    except TimeoutError:
        return "it did not get ready in time"
    except ValueError as error:
        return str(error)
    finally:
        link.close()
    return "it ended"


# --- around it ----------------------------------------------------------------------------------------------------------------------


def startup(_: Doctor) -> Found:
    told = [autostart.report(managers.manager(system)) for system in (False, True)]
    installed = [each for each in told if each["installed"]]
    if not installed:
        yield "advice", "nobody starts mlxd when this machine boots: `mlxd autostart install` has that done"
    for each in installed:
        kind = "the machine" if each["system"] else "you"
        yield "ok", f"{each['manager']} starts it for {kind}: {each['state'] or 'not loaded'}, {each['begins']}"


def neighbour(doctor: Doctor) -> Found:
    if doctor.settings is None:
        return
    settings = doctor.settings.ollama
    look = ollama.look(settings.url, OLLAMA_S)
    if look.well:
        yield "ok", f"Ollama {look.version or ''} is {look.state} at {masked(settings.url)}"
    elif settings.wanted or settings.recover or doctor.settings.fallback.ollama:
        yield (
            "advice",
            f"Ollama is wanted, and at {masked(settings.url)} it is {look.state}: {look.reason or look.advice or 'start it'}",
        )
    else:
        yield "ok", f"there is no Ollama at {masked(settings.url)}, and none is wanted"


def library(doctor: Doctor) -> Found:
    """The BLAS of engines, on Linux."""
    if sys.platform != "linux" or doctor.settings is None:
        return
    wanted, there = doctor.settings.engine.blas, blas.OPENBLAS.is_file()
    if wanted == blas.STOCK and there:
        yield (
            "advice",
            'OpenBLAS is installed and not used: `blas = "auto"` in [engine] makes prompts faster, and answers that go on after '
            "an engine's death may then differ from what they would have been",
        )
    elif wanted == blas.AUTO and not there:
        yield "advice", 'engine.blas is "auto" and there is no OpenBLAS: install libopenblas0-pthread, or write "stock"'
    else:
        yield "ok", f"engine.blas is {wanted}"


def ends(doctor: Doctor) -> Found:
    """The last exit records."""
    now = datetime.now(UTC)
    bad = [
        one for one in exits.read(doctor.where.exits) if one.cause != "stopped" and now - datetime.fromisoformat(one.ts) < RECENT
    ]
    for one in bad[-SHOWN:]:
        who = f"the {one.child}" + (f" of {one.model}" if one.model else "")
        yield "advice", f"{one.ts[:19]}Z {who} died ({one.cause}): it {one.remedy}"
    if not bad:
        yield "ok", "no process has died within a day"
    elif len(bad) > SHOWN:
        yield "advice", f"{len(bad)} processes have died within a day: `mlxd events` shows them all"


CHECKS: dict[str, Callable[[Doctor], Found]] = {
    "versions": versions,
    "user": user,
    "settings": settings,
    "directories": directories,
    "disk": disk,
    "memory": memory,
    "daemon": daemon,
    "port": port,
    "health": health,
    "generation": generation,
    "autostart": startup,
    "ollama": neighbour,
    "blas": library,
    "exits": ends,
}
