"""The entries of all objects together, and what a change of this node makes stale."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pointsman.context import Context, Policy
from pointsman.events import Listed
from pointsman.objects import (
    Container,
    ContainerPort,
    ObjectMeta,
    Pod,
    PodSpec,
    PodStatus,
    Ref,
    Service,
    ServicePort,
    ServiceSpec,
)
from pointsman.tracker import Tracker
from pointsman.values import to_address
from pointsman.wanted import affected, all_refs, node_ref, resolve_ref

ADDRESS = to_address("198.51.100.1")
BEFORE = Context(node_name="a", zone="east")
PLAIN, EXTERNAL, POD = (
    Ref("Service", "default", "plain"),
    Ref("Service", "default", "external"),
    Ref("Pod", "default", "web"),
)
NODE = node_ref(BEFORE)


def a_service(ref: Ref, cluster_ip: str, *external_ips: str) -> Service:
    return Service(
        metadata=ObjectMeta(name=ref.name),
        spec=ServiceSpec(
            cluster_ip=cluster_ip, external_ips=external_ips, ports=(ServicePort(port=80),)
        ),
    )


@pytest.fixture
def tracker() -> Tracker:
    port = ContainerPort(container_port=80, host_port=8080)
    tracker = Tracker()
    tracker.fold(
        Listed(
            (
                a_service(PLAIN, "10.96.0.1"),
                a_service(EXTERNAL, "10.96.0.2", "198.51.100.1"),
                Pod(
                    metadata=ObjectMeta(name="web"),
                    spec=PodSpec(containers=(Container(ports=(port,)),)),
                    status=PodStatus(pod_ip="10.244.0.1"),
                ),
                Pod(metadata=ObjectMeta(name="plain"), status=PodStatus(pod_ip="10.244.0.2")),
            )
        )
    )
    return tracker


def test_every_kind_has_its_entries(tracker: Tracker) -> None:
    assert set(all_refs(tracker, BEFORE)) == {PLAIN, EXTERNAL, POD, NODE}
    assert all(resolve_ref(ref, tracker, BEFORE)[0] for ref in all_refs(tracker, BEFORE))


@pytest.mark.parametrize(
    "ref",
    [
        Ref("Service", "default", "gone"),
        Ref("Pod", "default", "gone"),
        Ref("Node", "", "b"),
        Ref("Namespace", "", "default"),
    ],
    ids=str,
)
def test_what_is_gone_or_has_none_has_no_entries(tracker: Tracker, ref: Ref) -> None:
    assert resolve_ref(ref, tracker, BEFORE) == ((), ())


@pytest.mark.parametrize(
    ("after", "refs"),
    [
        pytest.param(BEFORE, set(), id="nothing"),
        pytest.param(
            replace(BEFORE, remote_addresses=frozenset([ADDRESS])), {NODE}, id="another-node"
        ),
        pytest.param(replace(BEFORE, zone="west"), {NODE, PLAIN, EXTERNAL}, id="the-zone"),
        pytest.param(
            replace(BEFORE, local_addresses=frozenset([ADDRESS])),
            {NODE, EXTERNAL, POD},
            id="an-address",
        ),
        pytest.param(
            replace(BEFORE, own_addresses=(ADDRESS,)), {NODE, EXTERNAL, POD}, id="an-own-address"
        ),
        pytest.param(
            replace(BEFORE, policy=Policy(bind_guard=False)),
            {NODE, PLAIN, EXTERNAL, POD},
            id="the-policy",
        ),
        pytest.param(
            replace(BEFORE, node_name="b"),
            {NODE, Ref("Node", "", "b"), PLAIN, EXTERNAL, POD},
            id="the-name",
        ),
    ],
)
def test_what_a_change_of_the_node_affects(
    tracker: Tracker, after: Context, refs: set[Ref]
) -> None:
    assert affected(tracker, BEFORE, after) == refs
