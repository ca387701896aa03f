"""Every Service behaviour as an operator has it: `pointsman up`, manifests that change while it
runs, and programs that connect and send meanwhile."""

from __future__ import annotations

import errno
import json
import os
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pointsman import portranges
from pointsman.maps import View
from pointsman.pins import Pins
from pointsman.values import to_address
from tests.support.agents import (
    AgentProcess,
    manifest,
    node_of,
    pod_of,
    service_of,
    slice_of,
)
from tests.support.kernel import Cgroup, child, run, tcp_server, until
from tests.support.pods import Pod

pytestmark = pytest.mark.kernel

NODE_IP, NODE_IP6, OTHER_NODE = "192.0.2.1", "2001:db8::1", "192.0.2.2"
ONE, TWO, THREE = "10.244.0.1", "10.244.0.2", "10.244.0.3"
ONE6, TWO6 = "fd00:244::1", "fd00:244::2"
KINDS = ("tcp", "udp", "unconnected udp")
PORT = 80
REFUSED, DROPPED, NO_SERVICE = "ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH"


def vips(number: int) -> tuple[str, str]:
    """The ClusterIPs of the test that has this number."""
    return f"10.96.1.{number}", f"fd00:96::1:{number}"


# -- who answers, and as whom ----------------------------------------------------------------------


class Answer(NamedTuple):
    """The address of the endpoint that was reached, and the peer that the client saw."""

    endpoint: str
    peer: tuple[str, int]


class Everywhere:
    """A server at every local address of the namespace that it was made in, TCP and UDP at one
    port: it answers with the address that was dialled."""

    def __init__(self, port: int = 0) -> None:
        self._stream = socket.create_server(
            ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512
        )
        self.port: int = self._stream.getsockname()[1]
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO
        self._udp.bind(("0.0.0.0", self.port))
        self._udp6 = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        self._udp6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        self._udp6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        self._udp6.bind(("::", self.port))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            for each in (self._stream, self._udp, self._udp6):
                each.setblocking(False)
                selector.register(each, selectors.EVENT_READ)
            while not self._stopped.is_set():
                for key, _ in selector.select(0.05):
                    with suppress(OSError):
                        self._answer(key.fileobj)

    def _answer(self, server: Any) -> None:
        if server is self._stream:
            accepted, _ = server.accept()
            with accepted:
                accepted.send(accepted.getsockname()[0].removeprefix("::ffff:").encode())
            return
        _, ancillary, _, source = server.recvmsg(64, 128)
        level, kind, data = ancillary[0]
        if server is self._udp:
            text = socket.inet_ntop(socket.AF_INET, data[8:12])
        else:
            text = socket.inet_ntop(socket.AF_INET6, data[:16])
        # With its IP_PKTINFO the answer leaves from the address that was asked.
        server.sendmsg([text.encode()], [(level, kind, data)], 0, source)

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        for each in (self._stream, self._udp, self._udp6):
            each.close()


