"""The puller: a process that brings one repository of the Hugging Face hub into the Hugging Face cache, whole or not at all.

Owns what of a repository is taken, and the files in the cache: each is written as it comes, checked against the hub's digest and only then
given its name; `refs/main`, by which a model is found, is written last. What is there already is not fetched again, so whoever kills this
process loses nothing. `hub` asks; nobody else in mlxd writes into the cache.

Run by the supervisor, or as `python -m mlxd.pull NAME`, which prints a JSON object a line and ends with 0 or 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import mlxd
from mlxd import config, link, messages, models, paths, pulls
from mlxd.aliases import Aliases
from mlxd.config import Supervisor as Limits
from mlxd.engine.view import DATA, SETTINGS, read_settings
from mlxd.errors import MlxdError, Refused
from mlxd.hub import File, Hub, Tree, Trouble, Unreachable
from mlxd.messages import Bye, Counters, Fetch, Fetched, Fetching, Hello, Ready, Reopen, Stop, SupervisorWord
from mlxd.modelfiles import INDEX, MAX_JSON_BYTES, Broken, check_tokenizer, read_json

#: Taken besides the weights: what an engine may see of a model, and what is shown of it. No *.py, no pickle, no other format.
TAKEN = DATA | SETTINGS | {"modules.json"}
TAKEN_TOO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(jinja|tiktoken)|[0-9]+_Pooling/config\.json")
WEIGHTS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
#: What an earlier pull of ours left half done.
INCOMPLETE = re.compile(r"([0-9a-f]{40}|[0-9a-f]{64})\.mlxd")

#: So many tries in a row that brought nothing are the last; before anything has come so many, and for one who has the model anyway.
TRIES, TRIES_FIRST, TRIES_ANYWAY = 8, 4, 2
#: A hub that wants to be left alone for longer is left alone.
MOST_REST_S = 600.0
#: More than the files themselves: file systems have overheads, and others write, too.
ROOM = 1.1
#: At most ten lines a second.
TELL_S = 0.1
PIECE_BYTES = 1024 * 1024

Say = Callable[[Fetching], None]
T = TypeVar("T")


class Pull:
    """One repository, `org/repo`, on its way into the cache at `cache`. `moved`: bytes that have come, those that came again not counted."""

    def __init__(self, repository: str, cache: Path, hub: Hub, limits: Limits, say: Say):
        self.repository = repository
        self.hub = hub
        self.directory = models.repository_directory(cache, repository)
        self.blobs = self.directory / "blobs"
        self.lock_file = cache / ".locks" / self.directory.name / "mlxd.lock"
        self.limits = limits
        self.tell = say
        self.told_at = float("-inf")
        self.moved = 0

    # --- life, read downward -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises MlxdError; what was listed before is listed then, and nothing else."""
        try:
            with self.alone():
                self.say("pulling manifest")
                if (tree := self.newer()) is not None:
                    self.bring(tree)
        except OSError as error:
            raise no_place(error) from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else of mlxd pulls the same meanwhile. Raises OSError."""
        self.lock_file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(paths.open_own(self.lock_file, os.O_RDWR | os.O_CREAT), "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.say("waiting for another pull of this model to end")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def newer(self) -> Tree | None:
        """What the hub has; None when that is here, or is not to be had and something whole is here. Raises Refused."""
        here = models.current_snapshot(self.directory)
        whole = here is not None and isinstance(models.examine(self.repository, here), models.Model)
        try:
            tree = self.persist(lambda: self.hub.tree(self.repository), TRIES_ANYWAY if whole else TRIES_FIRST)
        except Unreachable as why:
            if not whole:
                raise
            self.say(f"{why}; the model stays as it is here")
            return None
        return None if whole and here is not None and here.name == tree.revision else tree

    def bring(self, tree: Tree) -> None:
        """Raises Refused, OSError."""
        small, weights = chosen(self.repository, tree.files)
        snapshot = self.directory / "snapshots" / tree.revision
        self.check_room([*small, *weights])
        for directory in (self.blobs, snapshot, self.directory / "refs"):
            directory.mkdir(parents=True, exist_ok=True)
        for file in small:
            self.place(tree.revision, file, snapshot)
        self.check(snapshot, [*small, *weights])
        for file in weights:
            self.place(tree.revision, file, snapshot)
        self.say("verifying sha256 digest")  # each was, as it came; now that together they are a model
        if isinstance(why := models.examine(self.repository, snapshot), str):
            raise self.refused(why)
        self.say("writing manifest")
        self.publish(tree.revision, snapshot)

    def check_room(self, files: list[File]) -> None:
        """Raises Refused when the disk has no room for what is still to come."""
        need = int(ROOM * sum(file.size - self.held_bytes(file) for file in files))
        free = shutil.disk_usage(self.lock_file.parent).free
        if need > free:
            raise Refused(
                507,
                f"{self.repository} needs {amount(need)} on the disk of the Hugging Face cache, which has {amount(free)} free; make room, "
                "or set HF_HOME to a directory on another disk",
            )

    def held_bytes(self, file: File) -> int:
        """How much of it is here, by the look of it."""
        for path in (self.blobs / file.digest, self.incomplete(file)):
            with contextlib.suppress(OSError):
                return min(path.stat().st_size, file.size)
        return 0

    def check(self, snapshot: Path, files: list[File]) -> None:
        """Whether mlx-lm can run this, before its weights are fetched. Raises Refused."""
        names = {file.path for file in files}
        try:
            read_settings(snapshot, names)
            check_tokenizer(names)
            if INDEX in names:
                check_index(read_json(snapshot / INDEX), names)
        except Broken as why:
            raise self.refused(str(why)) from None

    def publish(self, revision: str, snapshot: Path) -> None:
        """From here on the model is listed. Raises OSError."""
        for directory in (*{path.parent for path in snapshot.rglob("*")}, snapshot.parent, self.blobs, self.directory):
            sync(directory)
        paths.write_atomically(self.directory / "refs" / "main", revision.encode())
        for path in self.blobs.iterdir():  # of a revision that nobody will ask for again
            if INCOMPLETE.fullmatch(path.name):
                path.unlink()

    # --- one file ----------------------------------------------------------------------------------------------------------------

    def incomplete(self, file: File) -> Path:
        """A name of our own: other programs write to `.incomplete`, and would go on writing when it has its final name."""
        return self.blobs / f"{file.digest}.mlxd"

    def place(self, revision: str, file: File, snapshot: Path) -> None:
        """Have the file in the snapshot, its bytes checked. Raises Refused, OSError."""
        blob, pointer = self.blobs / file.digest, snapshot / file.path
        if not self.is_whole(blob, file):
            self.download(revision, file).replace(blob)
        target = os.path.relpath(blob, pointer.parent)
        if not pointer.is_symlink() or str(pointer.readlink()) != target:
            pointer.parent.mkdir(exist_ok=True)
            pointer.unlink(missing_ok=True)
            pointer.symlink_to(target)

    def is_whole(self, blob: Path, file: File) -> bool:
        """Whether its bytes are here and right; wrong ones are removed, whoever left them. Raises OSError."""
        if not blob.exists():
            blob.unlink(missing_ok=True)  # a link that leads nowhere
            return False
        found, read = new_hash(file), 0
        if blob.stat().st_size == file.size:
            with open(blob, "rb") as bytes_:
                while piece := bytes_.read(PIECE_BYTES):
                    found.update(piece)
                    self.progress(file, read := read + len(piece), 0)
        if found.hexdigest() != file.digest:
            blob.unlink()
            return False
        return True

    def download(self, revision: str, file: File) -> Path:
        """The file, whole, right and on the disk. What came wrong is fetched once more, from its beginning. Raises Refused, OSError."""
        path = self.incomplete(file)
        for _ in range(2):
            with Partial(path, file, self.progress) as partial:
                self.persist(lambda: self.fill(revision, partial), TRIES)  # noqa: B023 it is called here
                if partial.is_right():
                    os.fsync(partial.fd)
                    return path
            path.unlink()
        raise Refused(
            502, f"{file.path} of {self.repository} came twice with other bytes than the hub says it has; pull it again later"
        )

    def fill(self, revision: str, partial: Partial) -> None:
        """Go on until all of its bytes are there. Raises Trouble, Refused, OSError."""
        file = partial.file
        if partial.size < file.size:
            for offset, piece in self.hub.read(self.repository, revision, file, partial.size):
                partial.put(offset, piece)
                if partial.size > file.size:
                    return  # wrong, however it goes on
        if partial.size < file.size:
            raise Trouble(f"{self.hub.host} ended {file.path} too early")

    def persist(self, attempt: Callable[[], T], tries: int) -> T:
        """`attempt` until it succeeds, as long as bytes come meanwhile. Raises Refused, Unreachable after `tries` without any."""
        failed, moved = 0, self.moved
        while True:
            try:
                return attempt()
            except Trouble as trouble:
                failed, moved = (1 if self.moved > moved else failed + 1), self.moved
                if failed >= tries or trouble.retry_s > MOST_REST_S:
                    raise Unreachable(f"{trouble}; pull again later, it goes on where it stopped") from None
                grown = min(self.limits.backoff_first_s * 2.0 ** (failed - 1), self.limits.backoff_most_s)
                rest_s = max(trouble.retry_s, grown)
                self.say(f"{trouble}; trying again in {max(1, round(rest_s))} s")
                time.sleep(rest_s)

    # --- what is said ------------------------------------------------------------------------------------------------------------

    def say(self, status: str) -> None:
        self.tell(Fetching(self.repository, status))

    def progress(self, file: File, completed: int, moved: int) -> None:
        """Of a file, whose name in the cache is its digest. git's own files are small, and nothing is said of them."""
        self.moved += moved
        now = time.monotonic()
        if len(file.digest) == 64 and (completed == file.size or now >= self.told_at + TELL_S):
            self.told_at = now
            status, digest = f"pulling {file.digest[:12]}", f"sha256:{file.digest}"
            self.tell(Fetching(self.repository, status, digest, file.size, completed))

    def refused(self, why: str) -> Refused:
        return Refused(400, f"{self.repository} is refused: {why}", hopeless=True)


