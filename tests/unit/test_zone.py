"""The zone's answers, as the Kubernetes DNS specification 1.1.0 and CoreDNS give them."""

from __future__ import annotations

import threading

import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import pytest
from dns.rcode import NOERROR, NXDOMAIN

from pointsman.dnswire import Answer, RRset
from pointsman.objects import (
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    ObjectMeta,
    Ref,
    Service,
    ServicePort,
    ServiceSpec,
)
from pointsman.zone import Zone

HTTP = ServicePort(name="http", port=80)
DNS_UDP = ServicePort(name="dns", port=53, protocol="UDP")


def service(
    name: str,
    *ips: str,
    ns: str = "default",
    ports: tuple[ServicePort, ...] = (HTTP,),
    external: str = "",
) -> Service:
    spec = ServiceSpec(
        type="ExternalName" if external else "ClusterIP",
        cluster_ip=ips[0] if ips else "",
        cluster_ips=ips,
        ports=ports,
        external_name=external,
    )
    return Service(metadata=ObjectMeta(name=name, namespace=ns), spec=spec)


def endpoints(
    *items: tuple[str, str, bool | None], family: str = "IPv4", port: str | None = "http"
) -> EndpointSlice:
    return EndpointSlice(
        metadata=ObjectMeta(name="slice"),
        address_type=family,
        ports=(EndpointPort(name=port, port=8080),),
        endpoints=tuple(
            Endpoint(
                addresses=(address,), hostname=hostname, conditions=EndpointConditions(ready=ready)
            )
            for address, hostname, ready in items
        ),
    )


def texts(rrsets: tuple[RRset, ...]) -> list[str]:
    """Records as in a zone file: "owner TYPE data", sorted."""
    return sorted(
        f"{rrset.owner} {dns.rdatatype.to_text(rrset.type)} "
        + dns.rdata.from_wire(
            dns.rdataclass.IN, dns.rdatatype.RdataType(rrset.type), data, 0, len(data)
        ).to_text()
        for rrset in rrsets
        for data in rrset.rdata
    )


def ask(zone: Zone, name: str, qtype: str) -> Answer | None:
    return zone.lookup(dns.name.from_text(name), dns.rdatatype.from_text(qtype))


def answers(zone: Zone, name: str, qtype: str) -> list[str]:
    answer = ask(zone, name, qtype)
    assert answer is not None
    assert answer.rcode == NOERROR
    return texts(answer.answer)


@pytest.fixture(scope="module")
def zone() -> Zone:
    zone = Zone(nameservers=["10.96.0.10", "fd00::10"])
    zone.put(
        service(
            "web-server-service",
            "10.96.0.1",
            ns="kube-system",
            ports=(ServicePort(name="web-server", port=80),),
        )
    )
    zone.put(service("dual", "10.96.0.2", "fd00::2", ports=(HTTP, DNS_UDP)))
    zone.put(service("unnamed", "10.96.0.3", ports=(ServicePort(port=80),)))
    zone.put(
        service("db", "None"),
        [
            endpoints(
                ("10.0.0.1", "", True),
                ("10.0.0.2", "db-0", None),
                ("10.0.0.3", "db-1", False),
            ),
            endpoints(("fd00:1::2", "db-0", True), ("fd00:1::4", "", True), family="IPv6"),
        ],
    )
    zone.put(service("idle", "None"), [endpoints(("10.0.0.9", "idle-0", False))])
    zone.put(service("out", external="www.example.com"))
    zone.put(service("in", external="dual.default.svc.cluster.local."))
    zone.put(service("lost", external="nowhere.default.svc.cluster.local"))
    zone.put(service("ring", external="ring.default.svc.cluster.local"))
    zone.put(service("number", external="192.0.2.1"))
    return zone


D = ".default.svc.cluster.local."
DB_SRV = [
    f"_http._tcp.db{D} SRV 0 100 8080 10-0-0-1.db{D}",
    f"_http._tcp.db{D} SRV 0 100 8080 db-0.db{D}",
    f"_http._tcp.db{D} SRV 0 100 8080 fd00-1--4.db{D}",
]


