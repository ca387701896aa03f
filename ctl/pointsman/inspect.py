"""What the maps hold, as rows that people and scripts read. Pure: any `Reader` will do."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

from pointsman import abi, weigh
from pointsman.outcomes import Outcomes
from pointsman.plan import Element, Run, Slot
from pointsman.policies import NO_POLICY, PolicyElement
from pointsman.ranges import Source
from pointsman.values import (
    ANY_IPV4,
    ANY_IPV6,
    PROTOCOL_NAMES,
    Address,
    Frontend,
    PortName,
    is_ipv4,
    to_text,
)


def _enumerators(prefix: str) -> dict[int, str]:
    """Names of abi.h's enumerators by number: ALGORITHM_RANDOM → {0: "random"}."""
    return {
        number: name.removeprefix(prefix).lower()
        for name, number in abi.constants().items()
        if name.startswith(prefix)
    }


ALGORITHM_MASK = abi.constants()["ALGORITHM_MASK"]
ALGORITHMS = {
    number: name.replace("_", "-")
    for number, name in _enumerators("ALGORITHM_").items()
    if number != ALGORITHM_MASK
}
CHOICES = _enumerators("CHOICE_")
EMPTY = _enumerators("EMPTY_")
FLAGS = _enumerators("SERVICE_")
PACKETS = _enumerators("PACKETS_")
#: SLOT_… of slot.flags.
PLACES = _enumerators("SLOT_")
RETIRED = abi.constants()["GENERATION_RETIRED"]
NODE = abi.constants()["SERVICE_NODE"]
REMOTE_NODE = abi.constants()["SERVICE_REMOTE_NODE"]
LOOPBACK = abi.constants()["SERVICE_LOOPBACK"]
GUARDED = abi.constants()["SERVICE_GUARDED"]
PASS = abi.constants()["SERVICE_PASS"]
OUTSIDE = abi.constants()["PACKETS_OUTSIDE"]
UNKNOWN = PortName("", "", "")
#: What owns a frontend that is no Service's: the hostPort of a Pod, the addresses of a node.
POD, NODES = "pod/", "node/"
_NODE_KINDS = ((NODE, "Node"), (REMOTE_NODE, "RemoteNode"), (LOOPBACK, "Loopback"), (PASS, "Pass"))


class Reader(Protocol):
    """What the rows need of the maps: `maps.View` has it, and a test's own few lines."""

    def frontends(self) -> dict[Frontend, int]: ...
    def find(self, frontend: Frontend) -> int | None: ...
    def marked(self, address: Address) -> bool: ...
    def names(self) -> dict[int, PortName]: ...
    def service(self, ident: int) -> Element: ...
    def slots(self, first: int, count: int) -> tuple[Slot, ...]: ...
    def load(self, endpoint: int) -> tuple[int, int]: ...
    def outcomes(self, endpoint: int) -> Outcomes: ...
    def policies(self) -> Mapping[int, PolicyElement]: ...
    def ejected(self, owner: int) -> int: ...
    def generations(self) -> Mapping[int, int]: ...
    def owned(self) -> list[int]: ...
    def ranges(self) -> Mapping[int, frozenset[Source]]: ...
    def stamp(self, table: Run) -> bytes: ...
    def line(self, index: int) -> tuple[int, ...]: ...
    def settings(self) -> dict[str, Any]: ...
    def items(self, name: str) -> Iterable[tuple[bytes, bytes]]: ...


def algorithm_name(number: int) -> str:
    """Of service.algorithm: ALGORITHM_PEAK_EWMA | CHOICE_WEIGHTED → "peak-ewma"."""
    kind = number & ALGORITHM_MASK
    return ALGORITHMS.get(kind, f"unknown ({kind})")


def choice_names(number: int) -> tuple[str, ...]:
    """Of its other bits: ALGORITHM_PEAK_EWMA | CHOICE_WEIGHTED → ("weighted",)."""
    return _names(number & ~ALGORITHM_MASK, CHOICES)


def empty_name(number: int) -> str:
    """What a set without endpoints answers; the programs take what they don't know for refuse."""
    return EMPTY.get(number, "refuse")


def flag_names(flags: int) -> tuple[str, ...]:
    """SERVICE_HOST_NETNS | SERVICE_GUARDED → ("host-netns", "guarded")."""
    return _names(flags, FLAGS)


