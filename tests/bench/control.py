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

from pointsman import abi, bpf, compilecache
from pointsman.agent import Agent
from pointsman.clusterip import ClusterIPs
from pointsman.context import Context, Policy
from pointsman.events import Changed, Event, Listed
from pointsman.maps import apply
from pointsman.objects import EndpointSlice, Ref, Service
from pointsman.pins import Pins
from pointsman.resolve import resolve
from pointsman.settings import Settings
from pointsman.telemetry import Telemetry
from pointsman.tracker import Tracker
from pointsman.values import TCP, Frontend, to_address
from pointsman.view import View
from tests.bench.datapath import BIG
from tests.bench.datapath import vip as low_vip
from tests.bench.report import show
from tests.support.agents import AgentProcess
from tests.support.kernel import Cgroup, Lab, until

ENDPOINTS = 10
#: Room for 10,000 Services × 10 endpoints and for their changes.
ROOM = ("--max-services", "32768", "--max-slots", "262144", "--max-endpoints", "131072")
CIDR = "10.96.0.0/12"

Figure = tuple[float, float, float]


def vip(number: int) -> str:
    return low_vip((1 << 16) + number)  # out of the way of the built-in DNS Service's


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
    gc.disable()  # as good as: the agent sets a threshold that a first sync does not reach
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
    gc.enable()
    assert not lab.planner.unplaced
    assert len(lab.maps.frontends()) == 2 * len(wanted)
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

    def where(self, ref: Ref) -> str:
        return ""


class _Timed(Telemetry):
    """Says when the agent has carried out a plan."""

    done_at = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.done = threading.Event()

    def stage(self, name: str, seconds: float) -> None:
        super().stage(name, seconds)
        if name == "apply":
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
            policy=Policy(bind_guard=False),  # this machine's own ports stay as they are
            bpffs=Path("/sys/fs/bpf") / name,
            cgroup=cgroup.path,
            run_dir=directory / "run",
            state_dir=directory / "state",
            manifests=directory,
            service_cidrs=(CIDR,),
            dns_listen=(("127.0.0.1", 0),),
            sizes=BIG,
        )
        timed = _Timed()
        agent = Agent(settings, source, timed)
        thread = threading.Thread(target=agent.run)
        thread.start()
        try:
            assert agent.ready.wait(120), agent.failed
            time.sleep(1)
            taken = []
            moved = [0] * (count + 1)
            for _ in range(wanted):
                number = rng.randint(1, count)
                moved[number] = moved[number] % 4 + 1
                data = json.dumps(endpoint_slice(number, moved[number])).encode()
                event = Changed((_decode_slice(data),))
                timed.done.clear()
                began = time.perf_counter()
                source.put(event)
                assert timed.done.wait(30)
                taken.append((timed.done_at - began) * 1e3)
                # Changes come at any moment of what the agent does once a second.
                time.sleep(rng.uniform(0, 0.04))
            return taken
        finally:
            agent.stop()
            thread.join()
            gc.unfreeze()
            Pins(settings.bpffs).unload()
            shutil.rmtree(settings.bpffs, ignore_errors=True)


def _percentile(values: list[float], percent: int) -> Figure:
    """Of all values, with the lowest and highest that it has in five parts of the run."""
    size = len(values) // 5
    parts = [values[i * size : (i + 1) * size] for i in range(5)]
    whole, *each = (quantiles(v, n=100, method="inclusive")[percent - 1] for v in (values, *parts))
    return whole, min(each), max(each)


def change(quick: bool) -> Any:
    """Milliseconds from a watch event in hand to the set switched, and from a file's rename."""
    figures: dict[str, Figure] = {}

    def tell(label: str, taken: list[float], *bars: str) -> None:
        for percent, bar in zip((50, 99), bars or ("", ""), strict=True):
            figures[f"{label} p{percent}"] = _percentile(taken, percent)
            show(f"{label}: p{percent}", figures[f"{label} p{percent}"], bar, " ms")

    wanted = 200 if quick else 1000
    for count in (100, 10_000):
        bars = ("≤ 2", "≤ 10")
        tell(f"{count} Services, event", _changes(count, wanted), *bars)
    for count in (100, 10_000):
        taken = _renames(count, 25 if quick else 100)
        tell(f"{count} Services, file renamed (60 ms of them quiet)", taken)
    return figures


# -- a process of its own ------------------------------------------------------------------------


