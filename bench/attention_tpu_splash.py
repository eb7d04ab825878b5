"""JAX's splash attention at the settings that cost least by the static count of bench/attention_tpu_static.py.

    python bench/attention_tpu_splash.py                     the settings in use
    python bench/attention_tpu_splash.py --search [--chips=v5e,...]    find them anew: an hour a chip; it can be interrupted

Splash has three kernels whose settings are independent: forward (block_q, block_kv, block_kv_compute) and backward either
`fused` (dk, dv and parts of dq that XLA then sums) or `dkv` and `dq` apart. The search compiles each at every block size
of 256..2048 at T=8192, W=4096 (but those that cannot win: `hopeless`), and prices a kernel by its tiles
(`summary` in neo.plan.kernel_dump):
    steps of the grid * an empty step + visible tiles * a tile + rows * first and last visit
plus, for fused, the sum over the parts of dq at the compiler's estimate. Other shapes have the same tiles and other
numbers of them. The two cheapest of each kind are then compiled at the shape and counted exactly, XLA's work included
(fused: if its price is within 10 %); the cheapest of those is what the benchmark uses. All counts are kept in
bench/results/attention_tpu_splash.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "bench" / "results" / "attention_tpu_splash.json"
BLOCKS = (256, 512, 1024, 2048)
QUICK = [256, 256, 256]   # for the part of a program that is not looked at
PARTS = ("forward", "fused", "dkv", "dq")
COMPILE_S = 600.0         # a candidate that takes longer is no candidate


def build(shape, setting: dict):
    """A kernel of the shape (attention_tpu_static.Shape) and its mask information by part.

    setting: {"forward": [bq, bkv, compute], "fused": [...]} or {"forward", "dkv": [...], "dq": [bq, bkv]}."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, group = shape.seq_len, shape.heads // shape.kv_heads
    fused = "fused" in setting
    bq, bkv, compute = setting["forward"]
    back = setting["fused" if fused else "dkv"]
    apart = {} if fused else dict(zip(("block_q_dq", "block_kv_dq"), setting["dq"], strict=True))
    sizes = kernel.BlockSizes(block_q=bq, block_kv=bkv, block_kv_compute=compute, block_q_dkv=back[0], block_kv_dkv=back[1],
                              block_kv_dkv_compute=back[2], use_fused_bwd_kernel=fused, **apart)
    one = masks.CausalMask((T, T)) if shape.window is None else masks.LocalMask((T, T), (shape.window - 1, 0), 0)
    made = kernel.make_splash_mqa_single_device(masks.MultiHeadMask([one] * group), block_sizes=sizes)
    infos = {"forward": made.fwd_mask_info, "fused" if fused else "dkv": made.dkv_mask_info, "dq": made.dq_mask_info}
    return made, {part: info for part, info in infos.items() if info is not None}


