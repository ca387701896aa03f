"""Commands that read the kernel's maps: get and explain. Neither needs an agent."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from pointsman import bpf
from pointsman import explain as explaining
from pointsman.cli import complete, flows, names, options, show
from pointsman.cli.resources import Resource, changes
from pointsman.errors import NotFound
from pointsman.explainpackets import Client, PacketExplanation, explain_packet, parse_client
from pointsman.hooks import SET_RETVAL
from pointsman.inspect import plain
from pointsman.packetmaps import PacketMaps, now
from pointsman.pins import Pins
from pointsman.values import Address, Frontend


@click.command()
@names.resource("services", "endpoints", "frontends", "affinity", "conntrack", "nat")
@click.argument("name", required=False, shell_complete=complete.names)
@names.namespace
@click.option("-A", "--all-namespaces", is_flag=True, help="All namespaces, as without -n.")
@show.output("table", "wide", "json", "yaml")
@click.option("-w", "--watch", is_flag=True, help="Go on, and print rows again that change.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between two looks of --watch.",
)
@click.option(
    "--service",
    metavar="NS/NAME",
    shell_complete=complete.full_names,
    help="Flows of this Service, as NAME is.",
)
@click.option(
    "--client",
    metavar="ADDRESS",
    callback=flows.client_address,
    help="Flows of this client.",
)
@options.bpffs
@show.reading
def get(
    resource: Resource,
    name: str | None,
    namespace: str | None,
    all_namespaces: bool,
    form: str,
    watch: bool,
    interval: float,
    service: str | None,
    client: Address | None,
    bpffs: Path,
) -> None:
    """Show services, endpoints, frontends, affinity or flows as the kernel's maps hold them.

    NAME is a Service's. OPEN counts the connections that are open now. With --watch, JSON is one
    line for each change: {"type": "ADDED|MODIFIED|DELETED", "object": {...}}.

    TYPE is as far as the maps know it: a LoadBalancer without an address looks like a NodePort.
    'frontends' also has the hostPorts of Pods (pod/NAME) and the addresses of nodes (node/NAME),
    where NodePorts answer. 'affinity' has the endpoint that each client keeps; a client is a
    network namespace, by its cookie. Clients outside are in 'pointsman map dump affinity_clients'.

    'conntrack' has the flows of clients outside that are remembered, 'nat' those that use a port of
    this node, with how many ports each endpoint has left. Both are printed as they are read: in
    order as long as they are few.

    \b
    Examples:
        pointsman get services
        pointsman get svc -n kube-system -o wide
        pointsman get endpoints web-server-service -n kube-system --watch
        pointsman get frontends -o json | jq '.items[].frontend'
        pointsman get affinity web -n shop
        pointsman get conntrack --service shop/web --client 198.51.100.7
        pointsman get nat -o json | jq '.ports'
    """
    if all_namespaces and namespace:
        raise click.UsageError("-A and -n exclude each other")
    if service is not None and name is not None:
        raise click.UsageError("--service and NAME say the same: leave one out")
    if not resource.flows and (service is not None or client is not None):
        raise click.UsageError(f"--service and --client choose flows: {resource.name} has none")
    if name is not None or service is not None:
        namespace, name = names.split(name or service or "", namespace)
    if resource.flows:
        if watch:
            raise click.UsageError(f"{resource.name} can't be watched; see 'pointsman trace'")
        flows.print_flows(bpffs, resource, namespace, name, client, form)
        return
    rows = _rows(bpffs, resource, namespace, name)
    if name is not None and not rows and not watch and not _known(bpffs, namespace, name):
        where = f" in namespace {namespace}" if namespace else ""
        raise NotFound(f"no Service {name}{where} in the maps; see 'pointsman get services'")
    if watch:
        _watch(bpffs, resource, namespace, name, form, interval, rows)
    elif form in ("json", "yaml"):
        click.echo(show.structured({"kind": resource.kind, "items": plain(rows)}, form))
    elif rows:
        columns = resource.shown(form)
        cells = [[value(row) for _, value in columns] for row in rows]
        for line in show.table([header for header, _ in columns], cells):
            click.echo(line)
    else:
        show.note(f"No resources found{f' in {namespace} namespace' if namespace else ''}.")


def _rows(bpffs: Path, resource: Resource, namespace: str | None, name: str | None) -> list[Any]:
    with show.opened(bpffs) as view:
        return resource.select(view, namespace, name)


def _known(bpffs: Path, namespace: str | None, name: str) -> bool:
    """Whether the maps have a Service (or Pod, or node) of this name, maybe without any row."""
    with show.opened(bpffs) as view:
        owners = view.names().values()
    return any(each.service == name and namespace in (None, each.namespace) for each in owners)


def _watch(
    bpffs: Path,
    resource: Resource,
    namespace: str | None,
    name: str | None,
    form: str,
    interval: float,
    rows: list[Any],
) -> None:
    """Prints what changes until interrupted. Columns only grow, so that old lines still fit."""
    before: list[Any] = []
    columns = resource.shown(form)
    sizes = show.widths([[header for header, _ in columns]])
    headed, whole = False, form in ("json", "yaml")

    def seen(row: Any) -> Any:
        return row if whole else [value(row) for _, value in columns]

    while True:
        found = changes(resource, before, rows, seen)
        if whole:
            for change in found:
                value = {"type": change.type, "object": plain(change.row)}
                text = json.dumps(value) if form == "json" else show.structured(value, form)
                click.echo(text if form == "json" else f"---\n{text}")
        else:
            lines = [[show.text_of(value(change.row)) for _, value in columns] for change in found]
            for line, change in zip(lines, found, strict=True):
                if change.type == "DELETED":
                    line[-1] = "<deleted>"
            if not headed and lines:
                lines.insert(0, [header for header, _ in columns])
                headed = True
            sizes = show.widths(lines, sizes)
            for text in show.aligned(lines, sizes):
                click.echo(text)
        before = rows
        time.sleep(interval)
        rows = _rows(bpffs, resource, namespace, name)


def _destination(_context: click.Context, _param: click.Parameter, value: str) -> Frontend:
    try:
        return explaining.parse_destination(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _client(_context: click.Context, _param: click.Parameter, value: str) -> str | Client:
    if value in (explaining.HOST, explaining.ELSEWHERE):
        return value
    try:
        return parse_client(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}, and neither 'host' nor 'pod'") from None


@click.command()
@click.argument("destination", callback=_destination, metavar="ADDRESS:PORT[/udp]")
@click.option(
    "--from",
    "client",
    callback=_client,
    default=explaining.HOST,
    show_default=True,
    metavar="host|pod|ADDRESS[:PORT]",
    help="Who connects: a process in the host's network namespace, one in a pod's, or a client "
    "outside of the cluster by its address.",
)
@click.option(
    "--open",
    "opened",
    is_flag=True,
    help="With --from ADDRESS:PORT: of a TCP connection that is open already.",
)
@show.output("table", "json", "yaml")
@options.bpffs
@show.reading
def explain(
    destination: Frontend, client: str | Client, opened: bool, form: str, bpffs: Path
) -> None:
    """Say which endpoints a connection to an address could get, and why.

    Walks the maps as the programs do on connect() and on an unconnected socket's sendmsg(). Who
    connects matters at loopback addresses and with session affinity. The exit code is 0 whatever
    they answer.

    With an address in --from it walks as the programs on the node's devices do with a packet from
    there; with a port as well, it says which endpoint that very flow gets.

    \b
    Examples:
        pointsman explain 10.96.0.10:80
        pointsman explain 10.96.0.10:53/udp
        pointsman explain 192.0.2.7:30080
        pointsman explain 127.0.0.1:30080 --from pod
        pointsman explain 192.0.2.7:30080 --from 198.51.100.9:40000
        pointsman explain 192.0.2.7:30080 --from 198.51.100.9:40000 --open
        pointsman explain '[fd00::a]:443' -o json
    """
    if isinstance(client, Client):
        _explain_packet(destination, client, opened, form, bpffs)
        return
    if opened:
        raise click.UsageError("--open is of a client outside: give --from ADDRESS:PORT")
    with show.opened(bpffs) as view:
        found = explaining.explain(
            view, destination, client, time.monotonic_ns(), tells_why=bpf.has_helper(*SET_RETVAL)
        )
    if any(link.program is None or not link.cgroup for link in Pins(bpffs).links()):
        show.note("note: not every hook is attached, see 'pointsman status'")
    _print_explanation(found, form)


def _explain_packet(
    destination: Frontend, client: Client, opened: bool, form: str, bpffs: Path
) -> None:
    with show.opened(bpffs) as view:
        packets = PacketMaps(view.packets)
        try:
            found = explain_packet(view, packets, destination, client, now(), begins=not opened)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        finally:
            packets.close()
    _print_explanation(found, form)


def _print_explanation(found: explaining.Explanation | PacketExplanation, form: str) -> None:
    if form != "table":
        click.echo(show.structured(plain(found), form))
        return
    show.echo(f"{found.destination}: {found.result}", "bold")
    click.echo(f"  because {found.why}")
    for text in found.notes:
        click.echo(f"  note: {text}")
    click.echo()
    for number, step in enumerate(found.steps, 1):
        click.echo(f"{number:3}. {step}")
