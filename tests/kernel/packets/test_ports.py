"""The port by which an endpoint on another node knows a client."""

from __future__ import annotations

import pytest

from tests.kernel.packets.node import ELSEWHERE, INGRESS, XDP, Node
from tests.kernel.packets.test_flows import endpoint_of
from tests.kernel.packets.world import (
    FAMILIES,
    FIRST_PORT,
    GATEWAY_MAC,
    IN_RANGE,
    LAST_PORT,
    OUT_OF_RANGE,
    REMOTE,
    TARGET,
    V4,
    Family,
    arriving,
    leaving,
)
from tests.support.packets import DROP, SEND, Outcome


def source_port(f: Family, outcome: Outcome) -> int:
    assert outcome.verdict == SEND
    at = 34 if f is V4 else 54
    return int.from_bytes(outcome.frame[at : at + 2], "big")


def syn(
    node: Node, f: Family, sport: int, to: str = "", client: str = "", hook: str = XDP
) -> Outcome:
    port = REMOTE if not to else REMOTE - 30000
    return node.send(arriving(f.tcp((client or f.client, sport), (to or f.node, port))), hook)


@pytest.mark.parametrize("hook", [XDP, INGRESS])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_the_clients_own_is_kept_if_it_is_of_the_nodes_range(
    node: Node, f: Family, hook: str
) -> None:
    for sport in (FIRST_PORT, IN_RANGE, LAST_PORT):
        assert source_port(f, syn(node, f, sport, hook=hook)) == sport


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_else_it_is_one_of_the_range(node: Node, f: Family) -> None:
    """Others may be the node's own connections', or its NodePorts."""
    for sport in (1, 80, OUT_OF_RANGE, REMOTE, FIRST_PORT - 1):
        assert FIRST_PORT <= source_port(f, syn(node, f, sport)) <= LAST_PORT


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_clients_with_the_same_port_get_different_ones(node: Node, f: Family) -> None:
    base = f.client[:-1]
    found = {source_port(f, syn(node, f, IN_RANGE, client=f"{base}{i}")) for i in range(1, 10)}
    assert len(found) == 9
    assert IN_RANGE in found


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_each_answer_goes_to_whom_it_is_for(node: Node, f: Family) -> None:
    """One client port at two addresses, one endpoint: what comes back must not mix."""
    for to in (f.vip, f.vip2):
        port = source_port(f, syn(node, f, IN_RANGE, to))
        outcome = node.send(arriving(f.tcp((f.remote, TARGET), (f.node, port), "SA")))
        wanted = f.tcp((to, REMOTE - 30000), (f.client, IN_RANGE), "SA", ttl=63)
        assert outcome.frame == bytes(leaving(wanted, GATEWAY_MAC))
    assert len(node.lab.flows()) == 4


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_port_serves_several_endpoints(node: Node, f: Family) -> None:
    """It is taken towards one endpoint only."""
    node.lab.configure(first_port=IN_RANGE, last_port=IN_RANGE)
    assert source_port(f, syn(node, f, IN_RANGE)) == IN_RANGE
    node.serve(f, REMOTE, (f.remote2, ELSEWHERE))
    outcome = syn(node, f, IN_RANGE + 1)
    assert source_port(f, outcome) == IN_RANGE
    assert endpoint_of(f, outcome) == f.remote2


@pytest.mark.parametrize("hook", [XDP, INGRESS])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_when_all_are_taken_it_is_said(node: Node, f: Family, hook: str) -> None:
    node.lab.configure(first_port=61000, last_port=61003)
    found = {source_port(f, syn(node, f, 5000 + i, hook=hook)) for i in range(4)}
    assert found == {61000, 61001, 61002, 61003}
    before = node.lab.counts()
    assert syn(node, f, 6000, hook=hook).verdict == DROP
    after = node.lab.counts()
    assert after["DROP_NO_PORT"] == before["DROP_NO_PORT"] + 1
    assert after["FLOW_BEGUN"] == before["FLOW_BEGUN"]
    assert len(node.lab.flows()) == 8
    # Those that have one go on.
    for i in range(4):
        assert syn(node, f, 5000 + i, hook=hook).verdict == SEND


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_the_port_of_a_closed_connection_is_free(node: Node, f: Family) -> None:
    node.lab.configure(first_port=61000, last_port=61000)
    assert source_port(f, syn(node, f, 5000)) == 61000
    node.send(arriving(f.tcp((f.remote, TARGET), (f.node, 61000), "RA")))
    assert source_port(f, syn(node, f, 6000)) == 61000
    outcome = node.send(arriving(f.tcp((f.remote, TARGET), (f.node, 61000), "SA")))
    wanted = f.tcp((f.node, REMOTE), (f.client, 6000), "SA", ttl=63)
    assert outcome.frame == bytes(leaving(wanted, GATEWAY_MAC))


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_the_port_of_a_connection_that_its_client_reset_is_soon_free(node: Node, f: Family) -> None:
    """Not at once: a stranger's RST must not hand it to somebody else while it is in use."""
    node.lab.configure(first_port=61000, last_port=61000)
    syn(node, f, 5000)
    node.send(arriving(f.tcp((f.client, 5000), (f.node, REMOTE), "R")))
    assert syn(node, f, 6000).verdict == DROP
    node.lab.age(11)
    assert source_port(f, syn(node, f, 6000)) == 61000


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_the_port_of_a_flow_that_nobody_answers_is_soon_free(node: Node, f: Family) -> None:
    """Else a few thousand SYNs would take all ports of an endpoint. Its own client keeps it."""

    def asked_early() -> str:
        node.lab.configure(first_port=61000, last_port=61000)
        syn(node, f, 5000)
        node.lab.age(4)
        return syn(node, f, 6000).verdict

    assert node.within(1, asked_early) == DROP
    node.lab.age(2)
    assert source_port(f, syn(node, f, 5000)) == 61000
    assert source_port(f, syn(node, f, 6000)) == 61000
    node.send(arriving(f.tcp((f.remote, TARGET), (f.node, 61000), "SA")))
    node.send(arriving(f.tcp((f.client, 6000), (f.node, REMOTE), "A")))
    node.lab.age(60)
    assert syn(node, f, 5000).verdict == DROP, "somebody has answered"


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_the_port_of_a_flow_that_is_over_is_free(node: Node, f: Family) -> None:
    node.lab.configure(first_port=61000, last_port=61000)
    syn(node, f, 5000)
    assert syn(node, f, 6000).verdict == DROP
    node.lab.age(61)
    assert source_port(f, syn(node, f, 6000)) == 61000


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_client_at_the_port_of_another_flow_takes_nothing(node: Node, f: Family) -> None:
    """A flow whose port was given to a newer one is not answered with the newer one's packets."""
    node.lab.configure(first_port=61000, last_port=61000)
    syn(node, f, 5000)
    node.lab.age(61)
    syn(node, f, 6000)
    late = node.send(arriving(f.tcp((f.client, 5000), (f.node, REMOTE), "A")))
    if late.verdict == SEND:
        assert source_port(f, late) != 61000


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_range_of_none_leaves_no_port_but_drops_with_its_name(node: Node, f: Family) -> None:
    node.lab.configure(first_port=2, last_port=1)
    before = node.lab.counts()["DROP_NO_PORT"]
    assert syn(node, f, OUT_OF_RANGE).verdict == DROP
    assert node.lab.counts()["DROP_NO_PORT"] == before + 1
