"""What the VM's manifests and its check of the README take from the README."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    spec = spec_from_file_location("readme", ROOT / "vagrant" / "readme.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_vm_has_the_manifest_of_the_readme_and_the_second_pod_that_it_speaks_of() -> None:
    block = re.search(r"```yaml\n# manifests/web.yaml\n(.*?)```", README, re.S)
    assert block
    service, first = yaml.safe_load_all(block[1])
    documents = list(yaml.safe_load_all((ROOT / "vagrant/manifests/web.yaml").read_text()))
    assert documents[:2] == [service, first]
    second = documents[2]
    assert (second["metadata"]["name"], second["status"]["podIP"]) == ("web-2", "10.244.0.12")
    second["metadata"]["name"], second["status"]["podIP"] = "web-1", "10.244.0.11"
    assert documents[2:] == [first]


def test_every_command_that_the_readme_shows_is_run_with_unload_last(readme: ModuleType) -> None:
    commands = [command for command, _ in readme.shown(README)]
    assert commands[0] == "pointsman get services"
    assert commands[-1] == "pointsman unload"
    assert len(commands) == len(re.findall(r"^# pointsman ", README, re.M))


@pytest.mark.parametrize(
    ("said", "printed", "same"),
    [
        ("a   b\nc", "a   b\nc\n", True),
        ("a   b", "a b\n", False),
        ("a", "a\nb\n", False),
        ("a\n…\nz", "a\nb\nc\nz\n", True),
        ("a\n…\nz", "a\nz\n", True),
        ("a\n…\nz", "a\nb\n", False),
        ("…\nz", "a\nz\n", True),
        ("a (pid 12)", "a (pid 7)\n", True),
        ("id 4", "id 5\n", False),
    ],
)
def test_what_is_printed_is_compared_word_for_word(
    readme: ModuleType, said: str, printed: str, same: bool
) -> None:
    assert bool(re.fullmatch(readme.pattern(said), printed)) == same
