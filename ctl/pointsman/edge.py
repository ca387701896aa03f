"""Clients outside of the node: whether they are served, on which devices, and what hinders it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from pointsman.attach import DeviceLinks
from pointsman.devices import Packets, Surrounding
from pointsman.devicewatch import DevicesNow, DeviceWatch
from pointsman.errors import PointsmanError
from pointsman.events import Problem
from pointsman.pins import Loaded, Pins
from pointsman.settings import Settings
from pointsman.sweep import Sweeper

log = logging.getLogger("pointsman.agent")


class Edge:
    """`put` gets a DevicesNow from the thread of `run`; everything else is called on the thread
    that owns the maps."""

    def __init__(self, settings: Settings, put: Callable[[DevicesNow], None]) -> None:
        self._wanted = settings.packets.wanted
        self._settings = settings
        self._watch = DeviceWatch(settings.packets, settings.bpffs, put)
        self._now = DevicesNow()
        self._error = ""
        self._left: tuple[Problem, ...] = ()  # what runs still, and should not
        self._sweeper: Sweeper | None = None
        self._begun = threading.Event()
        self._stopped = False

    def run(self) -> None:
        """Follows devices until `stop`, on a thread of its own."""
        if self._wanted:
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
        self._watch.stop()
        if self._sweeper:
            self._sweeper.stop()
        self._begun.set()

    def close(self) -> None:
        """When the threads have ended and nothing is told any more."""
        if self._sweeper:
            self._sweeper.close()

    def begin(self, loaded: Loaded) -> None:
        """The maps are filled, sockets are served: now devices, or nothing on them any more."""
        if loaded.packets:
            programs, maps = loaded.generation.programs, loaded.generation.maps
            self._sweeper = Sweeper(maps, programs)
            self._watch.begin(programs, maps)
            self._begun.set()
            return
        self._error = loaded.packets_error
        # What an agent before attached reads the same maps, unless they have another layout now.
        if not self._wanted or loaded.rebuilt:
            try:
                removed = DeviceLinks(self._settings.bpffs).remove_all()
                if removed:
                    log.info("detached %s", ", ".join(removed))
            except PointsmanError as error:
                self._left = (Problem(str(error), "the agent tries it when it starts"),)
        if not self._wanted:
            Pins(self._settings.bpffs, self._settings.sizes).drop_packets(loaded.generation)

    def want(self, packets: Packets, around: Surrounding) -> None:
        if self._wanted:
            self._watch.want(packets, around)

    def take(self, now: DevicesNow) -> None:
        self._now = now

    @property
    def problems(self) -> tuple[Problem, ...]:
        if not self._error:
            return *self._left, *self._now.problems
        return (
            *self._left,
            Problem(
                "packets from outside are not served, their programs can't be loaded: "
                + self._error.partition("\n")[0],
                "see the agent's log; --devices none if nobody comes from outside",
                reason="DeviceNotServed",
            ),
        )

    def sweeping(self) -> dict[str, Any] | None:
        """What was swept, and what there is; None without programs for packets."""
        return self._sweeper.status() if self._sweeper else None

    def status(self) -> dict[str, Any]:
        return {
            "packets": self.sweeping(),
            "devices": {
                "wanted": self._wanted,
                "error": self._error.partition("\n")[0],
                "items": list(self._now.rows),
            },
        }
