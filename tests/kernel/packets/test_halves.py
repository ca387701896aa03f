"""A flow is two entries, and the map of new ones may drive out either. What is left of a flow must
neither get another's packets nor end another's flow."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.packet import Packet, Raw

from pointsman.values import TCP, UDP
from tests.kernel.packets.node import EGRESS, Node
from tests.kernel.packets.world import (
    FAMILIES,
    GATEWAY_MAC,
    IN_RANGE,
    NARROW_PORT,
    OUT_OF_RANGE,
    REMOTE,
    TARGET,
    V4,
    Family,
    arriving,
    leaving,
)
from tests.support.packetlab import Flow, tuple_key
from tests.support.packets import DROP, PASS, SEND

NEIGHBOUR = {4: "198.51.100.8", 6: "2001:db8:100::8"}


def drive_out(node: Node, source: tuple[str, int], target: tuple[str, int], proto: int) -> None:
    node.lab.map("flows_new").delete(tuple_key(source, target, proto))


def replies(node: Node) -> list[Flow]:
    return [flow for flow in node.lab.flows() if "FLOW_REPLY" in flow.flags]


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_datagrams_whose_way_back_is_gone_begin_anew(node: Node, f: Family) -> None:
    """Else another client could get the same port, and one of them the other's answers."""
    client, other = (f.client, IN_RANGE), (NEIGHBOUR[f.version], IN_RANGE)

    def asks(who: tuple[str, int]) -> int:
        outcome = node.send(arriving(f.udp(who, (f.node, REMOTE))))
        assert outcome.verdict == SEND
        at = 34 if f is V4 else 54
        return int.from_bytes(outcome.frame[at : at + 2], "big")

    asks(client)
    drive_out(node, (f.remote, TARGET), (f.node, IN_RANGE), UDP)
    for times in range(3):
        node.lab.age(2)
        before = node.lab.counts()["FLOW_MOVED"]
        asks(client)
        assert node.lab.counts()["FLOW_MOVED"] - before == (not times)
    ports = {asks(client), asks(other)}
    assert len(ports) == 2, "one port for two clients"
    for who in (client, other):
        answer = arriving(f.udp((f.remote, TARGET), (f.node, asks(who))))
        outcome = node.send(answer)
        assert outcome.verdict == SEND
        wanted = leaving(f.udp((f.node, REMOTE), who, ttl=63), GATEWAY_MAC)
        assert outcome.frame == bytes(wanted)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_who_takes_the_port_of_what_is_left_is_not_mistaken_for_its_client(
    node: Node, f: Family
) -> None:
    """XDP remembers what it did with that client's datagrams a moment ago."""
    at = 34 if f is V4 else 54
    ports: dict[str, bytes] = {}

    def asks(address: str) -> None:
        outcome = node.send(arriving(f.udp((address, IN_RANGE), (f.node, REMOTE))))
        assert outcome.verdict == SEND
        ports[address] = outcome.frame[at : at + 2]

    for _ in range(4):
        asks(f.client)
    node.lab.age(6)
    drive_out(node, (f.client, IN_RANGE), (f.node, REMOTE), UDP)
    before = ports[f.client]
    asks(NEIGHBOUR[f.version])
    assert ports[NEIGHBOUR[f.version]] == before
    asks(f.client)
    assert ports[f.client] != before


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_who_takes_the_port_of_what_is_left_ends_no_other_flow(node: Node, f: Family) -> None:
    client = f.client, OUT_OF_RANGE

    def says(flags: str) -> Packet:
        return arriving(f.tcp(client, (f.node, REMOTE), flags))

    node.send(says("S"))
    (left,) = replies(node)
    drive_out(node, client, (f.node, REMOTE), TCP)
    node.lab.age(6)
    node.send(says("S"))
    (mine,) = [flow for flow in replies(node) if flow.destination != left.destination]
    node.send(arriving(f.tcp((f.remote, TARGET), mine.destination, "SA")))
    node.send(says("A"))
    other = NEIGHBOUR[f.version], left.destination[1]
    assert node.send(arriving(f.tcp(other, (f.node, REMOTE)))).verdict == SEND
    assert node.send(says("PA")).verdict == SEND
    assert node.send(arriving(f.tcp((f.remote, TARGET), mine.destination, "PA"))).verdict == SEND


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_tunnels_end_with_dsr(node: Node, f: Family) -> None:
    """An agent that was started again without it: other nodes look into no tunnel any more."""
    asks = arriving(f.udp((f.client, IN_RANGE), (f.node, REMOTE)))
    node.lab.configure(dsr=1)
    assert len(node.send(asks).frame) > len(bytes(asks))
    node.lab.configure(dsr=0)
    wanted = f.udp((f.node, IN_RANGE), (f.remote, TARGET), ttl=63)
    assert node.send(asks).frame == bytes(leaving(wanted))


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_an_answer_that_dsr_sends_by_this_node_is_not_tunneled(node: Node, f: Family) -> None:
    node.lab.configure(dsr=1)
    node.send(arriving(f.udp((f.client, IN_RANGE), (f.node, REMOTE))))
    answer = bytes(leaving(f.udp((f.remote, TARGET), (f.client, IN_RANGE))))
    outcome = node.send(answer, EGRESS)
    assert (outcome.verdict, outcome.frame) == (PASS, answer)


def test_nobody_is_told_of_an_error_about_an_error(node: Node) -> None:
    client = V4.client, IN_RANGE
    node.send(arriving(V4.udp(client, (V4.node, NARROW_PORT))))
    quoted = bytes(V4.udp((V4.node, NARROW_PORT), client, bytes(1400)))[:1440]
    error = IP(src=V4.client, dst=V4.node) / ICMP(type=3, code=3) / Raw(quoted)
    assert node.send(arriving(error)).verdict == DROP
