"""The command describe: a Service as kubectl shows it, then what the kernel holds of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from pointsman import describe as describing
from pointsman import desired, inspect
from pointsman.cli import complete, names, options, show
from pointsman.cli.resources import CHOICE, IN_KERNEL, OPEN, Column, Resource
from pointsman.errors import NoCluster, NotFound, NotLoaded
from pointsman.health import drain_text
from pointsman.objects import Ref
from pointsman.observe import read_status
from pointsman.pins import Pins
from pointsman.tracker import Tracker
from pointsman.view import View


@click.command()
@names.resource("services")
@click.argument("name", shell_complete=complete.names)
@names.namespace
@click.option(
    "--manifests",
    type=click.Path(path_type=Path),
    help="Directory of manifests.  [default: the agent's, from its status file]",
)
@options.bpffs
@options.run_dir
@show.reading
def describe(
    resource: Resource,
    name: str,
    namespace: str | None,
    manifests: Path | None,
    bpffs: Path,
    run_dir: Path,
) -> None:
    """Describe one Service as kubectl does, then what the kernel holds of it.

    NAME is NAMESPACE/NAME, or NAME with -n; without either, the Service of that name in the
    namespace default, or the only one of that name.

    \b
    Examples:
        pointsman describe service kube-system/web-server-service
        pointsman describe svc web-server-service -n kube-system
    """
    where, service = names.split(name, namespace)
    view: View | None = None
    missing = ""
    try:
        view = View(Pins(bpffs).require_current().maps)
    except NotLoaded as error:
        missing = str(error)
    try:
        status = read_status(run_dir)
        tracker = _tracker(status, manifests)
        if tracker is None and view is None:
            raise NotLoaded(missing)
        known = {(ref.namespace, ref.name) for ref in tracker.services} if tracker else set()
        services = inspect.services(view) if view else []
        known |= {(row.namespace, row.name) for row in services}
        key = _choose(known, where, service)
        local: frozenset[str] | None = None
        if tracker and (found := tracker.services.get(Ref("Service", *key))):
            slices = tracker.slices(found.ref)
            click.echo(describing.describe(found, slices), nl=False)
            if node := (status.get("node") or {}).get("name"):
                local = describing.local_endpoints(slices, node)
        else:
            if tracker:
                show.note(
                    f"there is no such object ({key[0]}/{key[1]}): this is what the maps know"
                )
            row = next(row for row in services if (row.namespace, row.name) == key)
            click.echo(describing.describe_row(row), nl=False)
        click.echo()
        if view is None:
            click.echo("In the kernel: nothing")
            show.note(missing)
            return
        drain = (status.get("drains") or {}).get("services", {}).get(str(Ref("Service", *key)))
        _describe_kernel(view, key, local, drain)
    finally:
        if view:
            view.close()


def _tracker(status: dict[str, Any], manifests: Path | None) -> Tracker | None:
    """The objects, None (said on standard error) if the manifests can't be read."""
    try:
        return desired.read(desired.inputs(status, manifests))[0]
    except (NotFound, NoCluster) as error:
        if manifests:
            raise
        show.note(f"{error}: this is what the maps know")
        return None


def _choose(known: set[tuple[str, str]], namespace: str | None, name: str) -> tuple[str, str]:
    found = sorted(key for key in known if key[1] == name and namespace in (None, key[0]))
    if len(found) == 1:
        return found[0]
    if ("default", name) in found:
        return "default", name
    if found:
        several = ", ".join(f"{ns}/{n}" for ns, n in found)
        raise click.UsageError(f"several Services have this name: {several}; add -n NAMESPACE")
    where = f"{namespace}/{name}" if namespace else name
    raise NotFound(f"no Service {where}; see 'pointsman get services'")


def _describe_kernel(
    view: View, key: tuple[str, str], local: frozenset[str] | None, drain: dict[str, Any] | None
) -> None:
    """`local`: the endpoints that run on this node, None if that is not known. `drain`: how far
    that is, None without one."""
    parts = describing.describe_kernel(view, *key, time.monotonic_ns())
    if not parts:
        click.echo("In the kernel: nothing")
        return
    columns: tuple[Column, ...] = (("ENDPOINT", lambda row: row.endpoint), *IN_KERNEL, OPEN)
    if local is not None:
        columns = (*columns, ("LOCAL", lambda row: row.endpoint in local))
    columns = (*columns, *CHOICE)
    click.echo("In the kernel:")
    policies = describing.describe_policies(view, *key)
    if drain:
        policies.append(("Draining:", drain_text(drain)))
    click.echo(describing.align(policies, "  "), nl=False)
    for line, members in parts:
        click.echo(f"  {line}")
        if members:
            rows = [[value(member) for _, value in columns] for member in members]
            for text in show.table([header for header, _ in columns], rows, indent="    "):
                click.echo(text)
