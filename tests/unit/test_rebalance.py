"""Connections are ended so that endpoints that joined get their share: how many, which, when."""

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman import abi
from pointsman.drainsets import Asked, Member, Set, risen, sets_of, targets
from pointsman.objects import Ref
from pointsman.rebalance import AWAY, Drains, Progress
from pointsman.stale import Record
from pointsman.values import (
    ANY_IPV4,
    TCP,
    UDP,
    Backend,
    Entry,
    Frontend,
    Policy,
    PortName,
    to_address,
)

ABI = abi.constants()
WEB, OTHER = Ref("Service", "default", "web"), Ref("Service", "default", "other")
VIP = Frontend(to_address("10.96.0.1"), 80, TCP)
VIP6 = Frontend(to_address("fd00:96::1"), 80, TCP)
OTHER_VIP = Frontend(to_address("10.96.0.2"), 80, TCP)
NODE_PORT = Frontend(ANY_IPV4, 30080, TCP)
ENDPOINTS = [(to_address(f"10.244.{i >> 8}.{i & 255}"), 8080) for i in range(1, 1000)]
A, B, C, D = ENDPOINTS[:4]
TICK = 0.1


def members(*found: Backend, weights: Iterable[int] = (), first: int = 1) -> dict[Backend, Member]:
    given_ = list(weights) or [100] * len(found)
    return {
        backend: Member(first + ENDPOINTS.index(backend), 1, weight)
        for backend, weight in zip(found, given_, strict=True)
    }


def asked(*found: Backend, rate: float = 1.0, **more: Any) -> Asked:
    """Of one set behind VIP and a NodePort."""
    weights, waits = more.pop("weights", ()), more.pop("waits", False)
    one = Set(frozenset({VIP, NODE_PORT}), members(*found, weights=weights), **more)
    return Asked(rate, (one,), waits)


class Node:
    """Connections of a node, and a Drains that is asked in virtual time.

    Whoever is ended connects again after `back` seconds, to the endpoint with the fewest
    connections (weights count), or with `chance` to any.
    """

    def __init__(self, *, back: float = 0.0, chance: bool = False, offset: float = 0.5) -> None:
        self.drains = Drains(lambda: offset)
        self.now, self.look_at, self.end_at = 1000.0, 0.0, 0.0
        self.back, self.random = back, random.Random(1) if chance else None
        self.records: dict[int, Record] = {}
        self.cookies = itertools.count(1)
        self.ended: list[tuple[float, Record]] = []
        self.told: list[dict[Ref, Progress]] = []
        self.members: Mapping[Backend, Member] = {}
        self.ejected: set[int] = set()
        self.coming: list[tuple[float, Frontend]] = []

    def follow(self, wanted: Asked | None, ref: Ref = WEB) -> None:
        if wanted and wanted.sets and ref == WEB:
            self.members = wanted.sets[0].members
        self.drains.follow(ref, wanted, self.now)

    def open(self, backend: Backend, count: int = 1, vip: Frontend = VIP, first: int = 1) -> None:
        for _ in range(count):
            cookie = next(self.cookies)
            ident = first + ENDPOINTS.index(backend)
            self.records[cookie] = Record(cookie, TCP, vip[:2], backend, ident, 1)

    @property
    def counts(self) -> Counter[Backend]:
        return Counter(record.peer for record in self.records.values())

    def run(self, seconds: float) -> None:
        """As the thread does it."""
        end = self.now + seconds
        while self.now < end:
            at = self.drains.next(self.look_at, self.end_at)
            times = [end, *([at] if at is not None else []), *(each for each, _ in self.coming)]
            self.now = max(self.now, min(times))
            self._come_back()
            if at is None or self.now < at:
                continue
            if self.now >= self.look_at:
                self.drains.look(self.records.values(), self.ejected, self.now)
                self.look_at = self.now + 1
            found = self.drains.take(self.now, TICK) if self.now >= self.end_at else {}
            if found:
                self.end_at = self.now + TICK
            for ref, records in found.items():
                for record in records:
                    del self.records[record.cookie]
                    self.ended.append((self.now, record))
                    self.coming.append((self.now + self.back, Frontend(*record.vip, TCP)))
                self.drains.ended(ref, len(records), self.now)
            self.told.append(self.drains.told())
            self._come_back()

    def _come_back(self) -> None:
        for each in [each for each in self.coming if each[0] <= self.now]:
            self.coming.remove(each)
            able = [
                b for b, m in self.members.items() if m.weight and m.endpoint not in self.ejected
            ]
            if self.random:
                self.open(self.random.choice(able), vip=each[1])
            elif able:
                counts = self.counts
                self.open(min(able, key=lambda b: counts[b] / self.members[b].weight), vip=each[1])


