"""What fails for clients outside leaves the agent, and with it the sockets, alone."""

from __future__ import annotations

import errno
import logging
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pointsman import edge, sweep
from pointsman.devices import Packets
from pointsman.edge import Edge
from pointsman.generations import Generation, Loaded
from pointsman.pins import Pins
from pointsman.settings import Settings
from pointsman.sweep import Round, Sweeper

SETTINGS = replace(Settings(), packets=Packets(("eth0",)), bpffs=Path("/nowhere"))
LOADED = Loaded(Generation(Path("/nowhere/g_1")), fresh=False)


def refuse(*_: object) -> None:
    raise OSError(errno.ENOMEM, "no memory")


def test_maps_that_can_not_be_opened_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "Sweeper", refuse)
    made = Edge(SETTINGS, lambda _: None)
    made.begin(replace(LOADED, packets=True))
    (found,) = made.problems
    assert (found.severity, "no memory" in str(found)) == ("error", True)
    assert made.sweeping() is None


def test_a_loader_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pins, "load_packets", refuse)
    told: list[object] = []
    made = Edge(SETTINGS, told.append)
    made.begin(replace(LOADED, packets_due=True))
    made.stop()
    made._stopped = False
    made.run()
    (loaded,) = told
    assert isinstance(loaded, Loaded)
    assert (loaded.packets_due, "no memory" in loaded.packets_error) == (False, True)
    assert not made.pinning


def test_a_round_that_fails_is_repeated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = Sweeper.__new__(Sweeper)
    made._stop, made._fill = threading.Event(), 0.0
    rounds: list[int] = []

    def one(_self: Sweeper, *, paced: bool) -> Round:
        rounds.append(1)
        if len(rounds) == 4:
            made.stop()
            return Round()
        raise OSError(errno.EPERM if len(rounds) == 3 else errno.ENOMEM, "refused")

    monkeypatch.setattr(Sweeper, "round", one)
    monkeypatch.setattr(Sweeper, "_lacking", lambda _: 0)
    monkeypatch.setattr(sweep, "_REST", 0.0)
    with caplog.at_level(logging.ERROR, "pointsman.agent"):
        made.run()
    assert len(rounds) == 4
    assert len(caplog.records) == 2  # once a kind
