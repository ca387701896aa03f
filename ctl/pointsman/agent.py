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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pointsman import abi, host, netlink, netns, state
from pointsman.builtin import DnsService, dns_address
from pointsman.clusterip import ClusterIPs
from pointsman.dns import DnsServer
from pointsman.events import Changed, Event, Listed, Problem, Problems
from pointsman.leftbehind import LeftBehind
from pointsman.maps import Maps, View, apply, take_over
from pointsman.membership import Membership
from pointsman.nodes import masks
from pointsman.objects import Ref
from pointsman.pins import Loaded, Pins
from pointsman.plan import Garbage, Plan
from pointsman.planner import Planner
from pointsman.reaper import Found, Reaped
from pointsman.report import Reporter
from pointsman.settings import Settings
from pointsman.surroundings import OptedOut, Surroundings
from pointsman.tracker import Tracker
from pointsman.values import Address, Entry
from pointsman.wanted import resolve_ref
from pointsman.zone import Zone

log = logging.getLogger("pointsman.agent")

_BATCH = 1000  # events folded into one plan at most
_RETRY = 1.0  # seconds until a failed sync is tried again
_HEARTBEAT = 1.0  # seconds between two writings of the status file, at most
_COLLECT = gc.get_threshold()
_UNREACHABLE = abi.constants()["EMPTY_UNREACHABLE"]


class Source(Protocol):
    """Where objects come from. `run` puts a Listed first, returns when `stop` is set. `where`
    names the file or API path of an object, "" if it knows none; any thread may ask."""

    def run(self, put: Callable[[Event], None], stop: threading.Event) -> None: ...
    def where(self, ref: Ref) -> str: ...


@dataclass(frozen=True, slots=True)
class _Reclaimed:
    garbage: Garbage
    planner: Planner


@dataclass(frozen=True, slots=True)
class _Addresses:
    addresses: frozenset[Address]


_Message = Event | _Reclaimed | _Addresses | Found | Reaped | OptedOut


