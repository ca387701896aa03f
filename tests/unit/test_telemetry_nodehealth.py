"""healthCheckNodePorts: which Services have one, and what a load balancer is told."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from pointsman.context import Context, Policy
from pointsman.objects import (
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    ObjectMeta,
    Ref,
    Service,
    ServicePort,
    ServiceSpec,
)
from pointsman.telemetry.nodehealth import Check, NodeHealth, checks, listen_addresses
from pointsman.values import to_address
from tests.unit.test_telemetry_http import V4, V6, Loop, ask, needs_ipv6, running

REF = Ref("Service", "default", "web")
HERE = Context(node_name="a")


def service(
    type_: str = "LoadBalancer",
    policy: str = "Local",
    port: int = 32000,
    ips: tuple[str, ...] = ("10.96.0.1",),
    labels: dict[str, str] | None = None,
) -> Service:
    return Service(
        metadata=ObjectMeta(name="web", labels=labels or {}),
        spec=ServiceSpec(
            type=type_,
            external_traffic_policy=policy,
            health_check_node_port=port,
            cluster_ip=ips[0] if ips else "",
            cluster_ips=ips,
            ports=(ServicePort(port=80),),
        ),
    )


def piece(
    *endpoints: Endpoint, family: str = "IPv4", ports: tuple[int | None, ...] = (8080,)
) -> EndpointSlice:
    return EndpointSlice(
        metadata=ObjectMeta(name="web-1"),
        address_type=family,
        endpoints=endpoints,
        ports=tuple(EndpointPort(name=f"p{i}", port=port) for i, port in enumerate(ports)),
    )


def endpoint(
    address: str = "10.244.0.1",
    node: str = "a",
    ready: bool | None = True,
    serving: bool | None = None,
    terminating: bool | None = None,
) -> Endpoint:
    conditions = EndpointConditions(ready=ready, serving=serving, terminating=terminating)
    return Endpoint(addresses=(address,), node_name=node, conditions=conditions)


ONE = piece(endpoint())
DUAL = ("10.96.0.1", "fd00:96::1")


@pytest.mark.parametrize(
    ("slices", "counts"),
    [
        pytest.param([ONE], {"IPv4": 1}, id="one-here"),
        pytest.param([], {"IPv4": 0}, id="none"),
        pytest.param([piece(endpoint(node="b"))], {"IPv4": 0}, id="on-another-node"),
        pytest.param([piece(endpoint(node=""))], {"IPv4": 0}, id="on-no-node"),
        pytest.param([piece(endpoint(ready=False))], {"IPv4": 0}, id="not-ready"),
        pytest.param([piece(endpoint(ready=None))], {"IPv4": 1}, id="unknown-is-ready"),
        pytest.param(
            [piece(endpoint(ready=False, serving=True, terminating=True))],
            {"IPv4": 0},
            id="terminating-only",
        ),
        pytest.param([piece(endpoint(), ports=(80, 443))], {"IPv4": 1}, id="two-ports-are-one"),
        pytest.param([piece(endpoint(), ports=())], {"IPv4": 0}, id="no-port"),
        pytest.param([piece(endpoint(), ports=(None,))], {"IPv4": 0}, id="null-port"),
        pytest.param([ONE, ONE], {"IPv4": 1}, id="in-two-slices"),
        pytest.param(
            [piece(endpoint(ready=False)), ONE], {"IPv4": 1}, id="in-two-slices-the-better-counts"
        ),
        pytest.param([piece(endpoint(), endpoint("10.244.0.2"))], {"IPv4": 2}, id="two"),
        pytest.param(
            [piece(endpoint("fd00:244::1"), family="IPv6")], {"IPv4": 0}, id="the-other-family"
        ),
    ],
)
def test_ready_addresses_of_this_node_count(
    slices: list[EndpointSlice], counts: dict[str, int]
) -> None:
    assert checks(service(), slices, HERE) == Check(REF, 32000, counts)


def test_each_family_counts_for_itself() -> None:
    slices = [ONE, piece(endpoint("fd00:244::1"), endpoint("fd00:244::2"), family="IPv6")]
    found = checks(service(ips=DUAL), slices, HERE)
    assert found is not None
    assert found.local_endpoints == {"IPv4": 1, "IPv6": 2}


def test_an_agent_without_a_node_name_has_no_endpoints() -> None:
    found = checks(service(), [piece(endpoint(node=""))], Context())
    assert found is not None
    assert found.local_endpoints == {"IPv4": 0}


@pytest.mark.parametrize(
    "without",
    [
        pytest.param(service(type_="NodePort"), id="type-NodePort"),
        pytest.param(service(policy="Cluster"), id="policy-Cluster"),
        pytest.param(service(port=0), id="no-port"),
        pytest.param(service(ips=("None",)), id="headless"),
        pytest.param(
            service(labels={"service.kubernetes.io/service-proxy-name": "x"}), id="another-proxy-s"
        ),
    ],
)
def test_others_have_no_check(without: Service) -> None:
    assert checks(without, [ONE], HERE) is None


ADDRESSES = frozenset(map(to_address, ("192.0.2.1", "198.51.100.1", "2001:db8::1")))


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        pytest.param((), [], id="all"),
        pytest.param(("192.0.2.0/24",), ["192.0.2.1", "2001:db8::1"], id="of-one-family"),
        pytest.param(("127.0.0.0/8", "2001:db8::/32"), [V4, "2001:db8::1"], id="loopback"),
    ],
)
def test_checks_listen_where_node_ports_answer(
    chosen: tuple[str, ...], expected: list[str]
) -> None:
    policy = Policy(node_port_addresses=chosen)
    context = Context(policy=policy, node_name="a", local_addresses=ADDRESSES)
    found = set(listen_addresses(context))
    # ::1 goes with a family that nothing was said of, as in the programs.
    assert found - {V6} == set(expected)


# -- the servers ---------------------------------------------------------------------------------


class Health:
    healthy = True

    def __call__(self) -> bool:
        return self.healthy


@pytest.fixture
def loop() -> Iterator[Loop]:
    with running() as found:
        yield found


def free_port() -> int:
    with socket.create_server((V4, 0)) as probe:
        return int(probe.getsockname()[1])


def test_the_answer_is_kube_proxy_s(loop: Loop) -> None:
    health = Health()
    servers = NodeHealth(loop, health, addresses=[V4])
    port = free_port()
    for count, healthy, status in ((0, True, 503), (2, True, 200), (2, False, 503), (1, True, 200)):
        health.healthy = healthy
        servers.want(REF, Check(REF, port, {"IPv4": count}))
        loop.port(REF)
        answer, body = ask(port, "/any/path")
        assert answer.status == status
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Load-Balancing-Endpoint-Weight"] == str(count)
        assert body.decode() == (
            '{\n\t"service": {\n\t\t"namespace": "default",\n\t\t"name": "web"\n\t},\n'
            f'\t"localEndpoints": {count},\n\t"serviceProxyHealthy": {str(healthy).lower()}\n}}'
        )


@needs_ipv6
def test_each_family_is_told_its_own_count(loop: Loop) -> None:
    servers = NodeHealth(loop, Health(), addresses=[V4, V6])
    port = free_port()
    servers.want(REF, Check(REF, port, {"IPv4": 1, "IPv6": 2}))
    loop.port(REF, 1)
    for host, count in ((V4, 1), (V6, 2)):
        assert json.loads(ask(port, "/", host)[1])["localEndpoints"] == count


@needs_ipv6
def test_a_service_of_one_family_listens_in_that_family_only(loop: Loop) -> None:
    servers = NodeHealth(loop, Health())
    port = free_port()
    servers.want(REF, Check(REF, port, {"IPv4": 1}))
    loop.port(REF)
    assert loop.bound(REF) == [("0.0.0.0", port)]


def test_a_new_port_takes_the_place_of_the_old_one(loop: Loop) -> None:
    servers = NodeHealth(loop, Health(), addresses=[V4])
    old, new = free_port(), free_port()
    servers.want(REF, Check(REF, old, {"IPv4": 1}))
    loop.until(lambda: loop.bound(REF) == [(V4, old)])
    servers.want(REF, Check(REF, new, {"IPv4": 1}))
    loop.until(lambda: loop.bound(REF) == [(V4, new)])
    with pytest.raises(ConnectionRefusedError):
        ask(old, "/")


def test_a_service_without_a_check_has_no_port(loop: Loop) -> None:
    servers = NodeHealth(loop, Health(), addresses=[V4])
    other = REF._replace(name="other")
    port = free_port()
    servers.want(REF, Check(REF, port, {"IPv4": 1}))
    loop.port(REF)
    servers.want(REF, None)
    servers.want(other, Check(other, port, {"IPv4": 0}))  # the port is free for the next
    loop.port(other)
    assert json.loads(ask(port, "/")[1])["service"]["name"] == "other"


def test_a_taken_port_is_a_problem_of_the_service_until_it_is_free(loop: Loop) -> None:
    servers = NodeHealth(loop, Health(), node_name="a", addresses=[V4])
    with socket.create_server((V4, 0)) as other:
        port = other.getsockname()[1]
        servers.want(REF, Check(REF, port, {"IPv4": 1}))
        loop.until(lambda: bool(servers.problems))
        (problem,) = servers.problems
        assert problem.object == "Service default/web"
        assert problem.reason == "FailedToStartServiceHealthcheck"
        assert "node a" in problem.message
        assert str(port) in problem.message
    loop.until(lambda: not servers.problems)
    assert ask(port, "/")[0].status == 200


def test_checks_follow_the_node_s_addresses(loop: Loop) -> None:
    servers = NodeHealth(loop, Health(), addresses=[V4])
    port = free_port()
    servers.want(REF, Check(REF, port, {"IPv4": 1}))
    loop.port(REF)
    servers.move(["127.0.0.2"])
    loop.until(lambda: loop.bound(REF) == [("127.0.0.2", port)])


def test_many_services_share_one_thread(loop: Loop) -> None:
    servers = NodeHealth(loop, Health(), addresses=[V4])
    refs = [Ref("Service", "default", f"s{i}") for i in range(100)]
    for ref in refs:
        servers.want(ref, Check(ref, 0, {"IPv4": 1}))
    loop.until(lambda: all(loop.bound(ref) for ref in refs))
    for ref in refs:
        assert json.loads(ask(loop.port(ref), "/")[1])["service"]["name"] == ref.name
