"""deploy/: what the API server takes, and an agent that may do what the ClusterRole says."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import build
from tests.cluster.clients import Connection
from tests.cluster.cluster import Cluster
from tests.cluster.nodes import Agent
from tests.cluster.plane import ControlPlane
from tests.cluster.space import Space
from tests.cluster.waiting import tail, wait_for

pytestmark = pytest.mark.cluster

DEPLOY = Path(__file__).parents[2] / "deploy"
NAMESPACE, NAME = "kube-system", "pointsman"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{NAME}"
RBAC = "rbac.authorization.k8s.io/v1"
Object = dict[str, Any]

#: What stands in the overlay for kustomize, and in an option for Helm.
SHAPES = {
    "base": (),
    "beside-kube-proxy": (
        "config.healthzBindAddress=0.0.0.0:10356",
        "config.metricsBindAddress=127.0.0.1:10349",
        "config.devices=none",
    ),
    "unload": ("unload=true",),
}


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [build.directory() / program, *arguments], capture_output=True, text=True, check=False
    )


def output(program: str, *arguments: str | Path) -> list[Object]:
    done = run(program, *arguments)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


@cache
def kustomized(shape: str) -> list[Object]:
    return output("kustomize", "build", DEPLOY / "kustomize" / shape)


def helm(*settings: str) -> list[str | Path]:
    """The arguments that render the chart for the version of Kubernetes that is pinned."""
    version = build.versions()["k8s.io/kubernetes"]
    where: list[str | Path] = ["template", NAME, DEPLOY / "helm" / NAME, f"--namespace={NAMESPACE}"]
    return [*where, f"--kube-version={version}", *(f"--set={each}" for each in settings)]


def same_form(things: list[Object]) -> dict[str, Object]:
    """By kind, without what Helm notes of itself, and the configuration without its comments."""
    found = {}
    for thing in things:
        labels = thing["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == NAME
        kept = {"app.kubernetes.io/name": NAME}
        thing = thing | {"metadata": thing["metadata"] | {"labels": kept}}
        if thing["kind"] == "ConfigMap":
            data = {name: yaml.safe_load(text) for name, text in thing["data"].items()}
            thing |= {"data": data}
        found[thing["kind"]] = thing
    return found


# -- manifests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_kustomize_and_helm_make_the_same_objects(cluster: Cluster, shape: str) -> None:
    chart = output("helm", *helm(*SHAPES[shape]))
    assert same_form(chart) == same_form(kustomized(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_api_server_takes_every_object(plane: ControlPlane, shape: str) -> None:
    for thing in plane.admin.dry_run(*kustomized(shape), namespace=NAMESPACE):
        assert thing["metadata"]["name"] == NAME


@pytest.mark.parametrize("shape", SHAPES)
def test_the_api_server_takes_the_pod_of_the_daemon_set(plane: ControlPlane, shape: str) -> None:
    """A DaemonSet's template is checked for less: priority class, account, Pod Security."""
    objects = {thing["kind"]: thing for thing in kustomized(shape)}
    account, template = objects["ServiceAccount"], objects["DaemonSet"]["spec"]["template"]
    plane.admin.apply(account)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": NAME}, "spec": template["spec"]}
    path = plane.admin.path("Pod", "v1", NAMESPACE)
    query = {"dryRun": "All", "fieldValidation": "Strict"}
    try:
        made = plane.admin.request("POST", path, pod, **query)
    finally:
        plane.admin.delete("ServiceAccount", NAME, namespace=NAMESPACE)
    assert made["spec"]["priority"] == 2_000_001_000  # system-node-critical: evicted last


@pytest.mark.parametrize(
    "setting", ["cgroup=relative", "imagee=x", "config.healthzBindAddress=off", "image.tagg=1"]
)
def test_the_chart_refuses_values_it_does_not_know(cluster: Cluster, setting: str) -> None:
    done = run("helm", *helm(setting))
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr


# -- the role ------------------------------------------------------------------------------------


