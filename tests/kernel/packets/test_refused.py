"""What nobody serves is told so: port unreachable, with the packet that it is about."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP, UDP, fragment
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from tests.kernel.packets.node import EGRESS, INGRESS, XDP, Node
from tests.kernel.packets.table import Build
from tests.kernel.packets.test_errors import error
from tests.kernel.packets.world import (
    EMPTY,
    FAMILIES,
    GATEWAY_MAC,
    IN_RANGE,
    NARROW,
    NARROW_PORT,
    NODE_MAC,
    TARGET,
    V4,
    V6,
    VLAN,
    Family,
    arriving,
    leaving,
    tagged,
)
from tests.support.packets import DROP, PASS, SEND


def told(f: Family, frame: bytes, about: Packet, *, linked: bool = True) -> Packet:
    """The ICMP message in a frame, once all is right that has to be: lengths, checksums, the way
    back, and that it quotes the packet as the client sent it."""
    frame_ = Ether(frame)
    if linked:
        assert (frame_.src, frame_.dst) == (NODE_MAC, GATEWAY_MAC)
    ip = frame_.getlayer(IP if f is V4 else IPv6)
    assert ip is not None, f"no answer in {frame.hex()}"
    original = bytes(about)
    assert ip.dst == f.client
    assert ip.src in (f.node, f.vip)
    if f is V4:
        assert ip.len == len(ip)
        assert ip.len <= 576
        assert ip.ttl > 1
        assert ip.flags.MF == 0
        fresh = ip.copy()
        del fresh.chksum, fresh[ICMP].chksum
        quote = bytes(ip[ICMP].payload)
        assert len(quote) >= 28
    else:
        assert ip.plen == len(ip) - 40
        assert len(ip) <= 1280
        assert ip.hlim > 1
        fresh = ip.copy()
        message = fresh.payload
        del message.cksum
        quote = bytes(ip.payload.payload)
        assert len(quote) >= 48
    assert bytes(fresh).hex() == bytes(ip).hex(), "a checksum is wrong"
    assert original.startswith(quote) or original == quote[: len(original)]
    return ip.payload


def _syn(f: Family, port: int = EMPTY, **more: object) -> Packet:
    return f.tcp((f.client, IN_RANGE), (f.node, port), **more)


def _query(f: Family, data: bytes = b"datagram", port: int = EMPTY, **more: object) -> Packet:
    return f.udp((f.client, IN_RANGE), (f.node, port), data, **more)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(_syn, id="SYN"),
        pytest.param(_query, id="datagram"),
        pytest.param(lambda f: _query(f, b""), id="empty"),
        pytest.param(lambda f: _query(f, b"odd"), id="odd"),
        pytest.param(lambda f: _query(f, bytes(range(256)) * 5), id="long"),
        pytest.param(lambda f: _query(f, ttl=1), id="TTL 1"),
        pytest.param(lambda f: f.tcp((f.client, IN_RANGE), (f.vip, EMPTY - 30000)), id="VIP"),
    ],
)
def test_no_endpoints_is_port_unreachable(node: Node, f: Family, build: Build) -> None:
    about = build(f)
    before = node.lab.counts()["PACKET_REFUSED"]
    outcome = node.send(arriving(about))
    assert outcome.verdict == SEND
    message = told(f, outcome.frame, about)
    if f is V4:
        assert (message.type, message.code) == (3, 3)
    else:
        assert isinstance(message, ICMPv6DestUnreach)
        assert message.code == 4
    assert node.lab.counts()["PACKET_REFUSED"] == before + 1
    assert not node.lab.flows()


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_tc_has_the_stack_refuse_a_connection(node: Node, f: Family) -> None:
    """TC can't make an answer of every packet. The stack can: the packet goes to port 0 of the
    node, which nobody listens on, and what the stack says leaves as if the VIP said it."""
    for vip, port in ((f.node, EMPTY), (f.vip, EMPTY - 30000)):
        client = (f.client, IN_RANGE + (vip == f.vip))
        before = node.lab.counts()["PACKET_REFUSED"]
        outcome = node.send(arriving(f.tcp(client, (vip, port))), INGRESS)
        assert outcome.verdict == PASS
        assert outcome.frame == bytes(arriving(f.tcp(client, (f.node, 0))))
        assert node.lab.counts()["PACKET_REFUSED"] == before + 1
        reset = node.send(leaving(f.tcp((f.node, 0), client, "RA")), EGRESS)
        assert reset.frame == bytes(leaving(f.tcp((vip, port), client, "RA")))


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_tc_has_the_stack_refuse_a_datagram(node: Node, f: Family) -> None:
    about = _query(f)
    outcome = node.send(arriving(about), INGRESS)
    shown = f.udp((f.client, IN_RANGE), (f.node, 0))
    assert (outcome.verdict, outcome.frame) == (PASS, bytes(arriving(shown)))
    said = error(f, "port unreachable", f.node, f.client, bytes(shown), 64)
    answer = node.send(leaving(said), EGRESS)
    wanted = error(f, "port unreachable", f.node, f.client, bytes(about), 64)
    assert answer.frame.hex() == bytes(leaving(wanted)).hex()


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_the_answer_goes_back_with_its_tag(node: Node, f: Family) -> None:
    outcome = node.send(tagged(arriving(f.tcp((f.client, 5), (f.node5, EMPTY))), VLAN))
    assert outcome.verdict == SEND
    assert Ether(outcome.frame).vlan == VLAN


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_tag_of_priority_alone_does_no_harm(node: Node, f: Family) -> None:
    about = _syn(f)
    frame = bytes(tagged(arriving(about), 0))
    outcome = node.send(frame)
    if outcome.verdict == PASS:
        assert outcome.frame == frame
    elif outcome.verdict == SEND:
        told(f, outcome.frame, about)


def test_options_are_quoted_with_the_header(node: Node) -> None:
    about = _query(V4, options=b"\x01" * 8)
    told(V4, node.send(arriving(about)).frame, about)


def test_nobody_is_told_about_a_later_fragment(node: Node) -> None:
    """RFC 1122: no ICMP error about a fragment that is not the first."""
    first, *later = fragment(_query(V4, bytes(2000)), 800)
    told(V4, node.send(arriving(first)).frame, first)
    for piece in later:
        outcome = node.send(arriving(piece))
        assert outcome.verdict in (PASS, DROP)


@pytest.mark.parametrize("source", ["255.255.255.255", "224.0.0.1", "0.0.0.0", "127.0.0.1"])
def test_nobody_is_told_who_can_be_no_sender(node: Node, source: str) -> None:
    """RFC 1122: no ICMP error to an address that is not one host's."""
    packet = V4.udp((source, IN_RANGE), (V4.node, EMPTY))
    assert node.send(arriving(packet)).verdict != SEND


