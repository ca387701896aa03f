"""Which endpoint a new flow gets: affinity, then the Maglev table, then the hash."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pointsman import abi
from pointsman.maglev import flow_hash
from pointsman.values import TCP, Frontend, to_address, to_text
from tests.kernel.packets.node import ELSEWHERE, Choice, Node, node_port
from tests.kernel.packets.test_flows import endpoint_of
from tests.kernel.packets.world import (
    FAMILIES,
    IN_RANGE,
    MANY,
    RANGED,
    REMOTE,
    STICKY,
    Family,
    arriving,
)
from tests.support.packetlab import tuple_key
from tests.support.packets import DROP, SEND

_PLACES = 32  # entries of one line of `maglev`


def chosen(node: Node, f: Family, port: int, sport: int, to: str = "", client: str = "") -> str:
    packet = f.tcp((client or f.client, sport), (to or f.node, port))
    return endpoint_of(f, node.send(arriving(packet)))


def table_of(node: Node, address: str, port: int) -> tuple[list[str], list[int], int]:
    """The outside set of a frontend, its table, and the table's first line."""
    service = node.lab.maps.find(Frontend(to_address(address), port, TCP))
    assert service is not None
    value = node.lab.map("services").lookup(struct.pack("=I", service))
    assert value is not None
    read = abi.layouts()["service"].decode(value)
    count, first = read["outside"] >> 32, read["outside"] & 0xFFFFFFFF
    members = [to_text(slot.backend[0]) for slot in node.lab.maps.slots(first, count)]
    entries, line = read["table"] >> 32, read["table"] & 0xFFFFFFFF
    places: list[int] = []
    for number in range(-(-entries // _PLACES)):
        raw = node.lab.map("maglev").lookup(struct.pack("=I", line + number))
        assert raw is not None
        places += struct.unpack(f"={_PLACES}H", raw)
    return members, places[:entries], line


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_the_table_says_which_endpoint(node: Node, f: Family) -> None:
    members, places, _ = table_of(node, f.any, MANY)
    assert len(members) == 5
    assert len(places) > 100
    for sport in range(2000, 2100):
        value = flow_hash(tuple_key((f.client, sport), (f.node, MANY), TCP))
        wanted = members[places[value * len(places) >> 32]]
        assert chosen(node, f, MANY, sport) == wanted


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_all_endpoints_are_used(node: Node, f: Family) -> None:
    used = {chosen(node, f, MANY, 3000 + number) for number in range(100)}
    assert len(used) == 5


@contextmanager
def no_table(node: Node, address: str, port: int) -> Iterator[None]:
    service = node.lab.maps.find(Frontend(to_address(address), port, TCP))
    assert service is not None
    services, key = node.lab.map("services"), struct.pack("=I", service)
    saved = services.lookup(key)
    assert saved is not None
    at = abi.layouts()["service"].field("table").offset
    services.update(key, saved[:at] + bytes(8) + saved[at + 8 :])
    try:
        yield
    finally:
        services.update(key, saved)


def weighed(node: Node, f: Family, *weights: int) -> None:
    some = tuple((f"{f.remote}{i}", ELSEWHERE) for i in range(len(weights)))
    node.set(f"{f!r}-{MANY}".lower(), *node_port(f, MANY, Choice(some, weights=weights)))


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_flows_come_by_weight(node: Node, f: Family) -> None:
    weighed(node, f, 100, 0, 300)
    found = Counter(chosen(node, f, MANY, 3000 + number) for number in range(400))
    assert found.keys() == {f"{f.remote}0", f"{f.remote}2"}
    assert 60 <= found[f"{f.remote}0"] <= 140, found


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_flows_come_by_weight_also_without_a_table(node: Node, f: Family) -> None:
    """As where the map of tables is full."""
    weighed(node, f, 100, 0, 300)
    with no_table(node, f.any, MANY):
        found = Counter(chosen(node, f, MANY, 3000 + number) for number in range(400))
    assert found.keys() == {f"{f.remote}0", f"{f.remote}2"}
    assert 60 <= found[f"{f.remote}0"] <= 140, found


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_equal_nodes_choose_alike(node: Node, f: Family) -> None:
    """Whatever else they serve, in whatever order they learned of it, and at whatever address of a
    node they are asked: if a router moves a flow to another node, the endpoint stays."""
    before = [chosen(node, f, MANY, 3000 + number) for number in range(50)]
    many = Choice(tuple((f"{f.remote}{i}", ELSEWHERE) for i in range(5)))
    node.lab.forget()
    node.serve(f, MANY)
    node.serve(f, REMOTE, *((f"{f.remote}{i}", ELSEWHERE) for i in range(9)))
    node.set(f"{f!r}-{MANY}".lower(), *node_port(f, MANY, many))
    assert [chosen(node, f, MANY, 3000 + number) for number in range(50)] == before
    node.lab.forget()
    again = [chosen(node, f, MANY, 3000 + number, f.node1) for number in range(50)]
    assert again == before


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_few_flows_move_when_an_endpoint_leaves(node: Node, f: Family) -> None:
    """Those of the one that left, and few others: seen without flows, as another node would."""
    ports = range(3000, 3200)
    before = {sport: chosen(node, f, MANY, sport) for sport in ports}
    gone = f"{f.remote}3"
    node.serve(f, MANY, *((f"{f.remote}{i}", ELSEWHERE) for i in range(5) if i != 3))
    node.lab.forget()
    after = {sport: chosen(node, f, MANY, sport) for sport in ports}
    assert gone not in after.values()
    others = [sport for sport in ports if before[sport] != gone]
    moved = [sport for sport in others if before[sport] != after[sport]]
    assert len(moved) < len(others) / 4


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_table_that_is_behind_its_set_is_no_harm(node: Node, f: Family) -> None:
    """For an instant after a set has shrunk the table may name places that it no longer has."""
    members, places, line = table_of(node, f.any, MANY)
    full = struct.pack(f"={_PLACES}H", *[40] * _PLACES)
    saved = {}
    for number in range(-(-len(places) // _PLACES)):
        key = struct.pack("=I", line + number)
        saved[key] = node.lab.map("maglev").lookup(key)
        node.lab.map("maglev").update(key, full)
    try:
        for sport in range(4000, 4020):
            assert chosen(node, f, MANY, sport) in members
    finally:
        for key, value in saved.items():
            assert value is not None
            node.lab.map("maglev").update(key, value)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_a_client_with_affinity_keeps_its_endpoint(node: Node, f: Family) -> None:
    """By its address: at each of the Service's addresses, from any port of its own."""
    first = chosen(node, f, STICKY, IN_RANGE)
    for number in range(30):
        assert chosen(node, f, STICKY, 5000 + number) == first
        assert chosen(node, f, STICKY - 30000, 6000 + number, f.vip) == first


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_other_clients_have_others(node: Node, f: Family) -> None:
    base = f.client[:-1]
    found = {chosen(node, f, STICKY, 5000, client=f"{base}{i}") for i in range(1, 10)}
    assert len(found) > 1


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_affinity_is_for_members_only(node: Node, f: Family) -> None:
    first = chosen(node, f, STICKY, IN_RANGE)
    left = [f"{f.remote}{i}" for i in range(5) if f"{f.remote}{i}" != first]
    node.serve(f, STICKY, *((address, ELSEWHERE) for address in left), affinity=600)
    second = chosen(node, f, STICKY, IN_RANGE + 1)
    assert second in left
    assert chosen(node, f, STICKY, IN_RANGE + 2) == second


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_affinity_ends_with_its_time(node: Node, f: Family) -> None:
    state = node.lab.map("affinity_clients")
    found = set()
    for number in range(40):
        found.add(chosen(node, f, STICKY, 7000 + number))
        ((key, value),) = state.items()
        at = abi.layouts()["affinity"].field("seen").offset
        (seen,) = struct.unpack_from("=Q", value, at)
        aged = bytearray(value)
        struct.pack_into("=Q", aged, at, seen - 601 * 10**9)
        state.update(key, bytes(aged))
    assert len(found) > 1


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_source_ranges_hold_for_new_flows(node: Node, f: Family) -> None:
    for client, verdict in ((f.client, SEND), (f.stranger, DROP)):
        for packet in (f.tcp, f.udp):
            outcome = node.send(arriving(packet((client, IN_RANGE), (f.vip, RANGED))))
            assert outcome.verdict == verdict
