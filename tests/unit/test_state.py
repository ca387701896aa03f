"""Who may write the maps."""

from __future__ import annotations

from pathlib import Path

import pytest

from pointsman.errors import AlreadyRunning
from pointsman.state import Lock


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
