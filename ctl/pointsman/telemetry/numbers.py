"""What is counted and timed between two scrapes: plain numbers, cheap to write. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pointsman.events import Reach
from pointsman.telemetry.facts import Facts

#: kube-proxy's ExponentialBuckets(0.001, 2, 15), in seconds.
SYNC_BOUNDS = tuple(0.001 * 2**i for i in range(15))
#: kube-proxy's for the network programming latency, in seconds: two below a second, each second of
#: the first minute, each five of the second, each thirty up to five minutes.
PROGRAMMING_BOUNDS = (0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30))
#: A stage of a small sync takes less than kube-proxy's first bucket.
STAGE_BOUNDS = tuple(0.0001 * 4**i for i in range(9))


class Histogram:
    """Observations by upper bound (inclusive, as `le` is), and their sum."""

    __slots__ = ("_counts", "bounds", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """(bound, observations up to it); the last bound is infinite."""
        total = 0
        for bound, count in zip((*self.bounds, float("inf")), self._counts, strict=True):
            total += count
            yield float(bound), total

    def copy(self) -> Histogram:
        other = Histogram(self.bounds)
        other._counts, other.sum = self._counts[:], self.sum
        return other


@dataclass(slots=True)
class Numbers:
    """Everything that /metrics shows, apart from the process itself. Times are seconds, points in
    time seconds since 1970 (0.0: not yet)."""

    started: float = 0.0
    sync: Histogram = field(default_factory=lambda: Histogram(SYNC_BOUNDS))
    full_sync: Histogram = field(default_factory=lambda: Histogram(SYNC_BOUNDS))
    partial_sync: Histogram = field(default_factory=lambda: Histogram(SYNC_BOUNDS))
    programming: Histogram = field(default_factory=lambda: Histogram(PROGRAMMING_BOUNDS))
    conntrack: Histogram = field(default_factory=lambda: Histogram(SYNC_BOUNDS))
    stages: dict[str, Histogram] = field(default_factory=dict)
    last_sync: float = 0.0
    last_queued: float = 0.0
    sync_failures: int = 0
    services_pending: int = 0
    services_total: int = 0
    endpoints_pending: int = 0
    endpoints_total: int = 0
    #: By code; by resource and type; by resource; by resource and reason; by result.
    healthz: Counter[str] = field(default_factory=Counter)
    livez: Counter[str] = field(default_factory=Counter)
    watch_events: Counter[tuple[str, str]] = field(default_factory=Counter)
    relists: Counter[str] = field(default_factory=Counter)
    watch_failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    #: When the API server last said anything, by resource.
    last_heard: dict[str, float] = field(default_factory=dict)
    reach: Reach | None = None
    facts: Facts = field(default_factory=Facts)

    def copy(self) -> Numbers:
        """To be read at leisure: shares only what is never changed."""
        own = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if name == "stages":
                value = {stage: histogram.copy() for stage, histogram in value.items()}
            elif isinstance(value, Histogram | dict):
                value = value.copy()
            own[name] = value
        return Numbers(**own)
