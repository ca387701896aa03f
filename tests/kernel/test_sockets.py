"""What a program sees that connects and sends to a Service: every kind of socket."""

from __future__ import annotations

import errno
import ipaddress
import random
import socket

import pytest

from pointsman.maps import take_over
from pointsman.marks import bit_of
from pointsman.values import Frontend, PortName, to_address
from tests.support.kernel import (
    LINUX,
    REFUSED,
    TCP,
    UDP,
    Lab,
    arrived,
    entry,
    tcp_server,
    udp_server,
)
from tests.support.pods import cookie_of

pytestmark = pytest.mark.kernel

FAMILIES = [
    pytest.param(socket.AF_INET, "10.96.0.1", "127.0.0.1", "10.96.0.1", id="IPv4"),
    pytest.param(socket.AF_INET6, "fd00:96::1", "::1", "fd00:96::1", id="IPv6"),
    pytest.param(socket.AF_INET6, "10.96.0.1", "127.0.0.1", "::ffff:10.96.0.1", id="IPv4-mapped"),
]


@pytest.mark.parametrize(("family", "vip", "server_address", "dialled"), FAMILIES)
def test_tcp_reaches_the_endpoint_and_sees_the_vip(
    lab: Lab, family: int, vip: str, server_address: str, dialled: str
) -> None:
    with tcp_server(server_address) as (server, port), socket.socket(family) as client:
        lab.serve(vip, 80, TCP, (server_address, port))
        client.connect((dialled, 80))
        accepted, _ = server.accept()
        accepted.send(b"hello")
        assert client.recv(9) == b"hello"
        assert client.getpeername()[:2] == (dialled, 80)
        assert lab.open(server_address, port) == 1
        accepted.close()


@pytest.mark.parametrize(("family", "vip", "server_address", "dialled"), FAMILIES)
def test_connected_udp_reaches_the_endpoint_and_sees_the_vip(
    lab: Lab, family: int, vip: str, server_address: str, dialled: str
) -> None:
    with (
        udp_server(server_address) as (server, port),
        socket.socket(family, socket.SOCK_DGRAM) as client,
    ):
        lab.serve(vip, 53, UDP, (server_address, port))
        client.connect((dialled, 53))
        client.send(b"ask")
        data, source = server.recvfrom(9)
        server.sendto(data, source)
        data, source = client.recvfrom(9)
        assert (data, source[:2]) == (b"ask", (dialled, 53))
        assert client.getpeername()[:2] == (dialled, 53)
        assert lab.open(server_address, port) == 1


@pytest.mark.parametrize(("family", "vip", "server_address", "dialled"), FAMILIES)
def test_unconnected_udp_reaches_the_endpoint_and_the_answer_comes_from_the_vip(
    lab: Lab, family: int, vip: str, server_address: str, dialled: str
) -> None:
    with (
        udp_server(server_address) as (server, port),
        socket.socket(family, socket.SOCK_DGRAM) as client,
    ):
        lab.serve(vip, 53, UDP, (server_address, port))
        client.sendto(b"ask", (dialled, 53))
        data, source = server.recvfrom(9)
        server.sendto(data, source)
        data, source = client.recvfrom(9)
        assert (data, source[:2]) == (b"ask", (dialled, 53))


@pytest.mark.parametrize(("family", "vip", "server_address", "dialled"), FAMILIES)
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["TCP", "UDP"])
def test_a_service_without_endpoints_refuses_at_once(
    lab: Lab, kind: int, family: int, vip: str, server_address: str, dialled: str
) -> None:
    lab.serve(vip, 80, TCP if kind == socket.SOCK_STREAM else UDP)
    with socket.socket(family, kind) as client:
        with pytest.raises(REFUSED):
            client.connect((dialled, 80))
        if kind == socket.SOCK_DGRAM:
            with pytest.raises(REFUSED):
                client.sendto(b"x", (dialled, 80))


@pytest.mark.parametrize(("family", "vip", "server_address", "dialled"), FAMILIES)
def test_an_undefined_port_of_a_known_vip_refuses_at_once(
    lab: Lab, family: int, vip: str, server_address: str, dialled: str
) -> None:
    lab.serve(vip, 80, TCP, (server_address, 1))
    before = lab.maps.counters()["undefined_port"]
    with socket.socket(family) as client, pytest.raises(REFUSED):
        client.connect((dialled, 81))
    with socket.socket(family, socket.SOCK_DGRAM) as client, pytest.raises(REFUSED):
        client.sendto(b"x", (dialled, 80))  # TCP is defined, UDP is not
    assert lab.maps.counters()["undefined_port"] == before + 2


