"""The thread that ends sockets: what it does where the machine has no room for it."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pointsman import netlink, netns, reaper
from pointsman.reaper import Found, Reaped, Reaper
from pointsman.stale import Record
from pointsman.values import UDP, to_address
from tests.support.kernel import until

RECORD = Record(7, UDP, (to_address("10.96.0.10"), 53), (to_address("10.244.0.2"), 53), 1, 1)
_TIMES = 8  # more than a socket is looked for in vain


class Records:
    """One stale socket, in the place of the maps."""

    def __init__(self, _: Path) -> None: ...

    def records(self, _: object) -> list[Record]:
        return [RECORD]

    def still(self, _: Record) -> bool:
        return True

    def close(self) -> None: ...


@pytest.fixture
def no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    start, left = threading.Thread.start, [0] * _TIMES

    def scarce(self: threading.Thread) -> None:
        if self.name == "netns" and left:
            left.pop()
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", scarce)


@pytest.fixture
def no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    namespaces, left = netns.namespaces, [0] * _TIMES

    def scarce() -> Iterator[tuple[int, int]]:
        if left:
            left.pop()
            raise OSError(errno.EMFILE, "Too many open files")
        yield from namespaces()

    monkeypatch.setattr(netns, "namespaces", scarce)


@pytest.mark.parametrize("shortage", ["no_thread", "no_descriptor"])
def test_what_there_is_no_room_for_is_told_once_and_done_later(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, shortage: str
) -> None:
    request.getfixturevalue(shortage)
    monkeypatch.setattr(reaper, "Sockets", Records)
    monkeypatch.setattr(netlink, "destroy", lambda records, _: list(records))
    told: list[Reaped] = []
    ended = threading.Event()

    def reaped(each: Reaped) -> None:
        told.append(each)
        if each.destroyed:
            ended.set()

    def judge(found: Found) -> None:
        one.destroy(found.records if not ended.is_set() else ())

    one: Any = Reaper(Path(), lambda: None, judge, reaped, interval=0.0)
    thread = threading.Thread(target=one.run, daemon=True)
    thread.start()
    try:
        one.look()
        until(lambda: ended.is_set() or not thread.is_alive(), "the socket's end")
        assert thread.is_alive()
    finally:
        one.stop()
        thread.join()
    assert [len(each.destroyed) for each in told] == [0, 1]
    assert ("Too many open files" in told[0].problems[0]) == (shortage == "no_descriptor")
    assert not told[1].problems


def test_where_sockets_can_not_be_ended_at_all_they_are_not_looked_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = 0

    def refuse(*_: object) -> list[Record]:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(netlink, "destroy", refuse)
    one: Any = Reaper(Path(), lambda: None, lambda _: None, lambda _: None)
    while True:
        one._wanted = False
        one._reap(Records(Path()), [RECORD], [])
        if not one._wanted:
            break
        looks += 1
    assert looks == 3
