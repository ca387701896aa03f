"""The harness itself: what the other cluster tests take for granted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import yaml

from demo.lab import remains
from tests.cluster.api import ApiError
from tests.cluster.clients import Client
from tests.cluster.cluster import ZONES, Cluster
from tests.cluster.plane import COMPONENTS, ControlPlane
from tests.cluster.space import Service, Space
from tests.support.kernel import until

pytestmark = pytest.mark.cluster

DEPLOYMENT = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: api}
spec:
  replicas: 2
  selector: {matchLabels: {app: api}}
  template:
    metadata: {labels: {app: api}}
    spec:
      containers:
        - {name: main, image: test, ports: [{name: http, containerPort: 9000}]}
"""


def served(client: Client, ip: str, protocol: str) -> bool:
    return not client.connect(ip, 80, protocol, timeout=1).error


def reach(cluster: Cluster, node: str, service: Service) -> None:
    """Until a client on that node gets through by both families and both protocols."""
    client = cluster.client(node)
    for ip in service.ips:
        for protocol in ("tcp", "udp"):
            until(partial(served, client, ip, protocol), f"{ip} {protocol}")
    client.close()


# -- scheduling, slices --------------------------------------------------------------------------


def test_the_scheduler_spreads_pods_and_obeys_zones(space: Space) -> None:
    assert {pod.node.name for pod in space.deploy("web", 3)} == set(ZONES)
    assert {pod.node.zone for pod in space.deploy("near", 2, zone="zone-1")} == {"zone-1"}
    assert [pod.node.name for pod in space.deploy("here", node="node-c")] == ["node-c"]


def test_the_controller_writes_slices_of_both_families(space: Space) -> None:
    space.service("web", target="tcp")
    pods = space.deploy("web", 3)
    space.wait_endpoints("web", pods)
    assert {found["addressType"] for found in space.slices("web")} == {"IPv4", "IPv6"}
    found = space.endpoints("web")
    for pod in pods:
        for address in pod.addresses:
            assert found[address]["nodeName"] == pod.node.name
            assert found[address]["zone"] == pod.node.zone


def test_readiness_and_termination_reach_the_slices(space: Space) -> None:
    space.service("web")
    pods = space.deploy("web", 2, drain=True)
    space.wait_endpoints("web", pods)

    pods[0].set_ready(False)
    space.wait_endpoints("web", pods[1:])
    pods[0].set_ready(True)
    space.wait_endpoints("web", pods)

    pods[0].terminate()
    until(
        lambda: (
            space.endpoints("web")[pods[0].ip]["conditions"]
            == {"ready": False, "serving": True, "terminating": True}
        ),
        "an endpoint that serves and terminates",
    )
    pods[0].finish()
    until(lambda: pods[0].ip not in space.endpoints("web"), "an endpoint less")


def test_pods_of_a_deployment_run_too(cluster: Cluster, space: Space) -> None:
    space.apply(DEPLOYMENT)
    until(lambda: len(space.pods("api")) == 2, "two pods")
    (first, second) = space.pods("api")
    assert cluster.client("node-a").connect(first.ip, 9000).pod == first.name
    first.terminate()
    until(
        lambda: {pod.name for pod in space.pods("api")} - {first.name, second.name},
        "a pod in its place",
    )


# -- kube-proxy, DNS -----------------------------------------------------------------------------


def test_kube_proxy_serves_a_node_and_its_pods(cluster: Cluster, space: Space) -> None:
    pods = space.deploy("web", 3)
    web = space.service("web")
    space.wait_endpoints("web", pods)
    proxy = cluster.proxy("node-a")
    proxy.start()
    reach(cluster, "node-a", web)
    inside = next(pod for pod in pods if pod.node.name == "node-a")
    for client in (cluster.client("node-a"), cluster.client(inside)):
        for ip in web.ips:
            for protocol in ("tcp", "udp"):
                assert set(client.spread(ip, 80, 40, protocol)) == {"web-0", "web-1", "web-2"}
    answer = cluster.client(inside).connect(web.ip, 80)
    assert answer.source in (inside.ip, inside.node.site.gateway.v4)  # itself is masqueraded
    assert (answer.peer, answer.peer_port) == (web.ip, 80)

    refused = cluster.client("node-a").connect(pods[0].ip, 81)
    assert refused.error == "ECONNREFUSED"
    proxy.stop()
    assert cluster.client("node-a").connect(web.ip, 80, timeout=0.5).error != ""


