"""One set of attached programs for all kernel tests that don't need their own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pointsman import abi, host
from pointsman.pins import Pins
from tests.kernel.home import NODE_IP, NODE_IP6, OTHER_NODE, Everywhere, Home, device_address
from tests.support.agents import AgentProcess, node_of
from tests.support.kernel import Cgroup, Lab, lacking, own_network

#: Those that start most agents with programs for packets, which the verifier takes long for.
_LONGEST = ("test_loading", "test_upgrades", "test_devices", "test_offloads", "test_topology")
_RESERVED = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin first: at the end no worker has one while the others have none."""
    items.sort(key=lambda item: item.path.stem not in _LONGEST)


@pytest.fixture(scope="session")
def kernel(missing: Callable[[str], None]) -> None:
    """A namespace without a way out; skips with a reason where kernel tests can't run."""
    if lack := lacking():
        missing(lack)
    host.mount_bpffs(Path("/sys/fs/bpf/any"))
    own_network()


@pytest.fixture(scope="session")
def shared_lab(kernel: None) -> Iterator[Lab]:
    lab = Lab(f"pm_test_{os.getpid()}")
    lab.attach()
    yield lab
    lab.close()


@pytest.fixture
def lab(shared_lab: Lab) -> Iterator[Lab]:
    """The programs, attached, without any Service; this process is served by them."""
    shared_lab.clear()
    shared_lab.cgroup.enter()
    yield shared_lab
    shared_lab.cgroup.leave()
    shared_lab.clear()


@pytest.fixture
def fresh_lab(kernel: None, request: pytest.FixtureRequest) -> Iterator[Callable[..., Lab]]:
    """`fresh_lab(source=…, sizes=…)`: programs of their own, for what changes them."""
    made: list[Lab] = []

    def make(**options: object) -> Lab:
        lab = Lab(
            f"pm_test_{os.getpid()}_{len(made)}_{abs(hash(request.node.name)) % 9999}", **options
        )
        made.append(lab)
        lab.attach()
        lab.cgroup.enter()
        return lab

    yield make
    for lab in made:
        lab.close()


@pytest.fixture
def changed_source(tmp_path: Path) -> Callable[..., Path]:
    """`changed_source((file, old, new), …)`: a copy of bpf/ with these replacements made."""

    def change(*replacements: tuple[str, str, str]) -> Path:
        directory = tmp_path / f"bpf_{len(list(tmp_path.iterdir()))}"
        shutil.copytree(abi.source_directory(), directory)
        for name, old, new in replacements:
            text = (directory / name).read_text()
            assert old in text, f"{name} has no longer: {old}"
            (directory / name).write_text(text.replace(old, new))
        return directory

    return change


@pytest.fixture
def node(kernel: None, tmp_path: Path) -> Iterator[AgentProcess]:
    """A node without an agent yet; this process is in the cgroup that it will serve."""
    reserved = _RESERVED.read_text()
    cgroup = Cgroup(f"pm_node_{os.getpid()}")
    cgroup.enter()
    agent = AgentProcess(tmp_path, cgroup.path, cgroup.path.name)
    yield agent
    agent.end()
    if agent.root.is_dir():
        Pins(agent.root).unload()
        shutil.rmtree(agent.root, ignore_errors=True)
    cgroup.close()
    _RESERVED.write_text(reserved)


@pytest.fixture(scope="module")
def home(kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A node whose agent is there for all tests of a file, for `use(…)`."""
    cgroup = Cgroup(f"pm_home_{os.getpid()}")
    cgroup.enter()
    servers = Everywhere()
    found = Home(tmp_path_factory.mktemp("home"), cgroup.path, cgroup.path.name, servers)
    with device_address(NODE_IP), device_address(NODE_IP6):
        try:
            found.here(zone="east")
            found.write("node-there.yaml", node_of("there", OTHER_NODE, zone="west"))
            yield found
        finally:
            found.close()
            servers.close()
            cgroup.close()
