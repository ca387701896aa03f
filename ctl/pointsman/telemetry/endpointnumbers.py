"""What /metrics/endpoints shows of endpoints, as plain series: `endpointmetrics` gives them a form.
Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from pointsman.endpointpage import Shown

#: Of every series. An endpoint may stand behind two ports of its Service.
LABELS = ("namespace", "service", "port", "endpoint")
#: Values of the labels beyond LABELS, and the series' own.
Value = tuple[tuple[str, ...], float]


class Family(NamedTuple):
    """One gauge. `labels` come after LABELS; `values` gets an endpoint, and the seconds since 1970
    at which CLOCK_MONOTONIC was 0."""

    name: str
    text: str
    labels: tuple[str, ...]
    values: Callable[[Shown, float], Iterator[Value]]


def _open(each: Shown, _: float) -> Iterator[Value]:
    yield (), each.row.open


def _weight(each: Shown, _: float) -> Iterator[Value]:
    if each.row.weight is not None:
        yield (), each.row.weight


def _connect_time(each: Shown, _: float) -> Iterator[Value]:
    if each.row.connect_microseconds is not None:
        yield (), each.row.connect_microseconds / 1e6


def _connects(each: Shown, _: float) -> Iterator[Value]:
    yield (), each.row.connects


def _failures(each: Shown, _: float) -> Iterator[Value]:
    yield (), each.row.failures


def _in_a_row(each: Shown, _: float) -> Iterator[Value]:
    yield (), each.row.failures_in_a_row


def _state(each: Shown, _: float) -> Iterator[Value]:
    yield (each.row.state,), 1


def _ejected(each: Shown, _: float) -> Iterator[Value]:
    yield (), each.row.ejection is not None


def _reason(each: Shown, _: float) -> Iterator[Value]:
    if found := each.row.ejection:
        yield (found.reason, "observe" if found.observed else "on"), 1


def _until(each: Shown, zero: float) -> Iterator[Value]:
    if each.row.ejection:
        # Whole seconds: by the two clocks it would be another number each time.
        yield (), round(zero + each.until / 1e9)


def _times(each: Shown, _: float) -> Iterator[Value]:
    if found := each.row.ejection:
        yield (), found.times


FAMILIES = tuple(
    Family(f"pointsman_endpoint_{name}", text, labels, values)
    for name, text, labels, values in (
        ("open_connections", "Connections of this node that are open", (), _open),
        ("weight", "As it counts now; nothing where all are alike", (), _weight),
        (
            "connect_time_seconds",
            "Connect time that peak-ewma reckons with; nothing if it is not known",
            (),
            _connect_time,
        ),
        ("recent_connects", "Connects of late", (), _connects),
        ("recent_failed_connects", "Connects of late that failed", (), _failures),
        ("consecutive_failures", "Connects that failed in a row", (), _in_a_row),
        ("state", "1: whether it gets connections, and if not, why", ("state",), _state),
        ("ejected", "1 if ejected, or if it would be where a Service observes", (), _ejected),
        ("ejected_reason", "1: why, and whether that has an effect", ("reason", "mode"), _reason),
        ("ejected_until_timestamp_seconds", "When the ejection ends", (), _until),
        ("recent_ejections", "Of one that is ejected: how often it was of late", (), _times),
    )
)  # fmt: skip
