"""/metrics/endpoints: which endpoints it shows, in which form, and that nobody waits for it."""

from __future__ import annotations

import gzip
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.client import HTTPResponse
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as families

from pointsman import abi, endpointrows
from pointsman.endpointpage import LATELY, MOST, Asked, BadParameter, Page, asked, page
from pointsman.outcomes import Outcomes
from pointsman.plan import Run, Slot
from pointsman.policies import PolicyElement
from pointsman.telemetry import Telemetry
from pointsman.telemetry.connection import Later
from pointsman.telemetry.endpointmetrics import EndpointFamilies, render
from pointsman.telemetry.endpointnumbers import LABELS
from pointsman.telemetry.httpwire import Response, text
from pointsman.telemetry.scrapes import Pace, Scrapes
from pointsman.telemetry.servers import HttpServers
from pointsman.values import Policy, PortName
from tests.support.view import A, FakeView, backend, node_view, view
from tests.unit.test_telemetry_http import V4, WAIT, Loop, ask, running

SECOND = 1_000_000_000
NOW = 1000 * SECOND
ZERO = 1_700_000_000.0
_ABI = abi.constants()
EJECTING = Policy(watch=True, streak=5, shortest=SECOND, longest=SECOND, trial=SECOND)
OUT = Outcomes(1, 4000, NOW, NOW + 8 * SECOND, False, connects=9, failures=5, ejections=2, streak=5)
DOCUMENT = (Path(__file__).parents[2] / "docs/metrics.md").read_text()


def rest() -> None:
    """Nobody else is there."""


UNASKED = Asked()


def shown(maps: FakeView, what: Asked = UNASKED) -> list[str]:
    return [each.row.endpoint for each in page(maps, what, NOW, rest).shown]


def of_web(**more: object) -> Asked:
    return Asked(services=frozenset({("shop", "web")}), **more)


def ejecting(maps: FakeView, *flags: str) -> FakeView:
    """shop/web ejects, and its first endpoint is out."""
    bits = sum(_ABI[f"CHOICE_{flag}"] for flag in ("POLICY", *flags))
    maps.elements[1] = replace(maps.elements[1], algorithm=bits)
    maps.policy[1] = PolicyElement(EJECTING, 1)
    maps.seen[5] = OUT
    return maps


def idle() -> FakeView:
    """As view(), without a connection."""
    maps = view()
    maps.loads = {ident: (generation, 0) for ident, (generation, _) in maps.loads.items()}
    return maps


# -- which endpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "opened", "there"),
    [
        pytest.param(Outcomes(), 0, False, id="nothing-ever-happened"),
        pytest.param(Outcomes(), 1, True, id="a-connection-is-open"),
        pytest.param(Outcomes(measured=NOW - SECOND, connects=1), 0, True, id="a-connect-of-late"),
        pytest.param(
            Outcomes(measured=NOW - LATELY, connects=9, failures=3, streak=3), 0, False,
            id="failures-long-ago",
        ),
        pytest.param(replace(OUT, measured=NOW - 2 * LATELY), 0, True, id="still-ejected"),
        pytest.param(Outcomes(), -1, False, id="a-count-that-is-being-merged"),
    ],
)  # fmt: skip
def test_unasked_an_endpoint_is_shown_if_it_has_something_to_tell(
    known: Outcomes, opened: int, there: bool
) -> None:
    maps = idle()
    maps.seen[6], maps.loads[6] = known, (3, opened % (1 << 32))
    assert shown(maps) == (["10.0.0.2:8080"] if there else [])


def test_of_a_service_that_is_named_all_endpoints_are_shown() -> None:
    assert shown(idle(), of_web()) == ["10.0.0.1:8080", "10.0.0.2:8080"]
    assert shown(idle(), Asked(namespaces=frozenset({"default"}))) == ["[fd00::5]:53"]
    both = of_web(namespaces=frozenset({"default"}))
    assert len(shown(idle(), both)) == 3


