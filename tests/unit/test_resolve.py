"""Which frontends a Service has, with which endpoints, flags and affinity."""

from __future__ import annotations

import msgspec
import pytest

from pointsman import abi
from pointsman.choice import ALGORITHM, EJECTION, MAX_CONNECTIONS, WEIGHT, ZONE_CONNECTIONS
from pointsman.context import Context, Policy
from pointsman.endpointsets import EMPTY_UNREACHABLE
from pointsman.objects import (
    ClientIPConfig,
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    LoadBalancerIngress,
    LoadBalancerStatus,
    ObjectMeta,
    Service,
    ServicePort,
    ServiceSpec,
    ServiceStatus,
    SessionAffinityConfig,
)
from pointsman.resolve import (
    EMPTY_REFUSE,
    affinity_seconds,
    is_balanced,
    local_vips,
    resolve,
)
from pointsman.shares import ELSEWHERE as AWAY_BIT
from pointsman.values import Entry, to_address, to_text
from pointsman.values import Policy as Dealing

PROXY_NAME = "service.kubernetes.io/service-proxy-name"
FLAGS = abi.constants()
GUARDED, THIS_NODE = FLAGS["SERVICE_GUARDED"], FLAGS["SERVICE_THIS_NODE"]
AT_NODES = FLAGS["SERVICE_NODE_PORT"]
DUAL = ("10.96.0.1", "fd00:96::1")


def a_service(
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    ingress: tuple[LoadBalancerIngress, ...] = (),
    **spec: object,
) -> Service:
    if "cluster_ips" in spec:
        spec["cluster_ip"] = spec["cluster_ips"][0]  # type: ignore[index]
    defaults = {"cluster_ip": "10.96.0.1", "ports": (ServicePort(port=80, node_port=30080),)}
    return Service(
        metadata=ObjectMeta(name="web", labels=labels or {}, annotations=annotations or {}),
        spec=ServiceSpec(**{**defaults, **spec}),  # type: ignore[arg-type]
        status=ServiceStatus(load_balancer=LoadBalancerStatus(ingress=ingress)),
    )


def a_slice(*endpoints: Endpoint, family: str = "IPv4", **labels: str) -> EndpointSlice:
    return EndpointSlice(
        metadata=ObjectMeta(name="web-1", labels=labels),
        address_type=family,
        endpoints=endpoints,
        ports=(EndpointPort(name="", port=8080),),
    )


HERE = Endpoint(addresses=("10.244.0.1",), node_name="a")
THERE = Endpoint(addresses=("10.244.1.1",), node_name="b")
HERE_IS_A = Context(node_name="a")
NOT_READY = EndpointConditions(ready=False)


def of(service: Service, *slices: EndpointSlice, context: Context = HERE_IS_A) -> dict[str, Entry]:
    entries, _ = resolve(service, slices, context)
    assert len({entry.frontend for entry in entries}) == len(entries), "a frontend comes twice"
    return {str(entry.frontend): entry for entry in entries}


def said(service: Service, context: Context = HERE_IS_A, *slices: EndpointSlice) -> list[str]:
    problems = resolve(service, slices, context)[1]
    assert all(p.severity == "warning" and p.object == "Service default/web" for p in problems)
    return [problem.field for problem in problems]


@pytest.mark.parametrize(
    ("service", "proxy_name", "balanced"),
    [
        pytest.param(a_service(), "", True, id="a-cluster-ip"),
        pytest.param(a_service(cluster_ip="None"), "", False, id="headless"),
        pytest.param(a_service(cluster_ip=""), "", False, id="no-cluster-ip-yet"),
        pytest.param(a_service(type="ExternalName"), "", False, id="external-name-with-a-leftover"),
        pytest.param(a_service({PROXY_NAME: "x"}), "", False, id="another-proxy-s"),
        pytest.param(a_service({PROXY_NAME: ""}), "", False, id="an-empty-label-is-a-label"),
        pytest.param(a_service({PROXY_NAME: "x"}), "x", True, id="ours-by-name"),
        pytest.param(a_service(), "x", False, id="no-label-and-we-have-a-name"),
        pytest.param(
            a_service({"service.kubernetes.io/headless": "false"}), "", False, id="headless-label"
        ),
    ],
)
def test_which_services_are_served(service: Service, proxy_name: str, balanced: bool) -> None:
    assert is_balanced(service, proxy_name) is balanced
    context = Context(Policy(proxy_name=proxy_name))
    assert bool(of(service, context=context)) is balanced


