"""What operators see of an agent that follows a real API server, and how they change it."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.cluster.cluster import Cluster
from tests.cluster.network import inside, ip
from tests.cluster.nodes import Agent, Node
from tests.cluster.plane import SERVER, ControlPlane
from tests.cluster.pods import Pod
from tests.cluster.space import Space
from tests.cluster.waiting import tail, wait_for
from tests.support.kernel import until

pytestmark = pytest.mark.cluster

EVENTS = "events.k8s.io/v1"
HEALTHZ, METRICS = 10256, 10249
AUTOSCALERS = {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule", "value": "1"}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str


def ask(node: Node, port: int, path: str, host: str = "127.0.0.1") -> Answer:
    """GET, from that node. Raises OSError."""
    with inside(node.site.namespace):
        connection = http.client.HTTPConnection(host, port, timeout=5)
        with closing(connection):
            connection.request("GET", path)
            found = connection.getresponse()
            return Answer(found.status, dict(found.headers), found.read().decode())


class Mounted:
    """A directory as the kubelet mounts a ConfigMap: files are links into ..data, which is a link
    that is replaced by another when something changes."""

    def __init__(self, path: Path) -> None:
        self.path, self._number = path, 0
        path.mkdir()

    def write(self, text: str) -> None:
        self._number += 1
        new = self.path / f"..{self._number}"
        new.mkdir()
        (new / "config.yaml").write_text(text)
        data, temporary = self.path / "..data", self.path / "..data_tmp"
        temporary.symlink_to(new.name)
        temporary.rename(data)
        if self._number == 1:
            (self.path / "config.yaml").symlink_to("..data/config.yaml")
        else:
            old = self.path / f"..{self._number - 1}"
            (old / "config.yaml").unlink()
            old.rmdir()

    def policy(self, **fields: Any) -> None:
        self.write(yaml.safe_dump({**OWN, **fields}))


OWN = {"apiVersion": "pointsman.io/v1alpha1", "kind": "PointsmanConfiguration"}


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Mounted:
    made = Mounted(tmp_path_factory.mktemp("mounted") / "config")
    made.policy()
    return made


@pytest.fixture(scope="module")
def agents(cluster: Cluster, mounted: Mounted) -> Iterator[dict[str, Agent]]:
    """Two that run for all tests here, by node. That of node-a has a configuration file."""
    found = {name: cluster.agent(name) for name in ("node-a", "node-b")}
    found["node-a"].start(f"--config={mounted.path}", wait=False)
    found["node-b"].start(wait=False)
    for each in found.values():
        wait_for(each.attached, "an attached agent", 180, logs=partial(tail, each.log))
    yield found
    cluster.reset()
    for each in found.values():
        assert "Traceback" not in each.log.read_text()


@pytest.fixture(scope="module")
def agent(agents: dict[str, Agent]) -> Agent:
    return agents["node-a"]


@pytest.fixture(scope="module")
def space(cluster: Cluster, agents: dict[str, Agent]) -> Iterator[Space]:
    made = cluster.space("operations")
    yield made
    made.close()


@pytest.fixture(scope="module")
def web(space: Space) -> list[Pod]:
    """One on each node."""
    return space.deploy("web", 3)


USUAL = Path()


@contextmanager
def started(cluster: Cluster, *options: str, kubeconfig: Path | None = USUAL) -> Iterator[Agent]:
    """One more, on node-c, for one test."""
    agent = cluster.agent("node-c")
    usual = agent.kubeconfig
    if kubeconfig != USUAL:
        agent.kubeconfig = kubeconfig
    agent.log.unlink(missing_ok=True)
    agent.start(*options, wait=False)
    try:
        yield agent
    except AssertionError as error:
        error.add_note(tail(agent.log, 30))
        raise
    finally:
        agent.close()
        agent.kubeconfig = usual


def code(agent: Agent, path: str) -> int:
    """0 while nobody answers."""
    try:
        return ask(agent.node, HEALTHZ, path).status
    except OSError:
        return 0


def health(agent: Agent) -> dict[str, Any]:
    return dict(json.loads(ask(agent.node, HEALTHZ, "/healthz").body))


def sample(agent: Agent, name: str, port: int = METRICS) -> float:
    """The value of a series, 0 if it is not there: sample(agent, 'x_total{code="200"}')."""
    text = ask(agent.node, port, "/metrics").body
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


# -- health --------------------------------------------------------------------------------------


def test_healthz_and_livez_have_the_body_of_kube_proxys(agent: Agent) -> None:
    healthz, livez = (ask(agent.node, HEALTHZ, path) for path in ("/healthz", "/livez"))
    assert (healthz.status, livez.status) == (200, 200)
    families = {"IPv4", "IPv6"}
    for answer, more in ((healthz, {"nodeEligible"}), (livez, set())):
        assert answer.headers["Content-Type"] == "application/json"
        body = json.loads(answer.body)
        assert set(body) == {"lastUpdated", "currentTime", "healthy", "status", *more}
        assert body["healthy"] is True
        assert set(body["status"]) == families
        assert all(each["healthy"] is True for each in body["status"].values())
    assert json.loads(healthz.body)["nodeEligible"] is True


def test_readyz_says_what_it_is_made_of(agent: Agent) -> None:
    until(lambda: code(agent, "/readyz") == 200, "readiness")
    assert ask(agent.node, HEALTHZ, "/readyz")[::2] == (200, "ok")
    verbose = ask(agent.node, HEALTHZ, "/readyz?verbose").body
    assert verbose.splitlines() == [
        "[+]lists ok", "[+]maps ok", "[+]programs ok", "readyz check passed",
    ]  # fmt: skip


def test_health_is_for_others_to_ask_and_metrics_are_not(cluster: Cluster, agent: Agent) -> None:
    other = cluster.nodes["node-b"]
    for address in agent.node.addresses:
        assert ask(other, HEALTHZ, "/healthz", address).status == 200
        with pytest.raises(ConnectionRefusedError):
            ask(other, 10249, "/metrics", address)


def test_a_node_that_the_autoscaler_takes_away_is_not_eligible(
    cluster: Cluster, agent: Agent
) -> None:
    cluster.api.patch("Node", "node-a", {"spec": {"taints": [AUTOSCALERS]}})
    try:
        until(lambda: code(agent, "/healthz") == 503, "a node that is not eligible")
        body = health(agent)
        assert (body["nodeEligible"], body["healthy"]) == (False, True)
        # Nothing is wrong with the proxy, so that it is not restarted.
        assert (code(agent, "/livez"), code(agent, "/readyz")) == (200, 200)
        assert sample(agent, 'kubeproxy_proxy_healthz_total{code="503"}') >= 2
    finally:
        cluster.api.patch("Node", "node-a", {"spec": {"taints": None}})
    until(lambda: code(agent, "/healthz") == 200, "an eligible node")
    assert health(agent)["nodeEligible"] is True


def test_a_cordoned_node_goes_on_serving(cluster: Cluster, agent: Agent) -> None:
    """The label comes with the same change, so that one knows when the agent has seen it."""
    before = agent.status()["node"]["zone"]

    def cordon(cordoned: bool | None, zone: str) -> None:
        labels = {"topology.kubernetes.io/zone": zone}
        spec = {"unschedulable": cordoned}
        cluster.api.patch("Node", "node-a", {"metadata": {"labels": labels}, "spec": spec})
        until(lambda: agent.status()["node"]["zone"] == zone, "the zone of the node")

    cordon(True, "cordoned")
    try:
        assert (code(agent, "/healthz"), health(agent)["nodeEligible"]) == (200, True)
    finally:
        cordon(None, before)


def test_a_node_that_is_deleted_is_not_eligible_and_goes_on_serving(
    cluster: Cluster, space: Space, web: list[Pod]
) -> None:
    service = space.service("deleted", selector={"app": "web"})
    node = cluster.api.get("Node", "node-c")
    client = cluster.client("node-c")
    with started(cluster) as agent:
        until(agent.attached, "an attached agent", 180)
        until(lambda: client.connect(service.ip, 80, timeout=1).pod, "an answer")
        cluster.api.delete("Node", "node-c")
        try:
            until(lambda: code(agent, "/healthz") == 503, "a node that is not eligible")
            assert health(agent)["nodeEligible"] is False
            assert code(agent, "/livez") == 200
            assert set(client.spread(service.ip, 80, 40)) == {pod.name for pod in web}
        finally:
            meta = {key: node["metadata"][key] for key in ("name", "labels")}
            spec = {key: node["spec"][key] for key in ("podCIDR", "podCIDRs")}
            cluster.api.create({**node, "metadata": meta, "spec": spec})
            until(lambda: "taints" not in cluster.api.get("Node", "node-c")["spec"], "no taints")
        until(lambda: code(agent, "/healthz") == 200, "the node again")


def test_health_check_node_port_counts_the_ready_endpoints_of_the_node(
    cluster: Cluster, space: Space, agent: Agent
) -> None:
    first, second = space.deploy("checked", 2, node="node-a", drain=True)
    space.deploy("checked", 1, node="node-b")
    service = space.service("checked", type="LoadBalancer", externalTrafficPolicy="Local")
    port = service.thing["spec"]["healthCheckNodePort"]
    asking = cluster.nodes["node-c"]  # a load balancer outside

    def check(address: str = agent.node.addresses.v4) -> tuple[int, int, str]:
        try:
            found = ask(asking, port, "/", address)
        except OSError:
            return 0, 0, ""
        body = json.loads(found.body)
        assert body["service"] == {"namespace": space.namespace, "name": "checked"}
        assert body["serviceProxyHealthy"] is True
        assert found.headers["X-Content-Type-Options"] == "nosniff"
        weight = found.headers["X-Load-Balancing-Endpoint-Weight"]
        return found.status, body["localEndpoints"], weight

    def comes(*wanted: object) -> None:
        for address in agent.node.addresses:
            until(lambda address=address: check(address) == wanted, f"{wanted}")  # type: ignore[misc]

    comes(200, 2, "2")
    first.set_ready(False)
    comes(200, 1, "1")
    second.terminate()
    comes(503, 0, "0")  # it still serves, but not for long
    first.set_ready(True)
    comes(200, 1, "1")
    second.finish()
    cluster.api.patch("Node", "node-a", {"spec": {"taints": [AUTOSCALERS]}})
    try:
        until(lambda: code(agent, "/healthz") == 503, "a node that is not eligible")
        comes(200, 1, "1")  # that the node goes is /healthz' to say
    finally:
        cluster.api.patch("Node", "node-a", {"spec": {"taints": None}})
    space.patch("Service", "checked", {"spec": {"externalTrafficPolicy": "Cluster"}})
    comes(0, 0, "")


# -- metrics -------------------------------------------------------------------------------------


def documented() -> set[str]:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    names = re.findall(r"^\| `([a-z_]+)` \| (?:counter|gauge|histogram) \|", text, re.MULTILINE)
    assert len(names) > 40
    return set(names)


def test_metrics_have_the_names_that_are_documented(agent: Agent) -> None:
    def types(page: str) -> set[str]:
        return set(re.findall(r"^# TYPE (\S+) \S+$", page, re.MULTILINE))

    text = ask(agent.node, METRICS, "/metrics").body
    single = {name for name in documented() if name.startswith("pointsman_endpoint_")}
    assert types(ask(agent.node, METRICS, "/metrics/endpoints").body) == single
    served = ("pointsman_packet", "pointsman_flows", "pointsman_sweep", "pointsman_nat")
    # This agent serves no devices.
    assert types(text) == {name for name in documented() - single if not name.startswith(served)}
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert not [line for line in samples if line.startswith("pointsman_dns_")]  # there is none
    assert all(re.fullmatch(r"[a-z_]+(\{[^}]*\})? [-+0-9.e]+(Inf|NaN)?", line) for line in samples)


def test_the_latency_of_network_programming_is_measured_by_the_controllers_annotation(
    space: Space, agent: Agent
) -> None:
    name = 'kubeproxy_network_programming_duration_seconds_count{ip_family="IPv4"}'
    pods = space.deploy("measured", 1)
    space.service("measured")
    space.wait_endpoints("measured", pods)
    [found, *_] = space.slices("measured")
    assert "endpoints.kubernetes.io/last-change-trigger-time" in found["metadata"]["annotations"]
    before = sample(agent, name)
    pods += space.deploy("measured", 1)
    until(lambda: sample(agent, name) > before, "a measurement")
    total = sample(agent, name.replace("_count", "_sum"))
    assert total >= 0


def test_metrics_count_what_watches_bring(space: Space, agent: Agent, web: list[Pod]) -> None:
    changes = "kubeproxy_sync_proxy_rules_service_changes_total"
    added = 'pointsman_watch_events_total{resource="services",type="ADDED"}'
    syncs = 'kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv6"}'
    names = (changes, added, syncs, "pointsman_services")
    before = {name: sample(agent, name) for name in names}
    space.service("counted", selector={"app": "web"})
    until(lambda: all(sample(agent, name) > before[name] for name in names), "them to rise")
    for resource in ("services", "endpointslices", "nodes", "pods", "namespaces", "servicecidrs"):
        assert sample(agent, f'pointsman_watch_relists_total{{resource="{resource}"}}') >= 1
    assert sample(agent, "pointsman_api_server_reachable") == 1
    assert sample(agent, "pointsman_sync_failures_total") == 0
    assert sample(agent, "process_open_fds") > 5


def test_the_configuration_in_force_can_be_asked_and_tells_no_secrets(agent: Agent) -> None:
    assert ask(agent.node, METRICS, "/proxyMode").body == "pointsman"
    shown = ask(agent.node, METRICS, "/configz").body
    assert json.loads(shown)
    assert agent.kubeconfig
    access = yaml.safe_load(agent.kubeconfig.read_text())["users"][0]["user"]
    for text in (shown, json.dumps(agent.status()), agent.log.read_text()):
        assert access["client-key-data"] not in text
        assert "PRIVATE KEY" not in text


# -- commands ------------------------------------------------------------------------------------


def test_status_of_a_node_that_follows_an_api_server(agent: Agent, web: list[Pod]) -> None:
    done = agent.cli("status", "-o", "json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["healthy"], found["reasons"]) == (0, True, [])
    source = found["source"]
    assert (source["kind"], source["server"], source["reachable"]) == ("kubernetes", SERVER, True)
    assert source["objects"]["Node"] >= 3
    assert found["node"]["name"] == "node-a"
    text = agent.cli("status").stdout
    assert re.search(rf"server +{SERVER}\n", text)
    assert re.search(r"API server +followed since ", text)


def test_describe_and_explain_name_the_pods_of_a_service(
    space: Space, agent: Agent, web: list[Pod]
) -> None:
    service = space.service("described", selector={"app": "web"})
    space.wait_endpoints("described", web)
    endpoints = [f"{pod.ip}:8080" for pod in web]

    def in_force() -> bool:
        """The Service and its slice come by two watches."""
        found = agent.cli("explain", f"{service.ip}:80").stdout
        return all(each in found for each in endpoints)

    until(in_force, "it in force")
    done = agent.cli("describe", "service", f"{space.namespace}/described")
    assert done.returncode == 0, done.stderr
    above, below = done.stdout.split("In the kernel:")  # above kubectl's form, which cuts lists
    assert service.ip in above
    assert all(each in below for each in endpoints)
    nobody = agent.cli("describe", "service", f"{space.namespace}/nobody")
    assert nobody.returncode == 12
    assert f"no Service {space.namespace}/nobody" in nobody.stderr


def test_verify_finds_what_nobody_followed(cluster: Cluster, space: Space, web: list[Pod]) -> None:
    stays = space.service("stays", selector={"app": "web"})
    space.wait_endpoints("stays", web)
    client = cluster.client("node-c")
    with started(cluster) as agent:
        until(agent.attached, "an attached agent", 180)
        until(lambda: agent.cli("verify").returncode == 0, "maps that are as they should be")
        agent.kill()
        missed = space.service("missed", selector={"app": "web"})
        space.wait_endpoints("missed", web)
        verified = agent.cli("verify")
        assert verified.returncode == 1
        assert f"{space.namespace}/missed" in verified.stdout
        assert f"{space.namespace}/stays" not in verified.stdout
        status = agent.cli("status", "-o", "json")
        assert status.returncode == 1
        assert any("not run" in reason for reason in json.loads(status.stdout)["reasons"])
        assert client.connect(stays.ip, 80).pod  # without anybody
        agent.start()
        assert client.connect(missed.ip, 80).pod
        until(lambda: agent.cli("verify").returncode == 0, "no differences")
        until(lambda: agent.cli("status").returncode == 0, "a healthy node")


# -- Events --------------------------------------------------------------------------------------


def events(cluster: Cluster, namespace: str, reason: str, name: str = "") -> list[dict[str, Any]]:
    return [
        found
        for found in cluster.api.list("Event", EVENTS, namespace)
        if found["reason"] == reason
        and name in ("", found["regarding"]["name"])
        and found["reportingController"] == "pointsman"
    ]


def complains(agent: Agent, text: str) -> bool:
    return any(text in json.dumps(problem) for problem in agent.status().get("problems", ()))


def test_the_start_is_an_event_of_each_node(cluster: Cluster, agents: dict[str, Agent]) -> None:
    for name in agents:
        until(lambda name=name: events(cluster, "default", "Starting", name), "Starting")  # type: ignore[misc]
        [found, *_] = events(cluster, "default", "Starting", name)
        assert (found["type"], found["regarding"]["kind"]) == ("Normal", "Node")
        assert found["reportingInstance"] == name


#: What the API server lets in, and an operator should hear of: reason, and what does it.
BAD: dict[str, Callable[[Space, str], object]] = {
    "ProtocolNotServed": lambda space, name: space.service(
        name,
        ports=[
            {"name": "good", "port": 80, "protocol": "TCP"},
            {"name": "bad", "port": 81, "protocol": "SCTP"},
        ],
    ),
    "KubeProxyIncorrectIPVersion": lambda space, name: space.service(
        name, ipFamilyPolicy="SingleStack", externalIPs=["2001:db8:3::1"]
    ),
    "AddressNotServed": lambda space, name: space.api.patch_status(
        "Service",
        space.service(name, type="LoadBalancer").name,
        {"loadBalancer": {"ingress": [{"ip": "224.0.0.5"}]}},
        namespace=space.namespace,
    ),
    "AddressTypeNotServed": lambda space, name: space.apply(
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "FQDN",
            "ports": [{"name": "tcp", "port": 80}],
            "endpoints": [{"addresses": ["elsewhere.example"]}],
        }
    ),
}


@pytest.mark.parametrize("reason", BAD)
def test_what_two_agents_find_is_one_event(
    cluster: Cluster, space: Space, agents: dict[str, Agent], reason: str
) -> None:
    name = f"bad-{reason.lower()}"
    results = [f'pointsman_kubernetes_events_total{{result="{r}"}}' for r in ("written", "known")]

    def told() -> dict[str, tuple[float, ...]]:
        return {n: tuple(sample(each, r) for r in results) for n, each in agents.items()}

    before = told()
    BAD[reason](space, name)
    # Each of them has said it, or found that it was said.
    until(
        lambda: all(sum(now) > sum(before[node]) for node, now in told().items()),
        "both agents to have told it",
    )
    until(lambda: events(cluster, space.namespace, reason, name), "an Event")
    until(lambda: all(complains(each, name) for each in agents.values()), "status to say it")
    [event] = events(cluster, space.namespace, reason, name)
    assert event["type"] == "Warning"
    assert event["regarding"]["uid"]
    assert event.get("series") is None
    assert "node-" not in event["note"]  # it is not one node's
    assert all(sample(each, f'{results[0][:-9]}failed"}}') == 0 for each in agents.values())


def test_what_is_wrong_again_counts_up_the_same_event(
    cluster: Cluster, space: Space, agents: dict[str, Agent]
) -> None:
    make = BAD["KubeProxyIncorrectIPVersion"]
    make(space, "again")
    found = partial(events, cluster, space.namespace, "KubeProxyIncorrectIPVersion", "again")
    until(found, "an Event")
    until(lambda: all(complains(each, "again") for each in agents.values()), "both to know it")
    space.patch("Service", "again", {"spec": {"externalIPs": None}})
    until(lambda: not any(complains(each, "again") for each in agents.values()), "it to be mended")
    make(space, "again")
    until(lambda: found()[0].get("series"), "a count")
    [event] = found()
    assert event["series"]["count"] == 2


def test_what_concerns_one_node_names_it(cluster: Cluster, space: Space, agent: Agent) -> None:
    service = space.service("of-a-cache", ipFamilyPolicy="SingleStack")
    place = agent.node.site.namespace
    ip(place, f"addr add {service.ip}/32 dev lo")
    try:
        until(lambda: events(cluster, space.namespace, "ClusterIPOnNode"), "an Event")
        [event] = events(cluster, space.namespace, "ClusterIPOnNode")
        assert event["regarding"]["name"] == "of-a-cache"
        assert event["note"].startswith("node node-a: ")
    finally:
        ip(place, f"addr delete {service.ip}/32 dev lo")
    until(lambda: not complains(agent, "of-a-cache"), "it to be mended")


def test_a_bad_annotation_of_a_pod_is_an_event_of_that_pod(
    cluster: Cluster, space: Space, agents: dict[str, Agent]
) -> None:
    odd = {"pointsman.io/socket-lb": "perhaps"}
    space.deploy("odd", node="node-b", annotations=odd)
    until(lambda: events(cluster, space.namespace, "AnnotationNotUnderstood"), "an Event")
    [event] = events(cluster, space.namespace, "AnnotationNotUnderstood")
    assert (event["regarding"]["kind"], event["regarding"]["name"]) == ("Pod", "odd-0")
    assert event["reportingInstance"] == "node-b"


# -- configuration -------------------------------------------------------------------------------


def test_a_config_map_that_changes_is_in_force_at_once(
    cluster: Cluster, space: Space, agent: Agent, mounted: Mounted, web: list[Pod]
) -> None:
    service = space.service(
        "configured", selector={"app": "web"}, type="NodePort", externalIPs=["198.51.100.44"]
    )
    client = cluster.client("node-a")

    def at(address: str, port: int) -> str:
        answer = client.connect(address, port, timeout=0.5)
        return answer.error or "served"

    def comes(wanted: dict[tuple[str, int], str]) -> None:
        found: dict[tuple[str, int], str] = {}

        def settled() -> bool:
            found.update({each: at(*each) for each in wanted})
            return found == wanted

        wait_for(settled, f"{wanted}", logs=lambda: f"at last: {found}")

    here, loopback = (
        (agent.node.addresses.v4, service.node_port()),
        ("127.0.0.1", service.node_port()),
    )
    external, other = (
        ("198.51.100.44", 80),
        (cluster.nodes["node-b"].addresses.v4, service.node_port()),
    )
    everything = dict.fromkeys((here, loopback, external, other), "served")
    comes(everything)
    kept = client.open(service.ip, 80)
    mounted.policy(localhostNodePorts=False, externalIPs="none")
    comes({here: "served", loopback: "ECONNREFUSED", external: "timeout"})
    mounted.policy(nodePortAddresses=[f"{agent.node.addresses.v4}/32"])
    comes({here: "served", external: "served", other: "ECONNREFUSED"})
    mounted.policy(refuseUnusedClusterIPs=True, serviceProxyName="other")
    for waits in ("refuseUnusedClusterIPs", "serviceProxyName"):
        until(lambda waits=waits: complains(agent, waits), "what needs a restart to be named")  # type: ignore[misc]
    comes(everything)
    assert at("10.96.0.222", 80) == "timeout"
    mounted.policy()
    until(lambda: not complains(agent, "serviceProxyName"), "nothing to need a restart")
    assert kept.talk() == ""
    assert agent.attached()  # the same process


def test_a_bad_config_map_keeps_the_old_and_says_so(
    cluster: Cluster, agent: Agent, mounted: Mounted
) -> None:
    mounted.policy(externalIPs="local")
    until(lambda: agent.status()["policy"]["external_ips"] == "local", "the new policy")
    mounted.write("nodePortAdresses: [")
    until(lambda: complains(agent, "config.yaml"), "a complaint")
    of_file = partial(events, cluster, "default", "NotInForce", "node-a")
    until(lambda: any("config.yaml" in event["note"] for event in of_file()), "an Event")
    assert agent.status()["policy"]["external_ips"] == "local"
    text = agent.cli("status").stdout
    assert "config.yaml" in text
    assert re.search(r"external-ips\s+local", text)

    mounted.policy(externalIPs="sometimes")  # well formed, and no better
    until(lambda: complains(agent, "sometimes"), "a complaint")
    assert agent.status()["policy"]["external_ips"] == "local"

    mounted.policy(externalIPs="none", metricsBindAddress="127.0.0.1:10250")
    until(lambda: agent.status()["policy"]["external_ips"] == "none", "the new policy")
    until(lambda: complains(agent, "metricsBindAddress"), "what needs a restart to be named")
    assert not complains(agent, "sometimes")
    mounted.policy()
    until(lambda: not agent.status()["problems"] or not complains(agent, "config"), "no complaint")
    assert agent.status()["policy"]["external_ips"] == "all"


def test_kube_proxys_own_file_will_do(
    cluster: Cluster, space: Space, web: list[Pod], tmp_path: Path
) -> None:
    file = tmp_path / "kube-proxy.yaml"
    settings = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "hostnameOverride": "node-c",
        "clusterCIDR": "10.244.0.0/16",
        "healthzBindAddress": "0.0.0.0:10356",
        "metricsBindAddress": "127.0.0.1:10349",
        "nodePortAddresses": [f"{cluster.nodes['node-c'].addresses.v4}/32"],
        "nftables": {"masqueradeAll": True},
    }
    service = space.service("by-its-file", selector={"app": "web"}, type="NodePort")
    space.wait_endpoints("by-its-file", web)
    client = cluster.client("node-c")
    kubeconfig = cluster.agent("node-c").kubeconfig
    settings["clientConnection"] = {"kubeconfig": str(kubeconfig)}
    file.write_text(yaml.safe_dump(settings))
    with started(cluster, f"--config={file}", kubeconfig=None) as agent:
        wait_for(agent.attached, "an attached agent", 180, logs=partial(tail, agent.log))
        assert ask(agent.node, 10356, "/healthz").status == 200
        assert sample(agent, "pointsman_services", 10349) > 0
        port = service.node_port()
        assert client.connect(agent.node.addresses.v4, port).pod
        assert client.connect(cluster.nodes["node-b"].addresses.v4, port).error == "ECONNREFUSED"
        assert client.connect(service.ip, 80).pod
        # What has no effect is named.
        until(lambda: complains(agent, "masqueradeAll"), "a problem that names it")


# -- what is missing -----------------------------------------------------------------------------


def test_without_any_rights_each_is_named_and_given_rights_it_goes_on(
    cluster: Cluster, space: Space, plane: ControlPlane, web: list[Pod]
) -> None:
    kubeconfig = plane.kubeconfig("nobody-yet")
    service = space.service("forbidden", selector={"app": "web"})
    space.wait_endpoints("forbidden", web)
    client = cluster.client("node-c")
    rules = [
        {"apiGroups": [group], "resources": resources, "verbs": ["list", "watch"]}
        for group, resources in (
            ("", ["services", "nodes"]),
            ("discovery.k8s.io", ["endpointslices"]),
        )
    ]
    rbac = "rbac.authorization.k8s.io"
    role = {"kind": "ClusterRole", "name": "nobody-yet", "apiGroup": rbac}
    objects: list[dict[str, Any]] = [
        {"kind": "ClusterRole", "rules": rules},
        {
            "kind": "ClusterRoleBinding",
            "roleRef": role,
            "subjects": [{"kind": "User", "name": "nobody-yet", "apiGroup": rbac}],
        },
    ]
    objects = [
        {"apiVersion": f"{rbac}/v1", "metadata": {"name": "nobody-yet"}, **each} for each in objects
    ]
    with started(cluster, kubeconfig=kubeconfig) as agent:
        wanted = ("services", "nodes", "endpointslices")
        until(lambda: all(complains(agent, f"on resource {r}") for r in wanted), "complaints", 60)
        until(lambda: code(agent, "/readyz") == 503, "an agent that is not ready")
        assert "[-]lists failed" in ask(agent.node, HEALTHZ, "/readyz").body
        assert code(agent, "/livez") == 200  # a restart would not help
        cluster.api.apply(*objects)
        try:
            # It asks again by itself, and does without what only some of its features need.
            wait_for(agent.attached, "an attached agent", 180, logs=partial(tail, agent.log))
            assert client.connect(service.ip, 80).pod
            until(lambda: code(agent, "/readyz") == 200, "readiness")
            # What is still not allowed.
            until(lambda: complains(agent, "on resource pods"), "a complaint about pods")
            unwritten = "Kubernetes Events are not written"
            until(lambda: unwritten in agent.log.read_text(), "a complaint about Events")
        finally:
            for each in objects:
                cluster.api.delete(each["kind"], "nobody-yet", each["apiVersion"])


def test_up_without_an_api_server_says_so_and_serves_what_was_pinned(
    cluster: Cluster, space: Space, plane: ControlPlane, web: list[Pod]
) -> None:
    service = space.service("pinned", selector={"app": "web"})
    space.wait_endpoints("pinned", web)
    client = cluster.client("node-c")
    names = {pod.name for pod in web}
    with started(cluster) as agent, ThreadPoolExecutor() as asking:
        until(agent.attached, "an attached agent", 180)
        until(lambda: set(client.spread(service.ip, 80, 30)) == names, "all pods")
        agent.stop()
        plane.stop("kube-apiserver")
        try:
            # These wait for the server, too.
            service_of = f"{space.namespace}/pinned"
            asked = [
                asking.submit(agent.cli, *command)
                for command in (("verify",), ("describe", "service", service_of))
            ]
            agent.start(wait=False)
            until(agent.complaint, "a complaint")
            status = agent.status()
            assert (status["source"]["server"], status["source"]["reachable"]) == (SERVER, False)
            assert SERVER in agent.log.read_text()
            until(lambda: code(agent, "/livez") == 200, "a live agent")
            assert code(agent, "/readyz") == 503
            assert set(client.spread(service.ip, 80, 60)) == names
            done = agent.cli("status")
            assert done.returncode == 1
            assert re.search(r"API server +away since ", done.stdout)
            verified, described = (each.result() for each in asked)
        finally:
            plane.start("kube-apiserver")
        assert verified.returncode == 12
        assert "the API server's objects can't be read" in verified.stderr
        assert all(f"{pod.ip}:8080" in described.stdout for pod in web)
        until(lambda: code(agent, "/readyz") == 200, "readiness", 60)
        until(lambda: agent.cli("status").returncode == 0, "a healthy node")
        assert set(client.spread(service.ip, 80, 60)) == names
