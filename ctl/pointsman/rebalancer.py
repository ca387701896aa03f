"""Ends connections so that new endpoints get their share, as `rebalance` plans it, on its thread.

What Services ask for comes from the agent after the maps say it; how far each drain is goes back:

    agent: follow(…) → rebalancer: looks, ends, looks, … put(Drained)
"""

from __future__ import annotations

import errno
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pointsman import abi, bpf, netns
from pointsman.drainsets import Asked
from pointsman.objects import Ref
from pointsman.rebalance import Drains, Progress
from pointsman.sockets import Sockets
from pointsman.stale import Record
from pointsman.values import TCP

_LOOK = 1.0  # seconds between two looks at all sockets, at least
_TICK = 0.1  # seconds between two times that connections are ended, at least
_MOST_TICK = 10.0  # what Services miss in so many seconds is made up for
#: Of what a look or an end takes rests so many times as long come after it.
_REST_LOOK, _REST_END = 20, 10
_FOR_GOOD = (errno.EOPNOTSUPP, errno.EPERM)
_TRIAL = abi.constants()["UNTIL_TRIAL"]
_until = abi.layouts()["load"].reader("until")
_u32, _u64 = struct.Struct("=I"), struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class Drained:
    """How far each drain is, once also those that are over; `closed` connections since the last
    time. `problem`: why none can be ended here."""

    services: Mapping[Ref, Progress]
    closed: int
    problem: str = ""


class Rebalancer:
    """`follow` and `stop` may be called from any thread, `run` is the body of its own, on which
    `put` is called."""

    def __init__(
        self, maps: Path, put: Callable[[Drained], None], drains: Drains | None = None
    ) -> None:
        self._maps = maps
        self._put = put
        self._drains = drains or Drains()
        self._changed = threading.Condition()
        # All, not only the last of each: what joined is seen by what was there before.
        self._asked: list[Mapping[Ref, Asked | None]] = []
        self._stopped = False
        self._look_at = 0.0
        self._end_at = 0.0
        self._tick = 0.0
        self._problem = ""
        self._told: Drained | None = None

    def follow(self, asked: Mapping[Ref, Asked | None]) -> None:
        """What Services ask for, after the maps were written; None: nothing any more."""
        if asked:
            with self._changed:
                self._asked.append(asked)
                self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def run(self) -> None:
        """Until `stop`."""
        with (
            closing(Sockets(self._maps)) as sockets,
            closing(bpf.Map.open(self._maps / "load", read_only=True)) as load,
            closing(bpf.Map.open(self._maps / "destroyed")) as marks,
        ):
            while self._take():
                self._step(sockets, load, marks)

    def _take(self) -> bool:
        """Waits until there is something to do; False at the end."""
        with self._changed:
            while not self._stopped and not self._asked and (pause := self._pause()) != 0:
                self._changed.wait(pause)
            asked, self._asked = self._asked, []
            for ref, each in (pair for one in asked for pair in one.items()):
                self._drains.follow(ref, each, time.monotonic())
            return not self._stopped

    def _pause(self) -> float | None:
        at = self._drains.next(self._look_at, self._end_at)
        return None if at is None else max(0.0, at - time.monotonic())

    def _step(self, sockets: Sockets, load: bpf.Map, marks: bpf.Map) -> None:
        closed = 0
        if self._pause() == 0:
            if time.monotonic() >= self._look_at:
                self._look(sockets, load)
            if (now := time.monotonic()) >= self._end_at:
                closed = self._end(self._drains.take(now, self._tick), sockets, marks)
        told = Drained(self._drains.told(), closed, self._problem)
        if told != self._told:
            self._told = told
            self._put(told)

    def _look(self, sockets: Sockets, load: bpf.Map) -> None:
        began = time.monotonic()
        at = time.monotonic_ns()
        ejected = {
            ident for ident in self._drains.watched()
            if (value := load.lookup(_u32.pack(ident))) and is_ejected(value, at)
        }  # fmt: skip
        self._drains.look(sockets.records({TCP}), ejected, began)
        now = time.monotonic()
        self._look_at = now + max(_LOOK, _REST_LOOK * (now - began))

    def _end(self, chosen: Mapping[Ref, list[Record]], sockets: Sockets, marks: bpf.Map) -> int:
        """All at once: what takes long is going through the sockets of all namespaces."""
        if not chosen:
            return 0
        began = time.monotonic()
        records = [record for each in chosen.values() for record in each]
        for record in records:
            marks.update(_u64.pack(record.cookie), bytes(4))
        ended = netns.destroy(records, sockets.still)
        now = time.monotonic()
        # If it takes long it is done less often, for more connections at a time.
        self._end_at = max(began + _TICK, now + _REST_END * (now - began))
        self._tick = min(_MOST_TICK, self._end_at - began)
        gone = set(ended.records)
        for ref, each in chosen.items():
            self._drains.ended(ref, sum(record in gone for record in each), now)
        self._problem = _refused(ended.refused) if ended.refused else ""
        if ended.refused and not gone and ended.refused.errno in _FOR_GOOD:
            self._drains.give_up()
        return len(gone)


def is_ejected(load: bytes, now: int) -> bool:
    """By struct load of abi.h; `now` is CLOCK_MONOTONIC in ns.

    One whose time is over is not, though nobody has tried it yet: where clients stay for long
    nobody would, until connections are ended.
    """
    return int(_until(load, 0)[0]) & ~_TRIAL > now


def _refused(error: OSError) -> str:
    if error.errno == errno.EOPNOTSUPP:
        return "connections are not drained: this kernel has no CONFIG_INET_DIAG_DESTROY"
    return f"connections are not drained: {error}"
