"""The demo is the first thing anybody runs: it holds, and it leaves the machine as it was."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.lab import registry, remains, sweep
from tests.support.kernel import until

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: namespaces, a cgroup, BPF"),
]

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def running_demo() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "demo", "--fast"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        sweep()


def name(process: subprocess.Popen[str]) -> str:
    return f"pointsman-demo-{process.pid}"


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    pytest.fail("".join(seen))


def test_the_story_holds_and_leaves_nothing_behind() -> None:
    with running_demo() as demo:
        output, _ = demo.communicate(timeout=600)

    # The end says what did not hold: a long story is cut where test results are kept.
    assert demo.returncode == 0, "\n".join(output.splitlines()[-60:])
    assert "All of it held." in output
    assert "did not hold" not in output
    assert remains(name(demo)) == []


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("A machine with nothing on it", id="while-namespaces-are-made"),
        pytest.param("pointsman up", id="while-the-agent-loads"),
        pytest.param("pointsman get endpoints", id="while-clients-ask"),
    ],
)
def test_ctrl_c_takes_everything_away(moment: str) -> None:
    with running_demo() as demo:
        read_until(demo, moment)
        demo.send_signal(signal.SIGINT)
        output, _ = demo.communicate(timeout=200)

    assert demo.returncode == 130, output
    assert remains(name(demo)) == []


def test_the_next_run_takes_away_what_a_killed_one_left() -> None:
    with running_demo() as demo:
        read_until(demo, "pointsman get endpoints")
        with registry():  # the labs of other tests sweep too, and may be the next run
            demo.kill()
            demo.wait()
            assert len(remains(name(demo))) > 3

        def swept() -> bool:
            sweep()
            return remains(name(demo)) == []

        # A child that was about to become another program may have its lock for a moment yet.
        until(swept, "nothing left")
