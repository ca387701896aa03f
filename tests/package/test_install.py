"""`make install` and `make uninstall`, below a directory of their own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.package

ROOT = Path(__file__).parents[2]


def make(destination: Path, *options: str) -> str:
    done = subprocess.run(
        ["scripts/install", *options],
        env={**os.environ, "DESTDIR": str(destination), "PREFIX": "/opt/points"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(directory: Path) -> set[str]:
    return {
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if not path.is_dir() or path.is_symlink()
    }


def test_what_install_puts_down_works_and_uninstall_takes_it_away(tmp_path: Path) -> None:
    assert make(tmp_path) == ""
    prefix = tmp_path / "opt/points"
    placed = {path for path in files(tmp_path) if not path.startswith("opt/")}
    assert placed == {
        "etc/default/pointsman",
        "etc/pointsman/config.yaml",
        "usr/local/bin/pointsman",
        "usr/local/lib/systemd/system/pointsman.service",
        "usr/local/share/bash-completion/completions/pointsman",
        "usr/local/share/fish/vendor_completions.d/pointsman.fish",
        "usr/local/share/man/man8/pointsman.8",
        "usr/local/share/zsh/site-functions/_pointsman",
    }
    assert (tmp_path / "usr/local/bin/pointsman").readlink() == Path("/opt/points/bin/pointsman")
    unit = (tmp_path / "usr/local/lib/systemd/system/pointsman.service").read_text()
    assert "ExecStart=/opt/points/bin/pointsman up\n" in unit
    assert (prefix / "bin/pointsman").read_text().startswith("#!/opt/points/bin/python3\n")

    # It is whole without the tree that it is from, and nothing in it names where it was made.
    program = "import pointsman.abi as abi; print(abi.source_directory()); import bcc, kubernetes"
    done = subprocess.run(
        [prefix / "bin/python3", "-c", program], capture_output=True, text=True, cwd="/"
    )
    assert Path(done.stdout.strip()).is_relative_to(prefix), done.stderr
    named = subprocess.run(
        ["grep", "-rlF", str(tmp_path), tmp_path], capture_output=True, text=True
    )
    assert named.stdout == ""

    config = tmp_path / "etc/pointsman/config.yaml"
    config.write_text(config.read_text() + "externalIPs: local\n")
    make(tmp_path)
    assert config.read_text().endswith("externalIPs: local\n")

    assert "config.yaml was changed: it stays" in make(tmp_path, "--uninstall")
    assert files(tmp_path) == {"etc/pointsman/config.yaml"}


def test_a_prefix_that_is_somebody_else_s_is_refused(tmp_path: Path) -> None:
    (tmp_path / "opt/points").mkdir(parents=True)
    (tmp_path / "opt/points/theirs").write_text("")
    done = subprocess.run(
        ["scripts/install"],
        env={**os.environ, "DESTDIR": str(tmp_path), "PREFIX": "/opt/points"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "choose another PREFIX" in done.stderr
    make(tmp_path, "--uninstall")
    assert files(tmp_path) == {"opt/points/theirs"}
