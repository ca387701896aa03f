"""Rules whose window is nanoseconds wide, with a delay in the program that holds it open.

Each race is run with the rule (never a wrong result) and without (a wrong result soon).
"""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pointsman import abi
from pointsman.dump import first_place
from pointsman.maps import apply
from pointsman.marks import bit_of
from pointsman.objects import Ref
from pointsman.plan import Plan
from pointsman.values import TCP, UDP, Entry, Frontend, PortName, to_address
from tests.support.kernel import Lab, entry, tcp_server, udp_server

pytestmark = pytest.mark.kernel

VIP = ("10.96.0.1", 80)
WEB, OTHER = PortName("default", "web", "p"), PortName("default", "other", "p")


def hold(rounds: int) -> str:
    """C that takes 150 ns a round. The verifier walks through every round in every state that
    reaches it, and gives up after a million instructions: fewer rounds where many states do."""
    return (
        f"{{ __u64 d_ = 1; __u32 v_ = 1; for (int i_ = 0; i_ < {rounds}; i_++)"
        " overflow_netns.update(&d_, &v_); }"
    )


HOLD = hold(4500)
TRIES_WITH = 60
PATIENCE = 90.0  # seconds; with the rule taken out the wrong result comes within one, most often
_moments = random.Random(1)

Labs = Callable[..., Lab]
Sources = Callable[..., Path]


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """`work` on another thread and another CPU; the body runs at some moment around the time the
    program is held up: how long a thread takes to get there differs, so the moment does as well.
    On one CPU nothing would run beside a program."""
    cpus = os.sched_getaffinity(0)

    def elsewhere() -> None:
        os.sched_setaffinity(0, {max(cpus)})
        work()

    thread = threading.Thread(target=elsewhere)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        thread.start()
        time.sleep(_moments.uniform(0, 0.002))
        yield
        thread.join()
    finally:
        os.sched_setaffinity(0, cpus)


def dial(address: tuple[str, int] = VIP) -> None:
    with socket.socket() as client:
        client.settimeout(60)
        client.connect_ex(address)


def accepted(server: socket.socket) -> int:
    """How many connections had come in; ends them."""
    server.setblocking(False)
    found = 0
    try:
        while True:
            server.accept()[0].close()
            found += 1
    except BlockingIOError:
        return found


def plan(lab: Lab, name: str, *entries: Entry) -> Plan:
    return lab.planner.update({Ref("Service", "default", name): entries})


def web(*backends: tuple[str, int]) -> Entry:
    return entry(*VIP, TCP, backends, WEB)


def other(*backends: tuple[str, int]) -> Entry:
    return entry("10.96.0.9", 80, TCP, backends, OTHER)


