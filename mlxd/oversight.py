"""What the server asks of its supervisor, for those who look at it: how the processes are, and how the last ones ended.

Asked as the commands ask, over the control socket, and only when somebody looks. Whoever looks at the same time shares an answer.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from mlxd import control
from mlxd.errors import MlxdError

#: A supervisor that hands over to the next one may need longer; who looks is told that it does not answer, and looks again.
ANSWER_S = 1.0
#: An answer is good for so long: four times a second is often enough to look.
FRESH_S = 0.2


class Oversight:
    """`place`: of the control socket; "": there is no supervisor."""

    def __init__(self, place: str):
        self.place = Path(place) if place else None
        self.asking = asyncio.Lock()
        self.answers: dict[str, tuple[float, dict[str, Any] | None]] = {}

    async def status(self) -> dict[str, Any] | None:
        """As `mlxd status --json` has it, without Ollama and the last exit, which `exits` has; None: nobody answers."""
        told = await self.ask("status")
        return told and {key: value for key, value in told.items() if key != "last_exit"}

    async def exits(self) -> list[dict[str, Any]]:
        """The newest exit records, newest first; none when nobody answers."""
        return list((await self.ask("exits") or {"exits": []})["exits"])

    async def ask(self, verb: str) -> dict[str, Any] | None:
        if self.place is None:
            return None
        async with self.asking:
            asked_at, answer = self.answers.get(verb, (0.0, None))
            if time.monotonic() - asked_at >= FRESH_S:
                try:
                    answer = await asyncio.to_thread(control.ask, self.place, verb, ANSWER_S)
                except MlxdError:
                    answer = None
                self.answers[verb] = time.monotonic(), answer
            return answer
