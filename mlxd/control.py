"""The control protocol, the asking end: one JSON line asks, one JSON line answers, over a private unix socket.

Plain blocking code without asyncio, so that `mlxd status` stays quick. The answering end is `desk`.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from mlxd.errors import MlxdError, NotRunning

#: An answer is a status with 50 exit records at most.
MAX_ANSWER_BYTES = 4 * 1024 * 1024
DEADLINE_S = 5.0


class Declined(MlxdError):
    """The daemon's own no."""


def ask(path: Path, verb: str, timeout_s: float = DEADLINE_S, **arguments: Any) -> dict[str, Any]:
    """The daemon's answer. Raises NotRunning when nobody listens, Declined when it says no, MlxdError when it does not answer in time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            raise NotRunning("mlxd is not running; start it with `mlxd start`") from error
        except OSError as error:
            raise MlxdError(f"cannot reach mlxd at {path}: {error.strerror or error}") from error
        try:
            sock.sendall(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
            with sock.makefile("rb") as file:
                answer = file.readline(MAX_ANSWER_BYTES)
        except TimeoutError as error:
            silent = MlxdError(f"mlxd did not answer `{verb}` within {timeout_s:g} s; `mlxd recover` wakes or replaces it")
            silent.exit_status = 4
            raise silent from error
        except ConnectionError as error:
            raise NotRunning("mlxd ended while it was asked") from error
    if not answer.endswith(b"\n"):
        raise NotRunning("mlxd ended while it was asked")
    told: dict[str, Any] = json.loads(answer)
    if "error" in told:
        refusal = Declined(told["error"])
        refusal.exit_status = told.get("exit_status", 1)
        raise refusal
    return told
