"""What `get` knows of each resource: its names, its columns, its rows. No terminal, no kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pointsman import affinityrows, endpointrows, inspect
from pointsman.affinityrows import AffinityRow
from pointsman.cli.show import duration_text
from pointsman.endpointrows import EndpointRow
from pointsman.flowrows import FlowRow
from pointsman.inspect import FrontendRow, Reader, ServiceRow

Row = Any  # one of the rows of pointsman.inspect, or a FlowRow
Column = tuple[str, Callable[[Row], Any]]


@dataclass(frozen=True, slots=True)
class Resource:
    """One thing to `get`. `wide` columns come after the others."""

    name: str
    kind: str
    aliases: tuple[str, ...]
    rows: Callable[[Reader], Sequence[Row]]
    key: Callable[[Row], tuple[Any, ...]]
    columns: tuple[Column, ...]
    wide: tuple[Column, ...]
    #: Too many to hold, so cli/flows.py prints them as they are read, and `rows` has none.
    flows: bool = False

    def select(self, reader: Reader, namespace: str | None, name: str | None) -> list[Row]:
        """The rows of one namespace and one Service, or of all."""
        return [
            row
            for row in self.rows(reader)
            if namespace in (None, row.namespace) and name in (None, _service_of(row))
        ]

    def shown(self, form: str) -> tuple[Column, ...]:
        return self.columns + self.wide if form == "wide" else self.columns


def _service_of(row: ServiceRow | EndpointRow | FrontendRow | AffinityRow) -> str:
    return row.name if isinstance(row, ServiceRow) else row.service


def _slots(row: FrontendRow) -> str:
    return f"{row.first_slot}-{row.first_slot + row.endpoints - 1}" if row.endpoints else ""


def _outside(row: FrontendRow) -> str:
    """How many endpoints clients outside get, and under which conditions."""
    if not row.packets:
        return ""
    found = str(row.outside_endpoints) if row.outside_endpoints else row.outside_when_empty
    return ",".join((found, *(word for word in row.packets if word != "outside")))


def _left(row: AffinityRow) -> str:
    """What is left of the timeout, or why the next connection chooses anew."""
    if row.state == "valid":
        return duration_text(row.left_seconds)
    return "<expired>" if row.state == "expired" else "<endpoint left>"


def connect_time(microseconds: int | None) -> str:
    """0.25ms, 12ms, 1.5s."""
    if microseconds is None:
        return ""
    milliseconds = microseconds / 1000
    return f"{milliseconds:.3g}ms" if milliseconds < 999.5 else f"{milliseconds / 1000:.3g}s"


def _halves(row: FlowRow) -> str:
    """A flow of which one half is missing is served in one direction only, if at all."""
    return row.state if row.halves == "both" else f"{row.state} ({row.halves} only)"


def _flow_key(row: FlowRow) -> tuple[Any, ...]:
    return (row.namespace, row.service, row.port, row.client, row.vip, row.protocol)


_NAMESPACE: Column = ("NAMESPACE", lambda row: row.namespace)
_SERVICE_PORT: Column = ("SERVICE", lambda row: row.full_name)
_PROTOCOL: Column = ("PROTOCOL", lambda row: row.protocol)
_STATE: Column = ("STATE", _halves)
_IDLE: Column = ("IDLE", lambda row: duration_text(row.idle_seconds))
_EXPIRES: Column = ("EXPIRES", lambda row: duration_text(row.expires_seconds))

OPEN: Column = ("OPEN", lambda row: row.open)
#: Of an endpoint: how the kernel knows it, and what a choice looks at.
IN_KERNEL: tuple[Column, ...] = (
    ("ID", lambda row: row.id),
    ("GENERATION", lambda row: row.generation),
    ("CURRENT", lambda row: row.current),
)
CHOICE: tuple[Column, ...] = (
    ("WEIGHT", lambda row: row.weight),
    ("CONNECT", lambda row: connect_time(row.connect_microseconds)),
    ("FAILED", lambda row: f"{row.failures}/{row.connects}"),
    ("STATE", lambda row: endpointrows.state_text(row.state, row.ejection)),
)

RESOURCES = (
    Resource(
        name="services",
        kind="ServiceList",
        aliases=("service", "svc"),
        rows=inspect.services,
        key=lambda row: (row.namespace, row.name),
        columns=(
            _NAMESPACE,
            ("NAME", lambda row: row.name),
            ("TYPE", lambda row: row.type),
            ("CLUSTER-IP", lambda row: row.cluster_ips),
            ("EXTERNAL-IP", lambda row: row.external_ips),
            ("PORT(S)", lambda row: row.ports),
            ("ENDPOINTS", lambda row: row.endpoints),
            ("OPEN", lambda row: row.open),
        ),
        wide=(
            ("ALGORITHM", lambda row: row.algorithms),
            ("CHOICE", lambda row: row.choice),
            ("EJECTED", lambda row: row.ejected),
            ("AFFINITY", lambda row: f"{row.affinity_seconds}s" if row.affinity_seconds else ""),
            ("IDS", lambda row: row.ids),
        ),
    ),
    Resource(
        name="endpoints",
        kind="EndpointList",
        aliases=("endpoint", "ep"),
        rows=lambda reader: endpointrows.endpoints(reader, time.monotonic_ns()),
        key=lambda row: (row.namespace, row.service, row.port, row.endpoint),
        columns=(
            _NAMESPACE,
            ("NAME", lambda row: row.service),
            ("PORT", lambda row: row.port or "<unset>"),
            ("ENDPOINT", lambda row: row.endpoint),
            OPEN,
        ),
        wide=(*IN_KERNEL, *CHOICE),
    ),
    Resource(
        name="frontends",
        kind="FrontendList",
        aliases=("frontend", "fe"),
        rows=inspect.frontends,
        key=lambda row: (row.frontend,),
        columns=(
            _NAMESPACE,
            ("NAME", lambda row: row.service),
            ("PORT", lambda row: "*" if row.wildcard else row.port_name or "<unset>"),
            ("FRONTEND", lambda row: row.frontend),
            ("KIND", lambda row: row.kind),
            ("FLAGS", lambda row: row.flags),
            ("ENDPOINTS", lambda row: row.endpoints or row.when_empty),
            ("OPEN", lambda row: row.open),
        ),
        wide=(
            ("ALGORITHM", lambda row: row.algorithm),
            ("CHOICE", lambda row: row.choice),
            ("AFFINITY", lambda row: f"{row.affinity_seconds}s" if row.affinity_seconds else ""),
            ("ID", lambda row: row.id),
            ("OWNER", lambda row: row.owner),
            ("SLOTS", _slots),
            ("OUTSIDE", _outside),
            ("TABLE", lambda row: row.table_entries or ""),
            ("CONSISTENT", lambda row: row.consistent),
        ),
    ),
    Resource(
        name="affinity",
        kind="AffinityList",
        aliases=("aff",),
        rows=lambda reader: affinityrows.affinity(reader, time.monotonic_ns()),
        key=lambda row: (row.namespace, row.service, row.port, row.family, row.netns),
        columns=(
            _NAMESPACE,
            ("NAME", lambda row: row.service),
            ("PORT", lambda row: row.port or "<unset>"),
            ("CLIENT", lambda row: row.client),
            ("FAMILY", lambda row: row.family),
            ("ENDPOINT", lambda row: row.endpoint),
            ("AGE", lambda row: duration_text(row.age_seconds)),
            ("LEFT", _left),
        ),
        wide=(
            ("TIMEOUT", lambda row: f"{row.timeout_seconds}s"),
            ("NETNS", lambda row: row.netns),
        ),
    ),
    Resource(
        name="conntrack",
        kind="FlowList",
        aliases=("ct", "flows"),
        rows=lambda reader: (),
        key=_flow_key,
        columns=(
            _SERVICE_PORT,
            _PROTOCOL,
            ("CLIENT", lambda row: row.client),
            ("VIP", lambda row: row.vip),
            ("ENDPOINT", lambda row: row.endpoint),
            ("PATH", lambda row: row.path),
            _STATE,
            _IDLE,
            _EXPIRES,
        ),
        wide=(("NODE", lambda row: row.node),),
        flows=True,
    ),
    Resource(
        name="nat",
        kind="NatList",
        aliases=("snat",),
        rows=lambda reader: (),
        key=lambda row: (row.node, row.endpoint, row.protocol, row.client),
        columns=(
            ("NODE", lambda row: row.node),
            ("ENDPOINT", lambda row: row.endpoint),
            _PROTOCOL,
            ("CLIENT", lambda row: row.client),
            _SERVICE_PORT,
            _STATE,
        ),
        wide=(("VIP", lambda row: row.vip), _IDLE, _EXPIRES),
        flows=True,
    ),
)

BY_NAME = {name: each for each in RESOURCES for name in (each.name, *each.aliases)}


@dataclass(frozen=True, slots=True)
class Change:
    """As in a Kubernetes watch: type is ADDED, MODIFIED or DELETED."""

    type: str
    row: Row


def changes(
    resource: Resource,
    before: Iterable[Row],
    after: Iterable[Row],
    seen: Callable[[Row], Any] = lambda row: row,
) -> list[Change]:
    """What differs between two looks, in the order of the later one; what is gone comes last.
    `seen` is what of a row counts."""
    old = {resource.key(row): row for row in before}
    found = []
    for row in after:
        known = old.pop(resource.key(row), None)
        if known is None:
            found.append(Change("ADDED", row))
        elif seen(known) != seen(row):
            found.append(Change("MODIFIED", row))
    return found + [Change("DELETED", row) for row in old.values()]
