"""What the maps hold, as tables, as rows for scripts and map by map."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Any

import pytest

from pointsman import abi, affinityrows, dump, inspect, shares
from pointsman.cli import show
from pointsman.cli.resources import BY_NAME, changes
from pointsman.endpointrows import endpoints
from pointsman.maglev import stamp
from pointsman.outcomes import Outcomes, outcomes_of
from pointsman.pins import Sizes
from pointsman.plan import Run, Slot
from pointsman.policies import PolicyElement
from pointsman.ranges import parse
from pointsman.values import TCP, Backend, Policy, PortName, to_address
from tests.support.view import (
    HOST_NETNS,
    WEB,
    A,
    B,
    FakeView,
    backend,
    frontend,
    node_view,
    view,
)

SECOND = 1_000_000_000
#: Of an endpoint to which nothing has connected.
UNSEEN = {
    "owner": 0, "name": "", "connectMicroseconds": None, "measured": None, "connects": 0,
    "failures": 0, "streak": 0, "ejections": 0, "ejectedUntil": None, "trial": False,
}  # fmt: skip


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
NAMESPACE   NAME   TYPE        CLUSTER-IP   EXTERNAL-IP   PORT(S)   ENDPOINTS   OPEN
default     dns    ClusterIP   fd00::a      <none>        53/UDP    1           0
shop        web    ClusterIP   10.96.0.1    <none>        80/TCP    2           6""",
            id="services",
        ),
        pytest.param(
            "services",
            "wide",
            "\n".join(
                (
                    "NAMESPACE   NAME   TYPE        CLUSTER-IP   EXTERNAL-IP   PORT(S)   "
                    "ENDPOINTS   OPEN   ALGORITHM   CHOICE   EJECTED   AFFINITY   IDS",
                    "default     dns    ClusterIP   fd00::a      <none>        53/UDP    "
                    "1           0      random      <none>   0         60s        3,4",
                    "shop        web    ClusterIP   10.96.0.1    <none>        80/TCP    "
                    "2           6      random      <none>   0         <none>     1,2",
                )
            ),
            id="services-wide",
        ),
        pytest.param(
            "ep",
            "wide",
            """\
NAMESPACE   NAME   PORT      ENDPOINT        \
OPEN   ID   GENERATION   CURRENT   WEIGHT   CONNECT   FAILED   STATE
default     dns    <unset>   [fd00::5]:53    0      7    1            yes       <none>   <none>    \
0/0      ready
shop        web    http      10.0.0.1:8080   4      5    1            yes       <none>   <none>    \
0/0      ready
shop        web    http      10.0.0.2:8080   2      6    3            yes       <none>   <none>    \
0/0      ready""",
            id="endpoints-wide",
        ),
        pytest.param(
            "fe",
            "table",
            """\
NAMESPACE   NAME   PORT      FRONTEND           KIND        FLAGS    ENDPOINTS   OPEN
default     dns    <unset>   [fd00::a]:53/UDP   ClusterIP   <none>   1           0
default     dns    *         [fd00::a]:*        ClusterIP   <none>   refuse      0
shop        web    http      10.96.0.1:80/TCP   ClusterIP   <none>   2           6
shop        web    *         10.96.0.1:*        ClusterIP   <none>   refuse      0""",
            id="frontends",
        ),
    ],
)
def test_tables_look_like_kubectl_s(name: str, form: str, expected: str) -> None:
    assert rendered(name, form) == expected


def test_every_kind_of_service_is_shown_as_kubectl_does() -> None:
    assert rendered("services", of=node_view()).splitlines() == [
        "NAMESPACE   NAME   TYPE           CLUSTER-IP   EXTERNAL-IP   PORT(S)         ENDPOINTS   "
        "OPEN",
        "shop        api    LoadBalancer   10.96.0.7    203.0.113.9   80:30080/TCP    2           "
        "6",
        "shop        ext    NodePort       10.96.0.8    192.0.2.1     443:31443/TCP   1           "
        "0",
    ]


