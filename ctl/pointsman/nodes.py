"""Which addresses belong to nodes, and what answers at each: this node's NodePorts or none. Pure.

Follows kube-proxy's --nodeport-addresses: pkg/proxy/util/nodeport_addresses.go, and for "primary"
cmd/kube-proxy/app/server.go. hostPorts without a hostIP answer where NodePorts do.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache

from pointsman import abi
from pointsman.context import Context, Policy
from pointsman.events import Problem
from pointsman.names import fitted, remote_address_fault
from pointsman.objects import Node, Ref
from pointsman.values import Address, Entry, Frontend, PortName, is_ipv4, to_address

ZONE_LABEL = "topology.kubernetes.io/zone"
#: In Policy.node_port_addresses: the Node object's own addresses.
PRIMARY = "primary"
LOOPBACK_IPV4, LOOPBACK_IPV6 = to_address("127.0.0.1"), to_address("::1")

_FLAGS = abi.constants()
# The order in which kube-proxy looks for a node's address.
_KINDS = ("InternalIP", "ExternalIP")
_Cidr = tuple[int, int]  # value and mask of 128 bits; IPv4 as ::ffff:a.b.c.d


def context_of(
    nodes: Iterable[Node],
    name: str,
    local_addresses: Collection[Address],
    policy: Policy,
    service_cidrs: tuple[str, ...] = (),
) -> Context:
    """What this node is, from all Node objects, its name and its devices' addresses."""
    zone = ""
    own: tuple[Address, ...] = ()
    remote: set[Address] = set()
    primaries: set[Address] = set()
    for node in nodes:
        addresses = node_addresses(node)
        if node.metadata.name == name:
            zone, own = zone_of(node), addresses
        else:
            remote.update(addresses)
            primaries |= _primaries(addresses)
    return Context(
        policy=policy,
        node_name=name,
        zone=zone,
        local_addresses=frozenset(local_addresses),
        own_addresses=own,
        remote_addresses=frozenset(remote),
        remote_primaries=frozenset(primaries),
        service_cidrs=service_cidrs,
    )


def zone_of(node: Node) -> str:
    return node.metadata.labels.get(ZONE_LABEL, "")


def node_addresses(node: Node) -> tuple[Address, ...]:
    """Its InternalIPs, then its ExternalIPs, each once. What is no address is passed over."""
    found = node.status.addresses
    texts = [a.address for kind in _KINDS for a in found if a.type == kind]
    return tuple(
        dict.fromkeys(to_address(text) for text in texts if not remote_address_fault(text))
    )


def _primaries(addresses: Iterable[Address]) -> set[Address]:
    """The first of each family."""
    first: dict[bool, Address] = {}
    for address in addresses:
        first.setdefault(is_ipv4(address), address)
    return set(first.values())


def node_entries(context: Context) -> tuple[Entry, ...]:
    """One wildcard for each address of a node, sorted: it leads on to the NodePorts.

    Addresses at which no NodePort answers get one only where their unused ports would else be
    refused. An address of another node that is on a device here, too, counts as this node's.
    """
    policy = context.policy
    owner = PortName("", fitted(f"node/{context.node_name}"), "")
    refused = _cidrs(context.refused_cidrs)
    own = _primaries(context.own_addresses)
    local = {*context.local_addresses, *context.own_addresses}
    flags: dict[Address, int] = {}
    for addresses, primaries, flag in (
        (local, own, "SERVICE_NODE"),
        (context.remote_addresses - local, context.remote_primaries, "SERVICE_REMOTE_NODE"),
    ):
        for address in filter(_from_elsewhere, addresses):
            if _accepts(policy, address, own, primaries):
                flags[address] = _FLAGS[flag]
            elif _within(address, refused):
                flags[address] = _FLAGS["SERVICE_PASS"]
    if policy.localhost_node_ports:
        for address in (LOOPBACK_IPV4, LOOPBACK_IPV6):
            if _accepts(policy, address, own, ()):
                flags[address] = _FLAGS["SERVICE_LOOPBACK"]
    return tuple(
        Entry(Frontend(address, 0, 0), owner, flags=found)
        for address, found in sorted(flags.items())
    )


