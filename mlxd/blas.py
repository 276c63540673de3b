"""The BLAS under MLX on Linux: which library engines have preloaded in place of MLX's own matrix products. Nothing else gets it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mlxd.errors import ConfigError

STOCK, AUTO = "stock", "auto"
#: Where Debian's and Ubuntu's libopenblas0-pthread puts it. By this machine's own architecture: there may be others beside it.
OPENBLAS = Path(f"/usr/lib/{os.uname().machine}-linux-gnu/openblas-pthread/libopenblas.so.0")
ELF = b"\x7fELF"


def library(setting: str) -> str:
    """What to preload; "" for nothing. `setting`: of engine.blas."""
    if setting == STOCK or sys.platform != "linux":
        return ""
    if setting == AUTO:
        return str(OPENBLAS) if OPENBLAS.is_file() else ""
    return setting


def check(setting: str, place: str) -> None:
    """Raises ConfigError unless it is a word of ours or a library that could be preloaded; `place`: where it is set. The linker itself says
    no more of what it cannot preload than a line in the engine's log, and goes on without."""
    if setting in (STOCK, AUTO):
        return
    if sys.platform != "linux":
        raise ConfigError(f"{place}: libraries are preloaded on Linux alone; write stock")
    path = Path(setting)
    if not path.is_absolute() or set(setting) & set(": \t\n"):
        raise ConfigError(f"{place} must be stock, auto or the path of a library, from / on and without blanks, not {setting!r}")
    try:
        with path.open("rb") as file:
            head = file.read(len(ELF))
    except OSError as error:
        raise ConfigError(f"{place}: cannot read {setting}: {error.strerror}; install that library, or write stock") from None
    if head != ELF:
        raise ConfigError(f"{place}: {setting} is no shared library; write stock, auto or the path of one")
