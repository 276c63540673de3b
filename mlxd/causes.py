"""Why a process ended: from its exit status and its last words to a cause, and what a cause means for the next start.

Pure: no clock, no processes, no I/O. The names are what exit records and `last_exit` carry and what scripts compare; docs/causes.md lists them.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from typing import Literal

from mlxd.messages import Bye, Tuning

#: sysexits' EX_CONFIG: a retry would fail the same way.
EX_CONFIG = 78

#: Tuning goes down by halves to these, and no further.
LEAST_PREFILL_TOKENS = 64
LEAST_CACHE_SHARE = 1 / 8

Knob = Literal["prefill", "concurrency", "cache"]


@dataclass(frozen=True)
class Cause:
    """`what`: a sentence without its subject. `advice`: what a person can do. `eases`: what the next start of this engine gets less of.

    `faultless`: it is not held against the requests that lose their engine. `outside`: somebody else ended it, so it is not held against
    the child either. `pressure`: evidence that memory ran out. `rest_s`: the next start waits at least so long.
    """

    name: str
    what: str
    advice: str = ""
    eases: tuple[Knob, ...] = ()
    faultless: bool = False
    outside: bool = False
    pressure: bool = False
    rest_s: float = 0.0


MEMORY = Cause(
    "memory",
    "ran out of memory",
    "use a smaller model or a shorter context, or end other programs",
    eases=("prefill", "concurrency", "cache"),
    pressure=True,
)
WATCHDOG = Cause(
    "watchdog",
    "was ended by the GPU watchdog: one piece of work took too long",
    "lower engine.prefill_tokens; macOS gives the screen precedence over long GPU work",
    eases=("prefill",),
)
HANDLES = Cause(
    "handles",
    "ran out of GPU buffer handles",
    "lower engine.cache_bytes and server.max_concurrent; models with many experts need more handles",
    eases=("concurrency", "cache"),
)
IGNORED = Cause(
    "ignored",
    "was shut out by the GPU driver after GPU errors",
    "look for another program that loads the GPU; only a new process is let in again",
    eases=("prefill",),
    rest_s=5.0,
)
DISK = Cause("disk", "found no room on the disk", "make room", faultless=True, outside=True, rest_s=5.0)
VICTIM = Cause("victim", "lost its GPU work to another program's GPU error", "look for that program", faultless=True, outside=True)
IMPORT = Cause("import", "could not import a library", "install mlxd again")
SEGFAULT = Cause("segfault", "crashed (segmentation fault)", "report it with the exit record")
ABORTED = Cause("aborted", "aborted", "report it with the exit record")
ERROR = Cause("error", "ended with an error", "read its log")
BLAS = Cause(
    "blas",
    "died before it was ready, with the library that engine.blas names",
    "set engine.blas to stock, or to another library",
    faultless=True,
)
SIGNAL = Cause("signal", "was ended by a signal", "find out who sent it")
KILLED = Cause("killed", "was killed from outside", faultless=True, outside=True)
TERMINATED = Cause("terminated", "was terminated from outside", faultless=True, outside=True)
PAUSED = Cause(
    "paused", "was paused from outside (SIGSTOP) and did not beat", "find out who paused it", faultless=True, outside=True
)
STOPPED = Cause("stopped", "was stopped", faultless=True, outside=True)
REFUSED = Cause("refused", "said that this model cannot be loaded", "mend the model's files, or use another")
DEADLINE = Cause("deadline", "was replaced: the text of one request took too long", "look at that request", faultless=True)
CONFIGURATION = Cause("configuration", "says that its configuration is wrong", "mend the configuration")
EXITED = Cause("exited", "ended by itself", "read its log")
SPAWN = Cause("spawn", "could not be started", "install mlxd again, or mend server.command or engine.command")
NO_HELLO = Cause("no hello", "did not come up in time", "read its log")
LINK_CLOSED = Cause("link closed", "closed its link", "read its log")
PROTOCOL = Cause("protocol", "is of another version", "run `mlxd restart --supervisor`")
FROZEN = Cause("frozen", "stopped beating", "look at the stack in the exit record")
STALLED = Cause("stalled", "had work and made no progress", "look at the stack in the exit record")
DESCRIPTORS = Cause("descriptors", "used up its file descriptors", "report it with the exit record")
PROCESSES = Cause("processes", "started processes without end", "report it with the exit record")
GROWN = Cause(
    "grown",
    "took more memory than its share",
    "a new process has it back; if it comes again, report it with the exit record",
    faultless=True,
)
UNRESPONSIVE = Cause("unresponsive", "did not answer /health", "look at the stack in the exit record")

CAUSES = {cause.name: cause for cause in list(globals().values()) if isinstance(cause, Cause)}
#: The names of the ends that requests are not blamed for.
FAULTLESS = frozenset(cause.name for cause in CAUSES.values() if cause.faultless)

BY_SIGNAL: dict[int, Cause] = {
    signal.SIGKILL: KILLED,
    signal.SIGTERM: TERMINATED,
    signal.SIGINT: TERMINATED,
    signal.SIGHUP: TERMINATED,
    signal.SIGQUIT: TERMINATED,
    signal.SIGABRT: ABORTED,
    signal.SIGTRAP: ABORTED,
    signal.SIGSEGV: SEGFAULT,
    signal.SIGBUS: SEGFAULT,
}

#: What MLX, Metal, CUDA and C++ print with a death that nothing can catch, or raise. The first that is found counts.
NATIVE = (
    (IGNORED, re.compile(r"CommandBufferCallbackErrorSubmissionsIgnored")),
    (VICTIM, re.compile(r"CommandBufferCallbackErrorInnocentVictim")),
    (
        WATCHDOG,
        re.compile(
            r"CommandBufferCallbackError(ImpactingInteractivity|Timeout|Hang)\b|execution failed:\s+Impacting Interactivity"
        ),
    ),
    (HANDLES, re.compile(r"\[metal::malloc\] Resource limit \(\d+\) exceeded")),
    (
        MEMORY,
        re.compile(
            r"CommandBufferCallbackErrorOutOfMemory|execution failed:\s+Insufficient Memory"
            r"|\[(metal::)?malloc(_or_wait)?\] (Unable|Attempting) to allocate|std::bad_alloc|\bcuda\w+.* failed: out of memory"
        ),
    ),
)
#: What Python ends with: the last line of a traceback.
PYTHON = (
    (MEMORY, re.compile(r"^MemoryError\b", re.MULTILINE)),
    (DISK, re.compile(r"^OSError: .*(No space left on device|Dis[ck] quota exceeded)", re.MULTILINE)),
    (IMPORT, re.compile(r"^(ImportError|ModuleNotFoundError)\b", re.MULTILINE)),
)


@dataclass(frozen=True)
class End:
    """All that is known of how a process ended.

    `signal`, `code`: as waitpid tells; both None when it never began. `suspicion`: for what mlxd ended it. `intended`: mlxd wanted it gone.
    `starved`: it was killed while memory was short. `words`: what it wrote to its log. `untried`: an engine that never was ready, and into
    which a BLAS of the user's choice was preloaded.
    """

    signal: int | None = None
    code: int | None = None
    suspicion: str = ""
    intended: bool = False
    bye: Bye | None = None
    starved: bool = False
    words: str = ""
    untried: bool = False


#: The ends that a library may be behind that does not fit, or that breaks at the first matrix product.
OF_LIBRARY = (SEGFAULT, ABORTED, SIGNAL, ERROR, IMPORT, EXITED, NO_HELLO)


def judge(end: End) -> tuple[Cause, str]:
    """The cause, and the line of `words` that gave it away, "" when none did."""
    cause, line = evident(end)
    return (BLAS, line) if end.untried and end.bye is None and cause in OF_LIBRARY else (cause, line)


def evident(end: End) -> tuple[Cause, str]:
    """The same by what there is to see, whatever was preloaded."""
    if end.signal is None and end.code is None:
        return SPAWN, ""
    if end.suspicion:
        return CAUSES[end.suspicion], ""
    if end.bye is not None and end.bye.cause == "refused":
        return REFUSED, ""
    if end.intended:
        return STOPPED, ""
    if end.bye is not None and end.bye.cause != "error":
        return CAUSES.get(end.bye.cause, ERROR), ""
    if end.bye is not None:
        return recognised(end.bye.text, NATIVE + PYTHON) or (ERROR, "")
    if end.starved:
        return MEMORY, ""
    if end.signal is not None:
        cause = BY_SIGNAL.get(end.signal, SIGNAL)
        # Who is killed from outside says nothing about it: what is in its log is older.
        return (None if cause.outside else recognised(end.words, NATIVE)) or (cause, "")
    if end.code in (0, EX_CONFIG):
        return (CONFIGURATION if end.code else EXITED), ""
    # Earlier tracebacks were survived.
    return recognised(end.words.rpartition("Traceback (most recent call last)")[2], NATIVE + PYTHON) or (ERROR, "")


def recognised(text: str, signs: tuple[tuple[Cause, re.Pattern[str]], ...]) -> tuple[Cause, str] | None:
    """The first sign that is in `text`, and its line."""
    for cause, sign in signs:
        if found := sign.search(text):
            begin, end = text.rfind("\n", 0, found.start()) + 1, text.find("\n", found.end())
            return cause, text[begin : end if end >= 0 else None].strip()
    return None


# --- the next start ----------------------------------------------------------------------------------------------------------------


def eased(tuning: Tuning, cause: Cause, prefill_tokens: int, max_concurrent: int) -> Tuning:
    """What an engine that died of `cause` gets at its next start. `prefill_tokens`, `max_concurrent`: as configured."""
    if not cause.eases:
        return tuning
    prefill, concurrent, share = tuning.prefill_tokens, tuning.max_concurrent, tuning.cache_share
    if "prefill" in cause.eases:
        prefill = max((prefill or prefill_tokens) // 2, min(LEAST_PREFILL_TOKENS, prefill_tokens))
    if "concurrency" in cause.eases:
        concurrent = max((concurrent or max_concurrent) // 2, 1)
    if "cache" in cause.eases:
        share = share / 2 if share > LEAST_CACHE_SHARE else 0.0
    return Tuning(prefill, concurrent, share, why=cause.what)


SHARES = {
    0.5: "half the prefix cache",
    0.25: "a quarter of the prefix cache",
    0.125: "an eighth of the prefix cache",
    0.0: "no prefix cache",
}


def in_words(tuning: Tuning) -> str:
    """What the tuning takes away: "prefill step 256, 16 requests at once and half the prefix cache"; "" for nothing."""
    parts = []
    if tuning.prefill_tokens is not None:
        parts.append(f"prefill step {tuning.prefill_tokens}")
    if tuning.max_concurrent is not None:
        parts.append(f"{tuning.max_concurrent} requests at once" if tuning.max_concurrent > 1 else "one request at a time")
    if tuning.cache_share in SHARES:
        parts.append(SHARES[tuning.cache_share])
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def remedy(cause: Cause, tuning: Tuning) -> str:
    """What happened and what is done about it, or what a person can do: "ran out of memory; starts again with prefill step 256"."""
    done = [f"with {in_words(tuning)}"] if cause.eases and tuning != Tuning() else []
    done += [f"after a pause of {cause.rest_s:.0f} s"] if cause.rest_s else []
    then = f"starts again {' '.join(done)}" if done else cause.advice
    return f"{cause.what}; {then}" if then else cause.what
