"""--config and 'pointsman config check': precedence, errors, what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from pointsman.cli import configure
from pointsman.cli.configure import config, option
from pointsman.cli.up import up
from pointsman.config.kubeproxyfields import FIELDS, Sets
from pointsman.config.own import KEYS

OWN = "kind: PointsmanConfiguration\napiVersion: pointsman.io/v1alpha1\n"
KUBE_PROXY = "kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v1alpha1\n"
KUBEADM = Path(__file__).parent / "testdata" / "config" / "kubeadm.yaml"


def parse(*arguments: str, text: str, path: Path, **kwargs: Any) -> click.Context:
    path.write_text(OWN + text)
    return up.make_context("up", ["--config", str(path), *arguments], **kwargs)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def test_the_command_line_wins_over_the_environment_over_the_file_over_the_default(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "nodeName: of-file\nserviceCIDRs: [10.1.0.0/16]\ndomain: file.example\n"
    monkeypatch.setenv("NODE_NAME", "of-environment")
    monkeypatch.delenv("POINTSMAN_SERVICE_CIDR", raising=False)
    found = parse("--domain", "line.example", text=text, path=path).params
    assert found["domain"] == "line.example"
    assert found["node_name"] == "of-environment"
    assert found["service_cidrs"] == ("10.1.0.0/16",)
    assert found["external_ips"] == "all"
    assert found["config"] == path


def test_every_key_and_field_is_an_option_of_up() -> None:
    named = {key.option for key in KEYS} | {"kubernetes"}
    named |= {field.effect.option for field in FIELDS if isinstance(field.effect, Sets)}
    assert named <= {param.name for param in up.params}


def test_every_option_of_up_has_a_key() -> None:
    assert {param.name for param in up.params} - {key.option for key in KEYS} == {
        "config",
        "kubernetes",
    }


def test_all_bad_values_are_named_with_file_and_field(path: Path) -> None:
    with pytest.raises(configure.BadFile) as bad:
        parse(text="nodePortRange: all\nmaxSlots: 5\nexternalIPs: some\n", path=path)
    lines = bad.value.message.splitlines()
    assert [line.strip().split(": ")[:2] for line in lines] == [
        [str(path), "nodePortRange"],
        [str(path), "maxSlots"],
        [str(path), "externalIPs"],
    ]
    assert "write FIRST-LAST" in bad.value.problems[0].mend
    assert [each.field for each in bad.value.problems] == [
        "nodePortRange", "maxSlots", "externalIPs",
    ]  # fmt: skip


def test_a_bad_value_is_refused_even_if_the_command_line_has_another(path: Path) -> None:
    with pytest.raises(configure.BadFile, match="externalIPs"):
        parse("--external-ips", "none", text="externalIPs: some", path=path)


def test_a_bad_new_file_leaves_the_warnings_of_the_old_one(path: Path) -> None:
    root = click.Context(click.Group("pointsman"))
    path.write_text(KUBE_PROXY + "mode: iptables\niptables: {masqueradeAll: true}\n")
    up.make_context("up", ["--config", str(path)], root)
    before = configure.problems(root)
    assert [each.field for each in before] == ["iptables.masqueradeAll"]
    with pytest.raises(configure.BadFile):
        parse(text="externalIPs: some", path=path, parent=root)
    assert configure.problems(root) == before
    parse(text="domain: a.example", path=path, parent=root)
    assert configure.problems(root) == ()


def test_warnings_are_printed_at_the_start_only(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = click.Context(click.Group("pointsman"))
    path.write_text(KUBE_PROXY + "enableProfiling: true\n")
    up.make_context("up", ["--config", str(path)], root)
    assert capsys.readouterr().err.startswith(f"warning: {path}: enableProfiling: ")
    up.make_context("up", ["--config", str(path)], root)
    assert capsys.readouterr().err == ""


@click.command()
@click.option("--domain", default="d")
@option
def domain_of(config: Path | None, domain: str) -> None:
    click.echo(domain)


def test_no_config_no_difference() -> None:
    assert CliRunner().invoke(domain_of, []).output == "d\n"


def test_the_file_is_read_before_other_options_wherever_it_is_named(path: Path) -> None:
    path.write_text(OWN + "domain: of-file")
    found = CliRunner().invoke(domain_of, [], env={"POINTSMAN_CONFIG": str(path)})
    assert found.output == "of-file\n"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(config, ["check", *arguments])


def test_check_shows_what_kubeadm_s_file_would_set() -> None:
    found = run(str(KUBEADM))
    assert (found.exit_code, found.stderr) == (0, "")
    rows = [line.split() for line in found.stdout.splitlines()]
    assert rows[0] == [f"{KUBEADM}:", "KubeProxyConfiguration"]
    assert rows[1] == ["OPTION", "VALUE", "FROM"]
    assert ["--healthz-bind-address", "0.0.0.0:10256", "healthzBindAddress"] in rows
    assert ["--localhost-nodeports", "yes", "iptables.localhostNodePorts"] in rows


def test_check_in_json_has_options_and_warnings(path: Path) -> None:
    path.write_text(KUBE_PROXY + "mode: nftables\nnftables: {masqueradeAll: true}\n")
    found = json.loads(run(str(path), "-o", "json").stdout)
    options = {each["option"]: (each["value"], each["from"]) for each in found["options"]}
    assert options["--nodeport-addresses"] == (["primary"], "mode")
    assert options["--no-localhost-nodeports"] == (False, "mode")
    assert [each["field"] for each in found["warnings"]] == ["nftables.masqueradeAll"]
    assert [each["field"] for each in found["needsNothing"]] == ["mode"]


@pytest.mark.parametrize(
    ("text", "strict", "code"),
    [
        pytest.param(OWN, True, 0, id="good"),
        pytest.param(KUBE_PROXY + "enableProfiling: true", False, 0, id="warnings"),
        pytest.param(KUBE_PROXY + "enableProfiling: true", True, 1, id="warnings-and-strict"),
        pytest.param(OWN + "nodeNames: a", False, 2, id="bad"),
        pytest.param(OWN + "externalIPs: some", False, 2, id="bad-for-an-option"),
    ],
)
def test_exit_codes_of_check(path: Path, text: str, strict: bool, code: int) -> None:
    path.write_text(text)
    assert run(str(path), *(["--strict"] if strict else [])).exit_code == code


def test_check_finds_what_is_wrong_of_two_options_together(path: Path) -> None:
    path.write_text(OWN + "outlierEjection: {shortest: 10m}\n")
    found = run(str(path))
    assert found.exit_code == 2
    assert "--ejection-shortest 600s is longer than --ejection-longest 300s" in found.stderr
    path.write_text(OWN + "outlierEjection: {shortest: 10m, longest: 1h}\n")
    assert run(str(path)).exit_code == 0
