"""Clients, and endpoints, behind a device without frames: WireGuard, ipip; here a tun."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from pointsman.netlink import filters
from tests.kernel.packets.node import EGRESS, INGRESS, Node
from tests.kernel.packets.world import (
    FAMILIES,
    IN_RANGE,
    NODE_MAC,
    OTHER_MAC,
    REMOTE,
    TARGET,
    V4,
    V6,
    Family,
)

_TUN = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TUN_NO_PI = 0x400454CA, 0x1001
_PARENTS = {INGRESS: filters.INGRESS, EGRESS: filters.EGRESS}


class Tun:
    """t0 of the node, with TC's programs there and on eth0; `wire` is the other end of eth0."""

    def __init__(self, node: Node) -> None:
        self.node, self.lab = node, node.lab
        self.fd = self.lab.on_node(self._open)
        self.lab.ip("link set t0 up")
        for f in FAMILIES:
            self.lab.ip(f"route add {f.stranger} dev t0")
        self.lab.serve_device("t0", ("DEVICE_NODE", "DEVICE_RAW"), (V4.node, V6.node))
        for device in ("t0", "eth0"):
            for hook, parent in _PARENTS.items():
                program, index = self.lab.program(hook), self.lab.index(device)
                self.lab.on_node(filters.put, index, parent, "test", program)
        self.wire = self.lab.on_node(
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        )
        self.wire.bind(("xeth0", 0))

    def _open(self) -> int:
        fd = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"t0", _IFF_TUN_NO_PI))
        return fd

    def close(self) -> None:
        self.wire.close()
        index = self.lab.devices.pop("t0")
        self.lab.map("devices").delete(struct.pack("=I", index))
        os.close(self.fd)  # t0 goes with it
        for parent in _PARENTS.values():
            self.lab.on_node(filters.delete, self.lab.index("eth0"), parent, "test")


@pytest.fixture
def tun(node: Node, missing: Callable[[str], None]) -> Iterator[Tun]:
    if not _TUN.exists():
        missing(str(_TUN))
    with contextlib.closing(Tun(node)) as made:
        yield made


def _wait(source: int, read: Callable[[], bytes], is_it: Callable[[bytes], bool]) -> bytes:
    """The first that fits, of what comes within a minute; b"" if none does."""
    end = time.monotonic() + 60
    while (left := end - time.monotonic()) > 0 and select.select([source], [], [], left)[0]:
        if is_it(data := read()):
            return data
    return b""


def _ports(packet: Packet, source: int, destination: int) -> bool:
    inner = packet.payload
    return (getattr(inner, "sport", 0), getattr(inner, "dport", 0)) == (source, destination)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_client_behind_a_tunnel_reaches_an_endpoint_elsewhere(tun: Tun, f: Family) -> None:
    layer = IP if f is V4 else IPv6
    os.write(tun.fd, bytes(f.tcp((f.stranger, IN_RANGE), (f.node, REMOTE))))
    there = _wait(
        tun.wire.fileno(),
        lambda: tun.wire.recv(2048),
        lambda data: _ports(Ether(data).payload, IN_RANGE, TARGET),
    )
    assert there, tun.lab.counts()
    wanted = f.tcp((f.node, IN_RANGE), (f.remote, TARGET), ttl=63)
    assert there == bytes(Ether(src=NODE_MAC, dst=OTHER_MAC) / wanted)

    answer = f.tcp((f.remote, TARGET), (f.node, IN_RANGE), "SA")
    tun.wire.send(bytes(Ether(src=OTHER_MAC, dst=NODE_MAC) / answer))
    back = _wait(
        tun.fd,
        lambda: os.read(tun.fd, 2048),
        lambda data: _ports(layer(data), REMOTE, IN_RANGE),
    )
    assert back == bytes(f.tcp((f.node, REMOTE), (f.stranger, IN_RANGE), "SA", ttl=63))
