"""Which devices are served a packet at a time, and what the programs must know of each. Pure.

What the kernel makes of it, and what an operator should know of that, is in `deviceproblems`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from pointsman import abi
from pointsman.events import Problem
from pointsman.values import Address, is_ipv4

#: Among the names of devices: those with a default route, and `cluster_side`. Of modes: native, or
#: TC alone.
AUTO = "auto"
NODE, POD, RAW, XDP = (abi.constants()[f"DEVICE_{name}"] for name in ("NODE", "POD", "RAW", "XDP"))
NO_ADDRESS, NO_MAC = bytes(16), bytes(6)
#: Drivers that `auto` serves by TC alone. The first three hand over frames of senders on the same
#: machine (a pod, a guest, another Xen domain) whose checksum is left to hardware that never sees
#: them. TC knows which; XDP does not, and what it sends on is dropped for its checksum. What XDP
#: sends back on a veth is lost, too, while the other end has no program. (virtio_net is none of
#: these: for XDP it has the host compute checksums, and drops what comes without.) bonding runs XDP
#: in the name of its members, which are no devices of ours. Overlays have no XDP.
_TC_ALONE = frozenset(("veth", "tun", "vif", "bonding", "vxlan", "geneve"))
#: NETDEV_XDP_ACT_…: whether a driver's program may send to other devices; whether it takes that.
_REDIRECTS, _TAKES = 1 << 1, 1 << 2
_PAIRS = frozenset(("veth", "netkit"))  # how pods are joined to a node
NO_WAY_OUT = "no device has a default route, or an address of this Node"
FIND_A_WAY_OUT = (
    "add a default route, or give the Node object an InternalIP that is on a device, or name "
    "devices with --devices ('none' if nobody comes from outside)"
)
NO_FRAMES = "its frames are not Ethernet's, or it has no neighbours"  # gre, sit, ppp, dummy
_MAX_DEVICES = 256  # MAX_DEVICES, see Sizes


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds that a silent flow is remembered, as in struct packet_settings."""

    tcp_new: int = 60
    tcp_open: int = 86400
    tcp_closing: int = 10
    udp_new: int = 30
    udp_open: int = 120


@dataclass(frozen=True, slots=True)
class Packets:
    """What `up` was asked for about packets. `devices` and `pod_devices` are globs of names."""

    devices: tuple[str, ...] = ()
    pod_devices: tuple[str, ...] = ()
    xdp_mode: str = AUTO  # or "native", "generic", "none"
    dsr: bool = False
    #: Below what the kernel gives to connections of its own and below the NodePorts. That a daemon
    #: listens there does not matter: replies come from an endpoint's port, clients never do.
    snat_ports: tuple[int, int] = (1024, 29999)
    timeouts: Timeouts = field(default_factory=Timeouts)

    @property
    def wanted(self) -> bool:
        """Whether there are packet programs at all."""
        return bool(self.devices)

    @property
    def named(self) -> bool:
        """Whether any device was asked for by name. What hinders `auto`, which is the default, is
        a warning: the node may have nobody outside."""
        return self.wanted and (self.devices != (AUTO,) or bool(self.pod_devices))


@dataclass(frozen=True, slots=True)
class Device:
    """One device as the kernel tells it. `ethernet`: its frames are, and neighbours are asked for;
    `raw`: packets have no frame there (ipip, WireGuard, tun). `lower`: ifindex of what a VLAN
    device stands on, in this namespace, `vlan` its tag; `untags`: it takes tags off before XDP
    sees a frame; `xdp`: (mode, program id) of what is attached, ours too; `forwards`: whether
    IPv4, IPv6 that comes in there is forwarded. `mac` and `driver`: zeros and "" for none."""

    index: int
    name: str
    ethernet: bool = True
    raw: bool = False
    up: bool = True
    loopback: bool = False
    kind: str = ""
    lower: int = 0
    vlan: int = 0
    mtu: int = 1500
    xdp: tuple[tuple[str, int], ...] = ()
    lro: bool = False
    untags: bool = False
    mac: bytes = NO_MAC
    driver: str = ""
    forwards: tuple[bool, bool] = (True, True)


@dataclass(frozen=True, slots=True)
class Assigned:
    """An address on a device. `usable`: global, and neither tentative, deprecated nor temporary."""

    index: int
    address: Address
    usable: bool = True


