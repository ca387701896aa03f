"""The text of kubectl describe service, and what the kernel holds."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pointsman import describe as describing
from pointsman import inspect
from pointsman.objects import EndpointSlice, Service
from tests.support.view import node_view, view


def service(
    spec: dict[str, Any], ingress: list[dict[str, str]] | None = None, **meta: Any
) -> Service:
    status = {"loadBalancer": {"ingress": ingress or []}}
    value = {"metadata": {"name": "web", **meta}, "spec": spec, "status": status}
    return msgspec.convert(value, Service)


def slice_of(ports: list[dict[str, Any]], *addresses: str, ready: bool = True) -> EndpointSlice:
    endpoints = [{"addresses": [a], "conditions": {"ready": ready}} for a in addresses]
    value = {"metadata": {"name": "x"}, "addressType": "IPv4", "endpoints": endpoints}
    return msgspec.convert(value | {"ports": ports}, EndpointSlice)


@pytest.mark.parametrize(
    ("obj", "slices", "expected"),
    [
        pytest.param(
            service(
                {
                    "selector": {"tier": "b", "app": "web"},
                    "clusterIP": "10.96.0.1",
                    "type": "NodePort",
                    "ports": [
                        {"name": "http", "port": 80, "targetPort": "web-port", "nodePort": 30080},
                        {"name": "dns", "port": 53, "protocol": "UDP"},
                    ],
                },
                namespace="shop",
                labels={"b": "2", "a": "1"},
                annotations={"note": "first\nsecond\n", "k": "v"},
            ),
            [
                slice_of(
                    [{"name": "http", "port": 8080}], "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"
                ),
                slice_of([{"name": "http", "port": 8080}], "10.0.0.9", ready=False),
            ],
            """\
Name:                     web
Namespace:                shop
Labels:                   a=1
                          b=2
Annotations:              k: v
                          note:
                            first
                            second
Selector:                 app=web,tier=b
Type:                     NodePort
IP Family Policy:         SingleStack
IP Families:              IPv4
IP:                       10.96.0.1
IPs:                      10.96.0.1
Port:                     http  80/TCP
TargetPort:               web-port/TCP
NodePort:                 http  30080/TCP
Endpoints:                10.0.0.1:8080,10.0.0.2:8080,10.0.0.3:8080 + 1 more...
Port:                     dns  53/UDP
TargetPort:               53/UDP
Endpoints:                \n\
Session Affinity:         None
External Traffic Policy:  Cluster
Internal Traffic Policy:  Cluster
Events:                   <none>
""",
            id="several-ports-and-more-endpoints-than-are-shown",
        ),
        pytest.param(
            service({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}),
            [],
            """\
Name:                     web
Namespace:                default
Labels:                   <none>
Annotations:              <none>
Selector:                 <none>
Type:                     ClusterIP
IP Family Policy:         SingleStack
IP Families:              IPv4
IP:                       10.96.0.1
IPs:                      10.96.0.1
Port:                     <unset>  80/TCP
TargetPort:               80/TCP
Endpoints:                <none>
Session Affinity:         None
Internal Traffic Policy:  Cluster
Events:                   <none>
""",
            id="nothing-set",
        ),
        pytest.param(
            service(
                {
                    "clusterIP": "10.96.0.1",
                    "type": "LoadBalancer",
                    "ports": [{"port": 80, "nodePort": 30080, "appProtocol": "http"}],
                    "externalIPs": ["192.0.2.1", "192.0.2.2"],
                    "sessionAffinity": "ClientIP",
                    "externalTrafficPolicy": "Local",
                    "internalTrafficPolicy": "Local",
                    "healthCheckNodePort": 31000,
                    "loadBalancerSourceRanges": ["198.51.100.0/24", "203.0.113.0/24"],
                    "trafficDistribution": "PreferClose",
                },
                ingress=[
                    {"ip": "203.0.113.9"},
                    {"ip": "203.0.113.10", "ipMode": "Proxy"},
                    {"hostname": "lb.example.com"},
                ],
            ),
            [slice_of([{"name": "", "port": 8080}], "10.0.0.1")],
            "\n".join(
                (
                    "Name:                        web",
                    "Namespace:                   default",
                    "Labels:                      <none>",
                    "Annotations:                 <none>",
                    "Selector:                    <none>",
                    "Type:                        LoadBalancer",
                    "IP Family Policy:            SingleStack",
                    "IP Families:                 IPv4",
                    "IP:                          10.96.0.1",
                    "IPs:                         10.96.0.1",
                    "External IPs:                192.0.2.1,192.0.2.2",
                    "LoadBalancer Ingress:        203.0.113.9 (VIP), 203.0.113.10 (Proxy), "
                    "lb.example.com",
                    "Port:                        <unset>  80/TCP",
                    "TargetPort:                  80/TCP",
                    "AppProtocol:                 http",
                    "NodePort:                    <unset>  30080/TCP",
                    "Endpoints:                   10.0.0.1:8080",
                    "Session Affinity:            ClientIP",
                    "External Traffic Policy:     Local",
                    "Internal Traffic Policy:     Local",
                    "HealthCheck NodePort:        31000",
                    "LoadBalancer Source Ranges:  198.51.100.0/24,203.0.113.0/24",
                    "Traffic Distribution:        PreferClose",
                    "Events:                      <none>",
                    "",
                )
            ),
            id="all-that-a-load-balancer-can-have",
        ),
        pytest.param(
            service({"type": "ExternalName", "externalName": "example.com"}),
            [],
            """\