def test_the_rows_are_those_of_get_endpoints() -> None:
    for maps in (ejecting(view(), "AVOID"), ejecting(view()), node_view()):
        spaces = frozenset(name.namespace for name in maps.owners.values())
        found = [each.row for each in page(maps, Asked(namespaces=spaces), NOW, rest).shown]
        rows = endpointrows.endpoints(maps, NOW)
        assert len(rows) > 2
        assert found == sorted(rows, key=lambda r: (r.namespace, r.service, r.port, r.endpoint))


def test_what_clients_outside_have_alone_is_shown_as_get_endpoints_has_it() -> None:
    maps = ejecting(view(), "AVOID")
    maps.elements[1] = replace(maps.elements[1], count=1, first=11, outside=Run(10, 2))
    found = [each.row for each in page(maps, of_web(), NOW, rest).shown]
    assert [(row.endpoint, row.state) for row in found] == [
        ("10.0.0.1:8080", "ready"), ("10.0.0.2:8080", "ready")
    ]  # fmt: skip
    assert {row.id: row for row in found} == {
        row.id: row for row in endpointrows.endpoints(maps, NOW) if row.service == "web"
    }


def test_within_the_limit_ejected_and_failing_and_busy_ones_go_first() -> None:
    maps = ejecting(view(), "AVOID")
    maps.elements[1] = replace(maps.elements[1], count=5)
    for ident, opened, known in (
        (21, 0, Outcomes(measured=NOW)), (22, 7, Outcomes()),
        (23, 1, Outcomes(streak=1, measured=NOW)),
    ):  # fmt: skip
        maps.slot[ident - 9] = Slot(backend(f"10.0.0.{ident}:80"), ident, 1, 1)
        maps.loads[ident], maps.seen[ident] = (1, opened), known
    maps.loads[5], maps.seen[5] = (1, 0), replace(OUT, streak=0)
    order = ["10.0.0.1:8080", "10.0.0.23:80", "10.0.0.22:80", "10.0.0.2:8080", "10.0.0.21:80"]
    for what in (Asked(), of_web()):
        for limit in range(1, 6):
            found = page(maps, replace(what, limit=limit), NOW, rest)
            assert {each.row.endpoint for each in found.shown} == set(order[:limit])
            assert found.left_out == 5 - limit


def test_each_service_that_is_named_is_said_to_be_known_or_not() -> None:
    asked_for = frozenset({("shop", "web"), ("shop", "wbe")})
    found = page(view(), Asked(services=asked_for), NOW, rest)
    assert found.known == {("shop", "wbe"): False, ("shop", "web"): True}
    assert page(view(), Asked(), NOW, rest).known == {}


def test_what_has_left_or_became_another_s_meanwhile_is_not_shown() -> None:
    maps = view()
    maps.loads[5] = (1 | _ABI["GENERATION_RETIRED"], 4)
    assert shown(maps) == ["10.0.0.2:8080"]
    maps.loads[5] = (9, 4)  # the number is another endpoint's
    assert shown(maps) == ["10.0.0.2:8080"]
    maps.slot[11], maps.loads[7] = maps.slot[20], (1, 1)  # the slots were used again
    found = [(each.row.service, each.row.endpoint) for each in page(maps, UNASKED, NOW, rest).shown]
    assert found == [("dns", "[fd00::5]:53")]


# -- parameters ----------------------------------------------------------------------------------


def test_parameters_may_be_there_several_times() -> None:
    found = asked({"service": ("a/b", "a/c", "a/b"), "namespace": ("x",), "limit": ("7",)})
    assert found == Asked(frozenset({("a", "b"), ("a", "c")}), frozenset({"x"}), 7)
    assert asked({}) == Asked()


@pytest.mark.parametrize(
    ("query", "words"),
    [
        pytest.param({"svc": ("a/b",)}, '"svc" is no parameter; write service, ', id="unknown"),
        pytest.param({"service": ("web",)}, 'service "web" .*; write service=NAM', id="no-slash"),
        pytest.param({"service": ("a/b/c",)}, "write service=NAMESPACE/NAME", id="two-slashes"),
        pytest.param({"service": ("",)}, 'service ""', id="nothing"),
        pytest.param({"service": ("A/b",)}, 'service "A/b"', id="capitals"),
        pytest.param({"namespace": ("a/b",)}, 'namespace "a/b".*; write namespace=', id="slash"),
        pytest.param({"limit": ("0",)}, 'limit "0" .*; write one from 1 to 5000', id="none"),
        pytest.param({"limit": (str(MOST + 1),)}, "limit", id="too-many"),
        pytest.param({"limit": ("²",)}, "limit", id="no-digit"),
        pytest.param({"limit": ("1", "2")}, "limit is there 2 times; write one", id="twice"),
    ],
)
def test_a_bad_parameter_is_named_with_what_to_write(
    query: dict[str, tuple[str, ...]], words: str
) -> None:
    with pytest.raises(BadParameter, match=words):
        asked(query)


