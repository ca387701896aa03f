"""Endpoints as rows that people and scripts read: what the programs know of each. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pointsman import weigh
from pointsman.inspect import Reader, held
from pointsman.outcomes import Outcomes
from pointsman.plan import Element, Slot
from pointsman.policies import NO_POLICY, PolicyElement
from pointsman.values import Policy, PortName, endpoint_text

_SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Ejection:
    """`observed`: the Service only asks to see what would be ejected. `left_seconds` are left of
    it, or for the connection that tries the endpoint; `times` counts ejections of late. `why` is
    for people, `reason` a word of weigh.reason_of()."""

    observed: bool
    left_seconds: int
    times: int
    reason: str
    why: str


@dataclass(frozen=True, slots=True)
class EndpointRow:
    """One endpoint of one Service port. `current`: the programs count its connections, since the
    generation in `load` is the one that its slots have.

    `weight` is None where all are alike. `connect_microseconds` is what choices reckon with now:
    half of it is forgotten each 8 s; None if nothing is known, or no more. `connects` and
    `failures` of them are of late. `state` is ready, full, ejected, trial (a connection finds out
    whether it is well again), trial-due (the next one does), other-zone or no-weight.
    """

    namespace: str
    service: str
    port: str
    endpoint: str
    id: int
    generation: int
    current: bool
    open: int
    weight: int | None
    connect_microseconds: int | None
    connects: int
    failures: int
    failures_in_a_row: int
    state: str
    ejection: Ejection | None


class Known(Protocol):
    """What the maps know of endpoints by id: of inspect.Reader."""

    def load(self, endpoint: int) -> tuple[int, int]: ...
    def outcomes(self, endpoint: int) -> Outcomes: ...


class Place(NamedTuple):
    """One endpoint of one Service port. `element` is the service in whose set it is; None if only
    packets find it, by tables, whatever else sockets look at."""

    name: PortName
    slot: Slot
    element: Element | None

    @property
    def key(self) -> tuple[PortName, int]:
        return self.name, self.slot.endpoint

    @property
    def algorithm(self) -> int:
        return self.element.algorithm if self.element else 0


class Places:
    """Each endpoint once, however many VIPs of its Service port lead to it."""

    def __init__(self) -> None:
        self._found: dict[tuple[PortName, int], Place] = {}

    def add(self, place: Place) -> None:
        """Of those of the same key the first in a set counts, else the first one."""
        if place.element:
            if (known := self._found.get(place.key)) is None or known.element is None:
                self._found[place.key] = place
        else:
            self._found.setdefault(place.key, place)

    def __iter__(self) -> Iterator[Place]:
        return iter(self._found.values())


def endpoints(reader: Reader, now: int) -> list[EndpointRow]:
    """Of all Services. `now` is CLOCK_MONOTONIC in ns."""
    places, policies = Places(), reader.policies()
    for each in held(reader):
        for slot in each.slots:
            places.add(Place(each.name, slot, each.element))
        for slot in each.outside:
            places.add(Place(each.name, slot, None))
    return [row_of(reader, each, member_of(reader, each.slot), policies, now) for each in places]


def row_of(
    reader: Known,
    place: Place,
    member: weigh.Member,
    policies: Mapping[int, PolicyElement],
    now: int,
) -> EndpointRow:
    """`member`: what member_of() says of its slot."""
    name, slot, element = place
    algorithm, known = place.algorithm, member.outcomes
    policy = policy_of(element, policies) if element else None
    return EndpointRow(
        namespace=name.namespace,
        service=name.service,
        port=name.port,
        endpoint=endpoint_text(*slot.backend),
        id=slot.endpoint,
        generation=slot.generation,
        current=reader.load(slot.endpoint)[0] == slot.generation,
        open=member.open,
        weight=slot.weighs if algorithm & weigh.CHOICE_WEIGHTED else None,
        connect_microseconds=weigh.connect_time(known, now) or None,
        connects=known.connects,
        failures=known.failures,
        failures_in_a_row=known.streak,
        state=weigh.state_of(member, algorithm, policy, now),
        ejection=ejection(known, algorithm, policy, now),
    )


def member_of(reader: Known, slot: Slot) -> weigh.Member:
    """What the maps know of an endpoint; nothing if they know it of another generation."""
    generation, opened = reader.load(slot.endpoint)
    if generation != slot.generation:
        return weigh.Member(weight=slot.weighs, elsewhere=slot.elsewhere)
    return weigh.Member(opened, reader.outcomes(slot.endpoint), slot.weighs, slot.elsewhere)


def policy_of(element: Element, policies: Mapping[int, PolicyElement]) -> Policy | None:
    """None where nothing is asked of a policy."""
    if not element.algorithm & weigh.CHOICE_POLICY:
        return None
    return policies.get(element.owner, NO_POLICY).policy


def ejection(known: Outcomes, algorithm: int, policy: Policy | None, now: int) -> Ejection | None:
    """None if the endpoint is not ejected, nor would be."""
    if not known.until or policy is None:
        return None
    return Ejection(
        observed=not algorithm & weigh.CHOICE_AVOID,
        left_seconds=max(-(-(known.until - now) // _SECOND), 0),
        times=known.ejections,
        reason=weigh.reason_of(known, policy),
        why=weigh.why_ejected(known, policy),
    )


def state_text(state: str, ejection: Ejection | None) -> str:
    """For people: an endpoint that is ejected with for how long, and why."""
    if ejection is None:
        return state
    if ejection.observed:
        return f"{state}, would be ejected: {ejection.why}"
    if state == weigh.EJECTED:
        return f"{state} for {ejection.left_seconds}s: {ejection.why}"
    if state in (weigh.TRIAL, weigh.TRIAL_DUE):
        return f"{state}: {ejection.why}"
    return f"{state}, ejected: {ejection.why}"
