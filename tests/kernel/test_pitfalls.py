"""The most reported pitfalls of balancing at the socket, each as a test that bears its number.

Numbers 1 and 3 are in test_stale_sockets.py, 8 and 12 in test_node_ports.py, 10 in
test_affinity.py.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pointsman import errors
from pointsman.health import kernel_sockets_note
from pointsman.hooks import HOOKS
from pointsman.pins import Sizes
from pointsman.values import PortName
from pointsman.verify import link_differences
from tests.support.agents import AgentProcess, service, slice_of
from tests.support.kernel import (
    REFUSED,
    SMALL,
    TCP,
    UDP,
    Cgroup,
    Lab,
    entry,
    needs_linux,
    run,
    tcp_server,
    udp_server,
    until,
    wildcard,
)
from tests.support.pods import Pod

pytestmark = pytest.mark.kernel

VIP, OTHER_VIP = "10.96.0.1", "10.96.0.2"
FAMILIES = [
    pytest.param(socket.AF_INET, VIP, "127.0.0.1", VIP, id="IPv4"),
    pytest.param(socket.AF_INET6, "fd00:96::1", "::1", "fd00:96::1", id="IPv6"),
    pytest.param(socket.AF_INET6, VIP, "127.0.0.1", f"::ffff:{VIP}", id="IPv4-mapped"),
]
Address = tuple[str, int]
FEW = replace(SMALL, buckets=16, overflow=16)


def datagram_socket(family: int = socket.AF_INET) -> socket.socket:
    client = socket.socket(family, socket.SOCK_DGRAM)
    client.settimeout(60)
    return client


def disconnect(client: socket.socket) -> None:
    assert ctypes.CDLL(None).connect(client.fileno(), bytes(16), 16) == 0


def answer(server: socket.socket) -> None:
    """Sends one question back to whoever asked it."""
    data, source = server.recvfrom(64)
    server.sendto(data, source)


def source_of(client: socket.socket) -> Address:
    """The address that the next datagram seems to come from."""
    host, port = client.recvfrom(64)[1][:2]
    return str(host), int(port)


# -- 2: records of sockets run out, or stay for ever ---------------------------------------------


@pytest.mark.parametrize(("family", "vip", "server_address", "dialled"), FAMILIES)
def test_pitfall_2_a_record_goes_with_its_connection(
    lab: Lab, family: int, vip: str, server_address: str, dialled: str
) -> None:
    """cilium#38649: whatever ends a connection frees what was kept of it."""
    direct_address = dialled.replace(vip, server_address)
    with (
        udp_server(server_address) as (_, port),
        tcp_server(server_address) as (server, tcp_port),
    ):
        lab.serve(vip, 53, UDP, (server_address, port))
        owner = PortName("default", "tcp", "p")
        lab.set("tcp", entry(vip, 80, TCP, [(server_address, tcp_port)], owner))
        for _ in range(3):
            with datagram_socket(family) as client, socket.socket(family) as stream:
                client.connect((dialled, 53))
                stream.connect((dialled, 80))
                server.accept()[0].close()
                assert lab.records() == 2
            assert lab.records() == 0, "closed"
        with datagram_socket(family) as client:
            for _ in range(3):
                client.connect((dialled, 53))
                assert lab.records() == 1, "one socket, one record"
                client.connect((direct_address, port))
                assert lab.records() == 0, "connected past the Service"


def test_pitfall_2_disconnecting_leaks_nothing(lab: Lab) -> None:
    """connect(AF_UNSPEC) passes no hook: the record waits for the next connect or the close, and
    nobody is shown it meanwhile."""
    with udp_server() as (server, port), datagram_socket() as client:
        lab.serve(VIP, 53, UDP, ("127.0.0.1", port))
        for _ in range(5):
            client.connect((VIP, 53))
            disconnect(client)
            assert lab.records() == 1
            assert lab.open("127.0.0.1", port) == 1
        with pytest.raises(OSError) as caught:
            client.getpeername()
        assert caught.value.errno == errno.ENOTCONN
        client.connect(("127.0.0.1", port))
        assert (lab.records(), client.getpeername()) == (0, ("127.0.0.1", port))
        assert lab.open("127.0.0.1", port) == 0
        client.send(b"x")
        answer(server)
        assert source_of(client) == ("127.0.0.1", port)
        client.connect((VIP, 53))
        disconnect(client)
    assert lab.records() == 0