def test_frontends_that_are_no_service_s_are_frontends_still() -> None:
    found = [(row.frontend, row.kind, row.flags) for row in inspect.frontends(node_view())]
    assert found == [
        ("10.96.1.1:*", "Pass", ("pass",)),
        ("127.0.0.1:*", "Loopback", ("loopback",)),
        ("192.0.2.1:*", "Node", ("node",)),
        ("192.0.2.2:*", "RemoteNode", ("remote-node",)),
        ("0.0.0.0:30080/TCP", "NodePort", ("this-node", "guarded", "node-port")),
        ("10.96.0.7:80/TCP", "ClusterIP", ()),
        ("10.96.0.7:*", "ClusterIP", ()),
        ("203.0.113.9:80/TCP", "External", ("guarded",)),
        ("0.0.0.0:31443/TCP", "NodePort", ("node-port",)),
        ("10.96.0.8:443/TCP", "ClusterIP", ()),
        ("10.96.0.8:*", "ClusterIP", ()),
        ("192.0.2.1:443/TCP", "External", ()),
        ("0.0.0.0:8080/TCP", "HostPort", ("this-node", "node-port")),
        ("127.0.0.1:9090/TCP", "HostPort", ("host-netns",)),
    ]
    empty = {row.kind for row in inspect.frontends(node_view()) if row.when_empty}
    assert empty == {"ClusterIP"}


def test_a_service_whose_clusterip_is_not_translated_shows_its_node_port_alone() -> None:
    maps = FakeView(owners={1: PortName("shop", "api", "http")})
    maps.add(frontend("0.0.0.0", 30080), 1)
    assert rendered("services", of=maps).splitlines()[1].split() == [
        "shop", "api", "NodePort", "<none>", "<none>", "<unknown>:30080/TCP", "0", "0"
    ]  # fmt: skip


def sticky() -> FakeView:
    maps = node_view()
    maps.remember(HOST_NETNS, 1, A, 100 * SECOND)
    maps.remember(5000, 1, B, 30 * SECOND)
    maps.remember(5001, 1, backend("10.0.0.9:8080"), 100 * SECOND)
    maps.remember(5002, 9, A, 100 * SECOND)
    return maps


def test_affinity_shows_who_has_which_endpoint_and_for_how_long() -> None:
    rows = affinityrows.affinity(sticky(), 110 * SECOND)
    assert [
        (r.service, r.client, r.endpoint, r.state, r.age_seconds, r.left_seconds) for r in rows
    ] == [
        ("", "5002", "10.0.0.1:8080", "left", 10.0, 0.0),
        ("api", "host", "10.0.0.1:8080", "valid", 10.0, 50.0),
        ("api", "5000", "10.0.0.2:8080", "expired", 80.0, 0.0),
        ("api", "5001", "10.0.0.9:8080", "left", 10.0, 0.0),
    ]  # fmt: skip
    assert {(r.port, r.family, r.timeout_seconds) for r in rows[1:]} == {("http", "IPv4", 60)}


def test_affinity_is_a_table_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic_ns", lambda: 110 * SECOND)
    assert rendered("affinity", of=sticky()).splitlines()[1:] == [
        "<none>      <none>   <unset>   5002     IPv4     10.0.0.1:8080   10s   <endpoint left>",
        "shop        api      http      host     IPv4     10.0.0.1:8080   10s   50s",
        "shop        api      http      5000     IPv4     10.0.0.2:8080   80s   <expired>",
        "shop        api      http      5001     IPv4     10.0.0.9:8080   10s   <endpoint left>",
    ]


def test_an_entry_that_only_grows_older_is_no_change_to_watch() -> None:
    before, after = (affinityrows.affinity(sticky(), now * SECOND) for now in (110, 120))
    assert changes(BY_NAME["affinity"], before, after) == []
    used = sticky()
    used.remember(HOST_NETNS, 1, A, 119 * SECOND)
    del used.raw["affinity"][0]
    found = changes(BY_NAME["affinity"], before, affinityrows.affinity(used, 120 * SECOND))
    assert [(change.type, change.row.client) for change in found] == [("MODIFIED", "host")]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(0, ()), (1, ("node",)), (16 | 64, ("this-node", "guarded")), (256, ("unknown (256)",))],
)
def test_flags_are_words(flags: int, expected: tuple[str, ...]) -> None:
    assert inspect.flag_names(flags) == expected


def test_a_port_of_two_families_counts_its_endpoints_once() -> None:
    maps = view()
    maps.add(frontend("10.96.0.9", 80), 1, 10, 2)
    maps.add(frontend("10.96.0.9", 0, 0), 1)
    row = inspect.services(maps)[1]
    assert (row.cluster_ips, row.endpoints, row.open) == (("10.96.0.1", "10.96.0.9"), 2, 6)


def test_connections_of_another_generation_are_not_the_endpoint_s() -> None:
    maps = view()
    maps.loads[5] = (2, 4)
    row = next(row for row in endpoints(maps, 0) if row.id == 5)
    assert (row.current, row.open) == (False, 0)


