"""Churn and crashes under load: no connect fails, and none goes astray."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

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
                client.settimeout(30)
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
        server.settimeout(60)

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
