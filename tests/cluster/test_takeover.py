"""`pointsman takeover` beside a real kube-proxy: what that has made of Services is understood."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from pointsman.kubeproxy import answers, iptables, nft
from pointsman.kubeproxy.answers import Client
from pointsman.kubeproxy.compare import BACK, compare
from pointsman.values import PROTOCOLS, Frontend, to_address
from tests.cluster.cluster import Cluster
from tests.cluster.compare.answers import ALONE, DROP, ENDPOINTS, HOST, REJECT, Target, plain
from tests.cluster.compare.apply import Applied
from tests.cluster.compare.nft import Ruleset
from tests.cluster.compare.world import World
from tests.cluster.nodes import Agent, KubeProxy
from tests.cluster.space import Service, Space
from tests.cluster.waiting import tail, wait_for

pytestmark = pytest.mark.cluster

NODE = "node-c"
#: One port each, so that all have a NodePort of their own.
_TCP = [{"name": "tcp", "port": 80, "targetPort": 8080, "protocol": "TCP"}]
_RANGES = ["203.0.113.0/24", "2001:db8:113::/64"]
#: Verdicts of tests/cluster/compare in the words of `takeover`.
_WORDS = {
    ENDPOINTS: answers.ENDPOINTS,
    REJECT: answers.REJECT,
    DROP: answers.DROP,
    ALONE: answers.ALONE,
}


def services(space: Space) -> None:
    """Of every kind that a proxy tells apart, in both families."""
    pods = space.deploy("web", replicas=3)
    space.service("web", type="NodePort", externalIPs=["198.51.100.9", "2001:db8:51::9"])
    space.service("kept", selector={"app": "web"}, ports=_TCP, sessionAffinity="ClientIP")
    space.service("near", selector={"app": "web"}, ports=_TCP, internalTrafficPolicy="Local")
    balanced: dict[str, Any] = {"selector": {"app": "web"}, "ports": _TCP, "type": "LoadBalancer"}
    space.service("all", **balanced, loadBalancerSourceRanges=_RANGES)
    space.service("here", **balanced, externalTrafficPolicy="Local")
    space.service("empty", selector={"app": "nobody"}, ports=_TCP, type="NodePort")
    for name, last in (("all", 201), ("here", 202)):
        ingress = [{"ip": f"198.51.100.{last}"}, {"ip": f"2001:db8:51::{last}"}]
        status = {"loadBalancer": {"ingress": ingress}}
        space.api.patch_status("Service", name, status, namespace=space.namespace)
    space.wait_endpoints("here", pods)


@pytest.fixture
def clean(cluster: Cluster, space: Space) -> Iterator[None]:
    """Without the rules of kube-proxy's iptables mode afterwards."""
    yield
    cluster.lab.run(["nft", "flush", "ruleset"], cluster.nodes[NODE].place)


def takeover(agent: Agent, *options: str) -> tuple[int, dict[str, Any]]:
    done = agent.cli("takeover", "--cgroup", str(agent.node.cgroup), "-o", "json", *options)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def ready(agent: Agent, *options: str) -> dict[str, Any]:
    """The report, once there are no differences: either proxy may be a while behind."""
    found: dict[str, Any] = {}

    def settled() -> bool:
        code, report = takeover(agent, *options)
        found.update(report)
        return code == 0

    wait_for(settled, "no differences", 120, logs=lambda: differences(found) + tail(agent.log))
    return found


def differences(found: dict[str, Any]) -> str:
    return "\n".join(f"{e['kind']}: {e['object']}: {e['message']}" for e in found["differences"])


@pytest.mark.parametrize("mode", ["nftables", "iptables"])
def test_what_a_real_kube_proxy_made_is_understood(
    cluster: Cluster, space: Space, clean: None, mode: str
) -> None:
    services(space)
    proxy, agent = cluster.proxy(NODE), cluster.agent(NODE)
    proxy.start(mode=mode)
    silent = ("--healthz-bind-address", "off", "--metrics-bind-address", "off")
    agent.start("--devices", "eth0", *silent)
    logs = partial(tail, agent.log)
    wait_for(
        lambda: any(e["served"] for e in agent.status()["devices"]["items"]), "eth0", 180, logs=logs
    )
    found = ready(agent)
    assert found["ready"] is True
    assert {(e["mode"], e["family"]) for e in found["kubeProxy"]} == {
        (mode, "IPv4"),
        (mode, "IPv6"),
    }
    assert all(e["frontends"] > 9 for e in found["kubeProxy"])
    ready(agent, "--back")

    ports = [{"name": "signal", "port": 9899, "protocol": "SCTP"}]
    sctp = space.service("sctp", selector={"app": "web"}, ports=ports)

    def told() -> bool:
        return f"{sctp.ip}:9899/SCTP" in differences(takeover(agent)[1])

    wait_for(told, "SCTP to be named", 60, logs=logs)
    code, found = takeover(agent)
    assert code == 1
    assert {e["kind"] for e in found["differences"]} == {"sctp"}, differences(found)

    agent.kill()
    space.delete("Service", "sctp")
    # Which leaves IPv6 open to all.
    space.patch("Service", "all", {"spec": {"loadBalancerSourceRanges": ["192.0.2.128/25"]}})

    wanted = {
        ("unhealthy", ""),
        ("outside-refused-by-one", "198.51.100.201:80/TCP"),
        ("outside-not-served", "198.51.100.201:80/TCP"),
        ("outside-not-served", "[2001:db8:51::201]:80/TCP"),
    }

    def stale() -> bool:
        """Of both families, whose rules come one after the other."""
        _, report = takeover(agent)
        found.update(report)
        listed = {(e["kind"], e["object"].partition(" ")[0]) for e in report["differences"]}
        return listed == wanted

    wait_for(
        stale, "ranges that the stopped agent does not know", 60, logs=lambda: differences(found)
    )


