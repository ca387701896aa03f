"""The demo's story on a real cluster: ordinary programs reach a Service by its name.

The pods are the scheduler's, the slices the controller's, the names CoreDNS'. Clients are those of
demo/clients: none of them knows of Pointsman.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from demo.clients import LANGUAGES, Answers, Language, Workshop, judge, workshop
from demo.clients import Client as Program
from demo.cluster import BODY, PATH, PORT, PROGRAMS, PYTHON
from demo.lab import Place, stop
from tests.cluster.cluster import Cluster
from tests.cluster.pods import Pod
from tests.cluster.space import Service, Space
from tests.support.kernel import until

pytestmark = pytest.mark.cluster

# Without one of these something would be untold; the others take part where a machine has them.
NEEDED = {"curl", "Python", "Node", "Java", "Go"}
CLUSTER_IPS, PODS = "10.96.0.0/16", "10.244.0.0/16"


class Packets:
    """Counts, in the kernel, all IPv4 packets on all devices of a place, from now on."""

    def __init__(self, cluster: Cluster, place: Place) -> None:
        self._process = cluster.lab.start(
            [PYTHON, PROGRAMS / "count_packets.py", CLUSTER_IPS, PODS],
            place,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None,
        )
        assert self._process.stdout
        assert self._process.stdout.readline() == "ready\n"

    def read(self) -> tuple[int, int]:
        """Those from or to a ClusterIP, and those from or to pods."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        seen = json.loads(self._process.stdout.readline())
        return seen[CLUSTER_IPS], seen[PODS]


class Story:
    """web-server with three pods, CoreDNS, an agent on node-a, and a client in a pod there."""

    def __init__(self, cluster: Cluster, space: Space) -> None:
        self.cluster, self.space = cluster, space
        self.pods = self.deploy(3)
        self.service: Service = space.service(
            "web-server", PORT, "http", ipFamilyPolicy="SingleStack",
            ports=[{"name": "http", "port": PORT, "targetPort": "http"}],
        )  # fmt: skip
        self.host = f"web-server.{space.namespace}"
        [self.pod] = space.deploy("client", node="node-a")
        self.client = cluster.client(self.pod)
        self.of_pod = Packets(cluster, self.pod.place)
        self.of_node = Packets(cluster, cluster.nodes["node-a"].place)
        cluster.dns  # noqa: B018 - starts it
        cluster.agent("node-a").start()
        self.files: Path = cluster.dns.files(self.client)
        until(self.resolves, f"the name {self.host}")

    def deploy(self, replicas: int, port: int = 8080) -> list[Pod]:
        # http.server asks for its own name first, and there is nobody to ask.
        serve: list[str | Path] = ["env", "RES_OPTIONS=timeout:1 attempts:1", PYTHON]
        serve += [PROGRAMS / "web_server.py", "$(POD_NAME)", "$(POD_IP)", str(port)]
        ports = [{"name": "http", "containerPort": port}]
        return self.space.deploy("web-server", replicas, command=serve, ports=ports, drain=True)

    def resolves(self) -> bool:
        found = self.client.run("getent", "hosts", self.host, files=self.files)
        return found.stdout.split()[:1] == [self.service.ip]

    def curl(self, times: int) -> Answers:
        program = next(lang for lang in LANGUAGES if lang.name == "curl")
        script = str(Path(__file__).parents[2] / "demo" / "clients" / program.source)
        return self.run(("sh", script), times)

    def run(self, command: tuple[str, ...], times: int) -> Answers:
        """A client program in the pod, with a pod's resolv.conf; what it printed, judged."""
        done = self.client.run(*command, self.host, str(PORT), PATH, str(times), files=self.files)
        return judge(done.stdout, done.stderr, times, BODY)

    @contextlib.contextmanager
    def asking(self) -> Iterator[list[str]]:
        """Who answered a client that asked on and on, or "failed" and why: there in the end."""
        place = Place(self.pod.place.network, self.pod.place.cgroup, self.files)
        url = f"http://{self.host}:{PORT}{PATH}"
        results: list[str] = []
        log = self.cluster.lab.directory / "asking"
        with log.open("w") as file:
            process = self.cluster.lab.start(
                [PYTHON, PROGRAMS / "keep_asking.py", url], place, stdout=file, stderr=file
            )
        yield results
        stop(process)
        results += [line.split(" ", 2)[2] for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def story(cluster: Cluster) -> Iterator[Story]:
    space = cluster.space("story")
    yield Story(cluster, space)
    cluster.reset()
    space.close()


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with workshop(tmp_path_factory.mktemp("clients")) as found:
        yield found


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.name)
def test_programs_of_every_language_reach_a_service_by_its_name(
    story: Story, programs: Workshop, missing: Callable[[str], None], language: Language
) -> None:
    found: dict[Language, Program] = {
        lang: future.result() for lang, future in programs.pending if lang == language
    }
    if language not in found and language.name in NEEDED:
        missing(language.tools[0])
    if language not in found:
        pytest.skip(f"this machine has no {language.name}")
    program = found[language]
    assert not program.problem
    answers = story.run(program.command, 6)
    assert (answers.good, answers.problem) == (6, "")
    assert answers.peers <= {story.service.ip}  # what getpeername() tells them
    assert set(answers.pods) <= {pod.name for pod in story.pods}


def test_names_are_resolved_by_udp_and_by_tcp_at_the_cluster_ip_of_coredns(story: Story) -> None:
    name = f"{story.host}.svc.cluster.local."
    on_node = story.cluster.client("node-a")
    for client in (story.client, on_node):
        for server in story.cluster.dns.ips:
            for protocol in ("udp", "tcp"):
                assert client.resolve(name, server, "A", protocol) == [story.service.ip]


def test_every_pod_gets_its_share(story: Story) -> None:
    answers = story.curl(90)
    assert answers.good == 90, answers.problem
    assert set(answers.pods) == {pod.name for pod in story.pods}
    # A share below 10 of 90 comes once in a million runs.
    assert min(answers.pods.values()) >= 10


def test_pods_that_come_and_go_are_followed_while_a_client_asks(story: Story) -> None:
    """The new one listens at another number: the Service names its targetPort."""
    gone, *others = story.pods

    def answered_by(*pods: Pod) -> bool:
        return set(story.curl(30).pods) == {pod.name for pod in pods}

    with story.asking() as results:
        until(lambda: answered_by(gone, *others), "all pods")
        gone.terminate()
        until(lambda: answered_by(*others), "those that stay")
        gone.finish()
        story.pods = [*others, *story.deploy(1, port=9090)]
        until(lambda: answered_by(*story.pods), "the new pod")
        for pod in others:
            pod.terminate()
        until(lambda: answered_by(story.pods[-1]), "the new pod alone")
    # Whoever asked meanwhile was answered.
    assert {result for result in results if result.startswith("failed")} == set()
    assert set(results) == {pod.name for pod in (gone, *story.pods)}
    story.pods = story.pods[-1:]


def test_no_packet_ever_carried_a_cluster_ip(story: Story) -> None:
    """Of all that these tests sent, DNS too, by the devices of the pod and of its node."""
    assert story.curl(20).good == 20
    for packets in (story.of_pod, story.of_node):
        to_cluster_ips, to_pods = packets.read()
        assert to_cluster_ips == 0
        assert to_pods > 200
