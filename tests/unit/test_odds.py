"""What a choice weighs and how likely each endpoint is, against the programs' text and by trial."""

from __future__ import annotations

import random
import re

import pytest

from pointsman import abi, weigh
from pointsman.odds import Set, odds
from pointsman.outcomes import Outcomes
from pointsman.values import Policy
from pointsman.weigh import Member, cost_of, faded, spills_over, state_of

SECOND = 1_000_000_000
NOW = 1000 * SECOND
LEAST, EWMA = weigh.LEAST_CONNECTIONS, weigh.PEAK_EWMA
WEIGHTED, POLICY, AVOID, ZONE = (
    weigh.CHOICE_WEIGHTED,
    weigh.CHOICE_POLICY,
    weigh.CHOICE_AVOID,
    weigh.CHOICE_ZONE,
)


def load(open: int = 0, **known: int | bool) -> Member:
    return Member(open, Outcomes(**known))  # type: ignore[arg-type]


def test_the_numbers_are_those_of_the_programs() -> None:
    text = "".join((abi.source_directory() / f"{n}.h").read_text() for n in ("outcome", "choose"))
    defined = dict(re.findall(r"#define (\w+) (.+?)(?: /\*.*)?\n", text))
    assert defined["FADE"] == "(8 * NSEC_PER_SEC)"
    assert weigh.FADE == 8 * SECOND
    for name in ("SLOW_US", "DRAWS", "ASKED"):
        assert int(defined[name]) == getattr(weigh, name)


def test_what_is_known_fades_by_half_each_eight_seconds() -> None:
    assert [faded(800, NOW - age * SECOND, NOW) for age in (0, 7, 8, 17, 80)] == [
        800, 800, 400, 200, 0
    ]  # fmt: skip
    assert faded(800, NOW + SECOND, NOW) == 800
    assert faded(800, 0, 1 << 62) == 0


@pytest.mark.parametrize(
    ("known", "choice", "weight", "cost"),
    [
        pytest.param(load(open=3), LEAST, 0, 4, id="open-connections"),
        pytest.param(
            load(open=3, streak=2, measured=NOW), LEAST, 0, 20, id="failures-in-a-row-multiply"
        ),
        pytest.param(
            load(streak=9, measured=NOW - 8 * SECOND), LEAST, 0, 129, id="and-fade-from-256"
        ),
        pytest.param(
            load(open=3, latency=200, measured=NOW - 8 * SECOND), EWMA, 0, 404, id="connect-time"
        ),
        pytest.param(load(), EWMA, 0, 2, id="one-connection-finds-out-the-connect-time"),
        pytest.param(load(open=1), EWMA, 0, 2_000_002, id="the-others-wait-for-it"),
        pytest.param(load(open=3), LEAST | WEIGHTED, 300, 200, id="by-weight"),
        pytest.param(load(), LEAST | WEIGHTED, 7, 100, id="who-is-idle-costs-the-same"),
        pytest.param(load(open=3), LEAST | WEIGHTED, 0, weigh.NEVER, id="without-weight"),
    ],
)
def test_costs_are_the_programs(known: Member, choice: int, weight: int, cost: float) -> None:
    assert cost_of(known._replace(weight=weight), choice, None, NOW) == cost


WATCHED = Policy(watch=True, max_connections=5, streak=5, trial=3 * SECOND)


@pytest.mark.parametrize(
    ("known", "choice", "state", "cost"),
    [
        pytest.param(load(open=5), POLICY, "full", weigh.NEVER, id="full"),
        pytest.param(load(open=5), 0, "ready", 6, id="no-policy-in-force"),
        pytest.param(load(until=NOW + 4), POLICY | AVOID, "ejected", weigh.NEVER, id="ejected"),
        pytest.param(load(until=NOW + 4), POLICY, "ready", 1, id="observed-only"),
        pytest.param(
            load(until=NOW), POLICY | AVOID, "trial-due", weigh.AT_ONCE, id="its-time-is-over"
        ),
        pytest.param(
            load(until=NOW + 5, trial=True),
            POLICY | AVOID,
            "trial",
            weigh.NEVER,
            id="a-connection-tries-it",
        ),
        pytest.param(
            load(until=NOW - 5), POLICY | AVOID, "trial-due", weigh.AT_ONCE, id="nothing-came-of-it"
        ),
        pytest.param(load(), WEIGHTED, "no-weight", weigh.NEVER, id="no-weight"),
        pytest.param(load(), WEIGHTED | ZONE, "no-weight", weigh.NEVER, id="no-weight-anywhere"),
        pytest.param(load(), ZONE, "no-weight", weigh.NEVER, id="no-weight-for-what-spills-over"),
    ],
)
def test_states_say_whether_the_programs_take_an_endpoint(
    known: Member, choice: int, state: str, cost: float
) -> None:
    known = known._replace(weight=0)
    assert state_of(known, LEAST | choice, WATCHED, NOW) == state
    assert cost_of(known, LEAST | choice, WATCHED, NOW) == cost
    assert (state in weigh.TAKEN) == (cost != weigh.NEVER)


def test_an_endpoint_of_another_zone_gets_what_spills_over() -> None:
    there = Member(weight=7, elsewhere=True)
    assert state_of(there, LEAST | WEIGHTED | ZONE, WATCHED, NOW) == "other-zone"
    assert cost_of(there, LEAST | WEIGHTED | ZONE, WATCHED, NOW) == weigh.NEVER
    assert state_of(there, LEAST | ZONE, WATCHED, NOW) == "ready"


