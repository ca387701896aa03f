"""Commands that judge: status and verify. Their exit codes are for scripts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from pointsman import desired, netlink, state
from pointsman.cli import maps, options, packetstatus, policies, show
from pointsman.context import Context, Policy
from pointsman.health import drain_text, report
from pointsman.inspect import plain
from pointsman.nodes import context_of
from pointsman.observe import observe, read_status
from pointsman.pins import Pins
from pointsman.slowstart import steps_of
from pointsman.tracker import Tracker
from pointsman.verify import Difference, compare, link_differences

# Seconds until what differs only because a sync is under way is so no more. The status file, by
# which verify knows the steps of a slow start, is written once a second.
_IN_FLIGHT = 2.0
# And until an agent that has nothing to do, or no CPU to do it with, has written it once more.
_NEXT_STATUS = 12.0
_BETWEEN_LOOKS = 0.2


@click.command()
@show.output("table", "json", "yaml")
@options.bpffs
@options.run_dir
@click.pass_context
@show.reading
def status(context: click.Context, form: str, bpffs: Path, run_dir: Path) -> None:
    """Show programs, links, maps and the agent, and whether all is well.

    The exit code is 0 if every hook is attached and current, devices that were named are served,
    and the agent runs and is in sync, 1 otherwise, 11 if nothing is loaded. Problems in the objects
    don't make the node unhealthy.

    \b
    Examples:
        pointsman status
        pointsman status -o json | jq -r '.reasons[]'
    """
    seen = observe(bpffs, run_dir, time.time())
    found = report(seen)
    if form != "table":
        click.echo(show.structured(found, form))
    else:
        for line in _status_lines(found, maps.cells(seen.maps)):
            show.echo(line, "" if line.startswith(" ") else "bold")
        if found["healthy"]:
            show.echo("healthy", "bold green")
        else:
            show.echo(f"not healthy: {'; '.join(found['reasons'])}", "bold red")
        for warning in found["warnings"]:
            show.note(f"warning: {warning}")
    context.exit(0 if found["healthy"] else 1)


def _status_lines(found: dict[str, Any], cells: list[tuple[Any, ...]]) -> Iterator[str]:
    yield "Agent"
    yield from _pairs(_agent(found["agent"]))
    yield "Node"
    yield from _pairs(_node(found["node"], found["optedOut"]))
    yield "Policy"
    yield from _pairs(_policy(found["policy"]))
    yield "Data path"
    yield from _pairs(_datapath(found["datapath"]))
    yield "Devices"
    yield from _devices(found["devices"])
    yield "Packets"
    yield from _pairs(packetstatus.pairs(found["packets"]))
    yield "Maps"
    yield from show.table(maps.HEADERS, cells, indent="  ")
    yield f"  mapped by the agent: {show.bytes_text(found['datapath']['mappedBytes'])}"
    yield "Sync"
    yield from _pairs(_sync(found["sync"]))
    yield "Source"
    yield from _pairs(_source(found["source"]))
    yield "DNS"
    yield from _pairs(_dns(found["dns"]))
    yield "Counters"
    yield from _pairs(_counters(found))
    yield from _problems(found["problems"])


def _pairs(pairs: Any) -> list[str]:
    pairs = list(pairs)
    width = max((len(label) for label, _ in pairs), default=0)
    return [f"  {label:{width}}   {show.text_of(value)}" for label, value in pairs]


def _agent(agent: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if agent["running"]:
        yield "running", f"pid {agent['pid']}"
    else:
        yield "not running", "the kernel serves its last state"
    if agent["failed"]:
        yield "failed", agent["failed"]
    yield "version", agent["version"]
    if agent["uptimeSeconds"] is not None:
        yield "uptime", show.duration_text(agent["uptimeSeconds"])
    elif agent["stopped"]:
        yield "stopped", agent["stopped"]


def _node(node: dict[str, Any], opted_out: dict[str, int]) -> Iterator[tuple[str, Any]]:
    yield "name", node["name"]
    yield "zone", node["zone"]
    if node["localAddresses"] is not None:
        yield "addresses", f"{node['localAddresses']}, of other nodes: {node['remoteAddresses']}"
    if any(opted_out.values()):
        text = "Pods: {pods}, network namespaces: {namespaces}, waiting: {waiting}"
        yield "opted out", text.format(**opted_out)


def _policy(policy: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """In the words of the options of 'up'."""
    if not policy:
        yield "not known", "the agent has not said it"
        return
    yield "service-proxy-name", policy.get("proxyName")
    yield "nodeport-addresses", policy.get("nodePortAddresses") or "all"
    yield "node-port-range", "-".join(map(str, policy.get("nodePortRange") or ()))
    yield "localhost-nodeports", policy.get("localhostNodePorts")
    yield "external-ips", policy.get("externalIPs")
    yield "bind-guard", policy.get("bindGuard")
    yield "refuse-unused-cluster-ips", policy.get("refuseUnusedClusterIPs")
    yield "algorithm", policy.get("algorithm")
    yield "outlier-ejection", policy.get("outlierEjection")


def _counters(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((name.replace("_", " "), value) for name, value in found["counters"].items())
    stale, none = found["stale"], found["noLocalEndpoints"]
    yield "stale sockets destroyed", stale["destroyed"]
    yield "stale flows deleted", stale["flowsDeleted"]
    yield "connections drained", found["drains"]["closed"]
    for name, drain in found["drains"]["services"].items():
        yield f"draining {name.removeprefix('Service ')}", drain_text(drain)
    yield (
        "no local endpoints",
        f"Services with internalTrafficPolicy: {none['internal']}, "
        f"externalTrafficPolicy: {none['external']}",
    )


def _datapath(datapath: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    cgroup, links = datapath["cgroup"], datapath["links"]
    yield "generation", datapath["generation"]
    if cgroup["id"]:
        yield "cgroup", cgroup["path"] or f"inode {cgroup['id']}, not found in this mount namespace"
    elif cgroup["configured"]:
        yield "cgroup", f"none attached, {cgroup['configured']} configured"
    else:
        yield "cgroup", None
    yield "links", f"{links['attached']} of {links['total']} attached"
    yield from ((hook["hook"], hook["message"]) for hook in datapath["hooks"] if not hook["ok"])


_DEVICE_HEADERS = ("NAME", "ROLE", "XDP", "TC", "VLAN", "ADDRESSES", "PROBLEMS")


def _devices(devices: dict[str, Any]) -> Iterator[str]:
    if not devices["items"]:
        why = "the programs are being loaded" if devices["loading"] else devices["error"]
        yield f"  {': '.join(filter(None, (show.NONE, why)))}"
        return
    rows = [
        (
            row["name"],
            row["role"],
            row["xdp"],
            row["tc"],
            row["vlan"] or None,
            ", ".join(row["addresses"] or ()) or None,
            "; ".join(row["problems"] or ()) or None,
        )
        for row in devices["items"]
    ]
    yield from show.table(_DEVICE_HEADERS, rows, indent="  ")


def _sync(sync: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if sync["time"]:
        took = f"took {sync['seconds'] * 1000:.1f} ms, Services: {sync['services']}"
        yield "last", f"{sync['time']}, {show.duration_text(sync['agoSeconds'])} ago, {took}"
    else:
        yield "last", None
    yield "totals", f"syncs: {sync['syncs']}, failed: {sync['failures']}"
    yield "last error", sync["error"]


def _source(source: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "kind", source["kind"]
    if source["kind"] == "kubernetes":
        yield "server", source["server"]
        state = {True: "followed", False: "away", None: "not reached yet"}[source["reachable"]]
        yield "API server", f"{state} since {source['since']}" if source["since"] else state
        yield "error", source["error"]
    else:
        yield "path", source["path"]
    counts = [f"{kind}: {count}" for kind, count in source["objects"].items()]
    yield "objects", ", ".join(counts)
    yield "balanced Services", source["balanced"]


def _dns(dns: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if not dns["enabled"]:
        yield "off", "or not known"
        return
    yield "listens on", dns["listen"]
    yield "ClusterIP", dns["clusterIPs"]
    yield "upstreams", dns["upstreams"]
    yield "queries", ", ".join(f"{count} {kind}" for kind, count in dns["queries"].items())
    yield "forwarded", dns["forwarded"]


def _problems(problems: list[dict[str, str]]) -> Iterator[str]:
    errors = sum(problem["severity"] == "error" for problem in problems)
    counts = f"errors: {errors}, warnings: {len(problems) - errors}"
    yield f"Problems ({counts})" if problems else "Problems"
    if not problems:
        yield f"  {show.NONE}"
    for problem in problems:
        place = ": ".join(
            part for part in (problem["where"], problem["object"], problem["field"]) if part
        )
        yield f"  {problem['severity']}: {place}: {problem['message']}; {problem['mend']}"


@click.command()
@click.option(
    "--manifests",
    type=click.Path(path_type=Path),
    help="Directory of manifests.  [default: the agent's, from its status file]",
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    help="Where ClusterIPs are remembered.  [default: the agent's]",
)
@show.output("table", "json", "yaml")
@options.bpffs
@options.run_dir
@click.pass_context
@show.reading
def verify(
    context: click.Context,
    manifests: Path | None,
    state_dir: Path | None,
    form: str,
    bpffs: Path,
    run_dir: Path,
) -> None:
    """Compare what the objects say with what the maps hold, and name every difference.

    The objects are those of the manifests, or of the API server that the agent follows. The exit
    code is 0 if there is none, 1 otherwise. While an agent runs, only differences that last count:
    to know takes up to 12 seconds. Of an object whose file is bad now, the last good version
    counts.

    \b
    Examples:
        pointsman verify
        pointsman verify --manifests ./manifests -o json
    """

    def look() -> tuple[list[Difference], list[str]]:
        seen = read_status(run_dir)
        return _differences(desired.inputs(seen, manifests, state_dir), seen, bpffs)

    told = state.told_at(run_dir)
    found, problems = look()
    if found and state.running(run_dir) is not None:
        found, problems = _lasting(found, look, lambda: state.told_at(run_dir) != told)
    if form != "table":
        value = {"equal": not found, "differences": plain(found), "problems": problems}
        click.echo(show.structured(value, form))
    else:
        if found:
            rows = [(each.kind, each.object, each.message) for each in found]
            for line in show.table(("KIND", "OBJECT", "DIFFERENCE"), rows):
                click.echo(line)
        for problem in problems:
            show.note(f"note: {problem}")
        if found:
            show.echo(f"{len(found)} differences", "bold red")
        else:
            show.echo("no differences: the maps hold what the objects say", "bold green")
    context.exit(1 if found else 0)


def _lasting(
    found: list[Difference],
    look: Callable[[], tuple[list[Difference], list[str]]],
    told: Callable[[], bool],
) -> tuple[list[Difference], list[str]]:
    """What every look finds until a sync has had the time to end, with the problems of the last.
    `told`: whether the agent has written its status since. Time alone says little: on a busy
    machine it may pass for us and not for the agent."""
    began = time.monotonic()
    while True:
        time.sleep(_BETWEEN_LOOKS)
        passed, has_told = time.monotonic() - began, told()
        again, problems = look()
        found = [difference for difference in again if difference in found]
        if not found or passed > _NEXT_STATUS or (passed > _IN_FLIGHT and has_told):
            return found, problems


def _differences(
    given: desired.Inputs, status: dict[str, Any], bpffs: Path
) -> tuple[list[Difference], list[str]]:
    tracker, problems = desired.read(given)
    cidrs = tracker.cidrs if given.api else given.service_cidrs
    # When endpoints came only the agent knows.
    slow = steps_of(status.get("slowStart") or {})
    wanted = desired.entries(tracker, _context(tracker, status, cidrs), slow)
    with show.opened(bpffs) as view:
        found = compare(wanted, view)
    return found + link_differences(Pins(bpffs).links()), [str(problem) for problem in problems]


def _context(tracker: Tracker, status: dict[str, Any], cidrs: tuple[str, ...]) -> Context:
    """This node as it is now, with the policy that the agent ran with last."""
    policy = msgspec.convert(status.get("policy") or {}, Policy)
    name = (status.get("node") or {}).get("name") or policies.host_name()
    return context_of(tracker.nodes.values(), name, netlink.local_addresses(), policy, cidrs)
