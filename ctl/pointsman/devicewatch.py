"""Follows devices, addresses and routes, on a thread of its own: whoever is to be served has its
programs and its element of `devices`; next hops to other nodes are kept resolved.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pointsman.attach import DeviceLinks
from pointsman.devicemaps import DeviceMaps
from pointsman.deviceproblems import Outcome, problems, rows, unserved_ways
from pointsman.devices import (
    AUTO,
    FIND_A_WAY_OUT,
    NO_WAY_OUT,
    NODE,
    Choice,
    Packets,
    Route,
    Seen,
    Surrounding,
    aimed,
    choose,
    cluster_side,
    targets,
)
from pointsman.events import Problem
from pointsman.netlink import devices, neighbours
from pointsman.values import Address

log = logging.getLogger("pointsman.agent")

_TICK = 0.5  # seconds between two looks whether it is to end
_QUIET, _PATIENCE = 0.05, 1.0  # seconds without a change before a look; with changes, at most
_PAUSE = 1.0  # seconds until a look that failed is repeated
_AGAIN = 30.0  # seconds until what failed is tried again
_ROUTES = 15.0  # seconds between two looks for new ways to other nodes
_NO_WAY_OUT = Problem(
    f"{NO_WAY_OUT}: what an agent before attached goes on as it is, and nobody follows it",
    FIND_A_WAY_OUT,
    severity="warning",
)


@dataclass(frozen=True, slots=True)
class DevicesNow:
    """For the status file, a row a device; and all that is wrong."""

    rows: tuple[dict[str, Any], ...] = ()
    problems: tuple[Problem, ...] = ()


def _may_heal(outcome: Outcome) -> bool:
    """Whether it is worth another try though nothing here has changed: another's program may go. A
    driver without XDP stays one, and trying may reset its queues."""
    return bool(outcome.foreign or outcome.tc_fault)


class DeviceWatch:
    """`put` gets a DevicesNow from the thread of `run`; all else may be called from any thread."""

    def __init__(self, packets: Packets, root: Path, put: Callable[[DevicesNow], None]) -> None:
        self._put = put
        self._links = DeviceLinks(root)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._asked = threading.Event()
        self._packets, self._around = packets, Surrounding(pods=None)
        self._programs: Path | None = None
        self._maps: DeviceMaps | None = None
        self._told: DevicesNow | None = None
        self._done: dict[int, Outcome] = {}
        self._again = math.inf  # when what failed is tried again
        self._defaults: tuple[Route, ...] = ()  # the last that there were
        self._mode = ""
        self._able: frozenset[int] = frozenset()  # devices to which XDP may send
        self._near = False  # whether it was said that there can be none
        self._hops_for: object = None
        self._hops_fault = ""
        self._ways_for: object = None
        self._ways_at = 0.0
        self._ways: dict[Address, neighbours.NextHop] = {}
        self._cluster: frozenset[int] = frozenset()  # devices that ever faced the cluster

    def begin(self, programs: Path, maps: Path) -> None:
        """The lookup maps are filled: from here on devices are served, by these programs. How is
        written at once, for whoever else reads it."""
        with self._lock:
            self._programs, self._maps = programs, DeviceMaps(maps)
            self._maps.configure(self._packets)
        self._asked.set()

    def want(self, packets: Packets, around: Surrounding) -> None:
        with self._lock:
            if (packets, around) == (self._packets, self._around):
                return
            self._packets, self._around = packets, around
        self._asked.set()

    def stop(self) -> None:
        self._stop.set()

    def run(self) -> None:
        """Until `stop`; what is attached stays."""
        while self._programs is None:
            if self._stop.wait(_TICK):
                return
        while not self._stop.is_set():
            try:
                self._follow()
            except OSError as error:
                text = f"devices are not followed, what is served stays as it is: {error}"
                rows = self._told.rows if self._told else ()
                if self._tell(DevicesNow(rows, (Problem(text, "see the agent's log"),))):
                    log.error("devices could not be followed, it is tried again: %s", error)
                self._stop.wait(_PAUSE)
        if self._maps:
            self._maps.close()

    def _follow(self) -> None:
        """Until `stop`, from a look at everything on. Raises OSError."""
        with contextlib.closing(devices.monitor()) as monitor:
            due = True
            while not self._stop.is_set():
                if monitor.changed(0 if due else _TICK):
                    due = True
                    quiet_by = time.monotonic() + _PATIENCE
                    while monitor.changed(_QUIET) and time.monotonic() < quiet_by:
                        pass
                # By a time of its own: on a busy node one look follows the other.
                if time.monotonic() > self._again:
                    due, self._again = True, math.inf
                    self._done = {i: o for i, o in self._done.items() if not _may_heal(o)}
                if due or self._asked.is_set():
                    self._asked.clear()
                    self._look()
                    due = False

    # -- one look ----------------------------------------------------------------------------

    def _look(self) -> None:
        """Raises OSError."""
        with self._lock:
            packets, around = self._packets, self._around
            programs, maps = self._programs, self._maps
        if programs is None or maps is None:
            return
        seen = self._look_around(packets, around)
        if seen is None:
            self._tell(DevicesNow((), (_NO_WAY_OUT,)))
            return
        choice = choose(packets, seen, around)
        maps.configure(packets)
        outcomes = self._serve(programs, maps, choice, packets, whole=around.pods is not None)
        self._keep_neighbours(seen, choice, around)
        ways = unserved_ways(self._ways, around.endpoints, seen, choice)
        found = (*problems(packets, seen, around, choice, outcomes), *ways)
        faulty = any(map(_may_heal, outcomes))
        self._again = min(self._again, time.monotonic() + _AGAIN) if faulty else math.inf
        self._tell(DevicesNow(tuple(rows(choice, outcomes)), found))

    def _look_around(self, packets: Packets, around: Surrounding) -> Seen | None:
        """What there is now. A route or address that is away for a moment is no reason to take
        programs off, and to end all open connections: the last one counts. None: nothing is known
        yet, and what a former agent attached stays."""
        seen = devices.seen()
        self._find_ways(seen, around)
        there = {device.index for device in seen.devices}
        self._cluster = (self._cluster | cluster_side(seen, around, self._ways)) & there
        seen = replace(seen, cluster=self._cluster)
        if AUTO not in packets.devices:
            return seen
        if seen.defaults:
            self._defaults = seen.defaults
        elif not (self._defaults or self._cluster) and self._links.present():
            return None
        return replace(seen, defaults=self._defaults)

    def _serve(
        self, programs: Path, maps: DeviceMaps, choice: Choice, packets: Packets, *, whole: bool
    ) -> list[Outcome]:
        """`whole`: the choice is all of them. Else what is attached may be a pod's that is not
        known yet, and stays."""
        if whole:
            # What the programs must know goes after them, and comes before them: with others in
            # between there would be no room for as many as there may be.
            removed = self._links.keep_only(choice.served)
            if removed:
                log.info("detached %s", ", ".join(removed))
            maps.keep_only(choice.served)
        mode = "native" if packets.xdp_mode == AUTO else packets.xdp_mode
        present = self._links.present()
        if mode != self._mode:
            self._done, self._mode = {}, mode
        before, self._done = self._done, {}
        able = self._able & {one.device.index for one in choice.served if one.xdp}
        self._able = able if mode == "native" else frozenset()
        for one in choice.served:
            index = one.device.index
            known = before.get(index)
            try:
                maps.add(aimed(one, self._able))
                # A filter goes with its qdisc, which anyone may delete: it is looked at each time.
                if known is None or known.served != one or known.tc == "clsact":
                    known = self._links.serve(programs, one, mode, present)
            except OSError as error:
                known = Outcome(one, tc_fault=error.strerror or str(error))
            was = before.get(index)
            if was is None or (was.xdp, was.tc) != (known.xdp, known.tc):
                log.info("device=%s xdp=%s tc=%s", one.device.name, known.xdp, known.tc)
            self._done[index] = known
        self._aim(maps)
        return list(self._done.values())

    def _aim(self, maps: DeviceMaps) -> None:
        """Lets XDP send to those devices whose drivers take it now that a program is there."""
        native = {index for index, one in self._done.items() if one.xdp == "native"}
        features = devices.xdp_features() if native else {}
        if len(native) > 1 and not features and not self._near:
            self._near = True
            log.info(
                "XDP sends packets only out of the device that they came in at, TC out of others: "
                "drivers say what they take from Linux 6.3 on"
            )
        able = targets(native, features)
        if able != self._able:
            self._able = able
            for one in self._done.values():
                maps.add(aimed(one.served, able))

    def _tell(self, now: DevicesNow) -> bool:
        """Whether it was new."""
        if now == self._told:
            return False
        self._told = now
        self._put(now)
        return True

    # -- neighbours --------------------------------------------------------------------------

    def _find_ways(self, seen: Seen, around: Surrounding) -> None:
        """Not whenever a pod's device comes or goes: there may be thousands of other nodes."""
        key = (around.other_nodes, around.endpoints, seen.defaults)
        if key == self._ways_for and time.monotonic() - self._ways_at < _ROUTES:
            return
        self._ways_for, self._ways_at = key, time.monotonic()
        self._ways = neighbours.next_hops(around.other_nodes | around.endpoints)

    def _keep_neighbours(self, seen: Seen, choice: Choice, around: Surrounding) -> None:
        """Those of other nodes and the gateways; those of pods an overlay keeps itself."""
        node = [one for one in choice.served if one.flags & NODE]
        hops = {way for address, way in self._ways.items() if address in around.other_nodes}
        gateways = {(route.index, route.gateway) for route in seen.defaults if route.gateway}
        usable = {d.index for d in seen.devices if d.ethernet and d.up and not d.loopback}
        wanted = {hop for hop in hops | gateways if hop[0] in usable} if node else set()
        key = (wanted, tuple(one.device.index for one in node), self._ways_at)
        if key == self._hops_for:
            return
        self._hops_for = key
        try:
            ours, others = neighbours.kept_neighbours()
        except OSError as error:
            log.warning("neighbours are not kept resolved: %s", error)
            self._hops_for = None
            return
        changes = [(neighbours.forget_neighbour, hop) for hop in ours - wanted]
        changes += [(neighbours.keep_neighbour, hop) for hop in wanted - ours - others]
        fault = ""
        for change, hop in changes:
            try:
                change(hop)
            except OSError as error:  # its device went, say: that is no reason to leave the others
                fault = str(error)
        # TC still waits for neighbours, as the kernel does. The next look for ways tries again.
        if fault and fault != self._hops_fault:
            log.warning("neighbours are not kept resolved: %s", fault)
        self._hops_fault = fault