def test_rows_for_scripts_have_stable_keys() -> None:
    service = inspect.plain(inspect.services(view())[1])
    assert service == {
        "namespace": "shop",
        "name": "web",
        "type": "ClusterIP",
        "clusterIPs": ["10.96.0.1"],
        "externalIPs": [],
        "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": None}],
        "endpoints": 2,
        "open": 6,
        "algorithms": ["random"],
        "choice": [],
        "ejected": 0,
        "affinitySeconds": 0,
        "ids": [1, 2],
    }
    assert " ".join(inspect.plain(endpoints(view(), 0)[0])) == (
        "namespace service port endpoint id generation current open weight "
        "connectMicroseconds connects failures failuresInARow state ejection"
    )
    assert " ".join(inspect.plain(inspect.frontends(view())[0])) == (
        "namespace service portName kind frontend address port protocol endpoints open id owner "
        "algorithm choice policy affinitySeconds flags firstSlot whenEmpty packets "
        "outsideEndpoints outsideWhenEmpty tableEntries consistent"
    )
    assert " ".join(inspect.plain(affinityrows.affinity(sticky(), 0)[0])) == (
        "client netns namespace service port family endpoint state seen timeoutSeconds "
        "ageSeconds leftSeconds"
    )


def test_a_frontend_that_leads_nowhere_is_shown_and_not_fatal() -> None:
    maps = FakeView(keys={WEB: 99})
    row = inspect.frontends(maps)[0]
    assert (row.namespace, row.consistent, row.endpoints) == ("", False, 0)


def test_watching_names_only_what_changed() -> None:
    resource, before = BY_NAME["ep"], endpoints(view(), 0)
    maps = view()
    maps.loads[5] = (1, 9)
    maps.slot[11] = Slot(backend("10.0.0.3:8080"), 8, 1, 1)
    found = changes(resource, before, endpoints(maps, 0))
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


def socket_record(**values: int) -> bytes:
    pack = abi.layouts()["socket"].packer(
        "endpoint", "generation", "vip", "peer", "vip_port", "peer_port", "proto", "counted"
    )
    ports = socket.htons(80), socket.htons(8080)
    return pack(5, 1, WEB.address, A[0], *ports, TCP, values.get("counted", 1))


def place(cookie: int) -> bytes:
    return cookie.to_bytes(8, "little") + socket_record()


def bucket(cookie: int) -> bytes:
    return place(cookie) + bytes(8)


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
                {"frontend": "[fd00::a]:*", "service": 4},
                {"frontend": "[fd00::a]:53/UDP", "service": 3},
            ],
            id="frontends-as-people-write-them",
        ),
        pytest.param(
            "load",
            [],
            [
                UNSEEN | {"id": 5, "generation": 1, "state": "valid", "open": 4},
                UNSEEN | {"id": 6, "generation": 3, "state": "valid", "open": 2},
                UNSEEN | {"id": 7, "generation": 1, "state": "valid", "open": 0},
                UNSEEN | {"id": 9, "generation": 2, "state": "retired", "open": 1},
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
            [(bytes(4), bucket(0)), (b"\7\0\0\0", bucket(7 | 1 << 63))],
            [{"bucket": 7, "cookie": 7, "state": "busy", **RECORD}],
            id="free-places-are-left-out",
        ),
        pytest.param(
            "sockets_more",
            [(bytes(4), bytes(168)), (b"\7\0\0\0", place(0) + place(135) + place(0))],
            [{"bucket": 7, "cookie": 135, "state": "in use", **RECORD}],
            id="free-places-beside-others-are-left-out",
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
        pytest.param(
            "destroyed",
            [((135).to_bytes(8, "little"), bytes(4))],
            [{"cookie": 135}],
            id="sockets-that-the-agent-ended",
        ),
    ],
)
def test_dump(name: str, raw: list[tuple[bytes, bytes]], expected: list[dump.Row]) -> None:
    maps = replace(view(), raw={name: raw})
    assert list(dump.DUMPS[name](maps)) == expected


def test_what_is_known_of_an_endpoint_is_dumped() -> None:
    seen = Outcomes(1, 250, 9, 70, True, connects=20, failures=3, ejections=1, streak=2)
    maps = replace(view(), seen={5: seen})
    row = next(iter(dump.DUMPS["load"](maps)))
    assert row == {
        "id": 5, "generation": 1, "state": "valid", "open": 4, "owner": 1, "name": "shop/web:http",
        "connectMicroseconds": 250, "measured": 9, "connects": 20, "failures": 3, "streak": 2,
        "ejections": 1, "ejectedUntil": 70, "trial": True,
    }  # fmt: skip


