"""The servers at healthCheckNodePorts: whether a load balancer should send a Service's traffic to
this node (KEP-1669, pkg/proxy/healthcheck/service_health.go)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from pointsman.events import Problem
from pointsman.objects import Ref
from pointsman.telemetry.checks import Check, checks, listen_addresses
from pointsman.telemetry.http import ANY_IPV4, ANY_IPV6, HttpLoop
from pointsman.telemetry.httpwire import Address, Request, Response

__all__ = ["Check", "NodeHealth", "checks", "listen_addresses"]

_ANY = (ANY_IPV4, ANY_IPV6)


class NodeHealth:
    """One check for each Service that wants one, all on `loop`.

    `healthy` says whether the proxy is (Telemetry.proxy_healthy); `addresses` are those of
    `listen_addresses`. `want` and `move` are to be called on one thread.
    """

    def __init__(
        self,
        loop: HttpLoop,
        healthy: Callable[[], bool],
        *,
        node_name: str = "",
        addresses: Sequence[str] = (),
    ) -> None:
        self._loop = loop
        self._healthy = healthy
        self._node_name = node_name
        self._addresses = tuple(addresses) or _ANY
        self._checks: dict[Ref, Check] = {}

    def want(self, ref: Ref, check: Check | None) -> None:
        """What this Service has now. Counts are in the next answer; ports follow at once."""
        before = self._checks.get(ref)
        if check:
            self._checks[ref] = check
        elif self._checks.pop(ref, None) is None:
            return
        if check is None or before is None or _places(before) != _places(check):
            self._listen(ref, check)

    def move(self, addresses: Sequence[str]) -> None:
        """The addresses at which NodePorts answer are these now."""
        if (moved := tuple(addresses) or _ANY) != self._addresses:
            self._addresses = moved
            for ref, check in self._checks.items():
                self._listen(ref, check)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Which checks do not run, and why. They are tried again by themselves."""
        return tuple(
            Problem(
                f"node {self._node_name} can't listen at healthCheckNodePort {check.port}: {fault}",
                "free the port; it is tried again by itself",
                object=str(ref),
                field="spec.healthCheckNodePort",
                severity="warning",
                reason="FailedToStartServiceHealthcheck",
            )
            for ref, fault in self._loop.faults().items()
            if isinstance(ref, Ref) and (check := self._checks.get(ref))
        )

    def _listen(self, ref: Ref, check: Check | None) -> None:
        def answer(request: Request, at: Address) -> Response:
            return self._answer(ref, _family(at.host))

        hosts = [
            host for host in self._addresses if check and _family(host) in check.local_endpoints
        ]
        self._loop.want(ref, [Address(host, check.port) for host in hosts if check], answer)

    def _answer(self, ref: Ref, family: str) -> Response:
        """The same at every path, as of kube-proxy. On the loop's thread."""
        check = self._checks.get(ref)
        count = check.local_endpoints.get(family, 0) if check else 0
        healthy = self._healthy()
        # The form is kube-proxy's, to the blank.
        body = json.dumps(
            {
                "service": {"namespace": ref.namespace, "name": ref.name},
                "localEndpoints": count,
                "serviceProxyHealthy": healthy,
            },
            indent="\t",
        )
        headers = {
            "Content-Type": "application/json",
            "X-Content-Type-Options": "nosniff",
            "X-Load-Balancing-Endpoint-Weight": str(count),
        }
        return Response(200 if count and healthy else 503, body.encode(), headers)


def _places(check: Check) -> tuple[int, frozenset[str]]:
    return check.port, frozenset(check.local_endpoints)


def _family(host: str) -> str:
    return "IPv6" if ":" in host else "IPv4"
