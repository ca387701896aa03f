"""Which endpoints of one port of a Service new connections may get, seen from this node. Pure.

In meaning kube-proxy's pkg/proxy/{topology,endpointslicecache}.go: the conditions of KEP-1672, the
fallback to terminating endpoints of KEP-1669, the hints of KEP-2433 and KEP-3015.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pointsman import abi
from pointsman.choice import USUAL_WEIGHT, WEIGHT, weight_of
from pointsman.context import Context
from pointsman.objects import Endpoint, EndpointHints, EndpointSlice
from pointsman.values import Backend, to_address

_HERE, _ELSEWHERE = (abi.constants()[name] for name in ("SLOT_HERE", "SLOT_ELSEWHERE"))
_Hinted = list[tuple[Backend, EndpointHints]]


class Choice(NamedTuple):
    """The endpoints under either traffic policy, each sorted and without duplicates.

    `exist` tells an empty set that refuses (no usable endpoint anywhere) from one that drops
    (there are some, but none on this node).
    """

    cluster: tuple[Backend, ...]
    local: tuple[Backend, ...]
    exist: bool


def categorize(
    slices: Iterable[EndpointSlice], family: str, port_name: str, protocol: str, context: Context
) -> Choice:
    """The cluster set and the local set of one port of a Service, in one family ("IPv4", "IPv6").

    `slices` are the Service's own, without those labelled as headless. Each set holds the ready
    endpoints; if it has none, those that terminate and still serve. The cluster set keeps to
    hints as long as it has ready endpoints, the local set never does.

    While an endpoint moves from slice to slice it may stand in two of them, one of which is out
    of date. It counts once, as the better of both: an endpoint taken too soon fails one connect,
    one left out too soon can leave a Service without any.
    """
    ready: set[Backend] = set()
    leaving: set[Backend] = set()
    here: set[Backend] = set()
    hinted: _Hinted = []
    node = context.node_name or None  # no endpoint is on a node without a name
    for endpoints, number in _ports(slices, family, port_name, protocol):
        for endpoint in endpoints:
            addresses = endpoint.addresses
            if not addresses:
                continue
            backend = (to_address(addresses[0]), number)
            if endpoint.node_name == node:
                here.add(backend)
            conditions = endpoint.conditions
            if conditions.ready is not False:
                ready.add(backend)
                if endpoint.hints is not None:
                    hinted.append((backend, endpoint.hints))
            elif conditions.terminating and conditions.serving is not False:
                leaving.add(backend)
    cluster = _near(ready, hinted, context) or leaving
    local = (ready & here) or (leaving & here)
    # Ready endpoints somewhere keep `cluster` from being empty, whatever the hints say.
    return Choice(tuple(sorted(cluster)), tuple(sorted(local)), bool(cluster))


def places(
    slices: Iterable[EndpointSlice], family: str, port_name: str, protocol: str, context: Context
) -> dict[Backend, int]:
    """Where each endpoint is, SLOT_… of abi.h, as far as it is known.

    An endpoint in two slices is here if one of them says so, as in `categorize`.
    """
    found: dict[Backend, int] = {}
    node = context.node_name
    if not node:
        return found
    for endpoints, number in _ports(slices, family, port_name, protocol):
        for endpoint in endpoints:
            if endpoint.addresses and endpoint.node_name:
                backend = (to_address(endpoint.addresses[0]), number)
                if endpoint.node_name == node:
                    found[backend] = _HERE
                else:
                    found.setdefault(backend, _ELSEWHERE)
    return found


def weights(
    slices: Sequence[EndpointSlice], family: str, port_name: str, protocol: str
) -> dict[Backend, int]:
    """What endpoints weigh; nothing where all weigh as usual. One in two slices weighs what the
    heavier one says."""
    if not any(WEIGHT in piece.metadata.annotations for piece in slices):
        return {}
    found: dict[Backend, int] = {}
    for piece in slices:
        weight = weight_of(piece.metadata.annotations)
        for endpoints, number in _ports((piece,), family, port_name, protocol):
            for endpoint in endpoints:
                if endpoint.addresses:
                    backend = (to_address(endpoint.addresses[0]), number)
                    found[backend] = max(weight, found.get(backend, 0))
    return found if any(weight != USUAL_WEIGHT for weight in found.values()) else {}


def in_zone(
    slices: Iterable[EndpointSlice], family: str, port_name: str, protocol: str, zone: str
) -> frozenset[Backend]:
    """The endpoints of which a slice says that they are in this zone."""
    return frozenset(
        (to_address(endpoint.addresses[0]), number)
        for endpoints, number in _ports(slices, family, port_name, protocol)
        for endpoint in endpoints
        if endpoint.addresses and endpoint.zone == zone
    )


def serving(
    slices: Iterable[EndpointSlice], family: str, port_name: str, protocol: str
) -> frozenset[Backend]:
    """The endpoints that may keep the flows they have, whatever policy and topology say.

    Those that are ready or serving, terminating or not: kube-proxy's pkg/proxy/conntrack/cleanup.go
    ends the UDP flows to all others.
    """
    return frozenset(
        (to_address(endpoint.addresses[0]), number)
        for endpoints, number in _ports(slices, family, port_name, protocol)
        for endpoint in endpoints
        if endpoint.addresses
        and (endpoint.conditions.serving is not False or endpoint.conditions.ready is not False)
    )


def present(slices: Iterable[EndpointSlice], family: str, protocol: str) -> frozenset[Backend]:
    """Every endpoint there is, at whatever port of this protocol and in whatever condition:
    sockets may keep what has not left."""
    return frozenset(
        (to_address(endpoint.addresses[0]), port.port)
        for piece in slices
        if piece.address_type == family
        for port in piece.ports or ()
        if port.port and port.protocol == protocol
        for endpoint in piece.endpoints or ()
        if endpoint.addresses
    )


def _ports(
    slices: Iterable[EndpointSlice], family: str, name: str, protocol: str
) -> Iterator[tuple[tuple[Endpoint, ...], int]]:
    """The slices that have the port: their endpoints, and its number there.

    A port without a number or a name is passed over; "" is the name of a Service's only port.
    """
    for piece in slices:
        if piece.address_type == family and piece.endpoints:
            for port in piece.ports or ():
                if port.port and port.name == name and port.protocol == protocol:
                    yield piece.endpoints, port.port


def _near(ready: set[Backend], hinted: _Hinted, context: Context) -> set[Backend]:
    """Those of `ready` meant for this node; else those meant for its zone; else all of them.

    A kind of hint counts only if every ready endpoint has one and some are meant for us: anything
    else is a set of hints in the making, or one made without knowing of this node.
    """
    if len(hinted) < len(ready):
        return ready
    for ours, hints in (
        (context.node_name, [(backend, hints.for_nodes) for backend, hints in hinted]),
        (context.zone, [(backend, hints.for_zones) for backend, hints in hinted]),
    ):
        near = {b for b, names in hints for name in names or () if name.name == ours}
        if ours and near and ready == {b for b, names in hints if names}:
            return near
    return ready
