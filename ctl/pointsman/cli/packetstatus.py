"""How `status` prints what became of packets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def pairs(found: dict[str, Any] | None) -> Iterator[tuple[str, Any]]:
    """Label and value of each line; `found` as packethealth.packets() has it."""
    if found is None:
        yield "off", "no devices are served"
        return
    for state, flows in found["flows"].items():
        yield f"flows, {state}", f"{flows['entries']} of {flows['max']} entries"
    ports = found["snatPorts"]
    text = f"{ports['first']}-{ports['last']}"
    if ports["used"] is not None:
        text += f", in use: {ports['used']}, most towards one endpoint: {ports['most']}"
    yield "ports of this node", text
    yield "to other nodes", found["dispatch"]
    if sweep := found["sweep"]:
        took = f"{sweep['seconds']:.3f} s, CPU {sweep['cpuSeconds']:.3f} s"
        yield "sweep", f"rounds: {sweep['rounds']}, expired: {sweep['expired']}, last took {took}"
    for name, count in found["verdicts"].items():
        yield name.replace("_", " "), count
    for reason, count in found["drops"].items():
        yield f"DROPPED {reason.replace('_', ' ')}", count
