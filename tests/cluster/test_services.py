"""What controllers and the API server make of Services, and what clients on a node then get.

One agent for all of it, on node-a: as on a real node it lives through every change of these tests.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pytest

from tests.cluster.clients import Client
from tests.cluster.cluster import Cluster
from tests.cluster.network import ip
from tests.cluster.nodes import Agent
from tests.cluster.pods import Pod
from tests.cluster.space import Service, Space
from tests.support.kernel import until

pytestmark = pytest.mark.cluster

SLICES = "discovery.k8s.io/v1"
UNTRANSLATED = "EACCES"  # what a connect gets that no program changed: by the routes below
# What is nobody's: ClusterIPs, external addresses, and those of load balancers.
NOBODYS = (
    *("10.96.0.0/15", "203.0.113.0/24", "198.51.100.0/24"),
    *("fd00:96::/112", "2001:db8:1::/48", "2001:db8:2::/48"),
)
BOTH = ("tcp", "udp")


@pytest.fixture(scope="module")
def closed(cluster: Cluster) -> Iterator[None]:
    """On these nodes an address is either translated or fails at once: no waiting for nothing."""
    places = [cluster.nodes[node].site.namespace for node in ("node-a", "node-c")]
    for place in places:
        ip(place, *(f"route add prohibit {cidr}" for cidr in NOBODYS))
    yield
    for place in places:
        ip(place, *(f"route delete prohibit {cidr}" for cidr in NOBODYS))


@pytest.fixture(scope="module")
def agent(cluster: Cluster, closed: None) -> Iterator[Agent]:
    """In the end its maps say what the objects say, and nothing went wrong in between."""
    made = cluster.agent("node-a")
    made.start()
    yield made
    verified = made.cli("verify")
    cluster.reset()
    assert verified.returncode == 0, verified.stdout + verified.stderr
    log = made.log.read_text()
    assert "Traceback" not in log and " ERROR " not in log, log[-4000:]


@pytest.fixture(scope="module")
def space(cluster: Cluster, agent: Agent) -> Iterator[Space]:
    """One for all tests here: each has Services of names of its own."""
    made = cluster.space("services")
    yield made
    made.close()


@pytest.fixture(scope="module")
def web(space: Space) -> dict[str, Pod]:
    """Pods that all tests use and none changes, by node: one on each."""
    return {pod.node.name: pod for pod in space.deploy("web", 3)}


@pytest.fixture(scope="module")
def on_node(cluster: Cluster, agent: Agent) -> Client:
    return cluster.client("node-a")


@pytest.fixture(scope="module")
def in_pod(cluster: Cluster, space: Space) -> Client:
    return client_in(cluster, *space.deploy("client", node="node-a"))


@pytest.fixture(scope="module")
def clients(on_node: Client, in_pod: Client) -> list[Client]:
    return [on_node, in_pod]


def client_in(cluster: Cluster, pod: Pod) -> Client:
    ip(pod.place.network, *(f"route add prohibit {cidr}" for cidr in NOBODYS))
    return cluster.client(pod)


def got(client: Client, address: str, port: int, protocol: str, wanted: set[str]) -> set[str]:
    """Pods and errors of connects, until all that are wanted came, or one that is not."""
    found: set[str] = set()
    for number in range(200):
        answer = client.connect(address, port, protocol, timeout=1)
        found.add(answer.pod or answer.error)
        if found - wanted or (found == wanted and number >= 8 * len(wanted)):
            break
    return found


def serves(
    clients: Client | Iterable[Client],
    address: str,
    pods: Iterable[Pod],
    port: int = 80,
    protocols: Iterable[str] = BOTH,
) -> None:
    """Until these pods answer there, each of them, and nobody else."""
    wanted = {pod.name for pod in pods}
    for client in [clients] if isinstance(clients, Client) else clients:
        for protocol in protocols:
            found: set[str] = set()

            def settled(client: Client = client, protocol: str = protocol) -> bool:
                nonlocal found
                found = got(client, address, port, protocol, wanted)
                return found == wanted

            try:
                until(settled, f"{wanted} at {address} {port}/{protocol}")
            except AssertionError as error:
                error.add_note(f"at last it was {found}")
                raise


def fails(
    clients: Client | Iterable[Client],
    address: str,
    error: str,
    port: int = 80,
    protocols: Iterable[str] = ("tcp",),
) -> None:
    """Until every connect gets this error."""
    for client in [clients] if isinstance(clients, Client) else clients:
        for protocol in protocols:
            connect = partial(client.connect, address, port, protocol, timeout=0.5)
            until(
                lambda connect=connect: connect().error == error,  # type: ignore[misc]
                f"{error} at {address} {port}/{protocol}",
            )


def of_web(space: Space, name: str, **more: Any) -> Service:
    """A Service for the pods of `web`, with a name of its own."""
    return space.service(name, **{"selector": {"app": "web"}, **more})


def change(space: Space, service: Service, **spec: Any) -> Service:
    thing = space.patch("Service", service.name, {"spec": spec})
    ips = tuple(thing["spec"].get("clusterIPs", ()))
    return Service(service.name, ips[0] if ips else "", ips, thing)


def slice_of(
    service: str, name: str, addresses: Iterable[str], port: int = 8080, family: str = "IPv4"
) -> dict[str, Any]:
    """As people write them: no node, no zone, no conditions."""
    return {
        "apiVersion": SLICES,
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": family,
        "ports": [{"name": p.lower(), "protocol": p, "port": port} for p in ("TCP", "UDP")],
        "endpoints": [{"addresses": [address]} for address in addresses],
    }


# -- which endpoints -----------------------------------------------------------------------------


def test_a_named_target_port_may_be_another_number_in_each_pod(
    space: Space, clients: list[Client]
) -> None:
    pods = [*space.deploy("named", port=8080), *space.deploy("named", port=9090)]
    ports = [
        {"name": p, "protocol": p.upper(), "port": 80, "targetPort": p} for p in ("tcp", "udp")
    ]
    service = space.service("named", ports=ports)
    space.wait_endpoints("named", pods)
    numbers = {port["port"] for found in space.slices("named") for port in found["ports"]}
    assert numbers == {8080, 9090}
    for address in service.ips:
        serves(clients, address, pods)


def test_a_service_without_selector_has_the_endpoints_of_slices_by_hand(
    space: Space, web: dict[str, Pod], clients: list[Client]
) -> None:
    service = space.service("by-hand", selector=None)
    fails(clients, service.ip, "ECONNREFUSED", protocols=BOTH)
    first, second, third = (web[node].ip for node in ("node-a", "node-b", "node-c"))
    space.apply(slice_of("by-hand", "one", [first, second]))
    serves(clients, service.ip, [web["node-a"], web["node-b"]])
    space.apply(slice_of("by-hand", "two", [second, third]))  # one of them is in both
    serves(clients, service.ip, web.values())
    space.delete("EndpointSlice", "one", SLICES)
    serves(clients, service.ip, [web["node-b"], web["node-c"]])
    # The label alone links them, and it may be changed.
    label = {"metadata": {"labels": {"kubernetes.io/service-name": "of-nobody"}}}
    space.patch("EndpointSlice", "two", label, SLICES)
    fails(clients, service.ip, "ECONNREFUSED")


def test_endpoints_that_the_controller_mirrors_are_served(
    space: Space, web: dict[str, Pod], clients: list[Client]
) -> None:
    service = space.service("mirrored", selector=None)

    def write(*nodes: str) -> None:
        space.apply(
            {
                "apiVersion": "v1",
                "kind": "Endpoints",
                "metadata": {"name": "mirrored"},
                "subsets": [
                    {
                        "addresses": [{"ip": web[node].ip} for node in nodes],
                        "ports": [
                            {"name": p.lower(), "protocol": p, "port": 8080} for p in ("TCP", "UDP")
                        ],
                    }
                ],
            }
        )

    write("node-b", "node-c")
    serves(clients, service.ip, [web["node-b"], web["node-c"]])
    [found] = space.slices("mirrored")
    by = found["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"]
    assert by == "endpointslicemirroring-controller.k8s.io"
    write("node-a")
    serves(clients, service.ip, [web["node-a"]])
    space.delete("Endpoints", "mirrored")
    fails(clients, service.ip, "ECONNREFUSED")


def test_more_endpoints_than_one_slice_holds(
    cluster: Cluster, space: Space, agent: Agent, on_node: Client
) -> None:
    """Pods of a node that only the API server knows; their addresses are another node's."""
    count, left = 110, 10
    home = cluster.nodes["node-c"]
    network = cluster.nodes["node-a"].site.namespace
    server, *_ = space.deploy("many-server", node="node-c", hostNetwork=True, port=8123)
    commands = [
        (home.site.namespace, "route add local 10.245.0.0/24 dev lo"),
        (network, f"route add 10.245.0.0/24 via {home.addresses.v4}"),
    ]
    for where, line in commands:
        ip(where, line)
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-of-many"}}
    cluster.api.create(node)
    try:
        for number in range(count):
            name = f"many-{number}"
            space.apply(
                {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {"name": name, "labels": {"app": "many"}},
                    "spec": {
                        "nodeName": "node-of-many",
                        "containers": [{"name": "main", "image": "test"}],
                    },
                }
            )
            status = {
                "phase": "Running",
                "podIP": f"10.245.0.{number + 1}",
                "podIPs": [{"ip": f"10.245.0.{number + 1}"}],
                "conditions": [{"type": "Ready", "status": "True"}],
            }
            cluster.api.patch_status("Pod", name, status, namespace=space.namespace)
        service = space.service("many", target=8123, ipFamilyPolicy="SingleStack")
        until(lambda: len(space.endpoints("many")) == count, "endpoints in slices", 60)
        assert len(space.slices("many")) == 2
        until(lambda: in_force(agent, space, "many") == count, "all of them in the maps")
        # TCP alone: to a datagram the server answers by its node's own address.
        assert set(on_node.spread(service.ip, 80, 300)) == {server.name}

        for number in range(left, count):
            cluster.api.delete("Pod", f"many-{number}", namespace=space.namespace, grace=0)
        until(lambda: len(space.endpoints("many")) == left, "fewer endpoints in slices", 60)
        until(lambda: in_force(agent, space, "many") == left, "fewer of them in the maps")
        assert set(on_node.spread(service.ip, 80, 100)) == {server.name}
    finally:
        cluster.api.delete("Node", "node-of-many")
        for where, line in commands:
            ip(where, line.replace("add", "delete"))


