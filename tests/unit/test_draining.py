"""What is told of draining: log, Events, status."""

from __future__ import annotations

import logging

import pytest

from pointsman.draining import Draining, rate_text
from pointsman.health import drain_text
from pointsman.objects import Ref
from pointsman.rebalance import Progress
from pointsman.rebalancer import Drained

WEB = Ref("Service", "default", "web")


class Told:
    def __init__(self) -> None:
        self.said: list[tuple[Ref, str, str]] = []
        self.draining = Draining(lambda *said: self.said.append(said))

    def take(self, progress: Progress | None = None, *, closed: int = 0, problem: str = "") -> None:
        self.draining.take(Drained({WEB: progress} if progress else {}, closed, problem))


def test_begin_and_end_are_said_and_nothing_between(caplog: pytest.LogCaptureFixture) -> None:
    told = Told()
    with caplog.at_level(logging.INFO):
        told.take(Progress(1, 3, 0.5), closed=1)
        told.take(Progress(2, 2, 0.5), closed=1)
        told.take(Progress(4, 0, 0.5, over="done"), closed=2)
        told.take()
    assert [(ref, reason) for ref, reason, _ in told.said] == [
        (WEB, "DrainBegins"),
        (WEB, "DrainEnds"),
    ]
    assert "30/m on each node" in told.said[0][2]
    assert [record.getMessage() for record in caplog.records] == [
        "Service default/web: 4 connections to end",
        "Service default/web: connections ended=4, done",
    ]
    assert told.draining.status() == {"closed": 4, "left": 0, "services": {}, "problem": ""}


@pytest.mark.parametrize(
    ("over", "words"), [("stopped", "stopped, left=7"), ("failed", "failed, left=7")]
)
def test_what_is_left_is_said(over: str, words: str, caplog: pytest.LogCaptureFixture) -> None:
    told = Told()
    with caplog.at_level(logging.INFO):
        told.take(Progress(2, 7, 5.0, over=over), closed=2)
    assert caplog.messages[-1] == f"Service default/web: connections ended=2, {words}"
    assert len(told.said) == 2


def test_what_is_under_way_is_in_the_status() -> None:
    told = Told()
    told.take(Progress(2, 7, 5.0, waits="slow start"), closed=2)
    told.take(Progress(4, 5, 5.0), closed=2)
    status = told.draining.status()
    assert (status["closed"], status["left"]) == (4, 5)
    assert drain_text(status["services"]["Service default/web"]) == "4 ended, 5 left, at 5/s"


def test_a_problem_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    told = Told()
    told.take(problem="connections are not drained: no")
    told.take(problem="connections are not drained: no")
    assert caplog.messages == ["connections are not drained: no"]
    assert told.draining.status()["problem"] == "connections are not drained: no"


@pytest.mark.parametrize(("rate", "text"), [(5.0, "5/s"), (20 / 60, "20/m"), (0.5, "30/m")])
def test_a_rate_is_written_as_the_annotation_has_it(rate: float, text: str) -> None:
    assert rate_text(rate) == text
