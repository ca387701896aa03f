"""What the packet programs decide: the verdicts by name, and the events of `trace`. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pointsman import abi
from pointsman.flows import Tuple, tuple_of
from pointsman.values import PROTOCOL_NAMES, endpoint_text

_VERDICTS = abi.enumerators("verdict")
_NAMES = {number: name.lower() for name, number in _VERDICTS.items() if name != "VERDICTS"}
_HOOKS = {
    number: name.removeprefix("HOOK_").lower().replace("_", "-")
    for name, number in abi.enumerators("hook").items()
}
#: enum verdict in lower case to its index in packet_counters. What passes is not counted.
COUNTED = {name: number for number, name in _NAMES.items() if name != "packet_passed"}
_DROP = "drop_"
#: Events that `trace` has no room for.
TRACE_LOST = "trace_lost"
#: Reasons to sweep at once: there is no room, for flows or of ports.
NO_ROOM = ("flow_unpromoted", "drop_no_room", "drop_no_port")

_event = abi.layouts()["event"]
_read_event = _event.reader(
    "time", "before", "after", "ifindex", "length", "owner", "verdict", "hook"
)


def verdict_name(number: int) -> str:
    return _NAMES.get(number, f"unknown_{number}")


def hook_name(number: int) -> str:
    return _HOOKS.get(number, f"unknown-{number}")


def is_drop(name: str) -> bool:
    """The packet went no further."""
    return name.startswith(_DROP)


def drop_reason(name: str) -> str:
    return name.removeprefix(_DROP)


@dataclass(frozen=True, slots=True)
class Event:
    """One decision about one packet. `time` is CLOCK_MONOTONIC in ns, `length` bytes of the frame,
    `owner` a service port's id, 0 if it is not known. `after` is None if the packet stayed as it
    was."""

    time: int
    hook: str
    ifindex: int
    verdict: str
    before: Tuple
    after: Tuple | None
    length: int
    owner: int

    @property
    def drop(self) -> bool:
        return is_drop(self.verdict)


def event_of(record: bytes) -> Event:
    time, before, after, ifindex, length, owner, verdict, hook = _read_event(record)
    return Event(
        time=time,
        hook=hook_name(hook),
        ifindex=ifindex,
        verdict=verdict_name(verdict),
        before=tuple_of(before),
        after=tuple_of(after) if any(after) and after != before else None,
        length=length,
        owner=owner,
    )


def tuple_text(of: Tuple) -> str:
    """10.0.0.1:1025 > 10.0.0.2:80"""
    source = endpoint_text(of.source, of.source_port)
    return f"{source} > {endpoint_text(of.destination, of.destination_port)}"


def protocol_name(number: int) -> str:
    return PROTOCOL_NAMES.get(number, str(number))
