"""ICMP errors about translated packets: whoever gets one must know the packet that it quotes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from scapy.layers.inet import ICMP, UDP, IPOption
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
)
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from tests.kernel.packets.node import EGRESS, INGRESS, XDP, Node
from tests.kernel.packets.world import (
    FAMILIES,
    GATEWAY_MAC,
    IN_RANGE,
    LOCAL,
    OTHER_MAC,
    OUT_OF_RANGE,
    REMOTE,
    TARGET,
    V4,
    Family,
    arriving,
    leaving,
)
from tests.support.packets import PASS, SEND

Quote = Callable[[Family, tuple[str, int], tuple[str, int]], Packet]


def message(f: Family, kind: str) -> Packet:
    """The header of an error of that kind."""
    if f is V4:
        kinds = {
            "unreachable": ICMP(type=3, code=1),
            "port unreachable": ICMP(type=3, code=3),
            "too big": ICMP(type=3, code=4, nexthopmtu=1300),
            "time exceeded": ICMP(type=11, code=0),
            "parameter problem": ICMP(type=12, code=0),
        }
        return kinds[kind]
    kinds6 = {
        "unreachable": ICMPv6DestUnreach(code=3),
        "port unreachable": ICMPv6DestUnreach(code=4),
        "too big": ICMPv6PacketTooBig(mtu=1300),
        "time exceeded": ICMPv6TimeExceeded(code=0),
        "parameter problem": ICMPv6ParamProblem(code=0),
    }
    return kinds6[kind]


def error(f: Family, kind: str, source: str, destination: str, quoted: bytes, ttl: int) -> Packet:
    return f.ip(source, destination, ttl) / message(f, kind) / Raw(quoted)


def segment(f: Family, source: tuple[str, int], destination: tuple[str, int]) -> Packet:
    return f.tcp(source, destination, "PA", bytes(range(100)))


def datagram(f: Family, source: tuple[str, int], destination: tuple[str, int]) -> Packet:
    return f.udp(source, destination, b"odd")


def plain(f: Family, source: tuple[str, int], destination: tuple[str, int]) -> Packet:
    packet = datagram(f, source, destination)
    packet[UDP].chksum = 0
    return packet


WHOLE = 10_000
KINDS = ["unreachable", "port unreachable", "too big", "time exceeded", "parameter problem"]
QUOTES = [
    pytest.param(segment, WHOLE, id="segment"),
    pytest.param(segment, 8, id="8 bytes of a segment"),
    pytest.param(segment, 17, id="17 bytes of a segment"),
    pytest.param(segment, 18, id="18 bytes of a segment"),
    pytest.param(datagram, WHOLE, id="datagram"),
    pytest.param(datagram, 8, id="8 bytes of a datagram"),
]


def same_error(
    f: Family, frame: bytes, wanted: Callable[[str], Packet], sources: tuple[str, ...]
) -> None:
    """The frame is that error, from one of these addresses."""
    source = Ether(frame).payload.src
    assert source in sources
    assert frame[14:].hex() == bytes(wanted(source)).hex()


def begin(node: Node, f: Family, quote: Quote, port: int, hook: str = XDP) -> int:
    """A flow like the quoted one, answered; the client's port."""
    sport = IN_RANGE if port == REMOTE else OUT_OF_RANGE
    if quote is segment:
        node.send(arriving(f.tcp((f.client, sport), (f.node, port))), hook)
    node.send(arriving(quote(f, (f.client, sport), (f.node, port))), hook)
    return sport


def cut(f: Family, packet: Packet, size: int) -> bytes:
    return bytes(packet)[: (20 if f is V4 else 40) + size]


def cut_like(f: Family, packet: Packet, size: int, given: bytes) -> bytes:
    """The translation of `given`, a packet cut to that size. Half a checksum can't be amended."""
    quoted = cut(f, packet, size)
    return quoted[:-1] + given[-1:] if size == 17 else quoted


