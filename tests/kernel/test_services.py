"""Every Service behaviour as an operator has it: `pointsman up`, manifests that change while it
runs, and programs that connect and send meanwhile. What has an address beside the ClusterIP is in
test_service_addresses.py."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pointsman.pins import Pins
from pointsman.values import to_address
from pointsman.view import View
from tests.kernel.home import (
    DROPPED,
    KINDS,
    NO_SERVICE,
    ONE,
    ONE6,
    OTHER_NODE,
    PORT,
    REFUSED,
    THREE,
    TWO,
    TWO6,
    Answer,
    Everywhere,
    Home,
    ask,
    become,
    reached,
    reaches,
    vips,
)
from tests.support.agents import (
    AgentProcess,
    manifest,
    node_of,
    pod_of,
    service_of,
    slice_of,
)
from tests.support.kernel import child, run, tcp_server, until
from tests.support.pods import Pod

pytestmark = pytest.mark.kernel


@pytest.fixture
def node(home: Home) -> Home:
    """With the options that are the defaults."""
    home.use()
    return home


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
    until(lambda: len(reached(four, kind="udp")) == 1, "the same of UDP")
    assert len(reached(four, kind="udp") | reached(four, kind="unconnected udp")) == 1
    node.members("sticky", *((a, {}) for a in (ONE, TWO, THREE) if a != kept))
    until(lambda: kept not in reached(four, times=1), "another one")
    assert len(reached(four)) == 1
    node.write("sticky.yaml", off)
    reaches(four, *({ONE, TWO, THREE} - {kept}))


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
    client.settimeout(60)
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
        unconnected.settimeout(60)
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
        client.settimeout(60)
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


def test_end_stale_tcp_ends_connections_too(home: Home) -> None:
    home.use("--end-stale-tcp")
    with held_connection(home, vips(24)[0], "ended") as (client, server):
        with pytest.raises(ConnectionAbortedError):
            client.recv(9)
        with pytest.raises(ConnectionResetError):
            server.recv(9)
