"""The node of `world` with its Services, on which packets are tried."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from scapy.packet import Packet

from pointsman import abi
from pointsman.values import TCP, UDP, Entry, Frontend, Outside, PortName, to_address
from tests.kernel.packets.world import (
    EMPTY,
    ETH1_MAC,
    FAMILIES,
    FAR,
    FAR_MAC,
    GATEWAY_MAC,
    GUEST_MAC,
    LOCAL,
    LOST,
    MANY,
    NARROW,
    NARROW_PORT,
    NODE_MAC,
    NONE_LOCAL,
    ONLY_LOCAL,
    OTHER_MAC,
    POD_MAC,
    RANGED,
    REMOTE,
    STICKY,
    TARGET,
    V4,
    V6,
    VLAN,
    Family,
)
from tests.support.packetlab import PacketLab
from tests.support.packets import NO_FRAME, Outcome

_T = TypeVar("_T")
VLAN_DEVICE = "eth0.5"
_C = abi.constants()
HERE, ELSEWHERE = _C["SLOT_HERE"], _C["SLOT_ELSEWHERE"]
_OUTSIDE, _LOCAL, _RANGES = (
    _C["PACKETS_OUTSIDE"],
    _C["PACKETS_LOCAL"],
    _C["PACKETS_RANGES"],
)
_UNREACHABLE, _NODE_PORT, _NODE = (
    _C["EMPTY_UNREACHABLE"],
    _C["SERVICE_NODE_PORT"],
    _C["SERVICE_NODE"],
)


def make_network(lab: PacketLab) -> None:
    """The devices, addresses, routes and neighbours of `world`."""
    lab.sysctl("net/ipv4/ip_forward", "1")
    lab.sysctl("net/ipv6/conf/all/forwarding", "1")
    # Not every kernel has VLAN devices: another device stands for the one of eth0, whose address
    # it has. The programs know by the maps alone that frames of it have a tag.
    macs = {"eth0": NODE_MAC, VLAN_DEVICE: NODE_MAC, "eth1": ETH1_MAC}
    for device in ("eth0", "eth1", VLAN_DEVICE, "pod0", "guest0"):
        end, mac = f"x{device}", macs.get(device, POD_MAC)
        lab.ip(f"link add {device} address {mac} type veth peer name {end}")
        lab.sysctl(f"net/ipv6/conf/{end}/disable_ipv6", "1")
        lab.ip(f"link set {end} up\nlink set {device} up")
    for f in FAMILIES:
        nodad = "nodad" if f is V6 else ""
        narrow, wide = (24, 32) if f is V4 else (64, 128)

        def net(address: str, bits: int = narrow, version: int = f.version) -> str:
            if version == 4:
                return address.rsplit(".", 1)[0] + f".0/{bits}"
            return address.rsplit("::", 1)[0] + f"::/{bits}"

        lab.ip(
            f"""address add {f.node}/{narrow} dev eth0 {nodad}
            address add {f.node1}/{narrow} dev eth1 {nodad}
            address add {f.node5}/{narrow} dev {VLAN_DEVICE} {nodad}
            neigh add {f.gateway} lladdr {GATEWAY_MAC} dev eth0 nud permanent
            neigh add {f.other} lladdr {OTHER_MAC} dev eth0 nud permanent
            neigh add {f.far_node} lladdr {FAR_MAC} dev eth1 nud permanent
            neigh add {f.neighbour} lladdr {GATEWAY_MAC} dev {VLAN_DEVICE} nud permanent
            neigh add {f.peer} lladdr {OTHER_MAC} dev {VLAN_DEVICE} nud permanent
            neigh add {f.local} lladdr {GUEST_MAC} dev pod0 nud permanent
            neigh add {f.guest} lladdr {GUEST_MAC} dev guest0 nud permanent
            route add default via {f.gateway} dev eth0
            route add {net(f.remote)} via {f.other} dev eth0
            route add {net(f.far)} via {f.far_node} dev eth1
            route add {net(f.narrow)} via {f.other} dev eth0 mtu lock {NARROW}
            route add {f.local}/{wide} dev pod0
            route add {f.guest}/{wide} dev guest0"""
        )
        hole = f.other[:-2] + "12"
        lab.ip(f"route add {net(f.lost)} via {hole} dev eth0")
    serve_devices(lab)
    for device in ("eth0", "eth1"):
        lab.ip(f"link set dev {device} xdpdrv pinned {lab.programs / 'xdp_ingress'}")


def serve_devices(lab: PacketLab) -> None:
    """What the agent would write into `devices`."""
    out = ("DEVICE_NODE", "DEVICE_XDP")
    lab.serve_device("eth0", out, (V4.node, V6.node))
    lab.serve_device("eth1", out, (V4.node1, V6.node1))
    tagged = {"lower": lab.index("eth0"), "vlan": VLAN}
    lab.serve_device(VLAN_DEVICE, out, (V4.node5, V6.node5), **tagged)
    lab.serve_device("guest0", ("DEVICE_POD",), (V4.node, V6.node))


@dataclass(frozen=True, slots=True)
class Choice:
    """The endpoints behind one port, and what a policy makes of them."""

    members: tuple[tuple[str, int], ...] = ()  # address, SLOT_…
    flags: int = _OUTSIDE
    empty: int = 0
    affinity: int = 0
    all: tuple[tuple[str, int], ...] | None = None  # for inside clients, if other ones
    weights: tuple[int, ...] = ()  # of `members`, which are in order


def entries(f: Family, name: str, port: int, choice: Choice, *addresses: str) -> list[Entry]:
    """A port of a Service, TCP and UDP, at these addresses."""

    def packed(members: tuple[tuple[str, int], ...]) -> tuple[tuple[tuple[bytes, int], ...], ...]:
        found = sorted(((to_address(a), TARGET), where) for a, where in members)
        return tuple(b for b, _ in found), tuple(w for _, w in found)

    inside, places = packed(choice.members if choice.all is None else choice.all)
    outside = packed(choice.members)
    made = []
    for address in addresses:
        for protocol in (TCP, UDP):
            owner = PortName("default", name, "tcp" if protocol == TCP else "udp")
            limited = choice.flags & _RANGES
            bits = f.welcome[1] + (96 if f is V4 else 0)
            made.append(
                Entry(
                    Frontend(to_address(address), port, protocol),
                    owner,
                    inside,
                    algorithm=_C["CHOICE_WEIGHTED"] if choice.weights else 0,
                    weights=choice.weights,
                    affinity=choice.affinity,
                    flags=_NODE_PORT if address == f.any else 0,
                    places=places,
                    outside=Outside(
                        *outside,
                        choice.empty,
                        choice.flags,
                        ((to_address(f.welcome[0]), bits),) if limited else (),
                        choice.weights,
                    )
                    if choice.flags
                    else None,
                )
            )
    return made


def node_port(f: Family, port: int, choice: Choice) -> tuple[Entry, ...]:
    """A NodePort, and the same port - 30000 at both load balancers' addresses."""
    name = f"{f!r}-{port}".lower()
    return (
        *entries(f, name, port, choice, f.any),
        *entries(f, name, port - 30000, choice, f.vip, f.vip2),
    )


