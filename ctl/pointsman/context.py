"""What the rules for Services need to know beyond the objects: this node, its operator's will."""

from __future__ import annotations

from dataclasses import dataclass

from pointsman.values import Address


@dataclass(frozen=True, slots=True)
class Ejection:
    """When an endpoint whose connects fail is passed over, and for how long. Times in seconds; a
    count or percentage of 0 is never reached."""

    #: Connects that failed one after the other; or, of late, so many percent of so many at least.
    consecutive_failures: int = 5
    failure_percent: int = 50
    minimum_connects: int = 20
    #: The first time, doubled for each further one, up to the longest.
    shortest: float = 10
    longest: float = 300
    #: Share of a set that may be passed over at a time.
    most_percent: int = 30
    #: How long one connection has to show that the endpoint is well again.
    trial: float = 3


@dataclass(frozen=True, slots=True)
class Policy:
    """The operator's choices. The defaults are kube-proxy's."""

    #: Services with the label service.kubernetes.io/service-proxy-name are served if it is this.
    proxy_name: str = ""
    #: CIDRs, or "primary": at which addresses of a node its NodePorts answer; () is all of them.
    node_port_addresses: tuple[str, ...] = ()
    #: First and last NodePort. hostPorts among them are not served.
    node_port_range: tuple[int, int] = (30000, 32767)
    #: NodePorts at 127.0.0.0/8 and ::1, for the host's own processes.
    localhost_node_ports: bool = True
    #: Which spec.externalIPs are translated: "all", "local" (those of this node), "none".
    external_ips: str = "all"
    #: Processes of the host may not bind to NodePorts and load balancers' ports.
    bind_guard: bool = True
    #: Addresses of the service CIDRs that no Service has are refused.
    refuse_unused_cluster_ips: bool = False
    #: What Services without such annotations get: values of those of `choice`.
    algorithm: str = "random"
    outlier_ejection: str = "off"
    #: For all Services.
    ejection: Ejection = Ejection()


@dataclass(frozen=True, slots=True)
class Context:
    """This node as it is now."""

    policy: Policy = Policy()
    #: Name of this node's Node object, "" if it is not known.
    node_name: str = ""
    #: Label topology.kubernetes.io/zone of that object, "" if it has none.
    zone: str = ""
    #: Addresses assigned to devices of this node, without 127.0.0.1 and ::1. A ClusterIP among
    #: them is not translated (NodeLocal DNSCache listens on the ClusterIP itself).
    local_addresses: frozenset[Address] = frozenset()
    #: InternalIP and ExternalIP addresses of the Node objects: of this one, of all others.
    own_addresses: tuple[Address, ...] = ()
    remote_addresses: frozenset[Address] = frozenset()
    #: The "primary" addresses (the first InternalIP of each family) of the other nodes.
    remote_primaries: frozenset[Address] = frozenset()
    #: Where ClusterIPs come from, as far as it is known.
    service_cidrs: tuple[str, ...] = ()

    @property
    def refused_cidrs(self) -> tuple[str, ...]:
        """CIDRs whose unused addresses are refused."""
        return self.service_cidrs if self.policy.refuse_unused_cluster_ips else ()