def ask(host: str, port: int = PORT, kind: str = "tcp") -> Answer | str:
    """What a new socket of this thread's namespace gets there: an answer, or an errno's name."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(
        family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM
    ) as client:
        client.settimeout(5)
        try:
            if kind == "unconnected udp":
                client.sendto(b"?", (host, port))
            else:
                client.connect((host, port))
                if kind == "udp":
                    client.send(b"?")
            data, source = client.recvfrom(64)
            if kind != "unconnected udp":
                peer = client.getpeername()
                assert kind == "tcp" or source[:2] == peer[:2]
                source = peer
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
        return Answer(data.decode(), (source[0], source[1]))


def everything(four: str, six: str, port: int = PORT) -> dict[str, Answer | str]:
    """That of IPv4, IPv6 and IPv4-mapped with every kind of socket."""
    hosts = {"IPv4": four, "IPv6": six, "IPv4-mapped": f"::ffff:{four}"}
    return {
        f"{name} {kind}": ask(host, port, kind) for name, host in hosts.items() for kind in KINDS
    }


def expected(
    four: str, six: str, by_four: str, by_six: str, port: int = PORT
) -> dict[str, Answer | str]:
    """What `everything` gives if these endpoints answer, or these are the errors."""

    def one(endpoint: str, host: str) -> Answer | str:
        return endpoint if endpoint.startswith("E") else Answer(endpoint, (host, port))

    hosts = {
        "IPv4": (by_four, four),
        "IPv6": (by_six, six),
        "IPv4-mapped": (by_four, f"::ffff:{four}"),
    }
    return {f"{name} {kind}": one(*where) for name, where in hosts.items() for kind in KINDS}


def become(four: str, six: str, by_four: str, by_six: str, what: str, port: int = PORT) -> None:
    """Waits until every kind of socket gets this, and only this."""
    want = expected(four, six, by_four, by_six, port)
    with suppress(AssertionError):
        until(lambda: everything(four, six, port) == want, what)
    assert everything(four, six, port) == want, what


def reached(host: str, port: int = PORT, kind: str = "tcp", times: int = 24) -> set[str]:
    """The endpoints, or errors, of that many new sockets."""
    answers = {ask(host, port, kind) for _ in range(times)}
    return {a if isinstance(a, str) else a.endpoint for a in answers}


def reaches(host: str, *endpoints: str, port: int = PORT) -> None:
    """Waits until new connections get these endpoints, each of them and no other."""
    until(lambda: reached(host, port) == set(endpoints), f"{host} leads to {endpoints}")


# -- the node --------------------------------------------------------------------------------------


class Home(AgentProcess):
    """A node whose agent is started again only when a test wants other options."""

    def __init__(self, directory: Path, cgroup: Path, name: str, servers: Everywhere) -> None:
        super().__init__(directory, cgroup, name)
        self.servers = servers
        self._options: tuple[str, ...] | None = None

    def use(self, *options: str) -> None:
        if options == self._options:
            return
        if self._options is not None:
            self.stop()
        self._options = options
        cidrs = ("--service-cidr", "10.96.0.0/16", "--service-cidr", "fd00:96::/112")
        self.start("--node-name", "here", *cidrs, *options)

    def members(
        self, service: str, *found: tuple[str, dict[str, Any]], family: str = "IPv4", name: str = ""
    ) -> None:
        """Replaces one EndpointSlice of a Service."""
        name = name or f"{service}-{family.lower()}"
        text = slice_of(service, found, self.servers.port, name=name, family=family)
        self.write(f"{name}.yaml", text)

    def here(self, *, zone: str = "") -> None:
        """The Node object of this node."""
        self.write("node-here.yaml", node_of("here", NODE_IP, NODE_IP6, zone=zone))

    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.cli("status", "-o", "json", check=False).stdout)
        return found


@pytest.fixture(scope="module")
def home(kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    cgroup = Cgroup(f"pm_services_{os.getpid()}")
    cgroup.enter()
    servers = Everywhere()
    found = Home(tmp_path_factory.mktemp("services"), cgroup.path, cgroup.path.name, servers)
    with device_address(NODE_IP), device_address(NODE_IP6):
        try:
            found.here(zone="east")
            found.write("node-there.yaml", node_of("there", OTHER_NODE, zone="west"))
            yield found
        finally:
            found.close()
            servers.close()
            cgroup.close()


@pytest.fixture
def node(home: Home) -> Home:
    """With the options that are the defaults."""
    home.use()
    return home


@contextmanager
def device_address(address: str) -> Iterator[None]:
    length = "128" if ":" in address else "32"
    more = ["nodad"] if ":" in address else []
    run("ip", "addr", "add", f"{address}/{length}", "dev", "lo", *more)
    try:
        yield
    finally:
        run("ip", "addr", "del", f"{address}/{length}", "dev", "lo")


# -- which Services --------------------------------------------------------------------------------


def test_every_kind_of_socket_reaches_an_endpoint_and_sees_the_cluster_ip(node: Home) -> None:
    four, six = vips(1)
    node.write("plain.yaml", service_of("plain", (four, six), PORT))
    node.members("plain", (ONE, {}))
    node.members("plain", (ONE6, {}), family="IPv6")
    become(four, six, ONE, ONE6, "the Service")


@pytest.mark.parametrize(
    ("number", "label"),
    [
        pytest.param(2, "service.kubernetes.io/service-proxy-name", id="service-proxy-name"),
        pytest.param(3, "service.kubernetes.io/headless", id="headless"),
    ],
)
def test_a_label_takes_a_service_away_and_brings_it_back(
    node: Home, number: int, label: str
) -> None:
    four, six = vips(number)
    name = f"label-{number}"
    with_label = service_of(name, (four, six), PORT, labels={label: "anything"})
    without = service_of(name, (four, six), PORT)
    node.members(name, (ONE, {}))
    node.members(name, (ONE6, {}), family="IPv6")
    for _ in range(2):
        node.write(f"{name}.yaml", without)
        become(four, six, ONE, ONE6, "the Service")
        node.write(f"{name}.yaml", with_label)
        become(four, six, NO_SERVICE, NO_SERVICE, "the end of the Service")


def test_a_service_becomes_an_external_name_and_a_cluster_ip_again(node: Home) -> None:
    """A clusterIP that is left over from before means nothing."""
    four, six = vips(4)
    node.members("named", (ONE, {}))
    node.members("named", (ONE6, {}), family="IPv6")
    node.write("named.yaml", service_of("named", (four, six), PORT))
    become(four, six, ONE, ONE6, "the Service")
    external = {"type": "ExternalName", "externalName": "example.com"}
    node.write("named.yaml", manifest("Service", "named", spec=external))
    become(four, six, NO_SERVICE, NO_SERVICE, "the ExternalName")
    node.write("named.yaml", service_of("named", (four, six), PORT))
    become(four, six, ONE, ONE6, "the Service")


def test_a_family_without_endpoints_is_refused_on_its_own(node: Home) -> None:
    four, six = vips(5)
    node.write("half.yaml", service_of("half", (four, six), PORT))
    node.members("half", (ONE, {}))
    become(four, six, ONE, REFUSED, "IPv4 alone")
    node.members("half", (ONE6, {}), family="IPv6")
    become(four, six, ONE, ONE6, "both")
    node.remove("half-ipv4.yaml")
    become(four, six, REFUSED, ONE6, "IPv6 alone")


# -- which endpoints -------------------------------------------------------------------------------


def endpoint_id(node: AgentProcess, address: str, vip: str) -> int:
    """The id of an endpoint of the TCP set of a VIP."""
    generation = Pins(node.root).current
    assert generation
    view = View(generation.maps)
    try:
        for element in view.snapshot().services.values():
            if element.frontend.address == to_address(vip) and element.frontend.protocol == 6:
                for slot in view.slots(element.first, element.count):
                    if slot.backend[0] == to_address(address):
                        return slot.endpoint
    finally:
        view.close()
    raise LookupError(address)


def test_an_endpoint_that_moves_between_slices_never_flaps(node: Home) -> None:
    four, _ = vips(6)
    node.write("moving.yaml", service_of("moving", (four,), PORT))
    node.members("moving", (ONE, {}), name="moving-a")
    reaches(four, ONE)
    ident = endpoint_id(node, ONE, four)
    marker = vips(7)[0]
    node.write("marker.yaml", service_of("marker", (marker,), PORT))
    failures: list[object] = []
    done, stop = 0, threading.Event()

    def dial() -> None:
        nonlocal done
        while not stop.is_set():
            if (got := ask(four)) != Answer(ONE, (four, PORT)):
                failures.append(got)
            done += 1

    def in_force(endpoint: str) -> None:
        """Changes are taken in order: when this one is in force, those before it are."""
        node.members("marker", (endpoint, {}))
        until(lambda: ask(marker) == Answer(endpoint, (marker, PORT)), "the change")

    thread = threading.Thread(target=dial)
    thread.start()
    try:
        for turn in range(8):
            old, new = ("moving-a", "moving-b") if turn % 2 == 0 else ("moving-b", "moving-a")
            node.members("moving", (ONE, {}), name=new)
            in_force(TWO)
            assert endpoint_id(node, ONE, four) == ident
            node.remove(f"{old}.yaml")
            in_force(THREE)
            assert endpoint_id(node, ONE, four) == ident
        until(lambda: done > 100, "enough connects to tell")
    finally:
        stop.set()
        thread.join()
    assert not failures, failures[:5]


def test_terminating_endpoints_serve_while_no_other_does(node: Home) -> None:
    four, _ = vips(8)
    leaving = {"conditions": {"ready": False, "serving": True, "terminating": True}}
    gone = {"conditions": {"ready": False, "serving": False, "terminating": True}}
    node.write("leaving.yaml", service_of("leaving", (four,), PORT))
    node.members("leaving", (ONE, {}), (TWO, leaving))
    reaches(four, ONE)
    node.members("leaving", (ONE, leaving), (TWO, leaving))
    reaches(four, ONE, TWO)
    node.members("leaving", (ONE, gone), (TWO, leaving))
    reaches(four, TWO)
    node.members("leaving", (ONE, gone), (TWO, gone))
    reaches(four, REFUSED)
    node.members("leaving", (ONE, gone), (TWO, gone), (THREE, {}))
    reaches(four, THREE)


def test_internal_traffic_policy_local_keeps_to_this_node(node: Home) -> None:
    four, six = vips(9)
    text = service_of("local", (four, six), PORT, internalTrafficPolicy="Local")
    here, there = {"nodeName": "here"}, {"nodeName": "there"}
    node.write("local.yaml", text)
    for family, one, two in (("IPv4", ONE, TWO), ("IPv6", ONE6, TWO6)):
        node.members("local", (one, here), (two, there), family=family)
    reaches(four, ONE)
    become(four, six, ONE, ONE6, "this node's endpoints")
    for family, two in (("IPv4", TWO), ("IPv6", TWO6)):
        node.members("local", (two, there), family=family)
    until(lambda: node.told()["noLocalEndpoints"]["internal"] == 1, "the count in status")
    before = node.told()["counters"]["unreachable"]
    become(four, six, DROPPED, DROPPED, "none on this node")
    assert node.told()["counters"]["unreachable"] >= before + 9
    # Without any endpoint anywhere it is a refusal, and nothing that the policy did.
    node.members("local")
    node.members("local", family="IPv6")
    become(four, six, REFUSED, REFUSED, "no endpoints")
    until(lambda: node.told()["noLocalEndpoints"]["internal"] == 0, "the count in status")


# -- topology --------------------------------------------------------------------------------------


def test_hints_follow_the_zone_of_the_node_object(node: Home) -> None:
    four, _ = vips(10)
    node.write("hinted.yaml", service_of("hinted", (four,), PORT))
    node.members(
        "hinted",
        (ONE, {"hints": {"forZones": [{"name": "east"}]}}),
        (TWO, {"hints": {"forZones": [{"name": "west"}]}}),
    )
    node.here(zone="east")
    try:
        reaches(four, ONE)
        node.here(zone="west")
        reaches(four, TWO)
        node.here(zone="")
        reaches(four, ONE, TWO)
        node.here(zone="north")
        reaches(four, ONE, TWO)
    finally:
        node.here(zone="east")
    reaches(four, ONE)
    # One endpoint without a hint, and nobody goes by them.
    node.members("hinted", (ONE, {"hints": {"forZones": [{"name": "east"}]}}), (TWO, {}))
    reaches(four, ONE, TWO)


@pytest.mark.parametrize(
    ("number", "distribution"),
    [(11, "PreferSameZone"), (12, "PreferClose"), (13, "PreferSameNode")],
)
def test_traffic_distribution_goes_by_pods_and_nodes(
    node: Home, number: int, distribution: str
) -> None:
    four, _ = vips(number)
    name = distribution.lower()
    text = service_of(
        name,
        (four,),
        PORT,
        selector={"app": name},
        trafficDistribution=distribution,
        targetPort=node.servers.port,
    )
    near = pod_of(f"{name}-near", ONE, {"nodeName": "here"}, labels={"app": name})
    far = pod_of(f"{name}-far", TWO, {"nodeName": "there"}, labels={"app": name})
    node.write(f"{name}.yaml", text)
    node.write(f"{name}-pods.yaml", f"{near}---\n{far}")
    reaches(four, ONE)
    # None is near any more: those that are there are taken, wherever they are.
    node.write(f"{name}-pods.yaml", far)
    reaches(four, TWO)


def test_trafficdistribution_follows_the_zone_of_another_node(node: Home) -> None:
    four, _ = vips(14)
    text = service_of(
        "spread",
        (four,),
        PORT,
        selector={"app": "spread"},
        trafficDistribution="PreferSameZone",
        targetPort=node.servers.port,
    )
    pods = [
        pod_of(f"spread-{name}", address, {"nodeName": name}, labels={"app": "spread"})
        for name, address in (("here", ONE), ("there", TWO))
    ]
    node.write("spread.yaml", "---\n".join([text, *pods]))
    reaches(four, ONE)
    node.write("node-there.yaml", node_of("there", OTHER_NODE, zone="east"))
    try:
        reaches(four, ONE, TWO)
    finally:
        node.write("node-there.yaml", node_of("there", OTHER_NODE, zone="west"))
    reaches(four, ONE)


# -- session affinity ------------------------------------------------------------------------------


def test_session_affinity_is_switched_on_and_off(node: Home) -> None:
    four, _ = vips(15)
    off = service_of("sticky", (four,), PORT)
    on = service_of("sticky", (four,), PORT, sessionAffinity="ClientIP")
    node.write("sticky.yaml", off)
    node.members("sticky", (ONE, {}), (TWO, {}), (THREE, {}))
    reaches(four, ONE, TWO, THREE)
    node.write("sticky.yaml", on)
    until(lambda: len(reached(four)) == 1, "one endpoint for this client")
    [kept] = reached(four)
    # All kinds of sockets, and all of a port's: UDP is another port of the Service.
    assert reached(four, kind="tcp") == reached(f"::ffff:{four}", kind="tcp") == {kept}
    assert len(reached(four, kind="udp") | reached(four, kind="unconnected udp")) == 1
    node.members("sticky", *((a, {}) for a in (ONE, TWO, THREE) if a != kept))
    until(lambda: kept not in reached(four, times=1), "another one")
    assert len(reached(four)) == 1
    node.write("sticky.yaml", off)
    reaches(four, *({ONE, TWO, THREE} - {kept}))


# -- NodePorts, and what else has an address -------------------------------------------------------


def node_port_service(node: Home, number: int, name: str, **more: Any) -> int:
    """Its NodePort; ONE and ONE6 are its endpoints."""
    port = 30000 + number
    node.write(
        f"{name}.yaml", service_of(name, vips(number), PORT, type="NodePort", nodePort=port, **more)
    )
    node.members(name, (ONE, {}))
    node.members(name, (ONE6, {}), family="IPv6")
    return port


def test_a_node_port_answers_at_the_addresses_of_all_nodes(node: Home) -> None:
    port = node_port_service(node, 16, "ported")
    become(NODE_IP, NODE_IP6, ONE, ONE6, "at this node's addresses", port)
    become("127.0.0.1", "::1", ONE, ONE6, "at localhost", port)
    for kind in KINDS:
        assert ask(OTHER_NODE, port, kind) == Answer(ONE, (OTHER_NODE, port))
        assert ask("192.0.2.3", port, kind) == NO_SERVICE, "of no node"
    # Another Node comes and goes.
    node.write("node-new.yaml", node_of("new", "192.0.2.3"))
    reaches("192.0.2.3", ONE, port=port)
    node.remove("node-new.yaml")
    reaches("192.0.2.3", NO_SERVICE, port=port)


def test_external_traffic_policy_local_short_circuits_here_and_leaves_other_nodes(
    node: Home,
) -> None:
    port = node_port_service(node, 17, "etp", externalTrafficPolicy="Local")
    node.members("etp", (ONE, {"nodeName": "there"}))
    reaches(NODE_IP, ONE, port=port)
    assert reached(OTHER_NODE, port) == {NO_SERVICE}


def test_an_address_that_comes_and_goes_is_followed(node: Home) -> None:
    port = node_port_service(node, 18, "followed")
    reaches(NODE_IP, ONE, port=port)
    for address, endpoint in (("198.51.100.7", ONE), ("2001:db8::7", ONE6)):
        assert ask(address, port) == NO_SERVICE
        with device_address(address):
            reaches(address, endpoint, port=port)
        reaches(address, NO_SERVICE, port=port)


def test_the_load_balancers_address_is_translated_only_in_mode_vip(node: Home) -> None:
    address = "203.0.113.19"

    def text(mode: str | None) -> str:
        ingress = {"ip": address, **({"ipMode": mode} if mode else {})}
        status = {"loadBalancer": {"ingress": [ingress]}}
        return service_of("lb", vips(19), PORT, type="LoadBalancer", status=status)

    node.members("lb", (ONE, {}))
    for mode, result in ((None, ONE), ("Proxy", NO_SERVICE), ("VIP", ONE), ("Proxy", NO_SERVICE)):
        node.write("lb.yaml", text(mode))
        reaches(address, result)
    assert ask(vips(19)[0]) == Answer(ONE, (vips(19)[0], PORT))


def test_a_host_port_leads_to_its_pod(node: Home) -> None:
    ports = [
        {"containerPort": node.servers.port, "hostPort": 8020, "protocol": p}
        for p in ("TCP", "UDP")
    ]
    spec = {"containers": [{"name": "c", "ports": ports}]}
    assert ask(NODE_IP, 8020) == REFUSED, "nobody listens"
    node.write("host-port.yaml", pod_of("host-port", TWO, spec))
    reaches(NODE_IP, TWO, port=8020)
    for kind in KINDS:
        assert ask(NODE_IP, 8020, kind) == Answer(TWO, (NODE_IP, 8020))
        assert ask("127.0.0.1", 8020, kind) == Answer(TWO, ("127.0.0.1", 8020))
    assert ask(OTHER_NODE, 8020) == NO_SERVICE, "only that node knows its pods"
    node.remove("host-port.yaml")
    reaches(NODE_IP, REFUSED, port=8020)


# -- pods that want to be left alone ---------------------------------------------------------------


@contextmanager
def pod_with(address: str, port: int) -> Iterator[Pod]:
    """A pod that has this address, and in which every endpoint answers."""
    with inhabited_pod() as pod:
        pod.run(run, "ip", "addr", "add", f"{address}/32", "dev", "lo")
        servers = pod.run(Everywhere, port)
        try:
            yield pod
        finally:
            servers.close()


@contextmanager
def inhabited_pod() -> Iterator[Pod]:
    """With a process in it, as any pod has one: by that its namespace is found."""
    with Pod() as pod:
        inhabitant = pod.run(child, "import sys; sys.stdin.read()")
        try:
            yield pod
        finally:
            inhabitant.communicate()


OUT, IN = {"pointsman.io/socket-lb": "disabled"}, {"pointsman.io/socket-lb": "enabled"}


@pytest.mark.parametrize("by", ["pod", "namespace"])
def test_an_opted_out_pod_sees_services_as_they_are(node: Home, by: str) -> None:
    four, _ = vips(21)
    address = {"pod": "10.244.77.1", "namespace": "10.244.77.2"}[by]
    node.write("meshless.yaml", service_of("meshless", (four,), PORT))
    node.members("meshless", (ONE, {}))
    name, namespace = f"box-{by}", f"mesh-{by}"

    def annotate(annotations: dict[str, str]) -> None:
        if by == "namespace":
            text = manifest("Namespace", namespace, annotations=annotations)
            node.write(f"{namespace}.yaml", text)
        of_pod = annotations if by == "pod" else {}
        node.write(f"{name}.yaml", pod_of(name, address, namespace=namespace, annotations=of_pod))

    with pod_with(address, node.servers.port) as pod:
        annotate({})
        served = Answer(ONE, (four, PORT))
        until(lambda: pod.run(ask, four) == served, "the Service, for the pod")
        annotate(OUT)
        until(lambda: pod.run(ask, four) == NO_SERVICE, "the pod, left alone")
        for kind in KINDS:
            assert pod.run(ask, four, PORT, kind) == NO_SERVICE
            assert ask(four, PORT, kind) == served, "all others go on"
        all_found = {"pods": 1, "namespaces": 1, "waiting": 0}
        until(lambda: node.told()["optedOut"] == all_found, "the count in status")
        annotate(IN)
        until(lambda: pod.run(ask, four) == served, "the Service again")
    node.remove(f"{name}.yaml")


# -- what endpoints leave behind -------------------------------------------------------------------


def udp_client(host: str, port: int = PORT) -> socket.socket:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(20)
    client.connect((host, port))
    return client


def error_of(client: socket.socket) -> int:
    return client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def test_udp_sockets_end_with_their_endpoint_and_status_counts_them(node: Home) -> None:
    four, _ = vips(22)
    node.write("ending.yaml", service_of("ending", (four,), PORT))
    node.members("ending", (ONE, {}))
    reaches(four, ONE)
    before = node.told()["stale"]["destroyed"]
    with (
        inhabited_pod() as pod,
        udp_client(four) as doomed,
        pod.run(udp_client, four) as doomed_in_a_pod,
        udp_client(ONE, node.servers.port) as direct,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unconnected,
    ):
        unconnected.settimeout(5)
        unconnected.sendto(b"?", (four, PORT))
        assert unconnected.recv(64) == ONE.encode()
        # Terminating it may keep what it has.
        node.members(
            "ending",
            (ONE, {"conditions": {"ready": False, "serving": True, "terminating": True}}),
            (TWO, {}),
        )
        reaches(four, TWO)
        assert error_of(doomed) == 0
        node.members("ending", (TWO, {}))
        for client in (doomed, doomed_in_a_pod):
            with pytest.raises(ConnectionAbortedError):
                client.recv(64)
        assert error_of(direct) == 0
        direct.send(b"?")
        assert direct.recv(64) == ONE.encode()
        unconnected.sendto(b"?", (four, PORT))
        assert unconnected.recv(64) == TWO.encode(), "the next send goes elsewhere"
    until(lambda: node.told()["stale"]["destroyed"] == before + 2, "the count in status")


@contextmanager
def held_connection(
    node: Home, vip: str, name: str
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection through a Service whose endpoint then goes: client, server."""
    with tcp_server(THREE) as (server, port), socket.socket() as client:
        node.write(f"{name}.yaml", service_of(name, (vip,), PORT))
        node.write(f"{name}-slice.yaml", slice_of(name, [(THREE, {})], port, name=f"{name}-slice"))
        until(lambda: client.connect_ex((vip, PORT)) in (0, errno.EISCONN), "the connection")
        client.settimeout(20)
        accepted, _ = server.accept()
        server.close()
        with accepted:
            node.members(name, (ONE, {}), name=f"{name}-slice")
            reaches(vip, ONE)
            yield client, accepted


