"""The reading commands on a node with NodePorts, hostPorts and client affinity: what they say is
what a connect() gets."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.agents import AgentProcess, endpoints
from tests.support.kernel import Cgroup

pytestmark = pytest.mark.kernel

VIP, LB, OTHER = "10.96.7.1", "203.0.113.9", "192.0.2.2"

API = f"""
apiVersion: v1
kind: Service
metadata: {{name: api}}
spec:
  type: LoadBalancer
  clusterIP: {VIP}
  sessionAffinity: ClientIP
  externalTrafficPolicy: Local
  ports: [{{name: p, port: 80, nodePort: 30080}}]
status: {{loadBalancer: {{ingress: [{{ip: {LB}}}]}}}}
---
apiVersion: v1
kind: Node
metadata: {{name: other}}
status: {{addresses: [{{type: InternalIP, address: {OTHER}}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: box}}
spec:
  containers: [{{name: c, ports: [{{containerPort: 9000, hostPort: 8081}}]}}]
status: {{podIP: 10.244.0.9, phase: Running, conditions: [{{type: Ready, status: "True"}}]}}
"""


@pytest.fixture(scope="module")
def node(kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    cgroup = Cgroup(f"pm_cli_nodes_{os.getpid()}")
    cgroup.enter()
    found = AgentProcess(tmp_path_factory.mktemp("cli"), cgroup.path, cgroup.path.name)
    members = endpoints("api", ("10.244.0.1", 9000), ("10.244.0.2", 9000))
    found.write("api.yaml", f"{API}---\n{members}")
    found.start("--node-name", "here", "--refuse-unused-cluster-ips")
    yield found
    found.close()
    cgroup.close()


def items(node: AgentProcess, *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(node.cli(*arguments, "-o", "json").stdout)["items"]
    return found


def test_a_load_balancer_is_one_row_with_all_its_addresses(node: AgentProcess) -> None:
    rows = [line.split() for line in node.cli("get", "services").stdout.splitlines()[1:]]
    assert rows == [["default", "api", "LoadBalancer", VIP, LB, "80:30080/TCP", "2", "0"]]


def test_frontends_say_what_kind_each_is(node: AgentProcess) -> None:
    rows = {row["frontend"]: row for row in items(node, "get", "fe")}
    for frontend, kind, flags in (
        ("0.0.0.0:30080/TCP", "NodePort", {"this-node", "guarded"}),
        (f"{LB}:80/TCP", "External", {"guarded"}),
        ("0.0.0.0:8081/TCP", "HostPort", {"this-node"}),
        (f"{OTHER}:*", "RemoteNode", {"remote-node"}),
        ("127.0.0.1:*", "Loopback", {"loopback"}),
    ):
        assert rows[frontend]["kind"] == kind
        assert flags <= set(rows[frontend]["flags"])


@pytest.mark.parametrize(
    ("destination", "client", "verdict", "words"),
    [
        pytest.param(f"{LB}:80", "pod", "translated", "default/api:p", id="load-balancer"),
        pytest.param("127.0.0.1:30080", "host", "translated", "the NodePort", id="loopback"),
        pytest.param("127.9.9.9:30080", "host", "translated", "the NodePort", id="all-of-127"),
        pytest.param("127.0.0.1:30080", "pod", "not-a-service", "is its own", id="a-pod-s-own"),
        pytest.param(f"{OTHER}:30080", "host", "not-a-service", "that node", id="other-node"),
        pytest.param("127.0.0.1:8081", "host", "translated", "the hostPort", id="hostport"),
        pytest.param("10.96.7.9:80", "host", "refused", "10.96.0.0/12", id="unused-address"),
    ],
)
def test_explain_and_the_kernel_agree_about_a_node_s_addresses(
    node: AgentProcess, destination: str, client: str, verdict: str, words: str
) -> None:
    done = node.cli("explain", destination, "--from", client, "-o", "json")
    found = json.loads(done.stdout)
    assert (found["verdict"], words in found["why"]) == (verdict, True), found
    if client == "pod":
        return
    host, _, port = destination.rpartition(":")
    before = unused(node)
    # All endpoints are here, and nothing else listens.
    with socket.create_server(("0.0.0.0", 9000)), socket.socket() as dialler:
        dialler.settimeout(30)
        connected = dialler.connect_ex((host, int(port))) == 0
    assert connected == (verdict == "translated")
    assert unused(node) - before == (verdict == "refused")


def unused(node: AgentProcess) -> int:
    counters = json.loads(node.cli("status", "-o", "json", check=False).stdout)["counters"]
    return int(counters["unused_address"])


def test_affinity_is_what_the_next_connection_gets(node: AgentProcess) -> None:
    with socket.socket() as sock:
        sock.settimeout(30)
        sock.connect_ex((VIP, 80))
    [row] = items(node, "get", "affinity", "api")
    assert (row["client"], row["service"], row["family"]) == ("host", "api", "IPv4")
    assert (row["state"], row["timeoutSeconds"]) == ("valid", 10800)
    assert 0 <= row["ageSeconds"] < 60
    found = json.loads(node.cli("explain", f"{LB}:80", "-o", "json").stdout)
    assert found["affinity"]["endpoint"] == row["endpoint"]
    assert [e["endpoint"] for e in found["endpoints"] if e["probability"] == 1] == [row["endpoint"]]


def test_verify_covers_nodes_and_hostports(node: AgentProcess) -> None:
    done = node.cli("verify", check=False)
    assert (done.returncode, "no differences" in done.stdout) == (0, True), done.stdout


def test_status_tells_node_and_policy(node: AgentProcess) -> None:
    found = json.loads(node.cli("status", "-o", "json", check=False).stdout)
    assert found["policy"]["refuseUnusedClusterIPs"] is True
    assert found["node"]["name"] == "here"
    text = node.cli("status", check=False).stdout
    assert ["node-port-range", "30000-32767"] in [line.split() for line in text.splitlines()]
