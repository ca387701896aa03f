"""The man page and the completions have every command and every option."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from pointsman.cli import manual


def plain(page: str) -> str:
    return page.replace("\\-", "-").replace("\\e", "\\").replace("\\&", "")


def test_the_page_has_every_command_and_option() -> None:
    page = plain(manual.man())
    found = list(manual.contexts())
    assert len(found) > 10
    for context in found:
        # The group's own heading is that of every page.
        assert context.parent is None or f"\n.SH {context.command_path}\n" in page
        for param in context.command.params:
            if isinstance(param, click.Option) and not param.hidden:
                for name in (*param.opts, *param.secondary_opts):
                    assert name in page, f"{context.command_path} {name}"


def test_the_page_keeps_the_lines_of_examples() -> None:
    page = plain(manual.man())
    assert "\n    pointsman up --manifests ./manifests\n" in page
    assert "\b" not in page


def test_a_line_of_text_is_no_request() -> None:
    assert manual._escape(".conf -x a\\b") == "\\&.conf \\-x a\\eb"


def test_groff_has_nothing_against_the_page(missing: Callable[[str], None], tmp_path: Path) -> None:
    if not shutil.which("groff"):
        missing("groff")
    page = tmp_path / "pointsman.8"
    page.write_text(manual.man())
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", page], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_ask_the_program(shell: str) -> None:
    script = manual.completion(shell)
    assert f"_POINTSMAN_COMPLETE={shell}_complete" in script
    assert "pointsman" in script


def test_an_unknown_shell_is_refused() -> None:
    with pytest.raises(click.UsageError, match="bash, zsh or fish"):
        manual.completion("csh")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param("pointsman ", "status", id="commands"),
        pytest.param("pointsman up --man", "--manifests", id="options"),
        pytest.param("pointsman map ", "dump", id="commands-of-a-group"),
    ],
)
def test_the_program_answers_bash(words: str, expected: str) -> None:
    split = words.split(" ")
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'pointsman'\n"
         "from pointsman.cli.main import main; main()"],
        env={
            **os.environ,
            "_POINTSMAN_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(split) - 1),
        },
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    assert expected in {line.partition(",")[2] for line in done.stdout.splitlines()}
