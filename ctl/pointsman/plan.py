"""From what should be to the writes that bring it about. Pure: values in, values out.

A `Plan` is a list of writes in the order that keeps every lookup right at each point between two
of them: new endpoints → new slots → new services → switch sets → add frontends → delete frontends
→ retire endpoints → (grace period) → reuse. Nothing that a program may still read is reused before
`reclaim` is called with the plan's garbage.
"""

from __future__ import annotations

import socket
from array import array
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pointsman import abi
from pointsman.extents import Extents
from pointsman.objects import Ref
from pointsman.values import Backend, Entry, Frontend, PortName

_layouts = abi.layouts()
_pack_key = _layouts["frontend_key"].packer("addr", "port", "proto")
_pack_slot = _layouts["slot"].packer("addr", "port", "endpoint", "generation", "owner")
_service = _layouts["service"]
_pack_service = _service.packer("set", "owner", "algorithm", "affinity", "key")
RETIRED = abi.constants()["GENERATION_RETIRED"]
_htons = socket.htons


def pack_frontend(frontend: Frontend) -> bytes:
    return _pack_key(frontend.address, _htons(frontend.port), frontend.protocol)


@dataclass(frozen=True, slots=True)
class Limits:
    """How many elements each map has. Index 0 of services and names is never used."""

    services: int = 65536
    slots: int = 131072
    endpoints: int = 65536


@dataclass(slots=True)
class Garbage:
    """What may be reused once a grace period has passed."""

    extents: list[tuple[int, int]] = field(default_factory=list)  # (first slot, count)
    endpoints: list[int] = field(default_factory=list)
    services: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.extents or self.endpoints or self.services or self.owners)

    def extend(self, other: Garbage) -> None:
        self.extents += other.extents
        self.endpoints += other.endpoints
        self.services += other.services
        self.owners += other.owners


@dataclass(slots=True)
class Plan:
    """Writes, in order. Each list is one step; within a list the order does not matter."""

    generations: list[tuple[int, int]] = field(default_factory=list)  # endpoint id, generation
    slots: list[tuple[int, bytes]] = field(default_factory=list)  # first slot, packed slots
    names: list[tuple[int, PortName]] = field(default_factory=list)  # owner id
    services: list[tuple[int, bytes]] = field(default_factory=list)  # service id, whole element
    configs: list[tuple[int, int, int, int]] = field(default_factory=list)
    sets: list[tuple[int, int]] = field(default_factory=list)  # service id, count << 32 | first
    frontends: list[tuple[Frontend, int]] = field(default_factory=list)  # added, service id
    deleted: list[Frontend] = field(default_factory=list)
    disowned: list[int] = field(default_factory=list)  # services no longer in use
    unnamed: list[int] = field(default_factory=list)  # owner ids
    retired: list[tuple[int, int]] = field(default_factory=list)  # endpoint id, generation | bit
    garbage: Garbage = field(default_factory=Garbage)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class Element:
    """One element of `services` as it stands in the map."""

    frontend: Frontend
    owner: int
    first: int
    count: int
    algorithm: int
    affinity: int


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot as it stands in the map."""

    backend: Backend
    endpoint: int
    generation: int
    owner: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the maps hold, as read at start.

    `slots` gives, for each set in use (first, count), its endpoints: (backend, endpoint id,
    generation). `generations` holds every endpoint id's, 0 where it was never used.
    """

    frontends: Mapping[Frontend, int]
    services: Mapping[int, Element]
    names: Mapping[int, PortName]
    slots: Mapping[tuple[int, int], tuple[tuple[Backend, int, int], ...]]
    generations: Mapping[int, int]


class Full(Exception):
    """A map has no room for this. The message names the map, its size and the option."""


@dataclass(slots=True)
class _Extent:
    first: int
    members: tuple[Backend, ...]
    users: int = 0


@dataclass(slots=True)
class _Placed:
    """One frontend in the maps."""

    service: int
    owner: int
    extent: _Extent | None
    empty: int
    algorithm: int
    affinity: int


