"""`pointsman up` as people run it, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.support.kernel import until

#: Seconds until an agent must be there.
STARTS = float(os.environ["POINTSMAN_LOAD_TIMEOUT"])
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: %(name)s}
spec:
  clusterIP: %(vip)s
  ports: [{name: p, port: %(port)s, protocol: %(protocol)s}]
"""


def service(name: str, vip: str, port: int = 80, protocol: str = "TCP") -> str:
    """A Service without a selector, for `endpoints` to fill."""
    return SERVICE % {"name": name, "vip": vip, "port": port, "protocol": protocol}


def endpoints(name: str, *backends: tuple[str, int], protocol: str = "TCP") -> str:
    """EndpointSlices for that Service, one for each port number."""
    by_port: dict[int, list[str]] = {}
    for address, port in backends:
        by_port.setdefault(port, []).append(address)
    return "\n---\n".join(
        yaml.safe_dump(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": f"{name}-{port}",
                    "labels": {"kubernetes.io/service-name": name},
                },
                "addressType": "IPv4",
                "ports": [{"name": "p", "port": port, "protocol": protocol}],
                "endpoints": [{"addresses": [address]} for address in addresses],
            }
        )
        for port, addresses in sorted(by_port.items())
    )


def manifest(kind: str, name: str, version: str = "v1", **parts: Any) -> str:
    """Any object. Labels, annotations and namespace go to its metadata, the rest beside it."""
    metadata: dict[str, Any] = {"name": name}
    for key in ("labels", "annotations", "namespace"):
        if key in parts:
            metadata[key] = parts.pop(key)
    return yaml.safe_dump({"apiVersion": version, "kind": kind, "metadata": metadata, **parts})


def service_of(
    name: str,
    vips: Sequence[str],
    port: int,
    *,
    labels: dict[str, str] | None = None,
    status: dict[str, Any] | None = None,
    **spec: Any,
) -> str:
    """A Service with one number for TCP and UDP (ports "tcp" and "udp"), for `slice_of` to fill.
    `nodePort` and `targetPort` go to the ports, everything else to the spec."""
    more = {key: spec.pop(key) for key in ("nodePort", "targetPort") if key in spec}
    ports = [{"name": p.lower(), "port": port, "protocol": p, **more} for p in ("TCP", "UDP")]
    spec = {"ports": ports, "clusterIP": vips[0], "clusterIPs": list(vips), **spec}
    return manifest("Service", name, labels=labels or {}, spec=spec, status=status or {})


def slice_of(
    service: str,
    members: Sequence[tuple[str, dict[str, Any]]],
    port: int,
    *,
    name: str = "",
    protocol: str = "",
    family: str = "IPv4",
) -> str:
    """One EndpointSlice: addresses with what else is said of each endpoint. Without a protocol it
    is one for `service_of`, else one for `service`."""
    ports = [{"name": p.lower(), "port": port, "protocol": p} for p in ("TCP", "UDP")]
    return manifest(
        "EndpointSlice",
        name or f"{service}-{family.lower()}",
        "discovery.k8s.io/v1",
        labels={"kubernetes.io/service-name": service},
        addressType=family,
        ports=[{"name": "p", "port": port, "protocol": protocol}] if protocol else ports,
        endpoints=[{"addresses": [address], **more} for address, more in members],
    )


def pod_of(name: str, address: str, spec: dict[str, Any] | None = None, **metadata: Any) -> str:
    """A ready Pod; `metadata` are labels, annotations and namespace."""
    status = {
        "podIP": address,
        "phase": "Running",
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    return manifest("Pod", name, **metadata, spec=spec or {}, status=status)


def node_of(name: str, *addresses: str, zone: str = "") -> str:
    """A Node with these InternalIPs."""
    return manifest(
        "Node",
        name,
        labels={"topology.kubernetes.io/zone": zone} if zone else {},
        status={"addresses": [{"type": "InternalIP", "address": a} for a in addresses]},
    )


class AgentProcess:
    """One node: its directories, and an agent that can be started, killed and replaced."""

    def __init__(self, directory: Path, cgroup: Path, name: str) -> None:
        self.manifests = directory / "manifests"
        self.manifests.mkdir()
        self.run_dir, self.state_dir = directory / "run", directory / "state"
        self.root = Path("/sys/fs/bpf") / name
        self.cgroup = cgroup
        self.log = directory / "agent.log"
        self.process: subprocess.Popen[bytes] | None = None

    def write(self, name: str, text: str) -> None:
        """Replaces a manifest in one step."""
        temporary = self.manifests / f".{name}"
        temporary.write_text(text)
        temporary.rename(self.manifests / name)

    def remove(self, name: str) -> None:
        (self.manifests / name).unlink()

    def start(
        self, *options: str, source: Path | None = None, wait: bool = True, dns: str = "off"
    ) -> None:
        arguments = [
            "up", "--manifests", self.manifests, "--cgroup", self.cgroup, "--bpffs", self.root,
            "--run-dir", self.run_dir, "--state-dir", self.state_dir, "--dns", dns,
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
            until(self.settled, self.waits, STARTS)

    def waits(self) -> str:
        return f"an attached agent; its log: {self.log.read_text()}"

    @staticmethod
    def _environment(source: Path | None) -> dict[str, str]:
        return {**os.environ, **({"POINTSMAN_SOURCE": str(source)} if source else {})}

    def status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.run_dir / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def attached(self) -> bool:
        assert self.process
        assert self.process.poll() is None, f"the agent ended: {self.log.read_text()}"
        status = self.status()
        return status.get("pid") == self.process.pid and status["sync"]["attached"]

    def settled(self) -> bool:
        """Attached, and programs for packets loaded or refused, which takes longer."""
        return self.attached() and not self.status()["devices"]["loading"]

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=STARTS)

    def cli(
        self, *arguments: str, source: Path | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A command against this node."""
        return subprocess.run(
            [sys.executable, "-m", "pointsman.cli.main", *arguments],
            capture_output=True,
            text=True,
            check=check,
            env={
                **self._environment(source),
                "POINTSMAN_BPFFS": str(self.root),
                "POINTSMAN_RUN_DIR": str(self.run_dir),
            },
        )

    def open(self, source: Path | None = None) -> dict[str, int]:
        """Open connections by endpoint, from `get endpoints`."""
        found = json.loads(self.cli("get", "endpoints", "-o", "json", source=source).stdout)
        return {item["endpoint"]: item["open"] for item in found["items"]}

    def end(self) -> None:
        """No agent runs any more; what it attached goes on."""
        if self.process and self.process.poll() is None:
            self.kill()

    def close(self) -> None:
        self.end()
        self.cli("unload", check=False)
