"""What is remembered of a flow: which endpoint, for how long, and when it may be another one."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from pointsman.values import TCP, UDP
from tests.kernel.packets.node import EGRESS, ELSEWHERE, HERE, Node
from tests.kernel.packets.world import (
    FAMILIES,
    GATEWAY_MAC,
    IN_RANGE,
    LOCAL,
    REMOTE,
    TARGET,
    V4,
    Family,
    arriving,
    leaving,
)
from tests.support.packetlab import Flow
from tests.support.packets import PASS, SEND, Outcome


def client_says(
    node: Node, f: Family, flags: str = "S", port: int = REMOTE, sport: int = IN_RANGE, **more: str
) -> Outcome:
    return node.send(arriving(f.tcp((f.client, sport), (f.node, port), flags)), **more)


def endpoint_says(
    node: Node, f: Family, flags: str = "SA", endpoint: str = "", sport: int = IN_RANGE
) -> Outcome:
    return node.send(arriving(f.tcp((endpoint or f.remote, TARGET), (f.node, sport), flags)))


def asks(node: Node, f: Family, port: int = REMOTE) -> Outcome:
    return node.send(arriving(f.udp((f.client, IN_RANGE), (f.node, port))))


def answers(node: Node, f: Family, endpoint: str = "") -> Outcome:
    return node.send(arriving(f.udp((endpoint or f.remote, TARGET), (f.node, IN_RANGE))))


def endpoint_of(f: Family, outcome: Outcome) -> str:
    """The destination of the frame."""
    assert outcome.verdict == SEND
    if f is V4:
        return socket.inet_ntop(socket.AF_INET, outcome.frame[30:34])
    return socket.inet_ntop(socket.AF_INET6, outcome.frame[38:54])


def halves(node: Node, f: Family) -> tuple[Flow, Flow]:
    """The flow's direction from the client, and the one back."""
    flows = node.lab.flows()
    assert len(flows) == 2, flows
    there = [flow for flow in flows if flow.source[0] == f.client]
    back = [flow for flow in flows if flow.source[0] != f.client]
    return there[0], back[0]


