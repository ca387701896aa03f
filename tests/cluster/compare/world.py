"""Random Services and EndpointSlices, and what happens to them. Pure; the seed decides all of it.

What the API server would refuse is avoided as far as it is cheap; `apply.py` makes anew what can't
be changed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Object = dict[str, Any]

ZONES = ("zone-1", "zone-2", "zone-3")
#: Where endpoints are; two of these have a proxy each.
NODES = ("node-a", "node-b", "node-c", "elsewhere")
FAMILIES = (["IPv4", "IPv6"], ["IPv6", "IPv4"], ["IPv4"], ["IPv6"])
SERVICE_NAME = "kubernetes.io/service-name"
HEADLESS = "service.kubernetes.io/headless"
PROXY_NAME = "service.kubernetes.io/service-proxy-name"
#: The label app of real pods, which Services with a selector choose.
APP = "web"
#: Few, so that some are claimed twice: nobody's, two nodes', the ClusterIP of a Service of
#: corners.yaml, an unused one of the service CIDR.
_EXTERNAL = {
    "IPv4": (
        *(f"198.51.100.{number}" for number in range(1, 8)),
        *("192.0.2.11", "192.0.2.12", "10.96.0.78", "10.96.0.200"),
    ),
    "IPv6": (
        *(f"2001:db8:5::{number}" for number in range(1, 8)),
        *("2001:db8::11", "2001:db8::12", "fd00:96::c8"),
    ),
}
_PORTS: tuple[Object, ...] = (
    {"name": "http", "protocol": "TCP", "port": 80, "targetPort": "http"},
    {"name": "dns", "protocol": "UDP", "port": 53, "targetPort": 8080},
    {"name": "dns-tcp", "protocol": "TCP", "port": 53, "targetPort": "http"},
    {"name": "sctp", "protocol": "SCTP", "port": 80, "targetPort": 8080},
)
_SOURCES = (
    ["203.0.113.0/24"],
    ["10.244.0.0/16"],
    ["192.0.2.0/24", "2001:db8::/32"],
    ["0.0.0.0/0"],
    ["fd00:244::/48"],
)


class World:
    """What the API server should have. `step` changes it in place."""

    def __init__(self, seed: int, size: int) -> None:
        self.random = Random(seed)
        self.services: dict[str, Object] = {}
        self.slices: dict[str, Object] = {}
        #: status.loadBalancer of Services.
        self.statuses: dict[str, Object] = {}
        self.zones: dict[str, str | None] = {"node-a": "zone-1", "node-b": "zone-1"}
        self._names = [f"s{number}" for number in range(size)]
        self._names[-1] = self._names[-1].ljust(61, "x")  # its slices have two letters more
        for name in self._names:
            self._service(name)
            self._slices(name)

    def step(self) -> None:
        """About a third of the Services, or their endpoints, or a node's zone become others."""
        for name in self.random.sample(self._names, len(self._names) // 3):
            self.random.choice(self._changes)(self, name)
        if self._chance(0.3):
            node = self.random.choice(list(self.zones))
            self.zones[node] = self.random.choice([*ZONES, None])

    # -- Services ----------------------------------------------------------------------------

    def _service(self, name: str) -> None:
        """New from scratch; the families stay in their order as the API wants it."""
        families = self.random.choice(FAMILIES)
        if name in self.services:
            known = self.services[name]["spec"].get("ipFamilies") or families
            families = self.random.choice([f for f in FAMILIES if f[0] == known[0]])
        spec: Object = {"ports": self._ports(), "ipFamilies": families}
        spec["ipFamilyPolicy"] = "RequireDualStack" if len(families) > 1 else "SingleStack"
        spec["type"] = self._any_of(
            {"ClusterIP": 35, "NodePort": 20, "LoadBalancer": 30, "Headless": 6, "ExternalName": 4}
        )
        self.statuses.pop(name, None)
        if spec["type"] == "ExternalName":
            spec = {"type": "ExternalName", "externalName": "example.invalid"}
        elif spec["type"] == "Headless":
            spec |= {"type": "ClusterIP", "clusterIP": "None"}
        else:
            self._vip(name, spec)
        if self._chance(0.15):
            spec["selector"] = {"app": APP}
        labels: Object = {PROXY_NAME: "other"} if self._chance(0.06) else {}
        if self._chance(0.05):
            labels[HEADLESS] = ""
        self.services[name] = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "labels": labels},
            "spec": spec,
        }

    def _vip(self, name: str, spec: Object) -> None:
        """The fields of a Service with a ClusterIP."""
        if self._chance(0.3):
            spec["internalTrafficPolicy"] = "Local"
        if self._chance(0.3):
            pool = [a for family in spec["ipFamilies"] for a in _EXTERNAL[family]]
            if self._chance(0.1):
                pool = [*_EXTERNAL["IPv4"], *_EXTERNAL["IPv6"]]
            spec["externalIPs"] = self.random.sample(pool, self.random.randint(1, 2))
        if (spec["type"] != "ClusterIP" or "externalIPs" in spec) and self._chance(0.4):
            spec["externalTrafficPolicy"] = "Local"
        if self._chance(0.3):
            timeout = self.random.choice((1, 30, 10800, 86400))
            spec["sessionAffinity"] = "ClientIP"
            spec["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": timeout}}
        if self._chance(0.15):
            spec["publishNotReadyAddresses"] = True
        if self._chance(0.2):
            spec["trafficDistribution"] = self.random.choice(("PreferClose", "PreferSameNode"))
        if spec["type"] == "LoadBalancer":
            if self._chance(0.2):
                spec["allocateLoadBalancerNodePorts"] = False
            if self._chance(0.4):
                spec["loadBalancerSourceRanges"] = self.random.choice(_SOURCES)
            self._status(name)

    def _ports(self) -> list[Object]:
        ports = copy.deepcopy(self.random.sample(_PORTS, self._any_of({1: 4, 2: 3, 3: 2, 4: 1})))
        if len(ports) == 1 and self._chance(0.5):
            del ports[0]["name"]
        return ports

    def _status(self, name: str) -> None:
        ingress: list[Object] = []
        pool = [*_EXTERNAL["IPv4"], *_EXTERNAL["IPv6"]]
        for address in self.random.sample(pool, self._any_of({0: 1, 1: 4, 2: 2})):
            mode = self.random.choice((None, None, "VIP", "Proxy"))
            ingress.append({"ip": address, **({"ipMode": mode} if mode else {})})
        if self._chance(0.1):
            ingress.append({"hostname": "lb.example.invalid"})
        self.statuses[name] = {"loadBalancer": {"ingress": ingress}}

    # -- slices ------------------------------------------------------------------------------

    def _slices(self, name: str) -> None:
        """None to three, each of one family. Those with nobody's name are left over in between."""
        for known in [s for s in self.slices if s.startswith(f"{name}-")]:
            del self.slices[known]
        for number in range(self._any_of({0: 1, 1: 3, 2: 5, 3: 3})):
            self.slices[f"{name}-{number}"] = self._slice(name, number)

    def _slice(self, service: str, number: int) -> Object:
        family = self._any_of({"IPv4": 48, "IPv6": 48, "FQDN": 4})
        labels = {SERVICE_NAME: service}
        if self._chance(0.5):
            labels["endpointslice.kubernetes.io/managed-by"] = "somebody"
        if self._chance(0.05):
            labels[HEADLESS] = ""
        if self._chance(0.05):
            labels[PROXY_NAME] = "other"
        # Never had one: kube-proxy does not see that it goes. The test has that apart.
        if Random(f"{service}-{number}").random() < 0.03:
            del labels[SERVICE_NAME]
        hints = self.random.choice(("", "", "forZones", "forNodes", "both"))
        # Now and then the same address as in another slice.
        first = 10 if self._chance(0.2) else 10 + 10 * number
        count = self._any_of({0: 1, 1: 3, 2: 3, 4: 3})
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": f"{service}-{number}", "labels": labels},
            "addressType": family,
            "ports": self._slice_ports(service),
            "endpoints": [self._endpoint(family, first + i, hints) for i in range(count)],
        }

    def _slice_ports(self, service: str) -> list[Object]:
        """Most of the Service's own, here and there under another number or of another protocol."""
        found = []
        for port in self.services.get(service, {}).get("spec", {}).get("ports", _PORTS):
            if self._chance(0.1):
                continue
            number: int | None = self.random.choice((8080, 8080, 9090))
            if self._chance(0.04):
                number = None
            protocol = (
                self.random.choice(("TCP", "UDP")) if self._chance(0.05) else port["protocol"]
            )
            found.append({"name": port.get("name", ""), "protocol": protocol, "port": number})
        if self._chance(0.1):
            found.append({"name": "metrics", "protocol": "TCP", "port": 9100})
        return found

    def _endpoint(self, family: str, number: int, hints: str) -> Object:
        prefix = {"IPv4": "10.245.0.", "IPv6": "fd00:245::", "FQDN": "host-"}[family]
        suffix = ".example.invalid" if family == "FQDN" else ""
        endpoint: Object = {"addresses": [f"{prefix}{number}{suffix}"]}
        if self._chance(0.1):
            endpoint["addresses"].append(f"{prefix}{number + 100}{suffix}")
        if self._chance(0.9):
            endpoint["nodeName"] = self.random.choice(NODES)
        endpoint["conditions"] = self._conditions()
        if hints and self._chance(0.93):
            endpoint["hints"] = self._hints(hints)
        return endpoint

    def _conditions(self) -> Object:
        """What a controller writes of a pod that serves, or that terminates, else anything."""
        kind = self._any_of({"ready": 5, "leaving": 3, "anything": 3})
        if kind != "anything":
            return {"ready": kind == "ready", "serving": True, "terminating": kind == "leaving"}
        values = {n: self.random.choice((None, True, False)) for n in _CONDITIONS}
        return {name: value for name, value in values.items() if value is not None}

    def _hints(self, kind: str) -> Object:
        zones = self.random.sample(ZONES, self.random.randint(1, 2))
        nodes = self.random.sample(NODES, self.random.randint(1, 2))
        hints = {
            "forZones": [{"name": name} for name in zones],
            "forNodes": [{"name": name} for name in nodes],
        }
        return hints if kind == "both" else {kind: hints[kind]}

    # -- changes -----------------------------------------------------------------------------

    def _delete(self, name: str) -> None:
        """Its slices stay, for whoever has the name next."""
        if name in self.services:
            del self.services[name]
            self.statuses.pop(name, None)
        else:
            self._service(name)

    def _change_endpoints(self, name: str) -> None:
        for piece in self._pieces(name):
            for endpoint in piece["endpoints"]:
                if self._chance(0.5):
                    endpoint["conditions"] = self._conditions()

    def _move_endpoints(self, name: str) -> None:
        """From one slice into another, where it may be twice for a while."""
        pieces = [p for p in self._pieces(name) if p["addressType"] != "FQDN"]
        for one, other in itertools.pairwise(pieces):
            if one["addressType"] == other["addressType"] and one["endpoints"]:
                moved = one["endpoints"][0] if self._chance(0.3) else one["endpoints"].pop()
                if moved["addresses"] not in [e["addresses"] for e in other["endpoints"]]:
                    other["endpoints"].append(copy.deepcopy(moved))

    def _touch_metadata(self, name: str) -> None:
        """Whose it is, and nothing else."""
        if name in self.services:
            labels = self.services[name]["metadata"]["labels"]
            label = self.random.choice((PROXY_NAME, HEADLESS))
            if label in labels:
                del labels[label]
            else:
                labels[label] = ""

    def _touch_policy(self, name: str) -> None:
        spec = self.services.get(name, {}).get("spec", {})
        if spec.get("ports") and spec.get("clusterIP") != "None":
            other = {"Local": "Cluster"}.get(spec.get("internalTrafficPolicy"), "Local")
            spec["internalTrafficPolicy"] = other

    def _again(self, name: str) -> None:
        self._service(name)
        self._slices(name)

    def _pieces(self, name: str) -> list[Object]:
        return [piece for key, piece in self.slices.items() if key.startswith(f"{name}-")]

    _changes: Sequence[Callable[[World, str], None]] = (
        _service,
        _slices,
        _again,
        _delete,
        _change_endpoints,
        _move_endpoints,
        _touch_metadata,
        _touch_policy,
    )

    # -- chance ------------------------------------------------------------------------------

    def _chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def _any_of(self, weights: dict[Any, int]) -> Any:
        return self.random.choices(list(weights), list(weights.values()))[0]


_CONDITIONS = ("ready", "serving", "terminating")