def packets_names(packets: int) -> tuple[str, ...]:
    """PACKETS_OUTSIDE | PACKETS_LOCAL → ("outside", "local")."""
    return _names(packets, PACKETS)


def _names(flags: int, known: Mapping[int, str]) -> tuple[str, ...]:
    names = [name.replace("_", "-") for bit, name in sorted(known.items()) if flags & bit]
    unknown = flags & ~sum(known)
    return (*names, f"unknown ({unknown})") if unknown else tuple(names)


def flags_text(flags: int) -> str:
    return ",".join(flag_names(flags)) or "none"


def packets_text(packets: int) -> str:
    return ",".join(packets_names(packets)) or "none"


def is_service(name: PortName) -> bool:
    """Not a Pod's hostPort and not a node's address, which have names of their own."""
    return not name.service.startswith((POD, NODES))


def cidr_text(address: Address, mask: Address) -> str:
    """10.96.0.0/12 or fd00:96::/112."""
    length = int.from_bytes(mask, "big").bit_count()
    return f"{to_text(address)}/{length - 96 if is_ipv4(address) else length}"


# -- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Port:
    """One port of a Service. `port` is None if only its NodePort is served on this node."""

    name: str
    port: int | None
    protocol: str
    node_port: int | None = None

    def __str__(self) -> str:
        port = "<unknown>" if self.port is None else str(self.port)
        if self.node_port is not None:
            port = f"{port}:{self.node_port}"
        return f"{port}/{self.protocol}"


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """One Service. `endpoints` counts addresses with their ports, each once; `open` are the
    connections to them now.

    `type` is what the maps show: LoadBalancer if it has an address that is guarded, as a load
    balancer's are and spec.externalIPs are not. One that waits for its address, or is not guarded
    because of --no-bind-guard, is shown as NodePort.
    """

    namespace: str
    name: str
    type: str
    cluster_ips: tuple[str, ...]
    external_ips: tuple[str, ...]
    ports: tuple[Port, ...]
    endpoints: int
    open: int
    algorithms: tuple[str, ...]
    choice: tuple[str, ...]
    ejected: int
    affinity_seconds: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """How one service port deals with its endpoints, in the words of the annotations:
    `outlier_ejection` is off, on or observe, `same_zone_connections` None where zones do not
    matter. `most` may be ejected at a time, `ejected` are now."""

    outlier_ejection: str
    consecutive_failures: int
    failure_percent: int
    minimum_connects: int
    shortest_seconds: float
    longest_seconds: float
    trial_seconds: float
    most: int
    ejected: int
    max_connections: int
    same_zone_connections: int | None

    def __str__(self) -> str:
        found = []
        if self.outlier_ejection != "off":
            verb = "ejects" if self.outlier_ejection == "on" else "would eject (observe)"
            reasons = []
            if self.consecutive_failures:
                reasons.append(f"{self.consecutive_failures} failures in a row")
            if self.failure_percent:
                least = self.minimum_connects
                reasons.append(f"{self.failure_percent} % of at least {least} connects failed")
            found.append(
                f"{verb} after {' or '.join(reasons) or 'nothing'}, for "
                f"{self.shortest_seconds:g} to {self.longest_seconds:g} s, {self.most} at most; "
                f"ejected now: {self.ejected}"
            )
        if self.max_connections:
            found.append(f"at most {self.max_connections} open for each endpoint")
        if self.same_zone_connections is not None:
            found.append(
                f"beyond {self.same_zone_connections} open for each endpoint of this zone others "
                "get a share"
            )
        return "; ".join(found)


@dataclass(frozen=True, slots=True)
class FrontendRow:
    """One key of `frontends`. `port` 0 and `protocol` "any" stand for a VIP's undefined ports;
    `consistent` is False if the service's own key is another one (nothing is translated then).

    `kind` is ClusterIP, NodePort, External or HostPort; of a node's addresses as a whole Node,
    RemoteNode or Loopback; Pass for an address at which nothing is refused.

    `packets` has "outside" if clients outside of the cluster are served, from a set of their own:
    `outside_endpoints` counts it, `outside_when_empty` is its answer if there are none, and
    `table_entries` the size of its Maglev table (0 = none).
    """

    namespace: str
    service: str
    port_name: str
    kind: str
    frontend: str
    address: str
    port: int
    protocol: str
    endpoints: int
    open: int
    id: int
    owner: int
    algorithm: str
    choice: tuple[str, ...]
    policy: PolicyRow | None
    affinity_seconds: int
    flags: tuple[str, ...]
    first_slot: int
    when_empty: str
    packets: tuple[str, ...]
    outside_endpoints: int
    outside_when_empty: str
    table_entries: int
    consistent: bool

    @property
    def wildcard(self) -> bool:
        return self.port == 0