@pytest.mark.parametrize(
    ("name", "qtype", "expected"),
    [
        pytest.param(
            "web-server-service.kube-system.svc.cluster.local",
            "A",
            ["web-server-service.kube-system.svc.cluster.local. A 10.96.0.1"],
            id="2.3.1-cluster-ip",
        ),
        pytest.param(f"dual{D}", "A", [f"dual{D} A 10.96.0.2"], id="dual-stack-a"),
        pytest.param(f"dual{D}", "AAAA", [f"dual{D} AAAA fd00::2"], id="dual-stack-aaaa"),
        pytest.param(
            "DuAl.Default.SVC.Cluster.Local",
            "A",
            ["DuAl.Default.SVC.Cluster.Local. A 10.96.0.2"],
            id="case-is-folded-and-kept",
        ),
        pytest.param(
            f"_http._tcp.dual{D}",
            "SRV",
            [f"_http._tcp.dual{D} SRV 0 100 80 dual{D}"],
            id="2.3.2-srv",
        ),
        pytest.param(
            f"_dns._udp.dual{D}",
            "SRV",
            [f"_dns._udp.dual{D} SRV 0 100 53 dual{D}"],
            id="srv-udp",
        ),
        pytest.param(
            f"dual{D}",
            "SRV",
            [f"dual{D} SRV 0 100 53 dual{D}", f"dual{D} SRV 0 100 80 dual{D}"],
            id="srv-at-the-service-gives-every-port-as-coredns",
        ),
        pytest.param(
            "1.0.96.10.in-addr.arpa",
            "PTR",
            ["1.0.96.10.in-addr.arpa. PTR web-server-service.kube-system.svc.cluster.local."],
            id="2.3.3-ptr",
        ),
        pytest.param(
            "2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.D.F.ip6.arpa",
            "PTR",
            [
                "2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.D.F.ip6.arpa. "
                f"PTR dual{D}"
            ],
            id="2.3.3-ptr-ipv6",
        ),
        pytest.param(
            f"db{D}",
            "A",
            [f"db{D} A 10.0.0.1", f"db{D} A 10.0.0.2"],
            id="2.4.1-headless-ready-or-unsaid-only",
        ),
        pytest.param(
            f"db{D}",
            "AAAA",
            [f"db{D} AAAA fd00:1::2", f"db{D} AAAA fd00:1::4"],
            id="headless-aaaa",
        ),
        pytest.param(f"db-0.db{D}", "A", [f"db-0.db{D} A 10.0.0.2"], id="hostname"),
        pytest.param(f"10-0-0-1.db{D}", "A", [f"10-0-0-1.db{D} A 10.0.0.1"], id="dashed-address"),
        pytest.param(
            f"fd00-1--4.db{D}", "AAAA", [f"fd00-1--4.db{D} AAAA fd00:1::4"], id="dashed-ipv6"
        ),
        pytest.param(
            f"_http._tcp.db{D}", "SRV", DB_SRV, id="2.4.2-headless-srv-once-for-each-host"
        ),
        pytest.param(
            "2.0.0.10.in-addr.arpa",
            "PTR",
            [f"2.0.0.10.in-addr.arpa. PTR db-0.db{D}"],
            id="2.4.3-headless-ptr",
        ),
        pytest.param(f"out{D}", "A", [f"out{D} CNAME www.example.com."], id="2.5-external-name"),
        pytest.param(f"out{D}", "CNAME", [f"out{D} CNAME www.example.com."], id="cname-asked"),
        pytest.param(
            f"in{D}",
            "A",
            [f"dual{D} A 10.96.0.2", f"in{D} CNAME dual{D}"],
            id="external-name-of-our-own-is-followed",
        ),
        pytest.param(
            "dns-version.cluster.local",
            "TXT",
            ['dns-version.cluster.local. TXT "1.1.0"'],
            id="2.2-schema-version",
        ),
        pytest.param(
            "cluster.local", "NS", ["cluster.local. NS ns.dns.cluster.local."], id="apex-ns"
        ),
        pytest.param(
            "ns.dns.cluster.local", "A", ["ns.dns.cluster.local. A 10.96.0.10"], id="nameserver"
        ),
        pytest.param(f"dual{D}", "ANY", [f'dual{D} HINFO "RFC8482" ""'], id="any-is-minimal"),
    ],
)
def test_a_name_that_has_records_answers_with_them(
    zone: Zone, name: str, qtype: str, expected: list[str]
) -> None:
    assert answers(zone, name, qtype) == expected


