"""Which hostPorts are served, where."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from pointsman import abi
from pointsman.context import Context
from pointsman.hostports import has_host_ports, host_port_entries
from pointsman.objects import (
    Container,
    ContainerPort,
    ObjectMeta,
    Pod,
    PodCondition,
    PodIP,
    PodSpec,
    PodStatus,
)
from pointsman.values import endpoint_text, to_address

FLAGS = abi.constants()
THIS_NODE = FLAGS["SERVICE_THIS_NODE"] | FLAGS["SERVICE_NODE_PORT"]
HOST = FLAGS["SERVICE_HOST_NETNS"]
HERE = Context(node_name="a", local_addresses=frozenset([to_address("198.51.100.1")]))
V4, V6 = "10.244.0.1", "fd00:244::1"


def a_port(host_port: int = 8080, host_ip: str = "", protocol: str = "TCP") -> ContainerPort:
    return ContainerPort(container_port=80, host_port=host_port, host_ip=host_ip, protocol=protocol)


def a_pod(
    *ports: ContainerPort,
    ips: tuple[str, ...] = (V4,),
    node: str = "a",
    phase: str = "Running",
    name: str = "web",
    **spec: object,
) -> Pod:
    containers = {"containers": (Container(ports=ports),)}
    return Pod(
        metadata=ObjectMeta(name=name),
        spec=PodSpec(node_name=node, **{**containers, **spec}),  # type: ignore[arg-type]
        status=PodStatus(
            phase=phase, pod_ip=ips[0] if ips else "", pod_ips=tuple(PodIP(ip=ip) for ip in ips)
        ),
    )


def frontends(pod: Pod, context: Context = HERE) -> dict[str, int]:
    return {str(entry.frontend): entry.flags for entry in host_port_entries(pod, context)[0]}


PLAIN = {"0.0.0.0:8080/TCP": THIS_NODE}
SIDECAR = Container(ports=(a_port(),), restart_policy="Always")


@pytest.mark.parametrize(
    ("pod", "expected"),
    [
        pytest.param(a_pod(a_port()), PLAIN, id="any-address"),
        pytest.param(
            a_pod(a_port(), ips=(V4, V6)),
            {**PLAIN, "[::]:8080/TCP": THIS_NODE},
            id="of-both-families",
        ),
        pytest.param(a_pod(a_port(), ips=(V6,)), {"[::]:8080/TCP": THIS_NODE}, id="ipv6-only"),
        pytest.param(a_pod(a_port(host_ip="0.0.0.0"), ips=(V4, V6)), PLAIN, id="any-ipv4-address"),
        pytest.param(
            a_pod(a_port(host_ip="::"), ips=(V4, V6)),
            {"[::]:8080/TCP": THIS_NODE},
            id="any-ipv6-address",
        ),
        pytest.param(
            a_pod(a_port(host_ip="198.51.100.1")), {"198.51.100.1:8080/TCP": 0}, id="one-address"
        ),
        pytest.param(
            a_pod(a_port(host_ip="127.0.0.1")), {"127.0.0.1:8080/TCP": HOST}, id="loopback"
        ),
        pytest.param(
            a_pod(a_port(host_ip="::1"), ips=(V6,)), {"[::1]:8080/TCP": HOST}, id="ipv6-loopback"
        ),
        pytest.param(
            a_pod(a_port(protocol="UDP"), a_port()),
            {**PLAIN, "0.0.0.0:8080/UDP": THIS_NODE},
            id="tcp-and-udp",
        ),
        pytest.param(a_pod(a_port(0)), {}, id="no-host-port"),
        pytest.param(a_pod(a_port(), node=""), PLAIN, id="a-manifest-need-not-name-the-node"),
        pytest.param(a_pod(a_port(), node="b"), {}, id="another-node-s"),
        pytest.param(a_pod(a_port(), phase="Succeeded"), {}, id="succeeded"),
        pytest.param(a_pod(a_port(), phase="Failed"), {}, id="failed"),
        pytest.param(a_pod(a_port(), ips=()), {}, id="no-address-yet"),
        pytest.param(a_pod(a_port(), host_network=True), {}, id="on-the-host-s-network"),
        pytest.param(a_pod(containers=(), init_containers=(SIDECAR,)), PLAIN, id="a-sidecar"),
        pytest.param(
            a_pod(containers=(), init_containers=(Container(ports=(a_port(),)),)),
            {},
            id="an-init-container-is-gone",
        ),
    ],
)
def test_host_ports(pod: Pod, expected: dict[str, int]) -> None:
    assert frontends(pod) == expected
    assert host_port_entries(pod, HERE)[1] == ()


def test_readiness_is_not_asked_and_a_terminating_pod_keeps_its_port() -> None:
    pod = Pod(
        metadata=ObjectMeta(name="web", deletion_timestamp=datetime.now(UTC)),
        spec=a_pod(a_port()).spec,
        status=PodStatus(pod_ip=V4, conditions=(PodCondition(type="Ready", status="False"),)),
    )
    assert frontends(pod) == PLAIN


@pytest.mark.parametrize(
    ("port", "field"),
    [
        pytest.param(a_port(30000), "hostPort", id="the-first-node-port"),
        pytest.param(a_port(32767), "hostPort", id="the-last-node-port"),
        pytest.param(a_port(70000), "hostPort", id="no-port"),
        pytest.param(a_port(protocol="SCTP"), "protocol", id="sctp"),
        pytest.param(a_port(host_ip="203.0.113.1"), "hostIP", id="an-address-of-another-host"),
        pytest.param(a_port(host_ip="nonsense"), "hostIP", id="no-address"),
        pytest.param(a_port(host_ip="fd00::1"), "hostIP", id="a-family-that-the-pod-lacks"),
    ],
)
def test_what_is_not_served_is_said(port: ContainerPort, field: str) -> None:
    entries, problems = host_port_entries(a_pod(port, a_port(8081)), HERE)
    assert [str(entry.frontend) for entry in entries] == ["0.0.0.0:8081/TCP"]
    assert [(p.object, p.field, p.severity) for p in problems] == [
        ("Pod default/web", f"spec.containers[0].ports[0].{field}", "warning")
    ]


def test_the_endpoint_is_the_pod_and_the_owner_has_its_name() -> None:
    (entry,) = host_port_entries(a_pod(a_port()), HERE)[0]
    assert [endpoint_text(*backend) for backend in entry.endpoints] == ["10.244.0.1:80"]
    assert str(entry.owner) == "default/pod/web:8080-tcp"


def test_long_names_fit_into_the_maps_and_stay_apart() -> None:
    names = {
        entry.owner.service
        for number in (1, 2)
        for entry in host_port_entries(a_pod(a_port(), name="x" * 200 + str(number)), HERE)[0]
    }
    assert len(names) == 2
    assert all(name.startswith("pod/x") and len(name) == 63 for name in names)


def test_has_host_ports() -> None:
    assert has_host_ports(a_pod(a_port()))
    assert not has_host_ports(a_pod(a_port(0)))


def test_clients_outside_get_a_host_port_as_well_and_the_pod_sees_who_they_are() -> None:
    flags = FLAGS["PACKETS_OUTSIDE"] | FLAGS["PACKETS_LOCAL"]
    (entry, *_), _ = host_port_entries(a_pod(a_port()), HERE)
    assert entry.outside and entry.outside.flags == flags
    assert entry.outside.endpoints == entry.endpoints
    assert entry.outside.places == entry.places == (FLAGS["SLOT_HERE"],)


def test_a_host_port_at_a_loopback_address_is_for_the_host_itself() -> None:
    (entry,), _ = host_port_entries(a_pod(a_port(host_ip="127.0.0.1")), HERE)
    assert entry.outside is None
