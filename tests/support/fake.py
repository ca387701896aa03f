"""A strict stand-in for the pinned maps: refuses what the kernel, or the rules, would not allow."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace

from pointsman import abi
from pointsman.marks import bit_of
from pointsman.plan import RETIRED, Config, Element, Limits, Snapshot
from pointsman.values import Backend, Frontend, PortName, endpoint_text

_layouts = abi.layouts()
_read_slot = _layouts["slot"].reader("addr", "port", "endpoint", "generation", "owner")
_read_service = _layouts["service"].reader("set", "owner", "algorithm", "flags", "affinity", "key")
_read_key = _layouts["frontend_key"].reader("addr", "port", "proto")

Slot = tuple[Backend, int, int, int]  # backend, endpoint id, generation, owner


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
        self.load: dict[int, int] = {}  # endpoint id → generation
        self.names: dict[int, PortName] = {}
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

    def set_generations(self, items: Sequence[tuple[int, int]]) -> None:
        for endpoint, generation in items:
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
            address, port, endpoint, generation, owner = _read_slot(data, i * size)
            assert self.load.get(endpoint) == generation, "slot points to another generation"
            self.slots[index] = ((address, socket.ntohs(port)), endpoint, generation, owner)
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
        value, owner, algorithm, flags, affinity, key = _read_service(data)
        address, port, protocol = _read_key(key)
        frontend = Frontend(address, socket.ntohs(port), protocol)
        self._check_set(value)
        self.services[service] = Element(
            frontend, owner, value & 0xFFFFFFFF, value >> 32, algorithm, affinity, flags
        )
        self.on_step()

    def configure(self, config: Config) -> None:
        self._step()
        service, owner, algorithm, affinity, flags = config
        old = self.services[service]
        if owner == 0:
            assert service not in self.frontends.values(), f"service {service} disowned in use"
            self.held_services.add(service)
            self._unlink(old)
        else:
            assert owner in self.names, f"owner {owner} has no name"
        self.services[service] = Element(
            old.frontend, owner, old.first, old.count, algorithm, affinity, flags
        )
        self.on_step()

    def switch(self, service: int, value: int) -> None:
        self._step()
        old = self.services[service]
        self._check_set(value)
        self.services[service] = replace(old, first=value & 0xFFFFFFFF, count=value >> 32)
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
        self.held_services.clear()
        self.held_endpoints.clear()

    # -- what readers see --------------------------------------------------------------------

    def resolve(self, frontend: Frontend) -> tuple[tuple[Backend, ...], int] | None:
        """As bpf/lookup.h does: (endpoints, answer of an empty set); None = not a Service."""
        service = self.frontends.get(frontend)
        if service is None or self.services[service].frontend != frontend:
            return None
        element = self.services[service]
        if not element.count:
            return (), element.first
        found = []
        for index in range(element.first, element.first + element.count):
            backend, endpoint, generation, _ = self.slots[index]
            assert self.load[endpoint] == generation, f"{frontend}: endpoint {endpoint} is retired"
            found.append(backend)
        return tuple(found), 0

    def state(self) -> dict[Frontend, tuple[tuple[Backend, ...], int]]:
        found = {frontend: self.resolve(frontend) for frontend in self.frontends}
        return {frontend: value for frontend, value in found.items() if value is not None}

    def snapshot(self) -> Snapshot:
        owned = {i: e for i, e in self.services.items() if e.owner}
        sets = {
            (e.first, e.count): tuple(self.slots[i][:3] for i in range(e.first, e.first + e.count))
            for e in owned.values()
            if e.count
        }
        words = {index: value for index, value in self.words.items() if value}
        return Snapshot(dict(self.frontends), owned, dict(self.names), sets, dict(self.load), words)

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
            for index in range(
                self.services[service].first,
                self.services[service].first + self.services[service].count,
            )
        }

    def _check_set(self, value: int) -> None:
        first, count = value & 0xFFFFFFFF, value >> 32
        for index in range(first, first + count):
            assert index in self.slots, f"set reaches slot {index}, which was never written"

    def _unlink(self, old: Element) -> None:
        self.held_slots.update(range(old.first, old.first + old.count))
