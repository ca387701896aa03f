"""The maps as the reading commands see them, in memory: two Services and what they lead to, and
another one with all that a Service can have, on a node with its addresses."""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pointsman import abi
from pointsman.marks import fold
from pointsman.outcomes import Outcomes
from pointsman.plan import Element, Run, Slot
from pointsman.policies import NO_POLICY, PolicyElement
from pointsman.ranges import Source
from pointsman.values import TCP, UDP, Address, Backend, Entry, Frontend, PortName, to_address

FLAGS = abi.constants()
RETIRED = FLAGS["GENERATION_RETIRED"]
HOST_NETNS = 4026
_affinity_key = abi.layouts()["affinity_key"].packer("netns", "owner", "family")
_affinity = abi.layouts()["affinity"].packer("seen", "addr", "port")


def frontend(address: str, port: int, protocol: int = TCP) -> Frontend:
    return Frontend(to_address(address), port, protocol)


def backend(text: str) -> Backend:
    address, _, port = text.rpartition(":")
    return to_address(address), int(port)


@dataclass
class FakeView:
    """Maps as dicts; ids outside of them are as far outside as in the real ones."""

    keys: dict[Frontend, int] = field(default_factory=dict)
    elements: dict[int, Element] = field(default_factory=dict)
    owners: dict[int, PortName] = field(default_factory=dict)
    slot: dict[int, Slot] = field(default_factory=dict)
    loads: dict[int, tuple[int, int]] = field(default_factory=dict)
    raw: dict[str, list[tuple[bytes, bytes]]] = field(default_factory=dict)
    skipped: tuple[int, ...] = ()
    cidrs: tuple[tuple[Address, Address], ...] = ()
    host_netns: int = HOST_NETNS
    admitted: dict[int, frozenset[Source]] = field(default_factory=dict)
    stamps: dict[Run, bytes] = field(default_factory=dict)
    lines: dict[int, tuple[int, ...]] = field(default_factory=dict)
    seen: dict[int, Outcomes] = field(default_factory=dict)
    policy: dict[int, PolicyElement] = field(default_factory=dict)

    def frontends(self) -> dict[Frontend, int]:
        return dict(self.keys)

    def find(self, frontend: Frontend) -> int | None:
        return self.keys.get(frontend)

    def marked(self, address: Address) -> bool:
        return fold(address) in {fold(frontend.address) for frontend in self.keys}

    def names(self) -> dict[int, PortName]:
        return dict(self.owners)

    def service(self, ident: int) -> Element:
        if ident not in self.elements:
            raise IndexError(ident)
        return self.elements[ident]

    def slots(self, first: int, count: int) -> tuple[Slot, ...]:
        return tuple(self.slot[i] for i in range(first, first + count) if i in self.slot)

    def load(self, endpoint: int) -> tuple[int, int]:
        return self.loads.get(endpoint, (0, 0))

    def outcomes(self, endpoint: int) -> Outcomes:
        return self.seen.get(endpoint, Outcomes())

    def policies(self) -> Mapping[int, PolicyElement]:
        return self.policy

    def policy_of(self, owner: int) -> PolicyElement:
        return self.policy.get(owner, NO_POLICY)

    def port_name(self, owner: int) -> PortName | None:
        return self.owners.get(owner)

    def ports_of(
        self, services: Collection[tuple[str, str]], namespaces: Collection[str]
    ) -> Iterator[Mapping[int, PortName]]:
        for owner, name in self.owners.items():
            if name[:2] in services or name.namespace in namespaces:
                yield {owner: name}

    def columns(self, name: str, *fields: str) -> Iterator[tuple[int, tuple[list[int], ...]]]:
        """Two elements at a time."""
        if name == "services":
            found = {i: {"owner": element.owner} for i, element in self.elements.items()}
        else:
            found = {i: self._load_of(i) for i in self.loads}
        empty = dict.fromkeys(fields, 0)
        for first in range(0, max(found, default=0) + 1, 2):
            some = [found.get(i, empty) for i in (first, first + 1)]
            yield first, tuple([each[field] for each in some] for field in fields)

    def _load_of(self, ident: int) -> dict[str, int]:
        (generation, opened), known = self.loads[ident], self.outcomes(ident)
        owner = next((s.owner for s in self.slot.values() if s.endpoint == ident), 0)
        until = known.until | (FLAGS["UNTIL_TRIAL"] if known.trial else 0)
        return {
            "generation": generation, "open": opened, "owner": owner, "until": until,
            "streak": known.streak, "measured": known.measured,
        }  # fmt: skip

    def ejected(self, owner: int) -> int:
        return sum(1 for each in self.seen.values() if each.owner == owner and each.until)

    def generations(self) -> Mapping[int, int]:
        return {ident: generation for ident, (generation, _) in self.loads.items() if generation}

    def owned(self) -> list[int]:
        return [ident for ident, element in self.elements.items() if element.owner]

    def counters(self) -> dict[str, int]:
        return {"translated": 7, "refused": 1}

    def ranges(self) -> Mapping[int, frozenset[Source]]:
        return self.admitted

    def stamp(self, table: Run) -> bytes:
        return self.stamps.get(table, b"")

    def line(self, index: int) -> tuple[int, ...]:
        return self.lines[index]

    def packet_counters(self) -> dict[str, int]:
        return {"packet_here": 3, "drop_no_port": 1}

    def settings(self) -> dict[str, Any]:
        return {
            "host_netns": self.host_netns,
            "skipped": len(self.skipped),
            "cidrs": self.cidrs,
        }

    def items(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        if name == "skipped_netns":
            return iter([(struct.pack("=Q", cookie), bytes(4)) for cookie in self.skipped])
        return iter(self.raw.get(name, []))

    def add(
        self,
        frontend: Frontend,
        owner: int,
        first: int = 0,
        count: int = 0,
        *,
        affinity: int = 0,
        flags: str = "",
    ) -> int:
        """One frontend more; `flags` as "NODE GUARDED". Returns the service id."""
        ident = max(self.elements, default=0) + 1
        bits = sum(FLAGS[f"SERVICE_{flag}"] for flag in flags.split())
        self.keys[frontend] = ident
        self.elements[ident] = Element(frontend, owner, first, count, 0, affinity, bits)
        return ident

    def remember(self, netns: int, owner: int, backend: Backend, seen: int) -> None:
        """The endpoint that one client has; `seen` in ns."""
        key = _affinity_key(netns, owner, 4)
        value = _affinity(seen, backend[0], socket.htons(backend[1]))
        self.raw.setdefault("affinity", []).append((key, value))


WEB, WEB_ANY, DNS = frontend("10.96.0.1", 80), frontend("10.96.0.1", 0, 0), frontend("fd00::a", 53)
DNS, DNS_ANY = Frontend(DNS.address, 53, UDP), Frontend(DNS.address, 0, 0)
HTTP, NONE = PortName("shop", "web", "http"), PortName("default", "dns", "")
A, B, C = backend("10.0.0.1:8080"), backend("10.0.0.2:8080"), backend("fd00::5:53")


def view() -> FakeView:
    """shop/web with two endpoints, default/dns with one over IPv6, and both's other ports."""
    return FakeView(
        keys={WEB: 1, WEB_ANY: 2, DNS: 3, DNS_ANY: 4},
        elements={
            1: Element(WEB, 1, 10, 2, 0, 0),
            2: Element(WEB_ANY, 1, 0, 0, 0, 0),
            3: Element(DNS, 2, 20, 1, 0, 60),
            4: Element(DNS_ANY, 2, 0, 0, 0, 0),
        },
        owners={1: HTTP, 2: NONE},
        slot={10: Slot(A, 5, 1, 1), 11: Slot(B, 6, 3, 1), 20: Slot(C, 7, 1, 2)},
        loads={5: (1, 4), 6: (3, 2), 7: (1, 0), 8: (2 | RETIRED, 0), 9: (2 | RETIRED, 1)},
    )


ENTRIES = (
    Entry(WEB, HTTP, (A, B)),
    Entry(WEB_ANY, HTTP),
    Entry(DNS, NONE, (C,), affinity=60),
    Entry(DNS_ANY, NONE),
)

API, API_ANY = frontend("10.96.0.7", 80), frontend("10.96.0.7", 0, 0)
PODS, NODE = PortName("web", "pod/p", "8080-tcp"), PortName("", "node/n1", "")


def node_view() -> FakeView:
    """shop/api, a LoadBalancer with client affinity, its NodePort not translated at other nodes;
    shop/ext, a ClusterIP with an externalIP; the Pod web/p with a hostPort; this node's address,
    another's, and loopback."""
    maps = FakeView(
        owners={
            1: PortName("shop", "api", "http"),
            2: PortName("shop", "ext", ""),
            3: PODS,
            4: NODE,
        },
        slot={
            10: Slot(A, 5, 1, 1),
            11: Slot(B, 6, 3, 1),
            12: Slot(A, 7, 1, 2),
            13: Slot(B, 8, 1, 3),
        },
        loads={5: (1, 4), 6: (3, 2), 7: (1, 0), 8: (1, 0)},
    )
    for made, flags in (
        (API, ""), (frontend("203.0.113.9", 80), "GUARDED"),
        (frontend("0.0.0.0", 30080), "GUARDED THIS_NODE NODE_PORT"),
    ):  # fmt: skip
        maps.add(made, 1, 10, 2, affinity=60, flags=flags)
    maps.add(API_ANY, 1)
    maps.add(frontend("10.96.0.8", 443), 2, 12, 1)
    maps.add(frontend("10.96.0.8", 0, 0), 2)
    maps.add(frontend("192.0.2.1", 443), 2, 12, 1)
    maps.add(frontend("0.0.0.0", 31443), 2, 12, 1, flags="NODE_PORT")
    maps.add(frontend("0.0.0.0", 8080), 3, 13, 1, flags="THIS_NODE NODE_PORT")
    maps.add(frontend("127.0.0.1", 9090), 3, 13, 1, flags="HOST_NETNS")
    maps.add(frontend("192.0.2.1", 0, 0), 4, flags="NODE")
    maps.add(frontend("192.0.2.2", 0, 0), 4, flags="REMOTE_NODE")
    maps.add(frontend("127.0.0.1", 0, 0), 4, flags="LOOPBACK")
    maps.add(frontend("10.96.1.1", 0, 0), 4, flags="PASS")
    return maps
