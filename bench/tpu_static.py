"""What a Pallas kernel will cost on a TPU, read from what libtpu's compiler writes about it: no TPU needed.

    LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*" python ...
    python bench/tpu_static.py DIR [--match=NAME] [--steps] [--core=0]

A TPU core issues one bundle of instructions per cycle, in order. For every compiled Pallas kernel DIR holds the final
bundles and, row by row, how many slots of each unit a bundle uses. From these two files:
  regions   the grid loop, and the body of every `pl.when` (between a predicated branch and its target): bundles, slots
            used, and the fewest cycles the matrix units (MXUs) need for the rows pushed through them
  --steps   the scalar instructions are executed over the whole grid: how often every region really runs, cycles of the
            whole kernel, and bytes that its copies move from and to HBM
Cycles are issue slots. Not in them: waiting for copies, bank conflicts, clock throttling. Use them to compare kernels.
The counting itself is neo.plan.kernel_dump and neo.plan.kernel_scalar, as the planner uses it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neo.plan.kernel_dump import kernels, table
from neo.plan.kernel_scalar import execute


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="what --xla_jf_dump_to named")
    parser.add_argument("--match", default="", help="only kernels with this in their name")
    parser.add_argument("--all", action="store_true", help="XLA's fusions too")
    parser.add_argument("--steps", action="store_true", help="execute the grid: how often each region runs")
    parser.add_argument("--core", type=int, default=0, help="of a chip whose two cores share a kernel (v5p): which of them")
    parser.add_argument("--json", type=Path, help="write the regions there")
    args = parser.parse_args()
    if args.folder is None:
        parser.print_help()
        return
    out = []
    for dump in kernels(args.folder, args.match, args.all):
        print(table(dump))
        entry = {"kernel": dump.name, "units": dump.units, "regions": [dataclasses.asdict(r) for r in dump.regions()]}
        if args.steps:
            run = execute(dump, core=args.core)
            print(run.table())
            entry["run"] = run.as_dict()
        out.append(entry)
    if not out:
        sys.exit(f"bench/tpu_static.py: no kernel named {args.match!r} in {args.folder}")
    if args.json:
        args.json.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