# -- the form ------------------------------------------------------------------------------------


def samples(found: Page) -> dict[str, float]:
    """By name and labels beyond those of the endpoint."""
    return {
        " ".join([sample.name, *(v for k, v in sample.labels.items() if k not in LABELS)]): (
            sample.value
        )
        for metric in EndpointFamilies(found, ZERO, rest).collect()
        for sample in metric.samples
    }


def of_first(maps: FakeView) -> dict[str, float]:
    """shop/web's first endpoint alone."""
    found = page(maps, of_web(), NOW, rest)
    return samples(replace(found, shown=found.shown[:1], known={}))


def test_an_ejected_endpoint_says_until_when_and_why() -> None:
    assert of_first(ejecting(view(), "AVOID")) == {
        "pointsman_endpoint_open_connections": 4,
        "pointsman_endpoint_connect_time_seconds": 0.004,
        "pointsman_endpoint_recent_connects": 9,
        "pointsman_endpoint_recent_failed_connects": 5,
        "pointsman_endpoint_consecutive_failures": 5,
        "pointsman_endpoint_state ejected": 1,
        "pointsman_endpoint_ejected": 1,
        "pointsman_endpoint_ejected_reason consecutive-failures on": 1,
        "pointsman_endpoint_ejected_until_timestamp_seconds": ZERO + 1008,
        "pointsman_endpoint_recent_ejections": 2,
        "pointsman_endpoint_metrics_left_out": 0,
    }


def test_one_that_would_be_is_told_from_it() -> None:
    found = of_first(ejecting(view()))
    assert found["pointsman_endpoint_ejected_reason consecutive-failures observe"] == 1
    assert found["pointsman_endpoint_state ready"] == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"streak": 1}, "failed-connects", id="of-many"),
        pytest.param({"streak": 1, "failures": 0}, "before-trial", id="none-since"),
    ],
)
def test_reasons_are_words(changes: dict[str, int], reason: str) -> None:
    maps = ejecting(view(), "AVOID")
    maps.seen[5] = replace(OUT, **changes)
    assert f"pointsman_endpoint_ejected_reason {reason} on" in of_first(maps)


def test_a_weight_is_there_where_weights_count() -> None:
    maps = view()
    assert "pointsman_endpoint_weight" not in of_first(maps)
    maps.elements[1] = replace(maps.elements[1], algorithm=_ABI["CHOICE_WEIGHTED"])
    maps.slot[10] = replace(maps.slot[10], weight=0)
    found = of_first(maps)
    assert found["pointsman_endpoint_weight"] == 0
    assert found["pointsman_endpoint_state no-weight"] == 1


def test_what_is_well_and_unknown_says_no_more_than_that() -> None:
    assert of_first(idle()) == {
        "pointsman_endpoint_open_connections": 0,
        "pointsman_endpoint_recent_connects": 0,
        "pointsman_endpoint_recent_failed_connects": 0,
        "pointsman_endpoint_consecutive_failures": 0,
        "pointsman_endpoint_state ready": 1,
        "pointsman_endpoint_ejected": 0,
        "pointsman_endpoint_metrics_left_out": 0,
    }


def test_no_series_is_there_twice() -> None:
    """Two ports of a Service may lead to one endpoint; Prometheus refuses what comes twice."""
    maps = view()
    maps.owners[2] = PortName("shop", "web", "admin")
    maps.slot[20] = replace(maps.slot[20], backend=A)
    body, _ = render(page(maps, of_web(), NOW, rest), ZERO, rest, "", "")
    lines = [line.rpartition(" ")[0] for line in body.decode().splitlines() if line[0] != "#"]
    assert len(lines) == len(set(lines)) > 12