def test_tcp_connections_outlive_their_endpoint(node: Home) -> None:
    with held_connection(node, vips(23)[0], "outliving") as (client, server):
        checks = node.told()["stale"]["checks"]
        with udp_client(vips(22)[0]):
            node.members("ending", (THREE, {}))
            until(lambda: node.told()["stale"]["checks"] > checks, "a look at what is stale")
        client.send(b"on")
        assert server.recv(9) == b"on"


# -- other options ---------------------------------------------------------------------------------


def test_end_stale_tcp_ends_connections_too(home: Home) -> None:
    home.use("--end-stale-tcp")
    with held_connection(home, vips(24)[0], "ended") as (client, server):
        with pytest.raises(ConnectionAbortedError):
            client.recv(9)
        with pytest.raises(ConnectionResetError):
            server.recv(9)


def test_nodeport_addresses_choose_where_node_ports_answer(home: Home) -> None:
    home.use("--nodeport-addresses", "192.0.2.0/24", "--external-ips", "local",
             "--refuse-unused-cluster-ips")  # fmt: skip
    port = node_port_service(home, 25, "chosen")
    with device_address("198.51.100.8"):
        reaches(NODE_IP, ONE, port=port)
        assert reached(OTHER_NODE, port) == {ONE}
        assert reached("198.51.100.8", port) == {REFUSED}, "its own, and nobody listens"
        assert reached("127.0.0.1", port) == {REFUSED}
        # A family that the list says nothing of answers at all its addresses, as in kube-proxy.
        assert reached(NODE_IP6, port) == {ONE6}


