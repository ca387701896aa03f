"""The built-in endpoints controller: a Service's selector and the Pods, to EndpointSlices.

Pure, and as kube-controller-manager's endpointslice controller does it, so that a manifest means
here what it means in a cluster. Two things it does are left out because nothing reads them: the
split at 100 endpoints a slice, and the empty slice of a Service without Pods. Two are done in
another way: a Pod counts even if its Node is not known, and the hints of topology-mode "Auto",
which weigh the CPUs of all nodes, are not made.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from pointsman.choice import USUAL_WEIGHT, WEIGHT, weight_of
from pointsman.objects import (
    Endpoint,
    EndpointConditions,
    EndpointHints,
    EndpointPort,
    EndpointSlice,
    ForName,
    ObjectMeta,
    ObjectReference,
    Pod,
    Service,
    ServicePort,
)

SERVICE_NAME = "kubernetes.io/service-name"
MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
HEADLESS = "service.kubernetes.io/headless"
# The first one counts if both are there.
TOPOLOGY_MODES = (
    "service.kubernetes.io/topology-aware-hints",
    "service.kubernetes.io/topology-mode",
)

_Ports = tuple[EndpointPort, ...]
#: A weight, and ports: what a slice's endpoints have in common.
_Group = tuple[int, _Ports]


def selects(service: Service, pod: Pod) -> bool:
    """True if the pod is in the Service's namespace and has every label of its selector.

    An empty selector selects nothing: such a Service has EndpointSlices of its operator's making.
    """
    selector = service.spec.selector
    return (
        bool(selector)
        and service.spec.type != "ExternalName"
        and service.metadata.namespace == pod.metadata.namespace
        and (selector or {}).items() <= pod.metadata.labels.items()
    )


def endpoint_slices(
    service: Service, pods: Iterable[Pod], zones: Mapping[str, str] = {}
) -> tuple[EndpointSlice, ...]:
    """The slices of a Service, one for each family, weight, and set of resolved ports among its
    pods.

    Equal input in any order of pods gives equal output; slices are named
    `<service>-<family>-<n>`, n from 0, in the order of their weights and ports. A name may come to
    stand for others after a change, so a Service's slices are to be replaced all at once. The
    `pods` may be those of all namespaces. Addresses must be valid (see `validate`). `zones` has,
    by the name of a node, the zone it is in (its label topology.kubernetes.io/zone).
    """
    chosen = sorted(
        (pod for pod in pods if selects(service, pod) and _has_endpoint(pod)),
        key=lambda pod: pod.metadata.name,
    )
    return tuple(
        slice_
        for family in _families(service)
        for slice_ in _slices(service, family, chosen, zones)
    )


def hints_automatic(service: Service) -> bool:
    """True if an annotation asks for hints in proportion to the CPUs of each zone (KEP-2433).

    It puts spec.trafficDistribution out of force.
    """
    annotations = service.metadata.annotations
    mode = next((annotations[name] for name in TOPOLOGY_MODES if name in annotations), "")
    return mode in ("Auto", "auto")


def _slices(
    service: Service, family: str, pods: list[Pod], zones: Mapping[str, str]
) -> Iterator[EndpointSlice]:
    groups: defaultdict[_Group, list[Endpoint]] = defaultdict(list)
    for pod in pods:
        zone = zones.get(pod.spec.node_name, "")
        if addresses := _addresses(pod, family):
            group = weight_of(pod.metadata.annotations), _ports(service, pod)
            groups[group].append(_endpoint(service, pod, addresses, zone))
    labels = dict(service.metadata.labels)
    labels.pop(HEADLESS, None)
    labels |= {SERVICE_NAME: service.metadata.name, MANAGED_BY: "pointsman"}
    if service.headless:
        labels[HEADLESS] = ""
    for n, group in enumerate(sorted(groups, key=_order)):
        weight, ports = group
        yield EndpointSlice(
            metadata=ObjectMeta(
                name=f"{service.metadata.name}-{family.lower()}-{n}",
                namespace=service.metadata.namespace,
                labels=labels,
                annotations={} if weight == USUAL_WEIGHT else {WEIGHT: str(weight)},
            ),
            address_type=family,
            endpoints=tuple(groups[group]),
            ports=ports,
        )


def _order(group: _Group) -> tuple[int, list[tuple[str, str, int]]]:
    weight, ports = group
    # Heaviest first: a canary's slice is one more, and renames no other.
    return -weight, [(port.name or "", port.protocol, port.port or 0) for port in ports]


def _has_endpoint(pod: Pod) -> bool:
    """A pod that has ended may still show an address, which another pod can have by now."""
    return pod.status.phase not in ("Succeeded", "Failed")


def _families(service: Service) -> tuple[str, ...]:
    spec = service.spec
    if spec.ip_families:
        return spec.ip_families
    addresses = spec.cluster_ips or (spec.cluster_ip,)
    if service.headless or not addresses[0]:
        return ("IPv4", "IPv6") if spec.ip_family_policy.endswith("DualStack") else ("IPv4",)
    return tuple(dict.fromkeys(map(_family, addresses)))


def _family(address: str) -> str:
    return f"IPv{ipaddress.ip_address(address).version}"


def _addresses(pod: Pod, family: str) -> tuple[str, ...]:
    status = pod.status
    addresses = [ip.ip for ip in status.pod_ips] or ([status.pod_ip] if status.pod_ip else [])
    return tuple(address for address in addresses if _family(address) == family)


def _endpoint(service: Service, pod: Pod, addresses: tuple[str, ...], zone: str) -> Endpoint:
    serving = any(c.type == "Ready" and c.status == "True" for c in pod.status.conditions)
    terminating = pod.metadata.deletion_timestamp is not None
    # serving stays the bare Ready condition: publishNotReadyAddresses changes ready alone.
    ready = service.spec.publish_not_ready_addresses or (serving and not terminating)
    named = pod.spec.subdomain == service.metadata.name
    return Endpoint(
        addresses=addresses,
        conditions=EndpointConditions(ready=ready, serving=serving, terminating=terminating),
        hostname=pod.spec.hostname if named else "",
        node_name=pod.spec.node_name,
        zone=zone,
        hints=_hints(service, pod.spec.node_name, zone) if ready else None,
        target_ref=ObjectReference(
            kind="Pod", namespace=pod.metadata.namespace, name=pod.metadata.name
        ),
    )


def _hints(service: Service, node: str, zone: str) -> EndpointHints | None:
    """What spec.trafficDistribution makes of a ready endpoint's place (KEP-4444, KEP-3015).

    Each endpoint gets what its own place gives: it is the proxy that passes over a kind of hint
    which some endpoint lacks.
    """
    distribution = service.spec.traffic_distribution
    known = ("PreferClose", "PreferSameZone", "PreferSameNode")
    if distribution not in known or hints_automatic(service):
        return None
    for_zones = (ForName(zone),) if zone else ()
    # Zones with PreferSameNode, too: for the nodes that have no endpoint of their own.
    for_nodes = (ForName(node),) if node and distribution == "PreferSameNode" else ()
    if not (for_zones or for_nodes):
        return None
    return EndpointHints(for_zones=for_zones, for_nodes=for_nodes)


def _ports(service: Service, pod: Pod) -> _Ports:
    """The Service's ports as this pod has them; a port the pod does not have is left out."""
    resolved = ((port, _target(port, pod)) for port in service.spec.ports)
    return tuple(
        EndpointPort(name=port.name, protocol=port.protocol, port=number)
        for port, number in resolved
        if number is not None
    )


def _target(port: ServicePort, pod: Pod) -> int | None:
    if not port.target_port:  # the API server's default, also for 0 and ""
        return port.port
    if isinstance(port.target_port, int):
        return port.target_port
    # Of the init containers only sidecars (KEP-753) run while the pod serves.
    sidecars = (c for c in pod.spec.init_containers if c.restart_policy == "Always")
    for container in (*pod.spec.containers, *sidecars):
        for candidate in container.ports:
            if candidate.name == port.target_port and candidate.protocol == port.protocol:
                return candidate.container_port
    return None
