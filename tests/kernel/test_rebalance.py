"""Connections that stay open for long are ended for endpoints that joined, and no others."""

from __future__ import annotations

import errno
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import pytest

from pointsman import abi, netns, rebalancer
from pointsman.drainsets import Asked, sets_of
from pointsman.objects import Ref
from pointsman.rebalance import Drains, Progress
from pointsman.rebalancer import Drained, Rebalancer
from pointsman.stale import Record
from pointsman.values import PortName
from tests.kernel.home import ONE, THREE, TWO
from tests.kernel.test_choice import AVOID, POLICY, SECOND, WATCH
from tests.support.agents import AgentProcess, endpoints, service
from tests.support.kernel import TCP, Lab, entry, needs_linux, until, wildcard
from tests.support.longlived import PORT, Clients, Servers
from tests.support.pods import Pod, cookie_of

pytestmark = pytest.mark.kernel

WEB = Ref("Service", "default", "web")
VIP, OTHER = "10.96.0.1", "10.96.0.2"
SIX = ("fd00:244::1", "fd00:244::2", "fd00:244::3")
LEAST = abi.constants()["ALGORITHM_LEAST_CONNECTIONS"]
FAMILIES = [
    pytest.param(socket.AF_INET, VIP, VIP, (ONE, TWO, THREE), id="IPv4"),
    pytest.param(socket.AF_INET6, "fd00:96::1", "fd00:96::1", SIX, id="IPv6"),
    pytest.param(socket.AF_INET6, VIP, f"::ffff:{VIP}", (ONE, TWO, THREE), id="IPv4-mapped"),
]


