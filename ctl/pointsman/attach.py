"""The programs for packets on devices: XDP and TC, attached, flipped and taken away.

    <pins>/links/<hook>-<device>            a link: XDP, or tcx (Linux 6.6)
    <pins>/links/<hook>-<device>::filter:<ifindex>
                                            a program that is a filter of the device's clsact

In names of pins a dot is a colon, which no device's name has: bpffs takes no dots. A device may be
renamed, so a filter's pin has its number. What runs is what is pinned; each step can be the last
one, and the next start mends what it finds.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pointsman import bpf
from pointsman.deviceproblems import Outcome
from pointsman.devices import Served
from pointsman.errors import PointsmanError
from pointsman.hooks import (
    DEVICE_HOOKS,
    TC_EGRESS,
    TC_INGRESS,
    XDP_INGRESS,
    DeviceLink,
    Hook,
)
from pointsman.netlink import devices as links
from pointsman.netlink import filters, neighbours

log = logging.getLogger("pointsman.agent")

_MODES = {"native": 1 << 2, "generic": 1 << 1}  # XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE
_BEFORE = 1 << 3  # BPF_F_BEFORE: what a program before ours accepts would not be seen by ours
_PARENTS = {TC_INGRESS.name: filters.INGRESS, TC_EGRESS.name: filters.EGRESS}
_HOOKS = {hook.name: hook for hook in DEVICE_HOOKS}
_FILTER, _NEXT = "::filter", "::next"
#: Linux before 6.6 knows no tcx: EINVAL for the attach type.
_NO_TCX = (errno.EINVAL, errno.EOPNOTSUPP)
_TAKEN = (errno.EBUSY, errno.EEXIST)


class DeviceLinks:
    """Those below a pin directory, in the network namespace of the calling thread.

    `clsact`: TC by filters, where the kernel would have tcx, too.
    """

    def __init__(self, root: Path, *, clsact: bool = False) -> None:
        self._root = root
        self._directory = root / "links"
        # The variable is for tests, which start agents on kernels that have tcx.
        self._clsact = clsact or os.environ.get("POINTSMAN_TC") == "clsact"

    # -- reading -----------------------------------------------------------------------------

    def present(self) -> list[DeviceLink]:
        """Everything that is pinned, sorted by name."""
        if not self._directory.is_dir():
            return []
        return [link for path in sorted(self._directory.iterdir()) if (link := _read(path))]

    # -- changing ----------------------------------------------------------------------------

    def serve(
        self, programs: Path, served: Served, mode: str, pinned: Iterable[DeviceLink]
    ) -> Outcome:
        """Has the device run these programs as far as it can; `mode`: "native", "generic", "none";
        `pinned` is what `present` says.

        What runs already is flipped, each hook atomically, or left as it is.
        """
        index, name = served.device.index, served.device.name
        self._directory.mkdir(exist_ok=True)
        present = [link for link in pinned if link.index == index]
        xdp, fault, foreign = "none", "", 0
        try:
            if served.xdp and mode in _MODES:
                xdp, fault, foreign = self._xdp(programs, served, mode, present)
            else:
                self._remove(link for link in present if link.hook == XDP_INGRESS.name)
        except OSError as error:
            fault = f"{XDP_INGRESS.name}: {error.strerror or error}"
        tc, tc_fault = "none", ""
        if served.tc:
            # Replies first: else the first ones of what comes in would go out untranslated.
            for hook in (TC_EGRESS, TC_INGRESS):
                try:
                    tc = self._tc(programs / hook.name, hook, name, index, present)
                except OSError as error:
                    tc, tc_fault = "none", f"{hook.name}: {error.strerror or error}"
                    break
        else:
            self._remove(link for link in present if link.hook != XDP_INGRESS.name)
        return Outcome(served, xdp, tc, fault, tc_fault, foreign)

    def keep_only(self, served: Iterable[Served]) -> list[str]:
        """Detaches from all other devices; the names of the pins that went."""
        kept = {one.device.index for one in served}
        return self._remove(link for link in self.present() if link.index not in kept)

    def remove_all(self) -> list[str]:
        """Leaves nothing of ours, neighbours included; the names of the pins that went. Raises
        PointsmanError if a filter can't be deleted: it still runs, and its pin says so."""
        removed = self.keep_only(())
        left = [link for link in self.present() if link.is_filter]
        if left:
            names = ", ".join(f"{link.hook} of {link.name}" for link in left)
            raise PointsmanError(
                f"filters that can't be deleted: {names}; delete them "
                f"('tc filter del dev {left[0].name} …'), and try again"
            )
        if removed:
            with contextlib.suppress(OSError):
                for hop in neighbours.kept_neighbours()[0]:
                    neighbours.forget_neighbour(hop)
        return removed

    def _remove(self, chosen: Iterable[DeviceLink]) -> list[str]:
        removed = []
        for link in chosen:
            if link.is_filter:
                try:
                    if link.index:
                        name = self._filter_name(link.hook)
                        filters.delete(link.index, _PARENTS[link.hook], name)
                except OSError as error:
                    log.warning("%s stays on %s: %s", link.hook, link.name, error)
                    continue  # whoever tries next knows of it by its pin
            else:
                with contextlib.suppress(OSError), _opened(self._directory / link.pin) as fd:
                    bpf.link_detach(fd)
            (self._directory / link.pin).unlink(missing_ok=True)
            removed.append(link.pin)
        return removed

    def _filter_name(self, hook: str) -> str:
        """Two that pin elsewhere leave each other's filters alone. A path would not do: in a
        container the same directory has another one, its inode is the same."""
        where = self._root.stat()
        return f"pointsman:{where.st_dev:x}:{where.st_ino:x}:{hook}"

    def _flip(self, link: DeviceLink, program: int, pin: Path) -> None:
        """Has a link run this program, and be pinned as it should."""
        path = self._directory / link.pin
        if link.program != bpf.program_info(program).id:
            with _opened(path) as fd:
                bpf.link_update(fd, program)
        # The device was renamed, or a start before this one was killed between two steps.
        if path != pin:
            pin.unlink(missing_ok=True)
            path.rename(pin)

    # -- XDP ---------------------------------------------------------------------------------

    def _xdp(
        self, programs: Path, served: Served, mode: str, present: list[DeviceLink]
    ) -> tuple[str, str, int]:
        """(mode, fault, id of a foreign program)"""
        device = served.device
        pin = self._directory / _pin_name(XDP_INGRESS, device.name)
        ours = [link for link in present if link.hook == XDP_INGRESS.name]
        runs = {program: found for found, program in device.xdp}
        with _opened(programs / XDP_INGRESS.name) as program:
            for link in ours:
                # What is not in what was seen was attached since, by us, in the mode that is asked.
                if runs.get(link.program, mode) != mode:
                    self._remove([link])
                    continue
                self._flip(link, program, pin)
                return mode, "", 0
            try:
                fd = bpf.link_create(program, device.index, XDP_INGRESS.attach_type, _MODES[mode])
            except OSError as error:
                return "none", *_fault(error, served, [link.program for link in ours])
            _pin(fd, pin)
        return mode, "", 0

    # -- TC ----------------------------------------------------------------------------------

    def _tc(self, path: Path, hook: Hook, name: str, index: int, present: list[DeviceLink]) -> str:
        """How it is attached. Raises OSError."""
        pin = self._directory / _pin_name(hook, name)
        ours = [link for link in present if link.hook == hook.name]
        filtered = [link for link in ours if link.is_filter]
        linked = [link for link in ours if not link.is_filter]
        with _opened(path) as program:
            if not self._clsact:
                try:
                    if linked:
                        self._flip(linked[0], program, pin)
                    else:
                        _pin(bpf.link_create(program, index, hook.attach_type, _BEFORE), pin)
                    self._remove(filtered)
                    return "tcx"
                except OSError as error:
                    if error.errno not in _NO_TCX:
                        raise
            mark = pin.with_name(f"{pin.name}{_FILTER}:{index}")
            label, parent = self._filter_name(hook.name), _PARENTS[hook.name]
            found = filters.find(index, parent, label)
            if found is None or found.program != bpf.program_info(program).id or not mark.exists():
                # The mark first: a filter without one would be left behind by `unload`.
                _mark(program, mark)
                filters.put(index, parent, label, program)
            self._remove(linked)
            for link in filtered:  # the same filter, marked under a former name
                if link.pin != mark.name:
                    (self._directory / link.pin).unlink(missing_ok=True)
            return "clsact"


