"""What people and scripts see of the maps: rows, dumps, explanations, differences, health."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from pointsman import abi, desired, dump, health, host, inspect
from pointsman import describe as describing
from pointsman import explain as explaining
from pointsman.cli import show
from pointsman.cli.main import cli
from pointsman.cli.resources import BY_NAME, changes
from pointsman.hooks import HOOKS
from pointsman.maps import Slot
from pointsman.objects import EndpointSlice, Service
from pointsman.pins import Link
from pointsman.plan import Element
from pointsman.resolve import Context
from pointsman.values import TCP, UDP, Backend, Entry, Frontend, PortName, to_address
from pointsman.verify import Difference, compare, link_differences

RETIRED = abi.constants()["GENERATION_RETIRED"]


def frontend(address: str, port: int, protocol: int = TCP) -> Frontend:
    return Frontend(to_address(address), port, protocol)


def backend(text: str) -> Backend:
    address, _, port = text.rpartition(":")
    return to_address(address), int(port)


@dataclass
class FakeView:
    """Maps as dicts; ids outside of them are as far outside as in the real ones."""

    keys: dict[Frontend, int] = field(default_factory=dict)
    elements: dict[int, Element] = field(default_factory=dict)
    owners: dict[int, PortName] = field(default_factory=dict)
    slot: dict[int, Slot] = field(default_factory=dict)
    loads: dict[int, tuple[int, int]] = field(default_factory=dict)
    raw: dict[str, list[tuple[bytes, bytes]]] = field(default_factory=dict)

    def frontends(self) -> dict[Frontend, int]:
        return dict(self.keys)

    def find(self, frontend: Frontend) -> int | None:
        return self.keys.get(frontend)

    def names(self) -> dict[int, PortName]:
        return dict(self.owners)

    def service(self, ident: int) -> Element:
        if ident not in self.elements:
            raise IndexError(ident)
        return self.elements[ident]

    def slots(self, first: int, count: int) -> tuple[Slot, ...]:
        return tuple(self.slot[i] for i in range(first, first + count) if i in self.slot)

    def load(self, endpoint: int) -> tuple[int, int]:
        return self.loads.get(endpoint, (0, 0))

    def generations(self) -> Mapping[int, int]:
        return {ident: generation for ident, (generation, _) in self.loads.items() if generation}

    def owned(self) -> list[int]:
        return [ident for ident, element in self.elements.items() if element.owner]

    def counters(self) -> dict[str, int]:
        return {"translated": 7, "refused": 1}

    def items(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        return iter(self.raw.get(name, []))


WEB, WEB_ANY, DNS = frontend("10.96.0.1", 80), frontend("10.96.0.1", 0, 0), frontend("fd00::a", 53)
DNS = Frontend(DNS.address, 53, UDP)
HTTP, NONE = PortName("shop", "web", "http"), PortName("default", "dns", "")
A, B, C = backend("10.0.0.1:8080"), backend("10.0.0.2:8080"), backend("fd00::5:53")


def view() -> FakeView:
    """shop/web with two endpoints, default/dns with one over IPv6, shop/web's other ports."""
    return FakeView(
        keys={WEB: 1, WEB_ANY: 2, DNS: 3},
        elements={
            1: Element(WEB, 1, 10, 2, 0, 0),
            2: Element(WEB_ANY, 1, 0, 0, 0, 0),
            3: Element(DNS, 2, 20, 1, 0, 60),
        },
        owners={1: HTTP, 2: NONE},
        slot={10: Slot(A, 5, 1, 1), 11: Slot(B, 6, 3, 1), 20: Slot(C, 7, 1, 2)},
        loads={5: (1, 4), 6: (3, 2), 7: (1, 0), 8: (2 | RETIRED, 0), 9: (2 | RETIRED, 1)},
    )


ENTRIES = (
    Entry(WEB, HTTP, (A, B)),
    Entry(WEB_ANY, HTTP),
    Entry(DNS, NONE, (C,), affinity=60),
)


# -- rows and tables -----------------------------------------------------------------------------


