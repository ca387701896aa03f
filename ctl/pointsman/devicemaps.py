"""What the agent writes for the programs for packets: `devices`, `vlans`, `packet_settings`."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from pointsman import abi, bpf
from pointsman.devices import Packets, Served, vlans

_FIRST = bytes(4)
_device = abi.layouts()["device"].packer("flags", "lower", "vlan", "mac", "ipv4", "ipv6")
_vlan = abi.layouts()["vlan_key"].packer("lower", "vlan")
_u32 = struct.Struct("=I")
_SETTINGS = ("first_port", "last_port", "dsr")
_TIMEOUTS = ("tcp_new", "tcp_open", "tcp_closing", "udp_new", "udp_open")
_settings = abi.layouts()["packet_settings"].packer("trace_until", *_SETTINGS, *_TIMEOUTS)
_trace_until = abi.layouts()["packet_settings"].reader("trace_until")


class DeviceMaps:
    """The maps of one generation. Raises OSError (FileNotFoundError where there are none)."""

    def __init__(self, directory: Path) -> None:
        self._devices = bpf.Map.open(directory / "devices")
        self._vlans = bpf.Map.open(directory / "vlans")
        self._settings = bpf.Map.open(directory / "packet_settings")

    def close(self) -> None:
        for opened in (self._devices, self._vlans, self._settings):
            opened.close()

    def add(self, one: Served) -> None:
        """Before anything is attached there."""
        _put(self._devices, {_u32.pack(one.device.index): packed(one)})
        _put(self._vlans, _vlan_elements([one]))

    def keep_only(self, served: Iterable[Served]) -> None:
        """After all others were detached."""
        served = list(served)
        _drop(self._vlans, _vlan_elements(served))
        _drop(self._devices, {_u32.pack(one.device.index): b"" for one in served})

    def configure(self, packets: Packets) -> None:
        """How packets are served from now on."""
        # A tracer renews its field every half second: if this undoes that once, nothing is lost.
        (until,) = _trace_until(self._settings.lookup(_FIRST))
        first, last = packets.snat_ports
        limits = (getattr(packets.timeouts, name) for name in _TIMEOUTS)
        self._settings.update(_FIRST, _settings(until, first, last, int(packets.dsr), *limits))


def packed(one: Served) -> bytes:
    """struct device"""
    return _device(one.flags, one.lower, one.vlan, one.device.mac, one.ipv4, one.ipv6)


def _vlan_elements(served: Iterable[Served]) -> dict[bytes, bytes]:
    return {_vlan(*key): _u32.pack(index) for key, index in vlans(served).items()}


def _put(to: bpf.Map, wanted: Mapping[bytes, bytes]) -> None:
    """Only what differs."""
    for key, value in wanted.items():
        if to.lookup(key) != value:
            to.update(key, value)


def _drop(of: bpf.Map, wanted: Mapping[bytes, bytes]) -> None:
    for key in [key for key, _ in of.items() if key not in wanted]:
        of.delete(key)
