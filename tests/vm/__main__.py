"""The kernel tests in virtual machines, each with another kernel, two at a time.

    python -m tests.vm [KERNEL …] [-- PYTEST ARGUMENT …]

Without arguments for pytest a part of the tests runs that says much in little time: `SMOKE`. An
emulated CPU is ten times and more slower than a real one, and all of them take hours on it.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import sys
import threading
from collections import deque
from pathlib import Path

from tests.vm import image, machine, packages

_DEVICES = "tests/kernel/test_devices.py::test_"
#: What runs without arguments.
SMOKE = (
    *("tests/kernel/test_degraded.py", "tests/kernel/test_bpf_maps.py", "tests/kernel/test_abi.py"),
    *("tests/kernel/test_sockets.py", "tests/kernel/test_node_ports.py"),
    "tests/kernel/packets/test_forward.py",
    f"{_DEVICES}a_device_gets_xdp_tc_and_an_element",
    f"{_DEVICES}xdp_may_send_where_the_kernel_says_that_it_can",
    f"{_DEVICES}a_device_that_is_made_again_is_served_again",
    f"{_DEVICES}filters_serve_where_there_is_no_tcx",
    "tests/kernel/packets/test_one_node.py",
)
_AT_ONCE = 2
#: The environment of the tests: what is not compiled yet takes minutes there.
_INSIDE = {
    "POINTSMAN_COMPILED": f"{image.INSIDE}/.vm/compiled",
    "POINTSMAN_LOAD_TIMEOUT": "900",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(packages.SUITES))
    parser.add_argument("--probe", action="store_true", help="which programs the kernels take")
    parser.add_argument("--run", help="a command instead of pytest, as a shell has it")
    parser.add_argument("--minutes", type=float, default=60.0, help="for each machine")
    parser.add_argument("--cpus", type=int, default=1, help="of each machine")
    parser.add_argument("--accel", choices=("tcg", "kvm"), help="without trying what works")
    before, dashes, after = _split(sys.argv[1:])
    given = parser.parse_args(before)
    names = given.kernels or list(packages.SUITES)
    if unknown := [name for name in names if name not in packages.SUITES]:
        parser.error(f"unknown kernel {unknown[0]}; there are {', '.join(packages.SUITES)}")
    packages.need("qemu-system-x86_64", "mke2fs", "mmdebstrap", "dpkg-deb", "git")
    python = f"{image.INSIDE}/.venv/bin/python"
    tests = after if dashes else [*SMOKE]
    command = [
        *(python, "-m", "pytest", "-p", "tests.vm.skips", "-q", "-m", "kernel and not cluster"),
        *("--color=no", "--timeout=1200", *tests),
    ]  # fmt: skip
    if given.probe:
        command = [python, "-m", "tests.vm.probe"]
    elif given.run:
        command = shlex.split(given.run)
    return _run(names, command, given)


def _split(arguments: list[str]) -> tuple[list[str], bool, list[str]]:
    if "--" not in arguments:
        return arguments, False, []
    at = arguments.index("--")
    return arguments[:at], True, arguments[at + 1 :]


def _run(names: list[str], command: list[str], given: argparse.Namespace) -> int:
    root = image.root()
    kernels = [image.kernel(name, root / "busybox") for name in names]
    now = datetime.datetime.now()
    logs = packages.cache() / "logs" / f"{now:%Y-%m-%d-%H%M%S}"
    logs.mkdir(parents=True)
    tar = logs / "tree.tar"
    machine.tree(tar, command, _INSIDE, {".vm/compiled": _compiled()})
    how = {"tcg": machine.TCG, "kvm": machine.KVM}.get(given.accel) or machine.accelerator(
        kernels[0], root, logs
    )
    print(f"vm: {how}; {', '.join(k.release for k in kernels)}; logs in {logs}", flush=True)
    todo, results = deque(kernels), dict[str, machine.Result]()

    def work() -> None:
        while todo:
            kernel = todo.popleft()
            result = machine.boot(
                kernel, root, tar, logs / f"{kernel.name}.log",
                accelerator=how, seconds=60 * given.minutes, cpus=given.cpus,
            )  # fmt: skip
            results[kernel.name] = result
            print(outcome(result), flush=True)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(_AT_ONCE)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    tar.unlink()
    return 0 if all(name in results and results[name].code == 0 for name in names) else 1


def _compiled() -> Path:
    """The directory of compiled programs; some ten seconds where the source is new. The changed
    ones, which most of the tests outside of SMOKE load, are there once the tests have run here."""
    packages.run(sys.executable, "-m", "tests.vm.programs", cwd=image.TREE)
    return Path(os.environ["POINTSMAN_COMPILED"])


def outcome(result: machine.Result) -> str:
    """What came of it, and pytest's last word or the end of the log."""
    text = result.log.read_text(errors="replace").replace("\r", "")
    said = re.findall(
        r"^=* ?(\d+ (?:passed|failed|skipped|deselected|errors?).*?) ?=*$", text, re.M
    )
    outcome = "passed" if result.code == 0 else "FAILED"
    why = "no exit code" if result.code is None else f"exit code {result.code}"
    last = said[-1] if said else (text.strip().splitlines() or ["nothing in its log"])[-1]
    return (
        f"vm: {outcome} {result.kernel.name} ({result.kernel.release}), {why}, "
        f"{result.seconds:.0f} s: {last}"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except packages.CannotRun as error:
        sys.exit(f"vm: {error}")