NODE_PORT = {"type": "NodePort"}
LOCAL = {"external_traffic_policy": "Local"}
EXTERNAL = {"external_ips": ("203.0.113.1", "198.51.100.1")}
VIP = LoadBalancerIngress(ip="203.0.113.9")
CLUSTER_IP = {"10.96.0.1:80/TCP": 0, "10.96.0.1:*": 0}
MAPPED = LoadBalancerIngress(ip="203.0.113.9", ip_mode="Proxy")


@pytest.mark.parametrize(
    ("service", "context", "expected"),
    [
        pytest.param(a_service(), Context(), CLUSTER_IP, id="cluster-ip-and-its-undefined-ports"),
        pytest.param(
            a_service(**NODE_PORT),
            Context(),
            {**CLUSTER_IP, "0.0.0.0:30080/TCP": AT_NODES | GUARDED},
            id="node-port",
        ),
        pytest.param(
            a_service(**NODE_PORT, **LOCAL),
            Context(),
            {**CLUSTER_IP, "0.0.0.0:30080/TCP": AT_NODES | GUARDED | THIS_NODE},
            id="external-traffic-policy-local",
        ),
        pytest.param(
            a_service(**NODE_PORT),
            Context(Policy(bind_guard=False)),
            {**CLUSTER_IP, "0.0.0.0:30080/TCP": AT_NODES},
            id="without-a-bind-guard",
        ),
        pytest.param(
            a_service(**NODE_PORT, cluster_ips=DUAL),
            Context(),
            {
                **CLUSTER_IP,
                "[fd00:96::1]:80/TCP": 0,
                "[fd00:96::1]:*": 0,
                "0.0.0.0:30080/TCP": AT_NODES | GUARDED,
                "[::]:30080/TCP": AT_NODES | GUARDED,
            },
            id="node-port-of-each-family",
        ),
        pytest.param(
            a_service(**NODE_PORT),
            Context(local_addresses=frozenset([to_address("10.96.0.1")])),
            {"0.0.0.0:30080/TCP": AT_NODES | GUARDED},
            id="a-local-cluster-ip-keeps-its-node-port",
        ),
        pytest.param(
            a_service(**EXTERNAL),
            Context(),
            {**CLUSTER_IP, "203.0.113.1:80/TCP": 0, "198.51.100.1:80/TCP": 0},
            id="external-ips-without-a-wildcard",
        ),
        pytest.param(
            a_service(external_ips=("203.0.113.1", "203.0.113.1", "10.96.0.1")),
            Context(),
            {**CLUSTER_IP, "203.0.113.1:80/TCP": 0},
            id="an-address-given-twice",
        ),
        pytest.param(
            a_service(**EXTERNAL),
            Context(
                Policy(external_ips="local"),
                local_addresses=frozenset([to_address("198.51.100.1")]),
            ),
            {**CLUSTER_IP, "198.51.100.1:80/TCP": 0},
            id="external-ips-of-this-node-s-devices",
        ),
        pytest.param(
            a_service(**EXTERNAL),
            Context(Policy(external_ips="local"), own_addresses=(to_address("203.0.113.1"),)),
            {**CLUSTER_IP, "203.0.113.1:80/TCP": 0},
            id="external-ips-of-this-node-s-object",
        ),
        pytest.param(
            a_service(**EXTERNAL),
            Context(Policy(external_ips="none")),
            CLUSTER_IP,
            id="no-external-ips",
        ),
        pytest.param(
            a_service(type="LoadBalancer", ingress=(VIP,)),
            Context(Policy(external_ips="none")),
            {**CLUSTER_IP, "0.0.0.0:30080/TCP": AT_NODES | GUARDED, "203.0.113.9:80/TCP": GUARDED},
            id="a-load-balancer-s-address",
        ),
        pytest.param(
            a_service(type="LoadBalancer", ingress=(VIP,), external_ips=("203.0.113.9",)),
            Context(),
            {**CLUSTER_IP, "0.0.0.0:30080/TCP": AT_NODES | GUARDED, "203.0.113.9:80/TCP": GUARDED},
            id="which-is-an-external-ip-too",
        ),
        pytest.param(
            a_service(
                type="LoadBalancer",
                ports=(ServicePort(port=80),),
                ingress=(MAPPED, LoadBalancerIngress(hostname="lb.example.org")),
            ),
            Context(),
            CLUSTER_IP,
            id="ip-mode-proxy-and-host-names-are-not-translated",
        ),
        pytest.param(
            a_service(ingress=(VIP,)), Context(), CLUSTER_IP, id="a-leftover-status-does-not-count"
        ),
    ],
)
def test_frontends_and_their_flags(
    service: Service, context: Context, expected: dict[str, int]
) -> None:
    assert {name: entry.flags for name, entry in of(service, context=context).items()} == expected


