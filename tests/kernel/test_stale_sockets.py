"""Sockets that outlive their endpoint are ended, and no others."""

from __future__ import annotations

import errno
import shutil
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

from pointsman import abi, netlink, netns
from pointsman.reaper import Found, Reaped, Reaper
from pointsman.sockets import Sockets
from pointsman.stale import Endpoints, Flow, Record, stale, stale_flows
from pointsman.values import Backend, Frontend, PortName, to_address
from tests.kernel.test_netns import another_namespace, inode_of
from tests.support.kernel import (
    SMALL,
    TCP,
    UDP,
    Lab,
    backend,
    child,
    entry,
    tcp_server,
    udp_server,
    until,
)
from tests.support.pods import Pod

pytestmark = pytest.mark.kernel

VIP = "10.96.0.1"
FAMILIES = [
    pytest.param(socket.AF_INET, VIP, "127.0.0.1", VIP, id="IPv4"),
    pytest.param(socket.AF_INET6, "fd00:96::1", "::1", "fd00:96::1", id="IPv6"),
    pytest.param(socket.AF_INET6, VIP, "127.0.0.1", f"::ffff:{VIP}", id="IPv4-mapped"),
]


def nowhere(_: bytes) -> bool:
    """No pod and no endpoint has the address any more."""
    return False


def endpoints(lab: Lab) -> Endpoints:
    """What the lab's Services have."""
    found = {e.frontend: frozenset(e.endpoints) for entries in lab.wanted.values() for e in entries}
    return found.get


def records(lab: Lab, protocols: Collection[int] = (UDP,)) -> list[Record]:
    with closing(Sockets(lab.maps.directory)) as sockets:
        return sockets.records(protocols)


def end(
    lab: Lab, doomed: list[Record], still: Callable[[Record], bool] | None = None
) -> list[Record]:
    """Ends the sockets of these records wherever they are."""
    ended: list[Record] = []
    with closing(Sockets(lab.maps.directory)) as sockets:
        netns.visit(lambda: ended.extend(netlink.destroy(doomed, still or sockets.still)) or False)
    return ended


def reap(lab: Lab, protocols: Collection[int] = (UDP,)) -> list[Record]:
    """One pass over everything, as an agent does it after a sync."""
    return end(lab, stale(records(lab, protocols), endpoints(lab), nowhere))


@contextmanager
def receiving(client: socket.socket) -> Iterator[list[object]]:
    """A thread blocked in recv(); the list gets what came of it."""
    outcome: list[object] = []

    def receive() -> None:
        try:
            outcome.append(client.recv(64))
        except OSError as error:
            outcome.append(errno.errorcode[error.errno or 0])

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    yield outcome
    thread.join(timeout=60)
    assert not thread.is_alive()


def assert_alive(client: socket.socket) -> None:
    """No error waits, and it still has its peer."""
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    assert client.getpeername()


# -- what is ended -------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "vip", "server_address", "dialled"), FAMILIES)
def test_pitfall_1_stale_sockets_after_backend_deletion(
    lab: Lab, family: int, vip: str, server_address: str, dialled: str
) -> None:
    """A DNS client that waits for an answer of a pod that is gone."""
    with (
        udp_server(server_address) as (_, old),
        udp_server(server_address) as (server, new),
        socket.socket(family, socket.SOCK_DGRAM) as client,
    ):
        lab.serve(vip, 53, UDP, (server_address, old))
        client.connect((dialled, 53))
        with receiving(client) as outcome:
            assert reap(lab) == [], "its endpoint is there"
            lab.serve(vip, 53, UDP, (server_address, new))
            [ended] = reap(lab)
            assert ended.peer == backend(server_address, old)
            until(lambda: outcome, "the end of recv()")
            assert outcome == ["ECONNABORTED"]
        # The socket itself is as good as new.
        client.connect((dialled, 53))
        client.send(b"ask")
        data, source = server.recvfrom(9)
        server.sendto(data, source)
        assert client.recv(9) == b"ask"
        assert reap(lab) == []