@pytest.mark.parametrize(
    ("name", "qtype", "rcode"),
    [
        pytest.param(f"dual{D}", "MX", NOERROR, id="other-type"),
        pytest.param(f"unnamed{D}", "AAAA", NOERROR, id="other-family"),
        pytest.param("cluster.local", "A", NOERROR, id="apex-without-address"),
        pytest.param("svc.cluster.local", "A", NOERROR, id="empty-non-terminal-svc"),
        pytest.param("default.svc.cluster.local", "A", NOERROR, id="empty-non-terminal-namespace"),
        pytest.param(f"_tcp.dual{D}", "SRV", NOERROR, id="empty-non-terminal-protocol"),
        pytest.param(f"_http._tcp.dual{D}", "A", NOERROR, id="srv-name-without-address"),
        pytest.param(f"db-0.db{D}", "SRV", NOERROR, id="host-without-srv"),
        pytest.param("none.svc.cluster.local", "A", NXDOMAIN, id="namespace-without-services"),
        pytest.param(f"none{D}", "A", NXDOMAIN, id="no-such-service"),
        pytest.param(f"db-1.db{D}", "A", NXDOMAIN, id="host-not-ready"),
        pytest.param(f"idle{D}", "A", NXDOMAIN, id="2.4.1-headless-without-ready-endpoints"),
        pytest.param(f"_http._udp.dual{D}", "SRV", NXDOMAIN, id="no-such-protocol"),
        pytest.param(f"_tcp.unnamed{D}", "SRV", NXDOMAIN, id="unnamed-port-has-no-srv-name"),
        pytest.param(f"db-0.dual{D}", "A", NXDOMAIN, id="no-host-below-a-cluster-ip"),
        pytest.param(f"a.b.c.dual{D}", "A", NXDOMAIN, id="too-deep"),
        pytest.param(f"x.out{D}", "A", NXDOMAIN, id="below-external-name"),
        pytest.param(f"number{D}", "A", NXDOMAIN, id="external-name-is-an-address"),
        pytest.param(f"lost{D}", "A", NXDOMAIN, id="external-name-of-our-own-without-records"),
        pytest.param("www.example.com.cluster.local", "A", NXDOMAIN, id="search-path-expansion"),
        pytest.param("1-2-3-4.default.pod.cluster.local", "A", NXDOMAIN, id="2.6-deprecated-pods"),
    ],
)
def test_a_name_without_such_records_answers_with_the_soa(
    zone: Zone, name: str, qtype: str, rcode: int
) -> None:
    answer = ask(zone, name, qtype)
    assert answer is not None
    assert answer.rcode == rcode
    assert [r.type for r in answer.answer] in ([], [dns.rdatatype.CNAME])
    assert texts(answer.authority)[0].startswith(
        "cluster.local. SOA ns.dns.cluster.local. hostmaster.cluster.local. "
    )


@pytest.mark.parametrize(
    ("name", "qtype"),
    [
        pytest.param("example.com", "A", id="elsewhere"),
        pytest.param("local", "SOA", id="the-parent"),
        pytest.param(".", "NS", id="the-root"),
        pytest.param("xcluster.local", "A", id="same-characters-other-label"),
        pytest.param("1.2.0.192.in-addr.arpa", "PTR", id="ptr-of-an-unknown-address"),
        pytest.param("3.0.0.10.in-addr.arpa", "PTR", id="ptr-of-an-endpoint-not-ready"),
        pytest.param("1.0.96.10.in-addr.arpa", "A", id="reverse-name-other-type"),
        pytest.param("0.96.10.in-addr.arpa", "PTR", id="reverse-name-too-short"),
        pytest.param("01.0.96.10.in-addr.arpa", "PTR", id="reverse-name-leading-zero"),
        pytest.param("f.ip6.arpa", "PTR", id="reverse-ipv6-too-short"),
        pytest.param(".".join("g" * 32) + ".ip6.arpa", "PTR", id="reverse-ipv6-no-hex"),
    ],
)
def test_what_is_outside_is_not_ours(zone: Zone, name: str, qtype: str) -> None:
    assert ask(zone, name, qtype) is None


def test_srv_brings_the_addresses_of_its_targets(zone: Zone) -> None:
    answer = ask(zone, f"_http._tcp.db{D}", "SRV")
    assert answer is not None
    assert texts(answer.additional) == [
        f"10-0-0-1.db{D} A 10.0.0.1",
        f"db-0.db{D} A 10.0.0.2",
        f"db-0.db{D} AAAA fd00:1::2",
        f"fd00-1--4.db{D} AAAA fd00:1::4",
    ]


def test_an_external_name_outside_is_left_to_a_resolver(zone: Zone) -> None:
    answer = ask(zone, f"out{D}", "AAAA")
    assert answer is not None
    assert answer.outside == dns.name.from_text("www.example.com")


def test_a_ring_of_external_names_ends(zone: Zone) -> None:
    answer = ask(zone, f"ring{D}", "A")
    assert answer is not None
    assert {r.type for r in answer.answer} == {dns.rdatatype.CNAME}


