"""The steps that `pointsman takeover` prints, carried out as they are printed, in both directions.

Clients connect without end meanwhile, each time anew: on the node, in a pod of it, and from another
node to a NodePort. None of their connects may fail.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.clients import Client, Loop
from tests.cluster.cluster import Cluster
from tests.cluster.nodes import Agent, KubeProxy
from tests.cluster.pods import Pod
from tests.cluster.space import Service, Space
from tests.cluster.waiting import tail, wait_for

pytestmark = pytest.mark.cluster

NODE = "node-c"
_NAMESPACE, _DAEMON_SET, _CLEANUP = "kube-system", "kube-proxy", "kube-proxy-cleanup"
_LABEL = "pointsman_io__kube-proxy"
_MANIFEST = Path(__file__).parents[2] / "deploy" / "kustomize" / "base" / "daemonset.yaml"
_SILENT = ("--healthz-bind-address", "off", "--metrics-bind-address", "off")


class Operator:
    """Somebody on the node with kubectl, who does what `takeover` says."""

    def __init__(self, cluster: Cluster, agent: Agent) -> None:
        self.agent, self._cluster = agent, cluster
        self._environment = {
            "PATH": f"{Path(sys.executable).parent}:{cluster.programs}:{os.environ['PATH']}",
            "KUBECONFIG": cluster.plane.kubeconfig("admin", "system:masters"),
            "POINTSMAN_BPFFS": agent.root,
            "POINTSMAN_RUN_DIR": agent.run_dir,
        }

    def takeover(self, *options: str) -> tuple[int, dict[str, Any]]:
        """Exit code, and the report if there is one."""
        done = self.agent.cli(
            "takeover", "--cgroup", str(self.agent.node.cgroup), "-o", "json", *options
        )
        return done.returncode, json.loads(done.stdout or "{}")

    def ready(self, *options: str) -> list[dict[str, Any]]:
        """The steps, once there are no differences."""
        found: list[dict[str, Any]] = []

        def ready() -> bool:
            code, report = self.takeover(*options)
            found[:] = [report]
            return code == 0

        try:
            wait_for(ready, "no differences", 120, logs=partial(tail, self.agent.log))
        except AssertionError as error:
            error.add_note(str(found))
            raise
        return list(found[0]["steps"])

    def run(self, command: str) -> None:
        where = [f"{name}={value}" for name, value in self._environment.items()]
        done = self._cluster.lab.run(["env", *where, "sh", "-c", command], self.agent.node.place)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.fixture
def daemon_set(cluster: Cluster, space: Space, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts the node's kube-proxy as a DaemonSet's pod; takes away what is left of it."""
    monkeypatch.setenv("PATH", f"{cluster.programs}:{os.environ['PATH']}")
    api, system = cluster.api, cluster.space(_NAMESPACE)

    def start(proxy: KubeProxy, mode: str) -> None:
        labels = {"k8s-app": "kube-proxy", "app": "kube-proxy"}
        container = {"name": "main", "image": "test", "command": proxy.command(mode=mode)}
        template = {
            "hostNetwork": True,
            "nodeSelector": {"kubernetes.io/hostname": NODE},
            "containers": [container],
        }
        thing = {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": {"name": _DAEMON_SET},
            "spec": {
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": template},
            },
        }
        api.apply(thing, namespace=_NAMESPACE)

    yield start
    api.delete("DaemonSet", _DAEMON_SET, "apps/v1", _NAMESPACE)
    api.delete("Pod", _CLEANUP, namespace=_NAMESPACE, grace=0)
    cluster.nodes[NODE].label(**{_LABEL: None})
    wait_for(lambda: not system.pods(_DAEMON_SET), "its end", logs=cluster.plane.tail)
    cluster.lab.run(["nft", "flush", "ruleset"], cluster.nodes[NODE].place)


class Traffic:
    """What connects without end: to the ClusterIP from the node and a pod, to the NodePort from
    there and from another node."""

    def __init__(self, cluster: Cluster, agent: Agent, web: Service, pod: Pod) -> None:
        node, port = cluster.nodes[NODE].addresses, web.node_port()
        here = [cluster.client(NODE), cluster.client(pod)]
        inside = [(web.ip, 80, "tcp"), (web.ips[1], 80, "udp"), (node.v4, port, "tcp")]
        outside = [(node.v4, port, "tcp"), (node.v6, port, "tcp")]
        wanted = [(c, t) for c in here for t in inside]
        wanted += [(cluster.client("node-a"), target) for target in outside]
        self._agent, self._loops = agent, list[tuple[Loop, tuple[str, int, str]]]()
        for client, target in wanted:
            self.wait(partial(served, client, target), f"{target}")
            self._loops.append((client.loop(*target, threads=1, pause=0.05), target))

    def wait(self, condition: Callable[[], object], what: str) -> None:
        wait_for(condition, what, 120, logs=partial(tail, self._agent.log, 30))

    def unharmed(self, after: str, by: str = "") -> None:
        """Each goes on, and none of its connects failed so far; `by` a pod among those reached."""
        before = [loop.so_far().pods.total() for loop, _ in self._loops]
        for (loop, target), number in zip(self._loops, before, strict=True):
            self.wait(partial(further, loop, number, by), f"more connects to {target} {after}")
            assert not loop.so_far().errors, f"{target}, {after}"


