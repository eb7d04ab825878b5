"""Finds the block sizes of neo's TPU attention kernels by compiling, and writes the table they are looked up in.

    python bench/tune_attention_tpu.py                     what the table holds and what each row was chosen from
    python bench/tune_attention_tpu.py --run [--chips=v5e,...] [--shapes=0,1,...] [--directions=forward,backward]

For each chip, shape and direction one block size after the other is moved a step up or down, from the best found so far,
until no step helps; a candidate's price is bench/attention_tpu_static.py's count of the kernel and of XLA's work around it.
Among candidates within 1 % of the best the one that compiles fastest is taken, and none that takes more than 20 s of CPU.
All counts are kept in bench/results/attention_tpu_blocks.json: a run that was interrupted goes on where it stopped. Rows go
to neo/kernels/attention/tpu/blocks.csv. After a change of the kernels delete the JSON and run again: some minutes a row.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import attention_tpu_static as bench  # noqa: E402

TABLE = ROOT / "neo" / "kernels" / "attention" / "tpu" / "blocks.csv"
COUNTS = ROOT / "bench" / "results" / "attention_tpu_blocks.json"
COLUMNS = ("chip", "seq_len", "window", "head", "stack", "direction", "blocks", "cycles")
# seq_len, window, heads, kv_heads, head: GQA of most models, neo_7b's heads, narrow windows, small heads
SHAPES = ((8192, 4096, 32, 8, 128), (8192, None, 32, 8, 128), (8192, 4096, 16, 16, 192), (8192, 1024, 32, 8, 128),
          (8192, 4096, 32, 8, 64), (2048, None, 16, 16, 128))
STEPS = {"block_q": (128, 256, 512, 1024, 2048), "block_kv": (128, 256, 512, 1024, 2048), "chunk_rows": (128, 256, 512, 1024),
         "chunk_stack": (1, 2, 4), "edge_rows": (128, 256, 512), "edge_stack": (1, 2, 4), "part": (128, 256, 512),
         "unroll": (1, 2, 4), "columns": (256, 512, 1024, 2048), "newton": (0, 1), "turned": (0, 1)}
SLOW_S = 20.0   # CPU seconds of a compile that nobody should wait for
TIE = 1.01


def load() -> dict:
    return json.loads(COUNTS.read_text()) if COUNTS.exists() else {}


def save(counts: dict) -> None:
    installed = {dist.name for dist in importlib.metadata.distributions()}
    about = {name: importlib.metadata.version(name) for name in ("jax", "libtpu") if name in installed}
    rows = [f'"{key}": {json.dumps(value)}' for key, value in counts.items() if key != "versions"]
    COUNTS.write_text("{\n" + ",\n".join([f'"versions": {json.dumps(about)}', *rows]) + "\n}\n")


def words(blocks: dict) -> str:
    return " ".join(f"{field}={value}" for field, value in blocks.items())


def default_blocks(direction: str) -> dict:
    """The fields that are tuned, at the dataclass's own values."""
    from neo.kernels.attention.tpu import KERNEL

    module = importlib.import_module(getattr(KERNEL, direction).__module__)
    given = module.__dict__[f"{direction.capitalize()}Blocks"]()
    return {field: int(getattr(given, field)) for field in STEPS if hasattr(given, field)}


def neighbours(blocks: dict) -> list[dict]:
    """One step of one size, or of both sides of the tile."""
    found = []
    for change in ({"block_q": 1, "block_kv": 1}, {"block_q": -1, "block_kv": -1},
                   *({field: by} for field in blocks for by in (1, -1))):
        changed = dict(blocks)
        for field, by in change.items():
            ladder = STEPS[field]
            at = ladder.index(blocks[field]) + by if blocks[field] in ladder else -1
            changed[field] = ladder[at] if 0 <= at < len(ladder) else None
        if None not in changed.values():
            found.append(changed)
    return found


