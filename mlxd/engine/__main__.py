"""`python -m mlxd.engine`: an engine process, as the supervisor spawns it."""

from __future__ import annotations

import asyncio

from mlxd.engine import libraries
from mlxd.link import become_child, child_settings


def main() -> None:
    settings = child_settings()
    become_child(settings)
    libraries.prepare()
    from mlxd.engine.control import Engine  # 0.9 s: a blank engine has it all behind it when it says hello

    asyncio.run(Engine(settings).run())


if __name__ == "__main__":
    main()
