"""Time and peak memory of the blockwise sliding-window attention beside a dense one, on the CPU.

    python bench/attention_cpu.py    five minutes on a quiet machine; the dense form needs 18 GB of free memory

One sequence of T=8192 tokens, window W=512, H=8 query heads on K=2 key/value heads of h=64, float32. The same inputs
and the same gradient of the output for both; the outputs and gradients must agree.
  ours    neo's blockwise implementation
  dense   neo's dense implementation (--dense=jax_nn: jax.nn.dot_product_attention with the same window)
Each contender is a process of its own; they take turns, one works while the other waits. Figures are medians of the
rounds. Memory is told twice: what the compiler plans for temporaries, and how far the peak of the process grows above
what it held with the inputs ready and everything compiled (outputs and the workspace of the matrix library included).
Figures go to bench/results/attention_cpu.json. Last line: `ratio:`, dense / ours, the worst of time and memory, forward
and forward with backward.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

B, H, K, h = 1, 8, 2, 64
PASSES = ("forward", "forward_backward")
# Measured at T=2048, dense, forward and backward: the process grows by 7.7 float32 arrays of H * T * T.
NEEDED_BYTES_PER_SCORE = 8.5 * 4


def attention_of(contender: str, window: int):
    """The function (q, k, v) -> output of a contender."""
    import jax

    from neo.kernels.attention import Mask, attention

    if contender == "jax_nn":  # its window counts the keys to the left
        return lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=(window - 1, 0), implementation="xla"
        )
    name = {"ours": "blockwise", "dense": "dense"}[contender]
    return lambda q, k, v: attention(q, k, v, mask=Mask(window=window), implementation=name)


def peak_bytes() -> int:
    """Peak resident memory of this process since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status: this benchmark needs Linux")


def reset_peak() -> int:
    """Set the peak back to what is resident now, and return it."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def work(contender: str, length: int, window: int) -> None:
    """A contender's process: reads one pass name per line, answers with one line of JSON."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, this process goes and no other
    rng = np.random.default_rng(0)
    q, k, v, do = (jnp.asarray(rng.normal(size=(B, length, n, h)), jnp.float32) for n in (H, K, K, H))
    forward = attention_of(contender, window)
    functions = {
        "forward": jax.jit(lambda q, k, v, do: forward(q, k, v)),
        "forward_backward": jax.jit(jax.grad(lambda q, k, v, do: (forward(q, k, v) * do).sum(), (0, 1, 2))),
    }
    compiled = {name: f.lower(q, k, v, do).compile() for name, f in functions.items()}
    temporaries = {name: c.memory_analysis().temp_size_in_bytes for name, c in compiled.items()}
    print(json.dumps({"temporary_bytes": temporaries}), flush=True)
    for line in sys.stdin:
        before = reset_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        out = jax.block_until_ready(compiled[line.strip()](q, k, v, do))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(out)]
        answer = {"wall_s": wall, "cpu_s": cpu, "grown_bytes": peak_bytes() - before}
        # Four numbers that depend on every output element, to compare the contenders without moving arrays.
        weights = [np.random.default_rng(1).normal(size=x.shape) for x in leaves]
        answer["check"] = [float((x * w).sum() / np.sqrt((x**2).sum())) for x, w in zip(leaves, weights, strict=True)]
        print(json.dumps(answer), flush=True)
        del out


