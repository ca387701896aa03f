"""Endpoints as rows that people and scripts read: what the programs know of each. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    it, or for the connection that tries the endpoint; `times` counts ejections of late."""

    observed: bool
    left_seconds: int
    times: int
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


def endpoints(reader: Reader, now: int) -> list[EndpointRow]:
    """Each endpoint once, however many VIPs of its Service port lead to it. `now` is
    CLOCK_MONOTONIC in ns."""
    rows: dict[tuple[PortName, int], EndpointRow] = {}
    inside: set[tuple[PortName, int]] = set()
    policies = reader.policies()
    for each in held(reader):
        element = each.element
        policy = policy_of(element, policies)
        for slot in each.slots:
            if (key := (each.name, slot.endpoint)) not in inside:
                inside.add(key)
                rows[key] = _row(reader, each.name, slot, element.algorithm, policy, now)
        for slot in each.outside:
            # Packets find them by tables, whatever else sockets look at.
            if (key := (each.name, slot.endpoint)) not in rows:
                rows[key] = _row(reader, each.name, slot, 0, None, now)
    return list(rows.values())


def _row(
    reader: Reader, name: PortName, slot: Slot, algorithm: int, policy: Policy | None, now: int
) -> EndpointRow:
    member = member_of(reader, slot)
    known = member.outcomes
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


def member_of(reader: Reader, slot: Slot) -> weigh.Member:
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
