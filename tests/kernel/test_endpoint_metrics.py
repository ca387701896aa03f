"""/metrics/endpoints of a real agent: what its maps say of endpoints, while probes are answered."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.kernel.home import ONE, PORT, THREE, TWO, Home, ask, reached, vips
from tests.kernel.test_annotations import annotated
from tests.support.agents import service_of, slice_of
from tests.support.kernel import until

pytestmark = pytest.mark.kernel

METRICS, HEALTH = "127.0.0.1:10249", "127.0.0.1:10256"
CLOSED = 1  # a port at which nobody listens


@pytest.fixture
def node(home: Home) -> Home:
    home.use(
        "--metrics-bind-address", METRICS, "--healthz-bind-address", HEALTH,
        "--ejection-consecutive-failures", "3", "--ejection-shortest", "120s",
        "--ejection-most-percent", "50",
    )  # fmt: skip
    return home


def get(url: str) -> tuple[int, str]:
    """Status code and body."""
    try:
        with urllib.request.urlopen(f"http://{url}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scrape(query: str = "") -> dict[tuple[str, ...], float]:
    """By name without its prefix, endpoint (of a port "tcp") and what other labels it has."""
    status, body = get(f"{METRICS}/metrics/endpoints{query}")
    assert status == 200, body
    return {
        (
            sample.name.removeprefix("pointsman_endpoint_"),
            *(v for k, v in sorted(sample.labels.items()) if k not in ("namespace", "port")),
        ): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
        if sample.labels.get("port", "tcp") == "tcp"
    }


def rows(node: Home, service: str) -> dict[str, Any]:
    found = json.loads(node.cli("get", "endpoints", service, "-o", "json").stdout)["items"]
    return {row["endpoint"]: row for row in found if row["port"] == "tcp"}


def test_an_ejected_endpoint_is_shown_unasked_and_says_until_when_and_why(node: Home) -> None:
    address, name = vips(1)[0], "shaky"
    good, bad = f"{ONE}:{node.servers.port}", f"{TWO}:{CLOSED}"
    shaky = annotated(service_of(name, (address,), PORT), outlier_ejection="on")
    node.write("shaky.yaml", shaky)
    node.members(name, (ONE, {}))
    node.write("bad.yaml", slice_of(name, ((TWO, {}),), CLOSED, name="bad"))
    until(lambda: rows(node, name).keys() == {good, bad}, "both endpoints")
    until(lambda: ask(address, PORT) and rows(node, name)[bad]["ejection"], "an ejection")
    found = scrape()
    assert found["state", bad, name, "ejected"] == found["ejected", bad, name] == 1
    assert found["ejected_reason", bad, "on", "consecutive-failures", name] == 1
    assert found["consecutive_failures", bad, name] == found["recent_connects", bad, name] == 3
    assert found["open_connections", bad, name] == found["ejected", good, name] == 0
    assert found["connect_time_seconds", good, name] > 0
    assert found["recent_failed_connects", good, name] == 0
    ends = found["ejected_until_timestamp_seconds", bad, name]
    left = rows(node, name)[bad]["ejection"]["leftSeconds"]
    began = scrape()["ejected_until_timestamp_seconds", bad, name]
    assert abs(began - ends) <= 1 and 0 < left <= 120
    assert found[("metrics_left_out",)] == 0
    # The totals are as old as the status file.
    total = "\npointsman_endpoints_ejected 1.0\n"
    until(lambda: total in get(f"{METRICS}/metrics")[1], "the same in the totals")


def test_weights_are_those_in_force_and_idle_endpoints_there_if_asked_for(node: Home) -> None:
    address, name = vips(2)[0], "weighed"
    node.write("weighed.yaml", service_of(name, (address,), PORT))
    node.members(name, (ONE, {}))
    light = slice_of(name, ((THREE, {}),), node.servers.port, name="light")
    node.write("light.yaml", annotated(light, weight="25"))
    port = node.servers.port
    usual, light_one = f"{ONE}:{port}", f"{THREE}:{port}"
    query = f"?service=default/{name}"
    until(lambda: scrape(query).get(("weight", light_one, name)) == 25, "a weight")
    found = scrape(query)
    assert found["weight", usual, name] == 100
    assert found["metrics_service_known", name] == 1
    assert {key[2] for key in found if len(key) > 2} == {name}
    assert not any(name in key for key in scrape()), "nobody has talked to them"
    reached(address)
    assert scrape()["weight", usual, name] == 100
    assert scrape("?namespace=default")["weight", light_one, name] == 25
    assert scrape("?namespace=default&limit=1")[("metrics_left_out",)] > 0


def test_a_service_that_is_not_there_is_unknown_and_a_bad_parameter_refused(node: Home) -> None:
    found = scrape("?service=default/nothing")
    assert found == {("metrics_service_known", "nothing"): 0, ("metrics_left_out",): 0}
    status, body = get(f"{METRICS}/metrics/endpoints?service=nothing")
    assert (status, "write service=NAMESPACE/NAME" in body) == (400, True)


def test_probes_are_answered_while_endpoints_are_scraped(node: Home) -> None:
    address, name = vips(3)[0], "probed"
    node.write("probed.yaml", service_of(name, (address,), PORT))
    node.members(name, (ONE, {}), (TWO, {}))
    until(lambda: reached(address) == {ONE, TWO}, "both endpoints")
    statuses: list[int] = []

    def scrapes() -> None:
        statuses.extend(
            get(f"{METRICS}/metrics/endpoints?service=default/{name}")[0] for _ in range(10)
        )

    threads = [threading.Thread(target=scrapes) for _ in range(4)]
    for thread in threads:
        thread.start()
    probes = []
    while any(thread.is_alive() for thread in threads):
        probes.append(get(f"{HEALTH}/healthz")[0])
    assert set(probes) == {200}
    assert statuses == [200] * 40
