"""Which hostPorts this node's pods have, as the CNI plugin portmap takes them. Pure.

Like portmap it does not ask whether a pod is ready, and a terminating pod keeps its hostPort until
it is gone. A hostPort is never translated at another node's address: only that node knows its pods.
"""

from __future__ import annotations

import ipaddress

from pointsman import abi
from pointsman.context import Context
from pointsman.events import Problem
from pointsman.names import address_fault, fitted
from pointsman.objects import ContainerPort, Pod
from pointsman.values import (
    ANY_IPV4,
    ANY_IPV6,
    PROTOCOLS,
    SCTP,
    Address,
    Backend,
    Entry,
    Frontend,
    Outside,
    PortName,
    is_ipv4,
    to_address,
)

_FLAGS = abi.constants()
_PACKETS = _FLAGS["PACKETS_OUTSIDE"] | _FLAGS["PACKETS_LOCAL"]
_HOST_NETNS = _FLAGS["SERVICE_HOST_NETNS"]
_PLACES = (_FLAGS["SLOT_HERE"],)
_ANYWHERE_HERE = _FLAGS["SERVICE_NODE_PORT"] | _FLAGS["SERVICE_THIS_NODE"]


def has_host_ports(pod: Pod) -> bool:
    """Whether any container asks for one, wherever and in whatever state the pod is."""
    containers = (*pod.spec.containers, *pod.spec.init_containers)
    return any(port.host_port for container in containers for port in container.ports)


def runs_here(pod: Pod, context: Context) -> bool:
    """Whether it is a pod of this node that has not ended; in a manifest nodeName may be left out.

    A pod that has ended may still show an address, which another pod can have by now.
    """
    here = pod.spec.node_name in ("", context.node_name)
    return here and pod.status.phase not in ("Succeeded", "Failed")


def pod_addresses(pod: Pod) -> tuple[Address, ...]:
    status = pod.status
    texts = [ip.ip for ip in status.pod_ips] or [status.pod_ip]
    return tuple(to_address(text) for text in texts if not address_fault(text))


def host_port_entries(pod: Pod, context: Context) -> tuple[tuple[Entry, ...], tuple[Problem, ...]]:
    """Every frontend of the pod's hostPorts, and which of them can't be served."""
    if not runs_here(pod, context) or pod.spec.host_network:
        return (), ()
    # The first address of each family, as the pod's other clients use it.
    addresses = {is_ipv4(address): address for address in reversed(pod_addresses(pod))}
    entries: dict[Frontend, Entry] = {}
    problems: list[Problem] = []
    for field, port in _ports(pod):
        if fault := _fault(port, addresses, context):
            where, message, mend = fault
            problems.append(
                Problem(
                    object=str(pod.ref),
                    field=f"{field}.{where}",
                    message=f"{message}: this hostPort is not served",
                    mend=mend,
                    severity="warning",
                    reason="HostPortNotServed",
                )
            )
            continue
        owner = PortName(
            pod.metadata.namespace,
            fitted(f"pod/{pod.metadata.name}"),
            f"{port.host_port}-{port.protocol.lower()}",
        )
        for address, flags in _places(port.host_ip):
            if target := addresses.get(is_ipv4(address)):
                frontend = Frontend(address, port.host_port, PROTOCOLS[port.protocol])
                backend: Backend = (target, port.container_port)
                entries.setdefault(frontend, _entry(frontend, owner, backend, flags))
    return tuple(entries.values()), tuple(problems)


def _entry(frontend: Frontend, owner: PortName, backend: Backend, flags: int) -> Entry:
    """Clients outside get it as well, and the pod sees their address; a loopback address is the
    host's own."""
    if flags & _HOST_NETNS:
        return Entry(frontend, owner, (backend,), flags=flags)
    outside = Outside((backend,), _PLACES, flags=_PACKETS)
    return Entry(frontend, owner, (backend,), flags=flags, places=_PLACES, outside=outside)


def _ports(pod: Pod) -> list[tuple[str, ContainerPort]]:
    """(field, port) of each hostPort; of the init containers only sidecars (KEP-753) have any."""
    spec = pod.spec
    containers = [(f"spec.containers[{i}]", c) for i, c in enumerate(spec.containers)]
    containers += [
        (f"spec.initContainers[{i}]", c)
        for i, c in enumerate(spec.init_containers)
        if c.restart_policy == "Always"
    ]
    return [
        (f"{field}.ports[{i}]", port)
        for field, container in containers
        for i, port in enumerate(container.ports)
        if port.host_port
    ]


def _fault(
    port: ContainerPort, addresses: dict[bool, Address], context: Context
) -> tuple[str, str, str] | None:
    """Field, reason and mend if a hostPort can't be served."""
    first, last = context.policy.node_port_range
    if PROTOCOLS.get(port.protocol, SCTP) == SCTP:
        return "protocol", f"{port.protocol} is not balanced", "use TCP or UDP"
    if not 1 <= port.host_port <= 65535:
        return "hostPort", f"{port.host_port} is not a port", "write a number from 1 to 65535"
    if first <= port.host_port <= last:
        message = f"{port.host_port} is in the range of NodePorts"
        return "hostPort", message, f"choose one outside {first}-{last}"
    if not port.host_ip:
        return None
    if fault := address_fault(port.host_ip):
        return "hostIP", *fault
    address, parsed = to_address(port.host_ip), ipaddress.ip_address(port.host_ip)
    if addresses and is_ipv4(address) not in addresses:
        message = f"the pod has no IPv{parsed.version} address"
        return "hostIP", message, "write a hostIP of the pod's family"
    local = address in context.local_addresses or address in context.own_addresses
    if not (local or parsed.is_unspecified or parsed.is_loopback):
        # Translated here, it would catch what is meant for another host.
        message = f"{port.host_ip} is no address of this node"
        return "hostIP", message, "write an address of this node, or leave hostIP out"
    return None


def _places(host_ip: str) -> list[tuple[Address, int]]:
    """Address and flags of the frontends that a valid hostIP stands for."""
    if not host_ip:
        return [(any_, _ANYWHERE_HERE) for any_ in (ANY_IPV4, ANY_IPV6)]
    address = to_address(host_ip)
    if address in (ANY_IPV4, ANY_IPV6):
        return [(address, _ANYWHERE_HERE)]
    loopback = ipaddress.ip_address(host_ip).is_loopback
    # A pod's own loopback addresses are its own.
    return [(address, _HOST_NETNS if loopback else 0)]
