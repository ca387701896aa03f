"""Requests to an API server, over urllib3: by which way, and which answers are none."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from ssl import SSLCertVerificationError
from urllib.parse import urlencode

from urllib3 import BaseHTTPResponse, Timeout
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)

from pointsman import __version__
from pointsman.errors import NoCluster
from pointsman.kube.access import Access
from pointsman.kube.api import ApiError
from pointsman.kube.credentials import SERVICE_HOST, Credentials, empty
from pointsman.kube.decode import error_of
from pointsman.kube.route import Route

log = logging.getLogger("pointsman.kube")

_CHUNK = 1 << 16
_SILENCE = 150.0  # seconds without a byte of a watch
_SLACK = 15.0  # seconds that a watch may last longer than it was asked to
# An API server spends more on gzip than a network of nodes on the bytes.
_HEADERS = {"User-Agent": f"pointsman/{__version__}", "Accept-Encoding": "identity"}
_WAY = (HTTPError, HTTPException, OSError)
# Nothing was sent.
_UNDONE = (NewConnectionError, ConnectTimeoutError)


class ApiServer:
    """See `api.Api`. Raises NoCluster if there is no usable configuration.

    Where several URLs may lead to it (see `Route`), the next one is tried as soon as one fails. A
    401, and a server that is not trusted, have the whole configuration read again, once for each
    request: that renews tokens, certificates and authorities, which the package would keep.

    `keys`: a directory of our own for what OpenSSL reads from files only, and a kubeconfig has in
    its text; without one they go to where temporary files do.
    """

    def __init__(
        self,
        access: Access,
        *,
        keys: Path | None = None,
        connect_timeout: float = 5.0,
        read_timeout: float = 90.0,
        silence: float = _SILENCE,
        slack: float = _SLACK,
    ) -> None:
        self._access, self._keys, self._silence = access, keys, silence
        if keys:
            empty(keys)
        self._connect_timeout, self._read_timeout = connect_timeout, read_timeout
        self._slack = slack
        self._lock = threading.Lock()
        self._credentials = Credentials(access, keys)
        host = os.environ.get(SERVICE_HOST, "")
        known = self._credentials
        self._route = Route(known.url, cluster_ips={host} - {""}, guarded=known.guarded)

    @property
    def server(self) -> str:
        return self._route.current

    def remember(self, cluster_ips: tuple[str, ...], endpoints: tuple[str, ...]) -> None:
        """The Service default/kubernetes as last seen: its addresses, and the URLs behind it."""
        self._route.remember(cluster_ips, endpoints)

    def get(self, path: str, query: Mapping[str, str]) -> bytes:
        return self._body(self._request("GET", path, query))

    def post(self, path: str, value: object) -> bytes:
        return self._body(self._request("POST", path, {}, value))

    def patch(self, path: str, value: object, kind: str = "application/merge-patch+json") -> bytes:
        return self._body(self._request("PATCH", path, {}, value, kind))

    def stream(self, path: str, query: Mapping[str, str], seconds: int) -> _Stream:
        """A watch that the server is asked to end after so many seconds; one that lasts notably
        longer counts as stalled. One without even a bookmark, of which there is one a minute, just
        ends: asking again is cheap, and tells whether anybody is still there."""
        query = {**query, "watch": "true", "timeoutSeconds": str(seconds)}
        limit = seconds + self._slack
        answer = self._request("GET", path, query, read_timeout=min(limit, self._silence))
        return _Stream(answer, limit, patient=self._silence < limit)

    # -- one request -------------------------------------------------------------------------

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        value: object = None,
        kind: str = "application/json",
        read_timeout: float = 0.0,
    ) -> BaseHTTPResponse:
        """The answer with its body unread. Raises ApiError, also for every status from 300 on."""
        if query:
            path = f"{path}?{urlencode(query)}"
        body = None if value is None else json.dumps(value).encode()
        timeout = Timeout(connect=self._connect_timeout, read=read_timeout or self._read_timeout)
        for credentials in self._tries():
            try:
                with self._lock:
                    token = credentials.header()
                headers = {**_HEADERS, "Accept": "application/json", **token}
                if body is not None:
                    headers["Content-Type"] = kind
                answer = self._dial(credentials, method, path, headers, body, timeout)
            except ApiError as error:
                if error.reason == "Unreachable":
                    raise
                refusal = error
                continue
            if answer.status != 401:
                break
            refusal = self._refusal(answer)
        else:
            raise refusal
        if answer.status >= 300:
            raise self._refusal(answer)
        return answer

    def _tries(self) -> Iterator[Credentials]:
        """The credentials at hand, then those read anew."""
        credentials = self._credentials
        yield credentials
        with self._lock:
            if self._credentials is credentials:  # else another thread has read them by now
                try:
                    self._credentials = Credentials(self._access, self._keys)
                except NoCluster as error:
                    log.warning("the credentials could not be read again: %s", error)
                    return
                credentials.close()
        yield self._credentials

    def _dial(
        self,
        credentials: Credentials,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes | None,
        timeout: Timeout,
    ) -> BaseHTTPResponse:
        failures, trusted = [], True
        for url in self._route.order(time.monotonic()):
            try:
                with self._lock:
                    pool = credentials.pool(url)
                answer = pool.request(
                    method,
                    f"{url}{path}",
                    headers=headers,
                    body=body,
                    timeout=timeout,
                    preload_content=False,
                )
            except _WAY as error:
                self._route.failed(url, time.monotonic())
                failures.append(f"{url}: {_told(error)}")
                trusted = trusted and not _untrusted(error)
                if method != "GET" and not isinstance(error, _UNDONE):
                    break  # it may have been done: only the caller knows whether twice is right
            else:
                self._route.worked(url)
                return answer
        reason = "Unreachable" if trusted else "Untrusted"
        raise ApiError(0, reason, f"{'; '.join(failures)} ({self._route.mend})")

    def _refusal(self, answer: BaseHTTPResponse) -> ApiError:
        text = answer.headers.get("Retry-After", "")
        retry_after = float(text) if text.isdecimal() else 0.0
        return error_of(answer.status, self._body(answer), retry_after)

    def _body(self, answer: BaseHTTPResponse) -> bytes:
        """All of it. A server that drips is given up after twice the time of a silent one."""
        parts: list[bytes] = []
        end = time.monotonic() + 2 * self._read_timeout
        try:
            while data := answer.read1(_CHUNK):
                parts.append(data)
                if time.monotonic() > end:
                    raise TimeoutError("the answer takes too long")
        except _WAY as error:
            answer.close()
            raise ApiError(0, "Cut", f"the answer broke off: {_told(error)}") from None
        answer.release_conn()
        return b"".join(parts)


class _Stream:
    """See `api.Stream`."""

    def __init__(self, answer: BaseHTTPResponse, limit: float, *, patient: bool) -> None:
        """`patient`: a read may time out long before the `limit`, in seconds."""
        self._answer, self._patient = answer, patient
        self._end = time.monotonic() + limit
        self._closed = False

    def __iter__(self) -> Iterator[list[bytes]]:
        rest = b""
        try:
            while data := self._answer.read1(_CHUNK):
                *lines, rest = (rest + data).split(b"\n")
                if lines:
                    yield lines
                elif time.monotonic() > self._end:
                    raise TimeoutError("it lasts longer than it was asked to")
            if rest and not self._closed:
                raise EOFError("it ended amid a line")
        except ReadTimeoutError as error:
            if rest or not self._patient:
                raise ApiError(0, "Cut", f"the watch stalled: {_told(error)}") from None
        except (*_WAY, EOFError) as error:
            if not self._closed:
                raise ApiError(0, "Cut", f"the watch broke off: {_told(error)}") from None
        finally:
            self._answer.close()

    def close(self) -> None:
        self._closed = True
        # Wakes the reader; to close would wait for the lock that it holds.
        with suppress(ValueError, RuntimeError, OSError):
            self._answer.shutdown()


def _untrusted(error: BaseException) -> bool:
    """Whether the server's certificate was not accepted: nothing was sent."""
    return isinstance(error, SSLError) and isinstance(error.args[0], SSLCertVerificationError)


def _told(error: BaseException) -> str:
    """What happened, without urllib3's names for its connections."""
    text = str(error) or type(error).__name__
    return text.rpartition(">: ")[2].rpartition("): ")[2] or text