@pytest.mark.parametrize(
    ("endpoints", "cluster_ip", "others"),
    [
        pytest.param((HERE, THERE), ("10.244.0.1",), ("10.244.0.1", "10.244.1.1"), id="both"),
        pytest.param((THERE,), EMPTY_UNREACHABLE, ("10.244.1.1",), id="only-elsewhere"),
        pytest.param((), EMPTY_REFUSE, EMPTY_REFUSE, id="none"),
        pytest.param(
            (Endpoint(addresses=("10.244.0.1",), node_name="a", conditions=NOT_READY),),
            EMPTY_REFUSE,
            EMPTY_REFUSE,
            id="none-that-is-ready",
        ),
    ],
)
def test_internal_traffic_policy_local_is_for_the_cluster_ip_alone(
    endpoints: tuple[Endpoint, ...],
    cluster_ip: tuple[str, ...] | int,
    others: tuple[str, ...] | int,
) -> None:
    service = a_service(
        type="NodePort", internal_traffic_policy="Local", external_ips=("203.0.113.1",)
    )
    found = of(service, a_slice(*endpoints))
    assert answer(found["10.96.0.1:80/TCP"]) == cluster_ip
    assert answer(found["0.0.0.0:30080/TCP"]) == others
    assert answer(found["203.0.113.1:80/TCP"]) == others
    assert answer(found["10.96.0.1:*"]) == EMPTY_REFUSE


def answer(entry: Entry) -> tuple[str, ...] | int:
    return tuple(to_text(address) for address, _ in entry.endpoints) or entry.empty


def test_each_family_has_its_own_endpoints() -> None:
    service = a_service(type="NodePort", cluster_ips=DUAL)
    found = of(service, a_slice(HERE))
    assert answer(found["0.0.0.0:30080/TCP"]) == answer(found["10.96.0.1:80/TCP"]) != EMPTY_REFUSE
    assert answer(found["[::]:30080/TCP"]) == answer(found["[fd00:96::1]:80/TCP"]) == EMPTY_REFUSE


def test_a_slice_with_the_headless_label_is_not_for_proxies() -> None:
    label = {"service.kubernetes.io/headless": ""}
    assert answer(of(a_service(), a_slice(HERE, **label))["10.96.0.1:80/TCP"]) == EMPTY_REFUSE


@pytest.mark.parametrize(
    ("spec", "seconds"),
    [
        pytest.param({}, 0, id="none"),
        pytest.param({"session_affinity": "ClientIP"}, 10800, id="three-hours-unless-said"),
        pytest.param(
            {
                "session_affinity": "ClientIP",
                "session_affinity_config": SessionAffinityConfig(
                    client_ip=ClientIPConfig(timeout_seconds=60)
                ),
            },
            60,
            id="as-said",
        ),
        *(
            pytest.param(
                {
                    "session_affinity": "ClientIP",
                    "session_affinity_config": SessionAffinityConfig(
                        client_ip=ClientIPConfig(timeout_seconds=said)
                    ),
                },
                seconds,
                id=f"an-api-server-may-still-have-{said}",
            )
            for said, seconds in ((0, 1), (-5, 1), (1 << 40, 86400))
        ),
    ],
)
def test_affinity_is_for_every_frontend_but_wildcards(
    spec: dict[str, object], seconds: int
) -> None:
    service = a_service(type="NodePort", external_ips=("203.0.113.1",), **spec)
    assert affinity_seconds(service) == seconds
    for name, entry in of(service).items():
        assert entry.affinity == (0 if name.endswith("*") else seconds), name


