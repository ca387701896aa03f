"""What the rules for Services need to know beyond the objects: this node, its operator's will."""

from __future__ import annotations

from dataclasses import dataclass

from pointsman.values import Address


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
