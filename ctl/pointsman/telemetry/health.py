"""Whether this proxy is healthy and ready, as kube-proxy's pkg/proxy/healthcheck says it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pointsman.objects import Node

#: The cluster autoscaler puts it on a node that it is about to delete (KEP-3836).
TO_BE_DELETED = "ToBeDeletedByClusterAutoscaler"
_ZERO = "0001-01-01T00:00:00Z"  # Go's zero time


class Moment(NamedTuple):
    """One point in time by two clocks, in seconds: `steady` only goes forwards and measures ages,
    `epoch` (since 1970) is shown to people."""

    steady: float
    epoch: float


def rfc3339_nano(epoch: float) -> str:
    """As Go's time.RFC3339Nano in UTC: a fraction without trailing zeros, none if it is zero."""
    micros = round(epoch * 1_000_000)
    seconds, fraction = divmod(micros, 1_000_000)
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{fraction:06}".rstrip("0").rstrip(".") + "Z"


def is_eligible(node: Node) -> bool:
    """Whether load balancers should send new connections to this node. A node that is only
    cordoned (spec.unschedulable) goes on serving."""
    if node.metadata.deletion_timestamp is not None:
        return False
    return all(taint.key != TO_BE_DELETED for taint in node.spec.taints or ())


class ProxyHealth:
    """Healthy as long as no update waits for longer than `timeout` seconds to be in force.

    The oldest update that waits decides: a proxy that is always busy, but never done, is not
    healthy. One sync serves both families, so they share one fate.
    """

    def __init__(self, timeout: float = 60.0, families: Sequence[str] = ("IPv4", "IPv6")) -> None:
        self._timeout = timeout
        self._families = sorted(families)
        self._queued: float | None = None
        self._synced: Moment | None = None
        # Until the Node was seen nothing speaks against it.
        self._eligible = True
        self._loading = False

    def queued(self, now: Moment) -> None:
        """An update came in that is not in force yet."""
        if self._queued is None:
            self._queued = now.steady

    def synced(self, now: Moment) -> None:
        """All that was queued is in force. Also to be called at the start, as kube-proxy does:
        before that nothing can be late."""
        self._queued = None
        self._synced = now

    @property
    def waiting(self) -> bool:
        return self._queued is not None

    def node(self, eligible: bool) -> None:
        """What `is_eligible` says of this node; False if it does not exist any more."""
        self._eligible = eligible

    def loading(self, loading: bool) -> None:
        """Whether the programs for clients outside are still to be loaded, after those for sockets.
        Until then no load balancer should send anybody."""
        self._loading = loading

    def serves(self, now: Moment) -> bool:
        """Whether a load balancer may send new connections, as far as the proxy is concerned."""
        return self.healthy(now) and not self._loading

    def healthy(self, now: Moment) -> bool:
        if self._queued is None or self._synced is None:
            return True
        return now.steady - self._queued < self._timeout

    def answer(self, now: Moment, *, livez: bool = False) -> tuple[int, dict[str, Any]]:
        """Status code and body of /healthz, or of /livez: that one says nothing of the node, for
        a proxy on a node that is drained should not be started again."""
        proxy = self.healthy(now)
        healthy = proxy if livez else self.serves(now) and self._eligible
        synced = rfc3339_nano(self._synced.epoch) if self._synced else _ZERO
        current = rfc3339_nano(now.epoch)
        body: dict[str, Any] = {
            # "recent" if all is well, even if nothing changed for days, as in kube-proxy.
            "lastUpdated": current if healthy else synced,
            "currentTime": current,
        }
        if not livez:
            body["nodeEligible"] = self._eligible
        # In kube-proxy's body this one is of the proxy alone.
        body["healthy"] = proxy
        if self._synced:
            body["status"] = {
                family: {"lastUpdated": synced, "healthy": proxy} for family in self._families
            }
        return (200 if healthy else 503), body


class Readiness(NamedTuple):
    """What must have happened before new pods can rely on this node. Each stays true."""

    listed: bool = False
    written: bool = False
    attached: bool = False

    def answer(self, *, verbose: bool = False) -> tuple[int, str]:
        """Status code and text of /readyz, in the form of the API server's."""
        checks = (
            ("lists", self.listed, "not all lists are in"),
            ("maps", self.written, "the maps were not written in full yet"),
            ("programs", self.attached, "the programs are not attached"),
        )
        ready = all(self)
        if ready and not verbose:
            return 200, "ok"
        lines = [f"[+]{name} ok" if ok else f"[-]{name} failed: {why}" for name, ok, why in checks]
        return (200 if ready else 503), "\n".join(
            [*lines, f"readyz check {'passed' if ready else 'failed'}", ""]
        )
