"""Pods and guests whose sockets no hook sees: their ClusterIPs, a packet at a time.

TC ingress of their device has what the pod sends, TC egress what it is sent. The source of what it
sends stays the same.
"""

from __future__ import annotations

import pytest
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from tests.kernel.packets.node import EGRESS, INGRESS, Node
from tests.kernel.packets.table import Build, Came, Case
from tests.kernel.packets.test_errors import cut, error, segment
from tests.kernel.packets.world import (
    EMPTY,
    FAMILIES,
    GUEST_MAC,
    LOCAL,
    POD_MAC,
    REMOTE,
    TARGET,
    V4,
    Family,
    leaving,
)
from tests.support.packets import PASS, SEND

SPORT = 40000


def out(packet: Packet) -> Packet:
    """As the pod sends it."""
    return Ether(src=GUEST_MAC, dst=POD_MAC) / packet


def into(packet: Packet) -> Packet:
    """As the pod is sent it."""
    return Ether(src=POD_MAC, dst=GUEST_MAC) / packet


def syn(f: Family, port: int = 80, to: str = "", **more: object) -> Packet:
    return f.tcp((f.guest, SPORT), (to or f.cluster_ip, port), **more)


def at_pod(
    name: str,
    packet: Build,
    verdict: str = PASS,
    becomes: Build | None = None,
    given: tuple[Came, ...] = (),
    hook: str = INGRESS,
) -> Case:
    return Case(name, packet, verdict, becomes, given, hook, "guest0")


def before(build: Build) -> Came:
    return Came(build, INGRESS, "guest0")


CASES = [
    at_pod("a ClusterIP with an endpoint elsewhere", lambda f: out(syn(f)), PASS,
           lambda f: out(f.tcp((f.guest, SPORT), (f.remote, TARGET)))),
    at_pod("a ClusterIP with an endpoint here", lambda f: out(syn(f, 82)), PASS,
           lambda f: out(f.tcp((f.guest, SPORT), (f.local, TARGET)))),
    at_pod("a datagram to a ClusterIP", lambda f: out(f.udp((f.guest, SPORT), (f.cluster_ip, 80))),
           PASS, lambda f: out(f.udp((f.guest, SPORT), (f.remote, TARGET)))),
    at_pod("a NodePort of this node", lambda f: out(syn(f, REMOTE, f.node)), PASS,
           lambda f: out(f.tcp((f.guest, SPORT), (f.remote, TARGET)))),
    at_pod("a load balancer's address", lambda f: out(syn(f, REMOTE - 30000, f.vip)), PASS,
           lambda f: out(f.tcp((f.guest, SPORT), (f.remote, TARGET)))),
    at_pod("TTL 1", lambda f: out(syn(f, ttl=1)), PASS,
           lambda f: out(f.tcp((f.guest, SPORT), (f.remote, TARGET), ttl=1))),
    at_pod("an endpoint directly", lambda f: out(syn(f, TARGET, f.remote))),
    at_pod("anything else", lambda f: out(syn(f, 443, f.unknown))),
    at_pod("the answer", lambda f: into(f.tcp((f.remote, TARGET), (f.guest, SPORT), "SA")), PASS,
           lambda f: into(f.tcp((f.cluster_ip, 80), (f.guest, SPORT), "SA")),
           (before(lambda f: out(syn(f))),), EGRESS),
    at_pod("the answer to a datagram",
           lambda f: into(f.udp((f.remote, TARGET), (f.guest, SPORT))), PASS,
           lambda f: into(f.udp((f.cluster_ip, 80), (f.guest, SPORT))),
           (before(lambda f: out(f.udp((f.guest, SPORT), (f.cluster_ip, 80)))),), EGRESS),
    at_pod("what somebody else sends it",
           lambda f: into(f.tcp((f.client, 5), (f.guest, 22))), hook=EGRESS),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "f"),
    [pytest.param(case, f, id=f"{case.name}, {f}") for case in CASES for f in case.families],
)
def test_a_pod(node: Node, case: Case, f: Family) -> None:
    case.run(node, f)