def test_the_document_has_every_metric_of_an_endpoint_and_its_labels() -> None:
    documented = {
        name: (kind, frozenset(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in re.findall(
            r"^\| `(pointsman_endpoint_\w+)` \| (\w+) \| ([^|]*)\|", DOCUMENT, re.MULTILINE
        )
    }
    maps = ejecting(view(), "AVOID", "WEIGHTED")
    collector = EndpointFamilies(page(maps, of_web(), NOW, rest), ZERO, rest)
    found = {
        metric.name: (metric.type, frozenset(k for s in metric.samples for k in s.labels))
        for metric in collector.collect()
    }
    of_endpoints = {
        name: (kind, labels - set(LABELS) if labels >= set(LABELS) else labels)
        for name, (kind, labels) in found.items()
    }
    assert documented == of_endpoints
    assert all(metric.documentation for metric in collector.collect())


# -- the server ----------------------------------------------------------------------------------


@pytest.fixture
def loop() -> Iterator[Loop]:
    with running() as found:
        yield found


class Blocked(FakeView):
    """Maps that are read as slowly as a test wants."""

    def __init__(self) -> None:
        super().__init__(**vars(view()))
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.readers, self.most = 0, 0

    def columns(self, name: str, *fields: str) -> Iterator[tuple[int, tuple[list[int], ...]]]:
        self.readers += 1
        self.most = max(self.most, self.readers)
        self.begun.set()
        assert self.go_on.wait(WAIT)
        self.readers -= 1
        return super().columns(name, *fields)


@pytest.fixture
def ports(loop: Loop) -> Iterator[Callable[[FakeView | None], dict[str, int]]]:
    made: list[HttpServers] = []

    def serve(maps: FakeView | None) -> dict[str, int]:
        servers = HttpServers(loop, Telemetry(), healthz=[(V4, 0)], metrics=[(V4, 0)])
        servers.source = maps
        made.append(servers)
        loop.until(lambda: all(servers.bound().values()))
        return {name: bound[0][1] for name, bound in servers.bound().items()}

    yield serve
    for each in made:
        each.stop()


Ports = Callable[[FakeView | None], dict[str, int]]


class Asking(threading.Thread):
    """A scrape beside the test."""

    answer: HTTPResponse
    body: bytes

    def __init__(self, port: int, path: str = "/metrics/endpoints") -> None:
        super().__init__()
        self._port, self._path = port, path
        self.start()

    def run(self) -> None:
        self.answer, self.body = ask(self._port, self._path)

    def status(self) -> int:
        self.join(WAIT)
        return self.answer.status


def test_the_page_is_text_openmetrics_and_packed_as_asked(ports: Ports) -> None:
    port = ports(view())["metrics"]
    answer, body = ask(port, "/metrics/endpoints?service=shop/web&service=shop/none")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    found = {
        (sample.name, sample.labels.get("endpoint") or sample.labels.get("service")): sample.value
        for family in families(body.decode())
        for sample in family.samples
    }
    assert found["pointsman_endpoint_open_connections", "10.0.0.1:8080"] == 4
    assert found["pointsman_endpoint_metrics_service_known", "web"] == 1
    assert found["pointsman_endpoint_metrics_service_known", "none"] == 0
    wanted = {"Accept": "application/openmetrics-text;version=1.0.0", "Accept-Encoding": "gzip"}
    answer, body = ask(port, "/metrics/endpoints", headers=wanted)
    assert answer.headers["Content-Encoding"] == "gzip"
    names = {each.name for each in openmetrics(gzip.decompress(body).decode())}
    assert "pointsman_endpoint_state" in names
    assert ask(port, "/metrics/endpoints", method="HEAD")[1] == b""


def test_a_bad_parameter_is_a_400_that_says_so(ports: Ports) -> None:
    answer, body = ask(ports(view())["metrics"], "/metrics/endpoints?service=web")
    assert answer.status == 400
    assert body.decode() == (
        'service "web" is not a namespace and a name; write service=NAMESPACE/NAME, once for each\n'
    )


def test_before_there_are_maps_there_is_no_page(ports: Ports) -> None:
    assert ask(ports(None)["metrics"], "/metrics/endpoints")[0].status == 503


def test_probes_and_metrics_do_not_wait_for_a_scrape_of_endpoints(ports: Ports) -> None:
    maps = Blocked()
    found = ports(maps)
    scrape = Asking(found["metrics"])
    assert maps.begun.wait(WAIT)
    for path in ("/healthz", "/livez"):
        assert ask(found["healthz"], path)[0].status == 200
    assert ask(found["metrics"], "/metrics")[0].status == 200
    assert scrape.is_alive()
    maps.go_on.set()
    assert scrape.status() == 200
    assert b"10.0.0.1:8080" in scrape.body


def test_scrapes_of_endpoints_come_one_after_the_other(ports: Ports) -> None:
    maps = Blocked()
    port = ports(maps)["metrics"]
    scrapes = [Asking(port) for _ in range(4)]
    assert maps.begun.wait(WAIT)
    maps.go_on.set()
    assert [each.status() for each in scrapes] == [200] * 4
    assert maps.most == 1


def test_a_scrape_that_fails_is_a_500_and_the_next_one_is_served(
    ports: Ports, caplog: pytest.LogCaptureFixture
) -> None:
    maps = Blocked()
    maps.go_on.set()
    port = ports(maps)["metrics"]
    maps.owners, owners = {}, maps.owners
    maps.elements[1], element = None, maps.elements[1]  # type: ignore[assignment]
    assert ask(port, "/metrics/endpoints")[0].status == 500
    assert "a scrape failed" in caplog.text
    maps.owners, maps.elements[1] = owners, element
    assert ask(port, "/metrics/endpoints")[0].status == 200


# -- the thread ----------------------------------------------------------------------------------


@pytest.fixture
def scrapes() -> Iterator[Scrapes]:
    found = Scrapes()
    yield found
    found.stop()


class Busy:
    """Work that has begun, and goes on until the test says so."""

    def __init__(self, scrapes: Scrapes) -> None:
        self.begun, self.go_on, self.ended = (threading.Event() for _ in range(3))
        self.rested = 0
        self.later = scrapes.ask(self._work)

    def _work(self, rest: Callable[[], None]) -> Response:
        self.begun.set()
        try:
            while not self.go_on.wait(0.002):
                rest()
                self.rested += 1
        finally:
            self.ended.set()
        return text(200, "done")


def test_of_too_many_scrapes_the_last_are_refused(scrapes: Scrapes) -> None:
    first = Busy(scrapes)
    assert first.begun.wait(WAIT)
    waiting = [Busy(scrapes).later for _ in range(9)]
    assert [isinstance(each, Later) for each in waiting] == [True] * 8 + [False]
    assert isinstance(waiting[-1], Response) and waiting[-1].status == 503
    # Those whose client has gone make room.
    assert isinstance(waiting[0], Later)
    waiting[0].dropped = True
    assert isinstance(Busy(scrapes).later, Later)


def test_what_nobody_waits_for_any_more_ends(scrapes: Scrapes) -> None:
    busy = Busy(scrapes)
    assert busy.begun.wait(WAIT) and isinstance(busy.later, Later)
    busy.later.dropped = True
    assert busy.ended.wait(WAIT)
    assert busy.later.response is None


def test_a_stop_ends_the_work_and_the_thread() -> None:
    before = threading.active_count()
    scrapes = Scrapes()
    busy = Busy(scrapes)
    assert busy.begun.wait(WAIT)
    scrapes.stop()
    assert busy.ended.is_set()
    assert threading.active_count() == before
    late = scrapes.ask(lambda rest: text(200, ""))
    assert isinstance(late, Response) and late.status == 503


def test_work_goes_on_for_a_millisecond_and_rests_twice_as_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, rests = 100.0, []

    class Stopped(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            rests.append(timeout)
            return False

    monkeypatch.setattr("pointsman.telemetry.scrapes.time.monotonic", lambda: now)
    pace = Pace(Later(), Stopped())
    for worked in (0.0005, 0.0004, 0.0003, 0.0005, 0.004):
        now += worked
        pace.rest()
    assert rests == pytest.approx([2 * 0.0012, 2 * 0.0045])
