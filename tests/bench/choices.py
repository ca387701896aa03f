"""The rules of bpf/choose.h and bpf/outcome.h in Python, for the simulation. Pure.

Functions and fields are named as in the C, to be read beside it. Left out: weights and zones, which
lay down shares instead of finding them out. Times are ns, connect times µs.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pointsman import abi

_constants = abi.constants()
RANDOM, ROUND_ROBIN, LEAST_CONNECTIONS, PEAK_EWMA, MAGLEV = (
    _constants[f"ALGORITHM_{name}"]
    for name in ("RANDOM", "ROUND_ROBIN", "LEAST_CONNECTIONS", "PEAK_EWMA", "MAGLEV")
)
UNTIL_TRIAL = _constants["UNTIL_TRIAL"]
WINDOW_FULL = _constants["WINDOW_FULL"]

SECOND = 1_000_000_000
DRAWS = 4
ASKED = 20
FADE = 8 * SECOND
SLOW_US = 1_000_000
MAX_LATENCY_US = 1 << 22
NEVER = (1 << 64) - 1
AT_ONCE = 0
NO, IF_NEED_BE, YES = range(3)


@dataclass(slots=True)
class Load:
    """What one node knows of an endpoint; `window` as its three counts."""

    open: int = 0
    latency: int = 0
    measured: int = 0
    until: int = 0
    connects: int = 0
    failures: int = 0
    ejections: int = 0
    streak: int = 0


@dataclass(slots=True)
class Policy:
    """How one node deals with the endpoints; the usual numbers of ejection. `ejected` counts."""

    most: int
    max_connections: int = 0
    streak: int = 5
    percent: int = 50
    volume: int = 20
    shortest: int = 10 * SECOND
    longest: int = 300 * SECOND
    trial: int = 3 * SECOND
    ejected: int = 0


#: An endpoint of which nothing is known: only to be read.
UNKNOWN = Load()


@dataclass(slots=True)
class Node:
    """What one node has of a service port. `random` gives numbers from 0 to below 1; `endpoints`
    are those of its set, whatever they are to the caller; `table` is for MAGLEV."""

    algorithm: int
    endpoints: Sequence[int]
    random: Callable[[], float]
    policy: Policy | None = None
    table: array[int] | None = None
    turn: int | None = None
    load: list[Load] = field(init=False)

    def __post_init__(self) -> None:
        self.load = [UNKNOWN] * len(self.endpoints)

    def load_of(self, place: int) -> Load:
        """To be written to."""
        known = self.load[place]
        if known is UNKNOWN:
            known = self.load[place] = Load()
        return known


# ---- choose.h: all give the place of an endpoint in the set


def draw(node: Node) -> int:
    return int(node.random() * len(node.load))


def next_in_turn(node: Node) -> int:
    """Begun anywhere, so that nodes do not go on alike."""
    if node.turn is None:
        node.turn = int(node.random() * (1 << 62)) | 1
    turn = node.turn
    node.turn += 1
    return turn % len(node.load)


def mix(x: int) -> int:
    """mix() of atomic.h."""
    x = x * 0xFF51AFD7ED558CCD & NEVER
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & NEVER
    return x ^ x >> 33


def by_table(node: Node, client: int) -> int:
    hash32 = mix(client ^ 1 << 32) >> 32
    if node.table:
        return node.table[hash32 * len(node.table) >> 32]
    return hash32 * len(node.load) >> 32


def takes_trial(load: Load, how: Policy, now: int) -> bool:
    if not load.until or now < load.until:
        return False
    load.until = (now + how.trial) | UNTIL_TRIAL
    return True


def cost_of(node: Node, place: int, now: int) -> int:
    load, how = node.load[place], node.policy
    if how:
        if how.max_connections and load.open >= how.max_connections:
            return NEVER
        if load.until:
            return AT_ONCE if takes_trial(load, how, now) else NEVER
    cost = load.open + 1
    if node.algorithm == PEAK_EWMA:
        if load.latency:
            cost *= faded(load.latency, load.measured, now) + 1
        else:
            cost *= (SLOW_US if load.open else 1) + 1
    if load.streak:
        cost *= 1 + faded(1 << min(load.streak, 8), load.measured, now)
    return cost


def may_be_taken(node: Node, place: int, now: int) -> int:
    load, how = node.load[place], node.policy
    if not how:
        return YES
    if how.max_connections and load.open >= how.max_connections:
        return NO
    return YES if not load.until or takes_trial(load, how, now) else IF_NEED_BE


def take_another(node: Node, now: int) -> int | None:
    place, spare = 0, None
    for i in range(ASKED):
        place = draw(node) if i < DRAWS else (place + 1) % len(node.load)
        may = may_be_taken(node, place, now)
        if may == YES:
            return place
        if may == IF_NEED_BE:
            spare = place
    return spare


def second(node: Node, one: int) -> int:
    """Drawn as well; the next stands for it if it is the first again."""
    other = draw(node)
    return other if other != one else (other + 1) % len(node.load)


def choose_by(node: Node, place: int, other: int, now: int) -> int | None:
    """`other` is the second of P2C, else the same."""
    if other != place:
        cost, cost_other = cost_of(node, place, now), cost_of(node, other, now)
        if cost_other < cost:
            place, cost = other, cost_other
        taken = cost != NEVER
    else:
        taken = may_be_taken(node, place, now) == YES
    return place if taken else take_another(node, now)


def fewer_open(node: Node, place: int) -> int | None:
    other = second(node, place)
    a, b = node.load[place], node.load[other]
    if a.streak | b.streak:
        return None
    return other if b.open < a.open else place


def choose_slot(node: Node, client: int, now: int) -> int | None:
    """None if all are full."""
    algorithm = node.algorithm
    if algorithm == ROUND_ROBIN:
        place = next_in_turn(node)
    elif algorithm == MAGLEV:
        place = by_table(node, client)
    else:
        place = draw(node)
    if algorithm == LEAST_CONNECTIONS and not node.policy:
        chosen = fewer_open(node, place)
        if chosen is not None:
            return chosen
        place = draw(node)  # two others
    other = second(node, place) if algorithm in (LEAST_CONNECTIONS, PEAK_EWMA) else place
    return choose_by(node, place, other, now)


# ---- outcome.h


def faded(value: int, measured: int, now: int) -> int:
    halves = (now - measured) // FADE if now > measured else 0
    return value >> halves if halves < 32 else 0


def observe(load: Load, latency: int, now: int) -> None:
    known = load.latency
    age = (now - load.measured) >> 10 if now > load.measured else 0
    latency = max(1, min(latency, MAX_LATENCY_US))
    age = max(FADE >> 13, min(age, FADE >> 10))
    if latency < known:
        latency = known - (known - latency) * age // (FADE >> 10)
    load.latency = latency
    load.measured = now


def add_outcome(load: Load, connects: int, failures: int) -> tuple[int, int]:
    """Connects and failures, before they are halved."""
    load.connects += connects
    load.failures += failures
    window = load.connects, load.failures
    if load.connects >= WINDOW_FULL:
        load.connects >>= 1
        load.failures >>= 1
        load.ejections >>= 1
    return window


def ejection_time(how: Policy, ejections: int) -> int:
    return min(how.shortest << min(ejections, 16), how.longest)


def eject(load: Load, how: Policy, ejections: int, now: int) -> None:
    if load.until:
        if not load.until & UNTIL_TRIAL and now < load.until:
            return
    elif how.ejected >= how.most:
        return
    else:
        how.ejected += 1
    load.until = (now + ejection_time(how, ejections)) & ~UNTIL_TRIAL
    if ejections < 255:
        load.ejections += 1


def failed(load: Load, how: Policy | None, now: int) -> None:
    observe(load, SLOW_US, now)
    load.streak += 1
    ejections = load.ejections
    connects, failures = add_outcome(load, 1, 1)
    if not how:
        return
    if (
        load.until
        or (how.streak and load.streak >= how.streak)
        or (how.percent and connects >= how.volume and failures * 100 >= connects * how.percent)
    ):
        eject(load, how, ejections, now)


def succeeded(load: Load, how: Policy | None, latency: int, now: int) -> None:
    observe(load, latency, now)
    load.streak = 0
    add_outcome(load, 1, 0)
    if not load.until or (not load.until & UNTIL_TRIAL and now < load.until):
        return
    load.until = load.connects = load.failures = 0
    if how:
        how.ejected -= 1