class _Ids:
    """Numbers 1 … size-1; the ones given back longest ago are used again first."""

    def __init__(self, size: int, used: Iterable[int] = ()) -> None:
        taken = set(used)
        self._next = max(taken, default=0) + 1
        self._size = size
        self._free = deque(i for i in range(1, self._next) if i not in taken)

    def take(self) -> int | None:
        if self._next < self._size:
            self._next += 1
            return self._next - 1
        return self._free.popleft() if self._free else None

    def free(self, numbers: Iterable[int]) -> None:
        self._free.extend(numbers)


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
        self.limits = limits
        self._placed: dict[Frontend, _Placed] = {}
        self._owners: dict[PortName, int] = {}
        self._names: dict[int, PortName] = {}  # the same, the other way round
        self._users: dict[int, int] = {}  # owner id → frontends
        self._extents: dict[tuple[int, tuple[Backend, ...]], _Extent] = {}
        self._endpoints: dict[int, dict[Backend, int]] = {}  # owner id → endpoint ids
        self._claims: dict[Frontend, Ref] = {}
        self._frontends: dict[Ref, tuple[Frontend, ...]] = {}
        self._wanted: dict[Ref, tuple[Entry, ...]] = {}
        # Of each endpoint id. Arrays: there may be a hundred thousand of them.
        self._generations = array("I", bytes(4 * limits.endpoints))  # 0: never used
        self._uses = array("I", bytes(4 * limits.endpoints))  # extents that it is in
        #: Services that could not be placed as wanted, and why. Tried again with every plan.
        self.unplaced: dict[Ref, str] = {}
        self._leftovers = Plan()
        self._adopted: set[Frontend] = set()
        #: Keys whose element made no sense: deleted first, added again a grace period later.
        self._broken: set[Frontend] = set()
        # Numbers to give again to what had them before the upgrade.
        self._old_services: dict[Frontend, int] = {}
        self._old_owners: dict[PortName, int] = {}
        self._old_endpoints: dict[tuple[PortName, Backend], tuple[int, int]] = {}
        self._adopt(snapshot or Snapshot({}, {}, {}, {}, {}), inherited)

    # -- what the maps hold ------------------------------------------------------------------

    def _adopt(self, snapshot: Snapshot, inherited: Snapshot | None) -> None:
        """Takes over what a former agent left. What nothing refers to is swept by the first plan:
        its memory is given back after a grace period like everything else."""
        for ident, generation in snapshot.generations.items():
            self._generations[ident] = generation & ~RETIRED
        taken: dict[int, tuple[int, Backend]] = {}  # endpoint id → what it stands for
        runs: list[tuple[int, int]] = []
        at = 0
        valid: dict[tuple[int, int], bool] = {}
        for first, count in sorted(snapshot.slots):
            valid[first, count] = first >= at and first + count <= self.limits.slots
            if valid[first, count]:
                runs.append((first, count))
                at = first + count
        for frontend, service in snapshot.frontends.items():
            element = snapshot.services.get(service)
            name = snapshot.names.get(element.owner) if element else None
            if not element or element.frontend != frontend or not name:
                self._broken.add(frontend)
                continue
            extent = None
            key = (element.first, element.count)
            if element.count:
                if not valid.get(key) or not self._adopt_set(
                    element, snapshot.slots[key], snapshot.generations, taken
                ):
                    self._broken.add(frontend)
                    continue
                members = tuple(backend for backend, _, _ in snapshot.slots[key])
                extent = self._extents[element.owner, members]
                extent.users += 1
            self._owners[name] = element.owner
            self._names[element.owner] = name
            self._users[element.owner] = self._users.get(element.owner, 0) + 1
            self._placed[frontend] = _Placed(
                service,
                element.owner,
                extent,
                0 if element.count else element.first,
                element.algorithm,
                element.affinity,
            )
            self._adopted.add(frontend)
        if inherited:
            self._inherit(snapshot, inherited)
        self._slots = Extents(self.limits.slots, runs)
        # Everything the snapshot shows in use is out of reach until a grace period has passed.
        used_services = set(snapshot.services) | set(snapshot.frontends.values())
        self._service_ids = _Ids(
            self.limits.services, used_services | set(self._old_services.values())
        )
        self._owner_ids = _Ids(
            self.limits.services, set(snapshot.names) | set(self._old_owners.values())
        )
        # An id that was retired already has rested: the grace period before this snapshot was its.
        busy = (i for i, g in snapshot.generations.items() if g and not g & RETIRED)
        # Those of another `load` are retired in this one by the first plan.
        other = (
            (i for i in inherited.generations if i not in snapshot.generations) if inherited else ()
        )
        size = self.limits.endpoints
        self._endpoint_ids = _Ids(size, (i for i in (*busy, *other) if i < size))
        self._sweep(snapshot, runs, used_services, taken)

    def _inherit(self, snapshot: Snapshot, inherited: Snapshot) -> None:
        limits = self.limits
        used = {*snapshot.services, *snapshot.frontends.values()}
        for frontend, service in inherited.frontends.items():
            element = inherited.services.get(service)
            if not element or element.owner not in inherited.names:
                continue
            name = inherited.names[element.owner]
            if service < limits.services and service not in used:
                self._old_services[frontend] = service
            if element.owner < limits.services and element.owner not in snapshot.names:
                self._old_owners[name] = element.owner
            for backend, ident, generation in inherited.slots.get(
                (element.first, element.count), ()
            ):
                if ident < limits.endpoints and generation == inherited.generations.get(ident):
                    self._old_endpoints[name, backend] = (ident, generation)
        kept = {ident for ident, _ in self._old_endpoints.values()}
        for ident, generation in inherited.generations.items():
            if not generation or ident >= limits.endpoints:
                continue
            if not self._generations[ident]:
                self._generations[ident] = generation & ~RETIRED
            if ident not in kept and ident not in snapshot.generations:
                # A record may still name it: it must not look like a number never used.
                self._leftovers.retired.append((ident, generation | RETIRED))
                self._leftovers.garbage.endpoints.append(ident)

    def _drop_inherited(self, plan: Plan) -> None:
        """What was not taken up again by the first complete state is free like everything else."""
        plan.garbage.services += self._old_services.values()
        plan.garbage.owners += self._old_owners.values()
        for ident, generation in self._old_endpoints.values():
            plan.retired.append((ident, generation | RETIRED))
            plan.garbage.endpoints.append(ident)
        self._old_services, self._old_owners, self._old_endpoints = {}, {}, {}

    def _adopt_set(
        self,
        element: Element,
        members: tuple[tuple[Backend, int, int], ...],
        generations: Mapping[int, int],
        taken: dict[int, tuple[int, Backend]],
    ) -> bool:
        """Whether this set is whole: each endpoint id stands for one backend of one owner, with
        the generation that `load` has. Anything else is rebuilt."""
        key = (element.owner, tuple(backend for backend, _, _ in members))
        if key in self._extents:
            return self._extents[key].first == element.first
        for backend, ident, generation in members:
            if taken.get(ident, (element.owner, backend)) != (element.owner, backend):
                return False
            if generations.get(ident) != generation:
                return False
        mine = self._endpoints.setdefault(element.owner, {})
        for backend, ident, _ in members:
            taken[ident] = (element.owner, backend)
            mine[backend] = ident
            self._uses[ident] += 1
        self._extents[key] = _Extent(element.first, key[1])
        return True

    def _sweep(
        self,
        snapshot: Snapshot,
        runs: list[tuple[int, int]],
        used_services: set[int],
        taken: Mapping[int, object],
    ) -> None:
        kept = {placed.service for placed in self._placed.values()}
        live = {(e.first, len(e.members)) for e in self._extents.values()}
        garbage, leftovers = self._leftovers.garbage, self._leftovers
        leftovers.deleted += self._broken
        orphans = sorted(used_services - kept)
        leftovers.disowned += [i for i in orphans if i in snapshot.services]
        garbage.services += orphans
        garbage.extents += [run for run in runs if run not in live]
        leftovers.unnamed += [i for i in snapshot.names if i not in self._users]
        garbage.owners += leftovers.unnamed
        kept_ids = {*taken, *(ident for ident, _ in self._old_endpoints.values())}
        for ident, generation in snapshot.generations.items():
            if generation and not generation & RETIRED and ident not in kept_ids:
                leftovers.retired.append((ident, generation | RETIRED))
                garbage.endpoints.append(ident)

    # -- planning ----------------------------------------------------------------------------

    def replace(self, wanted: Mapping[Ref, tuple[Entry, ...]]) -> Plan:
        """The plan that makes `wanted` the whole state: everything else goes."""
        gone = {ref: () for ref in self._wanted if ref not in wanted}
        keep = {entry.frontend for entries in wanted.values() for entry in entries}
        plan, self._leftovers = self._leftovers, Plan()
        orphans = [frontend for frontend in self._adopted if frontend not in keep]
        # Adopted frontends that stay are claimed by the entries below.
        self._adopted.clear()
        self._update({**gone, **wanted}, plan, orphans)
        self._drop_inherited(plan)
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
            if owner is None and entry.frontend in self._placed:
                self._claims[entry.frontend] = ref
                self._frontends[ref] = (*self._frontends[ref], entry.frontend)

    def _add(self, entry: Entry, plan: Plan) -> None:
        service = self._old_services.pop(entry.frontend, None) or self._service_ids.take()
        if service is None:
            raise Full(f"services is full ({self.limits.services}); raise --max-services")
        try:
            owner, extent = self._set_of(entry, plan)
        except Full:
            self._service_ids.free([service])
            raise
        self._users[owner] += 1
        value = _set(extent, entry.empty)
        packed = _pack_service(
            value, owner, entry.algorithm, entry.affinity, pack_frontend(entry.frontend)
        )
        plan.services.append((service, packed))
        plan.frontends.append((entry.frontend, service))
        self._placed[entry.frontend] = _Placed(
            service, owner, extent, entry.empty, entry.algorithm, entry.affinity
        )

    def _change(self, placed: _Placed, entry: Entry, plan: Plan) -> None:
        before, owner_before = placed.extent, placed.owner
        same_owner = self._owners.get(entry.owner) == owner_before
        if same_owner and (before.members if before else ()) == entry.endpoints:
            owner, after = owner_before, before
        else:
            owner, after = self._set_of(entry, plan)
        if after is not before or (after is None and placed.empty != entry.empty):
            plan.sets.append((placed.service, _set(after, entry.empty)))
            placed.extent = after
            self._leave(owner_before, before, plan)
        if (owner, entry.algorithm, entry.affinity) != (
            owner_before,
            placed.algorithm,
            placed.affinity,
        ):
            plan.configs.append((placed.service, owner, entry.algorithm, entry.affinity))
            if owner != owner_before:
                self._users[owner] += 1
                self._disown(owner_before, plan)
        placed.owner, placed.empty = owner, entry.empty
        placed.algorithm, placed.affinity = entry.algorithm, entry.affinity

    def _delete(self, frontend: Frontend, placed: _Placed, plan: Plan) -> None:
        del self._placed[frontend]
        plan.deleted.append(frontend)
        plan.disowned.append(placed.service)
        plan.garbage.services.append(placed.service)
        self._leave(placed.owner, placed.extent, plan)
        self._disown(placed.owner, plan)

    def _owner(self, name: PortName, plan: Plan) -> int:
        owner = self._owners.get(name)
        if owner is None:
            owner = self._old_owners.pop(name, None) or self._owner_ids.take()
            if owner is None:
                raise Full(f"names is full ({self.limits.services}); raise --max-services")
            self._owners[name] = owner
            self._names[owner] = name
            self._users[owner] = 0
            plan.names.append((owner, name))
        return owner

    def _disown(self, owner: int, plan: Plan) -> None:
        self._users[owner] -= 1
        if not self._users[owner]:
            self._forget(owner, plan)

    def _forget(self, owner: int, plan: Plan) -> None:
        del self._users[owner]
        del self._owners[self._names.pop(owner)]
        plan.unnamed.append(owner)
        plan.garbage.owners.append(owner)

    def _set_of(self, entry: Entry, plan: Plan) -> tuple[int, _Extent | None]:
        """The owner id and the slots of an entry; what it took is given back if it raises Full."""
        owner = self._owner(entry.owner, plan)
        try:
            return owner, self._extent(owner, entry.endpoints, plan)
        except Full:
            if not self._users[owner]:
                self._forget(owner, plan)
            raise

    def _extent(self, owner: int, members: tuple[Backend, ...], plan: Plan) -> _Extent | None:
        """The slots of these endpoints for this owner: shared by all its frontends."""
        if not members:
            return None
        key = (owner, members)
        extent = self._extents.get(key)
        if extent is None:
            first = self._slots.take(len(members))
            if first is None:
                raise Full(
                    f"slots is full ({self.limits.slots}, {self._slots.available} free, "
                    f"{len(members)} wanted in one run); raise --max-slots"
                )
            mine = self._endpoints.setdefault(owner, {})
            new = [backend for backend in members if backend not in mine]
            if not self._new_endpoints(owner, new, plan):
                self._slots.free(first, len(members))
                if not mine:
                    del self._endpoints[owner]
                raise Full(
                    f"load is full ({self.limits.endpoints} endpoints); raise --max-endpoints"
                )
            packed = []
            for backend in members:
                ident = mine[backend]
                self._uses[ident] += 1
                address, port = backend
                generation = self._generations[ident]
                packed.append(_pack_slot(address, _htons(port), ident, generation, owner))
            plan.slots.append((first, b"".join(packed)))
            extent = self._extents[key] = _Extent(first, members)
        extent.users += 1
        return extent

    def _new_endpoints(self, owner: int, new: list[Backend], plan: Plan) -> bool:
        """Ids for backends that this owner did not have; False, and nothing done, without room."""
        mine, name, old = self._endpoints[owner], self._names[owner], self._old_endpoints
        found: list[tuple[int, int]] = []
        taken: list[int] = []
        for backend in new:
            if old and (known := old.pop((name, backend), None)):
                found.append(known)
                continue
            ident = self._endpoint_ids.take()
            if ident is None:
                self._endpoint_ids.free(taken)
                return False
            taken.append(ident)
            generation = self._generations[ident] + 1
            found.append((ident, generation if generation < RETIRED else 1))
        for backend, (ident, generation) in zip(new, found, strict=True):
            self._generations[ident] = generation
            mine[backend] = ident
        plan.generations += found
        return True

    def _leave(self, owner: int, extent: _Extent | None, plan: Plan) -> None:
        if extent is None:
            return
        extent.users -= 1
        if extent.users:
            return
        del self._extents[owner, extent.members]
        plan.garbage.extents.append((extent.first, len(extent.members)))
        mine = self._endpoints[owner]
        for backend in extent.members:
            ident = mine[backend]
            self._uses[ident] -= 1
            if not self._uses[ident]:
                del mine[backend]
                plan.retired.append((ident, self._generations[ident] | RETIRED))
                plan.garbage.endpoints.append(ident)
        if not mine:
            del self._endpoints[owner]

    def reclaim(self, garbage: Garbage) -> None:
        """To be called once a grace period has passed since the plan was applied."""
        for first, count in garbage.extents:
            self._slots.free(first, count)
        self._endpoint_ids.free(garbage.endpoints)
        self._service_ids.free(garbage.services)
        self._owner_ids.free(garbage.owners)
        self._broken.clear()

    def retry(self) -> Plan:
        """Tries again what did not fit, for when room has become free."""
        return self.update({})

    def used(self) -> dict[str, int]:
        """Elements in use by map, garbage not counted."""
        endpoints = sum(len(mine) for mine in self._endpoints.values())
        return {
            "services": len(self._placed),
            "slots": sum(len(e.members) for e in self._extents.values()),
            "endpoints": endpoints,
        }


def _set(extent: _Extent | None, empty: int) -> int:
    return len(extent.members) << 32 | extent.first if extent else empty
