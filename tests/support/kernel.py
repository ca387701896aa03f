"""The real programs on the real kernel, in a child cgroup and namespaces of the test's own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pointsman import abi, host
from pointsman.dump import Place, first_place, more_places
from pointsman.maps import Maps, apply, take_over
from pointsman.objects import Ref
from pointsman.pins import Loaded, Pins, Sizes
from pointsman.values import (
    TCP,
    UDP,
    Backend,
    Entry,
    Frontend,
    PortName,
    endpoint_text,
    to_address,
)

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
LINUX = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
#: Before 5.12 all records are in the overflow map, and a namespace has a quarter of it.
SMALL = Sizes(services=1024, slots=2048, endpoints=1024, buckets=1024, overflow=1024)
_libc = ctypes.CDLL(None, use_errno=True)
#: What connect() and sendto() raise when programs refuse: the helper that says more is of 5.18.
REFUSED: type[OSError] = ConnectionRefusedError if LINUX >= (5, 18) else PermissionError


def of_this_kernel(error: str) -> str:
    """The errno, by name, that a refused caller gets here in the place of this one."""
    return error if LINUX >= (5, 18) or not error else "EPERM"


#: How programs are attached beside XDP.
TC = "tcx" if LINUX >= (6, 6) else "clsact"


def lacking() -> str:
    """What this machine lacks for kernel tests, "" if nothing."""
    if os.geteuid() != 0:
        return "root"
    if not host.mounts("cgroup2"):
        return "a mounted cgroup2"
    try:
        import bcc  # noqa: F401
    except ImportError:
        return "bcc (python3-bpfcc)"
    return ""


def needs_linux(major: int, minor: int, what: str) -> None:
    """Skips on an older kernel; tests/vm/skips.py believes it there only."""
    if (major, minor) > LINUX:
        pytest.skip(f"needs Linux {major}.{minor} ({what})")


def needs_cpus() -> None:
    """Skips where two programs can't run at once."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU")


def unshare(flags: int) -> None:
    if _libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def own_network() -> None:
    """This process gets a network namespace with nothing but loopback: no way out for a VIP."""
    unshare(CLONE_NEWNET)
    # Every pod address is local here, as all of 127.0.0.0/8 is.
    lines = ["link set lo up", "route add local 10.244.0.0/16 dev lo"]
    lines += [f"addr add fd00:244::{number}/128 dev lo nodad" for number in range(1, 10)]
    subprocess.run(
        ["ip", "-batch", "-"], input="\n".join(lines), check=True, capture_output=True, text=True
    )
    # Who dials one endpoint without a pause has used all ports within seconds, and waits for old
    # connections to be forgotten. The kernel's default, 2, takes them only at 127.0.0.0/8 and ::1.
    Path("/proc/sys/net/ipv4/tcp_tw_reuse").write_text("1\n")


class Cgroup:
    """A child cgroup, with this process in it until `close`."""

    def __init__(self, name: str) -> None:
        self.path = host.cgroup_root() / name
        self.path.mkdir(exist_ok=True)
        before = next(
            line.split(":", 2)[2]
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::")
        )
        self._before = host.cgroup_root() / before.lstrip("/")

    def enter(self, pid: int | None = None) -> None:
        (self.path / "cgroup.procs").write_text(str(pid or os.getpid()))

    def leave(self, pid: int | None = None) -> None:
        (self._before / "cgroup.procs").write_text(str(pid or os.getpid()))

    def close(self) -> None:
        self.leave()
        for _ in range(100):
            with contextlib.suppress(OSError):
                for pid in (self.path / "cgroup.procs").read_text().split():
                    self.leave(int(pid))
                self.path.rmdir()
                return
            time.sleep(0.02)
        raise RuntimeError(f"{self.path} can't be removed")


