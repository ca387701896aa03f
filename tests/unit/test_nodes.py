"""At which addresses NodePorts answer."""

from __future__ import annotations

import pytest

from pointsman import abi
from pointsman.context import Context, Policy
from pointsman.names import fitted
from pointsman.nodes import context_of, node_entries, node_problems
from pointsman.objects import ClusterMeta, Node, NodeAddress, NodeStatus
from pointsman.values import Frontend, PortName, to_address, to_text

FLAGS = {number: name for name, number in abi.constants().items() if name.startswith("SERVICE_")}
NODE, REMOTE, LOOPBACK, PASS = (
    "SERVICE_NODE",
    "SERVICE_REMOTE_NODE",
    "SERVICE_LOOPBACK",
    "SERVICE_PASS",
)


def a_node(name: str, *addresses: str, zone: str = "") -> Node:
    """Addresses as "kind=address", InternalIP where no kind is given."""
    pairs = [text.split("=") if "=" in text else ["InternalIP", text] for text in addresses]
    labels = {"topology.kubernetes.io/zone": zone} if zone else {}
    return Node(
        metadata=ClusterMeta(name=name, labels=labels),
        status=NodeStatus(addresses=tuple(NodeAddress(type=k, address=a) for k, a in pairs)),
    )


A = a_node("a", "ExternalIP=203.0.113.1", "Hostname=a", "198.51.100.1", "fd00::a", zone="east")
B = a_node("b", "198.51.100.2", "198.51.100.3", "ExternalIP=203.0.113.2", "fd00::b", zone="west")
DEVICES = ("198.51.100.1", "10.0.0.1", "fd00::a", "fd00::aa", "fe80::1", "127.0.0.53")


DEFAULT = Policy()


def context(policy: Policy = DEFAULT, name: str = "a", *nodes: Node) -> Context:
    cidrs = ("198.51.100.0/29", "fd00::/120")
    return context_of(nodes or (A, B), name, list(map(to_address, DEVICES)), policy, cidrs)


def test_the_context_is_told_from_the_node_objects() -> None:
    found = context()
    assert (found.node_name, found.zone) == ("a", "east")
    assert list(map(to_text, found.own_addresses)) == ["198.51.100.1", "fd00::a", "203.0.113.1"]
    assert {"198.51.100.2", "198.51.100.3", "203.0.113.2", "fd00::b"} == set(
        map(to_text, found.remote_addresses)
    )
    assert {"198.51.100.2", "fd00::b"} == set(map(to_text, found.remote_primaries))


@pytest.mark.parametrize(
    "address", ["nonsense", "", "fe80::1", "127.0.0.1", "0.0.0.0", "010.0.0.1"]
)
def test_what_can_be_no_node_s_address_is_passed_over(address: str) -> None:
    assert context(Policy(), "a", a_node("a", address)).own_addresses == ()


def test_a_node_that_is_not_known_has_no_zone_and_others_have_all_addresses() -> None:
    found = context(Policy(), "c")
    assert (found.zone, found.own_addresses) == ("", ())
    assert to_address("198.51.100.1") in found.remote_addresses


