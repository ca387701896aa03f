"""What is wrong with a Pod: pkg/apis/core/validation of kube-apiserver, in meaning. Pure."""

from __future__ import annotations

import ipaddress

from pointsman.findings import (
    PROTOCOLS,
    Finding,
    Findings,
    check_label,
    check_name,
    check_namespace,
    check_one_of,
    check_port,
    check_port_name,
    check_unique,
)
from pointsman.names import address_fault, remote_address_fault, show
from pointsman.objects import Container, ContainerPort, Pod


def check_pod(pod: Pod) -> Findings:
    yield from check_name(pod.metadata)
    yield from check_namespace(pod.metadata)
    yield from _containers("spec.containers", pod.spec.containers)
    yield from _containers("spec.initContainers", pod.spec.init_containers)
    for name in ("hostname", "subdomain"):
        if value := getattr(pod.spec, name):
            yield from check_label(f"spec.{name}", value)
    yield from _pod_status(pod)


def _containers(path: str, containers: tuple[Container, ...]) -> Findings:
    host_ports: dict[object, str] = {}
    for i, container in enumerate(containers):
        for k, port in enumerate(container.ports):
            field = f"{path}[{i}].ports[{k}]"
            if port.name:
                yield from check_port_name(f"{field}.name", port.name)
            yield from check_one_of(f"{field}.protocol", port.protocol, PROTOCOLS)
            yield from check_port(f"{field}.containerPort", port.container_port)
            yield from _host_port(field, port, host_ports)


def _host_port(field: str, port: ContainerPort, seen: dict[object, str]) -> Findings:
    # Loopback and 0.0.0.0 are addresses of this host, and that is what a hostIP is.
    if port.host_ip and (fault := address_fault(port.host_ip)):
        yield Finding(f"{field}.hostIP", *fault)
    if port.host_port:
        yield from check_port(f"{field}.hostPort", port.host_port)
        key = (port.host_ip, port.host_port, port.protocol)
        text = f"hostPort {port.host_port}/{port.protocol}"
        yield from check_unique(f"{field}.hostPort", key, text, seen)


def _pod_status(pod: Pod) -> Findings:
    status = pod.status
    versions: dict[object, str] = {}
    addresses = [("status.podIP", status.pod_ip)] if status.pod_ip else []
    pod_ips = [(f"status.podIPs[{i}].ip", ip.ip) for i, ip in enumerate(status.pod_ips)]
    for field, address in addresses + pod_ips:
        if fault := remote_address_fault(address):
            yield Finding(field, *fault)
        elif field != "status.podIP":
            family = f"IPv{ipaddress.ip_address(address).version}"
            yield from check_unique(field, family, f"the family {family} of {address}", versions)
    if status.pod_ip and status.pod_ips and status.pod_ips[0].ip != status.pod_ip:
        message = f"{show(status.pod_ips[0].ip)} differs from podIP {show(status.pod_ip)}"
        yield Finding("status.podIPs[0].ip", message, "write the same address in both")
    if status.phase in ("Succeeded", "Failed"):
        return
    if not addresses and not pod_ips:
        message = "there is no podIP, so no Service can reach the pod"
        mend = "add status.podIP with the pod's address"
        yield Finding("status.podIP", message, mend, "warning")
    elif not any(condition.type == "Ready" for condition in status.conditions):
        message = "there is no Ready condition, so the pod is not ready"
        mend = 'add {type: Ready, status: "True"} once it may take connections'
        yield Finding("status.conditions", message, mend, "warning")
