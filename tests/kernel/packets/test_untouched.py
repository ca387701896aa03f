"""What is not ours, or not understood, passes byte for byte, and leaves no flow behind."""

from __future__ import annotations

import pytest
from scapy.layers.inet import GRE, ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Packet, Raw

from tests.kernel.packets.node import (
    EGRESS,
    ELSEWHERE,
    INGRESS,
    VLAN_DEVICE,
    XDP,
    Choice,
    Node,
    entries,
    serve_devices,
)
from tests.kernel.packets.table import Case
from tests.kernel.packets.world import (
    FAMILIES,
    GATEWAY_MAC,
    IN_RANGE,
    LOCAL,
    NODE_MAC,
    OTHER_MAC,
    POD_MAC,
    RANGED,
    REMOTE,
    V4,
    V6,
    VLAN,
    Family,
    arriving,
    tagged,
)
from tests.support.packets import PASS, SEND


def _udp(f: Family, port: int = REMOTE, to: str = "", **more: object) -> Packet:
    return f.udp((f.client, IN_RANGE), (to or f.node, port), **more)


def _syn(f: Family, port: int = REMOTE, to: str = "", **more: object) -> Packet:
    return f.tcp((f.client, IN_RANGE), (to or f.node, port), **more)


def _echo(f: Family, to: str) -> Packet:
    message = ICMP(type=8) if f is V4 else ICMPv6EchoRequest()
    return f.ip(f.client, to) / message / Raw(b"ping")


def _with(packet: Packet, layer: type[Packet], **fields: object) -> Packet:
    """The same packet with these fields wrong, its checksums as they were."""
    built = packet.__class__(bytes(packet))
    for name, value in fields.items():
        setattr(built[layer], name, value)
    return built


def _options(f: Family, number: int) -> Packet:
    """That many destination options before the payload."""
    packet = f.ip(f.client, f.node)
    for _ in range(number):
        packet = packet / IPv6ExtHdrDestOpt()
    return packet / UDP(sport=IN_RANGE, dport=REMOTE) / Raw(b"datagram")


