"""The rules of choice: Python and C agree, and hold what they promise.

The C is compiled as a library of this machine, with arrays for maps; in the kernel the same text is
compiled by bcc.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from array import array
from collections import Counter
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman import abi
from tests.bench import choices
from tests.bench.choices import SECOND, Load, Node, Policy

_constants = abi.constants()
ALGORITHMS = (
    choices.RANDOM,
    choices.ROUND_ROBIN,
    choices.LEAST_CONNECTIONS,
    choices.PEAK_EWMA,
    choices.MAGLEV,
)
P2C = (choices.LEAST_CONNECTIONS, choices.PEAK_EWMA)
ENDPOINTS = 7
TABLE = array("H", [place % ENDPOINTS for place in range(251)])


class C:
    """tests/support/choose.c for one set."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._c = library
        self._c.choose_at.argtypes = [ctypes.c_uint64] * 3
        self._c.ended.argtypes = [ctypes.c_uint64, ctypes.c_uint32, ctypes.c_bool, ctypes.c_uint32]
        self._c.ejected.restype = ctypes.c_uint64

    def start(self, endpoints: int, algorithm: int, policy: Policy | None) -> None:
        layout = abi.layouts()["policy"]
        raw = bytes(layout.size)
        if policy:
            algorithm |= _constants["CHOICE_POLICY"] | _constants["CHOICE_AVOID"]
            names = [f.name for f in layout.fields if f.name in Policy.__slots__]
            values = [getattr(policy, name) for name in names]
            raw = layout.packer("flags", *names)(_constants["POLICY_WATCH"], *values)
        self._c.start(endpoints, algorithm, raw)

    def use_table(self, table: array[int]) -> None:
        self._c.use_table((ctypes.c_uint16 * len(table))(*table), len(table))

    def choose(self, now: int, random: int, client: int) -> int | None:
        place: int = self._c.choose_at(now, random, client)
        return None if place < 0 else place

    def opened(self, place: int, connections: int) -> None:
        self._c.opened(place, ctypes.c_uint32(connections))

    def ended(self, now: int, place: int, well: bool, latency: int) -> None:
        self._c.ended(now, place, well, latency)

    def ejected(self) -> int:
        return int(self._c.ejected())

    def known(self, place: int) -> Load:
        fields = (ctypes.c_uint64 * len(Load.__slots__))()
        self._c.known(place, fields)
        return Load(*fields)


