"""Client, switch and nodes as network namespaces: real frames, an agent for each node, and pods.

    client 192.0.2.100 ──┐
    switch (a bridge) ───┼── node a: eth0 192.0.2.11 ── pods 10.244.1.0/24
                         ├── node b: eth0 192.0.2.12 ── pods 10.244.2.0/24
                         └── node c: …

The agents attach to eth0 of their own namespaces, the cgroup of a node is a child of the lab's.
Nothing leads out.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from demo.lab import Lab, Place, stop
from pointsman import host
from tests.cluster.network import Addresses, Network, Site, inside, ip, namespace
from tests.support.agents import STARTS, AgentProcess, node_of, service_of, slice_of
from tests.support.kernel import until
from tests.support.packets import pin_pass

CLIENT = Addresses("192.0.2.100", "2001:db8::100")
VIP = Addresses("203.0.113.80", "2001:db8:80::80")
CLUSTER_IP = Addresses("10.96.0.7", "fd00:96::7")
PORT, NODE_PORT, TARGET = 80, 30080, 8080
SERVICE = "web"
_SERVER = Path(__file__).parent / "podserver.py"


def lacking() -> str:
    """What this machine lacks for a topology, "" if nothing."""
    return "" if shutil.which("ethtool") else "ethtool"


def _inside(place: Path, *command: str) -> None:
    whole = ["nsenter", f"--net={place}", *command]
    done = subprocess.run(whole, capture_output=True, text=True)
    assert not done.returncode, f"{command}: {done.stderr}"


def _ethtool(place: Path, device: str, *features: str) -> None:
    _inside(place, "ethtool", "-K", device, *features)


@dataclass(slots=True)
class Pod:
    """A namespace with a server on TARGET, TCP and UDP."""

    name: str
    node: Node
    namespace: Path
    addresses: Addresses
    process: subprocess.Popen[str]
    ready: bool = True

    def kill(self) -> None:
        """Its server ends without a word to anybody who is connected but RSTs."""
        stop(self.process)


class NodeAgent(AgentProcess):
    """An agent in a node's namespace, for its eth0."""

    def __init__(self, node: Node, directory: Path, manifests: Path) -> None:
        self._node = node
        self._source: Path | None = None
        super().__init__(directory, node.cgroup, f"{node.lab.bpffs.name}/{node.name}")
        self.manifests.rmdir()
        self.manifests = manifests

    def start(  # type: ignore[override]
        self, *options: str, source: Path | None = None, wait: bool = True
    ) -> None:
        """`options` come last: --dispatch dsr, --xdp-mode none, …. Node c is as `auto` has it: TC
        alone, for its device is a veth. `source` stays for later ones."""
        self._source = source or self._source
        where: list[str | Path] = [
            *("--manifests", self.manifests), *("--cgroup", self.cgroup), *("--bpffs", self.root),
            *("--run-dir", self.run_dir), *("--state-dir", self.state_dir), *("--dns", "off"),
            *("--node-name", self._node.name), *("--devices", "eth0"),
            *("--xdp-mode", "auto" if self._node.name == "c" else "native"),
        ]  # fmt: skip
        command = [sys.executable, "-m", "pointsman.cli.main", "up", *where, *options]
        with self.log.open("ab") as log:
            self.process = self._node.lab.start(  # type: ignore[assignment]
                command,
                self._node.place,
                stdout=log,
                stderr=log,
                env=self._environment(self._source),
            )
        if wait:
            until(self.attached, self.waits, STARTS)

    def attached(self) -> bool:
        """And its device is served."""
        if not super().attached():
            return False
        return any(item["served"] for item in self.status().get("devices", {}).get("items", ()))


class Node:
    """A namespace with eth0 on the switch, a cgroup, an agent, and pods behind it."""

    def __init__(self, lab: Lab, site: Site, name: str, directory: Path, manifests: Path) -> None:
        self.lab, self.site, self.name = lab, site, name
        self.addresses = site.addresses
        self.cgroup = lab.group(name)
        lab.group(f"{name}/host")
        self.place = Place(site.namespace, self.cgroup / "host")
        directory.mkdir()
        self.agent = NodeAgent(self, directory, manifests)

    def manifest(self) -> str:
        return node_of(self.name, *self.addresses)


