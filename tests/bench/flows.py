"""What it costs to know 500,000 flows, and how many of them move when an endpoint leaves."""

from __future__ import annotations

import time
from pathlib import Path

from pointsman import maglev, sweep
from pointsman.flows import ANSWERED, FIN
from pointsman.pins import Sizes
from pointsman.values import to_address
from tests.support.flows import fill
from tests.support.packetlab import PacketLab

FLOWS = 500_000
SIZES = Sizes(services=1024, slots=2048, endpoints=1024, lines=1024, flows=1 << 20)


def _memory(fd: int) -> int:
    """Bytes that a map takes now, as the kernel counts them."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("memlock:"))


def flows(quick: bool) -> dict[str, object]:
    """The sweep over 500,000 flows, established or ended; whose move with an endpoint."""
    found: dict[str, object] = {}
    lab = PacketLab("pm_bench_flows", SIZES)
    try:
        where = lab.maps.directory, lab.programs
        for label, flags, age in (("established", ANSWERED, 0), ("ended", ANSWERED | FIN, 3600)):
            costs = []
            for _ in range(2 if quick else 5):
                lab.forget()
                fill(lab.map("flows"), FLOWS, flags=flags, seen=time.monotonic_ns() - age * 10**9)
                memory = _memory(lab.map("flows").fd)
                costs.append(sweep.measure(*where))
            for index, name in enumerate(
                ("thorough", "ordinary") if label == "established" else ("first",)
            ):
                each = sorted(rounds[index].cpu_seconds for rounds in costs)
                over = costs[0][index].expired
                found[f"{label}, {name} round"] = each
                print(
                    f"  {FLOWS:,} {label}, {name} round: {each[len(each) // 2]:.2f} s CPU "
                    f"({each[0]:.2f} … {each[-1]:.2f}), {over:,} deleted, map {memory / 1e6:.0f} MB"
                )
        lab.forget()
    finally:
        lab.close()
    for count in (10, 100):
        endpoints = [(to_address(f"10.244.0.{n}"), 80) for n in range(1, count + 1)]
        size = maglev.size_for(count)
        share = maglev.moved(endpoints, endpoints[1:], size)
        found[f"moved of {count}"] = share
        print(
            f"  one of {count} endpoints leaves: {share:.1%} of all hashes lead elsewhere "
            f"({1 / count:.1%} were its own)"
        )
    return found


BENCHES = {"flows": flows}
