"""A strict stand-in for the pinned maps: refuses what the kernel, or the rules, would not allow."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace

from pointsman import abi, maglev
from pointsman.marks import bit_of
from pointsman.plan import RETIRED, Config, Element, Limits, Run, Snapshot
from pointsman.policies import PolicyElement
from pointsman.ranges import Source, holds
from pointsman.shares import normal
from pointsman.values import Address, Backend, Frontend, PortName, endpoint_text
from tests.support.choice import Share, share_of, weights_in_effect

_layouts, _constants = abi.layouts(), abi.constants()
_read_slot = _layouts["slot"].reader("addr", "port", "endpoint", "generation", "owner", "flags")
_read_service = _layouts["service"].reader(
    "set", "owner", "algorithm", "flags", "packets", "affinity", "key", "outside", "table", "inside"
)
_read_key = _layouts["frontend_key"].reader("addr", "port", "proto")
_OUTSIDE, _LOCAL, _RANGES = (
    _constants[f"PACKETS_{name}"] for name in ("OUTSIDE", "LOCAL", "RANGES")
)

Slot = tuple[Backend, int, int, int, int]  # backend, endpoint id, generation, owner, SLOT_…


class FakeDatapath:
    """The maps as Python values. `on_step` is called after every single write.

    `readers` says what a program that still runs may hold: slots and ids that were unlinked and
    for which `wait_for_readers` has not been called since. Touching one is an error.
    """

    def __init__(self, limits: Limits, on_step: Callable[[], None] = lambda: None) -> None:
        self.limits = limits
        self.on_step = on_step
        self.words: dict[int, int] = {}
        self.frontends: dict[Frontend, int] = {}
        self.services: dict[int, Element] = {}
        self.slots: dict[int, Slot] = {}
        self.shares: dict[int, Share] = {}
        self.policies: dict[int, PolicyElement] = {}
        self.load: dict[int, int] = {}  # endpoint id → generation
        self.names: dict[int, PortName] = {}
        self.lines: dict[int, bytes] = {}
        self.ranges: dict[int, set[Source]] = {}
        self.held_lines: set[int] = set()
        self.held_slots: set[int] = set()
        self.held_services: set[int] = set()
        self.held_endpoints: set[int] = set()
        self.fail_after: int | None = None  # writes until an injected ENOMEM

    def _step(self) -> None:
        if self.fail_after is not None:
            if self.fail_after == 0:
                raise OSError(errno.ENOMEM, "injected")
            self.fail_after -= 1

    # -- Datapath ----------------------------------------------------------------------------

    def set_generations(self, items: Sequence[tuple[int, int, int]]) -> None:
        for endpoint, generation, _owner in items:
            self._step()
            assert 0 < endpoint < self.limits.endpoints, f"endpoint id {endpoint} out of range"
            if generation & RETIRED:
                self.held_endpoints.add(endpoint)
            elif self.load.get(endpoint) != generation:
                before = self.load.get(endpoint, RETIRED)
                assert before & RETIRED, f"endpoint {endpoint} reused while not retired"
                assert endpoint not in self.held_endpoints, f"endpoint {endpoint} reused early"
                assert generation > before & ~RETIRED, f"endpoint {endpoint}: generation repeats"
            self.load[endpoint] = generation
            self.on_step()

    def write_slots(self, first: int, data: bytes) -> None:
        self._step()
        size = _layouts["slot"].size
        assert len(data) % size == 0, "half a slot"
        for i in range(len(data) // size):
            index = first + i
            assert 0 <= index < self.limits.slots, f"slot {index} out of range"
            assert index not in self.held_slots, f"slot {index} reused early"
            assert index not in self._used_slots(), f"slot {index} rewritten in use"
            address, port, endpoint, generation, owner, place = _read_slot(data, i * size)
            assert self.load.get(endpoint) == generation, "slot points to another generation"
            backend = address, socket.ntohs(port)
            self.slots[index] = (backend, endpoint, generation, owner, place)
        self.on_step()

    def write_shares(self, first: int, data: bytes) -> None:
        self._step()
        size = _layouts["share"].size
        assert len(data) % size == 0, "half a share"
        for i in range(len(data) // size):
            index = first + i
            assert index not in self.held_slots, f"share {index} reused early"
            assert index not in self._used_slots(), f"share {index} rewritten in use"
            self.shares[index] = share_of(data, i * size)
        self.on_step()

    def write_policies(self, items: Sequence[tuple[int, PolicyElement]]) -> None:
        for owner, element in items:
            self._step()
            assert 0 < owner < self.limits.services
            assert owner in self.names or element == PolicyElement(), f"owner {owner} has no name"
            self.policies[owner] = element
            self.on_step()

    def write_lines(self, first: int, data: bytes) -> None:
        self._step()
        assert len(data) % maglev.LINE == 0, "half a line"
        used = set().union(*(_all_lines(self.services[i]) for i in self.frontends.values()))
        for i in range(len(data) // maglev.LINE):
            index = first + i
            assert 0 <= index < self.limits.lines, f"line {index} out of range"
            assert index not in self.held_lines, f"line {index} reused early"
            assert index not in used, f"line {index} rewritten in use"
            self.lines[index] = data[i * maglev.LINE : (i + 1) * maglev.LINE]
        self.on_step()

    def admit(self, items: Sequence[tuple[int, Source]]) -> None:
        for service, source in items:
            self._step()
            assert service not in self.held_services, f"ranges of service {service} reused early"
            assert source not in self.ranges.get(service, ()), f"{source} is there already"
            if sum(map(len, self.ranges.values())) >= self.limits.ranges:
                raise OSError(errno.ENOSPC, "source_ranges is full")
            self.ranges.setdefault(service, set()).add(source)
            self.on_step()

    def bar(self, items: Sequence[tuple[int, Source]]) -> None:
        for service, source in items:
            self._step()
            self.ranges[service].remove(source)
            if not self.ranges[service]:
                del self.ranges[service]
            self.on_step()

    def write_names(self, items: Sequence[tuple[int, PortName]]) -> None:
        self._step()
        for owner, name in items:
            assert 0 < owner < self.limits.services
            assert owner not in self.names, f"owner {owner} has a name already"
            self.names[owner] = name
        self.on_step()

    def write_service(self, service: int, data: bytes) -> None:
        self._step()
        assert 0 < service < self.limits.services, f"service {service} out of range"
        assert service not in self.held_services, f"service {service} reused early"
        assert service not in self.frontends.values(), f"service {service} rewritten in use"
        value, owner, algorithm, flags, packets, affinity, key, *more = _read_service(data)
        outside, table, inside = map(Run.of, more)
        address, port, protocol = _read_key(key)
        frontend = Frontend(address, socket.ntohs(port), protocol)
        self._check_set(Run.of(value))
        self._check_set(outside)
        self._check_table(table)
        self._check_table(inside)
        assert packets & _OUTSIDE or not (packets or more[0] or more[1]), "not served outside"
        self.services[service] = Element(
            frontend,
            owner,
            *Run.of(value),
            algorithm,
            affinity,
            flags,
            packets,
            outside,
            table,
            inside,
        )
        self.on_step()

    def configure(self, config: Config) -> None:
        self._step()
        service, owner, algorithm, affinity, flags, packets = config
        old = self.services[service]
        if owner == 0:
            assert service not in self.frontends.values(), f"service {service} disowned in use"
            self.held_services.add(service)
            self._unlink(old)
        else:
            assert owner in self.names, f"owner {owner} has no name"
        self.services[service] = replace(
            old, owner=owner, algorithm=algorithm, affinity=affinity, flags=flags, packets=packets
        )
        self.on_step()

    def switch(self, service: int, value: int) -> None:
        self._step()
        old, new = self.services[service], Run.of(value)
        self._check_set(new)
        self.services[service] = replace(old, first=new.first, count=new.count)
        self._unlink(old)
        self.on_step()

    def switch_outside(self, service: int, value: int) -> None:
        self._step()
        old, new = self.services[service], Run.of(value)
        self._check_set(new)
        self.services[service] = replace(old, outside=new)
        self._unlink(old)
        self.on_step()

    def switch_table(self, service: int, value: int) -> None:
        self._step()
        old, new = self.services[service], Run.of(value)
        self._check_table(new)
        self.services[service] = replace(old, table=new)
        self._unlink(old)
        self.on_step()

    def switch_inside(self, service: int, value: int) -> None:
        self._step()
        old, new = self.services[service], Run.of(value)
        self._check_table(new)
        self.services[service] = replace(old, inside=new)
        self._unlink(old)
        self.on_step()

    def mark(self, items: Sequence[tuple[int, int]]) -> None:
        for index, value in items:
            self._step()
            self.words[index] = value
            for frontend in self.frontends:
                assert self.marked(frontend), f"{frontend} is in use and not marked"
            self.on_step()

    def marked(self, frontend: Frontend) -> bool:
        bit = bit_of(frontend.address, self.limits.marks)
        return bool(self.words.get(bit >> 6, 0) >> (bit & 63) & 1)

    def add_frontends(self, items: Sequence[tuple[Frontend, int]]) -> None:
        for frontend, service in items:
            self._step()
            assert frontend not in self.frontends, f"{frontend}: a value is rewritten"
            assert self.marked(frontend), f"{frontend} is added before its mark"
            assert self.services[service].frontend == frontend, f"{frontend}: key copy differs"
            if len(self.frontends) >= self.limits.services:
                raise OSError(errno.E2BIG, "frontends is full")
            self.frontends[frontend] = service
            self.on_step()

    def delete_frontends(self, frontends: Sequence[Frontend]) -> None:
        for frontend in frontends:
            self._step()
            del self.frontends[frontend]
            self.on_step()

    def delete_names(self, owners: Sequence[int]) -> None:
        self._step()
        for owner in owners:
            del self.names[owner]
        self.on_step()

    def wait_for_readers(self) -> None:
        self.held_slots.clear()
        self.held_lines.clear()
        self.held_services.clear()
        self.held_endpoints.clear()

    # -- what readers see --------------------------------------------------------------------

    def resolve(self, frontend: Frontend) -> tuple[tuple[Backend, ...], int] | None:
        """As bpf/lookup.h does: (endpoints, answer of an empty set); None = not a Service."""
        service = self.frontends.get(frontend)
        if service is None or self.services[service].frontend != frontend:
            return None
        element = self.services[service]
        return self._members(frontend, Run(element.first, element.count))

    def weights(self, frontend: Frontend) -> tuple[int, ...]:
        """As draw() of bpf/choose.h takes them: () if all are alike."""
        element = self.services[self.frontends[frontend]]
        shares = [self.shares[element.first + i] for i in range(element.count)]
        return weights_in_effect(element.algorithm, shares)

    def policy(self, frontend: Frontend) -> PolicyElement | None:
        """What policies say of it, if anything is asked of them."""
        element = self.services[self.frontends[frontend]]
        if not element.algorithm & _constants["CHOICE_POLICY"]:
            return None
        return self.policies.get(element.owner, PolicyElement())

    def algorithm(self, frontend: Frontend) -> int:
        return self.services[self.frontends[frontend]].algorithm

    def _members(self, frontend: Frontend, run: Run) -> tuple[tuple[Backend, ...], int]:
        if not run.count:
            return (), run.first
        found = []
        for index in range(run.first, run.first + run.count):
            backend, endpoint, generation, *_ = self.slots[index]
            assert self.load[endpoint] == generation, f"{frontend}: endpoint {endpoint} is retired"
            found.append(backend)
        return tuple(found), 0

    def resolve_outside(
        self, frontend: Frontend, client: Address
    ) -> tuple[tuple[Backend, ...], int] | str | None:
        """The same for a client outside, as bpf/select.h does: "barred" if he is in no range of
        those that there are."""
        service = self.frontends.get(frontend)
        if service is None or self.services[service].frontend != frontend:
            return None
        element = self.services[service]
        if not element.packets & _OUTSIDE:
            return None
        if element.packets & _RANGES and not holds(self.ranges.get(service, ()), client):
            return "barred"
        found = self._members(frontend, element.outside)
        if element.packets & _LOCAL:
            elsewhere = _constants["SLOT_ELSEWHERE"]
            run = element.outside
            assert all(
                self.slots[i][4] != elsewhere for i in range(run.first, run.first + run.count)
            ), f"{frontend}: an endpoint of another node keeps the client's address"
        return found

    def table(self, frontend: Frontend) -> tuple[int, ...]:
        """The entries of its Maglev table; () if it has none."""
        return self._entries(self.services[self.frontends[frontend]].table)

    def inside(self, frontend: Frontend) -> tuple[int, ...]:
        """The same of the one for sockets."""
        return self._entries(self.services[self.frontends[frontend]].inside)

    def _entries(self, run: Run) -> tuple[int, ...]:
        data = b"".join(self.lines[i] for i in _lines(run))
        return tuple(memoryview(data).cast("H")[: run.count])

    def state(self) -> dict[Frontend, tuple[tuple[Backend, ...], int]]:
        found = {frontend: self.resolve(frontend) for frontend in self.frontends}
        return {frontend: value for frontend, value in found.items() if value is not None}

    def snapshot(self) -> Snapshot:
        owned = {i: e for i, e in self.services.items() if e.owner}
        runs = {run for e in owned.values() for run in e.runs}
        slots = {r: [self.slots[i] for i in range(r.first, r.first + r.count)] for r in runs}
        places = {r: tuple(slot[4] for slot in found) for r, found in slots.items()}
        weights = {r: normal([self.shares[r.first + i][2] for i in range(r.count)]) for r in runs}
        words = {index: value for index, value in self.words.items() if value}
        return Snapshot(
            dict(self.frontends),
            owned,
            dict(self.names),
            {r: tuple(slot[:3] for slot in found) for r, found in slots.items()},
            dict(self.load),
            words,
            {r: found for r, found in places.items() if any(found)},
            {
                run: self.lines[max(_lines(run))][-maglev.STAMP :]
                for e in owned.values()
                for run in e.tables
            },
            {service: frozenset(sources) for service, sources in self.ranges.items()},
            {r: found for r, found in weights.items() if found},
            {
                owner: each._replace(policy=replace(each.policy, most_percent=0))
                for owner, each in self.policies.items()
                if any(each.words)
            },
        )

    def dump(self) -> str:
        """Sorted text, for people and for comparing."""
        lines = []
        for frontend, (backends, empty) in sorted(self.state().items()):
            owner = self.names[self.services[self.frontends[frontend]].owner]
            what = (
                " ".join(endpoint_text(*backend) for backend in backends)
                or ("refused", "unreachable")[empty]
            )
            lines.append(f"{frontend} {owner} → {what}")
        return "\n".join(lines)

    def _used_slots(self) -> set[int]:
        return {
            index
            for service in self.frontends.values()
            for run in self.services[service].runs
            for index in range(run.first, run.first + run.count)
        }

    def _check_set(self, run: Run) -> None:
        for index in range(run.first, run.first + run.count if run.count else 0):
            assert index in self.slots, f"set reaches slot {index}, which was never written"
            assert index in self.shares, f"set reaches share {index}, which was never written"

    def _check_table(self, run: Run) -> None:
        for index in _lines(run):
            assert index in self.lines, f"table reaches line {index}, which was never written"

    def _unlink(self, old: Element) -> None:
        for run in old.runs:
            self.held_slots.update(range(run.first, run.first + run.count))
        self.held_lines.update(_all_lines(old))


def _all_lines(element: Element) -> set[int]:
    return {line for table in element.tables for line in _lines(table)}


def _lines(table: Run) -> range:
    return range(table.first, table.first + maglev.lines_of(table.count))
