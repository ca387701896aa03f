"""The books of the maps: which numbers, slots and endpoints are whose. Pure.

What a plan unlinks is in its garbage, and out of reach here until `reclaim` is called with it: a
program may still read it.
"""

from __future__ import annotations

import socket
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat

from pointsman import abi, shares
from pointsman.allocate import Extents, Ids
from pointsman.plan import RETIRED, Element, Garbage, Limits, Plan, Run, Snapshot
from pointsman.values import Backend, Frontend, PortName

_pack_slot = abi.layouts()["slot"].packer(
    "addr", "port", "flags", "endpoint", "generation", "owner"
)
_htons = socket.htons
_NOTHING = Snapshot({}, {}, {}, {}, {})

#: Endpoints, where each is (() where nobody asks), and their weights (() if all are alike).
Members = tuple[tuple[Backend, ...], tuple[int, ...], tuple[int, ...]]


class Full(Exception):
    """A map has no room for this. The message names the map, its size and the option."""


@dataclass(slots=True)
class Extent:
    """A run of slots with the endpoints in it, shared by all frontends of one owner. A set and
    an outside set with the same members are one."""

    first: int
    members: tuple[Backend, ...]
    places: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()
    users: int = 0

    @property
    def key(self) -> Members:
        return self.members, self.places, self.weights


@dataclass(slots=True)
class Found:
    """One frontend that a former agent left, with its sets; `outside` is None also if that set is
    not whole."""

    service: int
    element: Element
    extent: Extent | None
    outside: Extent | None


@dataclass(slots=True)
class Adopted:
    """What a former agent left: frontends in order; keys whose element made no sense; and the plan
    that sweeps what nothing refers to."""

    frontends: dict[Frontend, Found] = field(default_factory=dict)
    broken: set[Frontend] = field(default_factory=set)
    leftovers: Plan = field(default_factory=Plan)


