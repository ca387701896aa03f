"""The man page and the completions have every command and every option."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from pointsman.cli import complete, manual
from tests.support.completion import completions


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
        pytest.param("pointsman get ", "endpoints", id="resources"),
        pytest.param("pointsman get SERV", "services", id="resources-as-they-may-be-written"),
        pytest.param("pointsman get services -o ", "wide", id="values-of-an-option"),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_program_answers_a_shell(shell: str, words: str, expected: str) -> None:
    assert expected in completions(shell, words)


def test_a_command_offers_only_resources_that_it_knows() -> None:
    assert completions("bash", "pointsman describe ") == ["services"]


def test_without_maps_no_name_is_offered_and_nothing_is_said(tmp_path: Path) -> None:
    for words in ("get services ", "get services -n ", "map dump ", "trace --service "):
        assert completions("bash", f"pointsman {words}", POINTSMAN_BPFFS=str(tmp_path)) == []


SERVICES = [("shop", "web"), ("shop", "cart"), ("kube-system", "dns"), ("test", "web")]


@pytest.mark.parametrize(
    ("namespace", "incomplete", "expected"),
    [
        pytest.param(None, "", ["cart", "dns", "web"], id="each-name-once"),
        pytest.param(None, "w", ["web"], id="the-beginning-of-a-name"),
        pytest.param("shop", "", ["cart", "web"], id="of-a-namespace"),
        pytest.param("nowhere", "", [], id="of-an-empty-namespace"),
        pytest.param(None, "sh", ["shop/cart", "shop/web"], id="the-beginning-of-a-namespace"),
        pytest.param(None, "shop/c", ["shop/cart"], id="a-full-name"),
        pytest.param("test", "shop/", [], id="a-full-name-of-another-namespace"),
        pytest.param(None, "x", [], id="no-such-name"),
    ],
)
def test_names_are_offered(namespace: str | None, incomplete: str, expected: list[str]) -> None:
    assert complete.suggest(SERVICES, namespace, incomplete) == expected
