"""Predicted cycles of neo's TPU attention beside JAX's splash attention, from libtpu's compiler alone: no TPU needed.

    python bench/attention_tpu_static.py                   every chip and shape: 10 minutes on two cores
    python bench/attention_tpu_static.py --chips=v5e --shapes=8k --only=ours --detail
    python bench/attention_tpu_static.py --search          splash's best settings anew: hours
Needs libtpu (`pip install -e '.[plan]'`).

Both sides: one sequence, bfloat16, H=32 query heads on K=8 key/value heads of h=128, output and gradients of q, k, v for a
given gradient of the output, as one jitted program on arrays [B, T, H, h] whose layout XLA may choose, compiled with the
VMEM flag of launch/tpu_flags.py. Each compile is a process of its own and leaves LLO dumps in a temporary folder.
  ours    `neo.kernels.attention.tpu` at its shipped block table
  splash  `jax.experimental.pallas.ops.tpu.splash_attention`, make_splash_mqa mapped over the kv heads, LocalMask or
          CausalMask, at its best settings for that chip and shape: forward, fused backward or dq and dkv apart, blocks
          256..2048 (bench/results/attention_tpu_splash.json, found by --search on the same count)
Counted, in cycles:
  kernels  neo.plan.kernel_dump: every region of the scheduled program times how often it runs over the grid (its scalar unit
           is executed), a region at the larger of its bundles and what its rows need of the MXU; at least the bytes the
           kernel copies from and to HBM over the bandwidth. A kernel that two cores share: the busier core.
  XLA      everything around the kernels (scaling q, rowsum(out * dout), sums of dq parts, copies, the layout of the LSE):
           the compiler's `estimated_cycles`.
The figures are for comparing programs of one compiler: waiting for copies within a kernel is not in them. They go to
bench/results/attention_tpu_static.json. Last line: `ratio:`, cycles of ours / splash, forward and backward together, the
worst of v5e and v5p at T=8192 and 32768 with W=4096.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import selectors
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import attention_tpu_splash as splash  # noqa: E402
from tpu_hlo import entry_operations, is_backward, is_kernel, xla_cycles  # noqa: E402

from neo.plan.kernel_dump import dump_flags, kernels, table  # noqa: E402
from neo.plan.kernel_scalar import Run, execute  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "attention_tpu_static.json"


@dataclasses.dataclass(frozen=True)
class Chip:
    """peak: bfloat16 FLOP/s of a JAX device, hbm: bytes/s, as published (cloud.google.com/tpu/docs). The clock follows
    from peak = 2 * size^2 * units * rows a cycle * cores * clock; units and rows a cycle show in the dumps."""

    topology: str
    peak: float
    hbm: float
    mxu_size: int
    mxus: int
    rows: int
    cores: int

    @property
    def flops_per_cycle(self) -> int:
        return 2 * self.mxu_size**2 * self.mxus * self.rows * self.cores

    @property
    def clock(self) -> float:
        return self.peak / self.flops_per_cycle

    @property
    def bytes_per_cycle(self) -> float:
        return self.hbm / self.clock


CHIPS = {
    "v5e": Chip("v5e:2x2", 197e12, 0.819e12, 128, 4, 1, 1),
    "v5p": Chip("v5p:2x2x1", 459e12, 2.765e12, 128, 4, 1, 2),
    "v6e": Chip("v6e:2x2", 918e12, 1.640e12, 256, 2, 2, 1),
    "tpu7x": Chip("tpu7x:2x2x1", 1153.5e12, 3.69e12, 256, 2, 2, 1),   # each of a chip's two cores is a device
}
RATED = ("v5e", "v5p")


@dataclasses.dataclass(frozen=True)
class Shape:
    seq_len: int
    window: int | None
    heads: int = 32
    kv_heads: int = 8
    head: int = 128

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of a head."""
        window = min(self.window or self.seq_len, self.seq_len)
        return self.seq_len * window - window * (window - 1) // 2

    def flops(self, direction: str) -> int:
        """Of all heads' visible pairs: two products forward; five backward (one of them the scores again)."""
        return self.heads * self.pairs * self.head * 2 * {"forward": 2, "backward": 5}[direction]