AUTO = {"service.kubernetes.io/topology-mode": "Auto"}
MADE = {"endpointslice.kubernetes.io/managed-by": "pointsman"}
BOTH = (ServicePort(name="a", port=80), ServicePort(name="b", port=81, protocol="SCTP"))


@pytest.mark.parametrize(
    ("service", "context", "fields"),
    [
        pytest.param(a_service(ports=BOTH), Context(), ["spec.ports[1].protocol"], id="sctp"),
        pytest.param(
            a_service(type="NodePort", ports=(ServicePort(port=80),)),
            Context(),
            ["spec.ports[0].nodePort"],
            id="no-node-port",
        ),
        pytest.param(
            a_service(type="LoadBalancer", ports=(ServicePort(port=80),)),
            Context(),
            [],
            id="a-load-balancer-needs-no-node-port",
        ),
        pytest.param(
            a_service(external_ips=("203.0.113.1", "fd00::1")),
            Context(),
            ["spec.externalIPs[1]"],
            id="external-ip-of-another-family",
        ),
        pytest.param(
            a_service(type="LoadBalancer", ingress=(VIP, LoadBalancerIngress(ip="0.0.0.0"))),
            Context(),
            ["status.loadBalancer.ingress[1].ip"],
            id="an-address-that-no-load-balancer-has",
        ),
        pytest.param(
            a_service(**EXTERNAL),
            Context(Policy(external_ips="none")),
            ["spec.externalIPs"],
            id="external-ips-none",
        ),
        pytest.param(
            a_service(**EXTERNAL),
            Context(Policy(external_ips="local")),
            [],
            id="external-ips-local-is-as-meant",
        ),
        pytest.param(
            a_service(),
            Context(local_addresses=frozenset([to_address("10.96.0.1")])),
            [""],
            id="a-local-cluster-ip",
        ),
        pytest.param(
            a_service(type="LoadBalancer", ingress=(VIP,), **LOCAL, **EXTERNAL),
            Context(),
            [],
            id="all-in-order",
        ),
    ],
)
def test_what_can_not_be_served_is_said(
    service: Service, context: Context, fields: list[str]
) -> None:
    assert said(service, context) == fields


def test_hints_for_auto_are_missed_where_the_built_in_controller_makes_the_slices() -> None:
    service = a_service(annotations=AUTO)
    assert said(service, Context(), a_slice(HERE, **MADE)) == ["metadata.annotations"]
    assert said(service, Context(), a_slice(HERE)) == []


def test_a_port_that_is_not_served_takes_nothing_else_along() -> None:
    assert set(of(a_service(ports=BOTH))) == set(CLUSTER_IP)


@pytest.mark.parametrize(
    ("service", "found"),
    [
        pytest.param(a_service(), False, id="another-address"),
        pytest.param(a_service(cluster_ip="198.51.100.1"), True, id="cluster-ip"),
        pytest.param(a_service(**EXTERNAL), True, id="external-ip"),
        pytest.param(a_service(cluster_ip="None", **EXTERNAL), False, id="headless"),
        pytest.param(a_service(external_ips=("no address",)), False, id="what-is-no-address"),
    ],
)
def test_local_vips(service: Service, found: bool) -> None:
    assert local_vips([service], {to_address("198.51.100.1")}) == ([service] if found else [])


def test_equal_input_gives_equal_entries() -> None:
    service = a_service(type="NodePort", cluster_ips=DUAL, **EXTERNAL)
    again = resolve(service, (a_slice(THERE, HERE),), HERE_IS_A)
    assert resolve(service, (a_slice(HERE, THERE),), HERE_IS_A) == again


