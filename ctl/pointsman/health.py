"""Whether this node balances as it should: an observation judged, for people and scripts. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pointsman.devicehealth import device_reasons, device_report, device_warnings
from pointsman.dump import MapRow
from pointsman.hooks import DeviceLink, Link
from pointsman.inspect import camel, plain
from pointsman.packethealth import PacketsSeen, packets, warnings
from pointsman.verify import link_differences

Report = dict[str, Any]

#: The first releases of the stable series in which kernel_connect() passes a copy of the address
#: on (0bdf399342c5) and CIFS and Ceph call it (cedc019b9f26, 7563cf17dce0); mainline: 6.6.
_COPIES_ADDRESS = {(5, 10): 199, (5, 15): 136, (6, 1): 59, (6, 5): 8}


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything that `status` judges. `status` is the agent's file, {} if there is none."""

    pid: int | None
    status: dict[str, Any]
    generation: str
    links: tuple[Link, ...]
    cgroup_paths: dict[int, str]
    maps: tuple[MapRow, ...]
    mapped_bytes: int
    counters: dict[str, int]
    now: float
    #: As uname -r says it.
    kernel: str = ""
    #: What it can't do, as warnings.
    lacks: tuple[str, ...] = ()
    #: None where no packet programs are.
    packets: PacketsSeen | None = None
    device_links: tuple[DeviceLink, ...] = ()


def report(seen: Observation) -> Report:
    """The whole status as plain values. `reasons` is empty exactly if `healthy` is true."""
    sync = _sync(seen)
    datapath = _datapath(seen)
    agent = _agent(seen)
    devices = device_report(seen.status.get("devices"), seen.device_links)
    reasons = [*_agent_reasons(agent, sync), *_datapath_reasons(datapath)]
    reasons += device_reasons(devices)
    of_packets = packets(seen.packets, seen.maps, seen.status.get("packets"))
    return {
        "healthy": not reasons,
        "reasons": reasons,
        "warnings": [
            *(f"kernel {seen.kernel}: {lack}" for lack in seen.lacks),
            *(note for note in (kernel_sockets_note(seen.kernel), _away(_source(seen))) if note),
            *filter(None, [_drains(seen)["problem"]]),
            *device_warnings(devices),
            *warnings(of_packets),
        ],
        "agent": agent,
        "node": _node(seen),
        "policy": _policy(seen),
        "datapath": datapath,
        "devices": devices,
        "packets": of_packets,
        "maps": [plain(row) for row in seen.maps],
        "sync": sync,
        "source": _source(seen),
        "dns": _dns(seen),
        "counters": dict(seen.counters),
        "noLocalEndpoints": _numbers(seen, "noLocalEndpoints", "internal", "external"),
        "stale": _numbers(seen, "stale", "destroyed", "flowsDeleted", "checks"),
        "drains": _drains(seen),
        "optedOut": _numbers(seen, "optedOut", "pods", "namespaces", "waiting"),
        "problems": _problems(seen),
    }


def _agent(seen: Observation) -> Report:
    status = seen.status
    # A status file of an agent before this one says nothing about it. Files without a pid are
    # taken for the running agent's.
    fresh = bool(status) and status.get("pid", seen.pid) == seen.pid and not status.get("stopped")
    reporting = seen.pid is not None and fresh
    started = status.get("started") if status else None
    return {
        "running": seen.pid is not None,
        "pid": seen.pid,
        "reporting": reporting,
        "version": status.get("version"),
        "started": _time(started if reporting or seen.pid is None else None),
        "uptimeSeconds": round(seen.now - started, 1) if reporting and started else None,
        "stopped": _time(status.get("stopped")),
        "failed": status.get("failed") or "",
    }


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _agent_reasons(agent: Report, sync: Report) -> list[str]:
    if not agent["running"]:
        why = f" ({agent['failed']})" if agent["failed"] else ""
        return [f"the agent is not running{why}: start it with 'pointsman up'"]
    if not agent["reporting"]:
        return ["the agent has not reported yet: it is starting"]
    if sync["error"]:
        return [f"the last sync failed: {sync['error']}"]
    if not sync["attached"]:
        return ["the agent has not completed its first sync"]
    return []


def kernel_sockets_note(release: str) -> str:
    """What to know of mounts (NFS, CIFS, Ceph) of a Service's address on a kernel whose own
    sockets take a translated address for the one they were given; "" if it is not so.

    Distributions take fixes without changing the number, so this is a warning only.
    """
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    if not match:
        return ""
    series, patch = (int(match[1]), int(match[2])), int(match[3] or 0)
    fixed = _COPIES_ADDRESS.get(series)
    if series >= (6, 6) or (fixed is not None and patch >= fixed):
        return ""
    where = f", or {series[0]}.{series[1]}.{fixed}" if fixed else ""
    return (
        f"kernel {release}: an NFS, CIFS or Ceph mount of a Service's address may keep the "
        "endpoint's address instead and not find another one later; use Linux 6.6 or newer"
        f"{where}, or a kernel of your distribution with its commit 0bdf399342c5"
    )