@pytest.mark.parametrize("port", [99, EMPTY])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_what_nobody_serves_the_stack_refuses(node: Node, f: Family, port: int) -> None:
    """An undefined port of a ClusterIP, a NodePort without endpoints: as at the node's device."""
    about = syn(f, port, f.cluster_ip if port == 99 else f.node)
    vip = f.cluster_ip if port == 99 else f.node
    outcome = node.send(out(about), INGRESS, "guest0")
    assert outcome.verdict == PASS
    assert outcome.frame == bytes(out(f.tcp((f.guest, SPORT), (f.node, 0))))
    reset = into(f.tcp((f.node, 0), (f.guest, SPORT), "RA"))
    answer = node.send(reset, EGRESS, "guest0")
    assert answer.frame == bytes(into(f.tcp((vip, port), (f.guest, SPORT), "RA")))


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_pod_reaches_itself(node: Node, f: Family) -> None:
    """It would not take a packet from its own address: it sees another one's, and what it answers
    to that comes back as from the Service."""
    outcome = node.send(out(syn(f, 81)), INGRESS, "guest0")
    assert outcome.verdict in (PASS, SEND)
    frame = Ether(outcome.frame)
    ip = frame.payload
    assert (ip.dst, ip.payload.dport) == (f.guest, TARGET)
    assert ip.src != f.guest
    left = ip.ttl if f is V4 else ip.hlim
    wanted = f.tcp((ip.src, ip.payload.sport), (f.guest, TARGET), ttl=left)
    assert outcome.frame[14:] == bytes(wanted)
    back = f.tcp((f.guest, TARGET), (ip.src, ip.payload.sport), "SA")
    outcome = node.send(out(back), INGRESS, "guest0")
    ip = Ether(outcome.frame).payload
    assert (ip.src, ip.payload.sport) == (f.cluster_ip, 81)
    assert (ip.dst, ip.payload.dport) == (f.guest, SPORT)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_source_ranges_and_traffic_policies_are_for_outside(node: Node, f: Family) -> None:
    """A pod is inside: it gets what a pod with hooks would get."""
    for port, to in ((443, f.vip), (30087, f.node)):
        outcome = node.send(out(syn(f, port, to)), INGRESS, "guest0")
        wanted = out(f.tcp((f.guest, SPORT), (f.remote, TARGET)))
        assert (outcome.verdict, outcome.frame) == (PASS, bytes(wanted))
        node.lab.forget()


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_pod_with_an_endpoint_of_its_own_serves_clients_outside(node: Node, f: Family) -> None:
    """Its answers come in at its device, and are translated on their way out of the node."""
    node.send(leaving(f.tcp((f.client, SPORT), (f.node, LOCAL))))
    answer = f.tcp((f.local, TARGET), (f.client, SPORT), "SA")
    frame = bytes(out(answer))
    there = node.send(frame, INGRESS, "guest0")
    assert there.verdict == PASS
    outcome = node.send(leaving(Ether(there.frame).payload), EGRESS)
    wanted = f.tcp((f.node, LOCAL), (f.client, SPORT), "SA")
    assert outcome.frame[14:] == bytes(wanted)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_an_error_about_a_pods_packet_reaches_it(node: Node, f: Family) -> None:
    node.send(out(f.tcp((f.guest, SPORT), (f.cluster_ip, 80))), INGRESS, "guest0")
    there = segment(f, (f.guest, SPORT), (f.remote, TARGET))
    given = error(f, "too big", f.router, f.guest, cut(f, there, 8), 60)
    outcome = node.send(into(given), EGRESS, "guest0")
    quoted = cut(f, segment(f, (f.guest, SPORT), (f.cluster_ip, 80)), 8)
    assert outcome.verdict == PASS
    source = Ether(outcome.frame).payload.src
    assert source in (f.router, f.cluster_ip)
    wanted = into(error(f, "too big", source, f.guest, quoted, 60))
    assert outcome.frame.hex() == bytes(wanted).hex()