SHAPES = {"8k": Shape(8192, 4096), "32k": Shape(32768, 4096), "8k-full": Shape(8192, None)}
RATED_SHAPES = ("8k", "32k")
WIDE = {"8k-192": Shape(8192, 4096, 16, 16, 192)}   # neo_7b's heads; splash needs multiples of 128


# ---- programs, compiled in processes of their own

def ours(setting: dict | None):
    """neo's kernel; setting: {"forward": {...}, "backward": {...}} of block sizes instead of the table's."""
    from neo.kernels.attention.tpu import KERNEL

    kernel = KERNEL
    for direction, blocks in (setting or {}).items():
        run = getattr(KERNEL, direction)
        kind = importlib.import_module(run.__module__).__dict__[f"{direction.capitalize()}Blocks"]
        kernel = dataclasses.replace(kernel, **{direction: functools.partial(run, blocks=kind(**blocks))})
    return kernel


def lower(chip: Chip, shape: Shape, program, arrays: str):
    """A function of arrays on one device of a chip, in layouts of XLA's choice. arrays: a letter each, q (also for dout), k
    (also for v), or l for [1, H, T] in float32."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout
    from jax.sharding import SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices[0]
    where = Format(Layout.AUTO, SingleDeviceSharding(device))
    T, H, K, h = shape.seq_len, shape.heads, shape.kv_heads, shape.head
    kinds = {"q": ((1, T, H, h), jnp.bfloat16), "k": ((1, T, K, h), jnp.bfloat16), "l": ((1, H, T), jnp.float32)}
    jitted = jax.jit(program, in_shardings=(where,) * len(arrays), out_shardings=where)
    return jitted.lower(*(jax.ShapeDtypeStruct(*kinds[letter]) for letter in arrays))


def compile_one(job: dict) -> dict:
    """Compile a job {"chip", "shape", "side", "setting", "direction"}; what a count needs besides the dumps."""
    import jax

    chip, shape, setting = CHIPS[job["chip"]], Shape(**job["shape"]), job["setting"]
    words: dict = {}

    def both(attend):
        def program(q, k, v, dout):
            out, backward = jax.vjp(attend, q, k, v)
            return out, backward(dout)
        return program

    if job["side"] == "splash":
        attend, words = splash.attend(shape, setting)
        lowered = lower(chip, shape, both(attend), "qkkq")
    else:
        from neo.kernels.attention.kernel import Extras, Plan
        from neo.kernels.attention.tpu import blocks

        plan, kernel, extras = Plan(scale=shape.head**-0.5, window=shape.window), ours(setting), Extras()
        programs = {"both": (both(lambda q, k, v: kernel.attend(q, k, v, extras, plan)[0]), "qkkq"),
                    "forward": (lambda q, k, v: kernel.forward(q, k, v, extras, plan), "qkk"),
                    "backward": (lambda *arrays: kernel.backward(*arrays, extras, plan), "qkkllq")}
        with blocks.for_chip(job["chip"]):   # neo looks its block sizes up by the chip that runs; here that is a CPU
            lowered = lower(chip, shape, *programs[job["direction"]])
    start = time.process_time()   # CPU of all threads: the same on a busy machine
    compiled = lowered.compile()
    return {"program": compiled.as_text(), "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "compile_s": round(time.process_time() - start, 1), "words": words, "direction": job["direction"]}


def serve() -> None:
    """Reads a job a line and answers in facts.json of its folder and with a line."""
    for line in sys.stdin:
        job = json.loads(line)
        try:
            Path(job["folder"], "facts.json").write_text(json.dumps(compile_one(job)))
            print("compiled", flush=True)
        except Exception as failed:   # the compiler's refusals are of many kinds
            text = [word for word in str(failed).splitlines() if word.strip()] or ["?"]
            print(f"{type(failed).__name__}: {text[0][:300]}", flush=True)


def vmem_flag(chip: str) -> str:
    """The VMEM flag of launch/tpu_flags.py; without it splash's larger blocks do not compile."""
    spec = importlib.util.spec_from_file_location("tpu_flags", ROOT / "launch" / "tpu_flags.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return next((flag for flag in module.FLAGS.get(chip, ()) if "scoped_vmem" in flag), "--xla_tpu_scoped_vmem_limit_kib=49152")


class CompileFailed(RuntimeError):
    """What the compiler said."""


class Compiler:
    """A process that compiles for one chip, job after job: libtpu reads its flags once. Dumps of the last job in `folder`."""

    def __init__(self, chip: str, folder: Path | None = None, timeout: float = 900.0) -> None:
        self.chip, self.timeout = chip, timeout
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="neo-llo-")
        self.folder = folder or Path(self._temporary.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen | None = None

    def _start(self) -> None:
        dumps = " ".join((*dump_flags(self.folder), vmem_flag(self.chip)))
        env = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu",
               "LIBTPU_INIT_ARGS": dumps}
        self.process = subprocess.Popen([sys.executable, __file__, "--serve"], env=env, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def compile(self, shape: Shape, side: str, setting: dict | None, direction: str = "both") -> Path:
        """The folder with the dumps and facts.json. Raises CompileFailed."""
        for old in self.folder.iterdir():
            old.unlink()
        if self.process is None or self.process.poll() is not None:
            self._start()
        job = dict(chip=self.chip, shape=dataclasses.asdict(shape), side=side, setting=setting, direction=direction,
                   folder=str(self.folder))
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            if not ready.select(self.timeout):
                self.close()
                raise CompileFailed(f"no end after {self.timeout:.0f} s")
        answer = self.process.stdout.readline().strip()
        if answer != "compiled":
            raise CompileFailed(answer or f"the compiler ended with {self.process.wait()}")
        return self.folder

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._temporary:
            self._temporary.cleanup()


def measure(compiler: Compiler, shape: Shape, side: str, setting: dict | None, direction: str = "both",
            detail: bool = False) -> dict:
    """Compile one side and count. Cycles are of all heads on one device."""
    return count(CHIPS[compiler.chip], compiler.compile(shape, side, setting, direction), detail)


def count(chip: Chip, folder: Path, detail: bool = False) -> dict:
    """{"forward", "backward", "xla": cycles, "kernels": [...], "operations": dearest first, ...} of a compiled program."""
    facts = json.loads((folder / "facts.json").read_text())
    operations = entry_operations(facts["program"])
    wanted = {op.name: op for op in operations if is_kernel(op)}
    found, cycles = [], {"forward": 0.0, "backward": 0.0}
    for dump in kernels(folder):
        op = wanted.pop(dump.name, None)
        if op is None:
            continue
        words = next((arrays for part, arrays in facts["words"].items() if f"_{part}" in dump.name), ())
        runs = [execute(dump, core, dict(enumerate(words))) for core in range(chip.cores)]
        entry = price(chip, runs)
        backward = is_backward(op) or facts["direction"] == "backward"
        found.append({"name": dump.name, "direction": "backward" if backward else "forward", **entry})
        cycles[found[-1]["direction"]] += entry["cycles"]
        if detail:
            print(table(dump), *(run.table() for run in runs), sep="\n", flush=True)
    if wanted:
        raise ValueError(f"no dump of the kernels {sorted(wanted)}")
    xla, costs = xla_cycles(operations, chip.bytes_per_cycle)
    if detail:
        print(f"  XLA around the kernels: {xla:.0f} cycles", *(f"    {c:10.0f} {n} {s}" for n, s, c in costs[:8]), sep="\n")
    return {**cycles, "xla": xla, "total": cycles["forward"] + cycles["backward"] + xla, "kernels": found,
            "operations": [list(cost) for cost in costs if cost[2] > 0.001 * xla], "temp_bytes": facts["temp_bytes"],
            "compile_s": facts["compile_s"]}


def price(chip: Chip, runs: list[Run]) -> dict:
    """A kernel: the busier core's cycles, or what its copies need of the bandwidth."""
    issue = max(run.cycles for run in runs)
    moved = sum(run.bytes_read + run.bytes_written for run in runs)
    return {"cycles": max(issue, moved / chip.bytes_per_cycle), "issue_cycles": issue, "hbm_bytes": moved,
            "steps": [run.steps for run in runs]}


# ---- the comparison

def line(chip: Chip, shape: Shape, got: dict) -> str:
    head = {part: got[part] / shape.heads / 1e3 for part in ("forward", "backward", "xla", "total")}
    peak = {d: shape.flops(d) / chip.flops_per_cycle / (got[d] or math.inf) for d in ("forward", "backward")}
    return (f"{head['forward']:8.1f} {head['backward']:8.1f} {head['xla']:7.1f} {head['total']:8.1f}   "
            f"{peak['forward']:5.0%} {peak['backward']:5.0%}   {got['total'] / chip.clock * 1e3:8.2f}")


def compare(args: argparse.Namespace) -> None:
    best = splash.load()["best"]
    rows, out = [], {}
    print(f"{'':22s} 1000 cycles a head (per device)        of peak, useful\n{'chip, shape, side':22s} {'fwd':>8s} {'bwd':>8s} "
          f"{'XLA':>7s} {'all':>8s}   {'fwd':>5s} {'bwd':>5s}   {'ms, 32/8':>8s}", flush=True)
    for chip in args.chips:
        for name in args.shapes:
            shape, totals = SHAPES[name], {}
            for side in args.sides:
                setting = json.loads(args.setting) if side == "ours" and args.setting else None
                if side == "splash":
                    setting = best.get(f"{chip} {name}")
                    if setting is None:
                        print(f"{chip} {name}: no settings of splash: --search --chips={chip} --shapes={name}")
                        continue
                with Compiler(chip, args.keep / f"{chip}-{name}-{side}" if args.keep else None) as compiler:
                    direction = args.direction if side == "ours" else "both"
                    totals[side] = got = measure(compiler, shape, side, setting, direction, args.detail)
                print(f"{chip:6s}{name:9s}{side:7s}{line(CHIPS[chip], shape, got)}   "
                      f"{json.dumps(setting) if setting else ''}", flush=True)
                out[f"{chip} {name} {side}"] = {"setting": setting, **got}
            if len(totals) == 2:
                ratio = totals["ours"]["total"] / totals["splash"]["total"]
                rows.append((ratio, chip, name))
                print(f"{'':22s} ours / splash {ratio:.3f}", flush=True)
    rated = [row for row in rows if row[1] in RATED and row[2] in RATED_SHAPES]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({
            "command": "python " + shlex.join([str(Path(__file__).relative_to(ROOT)), *sys.argv[1:]]),
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in ("jax", "libtpu")}},
            "ratios": {f"{chip} {name}": round(ratio, 4) for ratio, chip, name in rows}, "counts": out}, indent=1))
    if rated:
        ratio, chip, name = max(rated)
        print(f"ratio: {ratio:.3f}  ours/splash, predicted cycles of attention forward and backward, worst of "
              f"{' and '.join(sorted({row[1] for row in rated}))} (on {chip}, {name}), lower is better")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda known: lambda text: [known[known.index(word)] for word in text.split(",")]   # noqa: E731
    parser.add_argument("--chips", type=names([*CHIPS]), default=["v5e", "v5p", "v6e"], help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--shapes", type=names([*SHAPES]), default=[*SHAPES], help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--only", dest="sides", type=names(["ours", "splash"]), default=["ours", "splash"])
    parser.add_argument("--setting", help="ours at other blocks: JSON {\"forward\": {...}, \"backward\": {...}}")
    parser.add_argument("--detail", action="store_true", help="every region, how often it runs, and XLA's operations")
    parser.add_argument("--search", action="store_true", help="find splash's best settings instead")
    parser.add_argument("--json", type=Path, help=f"where figures go (a full run: {RESULTS.relative_to(ROOT)})")
    parser.add_argument("--keep", type=Path, help="keep the dumps there (155 MB each)")
    parser.add_argument("--direction", choices=("both", "forward", "backward"), default="both", help="ours: only that kernel")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("bench/attention_tpu_static.py: libtpu is not installed: pip install -e '.[plan]'")
    if args.search:
        known = splash.load()
        for chip in args.chips:
            splash.compile_tiles(known, chip)
            for name in args.shapes:
                splash.confirm(known, chip, name)
        return
    if args.json is None and len(sys.argv) == 1:
        args.json = RESULTS
    compare(args)


if __name__ == "__main__":
    main()