def soon(attempt: Callable[[], bool]) -> bool:
    """Whether the wrong result came at all. A machine that gives us one CPU for a while lets
    nothing meet: tries don't count, time does."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if attempt():
            return True
    return False


def stays(wrong: Callable[[], bool], patience: float) -> bool:
    """Whether a count is wrong for good: a busy kernel closes connections a little later. That is
    waited for with patience where it must come right."""
    until = time.monotonic() + patience
    while wrong():
        if time.monotonic() > until:
            return True
        time.sleep(0.005)
    return False


def never(attempt: Callable[[], bool]) -> bool:
    return not any(attempt() for _ in range(TRIES_WITH))


def test_slots_are_used_again_only_after_a_grace_period(
    fresh_lab: Labs, changed_source: Sources
) -> None:
    """Between reading the set and reading the slot, another Service's slot may come to stand
    there: the connection would reach a stranger."""
    load_slot = "\tslot = choose(ctx, &of, vip.addr, random_of(cookie, bucket));"
    lab = fresh_lab(source=changed_source(("sock.c", load_slot, f"\t{HOLD}\n{load_slot}")))
    with tcp_server() as (right, port), tcp_server() as (wrong, wrong_port):

        def stray(wait: bool) -> bool:
            lab.clear()
            lab.set("web", web(("127.0.0.1", port)))
            leave = plan(lab, "web", web(("127.0.0.1", port), ("127.0.0.2", port)))
            with meanwhile(dial):
                apply(leave, lab.maps)
                if wait:
                    lab.maps.wait_for_readers()
                lab.planner.reclaim(leave.garbage)
                reuse = plan(lab, "other", other(("127.0.0.1", wrong_port)))
                assert reuse.slots[0][0] == leave.garbage.extents[0][0], "another slot was taken"
                apply(reuse, lab.maps)
            accepted(right)
            return accepted(wrong) > 0

        assert never(lambda: stray(wait=True))
        assert soon(lambda: stray(wait=False))


def test_a_set_is_switched_by_one_store(lab: Lab) -> None:
    """Written in two halves, a reader in between meets the slots of others."""
    with tcp_server() as (right, port), tcp_server() as (wrong, wrong_port):
        many = [(f"127.0.0.{n}", port) for n in range(1, 9)]
        lab.set("web", web(*many))
        moved = plan(lab, "web", web(many[0]))
        strangers = plan(lab, "other", other(*[(f"127.0.0.{n}", wrong_port) for n in range(1, 9)]))
        apply(strangers, lab.maps)
        (service, value), moved.sets = moved.sets[0], []
        apply(moved, lab.maps)
        # The slots are written. Now the lower half of the set alone, as two stores would do.
        before = lab.maps.service(service)
        lab.maps.switch(service, before.count << 32 | value & 0xFFFFFFFF)
        for _ in range(64):
            dial()
        assert accepted(wrong) > 0, "half a switch is the mixture that one store never shows"
        accepted(right)
        lab.maps.switch(service, value)
        for _ in range(64):
            dial()
        assert accepted(wrong) == 0


@pytest.mark.parametrize("rule", [True, False], ids=["with-key-copy", "without-key-copy"])
def test_a_service_is_recognised_by_its_own_key(
    fresh_lab: Labs, changed_source: Sources, rule: bool
) -> None:
    """A deleted element of the hash is used again at once: its reader sees another key's value."""
    text = (abi.source_directory() / "lookup.h").read_text()
    start = text.index("static __always_inline struct service *find_service(")
    rest = text[start:]
    function = rest[: rest.index("\n}\n") + 3]
    step = "\t*id = frontend->service;"
    # Held up where a connect looks first, not at every place where the function stands.
    held = function.replace("*find_service(", "*find_held(").replace(step, f"\t{HOLD}\n{step}")
    if not rule:
        held = held.replace("if (!service || !same_frontend(&service->key, key))", "if (!service)")
        assert "same_frontend" not in held
    first = "\tto->service = find_service(key, &to->id);"
    changes = [
        ("lookup.h", function, f"{function}\n{held}"),
        ("lookup.h", first, first.replace("find_service", "find_held")),
    ]
    lab = fresh_lab(source=changed_source(*changes))
    with tcp_server() as (_, port), tcp_server() as (wrong, wrong_port):

        def stray() -> bool:
            lab.clear()
            lab.set("web", web(("127.0.0.1", port)))
            gone = plan(lab, "web")
            come = [
                entry(f"10.96.1.{n}", 80, TCP, [("127.0.0.1", wrong_port)], OTHER)
                for n in range(1, 200)
            ]
            arrive = plan(lab, "other", *come)
            arrive.frontends, late = arrive.frontends[:0], arrive.frontends
            apply(arrive, lab.maps)
            # Out of turn: this plan counts on the one before it, which comes after.
            lab.maps.mark([(bit_of(to_address(VIP[0]), lab.maps.limits.marks) >> 6, (1 << 64) - 1)])
            with meanwhile(dial):
                lab.maps.delete_frontends(gone.deleted)
                lab.maps.add_frontends(late)
            gone.deleted = []
            apply(gone, lab.maps)
            lab.maps.wait_for_readers()
            lab.planner.reclaim(gone.garbage)
            return accepted(wrong) > 0

        assert never(stray) if rule else soon(stray)


