"""Direct server return: out to an endpoint's node in an IPIP tunnel, and there out of it again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6
from scapy.packet import Packet

from tests.kernel.packets.back import Back
from tests.kernel.packets.node import EGRESS, INGRESS, XDP, Node
from tests.kernel.packets.test_fragments import pieces
from tests.kernel.packets.test_refused import NARROW, NARROW_PORT, told
from tests.kernel.packets.world import (
    FAMILIES,
    IN_RANGE,
    LOCAL,
    MANY,
    REMOTE,
    TARGET,
    V4,
    Family,
    arriving,
    leaving,
)
from tests.support.packets import DROP, PASS, SEND

HEADER = {"IPv4": 20, "IPv6": 40}


@pytest.fixture(autouse=True)
def tunnels(node: Node) -> Iterator[None]:
    node.lab.configure(dsr=1)
    yield
    node.lab.configure(dsr=0)


def syn(f: Family, port: int, ttl: int = 64) -> Packet:
    return f.tcp((f.client, IN_RANGE), (f.node, port), ttl=ttl)


def tunnel(f: Family, source: str, destination: str, inner: Packet) -> Packet:
    outer = IP(src=source, dst=destination, id=0, ttl=64, proto=4) if f is V4 else None
    return (outer or IPv6(src=source, dst=destination, hlim=64, nh=41)) / inner


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_it_goes_whole_to_the_endpoints_node(node: Node, f: Family) -> None:
    before = node.lab.counts()["PACKET_TUNNELED"]
    outcome = node.send(arriving(syn(f, REMOTE)))
    assert outcome.verdict == SEND
    assert outcome.frame == bytes(leaving(tunnel(f, f.node, f.remote, syn(f, REMOTE, 63))))
    assert node.lab.counts()["PACKET_TUNNELED"] == before + 1


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_tc_tunnels_as_well(node: Node, f: Family) -> None:
    outcome = node.send(arriving(syn(f, REMOTE)), INGRESS)
    assert outcome.verdict == SEND
    assert outcome.frame[14:] == bytes(tunnel(f, f.node, f.remote, syn(f, REMOTE, 63)))


@pytest.mark.parametrize("hook", [XDP, INGRESS])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_its_endpoint_gets_it_and_answers_the_client(node: Node, f: Family, hook: str) -> None:
    outcome = node.send(arriving(tunnel(f, f.node1, f.local, syn(f, LOCAL))), hook)
    assert outcome.verdict == PASS
    wanted = f.tcp((f.client, IN_RANGE), (f.local, TARGET))
    assert outcome.frame == bytes(arriving(wanted))
    reply = f.tcp((f.local, TARGET), (f.client, IN_RANGE), "SA")
    back = node.send(leaving(reply), EGRESS)
    assert back.frame == bytes(leaving(f.tcp((f.node, LOCAL), (f.client, IN_RANGE), "SA")))


@pytest.mark.parametrize("hook", [XDP, INGRESS])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
@pytest.mark.parametrize("case", ["stranger", "no endpoint", "no Service", "not asked for"])
def test_other_tunnels_pass_untouched(node: Node, f: Family, hook: str, case: str) -> None:
    source = f.client if case == "stranger" else f.node1
    endpoint = f.router if case == "no endpoint" else f.local
    if case == "not asked for":
        node.lab.configure(dsr=0)
    inner = syn(f, 22 if case == "no Service" else LOCAL)
    frame = bytes(arriving(tunnel(f, source, endpoint, inner)))
    outcome = node.send(frame, hook)
    assert (outcome.verdict, outcome.frame) == (PASS, frame)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_the_tunnels_header_counts_for_the_mtu(node: Node, f: Family) -> None:
    more = {"flags": "DF"} if f is V4 else {}
    room = NARROW - len(f.udp((f.client, 1), (f.node, 1), b""))
    about = f.udp((f.client, IN_RANGE), (f.node, NARROW_PORT), bytes(room), **more)
    message = told(f, node.send(arriving(about)).frame, about)
    mtu = message.mtu if isinstance(message, ICMPv6PacketTooBig) else message.nexthopmtu
    assert mtu == max(NARROW - HEADER[repr(f)], 0 if f is V4 else 1280)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_connection_that_began_at_another_node_goes_on(node: Node, f: Family) -> None:
    """The tables of all nodes are equal, so it goes to the endpoint that it had."""
    node.send(arriving(syn(f, MANY)))
    first = [flow.becomes_to for flow in node.lab.flows()]
    node.lab.forget()
    node.lab.configure(dsr=1)
    outcome = node.send(arriving(f.tcp((f.client, IN_RANGE), (f.node, MANY), "A")))
    assert outcome.verdict == SEND
    assert [flow.becomes_to for flow in node.lab.flows()] == first


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_pieces_in_tunnels_come_in_any_order(node: Node, back: Back, f: Family) -> None:
    data = bytes(range(250)) * 10
    inner = pieces(f.udp((f.client, IN_RANGE), (f.node, LOCAL), data), f)
    given = [bytes(arriving(tunnel(f, f.node1, f.local, piece))) for piece in inner]
    for frame in reversed(given):
        outcome = node.send(frame, XDP)
        assert (outcome.verdict, outcome.frame) == (PASS, frame)
        assert node.send(frame, INGRESS).verdict == DROP
    wanted = pieces(f.udp((f.client, IN_RANGE), (f.local, TARGET), data), f)
    outcomes = back.through(3, XDP)
    assert {outcome.frame for outcome in outcomes} == {bytes(arriving(p)) for p in wanted}
