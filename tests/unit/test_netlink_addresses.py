"""The node's addresses, followed: no reading that fails ends that."""

from __future__ import annotations

import errno
import logging
import threading

import pytest

from pointsman import netlink
from pointsman.values import Address, to_address

ONE = to_address("192.0.2.1")


def test_addresses_that_change_while_they_are_read_are_read_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop = threading.Event()
    told: list[frozenset[Address]] = []
    readings = 0

    def read() -> frozenset[Address]:
        nonlocal readings
        readings += 1
        if readings <= 3:
            raise OSError(errno.EAGAIN, "the list changed while it was read")
        return frozenset({ONE})

    def changed(now: frozenset[Address]) -> None:
        told.append(now)
        stop.set()

    monkeypatch.setattr(netlink, "local_addresses", read)
    monkeypatch.setattr(netlink, "_READ_AGAIN", 0.0)
    with caplog.at_level(logging.WARNING, "pointsman.agent"):
        netlink.watch_addresses(changed, stop)
    assert (told, readings) == ([frozenset({ONE})], 4)
    assert len(caplog.records) == 1
