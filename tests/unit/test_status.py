"""Whether a node is healthy, and how the reading commands answer wrong usage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pointsman import health, host
from pointsman.cli import health as judging
from pointsman.cli.health import _status_lines
from pointsman.cli.main import cli
from pointsman.hooks import HOOKS, Link
from pointsman.verify import Difference


def link(hook: str, **values: Any) -> Link:
    return replace(Link(hook, 3, 77, True), **values)


def seen(pid: int | None = 42, odd: Link | None = None, **status: Any) -> health.Observation:
    links = [link(hook.name) for hook in HOOKS]
    if odd:
        links = [odd if odd.hook == each.hook else each for each in links]
    sync = {"time": 90.0, "seconds": 0.01, "services": 2, "syncs": 3, "failures": 0}
    whole = {
        "version": "1",
        "started": 40.0,
        "stopped": None,
        "sync": {**sync, "problems": 1, "attached": True},
        "problems": [{"message": "m", "mend": "f", "severity": "error"}],
    }
    return health.Observation(
        pid, whole | status, "abc", tuple(links), {77: "/cg"}, (), 100, {"refused": 1}, 100.0
    )


@pytest.mark.parametrize(
    ("observation", "reasons"),
    [
        pytest.param(seen(), [], id="healthy-with-problems-in-objects"),
        pytest.param(
            seen(pid=None),
            ["the agent is not running: start it with 'pointsman up'"],
            id="no-agent",
        ),
        pytest.param(
            seen(pid=None, failed="thread source failed"),
            ["the agent is not running (thread source failed): start it with 'pointsman up'"],
            id="an-agent-that-failed",
        ),
        pytest.param(
            seen(stopped=50.0),
            ["the agent has not reported yet: it is starting"],
            id="the-file-is-of-the-agent-before",
        ),
        pytest.param(
            replace(seen(), pid=43, status={"pid": 42}),
            ["the agent has not reported yet: it is starting"],
            id="the-file-is-of-an-agent-that-was-killed",
        ),
        pytest.param(
            seen(sync={"attached": True, "error": "No space left"}),
            ["the last sync failed: No space left"],
            id="a-failed-sync",
        ),
        pytest.param(
            seen(sync={}), ["the agent has not completed its first sync"], id="not-yet-synced"
        ),
        pytest.param(
            seen(odd=link("recvmsg4", program=None)),
            ["recvmsg4: not attached"],
            id="a-missing-hook",
        ),
        pytest.param(
            replace(seen(), links=tuple(Link(hook.name) for hook in HOOKS)),
            [f"all {len(HOOKS)} hooks: not attached"],
            id="loaded-only",
        ),
    ],
)
def test_health(observation: health.Observation, reasons: list[str]) -> None:
    found = health.report(observation)
    assert (found["healthy"], found["reasons"]) == (not reasons, reasons)


def test_the_report_for_scripts_has_stable_keys() -> None:
    found = json.loads(json.dumps(health.report(seen())))
    keys = {key: " ".join(value) for key, value in found.items() if isinstance(value, dict)}
    assert keys == {
        "agent": "running pid reporting version started uptimeSeconds stopped failed",
        "datapath": "generation cgroup links hooks mappedBytes",
        "devices": "wanted named loading error former items links",
        "sync": "attached time agoSeconds seconds services syncs failures problems error",
        "source": "kind path server reachable since error listed objects balanced",
        "dns": "enabled listen upstreams clusterIPs queries forwarded",
        "counters": "refused",
        "node": "name zone localAddresses remoteAddresses",
        "policy": "",
        "noLocalEndpoints": "internal external",
        "stale": "destroyed flowsDeleted checks",
        "drains": "closed left services problem",
        "optedOut": "pods namespaces waiting",
    }
    assert " ".join(found) == (
        "healthy reasons warnings agent node policy datapath devices packets maps sync source "
        "dns counters noLocalEndpoints stale drains optedOut problems"
    )
    assert found["agent"]["uptimeSeconds"] == 60.0
    assert found["datapath"]["cgroup"] == {"id": 77, "path": "/cg", "configured": None}


TOLD: dict[str, Any] = {
    "node": {"name": "n1", "zone": "z", "localAddresses": 2, "remoteAddresses": 5},
    "policy": {
        "proxy_name": "",
        "node_port_addresses": ["192.0.2.0/24"],
        "node_port_range": [30000, 32767],
        "localhost_node_ports": False,
        "external_ips": "local",
        "bind_guard": True,
        "refuse_unused_cluster_ips": False,
        "algorithm": "maglev",
        "outlier_ejection": "observe",
        "ejection": {"most_percent": 30},
    },
    "stale": {"destroyed": 3, "flowsDeleted": 4, "checks": 9},
    "drains": {
        "closed": 12,
        "left": 8,
        "services": {
            "Service shop/web": {"closed": 5, "left": 8, "rate": "20/m", "waits": "slow start"}
        },
    },
    "noLocalEndpoints": {"internal": 1, "external": 2},
    "optedOut": {"pods": 1, "namespaces": 2, "waiting": 0},
}


def test_status_tells_the_node_and_the_policy_in_force() -> None:
    found = health.report(seen(**TOLD))
    assert found["node"] == TOLD["node"]
    assert found["policy"] == {
        "proxyName": "",
        "nodePortAddresses": ["192.0.2.0/24"],
        "nodePortRange": [30000, 32767],
        "localhostNodePorts": False,
        "externalIPs": "local",
        "bindGuard": True,
        "refuseUnusedClusterIPs": False,
        "algorithm": "maglev",
        "outlierEjection": "observe",
        "ejection": {"mostPercent": 30},
    }
    lines = "\n".join(_status_lines(found, []))
    for line in (
        "  name        n1",
        "  addresses   2, of other nodes: 5",
        "  opted out   Pods: 1, network namespaces: 2, waiting: 0",
        "  nodeport-addresses    192.0.2.0/24",
        "  node-port-range       30000-32767",
        "  localhost-nodeports   no",
        "  refuse-unused-cluster-ips  no",
        "  algorithm  maglev",
        "  outlier-ejection  observe",
        "  stale sockets destroyed           3",
        "  connections drained               12",
        "  draining shop/web                 5 ended, 8 left, at 20/m, waits for slow start",
        "  no local endpoints  Services with internalTrafficPolicy: 1, externalTrafficPolicy: 2",
    ):
        assert line.split() in [each.split() for each in lines.splitlines()], lines


def test_status_without_an_agent_that_says_so_has_no_policy() -> None:
    lines = [line.split() for line in _status_lines(health.report(seen()), [])]
    assert ["not", "known", "the", "agent", "has", "not", "said", "it"] in lines


@pytest.mark.parametrize(
    ("release", "warned"),
    [
        pytest.param("6.18.44-x", False, id="new"),
        pytest.param("6.6.0", False, id="the-first-mainline-release"),
        pytest.param("6.5.7", True, id="before-it"),
        pytest.param("6.5.8", False, id="the-stable-release-after"),
        pytest.param("6.1.58-1-amd64", True, id="before-the-stable-release"),
        pytest.param("6.1.59", False, id="the-stable-release"),
        pytest.param("5.15.0-91-generic", True, id="a-distribution-s-number-says-nothing"),
        pytest.param("5.15.136", False, id="5.15"),
        pytest.param("5.18", True, id="a-series-that-ended"),
        pytest.param("unknown", False, id="no-number"),
    ],
)
def test_kernels_that_overwrite_the_address_of_a_mount_are_warned_of(
    release: str, warned: bool
) -> None:
    note = health.kernel_sockets_note(release)
    assert bool(note) == warned
    assert not warned or "Linux 6.6 or newer" in note
    found = health.report(replace(seen(), kernel=release))
    assert (found["healthy"], found["warnings"]) == (True, [note] if warned else [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", "10.96.0.1:80", "--from", "node"], "neither 'host' nor 'pod'"),
        (["get", "pods"], "is not one of: services (service, svc)"),
        (["get"], "Missing argument 'RESOURCE'"),
        (["get", "svc", "-o", "xml"], "is not one of"),
        (["get", "svc", "-A", "-n", "x"], "exclude each other"),
        (["get", "svc", "a/b", "-n", "c"], "names namespace a, but -n says c"),
        (["describe", "frontends", "x"], "is not one of: services"),
        (["explain", "web:80"], "no IP address"),
        (["map", "dump"], "Missing argument 'NAME'"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "require_root", lambda: None)
    result = CliRunner().invoke(cli, arguments)
    assert (result.exit_code, said in result.output) == (2, True), result.output


@pytest.mark.parametrize(
    "command",
    ["get svc", "explain 10.96.0.1:80", "map list", "map dump load", "status", "takeover"],
)
def test_commands_say_that_nothing_is_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "require_root", lambda: None)
    result = CliRunner().invoke(cli, [*command.split(), "--bpffs", str(tmp_path)])
    assert result.exception is not None
    assert getattr(result.exception, "exit_code", None) == 11


@pytest.mark.parametrize(
    "command", ["get", "describe", "explain", "status", "verify", "takeover", "map"]
)
def test_every_command_shows_examples(command: str) -> None:
    assert "pointsman " + command in CliRunner().invoke(cli, [command, "--help"]).output


ROW = {"name": "eth0", "served": False, "problems": ["busy"]}


def test_former_programs_for_packets_are_a_warning_and_none_are_a_reason() -> None:
    told = {"wanted": True, "error": "refused", "items": []}
    found = health.report(seen(devices={**told, "former": True}))
    assert found["healthy"]
    assert [note for note in found["warnings"] if "former version" in note and "refused" in note]
    found = health.report(seen(devices={**told, "former": False}))
    assert found["reasons"] == ["packets from outside are not served: refused"]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        pytest.param({"error": "refused"}, "packets from outside are not served", id="programs"),
        pytest.param({"items": [ROW]}, "device eth0 is not served: busy", id="a-device"),
    ],
)
def test_what_hinders_devices_is_a_reason_if_they_were_named_and_else_a_warning(
    told: dict[str, Any], said: str
) -> None:
    named = health.report(seen(devices={"wanted": True, "named": True, **told}))
    assert (named["healthy"], said in named["reasons"][0]) == (False, True)
    found = health.report(seen(devices={"wanted": True, "named": False, **told}))
    assert found["healthy"]
    assert [note for note in found["warnings"] if said in note]


def test_only_what_every_look_finds_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_IN_FLIGHT", 0.05)
    monkeypatch.setattr(judging, "_BETWEEN_LOOKS", 0.01)
    late, lasting = (Difference(kind, "10.96.0.1", "") for kind in ("weight", "owner"))
    looks = iter([[late, lasting], *[[lasting]] * 100])
    found = judging._lasting([late, lasting], lambda: (next(looks), []), lambda: True)
    assert found == ([lasting], [])
    assert len(list(looks)) < 100, "it looked once"
    looks = iter([[late], [], [late]])
    assert judging._lasting([late], lambda: (next(looks), ["note"]), bool) == ([], ["note"])
    assert list(looks) == [[late]], "it went on looking"


def test_an_agent_that_gets_no_cpu_has_the_time_to_say_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(judging, "_IN_FLIGHT", 0.0)
    monkeypatch.setattr(judging, "_BETWEEN_LOOKS", 0.001)
    late = Difference("weight", "10.96.0.1", "")
    # Whether it has told is asked before each look: what it says then is in that look.
    tells = iter([False, False, True])
    looks = iter([[late], [late], []])
    assert judging._lasting([late], lambda: (next(looks), []), lambda: next(tells)) == ([], [])
    # One that hangs is not waited for.
    monkeypatch.setattr(judging, "_NEXT_STATUS", 0.02)
    assert judging._lasting([late], lambda: ([late], []), bool) == ([late], [])
