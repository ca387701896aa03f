"""Which endpoints a Service port has for which clients: the traffic policies of both kinds. Pure.

KEP-2086 for internalTrafficPolicy; externalTrafficPolicy in meaning as kube-proxy's
pkg/proxy/topology.go. Local without an endpoint here drops as long as there are some elsewhere, so
that a load balancer in front turns to another node; without any at all it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pointsman import abi
from pointsman.choice import USUAL_WEIGHT
from pointsman.context import Context
from pointsman.objects import EndpointSlice, Service, ServicePort
from pointsman.shares import ELSEWHERE, drawn
from pointsman.topology import categorize, in_zone, places, weights
from pointsman.values import Backend, Outside

_ABI = abi.constants()
EMPTY_REFUSE, EMPTY_UNREACHABLE = _ABI["EMPTY_REFUSE"], _ABI["EMPTY_UNREACHABLE"]
_OUTSIDE, _LOCAL = _ABI["PACKETS_OUTSIDE"], _ABI["PACKETS_LOCAL"]
_WEIGHTED, _ZONE = _ABI["CHOICE_WEIGHTED"], _ABI["CHOICE_ZONE"]


class EndpointSet(NamedTuple):
    """Endpoints, where they are (() where nobody asks), and what a set without any answers.

    `weights` is () where all are alike; with CHOICE_ZONE in `choice`, the other bit of which is
    CHOICE_WEIGHTED, those of other zones have WEIGHT_ELSEWHERE.
    """

    endpoints: tuple[Backend, ...]
    places: tuple[int, ...]
    empty: int
    weights: tuple[int, ...] = ()
    choice: int = 0


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
    zonal: bool = False,
) -> Sets:
    """`exposed`: whether the port has an address beside the ClusterIP. Only then it is asked where
    each endpoint is. `zonal`: endpoints in this node's zone go first."""
    spec = service.spec
    which = "IPv4" if ipv4 else "IPv6", port.name, port.protocol
    choice = categorize(slices, *which, context)
    known = _Known(
        places(slices, *which, context) if exposed else {},
        weights(slices, *which),
        in_zone(slices, *which, context.zone) if zonal and context.zone else None,
    )
    others = _set(choice.cluster, EMPTY_REFUSE, known)
    local = others
    if "Local" in (spec.internal_traffic_policy, spec.external_traffic_policy):
        local = _set(choice.local, EMPTY_UNREACHABLE if choice.exist else EMPTY_REFUSE, known)
    inside = local if spec.internal_traffic_policy == "Local" else others
    if not exposed:
        return Sets(inside, others, None)
    chosen, flags = others, _OUTSIDE
    if spec.external_traffic_policy == "Local":
        chosen, flags = local, _OUTSIDE | _LOCAL
    # Nobody counts what clients outside have open: no zone has room for them, or none.
    found, _ = _weights(chosen.endpoints, known._replace(near=None))
    outside = Outside(chosen.endpoints, chosen.places, chosen.empty, flags, weights=found)
    return Sets(inside, others, outside)


class _Known(NamedTuple):
    """Where endpoints are, what they weigh, and which are in this zone (None: it matters not)."""

    where: Mapping[Backend, int]
    weights: Mapping[Backend, int]
    near: frozenset[Backend] | None


def _set(endpoints: tuple[Backend, ...], empty: int, known: _Known) -> EndpointSet:
    found = tuple(known.where.get(backend, 0) for backend in endpoints) if known.where else ()
    weights, choice = _weights(endpoints, known)
    return EndpointSet(endpoints, found if any(found) else (), empty, weights, choice)


def _weights(endpoints: tuple[Backend, ...], known: _Known) -> tuple[tuple[int, ...], int]:
    """With what they mean, CHOICE_…. A zone counts if it has some of the endpoints, of any weight,
    and not all."""
    if not known.weights and known.near is None:
        return (), 0
    found = tuple(known.weights.get(backend, USUAL_WEIGHT) for backend in endpoints)
    if known.near is not None and not known.near.issuperset(endpoints):
        near = tuple(
            weight if backend in known.near or not weight else weight | ELSEWHERE
            for backend, weight in zip(endpoints, found, strict=True)
        )
        if any(drawn(near)):
            return near, _WEIGHTED | _ZONE
    found = differing(found)
    return found, _WEIGHTED if found else 0


def differing(weights: tuple[int, ...]) -> tuple[int, ...]:
    """The same, or () where all are alike."""
    return weights if len(set(weights)) > 1 else ()
