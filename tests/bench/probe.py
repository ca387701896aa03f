"""How long a change needs to the data path: the Service that changes, and who connects to it."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from demo.lab import Place, stop
from tests.bench.storm import TRIGGER, now
from tests.cluster.cluster import Cluster
from tests.cluster.network import ip
from tests.cluster.nodes import Node
from tests.cluster.space import Space

PROGRAM = Path(__file__).with_name("prober.py")
PORT = 9000


class Probe:
    """A Service among the others whose one endpoint is, in turns, one of two addresses."""

    def __init__(self, cluster: Cluster, space: Space, node: str) -> None:
        place = cluster.nodes[node].place
        (first, _), number = cluster.nodes[node].addresses, cluster.nodes[node].site.number
        self.addresses = (first, f"192.0.2.{110 + number}")
        ip(place.network, f"addr add {self.addresses[1]}/24 dev eth0")
        cluster.lab.start([sys.executable, PROGRAM, "serve", str(PORT)], place, stderr=None)
        ports = [{"name": "p", "port": 80, "protocol": "TCP"}]
        self.ip = space.service(
            "probe", ports=ports, selector=None, ipFamilyPolicy="SingleStack"
        ).ip
        self._space, self._turn = space, 0
        self._write()

    @property
    def current(self) -> str:
        return self.addresses[self._turn]

    def flip(self) -> None:
        self._turn = 1 - self._turn
        self._write()

    def _write(self) -> None:
        metadata = {
            "name": "probe-1",
            "labels": {"kubernetes.io/service-name": "probe"},
            "annotations": {TRIGGER: now()},
        }
        self._space.apply(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": metadata,
                "addressType": "IPv4",
                "ports": [{"name": "p", "port": PORT, "protocol": "TCP"}],
                "endpoints": [{"addresses": [self.current], "conditions": {"ready": True}}],
            }
        )


class Prober:
    """A client on a node that connects to one Service over and over. Times are ns, monotonic."""

    def __init__(self, cluster: Cluster, node: Node, address: str, timeout: float) -> None:
        self._failures: list[str] = []
        self._lines: queue.Queue[tuple[int, str]] = queue.Queue()
        # Beside the proxy in the node's cgroup: what it uses is not the proxy's.
        place = Place(node.site.namespace, node.pods)
        command: Sequence[str | Path] = [
            sys.executable, PROGRAM, "probe", address, "80", str(timeout)
        ]  # fmt: skip
        self._process = cluster.lab.start(command, place, stdout=subprocess.PIPE, stderr=None)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout
        with contextlib.suppress(ValueError):  # closed while it reads
            for line in self._process.stdout:
                when, _, answer = line.strip().partition(" ")
                self._lines.put((int(when), answer))

    def answer(self, wanted: str = "", seconds: float = 300) -> int:
        """When `wanted` (or anybody) answered for the first time since the last call."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                when, answer = self._lines.get(timeout=1)
                if answer.startswith("!"):
                    self._failures.append(answer[1:])
                elif wanted in ("", answer):
                    return when
        raise AssertionError(f"no answer of {wanted or 'anybody'} in {seconds:g} s")

    def failures(self) -> list[str]:
        """Errors of connects since the last call, up to the last answer that was waited for."""
        found, self._failures = self._failures, []
        return found

    def fails(self, seconds: float = 60) -> None:
        """Returns when it runs and nobody answers."""
        _, answer = self._lines.get(timeout=seconds)
        assert answer.startswith("!"), f"{answer} answers before a proxy runs"

    def close(self) -> None:
        stop(self._process)
