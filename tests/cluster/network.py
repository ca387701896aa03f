"""The cluster's network: routed namespaces that lead to each other and nowhere else.

    plane 192.0.2.1, 2001:db8::1 ── a bridge ──┬── node 1: 192.0.2.11, 2001:db8::11
                                               └── …   └── pods 10.244.1.0/24, fd00:244:0:1::/64

A pod hangs on its node by a veth pair and a route, without a bridge: what a pod sends passes its
node's IP layer even if a pod of the same node is meant, as kube-proxy needs it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

from demo.lab import Lab

POD_CIDRS = ("10.244.0.0/16", "fd00:244::/48")
SERVICE_CIDRS = ("10.96.0.0/16", "fd00:96::/112")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_home = threading.local()


class Addresses(NamedTuple):
    """One of each family."""

    v4: str
    v6: str


PLANE = Addresses("192.0.2.1", "2001:db8::1")


@contextmanager
def inside(namespace: Path) -> Iterator[None]:
    """This thread, and it alone, is in that network namespace. Sockets made there stay there."""
    with Path("/proc/thread-self/ns/net").open() as home, namespace.open() as there:
        _setns(there.fileno())
        try:
            yield
        finally:
            _setns(home.fileno())


class Site:
    """A node's place in the network: its namespace, addresses and range for pods."""

    def __init__(self, number: int, namespace: Path) -> None:
        self.number, self.namespace = number, namespace
        self.addresses = Addresses(f"192.0.2.{10 + number}", f"2001:db8::{10 + number}")
        self.pod_cidrs = (f"10.244.{number}.0/24", f"fd00:244:0:{number:x}::/64")
        self.gateway = self._pod(1)
        self._free = count(2)
        self._lock = threading.Lock()

    def plug_pod(self, namespace: Path) -> Addresses:
        """Joins a pod's namespace to the node; its addresses, which no pod had before."""
        with self._lock:
            number = next(self._free)
        addresses, port = self._pod(number), f"pod{number}"
        ip(
            self.namespace,
            f"link add {port} type veth peer name eth0 netns {namespace.name}",
            f"addr add {self.gateway.v4}/32 dev {port}",
            f"addr add {self.gateway.v6}/128 dev {port} nodad",
            f"link set {port} up",
            *(f"route add {address} dev {port}" for address in addresses),
        )
        ip(
            namespace,
            f"addr add {addresses.v4}/32 dev eth0",
            f"addr add {addresses.v6}/128 dev eth0 nodad",
            "link set eth0 up",
            *(f"route add {address} dev eth0" for address in self.gateway),
            *(f"route add default via {address}" for address in self.gateway),
        )
        return addresses

    def _pod(self, number: int) -> Addresses:
        assert number < 255, "a node has addresses for 253 pods in all"
        return Addresses(
            f"10.244.{self.number}.{number}", f"fd00:244:0:{self.number:x}::{number:x}"
        )


class Network:
    """The control plane's namespace with the bridge, and the nodes on it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.plane = namespace(lab, "plane")
        lab.bridge(self.plane, "nodes", f"{PLANE.v4}/24")
        ip(self.plane, f"addr add {PLANE.v6}/64 dev nodes nodad")
        self.sites: list[Site] = []

    def add_site(self, name: str) -> Site:
        """A namespace on the bridge, with routes to and from all pods."""
        new = Site(len(self.sites) + 1, namespace(self.lab, name))
        self.lab.plug(new.namespace, f"{new.addresses.v4}/24", into=self.plane, bridge="nodes")
        with inside(new.namespace):
            for switch in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                Path("/proc/sys/net", switch).write_text("1")
        ip(
            new.namespace,
            f"addr add {new.addresses.v6}/64 dev eth0 nodad",
            # A ClusterIP must have a way before it is translated; the plane forwards nothing.
            *(f"route add default via {address}" for address in PLANE),
        )
        ip(self.plane, *_routes(new))
        for old in self.sites:
            ip(old.namespace, *_routes(new))
            ip(new.namespace, *_routes(old))
        self.sites.append(new)
        return new


def namespace(lab: Lab, role: str) -> Path:
    """A network namespace whose IPv6 addresses can be used at once."""
    made = lab.namespace(role)
    with inside(made):
        Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0")
    return made


def remove(namespace: Path) -> None:
    """Its veth pairs go with it."""
    subprocess.run(["ip", "netns", "delete", namespace.name], check=True, capture_output=True)


def ip(namespace: Path, *lines: str) -> None:
    """Commands of ip(8) in a namespace, all or none. Names the one that failed."""
    text = "".join(f"{line}\n" for line in lines)
    command = ["ip", "-n", namespace.name, "-batch", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip -n {namespace.name}: {done.stderr.strip()}; of:\n{text}")


def _routes(site: Site) -> list[str]:
    pairs = zip(site.pod_cidrs, site.addresses, strict=True)
    return [f"route add {cidr} via {address}" for cidr, address in pairs]


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
