"""/metrics: kube-proxy's names where the meaning is the same, and our own. docs/metrics.md has all.

The numbers are kept by `Telemetry`; here they only get names, when somebody asks. One sync serves
both families, so what tells of a sync stands under ip_family IPv4 and under IPv6, as it would of
kube-proxy's two proxiers. A sum that can't be told apart has no ip_family at all, as before 1.33:
under both it would be counted twice.
"""

from __future__ import annotations

import gzip
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import inf

from prometheus_client import GCCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.registry import Collector, CollectorRegistry

from pointsman import __version__
from pointsman.telemetry.numbers import Histogram, Numbers
from pointsman.telemetry.packetnumbers import series

_FAMILIES = ("IPv4", "IPv6")
_Labels = tuple[str, ...]
_Samples = Iterable[tuple[_Labels, float]]
#: Below this a reply is one packet, and packing it is not worth the while.
_PACKED = 1400


class _Families(Collector):
    """What `Telemetry` knows as metric families. `read` gives a copy of the numbers."""

    def __init__(self, read: Callable[[], Numbers]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        numbers = self._read()
        yield from _kube_proxy(numbers)
        yield from _agent(numbers)
        yield from _watches(numbers)
        yield from _state(numbers)


def _kube_proxy(numbers: Numbers) -> Iterator[Metric]:
    """As in kube-proxy's pkg/proxy/metrics: names, labels, bounds."""
    sync, facts = "kubeproxy_sync_proxy_rules", numbers.facts
    yield _histogram(f"{sync}_duration_seconds", "Time of a sync", numbers.sync)
    yield _histogram(
        "kubeproxy_sync_full_proxy_rules_duration_seconds",
        "Time of a sync of all that is known",
        numbers.full_sync,
    )
    yield _histogram(
        "kubeproxy_sync_partial_proxy_rules_duration_seconds",
        "Time of a sync of what changed",
        numbers.partial_sync,
    )
    yield _histogram(
        "kubeproxy_network_programming_duration_seconds",
        "Time from the change of a Service or Pod, as the EndpointSlice has it, to the sync's end",
        numbers.programming,
    )
    for name, text, at in (
        ("last_timestamp_seconds", "When a sync succeeded last", numbers.last_sync),
        ("last_queued_timestamp_seconds", "When a sync was called for last", numbers.last_queued),
    ):
        yield _gauge(f"{sync}_{name}", text, ["ip_family"], (((f,), at) for f in _FAMILIES))
    for kind, pending, total in (
        ("endpoint", numbers.endpoints_pending, numbers.endpoints_total),
        ("service", numbers.services_pending, numbers.services_total),
    ):
        what = {"endpoint": "EndpointSlices", "service": "Services"}[kind]
        yield _gauge(
            f"{sync}_{kind}_changes_pending", f"Changes of {what} that wait", [], _one(pending)
        )
        yield _counter(f"{sync}_{kind}_changes_total", f"Changes of {what}", [], _one(total))
    # A gauge in kube-proxy, whatever its name says.
    yield _gauge(
        f"{sync}_no_local_endpoints_total",
        "Services without an endpoint under a traffic policy of Local",
        ["traffic_policy"],
        _by(facts.no_local),
    )
    for name, codes in (("healthz", numbers.healthz), ("livez", numbers.livez)):
        yield _counter(f"kubeproxy_proxy_{name}_total", f"Answers of /{name}", ["code"], _by(codes))
    reconciler = "kubeproxy_conntrack_reconciler"
    yield _histogram(
        f"{reconciler}_sync_duration_seconds", "Time of a look at conntrack", numbers.conntrack
    )
    yield _counter(
        f"{reconciler}_deleted_entries_total",
        "conntrack entries deleted",
        [],
        _one(facts.stale.get("flowsDeleted", 0)),
    )


def _agent(numbers: Numbers) -> Iterator[Metric]:
    yield _gauge(
        "pointsman_build_info",
        "1, by version",
        ["version", "python"],
        [((__version__, platform.python_version()), 1)],
    )
    yield _gauge(
        "pointsman_start_time_seconds", "When the agent started", [], _one(numbers.started)
    )
    stages = HistogramMetricFamily(
        "pointsman_sync_stage_duration_seconds", "Time of a part of a sync", labels=["stage"]
    )
    for name, histogram in sorted(numbers.stages.items()):
        stages.add_metric([name], _buckets(histogram), histogram.sum)
    yield stages
    yield _counter(
        "pointsman_sync_failures_total", "Syncs that failed", [], _one(numbers.sync_failures)
    )
    yield _counter(
        "pointsman_kubernetes_events_total",
        "Kubernetes Events, by what became of them",
        ["result"],
        _by(numbers.events),
    )


def _watches(numbers: Numbers) -> Iterator[Metric]:
    reach = numbers.reach
    silent = max(0.0, time.time() - reach.since) if reach and reach.error else 0.0
    yield _gauge(
        "pointsman_api_server_reachable",
        "1 while all watches run, 0 if not; nothing without an API server",
        [],
        _one(not reach.error) if reach else (),
    )
    yield _gauge(
        "pointsman_api_server_unreachable_seconds",
        "For how long the API server has not been reachable",
        [],
        _one(silent) if reach else (),
    )
    yield _counter(
        "pointsman_watch_events_total",
        "Watch events, bookmarks too",
        ["resource", "type"],
        numbers.watch_events.items(),
    )
    yield _counter(
        "pointsman_watch_relists_total",
        "Complete lists taken",
        ["resource"],
        _by(numbers.relists),
    )
    yield _counter(
        "pointsman_watch_failures_total",
        "Lists and watches that failed",
        ["resource", "reason"],
        numbers.watch_failures.items(),
    )
    yield _gauge(
        "pointsman_watch_last_contact_timestamp_seconds",
        "When a list, an event or a bookmark came last",
        ["resource"],
        _by(numbers.last_heard),
    )


def _state(numbers: Numbers) -> Iterator[Metric]:
    facts = numbers.facts
    for name, text, value in (
        ("services", "Services that are balanced", facts.services),
        ("frontends", "Frontends that are wanted", facts.frontends),
        ("endpoints", "Endpoints in the maps", facts.endpoints),
        ("endpoints_ejected", "Endpoints that failed and are ejected, or would be", facts.ejected),
    ):
        yield _gauge(f"pointsman_{name}", text, [], _one(value))
    for name, text, place in (("entries", "Elements in use", 0), ("capacity", "Room", 1)):
        by_map = (((map_,), pair[place]) for map_, pair in facts.maps.items())
        yield _gauge(f"pointsman_map_{name}", f"{text}, by map", ["map"], by_map)
    yield _counter(
        "pointsman_datapath_total",
        "What the programs count, as 'pointsman status' names it",
        ["counter"],
        _by(facts.counters),
    )
    for name, key, text in (
        ("checks", "checks", "Looks at sockets and flows for those whose endpoint left"),
        ("destroyed", "destroyed", "Sockets ended because their endpoint left"),
    ):
        yield _counter(
            f"pointsman_stale_sockets_{name}_total", text, [], _one(facts.stale.get(key, 0))
        )
    yield _counter(
        "pointsman_drained_connections_total",
        "Connections ended so that endpoints that joined get their share",
        [],
        _one(facts.drains.get("closed", 0)),
    )
    yield _gauge(
        "pointsman_drain_connections_left",
        "Connections that are still to be ended for that",
        [],
        _one(facts.drains.get("left", 0)),
    )
    for made in series(facts.packets):
        values = _by(made.values) if made.label else _one(made.values[""])
        labels = [made.label] if made.label else []
        yield (_counter if made.counter else _gauge)(made.name, made.text, labels, values)
    yield _gauge("pointsman_problems", "What to mend now", ["severity"], _by(facts.problems))
    yield _counter(
        "pointsman_dns_queries_total", "DNS queries answered", ["rcode"], _by(facts.dns_queries)
    )
    for name, text in (
        ("forwarded", "DNS queries passed on"),
        ("upstream_errors", "Upstreams that did not answer"),
        ("dropped", "DNS queries without an answer"),
        ("errors", "DNS queries that met a fault of the server"),
    ):
        values = _one(facts.dns[name]) if name in facts.dns else ()
        yield _counter(f"pointsman_dns_{name}_total", text, [], values)


def _one(value: float) -> _Samples:
    return [((), value)]


def _by(values: Mapping[str, float]) -> _Samples:
    return (((name,), value) for name, value in values.items())


def _gauge(name: str, text: str, labels: list[str], samples: _Samples) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, text: str, labels: list[str], samples: _Samples) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(name, text, labels=["ip_family"])
    buckets = _buckets(histogram)
    for ip_family in _FAMILIES:
        family.add_metric([ip_family], buckets, histogram.sum)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    return [(_le(bound), count) for bound, count in histogram.cumulative()]


def _le(bound: float) -> str:
    """The bound as Go's clients write it, so that series go on when kube-proxy leaves."""
    return "+Inf" if bound == inf else f"{bound:g}"


class Exposition:
    """The text of /metrics, of `read` and of this process. One for each agent."""

    def __init__(self, read: Callable[[], Numbers]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Families(read))
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def render(self, accept: str, accept_encoding: str) -> tuple[bytes, dict[str, str]]:
        """Body and headers: OpenMetrics for who asks for it, the text format otherwise."""
        return rendered(self.registry, accept, accept_encoding)


def rendered(source: Collector, accept: str, accept_encoding: str) -> tuple[bytes, dict[str, str]]:
    """What a collector says, as `accept` and `accept_encoding` want it."""
    encode, kind = choose_encoder(accept)
    body, headers = encode(source), {"Content-Type": kind, "Vary": "Accept-Encoding"}
    if len(body) > _PACKED and gzip_accepted(accept_encoding):
        body = gzip.compress(body, compresslevel=1)
        headers["Content-Encoding"] = "gzip"
    return body, headers
