"""A small API server on 127.0.0.1, real enough to list and watch at, with faults on demand.

It speaks HTTP/1.1 over real sockets: lists in pages from a snapshot, watches with a history that
can be compacted, label and field selectors of the few forms that are asked for.
"""

from __future__ import annotations

import copy
import json
import ssl
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

Object = dict[str, Any]
Key = tuple[str, str, str]  # plural, namespace, name
PLURALS = ("services", "endpointslices", "nodes", "pods", "namespaces", "servicecidrs")


class FakeApi:
    """`with FakeApi() as api:`. All of it may be called from any thread.

    `fault(plural, verb, what, times)` makes the next `times` requests fail, verb "list", "continue"
    or "watch", `what` one of
    a number       that HTTP status, "429:2" with a Retry-After of 2 seconds
    dead           the connection ends without a word, before any headers
    cut            the connection ends without a word, of a watch after the headers
    half           half of the answer, of a watch half of its first line
    garbage        what is no JSON
    stall          nothing, until the client goes away
    drip           a byte at a time, without an end
    error:NUMBER   an ERROR event with that code
    """

    def __init__(self, tls: tuple[Path, Path] | None = None, address: str = "127.0.0.1") -> None:
        self.changed = threading.Condition()
        self.version = 100
        self.objects: dict[Key, Object] = {}
        #: (version, plural, before, after): None where there is no object.
        self.history: list[tuple[int, str, Object | None, Object | None]] = []
        self.compacted = 0
        self.generation = 0  # of watches: those of an older one end
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.token = ""
        self.page_size = 500
        self.absent: set[str] = set()
        self.refuses_fields = False
        self.posted: list[tuple[str, str, bytes]] = []
        self._faults: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._snapshots: dict[tuple[str, str], list[Object]] = {}
        self.stopping = threading.Event()
        self._server = _Server((address, 0), _Handler)
        self._server.api = self
        self.port = self._server.server_address[1]
        self.url = f"http://{address}:{self.port}"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.url = f"https://{address}:{self.port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )

    def __enter__(self) -> FakeApi:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends everything, also what is under way."""
        self.stopping.set()
        self.end_watches()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # -- what it holds -----------------------------------------------------------------------

    def put(self, plural: str, obj: Object) -> None:
        meta = obj["metadata"]
        key = (plural, meta.get("namespace", ""), meta["name"])
        with self.changed:
            self.version += 1
            obj = copy.deepcopy(obj)
            obj["metadata"]["resourceVersion"] = str(self.version)
            self._record(plural, self.objects.get(key), obj)
            self.objects[key] = obj

    def delete(self, plural: str, namespace: str, name: str) -> None:
        with self.changed:
            before = self.objects.pop((plural, namespace, name), None)
            if before:
                self.version += 1
                self._record(plural, before, None)

    def _record(self, plural: str, before: Object | None, after: Object | None) -> None:
        self.history.append((self.version, plural, before, after))
        self.changed.notify_all()

    def bookmark(self) -> None:
        """To every watch, of a new version."""
        with self.changed:
            self.version += 1
            self._record("", None, None)

    def compact(self) -> None:
        """Forgets the history and the snapshots: older versions are 410."""
        with self.changed:
            self.compacted = self.version
            self.history.clear()
            self._snapshots.clear()

    def end_watches(self) -> None:
        """Cleanly, as at their timeoutSeconds."""
        with self.changed:
            self.generation += 1
            self.changed.notify_all()

    # -- faults ------------------------------------------------------------------------------

    def fault(self, plural: str, verb: str, what: str, times: int = 1) -> None:
        with self.changed:
            self._faults[plural, verb] += [what] * times

    def clear_faults(self) -> None:
        with self.changed:
            self._faults.clear()

    def take_fault(self, plural: str, verb: str) -> str:
        with self.changed:
            waiting = self._faults[plural, verb]
            return waiting.pop(0) if waiting else ""

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60.0) -> bool:
        """For what comes with a request or a change."""
        with self.changed:
            return self.changed.wait_for(condition, seconds)

    def asked(self, plural: str, verb: str) -> list[dict[str, str]]:
        """The queries so far."""
        with self.changed:
            return [query for one, at, query in self.requests if (one, at) == (plural, verb)]

    # -- answers -----------------------------------------------------------------------------

    def page(self, plural: str, query: dict[str, str]) -> Object | None:
        """None for a token that is too old."""
        with self.changed:
            if token := query.get("continue"):
                name, _, start = token.partition(":")
                if (plural, name) not in self._snapshots:
                    return None
                found, begin = self._snapshots[plural, name], int(start)
            else:
                found = [
                    obj
                    for (kind, _, _), obj in sorted(self.objects.items())
                    if kind == plural and matches(obj, query)
                ]
                name, begin = str(self.version), 0
                self._snapshots[plural, name] = found
            size = min(int(query.get("limit", 0)), self.page_size) or len(found)
            meta: Object = {"resourceVersion": name}
            if begin + size < len(found):
                meta["continue"] = f"{name}:{begin + size}"
            return {"metadata": meta, "items": found[begin : begin + size]}

    def events(self, plural: str, query: dict[str, str], generation: int) -> Iterator[Object]:
        """Of a watch that was asked for in this generation, until it ends."""
        version = int(query["resourceVersion"])
        while True:
            with self.changed:
                self.changed.wait_for(
                    lambda v=version: (
                        self.generation != generation
                        or bool(self.history and self.history[-1][0] > v)
                    )
                )
                ended = self.generation != generation
                fresh = [entry for entry in self.history if entry[0] > version]
            for version, kind, before, after in fresh:
                if not kind:
                    meta = {"metadata": {"resourceVersion": str(version)}}
                    yield {"type": "BOOKMARK", "object": meta}
                elif kind == plural and (event := _event(version, before, after, query)):
                    yield event
            if ended:
                return


def _event(
    version: int, before: Object | None, after: Object | None, query: dict[str, str]
) -> Object | None:
    was, is_ = (obj is not None and matches(obj, query) for obj in (before, after))
    if is_:
        return {"type": "MODIFIED" if was else "ADDED", "object": after}
    if was and before:
        gone = copy.deepcopy(after or before)
        gone["metadata"]["resourceVersion"] = str(version)
        return {"type": "DELETED", "object": gone}
    return None


def matches(obj: Object, query: dict[str, str]) -> bool:
    labels = obj["metadata"].get("labels") or {}
    for term in filter(None, query.get("labelSelector", "").split(",")):
        name, equals, value = term.partition("=")
        if term.startswith("!"):
            if term[1:] in labels:
                return False
        elif labels.get(name) != value if equals else name not in labels:
            return False
    if field := query.get("fieldSelector"):
        path, value = field.replace("!=", "=").split("=")
        found: Any = obj
        for name in path.split("."):
            found = found.get(name, "")
        return bool((str(found) == value) != ("!=" in field))
    return True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    api: FakeApi

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients come and go; what they miss shows in the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 60

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.api.posted.append((self.command, self.path, body))
        self._answer(201, b"{}")

    do_PATCH = do_POST

    def do_GET(self) -> None:
        api = self.server.api
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query))
        plural = parts.path.rpartition("/")[2]
        verb = "watch" if "watch" in query else "continue" if "continue" in query else "list"
        with api.changed:
            api.requests.append((plural, verb, query))
            api.changed.notify_all()
            self.generation = api.generation  # whoever has seen the request may end the watch
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if api.token and (scheme.lower(), token) != ("bearer", api.token):
            return self._status(401, "Unauthorized")
        fault = api.take_fault(plural, verb)
        if fault[:1].isdigit():
            code, _, seconds = fault.partition(":")
            return self._status(int(code), REASONS.get(int(code), ""), seconds)
        if api.stopping.is_set() or fault == "dead" or (fault == "cut" and verb != "watch"):
            self.close_connection = True
            return None
        if plural in api.absent:
            return self._status(404, "NotFound")
        if api.refuses_fields and "spec.clusterIP" in query.get("fieldSelector", ""):
            return self._status(400, "BadRequest")
        if verb == "watch":
            return self._watch(plural, query, fault)
        page = api.page(plural, query)
        if page is None:
            return self._status(410, "Expired")
        body = json.dumps(page).encode()
        if fault == "garbage":
            body = b"<html>" + body
        return self._answer(200, body, fault=fault)

    def _status(self, code: int, reason: str, retry_after: str = "") -> None:
        value = {"kind": "Status", "code": code, "reason": reason, "message": f"fake {reason}"}
        extra = {"Retry-After": retry_after} if retry_after else {}
        self._answer(code, json.dumps(value).encode(), extra)

    def _answer(
        self, code: int, body: bytes, extra: dict[str, str] | None = None, fault: str = ""
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in (extra or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if fault in ("half", "drip", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            if fault != "half":
                self._until_gone(b" " if fault == "drip" else b"")
        else:
            self.wfile.write(body)

    def _watch(self, plural: str, query: dict[str, str], fault: str) -> None:
        api = self.server.api
        if int(query["resourceVersion"]) < api.compacted:
            return self._status(410, "Expired")
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        if fault.startswith("error:"):
            code = int(fault.removeprefix("error:"))
            status = {"code": code, "reason": REASONS.get(code, ""), "message": "fake"}
            self._chunk(json.dumps({"type": "ERROR", "object": status}).encode() + b"\n")
        elif fault == "garbage":
            self._chunk(b"{]\n")
        elif fault in ("stall", "drip"):
            return self._until_gone(b"1\r\n \r\n" if fault == "drip" else b"")
        elif fault == "cut":
            return None
        else:
            for event in api.events(plural, query, self.generation):
                line = json.dumps(event).encode() + b"\n"
                if fault == "half":
                    return self._chunk(line[: len(line) // 2])
                self._chunk(line)
        self.wfile.write(b"0\r\n\r\n")
        return None

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _until_gone(self, data: bytes) -> None:
        while not self.server.api.stopping.wait(0.01):
            if data:
                self.wfile.write(data)


REASONS = {400: "BadRequest", 403: "Forbidden", 404: "NotFound", 410: "Expired"} | {
    429: "TooManyRequests", 500: "InternalError", 504: "Timeout"
}  # fmt: skip
