"""The DNS server through real sockets on loopback, with dnspython as the client."""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import dns.flags
import dns.message
import dns.opcode
import dns.query
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointsman.dns import DnsServer
from pointsman.dnslisten import DnsListenError, bind
from pointsman.dnsupstream import ResolvConf, upstreams_from_resolv_conf
from pointsman.objects import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    ObjectMeta,
    Service,
    ServicePort,
    ServiceSpec,
)
from pointsman.zone import Zone

Handler = Callable[[dns.message.Message, bool], "dns.message.Message | bytes | None"]
WEB = "web.default.svc.cluster.local"
BIG = "big.default.svc.cluster.local"
OUT = "out.default.svc.cluster.local"
WAIT = 60  # seconds until a client gives up, far beyond what any reply here takes


def service(name: str, ip: str = "", external: str = "") -> Service:
    spec = ServiceSpec(
        type="ExternalName" if external else "ClusterIP",
        cluster_ip=ip,
        external_name=external,
        ports=(ServicePort(name="http", port=80),),
    )
    return Service(metadata=ObjectMeta(name=name), spec=spec)


@pytest.fixture(scope="module")
def zone() -> Zone:
    zone = Zone()
    zone.put(service("web", "10.96.0.1"))
    zone.put(service("out", external="www.example.com"))
    many = EndpointSlice(
        metadata=ObjectMeta(name="big"),
        address_type="IPv4",
        ports=(EndpointPort(name="http", port=80),),
        endpoints=tuple(Endpoint(addresses=(f"10.1.{i >> 8}.{i & 255}",)) for i in range(3000)),
    )
    zone.put(service("big", "None"), [many])
    return zone


@contextmanager
def serving(server: DnsServer) -> Iterator[tuple[str, int]]:
    server.start()
    try:
        yield server.addresses[0]
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(zone: Zone) -> Iterator[DnsServer]:
    server = DnsServer(zone, [("127.0.0.1", 0), ("::1", 0)])
    with serving(server):
        yield server