def _node(seen: Observation) -> Report:
    node = seen.status.get("node") or {}
    return {
        "name": node.get("name") or None,
        "zone": node.get("zone") or None,
        "localAddresses": node.get("localAddresses"),
        "remoteAddresses": node.get("remoteAddresses"),
    }


def _policy(seen: Observation) -> Report:
    """Empty if no agent has said it."""
    return _camel(seen.status.get("policy") or {})


def _camel(found: dict[str, Any]) -> dict[str, Any]:
    return {
        camel(name): _camel(value) if isinstance(value, dict) else value
        for name, value in found.items()
    }


def _numbers(seen: Observation, part: str, *names: str) -> dict[str, int]:
    found = seen.status.get(part) or {}
    return {name: found.get(name, 0) for name in names}


def _datapath(seen: Observation) -> Report:
    wrong = {difference.object: difference.message for difference in link_differences(seen.links)}
    cgroups = Counter(link.cgroup for link in seen.links if link.cgroup)
    cgroup = cgroups.most_common(1)[0][0] if cgroups else None
    return {
        "generation": seen.generation,
        "cgroup": {
            "id": cgroup,
            "path": seen.cgroup_paths.get(cgroup) if cgroup else None,
            "configured": (seen.status.get("settings") or {}).get("cgroup"),
        },
        "links": {
            "attached": sum(link.program is not None and bool(link.cgroup) for link in seen.links),
            "total": len(seen.links),
        },
        "hooks": [
            {
                "hook": link.hook,
                "program": link.program,
                "cgroup": link.cgroup or None,
                "ok": link.hook not in wrong,
                "message": wrong.get(link.hook, ""),
            }
            for link in seen.links
        ],
        "mappedBytes": seen.mapped_bytes,
    }


def _datapath_reasons(datapath: Report) -> list[str]:
    by_message: dict[str, list[str]] = {}
    for hook in datapath["hooks"]:
        if not hook["ok"]:
            by_message.setdefault(hook["message"], []).append(hook["hook"])
    total = datapath["links"]["total"]
    return [
        f"all {total} hooks: {message}" if len(names) == total else f"{', '.join(names)}: {message}"
        for message, names in by_message.items()
    ]


def _sync(seen: Observation) -> Report:
    sync = seen.status.get("sync") or {}
    at = sync.get("time")
    return {
        "attached": bool(sync.get("attached")),
        "time": _time(at),
        "agoSeconds": round(seen.now - at, 1) if at else None,
        "seconds": sync.get("seconds"),
        "services": sync.get("services"),
        "syncs": sync.get("syncs", 0),
        "failures": sync.get("failures", 0),
        "problems": sync.get("problems", 0),
        "error": sync.get("error"),
    }


def _source(seen: Observation) -> Report:
    source = seen.status.get("source") or {}
    return {
        "kind": source.get("kind"),
        "path": source.get("path"),
        "server": source.get("server"),
        "reachable": source.get("reachable"),
        "since": _time(source.get("since")),
        "error": source.get("error") or "",
        "listed": bool(source.get("listed")),
        "objects": dict(source.get("objects") or {}),
        "balanced": seen.status.get("balanced"),
    }


def _away(source: Report) -> str:
    if source["reachable"] is not False:
        return ""
    return (
        f"the API server at {source['server']} can't be followed since {source['since']}: "
        f"{source['error']}; connections go on by what was known then"
    )


def _dns(seen: Observation) -> Report:
    dns = seen.status.get("dns") or {}
    return {
        "enabled": bool(dns),
        "listen": list(dns.get("listen") or ()),
        "upstreams": list(dns.get("upstreams") or ()),
        "clusterIPs": list(dns.get("cluster_ips") or ()),
        "queries": dict(dns.get("queries") or {}),
        "forwarded": dns.get("forwarded", 0),
    }


def _drains(seen: Observation) -> Report:
    """`closed` connections since the agent started; those that are under way, by Service."""
    drains = seen.status.get("drains") or {}
    return {
        **_numbers(seen, "drains", "closed", "left"),
        "services": dict(drains.get("services") or {}),
        "problem": drains.get("problem") or "",
    }


def drain_text(drain: Mapping[str, Any]) -> str:
    """Of one Service, as Draining.status() has it."""
    waits = f", waits for {drain['waits']}" if drain.get("waits") else ""
    return f"{drain['closed']} ended, {drain['left']} left, at {drain['rate']}{waits}"


def _problems(seen: Observation) -> list[Report]:
    """As the agent last knew them, errors first."""
    names = ("severity", "where", "object", "field", "message", "mend")
    found = [
        {name: problem.get(name, "") for name in names}
        for problem in seen.status.get("problems") or ()
    ]
    return sorted(found, key=lambda p: (p["severity"] != "error", p["where"], p["object"]))
