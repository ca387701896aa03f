"""The pinned maps: written by plans, waited for, taken over. Nothing here knows Kubernetes.

`Datapath` is the seam where tests enter; `Maps` is the real thing.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from pointsman import abi, bpf, maglev
from pointsman.plan import Config, Limits, Plan, Snapshot, pack_frontend
from pointsman.planner import Planner
from pointsman.policies import PolicyElement
from pointsman.ranges import Source, pack
from pointsman.values import Address, Frontend, PortName
from pointsman.view import SETTINGS, View, read_settings

_layouts = abi.layouts()
_service = _layouts["service"]
_pack_name = _layouts["name"].packer("namespace", "service", "port")
_pack_correction = _layouts["correction"].packer("endpoint", "generation", "owner")
_pack_settings = _layouts["settings"].packer(*SETTINGS)
_SET = _service.field("set").offset
_OUTSIDE, _TABLE = _service.field("outside").offset, _service.field("table").offset
_INSIDE = _service.field("inside").offset
_CONFIG = _service.field("owner").offset
_config = struct.Struct("=IBBH")  # owner, algorithm, flags, packets: one 64-bit store
_u32 = struct.Struct("=I")
_u64 = struct.Struct("=Q")
_CORRECTIONS = 192  # MAX_CORRECTIONS of bpf/correct.c
_MINIMUM_PACKET = 64  # an XDP test run wants at least an Ethernet header
_ITEM = _layouts["correction"].size


class Datapath(Protocol):
    """What a plan needs of the kernel. Each call is one step that readers can see."""

    def set_generations(self, items: Sequence[tuple[int, int, int]]) -> None: ...
    def write_slots(self, first: int, data: bytes) -> None: ...
    def write_shares(self, first: int, data: bytes) -> None: ...
    def write_names(self, items: Sequence[tuple[int, PortName]]) -> None: ...
    def write_lines(self, first: int, data: bytes) -> None: ...
    def write_policies(self, items: Sequence[tuple[int, PolicyElement]]) -> None: ...
    def write_service(self, service: int, data: bytes) -> None: ...
    def configure(self, config: Config) -> None: ...
    def switch(self, service: int, value: int) -> None: ...
    def switch_outside(self, service: int, value: int) -> None: ...
    def switch_inside(self, service: int, value: int) -> None: ...
    def switch_table(self, service: int, value: int) -> None: ...
    def admit(self, items: Sequence[tuple[int, Source]]) -> None: ...
    def bar(self, items: Sequence[tuple[int, Source]]) -> None: ...
    def mark(self, items: Sequence[tuple[int, int]]) -> None: ...
    def add_frontends(self, items: Sequence[tuple[Frontend, int]]) -> None: ...
    def delete_frontends(self, frontends: Sequence[Frontend]) -> None: ...
    def delete_names(self, owners: Sequence[int]) -> None: ...
    def wait_for_readers(self) -> None: ...


def apply(plan: Plan, to: Datapath) -> None:
    """Carries out a plan in the order that keeps every lookup right between any two steps.

    Raises OSError and leaves the rest undone: read the maps again then. Does not wait: the plan's
    garbage may be reused after `wait_for_readers`.
    """
    if plan.generations:
        to.set_generations(plan.generations)
    for first, data in plan.slots:
        to.write_slots(first, data)
    for first, data in plan.shares:
        to.write_shares(first, data)
    if plan.names:
        to.write_names(plan.names)
    for first, data in plan.lines:
        to.write_lines(first, data)
    if plan.policies:
        to.write_policies(plan.policies)
    if plan.admitted:
        to.admit(plan.admitted)
    for service, data in plan.services:
        to.write_service(service, data)
    for config in plan.guards:
        to.configure(config)
    if plan.barred:
        to.bar(plan.barred)
    for service, value in plan.sets:
        to.switch(service, value)
    for service, value in plan.outsides:
        to.switch_outside(service, value)
    for service, value in plan.insides:
        to.switch_inside(service, value)
    for service, value in plan.tables:
        to.switch_table(service, value)
    for config in plan.configs:
        to.configure(config)
    if plan.admitted_later:
        to.admit(plan.admitted_later)
    if plan.marks:
        to.mark(plan.marks)
    if plan.frontends:
        to.add_frontends(plan.frontends)
    if plan.deleted:
        to.delete_frontends(plan.deleted)
    if plan.unmarks:
        to.mark(plan.unmarks)
    for service in plan.disowned:
        to.configure(Config(service, 0, 0, 0, 0))
    if plan.policies_later:
        to.write_policies(plan.policies_later)
    if plan.barred_later:
        to.bar(plan.barred_later)
    if plan.unnamed:
        to.delete_names(plan.unnamed)
    if plan.retired:
        to.set_generations([(*each, 0) for each in plan.retired])


class Adoptable(Protocol):
    """What a new agent needs of maps that an earlier one may have left at any point."""

    @property
    def limits(self) -> Limits: ...
    def snapshot(self) -> Snapshot: ...
    def wait_for_readers(self) -> None: ...


def take_over(
    maps: Adoptable, inherited: Snapshot | None = None, *, packets: bool = False
) -> Planner:
    """A planner that knows what the maps hold. Blocks for one grace period first: what a former
    agent unlinked a moment ago is in no snapshot any more, but may still be read. `packets`:
    whether there are programs for packets."""
    maps.wait_for_readers()
    return Planner(maps.limits, maps.snapshot(), inherited, packets=packets)


class Maps(View):
    """The maps of one generation, open for writing. One thread uses it; `wait_for_readers` may be
    called from another."""

    read_only = False
    _services: bpf.Array
    _slots: bpf.Array
    _shares: bpf.Array
    _load: bpf.Array
    _policies: bpf.Array
    _marks: bpf.Array

    def __init__(self, directory: Path, programs: Path) -> None:
        super().__init__(directory)
        self._set_generation = bpf.obj_get(programs / "set_generation")
        self._merge: int | None = None
        if (programs / "merge_load").exists():
            self._merge = bpf.obj_get(programs / "merge_load")
        # Updating a map in a map calls synchronize_rcu(): when the update is back, every program
        # that ran before has ended.
        self._inner = bpf.map_create(2, "grace_inner", 4, 4, 1)
        self._outer = bpf.Map(bpf.map_create(12, "grace", 4, 4, 1, self._inner))

    def _open(self) -> None:
        self._services = bpf.Array(self.map("services"))
        self._slots = bpf.Array(self.map("slots"))
        self._shares = bpf.Array(self.map("shares"))
        self._policies = bpf.Array(self.map("policies"))
        # Written by programs only.
        self._load = bpf.Array(self.map("load"), read_only=True)
        self._marks = bpf.Array(self.map("marks"))

    def close(self) -> None:
        super().close()
        self._marks.close()
        os.close(self._set_generation)
        if self._merge is not None:
            os.close(self._merge)
        os.close(self._inner)
        self._outer.close()

    def wait_for_readers(self) -> None:
        """Returns once every program that was running has ended (tens of milliseconds)."""
        self._outer.update(_u32.pack(0), _u32.pack(self._inner))

    def _correct(self, program: int, items: Sequence[tuple[int, int, int]]) -> None:
        for at in range(0, len(items), _CORRECTIONS):
            data = b"".join(_pack_correction(*item) for item in items[at : at + _CORRECTIONS])
            # Short lists are filled up with the first item again: setting it twice is harmless.
            if len(data) < _MINIMUM_PACKET:
                data += data[:_ITEM] * ((_MINIMUM_PACKET - len(data)) // _ITEM)
            bpf.run(program, data)

    def set_generations(self, items: Sequence[tuple[int, int, int]]) -> None:
        self._correct(self._set_generation, items)

    def merge_load(self) -> None:
        """Adds what the programs before an upgrade counted; a second run adds nothing."""
        if self._merge is not None:
            self._correct(self._merge, [(i, 0, 0) for i in self.generations()])

    def write_slots(self, first: int, data: bytes) -> None:
        self._slots.write(first, data)

    def write_shares(self, first: int, data: bytes) -> None:
        self._shares.write(first, data)

    def write_policies(self, items: Sequence[tuple[int, PolicyElement]]) -> None:
        for owner, element in items:
            words = list(enumerate(element.words))
            # What ejects stands in the first word: it comes last and goes first.
            for index, word in reversed(words) if element.policy.watch else words:
                self._policies.store_u64(owner, 8 * index, word)

    def write_names(self, items: Sequence[tuple[int, PortName]]) -> None:
        keys = b"".join(_u32.pack(owner) for owner, _ in items)
        values = b"".join(_pack_name(*(part.encode() for part in name)) for _, name in items)
        self._all("names", self.map("names").update_batch(keys, values), len(items))

    def write_lines(self, first: int, data: bytes) -> None:
        count = len(data) // maglev.LINE
        keys = struct.pack(f"={count}I", *range(first, first + count))
        self._all("maglev", self.map("maglev").update_batch(keys, data), count)

    def write_service(self, service: int, data: bytes) -> None:
        self._services.write(service, data)

    def configure(self, config: Config) -> None:
        service, owner, algorithm, affinity, flags, packets = config
        at = service * self._services.stride + _service.field("affinity").offset
        self._services.memory[at : at + 4] = _u32.pack(affinity)
        word = _u64.unpack(_config.pack(owner, algorithm, flags, packets))[0]
        self._services.store_u64(service, _CONFIG, word)

    def set_host_netns(self, cookie: int) -> None:
        """The host's network namespace; 0 if it is not known."""
        self._set(host_netns=cookie)

    def refuse(self, cidrs: Sequence[tuple[Address, Address]]) -> None:
        """Unused addresses of these (address, mask) pairs, MAX_CIDRS at most, are refused."""
        if self.settings()["cidrs"] != tuple(cidrs):
            # One after the other: a reader may see the half of a write.
            self._set(cidrs=0)
            self._set(cidr=b"".join(address + mask for address, mask in cidrs))
            self._set(cidrs=len(cidrs))

    def skip(self, namespaces: frozenset[int]) -> None:
        """Makes these network namespaces (cookies) the ones whose sockets are left alone."""
        skipped = self.map("skipped_netns")
        before = {_u64.unpack(key)[0] for key, _ in skipped.items()}
        for cookie in namespaces - before:
            skipped.update(_u64.pack(cookie), _u32.pack(1))
        self._set(skipped=len(namespaces))
        for cookie in before - namespaces:
            skipped.delete(_u64.pack(cookie))

    def _set(self, **fields: Any) -> None:
        """Writes these fields of the settings; the others stay."""
        raw = self.map("settings").lookup(_u32.pack(0)) or b""
        values = dict(zip(SETTINGS, read_settings(raw), strict=True))
        self.map("settings").update(_u32.pack(0), _pack_settings(*{**values, **fields}.values()))

    def switch(self, service: int, value: int) -> None:
        self._services.store_u64(service, _SET, value)

    def switch_outside(self, service: int, value: int) -> None:
        self._services.store_u64(service, _OUTSIDE, value)

    def switch_inside(self, service: int, value: int) -> None:
        self._services.store_u64(service, _INSIDE, value)

    def switch_table(self, service: int, value: int) -> None:
        self._services.store_u64(service, _TABLE, value)

    def admit(self, items: Sequence[tuple[int, Source]]) -> None:
        keys = b"".join(pack(*item) for item in items)
        done = self.map("source_ranges").update_batch(keys, _u32.pack(1) * len(items))
        self._all("source_ranges", done, len(items))

    def bar(self, items: Sequence[tuple[int, Source]]) -> None:
        self.map("source_ranges").delete_batch(b"".join(pack(*item) for item in items))

    def mark(self, items: Sequence[tuple[int, int]]) -> None:
        for index, value in items:
            self._marks.store_u64(index, 0, value)

    def add_frontends(self, items: Sequence[tuple[Frontend, int]]) -> None:
        keys = b"".join(pack_frontend(frontend) for frontend, _ in items)
        values = b"".join(_u32.pack(service) for _, service in items)
        # The planner never adds a key that is there: writing over one can show a reader another
        # key's value. A batch can't be told BPF_NOEXIST (EINVAL).
        self._all("frontends", self.map("frontends").update_batch(keys, values), len(items))

    def delete_frontends(self, frontends: Sequence[Frontend]) -> None:
        self.map("frontends").delete_batch(b"".join(map(pack_frontend, frontends)))

    def delete_names(self, owners: Sequence[int]) -> None:
        self.map("names").delete_batch(b"".join(map(_u32.pack, owners)))

    @staticmethod
    def _all(name: str, done: int, wanted: int) -> None:
        if done != wanted:
            raise OSError(28, f"{name}: {done} of {wanted} elements were written, no room for more")
