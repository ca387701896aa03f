"""What endpoints leave behind: the agent's side of `reaper`, which tells it what is there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pointsman.membership import Membership
from pointsman.objects import Ref
from pointsman.reaper import Found, Reaped, Reaper
from pointsman.stale import of_services, stale, stale_flows
from pointsman.tracker import Tracker
from pointsman.values import TCP, UDP

log = logging.getLogger("pointsman.agent")


class LeftBehind:
    """`put` gets a Found or a Reaped from the reaper's thread; everything else is called on the
    thread that owns the maps."""

    def __init__(
        self,
        maps: Path,
        wait_for_readers: Callable[[], None],
        put: Callable[[Found | Reaped], None],
        *,
        tcp: bool,
    ) -> None:
        self._reaper = Reaper(maps, wait_for_readers, put, put)
        self.protocols(tcp=tcp)
        self._checks = self._destroyed = self._flows_deleted = 0
        self._problems: tuple[str, ...] = ()
        #: Whether conntrack has flows to Services. Pointsman makes none: once those of a proxy
        #: before are gone, nobody reads a hundred thousand entries at each change.
        self._flows = True
        self.run, self.stop = self._reaper.run, self._reaper.stop

    def protocols(self, *, tcp: bool) -> None:
        """Whether TCP connections are ended, too."""
        self._protocols = {"UDP", "TCP"} if tcp else {"UDP"}
        self._reaper.protocols = frozenset({UDP, TCP} if tcp else {UDP})

    def look(self) -> None:
        """Asks for a look at everything, as after a start."""
        self._reaper.look(flows=True)

    def look_after(self, touched: set[Ref], tracker: Tracker) -> None:
        """Asks for a look if what a sync changed may have had sockets of these protocols."""
        for ref in touched:
            if ref.kind not in ("Service", "Pod"):
                continue
            service = tracker.services.get(ref)
            if service is None or self._protocols & {port.protocol for port in service.spec.ports}:
                self._reaper.look(flows=self._flows)
                return

    def judge(self, found: Found, members: Membership | None) -> None:
        """`members`: None while it is not known what the maps hold."""
        if members is None:
            self._reaper.destroy(())
            self.look()
            return
        self._checks += 1
        flows = of_services(found.flows, members.serving)
        if found.flows:
            self._flows = bool(flows)
        self._reaper.destroy(
            stale(found.records, members.present, members.exists),
            stale_flows(flows, members.serving),
        )

    def take(self, reaped: Reaped) -> None:
        self._destroyed += len(reaped.destroyed)
        self._flows_deleted += reaped.flows
        for problem in set(reaped.problems) - set(self._problems):
            log.warning("%s", problem)
        self._problems = reaped.problems
        if reaped.destroyed or reaped.flows:
            log.info(
                "endpoints left: sockets ended=%s conntrack entries deleted=%s",
                len(reaped.destroyed),
                reaped.flows,
            )

    def status(self) -> dict[str, Any]:
        return {
            "checks": self._checks,
            "destroyed": self._destroyed,
            "flowsDeleted": self._flows_deleted,
            "problems": list(self._problems),
        }
