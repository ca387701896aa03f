"""The Kubernetes source against a real server over sockets, with every fault: what it puts, folded,
comes to be what the server holds; and nothing is put before all lists are in."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointsman.events import Changed, Event, Listed, Problem, Problems, Reach
from pointsman.kube import remembered
from pointsman.kube.access import Access
from pointsman.kube.backoff import Backoff
from pointsman.kube.client import ApiServer
from pointsman.kube.source import ClusterSource
from pointsman.objects import Object, Ref, Service
from tests.support.fakeapi import PLURALS, FakeApi

FAULTS = (
    "401", "403", "410", "429:0", "500", "503", "cut", "half", "garbage", "error:410", "error:500"
)  # fmt: skip


def service(name: str, port: object = 80, **labels: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "default", "labels": labels},
        "spec": {"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"], "ports": [{"port": port}]},
    }


def slice_(name: str, of: str, address: str, port: int = 6443) -> dict[str, Any]:
    labels = {"kubernetes.io/service-name": of}
    return {
        "metadata": {"name": name, "namespace": "default", "labels": labels},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {}}],
        "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
    }


def pod(name: str, node: str) -> dict[str, Any]:
    meta = {"name": name, "namespace": "default"}
    return {"metadata": meta, "spec": {"nodeName": node, "containers": [{"name": "c"}]}}


class Folded:
    """What an agent would know from what was put."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.objects: dict[Ref, Object] = {}
        self.problems: tuple[Problem, ...] = ()
        self.reach: list[Reach] = []
        self.changed = threading.Condition()

    def put(self, event: Event) -> None:
        with self.changed:
            self.events.append(event)
            match event:
                case Listed(objects):
                    self.objects = {obj.ref: obj for obj in objects}
                case Changed(objects, deleted):
                    for ref in deleted:
                        self.objects.pop(ref, None)
                    self.objects.update((obj.ref, obj) for obj in objects)
                case Problems(problems):
                    self.problems = problems
                case Reach():
                    self.reach.append(event)
            self.changed.notify_all()

    @property
    def ports(self) -> dict[str, int]:
        found = [obj for obj in self.objects.values() if isinstance(obj, Service)]
        return {obj.metadata.name: obj.spec.ports[0].port for obj in found}

    def soon(self, condition: Callable[[], bool]) -> bool:
        with self.changed:
            return self.changed.wait_for(condition, 0.05)

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, seconds), (self.events[-3:], self.problems)


def quick() -> Backoff:
    return Backoff(first=0.005, longest=0.02)


@contextmanager
def running(
    api: FakeApi, directory: Path, *, access: Access | None = None, **more: Any
) -> Iterator[Folded]:
    source = ClusterSource(
        ApiServer(access or Access(server=api.url)),
        node_name="here",
        state_dir=directory,
        **{"backoff": quick, **more},
    )
    folded, stop = Folded(), threading.Event()
    thread = threading.Thread(target=source.run, args=(folded.put, stop))
    thread.start()
    try:
        yield folded
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with FakeApi() as api:
        api.put("services", service("web"))
        yield api


# -- listing ---------------------------------------------------------------------------------


def test_listed_is_put_once_and_only_when_every_list_is_in(api: FakeApi, tmp_path: Path) -> None:
    api.fault("nodes", "list", "stall")
    api.put("nodes", {"metadata": {"name": "here"}})
    with running(api, tmp_path) as seen:
        for plural in set(PLURALS) - {"nodes"}:
            assert api.wait_for(lambda p=plural: any(r[:2] == (p, "watch") for r in api.requests))
        api.put("services", service("late"))
        assert not seen.events
    assert not seen.events


def test_all_kinds_come_in_one_listed(api: FakeApi, tmp_path: Path) -> None:
    api.put("nodes", {"metadata": {"name": "here"}})
    api.put("pods", pod("mine", "here"))
    api.put("pods", pod("other", "there"))
    api.put("endpointslices", slice_("web-1", "web", "10.1.0.1"))
    api.put("namespaces", {"metadata": {"name": "default"}})
    api.put("servicecidrs", {"metadata": {"name": "k"}, "spec": {"cidrs": ["10.0.0.0/16"]}})
    with running(api, tmp_path) as seen:
        seen.until(lambda: bool(seen.objects))
    assert isinstance(seen.events[0], Listed)
    assert sorted(map(str, seen.objects)) == [
        "EndpointSlice default/web-1",
        "Namespace default",
        "Node here",
        "Pod default/mine",
        "Service default/web",
        "ServiceCIDR k",
    ]


