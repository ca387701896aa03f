"""What a test needs and this machine lacks is said by name; in CI that is a failure."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

# What a shell runs in the background ignores Ctrl-C, and so would all that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# How fast an example is says nothing on a busy machine. Where nothing may be skipped, a run is like
# the one before it: what new examples find is found by those who look for it.
settings.register_profile(
    "pointsman",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("POINTSMAN_NO_SKIP")),
)
settings.load_profile("pointsman")


@pytest.fixture(scope="session")
def missing() -> Callable[[str], None]:
    """`missing("root")`: skips, or fails where POINTSMAN_NO_SKIP says that all must run."""

    def say(what: str) -> None:
        if os.environ.get("POINTSMAN_NO_SKIP"):
            pytest.fail(f"needs {what}, and POINTSMAN_NO_SKIP is set")
        pytest.skip(f"needs {what}")

    return say
