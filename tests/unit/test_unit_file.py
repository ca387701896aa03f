"""What deploy/systemd/ says of the agent, and what the agent's code says of itself, agree."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pointsman import errors, loading
from pointsman.config import files

ROOT = Path(__file__).parents[2]
SYSTEMD = ROOT / "deploy/systemd"
UNIT = SYSTEMD / "pointsman.service"


@pytest.fixture
def unit() -> dict[str, str]:
    """Settings by name; of several of one name all words."""
    found: dict[str, str] = {}
    for line in UNIT.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found[key] = f"{found[key]} {value}" if key in found else value
    return found


def test_it_has_the_capabilities_of_the_daemon_set_and_no_more(unit: dict[str, str]) -> None:
    documents = yaml.safe_load_all((ROOT / "deploy/kustomize/base/daemonset.yaml").read_text())
    [pod] = [d["spec"]["template"]["spec"] for d in documents if d["kind"] == "DaemonSet"]
    wanted = pod["containers"][0]["securityContext"]["capabilities"]["add"]
    assert set(unit["CapabilityBoundingSet"].split()) == {f"CAP_{name}" for name in wanted}


def test_what_starting_again_can_not_mend_is_not_started_again(unit: dict[str, str]) -> None:
    hopeless = (
        errors.NotRoot, errors.NoCgroup2, errors.NoBpffs, errors.KernelTooOld,
        errors.LayoutMismatch,
    )  # fmt: skip
    codes = {2, *(each.exit_code for each in hopeless)}
    assert {int(code) for code in unit["RestartPreventExitStatus"].split()} == codes


def test_a_start_has_time_to_compile(unit: dict[str, str]) -> None:
    minutes = int(unit["TimeoutStartSec"].removesuffix("min"))
    assert minutes * 60 > 2 * loading.TIMEOUT


def test_bpf_is_allowed_after_the_group_that_has_it_is_not(unit: dict[str, str]) -> None:
    words = unit["SystemCallFilter"].split()
    assert words.index("bpf") > words.index("~@privileged")


def test_the_configuration_that_is_shipped_is_good() -> None:
    shipped = SYSTEMD / "config.yaml"
    found = files.read(shipped.read_bytes(), "config.yaml")
    assert not found.problems
    # Each line that is to be uncommented, too.
    text = re.sub(r"^# (?=\w+:( |$)|  \w)", "", shipped.read_text(), flags=re.M)
    text = text.replace("manifests: /etc/pointsman/manifests\n", "")
    assert len(files.read(text.encode(), "config.yaml").options) >= 4


def test_the_exposure_is_what_the_docs_say(missing: Callable[[str], None]) -> None:
    if not shutil.which("systemd-analyze"):
        missing("systemd-analyze")
    said = re.search(r"exposure of (\d+\.\d+)", (ROOT / "docs/install.md").read_text())
    assert said
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager",
         f"--threshold={round(float(said[1]) * 10)}", UNIT],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-200:]
