"""NodePorts and the other addresses that Services have beside the ClusterIP, from this node's own
processes and pods; and the guard that keeps the host's processes from taking them."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator

import pytest

from pointsman import abi
from pointsman.values import ANY_IPV4, ANY_IPV6, TCP, UDP, Entry, Frontend, PortName, to_address
from tests.support.kernel import (
    LINUX,
    REFUSED,
    Lab,
    arrived,
    entry,
    needs_linux,
    tcp_server,
    udp_server,
    wildcard,
)
from tests.support.pods import Pod, cookie_of, netns_cookie

pytestmark = pytest.mark.kernel

_C = abi.constants()
NODE, REMOTE, LOOPBACK = _C["SERVICE_NODE"], _C["SERVICE_REMOTE_NODE"], _C["SERVICE_LOOPBACK"]
PASS, THIS_NODE = _C["SERVICE_PASS"], _C["SERVICE_THIS_NODE"]
HOST_NETNS, GUARDED = _C["SERVICE_HOST_NETNS"], _C["SERVICE_GUARDED"]
NODE_PORT = _C["SERVICE_NODE_PORT"]
WEB, NODES = PortName("default", "web", "p"), PortName("", "node/here", "")
NODE_IP, NODE_IP6, OTHER_NODE = "192.0.2.1", "2001:db8::1", "192.0.2.2"
BACKEND, BACKEND6 = ("10.244.0.1", 9000), ("fd00:244::1", 9000)
PORT = 30080
IS_BACKEND, IS_BACKEND6 = "10.244.0.1:9000", "[fd00:244::1]:9000"
#: By SO_NETNS_COOKIE. Without it, NodePorts at the host's loopback and the bind guard are off.
KNOWS_HOST = LINUX >= (5, 14)


def address(text: str, flags: int) -> Entry:
    return Entry(Frontend(to_address(text), 0, 0), NODES, flags=flags)


def node_port(
    any_address: bytes, backends: list[tuple[str, int]], flags: int = 0, protocol: int = UDP
) -> Entry:
    members = tuple(sorted((to_address(a), p) for a, p in backends))
    return Entry(Frontend(any_address, PORT, protocol), WEB, members, flags=flags | NODE_PORT)


@pytest.fixture
def node(lab: Lab) -> Iterator[Lab]:
    """A node with an address of each family, another node, and this namespace as the host's, where
    the kernel tells which one that is."""
    if KNOWS_HOST:
        lab.maps.set_host_netns(netns_cookie())
    lab.set(
        "node",
        address(NODE_IP, NODE),
        address(NODE_IP6, NODE),
        address(OTHER_NODE, REMOTE),
        address("127.0.0.1", LOOPBACK),
        address("::1", LOOPBACK),
    )
    yield lab
    lab.maps.skip(frozenset())
    lab.maps.set_host_netns(0)
    lab.maps.refuse(())


def dial(lab: Lab, host: str, port: int = PORT) -> str:
    """What a connected UDP socket of this thread's namespace is translated to, "" if it is not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        try:
            client.connect((host, port))
        except OSError as error:
            if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
                return ""  # nothing leads out of here: it went on untranslated
            raise
        try:
            return lab.peer_of(cookie_of(client))
        except LookupError:
            return ""


@pytest.mark.parametrize(
    ("host", "peer"),
    [
        pytest.param(NODE_IP, IS_BACKEND, id="node-address"),
        pytest.param(OTHER_NODE, IS_BACKEND, id="another-node"),
        pytest.param("::ffff:192.0.2.1", IS_BACKEND, id="ipv4-mapped"),
        pytest.param(NODE_IP6, IS_BACKEND6, id="ipv6"),
        pytest.param("127.0.0.1", IS_BACKEND, id="localhost"),
        pytest.param("127.1.2.3", IS_BACKEND, id="all-of-127/8"),
        pytest.param("::1", IS_BACKEND6, id="localhost-ipv6"),
        pytest.param("0.0.0.0", IS_BACKEND, id="unspecified-is-localhost"),
        pytest.param("::", IS_BACKEND6, id="unspecified-is-localhost-ipv6"),
        pytest.param("192.0.2.9", "", id="no-node"),
        pytest.param("10.244.0.5", "", id="pod-address"),
    ],
)
def test_node_port_from_the_host(node: Lab, host: str, peer: str) -> None:
    node.set("web", node_port(ANY_IPV4, [BACKEND]), node_port(ANY_IPV6, [BACKEND6]))

    at_a_node = host.endswith((NODE_IP, NODE_IP6, OTHER_NODE))
    assert dial(node, host) == (peer if KNOWS_HOST or at_a_node else "")


