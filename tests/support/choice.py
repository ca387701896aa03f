"""What a program would draw, from shares as they stand in the map."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from pointsman import abi
from pointsman.shares import normal

CASES = 1 << 32
_read = abi.layouts()["share"].reader("keep", "other", "weight")
_WEIGHTED = abi.constants()["CHOICE_WEIGHTED"]

Share = tuple[int, int, int]  # keep, other, weight


def share_of(data: bytes, offset: int = 0) -> Share:
    keep, other, weight = _read(data, offset)
    return keep, other, weight


def drawn(shares: Sequence[Share]) -> list[Fraction]:
    """How likely each place is. Fails if a draw could leave the set."""
    cases = [0] * len(shares)
    for place, (keep, other, _) in enumerate(shares):
        assert other < len(shares), f"place {place} stands for {other}, outside of the set"
        cases[place] += keep
        cases[other] += CASES - keep
    return [Fraction(n, CASES * len(shares)) for n in cases]


def weights_in_effect(algorithm: int, shares: Sequence[Share]) -> tuple[int, ...]:
    """() if all are alike. Fails if what is drawn is not what the weights say, also where nobody
    looks at them yet."""
    weights = _weights(tuple(shares))
    return weights if algorithm & _WEIGHTED else ()


@lru_cache(maxsize=1 << 12)
def _weights(shares: tuple[Share, ...]) -> tuple[int, ...]:
    weights = [weight for _, _, weight in shares]
    alike = not normal(weights)
    for place, chance in enumerate(drawn(shares)):
        wanted = Fraction(1, len(shares)) if alike else Fraction(weights[place], sum(weights))
        assert abs(chance - wanted) <= Fraction(1, CASES), f"place {place}: {chance}, not {wanted}"
    return normal(weights)
