"""The maps, kept in step with the objects. Everything here belongs to the thread that owns them."""

from __future__ import annotations

import dataclasses
import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from pointsman import abi, state
from pointsman.builtin import DnsService
from pointsman.choice import choice_of
from pointsman.clusterip import ClusterIPs
from pointsman.drainsets import Asked, sets_of
from pointsman.errors import NotLoaded, PointsmanError
from pointsman.events import Changed, Listed, Problem
from pointsman.generations import Loaded
from pointsman.maps import Maps, apply, take_over
from pointsman.membership import Membership
from pointsman.nodes import masks
from pointsman.objects import EndpointSlice, Ref
from pointsman.pins import Pins
from pointsman.plan import Garbage, Plan
from pointsman.planner import Planner
from pointsman.settings import Settings
from pointsman.slowstart import SlowStart, told
from pointsman.surroundings import Surroundings
from pointsman.telemetry import Telemetry
from pointsman.tracker import Tracker
from pointsman.values import Address, Entry
from pointsman.view import View
from pointsman.wanted import resolve_ref, without_local
from pointsman.zone import Zone

log = logging.getLogger("pointsman.agent")

TRIGGER = "endpoints.kubernetes.io/last-change-trigger-time"
MAX_CIDRS = abi.constants()["MAX_CIDRS"]
COLLECT = gc.get_threshold()
_HOLD = 1.0  # seconds between two looks at the links, at least


