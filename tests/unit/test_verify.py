"""Desired against actual: what is different is named, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pointsman import desired
from pointsman.context import Context
from pointsman.hooks import Link
from pointsman.maglev import stamp
from pointsman.plan import Element, Run, Slot
from pointsman.policies import PolicyElement
from pointsman.ranges import Source, parse
from pointsman.values import Entry, Outside, Policy, PortName
from pointsman.verify import Difference, compare, link_differences
from tests.support.view import (
    DNS,
    ENTRIES,
    FLAGS,
    NODE,
    NONE,
    PODS,
    RETIRED,
    WEB,
    A,
    B,
    FakeView,
    frontend,
    view,
)


def empty_unreachable() -> FakeView:
    maps = view()
    maps.elements[1] = Element(WEB, 1, 1, 0, 0, 0)
    return maps


def changed(maps: FakeView, **elements: Any) -> FakeView:
    maps.elements[1] = replace(maps.elements[1], **elements)
    return maps


def without(name: str, key: Any) -> FakeView:
    maps = view()
    del getattr(maps, name)[key]
    return maps


def with_slot(slot: Slot) -> FakeView:
    maps = view()
    maps.slot[11] = slot
    return maps


def with_name() -> FakeView:
    maps = view()
    maps.owners[9] = PortName("old", "gone", "")
    return maps


def with_service() -> FakeView:
    maps = view()
    maps.elements[9] = Element(frontend("10.96.0.9", 1), 2, 0, 0, 0, 0)
    return maps


def with_load(endpoint: int, generation: int) -> FakeView:
    maps = view()
    maps.loads[endpoint] = (generation, 0)
    return maps


@pytest.mark.parametrize(
    ("maps", "entries", "expected"),
    [
        pytest.param(view(), ENTRIES, [], id="equal"),
        pytest.param(without("keys", DNS), ENTRIES, ["frontend-missing", "service-dangling"],
                     id="a-frontend-is-missing"),
        pytest.param(view(), ENTRIES[:3], ["frontend-extra"], id="a-frontend-nobody-wants"),
        pytest.param(view(), (replace(ENTRIES[0], endpoints=(A,)), *ENTRIES[1:]),
                     ["endpoint-extra"], id="an-endpoint-that-left"),
        pytest.param(changed(view(), count=1), ENTRIES, ["endpoint-missing"],
                     id="an-endpoint-that-never-came"),
        pytest.param(view(), (replace(ENTRIES[0], owner=NONE), *ENTRIES[1:]), ["owner"],
                     id="another-owner"),
        pytest.param(changed(view(), algorithm=9), ENTRIES, ["algorithm"], id="algorithm"),
        pytest.param(changed(view(), affinity=9), ENTRIES, ["affinity"], id="affinity"),
        pytest.param(changed(view(), flags=16), ENTRIES, ["flags"], id="flags"),
        pytest.param(changed(view(), frontend=DNS), ENTRIES, ["key"], id="key-copies-disagree"),
        pytest.param(empty_unreachable(), (replace(ENTRIES[0], endpoints=()), *ENTRIES[1:]),
                     ["empty"], id="the-wrong-errno-for-an-empty-set"),
        pytest.param(with_load(6, 4), ENTRIES, ["generation"], id="a-generation-not-in-load"),
        pytest.param(with_load(6, 3 | RETIRED), ENTRIES, ["generation"], id="a-retired-endpoint"),
        pytest.param(with_slot(Slot(B, 6, 3, 2)), ENTRIES, ["slot-owner"], id="a-slot-s-owner"),
        pytest.param(with_slot(Slot(A, 5, 1, 1)), ENTRIES, ["endpoint-extra", "endpoint-missing"],
                     id="an-endpoint-twice-in-a-set"),
        pytest.param(without("slot", 11), ENTRIES, ["endpoint-missing", "set"],
                     id="a-set-beyond-the-map"),
        pytest.param(without("owners", 2), ENTRIES, ["name-missing"] * 2 + ["owner"] * 2,
                     id="no-name"),
        pytest.param(with_name(), ENTRIES, ["name-dangling"], id="a-name-nobody-has"),
        pytest.param(with_service(), ENTRIES, ["service-dangling"], id="a-service-nobody-reaches"),
        pytest.param(view(), (Entry(WEB, NONE), *ENTRIES), [],
                     id="of-two-that-define-a-frontend-either-may-have-it"),
    ],
)  # fmt: skip
def test_verify_names_every_difference(
    maps: FakeView, entries: tuple[Entry, ...], expected: list[str]
) -> None:
    assert sorted(difference.kind for difference in compare(entries, maps)) == expected


def test_hostports_and_nodes_are_compared_as_services_are() -> None:
    maps = FakeView(owners={1: PODS, 2: NODE}, slot={10: Slot(B, 8, 1, 1)}, loads={8: (1, 0)})
    entries = (
        Entry(frontend("0.0.0.0", 8080), PODS, (B,), flags=FLAGS["SERVICE_THIS_NODE"]),
        Entry(frontend("192.0.2.1", 0, 0), NODE, flags=FLAGS["SERVICE_NODE"]),
        Entry(frontend("192.0.2.2", 0, 0), NODE, flags=FLAGS["SERVICE_REMOTE_NODE"]),
    )
    maps.add(entries[0].frontend, 1, 10, 1)
    maps.add(entries[1].frontend, 2, flags="NODE")
    maps.add(frontend("192.0.2.3", 0, 0), 2, flags="REMOTE_NODE")
    assert compare(entries, maps) == [
        Difference("flags", "0.0.0.0:8080/TCP", "flags should be this-node, is none"),
        Difference("frontend-missing", "192.0.2.2:*", "missing, node/n1 defines it"),
        Difference("frontend-extra", "192.0.2.3:*", "extra, held for node/n1; nothing defines it"),
    ]


VIP, OWNER = frontend("203.0.113.9", 80), PortName("shop", "api", "")
OUTSIDE, LOCAL, RANGES = (FLAGS[f"PACKETS_{n}"] for n in ("OUTSIDE", "LOCAL", "RANGES"))
SOURCE = parse("198.51.100.0/24")
PLACES = (FLAGS["SLOT_HERE"], FLAGS["SLOT_ELSEWHERE"])


CHOICE = FLAGS["ALGORITHM_MAGLEV"] | FLAGS["CHOICE_WEIGHTED"] | FLAGS["CHOICE_POLICY"]
WATCH = Policy(True, 7, streak=5, shortest=10**10, longest=3 * 10**11, most_percent=30)
WEIGHED = replace(ENTRIES[0], algorithm=FLAGS["ALGORITHM_MAGLEV"], weights=(1, 99), policy=WATCH)


def choice_view(**element: Any) -> FakeView:
    """Two endpoints with weights, a table for sockets and a policy."""
    maps = view()
    maps.slot[10] = replace(maps.slot[10], weight=1)
    maps.slot[11] = replace(maps.slot[11], weight=99)
    maps.stamps[Run(32, 251)] = stamp((A, B), (1, 99))
    maps.policy[1] = PolicyElement(WATCH, 1)
    return changed(maps, **{"algorithm": CHOICE, "inside": Run(32, 251), **element})


def with_policy(owner: int, element: PolicyElement) -> FakeView:
    maps = choice_view()
    maps.policy[owner] = element
    return maps


@pytest.mark.parametrize(
    ("maps", "entry", "expected"),
    [
        pytest.param(choice_view(), WEIGHED, [], id="equal"),
        pytest.param(choice_view(), replace(WEIGHED, weights=(99, 1)), ["weight"] * 2,
                     id="other-weights"),
        pytest.param(choice_view(), replace(WEIGHED, weights=()), ["algorithm", "weight", "weight"],
                     id="weights-that-should-have-gone"),
        pytest.param(choice_view(algorithm=CHOICE & ~FLAGS["CHOICE_WEIGHTED"]), WEIGHED,
                     ["algorithm"], id="weights-that-nobody-looks-at"),
        pytest.param(view(), replace(ENTRIES[0], weights=(1, 99)),
                     ["algorithm", "weight", "weight"], id="weights-that-never-came"),
        pytest.param(choice_view(), replace(WEIGHED, policy=replace(WATCH, streak=4)), ["policy"],
                     id="another-policy"),
        pytest.param(with_policy(1, PolicyElement(WATCH, 2)), WEIGHED, ["policy"],
                     id="more-than-may-be-ejected"),
        pytest.param(with_policy(2, PolicyElement(WATCH, 1)), WEIGHED, ["policy"],
                     id="a-policy-that-nobody-wants"),
        pytest.param(with_policy(9, PolicyElement(WATCH, 1)), WEIGHED, ["policy-dangling"],
                     id="a-policy-of-nobody"),
        pytest.param(replace(choice_view(), stamps={}), WEIGHED, ["table"],
                     id="a-table-of-other-endpoints"),
    ],
)  # fmt: skip
def test_weights_policies_and_tables_for_sockets_are_compared(
    maps: FakeView, entry: Entry, expected: list[str]
) -> None:
    found = compare((entry, *ENTRIES[1:]), maps)
    assert sorted(difference.kind for difference in found) == expected


def outside_view(**element: Any) -> FakeView:
    """A load balancer's address for clients of one range, with two endpoints and a table."""
    maps = FakeView(
        owners={1: OWNER},
        slot={10: Slot(A, 5, 1, 1, PLACES[0]), 11: Slot(B, 6, 1, 1, PLACES[1])},
        loads={5: (1, 0), 6: (1, 0)},
        admitted={1: frozenset([SOURCE])},
        stamps={Run(32, 251): stamp((A, B))},
    )
    maps.add(VIP, 1, 10, 2)
    known = {"packets": OUTSIDE | RANGES, "outside": Run(10, 2), "table": Run(32, 251)}
    return changed(maps, **{**known, **element})


