"""How endpoints are chosen, as an operator says it, and says it anew while the agent runs."""

from __future__ import annotations

import socket
import time
from collections import Counter
from contextlib import ExitStack, closing
from typing import Any

import pytest
import yaml

from tests.kernel.home import ONE, PORT, THREE, TWO, Home, ask, reaches, vips
from tests.support.agents import service_of, slice_of
from tests.support.kernel import until
from tests.support.longlived import PORT as SERVER_PORT
from tests.support.longlived import Clients, Servers

pytestmark = pytest.mark.kernel


@pytest.fixture
def node(home: Home) -> Home:
    home.use("--algorithm", "round-robin")
    return home


def annotated(text: str, **annotations: str) -> str:
    """A manifest with annotations of ours: `slow_start` is pointsman.io/slow-start."""
    found: dict[str, Any] = yaml.safe_load(text)
    found["metadata"]["annotations"] = {
        f"pointsman.io/{name.replace('_', '-')}": value for name, value in annotations.items()
    }
    return yaml.safe_dump(found)


def counted(host: str, times: int = 300) -> Counter[str]:
    """How many of so many connections each endpoint got."""
    answers = [ask(host, PORT) for _ in range(times)]
    return Counter(each if isinstance(each, str) else each.endpoint for each in answers)


def reasons(node: Home) -> list[tuple[str, str]]:
    return [(each["object"], each["reason"]) for each in node.status()["problems"]]


def test_a_service_says_how_and_a_bad_word_changes_nothing(node: Home) -> None:
    address, name = vips(1)[0], "annotated"
    plain = service_of(name, (address,), PORT)
    node.members(name, (ONE, {}), (TWO, {}), (THREE, {}))
    node.write("annotated.yaml", plain)
    reaches(address, ONE, TWO, THREE)
    assert set(counted(address).values()) == {100}, "--algorithm round-robin"
    # A client keeps its endpoint with maglev, and we are one client.
    node.write("annotated.yaml", annotated(plain, algorithm="maglev"))
    until(lambda: len(counted(address, 20)) == 1, "maglev")
    node.write("annotated.yaml", annotated(plain, algorithm="fastest"))
    until(lambda: reasons(node) == [(f"Service default/{name}", "AnnotationInvalid")], "a problem")
    assert len(counted(address, 20)) == 1, "the last good value is not in force any more"
    node.write("annotated.yaml", plain)
    until(lambda: set(counted(address, 30).values()) == {10}, "round-robin again")
    until(lambda: not reasons(node), "nothing to mend")


def test_an_endpoint_has_the_weight_that_its_slice_says(node: Home) -> None:
    address, name = vips(2)[0], "weighed"
    node.write("weighed.yaml", service_of(name, (address,), PORT))
    node.members(name, (ONE, {}), (TWO, {}))
    light = slice_of(name, ((THREE, {}),), node.servers.port, name="light")
    node.write("light.yaml", annotated(light, weight="25"))
    until(lambda: ONE in counted(address, 20), "the Service")
    # In turn, and without gaps: within one of its share of 1 in 9.
    until(lambda: abs(counted(address, 450)[THREE] - 50) <= 5, "a share of 25 in 225")
    node.write("light.yaml", annotated(light, weight="0"))
    reaches(address, ONE, TWO)
    node.write("light.yaml", light)
    until(lambda: abs(counted(address, 300)[THREE] - 100) <= 5, "the usual weight")


def test_a_new_endpoint_starts_slowly(node: Home) -> None:
    address, name = vips(3)[0], "slow"
    # So slow that its share is a small one whatever keeps us, and yet it has another each second.
    node.write("slow.yaml", annotated(service_of(name, (address,), PORT), slow_start="600"))
    node.members(name, (ONE, {}))
    reaches(address, ONE)
    node.members(name, (ONE, {}), (TWO, {}))
    until(lambda: counted(address, 100)[TWO] > 0, "the new one")
    assert counted(address, 110)[TWO] < 45, "it was not slow"
    until(lambda: f"Service default/{name}" in node.status()["slowStart"], "the status file")


def test_a_slow_start_has_an_end(node: Home) -> None:
    address, name = vips(6)[0], "soon"
    node.write("soon.yaml", annotated(service_of(name, (address,), PORT), slow_start="9"))
    node.members(name, (ONE, {}))
    reaches(address, ONE)
    began = time.monotonic()
    node.members(name, (ONE, {}), (TWO, {}))
    until(lambda: counted(address, 100)[TWO] > 0, "the new one")
    for _ in range(3):  # while the weights change
        assert "no differences" in node.cli("verify", "--state-dir", str(node.state_dir)).stdout
    until(lambda: counted(address, 100)[TWO] == 50, "the end of the slow start")
    assert time.monotonic() - began > 8


def test_this_zone_goes_first_until_it_is_full(node: Home) -> None:
    address, name = vips(4)[0], "zoned"
    node.write(
        "zoned.yaml", annotated(service_of(name, (address,), PORT), same_zone_connections="5")
    )
    node.members(name, (ONE, {"zone": "east"}), (TWO, {"zone": "west"}))
    reaches(address, ONE)
    with ExitStack() as opened:
        for _ in range(40):
            opened.enter_context(socket.create_connection((address, PORT)))
        assert set(counted(address, 100)) == {ONE, TWO}
    until(lambda: set(counted(address, 50)) == {ONE}, "room in this zone")


def test_what_is_open_for_long_moves_to_an_endpoint_that_joins(node: Home) -> None:
    address, name = vips(5)[0], "drained"
    plain = service_of(name, (address,), PORT)
    words = {"algorithm": "least-connections", "drain": "20/s"}
    node.write("drained.yaml", annotated(plain, **words))

    def members(*addresses: str) -> None:
        found = [(each, {}) for each in addresses]
        node.write("drained-1.yaml", slice_of(name, found, SERVER_PORT, name="drained-1"))

    def drains() -> dict[str, Any]:
        found: dict[str, Any] = node.status()["drains"]
        return found

    with closing(Servers(greet=True)):
        members(ONE, TWO)
        reaches(address, ONE, TWO)
        clients = Clients(socket.AF_INET, address, lambda client: client.recv(64).decode())
        with closing(clients):
            clients.open(30)
            members(ONE, TWO, THREE)
            key = f"Service default/{name}"

            def under_way() -> bool:
                clients.come_back()
                return key in drains()["services"]

            until(under_way, "the drain")
            told = node.cli("describe", "service", name, "--manifests", str(node.manifests))
            if key in drains()["services"]:
                assert " left, at 20/s" in told.stdout

            def over() -> bool:
                clients.come_back()
                return not drains()["services"] and drains()["closed"] > 0

            until(over, "its end")
            clients.come_back()  # who was ended after the last time
            assert 9 <= clients.counts[THREE] <= 11
            assert set(clients.errors) == {"ECONNABORTED"}
            assert drains() == {
                "closed": clients.errors.total(), "left": 0, "services": {}, "problem": ""
            }  # fmt: skip
            assert f"connections ended={clients.errors.total()}, done" in node.log.read_text()
            # Without being asked, none.
            node.write("drained.yaml", annotated(plain, algorithm="least-connections"))
            members(ONE, TWO)
            reaches(address, ONE, TWO)
            before = clients.errors.total()
            members(ONE, TWO, THREE)
            reaches(address, ONE, TWO, THREE)
            clients.come_back()
            assert clients.errors.total() == before
    node.write("drained.yaml", annotated(plain, drain="1/m", algorithm="maglev"))
    until(lambda: (key, "DrainWithoutEffect") in reasons(node), "a problem")
    node.write("drained.yaml", plain)