def test_the_first_list_may_come_from_the_watch_cache(api: FakeApi, tmp_path: Path) -> None:
    with running(api, tmp_path) as seen:
        seen.until(lambda: bool(seen.objects))
    assert api.asked("services", "list") == [
        {
            "labelSelector": "!service.kubernetes.io/service-proxy-name,"
            "!service.kubernetes.io/headless",
            "fieldSelector": "spec.clusterIP!=None",
            "limit": "500",
            "resourceVersion": "0",
        }
    ]


def test_pages_are_put_together(api: FakeApi, tmp_path: Path) -> None:
    api.page_size = 3
    for number in range(10):
        api.put("services", service(f"s{number}"))
    with running(api, tmp_path) as seen:
        seen.until(lambda: len(seen.ports) == 11)
    assert len(api.asked("services", "continue")) == 3


def test_a_list_that_expires_amid_its_pages_is_started_over_whole(
    api: FakeApi, tmp_path: Path
) -> None:
    api.page_size = 1
    api.put("services", service("b"))
    api.fault("services", "continue", "410")
    with running(api, tmp_path) as seen:
        seen.until(lambda: bool(seen.ports))
        assert set(seen.ports) == {"b", "web"}
    assert "limit" not in api.asked("services", "list")[1]


def test_a_server_that_does_not_know_the_field_selector_is_asked_without(
    api: FakeApi, tmp_path: Path
) -> None:
    api.refuses_fields = True
    with running(api, tmp_path) as seen:
        seen.until(lambda: seen.ports == {"web": 80})
    assert not seen.problems


def test_a_server_without_service_cidrs_is_a_warning(api: FakeApi, tmp_path: Path) -> None:
    api.absent.add("servicecidrs")
    with running(api, tmp_path) as seen:
        seen.until(lambda: bool(seen.objects and seen.problems and seen.reach))
        assert [p.severity for p in seen.problems] == ["warning"]
        assert seen.reach[-1].error == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_first_list_that_fails_is_tried_again(api: FakeApi, tmp_path: Path, fault: str) -> None:
    api.fault("services", "list", fault, times=2)
    with running(api, tmp_path) as seen:
        seen.until(lambda: seen.ports == {"web": 80})
        seen.until(lambda: not seen.problems)


# -- watching --------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [*FAULTS, "error:429", "error:400"])
def test_a_watch_that_fails_is_caught_up_with(api: FakeApi, tmp_path: Path, fault: str) -> None:
    with running(api, tmp_path) as seen:
        seen.until(lambda: seen.ports == {"web": 80})
        api.fault("services", "watch", fault, times=4)
        api.end_watches()
        api.put("services", service("new"))
        api.delete("services", "default", "web")
        seen.until(lambda: seen.ports == {"new": 80})
        seen.until(lambda: not seen.problems)


def test_a_watch_that_ended_goes_on_from_the_last_version(api: FakeApi, tmp_path: Path) -> None:
    with running(api, tmp_path) as seen:
        seen.until(lambda: seen.ports == {"web": 80})
        api.put("services", service("new"))
        seen.until(lambda: "new" in seen.ports)
        api.end_watches()
        assert api.wait_for(
            lambda: len([r for r in api.requests if r[:2] == ("services", "watch")]) == 2
        )
    assert api.asked("services", "watch")[1]["resourceVersion"] == "102"
    assert len(api.asked("services", "list")) == 1


def test_a_bookmark_only_moves_the_version(api: FakeApi, tmp_path: Path) -> None:
    with running(api, tmp_path) as seen:
        seen.until(lambda: bool(seen.reach))
        count = len(seen.events)
        api.bookmark()
        api.end_watches()
        assert api.wait_for(
            lambda: any(r[1] == "watch" and r[2]["resourceVersion"] == "102" for r in api.requests)
        )
        assert len(seen.events) == count


