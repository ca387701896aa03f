"""A node with an agent, as an operator has it, and programs that ask its Services."""

from __future__ import annotations

import errno
import json
import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.agents import AgentProcess, node_of, slice_of
from tests.support.kernel import of_this_kernel, run, until

NODE_IP, NODE_IP6, OTHER_NODE = "192.0.2.1", "2001:db8::1", "192.0.2.2"
ONE, TWO, THREE = "10.244.0.1", "10.244.0.2", "10.244.0.3"
ONE6, TWO6 = "fd00:244::1", "fd00:244::2"
KINDS = ("tcp", "udp", "unconnected udp")
PORT = 80
#: What programs answer, the kernel before Linux 5.18 for them: there is nothing but EPERM then.
REFUSED, DROPPED = of_this_kernel("ECONNREFUSED"), of_this_kernel("EHOSTUNREACH")
NO_SERVICE = "ENETUNREACH"


def vips(number: int) -> tuple[str, str]:
    """The ClusterIPs of the test that has this number."""
    return f"10.96.1.{number}", f"fd00:96::1:{number}"


# -- who answers, and as whom ----------------------------------------------------------------------


class Answer(NamedTuple):
    """The address of the endpoint that was reached, and the peer that the client saw."""

    endpoint: str
    peer: tuple[str, int]


def _at_one_port(port: int) -> tuple[socket.socket, socket.socket, socket.socket]:
    """TCP, UDP, UDP of IPv6. A port that is free in TCP, for 0, may be taken in UDP."""
    while True:
        with ExitStack() as stack:
            stream = stack.enter_context(
                socket.create_server(
                    ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512
                )
            )
            found = stream.getsockname()[1]
            udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            udp.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO
            udp6 = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
            udp6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            udp6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            try:
                udp.bind(("0.0.0.0", found))
                udp6.bind(("::", found))
            except OSError:
                if port:
                    raise
                continue
            stack.pop_all()
            return stream, udp, udp6


class Everywhere:
    """A server at every local address of the namespace that it was made in, TCP and UDP at one
    port: it answers with the address that was dialled."""

    def __init__(self, port: int = 0) -> None:
        self._stream, self._udp, self._udp6 = _at_one_port(port)
        self.port: int = self._stream.getsockname()[1]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            for each in (self._stream, self._udp, self._udp6):
                each.setblocking(False)
                selector.register(each, selectors.EVENT_READ)
            while not self._stopped.is_set():
                for key, _ in selector.select(0.05):
                    with suppress(OSError):
                        self._answer(key.fileobj)

    def _answer(self, server: Any) -> None:
        if server is self._stream:
            accepted, _ = server.accept()
            with accepted:
                accepted.send(accepted.getsockname()[0].removeprefix("::ffff:").encode())
            return
        _, ancillary, _, source = server.recvmsg(64, 128)
        level, kind, data = ancillary[0]
        if server is self._udp:
            text = socket.inet_ntop(socket.AF_INET, data[8:12])
        else:
            text = socket.inet_ntop(socket.AF_INET6, data[:16])
        # With its IP_PKTINFO the answer leaves from the address that was asked.
        server.sendmsg([text.encode()], [(level, kind, data)], 0, source)

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        for each in (self._stream, self._udp, self._udp6):
            each.close()


def ask(host: str, port: int = PORT, kind: str = "tcp") -> Answer | str:
    """What a new socket of this thread's namespace gets there: an answer, or an errno's name."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(
        family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM
    ) as client:
        # Nobody tells an unconnected socket that no one is there: it waits for all of it.
        client.settimeout(5 if kind == "unconnected udp" else 30)
        try:
            if kind == "unconnected udp":
                client.sendto(b"?", (host, port))
            else:
                client.connect((host, port))
                if kind == "udp":
                    client.send(b"?")
            data, source = client.recvfrom(64)
            if kind != "unconnected udp":
                peer = client.getpeername()
                assert kind == "tcp" or source[:2] == peer[:2]
                source = peer
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
        return Answer(data.decode(), (source[0], source[1]))


def everything(four: str, six: str, port: int = PORT) -> dict[str, Answer | str]:
    """That of IPv4, IPv6 and IPv4-mapped with every kind of socket."""
    hosts = {"IPv4": four, "IPv6": six, "IPv4-mapped": f"::ffff:{four}"}
    return {
        f"{name} {kind}": ask(host, port, kind) for name, host in hosts.items() for kind in KINDS
    }


def expected(
    four: str, six: str, by_four: str, by_six: str, port: int = PORT
) -> dict[str, Answer | str]:
    """What `everything` gives if these endpoints answer, or these are the errors."""

    def one(endpoint: str, host: str) -> Answer | str:
        return endpoint if endpoint.startswith("E") else Answer(endpoint, (host, port))

    hosts = {
        "IPv4": (by_four, four),
        "IPv6": (by_six, six),
        "IPv4-mapped": (by_four, f"::ffff:{four}"),
    }
    return {f"{name} {kind}": one(*where) for name, where in hosts.items() for kind in KINDS}


def become(four: str, six: str, by_four: str, by_six: str, what: str, port: int = PORT) -> None:
    """Waits until every kind of socket gets this, and only this."""
    want = expected(four, six, by_four, by_six, port)
    with suppress(AssertionError):
        until(lambda: everything(four, six, port) == want, what)
    assert everything(four, six, port) == want, what


def reached(host: str, port: int = PORT, kind: str = "tcp", times: int = 24) -> set[str]:
    """The endpoints, or errors, of that many new sockets."""
    answers = {ask(host, port, kind) for _ in range(times)}
    return {a if isinstance(a, str) else a.endpoint for a in answers}


def reaches(host: str, *endpoints: str, port: int = PORT) -> None:
    """Waits until new connections get these endpoints, each of them and no other."""
    until(lambda: reached(host, port) == set(endpoints), f"{host} leads to {endpoints}")


# -- the node --------------------------------------------------------------------------------------


class Home(AgentProcess):
    """A node whose agent is started again only when a test wants other options."""

    def __init__(self, directory: Path, cgroup: Path, name: str, servers: Everywhere) -> None:
        super().__init__(directory, cgroup, name)
        self.servers = servers
        self._options: tuple[str, ...] | None = None

    def use(self, *options: str) -> None:
        if options == self._options:
            return
        if self._options is not None:
            self.stop()
        self._options = options
        cidrs = ("--service-cidr", "10.96.0.0/16", "--service-cidr", "fd00:96::/112")
        self.start("--node-name", "here", *cidrs, *options)

    def members(
        self, service: str, *found: tuple[str, dict[str, Any]], family: str = "IPv4", name: str = ""
    ) -> None:
        """Replaces one EndpointSlice of a Service."""
        name = name or f"{service}-{family.lower()}"
        text = slice_of(service, found, self.servers.port, name=name, family=family)
        self.write(f"{name}.yaml", text)

    def here(self, *, zone: str = "") -> None:
        """The Node object of this node."""
        self.write("node-here.yaml", node_of("here", NODE_IP, NODE_IP6, zone=zone))

    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.cli("status", "-o", "json", check=False).stdout)
        return found


@contextmanager
def device_address(address: str) -> Iterator[None]:
    length = "128" if ":" in address else "32"
    more = ["nodad"] if ":" in address else []
    run("ip", "addr", "add", f"{address}/{length}", "dev", "lo", *more)
    try:
        yield
    finally:
        run("ip", "addr", "del", f"{address}/{length}", "dev", "lo")
