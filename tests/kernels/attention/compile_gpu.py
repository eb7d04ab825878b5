"""Compiles the Hopper kernels with XLA's CUDA compiler and ptxas, with no GPU, and describes what came out.

    python tests/kernels/attention/compile_gpu.py "forward 128 window" "backward 192 full" ...

A line of JSON per job. A process of its own: the CUDA plugin is loaded beside the CPU, and Mosaic reads its dump switches
once. Needs jax-cuda13-plugin and jax-cuda13-pjrt of JAX's own version, and a ptxas of CUDA 12.9 or later.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
COUNTED = {"wgmma": r"wgmma\.mma_async", "tma": r"cp\.async\.bulk\.tensor", "setmaxnreg": r"setmaxnreg",
           "exp2": r"ex2\.approx", "local": r"\b(?:ld|st)\.local"}

# What the forward is compiled with: window, causal, soft-cap, and the names of the arrays beside q, k and v.
FORWARD = {
    "window": (4096, True, None, ()),
    "full": (None, True, None, ()),
    "not causal": (None, False, None, ()),
    "segments": (4096, True, None, ("segments",)),
    "softcap": (4096, True, 50.0, ()),
    "alibi": (4096, True, None, ("slopes",)),
    "sinks": (4096, True, None, ("sinks",)),
    "first_key": (4096, True, None, ("first_key",)),
    "packed": (4096, True, 50.0, ("segments", "sinks", "first_key")),
    "packed alibi": (None, True, None, ("segments", "slopes")),
    "all of them": (4096, True, 50.0, ("segments", "sinks", "first_key", "slopes")),
}


def lower_forward(h: int, features: str, sharding):
    """T = 8192, 4 heads over 2. A tile may follow the features: "window:192,2"."""
    import jax
    import jax.numpy as jnp

    from neo.kernels.attention.kernel import Extras, Plan

    module = importlib.import_module("neo.kernels.attention.gpu.forward")
    features, _, numbers = features.partition(":")
    tile = module.Tile(*map(int, numbers.split(","))) if numbers else None
    window, causal, softcap, names = FORWARD[features]

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    B, T, H, K = 1, 8192, 4, 2
    q, k = array(B, T, H, h, dtype=jnp.bfloat16), array(B, T, K, h, dtype=jnp.bfloat16)
    ids = array(B, T, dtype=jnp.int32) if "segments" in names else None
    slopes, sinks = (array(H) if name in names else None for name in ("slopes", "sinks"))
    extras = Extras(ids, ids, slopes, sinks, array(dtype=jnp.int32) if "first_key" in names else None)
    plan = Plan(h**-0.5, causal=causal, window=window, softcap=softcap)
    return jax.jit(lambda *arrays: module.forward(*arrays, plan, tile)).lower(q, k, k, extras)


def lower_backward(h: int, features: str, sharding):
    """As the backward's own list has it."""
    [shipped] = (s for s in importlib.import_module("neo.kernels.attention.gpu.backward").SHIPPED
                 if (s.head_size, s.features) == (h, features))  # fmt: skip
    return shipped.lower(sharding)


def kernels(folder: Path) -> list[dict]:
    """What Mosaic dumped of every kernel: ptxas' report, the shared memory, and how often PTX has what matters."""
    found = []
    for report in sorted(folder.rglob("*.ptxas")):
        said, ptx = report.read_text(), report.with_suffix(".ptx").read_text()
        resources = report.with_suffix(".resources.txt")
        smem = re.search(r"smem_scratch_bytes=(\d+)", resources.read_text()) if resources.exists() else None
        found.append({
            "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said))),
            "stack_bytes": sum(map(int, re.findall(r"(\d+) bytes stack frame", said))),
            "registers": max(map(int, re.findall(r"Used (\d+) registers", said)), default=None),
            # setmaxnreg ignored; wgmmas made to wait for one another. (C7519, a warpgroup.arrive put in, costs nothing.)
            "warnings": re.findall(r"\((?:C7508|C7510)\)[^\n]*", said),
            "smem_bytes": int(smem[1]) if smem else None,
            **{name: len(re.findall(pattern, ptx)) for name, pattern in COUNTED.items()},
        })  # fmt: skip
    return found


def main(jobs: list[str]) -> None:
    with tempfile.TemporaryDirectory() as dumps:
        switches = {f"MOSAIC_GPU_DUMP_{name}": "1" for name in ("PTX", "PTXAS", "RESOURCES")}
        os.environ.update(switches, MOSAIC_GPU_DUMP_TO=dumps, JAX_PLATFORMS="cpu")
        sys.path.insert(0, str(HERE.parents[2]))
        import jax
        import numpy as np
        from jax.experimental import topologies

        target = (HERE / "h200.textproto").read_text()
        devices = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target).devices
        sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices), ("x",)), jax.sharding.PartitionSpec())
        for job in jobs:
            which, h, features = job.split(" ", 2)
            for old in Path(dumps).rglob("*.*"):
                old.unlink()
            start = time.monotonic()
            lower = {"forward": lower_forward, "backward": lower_backward}[which]
            compiled = lower(int(h), features, sharding).compile()
            seconds = round(time.monotonic() - start, 1)
            temp = compiled.memory_analysis().temp_size_in_bytes
            print(json.dumps({"job": job, "seconds": seconds, "temp_bytes": temp, "kernels": kernels(Path(dumps))}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
