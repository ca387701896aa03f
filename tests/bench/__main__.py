"""`python -m tests.bench [NAME …]`: what Pointsman costs, as ratios of sides that take turns.

Needs root, gcc and two CPUs, but for what is only simulated. Everything runs on loopback in a
namespace of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.bench import choosing, cluster, control, datapath, flows, simulation, traffic
from tests.bench.choosingcases import CASES
from tests.support.kernel import lacking

ALL = {
    **datapath.BENCHES,
    **control.BENCHES,
    **cluster.BENCHES,
    **traffic.BENCHES,
    **flows.BENCHES,
    **simulation.BENCHES,
    **choosing.BENCHES,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("name", nargs="*", choices=[[], *ALL], help="default: all of them")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, wider spread")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="for connect and hook: another bpf/ directory, measured in turn with this one",
    )
    parser.add_argument(
        "--services", type=int, metavar="N", help="for cluster: [default: 10000, quick 1000]"
    )
    parser.add_argument(
        "--plots",
        type=Path,
        metavar="DIR",
        help="for simulation and choosing: PNG and SVG into this directory",
    )
    parser.add_argument(
        "--cases",
        type=lambda names: tuple(names.split(",")),
        default=(),
        metavar="NAME,…",
        help=f"for choosing: {', '.join(CASES)} [default: all]",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(
            f"--cases: there is no {', '.join(sorted(unknown))}; cases: {', '.join(CASES)}"
        )
    names = options.name or list(ALL)
    if set(names) - set(simulation.BENCHES) and (lack := lacking()):
        sys.exit(f"needs {lack}")
    datapath.AGAINST = options.against
    cluster.SERVICES = options.services
    choosing.ONLY = options.cases
    simulation.PLOTS = choosing.PLOTS = options.plots
    figures = {}
    for name in names:
        print(f"\n== {name}: {(ALL[name].__doc__ or '').strip().splitlines()[0]}", flush=True)
        figures[name] = ALL[name](options.quick)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
