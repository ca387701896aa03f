"""What the agent and its source tell of themselves, as telemetry takes it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Facts:
    """The state of things at one moment: read at each scrape, replaced whole. Nothing in it is of
    one Service, so that a scrape costs the same with ten Services and ten thousand."""

    #: Services that are balanced, the frontends they have, and the endpoints that stand in maps.
    services: int = 0
    frontends: int = 0
    endpoints: int = 0
    #: Endpoints that are ejected, or would be where a Service only asks to observe.
    ejected: int = 0
    #: Elements in use and room for, by map.
    maps: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    #: What the programs count since the maps were made: enum counter of bpf/abi.h in lower case.
    counters: Mapping[str, int] = field(default_factory=dict)
    #: Services whose traffic policy Local leaves them without an endpoint, by "internal" and
    #: "external".
    no_local: Mapping[str, int] = field(default_factory=dict)
    #: LeftBehind.status(): "checks", "destroyed", "flowsDeleted".
    stale: Mapping[str, int] = field(default_factory=dict)
    #: Draining.status(): "closed", "left".
    drains: Mapping[str, int] = field(default_factory=dict)
    #: Problems that stand, by severity.
    problems: Mapping[str, int] = field(default_factory=dict)
    #: Queries that the DNS server answered, by rcode; and its other counters: "forwarded",
    #: "upstream_errors", "dropped", "errors".
    dns_queries: Mapping[str, int] = field(default_factory=dict)
    dns: Mapping[str, int] = field(default_factory=dict)
    #: Sweeper.status(), {} where no devices are served.
    packets: Mapping[str, Any] = field(default_factory=dict)


class Watched(Protocol):
    """What a source that watches tells, by resource ("services", "endpointslices"); any thread."""

    def relisted(self, resource: str) -> None: ...
    def event(self, resource: str, type: str) -> None: ...
    def bookmark(self, resource: str) -> None: ...
    def watch_failed(self, resource: str, reason: str) -> None: ...