def scaled_out(node: Node, *before: int, rate: float = 5.0, **more: Any) -> None:
    """So many connections at A, B, …; then one endpoint joins."""
    found = ENDPOINTS[: len(before)]
    node.follow(asked(*found, rate=rate, **more))
    for backend, count in zip(found, before, strict=True):
        node.open(backend, count)
    node.follow(asked(*ENDPOINTS[: len(before) + 1], rate=rate, **more))


# -- shares --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "weights", "most", "expected"),
    [
        pytest.param(60, [100, 100, 100], 0, [20, 20, 20], id="alike"),
        pytest.param(60, [100, 100, 400], 0, [10, 10, 40], id="by-weight"),
        pytest.param(60, [0, 100, 100], 0, [0, 30, 30], id="none-for-weight-0"),
        pytest.param(60, [0, 0, 0], 0, [20, 20, 20], id="all-0-are-alike"),
        pytest.param(60, [100, 100, 400], 15, [15, 15, 15], id="all-full"),
        pytest.param(60, [100, 100, 400], 20, [20, 20, 20], id="what-one-can-not-take-others-get"),
        pytest.param(60, [100, 200, 300], 25, [12, 23, 25], id="by-their-weights"),
        pytest.param(0, [1, 1], 0, [0, 0], id="nothing-to-share"),
        pytest.param(2, [1, 1, 1], 0, [1, 0, 1], id="fewer-than-endpoints"),
        pytest.param(5, [], 0, [], id="nobody"),
    ],
)
def test_shares_in_whole_connections(
    total: int, weights: list[int], most: int, expected: list[int]
) -> None:
    assert targets(total, weights, most, 0.5) == expected


weighed = st.lists(st.integers(0, 10000), min_size=1, max_size=30)


@given(st.integers(0, 100000), weighed, st.floats(0, 1, exclude_max=True))
def test_shares_add_up_and_are_rounded_by_less_than_one(
    total: int, weights: list[int], chance: float
) -> None:
    found = targets(total, weights, 0, chance)
    assert sum(found) == total
    even = weights if any(weights) else [1] * len(weights)
    for got, weight in zip(found, even, strict=True):
        assert abs(got * sum(even) - total * weight) < sum(even)


@given(st.integers(0, 50), weighed)
def test_over_many_nodes_shares_come_out_right(total: int, weights: list[int]) -> None:
    """Few connections each: rounded up everywhere, those that join would get nothing."""
    nodes = 200
    found = [targets(total, weights, 0, (i + 0.5) / nodes) for i in range(nodes)]
    even = weights if any(weights) else [1] * len(weights)
    for column, weight in zip(zip(*found, strict=True), even, strict=True):
        assert sum(column) / nodes == pytest.approx(total * weight / sum(even), abs=0.02)


@given(st.integers(0, 1000), weighed, st.integers(1, 100))
def test_nobody_is_to_have_more_than_the_cap(total: int, weights: list[int], most: int) -> None:
    found = targets(total, weights, most, 0.0)
    assert max(found) <= most and sum(found) <= total


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        pytest.param(members(A, B), members(A, B), set(), id="nothing"),
        pytest.param(members(A, B), members(A, B, C), {C}, id="one-joined"),
        pytest.param(members(A, B, C), members(A, B), set(), id="one-left"),
        pytest.param(members(A, B), members(A, B, weights=(100, 200)), {B}, id="one-weighs-more"),
        pytest.param(members(A, B), members(A, B, weights=(7, 7)), set(), id="all-as-before"),
        pytest.param(members(A, B), members(A, B, weights=(50, 100)), {B}, id="one-weighs-less"),
        pytest.param(members(A, weights=(9,)), members(A, B), {B}, id="one-joined-a-light-one"),
    ],
)
def test_who_is_to_get_more(
    before: dict[Backend, Member], now: dict[Backend, Member], expected: set[Backend]
) -> None:
    assert risen(before, now) == expected


# -- which connections are whose -----------------------------------------------------------------


def entry(frontend: Frontend, *endpoints: Backend, **more: Any) -> Entry:
    return Entry(frontend, PortName("default", "web", ""), endpoints, **more)


