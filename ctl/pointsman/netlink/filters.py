"""Programs as filters of a clsact qdisc: TC before Linux 6.6.

Ours are known by their name; whatever else is on the device is left as it is. The qdisc stays when
they go: another's filters may come to it, and without any it does nothing.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass

from pointsman.netlink.wire import Netlink, attribute, attributes

# include/uapi/linux/rtnetlink.h, pkt_sched.h, pkt_cls.h
_NEW_QDISC, _NEW_FILTER, _DELETE_FILTER, _GET_FILTER = 36, 44, 45, 46
_CREATE, _EXCLUSIVE = 0x400, 0x200  # NLM_F_…
_CLSACT, _HANDLE = 0xFFFFFFF1, 0xFFFF0000
INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
_tc = struct.Struct("=BxxxiIII")  # struct tcmsg: family, index, handle, parent, info
_KIND, _OPTIONS = 1, 2
_FD, _NAME, _FLAGS, _ID = 6, 7, 8, 11
_DIRECT_ACTION = 1
_ALL = socket.htons(0x0003)  # ETH_P_ALL
#: Early, since what others let through with TC_ACT_OK is not seen by later ones.
_PRIORITY, _OWN_HANDLE = 5, 0x706D


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter with a program. `info`: priority << 16 | protocol."""

    name: str
    program: int
    handle: int
    info: int


def find(index: int, parent: int, name: str) -> Filter | None:
    """The filter of that name; None also where there is no clsact, or no device."""
    request = _tc.pack(0, index, 0, parent, 0)
    try:
        with Netlink(socket.NETLINK_ROUTE) as route:
            for data, at, length in route.ask(request, _GET_FILTER):
                _, _, handle, _, info = _tc.unpack_from(data, at + 16)
                found = {n: data[s:e] for n, s, e in attributes(data, at + 36, at + length)}
                if found.get(_KIND) != b"bpf\0" or not handle:
                    continue
                options = found.get(_OPTIONS, b"")
                parts = {n: options[s:e] for n, s, e in attributes(options, 0, len(options))}
                if parts.get(_NAME, b"").rstrip(b"\0").decode(errors="replace") == name:
                    program = struct.unpack("=I", parts.get(_ID, bytes(4)))[0]
                    return Filter(name, program, handle, info)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT, errno.ENODEV):
            raise
    return None


def put(index: int, parent: int, name: str, program: int) -> bool:
    """Has the device run this program (a file descriptor), in the place of the one of that name if
    there is one, without a gap. Raises OSError: EEXIST if another's is where ours should be."""
    there = find(index, parent, name)
    with Netlink(socket.NETLINK_ROUTE) as route:
        kind = attribute(_KIND, b"clsact\0")
        try:
            qdisc = _tc.pack(0, index, _HANDLE, _CLSACT, 0)
            route.send(qdisc + kind, _NEW_QDISC, _CREATE | _EXCLUSIVE)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
        options = attribute(_FD, struct.pack("=I", program))
        options += attribute(_NAME, name.encode() + b"\0")
        options += attribute(_FLAGS, struct.pack("=I", _DIRECT_ACTION))
        handle = there.handle if there else _OWN_HANDLE
        info = there.info if there else _PRIORITY << 16 | _ALL
        request = _tc.pack(0, index, handle, parent, info)
        request += attribute(_KIND, b"bpf\0") + attribute(_OPTIONS | 0x8000, options)
        try:
            route.send(request, _NEW_FILTER, _CREATE if there else _CREATE | _EXCLUSIVE)
        except FileExistsError:
            text = f"another's filter has priority {_PRIORITY} there ('tc filter show' names it)"
            raise OSError(errno.EEXIST, text) from None
    return True


def delete(index: int, parent: int, name: str) -> bool:
    """Whether there was one of that name. Raises OSError."""
    there = find(index, parent, name)
    if there is None:
        return False
    request = _tc.pack(0, index, there.handle, parent, there.info)
    with Netlink(socket.NETLINK_ROUTE) as route:
        route.send(request + attribute(_KIND, b"bpf\0"), _DELETE_FILTER)
    return True
