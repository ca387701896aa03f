"""Plans: at every step between two writes each lookup gives a set that was or is right."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointsman.allocate import Extents
from pointsman.maps import apply, take_over
from pointsman.objects import Ref
from pointsman.plan import Limits
from pointsman.planner import Planner
from pointsman.policies import PolicyElement
from pointsman.values import TCP, Backend, Entry, Frontend, Outside, PortName
from tests.support.fake import FakeDatapath
from tests.support.plans import (
    AVOID,
    BACKENDS,
    CLIENTS,
    LEAST,
    MAGLEV,
    OUTSIDE,
    POLICIES,
    ROOMY,
    SMALL,
    SOURCES,
    VIPS,
    Harness,
    entry,
    events,
    outcome,
    places_of,
    play,
    ref,
    renaming_events,
    served,
    wildcard,
)


def test_a_service_comes_changes_and_goes() -> None:
    h = Harness(FakeDatapath(ROOMY))
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:2]), wildcard("a", VIPS[0]))})
    h.assert_settled()
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[1:4]), wildcard("a", VIPS[0]))})
    h.assert_settled()
    h.update({ref("a"): ()})
    h.assert_settled()
    assert not h.maps.names


def test_an_endpoint_that_stays_keeps_its_id() -> None:
    h = Harness(FakeDatapath(ROOMY))
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:2]),)})
    before = {s[0]: s[1:3] for s in h.maps.slots.values()}
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[1:3]),)})
    service = h.maps.services[h.maps.frontends[Frontend(VIPS[0], 80, TCP)]]
    after = {
        h.maps.slots[i][0]: h.maps.slots[i][1:3]
        for i in range(service.first, service.first + service.count)
    }
    assert after[BACKENDS[1]] == before[BACKENDS[1]]


def test_frontends_of_one_service_port_share_their_slots() -> None:
    h = Harness(FakeDatapath(ROOMY))
    h.update({ref("a"): tuple(entry("a", vip, endpoints=BACKENDS[:3]) for vip in VIPS[:3])})
    assert len({e.first for e in h.maps.services.values()}) == 1


def test_two_services_never_share_an_endpoint_id() -> None:
    h = Harness(FakeDatapath(ROOMY))
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:2]),)})
    h.update({ref("b"): (entry("b", VIPS[1], endpoints=BACKENDS[:2]),)})
    ids = [slot[1] for slot in h.maps.slots.values()]
    assert len(ids) == len(set(ids))


def test_a_vip_that_changes_hands_is_switched_not_deleted() -> None:
    h = Harness(FakeDatapath(ROOMY))
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:1]),)})
    service = h.maps.frontends[Frontend(VIPS[0], 80, TCP)]
    h.update({ref("a"): (), ref("b"): (entry("b", VIPS[0], endpoints=BACKENDS[1:2]),)})
    assert h.maps.frontends[Frontend(VIPS[0], 80, TCP)] == service
    h.assert_settled()


def test_the_second_claimant_of_a_frontend_waits_and_gets_it_in_the_end() -> None:
    h = Harness(FakeDatapath(ROOMY))
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:1]),)})
    plan = h.planner.update({ref("b"): (entry("b", VIPS[0], endpoints=BACKENDS[1:2]),)})
    apply(plan, h.maps)
    assert "belongs to Service default/a" in h.planner.unplaced[ref("b")]
    assert h.maps.resolve(Frontend(VIPS[0], 80, TCP)) == ((BACKENDS[0],), 0)
    h.maps.on_step = lambda: None
    apply(h.planner.update({ref("a"): ()}), h.maps)
    assert h.maps.resolve(Frontend(VIPS[0], 80, TCP)) == ((BACKENDS[1],), 0)
    assert not h.planner.unplaced


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        pytest.param(Limits(services=4, slots=99, endpoints=99), "--max-services", id="services"),
        pytest.param(Limits(services=99, slots=8, endpoints=99), "--max-slots", id="slots"),
        pytest.param(Limits(services=99, slots=99, endpoints=7), "--max-endpoints", id="endpoints"),
    ],
)
def test_what_does_not_fit_is_named_the_rest_works_and_it_heals(limits: Limits, says: str) -> None:
    h = Harness(FakeDatapath(limits))
    for i, name in enumerate("abcd"):
        h.update({ref(name): (entry(name, VIPS[i], endpoints=BACKENDS[:3]),)})
    assert h.planner.unplaced
    assert all(says in reason for reason in h.planner.unplaced.values())
    placed = {e.frontend.address for r, es in h.wanted.items() for e in es} - {
        VIPS["abcd".index(r.name)] for r in h.planner.unplaced
    }
    assert {frontend.address for frontend in h.maps.state()} == placed
    gone = next(r for r in h.wanted if r not in h.planner.unplaced)
    h.update({gone: ()})
    h.grace()
    h.retry()
    assert len(h.planner.unplaced) < 3
    for name in list("abcd"):
        if ref(name) in h.wanted and ref(name) not in h.planner.unplaced and len(h.wanted) > 2:
            h.update({ref(name): ()})
            h.grace()
            h.retry()
    assert not h.planner.unplaced
    h.assert_settled()


def test_applying_twice_plans_nothing() -> None:
    h = Harness(FakeDatapath(ROOMY))
    wanted = {ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:2]), wildcard("a", VIPS[0]))}
    h.update(wanted)
    assert not h.planner.update(wanted)


def test_a_new_agent_that_finds_everything_right_plans_nothing() -> None:
    h = Harness(FakeDatapath(ROOMY))
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:2]), wildcard("a", VIPS[0]))})
    planner = Planner(ROOMY, h.maps.snapshot())
    assert not planner.replace(h.wanted)


def test_a_damaged_element_is_replaced_a_grace_period_later() -> None:
    h = Harness(FakeDatapath(ROOMY))
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:2]),)})
    service = h.maps.frontends[Frontend(VIPS[0], 80, TCP)]
    del h.maps.names[h.maps.services[service].owner]
    h.maps.on_step = lambda: None
    h.restart()
    assert ref("a") in h.planner.unplaced
    h.grace()
    h.retry()
    h.assert_settled()


class _Bare(FakeDatapath):
    """Without the rules that a state after a crash breaks until it is put right."""

    def mark(self, items: Sequence[tuple[int, int]]) -> None:
        self.words.update(items)

    def add_frontends(self, items: Sequence[tuple[Frontend, int]]) -> None:
        self.frontends.update(items)


CLUSTER_IP, LOAD_BALANCER = VIPS[:2]


def _of_port(vip: bytes, name: str, endpoints: Sequence[Backend], port: int = 80) -> Entry:
    owner = PortName("default", "web", name)
    outside = served(endpoints, local=True, sources=SOURCES[1:3])
    places = places_of(sorted(endpoints))
    return Entry(
        Frontend(vip, port, TCP),
        owner,
        tuple(sorted(endpoints)),
        places=places,
        outside=outside if vip == LOAD_BALANCER else None,
    )


@pytest.mark.parametrize(
    "limits", [ROOMY, replace(ROOMY, marks=1)], ids=["own-bits", "shared-bits"]
)
@pytest.mark.parametrize("late", [False, True], ids=["as-planned", "with-a-port-more"])
@pytest.mark.parametrize("other", [BACKENDS[1], BACKENDS[2]], ids=["same", "endpoint-replaced"])
@pytest.mark.parametrize("first", VIPS[:2], ids=["cluster-ip-first", "load-balancer-first"])
def test_a_kill_at_any_write_of_a_renamed_port_is_recovered_from(
    limits: Limits, late: bool, other: Backend, first: bytes
) -> None:
    """The owner of several frontends changes, one of which has no wildcard: whatever was written,
    the next agent ends with every frontend right and marked."""
    second = LOAD_BALANCER if first == CLUSTER_IP else CLUSTER_IP
    any_port = Entry(Frontend(CLUSTER_IP, 0, 0), PortName("default", "web", "http"))

    def wanted(name: str, members: Sequence[Backend], *more: Entry) -> dict[Ref, tuple[Entry, ...]]:
        pair = (_of_port(first, name, members), _of_port(second, name, members))
        return {ref("web"): (pair[0], any_port, pair[1], *more)}

    before = wanted("http", BACKENDS[:2])
    after = wanted("web", (BACKENDS[0], other))
    https = _of_port(LOAD_BALANCER, "tls", BACKENDS[:1], 443)
    at_last = wanted("web", (BACKENDS[0], other), https) if late else after
    for writes in itertools.count():
        maps = FakeDatapath(limits)
        planner = take_over(maps, packets=True)
        apply(planner.replace(before), maps)
        maps.fail_after = writes
        try:
            apply(planner.update(after), maps)
            break
        except OSError:
            maps.fail_after = None
        maps.__class__ = _Bare
        planner = take_over(maps, packets=True)
        plan = planner.replace(at_last)
        apply(plan, maps)
        maps.wait_for_readers()
        planner.reclaim(plan.garbage)
        again = planner.retry()
        apply(again, maps)
        entries = at_last[ref("web")]
        assert maps.frontends.keys() == {entry.frontend for entry in entries}, writes
        assert all(map(maps.marked, maps.frontends)), writes
        assert {f: maps.resolve(f) for f in maps.frontends} == {
            entry.frontend: (entry.endpoints, 0) for entry in entries
        }, writes
        for wish in entries:
            for client in CLIENTS:
                found = maps.resolve_outside(wish.frontend, client)
                assert found == outcome(wish.outside, client), writes
        gone = planner.replace({})
        apply(gone, maps)
        maps.wait_for_readers()
        planner.reclaim(again.garbage)
        planner.reclaim(gone.garbage)
        assert not any(used for used, _ in planner.usage().values()), writes


@pytest.mark.parametrize("local", [False, True], ids=["cluster", "local"])
def test_a_kill_at_any_write_leaves_no_table_of_former_endpoints(local: bool) -> None:
    """Between the switch of the outside set and that of its table, the table has the right size
    and is another set's: the next agent must not take it over."""

    def wanted(*numbers: int) -> dict[Ref, tuple[Entry, ...]]:
        members = [BACKENDS[i] for i in numbers]
        outside = served(members, local=local, sources=SOURCES[: len(members)])
        return {
            ref("web"): tuple(
                entry("web", vip, endpoints=members, places=places_of(members), outside=outside)
                for vip in VIPS[:2]
            )
        }

    for writes in itertools.count():
        h = Harness(FakeDatapath(ROOMY))
        h.update(wanted(0, 2, 3))
        h.grace()
        h.maps.fail_after = writes
        try:
            h.update(wanted(0, 3, 4))
        except OSError:
            h.maps.fail_after = None
            h.restart()
        else:
            break
        h.grace()
        h.retry()
        h.assert_settled()


