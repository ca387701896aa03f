"""Programs that can't be loaded, and maps whose size changes: what serves goes on serving."""

from __future__ import annotations

import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pointsman import bpf, errors, host, loading
from pointsman.devices import Packets, Timeouts
from pointsman.devicewatch import DeviceWatch
from pointsman.flows import ANSWERED, RST, SECOND
from pointsman.packetmaps import PacketMaps, now
from pointsman.pins import Generation, Pins
from pointsman.sweep import Round, Sweeper
from tests.kernel.test_devices import devices_of, links_of, served, veth
from tests.support.agents import STARTS, AgentProcess, endpoints, service, service_of, slice_of
from tests.support.flows import entries
from tests.support.kernel import SMALL, run, until

# Several agents a test, and the verifier: 90 s on a machine four times as busy as it has CPUs.
pytestmark = [pytest.mark.kernel, pytest.mark.timeout(1200)]

VIP, HEALTH = "10.96.0.7", "127.0.0.1:10256"
_INCLUDE = "#include <linux/bpf.h>\n"
_SWEEP = "int sweep(struct xdp_md *ctx)\n{\n"
#: Compiles, and no verifier takes it.
REFUSED = ("packets.c", _SWEEP, f'{_SWEEP}\tfor (;;)\n\t\tasm volatile("");\n')
NEWER = ("packets.c", "int xdp_ingress(", "/* newer */ int xdp_ingress(")
#: Rebuilds the lookup maps: nothing writes those of the version before any more.
LARGER = ("abi.h", "struct slot {\n", "struct slot {\n\t__u64 reserved;\n")
OTHER_FLOWS = ("abi.h", "struct flow {\n", "struct flow {\n\t__u64 reserved;\n")
OTHER_SETTINGS = (
    "abi.h",
    "struct packet_settings {\n",
    "struct packet_settings {\n\t__u64 more;\n",
)
_LAST_MAP = "MAP(percpu_array, packet_counters, "
ONE_MORE_MAP = ("maps.h", _LAST_MAP, f"MAP(array, one_more, __u32, __u64, 1, 0);\n{_LAST_MAP}")


@pytest.fixture
def root(kernel: None) -> Iterator[Path]:
    path = Path("/sys/fs/bpf") / f"pm_loading_{os.getpid()}"
    host.mount_bpffs(path)
    yield path
    Pins(path, SMALL).unload()


@pytest.fixture
def eth(kernel: None) -> Iterator[str]:
    with veth("pml0"):
        run("ip", "addr", "add", "192.0.2.1/24", "dev", "pml0")
        yield "pml0"


@contextlib.contextmanager
def opened(generation: Generation, name: str) -> Iterator[bpf.Map]:
    with contextlib.closing(bpf.Map.open(generation.packets.maps / name)) as found:
        yield found


def start(node: AgentProcess, *options: str, source: Path | None = None) -> None:
    """With time for a verifier on a busy machine; XDP on a veth has to be asked for."""
    node.start("--xdp-mode", "native", *options, source=source, wait=False)
    until(node.settled, node.waits, 240)


def put_flow(node: AgentProcess, *, flags: int = ANSWERED, age: int = 0) -> None:
    """One of a client outside; `age` in seconds."""
    generation = Pins(node.root).current
    assert generation
    with opened(generation, "flows") as flows:
        table = entries(client_flags=flags, reply_flags=flags, seen=now() - age * SECOND)
        for key, value in table.items():
            flows.update(key, value)


# -- one process a module ------------------------------------------------------------------------


def test_a_compiler_that_crashes_over_packets_leaves_sockets(
    root: Path, changed_source: Callable[..., Path]
) -> None:
    crash = ("packets.c", _INCLUDE, f"#pragma clang __debug crash\n{_INCLUDE}")
    loaded = Pins(root, SMALL, changed_source(crash)).load(packets=True)
    assert not loaded.packets
    assert loaded.packets_error.startswith(
        "the packet programs could not be loaded: the compiler was ended by SIG"
    )
    assert (loaded.generation.programs / "connect4").exists()
    assert not (loaded.generation.maps / "flows").exists()