@pytest.mark.parametrize(
    ("host", "peer"),
    [
        pytest.param(NODE_IP, IS_BACKEND, id="node-address"),
        pytest.param(NODE_IP6, IS_BACKEND6, id="ipv6"),
        pytest.param(OTHER_NODE, IS_BACKEND, id="another-node"),
        pytest.param("127.0.0.1", "", id="a-pods-own-loopback"),
        pytest.param("127.9.9.9", "", id="a-pods-own-127/8"),
        pytest.param("::1", "", id="a-pods-own-loopback-ipv6"),
        pytest.param("::ffff:127.0.0.1", "", id="a-pods-own-loopback-mapped"),
        pytest.param("0.0.0.0", "", id="unspecified-is-a-pods-own"),
        pytest.param("::", "", id="unspecified-is-a-pods-own-ipv6"),
    ],
)
def test_node_port_from_a_pod(node: Lab, host: str, peer: str) -> None:
    node.set("web", node_port(ANY_IPV4, [BACKEND]), node_port(ANY_IPV6, [BACKEND6]))

    with Pod() as pod:
        assert pod.run(dial, node, host) == peer


def test_when_the_host_namespace_is_not_known_every_loopback_is_a_pods_own(node: Lab) -> None:
    node.maps.set_host_netns(0)
    node.set("web", node_port(ANY_IPV4, [BACKEND]))

    assert dial(node, "127.0.0.1") == ""
    assert dial(node, NODE_IP) == IS_BACKEND


def test_other_ports_of_a_node_are_its_own(node: Lab) -> None:
    """sshd must not be refused because the address takes NodePorts."""
    with tcp_server("127.0.0.1") as (server, port):
        node.set("web", node_port(ANY_IPV4, [BACKEND], protocol=TCP))
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            assert client.getpeername() == ("127.0.0.1", port)
        server.accept()[0].close()
    assert dial(node, NODE_IP, PORT + 1) == ""


def test_tcp_and_udp_of_one_number_are_two_node_ports(node: Lab) -> None:
    with tcp_server("10.244.0.7") as (_, port):
        node.set(
            "web",
            node_port(ANY_IPV4, [BACKEND], protocol=UDP),
            node_port(ANY_IPV4, [("10.244.0.7", port)], protocol=TCP),
        )
        assert dial(node, NODE_IP) == IS_BACKEND
        with socket.create_connection((NODE_IP, PORT), timeout=60) as client:
            assert client.getpeername() == (NODE_IP, PORT)


def test_a_node_port_without_endpoints_refuses(node: Lab) -> None:
    node.set("web", node_port(ANY_IPV4, []))

    with pytest.raises(REFUSED):
        dial(node, NODE_IP)


def test_external_traffic_policy_local_leaves_other_nodes_to_decide(node: Lab) -> None:
    """Here it short-circuits to all endpoints; another node's address must reach that node."""
    node.set("web", node_port(ANY_IPV4, [BACKEND], THIS_NODE))

    assert dial(node, NODE_IP) == IS_BACKEND
    assert dial(node, OTHER_NODE) == ""


def test_an_address_that_takes_no_node_ports_passes(node: Lab) -> None:
    node.set("web", node_port(ANY_IPV4, [BACKEND]))
    node.set("excluded", address("192.0.2.77", PASS))

    assert dial(node, "192.0.2.77") == ""