def in_force(agent: Agent, space: Space, service: str) -> int:
    """How many endpoints the maps have for its TCP port."""
    found = json.loads(agent.cli("get", "endpoints", "-o", "json").stdout)["items"]
    wanted = (space.namespace, service, "tcp")
    return sum((row["namespace"], row["service"], row["port"]) == wanted for row in found)


# -- conditions ----------------------------------------------------------------------------------


def test_readiness_that_comes_and_goes_is_followed(space: Space, clients: list[Client]) -> None:
    first, second = pods = space.deploy("moody", 2)
    service = space.service("moody")
    serves(clients, service.ip, pods)
    first.set_ready(False)
    serves(clients, service.ip, [second])
    second.set_ready(False)
    fails(clients, service.ip, "ECONNREFUSED", protocols=BOTH)
    first.set_ready(True)
    serves(clients, service.ip, [first])
    second.set_ready(True)
    serves(clients, service.ip, pods)


def test_terminating_pods_serve_only_when_nothing_else_does(
    space: Space, on_node: Client, in_pod: Client
) -> None:
    first, second = space.deploy("last", 2, drain=True)
    service = space.service("last")
    both = [on_node, in_pod]
    serves(both, service.ip, [first, second])
    kept = on_node.open(first.ip, 8080)
    first.terminate()
    serves(both, service.ip, [second])
    second.terminate()
    serves(both, service.ip, [first, second])
    assert kept.talk() == ""
    first.finish()
    serves(both, service.ip, [second])
    second.finish()
    fails(both, service.ip, "ECONNREFUSED", protocols=BOTH)


