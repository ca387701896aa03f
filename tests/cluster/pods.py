"""A Pod as its node runs it: a network namespace with a server, and a status that says so."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import urllib3

from demo.lab import Place, stop
from tests.cluster.api import Api, ApiError, Object
from tests.cluster.network import Addresses, inside, namespace, remove
from tests.cluster.nodes import Node
from tests.cluster.waiting import tail, wait_for
from tests.support.kernel import until

DRAIN = "pointsman.test/drain"  # an annotation
_PYTHON = "/usr/bin/python3"
_SERVER = Path(__file__).parent / "programs" / "server.py"
# What an API server that is away, or on its way, leads to.
AWAY = (OSError, urllib3.exceptions.HTTPError, ApiError)


class Pod:
    """One bound Pod. Each works in a thread of its own, one step after the other.

    A container runs its `command` if it has one, $(POD_IP) and $(POD_NAME) filled in, else the
    test's server on all its TCP and UDP containerPorts. With DRAIN, an annotation, a deleted pod
    goes on, ready and terminating, until `finish` or the end of its grace; else it ends at once.
    """

    def __init__(self, api: Api, node: Node, thing: Object) -> None:
        meta = thing["metadata"]
        self.name: str = meta["name"]
        self.namespace: str = meta["namespace"]
        self.labels: dict[str, str] = meta.get("labels", {})
        self.node = node
        self.ready, self.gone = threading.Event(), threading.Event()
        self._api, self._spec = api, thing["spec"]
        self._drains = DRAIN in meta.get("annotations", {})
        self._finish, self._closed = threading.Event(), threading.Event()
        self._ending = False
        self._processes: list[subprocess.Popen[str]] = []
        self._mark = f"{self.namespace}.{self.name}.{meta['uid'][:4]}"
        self._thread = ThreadPoolExecutor(1, self.name)
        self._own = not self._spec.get("hostNetwork")
        self._do(self._start)

    def __repr__(self) -> str:
        return f"<Pod {self.namespace}/{self.name} on {self.node.name}>"

    # -- for tests ---------------------------------------------------------------------------

    addresses: Addresses
    place: Place

    @property
    def ip(self) -> str:
        return self.addresses.v4

    @property
    def ip6(self) -> str:
        return self.addresses.v6

    def set_ready(self, ready: bool) -> None:
        """Its condition alone: the server goes on. As a readiness probe that fails."""
        self._patch({"conditions": _conditions(ready, "Ready", "ContainersReady")})

    def terminate(self, grace: int = 300, wait: bool = True) -> None:
        """Deletes the Pod. `wait` is until it is gone, and not for one that drains."""
        self._api.delete("Pod", self.name, namespace=self.namespace, grace=grace)
        if wait and not self._drains:
            until(self.gone.is_set, f"the end of {self}")

    def finish(self) -> None:
        """Ends one that drains; returns when it is gone."""
        self._finish.set()
        until(self.gone.is_set, f"the end of {self}")

    def crash(self) -> None:
        """SIGKILL for its processes. Nobody is told."""
        for process in self._processes:
            process.kill()
            process.wait()

    # -- for the kubelet ---------------------------------------------------------------------

    def deleted(self, grace: int) -> None:
        """The API server has a deletionTimestamp."""
        if not self._ending:
            self._ending = True
            self._do(self._end, grace)

    def vanished(self) -> None:
        """The API server has it no longer."""
        self._finish.set()
        self._ending = True
        self._do(self._remove)

    def close(self) -> None:
        self._closed.set()
        self._finish.set()
        self._thread.shutdown(cancel_futures=True)

    def _do(self, step: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the harness is closing
            self._thread.submit(_told, step, *arguments)

    def _start(self) -> None:
        network = self.node.site.namespace
        self.addresses = self.node.addresses
        if self._own:
            network = namespace(self.node.lab, self._mark)
            self.addresses = self.node.site.plug_pod(network)
        self.place = Place(network, self.node.pods)
        log = self.node.lab.directory / f"pod-{self._mark}.log"
        for container in self._spec["containers"]:
            with log.open("ab") as out:
                command = self._command(container)
                self._processes.append(
                    self.node.lab.start(command, self.place, stdout=out, stderr=out)
                )
        wait_for(self._answers, f"{self} to serve", logs=partial(tail, log))
        self._patch(self._running())
        self.ready.set()

    def _command(self, container: Object) -> list[str]:
        if given := container.get("command"):
            filled = (("$(POD_IP)", self.ip), ("$(POD_NAME)", self.name))
            return [_filled(part, filled) for part in (*given, *container.get("args", ()))]
        return [_PYTHON, str(_SERVER), self.name, *_ports(container)]

    def _answers(self) -> bool:
        """Whether each port that can be asked is served."""
        with inside(self.node.site.namespace), contextlib.suppress(OSError):
            for container in self._spec["containers"]:
                ours = "command" not in container
                for wanted in _ports(container):
                    protocol, _, port = wanted.partition(":")
                    if protocol == "tcp":
                        socket.create_connection((self.ip, int(port)), 1).close()
                    elif ours:
                        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                            probe.settimeout(0.2)
                            probe.connect((self.ip, int(port)))
                            probe.send(b"\n")
                            probe.recv(512)
            return True
        return False

    def _end(self, grace: int) -> None:
        if self._drains:
            self._finish.wait(grace)
        self._patch({"conditions": _conditions(False, "Ready", "ContainersReady")})
        self._remove()
        self._retry(lambda: self._api.delete("Pod", self.name, namespace=self.namespace, grace=0))

    def _remove(self) -> None:
        if self.gone.is_set():
            return
        for process in self._processes:
            stop(process)
        if self._own and hasattr(self, "place"):
            remove(self.place.network)
        self.gone.set()

    def _patch(self, status: Object) -> None:
        self._retry(
            lambda: self._api.patch_status("Pod", self.name, status, namespace=self.namespace)
        )

    def _retry(self, request: Callable[[], object]) -> None:
        """Until the API server is there; what it says of a Pod that is gone is of no interest."""
        while not self._closed.is_set():
            try:
                request()
            except ApiError as error:
                if error.status == 404:
                    return
                if error.status < 500 and error.status != 429:
                    raise
            except AWAY:
                pass
            else:
                return
            time.sleep(0.1)

    def _running(self) -> Object:
        now = _now()
        return {
            "phase": "Running",
            "startTime": now,
            "hostIP": self.node.addresses.v4,
            "hostIPs": [{"ip": address} for address in self.node.addresses],
            "podIP": self.ip,
            "podIPs": [{"ip": address} for address in self.addresses],
            "conditions": _conditions(True, "Initialized", "Ready", "ContainersReady"),
            "containerStatuses": [
                {
                    "name": container["name"],
                    "image": container.get("image", ""),
                    "imageID": "",
                    "ready": True,
                    "started": True,
                    "restartCount": 0,
                    "state": {"running": {"startedAt": now}},
                }
                for container in self._spec["containers"]
            ],
        }


def _told(step: Callable[..., None], *arguments: object) -> None:
    """An error in a thread of a pod, for the test's output."""
    try:
        step(*arguments)
    except BaseException as error:
        print("kubelet:", *traceback.format_exception(error), flush=True)
        raise


def _ports(container: Object) -> list[str]:
    """As "tcp:8080"."""
    wanted = [
        (p.get("protocol", "TCP").lower(), p["containerPort"]) for p in container.get("ports", ())
    ]
    return [f"{protocol}:{port}" for protocol, port in wanted if protocol in ("tcp", "udp")]


def _filled(text: str, values: tuple[tuple[str, str], ...]) -> str:
    for name, value in values:
        text = text.replace(name, value)
    return text


def _conditions(true: bool, *kinds: str) -> list[Object]:
    status = "True" if true else "False"
    return [{"type": kind, "status": status, "lastTransitionTime": _now()} for kind in kinds]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
