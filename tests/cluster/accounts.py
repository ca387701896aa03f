"""A ServiceAccount with the role of `deploy/`, its tokens, and kubeconfigs that name files."""

from __future__ import annotations

import threading
from pathlib import Path

import yaml

from tests.cluster.api import ApiError, documents
from tests.cluster.plane import SERVER, ControlPlane
from tests.cluster.space import Space
from tests.support.kernel import until

_RBAC = Path(__file__).parents[2] / "deploy" / "kustomize" / "base" / "rbac.yaml"
_NAME = "agent"
_API = "authentication.k8s.io/v1"


class Account:
    """In a test's namespace. `token_file` and `authority_file` are what a kubelet would mount."""

    def __init__(self, plane: ControlPlane, space: Space, directory: Path) -> None:
        self._plane, self._space, self.directory = plane, space, directory
        directory.mkdir(exist_ok=True)
        self.token_file, self.authority_file = directory / "token", directory / "ca.crt"
        subject = {"kind": "ServiceAccount", "name": _NAME, "namespace": space.namespace}
        space.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": _NAME}})
        for thing in documents(_RBAC.read_text()):
            thing["metadata"]["name"] = f"agent-{space.namespace}"
            if thing["kind"] == "ClusterRoleBinding":
                thing["roleRef"]["name"] = f"agent-{space.namespace}"
                thing["subjects"] = [subject]
            plane.admin.apply(thing)
        self.authority_file.write_bytes(plane.pki.authority.read_bytes())
        self.write(self.token())

    def write(self, token: str) -> None:
        """As a kubelet does: the file is replaced."""
        new = self.token_file.with_suffix(".new")
        new.write_text(token)
        new.rename(self.token_file)

    def token(self, bound_to: str = "") -> str:
        """A new one. `bound_to` a Secret, it ends with that."""
        spec: dict[str, object] = {"expirationSeconds": 3600}
        if bound_to:
            self._space.apply(
                {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": bound_to}}
            )
            secret = {"apiVersion": "v1", "kind": "Secret", "name": bound_to}
            spec["boundObjectRef"] = secret
        admin = self._plane.admin
        path = admin.path("ServiceAccount", "v1", self._space.namespace, _NAME) + "/token"
        request = {"apiVersion": _API, "kind": "TokenRequest", "spec": spec}
        return str(admin.request("POST", path, request)["status"]["token"])

    def revoke(self, secret: str) -> None:
        """Returns when the API server, which remembers a good token for ten seconds, refuses."""
        token = self.token_file.read_text()
        self._space.delete("Secret", secret)
        until(lambda: self._refused(token), "a token that is refused", 30)

    def _refused(self, token: str) -> bool:
        threading.Event().wait(0.5)
        try:
            type(self._plane.admin)(
                self._plane.network, SERVER, self._plane.pki.authority, token=token
            ).request("GET", "/api/v1/services", limit=1)
        except ApiError as error:
            return error.status == 401
        return False

    def kubeconfig(self, server: str = SERVER) -> Path:
        """Names the files instead of holding what they say."""
        cluster = {"server": server, "certificate-authority": str(self.authority_file)}
        value = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": _NAME, "user": {"tokenFile": str(self.token_file)}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": _NAME}}],
            "current-context": "test",
        }
        path = self.directory / "kubeconfig"
        path.write_text(yaml.safe_dump(value))
        return path
