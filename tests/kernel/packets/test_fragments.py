"""Datagrams in pieces: only the first has ports, all go the same way."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.packet import Packet, Raw

from pointsman import abi
from tests.kernel.packets.back import Back
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
from tests.support.packets import DROP, PASS, SEND

_DATA = bytes(i * 7 % 251 for i in range(3000))
_SIZE = 1024  # of each piece's payload


def pieces(packet: Packet, f: Family, ident: int = 0x1234, size: int = _SIZE) -> list[Packet]:
    """The packet cut up, in order. Its checksum is that of the whole."""
    if f is V4:
        whole = IP(bytes(packet))
        whole.id = ident
        del whole.chksum
        return fragment(IP(bytes(whole)), size)
    whole = IPv6(bytes(packet))
    payload = bytes(whole.payload)
    cut = []
    for at in range(0, len(payload), size):
        more = int(at + size < len(payload))
        head = IPv6(src=whole.src, dst=whole.dst, hlim=whole.hlim)
        piece = IPv6ExtHdrFragment(nh=17, offset=at // 8, m=more, id=ident)
        cut.append(head / piece / Raw(payload[at : at + size]))
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


@pytest.fixture
def out(node: Node) -> Iterator[Back]:
    """What leaves by eth0, as its other end has it."""
    made = Back(node, "xeth0", socket.PACKET_OTHERHOST)
    yield made
    made.close()


def counted(node: Node, before: dict[str, int]) -> dict[str, int]:
    """What was counted of fragments since."""
    now = node.lab.counts()
    return {
        name.removeprefix("FRAGMENT_"): now[name] - before[name]
        for name in now
        if name.startswith("FRAGMENT_") and now[name] != before[name]
    }


ORDERS = [(1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("port", [REMOTE, LOCAL])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_pieces_before_the_first_wait_for_it(
    node: Node, back: Back, f: Family, port: int, order: tuple[int, ...]
) -> None:
    """XDP leaves them to TC, which keeps them, and the first one with them."""
    given = pieces(query(f, port), f)
    wanted = [bytes(p) for p in pieces(sent(f) if port == REMOTE else here(f), f)]
    before, early = node.lab.counts(), order.index(0)
    for number in order[: early + 1]:
        assert not back.frames(0)
        frame = bytes(arriving(given[number]))
        outcome = node.send(frame, XDP)
        assert (outcome.verdict, outcome.frame) == (PASS, frame)
        assert node.send(frame, INGRESS).verdict == DROP
    assert counted(node, before) == {"HELD": early, "RELEASED": 1}
    outcomes = back.through(early + 1)
    outcomes += [node.send(arriving(given[number]), XDP) for number in order[early + 1 :]]
    assert {outcome.verdict for outcome in outcomes} == {SEND if port == REMOTE else PASS}
    # The first one comes first.
    assert outcomes[0].frame[14:] == wanted[0]
    assert sorted(outcome.frame[14:] for outcome in outcomes) == sorted(wanted)
    assert not back.frames(0)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_the_answer_in_any_order_comes_back(node: Node, back: Back, f: Family) -> None:
    node.send(arriving(f.udp((f.client, IN_RANGE), (f.node, REMOTE))))
    given = pieces(f.udp((f.remote, TARGET), (f.node, IN_RANGE), _DATA), f)
    wanted = pieces(f.udp((f.node, REMOTE), (f.client, IN_RANGE), _DATA, 63), f)
    for piece in reversed(given):
        node.send(arriving(piece), INGRESS)
    outcomes = back.through(3, XDP)
    assert {outcome.verdict for outcome in outcomes} == {SEND}
    assert {outcome.frame[14:] for outcome in outcomes} == {bytes(piece) for piece in wanted}


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_the_answer_of_an_endpoint_here_in_any_order(node: Node, out: Back, f: Family) -> None:
    node.send(arriving(f.udp((f.client, OUT_OF_RANGE), (f.node, LOCAL))))
    given = pieces(f.udp((f.local, TARGET), (f.client, OUT_OF_RANGE), _DATA), f)
    wanted = pieces(f.udp((f.node, LOCAL), (f.client, OUT_OF_RANGE), _DATA), f)
    for piece in reversed(given):
        assert node.send(leaving(piece), EGRESS).verdict == DROP
    outcomes = out.through(3, EGRESS)
    assert outcomes[0].frame == bytes(leaving(wanted[0]))
    assert {outcome.frame for outcome in outcomes} == {bytes(leaving(piece)) for piece in wanted}


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_nothing_that_leaves_is_kept_but_answers_of_endpoints(node: Node, f: Family) -> None:
    for piece in pieces(f.udp((f.unknown, TARGET), (f.client, OUT_OF_RANGE), _DATA), f)[1:]:
        frame = bytes(leaving(piece))
        outcome = node.send(frame, EGRESS)
        assert (outcome.verdict, outcome.frame) == (PASS, frame)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_pieces_of_what_is_no_services_go_on_too(node: Node, back: Back, f: Family) -> None:
    """The address is the node's, so it can't be known before: its own NFS may be meant."""
    given = [bytes(arriving(piece)) for piece in pieces(query(f, 22), f)]
    for frame in reversed(given):
        assert node.send(frame, INGRESS).verdict == DROP
    frames = back.frames(3)
    assert sorted(frames) == sorted(given)
    for frame in frames:
        outcome = node.send(frame, INGRESS)
        assert (outcome.verdict, outcome.frame) == (PASS, frame)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_pieces_of_others_are_not_kept(node: Node, f: Family) -> None:
    for piece in pieces(f.udp((f.client, IN_RANGE), (f.unknown, REMOTE), _DATA), f)[1:]:
        frame = bytes(arriving(piece))
        outcome = node.send(frame, INGRESS)
        assert (outcome.verdict, outcome.frame) == (PASS, frame)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_more_pieces_than_can_be_kept_are_left_to_the_stack(
    node: Node, back: Back, f: Family
) -> None:
    """48 of one datagram: one of 64 KiB in frames of 1,500 bytes has fewer."""
    given = pieces(f.udp((f.client, IN_RANGE), (f.node, LOCAL), bytes(60000)), f)
    assert len(given) == 59
    before = node.lab.counts()
    for piece in given[:0:-1]:
        node.send(arriving(piece), INGRESS)
    assert counted(node, before) == {"HELD": 48, "UNKNOWN": 10}
    node.send(arriving(given[0]), INGRESS)
    assert len(back.frames(49)) == 49


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_the_oldest_make_room(node: Node, back: Back, f: Family) -> None:
    """First pieces that never come keep nobody else's from being served."""
    given = pieces(query(f, LOCAL), f, 1)
    node.send(arriving(given[2]), INGRESS)
    for number in range(512):
        node.send(arriving(pieces(query(f, LOCAL), f, 1000 + number)[1]), INGRESS)
    before = node.lab.counts()
    node.send(arriving(given[0]), INGRESS)
    assert back.frames(1) == [bytes(arriving(given[0]))]
    newest = pieces(query(f, LOCAL), f, 1511)
    node.send(arriving(newest[0]), INGRESS)
    assert len(back.frames(2)) == 2
    assert counted(node, before) == {"RELEASED": 2}


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_piece_that_the_first_overtook_goes_on_at_once(node: Node, f: Family) -> None:
    node.send(arriving(pieces(query(f, LOCAL), f)[0]), INGRESS)
    before = node.lab.counts()
    outcome = node.send(arriving(pieces(query(f, LOCAL), f)[2]), INGRESS)
    assert outcome.frame == bytes(arriving(pieces(here(f), f)[2]))
    assert not counted(node, before)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_piece_waits_for_its_first_though_another_had_its_identifier_before(
    node: Node, f: Family
) -> None:
    node.send(arriving(pieces(query(f, LOCAL), f)[0]), INGRESS)
    noted, at = node.lab.map("fragments"), abi.layouts()["fragment"].field("seen").offset
    ((key, value),) = noted.items()
    (seen,) = struct.unpack_from("=Q", value, at)
    noted.update(key, value[:at] + struct.pack("=Q", seen - 6 * 10**9) + value[at + 8 :])
    before = node.lab.counts()
    assert node.send(arriving(pieces(query(f, LOCAL), f)[2]), INGRESS).verdict == DROP
    assert counted(node, before) == {"HELD": 1}


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


