"""Which API server to talk to, as an operator says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Access:
    """All empty: the pod's service account."""

    #: A kubeconfig file; None for the service account of the pod that this runs in.
    kubeconfig: Path | None = None
    #: A context of that file, "" for its current one.
    context: str = ""
    #: A URL in the place of the one configured, kube-proxy's --master; "" for that one.
    server: str = ""