def served(client: Client, target: tuple[str, int, str]) -> bool:
    return not client.connect(*target, timeout=1).error


def further(loop: Loop, than: int, by: str) -> bool:
    pods = loop.so_far().pods
    return pods.total() > than + 10 and (not by or pods[by] > 0)


def confined() -> str:
    """Puts a command into the capabilities of Pointsman's own pod."""
    [container] = yaml.safe_load(_MANIFEST.read_text())["spec"]["template"]["spec"]["containers"]
    kept = [f"+{name.lower()}" for name in container["securityContext"]["capabilities"]["add"]]
    return f"setpriv --no-new-privs --inh-caps=-all --bounding-set=-all,{','.join(kept)}"


@pytest.mark.parametrize(
    ("mode", "in_pod"), [("nftables", False), ("iptables", True)], ids=["nftables", "iptables-pod"]
)
def test_the_steps_lose_no_connect_in_either_direction(
    cluster: Cluster, space: Space, daemon_set: Callable[..., None], mode: str, in_pod: bool
) -> None:
    proxy, agent, system = cluster.proxy(NODE), cluster.agent(NODE), cluster.space(_NAMESPACE)
    pods = space.deploy("web", replicas=2, node="node-b")
    web = space.service("web", type="NodePort")
    space.wait_endpoints("web", pods)
    pod, early = space.deploy("client", 2, node=NODE)
    client = cluster.client(pod)
    if in_pod:
        daemon_set(proxy, mode)
    else:
        proxy.start(mode=mode)
    wait_for(partial(served, client, (web.ip, 80, "tcp")), "a proxy", logs=partial(tail, proxy.log))

    by_rules = client.open(web.ip, 80)
    # Of a pod of its own: what conntrack has of it would be met by others from the same address.
    first = cluster.client(early).loop(web.ip, 80)
    agent.start("--devices", "eth0", *_SILENT)
    operator = Operator(cluster, agent)
    wait_for(
        lambda: any(each["served"] for each in agent.status()["devices"]["items"]),
        "eth0",
        120,
        logs=partial(tail, agent.log),
    )
    rest, stop, look, clean = operator.ready()
    assert not first.stop().errors
    operator.run(f"{confined()} pointsman takeover --cgroup {agent.node.cgroup}")
    traffic = Traffic(cluster, agent, web, pod)
    kept = client.open(web.ip, 80)

    def gone() -> bool:
        return not system.pods(_DAEMON_SET) if in_pod else not proxy.running()

    # -- to Pointsman ------------------------------------------------------------------------
    assert not rest["commands"]
    for command in stop["commands"]:
        operator.run(command)
        traffic.unharmed(command)
    traffic.wait(gone, "the end of kube-proxy")
    operator.ready()
    assert by_rules.talk() == ""
    [new] = space.deploy("web", node="node-a")
    space.wait_endpoints("web", [*pods, new])
    traffic.unharmed("kube-proxy stopped", by=new.name)
    for command in (*look["commands"], *clean["commands"]):
        operator.run(command)
    traffic.wait(lambda: operator.takeover()[0] == 12, "no rules of kube-proxy")
    traffic.unharmed("no rules of kube-proxy")
    assert kept.talk() == ""
    cluster.api.delete("Pod", _CLEANUP, namespace=_NAMESPACE, grace=0)

    # -- and back ----------------------------------------------------------------------------
    code, found = operator.takeover("--back")
    assert (code, found["ready"]) == (1, False)
    label, unit = found["steps"][-1]["commands"]
    assert "systemctl" in unit
    if in_pod:
        operator.run(label)
    else:
        proxy.start(mode=mode)
    steps = operator.ready("--back")
    traffic.unharmed("both again")
    for step in steps:
        assert len(step["commands"]) == 1
        operator.run(step["commands"][0])
        traffic.unharmed(step["commands"][0])
    assert agent.process and agent.process.wait(20) == 0
    assert agent.cli("status").returncode == 11
    assert kept.talk() == ""
