"""`pointsman trace` over real frames: an agent that serves a device, and a client beyond it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from pointsman import abi, bpf
from pointsman.packetmaps import now
from pointsman.pins import Pins
from tests.kernel.test_devices import served, veth
from tests.support.agents import AgentProcess, node_of, service_of, slice_of
from tests.support.kernel import run, until

pytestmark = pytest.mark.kernel

CLIENT, CLIENT_MAC = "192.0.2.100", "02:00:00:00:00:64"
NODE, NODE_MAC = "192.0.2.1", "02:00:00:00:00:01"
ENDPOINT, TARGET, NODE_PORT = "10.244.1.5", 8080, 30080
_UNTIL = abi.layouts()["packet_settings"].field("trace_until").offset


@pytest.fixture
def eth(kernel: None) -> Iterator[str]:
    """A device of the node. The client is whoever sends at its other end."""
    with veth("pmt0"):
        run("ip", "link", "set", "pmt0", "address", NODE_MAC)
        run("ip", "addr", "add", f"{NODE}/24", "dev", "pmt0")
        neighbour = ("lladdr", CLIENT_MAC, "dev", "pmt0", "nud", "permanent")
        run("ip", "neigh", "add", CLIENT, *neighbour)
        yield "pmt0"


@pytest.fixture
def serving(node: AgentProcess, eth: str) -> Iterator[AgentProcess]:
    """A Service with a NodePort and an endpoint on this node."""
    node.write("node.yaml", node_of("worker", NODE))
    node.write(
        "web.yaml",
        service_of("web", ["10.96.0.7"], 80, type="NodePort", nodePort=NODE_PORT)
        + "---\n"
        + slice_of("web", [(ENDPOINT, {"nodeName": "worker"})], TARGET),
    )
    node.start("--devices", eth, "--xdp-mode", "native", "--node-name", "worker")
    until(lambda: served(node, eth), f"a row of {eth}")
    yield node


def trace(node: AgentProcess, *options: str) -> subprocess.Popen[str]:
    """`pointsman trace`, once it traces."""
    command = [sys.executable, "-m", "pointsman.cli.main", "trace", *options]
    process = subprocess.Popen(
        [*command, "--bpffs", str(node.root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    generation = Pins(node.root).current
    assert generation
    settings = bpf.Map.open(generation.maps / "packet_settings")

    def tracing() -> bool:
        raw = settings.lookup(bytes(4)) or b""
        return int.from_bytes(raw[_UNTIL : _UNTIL + 8], sys.byteorder) > now()

    try:
        until(tracing, "tracing")
    finally:
        settings.close()
    return process


def send(eth: str, port: int) -> None:
    """A datagram of the client's, as a frame at the other end of the device."""
    frame = Ether(src=CLIENT_MAC, dst=NODE_MAC) / IP(src=CLIENT, dst=NODE)
    frame = frame / UDP(sport=40000, dport=port) / b"hello"
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind((f"{eth}p", 0))
        wire.send(bytes(frame))


def test_decisions_have_addresses_device_and_service(serving: AgentProcess, eth: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((ENDPOINT, TARGET))
        server.settimeout(60)
        tracing = trace(serving, "-o", "json", "--service", "default/web", "--count", "3")
        try:
            send(eth, NODE_PORT)
            data, client = server.recvfrom(100)
            assert (data, client) == (b"hello", (CLIENT, 40000))
            server.sendto(b"reply", client)
            out, told = tracing.communicate(timeout=120)
        finally:
            tracing.kill()
            tracing.wait()
    assert (tracing.returncode, told) == (0, "")
    events: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]
    asked, answered = f"{CLIENT}:40000", f"{ENDPOINT}:{TARGET}"
    assert [
        (each["verdict"], each["hook"], each["before"], each["after"], each["drop"])
        for each in events
    ] == [
        ("flow_begun", "xdp", f"{asked} > {NODE}:{NODE_PORT}", "", False),
        ("packet_here", "xdp", f"{asked} > {NODE}:{NODE_PORT}", f"{asked} > {answered}", False),
        ("packet_replied", "tc-egress", f"{answered} > {asked}", f"{NODE}:{NODE_PORT} > {asked}",
         False),
    ]  # fmt: skip
    assert {(each["device"], each["protocol"], each["service"]) for each in events} == {
        (eth, "UDP", "default/web:udp")
    }
    assert [each["time"] for each in events] == sorted(each["time"] for each in events)
    assert {each["length"] for each in events} == {14 + 20 + 8 + 5}


def test_a_filter_shows_only_what_it_asks_for(serving: AgentProcess, eth: str) -> None:
    """A drop among what is forwarded; `--count` counts what is shown."""
    serving.write(
        "none.yaml",
        service_of("none", ["10.96.0.8"], 80, type="NodePort", nodePort=30081,
                   externalTrafficPolicy="Local")
        + "---\n"
        + slice_of("none", [("10.244.2.5", {"nodeName": "other"})], TARGET),
    )  # fmt: skip
    until(lambda: "30081" in serving.cli("get", "frontends").stdout, "the other Service")
    tracing = trace(serving, "--drops", "--count", "1")
    try:
        send(eth, NODE_PORT)
        send(eth, 30081)
        out, _ = tracing.communicate(timeout=120)
    finally:
        tracing.kill()
        tracing.wait()
    header, line = out.splitlines()
    assert header.split()[:3] == ["TIME", "HOOK", "DEVICE"]
    assert line.split()[1:4] == ["xdp", eth, "UDP"]
    assert "drop_no_local_endpoint" in line
    assert line.endswith("default/none:udp")
