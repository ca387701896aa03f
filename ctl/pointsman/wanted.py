"""What the maps should say, object by object: the rules for each kind, put together. Pure."""

from __future__ import annotations

from pointsman.context import Context
from pointsman.events import Problem
from pointsman.hostports import has_host_ports, host_port_entries
from pointsman.nodes import node_entries, node_problems
from pointsman.objects import Ref, Service
from pointsman.resolve import (
    HEADLESS_LABEL,
    cluster_addresses,
    is_balanced,
    local_vips,
    resolve,
)
from pointsman.topology import categorize
from pointsman.tracker import Tracker
from pointsman.values import Entry, is_ipv4


def node_ref(context: Context) -> Ref:
    """Stands for the entries of all nodes' addresses. There need not be such an object."""
    return Ref("Node", "", context.node_name)


def resolve_ref(
    ref: Ref, tracker: Tracker, context: Context
) -> tuple[tuple[Entry, ...], tuple[Problem, ...]]:
    """The entries of one object, and what can't be served; none if it is gone, or has none."""
    if ref.kind == "Service" and (service := tracker.services.get(ref)):
        return resolve(service, tracker.slices(ref), context)
    if ref.kind == "Pod" and (pod := tracker.pods.get(ref)):
        return host_port_entries(pod, context)
    if ref == node_ref(context):
        return node_entries(context), node_problems(context)
    return (), ()


def without_local(service: Service, tracker: Tracker, context: Context) -> frozenset[str]:
    """The traffic policies, "internal" and "external", that keep this node from serving a port of
    the Service, though it has endpoints elsewhere."""
    spec = service.spec
    policies = {
        policy
        for policy, value in (
            ("internal", spec.internal_traffic_policy),
            ("external", spec.external_traffic_policy),
        )
        if value == "Local"
    }
    if not policies or not is_balanced(service, context.policy.proxy_name):
        return frozenset()
    slices = [p for p in tracker.slices(service.ref) if HEADLESS_LABEL not in p.metadata.labels]
    families = {"IPv4" if is_ipv4(address) else "IPv6" for address in cluster_addresses(service)}
    for port in spec.ports:
        for family in families:
            choice = categorize(slices, family, port.name, port.protocol, context)
            if choice.exist and not choice.local:
                return frozenset(policies)
    return frozenset()


def all_refs(tracker: Tracker, context: Context) -> list[Ref]:
    """Every object that may have entries."""
    pods = (ref for ref, pod in tracker.pods.items() if has_host_ports(pod))
    return [*tracker.services, *pods, node_ref(context)]


def affected(tracker: Tracker, before: Context, after: Context) -> set[Ref]:
    """What is to be resolved again when this node, its neighbours or the policy have changed."""
    if before == after:
        return set()
    if any(
        getattr(before, name) != getattr(after, name)
        for name in ("policy", "node_name", "refused_cidrs")
    ):
        return {*all_refs(tracker, after), node_ref(before)}
    refs = {node_ref(after)}
    if before.zone != after.zone:
        refs.update(tracker.services)
    moved = {*before.local_addresses, *before.own_addresses} ^ {
        *after.local_addresses,
        *after.own_addresses,
    }
    # An own address may have become a device's: the union is the same, and ClusterIPs differ.
    moved |= before.local_addresses ^ after.local_addresses
    if moved:
        refs.update(service.ref for service in local_vips(tracker.services.values(), moved))
        refs.update(ref for ref, pod in tracker.pods.items() if has_host_ports(pod))
    return refs
