"""The algorithms beside kube-proxy's random choice: real clients, real endpoints, real hooks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

from tests.bench.choosingcases import CASES, Case, requests
from tests.bench.choosingfigures import Found, Result, bars, noise, result, table
from tests.bench.choosingworld import World
from tests.cluster import build
from tests.cluster.cluster import Cluster

ROUNDS = 3
QUICK_SECONDS = 2.0
#: Where plots go (--plots); None: nowhere.
PLOTS: Path | None = None
#: Cases by name (--cases); none: all.
ONLY: tuple[str, ...] = ()


def measure(
    world: World, cases: Mapping[str, Case], rounds: int
) -> Iterator[tuple[str, str, Result]]:
    """Case, arm and result of one run after the other. The arms of a case take turns and are asked
    the same; no one is always first."""
    numbers = count(1)
    for round in range(rounds):
        for name, case in cases.items():
            for again in range(case.rounds):
                turn = round * case.rounds + again
                asked = requests(case, seed=turn)
                shift = turn % len(case.arms)
                arms = case.arms[shift:] + case.arms[:shift]
                services = {f"s{next(numbers)}": arm for arm in arms}
                for service, arm in services.items():
                    world.publish(service, arm, case, case.members)
                for service, arm in services.items():
                    yield name, arm.name, result(case, world.run(service, arm, case, asked))
                for service in services:
                    world.withdraw(service)


def choosing(quick: bool) -> Any:
    """Latency, failures and fairness by algorithm beside kube-proxy, as endpoints turn bad.

    On a cluster with a real API server; needs the programs of `python -m tests.cluster.build`.
    """
    where = build.directory()
    if lacks := build.missing(where):
        print(f"  left out: no {', '.join(lacks)}; run 'python -m tests.cluster.build'")
        return {}
    cases = {name: CASES[name] for name in ONLY or CASES}
    if quick:
        cases = {
            name: replace(case, seconds=min(case.seconds, QUICK_SECONDS), rounds=1)
            for name, case in cases.items()
        }
    found: Found = {
        name: {arm.name: list[Result]() for arm in case.arms} for name, case in cases.items()
    }
    with Cluster(where, "bench") as cluster, tempfile.TemporaryDirectory() as scratch:
        world = World(cluster, Path(scratch))
        for name, arm, one in measure(world, cases, 1 if quick else ROUNDS):
            found[name][arm].append(one)
            failed = f"{one.failed} of {one.asked} connects failed"
            print(
                f"  {name}, {arm}: p99 {one.p99:.0f} ms, {failed}, CPUs {one.cpu:.0%} busy",
                flush=True,
            )
    return tell(found)


def tell(found: Found) -> Any:
    """Prints it all, draws plots, and returns it."""
    for name, arms in found.items():
        print(f"\n{CASES[name].title}:\n")
        print("\n".join(table(name, arms)))
    print()
    if "equal" in found:
        print(f"noise, p99 of random against random: up to {noise(found):.3f}")
    held = list(bars(found))
    print("\n".join(map(str, held)))
    if PLOTS and len(found) == len(CASES):
        from tests.bench import choosingplots

        choosingplots.draw(found, PLOTS)
    rows = {
        name: {arm: [asdict(one) for one in each] for arm, each in arms.items()}
        for name, arms in found.items()
    }
    return {"cases": rows, "bars": [{**asdict(bar), "met": bar.met} for bar in held]}


BENCHES = {"choosing": choosing}