@pytest.fixture(scope="module")
def c(tmp_path_factory: pytest.TempPathFactory) -> C:
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    library = tmp_path_factory.mktemp("choose") / "choose.so"
    source = Path(__file__).parents[1] / "support/choose.c"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-Werror", "-Wall", "-Wno-unknown-pragmas"]
    command += [f"-I{abi.source_directory()}", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return C(ctypes.CDLL(str(library)))


def draws(node: Node, random: int) -> Iterator[float]:
    """The numbers that the C makes of 64 random bits, in the order in which it uses them up."""
    # choose_at_once(): fewer_open() takes the low half for its second.
    if not node.policy and node.algorithm in (choices.RANDOM, choices.LEAST_CONNECTIONS):
        yield (random >> 32) / 2**32
        yield (random & 0xFFFFFFFF) / 2**32
    random = choices.mix(random)
    while True:
        yield (random >> 32) / 2**32
        random = choices.mix(random + 0x9E3779B97F4A7C15 & choices.NEVER)


POLICIES = (
    None,
    Policy(most=2),
    Policy(most=1, streak=0, percent=30, volume=10, shortest=2 * SECOND),
    Policy(most=1, max_connections=3, streak=3, trial=1 * SECOND),
)


@pytest.mark.parametrize("policy", POLICIES, ids=("none", "usual", "by-percentage", "capped"))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_python_and_c_agree(c: C, algorithm: int, policy: Policy | None) -> None:
    """Connection by connection, in what is chosen and in all that is known after it."""
    by = Random(algorithm)
    c.start(ENDPOINTS, algorithm, policy)
    c.use_table(TABLE)
    node = Node(algorithm, range(ENDPOINTS), lambda: next(numbers), copy(policy), TABLE, 1)
    begun, now = list[int](), 1000 * SECOND
    for _ in range(8000):
        now += int(by.expovariate(1 / SECOND) * by.choice((0, 0.1, 0.1, 5)))
        random, client = by.getrandbits(64), by.getrandbits(40)
        numbers = draws(node, random)
        place = choices.choose_slot(node, client, now)
        assert place == c.choose(now, random, client)
        if place is not None:
            node.load_of(place).open += 1
            c.opened(place, 1)
            begun.append(place)
        if begun and (place is None or len(begun) > by.randrange(12)):
            place = begun.pop(by.randrange(len(begun)))
            load = node.load[place]
            # Those with a higher number fail more often, and take longer; at times all are well.
            well = by.random() > place / ENDPOINTS or now // (200 * SECOND) % 2 > 0
            latency = by.randrange(1 << place * 4)
            if well:
                choices.succeeded(load, node.policy, latency, now)
            else:
                choices.failed(load, node.policy, now)
            load.open -= 1
            c.ended(now, place, well, latency)
            c.opened(place, -1)
            assert c.known(place) == load
    assert [c.known(place) for place in range(ENDPOINTS)] == node.load
    assert c.ejected() == (node.policy.ejected if node.policy else 0)


def test_the_numbers_are_those_of_the_c() -> None:
    text = "".join(
        (abi.source_directory() / name).read_text() for name in ("choose.h", "outcome.h")
    ).replace("NSEC_PER_SEC", "1000000000")
    defined = dict(re.findall(r"#define (\w+) (.*?)(?: /\*.*)?\n", text))
    for name in ("DRAWS", "ASKED", "FADE", "SLOW_US", "MAX_LATENCY_US"):
        assert getattr(choices, name) == eval(defined[name]), name


def node_with(
    algorithm: int, loads: list[Load], policy: Policy | None = None, seed: int = 1
) -> Node:
    node = Node(algorithm, range(len(loads)), Random(seed).random, policy)
    node.load = loads
    return node


loads = st.builds(
    Load,
    open=st.integers(0, 5),
    latency=st.integers(0, 5000),
    measured=st.integers(0, 100 * SECOND),
    streak=st.integers(0, 3),
)


@given(st.sampled_from(P2C), st.lists(loads, min_size=2, max_size=9), st.integers(0, 99))
def test_of_two_the_worse_is_never_taken(algorithm: int, known: list[Load], seed: int) -> None:
    now = 100 * SECOND
    drawn = list[int]()
    node = node_with(algorithm, known, seed=seed)
    random = node.random
    node.random = lambda: drawn.append(0) or random()
    costs = [choices.cost_of(node, place, now) for place in range(len(known))]
    place = choices.choose_slot(node, 0, now)
    assert place is not None
    # Without a policy nothing else is asked, so two cost as much or more: it, and the other one.
    assert len(drawn) in (2, 4)
    assert costs[place] < max(costs) or costs.count(costs[place]) > 1


@given(st.sampled_from(ALGORITHMS), st.lists(loads, min_size=1, max_size=16), st.integers(0, 99))
def test_who_is_full_gets_nothing_while_another_is_not(
    algorithm: int, known: list[Load], seed: int
) -> None:
    policy = Policy(most=1, max_connections=3)
    place = choices.choose_slot(node_with(algorithm, known, policy, seed), seed, 100 * SECOND)
    if all(load.open >= 3 for load in known):
        assert place is None
    else:
        assert place is not None
        assert known[place].open < 3


def test_no_more_are_ejected_than_may_be() -> None:
    policy = Policy(most=3)
    node = node_with(choices.RANDOM, [Load() for _ in range(10)], policy)
    for i in range(2000):
        place = choices.choose_slot(node, 0, now := i * SECOND // 10)
        assert place is not None  # all refuse, and who is left is still asked
        choices.failed(node.load[place], policy, now)
        assert policy.ejected == sum(load.until != 0 for load in node.load) <= 3
    assert policy.ejected == 3


def test_who_is_ejected_is_tried_once_and_each_time_later() -> None:
    policy = Policy(most=1)
    node = node_with(choices.RANDOM, [Load(), Load()], policy)
    for _ in range(policy.streak):
        choices.failed(node.load[0], policy, 0)
    tried = list[int]()
    for now in range(0, 1000 * SECOND, SECOND // 4):
        if choices.choose_slot(node, 0, now) == 0:
            tried.append(now // SECOND)
            choices.failed(node.load[0], policy, now)
    waits = [b - a for a, b in zip([0, *tried], tried, strict=False)]
    expected = (10, 20, 40, 80, 160, 300, 300)
    # By chance it takes a moment until it is drawn.
    assert all(a <= b <= a + 10 for a, b in zip(expected, waits, strict=False)), waits
    assert len(waits) >= 6


def test_who_is_well_again_comes_back() -> None:
    policy = Policy(most=1)
    load = Load()
    for _ in range(policy.streak):
        choices.failed(load, policy, 0)
    choices.succeeded(load, policy, 100, SECOND)
    assert load.until, "what began before the ejection says nothing"
    assert choices.takes_trial(load, policy, 10 * SECOND)
    assert not choices.takes_trial(load, policy, 11 * SECOND), "others wait"
    choices.succeeded(load, policy, 100, 11 * SECOND)
    assert (load.until, policy.ejected, load.failures) == (0, 0, 0)


@given(st.integers(1, 1 << 22), st.integers(1, 1 << 22), st.integers(0, 20 * SECOND))
def test_a_peak_counts_at_once_and_what_is_better_by_time(
    known: int, latency: int, passed: int
) -> None:
    load = Load(latency=known, measured=SECOND)
    choices.observe(load, latency, SECOND + passed)
    if latency >= known:
        assert load.latency == latency
    else:
        assert latency <= load.latency <= known - (known - latency) // 8 + 1
        if passed >= choices.FADE + 1024:
            assert load.latency == latency


def test_rounds_are_even_and_a_client_keeps_its_endpoint() -> None:
    rounds = node_with(choices.ROUND_ROBIN, [Load() for _ in range(7)])
    got = Counter(choices.choose_slot(rounds, 0, 0) for _ in range(700))
    assert set(got.values()) == {100}
    by_client = Node(choices.MAGLEV, range(7), Random(1).random, None, TABLE)
    for client in range(50):
        assert len({choices.choose_slot(by_client, client, now) for now in range(9)}) == 1
