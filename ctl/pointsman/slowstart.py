"""New endpoints get little at first, and their share as time goes by. No I/O: whoever asks says
what time it is, in seconds.

From 10 % to 100 % of their weight, in ten steps. All endpoints that a Service has when it is first
seen are old: after a start of the agent nothing is slow that was not slow before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pointsman import abi
from pointsman.choice import USUAL_WEIGHT
from pointsman.endpointsets import differing
from pointsman.objects import Ref
from pointsman.shares import ELSEWHERE
from pointsman.values import Backend, Entry, endpoint_text, to_address

_WEIGHTED = abi.constants()["CHOICE_WEIGHTED"]
_STEPS = 10
_PAUSE = 1.0  # seconds between two changes of one Service, at least
_OLD = float("-inf")
#: Of the endpoints that have less than their weight the tenths that they have, by Service.
Steps = Mapping[Ref, Mapping[Backend, int]]


class SlowStart:
    """When endpoints appeared, of the Services that want to know."""

    def __init__(self) -> None:
        self._since: dict[Ref, dict[Backend, float]] = {}
        self._next: dict[Ref, float] = {}
        self.steps: dict[Ref, dict[Backend, int]] = {}

    def due(self, now: float) -> set[Ref]:
        """The Services whose weights change by now; each once, until they are weighed again."""
        found = {ref for ref, at in self._next.items() if at <= now}
        for ref in found:
            del self._next[ref]
        return found

    def weigh(
        self, ref: Ref, entries: tuple[Entry, ...], seconds: int, now: float
    ) -> tuple[Entry, ...]:
        """The entries with weights as they are `now`; `seconds` until an endpoint has its whole
        weight, 0 for a Service without slow start, or that is gone."""
        self._next.pop(ref, None)
        self.steps.pop(ref, None)
        if not seconds:
            self._since.pop(ref, None)
            return entries
        known = self._since.get(ref)
        since = {
            backend: _OLD if known is None else known.get(backend, now)
            for entry in entries
            for backend in entry.endpoints
        }
        self._since[ref] = since
        steps = {b: step for b, at in since.items() if (step := _step(now - at, seconds)) < _STEPS}
        if not steps:
            return entries
        self._next[ref] = max(now + _PAUSE, _next_step(since, steps, seconds))
        self.steps[ref] = steps
        return slowed(entries, steps)


def slowed(entries: tuple[Entry, ...], steps: Mapping[Backend, int]) -> tuple[Entry, ...]:
    """The entries with so many tenths of their weights."""
    return tuple(_weighed(entry, steps) for entry in entries) if steps else entries


def told(steps: Steps) -> dict[str, dict[str, int]]:
    """For the status file, in percent."""
    return {
        str(ref): {endpoint_text(*backend): 10 * step for backend, step in sorted(found.items())}
        for ref, found in steps.items()
    }


def steps_of(status: Mapping[str, Mapping[str, int]]) -> Steps:
    """What `told` made of them."""
    return {
        ref: {_backend(text): percent // 10 for text, percent in found.items()}
        for key, found in status.items()
        if (ref := Ref.parse(key))
    }


def _backend(text: str) -> Backend:
    address, _, port = text.rpartition(":")
    return to_address(address.strip("[]")), int(port)


def _step(age: float, seconds: int) -> int:
    """From 1 to _STEPS."""
    return _STEPS if age >= seconds else 1 + int((_STEPS - 1) * max(age, 0.0) / seconds)


def _next_step(since: dict[Backend, float], steps: dict[Backend, int], seconds: int) -> float:
    return min(since[backend] + step * seconds / (_STEPS - 1) for backend, step in steps.items())


def _weighed(entry: Entry, steps: Mapping[Backend, int]) -> Entry:
    outside = entry.outside
    if steps.keys().isdisjoint((*entry.endpoints, *(outside.endpoints if outside else ()))):
        return entry
    weights = _slowed(entry.endpoints, entry.weights, steps)
    algorithm = entry.algorithm & ~_WEIGHTED | (_WEIGHTED if weights else 0)
    if outside:
        slow = _slowed(outside.endpoints, outside.weights, steps)
        outside = replace(outside, weights=slow)
    return replace(entry, weights=weights, algorithm=algorithm, outside=outside)


def _slowed(
    endpoints: Sequence[Backend], weights: Sequence[int], steps: Mapping[Backend, int]
) -> tuple[int, ...]:
    weights = weights or (USUAL_WEIGHT,) * len(endpoints)
    return differing(tuple(_parts(endpoints, weights, steps)))


def _parts(
    endpoints: Iterable[Backend], weights: Iterable[int], steps: Mapping[Backend, int]
) -> Iterable[int]:
    for backend, weight in zip(endpoints, weights, strict=True):
        # A weight of 0 says something else than a small one.
        of_zone = weight & ELSEWHERE
        weight -= of_zone
        yield of_zone | (weight and max(1, weight * steps.get(backend, _STEPS) // _STEPS))
