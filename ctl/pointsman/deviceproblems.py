"""What an operator should know of the devices that are served, and how to mend it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pointsman.devices import (
    AUTO,
    NO_ADDRESS,
    NO_FRAMES,
    NODE,
    Choice,
    Device,
    Packets,
    Seen,
    Served,
    Surrounding,
    loses_tags,
    may_run_xdp,
    servable,
)
from pointsman.events import Problem
from pointsman.values import Address, to_text

_REASON = "DeviceNotServed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of attaching to one device. `xdp`: "native", "generic", "none"; `tc`: "tcx",
    "clsact", "none". Faults are the kernel's words, "" where it has none. `foreign`: the id of
    another's XDP program that is in the way."""

    served: Served
    xdp: str = "none"
    tc: str = "none"
    xdp_fault: str = ""
    tc_fault: str = ""
    foreign: int = 0

    @property
    def works(self) -> bool:
        """Whether what comes in there is served by one program at least. Of a device that only
        carries VLANs nothing but XDP is wanted, and they have TC."""
        return not self.served.flags or self.xdp != "none" or self.tc != "none"


def rows(choice: Choice, outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """For the status file: one row a device, also of those that could not be served."""
    found: list[dict[str, object]] = []
    for each in outcomes:
        served = each.served
        faults = [fault for fault in (each.xdp_fault, each.tc_fault) if fault]
        found.append(
            {
                "name": served.device.name,
                "ifindex": served.device.index,
                "role": _role(served),
                "xdp": each.xdp,
                "tc": each.tc,
                "addresses": [to_text(address) for address in served.addresses],
                "vlan": served.vlan,
                "served": each.works,
                "problems": faults,
            }
        )
    for name, why in sorted(choice.unserved.items()):
        found.append(
            {
                "name": name,
                "ifindex": 0,
                "role": "node",
                "xdp": "none",
                "tc": "none",
                "addresses": [],
                "vlan": 0,
                "served": False,
                "problems": [why],
            }
        )
    return found


def _role(served: Served) -> str:
    if served.flags & NODE:
        return "node"
    return "pod" if served.flags else "carrier"  # of VLANs, itself not served


def problems(
    packets: Packets,
    seen: Seen,
    around: Surrounding,
    choice: Choice,
    outcomes: Sequence[Outcome],
) -> tuple[Problem, ...]:
    """All of them; errors are what was asked for by name and is not in force."""
    if not packets.wanted:
        return ()
    found = [*choice.problems, *_ports(packets, seen, around), *_tags(packets, seen, choice)]
    for name, why in sorted(choice.unserved.items()):
        found.append(
            Problem(
                f"packets from outside are not served there: {why}",
                "it is served as soon as it can be; or take it out of --devices",
                object=_object(name),
                # A pattern may be meant for what is to come.
                severity="warning" if set(name) & set("*?[") else "error",
                reason=_REASON,
            )
        )
    for each in outcomes:
        found += _of(packets, each)
    if not packets.named:
        found = [replace(p, severity="warning") if p.reason == _REASON else p for p in found]
    return tuple(found)


def unserved_ways(
    ways: Mapping[Address, tuple[int, Address]],
    endpoints: Collection[Address],
    seen: Seen,
    choice: Choice,
) -> tuple[Problem, ...]:
    """Devices that lead to other nodes and are not served: an endpoint's reply that comes in there
    is not translated. `ways`: (ifindex, next hop) by address, of a node or one of `endpoints`."""
    served = {one.device.index for one in choice.served if one.flags & NODE}
    if not served:
        return ()
    devices = {one.index: one for one in seen.devices if not one.loopback}
    found: dict[int, Address] = {}
    for address, (index, _) in sorted(ways.items(), key=lambda way: way[0] not in endpoints):
        if index in devices and index not in served:
            found.setdefault(index, address)
    return tuple(_unserved_way(devices[i], a, a in endpoints) for i, a in sorted(found.items()))


def _unserved_way(device: Device, address: Address, is_endpoint: bool) -> Problem:
    who = "endpoints on other nodes" if is_endpoint else "other nodes"
    message = f"{who}, such as {to_text(address)}, are behind it, and it is not served: "
    if servable(device):
        mend = f"name it with --devices, too: '…,{device.name}'"
    else:
        mend = (
            f"it can't be ({NO_FRAMES}): have pods routed without it, use "
            "externalTrafficPolicy: Local, or leave clients outside to kube-proxy (--devices none)"
        )
    return Problem(
        message + "their replies are not translated there",
        mend,
        object=_object(device.name),
        severity="error" if is_endpoint else "warning",
    )


def _object(name: str) -> str:
    return f"device {name}"


def _ports(packets: Packets, seen: Seen, around: Surrounding) -> Iterator[Problem]:
    first, last = packets.snat_ports
    for (low, high), whose, mend in (
        (seen.local_ports, "net.ipv4.ip_local_port_range", "change that sysctl"),
        (around.node_ports, "the NodePorts", "see --node-port-range"),
    ):
        if low <= last and first <= high:
            yield Problem(
                f"--snat-ports {first}-{last} overlap {low}-{high} of {whose}: replies to this "
                "node's own connections may be taken for those of clients",
                f"choose other ports, or {mend}",
                severity="warning",
            )


def _tags(packets: Packets, seen: Seen, choice: Choice) -> Iterator[Problem]:
    """Devices that take VLAN tags off before XDP: `auto` leaves them, and their VLANs, to TC."""
    concerned = {one.lower or one.device.index for one in choice.served if one.flags & NODE}
    for device in seen.devices:
        if device.index not in concerned or not loses_tags(device, seen):
            continue
        if packets.xdp_mode == AUTO:
            message = "packets are served at TC instead, for more CPU time"
        else:
            message = (
                "what is for a VLAN is not served by XDP, or as if it were for the device itself"
            )
        if packets.xdp_mode != "none" and may_run_xdp(device, packets):
            yield Problem(
                f"VLAN tags are taken off before XDP sees them; {message}",
                f"run 'ethtool -K {device.name} rxvlan off'",
                object=_object(device.name),
                severity="warning",
            )


def _of(packets: Packets, outcome: Outcome) -> Iterator[Problem]:
    served = outcome.served
    device, name = served.device, _object(served.device.name)
    if not outcome.works:
        faults = "; ".join(filter(None, (outcome.xdp_fault, outcome.tc_fault)))
        mend = "it is tried again when the device changes; see the agent's log"
        yield Problem(f"it is not served: {faults}", mend, object=name, reason=_REASON)
        return
    if served.xdp and outcome.xdp == "none":
        yield _without_xdp(packets, outcome)
    elif served.xdp and device.lro:
        yield Problem(
            "LRO is on: the device joins packets before XDP sees them, and what it joined can't be "
            "forwarded",
            f"run 'ethtool -K {device.name} lro off'",
            object=name,
            severity="warning",
        )
    if served.tc and outcome.tc == "none":
        yield Problem(
            f"replies of endpoints on this node are not translated: {outcome.tc_fault}",
            "load the kernel's sch_ingress and cls_bpf, or use Linux 6.6 or newer",
            object=name,
            reason=_REASON,
        )
    if not served.flags & NODE:
        return
    if not served.addresses:
        yield Problem(
            "it has no address, so endpoints on other nodes are not reached from there",
            "give it one, or take it out of --devices",
            object=name,
            severity="warning",
        )
    for address, forwards, setting in (
        (served.ipv4, device.forwards[0], "net.ipv4.ip_forward"),
        (served.ipv6, device.forwards[1], "net.ipv6.conf.all.forwarding"),
    ):
        if address != NO_ADDRESS and not forwards:
            yield Problem(
                f"what comes in there is not forwarded to pods: {setting} is off",
                f"run 'sysctl -w {setting}=1'",
                object=name,
                severity="warning",
            )


def _without_xdp(packets: Packets, outcome: Outcome) -> Problem:
    name = outcome.served.device.name
    if outcome.foreign:
        message = f"another XDP program (id {outcome.foreign}) is attached"
        mend = (
            f"detach it ('ip link set dev {name} xdp off', or end what attached it), or choose "
            "--xdp-mode none"
        )
    elif packets.xdp_mode == "generic":
        message, mend = f"no XDP: {outcome.xdp_fault}", "choose --xdp-mode none"
    else:
        message = f"no native XDP: {outcome.xdp_fault}"
        mend = "use a driver that has it, or choose --xdp-mode none to leave it at that"
    if outcome.served.tc:
        message += "; packets are served at TC instead, for more CPU time"
    asked = packets.xdp_mode != AUTO
    return Problem(message, mend, object=_object(name), severity="error" if asked else "warning")
