"""Kubernetes Events: one for what stands, few for what repeats, none that hurts.

The API server is a stand-in that holds to the rules of kube-apiserver for Events.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pointsman.events import Problem
from pointsman.kube.api import ApiError
from pointsman.kube.recorder import RESULTS, Bucket, Recorder
from pointsman.objects import Ref
from pointsman.telemetry.kubeevents import body, cut, of_problem

WAIT = 60  # seconds, far beyond what anything here takes
WEB = Ref("Service", "default", "web")
NODE = Ref("Node", "", "a")
HOUR = 3600.0

SCTP = Problem(
    "SCTP is not balanced: this port is not served",
    "use TCP or UDP",
    object="Service default/web",
    field="spec.ports[0].protocol",
    severity="warning",
    reason="ProtocolNotServed",
)


class Events:
    """The Events of a cluster, as events.k8s.io/v1 has them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.stored: dict[str, dict[str, Any]] = {}
        self.posts = self.patches = 0
        self.refusals: list[ApiError | Exception] = []

    def _refuse(self) -> None:
        if self.refusals:
            raise self.refusals.pop(0)

    def post(self, path: str, value: object) -> bytes:
        with self.lock:
            self.posts += 1
            self._refuse()
            event: Any = value
            meta, regarding = event["metadata"], event["regarding"]
            assert path == f"/apis/events.k8s.io/v1/namespaces/{meta['namespace']}/events"
            assert meta["namespace"] == (regarding.get("namespace") or "default")
            assert re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", meta["name"])
            assert len(meta["name"]) <= 253
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", event["eventTime"])
            assert event["type"] in ("Normal", "Warning")
            assert event["reason"]
            assert event["action"]
            assert len(event["note"].encode()) <= 1024
            assert event["reportingController"] == "pointsman"
            assert 0 < len(event["reportingInstance"]) <= 128
            if (key := f"{path}/{meta['name']}") in self.stored:
                raise ApiError(409, "AlreadyExists", "exists")
            self.stored[key] = event
            return b"{}"

    def patch(self, path: str, value: object) -> bytes:
        with self.lock:
            self.patches += 1
            self._refuse()
            patch: Any = value
            assert patch.keys() == {"series"}  # everything else is immutable
            assert patch["series"]["count"] >= 2
            if path not in self.stored:
                raise ApiError(404, "NotFound", "gone")
            self.stored[path] |= patch
            return b"{}"

    @property
    def all(self) -> list[dict[str, Any]]:
        return list(self.stored.values())


class Agent:
    """A recorder, and what became of its Events."""

    def __init__(self, events: Events, node: str, now: float, **options: Any) -> None:
        self.now = now
        self.counted: Counter[str] = Counter()
        self._condition = threading.Condition()
        self.recorder = Recorder(
            events.post,
            events.patch,
            node_name=node,
            uid_of=lambda ref: {WEB: "uid-web", NODE: "uid-a"}.get(ref, ""),
            count=self._count,
            clock=lambda: self.now,
            **options,
        )

    def _count(self, result: str) -> None:
        assert result in RESULTS
        with self._condition:
            self.counted[result] += 1
            self._condition.notify_all()

    def until(self, predicate: Callable[[Counter[str]], bool]) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: predicate(self.counted), WAIT), self.counted

    def problems(self, *found: Problem) -> None:
        """And waits until all that is new is done with."""
        before, known = self.counted.total(), self.recorder._standing.keys()
        new = len(set(found) - known)
        self.recorder.problems(found)
        self.until(lambda counted: counted.total() >= before + new)


@contextmanager
def running(events: Events, node: str = "a", now: float = 1e9, **options: Any) -> Iterator[Agent]:
    agent = Agent(events, node, now, **options)
    agent.recorder.start()
    try:
        yield agent
    finally:
        agent.recorder.stop()


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def agent(events: Events) -> Iterator[Agent]:
    with running(events) as found:
        yield found


def test_a_problem_becomes_an_event_of_its_object(events: Events, agent: Agent) -> None:
    agent.problems(SCTP)
    (event,) = events.all
    assert event["regarding"] == {
        "apiVersion": "v1",
        "kind": "Service",
        "namespace": "default",
        "name": "web",
        "uid": "uid-web",
    }
    assert (event["type"], event["reason"]) == ("Warning", "ProtocolNotServed")
    assert event["note"] == (
        "spec.ports[0].protocol: SCTP is not balanced: this port is not served; use TCP or UDP"
    )
    assert event["reportingInstance"] == "a"