def test_two_readings_of_the_same_rules_agree(cluster: Cluster, space: Space) -> None:
    """The one of `takeover`, and that of tests/cluster/compare, which shares nothing with it."""
    world, applied, proxy = World(7, 40), Applied(cluster, space), cluster.proxy(NODE)
    node = cluster.nodes[NODE].addresses
    sources = {(HOST, 4): node.v4, (HOST, 6): node.v6}
    proxy.start()
    asked: Counter[str] = Counter()
    for step in range(4):
        world.step()
        applied.bring(world)
        mark = space.service(f"mark-{step}", selector={"app": "nobody"})
        wait_for(partial(_has, proxy, mark), "rules", logs=partial(tail, proxy.log))
        listed = proxy.rules()
        other = Ruleset(listed, (node.v4, node.v6), sources)
        for (_, family), source in sources.items():
            local = frozenset(map(to_address, (node.v4, node.v6)))
            text = json.dumps({"nftables": listed})
            rules = nft.parse_tables(text, local, ipv6=family == 6)
            assert rules
            for address, port, protocol in other.targets():
                # Of NodePorts of IPv4, and of those of IPv6; port 0 is an address as a whole.
                place = source if address == ("" if family == 4 else "::") else address
                target = Target(place, port, protocol)
                if not place or target.family != family or not port:
                    continue
                frontend = Frontend(to_address(place), port, PROTOCOLS[protocol.upper()])
                mine = rules.ask(Client(to_address(source), True), frontend)
                theirs = other.ask(HOST, target)
                assert mine == (_WORDS[theirs.verdict], theirs.endpoints, theirs.affinity), target
                asked[mine.verdict] += 1
            assert not rules.unknown
    assert {"endpoints", "refused", "dropped"} <= asked.keys(), asked


#: Addresses that nothing else has.
_MARKS = {"IPv4": "10.245.9.9", "IPv6": "fd00:245::9:9"}


def _mark(space: Space) -> None:
    """A Service and its slices, made after all else: whose rules have their addresses, in both
    families, has seen the rest of both watches."""
    space.service("mark", selector=None)
    for family, address in _MARKS.items():
        space.apply(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": f"mark-{family.lower()}",
                    "labels": {"kubernetes.io/service-name": "mark"},
                },
                "addressType": family,
                "ports": [{"name": "tcp", "port": 8080}],
                "endpoints": [{"addresses": [address]}],
            }
        )


def _has(proxy: KubeProxy, made: Service) -> bool:
    """The rules of both families."""
    listed = str(proxy.rules())
    return all(ip in listed for ip in made.ips)


def test_both_modes_of_kube_proxy_read_the_same(
    cluster: Cluster, space: Space, clean: None
) -> None:
    world, proxy = World(11, 60), cluster.proxy(NODE)
    for _ in range(3):
        world.step()
    Applied(cluster, space).bring(world)
    _mark(space)
    node = cluster.nodes[NODE]
    local = frozenset(map(to_address, (node.addresses.v4, node.addresses.v6)))
    claims = Counter(
        plain(ip) for each in world.services.values() for ip in each["spec"].get("externalIPs", ())
    )
    for status in world.statuses.values():
        claims.update(
            plain(each["ip"]) for each in status["loadBalancer"]["ingress"] if each.get("ip")
        )
    contested = tuple(
        f"[{ip}]" if ":" in ip else f"{ip}:" for ip, times in claims.items() if times > 1
    )

    def listed(*command: str) -> str:
        return str(cluster.lab.run([*command], node.place).stdout)

    proxy.start()
    logs = partial(tail, proxy.log)
    wait_for(lambda: all(e in str(proxy.rules()) for e in _MARKS.values()), "rules", logs=logs)
    tables = json.dumps({"nftables": proxy.rules()})
    proxy.stop()
    proxy.start(mode="iptables")

    def written() -> bool:
        saved = listed("iptables-save") + listed("ip6tables-save")
        return all(each in saved for each in _MARKS.values())

    wait_for(written, "rules", logs=logs)
    for ipv6, save in ((False, "iptables-save"), (True, "ip6tables-save")):
        one = nft.parse_tables(tables, local, ipv6=ipv6)
        other = iptables.parse_save(listed(save), local, ipv6=ipv6)
        assert one
        assert other
        for old, new in ((one, other), (other, one)):
            found = compare(old, new, local, BACK)
            assert found.targets > 40
            # What the test before had may be in the rules still; what two claim is either's.
            assert not [
                each
                for each in found.differences
                if f"({space.namespace}/" in each.object and not each.object.startswith(contested)
            ]
        assert not one.unknown | other.unknown