def rendered(name: str, form: str = "table", of: FakeView | None = None) -> str:
    resource = BY_NAME[name]
    columns = resource.shown(form)
    rows = [[value(row) for _, value in columns] for row in resource.rows(of or view())]
    return "\n".join(show.table([header for header, _ in columns], rows))


@pytest.mark.parametrize(
    ("name", "form", "expected"),
    [
        pytest.param(
            "svc",
            "table",
            """\
NAMESPACE   NAME   CLUSTER-IP   PORT(S)   ENDPOINTS   OPEN
default     dns    fd00::a      53/UDP    1           0
shop        web    10.96.0.1    80/TCP    2           6""",
            id="services",
        ),
        pytest.param(
            "services",
            "wide",
            """\
NAMESPACE   NAME   CLUSTER-IP   PORT(S)   ENDPOINTS   OPEN   ALGORITHM   AFFINITY   IDS
default     dns    fd00::a      53/UDP    1           0      random      60s        3
shop        web    10.96.0.1    80/TCP    2           6      random      <none>     1,2""",
            id="services-wide",
        ),
        pytest.param(
            "ep",
            "wide",
            """\
NAMESPACE   NAME   PORT      ENDPOINT        OPEN   ID   GENERATION   CURRENT
default     dns    <unset>   [fd00::5]:53    0      7    1            yes
shop        web    http      10.0.0.1:8080   4      5    1            yes
shop        web    http      10.0.0.2:8080   2      6    3            yes""",
            id="endpoints-wide",
        ),
        pytest.param(
            "fe",
            "table",
            """\
NAMESPACE   NAME   PORT      FRONTEND           ENDPOINTS   OPEN
default     dns    <unset>   [fd00::a]:53/UDP   1           0
shop        web    http      10.96.0.1:80/TCP   2           6
shop        web    *         10.96.0.1:*        refuse      0""",
            id="frontends",
        ),
    ],
)
def test_tables_look_like_kubectl_s(name: str, form: str, expected: str) -> None:
    assert rendered(name, form) == expected


def test_a_port_of_two_families_counts_its_endpoints_once() -> None:
    maps = view()
    maps.keys[other := frontend("10.96.0.9", 80)] = 4
    maps.elements[4] = Element(other, 1, 10, 2, 0, 0)
    row = inspect.services(maps)[1]
    assert (row.cluster_ips, row.endpoints, row.open) == (("10.96.0.1", "10.96.0.9"), 2, 6)


def test_connections_of_another_generation_are_not_the_endpoint_s() -> None:
    maps = view()
    maps.loads[5] = (2, 4)
    row = next(row for row in inspect.endpoints(maps) if row.id == 5)
    assert (row.current, row.open) == (False, 0)


def test_rows_for_scripts_have_stable_keys() -> None:
    service = inspect.plain(inspect.services(view())[1])
    assert service == {
        "namespace": "shop",
        "name": "web",
        "clusterIPs": ["10.96.0.1"],
        "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
        "endpoints": 2,
        "open": 6,
        "algorithms": ["random"],
        "affinitySeconds": 0,
        "ids": [1, 2],
    }
    assert " ".join(inspect.plain(inspect.endpoints(view())[0])) == (
        "namespace service port endpoint id generation current open"
    )
    assert " ".join(inspect.plain(inspect.frontends(view())[0])) == (
        "namespace service portName frontend address port protocol endpoints open id owner "
        "algorithm affinitySeconds firstSlot whenEmpty consistent"
    )


def test_a_frontend_that_leads_nowhere_is_shown_and_not_fatal() -> None:
    maps = FakeView(keys={WEB: 99})
    row = inspect.frontends(maps)[0]
    assert (row.namespace, row.consistent, row.endpoints) == ("", False, 0)


