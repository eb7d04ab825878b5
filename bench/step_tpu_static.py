"""What a 7B training step will cost on a TPU pod, by the compiler's own account, ours beside MaxText's. Needs no TPU.

    python bench/step_tpu_static.py [--only=mistral_7b@v5p,...] [--cache=plans/cache] [--flags=none]

Both sides: the whole step (forward, backward, AdamW) of the same model on the same chips with the same batch, compiled by
libtpu for the real topology, priced by `neo.plan.cost`: estimated cycles of XLA's operations times loop turns, cycles of the
attention kernels counted in their compiled bundles, link bytes over link speed. Column "schedule" replays the compiled
schedule: a synchronous collective stops the core, an asynchronous one is hidden by what runs meanwhile. MaxText's side is
bench/results/maxtext.json, which says how it was made; what the two sides must have in common is asserted (`check`).
These are estimates to compare programs by, not promises: docs/plan.md says how far off they were where hardware is known.

One compile of a step takes one to three minutes. Exit code 2 without libtpu.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import platform
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from neo.config import Config, load  # noqa: E402
from neo.plan import planner, topology  # noqa: E402
from neo.plan.plan import Cost  # noqa: E402

MAXTEXT = ROOT / "bench/results/maxtext.json"
RESULTS = ROOT / "bench/results/step_tpu_static.json"
SEQ_LEN = 4096
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """One step of ours. peer: MaxText's run beside it. rated: it counts for the ratio, at no more memory than the peer's."""

    model: str
    topology: str
    global_batch: int
    remat: str
    peer: str = ""
    rated: bool = False
    flags: str = ""      # as --flags of neo.plan

    @property
    def name(self) -> str:
        return f"{self.model}@{self.topology.partition(':')[0]}" + ("-no-flags" if self.flags == "none" else "")


CASES = (
    Case("mistral_7b", "v5p:4x4x4", 128, "lean", "v5p_mistral_best3d", rated=True),
    Case("llama2_7b", "v5e:16x16", 256, "full", "v5e_llama2_vmem", rated=True),
    Case("mistral_7b", "v5e:16x16", 256, "full", "v5e_mistral_rsl", rated=True),
    Case("llama2_7b", "v5p:4x4x4", 128, "lean", "v5p_llama2_minimal", flags="none"),
    Case("moxin_7b", "v5p:4x4x4", 128, "lean"),
    Case("neo_7b", "v5p:4x4x4", 128, "lean"),
    Case("moxin_7b", "v5e:16x16", 256, "full"),
    Case("neo_7b", "v5e:16x16", 256, "full"),
)


def config_of(case: Case, models: dict) -> Config:
    """The recipe of that name, or neo_7b with a peer's shape; either with sequences of 4096."""
    base = case.model if case.model not in models else "neo_7b"
    phase = load(base).phases[0].name
    fields = {f"model.{field}": str(value) for field, value in models.get(case.model, {}).items()}
    fields |= {f"phases.{phase}.seq_len": str(SEQ_LEN), f"phases.{phase}.global_batch": str(case.global_batch),
               "train.remat": case.remat, "train.check_memory": "False"}
    return load(base, list(fields.items()))


def matmul_flops(config: Config, case: Case, devices: int) -> float:
    """FLOPs a device must do in products with weights: 2 a weight and token forward, 4 backward, no repetitions."""
    model = config.model
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_size
    layer = model.d_model * (heads + 3 * model.d_ff)
    return 6.0 * (model.num_layers * layer + model.vocab_size * model.d_model) * case.global_batch * SEQ_LEN / devices


def check(case: Case, config: Config, cost: Cost, peer: dict, chip: object, devices: int) -> None:
    """Raises ValueError where the two sides would not be the same work."""
    need = matmul_flops(config, case, devices)
    theirs = peer["matmul_ms"] / 1e3 * peer["mxu"] * chip.peak_flops if peer else None
    # Of a step, a full repetition of the forward pass adds a third; a peer's figure is known to half a percent of peak.
    for side, flops in (("ours", cost.matmul_flops), *([("MaxText's", theirs)] if peer else [])):
        if not 0.985 * need <= flops <= 1.35 * need:
            raise ValueError(f"{case.name}: {side} matrix FLOPs {flops:.4g} are not those of the step, {need:.4g}")
    if theirs and case.remat == peer["remat"] == "full" and abs(cost.matmul_flops / theirs - 1) > 0.015:
        raise ValueError(f"{case.name}: matrix FLOPs {cost.matmul_flops:.4g}, MaxText's {theirs:.4g}: not the same repetitions")
    turns, layers = [count for _, count in cost.loops], config.model.num_layers
    if sum(count in (layers, layers - 1) for count in turns) < 2:   # the compiler may take a turn out of a loop
        raise ValueError(f"{case.name}: loops of {turns} turns, not a forward and a backward one of {layers}")
    if peer and (peer["topology"], peer["global_batch"], peer["model"]) != (case.topology, case.global_batch, case.model):
        raise ValueError(f"{case.name} stands beside another step: {peer}")
    if not cost.kernel_uses or any(use.cycles <= 0 for use in cost.kernel_uses):
        raise ValueError(f"{case.name}: an attention kernel without a price: {cost.kernel_uses}")


