"""Plans: at every step between two writes each lookup gives a set that was or is right."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointsman.extents import Extents
from pointsman.maps import apply, take_over
from pointsman.objects import Ref
from pointsman.plan import Limits, Planner
from pointsman.values import TCP, Entry, Frontend, PortName, to_address
from tests.support.fake import FakeDatapath

SMALL = Limits(services=24, slots=40, endpoints=24)
ROOMY = Limits(services=4096, slots=4096, endpoints=4096)
VIPS = [to_address(f"10.96.0.{i}") for i in range(1, 5)]
BACKENDS = [(to_address(f"10.244.0.{i}"), 8080) for i in range(1, 7)]


def ref(name: str) -> Ref:
    return Ref("Service", "default", name)


def entry(name: str, vip: bytes, port: int = 80, endpoints=(), **more) -> Entry:
    return Entry(
        Frontend(vip, port, TCP),
        PortName("default", name, f"p{port}"),
        tuple(sorted(endpoints)),
        **more,
    )


def wildcard(name: str, vip: bytes) -> Entry:
    return Entry(Frontend(vip, 0, 0), PortName("default", name, "p80"))


class Harness:
    """A planner, its maps, and the rule that is checked after every write."""

    def __init__(self, limits: Limits = ROOMY) -> None:
        self.maps = FakeDatapath(limits, self.check)
        self.planner = Planner(limits)
        self.wanted: dict[Ref, tuple[Entry, ...]] = {}
        self.right: dict[Frontend, set] = {}
        self.garbage: list = []

    def check(self) -> None:
        for frontend, right in self.right.items():
            assert self.maps.resolve(frontend) in right, f"{frontend}: neither was nor is right"
        assert self.maps.frontends.keys() <= self.right.keys()

    def desired(self) -> dict[Frontend, tuple]:
        return {
            e.frontend: (e.endpoints, 0 if e.endpoints else e.empty)
            for entries in self.wanted.values()
            for e in entries
        }

    def expect(self, changed: dict[Ref, tuple[Entry, ...]]) -> None:
        """From here on a reader may see what is in the maps now, or what is wanted then."""
        self.wanted = {r: entries for r, entries in {**self.wanted, **changed}.items() if entries}
        before, after = self.maps.state(), self.desired()
        self.right = {f: {before.get(f), after.get(f)} for f in {*before, *after}}

    def update(self, changed: dict[Ref, tuple[Entry, ...]]) -> None:
        self.expect(changed)
        plan = self.planner.update(changed)
        apply(plan, self.maps)
        self.garbage.append(plan.garbage)

    def grace(self) -> None:
        self.maps.wait_for_readers()
        for garbage in self.garbage:
            self.planner.reclaim(garbage)
        self.garbage.clear()

    def retry(self) -> None:
        self.update({})

    def restart(self) -> None:
        """A new agent on the same maps: what was given out and not reclaimed is found again."""
        self.planner = take_over(self.maps)
        self.garbage.clear()
        self.expect(dict(self.wanted))
        plan = self.planner.replace(self.wanted)
        apply(plan, self.maps)
        self.garbage.append(plan.garbage)

    def assert_settled(self) -> None:
        assert self.maps.state() == self.desired()


def test_a_service_comes_changes_and_goes() -> None:
    h = Harness()
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:2]), wildcard("a", VIPS[0]))})
    h.assert_settled()
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[1:4]), wildcard("a", VIPS[0]))})
    h.assert_settled()
    h.update({ref("a"): ()})
    h.assert_settled()
    assert not h.maps.names


def test_an_endpoint_that_stays_keeps_its_id() -> None:
    h = Harness()
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
    h = Harness()
    h.update({ref("a"): tuple(entry("a", vip, endpoints=BACKENDS[:3]) for vip in VIPS[:3])})
    assert len({e.first for e in h.maps.services.values()}) == 1


def test_two_services_never_share_an_endpoint_id() -> None:
    h = Harness()
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:2]),)})
    h.update({ref("b"): (entry("b", VIPS[1], endpoints=BACKENDS[:2]),)})
    ids = [slot[1] for slot in h.maps.slots.values()]
    assert len(ids) == len(set(ids))


def test_a_vip_that_changes_hands_is_switched_not_deleted() -> None:
    h = Harness()
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:1]),)})
    service = h.maps.frontends[Frontend(VIPS[0], 80, TCP)]
    h.update({ref("a"): (), ref("b"): (entry("b", VIPS[0], endpoints=BACKENDS[1:2]),)})
    assert h.maps.frontends[Frontend(VIPS[0], 80, TCP)] == service
    h.assert_settled()


def test_the_second_claimant_of_a_frontend_waits_and_gets_it_in_the_end() -> None:
    h = Harness()
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
    h = Harness(limits)
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
    h = Harness()
    wanted = {ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:2]), wildcard("a", VIPS[0]))}
    h.update(wanted)
    assert not h.planner.update(wanted)


def test_a_new_agent_that_finds_everything_right_plans_nothing() -> None:
    h = Harness()
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:2]), wildcard("a", VIPS[0]))})
    planner = Planner(ROOMY, h.maps.snapshot())
    assert not planner.replace(h.wanted)


def test_a_damaged_element_is_replaced_a_grace_period_later() -> None:
    h = Harness()
    h.update({ref("a"): (entry("a", VIPS[0], endpoints=BACKENDS[:2]),)})
    service = h.maps.frontends[Frontend(VIPS[0], 80, TCP)]
    del h.maps.names[h.maps.services[service].owner]
    h.maps.on_step = lambda: None
    h.restart()
    assert ref("a") in h.planner.unplaced
    h.grace()
    h.retry()
    h.assert_settled()


@pytest.mark.parametrize("shared", [False, True], ids=["new-load", "same-load"])
def test_an_upgrade_keeps_every_number_that_records_name(shared: bool) -> None:
    h = Harness()
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


names = st.sampled_from("abcd")
entries = st.builds(
    lambda vip, ports, backends, empty: [
        (vip, port, tuple(sorted(set(backends))), empty) for port in ports
    ],
    st.sampled_from(VIPS),
    st.lists(st.sampled_from([80, 443, 53]), min_size=0, max_size=3, unique=True),
    st.lists(st.sampled_from(BACKENDS), max_size=6),
    st.sampled_from([0, 1]),
)
event = st.one_of(
    st.tuples(st.just("update"), st.dictionaries(names, entries, min_size=1, max_size=3)),
    st.tuples(st.just("grace"), st.none()),
    st.tuples(st.just("restart"), st.none()),
    st.tuples(st.just("crash"), st.integers(0, 30)),
)


def _build(changed) -> dict[Ref, tuple[Entry, ...]]:
    built = {}
    for name, found in changed.items():
        # Each name keeps to its own VIPs here: claims have their own tests.
        vip = VIPS["abcd".index(name)]
        made = [entry(name, vip, port, backends, empty=e) for _, port, backends, e in found]
        built[ref(name)] = (*made, wildcard(name, vip)) if made else ()
    return built


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(event, max_size=25), st.booleans())
def test_at_every_step_a_reader_sees_a_set_that_was_or_is_right(events, small: bool) -> None:
    h = Harness(SMALL if small else ROOMY)
    crash_at: int | None = None
    for kind, value in events:
        if kind == "update":
            changed = _build(value)
            h.maps.fail_after = crash_at
            try:
                h.update(changed)
            except OSError:
                # kill -9 between any two writes, then a new agent with the same wishes.
                h.maps.fail_after = None
                h.restart()
            h.maps.fail_after = crash_at = None
        elif kind == "grace":
            h.grace()
            h.retry()
        elif kind == "restart":
            h.restart()
        else:
            crash_at = value
    for _ in range(4):
        h.grace()
        h.retry()
    if not h.planner.unplaced:
        h.assert_settled()
    elif not small:
        raise AssertionError(h.planner.unplaced)


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