def test_pitfall_2_a_full_table_shows_no_socket_the_peer_of_another(
    fresh_lab: Callable[..., Lab],
) -> None:
    """What has no room is not evicted from somebody else: such a socket sees its endpoint as it
    is, and is counted; all others see their VIP. Unconnected sockets keep their own choices."""
    lab = fresh_lab(sizes=FEW)
    with ExitStack() as stack:
        one, one_port = stack.enter_context(udp_server())
        two, two_port = stack.enter_context(udp_server())
        lab.serve(VIP, 53, UDP, ("127.0.0.1", one_port), name="one")
        lab.serve(OTHER_VIP, 53, UDP, ("127.0.0.1", two_port), name="two")
        places = [((VIP, 53), one, one_port), ((OTHER_VIP, 53), two, two_port)]
        before = lab.maps.counters()
        clients = []
        for number in range(120):
            vip, server, port = places[number % 2]
            client = stack.enter_context(datagram_socket())
            client.connect(vip)
            clients.append((client, vip, server, ("127.0.0.1", port)))
        after = lab.maps.counters()
        unrecorded = after["unrecorded"] - before["unrecorded"]
        assert after["overflowed"] - before["overflowed"] == 16 // 4
        assert 0 < unrecorded == 120 - lab.records()
        as_they_are = 0
        for client, vip, server, real in clients:
            client.send(b"x")
            answer(server)
            seen = source_of(client)
            assert seen == client.getpeername() and seen in (vip, real)
            as_they_are += seen == real
        assert as_they_are == unrecorded
        with datagram_socket() as unconnected:
            for vip, server, _ in places:
                unconnected.sendto(b"x", vip)
                answer(server)
                assert source_of(unconnected) == vip
        for client, *_ in clients:
            client.close()
        assert lab.records() == 0
        with datagram_socket() as client:
            client.connect((VIP, 53))
            assert client.getpeername() == (VIP, 53), "there is room again"


# -- 4: answers of others than Services take the VIP's address -------------------------------------


@pytest.mark.parametrize(("family", "vip", "server_address", "dialled"), FAMILIES)
def test_pitfall_4_only_what_an_endpoint_sent_seems_to_come_from_the_vip(
    lab: Lab, family: int, vip: str, server_address: str, dialled: str
) -> None:
    """cilium#8739: one socket talks to a Service and to strangers; the key is the socket's own."""
    seen_server = dialled.replace(vip, server_address)
    with (
        udp_server(server_address) as (server, port),
        udp_server(server_address) as (stranger, stranger_port),
        datagram_socket(family) as client,
        datagram_socket(family) as other,
    ):
        lab.serve(vip, 53, UDP, (server_address, port))
        other.sendto(b"x", (seen_server, port))
        answer(server)
        client.sendto(b"x", (dialled, 53))
        answer(server)
        client.sendto(b"x", (seen_server, stranger_port))
        answer(stranger)
        assert source_of(client) == (dialled, 53)
        assert source_of(client) == (seen_server, stranger_port)
        assert source_of(other) == (seen_server, port)


@pytest.mark.parametrize(("family", "vip", "server_address", "dialled"), FAMILIES)
def test_pitfall_4_what_was_an_endpoint_answers_as_itself(
    lab: Lab, family: int, vip: str, server_address: str, dialled: str
) -> None:
    """A Service that is gone gives its VIP to nobody's answers; to one that was asked for while it
    was there it does, though it comes late."""
    seen_server = dialled.replace(vip, server_address)
    with udp_server(server_address) as (server, port), datagram_socket(family) as client:
        lab.serve(vip, 53, UDP, (server_address, port))
        client.sendto(b"x", (dialled, 53))
        lab.set("web")
        answer(server)
        assert source_of(client) == (dialled, 53)
        client.sendto(b"x", (seen_server, port))
        answer(server)
        assert source_of(client) == (seen_server, port)
        lab.serve(vip, 53, UDP, (server_address, port))
        client.sendto(b"x", (dialled, 53))
        answer(server)
        assert source_of(client) == (dialled, 53)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["TCP", "UDP"])
