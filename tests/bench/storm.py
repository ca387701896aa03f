"""The cluster bench's objects, written as their controller does, and changes of them at a rate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.bench import control
from tests.cluster.api import Api

NAMESPACE = "bench"
RATE = 100
#: Where Kubernetes' clients find when the Pod or Service changed (EndpointsLastChangeTriggerTime).
TRIGGER = "endpoints.kubernetes.io/last-change-trigger-time"
_SLICES = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"
_MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
_THREADS = 8


class Access(NamedTuple):
    """Arguments of Api: a process of its own has to make its own."""

    network: Path
    server: str
    authority: Path
    certificate: Path
    key: Path


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # RFC3339Nano, as Go writes it


def _plain(thing: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Without what the server itself writes."""
    kept = {key: thing["metadata"][key] for key in ("name", "namespace", "labels")}
    return {**thing, "metadata": {**kept, **more}}


def _service(number: int) -> dict[str, Any]:
    """Without a selector: nobody but the bench writes its endpoints."""
    thing = _plain(control.service(number))
    chosen = ("clusterIP", "clusterIPs")  # by the server
    return {**thing, "spec": {k: v for k, v in thing["spec"].items() if k not in chosen}}


def _slice(number: int) -> dict[str, Any]:
    thing = _plain(control.endpoint_slice(number), annotations={TRIGGER: now()})
    thing["metadata"]["labels"] |= {_MANAGED_BY: "pointsman-bench"}
    return thing


def create(api: Api, first: int, last: int) -> None:
    """Services of ten endpoints each. A controller need not run."""

    def both(number: int) -> None:
        api.create(_service(number))
        api.create(_slice(number))

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(both, range(first, last + 1)))


def _change(api: Api, number: int, serial: int) -> None:
    """Gives the first endpoint of a Service's slice an address that no endpoint had before."""
    address = f"10.{248 + (serial >> 16)}.{serial >> 8 & 255}.{serial & 255}"
    name = control.endpoint_slice(number)["metadata"]["name"]
    replace = {
        "/metadata/annotations/" + TRIGGER.replace("/", "~1"): now(),
        "/endpoints/0/addresses": [address],
    }
    patch = [{"op": "replace", "path": path, "value": value} for path, value in replace.items()]
    api.request("PATCH", f"{_SLICES}/{name}", patch, content="application/json-patch+json")


def _run(access: Access, count: int, total: int, turn: int, pipe: Connection) -> None:
    api = Api(*access)
    api.request("GET", _SLICES + "?limit=1")  # connected
    pipe.send(0)
    began = pipe.recv()

    def work(first: int) -> None:
        rng = Random(turn * _THREADS + first)
        for serial in range(first, total, _THREADS):
            time.sleep(max(0.0, began + serial / RATE - time.monotonic()))
            _change(api, rng.randint(1, count), turn * total + serial)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(work, range(_THREADS)))
    pipe.send(time.monotonic() - began)


class Storm:
    """`until`: when its last change is due (time.monotonic). After `end`, `seconds` is how long it
    took and `rate` the changes a second."""

    seconds = rate = 0.0

    def __init__(self, pipe: Connection, total: int, until: float) -> None:
        self._pipe, self._total, self.until = pipe, total, until

    def end(self) -> None:
        """Returns when the last change was answered."""
        if not self._pipe.poll(max(0.0, self.until - time.monotonic()) + 120):
            raise RuntimeError("the API server takes no more changes")
        self.seconds = self._pipe.recv()
        self.rate = self._total / self.seconds


@contextmanager
def storm(access: Access, count: int, seconds: float, turn: int) -> Iterator[Storm]:
    """RATE changes a second of Services at random, from a process of their own: its work must not
    get in the way of the bench's clock. `turn` makes the addresses new."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    total = int(RATE * seconds)
    arguments = (access, count, total, turn, theirs)
    process = context.Process(target=_run, args=arguments, daemon=True)
    process.start()
    try:
        assert ours.poll(60), "no storm"
        ours.recv()
        began = time.monotonic()
        ours.send(began)
        yield Storm(ours, total, began + seconds)
    finally:
        process.terminate()
        process.join()
