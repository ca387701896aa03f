"""Datagrams in pieces: only the first has ports, all go the same way."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.packet import Packet, Raw

from tests.kernel.packets.node import EGRESS, INGRESS, XDP, Node
from tests.kernel.packets.world import (
    FAMILIES,
    GATEWAY_MAC,
    IN_RANGE,
    LOCAL,
    OUT_OF_RANGE,
    REMOTE,
    TARGET,
    V4,
    Family,
    arriving,
    leaving,
)
from tests.support.packets import PASS, SEND

_DATA = bytes(i * 7 % 251 for i in range(3000))
_SIZE = 1024  # of each piece's payload


def pieces(packet: Packet, f: Family, ident: int = 0x1234) -> list[Packet]:
    """The packet cut up, in order. Its checksum is that of the whole."""
    if f is V4:
        whole = IP(bytes(packet))
        whole.id = ident
        del whole.chksum
        return fragment(IP(bytes(whole)), _SIZE)
    whole = IPv6(bytes(packet))
    payload = bytes(whole.payload)
    cut = []
    for at in range(0, len(payload), _SIZE):
        more = int(at + _SIZE < len(payload))
        head = IPv6(src=whole.src, dst=whole.dst, hlim=whole.hlim)
        piece = IPv6ExtHdrFragment(nh=17, offset=at // 8, m=more, id=ident)
        cut.append(head / piece / Raw(payload[at : at + _SIZE]))
    return cut


def query(f: Family, port: int, sport: int = IN_RANGE) -> Packet:
    return f.udp((f.client, sport), (f.node, port), _DATA)


def sent(f: Family) -> Packet:
    return f.udp((f.node, IN_RANGE), (f.remote, TARGET), _DATA, 63)


def here(f: Family, sport: int = IN_RANGE) -> Packet:
    return f.udp((f.client, sport), (f.local, TARGET), _DATA)


@pytest.mark.parametrize("hook", [XDP, INGRESS])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_all_pieces_reach_an_endpoint_elsewhere(node: Node, f: Family, hook: str) -> None:
    wanted = pieces(sent(f), f)
    for piece, out in zip(pieces(query(f, REMOTE), f), wanted, strict=True):
        outcome = node.send(arriving(piece), hook)
        assert outcome.verdict == SEND
        assert outcome.frame[14:].hex() == bytes(out).hex()


@pytest.mark.parametrize("hook", [XDP, INGRESS])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_all_pieces_reach_an_endpoint_here(node: Node, f: Family, hook: str) -> None:
    wanted = pieces(here(f), f)
    for piece, out in zip(pieces(query(f, LOCAL), f), wanted, strict=True):
        outcome = node.send(arriving(piece), hook)
        assert outcome.verdict == PASS
        assert outcome.frame == bytes(arriving(out))


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_the_answer_in_pieces_comes_back(node: Node, f: Family) -> None:
    node.send(arriving(f.udp((f.client, IN_RANGE), (f.node, REMOTE))))
    back = pieces(f.udp((f.remote, TARGET), (f.node, IN_RANGE), _DATA), f)
    wanted = pieces(f.udp((f.node, REMOTE), (f.client, IN_RANGE), _DATA, 63), f)
    for piece, out in zip(back, wanted, strict=True):
        outcome = node.send(arriving(piece))
        assert outcome.verdict == SEND
        assert outcome.frame == bytes(leaving(out, GATEWAY_MAC))


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_the_answer_of_an_endpoint_here_leaves_in_pieces(node: Node, f: Family) -> None:
    node.send(arriving(f.udp((f.client, OUT_OF_RANGE), (f.node, LOCAL))))
    back = pieces(f.udp((f.local, TARGET), (f.client, OUT_OF_RANGE), _DATA), f)
    wanted = pieces(f.udp((f.node, LOCAL), (f.client, OUT_OF_RANGE), _DATA), f)
    for piece, out in zip(back, wanted, strict=True):
        outcome = node.send(leaving(piece), EGRESS)
        assert outcome.verdict == PASS
        assert outcome.frame == bytes(leaving(out))


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_later_pieces_in_any_order(node: Node, f: Family) -> None:
    given, wanted = pieces(query(f, REMOTE), f), pieces(sent(f), f)
    for number in (0, 2, 1):
        outcome = node.send(arriving(given[number]))
        assert outcome.frame[14:] == bytes(wanted[number])


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_piece_before_the_first_is_left_to_the_stack(node: Node, f: Family) -> None:
    """It can't be known whose it is. Counted, for it may be lost."""
    given = pieces(query(f, REMOTE), f)
    before = node.lab.counts()["FRAGMENT_UNKNOWN"]
    frame = bytes(arriving(given[1]))
    outcome = node.send(frame)
    assert (outcome.verdict, outcome.frame) == (PASS, frame)
    assert node.lab.counts()["FRAGMENT_UNKNOWN"] == before + 1
    assert node.send(arriving(given[0])).verdict == SEND
    assert node.send(arriving(given[1])).verdict == SEND


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_pieces_of_two_datagrams_do_not_mix(node: Node, f: Family) -> None:
    one, two = pieces(query(f, REMOTE), f, 1), pieces(query(f, LOCAL), f, 2)
    node.send(arriving(one[0]))
    node.send(arriving(two[0]))
    assert node.send(arriving(one[1])).frame[14:] == bytes(pieces(sent(f), f, 1)[1])
    assert node.send(arriving(two[1])).frame[14:] == bytes(pieces(here(f), f, 2)[1])
    third = bytes(arriving(pieces(query(f, REMOTE), f, 3)[1]))
    assert node.send(third).frame == third


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_an_identifier_may_be_used_again_for_another_flow(node: Node, f: Family) -> None:
    """The first piece says anew whose the others are."""
    node.send(arriving(pieces(query(f, REMOTE), f)[0]))
    node.send(arriving(pieces(query(f, LOCAL), f)[0]))
    outcome = node.send(arriving(pieces(query(f, LOCAL), f)[1]))
    assert outcome.frame == bytes(arriving(pieces(here(f), f)[1]))


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_nothing_of_a_later_piece_is_taken_for_a_checksum(node: Node, f: Family) -> None:
    """Its payload begins where a header would be: not a byte of it changes."""
    given = pieces(query(f, LOCAL), f)
    node.send(arriving(given[0]))
    for piece in given[1:]:
        outcome = node.send(arriving(piece))
        assert outcome.frame[-len(piece[Raw].load) :] == piece[Raw].load


def test_pieces_smaller_than_a_header_are_not_guessed_at(node: Node) -> None:
    """RFC 1858: 8 bytes of TCP are no header; what follows must not become one."""
    whole = V4.tcp((V4.client, IN_RANGE), (V4.node, REMOTE), flags="PA", data=bytes(40))
    for piece in fragment(IP(bytes(whole)), 8):
        frame = bytes(arriving(piece))
        outcome = node.send(frame)
        assert (outcome.verdict, outcome.frame) == (PASS, frame)
    assert not node.lab.flows()
