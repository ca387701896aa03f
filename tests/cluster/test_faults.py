"""The agent behind a proxy that does what networks, balancers and API servers do on bad days.

One agent bears it all. After each fault the maps are what the objects say, nobody lost a connection
to a Service that did not change, and the agent has no more threads and files than before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count, pairwise
from pathlib import Path

import pytest

from tests.cluster.accounts import Account
from tests.cluster.clients import Client, Loop
from tests.cluster.cluster import Cluster
from tests.cluster.faultproxy import (
    Fault,
    FaultProxy,
    Rule,
    answer,
    cut,
    drip,
    ends_at_once,
    expired,
    half,
    mute,
    one_event,
    raw,
    stall,
)
from tests.cluster.network import PLANE
from tests.cluster.nodes import Agent
from tests.cluster.pki import Pki
from tests.cluster.pods import Pod
from tests.cluster.space import Service, Space
from tests.cluster.waiting import tail, wait_for
from tests.support.kernel import until

pytestmark = pytest.mark.cluster

CHANGING = {"services", "endpointslices"}
RESOURCES = {*CHANGING, "nodes", "pods", "namespaces", "servicecidrs"}
_FILES, _KILOBYTES = 24, 64 << 10  # what an agent may have more of than at first
_numbers = count(1)


class World:
    """An agent on node-a behind a proxy, a Service `web` that never changes with clients in loops,
    and Services that change."""

    def __init__(self, cluster: Cluster, space: Space, proxy: FaultProxy, account: Account) -> None:
        self.cluster, self.space, self.proxy, self.account = cluster, space, proxy, account
        self.agent: Agent = cluster.agent("node-a", account.kubeconfig(proxy.url))
        self.agent.start()
        self.pods: list[Pod] = space.deploy("web", 2, node="node-b")
        inside = space.deploy("inside", node="node-a")[0]
        self.web = space.service("web")
        space.wait_endpoints("web", self.pods)
        self.client: Client = cluster.client("node-a")
        self.moving = space.service("moving", selector=None, ipFamilyPolicy="SingleStack")
        self._at = 0
        self._extra: Service | None = None
        self.move()
        self.loops: list[Loop] = []
        for client in (cluster.client("node-a"), cluster.client(inside)):
            for ip, protocol in zip(self.web.ips, ("tcp", "udp"), strict=True):
                until(partial(self._served, client, ip, protocol), f"{ip} {protocol}")
                self.loops.append(client.loop(ip, 80, protocol, threads=1, pause=0.02))
        self.files, self.threads, self.kilobytes = self.used()
        self.told = self.log().count("Traceback")

    def _served(self, client: Client, ip: str, protocol: str) -> bool:
        return not client.connect(ip, 80, protocol, timeout=1).error

    # -- changes -------------------------------------------------------------------------------

    def move(self) -> None:
        """The endpoint of `moving` becomes the other pod; a Service comes, the one before goes."""
        self._at = 1 - self._at
        self.space.apply(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": "moving", "labels": {"kubernetes.io/service-name": "moving"}},
                "addressType": "IPv4",
                "ports": [{"name": "tcp", "port": 8080, "protocol": "TCP"}],
                "endpoints": [{"addresses": [self.pods[self._at].ip]}],
            }
        )
        if self._extra:
            self.space.delete("Service", self._extra.name)
        name = f"extra-{next(_numbers)}"
        self._extra = self.space.service(name, selector=None, ipFamilyPolicy="SingleStack")

    def moved(self) -> bool:
        """Whether the last change is in force."""
        assert self._extra
        here = self.client.connect(self.moving.ip, 80, timeout=1).pod == self.pods[self._at].name
        refused = self.client.connect(self._extra.ip, 80, timeout=0.3).error == "ECONNREFUSED"
        return here and refused

    def moves(self) -> None:
        """Until the last change is in force."""
        logs = partial(tail, self.agent.log, 30)
        wait_for(self.moved, "the last change in the maps", 60, logs=logs)

    # -- looking -------------------------------------------------------------------------------

    def log(self) -> str:
        return self.agent.log.read_text()

    def used(self) -> tuple[int, int, int]:
        """Open files, threads and resident memory in kB of the agent."""
        assert self.agent.process
        process = Path(f"/proc/{self.agent.process.pid}")
        said = dict(
            line.split(":", 1) for line in (process / "status").read_text().splitlines() if line
        )
        return (
            len(list((process / "fd").iterdir())),
            int(said["Threads"]),
            int(said["VmRSS"].removesuffix("kB")),
        )

    def verified(self) -> bool:
        return self.agent.cli("verify").returncode == 0

    def check(self) -> None:
        """Nothing is amiss any more, and nothing was lost on the way."""
        logs = partial(tail, self.agent.log, 30)
        wait_for(self.verified, "maps that are what the objects say", 60, logs=logs)
        assert self.agent.process and self.agent.process.poll() is None, logs()
        assert self.log().count("Traceback") == self.told, logs()
        until(lambda: self.used()[1] <= self.threads, f"{self.threads} threads, no more")
        files, _, kilobytes = self.used()
        assert files <= self.files + _FILES
        assert kilobytes <= self.kilobytes + _KILOBYTES
        for loop in self.loops:
            so_far = loop.so_far()
            assert not so_far.errors
            assert so_far.pods

    def followed(self) -> bool:
        return bool(self.agent.status().get("source", {}).get("reachable"))


@pytest.fixture(scope="module")
def running(cluster: Cluster) -> Iterator[World]:
    with ExitStack() as stack:
        proxy = stack.enter_context(FaultProxy(cluster.plane))
        space = cluster.space("faults")
        stack.callback(space.close)
        stack.callback(cluster.reset)
        account = Account(cluster.plane, space, cluster.lab.directory / "account")
        yield World(cluster, space, proxy, account)


@pytest.fixture
def world(running: World) -> Iterator[World]:
    """What is amiss afterwards fails the test."""
    assert running.agent.process and running.agent.process.poll() is None, "the agent has ended"
    yield running
    running.move()  # by an event: failures no longer count as in a row
    running.moves()
    running.check()


def meet(world: World, fault: Fault, verb: str) -> None:
    """Has the resources that change meet the fault once, while they do."""
    with ExitStack() as stack:
        rule = stack.enter_context(world.proxy.fault(fault, verb, CHANGING, times=1))
        if verb == "list":
            stack.enter_context(world.proxy.fault(expired, "watch", CHANGING, times=1))
        world.proxy.cut(*CHANGING)
        world.move()
        wait_for(
            lambda: set(rule.hits) == CHANGING, "the fault", 60, logs=partial(tail, world.agent.log)
        )
        if fault in (stall, mute):
            world.proxy.cut(*CHANGING)  # nothing else ends it for minutes
    world.moves()
    world.move()  # by an event: failures no longer count as in a row
    world.moves()


LIST = b'{"kind":"List","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":['
EVENT = b'{"type":"ADDED","object":{"metadata":{"name":"x"'
HEADER = b"HTTP/1.1 200 OK\r\n"
BROKEN: dict[str, Fault] = {
    "cut": cut,
    "half": half,
    "drip": drip,
    "stall": stall,
    "mute": mute,
    "nothing": raw(b""),
}
GARBAGE: dict[str, Fault] = {
    "no HTTP": raw(b"\x15\x03\x01\x00\x02\x02\x16\r\n\r\n"),
    "a header without end": raw(HEADER + b"X: " + b"x" * 200_000 + b"\r\n\r\n"),
    "a bad length": raw(HEADER + b"Content-Length: much\r\n\r\n"),
    "a bad chunk": raw(HEADER + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"),
    "bad gzip": answer(200, b"no gzip at all\n", "Content-Encoding: gzip"),
    "nothing": answer(200),
    "HTML": answer(200, b"<html>Please log in</html>\n"),
    "null": answer(200, b"null\n"),
    "a list of no UTF-8": answer(200, LIST.replace(b'"1"', b'"\xff"') + b"]}\n"),
    "an event of no UTF-8": answer(200, EVENT.replace(b'"x"', b'"\xff"') + b"}}}\n"),
    "a deep list": answer(200, LIST + b"[" * 100_000),
    "a deep event": answer(200, EVENT + b',"labels":' + b"[" * 100_000 + b"\n"),
}
REFUSALS: dict[str, Fault] = {
    "204": answer(204),
    "302": answer(302, b"", "Location: https://192.0.2.99/"),
    "400": answer(400, b"{}"),
    "401": answer(401, b'{"kind":"Status","code":401,"message":"no"}'),
    "429": answer(429, b"slow down", "Retry-After: 1"),
    "429 until a date": answer(429, b"", "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT"),
    "500": answer(500, b'{"kind":"Status","code":500,"message":"etcdserver: leader changed"}'),
    "503": answer(503, b'{"message":"\xff"}'),
    "504": answer(504, b'{"kind":"Status","reason":"Timeout","code":504}'),
}


@pytest.mark.parametrize("verb", ["watch", "list"])
@pytest.mark.parametrize(
    "faults", [BROKEN, GARBAGE, REFUSALS], ids=["broken", "garbage", "refusals"]
)
def test_what_goes_wrong_once_is_got_over(
    world: World, faults: dict[str, Fault], verb: str
) -> None:
    for name, fault in faults.items():
        with noted(f"{verb}: {name}"):
            meet(world, fault, verb)


@contextmanager
def noted(what: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(what)
        raise


# -- for a while -----------------------------------------------------------------------------------


def waits(rule: Rule, times: int) -> list[tuple[float, ...]]:
    """Seconds between the tries of each resource, of so many."""
    return [
        tuple(later - at for at, later in pairwise(tries[:times])) for tries in rule.at.values()
    ]


def test_tries_are_spaced_and_not_in_step(world: World) -> None:
    """Of four tries the waits are up to 0.8, 1.6 and 3.2 s, by chance: all of two resources are
    within 10 ms of each other once in 300,000 runs."""
    with world.proxy.fault(answer(503), resources=CHANGING) as rule:
        world.proxy.cut(*CHANGING)
        world.move()
        until(lambda: all(rule.hits[name] >= 4 for name in CHANGING), "four tries of each", 60)
    one, other = waits(rule, 4)
    assert sum(one) + sum(other) > 0.2
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.01
    world.moves()


def test_a_server_that_asks_for_time_gets_it(world: World) -> None:
    with world.proxy.fault(answer(429, b"", "Retry-After: 2"), "watch", CHANGING, 2) as rule:
        world.proxy.cut(*CHANGING)
        world.move()
        world.moves()
    assert all(at[1] - at[0] >= 2 for at in rule.at.values())


def test_nobody_there_for_a_while_is_told_and_no_storm(world: World) -> None:
    before = world.proxy.count()
    world.proxy.refuse()
    world.move()
    until(lambda: not world.followed(), "a status that says so", 60)
    until(lambda: "refused" in str(world.agent.status()["source"]["error"]), "the reason", 60)
    world.proxy.listen()
    world.moves()
    until(world.followed, "a status that is well", 60)
    assert (world.proxy.count() - before).total() <= 4 * len(RESOURCES)


def test_a_watch_that_ends_after_each_event_loses_none(world: World) -> None:
    with world.proxy.fault(one_event, "watch", CHANGING) as rule:
        world.proxy.cut(*CHANGING)
        for _ in range(5):
            world.move()
            world.moves()
    # Of each move two events of Services, one of slices; the controller adds some of its own.
    assert rule.hits.total() <= 40


def test_watches_that_end_at_once_are_no_storm(world: World) -> None:
    with world.proxy.fault(ends_at_once, "watch", CHANGING) as rule:
        world.proxy.cut(*CHANGING)
        until(lambda: all(rule.hits[name] >= 3 for name in CHANGING), "three tries of each", 60)
    assert sum(map(sum, waits(rule, 3))) > 0.2
    world.move()
    world.moves()


def test_what_is_silent_is_asked_whether_it_lives(world: World) -> None:
    """By TCP keepalive, for a machine that is gone says nothing."""
    port = world.proxy.url.rpartition(":")[2]

    def kept() -> bool:
        """While something is under way it is another timer that runs."""
        command = ("ss", "-tnoH", "state", "established", "dst", PLANE.v4)
        found = world.client.run(*command).stdout.splitlines()
        lines = [line for line in found if f":{port} " in line]
        return len(lines) >= len(RESOURCES) and all("timer:(keepalive," in e for e in lines)

    until(kept, "keepalive of all watches")


# -- who one is ------------------------------------------------------------------------------------


def test_a_token_that_ended_is_read_again_from_its_file(world: World) -> None:
    account = world.account
    account.write(account.token(bound_to="passing"))
    with world.proxy.fault(answer(401), times=1):  # which has it read
        world.proxy.cut()
        until(lambda: world.proxy.requests[-1].token == account.token_file.read_text(), "it")
        world.move()
        world.moves()
    account.revoke("passing")
    refused = world.proxy.statuses[401]
    world.proxy.cut()
    until(lambda: world.proxy.statuses[401] > refused, "a refusal", 60)
    account.write(account.token())
    world.move()
    world.moves()


def test_a_certificate_that_is_renewed_is_no_matter(world: World) -> None:
    world.proxy.present(world.cluster.plane.pki.server("renewed.faultproxy", PLANE.v4))
    world.proxy.cut()
    world.move()
    world.moves()


def test_an_authority_that_is_replaced_in_its_file_is_trusted(world: World, tmp_path: Path) -> None:
    """A cluster's CA is rotated: kubelets and pods get a new bundle, then servers certificates."""
    other, file = Pki(tmp_path / "other"), world.account.authority_file
    old = file.read_bytes()
    world.proxy.present(other.server("other.faultproxy", PLANE.v4))
    world.proxy.cut()
    until(lambda: "certificate" in str(world.agent.status()["source"]["error"]), "a doubt", 60)
    file.write_bytes(old + other.authority.read_bytes())
    world.move()
    try:
        world.moves()
    finally:
        world.proxy.present(world.cluster.plane.pki.server("renewed.faultproxy", PLANE.v4))
        world.proxy.cut()
        file.write_bytes(old)


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [mute, stall, drip])
def test_a_request_that_hangs_does_not_keep_an_agent_from_ending(
    world: World, fault: Fault
) -> None:
    assert world.agent.process
    with world.proxy.fault(fault) as rule:
        world.proxy.cut()
        until(lambda: set(rule.hits) == RESOURCES, "all to hang", 60)
        world.agent.stop()
    assert world.agent.process.returncode == 0
    world.agent.start()
