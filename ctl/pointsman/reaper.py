"""Ends the sockets, and deletes the conntrack entries, that an endpoint left behind.

Its thread reads and ends; what is stale is for the agent to say, which knows the Services:

    agent: look() → reaper: found(Found) → agent: destroy(…) → reaper: reaped(Reaped)
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pointsman import netlink, netns
from pointsman.sockets import Sockets
from pointsman.stale import Flow, Record
from pointsman.values import UDP

_INTERVAL = 1.0
_FOR_GOOD = (errno.EOPNOTSUPP, errno.EPERM)
_TRIES = 3  # a socket in the middle of its connect has a record, but no peer yet


@dataclass(frozen=True, slots=True)
class Found:
    """Every record of a socket, and every UDP flow if they were asked for: then `took` says how
    many seconds it took to read them."""

    records: list[Record]
    flows: list[Flow]
    took: float | None = None


@dataclass(frozen=True, slots=True)
class Reaped:
    """`problems`: why namespaces were passed over, or what the kernel refused."""

    destroyed: list[Record]
    flows: int
    problems: tuple[str, ...] = ()


class Reaper:
    """`look` and `destroy` may be called from any thread, `run` is the body of its own.

    `wait_for_readers` returns when no program chooses by an old set any more: only then is every
    socket that got an endpoint of it on record. `found` is called where there is anything to
    judge, `reaped` where something was done; both on the reaper's thread.
    """

    def __init__(
        self,
        maps: Path,
        wait_for_readers: Callable[[], None],
        found: Callable[[Found], None],
        reaped: Callable[[Reaped], None],
        *,
        protocols: frozenset[int] = frozenset({UDP}),
        interval: float = _INTERVAL,
    ) -> None:
        self._maps = maps
        self._wait_for_readers = wait_for_readers
        self._found = found
        self._reaped = reaped
        self.protocols = protocols
        self._interval = interval
        self._changed = threading.Condition()
        self._wanted = self._flows_wanted = self._stopped = False
        self._doomed: tuple[list[Record], list[Flow]] | None = None
        self._looked_at = -interval
        #: Stale records without a socket that is connected so: it was ended, or its program
        #: disconnected it. They stand until it is closed, and are not looked for for ever.
        self._missed: dict[Record, int] = {}
        self._told: tuple[str, ...] = ()

    def look(self, *, flows: bool = False) -> None:
        """Asks for a look, after the maps were written. At most one in a second is taken."""
        with self._changed:
            self._wanted = True
            self._flows_wanted |= flows
            self._changed.notify()

    def destroy(self, records: Iterable[Record], flows: Iterable[Flow] = ()) -> None:
        """Everything that is stale of what a look found; also if that is nothing."""
        with self._changed:
            self._doomed = list(records), list(flows)
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def run(self) -> None:
        """Until `stop`."""
        sockets = Sockets(self._maps)
        try:
            while True:
                with self._changed:
                    while not self._due():
                        self._changed.wait(self._pause())
                    if self._stopped:
                        return
                    doomed, self._doomed = self._doomed, None
                    looking = doomed is None and self._may_look()
                    flows = looking and self._flows_wanted
                    if looking:
                        self._wanted = self._flows_wanted = False
                if doomed is not None:
                    self._reap(sockets, *doomed)
                elif looking:
                    self._look(sockets, flows)
        finally:
            sockets.close()

    def _may_look(self) -> bool:
        return self._wanted and time.monotonic() - self._looked_at >= self._interval

    def _due(self) -> bool:
        return self._stopped or self._doomed is not None or self._may_look()

    def _pause(self) -> float | None:
        """How long until a look that is wanted may be taken; None = until something is asked."""
        if not self._wanted:
            return None
        return max(0.0, self._looked_at + self._interval - time.monotonic())

    def _look(self, sockets: Sockets, flows: bool) -> None:
        self._wait_for_readers()
        self._looked_at = time.monotonic()
        present: list[Flow] = []
        took = None
        if flows:
            try:
                present = netlink.flows()
                took = time.monotonic() - self._looked_at
            except OSError as error:
                self._reaped(Reaped([], 0, (f"conntrack entries can't be read: {error}",)))
        records = sockets.records(self.protocols)
        if not records:
            self._missed.clear()
        if records or present:
            self._found(Found(records, present, took))

    def _reap(self, sockets: Sockets, stale: list[Record], flows: list[Flow]) -> None:
        self._missed = {record: self._missed.get(record, 0) for record in stale}
        left = {record for record in stale if self._missed[record] < _TRIES}
        destroyed, refused, passed = netns.destroy(left, sockets.still)
        left.difference_update(destroyed)
        problems = [_refused(refused)] if refused else []
        if passed:
            problems.append(f"{len(passed)} network namespaces were passed over: {passed[0]}")
        for record in destroyed:
            self._missed[record] = _TRIES
        # What hinders all may pass, such as that no descriptor is free: then nobody was missed.
        if not refused or refused.errno in _FOR_GOOD:
            for record in left:
                self._missed[record] += 1
        deleted = 0
        try:
            deleted = netlink.delete_flows(flows) if flows else 0
        except OSError as error:
            problems.append(f"conntrack entries of removed endpoints: {error}")
        if left:
            self.look()
        if destroyed or deleted or tuple(problems) != self._told:
            self._told = tuple(problems)
            self._reaped(Reaped(destroyed, deleted, self._told))


def _refused(error: OSError) -> str:
    if error.errno == errno.EOPNOTSUPP:
        return "sockets of removed endpoints stay: this kernel has no CONFIG_INET_DIAG_DESTROY"
    return f"sockets of removed endpoints stay: {error}"
