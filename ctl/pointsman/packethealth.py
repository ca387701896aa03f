"""The part of `status` about packets: what became of them, flows, ports, the sweep. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pointsman.decisions import drop_reason, is_drop
from pointsman.dump import MapRow

Report = dict[str, Any]
#: A share of the ports towards one endpoint, and of the room for flows, that calls for a word.
_NEARLY = 0.9


@dataclass(frozen=True, slots=True)
class PacketsSeen:
    """What the maps of the packet programs say. `ports`: first and last of this node."""

    counters: Mapping[str, int]
    ports: tuple[int, int]
    dsr: bool


def packets(
    seen: PacketsSeen | None, maps: Iterable[MapRow], told: Mapping[str, Any] | None
) -> Report | None:
    """None where no packet programs are. `told`: Sweeper.status() from the status file; what is
    counted only by the agent is None without it."""
    if seen is None:
        return None
    rows = {row.name: row for row in maps}
    told = told or {}
    nat = told.get("nat") or {}
    first, last = seen.ports
    return {
        "verdicts": {
            name: count for name, count in seen.counters.items() if count and not is_drop(name)
        },
        "drops": {
            drop_reason(name): count
            for name, count in seen.counters.items()
            if count and is_drop(name)
        },
        "flows": {
            state: {"entries": rows[name].used, "max": rows[name].max}
            for state, name in (("open", "flows"), ("new", "flows_new"))
            if name in rows
        },
        "dispatch": "dsr" if seen.dsr else "snat",
        "snatPorts": {
            "first": first,
            "last": last,
            "available": max(0, last - first + 1),
            "used": nat.get("used"),
            "most": nat.get("most"),
        },
        "sweep": {name: told.get(name) for name in ("rounds", "expired", "seconds", "cpuSeconds")}
        if told
        else None,
    }


def warnings(found: Report | None) -> list[str]:
    """What is about to run out."""
    if found is None:
        return []
    notes = []
    ports = found["snatPorts"]
    if ports["most"] is not None and ports["most"] > _NEARLY * ports["available"]:
        notes.append(
            f"{ports['most']} of {ports['available']} ports of this node are in use towards one "
            "endpoint: new connections to it fail when all are; see 'pointsman get nat', and widen "
            "--snat-ports or add endpoints"
        )
    opened = found["flows"].get("open")
    if opened and opened["entries"] is not None and opened["entries"] > _NEARLY * opened["max"]:
        notes.append(
            f"{opened['entries']} of {opened['max']} entries of flows are in use: raise --max-flows"
        )
    return notes
