"""Verdicts by name, events of the tracer, and what `status` says of packets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pointsman import abi, decisions, packethealth
from pointsman.cli import packetstatus
from pointsman.cli.trace import _Printer, takes
from pointsman.dump import map_row
from pointsman.flows import Tuple, pack_tuple
from pointsman.packethealth import PacketsSeen
from pointsman.sweep import interval, rest_after
from pointsman.values import TCP, PortName, to_address

_pack = abi.layouts()["event"].packer(
    "time", "before", "after", "ifindex", "length", "owner", "verdict", "hook"
)
CLIENT, VIP = to_address("198.51.100.9"), to_address("192.0.2.1")
NODE, ENDPOINT = to_address("192.0.2.2"), to_address("10.244.1.5")
BEFORE = Tuple(CLIENT, 40000, VIP, 80, TCP)
AFTER = Tuple(NODE, 61001, ENDPOINT, 8080, TCP)
WEB = PortName("shop", "web", "http")


def event(verdict: str, after: Tuple = AFTER) -> decisions.Event:
    number = abi.constants()[verdict]
    raw = _pack(5, pack_tuple(BEFORE), pack_tuple(after), 3, 74, 1, number, 1)
    return decisions.event_of(raw)


def test_every_verdict_is_counted_but_passing() -> None:
    size = abi.constants()["VERDICTS"]
    assert sorted(decisions.COUNTED.values()) == list(range(1, size))
    assert decisions.COUNTED["drop_no_port"] == abi.constants()["DROP_NO_PORT"]
    # Flags of flows begin like verdicts of flows.
    assert "flow_reply" not in decisions.COUNTED


def test_what_calls_for_a_sweep_is_a_verdict() -> None:
    assert set(decisions.NO_ROOM) <= decisions.COUNTED.keys()


def test_an_event_has_addresses_before_and_after() -> None:
    found = event("PACKET_FORWARDED")
    assert (found.hook, found.verdict, found.drop) == ("tc-ingress", "packet_forwarded", False)
    assert decisions.tuple_text(found.before) == "198.51.100.9:40000 > 192.0.2.1:80"
    assert found.after is not None
    assert decisions.tuple_text(found.after) == "192.0.2.2:61001 > 10.244.1.5:8080"


def test_a_packet_that_stayed_as_it_was_has_no_after() -> None:
    assert event("DROP_SOURCE_RANGE", BEFORE).after is None


def test_a_verdict_of_a_newer_version_is_shown_by_number() -> None:
    assert decisions.verdict_name(250) == "unknown_250"
    assert decisions.hook_name(9) == "unknown-9"


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        pytest.param({}, True, id="all"),
        pytest.param({"drops": True}, False, id="only-drops"),
        pytest.param({"service": ("shop", "web")}, True, id="service"),
        pytest.param({"service": (None, "web")}, True, id="service-of-any-namespace"),
        pytest.param({"service": ("other", "web")}, False, id="service-of-another-namespace"),
        pytest.param({"client": CLIENT}, True, id="client"),
        pytest.param({"client": ENDPOINT}, True, id="after-translation"),
        pytest.param({"client": to_address("198.51.100.10")}, False, id="another-client"),
    ],
)
def test_what_trace_shows(options: dict[str, Any], taken: bool) -> None:
    wanted = {"service": None, "client": None, "drops": False, **options}
    found = event("PACKET_FORWARDED")
    assert takes(found, WEB, wanted["service"], wanted["client"], drops=wanted["drops"]) is taken


def test_drops_are_traced_alone_and_a_service_without_a_name_is_nobodys() -> None:
    assert takes(event("DROP_NO_PORT"), None, None, None, drops=True)
    assert not takes(event("DROP_NO_PORT"), None, (None, "web"), None, drops=False)


@pytest.mark.parametrize(
    ("form", "lines"),
    [("json", ['{"lost": 3}', '{"lost": 4}']), ("table", ["(3 lost)", "(4 lost)"])],
)
def test_trace_says_how_many_were_lost_since_it_said_so_last(
    form: str, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    printer = _Printer(form)
    for ever in (0, 3, 3, 7):
        printer.lost(ever)
    assert capsys.readouterr().out.splitlines() == lines
    assert printer.missing == 7


# -- status --------------------------------------------------------------------------------------

SEEN = PacketsSeen({"packet_here": 5, "flow_begun": 0, "drop_no_port": 2}, (61000, 61009), False)
MAPS = (map_row("flows", 1, 100, 40, 0), map_row("flows_new", 9, 50, 3, 0))
TOLD: dict[str, Any] = {
    "rounds": 3,
    "expired": 7,
    "seconds": 0.5,
    "cpuSeconds": 0.1,
    "nat": {"available": 10, "used": 4, "most": 3},
}


def test_status_shows_what_is_not_0_and_marks_drops() -> None:
    found = packethealth.packets(SEEN, MAPS, TOLD)
    assert found is not None
    assert (found["verdicts"], found["drops"]) == ({"packet_here": 5}, {"no_port": 2})
    assert dict(packetstatus.pairs(found)) == {
        "flows, open": "40 of 100 entries",
        "flows, new": "3 of 50 entries",
        "ports of this node": "61000-61009, in use: 4, most towards one endpoint: 3",
        "to other nodes": "snat",
        "sweep": "rounds: 3, expired: 7, last took 0.500 s, CPU 0.100 s",
        "packet here": 5,
        "DROPPED no port": 2,
    }


def test_without_an_agent_status_has_what_the_maps_say() -> None:
    found = packethealth.packets(SEEN, MAPS, None)
    assert found is not None
    assert found["sweep"] is None
    assert dict(packetstatus.pairs(found))["ports of this node"] == "61000-61009"
    assert packethealth.warnings(found) == []


def test_without_packet_programs_status_says_off() -> None:
    assert packethealth.packets(None, (), None) is None
    assert [label for label, _ in packetstatus.pairs(None)] == ["off"]
    assert packethealth.warnings(None) == []


def test_status_warns_before_ports_or_entries_run_out() -> None:
    full = (map_row("flows", 1, 100, 95, 0), MAPS[1])
    told = {**TOLD, "nat": {"available": 10, "used": 20, "most": 10}}
    notes = packethealth.warnings(packethealth.packets(SEEN, full, told))
    assert ["--snat-ports" in notes[0], "--max-flows" in notes[1]] == [True, True]
    assert packethealth.warnings(packethealth.packets(SEEN, MAPS, TOLD)) == []


def test_a_mode_of_direct_answers_is_shown() -> None:
    found = packethealth.packets(replace(SEEN, dsr=True), MAPS, TOLD)
    assert found is not None and found["dispatch"] == "dsr"


# -- pace ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fill", "seconds"), [(0.0, 10), (0.49, 10), (0.5, 2), (0.9, 0), (1, 0)])
def test_the_fuller_the_map_the_sooner_the_next_round(fill: float, seconds: float) -> None:
    assert interval(fill) == seconds


def test_a_sweep_takes_a_tenth_of_a_cpu_and_half_of_one_where_there_is_no_room() -> None:
    assert rest_after(0.001, 0.2) == pytest.approx(0.009)
    assert rest_after(0.001, 0.95) == pytest.approx(0.001)
