"""Which endpoints a node uses: policies, conditions, hints, and slices that overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman import abi
from pointsman.context import Context
from pointsman.objects import EndpointSlice
from pointsman.topology import Choice, categorize, places, serving
from pointsman.values import Backend, to_address

HERE = Context(node_name="n1", zone="z1")
READY: dict[str, Any] = {}
NOT_READY = {"ready": False, "serving": False, "terminating": False}
LEAVING = {"ready": False, "serving": True, "terminating": True}
GONE = {"ready": False, "serving": False, "terminating": True}


def endpoint(n: int, conditions: dict[str, Any] = READY, node: str = "n2", **hints: str) -> Any:
    """10.0.0.n; hints as zones="z1 z2", nodes="n1"."""
    document: dict[str, Any] = {"addresses": [f"10.0.0.{n}"], "conditions": conditions}
    if node:
        document["nodeName"] = node
    if hints:
        fields = {"zones": "forZones", "nodes": "forNodes"}
        document["hints"] = {
            fields[kind]: [{"name": name} for name in names.split()]
            for kind, names in hints.items()
        }
    return document


def slice_(endpoints: Sequence[Any] | None, ports: Any = "one", family: str = "IPv4") -> Any:
    document = {
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": family,
        "endpoints": endpoints,
        "ports": [{"name": "", "port": 80}] if ports == "one" else ports,
    }
    return msgspec.convert(document, EndpointSlice)


def choose(
    *slices: EndpointSlice, context: Context = HERE, port: str = "", family: str = "IPv4"
) -> Choice:
    return categorize(slices, family, port, "TCP", context)


def numbers(backends: Sequence[Backend]) -> list[int]:
    """The n of each 10.0.0.n, in their order."""
    return [address[-1] for address, _ in backends]


@pytest.mark.parametrize(
    ("endpoints", "cluster", "local", "exist"),
    [
        pytest.param([], [], [], False, id="no-endpoints-at-all"),
        pytest.param(
            [endpoint(1), endpoint(2, node="n1")], [1, 2], [2], True, id="ready-here-and-elsewhere"
        ),
        pytest.param([endpoint(1)], [1], [], True, id="none-here-drops-under-local"),
        pytest.param([endpoint(1, node="")], [1], [], True, id="an-endpoint-on-no-node"),
        pytest.param(
            [endpoint(1, NOT_READY), endpoint(2, GONE, "n1")],
            [],
            [],
            False,
            id="neither-ready-nor-serving-counts-as-none",
        ),
        pytest.param(
            [endpoint(1, {"ready": False, "serving": True}, "n1")],
            [],
            [],
            False,
            id="serving-but-not-terminating-gets-nothing-new",
        ),
        pytest.param(
            [endpoint(1), endpoint(2, LEAVING)], [1], [], True, id="ready-before-terminating"
        ),
        pytest.param(
            [endpoint(1, LEAVING), endpoint(2, LEAVING, "n1")],
            [1, 2],
            [2],
            True,
            id="no-ready-falls-back-to-serving-terminating",
        ),
        pytest.param(
            [endpoint(1), endpoint(2, LEAVING, "n1")],
            [1],
            [2],
            True,
            id="the-local-set-falls-back-by-itself",
        ),
        pytest.param(
            [endpoint(1, LEAVING), endpoint(2, NOT_READY, "n1")],
            [1],
            [],
            True,
            id="terminating-elsewhere-drops-under-local",
        ),
        pytest.param(
            [endpoint(1, {"ready": None, "serving": None, "terminating": None}, "n1")],
            [1],
            [1],
            True,
            id="a-ready-that-is-null-is-true",
        ),
        pytest.param(
            [endpoint(1, {"ready": False, "terminating": True})],
            [1],
            [],
            True,
            id="a-serving-that-is-null-is-true",
        ),
        pytest.param(
            [endpoint(1, {"ready": False, "serving": True, "terminating": None})],
            [],
            [],
            False,
            id="a-terminating-that-is-null-is-false",
        ),
        pytest.param(
            [endpoint(1, {"ready": True, "serving": False, "terminating": True}, "n1")],
            [1],
            [1],
            True,
            id="published-although-not-ready",
        ),
        pytest.param([{"addresses": []}, endpoint(1)], [1], [], True, id="without-an-address"),
        pytest.param(
            [{"addresses": ["10.0.0.1", "10.0.0.2"]}], [1], [], True, id="only-the-first-address"
        ),
        pytest.param(
            [endpoint(9), endpoint(1), endpoint(9)],
            [1, 9],
            [],
            True,
            id="sorted-without-duplicates",
        ),
    ],
)
def test_conditions(
    endpoints: list[Any], cluster: list[int], local: list[int], exist: bool
) -> None:
    choice = choose(slice_(endpoints))
    assert (numbers(choice.cluster), numbers(choice.local), choice.exist) == (cluster, local, exist)


def test_without_a_node_name_no_endpoint_is_local() -> None:
    slices = slice_([endpoint(1, node=""), endpoint(2, node="n1")])
    assert choose(slices, context=Context()).local == ()


@pytest.mark.parametrize(
    ("endpoints", "cluster"),
    [
        pytest.param([endpoint(1, zones="z1"), endpoint(2, zones="z2")], [1], id="my-zone"),
        pytest.param(
            [endpoint(1, zones="z2 z1"), endpoint(2, zones="z2")], [1], id="my-zone-among-several"
        ),
        pytest.param([endpoint(1, nodes="n1"), endpoint(2, nodes="n2")], [1], id="my-node"),
        pytest.param(
            [endpoint(1, nodes="n1", zones="z1"), endpoint(2, nodes="n2", zones="z1")],
            [1],
            id="my-node-before-my-zone",
        ),
        pytest.param(
            [endpoint(1, nodes="n3", zones="z1"), endpoint(2, nodes="n2", zones="z2")],
            [1],
            id="my-zone-if-none-is-for-my-node",
        ),
        pytest.param(
            [endpoint(1, nodes="n1", zones="z2"), endpoint(2, zones="z1")],
            [2],
            id="one-without-node-hints-puts-them-out-of-force",
        ),
        pytest.param(
            [endpoint(1, zones="z1"), endpoint(2)],
            [1, 2],
            id="one-without-hints-puts-all-out-of-force",
        ),
        pytest.param(
            [endpoint(1, zones="z1"), endpoint(2, zones="")], [1, 2], id="one-with-an-empty-list"
        ),
        pytest.param(
            [endpoint(1, zones="z2"), endpoint(2, zones="z3")],
            [1, 2],
            id="none-for-my-zone-never-leaves-none",
        ),
        pytest.param(
            [endpoint(1, NOT_READY, zones="z1"), endpoint(2, zones="z2")],
            [2],
            id="an-endpoint-that-is-not-ready-does-not-count-as-mine",
        ),
        pytest.param(
            [endpoint(1, zones="z1"), endpoint(2, LEAVING), endpoint(3, zones="z2")],
            [1],
            id="only-ready-endpoints-need-hints",
        ),
        pytest.param(
            [endpoint(1, LEAVING, zones="z1"), endpoint(2, LEAVING, zones="z2")],
            [1, 2],
            id="terminating-endpoints-are-used-without-topology",
        ),
    ],
)
def test_hints(endpoints: list[Any], cluster: list[int]) -> None:
    choice = choose(slice_(endpoints))
    assert numbers(choice.cluster) == cluster
    assert choice.exist


@pytest.mark.parametrize(
    ("context", "endpoints"),
    [
        pytest.param(
            Context(node_name="n1"),
            [endpoint(1, zones="z1"), endpoint(2, zones="z2")],
            id="a-node-without-a-zone",
        ),
        pytest.param(
            Context(node_name="n1"),
            [
                endpoint(1) | {"hints": {"forZones": [{"name": ""}]}},
                endpoint(2, zones="z2"),
            ],
            id="a-zone-without-a-name-is-not-that-of-a-node-without-one",
        ),
        pytest.param(
            Context(zone=""),
            [endpoint(1) | {"hints": {"forNodes": [{"name": ""}]}}, endpoint(2, nodes="n2")],
            id="nor-is-a-node-without-a-name",
        ),
        pytest.param(
            HERE,
            [endpoint(n) | {"hints": {"forZones": None, "forNodes": None}} for n in (1, 2)],
            id="hints-that-are-null",
        ),
    ],
)
def test_hints_that_are_ignored(context: Context, endpoints: list[Any]) -> None:
    assert numbers(choose(slice_(endpoints), context=context).cluster) == [1, 2]


def test_the_local_set_knows_no_hints() -> None:
    choice = choose(slice_([endpoint(1, node="n1", zones="z2"), endpoint(2, zones="z1")]))
    assert (numbers(choice.cluster), numbers(choice.local)) == ([2], [1])


@pytest.mark.parametrize(
    ("first", "second", "cluster", "local"),
    [
        pytest.param([endpoint(1)], [endpoint(2)], [1, 2], [], id="all-slices-are-merged"),
        pytest.param([endpoint(1)], [endpoint(1)], [1], [], id="a-move-counts-once"),
        pytest.param([endpoint(1)], [], [1], [], id="the-end-of-a-move"),
        pytest.param([endpoint(1)], [endpoint(1, node="n1")], [1], [1], id="local-wins"),
        pytest.param(
            [endpoint(1, LEAVING, "n1")], [endpoint(1, READY, "n1")], [1], [1], id="ready-wins"
        ),
        pytest.param(
            [endpoint(1, NOT_READY, "n1"), endpoint(2)],
            [endpoint(1)],
            [1, 2],
            [1],
            id="ready-of-one-and-local-of-the-other",
        ),
        pytest.param(
            [endpoint(1), endpoint(2, zones="z2")],
            [endpoint(1, zones="z1")],
            [1],
            [],
            id="hinted-wins",
        ),
    ],
)
def test_slices_that_overlap(
    first: list[Any], second: list[Any], cluster: list[int], local: list[int]
) -> None:
    slices = [slice_(first), slice_(second)]
    for order in (slices, slices[::-1]):
        choice = choose(*order)
        assert (numbers(choice.cluster), numbers(choice.local)) == (cluster, local)


@pytest.mark.parametrize(
    ("ports", "wanted", "expected"),
    [
        pytest.param([{"name": "http", "port": 80}], "http", [80], id="by-name"),
        pytest.param([{"name": "http", "port": 80}], "https", [], id="another-name"),
        pytest.param([{"name": "", "port": 80}], "", [80], id="the-empty-name-is-a-name"),
        pytest.param([{"name": None, "port": 80}], "", [], id="a-name-that-is-null-is-none"),
        pytest.param([{"port": 80}], "", [], id="no-name"),
        pytest.param([{"name": "", "port": None}], "", [], id="no-number"),
        pytest.param([{"name": "", "port": 0}], "", [], id="number-0"),
        pytest.param([{"name": "", "port": 53, "protocol": "UDP"}], "", [], id="another-protocol"),
        pytest.param(None, "", [], id="null"),
    ],
)
def test_ports(ports: Any, wanted: str, expected: list[int]) -> None:
    choice = choose(slice_([endpoint(1)], ports), port=wanted)
    assert [number for _, number in choice.cluster] == expected
    assert choice.exist is bool(expected)


def test_slices_may_give_one_port_different_numbers() -> None:
    slices = [slice_([endpoint(n)], [{"name": "", "port": 8000 + n}]) for n in (2, 1)]
    assert choose(*slices).cluster == (
        (to_address("10.0.0.1"), 8001),
        (to_address("10.0.0.2"), 8002),
    )


@pytest.mark.parametrize(
    "piece",
    [
        pytest.param(slice_([{"addresses": ["fd00::1"]}], family="IPv6"), id="the-other-family"),
        pytest.param(slice_([{"addresses": ["a.example"]}], family="FQDN"), id="names"),
        pytest.param(slice_(None), id="null"),
    ],
)
def test_slices_that_do_not_count(piece: EndpointSlice) -> None:
    assert choose(piece) == ((), (), False)


@pytest.mark.parametrize(
    ("conditions", "keeps"),
    [
        pytest.param(READY, True, id="ready"),
        pytest.param(LEAVING, True, id="serving-terminating"),
        pytest.param({"ready": False}, True, id="a-serving-that-is-null-is-true"),
        pytest.param({"ready": True, "serving": False}, True, id="published-although-not-ready"),
        pytest.param(NOT_READY, False, id="not-serving"),
        pytest.param(GONE, False, id="terminating-and-not-serving"),
    ],
)
def test_who_keeps_its_flows(conditions: dict[str, Any], keeps: bool) -> None:
    slices = [slice_([endpoint(1, conditions, zones="z9"), {"addresses": []}])]
    assert bool(serving(slices, "IPv4", "", "TCP")) is keeps


_CONDITION = st.sampled_from([None, True, False])
_NAMES = st.lists(st.sampled_from(["n1", "n2", "z1", "z2", ""]), max_size=2)
_ENDPOINTS = st.lists(
    st.builds(
        lambda n, ready, serving, terminating, node, nodes, zones: {
            "addresses": [f"10.0.0.{n}"],
            "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
            "nodeName": node,
            "hints": {
                "forNodes": [{"name": name} for name in nodes],
                "forZones": [{"name": name} for name in zones],
            },
        },
        st.integers(1, 5),
        _CONDITION,
        _CONDITION,
        _CONDITION,
        st.sampled_from(["", "n1", "n2"]),
        _NAMES,
        _NAMES,
    ),
    max_size=6,
)
_CONTEXTS = st.builds(
    Context, node_name=st.sampled_from(["", "n1"]), zone=st.sampled_from(["", "z1"])
)


@given(st.lists(_ENDPOINTS, max_size=3), _CONTEXTS)
def test_hints_never_leave_none_and_nothing_is_made_up(parts: list[Any], context: Context) -> None:
    slices = [slice_(part) for part in parts]
    choice = choose(*slices, context=context)
    bare = choose(*(slice_([e | {"hints": None} for e in part]) for part in parts), context=context)
    assert bool(choice.cluster) is bool(bare.cluster) is choice.exist
    assert set(choice.cluster) <= set(bare.cluster)
    assert choice.local == bare.local
    assert {*choice.cluster, *choice.local} <= serving(slices, "IPv4", "", "TCP")
    assert choice.exist or not choice.local


@given(st.lists(_ENDPOINTS, max_size=3), _CONTEXTS, st.randoms(use_true_random=False))
def test_the_order_of_slices_and_endpoints_says_nothing(
    parts: list[Any], context: Context, random: Any
) -> None:
    before = choose(*map(slice_, parts), context=context)
    for part in parts:
        random.shuffle(part)
    random.shuffle(parts)
    assert choose(*map(slice_, parts), context=context) == before


ON_THIS, ELSEWHERE = abi.constants()["SLOT_HERE"], abi.constants()["SLOT_ELSEWHERE"]


def where(*slices: EndpointSlice, context: Context = HERE) -> dict[int, int]:
    found = places(slices, "IPv4", "", "TCP", context)
    return {address[-1]: place for (address, _), place in found.items()}


@pytest.mark.parametrize(
    ("endpoints", "context", "expected"),
    [
        pytest.param(
            [endpoint(1, node="n1"), endpoint(2)],
            HERE,
            {1: ON_THIS, 2: ELSEWHERE},
            id="by-the-name-of-the-node",
        ),
        pytest.param([endpoint(1, node="")], HERE, {}, id="without-a-node-the-route-tells"),
        pytest.param(
            [endpoint(1, GONE, node="n1")], HERE, {1: ON_THIS}, id="in-whatever-condition"
        ),
        pytest.param([endpoint(1)], Context(), {}, id="unknown-to-a-node-without-a-name"),
    ],
)
def test_where_endpoints_are(
    endpoints: list[Any], context: Context, expected: dict[int, int]
) -> None:
    assert where(slice_(endpoints), context=context) == expected


@pytest.mark.parametrize("first", [0, 1])
def test_an_endpoint_in_two_slices_is_here_if_one_of_them_says_so(first: int) -> None:
    both = [slice_([endpoint(1, node="n1")]), slice_([endpoint(1)])]
    assert where(both[first], both[1 - first]) == {1: ON_THIS}
