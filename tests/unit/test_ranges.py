"""Ranges of clients: how they are read, and how one set of them becomes another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.objects import (
    LoadBalancerIngress,
    LoadBalancerStatus,
    ObjectMeta,
    Service,
    ServiceSpec,
    ServiceStatus,
)
from pointsman.ranges import common, holds, pack, parse, source_text, steps, unpack
from pointsman.sourceranges import admission
from pointsman.values import to_address


@pytest.mark.parametrize(
    ("text", "shown", "bits"),
    [
        pytest.param("10.0.0.0/8", "10.0.0.0/8", 104, id="ipv4"),
        pytest.param("10.1.2.3/8", "10.0.0.0/8", 104, id="host-bits-do-not-count"),
        pytest.param("0.0.0.0/0", "0.0.0.0/0", 96, id="all-of-ipv4"),
        pytest.param("fd00::/8", "fd00::/8", 8, id="ipv6"),
        pytest.param("::/0", "::/0", 0, id="all-of-ipv6"),
    ],
)
def test_a_range_is_read_and_shown(text: str, shown: str, bits: int) -> None:
    source = parse(text)
    assert (source_text(source), source[1]) == (shown, bits)
    assert unpack(pack(7, source)) == (7, source)


@pytest.mark.parametrize("text", ["10.0.0.0", "10.0.0.0/33", "010.0.0.0/8", "::ffff:10.0.0.0/104"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"CIDR|prefix|leading zero|IPv4-mapped"):
        parse(text)


SOURCES = [parse(f"{a}.{b}.0.0/{n}") for n in (8, 9, 16) for a in (10, 11) for b in (0, 128)]
_some = st.frozensets(st.sampled_from([*SOURCES, parse("0.0.0.0/0")]), max_size=5)
_clients = st.tuples(st.sampled_from([10, 11, 12]), st.sampled_from([0, 1, 128, 129])).map(
    lambda pair: to_address(f"{pair[0]}.{pair[1]}.0.1")
)


@given(_some, _some, _clients)
def test_common_ranges_have_whom_both_have(one, other, client: bytes) -> None:
    assert holds(common(one, other), client) == (holds(one, client) and holds(other, client))


@given(_some, _some, st.booleans(), st.booleans(), _clients)
def test_nobody_is_let_in_too_soon_or_refused_in_between(
    have, want, asked: bool, ask: bool, client: bytes
) -> None:
    """The frontend is switched after the first two steps; whether the programs ask for ranges is
    made stricter before the second one, and less strict before the last two."""
    todo = steps(have, want if ask else frozenset(), asked=asked, ask=ask)
    now = set(have)
    was = holds(have, client) or not asked
    will = holds(want, client) or not ask
    stages = [
        (todo.add, frozenset(), asked),
        (frozenset(), todo.remove, asked or ask),
        (todo.add_later, frozenset(), ask),
        (frozenset(), todo.remove_later, ask),
    ]
    for number, (add, remove, asks) in enumerate(stages):
        for one in (*add, *remove):
            now ^= {one}
            if asks and was and will:
                assert holds(now, client), "refused in between"
            if asks and number < 2 and not was:
                assert not holds(now, client), "let in before the switch"
        if asks and number == 1 and not will:
            assert not holds(now, client), "let in after the switch"
    assert now == set(want if ask else ())


def balancer(*ranges: str, addresses: tuple[str, ...] = ("203.0.113.1",)) -> Service:
    ingress = tuple(LoadBalancerIngress(ip=address) for address in addresses)
    return Service(
        metadata=ObjectMeta(name="web"),
        spec=ServiceSpec(
            type="LoadBalancer", cluster_ip="10.96.0.1", load_balancer_source_ranges=ranges
        ),
        status=ServiceStatus(load_balancer=LoadBalancerStatus(ingress=ingress)),
    )


def shown(service: Service, *families: bool) -> dict[bool, str]:
    found = admission(service, frozenset(families)).sources
    return {ipv4: " ".join(map(source_text, sources)) for ipv4, sources in found.items()}


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        pytest.param((), {}, id="none-means-everybody"),
        pytest.param((" 10.0.0.0/8\t",), {True: "10.0.0.0/8"}, id="white-space-is-nothing"),
        pytest.param(
            ("fd00::/8", "10.0.0.0/8"), {True: "10.0.0.0/8", False: "fd00::/8"}, id="by-family"
        ),
        pytest.param(("10.0.0.0/8", "10.9.9.9/8"), {True: "10.0.0.0/8"}, id="each-once"),
        pytest.param(("10.0.0.0/33",), {True: "", False: ""}, id="a-bad-one-lets-nobody-in"),
        pytest.param(
            ("10.0.0.0/33", "10.0.0.0/8"), {True: "10.0.0.0/8", False: ""}, id="nor-open-a-family"
        ),
    ],
)
def test_source_ranges(ranges: tuple[str, ...], expected: dict[bool, str]) -> None:
    families = (True, False) if len(expected) != 1 else (True,)
    assert shown(balancer(*ranges), *families) == expected


def test_a_range_that_cannot_be_read_is_named() -> None:
    (problem,) = admission(balancer("10.0.0.0/8", "10.0.0.0/33"), {True}).problems
    assert (problem.object, problem.field) == (
        "Service default/web",
        "spec.loadBalancerSourceRanges[1]",
    )
    assert "lets nobody in" in problem.message and problem.mend


def test_a_family_without_ranges_is_open_and_said_to_be() -> None:
    found = admission(balancer("10.0.0.0/8"), {True, False})
    assert set(found.sources) == {True}
    (problem,) = found.problems
    assert "every IPv6 client is let in" in problem.message
    assert not admission(balancer("10.0.0.0/8"), {True}).problems