class Upstream:
    """A resolver on 127.0.0.1, UDP and TCP, that replies as `handler` says and notes questions."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.asked: list[tuple[str, bool]] = []
        self.udp, self.tcp = bind("127.0.0.1", 0)
        for each in (self.udp, self.tcp):
            each.setblocking(True)
        self.tcp.listen()
        self.address: tuple[str, int] = self.tcp.getsockname()
        for target in (self._serve_udp, self._serve_tcp):
            threading.Thread(target=target, daemon=True).start()

    def _reply(self, wire: bytes, tcp: bool) -> bytes | None:
        query = dns.message.from_wire(wire)
        self.asked.append((query.question[0].to_text(), tcp))
        reply = self.handler(query, tcp)
        return reply.to_wire() if isinstance(reply, dns.message.Message) else reply

    def _serve_udp(self) -> None:
        while True:
            try:
                wire, client = self.udp.recvfrom(65535)
            except OSError:
                return
            if not wire:
                return
            if reply := self._reply(wire, False):
                self.udp.sendto(reply, client)

    def _serve_tcp(self) -> None:
        while True:
            try:
                conn, _ = self.tcp.accept()
            except OSError:
                return
            with conn, conn.makefile("rwb") as stream:
                size = stream.read(2)
                if size and (reply := self._reply(stream.read(int.from_bytes(size, "big")), True)):
                    stream.write(len(reply).to_bytes(2, "big") + reply)

    def close(self) -> None:
        for sock in (self.udp, self.tcp):
            # shutdown, because close alone does not wake a thread that waits in the kernel
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@pytest.fixture
def upstream() -> Iterator[Callable[[Handler], Upstream]]:
    made: list[Upstream] = []

    def make(handler: Handler) -> Upstream:
        made.append(Upstream(handler))
        return made[-1]

    yield make
    for one in made:
        one.close()


def good(query: dns.message.Message, tcp: bool) -> dns.message.Message:
    """Every A is 192.0.2.80."""
    reply = dns.message.make_response(query)
    if query.question[0].rdtype == dns.rdatatype.A:
        reply.answer.append(
            dns.rrset.from_text(query.question[0].name, 60, "IN", "A", "192.0.2.80")
        )
    return reply


def failing(rcode: dns.rcode.Rcode) -> Handler:
    def handler(query: dns.message.Message, tcp: bool) -> dns.message.Message:
        reply = dns.message.make_response(query)
        reply.set_rcode(rcode)
        return reply

    return handler


def silent(query: dns.message.Message, tcp: bool) -> None:
    return None


def ask(
    address: tuple[str, int], name: str, qtype: str = "A", *, tcp: bool = False, payload: int = 0
) -> dns.message.Message:
    query = dns.message.make_query(name, qtype, use_edns=bool(payload), payload=payload)
    send = dns.query.tcp if tcp else dns.query.udp
    return send(query, address[0], port=address[1], timeout=WAIT)


def addresses(message: dns.message.Message) -> list[str]:
    return [rdata.address for rrset in message.answer if rrset.rdtype == 1 for rdata in rrset]


@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
@pytest.mark.parametrize("listener", [0, 1], ids=["ipv4", "ipv6"])
def test_it_answers_on_every_address(server: DnsServer, listener: int, tcp: bool) -> None:
    reply = ask(server.addresses[listener], WEB, tcp=tcp)
    assert addresses(reply) == ["10.96.0.1"]
    assert reply.flags & dns.flags.AA
    assert not reply.flags & dns.flags.RA


@pytest.mark.parametrize(
    ("name", "qtype", "rcode"),
    [
        pytest.param(f"none.{WEB}", "A", dns.rcode.NXDOMAIN, id="nxdomain-inside"),
        pytest.param(WEB, "MX", dns.rcode.NOERROR, id="nodata-inside"),
        pytest.param("example.com", "A", dns.rcode.REFUSED, id="outside-without-upstreams"),
        pytest.param(WEB, "AXFR", dns.rcode.REFUSED, id="zone-transfer"),
    ],
)
def test_its_code_for(server: DnsServer, name: str, qtype: str, rcode: int) -> None:
    query = dns.message.make_query(name, qtype)
    reply = dns.query.udp(query, *_to(server), ignore_unexpected=True)
    assert reply.rcode() == rcode
    assert not reply.answer


def _to(server: DnsServer) -> tuple[str, float, int]:
    host, port = server.addresses[0]
    return host, WAIT, port


def raw(server: DnsServer, wire: bytes) -> dns.message.Message:
    """Send octets as they are. A good query behind them shows what was not replied to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(WAIT)
        sock.connect(server.addresses[0])
        sock.send(wire)
        good_one = dns.message.make_query(WEB, "A", id=0xBEEF)
        sock.send(good_one.to_wire())
        return dns.message.from_wire(sock.recv(65535), ignore_trailing=True)


QUERY = dns.message.make_query(WEB, "A", id=7).to_wire()
EDNS = dns.message.make_query(WEB, "A", id=7, use_edns=0).to_wire()


