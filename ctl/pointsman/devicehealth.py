"""The part of `status` about devices: which are served, by what, and what hinders it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pointsman.hooks import DeviceLink

Report = dict[str, Any]
_COLUMNS = ("name", "ifindex", "role", "xdp", "tc", "vlan", "addresses", "served", "problems")


def device_report(told: Mapping[str, Any] | None, links: Iterable[DeviceLink]) -> Report:
    """`told` is the agent's part of the status file; `links` are what is pinned."""
    told = told or {}
    return {
        "wanted": bool(told.get("wanted")),
        "named": bool(told.get("named", told.get("wanted"))),
        "loading": bool(told.get("loading")),
        "error": told.get("error") or "",
        "former": bool(told.get("former")),
        "items": [{name: row.get(name) for name in _COLUMNS} for row in told.get("items") or ()],
        "links": [
            {
                "hook": link.hook,
                "device": link.name,
                "ifindex": link.index or None,
                "program": link.program,
                "kind": "filter" if link.is_filter else "link",
                "current": link.current,
            }
            for link in links
        ],
    }


def device_reasons(report: Report) -> list[str]:
    """Why this node does not serve what it was asked to, by name. What is served by one program of
    two, or more slowly, is no reason: problems tell of it."""
    return _unserved(report) if report["named"] else []


def device_warnings(report: Report) -> list[str]:
    """What serves packets is not what should, or what `auto` found is not served."""
    found = [] if report["named"] else _unserved(report)
    if report["former"]:
        found.append(f"programs of a former version serve packets from outside: {report['error']}")
    return found


def _unserved(report: Report) -> list[str]:
    if report["error"] and not report["former"]:
        return [f"packets from outside are not served: {report['error']}"]
    return [
        f"device {row['name']} is not served: {'; '.join(row['problems'] or ()) or 'not known why'}"
        for row in report["items"]
        # A pattern may be meant for what is to come.
        if not row["served"] and not set(row["name"]) & set("*?[")
    ]
