"""The commands map list and map dump: the pinned maps as they are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from pointsman import dump
from pointsman.cli import complete, options, show
from pointsman.errors import NotFound
from pointsman.inspect import plain
from pointsman.observe import map_rows
from pointsman.pins import Pins

HEADERS = ("NAME", "TYPE", "USED", "MAX", "FILL", "MEMORY")


def cells(rows: Iterable[dump.MapRow]) -> list[tuple[Any, ...]]:
    """What stands under HEADERS."""
    return [
        (
            row.name,
            row.type,
            row.used,
            row.max or None,
            None if row.fill_percent is None else f"{row.fill_percent}%",
            show.bytes_text(row.memory_bytes),
        )
        for row in rows
    ]


@click.group(name="map")
def map_group() -> None:
    """Look into the pinned maps.

    \b
    Examples:
        pointsman map list
        pointsman map dump frontends
    """


@map_group.command(name="list")
@show.output("table", "json", "yaml")
@options.bpffs
@show.reading
def map_list(form: str, bpffs: Path) -> None:
    """List the maps, how full they are and what memory they take.

    A bucket of 'sockets' holds several records: it is records that are counted. What 'datagrams'
    holds lives in the sockets themselves and can't be counted from outside.

    \b
    Example:
        pointsman map list -o json
    """
    generation = Pins(bpffs).require_current()
    with show.opened(bpffs) as view:
        rows = map_rows(view, generation)
    if form != "table":
        click.echo(show.structured({"kind": "MapList", "items": plain(rows)}, form))
        return
    for line in show.table(HEADERS, cells(rows)):
        click.echo(line)


@map_group.command(name="dump")
@click.argument("name", shell_complete=complete.maps)
@show.output("table", "json", "yaml")
@options.bpffs
@show.reading
def map_dump(name: str, form: str, bpffs: Path) -> None:
    """Print one map decoded, without its free elements.

    \b
    Examples:
        pointsman map dump services
        pointsman map dump sockets -o json
    """
    with show.opened(bpffs) as view:
        if name not in view.names_of_maps:
            known = ", ".join(view.names_of_maps)
            raise NotFound(f"no map {name!r}; there are {known}")
        rows = list(dump.DUMPS[name](view)) if name in dump.DUMPS else None
    if rows is None:
        show.note(f"{name} can't be listed: {dump.UNLISTED.get(name, 'its layout is not known')}")
    if form != "table":
        click.echo(show.structured({"kind": "MapDump", "map": name, "items": rows or []}, form))
    elif rows:
        for line in show.table(
            [_header(key) for key in rows[0]], [list(row.values()) for row in rows]
        ):
            click.echo(line)
    elif rows is not None:
        show.note(f"{name} is empty")


def _header(key: str) -> str:
    return "".join(f"-{letter}" if letter.isupper() else letter.upper() for letter in key)
