"""A client on a node or in a pod: a process in that place's network namespace and cgroup."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.lab import Lab, Place, stop

_PROGRAM = Path(__file__).parent / "programs" / "client.py"


@dataclass(frozen=True, slots=True)
class Answer:
    """Who answered. `error` is an errno's name or "timeout", and then there is nothing else."""

    pod: str = ""
    source: str = ""  # the client's address, as the pod saw it
    peer: str = ""  # the pod's address, as the client saw it: getpeername
    peer_port: int = 0
    error: str = ""


@dataclass(slots=True)
class Outcome:
    """Of a loop: connects that were answered, by pod, and the others, by error."""

    pods: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


class Connection:
    """One that stays open. `talk` says whether its pod still answers: "" or an error."""

    def __init__(self, client: Client, number: int, answer: Answer) -> None:
        self._client, self._number, self.answer = client, number, answer

    def talk(self) -> str:
        return str(self._client.do("talk", id=self._number).get("error", ""))

    def close(self) -> None:
        self._client.do("close", id=self._number)


class Loop:
    """Clients that connect without end, each time anew."""

    def __init__(self, client: Client, number: int) -> None:
        self._client, self._number = client, number

    def so_far(self, stop: bool = False) -> Outcome:
        found = self._client.do("so far", id=self._number, stop=stop)
        return Outcome(Counter(found["pods"]), Counter(found["errors"]))

    def stop(self) -> Outcome:
        """Ends it after the connects under way."""
        return self.so_far(stop=True)


class Client:
    """`place` is where it runs. All times are seconds; addresses are of either family."""

    def __init__(self, lab: Lab, place: Place) -> None:
        self._lab, self.place = lab, place
        self._lock = threading.Lock()
        self._process = lab.start(
            [sys.executable, _PROGRAM],
            place,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None,
        )

    def do(self, verb: str, **arguments: object) -> dict[str, Any]:
        with self._lock:
            assert self._process.stdin and self._process.stdout
            self._process.stdin.write(json.dumps({"do": verb, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        assert line, f"the client ended at {verb} {arguments}; what it said is above"
        found: dict[str, Any] = json.loads(line)
        return found

    def connect(
        self, address: str, port: int, protocol: str = "tcp", source: str = "", timeout: float = 3
    ) -> Answer:
        """One connection, or one datagram with `protocol="udp"`; who answered."""
        return _answer(self.do("ask", **_target(address, port, protocol, source, timeout)))

    def spread(self, address: str, port: int, times: int, protocol: str = "tcp") -> Counter[str]:
        """Who answered how often: pods, or "!" and the error."""
        answers = (self.connect(address, port, protocol) for _ in range(times))
        return Counter(a.pod or f"!{a.error}" for a in answers)

    def open(
        self, address: str, port: int, protocol: str = "tcp", source: str = "", timeout: float = 3
    ) -> Connection:
        """Raises ConnectionError with the error's name."""
        found = self.do("open", **_target(address, port, protocol, source, timeout))
        if "error" in found:
            raise ConnectionError(found["error"])
        return Connection(self, found["id"], _answer(found))

    def loop(
        self,
        address: str,
        port: int,
        protocol: str = "tcp",
        threads: int = 2,
        pause: float = 0.002,
        timeout: float = 3,
    ) -> Loop:
        target = _target(address, port, protocol, "", timeout)
        return Loop(self, self.do("loop", threads=threads, pause=pause, **target)["id"])

    def resolve(
        self,
        name: str,
        server: str,
        kind: str = "A",
        protocol: str = "udp",
        port: int = 53,
        timeout: float = 3,
    ) -> list[str]:
        """The answers' texts, sorted. Raises LookupError with the rcode or the error."""
        target = _target(server, port, protocol, "", timeout)
        found = self.do("query", name=name, type=kind, **target)
        if found.get("rcode") != "NOERROR":
            raise LookupError(found.get("rcode") or found["error"])
        return list(found["answers"])

    def run(
        self, *command: str | Path, files: Path | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Any command in this place; `files` as in `Place`, for a resolv.conf of a pod."""
        place = Place(self.place.network, self.place.cgroup, files)
        return self._lab.run(command, place, timeout=timeout)

    def close(self) -> None:
        stop(self._process)


def _target(
    address: str, port: int, protocol: str, source: str, timeout: float
) -> dict[str, object]:
    return {
        "address": address,
        "port": port,
        "protocol": protocol,
        "source": source,
        "timeout": timeout,
    }


def _answer(found: dict[str, Any]) -> Answer:
    if "error" in found:
        return Answer(error=found["error"])
    return Answer(found["pod"], found["from"], found["peer"], found["peer_port"])


__all__ = ["Answer", "Client", "Connection", "Loop", "Outcome"]
