"""What systemd and its journal are told, by a socket and a stream that stand for them."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pointsman import systemd
from pointsman.events import Problem


@pytest.fixture(autouse=True)
def library(missing: Callable[[str], None]) -> None:
    if systemd.daemon is None:
        missing("python3-systemd")


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """What came to NOTIFY_SOCKET since the last time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind(str(tmp_path / "notify"))
        one.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        def read() -> list[str]:
            found = []
            while True:
                try:
                    found.append(one.recv(4096).decode())
                except BlockingIOError:
                    return found

        yield read


def test_a_unit_says_what_it_does(told: Callable[[], list[str]]) -> None:
    unit = systemd.Unit({})
    unit.ready()
    unit.reloading()
    unit.stopping()
    ready, reloading, stopping = told()
    assert (ready, stopping) == ("READY=1", "STOPPING=1")
    first, second = reloading.splitlines()
    assert first == "RELOADING=1"
    assert int(second.removeprefix("MONOTONIC_USEC=")) > 0


def test_a_status_is_told_when_it_changes(told: Callable[[], list[str]]) -> None:
    unit = systemd.Unit({})
    for text in ("one", "one", "two"):
        unit.status(text)
    assert told() == ["STATUS=one", "STATUS=two"]


@pytest.mark.parametrize(
    ("environment", "interval"),
    [
        pytest.param({"WATCHDOG_USEC": "60000000"}, 15.0, id="a-quarter"),
        pytest.param({"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": str(os.getpid())}, 1.0, id="us"),
        pytest.param({"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": "1"}, 0.0, id="another-process"),
        pytest.param({"WATCHDOG_USEC": "soon"}, 0.0, id="not-a-number"),
        pytest.param({}, 0.0, id="no-watchdog"),
    ],
)
def test_signs_of_life_are_a_quarter_of_the_time_apart(
    environment: dict[str, str], interval: float
) -> None:
    assert systemd.Unit(environment).interval == interval


def test_signs_of_life_are_no_more_than_needed(told: Callable[[], list[str]]) -> None:
    unit = systemd.Unit({"WATCHDOG_USEC": "60000000"})
    for _ in range(3):
        unit.alive()
    assert told() == ["WATCHDOG=1"]


def test_without_the_library_nothing_happens(
    told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "daemon", None)
    monkeypatch.setattr(systemd, "journal", None)
    systemd.Unit({}).ready()
    assert told() == []
    assert systemd.journal_handler() is None


def test_a_socket_that_is_gone_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    systemd.Unit({}).ready()


def test_the_journal_is_used_if_standard_error_leads_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "stream").open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        status = os.fstat(stream.fileno())
        there = f"{status.st_dev}:{status.st_ino}"
        assert isinstance(
            systemd.journal_handler({"JOURNAL_STREAM": there}), systemd.JournalHandler
        )
        assert systemd.journal_handler({"JOURNAL_STREAM": "0:0"}) is None
        assert systemd.journal_handler({}) is None


def test_a_problem_in_the_journal_has_its_parts_in_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(systemd.journal, "send", lambda text, **more: sent.append((text, more)))
    log = logging.Logger("pointsman.agent")
    log.addHandler(systemd.JournalHandler())
    problem = Problem("is no address", "write one", "a.yaml", "Service default/web", "spec.x")
    log.warning("%s", problem, extra={"problem": problem})
    log.info("attached")
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("failed")
    (first, fields), (second, plain), (third, _) = sent
    assert first == str(problem)
    assert fields["PRIORITY"] == 4
    assert {key: value for key, value in fields.items() if key.startswith("POINTSMAN_")} == {
        "POINTSMAN_OBJECT": "Service default/web",
        "POINTSMAN_FIELD": "spec.x",
        "POINTSMAN_WHERE": "a.yaml",
        "POINTSMAN_MEND": "write one",
    }
    assert fields["SYSLOG_IDENTIFIER"] == "pointsman"
    assert (second, plain["PRIORITY"]) == ("attached", 6)
    assert not [key for key in plain if key.startswith("POINTSMAN_")]
    assert third.startswith("failed\nTraceback") and third.endswith("ValueError: why")