class _Node(AgentProcess):
    """`pointsman up` with DNS on, as it is by default."""

    def start(self, *options: str, source: Path | None = None, wait: bool = True) -> None:
        arguments = [
            "up", "--no-bind-guard", "--manifests", self.manifests, "--cgroup", self.cgroup,
            "--bpffs", self.root,
            "--run-dir", self.run_dir, "--state-dir", self.state_dir,
            "--devices", "none", *options,
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pointsman.cli.main", *map(str, arguments)],
                stdout=log,
                stderr=log,
                env=self._environment(source),
            )
        if wait:
            until(self.attached, f"an attached agent; its log: {self.log.read_text()}", 120)

    def fill(self, count: int) -> None:
        """Lists of a thousand objects a file, and Service 1's EndpointSlice in one of its own."""
        for at in range(1, count + 1, 1000):
            numbers = range(at, min(at + 1000, count + 1))
            for name, make in (("services", service), ("slices", endpoint_slice)):
                chosen = (n for n in numbers if n > 1 or make is service)
                self.write(f"{name}-{at}.json", as_list(map(make, chosen)).decode())
        self.move(0)

    def move(self, moved: int) -> None:
        self.write("one.json", json.dumps(endpoint_slice(1, moved)))


@contextmanager
def _process(name: str, count: int) -> Iterator[_Node]:
    with _node(name) as (directory, cgroup, unique):
        node = _Node(directory, cgroup.path, unique)
        try:
            node.fill(count)
            yield node
        finally:
            node.close()


def _renames(count: int, wanted: int) -> list[float]:
    """Milliseconds from a manifest's rename to the set switched by an agent of its own."""
    with _process("rename", count) as node:
        node.start(*ROOM)
        directory = node.root / "current" / "maps"
        with _first_set(directory) as value:
            taken = []
            for turn in range(wanted):
                before = value()
                began = time.perf_counter()
                node.move(1 + turn % 4)
                while value() == before:
                    time.sleep(0.0002)
                    assert time.perf_counter() < began + 30, node.log.read_text()
                taken.append((time.perf_counter() - began) * 1e3)
                time.sleep(0.15)
        return taken


@contextmanager
def _first_set(directory: Path) -> Iterator[Callable[[], bytes]]:
    """Reads the set of Service 1, of mapped memory."""
    view = View(directory)
    ident = view.find(Frontend(to_address(vip(1)), 80, TCP))
    view.close()
    assert ident is not None
    opened = bpf.Map.open(directory / "services")
    array = bpf.Array(opened, read_only=True)
    at = ident * array.stride + abi.layouts()["service"].field("set").offset
    try:
        yield lambda: array.memory[at : at + 8]
    finally:
        array.close()
        opened.close()


def _resident(pid: int) -> tuple[float, float]:
    """Megabytes that a process has resident: mapped BPF arrays apart, and those."""
    sizes = {True: 0, False: 0}
    mapped = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        word, *rest = line.split()
        if not word.endswith(":"):
            mapped = "anon_inode:bpf-map" in rest
        elif word == "Rss:":
            sizes[mapped] += int(rest[0])
    return sizes[False] / 1024, sizes[True] / 1024


def memory(quick: bool) -> Any:
    """Megabytes resident in an idle agent after its first sync, DNS on, mapped arrays apart.

    Of a first start, and of restarts, which also read what the last agent left.
    """
    figures: dict[str, Figure] = {}
    for count, options, bar in ((100, (), "≤ 60"), (10_000, ROOM, "≤ 200")):
        found = []
        with _process("memory", count) as node:
            for _ in range(2 if quick else 4):
                node.start(*options)
                assert node.process
                time.sleep(3)
                found.append(_resident(node.process.pid))
                node.stop()
        for kind, runs in (("first start", found[:1]), ("restarted", found[1:])):
            label = f"{count} Services × {ENDPOINTS}, {kind}"
            figures[label] = figure(own for own, _ in runs)
            show(label, figures[label], bar, " MB")
        show("  mapped arrays", figure(mapped for _, mapped in found), "", " MB")
    return figures


def restart(quick: bool) -> Any:
    """Seconds from exec to an attached agent, 100 Services: programs pinned, kept, and compiled."""
    cold, kept = "compiled (nothing kept)", "kept (nothing pinned)"
    found: dict[str, list[float]] = {"pinned": [], kept: [], cold: []}
    with _process("restart", 100) as node:
        for _ in range(2 if quick else 4):
            for label, repeats in ((cold, 1), (kept, 1), ("pinned", 4)):
                if label != "pinned":
                    node.cli("unload")
                if label == cold:
                    for path in compilecache.directory().glob("*.programs"):
                        path.unlink()
                for _ in range(repeats):
                    began = time.perf_counter()
                    node.start(wait=False)
                    until(node.attached, "an attached agent")
                    found[label].append(time.perf_counter() - began)
                    node.stop()
    figures = {label: figure(each) for label, each in found.items()}
    show("pinned", figures["pinned"], "≤ 1", " s")
    for label in (kept, cold):
        show(label, figures[label], "", " s")
    return figures


BENCHES: dict[str, Callable[[bool], Any]] = {
    "sync": sync,
    "change": change,
    "memory": memory,
    "restart": restart,
}
