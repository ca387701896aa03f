"""Folds events into what is known now, and says what is touched. Pure: no I/O.

With Pods among the objects (the manifests source) it also does the work of Kubernetes' endpoints
controller and of its ClusterIP allocator; an API server's objects come with both done.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TypeVar

from msgspec.structs import replace

from pointsman.choice import Kept, kept, settle
from pointsman.clusterip import ClusterIPs
from pointsman.endpoints import endpoint_slices, selects
from pointsman.events import Changed, Listed, Problem
from pointsman.hostports import has_host_ports
from pointsman.nodes import zone_of
from pointsman.objects import (
    EndpointSlice,
    Namespace,
    Node,
    Object,
    Pod,
    Ref,
    Service,
    ServiceCIDR,
)
from pointsman.optout import ANNOTATION

ServiceKey = tuple[str, str]  # namespace, name
_NOTHING = Kept("", {})
_Annotated = TypeVar("_Annotated", Service, EndpointSlice, Pod)


class Tracker:
    """The objects by name. `fold` returns the refs of what is to be resolved again: Services, Pods
    that have hostPorts or may be opted out, Nodes and Namespaces.

    `cluster_ips`: None when an API server hands out the addresses, and controllers beside it make
    the EndpointSlices. `kept`: what `Tracker.kept` was when the agent last ran.
    """

    def __init__(
        self, cluster_ips: ClusterIPs | None = None, kept: Mapping[Ref, Kept] = {}
    ) -> None:
        self._cluster_ips = cluster_ips
        self._remembered = dict(kept)
        self.kept: dict[Ref, Kept] = {}
        self._annotation_problems: dict[Ref, tuple[Problem, ...]] = {}
        #: As written, and as served: with ClusterIPs filled in, and annotations that count.
        self._written: dict[Ref, Service] = {}
        self.services: dict[Ref, Service] = {}
        self._slices: dict[Ref, EndpointSlice] = {}
        self._slices_of: dict[ServiceKey, set[Ref]] = defaultdict(set)
        self.pods: dict[Ref, Pod] = {}
        self.nodes: dict[Ref, Node] = {}
        self.namespaces: dict[Ref, Namespace] = {}
        self.service_cidrs: dict[Ref, ServiceCIDR] = {}
        self._zones: dict[str, str] = {}  # by node name, where there is one
        self._pods_in: dict[str, dict[Ref, Pod]] = defaultdict(dict)
        # One label of each selector, to find the Services that a Pod may belong to.
        self._selecting: dict[tuple[str, str, str], set[Ref]] = defaultdict(set)
        self._made: dict[Ref, tuple[EndpointSlice, ...]] = {}
        self._problems: dict[Ref, tuple[Problem, ...]] = {}
        self.listed = False

    # -- reading -----------------------------------------------------------------------------

    def slices(self, ref: Ref) -> list[EndpointSlice]:
        """The EndpointSlices of a Service: written ones and those made from Pods."""
        written = self._slices_of.get((ref.namespace, ref.name), ())
        return [*self._made.get(ref, ()), *(self._slices[slice_ref] for slice_ref in written)]

    def find(self, ref: Ref) -> Object | None:
        """The object of this name, a Service as it was written; None if there is none."""
        for known in (
            self._written, self._slices, self.pods, self.nodes, self.namespaces, self.service_cidrs
        ):  # fmt: skip
            if found := known.get(ref):
                return found
        return None

    @property
    def cidrs(self) -> tuple[str, ...]:
        """Of all ServiceCIDRs."""
        return tuple(sorted({c for each in self.service_cidrs.values() for c in each.spec.cidrs}))

    @property
    def problems(self) -> list[Problem]:
        found = (*self._problems.values(), *self._annotation_problems.values())
        return [problem for problems in found for problem in problems]

    def counts(self) -> dict[str, int]:
        """How many objects of each kind are known; of the last three only if there are any."""
        found = {
            "Service": len(self.services),
            "EndpointSlice": len(self._slices),
            "Pod": len(self.pods),
        }
        rest = {
            "Node": len(self.nodes),
            "Namespace": len(self.namespaces),
            "ServiceCIDR": len(self.service_cidrs),
        }
        return found | {kind: count for kind, count in rest.items() if count}

    # -- folding -----------------------------------------------------------------------------

    def fold(self, event: Listed | Changed) -> set[Ref]:
        """Takes the event in; the refs of what may differ now."""
        if isinstance(event, Changed):
            return self._apply(event.objects, event.deleted)
        present = {obj.ref for obj in event.objects}
        known = (
            *self._written, *self._slices, *self.pods,
            *self.nodes, *self.namespaces, *self.service_cidrs,
        )  # fmt: skip
        if self._cluster_ips is not None and not self._written:
            # In one go, so that the oldest claim wins and not the first in the list.
            self._cluster_ips.assign_all(o for o in event.objects if isinstance(o, Service))
        touched = self._apply(event.objects, [ref for ref in known if ref not in present])
        self.listed = True
        self._remembered.clear()
        return touched

    def _apply(self, objects: Iterable[Object], deleted: Iterable[Ref]) -> set[Ref]:
        touched: set[Ref] = set()
        rewritten: list[Service] = []
        remake: set[Ref] = set()
        moved: set[str] = set()  # names of nodes whose zone may differ
        for ref in deleted:
            if ref.kind == "Service":
                self._drop_service(ref, touched)
            elif ref.kind == "EndpointSlice":
                self._drop_slice(ref, touched)
            elif ref.kind == "Pod":
                self._drop_pod(ref, touched, remake)
            elif ref.kind == "Node":
                if self.nodes.pop(ref, None):
                    touched.add(ref)
                    moved.add(ref.name)
            elif self.namespaces.pop(ref, None) or self.service_cidrs.pop(ref, None):
                touched.add(ref)
        for obj in objects:
            if isinstance(obj, Service):
                if self._written.get(obj.ref) != obj:
                    rewritten.append(obj)
            elif isinstance(obj, EndpointSlice):
                self._put_slice(obj, touched)
            elif isinstance(obj, Pod):
                self._put_pod(obj, touched, remake)
            elif isinstance(obj, Node):
                if self.nodes.get(obj.ref) != obj:
                    self.nodes[obj.ref] = obj
                    touched.add(obj.ref)
                    moved.add(obj.metadata.name)
            elif isinstance(obj, ServiceCIDR):
                if self.service_cidrs.get(obj.ref) != obj:
                    self.service_cidrs[obj.ref] = obj
                    touched.add(obj.ref)
            elif self.namespaces.get(obj.ref) != obj:
                self.namespaces[obj.ref] = obj
                touched.add(obj.ref)
        if moved:
            self._move(moved, remake)
        for service in rewritten:
            self._put_service(service)
        assigned = self._assign(service.ref for service in rewritten)
        touched |= assigned
        for ref in remake | assigned:
            if ref in self.services and self._remake(ref):
                touched.add(ref)
        return touched

    def _settle(self, obj: _Annotated, before: _Annotated | None) -> _Annotated:
        """With the annotations that count; what they were `before` stays where one is bad now."""
        ref, meta = obj.ref, obj.metadata
        known = self._remembered.get(ref, _NOTHING)
        if before:
            known = Kept(before.metadata.uid, before.metadata.annotations)
        annotations, problems = settle(ref, meta.annotations, known.for_uid(meta.uid))
        if problems:
            self._annotation_problems[ref] = problems
        else:
            self._annotation_problems.pop(ref, None)
        self._keep(ref, Kept(meta.uid, kept(meta.annotations, annotations)))
        if annotations is meta.annotations:
            return obj
        return replace(obj, metadata=replace(meta, annotations=annotations))

    def _keep(self, ref: Ref, last: Kept) -> None:
        if not last.annotations:
            last = _NOTHING
        if last != self.kept.get(ref, _NOTHING):
            self.kept = {key: value for key, value in self.kept.items() if key != ref}
            if last.annotations:
                self.kept[ref] = last

    def _forget(self, ref: Ref) -> None:
        self._annotation_problems.pop(ref, None)
        self._keep(ref, _NOTHING)

    def _put_service(self, service: Service) -> None:
        ref = service.ref
        self._unindex(ref)
        self._written[ref] = service
        for label in list((service.spec.selector or {}).items())[:1]:
            self._selecting[ref.namespace, *label].add(ref)

    def _assign(self, refs: Iterable[Ref]) -> set[Ref]:
        """Fills in the ClusterIPs, also of the Services that had waited for one that is free now;
        all Services that may have others than before."""
        assigned: set[Ref] = set()
        # Who waits goes first; what was just deleted may be all that they waited for.
        pending = [*dict.fromkeys((*self._due(), *refs))]
        while pending:
            for ref in pending:
                service = self._written.get(ref)
                if service is None:
                    continue
                found: list[Problem] = []
                if self._cluster_ips is not None:
                    service, found = self._cluster_ips.assign(service)
                self.services[ref] = self._settle(service, self.services.get(ref))
                self._note(ref, found)
                assigned.add(ref)
            pending = [*self._due()]
        return assigned

    def _due(self) -> tuple[Ref, ...]:
        return self._cluster_ips.due() if self._cluster_ips else ()

    def _note(self, ref: Ref, problems: Iterable[Problem]) -> None:
        found = tuple(problems)
        if found:
            self._problems[ref] = found
        else:
            self._problems.pop(ref, None)

    def _unindex(self, ref: Ref) -> None:
        old = self._written.get(ref)
        for label in list(((old.spec.selector if old else None) or {}).items())[:1]:
            self._selecting[ref.namespace, *label].discard(ref)

    def _drop_service(self, ref: Ref, touched: set[Ref]) -> None:
        if ref not in self._written:
            return
        self._unindex(ref)
        del self._written[ref]
        self.services.pop(ref, None)
        self._made.pop(ref, None)
        self._problems.pop(ref, None)
        self._forget(ref)
        touched.add(ref)
        if self._cluster_ips is not None:
            self._cluster_ips.release(ref)

    def _put_slice(self, piece: EndpointSlice, touched: set[Ref]) -> None:
        before = self._slices.get(piece.ref)
        piece = self._settle(piece, before)
        if before == piece:
            return
        self._unlink_slice(piece.ref, touched)
        self._slices[piece.ref] = piece
        if piece.service:
            self._slices_of[piece.metadata.namespace, piece.service].add(piece.ref)
            touched.add(Ref("Service", piece.metadata.namespace, piece.service))

    def _drop_slice(self, ref: Ref, touched: set[Ref]) -> None:
        self._unlink_slice(ref, touched)
        self._forget(ref)

    def _unlink_slice(self, ref: Ref, touched: set[Ref]) -> None:
        old = self._slices.pop(ref, None)
        if old is None or not old.service:
            return
        key = (old.metadata.namespace, old.service)
        self._slices_of[key].discard(ref)
        if not self._slices_of[key]:
            del self._slices_of[key]
        touched.add(Ref("Service", *key))

    def _put_pod(self, pod: Pod, touched: set[Ref], remake: set[Ref]) -> None:
        before = self.pods.get(pod.ref)
        pod = self._settle(pod, before)
        if before == pod:
            return
        self._unlink_pod(pod.ref, touched, remake)
        self.pods[pod.ref] = pod
        self._pods_in[pod.ref.namespace][pod.ref] = pod
        remake |= self._selectors_of(pod)
        if self._concerns_sockets(pod):
            touched.add(pod.ref)

    def _drop_pod(self, ref: Ref, touched: set[Ref], remake: set[Ref]) -> None:
        self._unlink_pod(ref, touched, remake)
        self._forget(ref)

    def _unlink_pod(self, ref: Ref, touched: set[Ref], remake: set[Ref]) -> None:
        old = self.pods.pop(ref, None)
        if old is not None:
            del self._pods_in[ref.namespace][ref]
            remake |= self._selectors_of(old)
            if self._concerns_sockets(old):
                touched.add(ref)

    def _concerns_sockets(self, pod: Pod) -> bool:
        """Whether it has hostPorts, or may be opted out. A Namespace that comes to say so later is
        touched itself."""
        if ANNOTATION in pod.metadata.annotations or has_host_ports(pod):
            return True
        namespace = self.namespaces.get(Ref("Namespace", "", pod.metadata.namespace))
        return namespace is not None and ANNOTATION in namespace.metadata.annotations

    def _move(self, names: set[str], remake: set[Ref]) -> None:
        """Takes in the zones of nodes; the hints of Services with pods there follow them."""
        moved = set()
        for name in names:
            node = self.nodes.get(Ref("Node", "", name))
            zone = zone_of(node) if node else ""
            if zone != self._zones.get(name, ""):
                moved.add(name)
                if zone:
                    self._zones[name] = zone
                else:
                    del self._zones[name]
        if moved:
            for pod in self.pods.values():
                if pod.spec.node_name in moved:
                    remake |= self._selectors_of(pod)

    def _selectors_of(self, pod: Pod) -> set[Ref]:
        namespace = pod.metadata.namespace
        found: set[Ref] = set()
        for label in pod.metadata.labels.items():
            for ref in self._selecting.get((namespace, *label), ()):
                if selects(self._written[ref], pod):
                    found.add(ref)
        return found

    def _remake(self, ref: Ref) -> bool:
        """Makes the Service's EndpointSlices from the Pods; whether they changed."""
        if self._cluster_ips is None:
            return False
        service = self.services[ref]
        pods = self._pods_in.get(ref.namespace, {}).values() if service.spec.selector else ()
        made = endpoint_slices(service, pods, self._zones)
        if made == self._made.get(ref, ()):
            return False
        self._made[ref] = made
        return True
