"""Trains: several packets that the kernel has as one, from a device's GRO or a sender's GSO. XDP
never sees one; at TC it may be longer than what its header can say, and than any MTU."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6, IPv6ExtHdrHopByHop, Jumbo
from scapy.packet import Packet

from tests.kernel.packets.node import INGRESS, Node
from tests.kernel.packets.test_refused import told
from tests.kernel.packets.world import (
    FAMILIES,
    IN_RANGE,
    NARROW,
    NARROW_PORT,
    REMOTE,
    TARGET,
    V4,
    V6,
    Family,
    arriving,
)
from tests.support.packets import PASS, SEND

#: Bytes of payload in a train, and of each packet of it.
DATA, EACH = bytes(range(250)) * 12, 1000


def train(f: Family, *, port: int = REMOTE, data: bytes = DATA, **more: object) -> Packet:
    """What the client sends, after its SYN."""
    return f.tcp((f.client, IN_RANGE), (f.node, port), "A", data, **more)


def jumbo(packet: Packet) -> Packet:
    """As if it were longer than 65,535 bytes: its header does not say how long."""
    built = packet.__class__(bytes(packet))
    if isinstance(built, IP):
        built.len = 0
        del built.chksum
    else:
        built.plen = 0
    return built.__class__(bytes(built))


def begin(node: Node, f: Family, port: int = REMOTE) -> None:
    syn = f.tcp((f.client, IN_RANGE), (f.node, port), "S")
    assert node.send(arriving(syn), INGRESS).verdict == SEND


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_one_that_does_not_say_its_length_is_translated(node: Node, f: Family) -> None:
    """BIG TCP. As the flow's other packets, or its connection would end here."""
    begin(node, f)
    outcome = node.send(arriving(jumbo(train(f))), INGRESS, segment=EACH)
    wanted = f.tcp((f.node, IN_RANGE), (f.remote, TARGET), "A", DATA, ttl=63)
    assert outcome.verdict == SEND
    assert outcome.frame[14:] == bytes(jumbo(wanted))


def _with_option(source: str, to: tuple[str, int], ttl: int) -> Packet:
    """As Linux before 6.19 has it: with the option of a jumbogram."""
    plain = V6.tcp((source, IN_RANGE), to, "A", DATA, ttl)
    option = IPv6ExtHdrHopByHop(options=[Jumbo(jumboplen=70_000)])
    return jumbo(IPv6(src=source, dst=to[0], hlim=ttl) / option / plain["TCP"])


def test_in_ipv6_an_option_may_say_it(node: Node) -> None:
    begin(node, V6)
    frame = arriving(_with_option(V6.client, (V6.node, REMOTE), 64))
    outcome = node.send(frame, INGRESS, segment=EACH)
    assert outcome.verdict == SEND
    assert outcome.frame[14:] == bytes(_with_option(V6.node, (V6.remote, TARGET), 63))


def test_that_option_is_in_none_of_its_packets(node: Node) -> None:
    """So it does not count where each has to fit."""
    begin(node, V6, NARROW_PORT)
    before = node.lab.counts()["PACKET_TOO_BIG"]
    frame = arriving(_with_option(V6.client, (V6.node, NARROW_PORT), 64))
    node.send(frame, INGRESS, segment=NARROW - 60)
    assert node.lab.counts()["PACKET_TOO_BIG"] == before
    node.send(frame, INGRESS, segment=NARROW - 59)
    assert node.lab.counts()["PACKET_TOO_BIG"] == before + 1


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_single_packet_has_to_say_its_length(node: Node, f: Family) -> None:
    begin(node, f)
    frame = bytes(arriving(jumbo(train(f))))
    outcome = node.send(frame, INGRESS)
    assert (outcome.verdict, outcome.frame) == (PASS, frame)


def _room(f: Family, header: int) -> int:
    """The payload of one packet that just fits the narrow way."""
    return NARROW - (20 if f is V4 else 40) - header


@pytest.mark.parametrize("kind", ["TCP", "UDP"])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_each_packet_of_one_has_to_fit_the_way(node: Node, f: Family, kind: str) -> None:
    more = {"flags": "DF"} if f is V4 else {}
    if kind == "TCP":
        begin(node, f, NARROW_PORT)
        packet = f.ip(f.client, f.node, **more) / train(f, port=NARROW_PORT)["TCP"]
        packet["TCP"].options = [("NOP", None)] * 12
        room = _room(f, 32)
    else:
        packet = f.udp((f.client, IN_RANGE), (f.node, NARROW_PORT), DATA, **more)
        room = _room(f, 8)
    frame = arriving(packet.__class__(bytes(packet)))
    fits = node.send(frame, INGRESS, segment=room)
    assert fits.verdict == SEND
    assert len(fits.frame) == len(frame)
    message = told(f, node.send(frame, INGRESS, segment=room + 1).frame, packet, linked=False)
    mtu = message.mtu if isinstance(message, ICMPv6PacketTooBig) else message.nexthopmtu
    assert mtu == NARROW
