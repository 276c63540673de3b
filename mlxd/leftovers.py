"""What an earlier supervisor left behind when it was killed: remembered in state.json, proven ours, ended before anything new begins.

A child notices within milliseconds that its link has closed and is gone 5 s later at most. One that cannot notice (stopped, the interpreter
lock held in native code) would keep its memory, 20 GB perhaps, so the next start looks for it. The *lease* is the proof without numbers:
every child inherits one locked descriptor, so the lock is free exactly when the last of them has ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil

from mlxd import lock, paths
from mlxd.errors import MlxdError

log = logging.getLogger(__name__)


class Leftover(msgspec.Struct):
    """Enough to prove later that a process is this child. `identity`: see `start_identity`."""

    pid: int
    identity: float
    nonce: str
    name: str


class Process(msgspec.Struct, frozen=True):
    """One process for ever: its number, its start (see `start_identity`) and its boot."""

    pid: int
    identity: float
    boot: str


class Memory(msgspec.Struct):
    """state.json."""

    boot: str
    children: list[Leftover]
    supervisor: Process | None = None


def memory_of(children: list[Leftover], boot: str) -> bytes:
    """state.json: for the next supervisor, in case this one is killed, and for `mlxd recover`, in case it hangs."""
    identity = start_identity(os.getpid())
    supervisor = Process(os.getpid(), identity, boot) if identity is not None else None
    return msgspec.json.encode(Memory(boot, children, supervisor))


def supervisor_of(where: paths.Paths) -> Process | None:
    """The supervisor that wrote state.json, if it still lives."""
    try:
        memory = msgspec.json.decode(paths.read_small(where.state, 1024 * 1024) or b"", type=Memory)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return memory.supervisor if memory.supervisor is not None and lives(memory.supervisor) else None


def process_of(pid: int) -> Process | None:
    """None when there is none."""
    identity = start_identity(pid)
    return Process(pid, identity, boot_id()) if identity is not None else None


def lives(process: Process) -> bool:
    return process.pid > 1 and process_of(process.pid) == process


def end(process: Process, term_s: float, kill_s: float) -> bool:
    """TERM, then KILL, to this one and no other; whether it has ended. Blocks."""
    for number, patience_s in ((signal.SIGTERM, term_s), (signal.SIGKILL, kill_s)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if lives(process):
                os.kill(process.pid, number)
                os.kill(process.pid, signal.SIGCONT)
        end = time.monotonic() + patience_s
        while lives(process):
            if time.monotonic() > end:
                break
            time.sleep(0.02)
        else:
            return True
    return False


def recall(where: paths.Paths, boot: str) -> list[Leftover]:
    """The children of an earlier run that still live. A number from another boot is nobody's; a damaged file is kept aside."""
    data = paths.read_small(where.state, 1024 * 1024)
    if data is None:
        return []
    try:
        memory = msgspec.json.decode(data, type=Memory)
    except (msgspec.DecodeError, UnicodeDecodeError):
        log.warning("the state file is damaged; kept as %s.bad", where.state.name)
        with contextlib.suppress(OSError):
            where.state.replace(where.state.with_suffix(".json.bad"))
        return []
    return [left for left in memory.children if is_ours(left)] if memory.boot == boot else []


def sweep(found: list[Leftover], term_s: float, kill_s: float) -> None:
    """End them: TERM, then KILL, to each group. Blocks: nothing else may begin before."""
    for number, patience_s in ((signal.SIGTERM, term_s), (signal.SIGKILL, kill_s)):
        for left in found:
            log.warning("%s (pid %d) of an earlier run is ended by %s", left.name, left.pid, number.name)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(left.pid, number)
                os.killpg(left.pid, signal.SIGCONT)
        end = time.monotonic() + patience_s
        while found and time.monotonic() < end:
            time.sleep(0.02)
            found = [left for left in found if is_ours(left)]


def is_ours(left: Leftover) -> bool:
    """Whether the process with this number is the very one: the same start, and our nonce in its environment. A number alone proves
    nothing: it is reused. 1 and less are never a child's, and a signal to 0, or to the group of 1, goes to many."""
    return left.pid > 1 and start_identity(left.pid) == left.identity and origin(left.pid).get("nonce") == left.nonce


def origin(pid: int) -> dict[str, Any]:
    """The settings that a child of mlxd was started with, and with it whatever it has started; {} of any other process."""
    try:
        settings = json.loads(psutil.Process(pid).environ().get("MLXD_CHILD", ""))
    except (psutil.Error, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def take_lease(where: paths.Paths, patience_s: float) -> int:
    """The lease, for our children to inherit. Raises MlxdError when a child of an earlier run still lives after `patience_s`, or when
    the file is none. Blocks."""
    try:
        return lock.flocked(where.lease, patience_s)
    except BlockingIOError:
        raise MlxdError("a process of an earlier run still lives; end it, or reboot if it cannot be ended") from None
    except OSError as error:
        raise MlxdError(f"cannot open {where.lease}: {error.strerror}; remove what is there") from error


def start_identity(pid: int) -> float | None:
    """When the kernel started this process, in its own units; None when there is none. With the boot and the number it names one process for
    ever: Linux tells clock ticks since boot, macOS a time that does not move with NTP."""
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        fields = stat.rpartition(b")")[2].split()  # the name, in brackets, may hold blanks
        return None if fields[0] == b"Z" else float(fields[19])
    try:
        # The public create_time() is corrected by the wall clock and moves with it (psutil 7.2, _psosx.py).
        return float(psutil.Process(pid)._proc.create_time(monotonic=True))
    except psutil.Error:
        return None


def boot_id() -> str:
    """Names this boot of the machine."""
    if sys.platform == "linux":
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    import subprocess

    ran = subprocess.run(["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, text=True, timeout=5, check=False)
    return ran.stdout.strip()
