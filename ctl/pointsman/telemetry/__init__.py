"""Health, metrics and the servers that show them.

`Telemetry` takes what happens; `servers` and `nodehealth` answer over HTTP, on the one thread of
`http`; `metrics` alone knows Prometheus.
"""

from pointsman.telemetry.facts import Facts, Watched
from pointsman.telemetry.telemetry import Telemetry

__all__ = ["Facts", "Telemetry", "Watched"]