def test_what_was_missed_while_away_comes_as_one_change(api: FakeApi, tmp_path: Path) -> None:
    api.put("services", service("same"))
    with running(api, tmp_path) as seen:
        seen.until(lambda: len(seen.ports) == 2)
        for verb in ("watch", "list"):  # nothing comes before all has happened
            api.fault("services", verb, "503", times=10_000)
        api.end_watches()
        api.delete("services", "default", "web")
        api.put("services", service("new"))
        api.compact()
        api.clear_faults()
        seen.until(lambda: seen.ports == {"same": 80, "new": 80})
    (change,) = (event for event in seen.events if isinstance(event, Changed))
    assert [str(obj.ref) for obj in change.objects] == ["Service default/new"]
    assert [str(ref) for ref in change.deleted] == ["Service default/web"]
    assert "resourceVersion" not in api.asked("services", "list")[-1]


@pytest.mark.parametrize("proxy_name, label", [("", "other"), ("mine", "mine")])
def test_the_label_of_another_proxy_is_obeyed_at_once(
    api: FakeApi, tmp_path: Path, proxy_name: str, label: str
) -> None:
    labelled = service("web", **{"service.kubernetes.io/service-proxy-name": label})
    plain, ours = (labelled, service("web")) if proxy_name else (service("web"), labelled)
    api.put("services", plain)
    api.put("endpointslices", slice_("web-1", "web", "10.1.0.1"))
    with running(api, tmp_path, proxy_name=proxy_name) as seen:
        seen.until(lambda: seen.ports == {"web": 80})
        api.put("services", ours)
        seen.until(lambda: not seen.ports)
        assert Ref("EndpointSlice", "default", "web-1") in seen.objects
        api.put("services", plain)
        seen.until(lambda: seen.ports == {"web": 80})


def test_who_could_not_reach_the_server_tries_again_once_another_does(
    api: FakeApi, tmp_path: Path
) -> None:
    with running(api, tmp_path, backoff=lambda: Backoff(first=1000, uniform=max)) as seen:
        seen.until(lambda: bool(seen.reach))
        api.put("services", service("before"))
        seen.until(lambda: "before" in seen.ports)
        api.fault("services", "watch", "dead")
        for number in range(100):
            node = f"n{number}"
            api.put("nodes", {"metadata": {"name": node}})
            seen.until(lambda n=node: Ref("Node", "", n) in seen.objects)
            api.end_watches()  # the watch of nodes reaches the server again, that of services not
            api.put("services", service("new"))
            if seen.soon(lambda: "new" in seen.ports):
                break
        seen.until(lambda: "new" in seen.ports)


def test_a_version_that_is_too_old_is_not_waited_for_as_a_server_that_is_away(
    api: FakeApi, tmp_path: Path
) -> None:
    windows: list[list[float]] = []  # of each resource

    def backoff() -> Backoff:
        mine: list[float] = []
        windows.append(mine)
        return Backoff(uniform=lambda low, high: mine.append(high) or 0.0)

    with running(api, tmp_path, backoff=backoff) as seen:
        seen.until(lambda: bool(seen.reach))
        for fault in ("503", "503", "410"):
            api.fault("services", "watch", fault)
        api.end_watches()
        assert api.wait_for(lambda: [r[:2] for r in api.requests].count(("services", "list")) == 2)
    assert any(mine[-1:] == [0.8] and max(mine) > 0.8 for mine in windows)


# -- bad objects -----------------------------------------------------------------------------


def test_a_bad_object_keeps_its_last_good_version_until_it_is_mended(
    api: FakeApi, tmp_path: Path
) -> None:
    with running(api, tmp_path) as seen:
        seen.until(lambda: seen.ports == {"web": 80})
        api.put("services", service("web", port="eighty"))
        api.put("services", service("other"))
        seen.until(lambda: bool(seen.problems) and "other" in seen.ports)
        (problem,) = seen.problems
        assert problem.object == "Service default/web" and problem.field == "spec.ports[0].port"
        assert problem.where == "/api/v1/namespaces/default/services/web"
        assert seen.ports == {"web": 80, "other": 80}
        api.compact()  # a list tells no more than the watch
        api.fault("services", "watch", "410")
        api.end_watches()
        api.put("services", service("third"))
        seen.until(lambda: "third" in seen.ports)
        assert seen.ports["web"] == 80 and seen.problems
        api.put("services", service("web", port=81))
        seen.until(lambda: seen.ports["web"] == 81 and not seen.problems)


