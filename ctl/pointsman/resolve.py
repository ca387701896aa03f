"""From a Service and its EndpointSlices to what the maps should say. Pure.

Follows kube-proxy in meaning: pkg/proxy/serviceport.go for the frontends, KEP-2086 for
internalTrafficPolicy, KEP-1860 for ipMode; `topology` has the endpoints of each.

Whoever asks through a socket is on this node, so to NodePorts, externalIPs and load balancers'
addresses he is an inside client: he gets the endpoints of all nodes whatever externalTrafficPolicy
says, and loadBalancerSourceRanges do not concern him. Those rules are for packets from outside, for
which such an address has a set of its own (`Outside`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pointsman import abi
from pointsman.choice import DRAIN, Choice, choice_of, sticky
from pointsman.context import Context
from pointsman.endpoints import MANAGED_BY, hints_automatic
from pointsman.endpointsets import EMPTY_REFUSE, EndpointSet, endpoint_sets
from pointsman.events import Problem
from pointsman.names import remote_address_fault
from pointsman.nodes import in_cidrs
from pointsman.objects import EndpointSlice, Service, ServicePort
from pointsman.ranges import Source
from pointsman.sourceranges import Admission, admission
from pointsman.values import (
    ANY_IPV4,
    ANY_IPV6,
    PROTOCOLS,
    SCTP,
    Address,
    Entry,
    Frontend,
    Outside,
    PortName,
    is_ipv4,
    to_address,
)

PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"
_ABI = abi.constants()
_THIS_NODE, _GUARDED = _ABI["SERVICE_THIS_NODE"], _ABI["SERVICE_GUARDED"]
_NODE_PORT, _PASS = _ABI["SERVICE_NODE_PORT"], _ABI["SERVICE_PASS"]
_RANGES = _ABI["PACKETS_RANGES"]
_EVERYBODY = Admission({})
_DAY = 86400
_AFFINITY = 10800  # seconds: the API server's default


class _External(NamedTuple):
    """A load balancer's address or an externalIP: flags of its frontends (SERVICE_…)."""

    flags: int
    balancer: bool = False


def is_balanced(service: Service, proxy_name: str = "") -> bool:
    """Whether Pointsman serves this Service: kube-proxy's ShouldSkipService and label selectors.

    `proxy_name`: Services whose label service-proxy-name has this value are served; "" stands for
    those without the label.
    """
    labels = service.metadata.labels
    return (
        _has_addresses(service)
        and labels.get(PROXY_NAME_LABEL) == (proxy_name or None)
        and HEADLESS_LABEL not in labels
    )


def _has_addresses(service: Service) -> bool:
    spec = service.spec
    return spec.cluster_ip not in ("", "None") and spec.type != "ExternalName"


def cluster_addresses(service: Service) -> tuple[Address, ...]:
    texts = service.spec.cluster_ips or (service.spec.cluster_ip,)
    return tuple(to_address(text) for text in texts)


def resolve(
    service: Service, slices: Iterable[EndpointSlice], context: Context
) -> tuple[tuple[Entry, ...], tuple[Problem, ...]]:
    """Every frontend that this Service should have, each once, and what can't be served.

    `slices` are the Service's own (label kubernetes.io/service-name, same namespace).
    """
    if not is_balanced(service, context.policy.proxy_name):
        return _passed(service, context), ()
    pieces = [piece for piece in slices if HEADLESS_LABEL not in piece.metadata.labels]
    choice = choice_of(service.metadata.annotations, context.policy)
    work = _Work(service, pieces, context, affinity_seconds(service), choice)
    work.resolve()
    return tuple(work.entries.values()), tuple(work.problems)


def _passed(service: Service, context: Context) -> tuple[Entry, ...]:
    """The ClusterIPs that another proxy serves: in use, where unused ones are refused."""
    refused = context.refused_cidrs
    if not refused or not _has_addresses(service):
        return ()
    owner = PortName(service.metadata.namespace, service.metadata.name, "")
    return tuple(
        Entry(Frontend(address, 0, 0), owner, flags=_PASS)
        for address in dict.fromkeys(cluster_addresses(service))
        if in_cidrs(address, refused) and address not in context.local_addresses
    )