def test_an_empty_set_under_a_policy_is_unreachable_not_refused(lab: Lab) -> None:
    from pointsman.values import PortName
    from tests.support.kernel import entry

    lab.set("web", entry("10.96.0.1", 80, TCP, (), PortName("default", "web", "p"), empty=1))
    with socket.socket() as client, pytest.raises(OSError) as caught:
        client.connect(("10.96.0.1", 80))
    assert caught.value.errno == (errno.EHOSTUNREACH if LINUX >= (5, 18) else errno.EPERM)


def test_what_is_not_a_service_is_untouched(lab: Lab) -> None:
    lab.serve("10.96.0.1", 80, TCP, ("127.0.0.1", 1))
    with tcp_server() as (server, port), socket.socket() as client:
        client.connect(("127.0.0.1", port))
        assert client.getpeername() == ("127.0.0.1", port)
        assert lab.records() == 0
        server.accept()[0].close()
    with socket.socket() as client, pytest.raises(OSError) as caught:
        client.connect(("10.96.0.2", 80))
    assert caught.value.errno == errno.ENETUNREACH


def test_a_process_outside_of_the_cgroup_is_untouched(lab: Lab) -> None:
    with tcp_server() as (_, port):
        lab.serve("10.96.0.1", 80, TCP, ("127.0.0.1", port))
        lab.cgroup.leave()
        with socket.socket() as client, pytest.raises(OSError) as caught:
            client.connect(("10.96.0.1", 80))
    assert caught.value.errno == errno.ENETUNREACH


def test_every_endpoint_gets_its_share(lab: Lab) -> None:
    with tcp_server() as (one, port_one), tcp_server() as (two, port_two):
        lab.serve("10.96.0.1", 80, TCP, ("127.0.0.1", port_one), ("127.0.0.1", port_two))
        for server in (one, two):
            server.setblocking(False)
        clients = [socket.create_connection(("10.96.0.1", 80)) for _ in range(200)]
        shares = [lab.open("127.0.0.1", port) for port in (port_one, port_two)]
        # The chance of fewer than 50 of 200 with two equal endpoints is below 1 in 10^12.
        assert sum(shares) == 200 and min(shares) > 50
        for client in clients:
            client.close()
        assert lab.open("127.0.0.1", port_one) == lab.open("127.0.0.1", port_two) == 0