def test_a_terminating_pod_that_is_not_ready_serves_nobody(
    space: Space, clients: list[Client]
) -> None:
    [pod] = space.deploy("unready", drain=True)
    service = space.service("unready")
    serves(clients, service.ip, [pod])
    pod.terminate()
    serves(clients, service.ip, [pod])
    pod.set_ready(False)  # serving is false then
    fails(clients, service.ip, "ECONNREFUSED", protocols=BOTH)
    pod.finish()


def test_pods_that_are_not_ready_may_be_published(space: Space, clients: list[Client]) -> None:
    [pod] = space.deploy("early")
    service = space.service("early", publishNotReadyAddresses=True)
    pod.set_ready(False)
    serves(clients, service.ip, [pod])
    change(space, service, publishNotReadyAddresses=False)
    fails(clients, service.ip, "ECONNREFUSED")
    change(space, service, publishNotReadyAddresses=True)
    serves(clients, service.ip, [pod])


# -- families ------------------------------------------------------------------------------------


def test_a_service_gets_a_second_family_and_loses_it(
    space: Space, web: dict[str, Pod], clients: list[Client]
) -> None:
    service = of_web(space, "families", ipFamilyPolicy="SingleStack")
    assert len(service.ips) == 1
    serves(clients, service.ip, web.values())
    dual = change(space, service, ipFamilyPolicy="PreferDualStack")
    assert dual.thing["spec"]["ipFamilies"] == ["IPv4", "IPv6"]
    for address in dual.ips:
        serves(clients, address, web.values())
    change(space, service, ipFamilyPolicy="SingleStack")
    fails(clients, dual.ip_of(6), UNTRANSLATED)
    serves(clients, service.ip, web.values())