def ids(_: PortName) -> dict[Backend, tuple[int, int]]:
    return {backend: (i, 1) for i, backend in enumerate(ENDPOINTS, 1)}


def test_frontends_with_the_same_endpoints_are_one_set() -> None:
    local = NODE_PORT._replace(port=30081)
    found = sets_of(
        (
            entry(VIP, A, B, policy=Policy(max_connections=7), algorithm=ABI["CHOICE_AVOID"]),
            entry(NODE_PORT, A, B),
            entry(local, A),
            entry(VIP._replace(protocol=UDP), A, B),
            entry(Frontend(VIP.address, 0, 0)),
        ),
        ids,
    )
    assert found == (
        Set(frozenset({VIP, NODE_PORT}), members(A, B), 7, True),
        Set(frozenset({local}), members(A)),
    )


def test_endpoints_of_other_zones_have_no_share_and_those_of_weight_0_lose_all() -> None:
    zonal = ABI["CHOICE_ZONE"] | ABI["CHOICE_WEIGHTED"]
    (found,) = sets_of(
        (entry(VIP, A, B, weights=(100, 100 | ABI["WEIGHT_ELSEWHERE"]), algorithm=zonal),), ids
    )
    assert found.members == members(A)
    weighted = ABI["CHOICE_WEIGHTED"]
    (found,) = sets_of((entry(VIP, A, B, weights=(100, 0), algorithm=weighted),), ids)
    assert found.members == members(A, B, weights=(100, 0))


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"affinity": 60}, id="session-affinity"),
        pytest.param({"algorithm": ABI["ALGORITHM_MAGLEV"] | ABI["CHOICE_POLICY"]}, id="maglev"),
    ],
)
def test_who_would_come_back_to_the_same_endpoint_is_left_there(more: dict[str, int]) -> None:
    assert sets_of((entry(VIP, A, B, **more),), ids) == ()


def test_connections_of_another_service_at_the_same_address_are_not_touched() -> None:
    node = Node()
    node.open(A, 50, OTHER_VIP, first=500)
    # Dialled at this Service's address while that was another one's.
    node.open(A, 50, VIP, first=500)
    scaled_out(node, 10, 10, rate=100)
    node.run(60)
    assert {record.endpoint for _, record in node.ended} <= {1, 2, 3}
    assert sum(record.endpoint >= 500 for record in node.records.values()) == 100


def test_a_node_port_is_dialled_at_any_address_of_a_node() -> None:
    node = Node()
    scaled_out(node, 0, 0, rate=100)
    at_node = Frontend(to_address("192.0.2.1"), 30080, TCP)
    node.open(A, 10, at_node)
    node.open(B, 10)
    node.run(60)
    assert sorted(node.counts.values()) == [6, 7, 7]
    assert any(record.vip == at_node[:2] for _, record in node.ended)


# -- a scale-out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [0.0, 0.5, 3.0])
def test_the_new_endpoint_gets_its_share_and_no_more_are_ended_than_move(back: float) -> None:
    node = Node(back=back)
    scaled_out(node, 30, 30)
    node.run(60)
    assert node.counts == {A: 20, B: 20, C: 20} and len(node.ended) == 20
    assert node.drains.next(0, 0) is None, "nothing is looked at any more"


def test_the_oldest_of_whoever_has_most_are_ended_first() -> None:
    node = Node()
    scaled_out(node, 25, 35)
    node.run(4)
    first = [record for _, record in node.ended[:5]]
    assert [record.cookie for record in first] == [26, 27, 28, 29, 30]
    assert {record.peer for record in first} == {B}


@pytest.mark.parametrize("rate", [20 / 60, 1.0, 5.0, 40.0, 1000.0])
def test_they_are_spread_over_time(rate: float) -> None:
    """Whatever the span: no more than the rate has in it and a tenth of a second, and one."""
    node = Node(back=0.1)
    scaled_out(node, 300, 300, rate=rate)
    node.run(300)
    times = [at for at, _ in node.ended]
    for (i, first), (j, last) in itertools.combinations(enumerate(times), 2):
        assert j - i + 1 <= rate * (last - first + TICK) + 1 + 1e-6
    assert len(times) >= min(190, 0.8 * rate * 290)


def test_by_chance_most_have_to_move_and_each_once() -> None:
    """Of three that are ended one goes to the new endpoint, and two to the others."""
    node = Node(chance=True, back=1.0)
    scaled_out(node, 60, 60, rate=20)
    node.run(120)
    assert node.counts[C] >= 25
    assert max(record.cookie for _, record in node.ended) <= 120, "of those that were there"
    assert len({record.cookie for _, record in node.ended}) == len(node.ended)


