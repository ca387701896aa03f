"""Reads what the packet programs decide, as they decide it. Works without an agent.

The programs write events until `packet_settings.trace_until`, so a reader that is killed leaves
nothing on: it is at most LEAD ahead, and has to be renewed. The map is mapped and the renewal is
one 64-bit store of that field: it can't undo what the agent writes beside it. The agent's own
writes may put back the value of a moment before; the next renewal mends that long before it ends.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from pathlib import Path

from pointsman import abi, bpf
from pointsman.decisions import COUNTED, TRACE_LOST, Event, event_of
from pointsman.errors import AlreadyRunning
from pointsman.flows import SECOND
from pointsman.packetmaps import PacketMaps, now
from pointsman.values import PortName
from pointsman.view import port_name_of, sums

#: Events are written for so long after the last renewal, in ns, and this often it is renewed. What
#: comes later is not even counted as lost: a reader may get no CPU for seconds, and misses nothing.
LEAD, RENEWAL = 10 * SECOND, SECOND // 2
_UNTIL = abi.layouts()["packet_settings"].field("trace_until").offset
_WAIT = 0.2  # seconds
_MONOTONIC_COARSE = 6  # include/uapi/linux/time.h
_u32 = struct.Struct("=I")


class Tracer:
    """Raises NotLoaded where no packet programs are, AlreadyRunning where another one reads: a
    ring buffer has one position of reading, so each would take events from the other."""

    def __init__(self, maps: Path) -> None:
        self._maps = PacketMaps(maps, read_only=False)
        self._lock = os.open(maps, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._maps.close()
            raise AlreadyRunning(
                "another 'pointsman trace' runs on this node; end it first"
            ) from None
        self._settings = bpf.Array(self._maps.map("packet_settings"))
        self._ring = bpf.RingBuffer(self._maps.map("trace"))
        self._names: dict[int, PortName] = {}
        # By the clock that stamps events, which is behind now() by up to a tick.
        self._began = time.clock_gettime_ns(_MONOTONIC_COARSE)
        self._renewed = 0
        self._lost_before = self._lost_ever()

    def events(self) -> list[Event]:
        """What was decided since the last call; waits a fraction of a second for the first. Also
        renews, so it is to be called again soon."""
        at = now()
        if at - self._renewed >= RENEWAL:
            self._renewed = at
            self._write(at + LEAD)
        records = self._ring.read(_WAIT)
        events = map(event_of, records)
        # What a reader that was killed left in the buffer is not ours.
        return [event for event in events if event.time >= self._began]

    def lost(self) -> int:
        """How many decisions since this began found no room in the buffer."""
        return self._lost_ever() - self._lost_before

    def _lost_ever(self) -> int:
        counters = self._maps.map("packet_counters")
        return sums(counters, {TRACE_LOST: COUNTED[TRACE_LOST]})[TRACE_LOST]

    def owner(self, ident: int) -> PortName | None:
        """The service port of that id, None if it has no name (any more)."""
        if ident not in self._names:
            value = self._maps.map("names").lookup(_u32.pack(ident))
            if value is None:
                return None
            self._names[ident] = port_name_of(value)
        return self._names[ident]

    def _write(self, until: int) -> None:
        self._settings.store_u64(0, _UNTIL, until)

    def close(self) -> None:
        self._write(0)
        self._ring.close()
        self._settings.close()
        self._maps.close()
        os.close(self._lock)
