"""The desired state, worked out from the objects as the agent does, without an agent."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pointsman import state
from pointsman.builtin import DnsService, dns_address
from pointsman.clusterip import ClusterIPs
from pointsman.context import Context
from pointsman.errors import NoCluster, NotFound
from pointsman.events import Event, Listed, Problem, Problems, Reach
from pointsman.kube.access import Access
from pointsman.manifests import ManifestSource
from pointsman.settings import Settings
from pointsman.slowstart import Steps, slowed
from pointsman.tracker import Tracker
from pointsman.values import Entry
from pointsman.wanted import all_refs, resolve_ref

_PATIENCE = 15.0  # seconds for the lists of an API server


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where the objects are, and what else decides. As the last agent had it, or the defaults."""

    manifests: Path
    state_dir: Path
    service_cidrs: tuple[str, ...]
    dns_listen: tuple[tuple[str, int], ...]
    #: The API server that the objects are asked of instead.
    api: Access | None = None
    node_name: str = ""
    proxy_name: str = ""


def inputs(status: Any, manifests: Path | None = None, state_dir: Path | None = None) -> Inputs:
    """From the agent's status file (None if there is none); what is given goes first."""
    status = status if isinstance(status, dict) else {}
    known = status.get("settings") or {}
    default = Settings()
    listen = (status.get("dns") or {}).get("listen") or []
    return Inputs(
        manifests=manifests or Path(known.get("manifests", default.manifests)),
        state_dir=state_dir or Path(known.get("state_dir", default.state_dir)),
        service_cidrs=tuple(known.get("service_cidrs", default.service_cidrs)),
        dns_listen=tuple(_address(text) for text in listen),
        api=None if manifests else _access(known.get("api")),
        node_name=known.get("node_name", ""),
        proxy_name=(status.get("policy") or {}).get("proxy_name", ""),
    )


def _access(known: dict[str, str] | None) -> Access | None:
    if known is None:
        return None
    path = known["kubeconfig"]
    return Access(Path(path) if path else None, known["context"], known["server"])


def _address(text: str) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    return address.strip("[]"), int(port)


def read(given: Inputs) -> tuple[Tracker, tuple[Problem, ...]]:
    """Every object with ClusterIPs and EndpointSlices made, and what is wrong with the manifests.

    Where a file is bad now, its last good version counts, as it does for the agent. Raises
    NotFound if the directory can't be read, or the API server does not answer.
    """
    if given.api is not None:
        return _read_cluster(given, given.api)
    try:
        next(given.manifests.iterdir(), None)
    except OSError as error:
        raise NotFound(
            f"manifests directory {given.manifests}: {error.strerror}; "
            "choose another with --manifests"
        ) from None
    memory = given.state_dir / state.LAST_GOOD
    listed, problems = ManifestSource(given.manifests, memory).read()
    tracker = Tracker(
        ClusterIPs(given.service_cidrs, state.read_claims(given.state_dir)),
        state.read_annotations(given.state_dir),
    )
    dns = _dns_service(given)
    tracker.fold(dns.add(listed) if dns else listed)
    return tracker, problems.problems


def _read_cluster(given: Inputs, access: Access) -> tuple[Tracker, tuple[Problem, ...]]:
    """One list of everything that the agent watches."""
    from pointsman.kube.client import ApiServer
    from pointsman.kube.source import ClusterSource

    try:
        server = ApiServer(access)
    except NoCluster as error:
        if access.kubeconfig:
            raise
        text = "the agent has a service account: run this in its pod"
        raise NoCluster(f"{text} ({error})") from None
    source = ClusterSource(
        server,
        node_name=given.node_name,
        state_dir=given.state_dir,
        proxy_name=given.proxy_name,
        with_headless=bool(given.dns_listen),
    )
    tracker = Tracker(kept=state.read_annotations(given.state_dir))
    problems: tuple[Problem, ...] = ()
    why, failed = "it did not answer in time", False
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    stop = threading.Event()
    thread = threading.Thread(target=source.run, args=(events.put, stop), daemon=True)
    thread.start()
    end = time.monotonic() + _PATIENCE
    try:
        while not tracker.listed and not failed and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                event = events.get(timeout=left)
                if isinstance(event, Listed):
                    tracker.fold(event)
                elif isinstance(event, Problems):
                    problems = event.problems
                elif isinstance(event, Reach) and event.error:
                    why, failed = event.error, True
    finally:
        stop.set()
        thread.join()
    if not tracker.listed:
        raise NotFound(f"the API server's objects can't be read: {why}")
    return tracker, problems


def _dns_service(given: Inputs) -> DnsService | None:
    """As the agent makes it: only for families that the server listens on."""
    families = {":" in address for address, _ in given.dns_listen}
    own = [dns_address(cidr) for cidr in given.service_cidrs]
    served = [address for address in own if (":" in address) in families]
    return DnsService(served, given.dns_listen) if served else None


def entries(tracker: Tracker, context: Context, slow: Steps) -> list[Entry]:
    """Every frontend that the maps should have on this node, with endpoints that are `slow`."""
    return [
        entry
        for ref in all_refs(tracker, context)
        for entry in slowed(resolve_ref(ref, tracker, context)[0], slow.get(ref, {}))
    ]
