"""Plans played step by step, with the rule that holds at every step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from pointsman import abi, maglev
from pointsman.maps import apply, take_over
from pointsman.objects import Ref
from pointsman.plan import Limits
from pointsman.policies import choices
from pointsman.ranges import holds, parse
from pointsman.shares import normal
from pointsman.values import TCP, Entry, Frontend, Outside, Policy, PortName, to_address

# One word of marks: most addresses share their bit with another. Room for two tables or so.
SMALL = Limits(services=24, slots=40, endpoints=24, marks=1, lines=20, ranges=6)
ROOMY = Limits(services=4096, slots=4096, endpoints=4096)
VIPS = [to_address(f"10.96.0.{i}") for i in range(1, 5)]
BACKENDS = [(to_address(f"10.244.0.{i}"), 8080) for i in range(1, 7)]
SOURCES = [
    parse(text)
    for text in (
        "0.0.0.0/0", "198.51.0.0/16", "198.51.100.0/24", "198.51.100.128/25", "203.0.113.0/24",
    )
]  # fmt: skip
CLIENTS = [
    to_address(text) for text in ("198.51.100.200", "198.51.100.1", "203.0.113.9", "9.9.9.9")
]
_ABI = abi.constants()
OUTSIDE, LOCAL, RANGES = (_ABI[f"PACKETS_{name}"] for name in ("OUTSIDE", "LOCAL", "RANGES"))
HERE, ELSEWHERE = _ABI["SLOT_HERE"], _ABI["SLOT_ELSEWHERE"]
RANDOM, LEAST, MAGLEV, MASK = (
    _ABI[f"ALGORITHM_{name}"] for name in ("RANDOM", "LEAST_CONNECTIONS", "MAGLEV", "MASK")
)
AVOID = _ABI["CHOICE_AVOID"]
POLICIES = (
    Policy(max_connections=5),
    Policy(True, 0, 3, 5, 50, 20, 10**10, 3 * 10**11, 3 * 10**9, most_percent=30),
    Policy(True, 9, 0, 1, 0, 20, 10**10, 10**11, 10**9, most_percent=100),
)


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


def places_of(endpoints) -> tuple[int, ...]:
    """Every other endpoint is here."""
    return tuple(ELSEWHERE if BACKENDS.index(b) % 2 else HERE for b in endpoints)


def served(endpoints, *, local: bool = False, sources=None, empty: int = 0) -> Outside:
    """Those of `endpoints` that are here only if `local`; for `sources` only, if not None."""
    found = tuple(b for b in sorted(endpoints) if not local or places_of([b]) == (HERE,))
    flags = OUTSIDE | LOCAL * local | RANGES * (sources is not None)
    return Outside(found, places_of(found), empty, flags, tuple(sorted(sources or ())))


def outcome(wanted: Outside | None, client: bytes) -> tuple | str | None:
    """What a client outside should get, as `resolve_outside` of the maps says it."""
    if wanted is None:
        return None
    if wanted.flags & RANGES and not holds(wanted.sources, client):
        return "barred"
    return wanted.endpoints, 0 if wanted.endpoints else wanted.empty


def stored(policy: Policy | None) -> Policy | None:
    """As it stands in the map, which knows no share."""
    return policy and replace(policy, most_percent=0)


class Harness:
    """A planner, its maps, and the rule that is checked after every write."""

    def __init__(self, maps: Any) -> None:
        self.maps = maps
        maps.on_step = self.check
        self.planner = take_over(maps, packets=True)
        self.wanted: dict[Ref, tuple[Entry, ...]] = {}
        self.right: dict[Frontend, set] = {}
        self.right_policy: dict[Frontend, set] = {}
        self.right_outside: dict[tuple[Frontend, bytes], set] = {}
        self.garbage: list = []

    def check(self) -> None:
        for frontend, right in self.right.items():
            assert self.seen(frontend) in right, f"{frontend}: neither was nor is right"
            if self.maps.resolve(frontend):
                self.check_policy(frontend)
        for (frontend, client), right in self.right_outside.items():
            found = self.maps.resolve_outside(frontend, client)
            assert found in right, f"{frontend} from outside: neither was nor is right"
        assert self.maps.frontends.keys() <= self.right.keys()

    def check_policy(self, frontend: Frontend) -> None:
        """Its policy was or is right, and never are all of its endpoints passed over."""
        element = self.maps.policy(frontend)
        found = element and stored(element.policy)
        assert found in self.right_policy[frontend], f"{frontend}: another policy"
        members, _ = self.maps.resolve(frontend)
        if self.maps.algorithm(frontend) & AVOID and members:
            assert element.most < choices(members, self.maps.weights(frontend)), f"{frontend}: all"

    def seen(self, frontend: Frontend) -> tuple | None:
        """Endpoints, what an empty set answers, and the weights that a draw goes by."""
        found = self.maps.resolve(frontend)
        return found and (*found, self.maps.weights(frontend))

    def state(self) -> dict[Frontend, tuple]:
        return {frontend: self.seen(frontend) for frontend in self.maps.state()}

    def desired(self) -> dict[Frontend, tuple]:
        return {
            e.frontend: (e.endpoints, 0 if e.endpoints else e.empty, normal(e.weights))
            for entries in self.wanted.values()
            for e in entries
        }

    def policies(self) -> dict[Frontend, Policy | None]:
        return {e.frontend: stored(e.policy) for entries in self.wanted.values() for e in entries}

    def outsides(self) -> dict[Frontend, Outside | None]:
        return {e.frontend: e.outside for entries in self.wanted.values() for e in entries}

    def expect(self, changed: dict[Ref, tuple[Entry, ...]]) -> None:
        """From here on a reader may see what is in the maps now, or what is wanted then."""
        self.wanted = {r: entries for r, entries in {**self.wanted, **changed}.items() if entries}
        before, after = self.state(), self.desired()
        self.right = {f: {before.get(f), after.get(f)} for f in {*before, *after}}
        policies = self.policies()
        self.right_policy = {}
        for f in self.right:
            known = self.maps.policy(f) if f in before else None
            self.right_policy[f] = {known and stored(known.policy), policies.get(f)}
            if f not in after or not after[f][0]:
                self.right_policy[f].add(None)  # a set without endpoints asks for none
        outside = self.outsides()
        self.right_outside = {
            (f, client): {self.maps.resolve_outside(f, client), outcome(outside.get(f), client)}
            for f in self.right
            for client in CLIENTS
        }
        if self.maps.limits.ranges < len(SOURCES) * len(VIPS):
            for right in self.right_outside.values():
                right.add("barred")  # without room for ranges nobody is let in

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
        self.planner = take_over(self.maps, packets=True)
        self.garbage.clear()
        self.expect(dict(self.wanted))
        plan = self.planner.replace(self.wanted)
        apply(plan, self.maps)
        self.garbage.append(plan.garbage)

    def assert_settled(self) -> None:
        assert self.state() == self.desired()
        for frontend, policy in self.policies().items():
            found = self.maps.policy(frontend)
            wanted = policy if self.maps.resolve(frontend)[0] else None
            assert (found and stored(found.policy)) == wanted, f"{frontend}: another policy"
        if self.planner.shortages():
            return
        for frontend, wanted in self.outsides().items():
            for client in CLIENTS:
                found = self.maps.resolve_outside(frontend, client)
                assert found == outcome(wanted, client), f"{frontend} from outside"
            members = wanted.endpoints if wanted else ()
            weights = normal(wanted.weights) if wanted else ()
            assert self.maps.table(frontend) == _table(members, weights), (
                f"{frontend}: another table"
            )
        for each in (e for entries in self.wanted.values() for e in entries):
            by_table = each.algorithm & MASK == MAGLEV
            table = _table(each.endpoints, normal(each.weights)) if by_table else ()
            assert self.maps.inside(each.frontend) == table, (
                f"{each.frontend}: another table inside"
            )


def _table(members, weights=()) -> tuple[int, ...]:
    size = maglev.size_for(len(members), weights)
    return tuple(maglev.table(members, weights or None, size)) if size else ()


names = st.sampled_from("abcd")
_sources = st.none() | st.lists(st.sampled_from(SOURCES), max_size=3, unique=True)
_outside = st.none() | st.builds(
    lambda backends, local, sources, empty: served(
        set(backends), local=local, sources=sources, empty=empty
    ),
    st.lists(st.sampled_from(BACKENDS), max_size=6),
    st.booleans(),
    _sources,
    st.sampled_from([0, 1]),
)
#: Algorithm, weights of all backends, policy.
_choice = st.just((RANDOM, None, None)) | st.tuples(
    st.sampled_from([RANDOM, LEAST, MAGLEV, LEAST | AVOID, MAGLEV | AVOID]),
    st.none() | st.lists(st.sampled_from([0, 1, 100, 10000]), min_size=6, max_size=6),
    st.sampled_from([None, *POLICIES]),
)
_port = st.tuples(
    st.lists(st.sampled_from(BACKENDS), max_size=6),
    st.sampled_from([0, 1]),
    _outside,
    st.booleans(),
    _choice,
)
ports = st.dictionaries(st.sampled_from([80, 443, 53]), _port, max_size=3)
_update = st.tuples(st.just("update"), st.dictionaries(names, ports, min_size=1, max_size=3))
_grace = st.tuples(st.just("grace"), st.none())
_restart = st.tuples(st.just("restart"), st.none())
_crash = st.tuples(st.just("crash"), st.integers(0, 40))
#: With other names for the same ports: what changes hands between any two updates.
_renamed = st.tuples(st.just("renamed"), st.dictionaries(names, ports, min_size=1, max_size=3))


def _build(changed, suffix: str = "") -> dict[Ref, tuple[Entry, ...]]:
    built = {}
    for name, found in changed.items():
        # Each name keeps to its own VIPs here: claims have their own tests.
        vip = VIPS["abcd".index(name)]
        made = []
        for port, (backends, empty, outside, alike, (algorithm, weights, policy)) in found.items():
            members = tuple(sorted(set(backends)))
            if outside and alike and not outside.flags & LOCAL:
                outside = replace(outside, endpoints=members, places=places_of(members))
            places = places_of(members) if outside else ()
            more = {"empty": empty, "outside": outside, "places": places}
            more |= {"algorithm": algorithm, "policy": policy}
            if weights:
                more["weights"] = tuple(weights[BACKENDS.index(b)] for b in members)
            if weights and outside:
                weighed = tuple(weights[BACKENDS.index(b)] for b in outside.endpoints)
                more["outside"] = replace(outside, weights=weighed)
            one = entry(name, vip, port, members, **more)
            made.append(replace(one, owner=one.owner._replace(port=f"p{port}{suffix}")))
        built[ref(name)] = (*made, wildcard(name, vip)) if made else ()
    return built


events = st.lists(_update | _grace | _restart | _crash, max_size=25)
#: Without crashes: what is left of half a change of owner is deleted and added again.
renaming_events = st.lists(_update | _renamed | _grace | _restart, max_size=25)


def play(h: Harness, sequence: list[Any], *, everything_fits: bool) -> None:
    """Updates, grace periods, restarts and crashes between any two writes; at the end the maps
    are what is wanted."""
    crash_at: int | None = None
    for kind, value in sequence:
        if kind in ("update", "renamed"):
            changed = _build(value, "-too" if kind == "renamed" else "")
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
    h.update(dict.fromkeys(h.wanted, ()))
    h.grace()
    taken = {name: used for name, (used, _) in h.planner.usage().items() if used}
    assert not taken, f"lost for good: {taken}"
    assert not h.maps.snapshot().policies, "policies of nobody"
