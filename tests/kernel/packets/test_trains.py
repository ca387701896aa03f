"""Trains: several packets that the kernel has as one, from a device's GRO or a sender's GSO. XDP never
sees one; for TC such a packet may be longer than what its header can say, and than any MTU."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrHopByHop, Jumbo
from scapy.packet import Packet

from tests.kernel.packets.node import INGRESS, Node
from tests.kernel.packets.world import FAMILIES, IN_RANGE, REMOTE, TARGET, V6, Family, arriving
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


def test_in_ipv6_it_may_say_so_in_an_option(node: Node) -> None:
    """Up to Linux 6.18 or so a train begins with a jumbogram's option, which its packets don't have."""
    begin(node, V6)

    def with_option(source: tuple[str, int], to: tuple[str, int], ttl: int) -> Packet:
        plain = V6.tcp(source, to, "A", DATA, ttl)
        option = IPv6ExtHdrHopByHop(options=[Jumbo(jumboplen=70_000)])
        return jumbo(IPv6(src=source[0], dst=to[0], hlim=ttl) / option / plain["TCP"])

    sent = with_option((V6.client, IN_RANGE), (V6.node, REMOTE), 64)
    outcome = node.send(arriving(sent), INGRESS, segment=EACH)
    assert outcome.verdict == SEND
    wanted = with_option((V6.node, IN_RANGE), (V6.remote, TARGET), 63)
    assert outcome.frame[14:] == bytes(wanted)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_single_packet_has_to_say_its_length(node: Node, f: Family) -> None:
    begin(node, f)
    frame = bytes(arriving(jumbo(train(f))))
    outcome = node.send(frame, INGRESS)
    assert (outcome.verdict, outcome.frame) == (PASS, frame)
