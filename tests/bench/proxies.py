"""What the cluster bench compares, each on a node of its own, and what they cost there."""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import shutil
import time
from pathlib import Path
from typing import Protocol

from prometheus_client.parser import text_string_to_metric_families
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from tests.bench.control import ROOM
from tests.cluster.cluster import Cluster
from tests.cluster.network import inside
from tests.cluster.nodes import Node
from tests.cluster.waiting import tail

PROGRAMMING = "kubeproxy_network_programming_duration_seconds"


class Side(Protocol):
    """A proxy that can be started with nothing there, killed, and started with what it left."""

    name: str
    node: Node

    def start(self) -> None: ...
    def ready(self) -> float:
        """The time (time.time) at which all was in force for the first time, or 0."""
        ...

    @property
    def pid(self) -> int: ...
    def kill(self) -> None: ...
    def without_pause(self) -> str:
        """Until `remove` it writes changes as they come; its name then, "" if it always does."""
        ...

    def remove(self) -> None:
        """The node is as if it had never run there."""
        ...


class Pointsman:
    name = "pointsman"

    def __init__(self, cluster: Cluster, node: str) -> None:
        self.node = cluster.nodes[node]
        self._agent = cluster.agent(node)

    def start(self) -> None:
        self._agent.start(*ROOM, wait=False)

    def ready(self) -> float:
        return time.time() if get(self.node, 10256, "/readyz")[0] == 200 else 0.0

    @property
    def pid(self) -> int:
        assert self._agent.process and self._agent.process.poll() is None, tail(self._agent.log)
        return self._agent.process.pid

    def kill(self) -> None:
        self._agent.kill()

    def without_pause(self) -> str:
        return ""

    def remove(self) -> None:
        self._agent.close()
        for directory in (self._agent.run_dir, self._agent.state_dir):
            shutil.rmtree(directory, ignore_errors=True)


class KubeProxy:
    """minSyncPeriod is its default, a second, for which it takes 0, too. /healthz is 200 before the
    first sync, so that the metric has to tell."""

    name = "kube-proxy"

    def __init__(self, cluster: Cluster, node: str) -> None:
        self.node = cluster.nodes[node]
        self._pause = "1s"
        self._proxy = cluster.proxy(node)
        self._next_look = 0.0

    def start(self) -> None:
        self._proxy.start(wait=False, nftables={"minSyncPeriod": self._pause, "syncPeriod": "30s"})

    def ready(self) -> float:
        if time.monotonic() < self._next_look:
            return 0.0
        self._next_look = time.monotonic() + 0.1  # its metrics are long, and the value has a time
        found = samples(self.node, "kubeproxy_sync_proxy_rules_last_timestamp_seconds")
        times = [value for _, labels, value in found if labels.get("ip_family") == "IPv4"]
        return max(times, default=0.0)

    @property
    def pid(self) -> int:
        return self._proxy.pid

    def kill(self) -> None:
        self._proxy.kill()

    def without_pause(self) -> str:
        self._pause = "1ms"
        return f"{self.name}, minSyncPeriod {self._pause}"

    def remove(self) -> None:
        self._proxy.stop()
        self._pause = "1s"


# -- what they say -------------------------------------------------------------------------------


def get(node: Node, port: int, path: str) -> tuple[int, str]:
    """Status and body, 0 and "" while nobody answers."""
    with inside(node.site.namespace), contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
    return 0, ""


def samples(node: Node, metric: str) -> list[tuple[str, dict[str, str], float]]:
    """Name, labels and value of one metric's samples."""
    lines = [line for line in get(node, 10249, "/metrics")[1].splitlines() if metric in line]
    families = text_string_to_metric_families("\n".join(lines) + "\n")
    return [(s.name, s.labels, s.value) for family in families for s in family.samples]


class Histogram:
    """kubeproxy_network_programming_duration_seconds of IPv4; a difference of two is one, too."""

    def __init__(self, buckets: dict[float, float], total: float) -> None:
        self.buckets, self.total = buckets, total

    @classmethod
    def of(cls, node: Node) -> Histogram:
        found = [s for s in samples(node, PROGRAMMING) if s[1].get("ip_family") == "IPv4"]
        buckets = {float(labels["le"]): value for name, labels, value in found if "le" in labels}
        total = sum(value for name, _, value in found if name.endswith("_sum"))
        return cls(buckets, total)

    def since(self, before: Histogram) -> Histogram:
        each = {le: count - before.buckets.get(le, 0) for le, count in self.buckets.items()}
        return Histogram(each, self.total - before.total)

    @property
    def mean(self) -> float:
        count = self.buckets.get(math.inf, 0)
        return self.total / count if count else math.nan

    def quantile(self, part: float) -> float:
        """As PromQL's histogram_quantile: linear within a bucket."""
        wanted = part * self.buckets.get(math.inf, 0)
        below, low = 0.0, 0.0
        for le, count in sorted(self.buckets.items()):
            if count >= wanted > 0:
                return (
                    low if le == math.inf else low + (le - low) * (wanted - below) / (count - below)
                )
            below, low = count, le
        return math.nan


# -- what they cost ------------------------------------------------------------------------------


def memory(pid: int, field: str) -> float:
    """VmRSS or VmHWM in MB; 0 for a process that has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    return 0.0


def helpers_peak(side: Side) -> float:
    """The largest VmHWM (MB) among what the proxy has started: the loader, nft."""
    pids = map(int, (side.node.host / "cgroup.procs").read_text().split())
    return max((memory(pid, "VmHWM") for pid in pids if pid != side.pid), default=0.0)


def cpu(node: Node) -> float:
    """Seconds that the proxy and what it started have used, in system calls too. A child counts
    from its start; the kernel's own threads do not."""
    for line in (node.host / "cpu.stat").read_text().splitlines():
        if line.startswith("usage_usec"):
            return int(line.split()[1]) / 1e6
    raise RuntimeError(f"{node.host}/cpu.stat has no usage_usec")


def kernel_threads() -> dict[str, int]:
    """Thread of the kernel → ticks of CPU it has used. Work that was put off runs there, such as
    taking old nftables rules apart."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[1] == "2":  # of kthreadd
                found[stat.parent.name] = int(fields[11]) + int(fields[12])
    return found


def kernel_seconds(before: dict[str, int]) -> float:
    """What they have used since; without those that have ended."""
    ticks = sum(now - before.get(pid, 0) for pid, now in kernel_threads().items())
    return ticks / os.sysconf("SC_CLK_TCK")


def forget_flows(node: Node) -> None:
    """Empties conntrack. A SYN from between the first look at conntrack and the first rule is an
    untranslated flow for two minutes: a later client of the same port would be refused."""
    with inside(node.site.namespace), NFCTSocket() as conntrack:
        conntrack.flush()


def settle(node: Node, seconds: float = 600) -> None:
    """Until it has used less than 5 % of a CPU for two seconds."""
    until, quiet = time.monotonic() + seconds, 0
    while quiet < 2:
        before = cpu(node)
        time.sleep(1)
        quiet = quiet + 1 if cpu(node) - before < 0.05 else 0
        assert time.monotonic() < until, f"{node} has no rest"
