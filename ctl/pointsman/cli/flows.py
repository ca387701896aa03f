"""`get conntrack` and `get nat`: flows, printed as they are read, however many there are."""

from __future__ import annotations

import itertools
import json
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from pointsman.cli import show
from pointsman.cli.resources import Resource
from pointsman.errors import NotFound
from pointsman.flowrows import FlowRow, PortRow, flow_row, port_rows
from pointsman.flows import Filter, PortUse
from pointsman.inspect import plain
from pointsman.packetmaps import PacketMaps, now
from pointsman.pins import Pins
from pointsman.values import Address, PortName, to_address
from pointsman.view import port_name_of

#: Rows that are laid out together, and put in order if there are no more.
_CHUNK = 1000
_u32 = struct.Struct("=I")
_PORTS: tuple[tuple[str, Callable[[PortRow], Any]], ...] = (
    ("NODE", lambda row: row.node),
    ("ENDPOINT", lambda row: row.endpoint),
    ("PROTOCOL", lambda row: row.protocol),
    ("PORTS-USED", lambda row: row.used),
    ("AVAILABLE", lambda row: row.available),
    ("USED", lambda row: f"{row.percent}%"),
)


def client_address(
    _context: click.Context, _param: click.Parameter, value: str | None
) -> Address | None:
    """Of --client."""
    try:
        return None if value is None else to_address(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def print_flows(
    bpffs: Path,
    resource: Resource,
    namespace: str | None,
    service: str | None,
    client: Address | None,
    form: str,
) -> None:
    """Every flow, or for `get nat` those that use a port of this node, of one namespace, Service
    and client. Raises NotLoaded, and NotFound for a Service that the maps don't have."""
    maps = PacketMaps(Pins(bpffs).require_current().packets.maps)
    try:
        names = names_of(maps)
        owners = owners_of(names, namespace, service)
        if service is not None and not owners:
            where = f" in namespace {namespace}" if namespace else ""
            raise NotFound(f"no Service {service}{where} in the maps; see 'pointsman get services'")
        nat = resource.name == "nat"
        used: Counter[PortUse] = Counter()
        rows = _rows(maps, names, Filter(owners, client), used if nat else None)
        printed = _PRINTERS[form](resource, form, rows)
        ports = port_rows(used, maps.ports) if nat else []
        if form == "json":
            click.echo(f'], "ports": {json.dumps(plain(ports))}}}' if nat else "]}")
        elif form == "yaml" and nat:
            click.echo(show.structured({"ports": plain(ports)}, form))
        elif ports and form != "yaml":
            click.echo()
            cells = [[value(row) for _, value in _PORTS] for row in ports]
            for line in show.table([header for header, _ in _PORTS], cells):
                click.echo(line)
        elif not printed and form != "yaml":
            show.note("No flows found.")
    finally:
        maps.close()


def names_of(maps: PacketMaps) -> dict[int, PortName]:
    found = maps.map("names").items()
    return {_u32.unpack(key)[0]: port_name_of(value) for key, value in found}


def owners_of(
    names: dict[int, PortName], namespace: str | None, service: str | None
) -> frozenset[int] | None:
    """The ids of a Service's ports; None is all."""
    if namespace is None and service is None:
        return None
    return frozenset(
        ident
        for ident, name in names.items()
        if namespace in (None, name.namespace) and service in (None, name.service)
    )


def _rows(
    maps: PacketMaps, names: dict[int, PortName], wanted: Filter, used: Counter[PortUse] | None
) -> Iterator[FlowRow]:
    timeouts, at = maps.timeouts, now()
    for flow in maps.all(wanted):
        if used is not None:
            if (use := flow.port_used) is None:
                continue
            used[use] += 1
        yield flow_row(flow, names, timeouts, at)


# -- forms: each says how many rows it printed --------------------------------------------------


def _chunks(resource: Resource, rows: Iterator[FlowRow]) -> Iterator[Sequence[FlowRow]]:
    """In order if they are few; else as they come, for sorting would mean keeping them all."""
    chunk = list(itertools.islice(rows, _CHUNK))
    following = list(itertools.islice(rows, _CHUNK))
    if not following:
        chunk.sort(key=resource.key)
    while chunk:
        yield chunk
        chunk, following = following, list(itertools.islice(rows, _CHUNK))


def _table(resource: Resource, form: str, rows: Iterator[FlowRow]) -> int:
    columns = resource.shown(form)
    sizes = show.widths([[header for header, _ in columns]])
    printed = 0
    for chunk in _chunks(resource, rows):
        lines = [[show.text_of(value(row)) for _, value in columns] for row in chunk]
        if not printed:
            lines.insert(0, [header for header, _ in columns])
        sizes = show.widths(lines, sizes)
        click.echo("\n".join(show.aligned(lines, sizes)))
        printed += len(chunk)
    return printed


def _json(resource: Resource, _form: str, rows: Iterator[FlowRow]) -> int:
    """Left open: what comes after the items is for the caller."""
    click.echo(f'{{"kind": "{resource.kind}", "items": [')
    printed = 0
    for chunk in _chunks(resource, rows):
        text = ",\n".join(json.dumps(plain(row)) for row in chunk)
        click.echo(f",\n{text}" if printed else text)
        printed += len(chunk)
    return printed


def _yaml(resource: Resource, form: str, rows: Iterator[FlowRow]) -> int:
    click.echo(f"kind: {resource.kind}\nitems:", nl=False)
    printed = 0
    for chunk in _chunks(resource, rows):
        click.echo(("" if printed else "\n") + show.structured(plain(chunk), form))
        printed += len(chunk)
    if not printed:
        click.echo(" []")
    return printed


_PRINTERS: dict[str, Callable[[Resource, str, Iterator[FlowRow]], int]] = {
    "table": _table,
    "wide": _table,
    "json": _json,
    "yaml": _yaml,
}
