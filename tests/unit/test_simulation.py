"""The simulation of many nodes: repeatable, and it knows what is certain."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.bench import simulation
from tests.bench.simulation import CASES, How

SIZE = 40


def result(case: str, how: How, nodes: int, utilisation: float = 0.7) -> simulation.Result:
    short = replace(CASES[case], seconds=6)
    asked = simulation.requests(short, utilisation, SIZE)
    return simulation.simulate(short, asked, how, nodes, SIZE)


@pytest.mark.parametrize(
    "how", [*simulation.ALGORITHMS, *simulation.EJECTING], ids=lambda how: how.name
)
def test_the_same_comes_out_again(how: How) -> None:
    assert result("refusing", how, 4) == result("refusing", how, 4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", [simulation.RANDOM, simulation.MAGLEV], ids=lambda how: how.name)
def test_who_knows_nothing_does_not_mind_the_number_of_nodes(case: str, how: How) -> None:
    assert not how.is_local
    assert result(case, how, 1) == result(case, how, SIZE)


def test_what_one_node_knows_helps_and_what_many_know_each_helps_less() -> None:
    alone, many = (result("slow", simulation.LEAST, nodes) for nodes in (1, SIZE))
    random = result("slow", simulation.RANDOM, 1)
    assert alone.failed < random.failed / 3
    assert alone.failed < many.failed / 2
    assert alone.fairness < random.fairness


@pytest.mark.parametrize("how", simulation.EJECTING, ids=lambda how: how.name)
def test_ejection_ends_refusals(how: How) -> None:
    random, ejecting = (result("refusing", each, 1) for each in (simulation.RANDOM, how))
    # 5 failures of each endpoint that refuses, where about 56 connects would have come to it
    assert ejecting.failed < random.failed * 6 / 56


def test_rounds_in_step_are_worse_than_chance() -> None:
    in_step, apart = (
        result("equal", how, SIZE) for how in (simulation.ROUND_ROBIN, simulation.APART)
    )
    assert in_step.p99 > 2 * apart.p99


def test_at_half_the_load_nobody_waits_for_long() -> None:
    found = result("equal", simulation.ROUND_ROBIN, 1, utilisation=0.3)
    assert found.failed == 0
    assert 250 < found.p50 < 300  # the median of the work, 300 ms in the mean
    assert found.fairness < 1.05


@pytest.mark.parametrize(("size", "nodes", "each"), [(40, 8, 10), (40, 40, 5), (60, 6, 30)])
def test_subsets_deal_each_endpoint_as_often(size: int, nodes: int, each: int) -> None:
    dealt = list(simulation.subsets(size, nodes, each))
    assert all(len(set(some)) == each for some in dealt)
    assert set(Counter(e for some in dealt for e in some).values()) == {nodes * each // size}


def test_requests_are_as_many_as_asked_for() -> None:
    for name, able in (("equal", 1), ("slow", 0.91), ("refusing", 0.9)):
        case = CASES[name]
        asked = simulation.requests(case, 0.5, 400)
        seconds = case.seconds + simulation.WARM / simulation.SECOND
        expected = 0.5 * able * 400 * simulation.WORKERS / simulation.SERVICE * seconds
        assert len(asked.at) == pytest.approx(expected, rel=0.02)
        assert asked.at == sorted(asked.at)
        work = sum(asked.work) / len(asked.work) / simulation.SECOND
        assert work == pytest.approx(simulation.SERVICE, rel=0.02)