BOTH_LOOPBACKS = {"127.0.0.1": LOOPBACK, "::1": LOOPBACK}
IPV6 = {"fd00::a": NODE, "fd00::aa": NODE, "fd00::b": REMOTE, "::1": LOOPBACK}
IPV4 = {
    "198.51.100.1": NODE,
    "10.0.0.1": NODE,
    "203.0.113.1": NODE,
    "198.51.100.2": REMOTE,
    "198.51.100.3": REMOTE,
    "203.0.113.2": REMOTE,
    "127.0.0.1": LOOPBACK,
}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        pytest.param(Policy(), {**IPV4, **IPV6}, id="all-by-default"),
        pytest.param(
            Policy(node_port_addresses=("198.51.100.0/24",)),
            {"198.51.100.1": NODE, "198.51.100.2": REMOTE, "198.51.100.3": REMOTE, **IPV6},
            id="one-family-given-the-other-answers-everywhere",
        ),
        pytest.param(
            Policy(node_port_addresses=("fd00::a/128",)),
            {**IPV4, "fd00::a": NODE},
            id="the-same-for-ipv6",
        ),
        pytest.param(
            Policy(node_port_addresses=("10.0.0.0/8", "fd00::a/128")),
            {"10.0.0.1": NODE, "fd00::a": NODE},
            id="both-families",
        ),
        pytest.param(
            Policy(node_port_addresses=("0.0.0.0/0", "10.9.9.0/24", "::/0")),
            {**IPV4, **IPV6},
            id="a-zero-cidr-is-all",
        ),
        pytest.param(
            Policy(node_port_addresses=("127.0.0.0/8", "fd00::a/128")),
            {"127.0.0.1": LOOPBACK, "fd00::a": NODE},
            id="loopback-only",
        ),
        pytest.param(
            Policy(node_port_addresses=("127.9.0.1/32", "fd00::a/128")),
            {"127.0.0.1": LOOPBACK, "fd00::a": NODE},
            id="anything-of-the-loopback-network-stands-for-it",
        ),
        pytest.param(
            Policy(node_port_addresses=("127.0.0.0/8", "::1/128"), localhost_node_ports=False),
            {},
            id="the-switch-goes-first",
        ),
        pytest.param(
            Policy(localhost_node_ports=False),
            {k: v for k, v in {**IPV4, **IPV6}.items() if v != LOOPBACK},
            id="no-localhost",
        ),
        pytest.param(
            Policy(node_port_addresses=("primary",)),
            {"198.51.100.1": NODE, "fd00::a": NODE, "198.51.100.2": REMOTE, "fd00::b": REMOTE},
            id="primary",
        ),
        pytest.param(
            Policy(
                node_port_addresses=("203.0.113.0/24", "fd00::a/128"),
                refuse_unused_cluster_ips=True,
            ),
            {
                "203.0.113.1": NODE,
                "203.0.113.2": REMOTE,
                "fd00::a": NODE,
                "198.51.100.1": PASS,
                "198.51.100.2": PASS,
                "198.51.100.3": PASS,
                "fd00::aa": PASS,
                "fd00::b": PASS,
            },
            id="others-in-a-refused-range-are-let-pass",
        ),
    ],
)
def test_node_port_addresses(policy: Policy, expected: dict[str, str]) -> None:
    entries = node_entries(context(policy))
    assert {to_text(e.frontend.address): FLAGS[e.flags] for e in entries} == expected
    assert all(e.frontend.wildcard and e.owner == PortName("", "node/a", "") for e in entries)
    assert list(entries) == sorted(entries, key=lambda e: e.frontend)


def test_primary_of_a_family_that_the_node_lacks_is_all_its_addresses() -> None:
    only_ipv4 = a_node("a", "198.51.100.1")
    entries = node_entries(context(Policy(node_port_addresses=("primary",)), "a", only_ipv4))
    assert {to_text(e.frontend.address) for e in entries} == {
        "198.51.100.1",
        "fd00::a",
        "fd00::aa",
        "::1",
    }


def test_primary_of_an_unknown_node_is_said() -> None:
    policy = Policy(node_port_addresses=("primary",))
    assert [p.object for p in node_problems(context(policy, "c"))] == ["Node c"]
    assert node_problems(context(policy)) == ()
    assert node_problems(context(Policy(), "c")) == ()


def test_an_address_that_another_node_has_too_is_this_node_s() -> None:
    shared = a_node("b", "198.51.100.1")
    entries = {e.frontend: e.flags for e in node_entries(context(Policy(), "a", A, shared))}
    assert FLAGS[entries[Frontend(to_address("198.51.100.1"), 0, 0)]] == NODE


def test_names_fit_into_the_maps_and_stay_apart() -> None:
    assert fitted("node/worker-1") == "node/worker-1"
    assert fitted("n" * 63) == "n" * 63
    one, other = fitted("node/" + "x" * 200 + "1"), fitted("node/" + "x" * 200 + "2")
    assert len(one) == len(other) == 63
    assert one != other
    assert one == fitted("node/" + "x" * 200 + "1")
