"""`python -m demo [--fast]`: tells the story; exit code 1 if any of it did not hold."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from types import FrameType

from demo.clients import workshop
from demo.cluster import CannotGoOn, Cluster
from demo.lab import Lab, remains
from demo.story import FAST, Pace, Story
from demo.tell import Teller
from pointsman.errors import PointsmanError

OPENING = (
    "Pointsman is a load balancer for Services, inside the Linux kernel. A Service has a name and "
    "an address, the ClusterIP, that stand for any number of pods. Pointsman sets a connection's "
    "destination once, when a program calls connect(): as a pointsman at a railway sets the "
    "points before the train arrives.\n\n"
    "This demo plays it on a tiny cluster of network namespaces that it makes, and takes away "
    "again. Nothing leaves this machine, and only the demo's own processes are touched."
)


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument(
        "--fast", action="store_true", help="fewer requests, and only languages that start quickly"
    )
    fast = parser.parse_args().fast
    if os.geteuid() != 0:
        print("The demo makes network namespaces and loads eBPF programs: run it as root.")
        return 3
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    began = time.monotonic()
    tell = Teller()
    tell.opening("Pointsman", OPENING)
    try:
        with Lab("demo") as lab, workshop(lab.directory, fast=fast) as clients:
            Story(Cluster(lab), tell, clients, FAST if fast else Pace()).play()
    except KeyboardInterrupt:
        tell.wrong("Stopped; everything was taken away again.")
        return 130
    except (CannotGoOn, PointsmanError) as error:
        tell.wrong(str(error))
        tell.found("The story", "could not be told to its end", right=False)
    left = [str(path) for path in remains(lab.name)]
    tell.found("Left behind on this machine", ", ".join(left) or "nothing", right=not left)
    tell.end(time.monotonic() - began)
    return 0 if tell.well else 1


if __name__ == "__main__":
    sys.exit(main())
