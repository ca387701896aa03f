"""A plugin of pytest: a test that is skipped for a reason that nobody listed has failed.

What a kernel lacks is no reason as such: it says so as `needs Linux 5.18 (bpf_set_retval)`, and is
believed on an older kernel only.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator

import pytest

_OLDER = re.compile(r"needs Linux (\d+)\.(\d+) \(.+\)")
#: For a machine like this one, whatever its kernel.
_LISTED = (
    re.compile(r"one CPU"),
    re.compile(r"needs (etcd|kube-|a cluster).*"),
)


def allowed(reason: str, release: str) -> bool:
    """Whether a test may be skipped for that on a kernel that `uname -r` calls so."""
    if match := _OLDER.fullmatch(reason):
        major, minor = map(int, re.findall(r"\d+", release)[:2])
        return (major, minor) < (int(match[1]), int(match[2]))
    return any(pattern.fullmatch(reason) for pattern in _LISTED)


def _reason(longrepr: object) -> str:
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return str(text).removeprefix("Skipped: ")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = _reason(report.longrepr)
        if not allowed(reason, platform.release()):
            report.outcome = "failed"
            report.longrepr = f"skipped for a reason that tests/vm/skips.py does not have: {reason}"
    return report