@dataclass(frozen=True, slots=True)
class Route:
    """A default route's next hop: its device, the source address that it prefers, the gateway."""

    index: int
    ipv6: bool = False
    source: Address | None = None
    gateway: Address | None = None
    metric: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """The devices of a network namespace at one moment. `local_ports`: first and last port that
    the kernel gives to connections (net.ipv4.ip_local_port_range). `cluster`: see `cluster_side`,
    now or before."""

    devices: tuple[Device, ...] = ()
    addresses: tuple[Assigned, ...] = ()
    defaults: tuple[Route, ...] = ()
    local_ports: tuple[int, int] = (32768, 60999)
    cluster: frozenset[int] = frozenset()

    def carries(self, device: Device) -> bool:
        """Whether a VLAN's device stands on it."""
        return any(one.lower == device.index and one.vlan for one in self.devices)


@dataclass(frozen=True, slots=True)
class Surrounding:
    """What else decides: this node's own addresses, best first; those of other nodes; some of the
    endpoints there; the host's sides of pods without hooks, by ifindex, None until they are known;
    the ports of NodePorts."""

    own_addresses: tuple[Address, ...] = ()
    other_nodes: frozenset[Address] = frozenset()
    endpoints: frozenset[Address] = frozenset()
    pods: frozenset[int] | None = frozenset()
    node_ports: tuple[int, int] = (30000, 32767)


@dataclass(frozen=True, slots=True)
class Served:
    """One element of `devices`, and which programs run there. Addresses are 16 bytes, all zero for
    a family that the device has none of."""

    device: Device
    flags: int
    lower: int = 0
    vlan: int = 0
    ipv4: Address = NO_ADDRESS
    ipv6: Address = NO_ADDRESS
    xdp: bool = False
    tc: bool = True

    @property
    def addresses(self) -> tuple[Address, ...]:
        return tuple(each for each in (self.ipv4, self.ipv6) if each != NO_ADDRESS)


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to be served, sorted by ifindex; `unserved` are names that were asked for, and why
    they can't be."""

    served: tuple[Served, ...] = ()
    unserved: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


def choose(packets: Packets, seen: Seen, around: Surrounding) -> Choice:
    """The devices to serve among those that are there."""
    if not packets.wanted:
        return Choice()
    unserved: dict[str, str] = {}
    problems: list[Problem] = []
    flags: dict[int, int] = {}
    for device in _node_devices(packets, seen, unserved, problems):
        flags[device.index] = NODE
    for device in seen.devices:
        if device.loopback or not device.ethernet or device.index in flags:
            continue
        if device.index in (around.pods or ()) or _matches(device.name, packets.pod_devices):
            flags[device.index] = POD
    by_index = {device.index: device for device in seen.devices}
    served = {
        index: _served(by_index[index], flag, packets, seen, around)
        for index, flag in flags.items()
    }
    for each in [one for one in served.values() if one.flags & NODE and one.lower]:
        # Tagged frames come in below; what is not tagged there is none of ours.
        lower = by_index.get(each.lower)
        if lower and lower.index not in served and _runs_xdp(lower, packets, seen):
            served[lower.index] = Served(lower, 0, xdp=True, tc=False)
    kept = sorted(served.values(), key=lambda one: (not one.flags & NODE, one.device.index))
    for each in kept[_MAX_DEVICES:]:
        unserved[each.device.name] = f"there are more than {_MAX_DEVICES} devices"
    kept = sorted(kept[:_MAX_DEVICES], key=lambda one: one.device.index)
    return Choice(tuple(kept), unserved, tuple(problems))


def cluster_side(
    seen: Seen, around: Surrounding, ways: Mapping[Address, tuple[int, Address]]
) -> frozenset[int]:
    """The devices, by ifindex, that face the cluster: those with this Node's own addresses, and
    those that lead to other nodes or endpoints there, as overlays' do: replies come in by them.
    `ways`: (ifindex, next hop) by address.

    A pod's device may have this node's address, too (an unnumbered link), or lead to a pod that
    calls itself a node (virtual kubelets)."""
    pairs = {device.index for device in seen.devices if device.kind in _PAIRS}
    facing = {
        index for address, (index, _) in ways.items()
        if address in around.endpoints or index not in pairs
    }  # fmt: skip
    for own in around.own_addresses:
        having = {each.index for each in seen.addresses if each.address == own}
        if len(having) > 1:  # else it may be a pair: of a node that is a container itself
            having -= pairs
        facing |= having
    return frozenset(
        device.index
        for device in seen.devices
        if device.index in facing and servable(device) and not device.loopback
    ) - (around.pods or frozenset())


def vlans(served: Iterable[Served]) -> dict[tuple[int, int], int]:
    """The `vlans` map: (ifindex of the lower device, tag) → ifindex of the VLAN's device."""
    return {(one.lower, one.vlan): one.device.index for one in served if one.lower}


