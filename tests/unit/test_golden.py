"""Manifests in, maps out: each directory of tests/golden is a behaviour that one can read.

`UPDATE_GOLDEN=1 pytest tests/unit/test_golden.py` writes what comes out now; read the difference.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pointsman.clusterip import ClusterIPs
from pointsman.manifests import ManifestSource
from pointsman.maps import apply
from pointsman.plan import Limits
from pointsman.planner import Planner
from pointsman.resolve import Context, resolve
from pointsman.tracker import Tracker
from tests.support.fake import FakeDatapath

CASES = sorted(path for path in (Path(__file__).parent.parent / "golden").iterdir())


def outcome(directory: Path) -> str:
    listed, found = ManifestSource(directory).read()
    tracker = Tracker(ClusterIPs(["10.96.0.0/24", "fd00:96::/112"], {}))
    tracker.fold(listed)
    problems = [*found.problems, *tracker.problems]
    wanted = {}
    for ref, service in sorted(tracker.services.items()):
        wanted[ref], more = resolve(service, tracker.slices(ref), Context())
        problems += more
    limits = Limits(256, 256, 256)
    maps = FakeDatapath(limits)
    apply(Planner(limits).replace(wanted), maps)
    said = [str(problem).replace(f"{directory}/", "") for problem in problems]
    return "\n".join([maps.dump(), *(f"! {line}" for line in sorted(said))]).strip() + "\n"


@pytest.mark.parametrize("directory", CASES, ids=lambda path: path.name)
def test_golden(directory: Path) -> None:
    expected = directory / "maps.txt"
    found = outcome(directory)
    if os.environ.get("UPDATE_GOLDEN"):
        expected.write_text(found)
    assert found == expected.read_text()
