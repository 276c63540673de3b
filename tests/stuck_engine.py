"""The real engine on models of the Llama family, whose steps are slow, and hang for as long as the file MLXD_FAKE_STUCK names is there.

So hangs a Metal call: the model thread waits with the interpreter free, and the beats go on.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from mlx_lm.models import llama

from mlxd.engine.__main__ import main

STUCK = Path(os.environ["MLXD_FAKE_STUCK"])
compute = llama.Model.__call__


def hang(*args: Any, **kwargs: Any) -> Any:
    time.sleep(0.02)
    while STUCK.exists():
        time.sleep(0.01)
    return compute(*args, **kwargs)


llama.Model.__call__ = hang

if __name__ == "__main__":
    main()
