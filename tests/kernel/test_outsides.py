"""What clients outside get, as it stands in the kernel's maps: tables, ranges, sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pointsman import maglev
from pointsman.maps import apply, take_over
from pointsman.plan import Run
from pointsman.planner import Planner
from pointsman.ranges import pack, parse
from pointsman.values import TCP, Entry, Frontend, to_address
from pointsman.view import View
from tests.support.kernel import Lab
from tests.support.plans import BACKENDS, VIPS, entry, places_of, ref, served

pytestmark = pytest.mark.kernel

FRONTEND = Frontend(VIPS[0], 80, TCP)
MANY = [parse(f"10.{i >> 8}.{i & 255}.0/24") for i in range(300)]


@pytest.fixture
def planner(lab: Lab) -> Iterator[Planner]:
    """On a node that serves packets."""
    yield take_over(lab.maps, packets=True)
    lab.adopt()


def wanted(*numbers: int, sources=None) -> tuple[Entry, ...]:
    members = [BACKENDS[i] for i in numbers]
    outside = served(members, sources=sources)
    places = places_of(outside.endpoints)
    return (entry("web", VIPS[0], endpoints=members, places=places, outside=outside),)


def put(lab: Lab, planner: Planner, *entries: Entry) -> None:
    plan = planner.update({ref("web"): entries})
    apply(plan, lab.maps)
    lab.maps.wait_for_readers()
    planner.reclaim(plan.garbage)


def is_let_in(lab: Lab, client: str) -> bool:
    key = pack(lab.maps.frontends()[FRONTEND], (to_address(client), 128))
    return lab.maps.map("source_ranges").lookup(key) is not None


def test_ranges_are_written_and_deleted_many_at_a_time(lab: Lab, planner: Planner) -> None:
    put(lab, planner, *wanted(0, 1, sources=MANY))
    assert len(lab.maps.map("source_ranges")) == len(MANY)
    assert is_let_in(lab, "10.1.43.9") and not is_let_in(lab, "10.1.44.9")
    put(lab, planner, *wanted(0, 1, sources=[parse("10.0.0.0/16")]))
    assert len(lab.maps.map("source_ranges")) == 1
    assert is_let_in(lab, "10.0.255.1") and not is_let_in(lab, "10.1.43.9")
    put(lab, planner)
    assert not len(lab.maps.map("source_ranges"))


def test_a_range_of_one_service_lets_nobody_in_at_another(lab: Lab, planner: Planner) -> None:
    put(lab, planner, *wanted(0, 1, sources=MANY))
    service = lab.maps.frontends()[FRONTEND]
    for other in (service + 1, service - 1):
        key = pack(other, (to_address("10.0.0.1"), 128))
        assert lab.maps.map("source_ranges").lookup(key) is None


def test_everything_is_found_again_by_the_next_agent(lab: Lab, planner: Planner) -> None:
    entries = wanted(0, 1, 2, sources=MANY[:3])
    put(lab, planner, *entries)
    element = lab.maps.service(lab.maps.frontends()[FRONTEND])
    assert element.table.count == maglev.size_for(3) and element.outside == Run(
        element.first, element.count
    )
    assert [slot.place for slot in lab.maps.slots(*element.outside)] == list(entries[0].places)
    plan = take_over(lab.maps, packets=True).replace({ref("web"): entries})
    assert not plan


def test_maps_of_a_version_that_served_no_packets_can_be_read(
    fresh_lab: Callable[..., Lab], changed_source: Callable[..., Path]
) -> None:
    lab = fresh_lab(
        source=changed_source(
            ("abi.h", "\t__u16 packets; /*", "\t__u16 pad; /*"),
            ("abi.h", "\t__u64 outside; /*", "\t__u64 former; /*"),
            ("abi.h", "\t__u64 table; /*", "\t__u64 latter; /*"),
        )
    )
    lab.set("web", *wanted(0, 1))
    for name in ("maglev", "source_ranges"):
        (lab.loaded.generation.maps / name).unlink()
    view = View(lab.loaded.generation.maps)
    try:
        snapshot = view.snapshot()
        (element,) = snapshot.services.values()
        assert (element.count, element.packets, element.outside.count) == (2, 0, 0)
        assert not snapshot.ranges and not snapshot.stamps
    finally:
        view.close()
