"""Which endpoint a connect gets: algorithms, weights, limits, zones, and endpoints that fail."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from pointsman import abi
from pointsman.values import TCP, Policy, PortName
from tests.support.kernel import Lab, entry, needs_linux, until, wildcard

pytestmark = pytest.mark.kernel

VIP = ("10.96.0.1", 80)
PORT = 7000
OWNER = PortName("default", "web", "p")
_ABI = abi.constants()
RANDOM, IN_TURN = _ABI["ALGORITHM_RANDOM"], _ABI["ALGORITHM_ROUND_ROBIN"]
LEAST, EWMA = _ABI["ALGORITHM_LEAST_CONNECTIONS"], _ABI["ALGORITHM_PEAK_EWMA"]
MAGLEV = _ABI["ALGORITHM_MAGLEV"]
WEIGHTED, POLICY = _ABI["CHOICE_WEIGHTED"], _ABI["CHOICE_POLICY"]
AVOID, ZONE = _ABI["CHOICE_AVOID"], _ABI["CHOICE_ZONE"]
ELSEWHERE = _ABI["WEIGHT_ELSEWHERE"]
AWAY = (100 | ELSEWHERE, 100 | ELSEWHERE)
_LOAD = ("generation", "open", "owner", "latency", "measured", "until", "window", "streak")
_read_load = abi.layouts()["load"].reader(*_LOAD)
_read_ejected = abi.layouts()["policy"].reader("ejected")
SECOND = 1_000_000_000
COARSE = 6  # CLOCK_MONOTONIC_COARSE, by which programs eject
#: Three failures in a row end it for half a second, then for one, …
WATCH = Policy(
    watch=True, streak=3, shortest=SECOND // 2, longest=8 * SECOND, trial=SECOND, most_percent=50
)


class Farm:
    """Servers at 127.0.0.1, .2, …, and clients that hold what they open."""

    def __init__(self, lab: Lab, count: int) -> None:
        self.lab = lab
        self._servers = {n: _listen(n) for n in range(1, count + 1)}
        self._held: list[socket.socket] = []

    def close(self) -> None:
        self.let_go()
        for server in self._servers.values():
            server.close()

    def let_go(self) -> None:
        for client in self._held:
            client.close()
        self._held.clear()

    def stop(self, number: int) -> None:
        """Whoever connects there is refused from now on."""
        self._servers.pop(number).close()

    def start(self, number: int) -> None:
        self._servers[number] = _listen(number)

    def serve(self, algorithm: int, *numbers: int, **more: Any) -> None:
        found = entry(*VIP, TCP, [(f"127.0.0.{n}", PORT) for n in numbers], OWNER)
        entries = [found, wildcard(VIP[0], OWNER)]
        policy = more.pop("policy", None)
        self.lab.set(
            "web", _with(entries[0], algorithm=algorithm, policy=policy, **more),
            _with(entries[1], policy=policy),
        )  # fmt: skip

    def connect(self, times: int, *, hold: bool = False) -> Counter[int | str]:
        """How often each endpoint was reached, or which error came instead."""
        found: Counter[int | str] = Counter()
        for _ in range(times):
            client = socket.socket()
            try:
                client.connect(VIP)
            except OSError as error:
                found[type(error).__name__] += 1
                client.close()
                continue
            cookie = struct.unpack("=Q", client.getsockopt(socket.SOL_SOCKET, 57, 8))[0]
            number = int(self.lab.peer_of(cookie).split(":")[0].rsplit(".", 1)[1])
            found[number] += 1
            if hold:
                self._held.append(client)
            else:
                client.close()
                self._servers[number].accept()[0].close()  # a backlog has an end
        return found

    def load(self, number: int) -> dict[str, int]:
        ident = self.lab.endpoint_id(f"127.0.0.{number}", PORT)
        raw = self.lab.maps.map("load").lookup(struct.pack("=I", ident))
        return dict(zip(_LOAD, _read_load(raw, 0), strict=True))

    def ejected(self) -> int:
        """How many endpoints of the Service are ejected, as the programs count them."""
        names = self.lab.maps.snapshot().names
        [owner] = [owner for owner, name in names.items() if name == OWNER]
        raw = self.lab.maps.map("policies").lookup(struct.pack("=I", owner))
        return int(_read_ejected(raw, 0)[0])


def _with(found: Any, **more: Any) -> Any:
    return replace(found, **more)


def _listen(number: int) -> socket.socket:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((f"127.0.0.{number}", PORT))
    server.listen(1024)
    return server


@pytest.fixture
def farm(lab: Lab) -> Iterator[Callable[[int], Farm]]:
    with contextlib.ExitStack() as stack:

        def make(count: int) -> Farm:
            made = Farm(lab, count)
            stack.callback(made.close)
            return made

        yield make


# -- algorithms ----------------------------------------------------------------------------------


def test_round_robin_gives_each_its_turn(farm: Callable[[int], Farm]) -> None:
    found = farm(5)
    found.serve(IN_TURN, 1, 2, 3, 4, 5)
    assert found.connect(50) == dict.fromkeys(range(1, 6), 10)


def test_least_connections_keeps_open_connections_level(farm: Callable[[int], Farm]) -> None:
    """600 that stay open: by chance alone the squares come to some 540, once in 20 times to less
    than 200; of two the one with fewer, not once in two million times to more than 150."""
    found = farm(10)
    found.serve(LEAST, *range(1, 11))
    counts = found.connect(600, hold=True)
    assert sum((counts[n] - 60) ** 2 for n in range(1, 11)) <= 200, counts


def test_least_connections_turns_away_from_who_is_busy(farm: Callable[[int], Farm]) -> None:
    found = farm(3)
    found.serve(LEAST, 1)
    found.connect(50, hold=True)
    found.serve(LEAST, 1, 2, 3)
    # Not more, or one of the others has as many for once.
    assert 1 not in found.connect(60, hold=True)


@pytest.mark.parametrize("algorithm", [LEAST, EWMA])
def test_an_endpoint_that_refuses_does_not_look_idle(
    farm: Callable[[int], Farm], algorithm: int
) -> None:
    """It has no connections: whoever looks at their number alone would prefer it."""
    found = farm(5)
    found.serve(algorithm, *range(1, 6))
    found.stop(1)
    assert found.connect(400)["ConnectionRefusedError"] <= 8


def test_peak_ewma_knows_the_connect_time_of_each(farm: Callable[[int], Farm]) -> None:
    found = farm(4)
    found.serve(EWMA, 1, 2, 3, 4)
    began = time.monotonic()
    assert set(found.connect(80, hold=True)) == {1, 2, 3, 4}
    passed = (time.monotonic() - began) * 1e6
    assert all(0 < found.load(n)["latency"] < passed for n in range(1, 5))


def test_maglev_gives_a_client_one_endpoint_that_stays_when_others_leave(
    farm: Callable[[int], Farm],
) -> None:
    found = farm(8)
    found.serve(MAGLEV, *range(1, 9))
    [one] = found.connect(30)
    for gone in [n for n in range(1, 9) if n != one][:3]:
        found.serve(MAGLEV, *(n for n in range(1, 9) if n != gone))
        # Of eight one leaves: most clients stay where they are, and this one most often.
        [other] = found.connect(10)
        assert other in range(1, 9) and other != gone
    found.serve(MAGLEV, *range(1, 9))
    assert set(found.connect(30)) == {one}


@pytest.mark.parametrize("first", [RANDOM, IN_TURN, LEAST, EWMA, MAGLEV])
def test_an_algorithm_changes_while_connections_stay(
    farm: Callable[[int], Farm], first: int
) -> None:
    found = farm(3)
    found.serve(first, 1, 2, 3)
    before = found.connect(12, hold=True)
    for algorithm in (LEAST, IN_TURN, EWMA, RANDOM, MAGLEV, first):
        found.serve(algorithm, 1, 2, 3)
        assert sum(found.load(n)["open"] for n in (1, 2, 3)) == 12
        assert set(found.connect(6)) <= {1, 2, 3}
    assert {n: found.load(n)["open"] for n in before} == before
    found.let_go()
    until(lambda: not any(found.load(n)["open"] for n in (1, 2, 3)), "all closed")


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "times", "least", "most"),
    [
        # 25 are expected; less than 3 or more than 65 come once in 200 million times.
        pytest.param(RANDOM, 2500, 3, 65, id="random"),
        pytest.param(IN_TURN, 1000, 7, 13, id="round-robin"),
        pytest.param(LEAST, 2500, 3, 65, id="least-connections"),
        # Whichever of two connects faster: nearly twice as many, or hardly any once it was slow.
        pytest.param(EWMA, 1000, 1, 55, id="peak-ewma"),
    ],
)
def test_a_canary_of_one_percent(
    farm: Callable[[int], Farm], algorithm: int, times: int, least: int, most: int
) -> None:
    found = farm(2)
    found.serve(algorithm | WEIGHTED, 1, 2, weights=(1, 99))
    counts = found.connect(times)
    assert least <= counts[1] <= most, counts


def test_weight_nought_gets_nothing_and_all_nought_is_as_none(farm: Callable[[int], Farm]) -> None:
    found = farm(3)
    found.serve(RANDOM | WEIGHTED, 1, 2, 3, weights=(0, 100, 100))
    assert set(found.connect(200)) == {2, 3}
    found.serve(RANDOM | WEIGHTED, 1, 2, 3, weights=(0, 0, 0))
    assert set(found.connect(200)) == {1, 2, 3}


def test_open_connections_follow_the_weights(farm: Callable[[int], Farm]) -> None:
    found = farm(3)
    found.serve(LEAST | WEIGHTED, 1, 2, 3, weights=(100, 100, 400))
    counts = found.connect(300, hold=True)
    assert 170 <= counts[3] <= 230, counts


# -- limits and zones ----------------------------------------------------------------------------


def test_an_endpoint_that_is_full_gets_no_more_and_all_full_refuses(
    farm: Callable[[int], Farm],
) -> None:
    found = farm(5)
    found.serve(LEAST | POLICY, *range(1, 6), policy=Policy(max_connections=3))
    before = found.lab.maps.counters()["all_full"]
    counts = found.connect(20, hold=True)
    assert counts == {**dict.fromkeys(range(1, 6), 3), "ConnectionRefusedError": 5}
    assert found.lab.maps.counters()["all_full"] - before == 5
    found.let_go()
    until(lambda: not found.load(1)["open"], "all closed")
    assert "ConnectionRefusedError" not in found.connect(10, hold=True)


@pytest.mark.parametrize("algorithm", [RANDOM, IN_TURN, EWMA, MAGLEV])
def test_the_limit_holds_for_every_algorithm(farm: Callable[[int], Farm], algorithm: int) -> None:
    found = farm(4)
    found.serve(algorithm | POLICY, 1, 2, 3, 4, policy=Policy(max_connections=2))
    counts = found.connect(10, hold=True)
    assert counts == {1: 2, 2: 2, 3: 2, 4: 2, "ConnectionRefusedError": 2}


def test_what_its_zone_can_not_take_goes_elsewhere_little_by_little(
    farm: Callable[[int], Farm],
) -> None:
    found = farm(4)
    near = LEAST | WEIGHTED | POLICY | ZONE
    found.serve(near, 1, 2, 3, 4, weights=(100, 100, *AWAY), policy=Policy(room=10))
    assert set(found.connect(10, hold=True)) == {1, 2}
    # From here on some go elsewhere, the more the fuller the zone is, and never all at once. In a
    # million simulated turns it were 38 and 103 at least.
    after = found.connect(200, hold=True)
    assert after[3] + after[4] > 20 and after[1] + after[2] > 50, after


def test_what_spills_over_gets_no_endpoint_without_weight(farm: Callable[[int], Farm]) -> None:
    found = farm(4)
    near = LEAST | WEIGHTED | POLICY | ZONE
    weights = (100, 100, 100 | ELSEWHERE, 0)
    found.serve(near, 1, 2, 3, 4, weights=weights, policy=Policy(room=1))
    after = found.connect(150, hold=True)  # 22 at least in a million simulated turns
    assert after[3] > 5 and not after[4], after


def test_what_finds_nobody_elsewhere_stays_in_its_zone(farm: Callable[[int], Farm]) -> None:
    """Twenty are asked at most, here nearly always such of weight 0."""
    found = farm(26)
    near = LEAST | WEIGHTED | POLICY | ZONE
    weights = (100, 100, *(23 * (0,)), AWAY[0])
    found.serve(near, *range(1, 27), weights=weights, policy=Policy(room=1))
    after = found.connect(60, hold=True)
    assert sum(after[n] for n in (1, 2, 26)) == 60, after


def test_a_zone_whose_only_endpoint_fails_is_left(farm: Callable[[int], Farm]) -> None:
    found = farm(3)
    near = watched(RANDOM) | WEIGHTED | ZONE
    for_long = replace(WATCH, room=100, shortest=60 * SECOND, longest=60 * SECOND)
    found.serve(near, 1, 2, 3, weights=(100, *AWAY), policy=for_long)
    assert found.connect(10) == {1: 10}
    found.stop(1)
    failed = found.connect(60)["ConnectionRefusedError"]
    assert failed == WATCH.streak
    assert found.ejected() == 1


# -- endpoints that fail -------------------------------------------------------------------------


def watched(algorithm: int) -> int:
    needs_linux(5, 12, "compare-and-swap in programs, for ejection")
    return algorithm | POLICY | AVOID


@pytest.mark.parametrize("algorithm", [RANDOM, IN_TURN])
def test_who_refuses_is_ejected_tried_again_and_comes_back(
    farm: Callable[[int], Farm], algorithm: int
) -> None:
    found = farm(4)
    found.serve(watched(algorithm), 1, 2, 3, 4, policy=WATCH)
    found.connect(20)
    found.stop(1)
    before = time.clock_gettime_ns(COARSE)
    until(lambda: found.connect(5) and found.ejected() == 1, "an ejection")
    until_ = found.load(1)["until"]
    # It may be over by now.
    assert until_ | _ABI["UNTIL_TRIAL"] >= before + WATCH.shortest
    # While it lasts nobody gets there; then one tries it, and it is longer away.
    until(lambda: found.connect(2) and found.load(1)["until"] != until_, "a trial")
    assert found.ejected() == 1
    found.start(1)
    until(lambda: found.connect(2) and not found.load(1)["until"], "a trial that succeeds")
    assert found.ejected() == 0
    until(lambda: found.connect(5)[1], "connections as before")


def test_without_an_answer_a_second_is_a_failure(farm: Callable[[int], Farm]) -> None:
    """What a program gives up on before the kernel does is known all the same."""
    found = farm(2)
    dropped = ("127.0.0.9", PORT)
    full = socket.socket()  # a backlog of one that nobody takes from answers no more SYNs
    full.bind(dropped)
    full.listen(0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(full)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(dropped)
        # Long enough that none of the connects below is the trial.
        long = replace(WATCH, shortest=600 * SECOND, longest=600 * SECOND)
        found.serve(watched(RANDOM), 1, 2, 9, policy=long)
        clients = []
        for _ in range(100):  # of 30 less than three would get there once in 1,500 times
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(VIP)
            clients.append(client)
        until(lambda: found.ejected() == 1, "an ejection")
        assert found.load(9)["until"]
        assert 9 not in found.connect(40)


def test_no_more_are_ejected_than_the_share(farm: Callable[[int], Farm]) -> None:
    found = farm(4)
    found.serve(watched(RANDOM), 1, 2, 3, 4, policy=WATCH)
    for number in (1, 2, 3, 4):
        found.stop(number)
    counts = found.connect(200)
    assert counts == {"ConnectionRefusedError": 200}
    assert found.ejected() == 2
    assert sum(1 for n in range(1, 5) if found.load(n)["until"]) == 2


def test_an_endpoint_of_its_own_is_never_ejected(farm: Callable[[int], Farm]) -> None:
    found = farm(1)
    found.serve(watched(RANDOM), 1, policy=WATCH)
    found.stop(1)
    found.connect(20)
    found.start(1)
    assert found.connect(5) == {1: 5}


def test_who_only_observes_ejects_nobody(farm: Callable[[int], Farm]) -> None:
    found = farm(4)
    needs_linux(5, 12, "compare-and-swap in programs, for ejection")
    found.serve(RANDOM | POLICY, 1, 2, 3, 4, policy=WATCH)
    found.stop(1)
    until(lambda: found.connect(10) and found.ejected() == 1, "what would be an ejection")
    assert found.connect(200)["ConnectionRefusedError"] > 5


def test_failures_of_one_service_are_no_others(farm: Callable[[int], Farm]) -> None:
    found = farm(3)
    found.serve(watched(RANDOM), 1, 2, 3, policy=WATCH)
    other = PortName("default", "other", "p")
    backends = [(f"127.0.0.{n}", PORT) for n in (1, 2, 3)]
    found.lab.set(
        "other",
        entry("10.96.0.2", 80, TCP, backends, other, algorithm=watched(RANDOM), policy=WATCH),
        wildcard("10.96.0.2", other),
    )
    found.stop(1)
    until(lambda: found.connect(5) and found.ejected() == 1, "an ejection")
    refused = 0
    for _ in range(60):
        with socket.socket() as client:
            refused += client.connect_ex(("10.96.0.2", 80)) != 0
    assert refused > 0


def test_what_is_ejected_when_it_leaves_is_counted_no_longer(farm: Callable[[int], Farm]) -> None:
    found = farm(4)
    found.serve(watched(RANDOM), 1, 2, 3, 4, policy=WATCH)
    found.stop(4)
    until(lambda: found.connect(5) and found.ejected() == 1, "an ejection")
    found.serve(watched(RANDOM), 1, 2, 3, policy=WATCH)
    assert found.ejected() == 0


def test_a_reset_before_any_answer_is_a_failure(farm: Callable[[int], Farm]) -> None:
    found = farm(2)
    found.serve(RANDOM, 1)
    with socket.create_connection(VIP) as client:
        before = found.load(1)["window"]
        accepted, _ = found._servers[1].accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        accepted.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    bits = _ABI["WINDOW_BITS"]
    mask = (1 << bits) - 1
    assert (found.load(1)["window"] >> bits & mask) == (before >> bits & mask) + 1


def test_a_program_that_gives_up_is_no_failure(farm: Callable[[int], Farm]) -> None:
    """It closed the socket itself: that says nothing about the endpoint."""
    found = farm(1)
    found.serve(RANDOM, 1)
    for _ in range(5):
        with socket.socket() as client:
            client.setblocking(False)
            client.connect_ex(VIP)
    found.connect(1)
    assert found.load(1)["streak"] == 0
