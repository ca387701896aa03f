"""Clients outside of the node: whether they are served, on which devices, and what hinders it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pointsman.attach import DeviceLinks
from pointsman.devices import Packets, Surrounding
from pointsman.devicewatch import DevicesNow, DeviceWatch
from pointsman.errors import PointsmanError
from pointsman.events import Problem
from pointsman.generations import Loaded
from pointsman.pins import Pins
from pointsman.settings import Settings
from pointsman.sweep import Sweeper

log = logging.getLogger("pointsman.agent")

_UNTENDED = Problem(
    "programs of a former start go on serving packets from outside, but nobody sweeps their flows "
    "or follows devices",
    "see the agent's log; --devices none takes them away",
    reason="FormerPrograms",
)
_FLOWS_LOST = Problem(
    "flows have another layout than in the former version: connections of clients outside that "
    "were open at this start have ended or will",
    "nothing is left to be done; this is told until the next start",
    severity="warning",
    reason="FlowsLost",
)


class Edge:
    """`put` gets a Loaded and DevicesNow from the thread of `run`; everything else is called on the
    thread that owns the maps."""

    def __init__(self, settings: Settings, put: Callable[[DevicesNow | Loaded], None]) -> None:
        self._packets = settings.packets
        self._wanted = settings.packets.wanted
        self._settings = settings
        self._put = put
        self._pins = Pins(settings.bpffs, settings.sizes)
        self._due: queue.SimpleQueue[Loaded | None] = queue.SimpleQueue()
        self.pinning = False  # a loader of ours is at work
        self._watch = DeviceWatch(settings.packets, settings.bpffs, put)
        self._now = DevicesNow()
        self._left: tuple[Problem, ...] = ()  # what runs still, and should not
        self._loaded: Loaded | None = None
        self._sweeper: Sweeper | None = None
        self._begun = threading.Event()
        self._stopped = False

    def run(self) -> None:
        """Loads what is due, then follows devices until `stop`, on a thread of its own."""
        if not self._wanted:
            return
        loaded = self._due.get()
        if loaded and not self._stopped:
            self.pinning = True
            try:
                loaded = self._pins.load_packets(loaded)
            except OSError as error:
                loaded = replace(loaded, packets_due=False, packets_error=str(error))
            self._put(loaded)
            self.pinning = False
        self._watch.run()

    def sweep(self) -> None:
        """Takes expired flows away until `stop`, on a thread of its own."""
        if self._wanted:
            self._begun.wait()
        if self._sweeper and not self._stopped:
            self._sweeper.run()

    def stop(self) -> None:
        """Any thread may call it."""
        self._stopped = True
        self._due.put(None)
        self._watch.stop()
        if self._sweeper:
            self._sweeper.stop()
        self._begun.set()

    def close(self) -> None:
        """When the threads have ended and nothing is told any more."""
        if self._sweeper:
            self._sweeper.close()

    def begin(self, loaded: Loaded) -> None:
        """The maps are filled, sockets are served: now devices, or nothing on them any more. Where
        the programs for packets are still due, `run` loads them, and tells what came of it."""
        self._loaded = loaded
        self._due.put(loaded if loaded.packets_due else None)
        if loaded.packets_due:
            return
        try:
            self._begin(loaded)
        except (OSError, PointsmanError) as error:  # sockets are served all the same
            log.error("packets: %s", error)
            text = f"packets from outside are not served, or by what was attached before: {error}"
            self._left = (Problem(text, "see the agent's log; a start tries again"),)

    def _begin(self, loaded: Loaded) -> None:
        """Raises OSError and those of `pointsman.errors`."""
        if loaded.packets_error:
            instead = "former ones go on" if loaded.packets else "packets are not served"
            log.error("%s; %s", loaded.packets_error, instead)
        if loaded.packets:
            if loaded.flows_lost:
                log.warning("flows have another layout: connections of clients outside end")
            packets = loaded.generation.packets
            programs, maps = packets.programs, packets.maps
            self._sweeper = Sweeper(maps, programs)
            self._watch.begin(programs, maps)  # which writes the timeouts that the sweep reads
            self._begun.set()
            return
        links = DeviceLinks(self._settings.bpffs)
        # What an agent before attached goes on as long as this one writes all that it reads.
        if not self._wanted or self._pins.outdated(loaded.generation):
            try:
                removed = links.remove_all()
                if removed:
                    log.info("detached %s", ", ".join(removed))
            except PointsmanError as error:
                self._left = (Problem(str(error), "the agent tries it when it starts"),)
        elif links.present():
            self._left = (_UNTENDED,)
        if not self._wanted:
            self._pins.drop_packets(loaded.generation)

    @property
    def begun(self) -> bool:
        """Whether devices are followed, so that a DevicesNow will come."""
        return self._begun.is_set()

    def want(self, packets: Packets, around: Surrounding) -> None:
        self._packets = packets
        if self._wanted:
            self._watch.want(packets, around)

    def take(self, now: DevicesNow) -> None:
        self._now = now

    @property
    def _error(self) -> str:
        """Why the programs of this version are not there, in a line."""
        return self._loaded.packets_error.partition("\n")[0] if self._loaded else ""

    @property
    def _former(self) -> bool:
        """Whether those of a version before serve packets instead."""
        return bool(self._error and self._loaded and self._loaded.packets)

    @property
    def problems(self) -> tuple[Problem, ...]:
        found = [*self._left, *self._now.problems]
        if self._former:
            found.append(
                Problem(
                    f"programs of a former version serve packets from outside: {self._error}",
                    "see the agent's log; a start tries again",
                    severity="warning",
                    reason="FormerPrograms",
                )
            )
        elif self._error:
            found.append(
                Problem(
                    "packets from outside are not served: " + self._error,
                    "see the agent's log; --devices none if nobody comes from outside",
                    severity="error" if self._packets.named else "warning",
                    reason="DeviceNotServed",
                )
            )
        if self._loaded and (kept := self._loaded.flows_kept):
            found.append(_flows_kept(*kept))
        if self._loaded and self._loaded.flows_lost:
            found.append(_FLOWS_LOST)
        return tuple(found)

    def sweeping(self) -> dict[str, Any] | None:
        """What was swept, and what there is; None without programs for packets."""
        return {**self._sweeper.status(), "former": self._former} if self._sweeper else None

    def status(self) -> dict[str, Any]:
        return {
            "packets": self.sweeping(),
            "devices": {
                "wanted": self._wanted,
                "named": self._packets.named,
                "loading": bool(self._loaded and self._loaded.packets_due),
                "error": self._error,
                "former": self._former,
                "items": list(self._now.rows),
            },
        }


def _flows_kept(wanted: int, kept: int) -> Problem:
    return Problem(
        f"--max-flows {wanted} is not in force: the map of flows keeps its {kept} entries as long "
        "as devices are served, for open connections stand in it",
        "where these may end, start the agent once with --devices none, or stop it and run "
        "'pointsman unload'; the start after that has the new size",
        severity="warning",
        reason="SizeKept",
    )
