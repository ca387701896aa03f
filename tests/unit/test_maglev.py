"""Maglev tables: even, the same on every node, and hardly disturbed by who comes or goes."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman import maglev
from pointsman.values import Backend, to_address


def backends(count: int, first: int = 0) -> tuple[Backend, ...]:
    """10.0.0.1:8080 and so on, sorted as sets are."""
    numbers = range(first + 1, first + count + 1)
    return tuple(sorted((to_address(f"10.0.{n >> 8}.{n & 255}"), 8080) for n in numbers))


_counts = st.integers(2, 60)


@pytest.mark.parametrize(
    ("endpoints", "entries"),
    [
        pytest.param(0, 0, id="nobody"),
        pytest.param(1, 0, id="one-needs-no-choice"),
        pytest.param(2, 251, id="two"),
        pytest.param(10, 1019, id="ten"),
        pytest.param(655, 65521, id="as-many-as-have-a-hundred-entries-each"),
        pytest.param(6552, 65521, id="as-many-as-have-ten"),
        pytest.param(6553, 0, id="too-many"),
    ],
)
def test_sizes(endpoints: int, entries: int) -> None:
    assert maglev.size_for(endpoints) == entries


@pytest.mark.parametrize(
    ("weights", "entries"),
    [
        pytest.param((100, 100), 251, id="alike"),
        pytest.param((100, 1), 1019, id="a-canary-of-one-percent-has-ten"),
        pytest.param((10000, 1), 65521, id="as-many-as-there-are"),
        pytest.param((100, 0), 251, id="who-has-none-needs-none"),
        pytest.param((0, 0), 251, id="none"),
    ],
)
def test_who_weighs_little_has_some_entries_too(weights: tuple[int, int], entries: int) -> None:
    assert maglev.size_for(2, weights) == entries
    found = Counter(maglev.table(backends(2), weights if any(weights) else None, entries))
    assert all((found[i] > 5) == bool(weight) for i, weight in enumerate(weights) if any(weights))


def test_sizes_are_primes_with_room_for_a_stamp_in_their_last_line() -> None:
    for size in maglev.SIZES:
        assert all(size % factor for factor in range(2, int(size**0.5) + 1))
        assert (maglev.lines_of(size) * maglev.PER_LINE - size) * 2 >= maglev.STAMP


@given(_counts)
@settings(deadline=None)
def test_each_of_equal_weight_has_an_equal_share(count: int) -> None:
    size = maglev.size_for(count)
    found = Counter(maglev.table(backends(count), None, size))
    assert set(found) == set(range(count))
    assert max(found.values()) - min(found.values()) <= 1


@given(st.lists(st.integers(0, 9), min_size=2, max_size=20).filter(any))
@settings(deadline=None)
def test_shares_are_as_the_weights(weights: list[int]) -> None:
    size = maglev.size_for(len(weights))
    found = Counter(maglev.table(backends(len(weights)), weights, size))
    # In turns each has its part of a whole number, and is off by one at most; what all are off by
    # together, each bears by its share.
    for place, weight in enumerate(weights):
        share = weight / sum(weights)
        off = 1 + share * sum(map(bool, weights))
        assert found[place] == pytest.approx(size * share, abs=off)


@given(st.randoms(use_true_random=False), st.integers(2, 20), st.booleans())
@settings(deadline=None)
def test_the_order_of_endpoints_does_not_matter(
    rng: random.Random, count: int, weighted: bool
) -> None:
    there = list(backends(count))
    weights = {backend: rng.randint(1, 5) for backend in there} if weighted else None
    shuffled = rng.sample(there, count)
    one, other = (
        [order[i] for i in maglev.table(order, weights and [weights[b] for b in order], 1019)]
        for order in (there, shuffled)
    )
    assert one == other


def test_a_table_is_the_same_on_every_node_and_in_every_version() -> None:
    """Nodes of a cluster that is being upgraded send a client to the same endpoint: where this has
    to change, it changes for all of them at once, and so must the version in the stamp."""
    there = (*backends(4), (to_address("fd00::1"), 53))
    assert list(maglev.table(there, None, 251)[:16]) == [
        0, 0, 0, 1, 0, 0, 2, 1, 2, 1, 3, 4, 4, 4, 4, 1
    ]  # fmt: skip


@given(_counts, st.data())
@settings(deadline=None, max_examples=40)
def test_who_leaves_or_comes_moves_little_more_than_his_own_share(
    count: int, data: st.DataObject
) -> None:
    there = backends(count)
    gone = data.draw(st.integers(0, count - 1))
    others = there[:gone] + there[gone + 1 :]
    size = maglev.size_for(count)
    for before, after in ((there, others), (others, there)):
        assert 1 / count - 0.01 <= maglev.moved(before, after, size) <= 1 / count + 0.04


def test_a_hash_without_a_table_moves_nearly_all() -> None:
    """What a table is for, in one figure: one of ten leaves, and of all clients 12 % move."""
    there = backends(10)
    hashes = range(maglev.SIZES[-1])
    moved = sum(there[h % 10] != there[h % 9] for h in hashes) / len(hashes)
    assert moved > 0.85 and maglev.moved(there, there[:-1], maglev.size_for(10)) < 0.14


@given(st.lists(st.sampled_from(backends(40)), min_size=2, max_size=40, unique=True))
@settings(deadline=None)
def test_packed_lines_hold_the_table_and_its_stamp(members: list[Backend]) -> None:
    there = tuple(sorted(members))
    size = maglev.size_for(len(there))
    data = maglev.packed(there)
    assert len(data) == maglev.lines_of(size) * maglev.LINE
    assert data[: 2 * size] == maglev.table(there, None, size).tobytes()
    assert data[-maglev.STAMP :] == maglev.stamp(there)
    assert maglev.stamp(there) != maglev.stamp(there[:-1])


def test_a_stamp_tells_weights_apart_unless_all_weigh_the_same() -> None:
    there = backends(3)
    assert maglev.stamp(there) == maglev.stamp(there, (2, 2, 2)) != maglev.stamp(there, (2, 2, 1))