def connect(node: Node, f: Family) -> None:
    client_says(node, f)
    endpoint_says(node, f)
    client_says(node, f, "A")


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_each_direction_is_the_mirror_image_of_the_others_key(node: Node, f: Family) -> None:
    client_says(node, f)
    there, back = halves(node, f)
    assert (there.source, there.destination) == ((f.client, IN_RANGE), (f.node, REMOTE))
    assert (there.becomes_from, there.becomes_to) == ((f.node, IN_RANGE), (f.remote, TARGET))
    assert (back.source, back.destination) == ((f.remote, TARGET), (f.node, IN_RANGE))
    assert (back.becomes_from, back.becomes_to) == ((f.node, REMOTE), (f.client, IN_RANGE))
    assert {there.proto, back.proto} == {TCP}
    assert there.flags == {"FLOW_REMOTE"}
    assert back.flags == {"FLOW_REMOTE", "FLOW_REPLY"}
    assert not there.open
    assert not back.open


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_flow_to_an_endpoint_here_keeps_the_clients_address(node: Node, f: Family) -> None:
    client_says(node, f, port=LOCAL, sport=40000)
    there, back = halves(node, f)
    assert (back.source, back.destination) == ((f.local, TARGET), (f.client, 40000))
    assert there.flags == frozenset()
    assert back.flags == {"FLOW_REPLY"}


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_flow_is_new_until_both_ends_have_spoken(node: Node, f: Family) -> None:
    client_says(node, f)
    for _ in range(3):  # SYNs are sent again
        client_says(node, f)
    assert [flow.open for flow in halves(node, f)] == [False, False]
    endpoint_says(node, f)
    before = node.lab.counts()["FLOW_PROMOTED"]
    client_says(node, f, "A")
    assert [flow.open for flow in halves(node, f)] == [True, True]
    assert node.lab.counts()["FLOW_PROMOTED"] == before + 1
    client_says(node, f, "PA")
    endpoint_says(node, f, "PA")
    assert node.lab.counts()["FLOW_PROMOTED"] == before + 1


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_datagrams_alike(node: Node, f: Family) -> None:
    asks(node, f)
    asks(node, f)
    assert [flow.open for flow in halves(node, f)] == [False, False]
    answers(node, f)
    asks(node, f)
    assert [flow.open for flow in halves(node, f)] == [True, True]


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_with_an_endpoint_here_the_answer_at_egress_counts(node: Node, f: Family) -> None:
    client_says(node, f, port=LOCAL)
    node.send(leaving(f.tcp((f.local, TARGET), (f.client, IN_RANGE), "SA")), EGRESS)
    client_says(node, f, "A", LOCAL)
    assert [flow.open for flow in halves(node, f)] == [True, True]


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_fin_and_rst_are_noted_by_direction(node: Node, f: Family) -> None:
    connect(node, f)
    client_says(node, f, "FA")
    there, back = halves(node, f)
    assert "FLOW_FIN" in there.flags
    assert not {"FLOW_FIN", "FLOW_RST"} & back.flags
    endpoint_says(node, f, "R")
    there, back = halves(node, f)
    assert "FLOW_RST" in back.flags
    assert "FLOW_RST" not in there.flags


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_the_last_packets_of_a_closed_flow_still_arrive(node: Node, f: Family) -> None:
    connect(node, f)
    client_says(node, f, "FA")
    endpoint_says(node, f, "FA")
    assert endpoint_of(f, client_says(node, f, "A")) == f.remote
    outcome = endpoint_says(node, f, "A")
    wanted = f.tcp((f.node, REMOTE), (f.client, IN_RANGE), "A", ttl=63)
    assert outcome.frame == bytes(leaving(wanted, GATEWAY_MAC))


def _reset(node: Node, f: Family) -> None:
    endpoint_says(node, f, "R")


def _both_fin(node: Node, f: Family) -> None:
    client_says(node, f, "FA")
    endpoint_says(node, f, "FA")
    client_says(node, f, "A")


