"""Flows in the kernel's maps: swept by the program, listed, counted; decisions that are traced.

Maps are filled by hand: what packets make of them is tested in tests/kernel/packets/.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pointsman import abi, bpf, host
from pointsman.errors import AlreadyRunning, NotLoaded
from pointsman.flows import ANSWERED, FIN, REMOTE, SECOND, Filter
from pointsman.maglev import flow_hash
from pointsman.packetmaps import PacketMaps, now
from pointsman.pins import Generation, Pins
from pointsman.sweep import Sweeper
from pointsman.tracing import LEAD, Tracer
from pointsman.values import UDP, to_address
from tests.support.agents import AgentProcess
from tests.support.flows import entries
from tests.support.kernel import SMALL, lacking, until

pytestmark = pytest.mark.kernel

SIZES = replace(SMALL, flows=4096, flows_new=1024)
_settings = abi.layouts()["packet_settings"].packer(
    "trace_until", "first_port", "last_port", "dsr",
    "tcp_new", "tcp_open", "tcp_closing", "udp_new", "udp_open",
)  # fmt: skip
_name = abi.layouts()["name"].packer("namespace", "service", "port")


class Loaded:
    """The packet programs, attached to nothing, with maps of their own."""

    def __init__(self, name: str, source: Path | None = None) -> None:
        self.root = Path("/sys/fs/bpf") / name
        host.mount_bpffs(self.root)
        self.pins = Pins(self.root, SIZES, source or abi.source_directory())
        try:
            loaded = self.pins.load(packets=True)
            assert loaded.packets, loaded.packets_error
        except BaseException:
            self.close()
            raise
        self.generation: Generation = loaded.generation
        self._maps: dict[str, bpf.Map] = {}
        self.map("packet_settings").update(
            bytes(4), _settings(0, 61000, 61007, 0, 20, 100, 5, 10, 40)
        )
        self.map("names").update((1).to_bytes(4, "little"), _name(b"shop", b"web", b"http"))

    def map(self, name: str) -> bpf.Map:
        if name not in self._maps:
            self._maps[name] = bpf.Map.open(self.generation.maps / name)
        return self._maps[name]

    def put(self, table: dict[bytes, bytes], name: str = "flows") -> None:
        for key, value in table.items():
            self.map(name).update(key, value)

    def clear(self) -> None:
        for name in ("flows", "flows_new"):
            for key, _ in list(self.map(name).items()):
                self.map(name).delete(key)

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pointsman.cli.main", *arguments, "--bpffs", str(self.root)],
            capture_output=True,
            text=True,
        )

    def close(self) -> None:
        for opened in getattr(self, "_maps", {}).values():
            opened.close()
        if self.root.is_dir():
            self.pins.unload()
            shutil.rmtree(self.root, ignore_errors=True)


def _lacking() -> str:
    lack = lacking()
    return lack or ("" if (abi.source_directory() / "packets.c").exists() else "bpf/packets.c")


@pytest.fixture(scope="module")
def shared(missing: Callable[[str], None]) -> Iterator[Loaded]:
    if lack := _lacking():
        missing(lack)
    loaded = Loaded(f"pm_flows_{os.getpid()}")
    yield loaded
    loaded.close()


@pytest.fixture
def packets(shared: Loaded) -> Iterator[Loaded]:
    shared.clear()
    yield shared
    shared.clear()


@pytest.fixture
def sweeper(packets: Loaded) -> Iterator[Sweeper]:
    made = Sweeper(packets.generation.maps, packets.generation.programs)
    yield made
    made.close()


def ago(seconds: int) -> int:
    return now() - seconds * SECOND


def client(number: int) -> tuple[bytes, int]:
    return to_address("198.51.100.9"), 10000 + number


# -- sweep ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "protocol", "seconds", "expired"),
    [
        pytest.param((0, 0), 6, 21, True, id="tcp-not-answered"),
        pytest.param((0, ANSWERED), 6, 21, True, id="tcp-not-acknowledged"),
        # Far from the limit of 20 and 100 s: the sweep may come late.
        pytest.param((0, ANSWERED), 6, 6, False, id="tcp-new-and-young"),
        pytest.param((ANSWERED, ANSWERED), 6, 30, False, id="tcp-open"),
        pytest.param((ANSWERED, ANSWERED), 6, 101, True, id="tcp-open-for-too-long"),
        pytest.param((ANSWERED | FIN, ANSWERED | FIN), 6, 6, True, id="tcp-closed-by-both"),
        pytest.param((ANSWERED | FIN, ANSWERED), 6, 6, False, id="tcp-closed-by-one"),
        pytest.param((0, ANSWERED), UDP, 11, True, id="udp-new"),
        pytest.param((ANSWERED, ANSWERED), UDP, 11, False, id="udp-open"),
        pytest.param((ANSWERED, ANSWERED), UDP, 41, True, id="udp-open-for-too-long"),
    ],
)
def test_a_sweep_deletes_both_halves_of_what_has_expired_and_nothing_else(
    packets: Loaded,
    sweeper: Sweeper,
    flags: tuple[int, int],
    protocol: int,
    seconds: int,
    expired: bool,
) -> None:
    sweeper.round()  # the first one is thorough
    table = entries(
        protocol=protocol, client_flags=flags[0], reply_flags=flags[1], seen=ago(seconds)
    )
    packets.put(table)
    assert sweeper.round().expired == expired
    assert len(packets.map("flows")) == (0 if expired else 2)


def test_a_half_seen_lately_keeps_the_other(packets: Loaded, sweeper: Sweeper) -> None:
    old, young = entries(seen=ago(100)), entries(seen=ago(1))
    (first, value), (second, _) = old.items()
    packets.put({first: value, second: young[second]})
    assert sweeper.round().expired == 0


def test_a_thorough_round_finds_a_half_without_the_other(packets: Loaded, sweeper: Sweeper) -> None:
    key, value = next(iter(entries(client_flags=ANSWERED, seen=ago(90)).items()))
    packets.put({key: value})
    assert sweeper.round().expired == 1


def test_a_new_flow_of_which_the_kernel_dropped_one_half_is_swept(
    packets: Loaded, sweeper: Sweeper
) -> None:
    sweeper.round()
    _, (key, value) = entries(seen=ago(100)).items()
    packets.put({key: value}, "flows_new")
    assert sweeper.round().expired == 1
    assert not len(packets.map("flows_new"))


def test_many_flows_are_swept_in_several_runs(packets: Loaded, sweeper: Sweeper) -> None:
    for number in range(1500):
        packets.put(entries(client=client(number), reply_port=20000 + number, seen=ago(100)))
    found = sweeper.round()
    assert (found.entries, found.expired) == (3000, 1500)
    assert not len(packets.map("flows"))


def test_the_status_of_a_sweep_counts_entries_flows_and_ports(
    packets: Loaded, sweeper: Sweeper
) -> None:
    for number in range(3):
        packets.put(
            entries(
                client=client(number),
                reply_port=61000 + number,
                client_flags=REMOTE | ANSWERED,
                reply_flags=REMOTE | ANSWERED,
                seen=ago(0),
            )
        )
    packets.put(entries(client=client(9), reply_port=9, seen=ago(100)), "flows_new")
    sweeper.round()
    told = sweeper.status()
    assert told["entries"] == {"open": 6, "new": 2}
    assert told["room"] == {"open": 4096, "new": 1024}
    assert (told["rounds"], told["expired"]) == (1, 1)
    assert told["nat"] == {"available": 8, "used": 3, "most": 3}


def test_a_sweeper_stops_when_it_is_told(packets: Loaded, sweeper: Sweeper) -> None:
    thread = threading.Thread(target=sweeper.run)
    thread.start()
    until(lambda: sweeper.status()["rounds"], "first round")
    sweeper.stop()
    thread.join(timeout=120)
    assert not thread.is_alive()


# -- commands ------------------------------------------------------------------------------------


def test_get_conntrack_lists_flows_without_an_agent(packets: Loaded) -> None:
    packets.put(entries(client_flags=ANSWERED, reply_flags=ANSWERED, seen=ago(5)))
    packets.put(entries(client=client(1), reply_port=7, seen=ago(5)), "flows_new")
    done = packets.cli("get", "conntrack")
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert header.split()[:6] == ["SERVICE", "PROTOCOL", "CLIENT", "VIP", "ENDPOINT", "PATH"]
    assert [line.split()[:7] for line in lines] == [
        ["shop/web:http", "TCP", "198.51.100.9:10001", "192.0.2.1:80", "10.244.1.5:8080", "local",
         "new"],
        ["shop/web:http", "TCP", "198.51.100.9:40000", "192.0.2.1:80", "10.244.1.5:8080", "local",
         "open"],
    ]  # fmt: skip


def test_flows_are_chosen_by_service_and_client(packets: Loaded) -> None:
    packets.put(entries(seen=ago(0)))
    packets.put(entries(client=(to_address("198.51.100.10"), 1), reply_port=7, seen=ago(0)))
    found = json.loads(packets.cli("get", "ct", "-o", "json").stdout)["items"]
    assert len(found) == 2
    arguments = ("get", "ct", "--service", "shop/web", "--client", "198.51.100.10", "-o", "json")
    (row,) = json.loads(packets.cli(*arguments).stdout)["items"]
    assert row["client"] == "198.51.100.10:1"
    assert packets.cli("get", "ct", "--service", "shop/none").returncode == 12
    assert packets.cli("get", "ct", "--client", "nobody").returncode == 2
    assert packets.cli("get", "services", "--client", "198.51.100.10").returncode == 2
    assert packets.cli("get", "ct", "--watch").returncode == 2


def test_more_flows_than_are_sorted_are_all_listed_once(packets: Loaded) -> None:
    for number in range(1200):
        packets.put(entries(client=client(number), reply_port=20000 + number, seen=ago(0)))
    lines = packets.cli("get", "conntrack").stdout.splitlines()[1:]
    assert len({line.split()[2] for line in lines}) == len(lines) == 1200
    assert len(json.loads(packets.cli("get", "ct", "-o", "json").stdout)["items"]) == 1200


def test_get_nat_has_the_flows_that_use_a_port_and_how_many_are_left(packets: Loaded) -> None:
    packets.put(entries(seen=ago(0)))
    packets.put(
        entries(
            client=client(1), reply_port=61003, client_flags=REMOTE, reply_flags=REMOTE, seen=ago(0)
        )
    )
    found = json.loads(packets.cli("get", "nat", "-o", "json").stdout)
    assert [(row["node"], row["client"]) for row in found["items"]] == [
        ("192.0.2.1:61003", "198.51.100.9:10001")
    ]
    assert found["ports"] == [
        {
            "node": "192.0.2.1",
            "endpoint": "10.244.1.5:8080",
            "protocol": "TCP",
            "used": 1,
            "available": 8,
            "percent": 12.5,
        }
    ]
    assert "12.5%" in packets.cli("get", "nat").stdout


def test_no_flows_is_said_in_every_form(packets: Loaded) -> None:
    assert "No flows found" in packets.cli("get", "conntrack").stderr
    assert json.loads(packets.cli("get", "nat", "-o", "json").stdout) == {
        "kind": "NatList",
        "items": [],
        "ports": [],
    }
    assert packets.cli("get", "ct", "-o", "yaml").stdout == "kind: FlowList\nitems: []\n"


def test_maps_of_packets_are_dumped_decoded(packets: Loaded) -> None:
    packets.put(entries(client_flags=REMOTE, seen=ago(0)))
    rows = json.loads(packets.cli("map", "dump", "flows", "-o", "json").stdout)["items"]
    assert {row["arrives"]: row["flags"] for row in rows} == {
        "198.51.100.9:40000 > 192.0.2.1:80": ["remote"],
        "10.244.1.5:8080 > 192.0.2.1:61001": ["reply"],
    }
    (row,) = json.loads(packets.cli("map", "dump", "packet_settings", "-o", "json").stdout)["items"]
    assert (row["snatPorts"], row["tcpClosing"]) == ("61000-61007", 5)
    names = (
        *("devices", "vlans", "fragments", "held_fragments", "affinity_clients"),
        *("packet_counters", "flows_new"),
    )
    for name in names:
        assert packets.cli("map", "dump", name).returncode == 0, name
    assert "pointsman trace" in packets.cli("map", "dump", "trace").stderr
    assert packets.cli("map", "list").returncode == 0


def test_maps_without_packet_programs_say_so(packets: Loaded, tmp_path: Path) -> None:
    with pytest.raises(NotLoaded, match="--devices"):
        PacketMaps(tmp_path)


def test_a_flow_that_stands_in_both_maps_is_one(packets: Loaded) -> None:
    table = entries(client_flags=ANSWERED, reply_flags=ANSWERED, seen=ago(0))
    packets.put(table)
    packets.put(table, "flows_new")
    maps = PacketMaps(packets.generation.maps)
    with contextlib.closing(maps):
        assert len(list(maps.all(Filter()))) == 1


# -- trace ---------------------------------------------------------------------------------------


def until_of(packets: Loaded) -> int:
    raw = packets.map("packet_settings").lookup(bytes(4)) or b""
    return int.from_bytes(raw[:8], "little")


def test_a_tracer_renews_itself_and_leaves_the_other_settings(packets: Loaded) -> None:
    before = packets.map("packet_settings").lookup(bytes(4)) or b""
    tracer = Tracer(packets.generation.maps)
    with contextlib.closing(tracer):
        began = now()
        tracer.events()
        first = until_of(packets)
        assert began + LEAD <= first <= now() + LEAD

        def renewed() -> bool:
            tracer.events()
            return until_of(packets) > first

        until(renewed, "a renewal")
    after = packets.map("packet_settings").lookup(bytes(4)) or b""
    assert (until_of(packets), after[8:]) == (0, before[8:])


def test_only_one_may_trace(packets: Loaded) -> None:
    with contextlib.closing(Tracer(packets.generation.maps)), pytest.raises(AlreadyRunning):
        Tracer(packets.generation.maps)
    Tracer(packets.generation.maps).close()


def test_a_killed_trace_ends_by_itself(packets: Loaded) -> None:
    command = [sys.executable, "-m", "pointsman.cli.main", "trace", "--bpffs", str(packets.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        until(lambda: until_of(packets) > now(), "tracing")
        process.kill()
    until(lambda: until_of(packets) < now(), "the end of tracing")
    Tracer(packets.generation.maps).close()


def test_trace_ends_with_ctrl_c_and_prints_its_header(packets: Loaded) -> None:
    command = [sys.executable, "-m", "pointsman.cli.main", "trace", "--bpffs", str(packets.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        until(lambda: until_of(packets) > now(), "tracing")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.split()[:3] == ["TIME", "HOOK", "DEVICE"]
    assert until_of(packets) == 0


# -- hash ----------------------------------------------------------------------------------------


def test_the_hash_of_a_flow_is_the_programs(
    missing: Callable[[str], None], changed_source: Callable[..., Path]
) -> None:
    if lack := _lacking():
        missing(lack)
    old = "int sweep(struct xdp_md *ctx)\n{\n"
    new = (
        f"{old}\t__u32 zero = 0;\n\tstruct tuple *first = sweep_keys.lookup(&zero);\n\n"
        "\tif (ctx)\n\t\treturn first ? flow_hash(first) : 0;\n"
    )
    loaded = Loaded(f"pm_hash_{os.getpid()}", changed_source(("packets.c", old, new)))
    program = bpf.obj_get(loaded.generation.programs / "sweep")
    try:
        keys: list[bytes] = []
        for number in range(20):
            keys += entries(client=client(number), protocol=6 if number % 2 else UDP)
        keys += entries(client=(to_address("2001:db8::7"), 9))
        for key in keys:
            loaded.map("sweep_keys").update(bytes(4), key)
            assert bpf.run(program, bytes(64)) == flow_hash(key)
    finally:
        os.close(program)
        loaded.close()


# -- the agent -----------------------------------------------------------------------------------


def test_an_agent_sweeps_and_tells_of_packets(
    missing: Callable[[str], None], node: AgentProcess
) -> None:
    """It serves no device here: the programs and their maps are there all the same."""
    if lack := _lacking():
        missing(lack)
    node.start("--devices", "none-such*")

    def told() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(node.cli("status", "-o", "json", check=False).stdout)
        return found["packets"] or {}

    until(lambda: (told().get("sweep") or {}).get("rounds"), "a sweep")
    found = told()
    assert found["verdicts"] == found["drops"] == {}
    assert found["flows"]["open"]["entries"] == 0
    assert found["snatPorts"] == {
        "first": 1024, "last": 29999, "available": 28976, "used": 0, "most": 0
    }  # fmt: skip
    done = node.cli("explain", "192.0.2.1:30080", "--from", "198.51.100.9:40000")
    assert "left to this node as it is" in done.stdout
    node.kill()
    assert told()["sweep"] is not None  # as it last was
    assert node.cli("get", "nat").returncode == 0