@pytest.mark.parametrize(
    ("wire", "rcode"),
    [
        pytest.param(QUERY[:20], dns.rcode.FORMERR, id="cut-off"),
        pytest.param(QUERY + b"x", dns.rcode.FORMERR, id="octets-behind"),
        pytest.param(QUERY[:4] + bytes(8), dns.rcode.FORMERR, id="no-question"),
        pytest.param(QUERY[:5] + b"\2" + QUERY[6:] + QUERY[12:], dns.rcode.FORMERR, id="two"),
        pytest.param(QUERY[:12] + b"\xc0\x0c" + QUERY[-4:], dns.rcode.FORMERR, id="pointer-loop"),
        pytest.param(QUERY[:12] + b"\xc0\x04" + QUERY[-4:], dns.rcode.FORMERR, id="pointer-back"),
        pytest.param(QUERY[:12] + b"\x7fabc" + QUERY[-4:], dns.rcode.FORMERR, id="label-type"),
        pytest.param(
            EDNS[:11] + b"\2" + EDNS[12:] + EDNS[-11:], dns.rcode.FORMERR, id="two-opt-records"
        ),
        pytest.param(
            QUERY[:10] + b"\xff\xff" + QUERY[12:], dns.rcode.FORMERR, id="65535-more-records"
        ),
        pytest.param(
            QUERY[:11] + b"\x09" + QUERY[12:] + 9 * (b"\0\0\1\0\1" + bytes(6)),
            dns.rcode.FORMERR,
            id="nine-more-records",
        ),
        pytest.param(QUERY[:2] + b"\x28" + QUERY[3:], dns.rcode.NOTIMP, id="opcode-update"),
        pytest.param(QUERY[:-1] + b"\3", dns.rcode.REFUSED, id="class-chaos"),
        pytest.param(EDNS[:-5] + b"\1" + EDNS[-4:], dns.rcode.BADVERS, id="edns-version-1"),
    ],
)
def test_an_odd_message_gets_a_code(server: DnsServer, wire: bytes, rcode: int) -> None:
    reply = raw(server, wire)
    assert reply.id == 7
    assert reply.rcode() == rcode


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(b"", id="empty"),
        pytest.param(QUERY[:11], id="less-than-a-header"),
        pytest.param(QUERY[:2] + b"\x81" + QUERY[3:], id="a-reply"),
    ],
)
def test_what_is_no_query_gets_no_reply(server: DnsServer, wire: bytes) -> None:
    assert raw(server, wire).id == 0xBEEF


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(junk=st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(lambda b: QUERY[:12] + b)))
def test_any_octets_leave_it_answering_without_an_error_of_its_own(
    server: DnsServer, junk: bytes
) -> None:
    raw(server, junk)
    with socket.create_connection(server.addresses[0], timeout=WAIT) as conn:
        conn.sendall(len(junk).to_bytes(2, "big") + junk)
    assert addresses(ask(server.addresses[0], WEB)) == ["10.96.0.1"]
    assert server.counters.errors == 0


@pytest.mark.parametrize(
    ("payload", "limit"),
    [
        pytest.param(0, 512, id="no-edns"),
        pytest.param(100, 512, id="less-than-512-is-512"),
        pytest.param(900, 900, id="as-asked"),
        pytest.param(4096, 1232, id="capped"),
    ],
)
def test_over_udp_it_sends_what_fits_and_sets_tc(
    server: DnsServer, payload: int, limit: int
) -> None:
    reply = ask(server.addresses[0], BIG, payload=payload)
    assert reply.flags & dns.flags.TC
    assert limit - 16 < len(reply.wire or b"") <= limit  # another record of 16 has no room
    assert len(addresses(reply)) == (limit - 12 - 35 - 11 * bool(payload)) // 16
    assert reply.edns == (0 if payload else -1)


def test_over_tcp_all_of_a_large_service_comes(server: DnsServer) -> None:
    reply = ask(server.addresses[0], BIG, tcp=True)
    assert len(set(addresses(reply))) == 3000
    assert not reply.flags & dns.flags.TC


def test_every_endpoint_gets_to_be_first(server: DnsServer) -> None:
    firsts = {addresses(ask(server.addresses[0], BIG, payload=512))[0] for _ in range(5)}
    assert len(firsts) == 5


def test_one_connection_carries_many_queries(server: DnsServer) -> None:
    with socket.create_connection(server.addresses[0], timeout=WAIT) as conn:
        for number in range(20):
            wire = dns.message.make_query(WEB, "A", id=number).to_wire()
            conn.sendall(len(wire).to_bytes(2, "big") + wire)
        conn.shutdown(socket.SHUT_WR)  # replies still come after the client's last word
        seen = {dns.query.receive_tcp(conn)[0].id for _ in range(20)}
        assert seen == set(range(20))
        assert conn.recv(1) == b""


def test_a_silent_connection_is_closed(zone: Zone) -> None:
    server = DnsServer(zone, [("127.0.0.1", 0)], idle=0.05)
    with serving(server) as address, socket.create_connection(address, timeout=WAIT) as conn:
        conn.sendall(b"\0")  # half a length
        assert conn.recv(1) == b""


