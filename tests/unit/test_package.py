"""What runs in the machine of tests/package."""

from __future__ import annotations

import subprocess

import pytest

from tests.package.__main__ import SCRIPTS
from tests.vm import image

HERE = image.TREE / "tests/package"


@pytest.mark.parametrize("script", ["common", *SCRIPTS])
def test_bash_can_read_what_runs_there(script: str) -> None:
    done = subprocess.run(["bash", "-n", HERE / f"{script}.sh"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
