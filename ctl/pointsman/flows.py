"""Flows of packets: the maps `flows` and `flows_new` decoded, and what follows from it. Pure.

A flow has two entries, one a direction, each keyed by the tuple of the packets that arrive; the
value has the key of the other. So one half alone names client, VIP and endpoint, and a flow whose
other half is missing can still be shown. Addresses are 16 bytes in network order, ports plain
numbers, times nanoseconds of CLOCK_MONOTONIC unless a name says seconds.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pointsman import abi
from pointsman.devices import Timeouts
from pointsman.values import TCP, Address

_layouts, _constants = abi.layouts(), abi.constants()
_read_tuple = _layouts["tuple"].reader(
    "source", "destination", "source_port", "destination_port", "proto"
)
_pack_tuple = _layouts["tuple"].packer(
    "source", "destination", "source_port", "destination_port", "proto"
)
_read_flow = _layouts["flow"].reader("other", "seen", "endpoint", "generation", "owner", "flags")
_read_timeouts = _layouts["packet_settings"].reader(
    "tcp_new", "tcp_open", "tcp_closing", "udp_new", "udp_open"
)
_read_ports = _layouts["packet_settings"].reader("first_port", "last_port")

REPLY = _constants["FLOW_REPLY"]
REMOTE = _constants["FLOW_REMOTE"]
DSR = _constants["FLOW_DSR"]
POD = _constants["FLOW_POD"]
ANSWERED = _constants["FLOW_ANSWERED"]
FIN = _constants["FLOW_FIN"]
RST = _constants["FLOW_RST"]

SECOND = 1_000_000_000
#: States. A TCP flow of which one end has closed is still open to the programs; one that its client
#: has reset may be, for anybody could have sent that.
NEW, OPEN, HALF_CLOSED, RESET, CLOSING = "new", "open", "half-closed", "reset", "closing"


class Tuple(NamedTuple):
    """What a packet looks like when it arrives."""

    source: Address
    source_port: int
    destination: Address
    destination_port: int
    protocol: int


def tuple_of(key: bytes) -> Tuple:
    source, destination, source_port, destination_port, protocol = _read_tuple(key)
    ntohs = socket.ntohs
    return Tuple(source, ntohs(source_port), destination, ntohs(destination_port), protocol)


def pack_tuple(of: Tuple) -> bytes:
    htons = socket.htons
    return _pack_tuple(
        of.source, of.destination, htons(of.source_port), htons(of.destination_port), of.protocol
    )


class Half(NamedTuple):
    """One direction: the value of one entry. `other` is the key of the other direction, raw."""

    other: bytes
    seen: int
    endpoint: int
    generation: int
    owner: int
    flags: int


def half_of(value: bytes) -> Half:
    return Half(*_read_flow(value))


def timeout(timeouts: Timeouts, protocol: int, state: str) -> int:
    """Seconds that a flow in this state may be silent."""
    if protocol != TCP:
        return timeouts.udp_new if state == NEW else timeouts.udp_open
    limits = {NEW: timeouts.tcp_new, RESET: timeouts.tcp_new, CLOSING: timeouts.tcp_closing}
    return limits.get(state, timeouts.tcp_open)


def timeouts_of(settings: bytes) -> Timeouts:
    """Of the element of packet_settings."""
    return Timeouts(*_read_timeouts(settings))


def ports_of(settings: bytes) -> tuple[int, int]:
    """First and last port that this node uses towards endpoints on others."""
    first, last = _read_ports(settings)
    return int(first), int(last)


def is_dsr(settings: bytes) -> bool:
    """Whether endpoints on other nodes answer the client directly."""
    return bool(_layouts["packet_settings"].decode(settings)["dsr"])


# -- flows ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flow:
    """Both directions, as far as they are there: `client` are the packets of the client, to the
    VIP; `reply` those of the endpoint. At least one of the halves is not None."""

    client: Tuple
    reply: Tuple
    client_half: Half | None
    reply_half: Half | None

    @property
    def _halves(self) -> list[Half]:
        return [half for half in (self.client_half, self.reply_half) if half]

    @property
    def flags(self) -> int:
        """Of both halves."""
        flags = 0
        for half in self._halves:
            flags |= half.flags
        return flags

    @property
    def owner(self) -> int:
        return self._halves[0].owner

    @property
    def endpoint(self) -> int:
        """Its id."""
        return self._halves[0].endpoint

    @property
    def seen(self) -> int:
        """When a packet of either direction came last."""
        return max(half.seen for half in self._halves)

    @property
    def state(self) -> str:
        client = self.client_half.flags if self.client_half else 0
        reply = self.reply_half.flags if self.reply_half else 0
        return state_of(self.client.protocol, client, reply)

    @property
    def path(self) -> str:
        """Where the packets go: "dsr", "pod" (the client is one of this node), "remote" or
        "local"."""
        flags = self.flags
        if flags & DSR:
            return "dsr"
        if flags & POD:
            return "pod"
        return "remote" if flags & REMOTE else "local"

    @property
    def halves(self) -> str:
        """ "both", or the only one that is there: "client" or "reply"."""
        if self.client_half and self.reply_half:
            return "both"
        return "client" if self.client_half else "reply"

    @property
    def port_used(self) -> PortUse | None:
        """What it takes of this node's ports; None if the endpoint sees the client itself."""
        if not self.flags & REMOTE:
            return None
        reply = self.reply
        return PortUse(reply.destination, reply.source, reply.source_port, reply.protocol)


class PortUse(NamedTuple):
    """A port of this node can be in use once for each of these."""

    node: Address
    endpoint: Address
    port: int
    protocol: int


def state_of(protocol: int, client: int, reply: int) -> str:
    """Of the flags of both halves, 0 for one that is missing. As `patience` of bpf/flow.h."""
    either, both = client | reply, client & reply
    if protocol == TCP and (reply & RST or both & FIN):
        return CLOSING
    if protocol == TCP and client & RST:
        return RESET
    # Replies of a DSR flow don't come past this node.
    answered = client if either & DSR else both
    if not answered & ANSWERED:
        return NEW
    return HALF_CLOSED if protocol == TCP and either & FIN else OPEN


@dataclass(frozen=True, slots=True)
class Filter:
    """Which flows are wanted: of these owners, of this client; None is all."""

    owners: frozenset[int] | None = None
    client: Address | None = None

    def takes(self, key: bytes, half: Half) -> bool:
        """Asked of an entry, before anything else of it is decoded."""
        if self.owners is not None and half.owner not in self.owners:
            return False
        from_client = half.other if half.flags & REPLY else key
        return self.client is None or from_client.startswith(self.client)  # tuple.source


def flows(
    entries: Iterable[tuple[bytes, bytes]],
    find: Callable[[bytes], bytes | None],
    wanted: Filter = Filter(),
) -> Iterator[Flow]:
    """Every flow once, as its entries come by: nothing is kept. `find` gives the value of a key.

    A flow is told by its client's half, or by the reply's if that is the only one.
    """
    for key, value in entries:
        half = half_of(value)
        if not wanted.takes(key, half):
            continue
        found = find(half.other)
        mate = None if found is None else half_of(found)
        if mate is not None and mate.other != key:
            mate = None  # of another flow, which has the port now
        if half.flags & REPLY:
            if mate is None:
                yield Flow(tuple_of(half.other), tuple_of(key), None, half)
        else:
            yield Flow(tuple_of(key), tuple_of(half.other), half, mate)
