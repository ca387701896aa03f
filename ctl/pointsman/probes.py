"""What others may ask of this node: its health, its metrics, the health checks of Services."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pointsman.context import Context
from pointsman.dns import DnsServer
from pointsman.endpointpage import Source
from pointsman.events import Problem
from pointsman.objects import Ref
from pointsman.settings import Settings
from pointsman.sync import Sync
from pointsman.telemetry import Facts, Telemetry
from pointsman.telemetry.http import HttpLoop
from pointsman.telemetry.nodehealth import NodeHealth, checks, listen_addresses
from pointsman.telemetry.servers import HttpServers
from pointsman.tracker import Tracker


class Probes:
    """Servers on one thread of their own; the methods belong to the agent's."""

    def __init__(
        self, settings: Settings, telemetry: Telemetry, changed: Callable[[], None]
    ) -> None:
        """`changed` is called, on the servers' thread, when `problems` or `failed` may differ."""
        self.settings = settings
        self._telemetry = telemetry
        self._loop = HttpLoop(changed)
        self._context: Context | None = None
        self._servers = HttpServers(
            self._loop,
            telemetry,
            healthz=[settings.healthz] if settings.healthz else (),
            metrics=[settings.metrics] if settings.metrics else (),
            config=lambda: _plain(self.settings),
        )
        self._node_health = NodeHealth(
            self._loop, telemetry.proxy_healthy, node_name=settings.node_name
        )
        self.start = self._loop.start

    def stop(self) -> None:
        self._servers.stop()
        self._loop.stop()

    def show(self, maps: Source) -> None:
        """Whose endpoints may be asked for from now on; they are read on another thread."""
        self._servers.source = maps

    @property
    def failed(self) -> str:
        """Why nobody answers any more, "" as long as somebody does."""
        return self._loop.failed

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What can't be asked, and why."""
        return *self._servers.problems, *self._node_health.problems

    def follow(self, touched: Iterable[Ref], tracker: Tracker, context: Context) -> None:
        """These objects are in the maps as they are now."""
        if context is not self._context:
            self._context = context
            self._node_health.move(listen_addresses(context))
        for ref in touched:
            if ref.kind == "Service":
                service = tracker.services.get(ref)
                found = service and checks(service, tracker.slices(ref), context)
                self._node_health.want(ref, found or None)
            elif ref.kind == "Node" and ref.name == context.node_name:
                self._telemetry.node(tracker.nodes.get(ref))

    def tell(
        self,
        sync: Sync,
        services: int,
        stale: Mapping[str, Any],
        drains: Mapping[str, Any],
        dns: DnsServer | None,
        problems: Iterable[Problem],
        packets: Mapping[str, Any] | None = None,
    ) -> None:
        """How things are, for the metrics. `packets`: Sweeper.status(), None without devices."""
        usage = sync.usage()
        self._telemetry.facts(
            Facts(
                services=services,
                frontends=usage["frontends"][0],
                endpoints=usage["load"][0],
                ejected=sync.maps.ejected_in_all(),
                maps=usage,
                counters=sync.maps.counters(),
                no_local=sync.no_local_endpoints(),
                stale={name: value for name, value in stale.items() if isinstance(value, int)},
                drains={name: value for name, value in drains.items() if isinstance(value, int)},
                problems=Counter(problem.severity for problem in problems),
                packets=packets or {},
                **_dns(dns),
            )
        )


def _dns(dns: DnsServer | None) -> dict[str, Any]:
    if dns is None:
        return {}
    found = {
        field.name: value
        for field in dataclasses.fields(dns.counters)
        if isinstance(value := getattr(dns.counters, field.name), int)
    }
    return {"dns_queries": dict(dns.counters.queries), "dns": found}


def _plain(settings: Settings) -> dict[str, Any]:
    """For /configz: JSON's types."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)

    found: dict[str, Any] = plain(dataclasses.asdict(settings))
    return {"pointsman.io/v1alpha1": found}
