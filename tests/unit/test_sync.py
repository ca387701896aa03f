"""What the agent's loop brings about by itself, when no object changes."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pointsman import abi
from pointsman import sync as sync_module
from pointsman.choice import ALGORITHM, DRAIN, SLOW_START, Kept
from pointsman.context import Context
from pointsman.errors import KernelTooOld, NotLoaded
from pointsman.events import Changed, Listed
from pointsman.objects import Endpoint, EndpointPort, EndpointSlice, ObjectMeta, Ref, Service
from pointsman.objects import ServicePort as Port
from pointsman.objects import ServiceSpec as Spec
from pointsman.pins import Pins
from pointsman.plan import Limits
from pointsman.planner import Planner
from pointsman.settings import Settings
from pointsman.state import read_annotations
from pointsman.sync import Sync
from pointsman.telemetry import Telemetry
from pointsman.values import TCP, Frontend, to_address, to_text
from tests.support.fake import FakeDatapath

WEIGHTED = abi.constants()["CHOICE_WEIGHTED"]
MAGLEV = abi.constants()["ALGORITHM_MAGLEV"]
WEB = Ref("Service", "default", "web")
FRONTEND = Frontend(to_address("10.96.0.1"), 80, TCP)


class Around:
    """A node on which nothing changes."""

    context, known, skipped = Context(), True, None

    def follow(self, *_: Any) -> set[Ref]:
        return set()


class Node:
    """A Sync over maps that are Python's, at a time that is the test's."""

    def __init__(self, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        limits = Limits(256, 256, 256)
        settings: Any = Settings(state_dir=state_dir)
        self.now = 1000.0
        clock = types.SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now)
        monkeypatch.setattr(sync_module, "time", clock)
        around: Any = Around()
        self.sync = Sync(settings, around, Telemetry(), lambda *_: None)
        self.fake = FakeDatapath(limits)
        found: Any = self.sync
        found.maps, found._planner, found._attached, found._refused = (
            self.fake, Planner(limits), True, (),
        )  # fmt: skip

    def take(self, event: Listed | Changed) -> None:
        self.sync.take(event)
        self.sync.advance()

    @property
    def algorithm(self) -> int:
        return self.fake.services[self.fake.frontends[FRONTEND]].algorithm


def service(**annotations: str) -> Service:
    names = {"slow": SLOW_START, "algorithm": ALGORITHM, "drain": DRAIN}
    found = {names[name]: text for name, text in annotations.items()}
    spec = Spec(cluster_ip="10.96.0.1", ports=(Port(port=80),))
    return Service(metadata=ObjectMeta(name="web", annotations=found), spec=spec)


def endpoints(*addresses: str) -> EndpointSlice:
    return EndpointSlice(
        metadata=ObjectMeta(name="web-1", labels={"kubernetes.io/service-name": "web"}),
        address_type="IPv4",
        endpoints=tuple(Endpoint(addresses=(address,)) for address in addresses),
        ports=(EndpointPort(name="", port=80),),
    )


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(tmp_path, monkeypatch)


def test_a_new_endpoint_starts_slowly_and_that_ends_by_itself(node: Node) -> None:
    node.take(Listed((service(slow="90"), endpoints("10.244.0.1"))))
    assert node.algorithm == 0
    node.take(Changed((endpoints("10.244.0.1", "10.244.0.2"),)))
    assert node.algorithm == WEIGHTED
    changes = []
    for second in range(1, 200):
        node.now += 1
        if node.sync.advance():
            changes.append((second, node.algorithm))
    assert changes == [*((10 * step, WEIGHTED) for step in range(1, 9)), (90, 0)]


def test_what_is_asked_of_draining_has_whole_weights_and_waits_for_slow_start(node: Node) -> None:
    one, two = "10.244.0.1", "10.244.0.2"
    node.take(Listed((service(slow="90", drain="30/m"), endpoints(one))))
    node.take(Changed((endpoints(one, two),)))
    found = node.sync.asked({WEB})[WEB]
    assert found and (found.rate, found.waits) == (0.5, True)
    (of,) = found.sets
    assert of.frontends == {FRONTEND}
    weights = {to_text(backend[0]): member.weight for backend, member in of.members.items()}
    assert weights == {one: 100, two: 100}
    ids = {node.fake.load[member.endpoint] == member.generation for member in of.members.values()}
    assert ids == {True}, "as the maps have them"
    node.now += 90
    assert node.sync.advance() == {WEB}
    done = node.sync.asked({WEB})[WEB]
    assert done == replace(found, waits=False)


@pytest.mark.parametrize("after", [Changed((service(),)), Changed((), (WEB,))])
def test_who_no_longer_asks_to_be_drained_is_named_once(node: Node, after: Changed) -> None:
    node.take(Listed((service(drain="5/s"), endpoints("10.244.0.1"))))
    assert node.sync.asked({WEB})[WEB]
    node.take(after)
    assert node.sync.asked({WEB}) == {WEB: None}
    assert node.sync.asked({WEB}) == {}


def test_what_a_failure_leaves_undone_is_done_with_the_next_sync(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.take(Listed((service(slow="90"), endpoints("10.244.0.1"))))
    node.take(Changed((endpoints("10.244.0.1", "10.244.0.2"),)))
    node.now += 90
    with monkeypatch.context() as broken:
        broken.setattr(sync_module, "apply", lambda *_: (_ for _ in ()).throw(OSError("injected")))
        assert node.sync.advance() is None
    monkeypatch.setattr(
        Sync, "_new_planner", lambda _: Planner(node.fake.limits, node.fake.snapshot())
    )
    assert node.sync.retry(0) == {WEB}
    assert node.algorithm == 0


def test_a_bad_annotation_changes_nothing_also_after_a_restart(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = endpoints("10.244.0.1")
    node.take(Listed((service(algorithm="maglev"), piece)))
    node.take(Changed((service(algorithm="fastest"),)))
    assert node.algorithm == MAGLEV
    assert read_annotations(tmp_path) == {WEB: Kept("", {ALGORITHM: "maglev"})}
    after = Node(tmp_path, monkeypatch)
    after.take(Listed((service(algorithm="fastest"), piece)))
    assert after.algorithm == MAGLEV
    (problem,) = after.sync.problems()
    assert (problem.object, problem.reason) == ("Service default/web", "AnnotationInvalid")
    after.take(Changed((service(algorithm="random"),)))
    assert after.algorithm == 0 and not after.sync.problems()
    assert read_annotations(tmp_path) == {}


def test_what_can_not_be_attached_again_is_a_problem_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, looks = Node(tmp_path, monkeypatch), 0
    fault: Exception | None = FileNotFoundError(2, "No such file or directory")

    def hold(*_: object) -> list[str]:
        nonlocal looks
        looks += 1
        if fault:
            raise fault
        return ["connect4"]

    monkeypatch.setattr(Pins, "hold", hold)
    found: Any = node.sync
    found._loaded = types.SimpleNamespace(generation=None)
    assert node.sync.hold()
    (problem,) = node.sync.problems()
    assert (problem.reason, problem.severity) == ("NotAttached", "error")
    assert not node.sync.hold()
    assert looks == 1, "once a second at most"
    for fault in (KernelTooOld("too many open files"), None):
        node.now += 1
        assert node.sync.hold()
        assert bool(node.sync.problems()) == bool(fault)
    fault = NotLoaded("all is gone")
    node.now += 1
    with pytest.raises(NotLoaded):
        node.sync.hold()
