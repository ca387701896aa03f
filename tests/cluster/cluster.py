"""A cluster: control plane, nodes with their proxies, and pods."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

from demo.lab import Lab
from tests.cluster.api import documents
from tests.cluster.clients import Client
from tests.cluster.dns import Dns
from tests.cluster.kubelet import Kubelet
from tests.cluster.network import Network
from tests.cluster.nodes import Agent, KubeProxy, Node
from tests.cluster.plane import ControlPlane
from tests.cluster.pods import Pod
from tests.cluster.space import Space
from tests.cluster.waiting import tail, wait_for

_RBAC = Path(__file__).parents[2] / "deploy" / "kustomize" / "base" / "rbac.yaml"
_USER = "pointsman-test"
ZONES = {"node-a": "zone-1", "node-b": "zone-1", "node-c": "zone-2"}


class Cluster:
    """A context manager: on the way out it ends every process and namespace, of a failed start too.

    `nodes` by name; `pods` are in a `Space`, one for each test.
    """

    def __init__(self, programs: Path, name: str = "cluster") -> None:
        self.programs = programs
        self.lab = Lab(name)
        self.nodes: dict[str, Node] = {}
        self._closing = contextlib.ExitStack()
        self._proxies: dict[str, KubeProxy] = {}
        self._agents: dict[str, Agent] = {}
        self._clients: list[Client] = []
        self._dns: Dns | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.lab)
            self.network = Network(self.lab)
            self.plane = ControlPlane(self.network, self.programs)
            stack.callback(self.plane.close)
            self.api = self.plane.admin
            self.plane.start()
            for name, zone in ZONES.items():
                self.add_node(name, zone)
            self.kubelet = Kubelet(self.api, self.nodes)
            stack.callback(self.kubelet.close)
            self._closing = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.close()

    def add_node(self, name: str, zone: str) -> Node:
        """A node that pods can be scheduled onto."""
        node = self.nodes[name] = Node(self.api, self.network, name, zone)
        wait_for(
            lambda: "taints" not in self.api.get("Node", name)["spec"],
            f"{node} without taints",
            logs=self.plane.tail,
        )
        return node

    def space(self, namespace: str = "default") -> Space:
        """A namespace of Kubernetes; made if it is not there."""
        return Space(self.plane, self.kubelet, namespace)

    def client(self, where: Node | Pod | str) -> Client:
        """A new one on a node (or the node of that name), or in a pod; ended after the test."""
        place = self.nodes[where] if isinstance(where, str) else where
        self._clients.append(Client(self.lab, place.place))
        return self._clients[-1]

    def proxy(self, node: str) -> KubeProxy:
        """The node's kube-proxy, not started; the same one at every call."""
        if node not in self._proxies:
            kubeconfig = self.plane.kubeconfig("system:kube-proxy")
            self._proxies[node] = KubeProxy(
                self.nodes[node], self.programs / "kube-proxy", kubeconfig
            )
        return self._proxies[node]

    def agent(self, node: str, kubeconfig: Path | None = None) -> Agent:
        """The node's agent, not started; the same one at every call of a test. If nothing else is
        said at the first call it may do what `deploy/` says."""
        if node not in self._agents:
            self._agents[node] = Agent(self.nodes[node], kubeconfig or self._agents_access())
        return self._agents[node]

    def reset(self) -> None:
        """Ends all clients, proxies and agents, and has the whole control plane run."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        for proxy in self._proxies.values():
            proxy.stop()
        for agent in self._agents.values():
            agent.close()
        self._agents.clear()  # the next test's have directories and a kubeconfig of their own
        if down := [name for name in self.plane.names if not self.plane.running(name)]:
            self.plane.start(*down)

    def _agents_access(self) -> Path:
        """The delivered role, bound to a user whom tests of the role itself leave alone."""
        for thing in documents(_RBAC.read_text()):
            thing["metadata"]["name"] = _USER
            if thing["kind"] == "ClusterRoleBinding":
                thing["roleRef"]["name"] = _USER
                thing["subjects"] = [{"kind": "User", "name": _USER}]
            self.api.apply(thing)
        return self.plane.kubeconfig(_USER)

    @property
    def dns(self) -> Dns:
        """CoreDNS behind the Service kube-dns; started by the first who asks."""
        if self._dns is None:
            self._dns = Dns(self.lab, self.plane, self.programs / "coredns")
            self._dns.start(self.space("kube-system"))
        return self._dns

    def tail(self) -> str:
        """The last lines of all logs, for a test that failed."""
        of_nodes: list[KubeProxy | Agent] = [*self._proxies.values(), *self._agents.values()]
        return "\n".join([self.plane.tail(), *(tail(one.log) for one in of_nodes)])
