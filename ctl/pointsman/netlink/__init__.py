"""What the kernel says and does by netlink: addresses, sockets to end, conntrack entries.

The only package that imports pyroute2. Everything here is about the network namespace in which the
calling thread is. pyroute2's own sockets run an event loop each; where many namespaces are gone
through, its messages are sent by a plain socket.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pointsman.netlink.devices import V4_ADDRESS, V6_ADDRESS, assigned
from pointsman.netlink.wire import Monitor, Netlink, attributes
from pointsman.stale import Flow, Record
from pointsman.values import TCP, UDP, V4_PREFIX, Address, Backend, is_ipv4, to_address, to_text

log = logging.getLogger("pointsman.agent")

_READ_AGAIN = 0.2  # seconds until addresses that could not be read are read again
_IPVS_DEVICE = "kube-ipvs0"
_LOOPBACK = (to_address("127.0.0.1"), to_address("::1"))
_NETLINK_SOCK_DIAG, _NETLINK_NETFILTER = 4, 12
#: TCP states 1 to 11 but for TIME_WAIT, CLOSE, LISTEN; a UDP socket that has a peer is in 1.
_CONNECTED = {UDP: 1 << 1, TCP: 0xFFF & ~(1 << 0 | 1 << 6 | 1 << 7 | 1 << 10)}
_CTNETLINK = 1 << 8  # NFNL_SUBSYS_CTNETLINK
# enum ctattr_type; below a tuple: (CTA_TUPLE_IP or _PROTO, CTA_IP_… or CTA_PROTO_…)
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_ID, _CTA_ZONE = 1, 2, 12, 18
_CTA_PROTO_NUM = (2, 1)
#: Source, then destination: the address (IPv4, IPv6) and the port.
_CTA_ENDS = ((((1, 1), (1, 3)), (2, 2)), (((1, 2), (1, 4)), (2, 3)))
_CONNTRACK_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")


def load() -> None:
    """Imports pyroute2. To be called before threads that use it start: its modules import each
    other, and two threads that meet in there end with a deadlock error."""
    import pyroute2
    import pyroute2.netlink.diag
    import pyroute2.netlink.nfnetlink.nfctsocket  # noqa: F401


# -- addresses -----------------------------------------------------------------------------------


def addresses() -> frozenset[Address]:
    """The addresses assigned to devices, loopback's own as well.

    Left out is what kube-proxy's IPVS mode leaves on its dummy device until `kube-proxy --cleanup`:
    every Service's VIP.
    """
    passed = 0
    with contextlib.suppress(OSError):
        passed = socket.if_nametoindex(_IPVS_DEVICE)
    with Netlink(socket.NETLINK_ROUTE) as route:
        return frozenset(each.address for each in assigned(route) if each.index != passed)


def local_addresses() -> frozenset[Address]:
    """The addresses assigned to devices, 127.0.0.1 and ::1 left out."""
    return addresses() - frozenset(_LOOPBACK)


def ipvs_addresses() -> frozenset[Address] | None:
    """The VIPs that kube-proxy's IPVS mode has on its dummy device; None without that device."""
    try:
        index = socket.if_nametoindex(_IPVS_DEVICE)
    except OSError:
        return None
    with Netlink(socket.NETLINK_ROUTE) as route:
        return frozenset(each.address for each in assigned(route) if each.index == index)


def watch_addresses(changed: Callable[[frozenset[Address]], None], stop: threading.Event) -> None:
    """Calls `changed` with all local addresses, at start and whenever one comes or goes."""
    known: frozenset[Address] | None = None
    error = ""
    # Listening starts before the first reading: nothing can slip in between.
    with contextlib.closing(Monitor(V4_ADDRESS | V6_ADDRESS)) as monitor:
        due = True
        while not stop.is_set():
            if not due and not monitor.changed(0.5):
                continue
            try:
                now = local_addresses()
            except OSError as again:
                # EAGAIN: so many come, one after the other, that no reading is whole.
                if error != (error := str(again)):
                    log.warning("the node's addresses are read again: %s", error)
                due = not stop.wait(_READ_AGAIN)
                continue
            due, error = False, ""
            if now != known:
                known = now
                changed(now)


# -- sockets -------------------------------------------------------------------------------------


def destroy(records: Iterable[Record], still: Callable[[Record], bool]) -> list[Record]:
    """Ends the sockets of these records that are in this namespace; returns those that it ended.

    A socket is ended if cookie, protocol and peer are the record's, and `still` says that the
    record holds. Its program gets ECONNABORTED. Raises OSError (EPERM without CAP_NET_ADMIN,
    EOPNOTSUPP without CONFIG_INET_DIAG_DESTROY).
    """
    groups: dict[tuple[int, int, int], dict[int, Record]] = {}
    for record in records:
        address, port = record.peer
        families = [int(socket.AF_INET6)]
        if is_ipv4(address):  # an IPv6 socket may have an IPv4 peer, too
            families.append(socket.AF_INET)
        for family in families:
            groups.setdefault((record.protocol, family, port), {})[record.cookie] = record
    ended: list[Record] = []
    with Netlink(_NETLINK_SOCK_DIAG) as diag:
        for (protocol, family, port), wanted in groups.items():
            # Destroying amid a dump would mix up the answers.
            for found, request in list(_sockets(diag, family, protocol, port)):
                one = wanted.get(found[0])
                if one and one.peer == found[1] and still(one) and _destroy(diag, request):
                    ended.append(one)
    return ended


