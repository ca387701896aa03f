"""To endpoints on other nodes and back: addresses, ports, MAC addresses, TTL, checksums."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, UDP, IPOption
from scapy.layers.inet6 import (
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.packet import Packet, Raw

from pointsman.values import TCP as TCP_NUMBER
from tests.kernel.packets.node import EGRESS, ELSEWHERE, INGRESS, VLAN_DEVICE, Node
from tests.kernel.packets.table import Came, Case
from tests.kernel.packets.world import (
    ETH1_MAC,
    FAR,
    FAR_MAC,
    GATEWAY_MAC,
    IN_RANGE,
    LOST,
    MANY,
    NODE_MAC,
    OTHER_MAC,
    REMOTE,
    TARGET,
    V4,
    V6,
    VLAN,
    Family,
    arriving,
    leaving,
    tagged,
)
from tests.support.packets import PASS, SEND, XDP_REDIRECT, XDP_TX

_ALIEN = IPOption(bytes([0x07, 0x07, 0x04, 0, 0, 0, 0, 0]))  # record route, and the end


def syn(f: Family, port: int = REMOTE, to: str = "", **more: object) -> Packet:
    return f.tcp((f.client, IN_RANGE), (to or f.node, port), **more)


def sent(f: Family, endpoint: str = "", node: str = "", **more: object) -> Packet:
    """The same packet as the endpoint gets it."""
    source, target = node or f.node, endpoint or f.remote
    return f.tcp((source, IN_RANGE), (target, TARGET), **{"ttl": 63, **more})


def answer(f: Family, endpoint: str = "", node: str = "", **more: object) -> Packet:
    source, target = endpoint or f.remote, node or f.node
    return f.tcp((source, TARGET), (target, IN_RANGE), **{"flags": "SA", **more})


def answered(f: Family, port: int = REMOTE, to: str = "", **more: object) -> Packet:
    """The same packet as the client gets it."""
    return f.tcp((to or f.node, port), (f.client, IN_RANGE), **{"flags": "SA", "ttl": 63, **more})


def query(f: Family, data: bytes = b"datagram", port: int = REMOTE, **more: object) -> Packet:
    return f.udp((f.client, IN_RANGE), (f.node, port), data, **more)


def query_sent(f: Family, data: bytes = b"datagram", **more: object) -> Packet:
    return f.udp((f.node, IN_RANGE), (f.remote, TARGET), data, **{"ttl": 63, **more})


def without_checksum(packet: Packet) -> Packet:
    packet[UDP].chksum = 0
    return packet


def extended(f: Family, source: str, destination: tuple[str, int], ttl: int = 64) -> Packet:
    """A datagram behind extension headers of every kind."""
    return (
        f.ip(source, destination[0], ttl)
        / IPv6ExtHdrHopByHop(options=[PadN(optdata=bytes(4))])
        / IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(12))])
        / IPv6ExtHdrRouting(segleft=0, addresses=["2001:db8:9::9"])
        / IPv6ExtHdrDestOpt()
        / UDP(sport=IN_RANGE, dport=destination[1])
        / Raw(b"behind much")
    )


def zero_sum(f: Family) -> bytes:
    """A payload with which the checksum of what the endpoint gets is 0, which is sent as 0xffff."""
    plain = query_sent(f, bytes(2))
    check = UDP(bytes(plain[UDP])).chksum
    return check.to_bytes(2, "big")


_SYN = Came(lambda f: arriving(syn(f)))
_FAR_SYN = Came(lambda f: arriving(syn(f, FAR)))
_QUERY = Came(lambda f: arriving(query(f)))

CASES = [
    Case("SYN to a NodePort", lambda f: arriving(syn(f)), SEND, lambda f: leaving(sent(f)),
         counts={"FLOW_BEGUN": 1, "PACKET_FORWARDED": 1}),
    Case("SYN to a load balancer's address", lambda f: arriving(syn(f, 80, f.vip)), SEND,
         lambda f: leaving(sent(f))),
    Case("SYN to a NodePort at the node's other address", lambda f: arriving(syn(f, to=f.node1)),
         SEND, lambda f: leaving(sent(f))),
    Case("SYN to an endpoint beyond another device", lambda f: arriving(syn(f, FAR)), SEND,
         lambda f: leaving(sent(f, f.far, f.node1), FAR_MAC, source=ETH1_MAC)),
    Case("datagram", lambda f: arriving(query(f)), SEND, lambda f: leaving(query_sent(f)),
         counts={"FLOW_BEGUN": 1, "PACKET_FORWARDED": 1}),
    Case("datagram of odd length", lambda f: arriving(query(f, b"odd")), SEND,
         lambda f: leaving(query_sent(f, b"odd"))),
    Case("datagram without payload", lambda f: arriving(query(f, b"")), SEND,
         lambda f: leaving(query_sent(f, b""))),
    Case("datagram of 1,472 bytes", lambda f: arriving(query(f, bytes(range(250)) * 5)), SEND,
         lambda f: leaving(query_sent(f, bytes(range(250)) * 5))),
    Case("datagram with TTL 2", lambda f: arriving(query(f, ttl=2)), SEND,
         lambda f: leaving(query_sent(f, ttl=1))),
    Case("datagram with TTL 255", lambda f: arriving(query(f, ttl=255)), SEND,
         lambda f: leaving(query_sent(f, ttl=254))),
    Case("datagram without checksum", lambda f: arriving(without_checksum(query(f))), SEND,
         lambda f: leaving(without_checksum(query_sent(f)))),
    Case("datagram whose checksum becomes 0", lambda f: arriving(query(f, zero_sum(f))), SEND,
         lambda f: leaving(query_sent(f, zero_sum(f)))),
    Case("datagram with a type of service", lambda f: arriving(query(f, tos=0xB9)), SEND,
         lambda f: leaving(query_sent(f, tos=0xB9)), families=(V4,)),
    Case("datagram with a traffic class and a flow label",
         lambda f: arriving(query(f, tc=0xB9, fl=0x12345)), SEND,
         lambda f: leaving(query_sent(f, tc=0xB9, fl=0x12345)), families=(V6,)),
    Case("IPv4 options", lambda f: arriving(syn(f, options=[_ALIEN])), SEND,
         lambda f: leaving(sent(f, options=[_ALIEN])), families=(V4,)),
    Case("40 bytes of IPv4 options", lambda f: arriving(syn(f, options=[IPOption(b"\1" * 40)])),
         SEND, lambda f: leaving(sent(f, options=[IPOption(b"\1" * 40)])), families=(V4,)),
    Case("IPv6 extension headers", lambda f: arriving(extended(f, f.client, (f.node, REMOTE))),
         SEND, lambda f: leaving(extended(f, f.node, (f.remote, TARGET), 63)), families=(V6,)),
    Case("TCP with payload and options", lambda f: arriving(
         _rich(syn(f, flags="PA", data=b"x" * 77))), SEND,
         lambda f: leaving(_rich(sent(f, flags="PA", data=b"x" * 77))), (_SYN,)),
    Case("SYN-ACK of the endpoint", lambda f: arriving(answer(f)), SEND,
         lambda f: leaving(answered(f), GATEWAY_MAC), (_SYN,), counts={"PACKET_REPLIED": 1}),
    Case("SYN-ACK of an endpoint beyond another device",
         lambda f: arriving(answer(f, f.far, f.node1), source=FAR_MAC, to=ETH1_MAC), SEND,
         lambda f: leaving(answered(f, FAR), GATEWAY_MAC), (_FAR_SYN,), device="eth1"),
    Case("answer to a datagram", lambda f: arriving(f.udp((f.remote, TARGET), (f.node, IN_RANGE))),
         SEND, lambda f: leaving(f.udp((f.node, REMOTE), (f.client, IN_RANGE), ttl=63),
         GATEWAY_MAC), (_QUERY,)),
    Case("answer without checksum", lambda f: arriving(without_checksum(
         f.udp((f.remote, TARGET), (f.node, IN_RANGE)))), SEND,
         lambda f: leaving(without_checksum(f.udp((f.node, REMOTE), (f.client, IN_RANGE), ttl=63)),
         GATEWAY_MAC), (_QUERY,), families=(V4,)),
    Case("answer with TTL 1", lambda f: arriving(answer(f, ttl=1)), PASS, given=(_SYN,)),
    Case("answer from an address that is not the endpoint's",
         lambda f: arriving(answer(f, f.remote2)), PASS, given=(_SYN,)),
    Case("answer to another port", lambda f: arriving(f.tcp((f.remote, TARGET), (f.node, 61235))),
         PASS, given=(_SYN,)),
    Case("ACK that closes the handshake", lambda f: arriving(syn(f, flags="A")), SEND,
         lambda f: leaving(sent(f, flags="A")), (_SYN, Came(lambda f: arriving(answer(f)))),
         counts={"FLOW_PROMOTED": 1, "FLOW_BEGUN": 0}),
    Case("no neighbour", lambda f: arriving(syn(f, LOST)), PASS, counts={"PACKET_SLOW": 1}),
]  # fmt: skip


def _rich(packet: Packet) -> Packet:
    packet["TCP"].options = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (5, 6)), ("WScale", 7)]
    return packet


@pytest.mark.parametrize(
    ("case", "f"),
    [pytest.param(case, f, id=f"{case.name}, {f}") for case in CASES for f in case.families],
)
def test_xdp_forwards(node: Node, case: Case, f: Family) -> None:
    case.run(node, f)


@pytest.mark.parametrize(
    ("case", "f"),
    [
        pytest.param(case, f, id=f"{case.name}, {f}")
        for case in CASES
        for f in case.families
        if case.name != "no neighbour"  # TC leaves that to the kernel
    ],
)
def test_tc_forwards_alone(node: Node, case: Case, f: Family) -> None:
    """Where a device has no XDP. The kernel writes the link-layer header later."""
    given = tuple(Came(came.build, INGRESS, came.device) for came in case.given)
    alone = Case(case.name, case.packet, case.verdict, case.becomes, given, INGRESS, case.device,
                 case.counts)  # fmt: skip
    alone.run(node, f)


@pytest.mark.parametrize("f", [V4, V6], ids=repr)
def test_tc_sends_what_xdp_had_no_neighbour_for(node: Node, f: Family) -> None:
    frame = bytes(arriving(syn(f, LOST)))
    assert node.send(frame).verdict == PASS
    outcome = node.send(frame, INGRESS)
    assert outcome.verdict == SEND
    assert outcome.frame[14:].hex() == bytes(sent(f, f.lost)).hex()


@pytest.mark.parametrize("f", [V4, V6], ids=repr)
def test_the_way_out_says_the_verdict(node: Node, f: Family) -> None:
    """Back out of the device that it came from, or to another one."""
    assert node.send(arriving(syn(f))).code == XDP_TX
    assert node.send(arriving(syn(f, FAR))).code == XDP_REDIRECT


@pytest.mark.parametrize("f", [V4, V6], ids=repr)
@pytest.mark.parametrize("hook", [EGRESS, INGRESS])
def test_what_xdp_sent_is_not_translated_again(node: Node, f: Family, hook: str) -> None:
    node.send(arriving(syn(f)))
    frame = bytes(leaving(sent(f)))
    outcome = node.send(frame, hook)
    assert (outcome.verdict, outcome.frame) == (PASS, frame)


@pytest.mark.parametrize("f", [V4, V6], ids=repr)
def test_padding_behind_a_packet_is_no_part_of_it(node: Node, f: Family) -> None:
    padding = b"\xa5" * 9
    outcome = node.send(bytes(arriving(query(f, b"abc"))) + padding)
    assert outcome.verdict == SEND
    assert outcome.frame.hex() == (bytes(leaving(query_sent(f, b"abc"))) + padding).hex()


@pytest.mark.parametrize("f", [V4, V6], ids=repr)
def test_a_wrong_checksum_stays_wrong(node: Node, f: Family) -> None:
    """Amended by what changed, never computed anew: the receiver has to find the damage."""
    damaged = bytearray(bytes(arriving(query(f, b"payload"))))
    damaged[-1] ^= 0x10
    outcome = node.send(bytes(damaged))
    wanted = bytearray(bytes(leaving(query_sent(f, b"payload"))))
    wanted[-1] ^= 0x10
    assert outcome.frame.hex() == bytes(wanted).hex()


def test_a_wrong_ipv4_header_checksum_stays_wrong(node: Node) -> None:
    packet, wanted = arriving(syn(V4)), leaving(sent(V4))
    right = IP(bytes(packet[IP])).chksum
    packet[IP].chksum = right ^ 0x0100
    outcome = node.send(packet)
    if outcome.verdict == SEND:
        assert IP(outcome.frame[14:]).chksum != IP(bytes(wanted[IP])).chksum


@pytest.mark.parametrize("f", [V4, V6], ids=repr)
def test_many_packets_of_one_flow_reach_one_endpoint(node: Node, f: Family) -> None:
    """Sequence numbers and payloads are the endpoints' business."""
    first = node.send(arriving(f.tcp((f.client, IN_RANGE), (f.node, MANY))))
    for number in range(20):
        packet = f.tcp((f.client, IN_RANGE), (f.node, MANY), "PA", bytes([number]) * number)
        outcome = node.send(arriving(packet))
        assert outcome.verdict == SEND
        assert outcome.frame[:12] == first.frame[:12]
        there = slice(30, 34) if f is V4 else slice(38, 54)
        assert outcome.frame[there] == first.frame[there]
    assert len([flow for flow in node.lab.flows() if flow.proto == TCP_NUMBER]) == 2


