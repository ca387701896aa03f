"""What is wrong with a Service: pkg/apis/core/validation of kube-apiserver, in meaning. Pure."""

from __future__ import annotations

import ipaddress

from pointsman.findings import (
    FAMILIES,
    PROTOCOLS,
    Finding,
    Findings,
    check_label,
    check_name,
    check_namespace,
    check_one_of,
    check_port,
    check_port_name,
    check_unique,
)
from pointsman.names import MEND_SUBDOMAIN, cidr_fault, is_subdomain, remote_address_fault, show
from pointsman.objects import Service

_TYPES = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
_POLICIES = ("Cluster", "Local")
_DISTRIBUTIONS = ("PreferSameZone", "PreferSameNode", "PreferClose")


def check_service(service: Service) -> Findings:
    spec = service.spec
    yield from check_name(service.metadata, is_dns_label=True)
    yield from check_namespace(service.metadata)
    yield from check_one_of("spec.type", spec.type, _TYPES)
    yield from _ports(service)
    yield from _node_ports(service)
    if spec.type == "ExternalName":
        yield from _external_name(spec.external_name)
    else:
        yield from _cluster_ips(service)
    for i, address in enumerate(spec.external_ips):
        if fault := remote_address_fault(address):
            yield Finding(f"spec.externalIPs[{i}]", *fault, reason="AddressNotServed")
    yield from _affinity(service)
    yield from _policies(service)
    yield from _load_balancer(service)


def _affinity(service: Service) -> Findings:
    spec = service.spec
    yield from check_one_of("spec.sessionAffinity", spec.session_affinity, ("None", "ClientIP"))
    config = spec.session_affinity_config
    if config is None or config.client_ip is None:
        return
    field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
    seconds = config.client_ip.timeout_seconds
    if not 1 <= seconds <= 86400:
        yield Finding(field, f"{seconds} s is out of range", "write 1 to 86400 seconds")
    elif spec.session_affinity == "None":
        # The API server takes it away without a word.
        mend = "add sessionAffinity: ClientIP, or leave sessionAffinityConfig out"
        yield Finding(field, "it has no effect: sessionAffinity is None", mend, "warning")


def _policies(service: Service) -> Findings:
    spec = service.spec
    yield from check_one_of("spec.internalTrafficPolicy", spec.internal_traffic_policy, _POLICIES)
    policy, field = spec.external_traffic_policy, "spec.externalTrafficPolicy"
    exposed = spec.type in ("NodePort", "LoadBalancer") or (
        spec.type == "ClusterIP" and spec.external_ips
    )
    if policy and policy not in _POLICIES:
        yield from check_one_of(field, policy, _POLICIES)
    elif policy and not exposed and spec.type in _TYPES:
        message = f"it does not go with type {spec.type}: nothing comes from outside"
        yield Finding(field, message, "leave it out, or write type: NodePort or LoadBalancer")
    distribution = spec.traffic_distribution
    if distribution and distribution not in _DISTRIBUTIONS:
        message = f"{show(distribution)} is unknown, so all endpoints are used alike"
        mend = "write PreferSameZone or PreferSameNode, or leave it out"
        yield Finding("spec.trafficDistribution", message, mend, "warning")


def _load_balancer(service: Service) -> Findings:
    spec = service.spec
    mend = "leave it out, or write type: LoadBalancer"
    if number := spec.health_check_node_port:
        field = "spec.healthCheckNodePort"
        yield from check_port(field, number)
        if (spec.type, spec.external_traffic_policy) != ("LoadBalancer", "Local"):
            message = "it goes with type LoadBalancer and externalTrafficPolicy Local only"
            yield Finding(field, message, f"{mend} and externalTrafficPolicy: Local")
    if spec.load_balancer_source_ranges and spec.type != "LoadBalancer":
        message = f"they do not go with type {spec.type}"
        yield Finding("spec.loadBalancerSourceRanges", message, mend)
    for i, cidr in enumerate(spec.load_balancer_source_ranges):
        # Blanks around a range were allowed while the ranges stood in an annotation.
        if fault := cidr_fault(cidr.strip()):
            yield Finding(f"spec.loadBalancerSourceRanges[{i}]", *fault)
    for i, ingress in enumerate(service.status.load_balancer.ingress):
        field = f"status.loadBalancer.ingress[{i}]"
        if ingress.ip and (fault := remote_address_fault(ingress.ip)):
            yield Finding(f"{field}.ip", *fault, reason="AddressNotServed")
        if ingress.ip_mode is not None:
            yield from check_one_of(f"{field}.ipMode", ingress.ip_mode, ("VIP", "Proxy"))


