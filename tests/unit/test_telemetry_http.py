"""The HTTP server through real sockets on loopback."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as families

from pointsman.telemetry import Telemetry
from pointsman.telemetry.connection import Later
from pointsman.telemetry.http import HttpLoop
from pointsman.telemetry.httpwire import Address, Request, Response, text
from pointsman.telemetry.servers import HttpServers

WAIT = 60  # seconds, far beyond what anything here takes
V4, V6 = "127.0.0.1", "::1"


class Loop(HttpLoop):
    """A loop that a test can wait for."""

    def __init__(self, **options: float) -> None:
        self._condition = threading.Condition()
        super().__init__(self._changed_now, retry=0.01, **options)

    def _changed_now(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def until(self, predicate: Callable[[], bool]) -> None:
        with self._condition:
            assert self._condition.wait_for(predicate, WAIT)

    def port(self, owner: object, number: int = 0) -> int:
        self.until(lambda: len(self.bound(owner)) > number)
        return self.bound(owner)[number][1]


@pytest.fixture
def loop() -> Iterator[Loop]:
    with running() as found:
        yield found


@contextlib.contextmanager
def running(**options: float) -> Iterator[Loop]:
    loop = Loop(**options)
    loop.start()
    try:
        yield loop
    finally:
        loop.stop()


def ask(
    port: int, path: str, host: str = V4, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(host, port, timeout=WAIT)
    try:
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def exchange(port: int, sent: bytes) -> bytes:
    """What comes back for these octets, up to the end of the connection."""
    with socket.create_connection((V4, port), timeout=WAIT) as client:
        client.sendall(sent)
        return b"".join(iter(lambda: client.recv(65536), b""))


def echo(request: Request, at: Address) -> Response:
    return text(200, f"{request.path} {dict(request.query)} {at.host}")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind((V6, 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="needs ::1")


@pytest.fixture
def port(loop: Loop) -> int:
    loop.want("echo", [Address(V4, 0)], echo)
    return loop.port("echo")


def test_a_get_is_answered_and_the_connection_closed(port: int) -> None:
    answer, body = ask(port, "/where?verbose&a=b")
    assert (answer.status, body) == (200, b"/where {'verbose': ('',), 'a': ('b',)} 127.0.0.1")
    assert answer.headers["Connection"] == "close"
    assert answer.headers["Date"].endswith("GMT")


def test_a_head_has_the_headers_and_no_body(port: int) -> None:
    received = exchange(port, b"HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n")
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"Content-Length: 15" in head
    assert body == b""


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405, id="method"),
        pytest.param(b"nonsense\r\n\r\n", 400, id="no-request-line"),
        pytest.param(b"GET / FTP/1.0\r\n\r\n", 400, id="another-protocol"),
        pytest.param(b"GET / HTTP/2.0\r\n\r\n", 505, id="another-version"),
        pytest.param(b"GET //[ HTTP/1.1\r\n\r\n", 400, id="no-target"),
        pytest.param(b"GET / HTTP/1.1\r\nA: " + b"a" * 9000, 431, id="endless-head"),
        pytest.param(b"\xff\xfe \x00 \x80\r\n\r\n", 400, id="binary"),
    ],
)
def test_what_is_no_get_is_refused(port: int, sent: bytes, status: int) -> None:
    assert exchange(port, sent).startswith(f"HTTP/1.1 {status} ".encode())


def test_what_is_sent_beyond_a_request_does_not_cost_the_answer(port: int) -> None:
    # To close with something unread is a reset, which can take the answer away.
    sent = b"POST / HTTP/1.1\r\n\r\n" + bytes(1 << 20)
    assert exchange(port, sent).startswith(b"HTTP/1.1 405 ")


def test_a_request_may_come_octet_by_octet(port: int) -> None:
    with socket.create_connection((V4, port), timeout=WAIT) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for octet in b"GET /slow HTTP/1.0\r\n\r\n":
            client.sendall(bytes([octet]))
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_a_silent_client_keeps_nobody_waiting(port: int) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            client = stack.enter_context(socket.create_connection((V4, port), timeout=WAIT))
            client.sendall(b"GET /")
        assert ask(port, "/")[0].status == 200


def test_a_client_that_does_not_read_keeps_nobody_waiting(loop: Loop) -> None:
    big = bytes(8 << 20)
    loop.want("big", [Address(V4, 0)], lambda request, at: Response(200, big))
    port = loop.port("big")
    with socket.create_connection((V4, port), timeout=WAIT) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert len(ask(port, "/")[1]) == len(big)
        received = sum(len(data) for data in iter(lambda: client.recv(1 << 20), b""))
    assert received > len(big)


def test_of_too_many_silent_clients_the_oldest_go(port: int) -> None:
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection((V4, port), timeout=WAIT))
            for _ in range(140)
        ]
        assert ask(port, "/")[0].status == 200
        assert clients[0].recv(1) == b""


def test_patience_ends() -> None:
    with running(patience=0.05) as loop:
        loop.want("echo", [Address(V4, 0)], echo)
        with socket.create_connection((V4, loop.port("echo")), timeout=WAIT) as client:
            client.sendall(b"GET /")
            assert client.recv(1) == b""


def test_an_answer_that_fails_is_a_500_and_no_more(
    loop: Loop, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(request: Request, at: Address) -> Response:
        raise RuntimeError("broken")

    loop.want("broken", [Address(V4, 0)], broken)
    assert ask(loop.port("broken"), "/")[0].status == 500
    assert "the answer failed" in caplog.text
    assert ask(port, "/")[0].status == 200


@pytest.mark.parametrize("at_once", [True, False])
def test_an_answer_may_be_made_by_another_thread(loop: Loop, port: int, at_once: bool) -> None:
    asked: queue.SimpleQueue[Later] = queue.SimpleQueue()

    def handler(request: Request, at: Address) -> Later:
        later = Later()
        if at_once:
            later.give(text(200, "made"))
        asked.put(later)
        return later

    loop.want("later", [Address(V4, 0)], handler)
    with socket.create_connection((V4, loop.port("later")), timeout=WAIT) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n and more that nobody looks at")
        later = asked.get(timeout=WAIT)
        assert ask(port, "/")[0].status == 200  # nobody waits for it
        if not at_once:
            later.give(text(200, "made"))
        received = b"".join(iter(lambda: client.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 200 ") and received.endswith(b"\r\n\r\nmade")
    assert not later.dropped


@pytest.mark.parametrize("client_ends", [True, False])
def test_an_answer_that_nobody_waits_for_is_said_to_be_dropped(client_ends: bool) -> None:
    asked: queue.SimpleQueue[Later] = queue.SimpleQueue()

    def handler(request: Request, at: Address) -> Later:
        asked.put(later := Later())
        return later

    with running(patience=WAIT if client_ends else 0.05) as loop:
        loop.want("later", [Address(V4, 0)], handler)
        client = socket.create_connection((V4, loop.port("later")), timeout=WAIT)
        with client:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            later = asked.get(timeout=WAIT)
            if not client_ends:
                assert client.recv(1) == b""
        for _ in range(WAIT * 100):
            if later.dropped:
                break
            time.sleep(0.01)
        assert later.dropped
        later.give(text(200, "too late"))
        loop.want("echo", [Address(V4, 0)], echo)
        assert ask(loop.port("echo"), "/")[0].status == 200


def test_a_taken_port_is_a_fault_and_taken_over_when_it_is_free(loop: Loop) -> None:
    with socket.create_server((V4, 0)) as other:
        port = other.getsockname()[1]
        loop.want("late", [Address(V4, port)], echo)
        loop.until(lambda: bool(loop.faults()))
        assert loop.faults() == {"late": "Address already in use"}
    loop.until(lambda: not loop.faults())
    assert ask(port, "/")[0].status == 200


def test_of_several_addresses_all_open_or_none(loop: Loop) -> None:
    with socket.create_server((V4, 0)) as other:
        taken = other.getsockname()[1]
        loop.want("both", [Address("127.0.0.2", taken), Address(V4, taken)], echo)
        loop.until(lambda: bool(loop.faults()))
        with pytest.raises(ConnectionRefusedError):
            ask(taken, "/", "127.0.0.2")


def test_two_owners_may_swap_their_ports(loop: Loop) -> None:
    loop.want("a", [Address(V4, 0)], echo)
    loop.want("b", [Address(V4, 0)], echo)
    one, two = loop.port("a"), loop.port("b")
    loop.want("a", [Address(V4, two)], echo)
    loop.want("b", [Address(V4, one)], echo)
    loop.until(lambda: loop.bound("a") == [(V4, two)] and loop.bound("b") == [(V4, one)])


def test_what_is_not_wanted_any_more_is_closed(loop: Loop, port: int) -> None:
    loop.want("echo", [], echo)
    loop.want("next", [Address(V4, 0)], echo)
    loop.port("next")
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/")


def test_stop_ends_the_thread_and_frees_the_ports() -> None:
    before = {*threading.enumerate()}
    with running() as loop:
        loop.want("echo", [Address(V4, 0)], echo)
        port = loop.port("echo")
        client = socket.create_connection((V4, port), timeout=WAIT)
    with client:
        assert client.recv(1) == b""
    assert {*threading.enumerate()} <= before
    loop.want("late", [Address(V4, 0)], echo)
    with socket.create_server((V4, port)):
        pass


def test_a_loop_that_never_started_can_be_stopped() -> None:
    loop = HttpLoop()
    loop.stop()
    loop.stop()


# -- the two servers -----------------------------------------------------------------------------


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture
def ports(loop: Loop, telemetry: Telemetry) -> dict[str, int]:
    servers = HttpServers(
        loop, telemetry, healthz=[(V4, 0)], metrics=[(V4, 0)], config=lambda: {"node": "a"}
    )
    loop.until(lambda: all(servers.bound().values()))
    return {name: bound[0][1] for name, bound in servers.bound().items()}


def test_healthz_and_livez_are_kube_proxy_s_json(ports: dict[str, int]) -> None:
    for path, names in (
        ("/healthz", ["lastUpdated", "currentTime", "nodeEligible", "healthy", "status"]),
        ("/livez", ["lastUpdated", "currentTime", "healthy", "status"]),
    ):
        answer, body = ask(ports["healthz"], path)
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert list(json.loads(body)) == names
        assert b" " not in body


def test_readyz_says_what_is_missing(ports: dict[str, int], telemetry: Telemetry) -> None:
    answer, body = ask(ports["healthz"], "/readyz")
    assert (answer.status, body.count(b"[-]")) == (503, 3)
    telemetry.listed()
    telemetry.synced(True, 0.1)
    telemetry.attached()
    answer, body = ask(ports["healthz"], "/readyz")
    assert (answer.status, body) == (200, b"ok")
    assert ask(ports["healthz"], "/readyz?verbose")[1].count(b"[+]") == 3


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        pytest.param("/healthz", 200, b"ok", id="static"),
        pytest.param("/proxyMode", 200, b"pointsman", id="proxy-mode"),
        pytest.param("/configz", 200, b'{"node":"a"}', id="configz"),
        pytest.param("/other", 404, b"404 page not found\n", id="unknown"),
    ],
)
def test_the_metrics_port_has_kube_proxy_s_other_paths(
    ports: dict[str, int], path: str, status: int, body: bytes
) -> None:
    answer, found = ask(ports["metrics"], path)
    assert (answer.status, found) == (status, body)


def test_metrics_are_text_openmetrics_and_packed_as_asked(ports: dict[str, int]) -> None:
    answer, body = ask(ports["metrics"], "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert {f.name for f in families(body.decode())} >= {
        "pointsman_build_info",
        "process_cpu_seconds",
    }
    asked = {"Accept": "application/openmetrics-text;version=1.0.0", "Accept-Encoding": "gzip"}
    answer, body = ask(ports["metrics"], "/metrics", headers=asked)
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.headers["Content-Encoding"] == "gzip"
    assert "pointsman_build_info" in {f.name for f in openmetrics(gzip.decompress(body).decode())}


@needs_ipv6
def test_a_wildcard_takes_both_families(loop: Loop, telemetry: Telemetry) -> None:
    servers = HttpServers(loop, telemetry, healthz=[("0.0.0.0", 0)])
    loop.until(lambda: bool(servers.bound()["healthz"]))
    port = servers.bound()["healthz"][0][1]
    for host in (V4, V6):
        assert ask(port, "/livez", host)[0].status == 200


@needs_ipv6
def test_one_address_is_one_family(loop: Loop, telemetry: Telemetry) -> None:
    servers = HttpServers(loop, telemetry, metrics=[(V6, 0)])
    loop.until(lambda: bool(servers.bound()["metrics"]))
    port = servers.bound()["metrics"][0][1]
    assert ask(port, "/proxyMode", V6)[0].status == 200
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/proxyMode", V4)


def test_a_server_that_can_t_listen_is_a_problem_until_it_can(
    loop: Loop, telemetry: Telemetry
) -> None:
    with socket.create_server((V4, 0)) as other:
        port = other.getsockname()[1]
        servers = HttpServers(loop, telemetry, healthz=[(V4, port)], metrics=[(V4, port)])
        loop.until(lambda: len(servers.problems) == 2)
        reasons = [problem.reason for problem in servers.problems]
        assert reasons == ["FailedToStartProxierHealthcheck", "FailedToStartMetricServer"]
        assert f"{V4}:{port}: Address already in use" in servers.problems[0].message
        servers.listen(healthz=[(V4, port)])
    loop.until(lambda: not servers.problems)
    assert ask(port, "/livez")[0].status == 200


def test_ports_can_be_moved_while_it_runs(loop: Loop, telemetry: Telemetry) -> None:
    servers = HttpServers(loop, telemetry, healthz=[(V4, 0)])
    loop.until(lambda: bool(servers.bound()["healthz"]))
    before = servers.bound()["healthz"]
    servers.listen(healthz=[("127.0.0.2", 0)])
    loop.until(lambda: servers.bound()["healthz"] not in ([], before))
    with pytest.raises(ConnectionRefusedError):
        ask(before[0][1], "/livez")