@pytest.mark.parametrize("source", ["ff02::1", "::", "::1"])
def test_nobody_is_told_who_can_be_no_sender_in_ipv6(node: Node, source: str) -> None:
    packet = V6.udp((source, IN_RANGE), (V6.node, EMPTY))
    assert node.send(arriving(packet)).verdict != SEND


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_flood_is_not_answered_packet_by_packet(node: Node, f: Family) -> None:
    """Else this node would be a mirror for somebody else's attack."""
    frame = bytes(arriving(_syn(f)))
    before = node.lab.counts()
    verdicts = [node.send(frame).verdict for _ in range(6000)]
    after = node.lab.counts()
    refused = after["PACKET_REFUSED"] - before["PACKET_REFUSED"]
    limited = after["DROP_ICMP_LIMIT"] - before["DROP_ICMP_LIMIT"]
    assert verdicts.count(SEND) == refused
    assert verdicts.count(DROP) == limited
    assert 0 < refused < 6000
    assert refused + limited == 6000


# -- the path's MTU ----------------------------------------------------------------------------


@pytest.mark.parametrize("hook", [XDP, INGRESS])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
@pytest.mark.parametrize("kind", ["datagram", "segment"])
def test_what_does_not_fit_the_way_on_is_told(node: Node, f: Family, kind: str, hook: str) -> None:
    data = bytes(range(250)) * 5 + bytes(NARROW - 1250)
    more = {"flags": "DF"} if f is V4 else {}
    if kind == "datagram":
        about = _query(f, data, NARROW_PORT, **more)
    else:
        node.send(arriving(_syn(f, NARROW_PORT)), hook)
        about = f.ip(f.client, f.node, **more) / _syn(f, NARROW_PORT, data=data)["TCP"]
        about["TCP"].flags = "PA"
        about = about.__class__(bytes(about))
    outcome = node.send(arriving(about), hook)
    assert outcome.verdict == SEND
    message = told(f, outcome.frame, about, linked=hook == XDP)
    if f is V4:
        assert (message.type, message.code, message.nexthopmtu) == (3, 4, NARROW)
    else:
        assert isinstance(message, ICMPv6PacketTooBig)
        assert message.mtu == NARROW


@pytest.mark.parametrize("hook", [XDP, INGRESS])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_what_just_fits_goes_on(node: Node, f: Family, hook: str) -> None:
    room = NARROW - len(_query(f, b""))
    more = {"flags": "DF"} if f is V4 else {}
    outcome = node.send(arriving(_query(f, bytes(room), NARROW_PORT, **more)), hook)
    assert outcome.verdict == SEND
    wanted = f.udp((f.node, IN_RANGE), (f.narrow, TARGET), bytes(room), 63, **more)
    assert outcome.frame[14:] == bytes(leaving(wanted))[14:]


@pytest.mark.parametrize("hook", [XDP, INGRESS])
def test_also_without_df_the_sender_is_told(node: Node, hook: str) -> None:
    """Neither XDP nor TC can make fragments. Who sent it can, once it knows."""
    about = _query(V4, bytes(NARROW), NARROW_PORT)
    outcome = node.send(arriving(about), hook)
    message = told(V4, outcome.frame, about, linked=hook == XDP)
    assert (message.type, message.code, message.nexthopmtu) == (3, 4, NARROW)


@pytest.mark.parametrize("hook", [XDP, INGRESS])
def test_of_fragments_that_do_not_fit_the_first_is_told(node: Node, hook: str) -> None:
    first, second, *_ = fragment(_query(V4, bytes(4000), NARROW_PORT), 1480)
    outcome = node.send(arriving(first), hook)
    assert told(V4, outcome.frame, first, linked=hook == XDP).nexthopmtu == NARROW
    assert node.send(arriving(second), hook).verdict == DROP


def test_a_checksum_of_none_is_quoted_as_none(node: Node) -> None:
    about = _query(V4, bytes(NARROW), NARROW_PORT, flags="DF")
    about[UDP].chksum = 0
    outcome = node.send(arriving(about))
    message = told(V4, outcome.frame, about)
    assert bytes(message.payload)[26:28] == bytes(2)
    assert not isinstance(message.payload, Raw)
