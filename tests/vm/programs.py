"""The programs that most tests load, compiled on this machine: in an emulated one it takes minutes.

    python -m tests.vm.programs        into $POINTSMAN_COMPILED, what is not there yet

A test that changes the source or has other sizes compiles by itself.
"""

from __future__ import annotations

from pathlib import Path

from pointsman import abi, compilecache, loader
from pointsman.hooks import DEVICE_HOOKS, FEATURES, HELPERS, HOOKS, SWEEP, Hook
from pointsman.pins import Sizes
from tests.kernel.packets.conftest import SIZES
from tests.support.kernel import SMALL

#: All features, as kernels from 6.1 on have them, and none, for 5.10.
_VARIANTS = (FEATURES[0], FEATURES[-1])


def main() -> None:
    directory = abi.source_directory()
    for sizes in (Sizes(), SMALL, SIZES):
        for features in _VARIANTS:
            sockets(directory, sizes, features)
        packets(directory, sizes)


def sockets(source: Path, sizes: Sizes, features: tuple[str, ...]) -> None:
    helpers = [hook for hook in HELPERS if hook.name != "merge_load"]  # that is for upgrades
    _keep(source, sizes, features, [*HOOKS, *helpers])


def packets(source: Path, sizes: Sizes) -> None:
    _keep(source, sizes, ("HAVE_PACKETS",), [*DEVICE_HOOKS, SWEEP])


def _keep(directory: Path, sizes: Sizes, features: tuple[str, ...], hooks: list[Hook]) -> None:
    text = abi.source(directory, packets="HAVE_PACKETS" in features)
    flags = loader.flags(sizes.definitions(), features)
    key = compilecache.key(text, flags, [hook.name for hook in hooks], directory)
    if compilecache.read(key) is None:
        module = loader.compiler(text, directory, flags)
        compilecache.write(key, loader.taken_from(module, hooks))


if __name__ == "__main__":
    main()
