"""What tests/package puts into its machine."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.package.__main__ import SCRIPTS
from tests.vm import image, machine

HERE = image.TREE / "tests/package"


def test_a_machine_gets_the_tree_and_what_is_given_besides(tmp_path: Path) -> None:
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs/one").write_text("1")
    machine.tree(
        tmp_path / "tar", ["true", "a b"], {"NAME": "x y"}, {"compiled": tmp_path / "programs"}
    )
    with tarfile.open(tmp_path / "tar") as archive:
        names = archive.getnames()
        told = archive.extractfile(".vm/arguments")
        assert told
        text = told.read().decode()
    assert {"Makefile", "tests/vm/guest", "compiled/one"} <= {*names}
    assert text.endswith("export NAME='x y'\nset -- true 'a b'\n")


@pytest.mark.parametrize("script", ["common", *SCRIPTS])
def test_bash_can_read_what_runs_there(script: str) -> None:
    done = subprocess.run(["bash", "-n", HERE / f"{script}.sh"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