WEIGHTED, BY_POLICY, AVOID, BY_ZONE = (
    FLAGS[f"CHOICE_{name}"] for name in ("WEIGHTED", "POLICY", "AVOID", "ZONE")
)
MAGLEV = FLAGS["ALGORITHM_MAGLEV"]


def test_every_frontend_of_a_service_chooses_as_it_says() -> None:
    words = {ALGORITHM: "maglev", MAX_CONNECTIONS: "7", EJECTION: "on"}
    service = a_service(annotations=words, ingress=(VIP,), **EXTERNAL, type="LoadBalancer")
    entries = of(service, a_slice(HERE, THERE))
    assert len(entries) == 6
    policies = {entry.policy for entry in entries.values()}
    assert len(policies) == 1
    policy = policies.pop()
    assert policy and (policy.watch, policy.max_connections, policy.room) == (True, 7, 0)
    chosen = MAGLEV | BY_POLICY | AVOID
    assert {name: entry.algorithm for name, entry in entries.items()} == {
        name: 0 if entry.frontend.wildcard else chosen for name, entry in entries.items()
    }
    assert not any(entry.weights for entry in entries.values())


def test_the_operator_says_what_services_get_that_say_nothing() -> None:
    context = Context(Policy(algorithm="maglev"))
    entry = of(a_service(), a_slice(HERE), context=context)["10.96.0.1:80/TCP"]
    assert (entry.algorithm, entry.policy) == (MAGLEV, None)
    service = a_service(annotations={ALGORITHM: "random"})
    assert of(service, a_slice(HERE), context=context)["10.96.0.1:80/TCP"].algorithm == 0


NEAR = tuple(Endpoint(addresses=(f"10.244.0.{i}",), node_name="a", zone="east") for i in (1, 2))
FAR = tuple(Endpoint(addresses=(f"10.244.1.{i}",), node_name="b", zone="west") for i in (1, 2))

AWAY = (100 | AWAY_BIT, 100 | AWAY_BIT)


def weighing(weight: str, *endpoints: Endpoint) -> EndpointSlice:
    piece = a_slice(*endpoints)
    meta = ObjectMeta(name=f"web-{weight}", annotations={WEIGHT: weight})
    return msgspec.structs.replace(piece, metadata=meta)


