"""What a client on a node gets at an address: the words both proxies are compared in."""

from __future__ import annotations

import socket
from typing import NamedTuple

#: Who asks: a process in the host's network namespace, or one in a pod's.
HOST, POD = "host", "pod"
CLIENTS = (HOST, POD)

#: Verdicts. `ALONE`: the packet goes on to the address as it is.
ENDPOINTS, REJECT, UNREACHABLE, DROP, ALONE = (
    "endpoints", "reject", "unreachable", "drop", "alone"
)  # fmt: skip


class Target(NamedTuple):
    """What a client dials; `protocol` is "tcp", "udp" or "sctp"."""

    address: str
    port: int
    protocol: str

    @property
    def family(self) -> int:
        return 6 if ":" in self.address else 4

    def __str__(self) -> str:
        return f"{join(self.address, self.port)}/{self.protocol}"


class Answer(NamedTuple):
    """`endpoints` as "10.244.0.7:80", each of which the client may get; `affinity` in seconds."""

    verdict: str
    endpoints: frozenset[str] = frozenset()
    affinity: int = 0

    def __str__(self) -> str:
        if self.verdict != ENDPOINTS:
            return self.verdict
        kept = f", kept for {self.affinity} s" if self.affinity else ""
        return ", ".join(sorted(self.endpoints)) + kept


def join(address: str, port: int) -> str:
    """10.0.0.1:80 or [fd00::1]:80."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def plain(address: str) -> str:
    """The one way to write an address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.inet_ntop(family, socket.inet_pton(family, address))
