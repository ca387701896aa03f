"""What is said of a packet from outside: the walk of the packet programs, step by step."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pointsman import abi
from pointsman.explainpackets import Client, PacketExplanation, explain_packet, parse_client
from pointsman.flows import ANSWERED, FIN, REPLY, RST, SECOND, Tuple, pack_tuple
from pointsman.inspect import plain
from pointsman.maglev import PER_LINE, flow_hash
from pointsman.plan import Element, Run, Slot
from pointsman.values import TCP, UDP, Address, Frontend, PortName, to_address
from tests.support.view import FLAGS, FakeView, backend, frontend

NOW = 1000 * SECOND
OUTSIDE, LOCAL, RANGES = (FLAGS[f"PACKETS_{name}"] for name in ("OUTSIDE", "LOCAL", "RANGES"))
HERE, ELSEWHERE = FLAGS["SLOT_HERE"], FLAGS["SLOT_ELSEWHERE"]
VIP, NODE_PORT = frontend("203.0.113.9", 80), frontend("192.0.2.1", 30080)
CLIENT = to_address("198.51.100.9")
A, B = backend("10.0.0.1:8080"), backend("10.0.0.2:8080")
_settings = abi.layouts()["packet_settings"].packer(
    "first_port", "last_port", "dsr", "tcp_new", "tcp_open", "tcp_closing"
)
_affinity = abi.layouts()["affinity"].packer("seen", "addr", "port")
_flow = abi.layouts()["flow"].packer("other", "seen", "endpoint", "generation", "owner", "flags")


@dataclass
class FakePackets:
    flows: dict[bytes, bytes] = field(default_factory=dict)
    lines: dict[int, tuple[int, ...]] = field(default_factory=dict)
    welcome: frozenset[tuple[int, Address]] = frozenset()
    kept: dict[tuple[Address, int], bytes] = field(default_factory=dict)
    dsr: int = 0

    def find(self, key: bytes) -> bytes | None:
        return self.flows.get(key)

    def line(self, index: int) -> tuple[int, ...]:
        return self.lines.get(index, (0,) * PER_LINE)

    def admits(self, service: int, client: Address) -> bool:
        return (service, client) in self.welcome

    def client_affinity(self, client: Address, owner: int) -> bytes | None:
        return self.kept.get((client, owner))

    def settings(self) -> bytes:
        return _settings(61000, 65535, self.dsr, 60, 86400, 10)


def maps(**changes: Any) -> FakeView:
    """A load balancer's address with an endpoint here and one elsewhere, its NodePort, and the
    addresses of this node and of another. `changes`: of the elements of the first two."""
    element = Element(VIP, 1, 10, 2, 0, 0, 0, packets=OUTSIDE, outside=Run(10, 2))
    element = replace(element, **changes)
    port = replace(element, frontend=frontend("0.0.0.0", 30080), flags=FLAGS["SERVICE_NODE_PORT"])
    view = FakeView(
        keys={VIP: 1, port.frontend: 2},
        elements={1: element, 2: port},
        owners={1: PortName("shop", "web", "http"), 2: PortName("", "node/n1", "")},
        slot={10: Slot(A, 5, 1, 1, HERE), 11: Slot(B, 6, 1, 1, ELSEWHERE)},
        loads={5: (1, 0), 6: (1, 0)},
    )
    view.add(frontend("192.0.2.1", 0, 0), 2, flags="NODE")
    view.add(frontend("192.0.2.2", 0, 0), 2, flags="REMOTE_NODE")
    view.add(frontend("10.96.0.1", 0, 0), 1)
    view.add(frontend("10.96.0.1", 80), 1, 10, 2)
    return view


def explained(
    of: FakeView | None = None,
    to: Frontend = VIP,
    port: int | None = 40000,
    packets: FakePackets | None = None,
    **more: Any,
) -> PacketExplanation:
    client = Client(CLIENT, port)
    return explain_packet(of or maps(), packets or FakePackets(), to, client, NOW, **more)


def key(to: Frontend = VIP) -> bytes:
    return pack_tuple(Tuple(CLIENT, 40000, to.address, to.port, to.protocol))


@pytest.mark.parametrize(
    ("to", "of", "verdict", "why"),
    [
        pytest.param(VIP, maps(), "forwarded", "shop/web:http, which chooses", id="vip"),
        pytest.param(NODE_PORT, maps(), "forwarded", "shop/web:http", id="node-port"),
        pytest.param(
            frontend("192.0.2.2", 30080), maps(), "passed", "no address of this node",
            id="node-port-of-another-node",
        ),
        pytest.param(
            frontend("192.0.2.1", 22), maps(), "passed", "no Service has the NodePort 22",
            id="the-node-s-own-port",
        ),
        pytest.param(
            frontend("0.0.0.0", 30080), maps(), "passed", "no address of this node",
            id="the-key-of-a-node-port-itself",
        ),
        pytest.param(
            frontend("10.96.0.1", 80), maps(), "passed", "not served to clients outside",
            id="cluster-ip",
        ),
        pytest.param(
            frontend("203.0.113.9", 81), maps(), "passed", "no frontend", id="undefined-port"
        ),
        pytest.param(
            VIP, maps(outside=Run(FLAGS["EMPTY_REFUSE"], 0)), "refused", "has no endpoints",
            id="no-endpoints",
        ),
        pytest.param(
            VIP,
            maps(outside=Run(FLAGS["EMPTY_UNREACHABLE"], 0), packets=OUTSIDE | LOCAL),
            "dropped",
            "externalTrafficPolicy is Local",
            id="none-on-this-node",
        ),
        pytest.param(
            VIP, maps(packets=OUTSIDE | RANGES), "dropped", "loadBalancerSourceRanges",
            id="not-in-the-ranges",
        ),
    ],
)  # fmt: skip
def test_the_verdict_and_why(to: Frontend, of: FakeView, verdict: str, why: str) -> None:
    found = explained(of, to)
    assert found.verdict == verdict
    assert why in found.why
    assert found.destination == str(to)


@pytest.mark.parametrize(
    ("of", "counter"),
    [
        (maps(packets=OUTSIDE | RANGES), "drop_source_range"),
        (maps(outside=Run(FLAGS["EMPTY_UNREACHABLE"], 0)), "drop_no_local_endpoint"),
        (maps(outside=Run(FLAGS["EMPTY_REFUSE"], 0)), "packet_refused"),
        (maps(), ""),
    ],
)
def test_a_drop_names_its_counter(of: FakeView, counter: str) -> None:
    assert explained(of).counter == counter


def test_a_client_in_the_ranges_is_served() -> None:
    packets = FakePackets(welcome=frozenset({(1, CLIENT)}))
    assert explained(maps(packets=OUTSIDE | RANGES), packets=packets).verdict == "forwarded"


def test_the_entry_of_the_table_is_that_of_this_very_flow() -> None:
    entries = 251
    entry = flow_hash(key()) * entries >> 32
    line = [0] * PER_LINE
    line[entry % PER_LINE] = 1
    packets = FakePackets(lines={7 + entry // PER_LINE: tuple(line)})
    found = explained(maps(table=Run(7, entries)), packets=packets)
    assert found.endpoint == "10.0.0.2:8080"
    assert any(f"entry {entry} of 251 has place 1" in step for step in found.steps)
    shares = {each.endpoint: each.share for each in found.endpoints}
    assert shares == {
        "10.0.0.1:8080": pytest.approx(250 / 251, abs=1e-6),
        "10.0.0.2:8080": pytest.approx(1 / 251, abs=1e-6),
    }


def test_a_place_that_the_set_lacks_falls_back_to_the_hash() -> None:
    packets = FakePackets(lines={7 + i: (9,) * PER_LINE for i in range(8)})
    found = explained(maps(table=Run(7, 251)), packets=packets)
    assert found.endpoint == ["10.0.0.1:8080", "10.0.0.2:8080"][2 * flow_hash(key()) >> 32]


def test_without_a_port_any_endpoint_is_possible_and_a_note_says_so() -> None:
    found = explained(port=None)
    assert (found.endpoint, len(found.endpoints)) == ("", 2)
    assert "give --from ADDRESS:PORT" in found.notes[0]


@pytest.mark.parametrize(
    ("place", "dsr", "flags", "said"),
    [
        (HERE, 0, OUTSIDE, "on this node: it sees the client's address"),
        (ELSEWHERE, 0, OUTSIDE, "with a port of 61000 to 65535"),
        (ELSEWHERE, 1, OUTSIDE, "IPIP tunnel"),
        (0, 0, OUTSIDE, "where the route leads"),
        (0, 0, OUTSIDE | LOCAL, "sees the client's address"),
    ],
)
def test_how_it_gets_there(place: int, dsr: int, flags: int, said: str) -> None:
    view = maps(packets=flags, outside=Run(10, 1))
    view.slot[10] = replace(view.slot[10], place=place)
    assert said in explained(view, packets=FakePackets(dsr=dsr)).result


@pytest.mark.parametrize(
    ("age", "backend_", "said"),
    [
        pytest.param(10, B, "10.0.0.2:8080, 50 s left", id="valid"),
        pytest.param(70, B, "expired", id="expired"),
        pytest.param(10, backend("10.0.0.9:1"), "not in the set any more", id="left"),
    ],
)
def test_affinity_comes_before_the_hash(age: int, backend_: Any, said: str) -> None:
    raw = _affinity(NOW - age * SECOND, backend_[0], socket.htons(backend_[1]))
    packets = FakePackets(kept={(CLIENT, 1): raw})
    found = explained(maps(affinity=60), packets=packets)
    assert any(said in step for step in found.steps)
    assert ("keeps a client's endpoint" in found.why) == (age == 10 and backend_ == B)


@pytest.mark.parametrize(
    ("generation", "said"), [(1, "its packets go there"), (2, "that endpoint has left")]
)
def test_a_flow_that_is_remembered_is_noted(generation: int, said: str) -> None:
    back = pack_tuple(Tuple(*B, CLIENT, 40000, TCP))
    packets = FakePackets(flows={key(): _flow(back, NOW - SECOND, 6, generation, 1, ANSWERED)})
    found = explained(packets=packets)
    assert "10.0.0.2:8080" in found.notes[0]
    assert said in found.notes[0]
    assert any("idle for 1 s" in step for step in found.steps)


@pytest.mark.parametrize(
    ("client", "endpoint", "age", "begins", "stays"),
    [
        pytest.param(ANSWERED, ANSWERED, 1, True, True, id="syn-again"),
        pytest.param(FIN, 0, 1, True, True, id="syn-after-the-clients-fin"),
        pytest.param(FIN, FIN, 1, True, False, id="syn-after-fin"),
        pytest.param(FIN, FIN, 1, False, True, id="last-ack"),
        pytest.param(RST, ANSWERED, 9, True, True, id="syn-soon-after-the-clients-reset"),
        pytest.param(RST, ANSWERED, 11, True, False, id="syn-after-the-clients-reset"),
        pytest.param(ANSWERED, RST, 1, True, False, id="syn-after-the-endpoints-reset"),
        pytest.param(0, 0, 61, True, False, id="syn-after-silence"),
    ],
)
def test_a_new_connection_takes_the_place_of_one_that_is_over(
    client: int, endpoint: int, age: int, begins: bool, stays: bool
) -> None:
    back = pack_tuple(Tuple(*B, CLIENT, 40000, TCP))
    seen = NOW - age * SECOND
    halves = {
        key(): _flow(back, seen, 6, 1, 1, client),
        back: _flow(key(), seen, 6, 1, 1, endpoint | REPLY),
    }
    found = explained(packets=FakePackets(flows=halves), begins=begins)
    assert found.remembered == ("10.0.0.2:8080" if stays else "")


@pytest.mark.parametrize(
    ("of", "dsr", "verdict"),
    [
        pytest.param(maps(packets=OUTSIDE | RANGES), 0, "passed", id="before-the-ranges"),
        pytest.param(maps(outside=Run(0, 0)), 0, "passed", id="before-the-empty-set"),
        pytest.param(maps(outside=Run(0, 0)), 1, "passed", id="dsr-without-endpoints"),
        pytest.param(maps(packets=OUTSIDE | RANGES), 1, "dropped", id="dsr-and-the-ranges"),
        pytest.param(maps(outside=Run(11, 1)), 1, "forwarded", id="dsr-to-another-node"),
        pytest.param(maps(outside=Run(10, 1)), 1, "passed", id="dsr-to-this-node"),
    ],
)
def test_what_began_elsewhere_is_left_alone_before_all_else(
    of: FakeView, dsr: int, verdict: str
) -> None:
    assert explained(of, packets=FakePackets(dsr=dsr), begins=False).verdict == verdict


def test_it_is_plain_values_for_scripts() -> None:
    value = plain(explained())
    assert value["client"] == "198.51.100.9:40000"
    assert value["endpoints"][0]["where"] == "on this node"
    assert isinstance(value["frontendId"], int)


def test_udp_is_another_frontend_than_tcp() -> None:
    assert explained(to=VIP._replace(protocol=UDP)).verdict == "passed"


def test_client_and_destination_are_of_one_family() -> None:
    with pytest.raises(ValueError, match="not of one family"):
        explained(to=frontend("fd00::1", 80))


@pytest.mark.parametrize(
    ("text", "client"),
    [
        ("198.51.100.9", Client(CLIENT)),
        ("198.51.100.9:40000", Client(CLIENT, 40000)),
        ("2001:db8::7", Client(to_address("2001:db8::7"))),
        ("[2001:db8::7]", Client(to_address("2001:db8::7"))),
        ("[2001:db8::7]:53", Client(to_address("2001:db8::7"), 53)),
    ],
)
def test_a_client_is_an_address_with_or_without_a_port(text: str, client: Client) -> None:
    assert parse_client(text) == client
    assert parse_client(str(client)) == client


@pytest.mark.parametrize(
    "text", ["node", "", "198.51.100.9:0", "198.51.100.9:65536", "198.51.100:80", "[fd00::1]:x"]
)
def test_what_is_no_client_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_client(text)