class Partial:
    """A file's bytes on the disk as far as they have come, and their digest. `progress` is told of all, and how many are new."""

    def __init__(self, path: Path, file: File, progress: Callable[[File, int, int], None]):
        """Raises OSError."""
        self.file = file
        self.progress = progress
        self.fd = paths.open_own(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self.furthest = file.size  # what is here already is no progress
        self.reset()
        while self.size <= file.size and (piece := os.read(self.fd, PIECE_BYTES)):
            self.count(piece)
        if self.size > file.size:
            self.restart()
        self.furthest = self.size

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def reset(self) -> None:
        self.size, self.hash = 0, new_hash(self.file)

    def restart(self) -> None:
        os.ftruncate(self.fd, 0)
        self.reset()

    def put(self, offset: int, piece: bytes) -> None:
        """Raises OSError."""
        if offset == 0 and self.size:  # the hub knows no ranges
            self.restart()
        unwritten = memoryview(piece)
        while unwritten:
            unwritten = unwritten[os.write(self.fd, unwritten) :]
        self.count(piece)

    def count(self, piece: bytes) -> None:
        self.size += len(piece)
        self.hash.update(piece)
        gained = max(0, self.size - self.furthest)
        self.furthest += gained
        self.progress(self.file, self.size, gained)

    def is_right(self) -> bool:
        there = os.fstat(self.fd).st_size
        return there == self.size == self.file.size and self.hash.hexdigest() == self.file.digest


def new_hash(file: File) -> hashlib._Hash:
    """What a file's digest is made with: git's own begins with a header."""
    if len(file.digest) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def chosen(repository: str, files: list[File]) -> tuple[list[File], list[File]]:
    """What is taken: the small files, and the weights. Raises Refused when there is no model in it."""
    weights = [file for file in files if WEIGHTS.fullmatch(file.path)]
    weights = [file for file in weights if file.path.startswith("model")] or weights  # mlx-lm loads no others where there are these
    small = [
        file
        for file in files
        if file.path in TAKEN or TAKEN_TOO.fullmatch(file.path) or (file.path.lower() in models.LICENSES and "/" not in file.path)
    ]
    if not weights:
        kinds = sorted({suffix for file in files if (suffix := Path(file.path).suffix) in FOREIGN})
        has = f"it has {', '.join(kinds)}" if kinds else "it has no weights"
        raise Refused(
            400,
            f"{repository} has no *.safetensors, {has}: name a repository in MLX's safetensors format, such as those of mlx-community",
            hopeless=True,
        )
    if "config.json" not in {file.path for file in small}:
        raise Refused(400, f"{repository} has no config.json: it is no model that MLX can run", hopeless=True)
    for file in small:
        if file.size > MAX_JSON_BYTES:
            raise Refused(400, f"{file.path} of {repository} is too large to be true", hopeless=True)
    return sorted(small), sorted(weights)


#: Other formats of weights, for the sentence that says why a repository will not do.
FOREIGN = frozenset({".gguf", ".bin", ".pt", ".pth", ".npz", ".h5", ".onnx", ".msgpack", ".ckpt", ".mlpackage"})


def check_index(index: dict[str, Any], names: set[str]) -> None:
    """Raises Broken when the repository lacks weights that its index names."""
    found = index.get("weight_map")
    lacking = sorted({str(name) for name in found.values()} - names) if isinstance(found, dict) else []
    if lacking:
        raise Broken(f"{lacking[0][:80]} is missing, which {INDEX} names")


def sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def no_place(error: OSError) -> Refused:
    """The text goes to clients: no path."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Refused(507, "the disk of the Hugging Face cache is full; make room and pull again: it goes on where it stopped")
    if error.errno == errno.ENOENT:
        return Refused(502, "the model was deleted while it was pulled; pull it again")
    return Refused(502, f"the Hugging Face cache cannot be written: {error.strerror or type(error).__name__}; see HF_HOME")


# --- the process as the supervisor's child -------------------------------------------------------------------------------------------


class Process:
    """One pull, in a thread, beside the link."""

    def __init__(self, settings: link.ChildSettings, mine: link.Link):
        self.settings = settings
        self.link = mine
        self.pull: Pull | None = None
        self.task: asyncio.Task[None] | None = None
        self.loop = asyncio.get_running_loop()

    async def run(self) -> None:
        self.link.send(Hello(messages.PROTOCOL, "puller", os.getpid(), mlxd.__version__, self.settings.nonce))
        beats = asyncio.create_task(link.beat(self.link, self.counters))
        await link.serve(self.link, self.handle, self.orphaned)
        beats.cancel()

    async def handle(self, word: SupervisorWord) -> None:
        match word:
            case Fetch(name) if self.task is None:
                self.link.send(Ready(name))
                self.task = asyncio.create_task(self.work(name))
                self.task.add_done_callback(died)
            case Stop():
                link.leave(0)  # what has come is on the disk
            case Reopen():
                link.reopen_log(self.settings.log)

    async def work(self, repository: str) -> None:
        """A pull to its end, good or bad, and with it that of the process."""
        try:
            self.pull = Pull(repository, models.hub_directory(os.environ), Hub(), self.settings.config.supervisor, self.say)
            await asyncio.to_thread(self.pull.run)
            end = Fetched(repository)
        except MlxdError as error:
            end = Fetched(repository, str(error), error.status if isinstance(error, Refused) else 502)
        self.link.send(end)
        self.link.send(Bye("stopped"))
        await self.link.writer.drain()
        link.leave(0)

    def say(self, word: Fetching) -> None:
        """From the thread. What the supervisor has no time for is not worth waiting for."""
        self.loop.call_soon_threadsafe(self.link.offer, word)

    def counters(self) -> Counters:
        return Counters(running=int(self.pull is not None), loaded=self.pull.moved if self.pull else 0)

    async def orphaned(self) -> None:
        """Nobody is left to tell."""


def died(task: asyncio.Task[None]) -> None:
    """Of what nobody foresaw: end loudly, and be started again."""
    if (error := task.exception()) is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        link.leave(link.EX_SOFTWARE)


async def live(settings: link.ChildSettings) -> None:
    await Process(settings, await link.join(settings)).run()


# --- the process by itself -------------------------------------------------------------------------------------------------------------


def by_hand(name: str) -> int:
    """Pull without a daemon; the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        where = paths.locate()
        settings = config.load(where.config, [where.env_file]).config
        catalogue = models.Catalogue(settings.models.dir, aliases=Aliases(where.aliases))
        if repository := catalogue.to_pull(name):
            Pull(repository, catalogue.hub, Hub(), settings.supervisor, show).run()
        show(Fetched(name))
    except MlxdError as error:
        show(Fetched(name, str(error)))
        return 1
    return 0


def show(word: Fetching | Fetched) -> None:
    print(json.dumps(pulls.told(word)), flush=True)


def main() -> None:
    if "MLXD_CHILD" in os.environ:
        settings = link.child_settings()
        link.become_child(settings)
        asyncio.run(live(settings))
    elif len(sys.argv) == 2:
        sys.exit(by_hand(sys.argv[1]))
    else:
        sys.exit("usage: python -m mlxd.pull org/repo")


if __name__ == "__main__":
    main()