@pytest.mark.parametrize("port", [REMOTE, LOCAL])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_what_the_device_has_summed_stays_right(node: Node, f: Family, port: int) -> None:
    """The stack goes by the sum of the whole packet, if the device gave one. The kernel's test run
    knows not that a packet of another length has none any more: so those that wait are as long."""
    first, second, third = pieces(query(f, port), f)
    first2, second2, _ = pieces(query(f, port), f, 2)
    whole = f.udp((f.client, IN_RANGE), (f.node, port))
    try:
        for packet in (whole, first, second, third, second2, first2):
            node.lab.run(bytes(arriving(packet)), INGRESS, summed=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("needs Linux 6.18 (BPF_F_TEST_SKB_CHECKSUM_COMPLETE)")


def test_pieces_smaller_than_a_header_are_not_guessed_at(node: Node) -> None:
    """RFC 1858: 8 bytes of TCP are no header; what follows must not become one."""
    whole = V4.tcp((V4.client, IN_RANGE), (V4.node, REMOTE), flags="PA", data=bytes(40))
    for piece in fragment(IP(bytes(whole)), 8):
        frame = bytes(arriving(piece))
        outcome = node.send(frame)
        assert (outcome.verdict, outcome.frame) == (PASS, frame)
    assert not node.lab.flows()
