"""Waits that say, when it was in vain, what the logs hold by then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.kernel import until


def wait_for(
    condition: Callable[[], Any], what: str, seconds: float = 60, *, logs: Callable[[], str]
) -> None:
    """`until` of the kernel tests, with a note of what `logs` returns then."""
    try:
        until(condition, what, seconds)
    except AssertionError as error:
        error.add_note(logs())
        raise


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log that may not be there yet."""
    text = path.read_text(errors="replace").splitlines() if path.exists() else []
    return "\n".join([f"--- {path.name}", *text[-lines:]])
