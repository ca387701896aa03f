"""Which endpoints a Service port has for which clients: the traffic policies of both kinds. Pure.

KEP-2086 for internalTrafficPolicy; externalTrafficPolicy in meaning as kube-proxy's
pkg/proxy/topology.go. Local without an endpoint here drops as long as there are some elsewhere, so
that a load balancer in front turns to another node; without any at all it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pointsman import abi
from pointsman.context import Context
from pointsman.objects import EndpointSlice, Service, ServicePort
from pointsman.topology import categorize, places
from pointsman.values import Backend, Outside

_ABI = abi.constants()
EMPTY_REFUSE, EMPTY_UNREACHABLE = _ABI["EMPTY_REFUSE"], _ABI["EMPTY_UNREACHABLE"]
_OUTSIDE, _LOCAL = _ABI["PACKETS_OUTSIDE"], _ABI["PACKETS_LOCAL"]


class EndpointSet(NamedTuple):
    """Endpoints, where they are (() where nobody asks), and what a set without any answers."""

    endpoints: tuple[Backend, ...]
    places: tuple[int, ...]
    empty: int


class Sets(NamedTuple):
    """For clients of the ClusterIP, for those of every other address on this node, and outside."""

    cluster_ip: EndpointSet
    others: EndpointSet
    outside: Outside | None


def endpoint_sets(
    service: Service,
    slices: Sequence[EndpointSlice],
    ipv4: bool,
    port: ServicePort,
    context: Context,
    *,
    exposed: bool,
) -> Sets:
    """`exposed`: whether the port has an address beside the ClusterIP. Only then it is asked where
    each endpoint is."""
    spec = service.spec
    which = "IPv4" if ipv4 else "IPv6", port.name, port.protocol, context
    choice = categorize(slices, *which)
    where = places(slices, *which) if exposed else {}
    others = _set(choice.cluster, EMPTY_REFUSE, where)
    local = others
    if "Local" in (spec.internal_traffic_policy, spec.external_traffic_policy):
        local = _set(choice.local, EMPTY_UNREACHABLE if choice.exist else EMPTY_REFUSE, where)
    inside = local if spec.internal_traffic_policy == "Local" else others
    if not exposed:
        return Sets(inside, others, None)
    chosen, flags = others, _OUTSIDE
    if spec.external_traffic_policy == "Local":
        chosen, flags = local, _OUTSIDE | _LOCAL
    return Sets(inside, others, Outside(chosen.endpoints, chosen.places, chosen.empty, flags))


def _set(endpoints: tuple[Backend, ...], empty: int, where: Mapping[Backend, int]) -> EndpointSet:
    if not where:
        return EndpointSet(endpoints, (), empty)
    found = tuple(where.get(backend, 0) for backend in endpoints)
    return EndpointSet(endpoints, found if any(found) else (), empty)