@pytest.mark.parametrize(
    ("problem", "note"),
    [
        pytest.param(
            Problem("gone", "mend it", object="Service default/other"),
            "Service default/other: gone; mend it",
            id="unknown-object",
        ),
        pytest.param(Problem("full", "mend it"), "full; mend it", id="no-object"),
        pytest.param(
            Problem("odd", "mend it", object="Widget a/b"), "Widget a/b: odd; mend it", id="kind"
        ),
        pytest.param(Problem("x", "y", object="Node a"), "Node a: x; y", id="the-node-itself"),
    ],
)
def test_what_has_no_object_is_told_at_the_node(
    events: Events, agent: Agent, problem: Problem, note: str
) -> None:
    agent.problems(problem)
    (event,) = events.all
    assert event["regarding"]["kind"] == "Node"
    assert event["regarding"]["name"] == "a"
    assert event["metadata"]["namespace"] == "default"
    assert (event["reason"], event["note"]) == ("NotInForce", note)


def test_a_problem_that_stands_has_one_event(events: Events, agent: Agent) -> None:
    for _ in range(5):
        agent.problems(SCTP)
    assert (events.posts, events.patches) == (1, 0)


def test_one_that_comes_back_within_an_hour_counts_up(events: Events, agent: Agent) -> None:
    for _ in range(3):
        agent.problems(SCTP)
        agent.problems()
        agent.now += 60
    (event,) = events.all
    assert event["series"]["count"] == 3
    assert events.posts == 1
    assert agent.counted == {"written": 1, "again": 2}


def test_one_that_comes_back_later_is_new(events: Events, agent: Agent) -> None:
    agent.problems(SCTP)
    agent.problems()
    agent.now += HOUR + 1
    events.stored.clear()  # as the API server does
    agent.problems(SCTP)
    assert (events.posts, events.patches) == (2, 0)


def test_one_whose_event_somebody_deleted_is_written_anew(events: Events, agent: Agent) -> None:
    agent.problems(SCTP)
    agent.problems()
    events.stored.clear()
    agent.problems(SCTP)
    assert len(events.all) == 1
    assert agent.counted == {"written": 2}


def test_two_agents_write_one_event_of_a_service(events: Events, agent: Agent) -> None:
    with running(events, "b") as other:
        agent.problems(SCTP)
        for _ in range(2):
            other.problems(SCTP)
            other.problems()
        assert other.counted == {"known": 2}
    assert len(events.all) == 1
    assert events.patches == 0


def test_what_concerns_one_node_is_told_by_each(events: Events, agent: Agent) -> None:
    full = Problem("no room", "make room", object="Service default/web", reason="MapFull")
    with running(events, "b") as other:
        agent.problems(full)
        other.problems(full)
    assert sorted(event["note"] for event in events.all) == [
        "node a: no room; make room",
        "node b: no room; make room",
    ]


def test_what_is_said_is_new_each_time(events: Events, agent: Agent) -> None:
    for _ in range(2):
        agent.recorder.say(NODE, "Normal", "Starting", "pointsman 1.0")
        agent.now += 1
    agent.until(lambda counted: counted["written"] == 2)
    for event in events.all:
        assert (event["type"], event["reason"]) == ("Normal", "Starting")
        assert event["regarding"]["uid"] == "uid-a"


def test_what_all_nodes_say_is_one_event(events: Events, agent: Agent) -> None:
    with running(events, "b") as other:
        for each, result in ((agent, "written"), (other, "known"), (agent, "again")):
            before = each.counted[result]
            each.recorder.normal(WEB, "DrainBegins", "connections are ended, 5/s on each node")
            each.until(lambda counted, b=before, r=result: counted[r] == b + 1)
        agent.recorder.normal(Ref("Service", "default", "gone"), "DrainEnds", "it was stopped")
    (event,) = events.all
    assert (event["type"], event["reason"]) == ("Normal", "DrainBegins")
    assert event["regarding"]["uid"] == "uid-web"


