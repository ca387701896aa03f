"""The pure parts of the Kubernetes source: decoding, what may enter, the way, the waiting."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pointsman.kube.admit import admit, plain
from pointsman.kube.api import ApiError
from pointsman.kube.backoff import Backoff
from pointsman.kube.decode import Decoder, Item, Page, error_of
from pointsman.kube.known import Known, Listing
from pointsman.kube.remembered import Branch, Remembered, load, save
from pointsman.kube.resources import resources
from pointsman.kube.route import Route
from pointsman.objects import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    LoadBalancerIngress,
    LoadBalancerStatus,
    ObjectMeta,
    Ref,
    Service,
    ServicePort,
    ServiceSpec,
    ServiceStatus,
)

META = {"name": "web", "namespace": "default", "resourceVersion": "7"}


def line(type_: str, obj: dict[str, Any]) -> bytes:
    return json.dumps({"type": type_, "object": obj}).encode()


def page(*items: object, **meta: object) -> bytes:
    return json.dumps({"metadata": {"resourceVersion": "9", **meta}, "items": items}).encode()


def entry(kind: str, obj: dict[str, Any]) -> Item:
    (item,) = Decoder(kind).page(page(obj)).items
    return item


# -- decoding --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, obj",
    [
        pytest.param(
            "EndpointSlice",
            {"addressType": "IPv4", "endpoints": None, "ports": None},
            id="a-slice-of-nothing",
        ),
        pytest.param(
            "Service",
            {
                "metadata": {**META, "labels": None, "annotations": None},
                "spec": {"clusterIP": "None", "ports": None, "selector": None},
                "status": {"loadBalancer": None},
            },
            id="maps-and-lists-that-are-null",
        ),
        pytest.param("Namespace", {"metadata": {**META, "creationTimestamp": None}}, id="no-time"),
        pytest.param("Node", {"spec": {"taints": None}, "status": {"addresses": None}}, id="node"),
        pytest.param("Service", {"spec": None, "status": None}, id="no-spec"),
    ],
)
def test_nulls_are_taken_for_nothing(kind: str, obj: dict[str, Any]) -> None:
    item = entry(kind, {"metadata": META, **obj})
    assert item.object is not None and item.version == "7"
    assert item.object.metadata.name == "web"


def test_one_bad_item_takes_none_of_its_page_away() -> None:
    bad = {"metadata": {**META, "name": "bad"}, "spec": {"ports": [{"port": "x"}]}}
    good = {"metadata": META, "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}]}}
    found = Decoder("Service").page(page(bad, good, **{"continue": "more"}))
    assert [(item.ref.name, item.object is None) for item in found.items] == [
        ("bad", True),
        ("web", False),
    ]
    assert (found.version, found.more, found.whole) == ("9", "more", True)
    assert found.items[0].problems[0].field == "spec.ports[0].port"


def test_an_item_without_a_name_leaves_the_page_not_whole() -> None:
    found = Decoder("Service").page(page({"metadata": {"name": 7}}))
    assert (found.items, found.whole) == ([], False)


def test_the_version_and_kubectl_s_copy_are_not_kept() -> None:
    last = {"kubectl.kubernetes.io/last-applied-configuration": "{}", "mine": "1"}
    obj = entry("Namespace", {"metadata": {**META, "annotations": last}}).object
    assert obj and obj.metadata.annotations == {"mine": "1"}
    assert obj.metadata.resource_version == ""


def test_texts_that_repeat_are_kept_once() -> None:
    endpoint = {"addresses": ["10.0.0.1"], "nodeName": "n1", "zone": "z1", "conditions": {}}
    target = {"kind": "Pod", "namespace": "default", "name": "p"}
    value = {"metadata": META, "addressType": "IPv4"}
    value["endpoints"] = [endpoint | {"targetRef": target}] * 2
    piece = entry("EndpointSlice", value).object
    assert isinstance(piece, EndpointSlice) and piece.endpoints
    one, two = piece.endpoints
    assert one == two and one.node_name is two.node_name and one.conditions is two.conditions


def test_a_deletion_needs_no_more_than_the_name() -> None:
    bad = {"metadata": META, "spec": {"ports": "none"}}
    noted = Decoder("Service").line(line("DELETED", bad))
    assert noted.item == Item(Ref("Service", "default", "web"), "", None)
    assert noted.version == "7"


NO_JSON = [b'{"metadata":{"name":"\xff"}}', b'{"metadata":{"labels":' + b"[" * 100_000]


@pytest.mark.parametrize("text", NO_JSON, ids=["no UTF-8", "too deep"])
def test_neither_bytes_nor_depth_end_a_thread(text: bytes) -> None:
    listed = b'{"metadata":{"resourceVersion":"1"},"items":[' + text + b"]}"
    for decode, data in (
        (Decoder("Service").page, listed),
        (Decoder("Service").line, b'{"type":"ADDED","object":' + text + b"}"),
    ):
        with pytest.raises(ApiError) as error:
            decode(data)
        assert (error.value.status, error.value.reason) == (0, "Garbled")
    assert error_of(503, b'{"message":"\xff"}').status == 503


@pytest.mark.parametrize("text", [b"{]", b'{"type":"ADDED"', b"\xff", b"7", b'{"type":1}'])
def test_a_line_that_is_none_is_no_answer_of_an_api_server(text: bytes) -> None:
    with pytest.raises(ApiError) as error:
        Decoder("Service").line(text)
    assert (error.value.status, error.value.reason) == (0, "Garbled")


def test_an_error_event_is_raised_with_what_it_says() -> None:
    status = {"code": 410, "reason": "Expired", "message": "too old", "details": None}
    with pytest.raises(ApiError, match="too old") as error:
        Decoder("Service").line(line("ERROR", status))
    assert error.value.expired


# -- what may enter --------------------------------------------------------------------------


def service(**spec: Any) -> Service:
    base: dict[str, Any] = {"cluster_ip": "10.0.0.1", "ports": (ServicePort(port=80),)}
    return Service(metadata=ObjectMeta(name="web"), spec=ServiceSpec(**(base | spec)))


def piece(*addresses: str, family: str = "IPv4", port: int = 80) -> EndpointSlice:
    return EndpointSlice(
        metadata=ObjectMeta(name="web-1", labels={"kubernetes.io/service-name": "web"}),
        address_type=family,
        endpoints=tuple(Endpoint(addresses=(text,)) for text in addresses),
        ports=(EndpointPort(port=port),),
    )


def test_an_address_that_can_be_no_endpoint_s_is_passed_over_by_itself() -> None:
    obj, (problem,) = admit(piece("10.0.0.1", "127.0.0.1", "10.0.0.3"))
    assert isinstance(obj, EndpointSlice) and obj.endpoints
    assert [endpoint.addresses[0] for endpoint in obj.endpoints] == ["10.0.0.1", "10.0.0.3"]
    assert (problem.severity, problem.field) == ("warning", "endpoints[1].addresses[0]")


def test_endpoints_that_are_names_reach_nobody_s_rules() -> None:
    """What resolves a Service or judges sockets would take them for addresses."""
    obj, (problem,) = admit(piece("example.com", family="FQDN"))
    assert isinstance(obj, EndpointSlice) and obj.endpoints == ()
    assert (problem.severity, problem.reason) == ("warning", "AddressTypeNotServed")


def test_bad_external_addresses_leave_the_service_its_own() -> None:
    ingress = (LoadBalancerIngress(ip="127.0.0.1"), LoadBalancerIngress(ip="192.0.2.1"))
    obj = service(type="LoadBalancer", external_ips=("010.0.0.1", "192.0.2.2"))
    status = ServiceStatus(load_balancer=LoadBalancerStatus(ingress=ingress))
    entering, problems = admit(Service(metadata=obj.metadata, spec=obj.spec, status=status))
    assert isinstance(entering, Service)
    assert entering.spec.external_ips == ("192.0.2.2",)
    assert [one.ip for one in entering.status.load_balancer.ingress] == ["192.0.2.1"]
    assert {problem.severity for problem in problems} == {"warning"}


def test_what_only_a_manifest_is_refused_for_is_in_force() -> None:
    obj = service(external_traffic_policy="Local")
    entering, (problem,) = admit(obj)
    assert entering == obj and problem.severity == "warning"


@pytest.mark.parametrize(
    "obj",
    [
        pytest.param(service(cluster_ip="010.0.0.1"), id="no-address-of-its-own"),
        pytest.param(service(ports=(ServicePort(port=70000),)), id="a-port-that-is-none"),
        pytest.param(piece("10.0.0.1", port=70000), id="an-endpoint-port-that-is-none"),
        pytest.param(piece("10.0.0.1", family="IPv5"), id="a-family-that-is-none"),
    ],
)
def test_what_no_map_can_hold_is_kept_out(obj: Service | EndpointSlice) -> None:
    entering, problems = admit(obj)
    assert entering is None
    assert "error" in {problem.severity for problem in problems}


@pytest.mark.parametrize(
    "address, family, expected",
    [
        ("10.0.0.1", "IPv4", True),
        ("fd00::1", "IPv6", True),
        ("2001:db8::1", "IPv6", True),
        ("fd00::1", "IPv4", False),
        ("010.0.0.1", "IPv4", False),
        ("127.0.0.1", "IPv4", False),
        ("169.254.1.1", "IPv4", False),
        ("224.0.0.1", "IPv4", False),
        ("0.0.0.0", "IPv4", False),
        ("::1", "IPv6", False),
        ("fe80::1", "IPv6", False),
        ("ff02::1", "IPv6", False),
        ("::ffff:10.0.0.1", "IPv6", False),
        ("fd00::1%eth0", "IPv6", False),
        ("\x00", "IPv4", False),
    ],
)
def test_the_quick_look_passes_only_plain_addresses(
    address: str, family: str, expected: bool
) -> None:
    assert plain(piece(address, family=family)) == expected


# -- what is known ---------------------------------------------------------------------------


def test_a_page_that_is_not_whole_takes_nothing_away() -> None:
    known = Known()
    listing = Listing(known)
    listing.add(Page([Item(service().ref, "1", service())], "1", ""))
    assert listing.settle().objects
    again = Listing(known)
    again.add(Page([], "2", "", whole=False))
    assert again.settle().deleted == ()
    assert Listing(known).settle().deleted == (service().ref,)


# -- the way ---------------------------------------------------------------------------------

CONFIGURED, DIRECT = "https://10.0.0.1:443", "https://192.0.2.1:6443"


def route(url: str = CONFIGURED, *, guarded: bool = True) -> Route:
    way = Route(url, cluster_ips={"10.0.0.1"}, guarded=guarded)
    way.remember((), (DIRECT,))
    return way


def test_the_configured_url_comes_first_and_again_after_a_while() -> None:
    way = route()
    assert way.order(0) == [CONFIGURED, DIRECT]
    way.failed(CONFIGURED, 0)
    way.worked(DIRECT)
    assert way.order(59) == [DIRECT, CONFIGURED]
    assert way.order(60) == [CONFIGURED, DIRECT]
    way.failed(CONFIGURED, 60)
    assert way.order(61) == [DIRECT, CONFIGURED]
    way.worked(CONFIGURED)
    assert way.order(61) == [CONFIGURED, DIRECT]


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(route("https://lb.example:6443"), id="not-the-service"),
        pytest.param(route(guarded=False), id="nobody-verifies"),
    ],
)
def test_only_the_service_is_gone_round_and_only_with_tls(way: Route) -> None:
    assert len(way.order(0)) == 1


def test_the_service_is_known_by_its_name_and_by_an_address_seen_later() -> None:
    assert DIRECT in route("https://kubernetes.default.svc.cluster.local:443").order(0)
    way = route("https://[fd00::1]:443")
    assert DIRECT not in way.order(0)
    way.remember(("fd00::1",), ())
    assert DIRECT in way.order(0)


def test_what_may_be_a_cluster_ip_has_its_mend_named_until_it_was_reached() -> None:
    way = route("https://10.96.0.1:443")
    assert "If it is a ClusterIP, give --api-server" in way.mend
    way.worked("https://10.96.0.1:443")
    assert "--api-server" not in way.mend
    way.remember(("10.96.0.1",), ())
    assert way.mend.startswith("that is a ClusterIP: give --api-server")


def test_the_branch_is_never_forgotten(tmp_path: Any) -> None:
    branch = Branch(load(tmp_path))
    labels = {"kubernetes.io/service-name": "kubernetes"}
    full = EndpointSlice(
        metadata=ObjectMeta(name="kubernetes", labels=labels),
        address_type="IPv6",
        endpoints=(Endpoint(addresses=("fd00::9",)),),
        ports=(EndpointPort(name="https", port=6443),),
    )
    assert branch.follow([full], [])
    assert not branch.follow([], [full.ref])
    expected = Remembered((), ("https://[fd00::9]:6443",))
    assert branch.now == expected
    save(tmp_path, branch.now)
    assert load(tmp_path) == expected


# -- waiting, and what is asked for ----------------------------------------------------------


def test_each_failure_doubles_the_window_up_to_the_longest() -> None:
    backoff = Backoff(0.8, 30.0, uniform=lambda low, high: high)
    assert [backoff.after() for _ in range(8)] == [0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]
    backoff.reset()
    assert backoff.after(retry_after=5) == 5.8


def test_an_own_dns_needs_the_headless_services_too() -> None:
    services, slices, *_ = resources(
        node_name="n", proxy_name="", with_headless=True, with_cidrs=False
    )
    assert services.selectors == {"labelSelector": "!service.kubernetes.io/service-proxy-name"}
    assert slices.selectors == {"labelSelector": "kubernetes.io/service-name"}
