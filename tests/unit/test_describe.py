"""The text of kubectl describe service, and what the kernel holds."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pointsman import describe as describing
from pointsman.objects import EndpointSlice, Service
from tests.support.view import view


def service(spec: dict[str, Any], **meta: Any) -> Service:
    return msgspec.convert({"metadata": {"name": "web", **meta}, "spec": spec}, Service)


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
    parts = describing.describe_kernel(view(), "shop", "web")
    assert [(line, [row.endpoint for row in rows]) for line, rows in parts] == [
        ("10.96.0.1:80/TCP  id 1, random", ["10.0.0.1:8080", "10.0.0.2:8080"]),
        ("10.96.0.1:*  id 2, any other port: refuse", []),
    ]
