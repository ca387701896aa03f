"""Who may write the maps, and what the next start reads."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from pointsman import state
from pointsman.choice import Kept
from pointsman.errors import AlreadyRunning
from pointsman.objects import Ref
from pointsman.state import ANNOTATIONS, LOCK, Lock, read_annotations, write_annotations


def test_a_pin_directory_has_one_writer_whatever_the_run_directories(tmp_path: Path) -> None:
    pins = tmp_path / "pins"
    pins.mkdir()
    first, second = Lock(tmp_path / "a"), Lock(tmp_path / "b")
    first.pins(pins)
    with pytest.raises(AlreadyRunning, match=f"--run-dir holds {pins}"):
        second.pins(pins)
    first.release()
    second.release()
    third = Lock(tmp_path / "b")
    third.pins(pins)
    third.release()


def test_a_lock_that_somebody_holds_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a command does that asks whether an agent runs."""
    Lock(tmp_path).release()
    monkeypatch.setattr(state, "_PATIENCE", 60.0)
    fd = os.open(tmp_path / LOCK, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    asking = threading.Timer(0.1, os.close, (fd,))
    asking.start()
    try:
        Lock(tmp_path).release()
    finally:
        asking.join()


def test_annotations_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_annotations(tmp_path) == {}
    kept = {
        Ref("Service", "shop", "web"): Kept("1", {"a": "b"}),
        Ref("Pod", "shop", "x"): Kept("", {"c": "d"}),
    }
    write_annotations(tmp_path, kept)
    assert read_annotations(tmp_path) == kept


def test_annotations_that_a_version_before_saved_have_no_uid(tmp_path: Path) -> None:
    (tmp_path / ANNOTATIONS).write_text('{"Service shop/web": {"a": "b"}}')
    assert read_annotations(tmp_path) == {Ref("Service", "shop", "web"): Kept("", {"a": "b"})}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 1, "Pod a/b": 2, "web": {"a": "b"}}'])
def test_what_is_no_such_file_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / ANNOTATIONS).write_text(text)
    assert read_annotations(tmp_path) == {}
