"""Which devices are served, with which addresses, and what is said of those that can't be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pointsman.deviceproblems import Outcome, problems, rows, unserved_ways
from pointsman.devices import (
    NO_ADDRESS,
    NODE,
    POD,
    RAW,
    XDP,
    Assigned,
    Choice,
    Device,
    Packets,
    Route,
    Seen,
    Served,
    Surrounding,
    aimed,
    choose,
    cluster_side,
    targets,
    vlans,
)
from pointsman.values import to_address

LO = Device(1, "lo", ethernet=False, loopback=True)
ETH0, ETH1 = Device(2, "eth0"), Device(3, "eth1")
VLAN = Device(4, "eth1.100", kind="vlan", lower=3, vlan=100)
POD_END = Device(5, "veth5", kind="veth")
TUNNEL = Device(6, "gre1", ethernet=False)
V4, V4_LATER, V6 = map(to_address, ("192.0.2.1", "192.0.2.9", "2001:db8::1"))
SEEN = Seen(
    (LO, ETH0, ETH1, VLAN, POD_END, TUNNEL),
    (
        Assigned(2, V4),
        Assigned(2, V4_LATER),
        Assigned(2, to_address("fe80::1"), usable=False),
        Assigned(2, V6),
        Assigned(4, to_address("198.51.100.1")),
    ),
    (Route(2, source=None, gateway=to_address("192.0.2.254")),),
)
AUTO = Packets(("auto",))


def names(choice: Choice) -> dict[str, int]:
    return {one.device.name: one.flags for one in choice.served}


@pytest.mark.parametrize(
    ("packets", "expected"),
    [
        pytest.param(Packets(), {}, id="none-of-them"),
        pytest.param(AUTO, {"eth0": NODE}, id="those-with-a-default-route"),
        pytest.param(Packets(("eth1",)), {"eth1": NODE}, id="by-name"),
        pytest.param(Packets(("eth[01]",)), {"eth0": NODE, "eth1": NODE}, id="by-a-pattern"),
        pytest.param(
            Packets(("*",)),
            {"eth0": NODE, "eth1": NODE, "eth1.100": NODE, "veth5": NODE},
            id="a-pattern-does-not-mean-loopback-or-what-has-no-frames",
        ),
        pytest.param(
            Packets(("eth1.100",)),
            {"eth1": 0, "eth1.100": NODE},
            id="a-vlan-s-frames-are-taken-below-where-nothing-else-is-served",
        ),
        pytest.param(
            Packets(("eth1.100",), xdp_mode="none"),
            {"eth1.100": NODE},
            id="without-xdp-a-vlan-needs-nothing-below",
        ),
        pytest.param(
            Packets(("eth0",), ("veth*",)), {"eth0": NODE, "veth5": POD}, id="pods-by-a-pattern"
        ),
    ],
)
def test_the_devices_that_are_served(packets: Packets, expected: dict[str, int]) -> None:
    assert names(choose(packets, SEEN, Surrounding())) == expected


def test_a_pod_s_device_is_served_by_tc_alone() -> None:
    choice = choose(AUTO, SEEN, Surrounding(pods=frozenset({5})))
    pod = choice.served[-1]
    assert (pod.flags, pod.xdp, pod.tc) == (POD, False, True)


def test_xdp_of_a_vlan_is_on_the_device_below() -> None:
    lower, vlan = choose(Packets(("eth1.100",)), SEEN, Surrounding()).served
    assert (lower.xdp, lower.tc) == (True, False)
    assert (vlan.xdp, vlan.tc, vlan.lower, vlan.vlan) == (False, True, 3, 100)
    assert vlans([lower, vlan]) == {(3, 100): 4}


@pytest.mark.parametrize(
    ("around", "route", "expected"),
    [
        pytest.param(Surrounding(), None, V4, id="the-first"),
        pytest.param(Surrounding(), V4_LATER, V4_LATER, id="the-default-route-s"),
        pytest.param(Surrounding((V4_LATER,)), V4, V4_LATER, id="the-node-s-own"),
        pytest.param(
            Surrounding((to_address("203.0.113.1"),)), None, V4, id="not-one-that-is-elsewhere"
        ),
        pytest.param(
            Surrounding(), to_address("203.0.113.1"), V4, id="nor-one-that-this-node-lacks"
        ),
    ],
)
def test_the_node_s_address_on_a_device(
    around: Surrounding, route: bytes | None, expected: bytes
) -> None:
    seen = replace(SEEN, defaults=(Route(2, source=route),))
    (served,) = choose(AUTO, seen, around).served
    assert (served.ipv4, served.ipv6) == (expected, V6)


def test_a_link_local_address_is_none() -> None:
    seen = replace(SEEN, addresses=SEEN.addresses[:3])
    assert choose(AUTO, seen, Surrounding()).served[0].ipv6 == NO_ADDRESS


def test_more_devices_than_the_map_has_room_for_leave_out_pods() -> None:
    many = tuple(Device(n, f"tap{n}") for n in range(10, 300))
    choice = choose(
        Packets(("eth0",), ("tap*",)), replace(SEEN, devices=(*many, ETH0)), Surrounding()
    )
    assert len(choice.served) == 256
    assert choice.served[0].device == ETH0
    assert len(choice.unserved) == 35


def said(packets: Packets, seen: Seen = SEEN, *outcomes: Outcome) -> list[tuple[str, str]]:
    """Severity and text of each problem."""
    around = Surrounding()
    found = problems(packets, seen, around, choose(packets, seen, around), outcomes)
    return [(each.severity, str(each)) for each in found]


SERVED = Served(ETH0, NODE, ipv4=V4, xdp=True)


@pytest.mark.parametrize(
    ("packets", "outcome", "severity", "words"),
    [
        pytest.param(
            AUTO, Outcome(SERVED, "none", "tcx", "its driver has none"), "warning",
            ("eth0", "no native XDP", "at TC", "--xdp-mode none"), id="no-driver-support",
        ),
        pytest.param(
            Packets(("eth0",), xdp_mode="native"), Outcome(SERVED, "none", "tcx", "x"), "error",
            ("eth0", "no native XDP"), id="native-was-asked-for",
        ),
        pytest.param(
            AUTO, Outcome(SERVED, "none", "tcx", "busy", foreign=77), "warning",
            ("eth0", "id 77", "ip link set dev eth0 xdp off"), id="another-s-program",
        ),
        pytest.param(
            Packets(("eth0",)), Outcome(SERVED, "none", "none", "x", "y"), "error",
            ("not served", "x", "y"), id="nothing-works",
        ),
        pytest.param(
            Packets(("eth0",)), Outcome(SERVED, "native", "none", "", "y"), "error",
            ("replies", "6.6"), id="no-way-back",
        ),
        pytest.param(
            AUTO, Outcome(SERVED, "none", "none", "x", "y"), "warning", ("not served",),
            id="nothing-works-and-nobody-named-it",
        ),
        pytest.param(
            Packets(("auto",), ("tap*",)), Outcome(SERVED, "none", "none", "x", "y"), "error",
            ("not served",), id="nothing-works-and-others-were-named",
        ),
        pytest.param(
            AUTO, Outcome(replace(SERVED, ipv4=NO_ADDRESS), "native", "tcx"), "warning",
            ("no address",), id="no-address",
        ),
        pytest.param(
            AUTO,
            Outcome(replace(SERVED, device=replace(ETH0, forwards=(False, True))), "native", "tcx"),
            "warning", ("net.ipv4.ip_forward", "sysctl -w"), id="no-forwarding",
        ),
        pytest.param(
            AUTO, Outcome(replace(SERVED, device=replace(ETH0, lro=True)), "native", "tcx"),
            "warning", ("LRO", "ethtool -K eth0 lro off"), id="lro",
        ),
    ],
)  # fmt: skip
def test_what_is_said_of_a_device(
    packets: Packets, outcome: Outcome, severity: str, words: tuple[str, ...]
) -> None:
    ((found, text),) = said(packets, SEEN, outcome)
    assert found == severity
    assert all(word in text for word in words), text


def test_nothing_is_said_of_a_device_that_works() -> None:
    assert said(AUTO, SEEN, Outcome(SERVED, "native", "tcx")) == []


@pytest.mark.parametrize(
    ("packets", "severity", "words"),
    [
        pytest.param(Packets(("eth7",)), "error", "device eth7", id="a-name"),
        pytest.param(Packets(("bond*",)), "warning", "device bond*", id="a-pattern"),
        pytest.param(Packets(("gre1",)), "error", "not Ethernet's", id="no-frames"),
        pytest.param(
            Packets(("eth0",), snat_ports=(50000, 60000)), "warning", "ip_local_port_range",
            id="ports-of-connections",
        ),
        pytest.param(
            Packets(("eth0",), snat_ports=(32000, 32100)), "warning", "the NodePorts",
            id="ports-of-services",
        ),
    ],
)  # fmt: skip
def test_what_is_said_of_the_options(packets: Packets, severity: str, words: str) -> None:
    ((found, text),) = said(packets)
    assert (found, words in text) == (severity, True), text


def test_without_a_default_route_that_is_said() -> None:
    ((severity, text),) = said(AUTO, replace(SEEN, defaults=()))
    assert (severity, "no device has a default route" in text) == ("warning", True)


def test_another_way_to_other_nodes_is_told() -> None:
    ways = {to_address("198.51.100.7"): (4, to_address("198.51.100.7")), V4: (2, V4)}
    (found,) = unserved_ways(ways, (), SEEN, choose(AUTO, SEEN, Surrounding()))
    assert found.severity == "warning"
    assert "eth1.100" in str(found)
    assert "198.51.100.7" in str(found)


OVERLAY = Device(7, "flannel.1", kind="vxlan", driver="vxlan")


def test_the_way_to_endpoints_on_other_nodes_is_served_by_auto() -> None:
    seen = replace(SEEN, devices=(*SEEN.devices, OVERLAY), cluster=frozenset({2, 7}))
    choice = choose(AUTO, seen, Surrounding())
    assert names(choice) == {"eth0": NODE, "flannel.1": NODE}
    assert [one.xdp for one in choice.served] == [True, False]


POD_IP, OTHER_NODE, OWN = map(to_address, ("10.244.2.5", "192.0.2.2", "198.51.100.1"))  # OWN: VLAN
NETKIT = Device(8, "lxc8", kind="netkit")
IPVS = Device(9, "kube-ipvs0", ethernet=False, kind="dummy")


def facing(*more: tuple[Device, str], ways: dict[bytes, int], around: Surrounding) -> set[str]:
    """The names of `cluster_side`, with devices that have an address each beside those of SEEN."""
    seen = replace(
        SEEN,
        devices=tuple(dict.fromkeys((*SEEN.devices, *(device for device, _ in more)))),
        addresses=(*SEEN.addresses, *(Assigned(d.index, to_address(text)) for d, text in more)),
    )
    found = cluster_side(seen, around, {to: (index, to) for to, index in ways.items()})
    return {device.name for device in seen.devices if device.index in found}


@pytest.mark.parametrize(
    ("ways", "around", "expected"),
    [
        pytest.param({}, Surrounding((OWN,)), {"eth1.100"}, id="the-node-s-own-address"),
        pytest.param({}, Surrounding((OWN, V6)), {"eth1.100", "eth0"}, id="one-of-each-family"),
        pytest.param({}, Surrounding((OTHER_NODE,)), set(), id="an-address-that-is-nowhere"),
        pytest.param(
            {OTHER_NODE: 3}, Surrounding(other_nodes=frozenset({OTHER_NODE})), {"eth1"},
            id="other-nodes",
        ),
        pytest.param(
            {POD_IP: 3}, Surrounding(endpoints=frozenset({POD_IP})), {"eth1"}, id="endpoints-there"
        ),
        pytest.param(
            {POD_IP: 5}, Surrounding(endpoints=frozenset({POD_IP})), {"veth5"},
            id="endpoints-by-the-veth-of-a-node-that-is-a-container",
        ),
        pytest.param(
            {OTHER_NODE: 5}, Surrounding(other_nodes=frozenset({OTHER_NODE})), set(),
            id="a-pod-that-calls-itself-a-node",
        ),
        pytest.param({OTHER_NODE: 1, POD_IP: 6}, Surrounding((), frozenset({OTHER_NODE}),
                     frozenset({POD_IP})), set(), id="neither-loopback-nor-what-has-no-frames"),
        pytest.param({OTHER_NODE: 3}, Surrounding((), frozenset({OTHER_NODE}),
                     pods=frozenset({3})), set(), id="nor-what-leads-to-a-pod-without-hooks"),
    ],
)  # fmt: skip
def test_the_devices_that_face_the_cluster(
    ways: dict[bytes, int], around: Surrounding, expected: set[str]
) -> None:
    assert facing(ways=ways, around=around) == expected


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        pytest.param([(POD_END, "203.0.113.1")], {"veth5"}, id="a-node-that-is-a-container"),
        pytest.param(
            [(ETH1, "203.0.113.1"), (POD_END, "203.0.113.1"), (NETKIT, "203.0.113.1")], {"eth1"},
            id="an-unnumbered-link-to-a-pod-has-it-too",
        ),
        pytest.param(
            [(POD_END, "203.0.113.1"), (NETKIT, "203.0.113.1")], set(),
            id="of-two-pairs-it-is-not-known-which-is-the-node-s",
        ),
        pytest.param(
            [(LO, "203.0.113.1"), (POD_END, "203.0.113.1")], set(), id="or-it-is-on-loopback"
        ),
        pytest.param([(TUNNEL, "203.0.113.1")], set(), id="on-what-has-no-frames"),
        pytest.param([(IPVS, "10.96.0.10")], set(), id="a-service-s-address-is-not-the-node-s"),
    ],
)  # fmt: skip
def test_whose_address_is_the_node_s_own(
    more: list[tuple[Device, str]], expected: set[str]
) -> None:
    own = Surrounding((to_address("203.0.113.1"),))
    assert facing(*more, ways={}, around=own) == expected


def test_what_faces_the_cluster_is_served_beside_the_default_route_s() -> None:
    seen = replace(SEEN, cluster=frozenset({4}))
    assert names(choose(AUTO, seen, Surrounding())) == {"eth0": NODE, "eth1": 0, "eth1.100": NODE}
    without = replace(seen, defaults=())
    assert names(choose(AUTO, without, Surrounding())) == {"eth1": 0, "eth1.100": NODE}
    assert said(AUTO, without) == []


@pytest.mark.parametrize(
    ("device", "mend"),
    [
        pytest.param(OVERLAY, "--devices, too: '…,flannel.1'", id="name-it"),
        pytest.param(replace(TUNNEL, index=7), "it can't be", id="there-is-no-way"),
    ],
)
def test_a_way_to_endpoints_that_is_not_served_is_an_error(device: Device, mend: str) -> None:
    pod, node = to_address("10.244.2.5"), to_address("192.0.2.2")
    seen = replace(SEEN, devices=(ETH0, device))
    ways = {pod: (7, to_address("10.244.2.0")), node: (2, node)}
    choice = choose(Packets(("eth0",)), seen, Surrounding())
    (found,) = unserved_ways(ways, {pod}, seen, choice)
    assert found.severity == "error"
    assert (device.name in str(found), mend in str(found)) == (True, True), str(found)


def test_what_has_no_frames_at_all_is_served_by_tc_as_it_is() -> None:
    tunnel = Device(8, "tunl0", ethernet=False, raw=True)
    seen = replace(SEEN, devices=(*SEEN.devices, tunnel), cluster=frozenset({8}))
    for packets in (AUTO, Packets(("eth0", "tunl0"), xdp_mode="native")):
        choice = choose(packets, seen, Surrounding())
        assert names(choice) == {"eth0": NODE, "tunl0": NODE | RAW}
        assert [one.xdp for one in choice.served] == [True, False]
        assert aimed(choice.served[1], {2}) == choice.served[1]


def test_a_default_route_by_a_tunnel_is_passed_over_by_auto() -> None:
    seen = replace(SEEN, defaults=(*SEEN.defaults, Route(TUNNEL.index)))
    choice = choose(AUTO, seen, Surrounding())
    assert (names(choice), choice.unserved) == ({"eth0": NODE}, {})
    ((severity, text),) = said(AUTO, seen)
    assert (severity, "device gre1" in text) == ("warning", True)


# -- where XDP runs, and where it may send -------------------------------------------------------


@pytest.mark.parametrize("driver", ["veth", "tun", "vif", "bonding", "vxlan"])
def test_auto_serves_by_tc_alone_what_xdp_would_damage(driver: str) -> None:
    seen = replace(SEEN, devices=(replace(ETH0, driver=driver),))
    (served,) = choose(AUTO, seen, Surrounding()).served
    assert (served.xdp, served.tc) == (False, True)
    assert said(AUTO, seen, Outcome(served, "none", "tcx")) == []
    for mode in ("native", "generic"):
        (served,) = choose(Packets(("auto",), xdp_mode=mode), seen, Surrounding()).served
        assert served.xdp


UNTAGS = replace(SEEN, devices=(ETH0, replace(ETH1, untags=True), VLAN))


@pytest.mark.parametrize(
    ("devices", "mode", "xdp", "words"),
    [
        pytest.param("eth1.100", "auto", [False], "served at TC instead", id="its-vlan"),
        pytest.param("eth1*", "auto", [False, False], "served at TC instead", id="both"),
        pytest.param("eth1", "auto", [False], "served at TC instead", id="itself"),
        pytest.param("eth1", "native", [True], "as if it were for the device", id="asked-for"),
        pytest.param("eth1.100", "none", [False], "", id="no-xdp"),
        pytest.param("eth0", "auto", [True], "", id="another"),
    ],
)
def test_tags_that_are_taken_off_before_xdp(
    devices: str, mode: str, xdp: list[bool], words: str
) -> None:
    """XDP would take what is for a VLAN for the device's own; TC is told of the tag."""
    packets = Packets((devices,), xdp_mode=mode)
    assert [one.xdp for one in choose(packets, UNTAGS, Surrounding()).served] == xdp
    found = said(packets, UNTAGS)
    assert bool(found) == bool(words)
    for severity, text in found:
        assert (severity, words in text) == ("warning", True), text
        assert "ethtool -K eth1 rxvlan off" in text


