"""The way to an API server: the one module that knows the `kubernetes` package and urllib3.

The package reads the configuration (kubeconfig with exec plugins, or a pod's ServiceAccount), keeps
the token fresh and brings the transport. None of its models is used.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http.client import HTTPException
from ssl import SSLCertVerificationError
from urllib.parse import urlencode, urlsplit

from kubernetes.client.configuration import Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.client.rest import RESTClientObject, should_bypass_proxies
from kubernetes.config import ConfigException, incluster_config, load_kube_config
from urllib3 import BaseHTTPResponse, PoolManager, Timeout
from urllib3.connection import HTTPConnection
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, SSLError

from pointsman import __version__
from pointsman.errors import NoCluster
from pointsman.kube.access import Access
from pointsman.kube.api import ApiError
from pointsman.kube.decode import error_of
from pointsman.kube.route import Route

log = logging.getLogger("pointsman.kube")

_CHUNK = 1 << 16
_SLACK = 15.0  # seconds that a watch may last longer than it was asked to
# An API server spends more on gzip than a network of nodes on the bytes.
_HEADERS = {"User-Agent": f"pointsman/{__version__}", "Accept-Encoding": "identity"}
_WAY = (HTTPError, HTTPException, OSError, ApiException)
# A watch must notice that nobody is there any more, in half a minute as client-go does (its HTTP/2
# pings): a machine that is gone says nothing, nor does a way whose NAT was taken away.
_ALIVE = [
    *HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
]
# Nothing was sent.
_UNDONE = (NewConnectionError, ConnectTimeoutError)


class _Credentials:
    """One reading of the configuration, and the connections made with it."""

    def __init__(self, access: Access) -> None:
        self.config = _configuration(access)
        self.url = (access.server or self.config.host).rstrip("/")
        self._pools: dict[str, PoolManager] = {}

    @property
    def guarded(self) -> bool:
        """See `Route`."""
        config = self.config
        proxied = config.proxy and not should_bypass_proxies(self.url, config.no_proxy or "")
        return self.url.startswith("https:") and bool(config.verify_ssl) and not proxied

    def pool(self, url: str) -> PoolManager:
        if url not in self._pools:
            config = copy.copy(self.config)
            if url != self.url:
                config.proxy = None
                config.tls_server_name = config.tls_server_name or urlsplit(self.url).hostname
            self._pools[url] = RESTClientObject(config).pool_manager
        return self._pools[url]

    def close(self) -> None:
        """Ends the connections that nobody uses now, the others when they are given back."""
        for manager in self._pools.values():
            for key in manager.pools.keys():  # noqa: SIM118 - urllib3's container has no other way
                manager.pools[key].close()
            manager.clear()

    def header(self) -> dict[str, str]:
        """Raises ApiError if the token can't be read again."""
        try:
            settings = self.config.auth_settings().get("BearerToken")
        except (ConfigException, OSError) as error:
            raise ApiError(401, "Unauthorized", f"there is no token: {error}") from None
        value = (settings or {}).get("value")
        return {"Authorization": str(value).strip()} if value else {}


class ApiServer:
    """See `api.Api`. Raises NoCluster if there is no usable configuration.

    Where several URLs may lead to it (see `Route`), the next one is tried as soon as one fails. A
    401, and a server that is not trusted, have the whole configuration read again, once for each
    request: that renews tokens, certificates and authorities, which the package would keep.
    """

    def __init__(
        self,
        access: Access,
        *,
        connect_timeout: float = 5.0,
        read_timeout: float = 90.0,
        slack: float = _SLACK,
    ) -> None:
        self._access = access
        self._connect_timeout, self._read_timeout = connect_timeout, read_timeout
        self._slack = slack
        self._lock = threading.Lock()
        self._credentials = _Credentials(access)
        host = os.environ.get(incluster_config.SERVICE_HOST_ENV_NAME, "")
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
        """A watch that the server is asked to end after so many seconds. One that lasts notably
        longer, or is silent for so long, counts as stalled."""
        query = {**query, "watch": "true", "timeoutSeconds": str(seconds)}
        limit = seconds + self._slack
        return _Stream(self._request("GET", path, query, read_timeout=limit), limit)

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

    def _tries(self) -> Iterator[_Credentials]:
        """The credentials at hand, then those read anew."""
        credentials = self._credentials
        yield credentials
        with self._lock:
            if self._credentials is credentials:  # else another thread has read them by now
                try:
                    self._credentials = _Credentials(self._access)
                except NoCluster as error:
                    log.warning("the credentials could not be read again: %s", error)
                    return
                credentials.close()
        yield self._credentials

    def _dial(
        self,
        credentials: _Credentials,
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

    def __init__(self, answer: BaseHTTPResponse, limit: float) -> None:
        self._answer = answer
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


def _configuration(access: Access) -> Configuration:
    config = Configuration()
    config.retries = False
    config.socket_options = _ALIVE
    try:
        if access.kubeconfig:
            if not access.kubeconfig.is_file():
                raise NoCluster(f"there is no kubeconfig {access.kubeconfig}; mend --kubeconfig")
            load_kube_config(
                str(access.kubeconfig),
                context=access.context or None,
                client_configuration=config,
                persist_config=False,
            )
        elif os.environ.get(incluster_config.SERVICE_HOST_ENV_NAME):
            incluster_config.load_incluster_config(config)
        elif not access.server.startswith("http:"):
            raise NoCluster(
                "no account for an API server is configured, and this is no pod "
                "($KUBERNETES_SERVICE_HOST is not set); give --kubeconfig FILE"
            )
    except NoCluster:
        raise
    except Exception as error:  # the package raises whatever its parsers do
        place = f"kubeconfig {access.kubeconfig}" if access.kubeconfig else "the pod's account"
        context = f", context {access.context}" if access.context else ""
        raise NoCluster(f"{place}{context} can't be used: {error}; mend it") from None
    if access.server:
        config.host = access.server
        if access.server.startswith("http:") and not access.kubeconfig:
            config.api_key, config.refresh_api_key_hook = {}, None  # no token in the clear
    return config
