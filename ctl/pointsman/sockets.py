"""The records of connected sockets, read while the programs write them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pointsman import abi, bpf
from pointsman.stale import Record

_layouts = abi.layouts()
_place, _socket = _layouts["place"], _layouts["socket"]
_RECORD = _place.field("record").offset
_PROTOCOL = _RECORD + _socket.field("proto").offset
_FIRST = _layouts["bucket"].field("first").offset
_OTHERS = _layouts["bucket"].field("others").offset
_MORE = _layouts["more"].field("place")
_IN_OVERFLOW = abi.constants()["IN_OVERFLOW"]
_read = _socket.reader("endpoint", "generation", "vip", "peer", "vip_port", "peer_port", "proto")
_BUSY = 1 << 63  # COOKIE_BUSY of bpf/record.h
_PIECE = 4096  # buckets that are looked at in one go, with the interpreter held
_u32 = struct.Struct("=I")
_u64 = struct.Struct("=Q")


class Sockets:
    """The maps of records under their pins, opened anew: any one thread may use it."""

    def __init__(self, maps: Path) -> None:
        self._sockets = bpf.Map.open(maps / "sockets")
        self._more = bpf.Map.open(maps / "sockets_more")
        self._overflow = bpf.Map.open(maps / "sockets_overflow")

    def close(self) -> None:
        for each in (self._sockets, self._more, self._overflow):
            each.close()

    def records(self, protocols: Collection[int]) -> list[Record]:
        """Every record of these protocols, but for those that are being written right now.

        What is read may be the half of one connection and the half of the next, if the socket
        connects again at this very moment: ask `still` before acting on a record.
        """
        # Mapped for as long as it takes: otherwise it would count as this process's memory.
        sockets = bpf.Array(self._sockets, read_only=True)
        more = bpf.Array(self._more, read_only=True)
        try:
            found: list[Record] = []
            overflowed = False
            for first in range(0, sockets.entries, _PIECE):
                piece = min(_PIECE, sockets.entries - first)
                chosen, crowded = _taken(sockets, first, piece, protocols)
                found += _records(sockets.memory, chosen, protocols)
                for index, others in crowded:
                    places = range(index * more.stride, (index + 1) * more.stride, _place.size)
                    found += _records(more.memory, places[: _MORE.count], protocols)
                    overflowed |= others >= _IN_OVERFLOW
        finally:
            sockets.close()
            more.close()
        if overflowed:
            for key, value in self._overflow.items():
                record = _record(_u64.unpack(key)[0], value, 0)
                if record.protocol in protocols:
                    found.append(record)
        return found

    def still(self, record: Record) -> bool:
        """Whether the record stands as it was read."""
        key = _u32.pack(record.cookie % self._sockets.info.max_entries)
        bucket = self._sockets.lookup(key) or b""
        if _places_hold(bucket, _FIRST, 1, record):
            return True
        if not any(bucket[_OTHERS : _OTHERS + 4]):
            return False
        if _places_hold(self._more.lookup(key) or b"", _MORE.offset, _MORE.count, record):
            return True
        value = self._overflow.lookup(_u64.pack(record.cookie))
        return value is not None and _record(record.cookie, value, 0) == record


def _taken(
    sockets: bpf.Array, first: int, piece: int, protocols: Collection[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Of a piece of the buckets: where the first places of these protocols are, and (index,
    others) of the buckets that have records elsewhere."""
    stride = sockets.stride
    start, end = first * stride, (first + piece) * stride
    memory = memoryview(sockets.memory)[start:end]
    # Columns, without touching Python objects for empty buckets.
    cookies = memory.cast("Q")[_FIRST // 8 :: stride // 8].tolist()
    others = memory.cast("I")[_OTHERS // 4 :: stride // 4].tolist()
    memory.release()
    kinds = sockets.memory[start + _FIRST + _PROTOCOL : end : stride]
    chosen = []
    if any(cookies):
        at = start + _FIRST
        chosen = [
            at + i * stride
            for i, (cookie, kind) in enumerate(zip(cookies, kinds, strict=True))
            if cookie and kind in protocols
        ]
    crowded = []
    if any(others):
        crowded = [(first + i, number) for i, number in enumerate(others) if number]
    return chosen, crowded


def _records(memory: Any, places: Collection[int], protocols: Collection[int]) -> Iterator[Record]:
    """Those of these places that are taken, and were not written to while they were read."""
    for at in places:
        cookie = memory[at : at + 8]
        place = memory[at : at + _place.size]
        number = _u64.unpack(cookie)[0]
        if place[_PROTOCOL] not in protocols:
            continue
        if number and not number & _BUSY and memory[at : at + 8] == cookie == place[:8]:
            yield _record(number, place, _RECORD)


def _record(cookie: int, data: bytes, at: int) -> Record:
    endpoint, generation, vip, peer, vip_port, peer_port, protocol = _read(data, at)
    ntohs = socket.ntohs
    return Record(
        cookie, protocol, (vip, ntohs(vip_port)), (peer, ntohs(peer_port)), endpoint, generation
    )


def _places_hold(data: bytes, first: int, count: int, record: Record) -> bool:
    return any(
        _u64.unpack_from(data, at)[0] == record.cookie
        and _record(record.cookie, data, at + _RECORD) == record
        for at in range(first, first + count * _place.size, _place.size)
    )
