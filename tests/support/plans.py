"""Plans played step by step, with the rule that holds at every step."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from pointsman.maps import apply, take_over
from pointsman.objects import Ref
from pointsman.plan import Limits
from pointsman.values import TCP, Entry, Frontend, PortName, to_address

# One word of marks: most addresses share their bit with another.
SMALL = Limits(services=24, slots=40, endpoints=24, marks=1)
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

    def __init__(self, maps: Any) -> None:
        self.maps = maps
        maps.on_step = self.check
        self.planner = take_over(maps)
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
_event = st.one_of(
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


events = st.lists(_event, max_size=25)


def play(h: Harness, sequence: list[Any], *, everything_fits: bool) -> None:
    """Updates, grace periods, restarts and crashes between any two writes; at the end the maps
    are what is wanted."""
    crash_at: int | None = None
    for kind, value in sequence:
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
    elif everything_fits:
        raise AssertionError(h.planner.unplaced)
