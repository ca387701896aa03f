"""Configuration files: what is read out of them, and what is said of bad ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.config.configuration import BadConfiguration, Configuration
from pointsman.config.files import choose, read
from pointsman.config.kubeproxyfields import FIELDS
from pointsman.config.own import KEYS
from pointsman.config.typed import seconds

OWN = "kind: PointsmanConfiguration\napiVersion: pointsman.io/v1alpha1\n"
KUBE_PROXY = "kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v1alpha1\n"


def faults(text: str | bytes) -> list[str]:
    data = text.encode() if isinstance(text, str) else text
    with pytest.raises(BadConfiguration) as bad:
        read(data, "f.yaml")
    return [str(problem) for problem in bad.value.problems]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        pytest.param("", {}, id="all-keys-may-be-left-out"),
        pytest.param("domain: null", {}, id="a-null-is-as-if-left-out"),
        pytest.param(
            "serviceCIDRs: [10.0.0.0/16, 'fd00::/112']\nmaxSlots: 4096\nbindGuard: false",
            {"service_cidrs": ["10.0.0.0/16", "fd00::/112"], "max_slots": 4096,
             "bind_guard": False},
            id="lists-numbers-and-truth-values",
        ),
        pytest.param("kubernetes: {}", {"kubernetes": True}, id="the-pod-s-service-account"),
        pytest.param(
            "kubernetes: {kubeconfig: /k, context: c, server: 'https://192.0.2.1:6443'}",
            {"kubernetes": True, "kubeconfig": "/k", "kube_context": "c",
             "api_server": "https://192.0.2.1:6443"},
            id="an-api-server",
        ),
        pytest.param(
            "algorithm: maglev\noutlierEjection: {mode: on, shortest: 5s, mostPercent: 10}",
            {"algorithm": "maglev", "outlier_ejection": "on", "ejection_shortest": "5s",
             "ejection_most_percent": 10},
            id="how-endpoints-are-chosen",
        ),
        pytest.param("outlierEjection: {mode: off}", {"outlier_ejection": "off"},
                     id="off-in-a-section"),
        pytest.param("dns: off", {"dns_listen": ["off"]}, id="off-without-quotes"),
        pytest.param("dns: [off]", {"dns_listen": ["off"]}, id="off-in-a-list"),
        pytest.param(
            "metricsBindAddress: off\nhealthzBindAddress: 'off'",
            {"metrics_bind_address": "off", "healthz_bind_address": "off"},
            id="servers-that-are-off",
        ),
    ],
)  # fmt: skip
def test_own_file_sets_options(text: str, options: dict[str, object]) -> None:
    found = read((OWN + text).encode(), "f.yaml")
    assert (found.options, found.problems) == (options, ())
    assert found.fields.keys() == options.keys()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(OWN + "serviceCidrs: [10.0.0.0/16]",
                     ["f.yaml: serviceCidrs: this key is unknown; write serviceCIDRs"],
                     id="a-typo-names-the-nearest-key"),
        pytest.param(OWN + "kubeconfig: /k",
                     ["f.yaml: kubeconfig: this key is unknown; write kubernetes.kubeconfig"],
                     id="a-key-in-the-wrong-section"),
        pytest.param(OWN + "kubernetes.server: x",
                     ["f.yaml: [kubernetes.server]: this key is unknown; delete it"],
                     id="a-dot-makes-no-section"),
        pytest.param(OWN + "bananas: 1\nnodePortAddresses: [1]\nmaxSlots: '9'",
                     ['f.yaml: nodePortAddresses[0]: expected text, got 1; quote it',
                      'f.yaml: maxSlots: expected a whole number, got "9"; '
                      "write it without quotes",
                      "f.yaml: bananas: this key is unknown; delete it"],
                     id="every-fault-is-named"),
        pytest.param(OWN + "kubernetes:",
                     ["f.yaml: kubernetes: it is empty; "
                      "write {} for the pod's service account, or delete the key"],
                     id="an-empty-section-could-mean-either"),
        pytest.param(OWN + "outlierEjection: {mostPercent: '9', bananas: 1}",
                     ['f.yaml: outlierEjection.mostPercent: expected a whole number, got "9"; '
                      "write it without quotes",
                      "f.yaml: outlierEjection.bananas: this key is unknown; delete it"],
                     id="a-section-s-faults"),
        pytest.param(OWN + "kubernetes: true",
                     ["f.yaml: kubernetes: expected a mapping, got True; "
                      "write a mapping of 'name: value'"],
                     id="a-section-that-is-none"),
        pytest.param(OWN + "domain: a\ndomain: b",
                     ['f.yaml: line 4: "domain" is there twice; delete one of the two'],
                     id="a-key-twice"),
        pytest.param(OWN.replace("v1alpha1", "v2"),
                     ['f.yaml: apiVersion: PointsmanConfiguration of "pointsman.io/v2" is not '
                      "read; write pointsman.io/v1alpha1"],
                     id="another-version"),
        pytest.param("kind: KubeProxyConfig",
                     ['f.yaml: kind: document 1 is no configuration: kind "KubeProxyConfig"; '
                      "write KubeProxyConfiguration"],
                     id="an-unknown-kind"),
        pytest.param(OWN + "---\n" + KUBE_PROXY,
                     ["f.yaml: kind: document 2 is a second configuration; "
                      "delete one of the two"],
                     id="two-configurations"),
        pytest.param(b"\x00", ["f.yaml: it is a binary file; write YAML as UTF-8 text"],
                     id="a-binary-file"),
        pytest.param(b"a: \xff", ["f.yaml: byte 3 is not UTF-8; save it as UTF-8 text"],
                     id="not-utf-8"),
        pytest.param(KUBE_PROXY + "iptables: {syncPeriod: 30, masqueradeAll: 'yes'}\n"
                     "configSyncPeriod: soon\nfeatureGates: {A: 'true'}",
                     ["f.yaml: iptables.syncPeriod: expected a duration, got 30; "
                      "write one such as 30s or 15m0s",
                      'f.yaml: iptables.masqueradeAll: expected true or false, got "yes"; '
                      "write true or false",
                      'f.yaml: configSyncPeriod: expected a duration, got "soon"; '
                      "write one such as 30s or 15m0s",
                      'f.yaml: featureGates.A: expected true or false, got "true"; '
                      "write true or false"],
                     id="kube-proxy-s-types"),
        pytest.param(KUBE_PROXY + "mode: kernelspace",
                     ['f.yaml: mode: kube-proxy has no mode "kernelspace" on Linux; '
                      "write iptables, ipvs, nftables or nothing"],
                     id="a-mode-of-windows"),
        pytest.param("kind: ConfigMap\nmetadata: {name: c, namespace: shop}\n"
                     "data: {a: '', b: ''}",
                     ['f.yaml: ConfigMap shop/c: data: which file is the configuration is not '
                      'clear: there are "a, b"; name it config.yaml or config.conf'],
                     id="a-config-map-with-two-keys"),
        pytest.param("kind: ConfigMap\nmetadata: {name: c}\ndata: {k: 'kind: ConfigMap'}",
                     ['f.yaml: ConfigMap c, k: kind: document 1 is no configuration: kind '
                      '"ConfigMap"; write kind: PointsmanConfiguration and apiVersion: '
                      "pointsman.io/v1alpha1, or name kube-proxy's own file"],
                     id="a-config-map-in-a-config-map"),
    ],
)  # fmt: skip
def test_bad_files_name_place_and_mend(text: str | bytes, expected: list[str]) -> None:
    assert faults(text) == expected


def test_an_empty_file_is_no_configuration() -> None:
    # As an editor leaves it for a moment: it must not count as "all defaults".
    assert faults("")[0].startswith("f.yaml: it is empty; write kind: PointsmanConfiguration")


def test_other_documents_are_passed_over_with_a_warning() -> None:
    text = f"kind: ClusterConfiguration\n---\n{KUBE_PROXY}"
    found = read(text.encode(), "kubeadm.yaml")
    assert [str(each) for each in found.problems] == [
        'kubeadm.yaml: document 1 is passed over: kind "ClusterConfiguration"; '
        "delete it from this file"
    ]


def test_a_config_map_s_problems_name_its_key() -> None:
    text = (
        "kind: ConfigMap\nmetadata: {name: p, namespace: shop}\n"
        f"data:\n  only: |\n    {KUBE_PROXY.replace(chr(10), chr(10) + '    ')}mod: x\n"
    )
    found = read(text.encode(), "f.yaml")
    assert [str(each) for each in found.problems] == [
        "f.yaml: ConfigMap shop/p, only: mod: kube-proxy has no such field; write mode"
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(["config.conf", "kubeconfig.conf"], "config.conf", id="as-kubeadm-names-it"),
        pytest.param(["config.conf", "config.yaml"], "config.yaml", id="ours-first"),
        pytest.param(["..data", "proxy"], "proxy", id="the-only-one"),
    ],
)
def test_which_of_several_files(names: list[str], expected: str) -> None:
    assert choose(names) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("15m0s", 900), ("1h", 3600), ("1.5s", 1.5), ("2ms", 0.002), ("-1s", -1)],
)
def test_durations_are_go_s(text: str, expected: float) -> None:
    assert seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "1", "s", "1 s", "1d", "1s1", "9" * 200 + "s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        seconds(text)


_PATHS = [field.path for field in FIELDS] + [key.path for key in KEYS] + ["kubernetes", "x"]
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def _document(kind: str, leaves: dict[str, object]) -> dict[str, object]:
    versions = {"PointsmanConfiguration": "pointsman.io/v1alpha1",
                "KubeProxyConfiguration": "kubeproxy.config.k8s.io/v1alpha1"}  # fmt: skip
    document: dict[str, object] = {"kind": kind, "apiVersion": versions[kind]}
    for path, value in leaves.items():
        inner: dict[str, object] = document
        *sections, name = path.split(".")
        for section in sections:
            below = inner.setdefault(section, {})
            inner = below if isinstance(below, dict) else {}
        inner[name] = value
    return document


def _survives(data: bytes) -> None:
    try:
        found = read(data, "f")
    except BadConfiguration as bad:
        assert any(problem.severity == "error" for problem in bad.problems)
        assert all(problem.where == "f" and problem.mend for problem in bad.problems)
    else:
        assert isinstance(found, Configuration)
        assert found.options.keys() == found.fields.keys()
        assert all(problem.severity == "warning" for problem in found.problems)


@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "replace")))
def test_no_bytes_crash_the_reader(data: bytes) -> None:
    _survives(data)


@given(
    st.sampled_from(["PointsmanConfiguration", "KubeProxyConfiguration"]),
    st.dictionaries(st.sampled_from(_PATHS), _VALUES, max_size=6),
    st.booleans(),
)
def test_no_value_crashes_the_reader(kind: str, leaves: dict[str, object], mapped: bool) -> None:
    import yaml

    text = yaml.safe_dump(_document(kind, leaves), allow_unicode=True)
    if mapped:
        text = yaml.safe_dump({"kind": "ConfigMap", "data": {"config.conf": text}})
    _survives(text.encode("utf-8", "replace"))
