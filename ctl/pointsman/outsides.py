"""What a frontend is to clients outside of the cluster: set, Maglev table, ranges. Pure.

A change is planned so that between any two writes a client outside gets what was or is right: what
is stricter comes before the frontend is switched, what is looser after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pointsman import abi
from pointsman.books import Extent
from pointsman.events import Problem
from pointsman.objects import Ref
from pointsman.plan import Config, Element, Garbage, Limits, Plan, Snapshot
from pointsman.ranges import Source, Steps, steps
from pointsman.shortage import Shortage, full
from pointsman.tables import Table, Tables, value_of_table
from pointsman.values import Outside

_ABI = abi.constants()
_OUTSIDE, _RANGES = _ABI["PACKETS_OUTSIDE"], _ABI["PACKETS_RANGES"]
_NOBODY: frozenset[Source] = frozenset()


@dataclass(slots=True)
class Served:
    """How one frontend is served to clients outside. `lost`: what a former agent left makes no
    sense, so whatever is wanted is written anew."""

    extent: Extent | None = None
    empty: int = 0
    packets: int = 0
    sources: frozenset[Source] = _NOBODY
    table: Table | None = None
    lost: bool = False

    @property
    def set_value(self) -> int:
        return value_of(self.extent, self.empty)

    @property
    def table_value(self) -> int:
        return value_of_table(self.table)


_NOT_SERVED = Served()


def value_of(extent: Extent | None, empty: int) -> int:
    """A set as it stands in the map."""
    return len(extent.members) << 32 | extent.first if extent else empty


def packets_of(wanted: Outside | None) -> int:
    return wanted.flags | _OUTSIDE if wanted else 0


def guard_of(before: int, after: int) -> int:
    """PACKETS_… before the sets are switched: what shuts out counts, what lets in does not yet."""
    return (before & after & ~_RANGES) | ((before | after) & _RANGES)


class Outsides:
    """What all frontends are to clients outside. `packets`: whether there are programs for packets;
    else no tables are made for them."""

    def __init__(
        self, limits: Limits, snapshot: Snapshot | None, tables: Tables, *, packets: bool
    ) -> None:
        self._limits = limits
        self._packets = packets
        self._tables = tables
        self._found = snapshot.ranges if snapshot else {}
        self._ranges = sum(map(len, self._found.values()))
        self._short = Shortage()

    def usage(self) -> dict[str, tuple[int, int]]:
        return {"source_ranges": (self._ranges, self._limits.ranges)}

    # -- what does not fit -----------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        return self._short.waiting

    def again(self) -> Iterator[Ref]:
        """The objects that may get the ranges now that they lacked."""
        return self._short.again(self._limits.ranges - self._ranges)

    def problems(self) -> Iterator[Problem]:
        for ref, ranges in self._short.lacking.items():
            message = (
                f"source_ranges is full ({self._limits.ranges}, {ranges} more wanted): no client "
                "outside is served"
            )
            yield full(ref, message, "write fewer, larger ranges")

    def forget(self, ref: Ref) -> None:
        """Before an object is placed (again): what it lacked is no longer known."""
        self._short.lacking.pop(ref, None)

    def reclaim(self, garbage: Garbage) -> None:
        self._ranges -= garbage.ranges
        self._short.freed |= bool(garbage.ranges)

    # -- taking over -----------------------------------------------------------------------------

    def adopt(
        self, service: int, element: Element, extent: Extent | None, leftovers: Plan
    ) -> Served | None:
        """What a former agent left of one frontend; `extent` is the set, if it is whole."""
        sources = self._found.get(service, _NOBODY)
        if not (element.packets or any(element.outside) or element.table.count or sources):
            return None
        table = None
        if element.table.count:
            table = self._tables.adopt(element.owner, extent, element.table)
            if table is None:
                leftovers.tables.append((service, 0))
        lost = bool(element.outside.count) and extent is None
        empty = 0 if element.outside.count else element.outside.first
        return Served(extent, empty, element.packets, sources, table, lost)

    def sweep(self, kept: set[int], leftovers: Plan) -> None:
        """What no frontend has goes. `kept`: the services that were adopted."""
        for service, sources in self._found.items():
            if service not in kept:
                leftovers.barred_later += [(service, source) for source in sources]
                leftovers.garbage.ranges += len(sources)

    # -- one frontend ----------------------------------------------------------------------------

    def begin(
        self,
        ref: Ref,
        service: int,
        owner: int,
        wanted: Outside,
        extent: Extent | None,
        plan: Plan,
    ) -> Served:
        """A new frontend, whose element of services is still to be written."""
        sources = self._admissible(ref, _NOBODY, wanted)
        plan.admitted += [(service, source) for source in sources]
        table = self._table(ref, None, owner, extent, plan)
        return Served(extent, wanted.empty, packets_of(wanted), sources, table)

    def change(
        self,
        ref: Ref,
        before: Served | None,
        config: Config,
        owner: int,
        wanted: Outside | None,
        extent: Extent | None,
        plan: Plan,
    ) -> Served | None:
        """`config`: what the service is before the plan, which has the packets of `before`."""
        if before is None and wanted is None:
            return None
        old, service = before or _NOT_SERVED, config.service
        new = Served(extent, wanted.empty if wanted else 0, packets_of(wanted))
        new.sources = self._admissible(ref, old.sources, wanted)
        todo = steps(
            old.sources,
            new.sources,
            asked=bool(old.packets & _RANGES),
            ask=bool(new.packets & _RANGES),
        )
        _write_ranges(service, todo, plan)
        plan.garbage.ranges += len(old.sources - new.sources)
        if old.set_value != new.set_value or old.lost:
            plan.outsides.append((service, new.set_value))
        new.table = self._table(ref, old.table, owner, extent, plan)
        if old.table_value != new.table_value:
            plan.tables.append((service, new.table_value))
        return new if wanted else None

    def let_go(self, service: int, served: Served, plan: Plan) -> None:
        """Nobody outside gets the endpoints any more; all else stays."""
        plan.outsides.append((service, 0))
        if served.table:
            plan.tables.append((service, 0))
            self._tables.leave(served.table, plan)
        served.extent, served.empty, served.table, served.lost = None, 0, None, False

    def end(self, service: int, served: Served, plan: Plan) -> None:
        """A frontend that is deleted."""
        plan.barred_later += [(service, source) for source in served.sources]
        plan.garbage.ranges += len(served.sources)
        self._tables.leave(served.table, plan)

    def _table(
        self, ref: Ref, before: Table | None, owner: int, extent: Extent | None, plan: Plan
    ) -> Table | None:
        return self._tables.change(ref, before, owner, extent if self._packets else None, plan)

    def _admissible(
        self, ref: Ref, have: frozenset[Source], wanted: Outside | None
    ) -> frozenset[Source]:
        """The ranges to be written. If they don't fit, none: better nobody than everybody."""
        if wanted is None or not wanted.flags & _RANGES:
            return _NOBODY
        sources = frozenset(wanted.sources)
        more = len(sources - have)
        if self._ranges + more > self._limits.ranges:
            self._short.add(ref, more)
            return _NOBODY
        self._ranges += more
        return sources


def _write_ranges(service: int, todo: Steps, plan: Plan) -> None:
    for writes, sources in (
        (plan.admitted, todo.add),
        (plan.barred, todo.remove),
        (plan.admitted_later, todo.add_later),
        (plan.barred_later, todo.remove_later),
    ):
        writes += [(service, source) for source in sources]
