"""`pointsman takeover` beside the rules of a kube-proxy: real rules in this kernel, a real agent.

The rules are those of tests/unit/testdata/kubeproxy, the manifests the objects they were made of.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.agents import AgentProcess
from tests.support.kernel import run, until

pytestmark = pytest.mark.kernel

_DATA = Path(__file__).parents[1] / "unit" / "testdata" / "kubeproxy"
MANIFESTS = (_DATA / "services.yaml").read_text()
DEVICE = "pmt0"


def lines_without(text: str, *words: str) -> str:
    return "".join(e for e in text.splitlines(True) if not any(word in e for word in words))


def nftables(*without: str) -> None:
    """kube-proxy's rules in nftables mode, without lines that have one of these words."""
    text = lines_without((_DATA / "nftables.nft").read_text(), ". sctp .", *without)
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)


def iptables(*without: str) -> None:
    text = lines_without((_DATA / "iptables.save").read_text(), "sctp", "nfacct", *without)
    # A legacy iptables has one lock for all namespaces; a test beside this one may hold it.
    subprocess.run(["iptables-restore", "-w", "60"], input=text, text=True, check=True)


LOADERS = {"nftables": ("nft", nftables), "iptables": ("iptables-restore", iptables)}


@pytest.fixture
def rules(missing: Callable[[str], None], kernel: None) -> Iterator[Callable[..., None]]:
    """Loads the rules of a mode into this test's network namespace."""

    def load(mode: str, *without: str) -> None:
        program, loader = LOADERS[mode]
        if not shutil.which(program):
            missing(program)
        loader(*without)

    yield load
    run("nft", "flush", "ruleset")


@pytest.fixture
def worker(node: AgentProcess) -> Iterator[AgentProcess]:
    """A node whose one device is served, with all objects."""
    run("ip", "link", "add", DEVICE, "type", "veth", "peer", "name", f"{DEVICE}p")
    try:
        run("ip", "addr", "add", "192.0.2.1/24", "dev", DEVICE)
        run("ip", "link", "set", DEVICE, "up")
        run("ip", "link", "set", f"{DEVICE}p", "up")
        node.write("shop.yaml", MANIFESTS)
        yield node
    finally:
        node.end()
        run("ip", "link", "del", DEVICE)


def start(node: AgentProcess, device: str = DEVICE) -> None:
    node.start("--devices", device, "--node-name", "here")
    if device != "none":
        until(lambda: any(e["served"] for e in node.status()["devices"]["items"]), "the device")


def takeover(node: AgentProcess, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report."""
    done = node.cli("takeover", "--cgroup", str(node.cgroup), "-o", "json", *options, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def kinds(found: dict[str, Any]) -> dict[str, set[str]]:
    """Objects that differ, by kind."""
    listed: dict[str, set[str]] = {}
    for each in found["differences"]:
        listed.setdefault(each["kind"], set()).add(each["object"])
    return listed


@pytest.mark.parametrize("mode", LOADERS)
def test_kube_proxy_may_go_if_all_that_it_serves_is_served(
    worker: AgentProcess, rules: Callable[..., None], mode: str
) -> None:
    rules(mode)
    start(worker)
    code, found = takeover(worker)
    assert (code, found["differences"]) == (0, []), found
    assert found["ready"]
    assert found["kubeProxy"] == [{"mode": mode, "family": "IPv4", "frontends": 8, "different": 0}]
    commands = [command for step in found["steps"] for command in step["commands"]]
    removal = {"nftables": "nft delete table ip kube-proxy", "iptables": "kubectl"}
    assert commands[-1].startswith(removal[mode])

    worker.write("shop.yaml", MANIFESTS.replace("  - addresses: [10.244.0.2]\n", ""))
    until(lambda: takeover(worker)[0] == 1, "the endpoint to leave")
    code, found = takeover(worker)
    web = {f"{where}/TCP (shop/web:http)" for where in (
        "10.96.0.10:80", "198.51.100.9:80", "192.0.2.1:30080",
    )}  # fmt: skip
    if mode == "iptables":  # has NodePorts at loopback, too
        web.add("127.0.0.1:30080/TCP (shop/web:http)")
    assert kinds(found) == {"endpoint-missing": web}
    assert all("10.244.0.2:8080" in each["message"] for each in found["differences"])
    assert not found["steps"]


def test_what_is_not_served_outside_or_not_alive_keeps_kube_proxy(
    worker: AgentProcess, rules: Callable[..., None]
) -> None:
    rules("nftables")
    start(worker, "none")
    code, found = takeover(worker)
    assert (code, kinds(found).keys()) == (1, {"devices"})
    worker.stop()
    code, found = takeover(worker)
    assert (code, kinds(found).keys()) == (1, {"devices", "unhealthy"})


def test_only_a_part_of_the_node_is_not_the_node(
    worker: AgentProcess, rules: Callable[..., None]
) -> None:
    rules("nftables")
    start(worker, "none")
    done = worker.cli("takeover", check=False)
    assert done.returncode == 1
    assert f"only processes in {worker.cgroup} are served" in done.stdout
    assert "kube-proxy must stay" in done.stdout


def test_without_rules_there_is_nothing_to_retire(worker: AgentProcess) -> None:
    start(worker, "none")
    done = worker.cli("takeover", check=False)
    assert done.returncode == 12
    assert "kube-proxy serves nothing" in done.stderr


@pytest.fixture
def kube_proxy(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """A process of that name, which does nothing."""
    program = tmp_path / "kube-proxy"
    shutil.copy(shutil.which("sleep") or "", program)
    started: list[subprocess.Popen[bytes]] = []
    yield lambda: started.append(subprocess.Popen([program, "600"]))
    for each in started:
        each.kill()
        each.wait()


def test_pointsman_may_go_if_kube_proxys_rules_are_complete(
    worker: AgentProcess, rules: Callable[..., None], kube_proxy: Callable[[], None]
) -> None:
    start(worker, "none")
    code, found = takeover(worker, "--back")
    assert (code, kinds(found)) == (1, {"not-served": {"IPv4"}, "kube-proxy": {""}})
    assert "label node here" in found["steps"][-1]["commands"][0]

    rules("nftables", "10.96.0.11 . tcp")
    kube_proxy()
    code, found = takeover(worker, "--back")
    assert (code, kinds(found)) == (1, {"not-served": {"10.96.0.11:443/TCP (shop/api:grpc)"}})

    run("nft", "delete", "table", "ip", "kube-proxy")
    rules("nftables")
    code, found = takeover(worker, "--back")
    assert (code, found["differences"]) == (0, []), found
    commands = [command for step in found["steps"] for command in step["commands"]]
    assert worker.process
    assert commands == [f"kill {worker.process.pid}", "pointsman unload --drain 60"]