_V4, _V6 = (V4,), (V6,)
CASES = [
    Case("ARP", lambda f: Ether(src=GATEWAY_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(pdst=f.node,
         psrc=f.gateway, hwsrc=GATEWAY_MAC), families=_V4),
    Case("neighbour solicitation", lambda f: arriving(
        f.ip(f.gateway, f.node, 255) / ICMPv6ND_NS(tgt=f.node)), families=_V6),
    Case("an ethertype that nobody knows", lambda f: Ether(
        src=GATEWAY_MAC, dst=NODE_MAC, type=0x88B5) / Raw(bytes(60)), families=_V4),
    Case("a length instead of an ethertype", lambda f: Ether(
        src=GATEWAY_MAC, dst=NODE_MAC, type=60) / Raw(bytes(60)), families=_V4),
    Case("a port of the node that is no NodePort", lambda f: arriving(_syn(f, 22))),
    Case("a NodePort at an address that is nobody's", lambda f: arriving(_syn(f, to=f.unknown))),
    Case("a NodePort at a load balancer's address", lambda f: arriving(_syn(f, to=f.vip))),
    Case("a port of a load balancer at the node", lambda f: arriving(_syn(f, REMOTE - 30000))),
    Case("a port that a load balancer does not have", lambda f: arriving(_syn(f, 7, f.vip))),
    Case("a datagram to a port that a load balancer does not have",
         lambda f: arriving(_udp(f, 7, f.vip))),
    Case("a port of a load balancer at another one's", lambda f: arriving(_syn(f, RANGED, f.vip2))),
    Case("a ClusterIP from outside", lambda f: arriving(_syn(f, 80, f.cluster_ip))),
    Case("an undefined port of a ClusterIP from outside",
         lambda f: arriving(_syn(f, 83, f.cluster_ip))),
    Case("an endpoint that is spoken to directly", lambda f: arriving(_syn(f, 8080, f.local))),
    Case("an unknown port of the range for connections of our own, UDP",
         lambda f: arriving(f.udp((f.remote, 8080), (f.node, 61500)))),
    Case("a reply to a connection of the node itself", lambda f: arriving(
        f.tcp((f.remote, 8080), (f.node, 45000), "SA"))),
    Case("0.0.0.0 or :: as an address", lambda f: arriving(_syn(f, to=f.any))),
    Case("GRE", lambda f: arriving(f.ip(f.client, f.node) / GRE(proto=0x800) / Raw(bytes(40)))),
    Case("an authentication header, which signs the addresses", lambda f: arriving(
        f.ip(f.client, f.node) / AH(nh=17, payloadlen=4, spi=7, seq=1, icv=bytes(12))
        / UDP(sport=IN_RANGE, dport=REMOTE, chksum=0x1234) / Raw(bytes(40)))),
    Case("SCTP", lambda f: arriving(
        f.ip(f.client, f.node) / SCTP(sport=IN_RANGE, dport=REMOTE) / SCTPChunkInit())),
    Case("a protocol that nobody knows", lambda f: arriving(
        f.ip(f.client, f.node, **({"proto": 253} if f is V4 else {"nh": 253})) / Raw(bytes(40)))),
    Case("an echo request to the node", lambda f: arriving(_echo(f, f.node))),
    Case("an IPv4 header that says 16 bytes", lambda f: arriving(_with(_udp(f), IP, ihl=4)),
         families=_V4),
    Case("an IPv4 header longer than its packet",
         lambda f: arriving(_with(_udp(f, data=b""), IP, ihl=15)), families=_V4),
    Case("an IPv4 packet longer than its frame", lambda f: arriving(_with(_udp(f), IP, len=200)),
         families=_V4),
    Case("an IPv4 packet that ends in its header", lambda f: arriving(_with(_udp(f), IP, len=19)),
         families=_V4),
    Case("an IPv4 packet that ends in its UDP header",
         lambda f: arriving(_with(_udp(f), IP, len=26)), families=_V4),
    Case("IP version 5", lambda f: arriving(_with(_udp(f), IP, version=5)), families=_V4),
    Case("IPv4 under the ethertype of IPv6", lambda f: Ether(
        src=GATEWAY_MAC, dst=NODE_MAC, type=0x86DD) / Raw(bytes(_udp(f, data=bytes(64)))),
        families=_V4),
    Case("IPv6 under the ethertype of IPv4", lambda f: Ether(
        src=GATEWAY_MAC, dst=NODE_MAC, type=0x0800) / Raw(bytes(_udp(f))), families=_V6),
    Case("an IPv6 packet longer than its frame",
         lambda f: arriving(_with(_udp(f), IPv6, plen=200)), families=_V6),
    Case("a TCP header of 16 bytes", lambda f: arriving(_with(_syn(f), TCP, dataofs=4))),
    Case("more extension headers than we look at", lambda f: arriving(_options(f, 12)),
         families=_V6),
    Case("a source route that goes on elsewhere", lambda f: arriving(
        f.ip(f.client, f.node) / IPv6ExtHdrRouting(segleft=1, addresses=[f.unknown])
        / UDP(sport=IN_RANGE, dport=REMOTE)), families=_V6),
    Case("an extension header longer than its packet", lambda f: arriving(
        f.ip(f.client, f.node, nh=60) / Raw(bytes([17, 200]) + bytes(14))), families=_V6),
    Case("hop-by-hop with nothing behind it", lambda f: arriving(
        f.ip(f.client, f.node) / IPv6ExtHdrHopByHop(nh=59)), families=_V6),
    Case("a VLAN that is not ours", lambda f: tagged(arriving(_syn(f)), 77)),
    Case("two tags", lambda f: Ether(src=GATEWAY_MAC, dst=NODE_MAC) / Dot1Q(vlan=5) / Dot1Q(vlan=5)
         / _syn(f)),
    Case("a provider's tag before ours", lambda f: Ether(src=GATEWAY_MAC, dst=NODE_MAC)
         / Dot1AD(vlan=5) / Dot1Q(vlan=5) / _syn(f)),
    Case("a tag with nothing behind it", lambda f: Ether(src=GATEWAY_MAC, dst=NODE_MAC, type=0x8100)
         / Raw(b"\0")),
    Case("TTL 1 to an endpoint elsewhere", lambda f: arriving(_syn(f, ttl=1))),
    Case("TTL 0 to an endpoint elsewhere", lambda f: arriving(_syn(f, ttl=0))),
    Case("a packet of ours on its way out", lambda f: arriving(_syn(f)), hook=EGRESS),
    Case("a reply that belongs to no flow, on its way out", lambda f: arriving(
        f.tcp((f.local, 8080), (f.client, IN_RANGE), "SA")), hook=EGRESS),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "f", "hook"),
    [
        pytest.param(case, f, hook, id=f"{case.name}, {f}, {hook}")
        for case in CASES
        for f in case.families
        for hook in ((XDP, INGRESS) if case.hook == XDP else (case.hook,))
    ],
)
def test_it_passes_untouched(node: Node, case: Case, f: Family, hook: str) -> None:
    frame = bytes(case.packet(f))
    outcome = node.lab.run(frame, hook)
    assert (outcome.verdict, outcome.frame.hex()) == (PASS, frame.hex())
    # A flow that can't go on yet is no harm; everything else is none of ours.
    assert "TTL" in case.name or not node.lab.flows()


