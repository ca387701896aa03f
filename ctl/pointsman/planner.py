"""From what should be to a plan that brings it about. Pure: values in, values out.

Which Service has which frontend is decided here; the numbers and slots behind it are in `books`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pointsman import abi
from pointsman.books import Books, Extent, Found, Full, Members
from pointsman.events import Problem
from pointsman.marks import Marks
from pointsman.objects import Ref
from pointsman.outsides import Outsides, Served, guard_of, packets_of, value_of
from pointsman.plan import Config, Garbage, Limits, Plan, Snapshot, pack_frontend
from pointsman.policies import (
    ALGORITHM_MASK,
    AVOID,
    MAGLEV,
    POLICY,
    WEIGHTED,
    ZONE,
    algorithm_of,
    choices,
)
from pointsman.policybook import Policies
from pointsman.shares import normal
from pointsman.tables import Table, Tables, value_of_table
from pointsman.values import Backend, Entry, Frontend, PortName

_pack_service = abi.layouts()["service"].packer(
    "set", "owner", "algorithm", "flags", "packets", "affinity", "key", "outside", "table", "inside"
)


_NONE: Members = ((), (), ())


@dataclass(slots=True)
class _Placed:
    """One frontend in the maps."""

    service: int
    owner: int
    extent: Extent | None
    empty: int
    algorithm: int
    affinity: int
    flags: int
    outside: Served | None = None
    inside: Table | None = None

    def config(self) -> Config:
        packets = self.outside.packets if self.outside else 0
        return Config(self.service, self.owner, self.algorithm, self.affinity, self.flags, packets)


class Planner:
    """Knows what the maps hold once every plan given out was applied.

    When applying failed half-way, read the maps again and start from a new Planner: the path of a
    restart is the one way to recover.
    """

    def __init__(
        self,
        limits: Limits,
        snapshot: Snapshot | None = None,
        inherited: Snapshot | None = None,
        *,
        packets: bool = False,
    ) -> None:
        """`snapshot`: what these maps hold. `inherited`: what the maps before an upgrade hold;
        the numbers in it are kept, because records of live sockets name them. `packets`: whether
        there are programs for packets, which read Maglev tables; else none are made."""
        self._books = Books(limits)
        found = self._books.adopt(snapshot, inherited)
        self._tables = Tables(limits.lines, snapshot.stamps if snapshot else {})
        self._outsides = Outsides(limits, snapshot, self._tables, packets=packets)
        self._policies = Policies(snapshot.policies if snapshot else {})
        self._placed = {
            frontend: _Placed(
                each.service,
                each.element.owner,
                each.extent,
                0 if each.element.count else each.element.first,
                each.element.algorithm,
                each.element.affinity,
                each.element.flags,
                self._outsides.adopt(each.service, each.element, each.outside, found.leftovers),
                self._adopt_inside(each, found.leftovers),
            )
            for frontend, each in found.frontends.items()
        }
        self._tables.sweep(found.leftovers)
        self._outsides.sweep({each.service for each in self._placed.values()}, found.leftovers)
        self._adopted = set(self._placed)
        self._marks = Marks(limits.marks)
        self._found_marks = dict(snapshot.marks) if snapshot else {}
        for frontend in (*self._placed, *found.broken):
            self._marks.add(frontend.address)
        #: Keys whose element made no sense: deleted first, added again a grace period later.
        self._broken = found.broken
        self._leftovers = found.leftovers
        self._claims: dict[Frontend, Ref] = {}
        self._frontends: dict[Ref, tuple[Frontend, ...]] = {}
        self._wanted: dict[Ref, tuple[Entry, ...]] = {}
        #: Services that could not be placed as wanted, and why. Tried again with every plan.
        self.unplaced: dict[Ref, str] = {}

    def _adopt_inside(self, each: Found, leftovers: Plan) -> Table | None:
        if not each.element.inside.count:
            return None
        table = self._tables.adopt(each.element.owner, each.extent, each.element.inside)
        if table is None:
            leftovers.insides.append((each.service, 0))
        return table

    def replace(self, wanted: Mapping[Ref, tuple[Entry, ...]]) -> Plan:
        """The plan that makes `wanted` the whole state: everything else goes."""
        gone = {ref: () for ref in self._wanted if ref not in wanted}
        keep = {entry.frontend for entries in wanted.values() for entry in entries}
        plan, self._leftovers = self._leftovers, Plan()
        found, self._found_marks = self._found_marks, {}
        # Whoever filled the maps before may not have known of marks.
        plan.marks += [
            (index, value | found.get(index, 0))
            for index, value in self._marks.words.items()
            if value & ~found.get(index, 0)
        ]
        broken = tuple(plan.deleted)
        orphans = [frontend for frontend in self._adopted if frontend not in keep]
        # Adopted frontends that stay are claimed by the entries below.
        self._adopted.clear()
        self._update({**gone, **wanted}, plan, orphans)
        for placed in self._placed.values():
            if placed.outside and placed.outside.lost:  # and not written anew, for want of room
                self._outsides.let_go(placed.service, placed.outside, plan)
        # After what was added: an address that has another frontend now keeps its mark.
        for frontend in broken:
            self._unmark(frontend, plan)
        words = self._marks.words
        plan.unmarks += [(i, words.get(i, 0)) for i in found if found[i] & ~words.get(i, 0)]
        self._books.drop_inherited(plan)
        self._policies.keep(self._books.owners, plan)
        return plan

    def update(self, changed: Mapping[Ref, tuple[Entry, ...]]) -> Plan:
        """The plan for Services that changed; no entries means that the Service is gone."""
        plan = Plan()
        self._update(changed, plan, ())
        return plan

    def _update(
        self, changed: Mapping[Ref, tuple[Entry, ...]], plan: Plan, orphans: Iterable[Frontend]
    ) -> None:
        for ref, entries in changed.items():
            if entries:
                self._wanted[ref] = entries
            else:
                self._wanted.pop(ref, None)
        refs = (*self.unplaced, *self._tables.again(), *self._outsides.again(), *changed)
        work = {ref: self._wanted.get(ref, ()) for ref in refs}
        self.unplaced = {}
        dropped: dict[Frontend, _Placed] = {}
        # Frontends that change hands keep their service id: one switch, nothing deleted.
        for ref, entries in work.items():
            keep = {entry.frontend for entry in entries}
            for frontend in self._frontends.get(ref, ()):
                if frontend not in keep:
                    del self._claims[frontend]
                    dropped[frontend] = self._placed[frontend]
            self._frontends[ref] = tuple(f for f in self._frontends.get(ref, ()) if f in keep)
        for frontend in orphans:
            dropped[frontend] = self._placed[frontend]
        for ref, entries in work.items():
            self._place(ref, entries, plan)
            if not self._frontends[ref]:
                del self._frontends[ref]
        for frontend, placed in dropped.items():
            if frontend not in self._claims:
                self._delete(frontend, placed, plan)
        for owner in plan.unnamed:
            self._policies.end(owner, plan)

    def _place(self, ref: Ref, entries: tuple[Entry, ...], plan: Plan) -> None:
        self._tables.forget(ref)
        self._outsides.forget(ref)
        for entry in entries:
            owner = self._claims.get(entry.frontend)
            if owner not in (None, ref):
                self.unplaced[ref] = f"{entry.frontend} belongs to {owner}"
                continue
            if entry.frontend in self._broken:
                self.unplaced[ref] = f"{entry.frontend} was damaged and is being replaced"
                continue
            try:
                placed = self._placed.get(entry.frontend)
                if placed:
                    self._change(ref, placed, entry, plan)
                else:
                    self._add(ref, entry, plan)
            except Full as error:
                self.unplaced[ref] = str(error)
                if placed:
                    self._let_go(placed, entry, plan)
            if owner is None and entry.frontend in self._placed:
                self._claims[entry.frontend] = ref
                self._frontends[ref] = (*self._frontends[ref], entry.frontend)
        self._set_policies(entries, plan)

    def _set_policies(self, entries: Iterable[Entry], plan: Plan) -> None:
        """After these entries were placed, which are all of their owners."""
        wanted = {entry.owner: entry.policy for entry in entries if entry.policy}
        if not wanted and not self._policies:
            return
        found: dict[PortName, list[_Placed]] = {}
        for entry in entries:
            placed = self._placed.get(entry.frontend)
            # Else for want of room, or another Service has it.
            if placed and placed.owner == self._books.owner_id(entry.owner):
                found.setdefault(entry.owner, []).append(placed)
        for name, all_placed in found.items():
            owner = all_placed[0].owner
            if policy := wanted.get(name):
                sets = [_choices(placed.extent) for placed in all_placed]
                self._policies.put(owner, policy, sets, plan)
            elif not any(placed.algorithm & POLICY for placed in all_placed):
                self._policies.end(owner, plan)

    def _let_go(self, placed: _Placed, entry: Entry, plan: Plan) -> None:
        """A frontend that another Service had before refuses rather than reach that one's
        endpoints; its slots become free, too."""
        before = self._books.name_of(placed.owner)
        same = (before.namespace, before.service) == (entry.owner.namespace, entry.owner.service)
        if same:
            return
        if placed.extent:
            plan.sets.append((placed.service, entry.empty))
            if placed.inside:
                plan.insides.append((placed.service, 0))
                self._tables.leave(placed.inside, plan)
                placed.inside = None
            self._books.leave(placed.owner, placed.extent, plan)
            placed.extent, placed.empty = None, entry.empty
        if placed.outside and placed.outside.extent:
            extent = placed.outside.extent
            self._outsides.let_go(placed.service, placed.outside, plan)
            self._books.leave(placed.owner, extent, plan)

    def _add(self, ref: Ref, entry: Entry, plan: Plan) -> None:
        service = self._books.take_service(entry.frontend)
        try:
            wanted = _sets(entry)
            # Most have no outside set: one less to ask for.
            asked = wanted if entry.outside else wanted[:1]
            owner, (extent, *more) = self._books.sets_of(entry.owner, asked, plan)
        except Full:
            self._books.give_back_service(service)
            raise
        self._books.join(owner)
        outside = None
        if entry.outside:
            outside = self._outsides.begin(ref, service, owner, entry.outside, more[0], plan)
        algorithm = algorithm_of(entry)
        inside = self._inside(ref, None, algorithm, owner, extent, plan)
        packed = _pack_service(
            value_of(extent, entry.empty),
            owner,
            algorithm,
            entry.flags,
            outside.packets if outside else 0,
            entry.affinity,
            pack_frontend(entry.frontend),
            outside.set_value if outside else 0,
            outside.table_value if outside else 0,
            value_of_table(inside),
        )
        plan.services.append((service, packed))
        if word := self._marks.add(entry.frontend.address):
            plan.marks.append(word)
        plan.frontends.append((entry.frontend, service))
        self._placed[entry.frontend] = _Placed(
            service,
            owner,
            extent,
            entry.empty,
            algorithm,
            entry.affinity,
            entry.flags,
            outside,
            inside,
        )

    def _inside(
        self,
        ref: Ref,
        before: Table | None,
        algorithm: int,
        owner: int,
        extent: Extent | None,
        plan: Plan,
    ) -> Table | None:
        """The table by which sockets choose, where they do."""
        by_table = algorithm & ALGORITHM_MASK == MAGLEV
        return self._tables.change(ref, before, owner, extent if by_table else None, plan)

    def _change(self, ref: Ref, placed: _Placed, entry: Entry, plan: Plan) -> None:
        config, same_owner = placed.config(), self._books.owner_id(entry.owner) == placed.owner
        owner, want = placed.owner, _sets(entry)
        have = [placed.extent, placed.outside.extent if placed.outside else None]
        asked, after = [], have
        if not (same_owner and _is(have[0], want[0]) and _is(have[1], want[1])):
            asked = [i for i in (0, 1) if not (same_owner and _is(have[i], want[i]))]
            owner, found = self._books.sets_of(
                entry.owner, [want[i] for i in asked], plan, shrinks=_slots(have) > _room(want)
            )
            after = have.copy()
            for i, extent in zip(asked, found, strict=True):
                after[i] = extent
        if value_of(after[0], entry.empty) != value_of(have[0], placed.empty):
            plan.sets.append((placed.service, value_of(after[0], entry.empty)))
        algorithm = algorithm_of(entry)
        inside = self._inside(ref, placed.inside, algorithm, owner, after[0], plan)
        if value_of_table(inside) != value_of_table(placed.inside):
            plan.insides.append((placed.service, value_of_table(inside)))
        placed.inside = inside
        # How many of the endpoints are ejected, the former owner does not say.
        suits = algorithm if owner == config.owner else algorithm & ~AVOID
        guard = config._replace(
            algorithm=_guard_of(config.algorithm, suits),
            packets=guard_of(config.packets, packets_of(entry.outside)),
        )
        if guard != config:
            plan.guards.append(guard)
        placed.outside = self._outsides.change(
            ref, placed.outside, config, owner, entry.outside, after[1], plan
        )
        for i in asked:
            self._books.leave(placed.owner, have[i], plan)
        placed.extent, placed.empty = after[0], entry.empty
        placed.algorithm, placed.affinity, placed.flags = algorithm, entry.affinity, entry.flags
        before, placed.owner = placed.owner, owner
        if (wanted := placed.config()) != config:
            plan.configs.append(wanted)
            if owner != before:
                self._books.join(owner)
                self._books.disown(before, plan)

    def _delete(self, frontend: Frontend, placed: _Placed, plan: Plan) -> None:
        del self._placed[frontend]
        plan.deleted.append(frontend)
        self._unmark(frontend, plan)
        plan.disowned.append(placed.service)
        plan.garbage.services.append(placed.service)
        if placed.outside:
            self._outsides.end(placed.service, placed.outside, plan)
            self._books.leave(placed.owner, placed.outside.extent, plan)
        self._tables.leave(placed.inside, plan)
        self._books.leave(placed.owner, placed.extent, plan)
        self._books.disown(placed.owner, plan)

    def _unmark(self, frontend: Frontend, plan: Plan) -> None:
        if word := self._marks.remove(frontend.address):
            plan.unmarks.append(word)

    def usage(self) -> dict[str, tuple[int, int]]:
        """How many elements are taken, and how many there are, by map."""
        return {**self._books.usage(), **self._tables.usage(), **self._outsides.usage()}

    @property
    def waiting(self) -> bool:
        """Whether something did not fit that is worth another try: more may be free by now."""
        return bool(self.unplaced) or self._tables.waiting or self._outsides.waiting

    def shortages(self) -> tuple[Problem, ...]:
        """What is served, but not as it should be, for want of room."""
        return (*self._tables.problems(), *self._outsides.problems())

    def owner(self, frontend: Frontend) -> tuple[Ref, PortName] | None:
        """The object and the service port that have this frontend now."""
        ref, placed = self._claims.get(frontend), self._placed.get(frontend)
        return (ref, self._books.name_of(placed.owner)) if ref and placed else None

    def endpoints(self, name: PortName) -> dict[Backend, tuple[int, int]]:
        """Endpoint id and generation of each endpoint that a service port has."""
        return self._books.endpoints(name)

    def reclaim(self, garbage: Garbage) -> None:
        """To be called once a grace period has passed since the plan was applied."""
        self._books.reclaim(garbage)
        self._tables.reclaim(garbage)
        self._outsides.reclaim(garbage)
        self._broken.clear()

    def retry(self) -> Plan:
        """Tries again what did not fit, for when room has become free."""
        return self.update({})


def _sets(entry: Entry) -> tuple[Members, Members]:
    """For clients inside and outside of the cluster."""
    inside, outside = (entry.endpoints, entry.places, normal(entry.weights)), entry.outside
    if not outside:
        return inside, _NONE
    return inside, (outside.endpoints, outside.places, normal(outside.weights))


def _is(extent: Extent | None, members: Members) -> bool:
    return not members[0] if extent is None else extent.key == members


def _guard_of(before: int, after: int) -> int:
    """service.algorithm before the sets are switched. Every set has shares, so they are looked at
    as long as weights differ in one of both sets; what passes endpoints over has to suit both."""
    return (before | (after & WEIGHTED)) & (after | ~(AVOID | ZONE))


def _choices(extent: Extent | None) -> int:
    return choices(extent.members, extent.weights) if extent else 0


def _slots(extents: Iterable[Extent | None]) -> int:
    return sum({e.first: len(e.members) for e in extents if e}.values())


def _room(sets: tuple[Members, Members]) -> int:
    inside, outside = sets
    return len(inside[0]) + (len(outside[0]) if outside != inside else 0)
