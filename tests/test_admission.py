"""The queue: slots, seats, order, time. Real coroutines on a real loop, no server."""

from __future__ import annotations

import asyncio

import pytest

from mlxd.admission import BUSY, Admission, Priority
from mlxd.errors import Refused


async def hold(house: Admission, priority: Priority, name: str, order: list[str], release: asyncio.Event) -> None:
    with house.enter(priority) as ticket:
        await ticket.admitted()
        order.append(name)
        await release.wait()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_high_goes_before_normal_before_low_and_within_one_the_first_come_is_first() -> None:
    async def run() -> list[str]:
        house, order, release = Admission(1, 10, 60), [], asyncio.Event()
        comers = [
            ("first", Priority.LOW),
            ("low", Priority.LOW),
            ("a", Priority.NORMAL),
            ("high", Priority.HIGH),
            ("b", Priority.NORMAL),
        ]
        tasks = []
        for name, priority in comers:
            tasks.append(asyncio.create_task(hold(house, priority, name, order, release)))
            await settle()
        assert (house.running, house.waiting) == (1, 4)
        release.set()
        await asyncio.gather(*tasks)
        assert (house.running, house.waiting) == (0, 0)
        return order

    assert asyncio.run(run()) == ["first", "high", "a", "b", "low"]


def test_a_full_house_refuses_in_ollamas_words_and_says_when_to_come_again() -> None:
    async def run() -> None:
        house, release = Admission(1, 1, 60), asyncio.Event()
        tasks = [asyncio.create_task(hold(house, Priority.NORMAL, "", [], release)) for _ in range(2)]
        await settle()
        with pytest.raises(Refused) as refused:
            house.enter(Priority.HIGH)
        assert (refused.value.status, refused.value.message) == (503, BUSY)
        assert refused.value.retry_s
        release.set()
        await asyncio.gather(*tasks)
        house.enter(Priority.LOW)

    asyncio.run(run())


def test_waiting_has_an_end() -> None:
    async def run() -> None:
        house, release = Admission(1, 5, 0.05), asyncio.Event()
        holder = asyncio.create_task(hold(house, Priority.NORMAL, "", [], release))
        await settle()
        with pytest.raises(Refused) as refused:
            await hold(house, Priority.NORMAL, "", [], release)
        assert refused.value.status == 503
        assert (house.running, house.waiting) == (1, 0)
        release.set()
        await holder

    asyncio.run(run())


def test_one_who_gives_up_loses_no_slot_wherever_he_stands() -> None:
    async def run() -> None:
        house, order, release = Admission(2, 50, 60), [], asyncio.Event()
        tasks = [asyncio.create_task(hold(house, Priority.NORMAL, str(i), order, release)) for i in range(20)]
        await settle()
        for task in tasks[1:20:2]:  # one that runs and many that wait
            task.cancel()
        release.set()  # slots are handed on in the same breath as the waiting give up
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order[:2] == ["0", "1"]
        assert set(order[2:]) == {str(i) for i in range(2, 20, 2)}
        assert (house.running, house.waiting) == (0, 0)
        assert not any(house.queues.values())

    asyncio.run(run())
