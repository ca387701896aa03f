"""Commands that change the kernel: up, load, unload."""

from __future__ import annotations

import ipaddress
import logging
import signal
from pathlib import Path

import click

from pointsman import host, portranges, state
from pointsman.agent import Agent
from pointsman.cli import options, policies
from pointsman.context import Policy
from pointsman.dnsupstream import upstreams_from_resolv_conf
from pointsman.errors import PointsmanError
from pointsman.manifests import ManifestSource
from pointsman.pins import Pins, Sizes
from pointsman.settings import Settings
from pointsman.zone import Zone


def _address(text: str, default_port: int) -> tuple[str, int]:
    """ADDR, ADDR:PORT or [ADDR]:PORT. Raises click.BadParameter."""
    host_part, port = text, default_port
    if text.startswith("["):
        host_part, _, rest = text[1:].partition("]")
        port_text = rest.removeprefix(":")
    elif text.count(":") == 1:
        host_part, _, port_text = text.partition(":")
    else:
        port_text = ""
    try:
        if port_text:
            port = int(port_text)
        if not 0 <= port <= 65535:
            raise ValueError
        return str(ipaddress.ip_address(host_part)), port
    except ValueError:
        raise click.BadParameter(f"{text!r} is no ADDRESS[:PORT], such as 127.0.0.1:53") from None


def _cidr(
    _context: click.Context, _param: click.Parameter, value: tuple[str, ...]
) -> tuple[str, ...]:
    seen: set[int] = set()
    for text in value:
        try:
            network = ipaddress.ip_network(text)
        except ValueError as error:
            raise click.BadParameter(f"{error}; write e.g. 10.96.0.0/12") from None
        if network.version in seen:
            raise click.BadParameter(f"{text}: there is already one of IPv{network.version}")
        seen.add(network.version)
        if network.num_addresses < 16:
            raise click.BadParameter(f"{text} has room for too few Services; take /28 or larger")
    return value


def _domain(_context: click.Context, _param: click.Parameter, value: str) -> str:
    try:
        Zone(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}; write e.g. cluster.local") from None
    return value


def _sizes(max_services: int, max_slots: int, max_endpoints: int) -> Sizes:
    return Sizes(services=max_services, slots=max_slots, endpoints=max_endpoints)


