"""To endpoints on this node: only the destination changes, the stack does the rest; and back."""

from __future__ import annotations

import pytest
from scapy.layers.inet import UDP
from scapy.packet import Packet

from tests.kernel.packets.node import EGRESS, INGRESS, XDP, Node
from tests.kernel.packets.table import Came, Case
from tests.kernel.packets.world import (
    EMPTY,
    FAMILIES,
    IN_RANGE,
    LOCAL,
    NONE_LOCAL,
    ONLY_LOCAL,
    OUT_OF_RANGE,
    RANGED,
    REMOTE,
    TARGET,
    V4,
    VLAN,
    Family,
    arriving,
    leaving,
    tagged,
)
from tests.support.packets import DROP, PASS, SEND


def syn(f: Family, port: int = LOCAL, to: str = "", sport: int = OUT_OF_RANGE,
        **more: object) -> Packet:  # fmt: skip
    return f.tcp((f.client, sport), (to or f.node, port), **more)


def here(f: Family, sport: int = OUT_OF_RANGE, **more: object) -> Packet:
    """The same packet as the endpoint gets it: the client's address is kept."""
    return f.tcp((f.client, sport), (f.local, TARGET), **more)


def answer(f: Family, sport: int = OUT_OF_RANGE, **more: object) -> Packet:
    return f.tcp((f.local, TARGET), (f.client, sport), **{"flags": "SA", "ttl": 63, **more})


def answered(f: Family, port: int = LOCAL, to: str = "", sport: int = OUT_OF_RANGE,
             **more: object) -> Packet:  # fmt: skip
    return f.tcp((to or f.node, port), (f.client, sport), **{"flags": "SA", "ttl": 63, **more})


def bare(packet: Packet) -> Packet:
    packet[UDP].chksum = 0
    return packet


_SYN = Came(lambda f: arriving(syn(f)))
_VIP_SYN = Came(lambda f: arriving(syn(f, LOCAL - 30000, f.vip)))
_QUERY = Came(lambda f: arriving(f.udp((f.client, OUT_OF_RANGE), (f.node, LOCAL))))

CASES = [
    Case("SYN to a NodePort", lambda f: arriving(syn(f)), PASS, lambda f: arriving(here(f)),
         counts={"PACKET_HERE": 1, "FLOW_BEGUN": 1}),
    Case("SYN to a load balancer's address", lambda f: arriving(syn(f, LOCAL - 30000, f.vip)), PASS,
         lambda f: arriving(here(f))),
    Case("a datagram", lambda f: arriving(f.udp((f.client, OUT_OF_RANGE), (f.node, LOCAL), b"odd")),
         PASS, lambda f: arriving(f.udp((f.client, OUT_OF_RANGE), (f.local, TARGET), b"odd"))),
    Case("a datagram without checksum",
         lambda f: arriving(bare(f.udp((f.client, OUT_OF_RANGE), (f.node, LOCAL)))), PASS,
         lambda f: arriving(bare(f.udp((f.client, OUT_OF_RANGE), (f.local, TARGET)))),
         families=(V4,)),
    Case("TTL 1 is the stack's to judge", lambda f: arriving(syn(f, ttl=1)), PASS,
         lambda f: arriving(here(f, ttl=1))),
    Case("traffic policy Local", lambda f: arriving(syn(f, ONLY_LOCAL)), PASS,
         lambda f: arriving(here(f))),
    Case("traffic policy Local, no endpoint on this node", lambda f: arriving(syn(f, NONE_LOCAL)),
         DROP, counts={"DROP_NO_LOCAL_ENDPOINT": 1, "FLOW_BEGUN": 0}),
    Case("a client that no source range has",
         lambda f: arriving(f.tcp((f.stranger, IN_RANGE), (f.vip, RANGED))), DROP,
         counts={"DROP_SOURCE_RANGE": 1, "FLOW_BEGUN": 0}),
    Case("a client of a source range",
         lambda f: arriving(f.tcp((f.client, IN_RANGE), (f.vip, RANGED))), SEND,
         lambda f: leaving(f.tcp((f.node, IN_RANGE), (f.remote, TARGET), ttl=63)),
         counts={"DROP_SOURCE_RANGE": 0}),
    Case("the next packet of the flow", lambda f: arriving(syn(f, flags="PA", data=b"GET /")), PASS,
         lambda f: arriving(here(f, flags="PA", data=b"GET /")), (_SYN,), counts={"FLOW_BEGUN": 0}),
    Case("the answer leaves as the NodePort", lambda f: leaving(answer(f)), PASS,
         lambda f: leaving(answered(f)), (_SYN,), EGRESS, counts={"PACKET_REPLIED": 1}),
    Case("the answer leaves as the load balancer's address", lambda f: leaving(answer(f)), PASS,
         lambda f: leaving(answered(f, LOCAL - 30000, f.vip)), (_VIP_SYN,), EGRESS),
    Case("the answer leaves by another device", lambda f: leaving(answer(f)), PASS,
         lambda f: leaving(answered(f)), (_SYN,), EGRESS, "eth1"),
    Case("the answer to a datagram",
         lambda f: leaving(f.udp((f.local, TARGET), (f.client, OUT_OF_RANGE), b"odd", 63)), PASS,
         lambda f: leaving(f.udp((f.node, LOCAL), (f.client, OUT_OF_RANGE), b"odd", 63)), (_QUERY,),
         EGRESS),
    Case("an answer without checksum",
         lambda f: leaving(bare(f.udp((f.local, TARGET), (f.client, OUT_OF_RANGE)))), PASS,
         lambda f: leaving(bare(f.udp((f.node, LOCAL), (f.client, OUT_OF_RANGE)))), (_QUERY,),
         EGRESS, families=(V4,)),
    Case("what the endpoint says to another port of the client",
         lambda f: leaving(answer(f, OUT_OF_RANGE + 1)), PASS, None, (_SYN,), EGRESS),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "f"),
    [pytest.param(case, f, id=f"{case.name}, {f}") for case in CASES for f in case.families],
)
def test_xdp_and_egress(node: Node, case: Case, f: Family) -> None:
    case.run(node, f)


