"""What keeping the maps in step costs: full sync, one change, memory, restart."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import msgspec

from pointsman import bpf
from pointsman.agent import Agent, Settings
from pointsman.clusterip import ClusterIPs
from pointsman.events import Changed, Event, Listed
from pointsman.maps import View, apply
from pointsman.objects import EndpointSlice, Service
from pointsman.pins import Sizes
from pointsman.plan import Plan
from pointsman.resolve import Context, resolve
from pointsman.tracker import Tracker
from pointsman.values import TCP, Frontend, to_address
from tests.bench.datapath import BIG, vip
from tests.bench.report import show
from tests.support.agents import AgentProcess
from tests.support.kernel import Cgroup, Lab, own_network, until

ENDPOINTS = 10
#: Room for 10,000 Services × 10 endpoints and for their changes.
ROOM = ("--max-services", "32768", "--max-slots", "262144", "--max-endpoints", "131072")
CIDR = "10.96.0.0/12"

Figure = tuple[float, float, float]


def figure(values: Iterable[float]) -> Figure:
    """(median, lowest, highest)."""
    each = list(values)
    return median(each), min(each), max(each)


# -- what an API server would send ---------------------------------------------------------------


def _metadata(name: str, number: int, manager: str, **more: Any) -> dict[str, Any]:
    """With the fields that Pointsman passes over, as they are in every real object."""
    return {
        "name": name,
        "namespace": "bench",
        "uid": f"7d2f6f0e-0000-4000-8000-{number:012x}",
        "resourceVersion": str(1_000_000 + number),
        "creationTimestamp": "2024-05-01T08:30:00Z",
        "managedFields": [
            {
                "manager": manager,
                "operation": "Update",
                "apiVersion": "v1",
                "time": "2024-05-01T08:30:00Z",
                "fieldsType": "FieldsV1",
                "fieldsV1": {"f:metadata": {"f:labels": {".": {}, "f:app": {}}}, "f:spec": {}},
            }
        ],
        **more,
    }


def service(number: int) -> dict[str, Any]:
    name = f"s{number}"
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(name, number, "kubectl", labels={"app": name}),
        "spec": {
            "clusterIP": vip(number),
            "clusterIPs": [vip(number)],
            "internalTrafficPolicy": "Cluster",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
            "sessionAffinity": "None",
            "type": "ClusterIP",
        },
        "status": {"loadBalancer": {}},
    }


def endpoint_slice(number: int, moved: int = 0) -> dict[str, Any]:
    """Ten endpoints of their own for each Service; the first one's address differs by `moved`."""
    name = f"s{number}"
    labels = {
        "app": name,
        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        "kubernetes.io/service-name": name,
    }
    endpoints = []
    for n in range(ENDPOINTS):
        at = number * ENDPOINTS + n
        high = 244 if n or not moved else 250 + moved
        endpoints.append(
            {
                "addresses": [f"10.{high - (at >> 16)}.{at >> 8 & 255}.{at & 255}"],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": f"node-{at % 100}",
                "targetRef": {
                    "kind": "Pod",
                    "namespace": "bench",
                    "name": f"{name}-6d4cf56db6-{n:05}",
                    "uid": f"9b1c6f0e-0000-4000-8000-{at:012x}",
                },
                "zone": f"zone-{at % 3}",
            }
        )
    return {
        "addressType": "IPv4",
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": _metadata(f"{name}-x7k2p", number, "kube-controller-manager", labels=labels),
        "endpoints": endpoints,
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
    }


def as_list(items: Iterable[dict[str, Any]]) -> bytes:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(items)}).encode()


class _Services(msgspec.Struct):
    items: tuple[Service, ...]


class _Slices(msgspec.Struct):
    items: tuple[EndpointSlice, ...]


_decode_services = msgspec.json.Decoder(_Services).decode
_decode_slices = msgspec.json.Decoder(_Slices).decode
_decode_slice = msgspec.json.Decoder(EndpointSlice).decode


def decode(services: bytes, slices: bytes) -> Listed:
    return Listed((*_decode_services(services).items, *_decode_slices(slices).items))


def documents(count: int) -> tuple[bytes, bytes]:
    numbers = range(1, count + 1)
    return as_list(map(service, numbers)), as_list(map(endpoint_slice, numbers))


# -- full sync -----------------------------------------------------------------------------------


