"""This node as the rules for Services see it, followed: its addresses, its labels and neighbours,
and the network namespaces of its pods that opted out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pointsman.context import Context
from pointsman.devices import Surrounding
from pointsman.events import Problem
from pointsman.netns import Inside
from pointsman.nodes import cluster_problems, context_of
from pointsman.objects import Ref
from pointsman.optout import opted_out
from pointsman.optouts import OptOuts
from pointsman.settings import Settings
from pointsman.tracker import Tracker
from pointsman.values import Address, to_address
from pointsman.wanted import affected, node_ref


@dataclass(frozen=True, slots=True)
class OptedOut:
    """Cookies of network namespaces, by the address of the pod that is in each; and the
    devices (ifindex) of this node that lead to them."""

    namespaces: Mapping[Address, int]
    devices: frozenset[int] = frozenset()


class Surroundings:
    """`put` gets an OptedOut from a thread of its own; everything else is called on the thread
    that owns the maps."""

    def __init__(self, settings: Settings, put: Callable[[OptedOut], None]) -> None:
        self._settings = settings
        #: None until the node's addresses are known: a VIP among them must never be translated.
        self._addresses: frozenset[Address] | None = None
        self._moved = False
        self._new = True  # the node itself was never resolved
        self.context = Context(settings.policy, settings.node_name)
        self._opt_out_problems: tuple[Problem, ...] = ()
        self._node_problems: tuple[Problem, ...] = ()
        self._wanted: frozenset[Address] = frozenset()
        self._found: Mapping[Address, int] | None = None
        self._devices: frozenset[int] | None = None  # until the first search for them has ended
        self._endpoints: Mapping[tuple[str, str], Address] = {}
        self._nodes: set[str] = set()
        self._around: tuple[tuple[object, ...], Surrounding] | None = None
        self._opt_outs = OptOuts(lambda found: put(_opted_out(found)))
        self.run, self.stop = self._opt_outs.run, self._opt_outs.stop

    @property
    def problems(self) -> tuple[Problem, ...]:
        return *self._node_problems, *self._opt_out_problems

    @property
    def known(self) -> bool:
        return self._addresses is not None

    @property
    def skipped(self) -> frozenset[int] | None:
        """The network namespaces whose sockets are left alone; None until that was found out, and
        what an agent before found holds."""
        return None if self._found is None else frozenset(self._found.values())

    @property
    def around(self) -> Surrounding:
        """What decides which devices are served, and how."""
        context, key = self.context, (self.context, self._devices, self._endpoints)
        if self._around and all(a is b for a, b in zip(self._around[0], key, strict=True)):
            return self._around[1]
        around = Surrounding(
            context.own_addresses,
            context.remote_addresses - context.local_addresses,
            frozenset(self._endpoints.values()) - context.local_addresses,
            self._devices,
            context.policy.node_port_range,
        )
        self._around = key, around
        return around

    def move(self, addresses: frozenset[Address]) -> None:
        """The node has these addresses now."""
        self._addresses = addresses
        self._moved = True

    def reconfigure(self, settings: Settings) -> None:
        """The operator wants another policy."""
        self._settings = settings
        self._moved = True

    def take(self, found: OptedOut) -> None:
        self._found, self._devices = found.namespaces, found.devices

    def follow(self, tracker: Tracker, touched: set[Ref]) -> set[Ref]:
        """To be called when objects were touched, or after `move`: what else is to be resolved
        again."""
        kinds = {ref.kind for ref in touched}
        more: set[Ref] = set()
        if self._moved or kinds & {"Node", "ServiceCIDR"}:
            before, settings = self.context, self._settings
            self.context = context_of(
                tracker.nodes.values(),
                settings.node_name,
                self._addresses or (),
                settings.policy,
                (settings.api and tracker.cidrs) or settings.service_cidrs,
            )
            more = affected(tracker, before, self.context)
            if settings.api and tracker.listed:
                self._node_problems = tuple(cluster_problems(self.context, tracker.nodes))
        if tracker.listed and (self._moved or kinds & {"Node", "Pod", "Namespace"}):
            self._wanted, self._opt_out_problems = opted_out(
                tracker.pods.values(), tracker.namespaces, self.context
            )
            self._opt_outs.want(self._wanted)
        if self._new and tracker.listed and self.known:
            more.add(node_ref(self.context))
            self._new = False
        self._moved = self._moved and not tracker.listed
        if self._settings.packets.wanted:
            self._look_beyond(tracker, touched)
        return more

    def _look_beyond(self, tracker: Tracker, touched: set[Ref]) -> None:
        """A pod of each family on each other node, the first that was seen: by them is found out
        which way the pods of other nodes are reached."""
        nodes = {ref.name for ref in tracker.nodes} - {self.context.node_name}
        known = {key: one for key, one in self._endpoints.items() if key[0] in nodes}
        # A node may be told of after the pods on it.
        refs = touched if nodes <= self._nodes else tracker.services.keys()
        self._nodes = nodes
        for ref in refs:
            for piece in tracker.slices(ref) if ref.kind == "Service" else ():
                for endpoint in piece.endpoints or ():
                    key = endpoint.node_name, piece.address_type
                    if key[0] not in nodes or key in known or piece.address_type == "FQDN":
                        continue
                    address = to_address(endpoint.addresses[0])
                    if address not in self.context.remote_addresses:  # what runs on the node itself
                        known[key] = address
        if known != self._endpoints:
            self._endpoints = known

    def status(self) -> dict[str, Any]:
        context = self.context
        return {
            "node": {
                "name": context.node_name,
                "zone": context.zone,
                "localAddresses": len(context.local_addresses),
                "remoteAddresses": len(context.remote_addresses),
                "serviceCIDRs": list(context.service_cidrs),
            },
            "optedOut": {
                "pods": len(self._wanted),
                "namespaces": len(self.skipped or ()),
                "waiting": len(self._wanted - (self._found or {}).keys()),
            },
        }


def _opted_out(found: Mapping[Address, Inside]) -> OptedOut:
    return OptedOut(
        {address: inside.cookie for address, inside in found.items()},
        frozenset(inside.device for inside in found.values() if inside.device),
    )