@pytest.mark.parametrize(("family", "vip", "server_address", "dialled"), FAMILIES)
def test_a_socket_in_another_namespace_is_ended(
    lab: Lab, family: int, vip: str, server_address: str, dialled: str
) -> None:
    lab.serve(vip, 53, UDP, (server_address, 9))
    pod = child(
        """
        import ctypes, errno, socket, subprocess, sys
        ctypes.CDLL(None).unshare(0x40000000)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        client = socket.socket(int(sys.argv[1]), socket.SOCK_DGRAM)
        client.connect((sys.argv[2], 53))
        direct = socket.socket(int(sys.argv[1]), socket.SOCK_DGRAM)
        direct.connect(client.getsockname()[:1] + (9,))
        print("connected")
        try:
            client.recv(1)
        except OSError as error:
            print(errno.errorcode[error.errno])
        print(direct.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), direct.getpeername()[1])
        """,
        str(int(family)),
        dialled,
    )
    assert pod.stdout
    try:
        assert pod.stdout.readline() == "connected\n"
        lab.serve(vip, 53, UDP, (server_address, 10))
        assert len(reap(lab)) == 1
        assert pod.stdout.readline() == "ECONNABORTED\n"
        assert pod.stdout.readline() == "0 9\n", "the direct one is untouched"
        assert pod.wait(timeout=60) == 0
    finally:
        pod.kill()
        pod.wait()


@pytest.mark.parametrize("gone", ["last-endpoint", "service"])
def test_sockets_of_a_service_with_nothing_left_are_ended(lab: Lab, gone: str) -> None:
    lab.serve(VIP, 53, UDP, ("127.0.0.1", 9))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((VIP, 53))
        if gone == "service":
            lab.set("web")
        else:
            lab.serve(VIP, 53, UDP)
        assert len(reap(lab)) == 1
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED


def test_sockets_are_found_wherever_their_record_is(fresh_lab: Callable[..., Lab]) -> None:
    """First place, further places, overflow: sixteen buckets, so that all of them fill up, and room
    for all in this namespace's quarter of the overflow."""
    lab = fresh_lab(sizes=replace(SMALL, buckets=16, overflow=512))
    lab.serve(VIP, 53, UDP, ("127.0.0.1", 9))
    lab.set("tcp", entry(VIP, 80, TCP, [("127.0.0.1", 9)], PortName("default", "tcp", "p")))
    clients = []
    try:
        for number in range(120):
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            client.connect((VIP, 53))
            clients.append(client)
            if number % 10 == 0:  # these have a record for a moment, and of another protocol
                with socket.socket() as refused:
                    refused.connect_ex((VIP, 80))
        found = records(lab)
        assert len(set(found)) == 120 == lab.records()
        overflow = lab.maps.map("sockets_overflow")
        read = abi.layouts()["overflow"].reader("netns")
        assert {read(value) for _, value in overflow.items()} == {(netns.cookie(),)}
        with closing(Sockets(lab.maps.directory)) as sockets:
            assert all(map(sockets.still, found))
            assert not any(sockets.still(r._replace(vip=r.peer)) for r in found)
            assert not sockets.still(found[0]._replace(cookie=1 << 40))
        lab.serve(VIP, 53, UDP, ("127.0.0.1", 10))
        assert set(reap(lab)) == set(found)
    finally:
        for client in clients:
            client.close()
    assert records(lab) == []


