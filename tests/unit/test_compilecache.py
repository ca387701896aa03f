"""When compiled programs may be used again, and that nothing wrong with a file is an error."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pointsman import abi, compilecache, compiled

MAP = compiled.Map("flows", 1, 4, 8, 1, 0, 2, 3)
VALUE = compiled.Compiled((MAP,), {"sweep": bytes(range(16))}, b"types", "GPL")
KEY = "0123"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "some" / "cache"
    monkeypatch.setenv("POINTSMAN_COMPILED", str(directory))
    return directory


@pytest.fixture
def kept(place: Path) -> Path:
    compilecache.write(KEY, VALUE)
    [path] = place.iterdir()
    return path


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_what_was_written_is_read_and_nobody_else_may(place: Path, kept: Path) -> None:
    assert compilecache.read(KEY) == VALUE
    assert compilecache.read("4567") is None
    assert (place.stat().st_mode & 0o777, kept.stat().st_mode & 0o777) == (0o700, 0o600)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[:-1]), "damaged", id="truncated"),
        pytest.param(lambda p: p.write_bytes(b""), "damaged", id="empty"),
        pytest.param(lambda p: p.write_bytes(b"x" + p.read_bytes()[1:]), "damaged", id="changed"),
        pytest.param(lambda p: p.chmod(0o620), "others may write", id="group-writes"),
        pytest.param(lambda p: p.chmod(0o602), "others may write", id="all-write"),
        pytest.param(lambda p: p.parent.chmod(0o777), "others may write", id="directory"),
        pytest.param(lambda p: (p.unlink(), p.mkdir()), "directory", id="a-directory"),
        pytest.param(lambda p: (p.unlink(), os.mkfifo(p)), "another kind", id="a-fifo"),
        pytest.param(lambda p: p.symlink_to(p.rename(p.parent / "x")), "symbolic", id="a-link"),
    ],
)  # fmt: skip
def test_what_is_not_ours_alone_is_a_warning(
    kept: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], words: str
) -> None:
    damage(kept)
    assert compilecache.read(KEY) is None
    [said] = warnings(caplog)
    assert words in said
    assert str(kept.parent) in said
    assert said.endswith("; compiling instead")


def test_another_user_s_file_is_a_warning(
    kept: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    assert compilecache.read(KEY) is None
    assert f"belongs to user {mine}" in warnings(caplog)[0]


def test_what_is_damaged_is_replaced(kept: Path) -> None:
    kept.write_bytes(b"")
    compilecache.write(KEY, VALUE)
    assert compilecache.read(KEY) == VALUE


def test_a_directory_that_can_not_be_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("POINTSMAN_COMPILED", str(tmp_path / "file" / "cache"))
    caplog.set_level(logging.DEBUG)
    compilecache.write(KEY, VALUE)
    assert "not kept" in caplog.records[-1].getMessage()
    assert caplog.records[-1].levelno == logging.DEBUG


def test_nothing_is_written_where_others_may_write(place: Path) -> None:
    place.mkdir(parents=True)
    place.chmod(0o777)
    compilecache.write(KEY, VALUE)
    assert not list(place.iterdir())


def test_those_used_last_stay_and_nothing_of_others_goes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number:04}" for number in range(20)]
    compilecache.write("first", VALUE)
    size = (place / "first.programs").stat().st_size
    monkeypatch.setattr(compilecache, "_ROOM", 16 * size + 1)
    (place / "foreign").touch()
    for age, name in enumerate(names):
        compilecache.write(name, VALUE)
        os.utime(place / f"{name}.programs", (age, age))
        assert compilecache.read("first") == VALUE, "used, so young"
    left = {path.name.removesuffix(".programs") for path in place.iterdir()}
    assert {"foreign", "first", names[-1]} <= left
    assert len(left) == 16 + 1
    assert names[0] not in left


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, "/var/cache/pointsman"),
        ({"CACHE_DIRECTORY": "/var/cache/a:/var/cache/b"}, "/var/cache/a"),
        ({"CACHE_DIRECTORY": "/var/cache/a", "POINTSMAN_COMPILED": "/c"}, "/c"),
    ],
)
def test_where_it_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wanted: str
) -> None:
    for name in ("CACHE_DIRECTORY", "POINTSMAN_COMPILED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert compilecache.directory() == Path(wanted)


def test_another_input_is_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "bpf"
    shutil.copytree(abi.source_directory(), source)
    given = ("text", ["-DA"], ["sweep"], source)
    first = compilecache.key(*given)
    assert compilecache.key(*given) == first
    others = {
        compilecache.key("other", *given[1:]),
        compilecache.key("text", ["-DB"], *given[2:]),
        compilecache.key("text", ["-DA"], ["merge"], source),
    }
    header = next(path for path in (source / "include").rglob("*.h"))
    header.write_text(f"{header.read_text()}/* */")
    others.add(compilecache.key(*given))
    stub = tmp_path / "stub" / "bcc"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise ImportError\n")
    (stub / "version.py").write_text("__version__ = '9.9'\n")
    monkeypatch.syspath_prepend(stub.parent)
    others.add(compilecache.key(*given))
    assert len(others - {first}) == 5


def test_maps_have_other_numbers_and_constants_keep_theirs() -> None:
    constant = bytes([0x18, 0x01, 0, 0, 3, 0, 0, 0]) + bytes([0, 0, 0, 0, 0x18, 0x11, 0, 0])
    a_map = bytes([0x18, 0x11, 0, 0, 3, 0, 0, 0]) + bytes(8)
    code = constant + a_map
    moved = compiled.relocated(code, {3: 7})
    assert moved == constant + a_map.replace(b"\x03", b"\x07")
    assert compiled.relocated(moved, {7: 3}) == code
    with pytest.raises(KeyError):
        compiled.relocated(code, {})
