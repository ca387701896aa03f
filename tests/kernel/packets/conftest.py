"""One node with packet programs for all tables; each test finds it without flows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from pointsman import abi
from tests.kernel.packets.back import Back
from tests.kernel.packets.node import Node, name_of
from tests.support.kernel import SMALL, lacking, needs_linux
from tests.support.packetlab import PacketLab

#: flows_new has room for what test_explained sends, and none for a flood: an LRU map takes flows
#: before it is full.
SIZES = replace(SMALL, lines=1024, flows=4096, flows_new=4096)


def _lacking() -> str:
    if lack := lacking():
        return lack
    return "" if (abi.source_directory() / "packets.c").exists() else "bpf/packets.c"


@pytest.fixture(scope="session")
def loaded_node(missing: Callable[[str], None]) -> Iterator[Node]:
    if lack := _lacking():
        missing(lack)
    needs_linux(5, 12, "compare-and-swap")
    lab = PacketLab(name_of("pm_packets"), SIZES)
    try:
        yield Node(lab)
    finally:
        lab.close()


@pytest.fixture
def node(loaded_node: Node) -> Iterator[Node]:
    """The world of `world.py`, with nothing left of earlier packets."""
    loaded_node.reset()
    yield loaded_node
    loaded_node.reset()


@pytest.fixture
def back(node: Node) -> Iterator[Back]:
    made = Back(node)
    yield made
    made.close()


def pytest_itemcollected(item: pytest.Item) -> None:
    """All of it runs the real programs."""
    item.add_marker(pytest.mark.kernel)
