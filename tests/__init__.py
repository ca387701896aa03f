"""Whatever starts an agent from here, tests and benches, does not serve the devices of the machine
that it runs on: `auto`, the default, would. What was compiled once is kept in the checkout: tests
load some ninety programs that were changed, and compiling takes most of their time."""

import os
from pathlib import Path

os.environ["POINTSMAN_DEVICES"] = "none"
os.environ.setdefault("POINTSMAN_COMPILED", str(Path(__file__).parents[1] / ".cache" / "compiled"))
# An emulated machine takes minutes for the verifier, as does one that has four times as much to
# do as it has CPUs.
os.environ.setdefault("POINTSMAN_LOAD_TIMEOUT", "400")
