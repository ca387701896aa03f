"""One Service as `kubectl describe service` (1.31 and newer) prints it. Pure.

The order and the spelling of the fields are kubectl's, and what the API server would have filled
in is filled in; people and scripts know this text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pointsman.endpointrows import EndpointRow, endpoints
from pointsman.inspect import FrontendRow, Reader, ServiceRow, frontends, held
from pointsman.objects import EndpointSlice, LoadBalancerIngress, Service, ServicePort

_NONE, _UNSET = "<none>", "<unset>"
_SHOWN = 3  # endpoints of one port; the rest is counted
_WIDEST = 140  # characters of an annotation on one line
_HIDDEN = "kubectl.kubernetes.io/last-applied-configuration"

Line = tuple[str, str]


def describe(service: Service, slices: Iterable[EndpointSlice]) -> str:
    """The text, each line ended by a newline. `service` with its ClusterIPs filled in."""
    lines = [*_head(service), *_addresses(service)]
    slices = list(slices)
    for port in service.spec.ports:
        lines += _port(service, port, slices)
    lines += _policies(service)
    lines.append(("Events:", _NONE))
    return align(lines)


def align(lines: Iterable[Line], indent: str = "") -> str:
    """Two columns, the second where the longest label has left two spaces."""
    lines = list(lines)
    width = max((len(label) for label, _ in lines), default=0) + 2
    return "".join(f"{indent}{label:{width}}{text}\n" for label, text in lines)


def _head(service: Service) -> list[Line]:
    meta = service.metadata
    selector = service.spec.selector or {}
    pairs = [f"{key}={value}" for key, value in sorted(selector.items())]
    return [
        ("Name:", meta.name),
        ("Namespace:", meta.namespace),
        *_several("Labels:", (f"{key}={value}" for key, value in sorted(meta.labels.items()))),
        *_several("Annotations:", _annotations(meta.annotations)),
        ("Selector:", ",".join(pairs) or _NONE),
        ("Type:", service.spec.type),
    ]


def _several(label: str, texts: Iterable[str]) -> list[Line]:
    found = list(texts) or [_NONE]
    return [(label, found[0]), *(("", text) for text in found[1:])]


def _annotations(annotations: Mapping[str, str]) -> Iterable[str]:
    for key, value in sorted(annotations.items()):
        value = value.removesuffix("\n")
        if key == _HIDDEN:
            continue
        if len(key) + len(value) + 2 > _WIDEST or "\n" in value:
            yield f"{key}:"
            yield from (f"  {_shorten(line, _WIDEST - 2)}" for line in value.split("\n"))
        else:
            yield f"{key}: {value}"


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "..."


def _addresses(service: Service) -> list[Line]:
    spec = service.spec
    families = _families(service)
    policy = spec.ip_family_policy
    if not policy and spec.type != "ExternalName":
        dual = len(families) > 1 or (service.headless and not spec.selector)
        policy = "RequireDualStack" if dual else "SingleStack"
    lines = [("IP Family Policy:", policy)] if policy else []
    lines.append(("IP Families:", ",".join(families) or _NONE))
    lines.append(("IP:", spec.cluster_ip))
    lines.append(("IPs:", ",".join(spec.cluster_ips or filter(None, [spec.cluster_ip])) or _NONE))
    if spec.external_ips:
        lines.append(("External IPs:", ",".join(spec.external_ips)))
    if spec.external_name:
        lines.append(("External Name:", spec.external_name))
    if ingress := service.status.load_balancer.ingress:
        lines.append(("LoadBalancer Ingress:", ", ".join(map(_ingress, ingress))))
    return lines


def _ingress(ingress: LoadBalancerIngress) -> str:
    return f"{ingress.ip} ({ingress.ip_mode or 'VIP'})" if ingress.ip else ingress.hostname


def _families(service: Service) -> tuple[str, ...]:
    spec = service.spec
    if spec.ip_families or spec.type == "ExternalName":
        return spec.ip_families
    if service.headless:
        dual = not spec.selector or spec.ip_family_policy.endswith("DualStack")
        return ("IPv4", "IPv6") if dual else ("IPv4",)
    addresses = spec.cluster_ips or filter(None, [spec.cluster_ip])
    return tuple("IPv6" if ":" in address else "IPv4" for address in addresses)


def _port(service: Service, port: ServicePort, slices: list[EndpointSlice]) -> list[Line]:
    name = port.name or _UNSET
    lines = [
        ("Port:", f"{name}  {port.port}/{port.protocol}"),
        ("TargetPort:", f"{port.target_port or port.port}/{port.protocol}"),
    ]
    if port.app_protocol:
        lines.append(("AppProtocol:", port.app_protocol))
    if port.node_port:
        lines.append(("NodePort:", f"{name}  {port.node_port}/{port.protocol}"))
    lines.append(("Endpoints:", _endpoints(slices, port.name)))
    return lines


def _endpoints(slices: list[EndpointSlice], name: str) -> str:
    """The ready ones: three of them, and how many more. No slices at all: <none>."""
    if not slices:
        return _NONE
    found: list[str] = []
    for piece in slices:
        ready = [
            endpoint.addresses[0]
            for endpoint in piece.endpoints or ()
            if endpoint.conditions.ready is not False and endpoint.addresses
        ]
        if not piece.ports:
            found += ready
        for port in piece.ports or ():
            if (port.name or "") == name:
                found += [_joined(address, port.port or 0) for address in ready]
    text = ",".join(found[:_SHOWN])
    return f"{text} + {len(found) - _SHOWN} more..." if len(found) > _SHOWN else text


def _joined(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _policies(service: Service) -> list[Line]:
    spec = service.spec
    lines = [("Session Affinity:", spec.session_affinity)]
    external = spec.external_traffic_policy
    if spec.type in ("NodePort", "LoadBalancer"):
        external = external or "Cluster"
    if external:
        lines.append(("External Traffic Policy:", external))
    if spec.type != "ExternalName":
        lines.append(("Internal Traffic Policy:", spec.internal_traffic_policy))
    if spec.health_check_node_port:
        lines.append(("HealthCheck NodePort:", str(spec.health_check_node_port)))
    if spec.load_balancer_source_ranges:
        ranges = ",".join(spec.load_balancer_source_ranges)
        lines.append(("LoadBalancer Source Ranges:", ranges))
    if spec.traffic_distribution:
        lines.append(("Traffic Distribution:", spec.traffic_distribution))
    return lines


def describe_row(row: ServiceRow) -> str:
    """The fields of kubectl's text that the maps know."""
    lines = [
        ("Name:", row.name),
        ("Namespace:", row.namespace),
        ("Type:", row.type),
        ("IP:", row.cluster_ips[0] if row.cluster_ips else ""),
        ("IPs:", ",".join(row.cluster_ips) or _NONE),
    ]
    if row.external_ips:
        lines.append(("External IPs:", ",".join(row.external_ips)))
    for port in row.ports:
        name = port.name or _UNSET
        number = "<unknown>" if port.port is None else port.port
        lines.append(("Port:", f"{name}  {number}/{port.protocol}"))
        if port.node_port is not None:
            lines.append(("NodePort:", f"{name}  {port.node_port}/{port.protocol}"))
    lines.append(("Session Affinity:", "ClientIP" if row.affinity_seconds else "None"))
    return align(lines)


