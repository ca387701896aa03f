"""Kernel tests in QEMU: what counts as passed, and which skips are believed."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from tests.vm.__main__ import outcome
from tests.vm.image import Kernel
from tests.vm.machine import Result, tree
from tests.vm.skips import allowed


@pytest.mark.parametrize(
    ("reason", "release", "believed"),
    [
        ("needs Linux 5.18 (bpf_set_retval)", "5.10.0-32-cloud-amd64", True),
        ("needs Linux 5.18 (bpf_set_retval)", "5.18.0", False),
        ("needs Linux 5.18 (bpf_set_retval)", "6.1.0-50-cloud-amd64", False),
        ("needs Linux 6.18 (tcx)", "6.12.117+deb13-cloud-amd64", True),
        ("needs Linux 5.18", "5.10.0", False),  # does not say for what
        ("one CPU", "6.1.0", True),
        ("needs bcc (python3-bpfcc)", "5.10.0", False),
        ("", "5.10.0", False),
    ],
)
def test_a_skip_is_believed_on_an_older_kernel_only(
    reason: str, release: str, believed: bool
) -> None:
    assert allowed(reason, release) == believed


@pytest.mark.parametrize(
    ("code", "log", "wanted"),
    [
        (0, "boot\r\n3 passed, 1 skipped in 9.00s\r\nvm: ended with 0\r\n", "passed"),
        (0, "boot\r\n", "passed"),
        (1, "1 failed, 2 passed in 9.00s\r\n", "FAILED"),
        (None, "3 passed in 9.00s\r\n", "FAILED"),
        (None, "", "FAILED"),
    ],
)
def test_a_machine_without_an_exit_code_has_failed(
    tmp_path: Path, code: int | None, log: str, wanted: str
) -> None:
    kernel = Kernel("5.10", "5.10.0-32", tmp_path, tmp_path, tmp_path)
    path = tmp_path / "5.10.log"
    path.write_text(log)
    said = outcome(Result(kernel, code, 12.0, path))
    assert said.startswith(f"vm: {wanted} 5.10 (5.10.0-32), ")
    assert ("no exit code" in said) == (code is None)
    assert "passed in" not in log or " passed" in said


def test_what_the_host_compiled_goes_into_the_machine(tmp_path: Path) -> None:
    compiled = tmp_path / "compiled"
    compiled.mkdir(mode=0o700)
    (compiled / "one.programs").touch(mode=0o600)
    tree(tmp_path / "tree.tar", ["true", "a b"], {"HOW": "so so"}, {".vm/compiled": compiled})
    with tarfile.open(tmp_path / "tree.tar") as archive:
        # The loader trusts no other modes.
        assert archive.getmember(".vm/compiled").mode & 0o777 == 0o700
        assert archive.getmember(".vm/compiled/one.programs").mode & 0o777 == 0o600
        assert "tests/vm/guest" in archive.getnames()
        told = archive.extractfile(".vm/arguments")
        assert told
        assert b"export HOW='so so'\nset -- true 'a b'\n" in told.read()
