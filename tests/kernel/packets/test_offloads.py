"""Real traffic by way of TC, with what devices take over from the kernel: long trains of packets,
and checksums that nobody has computed yet.

    client ── eth0 node eth1 ── eth0 another node pod0 ── the endpoint's pod

Four network namespaces, nothing leads out of them.
"""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from scapy.layers.l2 import Ether

from pointsman import abi
from pointsman.values import Entry, Frontend, PortName, to_address
from tests.kernel.packets.conftest import SIZES
from tests.kernel.packets.node import ELSEWHERE, HERE, Choice, entries, name_of
from tests.kernel.packets.world import FAMILIES, NODE_MAC, TARGET, V4, Family
from tests.support.kernel import CLONE_NEWNET, lacking, unshare
from tests.support.packetlab import PacketLab
from tests.support.topology import lacking as lacking_tools

_T = TypeVar("_T")
_C = abi.constants()
UDP_SEGMENT = 103  # linux/udp.h
IP_MTU_DISCOVER, IP_PMTUDISC_DONT = 10, 0  # linux/in.h
PORT = 80
LARGE = 9000  # the MTU everywhere but between the nodes
DATA = bytes(range(251)) * 8000


def _directory() -> str:
    return f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net"


class Space:
    """A network namespace, entered by one thread."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1)
        self(unshare, CLONE_NEWNET)

    def __call__(self, work: Callable[..., _T], *arguments: object) -> _T:
        return self.thread.submit(work, *arguments).result()

    def ip(self, commands: str) -> None:
        _run(self, "ip", "-batch", "-", text="\n".join(s.strip() for s in commands.splitlines()))


def _run(where: Callable[..., Any], *command: str, text: str = "") -> None:
    done = where(
        lambda: subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    )
    assert not done.returncode, f"{command}: {done.stderr}\n{text}"


def _tune(where: Callable[..., Any], device: str, offloads: bool) -> None:
    """Whether a device takes trains and checksums over."""
    features = ("tx", "tso", "gso", "tx-udp-segmentation")
    wanted = [word for name in features for word in (name, "on" if offloads else "off")]
    _run(where, "ethtool", "-K", device, *wanted)


class Lab:
    """The client, two nodes that know each other, and a pod of the second."""

    tunnels = False

    def __init__(self) -> None:
        self.client, self.pod = Space(), Space()
        self.node = PacketLab(name_of("pm_offload_a"), SIZES)
        try:
            self.far = PacketLab(name_of("pm_offload_b"), SIZES)
        except BaseException:
            self.node.close()
            raise

    def make(self) -> None:
        wires: tuple[tuple[PacketLab, str, Callable[..., str]], ...] = (
            (self.node, "eth0", self.client),
            (self.node, "eth1", self.far.on_node),
            (self.far, "pod0", self.pod),
        )
        for lab, device, end in wires:
            lab.ip(f"link add {device} type veth peer name x{device}")
            lab.ip(f"link set x{device} name eth0 netns {end(_directory)}\nlink set {device} up")
        self.node.ip(f"link set eth0 address {NODE_MAC}")
        for lab in (self.node, self.far):
            lab.sysctl("net/ipv4/ip_forward", "1")
            lab.sysctl("net/ipv6/conf/all/forwarding", "1")
        for space in (self.client, self.far, self.pod):
            space.ip("link set eth0 up")
        for place, device in (
            *((self.client, "eth0"), (self.node, "eth0")),
            *((self.far, "pod0"), (self.pod, "eth0")),
        ):
            place.ip(f"link set {device} mtu {LARGE}")
        for f in FAMILIES:
            self._address(f)
        out, v6 = ("DEVICE_NODE",), FAMILIES[1]
        self.node.serve_device("eth0", out, (V4.node, v6.node))
        self.node.serve_device("eth1", out, (V4.node1, v6.node1))
        self.far.serve_device("eth0", out, (V4.far_node, v6.far_node))
        for lab, device in ((self.node, "eth0"), (self.node, "eth1"), (self.far, "eth0")):
            for way in ("ingress", "egress"):
                _tc(lab, device, way)
        self.node.replace({f"{f!r}".lower(): _service(f, ELSEWHERE, f.far_node) for f in FAMILIES})
        self.far.replace({f"{f!r}".lower(): _service(f, HERE, f.node1) for f in FAMILIES})

    def _address(self, f: Family) -> None:
        nodad, bits, one = ("", 24, 32) if f is V4 else ("nodad", 64, 128)
        self.client.ip(
            f"""address add {f.gateway}/{bits} dev eth0 {nodad}
            route add {f.vip} via {f.node}"""
        )
        self.node.ip(
            f"""address add {f.node}/{bits} dev eth0 {nodad}
            address add {f.node1}/{bits} dev eth1 {nodad}
            route add {f.far} via {f.far_node}"""
        )
        self.far.ip(
            f"""address add {f.far_node}/{bits} dev eth0 {nodad}
            address add {f.peer}/{one} dev pod0 {nodad}
            route add {f.far} dev pod0
            route add {f.gateway} via {f.node1}"""
        )
        self.pod.ip(
            f"""address add {f.far}/{one} dev eth0 {nodad}
            route add {f.peer} dev eth0
            route add default via {f.peer} advmss {1460 if f is V4 else 1440}"""
        )

    def tune(self, mtu: int, *, offloads: bool) -> None:
        """The MTU between the nodes, of which the endpoint's offer says nothing; and what the
        nodes' devices do by themselves."""
        for lab, device in ((self.node, "eth1"), (self.far, "eth0")):
            lab.ip(f"link set {device} mtu {mtu}")
        for where, device in (
            (self.node.on_node, "eth0"),
            (self.node.on_node, "eth1"),
            (self.far.on_node, "pod0"),
        ):
            _tune(where, device, offloads)

    def forget(self) -> None:
        """Also what the client has been told of the way to the Service."""
        for lab in (self.node, self.far):
            lab.forget()
        for f in FAMILIES:
            self.client.ip(f"route del {f.vip} via {f.node}\nroute add {f.vip} via {f.node}")

    def close(self) -> None:
        self.node.close()
        self.far.close()
        for space in (self.client, self.pod):
            space.thread.shutdown()


