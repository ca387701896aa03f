"""`pointsman takeover`: whether kube-proxy may go from this node, or Pointsman, and how."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from pointsman import netlink
from pointsman.cli import options, policies, show
from pointsman.devicehealth import device_warnings
from pointsman.errors import NotFound
from pointsman.health import Observation, report
from pointsman.inspect import plain
from pointsman.kubeproxy import read, retire
from pointsman.kubeproxy.compare import BACK, RETIRE, Compared, Names, compare
from pointsman.kubeproxy.ours import OneFamily, Ours
from pointsman.kubeproxy.read import Programmed
from pointsman.observe import observe
from pointsman.packetmaps import PacketMaps
from pointsman.pins import Pins
from pointsman.values import Address
from pointsman.verify import Difference
from pointsman.view import Glance

#: Both follow changes by themselves, and kube-proxy waits up to a second to write several at once.
_LOOKS, _BETWEEN = 3, 1.2
_ROOT_CGROUP = 1  # the inode of the root of cgroup2, in every mount of it


@dataclass(frozen=True, slots=True)
class _Row:
    """One family of one mode of kube-proxy."""

    mode: str
    family: str
    frontends: int
    different: int


@dataclass
class _Judged:
    rows: list[_Row] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    outside: int = 0


@click.command()
@click.option(
    "--back",
    is_flag=True,
    help="The other way: whether kube-proxy serves all that Pointsman does.",
)
@click.option(
    "--cgroup",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The cgroup that has to be served.  [default: the whole node]",
)
@show.output("table", "json", "yaml")
@options.bpffs
@options.run_dir
@click.pass_context
@show.reading
def takeover(
    context: click.Context,
    back: bool,
    cgroup: Path | None,
    form: str,
    bpffs: Path,
    run_dir: Path,
) -> None:
    """Check that all that kube-proxy serves on this node is served, and say how to retire it.

    Compares kube-proxy's rules (nftables, iptables, IPVS) with the maps: each ClusterIP, NodePort,
    external and load balancer's address with its endpoints, affinity, policies and source ranges,
    for this node's own processes and for clients outside; and looks whether the agent, its hooks
    and its devices are well. With --back it compares the other way round, before Pointsman goes.
    It changes nothing.

    Run it in the host's network namespace. The exit code is 0 if the one may go, 1 if there are
    differences that last, 12 if kube-proxy serves nothing here.

    \b
    Examples:
        pointsman takeover
        pointsman takeover -o json | jq -r '.differences[].message'
        pointsman takeover --back
    """
    names = BACK if back else RETIRE
    judged = _judge(names, cgroup, bpffs, run_dir)
    for _ in range(_LOOKS - 1):
        if not judged.differences:
            break
        time.sleep(_BETWEEN)
        again = _judge(names, cgroup, bpffs, run_dir)
        again.differences = [each for each in again.differences if each in judged.differences]
        judged = again
    ready = not judged.differences
    steps = _steps(names, judged.rows, bpffs, run_dir, ready=ready)
    if form != "table":
        value = {
            "ready": ready,
            "direction": "back" if back else "retire",
            "kubeProxy": plain(judged.rows),
            "differences": plain(judged.differences),
            "notes": judged.notes,
            "steps": plain(steps),
        }
        click.echo(show.structured(value, form))
    else:
        _print(judged, steps, names, ready=ready)
    context.exit(0 if ready else 1)


def _judge(names: Names, cgroup: Path | None, bpffs: Path, run_dir: Path) -> _Judged:
    seen = observe(bpffs, run_dir, time.time())
    report_of = report(seen)
    local = netlink.local_addresses()
    found = read.programmed(local)
    judged = _Judged()
    if not found and names is RETIRE:
        raise NotFound(
            "kube-proxy serves nothing in this network namespace: it is retired already, or this "
            "is not the host's"
        )
    served = [each for each in report_of["devices"]["items"] if each["served"]]
    with _ours(bpffs, with_packets=bool(served)) as ours:
        if names is RETIRE:
            for each in found:
                _add(judged, each, compare(each.proxy, ours, local, names, outside=bool(served)))
        else:
            _add_back(judged, ours, found, local, outside=bool(served))
    if names is RETIRE:
        judged.differences += _unwell(seen, report_of, cgroup, judged.outside)
        if served:
            listed = ", ".join(str(each["name"]) for each in served)
            judged.notes.append(
                f"clients outside are served at {listed}: every device by which some come must be "
                "among them"
            )
    elif not read.running():
        message = "no kube-proxy runs here, so its rules would not be followed up"
        judged.differences.append(Difference("kube-proxy", "", message))
    judged.differences = list(dict.fromkeys(judged.differences))
    judged.notes = list(dict.fromkeys(judged.notes))
    return judged


class _View(Glance):
    """Without what clients have now: it is of no matter here, and may be much."""

    def items(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        return iter(())


@contextmanager
def _ours(bpffs: Path, *, with_packets: bool) -> Iterator[Ours]:
    generation = Pins(bpffs).require_current()
    view = _View(generation.maps, generation.packets.maps)
    packets = None
    try:
        packets = PacketMaps(view.packets) if with_packets else None
        yield Ours(view, packets)
    finally:
        if packets:
            packets.close()
        view.close()


def _add(judged: _Judged, each: Programmed, compared: Compared) -> None:
    differences = compared.differences + _not_understood(each)
    judged.rows.append(_Row(each.mode, each.family, compared.targets, len(differences)))
    judged.differences += differences
    judged.notes += compared.notes
    judged.outside += compared.outside
    if each.mode == "ipvs":
        judged.notes.append(
            "IPVS: loadBalancerSourceRanges are in sets that were not read, and whether an address "
            "is a ClusterIP can't be told: compared is what every client gets"
        )


def _add_back(
    judged: _Judged,
    ours: Ours,
    found: list[Programmed],
    local: frozenset[Address],
    *,
    outside: bool,
) -> None:
    """Each family is served by the mode that has most of it: others are left over."""
    for ipv4, family in ((True, "IPv4"), (False, "IPv6")):
        mine = OneFamily(ours, ipv4=ipv4)
        tried = [
            (compare(mine, each.proxy, local, BACK, outside=outside), each)
            for each in found
            if each.family == family
        ]
        if tried:
            compared, each = min(tried, key=lambda pair: len(pair[0].differences))
            _add(judged, each, compared)
        elif targets := list(mine.targets()):
            message = f"kube-proxy has no rules for {family}, Pointsman serves {len(targets)}"
            judged.rows.append(_Row("none", family, len(targets), len(targets)))
            judged.differences.append(Difference("not-served", family, message))


def _not_understood(each: Programmed) -> list[Difference]:
    message = "it is not understood what this rule means"
    return [
        Difference("not-understood", f"{each.mode} {each.family}: {rule}", message)
        for rule in sorted(each.proxy.unknown)
    ]


def _unwell(
    seen: Observation, found: dict[str, Any], cgroup: Path | None, outside: int
) -> Iterator[Difference]:
    """What hinders Pointsman from being alone."""
    for reason in found["reasons"]:
        yield Difference("unhealthy", "", reason)
    wanted = cgroup.stat().st_ino if cgroup else _ROOT_CGROUP
    attached = {link.cgroup for link in seen.links if link.cgroup}
    if attached and attached != {wanted}:
        path = found["datapath"]["cgroup"]["path"] or "another cgroup"
        message = f"only processes in {path} are served; start the agent without --cgroup"
        yield Difference("cgroup", "", message)
    devices = found["devices"]
    if outside and not any(row["served"] for row in devices["items"]):
        message = (
            f"kube-proxy serves {outside} addresses and ports to clients outside, and no device of "
            "this node is served: see --devices"
        )
        yield Difference("devices", "", message)
    elif outside:
        for warning in device_warnings(devices):
            yield Difference("devices", "", warning)


def _steps(
    names: Names, rows: list[_Row], bpffs: Path, run_dir: Path, *, ready: bool
) -> list[retire.Step]:
    """None where something has to be mended first."""
    seen, running = observe(bpffs, run_dir, time.time()), read.running()
    node = (seen.status.get("node") or {}).get("name") or policies.host_name()
    if names is RETIRE:
        return retire.retire(running, node, [(r.mode, r.family) for r in rows]) if ready else []
    if ready:
        return retire.back(read.agent(seen.pid))
    return [] if running else retire.start(node)


def _print(judged: _Judged, steps: list[retire.Step], names: Names, *, ready: bool) -> None:
    rows = [(row.mode, row.family, row.frontends, row.different) for row in judged.rows]
    for line in show.table(("MODE", "FAMILY", "SERVED", "DIFFERENT"), rows):
        click.echo(line)
    if judged.differences:
        click.echo("")
        cells = [(each.kind, each.object, each.message) for each in judged.differences]
        for line in show.table(("KIND", "OBJECT", "DIFFERENCE"), cells):
            click.echo(line)
    for note in judged.notes:
        show.note(f"note: {note}")
    if ready:
        show.echo(
            f"{names.old} may go from this node: {names.new} serves all that it does", "bold green"
        )
    else:
        many = len(judged.differences)
        listed = "1 difference" if many == 1 else f"{many} differences"
        show.echo(f"{names.old} must stay: {listed}, see docs/takeover.md", "bold red")
    for number, step in enumerate(steps, 1):
        click.echo("\n" + _wrapped(f"{number}. ", f"{step.what}."))
        for command in step.commands:  # whole, to be copied
            click.echo(f"       {command}")
        click.echo(_wrapped("   Check: ", f"{step.check}."))
    if ready and names is RETIRE:
        click.echo("\nThe way back, at each step: 'pointsman takeover --back'.")


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(
        text, 88, initial_indent=head, subsequent_indent="   ", break_on_hyphens=False
    )
