"""The command trace: decisions about packets, as the programs make them."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from pointsman.cli import complete, flows, names, options, show
from pointsman.decisions import Event, protocol_name, tuple_text
from pointsman.packetmaps import device_name, now
from pointsman.pins import Pins
from pointsman.tracing import Tracer
from pointsman.values import Address, PortName

_HEADERS = ("TIME", "HOOK", "DEVICE", "PROTOCOL", "BEFORE", "AFTER", "VERDICT", "SERVICE")


@click.command()
@click.option(
    "--service",
    metavar="NS/NAME",
    shell_complete=complete.full_names,
    help="Only packets of this Service.",
)
@click.option(
    "--client",
    metavar="ADDRESS",
    callback=flows.client_address,
    help="Only packets from or to this address, before or after translation.",
)
@click.option("--drops", is_flag=True, help="Only packets that went no further.")
@click.option(
    "--count", type=click.IntRange(min=1), metavar="N", help="End after so many were printed."
)
@show.output("table", "json")
@options.bpffs
@show.reading
def trace(
    service: str | None,
    client: Address | None,
    drops: bool,
    count: int | None,
    form: str,
    bpffs: Path,
) -> None:
    """Print what becomes of packets from outside, with their addresses before and after.

    tcpdump sees nothing of what XDP sends on; this does, at every device that is served. Ctrl-C
    ends it. One at a time on a node; while it runs, each packet costs more. JSON is one line for
    each decision. Where more comes than is read, a line in between says how many were lost, in
    JSON {"lost": N}.

    \b
    Examples:
        pointsman trace --drops
        pointsman trace --service shop/web --client 198.51.100.7
        pointsman trace -o json --count 100 | jq -r .verdict
    """
    wanted: tuple[str | None, str] | None = None
    if service is not None:
        wanted = names.split(service, None)
    tracer = Tracer(Pins(bpffs).require_current().packets.maps)
    printer = _Printer(form)
    try:
        printer.head()
        while count is None or printer.shown < count:
            for event in tracer.events():
                name = tracer.owner(event.owner) if event.owner else None
                if takes(event, name, wanted, client, drops=drops):
                    printer.show(event, name)
                if printer.shown == count:
                    break
            printer.lost(tracer.lost())
    except KeyboardInterrupt:
        printer.lost(tracer.lost())
    finally:
        tracer.close()
        if printer.missing:
            show.note(
                f"{printer.missing} decisions were lost: they came faster than they were read"
            )


def takes(
    event: Event,
    name: PortName | None,
    service: tuple[str | None, str] | None,
    client: Address | None,
    *,
    drops: bool,
) -> bool:
    """Whether it is one that the options ask for. `service`: namespace (None is any) and name."""
    if drops and not event.drop:
        return False
    if service is not None and (
        name is None or name.service != service[1] or service[0] not in (None, name.namespace)
    ):
        return False
    tuples = (event.before, event.after) if event.after else (event.before,)
    return client is None or any(client in (each.source, each.destination) for each in tuples)


class _Printer:
    def __init__(self, form: str) -> None:
        self._form = form
        self._sizes: list[int] = []
        self.shown = self.missing = 0
        self._epoch = time.time_ns() - now()  # what the clocks differ by

    def head(self) -> None:
        if self._form == "table":
            self._line(list(_HEADERS))

    def lost(self, ever: int) -> None:
        """Says how many were lost since the last call."""
        number, self.missing = ever - self.missing, ever
        if number and self._form == "json":
            click.echo(json.dumps({"lost": number}))
        elif number:
            click.echo(f"({number} lost)")

    def show(self, event: Event, name: PortName | None) -> None:
        self.shown += 1
        at = datetime.fromtimestamp((event.time + self._epoch) / 1e9).astimezone()
        after = tuple_text(event.after) if event.after else ""
        row: dict[str, Any] = {
            "time": at.isoformat(timespec="microseconds"),
            "hook": event.hook,
            "device": device_name(event.ifindex),
            "protocol": protocol_name(event.before.protocol),
            "before": tuple_text(event.before),
            "after": after,
            "verdict": event.verdict,
            "drop": event.drop,
            "service": str(name) if name else "",
            "length": event.length,
        }
        if self._form == "json":
            click.echo(json.dumps(row))
            return
        shown = ("hook", "device", "protocol", "before", "after", "verdict", "service")
        clock = at.strftime("%H:%M:%S.%f")
        self._line([clock, *(show.text_of(row[key]) for key in shown)])

    def _line(self, cells: list[str]) -> None:
        """Columns only grow, so that old lines still fit."""
        self._sizes = show.widths([cells], self._sizes)
        click.echo(show.aligned([cells], self._sizes)[0])