def test_pointsman_serves_a_node_and_its_pods(cluster: Cluster, space: Space) -> None:
    pods = space.deploy("web", 3)
    web = space.service("web")
    space.wait_endpoints("web", pods)
    agent = cluster.agent("node-a")
    agent.start()
    reach(cluster, "node-a", web)
    inside = next(pod for pod in pods if pod.node.name == "node-a")
    assert cluster.client(inside).connect(web.ip, 80).source == inside.ip
    assert set(cluster.client(inside).spread(web.ip, 80, 40)) == {"web-0", "web-1", "web-2"}
    agent.close()
    assert cluster.client("node-a").connect(web.ip, 80, timeout=0.5).error == "timeout"


def test_names_resolve_through_coredns_behind_kube_proxy(cluster: Cluster, space: Space) -> None:
    web = space.service("web")
    name = f"web.{space.namespace}.svc.cluster.local."
    cluster.proxy("node-b").start()
    client = cluster.client("node-b")

    def resolved(server: str, protocol: str, kind: str) -> list[str]:
        try:
            return client.resolve(name, server, kind, protocol, timeout=1)
        except LookupError:
            return []

    for server in cluster.dns.ips:
        for protocol in ("udp", "tcp"):
            for kind, address in (("A", web.ip), ("AAAA", web.ip_of(6))):
                ask = partial(resolved, server, protocol, kind)
                what = f"{kind} of {name} from {server}"
                until(lambda ask=ask, ip=address: ask() == [ip], what)  # type: ignore[misc]
    files = cluster.dns.files(client)
    found = client.run("getent", "ahostsv4", f"web.{space.namespace}", files=files)
    assert found.stdout.split()[0] == web.ip, found.stderr


def test_connections_stay_and_loops_count(cluster: Cluster, space: Space) -> None:
    (pod,) = space.deploy("web")
    client = cluster.client("node-c")
    kept = client.open(pod.ip, 8080)
    assert (kept.answer.pod, kept.talk()) == ("web-0", "")
    loop = client.loop(pod.ip, 8080)
    until(lambda: loop.so_far().pods["web-0"] > 20, "some connects")
    pod.crash()
    assert kept.talk() in ("ECONNRESET", "EPIPE")
    until(lambda: loop.so_far().errors["ECONNREFUSED"] > 20, "some refusals")
    assert loop.stop().pods["web-0"] > 20


# -- the control plane ---------------------------------------------------------------------------


def test_the_cluster_goes_on_after_its_parts_were_stopped_and_killed(
    plane: ControlPlane, space: Space
) -> None:
    pods = space.deploy("web", 2)
    space.service("web")
    plane.stop("kube-apiserver")
    plane.kill("etcd", "kube-scheduler")
    assert [plane.running(name) for name in COMPONENTS] == [False, False, True, False]
    plane.start("etcd", "kube-apiserver", "kube-scheduler")
    pods += space.deploy("web", 1)
    pods[0].terminate()
    space.wait_endpoints("web", pods[1:])


def test_a_watch_from_before_a_compaction_is_expired(plane: ControlPlane, space: Space) -> None:
    old = space.service("web").thing["metadata"]["resourceVersion"]
    space.service("web", labels={"changed": "yes"})
    assert plane.compact() > int(old)
    plane.restart("kube-apiserver")
    try:
        (event, *_) = plane.admin.watch("Service", since=old)
    except ApiError as error:
        assert error.status == 410
    else:
        assert (event["type"], event["object"]["code"]) == ("ERROR", 410)


def test_users_may_do_what_rbac_says(plane: ControlPlane, space: Space) -> None:
    with pytest.raises(ApiError) as refused:
        plane.api("somebody", "of:no/importance").list("Service", namespace=None)
    assert refused.value.status == 403
    assert plane.api("system:kube-proxy").list("Service", namespace=None)

    token = plane.service_account_token(space.namespace, "default")
    written = yaml.safe_load(plane.kubeconfig("robot", token=token).read_text())
    assert written["users"][0]["user"] == {"token": token}


def test_a_dry_run_validates_and_changes_nothing(space: Space) -> None:
    good = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"a": "b"}}
    space.api.dry_run(good, namespace=space.namespace)
    assert space.api.find("ConfigMap", "c", namespace=space.namespace) is None
    with pytest.raises(ApiError, match="dataa"):
        space.api.dry_run({**good, "dataa": {}}, namespace=space.namespace)


def test_a_cluster_that_can_not_start_leaves_nothing_behind(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "etcd").symlink_to(cluster.programs / "etcd")
    (tmp_path / "kube-apiserver").write_text("#!/bin/sh\necho no such luck; exit 1\n")
    (tmp_path / "kube-apiserver").chmod(0o755)
    other = Cluster(tmp_path, "cluster-failing")
    with pytest.raises(AssertionError, match="no such luck"), other:
        pass
    assert remains(other.lab.name) == []
