"""Network namespaces of this machine: found, visited, told apart, and what is set in one."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pointsman import host, netlink, netns, portranges
from pointsman.values import to_address
from tests.support.kernel import needs_linux, run, until
from tests.support.pods import Pod

pytestmark = pytest.mark.kernel


@contextmanager
def another_namespace(*setup: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a network namespace of its own, after these shell commands."""
    script = "; ".join(("ip link set lo up", *setup, "echo ready", "read _"))
    process = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()


def inode_of(pid: int) -> int:
    return Path(f"/proc/{pid}/ns/net").stat().st_ino


def test_own_namespace_comes_first_and_none_comes_twice(kernel: None) -> None:
    with another_namespace() as other:
        found = [number for number, _ in netns.namespaces()]
        assert found[0] == netns.inode()
        assert inode_of(other.pid) in found
        assert len(found) == len(set(found))


def test_a_namespace_without_processes_is_found_by_its_mount(kernel: None) -> None:
    name = f"pm-test-{os.getpid()}"
    run("ip", "netns", "add", name)
    try:
        number = Path("/run/netns", name).stat().st_ino
        assert number in [found for found, _ in netns.namespaces()]
    finally:
        run("ip", "netns", "del", name)


def test_descriptors_are_closed(kernel: None) -> None:
    gc.collect()  # what other tests left open must not be closed in between
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in netns.namespaces():
        break
    list(netns.namespaces())
    netns.visit(lambda: False)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_visit_works_in_each_namespace_and_leaves_the_caller_where_it_was(kernel: None) -> None:
    needs_linux(5, 14, "SO_NETNS_COOKIE")
    own = netns.inode()
    seen: dict[int, int] = {}

    def work() -> bool:
        seen[netns.inode()] = netns.cookie()
        return False

    with another_namespace() as other:
        assert netns.visit(work) == []
        assert {own, inode_of(other.pid)} <= set(seen)
        assert len(set(seen.values())) == len(seen), "each has a cookie of its own"
        assert seen[own] == netns.cookie()
        seen.clear()
        netns.visit(work, others_only=True)
        assert own not in seen
    assert netns.inode() == own
    assert not [t for t in threading.enumerate() if t.name == "netns"]


def test_a_visit_ends_when_the_work_is_done_and_raises_its_errors(kernel: None) -> None:
    visited = []
    with another_namespace():
        netns.visit(lambda: bool(visited.append(1) or True))
        assert len(visited) == 1
        with pytest.raises(ZeroDivisionError):
            netns.visit(lambda: bool(1 / 0))


def test_a_pod_is_found_by_its_address(kernel: None) -> None:
    needs_linux(5, 14, "SO_NETNS_COOKIE")
    # All namespaces are searched, those of tests beside this one, too: nobody else has these.
    pod, twice, nobody = map(to_address, ("10.245.3.7", "10.245.3.8", "10.245.3.9"))
    six, own = map(to_address, ("fd00:245:3::7", "10.244.3.3"))
    run("ip", "addr", "add", "10.244.3.3/32", "dev", "lo")
    try:
        with (
            another_namespace(
                "ip addr add 10.245.3.7/32 dev lo",
                "ip addr add fd00:245:3::7/128 dev lo nodad",
                "ip addr add 10.245.3.8/32 dev lo",
            ) as other,
            another_namespace("ip addr add 10.245.3.8/32 dev lo"),
        ):
            found = netns.netns_of(frozenset({pod, six, twice, nobody, own}))
            assert set(found) == {pod, six}, "the caller's own and doubtful ones are left out"
            assert found[pod] == found[six]
            assert found[pod] == cookie_of(other.pid)
    finally:
        run("ip", "addr", "del", "10.244.3.3/32", "dev", "lo")


def cookie_of(pid: int) -> int:
    code = "import socket, sys; raw = socket.socket().getsockopt(1, 71, 8)"
    code += "; print(int.from_bytes(raw, sys.byteorder))"
    return int(run("nsenter", "--net", "-t", str(pid), sys.executable, "-c", code))


def test_local_addresses_leave_out_loopbacks_own(kernel: None) -> None:
    run("ip", "addr", "add", "10.244.3.4/32", "dev", "lo")
    try:
        local = netlink.local_addresses()
        assert {to_address("10.244.3.4"), to_address("fd00:244::1")} <= local
        assert not {to_address("127.0.0.1"), to_address("::1")} & local
        assert netlink.addresses() - local == {to_address("127.0.0.1"), to_address("::1")}
    finally:
        run("ip", "addr", "del", "10.244.3.4/32", "dev", "lo")


def test_a_new_address_is_told(kernel: None) -> None:
    seen: list[frozenset[bytes]] = []
    stop = threading.Event()
    thread = threading.Thread(target=netlink.watch_addresses, args=(seen.append, stop))
    thread.start()
    try:
        until(lambda: seen, "the addresses at start")
        run("ip", "addr", "add", "10.244.3.5/32", "dev", "lo")
        until(lambda: to_address("10.244.3.5") in seen[-1], "the new address")
        run("ip", "addr", "del", "10.244.3.5/32", "dev", "lo")
        until(lambda: to_address("10.244.3.5") not in seen[-1], "the address gone")
    finally:
        stop.set()
        thread.join()


def test_reserved_ports_are_not_given_to_sockets(kernel: None) -> None:
    """The real setting, of a namespace in which no agent has been."""
    with Pod() as pod:
        pod.run(_reserve)


def _reserve() -> None:
    setting = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
    assert setting.read_text() == "\n"
    setting.write_text("8080,30005\n")
    added = host.reserve_ports(30000, 30009)
    assert portranges.to_text(added) == "30000-30004,30006-30009"
    assert setting.read_text() == "8080,30000-30009\n"
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("30000 30011\n")
    given = set()
    for _ in range(50):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.bind(("127.0.0.1", 0))
            given.add(one.getsockname()[1])
    assert given <= {30010, 30011}
    assert host.release_ports(added)
    assert setting.read_text() == "8080,30005\n"
    assert host.release_ports(portranges.parse("1-65535"))
    assert setting.read_text() == "\n"


def test_what_kube_proxy_in_ipvs_mode_left_is_no_address_of_this_node(kernel: None) -> None:
    """It keeps every VIP on a device of its own, until `kube-proxy --cleanup`."""
    with Pod() as pod:
        pod.run(run, "ip", "link", "add", "kube-ipvs0", "type", "veth", "peer", "name", "other")
        pod.run(run, "ip", "addr", "add", "10.96.0.1/32", "dev", "kube-ipvs0")
        pod.run(run, "ip", "addr", "add", "10.96.0.2/32", "dev", "other")

        found = pod.run(netlink.addresses)

    assert to_address("10.96.0.2") in found
    assert to_address("10.96.0.1") not in found
