"""sessionAffinity ClientIP: a client, which is a network namespace, keeps its endpoint."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pointsman import abi
from pointsman.maps import apply
from pointsman.objects import Ref
from pointsman.values import TCP, UDP, Entry, PortName
from tests.support.kernel import REFUSED, Lab, entry, needs_cpus, until, wildcard
from tests.support.pods import Pod, cookie_of, netns_cookie

pytestmark = pytest.mark.kernel

VIP, OTHER_VIP = ("10.96.0.1", 80), ("10.96.0.2", 80)
WEB = PortName("default", "web", "p")
MANY = [(f"10.244.0.{n}", 9000) for n in range(1, 41)]
HOUR = 3600
_key, _value = abi.layouts()["affinity_key"], abi.layouts()["affinity"]


def sticky(
    backends: list[tuple[str, int]] = MANY,
    vip: tuple[str, int] = VIP,
    protocol: int = UDP,
    affinity: int = HOUR,
) -> Entry:
    return entry(*vip, protocol, backends, WEB, affinity=affinity)


def udp_peer(lab: Lab, vip: tuple[str, int] = VIP) -> str:
    """The endpoint that a new connected UDP socket gets."""
    family = socket.AF_INET6 if ":" in vip[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.connect(vip)
        return lab.peer_of(cookie_of(client))


def entries(lab: Lab) -> dict[tuple[int, int], bytes]:
    """(netns, family) → the value."""
    found = {}
    for key, value in lab.maps.map("affinity").items():
        decoded = _key.decode(key)
        found[decoded["netns"], decoded["family"]] = value
    return found


def age(lab: Lab, seconds: float) -> None:
    """Makes every entry so much older, also than this machine is: the program goes by what lies
    between."""
    affinity = lab.maps.map("affinity")
    at = _value.field("seen").offset
    for key, value in list(affinity.items()):
        seen = (struct.unpack_from("=Q", value, at)[0] - int(seconds * 1e9)) % (1 << 64)
        affinity.update(key, value[:at] + struct.pack("=Q", seen) + value[at + 8 :])


@pytest.fixture(autouse=True)
def no_clients(lab: Lab) -> Iterator[None]:
    yield
    affinity = lab.maps.map("affinity")
    for key, _ in list(affinity.items()):
        affinity.delete(key)


def test_a_client_keeps_its_endpoint(lab: Lab) -> None:
    lab.set("web", sticky())

    assert len({udp_peer(lab) for _ in range(50)}) == 1
    assert list(entries(lab)) == [(netns_cookie(), 4)]


def test_without_affinity_it_does_not(lab: Lab) -> None:
    lab.set("web", sticky(affinity=0))

    assert len({udp_peer(lab) for _ in range(50)}) > 10
    assert not entries(lab)


def test_each_pod_is_a_client_of_its_own(lab: Lab) -> None:
    lab.set("web", sticky())
    pods = [Pod() for _ in range(8)]  # all of one endpoint: once in 40**7
    try:
        seen = [{pod.run(udp_peer, lab) for _ in range(10)} for pod in pods]
        clients = {pod.netns for pod in pods}
    finally:
        for pod in pods:
            pod._thread.shutdown()

    assert all(len(peers) == 1 for peers in seen)
    assert len(set.union(*seen)) > 1, "all pods of the node share one endpoint"
    assert clients <= {netns for netns, _ in entries(lab)}


def test_all_vips_of_a_service_port_share_it_and_tcp_and_udp_do_not(lab: Lab) -> None:
    """As kube-proxy: an endpoint is kept for each service port, whichever of its VIPs was asked."""
    lab.set("web", sticky(), sticky(vip=OTHER_VIP))

    assert udp_peer(lab) == udp_peer(lab, OTHER_VIP)
    assert len(entries(lab)) == 1


def test_both_families_are_apart(lab: Lab) -> None:
    six = [(f"fd00:244::{n}", 9000) for n in range(1, 10)]
    lab.set("web", sticky(), sticky(six, ("fd00::1", 80)))

    assert {udp_peer(lab, ("fd00::1", 80)) for _ in range(10)} <= {f"[{a}]:{p}" for a, p in six}
    assert len({udp_peer(lab, ("fd00::1", 80)) for _ in range(20)}) == 1
    assert len({udp_peer(lab) for _ in range(20)}) == 1
    assert {family for _, family in entries(lab)} == {4, 6}


def test_an_ipv4_mapped_socket_is_the_same_client(lab: Lab) -> None:
    lab.set("web", sticky())

    assert udp_peer(lab) == udp_peer(lab, ("::ffff:10.96.0.1", 80))


def test_unconnected_datagrams_follow_it_too(lab: Lab) -> None:
    servers = []
    for address, port in MANY:
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind((address, port))
        server.setblocking(False)
        servers.append(server)
    try:
        lab.set("web", sticky())
        for _ in range(20):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(b"x", VIP)
        # What is sent arrives by a softirq, which may have been put off.
        reached: list[tuple[str, int]] = []

        def arrived() -> int:
            for server in servers:
                with contextlib.suppress(BlockingIOError):
                    while server.recv(10):
                        reached.append(server.getsockname())
            return len(reached)

        until(lambda: arrived() == 20, "all that was sent")
        host, port = reached[0]
        assert [f"{host}:{port}"] == [udp_peer(lab)] and len(set(reached)) == 1
    finally:
        for server in servers:
            server.close()


def test_it_ends_when_the_time_passed_without_a_new_connection(lab: Lab) -> None:
    lab.set("web", sticky(affinity=HOUR))
    first = udp_peer(lab)
    age(lab, HOUR - 300)  # what a busy machine may need until the next line
    assert udp_peer(lab) == first

    seen = set()
    for _ in range(30):
        age(lab, HOUR + 1)
        seen.add(udp_peer(lab))

    assert len(seen) > 5


def test_each_new_connection_starts_the_time_again(lab: Lab) -> None:
    lab.set("web", sticky(affinity=HOUR))
    first = udp_peer(lab)
    # Without it every other turn chooses again, and may come to the same endpoint by chance.
    for _ in range(20):
        age(lab, 0.6 * HOUR)
        assert udp_peer(lab) == first


def test_a_client_keeps_its_endpoint_while_others_come_and_go(lab: Lab) -> None:
    """One that others come before and after in the set: its place changes."""
    kept, rest = MANY[20], [b for b in MANY if b != MANY[20]]
    lab.set("web", sticky([kept]))
    udp_peer(lab)

    for others in (rest[:5], rest[20:], rest[:1], rest):
        lab.set("web", sticky([kept, *others]))
        assert {udp_peer(lab) for _ in range(5)} == {"{}:{}".format(*kept)}


def test_pitfall_10_affinity_is_checked_against_membership(lab: Lab) -> None:
    """cilium#27096: an entry for an endpoint that left, or may take no new connections, counts for
    nothing."""
    lab.set("web", sticky())
    first = udp_peer(lab)
    host, port = first.split(":")
    lab.set("web", sticky([b for b in MANY if b != (host, int(port))]))
    second = udp_peer(lab)
    assert second != first
    lab.set("web", sticky())
    assert {udp_peer(lab) for _ in range(10)} == {second}, "the old one came back"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 255])
def test_membership_is_found_at_every_place_of_a_set(lab: Lab, size: int) -> None:
    backends = [(f"10.244.{n // 200}.{n % 200 + 1}", 9000 + n % 3) for n in range(size)]
    lab.set("web", sticky(backends))
    affinity = lab.maps.map("affinity")
    udp_peer(lab)
    for address, port in backends:
        lab.set("web", sticky([(address, port)]))
        for key, _ in list(affinity.items()):
            affinity.delete(key)
        kept = udp_peer(lab)
        lab.set("web", sticky(backends))
        assert udp_peer(lab) == kept == f"{address}:{port}"


def test_it_is_switched_on_and_off_while_clients_connect(lab: Lab) -> None:
    lab.set("web", sticky(affinity=0))
    assert len({udp_peer(lab) for _ in range(40)}) > 5
    lab.set("web", sticky())
    assert len({udp_peer(lab) for _ in range(40)}) == 1
    lab.set("web", sticky(affinity=0))
    assert len({udp_peer(lab) for _ in range(40)}) > 5


def test_an_empty_service_refuses_in_spite_of_it(lab: Lab) -> None:
    lab.set("web", sticky())
    udp_peer(lab)
    lab.set("web", sticky([]))

    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        pytest.raises(REFUSED),
    ):
        client.connect(VIP)


def test_tcp_keeps_its_endpoint_by_real_connections(lab: Lab) -> None:
    servers = [socket.create_server((address, 9000)) for address, _ in MANY[:8]]
    try:
        lab.set("web", sticky(MANY[:8], protocol=TCP), wildcard(VIP[0], WEB))
        for _ in range(20):
            socket.create_connection(VIP, timeout=5).close()
        for server in servers:
            server.setblocking(False)
        counts = [0] * len(servers)

        def accepted() -> int:
            for number, server in enumerate(servers):
                with contextlib.suppress(BlockingIOError):
                    while True:
                        server.accept()[0].close()
                        counts[number] += 1
            return sum(counts)

        until(lambda: accepted() == 20, "all connections")
        assert sorted(counts) == [0] * 7 + [20]
    finally:
        for server in servers:
            server.close()


Labs = Callable[..., Lab]
Sources = Callable[..., Path]


@pytest.mark.parametrize("rule", [True, False], ids=["first-one-stays", "last-one-wins"])
def test_two_cpus_agree_on_a_new_client(
    fresh_lab: Labs, changed_source: Sources, rule: bool
) -> None:
    """Both find no entry, both choose: they must come to the same endpoint."""
    needs_cpus()
    fill = "\tif (!affinity.insert(&key, &value))\n\t\treturn slot;"
    hold = "\tfor (int i_ = 0; i_ < 3000; i_++) { __u64 d_ = 1; overflow_netns.lookup(&d_); }\n"
    put = fill if rule else "\taffinity.update(&key, &value);\n\treturn slot;"
    lab = fresh_lab(source=changed_source(("affinity.h", fill, hold + put)))
    lab.set("web", sticky())
    affinity = lab.maps.map("affinity")

    def disagree() -> bool:
        for key, _ in list(affinity.items()):
            affinity.delete(key)
        barrier, peers = threading.Barrier(2), []

        def client() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
                cookie = cookie_of(made)
                barrier.wait()
                made.connect(VIP)
                peers.append(lab.peer_of(cookie))

        threads = [threading.Thread(target=client) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(set(peers)) != 1

    if rule:
        assert not any(disagree() for _ in range(300))
    else:
        until(disagree, "without the rule they agreed, too", 200)


def test_the_successor_of_an_endpoint_that_left_follows_from_the_entry_it_replaces(
    lab: Lab,
) -> None:
    """Two CPUs that read one stale entry at once agree: whoever reads it comes to one endpoint."""
    lab.set("web", sticky())
    host, port = udp_peer(lab).split(":")
    affinity = lab.maps.map("affinity")
    ((key, stale),) = affinity.items()
    lab.set("web", sticky([b for b in MANY if b != (host, int(port))]))

    def read_again() -> str:
        affinity.update(key, stale)
        return udp_peer(lab)

    assert len({read_again() for _ in range(20)}) == 1


def test_a_value_of_another_client_is_not_believed(lab: Lab) -> None:
    """The LRU map uses an element again while another CPU reads it: such a value vouches for
    nobody else."""
    lab.set("web", sticky())
    kept = udp_peer(lab)
    affinity = lab.maps.map("affinity")
    ((key, value),) = affinity.items()
    at = _value.field("check").offset
    affinity.update(key, value[:at] + b"\1\2\3\4" + value[at + 4 :])

    seen = {udp_peer(lab) for _ in range(10)}

    assert len(seen) == 1, kept
    ((_, after),) = affinity.items()
    assert after[at : at + 4] != b"\1\2\3\4"


def test_affinity_survives_a_plan_that_moves_the_set(lab: Lab) -> None:
    lab.set("web", sticky())
    kept = udp_peer(lab)
    grown = [*MANY, *[(f"10.244.1.{n}", 9000) for n in range(1, 60)]]
    plan = lab.planner.update({Ref("Service", "default", "web"): (sticky(grown),)})
    apply(plan, lab.maps)

    assert udp_peer(lab) == kept
    lab.maps.wait_for_readers()
    lab.planner.reclaim(plan.garbage)
