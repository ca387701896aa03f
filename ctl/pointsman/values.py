"""The values that pass between the pure parts: frontends, endpoints and what they should be.

Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d; ports are plain ints.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

V4_PREFIX = bytes(10) + b"\xff\xff"
#: What stands for every address of a node, in the frontend of a NodePort.
ANY_IPV4, ANY_IPV6 = V4_PREFIX + bytes(4), bytes(16)
TCP, UDP, SCTP = socket.IPPROTO_TCP, socket.IPPROTO_UDP, 132
PROTOCOLS = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}
PROTOCOL_NAMES = {TCP: "TCP", UDP: "UDP", SCTP: "SCTP", 0: "any"}

Address = bytes
#: An endpoint's address and port. A plain tuple: there may be a hundred thousand of them.
Backend = tuple[Address, int]


@lru_cache(maxsize=1 << 12)
def to_address(text: str) -> Address:
    """16 bytes of an IPv4 or IPv6 address in its usual form. Raises ValueError."""
    try:
        if ":" in text:
            return socket.inet_pton(socket.AF_INET6, text)
        return V4_PREFIX + socket.inet_pton(socket.AF_INET, text)
    except OSError:
        raise ValueError(f"{text!r} is not an IP address") from None


def is_ipv4(address: Address) -> bool:
    return address.startswith(V4_PREFIX)


def to_text(address: Address) -> str:
    """As people write it; ::ffff:a.b.c.d as a.b.c.d."""
    if is_ipv4(address):
        return socket.inet_ntop(socket.AF_INET, address[12:])
    return socket.inet_ntop(socket.AF_INET6, address)


def endpoint_text(address: Address, port: int | str) -> str:
    """10.0.0.1:80 or [fd00::1]:80."""
    text = to_text(address)
    return f"{text}:{port}" if is_ipv4(address) else f"[{text}]:{port}"


class Frontend(NamedTuple):
    """What a client connects to. Port 0 with protocol 0 stands for a VIP's undefined ports."""

    address: Address
    port: int
    protocol: int

    @property
    def wildcard(self) -> bool:
        return self.port == 0

    @property
    def node_port(self) -> Frontend:
        """The NodePort's, at whatever address of a node it was dialled."""
        return self._replace(address=ANY_IPV4 if is_ipv4(self.address) else ANY_IPV6)

    def __str__(self) -> str:
        if self.wildcard:
            return endpoint_text(self.address, "*")
        return f"{endpoint_text(self.address, self.port)}/{PROTOCOL_NAMES[self.protocol]}"


class PortName(NamedTuple):
    """One port of one Service: the owner of endpoints and of their counters.

    What is no Service's has a name that none can have: "pod/web", "node/worker-1".
    """

    namespace: str
    service: str
    port: str

    def __str__(self) -> str:
        name = f"{self.namespace}/{self.service}".removeprefix("/")
        return f"{name}:{self.port}" if self.port else name


@dataclass(frozen=True, slots=True)
class Outside:
    """What clients outside of the cluster get of a frontend, a packet at a time.

    `endpoints`, `places`, `weights` and `empty` as in `Entry`, `flags` a sum of PACKETS_… of abi.h.
    With PACKETS_RANGES among them only clients in `sources` are served: (address, how many of its
    128 bits count), sorted.
    """

    endpoints: tuple[Backend, ...] = ()
    places: tuple[int, ...] = ()
    empty: int = 0
    flags: int = 0
    sources: tuple[tuple[Address, int], ...] = ()
    weights: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """How a service port deals with its endpoints, as `struct policy` of abi.h; times in ns.

    `most_percent` is the share of a set that may be ejected at a time.
    """

    watch: bool = False
    max_connections: int = 0
    room: int = 0
    streak: int = 0
    percent: int = 0
    volume: int = 0
    shortest: int = 0
    longest: int = 0
    trial: int = 0
    most_percent: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """What one frontend should be. `endpoints` is sorted and has no duplicates.

    `empty` says what a set without endpoints answers (EMPTY_… of abi.h), `affinity` is in seconds
    (0 = none), `algorithm` one of ALGORITHM_… of abi.h and a sum of CHOICE_…, `flags` a sum of
    SERVICE_… of abi.h.
    `places` says where each endpoint is (SLOT_… of abi.h); () where nobody asks, or nothing is
    known. `outside` is None for what is not served to clients outside of the cluster.
    `weights` has one for each endpoint, () where all are alike; with CHOICE_ZONE those of other
    zones have WEIGHT_ELSEWHERE of abi.h. All entries of an owner have one
    `policy`.
    """

    frontend: Frontend
    owner: PortName
    endpoints: tuple[Backend, ...] = ()
    empty: int = 0
    algorithm: int = 0
    affinity: int = 0
    flags: int = 0
    places: tuple[int, ...] = ()
    outside: Outside | None = None
    weights: tuple[int, ...] = ()
    policy: Policy | None = None
