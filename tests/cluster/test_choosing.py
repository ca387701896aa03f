"""The bench of choosing runs, and what it counts adds up. No times are judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench import choosing
from tests.bench.choosingcases import (
    CASES,
    KUBE_PROXY,
    LEAST,
    RANDOM,
    ROUND_ROBIN,
    SAME_ZONE,
    ejecting,
    requests,
)
from tests.bench.choosingworld import World
from tests.cluster.cluster import Cluster
from tests.cluster.space import Space

pytestmark = pytest.mark.cluster

ARMS = {
    "equal": (KUBE_PROXY, ROUND_ROBIN),
    "closed": (RANDOM,),
    "slow": (RANDOM,),
    "hasty": (LEAST,),
    "refusing": (KUBE_PROXY, RANDOM, ejecting(RANDOM)),
    "dropping": (RANDOM,),
    "rolling": (RANDOM,),
    "scale-out": (ROUND_ROBIN,),
    "far": (KUBE_PROXY, SAME_ZONE),
    "canary": (ROUND_ROBIN,),
    "stay": (ROUND_ROBIN,),
}


def test_the_bench_of_choosing(cluster: Cluster, space: Space, tmp_path: Path) -> None:
    cases = {
        name: replace(CASES[name], arms=arms, seconds=1 if name != "rolling" else 3.2, rounds=1,
                      busy=CASES[name].busy / 2)
        for name, arms in ARMS.items()
    }  # fmt: skip
    world = World(cluster, tmp_path)
    found = {(name, arm): one for name, arm, one in choosing.measure(world, cases, 1)}
    assert set(found) == {(name, arm.name) for name, arms in ARMS.items() for arm in arms}
    for (name, _), one in found.items():
        case = cases[name]
        counted = [when for when, _ in requests(case, 0) if when >= case.warm * 1e6]
        if not case.closed:
            assert one.asked == len(counted)
        assert 0 < one.p50 <= one.p99 <= one.p999
        assert (one.fairness is None) == (not case.compared)
    assert found["equal", "round-robin"].failed == 0
    assert found["refusing", "random"].failed > 5 >= found["refusing", "random, ejection"].failed
    assert found["refusing", "kube-proxy"].failed > 5
    assert 0 < (found["canary", "round-robin"].canary or 0) < 0.03
    assert (found["far", SAME_ZONE.name].fairness or 0) > 1.8  # all of it at five of ten
