"""/metrics: documented in full, kube-proxy's where it says so, and no dearer with more Services."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric

from pointsman.events import Reach
from pointsman.telemetry import Facts, Telemetry, Watched
from pointsman.telemetry.metrics import Exposition
from pointsman.telemetry.numbers import Histogram

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/metrics.md").read_text()
FACTS = Facts(
    services=3,
    frontends=7,
    endpoints=11,
    ejected=2,
    maps={"frontends": (7, 1000), "slots": (40, 4000)},
    counters={"refused": 5, "unreachable": 0},
    no_local={"internal": 1, "external": 2},
    stale={"checks": 9, "destroyed": 4, "flowsDeleted": 6},
    drains={"closed": 21, "left": 5},
    problems={"error": 1, "warning": 2},
    dns_queries={"NOERROR": 100},
    dns={"forwarded": 8, "upstream_errors": 1, "dropped": 2, "errors": 0},
    packets={
        "rounds": 12,
        "expired": 34,
        "entries": {"open": 6, "new": 2},
        "room": {"open": 4096, "new": 1024},
        "seconds": 0.5,
        "cpuSeconds": 0.25,
        "nat": {"available": 4536, "used": 30, "most": 20},
        "counters": {"packet_here": 7, "drop_no_port": 3, "flow_begun": 1},
    },
)


def a_telemetry() -> Telemetry:
    """With something in every metric."""
    telemetry = Telemetry()
    telemetry.queued(2, 3)
    for stage in ("resolve", "plan", "apply", "conntrack"):
        telemetry.stage(stage, 0.002)
    telemetry.synced(True, 0.003, [time.time() - 1.5])
    telemetry.synced(False, 0.001)
    telemetry.failed()
    telemetry.healthz()
    telemetry.livez()
    telemetry.recorded("written")
    watched: Watched = telemetry
    watched.relisted("services")
    watched.event("services", "ADDED")
    watched.bookmark("services")
    watched.watch_failed("endpointslices", "Expired")
    telemetry.reach(Reach("https://192.0.2.1:6443", time.time() - 100, "timed out"))
    telemetry.facts(FACTS)
    return telemetry


def exposition(telemetry: Telemetry | None = None) -> Exposition:
    return Exposition((telemetry or a_telemetry()).numbers)


def name_of(metric: Metric) -> str:
    """As queries have it."""
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def families(telemetry: Telemetry | None = None) -> dict[str, Metric]:
    return {name_of(metric): metric for metric in exposition(telemetry).registry.collect()}


def samples(telemetry: Telemetry | None = None) -> dict[str, float]:
    """Every sample by name and labels, as text has it."""
    lines = exposition(telemetry).render("", "")[0].decode().splitlines()
    parts = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {key: float(value) for key, _, value in parts}


def test_the_document_has_every_metric_its_type_and_its_labels() -> None:
    documented = {
        name: (kind, frozenset(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in re.findall(
            r"^\| `((?:kubeproxy|pointsman(?!_endpoint_)|process|python)_\w+)`"
            r" \| (\w+) \| ([^|]*)\|",
            DOCUMENT,
            re.MULTILINE,
        )
    }
    found = {
        name: (
            metric.type,
            frozenset(label for s in metric.samples for label in s.labels if label != "le"),
        )
        for name, metric in families().items()
    }
    assert documented == found
    assert all(metric.samples for metric in families().values())


def test_the_document_s_reasons_are_those_of_the_code() -> None:
    table = DOCUMENT[DOCUMENT.index("| reason |") :]
    reasons = {r for line in table.splitlines() for r in re.findall(r"`(\w+)`", line.split("|")[1])}
    code = "".join(path.read_text() for path in (ROOT / "ctl/pointsman").rglob("*.py"))
    assert len(reasons) > 10
    # The agent says the first one itself.
    assert [r for r in sorted(reasons - {"Starting"}) if f'"{r}"' not in code] == []


def test_help_is_there_for_every_metric() -> None:
    assert [name for name, metric in families().items() if not metric.documentation] == []


def bounds(name: str) -> list[str]:
    found = families()[name].samples
    return [
        s.labels["le"] for s in found if s.labels.get("ip_family") == "IPv4" and "le" in s.labels
    ]


def test_bounds_are_kube_proxy_s() -> None:
    sync = bounds("kubeproxy_sync_proxy_rules_duration_seconds")
    assert (sync[0], sync[-2], len(sync)) == ("0.001", "16.384", 16)
    programming = bounds("kubeproxy_network_programming_duration_seconds")
    expected = ["0.25", "0.5", *map(str, range(1, 60)), *map(str, range(60, 120, 5))]
    expected += [*map(str, range(120, 301, 30)), "+Inf"]
    assert programming == expected


def test_a_sync_counts_for_both_families() -> None:
    found = samples()
    for family in ("IPv4", "IPv6"):
        sync = f'kubeproxy_sync_proxy_rules_duration_seconds_count{{ip_family="{family}"}}'
        assert found[sync] == 2
        bucket = "kubeproxy_network_programming_duration_seconds_bucket"
        assert found[f'{bucket}{{ip_family="{family}",le="1"}}'] == 0
        assert found[f'{bucket}{{ip_family="{family}",le="2"}}'] == 1


@pytest.mark.parametrize(
    ("sample", "value"),
    [
        ("kubeproxy_sync_proxy_rules_service_changes_total", 2),
        ("kubeproxy_sync_proxy_rules_endpoint_changes_total", 3),
        ("kubeproxy_sync_proxy_rules_endpoint_changes_pending", 0),
        ('kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy="external"}', 2),
        ('kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family="IPv6"}', 1),
        ('kubeproxy_proxy_healthz_total{code="200"}', 1),
        ("kubeproxy_conntrack_reconciler_deleted_entries_total", 6),
        ('kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family="IPv4"}', 1),
        ('pointsman_sync_stage_duration_seconds_count{stage="plan"}', 1),
        ('pointsman_watch_events_total{resource="services",type="BOOKMARK"}', 1),
        ('pointsman_watch_failures_total{reason="Expired",resource="endpointslices"}', 1),
        ("pointsman_api_server_reachable", 0),
        ('pointsman_map_capacity{map="slots"}', 4000),
        ('pointsman_map_entries{map="slots"}', 40),
        ('pointsman_datapath_total{counter="refused"}', 5),
        ("pointsman_stale_sockets_destroyed_total", 4),
        ("pointsman_drained_connections_total", 21),
        ("pointsman_drain_connections_left", 5),
        ('pointsman_problems{severity="warning"}', 2),
        ('pointsman_dns_queries_total{rcode="NOERROR"}', 100),
    ],
)
def test_each_number_stands_where_it_belongs(sample: str, value: float) -> None:
    assert samples()[sample] == value


def test_how_long_the_api_server_is_away_is_worked_out_when_asked() -> None:
    telemetry = a_telemetry()
    assert samples(telemetry)["pointsman_api_server_unreachable_seconds"] >= 100
    telemetry.reach(Reach("https://192.0.2.1:6443", time.time()))
    found = samples(telemetry)
    assert found["pointsman_api_server_unreachable_seconds"] == 0
    assert found["pointsman_api_server_reachable"] == 1


def test_without_an_api_server_or_dns_nothing_is_said_of_them() -> None:
    names = {key.partition("{")[0] for key in samples(Telemetry())}
    assert not {name for name in names if "api_server" in name or "dns" in name}


def test_more_services_make_no_more_samples() -> None:
    few, many = a_telemetry(), a_telemetry()
    many.facts(Facts(**{**{f: getattr(FACTS, f) for f in FACTS.__slots__}, "services": 10_000}))
    many.queued(10_000, 100_000)
    assert samples(few).keys() == samples(many).keys()


def test_a_copy_of_the_numbers_does_not_change() -> None:
    telemetry = a_telemetry()
    before = telemetry.numbers()
    total = list(before.sync.cumulative())
    telemetry.synced(True, 1.0)
    telemetry.stage("plan", 1.0)
    telemetry.healthz()
    assert list(before.sync.cumulative()) == total
    assert [count for _, count in before.stages["plan"].cumulative()][-1] == 1
    assert before.healthz == {"200": 1}


def test_a_value_on_a_bound_belongs_to_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (1.0, 1.5, 2.0, 3.0):
        histogram.observe(value)
    assert list(histogram.cumulative()) == [(1.0, 1), (2.0, 3), (float("inf"), 4)]
    assert histogram.sum == 7.5


def test_a_trigger_of_the_future_took_no_time() -> None:
    telemetry = Telemetry()
    telemetry.synced(True, 0.1, [time.time() + 60])
    name = "kubeproxy_network_programming_duration_seconds_sum"
    assert samples(telemetry)[f'{name}{{ip_family="IPv4"}}'] == 0


def test_prometheus_client_is_not_imported_before_somebody_scrapes() -> None:
    code = (
        "import sys; from pointsman.telemetry import Telemetry, http, servers, nodehealth; "
        "servers.HttpServers(http.HttpLoop(), Telemetry(), metrics=[('127.0.0.1', 0)]); "
        "sys.exit('prometheus_client' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_packets_are_counted_by_verdict_and_drops_by_reason() -> None:
    found = samples()
    assert found['pointsman_packets_total{verdict="packet_here"}'] == 7
    assert found['pointsman_packet_drops_total{reason="no_port"}'] == 3
    assert 'pointsman_packets_total{verdict="drop_no_port"}' not in found
    # Two entries are one flow.
    assert found['pointsman_flows{state="open"}'] == 3
    assert found["pointsman_nat_ports_used_max"] == 20


def test_former_programs_are_a_metric() -> None:
    assert samples()["pointsman_packet_programs_former"] == 0
    telemetry = a_telemetry()
    telemetry.facts(replace(FACTS, packets={**FACTS.packets, "former": True}))
    assert samples(telemetry)["pointsman_packet_programs_former"] == 1


def test_an_agent_without_devices_shows_nothing_of_packets() -> None:
    telemetry = a_telemetry()
    telemetry.facts(replace(FACTS, packets={}))
    shown = "".join(samples(telemetry))
    assert not re.search("pointsman_(packet|flows|sweep|nat)", shown)
