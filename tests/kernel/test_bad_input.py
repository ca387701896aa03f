"""Bad manifests and full maps: named with what to do, and nothing else suffers."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.reach import Everyone, everyone
from tests.support.agents import AgentProcess, endpoints, service
from tests.support.kernel import Cgroup, until

pytestmark = pytest.mark.kernel

OTHER = "10.96.8.1"
Problem = dict[str, str]


@dataclass(frozen=True)
class Case:
    """One bad file. `spoil` makes it out of the good text (None: `write` does it to the file);
    `kind`, `field` and the words are what the problem must say. `kind` "" names no object."""

    spoil: Callable[[str], str | bytes] | None
    kind: str
    field: str
    message: str
    mend: str
    write: Callable[[Path], None] | None = None
    name: str = ""  # of the object, when it is not the case's own


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text, f"the good text has no {old!r}: {text}"
        return text.replace(old, new, 1)

    return change


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 100 << 20)


def fifo(path: Path) -> None:
    fresh = path.with_name(f".{path.name}")
    os.mkfifo(fresh)
    fresh.rename(path)  # without it for a moment, its objects would have been deleted


SLICE_ADDRESS = "endpoints[0].addresses[0]"
CASES = {
    "malformed-yaml": Case(replaced("spec:", "spec: ]"), "", "", "malformed YAML", "mend the YAML"),
    "tab": Case(replaced("spec:", "\tspec:"), "", "", "malformed YAML", "mend the YAML"),
    "binary": Case(lambda _: b"\x7fELF\0\0\1", "", "", "binary file", "UTF-8"),
    "latin-1": Case(
        lambda text: f"# caf\xe9\n{text}".encode("latin-1"), "", "", "not UTF-8", "UTF-8"
    ),
    "huge": Case(None, "", "", "104857600 bytes", "at most", write=sparse),
    "fifo": Case(None, "", "", "no regular file", "write a file", write=fifo),
    "aliases": Case(
        lambda _: "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{chr(n + 1)}: &{chr(n + 1)} [{', '.join(['*' + chr(n)] * 9)}]\n"
            for n in range(ord("a"), ord("i"))
        ),
        "", "", "aliases", "write the values out",
    ),
    "no-object": Case(lambda _: "- just\n- a list\n", "", "", "no object", "apiVersion"),
    "unknown-kind": Case(
        replaced("kind: Service", "kind: Servce"), "", "kind", '"Servce" is unknown',
        "write Service",
    ),
    "wrong-version": Case(
        replaced("apiVersion: v1", "apiVersion: v2"), "Service", "apiVersion", '"v2"', "write v1"
    ),
    "text-for-a-port": Case(
        replaced("port: 80,", 'port: "80",'), "Service", "spec.ports[0].port",
        'expected a whole number, got "80"', "without quotes",
    ),
    "mapping-for-a-list": Case(
        replaced("ports: [{name: p, port: 80, protocol: TCP}]", "ports: {name: p, port: 80}"),
        "Service", "spec.ports", "expected a list, got a mapping", "write a list",
    ),
    "port-out-of-range": Case(
        replaced("port: 80,", "port: 70000,"), "Service", "spec.ports[0].port",
        "70000 is not a port", "1 to 65535",
    ),
    "no-ports": Case(
        replaced("[{name: p, port: 80, protocol: TCP}]", "[]"), "Service", "spec.ports",
        "no ports", "add one",
    ),
    "unknown-protocol": Case(
        replaced("protocol: TCP", "protocol: QUIC"), "Service", "spec.ports[0].protocol",
        '"QUIC" is unknown', "TCP, UDP or SCTP",
    ),
    "bad-port-name": Case(
        replaced("name: p,", "name: p_1,"), "Service", "spec.ports[0].name", '"p_1"', "lower-case"
    ),
    "bad-name": Case(
        lambda text: text + "\n---\n" + service("Not_A_Label", "10.96.8.99"), "Service",
        "metadata.name", "not a DNS label", "lower-case", name="Not_A_Label",
    ),
    "bad-cluster-ip": Case(
        replaced("clusterIP: 10.96.7.", "clusterIP: 10.96.700."), "Service", "spec.clusterIP",
        "not an IP address", "write one such as",
    ),
    "loopback-cluster-ip": Case(
        replaced("clusterIP: 10.96.7.", "clusterIP: 127.96.7."), "Service", "spec.clusterIP",
        "loopback", "other hosts can reach",
    ),
    "wrong-family-service": Case(
        replaced("ports:", "ipFamilies: [IPv6]\n  ports:"), "Service", "spec.clusterIP",
        "is IPv4", "make them agree",
    ),
    "wrong-family-endpoint": Case(
        replaced("10.244.1.", "fd00:244::"), "EndpointSlice", SLICE_ADDRESS,
        "not an IPv4 address", "write an IPv4 address",
    ),
    "loopback-endpoint": Case(
        replaced("10.244.1.", "127.0.0."), "EndpointSlice", SLICE_ADDRESS, "loopback",
        "other hosts can reach",
    ),
    "unspecified-endpoint": Case(
        lambda text: text.replace("10.244.1.", "0.0.0.0 #"), "EndpointSlice", SLICE_ADDRESS,
        "unspecified", "other hosts can reach",
    ),
    "fqdn-slice": Case(
        lambda text: f"{text}\n---\n{FQDN}", "EndpointSlice", "addressType", "FQDN",
        "IPv4 or IPv6", name="by-name",
    ),
    "twice-in-a-file": Case(
        lambda text: f"{text}\n---\n{text.partition('---')[0]}", "Service", "", "defines it again",
        "delete one",
    ),
}  # fmt: skip

FQDN = """
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: by-name, labels: {kubernetes.io/service-name: fqdn-slice}}
addressType: FQDN
ports: [{name: p, port: 80}]
endpoints: [{addresses: [web.example.com]}]
"""


def vip(case: str) -> str:
    return f"10.96.7.{list(CASES).index(case) + 1}"


def pod(case: str, version: int) -> str:
    return f"10.244.{version}.{list(CASES).index(case) + 1}"


def good(case: str, version: int, port: int) -> str:
    return f"{service(case, vip(case))}\n---\n{endpoints(case, (pod(case, version), port))}"


@dataclass
class Scene:
    """What was seen of all cases at once: good, then spoilt, then mended."""

    directory: Path
    problems: list[Problem] = field(default_factory=list)
    after: list[Problem] = field(default_factory=list)
    spoilt: dict[str, str] = field(default_factory=dict)
    mended: dict[str, str] = field(default_factory=dict)
    others: str = ""
    healthy: bool = False
    counted: tuple[int, int] = (0, 0)
    log: str = ""

    def problem(self, case: str) -> Problem:
        path = str(self.directory / f"{case}.yaml")
        found = [problem for problem in self.problems if problem["where"] == path]
        assert found, f"no problem names {path}: {self.problems}"
        assert len(found) == 1, found
        return found[0]


@pytest.fixture(scope="module")
def scene(kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    cgroup = Cgroup(f"pm_bad_{os.getpid()}")
    cgroup.enter()
    node = AgentProcess(tmp_path_factory.mktemp("bad"), cgroup.path, cgroup.path.name)
    try:
        with everyone() as servers:
            yield _play(node, servers)
    finally:
        node.close()
        cgroup.close()


def _play(node: AgentProcess, servers: Everyone) -> Scene:
    seen = Scene(node.manifests)
    for case in CASES:
        node.write(f"{case}.yaml", good(case, 1, servers.port))
    node.write("other.yaml", service("other", OTHER))
    node.write("other-slices.yaml", endpoints("other", ("10.244.3.1", servers.port)))
    node.start()
    for case in CASES:
        assert servers.reached(vip(case)) == pod(case, 1), case
    before = status(node)["sync"]["problems"]

    for name, case in CASES.items():
        path = node.manifests / f"{name}.yaml"
        if case.write:
            case.write(path)
        elif case.spoil:
            spoilt = case.spoil(good(name, 2, servers.port).replace("10.244.2.", "10.244.1."))
            # In one step: a half of it is another bad file, and nothing says what was meant.
            fresh = path.with_name(f".{path.name}")
            fresh.write_bytes(spoilt if isinstance(spoilt, bytes) else spoilt.encode())
            fresh.rename(path)
    paths = {str(node.manifests / f"{name}.yaml") for name in CASES}
    wait(lambda: paths <= {problem["where"] for problem in node.status()["problems"]})
    found = status(node)
    seen.problems, seen.healthy = found["problems"], found["healthy"]
    # Everything else goes on: a change beside the bad files takes effect.
    node.write("other-slices.yaml", endpoints("other", ("10.244.3.2", servers.port)))
    wait(lambda: servers.reached(OTHER) == "10.244.3.2")
    seen.others = servers.reached(OTHER)
    seen.spoilt = {case: servers.reached(vip(case)) for case in CASES}
    seen.counted = before, status(node)["sync"]["problems"]

    for case in CASES:
        node.write(f"{case}.yaml", good(case, 2, servers.port))
    wait(lambda: not node.status()["problems"])
    seen.after = status(node)["problems"]
    seen.mended = {case: servers.reached(vip(case)) for case in CASES}
    seen.log = node.log.read_text()
    return seen


def wait(condition: Callable[[], bool]) -> None:
    """As `until`, but what never came is left to the tests to name."""
    with contextlib.suppress(AssertionError):
        until(condition, "")


def status(node: AgentProcess) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(node.cli("status", "-o", "json", check=False).stdout)
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_is_bad_is_named_with_file_object_field_and_mend(scene: Scene, case: str) -> None:
    problem, wanted = scene.problem(case), CASES[case]
    name = f"{wanted.kind} default/{wanted.name or case}"
    if wanted.kind == "EndpointSlice" and not wanted.name:
        assert problem["object"].startswith(f"{name}-")
    else:
        assert problem["object"] == (name if wanted.kind else "")
    assert problem["field"] == wanted.field
    assert wanted.message in problem["message"]
    assert wanted.mend in problem["mend"]


@pytest.mark.parametrize("case", CASES)
def test_the_log_says_once_what_is_bad_and_once_that_it_is_mended(scene: Scene, case: str) -> None:
    problem = scene.problem(case)
    said = [line for line in scene.log.split("\n") if problem["where"] in line]
    level = " WARNING " if problem["severity"] == "warning" else " ERROR "
    assert [level in said[0], "mended: " in said[1]] == [True, True], said
    assert len(said) == 2, said
    assert f"{problem['message']}; {problem['mend']}" in said[0]


@pytest.mark.parametrize("case", CASES)
def test_the_last_good_version_of_a_bad_object_stays_in_force(scene: Scene, case: str) -> None:
    assert scene.spoilt[case] == pod(case, 1)


@pytest.mark.parametrize("case", CASES)
def test_a_mended_object_is_in_force_at_once(scene: Scene, case: str) -> None:
    assert scene.mended[case] == pod(case, 2)


def test_no_problem_is_left_once_all_is_mended(scene: Scene) -> None:
    assert scene.after == []


def test_a_counter_tells_how_many_problems_there_were(scene: Scene) -> None:
    before, after = scene.counted
    assert after - before == len(CASES)


def test_bad_files_keep_no_other_object_from_changing(scene: Scene) -> None:
    assert scene.others == "10.244.3.2"


def test_bad_objects_do_not_make_the_node_unhealthy(scene: Scene) -> None:
    assert scene.healthy


def test_bad_input_leaves_no_traceback_in_the_log(scene: Scene) -> None:
    assert "Traceback" not in scene.log


# -- ClusterIPs ----------------------------------------------------------------------------------


def problems(node: AgentProcess) -> list[Problem]:
    found: list[Problem] = status(node)["problems"]
    return found


def test_of_two_services_with_one_cluster_ip_the_older_keeps_it_until_it_goes(
    node: AgentProcess,
) -> None:
    with everyone() as servers:
        shared = "10.96.8.2"
        # The younger comes first in the directory: what counts is who had the address first.
        node.write("b-older.yaml", service("older", shared))
        node.write("slices.yaml", endpoints("older", ("10.244.0.1", servers.port)))
        node.write("slices-2.yaml", endpoints("younger", ("10.244.0.2", servers.port)))
        node.start()
        node.write("a-younger.yaml", service("younger", shared))
        until(lambda: node.status()["problems"], "the problem")
        [problem] = problems(node)
        assert problem["object"] == "Service default/younger"
        assert problem["field"] == "spec.clusterIP"
        assert problem["where"] == str(node.manifests / "a-younger.yaml")
        assert f"{shared} belongs to Service default/older" in problem["message"]
        assert "choose another" in problem["mend"]
        assert servers.reached(shared) == "10.244.0.1"
        # Neither does a restart change the owner, whatever the order of the files.
        node.stop()
        node.start()
        until(lambda: node.status()["problems"], "the problem")
        assert [p["object"] for p in problems(node)] == ["Service default/younger"]
        assert servers.reached(shared) == "10.244.0.1"
        (node.manifests / "b-older.yaml").unlink()
        until(lambda: servers.reached(shared) == "10.244.0.2", "the address passed on")
        until(lambda: not node.status()["problems"], "no problem any more")


def test_a_service_without_a_cluster_ip_keeps_the_one_it_was_given(node: AgentProcess) -> None:
    def address() -> str:
        items = json.loads(node.cli("get", "services", "-o", "json").stdout)["items"]
        return str(next(i["clusterIPs"][0] for i in items if i["name"] == "web"))

    def text(name: str) -> str:
        return "".join(
            line for line in service(name, "").splitlines(True) if "clusterIP" not in line
        )

    with everyone() as servers:
        # Addresses follow from the names alone, mostly: take the one that this name would get.
        node.write("web.yaml", text("web"))
        node.write("slices.yaml", endpoints("web", ("10.244.0.1", servers.port)))
        node.start()
        natural = address()
        node.kill()
        (node.manifests / "web.yaml").unlink()
        node.cli("unload")
        (node.state_dir / "cluster-ips.json").unlink()
        node.write("thief.yaml", service("thief", natural))
        node.start()
        node.write("web.yaml", text("web"))
        until(lambda: servers_of(node, "web"), "web in the maps")
        given = address()
        assert given != natural
        assert servers.reached(given) == "10.244.0.1"
        # The thief is gone: only what is remembered speaks for the address that web has.
        (node.manifests / "thief.yaml").unlink()
        until(lambda: not servers_of(node, "thief"), "the thief gone")
        node.stop()
        node.start()
        assert address() == given
        node.kill()
        node.cli("unload")
        node.start()
        assert address() == given
        assert servers.reached(given) == "10.244.0.1"


def servers_of(node: AgentProcess, name: str) -> bool:
    return node.cli("get", "services", name, check=False).returncode == 0


# -- full maps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "size", "word", "members", "count"),
    [
        pytest.param("--max-endpoints", 16, "load is full (16 endpoints)", 4, 4, id="endpoints"),
        pytest.param("--max-slots", 16, "slots is full (16,", 5, 4, id="slots"),
        # Each Service takes two; the node's own addresses, eleven, come after all Services.
        pytest.param("--max-services", 18, "services is full (18)", 1, 10, id="services"),
    ],
)
def test_in_a_full_map_what_fits_works_what_does_not_is_named_and_comes_when_there_is_room(
    node: AgentProcess, option: str, size: int, word: str, members: int, count: int
) -> None:
    names = [f"s{n}" for n in range(count)]

    def reached(name: str) -> bool:
        return servers.reached(f"10.96.8.{10 + names.index(name)}").startswith("10.244.")

    def unplaced() -> set[str]:
        # The node's own addresses are among those that may find no room.
        return {p["object"].partition("/")[2] or "node" for p in node.status()["problems"]}

    with everyone() as servers:
        for n, name in enumerate(names):
            node.write(f"{name}.yaml", service(name, f"10.96.8.{10 + n}"))
            pods = [(f"10.244.{n + 1}.{k}", servers.port) for k in range(1, members + 1)]
            node.write(f"{name}-slices.yaml", endpoints(name, *pods))
        node.start(option, str(size))
        until(lambda: unplaced() - {"node"}, "the problem of a full map")
        out = unplaced()
        assert len(out - {"node"}) < count
        for problem in problems(node):
            assert word in problem["message"], problem
            assert f"raise {option}" in problem["message"], problem
            assert problem["mend"], problem
            if problem["object"].startswith("Node"):
                continue
            name = problem["object"].partition("/")[2]
            assert problem["where"] == str(node.manifests / f"{name}.yaml")
        # A Service of several frontends may be there in part, but none is missing unnamed.
        missed = {name for name in names if not reached(name)}
        assert missed and missed <= out
        for name in sorted(set(names) - out):
            if not out:
                break
            (node.manifests / f"{name}.yaml").unlink()
            # The node's own addresses may want all that one Service leaves.
            with contextlib.suppress(AssertionError):
                until(lambda left=out: unplaced() < left, "room", 3)
            out = unplaced()
        until(lambda: not unplaced(), "room for all that are left")
        for name in names:
            if (node.manifests / f"{name}.yaml").exists():
                assert reached(name), name
        assert node.cli("verify").returncode == 0


# -- restarts ------------------------------------------------------------------------------------


def test_the_last_good_version_stays_in_force_over_a_restart_too(node: AgentProcess) -> None:
    with everyone() as servers:
        text = f"{service('web', OTHER)}---\n" + endpoints("web", ("10.244.0.1", servers.port))
        node.write("web.yaml", text)
        node.start()
        node.write("web.yaml", text.replace("port: 80,", "port: 0,"))
        until(lambda: node.status()["problems"], "the problem")
        node.kill()
        node.start()
        until(lambda: node.status()["problems"], "the problem, said again")
        assert servers.reached(OTHER) == "10.244.0.1"
        assert node.cli("verify").returncode == 0
        node.write("web.yaml", text.replace("10.244.0.1", "10.244.0.2"))
        until(lambda: servers.reached(OTHER) == "10.244.0.2", "the mended version")


# -- how files change ----------------------------------------------------------------------------


def test_what_pointsman_does_not_read_is_passed_over_without_a_word(node: AgentProcess) -> None:
    node.write("web.yaml", service("web", OTHER))
    node.write("crd.yaml", "apiVersion: example.com/v1\nkind: Service\nmetadata: {name: x}\n")
    node.write("deploy.yaml", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n")
    node.write("map.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndata: {a: b}\n")
    node.write("empty.yaml", "")
    node.write("comment.yaml", "# nothing yet\n---\n")
    node.write("README.md", "\0 not a manifest")
    node.start()
    assert problems(node) == []
    assert status(node)["source"]["objects"]["Service"] == 1


def test_a_file_that_comes_and_goes_while_it_is_read_does_no_harm(node: AgentProcess) -> None:
    with everyone() as servers:
        node.write("web.yaml", service("web", OTHER))
        node.write("slices.yaml", endpoints("web", ("10.244.0.1", servers.port)))
        node.start()
        stop = threading.Event()
        flicker = node.manifests / "flicker.yaml"
        text = "---".join(service(f"x{n}", f"10.96.9.{n}") for n in range(1, 60))

        def churn() -> None:
            while not stop.is_set():
                flicker.write_text(text)
                stop.wait(0.003)
                flicker.unlink()

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for n in range(2, 4):
                node.write("slices.yaml", endpoints("web", (f"10.244.0.{n}", servers.port)))
                until(lambda n=n: servers.reached(OTHER) == f"10.244.0.{n}", "the change")
        finally:
            stop.set()
            thread.join()
        until(lambda: not servers_of(node, "x1"), "what is gone")
        until(lambda: not node.status()["problems"], "no problem")
        assert "Traceback" not in node.log.read_text()


def test_a_mounted_config_map_is_followed_through_the_swap_of_its_link(node: AgentProcess) -> None:
    """What the kubelet does: ..data leads to a directory, the files lead through it."""

    def publish(version: str, text: str) -> None:
        directory = node.manifests / f"..{version}"
        directory.mkdir()
        (directory / "web.yaml").write_text(text)
        fresh = node.manifests / "..data_tmp"
        fresh.symlink_to(directory.name)
        fresh.rename(node.manifests / "..data")

    with everyone() as servers:
        text = f"{service('web', OTHER)}---\n"
        publish("1", text + endpoints("web", ("10.244.0.1", servers.port)))
        (node.manifests / "web.yaml").symlink_to("..data/web.yaml")
        node.start()
        assert servers.reached(OTHER) == "10.244.0.1"
        publish("2", text + endpoints("web", ("10.244.0.2", servers.port)))
        until(lambda: servers.reached(OTHER) == "10.244.0.2", "the second version")
        assert node.status()["source"]["objects"]["Service"] == 1, "read once, not through ..2 too"
        publish("3", text + endpoints("web", ("10.244.0.3", servers.port)))
        until(lambda: servers.reached(OTHER) == "10.244.0.3", "the third version")
        assert problems(node) == []


def by_truncation(path: Path, text: str) -> None:
    path.write_text(text)


def by_renaming_a_new_file(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.swp")
    fresh.write_text(text)
    fresh.rename(path)


def by_renaming_the_old_file(path: Path, text: str) -> None:
    backup = path.with_name(f"{path.name}~")
    path.rename(backup)
    path.write_text(text)
    backup.unlink()


def by_deleting_it_first(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


def in_two_pieces(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text[: len(text) // 2])
        file.flush()
        file.write(text[len(text) // 2 :])


def test_a_file_is_followed_however_an_editor_saves_it(node: AgentProcess) -> None:
    ways = [by_truncation, by_renaming_a_new_file, by_renaming_the_old_file, by_deleting_it_first,
            in_two_pieces]  # fmt: skip
    with everyone() as servers:
        path = node.manifests / "nested" / "web.yaml"
        path.parent.mkdir()

        def text(n: int) -> str:
            return f"{service('web', OTHER)}---\n" + endpoints(
                "web", (f"10.244.0.{n}", servers.port)
            )

        path.write_text(text(1))
        node.start()
        for n, save in enumerate(ways, 2):
            save(path, text(n))
            until(lambda n=n: servers.reached(OTHER) == f"10.244.0.{n}", save.__name__)
        until(lambda: not node.status()["problems"], "no problem")
