"""The agent as a unit of systemd: what it tells, what it reads again, and what a stuck one does not
tell. A socket stands for systemd."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pointsman import systemd
from tests.support.agents import AgentProcess, service
from tests.support.kernel import until

pytestmark = pytest.mark.kernel

HEAD = "apiVersion: pointsman.io/v1alpha1\nkind: PointsmanConfiguration\n"


class Supervisor:
    """What came to NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.heard: list[str] = []

    def listen(self) -> list[str]:
        while True:
            try:
                self.heard += self._socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return self.heard

    def forget(self) -> None:
        self.listen()
        self.heard.clear()

    def hears(self, line: str) -> None:
        until(
            lambda: any(each.startswith(line) for each in self.listen()),
            lambda: f"{line}: {self.heard}",
        )

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: Callable[[str], None]
) -> Iterator[Supervisor]:
    if systemd.daemon is None:
        missing("python3-systemd")
    found = Supervisor(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(found.path))
    monkeypatch.setenv("WATCHDOG_USEC", "800000")
    yield found
    found.close()


def reload(node: AgentProcess) -> None:
    assert node.process
    os.kill(node.process.pid, signal.SIGHUP)


def test_it_is_ready_when_sockets_are_served_alive_then_and_says_that_it_stops(
    node: AgentProcess, supervisor: Supervisor
) -> None:
    # No directory yet: it runs, and serves nothing.
    away = node.manifests.rename(node.manifests.with_name("away"))
    node.start(wait=False)
    supervisor.hears("WATCHDOG=1")
    supervisor.hears("STATUS=waits for the first list")
    assert "READY=1" not in supervisor.listen()
    (away / "web.yaml").write_text(service("web", "10.96.0.7"))
    away.rename(node.manifests)
    supervisor.hears("READY=1")
    assert node.attached()
    supervisor.hears("STATUS=serves 1 Services")
    supervisor.forget()
    assert node.stop() == 0
    assert "STOPPING=1" in supervisor.listen()


def test_a_reload_begins_and_ends(node: AgentProcess, supervisor: Supervisor) -> None:
    node.start()
    supervisor.hears("READY=1")
    supervisor.forget()
    node.write("web.yaml", service("web", "10.96.0.7"))
    reload(node)
    supervisor.hears("RELOADING=1")
    supervisor.hears("READY=1")
    heard = supervisor.listen()
    assert heard.index("RELOADING=1") < heard.index("READY=1")
    assert any(line.startswith("MONOTONIC_USEC=") for line in heard)
    # What was written before the reload is in force when it ends.
    assert node.status()["balanced"] == 1


def test_a_reload_before_the_first_list_makes_nobody_ready(
    node: AgentProcess, supervisor: Supervisor
) -> None:
    away = node.manifests.rename(node.manifests.with_name("away"))
    node.start(wait=False)
    supervisor.hears("WATCHDOG=1")
    supervisor.forget()
    reload(node)
    supervisor.hears("WATCHDOG=1")
    time.sleep(1)
    assert not {"READY=1", "RELOADING=1"} & set(supervisor.listen())
    away.rename(node.manifests)
    supervisor.hears("READY=1")


def test_a_stuck_agent_gives_no_sign_and_what_ends_it_has_it_say_where_it_stood(
    node: AgentProcess, supervisor: Supervisor
) -> None:
    node.start()
    supervisor.hears("READY=1")
    assert node.process
    node.process.send_signal(signal.SIGSTOP)
    until(lambda: os.waitid(os.P_PID, node.process.pid, os.WSTOPPED | os.WNOHANG), "a stop")
    supervisor.forget()
    time.sleep(1)
    assert supervisor.listen() == []
    # As the watchdog does it.
    node.process.send_signal(signal.SIGABRT)
    node.process.send_signal(signal.SIGCONT)
    assert node.process.wait(60) == -signal.SIGABRT
    assert "_follow" in node.log.read_text()
    # The kernel goes on, and the next agent from there.
    node.start()
    supervisor.hears("READY=1")


def test_a_reload_takes_a_good_configuration_and_keeps_it_when_a_bad_one_comes(
    node: AgentProcess, supervisor: Supervisor, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(HEAD + "externalIPs: all\n")
    node.start("--config", str(config))
    supervisor.hears("READY=1")
    supervisor.forget()

    config.write_text(HEAD + "externalIPs: local\n")
    reload(node)
    supervisor.hears("READY=1")
    until(lambda: node.status()["policy"]["external_ips"] == "local", "the new policy in status")

    supervisor.forget()
    config.write_text(HEAD + "externalIPs: some\n")
    reload(node)
    supervisor.hears("READY=1")
    until(lambda: node.status()["problems"], "the problem in status")
    status = node.status()
    assert status["policy"]["external_ips"] == "local"
    [problem] = status["problems"]
    assert (problem["where"], problem["field"]) == (str(config), "externalIPs")
    supervisor.hears("STATUS=serves 0 Services; 1 to be mended")
    assert "externalIPs" in node.log.read_text()

    supervisor.forget()
    config.write_text(HEAD + "externalIPs: none\n")
    reload(node)
    supervisor.hears("READY=1")
    until(lambda: node.status()["policy"]["external_ips"] == "none", "the new policy in status")
    until(lambda: not node.status()["problems"], "the problem gone")
