"""The agent: events in, maps kept in step. One thread owns the maps.

Sources, the address watch and the reclaimer run on threads of their own and only put values into
the queue. Whatever happens to this process, the kernel keeps balancing with the last state.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pointsman import host, loading, netlink, netns, state, systemd
from pointsman.builtin import DnsService, dns_address
from pointsman.devicewatch import DevicesNow
from pointsman.dns import DnsServer
from pointsman.dnsupstream import ResolvConf
from pointsman.draining import Draining
from pointsman.edge import Edge
from pointsman.errors import PointsmanError
from pointsman.events import Changed, Event, Listed, Problem, Problems, Reach
from pointsman.generations import Loaded
from pointsman.leftbehind import LeftBehind
from pointsman.objects import EndpointSlice, Ref, Service
from pointsman.pins import Pins
from pointsman.plan import Garbage
from pointsman.planner import Planner
from pointsman.probes import Probes
from pointsman.reaper import Found, Reaped
from pointsman.rebalancer import Drained, Rebalancer
from pointsman.report import Reporter
from pointsman.settings import Reconfigured, Settings
from pointsman.surroundings import OptedOut, Surroundings
from pointsman.sync import COLLECT, Sync
from pointsman.telemetry import Telemetry
from pointsman.values import Address
from pointsman.zone import Zone

log = logging.getLogger("pointsman.agent")

_BATCH = 1000  # events folded into one plan at most
_RETRY = 1.0  # seconds until a failed sync is tried again
_HEARTBEAT = 1.0  # seconds between two writings of the status file, at most
_IDLE = 10.0  # and when nothing happens: the programs go on counting
_LONG = 30.0  # seconds for a start
_PATIENCE = 5.0  # seconds for all threads to end; what then still works ends with the process


class Source(Protocol):
    """Where objects come from. `run` puts a Listed first, returns when `stop` is set. `where`
    names the file or API path of an object, "" if it knows none; any thread may ask."""

    def run(self, put: Callable[[Event], None], stop: threading.Event) -> None: ...
    def where(self, ref: Ref) -> str: ...


class Companion(Protocol):
    """What runs beside the agent on a thread of its own, until `stop`, and tells it things."""

    def run(self, put: Callable[[Reconfigured], None], stop: threading.Event) -> None: ...


class Listener(Protocol):
    """Hears when the programs are attached, of everything that is wrong now, each time that
    changes, and what else there is to say of an object. Must not wait."""

    def attached(self) -> None: ...
    def normal(self, ref: Ref, reason: str, note: str) -> None: ...
    def problems(self, found: Sequence[Problem]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Reclaimed:
    garbage: Garbage
    planner: Planner


@dataclass(frozen=True, slots=True)
class _Addresses:
    addresses: frozenset[Address]


class _Probed:
    """A server opened, or failed to."""


class _Reload:
    """Everything is to be read again."""


class _Reread:
    """One of those asked to has done so."""


_Told = Found | Reaped | Drained | OptedOut | DevicesNow | Loaded
_Message = Event | _Probed | _Reload | _Reread | _Reclaimed | _Addresses | _Told | Reconfigured


class Agent:
    """Runs until told to stop. Errors of `pointsman.errors` end it before it changed anything.

    `configuration`: what puts a Reconfigured when the operator wants something else.
    """

    def __init__(
        self,
        settings: Settings,
        source: Source,
        telemetry: Telemetry | None = None,
        *,
        configuration: Companion | None = None,
    ) -> None:
        self._settings = settings
        self._source = source
        self._telemetry = telemetry or Telemetry()
        self._configuration = configuration
        self.listeners: list[Listener] = []
        #: What `reload` asks to read again; each calls what it is given when it has put that.
        self.rereaders: list[Callable[[Callable[[], None]], None]] = []
        self._reloading, self._rereading = False, 0
        self._unit = systemd.Unit()
        self._queue: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._garbage: queue.SimpleQueue[tuple[Garbage, Planner] | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._reporter = Reporter(settings, source.where)
        self._surroundings = Surroundings(settings, self._queue.put)
        self._edge = Edge(settings, self._queue.put)
        self._source_problems: tuple[Problem, ...] = ()
        self._config_problems: tuple[Problem, ...] = ()
        self._reach: Reach | None = None
        self._draining = Draining(self._say)
        self._dns: DnsServer | None = None
        self._probes = Probes(settings, self._telemetry, lambda: self._queue.put(_Probed()))
        self.failed = ""
        self._status_due = True
        self._status_at = 0.0
        self.ready = threading.Event()

    def stop(self) -> None:
        """May be called from a signal handler or another thread."""
        self._stop.set()

    def reload(self) -> None:
        """Reads configuration and manifests again. May be called as `stop` may."""
        self._queue.put(_Reload())

    def uid_of(self, ref: Ref) -> str:
        """The uid of an object, "" if it has none or is not known. For listeners, when called."""
        found = self._sync.tracker.find(ref)
        return found.metadata.uid if found else ""

    # -- life --------------------------------------------------------------------------------

    def run(self) -> None:
        """Loads, syncs, attaches and follows the source until `stop`."""
        settings = self._settings
        # Until all is attached next to nothing dies: looking for it would be half of a first sync.
        # (But an API server may be away for hours: `_follow` ends it.)
        gc.set_threshold(10_000_000)
        self._began = time.monotonic()
        lock = state.Lock(settings.run_dir)
        threads: list[threading.Thread] = []
        try:
            settings.state_dir.mkdir(parents=True, exist_ok=True)
            host.mount_bpffs(settings.bpffs)
            host.check_cgroup(settings.cgroup)
            if warning := host.cgroup_warning(settings.cgroup):
                log.warning(warning)
            if not host.has("CAP_SYS_PTRACE"):
                log.warning(
                    "without CAP_SYS_PTRACE pods' network namespaces are not found: stale sockets "
                    "in pods are not ended, and nobody can opt out"
                )
            self._sync = Sync(
                settings,
                self._surroundings,
                self._telemetry,
                lambda garbage, planner: self._garbage.put((garbage, planner)),
            )
            self._start_dns()
            # Not before what may yet be refused: who can't start leaves nothing behind.
            Pins(settings.bpffs).prepare_root()
            lock.pins(settings.bpffs)
            self._sync.open(self._stop)
            self._telemetry.loading(self._sync.loaded.packets_due)
            self._left_behind = LeftBehind(
                self._sync.loaded.generation.maps,
                self._sync.maps.wait_for_readers,
                self._queue.put,
                tcp=settings.end_tcp,
            )
            self._rebalancer = Rebalancer(self._sync.loaded.generation.maps, self._queue.put)
            self._prepare_host()
            netlink.load()
            self._probes.show(self._sync.maps)
            self._probes.start()
            for name, target in self._bodies():
                thread = threading.Thread(target=self._guard(name, target), name=name, daemon=True)
                thread.start()
                threads.append(thread)
            self._follow()
        except loading.Stopped:
            log.info("told to end before the programs were loaded")
        except Exception as error:
            self.failed = str(error) if isinstance(error, PointsmanError) else repr(error)
            raise
        finally:
            self._unit.stopping()
            self._stop.set()
            self._garbage.put(None)
            self._surroundings.stop()
            self._edge.stop()
            if threads:
                self._left_behind.stop()
                self._rebalancer.stop()
            self._probes.stop()
            if self._dns:
                self._dns.stop()
            until = time.monotonic() + _PATIENCE
            for thread in threads:
                thread.join(max(0.0, until - time.monotonic()))
            if threads:
                self._write_status(stopped=True)
            self._edge.close()
            # A loader that is still at work pins until this process ends, and the lock with it.
            if not self._edge.pinning:
                lock.release()

    def _bodies(self) -> list[tuple[str, Callable[[], None]]]:
        bodies: list[tuple[str, Callable[[], None]]] = [
            ("source", lambda: self._source.run(self._put, self._stop)),
            ("addresses", self._watch_addresses),
            ("reclaim", self._reclaim),
            ("reaper", self._left_behind.run),
            ("drains", self._rebalancer.run),
            ("optouts", self._surroundings.run),
            ("devices", self._edge.run),
            ("sweep", self._edge.sweep),
        ]
        if configuration := self._configuration:
            bodies.append(("config", lambda: configuration.run(self._queue.put, self._stop)))
        return bodies

    def _guard(self, name: str, target: Callable[[], None]) -> Callable[[], None]:
        """A thread that ends by an exception ends the agent, in the open: the kernel goes on
        balancing, and whoever supervises the process starts it again."""

        def run() -> None:
            try:
                target()
            except Exception:
                log.exception("thread %s failed, stopping", name)
                self.failed = f"thread {name} failed"
                self._stop.set()

        return run

    def _put(self, event: Event) -> None:
        """On the source's threads, so that a stuck agent is seen to have something queued."""
        if isinstance(event, Listed | Changed):
            refs = [obj.ref for obj in event.objects]
            refs += event.deleted if isinstance(event, Changed) else ()
            kinds = [ref.kind for ref in refs]
            self._telemetry.queued(
                kinds.count(Service.__name__), kinds.count(EndpointSlice.__name__)
            )
        self._queue.put(event)

    def _start_dns(self) -> None:
        settings = self._settings
        if not settings.dns_listen:
            return
        own = [dns_address(cidr) for cidr in settings.service_cidrs]
        zone = Zone(settings.domain, nameservers=own)
        upstreams = ResolvConf() if settings.dns_upstreams is None else settings.dns_upstreams
        server = DnsServer(zone, settings.dns_listen, upstreams, own=own)
        server.start()
        self._sync.zone = zone
        families = {":" in address for address, _ in server.addresses}
        served = [address for address in own if (":" in address) in families]
        if served:
            self._sync.dns_service = DnsService(served, server.addresses)
        self._dns = server

    def _prepare_host(self) -> None:
        """What the programs must know of this machine, and the ports that nobody else may get."""
        try:
            cookie = netns.cookie()
        except OSError as error:
            cookie = 0
            log.warning("NodePorts at 127.0.0.1 and the bind guard are off: %s", error)
        self._sync.maps.set_host_netns(cookie)
        self._reserve_ports()

    def _reserve_ports(self) -> None:
        policy, run_dir = self._settings.policy, self._settings.run_dir
        wanted = (policy.node_port_range,) if policy.bind_guard else ()
        try:
            state.write_reserved(run_dir, host.hold_ports(wanted, state.read_reserved(run_dir)))
        except OSError as error:
            log.warning("NodePorts are not kept from sockets that ask for any port: %s", error)

    def _watch_addresses(self) -> None:
        netlink.watch_addresses(lambda found: self._queue.put(_Addresses(found)), self._stop)

    def _reclaim(self) -> None:
        """Waits out grace periods, several plans at a time, off the thread that owns the maps."""
        while True:
            item = self._garbage.get()
            if item is None:
                return
            batch, planner = item
            ending = False
            while not self._garbage.empty():
                more = self._garbage.get()
                if more is None:
                    ending = True
                    break
                if more[1] is planner:
                    batch.extend(more[0])
                else:
                    batch, planner = more
            self._sync.maps.wait_for_readers()
            self._queue.put(_Reclaimed(batch, planner))
            if ending:
                return

    # -- following the source ----------------------------------------------------------------

    def _follow(self) -> None:
        while not self._stop.is_set():
            self._unit.alive()
            self._take(self._next())
            if not self._sync.attached and time.monotonic() - self._began > _LONG:
                gc.set_threshold(*COLLECT)
            if (touched := self._sync.retry(_RETRY)) is not None:
                self._synced(touched, whole=True)
            self._status_due |= self._sync.hold()
            pause = _HEARTBEAT if self._status_due else _IDLE
            if time.monotonic() - self._status_at >= pause:
                self._write_status()

    def _next(self) -> list[_Message]:
        """Everything that waits, at least one message unless half a second passes."""
        try:
            messages = [self._queue.get(timeout=0.5)]
        except queue.Empty:
            return []
        while len(messages) < _BATCH:
            try:
                messages.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return messages

    def _take(self, messages: list[_Message]) -> None:
        found: list[Found] = []
        for message in messages:
            self._status_due |= not isinstance(message, _Reclaimed | Found)
            match message:
                case Listed() | Changed():
                    self._sync.take(message)
                    if isinstance(message, Listed):
                        self._telemetry.listed()
                case Problems():
                    self._source_problems = message.problems
                case Reach():
                    self._take_reach(message)
                case _Addresses():
                    self._surroundings.move(message.addresses)
                case Found():
                    found.append(message)
                    if message.took is not None:
                        self._telemetry.stage("conntrack", message.took)
                case Reaped():
                    self._left_behind.take(message)
                case Drained():
                    self._draining.take(message)
                case OptedOut():
                    self._surroundings.take(message)
                    self._sync.skip()
                case Loaded():
                    self._edge.begin(message)
                    self._telemetry.loading(self._edge.begun)
                case DevicesNow():
                    self._edge.take(message)
                    self._telemetry.loading(False)
                case Reconfigured():
                    self._reconfigure(message)
                case _Probed():
                    if self._probes.failed:
                        self.failed = self._probes.failed
                        self._stop.set()
                case _Reload():
                    self._reload()
                case _Reread():
                    self._rereading -= 1
                case _Reclaimed():
                    self._sync.reclaimed(message.garbage, message.planner)
        whole = not self._sync.attached
        touched = self._sync.advance()
        # The first look at devices must know which of them are pods', or that nobody knows yet.
        self._edge.want(self._settings.packets, self._surroundings.around)
        if touched is not None:
            self._synced(touched, whole=whole)
        # Sockets are judged by what the maps say, after they say it.
        for each in found:
            self._left_behind.judge(each, self._sync.members())
        if self._reloading and not self._rereading:
            self._reloading = False
            self._write_status()
            log.info("reloaded")
            self._unit.ready()

    def _reload(self) -> None:
        # Who is not ready yet must not be so by this.
        if self.ready.is_set() and not self._reloading:
            self._reloading = True
            self._unit.reloading()
        self._rereading += len(self.rereaders)
        for reread in self.rereaders:
            reread(lambda: self._queue.put(_Reread()))

    def _synced(self, touched: set[Ref], *, whole: bool) -> None:
        """The maps are in step; as a `whole`: what left before is to be looked for, too."""
        self._status_due = True
        self._probes.follow(touched, self._sync.tracker, self._surroundings.context)
        self._rebalancer.follow(self._sync.asked(touched))
        if not whole:
            self._left_behind.look_after(touched, self._sync.tracker)
            return
        self._left_behind.look()
        if not self.ready.is_set():
            self._edge.begin(self._sync.loaded)
            # Who reads in the status file that all is attached is told no less by the probes.
            self._telemetry.attached()
            self._write_status()
            for listener in self.listeners:
                listener.attached()
            self.ready.set()
            self._unit.ready()
            host.give_back_memory()  # a first sync reads and makes much that nobody needs again

    def _take_reach(self, reach: Reach) -> None:
        before = self._reach
        self._reach = reach
        self._telemetry.reach(reach)
        if reach.error and not (before and before.error == reach.error):
            log.error("%s: %s; connections go on by what is known", reach.server, reach.error)
        elif not reach.error and (before is None or before.error):
            log.info("following the API server at %s", reach.server)

    def _reconfigure(self, message: Reconfigured) -> None:
        settings = message.settings
        if settings is None:
            # What waits for the next start goes on waiting.
            still = (each for each in self._config_problems if each.severity == "warning")
            self._config_problems = (*message.problems, *still)
            return
        self._config_problems = message.problems
        if settings == self._settings:
            return
        ends_more = settings.end_tcp and not self._settings.end_tcp
        policy, self._settings = self._settings.policy, settings
        self._reporter.settings = self._probes.settings = settings
        self._surroundings.reconfigure(settings)
        self._left_behind.protocols(tcp=settings.end_tcp)
        if ends_more:
            self._left_behind.look()
        if (policy.bind_guard, policy.node_port_range) != (
            settings.policy.bind_guard,
            settings.policy.node_port_range,
        ):
            self._reserve_ports()
        log.info("configuration changed")

    # -- telling -----------------------------------------------------------------------------

    def _say(self, ref: Ref, reason: str, note: str) -> None:
        for listener in self.listeners:
            listener.normal(ref, reason, note)

    def problems(self) -> list[Problem]:
        """Everything an operator should mend now."""
        found = [*self._source_problems, *self._config_problems, *self._surroundings.problems]
        found += self._edge.problems
        return [*found, *self._probes.problems, *self._sync.problems()]

    def _tell_problems(self) -> list[Problem]:
        problems, changed = self._reporter.problems(self.problems())
        if changed:
            for listener in self.listeners:
                listener.problems(problems)
        return problems

    def _write_status(self, *, stopped: bool = False) -> None:
        self._status_due = False
        self._status_at = time.monotonic()
        problems = self._tell_problems()
        sync, stale, drains = self._sync, self._left_behind.status(), self._draining.status()
        told = self._reporter.write(
            sync.tracker,
            self._dns,
            self._reach,
            stopped=time.time() if stopped else None,
            failed=self.failed,
            sync={
                **sync.last,
                **sync.totals,
                "problems": self._reporter.problems_so_far,
                "attached": sync.attached,
            },
            problems=[dataclasses.asdict(problem) for problem in problems],
            stale=stale,
            drains=drains,
            noLocalEndpoints=dict(sync.no_local_endpoints()),
            slowStart=sync.slow(),
            **self._surroundings.status(),
            **self._edge.status(),
        )
        self._probes.tell(
            sync, told["balanced"], stale, drains, self._dns, problems, told["packets"]
        )
        self._unit.status(_summary(sync.attached, told["balanced"], len(problems)))


def _summary(attached: bool, services: int, problems: int) -> str:
    text = f"serves {services} Services" if attached else "waits for the first list of Services"
    return f"{text}; {problems} to be mended: pointsman status" if problems else text
