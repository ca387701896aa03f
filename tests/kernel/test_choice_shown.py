"""What people see of choices, of real connections: who was ejected and why, and what `explain` says
of a choice beside what the programs choose."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from pointsman import abi
from pointsman.values import Policy, PortName
from tests.support.kernel import TCP, Lab, entry, tcp_server, wildcard

pytestmark = pytest.mark.kernel

VIP = ("10.96.0.1", 80)
WEB = PortName("default", "web", "p")
SECOND = 1_000_000_000
_ABI = abi.constants()
LEAST, POLICY, AVOID = (
    _ABI[name] for name in ("ALGORITHM_LEAST_CONNECTIONS", "CHOICE_POLICY", "CHOICE_AVOID")
)
EJECTING = Policy(
    watch=True, streak=3, shortest=600 * SECOND, longest=600 * SECOND, trial=SECOND, most_percent=50
)


def set_web(lab: Lab, *backends: tuple[str, int], **more: Any) -> None:
    lab.set("web", entry(*VIP, TCP, backends, WEB, **more), wildcard(VIP[0], WEB))


def cli(lab: Lab, *arguments: str) -> str:
    command = [sys.executable, "-m", "pointsman.cli.main", *arguments, "--bpffs", str(lab.root)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def items(lab: Lab, *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(cli(lab, *arguments, "-o", "json"))["items"]
    return found


def counted(lab: Lab, before: dict[str, int]) -> dict[str, int]:
    """The counters that have gone up, by how much."""
    after = lab.maps.counters()
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


def test_an_endpoint_that_refuses_is_shown_as_ejected_with_why(lab: Lab) -> None:
    before = lab.maps.counters()
    with tcp_server() as (_, port):
        good, bad = f"127.0.0.1:{port}", f"127.0.0.2:{port}"
        set_web(
            lab, ("127.0.0.1", port), ("127.0.0.2", port), algorithm=POLICY | AVOID, policy=EJECTING
        )
        with contextlib.ExitStack() as clients:
            for _ in range(100):
                client = clients.enter_context(socket.socket())
                with contextlib.suppress(ConnectionRefusedError):
                    client.connect(VIP)
            rows = {row["endpoint"]: row for row in items(lab, "get", "endpoints", "web")}
            assert rows[good]["open"] == rows[good]["connects"] == 97
            assert rows[good]["state"] == "ready" and rows[good]["ejection"] is None
            assert rows[good]["connectMicroseconds"] > 0
            assert [rows[bad][key] for key in ("state", "open", "failures", "connects")] == [
                "ejected", 0, 3, 3
            ]  # fmt: skip
            ejection = rows[bad]["ejection"]
            assert ejection["why"] == "3 failures in a row" and not ejection["observed"]
            assert 0 < ejection["leftSeconds"] <= 600
            assert items(lab, "top", "web", "--sort-by", "failed")[0]["endpoint"] == bad
            text = cli(lab, "get", "endpoints", "-o", "wide")
            assert "3/3" in text and ": 3 failures in a row" in text
            assert "ejected: 1," in cli(lab, "top").splitlines()[0]
            assert f"gets {good}, of 2 endpoints" in cli(lab, "explain", ":".join(map(str, VIP)))
            services = items(lab, "get", "services")
            assert (services[0]["choice"], services[0]["ejected"]) == (["outlier-ejection=on"], 1)
            assert lab.maps.ejected_in_all() == 1
            assert counted(lab, before) == {
                "connected": 97, "connect_failed": 3, "ejected": 1
            }  # fmt: skip
            # Where it is turned off nobody is, though only a success takes it back in the map.
            set_web(
                lab, ("127.0.0.1", port), ("127.0.0.2", port), algorithm=POLICY,
                policy=Policy(max_connections=200),
            )  # fmt: skip
            (owner,) = lab.maps.policies()
            assert (lab.maps.ejected(owner), lab.maps.ejected_in_all()) == (1, 0)
            assert items(lab, "get", "services")[0]["ejected"] == 0


def test_a_connect_that_finds_all_endpoints_full_is_refused_as_explain_says(lab: Lab) -> None:
    before = lab.maps.counters()
    with tcp_server() as (_, port), socket.socket() as client:
        set_web(lab, ("127.0.0.1", port), algorithm=POLICY, policy=Policy(max_connections=1))
        with socket.create_connection(VIP):
            with pytest.raises(ConnectionRefusedError):
                client.connect(VIP)
            found = json.loads(cli(lab, "explain", "10.96.0.1:80", "-o", "json"))
            assert (found["verdict"], found["errno"]) == ("refused", "ECONNREFUSED")
            assert found["result"].endswith("(1 full)")
            assert counted(lab, before)["all_full"] == 1


def test_the_programs_choose_as_likely_as_explain_says(lab: Lab) -> None:
    """Each connect leaves things as they were, so all of them have the same chances."""
    rounds = 1500
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(tcp_server(f"127.0.0.{n}")) for n in range(1, 5)]
        backends = [server.getsockname() for server, _ in servers]
        for server, _ in servers:
            server.setblocking(False)
        set_web(lab, *backends)
        for _ in range(9):
            stack.enter_context(socket.create_connection(VIP))
        set_web(lab, *backends, algorithm=LEAST)
        found = json.loads(cli(lab, "explain", "10.96.0.1:80", "-o", "json"))
        likely = {each["endpoint"]: each["probability"] for each in found["endpoints"]}
        ids = {name: lab.endpoint_id(*each) for name, each in zip(likely, backends, strict=True)}
        before = {name: lab.maps.load(ident)[1] for name, ident in ids.items()}
        counts: Counter[str] = Counter()
        for _ in range(rounds):
            with socket.create_connection(VIP):
                counts.update(n for n, i in ids.items() if lab.maps.load(i)[1] > before[n])
            for server, _ in servers:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        server.accept()[0].close()
        assert sum(counts.values()) == rounds
        seen = {name: counts[name] / rounds for name in likely}
        assert seen == pytest.approx(likely, abs=0.07)
