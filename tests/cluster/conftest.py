"""One cluster for all cluster tests; each has a namespace of Kubernetes of its own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from itertools import count

import pytest

from tests.cluster import build
from tests.cluster.cluster import Cluster
from tests.cluster.plane import ControlPlane
from tests.cluster.space import Space
from tests.support.kernel import lacking

_numbers = count(1)


@pytest.fixture(scope="session")
def cluster(missing: Callable[[str], None]) -> Iterator[Cluster]:
    """Three nodes, no proxy on any of them. Tests start what they need; `space` takes it away."""
    if lack := lacking():
        missing(lack)
    try:
        where = build.directory()
    except build.CannotBuild as error:
        missing(str(error))
    if lacks := build.missing(where):
        missing(f"{', '.join(lacks)}: run 'python -m tests.cluster.build'")
    with Cluster(where) as made:
        yield made


@pytest.fixture(scope="session")
def plane(cluster: Cluster) -> ControlPlane:
    return cluster.plane


@pytest.fixture
def space(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Space]:
    """A namespace for one test. After it no client, proxy or agent runs; the whole plane does."""
    made = cluster.space(f"test-{next(_numbers)}")
    yield made
    cluster.reset()
    made.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that failed shows the ends of all logs."""
    report = yield
    made = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(made, Cluster):
        report.sections.append(("logs of the cluster", made.tail()))
    return report
