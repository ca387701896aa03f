"""The marks: a bit for each address that has a frontend, so that the programs let all others go
after one look. Several addresses may share a bit. Pure; `is_marked` of bpf/lookup.h is its reader.
"""

from __future__ import annotations

import struct
from array import array

from pointsman.values import ANY_IPV4, ANY_IPV6, Address, is_ipv4, to_address

_MASK = (1 << 64) - 1
_words = struct.Struct("=4I")
_LOOPBACK_IPV4, _LOOPBACK_IPV6 = to_address("127.0.0.1"), to_address("::1")
#: At most one bit in sixteen is set, and most often one in thirty: a VIP has a wildcard as well.
_BITS_PER_FRONTEND = 16


def words_for(frontends: int) -> int:
    """How many 64-bit words there are for so many frontends: a power of two."""
    wanted = max(frontends * _BITS_PER_FRONTEND // 64, 16)
    return 1 << (wanted - 1).bit_length()


def fold(address: Address) -> Address:
    """All of 127.0.0.0/8 is one address here, and the unspecified ones stand for the loopback."""
    if address == ANY_IPV4 or (is_ipv4(address) and address[12] == 127):
        return _LOOPBACK_IPV4
    return _LOOPBACK_IPV6 if address == ANY_IPV6 else address


def bit_of(address: Address, words: int) -> int:
    """The number of its bit: the word is that by 64. As `mark_of` in bpf/lookup.h."""
    a, b, c, d = _words.unpack(fold(address))
    x: int = (a << 32 | b) * 0x9E3779B97F4A7C15 & _MASK
    x = (x ^ x >> 32) + (c << 32 | d) & _MASK
    x = x * 0xC2B2AE3D27D4EB4F & _MASK
    return (x ^ x >> 32) & (words * 64 - 1)


class Marks:
    """Which bits are set once every write given out was done. `words`: as `words_for`."""

    def __init__(self, words: int) -> None:
        self._count = words
        self._frontends: dict[Address, int] = {}  # how many each address has
        self._shared: dict[int, int] = {}  # bit → how many addresses beyond the first have it
        self._words = array("Q", bytes(8 * words))

    @property
    def words(self) -> dict[int, int]:
        """Every word that is not 0, by its index."""
        return {index: word for index, word in enumerate(self._words) if word}

    def add(self, address: Address) -> tuple[int, int] | None:
        """One frontend more there: the word to write before it (index, value), if any."""
        before = self._frontends.get(address, 0)
        self._frontends[address] = before + 1
        if before:
            return None
        bit = bit_of(address, self._count)
        if self._words[bit >> 6] >> (bit & 63) & 1:
            self._shared[bit] = self._shared.get(bit, 0) + 1
            return None
        return self._flip(bit)

    def remove(self, address: Address) -> tuple[int, int] | None:
        """One frontend less: the word to write once it is gone, if any."""
        left = self._frontends.pop(address) - 1
        if left:
            self._frontends[address] = left
            return None
        bit = bit_of(address, self._count)
        if others := self._shared.pop(bit, 0):
            if others > 1:
                self._shared[bit] = others - 1
            return None
        return self._flip(bit)

    def _flip(self, bit: int) -> tuple[int, int]:
        index = bit >> 6
        self._words[index] ^= 1 << (bit & 63)
        return index, self._words[index]
