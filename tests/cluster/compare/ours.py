"""What Pointsman has in force on a node: its pinned maps, walked as its programs do."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pointsman import explain
from pointsman.pins import Pins
from pointsman.values import (
    ANY_IPV4,
    ANY_IPV6,
    PROTOCOL_NAMES,
    PROTOCOLS,
    Frontend,
    to_address,
    to_text,
)
from pointsman.view import Glance
from tests.cluster.compare.answers import (
    ALONE,
    CLIENTS,
    ENDPOINTS,
    HOST,
    POD,
    REJECT,
    UNREACHABLE,
    Answer,
    Target,
)

_VERDICTS = {
    explain.REFUSED: REJECT,
    explain.UNREACHABLE: UNREACHABLE,
    explain.NOT_A_SERVICE: ALONE,
}
_CLIENTS = {HOST: explain.HOST, POD: explain.ELSEWHERE}
assert set(_CLIENTS) == set(CLIENTS)


class Maps:
    """The maps under `bpffs` as they are now. A context manager."""

    def __init__(self, bpffs: Path) -> None:
        self._view = Glance(Pins(bpffs).require_current().maps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._view.close()

    def targets(self) -> set[tuple[str, int, str]]:
        """As `nft.Ruleset.targets`; the wildcards of nodes' addresses have port 0, too."""
        found = set()
        for key in self._view.frontends():
            protocol = "" if key.wildcard else PROTOCOL_NAMES[key.protocol].lower()
            any_ = {ANY_IPV4: "", ANY_IPV6: "::"}.get(key.address)
            text = to_text(key.address) if any_ is None else any_
            found.add((text, key.port, protocol))
        return found

    def ask(self, client: str, target: Target) -> Answer:
        """The programs touch TCP and UDP only: see connect in bpf/sock.c."""
        protocol = PROTOCOLS[target.protocol.upper()]
        if protocol == PROTOCOLS["SCTP"]:
            return Answer(ALONE)
        frontend = Frontend(to_address(target.address), target.port, protocol)
        found = explain.explain(self._view, frontend, _CLIENTS[client])
        if found.verdict != explain.TRANSLATED:
            return Answer(_VERDICTS[found.verdict])
        affinity = found.affinity.seconds if found.affinity else 0
        return Answer(ENDPOINTS, frozenset(c.endpoint for c in found.endpoints), affinity)