@pytest.mark.parametrize("hook", [XDP, INGRESS])
@pytest.mark.parametrize(("quote", "size"), QUOTES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_from_beyond_the_node_to_the_client(
    node: Node, f: Family, kind: str, quote: Quote, size: int, hook: str
) -> None:
    """A router, or the endpoint's node, about what this node forwarded. Source: who says it, or the
    VIP as for all that comes back to the client."""
    sport = begin(node, f, quote, REMOTE, hook)
    there = quote(f, (f.node, sport), (f.remote, TARGET))
    given = error(f, kind, f.router, f.node, cut(f, there, size), 60)
    before = node.lab.counts()["PACKET_ERROR"]
    outcome = node.send(arriving(given, source=OTHER_MAC), hook)
    assert outcome.verdict == SEND
    quoted = cut_like(f, quote(f, (f.client, sport), (f.node, REMOTE)), size, cut(f, there, size))
    same_error(
        f,
        outcome.frame,
        lambda source: error(f, kind, source, f.client, quoted, 59),
        (f.router, f.node),
    )
    if hook == XDP:
        assert outcome.frame[:12] == bytes(leaving(given, GATEWAY_MAC))[:12]
    assert node.lab.counts()["PACKET_ERROR"] == before + 1


@pytest.mark.parametrize(("quote", "size"), QUOTES)
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_from_the_endpoint_itself_it_comes_as_from_the_vip(
    node: Node, f: Family, quote: Quote, size: int
) -> None:
    """The client does not know the endpoint, whose address may not even be routed to it."""
    sport = begin(node, f, quote, REMOTE)
    there = quote(f, (f.node, sport), (f.remote, TARGET))
    given = error(f, "port unreachable", f.remote, f.node, cut(f, there, size), 64)
    outcome = node.send(arriving(given, source=OTHER_MAC))
    assert outcome.verdict == SEND
    quoted = cut_like(f, quote(f, (f.client, sport), (f.node, REMOTE)), size, cut(f, there, size))
    same_error(
        f,
        outcome.frame,
        lambda source: error(f, "port unreachable", source, f.client, quoted, 63),
        (f.node,),
    )


@pytest.mark.parametrize("hook", [XDP, INGRESS])
@pytest.mark.parametrize(("quote", "size"), QUOTES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_from_the_clients_side_to_an_endpoint_elsewhere(
    node: Node, f: Family, kind: str, quote: Quote, size: int, hook: str
) -> None:
    """A router about an answer: path MTU discovery of the endpoint. It must come to the endpoint as
    from somebody to whom it can be: the router, or this node, its only client."""
    sport = begin(node, f, quote, REMOTE, hook)
    answer = quote(f, (f.node, REMOTE), (f.client, sport))
    given = error(f, kind, f.router, f.node, cut(f, answer, size), 60)
    outcome = node.send(arriving(given), hook)
    assert outcome.verdict == SEND
    quoted = cut_like(f, quote(f, (f.remote, TARGET), (f.node, sport)), size, cut(f, answer, size))
    same_error(
        f,
        outcome.frame,
        lambda source: error(f, kind, source, f.remote, quoted, 59),
        (f.router, f.node),
    )
    if hook == XDP:
        assert outcome.frame[:12] == bytes(leaving(given, OTHER_MAC))[:12]


@pytest.mark.parametrize("hook", [XDP, INGRESS])
@pytest.mark.parametrize(("quote", "size"), QUOTES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_from_the_clients_side_to_an_endpoint_here(
    node: Node, f: Family, kind: str, quote: Quote, size: int, hook: str
) -> None:
    sport = begin(node, f, quote, LOCAL, hook)
    answer = quote(f, (f.node, LOCAL), (f.client, sport))
    given = error(f, kind, f.router, f.node, cut(f, answer, size), 60)
    outcome = node.send(arriving(given), hook)
    assert outcome.verdict == PASS
    quoted = cut_like(f, quote(f, (f.local, TARGET), (f.client, sport)), size, cut(f, answer, size))
    wanted = arriving(error(f, kind, f.router, f.local, quoted, 60))
    assert outcome.frame.hex() == bytes(wanted).hex()


@pytest.mark.parametrize(("quote", "size"), QUOTES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_from_an_endpoint_here_on_its_way_out(
    node: Node, f: Family, kind: str, quote: Quote, size: int
) -> None:
    """Or from this node's stack, on behalf of the endpoint: then it keeps the node's address."""
    sport = begin(node, f, quote, LOCAL)
    there = quote(f, (f.client, sport), (f.local, TARGET))
    quoted = cut_like(f, quote(f, (f.client, sport), (f.node, LOCAL)), size, cut(f, there, size))
    for source in (f.local, f.node1):
        given = error(f, kind, source, f.client, cut(f, there, size), 63)
        outcome = node.send(leaving(given, GATEWAY_MAC), EGRESS)
        assert outcome.verdict == PASS
        same_error(
            f,
            outcome.frame,
            lambda source: error(f, kind, source, f.client, quoted, 63),
            (f.node,) if source == f.local else (f.node, f.node1),
        )


def test_a_quoted_checksum_of_none_stays_none(node: Node) -> None:
    begin(node, V4, plain, REMOTE)
    there = bytes(plain(V4, (V4.node, IN_RANGE), (V4.remote, TARGET)))
    given = error(V4, "too big", V4.router, V4.node, there, 60)
    outcome = node.send(arriving(given))
    quoted = bytes(plain(V4, (V4.client, IN_RANGE), (V4.node, REMOTE)))
    same_error(
        V4,
        outcome.frame,
        lambda source: error(V4, "too big", source, V4.client, quoted, 59),
        (V4.router, V4.node),
    )


def test_a_quoted_header_with_options(node: Node) -> None:
    begin(node, V4, datagram, REMOTE)
    options = [IPOption(b"\x01" * 8)]
    there = V4.udp((V4.node, IN_RANGE), (V4.remote, TARGET), options=options)
    given = error(V4, "too big", V4.router, V4.node, bytes(there), 60)
    outcome = node.send(arriving(given))
    quoted = bytes(V4.udp((V4.client, IN_RANGE), (V4.node, REMOTE), options=options))
    same_error(
        V4,
        outcome.frame,
        lambda source: error(V4, "too big", source, V4.client, quoted, 59),
        (V4.router, V4.node),
    )


def _unknown(f: Family) -> list[Packet]:
    ours = f.tcp((f.node, IN_RANGE), (f.remote, TARGET))
    return [
        # about a connection that is none of ours
        error(f, "too big", f.router, f.node, bytes(f.tcp((f.node, 45000), (f.remote, 443))), 60),
        # about a flow that never was
        error(f, "too big", f.router, f.node, bytes(f.tcp((f.node, 61999), (f.remote, 443))), 60),
        # less quoted than an error must
        error(f, "too big", f.router, f.node, cut(f, ours, 3), 60),
        error(f, "too big", f.router, f.node, bytes(ours)[:12], 60),
        error(f, "too big", f.router, f.node, b"", 60),
        # quoting something else
        error(f, "too big", f.router, f.node, b"\xff" * 64, 60),
    ]


@pytest.mark.parametrize("hook", [XDP, INGRESS, EGRESS])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_other_errors_pass_untouched(node: Node, f: Family, hook: str) -> None:
    begin(node, f, segment, REMOTE)
    for packet in _unknown(f):
        frame = bytes(arriving(packet))
        outcome = node.send(frame, hook)
        assert (outcome.verdict, outcome.frame.hex()) == (PASS, frame.hex())


@pytest.mark.parametrize("hook", [XDP, INGRESS])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_an_error_that_is_cut_short_by_a_byte_passes_untouched(
    node: Node, f: Family, hook: str
) -> None:
    begin(node, f, segment, REMOTE, hook)
    there = cut(f, segment(f, (f.node, IN_RANGE), (f.remote, TARGET)), 8)
    frame = bytes(arriving(error(f, "too big", f.router, f.node, there, 60)))
    for length in range(34, len(frame)):
        outcome = node.offer(frame[:length], hook)
        if outcome is None:
            continue
        assert (outcome.verdict, outcome.frame.hex()) == (PASS, frame[:length].hex())


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_an_error_with_ttl_1_is_the_stacks(node: Node, f: Family) -> None:
    """It can't be forwarded; and nobody is told of an error about an error."""
    begin(node, f, segment, REMOTE)
    there = segment(f, (f.node, IN_RANGE), (f.remote, TARGET))
    frame = bytes(arriving(error(f, "too big", f.router, f.node, cut(f, there, 8), 1)))
    outcome = node.send(frame)
    assert (outcome.verdict, outcome.frame.hex()) == (PASS, frame.hex())


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_an_error_does_not_keep_a_flow(node: Node, f: Family) -> None:
    """Anybody can send one: it neither begins, answers nor closes anything."""
    begin(node, f, segment, REMOTE)
    before = sorted(map(repr, node.lab.flows()))
    there = segment(f, (f.node, IN_RANGE), (f.remote, TARGET))
    node.send(arriving(error(f, "unreachable", f.router, f.node, bytes(there), 60)))
    assert sorted(map(repr, node.lab.flows())) == before