def _tc(lab: PacketLab, device: str, way: str) -> None:
    program = str(lab.programs / f"tc_{way}")
    _run(lab.on_node, "tc", "qdisc", "replace", "dev", device, "clsact")
    _run(
        lab.on_node, *("tc", "filter", "add", "dev", device, way), *("bpf", "da", "pinned", program)
    )


def _service(f: Family, where: int, other: str) -> tuple[Entry, ...]:
    """The Service at the load balancer's address, and the other node's address."""
    node = Entry(
        Frontend(to_address(other), 0, 0),
        PortName("", "node/other", ""),
        flags=_C["SERVICE_REMOTE_NODE"],
    )
    return *entries(f, "web", PORT, Choice(((f.far, where),)), f.vip), node


@pytest.fixture(scope="module")
def built(missing: Callable[[str], None]) -> Iterator[Lab]:
    if lack := lacking() or lacking_tools():
        missing(lack)
    lab = Lab()
    try:
        lab.make()
        yield lab
    finally:
        lab.close()


@pytest.fixture(params=["tunnel", "address"])
def lab(built: Lab, request: pytest.FixtureRequest) -> Lab:
    """To the endpoint in a tunnel, or under the node's own address."""
    built.forget()
    built.tunnels = request.param == "tunnel"
    for lab in (built.node, built.far):
        lab.configure(dsr=built.tunnels)
    return built


def _family(f: Family) -> int:
    return socket.AF_INET if f is V4 else socket.AF_INET6


OFFLOADS = pytest.mark.parametrize("offloads", [True, False], ids=["offloads", "none"])


@OFFLOADS
@pytest.mark.parametrize("mtu", [1500, 1400])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_stream_arrives(lab: Lab, f: Family, mtu: int, offloads: bool) -> None:
    """Whatever fits: the client is told, and goes on with packets that do."""
    lab.tune(mtu, offloads=offloads)
    before = lab.node.counts()["PACKET_TOO_BIG"]

    def serve() -> socket.socket:
        listener = socket.socket(_family(f))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((f.far, TARGET))
        listener.listen()
        listener.settimeout(60)
        return listener

    def send() -> None:
        with socket.create_connection((f.vip, PORT), 60) as made:
            made.sendall(DATA)
            made.shutdown(socket.SHUT_WR)
            assert made.recv(1) == b""

    with lab.pod(serve) as listener:
        sending = lab.client.thread.submit(send)
        made, _ = listener.accept()
        found = hashlib.sha256()
        with made:
            made.settimeout(60)
            while piece := made.recv(1 << 16):
                found.update(piece)
        sending.result(60)
    assert found.hexdigest() == hashlib.sha256(DATA).hexdigest()
    told = lab.node.counts()["PACKET_TOO_BIG"] - before
    assert told if mtu < 1500 or lab.tunnels else not told


def _server(f: Family) -> socket.socket:
    made = socket.socket(_family(f), socket.SOCK_DGRAM)
    made.bind((f.far, TARGET))
    made.settimeout(60)
    return made


def _client(f: Family) -> socket.socket:
    made = socket.socket(_family(f), socket.SOCK_DGRAM)
    made.settimeout(60)
    made.connect((f.vip, PORT))
    return made


@OFFLOADS
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_datagrams_of_a_train_arrive_one_by_one(lab: Lab, f: Family, offloads: bool) -> None:
    lab.tune(1500, offloads=offloads)
    sizes = [1000] * 9 + [500]

    with lab.pod(_server, f) as server, lab.client(_client, f) as made:
        made.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 1000)
        made.send(DATA[: sum(sizes)])
        came = [server.recvfrom(65536) for _ in sizes]
        assert [len(data) for data, _ in came] == sizes
        assert b"".join(data for data, _ in came) == DATA[: sum(sizes)]
        server.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 1000)
        server.sendto(DATA[: sum(sizes)], came[0][1])
        assert [len(made.recv(65536)) for _ in sizes] == sizes


@pytest.mark.parametrize("length", [1450, 5000])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_datagrams_that_may_be_fragmented_arrive_once_their_sender_knows(
    lab: Lab, f: Family, length: int
) -> None:
    """Nobody on the way makes fragments. The first datagrams are lost."""
    lab.tune(1400, offloads=True)
    with lab.pod(_server, f) as server, lab.client(_client, f) as made:
        if f is V4:
            made.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
        server.settimeout(0.5)
        for _ in range(40):
            try:
                made.send(DATA[:length])  # or, in IPv6, is told of the last one
                data = server.recv(65536)
            except OSError:
                continue
            assert data == DATA[:length]
            return
    raise AssertionError("no datagram arrived")


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_headers_that_no_program_can_read_directly(lab: Lab, f: Family) -> None:
    """A frame of more than a page, sent whole, has but its link-layer header in front."""
    lab.tune(LARGE, offloads=True)
    packet = f.udp((f.gateway, 40000), (f.vip, PORT), DATA[:6000])

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind(("eth0", 0))
            raw.send(bytes(Ether(dst=NODE_MAC) / packet))

    with lab.pod(_server, f) as server:
        lab.client(send)
        assert server.recv(65536) == DATA[:6000]
