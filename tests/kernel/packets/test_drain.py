"""`unload --drain`: what clients outside have open goes on, what they begin is left to others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pointsman.drain import drain
from pointsman.generations import Generation
from tests.kernel.packets.node import Node
from tests.kernel.packets.test_flows import answers, asks, client_says, connect, endpoint_says
from tests.kernel.packets.world import FAMILIES, IN_RANGE, Family
from tests.support.packets import PASS, SEND


@pytest.fixture
def generation(node: Node) -> Iterator[Generation]:
    """Whose addresses are marked again afterwards, as a start of the agent does it."""
    maps = node.lab.maps
    marks, refused = maps.marks() or {}, maps.settings()["cidrs"]
    found = node.lab.pins.require_current()
    yield found
    maps.mark([*marks.items()])
    maps.refuse(refused)


@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_what_is_open_goes_on_and_nothing_begins(
    node: Node, generation: Generation, f: Family
) -> None:
    connect(node, f)
    client_says(node, f, sport=IN_RANGE + 1)  # not answered yet
    assert drain(generation, 0) == 2
    for sport in (IN_RANGE, IN_RANGE + 1):
        assert endpoint_says(node, f, "SA", sport=sport).verdict == SEND
        assert client_says(node, f, "A", sport=sport).verdict == SEND
    assert client_says(node, f, sport=IN_RANGE + 2).verdict == PASS
    assert asks(node, f).verdict == PASS


def test_it_waits_for_what_is_open_and_for_nothing_else(node: Node, generation: Generation) -> None:
    f = FAMILIES[0]
    connect(node, f)
    assert drain(generation, 0.3) == 1
    endpoint_says(node, f, "FA")
    client_says(node, f, "FA")
    assert drain(generation, 60) == 0


def test_what_has_been_silent_for_too_long_is_not_open(node: Node, generation: Generation) -> None:
    f = FAMILIES[0]
    asks(node, f)
    answers(node, f)
    assert drain(generation, 0) == 1
    node.lab.age(24 * 3600)
    assert drain(generation, 60) == 0
