"""Which programs this kernel takes, each by itself: `python -m tests.vm --probe 5.10`.

Prints a line for each, and the end of what the verifier said about those that it refuses.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from typing import Any

from pointsman import abi, loader
from pointsman.hooks import DEVICE_HOOKS, FEATURES, HOOKS, SWEEP, Hook
from pointsman.pins import Sizes

SET_GENERATION = Hook("set_generation", 6, 37)


def _load(module: Any, hook: Hook, lines: int) -> None:
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            module.load_func(hook.name.encode(), hook.program_type, None, hook.attach_type)
            said = "taken"
        except Exception as error:
            said = f"REFUSED: {error}"
        os.dup2(kept, 2)
        os.close(kept)
        log.seek(0)
        tail = log.read().splitlines()[-lines:] if said != "taken" else []
    print(f"{hook.name:14} {said}, {time.monotonic() - began:.1f} s", flush=True)
    for line in tail:
        print(f"    {line[:160]}")


def main() -> None:
    import bcc

    lines = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    directory = abi.source_directory()
    os.environ["BCC_KERNEL_SOURCE"] = str(directory)
    print(f"Linux {platform.release()}")
    for features in (*FEATURES, ("HAVE_PACKETS",)):
        packets = "HAVE_PACKETS" in features
        began = time.monotonic()
        try:
            module = bcc.BPF(
                text=abi.source(directory, packets=packets).encode(),
                cflags=loader.flags(Sizes().definitions(), features),
            )
        except Exception as error:
            print(f"{features}: not compiled: {error}", flush=True)
            continue
        print(f"{features}: compiled in {time.monotonic() - began:.1f} s", flush=True)
        hooks = (*DEVICE_HOOKS, SWEEP) if packets else (*HOOKS, SET_GENERATION)
        for hook in hooks:
            _load(module, hook, lines)


if __name__ == "__main__":
    main()
