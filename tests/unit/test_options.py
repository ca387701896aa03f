"""The options of 'up' that make the policy: what they become, and what is said of wrong ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pointsman import host
from pointsman.cli.main import cli
from pointsman.cli.up import settings_of
from pointsman.cli.up import up as up_command
from pointsman.context import Ejection, Policy
from pointsman.devices import Packets, Timeouts
from pointsman.kube.access import Access
from pointsman.settings import Settings


class Recorder:
    """Stands for the agent: takes the settings, and runs nothing."""

    failed = ""
    settings: Settings

    def __call__(self, settings: Settings, *_: Any, **__: Any) -> Recorder:
        self.settings = settings
        self.listeners: list[Any] = []
        self.rereaders: list[Any] = []
        return self

    def run(self) -> None:
        pass


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr("pointsman.cli.up.Agent", found)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(host, "require_root", lambda: None)
    monkeypatch.delenv("NODE_NAME", raising=False)
    return found


def up(*options: str, **environment: str) -> Any:
    fixed = ["up", "--cgroup", "/cg", "--dns-upstream", "off"]
    return CliRunner().invoke(cli, [*fixed, *options], env=environment)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param([], Policy(), id="the-defaults-are-kube-proxy-s"),
        pytest.param(
            ["--service-proxy-name", "mesh"], Policy(proxy_name="mesh"), id="another-proxy-s"
        ),
        pytest.param(
            ["--nodeport-addresses", "192.0.2.7/24, 2001:db8::/64",
             "--nodeport-addresses", "192.0.2.0/24"],
            Policy(node_port_addresses=("192.0.2.0/24", "2001:db8::/64")),
            id="cidrs-repeated-and-comma-separated",
        ),
        pytest.param(
            ["--nodeport-addresses", "primary"],
            Policy(node_port_addresses=("primary",)), id="primary",
        ),
        pytest.param(
            ["--node-port-range", "20000-20100"],
            Policy(node_port_range=(20000, 20100)), id="range",
        ),
        pytest.param(
            ["--no-localhost-nodeports", "--no-bind-guard", "--external-ips", "local"],
            Policy(localhost_node_ports=False, bind_guard=False, external_ips="local"),
            id="switches",
        ),
        pytest.param(
            ["--refuse-unused-cluster-ips"],
            Policy(refuse_unused_cluster_ips=True), id="unused-addresses-of-the-service-cidr",
        ),
        pytest.param(
            ["--algorithm", "peak-ewma", "--outlier-ejection", "observe"],
            Policy(algorithm="peak-ewma", outlier_ejection="observe"), id="how-it-is-chosen",
        ),
        pytest.param(
            ["--ejection-consecutive-failures", "0", "--ejection-failure-percent", "20",
             "--ejection-minimum-connects", "100", "--ejection-shortest", "2s",
             "--ejection-longest", "1m30s", "--ejection-most-percent", "50",
             "--ejection-trial", "1.5s"],
            Policy(ejection=Ejection(0, 20, 100, 2, 90, 50, 1.5)), id="what-ejects-for-how-long",
        ),
    ],
)  # fmt: skip
def test_options_become_the_policy(agent: Recorder, options: list[str], expected: Policy) -> None:
    done = up(*options)
    assert done.exit_code == 0, done.output
    assert agent.settings.policy == expected


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        pytest.param([], {}, "box-1.example", id="the-host-name-in-lower-case"),
        pytest.param([], {"NODE_NAME": "worker-1"}, "worker-1", id="the-environment"),
        pytest.param(["--node-name", "w2"], {"NODE_NAME": "w1"}, "w2", id="the-option-goes-first"),
    ],
)
def test_the_node_s_name(
    agent: Recorder,
    options: list[str],
    environment: dict[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Box-1.Example")
    assert up(*options, **environment).exit_code == 0
    assert agent.settings.node_name == expected


@pytest.mark.parametrize(
    ("options", "healthz", "metrics"),
    [
        ([], None, None),
        (["--healthz-bind-address", "127.0.0.1"], ("127.0.0.1", 10256), None),
        (["--metrics-bind-address", "[::1]:9000"], None, ("::1", 9000)),
        (["--metrics-bind-address", "off"], None, None),
    ],
)
def test_with_manifests_health_and_metrics_are_told_where_asked_for(
    agent: Recorder, options: list[str], healthz: object, metrics: object
) -> None:
    assert up(*options, KUBECONFIG="/somewhere").exit_code == 0
    settings = agent.settings
    assert (settings.api, settings.healthz, settings.metrics) == (None, healthz, metrics)


def test_with_an_api_server_kube_proxy_s_ports_are_the_default() -> None:
    context = up_command.make_context("up", ["--kubernetes", "--kubeconfig", "/k", "--cgroup", "/"])
    with context:
        settings = settings_of(context.params)
    assert settings.api == Access(Path("/k"))
    assert (settings.healthz, settings.metrics) == (("0.0.0.0", 10256), ("127.0.0.1", 10249))
    assert (settings.dns_listen, settings.service_cidrs) == ((), ())


def test_tcp_connections_to_endpoints_that_left_are_ended_on_demand_only(agent: Recorder) -> None:
    assert up().exit_code == 0 and not agent.settings.end_tcp
    assert up("--end-stale-tcp").exit_code == 0 and agent.settings.end_tcp


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param([], Packets(("auto",)), id="devices-with-a-default-route"),
        pytest.param(["--devices", "auto"], Packets(("auto",)), id="as-by-default"),
        pytest.param(["--devices", "none"], Packets(), id="none"),
        pytest.param(["--devices", "none", "--devices", "eth0"], Packets(("eth0",)), id="the-last"),
        pytest.param(
            ["--devices", "eth0, bond*", "--pod-devices", "tap*", "--xdp-mode", "native"],
            Packets(("eth0", "bond*"), ("tap*",), "native"),
            id="names-and-patterns",
        ),
        pytest.param(
            ["--devices", "eth0", "--dispatch", "dsr", "--snat-ports", "62000-62999"],
            Packets(("eth0",), dsr=True, snat_ports=(62000, 62999)),
            id="how-it-is-forwarded",
        ),
        pytest.param(
            ["--devices", "eth0", "--conntrack-tcp-timeout-established", "2h30m",
             "--conntrack-udp-timeout", "10s", "--conntrack-udp-timeout-stream", "3m"],
            Packets(("eth0",), timeouts=Timeouts(tcp_open=9000, udp_new=10, udp_open=180)),
            id="kube-proxy-s-timeouts",
        ),
    ],
)  # fmt: skip
def test_what_is_served_to_clients_outside(
    agent: Recorder, options: list[str], expected: Packets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POINTSMAN_DEVICES")
    assert up(*options).exit_code == 0
    assert agent.settings.packets == expected


def test_a_variable_can_keep_devices_from_being_served(agent: Recorder) -> None:
    assert up(POINTSMAN_DEVICES="none").exit_code == 0
    assert not agent.settings.packets.wanted


@pytest.mark.parametrize("package", ["tests", "demo"])
def test_what_tests_and_the_demo_start_serves_no_device_of_this_machine(package: str) -> None:
    told = subprocess.run(
        [sys.executable, "-c", f"import {package}, os; print(os.environ['POINTSMAN_DEVICES'])"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if name != "POINTSMAN_DEVICES"},
    )  # fmt: skip
    assert told.stdout == "none\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--algorithm", "fastest"], "'fastest' is not one of 'random', 'round-robin'"),
        (["--outlier-ejection", "yes"], "'yes' is not one of 'off', 'on', 'observe'"),
        (["--ejection-most-percent", "100"], "100 is not in the range 1<=x<=99"),
        (["--ejection-trial", "0s"], "0s is out of range; write 1s to 24h"),
        (["--ejection-longest", "soon"], '"soon" is no duration; write one such as 10s or 5m'),
        (["--ejection-shortest", "10m"], "is longer than --ejection-longest 300s"),
        (["--node-name", "Worker_1"], "write the one that 'kubectl get nodes' shows"),
        (["--node-name", ""], "is no name of a Node"),
        (["--node-name", "a" * 254], "is no name of a Node"),
        (["--service-proxy-name", "a b"], "is no value of a label"),
        (["--service-proxy-name", "a" * 64], "is no value of a label"),
        (["--nodeport-addresses", "192.0.2.7"], "is no CIDR; write e.g. 192.0.2.0/24"),
        (["--nodeport-addresses", "192.0.2.7/33"], "write e.g. 192.0.2.0/24"),
        (["--nodeport-addresses", "primary,10.0.0.0/8"], "'primary' stands alone"),
        (["--node-port-range", "30000"], "write FIRST-LAST, such as 30000-32767"),
        (["--node-port-range", "0-10"], "is no range of ports"),
        (["--node-port-range", "200-100"], "is no range of ports"),
        (["--node-port-range", "1-65536"], "is no range of ports"),
        (["--snat-ports", "61000"], "write FIRST-LAST, such as 1024-29999"),
        (["--snat-ports", "80-90"], "take higher ones"),
        (["--devices", "auto,eth0"], "'auto' stands alone"),
        (["--devices", "none,eth0"], "'none' stands alone"),
        (["--devices", "eth 0"], "is no name of a device"),
        (["--conntrack-udp-timeout", "soon"], "write one such as 30s or 24h"),
        (["--conntrack-udp-timeout", "0s"], "write 1s to 240h"),
        (["--external-ips", "some"], "'some' is not one of 'all', 'local', 'none'"),
        (["--kubeconfig", "/k"], "--kubeconfig is of use with --kubernetes only"),
        (["--api-server", "https://192.0.2.1"], "--api-server is of use with --kubernetes only"),
        (["--kubernetes", "--api-server", "192.0.2.1:6443"], "is no URL"),
        (["--kubernetes", "--api-server", "https://u:p@192.0.2.1"], "shows it to everybody"),
        (["--kubernetes", "--dns", "127.0.0.1:0"], "add --service-cidr"),
        (["--metrics-bind-address", "here"], "is no ADDRESS[:PORT]"),
    ],
)
def test_a_wrong_option_is_exit_code_2_and_names_the_mend(
    agent: Recorder, options: list[str], said: str
) -> None:
    done = up(*options)
    output = " ".join(done.output.split())
    assert (done.exit_code, said in output) == (2, True), output
    assert not hasattr(agent, "settings")


def test_help_says_what_is_risky_and_keeps_each_option_short() -> None:
    text = CliRunner().invoke(cli, ["up", "--help"], terminal_width=100).output
    assert "CVE-2020-8554" in text
    paragraphs: list[int] = []
    for line in text.partition("Options:")[2].splitlines():
        if line.lstrip().startswith("-"):
            paragraphs.append(0)
        if paragraphs and line.strip():
            paragraphs[-1] += 1
    assert max(paragraphs) <= 4, text
