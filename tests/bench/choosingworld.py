"""The cluster of the bench of choosing: clients in pods on two nodes, endpoints on a third.

node-a  client pods, the agent        ┐
node-b  client pods, kube-proxy       ├─ node-c ── endpoints, each a namespace
                                      ┘         └─ tun, 25 ms ── five more: another zone
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from demo.lab import Place, stop
from tests.bench.choosingcases import (
    CANARY_WEIGHT,
    DEADLINE,
    FAR,
    FAR_DELAY,
    SPARE,
    USUAL,
    WORKERS,
    ZONES,
    Arm,
    Case,
)
from tests.bench.choosingfigures import Answers, Asked
from tests.cluster.cluster import Cluster
from tests.cluster.network import ip, namespace

NAMESPACE = "choosing"
PORT, TARGET = 80, 8080
PODS, PROCESSES = 20, 40  # of clients, on each node
FAR_RANGE = "10.244.99"
MANY = 100_000  # workers: nobody waits
_DROP = """
table ip gone {
  chain in { type filter hook input priority 0; policy drop; }
  chain out { type filter hook output priority 0; policy drop; }
}
"""


class Endpoint(NamedTuple):
    namespace: Path
    address: str


class World:
    """Services come and go with `publish` and `withdraw`; `run` has clients ask one of them."""

    def __init__(self, cluster: Cluster, scratch: Path) -> None:
        self.cluster, self.scratch = cluster, scratch
        self.program = scratch / "choosing"
        source = Path(__file__).with_name("choosing.c")
        subprocess.run(["gcc", "-O2", "-o", str(self.program), str(source)], check=True)
        cluster.space(NAMESPACE)
        # The bench writes slices itself: others would only take CPU now.
        cluster.plane.stop("kube-controller-manager", "kube-scheduler")
        self.clients = {
            node: [self._pod(node, f"{node}-{i}").namespace for i in range(PODS)]
            for node in ("node-a", "node-b")
        }
        near = [self._pod("node-c", f"endpoint-{i}") for i in (*USUAL, *SPARE)]
        self.endpoints = [*near, *self._far()]
        cluster.agent("node-a").start()
        cluster.proxy("node-b").start(nftables={"minSyncPeriod": "1s", "syncPeriod": "30s"})

    def _pod(self, node: str, name: str) -> Endpoint:
        made = namespace(self.cluster.lab, name)
        return Endpoint(made, self.cluster.nodes[node].site.plug_pod(made).v4)

    def _far(self) -> list[Endpoint]:
        lab, near = self.cluster.lab, self.cluster.nodes["node-c"]
        made = namespace(lab, "far")
        delay = str(int(FAR_DELAY * 1e6))
        ends: list[str | Path] = [near.site.namespace, "away", made, "back"]
        command: list[str | Path] = [self.program, "far", delay, *ends]
        lane = lab.start(command, self._beside(), stdout=subprocess.PIPE, stderr=None)
        assert lane.stdout and lane.stdout.readline() == "ready\n"
        addresses = [f"{FAR_RANGE}.{i}" for i in range(1, 1 + len(FAR))]
        ip(made, "link set back up", *(f"addr add {a}/32 dev back" for a in addresses))
        ip(made, "route add default dev back")
        ip(near.site.namespace, "link set away up", f"route add {FAR_RANGE}.0/24 dev away")
        for node in ("node-a", "node-b"):
            site = self.cluster.nodes[node].site
            ip(site.namespace, f"route add {FAR_RANGE}.0/24 via {near.addresses.v4}")
        return [Endpoint(made, address) for address in addresses]

    def _beside(self) -> Place:
        """Where no proxy serves."""
        return Place(self.cluster.nodes["node-c"].site.namespace, self.cluster.lab.group("beside"))

    # -- objects -----------------------------------------------------------------------------

    def publish(self, name: str, arm: Arm, case: Case, members: Sequence[int]) -> str:
        """Makes or changes a Service; its ClusterIP. The canary has a slice of its own."""
        metadata = {"name": name, "annotations": dict(arm.annotations)}
        port = {"name": "p", "port": PORT, "targetPort": TARGET, "protocol": "TCP"}
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"ports": [port], "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]},
        }
        slices = [self._slice(name, case, [m for m in members if m != case.canary], {})]
        if case.canary is not None:
            weight = {"pointsman.io/weight": str(CANARY_WEIGHT)}
            slices.append(self._slice(f"{name}-canary", case, [case.canary], weight, name))
        made, *_ = self.cluster.api.apply(service, *slices, namespace=NAMESPACE)
        return str(made["spec"]["clusterIP"])

    def _slice(
        self,
        name: str,
        case: Case,
        members: Sequence[int],
        annotations: dict[str, str],
        service: str = "",
    ) -> dict[str, object]:
        labels = {"kubernetes.io/service-name": service or name}
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": name, "labels": labels, "annotations": annotations},
            "addressType": "IPv4",
            "ports": [{"name": "p", "port": TARGET, "protocol": "TCP"}],
            "endpoints": [
                {
                    "addresses": [self.endpoints[member].address],
                    "conditions": {"ready": True},
                    **({"zone": ZONES[member]} if case.zones else {}),
                }
                for member in members
            ],
        }

    def withdraw(self, name: str) -> None:
        delete = self.cluster.api.delete
        delete("Service", name, namespace=NAMESPACE)
        for each in (name, f"{name}-canary"):
            delete("EndpointSlice", each, "discovery.k8s.io/v1", NAMESPACE)

    # -- load --------------------------------------------------------------------------------

    def run(self, name: str, arm: Arm, case: Case, requests: Sequence[tuple[int, int]]) -> Answers:
        """Of a Service that was published; it is the clients who wait until it is in force."""
        address = self.publish(name, arm, case, case.members)
        node = "node-b" if arm.is_kube_proxy else "node-a"
        file = self.scratch / "requests"
        file.write_text("".join(f"{when} {work}\n" for when, work in requests))
        with self._servers(case) as servers:
            turn = _Turn(self, servers, name, arm, case)
            command: list[str | Path] = [
                self.program, "ask", self.cluster.nodes[node].pods, address, str(PORT),
                str(int(DEADLINE * 1e6)), file, str(PROCESSES), "closed" if case.closed else "open",
                *self.clients[node],
            ]  # fmt: skip
            asking = self.cluster.lab.start(
                command, self._beside(), stdout=subprocess.PIPE, stderr=None
            )
            try:
                assert asking.stdout
                word, began = (asking.stdout.readline() or "ended -1").split()
                assert word == "begun", f"{arm.name}: no connect to {name} ({address}) succeeds"
                before = _ticks()
                turn.happen(int(began) / 1e6)
                text, _ = asking.communicate(timeout=60)
                spent, all_of_it = (b - a for a, b in zip(before, _ticks(), strict=True))
            finally:
                stop(asking)
                turn.end()
            accepted = turn.accepted()
        asked = [Asked(*map(int, line.split())) for line in text.splitlines()]
        return Answers(asked, accepted, spent / all_of_it)

    @contextmanager
    def _servers(self, case: Case) -> Iterator[subprocess.Popen[str]]:
        """A new one for each run: nothing is left of the one before."""
        servers = self.cluster.lab.start(
            [self.program, "serve"],
            self._beside(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None,
        )
        try:
            for endpoint in self.endpoints:
                workers = MANY if case.stay else WORKERS
                _say(servers, f"listen {endpoint.namespace} {endpoint.address} {TARGET} {workers}")
            yield servers
        finally:
            stop(servers)


class _Turn:
    """One run, to the case."""

    def __init__(
        self, world: World, servers: subprocess.Popen[str], name: str, arm: Arm, case: Case
    ) -> None:
        self._world, self._servers = world, servers
        self._name, self._arm, self._case = name, arm, case
        self._dropping: list[int] = []

    def happen(self, began: float) -> None:
        """All that the case has in store, on time; `began` as time.monotonic() has it."""
        _sleep_until(began + self._case.warm)
        self.say("reset")
        for second in self._case.happens(self):
            _sleep_until(began + second)

    def say(self, command: str) -> None:
        _say(self._servers, command)

    def publish(self, members: Sequence[int]) -> None:
        self._world.publish(self._name, self._arm, self._case, members)

    def drop(self, endpoint: int) -> None:
        self._dropping.append(endpoint)
        self._nft(endpoint, _DROP)

    def end(self) -> None:
        for endpoint in self._dropping:
            self._nft(endpoint, "delete table ip gone\n")

    def accepted(self) -> list[int]:
        self.say("counts")
        assert self._servers.stdout
        return list(map(int, self._servers.stdout.readline().split()))

    def _nft(self, endpoint: int, text: str) -> None:
        there = self._world.endpoints[endpoint].namespace
        command = ["nsenter", f"--net={there}", "nft", "-f", "-"]
        subprocess.run(command, input=text, text=True, check=True)


def _say(servers: subprocess.Popen[str], command: str) -> None:
    assert servers.stdin
    servers.stdin.write(command + "\n")
    servers.stdin.flush()


def _sleep_until(when: float) -> None:
    time.sleep(max(0.0, when - time.monotonic()))


def _ticks() -> tuple[int, int]:
    """Of all CPUs since the machine began: in use, all."""
    numbers = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    return sum(numbers) - numbers[3] - numbers[4], sum(numbers)
