"""What happens next to a child: states, events and actions in one table, and the arithmetic of patience.

Pure: no clock, no processes, no I/O, nothing from mlxd. Numbers become words first (`verdict`), then the table looks the words up.

Two facts are kept per child: what *is* (a State) and what is *wanted* (a bool, the owner's). The wish enters twice: as the events
WANTED and UNWANTED while a process could still change its course, and in `verdict` when it has ended. So the latest wish wins, and a
stop that is overtaken by a start needs no state of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class State(Enum):
    STOPPED = "stopped"  # no process
    STARTING = "starting"  # spawned, has not said hello
    BLANK = "blank"  # said hello, has no orders
    LOADING = "loading"  # has orders, is not ready
    READY = "ready"
    DRAINING = "draining"  # asked to end by itself
    STOPPING = "stopping"  # sent TERM
    KILLING = "killing"  # sent KILL
    BACKOFF = "backoff"  # no process; the next try has a time
    COOLDOWN = "cooldown"  # no process; died too often, one try per cool-down
    HELD = "held"  # no process, and none until the cause is mended
    UNKILLABLE = "unkillable"  # outlived KILL; shown as held: never a second process over it


class Event(Enum):
    # wishes
    WANTED = "wanted"
    UNWANTED = "unwanted"
    RENEWED = "renewed"  # wanted, but by a new process
    HURRIED = "hurried"  # a second signal: the next rung of the ladder, now
    # what a process said
    GREETED = "greeted"
    ORDERED = "ordered"
    READIED = "readied"
    # what the watchers and the clock said
    LATE = "late"  # the state's time is over
    SICK = "sick"
    MENDED = "mended"  # the cause of HELD has ended
    # how a process ended (a Popen that raises has ended, too)
    GONE = "gone"  # and is not wanted
    DIED = "died"  # nothing to wait for
    FAILED = "failed"  # worth another try after a delay
    HOPELESS = "hopeless"  # too many such deaths
    UNFIT = "unfit"  # would fail the same way again


class Action(Enum):
    NOTHING = "nothing"
    SPAWN = "spawn"
    ORDER = "order"
    DRAIN = "drain"
    TERMINATE = "terminate"
    KILL = "kill"
    ANNOUNCE = "announce"


S, E, A = State, Event, Action

ENDS: dict[Event, tuple[State, Action]] = {
    E.GONE: (S.STOPPED, A.NOTHING),
    E.DIED: (S.STARTING, A.SPAWN),
    E.FAILED: (S.BACKOFF, A.NOTHING),
    E.HOPELESS: (S.COOLDOWN, A.NOTHING),
    E.UNFIT: (S.HELD, A.NOTHING),
}

#: States without a process, where a wish decides at once.
WAITING: dict[Event, tuple[State, Action]] = {
    E.WANTED: (S.STARTING, A.SPAWN),
    E.RENEWED: (S.STARTING, A.SPAWN),
    E.UNWANTED: (S.STOPPED, A.NOTHING),
}

#: An absent pair is a bug in mlxd: KeyError.
TRANSITIONS: dict[State, dict[Event, tuple[State, Action]]] = {
    S.STOPPED: {
        **WAITING,
        E.HURRIED: (S.STOPPED, A.NOTHING),
    },
    S.STARTING: {
        **ENDS,
        E.WANTED: (S.STARTING, A.NOTHING),
        E.RENEWED: (S.STOPPING, A.TERMINATE),  # it has the settings and sockets of before
        E.UNWANTED: (S.STOPPING, A.TERMINATE),
        E.HURRIED: (S.KILLING, A.KILL),
        E.GREETED: (S.BLANK, A.NOTHING),
        E.LATE: (S.KILLING, A.KILL),  # no hello
        E.SICK: (S.KILLING, A.KILL),
    },
    S.BLANK: {
        **ENDS,
        E.WANTED: (S.BLANK, A.NOTHING),
        E.RENEWED: (S.DRAINING, A.DRAIN),
        E.UNWANTED: (S.DRAINING, A.DRAIN),
        E.HURRIED: (S.STOPPING, A.TERMINATE),
        E.ORDERED: (S.LOADING, A.ORDER),
        E.SICK: (S.STOPPING, A.TERMINATE),
    },
    S.LOADING: {
        **ENDS,
        E.WANTED: (S.LOADING, A.NOTHING),
        E.RENEWED: (S.STOPPING, A.TERMINATE),
        E.UNWANTED: (S.STOPPING, A.TERMINATE),
        E.HURRIED: (S.KILLING, A.KILL),
        E.READIED: (S.READY, A.ANNOUNCE),
        E.SICK: (S.STOPPING, A.TERMINATE),
    },
    S.READY: {
        **ENDS,
        E.WANTED: (S.READY, A.NOTHING),
        E.RENEWED: (S.DRAINING, A.DRAIN),
        E.UNWANTED: (S.DRAINING, A.DRAIN),
        E.HURRIED: (S.STOPPING, A.TERMINATE),
        E.SICK: (S.STOPPING, A.TERMINATE),
    },
    S.DRAINING: {
        **ENDS,
        E.WANTED: (S.DRAINING, A.NOTHING),  # a new process will come
        E.RENEWED: (S.DRAINING, A.NOTHING),
        E.UNWANTED: (S.DRAINING, A.NOTHING),
        E.HURRIED: (S.STOPPING, A.TERMINATE),
        E.READIED: (S.DRAINING, A.NOTHING),  # its word crossed ours
        E.LATE: (S.STOPPING, A.TERMINATE),
        E.SICK: (S.STOPPING, A.TERMINATE),
    },
    S.STOPPING: {
        **ENDS,
        E.WANTED: (S.STOPPING, A.NOTHING),
        E.RENEWED: (S.STOPPING, A.NOTHING),
        E.UNWANTED: (S.STOPPING, A.NOTHING),
        E.HURRIED: (S.KILLING, A.KILL),
        E.GREETED: (S.STOPPING, A.NOTHING),
        E.READIED: (S.STOPPING, A.NOTHING),
        E.LATE: (S.KILLING, A.KILL),
        E.SICK: (S.STOPPING, A.NOTHING),  # known
    },
    S.KILLING: {
        **ENDS,
        E.WANTED: (S.KILLING, A.NOTHING),
        E.RENEWED: (S.KILLING, A.NOTHING),
        E.UNWANTED: (S.KILLING, A.NOTHING),
        E.HURRIED: (S.KILLING, A.NOTHING),
        E.GREETED: (S.KILLING, A.NOTHING),
        E.READIED: (S.KILLING, A.NOTHING),
        E.LATE: (S.UNKILLABLE, A.NOTHING),
        E.SICK: (S.KILLING, A.NOTHING),
    },
    S.BACKOFF: {
        **WAITING,
        E.WANTED: (S.BACKOFF, A.NOTHING),
        E.HURRIED: (S.BACKOFF, A.NOTHING),
        E.LATE: (S.STARTING, A.SPAWN),
    },
    S.COOLDOWN: {
        **WAITING,
        E.WANTED: (S.COOLDOWN, A.NOTHING),
        E.HURRIED: (S.COOLDOWN, A.NOTHING),
        E.LATE: (S.STARTING, A.SPAWN),
    },
    S.HELD: {
        **WAITING,
        E.WANTED: (S.HELD, A.NOTHING),
        E.HURRIED: (S.HELD, A.NOTHING),
        E.MENDED: (S.STARTING, A.SPAWN),
    },
    S.UNKILLABLE: {
        **ENDS,  # it ended after all
        E.WANTED: (S.UNKILLABLE, A.NOTHING),
        E.RENEWED: (S.UNKILLABLE, A.NOTHING),
        E.UNWANTED: (S.UNKILLABLE, A.NOTHING),
        E.HURRIED: (S.UNKILLABLE, A.NOTHING),
        E.GREETED: (S.UNKILLABLE, A.NOTHING),
        E.READIED: (S.UNKILLABLE, A.NOTHING),
        E.SICK: (S.UNKILLABLE, A.NOTHING),
    },
}

_NO_PROCESS = (S.STOPPED, S.BACKOFF, S.COOLDOWN, S.HELD)
_SPOKEN = (E.GREETED, E.ORDERED, E.READIED)

#: Pairs that cannot arrive: reports name their process, so none is about a process that is not there; orders go to a blank child only.
IMPOSSIBLE: frozenset[tuple[State, Event]] = frozenset(
    [(s, e) for s in _NO_PROCESS for e in (*ENDS, *_SPOKEN, E.SICK)]
    + [(s, E.MENDED) for s in State if s is not S.HELD]
    + [(s, E.LATE) for s in (S.STOPPED, S.BLANK, S.LOADING, S.READY, S.HELD, S.UNKILLABLE)]  # states that last as long as they like
    + [(s, E.ORDERED) for s in State if s is not S.BLANK]
    + [(s, E.GREETED) for s in (S.BLANK, S.LOADING, S.READY, S.DRAINING)]  # one hello per process
    + [(s, E.READIED) for s in (S.STARTING, S.BLANK, S.READY)]
)


def step(state: State, event: Event) -> tuple[State, Action]:
    """The next state and what to do. Raises KeyError for a pair that cannot arrive."""
    return TRANSITIONS[state][event]


class Limits(Protocol):
    """Seconds, and counts: what is asked of `config.Supervisor`, where the values and their reasons are."""

    @property
    def backoff_first_s(self) -> float: ...
    @property
    def backoff_most_s(self) -> float: ...
    @property
    def deaths(self) -> int: ...
    @property
    def window_s(self) -> float: ...
    @property
    def cooldown_s(self) -> float: ...


@dataclass(frozen=True)
class Death:
    """How a process ended, as far as it matters for what comes next.

    `wanted`: its owner still wants one. `ordered`: mlxd ended it for reasons that are not its fault. `unfit`: it said, or its exit status
    says, that it would fail the same way again. `productive`: since READY it finished a request or emitted 16 tokens.
    `pressure`: there is evidence that memory ran out. `outside`: KILL or TERM came from somebody else, without such evidence, or the system had
    no room to start it. `rest_s`: the next try is not before.
    """

    wanted: bool = True
    ordered: bool = False
    unfit: bool = False
    productive: bool = False
    pressure: bool = False
    outside: bool = False
    rest_s: float = 0.0

    @property
    def counts(self) -> bool:
        """Whether this death is held against the child."""
        return not self.ordered and (self.pressure or not (self.productive or self.outside))


#: A productive process emitted at least this many tokens or finished a request.
PRODUCTIVE_TOKENS = 16
#: Next try after a kill from outside that found nothing done yet.
DISTURBED_S = 1.0
#: More deaths than this in a window show as `degraded`, counted or not.
RESTLESS_DEATHS = 10


def verdict(death: Death, counted: list[float], trial: bool, now: float, limits: Limits) -> Event:
    """The word for a death. `counted`: times of the deaths that count, this one included if it does; `trial`: the process was the one try
    of a cool-down, and has not been healthy since."""
    if not death.wanted:
        return E.GONE
    if death.unfit:
        return E.UNFIT
    if death.counts:
        recent = sum(1 for t in counted if t > now - limits.window_s)
        return E.HOPELESS if trial or recent >= limits.deaths else E.FAILED
    if (death.rest_s or (death.outside and not death.productive)) and not death.ordered:
        return E.FAILED
    return E.DIED


def delay(death: Death, event: Event, counted: int, chance: float, limits: Limits) -> float:
    """Seconds until the next try after FAILED or HOPELESS. `counted`: deaths that count since the last healthy spell; `chance` in [0, 1)
    spreads the delay by +-20 %, so that neighbours on one memory pool do not come back together."""
    if event is E.HOPELESS:
        return limits.cooldown_s
    if not death.counts:
        return max(DISTURBED_S, death.rest_s)
    grown = limits.backoff_first_s * 2.0 ** min(max(counted - 1, 0), 30)
    return max(min(grown, limits.backoff_most_s) * (0.8 + 0.4 * chance), death.rest_s)


class Health(Enum):
    """What the answers to `GET /health` say of the server."""

    WELL = "well"
    DOUBTFUL = "doubtful"  # missed, but not often enough, or it is merely saturated
    SICK = "sick"


#: A server that answers now and then is replaced for that once in so long; the next may be no better.
FLAPPING_S = 300.0


def health(answers: list[bool], misses: int, beat_age_s: float, lag_s: float, most_lag_s: float, rested_s: float) -> Health:
    """`answers`: the last polls, oldest first. `misses` in a row are too many, and so are `misses` of the last five, if for that no server was
    replaced in the last `rested_s`. A server whose beats are fresh and whose loop lag is small is saturated, not dead: a 2 s probe deadline
    alone cost one site 8 false restarts a day."""
    if not answers or answers[-1]:
        return Health.WELL
    saturated = beat_age_s < 3.0 and lag_s < most_lag_s
    flapping = answers[-5:].count(False) >= misses and rested_s >= FLAPPING_S
    return Health.SICK if (is_silent(answers, misses) or flapping) and not saturated else Health.DOUBTFUL


def is_silent(answers: list[bool], misses: int) -> bool:
    """Whether the last `misses` polls were all in vain."""
    return len(answers) >= misses and not any(answers[-misses:])