def test_unconnected_datagrams_keep_their_endpoint_and_show_the_address_asked(node: Lab) -> None:
    with udp_server("10.244.0.1") as (one, port), udp_server("10.244.0.2") as (two, other):
        node.set("web", node_port(ANY_IPV4, [("10.244.0.1", port), ("10.244.0.2", other)]))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(60)
            for _ in range(12):
                client.sendto(b"x", (NODE_IP, PORT))
            came = arrived(12, one, two)
            assert sorted(map(len, came)) == [0, 12]
            reached, (_, sender) = (one, came[0][-1]) if came[0] else (two, came[1][-1])
            reached.sendto(b"answer", sender)
            assert client.recvfrom(10) == (b"answer", (NODE_IP, PORT))


def test_an_external_ip_may_be_the_nodes_own_address(node: Lab) -> None:
    external = entry(NODE_IP, 8080, UDP, [BACKEND], WEB)
    node.set("web", external, node_port(ANY_IPV4, [BACKEND]))

    assert dial(node, NODE_IP, 8080) == IS_BACKEND
    assert dial(node, NODE_IP) == IS_BACKEND
    assert dial(node, NODE_IP, 8081) == ""


def test_a_host_port_on_loopback_is_the_hosts_own(node: Lab) -> None:
    needs_linux(5, 14, "SO_NETNS_COOKIE")
    node.set("pod", entry("127.0.0.1", 8080, UDP, [BACKEND], WEB, flags=HOST_NETNS))

    assert dial(node, "127.0.0.1", 8080) == IS_BACKEND
    with Pod() as pod:
        assert pod.run(dial, node, "127.0.0.1", 8080) == ""


# -- unused addresses ----------------------------------------------------------------------------

CIDRS = (
    (to_address("10.96.0.0"), b"\xff" * 14 + b"\0\0"),
    (to_address("fd00:96::"), b"\xff" * 14 + b"\0\0"),
)


@pytest.mark.parametrize(
    ("host", "refused"),
    [
        pytest.param("10.96.0.99", True, id="inside"),
        pytest.param("::ffff:10.96.0.99", True, id="inside-mapped"),
        pytest.param("fd00:96::99", True, id="inside-ipv6"),
        pytest.param("10.97.0.1", False, id="outside"),
        pytest.param("fd00:97::1", False, id="outside-ipv6"),
        pytest.param("10.96.0.53", False, id="on-a-device"),
        pytest.param("10.96.0.1", False, id="a-service"),
    ],
)
def test_unused_addresses_of_the_service_cidr_are_refused_if_asked(
    node: Lab, host: str, refused: bool
) -> None:
    node.set("web", entry("10.96.0.1", PORT, UDP, [BACKEND], WEB), wildcard("10.96.0.1", WEB))
    node.set("cache", address("10.96.0.53", PASS))
    dial(node, host)  # not asked: it passes

    node.maps.refuse(CIDRS)
    before = node.maps.counters()["unused_address"]
    if refused:
        with pytest.raises(REFUSED):
            dial(node, host)
    else:
        dial(node, host)
    assert node.maps.counters()["unused_address"] - before == refused


# -- opted-out namespaces ------------------------------------------------------------------------


def test_pitfall_8_an_opted_out_pod_sees_services_as_they_are(node: Lab) -> None:
    """cilium#16583: a mesh's proxy, or a VM, wants the packets with the ClusterIP in them."""
    node.set("web", entry("10.96.0.1", PORT, UDP, [BACKEND], WEB), wildcard("10.96.0.1", WEB))
    node.set("none", entry("10.96.0.2", PORT, UDP, [], WEB))
    with Pod() as pod, Pod() as other:
        assert pod.run(dial, node, "10.96.0.1") == IS_BACKEND

        node.maps.skip(frozenset([pod.netns]))
        assert pod.run(dial, node, "10.96.0.1") == ""
        assert pod.run(dial, node, "10.96.0.1", PORT + 1) == "", "not even refused"
        assert pod.run(dial, node, "10.96.0.2") == ""
        assert other.run(dial, node, "10.96.0.1") == IS_BACKEND
        assert dial(node, "10.96.0.1") == IS_BACKEND

        node.maps.skip(frozenset([other.netns]))
        assert pod.run(dial, node, "10.96.0.1") == IS_BACKEND
        assert other.run(dial, node, "10.96.0.1") == ""


