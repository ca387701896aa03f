"""The servers of kube-proxy's two ports: who probes this proxy, and who looks into it.

healthz (kube-proxy: 10256): /healthz, /livez, /readyz. metrics (10249): /metrics,
/metrics/endpoints, /proxyMode, /configz, and a /healthz that only says that the process answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pointsman.endpointpage import BadParameter, Source, asked, page
from pointsman.events import Problem
from pointsman.telemetry.connection import Handler, Later
from pointsman.telemetry.http import HttpLoop, wildcard
from pointsman.telemetry.httpwire import Address, Request, Response, text
from pointsman.telemetry.httpwire import json as json_response
from pointsman.telemetry.scrapes import Scrapes
from pointsman.telemetry.telemetry import Telemetry

if TYPE_CHECKING:
    from pointsman.telemetry.metrics import Exposition

PROXY_MODE = "pointsman"
_HEALTHZ, _METRICS = "healthz server", "metrics server"
#: kube-proxy's reasons, for bindAddressHardFail.
_REASONS = {_HEALTHZ: "FailedToStartProxierHealthcheck", _METRICS: "FailedToStartMetricServer"}
_Answers = Mapping[str, Callable[[Request], Response | Later]]


class HttpServers:
    """Both servers on `loop`, each at any number of (host, port); a host of "", "0.0.0.0" or "::"
    stands for both families. With no address a server is off.

    `config` gives what /configz shows, as plain values: called on the loop's thread.
    """

    def __init__(
        self,
        loop: HttpLoop,
        telemetry: Telemetry,
        *,
        healthz: Sequence[tuple[str, int]] = (),
        metrics: Sequence[tuple[str, int]] = (),
        config: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._loop = loop
        self._telemetry = telemetry
        self._config = config
        self._scrapes = Scrapes()
        #: Whose endpoints /metrics/endpoints shows; None as long as there are no maps.
        self.source: Source | None = None
        self._exposition: Exposition | None = None
        self.listen(healthz=healthz, metrics=metrics)

    def listen(
        self,
        *,
        healthz: Sequence[tuple[str, int]] = (),
        metrics: Sequence[tuple[str, int]] = (),
    ) -> None:
        """Moves the servers there; what stays the same stays open."""
        self._wanted = {
            _HEALTHZ: [wildcard(*each) for each in healthz],
            _METRICS: [wildcard(*each) for each in metrics],
        }
        for name, answers in (
            (_HEALTHZ, {"/healthz": self._healthz, "/livez": self._livez, "/readyz": self._readyz}),
            (
                _METRICS,
                {
                    "/metrics": self._metrics,
                    "/metrics/endpoints": self._endpoints,
                    "/proxyMode": lambda _: text(200, PROXY_MODE),
                    "/healthz": lambda _: text(200, "ok"),
                    "/configz": lambda _: _json(200, self._config()),
                },
            ),
        ):
            self._loop.want(name, self._wanted[name], _router(answers))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Which server does not run, and why. It is tried again by itself."""
        faults = self._loop.faults()
        return tuple(
            Problem(
                f"the {name} can't listen at {', '.join(map(str, self._wanted[name]))}: {fault}",
                "free the port, or choose another; it is tried again by itself",
                reason=reason,
            )
            for name, reason in _REASONS.items()
            if (fault := faults.get(name))
        )

    def bound(self) -> dict[str, list[tuple[str, int]]]:
        """Where the servers listen now, by "healthz" and "metrics"."""
        return {name.split()[0]: self._loop.bound(name) for name in _REASONS}

    def stop(self) -> None:
        """No answer is made any more that takes time. Before the loop is stopped."""
        self._scrapes.stop()

    def _healthz(self, _: Request) -> Response:
        return _json(*self._telemetry.healthz())

    def _livez(self, _: Request) -> Response:
        return _json(*self._telemetry.livez())

    def _readyz(self, request: Request) -> Response:
        return text(*self._telemetry.readyz(verbose="verbose" in request.query))

    def _metrics(self, request: Request) -> Response:
        if self._exposition is None:
            # Only now: it brings prometheus_client, three megabytes.
            from pointsman.telemetry.metrics import Exposition

            self._exposition = Exposition(self._telemetry.numbers)
        asked = request.headers
        body, headers = self._exposition.render(
            asked.get("accept", ""), asked.get("accept-encoding", "")
        )
        return Response(200, body, headers)

    def _endpoints(self, request: Request) -> Response | Later:
        if (source := self.source) is None:
            return text(503, "there are no maps yet; ask again in a few seconds\n")
        try:
            what = asked(request.query)
        except BadParameter as error:
            return text(400, f"{error}\n")
        headers = request.headers

        def work(rest: Callable[[], None]) -> Response:
            # Only now: it brings prometheus_client.
            from pointsman.telemetry.endpointmetrics import render

            now = time.monotonic_ns()
            zero = time.time() - now / 1e9
            found = page(source, what, now, rest)
            accepted = headers.get("accept", ""), headers.get("accept-encoding", "")
            return Response(200, *render(found, zero, rest, *accepted))

        return self._scrapes.ask(work)


def _router(answers: _Answers) -> Handler:
    def answer(request: Request, _: Address) -> Response | Later:
        found = answers.get(request.path)
        return found(request) if found else text(404, "404 page not found\n")

    return answer


def _json(status: int, body: Mapping[str, Any]) -> Response:
    """In Go's spelling: no blanks."""
    return json_response(status, json.dumps(body, separators=(",", ":"), default=str))
