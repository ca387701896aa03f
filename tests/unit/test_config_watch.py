"""A configuration file that changes, in a real directory: every way of writing it is seen."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue

import pytest

from pointsman.config import mounted
from pointsman.config.configuration import BadConfiguration
from pointsman.config.watch import ConfigWatch

WAIT = 60.0  # seconds, far more than it takes


class Watched:
    """Runs a ConfigWatch; `next()` is what can be read when it says that something changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: Queue[bytes | None] = Queue()
        self._stop = threading.Event()
        self.watch = ConfigWatch(path, self._look, quiet=0.02, rescan=3600)
        self._thread = threading.Thread(target=self.watch.run, args=(self._stop,))
        self._thread.start()

    def _look(self) -> None:
        try:
            self._seen.put(mounted.load(self._path)[1])
        except BadConfiguration:
            self._seen.put(None)

    def next(self) -> bytes | None:
        return self._seen.get(timeout=WAIT)

    def end(self) -> list[bytes | None]:
        """What was said and not looked at."""
        self._stop.set()
        self._thread.join(WAIT)
        assert not self._thread.is_alive()
        return list(self._seen.queue)


@pytest.fixture
def watch() -> Iterator[Callable[[Path], Watched]]:
    running: list[Watched] = []

    def start(path: Path) -> Watched:
        running.append(Watched(path))
        return running[-1]

    yield start
    for each in running:
        each.end()


def mount(directory: Path, version: str, **files: str) -> None:
    """As the kubelet does: a directory for each version, ..data swapped by rename."""
    directory.mkdir(exist_ok=True)
    data = directory / f"..{version}"
    data.mkdir()
    for name, text in files.items():
        (data / name.replace("_", ".")).write_text(text)
    (directory / "..data_tmp").symlink_to(data.name)
    before = directory / (directory / "..data").readlink() if version != "1" else None
    (directory / "..data_tmp").rename(directory / "..data")
    for name in files:
        link = directory / name.replace("_", ".")
        if not link.is_symlink():
            link.symlink_to(Path("..data") / link.name)
    if before:
        for each in before.iterdir():
            each.unlink()
        before.rmdir()


@pytest.mark.parametrize("name", ["", "config.yaml"], ids=["the-directory", "a-file-in-it"])
def test_the_swap_of_a_mounted_config_map_is_seen(
    tmp_path: Path, watch: Callable[[Path], Watched], name: str
) -> None:
    directory = tmp_path / "config"
    mount(directory, "1", config_yaml="old")
    watched = watch(directory / name if name else directory)
    assert watched.next() == b"old"
    mount(directory, "2", config_yaml="new")
    assert watched.next() == b"new"
    mount(directory, "3", config_yaml="newer")
    assert watched.next() == b"newer"
    assert watched.end() == []


def test_a_file_written_in_place_or_renamed_over_is_seen(
    tmp_path: Path, watch: Callable[[Path], Watched]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("one")
    watched = watch(path)
    assert watched.next() == b"one"
    path.write_text("two")
    assert watched.next() == b"two"
    (tmp_path / "config.yaml.new").write_text("three")
    (tmp_path / "config.yaml.new").rename(path)
    assert watched.next() == b"three"


def test_what_is_being_written_is_not_read_before_it_is_closed(
    tmp_path: Path, watch: Callable[[Path], Watched]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("one")
    watched = watch(path)
    assert watched.next() == b"one"
    with path.open("w") as file:
        time.sleep(0.5)
        file.write("half, ")
        file.flush()
        time.sleep(0.5)
        file.write("whole")
    assert watched.next() == b"half, whole"


def test_who_asks_has_it_read_again_though_nothing_changed_and_hears_when_that_is_done(
    tmp_path: Path, watch: Callable[[Path], Watched]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("one")
    watched = watch(path)
    assert watched.next() == b"one"
    done = threading.Event()
    watched.watch.refresh(done.set)
    assert done.wait(WAIT)
    assert watched.next() == b"one"
    assert watched.end() == []


def test_a_file_that_goes_and_comes_back_is_told_of(
    tmp_path: Path, watch: Callable[[Path], Watched]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("one")
    watched = watch(path)
    assert watched.next() == b"one"
    path.unlink()
    assert watched.next() is None
    path.write_text("one")
    assert watched.next() == b"one"


def test_a_neighbour_s_change_is_none_of_ours(
    tmp_path: Path, watch: Callable[[Path], Watched]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("one")
    watched = watch(path)
    assert watched.next() == b"one"
    (tmp_path / "other").write_text("x")
    path.write_text("two")  # the first that is told of
    assert watched.next() == b"two"
    assert watched.end() == []


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(b" " * (mounted.MAX_BYTES + 1))
    os.mkfifo(tmp_path / "pipe")
    for name, expected in (
        ("none", "there is no configuration file; write it, or name another with --config"),
        ("large", "it has more than 1048576 bytes; name a configuration file"),
        ("pipe", "it is no regular file; write a file there"),
    ):
        with pytest.raises(BadConfiguration) as bad:
            mounted.load(tmp_path / name)
        assert str(bad.value) == f"{tmp_path / name}: {expected}"
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadConfiguration, match="there is none; name it"):
        mounted.load(tmp_path / "empty")