def test_a_service_of_ipv6_alone(space: Space, web: dict[str, Pod], clients: list[Client]) -> None:
    service = of_web(space, "six", ipFamilyPolicy="SingleStack", ipFamilies=["IPv6"])
    assert service.ips == (service.ip_of(6),)
    serves(clients, service.ip, web.values())


def test_a_family_without_endpoints_refuses_on_its_own(
    space: Space, web: dict[str, Pod], clients: list[Client]
) -> None:
    service = space.service("half", selector=None)
    pod = web["node-b"]
    space.apply(slice_of("half", "half-6", [pod.ip6], family="IPv6"))
    serves(clients, service.ip_of(6), [pod])
    fails(clients, service.ip_of(4), "ECONNREFUSED", protocols=BOTH)
    space.apply(slice_of("half", "half-4", [pod.ip]))
    serves(clients, service.ip_of(4), [pod])


# -- topology, policies --------------------------------------------------------------------------


def test_traffic_distribution_is_followed_and_the_zone_of_the_node(
    cluster: Cluster, space: Space, web: dict[str, Pod], clients: list[Client]
) -> None:
    service = of_web(space, "near", trafficDistribution="PreferSameZone")
    here, near, far = (web[node] for node in ("node-a", "node-b", "node-c"))
    for address in service.ips:
        serves(clients, address, [here, near])
    hints = space.endpoints("near")[here.ip]["hints"]
    assert [zone["name"] for zone in hints["forZones"]] == ["zone-1"]
    change(space, service, trafficDistribution="PreferSameNode")
    serves(clients, service.ip, [here])
    change(space, service, trafficDistribution="PreferClose")
    serves(clients, service.ip, [here, near])

    node = cluster.nodes["node-a"]

    def move(zone: str | None) -> None:
        """The agent sees the node's label; the controller only when it looks at the Service again,
        for which a changed node alone is no reason to it."""
        node.label(topology_kubernetes_io__zone=zone)

        def followed() -> bool:
            note = {"looked-at": str(time.monotonic_ns())}
            space.patch("Service", "near", {"metadata": {"annotations": note}})
            return space.endpoints("near")[here.ip].get("zone") == zone

        until(followed, f"an endpoint in zone {zone}")

    try:
        move("zone-2")
        serves(clients, service.ip, [here, far])
        move(None)
        serves(clients, service.ip, web.values())
    finally:
        move("zone-1")
    serves(clients, service.ip, [here, near])
    change(space, service, trafficDistribution=None)
    serves(clients, service.ip, web.values())


def test_no_endpoint_on_the_node_or_in_its_zone_means_all(
    space: Space, web: dict[str, Pod], clients: list[Client]
) -> None:
    far = space.deploy("far", 2, node="node-c")
    service = space.service("far", trafficDistribution="PreferSameNode")
    serves(clients, service.ip, far)
    change(space, service, trafficDistribution="PreferSameZone")
    serves(clients, service.ip, far)


def test_the_annotation_for_hints_is_followed(
    space: Space, web: dict[str, Pod], clients: list[Client]
) -> None:
    """The controller gives each zone as many endpoints as it has of the CPUs: 2 of 3, and 1."""
    auto = {"service.kubernetes.io/topology-mode": "Auto"}
    service = of_web(space, "auto", annotations=auto)

    def hinted() -> bool:
        found = space.endpoints("auto")
        return len(found) == 6 and all(each.get("hints") for each in found.values())

    until(hinted, "hints of the controller")
    serves(clients, service.ip, [web["node-a"], web["node-b"]])
    off = {"metadata": {"annotations": {"service.kubernetes.io/topology-mode": None}}}
    space.patch("Service", "auto", off)
    serves(clients, service.ip, web.values())


