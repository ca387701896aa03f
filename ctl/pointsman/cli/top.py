"""The command top: the endpoints that most is to be said of, first."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from pointsman.cli import names, options, show
from pointsman.cli.resources import BY_NAME, CHOICE, Column
from pointsman.endpointrows import EndpointRow
from pointsman.errors import NotFound
from pointsman.inspect import plain
from pointsman.weigh import READY

_ENDPOINTS = BY_NAME["endpoints"]
_COLUMNS: tuple[Column, ...] = (*_ENDPOINTS.columns, *CHOICE)
#: Each with the most first.
_ORDERS: dict[str, Callable[[EndpointRow], Any]] = {
    "open": lambda row: row.open,
    "connect": lambda row: row.connect_microseconds or 0,
    "failed": lambda row: (row.failures / max(row.connects, 1), row.failures),
    "state": lambda row: (row.state != READY, row.ejection is not None),
}


@click.command()
@click.argument("name", required=False)
@names.namespace
@click.option(
    "--sort-by",
    type=click.Choice(list(_ORDERS)),
    default="open",
    show_default=True,
    help="What comes first: most open connections, the longest connect time, the largest share of "
    "connects that failed, or who gets no connections now.",
)
@click.option(
    "--limit",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="How many endpoints are shown; 0 is all.",
)
@show.output("table", "json", "yaml")
@click.option("-w", "--watch", is_flag=True, help="Go on, and look again.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=2.0,
    show_default=True,
    help="Seconds between two looks of --watch.",
)
@options.bpffs
@show.reading
def top(
    name: str | None,
    namespace: str | None,
    sort_by: str,
    limit: int,
    form: str,
    watch: bool,
    interval: float,
    bpffs: Path,
) -> None:
    """Show the busiest endpoints, or the slowest, or those that fail.

    NAME is a Service's. OPEN are the connections of this node that are open now, CONNECT the
    connect time that choices reckon with, FAILED how many connects of late failed, of how many.
    STATE says who gets no connections now, until when and why.

    \b
    Examples:
        pointsman top
        pointsman top --sort-by failed
        pointsman top web -n shop --watch
        pointsman top --sort-by state --limit 0 -o json
    """
    if watch and form != "table":
        raise click.UsageError("--watch prints tables; try 'pointsman get endpoints -w -o json'")
    if name is not None:
        namespace, name = names.split(name, namespace)
    while True:
        rows, counters = _look(bpffs, namespace, name)
        rows.sort(key=_ORDERS[sort_by], reverse=True)
        shown = rows[:limit] if limit else rows
        if form != "table":
            click.echo(show.structured({"kind": _ENDPOINTS.kind, "items": plain(shown)}, form))
            return
        if watch:
            click.clear()  # on a terminal only
        for line in lines(rows, shown, counters):
            click.echo(line)
        if not watch:
            return
        time.sleep(interval)


def _look(
    bpffs: Path, namespace: str | None, name: str | None
) -> tuple[list[EndpointRow], dict[str, int]]:
    with show.opened(bpffs) as view:
        rows = _ENDPOINTS.select(view, namespace, name)
        if name is not None and not rows:
            known = any(each.service == name for each in view.names().values())
            if not known:
                raise NotFound(f"no Service {name} in the maps; see 'pointsman get services'")
        return rows, view.counters()


def lines(
    rows: Sequence[EndpointRow], shown: Sequence[EndpointRow], counters: dict[str, int]
) -> list[str]:
    """A line about all of them, then a table of those that are shown."""
    states = Counter(row.state for row in rows if row.state != READY)
    found = {
        "endpoints": len(rows),
        "open": sum(row.open for row in rows),
        **dict(sorted(states.items())),
        "connects refused for want of one": counters.get("all_full", 0),
    }
    cells = [[value(row) for _, value in _COLUMNS] for row in shown]
    text = ", ".join(f"{name}: {number}" for name, number in found.items())
    return [text, "", *show.table([header for header, _ in _COLUMNS], cells)]
