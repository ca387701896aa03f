"""The packet programs, loaded but attached to nothing that carries traffic, on a node of their own.

The node is a network namespace with devices, routes and permanent neighbours, entered by one
thread: whatever runs a program or asks for a route runs there. It has no way out: the other ends of
its devices are in the same namespace, without addresses.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pointsman import abi, bpf, host
from pointsman.maps import Maps, apply, take_over
from pointsman.objects import Ref
from pointsman.pins import Pins, Sizes
from pointsman.values import Entry, to_address, to_text
from tests.support.kernel import CLONE_NEWNET, unshare
from tests.support.packets import Outcome, map_of, test_run

_T = TypeVar("_T")
_layouts, _constants = abi.layouts(), abi.constants()
_tuple = _layouts["tuple"]
_pack_tuple = _tuple.packer("source", "destination", "source_port", "destination_port", "proto")
_VERDICTS = {
    value: name
    for name, value in _constants.items()
    if name.startswith(("PACKET_", "FLOW_", "DROP_", "FRAGMENT_", "TRACE_"))
    and name in abi.source_directory().joinpath("abi.h").read_text().split("enum verdict")[1]
}
_FLOW_FLAGS = {
    value: name
    for name, value in _constants.items()
    if name.startswith("FLOW_") and name not in _VERDICTS.values()
}
#: How the programs run if a test says nothing else.
SETTINGS = {
    "trace_until": 0, "first_port": 61000, "last_port": 65535, "dsr": 0, "tcp_new": 60,
    "tcp_open": 86400, "tcp_closing": 10, "udp_new": 30, "udp_open": 120,
}  # fmt: skip
#: What a test empties before it begins.
_STATE = ("flows", "flows_new", "fragments", "held_fragments", "affinity_clients")


def _text(address: bytes, port: int) -> tuple[str, int]:
    return to_text(address), socket.ntohs(port)


@dataclass(frozen=True, slots=True)
class Flow:
    """One direction of a flow, as the maps have it; addresses as people write them."""

    source: tuple[str, int]
    destination: tuple[str, int]
    becomes_from: tuple[str, int]  # what its packets say when they leave
    becomes_to: tuple[str, int]
    proto: int
    flags: frozenset[str]
    open: bool  # in `flows`, else in `flows_new`


def _flow(key: bytes, value: bytes, is_open: bool) -> Flow:
    k, v = _tuple.decode(key), _layouts["flow"].decode(value)
    other = v["other"][0] if isinstance(v["other"], list) else v["other"]
    return Flow(
        _text(k["source"], k["source_port"]),
        _text(k["destination"], k["destination_port"]),
        _text(other["destination"], other["destination_port"]),
        _text(other["source"], other["source_port"]),
        k["proto"],
        frozenset(name for bit, name in _FLOW_FLAGS.items() if v["flags"] & bit),
        is_open,
    )


class PacketLab:
    """Programs, maps and the node that they think they are on. Not attached to anything that
    others use: only to devices of this namespace, which nothing sends to."""

    def __init__(self, name: str, sizes: Sizes, source: Path | None = None) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.root = Path("/sys/fs/bpf") / name
        host.mount_bpffs(self.root)
        self.pins = Pins(self.root, sizes, source or abi.source_directory())
        self._programs: dict[str, int] = {}
        self.devices: dict[str, int] = {}
        self._services: dict[Ref, tuple[Entry, ...]] = {}
        try:
            self.on_node(unshare, CLONE_NEWNET)
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        loaded = self.on_node(lambda: self.pins.load(packets=True))
        if not loaded.packets:
            raise RuntimeError(f"no programs for packets: {loaded.packets_error}")
        self.programs = loaded.generation.programs
        self.maps = Maps(loaded.generation.maps, loaded.generation.programs)
        self.planner = take_over(self.maps, packets=True)
        self.configure()

    def on_node(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """Calls it inside the node's network namespace."""
        return self._thread.submit(work, *arguments).result()

    def ip(self, commands: str) -> None:
        """Lines for ip(8), one command each."""
        text = "\n".join(line.strip() for line in commands.strip().splitlines())
        done = self.on_node(
            lambda: subprocess.run(
                ["ip", "-batch", "-"], input=text, capture_output=True, text=True
            )
        )
        assert not done.returncode, f"{done.stderr}\n{text}"

    def sysctl(self, name: str, value: str) -> None:
        path = Path("/proc/sys") / name
        self.on_node(lambda: path.write_text(value))

    def index(self, device: str) -> int:
        return self.on_node(socket.if_nametoindex, device)

    # -- what the agent writes -----------------------------------------------------------------

    def configure(self, **changed: int) -> None:
        """Writes packet_settings: SETTINGS with these changes."""
        values = SETTINGS | changed
        pack = _layouts["packet_settings"].packer(*values)
        self.map("packet_settings").update(bytes(4), pack(*values.values()))

    def serve_device(
        self,
        name: str,
        flags: Iterable[str],
        addresses: Iterable[str],
        mac: str = "00:00:00:00:00:00",
        **more: int,
    ) -> None:
        """Puts a device into `devices`, with the node's addresses for what goes out there. Without
        a `mac` XDP takes frames to any."""
        families = {":" in text: to_address(text) for text in addresses}
        pack = _layouts["device"].packer("flags", "lower", "vlan", "mac", "ipv4", "ipv6")
        value = pack(
            sum(_constants[flag] for flag in flags), more.get("lower", 0), more.get("vlan", 0),
            bytes.fromhex(mac.replace(":", "")),
            families.get(False, bytes(16)), families.get(True, bytes(16)),
        )  # fmt: skip
        self.devices[name] = self.index(name)
        self.map("devices").update(struct.pack("=I", self.devices[name]), value)
        if more.get("vlan"):
            key = struct.pack("=II", more["lower"], more["vlan"])
            self.map("vlans").update(key, struct.pack("=I", self.devices[name]))

    def map(self, name: str) -> bpf.Map:
        return self.maps.map(name)

    def set(self, name: str, *entries: Entry) -> None:
        """Makes these the frontends of one Service; without entries it goes."""
        ref = Ref("Service", "default", name)
        self._services[ref] = entries
        self._apply(self.planner.update({ref: entries}))
        assert not self.planner.unplaced, self.planner.unplaced

    def replace(self, services: dict[str, tuple[Entry, ...]]) -> None:
        """Makes these all the Services there are."""
        self._services = {Ref("Service", "default", name): e for name, e in services.items()}
        self._apply(self.planner.replace(self._services))
        assert not self.planner.unplaced, self.planner.unplaced

    def _apply(self, plan: Any) -> None:
        apply(plan, self.maps)
        if plan.garbage:
            self.maps.wait_for_readers()
            self.planner.reclaim(plan.garbage)

    # -- packets -------------------------------------------------------------------------------

    def program(self, hook: str) -> int:
        if hook not in self._programs:
            self._programs[hook] = bpf.obj_get(self.programs / hook)
        return self._programs[hook]

    def run(
        self,
        frame: bytes,
        hook: str = "xdp_ingress",
        device: str = "eth0",
        segment: int = 0,
        *,
        summed: bool = False,
    ) -> Outcome:
        """One frame through one program, as if `device` had it; `segment` and `summed` as test_run
        has them."""
        program, index = self.program(hook), self.devices.get(device) or self.index(device)
        xdp = hook.startswith("xdp")
        return self.on_node(
            lambda: test_run(program, frame, index, xdp=xdp, segment=segment, summed=summed)
        )

    # -- state ---------------------------------------------------------------------------------

    def flows(self) -> list[Flow]:
        """Every direction of every flow."""
        return [
            _flow(key, value, name == "flows")
            for name in ("flows", "flows_new")
            for key, value in self.map(name).items()
        ]

    def counts(self) -> dict[str, int]:
        """packet_counters by name, summed over all CPUs."""
        source, cpus = self.map("packet_counters"), bpf.possible_cpus()
        found = {}
        for number, name in _VERDICTS.items():
            raw = source.lookup(struct.pack("=I", number), 8 * cpus) or bytes(8 * cpus)
            found[name] = sum(struct.unpack(f"={cpus}Q", raw))
        return found

    def ways(self) -> list[int]:
        """When each entry's way is asked for again: ns of CLOCK_MONOTONIC, 0 if it never was."""
        at = _layouts["flow"].field("way").offset + _layouts["way"].field("until").offset
        return [
            struct.unpack_from("=Q", value, at)[0]
            for name in ("flows", "flows_new")
            for _, value in self.map(name).items()
        ]

    def forget(self) -> None:
        """Empties what packets left behind."""
        for name in _STATE:
            state = self.map(name)
            for key in [key for key, _ in state.items()]:
                state.delete(key)
        self.forget_recent()
        # How many errors this second has seen: a test must not pay for the one before it.
        told = map_of(self.program("xdp_ingress"), "icmp_budget")
        told.update(bytes(4), bytes(told.info.value_size * bpf.possible_cpus()))
        told.close()
        self.configure()

    def forget_recent(self) -> None:
        """As if WAY_LIFE had passed."""
        recent = bpf.Array(self.map("recent"))
        recent.write(0, bytes(recent.stride * recent.entries))
        recent.close()

    def age(self, seconds: float) -> None:
        """Makes all flows look as if nothing had come for so long."""
        at = _layouts["flow"].field("seen").offset
        for name in ("flows", "flows_new"):
            state = self.map(name)
            for key, value in list(state.items()):
                (seen,) = struct.unpack_from("=Q", value, at)
                aged = bytearray(value)
                struct.pack_into("=Q", aged, at, max(0, seen - int(seconds * 1e9)))
                state.update(key, bytes(aged))

    def sweep(self) -> int:
        """How many flows were over and are deleted."""
        keys = [key for name in ("flows", "flows_new") for key, _ in self.map(name).items()]
        for number, key in enumerate(keys):
            self.map("sweep_keys").update(struct.pack("=I", number), key)
        return bpf.run(self.program("sweep"), struct.pack("=I", len(keys)).ljust(64, b"\0"))

    def close(self) -> None:
        for fd in self._programs.values():
            os.close(fd)
        self._programs.clear()
        if hasattr(self, "maps"):
            self.maps.close()
        if self.root.is_dir():
            self.pins.unload()
            shutil.rmtree(self.root, ignore_errors=True)
        self._thread.shutdown()  # the namespace goes with its thread, its devices with it


def tuple_key(source: tuple[str, int], destination: tuple[str, int], proto: int) -> bytes:
    """A key of `flows`."""
    return _pack_tuple(
        to_address(source[0]), to_address(destination[0]),
        socket.htons(source[1]), socket.htons(destination[1]), proto,
    )  # fmt: skip
