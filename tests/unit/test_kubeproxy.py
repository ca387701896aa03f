"""kube-proxy's rules, read: what they mean for a client is the same in every language."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman import netlink
from pointsman.errors import PointsmanError
from pointsman.kubeproxy import iptables, ipvs, nft
from pointsman.kubeproxy.answers import (
    ALONE,
    CLUSTER_IP,
    DROP,
    ENDPOINTS,
    EXTERNAL,
    NODE_PORT,
    REJECT,
    Answer,
    Client,
    Proxy,
    Target,
)
from pointsman.kubeproxy.compare import BACK, RETIRE, compare
from pointsman.kubeproxy.read import programmed
from pointsman.kubeproxy.retire import Running, back, retire, running_as
from pointsman.kubeproxy.rules import Ruleset
from pointsman.ranges import Source
from pointsman.values import ANY_IPV4, PROTOCOLS, Frontend, to_address

_DATA = Path(__file__).parent / "testdata" / "kubeproxy"
NFT, SAVE, IPVS = ((_DATA / name).read_text() for name in (
    "nftables.json", "iptables.save", "ipvsadm.save",
))  # fmt: skip
LOCAL = frozenset({to_address("192.0.2.1")})
HERE = Client(to_address("192.0.2.1"), True)
STRANGER = Client(to_address("198.51.100.77"), False)
GUEST = Client(to_address("203.0.113.8"), False)


def at(text: str) -> Frontend:
    """10.96.0.10:80/tcp."""
    address, _, rest = text.rpartition(":")
    port, _, protocol = rest.partition("/")
    place = to_address(address.strip("[]")) if address else ANY_IPV4
    return Frontend(place, int(port), PROTOCOLS[protocol.upper()])


def read(language: str) -> Ruleset:
    reader = {"nftables": nft.parse_tables, "iptables": iptables.parse_save}[language]
    found = reader({"nftables": NFT, "iptables": SAVE}[language], LOCAL, ipv6=False)
    assert found
    return found


def endpoints(*listed: str, affinity: int = 0) -> Answer:
    return Answer(ENDPOINTS, frozenset(listed), affinity)


WEB = endpoints("10.244.0.1:8080", "10.244.0.2:8080")
API = endpoints("10.244.0.3:8443", "10.244.9.3:8443", affinity=600)
NEAR = frozenset({"10.244.0.3:8443"})
LANGUAGES = pytest.mark.parametrize("language", ["nftables", "iptables"])


@LANGUAGES
def test_everything_that_is_served_is_found(language: str) -> None:
    assert set(read(language).targets()) == {
        Target(at("10.96.0.10:80/tcp"), CLUSTER_IP, "shop/web:http"),
        Target(at("10.96.0.53:53/udp"), CLUSTER_IP, "shop/dns:dns"),
        Target(at("10.96.0.11:443/tcp"), CLUSTER_IP, "shop/api:grpc"),
        Target(at("10.96.0.12:80/tcp"), CLUSTER_IP, "shop/none:http"),
        Target(at("10.96.0.13:36412/sctp"), CLUSTER_IP, "shop/signal:s1"),
        Target(at("198.51.100.9:80/tcp"), EXTERNAL, "shop/web:http"),
        Target(at("198.51.100.5:443/tcp"), EXTERNAL, "shop/api:grpc"),
        Target(at(":30080/tcp"), NODE_PORT, "shop/web:http"),
        Target(at(":30081/tcp"), NODE_PORT, "shop/none:http"),
    }


@LANGUAGES
@pytest.mark.parametrize(
    ("client", "where", "wanted"),
    [
        pytest.param(HERE, "10.96.0.10:80/tcp", WEB, id="cluster-ip"),
        pytest.param(HERE, "198.51.100.9:80/udp", ALONE, id="port-of-another-protocol"),
        pytest.param(HERE, "10.96.0.11:443/tcp", API, id="affinity"),
        pytest.param(HERE, "10.96.0.12:80/tcp", REJECT, id="no-endpoints"),
        pytest.param(HERE, "192.0.2.1:30080/tcp", WEB, id="node-port"),
        pytest.param(STRANGER, "192.0.2.1:30080/tcp", WEB, id="node-port-from-outside"),
        pytest.param(STRANGER, "192.0.2.1:30081/tcp", REJECT, id="node-port-without-endpoints"),
        pytest.param(HERE, "192.0.2.7:30080/tcp", ALONE, id="another-nodes-address"),
        pytest.param(STRANGER, "198.51.100.9:80/tcp", WEB, id="external-ip"),
        pytest.param(STRANGER, "198.51.100.5:443/tcp", DROP, id="not-in-source-ranges"),
        pytest.param(GUEST, "198.51.100.5:443/tcp", NEAR, id="external-policy-local"),
        pytest.param(HERE, "10.99.9.9:9/tcp", ALONE, id="nobodys"),
    ],
)
def test_rules_mean_the_same_in_both_languages(
    language: str, client: Client, where: str, wanted: Answer | str | frozenset[str]
) -> None:
    rules = read(language)
    found = rules.ask(client, at(where))
    if isinstance(wanted, frozenset):
        assert (found.verdict, found.endpoints) == (ENDPOINTS, wanted)
    else:
        assert found == (Answer(wanted) if isinstance(wanted, str) else wanted)
    assert not rules.unknown


@LANGUAGES
def test_source_ranges_are_those_of_the_address(language: str) -> None:
    rules = read(language)
    found = rules.ranges(STRANGER, at("198.51.100.5:443/tcp"))
    assert found == {(to_address("203.0.113.0"), 120), (to_address("198.51.100.5"), 128)}
    assert rules.ranges(STRANGER, at("198.51.100.9:80/tcp")) == set()


def test_nothing_of_kube_proxy_is_nothing() -> None:
    assert nft.parse_tables('{"nftables": []}', LOCAL, ipv6=False) is None
    assert nft.parse_tables(NFT, LOCAL, ipv6=True) is None
    save = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j DOCKER\nCOMMIT\n"
    assert iptables.parse_save(save, LOCAL, ipv6=False) is None
    assert ipvs.parse_save("", frozenset(), ipv6=False) is None


def test_what_is_no_listing_is_said_to_be_none() -> None:
    with pytest.raises(ValueError, match="no listing"):
        nft.parse_tables("[]", LOCAL, ipv6=False)


def test_rules_of_others_are_not_followed() -> None:
    """INPUT drops port 80 and PREROUTING translates it: that is not kube-proxy's doing."""
    assert read("iptables").ask(STRANGER, at("192.0.2.1:80/tcp")) == Answer(ALONE)