def test_watching_names_only_what_changed() -> None:
    resource, before = BY_NAME["ep"], inspect.endpoints(view())
    maps = view()
    maps.loads[5] = (1, 9)
    maps.slot[11] = Slot(backend("10.0.0.3:8080"), 8, 1, 1)
    found = changes(resource, before, inspect.endpoints(maps))
    assert [(change.type, change.row.endpoint) for change in found] == [
        ("MODIFIED", "10.0.0.1:8080"),
        ("ADDED", "10.0.0.3:8080"),
        ("DELETED", "10.0.0.2:8080"),
    ]
    assert changes(resource, before, before) == []


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0s"), (119, "119s"), (192, "3m12s"), (3600, "1h"), (7260, "2h1m"), (273600, "3d4h")],
)
def test_durations(seconds: int, expected: str) -> None:
    assert show.duration_text(seconds) == expected


@pytest.mark.parametrize(("count", "expected"), [(0, "0 B"), (480, "480 B"), (6291456, "6.0 MiB")])
def test_sizes(count: int, expected: str) -> None:
    assert show.bytes_text(count) == expected


# -- dumps ---------------------------------------------------------------------------------------


def socket_record(**values: int) -> bytes:
    pack = abi.layouts()["socket"].packer(
        "endpoint", "generation", "vip", "peer", "vip_port", "peer_port", "proto", "counted"
    )
    ports = socket.htons(80), socket.htons(8080)
    return pack(5, 1, WEB.address, A[0], *ports, TCP, values.get("counted", 1))


def bucket(*cookies: int) -> bytes:
    layout = abi.layouts()["bucket"]
    padded = [*cookies, *([0] * (4 - len(cookies)))]
    data = b"".join(cookie.to_bytes(8, "little") for cookie in padded)
    at = layout.field("record").offset
    return data.ljust(at, b"\0") + b"".join(socket_record() for _ in padded)


RECORD = {
    "vip": "10.96.0.1:80",
    "peer": "10.0.0.1:8080",
    "protocol": "TCP",
    "id": 5,
    "generation": 1,
    "counted": True,
}


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        pytest.param(
            "frontends",
            [],
            [
                {"frontend": "10.96.0.1:*", "service": 2},
                {"frontend": "10.96.0.1:80/TCP", "service": 1},
                {"frontend": "[fd00::a]:53/UDP", "service": 3},
            ],
            id="frontends-as-people-write-them",
        ),
        pytest.param(
            "load",
            [],
            [
                {"id": 5, "generation": 1, "state": "valid", "open": 4},
                {"id": 6, "generation": 3, "state": "valid", "open": 2},
                {"id": 7, "generation": 1, "state": "valid", "open": 0},
                {"id": 9, "generation": 2, "state": "retired", "open": 1},
            ],
            id="a-retired-endpoint-shows-while-it-has-connections",
        ),
        pytest.param(
            "previous_load",
            [
                (bytes(4), bytes(8)),
                (b"\1\0\0\0", b"\1\0\0\0\xff\xff\xff\xff"),
                (b"\2\0\0\0", b"\2\0\0\x80\0\0\0\0"),
            ],
            [{"id": 1, "generation": 1, "state": "valid", "open": -1}],
            id="before-a-merge-counts-may-be-below-zero",
        ),
        pytest.param(
            "sockets",
            [(bytes(4), bucket()), (b"\7\0\0\0", bucket(0, 135, 7 | 1 << 63))],
            [
                {"bucket": 7, "cookie": 135, "state": "in use", **RECORD},
                {"bucket": 7, "cookie": 7, "state": "busy", **RECORD},
            ],
            id="free-places-of-a-bucket-are-left-out",
        ),
        pytest.param(
            "sockets_overflow",
            [((99).to_bytes(8, "little"), socket_record(counted=0) + (4).to_bytes(8, "little"))],
            [{"cookie": 99, "netns": 4, **RECORD, "counted": False}],
            id="overflow",
        ),
        pytest.param(
            "overflow_netns",
            [((4).to_bytes(8, "little"), b"\3\0\0\0")],
            [{"netns": 4, "records": 3}],
            id="records-of-each-network-namespace",
        ),
    ],
)
def test_dump(name: str, raw: list[tuple[bytes, bytes]], expected: list[dump.Row]) -> None:
    maps = replace(view(), raw={name: raw})
    assert list(dump.DUMPS[name](maps)) == expected


