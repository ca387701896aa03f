"""What the maps hold, as rows that people and scripts read. Pure: any `Reader` will do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

from pointsman import abi
from pointsman.plan import Element, Slot
from pointsman.values import PROTOCOL_NAMES, Frontend, PortName, endpoint_text, to_text


def _enumerators(prefix: str) -> dict[int, str]:
    """Names of abi.h's enumerators by number: ALGORITHM_RANDOM → {0: "random"}."""
    return {
        number: name.removeprefix(prefix).lower()
        for name, number in abi.constants().items()
        if name.startswith(prefix)
    }


ALGORITHMS = _enumerators("ALGORITHM_")
EMPTY = _enumerators("EMPTY_")
RETIRED = abi.constants()["GENERATION_RETIRED"]
UNKNOWN = PortName("", "", "")


class Reader(Protocol):
    """What the rows need of the maps: `maps.View` has it, and a test's own few lines."""

    def frontends(self) -> dict[Frontend, int]: ...
    def find(self, frontend: Frontend) -> int | None: ...
    def names(self) -> dict[int, PortName]: ...
    def service(self, ident: int) -> Element: ...
    def slots(self, first: int, count: int) -> tuple[Slot, ...]: ...
    def load(self, endpoint: int) -> tuple[int, int]: ...
    def generations(self) -> Mapping[int, int]: ...
    def owned(self) -> list[int]: ...


def algorithm_name(number: int) -> str:
    return ALGORITHMS.get(number, f"unknown ({number})")


def empty_name(number: int) -> str:
    """What a set without endpoints answers; the programs take what they don't know for refuse."""
    return EMPTY.get(number, "refuse")


# -- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Port:
    """One port of a Service."""

    name: str
    port: int
    protocol: str

    def __str__(self) -> str:
        return f"{self.port}/{self.protocol}"


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """One Service. `endpoints` counts addresses with their ports, each once; `open` are the
    connections to them now."""

    namespace: str
    name: str
    cluster_ips: tuple[str, ...]
    ports: tuple[Port, ...]
    endpoints: int
    open: int
    algorithms: tuple[str, ...]
    affinity_seconds: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EndpointRow:
    """One endpoint of one Service port. `current`: the programs count its connections, since the
    generation in `load` is the one that its slots have."""

    namespace: str
    service: str
    port: str
    endpoint: str
    id: int
    generation: int
    current: bool
    open: int


@dataclass(frozen=True, slots=True)
class FrontendRow:
    """One key of `frontends`. `port` 0 and `protocol` "any" stand for a VIP's undefined ports;
    `consistent` is False if the service's own key is another one (nothing is translated then)."""

    namespace: str
    service: str
    port_name: str
    frontend: str
    address: str
    port: int
    protocol: str
    endpoints: int
    open: int
    id: int
    owner: int
    algorithm: str
    affinity_seconds: int
    first_slot: int
    when_empty: str
    consistent: bool

    @property
    def wildcard(self) -> bool:
        return self.port == 0


@dataclass(frozen=True, slots=True)
class Held:
    """One frontend with all that belongs to it."""

    frontend: Frontend
    ident: int
    element: Element
    name: PortName
    slots: tuple[Slot, ...]


def held(reader: Reader) -> Iterator[Held]:
    """Every frontend, in the order of Services, addresses and ports. A service id outside of the
    map comes with an element of zeros."""
    names = reader.names()
    found = []
    for frontend, ident in reader.frontends().items():
        try:
            element = reader.service(ident)
        except IndexError:
            element = Element(Frontend(bytes(16), 0, 0), 0, 0, 0, 0, 0)
        found.append((names.get(element.owner, UNKNOWN), frontend, ident, element))
    # The wildcard of an address comes after its ports.
    for name, frontend, ident, element in sorted(
        found, key=lambda f: (f[0][:2], f[1].address, f[1].wildcard, f[1])
    ):
        slots = reader.slots(element.first, element.count) if element.count else ()
        yield Held(frontend, ident, element, name, slots)


def frontends(reader: Reader) -> list[FrontendRow]:
    return [_frontend_row(reader, each) for each in held(reader)]


def _frontend_row(reader: Reader, each: Held) -> FrontendRow:
    frontend, element = each.frontend, each.element
    return FrontendRow(
        namespace=each.name.namespace,
        service=each.name.service,
        port_name="" if frontend.wildcard else each.name.port,
        frontend=str(frontend),
        address=to_text(frontend.address),
        port=frontend.port,
        protocol=PROTOCOL_NAMES.get(frontend.protocol, str(frontend.protocol)),
        endpoints=element.count,
        open=sum(_open(reader, slot) for slot in each.slots),
        id=each.ident,
        owner=element.owner,
        algorithm=algorithm_name(element.algorithm),
        affinity_seconds=element.affinity,
        first_slot=element.first if element.count else 0,
        when_empty="" if element.count else empty_name(element.first),
        consistent=element.frontend == frontend,
    )


def _open(reader: Reader, slot: Slot) -> int:
    generation, opened = reader.load(slot.endpoint)
    return opened if generation == slot.generation else 0


def endpoints(reader: Reader) -> list[EndpointRow]:
    """Each endpoint once, however many VIPs of its Service port lead to it."""
    rows: dict[tuple[PortName, int], EndpointRow] = {}
    for each in held(reader):
        for slot in each.slots:
            if (each.name, slot.endpoint) in rows:
                continue
            rows[each.name, slot.endpoint] = EndpointRow(
                namespace=each.name.namespace,
                service=each.name.service,
                port=each.name.port,
                endpoint=endpoint_text(*slot.backend),
                id=slot.endpoint,
                generation=slot.generation,
                current=reader.load(slot.endpoint)[0] == slot.generation,
                open=_open(reader, slot),
            )
    return list(rows.values())


def services(reader: Reader) -> list[ServiceRow]:
    groups: dict[tuple[str, str], list[Held]] = {}
    for each in held(reader):
        groups.setdefault(each.name[:2], []).append(each)
    return [_service_row(reader, *key, group) for key, group in groups.items()]


def _service_row(reader: Reader, namespace: str, name: str, group: list[Held]) -> ServiceRow:
    real = [each for each in group if not each.frontend.wildcard]
    ports = {
        Port(
            each.name.port,
            each.frontend.port,
            PROTOCOL_NAMES.get(each.frontend.protocol, str(each.frontend.protocol)),
        ): None
        for each in real
    }
    slots = {slot.endpoint: slot for each in real for slot in each.slots}
    return ServiceRow(
        namespace=namespace,
        name=name,
        cluster_ips=tuple(dict.fromkeys(to_text(each.frontend.address) for each in group)),
        ports=tuple(ports),
        endpoints=len({slot.backend for slot in slots.values()}),
        open=sum(_open(reader, slot) for slot in slots.values()),
        algorithms=tuple(dict.fromkeys(algorithm_name(each.element.algorithm) for each in real)),
        affinity_seconds=max((each.element.affinity for each in real), default=0),
        ids=tuple(each.ident for each in group),
    )


# -- for scripts ---------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Dicts, lists and scalars of a row, fields in camelCase as Kubernetes writes them."""
    if is_dataclass(value) and not isinstance(value, type):
        return {camel(f.name): plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value


def camel(name: str) -> str:
    """cluster_ips → clusterIPs, when_empty → whenEmpty."""
    first, *rest = name.split("_")
    return first + "".join("IPs" if part == "ips" else part.capitalize() for part in rest)
