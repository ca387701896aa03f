"""The maps of the packet programs, opened: flows, settings, counters. There only where devices are
served. Works without an agent."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from pointsman import abi, bpf, ranges
from pointsman.decisions import COUNTED
from pointsman.devices import Timeouts
from pointsman.errors import NotLoaded
from pointsman.flows import Filter, Flow, flows, is_dsr, ports_of, timeouts_of
from pointsman.maglev import PER_LINE
from pointsman.values import Address
from pointsman.view import sums

_ZERO = bytes(4)
_u32 = struct.Struct("=I")
_line = struct.Struct(f"={PER_LINE}H")
_pack_client = abi.layouts()["client_key"].packer("addr", "owner")


class PacketMaps:
    """Raises NotLoaded where no packet programs are."""

    def __init__(self, directory: Path, *, read_only: bool = True) -> None:
        self.directory = directory
        self._read_only = read_only
        self._maps: dict[str, bpf.Map] = {}
        try:
            self.flows, self.flows_new = self.map("flows"), self.map("flows_new")
        except FileNotFoundError:
            self.close()
            raise NotLoaded(
                "this node serves no packets from outside, so there are no flows; give the agent "
                "--devices, see 'pointsman status'"
            ) from None

    def map(self, name: str) -> bpf.Map:
        if name not in self._maps:
            self._maps[name] = bpf.Map.open(self.directory / name, read_only=self._read_only)
        return self._maps[name]

    def close(self) -> None:
        for opened in self._maps.values():
            opened.close()
        self._maps.clear()

    # -- what stands in them ---------------------------------------------------------------------

    def settings(self) -> bytes:
        """The element of packet_settings, as the programs see it."""
        return self.map("packet_settings").lookup(_ZERO) or b""

    @property
    def timeouts(self) -> Timeouts:
        return timeouts_of(self.settings())

    @property
    def ports(self) -> tuple[int, int]:
        """First and last port of this node towards endpoints on others."""
        return ports_of(self.settings())

    @property
    def dsr(self) -> bool:
        """Whether replies come past this node."""
        return is_dsr(self.settings())

    def counters(self) -> dict[str, int]:
        """What the programs decided since load, by name (decisions.COUNTED), over all CPUs."""
        return sums(self.map("packet_counters"), COUNTED)

    def find(self, key: bytes) -> bytes | None:
        """One direction of a flow, as the programs look for it."""
        found = self.flows.lookup(key)
        return found if found is not None else self.flows_new.lookup(key)

    def line(self, index: int) -> tuple[int, ...]:
        """32 entries of Maglev tables."""
        return tuple(_line.unpack(self.map("maglev").lookup(_u32.pack(index)) or bytes(_line.size)))

    def admits(self, service: int, client: Address) -> bool:
        """Whether the ranges of a service have this client."""
        return self.map("source_ranges").lookup(ranges.pack(service, (client, 128))) is not None

    def client_affinity(self, client: Address, owner: int) -> bytes | None:
        """A struct affinity, None if the client has no endpoint of that service port."""
        return self.map("affinity_clients").lookup(_pack_client(client, owner))

    def all(self, wanted: Filter) -> Iterator[Flow]:
        """Every flow once, as it is read: nothing is kept."""
        return flows(self._entries(), self.find, wanted)

    def _entries(self) -> Iterator[tuple[bytes, bytes]]:
        yield from self.flows.items()
        for key, value in self.flows_new.items():
            # One that has just moved may stand in both for a moment.
            if self.flows.lookup(key) is None:
                yield key, value


def device_name(ifindex: int) -> str:
    """Of this network namespace; its number if it is gone."""
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return str(ifindex)


def now() -> int:
    """As bpf_ktime_get_ns()."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)
