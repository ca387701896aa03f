"""The maps as the reading commands see them, in memory: two Services and what they lead to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pointsman import abi
from pointsman.plan import Element, Slot
from pointsman.values import TCP, UDP, Backend, Entry, Frontend, PortName, to_address

RETIRED = abi.constants()["GENERATION_RETIRED"]


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

    def frontends(self) -> dict[Frontend, int]:
        return dict(self.keys)

    def find(self, frontend: Frontend) -> int | None:
        return self.keys.get(frontend)

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

    def generations(self) -> Mapping[int, int]:
        return {ident: generation for ident, (generation, _) in self.loads.items() if generation}

    def owned(self) -> list[int]:
        return [ident for ident, element in self.elements.items() if element.owner]

    def counters(self) -> dict[str, int]:
        return {"translated": 7, "refused": 1}

    def items(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        return iter(self.raw.get(name, []))


WEB, WEB_ANY, DNS = frontend("10.96.0.1", 80), frontend("10.96.0.1", 0, 0), frontend("fd00::a", 53)
DNS = Frontend(DNS.address, 53, UDP)
HTTP, NONE = PortName("shop", "web", "http"), PortName("default", "dns", "")
A, B, C = backend("10.0.0.1:8080"), backend("10.0.0.2:8080"), backend("fd00::5:53")


def view() -> FakeView:
    """shop/web with two endpoints, default/dns with one over IPv6, shop/web's other ports."""
    return FakeView(
        keys={WEB: 1, WEB_ANY: 2, DNS: 3},
        elements={
            1: Element(WEB, 1, 10, 2, 0, 0),
            2: Element(WEB_ANY, 1, 0, 0, 0, 0),
            3: Element(DNS, 2, 20, 1, 0, 60),
        },
        owners={1: HTTP, 2: NONE},
        slot={10: Slot(A, 5, 1, 1), 11: Slot(B, 6, 3, 1), 20: Slot(C, 7, 1, 2)},
        loads={5: (1, 4), 6: (3, 2), 7: (1, 0), 8: (2 | RETIRED, 0), 9: (2 | RETIRED, 1)},
    )


ENTRIES = (
    Entry(WEB, HTTP, (A, B)),
    Entry(WEB_ANY, HTTP),
    Entry(DNS, NONE, (C,), affinity=60),
)