def test_a_new_agent_takes_tables_over_as_they_are() -> None:
    h = Harness(FakeDatapath(ROOMY))
    members = BACKENDS[:3]
    outside = served(members, sources=SOURCES[1:3])
    places = places_of(members)
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=members, places=places, outside=outside),)})
    assert h.maps.table(Frontend(VIPS[0], 80, TCP))
    assert not Planner(ROOMY, h.maps.snapshot(), packets=True).replace(h.wanted)


def test_a_change_of_weights_is_another_set_of_the_same_endpoints() -> None:
    h = Harness(FakeDatapath(ROOMY))
    frontend = Frontend(VIPS[0], 80, TCP)
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:3], weights=(1, 2, 3)),)})
    before = h.maps.services[h.maps.frontends[frontend]]
    ids = {slot[0]: slot[1:3] for slot in h.maps.slots.values()}
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:3], weights=(1, 2, 4)),)})
    after = h.maps.services[h.maps.frontends[frontend]]
    assert (after.first, h.maps.weights(frontend)) != (before.first, (1, 2, 3))
    assert {slot[0]: slot[1:3] for slot in h.maps.slots.values()} == ids
    assert not h.planner.update(h.wanted)
    h.assert_settled()


@pytest.mark.parametrize("turns", [1, -1], ids=["weights-come", "weights-go"])
def test_no_endpoint_of_weight_zero_is_drawn_while_weights_come_or_go(turns: int) -> None:
    """With the flag too late or gone too early the new or the old set would be drawn from as if all
    were alike: `seen` of the harness has the weights that count."""
    h = Harness(FakeDatapath(ROOMY))
    for weights in [(), (0, 100, 0)][::turns]:
        one = entry("a", VIPS[0], endpoints=BACKENDS[:3], weights=weights)
        h.update({ref("a"): (one,)})
        h.assert_settled()


