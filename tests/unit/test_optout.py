"""Whose sockets are left alone."""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping

import pytest

from pointsman import netns
from pointsman.context import Context
from pointsman.netns import Inside
from pointsman.objects import ClusterMeta, Namespace, ObjectMeta, Pod, PodIP, PodSpec, PodStatus
from pointsman.optout import ANNOTATION, opted_out
from pointsman.optouts import OptOuts
from pointsman.values import Address, to_address, to_text

HERE = Context(node_name="a")


def annotated(value: str | None) -> dict[str, str]:
    return {} if value is None else {ANNOTATION: value}


def a_pod(value: str | None, node: str = "a", phase: str = "", host: bool = False) -> Pod:
    return Pod(
        metadata=ObjectMeta(name="web", annotations=annotated(value)),
        spec=PodSpec(node_name=node, host_network=host),
        status=PodStatus(
            phase=phase,
            pod_ip="10.244.0.1",
            pod_ips=(PodIP(ip="10.244.0.1"), PodIP(ip="fd00:244::1")),
        ),
    )


def outcome(pod: Pod, namespace: str | None = None) -> tuple[bool, list[str]]:
    """Whether the pod is left out, and which objects have a Problem."""
    meta = ClusterMeta(name="default", annotations=annotated(namespace))
    known = Namespace(metadata=meta)
    addresses, problems = opted_out([pod], {known.ref: known}, HERE)
    assert not addresses or set(map(to_text, addresses)) == {"10.244.0.1", "fd00:244::1"}
    assert all(problem.severity == "warning" for problem in problems)
    return bool(addresses), [problem.object for problem in problems]


POD, NAMESPACE = "Pod default/web", "Namespace default"


@pytest.mark.parametrize(
    ("pod", "namespace", "out", "problems"),
    [
        pytest.param(a_pod(None), None, False, [], id="nothing-said"),
        pytest.param(a_pod("disabled"), None, True, [], id="the-pod-says-so"),
        pytest.param(a_pod(None), "disabled", True, [], id="its-namespace-says-so"),
        pytest.param(a_pod("enabled"), "disabled", False, [], id="the-pod-goes-first"),
        pytest.param(a_pod("disabled"), "enabled", True, [], id="either-way"),
        pytest.param(a_pod("off"), "disabled", False, [POD], id="unknown-counts-as-enabled"),
        pytest.param(a_pod(None), "Disabled", False, [NAMESPACE], id="unknown-in-the-namespace"),
        pytest.param(a_pod("disabled", host=True), None, False, [POD], id="on-the-host-s-network"),
        pytest.param(a_pod(None, host=True), "disabled", False, [], id="only-by-its-namespace"),
        pytest.param(a_pod("disabled", node="b"), None, False, [], id="on-another-node"),
        pytest.param(a_pod("disabled", node=""), None, True, [], id="on-no-node-in-particular"),
        pytest.param(a_pod("disabled", phase="Failed"), None, False, [], id="ended"),
    ],
)
def test_who_is_left_out(pod: Pod, namespace: str | None, out: bool, problems: list[str]) -> None:
    assert outcome(pod, namespace) == (out, problems)


def test_a_namespace_that_is_not_known_says_nothing() -> None:
    assert opted_out([a_pod(None)], {}, HERE) == (frozenset(), ())


def test_a_kernel_without_cookies_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[frozenset[Address]] = []

    def found_in(addresses: frozenset[Address]) -> Mapping[Address, netns.Inside]:
        asked.append(addresses)
        raise OSError(errno.ENOPROTOOPT, "network namespaces tell their cookies from 5.14 on")

    told: list[Mapping[Address, netns.Inside]] = []
    monkeypatch.setattr(netns, "found_in", found_in)
    searching = OptOuts(told.append)
    searching.want(frozenset({to_address("10.244.0.1")}))
    searching.run()  # comes back by itself
    assert len(asked) == 1
    assert told == [{}], "whoever waits for the first search would wait for ever"


def test_it_ends_when_told_so_during_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    found = OptOuts(lambda _: None)

    def search(_: frozenset[Address]) -> Mapping[Address, Inside]:
        found.stop()
        return {}

    monkeypatch.setattr(netns, "found_in", search)
    found.want(frozenset())  # of none: nothing would end its wait
    thread = threading.Thread(target=found.run, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
