"""Compile one training step of a recipe for a TPU pod with the libtpu wheel, with no TPU, and describe its HLO.

    python tests/tpu/compile_step.py --config=neo_7b --out=step.json [--hlo=step.txt] [--config.a.b=VALUE ...]

A process of its own: libtpu reads its flags once, logs to stderr from C++, and lets one process at a time in.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import math
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# name -> (arguments of get_topology_desc, chip for launch/tpu_flags.py)
TOPOLOGIES = {
    # 64 chips with both cores as one device, and torus links closed on all three sides: without `wrap` the compiler
    # turns every all-gather into zero-fill and all-reduce.
    "v5p:4x4x4": (dict(topology_name="v5:4x4x4", chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1),
                       num_slices=1, wrap=(True, True, True)), "v5p"),
}
_TYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (?P<shape>\(?[^=]*?) (?P<op>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def flags(chip: str) -> tuple[str, ...]:
    """The launch flags of a chip, without the VMEM limit: it changes no collective and trebles the compile time."""
    spec = importlib.util.spec_from_file_location("tpu_flags", ROOT / "launch" / "tpu_flags.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(flag for flag in module.FLAGS[chip] if "scoped_vmem" not in flag)


def collectives(hlo: str) -> list[dict]:
    """Every collective of an HLO text: operation, element type, elements of its largest array, how often it stands there."""
    found: collections.Counter = collections.Counter()
    for match in _COLLECTIVE.finditer(hlo):
        arrays = [(kind, math.prod(int(n) for n in dims.split(",") if n)) for kind, dims in _SHAPE.findall(match["shape"])
                  if kind in _TYPE_BYTES]
        if arrays:
            kind, size = max(arrays, key=lambda array: array[1] * _TYPE_BYTES[array[0]])
            found[match["op"], kind, size] += 1
    return [{"op": op, "type": kind, "elements": size, "times": n} for (op, kind, size), n in sorted(found.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="neo_7b")
    parser.add_argument("--topology", default="v5p:4x4x4", choices=TOPOLOGIES)
    parser.add_argument("--out", required=True)
    parser.add_argument("--hlo")
    args, rest = parser.parse_known_args()
    overrides = [tuple(item.removeprefix("--config.").split("=", 1)) for item in rest]

    topology, chip = TOPOLOGIES[args.topology]
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")
    os.environ.setdefault("LIBTPU_INIT_ARGS", " ".join(flags(chip)))
    sys.path.insert(0, str(ROOT))

    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    import neo.config
    from neo.config.checks import check_on_mesh
    from neo.models.decoder import Decoder
    from neo.parallel.mesh import make_mesh
    from neo.parallel.rules import Layout, rules_for
    from neo.train.optimizer import Optimizer
    from neo.train.step import StepOptions, abstract_batch, abstract_state, make_step

    config = neo.config.load(args.config, overrides)
    devices = topologies.get_topology_desc(platform="tpu", **topology).devices
    mesh = make_mesh(config.mesh, devices)
    check_on_mesh(config, mesh.shape)
    layout = Layout(mesh, rules_for(config.model.num_kv_heads, mesh.shape["tensor"]))
    decoder = Decoder(config.model, jnp.bfloat16, config.train.remat, config.train.attention, layout)
    optimizer = Optimizer(config.optimizer, decoder.axes())
    phase, micro = config.phases[0], config.train.micro_batch
    ways = mesh.shape["replica"] * mesh.shape["fsdp"] * mesh.shape["expert"]
    options = StepOptions(len(config.sources), phase.global_batch // ways // micro if micro else 1,
                          config.optimizer.clip_norm, config.optimizer.z_loss, phase.rope_base)
    state = abstract_state(decoder, optimizer)
    rate = jax.ShapeDtypeStruct((), jnp.float32)

    start = time.time()
    lowered = make_step(decoder, optimizer, options).lower(
        state, abstract_batch(decoder, phase.global_batch, phase.seq_len), rate, rate)
    middle = time.time()
    compiled = lowered.compile()
    end = time.time()
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    if args.hlo:
        Path(args.hlo).write_text(hlo)
    size = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))   # noqa: E731
    report = {
        "config": config.name, "topology": args.topology, "devices": len(devices), "mesh": dict(mesh.shape),
        "batch": [phase.global_batch, phase.seq_len], "remat": config.train.remat, "jax": jax.__version__,
        "parameters": size(state["params"]), "lower_s": round(middle - start, 1), "compile_s": round(end - middle, 1),
        "argument_bytes": memory.argument_size_in_bytes, "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes, "alias_bytes": memory.alias_size_in_bytes,
        "collectives": collectives(hlo),
    }
    Path(args.out).write_text(json.dumps(report, indent=1))
    print(json.dumps({k: v for k, v in report.items() if k != "collectives"}))


if __name__ == "__main__":
    main()
