"""Plans: the writes that bring about what should be, as values. Made by `planner`, done by `maps`.

A `Plan` is a list of writes in the order that keeps every lookup right at each point between two
of them: new endpoints → new slots and tables → new services → switch sets → mark addresses → add
frontends → delete frontends → take back marks → retire endpoints → (grace period) → reuse. Nothing
that a program may still read is reused before `reclaim` is called with the plan's garbage.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pointsman import abi
from pointsman.policies import PolicyElement
from pointsman.ranges import Source
from pointsman.shares import ELSEWHERE, USUAL
from pointsman.values import Backend, Frontend, PortName

_pack_key = abi.layouts()["frontend_key"].packer("addr", "port", "proto")
RETIRED = abi.constants()["GENERATION_RETIRED"]


def pack_frontend(frontend: Frontend) -> bytes:
    return _pack_key(frontend.address, socket.htons(frontend.port), frontend.protocol)


@dataclass(frozen=True, slots=True)
class Limits:
    """How many elements each map has. Index 0 of services and names is never used."""

    services: int = 65536
    slots: int = 131072
    endpoints: int = 65536
    marks: int = 16384  # words of 64 bits
    lines: int = 32768  # of Maglev tables, 32 entries each
    ranges: int = 16384  # elements of source_ranges


@dataclass(slots=True)
class Garbage:
    """What may be reused once a grace period has passed."""

    extents: list[tuple[int, int]] = field(default_factory=list)  # (first slot, count)
    endpoints: list[int] = field(default_factory=list)
    services: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    lines: list[tuple[int, int]] = field(default_factory=list)  # (first line, count)
    ranges: int = 0  # how many elements of source_ranges are free

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__slots__)

    def extend(self, other: Garbage) -> None:
        self.extents += other.extents
        self.endpoints += other.endpoints
        self.services += other.services
        self.owners += other.owners
        self.lines += other.lines
        self.ranges += other.ranges


class Run(NamedTuple):
    """Consecutive elements: slots of a set, where `first` says what it answers if `count` is 0 (an
    EMPTY_… of abi.h), or entries of a Maglev table from line `first` on."""

    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count(), which has no use here

    @classmethod
    def of(cls, value: int) -> Run:
        """From what stands in the map: count << 32 | first."""
        return cls(value & 0xFFFFFFFF, value >> 32) if value else NO_RUN


NO_RUN = Run(0, 0)


class Config(NamedTuple):
    """What a service is beside its set: one store, and one of the affinity before it."""

    service: int
    owner: int
    algorithm: int
    affinity: int
    flags: int
    packets: int = 0


@dataclass(slots=True)
class Plan:
    """Writes, in order. Each list is one step; within a list the order does not matter."""

    #: Endpoint id, generation, owner id.
    generations: list[tuple[int, int, int]] = field(default_factory=list)
    slots: list[tuple[int, bytes]] = field(default_factory=list)  # first slot, packed slots
    shares: list[tuple[int, bytes]] = field(default_factory=list)  # first slot, packed shares
    names: list[tuple[int, PortName]] = field(default_factory=list)  # owner id
    lines: list[tuple[int, bytes]] = field(default_factory=list)  # first line, packed tables
    policies: list[tuple[int, PolicyElement]] = field(default_factory=list)  # owner id
    admitted: list[tuple[int, Source]] = field(default_factory=list)  # service id, range
    services: list[tuple[int, bytes]] = field(default_factory=list)  # service id, whole element
    #: What has to be stricter, or to look at weights, before the sets are switched.
    guards: list[Config] = field(default_factory=list)
    barred: list[tuple[int, Source]] = field(default_factory=list)
    sets: list[tuple[int, int]] = field(default_factory=list)  # service id, count << 32 | first
    outsides: list[tuple[int, int]] = field(default_factory=list)  # as sets
    insides: list[tuple[int, int]] = field(default_factory=list)  # service id, entries << 32 | line
    tables: list[tuple[int, int]] = field(default_factory=list)  # as insides
    configs: list[Config] = field(default_factory=list)
    admitted_later: list[tuple[int, Source]] = field(default_factory=list)
    marks: list[tuple[int, int]] = field(default_factory=list)  # index of a word, its value
    frontends: list[tuple[Frontend, int]] = field(default_factory=list)  # added, service id
    deleted: list[Frontend] = field(default_factory=list)
    unmarks: list[tuple[int, int]] = field(default_factory=list)  # as marks, after the deletions
    disowned: list[int] = field(default_factory=list)  # services no longer in use
    #: What may eject more endpoints, or is over.
    policies_later: list[tuple[int, PolicyElement]] = field(default_factory=list)
    barred_later: list[tuple[int, Source]] = field(default_factory=list)
    unnamed: list[int] = field(default_factory=list)  # owner ids
    retired: list[tuple[int, int]] = field(default_factory=list)  # endpoint id, generation | bit
    garbage: Garbage = field(default_factory=Garbage)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class Element:
    """One element of `services` as it stands in the map; `outside` and `table` concern packets,
    `inside` is the Maglev table for sockets."""

    frontend: Frontend
    owner: int
    first: int
    count: int
    algorithm: int
    affinity: int
    flags: int = 0
    packets: int = 0
    outside: Run = NO_RUN
    table: Run = NO_RUN
    inside: Run = NO_RUN

    @property
    def runs(self) -> frozenset[Run]:
        """Its sets that are not empty."""
        return frozenset(r for r in (Run(self.first, self.count), self.outside) if r.count)

    @property
    def tables(self) -> frozenset[Run]:
        """Its Maglev tables."""
        return frozenset(run for run in (self.inside, self.table) if run.count)


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot as it stands in the map."""

    backend: Backend
    endpoint: int
    generation: int
    owner: int
    place: int = 0  # SLOT_… of abi.h
    weight: int = USUAL  # as in Entry.weights

    @property
    def weighs(self) -> int:
        """The weight alone, without where the endpoint is."""
        return self.weight & (ELSEWHERE - 1)

    @property
    def elsewhere(self) -> bool:
        """Whether it is in another zone, where that counts."""
        return bool(self.weight & ELSEWHERE)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the maps hold, as read at start.

    `slots` gives, for each set in use (first, count), its endpoints: (backend, endpoint id,
    generation). `generations` holds every endpoint id's, 0 where it was never used. `marks` are the
    words that are not 0, by index. `places` has the endpoints' SLOT_… for those sets of which
    some are known, `stamps` what stands at the end of each Maglev table, `ranges` the ranges of
    clients by service id, `weights` those of the sets in which they differ, `policies` what is not
    zero by owner id.
    """

    frontends: Mapping[Frontend, int]
    services: Mapping[int, Element]
    names: Mapping[int, PortName]
    slots: Mapping[tuple[int, int], tuple[tuple[Backend, int, int], ...]]
    generations: Mapping[int, int]
    marks: Mapping[int, int] = field(default_factory=dict)
    places: Mapping[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    stamps: Mapping[Run, bytes] = field(default_factory=dict)
    ranges: Mapping[int, frozenset[Source]] = field(default_factory=dict)
    weights: Mapping[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    policies: Mapping[int, PolicyElement] = field(default_factory=dict)
