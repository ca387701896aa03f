"""What an agent knows of its own node."""

from __future__ import annotations

import errno
import socket
import sys
import textwrap

import pytest

from tests.support.agents import AgentProcess, endpoints, service
from tests.support.kernel import run, tcp_server, until

pytestmark = pytest.mark.kernel


def outcome(address: tuple[str, int]) -> int:
    """0 or the errno of a connect."""
    with socket.socket() as client:
        return client.connect_ex(address)


def test_a_vip_that_a_device_of_this_node_has_is_not_translated(node: AgentProcess) -> None:
    """NodeLocal DNSCache listens on the ClusterIP itself."""
    with tcp_server("10.244.0.1") as (server, port):
        node.write("web.yaml", service("web", "10.96.0.1"))
        node.write("endpoints.yaml", endpoints("web", ("10.244.0.1", port)))
        run("ip", "addr", "add", "10.96.0.1/32", "dev", "lo")
        try:
            node.start()
            assert outcome(("10.96.0.1", 80)) == errno.ECONNREFUSED, "nobody listens there"
            [problem] = node.status()["problems"]
            assert "assigned to a device" in problem["message"]
            with tcp_server("10.96.0.1") as (_, local):
                assert outcome(("10.96.0.1", local)) == 0
        finally:
            run("ip", "addr", "del", "10.96.0.1/32", "dev", "lo")
        # Gone from the device: from now on it is the Service's.
        until(lambda: outcome(("10.96.0.1", 80)) == 0, "translation")
        server.accept()[0].close()
        run("ip", "addr", "add", "10.96.0.1/32", "dev", "lo")
        try:
            until(lambda: outcome(("10.96.0.1", 80)) == errno.ECONNREFUSED, "the device's again")
        finally:
            run("ip", "addr", "del", "10.96.0.1/32", "dev", "lo")


def test_of_many_that_start_at_once_one_mounts_bpffs(kernel: None) -> None:
    """The second of two would hide what the first has pinned. In a mount namespace of its own."""
    code = """
        import subprocess, threading
        from pathlib import Path
        from pointsman import host

        def mount():
            barrier.wait()
            host.mount_bpffs(Path("/sys/fs/bpf/any"))

        for _ in range(20):
            for point in host.mounts("bpf"):
                subprocess.run(["umount", "--lazy", point], check=True)
            barrier = threading.Barrier(8)
            threads = [threading.Thread(target=mount) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            print(len(host.mounts("bpf")))
        """
    program = [sys.executable, "-c", textwrap.dedent(code)]
    told = run("unshare", "--mount", "--propagation", "private", *program)
    assert told.split() == ["1"] * 20


def test_opted_out_pods_and_addresses_are_both_looked_for_at_the_start(node: AgentProcess) -> None:
    """Two threads that need netlink at once: neither may find a half-imported library."""
    node.write(
        "pod.yaml",
        "{apiVersion: v1, kind: Pod, metadata: {name: a, annotations: "
        "{pointsman.io/socket-lb: disabled}}, status: {podIP: 10.244.9.9}}",
    )
    for _ in range(3):
        node.start()
        assert node.status()["failed"] == ""
        node.stop()