def test_internal_traffic_policy_local_comes_and_goes(
    space: Space, web: dict[str, Pod], clients: list[Client]
) -> None:
    service = of_web(space, "local", type="NodePort", internalTrafficPolicy="Local")
    for address in service.ips:
        serves(clients, address, [web["node-a"]])
    # Of all its addresses the ClusterIP alone is meant.
    serves(clients, "192.0.2.11", web.values(), service.node_port(), ("tcp",))
    change(space, service, internalTrafficPolicy="Cluster")
    serves(clients, service.ip, web.values())


def test_internal_traffic_policy_local_without_a_local_pod_is_unreachable(
    space: Space, clients: list[Client]
) -> None:
    [away] = space.deploy("away", node="node-b")
    service = space.service("away", internalTrafficPolicy="Local")
    fails(clients, service.ip, "EHOSTUNREACH", protocols=BOTH)
    [here] = space.deploy("away", node="node-a")
    serves(clients, service.ip, [here])
    here.set_ready(False)
    fails(clients, service.ip, "EHOSTUNREACH")
    change(space, service, internalTrafficPolicy="Cluster")
    serves(clients, service.ip, [away])


# -- session affinity ----------------------------------------------------------------------------


def test_session_affinity_is_switched_on_and_off(
    space: Space, web: dict[str, Pod], clients: list[Client]
) -> None:
    service = of_web(space, "sticky")
    serves(clients, service.ip, web.values())
    change(space, service, sessionAffinity="ClientIP")
    for client in clients:
        until(lambda client=client: len(client.spread(service.ip, 80, 30)) == 1, "one pod")  # type: ignore[misc]
        first = client.spread(service.ip, 80, 30)
        assert client.spread(service.ip, 80, 30) == first
    change(space, service, sessionAffinity="None", sessionAffinityConfig=None)
    serves(clients, service.ip, web.values())


def test_the_timeout_of_session_affinity_may_change(
    space: Space, web: dict[str, Pod], on_node: Client
) -> None:
    def keep(seconds: int) -> dict[str, Any]:
        return {"clientIP": {"timeoutSeconds": seconds}}

    service = of_web(
        space, "patience", sessionAffinity="ClientIP", sessionAffinityConfig=keep(10800)
    )
    until(lambda: on_node.connect(service.ip, 80, timeout=1).pod, "an answer")
    until(lambda: len(on_node.spread(service.ip, 80, 30)) == 1, "one pod")
    change(space, service, sessionAffinityConfig=keep(1))

    def after_a_while() -> str:
        time.sleep(1.1)  # longer than it lasts
        return on_node.connect(service.ip, 80).pod

    first = on_node.connect(service.ip, 80).pod
    until(lambda: after_a_while() != first, "another pod")
    change(space, service, sessionAffinityConfig=keep(10800))
    until(lambda: len({after_a_while() for _ in range(2)}) == 1, "one pod again")


def test_a_client_whose_pod_leaves_keeps_another(space: Space, clients: list[Client]) -> None:
    pods = {pod.name: pod for pod in space.deploy("faithful", 3)}
    service = space.service("faithful", sessionAffinity="ClientIP")
    space.wait_endpoints("faithful", pods.values())
    client = clients[1]
    until(lambda: client.connect(service.ip, 80, timeout=0.5).pod, "an answer")
    pods.pop(client.connect(service.ip, 80).pod).terminate()
    until(lambda: client.connect(service.ip, 80).pod in pods, "another pod")
    assert len(client.spread(service.ip, 80, 30)) == 1


# -- whose Service it is, and its type -----------------------------------------------------------


@pytest.mark.parametrize(
    "label", ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"]
)
def test_a_label_takes_a_service_away_and_back(
    space: Space, web: dict[str, Pod], clients: list[Client], label: str
) -> None:
    service = of_web(space, f"of-{label.rpartition('/')[2]}")
    serves(clients, service.ip, web.values())
    for value in ("another", ""):
        space.patch("Service", service.name, {"metadata": {"labels": {label: value}}})
        fails(clients, service.ip, UNTRANSLATED)
        space.patch("Service", service.name, {"metadata": {"labels": {label: None}}})
        serves(clients, service.ip, web.values())


