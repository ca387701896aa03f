"""Every error that ends a command, with the exit code that scripts see.

The message is one sentence that says what is wrong and what to do. 0 is success, 1 "not healthy"
or "there are differences", 2 wrong usage (click's own).
"""

from __future__ import annotations


class PointsmanError(Exception):
    """Something that ends the command. `exit_code` is 10 where nothing below fits."""

    exit_code = 10


class NotRoot(PointsmanError):
    """This needs root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON."""

    exit_code = 3


class NoCgroup2(PointsmanError):
    """No cgroup2 file system, or the path given is not in one."""

    exit_code = 4


class NoBpffs(PointsmanError):
    """/sys/fs/bpf is not there and can't be mounted, or the pin directory is not safe."""

    exit_code = 5


class KernelTooOld(PointsmanError):
    """The kernel refuses a program or lacks a feature."""

    exit_code = 6


class NoCompiler(PointsmanError):
    """bcc is missing, or it could not compile the programs."""

    exit_code = 7


class LayoutMismatch(PointsmanError):
    """A pinned map is not what these programs expect. Names every difference."""

    exit_code = 8


class AlreadyRunning(PointsmanError):
    """Another agent owns these maps."""

    exit_code = 9


class NotLoaded(PointsmanError):
    """There is nothing pinned to look into."""

    exit_code = 11


class NotFound(PointsmanError):
    """No such Service, map or frontend."""

    exit_code = 12


class NoCluster(PointsmanError):
    """There is no usable configuration of how to reach an API server."""

    exit_code = 13
