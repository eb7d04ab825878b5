"""Gigabytes per second and memory of `neo.convert from-hf` and `to-hf`, beside a raw copy with the safetensors package.

    python bench/convert.py                 8 of NEO-7B's 28 layers, 5.0 GB: some ten minutes, 15 GB in the temporary folder
    python bench/convert.py --layers=28     all 15.6 GB; needs 47 GB

Random bfloat16 weights in the shapes of NEO-7B, as a Hugging Face folder in shards of 5 GB, go three ways, each in a process of
its own, in turns:
  raw       safetensors alone: safe_open, every tensor, save_file, shard by shard
  from_hf   python -m neo.convert from-hf: the folder to a neo checkpoint, matrices transposed, in bfloat16
  to_hf     python -m neo.convert to-hf: that checkpoint to a folder, which must equal the first one byte by byte
A turn begins with the input dropped from the page cache and ends when the output is on the disk (fsync), start of Python
included. Memory is the high-water mark of the process's resident set. Raw maps its input, so a shard of it counts there.
Figures go to bench/results/convert.json, medians over the rounds. Last line: `ratio:`, the slower of the two ways / raw.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LAYERS, D, F, V, HEADS = 28, 3072, 24576, 64256, 16   # configs/neo_7b.py
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V, "hidden_size": D,
          "intermediate_size": F, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "hidden_act": "silu",
          "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
          "attention_bias": False, "torch_dtype": "bfloat16"}
BLOCK = {"input_layernorm": (D,), "self_attn.q_proj": (D, D), "self_attn.k_proj": (D, D), "self_attn.v_proj": (D, D),
         "self_attn.o_proj": (D, D), "post_attention_layernorm": (D,), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
         "mlp.down_proj": (D, F)}
LARGEST_STACKED_LEAF = LAYERS * D * F * 2 / 1e9   # GB at full depth
RAW = """
import os, sys
from pathlib import Path
import ml_dtypes   # teaches NumPy the name bfloat16
from safetensors import safe_open
from safetensors.numpy import save_file
source, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir()
for path in sorted(source.glob("*.safetensors")):
    with safe_open(path, "np") as file:
        save_file({name: file.get_tensor(name) for name in file.keys()}, out / path.name, {"format": "pt"})
    descriptor = os.open(out / path.name, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
"""


def make_source(folder: str, layers: int) -> None:
    """Run in a process of its own: every tensor is the same random numbers, rolled and with other low bits."""
    import ml_dtypes
    import numpy as np

    from neo.models.hf.files import ShardWriter
    shapes = {"model.embed_tokens.weight": (V, D)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in BLOCK.items()}
    shapes |= {"model.norm.weight": (D,), "lm_head.weight": (V, D)}
    writer = ShardWriter(folder, {name: (shape, ml_dtypes.bfloat16) for name, shape in shapes.items()})
    drawn = (np.random.default_rng(0).standard_normal(V * D, np.float32) * 0.02).astype(ml_dtypes.bfloat16).view(np.uint16)
    for i, name in enumerate(writer.pending):
        size = int(np.prod(shapes[name]))
        writer.write(name, (np.roll(drawn[:size], i) ^ np.uint16(i % 128)).view(ml_dtypes.bfloat16).reshape(shapes[name]))
    writer.close()
    Path(folder, "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))


def measure(command: list[str], source: Path, out: Path) -> tuple[float, float]:
    """(seconds, peak GB) of one process that reads `source`, cold, and writes `out`."""
    shutil.rmtree(out, ignore_errors=True)
    forget(source)
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    trouble = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command[:4])} failed:\n{trouble}")
    return time.perf_counter() - begin, usage.ru_maxrss * 1024 / 1e9


def forget(folder: Path) -> None:
    """Write everything out and drop the folder's files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of the data of every tensor, whichever file holds it."""
    from neo.models.hf.files import SafetensorsFolder
    files = SafetensorsFolder(folder)
    return {name: hashlib.sha256(files.read(name)).hexdigest() for name in files.tensors}


def rounds_of(folder: Path, layers: int, rounds: int) -> tuple[float, dict[str, list[tuple[float, float]]]]:
    """GB of weights, and (seconds, peak GB) of every turn by name."""
    source, raw, checkpoint, back = (folder / name for name in ("source", "raw", "checkpoint", "back"))
    subprocess.run([sys.executable, __file__, "--make", str(source), f"--layers={layers}"], check=True)
    gigabytes = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 1e9
    turns: dict[str, list[tuple[float, float]]] = {"raw": [], "from_hf": [], "to_hf": []}
    for _ in range(rounds):
        turns["raw"].append(measure(["-c", RAW, str(source), str(raw)], source, raw))
        shutil.rmtree(raw)
        turns["from_hf"].append(measure(["-m", "neo.convert", "from-hf", str(source), str(checkpoint)], source, checkpoint))
        turns["to_hf"].append(measure(["-m", "neo.convert", "to-hf", str(checkpoint), str(back)], checkpoint, back))
        for name, (seconds, peak) in ((name, taken[-1]) for name, taken in turns.items()):
            print(f"{name:<8} {gigabytes / seconds:5.2f} GB/s  {seconds:6.1f} s  peak {peak:5.2f} GB", flush=True)
        if len(turns["raw"]) == rounds and digests(source) != digests(back):
            sys.exit("the folder that came back is not the one that went in")
        shutil.rmtree(back)
    return gigabytes, turns


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help=f"of NEO-7B's {LAYERS} (8)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (3)")
    parser.add_argument("--folder", default=None, help="where the files go (the system's temporary folder)")
    parser.add_argument("--out", default=str(ROOT / "bench/results/convert.json"), help="where the figures go")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_source(args.make, args.layers)
        return
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory(prefix="neo-bench-convert-", dir=args.folder) as folder:
        layers, free = args.layers, shutil.disk_usage(folder).free / 1e9
        while layers > 1 and 3.1 * size_of(layers) > free:
            layers -= 1
        if layers != args.layers:
            print(f"{free:.0f} GB are free: {layers} layers instead of {args.layers}")
        gigabytes, turns = rounds_of(Path(folder), layers, args.rounds)
    speed = {name: round(statistics.median(gigabytes / seconds for seconds, _ in taken), 3) for name, taken in turns.items()}
    peak = {name: round(max(peak for _, peak in taken), 2) for name, taken in turns.items()}
    pairs = {name: list(zip(turns["raw"], turns[name], strict=True)) for name in ("from_hf", "to_hf")}
    ratios = {name: round(statistics.median(raw[0] / ours[0] for raw, ours in taken), 2) for name, taken in pairs.items()}
    ratio = min(ratios.values())
    limits = {"from_hf": round(1.3 * LARGEST_STACKED_LEAF + 1.5, 2), "to_hf": 3.0}
    result = {"command": "python bench/convert.py" + (f" --layers={layers}" if layers != 8 else ""),
              "layers": layers, "of_layers": LAYERS, "gigabytes": round(gigabytes, 2), "rounds": args.rounds,
              "GB_per_s": speed, "peak_GB": peak, "peak_GB_allowed_at_full_depth": limits, "ratio_of": ratios, "ratio": ratio,
              "seconds": {name: [round(seconds, 1) for seconds, _ in taken] for name, taken in turns.items()},
              "load_average_before": load, "versions": versions()}
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(out.read_text()) if out.exists() else {}   # runs of other depths stay
    out.write_text(json.dumps({**before, f"{layers} of {LAYERS} layers": result}, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"ratio: {ratio:.2f}  ours/raw safetensors read + write in GB/s, the slower of from-hf ({ratios['from_hf']:.2f}) and "
          f"to-hf ({ratios['to_hf']:.2f}), {layers} of {LAYERS} layers of NEO-7B, {gigabytes:.1f} GB, higher is better")


def size_of(layers: int) -> float:
    """GB of the model with so many layers."""
    return 2 * (2 * V * D + layers * (4 * D * D + 3 * D * F)) / 1e9


def versions() -> dict[str, str]:
    """What the figures depend on."""
    from importlib.metadata import version
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())
    return {"python": platform.python_version(), "cpu": cpu, "cores": str(os.cpu_count()),
            **{name: version(name) for name in ("numpy", "safetensors", "tensorstore", "orbax-checkpoint")}}


if __name__ == "__main__":
    main()