def test_a_service_may_be_of_every_type_in_turn(
    space: Space, web: dict[str, Pod], clients: list[Client]
) -> None:
    pods = web.values()
    service = of_web(space, "chameleon")
    serves(clients, service.ip, pods)
    service = change(space, service, type="NodePort")
    port = service.node_port()
    serves(clients, "192.0.2.11", pods, port, ("tcp",))
    service = change(space, service, type="LoadBalancer", allocateLoadBalancerNodePorts=True)
    assert service.node_port() == port
    ingress = {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}}
    space.api.patch_status("Service", service.name, ingress, namespace=space.namespace)
    serves(clients, "203.0.113.1", pods)
    serves(clients, "192.0.2.11", pods, port, ("tcp",))

    service = change(space, service, type="ClusterIP")
    fails(clients, "192.0.2.11", "ECONNREFUSED", port)
    fails(clients, "203.0.113.1", UNTRANSLATED)
    serves(clients, service.ip, pods)

    old = service.ip
    change(space, service, type="ExternalName", externalName="elsewhere.example")
    fails(clients, old, UNTRANSLATED)
    service = change(space, service, type="ClusterIP", externalName=None, clusterIP="None")
    assert service.ip == "None"
    fails(clients, old, UNTRANSLATED)
    change(space, service, type="ExternalName", externalName="elsewhere.example")
    service = change(space, service, type="NodePort", externalName=None, clusterIP=None)
    serves(clients, service.ip, pods)
    serves(clients, "192.0.2.11", pods, service.node_port(), ("tcp",))


# -- addresses that are not ClusterIPs -----------------------------------------------------------


def test_a_node_port_answers_at_every_nodes_address(
    cluster: Cluster, space: Space, web: dict[str, Pod], on_node: Client, in_pod: Client
) -> None:
    service = of_web(space, "node-port", type="NodePort")
    for node in cluster.nodes.values():
        for address in node.addresses:
            for port in BOTH:
                serves([on_node, in_pod], address, web.values(), service.node_port(port), (port,))
    for loopback in ("127.0.0.1", "127.1.2.3", "::1"):
        serves(on_node, loopback, web.values(), service.node_port("tcp"), ("tcp",))
        fails(in_pod, loopback, "ECONNREFUSED", service.node_port("tcp"))  # a pod's own
    # Of the first 86 ports the API server gives none by itself.
    moved = [{**port, "nodePort": 30010} for port in service.thing["spec"]["ports"]]
    old = service.node_port()
    service = change(space, service, ports=moved)
    serves([on_node, in_pod], "192.0.2.12", web.values(), service.node_port(), ("tcp",))
    fails([on_node, in_pod], "192.0.2.11", "ECONNREFUSED", old)


def test_a_node_that_comes_and_goes_is_one_for_node_ports(
    cluster: Cluster, space: Space, web: dict[str, Pod], clients: list[Client]
) -> None:
    service = of_web(space, "newcomer", type="NodePort")
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "newcomer"}}
    cluster.api.create(node)
    try:
        at = {"addresses": [{"type": "InternalIP", "address": "198.51.100.77"}]}
        cluster.api.patch_status("Node", "newcomer", at)
        serves(clients, "198.51.100.77", web.values(), service.node_port(), ("tcp",))
    finally:
        cluster.api.delete("Node", "newcomer")
    fails(clients, "198.51.100.77", UNTRANSLATED, service.node_port())


def test_external_traffic_policy_local_leaves_other_nodes_to_decide(
    space: Space, web: dict[str, Pod], clients: list[Client]
) -> None:
    service = of_web(space, "outside", type="NodePort", externalTrafficPolicy="Local")
    serves(clients, "192.0.2.11", web.values(), service.node_port(), ("tcp",))
    fails(clients, "192.0.2.12", "ECONNREFUSED", service.node_port())  # nobody serves there
    change(space, service, externalTrafficPolicy="Cluster")
    serves(clients, "192.0.2.12", web.values(), service.node_port(), ("tcp",))


