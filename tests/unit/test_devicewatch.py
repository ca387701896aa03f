"""How devices are followed when something fails, or is not known yet. Nothing is attached."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pointsman import devicewatch
from pointsman.deviceproblems import Outcome
from pointsman.devices import Assigned, Device, Packets, Route, Seen, Served, Surrounding
from pointsman.devicewatch import DevicesNow, DeviceWatch
from pointsman.hooks import DeviceLink
from pointsman.netlink import devices, neighbours
from pointsman.values import to_address

ETH0 = Device(2, "eth0")
POD = frozenset({7})


class Node:
    """Stands for the kernel, and follows its devices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        way_out = Route(2, gateway=to_address("192.0.2.254"))
        self.seen = Seen((ETH0,), (Assigned(2, to_address("192.0.2.1")),), (way_out,))
        self.serves: list[float] = []
        self.kept: list[set[int]] = []
        self.attached: list[DeviceLink] = []
        self.neighbours: list[tuple[int, bytes]] = []
        self.ours: set[tuple[int, bytes]] = set()
        self.noisy = False
        self.fault = ""
        self.monitors_fail = 0
        self.looks = 0
        self.told: list[DevicesNow] = []
        node = self

        class Links:
            def __init__(self, _root: Path) -> None: ...

            def keep_only(self, served: Iterable[Served]) -> list[str]:
                node.kept.append({one.device.index for one in served})
                return []

            def present(self) -> list[DeviceLink]:
                return node.attached

            def serve(self, _programs: Path, one: Served, *_: object) -> Outcome:
                node.serves.append(time.monotonic())
                return Outcome(one, tc="none" if node.fault else "tcx", tc_fault=node.fault)

        class Maps:
            def __init__(self, _directory: Path) -> None: ...
            def configure(self, _packets: Packets) -> None: ...
            def keep_only(self, _served: Iterable[Served]) -> None: ...
            def add(self, _one: Served) -> None: ...
            def close(self) -> None: ...

        class Monitor:
            """Noisy: something has changed before each look, then nothing for a moment."""

            def changed(self, seconds: float) -> bool:
                if seconds == devicewatch._QUIET:
                    return False
                time.sleep(min(seconds, 0.005))
                return node.noisy

            def close(self) -> None: ...

        def monitor() -> Monitor:
            if node.monitors_fail:
                node.monitors_fail -= 1
                raise OSError(errno.ENOMEM, "no memory")
            return Monitor()

        def seen() -> Seen:
            node.looks += 1
            return node.seen

        def neighbour(hop: tuple[int, bytes]) -> None:
            node.neighbours.append(hop)
            raise OSError(errno.ENOENT, "no such entry")

        for place, name, value in (
            (devicewatch, "DeviceLinks", Links),
            (devicewatch, "DeviceMaps", Maps),
            (devicewatch, "_PAUSE", 0.0),
            (devices, "monitor", monitor),
            (devices, "seen", seen),
            (neighbours, "next_hops", lambda _addresses: {}),
            (neighbours, "kept_neighbours", lambda: (node.ours, set())),
            (neighbours, "keep_neighbour", neighbour),
            (neighbours, "forget_neighbour", neighbour),
        ):
            monkeypatch.setattr(place, name, value)

    def follow(self, packets: Packets, around: Surrounding | None = None) -> None:
        self.watch = DeviceWatch(packets, Path("/nowhere"), self.told.append)
        if around:
            self.watch.want(packets, around)
        self.watch.begin(Path("/nowhere"), Path("/nowhere"))
        self._thread = threading.Thread(target=self.watch.run)
        self._thread.start()

    def close(self) -> None:
        self.watch.stop()
        self._thread.join()

    def messages(self) -> str:
        return " ".join(str(problem) for problem in self.told[-1].problems) if self.told else ""


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    found = Node(monkeypatch)
    yield found
    found.close()


def until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.002)


NAMED = Packets(("eth0",), xdp_mode="none")


@pytest.mark.parametrize("noisy", [False, True])
def test_what_failed_is_tried_again_also_where_something_changes_all_the_time(
    node: Node, monkeypatch: pytest.MonkeyPatch, noisy: bool
) -> None:
    monkeypatch.setattr(devicewatch, "_AGAIN", 0.1)
    monkeypatch.setattr(devicewatch, "_TICK", 0.01)
    node.noisy, node.fault = noisy, "no memory"
    node.follow(NAMED)
    until(lambda: len(node.serves) >= 4, "three more tries")
    pauses = [after - before for before, after in zip(node.serves, node.serves[1:], strict=False)]
    assert min(pauses) >= 0.1
    node.fault = ""
    until(lambda: node.told and not node.told[-1].problems, "served")
    tries = len(node.serves)
    time.sleep(0.25)
    assert len(node.serves) == tries


def test_what_is_attached_stays_until_the_pods_are_known(node: Node) -> None:
    node.follow(NAMED)
    until(lambda: node.told, "the first look")
    assert (len(node.serves), node.kept) == (1, [])
    node.seen = replace(node.seen, devices=(ETH0, Device(7, "veth7"), Device(8, "veth8")))
    node.watch.want(NAMED, Surrounding(pods=POD))
    until(lambda: node.kept, "the second")
    assert node.kept == [{2, 7}]


def test_a_monitor_that_can_not_be_had_is_asked_for_again(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    node.monitors_fail = 5
    node.follow(NAMED, Surrounding())
    until(lambda: node.serves and not node.messages(), "served")
    assert [len(now.problems) for now in node.told] == [1, 0]
    assert "devices are not followed" in str(node.told[0].problems[0])
    assert len([r for r in caplog.records if "could not be followed" in r.message]) == 1


def test_without_a_way_out_at_a_restart_that_is_told(node: Node) -> None:
    node.attached = [DeviceLink("tc_ingress-eth0", "tc_ingress", "eth0", 2, 1)]
    way_out, node.seen = node.seen, replace(node.seen, defaults=())
    node.follow(Packets(("auto",), xdp_mode="none"), Surrounding())
    until(lambda: node.told, "a word")
    (found,) = node.told[0].problems
    assert (found.severity, "no device has a default route" in str(found)) == ("warning", True)
    assert (node.serves, node.kept) == ([], [])
    node.seen, node.noisy = way_out, True
    until(lambda: node.serves and not node.messages(), "served")


def test_a_neighbour_that_can_not_be_changed_leaves_the_others_to_be(node: Node) -> None:
    node.ours = {(2, to_address(f"192.0.2.{n}")) for n in (2, 3)}
    node.follow(NAMED, Surrounding())
    until(lambda: node.told, "the first look")
    assert {*node.neighbours} == {*node.ours, (2, to_address("192.0.2.254"))}
    assert ETH0.index in {row["ifindex"] for row in node.told[-1].rows}
    assert node.told[-1].rows[0]["role"] == "node"