def test_the_frame_that_leaves_has_the_devices_own_address(node: Node) -> None:
    outcome = node.send(arriving(syn(V4)))
    assert outcome.frame[6:12] == bytes.fromhex(NODE_MAC.replace(":", ""))


def from_vlan(f: Family, flags: str = "S", **more: object) -> Packet:
    return f.tcp((f.neighbour, IN_RANGE), (f.node5, REMOTE), flags, **more)


@pytest.mark.parametrize("f", [V4, V6], ids=repr)
def test_a_tag_stays_on_the_way_along_the_vlan(node: Node, f: Family) -> None:
    node.serve(f, REMOTE, (f.peer, ELSEWHERE))
    priority = 0xA000
    frame = bytearray(bytes(tagged(arriving(from_vlan(f)))))
    frame[14:16] = (priority | VLAN).to_bytes(2, "big")
    wanted = bytearray(bytes(tagged(leaving(sent(f, f.peer, f.node5)))))
    wanted[14:16] = frame[14:16]
    outcome = node.send(bytes(frame))
    assert outcome.code == XDP_TX
    assert outcome.frame.hex() == wanted.hex()
    back = node.send(tagged(arriving(answer(f, f.peer, f.node5), source=OTHER_MAC)))
    there = f.tcp((f.node5, REMOTE), (f.neighbour, IN_RANGE), "SA", ttl=63)
    assert back.code == XDP_TX
    assert back.frame.hex() == bytes(tagged(leaving(there, GATEWAY_MAC))).hex()