def test_addresses_of_a_load_balancer_come_and_go_with_the_status(
    space: Space, web: dict[str, Pod], clients: list[Client]
) -> None:
    service = of_web(space, "balanced", type="LoadBalancer")

    def ingress(*found: dict[str, Any]) -> None:
        status = {"loadBalancer": {"ingress": list(found)}}
        space.api.patch_status("Service", "balanced", status, namespace=space.namespace)

    fails(clients, "203.0.113.10", UNTRANSLATED)
    ingress({"ip": "203.0.113.10"}, {"ip": "2001:db8:1::10", "ipMode": "VIP"})
    for address in ("203.0.113.10", "2001:db8:1::10"):
        serves(clients, address, web.values())
    ingress({"ip": "203.0.113.10", "ipMode": "Proxy"}, {"ip": "203.0.113.11", "ipMode": "VIP"})
    serves(clients, "203.0.113.11", web.values())
    fails(clients, "203.0.113.10", UNTRANSLATED)
    fails(clients, "2001:db8:1::10", UNTRANSLATED)
    ingress({"ip": "203.0.113.10", "ipMode": "VIP"}, {"hostname": "balancer.example"})
    serves(clients, "203.0.113.10", web.values())
    fails(clients, "203.0.113.11", UNTRANSLATED)
    change(space, service, loadBalancerSourceRanges=["198.51.100.0/24"])  # for those outside
    serves(clients, "203.0.113.10", web.values())
    ingress()
    fails(clients, "203.0.113.10", UNTRANSLATED)
    serves(clients, service.ip, web.values())


def test_external_ips_come_and_go(space: Space, web: dict[str, Pod], clients: list[Client]) -> None:
    service = of_web(space, "external", externalIPs=["198.51.100.7", "2001:db8:2::7"])
    for address in ("198.51.100.7", "2001:db8:2::7"):
        serves(clients, address, web.values())
    change(space, service, externalIPs=["198.51.100.8"])
    serves(clients, "198.51.100.8", web.values())
    fails(clients, "198.51.100.7", UNTRANSLATED)


def test_host_ports_of_this_nodes_pods(space: Space, clients: list[Client]) -> None:
    ports = [
        {"name": p.lower(), "protocol": p, "containerPort": 8080, "hostPort": 18080}
        for p in ("TCP", "UDP")
    ]
    [pod] = space.deploy("host-port", node="node-a", ports=ports)
    space.deploy("host-port", node="node-b", ports=ports)
    serves(clients, "192.0.2.11", [pod], 18080)
    serves(clients, "2001:db8::11", [pod], 18080)
    fails(clients, "192.0.2.12", "ECONNREFUSED", 18080)  # that node's own
    pod.terminate()
    fails(clients, "192.0.2.11", "ECONNREFUSED", 18080)


# -- who is left alone ---------------------------------------------------------------------------


def test_a_pod_that_opts_out_is_left_alone(
    cluster: Cluster, space: Space, web: dict[str, Pod], on_node: Client
) -> None:
    service = of_web(space, "opted-out")
    out = {"pointsman.io/socket-lb": "disabled"}
    [quiet] = space.deploy("quiet", node="node-a", annotations=out)
    [other] = space.deploy("other", node="node-a")
    inside, beside = client_in(cluster, quiet), client_in(cluster, other)
    fails(inside, service.ip, UNTRANSLATED)
    serves([beside, on_node], service.ip, web.values())
    back = {"metadata": {"annotations": {"pointsman.io/socket-lb": None}}}
    space.patch("Pod", quiet.name, back)
    serves(inside, service.ip, web.values())
    space.patch("Pod", quiet.name, {"metadata": {"annotations": out}})
    fails(inside, service.ip, UNTRANSLATED)


def test_a_namespace_that_opts_out_is_left_alone(
    cluster: Cluster, space: Space, web: dict[str, Pod]
) -> None:
    service = of_web(space, "seen-from-afar")
    other = cluster.space("services-out")
    try:
        [first] = other.deploy("first", node="node-a")
        yes = {"pointsman.io/socket-lb": "enabled"}
        [second] = other.deploy("second", node="node-a", annotations=yes)
        one, two = client_in(cluster, first), client_in(cluster, second)
        serves([one, two], service.ip, web.values())
        out = {"metadata": {"annotations": {"pointsman.io/socket-lb": "disabled"}}}
        cluster.api.patch("Namespace", "services-out", out)
        fails(one, service.ip, UNTRANSLATED)
        serves(two, service.ip, web.values())  # what a Pod says goes before
    finally:
        other.close()