@pytest.fixture
def role(plane: ControlPlane) -> Any:
    """ServiceAccount, ClusterRole and binding as they are delivered, the role for tests to cut."""
    objects = [t for t in kustomized("base") if t["kind"] not in ("DaemonSet", "ConfigMap")]
    plane.admin.apply(*objects)
    yield next(t for t in objects if t["kind"] == "ClusterRole")
    for thing in objects:
        plane.admin.delete(thing["kind"], NAME, thing["apiVersion"], NAMESPACE)


def without(role: Object, group: str, resource: str, verb: str) -> Object:
    rules = []
    for rule in role["rules"]:
        if rule["apiGroups"] == [group] and resource in rule["resources"]:
            others = [each for each in rule["resources"] if each != resource]
            left = [each for each in rule["verbs"] if each != verb]
            rules += [rule | {"resources": others}] if others else []
            rules += [rule | {"resources": [resource], "verbs": left}] if left else []
        else:
            rules.append(rule)
    assert rules != role["rules"]
    return role | {"rules": rules}


def allowed(plane: ControlPlane, group: str, resource: str, verb: str) -> bool:
    attributes = {"group": group, "resource": resource, "verb": verb}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": ACCOUNT, "groups": [], "resourceAttributes": attributes},
    }
    path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
    return bool(plane.admin.request("POST", path, review)["status"]["allowed"])


@pytest.mark.parametrize(
    ("group", "resource", "verb"),
    [
        ("", "secrets", "get"),
        ("", "secrets", "list"),
        ("", "configmaps", "list"),
        ("", "pods", "delete"),
        ("", "services", "update"),
        ("", "nodes", "patch"),
        ("discovery.k8s.io", "endpointslices", "create"),
        ("events.k8s.io", "events", "list"),
    ],
)
def test_the_account_may_do_nothing_else(
    plane: ControlPlane, role: Object, group: str, resource: str, verb: str
) -> None:
    wait_for(partial(allowed, plane, "", "pods", "list"), "the role", logs=plane.tail)
    assert not allowed(plane, group, resource, verb)


@pytest.fixture
def start(cluster: Cluster, space: Space, role: Object) -> Callable[..., Agent]:
    """An agent with the token of the ServiceAccount."""

    def starting(*options: str) -> Agent:
        plane = cluster.plane
        token = plane.service_account_token(NAMESPACE, NAME)
        agent = cluster.agent("node-c")
        agent.kubeconfig = plane.kubeconfig(NAME, token=token)
        agent.log.unlink(missing_ok=True)
        agent.start(*options, wait=False)
        return agent

    return starting


def problems(agent: Agent) -> str:
    return str(agent.status().get("problems", "")) + tail(agent.log, 200)


def test_an_agent_with_this_role_serves_and_is_refused_nothing(
    cluster: Cluster, space: Space, start: Callable[..., Agent]
) -> None:
    agent = start()
    wait_for(agent.attached, "an attached agent", 180, logs=partial(tail, agent.log))
    pods = space.deploy("web", node="node-c")
    web = space.service("web")
    space.wait_endpoints("web", pods)
    client = cluster.client("node-c")
    logs = partial(tail, agent.log)
    wait_for(lambda: client.connect(web.ip, 80).pod == "web-0", "an answer", logs=logs)
    # An object to complain about, so that an Event is written.
    space.deploy("odd", node="node-c", annotations={"pointsman.io/socket-lb": "perhaps"})
    events = partial(cluster.api.list, "Event", "events.k8s.io/v1", space.namespace)
    wait_for(
        lambda: [e for e in events() if e.get("reportingController", "").startswith("pointsman")],
        "an Event",
        logs=logs,
    )
    assert "orbidden" not in problems(agent)
    assert "on resource" not in problems(agent)


