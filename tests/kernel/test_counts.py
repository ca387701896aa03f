"""Open connections are exact and getpeername is right, however a connection comes and goes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import signal
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.support.kernel import (
    REFUSED,
    TCP,
    UDP,
    Lab,
    child,
    needs_linux,
    run,
    tcp_server,
    udp_server,
    unshare,
    until,
)

pytestmark = pytest.mark.kernel

VIP = ("10.96.0.1", 80)
IPPROTO_MPTCP = 262
TCP_FASTOPEN, TCP_FASTOPEN_CONNECT = 23, 30
_libc = ctypes.CDLL(None, use_errno=True)


def dissolve(client: socket.socket) -> None:
    """connect(AF_UNSPEC): the peer is gone, and no hook was passed."""
    address = struct.pack("=H14x", socket.AF_UNSPEC)
    if _libc.connect(client.fileno(), address, len(address)):
        raise OSError(ctypes.get_errno(), "connect(AF_UNSPEC)")


@contextlib.contextmanager
def service(lab: Lab, protocol: int = TCP) -> Iterator[tuple[socket.socket, int]]:
    """A server behind the VIP; nothing may be left open or recorded at the end."""
    with tcp_server() if protocol == TCP else udp_server() as (server, port):
        lab.serve(*VIP, protocol, ("127.0.0.1", port))
        yield server, port
        until(lambda: lab.open("127.0.0.1", port) == 0, "all connections counted closed")
        until(lambda: lab.records() == 0, "all records freed")


def test_open_counts_each_connection_until_it_closes(lab: Lab) -> None:
    with service(lab) as (server, port):
        clients = []
        for n in range(1, 20):
            clients.append(socket.create_connection(VIP))
            assert lab.open("127.0.0.1", port) == n
        for n, client in reversed(list(enumerate(clients))):
            client.close()
            assert lab.open("127.0.0.1", port) == n


def test_a_refused_connect_counts_no_longer_than_the_refusal(lab: Lab) -> None:
    with service(lab) as (server, port):
        server.close()
        with socket.socket() as client:
            with pytest.raises(ConnectionRefusedError):
                client.connect(VIP)
            assert lab.open("127.0.0.1", port) == 0, "the socket is still open, not connected"


def test_a_connect_that_fails_on_its_way_never_counts(lab: Lab) -> None:
    """No route to the endpoint: the hook has run, no SYN went out."""
    lab.serve(*VIP, TCP, ("192.0.2.1", 9))
    with socket.socket() as client:
        with pytest.raises(OSError) as caught:
            client.connect(VIP)
        assert caught.value.errno == errno.ENETUNREACH
        assert lab.open("192.0.2.1", 9) == 0
    assert lab.records() == 0


def test_a_connect_that_times_out_counts_while_it_is_tried(lab: Lab) -> None:
    run("ip", "link", "add", "hole", "type", "veth", "peer", "name", "bottom")
    try:
        run("ip", "addr", "add", "192.0.2.2/24", "dev", "hole")
        run("ip", "link", "set", "hole", "up")
        run("ip", "link", "set", "bottom", "up")
        run("ip", "neigh", "add", "192.0.2.1", "lladdr", "02:00:00:00:00:01", "dev", "hole")
        lab.serve(*VIP, TCP, ("192.0.2.1", 9))
        with socket.socket() as client:
            client.setblocking(False)
            assert client.connect_ex(VIP) == errno.EINPROGRESS
            assert lab.open("192.0.2.1", 9) == 1
            # Only now, or it may be over before it was looked at: the next try is the last one.
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 300)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, 1)
            until(lambda: lab.open("192.0.2.1", 9) == 0, "the timeout", seconds=60)
            assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ETIMEDOUT
    finally:
        run("ip", "link", "del", "hole")


def test_a_reset_by_the_server_ends_the_count(lab: Lab) -> None:
    with service(lab) as (server, port), socket.create_connection(VIP) as client:
        accepted, _ = server.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        assert lab.open("127.0.0.1", port) == 0


def test_a_reset_by_the_client_ends_the_count(lab: Lab) -> None:
    with service(lab) as (server, port):
        client = socket.create_connection(VIP)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        assert lab.open("127.0.0.1", port) == 0


def test_mptcp_counts_once_and_its_peer_is_the_vip(lab: Lab) -> None:
    needs_linux(5, 19, "bpf_skc_to_mptcp_sock")
    with tcp_server(protocol=IPPROTO_MPTCP) as (server, port):
        lab.serve(*VIP, TCP, ("127.0.0.1", port))
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
        client.connect(VIP)
        accepted, _ = server.accept()
        assert client.getpeername() == VIP
        assert lab.open("127.0.0.1", port) == 1
        client.send(b"x")
        assert accepted.recv(1) == b"x"
        accepted.close()
        client.close()
        until(lambda: lab.open("127.0.0.1", port) == 0, "the subflow's end")
        until(lambda: lab.records() == 0, "the subflow's record freed")


def test_an_mptcp_socket_shows_no_vip_of_one_that_was_at_its_address_before(lab: Lab) -> None:
    needs_linux(5, 19, "bpf_skc_to_mptcp_sock")
    with tcp_server(protocol=IPPROTO_MPTCP) as (server, port):
        lab.serve(*VIP, TCP, ("127.0.0.1", port))
        for turn in range(100):
            for peer in (VIP, ("127.0.0.1", port)):
                with socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) as client:
                    client.connect(peer)
                    assert client.getpeername() == peer, f"turn {turn}"
                    server.accept()[0].close()
        until(lambda: not list(lab.maps.map("mptcp").items()), "all records freed")


def test_connecting_again_moves_the_count(lab: Lab) -> None:
    with service(lab) as (server, port), socket.socket() as client:
        client.connect(VIP)
        dissolve(client)
        assert lab.open("127.0.0.1", port) == 0
        client.connect(VIP)
        assert lab.open("127.0.0.1", port) == 1
        assert client.getpeername() == VIP


def test_a_udp_socket_that_connects_again_moves_its_count(lab: Lab) -> None:
    with (
        udp_server() as (_, one),
        udp_server() as (_, two),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        lab.serve("10.96.0.1", 53, UDP, ("127.0.0.1", one), name="a")
        lab.serve("10.96.0.2", 53, UDP, ("127.0.0.1", two), name="b")
        for vip, counts in (("10.96.0.1", (1, 0)), ("10.96.0.2", (0, 1)), ("10.96.0.1", (1, 0))):
            client.connect((vip, 53))
            assert client.getpeername() == (vip, 53)
            assert (lab.open("127.0.0.1", one), lab.open("127.0.0.1", two)) == counts
        assert lab.records() == 1
    assert lab.records() == 0


def test_after_af_unspec_a_direct_connect_shows_the_real_peer(lab: Lab) -> None:
    with (
        udp_server() as (_, port),
        udp_server() as (_, other),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        lab.serve(*VIP, UDP, ("127.0.0.1", port))
        client.connect(VIP)
        dissolve(client)
        client.connect(("127.0.0.1", other))
        assert client.getpeername() == ("127.0.0.1", other)
        assert lab.open("127.0.0.1", port) == 0
        # Straight to the endpoint itself: the record must be gone, or this would show the VIP.
        client.connect(("127.0.0.1", port))
        assert client.getpeername() == ("127.0.0.1", port)


def test_a_refused_second_connect_leaves_the_first_peer_as_it_is(lab: Lab) -> None:
    with udp_server() as (_, port), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        lab.serve(*VIP, UDP, ("127.0.0.1", port), name="a")
        lab.serve("10.96.0.2", 53, UDP, name="empty")
        client.connect(VIP)
        with pytest.raises(REFUSED):
            client.connect(("10.96.0.2", 53))
        assert client.getpeername() == VIP
        assert lab.open("127.0.0.1", port) == 1
    assert lab.records() == 0


def test_a_second_connect_that_fails_on_its_way_shows_no_vip_that_it_never_reached(
    lab: Lab,
) -> None:
    with udp_server() as (_, port), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        lab.serve(*VIP, UDP, ("127.0.0.1", port), name="a")
        lab.serve("10.96.0.2", 53, UDP, ("192.0.2.1", 53), name="unreachable")
        client.connect(VIP)
        with pytest.raises(OSError):
            client.connect(("10.96.0.2", 53))
        assert client.getpeername() == ("127.0.0.1", port)


def test_a_connection_that_outlives_its_endpoint_leaves_the_next_one_with_its_id_alone(
    lab: Lab,
) -> None:
    with tcp_server() as (server, port):
        lab.serve(*VIP, TCP, ("127.0.0.1", port))
        ident = lab.endpoint_id("127.0.0.1", port)
        client = socket.create_connection(VIP)
        # Other endpoints until the id comes round again.
        for round_ in range(40):
            others = [(f"192.0.2.{n}", 1000 + round_) for n in range(200)]
            lab.serve(*VIP, TCP, *others)
            found = next((b for b in others if lab.endpoint_id(*b) == ident), None)
            if found:
                break
        assert found, "the id was never used again"
        assert lab.open(*found) == 0
        client.close()
        assert lab.maps.load(ident)[1] == 0
        assert (
            int.from_bytes(lab.maps.map("load").lookup(ident.to_bytes(4, "little"))[4:8], "little")
            == 0
        )


def test_a_shared_descriptor_counts_until_the_last_one_closes(lab: Lab) -> None:
    with service(lab) as (server, port):
        client = socket.create_connection(VIP)
        copy = client.dup()
        client.close()
        assert lab.open("127.0.0.1", port) == 1
        assert copy.getpeername() == VIP
        copy.close()
        assert lab.open("127.0.0.1", port) == 0


def test_a_descriptor_passed_to_another_process_counts_there(lab: Lab) -> None:
    with service(lab) as (server, port):
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        pid = os.fork()
        if pid == 0:
            mine.close()
            _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
            passed = socket.socket(fileno=fds[0])
            theirs.send(b"y" if passed.getpeername() == VIP else b"n")
            theirs.recv(1)
            os._exit(0)
        theirs.close()
        client = socket.create_connection(VIP)
        socket.send_fds(mine, [b"x"], [client.fileno()])
        assert mine.recv(1) == b"y"
        client.close()
        assert lab.open("127.0.0.1", port) == 1
        mine.send(b"z")
        os.waitpid(pid, 0)
        assert lab.open("127.0.0.1", port) == 0


def test_kill_9_ends_the_count_of_every_socket(lab: Lab) -> None:
    with service(lab) as (server, port):
        process = child(
            """
            import socket
            kept = [socket.create_connection(("10.96.0.1", 80)) for _ in range(50)]
            print(len(kept), flush=True)
            input()
            """
        )
        assert process.stdout and process.stdout.readline() == "50\n"
        assert lab.open("127.0.0.1", port) == 50
        process.kill()
        process.wait()
        until(lambda: lab.open("127.0.0.1", port) == 0, "the end of its sockets")


def test_the_end_of_a_namespace_ends_the_count(lab: Lab) -> None:
    process = child(
        """
        import ctypes, socket, subprocess
        ctypes.CDLL(None).unshare(0x40000000)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        input()
        server = socket.socket(); server.bind(("127.0.0.1", 7)); server.listen()
        kept = [socket.create_connection(("10.96.0.1", 80)) for _ in range(20)]
        print(kept[0].getpeername(), flush=True)
        input()
        """
    )
    lab.serve(*VIP, TCP, ("127.0.0.1", 7))
    assert process.stdin and process.stdout
    process.stdin.write("go\n")
    process.stdin.flush()
    assert process.stdout.readline() == "('10.96.0.1', 80)\n"
    assert lab.open("127.0.0.1", 7) == 20
    process.kill()
    process.wait()
    until(lambda: lab.open("127.0.0.1", 7) == 0, "the namespace's end")
    until(lambda: lab.records() == 0, "its records freed")


@pytest.mark.parametrize("how", ["MSG_FASTOPEN", "TCP_FASTOPEN_CONNECT"])
def test_tcp_fast_open_counts_like_any_connect(lab: Lab, how: str) -> None:
    sysctl = "/proc/sys/net/ipv4/tcp_fastopen"
    with open(sysctl) as file:
        before = file.read()
    with open(sysctl, "w") as file:
        file.write("519")  # client, server, no cookie needed
    try:
        with service(lab) as (server, port), socket.socket() as client:
            server.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN, 16)
            if how == "MSG_FASTOPEN":
                client.sendto(b"early", socket.MSG_FASTOPEN, VIP)
            else:
                client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
                client.connect(VIP)
                client.send(b"early")
            accepted, _ = server.accept()
            assert accepted.recv(9) == b"early"
            assert client.getpeername() == VIP
            assert lab.open("127.0.0.1", port) == 1
            accepted.close()
    finally:
        with open(sysctl, "w") as file:
            file.write(before)


def test_io_uring_connects_are_translated_and_counted(lab: Lab, missing) -> None:
    from tests.support import uring

    with service(lab) as (server, port), socket.socket() as client:
        try:
            ring = uring.Ring()
        except OSError as error:
            missing(f"io_uring ({error})")
        with ring:
            assert ring.connect(client.fileno(), *VIP) == 0
        assert client.getpeername() == VIP
        assert lab.open("127.0.0.1", port) == 1


def test_sock_destroy_ends_the_count_at_once(lab: Lab) -> None:
    with service(lab) as (server, port), socket.create_connection(VIP) as client:
        run("ss", "-K", "dst", f"127.0.0.1:{port}")
        with pytest.raises(OSError):
            client.recv(1)
        assert lab.open("127.0.0.1", port) == 0


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["TCP", "UDP"])
def test_threads_that_race_on_shared_sockets_leave_nothing_behind(lab: Lab, kind: int) -> None:
    protocol = TCP if kind == socket.SOCK_STREAM else UDP
    with service(lab, protocol) as (server, port):
        done = threading.Event()
        shared = [socket.socket(socket.AF_INET, kind) for _ in range(3)]

        def hammer(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(400):
                client = rng.choice(shared)
                with contextlib.suppress(OSError):
                    action = rng.randrange(4)
                    if action == 0:
                        dissolve(client)
                    elif action == 1:
                        client.connect(("127.0.0.1", port))
                    else:
                        client.connect(VIP)
                    client.getpeername()

        def accept() -> None:
            server.settimeout(0.05)
            while not done.is_set():
                with contextlib.suppress(OSError):
                    server.accept()[0].close()

        acceptor = threading.Thread(target=accept)
        if protocol == TCP:
            acceptor.start()
        threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 0 <= lab.open("127.0.0.1", port) <= len(shared)
        for client in shared:
            client.close()
        done.set()
        if protocol == TCP:
            acceptor.join()


def test_processes_and_threads_under_kill_9_leave_the_count_exact(lab: Lab) -> None:
    with service(lab) as (server, port):
        stop = threading.Event()

        def accept() -> None:
            server.settimeout(0.05)
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    server.accept()[0].close()

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        code = """
        import socket, threading
        def work():
            while True:
                s = socket.socket()
                try:
                    s.connect(("10.96.0.1", 80)); s.getpeername()
                except OSError: pass
                s.close()
        for _ in range(7): threading.Thread(target=work, daemon=True).start()
        print("go", flush=True)
        work()
        """
        for _ in range(6):
            processes = [child(code) for _ in range(3)]
            for process in processes:
                assert process.stdout and process.stdout.readline() == "go\n"
            threading.Event().wait(0.15)
            for process in processes:
                process.send_signal(signal.SIGKILL)
                process.wait()
        stop.set()
        acceptor.join()


def test_a_full_bucket_overflows_and_a_full_overflow_goes_on_unrecorded(lab: Lab) -> None:
    """More sockets than the buckets and this namespace's share of the overflow map hold."""
    needs_linux(5, 12, "compare-and-swap")
    sizes = lab.pins.sizes
    everything = 4 * sizes.buckets + sizes.overflow
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < everything + 600:
        pytest.fail(f"RLIMIT_NOFILE {hard} is too small")
    try:
        with service(lab, UDP) as (server, port):
            before = lab.maps.counters()
            clients = []
            for _ in range(everything + 200):
                client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                client.connect(VIP)
                clients.append(client)
            after = lab.maps.counters()
            overflowed = after["overflowed"] - before["overflowed"]
            unrecorded = after["unrecorded"] - before["unrecorded"]
            # One namespace gets a quarter of the overflow map, not all of it.
            assert overflowed == sizes.overflow // 4
            assert unrecorded > 0
            recorded = len(clients) - unrecorded
            assert lab.records() == recorded
            assert lab.open("127.0.0.1", port) == recorded
            shown = [client.getpeername() for client in clients]
            assert shown.count(VIP) == recorded
            assert shown.count(("127.0.0.1", port)) == unrecorded
            for client in clients:
                client.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_one_namespace_can_not_take_the_overflow_of_another(lab: Lab) -> None:
    """One that has filled its share leaves room for a socket in another namespace."""
    needs_linux(5, 12, "compare-and-swap")
    import resource

    sizes = lab.pins.sizes
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with service(lab, UDP) as (_, port):
            clients = []
            # Cookies are the whole machine's, so some that fall into a bucket are others': on and
            # on, until every bucket is full.
            while lab.records() - len(lab.maps.map("sockets_overflow")) < 4 * sizes.buckets:
                for _ in range(2 * sizes.buckets):
                    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                    client.connect(VIP)
                    clients.append(client)
            before = lab.maps.counters()
            pid = os.fork()
            if pid == 0:
                unshare(0x40000000)
                run("ip", "link", "set", "lo", "up")
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                    client.connect(VIP)
                    os._exit(0 if client.getpeername() == VIP else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            after = lab.maps.counters()
            assert after["overflowed"] == before["overflowed"] + 1
            for client in clients:
                client.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_record_left_by_a_connect_that_never_went_out_counts_for_nobody(lab: Lab) -> None:
    """The hook chose, the route failed, no SYN: the socket then connects past the Services."""
    with tcp_server() as (_, port), socket.socket() as client:
        lab.serve("10.96.0.1", 80, TCP, ("192.0.2.99", port))
        with pytest.raises(OSError, match="unreachable"):
            client.connect(("10.96.0.1", 80))
        client.connect(("127.0.0.1", port))
        assert lab.open("192.0.2.99", port) == 0
        assert client.getpeername() == ("127.0.0.1", port)