def test_shared_sets_are_dumped_and_counted_once() -> None:
    maps = view()
    maps.keys[other := frontend("10.96.0.9", 80)] = 4
    maps.elements[4] = Element(other, 1, 10, 2, 0, 0)
    assert [row["slot"] for row in dump.DUMPS["slots"](maps)] == [10, 11, 20]
    assert dump.used(maps, "slots") == 3


def test_every_map_of_maps_h_has_a_dump_but_the_one_in_the_sockets() -> None:
    known = abi.map_specs({}, ["HAVE_MPTCP"])
    assert {name for name in known if name not in dump.DUMPS} == {"datagrams"}
    assert {spec.type for spec in known.values()} <= dump.TYPES.keys()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(("load", 2, 200, 3, 0), (3, 200, 1.5), id="used-of-max"),
        pytest.param(("sockets", 2, 10, 4, 0), (4, 40, 10.0), id="records-not-buckets"),
        pytest.param(("datagrams", 24, 0, None, 0), (None, 0, None), id="not-countable"),
    ],
)
def test_fill(row: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    found = dump.map_row(*row)
    assert (found.used, found.max, found.fill_percent) == expected


# -- explain -------------------------------------------------------------------------------------


def wrong_key() -> FakeView:
    maps = view()
    maps.elements[1] = replace(maps.elements[1], frontend=DNS)
    return maps


def empty(meaning: int) -> FakeView:
    maps = view()
    maps.elements[1] = Element(WEB, 1, meaning, 0, 0, 0)
    return maps


def beyond() -> FakeView:
    maps = view()
    del maps.slot[11]
    return maps


@pytest.mark.parametrize(
    ("maps", "destination", "verdict", "result", "service"),
    [
        pytest.param(
            view(),
            "10.96.0.1:80",
            "translated",
            "a connection gets one of 2 endpoints at random",
            "shop/web:http",
            id="a-service",
        ),
        pytest.param(
            view(),
            "[fd00::a]:53/udp",
            "translated",
            "a socket gets the one endpoint",
            "default/dns",
            id="udp-over-ipv6",
        ),
        pytest.param(
            view(),
            "[::ffff:10.96.0.1]:80",
            "translated",
            "a connection gets one of 2 endpoints at random",
            "shop/web:http",
            id="an-ipv4-mapped-socket-finds-the-same",
        ),
        pytest.param(
            empty(0),
            "10.96.0.1:80",
            "refused",
            "ECONNREFUSED: service has no endpoints",
            "shop/web:http",
            id="no-endpoints",
        ),
        pytest.param(
            empty(1),
            "10.96.0.1:80",
            "unreachable",
            "EHOSTUNREACH: service has no endpoints under its policy",
            "shop/web:http",
            id="no-endpoints-under-a-policy",
        ),
        pytest.param(
            view(),
            "10.96.0.1:81",
            "refused",
            "ECONNREFUSED: no Service defines port 81 of 10.96.0.1",
            "shop/web",
            id="an-undefined-port-of-a-known-vip",
        ),
        pytest.param(
            view(),
            "10.96.0.1:80/udp",
            "refused",
            "ECONNREFUSED: no Service defines port 80/udp of 10.96.0.1",
            "shop/web",
            id="the-other-protocol-is-undefined-too",
        ),
        pytest.param(
            view(),
            "1.2.3.4:80",
            "not-a-service",
            "not a Service: the address is used as it is",
            "",
            id="anything-else",
        ),
        pytest.param(
            wrong_key(),
            "10.96.0.1:80",
            "refused",
            "ECONNREFUSED: no Service defines port 80 of 10.96.0.1",
            "shop/web",
            id="the-service-s-own-key-has-the-last-word",
        ),
        pytest.param(
            FakeView(keys={WEB: 99}),
            "10.96.0.1:80",
            "not-a-service",
            "not a Service: the address is used as it is",
            "",
            id="a-service-id-outside-of-the-map",
        ),
        pytest.param(
            beyond(),
            "10.96.0.1:80",
            "translated",
            "a connection gets the one endpoint; 1 in 2 fail with ECONNREFUSED: no such slot",
            "shop/web:http",
            id="a-set-that-ends-beyond-the-map",
        ),
    ],
)
def test_explain(maps: FakeView, destination: str, verdict: str, result: str, service: str) -> None:
    found = explaining.explain(maps, explaining.parse_destination(destination))
    assert (found.verdict, found.result, found.service) == (verdict, result, service)
    assert found.errno == result.partition(":")[0] if found.errno else verdict[0] in "tn"


def test_explain_says_step_by_step_what_the_programs_see() -> None:
    maps = view()
    maps.loads[6] = (4, 2)
    assert explaining.explain(maps, WEB).steps == (
        "frontends: key 10.96.0.1:80/TCP leads to service 1",
        "service 1: its own key is the same",
        "service 1: belongs to shop/web:http, algorithm random",
        "set: 2 endpoints, slots 10 to 11",
        "slot 10: 10.0.0.1:8080, probability 50.0%, 4 open, endpoint 5, generation 1 as in load",
        "slot 11: 10.0.0.2:8080, probability 50.0%, 2 open, endpoint 6, generation 3, but load "
        "has 4: its connections are not counted",
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("10.96.0.1", "is no ADDRESS:PORT"),
        ("fd00::1:80", "is no ADDRESS:PORT"),
        ("10.96.0.1:http", "is no ADDRESS:PORT"),
        ("10.96.0.1:65536", "above 65535"),
        ("10.96.0.1:80/sctp", "'sctp' is not translated"),
        ("web.shop:80", "no IP address"),
        ("10.1:80", "no IP address"),
        ("[10.96.0:80]:80", "no IP address"),
    ],
)
def test_what_is_no_destination_is_wrong_usage(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        explaining.parse_destination(text)


# -- describe ------------------------------------------------------------------------------------


def service(spec: dict[str, Any], **meta: Any) -> Service:
    return msgspec.convert({"metadata": {"name": "web", **meta}, "spec": spec}, Service)


def slice_of(ports: list[dict[str, Any]], *addresses: str, ready: bool = True) -> EndpointSlice:
    endpoints = [{"addresses": [a], "conditions": {"ready": ready}} for a in addresses]
    value = {"metadata": {"name": "x"}, "addressType": "IPv4", "endpoints": endpoints}
    return msgspec.convert(value | {"ports": ports}, EndpointSlice)


@pytest.mark.parametrize(
    ("obj", "slices", "expected"),
    [
        pytest.param(
            service(
                {
                    "selector": {"tier": "b", "app": "web"},
                    "clusterIP": "10.96.0.1",
                    "type": "NodePort",
                    "ports": [
                        {"name": "http", "port": 80, "targetPort": "web-port", "nodePort": 30080},
                        {"name": "dns", "port": 53, "protocol": "UDP"},
                    ],
                },
                namespace="shop",
                labels={"b": "2", "a": "1"},
                annotations={"note": "first\nsecond\n", "k": "v"},
            ),
            [
                slice_of(
                    [{"name": "http", "port": 8080}], "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"
                ),
                slice_of([{"name": "http", "port": 8080}], "10.0.0.9", ready=False),
            ],
            """\
Name:                     web
Namespace:                shop
Labels:                   a=1
                          b=2
Annotations:              k: v
                          note:
                            first
                            second
Selector:                 app=web,tier=b
Type:                     NodePort
IP Family Policy:         SingleStack
IP Families:              IPv4
IP:                       10.96.0.1
IPs:                      10.96.0.1
Port:                     http  80/TCP
TargetPort:               web-port/TCP
NodePort:                 http  30080/TCP
Endpoints:                10.0.0.1:8080,10.0.0.2:8080,10.0.0.3:8080 + 1 more...
Port:                     dns  53/UDP
TargetPort:               53/UDP
Endpoints:                \n\
Session Affinity:         None
External Traffic Policy:  Cluster
Internal Traffic Policy:  Cluster
Events:                   <none>
""",
            id="several-ports-and-more-endpoints-than-are-shown",
        ),
        pytest.param(
            service({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}),
            [],
            """\
Name:                     web
Namespace:                default
Labels:                   <none>
Annotations:              <none>
Selector:                 <none>
Type:                     ClusterIP
IP Family Policy:         SingleStack
IP Families:              IPv4
IP:                       10.96.0.1
IPs:                      10.96.0.1
Port:                     <unset>  80/TCP
TargetPort:               80/TCP
Endpoints:                <none>
Session Affinity:         None
Internal Traffic Policy:  Cluster
Events:                   <none>
""",
            id="nothing-set",
        ),
        pytest.param(
            service({"type": "ExternalName", "externalName": "example.com"}),
            [],
            """\
Name:              web
Namespace:         default
Labels:            <none>
Annotations:       <none>
Selector:          <none>
Type:              ExternalName
IP Families:       <none>
IP:                \n\
IPs:               <none>
External Name:     example.com
Session Affinity:  None
Events:            <none>
""",
            id="a-narrower-label-column-without-policies",
        ),
    ],
)
def test_describe_prints_what_kubectl_prints(
    obj: Service, slices: list[EndpointSlice], expected: str
) -> None:
    assert describing.describe(obj, slices) == expected


def test_describe_tells_what_the_kernel_holds() -> None:
    parts = describing.describe_kernel(view(), "shop", "web")
    assert [(line, [row.endpoint for row in rows]) for line, rows in parts] == [
        ("10.96.0.1:80/TCP  id 1, random", ["10.0.0.1:8080", "10.0.0.2:8080"]),
        ("10.96.0.1:*  id 2, any other port: refuse", []),
    ]


# -- verify --------------------------------------------------------------------------------------


def changed(maps: FakeView, **elements: Any) -> FakeView:
    maps.elements[1] = replace(maps.elements[1], **elements)
    return maps


def without(name: str, key: Any) -> FakeView:
    maps = view()
    del getattr(maps, name)[key]
    return maps


def with_slot(slot: Slot) -> FakeView:
    maps = view()
    maps.slot[11] = slot
    return maps


def with_name() -> FakeView:
    maps = view()
    maps.owners[9] = PortName("old", "gone", "")
    return maps


def with_service() -> FakeView:
    maps = view()
    maps.elements[9] = Element(frontend("10.96.0.9", 1), 2, 0, 0, 0, 0)
    return maps


def with_load(endpoint: int, generation: int) -> FakeView:
    maps = view()
    maps.loads[endpoint] = (generation, 0)
    return maps


@pytest.mark.parametrize(
    ("maps", "entries", "expected"),
    [
        pytest.param(view(), ENTRIES, [], id="equal"),
        pytest.param(without("keys", DNS), ENTRIES, ["frontend-missing", "name-dangling",
                     "service-dangling"], id="a-frontend-is-missing"),
        pytest.param(view(), ENTRIES[:2], ["frontend-extra"], id="a-frontend-nobody-wants"),
        pytest.param(view(), (replace(ENTRIES[0], endpoints=(A,)), *ENTRIES[1:]),
                     ["endpoint-extra"], id="an-endpoint-that-left"),
        pytest.param(changed(view(), count=1), ENTRIES, ["endpoint-missing"],
                     id="an-endpoint-that-never-came"),
        pytest.param(view(), (replace(ENTRIES[0], owner=NONE), *ENTRIES[1:]), ["owner"],
                     id="another-owner"),
        pytest.param(changed(view(), algorithm=9), ENTRIES, ["algorithm"], id="algorithm"),
        pytest.param(changed(view(), affinity=9), ENTRIES, ["affinity"], id="affinity"),
        pytest.param(changed(view(), frontend=DNS), ENTRIES, ["key"], id="key-copies-disagree"),
        pytest.param(empty(1), (replace(ENTRIES[0], endpoints=()), *ENTRIES[1:]), ["empty"],
                     id="the-wrong-errno-for-an-empty-set"),
        pytest.param(with_load(6, 4), ENTRIES, ["generation"], id="a-generation-not-in-load"),
        pytest.param(with_load(6, 3 | RETIRED), ENTRIES, ["generation"], id="a-retired-endpoint"),
        pytest.param(with_slot(Slot(B, 6, 3, 2)), ENTRIES, ["slot-owner"], id="a-slot-s-owner"),
        pytest.param(with_slot(Slot(A, 5, 1, 1)), ENTRIES, ["endpoint-extra", "endpoint-missing"],
                     id="an-endpoint-twice-in-a-set"),
        pytest.param(without("slot", 11), ENTRIES, ["endpoint-missing", "set"],
                     id="a-set-beyond-the-map"),
        pytest.param(without("owners", 2), ENTRIES, ["name-missing", "owner"], id="no-name"),
        pytest.param(with_name(), ENTRIES, ["name-dangling"], id="a-name-nobody-has"),
        pytest.param(with_service(), ENTRIES, ["service-dangling"], id="a-service-nobody-reaches"),
        pytest.param(view(), (Entry(WEB, NONE), *ENTRIES), [],
                     id="of-two-that-define-a-frontend-either-may-have-it"),
    ],
)  # fmt: skip
def test_verify_names_every_difference(
    maps: FakeView, entries: tuple[Entry, ...], expected: list[str]
) -> None:
    assert sorted(difference.kind for difference in compare(entries, maps)) == expected


def link(hook: str = "connect4", **values: Any) -> Link:
    return replace(Link(hook, 3, 77, True), **values)


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        pytest.param(link(), [], id="all-current"),
        pytest.param(link(program=None), ["not attached"], id="missing"),
        pytest.param(
            link(current=False),
            ["runs program 3, which is not the current generation's"],
            id="stale",
        ),
        pytest.param(link(cgroup=0), ["its cgroup is gone"], id="cgroup-gone"),
        pytest.param(link(cgroup=5), ["is attached to cgroup 5, others to 77"], id="elsewhere"),
    ],
)
def test_verify_names_hooks_that_do_not_run_as_they_should(odd: Link, expected: list[str]) -> None:
    found = link_differences([odd, link("connect6"), link("sendmsg4")])
    assert found == [Difference("link", "connect4", message) for message in expected]