def _ports(service: Service) -> Findings:
    ports = service.spec.ports
    if not ports and not service.headless and service.spec.type != "ExternalName":
        yield Finding("spec.ports", "there are no ports", "add one, such as '- port: 80'")
    names: dict[object, str] = {}
    numbers: dict[object, str] = {}
    for i, port in enumerate(ports):
        field = f"spec.ports[{i}]"
        if port.name:
            yield from check_label(f"{field}.name", port.name)
            yield from check_unique(f"{field}.name", port.name, show(port.name), names)
        elif len(ports) > 1:
            message = "a port among several has no name"
            yield Finding(f"{field}.name", message, "add a name to each port")
        yield from check_one_of(f"{field}.protocol", port.protocol, PROTOCOLS)
        yield from check_port(f"{field}.port", port.port)
        key = (port.protocol, port.port)
        yield from check_unique(f"{field}.port", key, f"{port.port}/{port.protocol}", numbers)
        # 0 and "" mean "the same as port" to the API server, as no targetPort at all does.
        if isinstance(target := port.target_port or port.port, str):
            yield from check_port_name(f"{field}.targetPort", target)
        elif target != port.port:
            yield from check_port(f"{field}.targetPort", target)


def _node_ports(service: Service) -> Findings:
    """TCP and UDP may share a NodePort, two ports of one protocol may not."""
    seen: dict[object, str] = {}
    for i, port in enumerate(service.spec.ports):
        field, number = f"spec.ports[{i}].nodePort", port.node_port
        if not number:
            continue
        yield from check_port(field, number)
        key = (port.protocol, number)
        yield from check_unique(field, key, f"NodePort {number}/{port.protocol}", seen)
        if service.spec.type == "ClusterIP":
            mend = "leave nodePort out, or write type: NodePort"
            yield Finding(field, "nodePort does not go with type ClusterIP", mend)


def _external_name(name: str) -> Findings:
    if not name:
        yield Finding("spec.externalName", "there is no externalName", "add the DNS name it is")
    elif not is_subdomain(name.removesuffix(".").lower()):
        yield Finding("spec.externalName", f"{show(name)} is not a DNS name", MEND_SUBDOMAIN)


def _cluster_ips(service: Service) -> Findings:
    spec = service.spec
    yield from _families(service)
    if service.headless:
        if spec.type != "ClusterIP":
            mend = "write type: ClusterIP, or leave clusterIP out"
            yield Finding("spec.clusterIP", f"None does not go with type {spec.type}", mend)
        if spec.cluster_ips not in ((), ("None",)):
            yield Finding("spec.clusterIPs", "clusterIP is None", "leave clusterIPs out")
        return
    if spec.cluster_ip and (fault := remote_address_fault(spec.cluster_ip)):
        yield Finding("spec.clusterIP", *fault)
    if spec.cluster_ips and spec.cluster_ips[0] != spec.cluster_ip:
        message = f"{show(spec.cluster_ips[0])} differs from clusterIP {show(spec.cluster_ip)}"
        yield Finding("spec.clusterIPs[0]", message, "write the same address in both")
    if len(spec.cluster_ips) > 2:
        message = f"there are {len(spec.cluster_ips)} addresses"
        yield Finding("spec.clusterIPs", message, "write at most one of each family")
        return
    versions: dict[object, str] = {}
    for i, address in enumerate(spec.cluster_ips or (spec.cluster_ip,) * bool(spec.cluster_ip)):
        field = f"spec.clusterIPs[{i}]" if spec.cluster_ips else "spec.clusterIP"
        if fault := remote_address_fault(address):
            if i:  # the first was reported as clusterIP, or differs from it
                yield Finding(field, *fault)
            continue
        family = f"IPv{ipaddress.ip_address(address).version}"
        yield from check_unique(field, family, f"the family {family} of {address}", versions)
        if i < len(spec.ip_families) and spec.ip_families[i] != family:
            message = f"{address} is {family}, but ipFamilies[{i}] is {show(spec.ip_families[i])}"
            yield Finding(field, message, "make them agree, or leave ipFamilies out")


def _families(service: Service) -> Findings:
    spec = service.spec
    seen: dict[object, str] = {}
    for i, family in enumerate(spec.ip_families):
        yield from check_one_of(f"spec.ipFamilies[{i}]", family, FAMILIES)
        yield from check_unique(f"spec.ipFamilies[{i}]", family, show(family), seen)
    policy = spec.ip_family_policy
    if policy:
        known = ("SingleStack", "PreferDualStack", "RequireDualStack")
        yield from check_one_of("spec.ipFamilyPolicy", policy, known)
    if policy == "SingleStack" and max(len(spec.ip_families), len(spec.cluster_ips)) > 1:
        mend = "write PreferDualStack, or only one family"
        yield Finding("spec.ipFamilyPolicy", "SingleStack does not go with two families", mend)
