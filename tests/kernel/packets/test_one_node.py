"""Real traffic as in test_topology.py, with one agent: little enough for an emulated machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from demo.lab import Lab
from tests.kernel.packets.test_topology import DRAWS, FAMILIES, LONG, download
from tests.support.kernel import TC, needs_linux
from tests.support.kernel import lacking as lacking_kernel
from tests.support.topology import CLIENT, Topology, lacking


@pytest.fixture(scope="module")
def built(
    missing: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Topology]:
    """A pod on node a, which has an agent, and one on node b, which has none."""
    if lack := lacking_kernel() or lacking():
        missing(lack)
    needs_linux(5, 12, "compare-and-swap")
    with Lab("onenode") as lab:
        made = Topology(lab, tmp_path_factory.mktemp("topology"), ("a", "b"))
        try:
            made.add_pod("a", "a1")
            made.add_pod("b", "b1")
            made.publish()
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module", params=["native", "none"], ids=["XDP", "TC"])
def topology(built: Topology, request: pytest.FixtureRequest) -> Iterator[Topology]:
    """Served by XDP and TC, or by TC alone."""
    agent = built.nodes["a"].agent
    agent.start("--xdp-mode", request.param)
    (row,) = agent.status()["devices"]["items"]
    assert (row["xdp"], row["tc"]) == (request.param, TC)
    yield built
    agent.stop()


@pytest.mark.parametrize("family", FAMILIES)
def test_endpoints_here_and_elsewhere_answer_the_client(topology: Topology, family: int) -> None:
    """The one here sees the client, the one elsewhere the node that sent it on."""
    address = topology.nodes["a"].addresses[family]
    wanted = {("a1", CLIENT[family]), ("b1", address)}
    for ask in (topology.ask, topology.datagram):
        found: set[tuple[str, str]] = set()
        for _ in range(DRAWS):
            found.add(ask(address))
            if len(found) == len(wanted):
                break
        assert found == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_download_is_whole(topology: Topology, family: int) -> None:
    assert download(topology, topology.nodes["a"].addresses[family], LONG // 10)