def test_the_desired_state_is_worked_out_as_the_agent_does(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text(
        """{apiVersion: v1, kind: Service, metadata: {name: web},
        spec: {clusterIP: 10.96.0.1, selector: {a: b}, ports: [{port: 80, targetPort: p}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: x, labels: {a: b}},
 spec: {containers: [{name: c, ports: [{name: p, containerPort: 8080}]}]},
 status: {podIP: 10.0.0.1, conditions: [{type: Ready, status: "True"}]}}
"""
    )
    status = {
        "settings": {"manifests": str(tmp_path), "state_dir": str(tmp_path / "none")},
        "dns": {"listen": ["10.0.0.9:5353"]},
    }
    tracker, problems = desired.read(desired.inputs(status))
    entries = desired.entries(tracker, Context())
    assert not problems
    assert sorted((str(e.frontend), str(e.owner), len(e.endpoints)) for e in entries) == [
        ("10.96.0.10:*", "kube-system/kube-dns:dns", 0),
        ("10.96.0.10:53/TCP", "kube-system/kube-dns:dns-tcp", 1),
        ("10.96.0.10:53/UDP", "kube-system/kube-dns:dns", 1),
        ("10.96.0.1:*", "default/web", 0),
        ("10.96.0.1:80/TCP", "default/web", 1),
    ]


# -- status --------------------------------------------------------------------------------------


def seen(pid: int | None = 42, odd: Link | None = None, **status: Any) -> health.Observation:
    links = [link(hook.name) for hook in HOOKS]
    if odd:
        links = [odd if odd.hook == each.hook else each for each in links]
    sync = {"time": 90.0, "seconds": 0.01, "services": 2, "syncs": 3, "failures": 0}
    whole = {
        "version": "1",
        "started": 40.0,
        "stopped": None,
        "sync": {**sync, "problems": 1, "attached": True},
        "problems": [{"message": "m", "mend": "f", "severity": "error"}],
    }
    return health.Observation(
        pid, whole | status, "abc", tuple(links), {77: "/cg"}, (), 100, {"refused": 1}, 100.0
    )


@pytest.mark.parametrize(
    ("observation", "reasons"),
    [
        pytest.param(seen(), [], id="healthy-with-problems-in-objects"),
        pytest.param(
            seen(pid=None),
            ["the agent is not running: start it with 'pointsman up'"],
            id="no-agent",
        ),
        pytest.param(
            seen(pid=None, failed="thread source failed"),
            ["the agent is not running (thread source failed): start it with 'pointsman up'"],
            id="an-agent-that-failed",
        ),
        pytest.param(
            seen(stopped=50.0),
            ["the agent has not reported yet: it is starting"],
            id="the-file-is-of-the-agent-before",
        ),
        pytest.param(
            replace(seen(), pid=43, status={"pid": 42}),
            ["the agent has not reported yet: it is starting"],
            id="the-file-is-of-an-agent-that-was-killed",
        ),
        pytest.param(
            seen(sync={"attached": True, "error": "No space left"}),
            ["the last sync failed: No space left"],
            id="a-failed-sync",
        ),
        pytest.param(
            seen(sync={}), ["the agent has not completed its first sync"], id="not-yet-synced"
        ),
        pytest.param(
            seen(odd=link("recvmsg4", program=None)),
            ["recvmsg4: not attached"],
            id="a-missing-hook",
        ),
        pytest.param(
            replace(seen(), links=tuple(Link(hook.name) for hook in HOOKS)),
            ["all 10 hooks: not attached"],
            id="loaded-only",
        ),
    ],
)
def test_health(observation: health.Observation, reasons: list[str]) -> None:
    found = health.report(observation)
    assert (found["healthy"], found["reasons"]) == (not reasons, reasons)


def test_the_report_for_scripts_has_stable_keys() -> None:
    found = json.loads(json.dumps(health.report(seen())))
    assert {key: sorted(value) for key, value in found.items() if isinstance(value, dict)} == {
        "agent": sorted(
            "running pid reporting version started uptimeSeconds stopped failed".split()
        ),
        "datapath": ["cgroup", "generation", "hooks", "links", "mappedBytes"],
        "sync": sorted(
            "attached time agoSeconds seconds services syncs failures problems error".split()
        ),
        "source": ["balanced", "kind", "listed", "objects", "path"],
        "dns": ["clusterIPs", "enabled", "forwarded", "listen", "queries", "upstreams"],
        "counters": ["refused"],
    }
    assert list(found) == (
        "healthy reasons agent datapath maps sync source dns counters problems".split()
    )
    assert found["agent"]["uptimeSeconds"] == 60.0
    assert found["datapath"]["cgroup"] == {"id": 77, "path": "/cg", "configured": None}


# -- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["get", "pods"], "is not one of: services (service, svc)"),
        (["get"], "Missing argument 'RESOURCE'"),
        (["get", "svc", "-o", "xml"], "is not one of"),
        (["get", "svc", "-A", "-n", "x"], "exclude each other"),
        (["get", "svc", "a/b", "-n", "c"], "names namespace a, but -n says c"),
        (["describe", "frontends", "x"], "is not one of: services"),
        (["explain", "web:80"], "no IP address"),
        (["map", "dump"], "Missing argument 'NAME'"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "require_root", lambda: None)
    result = CliRunner().invoke(cli, arguments)
    assert (result.exit_code, said in result.output) == (2, True), result.output


@pytest.mark.parametrize(
    "command",
    ["get svc", "explain 10.96.0.1:80", "map list", "map dump load", "status"],
)
def test_commands_say_that_nothing_is_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "require_root", lambda: None)
    result = CliRunner().invoke(cli, [*command.split(), "--bpffs", str(tmp_path)])
    assert result.exception is not None
    assert getattr(result.exception, "exit_code", None) == 11


@pytest.mark.parametrize("command", ["get", "describe", "explain", "status", "verify", "map"])
def test_every_command_shows_examples(command: str) -> None:
    assert "pointsman " + command in CliRunner().invoke(cli, [command, "--help"]).output
