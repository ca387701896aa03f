"""What the demo measures: packets in the client's namespace, and a client that never stops."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from demo.clients import environment
from demo.cluster import POD_CIDR, PROGRAMS, PYTHON, SERVICE_CIDR, Cluster


class PacketCounter:
    """Counts in the kernel, from now on, what passes the client's devices."""

    def __init__(self, cluster: Cluster) -> None:
        command: list[str | Path] = [PYTHON, PROGRAMS / "count_packets.py", SERVICE_CIDR, POD_CIDR]
        self._process = cluster.start(command, cluster.client)

    def read(self) -> tuple[int, int]:
        """Packets with a ClusterIP as source or destination, and packets from and to pods."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        seen = json.loads(self._process.stdout.readline())
        return seen[SERVICE_CIDR], seen[POD_CIDR]


@dataclass(frozen=True, slots=True)
class Request:
    """One connection of a client in a loop; the times are CLOCK_MONOTONIC."""

    began: float
    ended: float
    result: str

    @property
    def failed(self) -> bool:
        return self.result.startswith("failed")


class Asking:
    """Clients in a loop, until `stop`."""

    def __init__(self, cluster: Cluster, url: str, clients: int = 2) -> None:
        self._files = [
            cluster.lab.directory / f"asking-{time.monotonic_ns()}-{n}" for n in range(clients)
        ]
        self._processes = [self._start(cluster, url, path) for path in self._files]
        cluster.wait_for(lambda: all(path.stat().st_size for path in self._files), "clients to ask")

    @staticmethod
    def _start(cluster: Cluster, url: str, path: Path) -> subprocess.Popen[str]:
        command: list[str | Path] = [PYTHON, PROGRAMS / "keep_asking.py", url]
        with path.open("w") as file:
            return cluster.lab.start(
                command, cluster.client, env=environment(), stdout=file, stderr=file
            )

    def stop(self) -> list[Request]:
        """Every request, in the order in which they began."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            process.wait(timeout=60)
        return sorted(self._read(), key=lambda request: request.began)

    def _read(self) -> Iterable[Request]:
        for path in self._files:
            for line in path.read_text().splitlines():
                began, ended, result = line.split(" ", 2)
                yield Request(float(began), float(ended), result)


def who(requests: Iterable[Request]) -> Counter[str]:
    """How often each pod answered."""
    return Counter(request.result for request in requests if not request.failed)


def failures(requests: Iterable[Request]) -> list[Request]:
    return [request for request in requests if request.failed]