@pytest.mark.parametrize(("family", "vip", "server_address", "dialled"), FAMILIES)
def test_pitfall_4_a_direct_connection_to_an_endpoint_is_a_direct_connection(
    lab: Lab, kind: int, family: int, vip: str, server_address: str, dialled: str
) -> None:
    make, protocol = (tcp_server, TCP) if kind == socket.SOCK_STREAM else (udp_server, UDP)
    seen_server = dialled.replace(vip, server_address)
    with (
        make(server_address) as (_, port),
        socket.socket(family, kind) as through,
        socket.socket(family, kind) as direct,
    ):
        lab.serve(vip, 80, protocol, (server_address, port))
        through.connect((dialled, 80))
        direct.connect((seen_server, port))
        assert through.getpeername()[:2] == (dialled, 80)
        assert direct.getpeername()[:2] == (seen_server, port)


# -- 5: getpeername() names an address that the program never dialled ------------------------------


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["TCP", "UDP"])
@pytest.mark.parametrize(("family", "vip", "server_address", "dialled"), FAMILIES)
def test_pitfall_5_getpeername_names_what_was_dialled(
    lab: Lab, kind: int, family: int, vip: str, server_address: str, dialled: str
) -> None:
    """cilium#9974: libceph compares it. It stays so when the Service goes, and for a process that
    was given the socket and is not served itself."""
    make, protocol = (tcp_server, TCP) if kind == socket.SOCK_STREAM else (udp_server, UDP)
    with make(server_address) as (_, port), socket.socket(family, kind) as client:
        lab.serve(vip, 80, protocol, (server_address, port))
        client.connect((dialled, 80))
        assert client.getpeername()[:2] == (dialled, 80)
        lab.set("web")
        assert client.getpeername()[:2] == (dialled, 80)
        lab.cgroup.leave()
        with socket.socket(fileno=os.dup(client.fileno())) as handed_over:
            assert handed_over.getpeername()[:2] == (dialled, 80)


# -- 6: sockets of the kernel itself ---------------------------------------------------------------


@contextmanager
def announcing(vip: str, port: int) -> Iterator[Callable[[], socket.socket]]:
    """Where servers tell their MPTCP clients of a further address, `vip`, and the kernel of the
    client connects there by itself. Yields a function that makes the next such client."""
    with ExitStack() as stack:
        server = stack.enter_context(
            socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
        )
        server.bind(("0.0.0.0", port))
        server.listen(16)
        server.settimeout(60)
        run("ip", "mptcp", "limits", "set", "subflows", "2", "add_addr_accepted", "2")
        run("ip", "mptcp", "endpoint", "add", vip, "signal")

        def connect() -> socket.socket:
            client = stack.enter_context(
                socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
            )
            client.settimeout(60)
            client.connect(("10.244.0.1", port))
            accepted, _ = server.accept()
            stack.enter_context(accepted)
            # The announcement goes out when the connection is fully there.
            for one, other in ((client, accepted), (accepted, client)):
                one.send(b"hello")
                assert other.recv(9) == b"hello"
            return client

        yield connect