class Lab:
    """Programs loaded and attached, with Services set straight into the maps."""

    def __init__(self, name: str, source: Path | None = None, sizes: Sizes = SMALL) -> None:
        self.root = Path("/sys/fs/bpf") / name
        host.mount_bpffs(self.root)
        self.cgroup = Cgroup(name)
        self.pins = Pins(self.root, sizes, source or abi.source_directory())
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> Loaded:
        """What an agent does: load, take over, fill, attach; also for an upgrade."""
        loaded = self.pins.load()
        inherited = None
        if loaded.previous and loaded.rebuilt:
            inherited = self.maps.snapshot()
        self.maps = Maps(loaded.generation.maps, loaded.generation.programs)
        self.planner = take_over(self.maps, inherited)
        self.loaded = loaded
        self._apply(self.planner.replace(getattr(self, "wanted", {})))
        return loaded

    wanted: dict[Ref, tuple[Entry, ...]]

    def attach(self) -> list[str]:
        changed = self.pins.attach(self.loaded.generation, self.cgroup.path)
        if self.loaded.previous:
            self.maps.wait_for_readers()
            self.maps.merge_load()
            self.loaded = replace(self.loaded, previous=None)
        self.pins.drop_others(self.loaded.generation)
        return changed

    def adopt(self) -> None:
        """Starts over from what the maps hold, after something else wrote them."""
        self.planner = take_over(self.maps)
        self.clear()

    def close(self) -> None:
        if hasattr(self, "maps"):
            self.maps.close()
        if self.root.is_dir():
            self.pins.unload()
            shutil.rmtree(self.root, ignore_errors=True)
        self.cgroup.close()

    def _apply(self, plan: Any) -> None:
        apply(plan, self.maps)
        if plan.garbage:
            self.maps.wait_for_readers()
            self.planner.reclaim(plan.garbage)

    # -- Services ----------------------------------------------------------------------------

    def set(self, name: str, *entries: Entry) -> None:
        """Makes these the frontends of one Service; without entries it goes."""
        self.wanted = {**getattr(self, "wanted", {}), Ref("Service", "default", name): entries}
        self._apply(self.planner.update({Ref("Service", "default", name): entries}))
        assert not self.planner.unplaced, self.planner.unplaced

    def serve(
        self, vip: str, port: int, protocol: int, *backends: tuple[str, int], name: str = "web"
    ) -> None:
        """A Service of one port, with the wildcard that refuses its other ports."""
        owner = PortName("default", name, "p")
        self.set(name, entry(vip, port, protocol, backends, owner), wildcard(vip, owner))

    def clear(self) -> None:
        self.wanted = {}
        self._apply(self.planner.replace({}))

    def endpoint_id(self, address: str, port: int) -> int:
        """The id of that backend in whatever set holds it."""
        wanted = (to_address(address), port)
        for element in self.maps.snapshot().services.values():
            for slot in self.maps.slots(element.first, element.count):
                if slot.backend == wanted:
                    return slot.endpoint
        raise LookupError(wanted)

    def open(self, address: str, port: int) -> int:
        """Open connections of a backend, as the kernel counts them."""
        return self.maps.load(self.endpoint_id(address, port))[1]

    def peer_of(self, cookie: int) -> str:
        """The endpoint that a socket was translated to, as its record says."""
        for owner, record in self._places():
            if owner == cookie:
                return endpoint_text(record["peer"], socket.ntohs(record["peer_port"]))
        raise LookupError(f"socket {cookie} has no record")

    def _places(self) -> Iterator[Place]:
        for name, read in (("sockets", first_place), ("sockets_more", more_places)):
            for _, value in self.maps.map(name).items():
                yield from read(value)
        overflow = abi.layouts()["overflow"]
        for key, value in self.maps.map("sockets_overflow").items():
            yield int.from_bytes(key, sys.byteorder), overflow.decode(value)["record"]

    def records(self) -> int:
        """Sockets that have a record."""
        found = sum(len(first_place(value)) for _, value in self.maps.map("sockets").items())
        found += sum(len(more_places(value)) for _, value in self.maps.map("sockets_more").items())
        return found + len(self.maps.map("sockets_overflow"))


def backend(address: str, port: int) -> Backend:
    return to_address(address), port


def entry(
    vip: str,
    port: int,
    protocol: int,
    backends: Iterable[tuple[str, int]],
    owner: PortName,
    **more: Any,
) -> Entry:
    members = tuple(sorted(backend(*b) for b in backends))
    return Entry(Frontend(to_address(vip), port, protocol), owner, members, **more)


def wildcard(vip: str, owner: PortName) -> Entry:
    return Entry(Frontend(to_address(vip), 0, 0), owner)


def until(
    condition: Callable[[], Any], what: str | Callable[[], str], seconds: float = 120.0
) -> None:
    """Waits for something that must come; never a measure of speed. `what` it was may depend on
    how far it has come."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"never came: {what() if callable(what) else what}")
        time.sleep(0.005)


@contextlib.contextmanager
def tcp_server(
    address: str = "127.0.0.1", protocol: int = 0
) -> Iterator[tuple[socket.socket, int]]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM, protocol) as server:
        server.bind((address, 0))
        server.listen(512)
        yield server, server.getsockname()[1]


@contextlib.contextmanager
def udp_server(address: str = "127.0.0.1") -> Iterator[tuple[socket.socket, int]]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as server:
        server.bind((address, 0))
        yield server, server.getsockname()[1]


def arrived(count: int, *servers: socket.socket) -> list[list[tuple[bytes, Any]]]:
    """So many datagrams with their senders, by the server that they came to. A busy kernel delivers
    at loopback, too, after the send has returned (ksoftirqd)."""
    found: list[list[tuple[bytes, Any]]] = [[] for _ in servers]

    def all_came() -> bool:
        for server, got in zip(servers, found, strict=True):
            with contextlib.suppress(BlockingIOError):
                while True:
                    got.append(server.recvfrom(2048, socket.MSG_DONTWAIT))
        return sum(map(len, found)) >= count

    until(all_came, lambda: f"{count} datagrams; {found}")
    return found


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python program of its own, in this process's cgroup and namespace."""
    return subprocess.Popen(
        [sys.executable, "-u", "-c", textwrap.dedent(code), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


__all__ = [
    "LINUX",
    "REFUSED",
    "SMALL",
    "TCP",
    "UDP",
    "Cgroup",
    "Lab",
    "arrived",
    "backend",
    "child",
    "entry",
    "lacking",
    "needs_linux",
    "of_this_kernel",
    "own_network",
    "run",
    "tcp_server",
    "udp_server",
    "unshare",
    "until",
    "wildcard",
]