def test_a_new_agent_takes_weights_policies_and_tables_over_as_they_are() -> None:
    h = Harness(FakeDatapath(ROOMY))
    more = {"weights": (0, 5, 100), "policy": POLICIES[1], "algorithm": MAGLEV | AVOID}
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:3], **more),)})
    assert h.maps.inside(Frontend(VIPS[0], 80, TCP))
    assert not Planner(ROOMY, h.maps.snapshot(), packets=True).replace(h.wanted)


def test_a_policy_is_that_of_all_frontends_and_goes_with_the_last() -> None:
    h = Harness(FakeDatapath(ROOMY))
    more = {"policy": POLICIES[2], "algorithm": LEAST | AVOID}
    one, other = (
        entry("a", vip, endpoints=BACKENDS[:count], **more)
        for vip, count in zip(VIPS, (6, 3), strict=False)
    )
    h.update({ref("a"): (one, other)})
    (owner,) = h.maps.names
    assert h.maps.policies[owner] == PolicyElement(POLICIES[2], 2)
    h.update({ref("a"): (one,)})
    assert h.maps.policies[owner] == PolicyElement(POLICIES[2], 5)
    h.update({ref("a"): ()})
    assert h.maps.policies[owner] == PolicyElement()


def test_while_a_set_grows_or_shrinks_never_may_all_of_it_be_ejected() -> None:
    h = Harness(FakeDatapath(ROOMY))
    more = {"policy": POLICIES[2], "algorithm": LEAST | AVOID}
    for count in (2, 6, 3):
        h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:count], **more),)})
        assert h.maps.policy(Frontend(VIPS[0], 80, TCP)).most == count - 1


