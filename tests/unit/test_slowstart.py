"""New endpoints get their share as time goes by."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman import abi
from pointsman.objects import Ref
from pointsman.slowstart import SlowStart, slowed, steps_of, told
from pointsman.values import TCP, Backend, Entry, Frontend, PortName, to_address

ABI = abi.constants()
WEIGHTED, ZONE, FEWEST = (
    ABI[name] for name in ("CHOICE_WEIGHTED", "CHOICE_ZONE", "ALGORITHM_LEAST_CONNECTIONS")
)
REF = Ref("Service", "default", "web")
A, B, C = ((to_address(f"10.244.0.{i}"), 80) for i in (1, 2, 3))
SECONDS, BEGIN = 90, 1000.0


def entry(*endpoints: Backend, weights: tuple[int, ...] = (), algorithm: int = 0) -> Entry:
    algorithm |= WEIGHTED if weights else 0
    frontend = Frontend(to_address("10.96.0.1"), 80, TCP)
    owner = PortName("default", "web", "")
    return Entry(frontend, owner, endpoints, algorithm=algorithm, weights=weights)


def started(*endpoints: Backend) -> SlowStart:
    """A Service with these endpoints, which it has had for long."""
    found = SlowStart()
    assert found.weigh(REF, (entry(*endpoints),), SECONDS, 0.0) == (entry(*endpoints),)
    assert found.due(1e9) == set()
    return found


@pytest.mark.parametrize(
    ("age", "weights"),
    [
        pytest.param(0, (100, 10), id="a-tenth-at-first"),
        pytest.param(9.9, (100, 10), id="until-the-next-step"),
        pytest.param(10, (100, 20), id="which-is-a-ninth-of-the-time"),
        pytest.param(45, (100, 50), id="in-the-middle"),
        pytest.param(89.9, (100, 90), id="the-last-step"),
        pytest.param(90, (), id="as-the-others-in-the-end"),
        pytest.param(9e9, (), id="and-for-ever"),
    ],
)
def test_a_new_endpoint_s_weight_grows(age: float, weights: tuple[int, ...]) -> None:
    slow = started(A)
    slow.weigh(REF, (entry(A, B),), SECONDS, BEGIN)
    (found,) = slow.weigh(REF, (entry(A, B),), SECONDS, BEGIN + age)
    assert (found.weights, found.algorithm) == (weights, WEIGHTED if weights else 0)


def test_what_is_asked_for_when_the_agent_starts_is_not_new() -> None:
    assert SlowStart().weigh(REF, (entry(A, B),), SECONDS, 0.0) == (entry(A, B),)


def test_where_all_are_new_all_are_alike() -> None:
    slow = started()
    assert slow.weigh(REF, (entry(A, B),), SECONDS, BEGIN) == (entry(A, B),)


def test_weights_and_what_else_decides_are_kept() -> None:
    before = entry(A, B, C, weights=(300, 50, 0), algorithm=FEWEST | ZONE)
    (found,) = started(A).weigh(REF, (before,), SECONDS, BEGIN)
    assert found == replace(before, weights=(300, 5, 0))


def test_a_small_weight_does_not_become_none() -> None:
    (found,) = started(A).weigh(REF, (entry(A, B, weights=(100, 1)),), SECONDS, BEGIN)
    assert found.weights == (100, 1)


def test_weights_that_are_alike_by_now_are_no_weights() -> None:
    (found,) = started(A).weigh(REF, (entry(A, B, weights=(10, 100)),), SECONDS, BEGIN)
    assert (found.weights, found.algorithm) == ((), 0)


def test_an_endpoint_that_comes_back_is_new_again() -> None:
    slow = started(A, B)
    slow.weigh(REF, (entry(A),), SECONDS, BEGIN)
    (found,) = slow.weigh(REF, (entry(A, B),), SECONDS, BEGIN + 1)
    assert found.weights == (100, 10)


def test_services_are_due_when_their_weights_change_and_once() -> None:
    slow = started(A)
    slow.weigh(REF, (entry(A, B),), SECONDS, BEGIN)
    assert slow.due(BEGIN + 9.9) == set()
    assert slow.due(BEGIN + 10) == {REF}
    assert slow.due(BEGIN + 11) == set(), "told already"
    slow.weigh(REF, (entry(A, B),), SECONDS, BEGIN + 11)
    assert slow.due(BEGIN + 19.9) == set()
    assert slow.due(BEGIN + 20) == {REF}


def test_one_service_changes_once_a_second_at_most() -> None:
    slow = started(A)
    slow.weigh(REF, (entry(A, B),), 2, BEGIN)
    assert slow.due(BEGIN + 0.9) == set()
    assert slow.due(BEGIN + 1.0) == {REF}


@pytest.mark.parametrize(("entries", "seconds"), [((entry(A, B),), 0), ((), 0)])
def test_nobody_waits_for_what_has_no_slow_start_any_more(
    entries: tuple[Entry, ...], seconds: int
) -> None:
    slow = started(A)
    slow.weigh(REF, (entry(A, B),), SECONDS, BEGIN)
    assert slow.weigh(REF, entries, seconds, BEGIN + 1) == entries
    assert slow.due(BEGIN + 1000) == set()
    # And when it has one again, all that it has is old.
    assert slow.weigh(REF, (entry(A, B),), SECONDS, BEGIN + 2) == (entry(A, B),)


def test_what_is_told_makes_the_same_of_the_entries() -> None:
    six = (to_address("fd00::1"), 8080)
    slow, entries = started(A), (entry(A, B, six, weights=(300, 200, 100)),)
    found = slow.weigh(REF, entries, SECONDS, BEGIN)
    slow.weigh(REF, entries, SECONDS, BEGIN + 1)
    status = told(slow.steps)
    assert status == {"Service default/web": {"10.244.0.2:80": 10, "[fd00::1]:8080": 10}}
    assert slowed(entries, steps_of(status)[REF]) == found != entries
    slow.weigh(REF, entries, SECONDS, BEGIN + SECONDS)
    assert told(slow.steps) == {}


@given(st.integers(1, 86400), st.floats(0, 1e6))
def test_it_ends(seconds: int, begin: float) -> None:
    slow = SlowStart()
    slow.weigh(REF, (entry(A),), seconds, begin)
    slow.weigh(REF, (entry(A, B),), seconds, begin)
    now, last = begin, 0
    for _ in range(30):
        now = next((at for at in steps(now, seconds) if slow.due(at)), now)
        (found,) = slow.weigh(REF, (entry(A, B),), seconds, now)
        weight = found.weights[1] if found.weights else 100
        assert weight >= last
        last = weight
        if not found.weights:
            break
    assert last == 100 and not slow.due(float("inf"))


def steps(now: float, seconds: int) -> list[float]:
    return [now + max(1.0, seconds / 9) * i / 4 for i in range(1, 9)]
