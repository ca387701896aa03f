"""Where Pointsman does on purpose what kube-proxy does not: the only differences that are allowed.

Each choice says when a difference is its own. docs/kube-proxy-differences.md is made from here
(`render`), and a test keeps the two the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from ipaddress import ip_address
from typing import Protocol

from tests.cluster.compare.answers import (
    ALONE,
    DROP,
    ENDPOINTS,
    HOST,
    REJECT,
    UNREACHABLE,
    Answer,
    Target,
)
from tests.cluster.compare.facts import Facts, cluster_ips, ingress_ips, is_usable, labels
from tests.cluster.compare.nft import FIREWALL
from tests.cluster.compare.world import HEADLESS, PROXY_NAME


class Sides(Protocol):
    """Both proxies of a node."""

    name: str
    local: frozenset[str]
    primary: dict[int, str]
    refuses_unused: bool

    def ours(self, client: str, target: Target) -> Answer: ...
    def theirs(self, client: str, target: Target, *, without: str = "") -> Answer: ...


@dataclass(frozen=True)
class Case:
    """A client on a node that gets different answers."""

    sides: Sides
    facts: Facts
    client: str
    target: Target
    ours: Answer
    theirs: Answer

    @cached_property
    def unfiltered(self) -> Answer:
        """Theirs if there were no loadBalancerSourceRanges."""
        return self.sides.theirs(self.client, self.target, without=FIREWALL)

    @cached_property
    def as_own_node_port(self) -> Answer:
        """Ours for the same port at this node's primary address."""
        own = self.target._replace(address=self.sides.primary[self.target.family])
        return self.sides.ours(self.client, own)

    @property
    def is_loopback(self) -> bool:
        return ip_address(self.target.address).is_loopback

    def possible(self, answer: Answer) -> bool:
        """Whether one of the owners could give this answer, whatever slice is believed."""
        for service, port in self.facts.owners(self.target):
            known = self.facts.endpoints(service, port, self.target.family)
            usable = {e for e, copies in known.items() if any(map(is_usable, copies))}
            certain = {e for e, copies in known.items() if all(map(is_usable, copies))}
            if answer.verdict == ENDPOINTS and answer.endpoints <= usable:
                return True
            if answer.verdict == REJECT and not certain:
                return True
            local = service["spec"].get("internalTrafficPolicy") == "Local"
            if answer.verdict in (DROP, UNREACHABLE) and local:
                return True
        return False


@dataclass(frozen=True)
class Choice:
    """`section` is the heading of docs/services.md that says more. `by_chance`: whether it shows
    depends on the order in which kube-proxy happens to go through a map of Go's."""

    name: str
    sentence: str
    section: str
    applies: Callable[[Case], bool]
    by_chance: bool = False


def _sctp(case: Case) -> bool:
    return case.target.protocol == "sctp" and case.ours.verdict == ALONE


def _headless_label(case: Case) -> bool:
    having = case.facts.having(case.target.address) + [
        service for service, _ in case.facts.owners(case.target)
    ]
    labelled = any(HEADLESS in labels(s) and PROXY_NAME not in labels(s) for s in having)
    return labelled and case.ours.verdict == ALONE


def _unused_cluster_ip(case: Case) -> bool:
    address = case.target.address
    if case.theirs.verdict != DROP or not case.facts.in_service_cidr(address):
        return False
    owner = case.facts.cluster_ips.get(address)
    if owner and PROXY_NAME not in labels(owner):
        return False
    refused = case.sides.refuses_unused and not owner
    return case.ours.verdict == (REJECT if refused else ALONE)


def _cluster_ip_on_node(case: Case) -> bool:
    address = case.target.address
    held = address in case.sides.local and address in case.facts.cluster_ips
    return held and case.ours.verdict == ALONE


def _remote_node(case: Case) -> bool:
    elsewhere = case.target.address in case.facts.of_others(case.sides.name)
    return elsewhere and case.theirs.verdict == ALONE and case.ours == case.as_own_node_port


def _localhost(case: Case) -> bool:
    alone = case.client == HOST and case.is_loopback and case.theirs.verdict == ALONE
    return alone and case.ours == case.as_own_node_port