def test_connections_beyond_the_limit_are_closed_and_others_go_on(zone: Zone) -> None:
    server = DnsServer(zone, [("127.0.0.1", 0)], max_connections=1)
    with serving(server) as address, socket.create_connection(address, timeout=WAIT) as first:
        wire = dns.message.make_query(WEB, "A").to_wire()
        first.sendall(len(wire).to_bytes(2, "big") + wire)
        dns.query.receive_tcp(first)
        with (
            socket.create_connection(address, timeout=WAIT) as second,
            pytest.raises((ConnectionError, EOFError)),
        ):
            second.sendall(len(wire).to_bytes(2, "big") + wire)
            dns.query.receive_tcp(second)
        first.sendall(len(wire).to_bytes(2, "big") + wire)
        assert addresses(dns.query.receive_tcp(first)[0]) == ["10.96.0.1"]
    assert server.counters.dropped == 1


@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
def test_outside_names_are_forwarded_the_way_they_came(
    zone: Zone, upstream: Callable[[Handler], Upstream], tcp: bool
) -> None:
    resolver = upstream(good)
    server = DnsServer(zone, [("127.0.0.1", 0)], [resolver.address])
    with serving(server) as address:
        reply = ask(address, "example.com", tcp=tcp)
    assert addresses(reply) == ["192.0.2.80"]
    assert resolver.asked == [("example.com. IN A", tcp)]
    assert server.counters.forwarded == 1
    assert server.counters.queries == {"NOERROR": 1}


def test_inside_names_are_not_forwarded(
    zone: Zone, upstream: Callable[[Handler], Upstream]
) -> None:
    resolver = upstream(good)
    with serving(DnsServer(zone, [("127.0.0.1", 0)], [resolver.address])) as address:
        reply = ask(address, f"none.{WEB}")
    assert reply.rcode() == dns.rcode.NXDOMAIN
    assert reply.flags & dns.flags.RA
    assert resolver.asked == []


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(silent, id="silent"),
        pytest.param(failing(dns.rcode.SERVFAIL), id="servfail"),
        pytest.param(failing(dns.rcode.REFUSED), id="refused"),
        pytest.param(lambda q, tcp: dns.message.make_response(q).to_wire()[:5], id="garbage"),
        pytest.param(lambda q, tcp: b"\0\0" + good(q, tcp).to_wire()[2:], id="other-id"),
        pytest.param(
            lambda q, tcp: good(dns.message.make_query("evil.com", "A", id=q.id), tcp),
            id="other-question",
        ),
        pytest.param(lambda q, tcp: q, id="echo"),
    ],
)
@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
def test_the_next_upstream_is_asked_after_one_that_is(
    zone: Zone, upstream: Callable[[Handler], Upstream], first: Handler, tcp: bool
) -> None:
    bad, fine = upstream(first), upstream(good)
    server = DnsServer(zone, [("127.0.0.1", 0)], [bad.address, fine.address])
    with serving(server) as address:
        reply = ask(address, "example.com", tcp=tcp)
    assert addresses(reply) == ["192.0.2.80"]
    assert bad.asked
    assert server.counters.upstream_errors == 1


def test_a_dead_upstream_is_servfail(zone: Zone) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        server = DnsServer(zone, [("127.0.0.1", 0)], [taken.getsockname()], timeout=0.05)
        with serving(server) as address:
            assert ask(address, "example.com").rcode() == dns.rcode.SERVFAIL
            assert addresses(ask(address, WEB)) == ["10.96.0.1"]


def test_strangers_get_inside_names_only(
    zone: Zone, upstream: Callable[[Handler], Upstream]
) -> None:
    resolver = upstream(good)
    server = DnsServer(zone, [("127.0.0.1", 0)], [resolver.address], allow=["10.0.0.0/8"])
    with serving(server) as address:
        query = dns.message.make_query("example.com", "A")
        stranger = {"port": address[1], "timeout": WAIT, "source": "127.0.0.2"}
        assert dns.query.udp(query, address[0], **stranger).rcode() == dns.rcode.REFUSED
        inside = dns.query.udp(dns.message.make_query(WEB, "A"), address[0], **stranger)
        assert addresses(inside) == ["10.96.0.1"]
        assert not inside.flags & dns.flags.RA
        assert addresses(ask(address, "example.com")) == ["192.0.2.80"]  # from a listen address
    assert len(resolver.asked) == 1


