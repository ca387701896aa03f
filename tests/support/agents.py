"""`pointsman up` as people run it, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support.kernel import until

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

    def start(
        self, *options: str, source: Path | None = None, wait: bool = True, dns: str = "off"
    ) -> None:
        arguments = [
            "up", "--manifests", self.manifests, "--cgroup", self.cgroup, "--bpffs", self.root,
            "--run-dir", self.run_dir, "--state-dir", self.state_dir, "--dns", dns, *options,
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pointsman.cli.main", *map(str, arguments)],
                stdout=log,
                stderr=log,
                env=self._environment(source),
            )
        if wait:
            until(self.attached, f"an attached agent; its log: {self.log.read_text()}", 60)

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

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

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

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.kill()
        self.cli("unload", check=False)