class Agent:
    """Runs until told to stop. Errors of `pointsman.errors` end it before it changed anything."""

    def __init__(self, settings: Settings, source: Source) -> None:
        self._settings = settings
        self._source = source
        self._queue: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._garbage: queue.SimpleQueue[tuple[Garbage, Planner] | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._pins = Pins(settings.bpffs, settings.sizes)
        self._reporter = Reporter(settings, source.where)
        self._surroundings = Surroundings(settings, self._queue.put)
        self._touched: set[Ref] = set()  # not resolved yet
        self._entries: dict[Ref, tuple[Entry, ...]] = {}
        self._resolve_problems: dict[Ref, tuple[Problem, ...]] = {}
        self._source_problems: tuple[Problem, ...] = ()
        self._no_local: set[Ref] = set()  # Services whose policy leaves them without an endpoint
        self._attached = False
        self.failed = ""
        self._status_due = True
        self._status_at = 0.0
        self._totals = {"syncs": 0, "failures": 0}
        self._last_sync: dict[str, Any] = {}
        self._claims: dict[str, Ref] = {}
        self.ready = threading.Event()

    def stop(self) -> None:
        """May be called from a signal handler or another thread."""
        self._stop.set()

    # -- life --------------------------------------------------------------------------------

    def run(self) -> None:
        """Loads, syncs, attaches and follows the source until `stop`."""
        settings = self._settings
        # Until `_attach` next to nothing dies: looking for it would be half of a first sync.
        gc.set_threshold(10_000_000)
        lock = state.Lock(settings.run_dir)
        threads: list[threading.Thread] = []
        dns: DnsServer | None = None
        try:
            settings.state_dir.mkdir(parents=True, exist_ok=True)
            host.mount_bpffs(settings.bpffs)
            host.check_cgroup(settings.cgroup)
            if warning := host.cgroup_warning():
                log.warning(warning)
            self._claims = state.read_claims(settings.state_dir)
            self._cluster_ips = ClusterIPs(settings.service_cidrs, self._claims)
            self._tracker = Tracker(self._cluster_ips)
            dns = self._start_dns()
            loaded = self._pins.load()
            log.info("loaded generation=%s compiled=%s", loaded.generation.name, loaded.compiled)
            self._open(loaded)
            self._prepare_host()
            netlink.load()
            for name, target in (
                ("source", lambda: self._source.run(self._queue.put, self._stop)),
                ("addresses", self._watch_addresses),
                ("reclaim", self._reclaim),
                ("reaper", self._left_behind.run),
                ("optouts", self._surroundings.run),
            ):
                thread = threading.Thread(target=self._guard(name, target), name=name, daemon=True)
                thread.start()
                threads.append(thread)
            self._follow()
        finally:
            self._stop.set()
            self._garbage.put(None)
            self._surroundings.stop()
            if threads:
                self._left_behind.stop()
            if dns:
                dns.stop()
            for thread in threads:
                thread.join(timeout=5)
            if threads:
                self._write_status(stopped=True)
            lock.release()

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

    def _start_dns(self) -> DnsServer | None:
        settings = self._settings
        self._zone: Zone | None = None
        self._dns_service: DnsService | None = None
        self._dns: DnsServer | None = None
        if not settings.dns_listen:
            return None
        own = [dns_address(cidr) for cidr in settings.service_cidrs]
        self._zone = Zone(settings.domain, nameservers=own)
        server = DnsServer(self._zone, settings.dns_listen, settings.dns_upstreams, own=own)
        server.start()
        families = {":" in address for address, _ in server.addresses}
        served = [address for address in own if (":" in address) in families]
        if served:
            self._dns_service = DnsService(served, server.addresses)
        self._dns = server
        return server

    def _open(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._maps = Maps(loaded.generation.maps, loaded.generation.programs)
        self._planner = self._new_planner()
        self._left_behind = LeftBehind(
            loaded.generation.maps,
            self._maps.wait_for_readers,
            self._queue.put,
            tcp=self._settings.end_tcp,
        )

    def _prepare_host(self) -> None:
        """What the programs must know of this machine, and the ports that nobody else may get."""
        policy, run_dir = self._settings.policy, self._settings.run_dir
        try:
            cookie = netns.cookie()
        except OSError as error:
            cookie = 0
            log.warning("NodePorts at 127.0.0.1 and the bind guard are off: %s", error)
        self._maps.set_host_netns(cookie)
        wanted = (policy.node_port_range,) if policy.bind_guard else ()
        try:
            state.write_reserved(run_dir, host.hold_ports(wanted, state.read_reserved(run_dir)))
        except OSError as error:
            log.warning("NodePorts are not kept from sockets that ask for any port: %s", error)

    def _new_planner(self) -> Planner:
        """Takes over what the maps hold; after an upgrade also the numbers of the old ones."""
        inherited = None
        if self._loaded.previous and self._loaded.rebuilt:
            previous = View(self._loaded.previous.maps)
            inherited = previous.snapshot()
            previous.close()
        return take_over(self._maps, inherited)

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
            self._maps.wait_for_readers()
            self._queue.put(_Reclaimed(batch, planner))
            if ending:
                return

    # -- following the source ----------------------------------------------------------------

    def _follow(self) -> None:
        retry_at = 0.0
        while not self._stop.is_set():
            messages = self._next()
            try:
                # After a failure the planner's books are wrong: nothing goes by them until then.
                self._take(messages, hold=bool(retry_at))
                if retry_at and time.monotonic() >= retry_at:
                    self._resync()
                    retry_at = 0.0
            except OSError as error:
                # One way to recover from anything: read what is there, plan anew.
                self._totals["failures"] += 1
                self._last_sync["error"] = str(error)
                self._status_due = True
                log.error("sync failed, reading the maps again in %ss: %s", _RETRY, error)
                retry_at = time.monotonic() + _RETRY
            if self._status_due and time.monotonic() - self._status_at >= _HEARTBEAT:
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

    def _take(self, messages: list[_Message], *, hold: bool = False) -> None:
        retry = listed = skips = False
        found: list[Found] = []
        for message in messages:
            if isinstance(message, Listed | Changed):
                event = self._dns_service.add(message) if self._dns_service else message
                self._touched |= self._tracker.fold(event)
                listed |= isinstance(message, Listed)
            elif isinstance(message, Problems):
                self._source_problems = message.problems
                self._status_due = True
            elif isinstance(message, _Addresses):
                self._surroundings.move(message.addresses)
                self._status_due = True
            elif isinstance(message, Found):
                found.append(message)
            elif isinstance(message, Reaped):
                self._left_behind.take(message)
                self._status_due = True
            elif isinstance(message, OptedOut):
                self._surroundings.take(message)
                self._status_due = skips = True
            elif message.planner is self._planner:
                self._planner.reclaim(message.garbage)
                retry = bool(self._planner.unplaced)
        self._touched |= self._surroundings.follow(self._tracker, self._touched)
        ready = self._ready
        if ready and not hold and (self._touched or not self._attached or listed or retry):
            touched, self._touched = self._touched, set()
            self._sync(touched)
        if skips:
            self._skip()
        # Sockets are judged by what the maps say, after they say it.
        known = ready and not hold and not self._touched
        for each in found:
            self._left_behind.judge(each, self._members() if known else None)
        if self._status_due:
            self._reporter.problems(self.problems())

    @property
    def _ready(self) -> bool:
        """Whether enough is known to say what the maps should hold."""
        return self._tracker.listed and self._surroundings.known

    def _skip(self) -> None:
        if (skipped := self._surroundings.skipped) is not None:
            self._maps.skip(skipped)

    def _members(self) -> Membership:
        return Membership(self._tracker, self._surroundings.context, self._planner.owner)

    # -- syncing -----------------------------------------------------------------------------

    def _sync(self, touched: set[Ref]) -> None:
        began = time.monotonic()
        changed = self._resolve(touched)
        self._save_claims()
        if self._attached:
            self._carry_out(self._planner.update(changed))
        else:
            self._replace()
        self._totals["syncs"] += 1
        self._last_sync = {
            "time": time.time(),
            "seconds": round(time.monotonic() - began, 6),
            "services": len(touched),
        }
        self._status_due = True
        self._left_behind.look_after(touched, self._tracker)

    def _resolve(self, touched: set[Ref]) -> dict[Ref, tuple[Entry, ...]]:
        changed: dict[Ref, tuple[Entry, ...]] = {}
        for ref in touched:
            if self._zone and ref.kind == "Service":
                if service := self._tracker.services.get(ref):
                    self._zone.put(service, self._tracker.slices(ref))
                else:
                    self._zone.delete(ref)
            entries, problems = resolve_ref(ref, self._tracker, self._surroundings.context)
            if problems:
                self._resolve_problems[ref] = problems
            else:
                self._resolve_problems.pop(ref, None)
            if entries != self._entries.get(ref, ()):
                changed[ref] = entries
                if entries:
                    self._entries[ref] = entries
                else:
                    del self._entries[ref]
                if any(e.empty == _UNREACHABLE and not e.endpoints for e in entries):
                    self._no_local.add(ref)
                else:
                    self._no_local.discard(ref)
        return changed

    def _carry_out(self, plan: Plan) -> None:
        apply(plan, self._maps)
        if plan.garbage:
            self._garbage.put((plan.garbage, self._planner))

    def _replace(self) -> None:
        """Makes what is known the whole state, and attaches if that is still to be done."""
        self._carry_out(self._planner.replace(self._entries))
        # Only now: what is in use there stands in the maps.
        self._maps.refuse(masks(self._settings.policy.refused_cidrs))
        self._skip()
        if not self._attached:
            self._attach()

    def _resync(self) -> None:
        """Starts over from what the maps hold, as after a restart."""
        self._planner = self._new_planner()
        if not self._ready:
            return
        touched, self._touched = self._touched, set()
        self._resolve(touched)
        self._replace()
        self._last_sync.pop("error", None)
        self._left_behind.look()

    def _attach(self) -> None:
        """The links, once the maps are filled: from here on sockets are translated."""
        flipped = self._pins.attach(self._loaded.generation, self._settings.cgroup)
        previous = self._loaded.generation.maps / "previous_load"
        if self._loaded.previous or previous.exists():
            # What still runs of the old programs counts into the old map: wait, then add it up.
            self._maps.wait_for_readers()
            self._maps.merge_load()
            self._loaded = dataclasses.replace(self._loaded, previous=None)
        self._pins.drop_others(self._loaded.generation)
        self._attached = True
        log.info("attached cgroup=%s flipped=%s", self._settings.cgroup, len(flipped))
        # Ten thousand Services are a million objects that never die: keep them out of the
        # collector's way, whose pauses would else be longer than a change takes.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECT)
        self._left_behind.look()  # what left while no agent looked
        self._write_status()
        self.ready.set()

    def _save_claims(self) -> None:
        claims, saved = self._cluster_ips.claims, self._claims
        if claims is saved:
            return
        if claims != saved:
            try:
                state.write_claims(self._settings.state_dir, claims)
            except OSError as error:  # connections don't wait for this disk
                log.error(
                    "ClusterIPs could not be saved, tried again with the next sync: %s", error
                )
                return
        self._claims = claims

    # -- telling -----------------------------------------------------------------------------

    def problems(self) -> list[Problem]:
        """Everything an operator should mend now."""
        found = [*self._source_problems, *self._tracker.problems, *self._surroundings.problems]
        found += [problem for each in self._resolve_problems.values() for problem in each]
        found += [
            Problem(
                f"not (wholly) in force: {reason}", "it is tried again by itself", object=str(r)
            )
            for r, reason in self._planner.unplaced.items()
        ]
        return found

    def _write_status(self, *, stopped: bool = False) -> None:
        self._status_due = False
        self._status_at = time.monotonic()
        problems = self._reporter.problems(self.problems())
        self._reporter.write(
            self._tracker,
            self._dns,
            stopped=time.time() if stopped else None,
            failed=self.failed,
            sync={
                **self._last_sync,
                **self._totals,
                "problems": self._reporter.problems_so_far,
                "attached": self._attached,
            },
            problems=[dataclasses.asdict(problem) for problem in problems],
            stale=self._left_behind.status(),
            noLocalEndpoints={"internal": len(self._no_local)},
            **self._surroundings.status(),
        )
