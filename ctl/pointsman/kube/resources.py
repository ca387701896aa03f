"""Which objects are asked for, where, and by which selectors. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pointsman.objects import Ref

PROXY_NAME = "service.kubernetes.io/service-proxy-name"
HEADLESS = "service.kubernetes.io/headless"
SERVICE_NAME = "kubernetes.io/service-name"


@dataclass(frozen=True, slots=True)
class Resource:
    """A resource of the API. `root` is "/api/v1" or "/apis/GROUP/VERSION". An `optional` one may be
    missing from the server; a server may refuse the field selector if `fields_may_lack`. Services
    are served also without the right to see a `spare` one: kube-proxy's account lacks some."""

    kind: str
    plural: str
    root: str = "/api/v1"
    labels: str = ""
    fields: str = ""
    namespaced: bool = True
    optional: bool = False
    fields_may_lack: bool = False
    spare: bool = False

    @property
    def path(self) -> str:
        """Of all objects, in all namespaces."""
        return f"{self.root}/{self.plural}"

    @property
    def group(self) -> str:
        """As RBAC wants it: "" for core."""
        return self.root.removeprefix("/apis/").rpartition("/")[0] if "/apis/" in self.root else ""

    @property
    def selectors(self) -> dict[str, str]:
        """The part of the query that says which objects."""
        found = {"labelSelector": self.labels, "fieldSelector": self.fields}
        return {name: text for name, text in found.items() if text}

    def object_path(self, ref: Ref) -> str:
        place = f"namespaces/{ref.namespace}/" if self.namespaced else ""
        return f"{self.root}/{place}{self.plural}/{ref.name}"

    def without_fields(self) -> Resource:
        return replace(self, fields="", fields_may_lack=False)


def resources(
    *,
    node_name: str,
    proxy_name: str,
    with_cidrs: bool,
    with_headless: bool,
    with_others: bool = False,
) -> tuple[Resource, ...]:
    """What an agent on this node watches. Slices of Services that another proxy serves are among
    it: with the label gone the Service must be served at once. The selectors are kube-proxy's
    (cmd/kube-proxy/app/server.go), and it may be `proxy_name` that our Services must carry."""
    mine = f"{PROXY_NAME}={proxy_name}" if proxy_name else f"!{PROXY_NAME}"
    slices = SERVICE_NAME if with_headless else f"{SERVICE_NAME},!{HEADLESS}"
    found = [
        Resource(
            "Service",
            "services",
            labels="" if with_others else mine if with_headless else f"{mine},!{HEADLESS}",
            fields="" if with_headless else "spec.clusterIP!=None",
            fields_may_lack=not with_headless,
        ),
        Resource("EndpointSlice", "endpointslices", "/apis/discovery.k8s.io/v1", labels=slices),
        Resource("Node", "nodes", namespaced=False),
        Resource("Pod", "pods", fields=f"spec.nodeName={node_name}", spare=True),
        Resource("Namespace", "namespaces", namespaced=False, spare=True),
    ]
    if with_cidrs:
        root = "/apis/networking.k8s.io/v1"
        found.append(
            Resource(
                "ServiceCIDR", "servicecidrs", root, namespaced=False, optional=True, spare=True
            )
        )
    return tuple(found)