def test_a_bad_object_among_the_first_is_named_and_gone_when_deleted(
    api: FakeApi, tmp_path: Path
) -> None:
    api.put("services", service("bad", port=[]))
    with running(api, tmp_path) as seen:
        seen.until(lambda: seen.ports == {"web": 80} and bool(seen.problems))
        api.delete("services", "default", "bad")
        seen.until(lambda: not seen.problems)


# -- telling ---------------------------------------------------------------------------------


def test_a_missing_permission_is_named_as_rbac_wants_it(api: FakeApi, tmp_path: Path) -> None:
    api.fault("endpointslices", "list", "403", times=1000)
    with running(api, tmp_path) as seen:
        seen.until(lambda: bool(seen.problems))
        assert "verb list on resource endpointslices" in seen.problems[0].mend
        assert '"discovery.k8s.io"' in seen.problems[0].mend
        api.clear_faults()
        seen.until(lambda: not seen.problems and bool(seen.objects))


def test_a_server_that_comes_back_and_refuses_at_first_is_not_waited_for_as_one_that_is_away(
    api: FakeApi, tmp_path: Path
) -> None:
    """Until it has read its roles it refuses everybody: that is an answer, after which the backoff
    starts anew."""
    windows: list[list[float]] = []

    def backoff() -> Backoff:
        mine: list[float] = []
        windows.append(mine)
        return Backoff(uniform=lambda _, high: mine.append(high) or 0.0)

    with running(api, tmp_path, backoff=backoff) as seen:
        seen.until(lambda: bool(seen.reach))
        for fault in (*("dead",) * 6, "403"):
            api.fault("services", "watch", fault)
        api.end_watches()
        asked = ("services", "watch")
        assert api.wait_for(lambda: [each[:2] for each in api.requests].count(asked) >= 8)
        api.put("services", service("new"))
        seen.until(lambda: "new" in seen.ports)
    assert any(mine[-1:] == [0.8] and max(mine) > 0.8 for mine in windows)


def test_without_the_right_to_see_pods_services_are_served(api: FakeApi, tmp_path: Path) -> None:
    """kube-proxy's account may see neither Pods nor Namespaces."""
    for resource in ("pods", "namespaces"):
        api.fault(resource, "list", "403", times=1000)
    with running(api, tmp_path, grace=0.0) as seen:
        seen.until(lambda: bool(seen.objects) and len(seen.problems) == 2)
        assert {problem.reason for problem in seen.problems} == {"Forbidden"}
        seen.until(lambda: bool(seen.reach))
        assert seen.reach[-1].error == ""
        api.clear_faults()
        seen.until(lambda: not seen.problems)


def test_what_may_no_longer_be_seen_stays(api: FakeApi, tmp_path: Path) -> None:
    api.put("namespaces", {"kind": "Namespace", "metadata": {"name": "mesh"}})
    with running(api, tmp_path, grace=0.0) as seen:
        seen.until(lambda: any(ref.kind == "Namespace" for ref in seen.objects))
        asked = ("namespaces", "watch")
        assert api.wait_for(lambda: asked in [each[:2] for each in api.requests])
        api.fault("namespaces", "list", "403", times=1000)
        api.fault("namespaces", "watch", "410")
        api.end_watches()
        seen.until(lambda: bool(seen.problems))
        assert any(ref.kind == "Namespace" for ref in seen.objects)


def test_reach_tells_when_a_watch_is_down_and_when_all_are_up_again(
    api: FakeApi, tmp_path: Path
) -> None:
    with running(api, tmp_path, grace=0.0) as seen:
        seen.until(lambda: bool(seen.reach))
        assert seen.reach[0].server == api.url and seen.reach[0].error == ""
        api.fault("nodes", "watch", "503", times=10_000)
        api.end_watches()
        seen.until(lambda: seen.reach[-1].error == "watch nodes: fake ")
        api.clear_faults()
        seen.until(lambda: seen.reach[-1].error == "")


def test_the_way_to_the_api_server_is_kept_for_the_next_start(api: FakeApi, tmp_path: Path) -> None:
    api.put("services", service("kubernetes"))
    api.put("endpointslices", slice_("kubernetes", "kubernetes", "10.9.0.1"))
    expected = remembered.Remembered(("10.0.0.1",), ("https://10.9.0.1:6443",))
    with running(api, tmp_path) as seen:
        seen.until(lambda: len(seen.objects) == 3)
        assert remembered.load(tmp_path) == expected
        empty = slice_("kubernetes", "kubernetes", "10.9.0.1") | {"endpoints": None}
        api.put("endpointslices", empty)
        seen.until(lambda: isinstance(seen.events[-1], Changed))
        assert remembered.load(tmp_path) == expected


