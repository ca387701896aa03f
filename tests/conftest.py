"""What a test needs and this machine lacks is said by name; in CI that is a failure."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

# An agent of a test never serves the devices of the machine that it runs on.
os.environ["POINTSMAN_DEVICES"] = "none"

# What a shell runs in the background ignores Ctrl-C, and so would all that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def missing() -> Callable[[str], None]:
    """`missing("root")`: skips, or fails where POINTSMAN_NO_SKIP says that all must run."""

    def say(what: str) -> None:
        if os.environ.get("POINTSMAN_NO_SKIP"):
            pytest.fail(f"needs {what}, and POINTSMAN_NO_SKIP is set")
        pytest.skip(f"needs {what}")

    return say