def local_vips(services: Iterable[Service], addresses: Set[Address]) -> list[Service]:
    """The Services for which it matters that these addresses are this node's, or no longer."""
    return [
        service
        for service in services
        if _has_addresses(service)
        and not (
            addresses.isdisjoint(cluster_addresses(service))
            and addresses.isdisjoint(
                to_address(text)
                for text in service.spec.external_ips
                if not remote_address_fault(text)
            )
        )
    ]


@dataclass(slots=True)
class _Work:
    """One Service being resolved."""

    service: Service
    slices: list[EndpointSlice]
    context: Context
    affinity: int
    choice: Choice
    entries: dict[Frontend, Entry] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def resolve(self) -> None:
        spec, policy = self.service.spec, self.context.policy
        meta, how = self.service.metadata, self.choice.policy
        addresses = cluster_addresses(self.service)
        external = dict(self._external({is_ipv4(address) for address in addresses}))
        admitted = _EVERYBODY
        if external and spec.load_balancer_source_ranges:
            balancers = {is_ipv4(a) for a, known in external.items() if known.balancer}
            admitted = admission(self.service, balancers)
            self.problems += admitted.problems
        self._warn_of_local(addresses)
        self._warn_of_hints()
        self._warn_of_drain()
        node_port_flags = _NODE_PORT | (_GUARDED if policy.bind_guard else 0)
        if spec.external_traffic_policy == "Local":
            node_port_flags |= _THIS_NODE
        first: PortName | None = None
        for number, port in enumerate(spec.ports):
            owner = PortName(meta.namespace, meta.name, port.name)
            first = first or owner  # of any protocol: the ClusterIP refuses its other ports
            if not self._supported(port, number):
                continue
            node_port = port.node_port if spec.type in ("NodePort", "LoadBalancer") else 0
            for address in addresses:
                ipv4 = is_ipv4(address)
                near = [(a, known) for a, known in external.items() if is_ipv4(a) == ipv4]
                sets = endpoint_sets(
                    self.service,
                    self.slices,
                    ipv4,
                    port,
                    self.context,
                    exposed=bool(near or node_port),
                    zonal=bool(how and how.room),
                )
                if address not in self.context.local_addresses:
                    self._add(address, port.port, port, owner, sets.cluster_ip)
                for other, known in near:
                    sources = admitted.sources.get(ipv4) if known.balancer else None
                    outside = _limited(sets.outside, sources)
                    self._add(other, port.port, port, owner, sets.others, known.flags, outside)
                if node_port:
                    any_ = ANY_IPV4 if ipv4 else ANY_IPV6
                    self._add(
                        any_, node_port, port, owner, sets.others, node_port_flags, sets.outside
                    )
            if spec.type == "NodePort" and not port.node_port:
                first_port, last_port = policy.node_port_range
                self._warn(
                    f"spec.ports[{number}].nodePort",
                    "there is no nodePort, and none is allocated",
                    f"write one from {first_port} to {last_port}",
                    "NodePortMissing",
                )
        for address in addresses:
            if first and address not in self.context.local_addresses:
                frontend = Frontend(address, 0, 0)
                self.entries[frontend] = Entry(frontend, first, empty=EMPTY_REFUSE, policy=how)

    def _add(
        self,
        address: Address,
        number: int,
        port: ServicePort,
        owner: PortName,
        chosen: EndpointSet,
        flags: int = 0,
        outside: Outside | None = None,
    ) -> None:
        frontend = Frontend(address, number, PROTOCOLS[port.protocol])
        # An address may be given twice, and be its own ClusterIP: the first one counts.
        self.entries.setdefault(
            frontend,
            Entry(
                frontend,
                owner,
                chosen.endpoints,
                chosen.empty,
                self.choice.algorithm | chosen.choice,
                self.affinity,
                flags,
                chosen.places,
                outside,
                chosen.weights,
                self.choice.policy,
            ),
        )

    def _external(self, families: set[bool]) -> Iterator[tuple[Address, _External]]:
        """Load balancers' addresses and externalIPs; one that is both comes twice, and counts as
        what it is last."""
        spec, policy, context = self.service.spec, self.context.policy, self.context
        own = context.local_addresses.union(context.own_addresses)
        if policy.external_ips == "none" and spec.external_ips:
            self._warn(
                "spec.externalIPs",
                "they are not translated, because of --external-ips none",
                "leave them out, or run with --external-ips local or all",
                "ExternalIPsNotServed",
            )
        elif policy.external_ips != "none":
            for i, text in enumerate(spec.external_ips):
                address = self._address(f"spec.externalIPs[{i}]", text, families)
                if address and (policy.external_ips == "all" or address in own):
                    yield address, _External(0)
        if spec.type == "LoadBalancer":
            for i, ingress in enumerate(self.service.status.load_balancer.ingress):
                if ingress.ip and ingress.ip_mode in (None, "", "VIP"):
                    where = f"status.loadBalancer.ingress[{i}].ip"
                    if address := self._address(where, ingress.ip, families):
                        yield address, _External(_GUARDED if policy.bind_guard else 0, True)

    def _address(self, where: str, text: str, families: set[bool]) -> Address | None:
        """None, and a Problem, if a Service with ClusterIPs of these families can't have it."""
        if fault := remote_address_fault(text):
            self._warn(where, *fault, "AddressNotServed")
            return None
        address = to_address(text)
        if is_ipv4(address) not in families:
            self._warn(
                where,
                f"{text} is not served: the Service has no ClusterIP of its family",
                "leave it out, or make the Service dual-stack",
                "KubeProxyIncorrectIPVersion",
            )
            return None
        return address

    def _supported(self, port: ServicePort, number: int) -> bool:
        if PROTOCOLS[port.protocol] != SCTP:
            return True
        self._warn(
            f"spec.ports[{number}].protocol",
            "SCTP is not balanced: this port is not served",
            "use TCP or UDP, or a headless Service",
            "ProtocolNotServed",
        )
        return False

    def _warn_of_local(self, addresses: tuple[Address, ...]) -> None:
        if not self.context.local_addresses.isdisjoint(addresses):
            self._warn(
                "",
                "its ClusterIP is assigned to a device of this node, so it is not translated",
                "nothing to do if a local cache listens there on purpose",
                "ClusterIPOnNode",
            )

    def _warn_of_hints(self) -> None:
        """The built-in controller makes hints for trafficDistribution only."""
        if hints_automatic(self.service) and any(
            piece.metadata.labels.get(MANAGED_BY) == "pointsman" for piece in self.slices
        ):
            self._warn(
                "metadata.annotations",
                "topology hints are not made for Auto, so endpoints of all zones are used",
                "delete the annotation, and write spec.trafficDistribution: PreferSameZone",
                "TopologyHintsNotMade",
            )

    def _warn_of_drain(self) -> None:
        if self.choice.drain and (why := sticky(self.choice.algorithm, self.affinity)):
            self._warn(
                f"metadata.annotations[{DRAIN}]",
                f"it has no effect with {why}: a client would come back to the same endpoint",
                f"delete it, or do without {why}",
                "DrainWithoutEffect",
            )

    def _warn(self, where: str, message: str, mend: str, reason: str) -> None:
        ref = str(self.service.ref)
        self.problems.append(Problem(message, mend, "", ref, where, "warning", reason))


def _limited(outside: Outside | None, sources: tuple[Source, ...] | None) -> Outside | None:
    """The same for clients of these ranges only, if there are any ranges."""
    if outside is None or sources is None:
        return outside
    return replace(outside, flags=outside.flags | _RANGES, sources=sources)


def affinity_seconds(service: Service) -> int:
    """How long a client keeps its endpoint; 0 without sessionAffinity."""
    spec = service.spec
    if spec.session_affinity != "ClientIP":
        return 0
    config = spec.session_affinity_config
    seconds = config.client_ip.timeout_seconds if config and config.client_ip else _AFFINITY
    return min(max(seconds, 1), _DAY)  # what an API server would refuse today it may still have
