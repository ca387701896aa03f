"""`pointsman up`: from options and configuration file to a running agent."""

from __future__ import annotations

import dataclasses
import faulthandler
import ipaddress
import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pointsman import host, state, systemd
from pointsman.agent import Agent, Listener, Source
from pointsman.cli import cluster, configure, options, packets, policies
from pointsman.config.reload import apply
from pointsman.config.watch import ConfigWatch
from pointsman.errors import PointsmanError
from pointsman.events import Problem
from pointsman.manifests import ManifestSource
from pointsman.settings import Reconfigured, Settings
from pointsman.telemetry import Telemetry
from pointsman.zone import Zone

SERVICE_CIDR = "10.96.0.0/12"
_ARGUMENTS = "pointsman.arguments"


class _Up(click.Command):
    """Remembers its arguments: a new configuration file is read by parsing them once more."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)


def _each(found: Iterable[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(tuple(found)):
            command = option(command)
        return command

    return decorate


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


def _addresses(
    _context: click.Context, _param: click.Parameter, value: tuple[str, ...]
) -> tuple[tuple[str, int], ...] | None:
    """None if nothing was said."""
    if not value:
        return None
    return () if "off" in value else tuple(options.address(text, 53) for text in value)


def _domain(_context: click.Context, _param: click.Parameter, value: str) -> str:
    try:
        Zone(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}; write e.g. cluster.local") from None
    return value


@click.command(cls=_Up)
@configure.option
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
    callback=_cidr,
    help="Where Services without a clusterIP get one; once for each family. With --kubernetes only "
    f"where the API server has no ServiceCIDRs.  [default: {SERVICE_CIDR} with --manifests]",
)
@policies.node_name
@_each(policies.OPTIONS)
@_each(packets.OPTIONS)
@_each(cluster.OPTIONS)
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
    metavar="ADDRESS[:PORT]|off",
    callback=_addresses,
    help="Where the built-in DNS server listens. Its ClusterIP is the tenth of the service CIDR. "
    "Choose an address of the node when pods have network namespaces of their own.  "
    "[default: 127.0.0.1:0; off with --kubernetes]",
)
@click.option(
    "--dns-upstream",
    "dns_upstreams",
    envvar="POINTSMAN_DNS_UPSTREAM",
    multiple=True,
    metavar="ADDRESS[:PORT]|off",
    callback=_addresses,
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
def up(verbose: bool, **params: Any) -> None:
    """Load, attach, and keep the maps in step with the manifests, or with an API server; runs in
    the foreground.

    Stopping it (SIGTERM, Ctrl-C, a crash) leaves the kernel balancing with the last state:
    'pointsman unload' is what ends that. SIGHUP has the configuration file and the manifests read
    again.

    \b
    Examples:
        pointsman up --manifests ./manifests
        pointsman up --cgroup /sys/fs/cgroup/unified/apps --devices none --dns 10.244.0.1:53
        pointsman up --node-name worker-1 --nodeport-addresses primary
        pointsman up --nodeport-addresses 192.0.2.0/24,2001:db8::/64 --external-ips local
        pointsman up --kubernetes --kubeconfig /etc/kubernetes/kubelet.conf
        pointsman up --kubernetes --config /etc/pointsman/config
    """
    journal = systemd.journal_handler()
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        handlers=[journal] if journal else None,
    )
    # A watchdog ends what is stuck by SIGABRT: then the log says where each thread stood.
    faulthandler.enable(2)
    log_level(verbose=verbose)
    host.require_root()
    host.allow_files()
    context = click.get_current_context()
    config = params.pop("config")
    settings = settings_of(params)
    telemetry = Telemetry()
    follower = _Follower(config, context, settings) if config else None
    with _source(settings, telemetry) as (source, listeners):
        agent = Agent(settings, source, telemetry, configuration=follower)
        agent.listeners += [listener(agent) for listener in listeners]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: agent.stop())
        if isinstance(source, ManifestSource):
            agent.rereaders.append(source.refresh)
        if follower:
            agent.rereaders.append(follower.refresh)
        signal.signal(signal.SIGHUP, lambda *_: agent.reload())
        agent.run()
    if agent.failed:
        raise PointsmanError(f"{agent.failed}; see the log")


@contextmanager
def _source(
    settings: Settings, telemetry: Telemetry
) -> Iterator[tuple[Source, list[Callable[[Agent], Listener]]]]:
    """Where objects come from, and who else is to hear of problems."""
    if settings.api is None:
        yield ManifestSource(settings.manifests, settings.state_dir / state.LAST_GOOD), []
        return
    # Only here: it takes 30 MB.
    from pointsman.kube.client import ApiServer
    from pointsman.kube.recorder import Recorder
    from pointsman.kube.source import ClusterSource

    api = ApiServer(settings.api, keys=settings.run_dir / "keys")
    recorders: list[Recorder] = []

    def recorder(agent: Agent) -> Recorder:
        found = Recorder(
            api.post,
            api.patch,
            node_name=settings.node_name,
            uid_of=agent.uid_of,
            count=telemetry.recorded,
        )
        found.start()
        recorders.append(found)
        return found

    source = ClusterSource(
        api,
        node_name=settings.node_name,
        state_dir=settings.state_dir,
        proxy_name=settings.policy.proxy_name,
        with_others=settings.policy.refuse_unused_cluster_ips,
        with_headless=bool(settings.dns_listen),
        metrics=telemetry,
    )
    try:
        yield source, [recorder]
    finally:
        for each in recorders:
            each.stop()


def settings_of(params: dict[str, Any]) -> Settings:
    """The settings that these parameters of `up` say. Raises click.UsageError."""
    params = dict(params)
    api = cluster.access(params)
    healthz, metrics = cluster.bind_addresses(params, kubernetes=api is not None)
    cidrs, dns = params["service_cidrs"], params["dns_listen"]
    if api is None:
        cidrs = cidrs or (SERVICE_CIDR,)
        dns = (("127.0.0.1", 0),) if dns is None else dns
    elif dns and not cidrs:
        raise click.UsageError(
            "the DNS server has an address of the service CIDR: add --service-cidr, "
            "which is the API server's --service-cluster-ip-range"
        )
    return Settings(
        bpffs=params["bpffs"],
        cgroup=(params["cgroup"] or host.cgroup_root()).absolute(),
        run_dir=params["run_dir"].absolute(),
        state_dir=params["state_dir"].absolute(),
        manifests=params["manifests"].absolute(),
        service_cidrs=cidrs,
        node_name=params["node_name"],
        policy=policies.take(params),
        packets=packets.take(params),
        api=api,
        healthz=healthz,
        metrics=metrics,
        end_tcp=params["end_stale_tcp"],
        domain=params["domain"],
        dns_listen=dns or (),
        dns_upstreams=params["dns_upstreams"] if dns else (),
        sizes=options.sizes_of(params),
    )


class _Follower:
    """Reads the configuration again when its file changes: the same arguments, parsed anew."""

    def __init__(self, path: Path, context: click.Context, settings: Settings) -> None:
        self._path = path
        self._watch = ConfigWatch(path, lambda: self._put(self._read()))
        self._context = context
        self._settings = settings

    def run(self, put: Callable[[Reconfigured], None], stop: threading.Event) -> None:
        self._put = put
        self._watch.run(stop)

    def refresh(self, done: Callable[[], None]) -> None:
        self._watch.refresh(done)

    def _read(self) -> Reconfigured:
        command, parent = self._context.command, self._context.parent
        try:
            with command.make_context("up", list(self._context.meta[_ARGUMENTS]), parent) as ctx:
                params = {k: v for k, v in ctx.params.items() if k not in ("verbose", "config")}
                wanted = settings_of(params)
                problems: tuple[Problem, ...] = configure.problems(ctx)
        except configure.BadFile as error:
            return Reconfigured(None, error.problems)
        except Exception as error:  # whatever is in that file: nothing of it ends the agent
            if isinstance(error, click.ClickException):
                message = error.format_message()
            else:
                message = f"{type(error).__name__}: {error}"
            mend = "mend it; until then what was read before stays in force"
            return Reconfigured(None, (Problem(message, mend, str(self._path)),))
        log_level(verbose=ctx.params["verbose"])
        self._settings, more = apply(self._settings, wanted)
        waiting = tuple(dataclasses.replace(each, where=str(self._path)) for each in more)
        return Reconfigured(self._settings, (*problems, *waiting))


def log_level(*, verbose: bool) -> None:
    logging.getLogger().setLevel(logging.DEBUG if verbose else logging.INFO)
