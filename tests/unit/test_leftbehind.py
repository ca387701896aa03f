"""What the agent asks of the reaper, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pointsman.leftbehind import LeftBehind
from pointsman.objects import Ref
from pointsman.reaper import Found
from pointsman.stale import Flow
from pointsman.tracker import Tracker
from pointsman.values import Backend, Frontend, to_address

SERVICE, ELSEWHERE = (to_address("10.96.0.10"), 53), (to_address("203.0.113.9"), 53)
ONE, GONE = (to_address("10.244.0.1"), 53), (to_address("10.244.0.2"), 53)


class Members:
    """One Service with one endpoint."""

    def present(self, frontend: Frontend) -> frozenset[Backend] | None:
        return frozenset({ONE}) if frontend.address == SERVICE[0] else None

    serving = present

    def exists(self, address: bytes) -> bool:
        return address == ONE[0]


class Asked:
    def __init__(self) -> None:
        self.looks: list[bool] = []
        self.deleted: list[Flow] = []

    def look(self, *, flows: bool = False) -> None:
        self.looks.append(flows)

    def destroy(self, records: Any, flows: Any = ()) -> None:
        self.deleted += flows


def flow(vip: Backend, peer: Backend) -> Flow:
    return Flow((to_address("10.244.0.9"), 40000), vip, peer)


@pytest.mark.parametrize(
    ("flows", "again", "deleted"),
    [
        pytest.param([flow(SERVICE, ONE)], True, 0, id="a-proxy-before-translates-still"),
        pytest.param([flow(SERVICE, GONE), flow(ELSEWHERE, GONE)], True, 1, id="one-is-stale"),
        pytest.param([flow(ELSEWHERE, ELSEWHERE)], False, 0, id="none-is-a-services"),
        pytest.param([], True, 0, id="not-asked-for"),
    ],
)
def test_conntrack_is_read_as_long_as_it_has_flows_to_services(
    flows: list[Flow], again: bool, deleted: int
) -> None:
    asked = Asked()
    left = LeftBehind(Path("/nowhere"), lambda: None, lambda _: None, tcp=False)
    left._reaper = asked  # type: ignore[assignment]
    left.judge(Found([], flows), Members())  # type: ignore[arg-type]
    left.look_after({Ref("Service", "default", "dns")}, Tracker())
    assert asked.looks == [again]
    assert len(asked.deleted) == deleted
    left.look()
    assert asked.looks[-1], "a start looks at everything"
