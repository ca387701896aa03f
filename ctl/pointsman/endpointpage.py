"""Which endpoints a page of metrics shows: those that were asked for, or those that have something
to tell. Pure.

What it costs goes by the size of the maps, in columns of plain numbers, and by what is shown: never
is an object made of each endpoint.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pointsman import abi
from pointsman.endpointrows import EndpointRow, Known, Place, Places, member_of, row_of
from pointsman.names import is_label, show
from pointsman.plan import RETIRED, Element, Slot
from pointsman.policies import PolicyElement
from pointsman.values import PortName

#: Endpoints of a page, if not said otherwise, and at most.
USUAL_LIMIT, MOST = 1000, 5000
#: ns that an endpoint is shown unasked after a connect to it: Prometheus looks back as long for a
#: sample.
LATELY = 300_000_000_000
_PARAMETERS = ("service", "namespace", "limit")
_TRIAL = abi.constants()["UNTIL_TRIAL"]
_SLOTS = 256  # read at a time


class BadParameter(ValueError):
    """Names the parameter, and says what to write."""


@dataclass(frozen=True, slots=True)
class Asked:
    """`services` are (namespace, name). With neither these nor `namespaces`: whichever endpoints
    have something to tell."""

    services: frozenset[tuple[str, str]] = frozenset()
    namespaces: frozenset[str] = frozenset()
    limit: int = USUAL_LIMIT

    @property
    def named(self) -> bool:
        return bool(self.services or self.namespaces)


def asked(query: Mapping[str, Collection[str]]) -> Asked:
    """From the parameters of a request, each with all its values. Raises BadParameter."""
    for name in query:
        if name not in _PARAMETERS:
            raise BadParameter(f"{show(name)} is no parameter; write service, namespace or limit")
    limits = query.get("limit", ())
    if len(limits) > 1:
        raise BadParameter(f"limit is there {len(limits)} times; write one")
    return Asked(
        frozenset(map(_service, query.get("service", ()))),
        frozenset(map(_namespace, query.get("namespace", ()))),
        next(map(_limit, limits), USUAL_LIMIT),
    )


def _service(text: str) -> tuple[str, str]:
    namespace, slash, name = text.partition("/")
    if not (slash and is_label(namespace) and is_label(name)):
        raise BadParameter(
            f"service {show(text)} is not a namespace and a name; write service=NAMESPACE/NAME, "
            "once for each"
        )
    return namespace, name


def _namespace(text: str) -> str:
    if not is_label(text):
        raise BadParameter(
            f"namespace {show(text)} is not one's name; write namespace=NAME, once for each"
        )
    return text


def _limit(text: str) -> int:
    # Four digits hold them all; int() takes more than these.
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 0 < int(text) <= MOST):
        raise BadParameter(f"limit {show(text)} is no number; write one from 1 to {MOST}")
    return int(text)


class Source(Known, Protocol):
    """What a page needs of the maps."""

    def ports_of(
        self, services: Collection[tuple[str, str]], namespaces: Collection[str]
    ) -> Iterator[Mapping[int, PortName]]: ...
    def port_name(self, owner: int) -> PortName | None: ...
    def policy_of(self, owner: int) -> PolicyElement: ...
    def service(self, ident: int) -> Element: ...
    def slots(self, first: int, count: int) -> tuple[Slot, ...]: ...
    def columns(self, name: str, *fields: str) -> Iterator[tuple[int, tuple[list[int], ...]]]: ...


@dataclass(frozen=True, slots=True)
class Shown:
    """One endpoint. `until` is when its ejection ends, CLOCK_MONOTONIC in ns; 0 without one."""

    row: EndpointRow
    until: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """`left_out`: how many endpoints more there would be without the limit. `known` says of each
    Service that was asked for whether there is one."""

    shown: tuple[Shown, ...] = ()
    left_out: int = 0
    known: Mapping[tuple[str, str], bool] = field(default_factory=dict)


def page(source: Source, what: Asked, now: int, rest: Callable[[], None]) -> Page:
    """`now` is CLOCK_MONOTONIC in ns; `rest` is called every few hundred microseconds of work."""
    names: dict[int, PortName] | None = None
    if what.named:
        names = {}
        for some in source.ports_of(what.services, what.namespaces):
            names |= some
            rest()
    chosen, left_out = _choose(_candidates(source, names, now, rest), what.limit)
    owners = set(chosen.values())
    policies = {owner: source.policy_of(owner) for owner in owners}
    found = []
    for place in _places(source, chosen, owners, names, rest):
        rest()
        member = member_of(source, place.slot)
        row = row_of(source, place, member, policies, now)
        if row.current:
            found.append(Shown(row, member.outcomes.until if row.ejection else 0))
    found.sort(key=lambda s: (s.row.namespace, s.row.service, s.row.port, s.row.endpoint))
    there = {name[:2] for name in names.values()} if names else set()
    return Page(tuple(found), left_out, {each: each in there for each in sorted(what.services)})


#: What matters more is greater: ejected, failures in a row, open connections, the last outcome.
_Rank = tuple[bool, bool, int, int]


def _candidates(
    source: Source, owners: Container[int] | None, now: int, rest: Callable[[], None]
) -> Iterator[tuple[_Rank, int, int]]:
    """(rank, endpoint id, owner) of all endpoints of these owners, or of all that have something
    to tell."""
    since = max(0, now - LATELY)
    columns = source.columns("load", "generation", "owner", "open", "until", "streak", "measured")
    for first, (generations, of, opens, untils, streaks, times) in columns:
        rest()
        # Of most endpoints no more than this is done.
        if owners is None:
            hits = [
                at
                for at, (opened, until, measured) in enumerate(
                    zip(opens, untils, times, strict=True)
                )
                if opened or until or measured > since
            ]
        else:
            hits = [at for at, owner in enumerate(of) if owner in owners]
        for at in hits:
            opened = opens[at] if opens[at] < 1 << 31 else 0  # as View.load() has it
            ejected = bool(untils[at] & ~_TRIAL)
            if not generations[at] or generations[at] & RETIRED or not of[at]:
                continue
            if owners is None and not (opened or ejected or times[at] > since):
                continue
            yield (ejected, bool(streaks[at]), opened, times[at]), -first - at, of[at]


def _choose(found: Iterable[tuple[_Rank, int, int]], limit: int) -> tuple[dict[int, int], int]:
    """Those that matter most, id → owner, and how many others there are. Never holds more of them
    than it gives."""
    best: list[tuple[_Rank, int, int]] = []
    total = 0
    for each in found:
        total += 1
        if len(best) < limit:
            heapq.heappush(best, each)
        else:
            heapq.heappushpop(best, each)
    return {-ident: owner for _, ident, owner in best}, total - len(best)


def _places(
    source: Source,
    chosen: Collection[int],
    owners: Collection[int],
    names: Mapping[int, PortName] | None,
    rest: Callable[[], None],
) -> Places:
    """Where in sets the endpoints stand."""
    places = Places()
    elements: dict[int, list[Element]] = {}
    for first, (column,) in source.columns("services", "owner"):
        rest()
        for ident, owner in enumerate(column, first):
            if owner in owners:
                elements.setdefault(owner, []).append(source.service(ident))
    for owner, group in elements.items():
        name = names.get(owner) if names else source.port_name(owner)
        if name is None:
            continue
        # As `get endpoints` goes over them: the first one's algorithm counts.
        group.sort(key=lambda e: (e.frontend.address, e.frontend.wildcard, e.frontend))
        seen = set()
        for element in group:
            for run, of in (((element.first, element.count), element), (element.outside, None)):
                if not run[1] or (run, of is None) in seen:
                    continue
                seen.add((run, of is None))
                for slot in _slots(source, *run, rest):
                    # Slots may be another's by now: nobody waits for who reads them here.
                    if slot.owner == owner and slot.endpoint in chosen:
                        places.add(Place(name, slot, of))
    return places


def _slots(source: Source, first: int, count: int, rest: Callable[[], None]) -> Iterator[Slot]:
    for at in range(first, first + count, _SLOTS):
        rest()
        yield from source.slots(at, min(_SLOTS, first + count - at))
