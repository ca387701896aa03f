"""What kube-apiserver would refuse, and what a manifest says but probably does not mean.

Pure: a typed object in, a list of Problems out, each with the field's path, what is wrong with the
value and what to write instead. A manifest never passed an API server, so this is the only gate
before addresses and ports become bytes in a BPF map. Only what can do harm further on is checked:
metadata that Pointsman never reads is left to kubectl.
"""

from __future__ import annotations

import ipaddress

from pointsman.events import Problem
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
    check_unique,
)
from pointsman.names import remote_address_fault, show
from pointsman.objects import (
    EndpointHints,
    EndpointSlice,
    Namespace,
    Node,
    Object,
    Pod,
    Service,
    ServiceCIDR,
)
from pointsman.validatepod import check_pod
from pointsman.validateservice import check_service


def validate(obj: Object) -> list[Problem]:
    """Everything wrong with `obj`, in the order of its fields; [] when it is in order.

    An "error" must keep the object out of force; with a "warning" it may enter. `where` is left
    empty for the source to fill in. Raises nothing.
    """
    match obj:
        case Service():
            findings = check_service(obj)
        case EndpointSlice():
            findings = _endpoint_slice(obj)
        case Pod():
            findings = check_pod(obj)
        case Node():
            findings = _node(obj)
        case Namespace():
            findings = _namespace(obj)
        case ServiceCIDR():
            findings = _service_cidr(obj)
    name = str(obj.ref)
    return [Problem(f.message, f.mend, "", name, f.field, f.severity, f.reason) for f in findings]


def _endpoint_slice(slice_: EndpointSlice) -> Findings:
    yield from check_name(slice_.metadata)
    yield from check_namespace(slice_.metadata)
    if not slice_.service:
        message = "there is no label kubernetes.io/service-name, so it belongs to no Service"
        mend = "add the label with the Service's name"
        yield Finding("metadata.labels", message, mend, "warning", "NoService")
    family = slice_.address_type
    if family == "FQDN":
        mend = "write addressType IPv4 or IPv6 and addresses"
        yield Finding("addressType", "FQDN is not supported", mend, reason="AddressTypeNotServed")
        return
    yield from check_one_of("addressType", family, FAMILIES)
    for i, endpoint in enumerate(slice_.endpoints or ()):
        if not endpoint.addresses:
            yield Finding(f"endpoints[{i}].addresses", "there is no address", "add one")
        if family in FAMILIES:
            for k, address in enumerate(endpoint.addresses):
                if fault := remote_address_fault(address, family):
                    yield Finding(f"endpoints[{i}].addresses[{k}]", *fault)
        if endpoint.hostname:
            yield from check_label(f"endpoints[{i}].hostname", endpoint.hostname)
        if endpoint.hints is not None:
            yield from _hints(f"endpoints[{i}].hints", endpoint.hints)
    names: dict[object, str] = {}
    for i, port in enumerate(slice_.ports or ()):
        if port.name:
            yield from check_label(f"ports[{i}].name", port.name)
        yield from check_unique(f"ports[{i}].name", port.name or "", show(port.name or ""), names)
        yield from check_one_of(f"ports[{i}].protocol", port.protocol, PROTOCOLS)
        if port.port is not None:
            yield from check_port(f"ports[{i}].port", port.port)


def _hints(path: str, hints: EndpointHints) -> Findings:
    for field, names in (("forZones", hints.for_zones), ("forNodes", hints.for_nodes)):
        for i, one in enumerate(names or ()):
            if not one.name:
                mend = "write its name, or leave the hint out"
                kind = field.removeprefix("for").removesuffix("s").lower()
                message = f"the name is empty, which is that of no {kind}"
                yield Finding(f"{path}.{field}[{i}].name", message, mend, "warning")


def _node(node: Node) -> Findings:
    yield from check_name(node.metadata)
    yield from _in_no_namespace(node)
    for i, address in enumerate(node.status.addresses):
        # What the kubelet refuses as --node-ip is no address for NodePorts either.
        if address.type in ("InternalIP", "ExternalIP") and (
            fault := remote_address_fault(address.address)
        ):
            message, mend = fault
            field = f"status.addresses[{i}].address"
            yield Finding(field, f"{message}, so it is passed over", mend, "warning")


def _namespace(namespace: Namespace) -> Findings:
    yield from check_name(namespace.metadata, is_dns_label=True)
    yield from _in_no_namespace(namespace)


def _service_cidr(cidr: ServiceCIDR) -> Findings:
    yield from check_name(cidr.metadata)
    yield from _in_no_namespace(cidr)
    for i, text in enumerate(cidr.spec.cidrs):
        try:
            ipaddress.ip_network(text)
        except ValueError as error:
            yield Finding(f"spec.cidrs[{i}]", str(error), "write e.g. 10.96.0.0/12")


def _in_no_namespace(obj: Node | Namespace | ServiceCIDR) -> Findings:
    if obj.metadata.namespace:
        message = f"a {obj.ref.kind} is in no namespace"
        yield Finding("metadata.namespace", message, "leave metadata.namespace out")
