"""The Service of the built-in DNS server: kube-system/kube-dns, unless the source has its own."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from pointsman.events import Changed, Listed
from pointsman.objects import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Object,
    ObjectMeta,
    Ref,
    Service,
    ServicePort,
    ServiceSpec,
)

NAMESPACE, NAME = "kube-system", "kube-dns"
REF = Ref("Service", NAMESPACE, NAME)


def dns_address(cidr: str) -> str:
    """The tenth address of the service CIDR, where kubeadm and kubelet expect the DNS Service."""
    return str(ipaddress.ip_network(cidr)[10])


class DnsService:
    """Adds the Service to a source's events as long as the source has none of that name."""

    def __init__(self, cluster_ips: Sequence[str], listen: Sequence[tuple[str, int]]) -> None:
        ports = (("dns", "UDP"), ("dns-tcp", "TCP"))
        self._service = Service(
            metadata=ObjectMeta(name=NAME, namespace=NAMESPACE, labels={"k8s-app": NAME}),
            spec=ServiceSpec(
                cluster_ip=cluster_ips[0],
                cluster_ips=tuple(cluster_ips),
                ports=tuple(ServicePort(name=n, protocol=p, port=53) for n, p in ports),
            ),
        )
        self._slices = tuple(
            EndpointSlice(
                metadata=ObjectMeta(
                    name=f"{NAME}-builtin-{i}",
                    namespace=NAMESPACE,
                    labels={"kubernetes.io/service-name": NAME},
                ),
                address_type="IPv6" if ":" in address else "IPv4",
                endpoints=(Endpoint(addresses=(address,)),),
                ports=tuple(EndpointPort(name=n, protocol=p, port=port) for n, p in ports),
            )
            for i, (address, port) in enumerate(listen)
        )

    def add(self, event: Listed | Changed) -> Listed | Changed:
        """The event with the Service in it, or, once the source has its own, without."""
        mine: tuple[Object, ...] = (self._service, *self._slices)
        if isinstance(event, Listed):
            if any(obj.ref == REF for obj in event.objects):
                return event
            return Listed((*event.objects, *mine))
        if any(obj.ref == REF for obj in event.objects):
            return Changed(event.objects, (*event.deleted, *(s.ref for s in self._slices)))
        if REF in event.deleted:
            gone = tuple(ref for ref in event.deleted if ref != REF)
            return Changed((*event.objects, *mine), gone)
        return event