@pytest.mark.parametrize(
    ("case", "f"),
    [pytest.param(case, f, id=f"{case.name}, {f}") for case in CASES for f in case.families],
)
def test_tc_alone(node: Node, case: Case, f: Family) -> None:
    """Where a device has no XDP."""
    given = tuple(Came(came.build, INGRESS, came.device) for came in case.given)
    hook = INGRESS if case.hook == XDP else case.hook
    Case(case.name, case.packet, case.verdict, case.becomes, given, hook, case.device,
         case.counts).run(node, f)  # fmt: skip


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_tc_leaves_alone_what_xdp_translated(node: Node, f: Family) -> None:
    frame = node.send(arriving(syn(f))).frame
    outcome = node.send(frame, INGRESS)
    assert (outcome.verdict, outcome.frame) == (PASS, frame)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_one_client_port_at_two_addresses_is_two_flows(node: Node, f: Family) -> None:
    """Both lead to the same endpoint, which must tell them apart: the second gets another port."""
    first = node.send(arriving(syn(f, LOCAL - 30000, f.vip)))
    second = node.send(arriving(syn(f, LOCAL - 30000, f.vip2)))
    assert first.frame == bytes(arriving(here(f)))
    begun = {flow.destination: flow for flow in node.lab.flows() if flow.source[0] == f.client}
    port = begun[f.vip2, LOCAL - 30000].becomes_from[1]
    assert port != OUT_OF_RANGE
    assert second.frame == bytes(arriving(here(f, port)))
    for sport, vip in ((OUT_OF_RANGE, f.vip), (port, f.vip2)):
        back = node.send(leaving(answer(f, sport)), EGRESS)
        assert back.frame == bytes(leaving(answered(f, LOCAL - 30000, vip)))


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_the_policy_counts_for_new_flows_only(node: Node, f: Family) -> None:
    """A client whose ranges, or whose endpoint's node, changed meanwhile keeps its connection."""
    node.send(arriving(syn(f, ONLY_LOCAL)))
    node.send(leaving(answer(f)), EGRESS)
    node.serve(f, ONLY_LOCAL, flags=0b11, empty=1, all=((f.local, 1), (f.remote, 2)))
    frame = node.send(arriving(syn(f, ONLY_LOCAL, flags="A"))).frame
    assert frame == bytes(arriving(here(f, flags="A")))
    late = node.send(arriving(syn(f, ONLY_LOCAL, sport=OUT_OF_RANGE + 1)))
    assert late.verdict == DROP


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_tag_stays_where_the_stack_goes_on(node: Node, f: Family) -> None:
    """XDP leaves the tag to the kernel, which gives the frame to its VLAN device."""
    packet = f.tcp((f.neighbour, OUT_OF_RANGE), (f.node5, LOCAL))
    outcome = node.send(tagged(arriving(packet), VLAN))
    wanted = f.tcp((f.neighbour, OUT_OF_RANGE), (f.local, TARGET))
    assert outcome.verdict == PASS
    assert outcome.frame == bytes(tagged(arriving(wanted), VLAN))


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_an_empty_service_keeps_no_flow(node: Node, f: Family) -> None:
    node.send(arriving(syn(f, EMPTY)))
    node.send(arriving(syn(f, NONE_LOCAL)))
    assert not node.lab.flows()


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_an_endpoint_whose_place_is_not_known_is_found_by_the_route(node: Node, f: Family) -> None:
    """An EndpointSlice made by hand need not name nodes. What is on another node is forwarded."""
    node.serve(f, REMOTE, (f.remote, 0))
    outcome = node.send(arriving(f.tcp((f.client, IN_RANGE), (f.node, REMOTE))))
    assert outcome.verdict == SEND
    sent = f.tcp((f.node, IN_RANGE), (f.remote, TARGET), ttl=63)
    assert outcome.frame == bytes(leaving(sent))
