"""Devices, their addresses, default routes and neighbours, as rtnetlink tells them.

Read from the bytes themselves: a node may have hundreds of pods' devices and a route for each, and
something changes whenever a pod comes or goes.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pointsman.devices import NO_MAC, Assigned, Device, Route, Seen
from pointsman.netlink.wire import Monitor, Netlink, attribute, attributes, nested, number, whole
from pointsman.values import Address

_CONF = Path("/proc/sys/net")
# include/uapi/linux/rtnetlink.h, if_link.h, if_addr.h
_GETLINK, _GETADDR, _GETROUTE = 18, 22, 26
_LINK, V4_ADDRESS, _V4_ROUTE, V6_ADDRESS, _V6_ROUTE = 0x1, 0x10, 0x40, 0x100, 0x400  # RTMGRP_…
_V4_CONF, _V6_CONF = 1 << 23, 1 << 24
_link = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_assigned = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix, flags, scope, index
_route = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, dst_len, …, table, …, type, flags
_hop = struct.Struct("=HBBi")  # struct rtnexthop: length, flags, hops, index
_MAC, _IFNAME, _MTU, _IFLINK, _LINKINFO, _LINK_NETNSID, _XDP = 1, 3, 4, 5, 18, 37, 43
_KIND, _DATA, _VLAN_ID, _VLAN_PROTOCOL = 1, 2, 1, 5
_XDP_ATTACHED, _XDP_PROGRAM, _XDP_NATIVE, _XDP_GENERIC = 2, 4, 5, 6
#: By IFLA_XDP_ATTACHED: one of driver, generic, hardware; 4 is several.
_XDP_MODES = {1: "native", 2: "generic", 3: "offloaded"}
_ADDRESS, _LOCAL, _ADDRESS_FLAGS = 1, 2, 8
_TEMPORARY, _NOT_YET = 0x01, 0x08 | 0x20 | 0x40  # IFA_F_…: failed, deprecated, tentative
_OIF, _GATEWAY, _PRIORITY, _PREFSRC, _MULTIPATH, _TABLE, _VIA = 4, 5, 6, 7, 9, 15, 18
_MAIN, _UNICAST = 254, 1
#: ARPHRD_…: ipip, ip6tnl, tun and WireGuard. (gre and sit show TC the outer header, too.)
_RAW = (768, 769, 0xFFFE)
_ETHERNET, _UP, _LOOPBACK, _NOARP = 1, 0x1, 0x8, 0x80
_8021Q = 0x8100
# include/uapi/linux/ethtool.h: struct ethtool_drvinfo has the driver at byte 4, 196 in all
_SIOCETHTOOL, _GET_DRIVER, _GET_FLAGS = 0x8946, 0x3, 0x25
_FLAG_UNTAGS, _FLAG_LRO = 1 << 8, 1 << 15  # ETH_FLAG_RXVLAN, ETH_FLAG_LRO
# include/uapi/linux/genetlink.h, netdev.h
_NETLINK_GENERIC, _CONTROL, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 16, 0x10, 3, 1, 2
_GET_DEVICE, _DEVICE_INDEX, _DEVICE_XDP = 1, 1, 3
_genl = struct.Struct("=BBxx")  # struct genlmsghdr: command, version


def seen() -> Seen:
    """This network namespace now. Raises OSError."""
    with Netlink(socket.NETLINK_ROUTE) as route:
        devices = tuple(_devices(route))
        addresses = tuple(assigned(route))
        defaults = tuple(_defaults(route))
    return Seen(tuple(map(_with_settings, devices)), addresses, defaults, _local_ports())


def monitor() -> Monitor:
    """Tells of everything that `seen` depends on."""
    groups = _LINK | V4_ADDRESS | V6_ADDRESS | _V4_ROUTE | _V6_ROUTE | _V4_CONF | _V6_CONF
    return Monitor(groups)


def _devices(route: Netlink) -> Iterator[Device]:
    for data, at, length in route.ask(_link.pack(0, 0, 0, 0, 0), _GETLINK):
        _, kind, index, flags, _ = _link.unpack_from(data, at + 16)
        found: dict[int, bytes] = {}
        for name, start, end in attributes(data, at + 32, at + length):
            found[name] = data[start:end]
        info = nested(found.get(_LINKINFO, b""))
        text = info.get(_KIND, b"").rstrip(b"\0").decode()
        vlan = nested(info.get(_DATA, b"")) if text == "vlan" else {}
        tagged = int.from_bytes(vlan.get(_VLAN_PROTOCOL, b""), "big") == _8021Q
        here = _LINK_NETNSID not in found
        yield Device(
            index,
            found[_IFNAME].rstrip(b"\0").decode(errors="replace"),
            ethernet=kind == _ETHERNET and not flags & _NOARP,
            raw=kind in _RAW,
            up=bool(flags & _UP),
            loopback=bool(flags & _LOOPBACK),
            kind=text,
            lower=number(found.get(_IFLINK, b"")) if tagged and here else 0,
            vlan=number(vlan.get(_VLAN_ID, b"")) if tagged and here else 0,
            mtu=number(found.get(_MTU, b"")),
            mac=found.get(_MAC, NO_MAC) if kind == _ETHERNET else NO_MAC,
            xdp=_xdp(nested(found.get(_XDP, b""))),
        )


def _xdp(found: dict[int, bytes]) -> tuple[tuple[str, int], ...]:
    mode = number(found.get(_XDP_ATTACHED, b""))
    if mode in _XDP_MODES:
        return ((_XDP_MODES[mode], number(found.get(_XDP_PROGRAM, b""))),)
    both = (("native", _XDP_NATIVE), ("generic", _XDP_GENERIC))
    return tuple((name, number(found[part])) for name, part in both if part in found)


def assigned(route: Netlink) -> Iterator[Assigned]:
    for data, at, length in route.ask(_assigned.pack(0, 0, 0, 0, 0), _GETADDR):
        family, _, flags, scope, index = _assigned.unpack_from(data, at + 16)
        if family not in (socket.AF_INET, socket.AF_INET6):
            continue
        found = {n: data[start:end] for n, start, end in attributes(data, at + 24, at + length)}
        flags |= number(found.get(_ADDRESS_FLAGS, b""))
        raw = found.get(_LOCAL) or found.get(_ADDRESS)
        if raw:
            # The flag means "secondary" in IPv4: that one is as good as any.
            passing = _NOT_YET | (_TEMPORARY if family == socket.AF_INET6 else 0)
            yield Assigned(index, whole(raw), scope == 0 and not flags & passing)


def _defaults(route: Netlink) -> Iterator[Route]:
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _route.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
        for data, at, length in route.ask(request, _GETROUTE):
            _, bits, _, _, table, _, _, kind, _ = _route.unpack_from(data, at + 16)
            if bits or kind != _UNICAST or table != _MAIN:
                continue
            found = {n: data[s:end] for n, s, end in attributes(data, at + 28, at + length)}
            first = Route(
                number(found.get(_OIF, b"")),
                family == socket.AF_INET6,
                whole(found[_PREFSRC]) if _PREFSRC in found else None,
                gateway_of(found),
                number(found.get(_PRIORITY, b"")),
            )
            if _MULTIPATH not in found:
                yield first
            for index, gateway in _hops(found.get(_MULTIPATH, b"")):
                yield replace(first, index=index, gateway=gateway)


def _hops(data: bytes) -> Iterator[tuple[int, Address | None]]:
    at = 0
    while at + _hop.size <= len(data):
        length, _, _, index = _hop.unpack_from(data, at)
        if length < _hop.size:
            return
        found = {n: data[s:e] for n, s, e in attributes(data, at + _hop.size, at + length)}
        yield index, gateway_of(found)
        at += -(-length // 4) * 4


def gateway_of(found: dict[int, bytes]) -> Address | None:
    """Of its own family, or RTA_VIA: a family (16 bits) and an address."""
    raw = found.get(_GATEWAY) or found.get(_VIA, b"")[2:]
    return whole(raw) if raw else None


def _with_settings(device: Device) -> Device:
    if device.loopback or not (device.ethernet or device.raw):
        return device
    driver = _ethtool(device.name, _GET_DRIVER, 196)[4:36].partition(b"\0")[0]
    flags = number(_ethtool(device.name, _GET_FLAGS, 8)[4:])
    return replace(
        device,
        forwards=(_forwards("ipv4", device.name), _forwards("ipv6", device.name)),
        driver=driver.decode(errors="replace"),
        lro=bool(flags & _FLAG_LRO),
        untags=bool(flags & _FLAG_UNTAGS),
    )


def _forwards(family: str, name: str) -> bool:
    try:
        return (_CONF / family / "conf" / name / "forwarding").read_text().strip() != "0"
    except OSError:  # gone again, or a kernel without this family
        return True


def _ethtool(name: str, command: int, size: int) -> bytes:
    """What the device answers, zeros if it does not."""
    value = array.array("B", struct.pack("=I", command).ljust(size, b"\0"))
    request = struct.pack("@16sP", name.encode()[:15], value.buffer_info()[0]).ljust(40, b"\0")
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket,
    ):
        fcntl.ioctl(any_socket, _SIOCETHTOOL, request)
    return value.tobytes()


def xdp_features() -> dict[int, int]:
    """What each device of this namespace can do for XDP now (NETDEV_XDP_ACT_…), by ifindex. Drivers
    take frames of others only while a program is attached, so ask after that. Nothing before
    Linux 6.3."""
    found = {}
    with contextlib.suppress(OSError), Netlink(_NETLINK_GENERIC) as netdev:
        family = attribute(_FAMILY_NAME, b"netdev\0")
        ((data, at, length),) = netdev.one(_genl.pack(_GET_FAMILY, 1) + family, _CONTROL)
        kind = number(nested(data[at + 20 : at + length])[_FAMILY_ID])
        for data, at, length in netdev.ask(_genl.pack(_GET_DEVICE, 1), kind):
            parts = nested(data[at + 20 : at + length])
            found[number(parts[_DEVICE_INDEX])] = number(parts.get(_DEVICE_XDP, b""))
    return found


def _local_ports() -> tuple[int, int]:
    first, last = (_CONF / "ipv4/ip_local_port_range").read_text().split()
    return int(first), int(last)


def present(index: int) -> int:
    """The ifindex itself if this namespace has a device of that number, else 0."""
    try:
        socket.if_indextoname(index)
    except OSError:
        return 0
    return index


def peers_of(addresses: frozenset[Address]) -> dict[Address, tuple[int, int]]:
    """(ifindex, ifindex of its other end) of the devices that have these addresses here, as a pod's
    are: those whose other end is in another network namespace."""
    with Netlink(socket.NETLINK_ROUTE) as route:
        found = {each.address: each.index for each in assigned(route)}
        ends = _ends(route)
    return {
        address: (found[address], ends[found[address]])
        for address in addresses & found.keys()
        if found[address] in ends
    }


def ends() -> dict[int, int]:
    """Ifindex of a device here → that of its other end in another namespace."""
    with Netlink(socket.NETLINK_ROUTE) as route:
        return _ends(route)


def _ends(route: Netlink) -> dict[int, int]:
    found = {}
    for data, at, length in route.ask(_link.pack(0, 0, 0, 0, 0), _GETLINK):
        index = _link.unpack_from(data, at + 16)[2]
        parts = {n: data[s:e] for n, s, e in attributes(data, at + 32, at + length)}
        kind = nested(parts.get(_LINKINFO, b"")).get(_KIND, b"").rstrip(b"\0")
        if kind in (b"veth", b"netkit") and _LINK_NETNSID in parts:
            found[index] = number(parts.get(_IFLINK, b""))
    return found
