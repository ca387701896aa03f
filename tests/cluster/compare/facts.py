"""What the API server has: whose an address is, and which endpoints it could lead to at all."""

from __future__ import annotations

import ipaddress
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from tests.cluster.api import Api
from tests.cluster.compare.answers import Target, join, plain
from tests.cluster.compare.world import HEADLESS, PROXY_NAME, SERVICE_NAME

Object = dict[str, Any]
_DISCOVERY = "discovery.k8s.io/v1"


class Facts:
    """Services, EndpointSlices and Nodes of all namespaces at one moment."""

    def __init__(self, api: Api) -> None:
        self.services = [
            service
            for service in api.list("Service", namespace=None)
            if service["spec"].get("clusterIP", "None") != "None"
        ]
        self.slices: dict[tuple[str, str], list[Object]] = defaultdict(list)
        for piece in api.list("EndpointSlice", _DISCOVERY, None):
            meta = piece["metadata"]
            owner = meta.get("labels", {}).get(SERVICE_NAME, "")
            self.slices[meta["namespace"], owner].append(piece)
        self.nodes = {
            node["metadata"]["name"]: {
                address["address"]
                for address in node["status"]["addresses"]
                if address["type"] == "InternalIP"
            }
            for node in api.list("Node", namespace=None)
        }
        self._cidrs = [
            ipaddress.ip_network(cidr)
            for found in api.list("ServiceCIDR", "networking.k8s.io/v1", None)
            for cidr in found["spec"]["cidrs"]
        ]

    def targets(self) -> set[tuple[str, int, str]]:
        """As `nft.Ruleset.targets`, of all Services, whosever they are."""
        found = set()
        for service in self.services:
            for port in service["spec"]["ports"]:
                protocol = port["protocol"].lower()
                for address in _addresses(service):
                    found |= {(address, port["port"], protocol), (address, 0, "")}
                if port.get("nodePort"):
                    found |= {(any_, port["nodePort"], protocol) for any_ in ("", "::")}
        return found

    def of_others(self, node: str) -> set[str]:
        """Addresses of the nodes but this one."""
        return {a for name, found in self.nodes.items() if name != node for a in found}

    def in_service_cidr(self, address: str) -> bool:
        return any(ipaddress.ip_address(address) in cidr for cidr in self._cidrs)

    @cached_property
    def cluster_ips(self) -> dict[str, Object]:
        return {ip: service for service in self.services for ip in cluster_ips(service)}

    @cached_property
    def _by_address(self) -> dict[str, list[Object]]:
        found: dict[str, list[Object]] = defaultdict(list)
        for service in self.services:
            for address in dict.fromkeys(_addresses(service)):
                found[address].append(service)
        return found

    def owners(self, target: Target) -> list[tuple[Object, Object]]:
        """Services that have this address and port, each with the port, other proxies' left out.
        NodePorts are known by the port: what the address is must be asked before."""
        found = []
        for service in self._by_address[target.address]:
            found += [(service, p) for p in service["spec"]["ports"] if _is(p, "port", target)]
        for service in self.services:
            if target.family in _families(service):
                ports = service["spec"]["ports"]
                found += [(service, p) for p in ports if _is(p, "nodePort", target)]
        return [(s, p) for s, p in found if PROXY_NAME not in labels(s)]

    def having(self, address: str) -> list[Object]:
        """Services that have the address, whatever the port."""
        return self._by_address[address]

    # -- endpoints ---------------------------------------------------------------------------

    def endpoints(self, service: Object, port: Object, family: int) -> dict[str, list[Object]]:
        """Each endpoint with all that slices say of it, ready or not: its copies."""
        found: dict[str, list[Object]] = defaultdict(list)
        meta = service["metadata"]
        for piece in self.slices[meta["namespace"], meta["name"]]:
            if piece["addressType"] != f"IPv{family}" or HEADLESS in labels(piece):
                continue
            for at in piece.get("ports") or ():
                same = (at["name"], at["protocol"]) == (port.get("name", ""), port["protocol"])
                if same and at.get("port"):
                    for endpoint in piece.get("endpoints") or ():
                        address = plain(endpoint["addresses"][0])
                        found[join(address, at["port"])].append(endpoint)
        return found

    def contradictory(self, service: Object, port: Object, family: int) -> bool:
        """Whether slices say different things of one endpoint."""
        copies = self.endpoints(service, port, family).values()
        return any(len({_said(endpoint) for endpoint in each}) > 1 for each in copies)

    # -- for people --------------------------------------------------------------------------

    def about(self, target: Target) -> Iterator[Object]:
        """The objects that a difference at this address is about, without what servers add."""
        services = {id(s): s for s, _ in self.owners(target)}
        services |= {id(s): s for s in self.having(target.address)}
        for service in services.values():
            meta = service["metadata"]
            yield _bare(service)
            yield from map(_bare, self.slices[meta["namespace"], meta["name"]])


def labels(thing: Object) -> dict[str, str]:
    return thing["metadata"].get("labels") or {}


def cluster_ips(service: Object) -> list[str]:
    return [plain(ip) for ip in service["spec"].get("clusterIPs", ())]


def ingress_ips(service: Object) -> list[str]:
    found = service.get("status", {}).get("loadBalancer", {}).get("ingress") or ()
    ips = [i["ip"] for i in found if i.get("ip") and i.get("ipMode") in (None, "VIP")]
    return [plain(ip) for ip in ips]


def is_usable(endpoint: Object) -> bool:
    """Ready, or serving while it terminates."""
    conditions = endpoint.get("conditions") or {}
    serves = conditions.get("serving") is not False
    return conditions.get("ready") is not False or bool(conditions.get("terminating") and serves)


def _addresses(service: Object) -> Iterable[str]:
    families = _families(service)
    others = [*map(plain, service["spec"].get("externalIPs", ())), *ingress_ips(service)]
    return [*cluster_ips(service), *(a for a in others if (6 if ":" in a else 4) in families)]


def _families(service: Object) -> set[int]:
    return {6 if ":" in ip else 4 for ip in cluster_ips(service)}


def _is(port: Object, field: str, target: Target) -> bool:
    return (port.get(field), port["protocol"].lower()) == (target.port, target.protocol)


def _said(endpoint: Object) -> str:
    """All that a proxy goes by."""
    parts = {key: endpoint.get(key) for key in ("conditions", "nodeName", "hints")}
    return json.dumps(parts, sort_keys=True)


def _bare(thing: Object) -> Object:
    meta = {k: v for k, v in thing["metadata"].items() if k in ("name", "namespace", "labels")}
    return {**thing, "metadata": meta}
