"""What the packet programs do with a packet of a client outside: the walk of bpf/select.h. Pure."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from pointsman import abi
from pointsman.flows import (
    ANSWERED,
    CLOSING,
    DSR,
    RESET,
    SECOND,
    Flow,
    Tuple,
    half_of,
    is_dsr,
    pack_tuple,
    ports_of,
    timeout,
    timeouts_of,
    tuple_of,
)
from pointsman.inspect import NODE, UNKNOWN, Reader, empty_name
from pointsman.maglev import PER_LINE, flow_hash, hit
from pointsman.marks import fold
from pointsman.plan import Element, Slot
from pointsman.values import (
    ANY_IPV4,
    ANY_IPV6,
    TCP,
    Address,
    Frontend,
    endpoint_text,
    is_ipv4,
    to_address,
    to_text,
)

#: Verdicts.
FORWARDED, REFUSED, DROPPED, PASSED = "forwarded", "refused", "dropped", "passed"
_constants = abi.constants()
_OUTSIDE = _constants["PACKETS_OUTSIDE"]
_LOCAL = _constants["PACKETS_LOCAL"]
_RANGES = _constants["PACKETS_RANGES"]
_NODE_PORT = _constants["SERVICE_NODE_PORT"]
_HERE, _ELSEWHERE = _constants["SLOT_HERE"], _constants["SLOT_ELSEWHERE"]
_read_affinity = abi.layouts()["affinity"].reader("seen", "addr", "port")
_WHERE = {_HERE: "on this node", _ELSEWHERE: "on another node"}


class Packets(Protocol):
    """What it takes of the maps beside a Reader: `packetmaps.PacketMaps` has it."""

    def find(self, key: bytes) -> bytes | None:
        """One direction of a flow."""

    def line(self, index: int) -> tuple[int, ...]:
        """32 entries of Maglev tables."""

    def admits(self, service: int, client: Address) -> bool:
        """Whether source_ranges has the client."""

    def client_affinity(self, client: Address, owner: int) -> bytes | None: ...
    def settings(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Client:
    """Who sends. Without a port it can't be said which entry of a table is the packet's."""

    address: Address
    port: int | None = None

    def __str__(self) -> str:
        return to_text(self.address) if self.port is None else endpoint_text(*self.pair)

    @property
    def pair(self) -> tuple[Address, int]:
        return self.address, self.port or 0


@dataclass(frozen=True, slots=True)
class PacketEndpoint:
    """One endpoint that a new flow may get. `where` is "on this node", "on another node" or "where
    the route leads"; `share` of the new flows of a client without affinity."""

    endpoint: str
    id: int
    where: str
    share: float


@dataclass(frozen=True, slots=True)
class PacketExplanation:
    """`result` and `why` are a sentence each, `steps` what the programs look at, in that order.
    `endpoint` is the one that the packet goes to, "" if that is not known or it goes nowhere;
    `remembered` the one of its flow, "" if it is of none or chosen for anew: all else is said of a
    flow that begins. `counter` of packet_counters that a drop counts in."""

    destination: str
    client: str
    verdict: str
    result: str
    why: str
    counter: str
    endpoint: str
    remembered: str
    service: str
    frontend_id: int | None
    endpoints: tuple[PacketEndpoint, ...]
    notes: tuple[str, ...]
    steps: tuple[str, ...]


def parse_client(text: str) -> Client:
    """ADDR, ADDR:PORT or [ADDR]:PORT. Raises ValueError."""
    match = re.fullmatch(r"\[([^\]]+)\](?::([0-9]+))?|([0-9.]+):([0-9]+)", text)
    address, port = text, None
    if match:
        address, port = match[1] or match[3], match[2] or match[4]
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise ValueError(
            f"{text!r} is no ADDRESS[:PORT] of a client, such as 198.51.100.7:40000"
        ) from None
    if port is not None and not 0 < int(port) <= 65535:
        raise ValueError(f"port {port} is not from 1 to 65535")
    return Client(to_address(address), None if port is None else int(port))