def test_an_update_replaces_names_and_pointers() -> None:
    zone = Zone()
    zone.put(service("db", "None"), [endpoints(("10.0.0.1", "", True), ("10.0.0.2", "", True))])
    zone.put(service("db", "None"), [endpoints(("10.0.0.2", "", True), ("10.0.0.3", "b", True))])
    assert answers(zone, f"db{D}", "A") == [f"db{D} A 10.0.0.2", f"db{D} A 10.0.0.3"]
    assert ask(zone, "1.0.0.10.in-addr.arpa", "PTR") is None
    assert answers(zone, "3.0.0.10.in-addr.arpa", "PTR") == [f"3.0.0.10.in-addr.arpa. PTR b.db{D}"]
    gone = ask(zone, f"10-0-0-1.db{D}", "A")
    assert gone is not None
    assert gone.rcode == NXDOMAIN


def test_an_address_in_two_services_has_two_pointers_until_one_goes() -> None:
    zone = Zone()
    for name in ("a", "b"):
        zone.put(service(name, "None"), [endpoints(("10.0.0.1", "", True))])
    assert len(answers(zone, "1.0.0.10.in-addr.arpa", "PTR")) == 2
    zone.delete(Ref("Service", "default", "a"))
    assert answers(zone, "1.0.0.10.in-addr.arpa", "PTR") == [
        f"1.0.0.10.in-addr.arpa. PTR 10-0-0-1.b{D}"
    ]


def test_after_deleting_everything_nothing_is_left() -> None:
    zone = Zone()
    zone.put(service("web", "10.0.0.1"))
    zone.put(service("web", "10.0.0.1"))
    zone.delete(Ref("Service", "default", "web"))
    zone.delete(Ref("Service", "default", "web"))
    for name in (f"web{D}", "default.svc.cluster.local"):
        answer = ask(zone, name, "A")
        assert answer is not None
        assert answer.rcode == NXDOMAIN
    assert ask(zone, "1.0.0.10.in-addr.arpa", "PTR") is None


def test_a_reader_sees_the_old_service_or_the_new_one_never_a_mixture() -> None:
    zone = Zone()
    sets = [[endpoints(*((f"10.{n}.0.{i}", "", True) for i in range(100)))] for n in (1, 2)]
    zone.put(service("db", "None"), sets[0])
    name = dns.name.from_text(f"db{D}")
    done = threading.Event()

    def write() -> None:
        for turn in range(400):
            zone.put(service("db", "None"), sets[turn % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        answer = zone.lookup(name, dns.rdatatype.A)
        assert answer is not None
        rdata = answer.answer[0].rdata
        assert len(rdata) == 100
        seen.add(frozenset(address[1] for address in rdata))
    writer.join()
    assert seen <= {frozenset((1,)), frozenset((2,))}


def test_every_change_raises_the_serial() -> None:
    zone = Zone()
    seen = []
    for ip in ("10.0.0.1", "10.0.0.2"):
        zone.put(service("web", ip))
        seen.append(int(answers(zone, "cluster.local", "SOA")[0].split()[4]))
    assert seen == sorted(set(seen))


def test_odd_endpoints_are_answered_around() -> None:
    zone = Zone()
    piece = endpoints(
        ("not-an-address", "", True), ("10.0.0.1", "no label", True), ("10.0.0.2", "UPPER", True)
    )
    zone.put(
        service("db", "None"), [piece, endpoints(("www.example.com", "x", True), family="FQDN")]
    )
    assert answers(zone, f"db{D}", "A") == [f"db{D} A 10.0.0.1", f"db{D} A 10.0.0.2"]
    assert answers(zone, f"10-0-0-1.db{D}", "A")
    assert answers(zone, f"upper.db{D}", "A")


def test_a_name_that_is_no_label_is_refused_and_changes_nothing() -> None:
    zone = Zone()
    with pytest.raises(ValueError, match=r"default/a\.b: name and namespace must be DNS labels"):
        zone.put(service("a.b", "10.0.0.1"))
    assert ask(zone, "1.0.0.10.in-addr.arpa", "PTR") is None


@pytest.mark.parametrize("domain", ["", ".", "a..b", "x" * 64, "a." * 40])
def test_a_bad_domain_is_refused(domain: str) -> None:
    with pytest.raises(ValueError, match="domain"):
        Zone(domain)


def test_another_domain() -> None:
    zone = Zone("K8s.Example.org.")
    zone.put(service("web", "10.0.0.1"))
    assert answers(zone, "web.default.svc.k8s.example.org", "A")
    assert ask(zone, f"web{D}", "A") is None