EXTERNAL = "203.0.113.26"


@pytest.mark.parametrize(
    ("options", "foreign", "own"),
    [
        pytest.param(
            ("--nodeport-addresses", "192.0.2.0/24", "--external-ips", "local",
             "--refuse-unused-cluster-ips"), NO_SERVICE, ONE, id="local"),
        pytest.param(("--external-ips", "none"), NO_SERVICE, REFUSED, id="none"),
        pytest.param((), ONE, ONE, id="all"),
    ],
)  # fmt: skip
def test_external_ips_are_translated_as_told(
    home: Home, options: tuple[str, ...], foreign: str, own: str
) -> None:
    home.use(*options)
    port = 8026
    ips = [EXTERNAL, NODE_IP]
    home.write("external.yaml", service_of("external", vips(26), port, externalIPs=ips))
    home.members("external", (ONE, {}))
    reaches(vips(26)[0], ONE, port=port)
    assert reached(EXTERNAL, port) == {foreign}
    assert reached(NODE_IP, port) == {own}
    if "none" in options:
        problems = [p for p in home.told()["problems"] if p["object"].endswith("external")]
        assert [p["field"] for p in problems] == ["spec.externalIPs"]


def test_unused_cluster_ips_are_refused_if_asked_for(home: Home) -> None:
    home.use()
    for host in ("10.96.200.1", "::ffff:10.96.200.1", "fd00:96::200"):
        assert {ask(host, PORT, kind) for kind in KINDS} == {NO_SERVICE}
    home.use("--nodeport-addresses", "192.0.2.0/24", "--external-ips", "local",
             "--refuse-unused-cluster-ips")  # fmt: skip
    before = home.told()["counters"]["unused_address"]
    for host in ("10.96.200.1", "::ffff:10.96.200.1", "fd00:96::200"):
        assert {ask(host, PORT, kind) for kind in KINDS} == {REFUSED}
    assert home.told()["counters"]["unused_address"] == before + 9
    assert ask("10.97.0.1") == NO_SERVICE, "outside of the range"