def test_a_compiler_that_hangs_over_packets_is_ended(
    root: Path, changed_source: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = tmp_path / "endless.h"
    os.mkfifo(endless)
    source = changed_source(("packets.c", _INCLUDE, f"#include <{endless}>\n{_INCLUDE}"))
    pins = Pins(root, SMALL, source)
    pins.load()
    monkeypatch.setenv("POINTSMAN_LOAD_TIMEOUT", "3")
    loaded = pins.load(packets=True)
    assert "had not finished after 3 s" in loaded.packets_error
    assert pins.load().generation == loaded.generation


def test_what_fails_is_named(root: Path, changed_source: Callable[..., Path]) -> None:
    source = changed_source(("sock.c", _INCLUDE, f"#error nonsense\n{_INCLUDE}"))
    with pytest.raises(errors.NoCompiler, match="the socket programs could not be loaded: bcc"):
        Pins(root, SMALL, source).load(packets=True)


def test_an_agent_that_compiles_ends_as_soon_as_it_is_told_to(
    node: AgentProcess, changed_source: Callable[..., Path], tmp_path: Path
) -> None:
    """A compiler that hangs stands for one that takes longer than systemd or a kubelet waits."""
    endless = tmp_path / "endless.h"
    os.mkfifo(endless)
    source = changed_source(("sock.c", _INCLUDE, f"#include <{endless}>\n{_INCLUDE}"))
    node.start(source=source, wait=False)
    until(lambda: children_of(node), "the compiler")
    compilers = children_of(node)
    assert node.stop() == 0, node.log.read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in compilers)
    assert not list(node.root.iterdir()), "nothing half is left"
    assert node.status() == {}


# -- sockets first -------------------------------------------------------------------------------


def test_sockets_do_not_wait_for_packets_where_none_were_served(
    node: AgentProcess, eth: str, changed_source: Callable[..., Path], tmp_path: Path
) -> None:
    """A compiler that hangs stands for one that takes long. It ends with its agent."""
    endless = tmp_path / "endless.h"
    os.mkfifo(endless)
    source = changed_source(("packets.c", _INCLUDE, f"#include <{endless}>\n{_INCLUDE}"))
    node.write("web.yaml", service("web", VIP) + "\n---\n" + endpoints("web", ("10.244.0.9", 80)))
    health = ("--healthz-bind-address", HEALTH)
    node.start("--devices", eth, *health, source=source, wait=False)
    until(node.attached, "hooks", STARTS)
    # Load balancers are to wait; pods need not, and nobody is to start the agent anew.
    assert [asked(path) for path in ("healthz", "readyz", "livez")] == [503, 200, 200]
    done = node.cli("status", check=False, source=source)
    assert (done.returncode, "the programs are being loaded" in done.stdout) == (0, True)
    # Changes are followed meanwhile.
    node.write("other.yaml", service("other", "10.96.0.8"))
    until(lambda: "10.96.0.8" in node.cli("get", "services", source=source).stdout, "a Service")
    until(lambda: len(children_of(node)) == 1, "the compiler, and no other")
    compilers = children_of(node)
    assert node.stop() == 0
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in compilers), "its end")

    start(node, "--devices", eth, *health)
    until(lambda: served(node, eth), f"a row of {eth}")
    assert asked("healthz") == 200


