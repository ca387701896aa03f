"""What Pointsman's maps hold, asked as the rules of kube-proxy are. Pure: any `Reader` will do."""

from __future__ import annotations

from collections.abc import Iterator

from pointsman import explain
from pointsman.explainpackets import (
    DROPPED,
    FORWARDED,
    PASSED,
    REFUSED,
    Packets,
    explain_packet,
)
from pointsman.explainpackets import Client as PacketClient
from pointsman.inspect import Reader, held, is_service
from pointsman.kubeproxy.answers import (
    ALONE,
    CLUSTER_IP,
    DROP,
    ENDPOINTS,
    EXTERNAL,
    NODE_PORT,
    REJECT,
    Answer,
    Client,
    Target,
)
from pointsman.ranges import Source
from pointsman.values import SCTP, Frontend, is_ipv4

_HERE = {
    explain.TRANSLATED: ENDPOINTS,
    explain.REFUSED: REJECT,
    explain.UNREACHABLE: DROP,
    explain.NOT_A_SERVICE: ALONE,
}
_OUTSIDE = {FORWARDED: ENDPOINTS, REFUSED: REJECT, DROPPED: DROP, PASSED: ALONE}
_KINDS = {"ClusterIP": CLUSTER_IP, "NodePort": NODE_PORT, "External": EXTERNAL}


class Ours:
    """`packets` is None where clients outside are not served."""

    asks_who = True

    def __init__(self, reader: Reader, packets: Packets | None) -> None:
        self._reader, self._packets = reader, packets
        self._ranges = reader.ranges()

    def targets(self) -> Iterator[Target]:
        """Of Services only: kube-proxy has no part in hostPorts."""
        for each in held(self._reader):
            if not each.frontend.wildcard and is_service(each.name) and each.kind in _KINDS:
                yield Target(each.frontend, _KINDS[each.kind], str(each.name))

    def ranges(self, client: Client, frontend: Frontend) -> set[Source]:
        return set(self._ranges.get(self._reader.find(frontend) or -1, ()))

    def ask(self, client: Client, frontend: Frontend) -> Answer:
        """SCTP no program touches."""
        if frontend.protocol == SCTP:
            return Answer(ALONE)
        if client.here:
            found = explain.explain(self._reader, frontend, explain.HOST)
            affinity = found.affinity.seconds if found.affinity else 0
            endpoints = frozenset(each.endpoint for each in found.endpoints)
            # That all of them are full or ejected is of the moment.
            return Answer(ENDPOINTS if endpoints else _HERE[found.verdict], endpoints, affinity)
        if self._packets is None:
            return Answer(ALONE)
        packet = explain_packet(
            self._reader, self._packets, frontend, PacketClient(client.address), 0
        )
        endpoints = frozenset(each.endpoint for each in packet.endpoints)
        return Answer(_OUTSIDE[packet.verdict], endpoints)


class OneFamily:
    """What there is of one family."""

    asks_who = True

    def __init__(self, ours: Ours, *, ipv4: bool) -> None:
        self._ours, self._ipv4 = ours, ipv4
        self.ranges, self.ask = ours.ranges, ours.ask

    def targets(self) -> Iterator[Target]:
        return (t for t in self._ours.targets() if is_ipv4(t.frontend.address) == self._ipv4)
