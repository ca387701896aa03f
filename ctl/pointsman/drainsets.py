"""What a Service with `pointsman.io/drain` has: sets of endpoints, and the share of each. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from math import floor
from typing import NamedTuple

from pointsman import abi
from pointsman.choice import USUAL_WEIGHT, sticky
from pointsman.shares import ELSEWHERE
from pointsman.values import TCP, Backend, Entry, Frontend, PortName

_ABI = abi.constants()
_AVOID = _ABI["CHOICE_AVOID"]


class Member(NamedTuple):
    """An endpoint of a set, as the records of its connections name it."""

    endpoint: int
    generation: int
    weight: int


@dataclass(frozen=True, slots=True)
class Set:
    """The endpoints that some frontends of one service port share. `most`: connections that one
    may have, 0 as many as come; `avoids`: whether those that are ejected get none."""

    frontends: frozenset[Frontend]
    members: Mapping[Backend, Member]
    most: int = 0
    avoids: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """What a Service asks for: `rate` connections a second in all. `waits`: endpoints of it are in
    slow start, and are not to have their share yet."""

    rate: float
    sets: tuple[Set, ...]
    waits: bool = False

    @property
    def endpoints(self) -> set[Backend]:
        return {backend for each in self.sets for backend in each.members}


def sets_of(
    entries: Iterable[Entry], ids: Callable[[PortName], Mapping[Backend, tuple[int, int]]]
) -> tuple[Set, ...]:
    """The sets of one Service that can be drained: of TCP, and whose clients are free to go.

    `ids`: endpoint id and generation of each endpoint that a service port has in the maps.
    """
    found: dict[object, list[Entry]] = {}
    for entry in entries:
        if entry.frontend.protocol == TCP and not sticky(entry.algorithm, entry.affinity):
            found.setdefault((entry.owner, entry.endpoints, entry.weights), []).append(entry)
    return tuple(_set(each, ids(each[0].owner)) for each in found.values())


def _set(entries: Sequence[Entry], ids: Mapping[Backend, tuple[int, int]]) -> Set:
    one = entries[0]
    weights = one.weights or (USUAL_WEIGHT,) * len(one.endpoints)
    members = {
        backend: Member(*ids[backend], weight)
        for backend, weight in zip(one.endpoints, weights, strict=True)
        # Of other zones: they have what spills over, and no share.
        if backend in ids and not weight & ELSEWHERE
    }
    return Set(
        frozenset(entry.frontend for entry in entries),
        members,
        one.policy.max_connections if one.policy else 0,
        bool(one.algorithm & _AVOID),
    )


def targets(total: int, weights: Sequence[int], most: int, chance: float) -> list[int]:
    """How many of `total` connections each should have, in whole ones.

    A share is rounded up or down by `chance` (0 to below 1), the same for all, so that they add up;
    over many nodes with few connections each the shares come out right. Nobody gets more than
    `most`, if that is not 0: the others have the rest.
    """
    even = weights if any(weights) else (1,) * len(weights)
    shares = [Fraction()] * len(even)  # sums of floats would be a little off
    takers, rest = [i for i, weight in enumerate(even) if weight], Fraction(total)
    while takers:
        whole = sum(even[i] for i in takers)
        found = {i: rest * even[i] / whole for i in takers}
        full = [i for i in takers if most and found[i] > most]
        for i in full or takers:
            shares[i] = Fraction(most) if full else found[i]
        rest -= most * len(full)
        takers = [i for i in takers if i not in full] if full else []
    ends = [floor(end + Fraction(chance)) for end in accumulate(shares, initial=Fraction())]
    return [end - begin for begin, end in pairwise(ends)]


def risen(before: Mapping[Backend, Member], now: Mapping[Backend, Member]) -> set[Backend]:
    """Who joined, and who weighs more now beside those that were there before."""
    both = before.keys() & now.keys()
    was, is_ = (sum(each[backend].weight for backend in both) for each in (before, now))
    more = {b for b in both if now[b].weight * was > before[b].weight * is_}
    return (now.keys() - both) | more