def node_problems(context: Context) -> tuple[Problem, ...]:
    """Why NodePorts answer at more addresses than the operator asked for."""
    if PRIMARY not in context.policy.node_port_addresses or context.own_addresses:
        return ()
    return (
        Problem(
            object=f"Node {context.node_name}".strip(),
            field="status.addresses",
            message="this node's primary address is not known, so its NodePorts answer at all",
            mend="add a Node object of this name with an InternalIP, "
            "or write CIDRs instead of primary",
            severity="warning",
        ),
    )


def cluster_problems(context: Context, nodes: Collection[Ref]) -> Iterator[Problem]:
    """What this node's name and its operator's will do not find in the cluster. `nodes` are those
    that an API server knows."""
    if nodes and Ref("Node", "", context.node_name) not in nodes:
        yield Problem(
            object=f"Node {context.node_name}",
            message="there is no such Node, so nothing counts as being on it: neither endpoints "
            "nor Pods, and it is in no zone",
            mend="give --node-name as 'kubectl get nodes' shows it",
            reason="NodeNotFound",
        )
    if not context.policy.refuse_unused_cluster_ips:
        return
    most = _FLAGS["MAX_CIDRS"]
    if not context.service_cidrs:
        yield Problem(
            "no unused ClusterIP is refused, for the API server names no ServiceCIDR",
            "give --service-cidr, or leave --refuse-unused-cluster-ips out",
        )
    elif len(context.service_cidrs) > most:
        left = ", ".join(context.service_cidrs[most:])
        yield Problem(
            f"unused ClusterIPs of {left} are not refused: there is room for {most} ServiceCIDRs",
            "use fewer, larger ones",
            severity="warning",
        )


def _from_elsewhere(address: Address) -> bool:
    """False for what no other host can dial: the loopback addresses and fe80::/10."""
    if is_ipv4(address):
        return address[12] != 127
    return address != LOOPBACK_IPV6 and not (address[0] == 0xFE and address[1] & 0xC0 == 0x80)


def _accepts(
    policy: Policy, address: Address, own: Collection[Address], primaries: Collection[Address]
) -> bool:
    """Whether NodePorts answer at an address, by --nodeport-addresses.

    A family that the list says nothing of answers at all its addresses, as in kube-proxy: also
    with "primary", for a family of which this node has no address.
    """
    ipv4 = is_ipv4(address)
    if PRIMARY in policy.node_port_addresses:
        return address in primaries or ipv4 not in map(is_ipv4, own)
    cidrs = [cidr for cidr in _cidrs(policy.node_port_addresses) if _is_ipv4_cidr(cidr) == ipv4]
    if address == LOOPBACK_IPV4:
        # kube-proxy asks whether the CIDR has anything of 127.0.0.0/8.
        return not cidrs or any(_overlap(cidr, _cidr("127.0.0.0/8")) for cidr in cidrs)
    return not cidrs or _within(address, cidrs)


def in_cidrs(address: Address, cidrs: tuple[str, ...]) -> bool:
    """Whether one of these CIDRs of its family has the address."""
    return _within(address, _cidrs(cidrs))


def masks(cidrs: tuple[str, ...]) -> tuple[tuple[Address, Address], ...]:
    """Address and mask of each CIDR, 16 bytes in network order; IPv4 as ::ffff:a.b.c.d."""
    return tuple(
        (value.to_bytes(16, "big"), mask.to_bytes(16, "big")) for value, mask in _cidrs(cidrs)
    )


@lru_cache(maxsize=16)
def _cidrs(texts: tuple[str, ...]) -> tuple[_Cidr, ...]:
    """Raises ValueError for what is no CIDR."""
    return tuple(map(_cidr, texts))


def _cidr(text: str) -> _Cidr:
    network = ipaddress.ip_network(text, strict=False)
    free = network.max_prefixlen - network.prefixlen
    value = int.from_bytes(to_address(str(network.network_address)), "big")
    return value, (1 << 128) - (1 << free)


def _is_ipv4_cidr(cidr: _Cidr) -> bool:
    return cidr[0] >> 32 == 0xFFFF


def _within(address: Address, cidrs: Iterable[_Cidr]) -> bool:
    number, ipv4 = int.from_bytes(address, "big"), is_ipv4(address)
    return any(number & c[1] == c[0] for c in cidrs if _is_ipv4_cidr(c) == ipv4)


def _overlap(one: _Cidr, other: _Cidr) -> bool:
    mask = one[1] & other[1]
    return one[0] & mask == other[0] & mask
