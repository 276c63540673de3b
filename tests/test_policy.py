"""The table is total, and the arithmetic is right: tested with numbers, no process in sight."""

from __future__ import annotations

import pytest

from mlxd import policy
from mlxd.config import Supervisor
from mlxd.policy import Action, Death, Event, Health, State

LIMITS = Supervisor()


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_every_pair_is_decided_or_impossible(state: State, event: Event) -> None:
    assert (event in policy.TRANSITIONS[state]) != ((state, event) in policy.IMPOSSIBLE)


def test_a_process_is_spawned_only_where_there_is_none() -> None:
    alive = {
        State.STARTING,
        State.BLANK,
        State.LOADING,
        State.READY,
        State.DRAINING,
        State.STOPPING,
        State.KILLING,
        State.UNKILLABLE,
    }
    for state in alive:
        for event, (_, action) in policy.TRANSITIONS[state].items():
            assert action is not Action.SPAWN or event is Event.DIED, (state, event)


def test_every_spawn_leads_to_starting_and_nothing_else_does() -> None:
    for state, row in policy.TRANSITIONS.items():
        for event, (then, action) in row.items():
            if action is Action.SPAWN:
                assert then is State.STARTING
            elif then is State.STARTING:
                assert state is State.STARTING, (state, event)


def test_the_ladder_ends_in_unkillable_never_in_a_second_process() -> None:
    state, actions = State.READY, []
    for event in (Event.UNWANTED, Event.LATE, Event.LATE, Event.LATE):
        state, action = policy.step(state, event)
        actions.append(action)
    assert (state, actions) == (State.UNKILLABLE, [Action.DRAIN, Action.TERMINATE, Action.KILL, Action.NOTHING])


def test_a_wish_during_a_stop_waits_for_the_end_and_is_then_kept() -> None:
    state, action = policy.step(State.STOPPING, Event.WANTED)
    assert (state, action) == (State.STOPPING, Action.NOTHING)
    event = policy.verdict(Death(wanted=True, ordered=True), [], False, 0.0, LIMITS)
    assert policy.step(state, event) == (State.STARTING, Action.SPAWN)


def test_a_stop_during_backoff_is_immediate() -> None:
    assert policy.step(State.BACKOFF, Event.UNWANTED) == (State.STOPPED, Action.NOTHING)
    assert policy.step(State.COOLDOWN, Event.UNWANTED) == (State.STOPPED, Action.NOTHING)


@pytest.mark.parametrize(
    ("death", "counts", "word"),
    [
        (Death(wanted=False), True, Event.GONE),
        (Death(wanted=False, unfit=True), True, Event.GONE),
        (Death(unfit=True), True, Event.UNFIT),
        (Death(productive=True), False, Event.DIED),
        (Death(productive=True, pressure=True), True, Event.FAILED),
        (Death(), True, Event.FAILED),
        (Death(outside=True), False, Event.FAILED),
        (Death(outside=True, productive=True), False, Event.DIED),
        (Death(ordered=True), False, Event.DIED),
    ],
)
def test_which_deaths_count(death: Death, counts: bool, word: Event) -> None:
    assert death.counts is counts
    assert policy.verdict(death, [0.0], False, 0.0, LIMITS) is word


def test_a_slow_loop_of_two_minutes_is_hopeless_by_the_fifth_death() -> None:  # F07; omlx#2184 made 233 starts so
    counted: list[float] = []
    words = []
    for n in range(5):
        counted.append(n * 120.0)
        words.append(policy.verdict(Death(), counted, False, n * 120.0, LIMITS))
    assert words == [Event.FAILED] * 4 + [Event.HOPELESS]


def test_deaths_further_apart_than_the_window_are_never_hopeless() -> None:
    counted: list[float] = []
    for n in range(50):
        counted.append(n * 300.0)
        assert policy.verdict(Death(), counted, False, n * 300.0, LIMITS) is Event.FAILED


def test_the_one_try_of_a_cooldown_has_no_second_chance() -> None:
    assert policy.verdict(Death(), [1e6], True, 1e6, LIMITS) is Event.HOPELESS
    assert policy.verdict(Death(productive=True), [], True, 1e6, LIMITS) is Event.DIED


def test_the_delay_doubles_to_a_minute_and_spreads_by_a_fifth() -> None:
    middle = [policy.delay(Death(), Event.FAILED, n, 0.5, LIMITS) for n in range(1, 10)]
    assert middle == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert policy.delay(Death(), Event.FAILED, 1, 0.0, LIMITS) == pytest.approx(0.4)
    assert policy.delay(Death(), Event.FAILED, 1, 0.999999, LIMITS) == pytest.approx(0.6, abs=1e-5)
    assert policy.delay(Death(outside=True), Event.FAILED, 7, 0.5, LIMITS) == 1.0
    assert policy.delay(Death(), Event.HOPELESS, 7, 0.5, LIMITS) == 300.0


@pytest.mark.parametrize(
    ("answers", "beat_age_s", "lag_s", "expected"),
    [
        ([], 99.0, 99.0, Health.WELL),
        ([True], 99.0, 99.0, Health.WELL),
        ([True, False, False], 9.0, 0.0, Health.DOUBTFUL),
        ([False, False, False], 9.0, 0.0, Health.SICK),
        ([False, False, False], 0.5, 0.01, Health.DOUBTFUL),  # saturated
        ([False, False, False], 0.5, 5.0, Health.SICK),  # beats come, but the loop hardly turns
        ([False, True, False, True, False], 9.0, 0.0, Health.SICK),  # flapping: 3 of 5
        ([False, False, False, True], 9.0, 0.0, Health.WELL),
    ],
)
def test_sick_is_told_from_saturated(answers: list[bool], beat_age_s: float, lag_s: float, expected: Health) -> None:
    assert policy.health(answers, 3, beat_age_s, lag_s, 1.0, policy.FLAPPING_S) is expected


def test_a_flapping_server_is_replaced_once_in_five_minutes_and_a_silent_one_at_once() -> None:
    flapping, silent = [False, True, False, True, False], [True, False, False, False]
    assert policy.health(flapping, 3, 9.0, 0.0, 1.0, 299.0) is Health.DOUBTFUL
    assert policy.health(flapping, 3, 9.0, 0.0, 1.0, 300.0) is Health.SICK
    assert policy.health(silent, 3, 9.0, 0.0, 1.0, 0.0) is Health.SICK
    replaced, rested_s, answers = 0, float("inf"), [True]
    for n in range(720):  # an hour of polls, every other one in vain; the next server is no better
        answers = [*answers[-4:], n % 2 == 0]
        if policy.health(answers, 3, 9.0, 0.0, 1.0, rested_s) is Health.SICK:
            replaced, rested_s, answers = replaced + 1, 0.0, []
        rested_s += 5.0
    assert replaced == 12
