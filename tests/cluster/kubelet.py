"""The kubelet that this harness is: it runs what the scheduler bound to a test's node."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping

from tests.cluster.api import Api, Object, Watch
from tests.cluster.nodes import Node
from tests.cluster.pods import AWAY, Pod


class Kubelet:
    """Of all nodes: watches Pods and lets each run. Survives an API server that goes away."""

    def __init__(self, api: Api, nodes: Mapping[str, Node]) -> None:
        self.pods: dict[str, Pod] = {}  # by uid
        self._api, self._nodes = api, nodes
        self._closed = threading.Event()
        self._watch: Watch | None = None
        self._thread = threading.Thread(target=self._run, name="kubelet", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(*AWAY, ValueError, RuntimeError):
            if self._watch:
                self._watch.close()
        self._thread.join(10)
        for pod in self.pods.values():
            pod.close()

    def _run(self) -> None:
        while not self._closed.wait(0.1):
            with contextlib.suppress(*AWAY, ValueError):
                found = self._api.request("GET", "/api/v1/pods")
                there = {thing["metadata"]["uid"] for thing in found["items"]}
                for thing in found["items"]:
                    self._see(thing)
                for uid in set(self.pods) - there:
                    self.pods.pop(uid).vanished()
                since = found["metadata"]["resourceVersion"]
                self._watch = self._api.watch("Pod", since=since)
                for event in self._watch:
                    if event["type"] == "ERROR":
                        break
                    self._see(event["object"], gone=event["type"] == "DELETED")

    def _see(self, thing: Object, gone: bool = False) -> None:
        meta = thing["metadata"]
        pod, node = self.pods.get(meta["uid"]), self._nodes.get(thing["spec"].get("nodeName", ""))
        if gone:
            if pod:
                self.pods.pop(meta["uid"]).vanished()
        elif "deletionTimestamp" in meta:
            if pod:
                pod.deleted(meta.get("deletionGracePeriodSeconds", 0))
            elif node:  # it never ran
                self._api.delete("Pod", meta["name"], namespace=meta["namespace"], grace=0)
        elif node and not pod:
            self.pods[meta["uid"]] = Pod(self._api, node, thing)
        elif pod:
            pod.labels = meta.get("labels", {})
