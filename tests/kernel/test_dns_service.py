"""The built-in DNS server behind its own ClusterIP, asked by programs that know only that."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable

import dns.exception
import dns.message
import dns.query
import dns.rcode
import dns.rdatatype
import pytest

from tests.kernel.reach import everyone
from tests.support.agents import AgentProcess, endpoints, service
from tests.support.kernel import REFUSED, until

pytestmark = pytest.mark.kernel

SERVER, WEB = "10.96.0.10", "10.96.4.1"
ZONE = "svc.cluster.local"
Ask = Callable[..., dns.message.Message]


def ask_udp(name: str, kind: str = "A", where: str = SERVER) -> dns.message.Message:
    # dnspython itself refuses an answer from any other address than the one it asked.
    return dns.query.udp(
        dns.message.make_query(name, kind), where, timeout=30, ignore_unexpected=False
    )


def ask_tcp(name: str, kind: str = "A", where: str = SERVER) -> dns.message.Message:
    return dns.query.tcp(dns.message.make_query(name, kind), where, timeout=30)


def addresses(answer: dns.message.Message, kind: str = "A") -> list[str]:
    wanted = dns.rdatatype.from_text(kind)
    return sorted(
        record.address for found in answer.answer if found.rdtype == wanted for record in found
    )


@pytest.fixture(params=[ask_udp, ask_tcp], ids=["udp", "tcp"])
def ask(request: pytest.FixtureRequest) -> Ask:
    found: Ask = request.param
    return found


def start(node: AgentProcess) -> None:
    node.start("--dns-upstream", "off", dns="127.0.0.1:0")


def headless(name: str) -> str:
    return service(name, '"None"')


def test_a_client_resolves_a_service_through_the_cluster_ip_and_connects_to_what_it_got(
    node: AgentProcess, ask: Ask
) -> None:
    with everyone() as servers:
        node.write("web.yaml", service("web", WEB))
        node.write("slices.yaml", endpoints("web", ("10.244.0.1", servers.port)))
        start(node)
        answer = ask(f"web.default.{ZONE}")
        assert answer.rcode() == dns.rcode.NOERROR
        assert addresses(answer) == [WEB]
        assert servers.reached(addresses(answer)[0]) == "10.244.0.1"
        status = json.loads(node.cli("status", "-o", "json").stdout)
        assert status["dns"]["clusterIPs"] == [SERVER]
        shown = json.loads(node.cli("get", "services", "kube-dns", "-o", "json").stdout)["items"]
        assert [(s["namespace"], s["clusterIPs"]) for s in shown] == [("kube-system", [SERVER])]


def test_an_answer_comes_from_the_cluster_ip_on_any_kind_of_socket(node: AgentProcess) -> None:
    node.write("web.yaml", service("web", WEB))
    start(node)
    query = dns.message.make_query(f"web.default.{ZONE}", "A").to_wire()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unconnected:
        unconnected.settimeout(30)
        unconnected.sendto(query, (SERVER, 53))
        data, source = unconnected.recvfrom(4096)
        assert source == (SERVER, 53)
        assert addresses(dns.message.from_wire(data)) == [WEB]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connected:
        connected.settimeout(30)
        connected.connect((SERVER, 53))
        connected.send(query)
        data, source = connected.recvfrom(4096)
        assert source == (SERVER, 53)
        assert connected.getpeername() == (SERVER, 53)
    # As a resolver for IPv6 sockets does it: the mapped form of the same address.
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as mapped:
        mapped.settimeout(30)
        mapped.sendto(query, (f"::ffff:{SERVER}", 53))
        data, source = mapped.recvfrom(4096)
        assert source[:2] == (f"::ffff:{SERVER}", 53)
    with socket.create_connection((SERVER, 53), 30) as stream:
        assert stream.getpeername() == (SERVER, 53)


def test_a_headless_service_resolves_to_its_endpoints_and_follows_them(
    node: AgentProcess, ask: Ask
) -> None:
    with everyone() as servers:
        node.write("db.yaml", headless("db"))
        both = [("10.244.0.1", servers.port), ("10.244.0.2", servers.port)]
        node.write("slices.yaml", endpoints("db", *both))
        start(node)
        name = f"db.default.{ZONE}"
        assert addresses(ask(name)) == ["10.244.0.1", "10.244.0.2"]
        # No ClusterIP, so nothing is translated: the name alone leads to the endpoint.
        assert servers.reached("10.244.0.2", servers.port) == "10.244.0.2"
        node.write("slices.yaml", endpoints("db", both[1]))
        until(lambda: addresses(ask(name)) == ["10.244.0.2"], "the endpoint that stays")
        service_records = ask(f"_p._tcp.{name}", "SRV").answer[0]
        assert [record.port for record in service_records] == [servers.port]


def test_what_does_not_exist_is_nxdomain_and_what_is_elsewhere_is_refused(
    node: AgentProcess, ask: Ask
) -> None:
    node.write("web.yaml", service("web", WEB))
    start(node)
    missing = ask(f"nope.default.{ZONE}")
    assert missing.rcode() == dns.rcode.NXDOMAIN
    assert missing.authority, "no SOA, so that nobody knows how long to remember it"
    # The name exists, it only has no such records: that is no NXDOMAIN.
    other = ask(f"web.default.{ZONE}", "AAAA")
    assert (other.rcode(), other.answer) == (dns.rcode.NOERROR, [])
    assert ask("example.com").rcode() == dns.rcode.REFUSED
    node.write("late.yaml", service("nope", "10.96.4.9"))
    until(lambda: addresses(ask(f"nope.default.{ZONE}")) == ["10.96.4.9"], "the new Service")
    (node.manifests / "late.yaml").unlink()
    until(lambda: ask(f"nope.default.{ZONE}").rcode() == dns.rcode.NXDOMAIN, "it is gone again")


def test_the_dns_service_of_the_manifests_takes_over_and_gives_back(node: AgentProcess) -> None:
    """A kube-dns of one's own has its own ports: TCP 53 leads to it, UDP 53 to nothing."""

    def built_in() -> bool:
        try:
            return addresses(ask_udp(f"web.default.{ZONE}")) == [WEB]
        except (OSError, dns.exception.DNSException):
            return False  # on the way from one to the other a question may be lost

    with everyone() as servers:
        own = service("kube-dns", SERVER, 53) + "---\n" + endpoints(
            "kube-dns", ("10.244.0.5", servers.port)
        )  # fmt: skip
        node.write("web.yaml", service("web", WEB))
        start(node)
        assert built_in()
        own = own.replace("name: kube-dns}", "name: kube-dns, namespace: kube-system}")
        own = own.replace("name: kube-dns-", "namespace: kube-system\n  name: kube-dns-")
        node.write("kube-dns.yaml", own)
        until(
            lambda: servers.reached(SERVER, 53, patience=1) == "10.244.0.5",
            "the DNS Service of one's own",
        )
        with pytest.raises(REFUSED):
            ask_udp(f"web.default.{ZONE}")
        assert node.status()["problems"] == []
        (node.manifests / "kube-dns.yaml").unlink()
        until(built_in, "the built-in server again")
        assert addresses(ask_tcp(f"web.default.{ZONE}")) == [WEB]
        assert node.cli("verify").returncode == 0


def test_the_dns_service_comes_back_with_a_new_port_after_a_restart(node: AgentProcess) -> None:
    node.write("web.yaml", service("web", WEB))
    start(node)
    before = node.status()["dns"]["listen"]
    node.kill()
    # As long as no agent runs there is nobody to ask, and that shows at once.
    with pytest.raises(OSError):
        ask_tcp(f"web.default.{ZONE}")
    # By chance it could get the same one again.
    host, _, port = before[0].rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind((host, int(port)))
        start(node)
    assert node.status()["dns"]["listen"] != before
    assert addresses(ask_udp(f"web.default.{ZONE}")) == [WEB]
    assert addresses(ask_tcp(f"web.default.{ZONE}")) == [WEB]
