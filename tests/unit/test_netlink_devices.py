"""What is read out of the kernel's messages about devices, addresses and routes."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from pointsman.devices import NO_MAC, Assigned, Device, Route
from pointsman.netlink import devices
from pointsman.netlink.wire import Netlink, attribute, attributes, nested
from pointsman.values import to_address

_HEADER = bytes(16)


class Kernel:
    """Stands for a netlink socket: answers with these messages, as they are behind their header."""

    def __init__(self, *messages: bytes) -> None:
        self._messages = messages

    def ask(self, _payload: bytes, _kind: int) -> Iterator[tuple[bytes, int, int]]:
        for each in self._messages:
            # Not at the start of the buffer, as most are not.
            yield bytes(8) + _HEADER + each, 8, len(_HEADER) + len(each)


def text(value: str) -> bytes:
    return value.encode() + b"\0"


def u32(value: int) -> bytes:
    return struct.pack("=I", value)


def link(index: int, name: str, *more: bytes, kind: int = 1, flags: int = 1) -> bytes:
    head = struct.pack("=BxHiII", 0, kind, index, flags, 0)
    return head + attribute(3, text(name)) + attribute(4, u32(1500)) + b"".join(more)


def vlan(tag: int, protocol: int = 0x8100) -> bytes:
    data = attribute(1, struct.pack("=H", tag)) + attribute(5, struct.pack(">H", protocol))
    return attribute(18, attribute(1, text("vlan")) + attribute(2, data))


def read(*messages: bytes) -> list[Device]:
    kernel: Any = Kernel(*messages)
    return list(devices._devices(kernel))


def test_a_vlan_names_the_device_below_and_its_tag() -> None:
    below = attribute(5, u32(2))
    ours, service_tag, elsewhere = read(
        link(3, "eth0.100", below, vlan(100)),
        link(4, "eth0.200", below, vlan(200, 0x88A8)),
        link(5, "eth0.300", below, vlan(300), attribute(37, u32(0))),
    )
    assert ours == Device(3, "eth0.100", kind="vlan", lower=2, vlan=100)
    # XDP below would not know these frames: another kind of tag, another namespace's device.
    assert (service_tag.lower, service_tag.vlan) == (0, 0)
    assert (elsewhere.lower, elsewhere.vlan) == (0, 0)


def test_a_device_without_frames_is_known() -> None:
    loopback, tunnel, gre, dummy, down = read(
        link(1, "lo", kind=772, flags=0x9),
        link(2, "wg0", kind=65534, flags=0x81),
        link(4, "gre1", kind=778, flags=0x81),
        link(5, "dummy0", flags=0x81),
        link(3, "eth0", flags=0),
    )
    assert (loopback.loopback, loopback.ethernet, loopback.raw) == (True, False, False)
    assert (tunnel.ethernet, tunnel.raw) == (False, True)
    for neither in (gre, dummy):
        assert (neither.ethernet, neither.raw) == (False, False)
    assert (down.ethernet, down.up) == (True, False)


def test_the_address_of_a_device() -> None:
    ethernet, tunnel = read(
        link(2, "eth0", attribute(1, b"\x02\0\0\0\0\x07")),
        link(3, "tunl0", attribute(1, b"\xc0\0\2\1"), kind=768),
    )
    assert (ethernet.mac, tunnel.mac) == (b"\x02\0\0\0\0\x07", NO_MAC)


def test_programs_of_xdp_by_mode() -> None:
    one = attribute(43, attribute(2, b"\x01") + attribute(4, u32(7)))
    two = attribute(43, attribute(2, b"\x04") + attribute(5, u32(7)) + attribute(6, u32(8)))
    none = attribute(43, attribute(2, b"\x00"))
    assert [one.xdp for one in read(link(2, "a", one), link(3, "b", two), link(4, "c", none))] == [
        (("native", 7),),
        (("native", 7), ("generic", 8)),
        (),
    ]


def address(text: str, flags: int = 0, scope: int = 0) -> bytes:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    head = struct.pack("=BBBBI", family, 24, flags & 0xFF, scope, 2)
    raw = socket.inet_pton(family, text)
    return head + attribute(1, raw) + attribute(8, u32(flags))


def test_addresses_that_may_be_used() -> None:
    kernel: Any = Kernel(
        address("192.0.2.1"),
        address("192.0.2.2", flags=0x01),  # secondary
        address("169.254.0.1", scope=253),
        address("2001:db8::1"),
        address("2001:db8::2", flags=0x01),  # temporary
        address("2001:db8::3", flags=0x40),  # tentative
        address("2001:db8::4", flags=0x20),  # deprecated
    )
    usable = {to_address(t) for t in ("192.0.2.1", "192.0.2.2", "2001:db8::1")}
    found = list(devices.assigned(kernel))
    assert {each.address for each in found if each.usable} == usable
    assert found[0] == Assigned(2, to_address("192.0.2.1"))


def route(*more: bytes, bits: int = 0, table: int = 254, kind: int = 1) -> bytes:
    head = struct.pack("=BBBBBBBBI", socket.AF_INET, bits, 0, 0, table, 0, 0, kind, 0)
    return head + b"".join(more)


def hop(index: int, gateway: str) -> bytes:
    more = attribute(5, socket.inet_pton(socket.AF_INET, gateway))
    return struct.pack("=HBBi", 8 + len(more), 0, 0, index) + more


def test_default_routes_of_the_main_table_with_all_their_hops() -> None:
    gateway = attribute(5, socket.inet_pton(socket.AF_INET, "192.0.2.254"))
    source = attribute(7, socket.inet_pton(socket.AF_INET, "192.0.2.1"))
    over_ipv6 = struct.pack("=H", socket.AF_INET6) + socket.inet_pton(socket.AF_INET6, "fe80::1")

    class OnlyIPv4(Kernel):
        def ask(self, payload: bytes, kind: int) -> Iterator[tuple[bytes, int, int]]:
            return super().ask(payload, kind) if payload[0] == socket.AF_INET else iter(())

    kernel: Any = OnlyIPv4(
        route(attribute(4, u32(2)), gateway, source, attribute(6, u32(100))),
        route(attribute(9, hop(3, "192.0.2.3") + hop(4, "192.0.2.4"))),
        route(attribute(4, u32(5)), attribute(18, over_ipv6)),
        route(attribute(4, u32(6)), bits=24),
        route(attribute(4, u32(7)), table=100),
        route(attribute(4, u32(8)), kind=7),  # unreachable
    )
    assert list(devices._defaults(kernel)) == [
        Route(2, False, to_address("192.0.2.1"), to_address("192.0.2.254"), 100),
        Route(3, gateway=to_address("192.0.2.3")),
        Route(4, gateway=to_address("192.0.2.4")),
        Route(5, gateway=to_address("fe80::1")),
    ]


def test_attributes_are_padded_and_nested() -> None:
    inner = attribute(1, b"abc") + attribute(2, b"")
    outer = attribute(9 | 0x8000, inner)  # NLA_F_NESTED
    ((kind, start, end),) = attributes(outer, 0, len(outer))
    assert kind == 9
    assert nested(outer[start:end]) == {1: b"abc", 2: b""}


class Socket:
    """Answers each request with two messages and the end; the first lists are interrupted, where
    `at` is the message that says so."""

    def __init__(self, interrupted: int, at: int) -> None:
        self.asked, self._interrupted, self._at = 0, interrupted, at

    def send(self, data: bytes) -> None:
        self.asked += 1
        self._sequence = struct.unpack_from("=IHHII", data)[3]

    def recv(self, _size: int) -> bytes:
        bad = self.asked <= self._interrupted
        return b"".join(
            struct.pack("=IHHII", 20, kind, 2 | (0x10 if bad and n == self._at else 0),
                        self._sequence, 0) + u32(self.asked)
            for n, kind in enumerate((16, 16, 3))
        )  # fmt: skip

    def close(self) -> None:
        pass


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_list_that_changed_while_it_was_read_is_asked_for_again(at: int) -> None:
    with Netlink(socket.NETLINK_ROUTE) as route:
        route._socket.close()
        kernel: Any = Socket(2, at)
        route._socket = kernel
        found = [struct.unpack_from("=I", data, at + 16)[0] for data, at, _ in route.ask(b"", 18)]
    assert (kernel.asked, found) == (3, [3, 3])


def test_a_list_that_always_changes_is_an_error() -> None:
    with Netlink(socket.NETLINK_ROUTE) as route:
        route._socket.close()
        kernel: Any = Socket(1000, 0)
        route._socket = kernel
        with pytest.raises(OSError, match="changed while it was read"):
            route.ask(b"", 18)
    assert kernel.asked < 100