def price(counts: dict, compiler: bench.Compiler, key: str, shape: bench.Shape, direction: str, blocks: dict) -> dict:
    """{"cycles": per head, "compile_s"} or {"error"} of a candidate, counted once."""
    known = counts.setdefault(key, {})
    name = words(blocks)
    if name not in known:
        try:
            got = bench.measure(compiler, shape, "ours", {direction: blocks}, direction)
            known[name] = {"cycles": round(got["total"] / shape.heads), "compile_s": got["compile_s"]}
        except bench.CompileFailed as failed:
            known[name] = {"error": str(failed)[:120]}
        save(counts)
        print(f"    {name}: {known[name]}", flush=True)
    return known[name]


def best_of(known: dict) -> tuple[str, dict] | None:
    """The fastest to compile of the cheapest 1 %."""
    good = {name: entry for name, entry in known.items() if "cycles" in entry and entry["compile_s"] <= SLOW_S}
    if not good:
        return None
    least = min(entry["cycles"] for entry in good.values())
    near = {name: entry for name, entry in good.items() if entry["cycles"] <= TIE * least}
    return min(near.items(), key=lambda item: item[1]["compile_s"])


def tune(counts: dict, compiler: bench.Compiler, shape: bench.Shape, direction: str) -> None:
    key = key_of(compiler.chip, shape, direction)
    price(counts, compiler, key, shape, direction, default_blocks(direction))
    while True:
        found = best_of(counts[key])
        centre = {f: int(v) for f, v in (word.split("=") for word in found[0].split())} if found else default_blocks(direction)
        new = [blocks for blocks in neighbours(centre) if words(blocks) not in counts[key]]
        if not new:
            return
        for blocks in new:
            entry = price(counts, compiler, key, shape, direction, blocks)
            if found and entry.get("cycles", found[1]["cycles"]) < 0.97 * found[1]["cycles"] and entry["compile_s"] <= SLOW_S:
                break   # clearly better: go on from there


def key_of(chip: str, shape: bench.Shape, direction: str) -> str:
    return f"{chip} {shape.seq_len} {shape.window or ''} {shape.head} {shape.heads // shape.kv_heads} {direction}"


def write_table(counts: dict) -> None:
    """A row for every key with a usable candidate."""
    rows = []
    for key, known in counts.items():
        found = best_of(known) if key != "versions" else None
        if found:
            chip, seq_len, window, head, stack, direction = key.split(" ")
            rows.append((chip, int(seq_len), window, int(head), int(stack), direction, found[0], found[1]["cycles"]))
    rows.sort(key=lambda row: (list(bench.CHIPS).index(row[0]), *row[1:2], int(row[2] or 2**31), *row[3:6]))
    with open(TABLE, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="compile and count what is not known, and write the table")
    parser.add_argument("--chips", default=",".join(bench.CHIPS))
    parser.add_argument("--shapes", default=",".join(map(str, range(len(SHAPES)))), help=f"indices of {SHAPES}")
    parser.add_argument("--directions", default="forward,backward")
    args = parser.parse_args()
    counts = load()
    jobs = [(chip, bench.Shape(*SHAPES[int(index)]), direction) for chip in args.chips.split(",")
            for index in args.shapes.split(",") for direction in args.directions.split(",")]
    if args.run:
        start = time.time()
        for i, (chip, shape, direction) in enumerate(jobs):
            print(f"{i + 1} of {len(jobs)}, {time.time() - start:.0f} s: {key_of(chip, shape, direction)}", flush=True)
            with bench.Compiler(chip, timeout=300) as compiler:
                tune(counts, compiler, shape, direction)
            write_table(counts)
    for chip, shape, direction in jobs:
        known = counts.get(key_of(chip, shape, direction))
        found = best_of(known) if known else None
        if found:
            print(f"{key_of(chip, shape, direction)}: {found[0]}: {found[1]['cycles']} cycles a head, best of {len(known)}")


if __name__ == "__main__":
    main()