def test_it_never_forwards_to_itself(zone: Zone) -> None:
    with serving(DnsServer(zone, [("127.0.0.1", 0)])) as free:
        port = free[1]
    server = DnsServer(
        zone,
        [("127.0.0.1", port)],
        [("127.0.0.1", port), ("10.96.0.10", 53), ("fd00:0::10", 53)],
        own=["10.96.0.10", "fd00::10"],
    )
    with serving(server) as address:
        assert server.upstreams == []
        assert ask(address, "example.com").rcode() == dns.rcode.REFUSED


def test_upstreams_may_come_and_change_while_it_runs(
    zone: Zone, upstream: Callable[[Handler], Upstream]
) -> None:
    """A node's network is up after its agent, and gets other resolvers with another lease."""
    one, other = upstream(good), upstream(good)
    given: list[tuple[str, int]] = []
    with serving(DnsServer(zone, [("127.0.0.1", 0)], lambda: given)) as address:
        assert ask(address, "example.com").rcode() == dns.rcode.REFUSED
        given = [("127.0.0.1", address[1]), one.address]
        assert addresses(ask(address, "example.com")) == ["192.0.2.80"]
        assert (len(one.asked), len(other.asked)) == (1, 0)
        given = [other.address]
        assert addresses(ask(address, "example.com")) == ["192.0.2.80"]
        assert (len(one.asked), len(other.asked)) == (1, 1)


def test_an_external_name_is_resolved_upstream(
    zone: Zone, upstream: Callable[[Handler], Upstream]
) -> None:
    def aliased(query: dns.message.Message, tcp: bool) -> dns.message.Message:
        reply = dns.message.make_response(query)
        if not tcp:
            reply.flags |= dns.flags.TC
            return reply
        name = query.question[0].name
        reply.answer.append(dns.rrset.from_text(name, 60, "IN", "CNAME", "cdn.example.com."))
        reply.answer.append(dns.rrset.from_text("cdn.example.com.", 60, "IN", "A", "192.0.2.9"))
        return reply

    resolver = upstream(aliased)
    with serving(DnsServer(zone, [("127.0.0.1", 0)], [resolver.address])) as address:
        reply = ask(address, OUT)
    assert [rrset.to_text() for rrset in reply.answer] == [
        f"{OUT}. 5 IN CNAME www.example.com.",
        "www.example.com. 60 IN CNAME cdn.example.com.",
        "cdn.example.com. 60 IN A 192.0.2.9",
    ]
    assert [tcp for _, tcp in resolver.asked] == [False, True]


@pytest.mark.parametrize("rcode", [dns.rcode.SERVFAIL, dns.rcode.NXDOMAIN])
def test_an_external_name_upstream_can_not_resolve_keeps_its_cname_and_the_code(
    zone: Zone, upstream: Callable[[Handler], Upstream], rcode: dns.rcode.Rcode
) -> None:
    resolver = upstream(failing(rcode))
    with serving(DnsServer(zone, [("127.0.0.1", 0)], [resolver.address])) as address:
        reply = ask(address, OUT)
    assert reply.rcode() == rcode
    assert reply.answer[0].rdtype == dns.rdatatype.CNAME


def test_an_upstream_reply_that_can_not_be_read_is_servfail(
    zone: Zone, upstream: Callable[[Handler], Upstream]
) -> None:
    def junk(query: dns.message.Message, tcp: bool) -> bytes:
        wire = dns.message.make_response(query).to_wire()
        return wire[:6] + struct.pack("!H", 9) + wire[8:]

    resolver = upstream(junk)
    server = DnsServer(zone, [("127.0.0.1", 0)], [resolver.address])
    with serving(server) as address:
        assert ask(address, OUT).rcode() == dns.rcode.SERVFAIL
    assert server.counters.upstream_errors == 1
    assert server.counters.errors == 0


def test_stop_does_not_wait_for_upstreams(
    zone: Zone, upstream: Callable[[Handler], Upstream]
) -> None:
    asked = threading.Event()

    def hear(query: dns.message.Message, tcp: bool) -> None:
        asked.set()

    resolver = upstream(hear)
    server = DnsServer(zone, [("127.0.0.1", 0)], [resolver.address], timeout=1000)
    before = set(threading.enumerate())
    with serving(server) as address, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(dns.message.make_query("example.com", "A").to_wire(), address)
        assert asked.wait(WAIT)
    assert set(threading.enumerate()) <= before