def test_an_endpoint_id_is_used_again_only_after_a_grace_period(
    fresh_lab: Labs, changed_source: Sources
) -> None:
    """Between comparing the generation and adding, the id may come to mean another endpoint: the
    connection would be counted there, for ever."""
    add = "\t\t__sync_fetch_and_add(&load_of->open, 1);\n\t\trecord->counted |= COUNTED_OPEN;"
    lab = fresh_lab(source=changed_source(("record.h", add, f"\t\t{HOLD}\n{add}")))
    with tcp_server() as (server, port):

        def miscounted(wait: bool) -> bool:
            lab.clear()
            lab.set("web", web(("127.0.0.1", port)))
            ident = lab.endpoint_id("127.0.0.1", port)
            generation = lab.maps.load(ident)[0]
            with meanwhile(dial):
                lab.maps.set_generations([(ident, generation | 1 << 31, 0)])
                if wait:
                    lab.maps.wait_for_readers()
                lab.maps.set_generations([(ident, generation + 1, 0)])
            accepted(server)
            wrong = stays(lambda: lab.maps.load(ident)[1] != 0, 60 if wait else 3)
            lab.maps.set_generations([(ident, generation | 1 << 31, 0)])
            lab.maps.wait_for_readers()
            lab.maps.set_generations([(ident, generation, 0)])
            return wrong

        assert never(lambda: miscounted(wait=True))
        assert soon(lambda: miscounted(wait=False))


@pytest.mark.parametrize(
    "rule", [True, False], ids=["busy-while-written", "published-while-written"]
)
def test_a_record_is_marked_busy_while_it_is_written(
    fresh_lab: Labs, changed_source: Sources, rule: bool
) -> None:
    """Whoever scans the records passes over busy ones; else it sees half of two connections."""
    middle = "\tcopy_address(record->peer, slot->addr);\n\trecord->vip_port"
    changes = [("record.h", middle, f"\t{HOLD}\n{middle}")]
    if not rule:
        busy = "*(volatile __u64 *)found.cookie = cookie | COOKIE_BUSY;"
        changes.append(("sock.c", busy, ""))
    lab = fresh_lab(source=changed_source(*changes))
    with udp_server("127.0.0.1") as (_, one), udp_server("127.0.0.2") as (_, two):
        a = entry("10.96.0.1", 53, UDP, [("127.0.0.1", one)], WEB)
        b = entry("10.96.0.2", 53, UDP, [("127.0.0.2", two)], OTHER)
        lab.set("web", a)
        lab.set("other", b)
        whole = {(e.frontend.address, e.endpoints[0][0]) for e in (a, b)}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect(("10.96.0.1", 53))
            index = next(
                key for key, value in lab.maps.map("sockets").items() if first_place(value)
            )
            turn = [0]

            def torn() -> bool:
                turn[0] += 1
                vip = f"10.96.0.{turn[0] % 2 + 1}"
                with meanwhile(lambda: client.connect((vip, 53))):
                    seen = first_place(lab.maps.map("sockets").lookup(index) or b"")
                return any(
                    (record["vip"], record["peer"]) not in whole
                    for cookie, record in seen
                    if not cookie >> 63
                )

            assert never(torn) if rule else soon(torn)


@pytest.mark.parametrize("rule", [True, False], ids=["compare-and-swap", "plain-store"])
def test_a_record_is_freed_by_one_of_those_that_race_for_it(
    fresh_lab: Labs, changed_source: Sources, rule: bool
) -> None:
    """A reset from the network meets close(): counted closed twice, the count would be wrong."""
    swap = "if (!swap(found.cookie, cookie, cookie | COOKIE_BUSY))"
    changes = [("record.h", f"\t{swap}", f"\t{HOLD}\n\t{swap}")]
    if not rule:
        changes = [("record.h", f"\t{swap}\n\t\treturn;", f"\t{HOLD}")]
    lab = fresh_lab(source=changed_source(*changes))
    with tcp_server() as (server, port):
        lab.set("web", web(("127.0.0.1", port)))
        ident = lab.endpoint_id("127.0.0.1", port)
        key = struct.pack("=I", ident)

        def miscounted() -> bool:
            client = socket.create_connection(VIP)
            peer, _ = server.accept()
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with meanwhile(client.close):
                peer.close()

            def counted() -> bool:
                raw = lab.maps.map("load").lookup(key) or bytes(8)
                return bool(struct.unpack_from("=Ii", raw)[1] != 0)

            return stays(counted, 60 if rule else 3)

        assert never(miscounted) if rule else soon(miscounted)


def test_the_frontend_of_these_tests_is_the_one_that_is_dialled() -> None:
    assert web().frontend == Frontend(to_address(VIP[0]), VIP[1], TCP)