def ranged(maps: FakeView, *sources: Source) -> FakeView:
    maps.admitted[1] = frozenset(sources)
    return maps


BOTH = Outside((A, B), PLACES, 0, OUTSIDE | RANGES, (SOURCE,))
NONE_HERE = Outside((), (), 1, OUTSIDE | RANGES, (SOURCE,))


@pytest.mark.parametrize(
    ("maps", "outside", "expected"),
    [
        pytest.param(outside_view(), BOTH, [], id="equal"),
        pytest.param(outside_view(packets=OUTSIDE | LOCAL | RANGES), BOTH, ["packets"],
                     id="a-flag-too-many"),
        pytest.param(outside_view(table=Run(0, 0)), BOTH, [], id="no-table-is-no-fault"),
        pytest.param(outside_view(outside=Run(10, 1)), BOTH, ["outside-endpoint-missing", "table"],
                     id="an-endpoint-that-never-came"),
        pytest.param(outside_view(), replace(BOTH, endpoints=(A,), places=PLACES[:1]),
                     ["outside-endpoint-extra"], id="an-endpoint-that-left"),
        pytest.param(outside_view(), replace(BOTH, places=PLACES[::-1]), ["place"] * 2,
                     id="endpoints-that-moved"),
        pytest.param(outside_view(outside=Run(0, 0), table=Run(0, 0)), NONE_HERE,
                     ["outside-empty"], id="the-wrong-answer-of-an-empty-set"),
        pytest.param(ranged(outside_view()), BOTH, ["range-missing"], id="a-range-is-missing"),
        pytest.param(ranged(outside_view(), SOURCE, parse("192.0.2.0/24")), BOTH, ["range-extra"],
                     id="a-range-nobody-wrote"),
        pytest.param(outside_view(), None,
                     ["outside-endpoint-extra"] * 2 + ["packets", "range-extra"],
                     id="not-to-be-served-at-all"),
        pytest.param(outside_view(outside=Run(11, 2), table=Run(0, 0)), BOTH,
                     ["outside-endpoint-missing", "set"], id="a-set-beyond-the-map"),
    ],
)  # fmt: skip
def test_verify_names_every_difference_for_clients_outside(
    maps: FakeView, outside: Outside | None, expected: list[str]
) -> None:
    entry = Entry(VIP, OWNER, (A, B), places=PLACES, outside=outside)
    assert sorted(difference.kind for difference in compare([entry], maps)) == expected


