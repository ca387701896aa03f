"""An agent that runs keeps its programs attached, and ends if there is nothing left to attach."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointsman.hooks import HOOKS
from tests.kernel.reach import Everyone, everyone
from tests.support.agents import STARTS, AgentProcess, endpoints, service
from tests.support.kernel import Cgroup, until

pytestmark = pytest.mark.kernel

VIP, ENDPOINT = "10.96.5.9", "10.244.0.1"


@pytest.fixture
def servers(node: AgentProcess) -> Iterator[Everyone]:
    """The endpoints of a Service of that node."""
    with everyone() as found:
        node.write("web.yaml", service("web", VIP))
        node.write("slices.yaml", endpoints("web", (ENDPOINT, found.port)))
        yield found


def test_a_cgroup_that_is_made_anew_is_served_again(node: AgentProcess, servers: Everyone) -> None:
    """A slice of systemd goes with the last unit in it, and comes back with the next."""
    apps = Cgroup(f"pm_apps_{os.getpid()}")
    node.cgroup = apps.path
    try:
        node.start()
        apps.enter()
        assert servers.reached(VIP) == ENDPOINT
        apps.leave()
        apps.path.rmdir()
        until(lambda: node.status()["problems"], "a problem")
        (problem,) = node.status()["problems"]
        assert (problem["reason"], problem["severity"]) == ("NotAttached", "error")
        assert str(apps.path) in problem["message"]
        apps.path.mkdir()
        apps.enter()
        until(lambda: servers.reached(VIP) == ENDPOINT, "the Service in the new cgroup")
        until(lambda: not node.status()["problems"], "no problem any more")
        assert node.cli("status").returncode == 0
    finally:
        apps.close()


def test_links_whose_pins_were_deleted_are_attached_again(
    node: AgentProcess, servers: Everyone
) -> None:
    node.start()
    for hook in HOOKS:
        (node.root / "links" / hook.name).unlink()
    until(lambda: node.cli("status", check=False).returncode == 0, "all links")
    assert servers.reached(VIP) == ENDPOINT
    assert f"hooks={','.join(hook.name for hook in HOOKS)}" in node.log.read_text()


def test_without_any_pin_the_agent_ends_and_the_next_one_serves(
    node: AgentProcess, servers: Everyone
) -> None:
    """As where bpffs was unmounted: an agent that went on would write maps that nobody reads."""
    node.start()
    shutil.rmtree(node.root)
    assert node.process
    # Whichever is looked for first: a program, or a map for the status file.
    code, told = node.process.wait(STARTS), node.log.read_text()
    assert code in (10, 11), told
    assert str(node.root) in told.splitlines()[-1], "what is gone"
    node.start()
    assert servers.reached(VIP) == ENDPOINT


def test_an_agent_may_have_as_many_files_as_its_operator_lets_it(node: AgentProcess) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    try:
        node.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert node.process
    limits = Path(f"/proc/{node.process.pid}/limits").read_text().splitlines()
    (files,) = (line.split() for line in limits if line.startswith("Max open files"))
    assert files[3:5] == [str(before[1])] * 2
