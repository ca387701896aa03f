"""Which settings change while the agent runs, and which wait for its next start."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from pointsman.config.own import KEYS as OWN_KEYS
from pointsman.config.reload import KEYS, LIVE, apply
from pointsman.context import Policy
from pointsman.devices import Packets
from pointsman.kube.access import Access
from pointsman.pins import Sizes
from pointsman.settings import Settings

OLD = Settings(node_name="a")
_CHANGED: dict[str, Any] = {
    "sizes": Sizes(services=16), "api": Access(), "healthz": ("127.0.0.1", 1),
    "metrics": ("127.0.0.1", 1), "dns_listen": (("127.0.0.1", 53),),
    "dns_upstreams": (("127.0.0.1", 53),), "service_cidrs": ("10.0.0.0/16",),
    "node_name": "b", "domain": "example.org",
}  # fmt: skip
_WAITING = sorted({field.name for field in fields(Settings)} - LIVE)


@pytest.mark.parametrize("name", _WAITING)
def test_what_waits_for_the_next_start_stays_and_is_named(name: str) -> None:
    new = replace(OLD, **{name: _CHANGED.get(name, Path("/elsewhere"))}, end_tcp=True)
    result, problems = apply(OLD, new)
    assert result == replace(OLD, end_tcp=True)
    assert [(each.field, each.severity) for each in problems] == [(KEYS[name], "warning")]


def test_policy_and_end_tcp_change_at_once() -> None:
    policy = Policy(proxy_name="mesh", node_port_addresses=("primary",), bind_guard=False)
    new = replace(OLD, policy=policy, end_tcp=True)
    assert apply(OLD, new) == (new, ())


def test_with_an_api_server_the_proxy_s_name_waits_and_the_rest_does_not() -> None:
    old = replace(OLD, api=Access())
    result, problems = apply(
        old, replace(old, policy=Policy(proxy_name="mesh", external_ips="none"))
    )
    assert result.policy == Policy(external_ips="none")
    assert [each.field for each in problems] == ["serviceProxyName"]


def test_with_an_api_server_refusing_waits_for_the_watches_it_needs() -> None:
    refusing = Policy(refuse_unused_cluster_ips=True, bind_guard=False)
    result, problems = apply(
        replace(OLD, api=Access()), replace(OLD, api=Access(), policy=refusing)
    )
    assert result.policy == Policy(bind_guard=False)
    assert [each.field for each in problems] == ["refuseUnusedClusterIPs"]


@pytest.mark.parametrize(
    ("before", "after", "expected", "waiting"),
    [
        pytest.param(("auto",), ("eth1",), ("eth1",), [], id="other-devices-at-once"),
        pytest.param((), ("auto",), (), ["devices"], id="not-from-none"),
        pytest.param(("auto",), (), ("auto",), ["devices"], id="nor-to-none"),
    ],
)
def test_devices_change_at_once_but_for_none(
    before: tuple[str, ...], after: tuple[str, ...], expected: tuple[str, ...], waiting: list[str]
) -> None:
    old = replace(OLD, packets=Packets(before, xdp_mode="native"))
    result, problems = apply(old, replace(OLD, packets=Packets(after, xdp_mode="none")))
    assert result.packets == Packets(expected, xdp_mode="none")
    assert [each.field for each in problems] == waiting


def test_equal_settings_say_nothing() -> None:
    assert apply(OLD, replace(OLD)) == (OLD, ())


def test_every_setting_has_the_keys_that_decide_it() -> None:
    assert KEYS.keys() == {field.name for field in fields(Settings)}
    known = {key.path.partition(".")[0] for key in OWN_KEYS} - {"verbose"}
    assert {key for keys in KEYS.values() for key in keys.split(", ")} == known
