"""Which connections are ended so that endpoints that joined get their share: `pointsman.io/drain`.
No I/O: whoever asks says what time it is, in seconds.

A drain begins when endpoints join a set, or weigh more beside the others than before. Connections
are ended where an endpoint has more than its share, as long as those that joined lack some of
theirs; and only those that were there when it began: each goes once at most, so that it is over
some time, whatever clients do.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf

from pointsman.drainsets import Asked, Member, Set, risen, targets
from pointsman.objects import Ref
from pointsman.stale import Record
from pointsman.values import Backend, Frontend

_TOLERANCE = 20  # whoever joined may lack one of so many: the last ones take longest by chance
#: Seconds without anything to end until a drain is over: clients need some to come back.
SETTLE = 10.0
#: Connections of all Services that are ended at a time: the programs have to remember them.
MOST = 1024
_LOOK = 1.0  # seconds between two looks while there is nothing to end
#: Who left and is back within so many seconds has not joined: if it comes and goes, connections
#: would be ended for it each time.
AWAY = 600.0
_MOST_AWAY = 4096  # of a Service, the latest


@dataclass(frozen=True, slots=True)
class Progress:
    """Of the drain of one Service: connections ended, and how many are still to be. `over` says how
    it ended, "" while it goes on; `waits` what it waits for."""

    closed: int
    left: int
    rate: float
    waits: str = ""
    over: str = ""


@dataclass(slots=True)
class _Drain:
    """Of one set. `old` are the cookies of the connections that may be ended, None before the first
    look; `held` the records of those by endpoint, the oldest last. `looked`: whether all that is
    what the set has, as it is now. `above` is a heap of who may lose how many (negative), `surplus`
    their sum; those that joined lack `lacking`.
    """

    of: Set
    joined: frozenset[Backend]
    chance: float
    total: int = 0
    old: set[int] | None = None
    counts: dict[Backend, int] = field(default_factory=dict)
    held: dict[Backend, list[Record]] = field(default_factory=dict)
    above: list[tuple[int, Backend]] = field(default_factory=list)
    surplus: int = 0
    lacking: int = 0
    ejected: bool = False  # one of those that joined is
    looked: bool = False

    def begin(self) -> None:
        self.counts = dict.fromkeys(self.of.members, 0)
        self.held = {backend: [] for backend in self.of.members}

    def see(self, record: Record) -> None:
        member = self.of.members.get(record.peer)
        # By its id: an endpoint of another Service may have the same address.
        if member and member[:2] == (record.endpoint, record.generation):
            self.counts[record.peer] += 1
            if self.old is None or record.cookie in self.old:
                self.held[record.peer].append(record)

    def settle(self, ejected: Collection[int]) -> None:
        if self.old is None:
            self.old = {record.cookie for held in self.held.values() for record in held}
        for held in self.held.values():
            held.sort(key=lambda record: -record.cookie)
        out = {b for b, m in self.of.members.items() if self.of.avoids and m.endpoint in ejected}
        self.looked = True
        self.ejected = not self.joined.isdisjoint(out)
        takers = sorted(self.of.members.keys() - out)
        # Clients that have not come back yet must not make the shares of all smaller.
        self.total = max(self.total, sum(self.counts.values()))
        total = self.total - sum(self.counts[backend] for backend in out)
        weights = [self.of.members[backend].weight for backend in takers]
        found = targets(total, weights, self.of.most, self.chance)
        shares = dict(zip(takers, found, strict=True))
        over = {b: min(len(self.held[b]), self.counts[b] - share) for b, share in shares.items()}
        # Once for each look: there may be thousands of endpoints, and of connections to end.
        self.above = [(-many, backend) for backend, many in over.items() if many > 0]
        heapq.heapify(self.above)
        self.surplus = -sum(many for many, _ in self.above)
        self.lacking = sum(
            max(0, shares[b] - shares[b] // _TOLERANCE - self.counts[b])
            for b in self.joined & shares.keys()
        )

    @property
    def left(self) -> int:
        """What some have above their shares, and those that joined lack."""
        return min(self.lacking, self.surplus)

    def take(self) -> Record | None:
        """The oldest connection of the endpoint that is farthest above its share."""
        if not self.left:
            return None
        many, backend = self.above[0]
        if many < -1:
            heapq.heapreplace(self.above, (many + 1, backend))
        else:
            heapq.heappop(self.above)
        self.surplus -= 1
        record = self.held[backend].pop()
        if self.old:
            self.old.discard(record.cookie)
        return record


@dataclass(slots=True)
class _Service:
    asked: Asked
    drains: list[_Drain] = field(default_factory=list)
    next: float = 0.0  # when a connection may be ended, or it is worth a look
    quiet: float = -inf  # when the last one was ended
    began: bool = False  # there was something to end
    closed: int = 0
    away: dict[Backend, float] = field(default_factory=dict)  # when it left last, the latest last

    def leave(self, gone: Iterable[Backend], now: float) -> None:
        for backend in gone:
            self.away.pop(backend, None)
            self.away[backend] = now
        kept = [pair for pair in self.away.items() if now - pair[1] < AWAY]
        self.away = dict(kept[-_MOST_AWAY:])

    @property
    def left(self) -> int:
        return sum(drain.left for drain in self.drains)

    @property
    def waits(self) -> str:
        if self.asked.waits:
            return "slow start"
        return "an ejected endpoint" if any(drain.ejected for drain in self.drains) else ""

    def due(self, now: float) -> bool:
        ready = self.drains and not self.asked.waits and all(d.looked for d in self.drains)
        return bool(ready) and now >= self.next

    def end(self) -> None:
        self.drains, self.began, self.closed = [], False, 0


class Drains:
    """Of all Services that ask for it. `chance` gives a number from 0 to below 1."""

    def __init__(
        self, chance: Callable[[], float] = random.random, *, settle: float = SETTLE
    ) -> None:
        self._chance = chance
        self._settle = settle
        self._services: dict[Ref, _Service] = {}
        self._over: dict[Ref, Progress] = {}

    def follow(self, ref: Ref, asked: Asked | None, now: float) -> None:
        """What a Service asks for from now on, and has in the maps; None: nothing any more.

        All that it has when it first asks is old.
        """
        service = self._services.get(ref)
        if asked is None:
            if service:
                self._end(ref, service, "stopped")
                del self._services[ref]
        elif service is None:
            self._services[ref] = _Service(asked)
        else:
            service.leave(service.asked.endpoints - asked.endpoints, now)
            drains = list(self._drains(service, asked))
            if asked.rate != service.asked.rate:
                service.next = max(now, service.quiet + 1 / asked.rate)
            service.asked = asked
            if service.drains and not drains:
                self._end(ref, service, "stopped")
            service.drains = drains

    def _drains(self, service: _Service, asked: Asked) -> Iterator[_Drain]:
        before = {frontend: each for each in service.asked.sets for frontend in each.frontends}
        for now in asked.sets:
            was = next((before[f] for f in sorted(now.frontends) if f in before), None)
            # If a set becomes two, the first one has its drain.
            running = next((d for d in service.drains if d.of.frontends & now.frontends), None)
            new = _new(was.members, now.members, service.away) if was else set()
            joined = new.union(running.joined if running else ()) & now.members.keys()
            if not joined:
                continue
            if running:
                # The same one: what moved since it began stays where it is, whoever joins.
                running.of, running.joined, running.looked = now, frozenset(joined), False
                yield running
            else:
                yield _Drain(now, frozenset(joined), self._chance())

    def _end(self, ref: Ref, service: _Service, how: str) -> None:
        if service.began:
            left = service.left if how != "done" else 0
            self._over[ref] = Progress(service.closed, left, service.asked.rate, over=how)
        service.end()

    def give_up(self) -> None:
        """Nothing can be ended here."""
        for ref, service in self._services.items():
            self._end(ref, service, "failed")

    def _active(self) -> Iterator[_Service]:
        return (each for each in self._services.values() if each.drains and not each.asked.waits)

    def next(self, look: float, end: float) -> float | None:
        """When there is something to do next, None if there is nothing; `look` and `end`: when the
        sockets may be looked at, and some be ended, next."""
        return min(
            (
                max(each.next, end if all(d.looked for d in each.drains) else look)
                for each in self._active()
            ),
            default=None,
        )

    def watched(self) -> set[int]:
        """The endpoint ids of which a look has to know whether they are ejected."""
        return {
            member.endpoint
            for each in self._active()
            for drain in each.drains
            if drain.of.avoids
            for member in drain.of.members.values()
        }

    def look(self, records: Iterable[Record], ejected: Collection[int], now: float) -> None:
        """Takes in all records of TCP, and which of the `watched` endpoints are ejected."""
        drains = [drain for each in self._active() for drain in each.drains]
        places = {frontend: drain for drain in drains for frontend in drain.of.frontends}
        for drain in drains:
            drain.begin()
        for record in records:
            frontend = Frontend(*record.vip, record.protocol)
            if found := places.get(frontend) or places.get(frontend.node_port):
                found.see(record)
        for drain in drains:
            drain.settle(ejected)
        for ref, service in self._services.items():
            if not service.drains or service.asked.waits:
                continue
            if service.left:
                if not service.began:
                    service.next = max(service.next, now)
                service.began = True
            elif not service.waits and now - service.quiet >= self._settle:
                self._end(ref, service, "done")

    def take(self, now: float, tick: float) -> dict[Ref, list[Record]]:
        """What to end now: of each Service one connection, and as many as it missed in the last
        `tick` seconds, in which none could be ended. What it missed before is not made up for."""
        found: dict[Ref, list[Record]] = {}
        room = MOST
        due = [(ref, each) for ref, each in self._services.items() if each.due(now)]
        # Whoever has waited longest comes first, if there is not room for all.
        for ref, service in sorted(due, key=lambda pair: pair[1].next):
            since, rate = max(service.next, now - tick), service.asked.rate
            # Not more than those that joined lack: clients have to come back to know what is next.
            many = min(1 + int((now - since) * rate), service.left)
            if not many:
                service.next = now + _LOOK
            elif chosen := list(_taken(service, min(many, room))):
                found[ref] = chosen
                room -= len(chosen)
                service.next = since + len(chosen) / rate
        return found

    def ended(self, ref: Ref, closed: int, now: float) -> None:
        """What `take` gave has been tried, and so many were still there."""
        if service := self._services.get(ref):
            service.closed += closed
            service.quiet = now

    def told(self) -> dict[Ref, Progress]:
        """How far each drain is that had something to end; once for those that are over."""
        found, self._over = self._over, {}
        found |= {
            ref: Progress(each.closed, each.left, each.asked.rate, each.waits)
            for ref, each in self._services.items()
            if each.began
        }
        return found


def _new(
    before: Mapping[Backend, Member], now: Mapping[Backend, Member], away: Collection[Backend]
) -> set[Backend]:
    """Who is to get more, but for those that were away for a short time only."""
    return {b for b in risen(before, now) if b in before or b not in away}


def _taken(service: _Service, most: int) -> Iterator[Record]:
    for _ in range(most):
        drain = max(service.drains, key=lambda each: each.left)
        if not (record := drain.take()):
            return
        yield record
