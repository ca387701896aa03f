"""Healthy, eligible, ready: kube-proxy's answers, by hand on a clock of the test's."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest

from pointsman.objects import ClusterMeta, Node, NodeSpec, Taint
from pointsman.telemetry import Telemetry
from pointsman.telemetry.health import (
    TO_BE_DELETED,
    Moment,
    ProxyHealth,
    Readiness,
    is_eligible,
    rfc3339_nano,
)

START = 1_700_000_000.0
TIMEOUT = 60.0


def at(seconds: float) -> Moment:
    return Moment(seconds, START + seconds)


def shown(seconds: float) -> str:
    return rfc3339_nano(START + seconds)


@pytest.mark.parametrize(
    ("epoch", "text"),
    [
        pytest.param(0.0, "1970-01-01T00:00:00Z", id="no-fraction"),
        pytest.param(1.5, "1970-01-01T00:00:01.5Z", id="no-trailing-zeros"),
        pytest.param(10.0, "1970-01-01T00:00:10Z", id="zeros-of-the-seconds-stay"),
        pytest.param(0.000001, "1970-01-01T00:00:00.000001Z", id="microseconds"),
        pytest.param(0.9999999, "1970-01-01T00:00:01Z", id="rounded-up"),
    ],
)
def test_times_are_written_as_go_does(epoch: float, text: str) -> None:
    assert rfc3339_nano(epoch) == text


@pytest.mark.parametrize(
    ("history", "now", "healthy"),
    [
        pytest.param([], 1000, True, id="idle"),
        pytest.param([("queued", 0)], 59.9, True, id="not-late-yet"),
        pytest.param([("queued", 0)], 60, False, id="late"),
        pytest.param([("queued", 0), ("queued", 50)], 70, False, id="the-oldest-counts"),
        pytest.param([("queued", 0), ("synced", 40)], 1000, True, id="in-force"),
        pytest.param(
            [("queued", 0), ("synced", 40), ("queued", 50)], 100, True, id="the-next-one-is-young"
        ),
        pytest.param([("queued", 0), ("synced", 90)], 91, True, id="late-but-in-force"),
    ],
)
def test_healthy_while_nothing_waits_too_long(
    history: list[tuple[str, float]], now: float, healthy: bool
) -> None:
    health = ProxyHealth(TIMEOUT)
    health.synced(at(0))
    for what, when in history:
        getattr(health, what)(at(when))
    for livez in (False, True):
        code, body = health.answer(at(now), livez=livez)
        assert (code, body["healthy"]) == ((200, True) if healthy else (503, False))


def test_the_body_of_a_healthy_proxy_says_that_it_was_updated_just_now() -> None:
    health = ProxyHealth(TIMEOUT)
    health.synced(at(3))
    family = {"lastUpdated": shown(3), "healthy": True}
    code, body = health.answer(at(500.25))
    assert code == 200
    assert list(body.items()) == [  # in the order of kube-proxy's fields
        ("lastUpdated", shown(500.25)),
        ("currentTime", shown(500.25)),
        ("nodeEligible", True),
        ("healthy", True),
        ("status", {"IPv4": family, "IPv6": family}),
    ]


def test_the_body_of_an_unhealthy_proxy_says_when_it_was_updated_last() -> None:
    health = ProxyHealth(TIMEOUT, families=["IPv4"])
    health.synced(at(3))
    health.queued(at(10))
    code, body = health.answer(at(100))
    assert code == 503
    assert body["lastUpdated"] == shown(3)
    assert body["currentTime"] == shown(100)
    assert body["status"] == {"IPv4": {"lastUpdated": shown(3), "healthy": False}}


def test_a_node_that_is_not_eligible_fails_healthz_alone_and_not_the_proxy() -> None:
    health = ProxyHealth(TIMEOUT)
    health.synced(at(3))
    health.node(False)
    code, body = health.answer(at(10))
    assert (code, body["nodeEligible"], body["healthy"]) == (503, False, True)
    assert body["lastUpdated"] == shown(3)
    code, body = health.answer(at(10), livez=True)
    assert code == 200
    assert "nodeEligible" not in body


def test_until_clients_outside_are_served_no_load_balancer_sends_them() -> None:
    health = ProxyHealth(TIMEOUT)
    health.loading(True)
    assert (health.answer(at(10))[0], health.serves(at(10))) == (503, False)
    assert health.answer(at(10), livez=True)[0] == 200
    health.loading(False)
    assert (health.answer(at(10))[0], health.serves(at(10))) == (200, True)


def test_before_the_first_sync_there_is_no_status() -> None:
    code, body = ProxyHealth(TIMEOUT).answer(at(1))
    assert code == 200
    assert "status" not in body


def a_node(deleted: bool = False, taints: tuple[str, ...] = ()) -> Node:
    deletion = datetime.fromtimestamp(START, UTC) if deleted else None
    return Node(
        metadata=ClusterMeta(name="a", deletion_timestamp=deletion),
        spec=NodeSpec(taints=tuple(Taint(key=key) for key in taints)),
    )


CORDONED = "node.kubernetes.io/unschedulable"


@pytest.mark.parametrize(
    ("node", "eligible"),
    [
        pytest.param(a_node(), True, id="plain"),
        pytest.param(a_node(taints=(CORDONED,)), True, id="cordoned"),
        pytest.param(a_node(taints=(CORDONED, TO_BE_DELETED)), False, id="to-be-deleted"),
        pytest.param(a_node(deleted=True), False, id="being-deleted"),
        pytest.param(
            Node(metadata=ClusterMeta(name="a"), spec=NodeSpec(taints=None)), True, id="null"
        ),
    ],
)
def test_which_nodes_are_eligible(node: Node, eligible: bool) -> None:
    assert is_eligible(node) is eligible


def test_a_node_that_was_never_seen_is_eligible_and_one_that_is_gone_is_not() -> None:
    telemetry = Telemetry()
    for node, code in ((None, 200), (a_node(), 200), (None, 503), (a_node(), 200)):
        telemetry.node(node)
        assert telemetry.healthz()[0] == code
        assert telemetry.livez()[0] == 200
    assert telemetry.numbers().healthz == {"200": 3, "503": 1}
    assert telemetry.numbers().livez == {"200": 4}


def test_what_calls_for_no_sync_makes_nothing_late() -> None:
    telemetry = Telemetry(health_timeout=0)
    telemetry.queued(1, 2)
    assert not telemetry.proxy_healthy()
    telemetry.settled()
    assert telemetry.proxy_healthy()
    numbers = telemetry.numbers()
    assert (numbers.services_pending, numbers.endpoints_pending) == (0, 0)
    assert (numbers.services_total, numbers.endpoints_total) == (1, 2)
    assert numbers.last_sync >= numbers.last_queued


def test_a_failed_sync_leaves_what_was_queued_waiting() -> None:
    telemetry = Telemetry(health_timeout=0)
    telemetry.queued(0, 0)
    telemetry.synced(False, 0.1)  # of what came before it
    telemetry.failed()
    assert telemetry.livez()[0] == 503
    telemetry.synced(True, 0.1)
    assert telemetry.livez()[0] == 200


def test_ready_needs_the_lists_the_maps_and_the_programs() -> None:
    telemetry = Telemetry()
    for step, missing in (
        (lambda: None, ["lists", "maps", "programs"]),
        (telemetry.listed, ["maps", "programs"]),
        (lambda: telemetry.synced(False, 0.1), ["maps", "programs"]),
        (lambda: telemetry.synced(True, 0.1), ["programs"]),
    ):
        step()
        code, text = telemetry.readyz()
        assert code == 503
        assert re.findall(r"^\[-\](\w+) failed: ", text, re.MULTILINE) == missing
    telemetry.attached()
    assert telemetry.readyz() == (200, "ok")
    telemetry.failed()
    assert telemetry.readyz() == (200, "ok")


def test_verbose_readiness_names_every_check() -> None:
    text = Readiness(True, True, True).answer(verbose=True)[1]
    assert text == "[+]lists ok\n[+]maps ok\n[+]programs ok\nreadyz check passed\n"
