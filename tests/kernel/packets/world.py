"""The addresses, devices and Services that the packet tables are about, in both families.

A node `NODE` with two devices that lead out, `eth0` and `eth1`, a VLAN on the first, and a device
for its own pods. Beyond eth0: a gateway (clients are behind it) and another node (pods `remote` are
behind it). All neighbours are permanent, so no frame is ever sent to find one.
"""

from __future__ import annotations

from dataclasses import dataclass

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

NODE_MAC, ETH1_MAC, POD_MAC = "02:00:00:00:00:10", "02:00:00:00:01:10", "02:00:00:00:02:10"
GATEWAY_MAC, OTHER_MAC, FAR_MAC = "02:00:00:00:00:01", "02:00:00:00:00:11", "02:00:00:00:01:13"
GUEST_MAC = "02:00:00:00:02:05"
VLAN = 5
#: The MTU of the route to `narrow` endpoints; locked, else what is forwarded may have the device's.
NARROW = 1400
FIRST_PORT, LAST_PORT = 61000, 65535


@dataclass(frozen=True)
class Family:
    """The same places by their addresses of one family."""

    version: int
    any: str
    node: str  # on eth0
    node1: str  # on eth1
    node5: str  # on the VLAN
    gateway: str
    other: str  # another node
    far_node: str  # one beyond eth1
    router: str  # somewhere on the way
    client: str
    neighbour: str  # a client on the VLAN, without a gateway
    peer: str  # an endpoint on the VLAN
    stranger: str  # a client that no source range has
    welcome: tuple[str, int]  # the source range of `client`, with its bits
    local: str  # endpoints on this node, on another, beyond eth1, behind a small MTU
    remote: str
    remote2: str
    far: str
    narrow: str
    lost: str  # its next hop has no neighbour
    guest: str  # a pod whose sockets no hook sees
    vip: str  # addresses of load balancers
    vip2: str
    cluster_ip: str
    unknown: str  # nobody's

    def __repr__(self) -> str:
        return f"IPv{self.version}"

    @property
    def bits(self) -> int:
        return 32 if self.version == 4 else 128

    def ip(self, source: str, destination: str, ttl: int = 64, **more: object) -> Packet:
        if self.version == 4:
            return IP(src=source, dst=destination, ttl=ttl, **more)
        return IPv6(src=source, dst=destination, hlim=ttl, **more)

    def tcp(
        self,
        source: tuple[str, int],
        destination: tuple[str, int],
        flags: str = "S",
        data: bytes = b"",
        ttl: int = 64,
        **more: object,
    ) -> Packet:
        ip = self.ip(source[0], destination[0], ttl, **more)
        return ip / TCP(sport=source[1], dport=destination[1], flags=flags, seq=7) / Raw(data)

    def udp(
        self,
        source: tuple[str, int],
        destination: tuple[str, int],
        data: bytes = b"datagram",
        ttl: int = 64,
        **more: object,
    ) -> Packet:
        ip = self.ip(source[0], destination[0], ttl, **more)
        return ip / UDP(sport=source[1], dport=destination[1]) / Raw(data)


V4 = Family(
    version=4,
    any="0.0.0.0",
    node="192.0.2.10",
    node1="198.18.0.10",
    node5="198.18.5.10",
    gateway="192.0.2.1",
    other="192.0.2.11",
    far_node="198.18.0.13",
    router="198.51.100.1",
    client="198.51.100.7",
    neighbour="198.18.5.100",
    peer="198.18.5.101",
    stranger="203.0.113.200",
    welcome=("198.51.100.0", 24),
    local="10.244.1.5",
    remote="10.244.2.5",
    remote2="10.244.2.6",
    far="10.244.3.5",
    narrow="10.244.4.5",
    lost="10.244.5.5",
    guest="10.244.1.9",
    vip="203.0.113.80",
    vip2="203.0.113.81",
    cluster_ip="10.96.0.7",
    unknown="203.0.113.99",
)
V6 = Family(
    version=6,
    any="::",
    node="2001:db8:1::10",
    node1="2001:db8:2::10",
    node5="2001:db8:5::10",
    gateway="2001:db8:1::1",
    other="2001:db8:1::11",
    far_node="2001:db8:2::13",
    router="2001:db8:100::1",
    client="2001:db8:100::7",
    neighbour="2001:db8:5::100",
    peer="2001:db8:5::101",
    stranger="2001:db8:200::200",
    welcome=("2001:db8:100::", 64),
    local="fd00:244:1::5",
    remote="fd00:244:2::5",
    remote2="fd00:244:2::6",
    far="fd00:244:3::5",
    narrow="fd00:244:4::5",
    lost="fd00:244:5::5",
    guest="fd00:244:1::9",
    vip="2001:db8:80::80",
    vip2="2001:db8:80::81",
    cluster_ip="fd00:96::7",
    unknown="2001:db8:80::99",
)
FAMILIES = (V4, V6)

#: NodePorts by what is behind them; the load balancers' addresses have the same at port - 30000.
REMOTE, LOCAL, FAR, NARROW_PORT, LOST = 30080, 30081, 30082, 30083, 30084
EMPTY, ONLY_LOCAL, NONE_LOCAL, MANY, STICKY = 30085, 30086, 30087, 30088, 30089
#: Ports of load balancers only.
RANGED = 443
#: The port of every endpoint.
TARGET = 8080
#: A client's port that this node may use for itself, and one that it may not.
IN_RANGE, OUT_OF_RANGE = 61234, 40000


def arriving(packet: Packet, *, source: str = GATEWAY_MAC, to: str = NODE_MAC) -> Packet:
    """As a frame that eth0 receives."""
    return Ether(src=source, dst=to) / packet


def leaving(packet: Packet, to: str = OTHER_MAC, *, source: str = NODE_MAC) -> Packet:
    """As a frame that goes out."""
    return Ether(src=source, dst=to) / packet


def tagged(frame: Packet, vlan: int = VLAN) -> Packet:
    """The same frame with an 802.1Q tag."""
    return Ether(src=frame.src, dst=frame.dst) / Dot1Q(vlan=vlan) / frame.payload


__all__ = ["FAMILIES", "ICMP", "V4", "V6", "Family", "arriving", "leaving", "tagged"]
