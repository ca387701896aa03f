"""A control plane of the test's own: etcd, API server, controllers, scheduler, in processes."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import signal
import ssl
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import urllib3
import yaml

from demo.lab import Lab, Place, stop
from tests.cluster.api import Api, ApiError
from tests.cluster.network import PLANE, POD_CIDRS, SERVICE_CIDRS, Network, inside
from tests.cluster.pki import Pki
from tests.cluster.waiting import tail, wait_for

SERVER = f"https://{PLANE.v4}:6443"
CLUSTER_IPS = ("10.96.0.1", "fd00:96::1")  # of the Service `kubernetes`
COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")


class ControlPlane:
    """Runs in the network's plane namespace, on the ports that each program has by default.

    `admin` may do everything. `stop`, `kill`, `start` and `restart` take names of COMPONENTS, none
    meaning all. The store is on disk: what was in the cluster is there after a restart.
    """

    def __init__(self, network: Network, programs: Path) -> None:
        self.lab: Lab = network.lab
        self.network = network.plane
        self._programs = programs
        self._directory = self.lab.directory / "plane"
        self._directory.mkdir(mode=0o700)
        self._place = Place(self.network, self.lab.group("plane"))
        self.pki = Pki(self._directory / "pki")
        self.names = COMPONENTS
        #: More options, by component, for its next start.
        self.more: dict[str, dict[str, object]] = {}
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self.admin = self.api("admin", "system:masters")

    # -- processes ---------------------------------------------------------------------------

    def start(self, *names: str, wait: bool = True) -> None:
        """In the order in which they need each other; returns when all of them serve."""
        for name in self._ordered(names):
            assert not self.running(name), f"{name} runs"
            with self.log(name).open("ab") as log:
                command: list[str | Path] = [self._programs / name, *self._arguments(name)]
                self._processes[name] = self.lab.start(command, self._place, stdout=log, stderr=log)
            if wait:
                self.wait_ready(name)

    def stop(self, *names: str) -> None:
        for name in reversed(self._ordered(names)):
            stop(self._processes[name], grace=20)

    def kill(self, *names: str) -> None:
        """SIGKILL."""
        for name in reversed(self._ordered(names)):
            self._processes[name].send_signal(signal.SIGKILL)
            self._processes[name].wait()

    def close(self) -> None:
        """Quick: nobody will read what they could still write."""
        for process in self._processes.values():
            process.kill()

    def restart(self, *names: str) -> None:
        self.stop(*names)
        self.start(*names)

    def running(self, name: str) -> bool:
        return name in self._processes and self._processes[name].poll() is None

    def wait_ready(self, *names: str) -> None:
        for name in self._ordered(names):
            wait_for(partial(self._ready, name), name, 60, logs=partial(self.tail, name))

    def log(self, name: str) -> Path:
        return self._directory / f"{name}.log"

    def tail(self, *names: str, lines: int = 15) -> str:
        """The last lines of the logs, for a test that failed."""
        return "\n".join(tail(self.log(name), lines) for name in names or COMPONENTS)

    def _ready(self, name: str) -> bool:
        assert self.running(name), f"{name} has ended\n{self.tail(name)}"
        match name:
            case "etcd":
                return self._ok(2381, "/readyz", tls=False)
            case "kube-apiserver":
                with contextlib.suppress(ApiError, urllib3.exceptions.HTTPError):
                    return bool(self.admin.request("GET", "/readyz") == "ok")
                return False
            case "kube-controller-manager":
                return self._ok(10257, "/healthz")
            case _:
                return self._ok(10259, "/readyz")

    def _ok(self, port: int, path: str, *, tls: bool = True) -> bool:
        """Of a server whose certificate nobody knows."""
        any_certificate = ssl._create_unverified_context()
        with inside(self.network), contextlib.suppress(OSError, http.client.HTTPException):
            connection = (
                http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=any_certificate)
                if tls
                else http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            )
            with contextlib.closing(connection):
                connection.request("GET", path)
                return connection.getresponse().status == 200
        return False

    @staticmethod
    def _ordered(names: tuple[str, ...]) -> list[str]:
        assert set(names) <= set(COMPONENTS), f"there are {COMPONENTS}"
        return [name for name in COMPONENTS if name in names or not names]

    # -- what each is told -------------------------------------------------------------------

    def _arguments(self, name: str) -> list[str]:
        options: dict[str, object] = {
            "etcd": self._etcd,
            "kube-apiserver": self._apiserver,
            "kube-controller-manager": self._controllers,
            "kube-scheduler": self._scheduler,
        }[name]()
        options |= self.more.get(name, {})
        return [f"--{option}={value}" for option, value in options.items()]

    def _etcd(self) -> dict[str, object]:
        return {
            "data-dir": self._directory / "etcd",
            "listen-metrics-urls": "http://127.0.0.1:2381",
            "unsafe-no-fsync": "true",  # a test's store need not outlive the machine
            "log-level": "warn",
        }

    def _apiserver(self) -> dict[str, object]:
        names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost")
        addresses = (*PLANE, *CLUSTER_IPS, "127.0.0.1", "::1")
        serving = self.pki.server("kube-apiserver", *names, *addresses)
        return {
            "advertise-address": PLANE.v4,
            "etcd-servers": "http://127.0.0.1:2379",
            "etcd-compaction-interval": 0,  # only `compact` does it
            "service-cluster-ip-range": ",".join(SERVICE_CIDRS),
            "authorization-mode": "RBAC",
            "client-ca-file": self.pki.authority,
            "tls-cert-file": serving.certificate,
            "tls-private-key-file": serving.key,
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-signing-key-file": self.pki.tokens,
            "service-account-key-file": self.pki.tokens,
            "allow-privileged": "true",
            # Else a stop waits for a minute for watches that go on.
            "shutdown-send-retry-after": "true",
            "shutdown-watch-termination-grace-period": "1s",
        }

    def _controllers(self) -> dict[str, object]:
        return {
            "kubeconfig": self.kubeconfig("system:kube-controller-manager"),
            "use-service-account-credentials": "true",  # as kubeadm has it: their own RBAC
            "service-account-private-key-file": self.pki.tokens,
            "root-ca-file": self.pki.authority,
            "cluster-cidr": ",".join(POD_CIDRS),
            "leader-elect": "false",
            # At the default of 20 a second the controllers need five seconds to begin.
            "kube-api-qps": 200,
            "kube-api-burst": 400,
            "node-monitor-period": "200ms",  # takes the taint off a new node
            # No kubelet renews leases here: a node is as ready as it last said.
            "node-monitor-grace-period": "24h",
        }

    def _scheduler(self) -> dict[str, object]:
        return {"kubeconfig": self.kubeconfig("system:kube-scheduler"), "leader-elect": "false"}

    # -- access ------------------------------------------------------------------------------

    def api(self, user: str, *groups: str) -> Api:
        """By a client certificate."""
        known = self.pki.client(user, *groups)
        return Api(self.network, SERVER, self.pki.authority, known.certificate, known.key)

    def kubeconfig(
        self, user: str, *groups: str, token: str = "", server: str = SERVER, name: str = ""
    ) -> Path:
        """A file for a client certificate of this user or, with a token, for that. `server` may be
        a proxy; `name` keeps files of one user apart."""
        if token:
            access: dict[str, Any] = {"token": token}
        else:
            known = self.pki.client(user, *groups)
            access = {
                "client-certificate-data": _data(known.certificate),
                "client-key-data": _data(known.key),
            }
        cluster = {"server": server, "certificate-authority-data": _data(self.pki.authority)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": user, "user": access}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
            "current-context": "test",
        }
        path = self._directory / f"{name or user.replace(':', '_')}.kubeconfig"
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        return path

    def service_account_token(self, namespace: str, name: str, seconds: int = 3600) -> str:
        """Of an account that exists; the server allows no less than 600 seconds."""
        path = self.admin.path("ServiceAccount", "v1", namespace, name) + "/token"
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest"}
        found = self.admin.request(
            "POST", path, {**request, "spec": {"expirationSeconds": seconds}}
        )
        return str(found["status"]["token"])

    # -- etcd --------------------------------------------------------------------------------

    def compact(self) -> int:
        """Makes etcd forget all but the newest revision; that one. The API server has its own
        memory of some older ones: after its restart a watch from before gets 410."""
        revision = int(self._etcd_call("kv/range", {"key": "AA=="})["header"]["revision"])
        self._etcd_call("kv/compaction", {"revision": revision, "physical": True})
        return revision

    def _etcd_call(self, method: str, body: object) -> Any:
        with inside(self.network):
            connection = http.client.HTTPConnection("127.0.0.1", 2379, timeout=30)
            with contextlib.closing(connection):
                connection.request("POST", f"/v3/{method}", json.dumps(body))
                response = connection.getresponse()
                text = response.read()
        assert response.status == 200, f"etcd {method}: {response.status} {text!r}"
        return json.loads(text)


def _data(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


__all__ = ["CLUSTER_IPS", "COMPONENTS", "SERVER", "ControlPlane"]
