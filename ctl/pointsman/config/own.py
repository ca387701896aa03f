"""PointsmanConfiguration, pointsman.io/v1alpha1: our own file, one key for each option. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pointsman.config.configuration import BadConfiguration, Configuration
from pointsman.config.typed import flatten
from pointsman.events import Problem

KIND = "PointsmanConfiguration"
API_VERSION = "pointsman.io/v1alpha1"


class Key(NamedTuple):
    """`option` is the name of click's parameter; `off`: unquoted, YAML reads that word as false,
    and "on" as true."""

    path: str
    option: str
    type: Any
    off: bool = False


KEYS = (
    Key("manifests", "manifests", str),
    Key("kubernetes.kubeconfig", "kubeconfig", str),
    Key("kubernetes.context", "kube_context", str),
    Key("kubernetes.server", "api_server", str),
    Key("nodeName", "node_name", str),
    Key("cgroup", "cgroup", str),
    Key("serviceCIDRs", "service_cidrs", list[str]),
    Key("serviceProxyName", "service_proxy_name", str),
    Key("nodePortAddresses", "nodeport_addresses", list[str]),
    Key("nodePortRange", "node_port_range", str),
    Key("localhostNodePorts", "localhost_nodeports", bool),
    Key("externalIPs", "external_ips", str),
    Key("refuseUnusedClusterIPs", "refuse_unused_cluster_ips", bool),
    Key("bindGuard", "bind_guard", bool),
    Key("algorithm", "algorithm", str),
    Key("outlierEjection.mode", "outlier_ejection", str, off=True),
    Key("outlierEjection.consecutiveFailures", "ejection_consecutive_failures", int),
    Key("outlierEjection.failurePercent", "ejection_failure_percent", int),
    Key("outlierEjection.minimumConnects", "ejection_minimum_connects", int),
    Key("outlierEjection.shortest", "ejection_shortest", str),
    Key("outlierEjection.longest", "ejection_longest", str),
    Key("outlierEjection.mostPercent", "ejection_most_percent", int),
    Key("outlierEjection.trial", "ejection_trial", str),
    Key("devices", "devices", str),
    Key("podDevices", "pod_devices", str),
    Key("xdpMode", "xdp_mode", str),
    Key("dispatch", "dispatch", str),
    Key("snatPorts", "snat_ports", str),
    Key("conntrackTCPTimeoutEstablished", "conntrack_tcp_timeout_established", str),
    Key("conntrackUDPTimeout", "conntrack_udp_timeout", str),
    Key("conntrackUDPTimeoutStream", "conntrack_udp_timeout_stream", str),
    Key("endStaleTCP", "end_stale_tcp", bool),
    Key("dns", "dns_listen", list[str], off=True),
    Key("dnsUpstreams", "dns_upstreams", list[str], off=True),
    Key("domain", "domain", str),
    Key("healthzBindAddress", "healthz_bind_address", str, off=True),
    Key("metricsBindAddress", "metrics_bind_address", str, off=True),
    Key("stateDir", "state_dir", str),
    Key("runDir", "run_dir", str),
    Key("bpffs", "bpffs", str),
    Key("maxServices", "max_services", int),
    Key("maxSlots", "max_slots", int),
    Key("maxEndpoints", "max_endpoints", int),
    Key("maxMaglevLines", "max_maglev_lines", int),
    Key("maxFlows", "max_flows", int),
    Key("verbose", "verbose", bool),
)
_TYPE_META = {"kind": str, "apiVersion": str}


def read(document: Mapping[str, object]) -> Configuration:
    """Raises BadConfiguration, which names every key that is unknown or of a wrong type."""
    keys = {key.path: key for key in KEYS}
    types = _TYPE_META | {path: key.type for path, key in keys.items()}
    found = flatten(_spelled_out(document, keys), types)
    faults = found.faults + [
        Problem("this key is unknown", f"write {near}" if near else "delete it", field=path)
        for path, near in found.unknown
    ]
    options = {keys[path].option: value for path, value in found.values.items() if path in keys}
    fields = {keys[path].option: path for path in found.values if path in keys}
    if "kubernetes" in document:
        # Left empty, it could mean either: it is the pod's service account, or none at all.
        if document["kubernetes"] is None:
            mend = "write {} for the pod's service account, or delete the key"
            faults.append(Problem("it is empty", mend, field="kubernetes"))
        options["kubernetes"], fields["kubernetes"] = True, "kubernetes"
    if faults:
        raise BadConfiguration(*faults)
    return Configuration(KIND, options, fields)


def _spelled_out(
    document: Mapping[str, object], keys: Mapping[str, Key], section: str = ""
) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in document.items():
        path = f"{section}{name}"
        if path in keys:
            found[name] = _spelled(value, keys[path])
        elif isinstance(value, dict):
            found[name] = _spelled_out(value, keys, f"{path}.")
        else:
            found[name] = value
    return found


def _spelled(value: object, key: Key) -> object:
    """`off` as text again where it is one of the values, and alone where a list is wanted."""
    if not key.off:
        return value
    if key.type is str:
        return {False: "off", True: "on"}[value] if isinstance(value, bool) else value
    if value is False or value == "off":
        return ["off"]
    if isinstance(value, list):
        return ["off" if item is False else item for item in value]
    return value