def attend(shape, setting: dict):
    """((q, k, v) -> out on [1, T, heads, h], {part of a kernel's name: words of its scalar-prefetch operands})."""
    import jax

    T, H, K, h = shape.seq_len, shape.heads, shape.kv_heads, shape.head
    kernel, infos = build(shape, setting)
    names = {"forward": "fwd", "fused": "dkv", "dkv": "dkv", "dq": "dq"}
    words = {names[part]: [pack(x) for x in (info.data_next, info.block_mask, info.mask_next) if x is not None]
             for part, info in infos.items()}

    def call(q, k, v):
        q = (q.astype("float32") * h**-0.5).astype(q.dtype)   # splash does not scale
        q = q[0].reshape(T, K, H // K, h).transpose(1, 2, 0, 3)
        out = jax.vmap(kernel)(q, k[0].swapaxes(0, 1), v[0].swapaxes(0, 1))
        return out.transpose(2, 0, 1, 3).reshape(1, T, H, h)

    return call, words


def pack(array) -> list[int]:
    """A small int array [heads, rows, columns] as it lies in scalar memory: tiles of 8 x 128, the rows of a tile packed in
    32-bit words (layout T(8,128)(4,1) of int8, T(8,128)(2,1) of int16), as the kernels' own address arithmetic has it."""
    import numpy as np

    array = np.asarray(array)
    array = array.reshape(-1, array.shape[-1])
    rows, columns = (-(-n // m) * m for n, m in zip(array.shape, (8, 128), strict=True))
    full = np.zeros((rows, columns), array.dtype)
    full[:array.shape[0], :array.shape[1]] = array
    per = 4 // array.dtype.itemsize
    tiles = full.reshape(rows // 8, 8 // per, per, columns // 128, 128).transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(tiles).view(np.int32).ravel().tolist()


def numbers(shape, part: str, blocks: list[int]) -> tuple[int, int, int]:
    """(steps of the grid, visible tiles, rows) of one head, in closed form; checked against splash's own in the tests."""
    T, W = shape.seq_len, shape.window or shape.seq_len
    bq, bkv = blocks[:2]
    nq, nkv = T // bq, T // bkv
    seen = [[j * bkv <= i * bq + bq - 1 and (j + 1) * bkv - 1 > i * bq - W for j in range(nkv)] for i in range(nq)]
    tiles = sum(map(sum, seen))
    if part == "fused":
        return nq * nkv, tiles, nkv
    if part == "dkv":
        return nkv * max(sum(row[j] for row in seen) for j in range(nkv)), tiles, nkv
    return nq * max(map(sum, seen)), tiles, nq


# ---- the search

def load() -> dict:
    return json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {"about": "", "tiles": {}, "counted": {}, "best": {}}


def save(known: dict) -> None:
    known["about"] = __doc__.splitlines()[0] + " See bench/attention_tpu_splash.py. tiles: bundles, 'x' where the compiler " \
        "refuses; counted: cycles of all 32 heads, forward + backward + XLA."
    known["versions"] = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    lines = [f'"{key}": {json.dumps(known[key])}' for key in ("about", "versions", "best", "counted")]
    lines.append('"tiles": {\n' + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in sorted(known["tiles"].items())) + "\n}")
    SETTINGS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def price(entry: dict, shape, part: str, blocks: list[int], cores: int) -> float:
    """Cycles of a device for all heads from the summary of one kernel's regions, and the sum of dq's parts."""
    steps, tiles, rows = numbers(shape, part, blocks)
    head = steps * entry["step_bundles"] + tiles * entry["tile_cycles"] + rows * entry["first_last_bundles"]
    return head * shape.heads / cores + entry.get("sum_cycles", 0) * shape.seq_len**2 / 8192**2   # dq parts: T^2 / bkv


def summaries(compiler, shape, setting: dict) -> dict[str, dict]:
    """{part: summary of its regions} of a setting; {} and the reason under "error" where it does not compile."""
    import attention_tpu_static as bench
    from tpu_hlo import entry_operations

    from neo.plan.kernel_dump import kernels

    try:
        folder = compiler.compile(shape, "splash", setting)
    except bench.CompileFailed as failed:
        return {"error": str(failed)}
    operations = entry_operations(json.loads((folder / "facts.json").read_text())["program"])
    answer = {}
    for dump in kernels(folder, "splash"):
        part = next(p for key, p in (("_fwd", "forward"), ("_dkv", "dkv"), ("_dq", "dq")) if key in dump.name)
        part = "fused" if part == "dkv" and "fused" in setting else part
        answer[part] = dump.summary()
        if part == "fused":   # XLA's sum over dq's parts; none where there is one part
            answer[part]["sum_cycles"] = sum(op.cycles or 0 for op in operations if op.name.startswith("reduce"))
    return answer


def hopeless(known: dict, chip: str, shape, part: str, blocks: list[int], cores: int) -> bool:
    """Whether a candidate could not win even if its tiles cost 8 % less a score, and its empty steps 20 % less, than the best
    seen so far: large blocks cover scores that do not count, small ones take many steps, and dq parts must be summed."""
    seen = cheapest(known, chip, shape, part, cores)
    least_known = seen[0][0] if seen else math.inf
    if part == "fused":   # it has to beat the two kernels too
        apart = [cheapest(known, chip, shape, other, cores)[:1] for other in ("dkv", "dq")]
        least_known = min(least_known, sum(found[0][0] for found in apart) if all(apart) else math.inf)
    if len(seen) < 2:
        return False
    entries = [(known["tiles"][f"{chip} {part} " + " ".join(map(str, b))], b) for _, b in seen]
    rate = min(entry["tile_cycles"] / (b[0] * b[1]) for entry, b in entries)
    step = min(entry["step_bundles"] for entry, _ in entries)
    steps, tiles, _ = numbers(shape, part, blocks)
    least = (0.92 * tiles * blocks[0] * blocks[1] * rate + 0.8 * steps * step) * shape.heads / cores
    if part == "fused":   # XLA's sum takes at least what it took for the parts of larger blocks
        least += min((entry["sum_cycles"] * b[1] for entry, b in entries), default=0) / blocks[1]
    return least > least_known


def compile_tiles(known: dict, chip: str) -> None:
    """The regions of every candidate that may win, once."""
    import attention_tpu_static as bench

    shape, cores = bench.SHAPES["8k"], bench.CHIPS[chip].cores
    candidates = [list(s) for s in itertools.product(BLOCKS, BLOCKS, BLOCKS) if s[2] <= s[1]]
    # The likely ones first, so that `hopeless` sees good ones early.
    candidates.sort(key=lambda s: sum(abs(math.log2(size / middle)) for size, middle in zip(s, (1024, 1024, 512), strict=True)))
    with bench.Compiler(chip, timeout=COMPILE_S) as compiler:
        for s, parts in itertools.product(candidates, (("forward", "dkv", "dq"), ("fused",))):
            keys = {part: f"{chip} {part} " + " ".join(map(str, s[:2] if part == "dq" else s)) for part in parts}
            todo = [p for p in parts if keys[p] not in known["tiles"] and not hopeless(known, chip, shape, p, s, cores)]
            if not todo:
                continue
            start = time.time()

            def ask(wanted: list[str], s: list[int] = s) -> dict:
                back = {"fused": QUICK} if "fused" in wanted else {"dkv": QUICK, "dq": QUICK[:2]}
                given = {part: s[:2] if part == "dq" else s for part in wanted}
                return summaries(compiler, shape, {"forward": QUICK, **back, **given})

            answer = ask(todo)
            if "error" in answer and len(todo) > 1:   # which of them it is shows one by one only
                answer = {part: ask([part]).get(part, "x") for part in todo}
            for part in todo:
                known["tiles"][keys[part]] = answer.get(part, "x")
            save(known)
            prices = {p: round(price(answer[p], shape, p, s, cores) / shape.heads) for p in todo
                      if isinstance(answer.get(p), dict)}
            print(f"  {chip} {s} {prices or answer} ({time.time() - start:.0f} s)", flush=True)


def cheapest(known: dict, chip: str, shape, part: str, cores: int) -> list[tuple[float, list[int]]]:
    """(cycles, blocks) of the candidates of a part that compiled and fit the shape."""
    found = []
    for key, entry in known["tiles"].items():
        if key.startswith(f"{chip} {part} ") and entry != "x":
            blocks = [int(word) for word in key.split()[2:]]
            found.append((price(entry, shape, part, blocks, cores), blocks))
    return sorted(found)


def confirm(known: dict, chip: str, name: str) -> None:
    """Count the likely best programs exactly and book the best."""
    import attention_tpu_static as bench

    shape, cores = bench.SHAPES[name], bench.CHIPS[chip].cores
    found = {part: cheapest(known, chip, shape, part, cores)[:2] for part in PARTS}
    best = {part: [blocks for _, blocks in two] for part, two in found.items()}
    trials = [{part: best[part][i] for part in ("forward", "dkv", "dq")} for i in (0, 1)]
    if found["fused"] and found["fused"][0][0] < 1.1 * (found["dkv"][0][0] + found["dq"][0][0]):   # near enough to know better
        trials += [{part: two[0] for part, two in best.items() if part in ("forward", "fused")}]
    counted = known["counted"].setdefault(f"{chip} {name}", [])
    for setting in trials:
        if any(entry["setting"] == setting for entry in counted):
            continue
        try:
            with bench.Compiler(chip) as compiler:
                got = bench.measure(compiler, shape, "splash", setting)
        except bench.CompileFailed as failed:
            print(f"  {chip} {name} {setting}: {failed}", flush=True)
            continue
        counted.append({"setting": setting, **{key: got[key] for key in ("forward", "backward", "xla", "total")}})
        print(f"  {chip} {name} {setting}: {got['total']:.0f}", flush=True)
        save(known)
    # Forward and backward are independent: the best of each, with the XLA work of the backward's kind.
    forward = min(counted, key=lambda entry: entry["forward"])["setting"]["forward"]
    back = min(counted, key=lambda entry: entry["backward"] + entry["xla"])["setting"]
    known["best"][f"{chip} {name}"] = {**back, "forward": forward}
    save(known)
    print(f"best for {chip} {name}: {known['best'][f'{chip} {name}']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--chips", default="v5e,v5p,v6e")
    parser.add_argument("--shapes", default="8k,32k,8k-full")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
    known = load()
    for chip in args.chips.split(",") if args.search else ():
        compile_tiles(known, chip)
        for name in args.shapes.split(","):
            confirm(known, chip, name)
    for key, setting in known["best"].items():
        print(key, json.dumps(setting))


if __name__ == "__main__":
    main()
