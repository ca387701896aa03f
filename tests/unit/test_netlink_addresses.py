"""The node's addresses, followed: no reading that fails ends that."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import threading

import pytest

from pointsman import host, netlink
from pointsman.netlink.devices import V4_ADDRESS
from pointsman.netlink.wire import Monitor
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


def test_a_monitor_works_where_a_thousand_files_are_open() -> None:
    """select(2) takes no descriptor from 1024 on."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        host.allow_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
        for _ in range(1024):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        monitor = opened.enter_context(contextlib.closing(Monitor(V4_ADDRESS)))
        assert monitor.fileno() >= 1024
        assert not monitor.changed(0)