def measure(case: Case, models: dict, peers: dict, cache: Path, flags: str) -> dict:
    """Compile and price one case."""
    where = topology.parse(case.topology)
    config = config_of(case, models)
    engine = planner.engine_for(where, cache, lambda text: print(f"  {text}", file=sys.stderr, flush=True), flags or case.flags)
    started = time.monotonic()
    compiled = engine.compile(config, where, config.phases[0].name)
    if compiled.refused:
        raise ValueError(f"{case.name}: {compiled.refused}")
    cost = engine.price(compiled, where)
    peer = peers.get(case.peer, {})
    check(case, config, cost, peer, where.chip, where.devices)
    used = compiled.facts["memory"]
    if compiled.facts["accumulation"] != 1:
        raise ValueError(f"{case.name}: the step was split into {compiled.facts['accumulation']} micro-batches")
    return {
        "remat": case.remat, "attention": compiled.facts["attention"], "flags": list(compiled.facts["flags"]),
        "step_ms": [round(1e3 * t, 1) for t in (cost.full_overlap, cost.scheduled, cost.no_overlap)],
        "matmul_ms": round(1e3 * cost.matmul, 1), "mxu": round(cost.matmul_flops / where.chip.peak_flops / cost.matmul, 4),
        "other_ms": round(1e3 * cost.other, 1), "kernels_ms": round(1e3 * cost.kernels, 1),
        "comm_ms": round(1e3 * cost.communication, 1), "matmul_tflop": round(cost.matmul_flops / 1e12, 2),
        "peak_gib": round(used["peak"] / GIB, 3), "arguments_gib": round(used["arguments"] / GIB, 3),
        "temporaries_gib": round(used["temporaries"] / GIB, 3), "lower_s": compiled.lower_s, "compile_s": compiled.compile_s,
        "kernels": [dataclasses.asdict(use) for use in cost.kernel_uses],
        "collectives": [dataclasses.asdict(one) for one in cost.collectives],
        "versions": compiled.versions, "seconds": round(time.monotonic() - started, 1),
        **({"peer": case.peer, "ratio": round(cost.scheduled * 1e3 / peer["step_ms"][1], 4)} if peer else {}),
    }


HEAD = (f"{'one step, per device':34s} {'GiB':>6s} {'matmul':>7s} {'MXU':>4s} {'other':>6s} {'attn':>6s} {'comm':>5s}   "
        f"{'full':>6s} {'schedule':>8s} {'none':>6s}\n"
        f"{'':34s} {'peak':>6s} {'ms':>7s} {'':>4s} {'ms':>6s} {'ms':>6s} {'ms':>5s}   {'overlap, ms':^22s}")


def line(name: str, got: dict) -> str:
    full, scheduled, none = got["step_ms"]
    other = got.get("other_ms", got.get("xla_ms", math.nan) - got["matmul_ms"])
    return (f"{name:34s} {got['peak_gib']:6.2f} {got['matmul_ms']:7.0f} {got['mxu']:4.0%} {other:6.0f} "
            f"{got['kernels_ms']:6.0f} {got['comm_ms']:5.0f}   {full:6.0f} {scheduled:8.0f} {none:6.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--cache", type=Path, default=ROOT / "plans/cache", help="folder of compiled programs")
    parser.add_argument("--flags", default="", help="as neo.plan's: quick, none, or '--a=1 --b=2'; nothing is rated then")
    parser.add_argument("--remat", default="", help="other policies for --only, as full,lean; nothing is rated then")
    parser.add_argument("--json", type=Path, help=f"where figures go (a full run: {RESULTS.relative_to(ROOT)})")
    args = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        print("bench/step_tpu_static.py: libtpu is not installed: pip install -e '.[plan]'", file=sys.stderr)
        sys.exit(2)
    wanted = [case for case in CASES if not args.only or case.name in args.only.split(",")]
    if not wanted:
        parser.error(f"--only={args.only}: cases are {', '.join(case.name for case in CASES)}")
    if args.remat:
        wanted = [dataclasses.replace(case, remat=policy) for case in wanted for policy in args.remat.split(",")]
    known = json.loads(MAXTEXT.read_text())
    print(HEAD, flush=True)
    found, rated = {}, []
    for case in wanted:
        got = measure(case, known["models"], known["runs"], args.cache, args.flags)
        found[case.name + (f" {case.remat}" if args.remat else "")] = got
        title = f"{case.model} {case.topology} {case.remat}" + (" no flags" if case.flags == "none" else "")
        print(line(title, got), flush=True)
        if case.peer:
            peer = known["runs"][case.peer]
            print(line(f"  MaxText {peer['remat']}", peer) + f"   ours / MaxText {got['ratio']:.3f}", flush=True)
            if case.rated and not args.flags and not args.remat:
                if got["peak_gib"] > peer["peak_gib"]:
                    print(f"  not counted: {got['peak_gib']:.2f} GiB are more than MaxText's {peer['peak_gib']:.2f}")
                    sys.exit(1)
                rated.append((got["ratio"], case.name))
    target = args.json or (RESULTS if not args.only and not args.flags and not args.remat else None)
    if target:
        target.write_text(json.dumps({
            "command": "python " + shlex.join([str(Path(__file__).relative_to(ROOT)), *sys.argv[1:]]),
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in ("jax", "libtpu")}},
            "steps": found}, indent=1) + "\n")
    if len(rated) == sum(case.rated for case in CASES):
        ratio, name = max(rated)
        print(f"ratio: {ratio:.3f}  ours/MaxText, predicted time of a training step by the replayed schedule, worst of "
              f"{len(rated)} ({name}), lower is better")


if __name__ == "__main__":
    main()