# -- the bind guard ------------------------------------------------------------------------------


def bind(host: str, port: int = PORT, kind: int = socket.SOCK_STREAM) -> int:
    """The errno of bind(), 0 if it is let."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, kind) as server:
        server.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND: no device has the address
        try:
            server.bind((host, port))
        except OSError as error:
            return error.errno or -1
    return 0


@pytest.fixture
def guarded(node: Lab) -> Lab:
    node.set(
        "web",
        node_port(ANY_IPV4, [BACKEND], GUARDED, protocol=TCP),
        entry("198.51.100.1", 80, TCP, [BACKEND], WEB, flags=GUARDED),
        entry("198.51.100.2", 80, TCP, [BACKEND], WEB),
    )
    return node


@pytest.mark.parametrize(
    ("host", "port", "kind", "expected"),
    [
        pytest.param("0.0.0.0", PORT, socket.SOCK_STREAM, errno.EADDRINUSE, id="any"),
        pytest.param("::", PORT, socket.SOCK_STREAM, errno.EADDRINUSE, id="any-ipv6-of-ipv4-port"),
        pytest.param(NODE_IP, PORT, socket.SOCK_STREAM, errno.EADDRINUSE, id="node-address"),
        pytest.param("127.0.0.1", PORT, socket.SOCK_STREAM, errno.EADDRINUSE, id="localhost"),
        pytest.param("192.0.2.9", PORT, socket.SOCK_STREAM, 0, id="not-a-node-address"),
        pytest.param("0.0.0.0", PORT, socket.SOCK_DGRAM, 0, id="other-protocol"),
        pytest.param("0.0.0.0", PORT + 1, socket.SOCK_STREAM, 0, id="other-port"),
        pytest.param("0.0.0.0", 0, socket.SOCK_STREAM, 0, id="any-port"),
        pytest.param("198.51.100.1", 80, socket.SOCK_STREAM, errno.EADDRINUSE, id="lb-port"),
        pytest.param("0.0.0.0", 80, socket.SOCK_STREAM, 0, id="lb-port-at-any-address"),
        pytest.param("198.51.100.2", 80, socket.SOCK_STREAM, 0, id="not-guarded"),
    ],
)
def test_pitfall_12_bind_guard_in_the_host_namespace(
    guarded: Lab, host: str, port: int, kind: int, expected: int
) -> None:
    """cilium#19067: a process that listens on a NodePort would wait for ever."""
    expected *= KNOWS_HOST
    before = guarded.maps.counters()["bind_refused"]

    assert bind(host, port, kind) == expected
    assert guarded.maps.counters()["bind_refused"] - before == bool(expected)


def test_a_pod_binds_what_it_likes(guarded: Lab) -> None:
    with Pod() as pod:
        assert pod.run(bind, "0.0.0.0") == 0


def test_the_guard_opens_with_the_service(guarded: Lab) -> None:
    needs_linux(5, 14, "SO_NETNS_COOKIE")
    assert bind("0.0.0.0") == errno.EADDRINUSE
    guarded.set("web", node_port(ANY_IPV4, [BACKEND], 0, protocol=TCP))
    assert bind("0.0.0.0") == 0


def test_loopback_clients_of_a_pod_reach_their_own_server(
    node: Lab, accepted: Callable[[socket.socket], str]
) -> None:
    """A pod's own 127.0.0.1:30080 is a server of the pod's."""
    node.set("web", node_port(ANY_IPV4, [BACKEND], protocol=TCP))

    def own() -> str:
        with (
            socket.create_server(("127.0.0.1", PORT)) as server,
            socket.create_connection(("127.0.0.1", PORT), timeout=60) as client,
        ):
            assert client.getpeername() == ("127.0.0.1", PORT)
            return accepted(server)

    with Pod() as pod:
        assert pod.run(own) == "127.0.0.1"


@pytest.fixture
def accepted() -> Callable[[socket.socket], str]:
    def address_of_client(server: socket.socket) -> str:
        connection, client = server.accept()
        connection.close()
        return str(client[0])

    return address_of_client