def test_rules_that_no_hook_leads_to_serve_nobody() -> None:
    save = "\n".join(line for line in SAVE.splitlines() if not line.startswith("-A OUTPUT"))
    rules = iptables.parse_save(save, LOCAL, ipv6=False)
    assert rules
    assert rules.ask(HERE, at("10.96.0.10:80/tcp")) == Answer(ALONE)


def test_an_unknown_match_is_named_and_both_ways_are_followed() -> None:
    save = SAVE.replace(
        "-A KUBE-SVC-BBBB0001 -m comment",
        "-A KUBE-SVC-BBBB0001 -m moon --phase full -m comment",
        1,
    )
    rules = iptables.parse_save(save, LOCAL, ipv6=False)
    assert rules
    assert rules.ask(HERE, at("10.96.0.10:80/tcp")) == WEB
    (named,) = rules.unknown
    assert "--phase full" in named


def test_a_service_whose_address_is_not_understood_is_named() -> None:
    save = SAVE.replace("-d 10.96.0.10/32 -p tcp", "--moon 10.96.0.10 -p tcp")
    rules = iptables.parse_save(save, LOCAL, ipv6=False)
    assert rules
    assert any("--moon" in each for each in rules.unknown)


def test_an_unknown_statement_of_nft_is_named() -> None:
    text = NFT.replace(
        '"numgen": {"mode": "random", "mod": 2, "offset": 0}', '"moon": {"phase": 1}'
    )
    assert text != NFT
    rules = nft.parse_tables(text, LOCAL, ipv6=False)
    assert rules
    rules.ask(HERE, at("10.96.0.10:80/tcp"))
    assert any("moon" in each for each in rules.unknown)


