"""Maglev tables: which endpoint a hash leads to, nearly the same whoever comes or goes. Pure.

After Eisenbud and others, "Maglev: A Fast and Reliable Software Network Load Balancer" (NSDI 2016),
section 3.4: each endpoint has a permutation of the entries of its own, and in turn they take the
next one of it that is free. A table depends on nothing but the endpoints and their weights, so all
nodes with the same endpoints send a client to the same one.

In the map `maglev` a table is a run of lines, 32 entries each. What the last line has left holds a
stamp of what the table was made from, so that a new agent need not make it again to trust it.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from heapq import heapify, heapreplace

from pointsman import abi, shares
from pointsman.values import Backend

#: Primes, each with room for a stamp behind it. A table has 100 entries for each endpoint or more:
#: then no endpoint's share is off by more than about one in a hundred.
SIZES = (251, 503, 1019, 2039, 4091, 8179, 16369, 32749, 65521)
PER_ENDPOINT = 100
#: The largest table serves sets that are larger, until shares would be off by a tenth.
_AT_LEAST = 10
LINE = abi.layouts()["line"].size  # bytes
PER_LINE = LINE // 2  # entries
STAMP = 8  # bytes
#: Part of the stamp: raise it when the same endpoints give another table.
_VERSION = b"1"
_halves = struct.Struct("<QQ")


def size_for(endpoints: int, weights: Sequence[int] = ()) -> int:
    """How many entries the table of so many endpoints has; 0 if it needs none, or is too large.

    With `weights` the lightest has some entries, too, as far as the largest table goes.
    """
    if endpoints < 2:
        return 0
    wanted = PER_ENDPOINT * endpoints
    if light := min(filter(None, weights), default=0):
        wanted = max(wanted, _AT_LEAST * sum(weights) // light)
    for size in SIZES:
        if size >= wanted:
            return size
    return SIZES[-1] if SIZES[-1] >= _AT_LEAST * endpoints else 0


def lines_of(entries: int) -> int:
    """How many lines a table of so many entries takes."""
    return -(-entries // PER_LINE)


def table(endpoints: Sequence[Backend], weights: Sequence[int] | None, size: int) -> array[int]:
    """`size` entries (a prime), each the place of an endpoint in `endpoints`.

    An endpoint of twice the weight has twice the entries; all weigh the same if `weights` is None.
    Weights are whole numbers, 0 or more; with 0 an endpoint has no entry.
    """
    order = sorted(range(len(endpoints)), key=endpoints.__getitem__)
    if weights is not None:
        order = [i for i in order if weights[i]]
    result = array("H", bytes(2 * size))
    if not order:
        return result
    at, skips = [], []
    for i in order:
        offset, skip = _preference(*endpoints[i])
        at.append(offset % size)
        skips.append(1 + skip % (size - 1))
    if weights is None or len({weights[i] for i in order}) == 1:
        _fill(result, order, at, skips, size)
    else:
        _fill_by_weight(result, order, at, skips, [weights[i] for i in order], size)
    return result


@lru_cache(maxsize=1 << 14)
def _preference(address: bytes, port: int) -> tuple[int, int]:
    """Where the permutation of an endpoint begins and its step, before they are cut to the size."""
    data = address + port.to_bytes(2, "big")
    offset, skip = _halves.unpack(blake2b(data, digest_size=16).digest())
    return offset, skip


def _fill(result: array[int], order: list[int], at: list[int], skips: list[int], size: int) -> None:
    """Each takes one entry in each round."""
    free = bytearray(b"\1") * size
    left, turns = size, list(enumerate(order))
    while True:
        for turn, place in turns:
            entry = at[turn]
            if not free[entry]:
                skip = skips[turn]
                while not free[entry]:
                    entry += skip
                    if entry >= size:
                        entry -= size
                at[turn] = entry
            free[entry] = 0
            result[entry] = place
            left -= 1
            if not left:
                return


def _fill_by_weight(
    result: array[int],
    order: list[int],
    at: list[int],
    skips: list[int],
    weights: list[int],
    size: int,
) -> None:
    """The heaviest takes one entry in each round, another one whenever its weights have added up
    to that of the heaviest."""
    free = bytearray(b"\1") * size
    full = max(weights)
    # The round of its next entry, whose turn it is in that, and how many it then has.
    rounds = [(-(-full // weight), turn, 1) for turn, weight in enumerate(weights)]
    heapify(rounds)
    for _ in range(size):
        _, turn, taken = rounds[0]
        heapreplace(rounds, (-(-full * (taken + 1) // weights[turn]), turn, taken + 1))
        entry, skip = at[turn], skips[turn]
        while not free[entry]:
            entry = (entry + skip) % size
        free[entry] = 0
        at[turn] = entry
        result[entry] = order[turn]


def stamp(endpoints: Sequence[Backend], weights: Sequence[int] = ()) -> bytes:
    """8 bytes that tell the tables of these endpoints from those of any others."""
    digest = blake2b(_VERSION, digest_size=STAMP)
    digest.update(b"".join(address + port.to_bytes(2, "big") for address, port in endpoints))
    if len(set(weights)) > 1:
        digest.update(array("Q", shares.drawn(weights)).tobytes())
    return digest.digest()


@lru_cache(maxsize=64)
def packed(endpoints: tuple[Backend, ...], weights: tuple[int, ...] = ()) -> bytes:
    """The table of these endpoints as its lines stand in the map, with the stamp at the end;
    without weights they are all alike."""
    weights = tuple(shares.drawn(weights))
    size = size_for(len(endpoints), weights)
    entries = table(endpoints, weights or None, size).tobytes()
    room = lines_of(size) * LINE - len(entries) - STAMP
    return entries + bytes(room) + stamp(endpoints, weights)


def moved(before: Sequence[Backend], after: Sequence[Backend], size: int) -> float:
    """The share of all hashes that lead to another endpoint once `before` has become `after`."""
    old, new = table(before, None, size), table(after, None, size)
    return sum(before[a] != after[b] for a, b in zip(old, new, strict=True)) / size


_MASK = (1 << 64) - 1
_words = struct.Struct("=4I16xHHB")


def mix(x: int) -> int:
    """mix() of bpf/atomic.h."""
    x = x * 0xFF51AFD7ED558CCD & _MASK
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & _MASK
    return x ^ x >> 33


def socket_hash(client: int, owner: int) -> int:
    """The hash of by_table() of bpf/choose.h, 32 bits: of a network namespace (cookie) and the
    owner that it asks for."""
    return mix(client ^ owner << 32) >> 32


def hit(weights: Sequence[int], number: int) -> int:
    """The place in a set that such a hash draws without a table: pick_by_weight() of bpf/select.h,
    and by_table()."""
    place = number * len(weights) >> 32
    if not shares.normal(weights):
        return place
    keep, other = shares.table(shares.drawn(weights))[place]
    return other if mix(number) & 0xFFFFFFFF >= keep else place


def flow_hash(key: bytes) -> int:
    """flow_hash() of bpf/select.h, 32 bits, for a raw struct tuple: client, ports and protocol."""
    a, b, c, d, source_port, destination_port, protocol = _words.unpack_from(key)
    x = mix(a << 32 | b)
    x = mix(x ^ (c << 32 | d))
    return mix(x ^ (source_port << 32 | destination_port << 16 | protocol)) >> 32