def asked(path: str) -> int:
    """The status code."""
    try:
        with urllib.request.urlopen(f"http://{HEALTH}/{path}", timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def children_of(node: AgentProcess) -> list[int]:
    assert node.process
    text = "".join(
        path.read_text() for path in Path(f"/proc/{node.process.pid}/task").glob("*/children")
    )
    return [int(pid) for pid in text.split()]


# -- upgrades ------------------------------------------------------------------------------------


def generation_of(node: AgentProcess) -> Generation:
    found = Pins(node.root).current
    assert found
    return found


def told(node: AgentProcess) -> dict[str, Any]:
    found: dict[str, Any] = node.status().get("packets") or {}
    return found


def test_former_programs_go_on_where_new_ones_are_refused(
    node: AgentProcess, eth: str, changed_source: Callable[..., Path]
) -> None:
    """They serve, also devices that come; their flows are listed and swept; status says why."""
    start(node, "--devices", "pml[01]")
    until(lambda: served(node, eth), f"a row of {eth}")
    put_flow(node)
    before, flows = links_of(node), map_id(node, "flows")
    node.stop()

    refused = changed_source(REFUSED)
    start(node, "--devices", "pml[01]", source=refused)
    until(lambda: served(node, eth), "the row again")
    assert links_of(node) == before, "nothing was flipped"
    assert generation_of(node).packets == generation_of(node).former
    assert all(link.current for link in Pins(node.root).device_links())
    done = node.cli("status", source=refused)
    assert "warning: programs of a former version serve packets from outside" in done.stderr
    assert "the packet programs could not be loaded" in done.stderr
    assert "198.51.100.9:40000" in node.cli("get", "conntrack", source=refused).stdout
    assert "10.244.1.5:8080" in node.cli("map", "dump", "flows", source=refused).stdout
    with veth("pml1"):
        until(lambda: served(node, "pml1"), "a device that came")
        assert links_of(node)["tc_ingress-pml1"][1] == before[f"tc_ingress-{eth}"][1]
    put_flow(node, flags=ANSWERED | RST, age=60)
    until(lambda: told(node).get("expired"), "a sweep by the former program")
    assert told(node)["former"]
    put_flow(node)
    node.kill()

    # Twice is as once; then a version that the kernel takes.
    start(node, "--devices", "pml[01]", source=refused)
    until(lambda: served(node, eth), "the row once more")
    assert links_of(node) == before
    node.stop()
    newer = changed_source(NEWER)
    start(node, "--devices", "pml[01]", source=newer)
    until(lambda: links_of(node)[f"xdp_ingress-{eth}"] != before[f"xdp_ingress-{eth}"], "flips")
    assert generation_of(node).packets == generation_of(node)
    assert not generation_of(node).former.directory.exists()
    assert map_id(node, "flows") == flows, "flows outlive all that"
    assert "warning: programs of a former" not in node.cli("status", source=newer).stderr


def test_former_programs_whose_maps_are_others_do_not_go_on(
    node: AgentProcess, eth: str, changed_source: Callable[..., Path]
) -> None:
    start(node, "--devices", eth)
    until(lambda: served(node, eth), f"a row of {eth}")
    node.stop()
    source = changed_source(REFUSED, LARGER)
    start(node, "--devices", eth, source=source)
    status = node.status()
    assert status["sync"]["attached"]
    assert "slots is another map" in status["devices"]["error"]
    assert not status["devices"]["former"]
    assert not links_of(node), "what nobody fills is detached"


def test_a_former_version_that_lacks_a_map_does_not_go_on(
    root: Path, changed_source: Callable[..., Path]
) -> None:
    Pins(root, SMALL).load(packets=True)
    loaded = Pins(root, SMALL, changed_source(REFUSED, ONE_MORE_MAP)).load(packets=True)
    assert not loaded.packets
    assert "they have no map one_more" in loaded.packets_error
    assert (loaded.generation.programs / "connect4").exists()


def test_what_a_killed_start_left_on_dead_maps_is_detached(
    node: AgentProcess, eth: str, changed_source: Callable[..., Path]
) -> None:
    """It had flipped the sockets, and not yet come to devices."""
    start(node, "--devices", eth)
    until(lambda: served(node, eth), f"a row of {eth}")
    node.stop()
    source = changed_source(REFUSED, LARGER)
    pins = Pins(node.root, source_directory=source)
    loaded = pins.load(packets=True)
    assert (loaded.packets, "slots" in loaded.rebuilt) == (False, True)
    pins.attach(loaded.generation, node.cgroup)
    pins.drop_others(loaded.generation)
    assert "slots" in pins.outdated(loaded.generation)
    assert links_of(node)
    start(node, "--devices", eth, source=source)
    assert not pins.load(packets=True).rebuilt, "the agent could not know it by that"
    assert not links_of(node)


def test_flows_that_are_laid_out_otherwise_are_lost_and_it_is_said(
    node: AgentProcess, eth: str, changed_source: Callable[..., Path]
) -> None:
    """As soon as the programs can be loaded, and not by and by."""
    start(node, "--devices", eth)
    until(lambda: served(node, eth), f"a row of {eth}")
    put_flow(node)
    before = links_of(node)
    node.stop()

    # What is attached goes on, at each start that can't load others.
    refused = changed_source(OTHER_FLOWS, REFUSED)
    members = [("10.244.0.8", {}), ("10.244.0.9", {})]  # one alone needs no table
    outside = service_of("web", [VIP], 80, externalIPs=["192.0.2.77"])
    web = outside + "\n---\n" + slice_of("web", members, 8080)
    assert not any(values(node, "maglev"))
    for _ in range(2):
        start(node, "--devices", eth, source=refused)
        assert links_of(node) == before
        assert "nobody sweeps their flows" in problem(node, "FormerPrograms")
        assert told(node) == {}
        # They find the Services that come, too.
        node.write("web.yaml", web)
        until(lambda: any(values(node, "maglev")), "a table")
        node.kill()

    newer = changed_source(OTHER_FLOWS)
    start(node, "--devices", eth, source=newer)
    until(lambda: served(node, eth), f"a row of {eth}")
    assert not set(links_of(node).values()) & set(before.values())
    assert "flows have another layout" in problem(node, "FlowsLost")
    flows = map_id(node, "flows")
    node.stop()
    start(node, "--devices", eth, source=newer)
    until(lambda: served(node, eth), f"a row of {eth}")
    assert (problem(node, "FlowsLost"), map_id(node, "flows")) == ("", flows)


def values(node: AgentProcess, name: str) -> bytes:
    with opened(generation_of(node), name) as found:
        return found.values()


def problem(node: AgentProcess, reason: str) -> str:
    found = (p["message"] for p in node.status()["problems"] if p["reason"] == reason)
    return next(found, "")


def test_what_was_pinned_stays_where_one_pin_can_not_be_made_again(
    root: Path, changed_source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = Pins(root, SMALL)
    generation = pins.load(packets=True).generation
    with opened(generation, "flows") as found:
        flows = found.info.id
    (generation.maps / "vlans").unlink()

    def fail(*_: object) -> None:
        raise errors.NoCompiler("no compiler")

    with monkeypatch.context() as patched:
        patched.setattr(loading, "load", fail)
        loaded = pins.load(packets=True)
    assert (loaded.packets, "they have no map vlans" in loaded.packets_error) == (False, True)
    assert pins.load(packets=True).packets
    with opened(generation, "flows") as found:
        assert found.info.id == flows


def test_settings_are_written_before_the_first_sweep(root: Path) -> None:
    packets = Pins(root, SMALL).load(packets=True).generation.packets
    with opened(packets, "flows") as flows:
        for key, value in entries(seen=now() - SECOND).items():
            flows.update(key, value)
    sweeper = Sweeper(packets.maps, packets.programs)
    assert sweeper.round() == Round(), "timeouts are zeros, and all is older"
    limits = replace(Timeouts(), tcp_new=77)
    asked = Packets(devices=("pml0",), timeouts=limits)
    DeviceWatch(asked, root, lambda _: None).begin(packets.programs, packets.maps)
    with contextlib.closing(PacketMaps(packets.maps)) as maps:
        assert maps.timeouts == limits
    assert (sweeper.round().entries, sweeper.round().expired) == (2, 0)
    sweeper.close()


def map_id(node: AgentProcess, name: str) -> int:
    with opened(generation_of(node), name) as found:
        return found.info.id


# -- sizes ---------------------------------------------------------------------------------------


def test_max_flows_may_change_and_no_connection_is_lost(node: AgentProcess, eth: str) -> None:
    start(node, "--devices", eth, "--max-flows", "4096")
    until(lambda: served(node, eth), f"a row of {eth}")
    put_flow(node)
    flows = map_id(node, "flows")
    node.stop()

    start(node, "--devices", eth, "--max-flows", "8192")
    until(lambda: served(node, eth), "the row again")
    assert map_id(node, "flows") == flows
    problems = [p for p in node.status()["problems"] if p["reason"] == "SizeKept"]
    assert [p["severity"] for p in problems] == ["warning"]
    assert "--max-flows 8192 is not in force" in problems[0]["message"]
    assert "4096" in problems[0]["message"]
    assert "--devices none" in problems[0]["mend"]
    assert "198.51.100.9:40000" in node.cli("get", "conntrack").stdout
    assert "--max-flows 8192" in node.cli("status").stdout
    node.stop()

    # What the problem says.
    start(node, "--devices", "none", "--max-flows", "8192")
    node.stop()
    start(node, "--devices", eth, "--max-flows", "8192")
    until(lambda: served(node, eth), "the row of a new map")
    with opened(generation_of(node), "flows") as found:
        assert found.info.max_entries == 8192
    assert not [p for p in node.status()["problems"] if p["reason"] == "SizeKept"]


def test_the_other_sizes_may_change(node: AgentProcess, eth: str) -> None:
    """Lookup maps start anew with the numbers of the old ones; flows stay."""
    start(node, "--devices", eth)
    until(lambda: served(node, eth), f"a row of {eth}")
    flows, services = map_id(node, "flows"), map_id(node, "services")
    node.stop()
    names = ("services", "slots", "endpoints", "maglev-lines")
    larger = [text for name in names for text in (f"--max-{name}", "40000")]
    start(node, "--devices", eth, *larger)
    until(lambda: served(node, eth), "the row again")
    assert map_id(node, "flows") == flows
    assert map_id(node, "services") != services
    assert devices_of(node)[eth]["xdp"] == "native"


def test_flows_without_any_take_a_new_size_at_once(root: Path) -> None:
    first = Pins(root, SMALL).load(packets=True)
    wanted = replace(SMALL, flows=1024)
    assert Pins(root, wanted).load(packets=True).flows_kept is None
    with opened(first.generation, "flows") as flows:
        for key, value in entries(seen=now()).items():
            flows.update(key, value)
    assert Pins(root, wanted).load(packets=True).flows_kept == (1024, SMALL.flows)