@dataclass(frozen=True, slots=True)
class Held:
    """One frontend with all that belongs to it; `outside` are the slots of its outside set."""

    frontend: Frontend
    ident: int
    element: Element
    name: PortName
    slots: tuple[Slot, ...]
    kind: str
    outside: tuple[Slot, ...] = ()


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
    vips = {frontend.address for _, frontend, _, e in found if frontend.wildcard and not e.flags}
    # The wildcard of an address comes after its ports.
    for name, frontend, ident, element in sorted(
        found, key=lambda f: (f[0][:2], f[1].address, f[1].wildcard, f[1])
    ):
        slots = reader.slots(element.first, element.count) if element.count else ()
        kind = _kind(frontend, element, name, frontend.address in vips)
        outside: tuple[Slot, ...] = ()
        if element.outside == (element.first, element.count):
            outside = slots
        elif element.outside.count:
            outside = reader.slots(*element.outside)
        yield Held(frontend, ident, element, name, slots, kind, outside)


def _kind(frontend: Frontend, element: Element, name: PortName, vip: bool) -> str:
    """`vip`: the address refuses undefined ports, as only ClusterIPs do."""
    if frontend.wildcard:
        return next((kind for flag, kind in _NODE_KINDS if element.flags & flag), "ClusterIP")
    if name.service.startswith(POD):
        return "HostPort"
    if frontend.address in (ANY_IPV4, ANY_IPV6):
        return "NodePort"
    return "ClusterIP" if vip else "External"


def frontends(reader: Reader) -> list[FrontendRow]:
    policies = reader.policies()
    return [_frontend_row(reader, each, policies) for each in held(reader)]


def _frontend_row(reader: Reader, each: Held, policies: Mapping[int, PolicyElement]) -> FrontendRow:
    frontend, element = each.frontend, each.element
    policy = policy_row(reader, element, policies)
    return FrontendRow(
        namespace=each.name.namespace,
        service=each.name.service,
        port_name="" if frontend.wildcard else each.name.port,
        kind=each.kind,
        frontend=str(frontend),
        address=to_text(frontend.address),
        port=frontend.port,
        protocol=PROTOCOL_NAMES.get(frontend.protocol, str(frontend.protocol)),
        endpoints=element.count,
        open=sum(_open(reader, slot) for slot in each.slots),
        id=each.ident,
        owner=element.owner,
        algorithm=algorithm_name(element.algorithm),
        choice=choice_words(element.algorithm, policy),
        policy=policy,
        affinity_seconds=element.affinity,
        flags=flag_names(element.flags),
        first_slot=element.first if element.count else 0,
        when_empty="" if element.count or _passes(each) else empty_name(element.first),
        packets=packets_names(element.packets),
        outside_endpoints=element.outside.count,
        outside_when_empty=outside_empty_name(element),
        table_entries=element.table.count,
        consistent=element.frontend == frontend,
    )


def policy_row(
    reader: Reader, element: Element, policies: Mapping[int, PolicyElement]
) -> PolicyRow | None:
    """None where nothing is asked of a policy."""
    if not element.algorithm & weigh.CHOICE_POLICY:
        return None
    found, most = policies.get(element.owner, NO_POLICY)
    ejection = "on" if element.algorithm & weigh.CHOICE_AVOID else "observe"
    zone = element.algorithm & weigh.CHOICE_ZONE
    return PolicyRow(
        outlier_ejection=ejection if found.watch else "off",
        consecutive_failures=found.streak,
        failure_percent=found.percent,
        minimum_connects=found.volume,
        shortest_seconds=found.shortest / 1e9,
        longest_seconds=found.longest / 1e9,
        trial_seconds=found.trial / 1e9,
        most=most,
        ejected=reader.ejected(element.owner) if found.watch else 0,
        max_connections=found.max_connections,
        same_zone_connections=found.room if zone else None,
    )