def test_without_vlans_it_does_not_matter_who_takes_tags_off() -> None:
    seen = replace(UNTAGS, devices=UNTAGS.devices[:2])
    (served,) = choose(Packets(("eth1",)), seen, Surrounding()).served
    assert served.xdp


_BASIC, _REDIRECT, _TAKES = 1, 2, 4


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        pytest.param({2: 7, 3: 7}, {2, 3}, id="both"),
        pytest.param({2: 7, 3: _BASIC | _REDIRECT}, {2}, id="one-takes-none"),
        pytest.param({2: 7, 3: _BASIC | _TAKES}, set(), id="one-can-not-give-any"),
        pytest.param({}, set(), id="the-kernel-does-not-tell"),
    ],
)
def test_devices_that_xdp_may_send_to(features: dict[int, int], expected: set[int]) -> None:
    assert targets({2, 3}, features) == expected


def test_a_vlan_is_sent_to_by_the_device_below_a_pod_never() -> None:
    vlan, pod = Served(VLAN, NODE, lower=3, vlan=100), Served(POD_END, POD)
    assert aimed(vlan, {3}).flags == NODE | XDP
    assert aimed(vlan, {4}).flags == NODE
    assert aimed(pod, {5}).flags == POD


# -- addresses of pods' devices ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        pytest.param((V4_LATER,), V4_LATER, id="the-node-s-own"),
        pytest.param((to_address("203.0.113.1"),), V4, id="one-that-is-on-some-device"),
        pytest.param((), V4, id="without-a-node-object"),
    ],
)
def test_a_pod_s_device_without_an_address_uses_the_node_s(
    own: tuple[bytes, ...], expected: bytes
) -> None:
    """Else a pod could not reach itself by its Service, and nobody would tell it of a refusal."""
    around = Surrounding(own, pods=frozenset({5}))
    pod = choose(Packets(("eth1",)), SEEN, around).served[-1]
    assert (pod.device, pod.ipv4, pod.ipv6) == (POD_END, expected, V6)
    node = choose(Packets(("eth1",)), SEEN, around).served[0]
    assert node.addresses == ()


def test_a_row_for_each_device_also_for_one_that_is_not_there() -> None:
    choice = choose(Packets(("eth0", "eth7")), SEEN, Surrounding())
    found = rows(choice, [Outcome(one, "native", "tcx") for one in choice.served])
    assert [(row["name"], row["served"]) for row in found] == [("eth0", True), ("eth7", False)]
    assert found[0]["addresses"] == ["192.0.2.1", "2001:db8::1"]
