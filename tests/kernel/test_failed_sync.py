"""A sync that fails half-way: nothing flips onto maps that are not filled."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from pointsman.agent import Agent
from pointsman.manifests import ManifestSource
from pointsman.maps import Maps
from pointsman.pins import Pins, Sizes
from pointsman.settings import Settings
from pointsman.values import to_address
from tests.support.agents import STARTS, AgentProcess, endpoints, service
from tests.support.kernel import tcp_server, until

pytestmark = pytest.mark.kernel


def settings_of(node: AgentProcess, sizes: Sizes | None = None) -> Settings:
    return Settings(
        bpffs=node.root,
        cgroup=node.cgroup,
        run_dir=node.run_dir,
        state_dir=node.state_dir,
        manifests=node.manifests,
        sizes=sizes or Sizes(),
    )


def test_an_agent_that_ends_between_flip_and_merge_leaves_the_merge_to_the_next(
    node: AgentProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        """Ends the agent where a kill -9 would."""

    def killed(_: Maps) -> None:
        raise Killed

    with tcp_server("10.244.0.1") as (_, port):
        node.write("web.yaml", service("web", "10.96.0.1"))
        node.write("endpoints.yaml", endpoints("web", ("10.244.0.1", port)))
        node.start()
        client = socket.create_connection(("10.96.0.1", 80))
        node.stop()
        larger = settings_of(node, Sizes(endpoints=70000))  # so `load` is a new map
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Maps, "merge_load", killed)
            Agent(larger, ManifestSource(node.manifests)).run()
        agent = Agent(larger, ManifestSource(node.manifests))
        thread = threading.Thread(target=agent.run)
        thread.start()
        try:
            until(agent.ready.is_set, "an attached agent", STARTS)
            assert node.open() == {f"10.244.0.1:{port}": 1}
            client.close()
            until(lambda: node.open() == {f"10.244.0.1:{port}": 0}, "the count's end")
        finally:
            agent.stop()
            thread.join()


def test_a_failed_first_sync_attaches_nothing_until_the_maps_are_whole(
    node: AgentProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()
    attached_to: list[int] = []
    add, attach = Maps.add_frontends, Pins.attach

    def failing(self: Maps, items: Sequence[object]) -> None:
        if not failed.is_set():
            failed.set()
            raise OSError(errno.ENOMEM, "injected")
        add(self, items)  # type: ignore[arg-type]

    def counting(self: Pins, generation: object, cgroup: Path) -> list[str]:
        found = maps_of(generation).frontends()
        attached_to.append(sum(f.address == to_address("10.96.0.1") for f in found))
        return attach(self, generation, cgroup)  # type: ignore[arg-type]

    def maps_of(generation: object) -> Maps:
        return Maps(generation.maps, generation.programs)  # type: ignore[attr-defined]

    monkeypatch.setattr(Maps, "add_frontends", failing)
    monkeypatch.setattr(Pins, "attach", counting)
    with tcp_server("10.244.0.1") as (_, port):
        node.write("web.yaml", service("web", "10.96.0.1"))
        node.write("endpoints.yaml", endpoints("web", ("10.244.0.1", port)))
        agent = Agent(settings_of(node), ManifestSource(node.manifests))
        thread = threading.Thread(target=agent.run)
        thread.start()
        try:
            until(agent.ready.is_set, "an attached agent", STARTS)
            assert failed.is_set()
            assert attached_to == [2], "attached once, to whole maps"
            with socket.create_connection(("10.96.0.1", 80)) as client:
                assert client.getpeername() == ("10.96.0.1", 80)
        finally:
            agent.stop()
            thread.join()