@pytest.mark.parametrize("close", [_reset, _both_fin])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_syn_on_a_closed_tuple_chooses_anew(
    node: Node, f: Family, close: Callable[[Node, Family], None]
) -> None:
    """A client may use its port again at once. The endpoint of the last connection is still there,
    but clients from outside are given another one meanwhile."""
    connect(node, f)
    close(node, f)
    both = ((f.remote, ELSEWHERE), (f.remote2, ELSEWHERE))
    node.serve(f, REMOTE, (f.remote2, ELSEWHERE), all=both)
    assert endpoint_of(f, client_says(node, f)) == f.remote2
    there, back = halves(node, f)
    assert not {"FLOW_FIN", "FLOW_RST", "FLOW_ANSWERED"} & (there.flags | back.flags)
    assert not there.open
    assert endpoint_says(node, f, "SA", f.remote2).verdict == SEND


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_syn_that_comes_again_keeps_its_endpoint(node: Node, f: Family) -> None:
    """Two endpoints that both answer one SYN would break the connection."""
    client_says(node, f)
    both = ((f.remote, ELSEWHERE), (f.remote2, ELSEWHERE))
    node.serve(f, REMOTE, (f.remote2, ELSEWHERE), all=both)
    assert endpoint_of(f, client_says(node, f)) == f.remote
    endpoint_says(node, f)
    assert endpoint_of(f, client_says(node, f)) == f.remote


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_syn_on_a_flow_that_is_over_chooses_anew(node: Node, f: Family) -> None:
    """Although nobody has swept it yet."""
    client_says(node, f)
    both = ((f.remote, ELSEWHERE), (f.remote2, ELSEWHERE))
    node.serve(f, REMOTE, (f.remote2, ELSEWHERE), all=both)
    node.lab.age(50)
    assert endpoint_of(f, client_says(node, f)) == f.remote
    node.lab.age(70)
    assert endpoint_of(f, client_says(node, f)) == f.remote2


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_half_open_flow_ends_its_time_after_its_first_packet(node: Node, f: Family) -> None:
    """However often its SYN or the answer to it is sent again: else it would hold its port."""
    client_says(node, f)
    node.lab.age(50)
    client_says(node, f)
    endpoint_says(node, f)
    node.lab.age(11)
    before = node.lab.counts()["FLOW_MOVED"]
    client_says(node, f)
    assert node.lab.counts()["FLOW_MOVED"] == before + 1


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_an_acknowledged_flow_is_not_half_open(node: Node, f: Family) -> None:
    client_says(node, f)
    node.lab.age(50)
    endpoint_says(node, f)
    client_says(node, f, "A")
    node.lab.age(3600)
    both = ((f.remote, ELSEWHERE), (f.remote2, ELSEWHERE))
    node.serve(f, REMOTE, (f.remote2, ELSEWHERE), all=both)
    assert endpoint_of(f, client_says(node, f)) == f.remote


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
@pytest.mark.parametrize(
    ("said", "seconds", "kept"),
    [
        pytest.param("client", 50, True, id="the client's, for a while"),
        pytest.param("client", 61, False, id="the client's"),
        pytest.param("both", 3600, True, id="the client's, which goes on"),
        pytest.param("endpoint", 9, True, id="the endpoint's, for a moment"),
        pytest.param("endpoint", 11, False, id="the endpoint's"),
    ],
)
def test_what_a_reset_ends(node: Node, f: Family, said: str, seconds: int, kept: bool) -> None:
    """Anybody can send one in the client's name, and the endpoint may well ignore it."""

    def swept() -> int:
        connect(node, f)
        if said == "endpoint":
            endpoint_says(node, f, "R")
        else:
            client_says(node, f, "R")
        if said == "both":
            client_says(node, f, "PA")
        node.lab.age(seconds)
        return node.lab.sweep()

    assert node.within(1, swept) == (0 if kept else 1)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
