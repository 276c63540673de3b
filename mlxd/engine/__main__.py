"""`python -m mlxd.engine`: an engine process, as the supervisor spawns it."""

from __future__ import annotations

import asyncio
import os

from mlxd.link import become_child, child_settings


def main() -> None:
    settings = child_settings()
    become_child(settings)
    # Before the libraries are imported, which read these then. Downloads are the puller's job.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from mlxd.engine.control import Engine  # 0.9 s: a blank engine has it all behind it when it says hello

    asyncio.run(Engine(settings).run())


if __name__ == "__main__":
    main()
