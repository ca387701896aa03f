"""The programs for sockets on their cgroup: links that are made, flipped and taken away.

<pins>/links/<hook>           what runs
<pins>/links/<hook>_next      one that takes the place of another, for a moment
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pointsman import bpf, errors
from pointsman.hooks import HOOKS, Link


class SocketLinks:
    """Those below a pin directory."""

    def __init__(self, root: Path) -> None:
        self._directory = root / "links"

    def present(self) -> list[Link]:
        """The state of every hook, in the order of HOOKS."""
        return [self._read(hook.name) for hook in HOOKS]

    def _read(self, hook: str) -> Link:
        try:
            fd = bpf.obj_get(self._directory / hook)
        except FileNotFoundError:
            return Link(hook)
        try:
            return Link(hook, bpf.link_program(fd), bpf.link_cgroup(fd))
        finally:
            os.close(fd)

    def attach(self, programs: Path, cgroup: Path) -> list[str]:
        """Makes every link run these programs on this cgroup; the hooks that changed.

        On the first attach a failure takes back what was made. Later each link flips atomically
        and in the order of HOOKS; a failure in between leaves a mixture that works, and the next
        start completes it.
        """
        directory = self._directory
        directory.mkdir(exist_ok=True)
        first = not any(directory.iterdir())
        changed: list[str] = []
        target = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for hook in HOOKS:
                program = bpf.obj_get(programs / hook.name)
                try:
                    if _point_link(directory / hook.name, program, target, hook.attach_type):
                        changed.append(hook.name)
                finally:
                    os.close(program)
        except OSError as error:
            if first:
                for name in changed:
                    (directory / name).unlink(missing_ok=True)
            if error.errno == 1 and os.geteuid() == 0:
                raise errors.NoCgroup2(
                    f"{hook.name} on {cgroup}: {error}; another program there may allow none "
                    "beside it ('bpftool cgroup show' says which): detach it, or choose another "
                    "cgroup with --cgroup"
                ) from None
            if error.errno == 1:
                raise errors.NotRoot(f"{error}; run as root") from None
            raise errors.KernelTooOld(f"{hook.name} on {cgroup}: {error}") from None
        finally:
            os.close(target)
        return changed

    def whole(self, programs: Path, cgroup: Path) -> bool:
        """Whether `attach` would change nothing. Raises OSError where a program or the cgroup is
        gone."""
        wanted = cgroup.stat().st_ino
        for link in self.present():
            program = bpf.obj_get(programs / link.hook)
            try:
                if (link.program, link.cgroup) != (bpf.program_info(program).id, wanted):
                    return False
            finally:
                os.close(program)
        return True

    def remove_all(self) -> list[str]:
        """No program runs any more when it returns; the names of the pins that went."""
        removed = []
        for hook in reversed(HOOKS):
            # A link that was being replaced when its agent was killed has this other name.
            for name in (hook.name, f"{hook.name}_next"):
                path = self._directory / name
                if path.exists():
                    # What is only unpinned runs until the kernel comes to it, which may be long.
                    with contextlib.suppress(OSError):
                        _detach(path)
                    path.unlink()
                    removed.append(name)
        return removed


def _detach(path: Path) -> None:
    link = bpf.obj_get(path)
    try:
        bpf.link_detach(link)
    finally:
        os.close(link)


def _point_link(path: Path, program: int, cgroup: int, attach_type: int) -> bool:
    """True if something was created or flipped."""
    wanted = os.fstat(cgroup).st_ino
    try:
        link = bpf.obj_get(path)
    except FileNotFoundError:
        link = -1
    try:
        if link >= 0 and bpf.link_cgroup(link) == wanted:
            if bpf.link_program(link) == bpf.program_info(program).id:
                return False
            bpf.link_update(link, program)
            return True
        # No link, or one on another cgroup or on one that is gone: the new one first.
        fresh = bpf.link_create(program, cgroup, attach_type)
        try:
            temporary = path.with_name(f"{path.name}_next")
            temporary.unlink(missing_ok=True)
            bpf.obj_pin(fresh, temporary)
            temporary.rename(path)
        finally:
            os.close(fresh)
        return True
    finally:
        if link >= 0:
            os.close(link)
