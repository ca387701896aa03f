"""What deploy/ says of the agent, and what the agent's code says of itself, agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import pointsman
from pointsman import loading
from pointsman.cli.main import cli
from pointsman.config import files
from pointsman.kube import recorder
from pointsman.kube.resources import resources

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BASE, CHART = DEPLOY / "kustomize/base", DEPLOY / "helm/pointsman"
Object = dict[str, Any]


def documents(path: Path) -> dict[str, Object]:
    return {found["kind"]: found for found in yaml.safe_load_all(path.read_text())}


@pytest.fixture
def pod() -> Object:
    spec: Object = documents(BASE / "daemonset.yaml")["DaemonSet"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def container(pod: Object) -> Object:
    [found] = pod["containers"]
    return dict(found)


def configuration() -> files.Configuration:
    data = documents(BASE / "configmap.yaml")["ConfigMap"]["data"]
    return files.read(data[files.choose(data)].encode(), "configmap.yaml")


def test_the_role_allows_what_the_agent_reads_and_no_more() -> None:
    asked = {
        (resource.group, resource.plural, verb)
        for resource in resources(
            node_name="a", proxy_name="", with_headless=False, with_cidrs=True
        )
        for verb in ("list", "watch")
    }
    rules = documents(BASE / "rbac.yaml")["ClusterRole"]["rules"]
    assert all(rule.keys() == {"apiGroups", "resources", "verbs"} for rule in rules)
    allowed = {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    reading = {each for each in allowed if each[1] != "events"}
    assert reading == asked
    group = recorder._API.split("/")[2]
    assert allowed - reading == {(group, "events", "create"), (group, "events", "patch")}


def test_the_base_names_no_other_role(container: Object, pod: Object) -> None:
    rbac = documents(BASE / "rbac.yaml")
    account = documents(BASE / "serviceaccount.yaml")["ServiceAccount"]["metadata"]["name"]
    binding = rbac["ClusterRoleBinding"]
    assert binding["roleRef"]["name"] == rbac["ClusterRole"]["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == [account]
    assert pod["serviceAccountName"] == account


def test_the_configuration_is_read_without_a_complaint() -> None:
    assert configuration().problems == ()


def test_the_arguments_and_variables_are_those_of_up(container: Object) -> None:
    command, *arguments = container["args"]
    up = cli.commands[command]
    context = up.make_context(command, [], parent=None, resilient_parsing=True)
    known = {option for parameter in up.params for option in parameter.opts}
    assert {each for each in arguments if each.startswith("-")} <= known
    variables = {f"POINTSMAN_UP_{parameter.name}".upper() for parameter in up.params}
    for parameter in up.params:
        given = parameter.envvar or ()
        variables |= {given} if isinstance(given, str) else set(given)
    assert {variable["name"] for variable in container["env"]} <= variables
    context.close()


def test_the_configuration_is_mounted_where_it_is_read(container: Object) -> None:
    at = container["args"][container["args"].index("--config") + 1]
    [mount] = [m for m in container["volumeMounts"] if m["name"] == "config"]
    assert mount["mountPath"] == at
    # A single file of a ConfigMap (subPath) is never replaced when the ConfigMap changes.
    assert "subPath" not in mount


def test_the_probes_ask_where_health_is_answered(container: Object) -> None:
    [port] = container["ports"]
    address = configuration().options["healthz_bind_address"]
    assert address.rpartition(":")[2] == str(port["containerPort"]) == str(port["hostPort"])
    paths = {name: container[name]["httpGet"]["path"] for name in container if "Probe" in name}
    # /healthz depends on the node being eligible: a node that is drained must not restart it.
    assert paths == {
        "startupProbe": "/livez",
        "livenessProbe": "/livez",
        "readinessProbe": "/readyz",
    }


def test_the_startup_probe_waits_for_the_compiler(container: Object) -> None:
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > loading.TIMEOUT + 30


def test_clients_outside_stay_with_kube_proxy_beside_it() -> None:
    overlay = yaml.safe_load(
        (DEPLOY / "kustomize/beside-kube-proxy/kustomization.yaml").read_text()
    )
    patched = yaml.safe_load(overlay["patches"][0]["patch"])["data"]["config.yaml"]
    assert yaml.safe_load(patched)["devices"] == "none"
    assert files.read(patched.encode(), "config.yaml").problems == ()


def test_packets_have_the_node_s_devices_and_pins_that_outlive_it(
    pod: Object, container: Object
) -> None:
    assert pod["hostNetwork"] is True
    assert {"name": "bpffs", "hostPath": {"path": "/sys/fs/bpf", "type": "Directory"}} in pod[
        "volumes"
    ]
    [mount] = [m for m in container["volumeMounts"] if m["name"] == "bpffs"]
    assert not mount.get("readOnly")
    assert "NET_ADMIN" in container["securityContext"]["capabilities"]["add"]


def test_every_volume_is_mounted_and_every_mount_has_a_volume(
    pod: Object, container: Object
) -> None:
    volumes = [volume["name"] for volume in pod["volumes"]]
    mounts = [mount["name"] for mount in container["volumeMounts"]]
    assert sorted(volumes) == sorted(mounts)


def test_it_may_do_what_the_document_lists_and_no_more(pod: Object, container: Object) -> None:
    page = (ROOT / "docs/kubernetes.md").read_text()
    capabilities = container["securityContext"]["capabilities"]
    assert capabilities["drop"] == ["ALL"]
    assert capabilities["add"] == re.findall(r"^\| `CAP_([A-Z_]+)` \|", page, re.MULTILINE)
    mounted = {volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    assert mounted == set(re.findall(r"^\| host `(/[^`]+)`", page, re.MULTILINE))
    assert "privileged" not in container["securityContext"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_versions_are_the_program_s() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    base = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    assert chart["appVersion"] == pointsman.__version__
    assert [image["newTag"] for image in base["images"]] == [pointsman.__version__]


def test_every_value_of_the_chart_is_in_its_schema_and_the_other_way() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert values.keys() == schema["properties"].keys() - {"global"}
    assert values["image"].keys() == schema["properties"]["image"]["properties"].keys()
    used = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    unused = [name for name in values if f".Values.{name}" not in used]
    assert not unused


def test_the_image_has_what_setup_asks_for() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    final = text.rpartition("\nFROM ")[2]
    install = final.partition("--no-install-recommends")[2].partition("&&")[0]
    installed = set(install.replace("\\", " ").split())
    needed = set(re.findall(r'^    \("([a-z0-9-]+)", ', (ROOT / "scripts/setup").read_text(), re.M))
    # These are for the demo, the tests, and the making of the venv.
    needed -= {"python3-venv", "iproute2", "util-linux", "mount", "curl", "ca-certificates"}
    # takeover reads kube-proxy's rules by the last two.
    assert installed == needed | {"python3", "nftables", "iptables"}


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    copied = {name for names in copies if not names[0].startswith("--") for name in names}
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_images_are_named_without_a_registry(container: Object) -> None:
    """Which one they come from is the operator's to say."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    base = re.findall(r"^(?:ARG BASE=|FROM )(\S+)", (DEPLOY / "Dockerfile").read_text(), re.M)
    images = [container["image"], values["image"]["repository"], *base]
    assert not [image for image in images if "/" in image]