def test_clients_that_do_not_come_back_are_not_ended_for_ever() -> None:
    node = Node(back=1e9)
    scaled_out(node, 30, 30, rate=100)
    node.run(100)
    assert node.counts == {A: 20, B: 20}


def test_another_that_joins_meanwhile_does_not_make_shares_smaller_than_they_are() -> None:
    node = Node(back=1e9)
    scaled_out(node, 30, 30, rate=100)
    node.run(1)
    assert node.counts == {A: 20, B: 20}
    node.follow(asked(A, B, C, D, rate=100))
    node.run(60)
    # A fourth of 60, not of 40.
    assert node.counts == {A: 15, B: 15}


def test_what_was_ended_once_is_not_ended_again_for_another_that_joins_meanwhile() -> None:
    node = Node()
    scaled_out(node, 30, 30, rate=100)
    node.run(1)
    assert node.counts == {A: 20, B: 20, C: 20}
    node.follow(asked(A, B, C, D, rate=100))
    node.run(60)
    # What came to C since is none of those that were there at the beginning.
    assert node.counts == {A: 15, B: 15, C: 20, D: 10}
    assert max(record.cookie for _, record in node.ended) <= 60


@pytest.mark.parametrize(("away", "ended"), [(1, 0), (500, 0), (AWAY + 1, 9)])
def test_an_endpoint_that_comes_and_goes_has_not_joined(away: float, ended: int) -> None:
    node = Node()
    ten = ENDPOINTS[:10]
    node.follow(asked(*ten, rate=100))
    for backend in ten:
        node.open(backend, 9)
    for _ in range(3):
        flapping = [cookie for cookie, record in node.records.items() if record.peer == ten[9]]
        node.follow(asked(*ten[:9], rate=100))
        for i, cookie in enumerate(flapping):
            del node.records[cookie]
            node.open(ten[i % 9])
        node.run(away)
        before = len(node.ended)
        node.follow(asked(*ten, rate=100))
        node.run(60)
        assert len(node.ended) - before == ended


def test_one_that_is_new_gets_its_share_beside_one_that_comes_and_goes() -> None:
    node = Node()
    node.follow(asked(A, B, rate=100))
    node.open(A, 60)
    node.follow(asked(A, rate=100))
    node.follow(asked(A, B, C, rate=100))
    node.run(60)
    # B has not joined: what C lacks is ended, whoever gets it.
    assert len(node.ended) >= 19 and node.counts[A] < 60 and node.counts[C] >= 19


def test_a_weight_that_rises_counts_though_the_endpoint_was_away() -> None:
    node = Node()
    node.follow(asked(A, B, rate=100))
    node.open(A, 20)
    node.follow(asked(A, rate=100))
    node.follow(asked(A, B, rate=100))
    assert node.drains.next(0, 0) is None
    node.follow(asked(A, B, rate=100, weights=(100, 300)))
    node.run(60)
    assert node.counts == {A: 5, B: 15}


def test_only_so_many_that_left_are_remembered() -> None:
    node = Node()
    many = {(ANY_IPV4, port): Member(port, 1, 100) for port in range(1, 6000)}
    (one,) = asked(A).sets
    node.follow(Asked(1, (replace(one, members=many | one.members),)))
    node.follow(asked(A))
    [service] = node.drains._services.values()
    assert len(service.away) == 4096
    node.now += AWAY
    node.follow(asked(A, B))
    assert not service.away


def test_when_an_old_one_leaves_meanwhile_the_others_may_have_more() -> None:
    node = Node()
    scaled_out(node, 30, 30, rate=1)
    node.run(2.5)
    before = len(node.ended)
    node.follow(asked(A, C, rate=1))
    node.run(60)
    assert len(node.ended) == before == 3


def test_what_has_changed_is_looked_at_before_more_is_ended() -> None:
    node = Node()
    scaled_out(node, 30, 30, rate=10)
    node.run(0.45)
    before = len(node.ended)
    node.follow(asked(A, C, rate=10))
    node.run(60)
    assert len(node.ended) == before == 5


