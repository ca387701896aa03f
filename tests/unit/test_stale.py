"""Which sockets and flows are left over, and how ranges of ports are put together."""

from __future__ import annotations

from pathlib import Path

import pytest

from pointsman import host, portranges
from pointsman.netns import mounted
from pointsman.stale import Flow, Record, stale, stale_flows
from pointsman.values import TCP, UDP, Backend, Frontend, to_address


def at(address: str, port: int) -> Backend:
    return to_address(address), port


DNS, OTHER = at("10.96.0.10", 53), at("10.96.0.11", 53)
ONE, TWO = at("10.244.0.1", 5353), at("10.244.0.2", 5353)
CLIENT = at("10.244.0.9", 40000)


def endpoints(**backends: frozenset[Backend]) -> dict[Frontend, frozenset[Backend]]:
    """`endpoints(udp={…})`: what the DNS Service has for each protocol."""
    return {
        Frontend(*DNS, {"udp": UDP, "tcp": TCP}[name]): frozenset(found)
        for name, found in backends.items()
    }


@pytest.mark.parametrize(
    ("record", "services", "expected"),
    [
        pytest.param(Record(1, UDP, DNS, ONE), {"udp": {ONE, TWO}}, False, id="endpoint-stays"),
        pytest.param(Record(1, UDP, DNS, ONE), {"udp": {TWO}}, True, id="endpoint-left"),
        pytest.param(Record(1, UDP, DNS, ONE), {"udp": set()}, True, id="last-endpoint-left"),
        pytest.param(Record(1, UDP, OTHER, ONE), {"udp": {ONE}}, True, id="service-is-gone"),
        pytest.param(Record(1, UDP, DNS, ONE), {"tcp": {ONE}}, True, id="only-of-other-protocol"),
        pytest.param(
            Record(1, UDP, DNS, at("10.244.0.1", 5354)), {"udp": {ONE}}, True, id="other-port"
        ),
        pytest.param(Record(1, TCP, DNS, ONE), {"tcp": {ONE}, "udp": {TWO}}, False, id="tcp-stays"),
    ],
)
def test_a_record_is_stale_without_its_endpoint(
    record: Record, services: dict[str, frozenset[Backend]], expected: bool
) -> None:
    found = stale([record], endpoints(**services).get, lambda _: False)
    assert found == ([record] if expected else [])


def test_what_nobody_has_any_more_is_stale_only_without_its_endpoint() -> None:
    """A Service that is no NodePort now takes nothing from what is connected by it."""
    left, there = Record(1, UDP, OTHER, ONE), Record(2, UDP, OTHER, TWO)
    assert stale([left, there], endpoints().get, lambda address: address == TWO[0]) == [left]


def test_each_frontend_is_asked_about_once() -> None:
    asked: list[Frontend] = []

    def ask(frontend: Frontend) -> None:
        asked.append(frontend)

    stale([Record(cookie, UDP, DNS, ONE) for cookie in range(5)], ask, lambda _: False)
    assert asked == [Frontend(*DNS, UDP)]


@pytest.mark.parametrize(
    ("flow", "services", "expected"),
    [
        pytest.param(Flow(CLIENT, DNS, ONE), {"udp": {ONE}}, False, id="serving"),
        pytest.param(Flow(CLIENT, DNS, ONE), {"udp": {TWO}}, True, id="left"),
        pytest.param(Flow(CLIENT, DNS, DNS), {"udp": {TWO}}, True, id="never-translated"),
        pytest.param(Flow(CLIENT, DNS, ONE), {"udp": set()}, False, id="nobody-serves"),
        pytest.param(Flow(CLIENT, OTHER, ONE), {"udp": {TWO}}, False, id="no-service"),
        pytest.param(Flow(CLIENT, DNS, ONE), {"tcp": {TWO}}, False, id="other-protocol"),
    ],
)
def test_a_flow_is_stale_if_others_serve_instead(
    flow: Flow, services: dict[str, frozenset[Backend]], expected: bool
) -> None:
    assert stale_flows([flow], endpoints(**services).get) == ([flow] if expected else [])


# -- ranges of ports -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("\n", ()),
        ("8080\n", ((8080, 8080),)),
        ("30000-32767,8080", ((8080, 8080), (30000, 32767))),
        ("1-2,3,5-9,7-8", ((1, 3), (5, 9))),
    ],
)
def test_ranges_are_sorted_and_joined(text: str, ranges: portranges.Ranges) -> None:
    assert portranges.parse(text) == ranges
    assert portranges.parse(portranges.to_text(ranges)) == ranges


@pytest.mark.parametrize("text", ["a", "5-1", "70000", "-1"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        portranges.parse(text)


@pytest.mark.parametrize(
    ("ranges", "taken", "left"),
    [
        ("10-20", "", "10-20"),
        ("10-20", "1-9,21-30", "10-20"),
        ("10-20", "10-20", ""),
        ("10-20", "1-30", ""),
        ("10-20", "15", "10-14,16-20"),
        ("10-20,30-40", "15-35", "10-14,36-40"),
    ],
)
def test_ranges_are_taken_out(ranges: str, taken: str, left: str) -> None:
    parse = portranges.parse
    assert portranges.to_text(portranges.without(parse(ranges), parse(taken))) == left


def test_only_what_was_added_is_released(tmp_path: Path) -> None:
    setting = tmp_path / "ip_local_reserved_ports"
    setting.write_text("8080,30000-30100\n")  # the operator's
    added = host.reserve_ports(30000, 32767, setting)
    assert added == ((30101, 32767),)
    assert setting.read_text() == "8080,30000-32767\n"
    assert not host.reserve_ports(30000, 32767, setting), "the next agent adds nothing"
    assert host.release_ports(added, setting)
    assert setting.read_text() == "8080,30000-30100\n"
    assert not host.release_ports(added, setting)


# -- mounted namespaces --------------------------------------------------------------------------


def test_namespaces_are_found_by_their_mounts(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "22 1 0:21 / /proc rw - proc proc rw\n"
        "90 1 0:4 net:[4026532177] /run/netns/one rw shared:5 - nsfs nsfs rw\n"
        "91 1 0:4 mnt:[4026532178] /run/mnt rw - nsfs nsfs rw\n"
        r"92 1 0:4 net:[4026532179] /run/netns/a\040b rw - nsfs nsfs rw" + "\n"
    )
    assert list(mounted(table, Path("/proc/1/root"))) == [
        (4026532177, Path("/proc/1/root/run/netns/one")),
        (4026532179, Path("/proc/1/root/run/netns/a b")),
    ]
    assert not list(mounted(tmp_path / "none", Path("/")))
