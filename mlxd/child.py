"""One child: a slot for a process. Spawning, its link, its log file, the rungs of the stop ladder, its exit record.

Acts and remembers, decides nothing: what happens next is asked of `policy` by the supervisor, which alone writes `state` and
`wanted`. Knows no HTTP and no models, only the words.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil

from mlxd import blas, causes
from mlxd.config import Config
from mlxd.config import Supervisor as Limits
from mlxd.leftovers import Leftover, start_identity
from mlxd.link import ChildSettings, Link
from mlxd.logs import timestamp
from mlxd.messages import Bye, Counters, ExitRecord, Fetching, Reopen, Tuning, Want
from mlxd.paths import Paths, open_log_anyway, opened, read_small
from mlxd.policy import PRODUCTIVE_TOKENS, Death, State

#: Last words of a child that an exit record keeps (Ollama keeps as much), and those that are looked at: faulthandler's stacks of all threads
#: come after what tells why.
LAST_WORDS_BYTES = 8 * 1024
JUDGED_BYTES = 64 * 1024
#: A kill counts as the machine's own when less than this part of memory was left.
LOW_MEMORY = 0.05
#: A child with more processes of its own than this, ended and never waited for or not, leaves no room to start anything (32,768 is a usual
#: limit of a whole machine).
MOST_PROCESSES = 1000
#: With this part of its descriptors in use a child is about to accept, open and start nothing more.
MOST_DESCRIPTORS = 0.9
#: Over this footprint a KILL is followed by a look whether the memory came back.
HEAVY_BYTES = 2 * 1024**3

#: It floods its log when, in so many seconds, more was cut than its limit so many times over: 20 MB/s at the limit of 50 MiB.
FLOOD_S, FLOOD_LIMITS = 10.0, 4

#: What a child may know of our environment: no tokens, no keys.
ENVIRONMENT = frozenset(
    {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "HF_HOME", "HF_HUB_CACHE"}
    | {"PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"}
    | {"CUDA_VISIBLE_DEVICES"}
)
#: What a puller needs besides, to get through to the hub; nobody else gets the token.
HUB_ENVIRONMENT = frozenset(
    {"HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DOWNLOAD_TIMEOUT", "SSL_CERT_FILE", "SSL_CERT_DIR"}
    | {name for upper in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY") for name in (upper, upper.lower())}
)
ENVIRONMENT_PREFIXES = ("LC_", "XDG_", "MLX_METAL_", "OMP_", "OPENBLAS_", "VECLIB_", "MLXD_FAKE_")

Kind = Literal["server", "engine", "puller"]
MODULES: dict[Kind, str] = {"server": "mlxd.server", "engine": "mlxd.engine", "puller": "mlxd.pull"}


@dataclass(eq=False)
class Child:
    """A slot. `model`: of an engine, what it is for (None: a blank one); of a puller, the repository. Times are of the monotonic clock,
    seconds."""

    kind: Kind
    slot: int
    model: str | None = None
    directory: str = ""
    preload: bool = False

    wanted: bool = True
    released: bool = False  # of an engine: not wanted any more, as soon as no server that drains may have a job on it
    state: State = State.STOPPED
    drain_s: float = 0.0  # of a server: how long it may take to end its streams
    retry_s: float = 0.0  # in BACKOFF and COOLDOWN: until the next try
    hold: str = ""  # why HELD, in words
    hold_cause: Literal["", "fault", "memory"] = ""
    unfit_program: str = ""  # what lay in the place of a program that could not be started
    wanted_by: set[int] = field(default_factory=set)  # of a puller: the servers, by pid
    fetching: Fetching | None = None  # of a puller: what was said last
    restarts: int = 0
    trial: bool = False
    died_of: str = ""  # the cause of the last death
    tuning: Tuning = Tuning()  # what the next engine of this model gets less of
    ordered: bool = False  # mlxd ends this process for reasons that are not its fault
    problems: list[str] = field(default_factory=list)  # what the server told with its `ready`
    refusal: str | None = None  # the engine's own sentence why this model cannot be loaded
    suspicion: str = ""  # why the ladder was begun, for the exit record
    counted: list[float] = field(default_factory=list)
    deaths: list[float] = field(default_factory=list)
    lost_bytes: int = 0  # footprint of a heavy process that was killed, and what was available then
    available_bytes: int = 0

    pid: int | None = None
    alive: bool = False  # spawned and not reaped: its number cannot be anybody else's
    blas: str = ""  # the library that was preloaded into it
    version: str = ""  # of mlxd, as it said with its hello
    link: Link | None = None
    identity: float = 0.0
    since: float = 0.0  # when this process was spawned
    ready_at: float | None = None
    at_ready: Counters = field(default_factory=Counters)
    counters: Counters = field(default_factory=Counters)
    beat_at: float = 0.0
    progress_at: float = 0.0  # when a counter last moved, or there was nothing to do
    suspect: bool = False
    memory_bytes: int = 0
    needed_bytes: int = 0  # of an engine: what its model was estimated to take
    share_bytes: int = 0  # what it was told that it may take of memory, and when
    shared_at: float = 0.0
    ready_bytes: int = 0  # its footprint when it was first measured as ready
    crowded: list[float] = field(default_factory=list)  # when, in a row, it was found to have outgrown its share
    hard_looks: int = 0  # how many in a row found it far beyond
    descriptors: int = 0
    excess: str = ""  # what it had too much of when it was last looked at
    bye: Bye | None = None
    log_start: int = 0
    log_id: tuple[int, int] = (0, 0)  # the file that it writes to
    log_problem: str = ""  # why what it writes is lost
    log_lost: bool = False  # that was told
    cuts: list[tuple[float, int]] = field(default_factory=list)  # when its log was cut lately, and by how many bytes
    flooding: bool = False
    oom_kills: int = 0  # of the whole machine, when this process was last seen alive
    dump: str = ""  # where its stacks go

    @property
    def name(self) -> str:
        """server, engine-1, engine-2..., puller-1..."""
        return "server" if self.kind == "server" else f"{self.kind}-{self.slot}"

    @property
    def title(self) -> str:
        return f"{self.name} ({self.model})" if self.model else self.name

    # --- life, read downward -------------------------------------------------------------------------------------------

    def spawn(
        self, argv: list[str], settings: ChildSettings, pass_fds: list[int], now: float, environ: Mapping[str, str] = os.environ
    ) -> socket.socket:
        """Start the process and return our end of its link. `environ`: of which it gets what its kind may know. Raises OSError when there is
        no such program or no room for it.

        Its own session, so that neither a terminal's Ctrl-C nor whoever kills us reaches it unasked; no fork hooks.
        """
        Path(settings.stack).unlink(missing_ok=True)
        self.dump = settings.stack
        ours, theirs = socket.socketpair()
        try:
            log = self.open_log(settings.log)
        except OSError:
            ours.close()
            theirs.close()
            raise
        ours.setblocking(False)
        settings.link_fd = theirs.fileno()
        environment = child_environment(environ, self.kind) | {"MLXD_CHILD": msgspec.json.encode(settings).decode()}
        self.blas = blas.library(settings.config.engine.blas) if self.kind == "engine" else ""
        if self.blas:
            environment["LD_PRELOAD"] = self.blas
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=[theirs.fileno(), *pass_fds],
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
        finally:
            os.close(log)
            theirs.close()
        # The loop reaps by waitpid; a Popen that is garbage collected unreaped would let the next one steal the status.
        process.returncode = 0
        self.pid, self.alive, self.version = process.pid, True, ""
        self.since = self.beat_at = self.progress_at = now
        self.lost_bytes = 0  # whoever had us begun does not wait for it any more
        self.oom_kills = oom_kills()
        self.identity = start_identity(self.pid) or 0.0
        return ours

    def open_log(self, path: str | Path) -> int:
        """A descriptor that its process is to write to."""
        fd, self.log_problem = open_log_anyway(path)
        there = os.fstat(fd)
        self.log_id, self.log_start = (there.st_dev, there.st_ino), there.st_size
        return fd

    def mend_log(self, path: Path) -> None:
        """A log that was removed or replaced is made anew, and the process told to write there."""
        if self.link is None:
            return
        with contextlib.suppress(OSError):
            there = path.lstat()
            if stat.S_ISREG(there.st_mode) and (there.st_dev, there.st_ino) == self.log_id:  # a directory may have got its number
                return
        try:
            os.close(self.open_log(path))
        except OSError:  # out of descriptors: the next look tries again
            return
        if not self.log_problem:
            self.link.send(Reopen())

    def shorten_log(self, path: Path, limits: Limits, now: float) -> bool:
        """Keep its log under the limit. True: it was cut."""
        cut_bytes = shorten_log(path, limits.log_bytes, limits.log_keep_bytes)
        self.log_start = max(0, self.log_start - cut_bytes)
        self.cuts = [(at, n) for at, n in self.cuts if at > now - FLOOD_S] + ([(now, cut_bytes)] if cut_bytes else [])
        return cut_bytes > 0

    def floods(self, limits: Limits) -> bool:
        return sum(n for _, n in self.cuts) > FLOOD_LIMITS * limits.log_bytes

    def observe(self, counters: Counters, now: float) -> None:
        """A beat: the loop turns, and this is how far it is. A stack that was asked for meanwhile is of no interest any more."""
        if self.suspect and not self.suspicion:
            with contextlib.suppress(OSError):
                os.truncate(self.dump, 0)
        if counters.progress != self.counters.progress or not counters.running:
            self.progress_at = now
        self.counters, self.beat_at, self.suspect = counters, now, False

    def begin_anew(self, word: Want) -> None:
        """Be for this model from now on; what became of earlier spares in this slot is not its record."""
        self.model, self.directory, self.preload, self.needed_bytes = word.model, word.directory, word.preload, word.needed_bytes
        self.restarts, self.counted, self.deaths, self.trial, self.died_of = 0, [], [], False, ""

    def take_over(self, dead: Child) -> None:
        """Do what `dead`, which has no process, was for; its record comes with it, and it is for nothing any more."""
        self.model, self.directory, self.preload, self.released = dead.model, dead.directory, dead.preload, dead.released
        self.needed_bytes = dead.needed_bytes
        self.restarts, self.counted, self.deaths = dead.restarts + 1, dead.counted, dead.deaths
        self.trial, self.died_of, self.tuning = dead.trial, dead.died_of, dead.tuning
        dead.model, dead.wanted = None, False

    def signal(self, number: int) -> None:
        """To the process's whole group. Until we reap it, its number cannot be anybody else's."""
        if self.alive and self.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def dump_stack(self) -> None:
        """Ask this process alone for its stacks; they appear in its dump file, even when native code holds the interpreter."""
        if self.alive and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR1)

    def leftover(self, nonce: str) -> Leftover | None:
        """What the next supervisor needs to find this process; None when there is none."""
        return Leftover(self.pid, self.identity, nonce, self.name) if self.alive and self.pid is not None else None

    def terminate(self) -> None:
        """TERM stays pending on a stopped process, so CONT follows it."""
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def buried(self, status: int | None, now: float, paths: Paths, error: str = "") -> tuple[Death, ExitRecord]:
        """The process has ended with this wait status (None: it never began, `error` says why). Returns what it means and what is kept of it;
        the slot is free for the next process."""
        number = os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None
        code = os.WEXITSTATUS(status) if status is not None and os.WIFEXITED(status) else None
        words = error or last_words(paths.log(self.name), self.log_start, JUDGED_BYTES)
        stack = read_small(paths.dump(self.name), 64 * 1024)
        memory = psutil.virtual_memory()
        starved = number == signal.SIGKILL and (memory.available < LOW_MEMORY * memory.total or oom_kills() > self.oom_kills)
        intended = self.ordered or not self.wanted
        cause, line = causes.judge(
            causes.End(number, code, self.suspicion, intended, self.bye, starved, words, bool(self.blas) and self.ready_at is None)
        )
        death = Death(
            wanted=self.wanted,
            ordered=self.ordered or cause is causes.DEADLINE,
            unfit=self.hold_cause == "fault" or code == causes.EX_CONFIG,
            productive=self.ready_at is not None
            and (
                self.counters.finished > self.at_ready.finished
                or self.counters.emitted >= self.at_ready.emitted + PRODUCTIVE_TOKENS
            ),
            pressure=cause.pressure,
            outside=cause.outside or cause is causes.SPAWN,
            rest_s=cause.rest_s,
        )
        if number == signal.SIGKILL and self.memory_bytes > HEAVY_BYTES:
            self.lost_bytes = self.memory_bytes
        record = ExitRecord(
            ts=timestamp(),
            child=self.kind,
            slot=self.slot,
            pid=self.pid or 0,
            model=self.model,
            cause=cause.name,
            signal=number,
            code=code if code is not None or number is not None else 127,
            up_s=round(now - self.since, 3) if self.pid else 0.0,
            memory_bytes=self.memory_bytes,
            running=self.counters.running,
            text=(self.bye.text if self.bye is not None and self.bye.text else told(words, line))[-LAST_WORDS_BYTES:],
            stack=stack.decode(errors="replace") if stack else None,
            descriptors=self.descriptors,
        )
        if self.link is not None:
            self.link.close()
        self.alive = False
        self.pid = self.link = self.bye = self.ready_at = None
        self.counters, self.at_ready, self.memory_bytes, self.descriptors = Counters(), Counters(), 0, 0
        self.share_bytes = self.ready_bytes = self.hard_looks = 0
        self.crowded = []
        self.deaths = [t for t in self.deaths if t > now - 3600] + ([] if self.ordered else [now])
        self.ordered = self.suspect = False
        self.suspicion = self.excess = ""
        self.died_of = cause.name
        if death.counts and death.wanted:
            self.counted.append(now)
        return death, record

    def measure(self) -> bool:
        """Bring `memory_bytes` up to date. False: it is ending and has none left to see: what it had is what counts. Of a heavy one, what was
        available beside it is remembered, too: Linux gives the memory back before it tells of the end."""
        if self.pid is None or not (seen := footprint(self.pid)):
            return False
        self.memory_bytes = seen
        self.descriptors = descriptors(self.pid)
        if seen > HEAVY_BYTES:
            self.available_bytes = psutil.virtual_memory().available
        return True

    def exceeds(self, descriptors: float, crowded: bool) -> str:
        """What it has had too much of at two looks in a row, as a cause; "" when nothing. `descriptors`: how many are too many. `crowded`: the
        machine has so many processes that they are worth counting, which costs a look at each."""
        before, self.excess = self.excess, ""
        if self.descriptors >= descriptors:
            self.excess = causes.DESCRIPTORS.name
        elif crowded and self.pid is not None and processes_of(self.pid) > MOST_PROCESSES:
            self.excess = causes.PROCESSES.name
        return self.excess if self.excess == before else ""

    def memory_is_back(self) -> bool:
        """Whether 80 % of what a killed heavy process held is available again: one report has 414 of 424 GiB wired until reboot
        (omlx#2184), and the next load makes it worse."""
        if not self.lost_bytes:
            return True
        if psutil.virtual_memory().available >= self.available_bytes + 0.8 * self.lost_bytes:
            self.lost_bytes = 0
        return not self.lost_bytes


def program_id(program: str) -> str:
    """Another one for whatever else lies there; "missing" for nothing."""
    try:
        found = Path(shutil.which(program) or program).stat()
    except OSError:
        return "missing"
    return f"{found.st_dev} {found.st_ino} {found.st_mode} {found.st_ctime_ns}"


def why_unfit(program: str, error: OSError) -> str:
    """Why this program cannot be started. Of a script without its interpreter the system says that the script is not there."""
    if error.errno == errno.ENOENT and shutil.which(program):
        return "the interpreter that its first line names is missing"
    return error.strerror or str(error)


def command(kind: Kind, config: Config) -> list[str]:
    """What to run for a child of this kind."""
    own = {"server": config.server.command, "engine": config.engine.command}.get(kind)
    return own or [sys.executable, "-P", "-m", MODULES[kind]]  # -P: no module from whatever directory we were started in


def child_environment(environ: Mapping[str, str], kind: Kind | None = None) -> dict[str, str]:
    """What of our environment a child gets, or (None) any other program that we start."""
    known = ENVIRONMENT | HUB_ENVIRONMENT if kind == "puller" else ENVIRONMENT
    return {k: v for k, v in environ.items() if k in known or k.startswith(ENVIRONMENT_PREFIXES)}


def is_paused(pid: int) -> bool:
    """Whether somebody has sent it SIGSTOP, or the like, and no SIGCONT since."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def footprint(pid: int) -> int:
    """Memory that the system would get back, bytes: what jetsam counts on macOS, resident memory elsewhere. 0: cannot be told."""
    if sys.platform == "darwin":
        return darwin_footprint(pid)
    try:
        # /proc/PID/statm: size resident shared ..., in pages. psutil costs 10 times as much, each second, for ever.
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def descriptors(pid: int) -> int:
    """Open files of a process; 0: cannot be told."""
    try:
        if sys.platform == "darwin":
            return psutil.Process(pid).num_fds()
        # Linux 6.2 tells the number as the directory's size; before, it is 0.
        directory = Path(f"/proc/{pid}/fd")
        return directory.stat().st_size or len(list(directory.iterdir()))
    except (OSError, psutil.Error):
        return 0


def processes_of(pid: int) -> int:
    """Processes that this one started and has not waited for."""
    try:
        return len(psutil.Process(pid).children())
    except psutil.Error:
        return 0


def processes() -> int:
    """Processes of the whole machine, on Linux threads as well: cheap to know, and never fewer than any child has."""
    if sys.platform == "darwin":
        return len(psutil.pids())
    try:
        return int(Path("/proc/loadavg").read_bytes().split()[3].partition(b"/")[2])
    except (OSError, IndexError, ValueError):
        return 0


def darwin_footprint(pid: int) -> int:
    """ri_phys_footprint of proc_pid_rusage, which psutil lacks; its RSS misses Metal's memory (omlx#1040)."""
    import ctypes

    # rusage_info_v2 (flavor 2) of <sys/resource.h>: a UUID of 16 bytes, then 18 numbers of 8: user_time, system_time, pkg_idle_wkups,
    # interrupt_wkups, pageins, wired_size, resident_size, phys_footprint, ...
    usage = (ctypes.c_uint64 * 20)()
    return int(usage[2 + 7]) if libproc().proc_pid_rusage(pid, 2, usage) == 0 else 0


def oom_kills() -> int:
    """How many processes Linux has killed for want of memory since boot, in any cgroup; 0 elsewhere. By the time we hear of such an end the
    memory is back."""
    try:
        return int(Path("/proc/vmstat").read_bytes().partition(b"\noom_kill ")[2].partition(b"\n")[0])
    except (OSError, ValueError):
        return 0


@functools.cache
def libproc() -> Any:
    import ctypes

    return ctypes.CDLL("/usr/lib/libproc.dylib")


def told(words: str, line: str) -> str:
    """The last words, with the line that told why if they are too many to be kept."""
    end = words[-LAST_WORDS_BYTES:]
    return end if line in end else f"{line}\n...\n{words[len(line) + 5 - LAST_WORDS_BYTES :]}"


def last_words(log: Path, start: int, most_bytes: int) -> str:
    """The end of what a process wrote to its log since `start`, at most `most_bytes`."""
    with opened(log) as file:
        if file is None:
            return ""
        size = file.seek(0, os.SEEK_END)
        file.seek(max(min(start, size), size - most_bytes))
        return file.read(most_bytes).decode(errors="replace").strip()


def shorten_log(path: Path, most_bytes: int, keep_bytes: int) -> int:
    """Keep the last `keep_bytes` of a log over `most_bytes`; returns how many went. The writer's O_APPEND goes on at the new end; what it
    writes between the read and the truncate is lost, and that is accepted."""
    with contextlib.suppress(OSError), open(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            file.seek(-min(keep_bytes, most_bytes // 2), os.SEEK_END)
            kept = file.read(most_bytes // 2)
            file.seek(0)
            file.truncate(0)
            file.write(kept)
            return size - len(kept)
    return 0
