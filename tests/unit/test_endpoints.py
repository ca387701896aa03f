"""A selector and pods, to slices: as kube-controller-manager would."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pointsman.choice import WEIGHT
from pointsman.endpoints import endpoint_slices, hints_automatic, selects
from pointsman.objects import EndpointHints, ForName, Pod, Service

TERMINATING = {"deletionTimestamp": "2026-01-01T00:00:00Z"}


def service(annotations: dict[str, str] | None = None, **spec: Any) -> Service:
    spec = {"selector": {"app": "web"}, "ports": [{"port": 80}], "clusterIP": "10.0.0.9"} | spec
    metadata = {"name": "web", "annotations": annotations or {}}
    return msgspec.convert({"metadata": metadata, "spec": spec}, Service)


def pod(
    name: str = "a",
    ip: str = "10.1.0.1",
    ready: str = "True",
    spec: dict[str, Any] | None = None,
    meta: dict[str, Any] | None = None,
    **status: Any,
) -> Pod:
    document = {
        "metadata": {"name": name, "labels": {"app": "web", "x": "y"}} | (meta or {}),
        "spec": spec or {},
        "status": {"podIP": ip, "conditions": [{"type": "Ready", "status": ready}]} | status,
    }
    return msgspec.convert(document, Pod)


def named(number: int, protocol: str = "TCP") -> dict[str, Any]:
    return {"ports": [{"name": "http", "containerPort": number, "protocol": protocol}]}


@pytest.mark.parametrize(
    ("spec", "meta", "expected"),
    [
        pytest.param({}, {}, True, id="every-label-of-the-selector"),
        pytest.param({"selector": {"app": "web", "v": "1"}}, {}, False, id="one-label-missing"),
        pytest.param({"selector": {}}, {}, False, id="an-empty-selector-selects-nothing"),
        pytest.param({"selector": None}, {}, False, id="no-selector-selects-nothing"),
        pytest.param({"type": "ExternalName"}, {}, False, id="external-name-selects-nothing"),
        pytest.param({}, {"namespace": "other"}, False, id="another-namespace"),
    ],
)
def test_selects(spec: dict[str, Any], meta: dict[str, Any], expected: bool) -> None:
    assert selects(service(**spec), pod(meta=meta)) is expected
    assert bool(endpoint_slices(service(**spec), [pod(meta=meta)])) is expected


@pytest.mark.parametrize(
    ("one", "publish", "conditions"),
    [
        pytest.param(pod(), False, (True, True, False), id="ready"),
        pytest.param(pod(ready="False"), False, (False, False, False), id="not-ready"),
        pytest.param(pod(conditions=[]), False, (False, False, False), id="no-ready-condition"),
        pytest.param(pod(meta=TERMINATING), False, (False, True, True), id="serving-terminating"),
        pytest.param(pod(ready="False"), True, (True, False, False), id="published-not-ready"),
        pytest.param(pod(meta=TERMINATING), True, (True, True, True), id="published-terminating"),
    ],
)
def test_conditions(one: Pod, publish: bool, conditions: tuple[bool, bool, bool]) -> None:
    (slice_,) = endpoint_slices(service(publishNotReadyAddresses=publish), [one])
    (endpoint,) = slice_.endpoints or ()
    c = endpoint.conditions
    assert (c.ready, c.serving, c.terminating) == conditions


@pytest.mark.parametrize(
    "one",
    [
        pytest.param(pod(phase="Succeeded"), id="succeeded"),
        pytest.param(pod(phase="Failed"), id="failed"),
        pytest.param(pod(ip=""), id="without-address"),
        pytest.param(pod(ip="fd00::1"), id="of-another-family"),
    ],
)
def test_a_pod_is_left_out(one: Pod) -> None:
    assert endpoint_slices(service(), [one]) == ()


@pytest.mark.parametrize(
    ("port", "spec", "expected"),
    [
        pytest.param({"port": 80}, {}, [80], id="no-target-is-the-port"),
        pytest.param({"port": 80, "targetPort": 0}, {}, [80], id="target-0-is-the-port"),
        pytest.param({"port": 80, "targetPort": 8080}, {}, [8080], id="a-number"),
        pytest.param(
            {"port": 80, "targetPort": "http"}, {"containers": [{}, named(81)]}, [81], id="a-name"
        ),
        pytest.param(
            {"port": 80, "targetPort": "http"},
            {"containers": [named(81, "UDP"), named(82)]},
            [82],
            id="a-name-of-the-right-protocol",
        ),
        pytest.param({"port": 80, "targetPort": "http"}, {}, [], id="a-name-the-pod-lacks"),
        pytest.param(
            {"port": 80, "targetPort": "http"},
            {"initContainers": [named(83), named(84) | {"restartPolicy": "Always"}]},
            [84],
            id="of-a-sidecar-but-not-of-an-init-container",
        ),
    ],
)
def test_target_ports(port: dict[str, Any], spec: dict[str, Any], expected: list[int]) -> None:
    (slice_,) = endpoint_slices(service(ports=[port]), [pod(spec=spec)])
    assert [p.port for p in slice_.ports or ()] == expected


def test_pods_whose_named_port_differs_get_slices_of_their_own() -> None:
    pods = [pod(n, f"10.1.0.{i}", spec={"containers": [named(p)]}) for i, n, p in PORTS]
    slices = endpoint_slices(service(ports=[{"port": 80, "targetPort": "http"}]), pods)
    assert [(s.metadata.name, [e.addresses for e in s.endpoints or ()]) for s in slices] == [
        ("web-ipv4-0", [("10.1.0.1",), ("10.1.0.3",)]),
        ("web-ipv4-1", [("10.1.0.2",)]),
    ]


def test_pods_of_another_weight_get_slices_of_their_own() -> None:
    weights = {"a": "1", "b": None, "c": "100", "d": "1", "e": "500", "f": "what"}
    pods = [
        pod(n, f"10.1.0.{i}", meta={"annotations": {WEIGHT: text} if text else {}})
        for i, (n, text) in enumerate(weights.items(), 1)
    ]
    assert [
        (s.metadata.name, s.metadata.annotations, [e.addresses[0][-1] for e in s.endpoints or ()])
        for s in endpoint_slices(service(), pods)
    ] == [
        ("web-ipv4-0", {WEIGHT: "500"}, ["5"]),
        ("web-ipv4-1", {}, ["2", "3", "6"]),
        ("web-ipv4-2", {WEIGHT: "1"}, ["1", "4"]),
    ]


PORTS = [(2, "b", 9090), (3, "c", 8080), (1, "a", 8080)]


@pytest.mark.parametrize(
    ("spec", "families"),
    [
        pytest.param({"ipFamilies": ["IPv6", "IPv4"]}, ["IPv6", "IPv4"], id="ip-families"),
        pytest.param({"clusterIP": "fd00::9"}, ["IPv6"], id="else-cluster-ip"),
        pytest.param({"clusterIPs": ["10.0.0.9", "fd00::9"]}, ["IPv4", "IPv6"], id="cluster-ips"),
        pytest.param({"clusterIP": "None"}, ["IPv4"], id="headless-is-ipv4"),
        pytest.param(
            {"clusterIP": "None", "ipFamilyPolicy": "PreferDualStack"},
            ["IPv4", "IPv6"],
            id="headless-dual-stack",
        ),
    ],
)
def test_families(spec: dict[str, Any], families: list[str]) -> None:
    one = pod(podIPs=[{"ip": "10.1.0.1"}, {"ip": "fd00::1"}])
    slices = endpoint_slices(service(**spec), [one])
    assert [s.address_type for s in slices] == families
    address = {"IPv4": ("10.1.0.1",), "IPv6": ("fd00::1",)}
    assert [s.endpoints[0].addresses for s in slices if s.endpoints] == [
        address[family] for family in families
    ]


def test_equal_input_in_any_order_gives_equal_slices() -> None:
    pods = [pod(f"p{i}", f"10.1.0.{i}") for i in range(1, 6)]
    assert endpoint_slices(service(), pods) == endpoint_slices(service(), reversed(pods))


def test_an_endpoint_tells_its_pod_node_and_hostname() -> None:
    spec = {"nodeName": "n1", "hostname": "h", "subdomain": "web"}
    (slice_,) = endpoint_slices(service(clusterIP="None"), [pod(spec=spec)])
    (endpoint,) = slice_.endpoints or ()
    assert (endpoint.node_name, endpoint.hostname) == ("n1", "h")
    assert endpoint.target_ref is not None
    assert (endpoint.target_ref.kind, endpoint.target_ref.name) == ("Pod", "a")
    assert slice_.service == "web"
    assert slice_.metadata.labels["service.kubernetes.io/headless"] == ""


def test_a_hostname_counts_only_below_its_own_subdomain() -> None:
    (slice_,) = endpoint_slices(service(), [pod(spec={"hostname": "h", "subdomain": "other"})])
    assert [e.hostname for e in slice_.endpoints or ()] == [""]


ZONES = {"n1": "z1", "n2": ""}


def hints(zone: str = "", node: str = "") -> EndpointHints:
    return EndpointHints(
        for_zones=(ForName(zone),) if zone else (), for_nodes=(ForName(node),) if node else ()
    )


@pytest.mark.parametrize(
    ("wanted", "node", "expected"),
    [
        pytest.param("PreferSameZone", "n1", hints("z1"), id="same-zone"),
        pytest.param("PreferClose", "n1", hints("z1"), id="close-is-same-zone"),
        pytest.param("PreferSameNode", "n1", hints("z1", "n1"), id="same-node-hints-zones-too"),
        pytest.param("PreferSameNode", "n9", hints("", "n9"), id="same-node-of-a-node-unknown"),
        pytest.param("PreferSameZone", "n2", None, id="a-node-without-a-zone"),
        pytest.param("PreferSameZone", "n9", None, id="a-node-that-is-not-known"),
        pytest.param("PreferSameNode", "", None, id="a-pod-on-no-node"),
        pytest.param("", "n1", None, id="not-asked-for"),
        pytest.param("PreferFar", "n1", None, id="an-unknown-value-is-passed-over"),
    ],
)
def test_hints(wanted: str, node: str, expected: EndpointHints | None) -> None:
    one = pod(spec={"nodeName": node})
    (slice_,) = endpoint_slices(service(trafficDistribution=wanted), [one], ZONES)
    (endpoint,) = slice_.endpoints or ()
    assert endpoint.hints == expected
    assert endpoint.zone == ZONES.get(node, "")


@pytest.mark.parametrize(
    ("one", "publish", "hinted"),
    [
        pytest.param(pod(spec={"nodeName": "n1"}), False, True, id="ready"),
        pytest.param(pod(spec={"nodeName": "n1"}, ready="False"), False, False, id="not-ready"),
        pytest.param(
            pod(spec={"nodeName": "n1"}, meta=TERMINATING), False, False, id="terminating"
        ),
        pytest.param(pod(spec={"nodeName": "n1"}, ready="False"), True, True, id="published"),
    ],
)
def test_only_ready_endpoints_get_hints(one: Pod, publish: bool, hinted: bool) -> None:
    asks = service(trafficDistribution="PreferClose", publishNotReadyAddresses=publish)
    (slice_,) = endpoint_slices(asks, [one], ZONES)
    assert [e.hints is not None for e in slice_.endpoints or ()] == [hinted]


def test_an_endpoint_without_a_zone_leaves_the_others_their_hints() -> None:
    pods = [pod(n, f"10.1.0.{i}", spec={"nodeName": f"n{i}"}) for i, n in ((1, "a"), (2, "b"))]
    (slice_,) = endpoint_slices(service(trafficDistribution="PreferSameZone"), pods, ZONES)
    assert [e.hints for e in slice_.endpoints or ()] == [hints("z1"), None]


MODE = "service.kubernetes.io/topology-mode"
DEPRECATED = "service.kubernetes.io/topology-aware-hints"


@pytest.mark.parametrize(
    ("annotations", "automatic"),
    [
        pytest.param({}, False, id="no-annotation"),
        pytest.param({MODE: "Auto"}, True, id="auto"),
        pytest.param({MODE: "auto"}, True, id="auto-in-small-letters"),
        pytest.param({DEPRECATED: "Auto"}, True, id="the-deprecated-annotation"),
        pytest.param({MODE: "Disabled"}, False, id="disabled"),
        pytest.param(
            {MODE: "Auto", DEPRECATED: "Disabled"}, False, id="the-deprecated-one-comes-first"
        ),
    ],
)
def test_automatic_hints_are_not_made_and_put_traffic_distribution_out_of_force(
    annotations: dict[str, str], automatic: bool
) -> None:
    asks = service(annotations, trafficDistribution="PreferClose")
    (slice_,) = endpoint_slices(asks, [pod(spec={"nodeName": "n1"})], ZONES)
    assert hints_automatic(asks) is automatic
    assert [e.hints is None for e in slice_.endpoints or ()] == [automatic]
