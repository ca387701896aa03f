"""Test nodes: a network namespace and a cgroup each, and the proxy that serves it."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from demo.lab import Place, stop
from pointsman import host
from tests.cluster.api import Api, Object
from tests.cluster.network import POD_CIDRS, Network, inside
from tests.cluster.waiting import tail, wait_for

_numbers = count(1)


class Node:
    """Registered as kubelets do. Cgroups: `cgroup` holds all of the node, as the root does on a
    real one; `host` below it has what runs on the node itself, `pods` what runs in pods."""

    def __init__(self, api: Api, network: Network, name: str, zone: str) -> None:
        self.name, self.zone, self.lab = name, zone, network.lab
        self.site = network.add_site(name)
        self.addresses = self.site.addresses
        self.cgroup = self.lab.group(name)
        self.host, self.pods = self.lab.group(f"{name}/host"), self.lab.group(f"{name}/kubepods")
        self.place = Place(self.site.namespace, self.host)
        self._api = api
        self._api.create(self._object())

    def __repr__(self) -> str:
        return f"<Node {self.name}>"

    def set_ready(self, ready: bool) -> None:
        """The condition that its kubelet would report."""
        self._api.patch_status("Node", self.name, {"conditions": [_ready(ready)]})

    def label(self, **labels: str | None) -> None:
        """`topology_kubernetes_io__zone="b"`: underscores are dots, two of them a slash; None
        removes."""
        named = {key.replace("__", "/").replace("_", "."): value for key, value in labels.items()}
        self._api.patch("Node", self.name, {"metadata": {"labels": named}})

    def _object(self) -> Object:
        size = {"cpu": "64", "memory": "64Gi", "pods": "250", "ephemeral-storage": "64Gi"}
        addresses = [{"type": "InternalIP", "address": a} for a in self.addresses]
        labels = {
            "kubernetes.io/hostname": self.name,
            "kubernetes.io/os": "linux",
            "topology.kubernetes.io/zone": self.zone,
        }
        return {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name, "labels": labels},
            "spec": {"podCIDR": self.site.pod_cidrs[0], "podCIDRs": list(self.site.pod_cidrs)},
            "status": {
                "addresses": [*addresses, {"type": "Hostname", "address": self.name}],
                "capacity": size,
                "allocatable": size,
                "conditions": [_ready(True)],
            },
        }


class KubeProxy:
    """kube-proxy in nftables mode on a node."""

    def __init__(self, node: Node, program: Path, kubeconfig: Path) -> None:
        self.node = node
        self._program, self._kubeconfig = program, kubeconfig
        self.log = node.lab.directory / f"kube-proxy-{node.name}.log"
        self.config = node.lab.directory / f"kube-proxy-{node.name}.yaml"
        self._process: subprocess.Popen[str] | None = None

    def start(self, wait: bool = True, **settings: object) -> None:
        """`settings` are fields of KubeProxyConfiguration v1alpha1."""
        command = self.command(**settings)
        with self.log.open("ab") as log:
            self._process = self.node.lab.start(command, self.node.place, stdout=log, stderr=log)
        if wait:
            wait_for(self.ready, "a kube-proxy", logs=partial(tail, self.log))

    def command(self, **settings: object) -> list[str]:
        """For a pod of this node, too."""
        self.config.write_text(yaml.safe_dump({**self._settings(), **settings}))
        return [str(self._program), f"--config={self.config}", "--v=1"]

    def ready(self) -> bool:
        """/healthz is 200 after the first sync."""
        assert self._process and self._process.poll() is None, tail(self.log)
        return self._get(10256, "/healthz")[0] == 200

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def metrics(self) -> str:
        return self._get(10249, "/metrics")[1]

    @property
    def pid(self) -> int:
        assert self._process and self._process.poll() is None, tail(self.log)
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL: its rules stay."""
        assert self._process
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """And takes its rules away, which it leaves behind on purpose."""
        if self._process:
            stop(self._process)
            for family in ("ip", "ip6"):
                command = ["nft", "delete", "table", family, "kube-proxy"]
                self.node.lab.run(command, self.node.place)
            self._process = None

    def rules(self) -> Any:
        """Its tables, as nft says them in JSON."""
        found = self.node.lab.run(["nft", "--json", "list", "ruleset"], self.node.place)
        return json.loads(found.stdout)["nftables"]

    def _get(self, port: int, path: str) -> tuple[int, str]:
        with inside(self.node.site.namespace), contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            with contextlib.closing(connection):
                connection.request("GET", path)
                response = connection.getresponse()
                return response.status, response.read().decode()
        return 0, ""

    def _settings(self) -> dict[str, object]:
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "hostnameOverride": self.node.name,
            "clientConnection": {"kubeconfig": str(self._kubeconfig)},
            "clusterCIDR": ",".join(POD_CIDRS),
            "nftables": {"minSyncPeriod": "0s", "syncPeriod": "30s"},
            # Zero: these belong to the machine, not to this namespace.
            "conntrack": {
                "maxPerCore": 0,
                "min": 0,
                "tcpEstablishedTimeout": "0s",
                "tcpCloseWaitTimeout": "0s",
            },
        }


