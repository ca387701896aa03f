"""Which flows are worth a look of the sweep, and which ports of this node are in use: read off the
entries of a batch lookup without decoding each. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple

from pointsman import abi
from pointsman.devices import Timeouts
from pointsman.flows import ANSWERED, FIN, REMOTE, REPLY, RST, SECOND, PortUse
from pointsman.values import TCP

_tuple, _flow = abi.layouts()["tuple"], abi.layouts()["flow"]
KEY_SIZE = _tuple.size
_VALUE = _flow.size
_PROTO = _tuple.field("proto").offset
_SEEN = _flow.field("seen").offset
_FLAGS = _flow.field("flags")
_SOURCE_PORT = _tuple.field("source_port").offset
_ENDED = FIN | RST
_REPLY_REMOTE = REPLY | REMOTE


def _flags(values: memoryview) -> memoryview:
    """The flags of every value."""
    column = values.cast("H") if _FLAGS.size == 2 else values.cast("I")
    return column[_FLAGS.offset // _FLAGS.size :: _VALUE // _FLAGS.size]


def candidates(
    keys: memoryview, values: memoryview, now: int, timeouts: Timeouts, *, thorough: bool = False
) -> bytes:
    """The keys of those entries, one after the other, whose flow may have expired.

    What an entry says of itself is enough: of an expired flow at least one half is among them.
    One that is closing has a half with FIN or RST, one that is new a half that was not answered,
    and no half was seen later than the flow. Only a half whose other is gone may be left out:
    `thorough` looks at all that are older than the shortest timeout.
    """
    column = values.cast("Q")[_SEEN // 8 :: _VALUE // 8].tolist()
    before = now - min(astuple(timeouts)) * SECOND
    old = [i for i, seen in enumerate(column) if seen < before]
    if not old:
        return b""
    if not thorough:
        flags = _flags(values)
        protocols = keys[_PROTO::KEY_SIZE]
        limits = _limits(now, timeouts)
        # Positions in `limits`: 4 of TCP, then 4 of the others; + 2 ended, + 1 answered.
        old = [
            i
            for i in old
            if column[i]
            < limits[
                (protocols[i] != TCP) * 4 + bool(flags[i] & _ENDED) * 2 + bool(flags[i] & ANSWERED)
            ]
        ]
    return b"".join([keys[i * KEY_SIZE : (i + 1) * KEY_SIZE] for i in old])


def _limits(now: int, timeouts: Timeouts) -> tuple[int, ...]:
    """By protocol, then ended, then answered: an entry seen before may be of an expired flow."""
    # An end that was seen may stand in a flow of any state.
    ended = min(timeouts.tcp_closing, timeouts.tcp_new, timeouts.tcp_open)
    tcp = (timeouts.tcp_new, timeouts.tcp_open, ended, ended)
    udp = (timeouts.udp_new, timeouts.udp_open) * 2
    return tuple(now - seconds * SECOND for seconds in tcp + udp)


def count_ports(keys: memoryview, values: memoryview, into: Counter[bytes]) -> None:
    """Adds the ports of this node that these entries use, by endpoint and address as a raw key
    that `port_use` reads: the reply halves of flows to endpoints on other nodes."""
    flags = _flags(values).tolist()
    length, proto = _SOURCE_PORT + 2, _PROTO
    into.update(
        bytes(keys[i : i + length]) + bytes((keys[i + proto],))
        for i in [i * KEY_SIZE for i, f in enumerate(flags) if f & _REPLY_REMOTE == _REPLY_REMOTE]
    )


def port_use(raw: bytes) -> PortUse:
    """What a key of `count_ports` stands for."""
    source, destination = raw[:16], raw[16:32]
    return PortUse(destination, source, int.from_bytes(raw[32:34], "big"), raw[34])