def test_the_fields_of_load_are_read_as_the_programs_write_them() -> None:
    bits = abi.constants()["WINDOW_BITS"]
    window = 20 | 3 << bits | 1 << 2 * bits
    found = outcomes_of(1, 250, 9, 70 | abi.constants()["UNTIL_TRIAL"], window, 2)
    assert found == Outcomes(1, 250, 9, 70, True, 20, 3, 1, 2)
    assert outcomes_of(1, 250, 9, 70, window, 2).trial is False


def test_policies_are_dumped_with_how_many_are_ejected() -> None:
    policy = Policy(True, 7, 0, 5, shortest=10**10, longest=3 * 10**11, trial=3 * 10**9)
    seen = {5: Outcomes(owner=1, until=70), 6: Outcomes(owner=1)}
    maps = replace(view(), policy={1: PolicyElement(policy, 1)}, seen=seen)
    assert list(dump.DUMPS["policies"](maps)) == [
        {
            "owner": 1, "name": "shop/web:http", "watch": True, "maxConnections": 7, "room": 0,
            "streak": 5, "percent": None, "volume": 0, "shortestSeconds": 10.0,
            "longestSeconds": 300.0, "trialSeconds": 3.0, "most": 1, "ejected": 1,
        }
    ]  # fmt: skip


def test_shares_are_dumped_of_slots_in_use() -> None:
    data = shares.packed((1, 99), 2)
    raw = [(slot.to_bytes(4, "little"), data[i * 16 :][:16]) for i, slot in enumerate((10, 11))]
    maps = replace(view(), raw={"shares": [*raw, ((12).to_bytes(4, "little"), bytes(16))]})
    assert list(dump.DUMPS["shares"](maps)) == [
        {"slot": 10, "weight": 1, "otherZone": False, "keep": round(0.02 * 2**32), "other": 1},
        {"slot": 11, "weight": 99, "otherZone": False, "keep": 2**32 - 1, "other": 1},
    ]
    assert dump.used(maps, "shares") == dump.used(maps, "slots") == 3


def test_tables_for_sockets_are_dumped_with_their_weights() -> None:
    maps = view()
    maps.elements[1] = replace(maps.elements[1], algorithm=4 | 8, inside=Run(32, 251))
    maps.slot[10] = replace(maps.slot[10], weight=1)
    maps.stamps[Run(32, 251)] = stamp((A, B), (1, 100))
    (row,) = dump.DUMPS["maglev"](maps)
    assert (row["firstLine"], row["endpoints"], row["state"]) == (32, 2, "current")
    row = next(iter(dump.DUMPS["services"](maps)))
    assert (row["algorithm"], row["choice"], row["insideEntries"]) == ("maglev", ["weighted"], 251)
    maps.slot[10] = replace(maps.slot[10], weight=2)
    assert next(iter(dump.DUMPS["maglev"](maps)))["state"] == "stale"


def test_turns_are_dumped_of_services_that_have_had_some() -> None:
    raw = [((n).to_bytes(4, "little"), (n * 7).to_bytes(8, "little")) for n in (0, 1)]
    maps = replace(view(), raw={"turns": raw})
    assert list(dump.DUMPS["turns"](maps)) == [
        {"service": 1, "frontend": "10.96.0.1:80/TCP", "turn": 7}
    ]


def test_services_are_dumped_with_flags_in_words() -> None:
    rows = {row["frontend"]: row for row in dump.DUMPS["services"](node_view())}
    found = rows["0.0.0.0:30080/TCP"]
    assert (found["flags"], found["affinitySeconds"]) == (["this-node", "guarded", "node-port"], 60)
    assert (rows["192.0.2.1:*"]["flags"], rows["192.0.2.1:*"]["whenEmpty"]) == (["node"], None)
    assert rows["10.96.0.7:*"]["whenEmpty"] == "refuse"


def test_the_settings_and_whom_they_leave_alone_are_dumped() -> None:
    cidrs = (
        (to_address("10.96.0.0"), b"\xff" * 13 + b"\xf0\0\0"),
        (to_address("fd00:96::"), b"\xff" * 14 + b"\0\0"),
    )
    maps = replace(node_view(), skipped=(9, 8), cidrs=cidrs)
    assert list(dump.DUMPS["settings"](maps)) == [
        {
            "hostNetns": HOST_NETNS,
            "skipped": 2,
            "refusedCidrs": ["10.96.0.0/12", "fd00:96::/112"],
        }
    ]
    assert list(dump.DUMPS["skipped_netns"](maps)) == [{"netns": 8}, {"netns": 9}]
    assert dump.used(maps, "skipped_netns") == 2
    assert dump.map_row("settings", 2, 1, dump.used(maps, "settings"), 0).fill_percent is None


