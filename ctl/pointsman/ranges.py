"""Ranges of clients' addresses: spec.loadBalancerSourceRanges, and how a change of them is written.

Pure. The map `source_ranges` has an element for each service and range; a program asks it for the
client's address, once.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Set
from typing import NamedTuple

from pointsman import abi
from pointsman.names import cidr_fault
from pointsman.values import Address, is_ipv4, to_address, to_text

#: An address, and how many of its 128 bits count: 10.0.0.0/8 is (::ffff:10.0.0.0, 104).
Source = tuple[Address, int]

_ID_BITS = 32  # source_range.prefix counts the service id as well
_key = abi.layouts()["source_range"]
_pack_key = _key.packer("prefix", "service", "addr")
_read_key = _key.reader("prefix", "service", "addr")


def parse(text: str) -> Source:
    """A CIDR without the bits of its host, which may be set. Raises ValueError."""
    if fault := cidr_fault(text):
        raise ValueError(fault[0])
    network = ipaddress.ip_network(text, strict=False)
    bits = network.prefixlen + 128 - network.max_prefixlen
    return to_address(str(network.network_address)), bits


def source_text(source: Source) -> str:
    """10.0.0.0/8 or fd00::/8."""
    address, bits = source
    if is_ipv4(address) and bits >= 96:
        return f"{to_text(address)}/{bits - 96}"
    return f"{to_text(address)}/{bits}"


def holds(sources: Iterable[Source], client: Address) -> bool:
    """Whether one of them has this address."""
    number = int.from_bytes(client, "big")
    return any(
        (number ^ int.from_bytes(address, "big")) >> (128 - bits) == 0 for address, bits in sources
    )


def pack(service: int, source: Source) -> bytes:
    """The key of one element."""
    address, bits = source
    return _pack_key(_ID_BITS + bits, service, address)


def unpack(key: bytes) -> tuple[int, Source]:
    """Service id and range of a key."""
    prefix, service, address = _read_key(key)
    return service, (address, prefix - _ID_BITS)


class Steps(NamedTuple):
    """The elements to write so that one set of ranges becomes another, around the moment when the
    frontend is switched to other endpoints."""

    add: Set[Source] = frozenset()
    remove: Set[Source] = frozenset()
    add_later: Set[Source] = frozenset()
    remove_later: Set[Source] = frozenset()


def steps(have: Set[Source], want: Set[Source], *, asked: bool, ask: bool) -> Steps:
    """`asked`, `ask`: whether the programs ask for ranges at all (PACKETS_RANGES), now and then.

    First only those clients are left that may come before and after, then the frontend is switched,
    then the new ones are let in: nobody gets an endpoint that he may not have, neither of the
    former Service nor of the next, and who may come both before and after is never refused.
    """
    if not ask:
        return Steps(remove_later=have)
    if not asked:  # what was left in the map had no effect
        return Steps(want - have, have - want)
    if have == want:
        return Steps()
    both = common(have, want)
    return Steps(both - have, have - both, want - both, both - want)


def common(one: Set[Source], other: Set[Source]) -> frozenset[Source]:
    """The ranges that have the addresses which both have, and no others."""
    return frozenset(_within(one, other) | _within(other, one))


def _within(inner: Set[Source], outer: Set[Source]) -> set[Source]:
    """Those of `inner` that a range of `outer` has whole: two ranges never overlap by halves."""
    prefixes = {(int.from_bytes(address, "big") >> (128 - bits), bits) for address, bits in outer}
    lengths = {bits for _, bits in outer}
    return {
        (address, bits)
        for address, bits in inner
        if any(
            (int.from_bytes(address, "big") >> (128 - shorter), shorter) in prefixes
            for shorter in lengths
            if shorter <= bits
        )
    }
