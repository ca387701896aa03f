"""How likely each endpoint of a set is, and the table by which a program draws it. Pure.

By Walker's aliases, in whole numbers: each slot has a column of 2^32 cases. `keep` of them are its
own, the others are another slot's; so one number by chance finds a slot, however many there are.
Each probability is right to 2^-32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from pointsman import abi

_share = abi.layouts()["share"]
_pack = _share.packer("keep", "other", "weight")
_CASES = 1 << 32
MAX_WEIGHT = abi.constants()["MAX_WEIGHT"]
#: Bit of a weight: of an endpoint in another zone, which is not drawn.
ELSEWHERE = abi.constants()["WEIGHT_ELSEWHERE"]
#: Of an endpoint of which nothing else is said.
USUAL = 100


def normal(weights: Sequence[int]) -> tuple[int, ...]:
    """() if these weights make no difference: all are alike, also if all are 0."""
    return tuple(weights) if len(set(weights)) > 1 else ()


def drawn(weights: Sequence[int]) -> list[int]:
    """What each weighs when endpoints are drawn."""
    return [0 if weight & ELSEWHERE else weight for weight in weights]


def table(weights: Sequence[int]) -> list[tuple[int, int]]:
    """(keep, other) of each place. `weights` as they are drawn: from 0 on, not all of them 0."""
    count, total = len(weights), sum(weights)
    left = [weight * count for weight in weights]  # of a column's `total`
    poor = [i for i in range(count) if left[i] < total]
    rich = [i for i in range(count) if left[i] >= total]
    found = [(_CASES - 1, place) for place in range(count)]
    while poor:
        place, giver = poor.pop(), rich[-1]
        keep = (left[place] * _CASES + total // 2) // total
        if keep < _CASES:
            found[place] = (keep, giver)
        left[giver] -= total - left[place]
        if left[giver] < total:
            poor.append(rich.pop())
    return found


def packed(weights: Sequence[int], count: int) -> bytes:
    """The shares of so many slots, as they stand in the map; `weights` as `normal` has them."""
    return _weighted(tuple(weights)) if weights else _alike(count)


def _weighted(weights: tuple[int, ...]) -> bytes:
    columns = zip(table(drawn(weights)), weights, strict=True)
    return b"".join(_pack(keep, other, weight) for (keep, other), weight in columns)


@lru_cache(maxsize=256)
def _alike(count: int) -> bytes:
    return b"".join(_pack(_CASES - 1, place, USUAL) for place in range(count))
