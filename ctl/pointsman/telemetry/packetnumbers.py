"""What /metrics shows of packets, as plain series: `metrics` gives them a form. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pointsman.decisions import drop_reason, is_drop


class Series(NamedTuple):
    """One metric. `label` is "" where there is a single value, under the name ""."""

    counter: bool
    name: str
    text: str
    label: str
    values: Mapping[str, float]


def series(told: Mapping[str, Any]) -> Iterator[Series]:
    """Of Sweeper.status(); nothing of {}, which is an agent that serves no devices."""
    if not told:
        return
    counters, nat = told["counters"], told["nat"]
    yield Series(
        True,
        "pointsman_packets_total",
        "Decisions about packets and flows, by what was decided",
        "verdict",
        {name: count for name, count in counters.items() if not is_drop(name)},
    )
    yield Series(
        True,
        "pointsman_packet_drops_total",
        "Packets that went no further, by why",
        "reason",
        {drop_reason(name): count for name, count in counters.items() if is_drop(name)},
    )
    yield Series(
        False,
        "pointsman_packet_programs_former",
        "1 while programs of a former version serve packets, for this one's can't be loaded",
        "",
        {"": int(told.get("former", False))},
    )
    entries, room = told["entries"], told["room"]
    yield Series(
        False,
        "pointsman_flows",
        "Flows by state: two entries each",
        "state",
        {state: count / 2 for state, count in entries.items()},
    )
    yield Series(
        False,
        "pointsman_flows_capacity",
        "Room for flows",
        "state",
        {state: count / 2 for state, count in room.items()},
    )
    for name, key, text in (
        ("rounds_total", "rounds", "Looks at all flows for those that have expired"),
        ("expired_total", "expired", "Flows that had expired"),
    ):
        yield Series(True, f"pointsman_sweep_{name}", text, "", {"": told[key]})
    for name, key, text in (
        ("last_duration_seconds", "seconds", "Time of the last look, rests included"),
        ("last_cpu_seconds", "cpuSeconds", "CPU time of the last look"),
    ):
        yield Series(False, f"pointsman_sweep_{name}", text, "", {"": told[key]})
    for name, key, text in (
        ("used", "used", "Ports of this node that flows to other nodes use"),
        ("used_max", "most", "The most of them towards one endpoint"),
        ("available", "available", "Ports of this node towards each endpoint"),
    ):
        yield Series(False, f"pointsman_nat_ports_{name}", text, "", {"": nat[key]})