@click.command()
@click.option(
    "--manifests",
    type=click.Path(path_type=Path),
    default=Path("/etc/pointsman/manifests"),
    show_default=True,
    help="Directory of Kubernetes manifests (Service, EndpointSlice, Pod, Node, Namespace), "
    "watched for changes.",
)
@click.option(
    "--cgroup",
    type=click.Path(path_type=Path),
    help="cgroup2 directory whose processes are served.  [default: the cgroup2 root]",
)
@click.option(
    "--service-cidr",
    "service_cidrs",
    envvar="POINTSMAN_SERVICE_CIDR",
    multiple=True,
    default=("10.96.0.0/12",),
    show_default=True,
    callback=_cidr,
    help="Where Services without a clusterIP get one; once for each family.",
)
@policies.node_name
@policies.policy
@click.option(
    "--end-stale-tcp",
    is_flag=True,
    help="End TCP connections too when their endpoint is gone, as it is done with UDP.",
)
@click.option(
    "--dns",
    "dns_listen",
    envvar="POINTSMAN_DNS",
    multiple=True,
    default=("127.0.0.1:0",),
    show_default=True,
    metavar="ADDRESS[:PORT]|off",
    help="Where the built-in DNS server listens. Its ClusterIP is the tenth of the service CIDR. "
    "Choose an address of the node when pods have network namespaces of their own.",
)
@click.option(
    "--dns-upstream",
    "dns_upstreams",
    envvar="POINTSMAN_DNS_UPSTREAM",
    multiple=True,
    metavar="ADDRESS[:PORT]|off",
    help="Resolvers for other names.  [default: those of /etc/resolv.conf]",
)
@click.option(
    "--domain",
    default="cluster.local",
    show_default=True,
    callback=_domain,
    help="The cluster's domain.",
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=Path("/var/lib/pointsman"),
    show_default=True,
    help="Where ClusterIPs are remembered.",
)
@options.sizes
@options.bpffs
@options.run_dir
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def up(
    manifests: Path,
    cgroup: Path | None,
    service_cidrs: tuple[str, ...],
    node_name: str,
    policy: Policy,
    end_stale_tcp: bool,
    dns_listen: tuple[str, ...],
    dns_upstreams: tuple[str, ...],
    domain: str,
    state_dir: Path,
    max_services: int,
    max_slots: int,
    max_endpoints: int,
    bpffs: Path,
    run_dir: Path,
    verbose: bool,
) -> None:
    """Load, attach, and keep the maps in step with the manifests; runs in the foreground.

    Stopping it (SIGTERM, Ctrl-C, a crash) leaves the kernel balancing with the last state:
    'pointsman unload' is what ends that.

    \b
    Examples:
        pointsman up --manifests ./manifests
        pointsman up --cgroup /sys/fs/cgroup/unified/apps --dns 10.244.0.1:53
        pointsman up --node-name worker-1 --nodeport-addresses primary
        pointsman up --nodeport-addresses 192.0.2.0/24,2001:db8::/64 --external-ips local
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    host.require_root()
    listen = [] if "off" in dns_listen else [_address(text, 53) for text in dns_listen]
    if dns_upstreams:
        forward = [] if "off" in dns_upstreams else [_address(t, 53) for t in dns_upstreams]
    else:
        forward = upstreams_from_resolv_conf()
    settings = Settings(
        bpffs=bpffs,
        cgroup=(cgroup or host.cgroup_root()).absolute(),
        run_dir=run_dir.absolute(),
        state_dir=state_dir.absolute(),
        manifests=manifests.absolute(),
        service_cidrs=service_cidrs,
        node_name=node_name,
        policy=policy,
        end_tcp=end_stale_tcp,
        domain=domain,
        dns_listen=tuple(listen),
        dns_upstreams=tuple(forward),
        sizes=_sizes(max_services, max_slots, max_endpoints),
    )
    agent = Agent(
        settings, ManifestSource(settings.manifests, settings.state_dir / state.LAST_GOOD)
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    agent.run()
    if agent.failed:
        raise PointsmanError(f"{agent.failed}; see the log")


@click.command()
@options.sizes
@options.bpffs
@options.run_dir
def load(max_services: int, max_slots: int, max_endpoints: int, bpffs: Path, run_dir: Path) -> None:
    """Compile and pin programs and maps, so that 'up' starts at once. Attaches nothing.

    \b
    Example:
        pointsman load && pointsman map list
    """
    host.require_root()
    lock = state.Lock(run_dir)
    try:
        host.mount_bpffs(bpffs)
        loaded = Pins(bpffs, _sizes(max_services, max_slots, max_endpoints)).load()
    finally:
        lock.release()
    how = "compiled and pinned" if loaded.compiled else "already pinned"
    click.echo(f"generation {loaded.generation.name}: {how} under {bpffs}")
    if loaded.previous:
        click.echo(f"generation {loaded.previous.name} still runs; 'pointsman up' flips to the new")


@click.command()
@options.bpffs
@options.run_dir
def unload(bpffs: Path, run_dir: Path) -> None:
    """Detach and unpin everything that is Pointsman's. Connections that are open stay open.

    The ports that 'up' had reserved are given back, those that were reserved before stay so.

    \b
    Example:
        pointsman unload
    """
    host.require_root()
    lock = state.Lock(run_dir)
    try:
        removed = Pins(bpffs).unload() if bpffs.is_dir() else []
        reserved, released = state.read_reserved(run_dir), False
        if reserved:
            try:
                released = host.release_ports(reserved)
            except OSError as error:
                raise PointsmanError(f"ports that are still reserved: {error}") from None
            if released:
                state.write_reserved(run_dir, ())
    finally:
        lock.release()
    for name in removed:
        click.echo(f"removed {bpffs / name}")
    if released:
        click.echo(f"ports are no longer reserved: {portranges.to_text(reserved)}")
    elif reserved:
        click.echo(
            f"ports {portranges.to_text(reserved)} are not reserved in this network namespace; "
            "run this in the host's to give them back there",
            err=True,
        )
    if not removed:
        click.echo(f"nothing is loaded under {bpffs}")