# -- ports that are kept from others ---------------------------------------------------------------

_RESERVED = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")


def bind(port: int, host: str = "0.0.0.0", kind: int = socket.SOCK_STREAM) -> int:
    """0 or the errno."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as server:
        try:
            server.bind((host, port))
        except OSError as error:
            return error.errno or -1
    return 0


def test_no_process_of_the_host_takes_a_node_port(node: Home) -> None:
    port = node_port_service(node, 27, "guarded")
    reaches(NODE_IP, ONE, port=port)
    for host in ("0.0.0.0", "::", NODE_IP, "127.0.0.1"):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            assert bind(port, host, kind) == errno.EADDRINUSE
    assert bind(port + 1000) == 0
    with Pod() as pod:
        assert pod.run(bind, port) == 0
    node.remove("guarded.yaml")
    until(lambda: bind(port) == 0, "the port, free again")


@pytest.fixture
def reserved(kernel: None) -> Iterator[Callable[[], portranges.Ranges]]:
    """Reads what is reserved in this namespace, where nothing was; as before when it ends."""
    before = _RESERVED.read_text()
    _RESERVED.write_text("\n")
    yield lambda: portranges.parse(_RESERVED.read_text())
    _RESERVED.write_text(before)


def test_node_ports_are_reserved_until_unload_and_the_operators_stay(
    reserved: Callable[[], portranges.Ranges], tmp_path: Path
) -> None:
    """Of an agent beside the module's, with a range of its own."""
    cgroup = Cgroup(f"pm_reserved_{os.getpid()}")
    other = AgentProcess(tmp_path, cgroup.path, cgroup.path.name)
    try:
        _RESERVED.write_text("20000,25010-25020\n")
        other.start("--node-port-range", "25000-25999")
        assert reserved() == ((20000, 20000), (25000, 25999))
        other.kill()
        other.start("--node-port-range", "25000-25899")
        assert reserved() == ((20000, 20000), (25000, 25899)), "another range, after a restart"
        other.stop()
        assert reserved() == ((20000, 20000), (25000, 25899)), "the kernel still translates"
        assert "25000-25009,25021-25899" in other.cli("unload").stdout
        assert reserved() == ((20000, 20000), (25010, 25020))
        # What the operator changes afterwards is his.
        _RESERVED.write_text("25000-25100\n")
        other.cli("unload")
        assert reserved() == ((25000, 25100),)
    finally:
        other.close()
        cgroup.close()
