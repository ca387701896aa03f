"""Pointsman and kube-proxy (nftables) see the same objects: every difference is a choice.

A seeded world of Services and EndpointSlices goes through random changes. After each, on two nodes,
both proxies are asked for every address and port that either knows, as a client on the host's
network and as a pod; what they have in force is read from the kernel. See tests/cluster/compare/.

    POINTSMAN_COMPARE=seed=7,services=200,steps=50 pytest tests/cluster/test_compare.py
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.cluster.api import Object
from tests.cluster.cluster import ZONES, Cluster
from tests.cluster.compare.answers import HOST, Answer, Target
from tests.cluster.compare.apply import Applied
from tests.cluster.compare.choices import CHOICES, render
from tests.cluster.compare.compare import Compared, Sides, compare
from tests.cluster.compare.facts import Facts
from tests.cluster.compare.world import APP, World
from tests.cluster.space import Space
from tests.support.kernel import until

ASKED = {"seed": 1, "services": 40, "steps": 5}
ASKED |= {
    key: int(value)
    for key, _, value in (
        each.partition("=") for each in os.environ.get("POINTSMAN_COMPARE", "").split(",") if each
    )
}
REFUSE_UNUSED = "--refuse-unused-cluster-ips"
#: Our options and kube-proxy's settings: NodePorts at the primary addresses on one node, which is
#: kube-proxy's default, and at all on the other, which is ours.
NODES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "node-a": (("--nodeport-addresses", "primary"), {}),
    "node-b": ((REFUSE_UNUSED,), {"nodePortAddresses": ["0.0.0.0/0", "::/0"]}),
}
_CORNERS = Path(__file__).parent / "compare" / "corners.yaml"
_ON_DEVICE = "10.96.0.77"  # as in corners.yaml
_OUTSIDE = {"loadBalancer": {"ingress": [{"ip": "198.51.100.200"}]}}
_DOCUMENT = Path(__file__).parents[2] / "docs" / "kube-proxy-differences.md"


def start(cluster: Cluster, node: str) -> None:
    """Both. Their servers are one too many for a node, so ours has none."""
    ours, theirs = NODES[node]
    cluster.proxy(node).start(**theirs)
    silent = ("--healthz-bind-address", "off", "--metrics-bind-address", "off")
    cluster.agent(node).start(*ours, *silent)


@pytest.fixture
def proxies(cluster: Cluster, space: Space) -> Iterator[Cluster]:
    """An agent and a kube-proxy on each of two nodes, beside each other: nobody connects."""
    for node in NODES:
        start(cluster, node)
    place = cluster.nodes["node-b"].place
    command = ["ip", "addr", "{}", f"{_ON_DEVICE}/32", "dev", "lo"]
    assert cluster.lab.run([w.format("add") for w in command], place).returncode == 0
    yield cluster
    cluster.lab.run([w.format("delete") for w in command], place)
    for node, zone in ZONES.items():
        cluster.nodes[node].label(topology_kubernetes_io__zone=zone)


@pytest.mark.cluster
@pytest.mark.timeout(300 + 2 * ASKED["services"] * ASKED["steps"])
def test_every_difference_is_a_choice(proxies: Cluster, space: Space) -> None:
    pods = space.deploy(APP, 3, ports=[{"name": "http", "protocol": "TCP", "containerPort": 8080}])
    space.apply(_CORNERS.read_text())
    space.api.patch_status("Service", "outside", _OUTSIDE, namespace=space.namespace)
    random = Random(ASKED["seed"])
    world, applied = World(ASKED["seed"], ASKED["services"]), Applied(proxies, space)
    asked: Counter[str] = Counter()
    meant: Counter[str] = Counter()
    started = time.monotonic()
    for step in range(ASKED["steps"] + 1):
        if step:
            world.step()
            random.choice(pods).set_ready(random.random() < 0.6)
        applied.bring(world)
        mark = _marked(space, step)
        if step == ASKED["steps"]:
            for node in NODES:  # what is pinned is taken over, and put right
                proxies.proxy(node).stop()
                proxies.agent(node).kill()
                start(proxies, node)
        for node in NODES:
            compared = _settled(proxies, node, mark)
            if compared.unmeant:
                pytest.fail(f"step {step}, {ASKED}: {compared.text()}")
            asked += compared.asked
            meant += compared.meant
    print(
        f"{ASKED['services']} Services, {ASKED['steps']} steps (seed {ASKED['seed']}, "
        f"{applied.made_anew} made anew), {len(NODES)} nodes, {time.monotonic() - started:.0f} s: "
        f"{asked.total()} answers compared, {dict(asked)}; meant to differ: {dict(meant)}"
    )
    assert {"endpoints", "reject", "unreachable", "alone"} <= asked.keys()
    never = {choice.name for choice in CHOICES if not choice.by_chance} - meant.keys()
    assert not never, "no difference is any of these any more: are they choices still?"


@pytest.mark.cluster
def test_a_slice_that_changes_hands_leaves_its_service(cluster: Cluster, space: Space) -> None:
    """With kube-proxy both have it until it restarts: it is told the slice as it is now, and looks
    for what it knew of it under the new Service only (pkg/proxy/endpointslicecache.go)."""
    start(cluster, "node-a")
    one, _ = (space.service(name, selector=None) for name in ("one", "other"))
    left = Target(one.ip, 80, "tcp")
    space.apply(_slice("moves", "one", "tcp", 8080, "10.245.0.1"))
    _settled(cluster, "node-a", _marked(space, 0))
    space.apply(_slice("moves", "other", "tcp", 8080, "10.245.0.1"))
    compared = _settled(cluster, "node-a", _marked(space, 1), frozenset({left}))
    assert {case.target for case in compared.unmeant} == {left}
    has_it, has_none = frozenset({"10.245.0.1:8080"}), Answer("reject")
    assert {(case.ours, case.theirs.endpoints) for case in compared.unmeant} == {(has_none, has_it)}
    cluster.proxy("node-a").stop()
    cluster.proxy("node-a").start()
    assert not _settled(cluster, "node-a", _marked(space, 2)).unmeant


def _slice(name: str, service: str, port_name: str, port: int, address: str) -> Object:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": port_name, "port": port}],
        "endpoints": [{"addresses": [address]}],
    }


def _marked(space: Space, step: int) -> Target:
    """A Service and its slice, changed after all else: who has this address has the rest."""
    port = 20000 + step
    ports = [{"port": port, "protocol": "TCP"}]
    made = space.service("mark", ports=ports, selector=None, ipFamilyPolicy="SingleStack")
    space.apply(_slice("mark", "mark", "", port, "10.245.9.9"))
    return Target(made.ip, port, "tcp")


def _settled(
    cluster: Cluster, node: str, mark: Target, left: frozenset[Target] = frozenset()
) -> Compared:
    """Compares once both have the mark, and again while what comes by other watches (Nodes, slices
    of the real controller, the end of the last test) may be under way: until there are differences
    at the addresses `left` only."""
    found: list[Compared] = []
    wanted = frozenset({f"10.245.9.9:{mark.port}"})
    said: dict[str, Answer] = {}
    refuses_unused = REFUSE_UNUSED in NODES[node][0]

    def agreed() -> bool:
        with Sides(cluster, node, refuses_unused=refuses_unused) as sides:
            said["pointsman"], said["kube-proxy"] = sides.ours(HOST, mark), sides.theirs(HOST, mark)
            if any(answer.endpoints != wanted for answer in said.values()):
                return False
            found.append(compare(sides, Facts(cluster.api)))
            return {case.target for case in found[-1].unmeant} == left

    with contextlib.suppress(AssertionError):
        until(agreed, f"the two proxies of {node} to agree", 90)
    assert found, f"{node}: what came last, at {mark}, is not in force: {said}"
    return found[-1]


# -- what the document says ----------------------------------------------------------------------


def test_the_document_lists_the_choices() -> None:
    """UPDATE_DOCS=1 writes the list anew."""
    head, start, rest = _DOCUMENT.read_text().partition("<!-- choices -->\n")
    _, end, tail = rest.partition("<!-- end -->\n")
    wanted = head + start + render() + end + tail
    if os.environ.get("UPDATE_DOCS"):
        _DOCUMENT.write_text(wanted)
    assert _DOCUMENT.read_text() == wanted


def test_the_sections_are_those_of_services() -> None:
    headings = {
        line.removeprefix("## ")
        for line in _DOCUMENT.with_name("services.md").read_text().splitlines()
        if line.startswith("## ")
    }
    assert {choice.section for choice in CHOICES} <= headings