def test_connections_above_what_the_zone_takes_spill_over() -> None:
    assert [spills_over(n, Policy(room=10)) for n in (0, 10, 20, 40)] == [
        0,
        0,
        0.5,
        0.75,
    ]
    assert spills_over(9, None) == 0


# -- by trial: the same draws as the programs make ------------------------------------------------


def _draw(of: Set, algorithm: int, chance: random.Random) -> int:
    if algorithm & WEIGHTED:
        weights = [m.weight * (not m.elsewhere) for m in of.members]
        return chance.choices(range(len(of.members)), weights)[0]
    return chance.randrange(len(of.members))


def _may(of: Set, algorithm: int, place: int) -> bool:
    return state_of(of.members[place], algorithm, of.policy, NOW) in weigh.TAKEN


def _another(of: Set, algorithm: int, chance: random.Random) -> int | None:
    place, spare = 0, None
    for i in range(weigh.ASKED):
        place = _draw(of, algorithm, chance) if i < weigh.DRAWS else place + 1
        if place >= len(of.members):
            place = 0
        if _may(of, algorithm, place):
            return place
        state = state_of(of.members[place], algorithm, of.policy, NOW)
        if state in (weigh.EJECTED, weigh.TRIAL):
            spare = place
    return spare


def _choose(of: Set, chance: random.Random) -> int | None:
    """choose_slot() and choose_by(), line by line."""
    algorithm, count = of.algorithm, len(of.members)
    found, costs = of.members, of.costs()
    first = _draw(of, algorithm, chance)
    if algorithm == LEAST:
        two = _draw(of, algorithm, chance)
        two = (two + 1) % count if two == first else two
        if not found[first].outcomes.streak and not found[two].outcomes.streak:
            return two if found[two].open < found[first].open else first
        first = _draw(of, algorithm, chance)
    place: int | None = first
    if weigh.is_p2c(algorithm):
        second = _draw(of, algorithm, chance)
        if second == first and not algorithm & WEIGHTED:
            second = (second + 1) % count
        place = second if costs[second] < costs[first] else first
        if costs[place] == weigh.NEVER:
            place = None
    elif algorithm & POLICY and not _may(of, algorithm, first):
        place = None
    if (
        place is not None
        and algorithm & ZONE
        and chance.random() < spills_over(found[place].open, of.policy)
    ):
        place = None
    if place is None and algorithm & ZONE:
        algorithm &= ~WEIGHTED  # and ZONE is what `anywhere` is in the C
    return _another(of, algorithm, chance) if place is None else place


def members(*known: Member, weights: tuple[int, ...] = ()) -> list[Member]:
    weights = weights or (100,) * len(known)
    return [m._replace(weight=weight) for m, weight in zip(known, weights, strict=True)]


BUSY = [load(open=n) for n in (0, 3, 3, 1, 7)]
AILING = [*BUSY[:3], load(streak=3, measured=NOW), load(streak=1, measured=NOW - 9 * SECOND)]
OUT = [load(until=NOW + 8, open=0), load(open=5), *BUSY[1:4], load(until=NOW - 8)]
FULL = [load(open=5)] * 30 + [load(open=1)] * 2


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(Set(members(*BUSY), LEAST, None, NOW), id="least-connections"),
        pytest.param(Set(members(*BUSY[:1]), LEAST, None, NOW), id="one-endpoint"),
        pytest.param(Set(members(*AILING), LEAST, None, NOW), id="failures-of-late"),
        pytest.param(Set(members(*AILING), LEAST | POLICY, WATCHED, NOW), id="with-a-policy"),
        pytest.param(
            Set(members(*BUSY, weights=(1, 50, 100, 0, 30)), LEAST | WEIGHTED, None, NOW),
            id="weighted",
        ),
        pytest.param(
            Set(members(*BUSY, weights=(1, 50, 100, 0, 30)), WEIGHTED, None, NOW),
            id="random-by-weight",
        ),
        pytest.param(Set(members(*OUT), LEAST | POLICY | AVOID, WATCHED, NOW), id="some-are-out"),
        pytest.param(Set(members(*OUT), POLICY | AVOID, WATCHED, NOW), id="random-past-them"),
        pytest.param(Set(members(*OUT[:2]), LEAST | POLICY | AVOID, WATCHED, NOW), id="all-are"),
        pytest.param(Set(members(*FULL), LEAST | POLICY, WATCHED, NOW), id="nearly-all-are-full"),
        pytest.param(
            Set(
                [
                    *members(*BUSY[:3]),
                    *(
                        m._replace(elsewhere=True)
                        for m in members(*BUSY[3:], load(), weights=(100, 50, 0))
                    ),
                ],
                EWMA | WEIGHTED | POLICY | ZONE,
                Policy(room=2),
                NOW,
            ),
            id="zone",
        ),
    ],
)
def test_odds_are_what_many_choices_come_to(of: Set) -> None:
    chance, rounds = random.Random(7), 15_000
    counts = [0] * len(of.members)
    for _ in range(rounds):
        place = _choose(of, chance)
        if place is not None:
            counts[place] += 1
    found = odds(of)
    assert sum(found) <= 1 + 1e-9
    assert found == pytest.approx([n / rounds for n in counts], abs=0.02)


def test_a_set_of_none_has_no_odds() -> None:
    assert odds(Set([], LEAST, None, NOW)) == []
