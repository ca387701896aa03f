"""From Kubernetes objects to what the maps should say, one Service at a time. Pure.

Follows kube-proxy: pkg/proxy/{serviceport,endpointslicecache,topology}.go in meaning, KEP-1669
for terminating endpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Set
from dataclasses import dataclass

from pointsman import abi
from pointsman.events import Problem
from pointsman.objects import EndpointConditions, EndpointSlice, Service, ServicePort
from pointsman.values import (
    PROTOCOLS,
    SCTP,
    Address,
    Backend,
    Entry,
    Frontend,
    PortName,
    is_ipv4,
    to_address,
)

PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"
EMPTY_REFUSE = abi.constants()["EMPTY_REFUSE"]
ALGORITHM_RANDOM = abi.constants()["ALGORITHM_RANDOM"]


@dataclass(frozen=True, slots=True)
class Context:
    """What resolving needs to know of this node."""

    #: Addresses assigned to devices of this node. A VIP among them is not translated
    #: (NodeLocal DNSCache listens on the ClusterIP itself).
    local_addresses: frozenset[Address] = frozenset()


def is_balanced(service: Service) -> bool:
    """Whether Pointsman serves this Service: kube-proxy's ShouldSkipService and label selectors."""
    spec, labels = service.spec, service.metadata.labels
    return (
        spec.cluster_ip not in ("", "None")
        and spec.type != "ExternalName"
        and PROXY_NAME_LABEL not in labels
        and HEADLESS_LABEL not in labels
    )


def cluster_addresses(service: Service) -> tuple[Address, ...]:
    texts = service.spec.cluster_ips or (service.spec.cluster_ip,)
    return tuple(to_address(text) for text in texts)


def resolve(
    service: Service, slices: Iterable[EndpointSlice], context: Context
) -> tuple[tuple[Entry, ...], tuple[Problem, ...]]:
    """Every frontend that this Service should have, and what can't be served.

    `slices` are the Service's own (label kubernetes.io/service-name, same namespace).
    """
    if not is_balanced(service):
        return (), ()
    entries: list[Entry] = []
    problems: list[Problem] = []
    relevant = [s for s in slices if HEADLESS_LABEL not in s.metadata.labels]
    problems += _not_honoured(service)
    ports = [port for port in service.spec.ports if _supported(service, port, problems)]
    names = [
        PortName(service.metadata.namespace, service.metadata.name, port.name) for port in ports
    ]
    addresses = cluster_addresses(service)
    if not context.local_addresses.isdisjoint(addresses):
        problems.append(
            Problem(
                object=str(service.ref),
                message="its ClusterIP is assigned to a device of this node, "
                "so it is not translated",
                mend="nothing to do if a local cache listens there on purpose",
                severity="warning",
            )
        )
    for address in addresses:
        if address in context.local_addresses:
            continue
        family = "IPv4" if is_ipv4(address) else "IPv6"
        for port, name in zip(ports, names, strict=True):
            entries.append(
                Entry(
                    frontend=Frontend(address, port.port, PROTOCOLS[port.protocol]),
                    owner=name,
                    endpoints=usable(relevant, family, port.name, port.protocol),
                    empty=EMPTY_REFUSE,
                    algorithm=ALGORITHM_RANDOM,
                )
            )
        if names:
            entries.append(Entry(Frontend(address, 0, 0), names[0], empty=EMPTY_REFUSE))
    return tuple(entries), tuple(problems)


def _supported(service: Service, port: ServicePort, problems: list[Problem]) -> bool:
    if PROTOCOLS[port.protocol] != SCTP:
        return True
    problems.append(
        Problem(
            object=str(service.ref),
            field=f"spec.ports[{service.spec.ports.index(port)}].protocol",
            message="SCTP is not balanced: this port is not served",
            mend="use TCP or UDP, or a headless Service",
            severity="warning",
        )
    )
    return False


def _not_honoured(service: Service) -> Iterator[Problem]:
    """What kube-proxy would do with this Service and Pointsman does not do yet."""
    spec = service.spec
    outside = "only its ClusterIP is served, from this node's own processes"
    for field, found, instead in (
        ("sessionAffinity", spec.session_affinity == "ClientIP", "endpoints are chosen at random"),
        (
            "internalTrafficPolicy",
            spec.internal_traffic_policy == "Local",
            "endpoints of all nodes are used",
        ),
        ("type", spec.type in ("NodePort", "LoadBalancer"), outside),
        ("externalIPs", bool(spec.external_ips), outside),
    ):
        if found:
            yield Problem(
                object=str(service.ref),
                field=f"spec.{field}",
                message=f"it is not honoured yet: {instead}",
                mend="leave it out, or leave this Service to another proxy",
                severity="warning",
            )


def usable(
    slices: Collection[EndpointSlice], family: str, port_name: str, protocol: str
) -> tuple[Backend, ...]:
    """The endpoints that new connections may get: the ready ones; if there is none, those that
    are terminating and still serve (KEP-1669). Merged over all slices, without duplicates, sorted.

    A condition that is absent has its meaning from KEP-1672: ready and serving count as true,
    terminating as false.
    """
    ready: set[Backend] = set()
    leaving: set[Backend] = set()
    for piece in slices:
        if piece.address_type != family:
            continue
        for number in _numbers(piece, port_name, protocol):
            for endpoint in piece.endpoints or ():
                group = _group(endpoint.conditions, ready, leaving)
                if group is not None and endpoint.addresses:
                    group.add((to_address(endpoint.addresses[0]), number))
    return tuple(sorted(ready or leaving))


def _numbers(piece: EndpointSlice, name: str, protocol: str) -> list[int]:
    return [
        port.port
        for port in piece.ports or ()
        if port.port and port.name == name and port.protocol == protocol
    ]


def _group(
    conditions: EndpointConditions, ready: set[Backend], leaving: set[Backend]
) -> set[Backend] | None:
    if conditions.ready is None or conditions.ready:
        return ready
    serving = conditions.serving is None or conditions.serving
    if serving and conditions.terminating:
        return leaving
    return None


def local_vips(entries: Iterable[Service], addresses: Set[Address]) -> list[Service]:
    """The Services that have one of these addresses as a VIP."""
    return [
        service
        for service in entries
        if is_balanced(service) and not addresses.isdisjoint(cluster_addresses(service))
    ]
