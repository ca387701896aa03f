"""The story itself, chapter by chapter. Each chapter leaves the cluster ready for the next."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

from demo.clients import SOURCES, Answers, Client, Workshop, judge
from demo.cluster import (
    BODY,
    CLIENT_IP,
    DNS_IP,
    HOST,
    MANIFESTS,
    NAMESPACE,
    NODE_IP,
    PATH,
    PORT,
    SERVICE,
    Cluster,
    pod_ip,
)
from demo.measure import Asking, PacketCounter, failures, who
from demo.tell import Teller

URL = f"http://{HOST}:{PORT}{PATH}"
FIRST_PODS = ("web-server-1", "web-server-2", "web-server-3")
LEAVING, COMING = "web-server-2", "web-server-4"


@dataclass(frozen=True, slots=True)
class Pace:
    """How often things are done."""

    requests: int = 60
    requests_of_a_language: int = 12
    linger: float = 1.5  # seconds that a client in a loop gets before and after an event


FAST = Pace(requests=50, requests_of_a_language=6, linger=0.5)


class Story:
    def __init__(self, cluster: Cluster, tell: Teller, workshop: Workshop, pace: Pace) -> None:
        self._cluster = cluster
        self._tell = tell
        self._workshop = workshop
        self._pace = pace
        self._packets = PacketCounter(cluster)
        self._vip = ""

    def play(self) -> None:
        self._machine()
        self._manifests()
        self._by_name()
        self._languages()
        self._looking_in()
        self._pod_leaves()
        self._pod_comes()
        self._agent_killed()
        self._clean_up()

    # -- chapters ----------------------------------------------------------------------------

    def _machine(self) -> None:
        tell, cluster = self._tell, self._cluster
        tell.chapter("A machine with nothing on it")
        tell.say(
            "Linux network namespaces stand for the machines of a cluster: a [bold]node[/] with a "
            "bridge,\nthree [bold]pods[/] plugged into it, and a [bold]client[/]. "
            "In each pod runs a small web server:"
        )
        for pod in FIRST_PODS:
            cluster.add_pod(pod)
        rows = [["node", NODE_IP, "bridge; Pointsman's agent will run here"]]
        rows += [[pod, pod_ip(pod), f"answers GET {PATH} on port 8080"] for pod in FIRST_PODS]
        rows += [["client", CLIENT_IP, "asks"]]
        tell.table(["namespace", "address", ""], rows)
        tell.say(
            "Nothing leads out: no default route, no link to this machine's own network. The name "
            "of a\nService means nothing yet, and its address would lead nowhere:"
        )
        tell.command("client", "ip route")
        tell.result(cluster.ask("ip", "-4", "route").stdout)
        tell.command("client", f"curl {URL}")
        before = cluster.ask("curl", "--silent", "--show-error", "--max-time", "3", URL)
        tell.result(before.stderr)
        tell.command("client", f"curl http://{DNS_IP}/")
        address = cluster.ask("curl", "-sS", "--max-time", "3", f"http://{DNS_IP}/")
        tell.result(address.stderr)
        works = before.returncode == 0 or address.returncode == 0
        tell.found("Without Pointsman", "answered" if works else "no answer", not works)

    def _manifests(self) -> None:
        tell, cluster = self._tell, self._cluster
        tell.chapter("Ordinary manifests, and one command")
        tell.say(
            "A directory has the YAML that [bold]kubectl apply[/] takes: a Service, and the three "
            "Pods."
        )
        tell.command("node", f"ls manifests; cat manifests/{SERVICE}.yaml")
        for name in (SERVICE, *FIRST_PODS):
            cluster.apply(name)
        tell.result("  ".join(sorted(path.name for path in cluster.manifests.iterdir())))
        tell.result((MANIFESTS / f"{SERVICE}.yaml").read_text())
        tell.say(
            "The agent compiles the eBPF programs, fills their maps and attaches them to the "
            "cgroup in\nwhich the clients will run. (The demo's own directories are left out of "
            "the commands shown.)"
        )
        tell.command("node", f"pointsman up --manifests ./manifests --dns {NODE_IP}:53 &")
        seconds = cluster.start_agent()
        tell.result(cluster.tail(4))
        tell.found("From nothing to attached", f"{seconds:.1f} s, compiling included", True)
        self._show("get", "services")
        self._vip = cluster.cluster_ip()
        tell.say(
            f"The Service got the ClusterIP [bold]{self._vip}[/]. No device has that address and "
            "no route leads\nto it."
        )

    def _by_name(self) -> None:
        tell, cluster, count = self._tell, self._cluster, self._pace.requests
        tell.chapter("The client asks, by name")
        tell.command("client", f"curl {URL}")
        tell.result(cluster.ask("curl", "--silent", "--show-error", "--max-time", "5", URL).stdout)
        tell.say(f"And {count} times more, each time a new connection:")
        answers = self._curl(count)
        tell.shares(answers.pods)
        right = answers.good == count and set(answers.pods) == set(FIRST_PODS)
        tell.found(f"curl by name, {count} times", self._sum(answers), right)
        to_vip, to_pods = self._packets.read()
        tell.say(
            "How do the packets get there? They are never translated: when the client calls "
            "connect(),\nPointsman replaces the destination in the socket, once, before the first "
            "packet exists.\nA counter on the client's devices saw:"
        )
        rows = [["from or to a ClusterIP (10.96.0.0/12)", str(to_vip)]]
        rows += [["from or to pods and node (10.244.0.0/24)", str(to_pods)]]
        tell.table(["IPv4 packets", "count"], rows)

    def _languages(self) -> None:
        tell, count = self._tell, self._pace.requests_of_a_language
        tell.chapter("The same from every language on this machine")
        tell.say(
            f"Small ordinary programs (demo/clients), each with {count} new connections. No "
            "library, no proxy, no\nenvironment variable. “Peer” is what getpeername() tells them: "
            "the address they asked for."
        )
        if waiting := self._workshop.unfinished():
            names = ", ".join(language.name for language in waiting)
            tell.say(f"  (still compiling, which only the first run has to: {names})")
        shown: list[list[str]] = []
        right: dict[str, bool] = {}
        for client in self._workshop.clients():
            answers = self._run(client, count)
            by = " ".join(str(answers.pods[pod]) for pod in FIRST_PODS)
            peer = " ".join(sorted(answers.peers)) or "does not tell"
            right[client.language.name] = answers.good == count and set(answers.peers) <= {
                self._vip
            }
            row = [client.language.name, client.version, str(answers.asked), str(answers.good)]
            shown.append([*row, by, answers.problem[:60] or peer])
        tell.table(["client", "version", "asked", "ok", "by pod 1 2 3", "peer"], shown)
        for why, languages in (
            ("not on this machine", self._workshop.missing),
            ("left out by --fast", self._workshop.left_out),
        ):
            if languages:
                tell.say(f"  {why}: {', '.join(language.name for language in languages)}")
        good = [name for name, is_right in right.items() if is_right]
        tell.found(
            "Unmodified clients",
            f"{len(good)} of {len(right)}: {', '.join(good)}",
            all(right.values()),
        )

    def _looking_in(self) -> None:
        tell = self._tell
        tell.chapter("Looking in")
        tell.say("What a cluster's kubectl would say of it, and what the kernel holds:")
        described = self._show("describe", "service", f"{NAMESPACE}/{SERVICE}")
        tell.say(
            "And what would happen to a connection? This walks the kernel's maps as the program "
            "does:"
        )
        explained = self._show("explain", f"{self._vip}:{PORT}")
        tell.found(
            "describe and explain name all three pods",
            "yes" if described and explained else "no",
            described and explained,
        )

    def _pod_leaves(self) -> None:
        tell, cluster = self._tell, self._cluster
        tell.chapter("A pod leaves while clients ask")
        tell.say(
            "Two clients ask in a loop. Then the manifest of one pod is removed, and once the pod "
            "is out of\nthe kernel's maps, its web server is stopped."
        )
        asking = Asking(cluster, URL)
        time.sleep(self._pace.linger)
        tell.command("node", f"rm manifests/{LEAVING}.yaml")
        removed = time.monotonic()
        cluster.delete(LEAVING)
        cluster.wait_for(lambda: not self._has_endpoint(LEAVING), f"{LEAVING} to leave")
        gone = time.monotonic()
        self._show("get", "endpoints", check=False)
        time.sleep(1)  # as a pod's grace period (there 30 s): what had connected is answered
        cluster.stop_pod(LEAVING)
        time.sleep(self._pace.linger)
        requests = asking.stop()
        before = [request for request in requests if request.began < removed]
        after = [request for request in requests if request.began >= gone]
        rows = [
            [name, str(len(some)), str(len(failures(some))), str(who(some)[LEAVING])]
            for name, some in (("before", before), ("after", after))
        ]
        tell.table(["requests", "sent", "failed", f"answered by {LEAVING}"], rows)
        last = max((r.began for r in requests if r.result == LEAVING), default=removed)
        tell.say(
            f"The last new connection to {LEAVING} began {max(0, last - removed) * 1000:.0f} ms "
            "after its manifest went."
        )
        bad = failures(requests)
        for request in bad[:3]:
            tell.wrong(f"  {request.began - removed:+.3f} s: {request.result}")
        tell.found(
            "A pod taken away: requests failed after the change",
            f"{len(failures(after))} of {len(after)}; {len(bad)} of {len(requests)} in all",
            not bad and bool(before) and bool(after) and not who(after)[LEAVING],
        )

    def _pod_comes(self) -> None:
        tell, cluster, count = self._tell, self._cluster, self._pace.requests
        tell.chapter("A pod comes")
        tell.say(
            "The new one listens on port 9090. The Service names its targetPort, so each pod may "
            "have a\nnumber of its own."
        )
        cluster.add_pod(COMING)
        tell.command("node", f"cp {COMING}.yaml manifests/")
        began = time.monotonic()
        cluster.apply(COMING)
        cluster.wait_for(lambda: self._has_endpoint(COMING), f"{COMING} to come")
        seconds = time.monotonic() - began
        answers = self._curl(count)
        tell.shares(answers.pods)
        right = answers.good == count and set(answers.pods) == {*FIRST_PODS, COMING} - {LEAVING}
        tell.found(
            "A pod added",
            f"takes {answers.pods[COMING]} of {count}, in force after {seconds:.1f} s",
            right,
        )

    def _agent_killed(self) -> None:
        tell, cluster = self._tell, self._cluster
        tell.chapter("The agent is killed")
        tell.say(
            "What balances is in the kernel. Two clients ask the ClusterIP by its address, and the "
            "agent\nis killed as hard as can be:"
        )
        asking = Asking(cluster, f"http://{self._vip}:{PORT}{PATH}")
        time.sleep(self._pace.linger)
        pid = cluster.kill_agent()
        killed = time.monotonic()
        tell.command("node", f"kill -9 {pid}")
        time.sleep(self._pace.linger)
        tell.command("client", f"getent hosts {SERVICE}.{NAMESPACE}; echo $?")
        name = cluster.ask("getent", "hosts", f"{SERVICE}.{NAMESPACE}", timeout=20)
        tell.result(f"{name.stdout}{name.returncode}")
        tell.say(
            "To be honest about it: the built-in DNS server is a part of the agent, so while it is "
            "gone, [bold]new\nlook-ups of names fail[/]. Connections to the address go on:"
        )
        started = time.monotonic()
        tell.command("node", f"pointsman up --manifests ./manifests --dns {NODE_IP}:53 &")
        seconds = cluster.start_agent()
        tell.result(cluster.tail(2))
        time.sleep(self._pace.linger)
        requests = asking.stop()
        without = [r for r in requests if killed <= r.began < started]
        since = [r for r in requests if r.began >= started]
        rows = [
            [when, str(len(some)), str(len(failures(some)))]
            for when, some in (("no agent", without), ("agent coming back", since))
        ]
        tell.table(["requests by ClusterIP", "sent", "failed"], rows)
        bad = failures(requests)
        for request in bad[:3]:
            tell.wrong(f"  {request.began - killed:+.3f} s: {request.result}")
        tell.found(
            "Agent killed with -9: requests failed",
            f"{len(failures(without))} of {len(without)} without it, {len(bad)} of "
            f"{len(requests)} in all",
            not bad and bool(without) and bool(since),
        )
        answers = self._curl(self._pace.requests_of_a_language)
        tell.found(
            "Agent back, and names with it",
            f"{answers.good} of {answers.asked} by name; attached again in {seconds:.1f} s",
            answers.good == answers.asked,
        )

    def _clean_up(self) -> None:
        tell, cluster = self._tell, self._cluster
        tell.chapter("Cleaning up")
        to_vip, to_pods = self._packets.read()
        tell.found(
            "Packets that carried a ClusterIP, whole story",
            f"{to_vip} of {to_pods}",
            to_vip == 0 and to_pods > 0,
        )
        cluster.stop_agent()
        tell.command("node", "pointsman unload")
        unloaded = cluster.pointsman("unload")
        tell.result(unloaded.stdout + unloaded.stderr, limit=4)
        left = cluster.lab.bpffs.exists()
        tell.found(
            "unload takes back all that was loaded",
            "something is left" if left else "nothing pinned",
            unloaded.returncode == 0 and not left,
        )

    # -- doing -------------------------------------------------------------------------------

    def _show(self, *command: str, check: bool = True) -> bool:
        """Runs a reading command on the node and shows it; whether it names all pods there are."""
        self._tell.command("node", f"pointsman {' '.join(command)}")
        done = self._cluster.pointsman(*command)
        self._tell.result(done.stdout + done.stderr)
        return done.returncode == 0 and all(pod_ip(pod) in done.stdout for pod in FIRST_PODS)

    def _has_endpoint(self, pod: str) -> bool:
        return pod_ip(pod) in self._cluster.pointsman("get", "endpoints", "-o", "json").stdout

    def _run(self, client: Client, count: int) -> Answers:
        if client.problem:
            return Answers(count, Counter(), frozenset(), client.problem)
        done = self._cluster.ask(*client.command, HOST, str(PORT), PATH, str(count))
        return judge(done.stdout, done.stderr, count, BODY)

    def _curl(self, count: int) -> Answers:
        done = self._cluster.ask("sh", SOURCES / "curl.sh", HOST, str(PORT), PATH, str(count))
        return judge(done.stdout, done.stderr, count, BODY)

    @staticmethod
    def _sum(answers: Answers) -> str:
        text = f"{answers.good} of {answers.asked} ok, {len(answers.pods)} pods"
        return f"{text}; {answers.problem}" if answers.problem else text