@pytest.mark.parametrize("flags", ["R", "FA"])
def test_a_stranger_who_ends_and_begins_it_anew_moves_nothing(
    node: Node, f: Family, flags: str
) -> None:
    """In the client's name: the connection stays with its endpoint, which knows better."""
    connect(node, f)
    both = ((f.remote, ELSEWHERE), (f.remote2, ELSEWHERE))
    node.serve(f, REMOTE, (f.remote2, ELSEWHERE), all=both)
    client_says(node, f, flags)
    assert endpoint_of(f, client_says(node, f)) == f.remote
    assert endpoint_of(f, client_says(node, f, "PA")) == f.remote


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_datagrams_move_when_their_endpoint_has_left(node: Node, f: Family) -> None:
    asks(node, f)
    answers(node, f)
    asks(node, f)
    node.serve(f, REMOTE, (f.remote2, ELSEWHERE))
    before = node.lab.counts()["FLOW_MOVED"]
    assert endpoint_of(f, asks(node, f)) == f.remote2
    assert node.lab.counts()["FLOW_MOVED"] == before + 1
    there, back = halves(node, f)
    assert there.becomes_to == (f.remote2, TARGET)
    assert answers(node, f, f.remote2).verdict == SEND


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_connection_stays_with_an_endpoint_that_leaves(node: Node, f: Family) -> None:
    """It may end in peace: the endpoint may only be shutting down."""
    connect(node, f)
    node.serve(f, REMOTE, (f.remote2, ELSEWHERE))
    assert endpoint_of(f, client_says(node, f, "PA")) == f.remote
    assert endpoint_says(node, f, "PA").verdict == SEND


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_syn_does_not_go_to_an_endpoint_that_has_left(node: Node, f: Family) -> None:
    client_says(node, f)
    node.serve(f, REMOTE, (f.remote2, ELSEWHERE))
    assert endpoint_of(f, client_says(node, f)) == f.remote2
    assert len(node.lab.flows()) == 2
    wanted = f.tcp((f.node, REMOTE), (f.client, IN_RANGE), "SA", ttl=63)
    outcome = endpoint_says(node, f, "SA", f.remote2)
    assert outcome.frame == bytes(leaving(wanted, GATEWAY_MAC))


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_flow_may_move_from_elsewhere_to_here_and_back(node: Node, f: Family) -> None:
    asks(node, f)
    node.serve(f, REMOTE, (f.local, HERE))
    outcome = asks(node, f)
    assert outcome.verdict == PASS
    assert outcome.frame == bytes(arriving(f.udp((f.client, IN_RANGE), (f.local, TARGET))))
    node.serve(f, REMOTE, (f.remote2, ELSEWHERE))
    assert endpoint_of(f, asks(node, f)) == f.remote2


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_connection_whose_service_is_gone_goes_on(node: Node, f: Family) -> None:
    connect(node, f)
    node.set(f"{f!r}-{REMOTE}".lower())
    assert endpoint_of(f, client_says(node, f, "PA")) == f.remote
    assert endpoint_says(node, f, "PA").verdict == SEND
    assert client_says(node, f, "S", sport=IN_RANGE + 1).verdict == PASS


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
@pytest.mark.parametrize("flags", ["A", "PA", "FA", "RA", "SA"])
@pytest.mark.parametrize("port", [REMOTE, LOCAL])
def test_an_unknown_connection_is_the_stacks(node: Node, f: Family, port: int, flags: str) -> None:
    """Most likely it is one that kube-proxy has translated from the beginning."""
    packet = f.tcp((f.client, IN_RANGE), (f.node, port), flags)
    outcome = node.send(arriving(packet))
    assert (outcome.verdict, outcome.frame) == (PASS, bytes(arriving(packet)))
    assert not node.lab.flows()


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_flood_of_syns_drives_out_no_open_connection(node: Node, f: Family) -> None:
    connect(node, f)
    asks(node, f)
    answers(node, f)
    asks(node, f)
    kept = [flow for flow in node.lab.flows() if flow.open]
    assert len(kept) == 4
    for number in range(4000):
        source = (f.client, 1024 + number)
        node.send(arriving(f.tcp(source, (f.vip, REMOTE - 30000))))
    assert [flow for flow in node.lab.flows() if flow.open] == kept
    assert endpoint_of(f, client_says(node, f, "PA")) == f.remote
    wanted = f.tcp((f.node, REMOTE), (f.client, IN_RANGE), "PA", ttl=63)
    assert endpoint_says(node, f, "PA").frame == bytes(leaving(wanted, GATEWAY_MAC))


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_full_flows_cost_new_connections_nothing_but_their_safety(node: Node, f: Family) -> None:
    """Where `flows` has no room, a flow stays among the new ones and works."""
    room = node.lab.map("flows").info.max_entries
    value = bytes(node.lab.map("flows").info.value_size)
    keys = [b"\xfe" + number.to_bytes(39, "little") for number in range(room)]
    node.lab.map("flows").update_batch(b"".join(keys), value * room)
    try:
        before = node.lab.counts()["FLOW_UNPROMOTED"]
        connect(node, f)
        assert node.lab.counts()["FLOW_UNPROMOTED"] > before
        assert endpoint_of(f, client_says(node, f, "PA")) == f.remote
        assert endpoint_says(node, f, "PA").verdict == SEND
    finally:
        node.lab.map("flows").delete_batch(b"".join(keys))


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_tcp_and_udp_of_one_tuple_are_two_flows(node: Node, f: Family) -> None:
    client_says(node, f)
    asks(node, f)
    assert sorted(flow.proto for flow in node.lab.flows()) == [TCP, TCP, UDP, UDP]


def test_both_families_at_once(node: Node) -> None:
    for f in FAMILIES:
        connect(node, f)
    assert len(node.lab.flows()) == 4
