"""The way to an API server as it is configured: the one module that knows the `kubernetes` package.

It reads kubeconfigs, with exec plugins and contexts, and a pod's service account, keeps the token
fresh, and makes the connections' TLS. None of its models is used.
"""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from kubernetes.client.configuration import Configuration
from kubernetes.client.rest import RESTClientObject, should_bypass_proxies
from kubernetes.config import ConfigException, incluster_config, load_kube_config
from urllib3 import PoolManager
from urllib3.connection import HTTPConnection

from pointsman.errors import NoCluster
from pointsman.kube.access import Access
from pointsman.kube.api import ApiError

#: Where a pod is told the ClusterIP of the Service default/kubernetes.
SERVICE_HOST = incluster_config.SERVICE_HOST_ENV_NAME

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


class Credentials:
    """One reading of the configuration, and the connections made with it."""

    def __init__(self, access: Access, keys: Path | None) -> None:
        self.config = _configuration(access, keys)
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


def empty(directory: Path) -> None:
    """Takes away what an agent that was killed left in it; only we may look in."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    for path in directory.iterdir():
        path.unlink()


def _configuration(access: Access, keys: Path | None) -> Configuration:
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
                temp_file_path=str(keys) if keys else None,
            )
        elif os.environ.get(SERVICE_HOST):
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