def link(hook: str = "connect4", **values: Any) -> Link:
    return replace(Link(hook, 3, 77, True), **values)


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        pytest.param(link(), [], id="all-current"),
        pytest.param(link(program=None), ["not attached"], id="missing"),
        pytest.param(
            link(current=False),
            ["runs program 3, which is not the current generation's"],
            id="stale",
        ),
        pytest.param(link(cgroup=0), ["its cgroup is gone"], id="cgroup-gone"),
        pytest.param(link(cgroup=5), ["is attached to cgroup 5, others to 77"], id="elsewhere"),
    ],
)
def test_verify_names_hooks_that_do_not_run_as_they_should(odd: Link, expected: list[str]) -> None:
    found = link_differences([odd, link("connect6"), link("sendmsg4")])
    assert found == [Difference("link", "connect4", message) for message in expected]


def test_the_desired_state_is_worked_out_as_the_agent_does(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text(
        """{apiVersion: v1, kind: Service, metadata: {name: web},
        spec: {clusterIP: 10.96.0.1, selector: {a: b}, ports: [{port: 80, targetPort: p}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: x, labels: {a: b}},
 spec: {containers: [{name: c, ports: [{name: p, containerPort: 8080}]}]},
 status: {podIP: 10.0.0.1, conditions: [{type: Ready, status: "True"}]}}
"""
    )
    status = {
        "settings": {"manifests": str(tmp_path), "state_dir": str(tmp_path / "none")},
        "dns": {"listen": ["10.0.0.9:5353"]},
    }
    tracker, problems = desired.read(desired.inputs(status))
    entries = desired.entries(tracker, Context(node_name="a"), {})
    assert not problems
    assert sorted((str(e.frontend), str(e.owner), len(e.endpoints)) for e in entries) == [
        ("10.96.0.10:*", "kube-system/kube-dns:dns", 0),
        ("10.96.0.10:53/TCP", "kube-system/kube-dns:dns-tcp", 1),
        ("10.96.0.10:53/UDP", "kube-system/kube-dns:dns", 1),
        ("10.96.0.1:*", "default/web", 0),
        ("10.96.0.1:80/TCP", "default/web", 1),
        ("127.0.0.1:*", "node/a", 0),
        ("[::1]:*", "node/a", 0),
    ]
