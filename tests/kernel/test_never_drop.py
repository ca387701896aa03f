"""Churn, crashes and upgrades under load: no connect fails, and none goes astray."""

from __future__ import annotations

import json
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pointsman import abi
from pointsman.values import TCP, PortName
from tests.support.agents import AgentProcess, endpoints, service
from tests.support.kernel import Lab, entry, until

pytestmark = pytest.mark.kernel

VIP = ("10.96.0.1", 80)


@contextmanager
def everywhere(port: int = 0) -> Iterator[tuple[socket.socket, int]]:
    """A server on every local address; which one was dialled shows in getsockname()."""
    with socket.socket() as server:
        server.bind(("0.0.0.0", port))
        server.listen(1024)
        yield server, server.getsockname()[1]


class Hammer:
    """Dials a VIP without a pause on a thread of its own, and keeps every failure."""

    def __init__(self, server: socket.socket, vip: tuple[str, int] = VIP) -> None:
        self._server, self._vip = server, vip
        self.failures: list[str] = []
        self.reached: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._dial), threading.Thread(target=self._accept)]

    def __enter__(self) -> Hammer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _dial(self) -> None:
        while not self._stop.is_set():
            with socket.socket() as client:
                client.settimeout(5)
                try:
                    client.connect(self._vip)
                    self.reached.append("")
                except OSError as failure:
                    self.failures.append(str(failure))

    def _accept(self) -> None:
        self._server.settimeout(0.05)
        while not self._stop.is_set():
            try:
                self._server.accept()[0].close()
            except TimeoutError:
                continue

    def proceed(self, count: int = 50) -> None:
        """Waits until that many more connects were made."""
        goal = len(self.reached) + len(self.failures) + count
        until(lambda: len(self.reached) + len(self.failures) >= goal, "more connects")


def test_a_reader_never_reaches_an_endpoint_that_left_before_the_last_switch(lab: Lab) -> None:
    """Each epoch has endpoints of its own. A connect that began after epoch `low` was in force and
    ended before epoch `high` + 1 began must have reached an endpoint of `low` … `high`."""
    owner = PortName("default", "web", "p")
    begun = finished = 0
    stop = threading.Event()
    with everywhere() as (server, port):
        server.settimeout(5)

        def churn() -> None:
            nonlocal begun, finished
            epoch = 0
            rng = random.Random(7)
            while not stop.is_set():
                epoch += 1
                begun = epoch
                addresses = [
                    f"127.{epoch >> 8 & 255}.{epoch & 255}.{n}" for n in range(1, rng.randint(2, 9))
                ]
                members = [(address, port) for address in addresses]
                lab.set("web", entry(*VIP, TCP, members, owner))
                finished = epoch

        lab.set("web", entry(*VIP, TCP, [("127.0.0.1", port)], owner))
        thread = threading.Thread(target=churn)
        thread.start()
        try:
            connects = 0
            while connects < 5000 or finished < 100:
                low = finished
                with socket.socket() as client:
                    client.connect(VIP)
                    high = begun
                    accepted, _ = server.accept()
                    address = accepted.getsockname()[0].split(".")
                    accepted.close()
                epoch = int(address[1]) << 8 | int(address[2])
                assert low <= epoch <= high, f"epoch {epoch}, but {low} … {high} were in force"
                connects += 1
        finally:
            stop.set()
            thread.join()


def test_kill_9_at_any_moment_of_a_sync_fails_no_connect_and_converges(
    node: AgentProcess,
) -> None:
    rng = random.Random(3)
    with everywhere() as (server, port):
        node.write("web.yaml", service("web", VIP[0]))
        node.write("web-endpoints.yaml", endpoints("web", ("10.244.0.1", port)))
        node.start()
        with Hammer(server) as hammer:
            for round_ in range(8):
                stop = threading.Event()

                def churn(stop: threading.Event = stop, round_: int = round_) -> None:
                    i = 0
                    while not stop.is_set():
                        i += 1
                        count = rng.randint(1, 40)
                        some = [(f"10.244.{round_}.{n}", port) for n in range(1, count + 1)]
                        node.write("web-endpoints.yaml", endpoints("web", *some))
                        extra = [service(f"x{n}", f"10.97.{i % 200}.{n}") for n in range(1, 60)]
                        node.write("extra.yaml", "---".join(extra))
                        time.sleep(0.02)

                thread = threading.Thread(target=churn)
                thread.start()
                time.sleep(rng.uniform(0.05, 0.6))
                node.kill()
                stop.set()
                thread.join()
                hammer.proceed()
                # Killed while it starts, too: nothing may depend on a whole first sync.
                node.start(wait=False)
                time.sleep(rng.uniform(0.2, 0.9))
                node.kill()
                node.start()
                hammer.proceed()
            until(lambda: node.cli("verify", check=False).returncode == 0, "equal maps")
        assert not hammer.failures, hammer.failures[:5]


CHANGES = {
    "the program": ((("sock.c", "#define REJECT 0", "#define REJECT 0 /* changed */"),), ()),
    "the layout": (
        (
            (
                "abi.h",
                "\t__u32 owner; /* the service port, index",
                "\t__u32 first_;\n\t__u32 second_;\n\t__u32 owner; /* the service port, index",
            ),
            ("abi.h", "\t__u32 reserved[2];", "\t/* taken */"),
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
