"""Before the programs go: what clients outside begin is left to whoever else serves it, and what is
open goes on for a while."""

from __future__ import annotations

import time
from collections.abc import Iterator

from pointsman.errors import NotLoaded
from pointsman.flows import CLOSING, SECOND, Filter, Flow, timeout
from pointsman.generations import Generation
from pointsman.maps import Maps
from pointsman.packetmaps import PacketMaps, now

_BETWEEN = 0.2  # seconds


def drain(generation: Generation, seconds: float) -> int:
    """Returns when no flow is open, or when the time is over: how many still are. Begins none from
    its first moment on, of sockets neither; an agent that starts again takes that back."""
    deadline = time.monotonic() + seconds
    _begin_nothing(generation)
    try:
        maps = PacketMaps(generation.packets.maps)
    except NotLoaded:
        return 0
    try:
        while any(_open(maps)) and time.monotonic() < deadline:
            time.sleep(_BETWEEN)
        return sum(1 for _ in _open(maps))
    finally:
        maps.close()


def _begin_nothing(generation: Generation) -> None:
    """No address concerns the programs any more; flows outlive that."""
    maps = Maps(generation.maps, generation.programs)
    try:
        maps.refuse(())
        maps.mark([(index, 0) for index in maps.marks() or ()])
        maps.wait_for_readers()
    finally:
        maps.close()


def _open(maps: PacketMaps) -> Iterator[Flow]:
    timeouts, at = maps.timeouts, now()
    for flow in maps.all(Filter()):
        patience = timeout(timeouts, flow.client.protocol, flow.state) * SECOND
        if flow.state != CLOSING and at - flow.seen <= patience:
            yield flow
