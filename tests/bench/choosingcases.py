"""What goes wrong in the bench of choosing, and who chooses. Pure, but for what is done to a `Run`.

Ten endpoints, each with WORKERS that sleep for as long as a request is work; the mean is WORK.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

WORKERS = 4
WORK = 0.02  # seconds
SPREAD = 0.5  # sigma of its logarithm
WARM = 0.5  # seconds before things go wrong; only what is asked afterwards counts
DEADLINE = 1.5  # seconds that a client waits; a SYN is sent again after one
USUAL, SPARE, FAR = range(10), range(10, 20), range(20, 25)
BAD = 3  # the endpoint that turns bad
SLOWER = 10
FAR_DELAY = 0.025  # seconds, one way
ZONES = {**dict.fromkeys(USUAL, "zone-1"), **dict.fromkeys(FAR, "zone-2")}
CANARY_WEIGHT = 10  # of 10 × 100 + 10: 0.99 %


@dataclass(frozen=True, slots=True)
class Arm:
    """Who chooses. Without annotations it is kube-proxy."""

    name: str
    annotations: tuple[tuple[str, str], ...] = ()

    @property
    def is_kube_proxy(self) -> bool:
        return not self.annotations


def by(algorithm: str) -> Arm:
    return Arm(algorithm, (("pointsman.io/algorithm", algorithm),))


def ejecting(arm: Arm) -> Arm:
    return Arm(f"{arm.name}, ejection", (*arm.annotations, ("pointsman.io/outlier-ejection", "on")))


KUBE_PROXY = Arm("kube-proxy")
RANDOM, ROUND_ROBIN, LEAST, EWMA, MAGLEV = map(
    by, ("random", "round-robin", "least-connections", "peak-ewma", "maglev")
)
#: What noise is: the same twice.
AGAIN = replace(RANDOM, name="random, again")
SAME_ZONE = Arm(
    "least-connections, same zone",
    (*LEAST.annotations, ("pointsman.io/same-zone-connections", "6")),
)
ALGORITHMS = (KUBE_PROXY, RANDOM, ROUND_ROBIN, LEAST, EWMA, MAGLEV)
#: Without maglev, which is judged where nothing else is wrong.
SEEING = ALGORITHMS[:-1]
EJECTING = tuple(map(ejecting, (RANDOM, LEAST, EWMA)))


class Run(Protocol):
    """What a case may do while requests come."""

    def say(self, command: str) -> None:
        """To the endpoints' program, see choosing.c."""
        ...

    def publish(self, members: Sequence[int]) -> None:
        """The Service has these endpoints from now on."""
        ...

    def drop(self, endpoint: int) -> None:
        """It answers nobody any more, and sends nothing."""
        ...


#: Yields at which second it goes on.
Happens = Callable[[Run], Iterator[float]]


def nothing(run: Run) -> Iterator[float]:
    yield from ()


def slow(run: Run) -> Iterator[float]:
    yield WARM
    run.say(f"slow {BAD} {SLOWER}")


def hasty(run: Run) -> Iterator[float]:
    yield WARM
    run.say(f"slow {BAD} 0")


def refusing(run: Run) -> Iterator[float]:
    yield WARM
    run.say(f"close {BAD}")


def dropping(run: Run) -> Iterator[float]:
    yield WARM
    run.drop(BAD)


def rolling(run: Run) -> Iterator[float]:
    """One after the other: a new one joins and an old one leaves in one change, and stops to
    accept 100 ms later."""
    members = list(USUAL)
    for number, (old, new) in enumerate(zip(USUAL, SPARE, strict=True)):
        yield WARM + 0.3 * number
        members[members.index(old)] = new
        run.publish(members)
        yield WARM + 0.3 * number + 0.1
        run.say(f"close {old}")


def scale_out(run: Run) -> Iterator[float]:
    yield WARM
    run.publish(USUAL)


@dataclass(frozen=True, slots=True)
class Case:
    """`members` at the start; `able` of them (in sum, while it is counted) carry `busy` of what
    they can. `compared` are those whose connections are compared. `stay`: so many connections,
    which begin within a second and stay for all of it. `canary` has CANARY_WEIGHT, the others 100.
    `warm`: seconds that do not count."""

    title: str
    arms: tuple[Arm, ...]
    seconds: float = 3  # that count
    happens: Happens = nothing
    members: Sequence[int] = USUAL
    able: float = 10
    busy: float = 0.7
    compared: Sequence[int] = USUAL
    closed: bool = False
    zones: bool = False
    stay: int = 0
    canary: int | None = None
    rounds: int = 1  # in each round of all cases
    warm: float = WARM

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.busy * self.able * WORKERS / WORK


OTHERS = tuple(endpoint for endpoint in USUAL if endpoint != BAD)
CASES = {
    "equal": Case("all equal", (*ALGORITHMS, AGAIN, ejecting(LEAST)), seconds=4, rounds=2),
    "closed": Case(
        "all equal, 40 clients that ask again at once",
        SEEING,
        seconds=2,
        busy=1.2,  # more than is asked for
        closed=True,
    ),
    "slow": Case(
        "one of ten is ten times slower",
        (*SEEING, *EJECTING[:2]),
        happens=slow,
        able=9 + 1 / SLOWER,
    ),
    "hasty": Case("one of ten answers at once, as who fails does", SEEING, happens=hasty, able=9),
    "refusing": Case(
        "one of ten refuses",
        (*SEEING, *EJECTING),
        happens=refusing,
        able=9,
        compared=OTHERS,
    ),
    "dropping": Case(
        "one of ten drops all packets",
        (*SEEING, *EJECTING),
        seconds=4,
        happens=dropping,
        able=9,
        compared=OTHERS,
    ),
    "rolling": Case(
        "a rolling update, all in 3 s",
        (KUBE_PROXY, RANDOM, ROUND_ROBIN, LEAST, ejecting(RANDOM), ejecting(LEAST)),
        seconds=4,
        happens=rolling,
        compared=(),
    ),
    "scale-out": Case(
        "from five endpoints, 90 % busy, to ten",
        SEEING,
        happens=scale_out,
        members=USUAL[:5],
        able=5,
        busy=0.9,
    ),
    "far": Case(
        "five of ten are 50 ms away",
        (*SEEING, SAME_ZONE),
        members=(*USUAL[:5], *FAR),
        busy=0.35,
        compared=(*USUAL[:5], *FAR),
        zones=True,
    ),
    "canary": Case(
        "a canary of 1 %",
        ALGORITHMS,
        members=(*USUAL, SPARE[0]),
        able=10,
        canary=SPARE[0],
    ),
    "stay": Case(
        "400 connections that stay open",
        ALGORITHMS,
        seconds=1.4,  # less than clients wait
        stay=400,
        warm=0,
    ),
}


def requests(case: Case, seed: int) -> list[tuple[int, int]]:
    """When and how much work, µs; the same for every arm of a round."""
    random = Random(seed)
    if case.stay:
        each = int(1e6 / case.stay)
        return [(each * i, int(case.seconds * 1e6) - each * i) for i in range(case.stay)]
    found, now = [], 0.0
    while (now := now + random.expovariate(case.rate)) < case.warm + case.seconds:
        work = WORK * random.lognormvariate(-SPREAD * SPREAD / 2, SPREAD)
        found.append((int(now * 1e6), int(work * 1e6)))
    return found
