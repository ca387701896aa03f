"""What a connect, a datagram and an open connection cost, against the same without Pointsman."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pointsman import abi, bpf
from pointsman.objects import Ref
from pointsman.pins import Sizes
from pointsman.values import TCP, UDP, Entry, Frontend, PortName, to_address, to_text
from tests.bench.report import ratio, show
from tests.support.kernel import Lab, own_network

PORT = 7000
ENDPOINTS = tuple((to_address(f"127.0.0.{n}"), PORT) for n in range(1, 11))
BIG = Sizes(services=1 << 18, slots=1 << 20, endpoints=1 << 20, buckets=1 << 14, overflow=1 << 14)

STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
#: Another bpf/ directory to measure in turn with this one (--against).
AGAINST: Path | None = None

Parts = dict[str, list[float]]


def vip(number: int) -> str:
    return f"10.{96 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


def services(count: int) -> dict[Ref, tuple[Entry, ...]]:
    """Services of ten endpoints: number 1 has TCP 80, 81 (echo) and UDP 53, the others TCP 80."""
    wanted = {}
    for n in range(1, count + 1):
        address, name = to_address(vip(n)), f"s{n}"
        owner = PortName("bench", name, "p")
        entries = [
            Entry(Frontend(address, 80, TCP), owner, ENDPOINTS),
            Entry(Frontend(address, 0, 0), owner),
        ]
        if n == 1:
            echo = tuple((endpoint, PORT + 1) for endpoint, _ in ENDPOINTS)
            entries.append(Entry(Frontend(address, 81, TCP), PortName("bench", name, "e"), echo))
            entries.append(
                Entry(Frontend(address, 53, UDP), PortName("bench", name, "u"), ENDPOINTS)
            )
        wanted[Ref("Service", "bench", name)] = tuple(entries)
    return wanted


class Bench:
    """The client program, a spinning server, and programs attached to a child cgroup."""

    def __init__(self) -> None:
        own_network()
        # Switched on, it reads the clock twice around each program.
        self._stats = STATS.read_text()
        STATS.write_text("0")
        self.directory = Path(tempfile.mkdtemp())
        self.program = self.directory / "connect_bench"
        source = Path(__file__).with_name("connect.c")
        subprocess.run(["gcc", "-O2", "-o", str(self.program), str(source)], check=True)
        self.lab = Lab(f"pm_bench_{os.getpid()}", sizes=BIG)
        self.lab.attach()
        self.other: Lab | None = None
        if AGAINST:
            self.other = Lab(f"pm_bench_{os.getpid()}_other", source=AGAINST, sizes=BIG)
            self.other.attach()
        self.server = subprocess.Popen([str(self.program), "serve", str(PORT)])

    def close(self) -> None:
        self.server.kill()
        self.server.wait()
        for lab in self.labs.values():
            lab.close()
        STATS.write_text(self._stats)
        shutil.rmtree(self.directory)

    def fill(self, count: int) -> None:
        for lab in self.labs.values():
            lab._apply(lab.planner.replace(services(count)))

    def run(
        self, kind: str, batches: int, arms: dict[str, tuple[str, list[tuple[str, int]]]]
    ) -> dict[str, Parts]:
        """`arms`: name → (cgroup or "-", targets). p50, p99 and mean (ns) of ten parts each."""
        arguments = []
        for name, (cgroup, targets) in arms.items():
            file = self.directory / name.replace(" ", "_").replace("/", "_")
            file.write_text("".join(f"{address} {port}\n" for address, port in targets))
            arguments.append(f"{cgroup},{file}")
        done = subprocess.run(
            [str(self.program), kind, str(batches), "50", *arguments],
            check=True,
            capture_output=True,
            text=True,
        )
        found: dict[str, Parts] = {}
        for name, line in zip(arms, done.stdout.splitlines(), strict=True):
            parts = [tuple(map(float, part.split())) for part in line.split("  ")]
            found[name] = dict(
                zip(("p50", "p99", "mean"), map(list, zip(*parts, strict=True)), strict=True)
            )
        return found

    @property
    def labs(self) -> dict[str, Lab]:
        """What is measured, by what its figures are called."""
        return {"": self.lab, **({" (other)": self.other} if self.other else {})}

    @property
    def inside(self) -> str:
        return str(self.lab.cgroup.path)


@contextmanager
def bench() -> Iterator[Bench]:
    made: list[Bench] = []

    def make() -> None:
        made.append(Bench())

    make()
    try:
        yield made[0]
    finally:
        made[0].close()


def _rounds(quick: bool) -> int:
    return 400 if quick else 2000


def connect(quick: bool) -> Any:
    """connect() to a Service ÷ direct connect(), by number of Services, ten endpoints each."""
    figures = {}
    with bench() as b:
        # The same ten addresses, at random: the kernel's own caches then help both sides alike.
        real = [(to_text(address), port) for address, port in ENDPOINTS]
        direct = ("-", real)
        for count in (1, 1000, 10_000, 100_000):
            b.fill(count)
            rng = random.Random(1)
            everywhere = [(vip(n), 80) for n in range(1, count + 1)]
            rng.shuffle(everywhere)
            arms = {
                "direct": direct,
                "direct again": direct,
                "one": (b.inside, [(vip(1), 80)]),
                "no service": (b.inside, real),
            }
            if count > 1000:
                arms["random"] = (b.inside, everywhere)
            if b.other:
                other = str(b.other.cgroup.path)
                arms["one (other)"] = (other, [(vip(1), 80)])
                arms["no service (other)"] = (other, real)
            found = b.run("tcp", _rounds(quick), arms)
            base = found["direct"]
            for name in list(arms)[1:]:
                bars = {"one": "≤ 1.03", "random": "≤ 1.20", "no service": "≤ 1.02"}
                bar = bars.get(name, "") if (name, count) != ("random", 10_000) else ""
                figure = ratio(found[name]["p50"], base["p50"])
                show(f"{count} Services, {name}: p50 ÷ direct", figure, bar)
                figures[f"{count} {name} p50"] = figure
            figure = ratio(found["one"]["p99"], base["p99"])
            show(f"{count} Services, one: p99 ÷ direct's p99", figure, "≤ 1.15")
            figures[f"{count} one p99"] = figure
            middle = (sorted(base[name])[5] for name in ("p50", "p99"))
            print("  (direct p50 {:.0f} ns, p99 {:.0f} ns)".format(*middle))
    return figures


def datagrams(quick: bool) -> Any:
    """UDP to a Service ÷ direct: a new connected socket a query, and echo on an unconnected one."""
    figures = {}
    with bench() as b:
        b.fill(10_000)
        for kind, bar in (("udp-new", "≤ 1.12"), ("udp-echo", "≤ 1.05")):
            direct = ("-", [("127.0.0.1", PORT)])
            arms = {"direct": direct, "again": direct, "service": (b.inside, [(vip(1), 53)])}
            found = b.run(kind, _rounds(quick), arms)
            for name in ("again", "service"):
                figure = ratio(found[name]["p50"], found["direct"]["p50"])
                show(f"{kind} {name}: p50 ÷ direct", figure, bar if name == "service" else "")
                figures[f"{kind} {name}"] = figure
    return figures


def requests(quick: bool) -> Any:
    """Request and response on an open connection ÷ the same on a direct one."""
    with bench() as b:
        b.fill(10_000)
        direct = ("-", [("127.0.0.1", PORT + 1)])
        arms = {"direct": direct, "again": direct, "service": (b.inside, [(vip(1), 81)])}
        found = b.run("tcp-rr", _rounds(quick), arms)
        figures = {}
        for name in ("again", "service"):
            figures[name] = ratio(found[name]["p50"], found["direct"]["p50"])
            show(f"{name}: p50 ÷ direct", figures[name], "1.00 ± 0.02")
        return figures


EMPTY = """
int empty(struct bpf_sock_addr *ctx) { return 1; }
"""


def hook(quick: bool) -> Any:
    """Run time of each hook (run_time_ns ÷ run_cnt), hot, recorded; net of an empty one."""
    figures = {}
    with bench() as b:
        import bcc

        from pointsman.hooks import HOOKS
        from pointsman.loader import flags

        os.environ["BCC_KERNEL_SOURCE"] = str(b.lab.pins.source_directory)
        module = bcc.BPF(text=b"#include <linux/bpf.h>\n" + EMPTY.encode(), cflags=flags({}, ()))
        empty = module.load_func(b"empty", 18, None, 10)
        b.fill(10_000)
        cgroup = os.open(b.inside, os.O_RDONLY)
        link = bpf.link_create(empty.fd, cgroup, 10)
        programs = {
            hook.name + name: bpf.obj_get(lab.loaded.generation.programs / hook.name)
            for name, lab in b.labs.items()
            for hook in HOOKS
        }
        programs["empty"] = empty.fd
        try:
            STATS.write_text("1")
            runs: dict[str, list[float]] = {name: [] for name in programs}
            for _ in range(5 if quick else 10):
                start = {name: bpf.program_info(fd) for name, fd in programs.items()}
                for lab in b.labs.values():
                    inside = str(lab.cgroup.path)
                    b.run("tcp", 200, {"service": (inside, [(vip(1), 80)])})
                    b.run("udp-echo", 100, {"service": (inside, [(vip(1), 53)])})
                for name, fd in programs.items():
                    end = bpf.program_info(fd)
                    count = end.run_cnt - start[name].run_cnt
                    if count:
                        spent = end.run_time_ns - start[name].run_time_ns
                        runs[name].append(spent / count)
        finally:
            STATS.write_text("0")
            os.close(link)
            os.close(cgroup)
        floor = sorted(runs["empty"])[len(runs["empty"]) // 2]
        bars = {"connect4": "≤ 150", "sock_release": "≤ 60"}
        for name, each in sorted(runs.items()):
            if each and name != "empty":
                net = [value - floor for value in each]
                figures[name] = (sorted(net)[len(net) // 2], min(net), max(net))
                show(
                    f"{name}, net of the empty hook ({floor:.0f} ns)",
                    figures[name],
                    bars.get(name, ""),
                    " ns",
                )
    return figures


def algorithms(quick: bool) -> Any:
    """Run time of the connect hook by the algorithm of the Service, hot, ÷ and minus random's."""
    names = {
        name.removeprefix("ALGORITHM_").lower(): value
        for name, value in abi.constants().items()
        if name.startswith("ALGORITHM_") and name != "ALGORITHM_MASK"
    }
    with bench() as b:
        wanted = services(1000)
        for number, algorithm in enumerate(names.values(), 1):
            ref = Ref("Service", "bench", f"s{number}")
            wanted[ref] = tuple(
                replace(entry, algorithm=algorithm) if entry.frontend.port else entry
                for entry in wanted[ref]
            )
        b.lab._apply(b.lab.planner.replace(wanted))
        program = bpf.obj_get(b.lab.loaded.generation.programs / "connect4")
        runs: dict[str, list[float]] = {name: [] for name in names}
        try:
            STATS.write_text("1")
            for _ in range(60 if quick else 200):
                for number, name in enumerate(names, 1):
                    start = bpf.program_info(program)
                    b.run("tcp", 20, {"service": (b.inside, [(vip(number), 80)])})
                    end = bpf.program_info(program)
                    count = end.run_cnt - start.run_cnt
                    runs[name].append((end.run_time_ns - start.run_time_ns) / count)
        finally:
            STATS.write_text("0")
            os.close(program)
        figures = {}
        for name in list(names)[1:]:
            more = sorted(x - y for x, y in zip(runs[name], runs["random"], strict=True))
            # Short runs, side by side: from the lower to the upper quartile.
            figures[name] = tuple(more[len(more) * i // 4] for i in (2, 1, 3))
            bar = "≤ 20" if name == "least_connections" else ""
            show(f"{name} instead of random", figures[name], bar, " ns")
        return figures


BENCHES = {
    "algorithms": algorithms,
    "connect": connect,
    "datagrams": datagrams,
    "requests": requests,
    "hook": hook,
}
