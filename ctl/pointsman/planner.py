"""From what should be to a plan that brings it about. Pure: values in, values out.

Which Service has which frontend is decided here; the numbers and slots behind it are in `books`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pointsman import abi
from pointsman.books import Books, Extent, Full
from pointsman.marks import Marks
from pointsman.objects import Ref
from pointsman.plan import Config, Garbage, Limits, Plan, Snapshot, pack_frontend
from pointsman.values import Entry, Frontend, PortName

_pack_service = abi.layouts()["service"].packer(
    "set", "owner", "algorithm", "flags", "affinity", "key"
)


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

    def config(self) -> Config:
        return Config(self.service, self.owner, self.algorithm, self.affinity, self.flags)


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
    ) -> None:
        """`snapshot`: what these maps hold. `inherited`: what the maps before an upgrade hold;
        the numbers in it are kept, because records of live sockets name them."""
        self._books = Books(limits)
        found = self._books.adopt(snapshot, inherited)
        self._placed = {
            frontend: _Placed(
                service,
                element.owner,
                extent,
                0 if element.count else element.first,
                element.algorithm,
                element.affinity,
                element.flags,
            )
            for frontend, (service, element, extent) in found.frontends.items()
        }
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
        # After what was added: an address that has another frontend now keeps its mark.
        for frontend in broken:
            self._unmark(frontend, plan)
        words = self._marks.words
        plan.unmarks += [(i, words.get(i, 0)) for i in found if found[i] & ~words.get(i, 0)]
        self._books.drop_inherited(plan)
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
        work = {ref: self._wanted.get(ref, ()) for ref in (*self.unplaced, *changed)}
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

    def _place(self, ref: Ref, entries: tuple[Entry, ...], plan: Plan) -> None:
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
                    self._change(placed, entry, plan)
                else:
                    self._add(entry, plan)
            except Full as error:
                self.unplaced[ref] = str(error)
                if placed:
                    self._let_go(placed, entry, plan)
            if owner is None and entry.frontend in self._placed:
                self._claims[entry.frontend] = ref
                self._frontends[ref] = (*self._frontends[ref], entry.frontend)

    def _let_go(self, placed: _Placed, entry: Entry, plan: Plan) -> None:
        """A frontend that another Service had before refuses rather than reach that one's
        endpoints; its slots become free, too."""
        before = self._books.name_of(placed.owner)
        same = (before.namespace, before.service) == (entry.owner.namespace, entry.owner.service)
        if same or placed.extent is None:
            return
        plan.sets.append((placed.service, entry.empty))
        self._books.leave(placed.owner, placed.extent, plan)
        placed.extent, placed.empty = None, entry.empty

    def _add(self, entry: Entry, plan: Plan) -> None:
        service = self._books.take_service(entry.frontend)
        try:
            owner, extent = self._books.set_of(entry, None, plan)
        except Full:
            self._books.give_back_service(service)
            raise
        self._books.join(owner)
        value = _set(extent, entry.empty)
        packed = _pack_service(
            value,
            owner,
            entry.algorithm,
            entry.flags,
            entry.affinity,
            pack_frontend(entry.frontend),
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
            entry.algorithm,
            entry.affinity,
            entry.flags,
        )

    def _change(self, placed: _Placed, entry: Entry, plan: Plan) -> None:
        before, owner_before = placed.extent, placed.owner
        same_owner = self._books.owner_id(entry.owner) == owner_before
        if same_owner and (before.members if before else ()) == entry.endpoints:
            owner, after = owner_before, before
        else:
            owner, after = self._books.set_of(entry, before, plan)
        if after is not before or (after is None and placed.empty != entry.empty):
            plan.sets.append((placed.service, _set(after, entry.empty)))
            placed.extent = after
            self._books.leave(owner_before, before, plan)
        config = Config(placed.service, owner, entry.algorithm, entry.affinity, entry.flags)
        if config != placed.config():
            plan.configs.append(config)
            if owner != owner_before:
                self._books.join(owner)
                self._books.disown(owner_before, plan)
        placed.owner, placed.empty = owner, entry.empty
        placed.algorithm, placed.affinity, placed.flags = config[2:]

    def _delete(self, frontend: Frontend, placed: _Placed, plan: Plan) -> None:
        del self._placed[frontend]
        plan.deleted.append(frontend)
        self._unmark(frontend, plan)
        plan.disowned.append(placed.service)
        plan.garbage.services.append(placed.service)
        self._books.leave(placed.owner, placed.extent, plan)
        self._books.disown(placed.owner, plan)

    def _unmark(self, frontend: Frontend, plan: Plan) -> None:
        if word := self._marks.remove(frontend.address):
            plan.unmarks.append(word)

    def usage(self) -> dict[str, tuple[int, int]]:
        """How many elements are taken, and how many there are, by map."""
        return self._books.usage()

    def owner(self, frontend: Frontend) -> tuple[Ref, PortName] | None:
        """The object and the service port that have this frontend now."""
        ref, placed = self._claims.get(frontend), self._placed.get(frontend)
        return (ref, self._books.name_of(placed.owner)) if ref and placed else None

    def reclaim(self, garbage: Garbage) -> None:
        """To be called once a grace period has passed since the plan was applied."""
        self._books.reclaim(garbage)
        self._broken.clear()

    def retry(self) -> Plan:
        """Tries again what did not fit, for when room has become free."""
        return self.update({})


def _set(extent: Extent | None, empty: int) -> int:
    return len(extent.members) << 32 | extent.first if extent else empty
