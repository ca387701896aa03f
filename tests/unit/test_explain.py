"""Which endpoints a connection could get, as bpf/lookup.h would choose."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pointsman import explain as explaining
from pointsman.plan import Element
from pointsman.values import to_address
from tests.support.view import (
    DNS,
    HOST_NETNS,
    PODS,
    WEB,
    A,
    B,
    FakeView,
    backend,
    frontend,
    node_view,
    view,
)

SECOND = 1_000_000_000


def wrong_key() -> FakeView:
    maps = view()
    maps.elements[1] = replace(maps.elements[1], frontend=DNS)
    return maps


def empty(meaning: int) -> FakeView:
    maps = view()
    maps.elements[1] = Element(WEB, 1, meaning, 0, 0, 0)
    return maps


def beyond() -> FakeView:
    maps = view()
    del maps.slot[11]
    return maps


@pytest.mark.parametrize(
    ("maps", "destination", "verdict", "result", "service"),
    [
        pytest.param(
            view(),
            "10.96.0.1:80",
            "translated",
            "a connection gets one of 2 endpoints at random",
            "shop/web:http",
            id="a-service",
        ),
        pytest.param(
            view(),
            "[fd00::a]:53/udp",
            "translated",
            "a socket gets the one endpoint",
            "default/dns",
            id="udp-over-ipv6",
        ),
        pytest.param(
            view(),
            "[::ffff:10.96.0.1]:80",
            "translated",
            "a connection gets one of 2 endpoints at random",
            "shop/web:http",
            id="an-ipv4-mapped-socket-finds-the-same",
        ),
        pytest.param(
            empty(0),
            "10.96.0.1:80",
            "refused",
            "ECONNREFUSED: service has no endpoints",
            "shop/web:http",
            id="no-endpoints",
        ),
        pytest.param(
            empty(1),
            "10.96.0.1:80",
            "unreachable",
            "EHOSTUNREACH: service has no endpoints under its policy",
            "shop/web:http",
            id="no-endpoints-under-a-policy",
        ),
        pytest.param(
            view(),
            "10.96.0.1:81",
            "refused",
            "ECONNREFUSED: no Service defines port 81 of 10.96.0.1",
            "shop/web",
            id="an-undefined-port-of-a-known-vip",
        ),
        pytest.param(
            view(),
            "10.96.0.1:80/udp",
            "refused",
            "ECONNREFUSED: no Service defines port 80/udp of 10.96.0.1",
            "shop/web",
            id="the-other-protocol-is-undefined-too",
        ),
        pytest.param(
            view(),
            "1.2.3.4:80",
            "not-a-service",
            "not a Service: the address is used as it is",
            "",
            id="anything-else",
        ),
        pytest.param(
            wrong_key(),
            "10.96.0.1:80",
            "refused",
            "ECONNREFUSED: no Service defines port 80 of 10.96.0.1",
            "shop/web",
            id="the-service-s-own-key-has-the-last-word",
        ),
        pytest.param(
            FakeView(keys={WEB: 99}),
            "10.96.0.1:80",
            "not-a-service",
            "not a Service: the address is used as it is",
            "",
            id="a-service-id-outside-of-the-map",
        ),
        pytest.param(
            beyond(),
            "10.96.0.1:80",
            "translated",
            "a connection gets the one endpoint; 1 in 2 fail with ECONNREFUSED: no such slot",
            "shop/web:http",
            id="a-set-that-ends-beyond-the-map",
        ),
    ],
)
def test_explain(maps: FakeView, destination: str, verdict: str, result: str, service: str) -> None:
    found = explaining.explain(maps, explaining.parse_destination(destination))
    assert (found.verdict, found.result, found.service) == (verdict, result, service)
    assert found.errno == result.partition(":")[0] if found.errno else verdict[0] in "tn"


@pytest.mark.parametrize(
    ("maps", "destination", "result"),
    [
        pytest.param(empty(0), "10.96.0.1:80", "EPERM: service has no endpoints", id="refused"),
        pytest.param(
            empty(1),
            "10.96.0.1:80",
            "EPERM: service has no endpoints under its policy",
            id="policy",
        ),
        pytest.param(
            view(), "10.96.0.1:81", "EPERM: no Service defines port 81 of 10.96.0.1", id="a-port"
        ),
        pytest.param(
            replace(view(), cidrs=((to_address("10.97.0.0"), b"\xff" * 14 + b"\0\0"),)),
            "10.97.0.9:80",
            "EPERM: no Service has the address 10.97.0.9",
            id="unused",
        ),
    ],
)
def test_where_programs_can_not_choose_the_error_it_is_eperm(
    maps: FakeView, destination: str, result: str
) -> None:
    parsed = explaining.parse_destination(destination)
    found = explaining.explain(maps, parsed, tells_why=False)
    assert (found.errno, found.result) == ("EPERM", result)


def test_explain_says_step_by_step_what_the_programs_see() -> None:
    maps = view()
    maps.loads[6] = (4, 2)
    assert explaining.explain(maps, WEB).steps == (
        "frontends: key 10.96.0.1:80/TCP leads to service 1",
        "service 1: its own key is the same",
        "service 1: belongs to shop/web:http, algorithm random",
        "set: 2 endpoints, slots 10 to 11",
        "slot 10: 10.0.0.1:8080, probability 50.0%, 4 open, endpoint 5, generation 1 as in load",
        "slot 11: 10.0.0.2:8080, probability 50.0%, 2 open, endpoint 6, generation 3, but load "
        "has 4: its connections are not counted",
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("10.96.0.1", "is no ADDRESS:PORT"),
        ("fd00::1:80", "is no ADDRESS:PORT"),
        ("10.96.0.1:http", "is no ADDRESS:PORT"),
        ("10.96.0.1:65536", "above 65535"),
        ("10.96.0.1:80/sctp", "'sctp' is not translated"),
        ("web.shop:80", "no IP address"),
        ("10.1:80", "no IP address"),
        ("[10.96.0:80]:80", "not an IP address"),
    ],
)
def test_what_is_no_destination_is_wrong_usage(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        explaining.parse_destination(text)


def explained(
    destination: str, client: str = "host", maps: FakeView | None = None, now: int = 0
) -> explaining.Explanation:
    parsed = explaining.parse_destination(destination)
    return explaining.explain(maps or node_view(), parsed, client, now)


UNTOUCHED = "not a Service: the address is used as it is"
ONE_OF_2 = "a connection gets one of 2 endpoints at random"
API_IS = "which chooses by random and then keeps a client's endpoint for 60 s"


@pytest.mark.parametrize(
    ("destination", "client", "result", "why"),
    [
        pytest.param(
            "203.0.113.9:80", "pod", ONE_OF_2,
            f"203.0.113.9:80/TCP is shop/api:http, {API_IS}",
            id="a-load-balancer-s-address",
        ),
        pytest.param(
            "203.0.113.9:81", "pod", UNTOUCHED,
            "203.0.113.9 is the address of no Service and of no node",
            id="an-undefined-port-there-is-untouched",
        ),
        pytest.param(
            "192.0.2.1:30080", "pod", ONE_OF_2,
            "192.0.2.1:30080/TCP is the NodePort of shop/api:http at an address of this node, "
            f"{API_IS}",
            id="a-node-port-at-this-node",
        ),
        pytest.param(
            "192.0.2.1:22", "host", UNTOUCHED,
            "192.0.2.1 is an address of this node, and no Service has the NodePort 22",
            id="another-port-of-the-node-is-its-own",
        ),
        pytest.param(
            "192.0.2.1:31443/udp", "host", UNTOUCHED,
            "192.0.2.1 is an address of this node, and no Service has the NodePort 31443/udp",
            id="udp-is-another-node-port",
        ),
        pytest.param(
            "192.0.2.2:31443", "pod", "a connection gets the one endpoint",
            "192.0.2.2:31443/TCP is the NodePort of shop/ext at an address of another node, "
            "which chooses by random",
            id="a-node-port-at-another-node",
        ),
        pytest.param(
            "192.0.2.2:30080", "pod", UNTOUCHED,
            "192.0.2.2 is an address of another node, and the NodePort 30080 of shop/api:http "
            "holds on this node only: its externalTrafficPolicy is Local, so that node decides",
            id="externaltrafficpolicy-local-is-that-node-s-business",
        ),
        pytest.param(
            "192.0.2.1:443", "pod", "a connection gets the one endpoint",
            "192.0.2.1:443/TCP is shop/ext, which chooses by random",
            id="an-externalip-that-is-the-node-s-own-address",
        ),
        pytest.param(
            "192.0.2.1:8080", "pod", "a connection gets the one endpoint",
            "192.0.2.1:8080/TCP is the hostPort of web/pod/p:8080-tcp at an address of this "
            "node, which chooses by random",
            id="a-hostport",
        ),
        pytest.param(
            "192.0.2.2:8080", "pod", UNTOUCHED,
            "192.0.2.2 is an address of another node, and the hostPort 8080 of "
            "web/pod/p:8080-tcp holds on this node only: that node knows its own Pods",
            id="a-hostport-is-not-another-node-s",
        ),
        pytest.param(
            "127.0.0.1:9090", "host", "a connection gets the one endpoint",
            "127.0.0.1:9090/TCP is the hostPort of web/pod/p:9090-tcp, which chooses by random",
            id="a-hostport-at-loopback",
        ),
        pytest.param(
            "127.0.0.1:9090", "pod", UNTOUCHED,
            "127.0.0.1:9090/TCP is web/pod/p:9090-tcp, for processes in the host's network "
            "namespace only",
            id="a-hostport-at-loopback-is-not-a-pod-s",
        ),
        pytest.param(
            "127.0.0.1:31443", "host", "a connection gets the one endpoint",
            "127.0.0.1:31443/TCP is the NodePort of shop/ext at the loopback address, which "
            "chooses by random",
            id="a-node-port-at-loopback",
        ),
        pytest.param(
            "127.1.2.3:31443", "host", "a connection gets the one endpoint",
            "127.1.2.3:31443/TCP is the NodePort of shop/ext at the loopback address, which "
            "chooses by random",
            id="all-of-127-is-loopback",
        ),
        pytest.param(
            "127.0.0.1:31443", "pod", UNTOUCHED,
            "a pod's 127.0.0.1 is its own: NodePorts are there for the host's processes only",
            id="a-pod-s-loopback-is-its-own",
        ),
        pytest.param(
            "[::1]:31443", "host", UNTOUCHED,
            "::1 is the address of no Service and of no node",
            id="a-loopback-address-that-no-node-port-has",
        ),
        pytest.param(
            "0.0.0.0:31443", "pod", UNTOUCHED,
            "a pod's 0.0.0.0 is its own: NodePorts are there for the host's processes only",
            id="whoever-dials-0.0.0.0-means-his-own-loopback",
        ),
        pytest.param(
            "10.96.1.1:80", "pod", UNTOUCHED,
            "10.96.1.1 is an address at which nothing is refused",
            id="an-address-that-passes",
        ),
        pytest.param(
            "10.96.9.9:80", "pod", "ECONNREFUSED: no Service has the address 10.96.9.9",
            "10.96.9.9 is in the service CIDR 10.96.0.0/12, and the agent was told to refuse "
            "what no Service uses there",
            id="an-unused-address-of-a-refused-cidr",
        ),
    ],
)  # fmt: skip
def test_explain_says_why_an_address_of_a_node_is_translated_or_not(
    destination: str, client: str, result: str, why: str
) -> None:
    maps = node_view()
    maps.cidrs = ((to_address("10.96.0.0"), b"\xff" * 13 + b"\xf0\0\0"),)
    maps.owners[5] = PODS._replace(port="9090-tcp")
    loopback = maps.elements[maps.keys[frontend("127.0.0.1", 9090)]]
    maps.elements[maps.keys[loopback.frontend]] = replace(loopback, owner=5)
    found = explained(destination, client, maps)
    assert (found.result, found.why) == (result, why)
    assert (found.verdict == "not-a-service") == (result == UNTOUCHED)


def test_explain_walks_from_a_node_s_address_to_its_node_ports() -> None:
    assert explained("127.1.2.3:31443").steps[:7] == (
        "frontends: no key 127.1.2.3:31443/TCP",
        "127.1.2.3: looked up as 127.0.0.1",
        "frontends: key 127.0.0.1:* leads to service 13",
        "service 13: its own key is the same",
        "service 13: flags loopback",
        "frontends: key 0.0.0.0:31443/TCP leads to service 8",
        "service 8: its own key is the same",
    )


def test_explain_says_that_no_process_is_the_host_s_until_the_agent_has_said_so() -> None:
    maps = node_view()
    maps.host_netns = 0
    found = explained("127.0.0.1:31443", "host", maps)
    assert (found.verdict, "every process is a pod's" in found.notes[0]) == ("not-a-service", True)


def test_explain_warns_that_some_namespaces_are_opted_out() -> None:
    maps = replace(node_view(), skipped=(8, 9))
    assert explained("10.96.0.7:80", "pod", maps).notes[0] == (
        "sockets of the 2 network namespaces that are opted out are not translated, whatever is "
        "said here"
    )
    assert explained("10.96.0.8:443", "pod").notes == ()


def test_explain_knows_the_endpoint_that_the_host_has() -> None:
    maps = node_view()
    maps.remember(HOST_NETNS, 1, B, 100 * SECOND)
    maps.remember(5000, 1, A, 100 * SECOND)
    found = explained("10.96.0.7:80", "host", maps, 110 * SECOND)
    assert found.result == "a connection gets 10.0.0.2:8080, the endpoint that this client has"
    assert found.why == (
        "10.96.0.7:80/TCP is shop/api:http, which keeps a client's endpoint; this one for 50 s "
        "more, each new connection prolongs it"
    )
    assert [(e.endpoint, e.probability) for e in found.endpoints] == [
        ("10.0.0.1:8080", 0.0),
        ("10.0.0.2:8080", 1.0),
    ]
    assert found.affinity == explaining.Affinity(60, "10.0.0.2:8080", 50.0, 2)
    assert found.notes == (
        "each network namespace is a client of its own: 1 other network namespaces have an "
        "endpoint now, see 'pointsman get affinity'",
    )
    others = explained("10.96.0.7:80", "pod", maps, 110 * SECOND)
    assert (others.result, others.why.endswith("keeps a client's endpoint for 60 s")) == (
        ONE_OF_2,
        True,
    )


@pytest.mark.parametrize(
    ("endpoint", "seen", "host"),
    [
        pytest.param("10.0.0.2:8080", 49, HOST_NETNS, id="its-time-is-over"),
        pytest.param("10.0.0.9:8080", 100, HOST_NETNS, id="its-endpoint-has-left"),
        pytest.param("10.0.0.2:8080", 100, 0, id="the-host-s-namespace-is-not-known"),
    ],
)
def test_explain_lets_the_host_choose_anew_when(endpoint: str, seen: int, host: int) -> None:
    maps = node_view()
    maps.host_netns = host
    maps.remember(HOST_NETNS, 1, backend(endpoint), seen * SECOND)
    assert explained("10.96.0.7:80", "host", maps, 110 * SECOND).result == ONE_OF_2