@pytest.mark.parametrize("writes", range(1, 14))
def test_no_owner_finds_the_policy_of_a_former_one(writes: int) -> None:
    """An agent that is killed before it took a policy back: the next one does."""
    h = Harness(FakeDatapath(ROOMY))
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:3], policy=POLICIES[1]),)})
    h.maps.fail_after = writes
    with contextlib.suppress(OSError):
        h.update({ref("a"): (), ref("b"): (entry("b", VIPS[1], endpoints=BACKENDS[:3]),)})
    h.maps.fail_after = None
    h.restart()
    assert {each for each in h.maps.policies.values() if any(each.words)} == set()


def test_frontends_that_choose_by_table_share_one_with_clients_outside() -> None:
    h = Harness(FakeDatapath(ROOMY))
    members, places = BACKENDS[:3], places_of(BACKENDS[:3])
    one = entry(
        "a", VIPS[0], endpoints=members, places=places, outside=served(members), algorithm=MAGLEV
    )
    h.update({ref("a"): (one,)})
    (element,) = h.maps.services.values()
    assert element.inside == element.table
    h.update({ref("a"): (replace(one, algorithm=LEAST),)})
    (element,) = h.maps.services.values()
    assert not element.inside.count and element.table.count
    h.assert_settled()


def test_without_programs_for_packets_sockets_have_their_tables() -> None:
    h = Harness(FakeDatapath(ROOMY))
    planner = Planner(ROOMY)
    plan = planner.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS, algorithm=MAGLEV),)})
    h.maps.on_step = lambda: None
    apply(plan, h.maps)
    assert h.maps.inside(Frontend(VIPS[0], 80, TCP))


