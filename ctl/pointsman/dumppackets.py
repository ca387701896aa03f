"""The maps of the packet programs decoded, for `map dump`. Pure."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from pointsman import abi
from pointsman.decisions import protocol_name, tuple_text
from pointsman.flows import half_of, ports_of, timeouts_of, tuple_of
from pointsman.values import PortName, endpoint_text, to_text

Row = dict[str, Any]
_layouts = abi.layouts()
_FLOW_FLAGS = {n: name.removeprefix("FLOW_") for name, n in abi.enumerators("flow_flag").items()}
_HELD_COUNT = (1 << abi.constants()["HELD_COUNT_BITS"]) - 1
_DEVICES = {n: name.removeprefix("DEVICE_") for name, n in abi.enumerators("device_flag").items()}


class Source(Protocol):
    """What the rows need of the maps."""

    def items(self, name: str) -> Iterable[tuple[bytes, bytes]]: ...
    def names(self) -> dict[int, PortName]: ...
    def packet_counters(self) -> dict[str, int]: ...


def _names_of(flags: int, known: dict[int, str]) -> list[str]:
    return [name.lower() for bit, name in sorted(known.items()) if flags & bit]


def _flows(name: str) -> Callable[[Source], Iterator[Row]]:
    def rows(source: Source) -> Iterator[Row]:
        names = source.names()
        for key, value in source.items(name):
            arriving, half = tuple_of(key), half_of(value)
            yield {
                "arrives": tuple_text(arriving),
                "protocol": protocol_name(arriving.protocol),
                "other": tuple_text(tuple_of(half.other)),
                "flags": _names_of(half.flags, _FLOW_FLAGS),
                "seen": half.seen,
                "id": half.endpoint,
                "generation": half.generation,
                "owner": half.owner,
                "name": str(names.get(half.owner, "")),
            }

    return rows


def _affinity_clients(source: Source) -> Iterator[Row]:
    names = source.names()
    for raw_key, raw in source.items("affinity_clients"):
        key, entry = _layouts["client_key"].decode(raw_key), _layouts["affinity"].decode(raw)
        yield {
            "client": to_text(key["addr"]),
            "owner": key["owner"],
            "name": str(names.get(key["owner"], "")),
            "endpoint": endpoint_text(entry["addr"], socket.ntohs(entry["port"])),
            "seen": entry["seen"],
        }


def _fragments(source: Source) -> Iterator[Row]:
    for raw_key, raw in source.items("fragments"):
        key, ports = _layouts["fragment_key"].decode(raw_key), _layouts["fragment"].decode(raw)
        yield {
            "source": endpoint_text(key["source"], socket.ntohs(ports["source_port"])),
            "destination": endpoint_text(
                key["destination"], socket.ntohs(ports["destination_port"])
            ),
            "protocol": protocol_name(key["proto"]),
            "id": key["id"],
            "seen": ports["seen"],
        }


def _held_fragments(source: Source) -> Iterator[Row]:
    for raw_key, link in source.items("held_fragments"):
        key = _layouts["fragment_key"].decode(raw_key)
        yield {
            "source": to_text(key["source"]),
            "destination": to_text(key["destination"]),
            "protocol": protocol_name(key["proto"]),
            "id": key["id"],
            "held": struct.unpack("=Q", link)[0] & _HELD_COUNT,
        }


def _devices(source: Source) -> Iterator[Row]:
    for key, value in source.items("devices"):
        device = _layouts["device"].decode(value)
        yield {
            "ifindex": _number(key),
            "flags": _names_of(device["flags"], _DEVICES),
            "lower": device["lower"] or None,
            "vlan": device["vlan"] or None,
            "ipv4": _address(device["ipv4"]),
            "ipv6": _address(device["ipv6"]),
        }


def _address(address: bytes) -> str | None:
    return to_text(address) if any(address) else None


def _vlans(source: Source) -> Iterator[Row]:
    for raw_key, value in source.items("vlans"):
        key = _layouts["vlan_key"].decode(raw_key)
        yield {"lower": key["lower"], "vlan": key["vlan"], "ifindex": _number(value)}


def _packet_settings(source: Source) -> Iterator[Row]:
    for _, value in source.items("packet_settings"):
        settings, timeouts = _layouts["packet_settings"].decode(value), timeouts_of(value)
        yield {
            "traceUntil": settings["trace_until"] or None,
            "snatPorts": "-".join(map(str, ports_of(value))),
            "dispatch": "dsr" if settings["dsr"] else "snat",
            "tcpNew": timeouts.tcp_new,
            "tcpOpen": timeouts.tcp_open,
            "tcpClosing": timeouts.tcp_closing,
            "udpNew": timeouts.udp_new,
            "udpOpen": timeouts.udp_open,
        }


def _packet_counters(source: Source) -> Iterator[Row]:
    for name, value in source.packet_counters().items():
        yield {"counter": name, "value": value}


def _number(data: bytes) -> int:
    return int(struct.unpack("=I", data)[0])


#: By the name in bpf/maps.h.
DUMPS: dict[str, Callable[[Source], Iterator[Row]]] = {
    "flows": _flows("flows"),
    "flows_new": _flows("flows_new"),
    "affinity_clients": _affinity_clients,
    "fragments": _fragments,
    "held_fragments": _held_fragments,
    "devices": _devices,
    "vlans": _vlans,
    "packet_settings": _packet_settings,
    "packet_counters": _packet_counters,
}
#: Of which there are always as many: how full they are says nothing.
FIXED = ("packet_counters", "packet_settings")
#: Too many to decode only to count them.
FLOWS = ("flows", "flows_new")
#: What can't be listed, and why.
UNLISTED = {
    "recent": "for a second it repeats what flows say, see 'pointsman map dump flows'",
    "trace": "it is read by 'pointsman trace'",
    "sweep_keys": "the agent tells the program 'sweep' by it what to look at",
}
