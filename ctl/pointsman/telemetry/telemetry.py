"""Telemetry: what the agent, its source and its recorder tell, kept for whoever asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from pointsman.events import Reach
from pointsman.objects import Node
from pointsman.telemetry.facts import Facts
from pointsman.telemetry.health import Moment, ProxyHealth, Readiness, is_eligible
from pointsman.telemetry.numbers import STAGE_BOUNDS, Histogram, Numbers

#: The stage that is kube-proxy's conntrack reconciler.
CONNTRACK = "conntrack"


class Telemetry:
    """Any thread may call anything; each call takes microseconds and raises nothing. Nothing is
    rendered, and prometheus_client not even imported, until somebody asks.

    `health_timeout`, in seconds: how long an update may wait to be in force.
    """

    def __init__(self, health_timeout: float = 60.0) -> None:
        self._lock = threading.Lock()
        self._health = ProxyHealth(health_timeout)
        self._ready = Readiness()
        self._seen = False
        now = _now()
        self._health.synced(now)
        self._numbers = Numbers(started=now.epoch)

    # -- the agent ---------------------------------------------------------------------------

    def queued(self, services: int, endpoints: int) -> None:
        """So many changes of Services and of EndpointSlices came in, to be put in force; or, with
        0 and 0, something else that calls for a sync."""
        now = _now()
        with self._lock:
            self._health.queued(now)
            numbers = self._numbers
            numbers.last_queued = now.epoch
            numbers.services_pending += services
            numbers.services_total += services
            numbers.endpoints_pending += endpoints
            numbers.endpoints_total += endpoints

    def stage(self, name: str, seconds: float) -> None:
        """A part of the work took so long: "resolve", "plan", "apply", "conntrack"."""
        with self._lock:
            if name == CONNTRACK:
                self._numbers.conntrack.observe(seconds)
                return
            if (stage := self._numbers.stages.get(name)) is None:
                stage = self._numbers.stages[name] = Histogram(STAGE_BOUNDS)
            stage.observe(seconds)

    def synced(self, full: bool, seconds: float, triggers: Sequence[float] = ()) -> None:
        """All that was queued is in force. `triggers`: for each EndpointSlice that changed, the
        seconds since 1970 of its endpoints.kubernetes.io/last-change-trigger-time."""
        now = _now()
        with self._lock:
            numbers = self._numbers
            numbers.sync.observe(seconds)
            (numbers.full_sync if full else numbers.partial_sync).observe(seconds)
            for trigger in triggers:
                # By the clocks of two machines: what took less than nothing took no time.
                numbers.programming.observe(max(0.0, now.epoch - trigger))
            self._caught_up(now)
            if full:
                self._ready = self._ready._replace(written=True)

    def settled(self) -> None:
        """What was queued calls for no sync: nothing of it changes what is in force."""
        with self._lock:
            if self._health.waiting:
                self._caught_up(_now())

    def _caught_up(self, now: Moment) -> None:
        self._health.synced(now)
        numbers = self._numbers
        numbers.last_sync = now.epoch
        numbers.services_pending = numbers.endpoints_pending = 0

    def failed(self) -> None:
        """A sync failed; what was queued still waits, also if that came in while a sync before
        this one ran and was taken for done with it."""
        with self._lock:
            self._health.queued(_now())
            self._numbers.sync_failures += 1

    def loading(self, loading: bool) -> None:
        """Whether clients outside are not served yet, for their programs are still to be loaded."""
        with self._lock:
            self._health.loading(loading)

    def listed(self) -> None:
        with self._lock:
            self._ready = self._ready._replace(listed=True)

    def attached(self) -> None:
        with self._lock:
            self._ready = self._ready._replace(attached=True)

    def node(self, node: Node | None) -> None:
        """This node as it is now. None before it was ever seen says nothing; after that it means
        that it was deleted."""
        with self._lock:
            self._seen |= node is not None
            self._health.node(is_eligible(node) if node else not self._seen)

    def reach(self, reach: Reach) -> None:
        with self._lock:
            self._numbers.reach = reach

    def facts(self, facts: Facts) -> None:
        with self._lock:
            self._numbers.facts = facts

    # -- the source (facts.Watched) ----------------------------------------------------------

    def relisted(self, resource: str) -> None:
        with self._lock:
            self._numbers.relists[resource] += 1
            self._numbers.last_heard[resource] = time.time()

    def event(self, resource: str, type: str) -> None:
        with self._lock:
            self._numbers.watch_events[resource, type] += 1
            self._numbers.last_heard[resource] = time.time()

    def bookmark(self, resource: str) -> None:
        self.event(resource, "BOOKMARK")

    def watch_failed(self, resource: str, reason: str) -> None:
        """`reason`: one of few words, never a message: each becomes a series of its own."""
        with self._lock:
            self._numbers.watch_failures[resource, reason] += 1

    # -- the recorder ------------------------------------------------------------------------

    def recorded(self, result: str) -> None:
        """What became of a Kubernetes Event: one of recorder.RESULTS."""
        with self._lock:
            self._numbers.events[result] += 1

    # -- who asks ----------------------------------------------------------------------------

    def healthz(self) -> tuple[int, dict[str, Any]]:
        with self._lock:
            code, body = self._health.answer(_now())
            self._numbers.healthz[str(code)] += 1
        return code, body

    def livez(self) -> tuple[int, dict[str, Any]]:
        with self._lock:
            code, body = self._health.answer(_now(), livez=True)
            self._numbers.livez[str(code)] += 1
        return code, body

    def readyz(self, *, verbose: bool = False) -> tuple[int, str]:
        with self._lock:
            return self._ready.answer(verbose=verbose)

    def proxy_healthy(self) -> bool:
        """For the checks of load balancers: what /healthz would say if not for the node, without
        counting it."""
        with self._lock:
            return self._health.serves(_now())

    def numbers(self) -> Numbers:
        """A copy."""
        with self._lock:
            return self._numbers.copy()


def _now() -> Moment:
    return Moment(time.monotonic(), time.time())
