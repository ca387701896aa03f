"""The thread that ends connections: what it reads of the maps, and how long it rests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pointsman import abi, rebalancer
from pointsman.drainsets import Asked, Member, Set
from pointsman.netns import Ended
from pointsman.objects import Ref
from pointsman.rebalance import MOST
from pointsman.rebalancer import Rebalancer, is_ejected
from pointsman.stale import Record
from pointsman.values import TCP, Frontend, to_address

TRIAL = abi.constants()["UNTIL_TRIAL"]
NOW = 10**12


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        pytest.param(0, False, id="never-was"),
        pytest.param(NOW + 1000, True, id="still"),
        pytest.param(NOW - 1000, False, id="its-time-is-over-and-nobody-tried"),
        pytest.param(NOW | TRIAL, False, id="a-trial-that-nobody-ended"),
        pytest.param(NOW + 1000 | TRIAL, True, id="a-trial"),
    ],
)
def test_an_endpoint_counts_as_ejected_until_its_time_is_over(until: int, expected: bool) -> None:
    assert is_ejected(abi.layouts()["load"].packer("until")(until), NOW) is expected


OLD, NEW = ((to_address(f"10.244.0.{i}"), 8080) for i in (1, 2))


class Machine:
    """Services of which all connections are at one endpoint when another one joins. Ending some
    takes `cost` seconds, in virtual time."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, rates: list[float], cost: float, *, each: int = 5000
    ) -> None:
        self.now, self.cost = 1000.0, cost
        self.ended: list[tuple[float, float, Counter[int]]] = []  # from, to, how many of each port
        self.sockets: dict[int, Record] = {}
        clock = SimpleNamespace(
            monotonic=lambda: self.now, monotonic_ns=lambda: int(self.now * 1e9)
        )
        monkeypatch.setattr(rebalancer, "time", clock)
        monkeypatch.setattr(rebalancer.netns, "destroy", self._destroy)
        self._one: Any = Rebalancer(Path(), lambda _: None)
        for port, rate in enumerate(rates, 1):
            vip = Frontend(to_address("10.96.0.1"), port, TCP)
            for cookie in range(port * 100_000, port * 100_000 + each):
                self.sockets[cookie] = Record(cookie, TCP, vip[:2], OLD, 1, 1)
            for endpoints in ((OLD,), (OLD, NEW)):
                members = {b: Member(i, 1, 100) for i, b in enumerate(endpoints, 1)}
                asked = Asked(rate, (Set(frozenset({vip}), members),))
                self._one.follow({Ref("Service", "default", f"web-{port}"): asked})
        self._one._take()

    def _destroy(self, records: Collection[Record], _: Callable[[Record], bool]) -> Ended:
        began = self.now
        self.now += self.cost
        self.ended.append((began, self.now, Counter(record.vip[1] for record in records)))
        for record in records:
            del self.sockets[record.cookie]
        return Ended(list(records), None, [])

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        sockets = SimpleNamespace(records=lambda _: list(self.sockets.values()), still=None)
        marks = SimpleNamespace(update=lambda *_: None)
        while (pause := self._one._pause()) is not None and self.now + pause < end:
            self.now += pause
            self._one._step(sockets, None, marks)

    @property
    def counts(self) -> Counter[int]:
        return sum((each for _, _, each in self.ended), Counter())


@pytest.mark.parametrize("cost", [0.0001, 0.03, 0.09, 0.5])
@pytest.mark.parametrize(
    "rates", [[5], [5] * 7, [1, 8, 30], [0.05, 11]], ids=lambda rates: ",".join(map(str, rates))
)
def test_it_rests_ten_times_as_long_as_it_takes_and_keeps_the_rate(
    monkeypatch: pytest.MonkeyPatch, rates: list[float], cost: float
) -> None:
    machine = Machine(monkeypatch, rates, cost, each=2500)
    machine.run(30)
    for (_, end, _), (next_, _, _) in zip(machine.ended, machine.ended[1:], strict=False):
        assert next_ >= end + 10 * cost - 1e-6
    longest = 11 * cost + 0.1  # between two times
    for port, rate in enumerate(rates, 1):
        assert rate * (30 - 2 * longest) - 1 <= machine.counts[port] <= rate * 30 + 1


def test_how_much_is_made_up_for_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Machine(monkeypatch, [5], 4)
    slow.run(200)
    assert max(each[1] for _, _, each in slow.ended) == 51, "ten seconds of it, and one"
    many = Machine(monkeypatch, [1000, 1000, 1000], 0.1)
    many.run(5)
    assert max(each.total() for _, _, each in many.ended) == MOST
    counts = many.counts
    assert max(counts.values()) - min(counts.values()) <= MOST, "each has its turn"
