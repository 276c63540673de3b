"""Admission: how many requests run at once, who waits, who goes first.

Owns slots and the queue. Does not know what a request is, nor what an engine is.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections import deque

from mlxd.errors import Refused

#: Ollama's own words (two blanks included): clients look for them.
BUSY = "server busy, please try again.  maximum pending requests exceeded"


class Priority(enum.IntEnum):
    """`X-Priority`; a smaller number goes first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class Admission:
    """`slots` requests run, at most `seats` wait; within one priority the first come is the first served."""

    def __init__(self, slots: int, seats: int, wait_s: float):
        self.slots = slots
        self.seats = seats
        self.wait_s = wait_s
        self.running = 0
        self.waiting = 0
        self.queues: dict[Priority, deque[asyncio.Future[None]]] = {priority: deque() for priority in Priority}

    @property
    def full(self) -> bool:
        """A request that came now would be refused."""
        return self.running + self.waiting >= self.slots + self.seats

    def enter(self, priority: Priority) -> Ticket:
        """A place in the house, without a slot yet. Raises Refused when the house is full."""
        if self.full:
            raise Refused(503, BUSY, code="queue_full", retry_s=1)
        return Ticket(self, priority)

    def give(self) -> None:
        """Hand free slots to the first in line."""
        for queue in self.queues.values():  # in order of Priority
            while queue and self.running < self.slots:
                turn = queue.popleft()
                if not turn.done():  # done: its request gave up
                    self.running += 1
                    turn.set_result(None)


class Ticket:
    """A request's place: waiting from its birth, running after `admitted`, gone after `leave`. A context manager that leaves."""

    def __init__(self, house: Admission, priority: Priority):
        self.house = house
        self.priority = priority
        self.runs = False
        self.gone = False
        house.waiting += 1

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Give the place up; nothing happens the second time."""
        if self.gone:
            return
        self.gone = True
        if self.runs:
            self.house.running -= 1
            self.house.give()
        else:
            self.house.waiting -= 1

    async def admitted(self) -> None:
        """Wait for a slot. Raises Refused after the house's `wait_s`."""
        house = self.house
        turn = asyncio.get_running_loop().create_future()
        house.queues[self.priority].append(turn)
        house.give()
        try:
            async with asyncio.timeout(house.wait_s):
                await turn
        except TimeoutError:
            raise Refused(
                503, f"no slot became free within {house.wait_s:g} s; please try again", code="queue_timeout", retry_s=5
            ) from None
        finally:
            if turn.done() and not turn.cancelled():
                self.runs = True  # also when cancelled or late just as the turn came: `leave` gives the slot on
                house.waiting -= 1
            else:
                with contextlib.suppress(ValueError):  # `give` may have passed it over already
                    house.queues[self.priority].remove(turn)