class Topology:
    """The whole of it. `with Lab("packets") as lab: Topology(lab, tmp_path)`; the lab ends it."""

    def __init__(self, lab: Lab, directory: Path, nodes: Iterable[str] = ("a", "b", "c")) -> None:
        self.lab, self._directory = lab, directory
        host.mount_bpffs(lab.bpffs)
        lab.bpffs.mkdir(exist_ok=True)
        self.manifests = directory / "objects"
        self.manifests.mkdir()
        self.network = Network(lab)
        self.client = namespace(lab, "client")
        lab.plug(self.client, f"{CLIENT.v4}/24", into=self.network.plane, bridge="nodes")
        ip(self.client, f"addr add {CLIENT.v6}/64 dev eth0 nodad")
        self.nodes: dict[str, Node] = {}
        self.pods: dict[str, Pod] = {}
        for name in nodes:
            site = self.network.add_site(name)
            self.nodes[name] = Node(lab, site, name, directory / name, self.manifests)
        self._offloads()
        # Nobody answers for the load balancer's address here: a router would choose a node.
        self.route_vip("a")

    def _offloads(self) -> None:
        """XDP sees frames as a driver has them, so none may come whose checksum is left to the
        hardware. And what XDP sends with XDP_TX the other end of a veth pair takes at once only if
        it has an XDP program, too (drivers/net/veth.c): switch ports get one that passes all."""
        _ethtool(self.client, "eth0", "tx", "off")
        passes = self.lab.bpffs / "pass"
        pin_pass(passes)
        for node in self.nodes.values():
            _ethtool(node.site.namespace, "eth0", "tx", "off")
            # Not by `ip -n`, which has a /sys of its own, without what is pinned.
            _inside(
                self.network.plane,
                *("ip", "link", "set", "dev", self._port(node), "xdpdrv", "pinned", str(passes)),
            )

    def offload(self, on: bool) -> None:
        """Whether the client leaves checksums to hardware, as pods and guests do by default."""
        _ethtool(self.client, "eth0", "tx", "on" if on else "off")

    def _port(self, node: Node) -> str:
        """The switch's end of a node's eth0, as the lab names it."""
        return "to-" + node.site.namespace.name.removeprefix(f"{self.lab.name}-")[:12]

    def route_vip(self, name: str) -> None:
        """As a router that learned of the load balancer's address from that node."""
        for vip, address in zip(VIP, self.nodes[name].addresses, strict=True):
            ip(self.client, f"route replace {vip} via {address}")

    def unplug(self, name: str) -> None:
        """The node is gone without a word: its port of the switch is dead."""
        ip(self.network.plane, f"link set {self._port(self.nodes[name])} down")

    # -- what is served ------------------------------------------------------------------------

    def add_pod(self, node: str, name: str) -> Pod:
        """A pod that serves; `publish` says so to the agents."""
        where = namespace(self.lab, name)
        on = self.nodes[node]
        addresses = on.site.plug_pod(where)
        _ethtool(where, "eth0", "tx", "off")
        process = self.lab.start(
            ["/usr/bin/python3", _SERVER, name, str(TARGET)], Place(where, self.lab.group("pods"))
        )
        pod = Pod(name, on, where, addresses, process)
        self.pods[name] = pod
        with inside(where):
            until(lambda: _listens(TARGET), f"the server of {name}")
        return pod

    def publish(self, **spec: object) -> bool:
        """Nodes, the Service and its endpoints, for all agents. False if nothing has changed."""
        objects = [node.manifest() for node in self.nodes.values()]
        status = {"loadBalancer": {"ingress": [{"ip": address} for address in VIP]}}
        families = {"ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack"}
        wanted = {"type": "LoadBalancer", "nodePort": NODE_PORT, **families, **spec}
        objects.append(service_of(SERVICE, CLUSTER_IP, PORT, status=status, **wanted))
        for number, family in enumerate(("IPv4", "IPv6")):
            members = [
                (pod.addresses[number], {"nodeName": pod.node.name, "conditions": {"ready": True}})
                for pod in self.pods.values()
                if pod.ready
            ]
            objects.append(slice_of(SERVICE, members, TARGET, family=family))
        text = "\n---\n".join(objects)
        target = self.manifests / "web.yaml"
        if target.exists() and target.read_text() == text:
            return False
        fresh = self.manifests / ".web"
        fresh.write_text(text)
        fresh.rename(target)
        return True

    def start_agents(self, *options: str) -> None:
        """Again, with other options, if they run."""
        for node in self.nodes.values():
            if node.agent.process and node.agent.process.poll() is None:
                node.agent.stop()
            node.agent.start(*options, wait=False)
        for node in self.nodes.values():
            until(node.agent.attached, f"an agent on {node.name}", STARTS)

    # -- the client ----------------------------------------------------------------------------

    def connect(self, address: str, port: int = NODE_PORT, timeout: float = 20) -> socket.socket:
        """A TCP connection of the client; the greeting has not been read."""
        with inside(self.client):
            return socket.create_connection((address, port), timeout)

    def ask(self, address: str, port: int = NODE_PORT) -> tuple[str, str]:
        """Who answers one connection, and whom it takes the client for."""
        with self.connect(address, port) as made, made.makefile("rb") as lines:
            pod, client, _ = lines.readline().split()
            return pod.decode(), client.decode()

    def datagram(self, address: str, port: int = NODE_PORT, length: int = 1350) -> tuple[str, str]:
        """The same of one datagram of that length, and an answer as long."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with inside(self.client), socket.socket(family, socket.SOCK_DGRAM) as made:
            made.settimeout(20)
            made.sendto(bytes(length), (address, port))
            answer, source = made.recvfrom(65536)
        assert (len(answer), source[:2]) == (length, (address, port))
        pod, client, _ = answer.split(b"\n")[0].split()
        return pod.decode(), client.decode()

    def close(self) -> None:
        """What the lab does not know of: what the agents pinned."""
        for node in self.nodes.values():
            process = node.agent.process
            if process and process.poll() is None:
                node.agent.kill()
            if node.agent.root.exists():
                node.agent.cli("unload", check=False)


def _listens(port: int) -> bool:
    """Whether all four sockets are there: TCP and UDP of both families."""
    tables = [Path("/proc/thread-self/net", name) for name in ("tcp", "tcp6", "udp", "udp6")]
    return all(f":{port:04X} " in table.read_text() for table in tables)


__all__ = ["CLIENT", "NODE_PORT", "PORT", "VIP", "Node", "NodeAgent", "Pod", "Topology", "lacking"]
