"""Neighbours that the kernel is asked to keep resolved: the next hops to other nodes.

XDP can send a packet only where the link-layer address is known, and waits for none.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

from pointsman.netlink.devices import gateway_of
from pointsman.netlink.wire import Netlink, attribute, attributes, number, whole
from pointsman.values import Address, is_ipv4

# include/uapi/linux/rtnetlink.h, neighbour.h
_GETROUTE, _NEWNEIGH, _DELNEIGH, _GETNEIGH = 26, 28, 29, 30
_route = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, dst_len, …, table, …, type, flags
_neighbour = struct.Struct("=BxxxiHBB")  # struct ndmsg: family, index, state, flags, type
_DESTINATION, _OIF, _UNICAST = 1, 4, 1
_NDA_DST, _NDA_PROTOCOL, _NDA_FLAGS_EXT = 1, 12, 15
_CREATE, _REPLACE = 0x400, 0x100  # NLM_F_…
_PERMANENT, _LEARNED, _MANAGED = 0x80 | 0x40, 0x10, 0x1  # NUD_PERMANENT or NOARP; NTF_…
#: Marks the entries that are ours (as RTPROT_… does routes; none is defined here).
_OURS = 112

#: ifindex and address of a next hop.
NextHop = tuple[int, Address]


def next_hops(addresses: Iterable[Address]) -> dict[Address, NextHop]:
    """Where packets to each of them go on from here; without those that go nowhere, or stay."""
    found = {}
    with Netlink(socket.NETLINK_ROUTE) as route:
        for address in addresses:
            try:
                if hop := _next_hop(route, address):
                    found[address] = hop
            except OSError:  # no route
                continue
    return found


def _next_hop(route: Netlink, address: Address) -> NextHop | None:
    family, raw = _raw(address)
    request = _route.pack(family, len(raw) * 8, 0, 0, 0, 0, 0, 0, 0)
    hop = None
    # To the end: what is left unread would be taken for the next answer.
    for data, at, length in route.one(request + attribute(_DESTINATION, raw), _GETROUTE):
        kind = _route.unpack_from(data, at + 16)[7]
        found = {n: data[s:e] for n, s, e in attributes(data, at + 28, at + length)}
        if kind == _UNICAST and _OIF in found:
            hop = number(found[_OIF]), gateway_of(found) or address
    return hop


def _raw(address: Address) -> tuple[int, bytes]:
    """Family, and the address as the kernel takes it."""
    if is_ipv4(address):
        return socket.AF_INET, address[12:]
    return socket.AF_INET6, address


def kept_neighbours() -> tuple[set[NextHop], set[NextHop]]:
    """The neighbours that we have the kernel keep, and those that are not to be touched: entries
    that others made permanent, or have kept."""
    ours: set[NextHop] = set()
    others: set[NextHop] = set()
    with Netlink(socket.NETLINK_ROUTE) as route:
        for data, at, length in route.ask(_neighbour.pack(0, 0, 0, 0, 0), _GETNEIGH):
            family, index, state, _, _ = _neighbour.unpack_from(data, at + 16)
            found = {n: data[s:e] for n, s, e in attributes(data, at + 28, at + length)}
            if family not in (socket.AF_INET, socket.AF_INET6) or _NDA_DST not in found:
                continue
            managed = number(found.get(_NDA_FLAGS_EXT, b"")) & _MANAGED
            hop = index, whole(found[_NDA_DST])
            if managed and number(found.get(_NDA_PROTOCOL, b"")) == _OURS:
                ours.add(hop)
            elif managed or state & _PERMANENT:
                others.add(hop)
    return ours, others


def keep_neighbour(hop: NextHop) -> None:
    """Has the kernel resolve it now and keep it so (NTF_EXT_MANAGED, Linux 5.16). It does not count
    against the limits of the table (NTF_EXT_LEARNED). Raises OSError."""
    more = attribute(_NDA_PROTOCOL, bytes([_OURS]))
    more += attribute(_NDA_FLAGS_EXT, struct.pack("=I", _MANAGED))
    _change(_NEWNEIGH, hop, _LEARNED, more, _CREATE | _REPLACE)


def forget_neighbour(hop: NextHop) -> None:
    """Takes back `keep_neighbour`. Raises OSError."""
    _change(_DELNEIGH, hop, 0, b"", 0)


def _change(kind: int, hop: NextHop, flags: int, more: bytes, how: int) -> None:
    index, address = hop
    family, raw = _raw(address)
    payload = _neighbour.pack(family, index, 0, flags, 0) + attribute(_NDA_DST, raw) + more
    with Netlink(socket.NETLINK_ROUTE) as route:
        route.send(payload, kind, how)