@pytest.mark.parametrize("f", [V4, V6], ids=repr)
def test_where_a_tag_comes_off_or_goes_on_tc_does_it(node: Node, f: Family) -> None:
    """XDP leaves such frames as they are; the kernel takes the tag off before TC sees them."""
    frame = bytes(tagged(arriving(from_vlan(f))))
    outcome = node.send(frame)
    assert (outcome.verdict, outcome.frame) == (PASS, frame)
    onward = node.send(arriving(from_vlan(f)), INGRESS, VLAN_DEVICE)
    assert (onward.verdict, onward.frame[14:]) == (SEND, bytes(sent(f)))
    back = bytes(arriving(answer(f), source=OTHER_MAC))
    outcome = node.send(back)
    assert (outcome.verdict, outcome.frame) == (PASS, back)
    reply = node.send(back, INGRESS)
    there = f.tcp((f.node5, REMOTE), (f.neighbour, IN_RANGE), "SA", ttl=63)
    assert (reply.verdict, reply.frame[14:]) == (SEND, bytes(there))


@pytest.mark.parametrize("f", [V4, V6], ids=repr)
def test_a_tag_of_priority_alone_is_no_vlan(node: Node, f: Family) -> None:
    """VLAN 0 says only how urgent a frame is (IEEE 802.1Q): the frame is eth0's own. The tag stays,
    or all is left to the kernel."""
    frame = bytes(tagged(arriving(syn(f)), 0))
    outcome = node.send(frame)
    wanted = frame if outcome.verdict == PASS else bytes(tagged(leaving(sent(f)), 0))
    assert outcome.verdict in (PASS, SEND)
    assert outcome.frame.hex() == wanted.hex()