class TestUnconnectedUDP:
    """One socket, one endpoint for each VIP, while that endpoint is valid."""

    def test_every_send_to_a_vip_goes_to_the_same_endpoint(self, lab: Lab) -> None:
        with (
            udp_server() as (one, port_one),
            udp_server() as (two, port_two),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            lab.serve("10.96.0.1", 53, UDP, ("127.0.0.1", port_one), ("127.0.0.1", port_two))
            for _ in range(40):
                client.sendto(b"x", ("10.96.0.1", 53))
            assert sorted(map(len, received(40, one, two))) == [0, 40]

    def test_the_choice_survives_a_change_of_the_other_endpoints(self, lab: Lab) -> None:
        with (
            udp_server() as (one, port_one),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            lab.serve("10.96.0.1", 53, UDP, ("127.0.0.1", port_one))
            client.sendto(b"x", ("10.96.0.1", 53))
            others = [("127.0.0.1", 1000 + i) for i in range(20)]
            lab.serve("10.96.0.1", 53, UDP, ("127.0.0.1", port_one), *others)
            for _ in range(20):
                client.sendto(b"x", ("10.96.0.1", 53))
            # All went there: what goes elsewhere never comes.
            assert received(21, one) == ([b"x"] * 21,)

    def test_an_endpoint_that_left_is_replaced_with_the_next_send(self, lab: Lab) -> None:
        with (
            udp_server() as (one, port_one),
            udp_server() as (two, port_two),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            lab.serve("10.96.0.1", 53, UDP, ("127.0.0.1", port_one))
            client.sendto(b"x", ("10.96.0.1", 53))
            lab.serve("10.96.0.1", 53, UDP, ("127.0.0.1", port_two))
            client.sendto(b"y", ("10.96.0.1", 53))
            assert received(2, one, two) == ([b"x"], [b"y"])

    def test_an_endpoint_that_left_is_replaced_though_its_slot_is_used_again(
        self, lab: Lab
    ) -> None:
        """The set's number is the same as before: only the endpoint's own generation tells."""
        with (
            udp_server() as (one, port_one),
            udp_server() as (two, port_two),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            lab.serve("10.96.0.1", 53, UDP, ("127.0.0.1", port_one))
            service = lab.maps.find(Frontend(to_address("10.96.0.1"), 53, UDP)) or 0
            before = lab.maps.service(service)
            client.sendto(b"x", ("10.96.0.1", 53))
            lab.serve("10.96.0.1", 53, UDP, ("127.0.0.9", port_two))
            lab.serve("10.96.0.1", 53, UDP, ("127.0.0.1", port_two))
            assert lab.maps.service(service).first == before.first
            client.sendto(b"y", ("10.96.0.1", 53))
            assert received(2, one, two) == ([b"x"], [b"y"])

    def test_an_endpoint_that_left_this_set_alone_is_replaced(self, lab: Lab) -> None:
        """It goes on in another set of the same port: a NodePort's, when the policy is Local."""
        owner = PortName("default", "web", "p")
        with (
            udp_server() as (one, port_one),
            udp_server() as (two, port_two),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            both = [("127.0.0.1", port_one), ("127.0.0.1", port_two)]
            lab.set(
                "web",
                entry("10.96.0.1", 53, UDP, both[:1], owner),
                entry("10.96.0.2", 53, UDP, both, owner),
            )
            client.sendto(b"x", ("10.96.0.1", 53))
            lab.set(
                "web",
                entry("10.96.0.1", 53, UDP, both[1:], owner),
                entry("10.96.0.2", 53, UDP, both, owner),
            )
            client.sendto(b"y", ("10.96.0.1", 53))
            assert received(2, one, two) == ([b"x"], [b"y"])

    def test_a_vip_that_changes_hands_takes_its_sockets_along(self, lab: Lab) -> None:
        """The endpoint is still valid, but for another VIP: the choice must not be used."""
        with (
            udp_server() as (one, port_one),
            udp_server() as (two, port_two),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            a, b = PortName("default", "a", "p"), PortName("default", "b", "p")
            first = entry("10.96.0.1", 53, UDP, [("127.0.0.1", port_one)], a)
            second = entry("10.96.0.2", 53, UDP, [("127.0.0.1", port_one)], a)
            lab.set("a", first, second)
            client.sendto(b"x", ("10.96.0.1", 53))
            lab.set("a", second)
            lab.set("b", entry("10.96.0.1", 53, UDP, [("127.0.0.1", port_two)], b))
            client.sendto(b"y", ("10.96.0.1", 53))
            assert received(2, one, two) == ([b"x"], [b"y"])

    def test_several_vips_on_one_socket_answer_each_as_itself(self, lab: Lab) -> None:
        with UdpServers(4) as servers:
            for i, (_, port) in enumerate(servers, 1):
                lab.serve(f"10.96.0.{i}", 53, UDP, ("127.0.0.1", port), name=f"s{i}")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                for i in range(1, 5):
                    client.sendto(b"%d" % i, (f"10.96.0.{i}", 53))
                for server, _ in reversed(servers):
                    data, source = server.recvfrom(9)
                    server.sendto(data, source)
                for _ in servers:
                    data, source = client.recvfrom(9)
                    assert source == (f"10.96.0.{int(data)}", 53)

    def test_the_oldest_choice_goes_when_there_are_more_than_four(self, lab: Lab) -> None:
        with UdpServers(6) as servers:
            for i, (_, port) in enumerate(servers, 1):
                lab.serve(f"10.96.0.{i}", 53, UDP, ("127.0.0.1", port), name=f"s{i}")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                for i in range(1, 7):
                    client.sendto(b"%d" % i, (f"10.96.0.{i}", 53))
                for i, (server, port) in enumerate(servers, 1):
                    data, source = server.recvfrom(9)
                    server.sendto(data, source)
                    # The two oldest are forgotten: their answers come as they are.
                    expected = (f"10.96.0.{i}", 53) if i > 2 else ("127.0.0.1", port)
                    assert client.recvfrom(9)[1] == expected

    def test_a_datagram_of_no_service_keeps_its_source(self, lab: Lab) -> None:
        with (
            udp_server() as (server, port),
            udp_server() as (stranger, stranger_port),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            lab.serve("10.96.0.1", 53, UDP, ("127.0.0.1", port))
            client.sendto(b"x", ("10.96.0.1", 53))
            _, source = server.recvfrom(9)
            stranger.sendto(b"y", source)
            assert client.recvfrom(9) == (b"y", ("127.0.0.1", stranger_port))

    def test_two_vips_with_one_endpoint_answer_as_the_last_one_asked(self, lab: Lab) -> None:
        with (
            udp_server() as (server, port),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            lab.serve("10.96.0.1", 53, UDP, ("127.0.0.1", port), name="a")
            lab.serve("10.96.0.2", 53, UDP, ("127.0.0.1", port), name="b")
            for vip in ("10.96.0.1", "10.96.0.2", "10.96.0.1"):
                client.sendto(b"x", (vip, 53))
                data, source = server.recvfrom(9)
                server.sendto(data, source)
                assert client.recvfrom(9)[1] == (vip, 53)

    def test_sendto_on_a_connected_socket_is_translated_too(self, lab: Lab) -> None:
        with (
            udp_server() as (one, port_one),
            udp_server() as (two, port_two),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            lab.serve("10.96.0.1", 53, UDP, ("127.0.0.1", port_one), name="a")
            lab.serve("10.96.0.2", 53, UDP, ("127.0.0.1", port_two), name="b")
            client.connect(("10.96.0.1", 53))
            client.sendto(b"x", ("10.96.0.2", 53))
            client.send(b"y")
            assert received(2, one, two) == ([b"y"], [b"x"])


def received(count: int, *servers: socket.socket) -> tuple[list[bytes], ...]:
    """So many datagrams, by the server that they came to."""
    return tuple([data for data, _ in came] for came in arrived(count, *servers))


class UdpServers:
    """Several UDP servers."""

    def __init__(self, count: int) -> None:
        self._managers = [udp_server() for _ in range(count)]

    def __enter__(self) -> list[tuple[socket.socket, int]]:
        return [manager.__enter__() for manager in self._managers]

    def __exit__(self, *error: object) -> None:
        for manager in self._managers:
            manager.__exit__(*error)


class TestMarks:
    """Most addresses have no frontend, and one bit says so."""

    def test_the_agent_and_the_programs_mean_the_same_bit(self, lab: Lab) -> None:
        numbers = random.Random(1)
        vips = [
            str(ipaddress.IPv4Address(0x0A600000 + numbers.randrange(1 << 20))) for _ in range(99)
        ]
        vips += [
            str(ipaddress.IPv6Address((0xFD00 << 112) + numbers.getrandbits(96))) for _ in range(99)
        ]
        owner = PortName("default", "web", "p")
        lab.set(
            "web",
            *(
                entry(vip, 53, UDP, [("fd00:244::1" if ":" in vip else "127.0.0.1", 9)], owner)
                for vip in vips
            ),
        )
        for vip in vips:
            family = socket.AF_INET6 if ":" in vip else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as client:
                client.connect((vip, 53))
                assert client.getpeername()[0] == vip
                assert lab.peer_of(cookie_of(client)), vip

    def test_an_address_without_its_mark_is_let_go(self, lab: Lab) -> None:
        """The bits are asked, and first: else they would prove nothing."""
        lab.serve("10.96.0.1", 53, UDP, ("127.0.0.1", 9))
        index = bit_of(to_address("10.96.0.1"), lab.maps.limits.marks) >> 6
        word = lab.maps.marks()[index]
        lab.maps.mark([(index, 0)])
        try:
            with (
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
                pytest.raises(OSError, match="unreachable"),
            ):
                client.connect(("10.96.0.1", 53))
        finally:
            lab.maps.mark([(index, word)])

    def test_marks_of_a_former_agent_are_put_right(self, lab: Lab) -> None:
        lab.serve("10.96.0.1", 53, UDP, ("127.0.0.1", 9))
        right = lab.maps.marks()
        index = next(iter(right))
        lab.maps.mark([(index, 0), (index ^ 1, 1 << 63 | right.get(index ^ 1, 0))])
        lab.planner = take_over(lab.maps)
        lab._apply(lab.planner.replace(lab.wanted))
        assert lab.maps.marks() == right
