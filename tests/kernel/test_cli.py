"""The reading commands on a node whose agent is dead: all they need is in the kernel."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from pointsman import bpf
from pointsman.hooks import HOOKS
from pointsman.plan import pack_frontend
from pointsman.values import TCP, UDP, Frontend, to_address
from tests.support.agents import AgentProcess, endpoints, service
from tests.support.completion import completions
from tests.support.kernel import REFUSED, Cgroup, of_this_kernel, until

pytestmark = pytest.mark.kernel

V4, V6, DNS, EMPTY = "10.96.6.1", "fd00:96::6:1", "10.96.6.2", "10.96.6.3"

WEB6 = f"""
apiVersion: v1
kind: Service
metadata: {{name: web6}}
spec:
  clusterIP: "{V6}"
  ports: [{{name: p, port: 80}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: web6-1, labels: {{kubernetes.io/service-name: web6}}}}
addressType: IPv6
ports: [{{name: p, port: 8080}}]
endpoints: [{{addresses: ["fd00:244::1"]}}, {{addresses: ["fd00:244::2"]}}]
"""


def fill(node: AgentProcess) -> None:
    web = endpoints("web", ("10.244.0.1", 8080), ("10.244.0.2", 8080))
    node.write("web.yaml", f"{service('web', V4)}---\n{web}")
    node.write("web6.yaml", WEB6)
    dns = endpoints("dns", ("10.244.0.3", 5353), protocol="UDP")
    node.write("dns.yaml", f"{service('dns', DNS, 53, 'UDP')}---\n{dns}")
    node.write("empty.yaml", service("empty", EMPTY))


@pytest.fixture(scope="module")
def filled(kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    cgroup = Cgroup(f"pm_cli_{os.getpid()}")
    cgroup.enter()
    node = AgentProcess(tmp_path_factory.mktemp("cli"), cgroup.path, cgroup.path.name)
    fill(node)
    node.start()
    node.kill()
    yield node
    node.close()
    cgroup.close()


@pytest.fixture
def dead(filled: AgentProcess) -> AgentProcess:
    """A node with Services and programs, and an agent that was killed with -9."""
    assert filled.process and filled.process.poll() is not None
    return filled


@pytest.fixture
def damaged(dead: AgentProcess) -> Iterator[AgentProcess]:
    """The same, for tests that damage it: a new agent mends all, and is killed again."""
    yield dead
    if dead.process and dead.process.poll() is None:
        dead.kill()
    fill(dead)
    dead.start()
    until(lambda: dead.cli("verify", check=False).returncode == 0, "mended maps")
    dead.kill()


def items(node: AgentProcess, *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(node.cli(*arguments, "-o", "json").stdout)["items"]
    return found


def test_ids_are_given_in_the_order_of_names(dead: AgentProcess) -> None:
    rows = sorted(items(dead, "map", "dump", "services"), key=lambda row: row["id"])
    names = [row["name"] for row in rows if row["name"].startswith("default/")]
    assert list(dict.fromkeys(names)) == [
        *("default/dns:p", "default/empty:p", "default/web:p", "default/web6:p")
    ]


# -- get -----------------------------------------------------------------------------------------


def test_get_services_shows_a_row_for_each_with_addresses_ports_and_endpoints(
    dead: AgentProcess,
) -> None:
    lines = dead.cli("get", "services").stdout.splitlines()
    rows = {line.split()[1]: line.split() for line in lines[1:]}
    assert lines[0].split() == [
        "NAMESPACE", "NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "ENDPOINTS", "OPEN"
    ]  # fmt: skip
    assert rows == {
        "dns": ["default", "dns", "ClusterIP", DNS, "<none>", "53/UDP", "1", "0"],
        "empty": ["default", "empty", "ClusterIP", EMPTY, "<none>", "80/TCP", "0", "0"],
        "web": ["default", "web", "ClusterIP", V4, "<none>", "80/TCP", "2", "0"],
        "web6": ["default", "web6", "ClusterIP", V6, "<none>", "80/TCP", "2", "0"],
    }


@pytest.mark.parametrize(
    ("resource", "alias", "more"),
    [
        ("services", "svc", ["ALGORITHM", "AFFINITY", "IDS"]),
        ("endpoints", "ep", ["ID", "GENERATION", "CURRENT"]),
        ("frontends", "fe", ["ALGORITHM", "OWNER", "SLOTS", "CONSISTENT"]),
    ],
)
def test_wide_has_more_columns_of_the_same_rows_and_aliases_are_known(
    dead: AgentProcess, resource: str, alias: str, more: list[str]
) -> None:
    plain = dead.cli("get", alias).stdout.splitlines()
    wide = dead.cli("get", resource, "-o", "wide").stdout.splitlines()
    assert len(plain) == len(wide)
    assert set(more) <= set(wide[0].split())
    assert not set(more) & set(plain[0].split())
    for narrow, line in zip(plain, wide, strict=True):
        assert line.split()[:3] == narrow.split()[:3]


@pytest.mark.parametrize("resource", ["services", "endpoints", "frontends"])
def test_yaml_and_json_say_the_same(dead: AgentProcess, resource: str) -> None:
    as_json = json.loads(dead.cli("get", resource, "-o", "json").stdout)
    assert yaml.safe_load(dead.cli("get", resource, "-o", "yaml").stdout) == as_json
    assert as_json["items"]


def test_get_endpoints_shows_each_with_its_service_and_port(dead: AgentProcess) -> None:
    found = {(i["service"], i["port"], i["endpoint"]) for i in items(dead, "get", "endpoints")}
    assert found == {
        ("web", "p", "10.244.0.1:8080"),
        ("web", "p", "10.244.0.2:8080"),
        ("web6", "p", "[fd00:244::1]:8080"),
        ("web6", "p", "[fd00:244::2]:8080"),
        ("dns", "p", "10.244.0.3:5353"),
    }
    assert all(i["current"] for i in items(dead, "get", "endpoints"))


def test_get_frontends_shows_each_port_and_what_refuses_the_others(dead: AgentProcess) -> None:
    rows = items(dead, "get", "frontends", "-n", "default")
    assert {i["kind"] for i in rows} == {"ClusterIP"}
    assert {i["frontend"]: (i["service"], i["endpoints"]) for i in rows} == {
        f"{V4}:80/TCP": ("web", 2), f"{V4}:*": ("web", 0),
        f"[{V6}]:80/TCP": ("web6", 2), f"[{V6}]:*": ("web6", 0),
        f"{DNS}:53/UDP": ("dns", 1), f"{DNS}:*": ("dns", 0),
        f"{EMPTY}:80/TCP": ("empty", 0), f"{EMPTY}:*": ("empty", 0),
    }  # fmt: skip


def test_node_addresses_are_frontends_but_no_services(dead: AgentProcess) -> None:
    rows = {i["frontend"]: i for i in items(dead, "get", "frontends") if not i["namespace"]}
    assert {rows["127.0.0.1:*"]["kind"], rows["[::1]:*"]["kind"]} == {"Loopback"}
    assert {i["service"].partition("/")[0] for i in rows.values()} == {"node"}
    assert "node" not in dead.cli("get", "services").stdout


@pytest.mark.parametrize("name", [["web"], ["default/web"], ["web", "-n", "default"]], ids=" ".join)
def test_a_name_chooses_one_service(dead: AgentProcess, name: list[str]) -> None:
    assert [i["name"] for i in items(dead, "get", "services", *name)] == ["web"]
    assert {i["service"] for i in items(dead, "get", "endpoints", *name)} == {"web"}


def test_an_empty_namespace_is_no_error(dead: AgentProcess) -> None:
    done = dead.cli("get", "services", "-n", "elsewhere")
    assert (done.returncode, done.stdout) == (0, "")
    assert "No resources found in elsewhere namespace." in done.stderr


def test_open_connections_are_counted_without_an_agent(dead: AgentProcess) -> None:
    # With SO_REUSEADDR: connections of a moment ago may still have the port.
    with socket.create_server(("0.0.0.0", 8080)):
        with socket.create_connection((V4, 80)):
            assert [i["open"] for i in items(dead, "get", "services", "web")] == [1]
            assert sorted(i["open"] for i in items(dead, "get", "endpoints", "web")) == [0, 1]
        until(lambda: items(dead, "get", "services", "web")[0]["open"] == 0, "closed")


def test_watching_prints_a_row_when_an_endpoint_comes_and_one_when_it_goes(
    damaged: AgentProcess,
) -> None:
    damaged.start()
    watch = subprocess.Popen(
        [sys.executable, "-m", "pointsman.cli.main", "get", "endpoints", "web", "-w",
         "--interval", "0.1", "--bpffs", str(damaged.root)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    lines: list[str] = []
    reader = threading.Thread(target=_read, args=(watch, lines))
    reader.start()
    try:
        until(lambda: len(lines) >= 3, "the header and two rows")
        members = [("10.244.0.1", 8080), ("10.244.0.2", 8080), ("10.244.0.9", 8080)]
        damaged.write("web.yaml", f"{service('web', V4)}---\n{endpoints('web', *members)}")
        until(lambda: len(lines) >= 4, "a row for the new endpoint")
        assert "10.244.0.9:8080" in lines[3], lines
        damaged.write("web.yaml", f"{service('web', V4)}---\n{endpoints('web', *members[1:])}")
        until(lambda: "<deleted>" in "".join(lines[4:]), "a row for the endpoint that went")
        # A look between two writes may have shown a row that changes once more before.
        gone = [line for line in lines[4:] if "<deleted>" in line]
        assert [line for line in gone if "10.244.0.1:8080" in line] == gone, lines
        assert not [line for line in lines[4:] if "10.244.0.2:8080" in line], lines
    finally:
        watch.terminate()
        watch.wait()
        reader.join()


def _read(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout
    for line in process.stdout:
        lines.append(line)


# -- describe, map, explain ----------------------------------------------------------------------


def test_describe_shows_the_service_as_kubectl_does_and_then_what_the_kernel_holds(
    dead: AgentProcess,
) -> None:
    text = dead.cli("describe", "service", "default/web").stdout
    above, _, below = text.partition("In the kernel:")
    labels = [line.split(":")[0] for line in above.splitlines() if line and line[0] != " "]
    assert labels[:4] == ["Name", "Namespace", "Labels", "Annotations"]
    assert "10.244.0.1:8080" in above
    for word in (f"{V4}:80", "10.244.0.1:8080", "10.244.0.2:8080", "GENERATION", "OPEN"):
        assert word in below


def test_describe_without_manifests_tells_what_the_maps_know(
    dead: AgentProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = dead.run_dir.with_name("no-status")
    monkeypatch.setattr(dead, "run_dir", hidden)
    done = dead.cli("describe", "svc", "web")
    assert "this is what the maps know" in done.stderr
    assert V4 in done.stdout and "10.244.0.2:8080" in done.stdout


def test_map_list_shows_each_map_with_how_full_it_is(dead: AgentProcess) -> None:
    rows = {row["name"]: row for row in items(dead, "map", "list")}
    pinned = {path.name for path in (dead.root / "current" / "maps").iterdir()}
    assert rows.keys() == pinned
    used = {name: rows[name]["used"] for name in ("frontends", "services", "slots", "load")}
    frontends = len(items(dead, "get", "frontends"))  # with the node's addresses
    assert frontends > 8
    assert used == {"frontends": frontends, "services": frontends, "slots": 5, "load": 5}
    empty = ("datagrams", "source_ranges")  # elsewhere, and allocated element by element
    assert all(row["memoryBytes"] > 0 for row in rows.values() if row["name"] not in empty)
    table = dead.cli("map", "list").stdout.splitlines()
    assert table[0].split() == ["NAME", "TYPE", "USED", "MAX", "FILL", "MEMORY"]
    assert len(table) == 1 + len(rows)


def test_every_map_can_be_dumped_decoded(dead: AgentProcess) -> None:
    found = {}
    for path in (dead.root / "current" / "maps").iterdir():
        done = dead.cli("map", "dump", path.name, "-o", "json")
        found[path.name] = json.loads(done.stdout)["items"]
    frontends = {row["frontend"]: row["service"] for row in found["frontends"]}
    services = {row["id"]: row for row in found["services"]}
    assert set(frontends) == {row["frontend"] for row in services.values()}
    web = services[frontends[f"{V4}:80/TCP"]]
    assert (web["name"], web["count"], web["algorithm"]) == ("default/web:p", 2, "random")
    slots = [row for row in found["slots"] if row["name"] == "default/web:p"]
    assert [row["endpoint"] for row in slots] == ["10.244.0.1:8080", "10.244.0.2:8080"]
    assert [row["slot"] for row in slots] == [web["firstSlot"], web["firstSlot"] + 1]
    valid = {row["id"] for row in found["load"] if row["state"] == "valid"}
    assert valid == {row["id"] for row in found["slots"]}
    names = {row["service"] for row in found["names"] if row["namespace"]}
    assert names == {"web", "web6", "dns", "empty"}
    assert len(found["settings"]) == 1
    assert {row["counter"] for row in found["counters"]} >= {"refused", "undefined_port"}


def test_the_records_of_open_sockets_can_be_dumped(dead: AgentProcess) -> None:
    with (
        socket.create_server(("0.0.0.0", 8080)) as server,
        socket.create_connection((V4, 80)) as client,
    ):
        peer = "{}:{}".format(*server.accept()[0].getsockname())
        assert client.getpeername() == (V4, 80)
        [row] = [r for r in items(dead, "map", "dump", "sockets") if r["vip"] == f"{V4}:80"]
        assert (row["peer"], row["protocol"], row["counted"]) == (peer, "TCP", True)


@pytest.mark.parametrize(
    ("destination", "verdict", "error", "words"),
    [
        pytest.param(
            f"{V4}:80", "translated", "", ["default/web:p", "10.244.0.1:8080", "50.0%"], id="v4"
        ),
        pytest.param(
            f"[{V6}]:80", "translated", "", ["default/web6:p", "[fd00:244::2]:8080"], id="v6"
        ),
        pytest.param(
            f"{DNS}:53/udp", "translated", "", ["default/dns:p", "10.244.0.3:5353"], id="udp"
        ),
        pytest.param(f"{EMPTY}:80", "refused", "ECONNREFUSED", ["no endpoints"], id="empty"),
        pytest.param(
            f"{V4}:81", "refused", "ECONNREFUSED", ["no Service defines port 81"], id="port"
        ),
        pytest.param(
            f"[{V6}]:81", "refused", "ECONNREFUSED", ["no Service defines port 81"], id="v6-port"
        ),
        pytest.param(
            f"{DNS}:53", "refused", "ECONNREFUSED", ["no Service defines port 53"],
            id="tcp-where-only-udp-is",
        ),
        pytest.param(
            f"{V4}:80/udp", "refused", "ECONNREFUSED", ["port 80/udp"], id="udp-where-only-tcp-is"
        ),
        pytest.param("10.244.0.1:8080", "not-a-service", "", ["not a Service"], id="an-endpoint"),
        pytest.param("[fd00::99]:80", "not-a-service", "", ["not a Service"], id="no-service-v6"),
    ],
)  # fmt: skip
def test_explain_says_what_a_connect_gets_and_the_kernel_agrees(
    dead: AgentProcess, destination: str, verdict: str, error: str, words: list[str]
) -> None:
    found = json.loads(dead.cli("explain", destination, "-o", "json").stdout)
    assert (found["verdict"], found["errno"]) == (verdict, of_this_kernel(error))
    text = dead.cli("explain", destination).stdout
    for word in words:
        assert word in text
    address, _, rest = destination.rpartition(":")
    port, _, protocol = rest.partition("/")
    host = address.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM if protocol else socket.SOCK_STREAM) as client:
        client.settimeout(30)
        if protocol and verdict == "translated":
            client.connect((host, int(port)))
            assert client.getpeername()[:2] == (host, int(port))
        elif protocol or family == socket.AF_INET or verdict == "refused":
            # Nobody listens on the endpoints: TCP is refused in any case, by them or by the hook.
            with pytest.raises(OSError) as caught:
                client.connect((host, int(port)))
            if verdict == "refused":
                assert errno.errorcode[caught.value.errno or 0] == found["errno"]


# -- verify --------------------------------------------------------------------------------------


def differences(node: AgentProcess) -> set[tuple[str, str]]:
    done = node.cli("verify", "-o", "json", check=False)
    value = json.loads(done.stdout)
    assert done.returncode == (1 if value["differences"] else 0), done.stderr
    assert value["equal"] == (not value["differences"])
    table = node.cli("verify", check=False)
    assert table.returncode == done.returncode
    for difference in value["differences"]:
        assert difference["message"] in table.stdout
    return {(d["kind"], d["object"]) for d in value["differences"]}


def test_verify_finds_no_difference_after_a_kill(dead: AgentProcess) -> None:
    assert differences(dead) == set()


def test_verify_names_a_frontend_that_is_missing_and_what_it_leaves_behind(
    damaged: AgentProcess,
) -> None:
    opened = bpf.Map.open(damaged.root / "current" / "maps" / "frontends")
    assert opened.delete(pack_frontend(Frontend(to_address(V4), 80, TCP)))
    assert opened.delete(pack_frontend(Frontend(to_address(DNS), 53, UDP)))
    opened.close()
    found = differences(damaged)
    assert found >= {
        ("frontend-missing", f"{V4}:80/TCP"),
        ("service-dangling", f"{V4}:80/TCP"),
        ("frontend-missing", f"{DNS}:53/UDP"),
        ("service-dangling", f"{DNS}:53/UDP"),
    }
    # With port 80 gone the wildcard is what answers: the program and `explain` agree.
    assert "refused" in damaged.cli("explain", f"{V4}:80", "-o", "json").stdout
    with pytest.raises(REFUSED):
        socket.create_connection((V4, 80))


def test_verify_names_each_difference_to_edited_manifests(damaged: AgentProcess) -> None:
    members = [("10.244.0.1", 8080), ("10.244.0.7", 8080)]
    damaged.write("web.yaml", f"{service('web', V4)}---\n{endpoints('web', *members)}")
    damaged.write("new.yaml", service("new", "10.96.6.9"))
    (damaged.manifests / "empty.yaml").unlink()
    found = differences(damaged)
    assert found == {
        ("endpoint-missing", f"{V4}:80/TCP"),
        ("endpoint-extra", f"{V4}:80/TCP"),
        ("frontend-missing", "10.96.6.9:80/TCP"),
        ("frontend-missing", "10.96.6.9:*"),
        ("frontend-extra", f"{EMPTY}:80/TCP"),
        ("frontend-extra", f"{EMPTY}:*"),
    }
    (damaged.manifests / "new.yaml").unlink()


# -- status --------------------------------------------------------------------------------------


def status(node: AgentProcess, code: int) -> dict[str, Any]:
    done = node.cli("status", "-o", "json", check=False)
    assert done.returncode == code, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    table = node.cli("status", check=False)
    assert table.returncode == code
    assert (table.stdout.splitlines()[-1] == "healthy") == (code == 0)
    for reason in found["reasons"]:
        assert reason in table.stdout
    return found


def test_status_is_0_while_all_is_well_and_1_once_the_agent_is_dead(damaged: AgentProcess) -> None:
    damaged.start()
    found = status(damaged, 0)
    assert found["healthy"] and not found["reasons"]
    assert found["datapath"]["cgroup"]["path"] == str(damaged.cgroup)
    assert found["source"]["objects"]["Service"] == 4
    damaged.kill()
    found = status(damaged, 1)
    assert found["reasons"] == ["the agent is not running: start it with 'pointsman up'"]
    assert found["datapath"]["links"] == {"attached": len(HOOKS), "total": len(HOOKS)}


def test_status_is_1_and_names_the_hook_whose_link_was_removed(damaged: AgentProcess) -> None:
    damaged.start()
    assert damaged.process
    damaged.process.send_signal(signal.SIGSTOP)  # else it attaches it again
    (damaged.root / "links" / "connect4").unlink()
    found = status(damaged, 1)
    assert found["reasons"] == ["connect4: not attached"]
    assert found["datapath"]["links"] == {"attached": len(HOOKS) - 1, "total": len(HOOKS)}
    damaged.kill()  # while it runs, `verify` waits for what it does about it
    assert ("link", "connect4") in differences(damaged)
    assert "not every hook is attached" in damaged.cli("explain", f"{V4}:80").stderr


# -- bpftool -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("get services ", ["dns", "empty", "web", "web6"]),
        ("get endpoints we", ["web", "web6"]),
        ("get frontends -n default e", ["empty"]),
        ("get frontends -n other ", []),
        ("get services default/w", ["default/web", "default/web6"]),
        ("describe service d", ["dns"]),
        ("get services -n ", ["default"]),
        ("trace --service ", ["default/dns", "default/empty", "default/web", "default/web6"]),
        ("map dump sk", ["skipped_netns"]),
    ],
)
def test_a_shell_is_offered_the_names_in_the_maps(
    dead: AgentProcess, words: str, expected: list[str]
) -> None:
    found = completions("bash", f"pointsman {words}", POINTSMAN_BPFFS=str(dead.root))
    assert found == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("frontends", ["addr", "port", "proto", "service"]),
        ("services", ["set", "owner", "algorithm", "affinity", "key", "addr"]),
        ("slots", ["addr", "port", "endpoint", "generation", "owner"]),
        ("load", ["generation", "open"]),
        ("names", ["namespace", "service", "port"]),
    ],
)
def test_bpftool_shows_the_names_of_the_fields(
    dead: AgentProcess, missing: Callable[[str], None], name: str, words: list[str]
) -> None:
    bpftool = shutil.which("bpftool", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if not bpftool:
        missing("bpftool")
    # Elements, not the whole array: it has 65536 of them.
    opened = bpf.Map.open(dead.root / "current" / "maps" / name, read_only=True)
    hashed = opened.info.type == 1
    opened.close()
    verb = ["dump"] if hashed else ["lookup"]
    key = [] if hashed else ["key", "1", "0", "0", "0"]
    pin = str(dead.root / "current" / "maps" / name)
    done = subprocess.run(
        [str(bpftool), "-j", "map", *verb, "pinned", pin, *key],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    element = (found[0] if isinstance(found, list) else found)["formatted"]
    keys: set[str] = set()
    todo = [element.get("key"), element["value"]]
    while todo:
        each = todo.pop()
        if isinstance(each, dict):
            keys |= each.keys()
            todo += each.values()
    assert set(words) <= keys
