"""kube-proxy's own file: every field is honoured, needs nothing, or is named in a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pointsman.config import kubeproxy
from pointsman.config.configuration import Configuration
from pointsman.config.files import read as read_file
from pointsman.config.kubeproxyfields import FIELDS, Field, Lacks, Same, Sets
from pointsman.config.typed import Duration, DurationOrNanoseconds

DATA = Path(__file__).parent / "testdata" / "config"
# Values that a file may hold and that are neither empty nor anyone's default.
_VALUES = {
    bool: True, int: 7, float: 7.5, str: "name", list[str]: ["192.0.2.0/24"],
    list[Any]: [{"filePattern": "a", "verbosity": 5}], dict[str, bool]: {"SomeGate": True},
    str | int: "64Ki", Duration: "1h7m0s", DurationOrNanoseconds: 7000000000,
}  # fmt: skip
_SPECIAL = {"bindAddress": "192.0.2.7", "mode": "ipvs", "healthzBindAddress": "192.0.2.7",
            "metricsBindAddress": "192.0.2.7", "iptables.localhostNodePorts": False}  # fmt: skip


def read(**fields: Any) -> Configuration:
    return kubeproxy.read({"kind": kubeproxy.KIND, "apiVersion": kubeproxy.API_VERSION, **fields})


def nested(path: str, value: object) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def value_for(field: Field) -> object:
    return _SPECIAL.get(field.path, _VALUES[field.type])


def with_mode(field: Field, value: object) -> dict[str, Any]:
    mode = {"mode": field.modes[0]} if field.modes else {}
    return mode | nested(field.path, value)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.path)
def test_no_field_is_silent(field: Field) -> None:
    found = read(**with_mode(field, value_for(field)))
    without = read(**with_mode(field, None)).options if field.modes else read().options
    warned = [problem.field for problem in found.problems]
    noted = [note.field for note in found.notes if note.field != "mode"]
    match field.effect:
        case Sets(option):
            assert (warned, noted) == ([], [])
            assert found.options[option] != without.get(option)
            assert found.fields[option] == field.path
        case Same(why):
            assert warned == []
            assert (field.path, why) in [(note.field, note.why) for note in found.notes]
        case Lacks(why, mend):
            assert warned == [field.path]
            assert why in found.problems[0].message
            assert found.problems[0].mend == mend


@pytest.mark.parametrize(
    "field", [field for field in FIELDS if field.modes], ids=lambda field: field.path
)
def test_what_kube_proxy_does_not_read_in_its_mode_is_only_noted(field: Field) -> None:
    other = ({"iptables", "nftables"} - {*field.modes}).pop()
    found = read(mode=other, **nested(field.path, _VALUES[field.type]))
    assert found.problems == ()
    if field.path != "iptables.localhostNodePorts":  # its option is decided by the mode
        assert found.options == read(mode=other).options
    told = {note.field: note.why for note in found.notes}
    assert told[field.path] == f"kube-proxy does not read it in mode {other}"


@pytest.mark.parametrize(
    "field",
    [field for field in FIELDS if isinstance(field.effect, Lacks)],
    ids=lambda field: field.path,
)
def test_a_default_written_out_is_no_warning(field: Field) -> None:
    assert isinstance(field.effect, Lacks)
    duration = field.type is Duration
    zero = {bool: False, int: 0, float: 0, str: "", Duration: "0s", str | int: 0,
            list[Any]: [], dict[str, bool]: {}}[field.type]  # fmt: skip
    defaults = [f"{each}s" if duration else each for each in field.effect.defaults]
    for value in (None, zero, *defaults):
        assert read(**with_mode(field, value)).problems == ()


def test_kubeadm_s_config_map_is_taken_as_it_is() -> None:
    found = read_file((DATA / "kubeadm.yaml").read_bytes(), "kubeadm.yaml")
    assert found.problems == ()
    assert found.options == {
        "kubernetes": True,
        "kubeconfig": "/var/lib/kube-proxy/kubeconfig.conf",
        "healthz_bind_address": "0.0.0.0:10256",
        "metrics_bind_address": "127.0.0.1:10249",
        "localhost_nodeports": True,
    }
    assert [note.field for note in found.notes] == ["clusterCIDR"]


@pytest.mark.parametrize(
    ("fields", "healthz", "metrics"),
    [
        pytest.param({"healthzBindAddress": ""}, "0.0.0.0:10256", "127.0.0.1:10249",
                     id="empty-is-the-default-and-not-off"),
        pytest.param({"bindAddress": "::"}, "[::]:10256", "[::1]:10249",
                     id="the-defaults-are-of-bind-address-s-family"),
        pytest.param({"healthzBindAddress": "fd00::7", "metricsBindAddress": "192.0.2.7"},
                     "[fd00::7]:10256", "192.0.2.7:10249", id="a-port-left-out"),
        pytest.param({"healthzBindAddress": "[::]:1", "metricsBindAddress": "0.0.0.0:2"},
                     "[::]:1", "0.0.0.0:2", id="with-ports"),
        pytest.param({"healthzBindAddress": "localhost:1"}, "localhost:1", "127.0.0.1:10249",
                     id="what-is-wrong-is-left-to-the-option"),
    ],
)  # fmt: skip
def test_bind_addresses(fields: dict[str, str], healthz: str, metrics: str) -> None:
    options = read(**fields).options
    assert (options["healthz_bind_address"], options["metrics_bind_address"]) == (healthz, metrics)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, None, id="all-in-mode-iptables"),
        pytest.param({"mode": "ipvs", "nodePortAddresses": []}, None, id="all-in-mode-ipvs"),
        pytest.param({"mode": "nftables"}, ["primary"], id="primary-in-mode-nftables"),
        pytest.param({"mode": "nftables", "nodePortAddresses": ["0.0.0.0/0"]}, ["0.0.0.0/0"],
                     id="a-list-wins"),
        pytest.param({"nodePortAddresses": ["all"]}, ["0.0.0.0/0", "::/0"], id="the-word-all"),
        pytest.param({"nodePortAddresses": ["localhost", "192.0.2.0/24"]},
                     ["127.0.0.0/8", "::1/128", "192.0.2.0/24"], id="the-word-localhost"),
    ],
)  # fmt: skip
def test_node_port_addresses_follow_the_mode(
    fields: dict[str, Any], expected: list[str] | None
) -> None:
    found = read(**fields)
    assert found.options.get("nodeport_addresses") == expected
    assert found.problems == ()


def test_primary_with_others_is_named_in_a_warning() -> None:
    found = read(nodePortAddresses=["primary", "localhost"])
    assert found.options["nodeport_addresses"] == ["primary"]
    assert [(each.field, each.severity) for each in found.problems] == [
        ("nodePortAddresses", "warning")
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"mode": "userspace"}, True),
        ({"iptables": {"localhostNodePorts": False}}, False),
        ({"mode": "nftables"}, False),
        ({"mode": "ipvs", "iptables": {"localhostNodePorts": True}}, False),
    ],
)
def test_node_ports_at_localhost_are_of_mode_iptables(
    fields: dict[str, Any], expected: bool
) -> None:
    assert read(**fields).options["localhost_nodeports"] is expected


@pytest.mark.parametrize(("verbosity", "expected"), [(2, False), (4, True), (9, True)])
def test_verbosity(verbosity: int, expected: bool) -> None:
    assert read(logging={"verbosity": verbosity}).options["verbose"] is expected


def test_the_node_s_name_is_made_as_kube_proxy_makes_it() -> None:
    assert read(hostnameOverride=" Worker-1 ").options["node_name"] == "worker-1"


@pytest.mark.parametrize(
    ("fields", "where", "mend"),
    [
        ({"nodePortAdresses": []}, "nodePortAdresses", "write nodePortAddresses"),
        ({"scheduler": "rr"}, "scheduler", "write ipvs.scheduler"),
        ({"iptables": {"masqueradebit": 1}}, "iptables.masqueradebit",
         "write iptables.masqueradeBit or nftables.masqueradeBit"),
        ({"bananas": {"a": 1}}, "bananas", "delete it"),
    ],
)  # fmt: skip
def test_a_field_that_kube_proxy_has_not_is_a_warning_that_names_the_nearest(
    fields: dict[str, Any], where: str, mend: str
) -> None:
    (problem,) = read(**fields).problems
    assert (problem.field, problem.mend, problem.severity) == (where, mend, "warning")


def test_each_path_stands_in_the_table_once() -> None:
    paths = [field.path for field in FIELDS]
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize(
    ("section", "options"),
    [
        pytest.param(
            {"tcpEstablishedTimeout": "2h0m0s", "udpTimeout": "10s", "udpStreamTimeout": "3m"},
            {
                "conntrack_tcp_timeout_established": "7200s",
                "conntrack_udp_timeout": "10s",
                "conntrack_udp_timeout_stream": "180s",
            },
            id="given",
        ),
        pytest.param(
            {"tcpEstablishedTimeout": "0s", "udpTimeout": "0s", "udpStreamTimeout": None},
            {},
            id="zero-leaves-the-default",
        ),
    ],
)
def test_conntrack_s_timeouts_are_those_of_connections_from_outside(
    section: dict[str, object], options: dict[str, str]
) -> None:
    found = read(conntrack=section)
    assert {k: v for k, v in found.options.items() if k.startswith("conntrack")} == options
    assert found.problems == ()
