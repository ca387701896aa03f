"""CoreDNS in a pod, behind the Service kube-dns, as installers set it up."""

from __future__ import annotations

from pathlib import Path

from demo.lab import Lab, Place
from tests.cluster.clients import Client
from tests.cluster.plane import ControlPlane
from tests.cluster.pods import Pod
from tests.cluster.space import Space
from tests.support.kernel import until

_COREFILE = """
.:53 {{
    errors
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        kubeconfig {kubeconfig} test
        ttl 0
    }}
    loadbalance
}}
"""
_RULES = """
apiVersion: v1
kind: ServiceAccount
metadata: {name: coredns}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: system:coredns}
rules:
  - {apiGroups: [""], resources: [services, namespaces], verbs: [list, watch]}
  - {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: system:coredns}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: system:coredns}
subjects: [{kind: ServiceAccount, name: coredns, namespace: kube-system}]
"""


class Dns:
    """`ips` are the addresses of kube-dns; `domain` is the cluster's."""

    ip, ips, domain = "10.96.0.10", ("10.96.0.10", "fd00:96::a"), "cluster.local"
    pods: list[Pod]

    def __init__(self, lab: Lab, plane: ControlPlane, program: Path) -> None:
        self._lab, self._plane, self._program = lab, plane, program
        self._files: Path | None = None

    def start(self, space: Space) -> None:
        space.apply(_RULES)
        until(
            lambda: space.api.find("ServiceAccount", "coredns", namespace="kube-system"),
            "the ServiceAccount coredns",
        )
        token = self._plane.service_account_token("kube-system", "coredns", 24 * 3600)
        kubeconfig = self._plane.kubeconfig("coredns", token=token)
        corefile = self._lab.directory / "Corefile"
        corefile.write_text(_COREFILE.format(kubeconfig=kubeconfig))
        space.service("kube-dns", 53, 53, clusterIP=self.ip, clusterIPs=list(self.ips))
        self.pods = space.deploy(
            "kube-dns",
            port=53,
            command=[self._program, "-conf", corefile],
            serviceAccountName="coredns",
        )
        space.wait_endpoints("kube-dns", self.pods)

    def files(self, client: Client) -> Path:
        """For `Client.run(…, files=…)`: a mount namespace with a pod's resolv.conf, whose
        nameserver is kube-dns. One for all clients."""
        if self._files is None:
            place = Place(client.place.network, client.place.cgroup)
            self._files = self._lab.resolver(place, self.ip, self.domain).files
        assert self._files
        return self._files