class Worker:
    """The parent's side of a contender's process."""

    def __init__(self, contender: str, length: int, window: int) -> None:
        command = [sys.executable, __file__, "--work", contender, "--length", str(length), "--window", str(window)]
        self.contender = contender
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.temporaries = self._answer()["temporary_bytes"]

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"bench/attention_cpu.py: the process of {self.contender!r} ended with {self.process.wait()} "
                     "(-9: out of memory)")
        return json.loads(line)

    def run(self, which: str) -> dict:
        self.process.stdin.write(which + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize


def summary(rounds: list[dict], temporaries: int) -> dict:
    return {
        "wall_ms": round(statistics.median(r["wall_s"] for r in rounds) * 1e3, 1),
        "wall_ms_best": round(min(r["wall_s"] for r in rounds) * 1e3, 1),
        "cpu_ms": round(statistics.median(r["cpu_s"] for r in rounds) * 1e3, 1),
        "temporaries_MiB": round(temporaries / 2**20, 1),
        "process_growth_MiB": round(max(r["grown_bytes"] for r in rounds) / 2**20, 1),
    }


def measure(length: int, window: int, rounds: int, dense: str) -> dict:
    needed = B * H * length**2 * NEEDED_BYTES_PER_SCORE
    if available_bytes() < needed:
        sys.exit(f"bench/attention_cpu.py: the dense form needs {needed / 1e9:.0f} GB of free memory, "
                 f"{available_bytes() / 1e9:.0f} GB are available; half the --length needs a quarter")
    workers = {name: Worker(who, length, window) for name, who in (("ours", "ours"), ("dense", dense))}
    taken: dict = {name: {} for name in workers}
    load = []
    for worker in workers.values():
        worker.run("forward")  # starts the threads; not counted
    for which in PASSES:
        for number in range(rounds):
            load.append(os.getloadavg()[0])
            for name, worker in workers.items():
                taken[name].setdefault(which, []).append(worker.run(which))
                seconds = taken[name][which][-1]["wall_s"]
                print(f"{which} {number + 1}/{rounds} {name}: {seconds:.3f} s", file=sys.stderr)
        ours, other = (taken[name][which][0]["check"] for name in workers)
        if not all(abs(a - b) < 1e-4 for a, b in zip(ours, other, strict=True)):
            sys.exit(f"bench/attention_cpu.py: the contenders disagree in {which}: {ours} and {other}")
    for worker in workers.values():
        worker.close()
    result: dict = {name: {} for name in workers}
    ratios = {}
    for which in PASSES:
        for name, worker in workers.items():
            result[name][which] = summary(taken[name][which], worker.temporaries[which])
        for what in ("wall_ms", "cpu_ms", "temporaries_MiB", "process_growth_MiB"):
            ratios[f"{which} {what}"] = round(result["dense"][which][what] / result["ours"][which][what], 1)
    result["ratios"] = ratios
    result["load_average"] = [round(min(load), 1), round(max(load), 1)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens in the sequence (8192)")
    parser.add_argument("--window", type=int, default=512, help="visible keys, self included (512)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender and pass (5)")
    parser.add_argument("--dense", choices=("dense", "jax_nn"), default="dense", help="the other contender (dense)")
    parser.add_argument("--out", default=str(ROOT / "bench/results/attention_cpu.json"), help="where the figures go")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if args.work:
        work(args.work, args.length, args.window)
        return
    result = measure(args.length, args.window, args.rounds, args.dense)
    from importlib.metadata import version

    result |= {
        "command": " ".join(["python bench/attention_cpu.py", *sys.argv[1:]]),
        "shape": {"B": B, "T": args.length, "W": args.window, "H": H, "K": K, "h": h, "dtype": "float32"},
        "rounds": args.rounds,
        "dense_is": args.dense,
        "versions": {"python": platform.python_version(), "jax": version("jax"), "jaxlib": version("jaxlib")},
        "cpus": len(os.sched_getaffinity(0)),
    }
    # Wall time is what a person waits for; CPU time stands beside it because it is steady on a shared machine.
    counted = {name: ratio for name, ratio in result["ratios"].items() if "cpu_ms" not in name}
    worst = min(counted, key=counted.get)
    result["ratio"], result["ratio_is"] = counted[worst], worst
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"ratio: {result['ratio']:.1f}  dense/ours time and memory, the worse of the two ({worst}; T={args.length} "
          f"W={args.window}, jax {result['versions']['jax']}), higher is better")


if __name__ == "__main__":
    main()