class Sync:
    """From objects to maps. `reclaim` gets what is to be taken back after a grace period."""

    def __init__(
        self,
        settings: Settings,
        surroundings: Surroundings,
        telemetry: Telemetry,
        reclaim: Callable[[Garbage, Planner], None],
    ) -> None:
        self._settings = settings
        self._surroundings = surroundings
        self._telemetry = telemetry
        self._reclaim = reclaim
        self._pins = Pins(settings.bpffs, settings.sizes)
        self._touched: set[Ref] = set()  # not resolved yet
        self._triggers: list[float] = []  # of what is not in the maps yet, seconds since the epoch
        self._entries: dict[Ref, tuple[Entry, ...]] = {}
        self._problems: dict[Ref, tuple[Problem, ...]] = {}
        #: Services, each with the policies that leave it without an endpoint here.
        self._no_local: dict[Ref, frozenset[str]] = {}
        self._attached = False
        self._held_at = 0.0
        self._off: tuple[Problem, ...] = ()  # why links that came off are not attached again
        self._listed = self._retry = self._skips = False
        #: In force, as `masks` gives them. None: what an agent before left.
        self._refused: tuple[tuple[Address, Address], ...] | None = None
        self._failed_at: float | None = None
        self._claims: dict[str, Ref] = {}
        self._cluster_ips: ClusterIPs | None = None
        if settings.api is None:
            self._claims = state.read_claims(settings.state_dir)
            self._cluster_ips = ClusterIPs(settings.service_cidrs, self._claims)
        self._kept = state.read_annotations(settings.state_dir)
        self.tracker = Tracker(self._cluster_ips, self._kept)
        self._slow_start = SlowStart()
        self._draining: set[Ref] = set()  # Services with a rate
        self.zone: Zone | None = None
        self.dns_service: DnsService | None = None
        self.totals = {"syncs": 0, "failures": 0}
        self.last: dict[str, Any] = {}

    def open(self, stop: threading.Event) -> None:
        """Loads the programs and reads the maps. Raises what `Pins.load` does, also when `stop` is
        set meanwhile: on a busy machine a compilation takes longer than who ends us waits."""
        self._pins.stop = stop
        self._loaded = self._pins.load(packets=self._settings.packets.wanted, later=True)
        name = self._loaded.generation.name
        log.info("loaded generation=%s fresh=%s", name, self._loaded.fresh)
        self.maps = Maps(self._loaded.generation.maps, self._loaded.generation.programs)
        self._planner = self._new_planner()

    def _new_planner(self) -> Planner:
        """Takes over what the maps hold; after an upgrade also the numbers of the old ones."""
        inherited = None
        if self._loaded.previous and self._loaded.rebuilt:
            previous = View(self._loaded.previous.maps)
            inherited = previous.snapshot()
            previous.close()
        # Where they could not be loaded, those of a former start may go on.
        return take_over(self.maps, inherited, packets=self._settings.packets.wanted)

    @property
    def loaded(self) -> Loaded:
        return self._loaded

    @property
    def attached(self) -> bool:
        return self._attached

    @property
    def ready(self) -> bool:
        """Whether enough is known to say what the maps should hold."""
        return self.tracker.listed and self._surroundings.known

    @property
    def settled(self) -> bool:
        """Whether the maps say all that is known."""
        return self.ready and self._attached and not self._touched and not self._failed_at

    # -- taking in ---------------------------------------------------------------------------

    def take(self, message: Listed | Changed) -> None:
        if isinstance(message, Listed):
            self._listed = True
        elif self.tracker.listed:
            self._triggers += filter(None, map(_trigger, message.objects))
        event = self.dns_service.add(message) if self.dns_service else message
        self._touched |= self.tracker.fold(event)

    def reclaimed(self, garbage: Garbage, planner: Planner) -> None:
        """A grace period is over."""
        if planner is self._planner:
            self._planner.reclaim(garbage)
            self._retry = self._planner.waiting

    def members(self) -> Membership | None:
        """Which endpoints each frontend has; None while that is not what the maps say."""
        if not self.settled:
            return None
        return Membership(self.tracker, self._surroundings.context, self._planner.owner)

    def asked(self, refs: Iterable[Ref]) -> dict[Ref, Asked | None]:
        """Which of these Services want connections ended for endpoints that join, and which want
        that no longer. To be called when the maps are in step."""
        found: dict[Ref, Asked | None] = {}
        context = self._surroundings.context
        for ref in refs:
            service = self.tracker.services.get(ref)
            rate = choice_of(service.metadata.annotations, context.policy).drain if service else 0.0
            if rate:
                # With the whole weights: a step of slow start is no reason to end anything.
                entries, _ = resolve_ref(ref, self.tracker, context)
                sets = sets_of(entries, self._planner.endpoints)
                found[ref] = Asked(rate, sets, ref in self._slow_start.steps)
                self._draining.add(ref)
            elif ref in self._draining:
                self._draining.remove(ref)
                found[ref] = None
        return found

    # -- syncing -----------------------------------------------------------------------------

    def advance(self) -> set[Ref] | None:
        """Brings the maps in step, if anything is to be done; the objects that were touched, or
        None where nothing was. After an OSError nothing is done until `retry`.
        """
        self._touched |= self._surroundings.follow(self.tracker, self._touched)
        if self._failed_at is not None:
            return None
        self._touched |= self._slow_start.due(time.monotonic())
        try:
            touched = self._advance()
            if self._skips:
                self._skip()
        except OSError as error:
            self._fail(error)
            return None
        return touched

    def _advance(self) -> set[Ref] | None:
        if not self.ready:
            return None
        if not (self._touched or self._listed or self._retry or not self._attached):
            self._telemetry.settled()
            return None
        began, full = time.monotonic(), self._listed or not self._attached
        self._listed = self._retry = False
        touched = self._touched  # forgotten only when they are in the maps
        changed = self._resolve(touched)
        self._save()
        self._telemetry.stage("resolve", time.monotonic() - began)
        if self._attached:
            self._refuse(before=True)
            self._carry_out(self._planner.update(changed))
            self._refuse()
        else:
            self._replace()
        self._done(began, full, len(touched))
        return touched

    def retry(self, after: float) -> set[Ref] | None:
        """One way to recover from anything: `after` seconds after a failure the maps are read, and
        all is planned anew. Until then nothing goes by the planner, whose books are wrong. Gives
        what `advance` does."""
        if self._failed_at is None or time.monotonic() < self._failed_at + after:
            return None
        try:
            self._planner = self._new_planner()
            self._failed_at = None
            if not self.ready:
                return None
            began = time.monotonic()
            self._resolve(self._touched)
            self._save()
            self._replace()
        except OSError as error:
            self._fail(error)
            return None
        touched = self._touched
        self._done(began, True, len(touched))
        return touched

    def _fail(self, error: OSError) -> None:
        self.totals["failures"] += 1
        self.last["error"] = str(error)
        self._failed_at = time.monotonic()
        self._telemetry.failed()
        log.error("sync failed, the maps will be read again: %s", error)

    def _done(self, began: float, full: bool, services: int) -> None:
        seconds = time.monotonic() - began
        self._touched = set()
        self.totals["syncs"] += 1
        self.last = {"time": time.time(), "seconds": round(seconds, 6), "services": services}
        triggers, self._triggers = self._triggers, []
        self._telemetry.synced(full, seconds, triggers)

    def _resolve(self, touched: set[Ref]) -> dict[Ref, tuple[Entry, ...]]:
        changed: dict[Ref, tuple[Entry, ...]] = {}
        context = self._surroundings.context
        # In an order of its own: from nothing, the same state gets the same ids.
        for ref in sorted(touched, key=lambda ref: (ref.kind != "Service", ref)):
            try:
                if ref.kind == "Service":
                    self._look_at(ref)
                entries, problems = resolve_ref(ref, self.tracker, context)
                if ref.kind == "Service":
                    entries = self._slowed(ref, entries)
            except Exception as error:
                log.exception("%s could not be worked out", ref)
                entries, problems = self._entries.get(ref, ()), (_mistake(ref, error),)
            if problems:
                self._problems[ref] = problems
            else:
                self._problems.pop(ref, None)
            if entries != self._entries.get(ref, ()):
                changed[ref] = entries
                if entries:
                    self._entries[ref] = entries
                else:
                    del self._entries[ref]
        return changed

    def _slowed(self, ref: Ref, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        """With the weights that the endpoints have by now."""
        service, policy = self.tracker.services.get(ref), self._surroundings.context.policy
        seconds = choice_of(service.metadata.annotations, policy).slow_start if service else 0
        return self._slow_start.weigh(ref, entries, seconds, time.monotonic())

    def _look_at(self, ref: Ref) -> None:
        """What else hangs on a Service: its names, and whether its policies leave it empty here."""
        service = self.tracker.services.get(ref)
        if service and (kinds := without_local(service, self.tracker, self._surroundings.context)):
            self._no_local[ref] = kinds
        else:
            self._no_local.pop(ref, None)
        if self.zone and service:
            self.zone.put(service, self.tracker.slices(ref))
        elif self.zone:
            self.zone.delete(ref)

    def _carry_out(self, plan: Plan) -> None:
        began = time.monotonic()
        apply(plan, self.maps)
        if plan.garbage:
            self._reclaim(plan.garbage, self._planner)
        self._telemetry.stage("apply", time.monotonic() - began)

    def _replace(self) -> None:
        """Makes what is known the whole state, and attaches if that is still to be done."""
        began = time.monotonic()
        plan = self._planner.replace(self._entries)
        self._telemetry.stage("plan", time.monotonic() - began)
        self._carry_out(plan)
        self._refuse()
        self._skip()
        if not self._attached:
            self._attach()

    def _refuse(self, *, before: bool = False) -> None:
        """Unused addresses are refused where the operator wants it. `before` the frontends are
        written no more than until now, and after them no less: what is in use always has one."""
        cidrs = masks(self._surroundings.context.refused_cidrs)[:MAX_CIDRS]
        if cidrs != self._refused:
            if before:
                cidrs = tuple(cidr for cidr in self._refused or () if cidr in cidrs)
            self.maps.refuse(cidrs)
            self._refused = cidrs

    def skip(self) -> None:
        """With the next step: leaves alone the sockets of the namespaces that opted out."""
        self._skips = True

    def _skip(self) -> None:
        if (skipped := self._surroundings.skipped) is not None:
            self.maps.skip(skipped)
        self._skips = False

    def _attach(self) -> None:
        """The links, once the maps are filled: from here on sockets are translated."""
        flipped = self._pins.attach(self._loaded.generation, self._settings.cgroup)
        previous = self._loaded.generation.maps / "previous_load"
        if self._loaded.previous or previous.exists():
            # What still runs of the old programs counts into the old map: wait, then add it up.
            self.maps.wait_for_readers()
            self.maps.merge_load()
            self._loaded = dataclasses.replace(self._loaded, previous=None)
        self._pins.drop_others(self._loaded.generation)
        self._attached = True
        log.info("attached cgroup=%s flipped=%s", self._settings.cgroup, len(flipped))
        # Ten thousand Services are a million objects that never die: keep them out of the
        # collector's way, whose pauses would else be longer than a change takes.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*COLLECT)

    def hold(self) -> bool:
        """Looks, once a second at most, whether the programs are attached still, and mends that;
        whether there is something to tell. Raises NotLoaded if they are gone."""
        if not self._attached or time.monotonic() < self._held_at + _HOLD:
            return False
        self._held_at, cgroup, before = time.monotonic(), self._settings.cgroup, self._off
        try:
            again = self._pins.hold(self._loaded.generation, cgroup)
        except NotLoaded:
            raise
        except (OSError, PointsmanError) as error:
            message = f"nothing is translated, or not all, for the programs are off {cgroup}"
            mend = "make that cgroup again; they are attached as soon as that can be"
            self._off = (Problem(f"{message}: {error}", mend, reason="NotAttached"),)
        else:
            self._off = ()
            if again:
                log.warning("attached again cgroup=%s hooks=%s", cgroup, ",".join(again))
        return self._off != before

    def _save(self) -> None:
        """What the next start must know; connections don't wait for this disk."""
        self._save_claims()
        if (kept := self.tracker.kept) != self._kept:
            try:
                state.write_annotations(self._settings.state_dir, kept)
            except OSError as error:
                log.error(
                    "annotations could not be saved, tried again with the next sync: %s", error
                )
            else:
                self._kept = kept

    def _save_claims(self) -> None:
        if self._cluster_ips is None:
            return
        claims, saved = self._cluster_ips.claims, self._claims
        if claims is saved:
            return
        if claims != saved:
            try:
                state.write_claims(self._settings.state_dir, claims)
            except OSError as error:
                log.error(
                    "ClusterIPs could not be saved, tried again with the next sync: %s", error
                )
                return
        self._claims = claims

    # -- telling -----------------------------------------------------------------------------

    def problems(self) -> list[Problem]:
        """What an operator should mend: among the objects, and what has no room in the maps."""
        found = [*self._off, *self.tracker.problems]
        found += [problem for each in self._problems.values() for problem in each]
        found += [
            Problem(
                f"not (wholly) in force: {reason}",
                "it is tried again by itself",
                object=str(ref),
                reason="MapFull",
            )
            for ref, reason in self._planner.unplaced.items()
        ]
        return [*found, *self._planner.shortages()]

    def slow(self) -> dict[str, dict[str, int]]:
        """Per cent of their weight that endpoints have in slow start, by Service."""
        return told(self._slow_start.steps)

    def usage(self) -> Mapping[str, tuple[int, int]]:
        """How many elements are taken, and how many there are, by map."""
        return self._planner.usage()

    def no_local_endpoints(self) -> Mapping[str, int]:
        """How many Services each traffic policy leaves without an endpoint on this node."""
        found = Counter(kind for kinds in self._no_local.values() for kind in kinds)
        return {kind: found[kind] for kind in ("internal", "external")}


def _mistake(ref: Ref, error: Exception) -> Problem:
    """One object that we can't cope with must not stop the others."""
    return Problem(
        f"it is not followed, what was in force stays: {type(error).__name__}: {error}",
        "this is a mistake in Pointsman: report it, with the object and the agent's log",
        object=str(ref),
        reason="NotFollowed",
    )


def _trigger(obj: object) -> float | None:
    """When what an EndpointSlice tells last changed, seconds since the epoch; None if it says not.

    https://github.com/kubernetes/community: SIG scalability, network programming latency.
    """
    if not isinstance(obj, EndpointSlice):
        return None
    text = obj.metadata.annotations.get(TRIGGER)
    if not text:
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
