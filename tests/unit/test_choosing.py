"""The pure part of the bench of choosing: what is asked, and what is made of the answers."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import pytest

from tests.bench.choosingcases import (
    AGAIN,
    CASES,
    LEAST,
    RANDOM,
    WORK,
    ejecting,
    requests,
)
from tests.bench.choosingfigures import (
    ANSWER,
    CUT_OFF,
    NO_ANSWER,
    NO_CONNECTION,
    NOT_ASKED,
    REFUSED,
    Answers,
    Asked,
    Result,
    bars,
    noise,
    result,
    table,
)

CASE = replace(CASES["equal"], seconds=2, warm=1.0, compared=(0, 1))
SECOND = 1_000_000


def test_every_arm_of_a_round_is_asked_the_same() -> None:
    assert requests(CASE, 1) == requests(CASE, 1) != requests(CASE, 2)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.stay])
def test_the_load_is_what_the_case_says(name: str) -> None:
    case = replace(CASES[name], seconds=60)
    asked = requests(case, 1)
    assert len(asked) == pytest.approx(case.rate * (case.warm + 60), rel=0.03)
    assert mean(work for _, work in asked) == pytest.approx(WORK * SECOND, rel=0.03)


def test_connections_that_stay_end_together() -> None:
    case = CASES["stay"]
    asked = requests(case, 1)
    assert len(asked) == case.stay
    assert {when + work for when, work in asked} == {int(case.seconds * SECOND)}


def answers(*asked: Asked) -> Answers:
    return Answers(list(asked), [30, 10, 99], 0.5)


def test_each_end_of_a_request_counts_as_what_it_is() -> None:
    late = 2 * SECOND
    found = result(
        CASE,
        answers(
            *(Asked(late, ANSWER, 10_000) for _ in range(9)),
            Asked(late, REFUSED, 20),
            Asked(late, NO_CONNECTION, 1_500_000),
            Asked(late, NO_ANSWER, 1_500_000),
            Asked(late, CUT_OFF, 30_000),
            Asked(late, NOT_ASKED, 0),
        ),
    )
    assert (found.asked, found.failed, found.unanswered) == (13, 2, 2)
    assert found.rate == 4.5
    assert (found.p50, found.p99) == (10, 1500)  # a refusal is no quick answer


def test_what_is_asked_before_things_go_wrong_does_not_count() -> None:
    early = Asked(SECOND - 1, ANSWER, 77_000)
    found = result(CASE, answers(early, Asked(SECOND, ANSWER, 5_000)))
    assert (found.asked, found.mean) == (1, 5)


def test_fairness_is_of_the_endpoints_that_can_be_compared() -> None:
    one = Asked(SECOND, ANSWER, 1)
    assert result(CASE, answers(one)).fairness == 1.5
    assert result(replace(CASE, compared=()), answers(one)).fairness is None


def test_the_share_of_a_canary_is_of_all_connections() -> None:
    found = result(replace(CASE, canary=1), answers(Asked(SECOND, ANSWER, 1)))
    assert found.canary == 10 / 139


def of(p99: float, failed: int = 0) -> Result:
    return Result(1000, 25, 20, p99, 2 * p99, failed, 0, 500, 1.1, None, 0.3)


def test_bars_are_beside_random_of_the_same_run() -> None:
    found = {
        "equal": {
            RANDOM.name: [of(50), of(60)],
            AGAIN.name: [of(55), of(54)],
            "worse": [of(70), of(70)],
        },
        "slow": {RANDOM.name: [of(1000), of(2000)], LEAST.name: [of(400), of(900)]},
        "refusing": {
            RANDOM.name: [of(50, 500), of(50, 400)],
            LEAST.name: [of(50, 9), of(50, 9)],
            ejecting(RANDOM).name: [of(50, 0), of(50, 11)],
        },
    }
    assert noise(found) == pytest.approx(60 / 54)
    said = {(bar.what.partition(":")[0], bar.arm): (bar.value, bar.met) for bar in bars(found)}
    assert said == {
        ("one of ten refuses", LEAST.name): (18 / 900, True),
        ("one of ten refuses", ejecting(RANDOM).name): (12 / 900, True),
        ("one of ten 10 × slower", LEAST.name): (pytest.approx(0.425), True),
        ("all equal", "worse"): (pytest.approx((70 / 50 + 70 / 60) / 2), False),
    }


def test_a_table_has_as_many_cells_in_each_line() -> None:
    for name in CASES:
        lines = list(table(name, {"one": [of(50)], "two": [of(60, 1)]}))
        rows = "\n".join(lines).splitlines()
        assert len(rows) == 4
        assert len({row.count("|") for row in rows}) == 1
