"""NodePorts, hostPorts, external and load balancers' addresses, and the options that change them,
as an operator has them: by `pointsman up` and manifests."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pointsman import portranges
from tests.kernel.home import (
    KINDS,
    NO_SERVICE,
    NODE_IP,
    NODE_IP6,
    ONE,
    ONE6,
    OTHER_NODE,
    PORT,
    REFUSED,
    TWO,
    Answer,
    Home,
    ask,
    become,
    device_address,
    reached,
    reaches,
    vips,
)
from tests.support.agents import (
    AgentProcess,
    node_of,
    pod_of,
    service_of,
)
from tests.support.kernel import Cgroup, until
from tests.support.pods import Pod

pytestmark = pytest.mark.kernel


@pytest.fixture
def node(home: Home) -> Home:
    """With the options that are the defaults."""
    home.use()
    return home


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
    reaches(NODE_IP6, ONE6, port=port)
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
    for host in (NODE_IP, "127.0.0.1"):
        for kind in KINDS:
            served = partial(ask, host, 8020, kind)
            until(lambda s=served, h=host: s() == Answer(TWO, (h, 8020)), f"{host} by {kind}")
    assert ask(OTHER_NODE, 8020) == NO_SERVICE, "only that node knows its pods"
    node.remove("host-port.yaml")
    reaches(NODE_IP, REFUSED, port=8020)


# -- other options ---------------------------------------------------------------------------------


def test_nodeport_addresses_choose_where_node_ports_answer(home: Home) -> None:
    home.use("--nodeport-addresses", "192.0.2.0/24", "--external-ips", "local",
             "--refuse-unused-cluster-ips")  # fmt: skip
    port = node_port_service(home, 25, "chosen")
    with device_address("198.51.100.8"):
        reaches(NODE_IP, ONE, port=port)
        reaches(OTHER_NODE, ONE, port=port)
        assert reached("198.51.100.8", port) == {REFUSED}, "its own, and nobody listens"
        assert reached("127.0.0.1", port) == {REFUSED}
        # A family that the list says nothing of answers at all its addresses, as in kube-proxy.
        reaches(NODE_IP6, ONE6, port=port)


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
    reaches(EXTERNAL, foreign, port=port)
    reaches(NODE_IP, own, port=port)

    def fields() -> list[str]:
        problems = [p for p in home.told()["problems"] if p["object"].endswith("external")]
        return [p["field"] for p in problems]

    wanted = ["spec.externalIPs"] if "none" in options else []
    until(lambda: fields() == wanted, "the problem in status")


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
    reaches(NODE_IP6, ONE6, port=port)
    become(NODE_IP, NODE_IP6, ONE, ONE6, "all of it", port)
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
