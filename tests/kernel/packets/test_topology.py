"""Real traffic from a client through a switch to three nodes, each with an agent of its own."""

from __future__ import annotations

import errno
import hashlib
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pytest
from scapy.packet import Packet

from demo.lab import Lab
from pointsman import abi
from tests.cluster.network import inside
from tests.kernel.packets.test_fragments import pieces
from tests.kernel.packets.world import V4, V6
from tests.support.kernel import TC, needs_linux, until
from tests.support.kernel import lacking as lacking_kernel
from tests.support.podserver import stream
from tests.support.topology import CLIENT, NODE_PORT, PORT, VIP, Node, Topology, lacking

pytestmark = pytest.mark.timeout(1200)  # three agents, and an upgrade

#: Bytes of a download that takes longer than what happens meanwhile.
LONG = 20_000_000
#: Connections after which one of four endpoints has had none: once in 10**12.
DRAWS = 100
FAMILIES = [pytest.param(0, id="IPv4"), pytest.param(1, id="IPv6")]


@pytest.fixture(scope="module")
def built(
    missing: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Topology]:
    if lack := lacking_kernel() or lacking():
        missing(lack)
    needs_linux(5, 12, "compare-and-swap")
    with Lab("packets") as lab:
        made = Topology(lab, tmp_path_factory.mktemp("topology"))
        try:
            for node, number in (("a", 1), ("b", 1), ("b", 2), ("c", 1)):
                made.add_pod(node, f"{node}{number}")
            made.publish()
            made.start_agents()
            yield made
        finally:
            made.close()


@pytest.fixture
def topology(built: Topology) -> Iterator[Topology]:
    """All nodes and pods well, the Service with its defaults."""
    _settle(built)
    yield built


def _settle(built: Topology) -> None:
    """Publishes, and waits until each node serves all that are ready and nobody else."""
    if not built.publish():
        return
    names = {pod.name for pod in built.pods.values() if pod.ready}
    for node in _nodes(built):
        for address in node.addresses:  # a family's set is switched after the other's
            served = partial(_seen, built, address)
            until(lambda s=served: s() == names, f"all endpoints to be served by {node.name}", 120)


def _nodes(built: Topology) -> list[Node]:
    return list(built.nodes.values())


