"""What the agent tells: problems into the log as they come and go, and the status file."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pointsman import __version__, state
from pointsman.builtin import REF as DNS_REF
from pointsman.dns import DnsServer
from pointsman.events import Problem, Reach
from pointsman.kube.access import Access
from pointsman.objects import Ref
from pointsman.resolve import is_balanced
from pointsman.settings import Settings
from pointsman.tracker import Tracker
from pointsman.values import endpoint_text, to_address

log = logging.getLogger("pointsman.agent")


class Reporter:
    """`where` names the file or API path of an object, "" if it knows none."""

    def __init__(self, settings: Settings, where: Callable[[Ref], str]) -> None:
        self.settings = settings
        self._where = where
        self._reported: set[Problem] = set()
        self._started = time.time()
        self.problems_so_far = 0

    def problems(self, found: Iterable[Problem]) -> tuple[list[Problem], bool]:
        """Logs what is new among all that is wrong now, and what was mended; returns it with the
        places where it is to be mended, and whether it differs from the last time."""
        located = [self._located(problem) for problem in found]
        now = set(located)
        for problem in sorted(now - self._reported, key=str):
            self.problems_so_far += 1
            level = logging.WARNING if problem.severity == "warning" else logging.ERROR
            log.log(level, "%s", problem, extra={"problem": problem})
        for problem in sorted(self._reported - now, key=str):
            log.info("mended: %s", problem, extra={"problem": problem})
        changed, self._reported = now != self._reported, now
        return located, changed

    def _located(self, problem: Problem) -> Problem:
        """What came up after the source had let the object in lacks the file that it is from."""
        ref = Ref.parse(problem.object)
        if problem.where or ref is None:
            return problem
        return dataclasses.replace(problem, where=self._where(ref))

    def write(
        self, tracker: Tracker, dns: DnsServer | None, reach: Reach | None, **more: Any
    ) -> dict[str, Any]:
        """Replaces the status file; `more` are the agent's own parts of it."""
        settings = self.settings
        services = tracker.services
        dns_service = services.get(DNS_REF)
        status: dict[str, Any] = {
            "version": __version__,
            "pid": os.getpid(),
            "started": self._started,
            "settings": {
                "bpffs": str(settings.bpffs),
                "cgroup": str(settings.cgroup),
                "manifests": str(settings.manifests),
                "state_dir": str(settings.state_dir),
                "service_cidrs": list(settings.service_cidrs),
                "domain": settings.domain,
                "node_name": settings.node_name,
                "end_tcp": settings.end_tcp,
                "api": _access(settings.api),
            },
            "policy": dataclasses.asdict(settings.policy),
            "source": {
                **_source(settings, reach),
                "listed": tracker.listed,
                "objects": tracker.counts(),
            },
            "balanced": sum(
                is_balanced(service, settings.policy.proxy_name) for service in services.values()
            ),
            "dns": dns
            and {
                "listen": _texts(dns.addresses),
                "upstreams": _texts(dns.upstreams),
                "cluster_ips": list(dns_service.spec.cluster_ips)
                if dns_service and is_balanced(dns_service, settings.policy.proxy_name)
                else [],
                "queries": dict(dns.counters.queries),
                "forwarded": dns.counters.forwarded,
            },
            **more,
        }
        try:
            state.write_json(Path(settings.run_dir) / state.STATUS, status)
        except OSError as error:
            log.error("status file: %s", error)
        return status


def _source(settings: Settings, reach: Reach | None) -> dict[str, Any]:
    api = settings.api
    if api is None:
        return {"kind": "manifests", "path": str(settings.manifests)}
    return {
        "kind": "kubernetes",
        "server": reach.server if reach else api.server,
        # Since when the server answers, or does not; None before it was first asked.
        "reachable": None if reach is None else not reach.error,
        "since": reach.since if reach else None,
        "error": reach.error if reach else "",
    }


def _access(api: Access | None) -> dict[str, str] | None:
    """For the reading commands, which ask the same API server."""
    if api is None:
        return None
    return {
        "kubeconfig": str(api.kubeconfig or ""),
        "context": api.context,
        "server": api.server,
    }


def _texts(addresses: Sequence[tuple[str, int]]) -> list[str]:
    return [endpoint_text(to_address(address), port) for address, port in addresses]