class Agent:
    """`pointsman up --kubernetes` on a node, for all that is in the node's cgroup. `before` is put
    before the command: env, unshare. Without a kubeconfig it finds the API server by that."""

    def __init__(self, node: Node, kubeconfig: Path | None) -> None:
        self.node, self.kubeconfig = node, kubeconfig
        self.before: tuple[str | Path, ...] = ()
        directory = node.lab.directory / f"agent-{node.name}-{next(_numbers)}"
        directory.mkdir()
        self.run_dir, self.state_dir = directory / "run", directory / "state"
        self.log = directory / "log"
        self.root = node.lab.bpffs / node.name
        host.mount_bpffs(node.lab.bpffs)
        node.lab.bpffs.mkdir(exist_ok=True)
        self.process: subprocess.Popen[str] | None = None

    def start(self, *options: str, wait: bool = True) -> None:
        where = [
            *("--node-name", self.node.name),
            *("--cgroup", self.node.cgroup), *("--bpffs", self.root),
            *("--run-dir", self.run_dir), *("--state-dir", self.state_dir),
            *("--devices", "none"),
            *(("--kubeconfig", self.kubeconfig) if self.kubeconfig else ()),
        ]  # fmt: skip
        command = [
            *self.before,
            sys.executable,
            "-m",
            "pointsman.cli.main",
            "up",
            "--kubernetes",
            *where,
        ]
        with self.log.open("ab") as log:
            self.process = self.node.lab.start(
                [*map(str, command), *options], self.node.place, stdout=log, stderr=log
            )
        if wait:
            wait_for(self.attached, "an attached agent", 180, logs=partial(tail, self.log))

    def status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.run_dir / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def complaint(self) -> str:
        """What this process says of the API server; the file may be of one before it still."""
        status = self.status()
        ours = self.process is not None and status.get("pid") == self.process.pid
        return str(status.get("source", {}).get("error") or "") if ours else ""

    def attached(self) -> bool:
        assert self.process
        assert self.process.poll() is None, f"the agent ended\n{tail(self.log)}"
        status = self.status()
        return status.get("pid") == self.process.pid and bool(status["sync"]["attached"])

    def kill(self) -> None:
        """SIGKILL: the data path stays."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM: the data path stays, too."""
        assert self.process
        stop(self.process, grace=20)

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command on this node: cli("get", "services", "-o", "json")."""
        where = {"POINTSMAN_BPFFS": str(self.root), "POINTSMAN_RUN_DIR": str(self.run_dir)}
        command = ["env", *(f"{k}={v}" for k, v in where.items()), sys.executable, "-m"]
        return self.node.lab.run([*command, "pointsman.cli.main", *arguments], self.node.place)

    def close(self) -> None:
        """Detaches: the node is as it was."""
        if self.process and self.process.poll() is None:
            self.kill()
        self.cli("unload")


def _ready(ready: bool) -> Object:
    return {"type": "Ready", "status": str(ready), "reason": "Test", "message": "as the test says"}


__all__ = ["Agent", "KubeProxy", "Node"]