@pytest.mark.parametrize("shared", [False, True], ids=["new-load", "same-load"])
def test_an_upgrade_keeps_weights_and_policies_and_tells_a_new_load_its_owners(
    shared: bool,
) -> None:
    h = Harness(FakeDatapath(ROOMY))
    more = {"weights": (0, 5, 100), "policy": POLICIES[1], "algorithm": LEAST | AVOID}
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:3], **more),)})
    h.update({ref("z"): (entry("z", VIPS[3], endpoints=BACKENDS[:2], policy=POLICIES[2]),)})
    old = h.maps.snapshot()
    fresh = FakeDatapath(ROOMY)
    if shared:  # and with it `policies`, which counts what `load` says
        fresh.load, fresh.policies = h.maps.load, dict(h.maps.policies)
    del h.wanted[ref("z")]
    plan = Planner(ROOMY, fresh.snapshot(), old).replace(h.wanted)
    owner = next(owner for owner, name in old.names.items() if name.service == "a")
    assert {named for _, _, named in plan.generations} == {owner}
    apply(plan, fresh)
    frontend = Frontend(VIPS[0], 80, TCP)
    assert fresh.weights(frontend) == (0, 5, 100)
    held = {o: each.words for o, each in fresh.policies.items() if any(each.words)}
    assert held == {owner: PolicyElement(POLICIES[1], 1).words}


def test_without_programs_for_packets_there_are_no_tables() -> None:
    h = Harness(FakeDatapath(ROOMY))
    h.update(
        {ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:3], outside=served(BACKENDS[:3])),)}
    )
    planner = Planner(ROOMY, h.maps.snapshot())
    plan = planner.replace(h.wanted)
    assert [value for _, value in plan.tables] == [0] and plan.garbage.lines
    apply(plan, h.maps)
    assert not h.maps.table(Frontend(VIPS[0], 80, TCP))
    planner.reclaim(plan.garbage)
    assert planner.usage()["maglev"][0] == 0


def test_frontends_of_one_service_port_share_their_table_and_their_slots() -> None:
    h = Harness(FakeDatapath(ROOMY))
    members, places = BACKENDS[:3], places_of(BACKENDS[:3])
    both = [served(members), served(members, sources=SOURCES[:1])]
    h.update({
        ref("a"): tuple(
            entry("a", vip, endpoints=members, places=places, outside=outside)
            for vip, outside in zip(VIPS, both, strict=False)
        )
    })  # fmt: skip
    elements = h.maps.services.values()
    assert len({e.table for e in elements}) == 1
    assert {e.outside for e in elements} == {(e.first, e.count) for e in elements}
    h.assert_settled()


def test_without_room_for_its_table_a_service_is_served_and_gets_one_later() -> None:
    h = Harness(FakeDatapath(replace(ROOMY, lines=8)))
    for i, name in enumerate("ab"):
        outside = served(BACKENDS[:2])
        h.update({ref(name): (entry(name, VIPS[i], endpoints=BACKENDS[:2], outside=outside),)})
    (problem,) = h.planner.shortages()
    assert problem.object == "Service default/b" and "--max-maglev-lines" in problem.mend
    assert problem.severity == "warning" and not h.planner.unplaced and not h.planner.waiting
    frontend = Frontend(VIPS[1], 80, TCP)
    assert h.maps.resolve_outside(frontend, CLIENTS[0]) == (tuple(BACKENDS[:2]), 0)
    h.update({ref("a"): ()})
    h.grace()
    assert h.planner.waiting
    h.retry()
    assert not h.planner.shortages() and h.maps.table(frontend)