# -- Services that change ------------------------------------------------------------------------


def test_an_address_of_a_deleted_service_is_the_next_ones_alone(
    space: Space, clients: list[Client]
) -> None:
    """Who connects while that happens gets the old, an error, the new: never the old again."""
    old, new = space.deploy("old", 2), space.deploy("new", 2)
    for turn in range(3):
        first = space.service(f"old-{turn}", selector={"app": "old"})
        serves(clients, first.ip, old)
        space.delete("Service", first.name)
        second = space.service(
            f"new-{turn}", selector={"app": "new"}, clusterIP=first.ip, clusterIPs=list(first.ips)
        )
        for client in clients:
            connect = partial(client.connect, second.ip, 80, timeout=0.5)
            until(lambda connect=connect: connect().pod[:3] == "new", "the new Service")  # type: ignore[misc]
            for protocol in BOTH:
                found = client.spread(second.ip, 80, 60, protocol)
                assert set(found) == {pod.name for pod in new}
        space.delete("Service", second.name)
        fails(clients, second.ip, UNTRANSLATED)


def test_the_ports_of_a_service_may_change(
    space: Space, web: dict[str, Pod], clients: list[Client]
) -> None:
    service = of_web(space, "moving")
    serves(clients, service.ip, web.values())

    def at(port: int, target: int = 8080, name: str = "tcp") -> None:
        found = [{"name": name, "port": port, "targetPort": target, "protocol": "TCP"}]
        change(space, service, ports=found)

    at(81)
    serves(clients, service.ip, web.values(), 81, ("tcp",))
    fails(clients, service.ip, "ECONNREFUSED", protocols=BOTH)  # a port that it does not define
    at(81, name="renamed")
    serves(clients, service.ip, web.values(), 81, ("tcp",))
    at(81, target=9999)
    fails(clients, service.ip, "ECONNREFUSED", 81)  # by the pods: nobody listens there
    at(80)
    serves(clients, service.ip, web.values(), 80, ("tcp",))
    fails(clients, service.ip, "ECONNREFUSED", 81)


def test_another_selector_means_other_pods_at_once(
    space: Space, web: dict[str, Pod], clients: list[Client]
) -> None:
    blue, green = space.deploy("blue"), space.deploy("green")
    service = space.service("colour", selector={"app": "blue"})
    serves(clients, service.ip, blue)
    change(space, service, selector={"app": "green"})
    serves(clients, service.ip, green)
    change(space, service, selector={"app": "nobody"})
    fails(clients, service.ip, "ECONNREFUSED", protocols=BOTH)


# -- the range of ClusterIPs ---------------------------------------------------------------------


def test_unused_addresses_of_all_service_cidrs_are_refused(
    cluster: Cluster, space: Space, web: dict[str, Pod], on_node: Client
) -> None:
    """On request: this one is an agent of its own."""
    agent = cluster.agent("node-c")
    agent.start("--refuse-unused-cluster-ips")
    client = cluster.client("node-c")
    for unused in ("10.96.0.200", "fd00:96::ee"):
        fails(client, unused, "ECONNREFUSED", protocols=BOTH)
        fails(on_node, unused, UNTRANSLATED)
    fails(client, "10.97.0.9", UNTRANSLATED)
    extra = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "extra"},
        "spec": {"cidrs": ["10.97.0.0/24"]},
    }
    cluster.api.apply(extra)
    try:
        fails(client, "10.97.0.9", "ECONNREFUSED", protocols=BOTH)

        def made() -> bool:
            ready = cluster.api.get("ServiceCIDR", "extra", "networking.k8s.io/v1")
            return bool(ready.get("status", {}).get("conditions"))

        until(made, "a ServiceCIDR that is ready")
        service = of_web(space, "extra", clusterIP="10.97.0.9", ipFamilyPolicy="SingleStack")
        serves([client, on_node], service.ip, web.values())
        space.delete("Service", "extra")
        fails(client, "10.97.0.9", "ECONNREFUSED")
    finally:
        cluster.api.delete("ServiceCIDR", "extra", "networking.k8s.io/v1")
        # Its controller would let it go after ten seconds.
        done = {"metadata": {"finalizers": None}}
        cluster.api.patch("ServiceCIDR", "extra", done, "networking.k8s.io/v1")
    fails(client, "10.97.0.9", UNTRANSLATED)
    agent.close()