def _link_local(case: Case) -> bool:
    return ip_address(case.target.address).is_link_local and case.ours.verdict == ALONE


def _source_ranges(case: Case) -> bool:
    ranges = [
        service
        for service, _ in case.facts.owners(case.target)
        if service["spec"].get("loadBalancerSourceRanges")
        and case.target.address in ingress_ips(service)
    ]
    return bool(ranges) and case.theirs.verdict == DROP and case.ours == case.unfiltered


def _no_local_endpoint(case: Case) -> bool:
    local = [
        service
        for service, _ in case.facts.owners(case.target)
        if service["spec"].get("internalTrafficPolicy") == "Local"
        and case.target.address in cluster_ips(service)
    ]
    return bool(local) and (case.ours.verdict, case.theirs.verdict) == (UNREACHABLE, DROP)


def _claimed_twice(case: Case) -> bool:
    names = {
        (s["metadata"]["namespace"], s["metadata"]["name"])
        for s, _ in case.facts.owners(case.target)
    }
    return len(names) > 1 and case.possible(case.ours) and case.possible(case.unfiltered)


def _said_twice(case: Case) -> bool:
    family = case.target.family
    return (
        any(case.facts.contradictory(s, p, family) for s, p in case.facts.owners(case.target))
        and case.possible(case.ours)
        and case.possible(case.unfiltered)
    )


CHOICES = (
    Choice(
        "SCTP",
        "is not served; kube-proxy serves it. Half a service would be worse than none.",
        "Which Services",
        _sctp,
    ),
    Choice(
        "An unused address of a service CIDR",
        "is left alone, or refused with `--refuse-unused-cluster-ips`; kube-proxy drops. The "
        "ClusterIP of another proxy's Service is always left alone.",
        "Which Services",
        _unused_cluster_ip,
    ),
    Choice(
        "The label `service.kubernetes.io/headless` on a Service",
        "takes it out of balancing altogether, ClusterIP or not; kube-proxy goes by the label on "
        "EndpointSlices only.",
        "Which Services",
        _headless_label,
    ),
    Choice(
        "A ClusterIP that a device of the node has",
        "is left to whatever listens there; kube-proxy translates it.",
        "Which Services",
        _cluster_ip_on_node,
    ),
    Choice(
        "A NodePort at another node's address",
        "is translated on the client's node; kube-proxy leaves it to that node, which costs a hop. "
        "With `externalTrafficPolicy: Local` both leave it.",
        "Other addresses",
        _remote_node,
    ),
    Choice(
        "A NodePort at 127.0.0.1 and ::1",
        "is served to the host's own processes; kube-proxy (nftables) does not.",
        "Other addresses",
        _localhost,
    ),
    Choice(
        "A NodePort at a link-local address",
        "is left alone; kube-proxy serves it if it is told to serve all addresses.",
        "Other addresses",
        _link_local,
    ),
    Choice(
        "`loadBalancerSourceRanges`",
        "do not concern clients inside the cluster; kube-proxy drops those that are not listed.",
        "Other addresses",
        _source_ranges,
    ),
    Choice(
        "`internalTrafficPolicy: Local` without an endpoint on the node",
        "is `EHOSTUNREACH` at once; kube-proxy drops, and the client waits for its timeout.",
        "Refusals",
        _no_local_endpoint,
    ),
    Choice(
        "An external address and port that two Services claim",
        "stays with the one that had it first; with kube-proxy it is either's, and may change.",
        "Which Services",
        _claimed_twice,
        by_chance=True,
    ),
    Choice(
        "An endpoint of which two slices say different things",
        "counts as the better of both; with kube-proxy as the one that is not terminating, and "
        "of two such as either.",
        "Which endpoints",
        _said_twice,
        by_chance=True,
    ),
)


def choice_of(case: Case) -> Choice | None:
    """None: a difference that nobody meant."""
    return next((choice for choice in CHOICES if choice.applies(case)), None)


def render() -> str:
    """The list in docs/kube-proxy-differences.md."""
    return "".join(
        f"- **{c.name}** {c.sentence} "
        f"([{c.section}](services.md#{c.section.lower().replace(' ', '-')}))\n"
        for c in CHOICES
    )