# -- what is spared ------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "vip", "server_address", "dialled"), FAMILIES)
def test_pitfall_3_terminator_spares_unconnected_and_unrelated_sockets(
    lab: Lab, family: int, vip: str, server_address: str, dialled: str
) -> None:
    other_vip = "fd00:96::2" if ":" in vip else "10.96.0.2"
    other_dialled = dialled.replace(vip, other_vip)
    direct_address = dialled.replace(vip, server_address)
    with (
        udp_server(server_address) as (server, port),
        tcp_server(server_address) as (tcp, tcp_port),
        socket.socket(family, socket.SOCK_DGRAM) as stale_one,
        socket.socket(family, socket.SOCK_DGRAM) as direct,
        socket.socket(family, socket.SOCK_DGRAM) as unconnected,
        socket.socket(family, socket.SOCK_DGRAM) as other,
        socket.socket(family) as stream,
    ):
        lab.serve(vip, 53, UDP, (server_address, port))
        lab.serve(other_vip, 53, UDP, (server_address, port), name="other")
        owner = PortName("default", "tcp", "p")
        lab.set("tcp", entry(vip, 80, TCP, [(server_address, tcp_port)], owner))
        stale_one.connect((dialled, 53))
        direct.connect((direct_address, port))
        unconnected.sendto(b"ask", (dialled, 53))
        other.connect((other_dialled, 53))
        stream.connect((dialled, 80))
        accepted, _ = tcp.accept()

        lab.serve(vip, 53, UDP)
        lab.set("tcp", entry(vip, 80, TCP, (), owner))
        [ended] = reap(lab)
        assert ended.vip == backend(vip, 53)
        assert stale_one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED
        for spared in (direct, other, stream):
            assert_alive(spared)
        # The unconnected one still gets what was sent to it.
        data, source = server.recvfrom(9)
        server.sendto(data, source)
        assert unconnected.recv(9) == b"ask"
        stream.send(b"on")
        assert accepted.recv(9) == b"on"
        accepted.close()


def test_tcp_is_ended_only_if_asked_for(lab: Lab) -> None:
    with tcp_server() as (server, port), tcp_server() as (_, new), socket.socket() as client:
        lab.serve(VIP, 80, TCP, ("127.0.0.1", port))
        client.connect((VIP, 80))
        accepted, _ = server.accept()
        with accepted, receiving(client) as outcome:
            lab.serve(VIP, 80, TCP, ("127.0.0.1", new))
            assert reap(lab) == []
            assert outcome == []
            assert len(reap(lab, (TCP, UDP))) == 1
            until(lambda: outcome, "the end of recv()")
            assert outcome == ["ECONNABORTED"]
            with pytest.raises(ConnectionResetError):
                accepted.recv(1)
        assert lab.records() == 0


@pytest.mark.parametrize(
    "again",
    [
        pytest.param((VIP, 53), id="to-the-same-vip"),
        pytest.param(("10.96.0.2", 53), id="to-another-vip-with-that-endpoint"),
        pytest.param(("127.0.0.1", 9), id="to-the-endpoint-itself"),
    ],
)
def test_a_socket_that_connected_again_meanwhile_is_spared(
    lab: Lab, again: tuple[str, int]
) -> None:
    lab.serve(VIP, 53, UDP, ("127.0.0.1", 9))
    lab.serve("10.96.0.2", 53, UDP, ("127.0.0.1", 9), name="other")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((VIP, 53))
        lab.serve(VIP, 53, UDP, ("127.0.0.1", 10))
        doomed = stale(records(lab), endpoints(lab), nowhere)
        assert len(doomed) == 1
        client.connect(again)
        assert end(lab, doomed) == []
        assert_alive(client)


def test_without_a_last_look_at_the_record_an_innocent_socket_is_ended(lab: Lab) -> None:
    """Why `still` is asked: cookie, protocol and peer are the same, the VIP is not."""
    lab.serve(VIP, 53, UDP, ("127.0.0.1", 9))
    lab.serve("10.96.0.2", 53, UDP, ("127.0.0.1", 9), name="other")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((VIP, 53))
        lab.serve(VIP, 53, UDP, ("127.0.0.1", 10))
        doomed = stale(records(lab), endpoints(lab), nowhere)
        client.connect(("10.96.0.2", 53))
        assert end(lab, doomed, still=lambda _: True) == doomed


