"""Which of new settings are applied while the agent runs. Pure."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from pointsman.events import Problem
from pointsman.settings import Settings

#: For each field of Settings the keys of PointsmanConfiguration that decide it.
KEYS = {
    "bpffs": "bpffs",
    "cgroup": "cgroup",
    "run_dir": "runDir",
    "state_dir": "stateDir",
    "manifests": "manifests",
    "service_cidrs": "serviceCIDRs",
    "domain": "domain",
    "dns_listen": "dns",
    "dns_upstreams": "dnsUpstreams",
    "sizes": "maxServices, maxSlots, maxEndpoints, maxMaglevLines, maxFlows",
    "node_name": "nodeName",
    "policy": "serviceProxyName, nodePortAddresses, nodePortRange, localhostNodePorts, "
    "externalIPs, refuseUnusedClusterIPs, bindGuard, algorithm, outlierEjection",
    "packets": "devices, podDevices, xdpMode, dispatch, snatPorts, conntrackTCPTimeoutEstablished, "
    "conntrackUDPTimeout, conntrackUDPTimeoutStream",
    "api": "kubernetes",
    "healthz": "healthzBindAddress",
    "metrics": "metricsBindAddress",
    "end_tcp": "endStaleTCP",
}
#: Of a policy, what the watches of an API server select by.
_SELECTING = {
    "proxy_name": "serviceProxyName",
    "refuse_unused_cluster_ips": "refuseUnusedClusterIPs",
}
#: These take effect at once.
LIVE = frozenset(("policy", "packets", "end_tcp"))


def apply(old: Settings, new: Settings) -> tuple[Settings, tuple[Problem, ...]]:
    """The settings to go on with, and a warning for each that has to wait for the next start.

    With an API server serviceProxyName and refuseUnusedClusterIPs wait as well: the selectors of
    the running watches hang on them. The programs for packets are loaded at the start: devices
    may change, but not from none to some, or from some to none.
    """
    wanted: dict[str, Any] = {}
    waiting: list[str] = []
    for name in (each.name for each in fields(Settings)):
        before, after = getattr(old, name), getattr(new, name)
        if name in LIVE:
            wanted[name] = after
        elif before != after:
            waiting.append(KEYS.get(name, name))
    for name, key in _SELECTING.items() if old.api else ():
        if (before := getattr(old.policy, name)) != getattr(new.policy, name):
            wanted["policy"] = replace(wanted["policy"], **{name: before})
            waiting.append(key)
    if old.packets.wanted != new.packets.wanted:
        wanted["packets"] = replace(new.packets, devices=old.packets.devices)
        waiting.append("devices")
    mend = "restart the agent: connections are not disturbed"
    return replace(old, **wanted), tuple(
        Problem("its change takes effect at the next start", mend, field=key, severity="warning")
        for key in waiting
    )
