"""Flows: two entries that become one, in which state, and which are worth a look of the sweep."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman import abi, expiry, flows
from pointsman.devices import Timeouts
from pointsman.flowrows import flow_row, port_rows
from pointsman.flows import (
    ANSWERED,
    DSR,
    FIN,
    POD,
    REMOTE,
    REPLY,
    RST,
    SECOND,
    Filter,
    PortUse,
    Tuple,
    pack_tuple,
    state_of,
)
from pointsman.values import TCP, UDP, PortName, to_address
from tests.support.flows import CLIENT, ENDPOINT, NODE, VIP, entries, half

NOW = 1_000_000 * SECOND
WEB = PortName("shop", "web", "http")


def read(table: dict[bytes, bytes], wanted: Filter = Filter()) -> list[flows.Flow]:  # noqa: B008
    return list(flows.flows(table.items(), table.get, wanted))


def test_both_entries_of_a_flow_make_one_row_that_names_client_vip_endpoint_and_node_port() -> None:
    table = entries(client_flags=ANSWERED | REMOTE, reply_flags=ANSWERED | REMOTE, seen=NOW)
    (flow,) = read(table)
    row = flow_row(flow, {1: WEB}, Timeouts(), NOW + 90 * SECOND)
    assert row.full_name == "shop/web:http"
    assert (row.client, row.vip) == ("198.51.100.9:40000", "192.0.2.1:80")
    assert (row.node, row.endpoint) == ("192.0.2.1:61001", "10.244.1.5:8080")
    assert (row.path, row.state, row.halves) == ("remote", "open", "both")
    assert (row.idle_seconds, row.expires_seconds) == (90.0, 86400 - 90.0)


@pytest.mark.parametrize("gone", ["client", "reply"])
def test_a_flow_whose_other_half_is_missing_is_shown_all_the_same(gone: str) -> None:
    table = entries(client_flags=REMOTE, reply_flags=REMOTE, seen=NOW)
    whole = read(table)[0]
    client_key, reply_key = table
    del table[client_key if gone == "client" else reply_key]
    (flow,) = read(table)
    assert (flow.client, flow.reply) == (whole.client, whole.reply)
    assert flow.halves == ({"client", "reply"} - {gone}).pop()
    assert flow.state == "new"


def test_a_port_that_another_flow_has_taken_over_is_no_half_of_the_first_one() -> None:
    first = entries(seen=NOW)
    second = entries(client=(to_address("198.51.100.10"), 40000), seen=NOW)
    found = read({**first, **second})
    assert sorted(flow.halves for flow in found) == ["both", "client"]
    assert {flow.client.source for flow in found if flow.halves == "both"} == {
        to_address("198.51.100.10")
    }


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        pytest.param(Filter(), 1, id="all"),
        pytest.param(Filter(owners=frozenset({1})), 1, id="its-service"),
        pytest.param(Filter(owners=frozenset({2})), 0, id="another-service"),
        pytest.param(Filter(owners=frozenset()), 0, id="a-service-without-ports"),
        pytest.param(Filter(client=CLIENT[0]), 1, id="its-client"),
        pytest.param(Filter(client=VIP[0]), 0, id="not-a-client-but-a-vip"),
        pytest.param(Filter(client=ENDPOINT[0]), 0, id="not-a-client-but-an-endpoint"),
    ],
)
def test_flows_of_a_service_or_of_a_client(wanted: Filter, count: int) -> None:
    assert len(read(entries(seen=NOW), wanted)) == count


@pytest.mark.parametrize(
    ("protocol", "client", "reply", "state"),
    [
        pytest.param(TCP, 0, 0, "new", id="syn"),
        pytest.param(TCP, 0, ANSWERED, "new", id="syn-ack-not-acknowledged"),
        pytest.param(TCP, ANSWERED, ANSWERED, "open", id="handshake-done"),
        pytest.param(TCP, ANSWERED | FIN, ANSWERED, "half-closed", id="one-fin"),
        pytest.param(TCP, ANSWERED | FIN, ANSWERED | FIN, "closing", id="both-fin"),
        pytest.param(TCP, 0, RST, "closing", id="refused"),
        pytest.param(TCP, ANSWERED | RST, ANSWERED, "reset", id="by-the-client-or-in-its-name"),
        pytest.param(UDP, 0, ANSWERED, "new", id="one-question-one-answer"),
        pytest.param(UDP, ANSWERED, ANSWERED, "open", id="a-stream"),
        pytest.param(TCP, ANSWERED | DSR, 0, "open", id="dsr-answers-come-past-this-node"),
        pytest.param(TCP, DSR, 0, "new", id="dsr-syn"),
    ],
)
def test_the_state_follows_from_what_each_end_has_said(
    protocol: int, client: int, reply: int, state: str
) -> None:
    assert state_of(protocol, client, reply) == state


@pytest.mark.parametrize(
    ("flags", "path"),
    [(0, "local"), (REMOTE, "remote"), (POD, "pod"), (POD | REMOTE, "pod"), (DSR, "dsr")],
)
def test_the_path_follows_from_the_flags(flags: int, path: str) -> None:
    (flow,) = read(entries(client_flags=flags, reply_flags=flags, seen=NOW))
    assert flow.path == path
    assert (flow.port_used is not None) == bool(flags & REMOTE)


def test_a_flow_touched_after_the_clock_was_read_is_not_in_the_future() -> None:
    (flow,) = read(entries(seen=NOW + SECOND))
    assert flow_row(flow, {}, Timeouts(), NOW).idle_seconds == 0.0


def test_an_owner_without_a_name_is_shown_without_one() -> None:
    (flow,) = read(entries(seen=NOW))
    assert flow_row(flow, {}, Timeouts(), NOW).full_name == ""


def test_ports_in_use_come_by_endpoint_the_most_used_first() -> None:
    other = PortUse(NODE[0], to_address("fd00::5"), 53, UDP)
    this = PortUse(NODE[0], *ENDPOINT, TCP)
    rows = port_rows(Counter({other: 1, this: 4}), (61000, 61007))
    assert [(row.endpoint, row.used, row.available, row.percent) for row in rows] == [
        ("10.244.1.5:8080", 4, 8, 50.0),
        ("[fd00::5]:53", 1, 8, 12.5),
    ]


def test_without_a_range_of_ports_nothing_is_available() -> None:
    rows = port_rows(Counter({PortUse(NODE[0], *ENDPOINT, TCP): 1}), (2, 1))
    assert (rows[0].available, rows[0].percent) == (0, 100.0)


# -- what a sweep looks at -----------------------------------------------------------------------


def views(table: dict[bytes, bytes]) -> tuple[memoryview, memoryview]:
    return memoryview(bytearray(b"".join(table))), memoryview(bytearray(b"".join(table.values())))


def picked(
    table: dict[bytes, bytes], now: int, timeouts: Timeouts, *, thorough: bool
) -> set[bytes]:
    raw = expiry.candidates(*views(table), now, timeouts, thorough=thorough)
    size = abi.layouts()["tuple"].size
    return {raw[i : i + size] for i in range(0, len(raw), size)}


_flags = st.sampled_from([0, ANSWERED, FIN, RST, ANSWERED | FIN, ANSWERED | RST, ANSWERED | FIN])
_timeouts = st.builds(Timeouts, *[st.integers(1, 200)] * 5)


@given(
    protocol=st.sampled_from([TCP, UDP]),
    client=_flags,
    reply=_flags,
    ages=st.tuples(st.integers(0, 250), st.integers(0, 250)),
    more=st.sampled_from([0, REMOTE, POD]),
    timeouts=_timeouts,
)
def test_of_every_expired_flow_a_half_is_looked_at(
    protocol: int, client: int, reply: int, ages: tuple[int, int], more: int, timeouts: Timeouts
) -> None:
    table = entries(protocol=protocol, client_flags=client | more, reply_flags=reply | more)
    for key, age in zip(table, ages, strict=True):
        table[key] = half(table[key], seen=NOW - age * SECOND)
    (flow,) = read(table)
    over = (NOW - flow.seen) > flows.timeout(timeouts, protocol, flow.state) * SECOND
    for thorough in (False, True):
        assert not over or picked(table, NOW, timeouts, thorough=thorough)


@given(client=_flags, age=st.integers(0, 250), timeouts=_timeouts)
def test_of_a_dsr_flow_the_one_half_is_looked_at(client: int, age: int, timeouts: Timeouts) -> None:
    table = entries(client_flags=client | DSR, seen=NOW - age * SECOND)
    del table[list(table)[1]]
    (flow,) = read(table)
    if age > flows.timeout(timeouts, TCP, flow.state):
        assert picked(table, NOW, timeouts, thorough=False)


@given(flags=_flags, reply=st.booleans(), age=st.integers(0, 250), timeouts=_timeouts)
def test_a_thorough_round_looks_at_every_old_half(
    flags: int, reply: bool, age: int, timeouts: Timeouts
) -> None:
    table = entries(client_flags=flags, reply_flags=flags, seen=NOW - age * SECOND)
    del table[list(table)[0 if reply else 1]]
    assert bool(picked(table, NOW, timeouts, thorough=True)) == (age > min(astuple(timeouts)))


def test_an_open_flow_costs_the_sweep_nothing_while_it_may_be_silent() -> None:
    table = entries(client_flags=ANSWERED, reply_flags=ANSWERED, seen=NOW - 3600 * SECOND)
    assert not picked(table, NOW, Timeouts(), thorough=False)


def test_ports_of_this_node_are_counted_by_endpoint_from_raw_entries() -> None:
    used: Counter[bytes] = Counter()
    local = entries(client=(to_address("198.51.100.77"), 1), reply_port=1, seen=NOW)
    remote = entries(client_flags=REMOTE, reply_flags=REMOTE, seen=NOW)
    expiry.count_ports(*views({**local, **remote}), used)
    assert {expiry.port_use(raw): count for raw, count in used.items()} == {
        PortUse(NODE[0], *ENDPOINT, TCP): 1
    }


def test_a_tuple_is_the_same_packed_and_read_again() -> None:
    of = Tuple(to_address("fd00::1"), 1, to_address("10.0.0.1"), 65535, UDP)
    assert flows.tuple_of(pack_tuple(of)) == of


def test_the_flag_of_replies_tells_the_halves_apart() -> None:
    assert [flows.half_of(value).flags & REPLY for value in entries().values()] == [0, REPLY]
