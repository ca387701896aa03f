"""What is known of this node's surroundings, for who serves clients outside."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import yaml

from pointsman.devices import Packets
from pointsman.events import Changed, Listed
from pointsman.objects import KINDS, Object
from pointsman.settings import Settings
from pointsman.surroundings import Surroundings
from pointsman.tracker import Tracker
from pointsman.values import Address, to_address
from tests.support.agents import node_of, service_of, slice_of

POD_B, POD_C, NODE_C = "10.244.2.5", "10.244.3.5", "192.0.2.3"
SERVICE = service_of("web", ["10.96.0.7"], 80)


def read(text: str) -> Object:
    document = yaml.safe_load(text)
    return msgspec.convert(document, KINDS[document["kind"]])


def slices(**on: str) -> Object:
    """Endpoints of the Service: address by node."""
    members = [(address, {"nodeName": node}) for node, address in on.items()]
    return read(slice_of("web", members, 8080))


class Followed:
    def __init__(self, packets: Packets | None = None) -> None:
        settings = replace(Settings(), node_name="a", packets=packets or Packets(("auto",)))
        self.tracker = Tracker()
        self.surroundings = Surroundings(settings, lambda found: None)
        self.surroundings.move(frozenset({to_address("192.0.2.1")}))

    def fold(self, event: Listed | Changed) -> set[Address]:
        """Endpoints on other nodes, after it."""
        self.surroundings.follow(self.tracker, self.tracker.fold(event))
        return set(self.surroundings.around.endpoints)


NODES = (read(node_of("a", "192.0.2.1")), read(node_of("b", "192.0.2.2")))
LATE = read(node_of("c", NODE_C))


def test_a_pod_on_each_other_node_is_known() -> None:
    node = Followed()
    one = slices(a="10.244.1.5", b=POD_B, c=POD_C)
    assert node.fold(Listed((*NODES, read(SERVICE), one))) == {to_address(POD_B)}
    # A node may be told of after the pods on it, and goes with what was known of it.
    assert node.fold(Changed((LATE,))) == {to_address(POD_B), to_address(POD_C)}
    assert node.fold(Changed((), (LATE.ref,))) == {to_address(POD_B)}


def test_the_first_that_was_seen_stays() -> None:
    """Which way is asked for: one answer for a node is enough, and pods come and go."""
    node = Followed()
    node.fold(Listed((*NODES, read(SERVICE), slices(b=POD_B))))
    before = node.surroundings.around
    assert node.fold(Changed((slices(b="10.244.2.77"),))) == {to_address(POD_B)}
    assert node.surroundings.around is before


def test_what_runs_on_a_node_s_own_address_tells_nothing_of_pods() -> None:
    node = Followed()
    assert node.fold(Listed((*NODES, LATE, read(SERVICE), slices(c=NODE_C)))) == set()


def test_nobody_looks_where_no_device_is_served() -> None:
    node = Followed(Packets())
    assert node.fold(Listed((*NODES, read(SERVICE), slices(b=POD_B)))) == set()
