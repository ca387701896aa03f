"""Takes flows out of the maps that have expired, round after round, on a thread of its own.

The program `sweep` decides what has expired, and deletes both halves; this only hands it the keys
that are worth a look, which `expiry.candidates` picks out of what a batch lookup reads anyway. So
a flow that a packet has just touched is never deleted by what was read a moment before.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections import Counter
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from pointsman import bpf
from pointsman.decisions import NO_ROOM
from pointsman.expiry import KEY_SIZE, candidates, count_ports
from pointsman.packetmaps import PacketMaps, now

log = logging.getLogger("pointsman.agent")

_MINIMUM_PACKET = 64  # an XDP test run wants at least an Ethernet header
_u32 = struct.Struct("=I")

#: From this part of the map's room on it goes round without a rest.
_CROWDED, _HALF = 0.9, 0.5
_REST, _BRISK = 10.0, 2.0  # seconds between the starts of two rounds
_TICK = 1.0  # how often, at rest, the programs are asked whether they lack room
_SHARE = 9  # after each step it sleeps so many times as long as that took: a tenth of a CPU
_THOROUGH = 30  # of so many rounds one looks at all that is old
_COUNTING = 6  # and one counts ports in use


def interval(fill: float) -> float:
    """Seconds from the start of one round to the start of the next, by how full the map is."""
    if fill >= _CROWDED:
        return 0.0
    return _BRISK if fill >= _HALF else _REST


def rest_after(step: float, fill: float) -> float:
    """Seconds to sleep after a step that took so many, so that no CPU is taken whole: half of one
    where there is no room, else a tenth."""
    return step if fill >= _CROWDED else _SHARE * step


@dataclass(frozen=True, slots=True)
class Round:
    """One look at all flows. `entries` are halves of flows, `looked_at` those that `sweep` was
    asked about, `expired` the flows that it deleted; `cpu_seconds` of this thread, kernel's time
    included."""

    entries: int = 0
    entries_new: int = 0
    looked_at: int = 0
    expired: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    ports_used: int = 0
    most_ports: int = 0


class Sweeper:
    """`run` is the body of a thread, `stop` and `status` may be called from any other."""

    def __init__(self, maps: Path, programs: Path) -> None:
        """The directories of one generation. Raises NotLoaded without packet programs."""
        self._maps = PacketMaps(maps, read_only=False)
        self._program = bpf.obj_get(programs / "sweep")
        keys = self._maps.map("sweep_keys")
        self._keys = bpf.Array(keys)
        self._most = keys.info.max_entries
        self._room = self._maps.flows.info.max_entries
        self._room_new = self._maps.flows_new.info.max_entries
        self._stop = threading.Event()
        self._fill = 0.0
        self._rounds = 0
        self._total = 0
        self._last = Round()
        self._pleas = 0

    # -- the thread ------------------------------------------------------------------------------

    def run(self) -> None:
        """Until `stop`. What the kernel refuses (memory, say) is tried again: flows that stay harm
        less than an agent that ends."""
        failed: int | None = 0
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._pleas = self._lacking()
                self.round(paced=True)
                failed = 0
                self._wait(began + interval(self._fill))
            except OSError as error:
                if error.errno != failed:
                    log.error("flows that have expired stay, it is tried again: %s", error)
                failed = error.errno
                self._stop.wait(_REST)

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        """When `run` has ended and nobody asks for the status any more."""
        if self._program >= 0:
            os.close(self._program)
            self._program = -1
            self._keys.close()
            self._maps.close()

    def _wait(self, until: float) -> None:
        """A flow that found no room ends the rest."""
        while (left := until - time.monotonic()) > 0:
            if self._stop.wait(min(left, _TICK)):
                return
            if self._lacking() != self._pleas:
                return

    def _lacking(self) -> int:
        """How often the programs found no room."""
        counters = self._maps.counters()
        return sum(counters.get(name, 0) for name in NO_ROOM)

    # -- one round -------------------------------------------------------------------------------

    def round(self, *, paced: bool = False) -> Round:
        """Looks at every flow once. `paced`: with a rest after each step; ends early on `stop`."""
        began, cpu = time.monotonic(), time.thread_time()
        timeouts = self._maps.timeouts
        if not any(astuple(timeouts)):
            return self._last  # nobody has written them yet: all would be older than that
        thorough = self._rounds % _THOROUGH == 0
        counting = self._rounds % _COUNTING == 0
        ports: Counter[bytes] = Counter()
        counts: list[int] = []
        looked_at = expired = 0
        for source in (self._maps.flows, self._maps.flows_new):
            entries = 0
            batches = source.scan()
            while True:
                step = time.monotonic()
                batch = next(batches, None)
                if batch is None:
                    break
                count, keys, values = batch
                entries += count
                if counting:
                    count_ports(keys, values, ports)
                old = candidates(keys, values, now(), timeouts, thorough=thorough)
                looked_at += len(old) // KEY_SIZE
                expired += self._sweep(old)
                if paced:
                    pause = rest_after(time.monotonic() - step, self._fill)
                    if self._stop.wait(pause):
                        return self._last
            counts.append(entries)
        self._last = Round(
            entries=counts[0],
            entries_new=counts[1],
            looked_at=looked_at,
            expired=expired,
            seconds=time.monotonic() - began,
            cpu_seconds=time.thread_time() - cpu,
            ports_used=ports.total() if counting else self._last.ports_used,
            most_ports=max(ports.values(), default=0) if counting else self._last.most_ports,
        )
        self._fill = counts[0] / self._room
        self._rounds += 1
        self._total += expired
        return self._last

    def _sweep(self, keys: bytes) -> int:
        """Has the program look at these keys; how many flows it deleted."""
        expired = 0
        size = self._most * KEY_SIZE
        for at in range(0, len(keys), size):
            part = keys[at : at + size]
            self._keys.write(0, part)
            count = _u32.pack(len(part) // KEY_SIZE)
            expired += bpf.run(self._program, count.ljust(_MINIMUM_PACKET, b"\0"))
        return expired

    # -- telling ---------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """For the status file and the metrics."""
        last = self._last
        first, final = self._maps.ports
        return {
            "rounds": self._rounds,
            "expired": self._total,
            "entries": {"open": last.entries, "new": last.entries_new},
            "room": {"open": self._room, "new": self._room_new},
            "seconds": round(last.seconds, 6),
            "cpuSeconds": round(last.cpu_seconds, 6),
            "lookedAt": last.looked_at,
            "nat": {
                "available": max(0, final - first + 1),
                "used": last.ports_used,
                "most": last.most_ports,
            },
            "counters": self._maps.counters(),
        }


def measure(maps: Path, programs: Path) -> tuple[Round, Round]:
    """What two rounds without a rest cost over what stands in these maps, for benches: a thorough
    one that also counts ports, then an ordinary one."""
    sweeper = Sweeper(maps, programs)
    try:
        return sweeper.round(), sweeper.round()
    finally:
        sweeper.close()