def choice_words(algorithm: int, policy: PolicyRow | None) -> tuple[str, ...]:
    """What has a say beside the algorithm: ("weighted", "max-connections=9")."""
    found = ["weighted"] if algorithm & weigh.CHOICE_WEIGHTED else []
    if policy is None:
        return tuple(found)
    if policy.outlier_ejection != "off":
        found.append(f"outlier-ejection={policy.outlier_ejection}")
    if policy.max_connections:
        found.append(f"max-connections={policy.max_connections}")
    if policy.same_zone_connections is not None:
        found.append(f"same-zone-connections={policy.same_zone_connections}")
    return tuple(found)


def outside_empty_name(element: Element) -> str:
    """What clients outside get of an empty set; "" if they get an endpoint, or are not served."""
    if element.outside.count or not element.packets & OUTSIDE:
        return ""
    return empty_name(element.outside.first)


def _passes(each: Held) -> bool:
    """A wildcard at which an undefined port is no error."""
    return each.frontend.wildcard and bool(each.element.flags)


def _open(reader: Reader, slot: Slot) -> int:
    generation, opened = reader.load(slot.endpoint)
    return opened if generation == slot.generation else 0


def services(reader: Reader) -> list[ServiceRow]:
    groups: dict[tuple[str, str], list[Held]] = {}
    for each in held(reader):
        if is_service(each.name):
            groups.setdefault(each.name[:2], []).append(each)
    policies = reader.policies()
    return [_service_row(reader, *key, group, policies) for key, group in groups.items()]


def _service_row(
    reader: Reader,
    namespace: str,
    name: str,
    group: list[Held],
    policies: Mapping[int, PolicyElement],
) -> ServiceRow:
    real = [each for each in group if not each.frontend.wildcard]
    slots = {slot.endpoint: slot for each in real for slot in each.slots}
    rows = {each.element.owner: policy_row(reader, each.element, policies) for each in real}
    words = [choice_words(each.element.algorithm, rows[each.element.owner]) for each in real]
    return ServiceRow(
        namespace=namespace,
        name=name,
        type=_type(real),
        cluster_ips=_addresses(group, "ClusterIP"),
        external_ips=_addresses(real, "External"),
        ports=_ports(real),
        endpoints=len({slot.backend for slot in slots.values()}),
        open=sum(_open(reader, slot) for slot in slots.values()),
        algorithms=tuple(dict.fromkeys(algorithm_name(each.element.algorithm) for each in real)),
        choice=tuple(dict.fromkeys(word for each in words for word in each)),
        ejected=sum(row.ejected for row in rows.values() if row),
        affinity_seconds=max((each.element.affinity for each in real), default=0),
        ids=tuple(each.ident for each in group),
    )


def _type(real: Iterable[Held]) -> str:
    found = {(each.kind, bool(each.element.flags & GUARDED)) for each in real}
    if ("External", True) in found:
        return "LoadBalancer"
    return "NodePort" if "NodePort" in {kind for kind, _ in found} else "ClusterIP"


def _addresses(group: Iterable[Held], kind: str) -> tuple[str, ...]:
    found = dict.fromkeys(each.frontend.address for each in group if each.kind == kind)
    return tuple(map(to_text, found))


def _ports(real: Iterable[Held]) -> tuple[Port, ...]:
    """Each port of the Service with its NodePort, in the order of numbers."""
    ports: dict[tuple[str, int], int] = {}
    node_ports: dict[tuple[str, int], int] = {}
    for each in real:
        known = node_ports if each.kind == "NodePort" else ports
        known.setdefault((each.name.port, each.frontend.protocol), each.frontend.port)
    keys = sorted({*ports, *node_ports}, key=lambda k: (ports.get(k, 0), node_ports.get(k, 0), k))
    return tuple(
        Port(
            name,
            ports.get((name, protocol)),
            PROTOCOL_NAMES.get(protocol, str(protocol)),
            node_ports.get((name, protocol)),
        )
        for name, protocol in keys
    )


def skipped_netns(reader: Reader) -> list[int]:
    """Cookies of the network namespaces whose sockets are left alone."""
    return sorted(struct.unpack("=Q", key)[0] for key, _ in reader.items("skipped_netns"))


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
