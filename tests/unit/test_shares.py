"""Weights as a program draws them: right to 2^-32, and never beyond the set."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman import abi, shares
from pointsman.policies import (
    AVOID,
    MAGLEV,
    POLICY,
    WEIGHTED,
    ZONE,
    PolicyElement,
    algorithm_of,
    choices,
    most_of,
)
from pointsman.values import TCP, Entry, Frontend, Policy, PortName, to_address
from tests.support.choice import CASES, drawn, share_of

BACKENDS = tuple((to_address(f"10.0.0.{n}"), 80) for n in range(1, 5))
EVERYTHING = Policy(True, 5, 3, 4, 50, 20, 10**10, 3 * 10**11, 3 * 10**9, most_percent=30)
_SIZE = abi.layouts()["share"].size
_weights = st.lists(st.integers(0, shares.MAX_WEIGHT), min_size=1, max_size=300).filter(any)


def read(data: bytes) -> list[tuple[int, int, int]]:
    return [share_of(data, at) for at in range(0, len(data), _SIZE)]


@given(_weights)
@settings(deadline=None)
def test_what_is_drawn_is_what_the_weights_say(weights: list[int]) -> None:
    found = read(shares.packed(weights, len(weights)))
    assert [weight for _, _, weight in found] == weights
    for weight, chance in zip(weights, drawn(found), strict=True):
        assert abs(chance - Fraction(weight, sum(weights))) <= Fraction(1, CASES)
        assert weight or not chance


def test_a_canary_of_one_percent() -> None:
    chances = drawn(read(shares.packed((1, 99), 2)))
    assert [round(float(chance), 6) for chance in chances] == [0.01, 0.99]


@pytest.mark.parametrize("weights", [(), (7,), (3, 3, 3), (0, 0)])
def test_weights_that_make_no_difference_are_none(weights: tuple[int, ...]) -> None:
    assert shares.normal(weights) == ()


@given(st.integers(1, 500))
@settings(deadline=None)
def test_where_all_are_alike_who_looks_at_shares_finds_each_as_often(count: int) -> None:
    found = read(shares.packed((), count))
    assert set(Counter(drawn(found)).values()) == {count}
    assert {weight for _, _, weight in found} == {shares.USUAL}


# -- what stands in service.algorithm --------------------------------------------------------------


def entry(weights: tuple[int, ...] = (), policy: Policy | None = None, algorithm: int = 0) -> Entry:
    frontend = Frontend(to_address("10.96.0.1"), 80, TCP)
    name = PortName("default", "web", "http")
    return Entry(frontend, name, BACKENDS, algorithm=algorithm, weights=weights, policy=policy)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        pytest.param(entry(algorithm=MAGLEV), MAGLEV, id="an-algorithm"),
        pytest.param(entry((1, 2, 3, 4)), WEIGHTED, id="weights"),
        pytest.param(entry((5, 5, 5, 5), None, WEIGHTED), 0, id="weights-that-are-all-alike"),
        pytest.param(entry(policy=EVERYTHING), POLICY, id="a-policy"),
        pytest.param(entry((), None, AVOID | ZONE | POLICY), 0, id="flags-without-a-policy"),
        pytest.param(entry((), EVERYTHING, AVOID), POLICY | AVOID, id="avoid"),
        pytest.param(entry((0, 0, 7, 0), EVERYTHING, AVOID), POLICY | WEIGHTED,
                     id="nothing-is-passed-over-for-nothing-else"),
        pytest.param(entry((0, 0, 7, 7), EVERYTHING, ZONE), POLICY | WEIGHTED | ZONE, id="a-zone"),
        pytest.param(entry((0, 0, 0, 0), EVERYTHING, ZONE), POLICY, id="nobody-in-the-zone"),
        pytest.param(replace(entry((1, 2), EVERYTHING, AVOID | 2), endpoints=()), 2, id="empty"),
    ],
)  # fmt: skip
def test_a_service_asks_only_for_what_makes_a_difference(entry: Entry, expected: int) -> None:
    assert algorithm_of(entry) == expected


@pytest.mark.parametrize(
    ("percent", "sets", "most"),
    [
        pytest.param(30, [10], 3, id="its-share"),
        pytest.param(30, [2], 1, id="at-least-one"),
        pytest.param(0, [10], 0, id="none-by-choice"),
        pytest.param(30, [1], 0, id="the-only-one-stays"),
        pytest.param(100, [4], 3, id="one-always-stays"),
        pytest.param(50, [10, 3], 2, id="also-of-the-smaller-set"),
        pytest.param(50, [10, 1], 5, id="a-set-of-one-passes-over-none"),
        pytest.param(30, [], 0, id="no-set"),
    ],
)
def test_how_many_may_be_ejected(percent: int, sets: list[int], most: int) -> None:
    assert PolicyElement.of_sets(Policy(most_percent=percent), sets).most == most


@given(st.integers(0, 100), st.lists(st.integers(2, 50), min_size=1))
def test_never_are_all_of_a_set_ejected(percent: int, sets: list[int]) -> None:
    assert 0 <= most_of(percent, sets) < min(sets)


def test_endpoints_of_weight_zero_are_no_choice() -> None:
    assert choices(BACKENDS, (0, 1, 5, 0)) == 2
    assert choices(BACKENDS, (0, 0, 0, 0)) == choices(BACKENDS, ()) == 4


def test_a_policy_is_read_as_it_was_written() -> None:
    element = PolicyElement(EVERYTHING, 3)
    data = b"".join(word.to_bytes(8, "little") for word in element.words) + b"\7" + bytes(7)
    assert PolicyElement.of(data) == PolicyElement(replace(EVERYTHING, most_percent=0), 3)
