"""What annotations say of a Service's choice, and what becomes of those that can't be read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman import abi
from pointsman.choice import (
    ALGORITHM,
    ALGORITHMS,
    DRAIN,
    EJECTION,
    MAX_CONNECTIONS,
    SLOW_START,
    WEIGHT,
    ZONE_CONNECTIONS,
    choice_of,
    kept,
    settle,
    weight_of,
)
from pointsman.context import Ejection
from pointsman.context import Policy as Operator
from pointsman.objects import Ref
from pointsman.values import Policy

ABI = abi.constants()
POLICY, AVOID = ABI["CHOICE_POLICY"], ABI["CHOICE_AVOID"]
MAGLEV, FEWEST = ABI["ALGORITHM_MAGLEV"], ABI["ALGORITHM_LEAST_CONNECTIONS"]
SERVICE, SLICE, POD = (Ref(kind, "shop", "web") for kind in ("Service", "EndpointSlice", "Pod"))
USUAL = Policy(True, 0, 0, 5, 50, 20, 10 * 10**9, 300 * 10**9, 3 * 10**9, 30)
NAMES = (ALGORITHM, EJECTION, SLOW_START, MAX_CONNECTIONS, ZONE_CONNECTIONS, DRAIN)


def test_the_algorithms_are_the_programs() -> None:
    assert list(ALGORITHMS) == [
        "random", "round-robin", "least-connections", "peak-ewma", "maglev"
    ]  # fmt: skip
    assert all(ALGORITHMS[name] == i for i, name in enumerate(ALGORITHMS))


@pytest.mark.parametrize(
    ("annotations", "operator", "algorithm", "policy"),
    [
        pytest.param({}, Operator(), 0, None, id="nothing-said"),
        pytest.param({}, Operator(algorithm="maglev"), MAGLEV, None, id="the-operator-s"),
        pytest.param(
            {ALGORITHM: "least-connections"}, Operator(algorithm="maglev"), FEWEST, None,
            id="the-service-goes-first",
        ),
        pytest.param({EJECTION: "on"}, Operator(), POLICY | AVOID, USUAL, id="ejection"),
        pytest.param({EJECTION: "observe"}, Operator(), POLICY, USUAL, id="that-is-only-watched"),
        pytest.param(
            {}, Operator(outlier_ejection="on"), POLICY | AVOID, USUAL, id="for-all-services"
        ),
        pytest.param(
            {EJECTION: "off"}, Operator(outlier_ejection="on"), 0, None, id="but-not-for-this-one"
        ),
        pytest.param(
            {EJECTION: "on"},
            Operator(ejection=Ejection(2, 10, 3, 0.5, 60, 7, 1)),
            POLICY | AVOID,
            Policy(True, 0, 0, 2, 10, 3, 5 * 10**8, 60 * 10**9, 10**9, 7),
            id="by-the-operator-s-numbers",
        ),
        pytest.param(
            {MAX_CONNECTIONS: "7", ALGORITHM: "maglev"}, Operator(), MAGLEV | POLICY,
            Policy(max_connections=7), id="a-cap-without-watching",
        ),
        pytest.param({ZONE_CONNECTIONS: "9"}, Operator(), POLICY, Policy(room=9), id="zones"),
        pytest.param(
            {MAX_CONNECTIONS: "0", ZONE_CONNECTIONS: "0"}, Operator(), 0, None, id="0-is-none"
        ),
    ],
)  # fmt: skip
def test_what_a_service_gets(
    annotations: dict[str, str], operator: Operator, algorithm: int, policy: Policy | None
) -> None:
    found = choice_of(annotations, operator)
    assert (found.algorithm, found.policy) == (algorithm, policy)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("30", 30), ("30s", 30), ("2m", 120), ("1h2m3s", 3723), ("24h", 86400)],
)
def test_durations(text: str, seconds: int) -> None:
    assert settle(SERVICE, {SLOW_START: text}, {}).problems == ()
    assert choice_of({SLOW_START: text}, Operator()).slow_start == seconds


@pytest.mark.parametrize(
    ("text", "rate"), [("5/s", 5), ("30/m", 0.5), ("1000/s", 1000), ("60000/m", 1000)]
)
def test_rates(text: str, rate: float) -> None:
    assert settle(SERVICE, {DRAIN: text}, {}).problems == ()
    assert choice_of({DRAIN: text}, Operator()).drain == rate


ALLOWED = {
    ALGORITHM: "write random, round-robin, least-connections, peak-ewma or maglev",
    EJECTION: "write off, on or observe",
    SLOW_START: "write seconds, or a duration such as 30s or 2m, up to 24h",
    MAX_CONNECTIONS: "write a whole number from 0 to 2147483647",
    ZONE_CONNECTIONS: "write a whole number from 0 to 2147483647",
    DRAIN: "write a rate up to 1000/s, such as 5/s or 20/m",
    WEIGHT: "write a whole number from 0 to 10000",
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (ALGORITHM, "fastest"), (ALGORITHM, "Maglev"), (ALGORITHM, ""), (ALGORITHM, "mask"),
        (EJECTION, "true"), (SLOW_START, "-1"), (SLOW_START, "1.5s"), (SLOW_START, "25h"),
        (SLOW_START, "86401"), (SLOW_START, "3s2m"), (SLOW_START, "1h30"), (SLOW_START, ""),
        (SLOW_START, "30s\n"),
        (MAX_CONNECTIONS, "2147483648"), (MAX_CONNECTIONS, "9" * 5000), (MAX_CONNECTIONS, "1_0"),
        (MAX_CONNECTIONS, "٣"), (ZONE_CONNECTIONS, "many"), (ZONE_CONNECTIONS, " 5"),
        (DRAIN, "0/s"), (DRAIN, "5"), (DRAIN, "5/h"), (DRAIN, "1/2/s"),
        (DRAIN, "1001/s"), (DRAIN, "60001/m"),
        (WEIGHT, "10001"), (WEIGHT, "-1"), (WEIGHT, "1%"),
    ],
)  # fmt: skip
def test_a_bad_value_leaves_the_last_good_one(name: str, text: str) -> None:
    ref = SLICE if name == WEIGHT else SERVICE
    good = {ALGORITHM: "maglev", EJECTION: "on", DRAIN: "5/s"}.get(name, "50")
    settled, (problem,) = settle(ref, {name: text, "else": "x"}, {name: good})
    assert settled == {name: good, "else": "x"}
    assert kept({name: text}, settled) == {name: good, "else": "x"}
    assert (problem.object, problem.field) == (str(ref), f"metadata.annotations[{name}]")
    assert problem.reason == "AnnotationInvalid"
    assert problem.message.endswith(f'is not one of its values, so "{good}" stays in force')
    assert problem.mend == ALLOWED[name]
    # The first time that it is seen there is none.
    settled, (problem,) = settle(ref, {name: text, "else": "x"}, {})
    assert settled == {"else": "x"}
    assert problem.message.endswith("so it counts as absent")


@pytest.mark.parametrize(
    ("ref", "name", "said"),
    [
        (SERVICE, "pointsman.io/algoritm", f"there is no such annotation; write {ALGORITHM}"),
        (POD, "pointsman.io/bananas", "there is no such annotation; delete it"),
        (SERVICE, WEIGHT, "it has no effect here; write it on EndpointSlices or Pods"),
        (POD, ALGORITHM, "it has no effect here; write it on the Service"),
    ],
)
def test_an_annotation_that_nobody_reads_is_named(ref: Ref, name: str, said: str) -> None:
    settled, (problem,) = settle(ref, {name: "maglev"}, {})
    assert settled == {name: "maglev"}
    assert str(problem) == f"{ref}: metadata.annotations[{name}]: {said}"


@pytest.mark.parametrize(
    "annotations",
    [{}, {"kubectl.kubernetes.io/x": "y"}, {"pointsman.io/socket-lb": "what"}, {WEIGHT: "0"}],
)
def test_what_is_in_order_comes_back_as_it_is(annotations: dict[str, str]) -> None:
    settled, problems = settle(POD, annotations, {WEIGHT: "7"})
    assert settled is annotations and not problems
    assert kept(annotations, settled) == {}


values = st.text(max_size=12) | st.sampled_from(["on", "maglev", "30s", "5/s", "0", "100"])
some = st.dictionaries(st.sampled_from((*NAMES, WEIGHT, "pointsman.io/x")), values)


@given(some, some, st.sampled_from((SERVICE, SLICE, POD)))
def test_whatever_is_written_what_counts_is_good(
    annotations: dict[str, str], before: dict[str, str], ref: Ref
) -> None:
    settled, problems = settle(ref, annotations, settle(ref, before, {}).annotations)
    again = settle(ref, settled, {})
    assert again.annotations is settled
    # What nobody reads stays, and is named each time.
    assert set(again.problems) == {p for p in problems if "so " not in p.message}
    bad = {name for name in annotations if settled.get(name) != annotations[name]}
    assert {f"metadata.annotations[{name}]" for name in bad} == {
        p.field for p in problems if "so " in p.message
    }
    assert settled.keys() <= annotations.keys()
    choice_of(settled, Operator())
    assert 0 <= weight_of(settled) <= 10000


@given(some)
def test_what_nobody_settled_counts_as_absent(annotations: dict[str, str]) -> None:
    settled = settle(SERVICE, annotations, {}).annotations
    assert choice_of(annotations, Operator()) == choice_of(settled, Operator())