def test_all_sets_of_a_service_share_its_rate() -> None:
    node = Node()

    def both(*found: Backend) -> Asked:
        sets = (Set(frozenset({vip}), members(*found)) for vip in (VIP, VIP6))
        return Asked(2, tuple(sets))

    node.follow(both(A))
    node.open(A, 10)
    node.open(A, 10, VIP6)
    node.follow(both(A, B))
    node.run(3.9)
    assert len(node.ended) == 8
    assert {record.vip for _, record in node.ended} == {VIP[:2], VIP6[:2]}
    node.run(60)
    assert Counter(record.vip for _, record in node.ended) == {VIP[:2]: 5, VIP6[:2]: 5}


def test_a_set_that_becomes_two_meanwhile_is_drained_once() -> None:
    node = Node()
    scaled_out(node, 30, 30, rate=1)
    node.run(2.5)
    local = Set(frozenset({NODE_PORT}), members(A, C))
    (one,) = asked(A, B, C).sets
    node.follow(Asked(1, (replace(one, frontends=frozenset({VIP})), local)))
    node.run(0.1)
    node.drains.look(node.records.values(), (), node.now)
    assert node.drains.told()[WEB].left == 16
    node.run(60)
    assert node.counts == {A: 20, B: 21, C: 19}


def test_weights_count_and_so_does_a_cap() -> None:
    node = Node()
    node.follow(asked(A, B, rate=100, weights=(100, 100)))
    node.open(A, 30)
    node.open(B, 30)
    node.follow(asked(A, B, C, rate=100, weights=(100, 100, 400)))
    node.run(60)
    assert node.counts == {A: 10, B: 10, C: 40}
    capped = Node()
    scaled_out(capped, 30, 30, rate=100, most=5)
    assert capped.members[C]
    capped.run(0.01)
    # They are full with 5, so nobody else has room for what would be ended.
    assert not [1 for _, record in capped.ended if capped.counts[record.peer] < 5]


def test_an_endpoint_whose_weight_rises_gets_more() -> None:
    node = Node()
    node.follow(asked(A, B, rate=100, weights=(90, 10)))
    node.open(A, 90)
    node.open(B, 10)
    node.follow(asked(A, B, rate=100, weights=(0, 100)))
    node.run(60)
    assert node.counts == {B: 100}


def test_what_it_takes_to_choose_one_does_not_grow_with_the_endpoints() -> None:
    def calls(count: int) -> int:
        node, events = Node(), []
        node.follow(asked(*ENDPOINTS[:count], rate=100))
        node.open(A, 500)
        node.follow(asked(*ENDPOINTS[: count + 90], rate=100))
        node.drains.look(node.records.values(), (), node.now)
        sys.setprofile(lambda _, event, __: events.append(event))
        found = node.drains.take(node.now + 0.295, 1)
        sys.setprofile(None)
        assert len(found[WEB]) == 30
        return len(events)

    assert calls(900) <= 2 * calls(10)


# -- when nothing is ended -----------------------------------------------------------------------


def quiet(node: Node) -> bool:
    node.run(60)
    return not node.ended and not any(node.told)


def test_what_is_there_when_a_service_first_asks_is_not_new() -> None:
    node = Node()
    node.open(A, 100)
    node.follow(asked(A, B))
    assert quiet(node)


def test_an_endpoint_that_leaves_ends_nothing() -> None:
    node = Node()
    node.follow(asked(A, B, C))
    node.open(A, 100)
    node.follow(asked(A, B))
    assert quiet(node)


def test_where_nobody_has_more_than_its_share_nothing_is_ended() -> None:
    node = Node()
    scaled_out(node, 0, 0)
    for backend in (A, B, C):
        node.open(backend, 10)
    assert quiet(node)


def test_an_endpoint_alone_keeps_what_it_has() -> None:
    node = Node()
    node.follow(asked(A))
    node.open(A, 100)
    node.follow(asked(B))
    assert quiet(node)


def test_in_slow_start_nothing_is_ended_and_afterwards_all_at_once() -> None:
    node = Node()
    node.follow(asked(A, B))
    node.open(A, 30)
    node.open(B, 30)
    node.follow(asked(A, B, C, rate=5, waits=True))
    assert quiet(node)
    node.follow(asked(A, B, C, rate=5))
    node.run(60)
    assert node.counts[A] == 20 and len(node.ended) == 20


def test_an_ejected_endpoint_has_no_share_until_it_is_well() -> None:
    node = Node()
    node.ejected = {3}
    scaled_out(node, 30, 30, avoids=True)
    node.run(60)
    assert not node.ended and node.counts == {A: 30, B: 30}
    node.ejected = set()
    node.run(60)
    assert node.counts[C] == 20
    # One that fails keeps nobody else from its share, and loses nothing of its own.
    node.follow(asked(A, B, C, D, rate=5, avoids=True))
    node.ejected = {3}
    node.run(60)
    assert node.counts[C] == 20 and node.counts[D] >= 13