def test_a_mistake_of_ours_ends_the_source_in_the_open(api: FakeApi, tmp_path: Path) -> None:
    class Bad:
        def relisted(self, resource: str) -> None:
            raise ZeroDivisionError

    source = ClusterSource(
        ApiServer(Access(server=api.url)),
        node_name="here",
        state_dir=tmp_path,
        metrics=Bad(),  # type: ignore[arg-type]
    )
    with pytest.raises(ZeroDivisionError):
        source.run(lambda event: None, threading.Event())


def test_where_is_the_path_in_the_api(api: FakeApi, tmp_path: Path) -> None:
    source = ClusterSource(ApiServer(Access(server=api.url)), node_name="n", state_dir=tmp_path)
    slices = "/apis/discovery.k8s.io/v1/namespaces/a/endpointslices/x"
    assert source.where(Ref("EndpointSlice", "a", "x")) == slices
    assert source.where(Ref("Node", "", "n")) == "/api/v1/nodes/n"
    assert source.where(Ref("Thing", "", "n")) == ""


# -- whatever happens ------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "c", "d"])
steps = st.one_of(
    st.tuples(st.just("put"), names, st.integers(1, 9)),
    st.tuples(st.just("bad"), names, st.just(0)),
    st.tuples(st.just("delete"), names, st.just(0)),
    st.tuples(st.sampled_from(["compact", "end", "bookmark"]), st.just(""), st.just(0)),
    st.tuples(
        st.just("fault"),
        st.sampled_from([f"{verb} {what}" for verb in ("list", "watch") for what in FAULTS]),
        st.integers(1, 3),
    ),
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(before=st.lists(steps, max_size=6), after=st.lists(steps, max_size=12))
def test_whatever_happens_the_state_comes_to_be_the_server_s(
    before: list[tuple[str, str, int]],
    after: list[tuple[str, str, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with FakeApi() as api:
        api.page_size = 2
        for step in before:
            play(api, step)
        with running(api, tmp_path_factory.mktemp("state"), with_cidrs=False) as seen:
            for step in after:
                play(api, step)
            for name in "abcd":  # what is bad has no version of the server's to agree with
                if is_bad(api, name):
                    api.delete("services", "default", name)
            api.put("services", service("last"))
            api.end_watches()
            expected = {
                name: obj["spec"]["ports"][0]["port"] for (_, _, name), obj in api.objects.items()
            }
            seen.until(lambda: seen.ports == expected and not seen.problems)
        state = [event for event in seen.events if isinstance(event, Listed | Changed)]
        assert [isinstance(event, Listed) for event in state].count(True) == 1
        assert isinstance(state[0], Listed)


def is_bad(api: FakeApi, name: str) -> bool:
    found = api.objects.get(("services", "default", name))
    return bool(found) and not isinstance(found["spec"]["ports"][0]["port"], int)


def play(api: FakeApi, step: tuple[str, str, int]) -> None:
    match step:
        case "put", name, port:
            api.put("services", service(name, port))
        case "bad", name, _:
            api.put("services", service(name, "eighty"))
        case "delete", name, _:
            api.delete("services", "default", name)
        case "compact", _, _:
            api.compact()
        case "end", _, _:
            api.end_watches()
        case "bookmark", _, _:
            api.bookmark()
        case "fault", what, times:
            verb, _, fault = what.partition(" ")
            api.fault("services", verb, fault, times)


def test_the_request_of_a_watch_is_what_the_api_wants(api: FakeApi, tmp_path: Path) -> None:
    with running(api, tmp_path) as seen:
        seen.until(lambda: bool(seen.reach))
    (query,) = api.asked("pods", "watch")
    assert 300 <= int(query.pop("timeoutSeconds")) <= 600
    assert json.loads(json.dumps(query)) == {
        "fieldSelector": "spec.nodeName=here",
        "resourceVersion": "101",
        "allowWatchBookmarks": "true",
        "watch": "true",
    }