def test_affinity_is_dumped_whatever_has_become_of_its_service() -> None:
    assert list(dump.DUMPS["affinity"](sticky()))[2:] == [
        {
            "netns": netns,
            "client": str(netns),
            "owner": owner,
            "name": name,
            "family": 4,
            "endpoint": endpoint,
            "seen": 100 * SECOND,
        }
        for netns, owner, name, endpoint in (
            (5001, 1, "shop/api:http", "10.0.0.9:8080"),
            (5002, 9, "", "10.0.0.1:8080"),
        )
    ]


def test_shared_sets_are_dumped_and_counted_once() -> None:
    maps = view()
    maps.add(frontend("10.96.0.9", 80), 1, 10, 2)
    assert [row["slot"] for row in dump.DUMPS["slots"](maps)] == [10, 11, 20]
    assert dump.used(maps, "slots") == 3


def test_every_map_of_maps_h_has_a_dump_or_says_why_it_has_none() -> None:
    known = abi.map_specs(Sizes().definitions(), ["HAVE_MPTCP", "HAVE_PACKETS"])
    assert {name for name in known if name not in dump.DUMPS} == dump.UNLISTED.keys()
    assert {spec.type for spec in known.values()} <= dump.TYPES.keys()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(("load", 2, 200, 3, 0), (3, 200, 1.5), id="used-of-max"),
        pytest.param(("sockets_more", 2, 10, 3, 0), (3, 30, 10.0), id="records-not-buckets"),
        pytest.param(("datagrams", 24, 0, None, 0), (None, 0, None), id="not-countable"),
    ],
)
def test_fill(row: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    found = dump.map_row(*row)
    assert (found.used, found.max, found.fill_percent) == expected


SOURCE = parse("198.51.100.0/24")


def outside_view() -> FakeView:
    """shop/web for clients of one range, too: one of its two endpoints, from a set of its own."""
    maps = view()
    maps.slot[30] = Slot(A, 5, 1, 1, abi.constants()["SLOT_HERE"])
    flags = sum(abi.constants()[f"PACKETS_{name}"] for name in ("OUTSIDE", "LOCAL", "RANGES"))
    maps.elements[1] = replace(
        maps.elements[1], packets=flags, outside=Run(30, 1), table=Run(64, 251)
    )
    maps.admitted = {1: frozenset([SOURCE])}
    maps.stamps = {Run(64, 251): stamp((A,))}
    return maps


def test_what_clients_outside_get_is_dumped() -> None:
    maps = outside_view()
    service, other, *_ = dump.DUMPS["services"](maps)
    assert {key: service[key] for key in list(service)[-6:]} == {
        "packets": ["outside", "local", "ranges"],
        "outsideFirstSlot": 30,
        "outsideCount": 1,
        "outsideWhenEmpty": None,
        "tableFirstLine": 64,
        "tableEntries": 251,
    }
    assert [other[key] for key in list(other)[-6:]] == [[], None, None, None, None, None]
    assert [row["place"] for row in dump.DUMPS["slots"](maps)] == [None, None, None, "here"]
    assert list(dump.DUMPS["source_ranges"](maps)) == [
        {"service": 1, "frontend": "10.96.0.1:80/TCP", "range": "198.51.100.0/24"}
    ]


@pytest.mark.parametrize(("members", "state"), [((A,), "current"), ((A, B), "stale")])
def test_tables_are_dumped_and_counted_in_lines(members: tuple[Backend, ...], state: str) -> None:
    maps = outside_view()
    maps.stamps = {Run(64, 251): stamp(members)}
    (row,) = dump.DUMPS["maglev"](maps)
    assert (row["firstLine"], row["lines"], row["entries"]) == (64, 8, 251)
    assert (row["name"], row["endpoints"], row["state"]) == ("shop/web:http", 1, state)
    assert dump.used(maps, "maglev") == 8


def test_frontends_say_what_clients_outside_get() -> None:
    row = next(row for row in inspect.frontends(outside_view()) if row.packets)
    assert (row.packets, row.outside_endpoints) == (("outside", "local", "ranges"), 1)
    assert (row.outside_when_empty, row.table_entries) == ("", 251)
