"""The book of the map `maglev`: which lines hold the table of which endpoints. Pure.

A table is shared by all frontends of one owner that lead to the same endpoints of the same weights,
for sockets or for packets. What a plan unlinks is in its garbage, and out of reach here until
`reclaim`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pointsman import maglev
from pointsman.allocate import Extents
from pointsman.books import Extent
from pointsman.events import Problem
from pointsman.objects import Ref
from pointsman.plan import Garbage, Plan, Run
from pointsman.shares import drawn
from pointsman.shortage import Shortage, full
from pointsman.values import Backend

_Key = tuple[int, tuple[Backend, ...], tuple[int, ...]]  # owner id, endpoints, weights


@dataclass(slots=True)
class Table:
    """A run of lines, used by so many frontends. `entries` is how many numbers it has."""

    key: _Key
    first: int
    entries: int
    users: int = 0

    @property
    def lines(self) -> int:
        return maglev.lines_of(self.entries)


class Tables:
    """Who has which lines. `stamps` is what stands at the end of the tables that are there."""

    def __init__(self, lines: int, stamps: Mapping[Run, bytes]) -> None:
        self.size = lines
        self._tables: dict[_Key, Table] = {}
        self._stamps = stamps
        self._sound: set[Run] = set()  # where one may be, and nobody has taken it over yet
        runs: list[tuple[int, int]] = []
        end = 0
        for run in sorted(stamps):
            count = maglev.lines_of(run.count)
            # Of tables that overlap, which no agent makes, one is believed.
            if run.first >= end and run.first + count <= lines:
                self._sound.add(run)
                runs.append((run.first, count))
                end = run.first + count
        self._lines = Extents(lines, runs)
        self._short = Shortage()

    @property
    def taken(self) -> int:
        """Lines; what waits for a grace period counts as taken."""
        return self.size - self._lines.available

    def usage(self) -> dict[str, tuple[int, int]]:
        return {"maglev": (self.taken, self.size)}

    # -- what does not fit -----------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        return self._short.waiting

    def again(self) -> Iterator[Ref]:
        """The objects that may get the tables now that they lacked."""
        return self._short.again(self._lines.available)

    def forget(self, ref: Ref) -> None:
        """Before an object is placed (again): what it lacked is no longer known."""
        self._short.lacking.pop(ref, None)

    def problems(self) -> Iterator[Problem]:
        for ref, lines in self._short.lacking.items():
            message = (
                f"maglev is full ({self.size} lines, {lines} more wanted): each change of its "
                "endpoints moves nearly all clients that choose by it to another one"
            )
            yield full(ref, message, "raise --max-maglev-lines")

    # -- taking over -----------------------------------------------------------------------------

    def adopt(self, owner: int, extent: Extent | None, run: Run) -> Table | None:
        """The table that a former agent left at this place, for one frontend more; None if it is
        not that of these endpoints, and has to be made again."""
        if extent is None:
            return None
        key = (owner, extent.members, extent.weights)
        known = self._tables.get(key)
        if known is None:
            if (
                run not in self._sound
                or run.count != _size_for(extent)
                or self._stamps[run] != maglev.stamp(extent.members, extent.weights)
            ):
                return None
            self._sound.remove(run)
            known = self._tables[key] = Table(key, *run)
        elif (known.first, known.entries) != run:
            return None
        known.users += 1
        return known

    def sweep(self, leftovers: Plan) -> None:
        """What was found and not adopted goes."""
        leftovers.garbage.lines += [
            (run.first, maglev.lines_of(run.count)) for run in sorted(self._sound)
        ]

    # -- one frontend ----------------------------------------------------------------------------

    def change(
        self, ref: Ref, before: Table | None, owner: int, extent: Extent | None, plan: Plan
    ) -> Table | None:
        """The table of a set for a frontend that had `before`; None without a set, without need of
        one or without room."""
        if before and extent and before.key == (owner, extent.members, extent.weights):
            return before
        table = self._take(ref, owner, extent, plan) if extent else None
        self.leave(before, plan)
        return table

    def _take(self, ref: Ref, owner: int, extent: Extent, plan: Plan) -> Table | None:
        key = (owner, extent.members, extent.weights)
        table = self._tables.get(key)
        if table is None:
            entries = _size_for(extent)
            if not entries:
                return None
            lines = maglev.lines_of(entries)
            first = self._lines.take(lines)
            if first is None:
                self._short.add(ref, lines)
                return None
            table = self._tables[key] = Table(key, first, entries)
            plan.lines.append((first, maglev.packed(extent.members, extent.weights)))
        table.users += 1
        return table

    def leave(self, table: Table | None, plan: Plan) -> None:
        """One frontend less uses this table."""
        if table is None:
            return
        table.users -= 1
        if not table.users:
            del self._tables[table.key]
            plan.garbage.lines.append((table.first, table.lines))

    def reclaim(self, garbage: Garbage) -> None:
        for first, count in garbage.lines:
            self._lines.free(first, count)
        self._short.freed |= bool(garbage.lines)


def _size_for(extent: Extent) -> int:
    return maglev.size_for(len(extent.members), drawn(extent.weights))


def value_of_table(table: Table | None) -> int:
    """A table as it stands in `services`."""
    return table.entries << 32 | table.first if table else 0
