"""How endpoints are chosen, and what is known of them, as the reading commands show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from pointsman import abi, endpointrows, inspect, maglev
from pointsman import describe as describing
from pointsman import explain as explaining
from pointsman.cli import show, top
from pointsman.cli.resources import BY_NAME, CHOICE, changes, connect_time
from pointsman.endpointrows import EndpointRow
from pointsman.kubeproxy.answers import ENDPOINTS, Client
from pointsman.kubeproxy.ours import Ours
from pointsman.outcomes import Outcomes
from pointsman.plan import Run
from pointsman.policies import PolicyElement
from pointsman.shares import ELSEWHERE
from pointsman.values import Policy
from tests.support.view import HOST_NETNS, WEB, FakeView, view

SECOND = 1_000_000_000
NOW = 1000 * SECOND
_ABI = abi.constants()
POLICY = Policy(
    watch=True,
    streak=5,
    percent=50,
    volume=20,
    shortest=10 * SECOND,
    longest=300 * SECOND,
    trial=3 * SECOND,
)
OUT = Outcomes(
    1, until=NOW + 8 * SECOND, streak=5, connects=9, failures=5, ejections=1, measured=NOW
)


def algorithm(words: str) -> int:
    """ "LEAST_CONNECTIONS WEIGHTED" as service.algorithm has it."""
    first, *flags = words.split()
    return _ABI[f"ALGORITHM_{first}"] | sum(_ABI[f"CHOICE_{flag}"] for flag in flags)


def chosen(
    words: str,
    policy: Policy | None = None,
    *known: Outcomes,
    weights: Sequence[int] = (),
) -> FakeView:
    """shop/web, which chooses in this way; `known` of its two endpoints."""
    maps = view()
    maps.elements[1] = replace(maps.elements[1], algorithm=algorithm(words))
    if policy:
        maps.policy[1] = PolicyElement(policy, 1)
    maps.seen = dict(zip((5, 6), known, strict=False))
    for slot, weight in zip((10, 11), weights, strict=False):
        maps.slot[slot] = replace(maps.slot[slot], weight=weight)
    return maps


def rows(maps: FakeView) -> list[EndpointRow]:
    return [row for row in endpointrows.endpoints(maps, NOW) if row.service == "web"]


def cells(maps: FakeView) -> list[list[str]]:
    """WEIGHT, CONNECT, FAILED and STATE."""
    return [[show.text_of(value(row)) for _, value in CHOICE] for row in rows(maps)]


@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        pytest.param(chosen("RANDOM"), ["<none>", "<none>", "0/0", "ready"], id="nothing-is-known"),
        pytest.param(
            chosen("PEAK_EWMA", None, Outcomes(latency=4000, measured=NOW - 16 * SECOND)),
            ["<none>", "1ms", "0/0", "ready"],
            id="connect-time-fades",
        ),
        pytest.param(
            chosen("PEAK_EWMA", None, Outcomes(latency=4000, measured=NOW - 400 * SECOND)),
            ["<none>", "<none>", "0/0", "ready"],
            id="until-it-is-forgotten",
        ),
        pytest.param(
            chosen("RANDOM WEIGHTED", weights=(1, 99)), ["1", "<none>", "0/0", "ready"], id="weight"
        ),
        pytest.param(
            chosen("RANDOM WEIGHTED", weights=(0, 99)),
            ["0", "<none>", "0/0", "no-weight"],
            id="no-weight",
        ),
        pytest.param(
            chosen("RANDOM WEIGHTED ZONE POLICY", Policy(room=9), weights=(7 | ELSEWHERE, 99)),
            ["7", "<none>", "0/0", "other-zone"],
            id="another-zone",
        ),
        pytest.param(
            chosen("RANDOM POLICY AVOID", POLICY, OUT),
            ["<none>", "<none>", "5/9", "ejected for 8s: 5 failures in a row"],
            id="ejected-by-a-streak",
        ),
        pytest.param(
            chosen("RANDOM POLICY AVOID", POLICY, replace(OUT, streak=1, connects=40, failures=21)),
            ["<none>", "<none>", "21/40", "ejected for 8s: 21 of 40 connects failed"],
            id="ejected-by-percentage",
        ),
        pytest.param(
            chosen("RANDOM POLICY", POLICY, OUT),
            ["<none>", "<none>", "5/9", "ready, would be ejected: 5 failures in a row"],
            id="observed-only",
        ),
        pytest.param(
            chosen("RANDOM POLICY AVOID", POLICY, replace(OUT, until=NOW + SECOND, trial=True)),
            ["<none>", "<none>", "5/9", "trial: 5 failures in a row"],
            id="trial",
        ),
        pytest.param(
            chosen("RANDOM POLICY AVOID", POLICY, replace(OUT, until=NOW)),
            ["<none>", "<none>", "5/9", "trial-due: 5 failures in a row"],
            id="trial-due",
        ),
        pytest.param(
            chosen("RANDOM POLICY", Policy(max_connections=4)),
            ["<none>", "<none>", "0/0", "full"],
            id="full",
        ),
    ],
)
def test_an_endpoint_shows_what_is_known_of_it(maps: FakeView, expected: list[str]) -> None:
    assert cells(maps)[0] == expected


def test_rows_for_scripts_say_until_when_and_why() -> None:
    row = inspect.plain(rows(chosen("RANDOM POLICY AVOID", POLICY, OUT))[0])
    assert row["ejection"] == {
        "observed": False,
        "leftSeconds": 8,
        "times": 1,
        "reason": "consecutive-failures",
        "why": "5 failures in a row",
    }
    assert (row["state"], row["failuresInARow"], row["connects"]) == ("ejected", 5, 9)


def test_what_is_known_of_another_generation_is_not_the_endpoint_s() -> None:
    maps = chosen("RANDOM POLICY AVOID", POLICY, OUT)
    maps.loads[5] = (9, 3)
    row = rows(maps)[0]
    assert (row.current, row.open, row.failures, row.state) == (False, 0, 0, "ready")


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(None, ""), (7, "0.007ms"), (250, "0.25ms"), (12_340, "12.3ms"), (1_500_000, "1.5s")],
)
def test_connect_times(microseconds: int | None, text: str) -> None:
    assert connect_time(microseconds) == text


def test_services_and_frontends_say_how_they_choose_in_the_annotations_words() -> None:
    maps = chosen(
        "LEAST_CONNECTIONS WEIGHTED POLICY AVOID ZONE",
        replace(POLICY, max_connections=100, room=20),
        OUT,
    )
    words = (
        "weighted",
        "outlier-ejection=on",
        "max-connections=100",
        "same-zone-connections=20",
    )
    service, frontend = inspect.services(maps)[1], inspect.frontends(maps)[2]
    assert (service.algorithms, service.choice) == (("least-connections",), words)
    assert (frontend.algorithm, frontend.choice, service.ejected) == ("least-connections", words, 1)
    policy = inspect.plain(frontend)["policy"]
    assert (policy["outlierEjection"], policy["shortestSeconds"], policy["most"]) == ("on", 10, 1)
    wide = BY_NAME["svc"].shown("wide")
    shown = {header: show.text_of(value(service)) for header, value in wide}
    assert (shown["ALGORITHM"], shown["CHOICE"]) == ("least-connections", ",".join(words))


def test_of_a_policy_without_ejection_none_is_ejected() -> None:
    """Nor is what was before it was turned off, which the programs go on to count."""
    maps = chosen("RANDOM POLICY", Policy(max_connections=100), OUT)
    assert maps.ejected(maps.elements[1].owner) == 1
    assert inspect.services(maps)[1].ejected == 0


def test_every_algorithm_has_the_annotation_s_name() -> None:
    assert list(inspect.ALGORITHMS.values()) == [
        "random", "round-robin", "least-connections", "peak-ewma", "maglev"
    ]  # fmt: skip
    assert inspect.algorithm_name(algorithm("MAGLEV WEIGHTED AVOID")) == "maglev"
    assert inspect.choice_names(algorithm("MAGLEV WEIGHTED AVOID")) == ("weighted", "avoid")
    assert inspect.algorithm_name(6) == "unknown (6)"


def test_describe_says_how_a_port_deals_with_its_endpoints() -> None:
    maps = chosen("RANDOM POLICY AVOID", replace(POLICY, max_connections=9), OUT)
    assert describing.describe_policies(maps, "shop", "web") == [
        (
            "Policy of port http:",
            "ejects after 5 failures in a row or 50 % of at least 20 connects failed, for 10 to "
            "300 s, 1 at most; ejected now: 1; at most 9 open for each endpoint",
        )
    ]
    line, members = describing.describe_kernel(maps, "shop", "web", NOW)[0]
    assert line.endswith("id 1, ClusterIP, random, outlier-ejection=on, max-connections=9")
    assert [m.state for m in members] == ["ejected", "ready"]


# -- explain --------------------------------------------------------------------------------------


def explained(maps: FakeView, client: str = "host") -> explaining.Explanation:
    return explaining.explain(maps, WEB, client, NOW)


@pytest.mark.parametrize(
    ("maps", "result"),
    [
        pytest.param(
            chosen("LEAST_CONNECTIONS"),
            "a connection gets 10.0.0.2:8080, of 2 endpoints",
            id="of-two-always-the-cheaper",
        ),
        pytest.param(
            chosen("LEAST_CONNECTIONS WEIGHTED", weights=(1, 3)),
            "a connection gets of two by chance by their weights of 2 endpoints the one with fewer "
            "open connections",
            id="weighted",
        ),
        pytest.param(
            chosen("ROUND_ROBIN"),
            "a connection gets the next of 2 endpoints in turn",
            id="round-robin",
        ),
        pytest.param(
            chosen("RANDOM WEIGHTED", weights=(1, 3)),
            "a connection gets one of 2 endpoints at random by their weights",
            id="random",
        ),
        pytest.param(
            chosen("RANDOM POLICY AVOID", POLICY, OUT),
            "a connection gets 10.0.0.2:8080, of 2 endpoints",
            id="past-one-that-is-ejected",
        ),
        pytest.param(
            chosen("RANDOM POLICY AVOID", replace(POLICY, max_connections=2), OUT),
            "ECONNREFUSED: no endpoint may be taken (2 full)",
            id="all-are-full",
        ),
    ],
)
def test_explain_says_what_a_choice_comes_to(maps: FakeView, result: str) -> None:
    found = explained(maps)
    assert found.result == result
    assert (found.verdict, found.errno) == (
        ("refused", "ECONNREFUSED") if "ECONN" in result else ("translated", "")
    )


def test_explain_shows_costs_and_what_is_passed_over() -> None:
    known = Outcomes(latency=300, measured=NOW, streak=1, connects=3, failures=1)
    maps = chosen("PEAK_EWMA WEIGHTED POLICY AVOID", POLICY, known, OUT, weights=(100, 50))
    found = explained(maps)
    assert [c.cost for c in found.endpoints] == [(4 + 1) * 301 * 3 * 100, None]
    assert [c.probability for c in found.endpoints] == pytest.approx([1, 0])
    assert found.why == (
        "10.96.0.1:80/TCP is shop/web:http, which chooses by peak-ewma, weighted, "
        "outlier-ejection=on"
    )
    assert found.steps[-3].startswith("policy: ejects after 5 failures in a row or 50 % of")
    assert found.steps[-2:] == (
        "slot 10: 10.0.0.1:8080, probability 100.0%, 4 open, weight 100, cost 451500, connect time "
        "300 µs, 1 failure in a row, endpoint 5, generation 1 as in load",
        "slot 11: 10.0.0.2:8080, probability 0.0%, 2 open, weight 50, 5 failures in a row, passed "
        "over: ejected for 8s: 5 failures in a row, endpoint 6, generation 3 as in load",
    )


def test_explain_counts_the_refusals_of_a_large_set_that_is_nearly_full() -> None:
    maps = chosen("RANDOM POLICY", Policy(max_connections=4))
    slots = [replace(maps.slot[10], backend=(maps.slot[10].backend[0], p)) for p in range(99)]
    maps.slot.update(enumerate([*slots, replace(maps.slot[11], endpoint=6)], 100))
    maps.elements[1] = replace(maps.elements[1], first=100, count=100)
    found = explained(maps)
    assert found.verdict == "translated"
    assert "fail with ECONNREFUSED: of the 20 endpoints that are asked at most" in found.result


def test_explain_follows_the_maglev_table_of_the_host_s_network_namespace() -> None:
    maps = chosen("MAGLEV")
    maps.elements[1] = replace(maps.elements[1], inside=Run(7, 32))
    number = maglev.socket_hash(HOST_NETNS, 1)
    entry = number * 32 >> 32
    maps.lines[7] = tuple(int(i == entry) for i in range(32))
    found = explained(maps)
    assert found.result == "a connection gets 10.0.0.2:8080, of 2 endpoints"
    assert found.steps[-3] == (
        f"Maglev: hash {number:#010x} of this client, entry {entry} of 32 has place 1"
    )
    other = explained(maps, "pod")
    assert other.result == "a connection gets one of 2 endpoints by its network namespace"
    assert [c.probability for c in other.endpoints] == [31 / 32, 1 / 32]


def test_explain_says_how_much_goes_on_to_other_zones() -> None:
    maps = chosen("RANDOM WEIGHTED ZONE POLICY", Policy(room=1), weights=(100, 100 | ELSEWHERE))
    found = explained(maps)
    # Of four open connections one is what the zone takes; the others go anywhere, also here.
    assert [c.probability for c in found.endpoints] == pytest.approx([0.25 + 0.75 / 2, 0.75 / 2])
    assert "75.0% of its connections go on to any zone" in found.steps[-2]
    assert ", 2 open, weight 100, other-zone, endpoint 6" in found.steps[-1]


# -- top and --watch ------------------------------------------------------------------------------


def test_top_counts_all_and_shows_the_first() -> None:
    found = rows(chosen("RANDOM POLICY AVOID", POLICY, OUT))
    assert top.lines(found, found[:1], {"all_full": 2}) == [
        "endpoints: 2, open: 6, ejected: 1, connects refused for want of one: 2",
        "",
        "NAMESPACE   NAME   PORT   ENDPOINT        OPEN   WEIGHT   CONNECT   FAILED   STATE",
        "shop        web    http   10.0.0.1:8080   4      <none>   <none>    5/9      "
        "ejected for 8s: 5 failures in a row",
    ]


def test_watching_a_table_prints_no_row_again_that_looks_the_same() -> None:
    resource, before = BY_NAME["ep"], rows(chosen("RANDOM"))
    after = rows(chosen("RANDOM", None, Outcomes(latency=80, measured=NOW)))

    def as_table(form: str) -> list[str]:
        def seen(row: EndpointRow) -> object:
            return [value(row) for _, value in resource.shown(form)]

        return [change.type for change in changes(resource, before, after, seen)]

    assert (as_table("table"), as_table("wide")) == ([], ["MODIFIED"])
    assert [change.type for change in changes(resource, before, after)] == ["MODIFIED"]


def test_the_error_is_what_this_kernel_makes_of_it() -> None:
    maps = chosen("RANDOM POLICY", Policy(max_connections=1))
    found = explaining.explain(maps, WEB, now=NOW, tells_why=False)
    assert (found.verdict, found.errno) == ("refused", "EPERM")
    assert found.result.startswith("EPERM: no endpoint may be taken")


def test_that_all_are_full_now_is_no_difference_from_kube_proxy() -> None:
    maps = chosen("RANDOM POLICY", Policy(max_connections=1))
    assert explained(maps).verdict == "refused"
    answer = Ours(maps, None).ask(Client(WEB.address, True), WEB)
    assert (answer.verdict, answer.endpoints) == (ENDPOINTS, {"10.0.0.1:8080", "10.0.0.2:8080"})