class Stages:
    """CPU seconds of this process by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.process_time()

    def end(self, name: str) -> None:
        now = time.process_time()
        self.seconds[name] = now - self._at
        self._at = now


def _sync_once(lab: Lab, given: tuple[bytes, bytes], tracker: Tracker) -> dict[str, float]:
    # As in a process that has just started: no address was seen before.
    to_address.cache_clear()
    gc.collect()
    stages = Stages()
    listed = decode(*given)
    stages.end("decode")
    touched = tracker.fold(listed)
    stages.end("fold")
    wanted = {
        ref: resolve(tracker.services[ref], tracker.slices(ref), Context())[0] for ref in touched
    }
    stages.end("resolve")
    plan = lab.planner.replace(wanted)
    stages.end("plan")
    apply(plan, lab.maps)
    stages.end("write")
    used = lab.planner.used()
    assert not lab.planner.unplaced
    assert used == {"services": 2 * len(wanted), "slots": 10 * len(wanted)} | {
        "endpoints": 10 * len(wanted)
    }
    return stages.seconds


def sync(quick: bool) -> Any:
    """CPU seconds from the lists' JSON in memory to maps written, 10,000 Services × 10 endpoints.

    The comparison with an nftables load of the same Services is left to a later issue.
    """
    given = documents(10_000)
    kinds: dict[str, Callable[[], Tracker]] = {
        "API server": Tracker,
        "ClusterIPs handed out here": lambda: Tracker(ClusterIPs([CIDR], {})),
    }
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    lab = Lab(f"pm_bench_{os.getpid()}", sizes=BIG)
    try:
        for _ in range(3 if quick else 9):
            for kind, make in kinds.items():
                runs[kind].append(_sync_once(lab, given, make()))
                lab.clear()
    finally:
        lab.close()
    megabytes = sum(map(len, given)) / 1e6
    figures: dict[str, Figure] = {}
    for kind, each in runs.items():
        print(f"  {kind}: {megabytes:.0f} MB of JSON")
        for stage in each[0]:
            figures[f"{kind} {stage}"] = figure(run[stage] for run in each)
            show(f"  {stage}", figures[f"{kind} {stage}"], "", " s")
        figures[f"{kind} total"] = figure(sum(run.values()) for run in each)
        show("  total", figures[f"{kind} total"], "≤ 1", " s")
    return figures


# -- one change ----------------------------------------------------------------------------------


class _Memory:
    """A source that gives a list, then whatever the bench puts."""

    def __init__(self, listed: Listed) -> None:
        self._listed = listed

    def run(self, put: Callable[[Event], None], stop: threading.Event) -> None:
        self.put = put
        put(self._listed)
        stop.wait()


class _Timed(Agent):
    """The agent, which says when it has carried out a plan."""

    done_at = 0.0

    def __init__(self, settings: Settings, source: _Memory) -> None:
        super().__init__(settings, source)
        self.done = threading.Event()

    def _carry_out(self, plan: Plan) -> None:
        super()._carry_out(plan)
        if plan.sets:
            self.done_at = time.perf_counter()
            self.done.set()


@contextmanager
def _node(name: str) -> Iterator[tuple[Path, Cgroup, str]]:
    """A directory, a child cgroup without this process, and a name below /sys/fs/bpf."""
    directory = Path(tempfile.mkdtemp())
    name = f"pm_bench_{name}_{os.getpid()}"
    cgroup = Cgroup(name)
    try:
        yield directory, cgroup, name
    finally:
        cgroup.close()
        shutil.rmtree(directory)


def _changes(count: int, wanted: int) -> list[float]:
    """Milliseconds from the event in hand to the set switched, in a running agent with DNS."""
    source = _Memory(decode(*documents(count)))
    rng = random.Random(1)
    with _node("change") as (directory, cgroup, name):
        settings = Settings(
            bpffs=Path("/sys/fs/bpf") / name,
            cgroup=cgroup.path,
            run_dir=directory / "run",
            state_dir=directory / "state",
            manifests=directory,
            service_cidrs=(CIDR,),
            dns_listen=(("127.0.0.1", 0),),
            sizes=BIG,
        )
        agent = _Timed(settings, source)
        thread = threading.Thread(target=agent.run)
        thread.start()
        try:
            assert agent.ready.wait(120), agent.failed
            time.sleep(1)
            taken = []
            for turn in range(1, wanted + 1):
                number = rng.randint(1, count)
                data = json.dumps(endpoint_slice(number, 1 + turn % 4)).encode()
                event = Changed((_decode_slice(data),))
                agent.done.clear()
                began = time.perf_counter()
                source.put(event)
                assert agent.done.wait(30)
                taken.append((agent.done_at - began) * 1e3)
                # Changes come at any moment of what the agent does once a second.
                time.sleep(rng.uniform(0, 0.04))
            return taken
        finally:
            agent.stop()
            thread.join()
            gc.unfreeze()
            AgentProcess.unload(name, directory)


def _percentiles(values: list[float]) -> tuple[Figure, Figure]:
    """p50 and p99 of all, with the lowest and highest of five parts in turn."""
    size = len(values) // 5
    parts = [values[i * size : (i + 1) * size] for i in range(5)]
    p50, p99 = (
        (quantiles(values, n=100)[at], *map(float, _ends(quantiles(p, n=100)[at] for p in parts)))
        for at in (49, 98)
    )
    return p50, p99


def _ends(values: Iterable[float]) -> tuple[float, float]:
    each = list(values)
    return min(each), max(each)
