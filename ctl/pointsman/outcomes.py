"""What the programs know of an endpoint by the connects to it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pointsman import abi

_ABI = abi.constants()
_BITS = _ABI["WINDOW_BITS"]
_MASK = (1 << _BITS) - 1
_TRIAL = _ABI["UNTIL_TRIAL"]


@dataclass(frozen=True, slots=True)
class Outcomes:
    """`latency` is the connect time in µs, 0 if not known; `measured` and `until` are times of
    CLOCK_MONOTONIC in ns: of the last outcome, and of the end of its ejection (0 = not ejected).
    `trial`: a connection tries whether it is well again. `connects` of late had so many
    `failures`; `streak` failed in a row.
    """

    owner: int = 0
    latency: int = 0
    measured: int = 0
    until: int = 0
    trial: bool = False
    connects: int = 0
    failures: int = 0
    ejections: int = 0
    streak: int = 0


def outcomes_of(
    owner: int, latency: int, measured: int, until: int, window: int, streak: int
) -> Outcomes:
    """From the fields of `load`."""
    ends = until & ~_TRIAL
    return Outcomes(
        owner,
        latency,
        measured,
        ends,
        until != ends,
        connects=window & _MASK,
        failures=window >> _BITS & _MASK,
        ejections=window >> 2 * _BITS & _MASK,
        streak=streak,
    )