def test_without_room_for_its_ranges_a_frontend_lets_nobody_in_from_outside() -> None:
    h = Harness(FakeDatapath(replace(ROOMY, ranges=2)))
    for i, name in enumerate("ab"):
        outside = served(BACKENDS[:2], sources=SOURCES[1:3])
        h.update({ref(name): (entry(name, VIPS[i], endpoints=BACKENDS[:2], outside=outside),)})
    (problem,) = h.planner.shortages()
    assert problem.object == "Service default/b" and "source_ranges is full" in problem.message
    frontend = Frontend(VIPS[1], 80, TCP)
    assert {h.maps.resolve_outside(frontend, client) for client in CLIENTS} == {"barred"}
    assert h.maps.resolve(frontend) == (tuple(BACKENDS[:2]), 0)
    h.update({ref("a"): ()})
    h.grace()
    h.retry()
    assert not h.planner.shortages()
    h.assert_settled()


def test_a_set_that_is_too_large_for_any_table_has_none() -> None:
    many = [(BACKENDS[0][0], port) for port in range(1, 6601)]
    limits = Limits(services=99, slots=1 << 14, endpoints=1 << 14)
    h = Harness(FakeDatapath(limits))
    h.update(
        {
            ref("a"): (
                entry("a", VIPS[0], endpoints=many, outside=Outside(tuple(many), (), 0, OUTSIDE)),
            )
        }
    )
    assert not h.maps.table(Frontend(VIPS[0], 80, TCP)) and not h.planner.shortages()


@pytest.mark.parametrize("shared", [False, True], ids=["new-load", "same-load"])
def test_an_upgrade_keeps_every_number_that_records_name(shared: bool) -> None:
    h = Harness(FakeDatapath(ROOMY))
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:3]), wildcard("a", VIPS[0]))})
    h.update({ref("b"): (entry("b", VIPS[1], endpoints=BACKENDS[:2]),)})
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[1:3]), wildcard("a", VIPS[0]))})
    old = h.maps.snapshot()
    fresh = FakeDatapath(Limits(64, 64, 64))
    if shared:  # `load` itself did not change: old and new programs count in the same map
        fresh.load = h.maps.load
    planner = Planner(fresh.limits, fresh.snapshot(), old)
    wanted = dict(h.wanted)
    wanted[ref("c")] = (entry("c", VIPS[2], endpoints=BACKENDS[:4]),)
    apply(planner.replace(wanted), fresh)
    new = fresh.snapshot()
    assert {f: s for f, s in new.frontends.items() if f in old.frontends} == old.frontends
    assert {o: n for o, n in new.names.items() if o in old.names} == old.names

    def ids(snapshot):
        return {
            (e.owner, m[0]): m[1:]
            for e in snapshot.services.values()
            if e.count
            for m in snapshot.slots[e.first, e.count]
        }

    assert ids(new).items() >= ids(old).items()
    others = {i for key, (i, _) in ids(new).items() if key not in ids(old)}
    assert others.isdisjoint(old.generations), "a number with a past was given to a new endpoint"


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(events, st.booleans())
def test_at_every_step_a_reader_sees_a_set_that_was_or_is_right(sequence, small: bool) -> None:
    play(Harness(FakeDatapath(SMALL if small else ROOMY)), sequence, everything_fits=not small)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(renaming_events)
def test_a_change_of_owner_is_no_moment_in_which_neither_is_right(sequence) -> None:
    play(Harness(FakeDatapath(ROOMY)), sequence, everything_fits=True)


runs = st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=60)


@given(runs)
def test_runs_never_overlap_and_nothing_is_lost(steps) -> None:
    extents = Extents(64)
    held: list[tuple[int, int]] = []
    for take, count in steps:
        if take:
            first = extents.take(count)
            if first is not None:
                for other, length in held:
                    assert first + count <= other or other + length <= first
                assert first >= 0 and first + count <= 64
                held.append((first, count))
        elif held:
            extents.free(*held.pop(count % len(held)))
        assert extents.available == 64 - sum(length for _, length in held)
    for run in held:
        extents.free(*run)
    assert extents.take(64) == 0


def test_ids_retired_before_a_restart_are_free_at_once() -> None:
    """Else an agent that has used every id once could give none out right after a restart."""
    h = Harness(FakeDatapath(Limits(services=99, slots=99, endpoints=5)))
    for endpoints in (BACKENDS[:4], BACKENDS[4:6], BACKENDS[:1]):
        h.update({ref("a"): (entry("a", VIPS[0], endpoints=endpoints),)})
        h.grace()
    h.restart()
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:4]),)})
    assert not h.planner.unplaced


