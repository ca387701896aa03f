"""Weights, tables and policies from an entry to what connect() does."""

from __future__ import annotations

import errno
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pointsman import abi
from pointsman.pins import Pins
from pointsman.values import Frontend, Policy, PortName, to_address
from tests.support.kernel import REFUSED, SMALL, TCP, Lab, entry, tcp_server

pytestmark = pytest.mark.kernel

VIP = ("10.96.0.1", 80)
OWNER = PortName("default", "web", "p")
_ABI = abi.constants()
ALGORITHMS = {
    name.removeprefix("ALGORITHM_"): number
    for name, number in _ABI.items()
    if name.startswith("ALGORITHM_") and name != "ALGORITHM_MASK"
}


@contextmanager
def servers(count: int) -> Iterator[list[int]]:
    """Their ports, in order."""
    with ExitStack() as stack:
        yield sorted(stack.enter_context(tcp_server())[1] for _ in range(count))


def serve(lab: Lab, ports: list[int], **more: object) -> None:
    lab.set("web", entry(*VIP, TCP, [("127.0.0.1", port) for port in ports], OWNER, **more))


def peers(count: int, lab: Lab) -> Counter[int]:
    """Which ports so many connections reach."""
    found: Counter[int] = Counter()
    for _ in range(count):
        with socket.create_connection(VIP) as client:
            cookie = int.from_bytes(client.getsockopt(socket.SOL_SOCKET, 57, 8), "little")
            found[int(lab.peer_of(cookie).rpartition(":")[2])] += 1
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_endpoint_of_weight_zero_gets_nothing(lab: Lab, algorithm: str) -> None:
    with servers(3) as ports:
        serve(lab, ports, algorithm=ALGORITHMS[algorithm], weights=(0, 100, 100))
        found = peers(60, lab)
        assert found.keys() <= set(ports[1:])


@pytest.mark.parametrize("algorithm", ["RANDOM", "ROUND_ROBIN"])
def test_connections_come_by_weight(lab: Lab, algorithm: str) -> None:
    with servers(2) as ports:
        serve(lab, ports, algorithm=ALGORITHMS[algorithm], weights=(10, 90))
        # By chance alone it is another number once in 10**8.
        assert 4 <= peers(300, lab)[ports[0]] <= 62
        serve(lab, ports, algorithm=ALGORITHMS[algorithm], weights=(90, 10))
        assert 4 <= peers(300, lab)[ports[1]] <= 62


def test_by_a_table_a_client_keeps_its_endpoint_while_that_is_there(lab: Lab) -> None:
    with servers(4) as ports:
        serve(lab, ports, algorithm=ALGORITHMS["MAGLEV"])
        (kept,) = peers(20, lab)
        gone = next(port for port in ports if port != kept)
        serve(lab, [port for port in ports if port != gone], algorithm=ALGORITHMS["MAGLEV"])
        found = peers(20, lab)
        assert len(found) == 1
        serve(lab, ports, algorithm=ALGORITHMS["MAGLEV"])
        assert set(peers(20, lab)) == {kept}


def test_weight_zero_is_none_also_without_a_table(lab: Lab) -> None:
    """As where the map of tables is full."""
    with servers(2) as ports:
        for weights in ((0, 100), (100, 0)):
            serve(lab, ports, algorithm=ALGORITHMS["MAGLEV"], weights=weights)
            service = lab.maps.find(Frontend(to_address(VIP[0]), VIP[1], TCP))
            assert service is not None
            services, key = lab.maps.map("services"), struct.pack("=I", service)
            element = services.lookup(key)
            assert element is not None
            at = abi.layouts()["service"].field("inside").offset
            services.update(key, element[:at] + bytes(8) + element[at + 8 :])
            assert set(peers(5, lab)) == {ports[weights.index(100)]}


def test_no_endpoint_gets_more_connections_than_its_service_allows(lab: Lab) -> None:
    with servers(2) as ports, ExitStack() as stack:
        serve(lab, ports, policy=Policy(max_connections=2))
        for _ in range(4):
            stack.enter_context(socket.create_connection(VIP))
        assert [lab.open("127.0.0.1", port) for port in ports] == [2, 2]
        with pytest.raises(REFUSED) as refused:
            socket.create_connection(VIP)
        assert refused.value.errno in (errno.ECONNREFUSED, errno.EPERM)
        assert lab.maps.counters()["all_full"] >= 1
        serve(lab, ports, policy=Policy(max_connections=3))
        stack.enter_context(socket.create_connection(VIP))
        serve(lab, ports)
        for _ in range(4):
            stack.enter_context(socket.create_connection(VIP))


def test_a_new_agent_finds_weights_and_policies_as_they_are(lab: Lab) -> None:
    with servers(3) as ports:
        policy = Policy(True, 9, 0, 5, 50, 20, 10**10, 3 * 10**11, 3 * 10**9, most_percent=50)
        serve(lab, ports, weights=(1, 2, 3), algorithm=ALGORITHMS["MAGLEV"], policy=policy)
        before = lab.maps.snapshot()
        assert list(before.weights.values()) == [(1, 2, 3)]
        (element,) = before.policies.values()
        assert (element.policy.streak, element.most) == (5, 1)
        found = lab.start()
        assert not found.rebuilt and lab.maps.snapshot() == before


def test_an_ejection_is_counted_for_the_service_port_and_no_longer_when_it_goes(lab: Lab) -> None:
    with socket.socket() as dead:
        # Nobody listens there, and no server that comes next may get the port.
        dead.bind(("127.0.0.1", 0))
        port = dead.getsockname()[1]
        with servers(2) as ports:
            policy = Policy(
                True, streak=1, shortest=10**11, longest=10**11, trial=10**9, most_percent=50
            )
            members = sorted([port, *ports])
            serve(lab, members, policy=policy, algorithm=_ABI["CHOICE_AVOID"])
            failed = 0
            for _ in range(60):
                try:
                    socket.create_connection(VIP).close()
                except ConnectionRefusedError:
                    failed += 1
            assert failed == 1
            (owner,) = lab.maps.policies()
            ident = lab.endpoint_id("127.0.0.1", port)
            assert lab.maps.ejected(owner) == 1
            assert lab.maps.outcomes(ident).until and lab.maps.outcomes(ident).owner == owner
            serve(lab, ports, policy=policy, algorithm=_ABI["CHOICE_AVOID"])
            assert lab.maps.ejected(owner) == 0


def test_load_and_policies_are_made_anew_together(
    fresh_lab: Callable[..., Lab], changed_source: Callable[..., Path]
) -> None:
    """Else a new `policies` would count down what it never counted up."""
    lab = fresh_lab()
    source = changed_source(("abi.h", "\t__u32 most; /*", "\t__u64 spare_;\n\t__u32 most; /*"))
    loaded = Pins(lab.root, SMALL, source).load()
    assert {"load", "policies", "slots", "shares"} <= set(loaded.rebuilt)
