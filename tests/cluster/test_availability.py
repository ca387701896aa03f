"""High availability: whatever of the control plane is away, and the agent too, Services answer.

Clients connect without end, each time anew, by TCP and UDP, on the node and in a pod of it. As long
as a Service's endpoints stay, none of their connects may fail.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.cluster.accounts import Account
from tests.cluster.api import Object
from tests.cluster.clients import Client, Loop
from tests.cluster.cluster import Cluster
from tests.cluster.faultproxy import FaultProxy, hold
from tests.cluster.network import PLANE, inside, ip
from tests.cluster.nodes import Agent
from tests.cluster.plane import CLUSTER_IPS, COMPONENTS, SERVER, ControlPlane
from tests.cluster.pods import Pod
from tests.cluster.space import Service, Space
from tests.cluster.waiting import tail, wait_for
from tests.support.kernel import until

pytestmark = pytest.mark.cluster

THROUGH_SERVICE = f"https://{CLUSTER_IPS[0]}:443"
OTHER = "192.0.2.2"  # another address of the plane


class World:
    """An agent on node-a with a Service `web` that stays, and others that change."""

    def __init__(
        self, cluster: Cluster, space: Space, agent: Agent, proxy: FaultProxy | None = None
    ) -> None:
        self.cluster, self.plane, self.space = cluster, cluster.plane, space
        self.agent, self.proxy = agent, proxy
        self.loops: list[Loop] = []

    def start(self) -> None:
        self.pods: list[Pod] = self.space.deploy("web", 2, node="node-b")
        inner = self.space.deploy("inside", node="node-a")[0]
        self.web = self.space.service("web")
        self.space.wait_endpoints("web", self.pods)
        self.moving = self.space.service("moving", selector=None, ipFamilyPolicy="SingleStack")
        self.move(0)
        self.agent.start()
        self.client: Client = self.cluster.client("node-a")
        for client in (self.cluster.client("node-a"), self.cluster.client(inner)):
            for address, protocol in zip(self.web.ips, ("tcp", "udp"), strict=True):
                self.wait(partial(served, client, address, protocol), f"{address} {protocol}")
                self.loops.append(client.loop(address, 80, protocol, threads=1, pause=0.01))

    # -- changes -------------------------------------------------------------------------------

    def move(self, to: int) -> None:
        """The one endpoint of `moving` becomes this pod."""
        self.space.apply(piece("moving", self.pods[to].ip))

    def extra(self, name: str, to: int) -> Service:
        made = self.space.service(name, selector=None, ipFamilyPolicy="SingleStack")
        self.space.apply(piece(name, self.pods[to].ip))
        return made

    # -- looking -------------------------------------------------------------------------------

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 120) -> None:
        wait_for(condition, what, seconds, logs=partial(tail, self.agent.log, 30))

    def serves(self, service: Service, pod: Pod) -> bool:
        return self.client.connect(service.ip, 80).pod == pod.name

    def held(self) -> str:
        """What the maps say of each Service."""
        return self.agent.cli("get", "services", "-o", "wide").stdout

    def lost(self, service: Service) -> bool:
        return self.client.connect(service.ip, 80, timeout=0.3).error != ""

    def in_step(self) -> None:
        self.wait(lambda: self.agent.cli("verify").returncode == 0, "maps as the objects say")

    def unharmed(self) -> None:
        """No connect failed so far, and each loop goes on."""
        before = [loop.so_far().pods.total() for loop in self.loops]
        for loop, number in zip(self.loops, before, strict=True):
            until(partial(further, loop, number), "more connects")
            assert not loop.so_far().errors


def further(loop: Loop, than: int) -> bool:
    return loop.so_far().pods.total() > than + 5


def served(client: Client, address: str, protocol: str) -> bool:
    return not client.connect(address, 80, protocol, timeout=1).error


def piece(service: str, address: str) -> Object:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": service, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "tcp", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": [address]}],
    }


@pytest.fixture
def proxy(plane: ControlPlane) -> Iterator[FaultProxy]:
    """Between the agent and the API server, to cut it off."""
    with FaultProxy(plane) as made:
        yield made


@pytest.fixture
def world(cluster: Cluster, space: Space, proxy: FaultProxy, tmp_path: Path) -> Iterator[World]:
    account = Account(cluster.plane, space, tmp_path / "account")
    made = World(cluster, space, cluster.agent("node-a", account.kubeconfig(proxy.url)), proxy)
    made.start()
    yield made
    made.in_step()
    made.unharmed()
    assert "Traceback" not in made.agent.log.read_text()


# -- parts that come and go ----------------------------------------------------------------------


def test_nobody_notices_the_control_plane_or_the_agent_come_and_go(world: World) -> None:
    plane, agent = world.plane, world.agent
    server, controllers = "kube-apiserver", "kube-controller-manager"

    def crash(*names: str, with_agent: bool = False) -> None:
        plane.kill(*names)
        if with_agent:
            agent.kill()
        world.unharmed()
        plane.start(*names)
        if with_agent:
            agent.start()

    def restart_agent() -> None:
        agent.stop()
        agent.start()

    steps: list[Callable[[], None]] = [
        partial(plane.restart, server),
        partial(crash, "etcd"),
        partial(crash, server, controllers),
        restart_agent,
        partial(crash, *COMPONENTS, with_agent=True),
    ]
    for number, step in enumerate(steps):
        step()
        pod = world.pods[number % 2]
        world.move(number % 2)
        world.wait(partial(world.serves, world.moving, pod), f"change {number}")
        world.unharmed()


def killed(world: World) -> Callable[[], None]:
    world.agent.kill()
    return world.agent.start


def stopped(world: World) -> Callable[[], None]:
    world.agent.stop()
    return world.agent.start


def cut_off(world: World) -> Callable[[], None]:
    assert world.proxy
    world.proxy.refuse()
    return world.proxy.listen


@pytest.mark.parametrize(
    ("away", "compacted"), [(killed, False), (stopped, True), (cut_off, False), (cut_off, True)]
)
def test_what_was_missed_is_in_force_afterwards(
    world: World, away: Callable[[World], Callable[[], None]], compacted: bool
) -> None:
    """With history compacted away, watches end by 410, and lists take their place."""
    goes = world.extra("goes", 0)
    again = world.extra("again", 0)
    world.wait(lambda: world.serves(again, world.pods[0]), "the Services")
    back = away(world)
    comes = world.extra("comes", 1)
    world.move(1)
    world.space.delete("Service", "goes")
    world.space.delete("Service", "again")
    world.space.delete("EndpointSlice", "again", "discovery.k8s.io/v1")
    again = world.space.service(
        "again", selector=None, ipFamilyPolicy="SingleStack", clusterIP=again.ip
    )
    world.space.apply(piece("again", world.pods[1].ip))
    if compacted:
        world.plane.compact()
        world.plane.restart("kube-apiserver")
    back()
    for service in (comes, world.moving, again):
        world.wait(partial(world.serves, service, world.pods[1]), service.name)
    world.wait(lambda: world.lost(goes), "the end of a Service")
    if compacted and away is cut_off:
        assert "too old resource version" in world.agent.log.read_text()


def test_an_agent_killed_amid_a_storm_of_changes_leaves_whole_maps(world: World) -> None:
    over = threading.Event()
    services = [world.extra(f"storm-{i}", 0) for i in range(4)]

    def storm() -> None:
        number = 0
        while not over.wait(0.005):
            number += 1
            world.space.apply(piece(f"storm-{number % 4}", world.pods[number % 2].ip))
            if number % 10 == 0:
                world.extra("brief", 0)
            if number % 10 == 5:
                world.space.delete("Service", "brief")

    thread = threading.Thread(target=storm)
    thread.start()
    seen: set[str] = set()
    try:
        for _ in range(4):
            world.wait(lambda: world.agent.status()["sync"]["syncs"] > 3, "some syncs")
            world.agent.kill()
            # Nobody follows the storm now, and each Service still has one of its two endpoints.
            seen |= {world.client.connect(service.ip, 80).pod for service in services}
            world.agent.start()
    finally:
        over.set()
        thread.join()
    assert seen <= {pod.name for pod in world.pods}
    for service in services:
        world.space.apply(piece(service.name, world.pods[1].ip))
    for service in services:
        world.wait(partial(world.serves, service, world.pods[1]), service.name)


# -- a start without an API server ---------------------------------------------------------------


def ask(agent: Agent, port: int, path: str) -> tuple[int, str]:
    with inside(agent.node.site.namespace), contextlib.suppress(OSError):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
    return 0, ""


def test_a_start_without_an_api_server_serves_what_is_pinned_and_says_so(world: World) -> None:
    world.plane.stop("kube-apiserver", "etcd")
    world.agent.kill()
    world.agent.start(wait=False)
    assert world.agent.process
    pid = world.agent.process.pid
    world.wait(world.agent.complaint, "an error in status")
    world.wait(lambda: ask(world.agent, 10256, "/livez")[0] == 200, "a live agent")
    world.wait(lambda: ask(world.agent, 10249, "/metrics")[0] == 200, "metrics")
    source = world.agent.status()["source"]
    assert (source["listed"], source["reachable"]) == (False, False)
    shown = world.agent.cli("status")
    assert shown.returncode == 1
    assert "away since" in shown.stdout
    assert ask(world.agent, 10256, "/readyz")[0] == 503
    assert "not all lists are in" in ask(world.agent, 10256, "/readyz")[1]
    assert "pointsman_api_server_reachable 0.0" in ask(world.agent, 10249, "/metrics")[1]
    assert world.serves(world.moving, world.pods[0])

    world.plane.start("etcd", "kube-apiserver")
    world.move(1)
    world.wait(lambda: world.serves(world.moving, world.pods[1]), "a change in force")
    world.wait(lambda: ask(world.agent, 10256, "/readyz") == (200, "ok"), "readiness")
    world.wait(lambda: world.agent.status()["source"]["reachable"], "a status that is well")
    assert world.agent.process.pid == pid and world.agent.process.poll() is None


@pytest.mark.parametrize("late", ["services", "endpointslices", "nodes"])
def test_nothing_is_written_before_all_lists_are_in(
    world: World, proxy: FaultProxy, late: str
) -> None:
    gone = world.extra("gone", 0)
    world.wait(lambda: world.serves(gone, world.pods[0]), "a Service")
    world.agent.kill()
    world.move(1)
    world.space.delete("Service", "gone")
    before, maps = proxy.count("watch"), world.agent.cli("map", "dump", "frontends").stdout
    release = threading.Event()
    with proxy.fault(hold(release), "list", {late}) as rule:
        try:
            world.agent.start(wait=False)
            world.wait(lambda: rule.hits[late], "the list to be asked for")
            # The others have their lists, and follow.
            world.wait(lambda: len(proxy.count("watch") - before) == 5, "all other watches")
            assert world.agent.cli("map", "dump", "frontends").stdout == maps
            assert world.serves(world.moving, world.pods[0])
            assert world.serves(gone, world.pods[0])
            assert not world.agent.status()["source"]["listed"]
        finally:
            release.set()
    world.wait(lambda: world.lost(gone), "the end of a Service")
    world.wait(lambda: world.serves(world.moving, world.pods[1]), "a change in force")


# -- the branch that one sits on -----------------------------------------------------------------

# A pod's /run, with the files of its account. The rest of the machine does not see it.
_POD = """
set -e
mount --rbind /run /mnt
mount -t tmpfs none /run
mkdir -p /run/pointsman-lab /run/secrets/kubernetes.io/serviceaccount
mount --bind /mnt/pointsman-lab /run/pointsman-lab
mount --bind "$1" /run/secrets/kubernetes.io/serviceaccount
shift
exec "$@"
"""


@pytest.fixture
def perched(
    cluster: Cluster, space: Space, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[World]:
    """An agent whose API server is the ClusterIP that it translates itself; not started."""
    plane = cluster.plane
    agent = cluster.agent("node-a", plane.kubeconfig("never", token="used"))
    account = Account(plane, space, cluster.lab.directory / f"account-{space.namespace}")
    if getattr(request, "param", "pod") == "kubeconfig":
        agent.kubeconfig = account.kubeconfig(THROUGH_SERVICE)
    else:
        agent.kubeconfig = None
        service = (f"KUBERNETES_SERVICE_HOST={CLUSTER_IPS[0]}", "KUBERNETES_SERVICE_PORT=443")
        enter = ("unshare", "--mount", "--propagation", "private", "sh", "-c", _POD, "sh")
        agent.before = ("env", *service, *enter, account.directory)
    # Nobody translates it yet: a refusal at once is as good as none in some seconds.
    network = agent.node.site.namespace
    ip(network, f"route add unreachable {CLUSTER_IPS[0]}/32")
    made = World(cluster, space, agent)
    yield made
    ip(network, f"route del {CLUSTER_IPS[0]}/32")
    plane.more.clear()


def followed(world: World) -> None:
    """Until the agent follows, which a change shows."""
    name = f"seen-{world.space.service('seen').thing['metadata']['resourceVersion']}"
    world.space.service(name, selector=None)

    def there() -> bool:
        return name in world.held()

    world.wait(there, "an agent that follows")


def branch(world: World) -> str:
    return world.agent.cli("describe", "service", "default/kubernetes").stdout


@pytest.mark.parametrize("perched", ["kubeconfig", "pod"], indirect=True)
def test_a_first_start_that_can_not_reach_the_service_names_the_mend(
    perched: World, cluster: Cluster
) -> None:
    """And needs no other start once somebody translates."""
    perched.agent.start(wait=False)
    perched.wait(perched.agent.complaint, "an error")
    assert "--api-server" in perched.agent.status()["source"]["error"]
    assert "--api-server" in perched.agent.log.read_text()
    proxy = cluster.proxy("node-a")
    ip(perched.agent.node.site.namespace, f"route replace {CLUSTER_IPS[0]}/32 via {PLANE.v4}")
    proxy.start()
    perched.wait(perched.agent.attached, "an attached agent")
    followed(perched)


def test_after_a_reboot_the_way_is_remembered(perched: World) -> None:
    perched.agent.start("--api-server", SERVER)
    perched.agent.stop()
    assert perched.agent.cli("unload").returncode == 0
    perched.agent.start()
    followed(perched)
    perched.wait(lambda: perched.agent.status()["source"]["reachable"], "a status that is well")


@pytest.mark.parametrize("restarted", [False, True], ids=["", "restarted"])
def test_endpoints_of_the_api_server_that_vanish_are_survived(
    perched: World, restarted: bool
) -> None:
    perched.agent.start("--api-server", SERVER)
    perched.agent.stop()
    perched.agent.start()
    followed(perched)
    assert f"{PLANE.v4}:6443" in branch(perched)

    def emptied() -> bool:
        """Again and again: the API server puts itself back every ten seconds."""
        perched.plane.admin.delete("EndpointSlice", "kubernetes", "discovery.k8s.io/v1")
        return f"{PLANE.v4}:6443" not in branch(perched)

    perched.wait(emptied, "no endpoints")
    perched.plane.kill("kube-apiserver")
    if restarted:
        perched.agent.kill()
        perched.agent.start(wait=False)
    perched.plane.start("kube-apiserver")
    perched.wait(perched.agent.attached, "an attached agent")
    followed(perched)
    perched.wait(lambda: f"{PLANE.v4}:6443" in branch(perched), "endpoints")


@pytest.mark.parametrize("restarted", [False, True], ids=["", "restarted"])
def test_an_api_server_that_moves_is_followed(perched: World, restarted: bool) -> None:
    node, plane = perched.agent.node, perched.plane
    perched.agent.start("--api-server", SERVER)
    perched.agent.stop()
    perched.agent.start()
    ip(plane.network, f"addr add {OTHER}/24 dev nodes")
    try:
        plane.more["kube-apiserver"] = {"advertise-address": OTHER}
        plane.restart("kube-apiserver")
        perched.wait(lambda: f"{OTHER}:6443" in branch(perched), "the new address")
        perched.wait(lambda: f"{PLANE.v4}:6443" not in branch(perched), "no old address")
        ip(node.site.namespace, f"route add unreachable {PLANE.v4}/32")
        try:
            plane.kill("kube-apiserver")
            if restarted:
                perched.agent.kill()
                perched.agent.start(wait=False)
            plane.start("kube-apiserver")
            perched.wait(perched.agent.attached, "an attached agent")
            followed(perched)
        finally:
            ip(node.site.namespace, f"route del unreachable {PLANE.v4}/32")
    finally:
        plane.more.clear()
        plane.restart("kube-apiserver")
        ip(plane.network, f"addr del {OTHER}/24 dev nodes")