def _whole(f: Family) -> list[Packet]:
    return [
        arriving(_syn(f)),
        arriving(_syn(f, LOCAL)),
        arriving(_udp(f)),
        tagged(arriving(_udp(f))),
        arriving(f.ip(f.client, f.node) / ICMP(type=3, code=1) / Raw(bytes(_udp(V4))))
        if f is V4
        else arriving(_options(f, 2)),
    ]


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
@pytest.mark.parametrize("hook", [XDP, INGRESS])
def test_a_frame_cut_anywhere_before_its_payload_passes_untouched(
    node: Node, f: Family, hook: str
) -> None:
    for packet in _whole(f):
        frame = bytes(packet)
        headers = len(frame) - len(b"datagram") if UDP in packet else len(frame)
        for length in range(14, headers):
            outcome = node.offer(frame[:length], hook)
            if outcome is None:
                continue
            assert (outcome.verdict, outcome.frame.hex()) == (PASS, frame[:length].hex()), length
    assert not node.lab.flows()


@pytest.mark.parametrize("hook", [XDP, INGRESS])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_an_external_ip_that_is_the_nodes_leaves_it_its_other_ports(
    node: Node, f: Family, hook: str
) -> None:
    node.set("web", *entries(f, "web", 8443, Choice(((f.remote, ELSEWHERE),)), f.node))
    try:
        assert node.send(arriving(_syn(f, 8443)), hook).verdict == SEND
        frame = bytes(arriving(_syn(f, 22)))
        outcome = node.send(frame, hook)
        assert (outcome.verdict, outcome.frame) == (PASS, frame)
    finally:
        node.set("web")


@pytest.mark.parametrize("device", ["pod0", "lo"])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_device_that_is_not_served_passes_all(node: Node, f: Family, device: str) -> None:
    for hook in (INGRESS, EGRESS):
        frame = bytes(arriving(_syn(f)))
        outcome = node.send(frame, hook, device)
        assert (outcome.verdict, outcome.frame) == (PASS, frame)


def test_padding_of_short_frames_stays(node: Node) -> None:
    """A frame has 60 bytes at least: what is behind the packet is no part of it."""
    packet = bytes(arriving(V4.udp((V4.client, IN_RANGE), (V4.node, 22), b"")))
    frame = packet + b"\xa5" * (60 - len(packet))
    assert node.send(frame).frame == frame


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_xdp_takes_what_is_sent_to_the_device_itself(node: Node, f: Family) -> None:
    """A device that is bridged, or watched, hands over what is for others, too."""
    out, addresses = ("DEVICE_NODE", "DEVICE_XDP"), (V4.node, V6.node)
    below = node.lab.index("eth0")
    node.lab.serve_device("eth0", out, addresses, NODE_MAC)
    node.lab.serve_device(VLAN_DEVICE, out, addresses, POD_MAC, lower=below, vlan=VLAN)
    try:
        for frame in (
            arriving(_syn(f), to=OTHER_MAC),
            arriving(_syn(f), to=NODE_MAC[:-1] + "f"),
            arriving(_syn(f), to="06" + NODE_MAC[2:]),
            tagged(arriving(_syn(f), to=NODE_MAC)),  # the VLAN's device has another
        ):
            outcome = node.send(frame)
            assert (outcome.verdict, outcome.frame) == (PASS, bytes(frame))
        assert not node.lab.flows()
        assert node.send(arriving(_syn(f), to=NODE_MAC)).verdict == SEND
        node.lab.forget()
        node.send(tagged(arriving(_syn(f), to=POD_MAC)))
        assert node.lab.flows()
    finally:
        serve_devices(node.lab)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_frame_whose_tag_was_taken_off_is_left_to_the_vlan_s_device(
    node: Node, f: Family
) -> None:
    """As network cards do before XDP: on a device that only carries VLANs it is nobody's, and TC
    has it at the VLAN's own device, without a tag."""
    node.lab.serve_device("eth0", (), ())
    try:
        frame = arriving(_syn(f, to=f.node5))
        outcome = node.send(frame)
        assert (outcome.verdict, outcome.frame) == (PASS, bytes(frame))
        assert not node.lab.flows()
        node.send(frame, INGRESS, VLAN_DEVICE)
        assert node.lab.flows()
    finally:
        serve_devices(node.lab)
