"""The Kubernetes objects that Pointsman reads, in Kubernetes' words (core/v1, discovery.k8s.io/v1).

Only the fields that matter here are decoded; everything else in a manifest or a watch event is
passed over, as an API server's older client would. All values are immutable. Addresses stay
strings until `resolve` turns them into 16 bytes.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

import msgspec


class Ref(NamedTuple):
    """What names one object: kind, namespace, name."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        """Service default/web; Node worker-1 where there is no namespace."""
        return f"{self.kind} {self.namespace}/{self.name}".replace(" /", " ")

    @staticmethod
    def parse(text: str) -> Ref | None:
        """What `str` made of a Ref; None for any other text."""
        kind, _, key = text.partition(" ")
        namespace, slash, name = key.partition("/")
        if not key:
            return None
        return Ref(kind, namespace, name) if slash else Ref(kind, "", key)


class _Base(
    msgspec.Struct, frozen=True, rename="camel", kw_only=True, omit_defaults=True, gc=False
):
    """camelCase outside, snake_case inside; unknown fields are passed over.

    Decoded values hold no cycles, so the collector needs not know of them (gc=False).
    """


class ObjectMeta(_Base, frozen=True):
    name: str = ""
    namespace: str = "default"
    uid: str = ""
    resource_version: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None


class ServicePort(_Base, frozen=True, kw_only=True):
    name: str = ""
    protocol: str = "TCP"
    port: int
    target_port: int | str | None = None
    node_port: int = 0
    app_protocol: str = ""


class ClientIPConfig(_Base, frozen=True):
    timeout_seconds: int = 10800


class SessionAffinityConfig(_Base, frozen=True):
    client_ip: ClientIPConfig | None = msgspec.field(default=None, name="clientIP")


class ServiceSpec(_Base, frozen=True):
    type: str = "ClusterIP"
    selector: dict[str, str] | None = None
    ports: tuple[ServicePort, ...] = ()
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    cluster_ips: tuple[str, ...] = msgspec.field(default=(), name="clusterIPs")
    ip_families: tuple[str, ...] = ()
    ip_family_policy: str = ""
    external_name: str = ""
    external_ips: tuple[str, ...] = msgspec.field(default=(), name="externalIPs")
    session_affinity: str = "None"
    session_affinity_config: SessionAffinityConfig | None = None
    publish_not_ready_addresses: bool = False
    internal_traffic_policy: str = "Cluster"
    external_traffic_policy: str = ""
    load_balancer_source_ranges: tuple[str, ...] = ()
    load_balancer_class: str = ""
    health_check_node_port: int = 0
    traffic_distribution: str = ""


class LoadBalancerIngress(_Base, frozen=True):
    ip: str = ""
    hostname: str = ""
    #: "Proxy": the load balancer wants to see the traffic itself (KEP-1860); absent means "VIP".
    ip_mode: str | None = None


class LoadBalancerStatus(_Base, frozen=True):
    ingress: tuple[LoadBalancerIngress, ...] = ()


class ServiceStatus(_Base, frozen=True):
    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(_Base, frozen=True):
    metadata: ObjectMeta
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()

    @property
    def ref(self) -> Ref:
        return Ref("Service", self.metadata.namespace, self.metadata.name)

    @property
    def headless(self) -> bool:
        return self.spec.cluster_ip == "None"


class EndpointConditions(_Base, frozen=True):
    """A condition that is absent (None) has a meaning of its own: see KEP-1672."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ObjectReference(_Base, frozen=True):
    kind: str = ""
    namespace: str = ""
    name: str = ""


class ForName(_Base, frozen=True):
    """A zone or a node that an endpoint is meant for."""

    name: str


class EndpointHints(_Base, frozen=True):
    for_zones: tuple[ForName, ...] | None = ()
    for_nodes: tuple[ForName, ...] | None = ()


class Endpoint(_Base, frozen=True):
    addresses: tuple[str, ...]
    conditions: EndpointConditions = EndpointConditions()
    hostname: str = ""
    node_name: str = ""
    zone: str = ""
    target_ref: ObjectReference | None = None
    hints: EndpointHints | None = None


class EndpointPort(_Base, frozen=True):
    name: str | None = None
    protocol: str = "TCP"
    port: int | None = None


class EndpointSlice(_Base, frozen=True):
    metadata: ObjectMeta
    address_type: str
    endpoints: tuple[Endpoint, ...] | None = ()
    ports: tuple[EndpointPort, ...] | None = ()

    @property
    def ref(self) -> Ref:
        return Ref("EndpointSlice", self.metadata.namespace, self.metadata.name)

    @property
    def service(self) -> str:
        """The name of the Service it belongs to (same namespace), "" if it says none."""
        return self.metadata.labels.get("kubernetes.io/service-name", "")


class ContainerPort(_Base, frozen=True, kw_only=True):
    name: str = ""
    container_port: int
    protocol: str = "TCP"
    host_port: int = 0
    host_ip: str = msgspec.field(default="", name="hostIP")


class Container(_Base, frozen=True):
    name: str = ""
    ports: tuple[ContainerPort, ...] = ()
    restart_policy: str = ""


class PodSpec(_Base, frozen=True):
    containers: tuple[Container, ...] = ()
    init_containers: tuple[Container, ...] = ()
    node_name: str = ""
    host_network: bool = False
    hostname: str = ""
    subdomain: str = ""


class PodCondition(_Base, frozen=True):
    type: str
    status: str


class PodIP(_Base, frozen=True):
    ip: str


class PodStatus(_Base, frozen=True):
    phase: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    pod_ips: tuple[PodIP, ...] = msgspec.field(default=(), name="podIPs")
    conditions: tuple[PodCondition, ...] = ()


class Pod(_Base, frozen=True):
    metadata: ObjectMeta
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def ref(self) -> Ref:
        return Ref("Pod", self.metadata.namespace, self.metadata.name)


class ClusterMeta(ObjectMeta, frozen=True):
    """Of objects that are in no namespace."""

    namespace: str = ""


class NodeAddress(_Base, frozen=True):
    type: str = ""  # InternalIP, ExternalIP, Hostname, InternalDNS, ExternalDNS
    address: str = ""


class NodeStatus(_Base, frozen=True):
    addresses: tuple[NodeAddress, ...] = ()


class Taint(_Base, frozen=True):
    key: str = ""


class NodeSpec(_Base, frozen=True):
    taints: tuple[Taint, ...] | None = ()


class Node(_Base, frozen=True):
    metadata: ClusterMeta
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()

    @property
    def ref(self) -> Ref:
        return Ref("Node", "", self.metadata.name)


class Namespace(_Base, frozen=True):
    metadata: ClusterMeta

    @property
    def ref(self) -> Ref:
        return Ref("Namespace", "", self.metadata.name)


class ServiceCIDRSpec(_Base, frozen=True):
    cidrs: tuple[str, ...] = ()


class ServiceCIDR(_Base, frozen=True):
    """Where the API server takes ClusterIPs from (KEP-1880); there may be several."""

    metadata: ClusterMeta
    spec: ServiceCIDRSpec = ServiceCIDRSpec()

    @property
    def ref(self) -> Ref:
        return Ref("ServiceCIDR", "", self.metadata.name)


Object = Service | EndpointSlice | Pod | Node | Namespace | ServiceCIDR
KINDS: dict[str, type[Object]] = {
    "Service": Service,
    "EndpointSlice": EndpointSlice,
    "Pod": Pod,
    "Node": Node,
    "Namespace": Namespace,
    "ServiceCIDR": ServiceCIDR,
}