def _node_devices(
    packets: Packets, seen: Seen, unserved: dict[str, str], problems: list[Problem]
) -> Iterator[Device]:
    if packets.devices == (AUTO,):
        indexes = {route.index for route in seen.defaults}
        indexes |= seen.cluster
        found = [d for d in seen.devices if d.index in indexes and not d.loopback]
        if not found:
            problems.append(
                Problem(
                    f"packets from outside are not served: {NO_WAY_OUT}",
                    FIND_A_WAY_OUT,
                    severity="warning",
                )
            )
    else:
        found = [d for d in seen.devices if _matches(d.name, packets.devices)]
        for glob in packets.devices:
            if not any(fnmatchcase(device.name, glob) for device in found):
                unserved[glob] = "there is no such device"
    for device in found:
        if servable(device):
            yield device
        elif packets.devices != (AUTO,):
            unserved[device.name] = NO_FRAMES
        else:
            problems.append(
                Problem(
                    f"packets from outside are not served there: {NO_FRAMES}",
                    "name the devices that clients come by with --devices",
                    object=f"device {device.name}",
                    severity="warning",
                )
            )


def servable(device: Device) -> bool:
    return device.ethernet or device.raw


def _matches(name: str, globs: Collection[str]) -> bool:
    """The loopback device has to be named as it is: `*` is not meant to be all devices of all."""
    return any(fnmatchcase(name, glob) for glob in globs if name != "lo" or glob == "lo")


def _served(
    device: Device, flags: int, packets: Packets, seen: Seen, around: Surrounding
) -> Served:
    node = flags == NODE
    return Served(
        device,
        flags | RAW if device.raw else flags,
        lower=device.lower if device.vlan else 0,
        vlan=device.vlan,
        ipv4=_address(device, flags, seen, around, ipv6=False),
        ipv6=_address(device, flags, seen, around, ipv6=True),
        # A VLAN's device has no driver of its own: XDP runs on the one below.
        xdp=node and not device.vlan and _runs_xdp(device, packets, seen),
    )


def _runs_xdp(device: Device, packets: Packets, seen: Seen) -> bool:
    untouched = packets.xdp_mode == AUTO and loses_tags(device, seen)
    return may_run_xdp(device, packets) and not untouched


def may_run_xdp(device: Device, packets: Packets) -> bool:
    """Whether XDP is tried there, if nothing about VLANs is against it."""
    if packets.xdp_mode == AUTO:
        return device.driver not in _TC_ALONE and not device.raw
    return packets.xdp_mode != "none" and not device.raw


def loses_tags(device: Device, seen: Seen) -> bool:
    """Whether XDP there takes a VLAN's frames for the device's own. TC does not: it is told of a
    tag that was taken off."""
    return device.untags and seen.carries(device)


def targets(native: Collection[int], features: Mapping[int, int]) -> frozenset[int]:
    """The devices to which XDP may send what came in at another one, by ifindex: `native` have our
    program in their driver, `features` is what the kernel says that each can do."""
    if not all(features.get(index, 0) & _REDIRECTS for index in native):
        return frozenset()
    return frozenset(index for index in native if features[index] & _TAKES)


def aimed(one: Served, at: Collection[int]) -> Served:
    """As the programs are to know it, `at` being those that XDP may send to."""
    if one.flags & NODE and (one.lower or one.device.index) in at:
        return replace(one, flags=one.flags | XDP)
    return one


def _address(device: Device, flags: int, seen: Seen, around: Surrounding, *, ipv6: bool) -> Address:
    """This node's address for what goes out there: the Node's own if it is on that device, else the
    one that the default route prefers, else the first."""
    here = [
        each.address
        for each in seen.addresses
        if each.index == device.index and each.usable and is_ipv4(each.address) != ipv6
    ]
    for address in around.own_addresses:
        if address in here:
            return address
    everywhere = {each.address for each in seen.addresses}
    for route in sorted(seen.defaults, key=lambda route: route.metric):
        if route.index == device.index and route.ipv6 == ipv6 and route.source in everywhere:
            return route.source or NO_ADDRESS
    if not here and flags == POD:
        # Host's sides of pods often have none: any of this node's does as well.
        usable = (each.address for each in seen.addresses if each.usable)
        own = (address for address in around.own_addresses if address in everywhere)
        here = [address for address in (*own, *usable) if is_ipv4(address) != ipv6]
    return here[0] if here else NO_ADDRESS