@pytest.mark.parametrize(
    ("annotations", "slices", "zone", "weights", "choice"),
    [
        pytest.param({}, (a_slice(*NEAR, *FAR),), "east", (), 0, id="nothing-said"),
        pytest.param(
            {}, (a_slice(*NEAR), weighing("1", *FAR)), "east", (100, 100, 1, 1), WEIGHTED,
            id="a-canary",
        ),
        pytest.param(
            {}, (weighing("7", *NEAR), weighing("7", *FAR)), "east", (), 0, id="all-of-one-weight"
        ),
        pytest.param(
            {}, (a_slice(*NEAR), weighing("100", *FAR)), "east", (), 0, id="the-usual-one-said"
        ),
        pytest.param(
            {}, (weighing("0", *NEAR), a_slice(*FAR)), "east", (0, 0, 100, 100), WEIGHTED,
            id="none-for-some",
        ),
        pytest.param(
            {}, (weighing("0", *NEAR, *FAR),), "east", (), 0, id="none-for-all-is-the-same-for-all"
        ),
        pytest.param(
            {}, (weighing("5", *NEAR), weighing("50", NEAR[0])), "east", (50, 5), WEIGHTED,
            id="in-two-slices-the-heavier-counts",
        ),
        pytest.param(
            {ZONE_CONNECTIONS: "9"}, (a_slice(*NEAR, *FAR),), "east", (100, 100, *AWAY),
            WEIGHTED | BY_ZONE, id="this-zone-first",
        ),
        pytest.param(
            {ZONE_CONNECTIONS: "9"}, (a_slice(*NEAR, *FAR),), "west", (*AWAY, 100, 100),
            WEIGHTED | BY_ZONE, id="seen-from-the-other",
        ),
        pytest.param(
            {ZONE_CONNECTIONS: "9"}, (a_slice(*NEAR, *FAR),), "north", (), 0, id="nobody-here"
        ),
        pytest.param({ZONE_CONNECTIONS: "9"}, (a_slice(*NEAR, *FAR),), "", (), 0, id="no-zone"),
        pytest.param({ZONE_CONNECTIONS: "9"}, (a_slice(*NEAR),), "east", (), 0, id="nobody-there"),
        pytest.param(
            {ZONE_CONNECTIONS: "0"}, (a_slice(*NEAR, *FAR),), "east", (), 0, id="0-is-never"
        ),
        pytest.param(
            {ZONE_CONNECTIONS: "9"}, (a_slice(NEAR[0], *FAR), weighing("3", NEAR[1])), "east",
            (100, 3, *AWAY), WEIGHTED | BY_ZONE, id="weights-within-the-zone",
        ),
        pytest.param(
            {ZONE_CONNECTIONS: "9"}, (weighing("0", *NEAR), a_slice(*FAR)), "east",
            (0, 0, 100, 100), WEIGHTED, id="a-zone-without-weight-takes-none",
        ),
        pytest.param(
            {ZONE_CONNECTIONS: "9"}, (a_slice(*NEAR, FAR[0]), weighing("0", FAR[1])), "east",
            (100, 100, AWAY[0], 0), WEIGHTED | BY_ZONE, id="no-weight-is-none-in-any-zone",
        ),
    ],
)  # fmt: skip
def test_weights(
    annotations: dict[str, str], slices: tuple[EndpointSlice, ...], zone: str,
    weights: tuple[int, ...], choice: int,
) -> None:  # fmt: skip
    service = a_service(annotations=annotations, **NODE_PORT)
    entries = of(service, *slices, context=Context(node_name="a", zone=zone))
    for frontend in ("10.96.0.1:80/TCP", "0.0.0.0:30080/TCP"):
        entry = entries[frontend]
        assert (entry.weights, entry.algorithm & ~BY_POLICY) == (weights, choice)
        assert entry.policy == (Dealing(room=9) if "9" in annotations.values() else None)
        assert len(entry.endpoints) == len(weights or entry.endpoints)
    outside = entries["0.0.0.0:30080/TCP"].outside
    assert outside is not None
    # To who is outside no zone is nearer.
    plain = tuple(weight & ~AWAY_BIT for weight in weights)
    assert outside.weights == (plain if len(set(plain)) > 1 else ())


def test_each_set_has_the_weights_of_its_own_endpoints() -> None:
    service = a_service(internal_traffic_policy="Local", **NODE_PORT)
    entries = of(service, a_slice(*NEAR), weighing("1", *FAR))
    assert entries["10.96.0.1:80/TCP"].weights == ()
    assert entries["0.0.0.0:30080/TCP"].weights == (100, 100, 1, 1)


OUTSIDE, LOCALLY, RANGES = (FLAGS[f"PACKETS_{n}"] for n in ("OUTSIDE", "LOCAL", "RANGES"))
ON_THIS, ELSEWHERE = FLAGS["SLOT_HERE"], FLAGS["SLOT_ELSEWHERE"]
EVERYWHERE = (HERE, THERE)


def served_outside(entries: dict[str, Entry]) -> dict[str, tuple[int, int, int]]:
    """Of each frontend that clients outside get: flags, endpoints, what an empty set answers."""
    return {
        name: (entry.outside.flags, len(entry.outside.endpoints), entry.outside.empty)
        for name, entry in entries.items()
        if entry.outside
    }