def _sockets(
    diag: Netlink, family: int, protocol: int, port: int
) -> Iterator[tuple[tuple[int, Backend], Any]]:
    """((cookie, peer), request that names just this socket) of those connected to that port."""
    from pyroute2.netlink.diag import SOCK_DIAG_BY_FAMILY, inet_diag_msg, inet_diag_req

    request = inet_diag_req()
    request["sdiag_family"], request["sdiag_protocol"] = family, protocol
    request["idiag_states"] = _CONNECTED[protocol]
    request["idiag_dport"] = port  # the kernel leaves out the others
    for data, at, _ in diag.dump(request, SOCK_DIAG_BY_FAMILY):
        message = inet_diag_msg(data, offset=at)
        message.decode()
        one = inet_diag_req()
        one["sdiag_family"], one["sdiag_protocol"] = family, protocol
        for name in ("idiag_sport", "idiag_dport", "idiag_if", "idiag_cookie"):
            one[name] = message[name]
        for name in ("idiag_src", "idiag_dst"):
            raw = socket.inet_pton(family, message[name])
            one[name] = struct.unpack(">4I", raw.ljust(16, b"\0"))
        cookie = message["idiag_cookie"]
        if sys.byteorder == "big":  # two 32-bit words, the lower one first
            cookie = cookie >> 32 | (cookie & 0xFFFFFFFF) << 32
        yield (cookie, (to_address(message["idiag_dst"]), message["idiag_dport"])), one


def _destroy(diag: Netlink, request: Any) -> bool:
    """False if the socket is gone, or another has its addresses: the kernel compares cookies."""
    from pyroute2.netlink.diag import SOCK_DESTROY

    try:
        diag.do(request, SOCK_DESTROY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return False
        raise
    return True


# -- conntrack -----------------------------------------------------------------------------------


def flows() -> list[Flow]:
    """The UDP conntrack entries; none where conntrack is not in use."""
    from pyroute2.netlink.nfnetlink.nfctsocket import IPCTNL_MSG_CT_GET, NFCTAttrTuple, nfct_msg

    try:
        if int(_CONNTRACK_COUNT.read_text()) == 0:
            return []
    except FileNotFoundError:
        return []
    found = []
    with Netlink(_NETLINK_NETFILTER) as conntrack:
        for family in (socket.AF_INET, socket.AF_INET6):
            only = NFCTAttrTuple(family=family, proto=UDP)
            only.attrs()  # sets its flags
            request = nfct_msg.create_from(
                tuple_orig=only, filter={"attrs": [["CTA_FILTER_ORIG_FLAGS", only.flags]]}
            )
            request["nfgen_family"] = family
            for data, at, length in conntrack.dump(request, _CTNETLINK | IPCTNL_MSG_CT_GET):
                if flow := _flow(data, at + 20, at + length):
                    found.append(flow)
    return found


def delete_flows(chosen: Iterable[Flow]) -> int:
    """Deletes exactly these entries; how many of them were still there. Raises OSError."""
    from pyroute2.netlink.nfnetlink.nfctsocket import IPCTNL_MSG_CT_DELETE, NFCTAttrTuple, nfct_msg

    deleted = 0
    with Netlink(_NETLINK_NETFILTER) as conntrack:
        for flow in chosen:
            family = socket.AF_INET if is_ipv4(flow.vip[0]) else socket.AF_INET6
            request = nfct_msg.create_from(
                tuple_orig=NFCTAttrTuple(
                    family=family,
                    saddr=to_text(flow.source[0]),
                    daddr=to_text(flow.vip[0]),
                    proto=UDP,
                    sport=flow.source[1],
                    dport=flow.vip[1],
                ),
                # Without its id it could be a newer entry with the same addresses.
                id=flow.ident,
                zone=flow.zone or None,
            )
            request["nfgen_family"] = family
            try:
                conntrack.do(request, _CTNETLINK | IPCTNL_MSG_CT_DELETE)
                deleted += 1
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
    return deleted


def _flow(data: bytes, at: int, end: int) -> Flow | None:
    """One entry (struct nfgenmsg, then attributes); None if it is not UDP. A node may have a
    hundred thousand of them, and pyroute2 takes many times as long to read one."""
    ends: list[Backend] = []
    ident = zone = 0
    for kind, value, stop in attributes(data, at, end):
        if kind in (_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY):
            parts: dict[tuple[int, int], bytes] = {}
            for group, inner, inner_stop in attributes(data, value, stop):
                for number, start, close in attributes(data, inner, inner_stop):
                    parts[group, number] = data[start:close]
            if parts.get(_CTA_PROTO_NUM) != bytes((UDP,)):
                return None
            for address, port in _CTA_ENDS:
                raw = next(parts[key] for key in address if key in parts)
                ends.append(
                    (raw if len(raw) == 16 else V4_PREFIX + raw, int.from_bytes(parts[port], "big"))
                )
        elif kind == _CTA_ID:
            ident = int.from_bytes(data[value:stop], "big")
        elif kind == _CTA_ZONE:
            zone = int.from_bytes(data[value:stop], "big")
    if len(ends) != 4:
        return None
    source, vip, peer, _ = ends
    return Flow(source, vip, peer, ident, zone)
