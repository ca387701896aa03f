"""Which endpoints sockets and flows are judged by."""

from __future__ import annotations

import msgspec
import pytest
import yaml

from pointsman.context import Context
from pointsman.events import Listed
from pointsman.membership import Membership
from pointsman.objects import KINDS, Object, Ref
from pointsman.tracker import Tracker
from pointsman.values import ANY_IPV4, UDP, Address, Backend, Frontend, PortName, to_address

OWNER = (Ref("Service", "default", "dns"), PortName("default", "dns", "dns"))
VIP, NODE, ELSEWHERE = "10.96.0.10", "192.0.2.1", "203.0.113.9"


def at(address: str, port: int) -> Backend:
    return to_address(address), port


def decode(text: str) -> Object:
    document = yaml.safe_load(text)
    return msgspec.convert(document, KINDS[document["kind"]])


def slice_(port_name: str, **conditions: bool) -> str:
    text = ", ".join(f"{name}: {str(value).lower()}" for name, value in conditions.items())
    return f"""
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: dns-1, labels: {{kubernetes.io/service-name: dns}}}}
addressType: IPv4
ports: [{{name: {port_name}, port: 5353, protocol: UDP}}]
endpoints: [{{addresses: [10.244.0.1], conditions: {{{text}}}}}]
"""


DNS = f"""
apiVersion: v1
kind: Service
metadata: {{name: dns}}
spec:
  type: NodePort
  clusterIP: {VIP}
  clusterIPs: [{VIP}]
  ports: [{{name: dns, port: 53, protocol: UDP, nodePort: 30053}}]
"""


def members(*manifests: str, node: Address | None = None) -> Membership:
    objects: list[Object] = [decode(text) for text in manifests]
    tracker = Tracker()
    tracker.fold(Listed(tuple(objects)))
    frontends = {
        Frontend(to_address(VIP), 53, UDP): OWNER,
        Frontend(ANY_IPV4, 30053, UDP): OWNER,
    }
    context = Context(local_addresses=frozenset({node} if node else ()))
    return Membership(tracker, context, frontends.get)


def frontend(address: str, port: int) -> Frontend:
    return Frontend(to_address(address), port, UDP)


ONE = frozenset({at("10.244.0.1", 5353)})


@pytest.mark.parametrize(
    ("piece", "present", "serving"),
    [
        pytest.param(slice_("dns"), ONE, ONE, id="ready"),
        pytest.param(
            slice_("dns", ready=False, serving=True, terminating=True), ONE, ONE, id="draining"
        ),
        pytest.param(
            slice_("dns", ready=False, serving=False),
            ONE,
            frozenset[Backend](),
            id="unready",
        ),
        pytest.param(slice_("renamed"), ONE, frozenset[Backend](), id="renamed"),
    ],
)
def test_members(piece: str, present: frozenset[Backend], serving: frozenset[Backend]) -> None:
    found = members(DNS, piece)
    assert found.present(frontend(VIP, 53)) == present
    assert found.serving(frontend(VIP, 53)) == serving


def test_what_is_nobodys_has_no_members() -> None:
    found = members(DNS, slice_("dns"))
    assert found.present(frontend(ELSEWHERE, 53)) is None
    assert found.serving(frontend(ELSEWHERE, 53)) is None


def test_a_flow_is_a_node_ports_only_at_a_nodes_address() -> None:
    """203.0.113.9:30053 may be anybody's: a game, a call."""
    found = members(DNS, slice_("dns"), node=to_address(NODE))
    assert found.serving(frontend(NODE, 30053)) == ONE
    assert found.serving(frontend("127.0.0.1", 30053)) == ONE
    assert found.serving(frontend(ELSEWHERE, 30053)) is None


def test_a_record_is_a_node_ports_also_where_the_address_left_the_node() -> None:
    """It was translated: the record proves it."""
    found = members(DNS, slice_("dns"))
    assert found.present(frontend(ELSEWHERE, 30053)) == ONE


def test_what_exists() -> None:
    found = members(DNS, slice_("dns"))
    assert found.exists(to_address("10.244.0.1"))
    assert not found.exists(to_address("10.244.0.2"))