@pytest.mark.parametrize("shared", [False, True], ids=["new-load", "same-load"])
def test_a_second_start_during_an_upgrade_retires_nothing_that_is_in_use(shared: bool) -> None:
    h = Harness(FakeDatapath(ROOMY))
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:3]), wildcard("a", VIPS[0]))})
    old = h.maps.snapshot()
    fresh = FakeDatapath(ROOMY)
    if shared:
        fresh.load = h.maps.load
    apply(Planner(ROOMY, fresh.snapshot(), old).replace(h.wanted), fresh)
    # Killed before `current` pointed to the new maps: the next start inherits once more.
    plan = Planner(ROOMY, fresh.snapshot(), old).replace(h.wanted)
    assert not plan.retired and not plan.garbage.endpoints
    assert not plan.deleted and not plan.sets


def test_what_does_not_fit_leaves_no_garbage_that_would_call_for_a_retry() -> None:
    h = Harness(FakeDatapath(Limits(services=99, slots=4, endpoints=99)))
    two = (entry("a", VIPS[0], 80, BACKENDS[:3]), entry("a", VIPS[0], 81, BACKENDS[:3]))
    plan = h.planner.update({ref("a"): two})
    apply(plan, FakeDatapath(h.maps.limits))
    assert h.planner.unplaced and not plan.garbage
    assert not h.planner.retry()


def test_a_vip_that_changes_hands_when_slots_are_full_refuses_and_heals() -> None:
    h = Harness(FakeDatapath(Limits(services=99, slots=4, endpoints=99)))
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:3]),)})
    h.maps.on_step = lambda: None
    h.update({ref("a"): (), ref("b"): (entry("b", VIPS[0], endpoints=BACKENDS[3:6]),)})
    assert h.maps.resolve(Frontend(VIPS[0], 80, TCP)) == ((), 0)
    h.grace()
    h.retry()
    assert not h.planner.unplaced
    h.assert_settled()


def test_a_set_can_shrink_when_slots_are_full() -> None:
    h = Harness(FakeDatapath(Limits(services=99, slots=128, endpoints=999)))
    many = [(BACKENDS[0][0], port) for port in range(1, 127)]
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=many),)})
    assert not h.planner.unplaced
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=many[:2]),)})
    assert not h.planner.unplaced
    h.assert_settled()


def test_reuse_without_a_grace_period_is_noticed() -> None:
    """The rule that the property above relies on: the fake refuses what a reader may still hold."""
    h = Harness(FakeDatapath(Limits(services=99, slots=4, endpoints=99)))
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:2]),)})
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[2:4]),)})
    for garbage in h.garbage:
        h.planner.reclaim(garbage)  # without wait_for_readers()
    with pytest.raises(AssertionError, match="reused early"):
        h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:2]),)})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param("add_frontends", "write_service", id="frontend-before-its-service"),
        pytest.param("switch", "write_slots", id="set-before-its-slots"),
        pytest.param("write_slots", "set_generations", id="slots-before-their-generations"),
        pytest.param("switch", "write_shares", id="set-before-its-shares"),
    ],
)
def test_writes_in_another_order_are_noticed(first: str, second: str) -> None:
    class Reordered(FakeDatapath):
        """Puts the writes called `first` before those called `second`."""

        def __getattribute__(self, name: str):
            if name != second:
                return super().__getattribute__(name)
            return lambda *arguments: late.append((name, arguments))

    late: list = []
    h = Harness(FakeDatapath(ROOMY))
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:2]),)})
    maps = h.maps
    maps.__class__ = Reordered
    changed = {
        ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[2:4]),),
        ref("b"): (entry("b", VIPS[1], endpoints=BACKENDS[:2]),),
    }
    h.expect(changed)
    with pytest.raises((AssertionError, KeyError)):
        apply(h.planner.update(changed), maps)