def test_without_the_annotation_it_stops_at_once() -> None:
    node = Node()
    scaled_out(node, 30, 30, rate=1)
    node.run(4.5)
    before = len(node.ended)
    assert before == 5
    node.follow(None)
    node.run(60)
    assert len(node.ended) == before
    assert node.drains.told()[WEB] == Progress(5, 15, 1, over="stopped")
    # Asked again, it does not go on by itself.
    node.follow(asked(A, B, C))
    node.run(60)
    assert len(node.ended) == before


def test_it_stops_when_the_one_that_joined_leaves_again() -> None:
    node = Node()
    scaled_out(node, 30, 30, rate=1)
    node.run(4.5)
    node.follow(asked(A, B, rate=1))
    assert node.drains.told()[WEB].over == "stopped"
    node.run(60)
    assert len(node.ended) == 5


def test_another_rate_holds_from_now_on() -> None:
    node = Node()
    scaled_out(node, 30, 30, rate=1 / 60)
    node.run(5)
    assert len(node.ended) == 1
    node.follow(asked(A, B, C, rate=2))
    node.run(4.8)
    assert len(node.ended) == 11


def test_another_rate_does_not_hold_for_the_past() -> None:
    node = Node()
    scaled_out(node, 30, 30, rate=1 / 60)
    node.run(5)
    node.follow(asked(A, B, C, rate=2))
    node.drains.look(node.records.values(), (), node.now)
    assert len(node.drains.take(node.now, 10)[WEB]) == 1


def test_no_more_are_ended_at_a_time_than_those_that_joined_lack() -> None:
    """B lacks some, too, but has not joined."""
    node = Node()
    scaled_out(node, 60, 0, rate=100)
    node.drains.look(node.records.values(), (), node.now)
    assert len(node.drains.take(node.now + 10, 10)[WEB]) == 19


# -- what is told --------------------------------------------------------------------------------


def test_how_far_it_is_and_its_end_are_told() -> None:
    node = Node()
    scaled_out(node, 30, 30, rate=1)
    node.run(60)
    told = [each[WEB] for each in node.told if each]
    assert told[0] == Progress(1, 19, 1)
    assert [each.left for each in told] == sorted((each.left for each in told), reverse=True)
    assert told[-1] == Progress(19, 0, 1, over="done")
    assert [bool(each.over) for each in told].count(True) == 1


def test_where_sockets_can_not_be_ended_it_gives_up() -> None:
    node = Node()
    scaled_out(node, 30, 30, rate=1)
    node.run(3)
    node.drains.told()
    node.drains.give_up()
    assert node.drains.told()[WEB].over == "failed"
    assert node.drains.next(0, 0) is None


# -- whatever happens ----------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=5),
    st.lists(st.integers(0, 300), min_size=1, max_size=3),
    st.floats(0.2, 200),
    st.floats(0, 5),
    st.booleans(),
    st.integers(0, 20),
    st.floats(0, 1, exclude_max=True),
)
def test_it_ends_and_ends_each_of_the_old_ones_at_most_once(
    before: list[int],
    weights: list[int],
    rate: float,
    back: float,
    chance: bool,
    most: int,
    offset: float,
) -> None:
    node = Node(back=back, chance=chance, offset=offset)
    old, now = ENDPOINTS[: len(before)], ENDPOINTS[: len(before) + len(weights)]
    node.follow(asked(*old, rate=rate, most=most))
    for backend, count in zip(old, before, strict=True):
        node.open(backend, count)
    total = sum(before)
    heavy = [100] * len(old) + weights
    node.follow(asked(*now, rate=rate, most=most, weights=heavy))
    node.run(30 + total * (1 / rate + back))
    assert node.drains.next(0, 0) is None, "it goes on"
    cookies = [record.cookie for _, record in node.ended]
    assert len(set(cookies)) == len(cookies) and max(cookies, default=0) <= total
    wanted = dict(zip(sorted(now), targets(total, heavy, most, offset), strict=True))
    counts = node.counts
    if any(counts[backend] < 0.95 * wanted[backend] - 1 for backend in now[len(old) :]):
        # Who joined lacks some: because nobody has any of the old ones above his share.
        for record in node.records.values():
            assert record.cookie > total or counts[record.peer] <= wanted[record.peer]
