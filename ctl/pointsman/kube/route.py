"""Which URL of an API server to try next. Pure: `now` is given.

The agent may reach the API server through the Service `kubernetes`, whose ClusterIP it translates
itself. So that it never saws off that branch, the endpoints that this Service had last are dialled
directly when the configured URL fails: at a start when nobody translates yet, or when the Service
has no endpoints any more.
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

_AGAIN = 60.0  # seconds until the configured URL is tried again, once another one worked
_NAMES = ("kubernetes", "kubernetes.default", "kubernetes.default.svc")


def is_the_service(host: str, cluster_ips: Collection[str]) -> bool:
    """Whether a host is the Service default/kubernetes, by a name or an address of it."""
    return host in cluster_ips or host in _NAMES or host.startswith("kubernetes.default.svc.")


class Route:
    """The configured URL first, then the remembered ones, and what worked before anything else.

    The remembered ones are used only if `guarded`, that is, TLS verifies whoever answers there
    against the configured CA and the configured host's name (so that a token goes to no stranger
    who has the address by now) and no HTTP proxy stands between; and only if the configured host
    is the Service itself. Elsewhere an operator chose the way, perhaps on purpose.
    """

    def __init__(self, configured: str, *, cluster_ips: Collection[str], guarded: bool) -> None:
        self._configured = self.current = configured
        self._cluster_ips = set(cluster_ips)
        self._guarded = guarded
        self._remembered: tuple[str, ...] = ()
        self._again_at = 0.0
        self._reached = False

    def remember(self, cluster_ips: Collection[str], endpoints: Collection[str]) -> None:
        """Endpoints are never emptied: no endpoints any more is just when they are needed."""
        self._cluster_ips |= set(cluster_ips)
        if endpoints:
            self._remembered = tuple(endpoints)

    def order(self, now: float) -> list[str]:
        """All URLs, the best first."""
        found = [self.current]
        if self.current != self._configured and now >= self._again_at:
            found.insert(0, self._configured)
        if self._guarded and self._through_service:
            found += self._remembered
        return [*dict.fromkeys((*found, self._configured))]

    @property
    def _through_service(self) -> bool:
        return is_the_service(urlsplit(self._configured).hostname or "", self._cluster_ips)

    @property
    def mend(self) -> str:
        """What to do when none of the URLs answers. A ClusterIP that was never reached can't be
        told from another address."""
        mend = "give --api-server https://ADDRESS:6443 with the address of a real API server, for "
        mend += "a start at which nobody translates it"
        if self._through_service:
            return f"that is a ClusterIP: {mend}"
        asked = "is it up, and can this node reach it?"
        return asked if self._reached else f"{asked} If it is a ClusterIP, {mend}"

    def worked(self, url: str) -> None:
        self.current, self._reached = url, True

    def failed(self, url: str, now: float) -> None:
        if url == self._configured:
            self._again_at = now + _AGAIN
