"""Which endpoints a connection could get, as bpf/lookup.h would choose."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pointsman import explain as explaining
from pointsman.plan import Element
from tests.support.view import DNS, WEB, FakeView, view


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