def test_a_refusal_is_logged_once_and_hurts_nobody(
    events: Events, agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    events.refusals = [ApiError(403, "Forbidden", "events is forbidden") for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        agent.problems(SCTP)
        agent.problems()
        agent.problems(SCTP)
    assert agent.counted == {"failed": 2}
    assert len([r for r in caplog.records if "forbidden" in r.getMessage()]) == 1


def test_an_error_that_nobody_thought_of_ends_one_event_only(events: Events, agent: Agent) -> None:
    events.refusals = [RuntimeError("odd")]
    agent.problems(SCTP)
    agent.problems(SCTP, Problem("x", "y"))
    assert agent.counted == {"failed": 1, "written": 1}


def test_while_the_api_server_is_away_events_wait(
    events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pointsman.kube.recorder._PAUSE", 0.001)
    with running(events) as agent:
        events.refusals = [ApiError(0, "", "refused") for _ in range(20)]
        agent.problems(SCTP)
    assert events.posts == 21
    assert len(events.all) == 1


def test_a_server_that_keeps_failing_is_given_up(
    events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pointsman.kube.recorder._PAUSE", 0.001)
    with running(events) as agent:
        events.refusals = [ApiError(500, "InternalError", "poison") for _ in range(5)]
        agent.problems(SCTP)
        assert agent.counted == {"failed": 1}


def test_what_was_mended_while_it_waited_is_not_told(events: Events) -> None:
    agent = Agent(events, "a", 1e9)
    agent.recorder.problems([SCTP])
    agent.recorder.problems([])
    agent.recorder.start()
    agent.recorder.say(NODE, "Normal", "Starting", "")
    agent.until(lambda counted: counted["written"] == 1)
    agent.recorder.stop()
    assert [event["reason"] for event in events.all] == ["Starting"]


def many(number: int, object_: str = "") -> list[Problem]:
    return [Problem(f"wrong {i:04}", "mend it", object=object_) for i in range(number)]


def test_too_many_wait_for_their_turn_and_the_rest_is_dropped(events: Events) -> None:
    agent = Agent(events, "a", 1e9, burst=10)
    agent.recorder.problems(many(300))
    assert agent.counted == {"dropped": 300 - 256}
    agent.recorder.start()
    agent.until(lambda counted: counted["written"] == 10)
    agent.recorder.stop()
    assert events.posts == 10


def test_one_object_can_t_take_all_the_room(events: Events) -> None:
    with running(events, burst=1000) as agent:
        agent.problems(*many(40, "Service default/web"))
        assert agent.counted == {"written": 25, "dropped": 15}
        agent.problems(*many(40, "Service default/web"), Problem("x", "y"))
        assert agent.counted["written"] == 26


def test_errors_go_before_warnings(events: Events) -> None:
    agent = Agent(events, "a", 1e9, burst=1)
    agent.recorder.problems([SCTP, Problem("x", "y")])
    agent.recorder.start()
    agent.until(lambda counted: counted["written"] == 1)
    agent.recorder.stop()
    assert [event["reason"] for event in events.all] == ["NotInForce"]


def test_a_bucket_fills_up_again_but_not_beyond() -> None:
    bucket = Bucket(2, 0.5, 0.0)
    assert [bucket.wait(0.0) for _ in range(3)] == [0, 0, 2.0]
    assert [bucket.wait(2.0), bucket.wait(2.0)] == [0, 2.0]
    assert [bucket.wait(1000.0) for _ in range(3)] == [0, 0, 2.0]
    assert bucket.wait(500.0) > 0  # a clock that was set back gives nothing away


def test_stop_does_not_wait_for_tokens(events: Events) -> None:
    before = {*threading.enumerate()}
    with running(events, burst=1, rate=0.001) as agent:
        agent.recorder.problems(many(5))
        agent.until(lambda counted: counted["written"] == 1)
    assert {*threading.enumerate()} <= before


def test_a_long_note_is_cut_between_characters() -> None:
    assert cut("é" * 512) == "é" * 512
    short = cut("é" * 513)
    assert len(short.encode()) <= 1024
    assert short.endswith("é…")


def test_the_longest_names_are_valid() -> None:
    name = ".".join(["a" * 63] * 3 + ["b" * 61])
    said = of_problem(SCTP, Ref("Service", "default", name), "uid", "n" * 253)
    Events().post("/apis/events.k8s.io/v1/namespaces/default/events", body(said, 1e9, "n" * 253))