def local_endpoints(slices: Iterable[EndpointSlice], node: str) -> frozenset[str]:
    """ADDRESS:PORT of what runs on this node, in whatever condition. `node` is the Node's name."""
    return frozenset(
        _joined(endpoint.addresses[0], port.port)
        for piece in slices
        for endpoint in piece.endpoints or ()
        if node and endpoint.node_name == node and endpoint.addresses
        for port in piece.ports or ()
        if port.port
    )


def describe_kernel(
    reader: Reader, namespace: str, name: str, now: int
) -> list[tuple[str, list[EndpointRow]]]:
    """What the kernel holds of one Service: for each frontend a line, and its endpoints. `now` is
    CLOCK_MONOTONIC in ns."""
    rows = {row.id: row for row in frontends(reader)}
    by_id = {row.id: row for row in endpoints(reader, now)}
    return [
        (
            _frontend_line(rows[each.ident]),
            [by_id[slot.endpoint] for slot in each.slots if slot.endpoint in by_id],
        )
        for each in held(reader)
        if each.name[:2] == (namespace, name)
    ]


def describe_policies(reader: Reader, namespace: str, name: str) -> list[Line]:
    """How each port of one Service deals with its endpoints, where it says anything of that."""
    found = {
        row.port_name or _UNSET: str(row.policy)
        for row in frontends(reader)
        if (row.namespace, row.service) == (namespace, name) and row.policy
    }
    return [(f"Policy of port {port}:", text) for port, text in found.items()]


def _outside(row: FrontendRow) -> str:
    """What is to be said of clients outside of the cluster; "" if they are not served."""
    if not row.packets:
        return ""
    found = [word for word in row.packets if word != "outside"]
    if row.outside_when_empty:
        found.append(f"no endpoints: {row.outside_when_empty}")
    elif row.outside_endpoints != row.endpoints:
        found.append(f"{row.outside_endpoints} of the endpoints")
    return f", from outside{' (' + ', '.join(found) + ')' if found else ''}"


def _frontend_line(row: FrontendRow) -> str:
    if row.wildcard:
        line = f"{row.frontend}  id {row.id}, any other port: {row.when_empty}"
    else:
        affinity = f", affinity {row.affinity_seconds} s" if row.affinity_seconds else ""
        empty = f", no endpoints: {row.when_empty}" if row.when_empty else ""
        flags = f", {' '.join(row.flags)}" if row.flags else ""
        chosen = ", ".join((row.algorithm, *row.choice))
        line = f"{row.frontend}  id {row.id}, {row.kind}, {chosen}{affinity}{flags}{empty}"
        line += _outside(row)
    return line if row.consistent else f"{line}, not in force: its service has another key"