def choices(f: Family) -> dict[int, Choice]:
    remote, local = (f.remote, ELSEWHERE), (f.local, HERE)
    many = tuple((f"{f.remote}{i}", ELSEWHERE) for i in range(5))
    return {
        REMOTE: Choice((remote,)),
        LOCAL: Choice((local,)),
        FAR: Choice(((f.far, ELSEWHERE),)),
        NARROW_PORT: Choice(((f.narrow, ELSEWHERE),)),
        LOST: Choice(((f.lost, ELSEWHERE),)),
        EMPTY: Choice(),
        ONLY_LOCAL: Choice((local,), _OUTSIDE | _LOCAL, all=(local, remote)),
        NONE_LOCAL: Choice((), _OUTSIDE | _LOCAL, _UNREACHABLE, all=(remote,)),
        MANY: Choice(many),
        STICKY: Choice(many, affinity=600),
    }


def services() -> dict[str, tuple[Entry, ...]]:
    """All Services of the world."""
    found: dict[str, tuple[Entry, ...]] = {}
    for f in FAMILIES:
        for port, choice in choices(f).items():
            found[f"{f!r}-{port}".lower()] = node_port(f, port, choice)
        limited = Choice(((f.remote, ELSEWHERE),), _OUTSIDE | _RANGES)
        ranged = f"{f!r}-ranged".lower()
        found[ranged] = tuple(entries(f, ranged, RANGED, limited, f.vip))
        cluster = f"{f!r}-cluster".lower()
        inside = Choice(((f.remote, ELSEWHERE),), 0)
        own = Choice(((f.guest, HERE),), 0)
        found[cluster] = (
            *entries(f, cluster, 80, inside, f.cluster_ip),
            *entries(f, cluster, 81, own, f.cluster_ip),
            *entries(f, cluster, 82, Choice(((f.local, HERE),), 0), f.cluster_ip),
            Entry(Frontend(to_address(f.cluster_ip), 0, 0), PortName("default", cluster, "tcp")),
        )
        nodes = PortName("", "node/here", "")
        found[f"{f!r}-nodes".lower()] = tuple(
            Entry(Frontend(to_address(address), 0, 0), nodes, flags=_NODE)
            for address in (f.node, f.node1, f.node5)
        )
    return found


XDP, INGRESS, EGRESS = "xdp_ingress", "tc_ingress", "tc_egress"


class Node:
    """The lab with the world in it; what a test changes is put back by `reset`."""

    def __init__(self, lab: PacketLab) -> None:
        self.lab = lab
        self._services = services()
        self._changed = False
        make_network(lab)
        lab.replace(self._services)

    def reset(self) -> None:
        self.lab.forget()
        if self._changed:
            self.lab.replace(self._services)
            self._changed = False

    def within(self, seconds: float, work: Callable[[], _T]) -> _T:
        """What `work` gives if it takes no longer by the clock: a machine may stand still for
        seconds, while flows grow old. Then it is tried again, without flows."""
        for _ in range(20):
            began = time.monotonic()
            found = work()
            if time.monotonic() - began < seconds:
                return found
            self.reset()
        raise AssertionError("the machine is too slow")

    def set(self, name: str, *given: Entry) -> None:
        """Changes a Service until the end of the test."""
        self._changed = True
        self.lab.set(name, *given)

    def serve(self, f: Family, port: int, *members: tuple[str, int], **more: object) -> None:
        """Changes what is behind a NodePort until the end of the test."""
        choice = Choice(members, **more)  # type: ignore[arg-type]
        self.set(f"{f!r}-{port}".lower(), *node_port(f, port, choice))

    def offer(self, frame: bytes, hook: str = XDP, device: str = "eth0") -> Outcome | None:
        """None where the kernel itself takes no such frame: it is too short for a test run."""
        try:
            return self.lab.run(frame, hook, device)
        except OSError as error:
            if error.errno not in NO_FRAME:
                raise
            return None

    def send(
        self, packet: Packet | bytes, hook: str = XDP, device: str = "eth0", segment: int = 0
    ) -> Outcome:
        return self.lab.run(bytes(packet), hook, device, segment)


def name_of(prefix: str) -> str:
    return f"{prefix}_{os.getpid()}"
