"""The API server as a test speaks to it: server-side apply, patches, lists and watches in JSON."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3
import yaml
from urllib3.connection import HTTPSConnection

from tests.cluster.network import inside

Object = dict[str, Any]
_APPLY = "application/apply-patch+yaml"
_MERGE = "application/merge-patch+json"
_STRATEGIC = "application/strategic-merge-patch+json"


class ApiError(Exception):
    """The server said no. `status` is HTTP's, `reason` Kubernetes' (NotFound, Conflict, …)."""

    def __init__(self, what: str, status: int, body: bytes) -> None:
        try:
            said = json.loads(body)
        except ValueError:
            said = {}
        self.status = status
        self.reason: str = said.get("reason", "")
        super().__init__(f"{what}: {status} {said.get('message', body[:500])}")


class Watch:
    """Events of one watch, as the server sends them; ends when the server or `close` ends it."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        self._response = response

    def __iter__(self) -> Iterator[Object]:
        rest = b""
        while block := self._response.read1():
            *lines, rest = (rest + block).split(b"\n")
            yield from map(json.loads, lines)

    def close(self) -> None:
        """From any thread."""
        self._response.shutdown()


class Api:
    """One user's access. `server` as https://HOST:PORT, reached from a network namespace.

    Methods raise ApiError, and what urllib3 raises when the server is away. `kind` is as in
    manifests, with the group's version where it is not "v1": get("EndpointSlice",
    "discovery.k8s.io/v1", ...). Objects are plain dicts.
    """

    def __init__(
        self,
        network: Path,
        server: str,
        authority: Path,
        certificate: Path | None = None,
        key: Path | None = None,
        token: str = "",
    ) -> None:
        class Connection(HTTPSConnection):
            def connect(self) -> None:
                with inside(network):
                    super().connect()

        where = urllib3.util.parse_url(server)
        self._pool = urllib3.connectionpool.HTTPSConnectionPool(
            where.hostname or "",
            where.port,
            maxsize=16,
            retries=False,
            timeout=urllib3.Timeout(connect=5, read=60),
            ca_certs=str(authority),
            cert_file=str(certificate) if certificate else None,
            key_file=str(key) if key else None,
        )
        self._pool.ConnectionCls = Connection
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._resources: dict[tuple[str, str], tuple[str, bool]] = {}
        self._lock = threading.Lock()

    # -- HTTP --------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        content: str = "application/json",
        **query: object,
    ) -> Any:
        """JSON there and back; text where the answer is not JSON."""
        response = self._send(method, path, body, content, query)
        data = response.data
        if "json" in response.headers.get("Content-Type", ""):
            return json.loads(data)
        return data.decode()

    def _send(
        self,
        method: str,
        path: str,
        body: object,
        content: str,
        query: Mapping[str, object],
        *,
        stream: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        if query:
            path += "?" + urlencode({k: v for k, v in query.items() if v is not None})
        response = self._pool.urlopen(
            method,
            path,
            body=None if body is None else json.dumps(body).encode(),
            headers={**self._headers, "Content-Type": content},
            preload_content=not stream,
            timeout=urllib3.Timeout(connect=5, read=None) if stream else None,
        )
        if response.status >= 300:
            raise ApiError(f"{method} {path}", response.status, response.data)
        return response

    def path(
        self, kind: str, version: str = "v1", namespace: str | None = "default", name: str = ""
    ) -> str:
        """Of a collection or, with a name, an object. `namespace=None` is all namespaces."""
        plural, namespaced = self._resource(kind, version)
        path = _root(version)
        if namespaced and namespace is not None:
            path += f"/namespaces/{namespace}"
        return f"{path}/{plural}" + (f"/{name}" if name else "")

    def _resource(self, kind: str, version: str) -> tuple[str, bool]:
        with self._lock:
            if (kind, version) not in self._resources:
                for found in self.request("GET", _root(version))["resources"]:
                    if "/" not in found["name"]:  # no subresource
                        known = found["name"], found["namespaced"]
                        self._resources[found["kind"], version] = known
            if (kind, version) not in self._resources:
                raise LookupError(f"the API server has no {kind} in {version}")
            return self._resources[kind, version]

    def _path_of(self, thing: Object, namespace: str) -> str:
        meta = thing["metadata"]
        inside = meta.get("namespace", namespace)
        return self.path(thing["kind"], thing["apiVersion"], inside, meta["name"])

    # -- objects -----------------------------------------------------------------------------

    def apply(self, *things: Object | str, namespace: str = "default") -> list[Object]:
        """Server-side apply of objects and of YAML documents, as the owner of their fields."""
        return self._apply(things, namespace)

    def dry_run(self, *things: Object | str, namespace: str = "default") -> list[Object]:
        """What `apply` would make of them; unknown and doubled fields are errors."""
        return self._apply(things, namespace, dryRun="All", fieldValidation="Strict")

    def _apply(
        self, things: tuple[Object | str, ...], namespace: str, **query: object
    ) -> list[Object]:
        query |= {"fieldManager": "test", "force": "true"}
        return [
            self.request("PATCH", self._path_of(thing, namespace), thing, content=_APPLY, **query)
            for thing in documents(*things)
        ]

    def get(
        self, kind: str, name: str, version: str = "v1", namespace: str | None = "default"
    ) -> Object:
        found: Object = self.request("GET", self.path(kind, version, namespace, name))
        return found

    def find(
        self, kind: str, name: str, version: str = "v1", namespace: str | None = "default"
    ) -> Object | None:
        """None if there is no such object."""
        try:
            return self.get(kind, name, version, namespace)
        except ApiError as error:
            if error.status != 404:
                raise
            return None

    def list(
        self,
        kind: str,
        version: str = "v1",
        namespace: str | None = "default",
        labels: str | None = None,
        fields: str | None = None,
    ) -> list[Object]:
        path = self.path(kind, version, namespace)
        found = self.request("GET", path, labelSelector=labels, fieldSelector=fields)
        return list(found["items"])

    def create(self, thing: Object, namespace: str = "default") -> Object:
        inside = thing["metadata"].get("namespace", namespace)
        path = self.path(thing["kind"], thing["apiVersion"], inside)
        made: Object = self.request("POST", path, thing)
        return made

    def patch(
        self,
        kind: str,
        name: str,
        change: Object,
        version: str = "v1",
        namespace: str | None = "default",
        *,
        part: str = "",
    ) -> Object:
        """A JSON merge patch: lists are replaced, None removes. `part` is a subresource."""
        path = self.path(kind, version, namespace, name) + (f"/{part}" if part else "")
        changed: Object = self.request("PATCH", path, change, content=_MERGE)
        return changed

    def patch_status(
        self,
        kind: str,
        name: str,
        status: Object,
        version: str = "v1",
        namespace: str | None = "default",
    ) -> Object:
        """A strategic merge patch: conditions of other types stay."""
        path = self.path(kind, version, namespace, name) + "/status"
        changed: Object = self.request("PATCH", path, {"status": status}, content=_STRATEGIC)
        return changed

    def delete(
        self,
        kind: str,
        name: str,
        version: str = "v1",
        namespace: str | None = "default",
        grace: int | None = None,
    ) -> bool:
        """Whether there was such an object."""
        path = self.path(kind, version, namespace, name)
        try:
            self.request("DELETE", path, gracePeriodSeconds=grace)
        except ApiError as error:
            if error.status != 404:
                raise
            return False
        return True

    def watch(
        self,
        kind: str,
        version: str = "v1",
        namespace: str | None = None,
        since: str = "",
        **query: object,
    ) -> Watch:
        """Events after resourceVersion `since`."""
        query = {"watch": "true", "resourceVersion": since, **query}
        path = self.path(kind, version, namespace)
        return Watch(self._send("GET", path, None, "application/json", query, stream=True))


def documents(*things: Object | str) -> Iterator[Object]:
    """Objects, and those in texts of YAML."""
    for thing in things:
        if isinstance(thing, str):
            yield from (found for found in yaml.safe_load_all(thing) if found)
        else:
            yield thing


def _root(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"
