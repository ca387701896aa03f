"""Which objects of an API server may enter, and what is wrong with them. Pure.

The API server checked them, but with the rules of its day: an object that was written long ago may
hold what it would refuse now, and is served by kube-proxy all the same. So less is refused here
than in a manifest: an address that can be no endpoint's or frontend's is passed over by itself, and
only a Service's own address or a port that is no number a map can hold keeps an object out.
"""

from __future__ import annotations

import re
import socket
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from msgspec.structs import replace as with_fields

from pointsman.events import Problem
from pointsman.objects import EndpointSlice, Namespace, Object, Pod, Service
from pointsman.validate import validate

_Item = TypeVar("_Item")

# What becomes bytes in a map and can't be left out of the object.
_NEEDED = re.compile(
    r"addressType|spec\.clusterIPs?(\[\d\])?|status\.podIPs?(\[\d+\]\.ip)?|spec\.cidrs\[\d+\]"
    r"|(spec\.)?ports\[\d+\]\.(protocol|port|nodePort|targetPort)"
    r"|spec\.(initC|c)ontainers\[\d+\]\.ports\[\d+\]\.(protocol|containerPort|hostPort|hostIP)"
)
_ITEM = re.compile(
    r"(?P<list>endpoints)\[(?P<index>\d+)\]\.addresses(\[\d+\])?"
    r"|(?P<list2>spec\.externalIPs|status\.loadBalancer\.ingress)\[(?P<index2>\d+)\](\.ip)?"
)
_AS_IT_IS = "the API server let it in, so it is in force"


def admit(obj: Object) -> tuple[Object | None, tuple[Problem, ...]]:
    """The object without the addresses that must not become map bytes, None if nothing of it may
    enter, and what an operator should know. An "error" goes with None only."""
    match obj:
        case Namespace():
            return obj, ()
        case EndpointSlice() if obj.address_type == "FQDN":
            return with_fields(obj, endpoints=()), (_names(obj),) if obj.endpoints else ()
        case EndpointSlice() if plain(obj):
            return obj, ()
    problems = validate(obj)
    if not problems:
        return obj, ()
    if isinstance(obj, Pod):  # a Pod that is not ready, or has no address yet, is nothing special
        problems = [problem for problem in problems if problem.severity == "error"]
    kept: list[Problem] = []
    dropped: dict[str, set[int]] = defaultdict(set)
    for problem in problems:
        if problem.field.startswith("spec.loadBalancerSourceRanges["):
            continue  # whoever resolves the Service says what comes of it
        if problem.severity == "error":
            if item := _ITEM.fullmatch(problem.field):
                name, index = item["list"] or item["list2"], item["index"] or item["index2"]
                dropped[name].add(int(index))
                message = f"{problem.message}, so it is passed over"
                problem = replace(problem, message=message, severity="warning")
            elif not _NEEDED.fullmatch(problem.field):
                problem = replace(problem, mend=f"{_AS_IT_IS}; {problem.mend}", severity="warning")
        kept.append(problem)
    if any(problem.severity == "error" for problem in kept):
        return None, tuple(kept)
    return _without(obj, dropped), tuple(kept)


def plain(piece: EndpointSlice) -> bool:
    """Whether `validate` is not needed: there may be a hundred thousand endpoints."""
    family = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}.get(piece.address_type)
    if family is None:
        return False
    try:
        for endpoint in piece.endpoints or ():
            for address in endpoint.addresses:
                if not _common(socket.inet_pton(family, address)):
                    return False
            if not endpoint.addresses:
                return False
    except (OSError, ValueError):
        return False
    return all(0 < (port.port or 1) < 65536 for port in piece.ports or ())


def _names(piece: EndpointSlice) -> Problem:
    return Problem(
        "endpoints that are names are not served, as kube-proxy does not",
        "write addresses, or a Service of type ExternalName",
        object=str(piece.ref),
        field="addressType",
        severity="warning",
        reason="AddressTypeNotServed",
    )


def _common(address: bytes) -> bool:
    """No special address: neither loopback, unspecified, link-local, multicast nor IPv4-mapped."""
    first = address[0]
    if len(address) == 4:
        return 0 < first < 224 and first != 127 and address[:2] != b"\xa9\xfe"
    return first != 0 and first < 0xFE


def _without(obj: Object, dropped: dict[str, set[int]]) -> Object:
    if isinstance(obj, EndpointSlice) and dropped:
        endpoints = tuple(_others(obj.endpoints or (), dropped["endpoints"]))
        return with_fields(obj, endpoints=endpoints)
    if isinstance(obj, Service) and dropped:
        balancer = obj.status.load_balancer
        ingress = tuple(_others(balancer.ingress, dropped["status.loadBalancer.ingress"]))
        external_ips = tuple(_others(obj.spec.external_ips, dropped["spec.externalIPs"]))
        return with_fields(
            obj,
            spec=with_fields(obj.spec, external_ips=external_ips),
            status=with_fields(obj.status, load_balancer=with_fields(balancer, ingress=ingress)),
        )
    return obj


def _others(items: Iterable[_Item], without: set[int]) -> Iterable[_Item]:
    return (item for i, item in enumerate(items) if i not in without)
