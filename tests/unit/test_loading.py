"""How long the loader may take, and that it ends with who waits for it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from pointsman import errors, loading
from tests.support.kernel import until


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seen: list[float] = []

    def run(_request: object, timeout: float, _stop: object) -> tuple[dict[str, object], list[str]]:
        seen.append(timeout)
        return {"features": []}, []

    monkeypatch.setattr(loading, "_run", run)
    monkeypatch.delenv("POINTSMAN_LOAD_TIMEOUT", raising=False)
    return seen


def test_a_loader_has_two_minutes(given: list[float]) -> None:
    loading.load(loading.PACKETS, {}, threading.Event())
    assert given == [120]


def test_the_environment_gives_it_more(given: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTSMAN_LOAD_TIMEOUT", "600")
    loading.load(loading.PACKETS, {}, threading.Event())
    assert given == [600]


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf"])
def test_what_is_no_time_is_refused_by_name(
    given: list[float], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("POINTSMAN_LOAD_TIMEOUT", text)
    with pytest.raises(errors.PointsmanError, match=r"POINTSMAN_LOAD_TIMEOUT: .* write e\.g\. 600"):
        loading.load(loading.PACKETS, {}, threading.Event())
    assert not given


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A script in the place of the interpreter that runs the loader."""
    script = tmp_path / "loader"
    script.touch(mode=0o700)
    monkeypatch.setattr(loading.sys, "executable", str(script))
    return script


def test_a_loader_ends_as_soon_as_nobody_waits_for_it(loader: Path, tmp_path: Path) -> None:
    began, ended = tmp_path / "began", tmp_path / "ended"
    loader.write_text(f"#!/bin/sh\ncat > {began}\nread -r never < {ended}.fifo\ntouch {ended}\n")
    os.mkfifo(f"{ended}.fifo")
    stop = threading.Event()
    threading.Thread(target=lambda: (until(began.exists, "a loader"), stop.set())).start()
    with pytest.raises(loading.Stopped):
        loading.load(loading.SOCKETS, {}, stop)
    # Who opens it finds nobody at the other end.
    with pytest.raises(OSError, match="No such device"):
        os.open(f"{ended}.fifo", os.O_WRONLY | os.O_NONBLOCK)


def test_a_request_and_a_reply_may_be_longer_than_a_pipe(loader: Path) -> None:
    many = {"x": "y" * 200_000}
    loader.write_text('#!/bin/sh\nsleep 0.5\nread -r all\necho "$all"\n')
    reply, told = loading._run(many, 60, threading.Event())
    assert (reply, told) == (many, [])


def test_what_is_not_done_in_time_is_ended_and_what_it_said_is_told(loader: Path) -> None:
    loader.write_text("#!/bin/sh\necho why >&2\nexec sleep 600\n")
    reply, told = loading._run({}, 1, threading.Event())
    assert reply["error"] == "the compiler was ended, because it had not finished after 1 s"
    assert told == ["why"]