@pytest.mark.parametrize(
    ("service", "endpoints", "expected"),
    [
        pytest.param(a_service(), EVERYWHERE, {}, id="a-cluster-ip-is-for-those-inside"),
        pytest.param(
            a_service(**NODE_PORT),
            EVERYWHERE,
            {"0.0.0.0:30080/TCP": (OUTSIDE, 2, EMPTY_REFUSE)},
            id="a-node-port",
        ),
        pytest.param(
            a_service(**EXTERNAL, **LOCAL),
            EVERYWHERE,
            {
                "203.0.113.1:80/TCP": (OUTSIDE | LOCALLY, 1, EMPTY_UNREACHABLE),
                "198.51.100.1:80/TCP": (OUTSIDE | LOCALLY, 1, EMPTY_UNREACHABLE),
            },
            id="external-ips-under-the-local-policy",
        ),
        pytest.param(
            a_service(**NODE_PORT, **LOCAL),
            (THERE,),
            {"0.0.0.0:30080/TCP": (OUTSIDE | LOCALLY, 0, EMPTY_UNREACHABLE)},
            id="no-local-endpoint-drops",
        ),
        pytest.param(
            a_service(**NODE_PORT, **LOCAL),
            (),
            {"0.0.0.0:30080/TCP": (OUTSIDE | LOCALLY, 0, EMPTY_REFUSE)},
            id="no-endpoint-at-all-refuses",
        ),
        pytest.param(
            a_service(**NODE_PORT, internal_traffic_policy="Local"),
            EVERYWHERE,
            {"0.0.0.0:30080/TCP": (OUTSIDE, 2, EMPTY_REFUSE)},
            id="the-internal-policy-is-not-for-them",
        ),
        pytest.param(
            a_service(
                type="LoadBalancer",
                ingress=(VIP,),
                load_balancer_source_ranges=("192.0.2.0/24",),
                external_ips=("203.0.113.1",),
            ),
            EVERYWHERE,
            {
                "203.0.113.1:80/TCP": (OUTSIDE, 2, EMPTY_REFUSE),
                "203.0.113.9:80/TCP": (OUTSIDE | RANGES, 2, EMPTY_REFUSE),
                "0.0.0.0:30080/TCP": (OUTSIDE, 2, EMPTY_REFUSE),
            },
            id="ranges-are-for-the-load-balancer-s-address",
        ),
        pytest.param(
            a_service(
                type="LoadBalancer",
                ingress=(VIP,),
                load_balancer_source_ranges=("192.0.2.0/24",),
                external_ips=(VIP.ip,),
                ports=(ServicePort(port=80),),
            ),
            EVERYWHERE,
            {"203.0.113.9:80/TCP": (OUTSIDE | RANGES, 2, EMPTY_REFUSE)},
            id="also-if-it-is-an-external-ip-as-well",
        ),
        pytest.param(
            a_service(type="LoadBalancer", ingress=(MAPPED,), ports=(ServicePort(port=80),)),
            EVERYWHERE,
            {},
            id="not-what-the-load-balancer-itself-answers",
        ),
    ],
)
def test_what_clients_outside_get(
    service: Service, endpoints: tuple[Endpoint, ...], expected: dict[str, tuple[int, int, int]]
) -> None:
    assert served_outside(of(service, a_slice(*endpoints))) == expected


def test_where_endpoints_are_is_asked_only_for_what_clients_outside_get() -> None:
    exposed = of(a_service(**NODE_PORT), a_slice(*EVERYWHERE)).values()
    real = [entry for entry in exposed if not entry.frontend.wildcard]
    assert {entry.places for entry in real} == {(ON_THIS, ELSEWHERE)}
    assert {entry.places for entry in of(a_service(), a_slice(*EVERYWHERE)).values()} == {()}
    # A port that has nothing but the ClusterIP, although the Service is of type NodePort.
    only = of(a_service(**NODE_PORT, ports=(ServicePort(port=80),)), a_slice(*EVERYWHERE)).values()
    assert {entry.places for entry in only} == {()}


def test_endpoints_that_are_nowhere_have_no_places() -> None:
    nowhere = Endpoint(addresses=("192.0.2.9",))
    entries = of(a_service(**NODE_PORT), a_slice(nowhere))
    assert {entry.places for entry in entries.values()} == {()}


def test_a_range_that_cannot_be_read_lets_nobody_in_and_is_said() -> None:
    service = a_service(
        type="LoadBalancer", ingress=(VIP,), load_balancer_source_ranges=("192.0.2.0/33",)
    )
    outside = of(service)["203.0.113.9:80/TCP"].outside
    assert outside and outside.flags & RANGES and not outside.sources
    assert said(service) == ["spec.loadBalancerSourceRanges[0]"]