def test_chains_that_lead_in_a_circle_end() -> None:
    save = SAVE.replace(
        "-A KUBE-SEP-AAAA0001 -p tcp", "-A KUBE-SEP-AAAA0001 -j KUBE-SVC-BBBB0001\n#"
    )
    rules = iptables.parse_save(save, LOCAL, ipv6=False)
    assert rules
    rules.ask(HERE, at("10.96.0.10:80/tcp"))
    assert any("without an end" in each for each in rules.unknown)


_WORDS = st.sampled_from(
    [*SAVE.replace("\n", " ").split(), "!", '"', "-j", "-d", "--dport", "x", "-A KUBE-SERVICES"]
)


@given(st.lists(st.lists(_WORDS, max_size=12).map(" ".join), max_size=20))
def test_no_text_of_iptables_makes_it_crash(lines: list[str]) -> None:
    text = "*nat\n:KUBE-SERVICES - [0:0]\n" + "\n".join(f"-A KUBE-SERVICES {e}" for e in lines)
    rules = iptables.parse_save(text, LOCAL, ipv6=False)
    assert rules
    for target in rules.targets():
        rules.ask(HERE, target.frontend)


_JSON = st.recursive(
    st.none()
    | st.integers()
    | st.sampled_from(["10.0.0.1", "@service-ips", "tcp", "new", "local"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "match",
                    "vmap",
                    "dnat",
                    "left",
                    "right",
                    "op",
                    "key",
                    "data",
                    "set",
                    "payload",
                    "meta",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
)


@given(
    st.lists(st.dictionaries(st.sampled_from(["match", "vmap", "dnat", "x"]), _JSON, min_size=1))
)
def test_no_rule_of_nft_makes_it_crash(statements: list[object]) -> None:
    listed = json.loads(NFT)
    where = {"family": "ip", "table": "kube-proxy", "chain": "services"}
    listed["nftables"].append({"rule": {**where, "expr": statements}})
    rules = nft.parse_tables(json.dumps(listed), LOCAL, ipv6=False)
    assert rules
    rules.ask(HERE, at("10.96.0.10:80/tcp"))


# -- IPVS ----------------------------------------------------------------------------------------


def test_virtual_servers() -> None:
    own = frozenset({to_address(f"10.96.0.{n}") for n in (10, 11, 12, 13, 53)})
    servers = ipvs.parse_save(f"{IPVS}--moon full\n", own, ipv6=False)
    assert servers
    assert servers.ask(HERE, at("10.96.0.10:80/tcp")) == WEB
    assert servers.ask(HERE, at("10.96.0.11:443/tcp")).affinity == 600
    assert servers.ask(HERE, at("10.96.0.12:80/tcp")) == Answer(REJECT)
    assert servers.ask(HERE, at("10.96.0.53:53/udp")) == endpoints("10.244.0.1:5353")
    assert Target(at("192.0.2.1:30080/tcp"), NODE_PORT, "") in set(servers.targets())
    assert servers.unknown == {"--moon full"}


def test_virtual_servers_of_ipv6() -> None:
    servers = ipvs.parse_save(IPVS, frozenset(), ipv6=True)
    assert servers
    assert servers.ask(HERE, at("[fd00:96::10]:80/tcp")) == endpoints(
        "[fd00:244::1]:8080", affinity=300
    )


@given(st.text())
def test_no_text_of_ipvsadm_makes_it_crash(text: str) -> None:
    ipvs.parse_save(text, frozenset(), ipv6=False)


# -- compared ------------------------------------------------------------------------------------


class Changed:
    """A proxy that answers as another one, but for some targets."""

    asks_who = True

    def __init__(self, proxy: Proxy, **answers: Answer) -> None:
        self._proxy = proxy
        self._answers = {at(where): answer for where, answer in answers.items()}
        self.targets = proxy.targets

    def ranges(self, client: Client, frontend: Frontend) -> set[Source]:
        return self._proxy.ranges(client, frontend)

    def ask(self, client: Client, frontend: Frontend) -> Answer:
        return self._answers.get(frontend) or self._proxy.ask(client, frontend)


@LANGUAGES
def test_proxies_that_do_the_same_differ_in_nothing_but_sctp(language: str) -> None:
    found = compare(read("nftables"), read(language), LOCAL, RETIRE)
    assert [each.kind for each in found.differences] == ["sctp"]
    assert (found.targets, found.outside) == (9, 4)
    assert found.differences[0].object == "10.96.0.13:36412/SCTP (shop/signal:s1)"


@pytest.mark.parametrize(
    ("where", "answer", "kinds"),
    [
        pytest.param(
            "10.96.0.10:80/tcp", endpoints("10.244.0.1:8080"), ["endpoint-missing"], id="lacks"
        ),
        pytest.param(
            "10.96.0.10:80/tcp",
            endpoints(*WEB.endpoints, "10.244.0.9:1"),
            ["endpoint-extra"],
            id="more",
        ),
        pytest.param("10.96.0.10:80/tcp", Answer(ALONE), ["not-served"], id="not-served"),
        pytest.param("10.96.0.12:80/tcp", Answer(ALONE), ["refused-by-one"], id="not-refused"),
        pytest.param("10.96.0.12:80/tcp", Answer(DROP), [], id="refused-otherwise"),
        pytest.param("10.96.0.11:443/tcp", API._replace(affinity=9), ["affinity"], id="affinity"),
        pytest.param(
            "198.51.100.5:443/tcp",
            API,
            ["outside-endpoint-extra", "outside-refused-by-one"],
            id="policy",
        ),
    ],
)
def test_a_difference_is_named(where: str, answer: Answer, kinds: list[str]) -> None:
    rules = read("nftables")
    found = compare(rules, Changed(rules, **{where: answer}), LOCAL, RETIRE)
    assert sorted(each.kind for each in found.differences if each.kind != "sctp") == kinds
    assert all(
        where.partition("/")[0] in each.object for each in found.differences if each.kind != "sctp"
    )


def test_without_devices_nothing_is_asked_for_clients_outside() -> None:
    rules = read("nftables")
    changed = Changed(rules, **{"198.51.100.5:443/tcp": API})
    found = compare(rules, changed, LOCAL, RETIRE, outside=False)
    assert [each.kind for each in found.differences] == ["sctp"]


def test_a_cluster_ip_on_a_device_is_left_to_what_listens_there() -> None:
    rules = read("nftables")
    changed = Changed(rules, **{"10.96.0.53:53/udp": Answer(ALONE)})
    found = compare(rules, changed, LOCAL | {to_address("10.96.0.53")}, RETIRE)
    assert not [each for each in found.differences if "10.96.0.53:53" in each.object]
    assert any("10.96.0.53:53" in note for note in found.notes)


def test_an_external_address_on_a_device_has_to_be_served_all_the_same() -> None:
    rules = read("nftables")
    changed = Changed(rules, **{"198.51.100.9:80/tcp": Answer(ALONE)})
    found = compare(rules, changed, LOCAL | {to_address("198.51.100.9")}, RETIRE)
    assert "not-served" in {each.kind for each in found.differences}


def test_rules_that_nothing_leads_to_are_not_taken_for_no_rules() -> None:
    save = "\n".join(e for e in SAVE.splitlines() if not e.startswith(("-A OUTPUT", "-A PREROU")))
    rules = iptables.parse_save(save, LOCAL, ipv6=False)
    assert rules
    found = compare(rules, read("iptables"), LOCAL, RETIRE)
    named = {each.object for each in found.differences if each.kind == "not-understood"}
    assert "10.96.0.10:80/TCP (shop/web:http)" in named


def test_on_the_way_back_a_node_port_at_some_addresses_is_as_it_is_meant() -> None:
    rules = read("nftables")
    other = to_address("192.0.2.50")
    found = compare(rules, rules, LOCAL | {other}, BACK)
    assert [each.kind for each in found.differences] == []
    assert "NodePorts are not served at 192.0.2.50 by kube-proxy" in found.notes


# -- IPv6 ----------------------------------------------------------------------------------------

_SAVE6 = """\
*nat
:KUBE-SERVICES - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A KUBE-SERVICES -d fd00:96::10/128 -p tcp -m comment --comment "shop/web:http cluster IP" \
-m tcp --dport 80 -j KUBE-SVC-W
-A KUBE-SVC-W -m comment --comment "shop/web:http -> [fd00:244::1]:8080" -j KUBE-SEP-A
-A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination [fd00:244::1]:8080
COMMIT
"""


def test_ipv6_of_iptables() -> None:
    rules = iptables.parse_save(_SAVE6, LOCAL, ipv6=True)
    assert rules
    assert list(rules.targets()) == [
        Target(at("[fd00:96::10]:80/tcp"), CLUSTER_IP, "shop/web:http")
    ]
    here = Client(to_address("2001:db8::1"), True)
    assert rules.ask(here, at("[fd00:96::10]:80/tcp")) == endpoints("[fd00:244::1]:8080")


# -- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cgroup", "unit", "in_pod"),
    [
        pytest.param(
            "0::/system.slice/kube-proxy.service\n", "kube-proxy.service", False, id="unit"
        ),
        pytest.param("0::/kubepods.slice/kubepods-pod1.slice/cri-2.scope\n", "", True, id="pod"),
        pytest.param("0::/kubelet.service/kubepods/pod1/2\n", "", True, id="pod-below-a-unit"),
        pytest.param("0::/user.slice\n", "", False, id="by-hand"),
    ],
)
def test_how_kube_proxy_runs_is_seen_from_its_cgroup(cgroup: str, unit: str, in_pod: bool) -> None:
    found = running_as(7, cgroup, "/usr/bin/kube-proxy")
    assert (found.unit, found.in_pod) == (unit, in_pod)


@pytest.mark.parametrize(
    ("cgroup", "words"),
    [
        pytest.param(
            "0::/system.slice/kp.service\n", "systemctl disable --now kp.service", id="unit"
        ),
        pytest.param("0::/kubepods/pod1\n", "kubectl label node worker", id="pod"),
        pytest.param("0::/user.slice\n", "kill 7", id="by-hand"),
    ],
)
def test_rules_are_removed_after_kube_proxy_has_stopped(cgroup: str, words: str) -> None:
    steps = retire([running_as(7, cgroup, "/opt/kube-proxy")], "worker", [("iptables", "IPv4")])
    commands = [command for step in steps for command in step.commands]
    (stop,) = [i for i, command in enumerate(commands) if command.startswith(words)]
    (clean,) = [i for i, command in enumerate(commands) if command.endswith("--cleanup")]
    assert stop < commands.index("pointsman verify") < clean == len(commands) - 1


@pytest.mark.parametrize(
    ("rules", "commands"),
    [
        ([("nftables", "IPv4")], ("nft delete table ip kube-proxy",)),
        (
            [("nftables", "IPv4"), ("nftables", "IPv6")],
            ("nft delete table ip kube-proxy", "nft delete table ip6 kube-proxy"),
        ),
        ([("nftables", "IPv4"), ("iptables", "IPv6")], ("/opt/kube-proxy --cleanup",)),
        ([("ipvs", "IPv4")], ("/opt/kube-proxy --cleanup",)),
    ],
)
def test_what_removes_the_rules_is_of_their_mode(
    rules: list[tuple[str, str]], commands: tuple[str, ...]
) -> None:
    by_hand = running_as(7, "0::/user.slice\n", "/opt/kube-proxy")
    assert retire([by_hand], "worker", rules)[-1].commands == commands


def test_a_program_in_a_container_is_no_command_on_the_node() -> None:
    pod = running_as(7, "0::/\n", "/usr/local/bin/kube-proxy", b"A=b\0KUBERNETES_SERVICE_HOST=x\0")
    for found in ([pod], []):  # stopped already: how it was is not to be seen
        (command,) = retire(found, "worker", [("iptables", "IPv4")])[-1].commands
        assert command.startswith("kubectl -n kube-system run ")
        overrides = json.loads(command.split("--overrides='")[1].split("'")[0])
        assert overrides["spec"]["nodeName"] == "worker"


@pytest.mark.parametrize(
    ("agent", "commands"),
    [
        (None, ["pointsman unload --drain 60"]),
        (
            running_as(7, "0::/system.slice/pointsman.service\n", "/usr/bin/python3"),
            ["systemctl disable --now pointsman.service", "pointsman unload --drain 60"],
        ),
        (
            running_as(7, "0::/user.slice\n", "/usr/bin/python3"),
            ["kill 7", "pointsman unload --drain 60"],
        ),
        (running_as(7, "0::/kubepods/pod1\n", "/usr/bin/python3"), []),
    ],
)
def test_the_agent_is_stopped_as_it_was_started(agent: Running | None, commands: list[str]) -> None:
    assert [command for step in back(agent) for command in step.commands] == commands


def test_the_patch_of_the_daemon_set_is_json() -> None:
    pod = running_as(7, "0::/kubepods/pod1\n", "/kube-proxy")
    steps = retire([pod], "worker", [("nftables", "IPv4")])
    (patch,) = [c for step in steps for c in step.commands if " patch " in c]
    term = json.loads(patch.split("'")[1])
    for key in ("spec", "template", "spec", "affinity", "nodeAffinity"):
        term = term[key]
    [each] = term["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert each["matchExpressions"][0]["operator"] == "NotIn"


def test_nothing_is_said_where_nothing_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(netlink, "ipvs_addresses", lambda: None)
    with pytest.raises(PointsmanError, match="nft and iptables-save: not found"):
        programmed(LOCAL)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`program(name, script)` is one of the only programs that there are."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(netlink, "ipvs_addresses", lambda: None)

    def make(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return make


ABSENT = "echo 'Error: No such file or directory' >&2; exit 1"


@pytest.mark.parametrize(
    ("nft_says", "save_says", "words"),
    [
        pytest.param("echo oops >&2; exit 1", "", "nft --json list .*: oops", id="nft-fails"),
        pytest.param("echo '{}'", "", "no listing", id="nft-says-something-else"),
        pytest.param(ABSENT, "echo no >&2; exit 4", "iptables-save: no", id="iptables-fails"),
        pytest.param(
            ABSENT,
            "echo \"# Table \\`nat' is incompatible, use 'nft' tool.\"",
            "can't show a table",
            id="iptables-can-not-show-it",
        ),
    ],
)
def test_what_can_not_be_read_is_an_error(
    program: Callable[[str, str], None], nft_says: str, save_says: str, words: str
) -> None:
    program("nft", nft_says)
    program("iptables-save", save_says)
    with pytest.raises(PointsmanError, match=words):
        programmed(LOCAL)


def test_each_mode_that_left_something_is_found(program: Callable[[str, str], None]) -> None:
    program("nft", f'[ "$4" = ip ] || {{ {ABSENT}; }}\nexec /bin/cat {_DATA / "nftables.json"}')
    program("iptables-nft-save", f"exec /bin/cat {_DATA / 'iptables.save'}")
    program("iptables-legacy-save", "")
    found = [(each.mode, each.family) for each in programmed(LOCAL)]
    assert found == [("nftables", "IPv4"), ("iptables", "IPv4")]