@pytest.mark.parametrize("verb", ["list", "watch"])
@pytest.mark.parametrize(
    ("group", "resource"),
    [
        ("", "services"),
        ("", "nodes"),
        ("", "pods"),
        ("", "namespaces"),
        ("discovery.k8s.io", "endpointslices"),
        ("networking.k8s.io", "servicecidrs"),
    ],
)
def test_each_right_is_used_and_a_missing_one_is_named(
    plane: ControlPlane,
    role: Object,
    start: Callable[..., Agent],
    group: str,
    resource: str,
    verb: str,
) -> None:
    plane.admin.apply(without(role, group, resource, verb))
    wait_for(lambda: not allowed(plane, group, resource, verb), "the cut role", logs=plane.tail)
    agent = start()

    def told() -> bool:
        found = problems(agent)
        return f"verb {verb} on resource {resource}" in found

    wait_for(told, f"a complaint about {verb} {resource}", logs=partial(tail, agent.log))


# -- what it may do on a node --------------------------------------------------------------------


@pytest.fixture
def confined(
    cluster: Cluster, start: Callable[..., Agent], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Agent]:
    """`confined("SYS_PTRACE")`: an agent with the DaemonSet's capabilities without that one, and
    with mounts of its own, so that a pod's namespace can't be found in its own /run/netns."""
    [daemon_set] = [thing for thing in kustomized("base") if thing["kind"] == "DaemonSet"]
    [container] = daemon_set["spec"]["template"]["spec"]["containers"]
    capabilities = container["securityContext"]["capabilities"]["add"]
    lab_start = cluster.lab.start

    def starting(lacking: str) -> Agent:
        kept = [f"+{name.lower()}" for name in capabilities if name != lacking]
        bounds = f"--bounding-set=-all,{','.join(kept)}"
        hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run/netns; exec "$@"', "sh"]
        wrap = [*hide, "setpriv", "--no-new-privs", "--inh-caps=-all", bounds]
        with monkeypatch.context() as patch:
            patch.setattr(
                cluster.lab,
                "start",
                lambda command, *rest, **options: lab_start([*wrap, *command], *rest, **options),
            )
            return start()

    return starting


def ended(connection: Connection) -> bool:
    return connection.talk() == "ECONNABORTED"


@pytest.mark.parametrize("lacking", ["", "NET_ADMIN", "SYS_PTRACE"])
def test_what_the_capabilities_are_for(
    cluster: Cluster, space: Space, confined: Callable[[str], Agent], lacking: str
) -> None:
    """Stale sockets are ended by netlink (NET_ADMIN), those of pods in the pods' namespaces, which
    are found in /proc (SYS_PTRACE), as are the pods that opt out."""
    [web] = space.deploy("web", node="node-b")
    service = space.service("web")
    space.wait_endpoints("web", [web])
    [pod] = space.deploy("client", node="node-c")
    space.deploy("out", node="node-c", annotations={"pointsman.io/socket-lb": "disabled"})
    agent = confined(lacking)
    logs = partial(tail, agent.log)
    wait_for(agent.attached, "an attached agent", 180, logs=logs)
    if lacking == "SYS_PTRACE":
        wait_for(lambda: agent.status()["optedOut"]["waiting"], "a search in vain", logs=logs)
    else:
        wait_for(lambda: agent.status()["optedOut"]["namespaces"], "the opted-out pod", logs=logs)
    of_host, of_pod = (
        cluster.client(where).open(service.ip, 80, "udp") for where in ("node-c", pod)
    )
    web.terminate()
    if lacking == "NET_ADMIN":
        wait_for(
            lambda: "sockets of removed endpoints stay" in problems(agent), "a complaint", logs=logs
        )
        return
    wait_for(lambda: ended(of_host), "the end of the socket on the node", logs=logs)
    if lacking == "SYS_PTRACE":
        assert not ended(of_pod)
        assert agent.status()["optedOut"]["namespaces"] == 0
    else:
        wait_for(lambda: ended(of_pod), "the end of the socket in the pod", logs=logs)


def test_without_sys_admin_it_says_what_is_refused(confined: Callable[[str], Agent]) -> None:
    agent = confined("SYS_ADMIN")
    assert agent.process
    assert agent.process.wait(timeout=60) == 3
    assert "this process lacks CAP_SYS_ADMIN" in tail(agent.log)
