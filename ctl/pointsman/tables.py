"""The book of the map `maglev`: which lines hold the table of which endpoints. Pure.

A table is shared by all frontends of one owner that lead to the same endpoints from outside. What a
plan unlinks is in its garbage, and out of reach here until `reclaim`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pointsman import maglev
from pointsman.allocate import Extents
from pointsman.plan import Plan, Run
from pointsman.values import Backend

_Key = tuple[int, tuple[Backend, ...]]  # owner id, endpoints


@dataclass(slots=True)
class Table:
    """A run of lines, used by so many frontends. `entries` is how many numbers it has."""

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

    @property
    def taken(self) -> int:
        """Lines; what waits for a grace period counts as taken."""
        return self.size - self._lines.available

    @property
    def available(self) -> int:
        return self._lines.available

    def adopt(self, owner: int, members: tuple[Backend, ...], run: Run) -> Table | None:
        """The table that a former agent left at this place, for one frontend more; None if it is
        not that of these endpoints, and has to be made again."""
        known = self._tables.get((owner, members))
        if known is None:
            if (
                run not in self._sound
                or run.count != maglev.size_for(len(members))
                or self._stamps[run] != maglev.stamp(members)
            ):
                return None
            self._sound.remove(run)
            known = self._tables[owner, members] = Table(*run)
        elif (known.first, known.entries) != run:
            return None
        known.users += 1
        return known

    def unused(self) -> Iterator[tuple[int, int]]:
        """(first line, lines) of every table that was found and not adopted."""
        for run in sorted(self._sound):
            yield run.first, maglev.lines_of(run.count)

    def take(self, owner: int, members: tuple[Backend, ...], plan: Plan) -> Table | None:
        """The table of these endpoints, for one frontend more; None if there is no room."""
        table = self._tables.get((owner, members))
        if table is None:
            entries = maglev.size_for(len(members))
            first = self._lines.take(maglev.lines_of(entries))
            if first is None:
                return None
            table = self._tables[owner, members] = Table(first, entries)
            plan.lines.append((first, maglev.packed(members)))
        table.users += 1
        return table

    def leave(self, owner: int, members: tuple[Backend, ...], plan: Plan) -> None:
        """One frontend less uses the table of these endpoints."""
        table = self._tables[owner, members]
        table.users -= 1
        if not table.users:
            del self._tables[owner, members]
            plan.garbage.lines.append((table.first, table.lines))

    def reclaim(self, runs: Iterable[tuple[int, int]]) -> None:
        for first, count in runs:
            self._lines.free(first, count)