def _read(path: Path) -> DeviceLink | None:
    """None for what is no device's, or went meanwhile."""
    hook, dash, rest = path.name.partition("-")
    if not dash or hook not in _HOOKS:
        return None
    is_filter = _FILTER in rest
    name, _, number = rest.removesuffix(_NEXT).partition(_FILTER)
    name = name.replace(":", ".")
    try:
        with _opened(path) as fd:
            if is_filter:
                return DeviceLink(
                    path.name,
                    hook,
                    name,
                    links.present(int(number[1:] or 0)),
                    bpf.program_info(fd).id,
                    is_filter=True,
                )
            return DeviceLink(path.name, hook, name, bpf.link_device(fd), bpf.link_program(fd))
    except FileNotFoundError:
        return None


def _pin_name(hook: Hook, name: str) -> str:
    return f"{hook.name}-{name.replace('.', ':')}"


def _pin(link: int, pin: Path) -> None:
    """Takes the descriptor, in the place of a link whose device is gone."""
    try:
        temporary = pin.with_name(pin.name + _NEXT)
        temporary.unlink(missing_ok=True)
        bpf.obj_pin(link, temporary)
        temporary.rename(pin)
    finally:
        os.close(link)


def _mark(program: int, mark: Path) -> None:
    temporary = mark.with_name(mark.name + _NEXT)
    temporary.unlink(missing_ok=True)
    bpf.obj_pin(program, temporary)
    temporary.rename(mark)


def _fault(error: OSError, served: Served, ours: list[int]) -> tuple[str, int]:
    """Why XDP did not attach, and whose program is there instead."""
    device = served.device
    if error.errno in _TAKEN:
        try:
            now = next(one for one in links.seen().devices if one.index == device.index)
        except (OSError, StopIteration):
            now = device
        found = [program for _, program in now.xdp if program and program not in ours]
        return "another XDP program is attached", found[0] if found else 0
    if error.errno == errno.EOPNOTSUPP:
        return "its driver has none, or not with the features that are on", 0
    if error.errno in (errno.EINVAL, errno.ERANGE, errno.E2BIG):
        return f"its driver refuses it with MTU {device.mtu}: {os.strerror(error.errno)}", 0
    return os.strerror(error.errno or 0), 0


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = bpf.obj_get(path)
    try:
        yield fd
    finally:
        os.close(fd)
