"""What an event touches, and what is known after it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pointsman.choice import ALGORITHM, MAX_CONNECTIONS, WEIGHT, Kept
from pointsman.clusterip import ClusterIPs
from pointsman.events import Changed, Listed
from pointsman.objects import (
    ClusterMeta,
    Container,
    ContainerPort,
    EndpointSlice,
    Namespace,
    Node,
    NodeAddress,
    NodeStatus,
    Object,
    ObjectMeta,
    Pod,
    PodCondition,
    PodSpec,
    PodStatus,
    Ref,
    Service,
    ServicePort,
    ServiceSpec,
)
from pointsman.optout import ANNOTATION
from pointsman.tracker import Tracker

ZONE = "topology.kubernetes.io/zone"
OUT = {ANNOTATION: "disabled"}


def a_node(zone: str = "", address: str = "198.51.100.1", name: str = "a") -> Node:
    return Node(
        metadata=ClusterMeta(name=name, labels={ZONE: zone} if zone else {}),
        status=NodeStatus(addresses=(NodeAddress(type="InternalIP", address=address),)),
    )


def a_namespace(annotations: dict[str, str] | None = None) -> Namespace:
    return Namespace(metadata=ClusterMeta(name="default", annotations=annotations or {}))


def a_pod(
    name: str = "web-0",
    ip: str = "10.244.0.1",
    host_port: int = 0,
    annotations: dict[str, str] | None = None,
    labels: dict[str, str] | None = None,
) -> Pod:
    port = ContainerPort(container_port=80, host_port=host_port)
    return Pod(
        metadata=ObjectMeta(name=name, annotations=annotations or {}, labels=labels or {}),
        spec=PodSpec(node_name="a", containers=(Container(ports=(port,)),)),
        status=PodStatus(pod_ip=ip, conditions=(PodCondition(type="Ready", status="True"),)),
    )


SERVICE = Service(
    metadata=ObjectMeta(name="web"),
    spec=ServiceSpec(
        cluster_ip="10.96.0.1",
        selector={"app": "web"},
        ports=(ServicePort(port=80),),
        traffic_distribution="PreferSameZone",
    ),
)
WEB = a_pod(labels={"app": "web"})
POD_REF, NODE_REF = a_pod().ref, a_node().ref


def after(*objects: Object) -> Tracker:
    tracker = Tracker(ClusterIPs(("10.96.0.0/12",), {}))
    tracker.fold(Listed(objects))
    return tracker


@pytest.mark.parametrize(
    ("before", "event", "touched"),
    [
        pytest.param((), Changed((a_pod(),)), set(), id="a-plain-pod-touches-nothing"),
        pytest.param((), Changed((a_pod(host_port=8080),)), {POD_REF}, id="a-host-port-comes"),
        pytest.param(
            (a_pod(host_port=8080),), Changed((a_pod(),)), {POD_REF}, id="a-host-port-goes"
        ),
        pytest.param(
            (a_pod(host_port=8080),),
            Changed((a_pod(host_port=8080),)),
            set(),
            id="the-same-again-touches-nothing",
        ),
        pytest.param(
            (a_pod(host_port=8080),), Changed(deleted=(POD_REF,)), {POD_REF}, id="its-pod-goes"
        ),
        pytest.param((), Changed((a_pod(annotations=OUT),)), {POD_REF}, id="a-pod-opts-out"),
        pytest.param(
            (a_pod(annotations=OUT),), Changed((a_pod(),)), {POD_REF}, id="and-comes-back"
        ),
        pytest.param(
            (a_namespace(OUT),), Changed((a_pod(),)), {POD_REF}, id="a-pod-of-a-namespace-that-did"
        ),
        pytest.param(
            (a_namespace(),), Changed((a_pod(),)), set(), id="a-pod-of-one-that-did-not"
        ),
        pytest.param(
            (a_pod(),), Changed((a_namespace(OUT),)), {a_namespace().ref}, id="a-namespace"
        ),
        pytest.param(
            (a_namespace(),), Changed(deleted=(a_namespace().ref,)), {a_namespace().ref},
            id="a-namespace-goes",
        ),
        pytest.param((), Changed((a_node(),)), {NODE_REF}, id="a-node"),
        pytest.param((a_node(),), Changed((a_node(),)), set(), id="the-same-node"),
        pytest.param((a_node(),), Changed(deleted=(NODE_REF,)), {NODE_REF}, id="a-node-goes"),
        pytest.param((), Changed(deleted=(NODE_REF,)), set(), id="a-node-that-never-was"),
        pytest.param(
            (SERVICE, WEB), Changed((a_node("east"),)), {NODE_REF, SERVICE.ref}, id="its-zone-comes"
        ),
        pytest.param(
            (SERVICE, WEB, a_node("east")),
            Changed((a_node("west"),)),
            {NODE_REF, SERVICE.ref},
            id="its-zone-changes",
        ),
        pytest.param(
            (SERVICE, WEB, a_node("east")),
            Changed(deleted=(NODE_REF,)),
            {NODE_REF, SERVICE.ref},
            id="its-zone-goes",
        ),
        pytest.param(
            (SERVICE, WEB, a_node("east")),
            Changed((a_node("east", "198.51.100.9"),)),
            {NODE_REF},
            id="another-address-changes-no-endpoint",
        ),
        pytest.param(
            (SERVICE, WEB),
            Changed((a_node("east", name="b"),)),
            {a_node(name="b").ref},
            id="a-zone-without-pods-changes-no-endpoint",
        ),
    ],
)  # fmt: skip
def test_what_is_touched(before: tuple[Object, ...], event: Changed, touched: set[Ref]) -> None:
    assert after(*before).fold(event) == touched


def test_a_listing_takes_away_what_it_does_not_have() -> None:
    tracker = after(a_node("east"), a_namespace(OUT), a_pod(host_port=8080), SERVICE)
    gone = {NODE_REF, a_namespace().ref, POD_REF, SERVICE.ref}
    assert tracker.fold(Listed(())) == gone
    assert not (tracker.nodes or tracker.namespaces or tracker.pods or tracker.services)


@pytest.mark.parametrize("node_first", [True, False])
def test_zones_reach_the_hints_in_whatever_order_they_come(node_first: bool) -> None:
    tracker = Tracker(ClusterIPs(("10.96.0.0/12",), {}))
    objects: list[Object] = [SERVICE, WEB]
    for event in ([a_node("east")], objects) if node_first else (objects, [a_node("east")]):
        tracker.fold(Changed(tuple(event)))
    (piece,) = tracker.slices(SERVICE.ref)
    (endpoint,) = piece.endpoints or ()
    assert endpoint.zone == "east"
    assert endpoint.hints is not None
    assert [zone.name for zone in endpoint.hints.for_zones or ()] == ["east"]


def annotated(obj: Any, uid: str = "", **annotations: str) -> Any:
    names = {"algorithm": ALGORITHM, "most": MAX_CONNECTIONS, "weight": WEIGHT}
    found = {names[name]: text for name, text in annotations.items()}
    return msgspec.structs.replace(
        obj, metadata=msgspec.structs.replace(obj.metadata, uid=uid, annotations=found)
    )


PIECE = EndpointSlice(
    metadata=ObjectMeta(name="web-1", labels={"kubernetes.io/service-name": "web"}),
    address_type="IPv4",
)


def fields(tracker: Tracker) -> list[tuple[str, str]]:
    return [(problem.object, problem.field) for problem in tracker.problems]


def test_the_last_good_annotation_of_a_service_counts() -> None:
    tracker = after(annotated(SERVICE, algorithm="maglev", most="5"))
    bad = annotated(SERVICE, algorithm="fastest")
    for _ in range(2):
        tracker.fold(Changed((bad,)))
        assert tracker.services[SERVICE.ref].metadata.annotations == {ALGORITHM: "maglev"}
        assert fields(tracker) == [("Service default/web", f"metadata.annotations[{ALGORITHM}]")]
        assert tracker.kept == {SERVICE.ref: Kept("", {ALGORITHM: "maglev"})}
        bad = annotated(SERVICE, algorithm="slowest")
    assert tracker.fold(Changed((annotated(SERVICE, algorithm="random"),))) == {SERVICE.ref}
    assert tracker.services[SERVICE.ref].metadata.annotations == {ALGORITHM: "random"}
    assert not tracker.problems and not tracker.kept


def test_what_was_good_is_known_after_a_restart() -> None:
    bad = annotated(SERVICE, algorithm="fastest")
    kept = {
        SERVICE.ref: Kept("", {ALGORITHM: "maglev"}), PIECE.ref: Kept("", {WEIGHT: "3"})
    }  # fmt: skip
    tracker = Tracker(ClusterIPs(("10.96.0.0/12",), {}), kept)
    tracker.fold(Listed((bad, annotated(PIECE, weight="x"))))
    assert tracker.services[SERVICE.ref].metadata.annotations == {ALGORITHM: "maglev"}
    assert tracker.slices(SERVICE.ref)[0].metadata.annotations == {WEIGHT: "3"}
    assert tracker.kept == kept
    # But a Service that is made anew does not inherit.
    tracker.fold(Changed(deleted=(SERVICE.ref, PIECE.ref)))
    assert not tracker.problems and not tracker.kept
    tracker.fold(Changed((bad,)))
    assert tracker.services[SERVICE.ref].metadata.annotations == {}


@pytest.mark.parametrize(
    ("before", "after", "stays"),
    [("1", "1", True), ("1", "2", False), ("", "2", True), ("1", "", True)],
)
@pytest.mark.parametrize("restart", [False, True])
def test_what_is_made_again_inherits_nothing(
    restart: bool, before: str, after: str, stays: bool
) -> None:
    """A listing may show the new one where the old one was: only the uid tells."""

    def listed(uid: str, algorithm: str, weight: str) -> Listed:
        service = annotated(SERVICE, uid, algorithm=algorithm)
        return Listed((service, annotated(PIECE, uid, weight=weight)))

    tracker = Tracker(ClusterIPs(("10.96.0.0/12",), {}))
    tracker.fold(listed(before, "maglev", "3"))
    tracker.fold(listed(before, "magleev", "x"))
    kept = {
        SERVICE.ref: Kept(before, {ALGORITHM: "maglev"}), PIECE.ref: Kept(before, {WEIGHT: "3"})
    }  # fmt: skip
    assert tracker.kept == kept
    if restart:
        tracker = Tracker(ClusterIPs(("10.96.0.0/12",), {}), tracker.kept)
    tracker.fold(listed(after, "magleev", "x"))
    assert (tracker.services[SERVICE.ref].metadata.annotations == {ALGORITHM: "maglev"}) is stays
    assert (tracker.slices(SERVICE.ref)[0].metadata.annotations == {WEIGHT: "3"}) is stays
    found = {ref: Kept(after, texts) for ref, (_, texts) in kept.items()}
    assert tracker.kept == (found if stays else {})


@pytest.mark.parametrize("obj", [WEB, PIECE], ids=["a-pod", "a-slice"])
def test_the_last_good_weight_counts(obj: Pod | EndpointSlice) -> None:
    tracker = after(SERVICE, annotated(obj, weight="7"))
    assert tracker.slices(SERVICE.ref)[-1].metadata.annotations == {WEIGHT: "7"}
    bad = annotated(obj, weight="heavy")
    for _ in range(2):
        assert tracker.fold(Changed((bad,))) == set(), "nothing differs"
        assert fields(tracker) == [(str(obj.ref), f"metadata.annotations[{WEIGHT}]")]
    assert tracker.fold(Changed((annotated(obj, weight="8"),))) == {SERVICE.ref}
    assert tracker.slices(SERVICE.ref)[-1].metadata.annotations == {WEIGHT: "8"}
    assert not tracker.problems
    tracker.fold(Changed((bad,)))
    tracker.fold(Listed((SERVICE,)))
    assert not tracker.problems and not tracker.kept


def test_a_pod_of_the_usual_weight_again_has_no_slice_of_its_own() -> None:
    tracker = after(SERVICE, annotated(WEB, weight="7"))
    assert tracker.fold(Changed((WEB,))) == {SERVICE.ref}
    (piece,) = tracker.slices(SERVICE.ref)
    assert piece.metadata.annotations == {}


def test_counts_name_nodes_and_namespaces_only_where_there_are_any() -> None:
    plain = {"Service": 0, "EndpointSlice": 0, "Pod": 0}
    assert Tracker().counts() == plain
    assert after(a_node(), a_namespace()).counts() == {**plain, "Node": 1, "Namespace": 1}
