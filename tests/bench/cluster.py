"""Pointsman and kube-proxy (nftables mode) on the same objects of a real API server, in turns."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Any

from tests.bench.clusterfigures import Found, tell
from tests.bench.control import ENDPOINTS
from tests.bench.probe import Probe, Prober
from tests.bench.proxies import (
    Histogram,
    KubeProxy,
    Pointsman,
    Side,
    cpu,
    forget_flows,
    helpers_peak,
    kernel_seconds,
    kernel_threads,
    memory,
    settle,
)
from tests.bench.storm import NAMESPACE, Access, Storm, create, storm
from tests.cluster import build
from tests.cluster.cluster import Cluster
from tests.cluster.plane import SERVER

#: How many (--services); None: 10,000, quick 1,000.
SERVICES: int | None = None
#: A first sync of 10,000 Services by nft can take minutes.
PATIENCE = 900.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is done in a round; times in seconds."""

    rounds: int
    idle: float
    changes: int
    storm: float


QUICK, FULL = Plan(2, 5, 5, 10), Plan(3, 30, 20, 30)
NOBODY = "no proxy"


class Bench:
    """Rounds of the same with each proxy; what comes out is in `found`."""

    def __init__(self, cluster: Cluster, services: int, plan: Plan) -> None:
        self.cluster, self.services, self.plan = cluster, services, plan
        self.found: Found = defaultdict(lambda: defaultdict(list))
        self._turns, self._began = count(), time.monotonic()
        self._rng = Random(1)
        space = cluster.space(NAMESPACE)
        # Written as controllers do, but by the bench: they would only take CPU now.
        plane = cluster.plane
        plane.stop("kube-controller-manager", "kube-scheduler")
        admin = plane.pki.client("admin", "system:masters")
        self.access = Access(
            plane.network, SERVER, plane.pki.authority, admin.certificate, admin.key
        )
        create(cluster.api, 1, services // 2)
        self.probe = Probe(cluster, space, "node-c")
        create(cluster.api, services // 2 + 1, services)
        self.say("API server", f"has {services} Services × {ENDPOINTS} endpoints")

    def note(self, label: str, who: str, *values: float) -> None:
        self.found[label][who].append(list(values))

    def say(self, who: str, what: str) -> None:
        print(f"  {time.monotonic() - self._began:6.0f} s  {who}: {what}", flush=True)

    # -- in turns ----------------------------------------------------------------------------

    def nobody(self) -> None:
        """What the kernel's threads do anyhow."""
        self.say(NOBODY, "storm")
        with self._storm() as changes:
            before = kernel_threads()
            changes.end()
            self._note_rate("kernel threads, storm", NOBODY, kernel_seconds(before), changes)

    def visit(self, side: Side) -> None:
        side.remove()
        self._first_start(side)
        prober = Prober(self.cluster, side.node, self.probe.ip, 1)
        try:
            prober.answer(self.probe.current)
            self._load(side, side.name, prober)
            self.note("VmHWM", side.name, memory(side.pid, "VmHWM"))
            side.kill()
            quick = side.without_pause()  # a first sync does not wait for it
            self._restart(side, prober)
            if quick:
                self._load(side, quick, prober)
        finally:
            prober.close()
            side.remove()

    def _first_start(self, side: Side) -> None:
        self.say(side.name, "first start")
        prober = Prober(self.cluster, side.node, self.probe.ip, 0.02)
        try:
            prober.fails()
            began, began_here = time.time(), time.monotonic_ns()
            side.start()
            ready, helper = self._until_ready(side)
            served = prober.answer(seconds=PATIENCE)
        finally:
            prober.close()
        forget_flows(side.node)
        self.note("nothing there: start to ready", side.name, ready - began)
        self.note("nothing there: start to data path", side.name, (served - began_here) / 1e9)
        self.note("VmHWM of a helper (loader, nft)", side.name, helper)
        settle(side.node)
        self.note("VmRSS, settled", side.name, memory(side.pid, "VmRSS"))
        self.say(side.name, "idle")
        before, began_here = cpu(side.node), time.monotonic_ns()
        time.sleep(self.plan.idle)
        spent = (cpu(side.node) - before) / (time.monotonic_ns() - began_here)
        self.note("CPU, idle", side.name, spent * 1e12)

    def _restart(self, side: Side, prober: Prober) -> None:
        self.say(side.name, "restart")
        began = time.time()
        side.start()
        ready, _ = self._until_ready(side)
        self.note("killed and started: to ready", side.name, ready - began)
        settle(side.node)
        self.note("VmRSS, killed and started", side.name, memory(side.pid, "VmRSS"))
        self._change(prober, 0, 0)
        self._note_failures("restart", side.name, prober)

    def _until_ready(self, side: Side) -> tuple[float, float]:
        """When it was (time.time), and the VmHWM of what it started for that."""
        until, helper = time.monotonic() + PATIENCE, 0.0
        while not (ready := side.ready()):
            assert side.pid  # it still runs
            assert time.monotonic() < until, f"{side.name} is not ready after {PATIENCE:g} s"
            helper = max(helper, helpers_peak(side))
            time.sleep(0.01)
        return ready, helper

    # -- idle and storm ----------------------------------------------------------------------

    def _load(self, side: Side, who: str, prober: Prober) -> None:
        self.say(who, "single changes")
        # Longer than kube-proxy's pause after each sync: a change that comes alone.
        each = [self._change(prober, 1.2, 1.7) for _ in range(self.plan.changes)]
        self._note_latencies("single", who, each)
        self._note_failures("single", who, prober)

        self.say(who, "storm")
        metric = Histogram.of(side.node)
        with self._storm() as changes:
            before, threads = cpu(side.node), kernel_threads()
            each = []
            while time.monotonic() < changes.until - 2:
                each.append(self._change(prober, 0, 0.4))
            changes.end()
            spent = kernel_seconds(threads)
        settle(side.node)  # who puts work off does it now
        self._note_rate("CPU, storm", who, cpu(side.node) - before, changes)
        self._note_rate("kernel threads, storm", who, spent, changes)
        self.note("changes, storm", who, changes.rate)
        self._note_latencies("storm", who, each)
        self._note_failures("storm", who, prober)
        metric = Histogram.of(side.node).since(metric)
        self.note("programming duration, storm: mean", who, metric.mean)
        for percent in (50, 99):
            label = f"programming duration, storm: p{percent}"
            self.note(label, who, metric.quantile(percent / 100))

    def _storm(self) -> AbstractContextManager[Storm]:
        return storm(self.access, self.services, self.plan.storm, next(self._turns))

    def _change(self, prober: Prober, least: float, most: float) -> tuple[float, float]:
        """Milliseconds to the first connection that reaches the new endpoint: since the change
        was sent, and since the API server answered. Then a pause (seconds)."""
        sent = time.monotonic_ns()
        self.probe.flip()
        answered = time.monotonic_ns()
        seen = prober.answer(self.probe.current)
        time.sleep(self._rng.uniform(least, most))
        return (seen - sent) / 1e6, (seen - answered) / 1e6

    def _note_latencies(self, load: str, who: str, each: list[tuple[float, float]]) -> None:
        for since, values in zip(("sent", "answered"), zip(*each, strict=True), strict=True):
            self.note(f"change {since}, {load}", who, *values)

    def _note_failures(self, when: str, who: str, prober: Prober) -> None:
        failures = prober.failures()
        self.note(f"failed connects, {when}", who, len(failures))
        for name, times in Counter(failures).items():
            self.say(who, f"{times} × {name}")

    def _note_rate(self, label: str, who: str, used: float, changes: Storm) -> None:
        self.note(label, who, used / changes.seconds * 1e3)


def cluster(quick: bool) -> Any:
    """Pointsman and kube-proxy (nftables) on the same objects of a real API server, in turns.

    Each on a node of its own, while the other does not run. Needs the programs of
    `python -m tests.cluster.build`. Watches can be faster than the answer to the change: a latency
    since then may be negative. Below its first bound, 250 ms, the metric's quantiles say nothing.
    """
    where = build.directory()
    if lacks := build.missing(where):
        print(f"  left out: no {', '.join(lacks)}; run 'python -m tests.cluster.build'")
        return {}
    plan, services = (QUICK, 1_000) if quick else (FULL, 10_000)
    services = SERVICES or services
    with Cluster(where, "bench") as made:
        bench = Bench(made, services, plan)
        stopped = ""
        try:
            for _ in range(plan.rounds):
                bench.nobody()
                for side in (Pointsman(made, "node-a"), KubeProxy(made, "node-b")):
                    bench.visit(side)
        except (AssertionError, RuntimeError) as error:  # an hour's figures are not thrown away
            stopped = str(error)
            print(f"  stopped: {error}\n{made.tail()}")
    figures = tell(bench.found, KubeProxy.name, Pointsman.name)
    return {"services": services, "stopped": stopped, **figures}


BENCHES = {"cluster": cluster}
