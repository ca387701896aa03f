"""What a test puts into a cluster: a namespace of Kubernetes with pods and Services."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.cluster.api import Api, Object
from tests.cluster.kubelet import Kubelet
from tests.cluster.plane import ControlPlane
from tests.cluster.pods import DRAIN, Pod
from tests.cluster.waiting import wait_for
from tests.support.kernel import until


class Service(NamedTuple):
    """`ip` is its first address, `ips` are all. Its ports are in `thing`, the object itself."""

    name: str
    ip: str
    ips: tuple[str, ...]
    thing: Object

    def ip_of(self, family: int) -> str:
        """The address of family 4 or 6."""
        return next(ip for ip in self.ips if (":" in ip) == (family == 6))

    def node_port(self, port: str = "tcp") -> int:
        ports = self.thing["spec"]["ports"]
        return int(next(p["nodePort"] for p in ports if p.get("name", "") == port))


class Space:
    """A namespace of Kubernetes with what a test has in it."""

    def __init__(self, plane: ControlPlane, kubelet: Kubelet, namespace: str) -> None:
        self.api: Api = plane.admin
        self.namespace = namespace
        self._kubelet = kubelet
        self.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
        wait_for(
            lambda: self.api.find("ServiceAccount", "default", namespace=namespace),
            f"the ServiceAccount default in {namespace}",
            120,  # its controller waits long before it asks again what it was refused
            logs=partial(plane.tail, "kube-controller-manager"),
        )

    # -- pods --------------------------------------------------------------------------------

    def deploy(
        self,
        name: str,
        replicas: int = 1,
        port: int = 8080,
        *,
        ports: Sequence[Object] | None = None,
        labels: dict[str, str] | None = None,
        annotations: dict[str, str] | None = None,
        node: str = "",
        zone: str = "",
        drain: bool = False,
        command: Sequence[str | Path] | None = None,
        wait: bool = True,
        **spec: object,
    ) -> list[Pod]:
        """Pods NAME-0, NAME-1, … with the label app=NAME, one number for TCP and UDP (ports "tcp"
        and "udp"); numbers that exist are passed over, so that a second call adds more. The
        scheduler spreads them over the nodes that `node` and `zone` leave. `drain`: see Pod."""
        there = {
            thing["metadata"]["name"] for thing in self.api.list("Pod", namespace=self.namespace)
        }
        names = [n for i in range(len(there) + replicas) if (n := f"{name}-{i}") not in there]
        wanted = {"kubernetes.io/hostname": node, "topology.kubernetes.io/zone": zone}
        container: Object = {"name": "main", "image": "test", "ports": ports or _ports(port)}
        if command:
            container["command"] = list(map(str, command))
        all_labels = {"app": name, **(labels or {})}
        marks = {**({DRAIN: "true"} if drain else {}), **(annotations or {})}
        for made in names[:replicas]:
            self.api.create(
                {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {"name": made, "labels": all_labels, "annotations": marks},
                    "spec": {
                        "nodeSelector": {k: v for k, v in wanted.items() if v},
                        "topologySpreadConstraints": [_spread(name)],
                        "containers": [container],
                        **spec,
                    },
                },
                self.namespace,
            )
        return self.wait_pods(names[:replicas]) if wait else []

    def wait_pods(self, names: Iterable[str]) -> list[Pod]:
        """Those of these names, once they serve."""
        wanted = list(names)

        def serving() -> dict[str, Pod]:
            return {p.name: p for p in self._running() if p.ready.is_set()}

        wait_for(lambda: set(wanted) <= set(serving()), f"{wanted} to serve", logs=self._events)
        found = serving()
        return [found[name] for name in wanted]

    def pods(self, app: str) -> list[Pod]:
        """Those that run with the label app, by name."""
        found = [p for p in self._running() if p.labels.get("app") == app and p.ready.is_set()]
        return sorted(found, key=lambda pod: pod.name)

    def _running(self) -> list[Pod]:
        return [p for p in list(self._kubelet.pods.values()) if p.namespace == self.namespace]

    def _events(self) -> str:
        found = self.api.list("Event", namespace=self.namespace)
        return "\n".join(f"{e['reason']}: {e['message']}" for e in found[-10:])

    # -- Services ----------------------------------------------------------------------------

    def service(
        self,
        name: str,
        port: int = 80,
        target: int | str = 8080,
        *,
        ports: Sequence[Object] | None = None,
        labels: dict[str, str] | None = None,
        annotations: dict[str, str] | None = None,
        **spec: object,
    ) -> Service:
        """A Service for app=NAME, one number for TCP and UDP (ports "tcp" and "udp"), of both
        families; `spec` is as in the API: type="NodePort", selector=None for none."""
        metadata = {"name": name, "labels": labels or {}, "annotations": annotations or {}}
        both = [
            {"name": p.lower(), "protocol": p, "port": port, "targetPort": target}
            for p in ("TCP", "UDP")
        ]
        all_of = {
            "selector": {"app": name},
            "ports": list(ports or both),
            "ipFamilyPolicy": "PreferDualStack",
            **spec,
        }
        thing = {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": all_of}
        (made,) = self.api.apply(thing, namespace=self.namespace)
        ips = tuple(made["spec"].get("clusterIPs", ()))
        return Service(name, ips[0] if ips else "", ips, made)

    def slices(self, service: str) -> list[Object]:
        """Its EndpointSlices, as the controller wrote them."""
        return self.api.list(
            "EndpointSlice",
            "discovery.k8s.io/v1",
            self.namespace,
            labels=f"kubernetes.io/service-name={service}",
        )

    def endpoints(self, service: str) -> dict[str, dict[str, Any]]:
        """Address → what its slice says of it."""
        return {
            address: endpoint
            for found in self.slices(service)
            for endpoint in found.get("endpoints") or ()
            for address in endpoint["addresses"]
        }

    def wait_endpoints(self, service: str, pods: Iterable[Pod]) -> None:
        """Until these are exactly the ready ones in the slices."""
        families = self.api.get("Service", service, namespace=self.namespace)["spec"]["ipFamilies"]
        wanted = {
            address
            for pod in pods
            for family, address in zip(("IPv4", "IPv6"), pod.addresses, strict=True)
            if family in families
        }

        def ready() -> set[str]:
            found = self.endpoints(service).items()
            return {address for address, endpoint in found if endpoint["conditions"].get("ready")}

        until(lambda: ready() == wanted, f"the endpoints {wanted} of {service}")

    # -- anything ----------------------------------------------------------------------------

    def apply(self, *things: Object | str) -> list[Object]:
        """Objects or YAML, into this namespace if they say none."""
        return self.api.apply(*things, namespace=self.namespace)

    def patch(self, kind: str, name: str, change: Object, version: str = "v1") -> Object:
        return self.api.patch(kind, name, change, version, self.namespace)

    def delete(self, kind: str, name: str, version: str = "v1") -> bool:
        return self.api.delete(kind, name, version, self.namespace)

    def close(self) -> None:
        """Deletes the namespace; returns when its pods' processes have ended."""
        pods = self._running()
        # The namespace's controller takes its time, and the next test may claim the same addresses.
        for kind in ("Service", "Pod"):
            path = self.api.path(kind, namespace=self.namespace)
            self.api.request("DELETE", path, gracePeriodSeconds=0)
        for pod in pods:
            until(pod.gone.is_set, f"the end of {pod}")
        self.api.delete("Namespace", self.namespace)


def _ports(port: int) -> list[Object]:
    return [{"name": p.lower(), "protocol": p, "containerPort": port} for p in ("TCP", "UDP")]


def _spread(app: str) -> Object:
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "nodeTaintsPolicy": "Honor",
        "labelSelector": {"matchLabels": {"app": app}},
    }
