"""The order in which the agent does what came in together, and what a failure leaves for later."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from pointsman import sync as sync_module
from pointsman.agent import Agent
from pointsman.edge import Edge
from pointsman.events import Changed, Event
from pointsman.leftbehind import LeftBehind
from pointsman.manifests import ManifestSource
from pointsman.maps import Maps
from pointsman.membership import Membership
from pointsman.objects import ObjectMeta, Ref, Service, ServicePort, ServiceSpec
from pointsman.reaper import Found
from pointsman.surroundings import OptedOut
from pointsman.values import TCP, Frontend, to_address
from tests.kernel.test_failed_sync import settings_of
from tests.support.agents import STARTS, AgentProcess, node_of, service
from tests.support.kernel import until

pytestmark = pytest.mark.kernel

OTHER = Service(
    metadata=ObjectMeta(name="other"),
    spec=ServiceSpec(
        cluster_ip="10.96.0.2", cluster_ips=("10.96.0.2",), ports=(ServicePort(port=80),)
    ),
)
CLAIMED = Frontend(to_address("10.96.0.2"), 80, TCP)


@contextmanager
def running(agent: Agent) -> Iterator[Agent]:
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        yield agent
    finally:
        agent.stop()
        thread.join()


def together(agent: Agent, *messages: Any) -> Callable[[], list[Any]]:
    """In the place of `_next`: these messages in one batch, then whatever comes."""
    real, waiting = agent._next, [list(messages)]

    def following() -> list[Any]:
        return waiting.pop() if waiting else real()

    return following


def test_pitfall_1_sockets_are_judged_after_the_maps_were_written(
    node: AgentProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, they would be judged by what was, ended, and come back to the same endpoint."""
    node.write("web.yaml", service("web", "10.96.0.1"))
    found = Found([], [])
    written: list[bool] = []
    judge = LeftBehind.judge

    def judged(self: LeftBehind, what: Found, members: Membership | None) -> None:
        judge(self, what, members)
        if members and what is found:
            written.append(agent._sync.maps.find(CLAIMED) is not None)

    with running(Agent(settings_of(node), ManifestSource(node.manifests))) as agent:
        until(agent.ready.is_set, "an attached agent", STARTS)
        monkeypatch.setattr(LeftBehind, "judge", judged)
        agent._next = together(agent, found, Changed((OTHER,), ()))  # type: ignore[method-assign]
        until(lambda: written, "a judgement")
        assert written == [True]


def test_what_came_with_something_that_fails_is_not_lost(
    node: AgentProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.write("web.yaml", service("web", "10.96.0.1"))
    skip, failed = Maps.skip, threading.Event()

    def failing(self: Maps, namespaces: frozenset[int]) -> None:
        if 4711 in namespaces and not failed.is_set():
            failed.set()
            raise OSError(errno.E2BIG, "injected")
        skip(self, namespaces)

    monkeypatch.setattr(Maps, "skip", failing)
    with running(Agent(settings_of(node), ManifestSource(node.manifests))) as agent:
        until(agent.ready.is_set, "an attached agent", STARTS)
        until(lambda: agent._surroundings.skipped is not None, "its own search, which finds none")
        found = OptedOut({to_address("10.244.0.9"): 4711})
        agent._next = together(agent, found, Changed((OTHER,), ()))  # type: ignore[method-assign]
        until(lambda: agent._sync.maps.settings()["skipped"] == 1, "the second try")
        assert failed.is_set()
        assert agent._sync.maps.find(CLAIMED)


def test_devices_are_looked_at_with_what_is_known_of_the_node(
    node: AgentProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first look would take the devices of pods for nobody's."""
    node.write("node.yaml", node_of("worker", "192.0.2.1"))
    done: list[Any] = []
    monkeypatch.setattr(Edge, "want", lambda _self, _packets, around: done.append(around))
    monkeypatch.setattr(Edge, "begin", lambda _self, _loaded: done.append("begin"))
    settings = replace(settings_of(node), node_name="worker")
    with running(Agent(settings, ManifestSource(node.manifests))) as agent:
        until(agent.ready.is_set, "an attached agent", STARTS)
    assert done[done.index("begin") - 1].own_addresses == (to_address("192.0.2.1"),)


class Slow:
    """A source that lists nothing for as long as it is held."""

    def __init__(self) -> None:
        self.held = threading.Event()

    def run(self, put: Callable[[Event], None], stop: threading.Event) -> None:
        stop.wait()

    def where(self, ref: Ref) -> str:
        return ""


def test_a_failure_before_anything_is_listed_takes_nothing_away(
    node: AgentProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starting over from what is known would be starting over from nothing."""
    node.write("web.yaml", service("web", "10.96.0.2"))
    node.start()
    node.kill()
    failed = threading.Event()

    def failing(self: Maps, namespaces: frozenset[int]) -> None:
        failed.set()
        raise OSError(errno.ENOMEM, "injected")

    monkeypatch.setattr(Maps, "skip", failing)
    again = threading.Event()
    with running(Agent(settings_of(node), Slow())) as agent:
        until(lambda: hasattr(agent, "_left_behind"), "the maps", STARTS)
        planner = agent._sync._planner
        agent._queue.put(OptedOut({to_address("10.244.0.9"): 4711}))
        until(failed.is_set, "the failure")
        until(lambda: agent._sync._planner is not planner, "the recovery")
        again.wait(0.2)
        assert not agent.ready.is_set()
        assert agent._sync.maps.find(CLAIMED), "the Service went"


def test_an_object_that_can_not_be_worked_out_stops_no_other(
    node: AgentProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake of ours, or an object that nobody thought of: it is named, the rest goes on."""
    node.write("web.yaml", service("web", "10.96.0.1"))
    resolve = sync_module.resolve_ref

    def failing(ref: Ref, *rest: Any) -> Any:
        if ref == OTHER.ref:
            raise ValueError("injected")
        return resolve(ref, *rest)

    third = msgspec.structs.replace(
        OTHER,
        metadata=ObjectMeta(name="third"),
        spec=msgspec.structs.replace(
            OTHER.spec, cluster_ip="10.96.0.3", cluster_ips=("10.96.0.3",)
        ),
    )
    with running(Agent(settings_of(node), ManifestSource(node.manifests))) as agent:
        until(agent.ready.is_set, "an attached agent", STARTS)
        monkeypatch.setattr(sync_module, "resolve_ref", failing)
        agent._queue.put(Changed((OTHER, third), ()))
        until(
            lambda: agent._sync.maps.find(Frontend(to_address("10.96.0.3"), 80, TCP)), "the third"
        )
        assert not agent._sync.maps.find(CLAIMED)
        assert [(p.object, p.reason) for p in agent.problems()] == [
            ("Service default/other", "NotFollowed")
        ]
        monkeypatch.undo()
        agent._queue.put(Changed((), (OTHER.ref,)))
        until(lambda: not agent.problems(), "nothing to mend")