def test_more_forwards_than_allowed_are_servfail_at_once(
    zone: Zone, upstream: Callable[[Handler], Upstream]
) -> None:
    resolver = upstream(silent)
    server = DnsServer(zone, [("127.0.0.1", 0)], [resolver.address], timeout=1000, max_forwards=1)
    with serving(server) as address, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(WAIT)
        for number in (1, 2):
            sock.sendto(dns.message.make_query("example.com", "A", id=number).to_wire(), address)
        reply = dns.message.from_wire(sock.recv(65535))
    assert (reply.id, reply.rcode()) == (2, dns.rcode.SERVFAIL)


def test_an_error_of_its_own_is_logged_and_servfail(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Zone):
        def lookup(self, qname: object, qtype: int) -> NoReturn:
            raise RuntimeError("broken zone")

    server = DnsServer(Broken(), [("127.0.0.1", 0)])
    with serving(server) as address:
        assert ask(address, WEB).rcode() == dns.rcode.SERVFAIL
        assert ask(address, WEB, tcp=True).rcode() == dns.rcode.SERVFAIL
    assert server.counters.errors == 2
    assert "broken zone" in caplog.text


def test_an_address_in_use_names_itself_and_the_mend(zone: Zone, server: DnsServer) -> None:
    host, port = server.addresses[0]
    with pytest.raises(DnsListenError, match=rf"{host} port {port}: .*listen elsewhere") as caught:
        DnsServer(zone, [("::1", 0), (host, port)]).start()
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize(
    ("host", "text"),
    [
        pytest.param("0.0.0.0", "replies might leave from another address", id="wildcard"),
        pytest.param("::", "replies might leave from another address", id="wildcard-ipv6"),
        pytest.param("localhost", "'localhost' is no IP address", id="name"),
        pytest.param("192.0.2.1", "no device of this host has the address", id="not-ours"),
    ],
)
def test_it_listens_on_given_addresses_of_this_host_only(zone: Zone, host: str, text: str) -> None:
    with pytest.raises(DnsListenError, match=text):
        DnsServer(zone, [(host, 0)]).start()


def test_after_stop_the_port_is_free_and_it_can_start_again(zone: Zone) -> None:
    server = DnsServer(zone, [("127.0.0.1", 0)])
    with serving(server) as address:
        assert ask(address, WEB)
    server.stop()
    again = DnsServer(zone, [address])
    with serving(again):
        assert addresses(ask(address, WEB, tcp=True)) == ["10.96.0.1"]
    with serving(again):
        assert addresses(ask(address, WEB)) == ["10.96.0.1"]


def test_resolv_conf(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(
        "# nameserver 192.0.2.9\nsearch example.com\nnameserver 192.0.2.1\n"
        "nameserver\tfe80::1%lo trailing\nnameserver not-an-address\nnameserver\noptions ndots:5\n"
    )
    assert upstreams_from_resolv_conf(str(path)) == [("192.0.2.1", 53), ("fe80::1%lo", 53)]
    assert upstreams_from_resolv_conf(str(tmp_path / "none")) == []


def test_resolv_conf_is_followed(tmp_path: Path) -> None:
    path, new = tmp_path / "resolv.conf", tmp_path / "new"
    servers = ResolvConf(str(path))
    assert servers() == []
    path.symlink_to(tmp_path / "of-a-daemon")  # which has not started yet
    assert servers() == []
    (tmp_path / "of-a-daemon").write_text("nameserver 192.0.2.1\n")
    assert servers() == [("192.0.2.1", 53)]
    assert servers() is servers()
    new.write_text("nameserver 192.0.2.2\n")
    new.rename(path)
    assert servers() == [("192.0.2.2", 53)]
    path.write_text("")
    assert servers() == [("192.0.2.2", 53)]
    path.write_text("search example.com\nnameserver 192.0.2.3\n")
    assert servers() == [("192.0.2.3", 53)]
    path.unlink()
    assert servers() == [("192.0.2.3", 53)]
