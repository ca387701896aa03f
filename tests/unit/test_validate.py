"""What must not enter, by field; and that nothing else is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pointsman.objects import EndpointSlice, Namespace, Node, Object, Pod, Service
from pointsman.validate import validate


def service(name: str = "web", **spec: Any) -> Service:
    spec = {"ports": [{"port": 80}]} | spec
    return msgspec.convert({"metadata": {"name": name}, "spec": spec}, Service)


def balancer(status: dict[str, Any] | None = None, **spec: Any) -> Service:
    spec = {"ports": [{"port": 80}], "type": "LoadBalancer"} | spec
    document = {"metadata": {"name": "web"}, "spec": spec}
    if status:
        document["status"] = {"loadBalancer": {"ingress": [status]}}
    return msgspec.convert(document, Service)


def node(kind: str = "InternalIP", address: str = "192.0.2.1", **metadata: str) -> Node:
    document = {
        "metadata": {"name": "n1"} | metadata,
        "status": {"addresses": [{"type": kind, "address": address}]},
    }
    return msgspec.convert(document, Node)


def namespace(**metadata: str) -> Namespace:
    return msgspec.convert({"metadata": metadata}, Namespace)


def slice_(**fields: Any) -> EndpointSlice:
    labels = {"kubernetes.io/service-name": "web"}
    document = {"metadata": {"name": "web-1", "labels": labels}, "addressType": "IPv4"} | fields
    return msgspec.convert(document, EndpointSlice)


def address(text: str, family: str = "IPv4") -> EndpointSlice:
    return slice_(addressType=family, endpoints=[{"addresses": [text]}])


READY = {"podIP": "10.1.0.1", "conditions": [{"type": "Ready", "status": "True"}]}


def pod(spec: dict[str, Any] | None = None, **status: Any) -> Pod:
    document = {"metadata": {"name": "p"}, "spec": spec or {}, "status": READY | status}
    return msgspec.convert(document, Pod)


def container(**port: Any) -> Pod:
    return pod({"containers": [{"ports": [{"containerPort": 80} | port]}]})


def hinted(**hints: Any) -> EndpointSlice:
    return slice_(endpoints=[{"addresses": ["10.1.2.3"], "hints": hints}])


CLIENT_IP = {"clientIP": {"timeoutSeconds": 60}}
DNS = [
    {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30053},
    {"name": "dns-tcp", "port": 53, "protocol": "TCP", "nodePort": 30053},
]


@pytest.mark.parametrize(
    "obj",
    [
        pytest.param(service(), id="a-plain-service"),
        pytest.param(service("9lives"), id="a-name-that-begins-with-a-digit"),
        pytest.param(service("a" * 63), id="a-name-of-63"),
        pytest.param(service(clusterIP="None", ports=[]), id="headless-without-ports"),
        pytest.param(
            service(type="ExternalName", externalName="Example.com.", ports=[]), id="external-name"
        ),
        pytest.param(
            service(
                ports=[
                    {"name": "dns", "port": 53, "protocol": "UDP"},
                    {"name": "dns-tcp", "port": 53, "targetPort": "dns-port"},
                ]
            ),
            id="one-number-for-two-protocols",
        ),
        pytest.param(service(ports=[{"port": 9, "protocol": "SCTP"}]), id="sctp"),
        pytest.param(service(ports=[{"port": 9, "targetPort": 0}]), id="target-port-0-is-none"),
        pytest.param(
            service(
                clusterIP="10.0.0.9",
                clusterIPs=["10.0.0.9", "fd00::9"],
                ipFamilies=["IPv4", "IPv6"],
            ),
            id="dual-stack",
        ),
        pytest.param(service(clusterIP="None", clusterIPs=["None"]), id="headless-in-both-fields"),
        pytest.param(address("10.1.2.3"), id="an-ipv4-endpoint"),
        pytest.param(address("fd00::1", "IPv6"), id="an-ipv6-endpoint"),
        pytest.param(slice_(ports=[{"name": None, "port": None}]), id="a-port-that-is-null"),
        pytest.param(slice_(endpoints=None, ports=None), id="a-slice-of-nothing"),
        pytest.param(pod(), id="a-ready-pod"),
        pytest.param(pod(podIPs=[{"ip": "10.1.0.1"}, {"ip": "fd00::1"}]), id="a-dual-stack-pod"),
        pytest.param(pod(podIP="", phase="Failed"), id="an-ended-pod-without-address"),
        pytest.param(
            service(sessionAffinity="ClientIP", sessionAffinityConfig=CLIENT_IP), id="affinity"
        ),
        pytest.param(service(sessionAffinity="ClientIP"), id="affinity-without-a-timeout"),
        pytest.param(service(trafficDistribution="PreferClose"), id="prefer-close"),
        pytest.param(service(trafficDistribution="PreferSameZone"), id="prefer-same-zone"),
        pytest.param(service(trafficDistribution="PreferSameNode"), id="prefer-same-node"),
        pytest.param(service(type="NodePort", ports=DNS), id="one-node-port-for-two-protocols"),
        pytest.param(
            service(type="NodePort", externalTrafficPolicy="Local"), id="external-policy-node-port"
        ),
        pytest.param(
            service(externalIPs=["198.51.100.1"], externalTrafficPolicy="Local"),
            id="external-policy-of-external-ips",
        ),
        pytest.param(service(externalIPs=["198.51.100.1", "2001:db8::1"]), id="external-ips"),
        pytest.param(
            balancer(
                {"ip": "198.51.100.1"},
                loadBalancerSourceRanges=[" 10.0.0.0/8 ", "10.9.9.9/16", "fd00::/8"],
                externalTrafficPolicy="Local",
                healthCheckNodePort=30999,
            ),
            id="a-load-balancer",
        ),
        pytest.param(balancer({"ip": "198.51.100.1", "ipMode": "VIP"}), id="ip-mode-vip"),
        pytest.param(balancer({"ip": "198.51.100.1", "ipMode": "Proxy"}), id="ip-mode-proxy"),
        pytest.param(balancer({"ip": "198.51.100.1", "ipMode": None}), id="ip-mode-null"),
        pytest.param(balancer({"hostname": "lb.example"}), id="an-ingress-that-is-a-name"),
        pytest.param(container(hostPort=8080), id="host-port"),
        pytest.param(container(hostPort=0), id="host-port-0-is-none"),
        pytest.param(container(hostPort=80, hostIP="127.0.0.1"), id="host-ip-loopback"),
        pytest.param(container(hostPort=80, hostIP="0.0.0.0"), id="host-ip-any"),
        pytest.param(container(hostPort=80, hostIP="::"), id="host-ip-any-ipv6"),
        pytest.param(
            pod(
                {
                    "containers": [
                        {"ports": [{"containerPort": 53, "hostPort": 53, "protocol": "UDP"}]},
                        {"ports": [{"containerPort": 53, "hostPort": 53}]},
                        {"ports": [{"containerPort": 53, "hostPort": 53, "hostIP": "127.0.0.1"}]},
                    ]
                }
            ),
            id="one-host-port-for-two-protocols-and-addresses",
        ),
        pytest.param(hinted(forZones=[{"name": "z1"}], forNodes=[{"name": "n1"}]), id="hints"),
        pytest.param(hinted(forZones=None), id="hints-that-are-null"),
        pytest.param(node(), id="a-node"),
        pytest.param(node(name="n1.example.com"), id="a-node-whose-name-has-dots"),
        pytest.param(node("ExternalIP", "2001:db8::1"), id="an-ipv6-node"),
        pytest.param(node("Hostname", "n1"), id="a-hostname-is-no-address"),
        pytest.param(namespace(name="kube-system"), id="a-namespace"),
    ],
)
def test_accepts(obj: Object) -> None:
    assert validate(obj) == []


@pytest.mark.parametrize(
    ("obj", "field", "message"),
    [
        pytest.param(service("Web"), "metadata.name", '"Web" is not a DNS label', id="capitals"),
        pytest.param(service("a" * 64), "metadata.name", "not a DNS label", id="name-of-64"),
        pytest.param(service("a.b"), "metadata.name", "not a DNS label", id="name-with-dot"),
        pytest.param(service("a\n"), "metadata.name", "not a DNS label", id="trailing-newline"),
        pytest.param(service(""), "metadata.name", "no name", id="no-name"),
        pytest.param(service(ports=[]), "spec.ports", "no ports", id="no-ports"),
        pytest.param(
            service(ports=[{"port": 0}]), "spec.ports[0].port", "0 is not a port", id="port-0"
        ),
        pytest.param(
            service(ports=[{"port": 65536}]), "spec.ports[0].port", "65536", id="port-65536"
        ),
        pytest.param(
            service(ports=[{"name": "a", "port": 1}, {"port": 2}]),
            "spec.ports[1].name",
            "no name",
            id="several-ports-one-unnamed",
        ),
        pytest.param(
            service(ports=[{"name": "a", "port": 1}, {"name": "a", "port": 2}]),
            "spec.ports[1].name",
            "spec.ports[0].name",
            id="port-name-twice",
        ),
        pytest.param(
            service(ports=[{"name": "a", "port": 1}, {"name": "b", "port": 1}]),
            "spec.ports[1].port",
            "1/TCP is also that of spec.ports[0]",
            id="port-twice",
        ),
        pytest.param(
            service(ports=[{"name": "A_b", "port": 1}]),
            "spec.ports[0].name",
            "label",
            id="bad-name",
        ),
        pytest.param(
            service(ports=[{"port": 1, "protocol": "tcp"}]),
            "spec.ports[0].protocol",
            '"tcp" is unknown',
            id="protocol-in-small-letters",
        ),
        pytest.param(
            service(ports=[{"port": 1, "targetPort": 70000}]),
            "spec.ports[0].targetPort",
            "70000",
            id="target-port-out-of-range",
        ),
        pytest.param(
            service(ports=[{"port": 1, "targetPort": "8080"}]),
            "spec.ports[0].targetPort",
            '"8080" is text',
            id="target-port-quoted",
        ),
        pytest.param(
            service(ports=[{"port": 1, "targetPort": "a-name-of-16-xxx"}]),
            "spec.ports[0].targetPort",
            "not a port name",
            id="target-port-name-of-16",
        ),
        pytest.param(service(clusterIP="10.0.0"), "spec.clusterIP", "not an IP", id="no-address"),
        pytest.param(
            service(clusterIP="10.0.0.010"), "spec.clusterIP", "leading zero", id="leading-zero"
        ),
        pytest.param(service(clusterIP="127.0.0.1"), "spec.clusterIP", "loopback", id="loopback"),
        pytest.param(service(clusterIP="::"), "spec.clusterIP", "unspecified", id="unspecified"),
        pytest.param(service(clusterIP="224.0.0.1"), "spec.clusterIP", "multicast", id="multicast"),
        pytest.param(service(clusterIP="169.254.1.1"), "spec.clusterIP", "link", id="link-local"),
        pytest.param(service(clusterIP="fe80::1%eth0"), "spec.clusterIP", "zone", id="zone"),
        pytest.param(
            service(clusterIP="::ffff:10.0.0.1"), "spec.clusterIP", "mapped", id="ipv4-mapped"
        ),
        pytest.param(
            service(clusterIP="10.0.0.1", clusterIPs=["10.0.0.2"]),
            "spec.clusterIPs[0]",
            "differs from clusterIP",
            id="cluster-ips-disagree",
        ),
        pytest.param(
            service(clusterIP="10.0.0.1", clusterIPs=["10.0.0.1", "10.0.0.2"]),
            "spec.clusterIPs[1]",
            "family IPv4",
            id="one-family-twice",
        ),
        pytest.param(
            service(clusterIP="10.0.0.1", clusterIPs=["10.0.0.1", "fd00::1", "fd00::2"]),
            "spec.clusterIPs",
            "3 addresses",
            id="three-addresses",
        ),
        pytest.param(
            service(clusterIP="10.0.0.1", ipFamilies=["IPv6"]),
            "spec.clusterIP",
            "ipFamilies[0]",
            id="address-not-of-the-family",
        ),
        pytest.param(
            service(ipFamilies=["IPv5"]), "spec.ipFamilies[0]", "unknown", id="unknown-family"
        ),
        pytest.param(
            service(type="NodePort", clusterIP="None"), "spec.clusterIP", "None", id="headless-type"
        ),
        pytest.param(service(type="Foo"), "spec.type", '"Foo" is unknown', id="unknown-type"),
        pytest.param(
            service(sessionAffinity="Cookie"), "spec.sessionAffinity", "unknown", id="affinity"
        ),
        pytest.param(
            service(sessionAffinityConfig={"clientIP": {"timeoutSeconds": 86401}}),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            "86401",
            id="affinity-timeout",
        ),
        pytest.param(
            service(internalTrafficPolicy="Node"), "spec.internalTrafficPolicy", "Node", id="policy"
        ),
        pytest.param(
            service(type="ExternalName"), "spec.externalName", "no externalName", id="no-external"
        ),
        pytest.param(
            service(type="ExternalName", externalName="a_b"),
            "spec.externalName",
            "not a DNS name",
            id="bad-external-name",
        ),
        pytest.param(slice_(addressType="IPX"), "addressType", "unknown", id="address-type"),
        pytest.param(
            address("fd00::1"), "endpoints[0].addresses[0]", "not an IPv4", id="other-family"
        ),
        pytest.param(
            address("127.0.0.1"), "endpoints[0].addresses[0]", "loopback", id="endpoint-loopback"
        ),
        pytest.param(
            address("0.0.0.0"), "endpoints[0].addresses[0]", "unspecified", id="endpoint-zero"
        ),
        pytest.param(
            address("fe80::1", "IPv6"), "endpoints[0].addresses[0]", "link", id="endpoint-link"
        ),
        pytest.param(
            slice_(endpoints=[{"addresses": []}]), "endpoints[0].addresses", "no", id="no-addresses"
        ),
        pytest.param(slice_(ports=[{"port": -1}]), "ports[0].port", "-1", id="slice-port"),
        pytest.param(pod(podIP="10.0.0.300"), "status.podIP", "not an IP", id="pod-ip"),
        pytest.param(pod(podIP="::1"), "status.podIP", "loopback", id="pod-ip-loopback"),
        pytest.param(
            pod(podIPs=[{"ip": "10.9.9.9"}]),
            "status.podIPs[0].ip",
            "differs",
            id="pod-ips-disagree",
        ),
        pytest.param(
            pod({"containers": [{"ports": [{"containerPort": 0}]}]}),
            "spec.containers[0].ports[0].containerPort",
            "0 is not a port",
            id="container-port",
        ),
        pytest.param(slice_(addressType="FQDN"), "addressType", "not supported", id="fqdn"),
        pytest.param(
            service(externalIPs=["198.51.100.1", "127.0.0.1"]),
            "spec.externalIPs[1]",
            "loopback",
            id="external-ip-loopback",
        ),
        pytest.param(
            service(ports=[{"port": 80, "nodePort": 30080}]),
            "spec.ports[0].nodePort",
            "type ClusterIP",
            id="node-port-of-a-cluster-ip",
        ),
        pytest.param(
            service(type="NodePort", ports=[{"port": 80, "nodePort": 70000}]),
            "spec.ports[0].nodePort",
            "70000 is not a port",
            id="node-port-out-of-range",
        ),
        pytest.param(
            service(
                type="NodePort",
                ports=[
                    {"name": "a", "port": 80, "nodePort": 30080},
                    {"name": "b", "port": 81, "nodePort": 30080},
                ],
            ),
            "spec.ports[1].nodePort",
            "NodePort 30080/TCP is also that of spec.ports[0].nodePort",
            id="node-port-twice",
        ),
        pytest.param(
            service(externalTrafficPolicy="Cluster"),
            "spec.externalTrafficPolicy",
            "type ClusterIP",
            id="external-policy-of-a-cluster-ip",
        ),
        pytest.param(
            service(type="NodePort", externalTrafficPolicy="Node"),
            "spec.externalTrafficPolicy",
            '"Node" is unknown',
            id="external-policy-unknown",
        ),
        pytest.param(
            balancer(healthCheckNodePort=30999),
            "spec.healthCheckNodePort",
            "externalTrafficPolicy Local",
            id="health-check-of-policy-cluster",
        ),
        pytest.param(
            balancer(healthCheckNodePort=-1, externalTrafficPolicy="Local"),
            "spec.healthCheckNodePort",
            "-1 is not a port",
            id="health-check-port",
        ),
        pytest.param(
            service(loadBalancerSourceRanges=["10.0.0.0/8"]),
            "spec.loadBalancerSourceRanges",
            "type ClusterIP",
            id="source-ranges-of-a-cluster-ip",
        ),
        pytest.param(
            balancer(loadBalancerSourceRanges=["10.0.0.0/8", "10.0.0.1"]),
            "spec.loadBalancerSourceRanges[1]",
            "not a CIDR",
            id="source-range-without-a-length",
        ),
        pytest.param(
            balancer(loadBalancerSourceRanges=["10.0.0.0/33"]),
            "spec.loadBalancerSourceRanges[0]",
            '"33" is no length',
            id="source-range-length",
        ),
        pytest.param(
            balancer(loadBalancerSourceRanges=["10.0.0.0/255.0.0.0"]),
            "spec.loadBalancerSourceRanges[0]",
            '"255.0.0.0" is no length',
            id="source-range-mask",
        ),
        pytest.param(
            balancer(loadBalancerSourceRanges=["10.0.0/8"]),
            "spec.loadBalancerSourceRanges[0]",
            "not an IP",
            id="source-range-address",
        ),
        pytest.param(
            balancer({"ip": "198.51.100"}),
            "status.loadBalancer.ingress[0].ip",
            "not an IP",
            id="ingress-ip",
        ),
        pytest.param(
            balancer({"ip": "0.0.0.0"}),
            "status.loadBalancer.ingress[0].ip",
            "unspecified",
            id="ingress-ip-that-stands-for-all-addresses",
        ),
        pytest.param(
            balancer({"ip": "198.51.100.1", "ipMode": "DSR"}),
            "status.loadBalancer.ingress[0].ipMode",
            '"DSR" is unknown',
            id="ip-mode",
        ),
        pytest.param(
            container(hostPort=65536),
            "spec.containers[0].ports[0].hostPort",
            "65536 is not a port",
            id="host-port-out-of-range",
        ),
        pytest.param(
            container(hostPort=80, hostIP="localhost"),
            "spec.containers[0].ports[0].hostIP",
            "not an IP",
            id="host-ip",
        ),
        pytest.param(
            pod(
                {
                    "containers": [
                        {"ports": [{"containerPort": 80, "hostPort": 80}]},
                        {"ports": [{"containerPort": 81, "hostPort": 80}]},
                    ]
                }
            ),
            "spec.containers[1].ports[0].hostPort",
            "hostPort 80/TCP is also that of spec.containers[0].ports[0].hostPort",
            id="host-port-twice",
        ),
        pytest.param(node(name=""), "metadata.name", "no name", id="a-node-without-a-name"),
        pytest.param(node(name="N1"), "metadata.name", "not a DNS subdomain", id="node-name"),
        pytest.param(
            node(namespace="default"),
            "metadata.namespace",
            "no namespace",
            id="node-in-a-namespace",
        ),
        pytest.param(namespace(), "metadata.name", "no name", id="a-namespace-without-a-name"),
        pytest.param(
            namespace(name="a.b"), "metadata.name", "not a DNS label", id="namespace-name"
        ),
    ],
)
def test_refuses(obj: Object, field: str, message: str) -> None:
    (problem,) = validate(obj)
    assert (problem.field, problem.severity, problem.object) == (field, "error", str(obj.ref))
    assert message in problem.message
    assert problem.mend


@pytest.mark.parametrize(
    ("obj", "field", "text"),
    [
        pytest.param(
            slice_(metadata={"name": "x"}), "metadata.labels", "no Service", id="no-service-label"
        ),
        pytest.param(pod(conditions=[]), "status.conditions", "Ready", id="no-ready-condition"),
        pytest.param(pod(podIP=""), "status.podIP", "no podIP", id="no-pod-ip"),
        pytest.param(
            service(sessionAffinityConfig=CLIENT_IP),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            "no effect",
            id="affinity-timeout-without-affinity",
        ),
        pytest.param(
            service(trafficDistribution="PreferNear"),
            "spec.trafficDistribution",
            '"PreferNear" is unknown',
            id="traffic-distribution",
        ),
        pytest.param(
            hinted(forZones=[{"name": "z1"}, {"name": ""}]),
            "endpoints[0].hints.forZones[1].name",
            "of no zone",
            id="hint-for-no-zone",
        ),
        pytest.param(
            hinted(forNodes=[{"name": ""}]),
            "endpoints[0].hints.forNodes[0].name",
            "of no node",
            id="hint-for-no-node",
        ),
        pytest.param(
            node(address="192.0.2"), "status.addresses[0].address", "not an IP", id="node-address"
        ),
        pytest.param(
            node("ExternalIP", "0.0.0.0"),
            "status.addresses[0].address",
            "unspecified",
            id="node-address-that-stands-for-all",
        ),
    ],
)
def test_warns(obj: Object, field: str, text: str) -> None:
    (problem,) = validate(obj)
    assert (problem.field, problem.severity) == (field, "warning")
    assert text in problem.message


def test_a_message_never_gets_longer_than_a_line() -> None:
    (problem,) = validate(service("X" * 100_000))
    assert len(problem.message) < 120
