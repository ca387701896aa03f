"""What the programs do with one destination: the walk of bpf/lookup.h, step by step. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pointsman.inspect import UNKNOWN, Reader, algorithm_name, empty_name
from pointsman.plan import Element, Slot
from pointsman.values import PROTOCOL_NAMES, TCP, UDP, Frontend, endpoint_text, to_address, to_text

TRANSLATED, REFUSED, UNREACHABLE = "translated", "refused", "unreachable"
NOT_A_SERVICE = "not-a-service"
_ERRNO = {REFUSED: "ECONNREFUSED", UNREACHABLE: "EHOSTUNREACH"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One endpoint that a connection may get. `current`: its connections are counted."""

    endpoint: str
    id: int
    generation: int
    load_generation: int
    current: bool
    open: int
    probability: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """`errno` is what connect() or sendmsg() gives, "" if it goes through; `result` and `why` are
    a sentence each, `steps` what the programs look at, in that order."""

    destination: str
    verdict: str
    errno: str
    result: str
    why: str
    steps: tuple[str, ...]
    service: str
    frontend_id: int | None
    algorithm: str
    endpoints: tuple[Candidate, ...]


def parse_destination(text: str) -> Frontend:
    """ADDR:PORT or [ADDR]:PORT, then /tcp (the default) or /udp. Raises ValueError."""
    match = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]+)):([0-9]+)(?:/(\w+))?", text)
    if not match:
        raise ValueError(
            f"{text!r} is no ADDRESS:PORT[/PROTOCOL], such as 10.96.0.10:53/udp or [fd00::1]:80"
        )
    protocol = {"tcp": TCP, "udp": UDP}.get((match[4] or "tcp").lower())
    if protocol is None:
        raise ValueError(f"protocol {match[4]!r} is not translated; write tcp or udp")
    if int(match[3]) > 65535:
        raise ValueError(f"port {match[3]} is above 65535")
    if match[2] and match[2].count(".") != 3:
        raise ValueError(f"{match[2]!r} is no IP address; a name has first to be resolved")
    return Frontend(to_address(match[1] or match[2]), int(match[3]), protocol)


def explain(reader: Reader, destination: Frontend) -> Explanation:
    """Follows `choose` of bpf/lookup.h for this address, port and protocol."""
    steps: list[str] = []
    found = _find(reader, destination, steps)
    if found is None:
        return _without_service(reader, destination, steps)
    ident, element = found
    owner = reader.names().get(element.owner, UNKNOWN)
    service = str(owner) if owner != UNKNOWN else f"owner {element.owner}, which has no name"
    algorithm = algorithm_name(element.algorithm)
    affinity = f", client affinity {element.affinity} s" if element.affinity else ""
    steps.append(f"service {ident}: belongs to {service}, algorithm {algorithm}{affinity}")
    verdict, result, why = TRANSLATED, "", f"{destination} is {service}, which chooses by "
    why += algorithm
    candidates: tuple[Candidate, ...] = ()
    if not element.count:
        empty = empty_name(element.first)
        steps.append(f"set: empty, which means {empty}")
        verdict = UNREACHABLE if empty == "unreachable" else REFUSED
        what = "no endpoints under its policy" if verdict == UNREACHABLE else "no endpoints"
        result = f"{_ERRNO[verdict]}: service has {what}"
        why = f"{destination} is {service}, whose set is empty"
    else:
        slots = reader.slots(element.first, element.count)
        where = f"slot {element.first}"
        if element.count > 1:
            where = f"slots {element.first} to {element.first + element.count - 1}"
        steps.append(f"set: {_plural(element.count, 'endpoint')}, {where}")
        candidates = tuple(_candidate(reader, slot, element.count) for slot in slots)
        steps += [_candidate_step(c, element.first + i) for i, c in enumerate(candidates)]
        result = _chance(destination, len(candidates))
        if missing := element.count - len(slots):
            steps.append(f"{_plural(missing, 'slot')} beyond the end of the map")
            result += f"; {missing} in {element.count} fail with ECONNREFUSED: no such slot"
    return Explanation(
        destination=str(destination),
        verdict=verdict,
        errno=_ERRNO.get(verdict, ""),
        result=result,
        why=why,
        steps=tuple(steps),
        service=str(owner) if owner != UNKNOWN else "",
        frontend_id=ident,
        algorithm=algorithm,
        endpoints=candidates,
    )


def _find(reader: Reader, key: Frontend, steps: list[str]) -> tuple[int, Element] | None:
    """`find_service`: the service's own key has the last word."""
    ident = reader.find(key)
    if ident is None:
        steps.append(f"frontends: no key {key}")
        return None
    steps.append(f"frontends: key {key} leads to service {ident}")
    try:
        element = reader.service(ident)
    except IndexError:
        steps.append(f"service {ident}: outside of the map, so the key counts as absent")
        return None
    if element.frontend != key:
        steps.append(
            f"service {ident}: its own key is {element.frontend}, so the key counts as absent"
        )
        return None
    steps.append(f"service {ident}: its own key is the same")
    return ident, element


def _without_service(reader: Reader, key: Frontend, steps: list[str]) -> Explanation:
    address = to_text(key.address)
    found = _find(reader, Frontend(key.address, 0, 0), steps)
    port = f"port {key.port}/{PROTOCOL_NAMES[key.protocol]}"
    if found is None:
        verdict, service = NOT_A_SERVICE, ""
        result = "not a Service: the address is used as it is"
        why = f"{address} is the ClusterIP of no Service"
    else:
        owner = reader.names().get(found[1].owner, UNKNOWN)
        verdict = REFUSED
        service = f"{owner.namespace}/{owner.service}" if owner != UNKNOWN else ""
        shown = str(key.port) if key.protocol == TCP else f"{key.port}/udp"
        result = f"ECONNREFUSED: no Service defines port {shown} of {address}"
        why = f"{address} is the ClusterIP of {service or 'a Service'}, which has no {port}"
    return Explanation(
        destination=str(key),
        verdict=verdict,
        errno=_ERRNO.get(verdict, ""),
        result=result,
        why=why,
        steps=tuple(steps),
        service=service,
        frontend_id=found[0] if found else None,
        algorithm="",
        endpoints=(),
    )


def _candidate(reader: Reader, slot: Slot, count: int) -> Candidate:
    generation, opened = reader.load(slot.endpoint)
    return Candidate(
        endpoint=endpoint_text(*slot.backend),
        id=slot.endpoint,
        generation=slot.generation,
        load_generation=generation,
        current=generation == slot.generation,
        open=opened,
        probability=round(1 / count, 6),
    )


def _candidate_step(candidate: Candidate, index: int) -> str:
    known = (
        f"generation {candidate.generation} as in load"
        if candidate.current
        else f"generation {candidate.generation}, but load has {candidate.load_generation}: "
        "its connections are not counted"
    )
    return (
        f"slot {index}: {candidate.endpoint}, probability {candidate.probability:.1%}, "
        f"{candidate.open} open, endpoint {candidate.id}, {known}"
    )


def _chance(destination: Frontend, count: int) -> str:
    what = "a connection" if destination.protocol == TCP else "a socket"
    if count == 1:
        return f"{what} gets the one endpoint"
    return f"{what} gets one of {count} endpoints at random"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