def test_a_socket_that_disconnected_is_spared(lab: Lab) -> None:
    """connect(AF_UNSPEC) passes no hook: the record stands, the socket is nobody's."""
    lab.serve(VIP, 53, UDP, ("127.0.0.1", 9))
    with (
        udp_server() as (server, port),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.connect((VIP, 53))
        disconnect(client)
        lab.serve(VIP, 53, UDP, ("127.0.0.1", 10))
        assert len(stale(records(lab), endpoints(lab), nowhere)) == 1
        assert reap(lab) == []
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        client.sendto(b"on", ("127.0.0.1", port))
        assert server.recv(9) == b"on"


def disconnect(client: socket.socket) -> None:
    import ctypes

    assert ctypes.CDLL(None).connect(client.fileno(), bytes(16), 16) == 0


def test_a_socket_that_closed_meanwhile_is_no_error(lab: Lab) -> None:
    lab.serve(VIP, 53, UDP, ("127.0.0.1", 9))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((VIP, 53))
        lab.set("web")
        doomed = stale(records(lab), endpoints(lab), nowhere)
    assert end(lab, doomed) == []


# -- the thread that does it ---------------------------------------------------------------------


class Ends:
    """A reaper, with somebody who answers what it found."""

    def __init__(self, lab: Lab, **options: object) -> None:
        self.looks: list[Found] = []
        self.reports: list[Reaped] = []
        self.lab = lab
        self.reaper = Reaper(
            lab.maps.directory,
            lab.maps.wait_for_readers,
            self._found,
            self.reports.append,
            **options,  # type: ignore[arg-type]
        )
        self.thread = threading.Thread(target=self.reaper.run)
        self.thread.start()

    def _found(self, found: Found) -> None:
        self.looks.append(found)
        self.reaper.destroy(stale(found.records, endpoints(self.lab), nowhere))

    def close(self) -> None:
        self.reaper.stop()
        self.thread.join(timeout=60)
        assert not self.thread.is_alive()


def test_the_reaper_ends_what_a_sync_left_behind(lab: Lab) -> None:
    lab.serve(VIP, 53, UDP, ("127.0.0.1", 9))
    with (
        closing(Ends(lab)) as ends,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        ends.reaper.look()
        client.connect((VIP, 53))
        lab.serve(VIP, 53, UDP, ("127.0.0.1", 10))
        with receiving(client) as outcome:
            ends.reaper.look()
            until(lambda: outcome, "the end of recv()")
        assert outcome == ["ECONNABORTED"]
        until(lambda: ends.reports, "the report")
        [report] = ends.reports
        assert [record.peer for record in report.destroyed] == [backend("127.0.0.1", 9)]
        assert report.problems == ()


def test_many_requests_are_one_look(lab: Lab) -> None:
    lab.serve(VIP, 53, UDP, ("127.0.0.1", 9))
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        closing(Ends(lab, interval=1000)) as ends,
    ):
        client.connect((VIP, 53))
        ends.reaper.look()
        until(lambda: ends.looks, "the first look")
        for _ in range(100):
            ends.reaper.look()
        assert len(ends.looks) == 1


def test_a_record_without_a_socket_is_not_looked_for_for_ever(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits: list[int] = []
    real = netns.visit
    monkeypatch.setattr(netns, "visit", lambda work: (visits.append(1), real(work))[1])
    lab.serve(VIP, 53, UDP, ("127.0.0.1", 9))
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        closing(Ends(lab, interval=0.01)) as ends,
    ):
        client.connect((VIP, 53))
        disconnect(client)
        lab.serve(VIP, 53, UDP, ("127.0.0.1", 10))
        ends.reaper.look()
        until(lambda: len(visits) >= 3, "three tries")
        before = len(ends.looks)
        for _ in range(3):
            ends.reaper.look()
            until(lambda before=before: len(ends.looks) > before, "another look")
            before = len(ends.looks)
        assert len(visits) == 3


def test_what_the_kernel_refuses_is_reported_and_the_reaper_goes_on(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> list[Flow]:
        raise OSError(errno.EOPNOTSUPP, "refused")

    monkeypatch.setattr(netlink, "flows", refuse)
    monkeypatch.setattr(netlink, "destroy", refuse)
    lab.serve(VIP, 53, UDP, ("127.0.0.1", 9))
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        closing(Ends(lab, interval=0.01)) as ends,
    ):
        client.connect((VIP, 53))
        lab.serve(VIP, 53, UDP, ("127.0.0.1", 10))
        ends.reaper.look(flows=True)
        until(lambda: len(ends.reports) >= 2, "both reports")
        problems = [problem for report in ends.reports for problem in report.problems]
        assert "conntrack" in problems[0]
        assert "CONFIG_INET_DIAG_DESTROY" in problems[1]
        assert ends.thread.is_alive()


# -- conntrack -----------------------------------------------------------------------------------

NAT = """
table ip pm {
  chain out {
    type nat hook output priority -100; policy accept;
    ip daddr 10.96.0.1 udp dport 53 dnat to numgen inc mod 2 map { 0: 127.0.0.1, 1: 127.0.0.2 }
    ip daddr 10.96.0.2 udp dport 53 dnat to 127.0.0.1
  }
}
table ip6 pm {
  chain out {
    type nat hook output priority -100; policy accept;
    ip6 daddr fd00:96::1 udp dport 53 dnat to ::1
  }
}
"""


def in_namespace(number: int, work: Callable[[], object]) -> None:
    """Runs it in the namespace of that inode."""
    done: list[int] = []

    def here() -> bool:
        if netns.inode() == number:
            work()
            done.append(1)
        return bool(done)

    netns.visit(here)
    assert done


def test_exactly_the_stale_flows_of_a_former_proxy_go(
    kernel: None, missing: Callable[[str], None]
) -> None:
    if not shutil.which("nft"):
        missing("nft (nftables)")
    one, two = backend("127.0.0.1", 53), backend("127.0.0.2", 53)
    services: dict[Frontend, frozenset[Backend]] = {
        Frontend(to_address(VIP), 53, UDP): frozenset({one}),
        Frontend(to_address("fd00:96::1"), 53, UDP): frozenset({backend("fd00::9", 53)}),
    }
    before, after = [], []
    routes = ("ip route add local 10.96.0.0/16 dev lo", "ip -6 route add local fd00:96::/64 dev lo")
    with another_namespace(*routes, f"nft '{NAT}'") as other:
        number = inode_of(other.pid)

        def flow() -> None:
            assert netlink.flows() != [], "nobody has sent anything yet"

        def traffic() -> None:
            for family, address, port in (
                (socket.AF_INET, VIP, 53),  # to the one
                (socket.AF_INET, VIP, 53),  # to the other
                (socket.AF_INET, "10.96.0.2", 53),  # of no Service
                (socket.AF_INET6, "fd00:96::1", 53),
                (socket.AF_INET, "127.0.0.1", 54),  # no NAT
            ):
                with socket.socket(family, socket.SOCK_DGRAM) as client:
                    client.sendto(b"x", (address, port))

        in_namespace(number, traffic)
        in_namespace(number, flow)
        in_namespace(number, lambda: before.extend(netlink.flows()))
        doomed = stale_flows(before, services.get)
        in_namespace(number, lambda: after.append(netlink.delete_flows(doomed)))
        in_namespace(number, lambda: after.append(netlink.delete_flows(doomed)))
        left: list[Flow] = []
        in_namespace(number, lambda: left.extend(netlink.flows()))
    assert {(flow.vip, flow.peer) for flow in before} >= {
        (backend(VIP, 53), one),
        (backend(VIP, 53), two),
        (backend("10.96.0.2", 53), one),
        (backend("fd00:96::1", 53), backend("::1", 53)),
        (backend("127.0.0.1", 54), backend("127.0.0.1", 54)),
    }
    assert {(flow.vip, flow.peer) for flow in doomed} == {
        (backend(VIP, 53), two),
        (backend("fd00:96::1", 53), backend("::1", 53)),
    }
    assert after == [2, 0], "gone once; not there any more the second time"
    assert set(left) == set(before) - set(doomed)


def test_where_conntrack_is_not_used_there_are_no_flows(kernel: None) -> None:
    """In a namespace that no other test has loaded rules in."""
    with Pod() as pod:
        assert pod.run(netlink.flows) == []
        assert pod.run(netlink.delete_flows, []) == 0