def _seen(built: Topology, address: str, port: int = NODE_PORT, wanted: int = 0) -> set[str]:
    """Who answers many connections; no more are made once so many have answered. A connection that
    fails counts as an answer of nobody."""
    found: set[str] = set()
    for _ in range(DRAWS):
        try:
            found.add(built.ask(address, port)[0])
        except OSError:
            return {""}
        if len(found) == wanted:
            break
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_every_node_leads_to_every_endpoint(topology: Topology, name: str, family: int) -> None:
    address = topology.nodes[name].addresses[family]
    assert _seen(topology, address, wanted=4) == {"a1", "b1", "b2", "c1"}


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_serves_senders_that_leave_checksums_to_hardware(
    topology: Topology, family: int
) -> None:
    """What XDP sends on of theirs would be dropped: by `auto` a veth has TC alone."""
    node = topology.nodes["c"]
    (row,) = node.agent.status()["devices"]["items"]
    assert (row["xdp"], row["tc"], row["problems"]) == ("none", TC, [])
    topology.offload(True)
    try:
        assert _seen(topology, node.addresses[family], wanted=4) == {"a1", "b1", "b2", "c1"}
        found = {topology.datagram(node.addresses[family])[0] for _ in range(60)}
        assert found == {"a1", "b1", "b2", "c1"}
        assert download(topology, node.addresses[family], 1_000_000)
    finally:
        topology.offload(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_datagrams_as_long_as_quics(topology: Topology, family: int) -> None:
    address = topology.nodes["a"].addresses[family]
    found = {topology.datagram(address, length=1350)[0] for _ in range(DRAWS)}
    assert found == {"a1", "b1", "b2", "c1"}


@pytest.mark.parametrize("order", ["last first", "any"])
@pytest.mark.parametrize("family", FAMILIES)
def test_large_datagrams_in_pieces_in_any_order(
    topology: Topology, family: int, order: str
) -> None:
    """Both ways whole, by an endpoint of the node and by those of others."""
    random_ = random.Random(f"{family} {order}")
    found: dict[int, set[str]] = {4000: set(), 20000: set()}
    for number in range(24):
        length = (4000, 20000)[number % 2]
        cut = random_.shuffle if order == "any" else list.reverse
        found[length].add(_in_pieces(topology, family, 40000 + number, length, cut))
    assert all("a1" in who and len(who) > 1 for who in found.values()), found


def _in_pieces(
    built: Topology, family: int, port: int, length: int, order: Callable[[list[Packet]], None]
) -> str:
    """Who answers a datagram of that length, and with one as long."""
    f, address = (V4, V6)[family], built.nodes["a"].addresses[family]
    kind = (socket.AF_INET, socket.AF_INET6)[family]
    data = stream(length)
    cut = pieces(f.udp((CLIENT[family], port), (address, NODE_PORT), data), f, port, 1440)
    order(cut)
    with (
        inside(built.client),
        socket.socket(kind, socket.SOCK_DGRAM) as made,
        socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw,
    ):
        made.bind((CLIENT[family], port))
        made.settimeout(60)
        for piece in cut:
            raw.sendto(bytes(piece), (address, 0))
        answer = made.recv(65536)
    assert len(answer) == length
    return answer.split()[0].decode()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_load_balancers_address(topology: Topology, family: int) -> None:
    assert _seen(topology, VIP[family], PORT, 4) == {"a1", "b1", "b2", "c1"}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_endpoint_here_sees_the_client_one_elsewhere_the_node(
    topology: Topology, family: int
) -> None:
    node = topology.nodes["a"]
    for _ in range(40):
        for who, client in (
            topology.ask(node.addresses[family]),
            topology.datagram(node.addresses[family]),
        ):
            wanted = CLIENT[family] if who == "a1" else node.addresses[family]
            assert client == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_traffic_policy_local(topology: Topology, family: int) -> None:
    topology.publish(externalTrafficPolicy="Local")
    address = topology.nodes["b"].addresses[family]
    until(lambda: _seen(topology, address) == {"b1", "b2"}, "only the endpoints of the node")
    assert {topology.ask(address)[1] for _ in range(20)} == {CLIENT[family]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_download_is_whole(topology: Topology, family: int) -> None:
    assert download(topology, topology.nodes["c"].addresses[family], LONG)


def download(
    built: Topology, address: str, length: int, midway: Callable[[], None] = lambda: None
) -> bool:
    """Whether what came is what was sent; `midway` is called when a part has come."""
    with built.connect(address) as made, made.makefile("rb") as answer:
        answer.readline()
        return _get(made, answer, length, midway)


def _get(
    made: socket.socket, answer: BinaryIO, length: int, midway: Callable[[], None] = lambda: None
) -> bool:
    wanted = hashlib.sha256(stream(length)).hexdigest()
    found = hashlib.sha256()
    made.settimeout(60)
    made.sendall(b"get %d\n" % length)
    left, called = length, False
    while left:
        piece = answer.read(min(left, 1 << 16))
        assert piece, f"it ended {left} bytes before its end"
        found.update(piece)
        left -= len(piece)
        if not called and left < length / 2:
            called = True
            midway()
    return found.hexdigest() == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_an_endpoint_that_fails_gets_nothing_more(topology: Topology, family: int) -> None:
    pod = topology.pods["b2"]
    pod.ready = False
    try:
        _settle(topology)
        address = topology.nodes["a"].addresses[family]
        assert _seen(topology, address) == {"a1", "b1", "c1"}
    finally:
        pod.ready = True


@pytest.mark.parametrize("family", FAMILIES)
def test_datagrams_move_from_an_endpoint_that_leaves(topology: Topology, family: int) -> None:
    address = topology.nodes["a"].addresses[family]
    with _Steady(topology, address) as (say, _):
        first = say()
        pod = topology.pods[first]
        pod.ready = False
        try:
            _settle(topology)
            assert say() != first
        finally:
            pod.ready = True


class _Steady:
    """One UDP socket of the client: `say()` tells who answered."""

    def __init__(self, built: Topology, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with inside(built.client):
            self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.settimeout(60)
        self._socket.connect((address, NODE_PORT))

    def say(self) -> str:
        self._socket.send(bytes(100))
        return self._socket.recv(2048).split()[0].decode()

    def __enter__(self) -> tuple[Callable[[], str], socket.socket]:
        return self.say, self._socket

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_flow_of_datagrams_stays_with_one_endpoint(topology: Topology, family: int) -> None:
    with _Steady(topology, topology.nodes["a"].addresses[family]) as (say, _):
        assert len({say() for _ in range(50)}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_connections_outlive_the_agent(topology: Topology, family: int) -> None:
    """kill -9: what is attached goes on, for old connections and for new ones."""
    node = topology.nodes["a"]

    def midway() -> None:
        node.agent.kill()
        assert topology.ask(node.addresses[family])

    try:
        assert download(topology, node.addresses[family], LONG, midway)
    finally:
        node.agent.start()


def test_an_upgrade_during_downloads(topology: Topology, tmp_path: Path) -> None:
    """Other programs, the same flows: a download of each family goes on, and is whole."""
    node = topology.nodes["a"]
    source = tmp_path / "bpf"
    shutil.copytree(abi.source_directory(), source)
    with (source / "packets.c").open("a") as text:
        text.write("/* another version */\n")
    whole = []

    def another() -> None:
        whole.append(download(topology, node.addresses.v6, LONG, partial(_upgrade, node, source)))

    whole.append(download(topology, node.addresses.v4, LONG, another))
    assert whole == [True, True]


def _upgrade(node: Node, source: Path) -> None:
    before = node.agent.root.joinpath("current").readlink()
    node.agent.stop()
    node.agent.start(source=source)
    assert node.agent.root.joinpath("current").readlink() != before


@pytest.mark.parametrize("family", FAMILIES)
def test_another_node_takes_over_the_load_balancers_address(
    topology: Topology, family: int
) -> None:
    """The router turns to another node: new connections go through."""
    for name in ("b", "c", "a"):
        topology.route_vip(name)
        assert _seen(topology, VIP[family], PORT, 4) == {"a1", "b1", "b2", "c1"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_moved_connection_is_never_answered_by_a_stranger(
    topology: Topology, family: int
) -> None:
    """The node that it comes to knows nothing of it. Tables are equal, so it goes to its endpoint;
    which goes on, or ends it, by whom it takes its client for."""
    made = topology.connect(VIP[family], PORT)
    with made, made.makefile("rb") as lines:
        lines.readline()
        made.settimeout(1)  # there may be no answer
        topology.route_vip("b")
        try:
            made.sendall(b"still there?\n")
            answer = lines.readline()
        except OSError:
            answer = b""
        finally:
            topology.route_vip("a")
    assert answer in (b"still there?\n", b"")


# -- direct server return ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def direct(built: Topology) -> Topology:
    """All agents started again with `--dispatch dsr`, for all tests that come after."""
    built.start_agents("--dispatch", "dsr")
    # Flows that began before keep their way: the client uses no port again that it has had.
    with inside(built.client):
        Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("10240 32000")
    return built


@pytest.fixture
def dsr(direct: Topology) -> Topology:
    _settle(direct)
    return direct


ELSEWHERE = {"b1", "b2", "c1"}


def _connect_elsewhere(built: Topology, address: str) -> tuple[str, socket.socket, BinaryIO]:
    """A connection by way of node a to an endpoint on another node."""
    for _ in range(DRAWS):
        made = built.connect(address, PORT)
        answer = made.makefile("rb")
        pod = answer.readline().split()[0].decode()
        if pod in ELSEWHERE:
            return pod, made, answer
        answer.close()
        made.close()
    raise AssertionError("always the endpoint here")


def _bytes(node: Node) -> tuple[int, int]:
    """What a node's eth0 has received and sent."""
    with inside(node.site.namespace):
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    [eth0] = [line.split(":")[1].split() for line in lines if line.strip().startswith("eth0:")]
    return int(eth0[0]), int(eth0[8])


@pytest.mark.parametrize("family", FAMILIES)
def test_with_dsr_endpoints_see_the_client_who_sees_the_vip(dsr: Topology, family: int) -> None:
    for ask in (dsr.ask, dsr.datagram):  # which look at whom the answer comes from
        found = {ask(VIP[family], PORT) for _ in range(DRAWS)}
        assert found == {(pod, CLIENT[family]) for pod in ("a1", *ELSEWHERE)}


@pytest.mark.parametrize("family", FAMILIES)
def test_with_dsr_the_endpoints_node_answers_the_client_itself(dsr: Topology, family: int) -> None:
    """A download does not pass the node that the client sends to; an upload in full packets, which
    do not fit the tunnel, arrives all the same."""
    pod, made, answer = _connect_elsewhere(dsr, VIP[family])
    first, its = dsr.nodes["a"], dsr.pods[pod].node
    with made, answer:
        before, its_before = _bytes(first), _bytes(its)
        assert _get(made, answer, LONG)
        received, sent = (now - then for now, then in zip(_bytes(first), before, strict=True))
        assert _bytes(its)[1] - its_before[1] > LONG
        assert max(received, sent) < LONG / 10, "acknowledgements only"
        line = b"x" * 300_000 + b"\n"
        made.sendall(line)
        assert answer.readline() == line


@pytest.mark.parametrize("family", FAMILIES)
def test_with_dsr_a_packet_that_fits_no_tunnel_is_told_of_by_its_vip(
    dsr: Topology, family: int
) -> None:
    """The client's kernel believes an error only if it quotes what this socket sent to the VIP."""
    level, discover, ask_mtu, headers, wanted = (
        (socket.IPPROTO_IP, 10, 14, 28, 1480),  # IP_MTU_DISCOVER, IP_MTU
        (socket.IPPROTO_IPV6, 23, 24, 48, 1460),
    )[family]
    for _ in range(DRAWS):
        with inside(dsr.client):
            made = socket.socket((socket.AF_INET, socket.AF_INET6)[family], socket.SOCK_DGRAM)
        with made:
            made.settimeout(60)
            made.setsockopt(level, discover, 3)  # with DF, whatever was learned of the way before
            made.connect((VIP[family], PORT))
            made.send(b"x")
            if made.recv(64).split()[0].decode() not in ELSEWHERE:
                continue
            made.send(bytes(1500 - headers))
            until(lambda s=made: _error_of(s) == errno.EMSGSIZE, "the error")
            assert made.getsockopt(level, ask_mtu) == wanted
            made.send(bytes(wanted - headers))
            assert len(made.recv(2048)) == wanted - headers
            return
    raise AssertionError("always the endpoint here")


def _error_of(made: socket.socket) -> int:
    return made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def test_a_node_that_fails_takes_only_its_own(built: Topology) -> None:
    """Last, for the node does not come back."""
    for pod in built.pods.values():
        pod.ready = pod.node.name != "c"
    built.unplug("c")
    built.publish()
    for address in built.nodes["a"].addresses:
        served = partial(_seen, built, address)
        until(lambda s=served: s() == {"a1", "b1", "b2"}, "the endpoints of the other nodes", 180)