class Thread:
    """The rebalancer's, with what it told and when it ended what."""

    def __init__(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        self._lab = lab
        self.told: list[Drained] = []
        self.times: list[tuple[float, int]] = []

        drains = Drains(settle=600)
        take = drains.take

        def taken(now: float, tick: float) -> dict[Ref, list[Record]]:
            found = take(now, tick)
            if found:
                self.times.append((now, len(found[WEB])))
            return found

        monkeypatch.setattr(drains, "take", taken)
        self.looks: list[float] = []
        look = drains.look
        monkeypatch.setattr(
            drains, "look", lambda *found: (self.looks.append(found[2]), look(*found))
        )
        self._one = Rebalancer(lab.maps.directory, self.told.append, drains)
        self._thread = threading.Thread(target=self._one.run)
        self._thread.start()

    def follow(self, rate: float | None) -> None:
        """What the lab's Service has now."""
        asked = None
        if rate:
            entries = self._lab.wanted[WEB]
            asked = Asked(rate, sets_of(entries, self._lab.planner.endpoints))
        self._one.follow({WEB: asked})

    @property
    def closed(self) -> int:
        return sum(each.closed for each in self.told)

    @property
    def over(self) -> list[Progress]:
        return [each.services[WEB] for each in self.told if WEB in each.services and
                each.services[WEB].over]  # fmt: skip

    def close(self) -> None:
        self._one.stop()
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()


@pytest.fixture
def stack(lab: Lab) -> Iterator[ExitStack]:
    with ExitStack() as found:
        servers = Servers()
        found.callback(servers.close)
        yield found


def serve(lab: Lab, *addresses: str, vip: str = VIP, name: str = "web", **more: object) -> None:
    owner = PortName("default", name, "p")
    found = entry(
        vip, 80, TCP, [(a, PORT) for a in addresses], owner, **{"algorithm": LEAST, **more}
    )
    lab.set(name, found, wildcard(vip, owner))


def endpoint_of(lab: Lab) -> Callable[[socket.socket], str]:
    """As the programs recorded it."""
    return lambda client: lab.peer_of(cookie_of(client)).rpartition(":")[0].strip("[]")


def clients(
    lab: Lab, stack: ExitStack, count: int, dialled: str = VIP, family: int = socket.AF_INET
) -> Clients:
    found = Clients(family, dialled, endpoint_of(lab))
    stack.callback(found.close)
    found.open(count)
    return found


def thread(lab: Lab, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> Thread:
    found = Thread(lab, monkeypatch)
    stack.callback(found.close)
    return found


def settle(drain: Thread, clients: Clients) -> None:
    """Until nothing is left to end of what was seen after all clients have come back."""
    since: dict[int, int] = {}  # looks when so many had come back

    def settled() -> bool:
        clients.come_back()
        back, looks = clients.errors.total(), len(drain.looks)
        again = looks - since.setdefault(back, looks)
        progress = drain.told[-1].services.get(WEB) if drain.told else None
        return bool(drain.over) or bool(
            progress and not progress.left and back == drain.closed and again >= 2
        )

    # A look rests twenty times as long as it took: on a slow machine that adds up.
    until(settled, "the end of the drain", 200)


@pytest.mark.parametrize(("family", "vip", "dialled", "endpoints"), FAMILIES)
def test_an_endpoint_that_joins_gets_its_share_of_what_is_open(
    lab: Lab,
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    family: int,
    vip: str,
    dialled: str,
    endpoints: tuple[str, str, str],
) -> None:
    one, two, three = endpoints
    serve(lab, one, two, vip=vip)
    serve(lab, one, two, vip=OTHER, name="other")
    drain = thread(lab, stack, monkeypatch)
    drain.follow(100)
    found = clients(lab, stack, 60, dialled, family)
    others = clients(lab, stack, 40, OTHER) if "." in one else None
    assert found.counts.keys() == {one, two}
    before = others and others.counts
    serve(lab, one, two, three, vip=vip)
    serve(lab, one, two, three, vip=OTHER, name="other")
    drain.follow(100)
    settle(drain, found)
    counts = found.counts
    assert sum(counts.values()) == 60 and 18 <= counts[three] <= 22, counts
    # What their programs get.
    assert set(found.errors) == {"ECONNABORTED"}
    # Of three, the one with the fewest is among the two that are looked at in two cases of three.
    assert 18 <= sum(found.errors.values()) == drain.closed <= 60
    if others:
        others.come_back()
        assert not others.errors and others.counts == before
    assert drain.told[-1].services[WEB] == Progress(drain.closed, 0, 100)


def test_connections_of_pods_are_ended_in_their_namespaces(
    lab: Lab, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_linux(5, 14, "SO_NETNS_COOKIE")
    serve(lab, ONE, TWO)
    drain = thread(lab, stack, monkeypatch)
    drain.follow(100)
    pod = stack.enter_context(Pod())
    # A namespace is found by its processes.
    process = pod.run(subprocess.Popen, ["sleep", "600"])
    stack.callback(process.wait)
    stack.callback(process.kill)
    inside = pod.run(Servers)
    stack.callback(inside.close)
    found = Clients(socket.AF_INET, VIP, endpoint_of(lab))
    found.run = pod.run
    stack.callback(found.close)
    pod.run(found.open, 30)
    serve(lab, ONE, TWO, THREE)
    drain.follow(100)
    settle(drain, found)
    assert 9 <= found.counts[THREE] <= 11 and set(found.errors) == {"ECONNABORTED"}


def test_no_more_are_ended_in_a_time_than_asked_for(
    lab: Lab, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(lab, ONE, TWO)
    drain = thread(lab, stack, monkeypatch)
    drain.follow(5)
    found = clients(lab, stack, 18)
    serve(lab, ONE, TWO, THREE)
    drain.follow(5)
    settle(drain, found)
    assert drain.closed >= 6
    # More at a time, where finding a socket takes long. However slow we are, there are never more
    # since the first one than the rate has in that time.
    began, total = drain.times[0][0], 0
    for now, count in drain.times:
        total += count
        assert total <= 5 * (now - began) + 1 + 1e-6


def test_who_did_not_ask_keeps_all_and_who_asks_no_more_the_rest(
    lab: Lab, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(lab, ONE)
    drain = thread(lab, stack, monkeypatch)
    found = clients(lab, stack, 20)
    serve(lab, ONE, TWO)
    # All that it has when it begins to ask is old. It asks for little: what is left must not have
    # ended, too, before it asks for nothing.
    drain.follow(0.05)
    drain.follow(0.05)
    serve(lab, ONE, TWO, THREE)
    drain.follow(0.05)
    until(lambda: drain.closed, "the first one")
    drain.follow(None)
    settle(drain, found)
    [over] = drain.over
    assert over.over == "stopped" and over.left > 0
    closed = drain.closed
    found.come_back()
    assert sum(found.errors.values()) == closed == over.closed
    assert found.counts[ONE] >= 20 - closed


def test_what_is_ended_is_no_failure_of_its_endpoint(lab: Lab) -> None:
    """The servers say nothing: by its end alone such a connection looks like one that was reset."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        stack.callback(Servers().close)
        serve(lab, ONE)
        drain = thread(lab, stack, patch)
        drain.follow(1000)
        found = clients(lab, stack, 40)
        before = lab.maps.counters()["connect_failed"]
        serve(lab, ONE, TWO)
        drain.follow(1000)
        settle(drain, found)
        assert drain.closed >= 18
        seen = lab.maps.outcomes(lab.endpoint_id(ONE, PORT))
        assert (seen.failures, seen.streak) == (0, 0)
        assert lab.maps.counters()["connect_failed"] == before


def test_only_what_the_service_led_there_is_ended(
    lab: Lab, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some dial the endpoint itself, some were led there by another Service."""
    serve(lab, ONE)
    drain = thread(lab, stack, monkeypatch)
    drain.follow(1000)
    found = clients(lab, stack, 10)
    direct = [stack.enter_context(socket.create_connection((ONE, PORT))) for _ in range(10)]
    serve(lab, ONE, vip=OTHER, name="other")
    other = clients(lab, stack, 10, OTHER)
    serve(lab, ONE, TWO)
    drain.follow(1000)
    settle(drain, found)
    assert 4 <= found.counts[ONE] <= 6
    assert other.counts == {ONE: 10}
    for each in direct:
        assert each.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0 and each.getpeername()


def test_an_endpoint_that_is_ejected_has_no_share(
    lab: Lab, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_linux(5, 12, "compare-and-swap in programs, for ejection")
    long = replace(WATCH, streak=1, shortest=600 * SECOND, longest=600 * SECOND)
    more = {"algorithm": LEAST | POLICY | AVOID, "policy": long}
    serve(lab, ONE, TWO, **more)
    drain = thread(lab, stack, monkeypatch)
    drain.follow(1000)
    found = clients(lab, stack, 20)
    dead = [(ONE, PORT), (TWO, PORT), (THREE, PORT + 1)]  # nobody listens there
    owner = PortName("default", "web", "p")
    lab.set("web", entry(VIP, 80, TCP, dead, owner, **more), wildcard(VIP, owner))

    def refused() -> bool:
        with socket.socket() as client:
            return client.connect_ex((VIP, 80)) != 0

    until(refused, "an ejection")
    before = len(drain.looks)
    drain.follow(1000)
    until(lambda: len(drain.looks) >= before + 3, "looks")
    found.come_back()
    assert not found.errors and drain.closed == 0


def test_where_the_kernel_ends_no_sockets_it_is_said_and_not_tried_for_ever(
    lab: Lab, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[object] = []

    def refuse(records: object, _: object) -> netns.Ended:
        tries.append(records)
        return netns.Ended([], OSError(errno.EOPNOTSUPP, "not built in"), [])

    serve(lab, ONE)
    monkeypatch.setattr(rebalancer.netns, "destroy", refuse)
    one = thread(lab, stack, monkeypatch)
    one.follow(5)
    found = clients(lab, stack, 20)
    serve(lab, ONE, TWO)
    one.follow(5)
    settle(one, found)
    assert [each.over for each in one.over] == ["failed"] and len(tries) == 1
    assert "CONFIG_INET_DIAG_DESTROY" in one.told[-1].problem
    found.come_back()
    assert not found.errors


def test_after_a_restart_of_the_agent_what_is_left_stays(node: AgentProcess) -> None:
    annotated = service("web", VIP).replace(
        "metadata: {name: web}",
        "metadata: {name: web, annotations: {pointsman.io/drain: 1/s}}",
    )
    node.write("web.yaml", annotated)
    node.write("web-1.yaml", endpoints("web", (ONE, PORT)))
    node.start()
    with closing(Servers(greet=True)):
        found = Clients(socket.AF_INET, VIP, lambda client: client.recv(64).decode())
        with closing(found):
            found.open(30)
            node.write("web-1.yaml", endpoints("web", (ONE, PORT), (TWO, PORT)))
            until(lambda: found.come_back() or found.errors, "the first one that is ended")
            node.kill()
            node.start()
            # What came in between is taken in, and nothing is ended by the new agent.
            found.come_back()
            before = found.errors.total()
            node.write("other.yaml", service("other", OTHER))
            until(lambda: "Service" in node.status()["source"]["objects"], "its objects")
            until(lambda: node.status()["balanced"] == 2, "another Service")
            found.come_back()
            assert 0 < found.errors.total() == before < 15
            assert node.status()["drains"]["services"] == {}
