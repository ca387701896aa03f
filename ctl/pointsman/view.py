"""The pinned maps, read whole and decoded: what the reading commands and a new agent see."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pointsman import abi, bpf, btf, maglev
from pointsman.decisions import COUNTED
from pointsman.errors import LayoutMismatch, NotLoaded
from pointsman.marks import bit_of
from pointsman.outcomes import Outcomes, outcomes_of
from pointsman.plan import Element, Limits, Run, Slot, Snapshot, pack_frontend
from pointsman.policies import NO_POLICY, POLICY_BYTES, PolicyElement, ejected_in, ejected_of
from pointsman.ranges import Source, unpack
from pointsman.shares import USUAL, normal
from pointsman.values import Address, Backend, Frontend, PortName

_layouts = abi.layouts()
_SERVICE_FIELDS = ("set", "owner", "algorithm", "flags", "affinity", "key")
#: What maps of a version without programs for packets do not have.
_PACKET_FIELDS = ("packets", "outside", "table")
#: What those of a version with one algorithm do not have; `load`, too.
_CHOICE_FIELDS = ("inside",)
_LOAD_FIELDS = ("owner", "latency", "measured", "until", "window", "streak")
_SLOT_FIELDS = ("addr", "port", "endpoint", "generation", "owner", "flags")
_read_key = _layouts["frontend_key"].reader("addr", "port", "proto")
_read_name = _layouts["name"].reader("namespace", "service", "port")
SETTINGS = ("host_netns", "skipped", "cidrs", "cidr")
read_settings = _layouts["settings"].reader(*SETTINGS)
#: The struct of each array's elements, and the field that is read for all elements at once.
_VALUES = {"services": "service", "slots": "slot", "load": "load"}
_COLUMNS = {"services": "owner", "slots": "owner", "load": "generation"}
_read_share = _layouts["share"].reader("weight")
_NAME = _layouts["name"].field("namespace").size
_CHUNK = 2048  # elements of an array that are decoded at once: a fraction of a millisecond
_u32 = struct.Struct("=I")
_line = struct.Struct(f"={maglev.PER_LINE}H")
_u64 = struct.Struct("=Q")
#: Index into `counters` by name.
COUNTERS = {
    name.removeprefix("COUNTER_").lower(): index
    for name, index in abi.constants().items()
    if name.startswith("COUNTER_")
}


def sums(counters: bpf.Map, names: Mapping[str, int]) -> dict[str, int]:
    """The elements of a per-CPU array at these indexes, each summed over all CPUs."""
    size = 8 * bpf.possible_cpus()
    return {
        name: sum(n for (n,) in _u64.iter_unpack(counters.lookup(_u32.pack(index), size) or b""))
        for name, index in names.items()
    }


def frontend_of(key: bytes) -> Frontend:
    address, port, protocol = _read_key(key)
    return Frontend(address, socket.ntohs(port), protocol)


def port_name_of(value: bytes) -> PortName:
    return PortName(*(part.rstrip(b"\0").decode() for part in _read_name(value)))


def _padded(part: str) -> bytes:
    """As it stands in struct name."""
    return part.encode().ljust(_NAME, b"\0")


class View:
    """The maps of one generation, opened read-only: all that the reading commands need."""

    read_only = True
    _services: bpf.Copy | bpf.Array
    _slots: bpf.Copy | bpf.Array
    _load: bpf.Copy | bpf.Array
    _shares: bpf.Copy | bpf.Array | None

    def __init__(self, directory: Path, packets: Path | None = None) -> None:
        """`packets`: where maps are that are not in `directory`."""
        self.directory, self.packets = directory, packets or directory
        self._maps: dict[str, bpf.Map] = {}
        self._moved: dict[str, abi.Layout] = {}
        try:
            self._open()
            self._owner_at, self._read_service = self._reader("services", *_SERVICE_FIELDS)
            self._read_packets = self._later_reader("services", _PACKET_FIELDS)
            self._read_choice = self._later_reader("services", _CHOICE_FIELDS)
            _, self._read_slot = self._reader("slots", *_SLOT_FIELDS)
            self._generation_at, self._read_load = self._reader("load", "generation", "open")
            self._read_outcomes = self._later_reader("load", _LOAD_FIELDS)
        except FileNotFoundError:
            raise NotLoaded(
                f"no maps under {directory}; run 'pointsman up', or 'pointsman load' first"
            ) from None

    def _open(self) -> None:
        self._services = bpf.Copy(self.map("services"))
        self._slots = bpf.Copy(self.map("slots"))
        self._load = bpf.Copy(self.map("load"))
        self._shares = self._copy_of("shares")

    def _copy_of(self, name: str) -> bpf.Copy | None:
        """None where a version without weights and policies made the maps."""
        with contextlib.suppress(FileNotFoundError):
            return bpf.Copy(self.map(name))
        return None

    @cached_property
    def _policies(self) -> bpf.Copy | bpf.Array | None:
        return self._copy_of("policies")

    def _reader(self, name: str, *fields: str) -> tuple[int, Callable[..., tuple[Any, ...]]]:
        """A decoder of these fields as this very map has them (an older version may have pinned
        it), and the offset of the field in _COLUMNS."""
        layout = self._layout(name)
        try:
            return layout.field(_COLUMNS[name]).offset, layout.reader(*fields)
        except KeyError as error:
            raise LayoutMismatch(
                f"{self._path(name)}: the pinned map has no field {error}; run 'pointsman unload'"
            ) from None

    def _layout(self, name: str) -> abi.Layout:
        """Of an array's elements, as this very map has them."""
        if name not in self._moved:
            info = self.map(name).info
            layout = _layouts[_VALUES[name]]
            if info.btf_value_type_id:
                members = btf.members(bpf.btf(info.btf_id), info.btf_value_type_id)
                layout = layout.moved(dict(members), info.value_size)
            self._moved[name] = layout
        return self._moved[name]

    def _later_reader(self, name: str, fields: Sequence[str]) -> Callable[..., tuple[Any, ...]]:
        """For fields that the maps of an older version lack: zeros then."""
        try:
            return self._reader(name, *fields)[1]
        except LayoutMismatch:
            return lambda _memory, _at: (0,) * len(fields)

    def map(self, name: str) -> bpf.Map:
        """One of the maps, by the name it has in bpf/maps.h. Raises FileNotFoundError."""
        if name not in self._maps:
            self._maps[name] = bpf.Map.open(self._path(name), read_only=self.read_only)
        return self._maps[name]

    def _path(self, name: str) -> Path:
        path = self.directory / name
        return path if path.exists() else self.packets / name

    @property
    def names_of_maps(self) -> list[str]:
        maps = (path for each in (self.directory, self.packets) for path in each.iterdir())
        return sorted({path.name for path in maps})

    @property
    def mapped_bytes(self) -> int:
        """Memory of the arrays; mapped, it counts as resident although no page was touched."""
        return sum(len(array.memory) for array in self._arrays)

    @property
    def _arrays(self) -> list[bpf.Copy | bpf.Array]:
        policies = self.__dict__.get("_policies")
        found = (self._services, self._slots, self._load, self._shares, policies)
        return [array for array in found if array]

    @property
    def limits(self) -> Limits:
        return Limits(
            self._services.entries,
            self._slots.entries,
            self._load.entries,
            self.map("marks").info.max_entries,
            self.map("maglev").info.max_entries,
            self.map("source_ranges").info.max_entries,
        )

    def close(self) -> None:
        for array in self._arrays:
            array.close()
        for opened in self._maps.values():
            opened.close()

    # -- elements ----------------------------------------------------------------------------

    def frontends(self) -> dict[Frontend, int]:
        """Every frontend with its service id."""
        return {
            frontend_of(key): _u32.unpack(value)[0] for key, value in self.map("frontends").items()
        }

    def find(self, frontend: Frontend) -> int | None:
        """The service id of exactly this key."""
        value = self.map("frontends").lookup(pack_frontend(frontend))
        return None if value is None else int(_u32.unpack(value)[0])

    def names(self) -> dict[int, PortName]:
        return {
            _u32.unpack(key)[0]: port_name_of(value) for key, value in self.map("names").items()
        }

    def service(self, ident: int) -> Element:
        """One element. Raises IndexError for an id outside of the map."""
        if not 0 <= ident < self._services.entries:
            raise IndexError(ident)
        at = ident * self._services.stride
        memory = self._services.memory
        value, owner, algorithm, flags, affinity, key = self._read_service(memory, at)
        packets, outside, table = self._read_packets(memory, at)
        (inside,) = self._read_choice(memory, at)
        return Element(
            frontend_of(key),
            owner,
            value & 0xFFFFFFFF,
            value >> 32,
            algorithm,
            affinity,
            flags,
            packets,
            Run.of(outside),
            Run.of(table),
            Run.of(inside),
        )

    def columns(self, name: str, *fields: str) -> Iterator[tuple[int, tuple[list[int], ...]]]:
        """Numbers of every element of services or load: the index of the first one, and a list
        for each field, of some thousand elements at a time. What is all zero is left out."""
        array = {"services": self._services, "load": self._load}[name]
        layout, stride = self._layout(name), array.stride
        cut = [(f.offset // f.size, f.size) for f in map(layout.field, fields)]
        nothing = bytes(_CHUNK * stride)
        for first in range(0, array.entries, _CHUNK):
            data = array.memory[first * stride : min(first + _CHUNK, array.entries) * stride]
            if data != nothing[: len(data)]:
                words = {size: memoryview(data).cast("Q" if size == 8 else "I") for _, size in cut}
                yield first, tuple(words[size][at :: stride // size].tolist() for at, size in cut)

    def ports_of(
        self, services: Collection[tuple[str, str]], namespaces: Collection[str]
    ) -> Iterator[dict[int, PortName]]:
        """Service ports of these (namespace, name), and all of these namespaces, by owner id: of
        some thousand ports at a time."""
        wanted = {_padded(namespace) + _padded(name) for namespace, name in services}
        whole = {_padded(namespace) for namespace in namespaces}
        size = self.map("names").info.value_size
        for count, keys, values in self.map("names").scan(_CHUNK):
            raw = bytes(values)
            yield {
                _u32.unpack_from(keys, i * _u32.size)[0]: port_name_of(raw[at : at + size])
                for i, at in enumerate(range(0, count * size, size))
                if raw[at : at + 2 * _NAME] in wanted or raw[at : at + _NAME] in whole
            }

    def port_name(self, owner: int) -> PortName | None:
        value = self.map("names").lookup(_u32.pack(owner))
        return None if value is None else port_name_of(value)

    def slots(self, first: int, count: int) -> tuple[Slot, ...]:
        """The slots of a set; those outside of the map are left out."""
        memory, stride = self._slots.memory, self._slots.stride
        end = min(first + count, self._slots.entries)
        read, ntohs = self._read_slot, socket.ntohs
        return tuple(
            Slot((address, ntohs(port)), endpoint, generation, owner, place, weight)
            for (address, port, endpoint, generation, owner, place), weight in zip(
                (read(memory, i * stride) for i in range(first, end)),
                self._weights(first, end),
                strict=True,
            )
        )

    def _weights(self, first: int, end: int) -> Iterable[int]:
        if self._shares is None:
            return [USUAL] * (end - first)
        memory, stride = self._shares.memory, self._shares.stride
        return (_read_share(memory, i * stride)[0] for i in range(first, end))

    def load(self, endpoint: int) -> tuple[int, int]:
        """(generation, open connections) of an endpoint id."""
        if not 0 <= endpoint < self._load.entries:
            return 0, 0
        generation, opened = self._read_load(self._load.memory, endpoint * self._load.stride)
        # Signed while an upgrade merges two maps: what is below zero is not yet merged.
        return generation, opened if opened < 1 << 31 else 0

    def outcomes(self, endpoint: int) -> Outcomes:
        """What came of connects to an endpoint id."""
        if not 0 <= endpoint < self._load.entries:
            return Outcomes()
        found = self._read_outcomes(self._load.memory, endpoint * self._load.stride)
        return outcomes_of(*found)

    def policy_of(self, owner: int) -> PolicyElement:
        if self._policies is None or not 0 <= owner < self._policies.entries:
            return NO_POLICY
        at = owner * self._policies.stride
        return PolicyElement.of(self._policies.memory[at : at + self._policies.stride])

    def policies(self) -> dict[int, PolicyElement]:
        """What is not zero, by owner id."""
        if self._policies is None:
            return {}
        memory, stride = self._policies.memory, self._policies.stride
        nothing, found = bytes(POLICY_BYTES), {}
        for owner in range(self._policies.entries):
            at = owner * stride
            if memory[at : at + POLICY_BYTES] != nothing:
                found[owner] = PolicyElement.of(memory[at : at + stride])
        return found

    def ejected(self, owner: int) -> int:
        """How many endpoints of this owner are ejected now, or would be."""
        if self._policies is None or not 0 <= owner < self._policies.entries:
            return 0
        at = owner * self._policies.stride
        return ejected_of(self._policies.memory[at : at + self._policies.stride])

    def ejected_in_all(self) -> int:
        """How many endpoints of all owners that are watched are ejected now, or would be."""
        if (policies := self._policies) is None:
            return 0
        with memoryview(policies.memory) as memory:
            return ejected_in(memory, policies.stride, policies.entries)

    def counters(self) -> dict[str, int]:
        """Events since load by name (COUNTER_… of abi.h), summed over all CPUs."""
        return sums(self.map("counters"), COUNTERS)

    def packet_counters(self) -> dict[str, int]:
        """What the packet programs decided since load, by name (decisions.COUNTED). Raises
        FileNotFoundError where there are none."""
        return sums(self.map("packet_counters"), COUNTED)

    def marks(self) -> dict[int, int]:
        """The words that are not 0, by index. None in maps of a version that had no marks."""
        try:
            words = bpf.Copy(self.map("marks"))
        except FileNotFoundError:
            return {}
        try:
            return {i: word for i, (word,) in enumerate(_u64.iter_unpack(words.memory)) if word}
        finally:
            words.close()

    def marked(self, address: Address) -> bool:
        """Whether the programs look for frontends of this address at all."""
        try:
            marks = self.map("marks")
        except FileNotFoundError:
            return True  # programs of a version that had no marks
        bit = bit_of(address, marks.info.max_entries)
        word = _u64.unpack(marks.lookup(_u32.pack(bit >> 6)) or bytes(8))[0]
        return bool(word >> (bit & 63) & 1)

    def settings(self) -> dict[str, Any]:
        """`host_netns` (cookie), `skipped` (namespaces), `cidrs` as (address, mask) pairs."""
        raw = _layouts["settings"].decode(self.map("settings").lookup(_u32.pack(0)) or b"")
        cidrs = raw["cidr"][: raw["cidrs"]]
        return {
            "host_netns": raw["host_netns"],
            "skipped": raw["skipped"],
            "cidrs": tuple((cidr["addr"], cidr["mask"]) for cidr in cidrs),
        }

    def snapshot(self) -> Snapshot:
        """Everything at once, for a new agent to take over."""
        frontends = self.frontends()
        services = {
            i: element
            for i in {*frontends.values(), *self._owned()}
            if i < self._services.entries and (element := self.service(i)).owner
        }
        slots: dict[tuple[int, int], tuple[tuple[Backend, int, int], ...]] = {}
        places: dict[tuple[int, int], tuple[int, ...]] = {}
        weights: dict[tuple[int, int], tuple[int, ...]] = {}
        for run in {run for e in services.values() for run in e.runs}:
            found = self.slots(*run)
            slots[run] = tuple((s.backend, s.endpoint, s.generation) for s in found)
            if any(slot.place for slot in found):
                places[run] = tuple(slot.place for slot in found)
            if unlike := normal([slot.weight for slot in found]):
                weights[run] = unlike
        tables = {run for e in services.values() for run in e.tables}
        return Snapshot(
            frontends,
            services,
            self.names(),
            slots,
            self.generations(),
            self.marks(),
            places,
            {run: self.stamp(run) for run in tables},
            self.ranges(),
            weights,
            self.policies(),
        )

    def stamp(self, table: Run) -> bytes:
        """What stands at the end of a Maglev table; b"" if that is outside of the map."""
        last = table.first + maglev.lines_of(table.count) - 1
        return (self.map("maglev").lookup(_u32.pack(last)) or b"")[-maglev.STAMP :]

    def line(self, index: int) -> tuple[int, ...]:
        """The places that stand in one line of Maglev tables."""
        raw = self.map("maglev").lookup(_u32.pack(index)) or bytes(maglev.LINE)
        return _line.unpack(raw)

    def ranges(self) -> dict[int, frozenset[Source]]:
        """The ranges of clients by service id. None in maps of a version that had none."""
        found: dict[int, set[Source]] = {}
        try:
            keys = [key for key, _ in self.map("source_ranges").items()]
        except FileNotFoundError:
            keys = []
        for service, source in map(unpack, keys):
            found.setdefault(service, set()).add(source)
        return {service: frozenset(sources) for service, sources in found.items()}

    def items(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        """Every raw key and value of one map (not of per-CPU maps)."""
        return self.map(name).items()

    def owned(self) -> list[int]:
        """The ids of all services in use, also of those that no frontend leads to."""
        return list(self._owned())

    def _owned(self) -> Iterable[int]:
        """The ids of all elements in use."""
        stride, memory = self._services.stride, self._services.memory
        # One pass over the owner column without touching Python objects for empty elements.
        owners = memoryview(memory)[: stride * self._services.entries].cast("I")
        step, offset = stride // 4, self._owner_at // 4
        column = owners[offset::step]
        found = [i for i, owner in enumerate(column.tolist()) if owner]
        for view in (column, owners):
            view.release()
        return found

    def generations(self) -> Mapping[int, int]:
        """The generation of every endpoint id that was ever used."""
        step = self._load.stride // 4
        words = memoryview(self._load.memory)[: self._load.stride * self._load.entries].cast("I")
        column = words[self._generation_at // 4 :: step]
        found = {i: generation for i, generation in enumerate(column.tolist()) if generation}
        for view in (column, words):
            view.release()
        return found


class Glance(View):
    """For many questions at once: what is the same for all of them is read once."""

    @cached_property
    def _all_names(self) -> dict[int, PortName]:
        return super().names()

    @cached_property
    def _all_settings(self) -> dict[str, Any]:
        return super().settings()

    @cached_property
    def _all_policies(self) -> dict[int, PolicyElement]:
        return super().policies()

    def names(self) -> dict[int, PortName]:
        return self._all_names

    def policies(self) -> dict[int, PolicyElement]:
        return self._all_policies

    def settings(self) -> dict[str, Any]:
        return self._all_settings
