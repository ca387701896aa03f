"""A flow's way is asked for a few times a second, not for each packet: what changes is followed,
and what does not fit is not sent by it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from scapy.packet import Packet

from tests.kernel.packets.node import Node
from tests.kernel.packets.world import (
    ETH1_MAC,
    FAR,
    FAR_MAC,
    IN_RANGE,
    NARROW_PORT,
    NODE_MAC,
    OTHER_MAC,
    REMOTE,
    V4,
    V6,
    Family,
    arriving,
    tagged,
)
from tests.support.packets import DROP, PASS, SEND, XDP_REDIRECT, XDP_TX

NEW_MAC = "02:00:00:00:00:99"
_LIFE = 1.0  # WAY_LIFE, seconds; the clock that it is held against ticks every few ms
pytestmark = pytest.mark.parametrize("f", [V4, V6], ids=repr)


def datagram(f: Family, port: int = REMOTE, data: bytes = b"again") -> Packet:
    return f.udp((f.client, IN_RANGE), (f.node, port), data)


def macs(frame: bytes) -> tuple[str, str]:
    return frame[:6].hex(":"), frame[6:12].hex(":")


@pytest.fixture
def known(node: Node, f: Family) -> Iterator[Node]:
    """A flow whose way has just been asked for."""
    for _ in range(2):
        assert node.send(arriving(datagram(f))).code == XDP_TX
    yield node
    node.lab.ip(f"neigh replace {f.other} lladdr {OTHER_MAC} dev eth0 nud permanent")


def test_it_is_asked_for_again(known: Node, f: Family) -> None:
    known.lab.ip(f"neigh replace {f.other} lladdr {NEW_MAC} dev eth0 nud permanent")
    time.sleep(_LIFE + 0.05)
    outcome = known.send(arriving(datagram(f)))
    assert (outcome.code, macs(outcome.frame)) == (XDP_TX, (NEW_MAC, NODE_MAC))


def test_it_is_not_asked_for_each_packet(known: Node, f: Family) -> None:
    """Read off the entry, with steps of the clock between the packets."""
    asked = set()
    for _ in range(10):
        time.sleep(0.02)
        known.send(arriving(datagram(f)))
        asked.add(max(known.lab.ways()))
    assert 0 not in asked
    assert len(asked) < 8


def test_a_larger_packet_is_held_against_its_mtu(node: Node, f: Family) -> None:
    for _ in range(3):
        assert node.send(arriving(datagram(f, NARROW_PORT))).verdict == SEND
    counted = node.lab.counts()["PACKET_TOO_BIG"]
    big = datagram(f, NARROW_PORT, bytes(1400))
    if f is V4:
        big.flags = "DF"
    node.send(arriving(big))
    assert node.lab.counts()["PACKET_TOO_BIG"] == counted + 1


def test_it_is_for_one_device(node: Node, f: Family) -> None:
    """The same flow by another device, or with a tag, is sent as that needs it."""
    for _ in range(2):
        outcome = node.send(arriving(datagram(f, FAR)))
        assert (outcome.code, macs(outcome.frame)) == (XDP_REDIRECT, (FAR_MAC, ETH1_MAC))
    assert node.send(arriving(datagram(f, FAR)), device="eth1").code == XDP_TX
    assert node.send(tagged(arriving(datagram(f, FAR)))).verdict == PASS


def test_without_a_route_its_packets_are_dropped(known: Node, f: Family) -> None:
    route = f"route {{}} unreachable {f.remote}/{f.bits}"
    known.lab.ip(route.format("add"))
    try:
        time.sleep(_LIFE + 0.05)
        assert known.send(arriving(datagram(f))).verdict == DROP
    finally:
        known.lab.ip(route.format("del"))
