"""The demo's tiny cluster: a node with a bridge, pods, a client, and Pointsman's agent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from demo.clients import environment
from demo.lab import Lab, Place, stop

HERE = Path(__file__).parent
MANIFESTS = HERE / "manifests"
PROGRAMS = HERE / "programs"
PYTHON = "/usr/bin/python3"  # what runs in the namespaces needs nothing but the machine's own

NAMESPACE, SERVICE = "kube-system", "web-server-service"
HOST = f"{SERVICE}.{NAMESPACE}.svc.cluster.local"
PORT, PATH = 80, "/api/v1/healthz"
BODY = '{"status": {"code": 0, "msg": "success"}, "data": "success"}'
SERVICE_CIDR, POD_CIDR = "10.96.0.0/12", "10.244.0.0/24"
NODE_IP, CLIENT_IP, DNS_IP = "10.244.0.1", "10.244.0.2", "10.96.0.10"
POD_PORTS = {"web-server-1": 8080, "web-server-2": 8080, "web-server-3": 8080, "web-server-4": 9090}


class CannotGoOn(Exception):
    """Something that all that follows needs does not work: what, and what was seen of it."""


def pod_ip(name: str) -> str:
    return f"10.244.0.1{name.rpartition('-')[2]}"


class Cluster:
    """Needs a lab that was entered; leaves taking things away to it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.manifests = lab.directory / "manifests"
        self.manifests.mkdir()
        self.log = lab.directory / "agent.log"
        self._network = lab.namespace("node")
        lab.bridge(self._network, "cbr0", f"{NODE_IP}/24")
        self.node = Place(self._network, lab.group("node"))
        # Only what runs in this cgroup is ever served: the hooks are attached here.
        self.served = lab.group("clients")
        client = lab.namespace("client")
        lab.plug(client, f"{CLIENT_IP}/24", into=self._network, bridge="cbr0")
        self.client = lab.resolver(Place(client, self.served), DNS_IP)
        self._pods: dict[str, subprocess.Popen[str]] = {}
        self._agent: subprocess.Popen[str] | None = None

    # -- pods --------------------------------------------------------------------------------

    def add_pod(self, name: str) -> None:
        """A namespace with a web server in it. No manifest says so yet."""
        network = self.lab.namespace(name)
        self.lab.plug(network, f"{pod_ip(name)}/24", into=self._network, bridge="cbr0")
        command: list[str | Path] = [PYTHON, PROGRAMS / "web_server.py", name, pod_ip(name)]
        command.append(str(POD_PORTS[name]))
        self._pods[name] = self.start(command, Place(network, self.lab.group("pods")))

    def stop_pod(self, name: str) -> None:
        stop(self._pods.pop(name))

    def apply(self, name: str) -> None:
        """Puts a manifest of `demo/manifests` into the watched directory, in one step."""
        fresh = self.lab.directory / "fresh"
        shutil.copy(MANIFESTS / f"{name}.yaml", fresh)
        fresh.rename(self.manifests / f"{name}.yaml")

    def delete(self, name: str) -> None:
        (self.manifests / f"{name}.yaml").unlink()

    # -- the agent ---------------------------------------------------------------------------

    def start_agent(self) -> float:
        """Runs `pointsman up` on the node until its hooks are attached; how long that took."""
        began = time.monotonic()
        with self.log.open("a") as log:
            self._agent = self.lab.start(
                self._pointsman(
                    "up",
                    *("--manifests", self.manifests),
                    *("--cgroup", self.served),
                    *("--service-cidr", SERVICE_CIDR),
                    *("--dns", f"{NODE_IP}:53"),
                    *("--dns-upstream", "off"),
                    *("--devices", "none"),
                    *("--state-dir", self.lab.directory / "state"),
                ),
                self.node,
                env={"POINTSMAN_COMPILED": str(self.lab.directory / "compiled"), **os.environ},
                stdout=log,
                stderr=log,
            )

        def attached() -> bool:
            if self._agent and self._agent.poll() is not None:
                raise CannotGoOn(f"'pointsman up' has ended:\n{self.tail()}")
            try:
                status = json.loads((self.lab.directory / "run" / "status.json").read_text())
            except FileNotFoundError:
                return False
            # What leads there, sh and nsenter, each become the next program.
            ours = self._agent and status["pid"] == self._agent.pid
            return bool(ours and status["sync"]["attached"])

        self.wait_for(attached, "the agent to attach", 180)
        return time.monotonic() - began

    def wait_for(self, true: Callable[[], bool], what: str, timeout: float = 60) -> None:
        """Asks every 20 ms. Raises CannotGoOn with the agent's log."""
        until = time.monotonic() + timeout
        while not true():
            if time.monotonic() > until:
                raise CannotGoOn(f"waited {timeout:g} s for {what}; the agent says:\n{self.tail()}")
            time.sleep(0.02)

    def kill_agent(self) -> int:
        """kill -9; its pid."""
        if self._agent is None:
            raise CannotGoOn("no agent runs")
        self._agent.send_signal(signal.SIGKILL)
        self._agent.wait()
        return self._agent.pid

    def stop_agent(self) -> None:
        if self._agent:
            stop(self._agent)

    def pointsman(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """A command of Pointsman, on the node, on this lab's pins."""
        return self.lab.run(self._pointsman(*arguments), self.node)

    def tail(self, lines: int = 12) -> str:
        """The end of the agent's log."""
        return "\n".join(self.log.read_text().splitlines()[-lines:])

    def _pointsman(self, *arguments: str | Path) -> list[str | Path]:
        where: list[str | Path] = ["--bpffs", self.lab.bpffs]
        if arguments[0] in ("up", "unload", "describe"):
            where += ["--run-dir", self.lab.directory / "run"]
        return [sys.executable, "-m", "pointsman.cli.main", *arguments, *where]

    # -- the client --------------------------------------------------------------------------

    def start(self, command: list[str | Path], place: Place) -> subprocess.Popen[str]:
        """Starts one of our programs, with its input and output as pipes, once it is ready."""
        process = self.lab.start(
            command,
            place,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout
        if (line := process.stdout.readline()) != "ready\n":
            raise CannotGoOn(f"{command[1]}: {line}{process.stdout.read()}")
        return process

    def ask(self, *command: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs a command where the client is: its network, its cgroup, its resolv.conf."""
        return self.lab.run(command, self.client, env=environment(), timeout=timeout)

    def cluster_ip(self) -> str:
        """The address that the Service's name stands for, as the client sees it."""
        found = self.ask("getent", "ahostsv4", HOST).stdout.split()
        if not found:
            raise CannotGoOn(f"{HOST} has no address; the agent says:\n{self.tail()}")
        return found[0]