class Books:
    """One owner id for each service port, one endpoint id for each (service port, address), one
    run of slots for each set of endpoints. Methods add to a plan what has to be written."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._reserve = limits.slots // 64
        self._owners: dict[PortName, int] = {}
        self._names: dict[int, PortName] = {}  # the same, the other way round
        self._users: dict[int, int] = {}  # owner id → frontends
        self._extents: dict[tuple[int, *Members], Extent] = {}
        self._endpoints: dict[int, dict[Backend, int]] = {}  # owner id → endpoint ids
        # Of each endpoint id. Arrays: there may be a hundred thousand of them.
        self._generations = array("I", bytes(4 * limits.endpoints))  # 0: never used
        self._uses = array("I", bytes(4 * limits.endpoints))  # extents that it is in
        # Numbers to give again to what had them before an upgrade.
        self._old_services: dict[Frontend, int] = {}
        self._old_owners: dict[PortName, int] = {}
        self._old_endpoints: dict[tuple[PortName, Backend], tuple[int, int]] = {}

    def usage(self) -> dict[str, tuple[int, int]]:
        """What is taken of each map, and how much there is; what waits for a grace period counts
        as taken."""
        limits, slots = self.limits, self.limits.slots
        return {
            "frontends": (self._service_ids.taken, limits.services),
            "services": (self._service_ids.taken, limits.services),
            "names": (self._owner_ids.taken, limits.services),
            "slots": (slots - self._slots.available, slots),
            "load": (self._endpoint_ids.taken, limits.endpoints),
        }

    # -- starting from what the maps hold ------------------------------------------------------

    def adopt(self, snapshot: Snapshot | None, inherited: Snapshot | None) -> Adopted:
        """Takes over what a former agent left (`snapshot`), and the numbers of the maps before an
        upgrade (`inherited`). To be called once, first."""
        snapshot, found = snapshot or _NOTHING, Adopted()
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
                found.broken.add(frontend)
                continue
            sets = (Run(element.first, element.count), element.outside)
            extent, outside = (
                self._adopt_set(element.owner, run, snapshot, taken) if valid.get(run) else None
                for run in sets
            )
            if element.count and extent is None:
                found.broken.add(frontend)
                if outside and not outside.users:
                    self._drop_set(element.owner, outside, taken)
                continue
            for each in (extent, outside):
                if each:
                    each.users += 1
            self._owners[name] = element.owner
            self._names[element.owner] = name
            self._users[element.owner] = self._users.get(element.owner, 0) + 1
            found.frontends[frontend] = Found(service, element, extent, outside)
        if inherited:
            self._inherit(snapshot, inherited, taken, found.leftovers)
        self._slots = Extents(self.limits.slots, runs)
        # Everything the snapshot shows in use is out of reach until a grace period has passed.
        # A service id whose ranges were written, and nothing else before a crash, is in use, too.
        used_services = {*snapshot.services, *snapshot.frontends.values()}
        used_services |= {i for i in snapshot.ranges if 0 < i < self.limits.services}
        self._service_ids = Ids(
            self.limits.services, used_services | set(self._old_services.values())
        )
        self._owner_ids = Ids(
            self.limits.services, set(snapshot.names) | set(self._old_owners.values())
        )
        # An id that was retired already has rested: the grace period before this snapshot was its.
        busy = (i for i, g in snapshot.generations.items() if g and not g & RETIRED)
        # Those of another `load` are retired in this one by the first plan.
        other = (
            (i for i in inherited.generations if i not in snapshot.generations) if inherited else ()
        )
        size = self.limits.endpoints
        self._endpoint_ids = Ids(size, (i for i in (*busy, *other) if i < size))
        self._sweep(snapshot, runs, used_services, taken, found)
        return found

    def _inherit(
        self,
        snapshot: Snapshot,
        inherited: Snapshot,
        taken: Mapping[int, object],
        leftovers: Plan,
    ) -> None:
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
            # `load` names the owner: one that it knows already has to have the same number.
            same = self._owners.get(name, self._old_owners.get(name)) == element.owner
            members = (m for run in element.runs for m in inherited.slots.get(run, ()))
            for backend, ident, generation in members:
                # A start before this one may have given it out in these maps already.
                if (
                    ident < limits.endpoints
                    and ident not in taken
                    and (same or ident not in snapshot.generations)
                    and generation == inherited.generations.get(ident)
                    and generation == snapshot.generations.get(ident, generation)
                ):
                    self._old_endpoints[name, backend] = (ident, generation)
        kept = {ident for ident, _ in self._old_endpoints.values()}
        for ident, generation in inherited.generations.items():
            if not generation or ident >= limits.endpoints:
                continue
            if not self._generations[ident]:
                self._generations[ident] = generation & ~RETIRED
            if ident not in kept and ident not in snapshot.generations:
                # A record may still name it: it must not look like a number never used.
                leftovers.retired.append((ident, generation | RETIRED))
                leftovers.garbage.endpoints.append(ident)

    def drop_inherited(self, plan: Plan) -> None:
        """What was not taken up again by the first complete state is free like everything else."""
        plan.garbage.services += self._old_services.values()
        plan.garbage.owners += self._old_owners.values()
        for ident, generation in self._old_endpoints.values():
            plan.retired.append((ident, generation | RETIRED))
            plan.garbage.endpoints.append(ident)
        self._old_services, self._old_owners, self._old_endpoints = {}, {}, {}

    def _adopt_set(
        self,
        owner: int,
        run: Run,
        snapshot: Snapshot,
        taken: dict[int, tuple[int, Backend]],
    ) -> Extent | None:
        """The slots of this run if they are whole: each endpoint id stands for one backend of one
        owner, with the generation that `load` has. Anything else is rebuilt."""
        members = snapshot.slots[run]
        key = (
            owner,
            tuple(backend for backend, _, _ in members),
            snapshot.places.get(run, ()),
            snapshot.weights.get(run, ()),
        )
        if extent := self._extents.get(key):
            return extent if extent.first == run.first else None
        known = self._endpoints.get(owner, {})
        if any(known.get(backend, ident) != ident for backend, ident, _ in members):
            return None  # half of a change of owner: another id stands for that endpoint already
        for backend, ident, generation in members:
            if taken.get(ident, (owner, backend)) != (owner, backend):
                return None
            if snapshot.generations.get(ident) != generation:
                return None
        mine = self._endpoints.setdefault(owner, {})
        for backend, ident, _ in members:
            taken[ident] = (owner, backend)
            mine[backend] = ident
            self._uses[ident] += 1
        extent = self._extents[key] = Extent(run.first, *key[1:])
        return extent

    def _drop_set(self, owner: int, extent: Extent, taken: dict[int, tuple[int, Backend]]) -> None:
        """Takes an adoption back: the frontend is broken in another way."""
        del self._extents[owner, *extent.key]
        mine = self._endpoints[owner]
        for backend in extent.members:
            ident = mine[backend]
            self._uses[ident] -= 1
            if not self._uses[ident]:
                del mine[backend], taken[ident]

    def _sweep(
        self,
        snapshot: Snapshot,
        runs: list[tuple[int, int]],
        used_services: set[int],
        taken: Mapping[int, object],
        found: Adopted,
    ) -> None:
        """What nothing refers to goes with the first plan, and is given back after a grace period
        like everything else."""
        kept = {each.service for each in found.frontends.values()}
        live = {(e.first, len(e.members)) for e in self._extents.values()}
        leftovers, garbage = found.leftovers, found.leftovers.garbage
        leftovers.deleted += found.broken
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

    # -- owners and their sets -----------------------------------------------------------------

    def take_service(self, frontend: Frontend) -> int:
        """A number for a new frontend. Raises Full."""
        service = self._old_services.pop(frontend, None) or self._service_ids.take()
        if service is None:
            raise Full(f"services is full ({self.limits.services}); raise --max-services")
        return service

    def give_back_service(self, service: int) -> None:
        """One that no plan mentions."""
        self._service_ids.free([service])

    def owner_id(self, name: PortName) -> int | None:
        return self._owners.get(name)

    def name_of(self, owner: int) -> PortName:
        return self._names[owner]

    def endpoints(self, name: PortName) -> dict[Backend, tuple[int, int]]:
        """Endpoint id and generation of each endpoint of a service port."""
        mine = self._endpoints.get(self._owners.get(name, 0), {})
        return {backend: (ident, self._generations[ident]) for backend, ident in mine.items()}

    @property
    def owners(self) -> Collection[int]:
        return self._names.keys()

    def join(self, owner: int) -> None:
        """One frontend more belongs to this owner."""
        self._users[owner] += 1

    def sets_of(
        self, name: PortName, wanted: Sequence[Members], plan: Plan, *, shrinks: bool = False
    ) -> tuple[int, list[Extent | None]]:
        """The owner id and the slots of each set; what it took is given back if it raises Full.
        What `shrinks` may use a part of the map kept back for that: it gives back more than it
        takes."""
        owner = self._owner(name, plan)
        try:
            return owner, self._sets(owner, wanted, 0 if shrinks else self._reserve, plan)
        except Full:
            if not self._users[owner]:
                # Made a moment ago, and nothing has seen it: free without a grace period.
                plan.names.pop()
                del self._users[owner], self._owners[self._names.pop(owner)]
                self._owner_ids.free([owner])
            raise

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

    def disown(self, owner: int, plan: Plan) -> None:
        self._users[owner] -= 1
        if not self._users[owner]:
            self._forget(owner, plan)

    def _forget(self, owner: int, plan: Plan) -> None:
        del self._users[owner]
        del self._owners[self._names.pop(owner)]
        plan.unnamed.append(owner)
        plan.garbage.owners.append(owner)

    def _sets(
        self, owner: int, wanted: Sequence[Members], reserve: int, plan: Plan
    ) -> list[Extent | None]:
        """The slots of these endpoints for this owner: shared by all its frontends."""
        found: list[Extent | None] = []
        fresh: list[Extent] = []
        for key in wanted:
            members = key[0]
            if not members:
                found.append(None)
                continue
            extent = self._extents.get((owner, *key))
            if extent is None:  # new, as a set and an outside set that are alike
                extent = next((e for e in fresh if e.key == key), None)
            if extent is None:
                first = self._run_of(len(members), reserve, fresh)
                extent = Extent(first, *key)
                fresh.append(extent)
            found.append(extent)
        if fresh:
            self._fill(owner, fresh, plan)
        for extent in found:
            if extent:
                extent.users += 1
        return found

    def _run_of(self, count: int, reserve: int, fresh: Sequence[Extent]) -> int:
        """Raises Full, and gives back the slots of `fresh`, if there is no room."""
        room = self._slots.available - reserve >= count
        first = self._slots.take(count) if room else None
        if first is None:
            free = max(self._slots.available - reserve, 0)
            self._give_back(fresh)
            raise Full(
                f"slots is full ({self.limits.slots}, {free} free, {count} wanted in one run); "
                "raise --max-slots"
            )
        return first

    def _give_back(self, fresh: Sequence[Extent]) -> None:
        """Slots that no plan mentions."""
        for extent in fresh:
            self._slots.free(extent.first, len(extent.members))

    def _fill(self, owner: int, fresh: Sequence[Extent], plan: Plan) -> None:
        """Endpoint ids for new sets, and their slots. Raises Full and gives the slots back."""
        mine = self._endpoints.setdefault(owner, {})
        new = [b for extent in fresh for b in extent.members if b not in mine]
        if len(fresh) > 1:
            new = list(dict.fromkeys(new))
        if not self._new_endpoints(owner, new, plan):
            self._give_back(fresh)
            if not mine:
                del self._endpoints[owner]
            raise Full(f"load is full ({self.limits.endpoints} endpoints); raise --max-endpoints")
        for extent in fresh:
            packed = []
            for backend, place in zip(extent.members, extent.places or repeat(0), strict=False):
                ident = mine[backend]
                self._uses[ident] += 1
                address, port = backend
                generation = self._generations[ident]
                packed.append(_pack_slot(address, _htons(port), place, ident, generation, owner))
            plan.slots.append((extent.first, b"".join(packed)))
            # Also where all are alike: who looks at weights a moment too early finds no others'.
            plan.shares.append((extent.first, shares.packed(extent.weights, len(packed))))
            self._extents[owner, *extent.key] = extent

    def _new_endpoints(self, owner: int, new: list[Backend], plan: Plan) -> bool:
        """Ids for backends that this owner did not have; False, and nothing done, without room."""
        mine, name, old = self._endpoints[owner], self._names[owner], self._old_endpoints
        found: list[tuple[int, int]] = []
        taken: list[int] = []
        for backend in new:
            if known := old.get((name, backend)):
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
            old.pop((name, backend), None)
        plan.generations += [(*each, owner) for each in found]
        return True

    def leave(self, owner: int, extent: Extent | None, plan: Plan) -> None:
        """One frontend less uses these slots; with the last one they and their endpoints go."""
        if extent is None:
            return
        extent.users -= 1
        if extent.users:
            return
        del self._extents[owner, *extent.key]
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