def explain_packet(
    reader: Reader,
    packets: Packets,
    destination: Frontend,
    client: Client,
    now: int,
    *,
    begins: bool = True,
) -> PacketExplanation:
    """Follows `flow_of` and `begin` of bpf/packets.c, at a device that leads out. `now` is
    CLOCK_MONOTONIC in ns; `begins`: the packet is a SYN or a datagram, not one of an open
    connection. Raises ValueError if client and destination are of different families."""
    if is_ipv4(client.address) != is_ipv4(destination.address):
        raise ValueError(f"{client} and {destination} are not of one family")
    begins = begins or destination.protocol != TCP
    return _Walk(reader, packets, destination, client, now, begins).explain()


class _Walk:
    def __init__(
        self,
        reader: Reader,
        packets: Packets,
        to: Frontend,
        client: Client,
        now: int,
        begins: bool,
    ) -> None:
        self._reader, self._packets = reader, packets
        self._to, self._client, self._now = to, client, now
        self._begins = begins
        self._dsr = is_dsr(packets.settings())
        self._remembered = ""
        self._steps: list[str] = []
        self._notes: list[str] = []
        self._owner = UNKNOWN
        self._ident: int | None = None
        self._key = pack_tuple(Tuple(*client.pair, to.address, to.port, to.protocol))

    def explain(self) -> PacketExplanation:
        self._follow_flow()
        found = self._find()
        if isinstance(found, PacketExplanation):
            return found
        ident, element = found
        if not self._begins and not (self._dsr and element.outside.count):
            return self._began_elsewhere()
        if element.packets & _RANGES:
            welcome = self._packets.admits(ident, self._client.address)
            self._steps.append(
                f"source ranges: {'have' if welcome else 'lack'} {to_text(self._client.address)}"
            )
            if not welcome:
                why = f"loadBalancerSourceRanges of {self._owner} do not have this client"
                return self._end(DROPPED, "dropped", why, counter="drop_source_range")
        return self._choose(element)

    # -- flow ------------------------------------------------------------------------------------

    def _follow_flow(self) -> None:
        """What a packet of a flow that is remembered meets, as `flow_of`. A new flow is explained
        all the same: that is what this is asked for."""
        if self._client.port is None:
            self._notes.append(
                "without the client's port it can't be said which flow is meant, nor which entry "
                "of a table: give --from ADDRESS:PORT"
            )
            return
        value = self._packets.find(self._key)
        if value is None:
            self._steps.append("flows: none of this client's address and port")
            if self._begins and self._to.protocol == TCP and not self._dsr:
                self._notes.append(
                    "a connection of it that is open already began elsewhere: its packets are left "
                    "to this node as they are"
                )
            return
        half = half_of(value)
        found = self._packets.find(half.other)
        mate = half_of(found) if found else None
        if mate and mate.other != self._key:
            mate = None  # of another flow, which has the port now
        flow = Flow(tuple_of(self._key), tuple_of(half.other), half, mate)
        endpoint = endpoint_text(flow.reply.source, flow.reply.source_port)
        idle = max(self._now - flow.seen, 0) // SECOND
        self._steps.append(f"flows: {flow.state}, {flow.path}, to {endpoint}, idle for {idle} s")
        left = not half.generation or self._reader.load(half.endpoint)[0] != half.generation
        if not self._moves(flow, left=left):
            self._remembered = endpoint
        if left:
            self._notes.append(
                f"a flow of this client to {endpoint} is remembered, but that endpoint has left: "
                "a connection goes on while the endpoint answers, a new one or a datagram moves"
            )
        elif not self._remembered:
            self._notes.append(
                f"a flow of this client to {endpoint} is remembered, but is being closed, or was "
                "silent for too long, or is only half there: a new one takes its place"
            )
        else:
            self._notes.append(
                f"a flow of this client to {endpoint} is remembered: its packets go there, until "
                "it is closed or expires; what is said here is for a flow that begins"
            )

    def _moves(self, flow: Flow, *, left: bool) -> bool:
        """Whether the packet is chosen for anew, as in flow_of() of bpf/packets.c."""
        if flow.flags & DSR and not self._dsr:
            return True
        # As touch() and promote() of bpf/flow.h: its answers would not find the way back.
        syn = self._to.protocol == TCP and self._begins
        news = not flow.flags & ANSWERED or self._now - flow.seen > SECOND // 2
        if flow.halves == "client" and not flow.flags & DSR and news and not syn:
            return True
        if self._to.protocol != TCP:
            return left
        # As is_free() of bpf/flow.h: what the client has reset lasts as long as what is closing.
        state = CLOSING if flow.state == RESET else flow.state
        patience = timeout(timeouts_of(self._packets.settings()), TCP, state) * SECOND
        replaceable = flow.state == CLOSING or self._now - flow.seen > patience
        return self._begins and (left or replaceable)

    # -- frontend --------------------------------------------------------------------------------

    def _find(self) -> tuple[int, Element] | PacketExplanation:
        key = self._to
        found = self._lookup(key)
        if found is None or found[1].flags & _NODE_PORT:
            wildcard = self._lookup(Frontend(fold(key.address), 0, 0))
            if wildcard is None or not wildcard[1].flags & NODE:
                why = f"{key} is no frontend, and {to_text(key.address)} no address of this node"
                return self._pass(why)
            any_address = ANY_IPV4 if is_ipv4(key.address) else ANY_IPV6
            found = self._lookup(key._replace(address=any_address))
            if found is None:
                return self._pass(f"no Service has the NodePort {key.port}")
        self._ident, element = found
        self._owner = self._reader.names().get(element.owner, UNKNOWN)
        self._steps.append(f"service {self._ident}: belongs to {self._owner}")
        if not element.packets & _OUTSIDE:
            return self._pass(f"{key} is {self._owner}, which is not served to clients outside")
        return found

    def _lookup(self, key: Frontend) -> tuple[int, Element] | None:
        ident = self._reader.find(key)
        if ident is None:
            self._steps.append(f"frontends: no key {key}")
            return None
        self._steps.append(f"frontends: key {key} leads to service {ident}")
        try:
            element = self._reader.service(ident)
        except IndexError:
            self._steps.append(f"services: no element {ident}")
            return None
        if element.frontend != key:
            self._steps.append(f"service {ident}: is {element.frontend}'s now")
            return None
        return ident, element

    # -- endpoint --------------------------------------------------------------------------------

    def _choose(self, element: Element) -> PacketExplanation:
        first, count = element.outside
        local = bool(element.packets & _LOCAL)
        if not count:
            return self._empty(first, local=local)
        slots = self._reader.slots(first, count)
        self._steps.append(f"outside set: {count} endpoints, slots {first} to {first + count - 1}")
        shares = self._shares(element, slots)
        endpoints = tuple(
            PacketEndpoint(
                endpoint_text(*slot.backend), slot.endpoint, _where(slot), round(shares[i], 6)
            )
            for i, slot in enumerate(slots)
        )
        slot, because = self._slot(element, slots)
        if not self._begins and slot and (local or not slot.place & _ELSEWHERE):
            return self._began_elsewhere()
        why = f"{self._to} is {self._owner}, {because}"
        if slot is None:
            result = f"a new flow gets one of {count} endpoints"
            return self._end(FORWARDED, result, why, endpoints=endpoints)
        endpoint = endpoint_text(*slot.backend)
        result = f"a new flow goes to {endpoint}, {self._way(slot, local=local)}"
        return self._end(FORWARDED, result, why, endpoint=endpoint, endpoints=endpoints)

    def _empty(self, first: int, *, local: bool) -> PacketExplanation:
        empty = empty_name(first)
        self._steps.append(f"outside set: empty, which means {empty}")
        if empty == "unreachable":
            policy = "none on this node, and externalTrafficPolicy is Local" if local else "none"
            why = f"{self._owner} has endpoints, but {policy}"
            return self._end(DROPPED, "dropped", why, counter="drop_no_local_endpoint")
        why = f"{self._owner} has no endpoints"
        return self._end(REFUSED, "refused by ICMP port unreachable", why, counter="packet_refused")

    def _shares(self, element: Element, slots: tuple[Slot, ...]) -> list[float]:
        """Of the new flows, by place in the set."""
        (first, entries), count = element.table, len(slots)
        if not entries:
            weights = [slot.weight for slot in slots]
            total = sum(weights)
            return [weight / total for weight in weights] if total else [1 / count] * count
        lines = range(first, first + -(-entries // PER_LINE))
        places = [place for line in lines for place in self._packets.line(line)][:entries]
        found = Counter(places)
        return [found[place] / entries for place in range(count)]

    def _slot(self, element: Element, slots: tuple[Slot, ...]) -> tuple[Slot | None, str]:
        """The slot of a new flow, None if that needs the client's port; and why."""
        if element.affinity and (slot := self._kept(element, slots)):
            return slot, "which keeps a client's endpoint"
        (first, entries), count = element.table, element.outside.count
        if len(slots) == 1:
            return slots[0], "which has one endpoint"
        if self._client.port is None:
            how = "a Maglev table" if entries else "a hash"
            return None, f"which chooses by {how} of client, ports and protocol"
        number = flow_hash(self._key)
        if entries:
            entry = number * entries >> 32
            place = self._packets.line(first + entry // PER_LINE)[entry % PER_LINE]
            self._steps.append(
                f"Maglev table: hash {number:#010x}, entry {entry} of {entries} has place {place}"
            )
            if place < len(slots):
                return slots[place], "which chooses by its Maglev table"
            self._steps.append(f"place {place}: not in the set, so the hash alone chooses")
        if count * number >> 32 >= len(slots):
            return None, "whose set reaches beyond the end of the map"
        place = hit([slot.weight for slot in slots], number)
        self._steps.append(f"hash {number:#010x}: place {place} of {count}")
        return slots[place], "which chooses by a hash of client, ports and protocol"

    def _kept(self, element: Element, slots: tuple[Slot, ...]) -> Slot | None:
        raw = self._packets.client_affinity(self._client.address, element.owner)
        if raw is None:
            self._steps.append("affinity: this client has no endpoint yet")
            return None
        seen, address, port = _read_affinity(raw)
        backend = address, socket.ntohs(port)
        left = element.affinity - max(self._now - seen, 0) / 1e9
        slot = next((slot for slot in slots if slot.backend == backend), None)
        state = f"{left:.0f} s left" if left >= 0 else "expired"
        if slot is None:
            state += ", not in the set any more"
        self._steps.append(f"affinity: this client has {endpoint_text(*backend)}, {state}")
        return slot if left >= 0 else None

    def _way(self, slot: Slot, *, local: bool) -> str:
        if slot.place & _HERE:
            return "on this node: it sees the client's address"
        if local:
            return "and sees the client's address"
        if self._dsr and slot.place & _ELSEWHERE:
            return f"{_where(slot)}: in an IPIP tunnel, it answers the client directly"
        first, last = ports_of(self._packets.settings())
        return f"{_where(slot)}: it sees this node's address, with a port of {first} to {last}"

    # -- ends ------------------------------------------------------------------------------------

    def _began_elsewhere(self) -> PacketExplanation:
        return self._pass("the connection is not remembered: it began before, or at another node")

    def _pass(self, why: str) -> PacketExplanation:
        return self._end(PASSED, "left to this node as it is", why)

    def _end(
        self,
        verdict: str,
        result: str,
        why: str,
        *,
        counter: str = "",
        endpoint: str = "",
        endpoints: tuple[PacketEndpoint, ...] = (),
    ) -> PacketExplanation:
        return PacketExplanation(
            destination=str(self._to),
            client=str(self._client),
            verdict=verdict,
            result=result,
            why=why,
            counter=counter,
            endpoint=endpoint,
            remembered=self._remembered,
            service=str(self._owner) if self._owner != UNKNOWN else "",
            frontend_id=self._ident,
            endpoints=endpoints,
            notes=tuple(self._notes),
            steps=tuple(self._steps),
        )


def _where(slot: Slot) -> str:
    return _WHERE.get(slot.place & (_HERE | _ELSEWHERE), "where the route leads")
