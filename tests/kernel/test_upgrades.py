"""Upgrades under load, also ones killed half-way: no connect fails, nothing held is lost."""

from __future__ import annotations

import json
import random
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pointsman import abi
from tests.kernel.test_never_drop import VIP, Hammer, everywhere
from tests.support.agents import AgentProcess, endpoints, service
from tests.support.kernel import until

# Several agents a test, and the verifier: 90 s on a machine four times as busy as it has CPUs.
pytestmark = [pytest.mark.kernel, pytest.mark.timeout(1200)]

CHANGES = {
    "the program": ((("sock.c", "#define REJECT 0", "#define REJECT 0 /* changed */"),), ()),
    "the layout": (
        (
            (
                "abi.h",
                "\t__u32 owner; /* the service port, index",
                "\t__u32 first_;\n\t__u32 second_;\n\t__u32 owner; /* the service port, index",
            ),
        ),
        (),
    ),
    "the layout of load": (
        (("abi.h", "\t__u32 open; /*", "\t__u32 spare;\n\t__u32 more;\n\t__u32 open; /*"),),
        (),
    ),
    "the sizes": ((), ("--max-services", "5000", "--max-slots", "9000", "--max-endpoints", "7000")),
}  # fmt: skip


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    def change(replacements: tuple[tuple[str, str, str], ...]) -> Path:
        directory = tmp_path / "changed"
        shutil.copytree(abi.source_directory(), directory)
        for name, old, new in replacements:
            text = (directory / name).read_text()
            assert old in text
            (directory / name).write_text(text.replace(old, new))
        return directory

    return change


class Held:
    """Sockets of every kind, held across whatever happens to the node."""

    def __init__(self, tcp_port: int, udp: socket.socket) -> None:
        self._udp = udp
        self.tcp = socket.create_connection(VIP)
        self.connected = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.connected.connect(("10.96.0.2", 53))
        self.unconnected = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.local = ""
        self.ask()
        self.first = self.local

    def ask(self) -> None:
        """One question on each datagram socket; the answers come from the VIP."""
        self.connected.send(b"c")
        data, source = self._udp.recvfrom(9)
        self._udp.sendto(data, source)
        assert self.connected.recvfrom(9) == (b"c", ("10.96.0.2", 53))
        self.unconnected.sendto(b"u", ("10.96.0.2", 53))
        data, ancillary, _, source = self._udp.recvmsg(9, 64)
        self.local = socket.inet_ntoa(ancillary[0][2][8:12])
        # The answer must leave from the address that was asked: bind to it by IP_PKTINFO.
        self._udp.sendmsg([data], [(socket.IPPROTO_IP, 8, ancillary[0][2])], 0, source)
        assert self.unconnected.recvfrom(9) == (b"u", ("10.96.0.2", 53))

    def check(self) -> None:
        self.ask()
        assert self.tcp.getpeername() == VIP
        assert self.connected.getpeername() == ("10.96.0.2", 53)
        assert self.local == self.first, "the unconnected socket changed its endpoint"

    def close(self) -> None:
        for held in (self.tcp, self.connected, self.unconnected):
            held.close()


@pytest.mark.parametrize("what", CHANGES)
def test_an_upgrade_under_load_fails_nothing_and_keeps_what_is_held(
    node: AgentProcess, changed: Callable[..., Path], what: str
) -> None:
    replacements, options = CHANGES[what]
    source = changed(replacements) if replacements else None
    with everywhere() as (server, port), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("0.0.0.0", 0))
        udp.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO
        udp_port = udp.getsockname()[1]
        node.write("web.yaml", service("web", VIP[0]))
        node.write(
            "web-endpoints.yaml", endpoints("web", ("10.244.0.1", port), ("10.244.0.2", port))
        )
        node.write("dns.yaml", service("dns", "10.96.0.2", 53, "UDP"))
        dns = [(f"10.244.0.{n}", udp_port) for n in range(1, 9)]
        node.write("dns-endpoints.yaml", endpoints("dns", *dns, protocol="UDP"))
        node.start()
        held = Held(port, udp)
        with Hammer(server) as hammer:
            before = json.loads(node.cli("status", "-o", "json").stdout)["datapath"]["generation"]
            hammer.proceed()
            node.stop()
            hammer.proceed()
            node.start(*options, source=source)
            hammer.proceed()
            held.check()
            after = json.loads(node.cli("status", "-o", "json", source=source).stdout)["datapath"][
                "generation"
            ]
            assert before != after
        assert not hammer.failures, hammer.failures[:5]
        until(lambda: sum(counts(node, source, port)) == 1, "only the held connection is counted")
        assert sum(counts(node, source, udp_port)) == 1
        held.close()
        until(lambda: sum(counts(node, source, port)) == 0, "nothing is counted")
        assert sum(counts(node, source, udp_port)) == 0
        # And back again, as a downgrade would.
        held = Held(port, udp)
        node.stop()
        node.start()
        held.check()
        until(lambda: sum(counts(node, None, port)) == 1, "the held connection is counted")
        held.close()
        until(lambda: sum(counts(node, None, port)) == 0, "nothing is counted")


def counts(node: AgentProcess, source: Path | None, port: int) -> list[int]:
    return [n for endpoint, n in node.open(source).items() if endpoint.endswith(f":{port}")]


def test_an_upgrade_killed_half_way_is_completed_by_the_next_start(
    node: AgentProcess, changed: Callable[..., Path]
) -> None:
    source = changed(CHANGES["the layout"][0])
    rng = random.Random(5)
    with everywhere() as (server, port):
        node.write("web.yaml", service("web", VIP[0]))
        node.write("web-endpoints.yaml", endpoints("web", ("10.244.0.1", port)))
        node.start()
        with Hammer(server) as hammer:
            client = socket.create_connection(VIP)
            for turn in range(6):
                node.kill()
                wanted = source if turn % 2 == 0 else None
                for _ in range(3):
                    node.start(source=wanted, wait=False)
                    time.sleep(rng.uniform(0.3, 1.6))
                    node.kill()
                node.start(source=wanted)
                hammer.proceed()
                assert client.getpeername() == VIP
            client.close()
        assert not hammer.failures, hammer.failures[:5]
        until(lambda: sum(counts(node, None, port)) == 0, "nothing is counted")


def test_records_of_another_layout_are_refused_with_every_difference_named(
    node: AgentProcess, changed: Callable[..., Path]
) -> None:
    node.write("web.yaml", service("web", VIP[0]))
    node.start()
    node.stop()
    source = changed((("abi.h", "\t__u8 counted; /*", "\t__u8 extra;\n\t__u8 counted; /*"),))
    done = node.cli("load", source=source, check=False)
    assert done.returncode == 8
    assert (
        "sockets_overflow" in done.stderr or "datagrams" in done.stderr or "counted" in done.stderr
    )
    assert "pointsman unload" in done.stderr
    # What ran goes on running.
    assert node.cli("get", "services").returncode == 0
