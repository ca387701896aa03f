"""Which clients a load balancer's addresses are for: spec.loadBalancerSourceRanges. Pure.

In meaning kube-proxy's pkg/proxy/serviceport.go: the ranges of a family concern its addresses, and
a family without any is open to all. Other than there a range that can't be read closes: it lets
nobody in, in no family, instead of being as if it were not written.
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from pointsman.events import Problem
from pointsman.names import cidr_fault
from pointsman.objects import Service
from pointsman.ranges import Source, parse
from pointsman.values import is_ipv4

_FIELD = "spec.loadBalancerSourceRanges"


class Admission(NamedTuple):
    """The clients of each family (True for IPv4); a family that is missing is open to all."""

    sources: dict[bool, tuple[Source, ...]]
    problems: tuple[Problem, ...] = ()


def admission(service: Service, families: Set[bool]) -> Admission:
    """`families`: those of the addresses of load balancers that are served."""
    texts = service.spec.load_balancer_source_ranges
    if not texts or not families:
        return Admission({})
    found: dict[bool, set[Source]] = {True: set(), False: set()}
    problems = []
    for i, text in enumerate(text.strip() for text in texts):
        if fault := cidr_fault(text):
            message, mend = fault
            message += ": it lets nobody in"
            problems.append(_problem(service, f"{_FIELD}[{i}]", message, mend))
        else:
            source = parse(text)
            found[is_ipv4(source[0]) and source[1] >= 96].add(source)
    if problems:
        return Admission({ipv4: tuple(sorted(found[ipv4])) for ipv4 in families}, tuple(problems))
    for ipv4 in sorted(families):
        if not found[ipv4]:
            name, other = ("IPv4", "IPv6") if ipv4 else ("IPv6", "IPv4")
            message = f"all ranges are {other}, so every {name} client is let in"
            mend = f"add a range of {name} addresses, or leave the {name} address out"
            problems.append(_problem(service, _FIELD, message, mend))
    sources = {ipv4: tuple(sorted(found[ipv4])) for ipv4 in families if found[ipv4]}
    return Admission(sources, tuple(problems))


def _problem(service: Service, field: str, message: str, mend: str) -> Problem:
    reason = "SourceRanges"
    return Problem(message, mend, "", str(service.ref), field, "warning", reason)
