"""What `get` knows of each resource: its names, its columns, its rows. No terminal, no kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pointsman import inspect
from pointsman.inspect import EndpointRow, FrontendRow, Reader, ServiceRow

Row = Any  # one of the rows of pointsman.inspect
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

    def select(self, reader: Reader, namespace: str | None, name: str | None) -> list[Row]:
        """The rows of one namespace and one Service, or of all."""
        return [
            row
            for row in self.rows(reader)
            if namespace in (None, row.namespace) and name in (None, _service_of(row))
        ]

    def shown(self, form: str) -> tuple[Column, ...]:
        return self.columns + self.wide if form == "wide" else self.columns


def _service_of(row: ServiceRow | EndpointRow | FrontendRow) -> str:
    return row.name if isinstance(row, ServiceRow) else row.service


def _slots(row: FrontendRow) -> str:
    return f"{row.first_slot}-{row.first_slot + row.endpoints - 1}" if row.endpoints else ""


_NAMESPACE: Column = ("NAMESPACE", lambda row: row.namespace)

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
            ("CLUSTER-IP", lambda row: row.cluster_ips),
            ("PORT(S)", lambda row: row.ports),
            ("ENDPOINTS", lambda row: row.endpoints),
            ("OPEN", lambda row: row.open),
        ),
        wide=(
            ("ALGORITHM", lambda row: row.algorithms),
            ("AFFINITY", lambda row: f"{row.affinity_seconds}s" if row.affinity_seconds else ""),
            ("IDS", lambda row: row.ids),
        ),
    ),
    Resource(
        name="endpoints",
        kind="EndpointList",
        aliases=("endpoint", "ep"),
        rows=inspect.endpoints,
        key=lambda row: (row.namespace, row.service, row.port, row.endpoint),
        columns=(
            _NAMESPACE,
            ("NAME", lambda row: row.service),
            ("PORT", lambda row: row.port or "<unset>"),
            ("ENDPOINT", lambda row: row.endpoint),
            ("OPEN", lambda row: row.open),
        ),
        wide=(
            ("ID", lambda row: row.id),
            ("GENERATION", lambda row: row.generation),
            ("CURRENT", lambda row: row.current),
        ),
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
            ("ENDPOINTS", lambda row: row.endpoints or row.when_empty),
            ("OPEN", lambda row: row.open),
        ),
        wide=(
            ("ALGORITHM", lambda row: row.algorithm),
            ("AFFINITY", lambda row: f"{row.affinity_seconds}s" if row.affinity_seconds else ""),
            ("ID", lambda row: row.id),
            ("OWNER", lambda row: row.owner),
            ("SLOTS", _slots),
            ("CONSISTENT", lambda row: row.consistent),
        ),
    ),
)

BY_NAME = {name: each for each in RESOURCES for name in (each.name, *each.aliases)}


@dataclass(frozen=True, slots=True)
class Change:
    """As in a Kubernetes watch: type is ADDED, MODIFIED or DELETED."""

    type: str
    row: Row


def changes(resource: Resource, before: Iterable[Row], after: Iterable[Row]) -> list[Change]:
    """What differs between two looks, in the order of the later one; what is gone comes last."""
    old = {resource.key(row): row for row in before}
    found = []
    for row in after:
        known = old.pop(resource.key(row), None)
        if known is None:
            found.append(Change("ADDED", row))
        elif known != row:
            found.append(Change("MODIFIED", row))
    return found + [Change("DELETED", row) for row in old.values()]
