"""kube-proxy's virtual servers as `ipvsadm --save --numeric` shows them. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field

from pointsman.kubeproxy.answers import ALONE, ENDPOINTS, NODE_PORT, REJECT, Answer, Client, Target
from pointsman.ranges import Source
from pointsman.values import TCP, UDP, Address, Frontend, endpoint_text, is_ipv4, to_address

_PROTOCOLS = {"-t": TCP, "-u": UDP, "--sctp-service": 132}
#: What `-p` means without a number.
_PERSISTENCE = 300


@dataclass
class _Server:
    affinity: int
    endpoints: set[str] = field(default_factory=set)


@dataclass
class Servers:
    """Virtual servers of one family. `own` are the addresses of kube-proxy's device kube-ipvs0:
    what is there is a Service's; another address is a node's, at which NodePorts are."""

    own: frozenset[Address]
    unknown: set[str] = field(default_factory=set)
    asks_who: bool = False
    _servers: dict[Frontend, _Server] = field(default_factory=dict)

    def targets(self) -> Iterable[Target]:
        for frontend in self._servers:
            yield Target(frontend, "" if frontend.address in self.own else NODE_PORT, "")

    def ask(self, client: Client, frontend: Frontend) -> Answer:
        server = self._servers.get(frontend)
        if server is None:
            return Answer(ALONE)
        if not server.endpoints:
            return Answer(REJECT)
        return Answer(ENDPOINTS, frozenset(server.endpoints), server.affinity)

    def ranges(self, client: Client, frontend: Frontend) -> set[Source]:
        """Those that are in sets of ipset are not known here."""
        return set()


def parse_save(text: str, own: frozenset[Address], *, ipv6: bool) -> Servers | None:
    """None if there is no virtual server at all. Never raises."""
    found = Servers(own)
    for line in text.splitlines():
        try:
            words = shlex.split(line)
            if words[:1] == ["-A"] and words[1] in _PROTOCOLS:
                frontend = _frontend(words)
                if is_ipv4(frontend.address) != ipv6:
                    found._servers.setdefault(frontend, _Server(_affinity(words)))
            elif words[:1] == ["-a"] and words[1] in _PROTOCOLS:
                server = found._servers.get(_frontend(words))
                real = words[words.index("-r") + 1]
                # A weight of 0 lets open connections end, and gets no new one.
                if server and words[words.index("-w") + 1 :][:1] != ["0"]:
                    server.endpoints.add(endpoint_text(*_pair(real)))
            elif words and words[1] != "-f":  # kube-proxy has no servers of marks
                found.unknown.add(line)
        except (ValueError, IndexError):
            found.unknown.add(line)
    return found if found._servers or found.unknown else None


def _frontend(words: list[str]) -> Frontend:
    return Frontend(*_pair(words[2]), _PROTOCOLS[words[1]])


def _affinity(words: list[str]) -> int:
    if "-p" not in words:
        return 0
    rest = words[words.index("-p") + 1 :]
    return int(rest[0]) if rest and rest[0].isdigit() else _PERSISTENCE


def _pair(text: str) -> tuple[Address, int]:
    address, _, port = text.rpartition(":")
    return to_address(address.strip("[]")), int(port)
