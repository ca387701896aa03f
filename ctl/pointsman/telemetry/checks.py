"""Which Services have a health check for load balancers, and what it says here. Pure.

As kube-proxy: pkg/proxy/{serviceport,endpointschangetracker}.go and healthcheck/service_health.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pointsman.abi import constants
from pointsman.context import Context
from pointsman.nodes import LOOPBACK_IPV4, LOOPBACK_IPV6, node_entries
from pointsman.objects import EndpointSlice, Ref, Service
from pointsman.resolve import HEADLESS_LABEL, cluster_addresses, is_balanced
from pointsman.values import is_ipv4, to_text

_HERE = constants()["SERVICE_NODE"] | constants()["SERVICE_LOOPBACK"]


@dataclass(frozen=True, slots=True)
class Check:
    """`local_endpoints`: for each family of the Service ("IPv4", "IPv6"), how many addresses of
    this node are ready: one with two ports is one, and one that only terminates is none."""

    ref: Ref
    port: int
    local_endpoints: Mapping[str, int]


def checks(service: Service, slices: Iterable[EndpointSlice], context: Context) -> Check | None:
    """The check of a Service of type LoadBalancer with externalTrafficPolicy Local that has a
    healthCheckNodePort; None for all others. `slices` are the Service's own."""
    spec = service.spec
    if (
        not spec.health_check_node_port
        or (spec.type, spec.external_traffic_policy) != ("LoadBalancer", "Local")
        or not is_balanced(service, context.policy.proxy_name)
    ):
        return None
    families = {_family(address) for address in cluster_addresses(service)}
    found: dict[str, set[str]] = {family: set() for family in sorted(families)}
    for piece in slices:
        ports = any(port.port is not None for port in piece.ports or ())
        if piece.address_type in found and ports and HEADLESS_LABEL not in piece.metadata.labels:
            found[piece.address_type].update(_ready_here(piece, context.node_name))
    counts = {family: len(addresses) for family, addresses in found.items()}
    return Check(service.ref, spec.health_check_node_port, counts)


def _ready_here(piece: EndpointSlice, node: str) -> Iterable[str]:
    return (
        endpoint.addresses[0]
        for endpoint in piece.endpoints or ()
        if endpoint.addresses
        and node
        and endpoint.node_name == node
        and endpoint.conditions.ready is not False
    )


def _family(address: bytes) -> str:
    return "IPv4" if is_ipv4(address) else "IPv6"


def listen_addresses(context: Context) -> tuple[str, ...]:
    """Where health checks listen: at the addresses on this node's devices at which NodePorts
    answer; () for all addresses, if the operator did not choose any."""
    if not context.policy.node_port_addresses:
        return ()
    here = {*context.local_addresses, LOOPBACK_IPV4, LOOPBACK_IPV6}
    context = replace(context, remote_addresses=frozenset(), remote_primaries=frozenset())
    return tuple(
        to_text(entry.frontend.address)
        for entry in node_entries(context)
        if entry.flags & _HERE and entry.frontend.address in here
    )