@pytest.fixture
def mptcp(kernel: None, missing: Callable[[str], None]) -> Iterator[Pod]:
    """A namespace of its own, for what the path manager is told is told to a namespace."""
    with Pod() as pod:
        try:
            pod.run(run, "ip", "mptcp", "limits", "show")
            pod.run(socket.socket, socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
        except Exception as error:
            missing(f"MPTCP and 'ip mptcp' ({error})")
        yield pod


def test_pitfall_6_a_connect_of_the_kernel_itself_reaches_the_endpoint(
    lab: Lab, mptcp: Pod
) -> None:
    """cilium#21541. NFS, CIFS and Ceph need servers, and modules; the path manager of MPTCP calls
    the same kernel_connect() from a worker, with no program on the stack."""
    port = 7001

    def check() -> None:
        lab.serve(VIP, port, TCP, ("10.244.0.2", port))
        with announcing(VIP, port) as connect:
            client = connect()
            until(lambda: lab.records() == 1, "the record of the kernel's own connect")
            until(lambda: lab.open("10.244.0.2", port) == 1, "its count")
            client.send(b"on")
        until(lambda: lab.records() == 0, "the end of the record")

    mptcp.run(check)


@pytest.mark.parametrize("why", ["refused", "unreachable", "undefined_port"])
def test_pitfall_6_a_refused_connect_of_the_kernel_itself_is_no_loop(
    lab: Lab, mptcp: Pod, why: str
) -> None:
    """A kernel that takes EPERM for a reason to try again would be in a loop."""
    port = 7002
    owner = PortName("default", "web", "p")
    empty = {"refused": 0, "unreachable": 1}

    def check() -> None:
        if why in empty:
            lab.set("web", entry(VIP, port, TCP, (), owner, empty=empty[why]))
        else:
            lab.set("web", entry(VIP, 80, TCP, (), owner), wildcard(VIP, owner))
        with announcing(VIP, port) as connect:
            before = lab.maps.counters()[why]
            client = connect()
            until(lambda: lab.maps.counters()[why] > before, "the kernel's own connect")
            client.send(b"on")
            time.sleep(0.3)
            # The server may say its address again: each time is one try. A loop makes thousands.
            assert lab.maps.counters()[why] <= before + 5
            assert lab.records() == 0

    mptcp.run(check)


def test_pitfall_6_status_names_a_kernel_whose_mounts_lose_the_address(node: AgentProcess) -> None:
    """Whether this kernel is one of them is all that can be tried on one machine."""
    node.write("web.yaml", service("web", VIP))
    node.start()
    note = kernel_sockets_note(platform.release())
    warnings = json.loads(node.cli("status", "-o", "json").stdout)["warnings"]
    assert (note in warnings) == bool(note)
    assert "NFS" in kernel_sockets_note("5.15.100") and not kernel_sockets_note("6.6.0")


# -- 7: errno --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["connect-tcp", "connect-udp", "sendmsg"])
@pytest.mark.parametrize(
    ("why", "expected"),
    [
        pytest.param("refused", errno.ECONNREFUSED, id="no-endpoints"),
        pytest.param("undefined_port", errno.ECONNREFUSED, id="undefined-port"),
        pytest.param("unreachable", errno.EHOSTUNREACH, id="none-under-a-policy"),
    ],
)
@pytest.mark.parametrize(("family", "vip", "server_address", "dialled"), FAMILIES)
def test_pitfall_7_errno_for_no_backend(
    lab: Lab,
    family: int,
    vip: str,
    server_address: str,
    dialled: str,
    why: str,
    expected: int,
    call: str,
) -> None:
    """cilium#45184: never EPERM, which programs take for a firewall and don't try again after."""
    needs_linux(5, 18, "bpf_set_retval")
    protocol = TCP if call == "connect-tcp" else UDP
    owner = PortName("default", "web", "p")
    empty = entry(vip, 80, protocol, (), owner, empty=int(why == "unreachable"))
    lab.set("web", empty, wildcard(vip, owner))
    before = lab.maps.counters()
    to = (dialled, 81 if why == "undefined_port" else 80)
    with (
        socket.socket(
            family, socket.SOCK_STREAM if protocol == TCP else socket.SOCK_DGRAM
        ) as client,
        pytest.raises(OSError) as caught,
    ):
        if call == "sendmsg":
            client.sendto(b"x", to)
        else:
            client.connect(to)
    assert caught.value.errno == expected
    changed = {name: n - before[name] for name, n in lab.maps.counters().items()}
    assert {name: n for name, n in changed.items() if n} == {why: 1}
    assert lab.records() == 0


# -- 9: other programs, orphaned links, the wrong cgroup -------------------------------------------

_CONNECT4, _SOCK_ADDR, _ALLOW_MULTI = 10, 18, 2
_SYS_BPF = {"x86_64": 321, "aarch64": 280}
_libc = ctypes.CDLL(None, use_errno=True)
_REFUSED_PORT = 4242


def _bpf(command: int, attributes: bytes) -> bytes:
    """bpf(2); what it wrote to the attributes."""
    buffer = ctypes.create_string_buffer(attributes.ljust(144, b"\0"), 144)
    result = _libc.syscall(_SYS_BPF[platform.machine()], command, buffer, 144)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return struct.pack("=i", result) + buffer.raw


def somebody_elses_program() -> int:
    """A connect4 program that forbids one port, as a firewall would; its descriptor."""

    def instruction(code: int, registers: int, offset: int, immediate: int) -> bytes:
        return struct.pack("=BBhi", code, registers, offset, immediate)

    code = b"".join(
        (
            instruction(0x61, 0x12, 24, 0),  # r2 = ctx->user_port
            instruction(0xB7, 0x00, 0, 1),  # r0 = 1
            instruction(0x55, 0x02, 1, socket.htons(_REFUSED_PORT)),  # if r2 != port: exit
            instruction(0xB7, 0x00, 0, 0),  # r0 = 0
            instruction(0x95, 0x00, 0, 0),
        )
    )
    instructions = ctypes.create_string_buffer(code, len(code))
    license_ = ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "=IIQQIIQII16sII",
        *(_SOCK_ADDR, len(code) // 8, ctypes.addressof(instructions), ctypes.addressof(license_)),
        *(0, 0, 0, 0, 0, b"somebody_else", 0, _CONNECT4),
    )
    return int(struct.unpack_from("=i", _bpf(5, attributes))[0])


def attach(program: int, cgroup: int, flags: int) -> None:
    _bpf(8, struct.pack("=IIII", cgroup, program, _CONNECT4, flags))


def attached(cgroup: int, attach_type: int = _CONNECT4) -> list[int]:
    """The ids of the programs on this cgroup itself."""
    ids = (ctypes.c_uint32 * 64)()
    attributes = struct.pack("=IIIIQI", cgroup, attach_type, 0, 0, ctypes.addressof(ids), 64)
    count = struct.unpack_from("=I", _bpf(16, attributes), 4 + 24)[0]
    return list(ids)[:count]


def ours_on(cgroup: int) -> list[str]:
    """The hooks on it apart from connect4, where somebody else's program is."""
    return [h.name for h in HOOKS if h.name != "connect4" and attached(cgroup, h.attach_type)]


def outcome(address: Address) -> int:
    with socket.socket() as client:
        return client.connect_ex(address)


@pytest.mark.parametrize("first", ["they", "we"])
def test_pitfall_9_programs_of_others_stay_and_run(kernel: None, first: str) -> None:
    """cilium#15137: ours are added to what is there, and `unload` takes away ours alone."""
    lab = Lab(f"pm_pitfall_9_{os.getpid()}")
    cgroup, theirs = os.open(lab.cgroup.path, os.O_RDONLY), somebody_elses_program()
    try:
        if first == "we":
            lab.attach()
        attach(theirs, cgroup, _ALLOW_MULTI)
        [their_id] = set(attached(cgroup)) - {link.program for link in lab.pins.links()}
        if first == "they":
            lab.attach()
        lab.cgroup.enter()
        assert len(attached(cgroup)) == 2
        with tcp_server() as (_, port):
            lab.serve(VIP, 80, TCP, ("127.0.0.1", port))
            assert outcome((VIP, 80)) == 0
            assert outcome(("127.0.0.1", _REFUSED_PORT)) == errno.EPERM
            lab.maps.close()
            del lab.maps
            lab.pins.unload()
            until(lambda: outcome((VIP, 80)) == errno.ENETUNREACH, "the end of ours")
            assert outcome(("127.0.0.1", _REFUSED_PORT)) == errno.EPERM
        assert attached(cgroup) == [their_id]
        until(lambda: not ours_on(cgroup), "the end of all of ours")
    finally:
        os.close(theirs)
        os.close(cgroup)
        lab.close()


def test_pitfall_9_a_program_that_tolerates_no_other_is_left_alone(kernel: None) -> None:
    """Attached without BPF_F_ALLOW_MULTI: we say so and take back what we had attached."""
    lab = Lab(f"pm_pitfall_9x_{os.getpid()}")
    cgroup, theirs = os.open(lab.cgroup.path, os.O_RDONLY), somebody_elses_program()
    try:
        attach(theirs, cgroup, 0)
        [their_id] = attached(cgroup)
        with pytest.raises(errors.NoCgroup2, match=r"connect4 on .*another program"):
            lab.attach()
        assert attached(cgroup) == [their_id]
        until(lambda: not ours_on(cgroup), "the end of what was attached before it")
        assert not any(link.program for link in lab.pins.links())
    finally:
        os.close(theirs)
        os.close(cgroup)
        lab.close()


def test_pitfall_9_a_link_whose_pin_vanished_is_named_and_made_again(
    fresh_lab: Callable[..., Lab],
) -> None:
    """cilium#36789: who only looks for the pins' directory takes such a node for a healthy one."""
    lab = fresh_lab()
    cgroup = os.open(lab.cgroup.path, os.O_RDONLY)
    try:
        with tcp_server() as (_, port):
            lab.serve(VIP, 80, TCP, ("127.0.0.1", port))
            (lab.root / "links" / "connect4").unlink()
            until(lambda: not attached(cgroup), "the end of the link")
            [difference] = link_differences(lab.pins.links())
            assert (difference.object, difference.message) == ("connect4", "not attached")
            assert outcome((VIP, 80)) == errno.ENETUNREACH
            assert lab.attach() == ["connect4"]
            assert outcome((VIP, 80)) == 0
            assert len(attached(cgroup)) == 1
            assert link_differences(lab.pins.links()) == []
    finally:
        os.close(cgroup)


def test_pitfall_9_another_cgroup_is_named_and_left(fresh_lab: Callable[..., Lab]) -> None:
    """An agent told of another cgroup moves its links there: none is left on the one before."""
    lab = fresh_lab()
    other = Cgroup(f"pm_pitfall_9o_{os.getpid()}")
    before = os.open(lab.cgroup.path, os.O_RDONLY)
    try:
        moved = lab.pins.attach(lab.loaded.generation, other.path)
        assert moved == [hook.name for hook in HOOKS]
        assert {link.cgroup for link in lab.pins.links()} == {other.path.stat().st_ino}
        until(lambda: not attached(before), "the end of the links on the cgroup before")
        other.path.rmdir()
        until(lambda: not any(link.cgroup for link in lab.pins.links()), "the cgroup's end")
        messages = {d.message for d in link_differences(lab.pins.links())}
        assert messages == {"its cgroup is gone"}
    finally:
        os.close(before)
        if other.path.exists():
            other.close()


# -- 11: what one Service knows of an endpoint is taken for another's ------------------------------


def conditions(**given: bool) -> dict[str, object]:
    return {"conditions": given}


LEAVING = conditions(ready=False, serving=True, terminating=True)
GONE = conditions(ready=False, serving=False, terminating=True)


def test_pitfall_11_an_endpoint_that_leaves_one_service_stays_in_the_other(
    node: AgentProcess,
) -> None:
    """cilium#27726: its state and its connections are those of one Service's port."""
    with udp_server("10.244.0.1") as (shared, port), udp_server("10.244.0.2") as (_, other):
        node.write("one.yaml", service("one", VIP, 53, "UDP"))
        node.write("two.yaml", service("two", OTHER_VIP, 53, "UDP"))
        both: list[tuple[str, int, dict[str, object]]] = [
            ("10.244.0.1", port, {}),
            ("10.244.0.2", other, {}),
        ]

        def members(name: str, *found: tuple[str, int, dict[str, object]]) -> None:
            slices = [
                slice_of(name, [(a, more)], p, protocol="UDP", name=f"{name}-{p}")
                for a, p, more in found
            ]
            node.write(f"{name}-endpoints.yaml", "\n---\n".join(slices))

        def chosen(vip: str) -> set[Address]:
            """The servers that some sockets of their own reach; empty if they are refused."""
            found = set()
            for _ in range(16):
                with datagram_socket() as client:
                    try:
                        client.connect((vip, 53))
                    except REFUSED:
                        continue
                    found.add(real_peer(client))
            return found

        first, second = ("10.244.0.1", port), ("10.244.0.2", other)
        members("one", *both)
        members("two", both[0])
        node.start()
        until(lambda: chosen(VIP) == {first, second}, "both endpoints of the first Service")
        with datagram_socket() as through_one, datagram_socket() as through_two:
            through_one.connect((VIP, 53))
            while real_peer(through_one) != first:
                through_one.connect((VIP, 53))
            through_two.connect((OTHER_VIP, 53))
            # It terminates in one Service, and is ready in the other.
            members("one", ("10.244.0.1", port, LEAVING), both[1])
            until(lambda: chosen(VIP) == {second}, "no new sockets for what terminates")
            assert chosen(OTHER_VIP) == {first}
            assert through_one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            # The last ready one goes: what terminates serves again, there alone.
            members("one", ("10.244.0.1", port, LEAVING))
            until(lambda: chosen(VIP) == {first}, "what terminates, when nothing else is left")
            # The last one goes: refused there, and the other's sockets live.
            members("one", ("10.244.0.1", port, GONE))
            until(lambda: chosen(VIP) == set(), "a refusal")
            assert chosen(OTHER_VIP) == {first}
            node.write("one-endpoints.yaml", "")
            error = socket.SO_ERROR
            until(
                lambda: through_one.getsockopt(socket.SOL_SOCKET, error) == errno.ECONNABORTED,
                "the end of the first Service's socket",
            )
            assert through_two.getsockopt(socket.SOL_SOCKET, error) == 0
            through_two.send(b"x")
            while shared.recv(64) != b"x":
                pass
            assert chosen(OTHER_VIP) == {first}


def real_peer(client: socket.socket) -> Address:
    """The endpoint that a socket was translated to, by the kernel's own word."""
    inode = os.fstat(client.fileno()).st_ino
    for line in Path("/proc/thread-self/net/udp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[9]) == inode:
            address, port = fields[2].split(":")
            return socket.inet_ntoa(struct.pack("=I", int(address, 16))), int(port, 16)
    raise LookupError(f"no UDP socket {inode}")


# -- each rule taken out ---------------------------------------------------------------------------


def _pitfall_2(lab: Lab) -> None:
    def made(sizes: Sizes) -> Lab:
        assert lab.pins.sizes == sizes
        return lab

    test_pitfall_2_a_full_table_shows_no_socket_the_peer_of_another(made)


def _pitfall_7(lab: Lab) -> None:
    arguments = (socket.AF_INET, VIP, "127.0.0.1", VIP, "refused", errno.ECONNREFUSED)
    test_pitfall_7_errno_for_no_backend(lab, *arguments, "connect-tcp")


@pytest.mark.parametrize(
    ("change", "check"),
    [
        pytest.param(
            ("record.h", "if (more->place[i].cookie == cookie) {", "if (more->place[i].cookie) {"),
            _pitfall_2,
            id="2-a-record-is-its-sockets-own",
        ),
        pytest.param(
            ("datagram.h", "choice->peer_port != from->port ||\n", "0 ||\n"),
            lambda lab: test_pitfall_4_only_what_an_endpoint_sent_seems_to_come_from_the_vip(
                lab, socket.AF_INET, VIP, "127.0.0.1", VIP
            ),
            id="4-the-port-of-a-peer-counts",
        ),
        pytest.param(
            ("sock.c", "\tbpf_set_retval(error);\n", ""), _pitfall_7, id="7-an-errno-of-our-own"
        ),
    ],
)
def test_without_the_rule_its_pitfall_is_back(
    change: tuple[str, str, str],
    check: Callable[[Lab], None],
    fresh_lab: Callable[..., Lab],
    changed_source: Callable[..., Path],
) -> None:
    lab = fresh_lab(source=changed_source(change), sizes=FEW)
    with pytest.raises((AssertionError, OSError)):
        check(lab)
