"""What kube-apiserver would refuse, and what a manifest says but probably does not mean.

Pure: a typed object in, a list of Problems out, each with the field's path, what is wrong with the
value and what to write instead. A manifest never passed an API server, so this is the only gate
before addresses and ports become bytes in a BPF map. Only what can do harm further on is checked:
metadata that Pointsman never reads is left to kubectl.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pointsman.events import Problem
from pointsman.names import (
    MEND_LABEL,
    MEND_PORT_NAME,
    MEND_SUBDOMAIN,
    is_label,
    is_port_name,
    is_subdomain,
    remote_address_fault,
    show,
)
from pointsman.objects import EndpointSlice, Object, Pod, Service

PROTOCOLS = ("TCP", "UDP", "SCTP")
FAMILIES = ("IPv4", "IPv6")
TYPES = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")

_MEND_PORT = "write a number from 1 to 65535"


class _Finding(NamedTuple):
    field: str
    message: str
    mend: str
    severity: str = "error"


_Findings = Iterator[_Finding]


def validate(obj: Object) -> list[Problem]:
    """Everything wrong with `obj`, in the order of its fields; [] when it is in order.

    An "error" must keep the object out of force; with a "warning" it may enter. `where` is left
    empty for the source to fill in. Raises nothing.
    """
    match obj:
        case Service():
            findings = _service(obj)
        case EndpointSlice():
            findings = _endpoint_slice(obj)
        case Pod():
            findings = _pod(obj)
    name = str(obj.ref)
    return [Problem(f.message, f.mend, "", name, f.field, f.severity) for f in findings]


def _one_of(field: str, value: str, known: Sequence[str]) -> _Findings:
    if value not in known:
        names = f"{', '.join(known[:-1])} or {known[-1]}"
        yield _Finding(field, f"{show(value)} is unknown", f"write {names}")


def _label(field: str, value: str) -> _Findings:
    if not is_label(value):
        yield _Finding(field, f"{show(value)} is not a DNS label", MEND_LABEL)


def _port(field: str, value: int) -> _Findings:
    if not 1 <= value <= 65535:
        yield _Finding(field, f"{value} is not a port", _MEND_PORT)


def _unique(field: str, key: object, text: str, seen: dict[object, str]) -> _Findings:
    """`seen` maps each key met so far to the field that had it first."""
    first = seen.setdefault(key, field)
    if first != field:
        yield _Finding(field, f"{text} is also that of {first}", "make them different")


def _names(obj: Object) -> _Findings:
    name = obj.metadata.name
    if not name:
        yield _Finding("metadata.name", "there is no name", "add metadata.name")
    elif isinstance(obj, Service):
        yield from _label("metadata.name", name)
    elif not is_subdomain(name):
        message = f"{show(name)} is not a DNS subdomain"
        yield _Finding("metadata.name", message, MEND_SUBDOMAIN)
    yield from _label("metadata.namespace", obj.metadata.namespace)


def _service(service: Service) -> _Findings:
    spec = service.spec
    yield from _names(service)
    yield from _one_of("spec.type", spec.type, TYPES)
    yield from _service_ports(service)
    if spec.type == "ExternalName":
        yield from _external_name(spec.external_name)
    else:
        yield from _cluster_ips(service)
    for i, address in enumerate(spec.external_ips):
        if fault := remote_address_fault(address):
            yield _Finding(f"spec.externalIPs[{i}]", *fault)
    yield from _one_of("spec.sessionAffinity", spec.session_affinity, ("None", "ClientIP"))
    config = spec.session_affinity_config
    if config is not None and config.client_ip is not None:
        field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        seconds = config.client_ip.timeout_seconds
        if not 1 <= seconds <= 86400:
            yield _Finding(field, f"{seconds} s is out of range", "write 1 to 86400 seconds")
    policies = ("Cluster", "Local")
    yield from _one_of("spec.internalTrafficPolicy", spec.internal_traffic_policy, policies)
    if spec.external_traffic_policy:
        yield from _one_of("spec.externalTrafficPolicy", spec.external_traffic_policy, policies)


def _service_ports(service: Service) -> _Findings:
    ports = service.spec.ports
    if not ports and not service.headless and service.spec.type != "ExternalName":
        yield _Finding("spec.ports", "there are no ports", "add one, such as '- port: 80'")
    names: dict[object, str] = {}
    numbers: dict[object, str] = {}
    for i, port in enumerate(ports):
        field = f"spec.ports[{i}]"
        if port.name:
            yield from _label(f"{field}.name", port.name)
            yield from _unique(f"{field}.name", port.name, show(port.name), names)
        elif len(ports) > 1:
            message = "a port among several has no name"
            yield _Finding(f"{field}.name", message, "add a name to each port")
        yield from _one_of(f"{field}.protocol", port.protocol, PROTOCOLS)
        yield from _port(f"{field}.port", port.port)
        key = (port.protocol, port.port)
        yield from _unique(f"{field}.port", key, f"{port.port}/{port.protocol}", numbers)
        # 0 and "" mean "the same as port" to the API server, as no targetPort at all does.
        if isinstance(target := port.target_port or port.port, str):
            yield from _port_name(f"{field}.targetPort", target)
        elif target != port.port:
            yield from _port(f"{field}.targetPort", target)
        if port.node_port:
            yield from _port(f"{field}.nodePort", port.node_port)


def _port_name(field: str, name: str) -> _Findings:
    if name.isdecimal():
        yield _Finding(field, f"{show(name)} is text", "write the number without quotes")
    elif not is_port_name(name):
        yield _Finding(field, f"{show(name)} is not a port name", MEND_PORT_NAME)


def _external_name(name: str) -> _Findings:
    if not name:
        yield _Finding("spec.externalName", "there is no externalName", "add the DNS name it is")
    elif not is_subdomain(name.removesuffix(".").lower()):
        yield _Finding("spec.externalName", f"{show(name)} is not a DNS name", MEND_SUBDOMAIN)


def _cluster_ips(service: Service) -> _Findings:
    spec = service.spec
    yield from _families(service)
    if service.headless:
        if spec.type != "ClusterIP":
            mend = "write type: ClusterIP, or leave clusterIP out"
            yield _Finding("spec.clusterIP", f"None does not go with type {spec.type}", mend)
        if spec.cluster_ips not in ((), ("None",)):
            yield _Finding("spec.clusterIPs", "clusterIP is None", "leave clusterIPs out")
        return
    if spec.cluster_ip and (fault := remote_address_fault(spec.cluster_ip)):
        yield _Finding("spec.clusterIP", *fault)
    if spec.cluster_ips and spec.cluster_ips[0] != spec.cluster_ip:
        message = f"{show(spec.cluster_ips[0])} differs from clusterIP {show(spec.cluster_ip)}"
        yield _Finding("spec.clusterIPs[0]", message, "write the same address in both")
    if len(spec.cluster_ips) > 2:
        message = f"there are {len(spec.cluster_ips)} addresses"
        yield _Finding("spec.clusterIPs", message, "write at most one of each family")
        return
    versions: dict[object, str] = {}
    for i, address in enumerate(spec.cluster_ips or (spec.cluster_ip,) * bool(spec.cluster_ip)):
        field = f"spec.clusterIPs[{i}]" if spec.cluster_ips else "spec.clusterIP"
        if fault := remote_address_fault(address):
            if i:  # the first was reported as clusterIP, or differs from it
                yield _Finding(field, *fault)
            continue
        family = f"IPv{ipaddress.ip_address(address).version}"
        yield from _unique(field, family, f"the family {family} of {address}", versions)
        if i < len(spec.ip_families) and spec.ip_families[i] != family:
            message = f"{address} is {family}, but ipFamilies[{i}] is {show(spec.ip_families[i])}"
            yield _Finding(field, message, "make them agree, or leave ipFamilies out")


def _families(service: Service) -> _Findings:
    spec = service.spec
    seen: dict[object, str] = {}
    for i, family in enumerate(spec.ip_families):
        yield from _one_of(f"spec.ipFamilies[{i}]", family, FAMILIES)
        yield from _unique(f"spec.ipFamilies[{i}]", family, show(family), seen)
    policy = spec.ip_family_policy
    if policy:
        known = ("SingleStack", "PreferDualStack", "RequireDualStack")
        yield from _one_of("spec.ipFamilyPolicy", policy, known)
    if policy == "SingleStack" and max(len(spec.ip_families), len(spec.cluster_ips)) > 1:
        mend = "write PreferDualStack, or only one family"
        yield _Finding("spec.ipFamilyPolicy", "SingleStack does not go with two families", mend)


def _endpoint_slice(slice_: EndpointSlice) -> _Findings:
    yield from _names(slice_)
    if not slice_.service:
        message = "there is no label kubernetes.io/service-name, so it belongs to no Service"
        mend = "add the label with the Service's name"
        yield _Finding("metadata.labels", message, mend, "warning")
    family = slice_.address_type
    if family == "FQDN":
        mend = "write addressType IPv4 or IPv6 and addresses"
        yield _Finding("addressType", "FQDN is not supported", mend)
        return
    yield from _one_of("addressType", family, FAMILIES)
    for i, endpoint in enumerate(slice_.endpoints or ()):
        if not endpoint.addresses:
            yield _Finding(f"endpoints[{i}].addresses", "there is no address", "add one")
        if family in FAMILIES:
            for k, address in enumerate(endpoint.addresses):
                if fault := remote_address_fault(address, family):
                    yield _Finding(f"endpoints[{i}].addresses[{k}]", *fault)
        if endpoint.hostname:
            yield from _label(f"endpoints[{i}].hostname", endpoint.hostname)
    names: dict[object, str] = {}
    for i, port in enumerate(slice_.ports or ()):
        if port.name:
            yield from _label(f"ports[{i}].name", port.name)
        yield from _unique(f"ports[{i}].name", port.name or "", show(port.name or ""), names)
        yield from _one_of(f"ports[{i}].protocol", port.protocol, PROTOCOLS)
        if port.port is not None:
            yield from _port(f"ports[{i}].port", port.port)


def _pod(pod: Pod) -> _Findings:
    yield from _names(pod)
    containers = [(f"spec.containers[{i}]", c) for i, c in enumerate(pod.spec.containers)]
    containers += [(f"spec.initContainers[{i}]", c) for i, c in enumerate(pod.spec.init_containers)]
    for field, container in containers:
        for i, port in enumerate(container.ports):
            if port.name:
                yield from _port_name(f"{field}.ports[{i}].name", port.name)
            yield from _one_of(f"{field}.ports[{i}].protocol", port.protocol, PROTOCOLS)
            yield from _port(f"{field}.ports[{i}].containerPort", port.container_port)
    for name in ("hostname", "subdomain"):
        if value := getattr(pod.spec, name):
            yield from _label(f"spec.{name}", value)
    yield from _pod_status(pod)


def _pod_status(pod: Pod) -> _Findings:
    status = pod.status
    versions: dict[object, str] = {}
    addresses = [("status.podIP", status.pod_ip)] if status.pod_ip else []
    pod_ips = [(f"status.podIPs[{i}].ip", ip.ip) for i, ip in enumerate(status.pod_ips)]
    for field, address in addresses + pod_ips:
        if fault := remote_address_fault(address):
            yield _Finding(field, *fault)
        elif field != "status.podIP":
            family = f"IPv{ipaddress.ip_address(address).version}"
            yield from _unique(field, family, f"the family {family} of {address}", versions)
    if status.pod_ip and status.pod_ips and status.pod_ips[0].ip != status.pod_ip:
        message = f"{show(status.pod_ips[0].ip)} differs from podIP {show(status.pod_ip)}"
        yield _Finding("status.podIPs[0].ip", message, "write the same address in both")
    if status.phase in ("Succeeded", "Failed"):
        return
    if not addresses and not pod_ips:
        message = "there is no podIP, so no Service can reach the pod"
        mend = "add status.podIP with the pod's address"
        yield _Finding("status.podIP", message, mend, "warning")
    elif not any(condition.type == "Ready" for condition in status.conditions):
        message = "there is no Ready condition, so the pod is not ready"
        mend = 'add {type: Ready, status: "True"} once it may take connections'
        yield _Finding("status.conditions", message, mend, "warning")
