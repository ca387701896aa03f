"""/metrics/endpoints: a page of endpoints in Prometheus' form. docs/metrics.md has all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from pointsman.endpointpage import Page
from pointsman.telemetry.endpointnumbers import FAMILIES, LABELS, Family
from pointsman.telemetry.metrics import rendered


class _Samples:
    """Made when they are read, so that there is a rest between them and never all of them."""

    def __init__(self, family: Family, page: Page, zero: float, rest: Callable[[], None]) -> None:
        self._family, self._page, self._zero, self._rest = family, page, zero, rest

    def __iter__(self) -> Iterator[Sample]:
        name, _, more, values = self._family
        labels = (*LABELS, *more)
        for each in self._page.shown:
            self._rest()
            row = each.row
            own = (row.namespace, row.service, row.port, row.endpoint)
            for further, value in values(each, self._zero):
                yield Sample(name, dict(zip(labels, (*own, *further), strict=True)), value)


class EndpointFamilies(Collector):
    """`zero`: seconds since 1970 at which CLOCK_MONOTONIC was 0. `rest`: as in endpointpage."""

    def __init__(self, page: Page, zero: float, rest: Callable[[], None]) -> None:
        self._page, self._zero, self._rest = page, zero, rest

    def collect(self) -> Iterator[Metric]:
        page = self._page
        for family in FAMILIES:
            metric = GaugeMetricFamily(family.name, family.text, labels=())
            metric.samples = cast(Any, _Samples(family, page, self._zero, self._rest))
            yield metric
        left_out = "pointsman_endpoint_metrics_left_out"
        text = "Endpoints that are not shown, for the limit is reached"
        yield GaugeMetricFamily(left_out, text, page.left_out)
        known = GaugeMetricFamily(
            "pointsman_endpoint_metrics_service_known",
            "1 if there is such a Service, of those that were asked for",
            labels=("namespace", "service"),
        )
        for service, is_there in page.known.items():
            known.add_metric(service, is_there)
        yield known


def render(
    page: Page, zero: float, rest: Callable[[], None], accept: str, accept_encoding: str
) -> tuple[bytes, dict[str, str]]:
    """Body and headers, as of /metrics."""
    return rendered(EndpointFamilies(page, zero, rest), accept, accept_encoding)