Name:              web
Namespace:         default
Labels:            <none>
Annotations:       <none>
Selector:          <none>
Type:              ExternalName
IP Families:       <none>
IP:                \n\
IPs:               <none>
External Name:     example.com
Session Affinity:  None
Events:            <none>
""",
            id="a-narrower-label-column-without-policies",
        ),
    ],
)
def test_describe_prints_what_kubectl_prints(
    obj: Service, slices: list[EndpointSlice], expected: str
) -> None:
    assert describing.describe(obj, slices) == expected


def test_describe_tells_what_the_kernel_holds() -> None:
    parts = describing.describe_kernel(view(), "shop", "web", 0)
    assert [(line, [row.endpoint for row in rows]) for line, rows in parts] == [
        ("10.96.0.1:80/TCP  id 1, ClusterIP, random", ["10.0.0.1:8080", "10.0.0.2:8080"]),
        ("10.96.0.1:*  id 2, any other port: refuse", []),
    ]


def test_describe_tells_what_the_maps_know_of_a_load_balancer() -> None:
    row = next(row for row in inspect.services(node_view()) if row.name == "api")
    assert (
        describing.describe_row(row)
        == """\
Name:              api
Namespace:         shop
Type:              LoadBalancer
IP:                10.96.0.7
IPs:               10.96.0.7
External IPs:      203.0.113.9
Port:              http  80/TCP
NodePort:          http  30080/TCP
Session Affinity:  ClientIP
"""
    )
    lines = [line for line, _ in describing.describe_kernel(node_view(), "shop", "api", 0)]
    assert lines == [
        "0.0.0.0:30080/TCP  id 3, NodePort, random, affinity 60 s, this-node guarded node-port",
        "10.96.0.7:80/TCP  id 1, ClusterIP, random, affinity 60 s",
        "10.96.0.7:*  id 4, any other port: refuse",
        "203.0.113.9:80/TCP  id 2, External, random, affinity 60 s, guarded",
    ]


def test_which_endpoints_are_local_is_known_by_the_node_s_name() -> None:
    piece = slice_of([{"name": "http", "port": 80}, {"name": "dns", "port": 53}], "10.0.0.1", "::5")
    here, there = piece.endpoints or ()
    here, there = (
        msgspec.structs.replace(each, node_name=name) for each, name in ((here, "a"), (there, "b"))
    )
    slices = [msgspec.structs.replace(piece, endpoints=(here, there))]
    assert describing.local_endpoints(slices, "a") == {"10.0.0.1:80", "10.0.0.1:53"}
    assert describing.local_endpoints(slices, "b") == {"[::5]:80", "[::5]:53"}
    assert describing.local_endpoints(slices, "") == frozenset()
