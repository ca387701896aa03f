"""What a client gets at an address: the words in which both proxies are compared. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from pointsman.ranges import Source
from pointsman.values import Address, Frontend

#: Verdicts. `ALONE`: the packet goes on to the address as it is.
ENDPOINTS, REJECT, DROP, ALONE = "endpoints", "refused", "dropped", "left alone"
#: Kinds of targets, as far as rules tell; "" where they do not.
CLUSTER_IP, EXTERNAL, NODE_PORT = "ClusterIP", "External", "NodePort"


class Client(NamedTuple):
    """Who sends the first packet. `here`: a process on this node's own network."""

    address: Address
    here: bool


class Target(NamedTuple):
    """An address and port that is served; the address of a NodePort is ANY_IPV4 or ANY_IPV6.
    `service` is "namespace/name:port", "" where nothing says it."""

    frontend: Frontend
    kind: str
    service: str


class Answer(NamedTuple):
    """`endpoints` as "10.244.0.7:80", each of which the client may get; `affinity` in seconds."""

    verdict: str
    endpoints: frozenset[str] = frozenset()
    affinity: int = 0

    def __str__(self) -> str:
        return ", ".join(sorted(self.endpoints)) if self.verdict == ENDPOINTS else self.verdict


class Proxy(Protocol):
    """What is programmed for one proxy."""

    #: False if all clients get the same, as IPVS has it.
    asks_who: bool

    def targets(self) -> Iterable[Target]: ...
    def ranges(self, client: Client, frontend: Frontend) -> set[Source]: ...
    def ask(self, client: Client, frontend: Frontend) -> Answer: ...
